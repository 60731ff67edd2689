"""Runs as commands of train_npo.py, --jobs at a time, and how long they will take."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from study import grid, records
from study.grid import Job, Study
from support.command_line import cores
from support.errors import InputError

TRAIN = Path(__file__).resolve().parent.parent / "train_npo.py"
LIBRARIES = 0.6e9  # bytes that Python and PyTorch take


def command_of(job: Job) -> list[str]:
    """What makes the job's run, or goes on with it where it was begun; of one that is over, nothing."""
    if job.is_over:  # wherever and by whichever version
        return [sys.executable, "-c", ""]
    if Path(job.folder).is_dir():
        return [sys.executable, str(TRAIN), "--resume", job.folder]
    given = {**job.given, "out": job.folder}
    if given.get("retain_log"):  # a run's folder so far: its last evaluation
        given["retain_log"] = max((Path(given["retain_log"]) / "eval").glob("step_*.json"))
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    return [sys.executable, str(TRAIN), *flags]


def run_missing(study: Study):
    """Pass after pass, models before the runs that need them: what is known decides what is planned, until
    nothing is missing."""
    while todo := records.missing(study, grid.plan(study)):
        ready = [job for job in todo if not job.needs] or [job for job in todo if job.given]
        if not ready:  # what waits for a choice between runs that have all failed
            return
        print(f"{len(ready)} runs to make now, {len(todo) - len(ready)} after them; "
              f"{duration(study, todo)}; what they print is in {grid.RUNS}/*.log", flush=True)
        execute(study, ready)


def execute(study: Study, jobs: list):
    """Run `jobs`, each in a process of its own, and record each as it ends."""
    args, waiting, running = study.args, list(jobs), {}  # the last: process -> (job, when it began)
    Path(grid.RUNS).mkdir(parents=True, exist_ok=True)
    threads = max(1, cores() // min(args.jobs, len(jobs)))
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                job = waiting.pop(0)
                with log_of(job).open("w") as log:
                    process = subprocess.Popen(command_of(job), stdout=log, stderr=subprocess.STDOUT,
                                               env={**os.environ, "OMP_NUM_THREADS": str(threads)})
                running[process] = job, time.perf_counter()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                job, begin = running.pop(process)
                text = ended(study, job, process.returncode, time.perf_counter() - begin)
                left = duration(study, [*waiting, *(job for job, _ in running.values())])
                print(f"{job.name}: {text}; {left} left", flush=True)
    except KeyboardInterrupt:
        print("stopping: each run finishes its step and is saved; the same command goes on", flush=True)
        raise
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def log_of(job: Job) -> Path:
    return Path(grid.RUNS) / f"{job.name}.log"


def ended(study: Study, job: Job, status: int, seconds: float) -> str:
    """Take down a job that has ended, or its failure: the others go on. What to say of it. A run that can't
    be compared with what is there has failed, too."""
    try:
        if status:
            said = [line for line in log_of(job).read_text(errors="replace").split("\n") if line.strip()]
            raise InputError(f"exit status {status}: {said[-1][:300] if said else ''}")
        facts = {"key": job.key, **job.facts, "seconds": round(seconds)}  # 0: it was there
        records.keep(study, records.record(Path(job.folder), facts, study.args.data))
    except InputError as error:
        study.known["failed"].append({"key": job.key, "name": job.name, "why": str(error)})
        return f"FAILED: {error}"
    if job.needs:  # a hundred runs would fill the disk
        for part in ("checkpoints", "reference"):
            shutil.rmtree(Path(job.folder) / part, ignore_errors=True)
    return clock(seconds)


def duration(study: Study, jobs: list) -> str:
    """In words, if each takes as long as the study's own did on average."""
    timed = [r["seconds"] for r in study.known["runs"] + study.known["retrained"] if r.get("seconds")]
    if not timed:
        return "time unknown before one has ended"
    return f"about {clock(len(jobs) * statistics.mean(timed) / study.args.jobs)}"


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_plan(study: Study):
    args, known, jobs = study.args, study.known, grid.plan(study)
    todo = [job for job in records.missing(study, jobs) if not job.is_over]
    lacking = [job for job in todo if job.needs]
    print(f"together {len(jobs)} unlearning runs, {len(lacking)} missing "
          f"({sum(j.given is None for j in todo)} wait for a choice of hyper-parameters), and "
          f"{len(todo) - len(lacking)} models to fine-tune or retrain first")
    print(f"{duration(study, todo)} with {args.jobs} jobs at a time")
    each = max([r["memory"] for r in known["runs"]], default=16 * known["parameters"] + LIBRARIES)
    print(f"memory: {each / 1e9:.1f} GB a job, {args.jobs * each / 1e9:.1f} GB together; where no run "
          "has ended, 16 bytes a parameter and the libraries, without activations")
