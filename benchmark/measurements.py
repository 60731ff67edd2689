"""The rows of the benchmark's table.

A row is a dict: "unit"; "seconds": name -> `spread`; "ratio": opponent -> `spread` of its cost over ours; and
what else belongs to it. `code` holds the functions that are measured, as bench.py hands them down.
"""

import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import closing
from dataclasses import replace
from itertools import chain, pairwise, product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmark.opponents import Apart, known_answers, now, plain_models, plain_unlearning
from data.tofu import load_task
from models.loading import AUTOCAST, PRESETS, AnswerModel, autocast, load_model, pad_id, weights_folder
from running.memory_plan import shape_of, training_flops
from running.processes import World, keep_freed_memory
from running.reference import Reference, reference_pass
from running.sharding import fill, shard

TRAIN = Path(__file__).resolve().parent.parent / "train_npo.py"
TOLERANCE = 1e-4  # relative: losses, and every weight matrix as a whole
METHODS = {"npo+rt": dict(loss="npo", retain_weight=1.0), "npo+kl": dict(loss="npo", kl_weight=1.0),
           "dpo+rt": dict(loss="dpo", retain_weight=1.0), "sft": dict(loss="sft", split="full")}
ALPHAS, FIGURE_STEPS, EVAL_EVERY = (1, 0), 2000, 25  # of Figure 4


# ---------------------------------------------------------------- comparing

def spread(values: list) -> dict:
    """Median, least and largest of repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values),
            "repeats": len(values)}


def ratios(ours: list, theirs: list) -> dict:
    """Their cost over ours, repeat by repeat, the two measured next to each other; above 1: ours is less."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def parameters(model) -> dict:
    return {name.removeprefix("lm."): p.detach() for name, p in model.named_parameters()}


def largest_gap(weights: dict, others: dict) -> float:
    """Over all parameters the largest ||a - b|| / ||a||."""
    return max(float((a - others[name]).norm() / a.norm().clamp(min=1e-30)) for name, a in weights.items())


def distance(weights: dict, others: dict) -> float:
    """The norm of the difference of all parameters together."""
    return math.sqrt(sum(float((a - others[name]).norm()) ** 2 for name, a in weights.items()))


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def agree(what: str, gaps: dict) -> dict:
    """The gaps, none above TOLERANCE. Raises RuntimeError otherwise: then the two sides did not do the same
    work."""
    for name, value in gaps.items():
        if not value <= TOLERANCE:
            raise RuntimeError(f"{what}: {name} differ by {value:.2e}, above {TOLERANCE:g}: the two sides "
                               "did not compute the same thing, and their times say nothing")
    return gaps


# ---------------------------------------------------------------- our side

class Turns:
    """What `train` needs of a run folder, with nothing kept. `train` calls `log` after every step, and there
    `turn` lets others have theirs: the loop that is timed is the real one, and the sides keep taking
    turns."""

    evaluation_steps = checkpoint_steps = frozenset()
    wants_stop = wants_checkpoint = stopped = False
    folder = Path("bench")

    def __init__(self, device, turn=None):
        """turn(step, lr): what happens between our steps, untimed."""
        self.device, self.turn = device, turn
        self.seconds, self.losses = [], []  # of our steps

    def restore(self, *_) -> int:
        keep_freed_memory()
        self.begin = now(self.device)
        return 0

    def log(self, step: int, lr: float, parts: dict, *_):
        self.seconds.append(now(self.device) - self.begin)
        self.losses.append(parts["loss"])
        if self.turn:
            self.turn(step, lr)
        self.begin = now(self.device)


def start(code: Namespace, args: Namespace, given: dict, w: World) -> tuple:
    """(settings, model, tokenizer) as a run has them before its plan."""
    s = code.resolve({"model": args.model, "data": args.data, "dtype": args.dtype, **given})
    lm, tokenizer, meta = load_model(s.start, without_weights=w.sharded)
    s.template = s.template or meta.get("template") or PRESETS[s.preset or "llama2-7b"].template
    return s, lm if w.sharded else lm.to(w.device), tokenizer


class Side:
    """One method as the real code takes it: settings, model and plan; and its rows as the opponents take
    them."""

    def __init__(self, code: Namespace, args: Namespace, given: dict, batches: list, every: int = 1,
                 w: World | None = None):
        """`batches`: rows of each step; `every`: of the forget rows, every how-manyth is used (the reference
        pass visits all of them)."""
        self.code, self.w = code, w or World(0, 1, args.device)
        given = {"eval_every": "never", "batch_size": sum(batches), "micro_batch_size": 8, **given}
        self.s, self.lm, self.tokenizer = start(code, args, given, self.w)
        task = load_task(self.s.data, self.s.split)
        context = getattr(self.lm.config, "max_position_embeddings", None)
        self.plan = code.Plan(self.s, replace(task, forget=task.forget[::every]), self.tokenizer, context)
        items = chain(*self.plan.stream)
        self.take([[next(items) for _ in range(size)] for size in batches])

    def take(self, stream: list):
        """Steps on these global batches; the first has lr 0 (the schedule's warm-up) and is discarded."""
        self.plan.stream, self.plan.steps, self.plan.warmup_steps = stream, len(stream), 1

    def rows(self, items: list) -> tuple[list, list, list]:
        """Forget, refusal and retain rows of stream places."""
        plan = self.plan
        refusal = [plan.refusal[i.row, i.refusal] for i in items] if plan.refusal else []
        retain = [plan.retain[i.partner] for i in items] if plan.retain else []
        return [plan.forget[i.row] for i in items], refusal, retain

    def model(self) -> AnswerModel:
        """The start, to be trained; without sharding a copy."""
        model = AnswerModel(self.lm if self.w.sharded else copy.deepcopy(self.lm))
        if self.w.sharded:
            shard(model, AUTOCAST[self.s.dtype], self.w)
            fill(model, weights_folder(self.s.start), self.w.device)
        return model

    def refer(self, folder: str, model: AnswerModel) -> tuple[Reference, float]:
        """The reference's cache, and the seconds of the pass that makes it which one use of a forget row with
        what belongs to it bears."""
        keep_freed_memory()  # as `join_world` does for a real run
        begin, s, plan, folder = now(self.w.device), self.s, self.plan, Path(folder)
        with autocast(s.dtype, self.w.device):
            none = self.code.nothing_evaluated
            reference_pass(s, model, plan, none, self.tokenizer, folder, "bench", self.w)
        self.w.wait()
        seconds = now(self.w.device) - begin
        # A forget answer is used once an epoch; partners and refusals are (nearly) new each time.
        partners = {i.partner for items in plan.stream for i in items} if s.kl_weight > 0 else ()
        passed = [(plan.forget, s.epochs), (list(plan.refusal.values()), 1),
                  ([plan.retain[p] for p in partners], 1)]
        passed = [(sum(len(e.ids) for e in texts), len(texts) * uses) for texts, uses in passed if texts]
        share = sum(tokens / uses for tokens, uses in passed) / sum(tokens for tokens, _ in passed)
        return Reference(folder, "bench", self.w.device), seconds * share

    def train(self, model: AnswerModel, reference, turn=None) -> Turns:
        """The real loop over the stream."""
        turns = Turns(self.w.device, turn)
        self.code.train(self.s, model, self.plan, reference, pad_id(self.tokenizer), self.w, turns)
        return turns


# ---------------------------------------------------------------- a step, an evaluation, arithmetic

def measure_step(code: Namespace, args: Namespace, method: str, opponents=Apart) -> dict:
    """A method's step, ours against A and B. Weights and losses after it must agree."""
    every = 4 if method != "sft" else 1
    side = Side(code, args, METHODS[method], [args.batch_size] * (1 + args.repeats), every)
    rows_of = {"ours": args.batch_size, "A": args.a_rows, "B": args.batch_size}  # rows of a batch
    seconds, losses, reference, share = {"ours": [], "A": [], "B": []}, {"A": [], "B": []}, None, 0.0
    with tempfile.TemporaryDirectory() as folder, closing(opponents(side.s, args)) as others:
        def turn(step: int, lr: float):
            for name in losses:
                rows = side.rows(side.plan.stream[step - 1][:rows_of[name]])
                loss, passes, update = others.ask("step", name, lr, *rows)
                seconds[name].append(passes / rows_of[name] + update / args.batch_size)
                losses[name].append(loss)

        def weights_of(name: str) -> dict:
            others.ask("save", name, f"{folder}/{name}.safetensors")
            return load_file(f"{folder}/{name}.safetensors", device=str(args.device))

        model = side.model()
        if method != "sft":
            reference, share = side.refer(folder, model)
        ours = side.train(model, reference, turn)
        weights, theirs = parameters(model), weights_of("B")
        gaps = {"losses of B": max(map(relative, ours.losses, losses["B"])),
                "weights of B": largest_gap(weights, theirs)}
        update_gap = distance(weights, theirs) / max(distance(weights, parameters(side.lm)), 1e-30)
        # A took the first rows of each batch: our own loop on those alone, untimed, for its check.
        side.take([items[:args.a_rows] for items in side.plan.stream])
        model = side.model()
        again = side.train(model, reference)
        gaps |= {"losses of A": max(map(relative, again.losses, losses["A"])),
                 "weights of A": largest_gap(parameters(model), weights_of("A"))}
    seconds["ours"] = [step / args.batch_size + share for step in ours.seconds]
    seconds = {name: values[1:] for name, values in seconds.items()}
    return {"unit": "s a pair" if method != "sft" else "s a row",
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "ratio": {name: ratios(seconds["ours"], seconds[name]) for name in losses},
            "reference_pass_share": share, "checked": agree(method, gaps), "update_gap_of_B": update_gap,
            "rows": rows_of}


def measure_evaluation(code: Namespace, args: Namespace, opponents=Apart) -> dict:
    """All four sets, ours whole; B' on evenly spaced rows of each set, scaled to the set."""
    w = World(0, 1, args.device)
    s, lm, tokenizer = start(code, args, {}, w)
    model, sets = AnswerModel(lm.eval()), load_task(s.data, s.split).evaluated
    prepared = code.prepare(sets, tokenizer, s.template, lm.config.max_position_embeddings, args.max_rows)
    batch_size = PRESETS[s.preset or "llama2-7b"].eval_batch_size
    picked = {name: range(0, len(rows), max(1, len(rows) // args.plain_rows))
              for name, rows in prepared.rows.items()}
    seconds, gaps, same = {"ours": [], "B'": []}, [], []
    with autocast(args.dtype, args.device), closing(opponents(s, args)) as others:
        for _ in range(args.evaluations):
            keep_freed_memory()  # as evaluate_tofu.py does
            begin = now(args.device)
            ours = code.evaluate(model, prepared, tokenizer, batch_size=batch_size, w=w,
                                 max_new_tokens=args.max_new_tokens)
            seconds["ours"].append(now(args.device) - begin)
            seconds["B'"].append(0.0)
            for name, places in picked.items():
                asked = [prepared.rows[name][i] for i in places]
                plain, took = others.ask("evaluate", s.template, asked)
                seconds["B'"][-1] += took * len(ours[name]) / len(places)
                for row, other in zip([ours[name][i] for i in places], plain, strict=True):
                    nll = known_answers(row, "answer_nll", "paraphrased_nll", "perturbed_nll")
                    gaps += map(relative, nll, other["nll"])
                    same.append(row["generation"] == other["generation"])
    return {"unit": "s an evaluation", "seconds": {name: spread(values) for name, values in seconds.items()},
            "ratio": {"B'": ratios(seconds["ours"], seconds["B'"])},
            "checked": {**agree("evaluation", {"scores": max(gaps)}),
                        "equal_generations": statistics.mean(same)},
            "rows": {"ours": sum(map(len, ours.values())), "B'": sum(map(len, picked.values()))}}


def matmul_rate(device, seconds: float = 0.5) -> float:
    """float32 FLOP/s of a product of 2048 x 2048 matrices, the best of as many as fit in `seconds`."""
    size, best, x = 2048, 0.0, torch.rand(2048, 2048, device=device)
    begin = now(device)
    while now(device) - begin < seconds or best == 0.0:
        at = now(device)
        x @ x
        best = max(best, 2 * size**3 / (now(device) - at))
    return best


def measure_arithmetic(code: Namespace, args: Namespace) -> dict:
    """Useful FLOP/s of npo+rt's steps over the rate of a large matrix product, measured before and after
    each."""
    side = Side(code, args, METHODS["npo+rt"], [args.batch_size] * (1 + args.repeats), every=4)
    rates, model, shape = [], side.model(), shape_of(side.lm)
    with tempfile.TemporaryDirectory() as folder:
        reference, _ = side.refer(folder, model)
        turns = side.train(model, reference, lambda *_: rates.append(matmul_rate(args.device)))
    useful = [sum(training_flops(shape, len(e.ids), len(e.ids), e.answer_tokens)
                  for e in chain(*side.rows(items))) for items in side.plan.stream]
    reached = [flops / seconds for flops, seconds in zip(useful, turns.seconds, strict=True)][1:]
    shares = [rate / max(around) for rate, around in zip(reached, pairwise(rates), strict=True)]
    return {"unit": "of the rate", "ratio": {"matmul": spread(shares)},
            "matmul_gflops": spread([rate / 1e9 for rate in rates]),
            "useful_gflops": spread([rate / 1e9 for rate in reached])}


# ---------------------------------------------------------------- commands as a user types them

def command(flags: list, processes: int = 0) -> list:
    """The words of train_npo.py's command line, under torchrun for several processes."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
                "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [sys.executable, *(torchrun if processes > 1 else []), str(TRAIN), *flags]


def finish(words: list, folder: str | None = None, **environ):
    """Run a command, in the folder. Raises RuntimeError where it fails."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env={**os.environ, **environ})
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with status {done.returncode}: {done.stderr[-1000:]}")


def flags_of(args: Namespace, folder: str) -> list:
    return ["--model", args.model, "--data", args.data, "--device", args.device.type, "--eval-every", "never",
            "--out", f"{folder}/run"]


def measure_startup(code: Namespace, args: Namespace) -> dict:
    """Command to first step; the run is ended there."""
    firsts = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            begin, log = time.perf_counter(), Path(folder) / "run" / "log.jsonl"
            words = command(["--loss", "npo", "--retain-weight", "1", *flags_of(args, folder)])
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
            try:
                while not log.exists() or not log.stat().st_size:
                    if process.poll() is not None:
                        raise RuntimeError("the run ended before its first step, and says why above")
                    time.sleep(0.01)
                firsts.append(time.perf_counter() - begin)
            finally:
                process.kill()
                process.wait()
    return {"unit": "s to the first step", "seconds": {"ours": spread(firsts)}, "ratio": {}}


def measure_processes(code: Namespace, args: Namespace) -> dict:
    """Two processes of one thread each against one process of one thread: tokens a second of fine-tuning
    steps."""
    rates = {1: [], 2: []}
    epochs = math.ceil((1 + args.process_steps) * 32 / 120)  # of the split's 120 rows, in batches of 32
    flags = ["--loss", "sft", "--split", "retain03", "--epochs", str(epochs)]
    for _, (count, values) in product(range(args.repeats), rates.items()):
        with tempfile.TemporaryDirectory() as folder:
            finish(command([*flags, *flags_of(args, folder)], count), OMP_NUM_THREADS="1")
            lines = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()[1:1 + args.process_steps]
        values.append(statistics.median(json.loads(line)["tokens_per_s"] for line in lines))
    return {"unit": "tokens/s", "rates": {str(count): spread(values) for count, values in rates.items()},
            "ratio": {"one": ratios(rates[1], rates[2])}}


def measure_first_command(code: Namespace, args: Namespace) -> dict:
    """README's first command where nothing has been made yet: the tiny model is fine-tuned, retrained,
    unlearned and evaluated."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        finish(command(["--loss", "npo", "--retain-weight", "1"], 2), folder)
    return {"unit": "s", "seconds": {"ours": spread([time.perf_counter() - begin])}, "ratio": {}}


# ---------------------------------------------------------------- in processes of their own

def in_fresh_processes(function, *given, count: int = 1, **environ) -> list:
    """What `function` returns in each of `count` new processes, which can join as torchrun's do. `environ` is
    set there; what `keep_freed_memory` has set here is not."""
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", run_id="bench",
                          rdzv_endpoint="localhost:0", max_restarts=0, start_method="spawn")
    kept = dict(os.environ)
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
    os.environ.update(environ)
    try:
        return list(elastic_launch(config, function)(*given).values())
    finally:
        os.environ.clear()
        os.environ.update(kept)


def measure_synthetic(code: Namespace, args: Namespace) -> dict:
    """Figure 4 for both alpha, ten methods and the five published instances, pi_ref and pi_retr trained
    too."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    [(seconds, gap)] = in_fresh_processes(time_synthetic, code, args, **one)
    return {"unit": "s a figure", "seconds": {name: spread(values) for name, values in seconds.items()},
            "ratio": {"S": ratios(seconds["ours"], seconds["S"])},
            "checked": agree("synthetic", {"distances": gap}),
            "threads": "ours: a process a core; S: one process; one thread each"}


def time_synthetic(code: Namespace, args: Namespace) -> tuple[dict, float]:
    """(seconds of ours and S, the largest relative gap between them). Ours whole, in as many processes as
    cores; S in one, on `args.synthetic_steps` steps of each kind, scaled."""
    torch.set_num_threads(1)
    steps, seconds, gaps, models = args.synthetic_steps, {"ours": [], "S": []}, [], {}
    for _ in range(args.synthetic_repeats):
        training = unlearning = 0.0
        begin = time.perf_counter()
        instances, methods, curves = code.figure4(ALPHAS, FIGURE_STEPS, EVAL_EVERY)
        seconds["ours"].append(time.perf_counter() - begin)
        for alpha, (place, instance) in product(ALPHAS, enumerate(instances)):
            rows = instance.training_rows(alpha)
            begin = time.perf_counter()
            plain = plain_models(*map(torch.from_numpy, rows), code.train_lr, steps)
            training += time.perf_counter() - begin
            ours = code.train_models(*rows, steps=steps)
            gaps.append(abs(np.stack(plain, 1) - ours).max() / abs(ours).max())
            if (alpha, place) not in models:  # once for all repeats
                trained = code.train_models(*rows, steps=code.train_steps)
                models[alpha, place] = torch.from_numpy(trained.T.copy())
            for method, ours in zip(methods[alpha], curves[alpha][place], strict=True):
                begin = time.perf_counter()
                path = np.transpose(plain_unlearning(method, instance, alpha, models[alpha, place], steps,
                                                     EVAL_EVERY))
                unlearning += time.perf_counter() - begin
                ours = ours[:, :path.shape[1]]
                gaps.append((abs(path - ours) / abs(ours)).max())
        seconds["S"].append((training * code.train_steps + unlearning * FIGURE_STEPS) / steps)
    return seconds, float(max(gaps))
