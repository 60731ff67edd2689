"""A run that is ready to begin: everything is checked, and nothing is written."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from data.prompts import system_prompt_of
from data.tofu import NO_HOLDOUT, Task, evaluation_split, load_task
from evaluation.logs import read_retain_log
from evaluation.scoring import Prepared, prepare
from models.adapters import add_adapters
from models.answers import AnswerModel
from models.checks import check_model
from models.loading import load_model, make_tiny, template_note, weights_folder
from models.presets import AUTOCAST, tiny_dims
from models.saving import weights_hash
from models.sharded import fill, shard
from running.plan import Plan
from running.settings import NOT_STORED, check_processes, read_config, template_of
from support.errors import InputError
from support.files import fingerprint, write_json
from support.provenance import environment
from support.world import World

MAY_CHANGE = ("parallel", "transformers_version", "_name_or_path")  # on the way, and the run stays the same


@dataclass
class Job:
    """Fine-tuning, retraining or unlearning: one run with its folder."""
    settings: Namespace
    task: Task
    lm: torch.nn.Module
    tokenizer: object
    start_record: dict  # npo.json of the model that it begins with
    plan: Plan
    prepared: Prepared
    retrained: tuple  # the retrained model's forget and holdout rows, or None and None
    config: dict
    folder: Path | None = None

    def mark(self) -> str:
        """What makes it this run: settings, the model's dimensions, the start, and every text as tokens. A
        checkpoint, or a reference, of another is refused."""
        # Of a begun run, what it knew: a later version of this code, or of transformers, may have more.
        known = read_config(self.folder) if self.folder else self.config
        settings, model = ({key: value for key, value in self.config[part].items()
                            if key in known.get(part, {}) and key not in MAY_CHANGE}
                           for part in ("settings", "model_config"))
        evaluated = [[*t[:3], *t.encoded] for some in self.prepared.texts.values() for t in some]
        tokens = [self.plan.answers, self.plan.partners, list(self.plan.refusals.values()), evaluated]
        return fingerprint(settings, model, self.config["start_weights"], tokens)

    def meta(self) -> dict:
        """npo.json of what it makes."""
        s = self.settings
        return {"preset": s.preset, "template": s.template,
                "trained_on": {"split": s.split, "loss": s.method, "data": s.data,
                               "data_fingerprint": self.task.fingerprint, "seed": s.seed}}


def prepare_job(s: Namespace, world: World) -> Job:
    """Load rows, tokenizer and model, tokenise, check. Raises InputError where the input is at fault."""
    check_processes(s, world.size)
    task = load_task(s.data, s.split, s.forget, s.retain)
    if s.start:
        lm, tokenizer, start = load_model(s.start, without_weights=world.sharded)
    else:
        (lm, tokenizer), start = make_tiny(task.texts(), s.seed, tiny_dims(task.full)), {}
    s.template = template_of(s, tokenizer, start)
    if s.template == "chat":
        s.system_prompt = system_prompt_of(tokenizer)
    context = getattr(lm.config, "max_position_embeddings", None)
    plan = Plan(s, task, tokenizer, context)
    prepared = prepare(task.evaluated, tokenizer, s.template, context, holdout=task.holdout)
    retrained = read_retain_log(s.retain_log, evaluation_split(task.split), prepared.rows["forget"],
                                task.fingerprint, s.template)
    if s.resume and read_config(Path(s.resume)).get("data_fingerprint") != task.fingerprint:
        raise InputError(f"--resume {s.resume}: its data have changed; start a new run")
    config = {"settings": {key: value for key, value in vars(s).items() if key not in NOT_STORED},
              "world_size": world.size, "device": world.device.type,
              "derived": {"rows": plan.rows, "steps": plan.steps, "warmup_steps": plan.warmup_steps,
                          "refusals": plan.refusals_from},
              "data_fingerprint": task.fingerprint, "model_config": lm.config.to_dict(), **environment()}
    job = Job(s, task, lm, tokenizer, start, plan, prepared, retrained, config)
    if s.start and not world.sharded:  # a model for adapters may be too large for the device as it is
        where = world._replace(device=torch.device("cpu")) if s.lora else world
        check(job, AnswerModel(lm.to(where.device)), "fp32", where)
    return job


def check(job: Job, model: AnswerModel, dtype: str, world: World):
    """Try the model out on the run's texts. Raises InputError where the code can't compute it rightly."""
    texts = [*job.plan.answers, *job.plan.refusals.values(), *job.plan.partners, *job.prepared.encoded()]
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
    now = {"start": s.start, "start_weights": weights_hash(model.lm), "retain_log": s.retain_log,
           "start_trained_on": job.start_record.get("trained_on")}
    job.config.update(now)
    stored = read_config(job.folder)
    if stored.get("start_weights", now["start_weights"]) != now["start_weights"]:
        raise InputError(f"--resume {job.folder}: the start's weights have changed since; start a new run")
    if world.rank == 0:
        write_json(job.folder / "config.json", {**stored, **now})
    if s.lora:
        world.say(add_adapters(model.lm, s.lora, s.seed, AUTOCAST[s.dtype]))
    return model.to(world.device)


def describe(job: Job, world: World):
    """Say what is about to be done, and with what."""
    s, plan, task, trained_on = job.settings, job.plan, job.task, job.start_record.get("trained_on")
    parameters = sum(p.numel() for p in job.lm.parameters())
    what = "learn" if s.loss == "sft" else f"unlearn, {len(task.retain)} to keep"
    refusals = f"; refusals: {plan.refusals_from}" if plan.refusals else ""
    world.say(f"{s.method} on {s.split} of {task.source}: {plan.rows} rows to {what}{refusals}")
    at = f" ({s.start})" if s.start not in (None, "", s.model) else ""
    world.say(f"model {s.model}{at}, {parameters / 1e6:.2f} M parameters; {world.size} process(es) on "
              f"{world.device.type}, {s.dtype}")
    if trained_on:
        world.say(f"it was trained on {trained_on.get('split')} of {trained_on.get('data')} "
                  f"({trained_on.get('loss')})")
    settings = ", ".join(f"{name.replace('_', ' ')} {getattr(s, name)}" for name in (
        "lr", *plan.objective.settings, "forget_weight", "retain_weight", "kl_weight", "weight_decay",
        "max_grad_norm", "batch_size", "micro_batch_size", "epochs", "template", "seed"))
    world.say(f"{settings}; {plan.steps} steps ({plan.warmup_steps} warm-up), "
              f"{len(plan.evaluation_steps(s.eval_every))} evaluations")
    if note := template_note(s.model, job.tokenizer, job.start_record, s.template):
        world.say(note)
    if plan.rows < s.batch_size:
        world.say(f"note: a batch of {s.batch_size} holds each of the {plan.rows} rows more than once; "
                  "--batch-size of their number or less makes more steps")
    if s.loss != "sft" and not task.holdout and task.split != "own":
        world.say(NO_HOLDOUT)
