"""Section 5 whole: plan the runs of a figure, run what is missing, distil them into one small JSON, draw, judge.

    python figures_tofu.py                       # built-in data, the tiny model, everything: see --plan first
    python figures_tofu.py --figure 5 --seeds 2 --data TOFU_DIR --methods ga ga+rt npo npo+rt --splits forget10
    python figures_tofu.py --draw-only           # from the JSON alone: no model, no run folder

    --figure 2               forget05: ga and npo, with and without rt, over steps, and answers of the rt variants
    --figure 5               forget01, 05, 10: forget quality against model utility at each method's peak
    --figure 6               the same runs over steps
    --figure 7               answers to one question of three sets, every method
    --figure 8               divergence from the start on forget10
    --figure 9               forget50 and forget90 with tuned weights
    --figure retain-weight   npo+rt on forget10, retain weights 0 to 5
    --figure beyond10        forget20, 30, 50, 90

It leaves OUT/tofu/DATA_MODEL.json, its pictures beside it, and OUT/tofu.md, a page over every such JSON. A run is known
by its settings, data, start and retrained model: one that is in the JSON, or finished in --runs, is not made again; one
that was interrupted goes on. All runs of a split and a seed began from the same weights, so methods are always compared
on one start; where it was trained again, on another machine say, its sums differ in rounding and its weights with them,
and it serves for the splits and seeds that have no runs yet. The story: `plan` (what is needed, given what is known),
`execute` (workers), `record` (what is kept of a run), `choose` (hyper-parameters), then `tofu_verdicts.py` and
`tofu_pictures.py`, pure functions of the JSON.

Hyper-parameters: one budget for every method, on forget10 and on TUNING_SEED, which is not among the reported seeds 1
to N: every learning rate of LR_FACTORS times the preset's, then, at the best, the further betas. The score of a run is
the largest, over its evaluations after the start, of the smaller of 1 - D/D_start and U/U_start, D the
Kolmogorov-Smirnov statistic against the retrained model (linear where the p-value runs over a hundred decades) and U
the model utility. What is chosen holds for every split; Figure 9 tunes its weights in the same way.

Seeds vary unlearning and retraining; the fine-tuned start is shared. Departures from the paper: see `tofu_verdicts.py`.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from data.tofu import complement, evaluation_split, load_task, slice_rows
from study import pictures as tofu_pictures
from study import verdicts as tofu_verdicts
from support.command_line import Parser, given_flags, positive, run_command
from support.errors import InputError
from support.files import fingerprint, locked, write_json
from support.provenance import environment

METHODS = ("ga", "ga+rt", "ga+kl", "idk+rt", "dpo", "dpo+rt", "dpo+kl", "kto", "kto+rt", "npo", "npo+rt", "npo+kl",
           "simnpo", "simnpo+rt")
WITH_BETA = ("dpo", "kto", "npo", "simnpo")
FIGURES = {  # name -> (splits, methods)
    "2": (("forget05",), ("ga", "ga+rt", "npo", "npo+rt")),
    "5": (("forget01", "forget05", "forget10"), METHODS),
    "6": (("forget01", "forget05", "forget10"), METHODS),
    "7": (("forget10",), METHODS),
    "8": (("forget10",), METHODS),
    "9": (("forget50", "forget90"), ("ga", "ga+rt", "npo", "npo+rt", "dpo+rt")),
    "retain-weight": (("forget10",), ("npo+rt",)),
    "beyond10": (("forget20", "forget30", "forget50", "forget90"), ("npo", "npo+rt", "ga+rt", "dpo+rt", "idk+rt")),
}
FEWER_SEEDS = ("9", "retain-weight", "beyond10")  # with --figure all: at most ALL_SEEDS of them
ALL_SEEDS = 3
TUNING_SEED, TUNING_SPLIT = 0, "forget10"
LR_FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the preset's lr, npo+rt's best in results/builtin_forget10_grid.md
BETA_FACTORS = (1.0, 0.5, 2.0)  # of the preset's beta; the first one while the learning rate is chosen
SIMNPO_BETA = 2.5  # in its place, on another scale: its log-probability is a mean over tokens (Fan et al., 2024)
RETAIN_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 5.0)
TUNED_WEIGHTS = (1.0, 2.0, 5.0)  # retain weights that Figure 9 chooses from, on TUNING_SEED
SECOND_START = ("npo+rt", "ga+rt")  # on forget10, seed 1, from a start fine-tuned with seed SECOND_START_SEED
SECOND_START_SEED = 1
EVALUATE_EPOCHS = 2  # epochs between evaluations; forget01, whose steps are few, every STEP_SPLIT_EVERY steps
STEP_SPLIT, STEP_SPLIT_EVERY = "forget01", 2
# What identifies a run, besides data, start and retrained model. Micro-batch, device and places change no number.
SIGNIFICANT = ("loss", "split", "forget_weight", "retain_weight", "kl_weight", "kl_direction", "beta", "gamma",
               "epochs", "batch_size", "lr", "weight_decay", "warmup_epochs", "max_grad_norm", "seed", "dtype",
               "eval_every", "retain_pairing")
CURVES = ("forget_quality_log10", "ks_statistic", "model_utility", "forget_truth_ratio", "forget_kl", "world_facts_kl")
SAMPLED_SETS = ("forget", "retain", "world_facts")
SAMPLED_SPLITS = ("forget05", "forget10")  # of seed 1, for Figures 2 and 7
SAMPLED_ROW = 7  # of each of these sets
TEXT = 160  # characters of a sampled text that are kept
# Reckoning before anything was measured: FLOP/s of one process, and what an evaluation costs beside its forward passes.
FLOP_RATE = {"tiny": 4.5e10, None: 1e14}
GENERATION = 1.5  # times the scoring of the same texts: 0.1 for a good model, 4 for one that never ends
CHARACTERS_PER_TOKEN = 3.5
LIBRARIES = 0.6e9  # bytes of memory that Python and PyTorch take before a model is there


# ---------------------------------------------------------------- what is needed

class Job(NamedTuple):
    """A training run: settings as train_npo.py's flags, and the model folders that must be there first."""
    name: str
    given: dict | None  # None: it waits for a choice of hyper-parameters that can't be made yet
    key: str  # of its settings, data, start and retrained model
    folder: str
    needs: tuple  # of Jobs
    rows: int  # that it learns or unlearns
    passes: float  # sequences forward and backward for each row of an epoch
    evaluations: int
    facts: dict  # what its record says of it


class Study(NamedTuple):
    """Everything that planning depends on: the settings of this command, the data, and what is known so far."""
    args: object
    task: object  # of TUNING_SPLIT
    preset: object  # models.Preset
    preset_name: str
    extra: dict  # train_npo flags given through --train-flags
    known: dict  # the distilled JSON
    finished: dict  # key -> folder of the runs that are done
    interrupted: dict  # key -> folder of the runs that were begun
    taken: dict  # another study's choices (--choices), else {}
    memo: dict  # jobs that were described before: resolving settings takes a millisecond, and plans are made often


def loss_and_weights(method: str) -> dict:
    """"npo+rt" -> train_npo's flags for it."""
    loss, *terms = method.split("+")
    return {"loss": loss, "retain_weight": float("rt" in terms), "kl_weight": float("kl" in terms)}


def betas(study: Study, method: str) -> tuple:
    """The betas that a method may have, the first one for the choice of its learning rate."""
    loss = method.split("+")[0]
    beta = SIMNPO_BETA if loss == "simnpo" else study.preset.beta
    return tuple(factor * beta for factor in (BETA_FACTORS if loss in WITH_BETA else (1.0,)))


def learning_rates(study: Study) -> tuple:
    return tuple(factor * study.preset.lr for factor in LR_FACTORS)


def run_key(settings: dict, data_fingerprint: str, start: str, retrained: str) -> str:
    """16 hex digits that say which run it is: equal ones would end with equal weights and evaluations."""
    return fingerprint({k: settings[k] for k in SIGNIFICANT}, data_fingerprint, start, retrained)


def model_job(study: Study, split: str, seed: int) -> Job | None:
    """Fine-tuning (split full) or retraining; None where the preset has a published fine-tuned model to start from."""
    if split == "full" and study.preset.finetuned:
        return None
    if (split, seed) not in study.memo:
        study.memo[split, seed] = _model_job(study, split, seed)
    return study.memo[split, seed]


def base_model(study: Study) -> str:
    """Where retraining starts: the preset's base, or --base."""
    return f"{study.preset_name}={study.args.base}" if study.args.base else study.preset_name


def _model_job(study: Study, split: str, seed: int) -> Job:
    import train_npo
    if study.preset_name == "tiny":
        settings = train_npo.tiny_settings(train_npo.resolve({"data": study.args.data, **study.extra}), split,
                                           study.task, seed)
        given = {"loss": "sft", "split": split, "data": study.args.data, "seed": seed,
                 "eval_every": settings.eval_every}
    else:
        given = {"loss": "sft", "split": split, "data": study.args.data, "seed": seed, "model": base_model(study),
                 "eval_every": "never" if split == "full" else "end", **study.extra}
        settings = train_npo.resolve(given)
        mark = run_key(vars(settings), study.task.fingerprint, settings.start, "")
        settings.out = f"runs/models/{study.preset_name}-{split}-seed{seed}-{mark}"
    rows = len(slice_rows(study.task.full, split)) + len(study.task.facts()) * (study.preset_name == "tiny")
    key = run_key(vars(settings), study.task.fingerprint, "", Path(settings.out).name)
    return Job(f"{split} seed {seed}", given, key, settings.out, (), rows * settings.epochs, 1.0, int(split != "full"),
               {"kind": "model", "split": split, "seed": seed})


def unlearn_job(study: Study, method: str, split: str, seed: int, hyper: dict | None, start_seed: int = 0,
                retain_weight: float | None = None) -> Job:
    """An unlearning run with `hyper` {"lr", "beta"} (None: not chosen yet), judged against its own seed's retrained
    model."""
    mark = method, split, seed, tuple((hyper or {}).values()), start_seed, retain_weight
    if mark not in study.memo:
        study.memo[mark] = _unlearn_job(study, method, split, seed, hyper, start_seed, retain_weight)
    return study.memo[mark]


def _unlearn_job(study: Study, method: str, split: str, seed: int, hyper: dict | None, start_seed: int,
                 retain_weight: float | None) -> Job:
    import train_npo
    start = model_job(study, "full", start_seed)
    retrained = model_job(study, complement(split), retraining_seed(study, seed))
    rows = len(slice_rows(study.task.full, split))
    epochs = study.args.epochs or study.preset.epochs
    batch = study.extra.get("batch_size", 32)
    steps, every = math.ceil(epochs * rows / batch), evaluation_every(split, rows, batch)
    given = {**loss_and_weights(method), "split": split, "seed": seed, "data": study.args.data, "epochs": epochs,
             "eval_every": str(every), **study.extra,
             "model": f"{study.preset_name}={start.folder}/model" if start else study.args.model,
             "retain_log": retrained.folder}
    if retain_weight is not None:
        given["retain_weight"] = retain_weight
    settings = train_npo.resolve({**given, **(hyper or {})})
    key = run_key(vars(settings), study.task.fingerprint, Path(start.folder).name if start else settings.start,
                  Path(retrained.folder).name)
    name = f"{split} {method} lr {settings.lr:g} beta {settings.beta:g} weights {settings.forget_weight:g}/" \
           f"{settings.retain_weight:g}/{settings.kl_weight:g} seed {seed}" + f" start {start_seed}" * (start_seed > 0)
    keeps = settings.retain_weight + settings.kl_weight > 0
    passes = 1 + keeps + (settings.loss == "dpo") + 0.3 * (settings.loss == "kto")
    facts = {"kind": "unlearn", "method": settings.method, "split": split, "seed": seed, "start_seed": start_seed,
             **{k: getattr(settings, k)
                for k in ("lr", "beta", "forget_weight", "retain_weight", "kl_weight", "epochs")}}
    if hyper is None:  # what the name and the key say of lr and beta isn't known yet
        name = key = f"to be chosen: {name}"
    folder = f"{study.args.runs}/{split}_{method}_seed{seed}_{key[:8]}"
    return Job(name, {**given, **hyper} if hyper else None, key, folder, tuple(filter(None, (start, retrained))),
               rows * epochs, passes, math.ceil(steps / every), facts)


def retraining_seed(study: Study, seed: int) -> int:
    """The retrained model that a seed is judged against: its own, or one of the first --retrained."""
    if seed == TUNING_SEED:
        return TUNING_SEED
    return (seed - 1) % (study.args.retrained or seed) + 1


def evaluation_every(split: str, rows: int, batch: int) -> int:
    """Steps between evaluations."""
    return STEP_SPLIT_EVERY if split == STEP_SPLIT else max(1, math.ceil(EVALUATE_EPOCHS * rows / batch))


def plan(study: Study, figures: list) -> list[Job]:
    """The unlearning runs that the figures need, each once: for the choice of hyper-parameters, then for the figures.
    What depends on a choice that can't be made yet has no settings."""
    jobs = {}

    def add(job: Job):
        jobs.setdefault(job.key if job.given else (job.name, job.key), job)

    for figure in figures:
        splits, methods = wanted_of(study.args, figure)
        for method in methods:
            for job in tuning_jobs(study, method):
                add(job)
            hyper = choose(study, method)
            for split in splits:
                for job in figure_jobs(study, figure, method, split, hyper):
                    add(job)
    return list(jobs.values())


def tuning_jobs(study: Study, method: str) -> list[Job]:
    """All learning rates at the first beta; the other betas at the best of these."""
    if study.taken:
        return []
    first, *others = betas(study, method)
    rates = [unlearn_job(study, method, TUNING_SPLIT, TUNING_SEED, {"lr": lr, "beta": first})
             for lr in learning_rates(study)]
    best = best_job(study, rates)
    for beta in others:
        hyper = {"lr": best.facts["lr"], "beta": beta} if best else None
        job = unlearn_job(study, method, TUNING_SPLIT, TUNING_SEED, hyper)
        rates.append(job if hyper else job._replace(name=f"{job.name}, beta {beta:g}"))
    return rates


def figure_jobs(study: Study, figure: str, method: str, split: str, hyper: dict | None) -> list[Job]:
    """The runs of one method on one split for one figure, on the reported seeds."""
    seeds = range(1, 1 + (1 if figure == "7" else seeds_of(study.args, figure)))
    if figure == "9":
        weight = chosen_weight(study, method, split, hyper)
        hyper_if_tuned = None if weight is None else hyper
        return weight_jobs(study, method, split, hyper) + [
            unlearn_job(study, method, split, seed, hyper_if_tuned, retain_weight=weight) for seed in seeds]
    if figure == "retain-weight":
        return [unlearn_job(study, method, split, seed, hyper, retain_weight=weight)
                for weight in RETAIN_WEIGHTS for seed in seeds]
    jobs = [unlearn_job(study, method, split, seed, hyper) for seed in seeds]
    if figure == "5" and split == TUNING_SPLIT and method in SECOND_START and not study.preset.finetuned:
        jobs.append(unlearn_job(study, method, split, 1, hyper, start_seed=SECOND_START_SEED))
    return jobs


def weight_jobs(study: Study, method: str, split: str, hyper: dict | None) -> list[Job]:
    """The retain weights that Figure 9 chooses from; a method without a retain term has none to choose."""
    weights = () if study.taken or "+rt" not in method else TUNED_WEIGHTS
    return [unlearn_job(study, method, split, TUNING_SEED, hyper, retain_weight=weight) for weight in weights]


def seeds_of(args, figure: str) -> int:
    """How many seeds a figure has: --seeds, with --figure all at most ALL_SEEDS of the costly ones."""
    return min(args.seeds, ALL_SEEDS) if args.figure == "all" and figure in FEWER_SEEDS else args.seeds


# ---------------------------------------------------------------- choosing hyper-parameters

def score(run: dict) -> float:
    """The largest, over evaluations after the start, of the smaller of 1 - D/D_start and U/U_start: 1 where a model is
    as the retrained one and as useful as the start."""
    quality = [1 - d / run["ks_statistic"][0] for d in run["ks_statistic"]]
    utility = [u / run["model_utility"][0] for u in run["model_utility"]]
    return max(min(pair) for pair in list(zip(quality, utility))[1:])


def best_job(study: Study, jobs: list) -> Job | None:
    """The one whose record has the highest score; None while one of them is still to be run. A failed one has none."""
    records = {record["key"]: record for record in study.known["runs"]}
    failed = {f["key"] for f in study.known["failed"]}
    if any(job.given is None or job.key not in records and job.key not in failed for job in jobs):
        return None
    return max((job for job in jobs if job.key in records), key=lambda job: score(records[job.key]), default=None)


def choose(study: Study, method: str) -> dict | None:
    """{"lr", "beta"} of a method, or None while its tuning runs are not all there."""
    if study.taken:
        return {k: study.taken[method][k] for k in ("lr", "beta")} if method in study.taken else None
    best = best_job(study, tuning_jobs(study, method))
    return {k: best.facts[k] for k in ("lr", "beta")} if best else None


def chosen_weight(study: Study, method: str, split: str, hyper: dict | None) -> float | None:
    """The retain weight of Figure 9, or None while its tuning runs are not all there."""
    if "+rt" not in method:
        return 0.0
    if study.taken:
        return study.taken.get(method, {}).get("weights", {}).get(split)
    best = best_job(study, weight_jobs(study, method, split, hyper))
    return best.facts["retain_weight"] if best else None


def chosen(study: Study) -> tuple[dict, list]:
    """(what was chosen for each method, and the weights of Figure 9; one line for each tuning run), both for the
    JSON."""
    records = {record["key"]: record for record in study.known["runs"]}
    choices, tried = dict(study.taken), []
    for method in METHODS if not study.taken else ():
        hyper, jobs = choose(study, method), tuning_jobs(study, method)
        lines = [tried_line(job, records) for job in jobs if job.given and job.key in records]
        if hyper and lines:
            choices[method] = {**hyper, "score": max(line["score"] for line in lines), "weights": {}}
            for split in FIGURES["9"][0] if method in FIGURES["9"][1] else ():
                weight = chosen_weight(study, method, split, hyper)
                if weight is not None:
                    choices[method]["weights"][split] = weight
                lines += [tried_line(job, records) for job in weight_jobs(study, method, split, hyper)
                          if job.key in records]
        tried += lines
    return choices, tried


def tried_line(job: Job, records: dict) -> dict:
    run = records[job.key]
    return {**{k: run[k] for k in ("method", "split", "lr", "beta", "retain_weight")}, "score": round(score(run), 4),
            "peak_log10": max(run["forget_quality_log10"][1:])}


# ---------------------------------------------------------------- what is there

def scan(runs: Path) -> tuple[dict, dict]:
    """(key -> folder of finished runs, the same of interrupted ones) under `runs`, by their settings, whatever their
    names. Raises InputError."""
    finished, interrupted = {}, {}
    for config in sorted(runs.glob("*/config.json")):
        try:
            stored = json.loads(config.read_text(encoding="utf-8"))
            settings, data = stored["settings"], stored["data_fingerprint"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{config} is not what a run writes: move its folder away") from None
        if not set(SIGNIFICANT) <= set(settings):
            continue  # of another program's, or of an older version's making
        key = unlearned_key(settings, data)
        place = finished if (config.parent / "model").is_dir() else interrupted
        place.setdefault(key, str(config.parent))
    return finished, interrupted


def unlearned_key(settings: dict, data_fingerprint: str) -> str:
    """`run_key` of a stored run, from where its start and its retain log lie."""
    start = Path(settings["start"])
    return run_key(settings, data_fingerprint, start.parent.name if start.name == "model" else settings["start"],
                   Path(settings["retain_log"]).parent.parent.name if settings["retain_log"] else "")


def find_runs(study: Study) -> Study:
    """The study with what lies on the disk now."""
    finished, interrupted = scan(Path(study.args.runs))
    return study._replace(finished=finished, interrupted=interrupted)


def is_model_there(job: Job) -> bool:
    return (Path(job.folder) / "model").is_dir()


def missing(study: Study, jobs: list) -> list[Job]:
    """What must still be run, models first: runs without record and without finished folder, and the models they need
    (or whose own record is not there yet)."""
    known = {record["key"] for record in study.known["runs"]} | {r["key"] for r in study.known["retrained"]}
    failed = {f["key"] for f in study.known["failed"]}
    open_jobs = [job for job in jobs if job.key not in known | failed and job.key not in study.finished]
    models = {}
    for job in open_jobs:
        models.update({need.key: need for need in job.needs if not is_model_there(need) and need.key not in failed})
    return list(models.values()) + open_jobs


# ---------------------------------------------------------------- running

def run_job(job: Job, resumed: str | None, processes: int) -> tuple[str, float]:
    """Train one; (its folder, seconds). Where `processes` > 1, through torchrun."""
    import train_npo
    begin = time.perf_counter()
    given = {**job.given, "out": job.folder}
    if given.get("retain_log"):
        given["retain_log"] = str(max((Path(given["retain_log"]) / "eval").glob("step_*.json")))
    folder = resumed
    if not folder and Path(job.folder).is_dir():
        if job.facts["kind"] == "unlearn":  # `scan` knows every run by its settings, and this one has others
            raise InputError(f"{job.folder} holds another run: move it away")
        folder = job.folder
    if processes > 1:
        launch(["--resume", folder] if folder else words_of(given), processes)
    else:
        s = train_npo.parse(["--resume", folder])[0] if folder else train_npo.resolve(given)
        start = start_rows_file(job)
        rows = json.loads(start.read_text(encoding="utf-8")) if start and start.exists() else None
        train_npo.run(s, train_npo.join_world(s.device), rows)
        if start and rows is None:
            evaluated = Path(folder or job.folder) / "eval" / "step_000000.json"
            write_json(start, json.loads(evaluated.read_text(encoding="utf-8"))["rows"])
    if job.facts["kind"] == "unlearn":  # what only a resume needs: a hundred runs would fill the disk
        for part in ("checkpoints", "reference"):
            shutil.rmtree(Path(folder or job.folder) / part, ignore_errors=True)
    return folder or job.folder, time.perf_counter() - begin


def words_of(given: dict) -> list[str]:
    """train_npo.py's command line for these settings."""
    words = []
    for key, value in given.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif (key, value) != ("eval_every", "end"):  # fine-tuning's default, which no word stands for
            words += [flag, str(value)]
    return words


def launch(words: list, processes: int):
    """train_npo.py through torchrun. SIGTERM is handed on: the run finishes its step and is saved.
    Raises Stopped after that, CalledProcessError where it fails."""
    from running.run_folder import Stopped
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
               str(Path(__file__).parent / "train_npo.py"), *words]
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


def start_rows_file(job: Job) -> Path | None:
    """Where the start's evaluation is kept for the other runs from this start on this split: it would be the same in
    each."""
    if job.facts["kind"] == "model":
        return None
    weights = [Path(need.folder, "model").stat().st_mtime_ns for need in job.needs if need.facts["split"] == "full"]
    mark = fingerprint(job.given["model"], job.facts["split"], job.given["data"], job.given.get("dtype"), weights)
    return Path(job.folder).parent / f"start_{job.facts['split']}_{mark[:8]}.json"


def work(pipe, log: str, processes: int):
    """A worker: jobs come through the pipe, ("done" | "failed" | "stopped", text, seconds) go back; None ends it."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        from running.run_folder import Stopped
        while (message := pipe.recv()) is not None:
            try:
                folder, seconds = run_job(*message, processes)
                pipe.send(("done", folder, seconds))
            except Stopped as stopped:
                pipe.send(("stopped", str(stopped), 0.0))
                return
            except (InputError, subprocess.CalledProcessError) as error:
                pipe.send(("failed", str(error), 0.0))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return  # the command has ended


class Workers:
    """`count` processes that import PyTorch once and then run one job after the other."""

    def __init__(self, count: int, processes: int, runs: str):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // count))  # read when the children import PyTorch
        self.context, self.processes, self.runs = multiprocessing.get_context("spawn"), processes, runs
        self.idle, self.busy = [], {}
        for number in range(count):
            self.start(number)

    def start(self, number: int):
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(theirs, f"{self.runs}/worker{number}.log", self.processes))
        process.start()
        theirs.close()
        self.idle.append((number, process, ours))

    def give(self, job: Job, resumed: str | None):
        number, process, pipe = self.idle.pop()
        pipe.send((job, resumed))
        self.busy[pipe] = number, process, job

    def results(self):
        """Wait, then yield (job, what, text, seconds) of each job that has ended."""
        for pipe in wait(list(self.busy)):
            number, process, job = self.busy.pop(pipe)
            try:
                what, text, seconds = pipe.recv()
                self.idle.append((number, process, pipe))
            except EOFError:  # killed, out of memory perhaps
                process.join()
                what, text, seconds = "failed", f"its process ended (exit code {process.exitcode}); see " \
                                                f"{self.runs}/worker{number}.log", 0.0
                self.start(number)
            yield job, what, text, seconds

    def close(self, at_once: bool):
        """Let idle workers go; `at_once`: ask busy ones to finish their step and save."""
        workers = [(process, pipe) for _, process, pipe in self.idle]
        busy = [(process, pipe) for pipe, (_, process, _) in self.busy.items()]
        for process, pipe in workers + busy:  # a busy one reads it after its run, which may end before it is asked to
            if process.is_alive():
                with suppress(BrokenPipeError):  # it has heard the same Ctrl-C
                    pipe.send(None)
        for process, _ in busy if at_once else ():
            process.terminate()
        for process, _ in workers + busy:
            process.join()


def execute(study: Study, jobs: list, workers: Workers, progress) -> Study:
    """Run `jobs`, each after what it needs; record each as it ends. Returns the study with what is known then."""
    waiting = list(jobs)
    pending = {job.key for job in jobs}  # not ended yet
    while waiting or workers.busy:
        for job in [j for j in waiting if not any(need.key in pending for need in j.needs)][:len(workers.idle)]:
            waiting.remove(job)
            if all(is_model_there(need) for need in job.needs):
                workers.give(job, study.interrupted.get(job.key))
            else:
                study = fail(study, job, "a model that it needs could not be trained")
                pending.discard(job.key)
        for job, what, text, seconds in workers.results() if workers.busy else ():
            pending.discard(job.key)
            if what == "stopped":
                raise KeyboardInterrupt
            if what == "failed":
                study = fail(study, job, text)
                progress(study, job, f"FAILED: {text}", 0.0)
            else:
                study = keep(study, record(study, job, Path(text), seconds))
                progress(study, job, summary(study, job), seconds)
    return study


def fail(study: Study, job: Job, text: str) -> Study:
    known = {**study.known, "failed": study.known["failed"] + [{"key": job.key, "name": job.name, "why": text[:300]}]}
    return study._replace(known=known)


def summary(study: Study, job: Job) -> str:
    runs = [r for r in study.known["runs"] if r["key"] == job.key]
    if not runs:
        return "trained"
    return f"peak forget quality {10 ** max(runs[0]['forget_quality_log10'][1:]):.2g}, utility at the end " \
           f"{runs[0]['model_utility'][-1] / runs[0]['model_utility'][0]:.0%} of the start's"


# ---------------------------------------------------------------- what is kept of a run

def record(study: Study, job: Job, folder: Path, seconds: float | None) -> dict:
    """A finished run in two kilobytes: settings, the curves of its metrics, and counts of its last answers."""
    evaluations = [json.loads(path.read_text(encoding="utf-8"))
                   for path in sorted((folder / "eval").glob("step_*.json"))]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    config = json.loads((folder / "config.json").read_text())
    kept = {"key": job.key, **job.facts, "commit": config["commit"], "start_weights": config["start_weights"],
            "memory": max(line["memory"] for line in log), "flops": round(reckon(study, job)),
            "seconds": seconds and round(seconds, 1)}
    if not evaluations:
        return kept
    rows = evaluations[-1]["rows"]
    told = rows if job.facts["split"] in (TUNING_SPLIT, complement(TUNING_SPLIT)) else ("forget",)  # what verdicts need
    kept["answers"] = {name: answers_of(study, job.facts["split"], name, rows[name]) for name in told}
    if job.facts["kind"] == "model":
        from evaluate_tofu import log_truth_ratio
        kept["model_utility"] = short(evaluations[-1]["metrics"]["model_utility"])
        kept["log_truth_ratios"] = [round(log_truth_ratio(row), 4) for row in rows["forget"]]
        if job.facts["seed"] == 1 and evaluation_split(job.facts["split"]) in SAMPLED_SPLITS:
            kept["samples"] = samples_of(study, job.facts["split"], rows)
        return kept
    kept["steps"] = [e["provenance"]["step"] for e in evaluations]
    kept["total_steps"] = log[-1]["step"]
    kept.update({key: [short(e["metrics"][key]) for e in evaluations] for key in CURVES})
    for name in ("forget", "retain"):
        kept[f"{name}_probability"] = [short(e["metrics"][name]["probability"]) for e in evaluations]
    if job.facts["seed"] == 1 and job.facts["split"] in SAMPLED_SPLITS:
        kept["samples"] = samples_of(study, job.facts["split"], rows)
        if job.facts["method"] == "npo+rt" and job.facts["split"] == TUNING_SPLIT:
            kept["samples_start"] = samples_of(study, job.facts["split"], evaluations[0]["rows"])
            kept["answers_start"] = {name: answers_of(study, job.facts["split"], name, first)
                                     for name, first in evaluations[0]["rows"].items()}
    return kept


def short(number: float | None) -> float | None:
    """Five digits: what a figure can show, and a verdict rest on."""
    return None if number is None else float(f"{number:.5g}")


_texts: dict = {}  # (data, split) -> (evaluated rows, word pairs of answers, of refusals)


def texts_of(study: Study, split: str) -> tuple:
    from study.answers import pairs_of
    key = study.args.data, split
    if key not in _texts:
        task = load_task(study.args.data, evaluation_split(split))
        answers = [row["answer"] for row in task.full + task.facts()]
        _texts[key] = task.evaluated, pairs_of(answers), pairs_of(task.refusals)
    return _texts[key]


def answers_of(study: Study, split: str, name: str, rows: list) -> dict:
    """`tofu_answers.statistics_of` for a set's generations."""
    from study.answers import statistics_of
    evaluated, answers, refusals = texts_of(study, split)
    return statistics_of([row["generation"] for row in rows], evaluated[name][:len(rows)], answers, refusals)


def samples_of(study: Study, split: str, rows: dict) -> list:
    """One question a set with its answer: {"set", "question", "answer", "generation", "kind"}."""
    from study.answers import kind
    evaluated, answers, refusals = texts_of(study, split)
    samples = []
    for name in SAMPLED_SETS:
        at = min(SAMPLED_ROW, len(rows[name]) - 1)
        row = rows[name][at]
        samples.append({"set": name, **{k: row[k][:TEXT] for k in ("question", "answer", "generation")},
                        "kind": kind(row["generation"], evaluated[name][at], answers, refusals)})
    return samples


def keep(study: Study, kept: dict) -> Study:
    """The study with one more record, written to its JSON. Raises InputError for a run from another start than the
    others of its split and seed: names and settings of two starts can be the same where their weights, made on two
    machines, are not."""
    place = "retrained" if kept["kind"] == "model" else "runs"
    group = lambda record: tuple(record.get(key) for key in ("split", "seed", "start_seed"))
    began = {r["start_weights"] for r in study.known["runs"] if group(r) == group(kept)}
    if began - {kept["start_weights"]}:
        raise InputError(f"{json_path(study.args)} has runs of {kept['split']}, seed {kept['seed']}, that began from "
                         f"weights {min(began)}, and these begin from {kept['start_weights']}: they can't be compared; "
                         "bring that start's folder, give another --out, or take those runs out of the JSON")
    others = [r for r in study.known[place] if r["key"] != kept["key"]]
    study = study._replace(known={**study.known, place: sorted(others + [kept], key=order)})
    write_json(json_path(study.args), complete(study))
    return study


def order(kept: dict) -> tuple:
    return tuple(str(kept.get(k, "")) for k in ("split", "method", "lr", "beta", "forget_weight", "retain_weight",
                                                "start_seed", "seed", "key"))


def complete(study: Study) -> dict:
    """The JSON's content: the records, what follows from them, and where they come from."""
    from evaluate_tofu import ks_log10_p
    choices, tried = chosen(study)
    samples = {}  # forget split -> seed -> log R of its retrained model
    for model in study.known["retrained"]:
        if "log_truth_ratios" in model:
            samples.setdefault(evaluation_split(model["split"]), {})[model["seed"]] = model["log_truth_ratios"]
    rows = {split: len(next(iter(by_seed.values()))) for split, by_seed in samples.items()}
    lattice = {str(n): [[k, round(ks_log10_p(n, k / n), 12)] for k in range(n + 1)] for n in sorted(set(rows.values()))
               if n <= 60}
    return {**study.known, "chosen": choices, "tried": tried, "forget_rows": rows, "lattice": lattice,
            "ceilings": {split: ceilings(by_seed) for split, by_seed in samples.items()}}


def ceilings(log_ratios: dict) -> list:
    """log10 forget quality of each pair of retrained models of different seeds: what perfect unlearning would score."""
    from scipy.stats import ks_2samp

    from evaluate_tofu import ks_log10_p
    seeds = sorted(log_ratios)
    return [{"seeds": [a, b],
             "log10": round(ks_log10_p(len(log_ratios[a]), ks_2samp(log_ratios[a], log_ratios[b]).statistic), 4)}
            for i, a in enumerate(seeds) for b in seeds[i + 1:]]


# ---------------------------------------------------------------- time and memory

def parameters_of(dims: dict) -> int:
    """Of a Llama with these dimensions."""
    h, i = dims["hidden_size"], dims["intermediate_size"]
    kv = dims.get("num_key_value_heads", dims["num_attention_heads"]) / dims["num_attention_heads"]
    tied = dims["hidden_size"] < 1024  # the small ones share embedding and head
    return round(dims["num_hidden_layers"] * (2 * h * h * (1 + kv) + 3 * h * i)
                 + dims["vocab_size"] * h * (1 if tied else 2))


def reckon(study: Study, job: Job) -> float:
    """Floating-point operations of a run: 6 a parameter and token forward and backward, 2 forward; evaluations score
    TOFU's rows with their perturbed answers, and generate."""
    parameters = parameters_of(dims_of(study))
    length = lambda rows: sum(len(r["question"]) + len(r["answer"]) for r in rows) / len(rows) / CHARACTERS_PER_TOKEN
    scored = sum(length(rows[:300]) * len(rows[:300]) * (2 + len(rows[0].get("perturbed_answer") or []))
                 for rows in study.task.evaluated.values())
    return parameters * (6 * job.rows * job.passes * length(study.task.full)
                         + job.evaluations * 2 * scored * (1 + GENERATION))


def dims_of(study: Study) -> dict:
    from models.loading import tiny_dims
    return tiny_dims(study.task.full) if study.preset_name == "tiny" else study.preset.dims


def rate(study: Study) -> tuple[float, bool]:
    """(FLOP/s of a worker, whether it was measured on runs of this study)."""
    timed = [r for r in study.known["runs"] + study.known["retrained"] if r.get("seconds")]
    if timed:
        return sum(r["flops"] for r in timed) / sum(r["seconds"] for r in timed), True
    return FLOP_RATE.get(study.preset_name, FLOP_RATE[None]) * study.args.processes, False


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_plan(study: Study, jobs: list):
    """Runs, time and memory, for each figure and together."""
    args, (speed, measured) = study.args, rate(study)
    todo = missing(study, jobs)
    seconds = sum(reckon(study, job) for job in todo) / speed
    print(f"{args.data if args.data == 'builtin' else Path(args.data).name}, {args.model}: figures "
          f"{', '.join(wanted_figures(args))}; seeds 1 to {args.seeds}, tuning on seed {TUNING_SEED}")
    print(f"{'figure':14}{'runs':>6}{'done':>6}{'missing':>9}{'of them interrupted':>21}")
    for figure in wanted_figures(args):
        own = plan(study, [figure])
        lacking = [j for j in missing(study, own) if j.facts["kind"] == "unlearn"]
        print(f"{figure:14}{len(own):6}{len(own) - len(lacking):6}{len(lacking):9}"
              f"{sum(j.key in study.interrupted for j in lacking):21}")
    models = [j for j in todo if j.facts["kind"] == "model"]
    waits = sum(j.given is None for j in todo)
    print(f"together {len(jobs)} unlearning runs, {len(todo) - len(models)} missing ({waits} wait for a choice of "
          f"hyper-parameters), and {len(models)} models to fine-tune or retrain first")
    print(f"time: {clock(seconds / args.jobs)} with {args.jobs} job{'s' * (args.jobs > 1)} ({clock(seconds)} of one; "
          f"models {clock(sum(reckon(study, j) for j in models) / speed)}), "
          + ("as the runs that are done took" if measured else f"reckoned at {speed:.1e} FLOP/s a job, not measured"))
    used = [r["memory"] for r in study.known["runs"]]
    each = max(used) if used else 16 * parameters_of(dims_of(study)) + LIBRARIES
    print(f"memory: {each / 1e9:.1f} GB a job, {args.jobs * each / 1e9:.1f} GB together, "
          + ("measured" if used else "16 bytes a parameter and the libraries; activations come on top"))


# ---------------------------------------------------------------- the command

def build_parser() -> Parser:
    parser = Parser(prog="figures_tofu.py", description=__doc__)
    add = parser.add_argument
    add("--figure", default="all", choices=[*FIGURES, "all"], help="what to plan, run and draw (default: all)")
    add("--seeds", type=positive(int), default=5,
        help=f"unlearning seeds 1 to N; with --figure all, figures {', '.join(FEWER_SEEDS)} "
        f"have at most {ALL_SEEDS} (default: 5)")
    add("--retrained", type=positive(int),
        help="retrained models a split; seeds share them in turn (default: one a seed)")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="only these (default: all of a figure)")
    add("--splits", nargs="+", metavar="SPLIT", help="only these (default: all of a figure)")
    add("--model", default="tiny", help="preset, or PRESET=FOLDER (default: tiny)")
    add("--base", help="folder with the base model that retraining starts from (default: the preset's)")
    add("--data", default="builtin", help="builtin, a folder with TOFU's files, or a Hub id (default: builtin)")
    add("--choices", metavar="FILE",
        help="take hyper-parameters and weights from another study's JSON in place of tuning")
    add("--epochs", type=positive(int), help="of every unlearning run (default: the preset's)")
    add("--train-flags", default="",
        help="further flags of train_npo.py for every run, in one string, e.g. \"--dtype bf16\"")
    add("--jobs", type=positive(int), help="runs at a time (default: tiny: one a core; else 1)")
    add("--processes", type=positive(int), default=1,
        help="processes of a run, through torchrun (default: 1, no torchrun)")
    add("--plan", action="store_true", help="print runs, time and memory, and stop")
    add("--draw-only", action="store_true", help="draw and judge from the JSON, without model or run folder")
    add("--runs", default="runs/tofu", help="where run folders are (default: runs/tofu)")
    add("--out", default="results", help="where tofu/*.json, its pictures and tofu.md go (default: results)")
    return parser


def wanted_figures(args) -> list:
    return list(FIGURES) if args.figure == "all" else [args.figure]


def wanted_of(args, figure: str) -> tuple[list, list]:
    """(splits, methods) of a figure, without those that --splits and --methods leave out."""
    splits, methods = FIGURES[figure]
    return [s for s in splits if s in (args.splits or splits)], [m for m in methods if m in (args.methods or methods)]


def json_path(args) -> Path:
    """OUT/tofu/DATA_MODEL.json."""
    plain = lambda text: "".join(c if c.isalnum() or c in "-." else "-" for c in Path(text).name)
    return Path(args.out) / "tofu" / f"{plain(args.data)}_{plain(args.model.partition('=')[0])}.json"


def open_study(args) -> Study:
    """Everything that planning depends on. Raises InputError, for a JSON of other data, start or flags too."""
    import train_npo
    from models.loading import PRESETS
    name = args.model.partition("=")[0]
    if name not in PRESETS:
        raise InputError(f"--model {args.model}: need one of the presets {', '.join(PRESETS)}, or PRESET=FOLDER: "
                         "retraining needs to know the base model and its settings")
    extra = given_flags(train_npo.build_parser(), args.train_flags.split())
    decided = {"loss", "split", "model", "data", "seed", "out", "resume", "lr", "beta", "eval_every", "retain_log",
               "template"}
    taken = decided & set(extra)
    if taken:
        raise InputError(f"--train-flags {args.train_flags}: --{min(taken).replace('_', '-')} is decided here; leave "
                         "it out")
    task = load_task(args.data, TUNING_SPLIT)
    empty = {"runs": [], "retrained": [], "failed": []}
    study = Study(args, task, PRESETS[name], name, extra, empty, {}, {}, read_choices(args), {})
    start = model_job(study, "full", 0)
    flags = {"base": args.base and Path(args.base).name, "retrained": args.retrained, **extra}
    identity = {"data_fingerprint": task.fingerprint, "epochs": args.epochs or PRESETS[name].epochs,
                "start": Path(start.folder).name if start else PRESETS[name].finetuned,
                "flags": {key: value for key, value in flags.items() if value is not None}}
    path = json_path(args)
    known = read_study(path) if path.exists() else {**empty, **identity}
    other = [key for key in identity if known.get(key) != identity[key]]
    if other:
        raise InputError(f"{path} was made with {other[0]} {known.get(other[0])}, not {identity[other[0]]}: give "
                         "another --out")
    dims = dims_of(study)
    known.update(data="builtin" if args.data == "builtin" else Path(args.data).name, model=name, failed=[],
                 parameters=parameters_of(dims),
                 budget={"split": TUNING_SPLIT, "seed": TUNING_SEED, "learning_rates": list(learning_rates(study)),
                         "betas": {m: list(betas(study, m)) for m in METHODS if m.split("+")[0] in WITH_BETA},
                         "weights": list(TUNED_WEIGHTS), "retain_weights": list(RETAIN_WEIGHTS)},
                 provenance=provenance(args), choices_from=Path(args.choices).name if args.choices else None)
    return find_runs(study._replace(known=known))


def provenance(args) -> dict:
    """`environment`, without this machine's folders."""
    found = environment()
    command = [Path(word).name if "/" in word else word for word in found["command"].split()]
    return {**found, "command": " ".join("TOFU_DIR" if args.data != "builtin" and word == Path(args.data).name else word
                                         for word in command)}


def read_study(path: Path) -> dict:
    """A distilled JSON. Raises InputError."""
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no {path} yet: run without --draw-only first") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; move it away") from None
    lacking = {"runs", "retrained", "failed", "chosen", "tried", "budget", "provenance", "epochs", "model"} - set(
        study if isinstance(study, dict) else ())
    if lacking:
        raise InputError(f"{path} lacks {', '.join(sorted(lacking))}: it is not one of this command's; move it away")
    return study


def read_choices(args) -> dict:
    """What --choices takes the place of tuning with: method -> {"lr", "beta", "weights"}. Raises InputError where
    something that the wanted figures need was not chosen there."""
    if not args.choices:
        return {}
    other = read_study(Path(args.choices))
    if other["model"] != args.model.partition("=")[0]:
        raise InputError(f"--choices {args.choices}: made with --model {other['model']}, whose learning rates are no "
                         "other model's")
    for figure in wanted_figures(args):
        splits, methods = wanted_of(args, figure)
        for method in methods:
            choice = other["chosen"].get(method)
            if not choice:
                raise InputError(f"--choices {args.choices}: nothing was chosen for {method}; name the --methods that "
                                 f"it has ({', '.join(other['chosen'])})")
            lacking = [s for s in splits if s not in choice["weights"]]
            if figure == "9" and lacking and "+rt" in method:
                raise InputError(f"--choices {args.choices}: no retain weight was chosen for {method} on {lacking[0]}; "
                                 "run --figure 9 there first")
    return other["chosen"]


def run_missing(study: Study) -> Study:
    """Pass after pass: what is known decides what is planned, until nothing is missing."""
    args, workers, begin = study.args, None, time.perf_counter()
    done, todo = set(), []

    def left(study: Study) -> str:
        return clock(sum(reckon(study, job) for job in todo if job.key not in done) / rate(study)[0] / args.jobs)

    def progress(study: Study, job: Job, text: str, seconds: float):
        done.add(job.key)
        print(f"[{sum(j.key in done for j in todo)} of {len(todo)}; {clock(time.perf_counter() - begin)}, about "
              f"{left(study)} left] {job.name}: {text} ({clock(seconds)})", flush=True)

    stopped = True
    try:
        while True:
            jobs = plan(study, wanted_figures(args))
            study = record_finished(study, jobs)
            jobs = plan(study, wanted_figures(args))
            todo = missing(study, jobs)
            ready = [job for job in todo if job.given]
            if not ready:
                break
            print(f"{len(ready)} runs to make now, {len(todo) - len(ready)} after them; about {left(study)}; what they "
                  f"print is in {args.runs}/worker*.log", flush=True)
            workers = workers or Workers(min(args.jobs, len(ready)), args.processes, args.runs)
            study = find_runs(execute(study, ready, workers, progress))
        stopped = False
    except KeyboardInterrupt:
        print("stopping: each run finishes its step and is saved; the same command goes on", flush=True)
        raise
    finally:
        if workers:
            workers.close(at_once=stopped)
    return study


def record_finished(study: Study, jobs: list) -> Study:
    """Finished folders whose record is not in the JSON: runs that ended while nobody looked, and models of other
    commands."""
    known = {r["key"] for r in study.known["runs"] + study.known["retrained"]}
    for job in jobs:
        for model in job.needs:
            if model.key not in known and is_model_there(model):
                study = keep(study, record(study, model, Path(model.folder), None))
                known.add(model.key)
        if job.given and job.key in study.finished and job.key not in known:
            study = keep(study, record(study, job, Path(study.finished[job.key]), None))
            known.add(job.key)
    return study


def print_choices(known: dict):
    print(f"{'method':12}{'lr':>9}{'beta':>7}{'score':>8}   retain weight of Figure 9")
    for method, c in known["chosen"].items():
        print(f"{method:12}{c['lr']:9g}{c['beta']:7g}{c['score']:8.3f}   "
              + ", ".join(f"{split} {weight:g}" for split, weight in c["weights"].items()))


def draw(args):
    """Pictures of this study, and the page over all studies in OUT/tofu."""
    path = json_path(args)
    drawn = tofu_pictures.draw(read_study(path), wanted_figures(args), path.with_suffix(""))
    studies = {p.stem: read_study(p) for p in sorted(path.parent.glob("*.json"))}
    page = Path(args.out) / "tofu.md"
    page.write_text(tofu_verdicts.page(studies, path.parent), encoding="utf-8")
    for verdict in tofu_verdicts.verdicts(studies[path.stem]):
        print(tofu_verdicts.line(verdict))
    print(f"drawn: {', '.join(map(str, drawn)) or 'nothing, for lack of runs'}; {page}")


def main():
    args = build_parser().parse_args()
    if args.draw_only:
        return draw(args)
    for split in args.splits or ():
        if not any(split in splits for splits, _ in FIGURES.values()):
            raise InputError(f"--splits {split}: no figure has it; need some of forget01, 05, 10, 20, 30, 50, 90")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.jobs = args.jobs or (cores if args.model.partition("=")[0] == "tiny" else 1)
    if args.plan:
        study = open_study(args)
        return print_plan(study, plan(study, wanted_figures(args)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # saved like Ctrl-C
    with locked(json_path(args).with_suffix(".lock")):  # two commands would overwrite each other's records
        study = run_missing(open_study(args))
        write_json(json_path(args), complete(study))
    print_choices(complete(study))
    for failure in study.known["failed"]:
        print(f"not made: {failure['name']}: {failure['why']}")
    draw(args)


if __name__ == "__main__":
    run_command(main, "figures_tofu.py")
