"""Fine-tune, retrain and unlearn with NPO and its baselines (Zhang, Lin, Bai, Mei, 2024; Sections 2, 3, 5).

    torchrun --nproc_per_node=2 train_npo.py --loss npo --retain-weight 1    # unlearn forget10; no download
    python train_npo.py --loss sft --split full                  # fine-tune (or --split retain90: retrain)

    minimise   forget_weight * L_forget + retain_weight * RT + kl_weight * K
    NPO:       L_forget = -(2/beta) E log sigmoid(-beta log(pi_theta(y|x) / pi_ref(y|x)))   (losses, Eq. 3)

It reads from top to bottom: the objective, the processes and the optimizer, the loop (`train`), the runs. A
global batch is defined without regard to processes: each takes its share of the rows, losses are SUMS that
are divided once by the whole batch's counts, and the step is the same for any micro-batch size and any number
of processes.

Where this departs from the paper or from the authors' code: no reference model stays in memory. The policy is
the reference until its first step, so one pass before it keeps log pi_ref(y|x) of every answer that will be
used, and for K and the KL metrics the last hidden states. RT and GA are means over the batch's answer tokens
and NPO, DPO, KTO, SimNPO means over sequences, as in the authors' code; K, idk+rt and DPO follow the paper's
text (docs/departures.md; newer objectives: docs/beyond.md). Dropout is off: at step 0 the policy must equal
the reference, and that is checked.
"""

import math
import os
import sys
import time
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.batches import Item, collate
from data.tofu import Task, complement
from evaluate_tofu import compute_metrics
from evaluation.scoring import logps_of_texts
from losses import kl_loss, nll_loss, token_logps
from models.answers import AnswerModel, Span
from models.layers import prepare_layers
from models.presets import autocast
from models.sharded import local, whole
from running.job import Job, describe, policy_of, prepare_job
from running.memory_plan import dry_run
from running.plan import Counts, Plan
from running.processes import meeting_place, take_device
from running.reference import Reference, reference_pass
from running.run_folder import RunFolder, Stopped, open_folder
from running.settings import parse, resumed, tiny_settings
from support.command_line import cores, run_command
from support.errors import InputError
from support.files import locked, whole_folder
from support.world import World

TIMEOUT = timedelta(hours=12)  # of a collective: others wait while one writes a checkpoint or holds a lock


# ---------------------------------------------------------------- the objective

def forget_loss(plan: Plan, known: dict) -> Tensor:
    """L_forget of each sequence, (B,), or answer token, (N,), from what is `known` of the batch."""
    given = {own.name: known[name] for name, own in plan.objective.takes.items()}
    values = plan.objective.loss(**given)
    one_each = {x.shape[:1] for x in given.values() if torch.is_tensor(x) and x.ndim > 0}
    assert values.shape in one_each, f"need one value a sequence or token, got {tuple(values.shape)}"
    return values


def loss_sums(s: Namespace, policy: nn.Module, plan: Plan, items: list[Item], reference: Reference | None,
              counts: Counts, kl_baseline: Tensor, device) -> dict:
    """A micro-batch's summands of the global batch's loss, its parts and W, each already divided by the whole
    batch's count, so that they add up over micro-batches and processes. policy: an AnswerModel, or DDP's."""
    objective, share = plan.objective, 1.0
    if not items:  # no row is left: one without weight meets the others in the last backward pass
        items, share = plan.stream[0][:1], 0.0
    texts, micro_counts, rows = plan.texts(items), plan.counts(items), [i.row for i in items]
    batch = collate(sum(texts, []), plan.pad, device)  # answers, refusals, retain answers, in this order
    settings = {name: getattr(s, name) for name in objective.settings}
    on_logits = "policy_logits" in objective.takes

    def loss_of_logits(logits, targets, reference_logits=None):  # (n, V): never of all tokens at once
        return forget_loss(plan, {"policy_logits": logits, "reference_logits": reference_logits,
                                  "targets": targets, **settings})

    def logps_and_kl(logits, targets, *reference_logits):  # (1, n), or with a reference (2, n)
        kls = [kl_loss(logits, theirs, s.kl_direction) for theirs in reference_logits]
        return torch.stack([token_logps(logits, targets), *kls])

    states = reference.states("forget", rows) if "reference_logits" in objective.takes else None
    asked = loss_of_logits if on_logits else token_logps
    spans = [Span(len(batch.targets) - micro_counts.retain_tokens, asked, states)]
    if plan.partners:
        states = reference.states("retain", [i.partner for i in items]) if s.kl_weight > 0 else None
        spans.append(Span(micro_counts.retain_tokens, logps_and_kl, states))
    token_values, *of_retain = policy(batch, spans)
    answer_logps, refusal_logps, _zeros = batch.per_text(token_values).split([len(some) for some in texts])

    known = {"policy_logps": answer_logps, "refusal_logps": refusal_logps,
             "policy_token_logps": token_values[:micro_counts.forget_tokens], "kl_baseline": kl_baseline,
             "answer_lengths": batch.answer_tokens[:len(answer_logps)], **settings}
    if "reference_token_logps" in objective.takes:
        known["reference_token_logps"] = reference.token_logps(rows)
    if "reference_logps" in objective.takes:
        known["reference_logps"] = reference.answer_logps(items)
    if "reference_refusal_logps" in objective.takes:
        known["reference_refusal_logps"] = reference.refusal_logps(items)
    count = counts.forget_tokens if objective.mean == "tokens" else counts.rows  # nats a token, or a sequence
    values = token_values if on_logits else forget_loss(plan, known)
    forget = values.sum() / count
    sums = {"loss": s.forget_weight * forget, "forget_loss": forget}
    if plan.partners:
        retain_token_logps, *token_kls = of_retain[0]
    if s.retain_weight > 0:
        sums["retain_loss"] = nll_loss(retain_token_logps).sum() / counts.retain_tokens  # nats a token
        sums["loss"] = sums["loss"] + s.retain_weight * sums["retain_loss"]
    if s.kl_weight > 0:
        sums["kl_loss"] = token_kls[0].sum() / counts.retain_tokens
        sums["loss"] = sums["loss"] + s.kl_weight * sums["kl_loss"]
    if objective.weight:
        weights = objective.weight(*(known[name] for name in objective.takes))
        sums["mean_W"] = weights.detach().sum() / count
    return {name: share * value for name, value in sums.items()}


@torch.no_grad()
def kto_baseline(s: Namespace, model: AnswerModel, plan: Plan, items: list[Item], reference: Reference,
                 world: World) -> Tensor:
    """z = max(0, mean over the global batch of log pi_theta - log pi_ref on refusals): no gradient."""
    refusals = [plan.refusals[i.row, i.refusal] for i in items]
    logps, _ = logps_of_texts(model, refusals, 2 * s.micro_batch_size, plan.pad, world)
    return (logps - reference.refusal_logps(items)).mean().clamp(min=0)


# ---------------------------------------------------------------- processes, optimizer, schedule

def join_world(device: str, parallel: str = "ddp") -> World:
    """The processes that torchrun started, or this one alone, which has nothing to shard."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = take_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif local_size > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # all that torchrun leaves a process
        torch.set_num_threads(max(1, cores() // local_size))
    if size > 1:
        # nccl wants a GPU a process; where several share one, gloo carries CUDA tensors too.
        backend = "nccl" if chosen.type == "cuda" and local_size <= torch.cuda.device_count() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, **meeting_place(rank, size))
    return World(rank, size, chosen, sharded=parallel == "fsdp" and size > 1)


@contextmanager
def gradients_travel(policy, last: bool, world: World):
    """Once a step: with the last micro-batch's backward pass. Sharded, each gradient goes to its owner at
    once, and embedding and head stay gathered until the last."""
    if world.sharded:
        policy.set_reshard_after_backward(last, recurse=False)
    with policy.no_sync() if isinstance(policy, DistributedDataParallel) and not last else nullcontext():
        yield


def adamw(model: AnswerModel, s: Namespace) -> torch.optim.AdamW:
    """Norm weights and biases are vectors; the decay spares them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Hugging Face's linear schedule, a factor: update k (from 0) of T has k/w, then (T - k)/(T - w)."""
    if step < warmup_steps:
        return step / warmup_steps
    return (steps - step) / max(1, steps - warmup_steps)


# ---------------------------------------------------------------- the loop

def train(s: Namespace, plan: Plan, model: AnswerModel, reference: Reference | None, run: RunFolder,
          world: World):
    """From the policy's present weights to the end of the stream. Raises InputError where the loss is not
    finite (the weights before that step are saved), Stopped where a signal asked for the end."""
    prepare_layers(model.lm, s.activation_checkpointing, s.compile)
    optimizer = adamw(model, s)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(world.device.type, enabled=s.dtype == "fp16")
    policy = model  # the same weights
    if world.size > 1 and not world.sharded:
        policy = DistributedDataParallel(model, gradient_as_bucket_view=True)  # averages gradients
    model.lm.train()
    step, stop = run.restore(model, optimizer, scaler), False
    if step == 0 and 0 in run.evaluation_steps:
        run.evaluate(0, model)

    while step < plan.steps and not stop:
        begin = time.perf_counter()
        items = plan.stream[step]
        counts = plan.counts(items)
        lr = s.lr * lr_factor(step, plan.steps, plan.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        kl_baseline = torch.zeros((), device=world.device)
        if "kl_baseline" in plan.objective.takes:
            with autocast(s.dtype, world.device):
                kl_baseline = kto_baseline(s, model, plan, items, reference, world)

        totals = 0
        micros = plan.micro_batches(items, world)
        for m, micro in enumerate(micros, 1):
            with gradients_travel(policy, m == len(micros), world):
                with autocast(s.dtype, world.device):
                    sums = loss_sums(s, policy, plan, micro, reference, counts, kl_baseline, world.device)
                scaler.scale(sums["loss"] * world.size).backward()  # DDP and FSDP average over processes
            totals = totals + torch.stack([value.detach() for value in sums.values()])
        logged = dict(zip(sums, world.sum(totals).tolist(), strict=True))  # each micro-batch has these

        scaler.unscale_(optimizer)
        grad_norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, s.max_grad_norm or math.inf)))
        # fp16 may overflow: the scaler then skips the update and lowers its scale.
        skipped = scaler.is_enabled() and scaler.get_scale() > 1 and not math.isfinite(grad_norm)
        if not math.isfinite(logged["loss"]) or not (math.isfinite(grad_norm) or skipped):
            if finite(model, world):
                run.checkpoint(step, model, optimizer, scaler)
            give_up(step + 1, not_finite(logged | {"the gradient's norm": grad_norm}, step), run, s)
        if step == 0:
            check_start(s, plan, logged | {"kl_baseline": float(kl_baseline)})
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=policy is model)  # DDP's buckets stay: gradients are views of them

        # Any process may be asked to stop; process 0 knows when a checkpoint is due.
        requests = torch.tensor([run.stop_asked, run.save_due], dtype=torch.int32, device=world.device)
        stop, save = (asked > 0 for asked in world.sum(requests).tolist())
        if not skipped:  # else the same batch comes again
            step += 1
            run.log(step, lr, logged, grad_norm, counts.tokens / (time.perf_counter() - begin))
        evaluates = step in run.evaluation_steps and not skipped
        saves = step < plan.steps and (evaluates or step in run.checkpoint_steps or save or stop)
        if (evaluates or saves or step == plan.steps) and not finite(model, world):
            give_up(step, "the update made weights that are not finite", run, s)
        if evaluates:
            run.evaluate(step, model)
        if saves:
            run.checkpoint(step, model, optimizer, scaler)
    if step < plan.steps:
        raise Stopped(f"stopped after step {step} of {plan.steps}, saved; go on with: --resume {run.folder}")


@torch.no_grad()
def finite(model: AnswerModel, world: World) -> bool:
    """No weight is NaN or infinite, on any process."""
    return not world.most(not all(bool(local(p).isfinite().all()) for p in model.parameters()))


def not_finite(parts: dict, updates: int) -> str:
    told = ", ".join(f"{name} {value:g}" for name, value in parts.items())
    return told if updates else f"{told}, before any update: the loss itself is at fault, or the start"


def give_up(step: int, what: str, run: RunFolder, s: Namespace):
    raise InputError(f"step {step}: {what}; the last good weights, if any, are in "
                     f"{run.folder / 'checkpoints'}; try a smaller --lr than {s.lr:g}, or --max-grad-norm 1")


def check_start(s: Namespace, plan: Plan, logged: dict):
    """At step 0 the policy is the reference: L_NPO = (2/beta) ln 2 and W = 1 (Section 3), L_DPO = (1/beta)
    ln 2, K = 0, z = 0. Raises RuntimeError otherwise: then nothing that follows would mean what it says."""
    # Of a log-ratio; in 16 bits kernels differ by half a nat and more a sequence, a batch's mean by less; a
    # token's K and W by some thousandths.
    nats = 1e-3 if s.dtype == "fp32" else max(0.5, 2 / math.sqrt(s.batch_size))
    allowed_w = min(0.5 if plan.objective.mean == "sequences" else 0.1, s.beta * nats / 2)
    expected = {"mean_W": (1.0, max(1e-4, allowed_w)), "kl_loss": (0.0, min(0.05, nats)),
                "kl_baseline": (0.0, nats)}
    if plan.objective.at_reference is not None:
        value = plan.objective.at_reference / (s.beta if "beta" in plan.objective.takes else 1)
        expected["forget_loss"] = value, max(1e-5 * value, nats)
    for part, (value, allowed) in expected.items():
        if part in logged and abs(logged[part] - value) > allowed:
            raise RuntimeError(f"step 0: {part} is {logged[part]:.6g} and must be {value:.6g}: the reference "
                               "is not this policy's start")


# ---------------------------------------------------------------- from settings to finished runs

def carry_out(s: Namespace, world: World) -> Path:
    """Fine-tune, retrain, unlearn: what of it the settings need. Returns the last one's folder. Raises
    InputError before anything is written where the input is at fault, Stopped where a signal ended it."""
    begin = time.perf_counter()
    if s.resume and world.agree((Path(s.resume) / "model").is_dir()):
        world.say(f"{s.resume} is there, finished")
        return Path(s.resume)
    job = prepare_job(s, world)
    folder = open_folder(s, job.config, world)
    with locked(folder / ".lock") if world.rank == 0 else nullcontext():
        describe(job, world)
        if s.loss != "sft" and not s.start:
            s.start, s.retain_log = tiny_models(s, job.task, folder, world)
            job = prepare_job(s, world)  # again, with the model that it begins with
        job.folder = folder
        run_job(job, begin, world)
    return folder


def tiny_models(s: Namespace, task: Task, for_run: Path, world: World) -> tuple[str, str]:
    """(The start, the retrained model's log) where unlearning has none: an earlier run's tiny models, or made
    now by one process each (an interrupted one goes on). Of two commands that need the same model the second
    waits for the first."""
    trainings = [tiny_settings(s, "full", task)]
    if not s.retain_log:
        trainings.append(tiny_settings(s, complement(s.split), task))
    for sft in trainings[world.rank::world.size]:
        folder = Path(sft.out)
        with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
            if not (folder / "model").is_dir():
                print(f"no model of {sft.split} yet: it is trained now, and kept in {folder}", flush=True)
                try:
                    carry_out(resumed(folder, {}) if folder.exists() else sft, World(0, 1, world.device))
                except Stopped:
                    raise Stopped("stopped while training the tiny model; go on with: "
                                  f"--resume {for_run}") from None
    world.wait()
    start, *retrained = (Path(sft.out) for sft in trainings)
    retain_log = s.retain_log or str(max((retrained[0] / "eval").glob("step_*.json")))
    world.say(f"it begins with {start / 'model'}, and is compared with {retain_log}")
    return str(start / "model"), retain_log


def run_job(job: Job, begin: float, world: World):
    """Pass the reference, train, evaluate, save."""
    s, model = job.settings, policy_of(job, world)
    reference = None
    if s.loss != "sft":
        folder, mark = job.folder / "reference", job.mark()
        if not world.agree(folder.exists()):
            with whole_folder(folder, world) as aside, autocast(s.dtype, world.device):
                reference_pass(s, model, job.plan, job.prepared, aside, mark, world)
        reference = Reference(folder, mark, job.plan, world.device)
    with RunFolder(job, reference, compute_metrics, world) as run:
        train(s, job.plan, model, reference, run, world)
        run.finish(model, time.perf_counter() - begin)


def main():
    s = parse(sys.argv[1:], __doc__)
    if s.dry_run:
        return dry_run(s, int(os.environ.get("WORLD_SIZE", 1)))
    world = join_world(s.device, s.parallel)
    try:
        carry_out(s, world)
    except Stopped as stopped:
        world.say(stopped)
        sys.exit(130)
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main, "train_npo.py")
