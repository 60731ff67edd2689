"""Runs in worker processes, each after the models that it needs, and how long they will take.

SIGTERM lets a worker finish its step and save.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from study import grid, records
from study.grid import Job, Study
from support.errors import InputError
from support.files import fingerprint, write_json

TRAIN = Path(__file__).resolve().parent.parent / "train_npo.py"
# Reckoning before anything was measured: FLOP/s of a process, and bytes that Python and PyTorch take.
FLOP_RATE = {"tiny": 4.5e10, None: 1e14}
LIBRARIES = 0.6e9


# ---------------------------------------------------------------- one run

def run_job(job: Job, resumed: str | None, train: Callable, processes: int) -> tuple[str, float]:
    """Train one, with `train` of `Core` or, where `processes` > 1, through torchrun; (its folder,
    seconds)."""
    begin, unlearns, folder = time.perf_counter(), job.facts["kind"] == "unlearn", resumed
    if not folder and Path(job.folder).is_dir():
        if unlearns:  # `find_runs` knows every run by its settings, and this one has others
            raise InputError(f"{job.folder} holds another run: move it away")
        folder = job.folder
    given = {"resume": folder} if folder else {**job.given, "out": job.folder}
    if given.get("retain_log"):
        given["retain_log"] = str(max((Path(given["retain_log"]) / "eval").glob("step_*.json")))
    folder = Path(folder or job.folder)
    if processes > 1:
        launch(words_of(given), processes)
    elif unlearns:  # the start's evaluation on this split is the same in each run: it is made once
        start = start_rows_file(job)
        rows = json.loads(start.read_text(encoding="utf-8")) if start.exists() else None
        train(given, rows)
        if rows is None:
            evaluated = folder / "eval" / "step_000000.json"
            write_json(start, json.loads(evaluated.read_text(encoding="utf-8"))["rows"])
    else:
        train(given, None)
    for part in ("checkpoints", "reference") if unlearns else ():  # a hundred runs would fill the disk
        shutil.rmtree(folder / part, ignore_errors=True)
    return str(folder), time.perf_counter() - begin


def words_of(given: dict) -> list[str]:
    """train_npo.py's command line for these settings."""
    words = []
    for key, value in given.items():
        if (key, value) != ("eval_every", "end"):  # fine-tuning's default, which no word stands for
            words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def launch(words: list, processes: int):
    """train_npo.py through torchrun. SIGTERM is handed on: the run finishes its step and is saved. Raises
    Stopped after that, CalledProcessError where it fails."""
    from running.run_folder import Stopped
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", str(TRAIN),
               *words]
    child, asked = subprocess.Popen(command), []

    def hand_on(number, frame):
        asked.append(number)
        child.terminate()

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        status = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked:
        raise Stopped("stopped by a signal")
    if status:
        raise subprocess.CalledProcessError(status, command)


def start_rows_file(job: Job) -> Path:
    """Where the start's evaluation is kept for the other runs from this start on this split."""
    given, split = job.given, job.facts["split"]
    starts = [need for need in job.needs if need.facts["split"] == "full"]
    times = [Path(start.folder, "model").stat().st_mtime_ns for start in starts]
    mark = fingerprint(given["model"], split, given["data"], given.get("dtype"), times)
    return Path(job.folder).parent / f"start_{split}_{mark[:8]}.json"


# ---------------------------------------------------------------- all runs

def run_missing(study: Study) -> Study:
    """Pass after pass: what is known decides what is planned, until nothing is missing."""
    args = study.setup.args
    while True:
        study = record_finished(study, grid.plan(study, grid.wanted_figures(args)))
        todo = records.missing(study, grid.plan(study, grid.wanted_figures(args)))
        ready = [job for job in todo if job.given]
        if not ready:
            return study
        print(f"{len(ready)} runs to make now, {len(todo) - len(ready)} after them; about "
              f"{clock(seconds_of(study, todo) / args.jobs)}; what they print is in {args.runs}/worker*.log",
              flush=True)
        study = records.find_runs(execute(study, ready, todo))


def record_finished(study: Study, jobs: list) -> Study:
    """Finished folders whose record is not in the JSON: runs that ended while nobody looked, and models of
    other commands."""
    known, needs = records.recorded_keys(study), [need for job in jobs for need in job.needs]
    folders = {need.key: need.folder for need in needs if records.is_model_there(need)} | study.finished
    for job in {job.key: job for job in needs + jobs}.values():
        if job.key in folders.keys() - known:
            study = records.keep(study, job, Path(folders[job.key]), None)
    return study


def new_pool(count: int, runs: str) -> ProcessPoolExecutor:
    """So many processes that import PyTorch once and then run one job after the other."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // count))  # read when the children import PyTorch
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), into_log, (runs,))


def into_log(runs: str):
    """What this process prints goes to a file of its own."""
    os.makedirs(runs, exist_ok=True)
    with open(f"{runs}/worker{os.getpid()}.log", "a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def execute(study: Study, jobs: list, todo: list) -> Study:
    """Run `jobs`, each after what it needs; record each as it ends. Returns the study with what is known
    then. `todo`: these and what comes after them."""
    args, begin = study.setup.args, time.perf_counter()
    count = min(args.jobs, len(jobs))
    pool = new_pool(count, args.runs)
    waiting, running = list(jobs), {}  # the latter: future -> job
    try:
        while waiting or running:
            pending = {job.key for job in [*waiting, *running.values()]}
            ready = [job for job in waiting if not any(need.key in pending for need in job.needs)]
            for job in ready[:count - len(running)]:
                waiting.remove(job)
                if not all(map(records.is_model_there, job.needs)):
                    study = fail(study, job, "a model that it needs could not be trained")
                    continue
                given = job, study.interrupted.get(job.key), study.setup.core.train, args.processes
                try:
                    running[pool.submit(run_job, *given)] = job
                except BrokenProcessPool:  # a process of it was killed, out of memory perhaps
                    pool = new_pool(count, args.runs)
                    running[pool.submit(run_job, *given)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                study, text = ended(study, job, future)
                left = [j for j in todo if not j.given or j in waiting or j in running.values()]
                print(f"[{len(todo) - len(left)} of {len(todo)}; {clock(time.perf_counter() - begin)}, about "
                      f"{clock(seconds_of(study, left) / args.jobs)} left] {job.name}: {text}", flush=True)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            print("stopping: each run finishes its step and is saved; the same command goes on", flush=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return study


def ended(study: Study, job: Job, future: Future) -> tuple[Study, str]:
    """The study with the record of a job that has ended, and what to say of it. Raises KeyboardInterrupt
    where it was stopped."""
    from running.run_folder import Stopped
    try:
        folder, seconds = future.result()
    except Stopped:
        raise KeyboardInterrupt from None
    except Exception as error:  # whatever ended one run, the others go on
        text = str(error) or type(error).__name__
        return fail(study, job, text), f"FAILED: {text}"
    study = records.keep(study, job, Path(folder), seconds)
    return study, f"{summary(study, job)} ({clock(seconds)})"


def fail(study: Study, job: Job, text: str) -> Study:
    failed = [*study.known["failed"], {"key": job.key, "name": job.name, "why": text[:300]}]
    return study._replace(known={**study.known, "failed": failed})


def summary(study: Study, job: Job) -> str:
    run = next((r for r in study.known["runs"] if r["key"] == job.key), None)
    if run is None:
        return "trained"
    return f"peak forget quality {10 ** max(run['forget_quality_log10'][1:]):.2g}, utility at the end " \
           f"{run['model_utility'][-1] / run['model_utility'][0]:.0%} of the start's"


# ---------------------------------------------------------------- time and memory

def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def rate(study: Study) -> tuple[float, bool]:
    """(FLOP/s of a worker, whether it was measured on runs of this study)."""
    timed = [r for r in study.known["runs"] + study.known["retrained"] if r.get("seconds")]
    if timed:
        return sum(r["flops"] for r in timed) / sum(r["seconds"] for r in timed), True
    return FLOP_RATE.get(study.setup.preset_name, FLOP_RATE[None]) * study.setup.args.processes, False


def seconds_of(study: Study, jobs: list) -> float:
    """Of one worker."""
    return sum(job.flops for job in jobs) / rate(study)[0]


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_plan(study: Study):
    """Runs, time and memory, for each figure and together."""
    args, (speed, measured) = study.setup.args, rate(study)
    jobs = grid.plan(study, grid.wanted_figures(args))
    todo = records.missing(study, jobs)
    print(f"{args.data if args.data == 'builtin' else Path(args.data).name}, {args.model}: figures "
          f"{', '.join(grid.wanted_figures(args))}; seeds 1 to {args.seeds}, tuning on seed "
          f"{grid.TUNING_SEED}")
    print(f"{'figure':14}{'runs':>6}{'done':>6}{'missing':>9}{'of them interrupted':>21}")
    for figure in grid.wanted_figures(args):
        own = grid.plan(study, [figure])
        lacking = [j for j in records.missing(study, own) if j.facts["kind"] == "unlearn"]
        print(f"{figure:14}{len(own):6}{len(own) - len(lacking):6}{len(lacking):9}"
              f"{sum(j.key in study.interrupted for j in lacking):21}")
    models = [j for j in todo if j.facts["kind"] == "model"]
    print(f"together {len(jobs)} unlearning runs, {len(todo) - len(models)} missing "
          f"({sum(j.given is None for j in todo)} wait for a choice of hyper-parameters), and {len(models)} "
          "models to fine-tune or retrain first")
    seconds = seconds_of(study, todo)
    source = "as the runs that are done took"
    if not measured:
        source = f"reckoned at {speed:.1e} FLOP/s a job, not measured"
    print(f"time: {clock(seconds / args.jobs)} with {args.jobs} job{'s' * (args.jobs > 1)} "
          f"({clock(seconds)} of one; models {clock(seconds_of(study, models))}), {source}")
    used = [r["memory"] for r in study.known["runs"]]
    each = max(used) if used else 16 * study.setup.parameters + LIBRARIES
    print(f"memory: {each / 1e9:.1f} GB a job, {args.jobs * each / 1e9:.1f} GB together, "
          + ("measured" if used else "16 bytes a parameter and the libraries; activations come on top"))
