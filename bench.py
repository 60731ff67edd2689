"""Speed and memory as ratios: this code against the loops that people use today, in one run on one machine.

    python bench.py                                              # the tiny model, about 10 minutes
    python bench.py --model smollm2-135m=PATH --data TOFU_DIR    # the figures that count, about 50 minutes
    python bench.py --only npo+rt --only evaluation              # some rows, merged into the same JSON

What is timed is the real code: `train_npo.train` itself, `evaluate`, `synthetic.run`. The opponents are
written plainly (benchmark/opponents.py), with the same attention, threads and optimizer, in float32:

    A   the authors' way: every row padded to 500 tokens, the policy and a resident reference both run forward
        at each step, logits at all positions, the retain rows as a second forward; 2 rows at a time
    B   the framework way: the same, padded to the longest row of 8 in random order
    B'  evaluation set by set, eight texts at a time as they come; the whole text again for each answer
    S   the synthetic experiment as a Python loop over methods and instances, with autograd

Both sides take the same steps on the same rows, in turn, and must agree to a relative 1e-4 in losses, weights
and scores. A first step is discarded. A takes 4 rows of a batch, since each costs it the same, B' 40 rows a
set, S one instance of five; all are scaled. Our steps carry their share of the one reference pass. Unless
`--only` asks, the tiny model goes without memory (135M's is up to 11 GB), the others without README's first
command.

Results: bench_MODEL.json and .md, the table. What is kept in results/ was made with `--out results`.
"""

import json
import platform
import subprocess
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import benchmark.measurements as measure
import synthetic
from benchmark import opponents
from data.tofu import load_task
from models.presets import PRESETS, split_model
from support.command_line import Parser, cores, run_command
from support.errors import InputError
from support.files import fingerprint, write_json
from support.provenance import environment, without_folders
from train_npo import join_world, train

STEPS, EVAL_EVERY = 2000, 25  # of Figure 4


def measure_synthetic(args: Namespace) -> dict:
    """Figure 4 for both alpha: ten methods, five published instances, pi_ref and pi_retr trained too."""
    with opponents.fresh_process() as there:
        return there(synthetic_row, args.few)


def synthetic_row(repeats: int) -> dict:
    """One thread a process: ours whole, in as many as cores; S in one, on the first instance, scaled."""
    torch.set_num_threads(1)
    instances = [synthetic.published_instance(seed) for seed in synthetic.PUBLISHED_SEEDS]
    methods = {alpha: synthetic.published_methods(alpha) for alpha in (1, 0)}
    seconds, gaps = {"ours": [], "S": []}, []
    for _ in range(repeats):
        curves, took = measure.timed(synthetic.run, instances, methods, list(range(0, STEPS + 1, EVAL_EVERY)))
        seconds["ours"].append(took)
        begin = opponents.now()
        for alpha in methods:
            models = opponents.models(instances[0], alpha, synthetic.TRAIN_LR, synthetic.TRAIN_STEPS)
            for method, ours in zip(methods[alpha], curves[alpha][0], strict=True):
                path = opponents.unlearning(method, instances[0], alpha, models, STEPS, EVAL_EVERY)
                gaps.append(float((abs(np.transpose(path) - ours) / abs(ours)).max()))
        seconds["S"].append(len(instances) * (opponents.now() - begin))
    return measure.row_of("s a figure", seconds,
                          checked=measure.agree("synthetic", {"distances": max(gaps)}))


# row -> (its name, how it is measured, targets: opponent -> ratio, or seconds of the tiny model)
ROWS = {
    "npo+rt": ("npo+rt step", partial(measure.measure_step, method="npo+rt"), {"A": 12, "B": 2}),
    "npo+kl": ("npo+kl step", partial(measure.measure_step, method="npo+kl"), {"A": 14, "B": 2.5}),
    "dpo+rt": ("dpo+rt step", partial(measure.measure_step, method="dpo+rt"), {"A": 12, "B": 2}),
    "sft": ("fine-tuning step", partial(measure.measure_step, method="sft"), {"A": 8, "B": 1.6}),
    "evaluation": ("whole evaluation", measure.measure_evaluation, {"B'": 3}),
    "memory": ("peak memory, npo+rt", measure.measure_memory, {"B, 8 rows": 1 / 0.65, "B, 32 rows": 2}),
    "arithmetic": ("useful arithmetic", measure.measure_arithmetic, {"matmul": 0.75}),
    "first-command": ("first command, tiny, two processes", measure.measure_first_command, {"s": 150}),
    "synthetic": ("synthetic, Figure 4, both alpha", measure_synthetic, {"S": 20}),
    "processes": ("two processes against one", measure.measure_processes, {"one": 1.7})}
MET = {True: "yes", False: "**no**"}
WITHOUT_THE_MODEL = {"first-command", "synthetic"}


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
            own = row.get("costs", {}).get(against, cost)
            lines.append(f"| {name} | {own} | {against} | {said} | {judged} |")
        if "s" in targets:
            judged = f"{targets['s']} s | {MET[ours <= targets['s']]}" if tiny else " | "
            lines.append(f"| {name} | {cost} | | | {judged} |")
    return "\n".join(lines)


def machine(args: Namespace) -> dict:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = info.partition("model name")[2].partition("\n")[0].lstrip("\t :") or platform.processor()
    gpu = torch.cuda.get_device_name() if args.device.type == "cuda" else None
    return {"cpu": cpu, "cores": cores(), "gpu": gpu, "threads": torch.get_num_threads(),
            "device": args.device.type}


def small_start(args: Namespace) -> str:
    """The tiny model that is measured: fine-tuned for three epochs only, and kept."""
    mark = fingerprint(load_task(args.data, "full").fingerprint, PRESETS["tiny"].sft_lr)
    folder = Path(f"runs/bench/tiny-{mark}")
    if not (folder / "model").is_dir():
        flags = ["--resume", str(folder)] if folder.exists() else [
            "--loss", "sft", "--data", args.data, "--epochs", "3", "--eval-every", "never", "--device",
            args.device.type, "--out", str(folder)]
        measure.train_npo(subprocess.check_call, flags)
    return f"tiny={folder / 'model'}"


def build_parser() -> Parser:
    parser = Parser(prog="bench.py", description=__doc__)
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, or PRESET=FOLDER, or a folder")
    add("--data", default="builtin", help="builtin, or a folder with TOFU's files")
    add("--only", action="append", choices=ROWS, help="measure this row only; may be given again")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the results")
    parser.set_defaults(batch_size=32, a_rows=4, plain_rows=40, max_rows=300, max_new_tokens=200,
                        train=train)
    return parser


def main():
    args = build_parser().parse_args()
    preset, path = split_model(args.model)
    folder = Path(path)  # a run's model/ is named by the run
    label = preset or (folder.parent.name if folder.name == "model" else folder.name)
    tiny = label == "tiny"
    wanted = args.only or [row for row in ROWS if row != ("memory" if tiny else "first-command")]
    args.device = join_world(args.device).device
    args.repeats, args.few, args.process_epochs = (5, 3, 11) if tiny else (2, 1, 1)
    if preset and not path and set(wanted) - WITHOUT_THE_MODEL:
        if not tiny:
            raise InputError(f"--model {preset}: give its weights, --model {preset}=FOLDER")
        args.model = small_start(args)
    file = args.out / f"bench_{label}.json"
    known = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    measured_on, rows = "builtin" if args.data == "builtin" else "TOFU", known["rows"]
    if known.get("data", measured_on) != measured_on:
        raise InputError(f"{file} was measured on {known['data']}, not on {measured_on}: give another --out")
    for row in wanted:
        rows[row], took = measure.timed(ROWS[row][1], args)
        made = environment()
        rows[row]["provenance"] = {**made, "command": without_folders(made["command"]), "took": took,
                                   **machine(args)}
        rows = {key: rows[key] for key in ROWS if key in rows}
        write_json(file, {"model": label, "data": measured_on, "rows": rows})
        file.with_suffix(".md").write_text(table(rows, tiny) + "\n")
        print(f"{row}: {took:.0f} s\n{table({row: rows[row]}, tiny)}", flush=True)
    print(f"{file}, {file.with_suffix('.md').name}")


if __name__ == "__main__":
    run_command(main, "bench.py")
