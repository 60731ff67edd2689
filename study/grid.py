"""What the figures need: training runs as jobs, and hyper-parameters as the finished ones choose them.

One budget for every method, on TUNING_SPLIT and on TUNING_SEED, which is not among the reported seeds 1 to N:
every learning rate of LR_FACTORS times the preset's, then, at the best, the further betas; where the best
stands at an end, one more beyond it. What is chosen holds for every split; Figure 9 tunes its retain weight
on the same seed.
"""

import math
from argparse import Namespace
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from data.tofu import Task, complement, slice_rows
from study.verdicts import kept_utility
from support.errors import InputError
from support.files import fingerprint

METHODS = ("ga", "ga+rt", "ga+kl", "idk+rt", "dpo", "dpo+rt", "dpo+kl", "kto", "kto+rt", "npo", "npo+rt",
           "npo+kl", "simnpo", "simnpo+rt")
NEWER = ("wga+rt", "satimp+rt", "tnpo+rt", "ceu+rt", "undial+rt")  # docs/beyond.md
SMALL, LARGE = ("forget01", "forget05", "forget10"), ("forget20", "forget30")
LARGEST = ("forget50", "forget90")  # as in the paper, with retain weights of their own
FIGURES = {  # name -> (splits, methods)
    "overview": (("forget10",), ("ga", "ga+rt", "idk+rt", "npo", "npo+rt")),  # README's
    "2": (("forget05",), ("ga", "ga+rt", "npo", "npo+rt")),
    "5": (SMALL, METHODS),
    "6": (SMALL, METHODS),
    "7": (("forget10",), METHODS),
    "8": (("forget10",), METHODS),
    "9": (LARGEST, ("ga", "ga+rt", "npo", "npo+rt", "dpo+rt")),
    "retain-weight": (("forget10",), ("npo+rt",)),
    "beyond10": (LARGE, ("npo", "npo+rt", "ga+rt", "dpo+rt", "idk+rt")),
    "objectives": (("forget10",), (*(m for m in METHODS if m.endswith("+rt")), *NEWER)),
}
TUNING_SEED, TUNING_SPLIT = 0, "forget10"
LR_FACTORS = (0.1875, 0.375, 0.75, 1.5, 3.0)  # of the preset's lr, which lies between
BETA_FACTORS = (1.0, 0.5, 2.0)  # of the preset's beta, or the published; the first while lr is chosen
SIMNPO_BETA = 2.5  # in its place: its log-probability is a mean over tokens (Fan et al., 2024)
RETAIN_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 5.0)
TUNED_WEIGHTS = (1.0, 2.0, 5.0)  # retain weights that Figure 9 chooses from, on TUNING_SEED
EVALUATE_EPOCHS = 2  # epochs between evaluations; forget01, whose steps are few, every STEP_SPLIT_EVERY steps
STEP_SPLIT, STEP_SPLIT_EVERY = "forget01", 2
RUNS = "runs/tofu"  # the folder of unlearning runs
# What identifies a run, besides data, start and retrained model. Micro-batch and device change no number.
SIGNIFICANT = ("loss", "split", "forget_weight", "retain_weight", "kl_weight", "kl_direction", "beta",
               "gamma", "epochs", "batch_size", "lr", "weight_decay", "warmup_epochs", "max_grad_norm",
               "seed", "dtype", "eval_every", "retain_pairing")


@dataclass(eq=False)  # equal to itself alone, so that what depends on it can be cached
class Study:
    """What a command fixes before it knows of any run, and what is known so far."""
    args: Namespace
    task: Task  # of TUNING_SPLIT
    preset_name: str
    preset: object  # models' Preset
    known: dict  # the distilled JSON


class Job(NamedTuple):
    """A training run: settings as train_npo.py's flags, and the models that must be there first."""
    given: dict | None  # None: it waits for a choice of hyper-parameters that can't be made yet
    key: str  # of its settings, data, start and retrained model
    folder: str
    needs: tuple  # of Jobs; none for a model
    facts: dict  # what its record says of it

    @property
    def name(self) -> str:
        """Its folder's, and its log's."""
        return Path(self.folder).name

    @property
    def is_over(self) -> bool:
        """Its result is in its folder, whoever made it."""
        return (Path(self.folder) / "model").is_dir()


# What needs PyTorch is imported in functions, since drawing does without.

def run_key(settings: dict, data_fingerprint: str, start: str, retrained: str) -> str:
    """16 hex digits that say which run it is: equal ones would end with equal weights and evaluations."""
    told = {k: settings[k] for k in SIGNIFICANT}
    if not has_beta(settings["loss"]):
        told["beta"] = 0.1  # whatever the preset has: it changes nothing
    return fingerprint(told, data_fingerprint, start, retrained)


@cache
def model_job(study: Study, split: str, seed: int) -> Job | None:
    """Fine-tuning (split full) or retraining; None where the preset has a published fine-tuned model."""
    from running.settings import resolve, tiny_settings
    if split == "full" and study.preset.finetuned:
        return None
    data, task, name = study.args.data, study.task, study.preset_name
    given = {"loss": "sft", "split": split, "data": data, "seed": seed}
    if split == "full":  # a retrained model is evaluated at its end, which is fine-tuning's default
        given["eval_every"] = "never"
    if name == "tiny":  # kept where train_npo.py itself would look for it
        settings = tiny_settings(resolve({"data": data}), split, task, seed)
        folder = settings.out
    else:
        given["model"] = name if study.preset.finetuned else study.args.model
        settings = resolve(given)
        mark = run_key(vars(settings), task.fingerprint, settings.start, "")
        folder = f"runs/models/{name}-{split}-seed{seed}-{mark}"
    key = run_key(vars(settings), task.fingerprint, "", Path(folder).name)
    return Job(given, key, folder, (), {"kind": "model", "split": split, "seed": seed})


def start_model(study: Study) -> str:
    """`--model` of an unlearning run: the fine-tuned start."""
    start = model_job(study, "full", 0)
    return f"{study.preset_name}={start.folder}/model" if start else study.args.model


@cache
def defaults(study: Study) -> dict:
    """Every setting of an unlearning run as it is where its job says nothing else."""
    from running.settings import resolve
    epochs = study.args.epochs or study.preset.epochs
    return vars(resolve({"data": study.args.data, "epochs": epochs, "model": start_model(study)}))


def has_beta(method: str) -> bool:
    """Its loss takes one; for the others train_npo.py refuses it, and the preset's stands in the record."""
    from losses import OBJECTIVES
    return "beta" in OBJECTIVES[method.split("+")[0]].takes


def unlearn_job(study: Study, method: str, split: str, seed: int, hyper: dict) -> Job:
    """An unlearning run with `hyper` {"lr", "beta"}, and "retain_weight" where it isn't the method's own;
    without lr it waits for the choice of it."""
    args, base, (loss, *terms) = study.args, defaults(study), method.split("+")
    start, retrained = model_job(study, "full", 0), model_job(study, complement(split), seed)
    every = STEP_SPLIT_EVERY
    if split != STEP_SPLIT:
        every = math.ceil(EVALUATE_EPOCHS * len(slice_rows(study.task.full, split)) / base["batch_size"])
    given = {"loss": loss, "retain_weight": float("rt" in terms), "kl_weight": float("kl" in terms),
             "split": split, "seed": seed, "data": args.data, "epochs": base["epochs"],
             "eval_every": str(every), **{k: v for k, v in hyper.items() if k != "beta" or has_beta(method)}}
    s = {**base, **given}
    key = run_key(s, study.task.fingerprint, start.name if start else base["start"], retrained.name)
    name = loss + "+rt" * (s["retain_weight"] > 0) + "+kl" * (s["kl_weight"] > 0)
    told = ("lr", "beta", "forget_weight", "retain_weight", "kl_weight", "epochs")
    facts = {"kind": "unlearn", "method": name, "split": split, "seed": seed, **{k: s[k] for k in told},
             **hyper}
    given |= {"model": start_model(study), "retain_log": retrained.folder}
    return Job(given if "lr" in hyper else None, key, run_folder(facts, key),
               tuple(filter(None, (start, retrained))), facts)


def run_folder(facts: dict, key: str) -> str:
    """Where an unlearning run is: what its folder's name says is all that identifies it."""
    return f"{RUNS}/{facts['split']}_{facts['method']}_seed{facts['seed']}_{key[:8]}"


def plan(study: Study) -> list[Job]:
    """The unlearning runs that the wanted figures need, each once; without settings what waits for a
    choice. Raises InputError where there are none."""
    args, jobs = study.args, {}
    for figure in args.figure:
        splits = [split for split in FIGURES[figure][0] if split in args.splits]
        methods = [method for method in FIGURES[figure][1] if method in args.methods]
        for method in methods if splits else []:
            found, hyper = tuning(study, method)
            for split in splits:
                found += figure_jobs(study, figure, method, split, hyper or {})
            jobs = {job.key: job for job in found} | jobs
    if not jobs:
        raise InputError(f"--figure {' '.join(args.figure)} has none of these --splits with one of these "
                         "--methods: nothing to make")
    return list(jobs.values())


def tuning(study: Study, method: str) -> tuple[list[Job], dict | None]:
    """(A method's tuning runs, {"lr", "beta"} of the best): all learning rates at the first beta, the other
    betas at the best of these. None while they are not all there; with --choices preset its, and no runs."""
    from losses import OBJECTIVES
    preset, loss = study.preset, method.partition("+")[0]
    first = SIMNPO_BETA if loss == "simnpo" else OBJECTIVES[loss].defaults.get("beta", preset.beta)
    if study.args.choices:
        return [], {"lr": preset.lr, "beta": first}
    rates = [factor * preset.lr for factor in LR_FACTORS]
    betas = [factor * first for factor in (BETA_FACTORS if has_beta(method) else BETA_FACTORS[:1])]
    jobs, best = search_beyond(study, method, "lr", rates, {"beta": first})
    if not best:
        return jobs + search(study, method, TUNING_SPLIT, "beta", betas[1:], {})[0], None
    more, best = search_beyond(study, method, "beta", betas, {"lr": best["lr"]})
    return jobs + more, best and {k: best[k] for k in ("lr", "beta")}


def search_beyond(study: Study, method: str, name: str, values: list, others: dict) -> tuple:
    """`search` on TUNING_SPLIT; where the best of several stands at an end, one more beyond it."""
    jobs, best = search(study, method, TUNING_SPLIT, name, values, others)
    further = {min(values): min(values) / 2, max(values): 2 * max(values)}
    if len(values) > 1 and best and best[name] in further:
        return search(study, method, TUNING_SPLIT, name, [*values, further[best[name]]], others)
    return jobs, best


def search(study: Study, method: str, split: str, name: str, values: list, others: dict) -> tuple:
    """(A run on TUNING_SEED for each value of a setting, the record with the highest score); None for that
    while a run that has not failed is still to be made."""
    jobs = [unlearn_job(study, method, split, TUNING_SEED, {**others, name: value}) for value in values]
    records, failed = {r["key"]: r for r in study.known["runs"]}, {f["key"] for f in study.known["failed"]}
    if any(job.key not in records.keys() | failed for job in jobs):
        return jobs, None
    return jobs, max((records[job.key] for job in jobs if job.key in records), key=score, default=None)


def tuned_weight(study: Study, method: str, split: str, hyper: dict) -> tuple[list[Job], float | None]:
    """(The tuning runs of Figure 9's retain weight, the best), None while these are not all there; a method
    without a retain term has none to choose."""
    if "+rt" not in method:
        return [], 0.0
    jobs, best = search(study, method, split, "retain_weight", TUNED_WEIGHTS, hyper)
    return jobs, best and best["retain_weight"]


def figure_jobs(study: Study, figure: str, method: str, split: str, hyper: dict) -> list[Job]:
    """The runs of one method on one split for one figure, on the reported seeds."""
    jobs, settings = [], [hyper]
    if figure == "retain-weight":
        settings = [{**hyper, "retain_weight": weight} for weight in RETAIN_WEIGHTS]
    if figure == "9":
        jobs, weight = tuned_weight(study, method, split, hyper)
        settings = [{} if weight is None else {**hyper, "retain_weight": weight}]
    return jobs + [unlearn_job(study, method, split, seed, one) for one in settings
                   for seed in range(1, study.args.seeds + 1)]


def score(run: dict) -> float:
    """The largest, over evaluations, of the smaller of 1 - D/D_start and U/U_start: 1 where a model is as the
    retrained one and as useful as the start. D is the Kolmogorov-Smirnov statistic against the retrained
    model (linear where the p-value runs over a hundred decades), U the model utility."""
    distance = run["ks_statistic"]
    return max(min(1 - d / distance[0], kept_utility(run, i)) for i, d in enumerate(distance[1:], 1))


def chosen(study: Study) -> dict:
    """What was chosen for each method, and its weights of Figure 9: {"lr", "beta", "weights"}."""
    choices, (splits, methods) = {}, FIGURES["9"]
    for method in (*METHODS, *NEWER):
        if hyper := tuning(study, method)[1]:
            weights = {s: tuned_weight(study, method, s, hyper)[1] for s in splits if method in methods}
            choices[method] = {**hyper, "weights": {s: w for s, w in weights.items() if w is not None}}
    return choices
