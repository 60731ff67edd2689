#!/usr/bin/env bash
# Where the tiny model's time goes, by operation: 30 fine-tuning steps in one thread, and an evaluation in two; and how long Python imports. On an idle
# machine, from the root:
#     bash results/run_profile.sh        # two minutes; writes results/profile_tiny.md
set -euo pipefail
OMP_NUM_THREADS=1 python - <<'E2'
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace

import torch
from torch.profiler import profile

import bench
import train_npo
from benchmark.measurements import Side, timed
from evaluation.scoring import evaluate, prepare
from models.answers import AnswerModel
from running.run_folder import RunFolder
from support.command_line import markdown_table

PLAIN, PROFILED = range(20, 50), range(50, 80)  # steps: timed as they are, then with the profiler
profiler, seconds, last, log = profile(), [], [0.0], RunFolder.log


def logged(self, step, *what):
    log(self, step, *what)
    now = time.perf_counter()
    if step - 1 in PLAIN:
        seconds.append(now - last[0])
    last[0] = now
    if step == PROFILED.start:
        profiler.start()
    if step == PROFILED.stop:
        profiler.stop()
        raise KeyboardInterrupt


def by_operation(profiler, times: int) -> list:
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    return markdown_table(["operation", "calls", "share of the time"], [
        [event.key, event.count // times, f"{event.self_cpu_time_total / whole:.1%}"] for event in events[:16]])


args = Namespace(data="builtin", device=torch.device("cpu"), train=None)
args.model = bench.small_start(args)
RunFolder.log = logged
with tempfile.TemporaryDirectory() as folder:
    sys.argv = ["train_npo.py", "--loss", "sft", "--split", "full", "--eval-every", "never", "--device", "cpu", "--out", f"{folder}/run"]
    try:
        train_npo.main()
    except KeyboardInterrupt:
        pass
torch.set_num_threads(2)
side = Side(args, {}, [8])
prepared = prepare(side.task.evaluated, side.tokenizer, side.s.template, side.lm.config.max_position_embeddings, 300)


def evaluated():
    return evaluate(AnswerModel(side.lm), prepared, side.tokenizer, batch_size=256, max_new_tokens=200, world=side.world)


evaluated()
whole = min(timed(evaluated)[1] for _ in range(3))
with profile() as of_evaluation:
    evaluated()
imports = min(timed(subprocess.check_call, [sys.executable, "-c", "import train_npo"])[1] for _ in range(3))
text = [f"A fine-tuning step, 32 rows, one thread: {1e3 * statistics.median(seconds):.0f} ms (median of {len(seconds)}).", "",
        *by_operation(profiler, len(PROFILED)), "",
        f"An evaluation, all sets, two threads: {whole:.2f} s (best of three).", "", *by_operation(of_evaluation, 1), "",
        f"`import train_npo`: {imports:.1f} s (best of three)."]
open("results/profile_tiny.md", "w").write("\n".join(text) + "\n")
E2
