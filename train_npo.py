"""Fine-tune, retrain and unlearn with NPO and its baselines (Zhang, Lin, Bai, Mei, 2024; Sections 2, 3, 5).

    torchrun --nproc_per_node=2 train_npo.py --loss npo --retain-weight 1    # unlearn forget10; no download
    python train_npo.py --loss sft --split full                  # fine-tune (--split retain90: retrain)

    minimise   forget_weight * L_forget + retain_weight * RT + kl_weight * K    (losses.OBJECTIVES, TERMS)
    NPO:       L_forget = -(2/beta) E log sigmoid(-beta log(pi_theta(y|x) / pi_ref(y|x)))   (losses.py, Eq. 3)

From top to bottom: settings, the reference, the objective, the loop, the run folder, main. A global batch is
defined without regard to processes: each takes its share of the rows, and losses are SUMS that are divided
once by the whole batch's counts. So a step is the same for any micro-batch size and any number of processes.

The largest departure from the authors' code (all are in docs/departures.md): no reference model stays in
memory. The policy is the reference until its first step, so one pass before that step records log pi_ref of
every answer and, where logits are compared, the last hidden states, from which the frozen LM head gives the
logits again. Dropout is off, because at step 0 the policy must equal the reference; that is checked.

Shapes: B sequences, N answer tokens, H hidden size, V vocabulary.
"""

import dataclasses
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from common import (InputError, Parser, cause_of, environment, fingerprint, locate, positive, run_command,
                    write_json)
from data.batches import Counts, MicroBatch, Plan, collate, deal
from data.prompts import TEMPLATES, Encoded
from data.tofu import evaluation_split, load_task, parse_split
from evaluate_tofu import Prepared, evaluate, prepare, read_retain_logs
from losses import COMPUTED, KL_DIRECTIONS, OBJECTIVES, TERMS, Objective, long_name, token_logps
from metrics import best_step, compute_metrics, plot_trajectory, unseen_verdict
from model import (AUTOCAST, LORA_LR_FACTOR, AnswerModel, Loaded, World, add_adapters, autocast, check_head,
                   full_tensor, gathered, join_world, load_model, resolve_model, save_model, shard,
                   weights_hash)

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # checkpoints say so of one process

# ---------------------------------------------------------------- settings

@dataclass
class RunSettings:
    """One command-line flag each; the comments are the help. None: the preset's or the loss's default."""
    loss: str = "npo"  # objective on the forget rows: a name in losses.OBJECTIVES; sft fine-tunes
    forget_weight: float = 1.0  # of the forget loss
    kl_direction: str = "policy_reference"  # K as in the paper; reference_policy: as in the authors' code
    beta: float | None = None  # inverse temperature of the loss (default: the loss's own, else the preset's)
    beta2: float | None = None  # satimp's exponent of 1 - p
    gamma: float | None = None  # simnpo's margin, nats (default 0)
    split: str | None = None  # forget01 to forget99, or rows such as forget10_0to100; sft: full or retainNN
    data: str = "builtin"  # builtin, a folder with TOFU's files, or a Hub id such as locuslab/TOFU
    forget: str | None = None  # own rows to unlearn: JSON, CSV or Parquet; docs/own_data_and_models.md
    retain: str | None = None  # own rows to keep; may be left out where no term reads them
    unseen: str | None = None  # own rows like the forget rows that the model never saw: the run's target
    min_start_probability: float = 0.02  # of own forget rows per token, else the run stops at step 0; 0: off
    model: str = "tiny"  # preset, folder, Hub id, or PRESET=PATH
    reference: str | None = None  # folder of an older model as pi_ref (default: the run's own start)
    template: str | None = None  # prompt template: llama2, qa or chat (default: the model's)
    system_prompt: str | None = None  # for the template chat
    retain_log: list[str] | None = None  # logs of models retrained without the forget rows; the first judges
    retain_pairing: str = "stream"  # a new retain partner in each epoch; fixed: the authors' rule
    epochs: int | None = None  # passes over the forget rows (default: the preset's)
    batch_size: int = 32  # rows per step, over all processes
    micro_batch_size: int | None = None  # rows that a process runs at once: changes memory, not numbers
    lr: float | None = None  # peak learning rate (default: the preset's; 10 times it with --lora)
    weight_decay: float | None = None  # AdamW's, not on norms and biases (default: the preset's)
    warmup_epochs: float = 1.0  # linear warm-up, at least one step
    max_grad_norm: float = 0.0  # clip the norm of the gradient; 0: off
    seed: int = 0  # of the order of rows, partners and refusals, and of new adapters
    dtype: str = "fp32"  # of matrix products: fp32, bf16 or fp16; weights stay float32, but not those frozen
    device: str = "auto"  # auto, cpu, cuda or mps
    parallel: str = "ddp"  # each process holds the model (ddp), or a part of every parameter (fsdp)
    activation_checkpointing: bool = False  # keep each layer's input only: less memory, one more forward pass
    compile: bool = False  # torch.compile the layers (needs a C++ compiler)
    lora: int = 0  # rank of adapters on all linear layers but the head; nothing else is trained; 0: off
    eval_every: str | None = None  # epoch, end, never, N, or the steps 5,10,50 (default: epoch; sft: end)
    checkpoint_every: str = "10m"  # minutes (10m) or a number of steps; also at every evaluation
    keep: str = "last"  # best: also keep best/, the weights of the best evaluation
    log_to: str | None = None  # also log to tensorboard or wandb (optional packages)
    out: str | None = None  # run folder, must not exist (default: runs/METHOD_SPLIT, the next free number)
    resume: str | None = None  # run folder to resume; its settings hold

    @property
    def terms(self) -> dict[str, float]:
        """Name -> weight of the run's terms on retain rows. The weights are fields of Settings, below."""
        weights = {name: getattr(self, f"{long_name(name)}_weight") for name in TERMS}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def method(self) -> str:
        return "+".join([self.loss, *self.terms])

    def objectives(self) -> dict[str, Objective]:
        """The objective and the terms of this run, each with the prefix of its settings' names."""
        return {"": OBJECTIVES[self.loss]} | {f"{name}_": TERMS[name] for name in self.terms}

    def settings_of(self, objective: Objective, prefix: str = "") -> dict:
        """The objective's settings by parameter name. One that is not given has the loss's own default."""
        given = {name: vars(self).get(prefix + name) for name in objective.settings}
        return objective.defaults | {name: value for name, value in given.items() if value is not None}


# Each term has a weight: --retain-weight, --kl-weight and so on.
Settings = dataclasses.make_dataclass(
    "Settings", [(f"{long_name(name)}_weight", float, 0.0) for name in TERMS], bases=(RunSettings,))

CHOICES = {"loss": OBJECTIVES, "kl_direction": KL_DIRECTIONS, "template": TEMPLATES, "dtype": AUTOCAST,
           "retain_pairing": ("stream", "fixed"), "device": ("auto", "cpu", "cuda", "mps"),
           "parallel": ("ddp", "fsdp"), "keep": ("last", "best"), "log_to": ("tensorboard", "wandb")}
ABOVE_ZERO = ("beta", "beta2", "epochs", "batch_size", "micro_batch_size", "lr")  # the others may be 0
CHANGEABLE = {"resume", "parallel", "device", "micro_batch_size"}  # when a run is resumed


def parse(argv: list | None = None) -> Settings:
    """The command line's settings; those of a resumed run come from its folder. Raises InputError."""
    parser = Parser(__doc__)
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(RunSettings), re.M))
    comments |= {f"{long_name(name)}_weight": f"of the term +{name}, {term.loss.__name__} on retain rows"
                 for name, term in TERMS.items()}
    for field in dataclasses.fields(Settings):
        flag, kind = f"--{field.name.replace('_', '-')}", str(field.type)
        if field.type is bool:
            parser.add_argument(flag, action="store_true", default=None, help=comments.get(field.name))
            continue
        number, many = int if "int" in kind else float, "+" if "list" in kind else None
        parser.add_argument(flag, help=comments.get(field.name), choices=CHOICES.get(field.name), nargs=many,
                            type=str if "str" in kind else positive(number, field.name not in ABOVE_ZERO))
    typed = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    s = read_settings(typed) if "resume" in typed else resolve(Settings(**typed), typed)
    if s.lora and s.parallel == "fsdp":
        raise InputError("--lora needs --parallel ddp: the frozen weights are not sharded")
    return s


def read_settings(typed: dict) -> Settings:
    """The settings of the run to resume, with those that may change. Raises InputError."""
    if fixed := sorted(typed.keys() - CHANGEABLE):
        flag = fixed[0].replace("_", "-")
        raise InputError(f"--resume takes the settings from its folder: leave out --{flag}")
    file = Path(typed["resume"]) / "config.json"
    try:
        return Settings(**json.loads(file.read_text(encoding="utf-8"))["settings"] | typed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume needs a run's folder; {file}: {cause_of(error)}") from None


def resolve(s: Settings, typed: dict) -> Settings:
    """Fill in what preset and loss decide. Raises InputError for settings that contradict each other."""
    sft, objective, (preset, name, path) = s.loss == "sft", OBJECTIVES[s.loss], resolve_model(s.model)
    lr = (preset.sft_lr if sft else preset.lr) * (LORA_LR_FACTOR if s.lora else 1)
    defaults = {"split": "full" if sft else "forget10", "eval_every": "end" if sft else "epoch", "lr": lr,
                "epochs": preset.sft_epochs if sft else preset.epochs, "beta": preset.beta,
                "weight_decay": preset.sft_weight_decay if sft else preset.weight_decay,
                "micro_batch_size": min(preset.micro_batch_size, s.batch_size), **objective.defaults}
    s = dataclasses.replace(s, **{name: value for name, value in defaults.items()
                                  if name in vars(s) and getattr(s, name) is None})
    refuse_contradictions(s, typed)
    if s.forget:
        s.split = "own"
    if sft and name == "tiny" and path:  # a folder whose record says tiny learns the facts too
        s.model = f"tiny={path}"
    if s.model == "tiny" and s.data == "builtin" and not sft and not s.retain_log:
        logs = locate("data/tiny/").glob(f"retrained_{evaluation_split(s.split)}*.json")
        s.retain_log = [f"data/tiny/{log.name}" for log in sorted(logs)]
    return s


def refuse_contradictions(s: Settings, typed: dict):
    """Raises InputError for settings that exclude each other or have no effect. `typed` are the user's."""
    used = {prefix + name for prefix, objective in s.objectives().items() for name in objective.settings}
    every = {name for objective in (*OBJECTIVES.values(), *TERMS.values()) for name in objective.settings} | {
        f"{key}_{name}" for key, term in TERMS.items() for name in term.settings}
    for prefix, objective in s.objectives().items():
        if prefix and objective.needs_refusals:
            raise InputError(f"{prefix.strip('_')}: a term reads retain rows, which have no refusals")
        for name in objective.settings:
            if name not in objective.defaults and prefix + name not in vars(s):
                raise InputError(f"{prefix.strip('_') or s.loss}: a step computes no input {name}, only "
                                 f"{', '.join(COMPUTED)}. A setting needs a default value")
    if unused := (every - used) & typed.keys():
        raise InputError(f"--{min(unused).replace('_', '-')} has no effect on {s.method}: leave it out")
    weights = " and ".join(f"--{long_name(name)}-weight" for name in TERMS)
    if s.loss == "sft" and (s.terms or s.reference):
        raise InputError("--loss sft learns its split. It has no terms on retain rows and no reference: "
                         f"leave out {weights}, and --reference")
    if s.log_to and not find_spec(s.log_to):
        raise InputError(f"--log-to needs its package: pip install {s.log_to}")
    own_rows = s.forget or s.retain or s.unseen
    if own_rows and (s.loss == "sft" or {"data", "split"} & typed.keys()):
        raise InputError("--forget, --retain and --unseen replace --data and --split: leave those out, and "
                         "--loss sft")
    if "min_start_probability" in typed and not s.forget:
        raise InputError("--min-start-probability is of own rows, given with --forget: leave it out")
    if s.forget and not s.retain and s.terms:
        raise InputError(f"{weights} need rows to keep: give --retain FILE")
    if not re.fullmatch("epoch|end|never|[1-9][0-9]*(,[1-9][0-9]*)*", s.eval_every):
        raise InputError(f"--eval-every {s.eval_every}: need epoch, end, never, a number of steps, or steps "
                         "such as 5,10,50")
    if s.eval_every == "never" and (s.unseen or s.keep == "best"):
        raise InputError("--unseen and --keep best need evaluations: leave out --eval-every never")
    if not re.fullmatch("[1-9][0-9]*m?", s.checkpoint_every):
        raise InputError(f"--checkpoint-every {s.checkpoint_every}: need minutes, such as 10m, or a number "
                         "of steps")
    if s.out and Path(s.out).exists():
        raise InputError(f"--out {s.out} exists: choose another folder, or continue with --resume {s.out}")
    if not (own_rows or s.loss == "sft") and parse_split(s.split)[0] != "forget":
        raise InputError(f"--split {s.split}: unlearning needs a forget split, forget01 to forget99")


# ---------------------------------------------------------------- the reference, without a model in memory

class Reference:
    """The policy before its first step: log pi_ref of each answer that the loss compares. Where logits are
    compared (K, UNDIAL, KL metrics): also the last hidden states at the answer tokens and the frozen head."""

    def __init__(self, tensors: dict[str, Tensor], device):
        self.tensors, self.device = dict(tensors), device
        self.place = {"device": device, "non_blocking": "cuda" in str(device)}  # CUDA stages what it copies
        self.tensors |= {name: tensors[name].to(device) for name in ("head", "head_bias") if name in tensors}

    def logps(self, keys: list[str]) -> Tensor:
        """log pi_ref(y|x), (B,): sums over each text's answer tokens."""
        return torch.stack([self.tensors[f"logps/{key}"].sum() for key in keys]).to(**self.place)

    def token_logps(self, keys: list[str]) -> Tensor:
        """log pi_ref of each answer token, (N,), text after text."""
        return torch.cat([self.tensors[f"logps/{key}"] for key in keys]).to(**self.place)

    def states(self, keys: list[str]) -> Tensor:
        """Last hidden states where the answer tokens are predicted, (N, H)."""
        return torch.cat([self.tensors[f"states/{key}"] for key in keys]).to(**self.place)

    def logits(self, keys: list[str]) -> Tensor:
        """(N, V), from hidden states (N, H) and the head's weight (V, H)."""
        return torch.nn.functional.linear(self.states(keys), self.tensors["head"],
                                          self.tensors.get("head_bias"))

    def inputs(self, objective: Objective, keys: list[str], refusals: list[str] = ()) -> dict[str, Tensor]:
        """Those of the objective's inputs, by name, that come from the reference."""
        sources = {"reference_logps": (self.logps, keys), "reference_token_logps": (self.token_logps, keys),
                   "reference_logits": (self.logits, keys), "reference_states": (self.states, keys),
                   "reference_rejected_logps": (self.logps, keys),
                   "reference_chosen_logps": (self.logps, refusals)}
        return {name: compute(of) for name, (compute, of) in sources.items() if name in objective.inputs}


def open_reference(s: Settings, model: AnswerModel, run: "Run", world: World) -> Reference:
    """The reference of the run's folder, made from the policy's present weights if it does not exist. Raises
    InputError for own forget rows that the start never learned."""
    file, plan, inputs = run.folder / "reference.safetensors", run.plan, run.plan.objective.inputs
    judged = bool(s.forget) and s.min_start_probability > 0
    kinds = {"row": plan.objective.needs_reference or judged,
             "refusal": "reference_chosen_logps" in inputs or "kl_baseline" in inputs,
             "retain": any(term.needs_reference for term in plan.terms)}
    texts = {key: text for key, text in plan.texts.items() if kinds[key.split("/")[1]]}
    texts |= run.prepared.compared() if s.eval_every != "never" else {}
    if not file.exists():
        older = load_reference(s, run.loaded, world) if s.reference else model
        with gathered(older), autocast(s.dtype, world.device):
            tensors = reference_pass(s, older, texts, plan.pad, world)
        if world.rank == 0:
            save_file(tensors, aside := file.with_name(".reference.partial"))
            os.replace(aside, file)
        world.wait()
    reference = Reference(load_file(file), world.device)
    if judged:
        rows = [f"run/row/{i}" for i in range(plan.rows)]
        probability = reference.token_logps(rows).mean().exp().item()
        if probability < s.min_start_probability:
            if world.rank == 0:
                shutil.rmtree(run.folder)
            raise InputError(
                f"--model {s.model} gives the forget answers a probability of {probability:.2g} per token "
                f"(geometric mean), below --min-start-probability {s.min_start_probability:g}. Learned "
                "answers have 0.5 and more. These rows were never learned, or fine-tuning used another "
                f"prompt (--template is {s.template})")
    return reference


def load_reference(s: Settings, loaded: Loaded, world: World) -> AnswerModel:
    """The model of --reference. Raises InputError where its tokens are not the policy's."""
    older = load_model(s.reference)
    if older.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise InputError(f"--reference {s.reference} has another tokenizer than --model {s.model}")
    model = AnswerModel(older.lm)
    if world.sharded:
        shard(model, AUTOCAST[s.dtype], world)
    return model.to(world.device)


@torch.no_grad()
def reference_pass(s: Settings, model: AnswerModel, texts: dict, pad: int, world: World) -> dict[str, Tensor]:
    """Run the model once over `texts`, each process its share. All processes get all tensors."""
    with_states = ["forget/", "world_facts/"]  # the KL metrics of evaluations compare logits there
    if OBJECTIVES[s.loss].needs_reference_states:
        with_states.append("run/row/")
    if any(TERMS[name].needs_reference_states for name in s.terms):
        with_states.append("run/retain/")
    share = {}
    dealt = deal(list(texts), lambda key: len(texts[key].ids), 2 * s.micro_batch_size, world.rank, world.size)
    for keys in tqdm(filter(None, dealt), "reference", len(dealt), False, disable=world.rank > 0 or None):
        batch = collate([texts[key] for key in keys], pad, world.device)
        hidden, logits = model([batch])
        lengths = [texts[key].answer_tokens for key in keys]
        logps = token_logps(logits, batch.targets).cpu().split(lengths)
        for key, text_logps, states in zip(keys, logps, hidden.float().cpu().split(lengths), strict=True):
            share[f"logps/{key}"] = text_logps.clone()
            if key.startswith(tuple(with_states)):
                share[f"states/{key}"] = states.clone()
    tensors = {name: tensor for part in world.collect(share) for name, tensor in part.items()}
    head = model.lm.get_output_embeddings()
    if any(name.startswith("states/") for name in tensors):
        tensors |= {name: full_tensor(weight).float().cpu().clone() for name, weight in (
            ("head", head.weight), ("head_bias", head.bias)) if weight is not None}
    return tensors


# ---------------------------------------------------------------- the objective

def loss_sums(s: Settings, model: AnswerModel, plan: Plan, micro_batch: MicroBatch, counts: Counts,
              reference: Reference, kl_baseline: Tensor) -> dict[str, Tensor]:
    """A micro-batch's part of the global batch's loss, of the loss's parts and of W. Each is a sum over rows
    or tokens, divided by the whole batch's count, so they add up over micro-batches and processes."""
    micro_batch, row_weight = fill_empty(micro_batch, plan)
    answers, refusals, retain = plan.read_by_policy(micro_batch)
    # Refusals are short, so they are padded apart from the answers.
    batches = [collate(texts, plan.pad, reference.device) for texts in (answers + retain, refusals) if texts]
    targets = torch.cat([batch.targets for batch in batches])
    states, logits = model(batches)  # where answer tokens are predicted: (N, H) and (N, V)
    logps = token_logps(logits, targets)
    predicted = {"logps": logps, "logits": logits, "states": states, "targets": targets}
    forget, kept, refused = spans(answers, retain, refusals)

    inputs = policy_inputs(answers, forget, **predicted) | reference.inputs(
        plan.objective, micro_batch.rows, micro_batch.refusals)
    inputs["kl_baseline"] = kl_baseline  # 0 but for kto
    if refusals:
        inputs["policy_chosen_logps"] = policy_inputs(refusals, refused, **predicted)["policy_logps"]
    inputs |= s.settings_of(plan.objective)
    values = values_of(plan.objective, inputs, answers or refusals)
    count = counts.forget_tokens if plan.objective.mean == "tokens" else counts.rows
    sums = {"loss": s.forget_weight * values.sum() / count, "forget_loss": values.sum() / count}
    for name, weight in s.terms.items():
        term = TERMS[name]
        inputs_kept = policy_inputs(retain, kept, **predicted) | reference.inputs(term, micro_batch.retain)
        part = values_of(term, inputs_kept | s.settings_of(term, f"{name}_"), retain).sum()
        part = part / (counts.retain_tokens if term.mean == "tokens" else counts.rows)
        sums["loss"] = sums["loss"] + weight * part
        sums[f"{long_name(name)}_loss"] = part
    if plan.objective.weight:
        weights = plan.objective.weight(*(inputs[name] for name in plan.objective.inputs))
        per_row = len(weights) == len(answers or refusals)
        sums["mean_W"] = weights.detach().sum() / (counts.rows if per_row else counts.forget_tokens)
    return {name: row_weight * value for name, value in sums.items()}


def fill_empty(micro_batch: MicroBatch, plan: Plan) -> tuple[MicroBatch, float]:
    """A process without rows left runs one row with weight 0: all processes must run FSDP equally often."""
    if micro_batch.rows:
        return micro_batch, 1.0
    return plan.micro_batch_of(plan.stream[0][:1]), 0.0


def spans(*groups: list[Encoded]) -> list[slice]:
    """Where each group's answer tokens lie among those of all groups, one group after the other."""
    counts = [sum(text.answer_tokens for text in texts) for texts in groups]
    ends = itertools.accumulate(counts, initial=0)
    return [slice(*ends) for ends in itertools.pairwise(ends)]


def policy_inputs(texts: list[Encoded], span: slice, logps: Tensor, logits: Tensor, states: Tensor,
                  targets: Tensor) -> dict[str, Tensor]:
    """By name in COMPUTED: what the policy predicts at the answer tokens of `texts`, which lie at `span`."""
    if not texts:
        return {}
    lengths = [text.answer_tokens for text in texts]
    sums = torch.stack([part.sum() for part in logps[span].split(lengths)])  # log pi_theta(y|x), (B,)
    return {"policy_logps": sums, "policy_rejected_logps": sums, "policy_token_logps": logps[span],
            "policy_logits": logits[span], "policy_states": states[span], "targets": targets[span],
            "answer_lengths": torch.tensor(lengths).to(logps.device, non_blocking=logps.is_cuda)}


def values_of(objective: Objective, inputs: dict, texts: list[Encoded]) -> Tensor:
    """The loss's values, one per text or per answer token. Raises InputError for another shape."""
    values = objective.loss(*(inputs[name] for name in objective.inputs))
    if values.dim() != 1 or len(values) not in (len(texts), sum(text.answer_tokens for text in texts)):
        raise InputError(f"{objective.loss.__name__} gives {list(values.shape)} for {len(texts)} rows: need "
                         "one value per sequence or per answer token")
    return values


@torch.no_grad()
def kto_baseline(s: Settings, model: AnswerModel, plan: Plan, refusals: list[str], reference: Reference,
                 world: World) -> Tensor:
    """KTO's z = max(0, mean over the global batch of log pi_theta - log pi_ref on the refusals), without
    gradient."""
    total = torch.zeros((), device=world.device)
    with gathered(model), autocast(s.dtype, world.device):
        for keys in filter(None, deal(refusals, lambda key: len(plan.texts[key].ids), 2 * s.micro_batch_size,
                                      world.rank, world.size)):
            batch = collate([plan.texts[key] for key in keys], plan.pad, world.device)
            _, logits = model([batch])
            total += token_logps(logits, batch.targets).sum() - reference.logps(keys).sum()
    return (world.sum(total) / len(refusals)).clamp(min=0)


def check_start(s: Settings, plan: Plan, logged: dict):
    """At step 0 the policy is the reference: L_NPO = (2/beta) ln 2 and W = 1, L_DPO = (1/beta) ln 2, K = 0.
    Raises RuntimeError otherwise, because every later number would then be against the wrong reference."""
    longest = max(text.answer_tokens for text in plan.texts.values())
    nats = 1e-3 if s.dtype == "fp32" else max(0.5, longest / 200)  # 16-bit kernels differ between batches
    expected = {"mean_W": (1.0, max(1e-4, min(0.5, s.beta * nats / 2)))}
    if plan.objective.value_at_start_times_beta is not None:
        value = plan.objective.value_at_start_times_beta / (s.beta if "beta" in plan.objective.inputs else 1)
        expected["forget_loss"] = value, max(1e-5 * value, nats)
    expected |= {f"{long_name(name)}_loss": (0.0, min(0.05, nats)) for name, term in TERMS.items()
                 if term.value_at_start_times_beta == 0}
    for name, (value, allowed) in expected.items():
        if name in logged and abs(logged[name] - value) > allowed:
            raise RuntimeError(f"step 0: {name} is {logged[name]:.6g} and must be {value:.6g}: the reference "
                               "is not the model that this run begins with, or a new loss or weight is wrong")


@torch.no_grad()
def check_finite(s: Settings, plan: Plan, model: AnswerModel, step: int, world: World):
    """Raises InputError where the last update has made a model whose logits are not finite."""
    with autocast(s.dtype, world.device):
        _, logits = model([collate([plan.texts["run/row/0"]], plan.pad, world.device)])
    if not logits.isfinite().all():
        raise InputError(f"step {step}: the update made logits that are not finite; try a smaller --lr than "
                         f"{s.lr:g}")


# ---------------------------------------------------------------- optimizer, schedule, loop

def adamw(model: AnswerModel, s: Settings) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]  # norms and biases
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """The linear schedule: update k (from 0) of T has k/w while k < w, then (T - k)/(T - w)."""
    if step < warmup_steps:
        return step / warmup_steps
    return (steps - step) / (steps - warmup_steps)


def train(s: Settings, plan: Plan, model: AnswerModel, reference: Reference, run: "Run", world: World):
    """From the newest checkpoint, or else the policy's present weights, to the end of the stream. Raises
    InputError where a loss or gradient is not finite, KeyboardInterrupt after a signal (the run is saved)."""
    if s.activation_checkpointing:
        model.lm.activation_checkpointing_enable({"use_reentrant": False})
    if s.compile:
        model.lm.base_model.compile(dynamic=True)
    model.lm.train()  # dropout is off; only activation checkpointing asks for this mode
    optimizer, scaler = adamw(model, s), torch.amp.GradScaler(world.device.type, enabled=s.dtype == "fp16")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    step = run.restore(model, optimizer, scaler)
    if step == 0 and s.loss != "sft" and (s.eval_every not in ("never", "end") or s.unseen):
        run.evaluate(0, model, reference)

    while step < plan.steps:
        begin, items = time.perf_counter(), plan.stream[step]
        counts = plan.counts(items)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * lr_factor(step, plan.steps, plan.warmup_steps)
        kl_baseline = torch.zeros((), device=world.device)
        if "kl_baseline" in plan.objective.inputs:
            kl_baseline = kto_baseline(s, model, plan, plan.micro_batch_of(items).refusals, reference, world)

        totals = {}
        for micro_batch in plan.micro_batches(items, world.rank, world.size):
            with autocast(s.dtype, world.device):
                sums = loss_sums(s, model, plan, micro_batch, counts, reference, kl_baseline)
            # FSDP averages the gradients over the processes, and they must be added.
            scaler.scale(sums["loss"] * (world.size if world.sharded else 1)).backward()
            totals = {name: totals.get(name, 0) + value.detach() for name, value in sums.items()}
        if not world.sharded:
            for p in parameters:  # not DDP, whose order of adding changes when a run is resumed
                if p.grad is not None:
                    world.sum(p.grad)
        sums = world.sum(torch.stack([*totals.values()]))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, s.max_grad_norm or math.inf)
        *numbers, grad_norm = torch.stack([*sums, full_tensor(norm)]).tolist()  # the host waits for the GPU
        logged = dict(zip(totals, numbers, strict=True))
        overflow = overflowed(scaler, grad_norm)  # the scaler skips the update, and the batch comes again
        if not math.isfinite(logged["loss"]) or not (math.isfinite(grad_norm) or overflow):
            raise InputError(f"step {step + 1}: loss {logged['loss']:g}, gradient norm {grad_norm:g}; "
                             f"see {run.folder / 'checkpoints'}, and try a smaller --lr than {s.lr:g}")
        if step == 0 and s.loss != "sft" and not s.reference:
            check_start(s, plan, logged)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflow:
            continue
        step += 1
        tokens_per_s = counts.tokens / (time.perf_counter() - begin)
        run.log(step, optimizer.param_groups[0]["lr"], logged, grad_norm, tokens_per_s)
        if step in run.evaluation_steps or step == plan.steps:
            check_finite(s, plan, model, step, world)
        run.after_step(step, model, reference, optimizer, scaler)


def overflowed(scaler, grad_norm: float) -> bool:
    """Whether fp16 has overflowed at a loss scale that the scaler can still lower."""
    return scaler.is_enabled() and not math.isfinite(grad_norm) and scaler.get_scale() > 1


# ---------------------------------------------------------------- the run folder

class Run:
    """A run's folder: config.json, log.jsonl, eval/, checkpoints/. It evaluates and saves."""

    def __init__(self, s: Settings, loaded: Loaded, plan: Plan, prepared: Prepared, retrained: tuple,
                 folder: Path, world: World):
        self.s, self.loaded, self.plan, self.prepared, self.retrained = s, loaded, plan, prepared, retrained
        self.folder, self.world = folder, world
        self.evaluation_steps, self.evaluations = plan.steps_at(s.eval_every), {}
        self.saved_at, self.stopped = time.monotonic(), False
        self.writer = metric_writer(s.log_to, self.folder) if s.log_to and world.rank == 0 else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number: int, _):
        self.stopped = True
        signal.signal(number, signal.default_int_handler)  # a second signal ends the process at once

    def after_step(self, step: int, model: AnswerModel, reference: Reference, optimizer, scaler):
        """Evaluate and save where it is due. Raises KeyboardInterrupt after a signal, once all is saved."""
        stop, due = self.requests(step)
        if step in self.evaluation_steps:
            self.evaluate(step, model, reference)
        if step == self.plan.steps:
            return
        if stop or due or step in self.evaluation_steps:
            self.checkpoint(step, model, optimizer, scaler)
        if stop:
            raise KeyboardInterrupt(f"saved after step {step}/{self.plan.steps}: --resume {self.folder} "
                                    "continues")

    def requests(self, step: int) -> tuple[bool, bool]:
        """(Whether a signal asked to stop, whether a checkpoint is due) for any process, told to all."""
        every, minutes = self.s.checkpoint_every, (time.monotonic() - self.saved_at) / 60
        number = int(every.removesuffix("m"))
        due = minutes > number if every.endswith("m") else step % number == 0
        requests = torch.tensor([self.stopped, due], dtype=torch.int32)
        requests = requests.to(self.world.device, non_blocking="cuda" in str(self.world.device))
        return tuple(count > 0 for count in self.world.sum(requests).tolist())

    def log(self, step: int, lr: float, parts: dict, grad_norm: float, tokens_per_s: float):
        if self.world.rank > 0:
            return
        epoch = min(step * self.s.batch_size / self.plan.rows, self.s.epochs)
        line = {"step": step, "epoch": round(epoch, 4), "lr": lr, **parts, "grad_norm": grad_norm,
                "tokens_per_s": round(tokens_per_s)}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.writer:
            self.writer(line, step)
        shown = "".join(f"  {name} {value:9.4f}" for name, value in parts.items())
        print(f"step {step:5d}/{self.plan.steps}  epoch {epoch:6.2f}  lr {lr:.2e}{shown}  grad "
              f"{grad_norm:9.3f}  {tokens_per_s:7.0f} tok/s", flush=True)

    def evaluate(self, step: int, model: AnswerModel, reference: Reference):
        with autocast(self.s.dtype, self.world.device):
            preset, reference = self.loaded.preset, reference if reference.tensors else None
            rows = evaluate(model, self.prepared, self.loaded.tokenizer, preset.eval_batch_size,
                            preset.max_new_tokens, reference, self.world)
        metrics = self.evaluations[step] = compute_metrics(rows, *self.retrained)
        shown = {name: metrics[name] for name in ("forget_quality", "model_utility")} | {
            f"{name}_probability": metrics.get(name, {}).get("probability") for name in ("forget", "retain")}
        shown = {name: value for name, value in shown.items() if value is not None}
        if self.s.unseen:
            shown |= {"forget_loss": metrics["unseen"]["forget_loss"], "AUC": metrics["unseen"]["auc"],
                      "unseen_loss_at_the_start": self.evaluations[0]["unseen"]["unseen_loss"]}
        if self.world.rank == 0:
            provenance = {**self.loaded.meta, "step": step, **environment()}
            write_json(self.folder / "eval" / f"step_{step:06d}.json",
                       {"metrics": metrics, "rows": rows, "provenance": provenance})
            if self.writer:
                self.writer(shown, step)
        if self.s.keep == "best" and step == best_step(self.evaluations):
            save_model(model, self.loaded.tokenizer, self.folder / "best", self.loaded.meta | {"step": step},
                       self.world)
        self.world.say(f"after step {step}: " + ", ".join(
            f"{name.replace('_', ' ')} {value:.3g}" for name, value in shown.items()))

    def checkpoint(self, step: int, model: AnswerModel, optimizer, scaler):
        """Weights and moments, each process its part. Written aside and renamed; two are kept."""
        target, self.saved_at = self.folder / "checkpoints" / f"step_{step:06d}", time.monotonic()
        aside = target.with_name(f".{target.name}")
        if self.world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)  # a killed run may have left parts, of more processes
        self.world.wait()
        tensors = tensors_of(model, optimizer)
        parts = {name: 1 + k // 100 for k, name in enumerate(tensors)}  # a file is copied to the CPU whole
        writer = dcp.HuggingFaceStorageWriter(str(aside), parts, save_distributed=True)
        try:
            dcp.save(tensors, storage_writer=writer)
        except (OSError, CheckpointException) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise InputError(f"cannot write {target} ({cause_of(error)}): after making room, continue with "
                             f"--resume {self.folder}") from None
        if self.world.rank == 0:
            log_bytes = (self.folder / "log.jsonl").stat().st_size
            write_json(aside / "state.json", {"run": self.loaded.meta["run"], "step": step,
                                              "log_bytes": log_bytes, "scaler": scaler.state_dict()})
            shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
            for old in sorted(target.parent.glob("step_*"))[:-2]:
                shutil.rmtree(old)
        self.world.wait()

    def restore(self, model: AnswerModel, optimizer, scaler) -> int:
        """Load the newest checkpoint, and cut the log back to it. Returns its step, or 0 without one."""
        folders = sorted((self.folder / "checkpoints").glob("step_*"))
        state = {"step": 0, "log_bytes": 0}
        if folders:
            state = json.loads((folders[-1] / "state.json").read_text(encoding="utf-8"))
            if state["run"] != self.loaded.meta["run"]:
                raise InputError(f"{folders[-1]} is a checkpoint of another run: remove it")
            updates = torch.tensor(float(state["step"]), device=self.world.device)
            for p in (p for group in optimizer.param_groups for p in group["params"]):  # moments to read into
                optimizer.state[p] = {"step": updates.clone(), "exp_avg": torch.zeros_like(p),
                                      "exp_avg_sq": torch.zeros_like(p)}
            reader = dcp.HuggingFaceStorageReader(str(folders[-1]))
            dcp.load(tensors_of(model, optimizer), storage_reader=reader)
            scaler.load_state_dict(state["scaler"])
            self.world.say(f"resumed after step {state['step']} of {self.plan.steps}")
        for file in sorted((self.folder / "eval").glob("step_*.json")):
            if int(file.stem[5:]) <= state["step"]:
                self.evaluations[int(file.stem[5:])] = json.loads(file.read_text(encoding="utf-8"))["metrics"]
        self.world.wait()  # before the log is cut or an evaluation is written again
        log = self.folder / "log.jsonl"
        if self.world.rank == 0 and log.exists():
            os.truncate(log, min(state["log_bytes"], log.stat().st_size))
        return state["step"]


def tensors_of(model: AnswerModel, optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds. AdamW's count is the step. Weights that --lora froze are in the start."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {f"weight/{name}": p.data for name, p in trained.items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"{moment}/{name}": optimizer.state[p][moment] for name, p in trained.items()}
    return tensors


def metric_writer(kind: str, folder: Path):
    """A function (numbers, step) that logs to tensorboard or wandb."""
    if kind == "wandb":
        import wandb
        return wandb.init(project="npo", name=folder.name, dir=folder).log
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(folder, flush_secs=5)
    return lambda numbers, step: [writer.add_scalar(name, value, step) for name, value in numbers.items()]


def open_folder(s: Settings, config: dict, world: World) -> Path:
    """The run's folder with its config.json. Raises InputError where another run is to be resumed."""
    if s.resume:
        stored = json.loads((Path(s.resume) / "config.json").read_text(encoding="utf-8"))
        for name in ("start_hash", "trained_on", "retrained_hash", "run"):
            if stored.get(name) != config[name]:
                raise InputError(f"--resume {s.resume}: {name} was {stored.get(name)}, now it is "
                                 f"{config[name]}: start a new run")
        return Path(s.resume)
    names = (f"runs/{s.method}_{s.split}" + f"-{k}" * (k > 1) for k in itertools.count(1))
    [folder, *_] = world.collect(Path(s.out or next(name for name in names if not Path(name).exists())))
    if world.rank == 0:
        write_json(folder / "config.json", config)
    world.wait()
    return folder


# ---------------------------------------------------------------- from settings to a finished run

def begin_run(s: Settings, world: World) -> tuple[AnswerModel, Run]:
    """Read all inputs, then open the run's folder. Raises InputError before anything is written."""
    task = load_task(s.data, s.split, s.forget, s.retain, s.unseen)
    loaded = load_model(s.model, s.template, s.system_prompt, base=s.loss == "sft")
    lm, meta, model = loaded.lm, loaded.meta, AnswerModel(loaded.lm)
    check_training_data(s, meta, task, world)
    s.template, context = meta["template"], getattr(lm.config, "max_position_embeddings", None)
    plan = Plan(s, task, loaded.tokenizer, context)
    prepared = prepare(task.evaluated | {"holdout": task.holdout}, loaded.tokenizer, s.template,
                       context=context)
    check_head(model, [*plan.texts.values(), *prepared.texts.values()], plan.pad, s.model)
    if s.lora:
        add_adapters(lm, s.lora, s.seed, AUTOCAST[s.dtype])
    if world.sharded:
        shard(model, AUTOCAST[s.dtype], world)
    model.to(world.device)
    record = meta | {
        "trained_on": {"split": s.split, "loss": s.method, "data": task.source, "template": s.template,
                       "data_fingerprint": task.fingerprint},
        "split": evaluation_split(s.split), "data_fingerprint": task.fingerprint}
    retrained = read_retain_logs(s.retain_log, record["split"], prepared.rows["forget"], record)
    record["retrained_hash"] = fingerprint(retrained)
    fixed = {name: value for name, value in dataclasses.asdict(s).items() if name not in CHANGEABLE}
    identity = [record[name] for name in ("start_hash", "trained_on", "retrained_hash")]
    if s.unseen:
        identity.append(task.holdout)
    if s.reference and not Path(s.reference).is_dir():
        raise InputError(f"--reference {s.reference} is no model's folder")
    if s.reference:
        identity.append(weights_hash(Path(s.reference), None))
    record["run"] = fingerprint(fixed, *identity)
    folder = open_folder(s, {
        "settings": dataclasses.asdict(s), "method": s.method, "rows": plan.rows, "steps": plan.steps,
        "warmup_steps": plan.warmup_steps, "world_size": world.size, "device": str(world.device), **record,
        **environment()}, world)
    describe(s, model, plan, record, task.source, folder, world)
    return model, Run(s, loaded._replace(meta=record), plan, prepared, retrained, folder, world)


def check_training_data(s: Settings, meta: dict, task, world: World):
    """A note where the start was trained on other data, InputError where with another template."""
    trained_on = meta["trained_on"] or {}
    other_data = trained_on.get("data_fingerprint", task.fingerprint) != task.fingerprint
    if other_data and (s.model == "tiny" or not s.forget):
        world.say(f"note: {s.model} was trained on {trained_on['data']}, and may not know {task.source}; "
                  "data/README.md says how to make a start for other data")
    if s.loss != "sft" and meta["template"] != trained_on.get("template", meta["template"]):
        raise InputError(f"--template {s.template}: {s.model} was trained with {trained_on['template']}, and "
                         "its answers to other prompts say little: leave the flag out")


def describe(s: Settings, model: AnswerModel, plan: Plan, record: dict, source: str, folder: Path,
             world: World):
    """Print what is about to run."""
    numbers = {"lr": s.lr, "weight_decay": s.weight_decay}
    for prefix, objective in s.objectives().items():
        numbers |= {prefix + name: value for name, value in s.settings_of(objective, prefix).items()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    answer_tokens = sum(plan.texts[f"run/row/{i}"].answer_tokens for i in range(plan.rows)) / plan.rows
    longest = max(len(text.ids) for text in plan.texts.values())
    world.say(f"{s.method} on {s.split} of {source}, from {record['start']}, into {folder}\n"
              f"{plan.rows} rows, {answer_tokens:.1f} tokens per answer, {longest} in the longest text\n"
              f"{s.epochs} epochs, batch {s.batch_size} (micro-batches of {s.micro_batch_size}): "
              f"{plan.steps} steps, the first {plan.warmup_steps} warm-up\ntemplate {s.template}, " +
              ", ".join(f"{name} {value}" for name, value in numbers.items()) +
              f"; {trained / 1e6:.2f} M parameters to train, {s.dtype}, {world.size} x {world.device.type}")


def main(argv: list | None = None):
    s, begin = parse(argv), time.perf_counter()
    if s.lora and not find_spec("peft"):
        raise InputError("--lora needs the package peft: pip install peft")
    world = join_world(s.device, s.parallel)
    if s.resume and (Path(s.resume) / "model").is_dir():
        return world.say(f"{s.resume} is finished")
    model, run = begin_run(s, world)
    reference = Reference({}, world.device) if s.loss == "sft" else open_reference(s, model, run, world)
    train(s, run.plan, model, reference, run, world)
    if world.rank == 0 and len(run.evaluations) > 1:
        plot_trajectory(run.folder, run.retrained[0])
    save_model(model, run.loaded.tokenizer, run.folder / "model", run.loaded.meta, world)
    world.say(f"{run.folder / 'model'}: written after {time.perf_counter() - begin:.0f} s")
    if s.unseen:
        world.say(unseen_verdict(run.evaluations[run.plan.steps]["unseen"]))
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
