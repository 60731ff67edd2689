"""Runs in worker processes, each after the models that it needs, and how long they will take."""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from study import grid, records
from study.grid import Job, Study
from support.errors import InputError

# Reckoning before anything was measured: FLOP/s of a process, and bytes that Python and PyTorch take.
FLOP_RATE, FLOP_RATE_TINY = 1e14, 4.5e10
LIBRARIES = 0.6e9
TIME_TO_SAVE = 60  # seconds for a run that is stopped


def run_job(job: Job, resumed: str | None, train: Callable) -> tuple[str, float]:
    """Train one: its folder, seconds."""
    begin, unlearns = time.perf_counter(), job.facts["kind"] == "unlearn"
    if not resumed and Path(job.folder).is_dir():
        if unlearns:  # `find_runs` knows every run by its settings, and this one has others
            raise InputError(f"{job.folder} holds another run: move it away")
        resumed = job.folder
    given = {"resume": resumed} if resumed else {**job.given, "out": job.folder}
    if given.get("retain_log"):
        given["retain_log"] = str(max((Path(given["retain_log"]) / "eval").glob("step_*.json")))
    train(given)
    folder = Path(resumed or job.folder)
    for part in ("checkpoints", "reference") if unlearns else ():  # a hundred runs would fill the disk
        shutil.rmtree(folder / part, ignore_errors=True)
    return str(folder), time.perf_counter() - begin


def run_missing(study: Study) -> Study:
    """Pass after pass: what is known decides what is planned, until nothing is missing."""
    figures = grid.wanted_figures(study.setup.args)
    while True:
        study = record_finished(study, grid.plan(study, figures))
        todo = records.missing(study, grid.plan(study, figures))
        ready = [job for job in todo if job.given]
        if not ready:
            return study
        print(f"{len(ready)} runs to make now, {len(todo) - len(ready)} after them; about "
              f"{clock(seconds_of(study, todo))}; what they print is in {study.setup.args.runs}/worker*.log",
              flush=True)
        study = records.find_runs(execute(study, ready))


def record_finished(study: Study, jobs: list) -> Study:
    """Records of runs that ended while nobody looked, and of models of other commands."""
    needs = {need.key: need for job in jobs for need in job.needs}
    folders = {key: need.folder for key, need in needs.items() if records.is_model_there(need)}
    folders |= study.finished
    for key, job in (needs | {job.key: job for job in jobs}).items():
        if key in folders.keys() - records.recorded_keys(study):
            study = records.keep(study, job, Path(folders[key]), None)
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


def execute(study: Study, jobs: list) -> Study:
    """Run `jobs`, each after what it needs, and record each as it ends."""
    args, count = study.setup.args, min(study.setup.args.jobs, len(jobs))
    pool, waiting, running = new_pool(count, args.runs), list(jobs), {}  # the last: future -> job
    try:
        while waiting or running:
            pending = {job.key for job in [*waiting, *running.values()]}
            ready = [job for job in waiting if not any(need.key in pending for need in job.needs)]
            for job in ready[:count - len(running)]:
                waiting.remove(job)
                if not all(map(records.is_model_there, job.needs)):
                    study = fail(study, job, "a model that it needs could not be trained")
                    continue
                task = run_job, job, study.interrupted.get(job.key), study.setup.train
                try:
                    future = pool.submit(*task)
                except BrokenProcessPool:  # a process of it was killed, out of memory perhaps
                    pool = new_pool(count, args.runs)
                    future = pool.submit(*task)
                running[future] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                study, text = ended(study, job, future)
                left = seconds_of(study, [*waiting, *running.values()])
                print(f"{job.name}: {text}; about {clock(left)} left", flush=True)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            print("stopping: each run finishes its step and is saved; the same command goes on", flush=True)
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()  # lets a run finish its step and save
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.join(TIME_TO_SAVE)
            child.kill()  # it may wait for a lock that an idle one held when it was ended
            child.join()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return study


def ended(study: Study, job: Job, future: Future) -> tuple[Study, str]:
    """With the record of a job that has ended; what to say of it. Raises KeyboardInterrupt if stopped."""
    from running.run_folder import Stopped
    try:
        folder, seconds = future.result()
    except Stopped:
        raise KeyboardInterrupt from None
    except Exception as error:  # whatever ended one run, the others go on
        text = str(error) or type(error).__name__
        return fail(study, job, text), f"FAILED: {text}"
    return records.keep(study, job, Path(folder), seconds), clock(seconds)


def fail(study: Study, job: Job, text: str) -> Study:
    failed = [*study.known["failed"], {"key": job.key, "name": job.name, "why": text[:300]}]
    return study._replace(known={**study.known, "failed": failed})


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def seconds_of(study: Study, jobs: list) -> float:
    """With --jobs at a time, at the rate of the study's runs; at FLOP_RATE where it has none yet."""
    timed = [r for r in study.known["runs"] + study.known["retrained"] if r.get("seconds")]
    rate = FLOP_RATE_TINY if study.setup.preset_name == "tiny" else FLOP_RATE
    if timed:
        rate = sum(r["flops"] for r in timed) / sum(r["seconds"] for r in timed)
    return sum(job.flops for job in jobs) / rate / study.setup.args.jobs


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_plan(study: Study):
    """Runs, time and memory, for each figure and together."""
    args, figures, used = study.setup.args, grid.wanted_figures(study.setup.args), study.known["runs"]
    for figure in [*figures, "together"]:
        jobs = grid.plan(study, figures if figure == "together" else [figure])
        todo = records.missing(study, jobs)
        lacking = [job for job in todo if job.facts["kind"] == "unlearn"]
        print(f"{figure:14}{len(jobs):6} runs,{len(lacking):6} missing")
    print(f"together {len(jobs)} unlearning runs, {len(lacking)} missing "
          f"({sum(j.given is None for j in todo)} wait for a choice of hyper-parameters), and "
          f"{len(todo) - len(lacking)} models to fine-tune or retrain first")
    print(f"time: {clock(seconds_of(study, todo))} with {args.jobs} jobs at a time, "
          + ("as the runs that are done took" if used else "reckoned, not measured"))
    each = max([r["memory"] for r in used], default=16 * study.setup.parameters + LIBRARIES)
    print(f"memory: {each / 1e9:.1f} GB a job, {args.jobs * each / 1e9:.1f} GB together, "
          + ("measured" if used else "16 bytes a parameter and the libraries; activations come on top"))
