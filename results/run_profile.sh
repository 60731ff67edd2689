#!/usr/bin/env bash
# Where a training step of the tiny model spends its time: 30 fine-tuning steps in one thread, by operation. On an idle machine, from the root:
#     bash results/run_profile.sh        # half a minute; writes results/profile_tiny.md
set -euo pipefail
OMP_NUM_THREADS=1 python - <<'E2'
import statistics
import sys
import tempfile
import time

from torch.profiler import profile

import train_npo
from running.run_folder import RunFolder
from support.command_line import markdown_table

PLAIN, PROFILED = range(20, 50), range(50, 80)  # steps: timed as they are, then with the profiler
profiler, seconds, last, log = profile(), [], [0.0], RunFolder.log


class Enough(Exception):
    pass


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
        raise Enough


RunFolder.log = logged
with tempfile.TemporaryDirectory() as folder:
    sys.argv = ["train_npo.py", "--loss", "sft", "--split", "full", "--eval-every", "never", "--device", "cpu", "--out", f"{folder}/run"]
    try:
        train_npo.main()
    except Enough:
        pass
events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
whole = sum(event.self_cpu_time_total for event in events)
rows = [[event.key, event.count // len(PROFILED), f"{event.self_cpu_time_total / whole:.1%}"] for event in events[:16]]
text = [f"A fine-tuning step of the tiny model, 32 rows, one thread: {1e3 * statistics.median(seconds):.0f} ms (median of {len(seconds)}).", "",
        *markdown_table(["operation", "calls a step", "share of the time"], rows)]
open("results/profile_tiny.md", "w").write("\n".join(text) + "\n")
E2
