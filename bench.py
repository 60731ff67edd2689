"""Speed and memory as ratios: this code against the loops that people use today, in one run on one machine.

    python bench.py                                              # the tiny model, about 8 minutes
    python bench.py --model smollm2-135m=PATH --data TOFU_DIR    # the figures that count, about 40 minutes
    python bench.py --only npo+rt --only evaluation              # some rows, merged into the same JSON

What we time is the real code: `train_npo.train` itself, `evaluate`, `synthetic.run`. The opponents are
written plainly (benchmark/opponents.py), with the same attention (SDPA), precision, threads and optimizer:

    A   the authors' way: every row padded to 500 tokens, the policy and a resident reference both run forward
        at each step, logits at all positions, the retain rows as a second forward; 2 rows at a time
    B   the framework way: the same, padded to the longest row of 8 in random order
    B'  evaluation set by set, eight rows at a time; every perturbed answer is a forward pass of the whole
        text; `generate` on rows in the order in which they come
    S   the synthetic experiment as a Python loop over methods and instances, with autograd

Both sides take the same steps on the same rows, in turn (ours, A, B, ours, A, B ...), and must agree: the
losses of the timed steps and the weights after them to a relative 1e-4, an evaluation's scores alike. A first
step is discarded. A costs the same for every row, so it takes 4 rows of a batch, and its optimizer's update
is counted once for the whole batch; B' takes 40 rows a set and is scaled to the set. Our steps carry their
share of the one reference pass before training. The opponents have a process of their own, with a plain
loop's settings.

Memory is measured at SmolLM2-135M's shape whatever the model (benchmark/memory.py; up to 11 GB), README's
first command with the tiny model: unless `--only` asks, the tiny model goes without the one, the others
without the other.

Results: bench_MODEL.json and .md (the table), memory.json and .md. Costs are per pair of forget and retain
row, in seconds. What is kept in results/ was made with `--out results`.
"""

import json
import os
import platform
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

import benchmark.measurements as measure
import synthetic
from benchmark.memory import measure_memory, write_memory
from data.tofu import load_task
from evaluate_tofu import MAX_NEW_TOKENS, Prepared, evaluate, prepare
from models.loading import AUTOCAST, PRESETS
from running.processes import World, pick_device
from support.command_line import Parser, positive, run_command
from support.errors import InputError
from support.files import fingerprint, write_json
from support.provenance import environment
from train_npo import Plan, resolve, train
from train_npo import run as run_training

# row -> (its name, how it is measured, targets: opponent -> ratio, or seconds of the tiny model)
ROWS = {
    "npo+rt": ("npo+rt step", partial(measure.measure_step, method="npo+rt"), {"A": 12, "B": 2}),
    "npo+kl": ("npo+kl step", partial(measure.measure_step, method="npo+kl"), {"A": 14, "B": 2.5}),
    "dpo+rt": ("dpo+rt step", partial(measure.measure_step, method="dpo+rt"), {"A": 12, "B": 2}),
    "sft": ("fine-tuning step", partial(measure.measure_step, method="sft"), {"A": 8, "B": 1.6}),
    "evaluation": ("whole evaluation", measure.measure_evaluation, {"B'": 3}),
    "memory": ("peak memory, 135M's shape, npo+rt", measure_memory, {"8 rows": 1 / 0.65, "32 rows": 2}),
    "arithmetic": ("useful arithmetic", measure.measure_arithmetic, {"matmul": 0.75}),
    "start-up": ("start-up to the first step", measure.measure_startup, {"s": 6}),
    "first-command": ("first command, tiny, two processes", measure.measure_first_command, {"s": 150}),
    "synthetic": ("synthetic, Figure 4, both alpha", measure.measure_synthetic, {"S": 20}),
    "processes": ("two processes against one", measure.measure_processes, {"one": 1.7})}
MET = {True: "yes", False: "**no**"}
WITHOUT_THE_MODEL = {"memory", "first-command", "synthetic"}


def figure4(alphas: tuple, steps: int, eval_every: int) -> tuple:
    """(instances, alpha -> methods, alpha -> curves) of the synthetic experiment, with a process a core."""
    instances = [synthetic.published_instance(seed) for seed in synthetic.PUBLISHED_SEEDS]
    methods = {alpha: synthetic.published_methods(alpha) for alpha in alphas}
    return instances, methods, synthetic.run(instances, methods, list(range(0, steps + 1, eval_every)))


# What is measured and stands in scripts: benchmark/ imports none.
CODE = Namespace(
    resolve=resolve, Plan=Plan, train=train, prepare=prepare, evaluate=evaluate,
    nothing_evaluated=Prepared({}, [], {}), figure4=figure4, train_models=synthetic.reference_and_retrained,
    train_lr=synthetic.TRAIN_LR, train_steps=synthetic.TRAIN_STEPS)


def table(rows: dict, tiny: bool) -> str:
    """What was measured, as a Markdown table: median (least to largest), target, and whether it is met."""
    lines = ["| work | ours | against | ratio, median (range) | target | met |", "|---|---|---|---|---|---|"]
    for key, row in rows.items():
        name, _, targets = ROWS[key]
        ours = row.get("seconds", {}).get("ours", {}).get("median")
        cost = "" if ours is None else f"{ours:.3g} {row['unit']}"
        for against, ratio in row["ratio"].items():
            said = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}, {ratio['repeats']})"
            target = targets.get(against)
            judged = f"{target:.2f} | {MET[ratio['median'] >= target]}" if target else " | "
            lines.append(f"| {name} | {cost} | {against} | {said} | {judged} |")
        if "s" in targets:
            judged = f"{targets['s']} s | {MET[ours <= targets['s']]}" if tiny else " | "
            lines.append(f"| {name} | {cost} | | | {judged} |")
    return "\n".join(lines)


def machine(args: Namespace) -> dict:
    """What the numbers were measured on."""
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        cpu = info.read_text().partition("model name")[2].partition("\n")[0].lstrip("\t :") or cpu
    gpu = torch.cuda.get_device_name() if args.device.type == "cuda" else None
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "threads": args.threads,
            "device": args.device.type, "dtype": args.dtype}


def small_start(args: Namespace) -> str:
    """The tiny model that is measured: fine-tuned for three epochs only, and kept."""
    mark = fingerprint(load_task(args.data, "full").fingerprint, PRESETS["tiny"].sft_lr)
    folder = Path(f"runs/bench/tiny-{mark}")
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
    add("--only", action="append", choices=ROWS, help="measure this row only; may be given again")
    add("--repeats", type=positive(int), help="timed steps a side (default: tiny 5, else 2)")
    add("--batch-size", type=positive(int), default=32, help="global batch, rows (default: 32)")
    add("--max-rows", type=positive(int), default=300, help="rows a set that are evaluated (default: 300)")
    add("--threads", type=positive(int), default=len(os.sched_getaffinity(0)), help="(default: the cores)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--dtype", choices=AUTOCAST, default="fp32", help="autocast precision of both sides (default: fp32)")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the results (default: runs/bench)")
    parser.set_defaults(a_rows=4, plain_rows=40, max_new_tokens=MAX_NEW_TOKENS, synthetic_steps=100)
    return parser


def main():
    args = build_parser().parse_args()
    name, _, path = args.model.partition("=")
    preset = name if name in PRESETS else ""
    label = preset or Path(args.model).name
    tiny = label == "tiny"
    wanted = args.only or [row for row in ROWS if row != ("memory" if tiny else "first-command")]
    # No path of this machine: where model and data lie is nobody's business.
    data = "TOFU_DIR" if Path(args.data).is_dir() else args.data
    model = f"{preset}=PATH" if preset and path else preset or "PATH"
    args.device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    args.repeats = args.repeats or (5 if tiny else 2)
    args.evaluations, args.synthetic_repeats, args.process_steps = (3, 3, 40) if tiny else (1, 1, 2)
    if preset and not path and set(wanted) - WITHOUT_THE_MODEL:
        if not tiny:
            raise InputError(f"--model {name}: give its weights, --model {name}=FOLDER")
        args.model = small_start(args)
    file = args.out / f"bench_{label}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    for row in wanted:
        begin = time.perf_counter()
        rows[row] = ROWS[row][1](CODE, args)
        took = time.perf_counter() - begin
        rows[row]["provenance"] = {**environment(), "took": took, **machine(args),
                                   "command": f"python bench.py --model {model} --data {data} --only {row}"}
        rows = {key: rows[key] for key in ROWS if key in rows}
        write_json(file, {"model": label, "data": "builtin" if data == "builtin" else "TOFU", "rows": rows})
        file.with_suffix(".md").write_text(table(rows, tiny) + "\n")
        if row == "memory":
            write_memory(args.out, rows[row])
        print(f"{row}: {took:.0f} s\n{table({row: rows[row]}, tiny)}", flush=True)
    print(f"{file} and {file.with_suffix('.md').name}")


if __name__ == "__main__":
    run_command(main, "bench.py")
