"""The rows of the benchmark's table that concern language models.

A row is a dict: "unit"; "seconds": name -> `spread`; "ratio": opponent -> `spread` of its cost over ours; and
what else belongs to it. `args` are the command's, with `train`, the loop of train_npo.py.
"""

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, pairwise, product
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from benchmark import opponents as plain
from data.tofu import load_task
from evaluation.scoring import Prepared, evaluate, prepare
from models.answers import AnswerModel
from models.loading import load_model
from models.presets import settings_of
from running.memory_plan import GB, Shape, shape_of
from running.plan import Plan
from running.processes import peak_memory, take_device
from running.reference import Reference, reference_pass
from running.settings import resolve
from support.world import World

TRAIN = Path(__file__).resolve().parent.parent / "train_npo.py"
TOLERANCE = 1e-4  # relative: losses, scores, and every weight matrix as a whole
METHODS = {"npo+rt": dict(loss="npo", retain_weight=1.0), "npo+kl": dict(loss="npo", kl_weight=1.0),
           "dpo+rt": dict(loss="dpo", retain_weight=1.0), "sft": dict(loss="sft", split="full")}
# Unset, glibc's threshold for blocks of their own rises to 32 MB; smaller ones lie in a heap with holes, and
# more is resident than is held. For the plain loop; ours sets its own.
PLAIN_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20)}


# ---------------------------------------------------------------- comparing

def spread(x: list) -> dict:
    """Median, least and largest of repeats."""
    return {"median": statistics.median(x), "min": min(x), "max": max(x), "repeats": len(x)}


def ratios(ours: list, theirs: list) -> dict:
    """Their cost over ours, repeat by repeat, the two measured next to each other; above 1: ours is less."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def row_of(unit: str, seconds: dict, **more) -> dict:
    """A row of the table: seconds of ours and of opponents, repeat by repeat."""
    return {"unit": unit, "seconds": {name: spread(values) for name, values in seconds.items()},
            "ratio": {name: ratios(seconds["ours"], values) for name, values in seconds.items()
                      if name != "ours"}, **more}


def timed(function, *given, device="cpu", **named) -> tuple:
    """(what it returns, seconds)."""
    begin = plain.now(device)
    result = function(*given, **named)
    return result, plain.now(device) - begin


def weight_gap(weights: dict, others: dict) -> float:
    """Over all parameters the largest ||a - b|| / ||a||."""
    return max(float((a - torch.as_tensor(others[name]).to(a)).norm() / a.norm().clamp(min=1e-30))
               for name, a in weights.items())


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def agree(what: str, gaps: dict) -> dict:
    """The gaps, none above TOLERANCE. Raises RuntimeError otherwise."""
    for name, value in gaps.items():
        if not value <= TOLERANCE:
            raise RuntimeError(f"{what}: {name} differ by {value:.2e}: the two did not compute the same")
    return gaps


# ---------------------------------------------------------------- our side

class Side:
    """A method as the real code takes it: settings, model, plan; and its rows as the opponents take them.
    batches: rows of each step.

    To `train` it is the run folder, with nothing kept. After every step `train` calls `log`, and there
    `turn(step, lr)`, untimed, lets others have theirs: the loop is the real one, and the sides take turns."""

    evaluation_steps = checkpoint_steps = frozenset()
    stop_asked = save_due = False
    folder = Path("bench")

    def __init__(self, args: Namespace, given: dict, batches: list):
        self.loop, self.world = args.train, World(0, 1, args.device)
        # With the paper's lr: a large one makes steps of rounding's differences.
        given = {"eval_every": "never", "batch_size": sum(batches), "lr": 1e-5, **given}
        self.s = s = resolve({"model": args.model, "data": args.data, **given})
        self.lm, self.tokenizer, meta = load_model(s.start)
        self.lm.to(args.device)
        s.template = s.template or meta.get("template") or settings_of(s.preset).template
        self.task = load_task(s.data, s.split)
        fewer = replace(self.task, forget=self.task.forget[::4])  # enough; the reference pass visits all
        self.plan = Plan(s, fewer, self.tokenizer, self.lm.config.max_position_embeddings)
        items = chain(*self.plan.stream)
        self.stream = [[next(items) for _ in range(size)] for size in batches]

    def refer(self, folder: str, model: AnswerModel) -> tuple[Reference, float]:
        """The reference's cache, and the seconds of the pass that makes it, for a use of a forget row."""
        s, plan, world, folder = self.s, self.plan, self.world, Path(folder)
        _, seconds = timed(reference_pass, s, model, plan, Prepared({}, {}, {}), folder, "bench", world,
                           device=world.device)
        return Reference(folder, "bench", plan, world.device), seconds / (plan.rows * s.epochs)

    def run(self, model: AnswerModel, reference, turn=None, rows: int | None = None) -> tuple:
        """The real loop over the batches, or the first `rows` of each: (seconds of its steps, losses, weights
        after them). The first step has lr 0 (the schedule's warm-up) and is discarded."""
        self.turn, self.seconds, self.losses, plan = turn, [], [], self.plan
        plan.stream, plan.warmup_steps = [items[:rows] for items in self.stream], 1
        plan.steps = len(plan.stream)
        self.loop(self.s, plan, model, reference, self, self.world)
        return self.seconds, self.losses, {name: p.detach() for name, p in model.lm.named_parameters()}

    def restore(self, *_) -> int:
        self.begin = plain.now(self.world.device)
        return 0

    def log(self, step: int, lr: float, parts: dict, *_):
        self.seconds.append(plain.now(self.world.device) - self.begin)
        self.losses.append(parts["loss"])
        if self.turn:
            self.turn(step, lr)
        self.begin = plain.now(self.world.device)

    def checkpoint(self, *_):
        """Nothing is kept, not even before a step that `train` refuses."""


# ---------------------------------------------------------------- a step, an evaluation, arithmetic

def measure_step(args: Namespace, method: str, process=plain.fresh_process) -> dict:
    """A method's step, ours against A and B. Losses and weights must agree."""
    side = Side(args, METHODS[method], [args.batch_size] * (1 + args.repeats))
    rows_of = {"ours": args.batch_size, "A": args.a_rows, "B": args.batch_size}  # rows of a batch
    seconds, losses, reference, share = {"ours": [], "A": [], "B": []}, {"A": [], "B": []}, None, 0.0
    with tempfile.TemporaryDirectory() as folder, process() as there:
        def turn(step: int, lr: float):
            for name in losses:
                rows = side.plan.texts(side.stream[step - 1][:rows_of[name]])
                loss, passes, update = there(plain.step, side.s, args.device, name, lr, *rows)
                seconds[name].append(passes / rows_of[name] + update / args.batch_size)
                losses[name].append(loss)

        model = AnswerModel(copy.deepcopy(side.lm))
        if method != "sft":
            reference, share = side.refer(folder, model)
        taken, *ours_of_b = side.run(model, reference, turn)
        # A took the first rows of each batch: our own loop on those alone, untimed, for its check.
        _, *ours_of_a = side.run(AnswerModel(side.lm), reference, rows=args.a_rows)
        gaps = {}
        for name, (own_losses, weights) in {"A": ours_of_a, "B": ours_of_b}.items():
            gaps[f"losses of {name}"] = max(map(relative, own_losses, losses[name]))
            gaps[f"weights of {name}"] = weight_gap(weights, there(plain.weights, name))
    seconds["ours"] = [step / args.batch_size + share for step in taken]
    return row_of("s a pair" if method != "sft" else "s a row",
                  {name: values[1:] for name, values in seconds.items()}, reference_pass_share=share,
                  checked=agree(method, gaps), rows=rows_of)


def measure_evaluation(args: Namespace, process=plain.fresh_process) -> dict:
    """All four sets, ours whole; B' on evenly spaced rows of each set, scaled to the set."""
    side = Side(args, {}, [8])
    prepared = prepare(side.task.evaluated, side.tokenizer, side.s.template,
                       side.lm.config.max_position_embeddings, args.max_rows)
    picked = {name: range(0, len(rows), max(1, len(rows) // args.plain_rows))
              for name, rows in prepared.rows.items()}
    seconds, gaps, same = {"ours": [], "B'": []}, [], []
    with process() as there:
        for _ in range(args.few):
            ours, took = timed(evaluate, AnswerModel(side.lm), prepared, side.tokenizer, device=args.device,
                               batch_size=settings_of(side.s.preset).eval_batch_size,
                               max_new_tokens=args.max_new_tokens, world=side.world)
            seconds["ours"].append(took)
            seconds["B'"].append(0.0)
            for name, places in picked.items():
                asked = [prepared.rows[name][i] for i in places]
                scored, took = there(plain.evaluation, side.s, args.device, asked, args.max_new_tokens)
                seconds["B'"][-1] += took * len(ours[name]) / len(places)
                for row, other in zip([ours[name][i] for i in places], scored, strict=True):
                    nll = plain.known_answers(row, "answer_nll", "paraphrased_nll", "perturbed_nll")
                    gaps += map(relative, nll, other["nll"])
                    same.append(row["generation"] == other["generation"])
    checked = {**agree("evaluation", {"scores": max(gaps)}), "equal_generations": statistics.mean(same)}
    return row_of("s an evaluation", seconds, checked=checked,
                  rows={"ours": sum(map(len, ours.values())), "B'": sum(map(len, picked.values()))})


def matmul_rate(device) -> float:
    """float32 FLOP/s of a product of 2048 x 2048 matrices, the best of half a second."""
    timer = Timer("x @ x", globals={"x": torch.rand(2048, 2048, device=device)},
                  num_threads=torch.get_num_threads())
    return 2 * 2048**3 / min(timer.blocked_autorange(min_run_time=0.5).times)


def training_flops(x: Shape, tokens: int, answer_tokens: int) -> float:
    """Floating-point operations to train on one text: 2 a parameter and token forward, 4 backward, causal
    attention, and the head at the answer's tokens alone."""
    return 6 * x.layers * (x.layer + tokens * x.hidden) * tokens + 6 * x.vocabulary * x.hidden * answer_tokens


def measure_arithmetic(args: Namespace) -> dict:
    """Useful FLOP/s of npo+rt's steps over a large matrix product's, measured before and after each."""
    side = Side(args, METHODS["npo+rt"], [args.batch_size] * (1 + args.repeats))
    rates, model, shape = [], AnswerModel(side.lm), shape_of(side.lm)
    with tempfile.TemporaryDirectory() as folder:
        reference, _ = side.refer(folder, model)
        seconds, *_ = side.run(model, reference, lambda *_: rates.append(matmul_rate(args.device)))
    useful = [sum(training_flops(shape, len(e.ids), e.answer_tokens)
                  for e in chain(*side.plan.texts(items))) for items in side.stream]
    reached = [flops / taken for flops, taken in zip(useful, seconds, strict=True)][1:]
    shares = [rate / max(around) for rate, around in zip(reached, pairwise(rates), strict=True)]
    return {"unit": "of the rate", "ratio": {"matmul": spread(shares)},
            "matmul_gflops": spread([rate / 1e9 for rate in rates]),
            "useful_gflops": spread([rate / 1e9 for rate in reached])}


# ---------------------------------------------------------------- memory

def measure_memory(args: Namespace) -> dict:
    """Peaks of npo+rt, ours and B's, a process of its own each."""
    row = {"unit": "GB", "costs": {}, "ratio": {}}
    for size in (8, 32):
        with plain.fresh_process() as there:
            peak = there(peak_of, args, size, True)
        with plain.fresh_process(**PLAIN_ALLOCATOR) as there:
            theirs = there(peak_of, args, size, False)
        row["ratio"][f"B, {size} rows"] = spread([theirs / peak])
        row["costs"][f"B, {size} rows"] = f"{peak:.2f} GB"
    return row


def peak_of(args: Namespace, micro_batch: int, ours: bool) -> float:
    """GB above this process's size before the model was loaded, of the real loop or of B. A first step of one
    row makes AdamW's moments; the second, of 32 rows, sets the peak."""
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401  (a part of the size before)
    load_task(args.data, "forget10")
    if ours:
        take_device(args.device.type)  # as a run begins
    before = peak_memory()
    side = Side(args, {**METHODS["npo+rt"], "micro_batch_size": micro_batch}, [1, 32])
    if ours:
        model = AnswerModel(side.lm)
        with tempfile.TemporaryDirectory() as folder:
            reference, _ = side.refer(folder, model)
            side.run(model, reference)
    else:
        loop, side.lm = plain.PlainLoop(side.s, args.device, 0, micro_batch), None
        for items in side.stream:
            loop.step(side.s.lr, *side.plan.texts(items))
    on_gpu = args.device.type == "cuda"
    return (torch.cuda.max_memory_allocated() if on_gpu else peak_memory() - before) / GB


# ---------------------------------------------------------------- commands as a user types them

def train_npo(run, flags: list, processes: int = 1, folder: str | None = None, **environ):
    """What subprocess's `run` makes of the command, in `folder`, under torchrun for several processes."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    return run([sys.executable, *(torchrun if processes > 1 else []), str(TRAIN), *flags], cwd=folder,
               stdout=subprocess.DEVNULL, env={**os.environ, **environ})


def training_rate(args: Namespace, runs: int, processes: int) -> float:
    """Tokens a second, added up, of runs at the same time, of so many processes each, of one thread each."""
    flags = ["--loss", "sft", "--split", "retain03", "--epochs", str(args.process_epochs), "--eval-every",
             "never", "--model", args.model, "--data", args.data, "--device", args.device.type]
    with tempfile.TemporaryDirectory() as folder:
        begun = [train_npo(subprocess.Popen, [*flags, "--out", f"{folder}/{number}/run"], processes,
                           OMP_NUM_THREADS="1") for number in range(runs)]
        if any([process.wait() for process in begun]):  # a list: all are waited for
            raise RuntimeError("train_npo.py ended before its last step, and says why above")
        logs = [file.read_text().splitlines()[1:] for file in Path(folder).glob("*/run/log.jsonl")]
    return sum(statistics.median(json.loads(line)["tokens_per_s"] for line in log) for log in logs)


@contextmanager
def two_cores():
    """For the commands begun inside: each of two processes then has one thread, as one alone has."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(own)[:2])
    yield
    os.sched_setaffinity(0, own)


def measure_processes(args: Namespace) -> dict:
    """Two processes against one; and two runs of a process each against one, what the machine has for two
    that exchange nothing. Fine-tuning steps."""
    shapes = {"one": (1, 1), "two": (1, 2), "two runs": (2, 1)}  # runs, processes of each
    rates = {name: [] for name in shapes}
    with two_cores():
        for _, (name, shape) in product(range(args.repeats), shapes.items()):
            rates[name].append(training_rate(args, *shape))
    return {"unit": "tokens/s", "rates": {name: spread(values) for name, values in rates.items()},
            "ratio": {"one": ratios(rates["one"], rates["two"]),
                      "one (two that exchange nothing)": ratios(rates["one"], rates["two runs"])}}


def measure_first_command(args: Namespace) -> dict:
    """README's first command where nothing has been made yet."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--loss", "npo", "--retain-weight", "1", "--device", args.device.type]
        _, seconds = timed(train_npo, subprocess.check_call, flags, 2, folder)
    return row_of("s", {"ours": [seconds]})
