"""Speed and memory, always as a ratio: this code against the loops that people use today, in one run on one machine.

    python bench.py                                                  # the tiny model, under 5 minutes
    python bench.py --model smollm2-135m=PATH --data TOFU_DIR        # the figures that count, about 40 minutes
    python bench.py --only npo+rt --only evaluation                  # some rows; they are merged into the same JSON

What we time is the real code: `train_npo.train` itself, `evaluate_tofu.evaluate`, `synthetic.run`. The opponents are
written here, plainly, with the same attention (SDPA), precision, threads and optimizer:

    A   the authors' way: every row padded to 500 tokens, the policy and a resident reference both run forward at each
        step, logits at all positions, the retain rows as a second forward; 2 rows at a time
    B   the framework way: the same, padded to the longest row of 8 in random order
    A', B'  evaluation set by set, one or eight rows at a time; every perturbed answer is a forward pass of the whole
        text; `generate` on rows in the order in which they come
    S   the synthetic experiment as a Python loop over methods and instances, with autograd

Both sides take the same steps on the same rows, in turn (ours, A, B, ours, A, B ...), and must agree: the losses of the
timed steps and the weights after them to TOLERANCE, an evaluation's scores alike. A first step is discarded. A costs
the same for every row, so it takes 4 rows of a batch, and its optimizer's update is counted once for the whole batch;
B' takes 40 rows a set and is scaled to the set. Our steps carry their share of the one reference pass before training.
The opponents have a process of their own, with the settings that a plain loop finds there.

Results: results/bench_MODEL.json, .md (the table) and .png. Costs are per pair of forget and retain row, in seconds.
"""

import copy
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data.prompts import encode, encode_prompts
from data.tofu import load_task
from evaluate_tofu import MAX_NEW_TOKENS, Prepared, evaluate, prepare
from losses import dpo_loss, kl_loss, npo_loss, token_logps
from models.loading import AUTOCAST, PRESETS, AnswerModel, autocast, load_model, pad_id
from running.processes import World, keep_freed_memory, peak_memory, pick_device
from running.reference import Reference, reference_pass
from running.sharding import decoder_layers
from support.command_line import Parser, positive, run_command
from support.errors import InputError
from support.files import fingerprint, write_json
from support.provenance import environment
from train_npo import Plan, resolve, train
from train_npo import run as run_training

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-4  # relative: losses, and every weight matrix as a whole
PADDED_TO, A_ROWS_AT_ONCE, B_ROWS_AT_ONCE = 500, 2, 8
METHODS = {"npo+rt": dict(loss="npo", retain_weight=1.0), "npo+kl": dict(loss="npo", kl_weight=1.0),
           "dpo+rt": dict(loss="dpo", retain_weight=1.0), "sft": dict(loss="sft", split="full")}
TARGETS = {"npo+rt": {"A": 12, "B": 2}, "npo+kl": {"A": 14, "B": 2.5}, "dpo+rt": {"A": 12, "B": 2},
           "sft": {"A": 8, "B": 1.6}, "evaluation": {"B'": 3}, "synthetic": {"S": 20}, "processes": {"one": 1.7},
           "memory": {"8 rows": 1 / 0.65, "32 rows": 1 / 0.5}, "arithmetic": {"matmul": 0.75}}
STARTUP_TARGET = 6.0  # seconds, for the tiny model: a larger one has its weights to read and a longer reference pass


# ---------------------------------------------------------------- A and B: training

class PlainLoop:
    """A (pad_to=500, 2 rows at a time) and B (pad_to=0: to the longest, 8): policy and resident reference."""

    def __init__(self, s: Namespace, reference, tokenizer, pad_to: int, rows_at_once: int, device):
        self.s, self.pad_to, self.rows_at_once, self.device = s, pad_to, rows_at_once, device
        self.pad, self.policy = pad_id(tokenizer), copy.deepcopy(reference).train()
        self.reference = reference.eval()  # resident; A and B may share it, since nothing changes it
        groups = [{"params": [p for p in self.policy.parameters() if p.ndim >= 2], "weight_decay": s.weight_decay},
                  {"params": [p for p in self.policy.parameters() if p.ndim < 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def logits(self, model, rows: list):
        """All positions' logits (B, T - 1, V) and the tokens they predict, -100 outside the answers."""
        ids, mask, labels = padded(rows, self.pad, self.pad_to, self.device)
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1], labels[:, 1:]

    def logps(self, model, rows: list):
        """log pi(y|x), (B,)."""
        logits, labels = self.logits(model, rows)
        return -F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(-1)

    def objective(self, forget: list, refusal: list, retain: list, counts: dict):
        """This micro-batch's part of the whole batch's loss."""
        s, policy = self.s, self.logps(self.policy, forget)
        if s.loss == "sft":
            return -policy.sum() / counts["forget_tokens"]
        with torch.no_grad():
            reference = self.logps(self.reference, forget)
        if s.loss == "npo":
            loss = npo_loss(policy, reference, s.beta).sum() / counts["rows"]
        else:
            with torch.no_grad():
                reference_refusal = self.logps(self.reference, refusal)
            chosen = self.logps(self.policy, refusal)
            loss = dpo_loss(chosen, policy, reference_refusal, reference, s.beta).sum() / counts["rows"]
        if s.retain_weight > 0:
            loss = loss - s.retain_weight * self.logps(self.policy, retain).sum() / counts["retain_tokens"]
        if s.kl_weight > 0:
            logits, labels = self.logits(self.policy, retain)
            with torch.no_grad():
                reference_logits, _ = self.logits(self.reference, retain)
            kl = kl_loss(logits[labels >= 0], reference_logits[labels >= 0], s.kl_direction)
            loss = loss + s.kl_weight * kl.sum() / counts["retain_tokens"]
        return loss

    def step(self, lr: float, forget: list, refusal: list, retain: list) -> tuple[float, float, float]:
        """(loss, seconds of the passes, seconds of the update) of one optimizer step on these rows."""
        begin, total = now(self.device), 0.0
        counts = {"rows": len(forget), "forget_tokens": sum(e.answer_tokens for e in forget),
                  "retain_tokens": sum(e.answer_tokens for e in retain)}
        for at in range(0, len(forget), self.rows_at_once):
            chunk = slice(at, at + self.rows_at_once)
            with autocast(self.s.dtype, self.device):
                loss = self.objective(forget[chunk], refusal[chunk], retain[chunk], counts)
            loss.backward()
            total += float(loss.detach())
        passed = now(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, passed - begin, now(self.device) - passed


def padded(rows: list, pad: int, pad_to: int, device):
    """ids, attention mask and labels, (B, T), of encoded rows: padded at the end to `pad_to` tokens, or the longest."""
    width = max(pad_to, max(len(e.ids) for e in rows))
    fill = lambda lists, value: torch.tensor([x + [value] * (width - len(x)) for x in lists], device=device)
    labels = fill([[-100] * e.start + e.ids[e.start:] for e in rows], -100)
    return fill([e.ids for e in rows], pad), fill([[1] * len(e.ids) for e in rows], 0), labels


# ---------------------------------------------------------------- A' and B': evaluation

@torch.no_grad()
def plain_evaluation(lm, tokenizer, template: str, rows: list, rows_at_once: int, max_new_tokens: int, device) -> list:
    """One set the plain way: a pass for the answers, one for the paraphrases, one for each place among the perturbed
    answers, then `generate`. A list of {"nll": [..], "tokens": [..], "generation", "rouge_l_recall"}."""
    from rouge_score import rouge_scorer
    scorer, pad = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True), pad_id(tokenizer)
    answers = [[row["answer"], *filter(None, [row.get("paraphrased_answer")]), *(row.get("perturbed_answer") or [])]
               for row in rows]
    results = [{"nll": [], "tokens": []} for _ in rows]
    chunks = [range(at, min(at + rows_at_once, len(rows))) for at in range(0, len(rows), rows_at_once)]
    for place in range(max(map(len, answers))):
        for chunk in chunks:
            chunk = [i for i in chunk if place < len(answers[i])]
            encoded = encode(tokenizer, template, [(rows[i]["question"], answers[i][place]) for i in chunk])
            ids, mask, labels = padded(encoded, pad, 0, device)
            logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            nll = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100).sum(-1)
            for i, value, tokens in zip(chunk, nll.tolist(), (labels >= 0).sum(-1).tolist()):
                results[i]["nll"].append(value)
                results[i]["tokens"].append(tokens)
    for chunk in chunks:
        prompts = encode_prompts(tokenizer, template, [rows[i]["question"] for i in chunk])
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        made = lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                           pad_token_id=pad, eos_token_id=tokenizer.eos_token_id)
        for i, text in zip(chunk, tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)):
            recall = scorer.score(rows[i]["answer"], text.strip())["rougeL"].recall
            results[i].update(generation=text.strip(), rouge_l_recall=recall)
    return results


# ---------------------------------------------------------------- a process for each side

class Opponents:
    """A and B, or A' and B', with the model they share."""

    def __init__(self, s: Namespace, args: Namespace):
        torch.set_num_threads(args.threads)
        self.s, self.args = s, args
        self.lm, self.tokenizer, _ = load_model(s.start)
        self.lm.to(args.device).eval()
        self.loops = {}

    def step(self, name: str, lr: float, forget: list, refusal: list, retain: list) -> tuple[float, float, float]:
        """`PlainLoop.step` of A or B."""
        if name not in self.loops:
            self.loops[name] = PlainLoop(self.s, self.lm, self.tokenizer, PADDED_TO if name == "A" else 0,
                                         A_ROWS_AT_ONCE if name == "A" else B_ROWS_AT_ONCE, self.args.device)
        return self.loops[name].step(lr, forget, refusal, retain)

    def save(self, name: str, file: str):
        """The loop's weights, as safetensors."""
        save_file({k: v.detach().clone().cpu() for k, v in self.loops[name].policy.named_parameters()}, file)

    def evaluation(self, template: str, rows: list, rows_at_once: int) -> tuple[list, float]:
        """(`plain_evaluation`, its seconds)."""
        begin = now(self.args.device)
        with autocast(self.args.dtype, self.args.device):
            scores = plain_evaluation(self.lm, self.tokenizer, template, rows, rows_at_once, self.args.max_new_tokens,
                                      self.args.device)
        return scores, now(self.args.device) - begin


class Apart:
    """`Opponents` in a process of their own: what the real code does to its process (`keep_freed_memory`) must not
    help or hurt them. While one side works, the other waits at its pipe."""

    def __init__(self, s: Namespace, args: Namespace):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=answer, args=(theirs, s, args), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # it has loaded its model: nothing that is timed runs beside that

    def __getattr__(self, name: str):
        def ask(*given):
            self.pipe.send((name, given))
            return self.pipe.recv()
        return ask

    def close(self):
        self.pipe.close()
        self.process.join()


def answer(pipe, s: Namespace, args: Namespace):
    """The other end of `Apart`'s pipe."""
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # ours, inherited
    opponents = Opponents(s, args)
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            name, given = pipe.recv()
            pipe.send(getattr(opponents, name)(*given))


# ---------------------------------------------------------------- S: the synthetic experiment

def plain_models(Z_retain, y_retain, Z_forget, y_forget, steps: int):
    """theta of pi_ref and pi_retr: gradient descent on the mean cross-entropy with autograd, one after the other."""
    import synthetic
    thetas = []
    for Z, y in ((torch.cat([Z_retain, Z_forget]), torch.cat([y_retain, y_forget])), (Z_retain, y_retain)):
        theta = torch.zeros(Z.shape[1], dtype=Z.dtype, requires_grad=True)
        for _ in range(steps):
            [gradient] = torch.autograd.grad(F.binary_cross_entropy_with_logits(Z @ theta, y), theta)
            theta = (theta - synthetic.TRAIN_LR * gradient).detach().requires_grad_()
        thetas.append(theta.detach())
    return thetas


def plain_unlearning(method, instance, alpha: float, reference, retrained, steps: int, eval_every: int) -> list:
    """One method on one instance, autograd on the objectives: [(forget distance, retain distance)] on the way."""
    tensor = lambda x: torch.from_numpy(x)
    Z_forget, Z_retain = (tensor(instance.features(x, a)) for x, a in ((instance.x_forget, alpha),
                                                                       (instance.x_retain, -alpha)))
    tests = [tensor(instance.features(x, a)) for x, a in ((instance.x_forget_test, alpha),
                                                          (instance.x_retain_test, -alpha))]
    y_forget, y_idk, y_retain = (tensor(y).long() for y in (instance.y_forget, instance.y_idk, instance.y_retain))
    two_class = lambda logits: torch.stack([torch.zeros_like(logits), logits], -1)
    with_reference = two_class(Z_forget @ reference)
    reference_logps, reference_idk = token_logps(with_reference, y_forget), token_logps(with_reference, y_idk)
    theta, distances = reference.clone().requires_grad_(), []
    for step in range(steps + 1):
        if step % eval_every == 0:
            with torch.no_grad():
                distances.append([float(kl_loss(two_class(Z @ theta), two_class(Z @ retrained),
                                                "reference_policy").mean()) for Z in tests])
        logits = two_class(Z_forget @ theta)
        logps = token_logps(logits, y_forget)
        if method.family == "ga":
            loss = logps.mean()
        elif method.family == "idk":
            loss = -token_logps(logits, y_idk).mean()
        elif method.family == "npo":
            loss = npo_loss(logps, reference_logps, method.beta).mean()
        else:
            loss = 2 * dpo_loss(token_logps(logits, y_idk), logps, reference_idk, reference_logps, method.beta).mean()
        if method.retain:
            retain = two_class(Z_retain @ theta)
            loss = loss + (-token_logps(retain, y_retain) if method.retain == "rt" else
                           kl_loss(retain, two_class(Z_retain @ reference), "reference_policy")).mean()
        [gradient] = torch.autograd.grad(loss, theta)
        theta = (theta - method.lr * gradient).detach().requires_grad_()
    return distances


# ---------------------------------------------------------------- measuring

def now(device="cpu") -> float:
    """Seconds; on a GPU, when all that was asked of it is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: list) -> dict:
    """Median, least and largest of repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def ratios(ours: list, theirs: list) -> dict:
    """Their cost over ours, repeat by repeat, the two measured next to each other; above 1: ours is less."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def largest_gap(weights: dict, others: dict) -> float:
    """Over all parameters the largest ||a - b|| / ||a||."""
    return max(float((a - others[name]).norm() / a.norm().clamp(min=1e-30)) for name, a in weights.items())


def distance(lm, weights: dict) -> float:
    """The norm of the difference of all parameters together."""
    return math.sqrt(sum(float((p - weights[name]).norm()) ** 2 for name, p in lm.named_parameters()))


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def agree(what: str, gaps: dict) -> dict:
    """The gaps, none above TOLERANCE. Raises RuntimeError otherwise: then the two sides did not do the same work."""
    for name, value in gaps.items():
        if not value <= TOLERANCE:
            raise RuntimeError(f"{what}: {name} differ by {value:.2e}, above {TOLERANCE:g}: the two sides did not "
                               "compute the same thing, and their times say nothing")
    return gaps


class Side:
    """One method's rows as the real code takes them: settings, model, plan, and the reference's cache."""

    def __init__(self, args: Namespace, given: dict, batches: list, every: int = 1):
        """`batches`: rows of each step; `every`: of the forget rows, every how-manyth is used (the reference pass
        visits all of them)."""
        self.args, self.w = args, World(0, 1, args.device)
        self.s = resolve({"model": args.model, "data": args.data, "eval_every": "never", "dtype": args.dtype,
                          "batch_size": sum(batches), **given})
        self.s.micro_batch_size = given.get("micro_batch_size", 8)
        self.lm, self.tokenizer, start = load_model(self.s.start)
        self.lm.to(args.device)
        self.s.template = self.s.template or start.get("template") or PRESETS[self.s.preset or "llama2-7b"].template
        task = load_task(self.s.data, self.s.split)
        task = replace(task, forget=task.forget[::every])
        self.plan = Plan(self.s, task, self.tokenizer, getattr(self.lm.config, "max_position_embeddings", None))
        items = [item for batch in self.plan.stream for item in batch]
        cuts = [sum(batches[:i]) for i in range(len(batches) + 1)]
        self.take([items[a:b] for a, b in zip(cuts, cuts[1:])])

    def take(self, stream: list):
        """Steps on these global batches; the first has lr 0 (the schedule's warm-up) and is discarded."""
        self.plan.stream, self.plan.steps, self.plan.warmup_steps = stream, len(stream), 1

    def rows(self, items: list) -> tuple[list, list, list]:
        """Forget, refusal and retain rows of stream places, as the opponents take them."""
        refusal = [self.plan.refusal[i.row, i.refusal] for i in items] if self.plan.refusal else []
        retain = [self.plan.retain[i.partner] for i in items] if self.plan.retain else []
        return [self.plan.forget[i.row] for i in items], refusal, retain

    def refer(self, folder: Path, model: AnswerModel) -> tuple[Reference, float, float]:
        """The reference's cache, the seconds of the pass that makes it, and which part of the pass one use of a forget
        row with what belongs to it bears, over the run's epochs."""
        keep_freed_memory()  # as `join_world` does for a real run
        begin = now(self.args.device)
        with autocast(self.s.dtype, self.args.device):
            reference_pass(self.s, model, self.plan, Prepared({}, [], {}), self.tokenizer, folder, "bench", self.w)
        seconds = now(self.args.device) - begin
        # A forget answer is used once an epoch; partners and refusals are (nearly) new each time.
        kept = {"forget": len(self.plan.forget)}
        if self.s.kl_weight > 0:
            kept["retain"] = len({i.partner for items in self.plan.stream for i in items})
        kept["refusal"] = len(self.plan.refusal)
        tokens = {"forget": sum(len(e.ids) for e in self.plan.forget), "refusal": sum(
            len(e.ids) for e in self.plan.refusal.values()), "retain": kept.get("retain", 0) * sum(
            len(e.ids) for e in self.plan.retain) / max(1, len(self.plan.retain))}
        uses = {"forget": self.s.epochs, "refusal": 1, "retain": 1}
        part = sum(tokens[k] / kept[k] / uses[k] for k in tokens if kept.get(k)) / sum(tokens.values())
        return Reference(folder, "bench", self.w.device), seconds, part


class Interleaved:
    """Stands where a run's folder stands: `train` calls `log` after every step, and the opponents take theirs there.
    So the loop that is timed is the real one, and the sides keep taking turns."""

    evaluation_steps = checkpoint_steps = frozenset()
    wants_stop = wants_checkpoint = stopped = False
    folder = Path("bench")

    def __init__(self, side: Side, opponents=None, rows: dict | None = None):
        """opponents: `Opponents`, or `Apart`; rows: name -> rows of a batch that this one takes, None for all."""
        self.side, self.opponents, self.rows = side, opponents, rows or {}
        self.seconds = {name: [] for name in ("ours", *self.rows)}  # of a pair of rows, step by step
        self.losses = {name: [] for name in ("ours", *self.rows)}

    def restore(self, *_) -> int:
        keep_freed_memory()
        self.begin = now(self.side.args.device)
        return 0

    def log(self, step: int, lr: float, parts: dict, *_):
        items = self.side.plan.stream[step - 1]
        spent = {"ours": (now(self.side.args.device) - self.begin) / len(items)}
        self.losses["ours"].append(parts["loss"])
        for name, at_most in self.rows.items():
            rows = self.side.rows(items[:at_most])
            loss, passes, update = self.opponents.step(name, lr, *rows)
            spent[name] = passes / len(rows[0]) + update / len(items)
            self.losses[name].append(loss)
        for name, seconds in spent.items():
            self.seconds[name].append(seconds)
        self.begin = now(self.side.args.device)


def real_steps(side: Side, lm, reference, opponents=None, rows: dict | None = None) -> Interleaved:
    """`train_npo.train` over the side's stream, the opponents' steps between its own."""
    run = Interleaved(side, opponents, rows)
    model = AnswerModel(lm)
    train(side.s, model, side.plan, reference, pad_id(side.tokenizer), side.w, run)
    return run


# ---------------------------------------------------------------- the rows of the table

def measure_step(args: Namespace, method: str, opponents=Apart) -> dict:
    """A method's step, ours against A and B. Weights and losses after it must agree."""
    side = Side(args, METHODS[method], [args.batch_size] * (1 + args.repeats), every=4 if method != "sft" else 1)
    start = side.lm
    with tempfile.TemporaryDirectory() as folder, closing(opponents(side.s, args)) as others:
        def weights_of(name: str) -> dict:
            others.save(name, f"{folder}/{name}.safetensors")
            return load_file(f"{folder}/{name}.safetensors", device=str(args.device))

        ours = copy.deepcopy(start)
        reference, share = None, 0.0
        if method != "sft":
            reference, seconds, part_of_it = side.refer(Path(folder), AnswerModel(ours))
            share = seconds * part_of_it
        run = real_steps(side, ours, reference, others, {"A": args.a_rows, "B": None})
        theirs = weights_of("B")
        with torch.no_grad():
            gaps = {"losses of B": max(map(relative, run.losses["ours"], run.losses["B"])),
                    "weights of B": largest_gap(dict(ours.named_parameters()), theirs)}
            moved = distance(ours, dict(start.named_parameters()))
            apart = distance(ours, theirs)
        # A took the first rows of each batch: our own loop on those alone, untimed, for its check.
        side.take([items[:args.a_rows] for items in side.plan.stream])
        ours = copy.deepcopy(start)
        again = real_steps(side, ours, reference)
        with torch.no_grad():
            gaps |= {"losses of A": max(map(relative, again.losses["ours"], run.losses["A"])),
                     "weights of A": largest_gap(dict(ours.named_parameters()), weights_of("A"))}
    seconds = {name: values[1:] for name, values in run.seconds.items()}
    seconds["ours"] = [value + share for value in seconds["ours"]]
    return {"unit": "s a pair" if method != "sft" else "s a row",
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "ratio": {name: ratios(seconds["ours"], seconds[name]) for name in ("A", "B")},
            "reference_pass_share": share, "checked": agree(method, gaps), "update_gap_of_B": apart / max(moved, 1e-30),
            "rows": {"ours": args.batch_size, "B": args.batch_size, "A": args.a_rows or args.batch_size}}


def measure_evaluation(args: Namespace, opponents=Apart) -> dict:
    """All four sets, ours whole; A' and B' on evenly spaced rows of each set, scaled to the set."""
    s = resolve({"model": args.model, "data": args.data})
    lm, tokenizer, start = load_model(s.start)
    lm.to(args.device).eval()
    template = s.template or start.get("template") or PRESETS[s.preset or "llama2-7b"].template
    task = load_task(s.data, s.split)
    prepared = prepare(task.evaluated, tokenizer, template, lm.config.max_position_embeddings, args.max_rows)
    batch_size = PRESETS[s.preset or "llama2-7b"].eval_batch_size
    picked = {(name, opponent): range(0, len(rows), max(1, len(rows) // least))
              for opponent, least in (("A'", max(1, args.plain_rows // 8)), ("B'", args.plain_rows))
              for name, rows in prepared.rows.items()}
    seconds, gaps, same = {"ours": [], "A'": [], "B'": []}, {"scores": 0.0}, []
    with autocast(args.dtype, args.device), closing(opponents(s, args)) as others:
        for _ in range(args.evaluations):
            keep_freed_memory()  # as evaluate_tofu.py does
            begin = now(args.device)
            ours = evaluate(AnswerModel(lm), prepared, tokenizer, batch_size=batch_size, w=World(0, 1, args.device),
                            max_new_tokens=args.max_new_tokens)
            seconds["ours"].append(now(args.device) - begin)
            for opponent, rows_at_once in (("A'", 1), ("B'", B_ROWS_AT_ONCE)):
                total = 0.0
                for name, rows in prepared.rows.items():
                    places = picked[name, opponent]
                    plain, took = others.evaluation(template, [rows[i] for i in places], rows_at_once)
                    total += took * len(rows) / len(places)
                    for i, other in zip(places, plain):
                        row = ours[name][i]
                        nll = [row["answer_nll"], *filter(None, [row["paraphrased_nll"]]), *row["perturbed_nll"]]
                        gaps["scores"] = max([gaps["scores"], *map(relative, nll, other["nll"])])
                        same.append(row["generation"] == other["generation"])
                seconds[opponent].append(total)
    generated = [len(tokenizer(row["generation"])["input_ids"]) for rows in ours.values() for row in rows]
    return {"unit": "s an evaluation", "seconds": {name: spread(values) for name, values in seconds.items()},
            "ratio": {name: ratios(seconds["ours"], seconds[name]) for name in ("A'", "B'")},
            "checked": {**agree("evaluation", gaps), "equal_generations": statistics.mean(same)},
            "generated_tokens_mean": statistics.mean(generated),
            "rows": {"ours": sum(map(len, prepared.rows.values())), **{
                opponent: sum(len(p) for (_, o), p in picked.items() if o == opponent) for opponent in ("A'", "B'")}}}


def matmul_rate(device, seconds: float = 0.5) -> float:
    """float32 FLOP/s of a product of 2048 x 2048 matrices, the best of as many as fit in `seconds`."""
    size, best, x = 2048, 0.0, torch.rand(2048, 2048, device=device)
    begin = now(device)
    while now(device) - begin < seconds or best == 0.0:
        at = now(device)
        x @ x
        best = max(best, 2 * size**3 / (now(device) - at))
    return best


def own_products_rate(lm, tokens: int, device) -> float:
    """float32 FLOP/s of what a decoder layer's linear maps multiply on so many tokens, forward and backward, each
    product by itself and the best of ten: what a step would reach if it did nothing else."""
    flops = seconds = 0.0
    for weight in [p.detach() for p in decoder_layers(lm)[0].parameters() if p.ndim == 2]:
        x, gradient = (torch.rand(tokens, n, device=device) for n in reversed(weight.shape))
        for a, b in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            best = math.inf
            for _ in range(10):
                begin = now(device)
                a @ b
                best = min(best, now(device) - begin)
            flops, seconds = flops + 2 * tokens * weight.numel(), seconds + best
    return flops / seconds


def useful_flops(lm, rows: list) -> float:
    """FLOPs that a training step on these rows can't do without: 6 a parameter and real token (the head's at answer
    tokens alone), and causal attention's products."""
    config = lm.config
    head = lm.get_output_embeddings().weight.numel()
    embeddings = lm.get_input_embeddings().weight.numel()
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    body = sum(p.numel() for p in lm.parameters()) - (embeddings if tied else head + embeddings)
    width = config.num_attention_heads * (getattr(config, "head_dim", None)
                                          or config.hidden_size // config.num_attention_heads)
    attention = 6 * config.num_hidden_layers * width  # times tokens squared: half of the square is masked
    return sum(6 * body * len(e.ids) + 6 * head * e.answer_tokens + attention * len(e.ids)**2 for e in rows)


def measure_arithmetic(args: Namespace) -> dict:
    """Useful FLOP/s of npo+rt's steps over the rate of a large matrix product, measured before and after each, and over
    that of products as large as a micro-batch's."""
    side = Side(args, METHODS["npo+rt"], [args.batch_size] * (1 + args.repeats), every=4)
    useful = [useful_flops(side.lm, sum(side.rows(items), [])) for items in side.plan.stream]
    rates, plain_log = [], Interleaved.log
    with tempfile.TemporaryDirectory() as folder:
        model = AnswerModel(side.lm)
        reference = side.refer(Path(folder), model)[0]
        run = Interleaved(side)

        def log(step, *rest):
            plain_log(run, step, *rest)
            rates.append(matmul_rate(args.device))
            run.begin = now(args.device)

        run.log = log
        train(side.s, model, side.plan, reference, pad_id(side.tokenizer), side.w, run)
    seconds = [a_pair * args.batch_size for a_pair in run.seconds["ours"][1:]]
    shares = [flops / t / max(before, after) for flops, t, before, after in zip(useful[1:], seconds, rates, rates[1:])]
    rows = sum(side.rows(side.plan.stream[-1]), [])
    own = own_products_rate(side.lm, sum(len(e.ids) for e in rows) * side.s.micro_batch_size // args.batch_size,
                            args.device)
    reached = [flops / t for flops, t in zip(useful[1:], seconds)]
    return {"unit": "of the rate", "ratio": {"matmul": spread(shares), "products of its own sizes": spread(
        [rate / own for rate in reached])}, "matmul_gflops": spread([rate / 1e9 for rate in rates]),
        "own_products_gflops": own / 1e9, "useful_gflops": spread([rate / 1e9 for rate in reached])}


def measure_products(args: Namespace) -> dict:
    """FLOPs of the matrix products of a step, A's and B's over ours, with our share of the reference pass: what the
    ratio of seconds would be if nothing else took time and all products ran at one rate. Counted by PyTorch (2.13
    leaves attention on a CPU out); not timed."""
    from torch.utils.flop_counter import FlopCounterMode

    def counted(step, *given) -> tuple:
        with FlopCounterMode(display=False) as counter:
            made = step(*given)
        return made, counter.get_total_flops()

    ratio, flops = {}, {}
    for method, given in METHODS.items():
        side = Side(args, given, [args.batch_size], every=4 if method != "sft" else 1)
        theirs, rows = Opponents(side.s, args), side.rows(side.plan.stream[0])
        flops[method] = {name: counted(theirs.step, name, 0.0, *(some[:n] for some in rows))[1] / n
                         for name, n in (("B", len(rows[0])), ("A", A_ROWS_AT_ONCE))}
        with tempfile.TemporaryDirectory() as folder:
            reference, share = None, 0.0
            if method != "sft":
                (reference, _, part_of_it), all_rows = counted(side.refer, Path(folder), AnswerModel(side.lm))
                share = all_rows * part_of_it
            flops[method]["ours"] = share + counted(real_steps, side, side.lm, reference)[1] / len(rows[0])
        for name in ("A", "B"):
            ratio[f"{method}, {name}"] = spread([flops[method][name] / flops[method]["ours"]])
    return {"unit": "FLOP a pair or row", "flops": flops, "ratio": ratio}


def measure_flat(args: Namespace) -> dict:
    """Seconds a real token over batch sizes 8 to 128 and forget sets of 1 to 90%: the largest over the least.

    SimNPO + RT: the same step as npo+rt, and needs no reference pass."""
    cases = {}
    for split, batch in (("forget10", 8), ("forget10", 32), ("forget10", 128), ("forget01", 32), ("forget90", 32)):
        steps = max(2, args.repeats * 32 // batch)
        side = Side(args, dict(loss="simnpo", retain_weight=1.0, split=split, epochs=20),
                    [max(batch, args.batch_size)] + [batch] * steps)
        run = real_steps(side, side.lm, None)
        tokens = [sum(len(e.ids) for e in sum(side.rows(items), [])) for items in side.plan.stream]
        cases[f"{split}, batch {batch}"] = spread([t * batch / n for t, n in zip(run.seconds["ours"][1:], tokens[1:])])
    medians = [case["median"] for case in cases.values()]
    middle = (max(medians) + min(medians)) / 2
    return {"unit": "s a real token", "cases": cases, "ratio": {}, "within": (max(medians) - min(medians)) / 2 / middle}


def measure_memory(args: Namespace) -> dict:
    """Peak memory above the process's size before the model is loaded, a fresh process each: npo+rt, ours and B."""
    peaks = {f"{who}, {rows} rows": part(args, "memory-ours" if who == "ours" else "memory-plain", rows)["bytes"]
             for rows in (8, 32) for who in ("ours", "B")}
    return {"unit": "bytes", "peak": peaks, "ratio": {
        f"{rows} rows": spread([peaks[f"B, {rows} rows"] / peaks[f"ours, {rows} rows"]]) for rows in (8, 32)}}


def part_memory(args: Namespace, plain: bool) -> dict:
    """One step of npo+rt on `--rows` rows at once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401 (no model yet)
    load_task(args.data, "forget10")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    side = Side(args, dict(METHODS["npo+rt"], micro_batch_size=args.rows), [2, args.batch_size], every=8)
    if plain:
        loop = PlainLoop(side.s, side.lm, side.tokenizer, 0, args.rows, args.device)
        side.lm = None
        for items in side.plan.stream:
            loop.step(side.s.lr, *side.rows(items))
    else:
        with tempfile.TemporaryDirectory() as folder:
            reference = side.refer(Path(folder), AnswerModel(side.lm))[0]
            real_steps(side, side.lm, reference)
    if args.device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated()}
    return {"bytes": peak_memory() - before}


def measure_startup(args: Namespace) -> dict:
    """Command to first step, and what importing torch and transformers alone takes of it."""
    firsts, imports = [], {"torch": [], "torch and transformers": []}
    for _ in range(args.repeats):
        for what, code in (("torch", "import torch"), ("torch and transformers", "import torch, transformers\n"
                           "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM")):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
            imports[what].append(time.perf_counter() - begin)
        with training(args, ["--loss", "npo", "--retain-weight", "1"]) as (process, folder, begin):
            firsts.append(wait_for_steps(process, folder, 1) - begin)
    return {"unit": "s to the first step", "seconds": {"ours": spread(firsts)}, "ratio": {},
            "imports": {what: spread(values) for what, values in imports.items()}}


def measure_processes(args: Namespace) -> dict:
    """Two processes of one thread each against one process of one thread: tokens a second of fine-tuning steps."""
    rates = {1: [], 2: []}
    for _ in range(args.repeats):
        for count in rates:
            with training(args, ["--loss", "sft", "--split", "retain10"], count) as (process, folder, _):
                wait_for_steps(process, folder, 1 + args.process_steps)
                lines = (folder / "log.jsonl").read_text().splitlines()[1:1 + args.process_steps]
                rates[count].append(statistics.median(json.loads(line)["tokens_per_s"] for line in lines))
    return {"unit": "tokens/s", "rates": {str(count): spread(values) for count, values in rates.items()},
            "ratio": {"one": ratios(rates[1], rates[2])}}


@contextmanager
def training(args: Namespace, flags: list, processes: int = 0):
    """`train_npo.py` as a user starts it, ended when the block is left: (process, run folder, when it began)."""
    with tempfile.TemporaryDirectory() as outside:
        folder = Path(outside) / "run"
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
                    "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"] if processes > 1 else []
        words = [sys.executable, *torchrun, str(HERE / "train_npo.py"), *flags, "--model", args.model, "--data",
                 str(args.data), "--eval-every", "never", "--device", args.device.type, "--out", str(folder)]
        threads = {"OMP_NUM_THREADS": "1"} if processes else {}
        begin = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, **threads}, start_new_session=True)
        try:
            yield process, folder, begin
        finally:
            for pid in family(process.pid) if process.poll() is None else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate()


def family(pid: int) -> list[int]:
    """The process and all that descend from it: torchrun's workers lead groups of their own."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [pid, *(each for children in lists for child in children for each in family(int(child)))]


def wait_for_steps(process, folder: Path, steps: int) -> float:
    """When the run has logged so many steps. Raises RuntimeError where it ended before."""
    log = folder / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < steps:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before step {steps}: {process.stderr.read()[-500:]}")
        time.sleep(0.01)
    return time.perf_counter()


def measure_synthetic(args: Namespace) -> dict:
    """Figure 4 for both alpha, ten methods and the five published instances, pi_ref and pi_retr trained too."""
    return part(args, "synthetic", threads=1)


def part_synthetic(args: Namespace) -> dict:
    """Ours whole, in as many processes as cores; S in one, on `--synthetic-steps` steps of each kind, scaled."""
    import numpy as np

    import synthetic
    torch.set_num_threads(1)
    instances = [synthetic.published_instance(seed) for seed in synthetic.PUBLISHED_SEEDS]
    methods = {alpha: synthetic.default_methods(alpha, synthetic.METHODS, None, None) for alpha in (1, 0)}
    steps, short, eval_every = 2000, args.synthetic_steps, 25
    seconds, gap = {"ours": [], "S": []}, 0.0
    settings = dict(points="test", dpo_scale=2.0, kl_direction="reference_policy")
    for _ in range(args.synthetic_repeats):
        with tempfile.TemporaryDirectory() as kept:
            begin = time.perf_counter()
            with synthetic.Workers(len(os.sched_getaffinity(0))) as workers:
                curves = synthetic.run(workers, instances, [1, 0], methods, Namespace(
                    kept=Path(kept), steps=steps, eval_steps=list(range(0, steps + 1, eval_every)), **settings))
            seconds["ours"].append(time.perf_counter() - begin)
            training_seconds = unlearning_seconds = 0.0
            for alpha in (1, 0):
                for place, instance in enumerate(instances):
                    models = synthetic.reference_and_retrained_kept(instance, alpha, Path(kept))
                    rows = (instance.features(instance.x_retain, -alpha), instance.y_retain,
                            instance.features(instance.x_forget, alpha), instance.y_forget)
                    begin = time.perf_counter()
                    plain = plain_models(*map(torch.from_numpy, rows), short)
                    training_seconds += time.perf_counter() - begin
                    ours = synthetic.reference_and_retrained(*rows, steps=short)
                    gap = max(gap, float(abs(np.stack(plain, 1) - ours).max() / abs(ours).max()))
                    reference, retrained = (torch.from_numpy(models[:, i].copy()) for i in (0, 1))
                    begin = time.perf_counter()
                    for m, method in enumerate(methods[alpha]):
                        path = np.array(plain_unlearning(method, instance, alpha, reference, retrained, short,
                                                         eval_every)).T
                        ours = curves[alpha][place, m][:, :path.shape[1]]
                        gap = max(gap, float((abs(path - ours) / abs(ours)).max()))
                    unlearning_seconds += time.perf_counter() - begin
            seconds["S"].append(training_seconds * synthetic.TRAIN_STEPS / short + unlearning_seconds * steps / short)
    return {"unit": "s a figure", "seconds": {name: spread(values) for name, values in seconds.items()},
            "ratio": {"S": ratios(seconds["ours"], seconds["S"])}, "checked": agree("synthetic", {"distances": gap}),
            "threads": "ours: a process a core; S: one process; one thread each"}


def part(args: Namespace, name: str, rows: int = 0, threads: int = 0) -> dict:
    """A measurement in a fresh process of this script."""
    words = [sys.executable, str(HERE / "bench.py"), "--part", name, "--rows", str(rows or 1), "--model", args.model,
             "--data", str(args.data), "--device", args.device.type, "--dtype", args.dtype,
             "--threads", str(threads or args.threads)]
    given = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}  # ours sets it
    done = subprocess.run(words, capture_output=True, text=True, env={
        **given, **{v: "1" for v in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS") if threads}})
    if done.returncode:
        raise RuntimeError(f"{name} ended with status {done.returncode}: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the table and the picture

ITEMS = {**{method: (lambda args, method=method: measure_step(args, method)) for method in METHODS},
         "evaluation": measure_evaluation, "memory": measure_memory, "arithmetic": measure_arithmetic,
         "products": measure_products, "flat": measure_flat, "start-up": measure_startup,
         "synthetic": measure_synthetic, "processes": measure_processes}
NAMES = {"npo+rt": "npo+rt step", "npo+kl": "npo+kl step", "dpo+rt": "dpo+rt step", "sft": "fine-tuning step",
         "evaluation": "whole evaluation", "memory": "peak memory, npo+rt", "arithmetic": "useful arithmetic",
         "products": "FLOPs of matrix products", "flat": "cost a useful token, batch 8 to 128, forget01 to 90",
         "start-up": "start-up to the first step",
         "synthetic": "synthetic, Figure 4, both alpha", "processes": "two processes against one"}
PARTS = {"memory-ours": lambda args: part_memory(args, plain=False),
         "memory-plain": lambda args: part_memory(args, plain=True), "synthetic": part_synthetic}


def table(rows: dict) -> str:
    """What was measured, as a Markdown table: median (least to largest), target, and whether it is met."""
    lines = ["| work | ours | against | ratio, median (range) | target | met |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        ours = row.get("seconds", {}).get("ours", {}).get("median")
        cost = "" if ours is None else f"{ours:.3g} {row['unit']}"
        for against, ratio in row["ratio"].items():
            target = TARGETS.get(name, {}).get(against)
            lines.append(f"| {NAMES[name]} | {cost} | {against} | {ratio['median']:.2f} ({ratio['min']:.2f} to "
                         f"{ratio['max']:.2f}, {ratio['repeats']}) | {'' if target is None else f'{target:.2f}'} | "
                         f"{'' if target is None else 'yes' if ratio['median'] >= target else '**no**'} |")
        if name == "flat":
            lines.append(f"| {NAMES[name]} | | itself | within ± {100 * row['within']:.0f}% | ± 10% | "
                         f"{'yes' if row['within'] <= 0.1 else '**no**'} |")
        if name == "start-up":
            share = row["imports"]["torch and transformers"]["median"]
            tiny = "--model tiny" in row["provenance"]["command"]
            judged = f"{STARTUP_TARGET:g} s | {'yes' if ours <= STARTUP_TARGET else '**no**'}" if tiny else " | "
            lines.append(f"| {NAMES[name]} | {cost} | imports of torch and transformers {share:.1f} s | | {judged} |")
    return "\n".join(lines)


def draw(rows: dict, title: str, path: Path):
    """A bar a ratio on a log axis, the target as a mark."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    bars = [(f"{NAMES[name]} / {against}", ratio, TARGETS.get(name, {}).get(against))
            for name, row in rows.items() for against, ratio in row["ratio"].items()]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(bars) + 1.4), layout="constrained")
    for place, (_, ratio, target) in enumerate(bars):
        error = [[ratio["median"] - ratio["min"]], [ratio["max"] - ratio["median"]]]
        axes.barh(place, ratio["median"], xerr=error, color="tab:blue" if not target or ratio["median"] >= target
                  else "tab:orange")
        if target:
            axes.plot([target, target], [place - 0.4, place + 0.4], color="black", linewidth=2)
    axes.set(xscale="log", yticks=range(len(bars)), yticklabels=[label for label, *_ in bars], title=title,
             xlabel="their cost over ours (useful arithmetic: share of the matmul rate); black: target")
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machine(args: Namespace) -> dict:
    """What the numbers were measured on."""
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if args.device.type == "cuda" else None
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "threads": args.threads,
            "device": args.device.type, "dtype": args.dtype}


def profile(args: Namespace) -> str:
    """Markdown: where an npo+rt step and an evaluation spend their processor time, by torch's operators."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch
    side = Side(args, METHODS["npo+rt"], [args.batch_size] * 2, every=4)
    model, parts = AnswerModel(side.lm), []
    task = load_task(side.s.data, side.s.split)
    prepared = prepare(task.evaluated, side.tokenizer, side.s.template, side.lm.config.max_position_embeddings,
                       args.max_rows)
    with tempfile.TemporaryDirectory() as folder:
        reference = side.refer(Path(folder), model)[0]
        work = {"A step of npo+rt": lambda: train(side.s, model, side.plan, reference, pad_id(side.tokenizer), side.w,
                                                  Interleaved(side)),
                "An evaluation": lambda: evaluate(model, prepared, side.tokenizer, batch_size=256,
                                                  max_new_tokens=args.max_new_tokens)}
        # An evaluation first: it shall see the start's weights, and answers that end.
        for name in reversed(work):
            begin = time.process_time()
            with watch(activities=[ProfilerActivity.CPU]) as watched:
                work[name]()
            seconds = time.process_time() - begin
            events = sorted(watched.key_averages(), key=lambda e: -e.self_cpu_time_total)
            total = sum(e.self_cpu_time_total for e in events)
            lines = [f"| {e.key} | {100 * e.self_cpu_time_total / total:.1f}% | {e.count} |" for e in events[:12]]
            parts += [f"## {name}: {seconds:.2f} s of processor time, {args.threads} thread(s)", "",
                      "| operator | share of self time | calls |", "|---|---|---|", *lines, ""]
    return "\n".join(parts)


def small_start(args: Namespace) -> str:
    """The tiny model that is measured: fine-tuned for three epochs only, kept under runs/bench."""
    task = load_task(args.data, "full")
    folder = HERE / "runs" / "bench" / f"tiny-{fingerprint(task.fingerprint, PRESETS['tiny'].sft_lr)}"
    if not (folder / "model").is_dir():
        s = resolve({"loss": "sft", "split": "full", "data": args.data, "epochs": 3, "out": str(folder),
                     "eval_every": "never", "device": args.device.type})
        run_training(s, World(0, 1, args.device))
    return f"tiny={folder / 'model'}"


def build_parser() -> Parser:
    parser = Parser(prog="bench.py", description=__doc__)
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, or PRESET=FOLDER, or a folder (default: tiny)")
    add("--data", default="builtin", help="builtin, or a folder with TOFU's files (default: builtin)")
    add("--only", action="append", choices=ITEMS, help="measure this row only; may be given again (default: all)")
    add("--repeats", type=positive(int), help="timed steps a side (default: tiny 5, else 2)")
    add("--batch-size", type=positive(int), default=32, help="global batch, rows (default: 32)")
    add("--a-rows", type=positive(int), help="rows of a batch that A takes (default: 4)", default=4)
    add("--plain-rows", type=positive(int), default=40, help="rows a set for B'; A' takes an eighth (default: 40)")
    add("--max-rows", type=positive(int), default=300, help="rows a set that are evaluated (default: 300)")
    add("--max-new-tokens", type=positive(int), default=MAX_NEW_TOKENS, help="of a generation (default: 200)")
    add("--synthetic-steps", type=positive(int), default=100, help="steps of S, scaled to the run's (default: 100)")
    add("--threads", type=positive(int), help="torch's threads (default: the cores)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--dtype", choices=AUTOCAST, default="fp32", help="autocast precision of both sides (default: fp32)")
    add("--out", default=str(HERE / "results"), help="folder for bench_MODEL.json, .md, .png (default: results)")
    add("--profile", metavar="FILE", help="measure no ratio: write torch.profiler's tables to this Markdown file")
    add("--part", choices=PARTS, help="used by bench.py itself: one measurement, in a process of its own")
    add("--rows", type=positive(int), default=8, help="rows at once of --part")
    return parser


def main():
    args = build_parser().parse_args()
    name, _, path = args.model.partition("=")
    label = name if name in PRESETS else Path(args.model).name
    args.device = pick_device(args.device)
    args.threads = args.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(args.threads)
    args.repeats = args.repeats or (5 if label == "tiny" else 2)
    args.evaluations, args.synthetic_repeats, args.process_steps = (3, 3, 40) if label == "tiny" else (1, 1, 2)
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return
    needs_model = set(args.only or ITEMS) != {"synthetic"}
    if args.model == "tiny" and needs_model:
        args.model = small_start(args)
    elif name in PRESETS and not path and needs_model:
        raise InputError(f"--model {name}: give its weights, --model {name}=FOLDER")
    if args.profile:
        Path(args.profile).write_text(profile(args))
        return
    out = Path(args.out) / f"bench_{label}.json"
    rows = json.loads(out.read_text())["rows"] if out.exists() else {}
    for item in args.only or ITEMS:
        begin = time.perf_counter()
        row = ITEMS[item](args)
        # No path of this machine: where model and data lie is nobody's business.
        model = f"{name}{'=PATH' * bool(path)}" if name in PRESETS else "PATH"
        data = "TOFU_DIR" if Path(args.data).is_dir() else args.data
        said = f"python bench.py --model {model} --data {data} --only {item}"
        row["provenance"] = {**environment(), "command": said, **machine(args), "took": time.perf_counter() - begin}
        rows[item] = row
        rows = {key: rows[key] for key in ITEMS if key in rows}
        write_json(out, {"model": label, "data": "builtin" if args.data == "builtin" else "TOFU", "rows": rows})
        print(f"{item}: {row['provenance']['took']:.0f} s", flush=True)
        print(table({item: row}), flush=True)
    out.with_suffix(".md").write_text(table(rows) + "\n")
    draw(rows, f"{label}, {args.dtype}, {machine(args)['cpu']}, {args.threads} threads", out.with_suffix(".png"))
    print(f"{out}, {out.with_suffix('.md').name}, {out.with_suffix('.png').name}")


if __name__ == "__main__":
    run_command(main, "bench.py")
