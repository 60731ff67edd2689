"""A run that is ready to begin: everything is checked, and nothing is written."""

import json
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.prompts import system_prompt_of
from data.tofu import NO_HOLDOUT, Task, evaluation_split, load_task
from evaluation.logs import read_retain_log
from evaluation.scoring import Prepared, prepare
from models.adapters import add_adapters
from models.answers import AnswerModel
from models.checks import check_model
from models.loading import load_model, make_tiny, weights_folder
from models.presets import AUTOCAST, settings_of, tiny_dims
from models.saving import weights_hash
from models.sharded import fill, shard
from running.plan import Plan
from running.settings import NOT_STORED, read_config
from support.errors import InputError
from support.files import fingerprint, write_json
from support.provenance import environment
from support.world import World


@dataclass
class Job:
    """Fine-tuning, retraining or unlearning: one run with its folder. Of the tiny model's start `lm` holds
    random weights and `start_record` nothing until it has been trained (`take_start`)."""
    settings: Namespace
    task: Task
    lm: torch.nn.Module
    tokenizer: object
    start_record: dict  # npo.json of the model that it begins with
    plan: Plan
    prepared: Prepared
    retrained: tuple = (None, None)  # the retrained model's forget and holdout rows
    config: dict = field(default_factory=dict)
    folder: Path | None = None

    def take_start(self, folder: Path, world: World):
        """Begin with the model of this run. Raises InputError where its tokenizer is not the plan's."""
        self.settings.start, plans = str(folder / "model"), self.tokenizer.get_vocab()
        self.lm, self.tokenizer, self.start_record = load_model(self.settings.start, world.sharded)
        if self.tokenizer.get_vocab() != plans:
            raise InputError(f"{folder} was made with another version of tokenizers, which cuts these texts "
                             "otherwise: remove it, and it is trained again")

    def take_retrained(self, log: str):
        """Compare with the model of this evaluation. Raises InputError where it is of other rows."""
        self.retrained = read_retain_log(log, evaluation_split(self.task.split), self.prepared.rows["forget"],
                                         self.task.fingerprint, self.settings.template)

    def mark(self) -> str:
        """What makes it this run: settings (but `--parallel` may change on the way), the start's weights, and
        every text as tokens. A checkpoint, or a reference, of another is refused."""
        settings = {key: value for key, value in self.config["settings"].items() if key != "parallel"}
        evaluated = [[*t[:3], *t.encoded] for some in self.prepared.texts.values() for t in some]
        tokens = [self.plan.answers, self.plan.partners, list(self.plan.refusals.values()), evaluated]
        return fingerprint(settings, self.config["start_weights"], tokens)

    def meta(self) -> dict:
        """npo.json of what it makes."""
        s = self.settings
        facts = self.start_record.get("trained_on", {}).get("facts_included", False)
        return {"preset": s.preset, "template": s.template,
                "trained_on": {"split": s.split, "loss": s.method, "data": s.data,
                               "data_fingerprint": self.task.fingerprint, "seed": s.seed,
                               "facts_included": facts or s.loss == "sft" and s.from_scratch}}


def prepare_job(s: Namespace, world: World) -> Job:
    """Load rows, tokenizer and model, tokenise, check. Raises InputError where the input is at fault."""
    if world.size > s.batch_size:
        raise InputError(f"{world.size} processes for a global batch of {s.batch_size}: need at least one "
                         "row a process; use a larger --batch-size")
    task = load_task(s.data, s.split, s.forget, s.retain)
    if s.from_scratch:
        (lm, tokenizer), start = make_tiny(task.texts(), s.seed, tiny_dims(task.full)), {}
    else:
        lm, tokenizer, start = load_model(s.start, without_weights=world.sharded)
    refuse_other_start(s, start, system_prompt_of(tokenizer))
    s.template = s.template or start.get("template") or settings_of(s.preset).template
    if s.system_prompt and s.template != "chat":
        raise InputError(f"--system-prompt has no effect with the template {s.template}: leave it out, or "
                         "give --template chat")
    if s.template == "chat":
        wanted = s.system_prompt or system_prompt_of(tokenizer) or settings_of(s.preset).system_prompt
        if wanted:
            tokenizer.init_kwargs["system_prompt"] = s.system_prompt = wanted
    context = getattr(lm.config, "max_position_embeddings", None)
    job = Job(s, task, lm, tokenizer, start, Plan(s, task, tokenizer, context),
              prepare(task.evaluated, tokenizer, s.template, context, holdout=task.holdout))
    if job.plan.steps == 1:
        raise InputError(f"{job.plan.rows} rows, {s.epochs} epochs, batch {s.batch_size}: that is one step, "
                         "whose lr the warm-up has at 0; give more --epochs or a smaller --batch-size")
    if s.retain_log:
        job.take_retrained(s.retain_log)
    if s.start and not world.sharded:
        check(job, AnswerModel(lm.to(world.device)), "fp32", world)
    settings = {key: value for key, value in vars(s).items() if key not in NOT_STORED}
    derived = {"rows": job.plan.rows, "steps": job.plan.steps, "warmup_steps": job.plan.warmup_steps,
               "refusals": job.plan.refusals_from}
    job.config = {"settings": settings, "world_size": world.size, "device": world.device.type,
                  "derived": derived, "data_fingerprint": task.fingerprint,
                  "model_config": lm.config.to_dict(), **environment()}
    before = read_config(Path(s.resume)) if s.resume else {}
    for key in ("data_fingerprint",) if s.from_scratch else ("data_fingerprint", "model_config"):
        if before and before.get(key) != json.loads(json.dumps(job.config[key])):
            raise InputError(f"--resume {s.resume}: its {key} was another: data or model have changed; "
                             "start a new run")
    return job


def refuse_other_start(s: Namespace, start: dict, system_prompt: str | None):
    """Raises InputError where unlearning would ask the model otherwise than it has learned to be asked."""
    template = start.get("template") if start.get("trained_on") else None
    for flag, given, known in (("--template", s.template, template),
                               ("--system-prompt", s.system_prompt, system_prompt)):
        if s.loss != "sft" and known and given not in (None, known):
            raise InputError(f"{flag} {given}: {s.start} was trained with {known}, and answers nothing else "
                             "as it has learned to; leave it out")


def check(job: Job, model: AnswerModel, dtype: str, world: World):
    """Try the model out on the run's texts. Raises InputError where the code can't compute it rightly."""
    texts = [*job.plan.answers, *job.plan.refusals.values(), *job.plan.partners,
             *(t.encoded for some in job.prepared.texts.values() for t in some)]
    check_model(model, texts, job.tokenizer.eos_token_id, job.settings.start, dtype, world)


def policy_of(job: Job, world: World) -> AnswerModel:
    """The model that the run begins with, on the device; where it is sharded, cut, filled and tried out.
    Raises InputError where the code can't compute it rightly, or a resumed run began with other weights."""
    s, model = job.settings, AnswerModel(job.lm)
    if world.sharded:
        shard(model, AUTOCAST[s.dtype], world)
        if s.start:
            fill(model, weights_folder(s.start), world.device)
            check(job, model, s.dtype, world)
    model.to(world.device)
    now = {"start_weights": weights_hash(model.lm), "start_trained_on": job.start_record.get("trained_on")}
    job.config.update(now)
    stored = world.agree(read_config(job.folder) if world.rank == 0 else None)
    if stored.get("start_weights") not in (None, now["start_weights"]):
        raise InputError(f"--resume {job.folder}: the start's weights have changed since; start a new run")
    if world.rank == 0:
        write_json(job.folder / "config.json", {**stored, **now})
    if s.lora:
        world.say(add_adapters(model.lm, s.lora, s.seed, AUTOCAST[s.dtype]))
    return model


def describe(job: Job, world: World):
    """Say what is about to be done, and with what."""
    s, plan, task, trained_on = job.settings, job.plan, job.task, job.start_record.get("trained_on")
    parameters = sum(p.numel() for p in job.lm.parameters())
    what = "learn" if s.loss == "sft" else f"unlearn, {len(task.retain)} to keep"
    refusals = f"; refusals: {plan.refusals_from}" if plan.refusals else ""
    world.say(f"{s.method} on {s.split} of {task.source}: {plan.rows} rows to {what}{refusals}")
    world.say(f"model {s.model}, {parameters / 1e6:.2f} M parameters; {world.size} process(es) on "
              f"{world.device.type}, {s.dtype}")
    if trained_on:
        world.say(f"it was trained on {trained_on.get('split')} of {trained_on.get('data')} "
                  f"({trained_on.get('loss')})")
    settings = ", ".join(f"{name.replace('_', ' ')} {getattr(s, name)}" for name in (
        "lr", *plan.objective.settings, "forget_weight", "retain_weight", "kl_weight", "batch_size",
        "micro_batch_size", "epochs", "template", "seed"))
    world.say(f"{settings}; {plan.steps} steps ({plan.warmup_steps} warm-up), "
              f"{len(plan.evaluation_steps(s.eval_every))} evaluations")
    if s.loss != "sft" and not task.holdout:
        world.say(NO_HOLDOUT)
