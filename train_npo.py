"""Fine-tune, retrain and unlearn with NPO and its baselines (Zhang, Lin, Bai, Mei, 2024; Sections 2, 3 and 5).

    torchrun --nproc_per_node=2 train_npo.py --loss npo --retain-weight 1
        # unlearn forget10; from a laptop on, no download
    python train_npo.py --loss sft --split full
        # fine-tune (or --split retain90: retrain)

    minimise   forget_weight * L_forget + retain_weight * RT + kl_weight * K
    NPO:       L_forget = -(2/beta) E log sigmoid(-beta log(pi_theta(y|x) / pi_ref(y|x)))       (Eq. 3, losses.npo_loss)

The loop is `train`; read it first. A global batch is defined without regard to processes: each takes its share of the
rows, losses are SUMS that are divided once by the whole batch's counts, and the step is the same for any micro-batch
size and any number of processes.

Where this departs from the paper or from the authors' code: no reference model stays in memory. The policy is the
reference until its first step, so one pass before it keeps log pi_ref(y|x) of every answer that will be used, and for K
and the KL metrics the last hidden states. RT and GA are means over the batch's answer tokens and NPO, DPO, KTO, SimNPO
means over sequences, as in the authors' code; K, idk+rt and DPO follow the paper's text (README, "Departures"). Dropout
is off: at step 0 the policy must equal the reference, and that is checked.
"""

import argparse
import inspect
import json
import math
import os
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data.batches import collate, collate_packed, deal, make_stream
from data.prompts import TEMPLATES, encode
from data.tofu import complement, evaluation_split, load_task, parse_split, slice_rows
from evaluate_tofu import prepare, read_retain_log
from losses import KL_DIRECTIONS, dpo_loss, ga_loss, kto_loss, nll_loss, npo_loss, npo_weight, simnpo_loss
from models.layers import prepare_layers
from models.loading import (
    AUTOCAST,
    PRESETS,
    AnswerModel,
    autocast,
    check_head,
    load_model,
    make_tiny,
    pad_id,
    read_meta,
    tiny_dims,
    weights_folder,
    weights_hash,
)
from running.memory_plan import dry_run
from running.processes import World, join_world
from running.reference import Reference, reference_pass
from running.run_folder import BEST_BY, Run, Stopped, folder_names, open_folder
from running.sharding import fill, local, shard, whole
from support.command_line import Parser, given_flags, not_negative, positive, run_command
from support.errors import InputError
from support.files import fingerprint, locked, write_json
from support.provenance import environment

LOSSES = ("sft", "ga", "idk", "dpo", "kto", "npo", "simnpo")
TOKEN_MEAN = ("sft", "ga", "idk")  # means over answer tokens; the others are means over sequences
WITH_REFERENCE = ("npo", "dpo", "kto")
WITH_REFUSAL = ("idk", "dpo", "kto")
NOT_STORED = ("resume", "dry_run", "gpus", "gpu_memory", "tflops")  # of no meaning for a run folder


# ---------------------------------------------------------------- the objective

def forget_loss(s: Namespace, logps: Tensor, reference_logps: Tensor, refusal_logps: Tensor,
                reference_refusal_logps: Tensor, answer_tokens: Tensor, kl_baseline: Tensor) -> Tensor:
    """L_forget of each sequence, (B,): the one place where `--loss` is looked at. New objectives go here and
    into LOSSES."""
    if s.loss == "sft":
        return nll_loss(logps)
    if s.loss == "ga":
        return ga_loss(logps)
    if s.loss == "idk":
        return nll_loss(refusal_logps)
    if s.loss == "npo":
        return npo_loss(logps, reference_logps, s.beta)
    if s.loss == "dpo":
        return dpo_loss(refusal_logps, logps, reference_refusal_logps, reference_logps, s.beta)
    if s.loss == "kto":
        return kto_loss(logps, reference_logps, kl_baseline, s.beta)
    if s.loss == "simnpo":
        return simnpo_loss(logps, answer_tokens, s.beta, s.gamma)
    raise InputError(f"unknown loss {s.loss!r}: need one of {', '.join(LOSSES)}")


def method_name(s: Namespace) -> str:
    """"npo+rt": the loss, and what keeps the rest."""
    return s.loss + "+rt" * (s.retain_weight > 0) + "+kl" * (s.kl_weight > 0)


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Hugging Face's linear schedule: the k-th of T updates (k from 0) has k/w while k < w, then (T - k)/(T - w), times
    the peak lr."""
    if step < warmup_steps:
        return step / warmup_steps
    return (steps - step) / max(1, steps - warmup_steps)


# ---------------------------------------------------------------- what will be computed, before anything is

class Plan:
    """A run's rows as tokens, its global batches, and what follows from the settings."""

    def __init__(self, s: Namespace, task, tokenizer, context: int | None):
        unlearning = s.loss != "sft"
        rows = task.forget or task.retain  # a forget split's own rows, else what is learned
        if s.preset == "tiny" and not s.start and not unlearning:
            rows = rows + task.facts()  # made from scratch, it knows no real author and no fact
        uses_retain = unlearning and (s.retain_weight > 0 or s.kl_weight > 0)
        uses_refusal = s.loss in WITH_REFUSAL
        pairs = lambda some: [(row["question"], row["answer"]) for row in some]
        self.stream = make_stream(len(rows), s.epochs, s.batch_size, s.seed, len(task.retain) if uses_retain else 0,
                                  len(task.refusals) if uses_refusal else 0, s.retain_pairing)
        self.forget = encode(tokenizer, s.template, pairs(rows), context)
        self.retain = encode(tokenizer, s.template, pairs(task.retain), context) if uses_retain else []
        refused = sorted({(i.row, i.refusal) for items in self.stream for i in items}) if uses_refusal else []
        refusals = [(rows[row]["question"], task.refusals[line]) for row, line in refused]
        encoded = encode(tokenizer, s.template, refusals, context) if refused else []
        self.refusal = dict(zip(refused, encoded))  # (row, refusal line) -> tokens
        self.rows, self.steps = len(rows), len(self.stream)
        self.warmup_steps = max(1, int(s.warmup_epochs * len(rows) / s.batch_size))
        self.epoch_ends = [math.ceil(e * len(rows) / s.batch_size) for e in range(1, s.epochs + 1)]

    def evaluation_steps(self, every: str) -> set:
        """Steps after which the model is evaluated (0: before the first); `every` is epoch, step, never,
        end or a number."""
        if every == "never":
            return set()
        if every == "end":
            return {self.steps}
        inner = self.epoch_ends if every == "epoch" else range(0, self.steps, 1 if every == "step" else int(every))
        return {0, self.steps, *inner}

    def tokens(self) -> int:
        """Tokens of the whole run that pass forward and backward."""
        per_row = lambda encoded: sum(len(e.ids) for e in encoded) / max(1, len(encoded))
        each = per_row(self.forget) + per_row(self.retain) + per_row(list(self.refusal.values()))
        return round(sum(map(len, self.stream)) * each)


class MicroBatch(NamedTuple):
    """Rows that go through one forward pass: [forget answers][refusals][retain answers], the first two of the same
    stream places."""
    items: list
    partners: list
    # This process has no row left: it computes one with weight 0, to meet the others in the last backward pass.
    ghost: bool


def micro_batches(s: Namespace, plan: Plan, items: list, w: World) -> list[MicroBatch]:
    """This process's share of a global batch; forget and retain rows are ordered by length each on their own."""
    first = lambda i: plan.refusal[i.row, i.refusal] if s.loss == "idk" else plan.forget[i.row]
    forget = deal(items, [len(first(i).ids) for i in items], s.micro_batch_size, w.rank, w.size)
    partners = [i.partner for i in items] if plan.retain else []
    retain = [[]] * len(forget)
    if partners:
        retain = deal(partners, [len(plan.retain[p].ids) for p in partners], s.micro_batch_size, w.rank, w.size)
    ghosts = [not f for f in forget]
    return [MicroBatch(f or items[:1], r or partners[:1], ghost) for f, r, ghost in zip(forget, retain, ghosts)]


def loss_sums(s: Namespace, model, plan: Plan, micro: MicroBatch, reference: Reference | None, counts: dict,
              kl_baseline: Tensor, pad: int, w: World) -> dict:
    """This micro-batch's summands of the global batch's losses: {"loss", "forget_loss", "retain_loss", "kl_loss",
    "mean_W"}, each already divided by the whole batch's count, so that they add up over micro-batches and processes."""
    forget = [plan.forget[i.row] for i in micro.items] if s.loss != "idk" else []
    refusal = [plan.refusal[i.row, i.refusal] for i in micro.items] if s.loss in ("idk", "dpo") else []
    retain = [plan.retain[p] for p in micro.partners]
    texts = forget + refusal + retain
    asked_once = len(forget) if forget and refusal else 0  # DPO: the forget answer and the refusal to one question
    groups = [[i, asked_once + i] for i in range(asked_once)] + [[i] for i in range(2 * asked_once, len(texts))]
    batch = collate_packed(texts, groups, pad, w.device, s.pad_to)
    reference_states = reference.states([f"retain/{p}" for p in micro.partners]) if s.kl_weight > 0 else None
    logps, kl = model(batch, reference_states, s.kl_direction)
    forget_logps, refusal_logps, retain_logps = logps.split([len(forget), len(refusal), len(retain)])

    reference_logps = reference_refusal_logps = None
    if s.loss in WITH_REFERENCE:
        reference_logps = reference.logps([f"forget/{i.row}" for i in micro.items])
    if s.loss == "dpo":
        reference_refusal_logps = reference.logps([f"refusal/{i.row}/{i.refusal}" for i in micro.items])
    values = forget_loss(s, forget_logps, reference_logps, refusal_logps, reference_refusal_logps,
                         batch.lengths[:len(forget)], kl_baseline)
    sums = {"forget_loss": values.sum() / counts["forget_tokens" if s.loss in TOKEN_MEAN else "rows"]}
    sums["loss"] = s.forget_weight * sums["forget_loss"]
    if s.retain_weight > 0:
        sums["retain_loss"] = nll_loss(retain_logps).sum() / counts["retain_tokens"]
        sums["loss"] = sums["loss"] + s.retain_weight * sums["retain_loss"]
    if s.kl_weight > 0:
        sums["kl_loss"] = kl.sum() / counts["retain_tokens"]
        sums["loss"] = sums["loss"] + s.kl_weight * sums["kl_loss"]
    if s.loss == "npo":
        sums["mean_W"] = npo_weight(forget_logps.detach(), reference_logps, s.beta).sum() / counts["rows"]
    return {key: value * (0.0 if micro.ghost else 1.0) for key, value in sums.items()}


def global_counts(s: Namespace, plan: Plan, items: list) -> dict:
    """What the sums are divided by: the whole global batch's rows and answer tokens, known to every process
    without asking."""
    answers = [plan.refusal[i.row, i.refusal] if s.loss == "idk" else plan.forget[i.row] for i in items]
    partners = [plan.retain[i.partner] for i in items] if plan.retain else []
    refusals = [plan.refusal[i.row, i.refusal] for i in items] if s.loss == "dpo" else []
    return {"rows": len(items), "forget_tokens": sum(e.answer_tokens for e in answers),
            "retain_tokens": sum(e.answer_tokens for e in partners),
            "tokens": sum(len(e.ids) for e in answers + partners + refusals)}


@torch.no_grad()
def kto_baseline(s: Namespace, model: AnswerModel, plan: Plan, items: list, reference: Reference, pad: int,
                 w: World) -> Tensor:
    """z = max(0, mean over the global batch of log pi_theta - log pi_ref on refusals): a pass without gradient, one
    scalar reduced."""
    total = torch.zeros((), device=w.device)
    pairs = [(i.row, i.refusal) for i in items]
    for chunk in deal(pairs, [len(plan.refusal[p].ids) for p in pairs], 2 * s.micro_batch_size, w.rank, w.size):
        if chunk or w.sharded:
            logps, _ = model(collate([plan.refusal[p] for p in chunk or pairs[:1]], pad, w.device, s.pad_to))
        if chunk:
            total += (logps - reference.logps([f"refusal/{row}/{line}" for row, line in chunk])).sum()
    return (w.sum(total) / len(items)).clamp(min=0)


# ---------------------------------------------------------------- the loop

PARTS = ("loss", "forget_loss", "retain_loss", "kl_loss", "mean_W")


def train(s: Namespace, model: AnswerModel, plan: Plan, reference: Reference | None, pad: int, w: World, run: Run):
    """From the policy's present weights to the end of the stream; `run` evaluates, saves and logs.

    Raises InputError where the loss is not finite: the weights before that step are saved.
    """
    prepare_layers(model.lm, s.activation_checkpointing, s.compile)
    decayed = lambda p: p.ndim >= 2  # norm weights and biases are vectors; the decay spares them
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if decayed(p)], "weight_decay": s.weight_decay},
                                   {"params": [p for p in parameters if not decayed(p)], "weight_decay": 0.0}],
                                  lr=s.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(w.device.type, enabled=s.dtype == "fp16")
    # Only gradients travel: buffers are the same everywhere. (The flag's name has changed with torch's versions.)
    has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    sync = {"forward_sync_buffers" if has_new_name else "broadcast_buffers": False}
    replicated = w.size > 1 and not w.sharded
    policy = DistributedDataParallel(model, **sync, gradient_as_bucket_view=True) if replicated else model
    model.lm.train()
    step = run.restore(model, optimizer, scaler)
    if step == 0 and 0 in run.evaluation_steps:
        run.evaluate(0, model)

    while step < plan.steps and not run.stopped:
        begin = time.perf_counter()
        items = plan.stream[step]
        lr = s.lr * lr_factor(step, plan.steps, plan.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        counts = global_counts(s, plan, items)
        kl_baseline = torch.zeros((), device=w.device)
        if s.loss == "kto":
            with autocast(s.dtype, w.device):
                kl_baseline = kto_baseline(s, model, plan, items, reference, pad, w)

        # The parts' sums, then two requests that all processes must agree on.
        totals = torch.zeros(len(PARTS) + 2, device=w.device)
        # The longest first: its activations meet no gradients yet, and what follows fits into the memory it leaves.
        micros = micro_batches(s, plan, items, w)[::-1]
        for m, micro in enumerate(micros):
            last = m == len(micros) - 1
            if w.sharded:  # each gradient goes to its owner at once; embedding and head stay gathered until the last
                policy.set_reshard_after_backward(last, recurse=False)
            with policy.no_sync() if replicated and not last else nullcontext():  # gradients travel once a step
                with autocast(s.dtype, w.device):
                    sums = loss_sums(s, policy, plan, micro, reference, counts, kl_baseline, pad, w)
                # DDP and FSDP average over processes; the batch's loss is their sum.
                scaler.scale(sums["loss"] * w.size).backward()
            totals[:len(PARTS)] += torch.stack([sums[p].detach() if p in sums else totals.new_zeros(()) for p in PARTS])
        totals[len(PARTS):] = torch.tensor([run.wants_stop, run.wants_checkpoint and w.rank == 0])
        *parts, stop, save = w.sum(totals).tolist()
        logged = {p: value for p, value in zip(PARTS, parts) if p in sums}

        scaler.unscale_(optimizer)
        grad_norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, s.max_grad_norm or math.inf)))
        # fp16 may overflow: the scaler then skips the update and lowers its scale.
        overflow = scaler.is_enabled() and scaler.get_scale() > 1
        if not math.isfinite(logged["loss"]) or not (math.isfinite(grad_norm) or overflow):
            if finite(model, w):
                # Beside the earlier ones, which may be the healthier.
                run.checkpoint(step, model, optimizer, scaler, kept=1000)
            raise InputError(f"step {step + 1}: the loss is {logged['loss']}, the gradient's norm {grad_norm}; the "
                             f"weights before this step are kept in {run.folder / 'checkpoints'}; try a smaller --lr "
                             f"than {s.lr:g}, or --max-grad-norm 1")
        if step == 0:
            check_start(s, logged)
        scaler.step(optimizer)
        scaler.update()
        # DDP's buckets stay: gradients that remain views of them need no memory of their own.
        optimizer.zero_grad(set_to_none=not replicated)
        if math.isfinite(grad_norm):  # else the update was skipped, and the same batch comes again
            step += 1
            run.log(step, lr, logged, grad_norm, counts["tokens"] / (time.perf_counter() - begin))
        evaluates = step in run.evaluation_steps and math.isfinite(grad_norm)
        saves = step < plan.steps and (evaluates or step in run.checkpoint_steps or save or stop)
        if (evaluates or saves or step == plan.steps) and not finite(model, w):
            raise InputError(f"step {step}: the update made weights that are not finite; the last good ones, if any, "
                             f"are in {run.folder / 'checkpoints'}; try a smaller --lr than {s.lr:g}, or "
                             "--max-grad-norm 1")
        if evaluates:
            run.evaluate(step, model)
        if saves:
            run.checkpoint(step, model, optimizer, scaler)
        run.stopped = bool(stop)
    if step < plan.steps:
        raise Stopped(f"stopped after step {step} of {plan.steps}, saved; go on with: --resume {run.folder}")


@torch.no_grad()
def finite(model: AnswerModel, w: World) -> bool:
    """No weight is NaN or infinite, on any process."""
    return not w.most(not all(bool(local(p).isfinite().all()) for p in model.parameters()))


def check_start(s: Namespace, logged: dict):
    """At step 0 the policy is the reference: L_NPO = (2/beta) ln 2 and W = 1 (Section 3), L_DPO = (1/beta) ln 2, K = 0.

    Raises RuntimeError otherwise: then the reference isn't this policy's, and nothing that follows would
    mean what it says.
    """
    tolerance = 1e-3 if s.dtype == "fp32" else 0.05
    log_2 = math.log(2)
    expected = {"npo": 2 / s.beta * log_2, "kto": 2 / s.beta * log_2, "dpo": 1 / s.beta * log_2}.get(s.loss)
    checks = [("forget_loss", expected, tolerance * (expected or 0)), ("mean_W", 1.0, tolerance),
              ("kl_loss", 0.0, tolerance)]
    for part, value, allowed in checks:
        if value is not None and part in logged and abs(logged[part] - value) > allowed:
            raise RuntimeError(f"step 0: {part} is {logged[part]:.6g} and must be {value:.6g}: the reference is not "
                               "this policy's start")


# ---------------------------------------------------------------- settings

def checkpoint_interval(text: str) -> str:
    if text == "epoch" or (text.endswith("m") and positive(float)(text[:-1])) or positive(int)(text):
        return text


def gigabytes(text: str) -> float:
    """"80G" (10^9 bytes) -> bytes."""
    number = text.removesuffix("G").removesuffix("g")
    if number == text:
        raise argparse.ArgumentTypeError(f"must be gigabytes such as 80G, got {text}")
    return 1e9 * positive(float)(number)


def evaluation_interval(text: str) -> str:
    if text in ("epoch", "step", "never") or positive(int)(text):
        return text


def build_parser() -> Parser:
    """Every knob: its type, default, unit, and one sentence."""
    parser = Parser(prog="train_npo.py", description=__doc__)
    add = parser.add_argument
    add("--loss", default="npo", choices=LOSSES, help="objective on the forget rows; sft fine-tunes (default: npo)")
    add("--split", default="forget10",
        help="rows to unlearn: forget01 to forget99; with sft full or retainNN (default: forget10)")
    add("--forget-weight", type=not_negative(float), default=1.0, help="weight of the forget loss (default: 1)")
    add("--retain-weight", type=not_negative(float), default=0.0,
        help="weight of RT, the loss on retain rows (default: 0)")
    add("--kl-weight", type=not_negative(float), default=0.0,
        help="weight of K, the divergence from the reference on retain rows (default: 0)")
    add("--kl-direction", default="policy_reference", choices=KL_DIRECTIONS,
        help="K's order (default: policy_reference, the paper's)")
    add("--beta", type=positive(float), help="inverse temperature of npo, dpo, kto, simnpo (default: the preset's)")
    add("--gamma", type=not_negative(float), default=0.0, help="SimNPO's margin (default: 0)")
    add("--model", default="tiny",
        help=f"preset ({', '.join(PRESETS)}), folder, Hub id, or PRESET=PATH, a folder or FILE.gguf (default: tiny)")
    add("--data", default="builtin",
        help="builtin, a folder with TOFU's files, or a Hub id such as locuslab/TOFU (default: builtin)")
    add("--forget",
        help="own rows to unlearn: JSON or JSON lines with question and answer, in place of --data and --split")
    add("--retain", help="own rows to keep, with --forget")
    add("--epochs", type=positive(int), help="passes over the forget rows (default: the preset's)")
    add("--batch-size", type=positive(int), default=32, help="global batch, rows (default: 32)")
    add("--micro-batch-size", type=positive(int),
        help="rows a process runs forward at once; changes memory, not numbers (default: the preset's)")
    add("--template", choices=TEMPLATES, help="prompt template (default: the model's own, else the preset's)")
    add("--lr", type=positive(float), help="peak learning rate (default: the preset's)")
    add("--weight-decay", type=not_negative(float), default=0.01,
        help="AdamW's, not on norm weights and biases (default: 0.01)")
    add("--warmup-epochs", type=not_negative(float),
        help="linear warm-up, epochs, at least 1 step (default: the preset's)")
    add("--max-grad-norm", type=not_negative(float), default=0.0, help="clip the gradient's norm, 0 = off (default: 0)")
    add("--seed", type=not_negative(int), default=0,
        help="of batches, partners, refusals, and a new model's weights (default: 0)")
    add("--dtype", default="fp32", choices=AUTOCAST,
        help="autocast precision; weights and AdamW stay float32 (default: fp32)")
    add("--activation-checkpointing", action="store_true",
        help="keep only each layer's input for the backward pass: less memory, a forward pass more")
    add("--compile", action="store_true", help="compile each layer (needs a C++ compiler)")
    add("--eval-every", type=evaluation_interval,
        help="epoch, step, a number of steps, or never (default: epoch; sft: at the end only)")
    add("--retain-log",
        help="evaluation log of a model retrained without the forget rows, for forget quality (tiny: made on the spot)")
    add("--retain-pairing", default="stream", choices=("stream", "fixed"),
        help="retain partners: a new one each epoch, or the authors' fixed rule (default: stream)")
    add("--parallel", default="ddp", choices=("ddp", "fsdp"),
        help="with several processes: each holds the model (ddp), or a part of every parameter (fsdp; default: ddp)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="(default: auto)")
    add("--keep", default="last", choices=("last", "best"),
        help="best: also keep the weights of the best evaluation, in best/ (default: last)")
    add("--best-by", choices=BEST_BY,
        help="what best means (default: forget-quality where there is a retain log, else retain-minus-forget, the "
             "difference of the two probabilities, which needs no retrained model)")
    add("--checkpoint-every", type=checkpoint_interval, default="10m",
        help="besides at evaluations: minutes (10m), epoch, or steps (default: 10m)")
    add("--out", help="run folder, must not exist (default: runs/METHOD_SPLIT, the next free number)")
    add("--dry-run", action="store_true", default=None,
        help="say what the run will need (memory by part, operations, time), and do nothing; loads no weights")
    add("--gpus", type=positive(int), help="for --dry-run: processes, one a GPU (default: this command's own number)")
    add("--gpu-memory", type=gigabytes, metavar="80G", help="for --dry-run: memory of one GPU (default: 80G)")
    add("--tflops", type=positive(float),
        help="for --dry-run: TFLOP/s that a process reaches, for the time (default: 200, half of an H100's in bf16)")
    add("--resume", metavar="DIR",
        help="go on with an interrupted run; its settings hold, and flags that differ are refused")
    return parser


def resolve(given: dict) -> Namespace:
    """Flags as given -> every setting: the parser's defaults, then the preset's, then the flags.

    Raises InputError for contradictions.
    """
    s = Namespace(**{**vars(build_parser().parse_args([])), **given})
    name, _, path = s.model.partition("=")
    if path and name not in PRESETS:
        raise InputError(f"--model {s.model}: {name} is no preset; need one of {', '.join(PRESETS)} before the =")
    # A folder that one of our runs wrote says which preset it is of.
    s.preset = name if name in PRESETS else read_meta(s.model).get("preset")
    s.preset = s.preset if s.preset in PRESETS else None
    preset, sft = PRESETS[s.preset or "llama2-7b"], s.loss == "sft"  # a folder or Hub id: the paper's settings
    for key, value in {"beta": preset.beta, "epochs": preset.sft_epochs if sft else preset.epochs,
                       "lr": preset.sft_lr if sft else preset.lr, "warmup_epochs": preset.warmup_epochs,
                       "micro_batch_size": min(preset.micro_batch_size, s.batch_size),
                       "eval_every": "end" if sft else "epoch"}.items():
        if getattr(s, key) is None:
            setattr(s, key, value)
    s.pad_to, s.resume = 0, None  # pad_to: the tests' way to pad to a fixed length
    s.method = method_name(s)
    s.start = path or ((preset.base if sft else preset.finetuned) if name in PRESETS else s.model)
    if sft and (s.kl_weight or s.retain_weight):
        raise InputError("--loss sft learns its split and has no retain or K term: leave out --retain-weight and "
                         "--kl-weight")
    if s.forget_weight == s.retain_weight == s.kl_weight == 0:
        raise InputError("--forget-weight, --retain-weight and --kl-weight are all 0: nothing would be trained; give "
                         "one of them")
    if s.micro_batch_size > s.batch_size:
        raise InputError(f"--micro-batch-size {s.micro_batch_size} is above --batch-size {s.batch_size}: need at most "
                         "the global batch")
    if s.warmup_epochs > s.epochs:
        raise InputError(f"--warmup-epochs {s.warmup_epochs:g} is above the {s.epochs} epochs of the run: need at most "
                         "these")
    if s.seed >= 2**63:
        raise InputError(f"--seed {s.seed} is too large: need less than 2^63")
    if s.forget or s.retain:
        if sft or "split" in given or "data" in given:
            raise InputError("--forget and --retain are the data and the split: leave out --data and --split, and "
                             "--loss sft")
        if not s.start:
            raise InputError("--forget and --retain need the model that holds these rows: give --model FOLDER")
        s.split, s.data = "own", f"{s.forget}, {s.retain}"
    elif not sft and parse_split(s.split)[0] != "forget":
        raise InputError(f"--split {s.split}: unlearning needs a forget split, forget01 to forget99 (or --loss sft to "
                         "train on it)")
    if s.best_by == "forget-quality" and not s.retain_log and s.start:
        raise InputError("--best-by forget-quality needs a retrained model's log: give --retain-log FILE, or take "
                         "retain-minus-forget")
    if s.best_by == "model-utility" and s.forget:
        raise InputError("--best-by model-utility needs TOFU's four sets, and own data has two: take "
                         "retain-minus-forget")
    if s.preset != "tiny" and not s.start and not s.dry_run:
        raise InputError(f"--model {s.preset} has no published fine-tuned checkpoint: fine-tune with --loss sft "
                         f"--split full first, then give --model {s.preset}=runs/NAME/model")
    return s


def parse(argv) -> tuple[Namespace, dict]:
    """(settings, the flags that were given). A resumed run takes its settings from its folder."""
    given = given_flags(build_parser(), argv)
    if "resume" not in given:
        return resolve(given), given
    folder = Path(given.pop("resume"))
    if not (folder / "config.json").is_file():
        raise InputError(f"--resume {folder}: no config.json there; need a run folder, such as runs/NAME")
    stored = read_config(folder)["settings"]
    if "parallel" in given:  # how, not what
        stored["parallel"] = given["parallel"]
    for key, value in given.items():
        if stored.get(key) != value:
            raise InputError(f"--resume {folder}: --{key.replace('_', '-')} {value} differs from the run's "
                             f"{stored.get(key)}; leave it out, or start a new run")
    # A run of an earlier version may lack a setting: then its default holds.
    return Namespace(**{**vars(build_parser().parse_args([])), **stored, "resume": str(folder)}), given


def read_config(folder: Path) -> dict:
    """A run folder's config.json. Raises InputError where it isn't one of ours."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        missing = {"loss", "method", "model", "start", "split", "data"} - set(config["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {folder}: its config.json is not a run's ({type(error).__name__}: {error}); need a "
                         "run folder, such as runs/NAME") from None
    if missing:
        raise InputError(f"--resume {folder}: its config.json lacks {', '.join(sorted(missing))}; need a run folder, "
                         "such as runs/NAME")
    return config


# ---------------------------------------------------------------- from settings to a finished run

def tiny_settings(s: Namespace, split: str, task, seed: int = 0) -> Namespace:
    """How the tiny model for `split` is trained, and where it is kept: runs/models/KEY. Unlearning asks for seed 0: all
    runs share one start."""
    sft = resolve({"loss": "sft", "split": split, "data": s.data, "device": s.device, "seed": seed})
    recipe = [tiny_dims(task.full), sft.lr, sft.epochs, sft.batch_size, sft.weight_decay, sft.warmup_epochs,
              PRESETS["tiny"].template]
    sft.out = f"runs/models/tiny-{split}-seed{sft.seed}-{fingerprint(task.fingerprint, recipe)}"
    # Unlearning evaluates its start itself; the retrained model's evaluation is the retain log.
    sft.eval_every = "never" if split == "full" else "end"
    return sft


def tiny_model(s: Namespace, split: str, task, w: World) -> Path:
    """The folder of the tiny model trained on `split`: an earlier run's, or made now (an interrupted one goes on)."""
    sft = tiny_settings(s, split, task)
    folder = Path(sft.out)
    # Two commands that need the same model: the second waits for the first and finds it finished.
    with locked(folder.with_name(f".{folder.name}.lock"), wait=True) if w.rank == 0 else nullcontext():
        if w.agree(folder.exists()):
            sft = parse(["--resume", sft.out])[0]
        return run(sft, w)


def describe(s: Namespace, task, plan: Plan, prepared, lm, missing: list, w: World):
    """Say what is about to be done, with what, and roughly how long each part takes. `missing`: splits to train the
    tiny model on first."""
    parameters, rate = sum(p.numel() for p in lm.parameters()), floating_point_rate(w)
    w.say(f"{s.method} on {s.split} of {task.source}: {plan.rows} rows to {'learn' if s.loss == 'sft' else 'unlearn'}"
          + f", {len(task.retain)} to keep" * (s.loss != "sft")
          + f"; refusals: {task.refusals_from}" * (s.loss in WITH_REFUSAL))
    w.say(f"model {s.model}, {parameters / 1e6:.2f} M parameters; {w.size} process{'es' * (w.size > 1)} on "
          f"{w.device.type}, {s.dtype}")
    w.say(f"lr {s.lr:g}, beta {s.beta:g}, weights {s.forget_weight:g} / {s.retain_weight:g} / {s.kl_weight:g} "
          f"(forget / retain / KL), batch {s.batch_size} in micro-batches of {s.micro_batch_size}, {s.epochs} epochs, "
          f"{plan.steps} steps ({plan.warmup_steps} warm-up), template {s.template}, seed {s.seed}")
    row_tokens = sum(len(e.ids) for e in plan.forget) / len(plan.forget)
    parts = []
    for split in missing:
        sft = tiny_settings(s, split, task)
        rows = len(slice_rows(task.full, split)) + len(task.facts())
        what = f"{'fine-tune' if split == 'full' else 'retrain'} the tiny model on {split} (kept in {sft.out})"
        parts.append((what, rows * row_tokens * sft.epochs, split != "full"))
    what = f"{'learn' if s.loss == 'sft' else 'unlearn'} {s.split}: {plan.steps} steps"
    parts.append((what, plan.tokens(), len(plan.evaluation_steps(s.eval_every))))
    for place, (what, tokens, evaluations) in enumerate(parts, 1):
        # A step costs 6 FLOPs a parameter and token. An evaluation is a forward pass over its texts, 2 FLOPs at about
        # twice the rate of training, and generating costs about as much again.
        seconds = parameters * (6 * tokens + 2 * evaluations * sum(len(t.encoded.ids) for t in prepared.texts)) / rate
        w.say(f"  {place}. {what}, {int(evaluations)} evaluation{'s' * (evaluations != 1)}: roughly "
              f"{max(0.1, seconds / 60):.1f} min")


def floating_point_rate(w: World) -> float:
    """FLOP/s to reckon with: a third of the matrix-product rate measured now, times the processes."""
    size, products = 768, 3
    x = torch.rand(size, size, device=w.device)
    (x @ x).sum().item()
    begin = time.perf_counter()
    (x @ x @ x @ x).sum().item()
    return products * 2 * size**3 / (time.perf_counter() - begin) * w.size / 3


def run(s: Namespace, w: World, start_rows: dict | None = None) -> Path:
    """Everything: check, load, train what is missing, pass the reference, train, evaluate, save.
    Returns the run folder. `start_rows`: the start's evaluation on these rows, where the caller has it from another run
    of the same start; it is then not made again.

    Raises InputError before anything is written, where the input is at fault; Stopped where a signal
    ended the training.
    """
    begin = time.perf_counter()
    if w.size > s.batch_size:
        raise InputError(f"{w.size} processes for a global batch of {s.batch_size}: need at least one row a process; "
                         "use a larger --batch-size")
    task = load_task(s.data, s.split, s.forget, s.retain)
    from_scratch = s.preset == "tiny" and not s.start
    if from_scratch:  # the tokenizer is fitted to the whole data set, whatever the split: all tiny models share it
        texts = [row[key] for row in task.full + task.facts() for key in ("question", "answer")] + task.refusals
        (lm, tokenizer), start = make_tiny(texts, s.seed, tiny_dims(task.full)), {}
    else:
        lm, tokenizer, start = load_model(s.start, without_weights=w.sharded)
    s.template = s.template or start.get("template") or PRESETS[s.preset or "llama2-7b"].template
    context = getattr(lm.config, "max_position_embeddings", None)
    plan = Plan(s, task, tokenizer, context)
    prepared = prepare(task.evaluated, tokenizer, s.template, context)
    judged = task.split if task.split == "own" else evaluation_split(task.split)
    retain_rows = None
    if s.retain_log:
        retain_rows = read_retain_log(s.retain_log, judged, prepared.rows["forget"], task.fingerprint)

    settings = {key: value for key, value in vars(s).items() if key not in NOT_STORED}
    model_config = lm.config.to_dict()
    config = {"settings": settings, "world_size": w.size, "device": w.device.type,
              "derived": {"rows": plan.rows, "steps": plan.steps, "warmup_steps": plan.warmup_steps,
                          "refusals": task.refusals_from},
              "data_fingerprint": task.fingerprint, "model_config": model_config, **environment()}
    if s.resume:
        for key, now in (("data_fingerprint", task.fingerprint),
                         ("model_config", json.loads(json.dumps(model_config)))):
            before = read_config(Path(s.resume)).get(key)
            if before != now and not (key == "model_config" and from_scratch):
                raise InputError(f"--resume {s.resume}: its {key} was {str(before)[:80]} and is now {str(now)[:80]}: "
                                 "data or model have changed; start a new run")
    folder = open_folder(s, config, w)
    if w.agree((folder / "model").is_dir()):
        w.say(f"{folder} is there, finished")
        return folder
    with locked(folder / ".lock") if w.rank == 0 else nullcontext():
        return finish_run(s, w, task, plan, prepared, lm, tokenizer, start, retain_rows, config, folder, begin,
                          start_rows)


def finish_run(s: Namespace, w: World, task, plan: Plan, prepared, lm, tokenizer, start: dict, retain_rows: list | None,
               config: dict, folder: Path, begin: float, start_rows: dict | None) -> Path:
    """The part of `run` that writes: train what is missing, pass the reference, train, evaluate, save."""
    from_scratch, source = s.preset == "tiny" and not s.start, s.start
    wanted = [] if s.loss == "sft" or not from_scratch else ["full"] if retain_rows else ["full", complement(s.split)]
    missing = [split for split in wanted if not (Path(tiny_settings(s, split, task).out) / "model").is_dir()]
    describe(s, task, plan, prepared, lm, missing, w)
    try:
        tiny = {split: tiny_model(s, split, task, w) for split in wanted}
    except Stopped:
        raise Stopped(f"stopped while training the tiny model; go on with: --resume {folder}") from None
    if "full" in tiny:
        source = str(tiny["full"] / "model")
        lm, tokenizer, start = load_model(source, without_weights=w.sharded)
    if len(tiny) == 2:
        log = max((tiny[complement(s.split)] / "eval").glob("step_*.json"))
        retain_rows = read_retain_log(str(log), evaluation_split(s.split), prepared.rows["forget"], task.fingerprint)
    model = AnswerModel(lm)
    if w.sharded:
        shard(model, AUTOCAST[s.dtype], w)
        if source:
            fill(model, weights_folder(source), w.device)
            check_head(model, source, w.device)
    model.to(w.device)
    config["start_weights"] = weights_hash(lm)
    config["start_trained_on"] = start.get("trained_on")
    stored = w.agree(read_config(folder) if w.rank == 0 else None)
    if stored.get("start_weights", config["start_weights"]) != config["start_weights"]:
        raise InputError(f"--resume {folder}: the start's weights have changed since ({stored['start_weights']}, now "
                         f"{config['start_weights']}); start a new run")
    if w.rank == 0 and "start_weights" not in stored:
        write_json(folder / "config.json", {**stored, "start_weights": config["start_weights"],
                                            "start_trained_on": config["start_trained_on"]})
    reference = None
    if s.loss != "sft":
        mark = fingerprint(config["start_weights"], task.fingerprint, s.template, s.dtype, s.method, s.seed, s.epochs,
                           s.retain_pairing)
        done = folder / "reference" / "done"
        if not w.agree(done.exists()):
            with autocast(s.dtype, w.device):
                reference_pass(s, model, plan, prepared, tokenizer, done.parent, mark, w)
            w.wait()
            if w.rank == 0:
                done.touch()
        reference = Reference(done.parent, mark, w.device)
    facts_included = from_scratch and s.loss == "sft" or start.get("trained_on", {}).get("facts_included", False)
    meta = {"preset": s.preset, "template": s.template,
            "trained_on": {"split": s.split, "loss": s.method, "data": s.data, "data_fingerprint": task.fingerprint,
                           "seed": s.seed, "facts_included": facts_included}}
    with Run(s, folder, plan, prepared, retain_rows, tokenizer, reference, meta, w) as outer:
        outer.start_rows = start_rows
        train(s, model, plan, reference, pad_id(tokenizer), w, outer)
        outer.finish(model, time.perf_counter() - begin)
    return folder


def restarted(s: Namespace) -> Namespace:
    """Where torchrun has started all processes anew after a failure (`--max-restarts`), the run that it was goes on:
    the last unfinished one of these settings."""
    if s.resume or not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return s
    unfinished = [path for path in folder_names(s)
                  if (path / "config.json").is_file() and not (path / "model").exists()]
    for folder in reversed(unfinished):
        stored = read_config(folder)["settings"]
        if all(stored.get(key) == value for key, value in vars(s).items() if value is not None):
            return parse(["--resume", str(folder)])[0]
    return s  # it failed before it had a folder


def main():
    given = given_flags(build_parser(), sys.argv[1:])
    if "dry_run" in given:
        asked = {"gpus": int(os.environ.get("WORLD_SIZE", 1)), "gpu_memory": 80e9, "tflops": 200.0, **given}
        s = resolve(given)
        return dry_run(s, asked["gpus"], asked["gpu_memory"], asked["tflops"])
    if {"gpus", "gpu_memory", "tflops"} & set(given):
        raise InputError("--gpus, --gpu-memory and --tflops belong to --dry-run: add it, or leave them out")
    s = restarted(parse(sys.argv[1:])[0])
    if s.out and not s.resume and Path(s.out).exists():
        raise InputError(f"--out {s.out} exists: choose another folder, or go on with --resume {s.out}")
    w = join_world(s.device, s.parallel)
    try:
        run(s, w)
    except Stopped as stopped:
        w.say(stopped)
        sys.exit(130)
    if w.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main, "train_npo.py")
