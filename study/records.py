"""What is there, and what is kept of it: a finished run in three kilobytes, the JSON of all of them. All runs
of a split and a seed began from the same weights, so methods are always compared on one start."""

import json
import math
import statistics
from argparse import Namespace
from functools import cache
from itertools import combinations
from pathlib import Path

from scipy.stats import ks_2samp

from data.tofu import evaluation_split, load_task
from evaluation.logs import MIA, SHARPER, log_truth_ratio
from study import grid
from study.answers import kind, pairs_of, statistics_of
from study.grid import Job, Study
from support.errors import InputError, refuse
from support.files import write_json
from support.provenance import environment, without_folders

CURVES = ("forget_quality_log10", "ks_statistic", "model_utility", "forget_truth_ratio", "forget_kl",
          "world_facts_kl", "privleak")
ORDER = ("split", "method", "lr", "beta", "forget_weight", "retain_weight", "seed", "key")
SAMPLED_SETS = ("forget", "retain", "world_facts")
SAMPLED_ROW = 7  # of each of these sets, for Figure 7
TEXT = 160  # characters of a sampled text that are kept
COLLECTED = ("method", "split", "seed", "lr", "beta", "forget_weight", "retain_weight", "kl_weight", "epochs",
             "data", "model", "batch_size", "warmup_epochs", "weight_decay", "template", "kl_direction",
             "gamma", "beta2", "own_settings", "retain_pairing", "max_grad_norm", "dtype", "lora")


def json_path(args: Namespace) -> Path:
    """OUT/tofu/DATA_MODEL.json, with `--choices preset` DATA_MODEL_preset.json."""
    names = [Path(text).name for text in (args.data, args.model.partition("=")[0])]
    names += ["preset"] * bool(args.choices)
    plain = ["".join(c if c.isalnum() or c in "-." else "-" for c in name) for name in names]
    return Path(args.out) / "tofu" / f"{'_'.join(plain)}.json"


NEEDED = {"runs", "retrained", "failed", "chosen", "budget", "provenance", "epochs", "model", "choices_from"}


def read_study(path: Path, needed: set = NEEDED) -> dict:
    """A distilled JSON. Raises InputError."""
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; run without --draw-only, or move it away") from None
    lacking = needed - set(study if isinstance(study, dict) else ())
    if lacking:
        raise InputError(f"{path} lacks {', '.join(sorted(lacking))}: it is not one of this command's; "
                         "move it away")
    return study


def open_study(args: Namespace) -> Study:
    """The study with its JSON, or a new one. Raises InputError, also for a JSON of other data."""
    from models.presets import PRESETS
    from running.memory_plan import read_shape
    name, _, folder = args.model.partition("=")
    refuse({f"--model {args.model}: need one of the presets {', '.join(PRESETS)}, or PRESET=FOLDER: "
            "retraining needs to know the base model and its settings": name not in PRESETS,
            f"--model {args.model}: the study makes its tiny models itself; leave {folder} out":
                name == "tiny" and folder})
    task, preset = load_task(args.data, grid.TUNING_SPLIT), PRESETS[name]
    shape = read_shape(Namespace(preset=name, start=folder, model=args.model), task.full)
    study = Study(args, task, name, preset, {})
    start, path = grid.model_job(study, "full", 0), json_path(args)
    identity = {"data_fingerprint": task.fingerprint, "epochs": args.epochs or preset.epochs,
                "start": start.name if start else Path(folder).name or preset.finetuned}
    known = read_study(path) if path.exists() else {"runs": [], "retrained": [], "failed": [], **identity}
    for key, value in identity.items():
        if known.get(key) != value:
            raise InputError(f"{path} was made with {key} {known.get(key)}, not {value}: give another --out")
    budget = {"split": grid.TUNING_SPLIT, "seed": grid.TUNING_SEED, "retain_weights": grid.RETAIN_WEIGHTS}
    made = environment()
    made["command"] = without_folders(made["command"])
    study.known = {**known, "data": Path(args.data).name, "model": name, "parameters": shape.parameters,
                   "budget": budget, "provenance": made, "choices_from": args.choices}
    planned = {one.key for job in grid.plan(study) for one in (*job.needs, job)}  # these are tried again
    study.known["failed"] = [failure for failure in known["failed"] if failure["key"] not in planned]
    return study


def missing(study: Study, jobs: list) -> list[Job]:
    """Runs without a record whose models have not failed; before them the models that they need and that are
    not in their folders, or have no record."""
    failed = {f["key"] for f in study.known["failed"]}
    recorded = {r["key"] for r in study.known["runs"] + study.known["retrained"]}
    open_jobs = [job for job in jobs if job.key not in recorded | failed
                 and not any(need.key in failed for need in job.needs)]
    models = {need.key: need for job in open_jobs for need in job.needs
              if need.key not in recorded or not need.is_over}
    return list(models.values()) + open_jobs


def record(folder: Path, facts: dict, data: str) -> dict:
    """A finished run: `facts`, the curves of its metrics, counts of its last answers; of one that only serves
    the choice of settings no more than `grid.score` and the page need."""
    files = sorted((folder / "eval").glob("step_*.json"))
    evaluations = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {**facts, "commit": config["commit"], "start_weights": config["start_weights"],
            "memory": max(line["memory"] for line in log)}
    if not evaluations:
        return kept

    def curve(key: str, part: str = "") -> list:
        """A metric, or that of a part of them, over the evaluations; None where it wasn't measured."""
        metrics = [e["metrics"].get(part, {}) if part else e["metrics"] for e in evaluations]
        return [short(some.get(key)) for some in metrics]

    steps = {"steps": [e["provenance"]["step"] for e in evaluations], "total_steps": log[-1]["step"]}
    if "key" in facts and facts["kind"] == "unlearn" and facts["seed"] == grid.TUNING_SEED:
        return kept | steps | {key: curve(key) for key in CURVES[:3]}
    judged = evaluation_split(facts["split"])
    kept["answers"], samples = answers_of(data, judged, evaluations[-1]["rows"])
    if "key" not in facts or facts["seed"] == 1 and judged == grid.TUNING_SPLIT:  # a single run has no key
        kept["samples"] = samples
    kept |= {f"forget_{key}": curve(key, "forget") for key in SHARPER}
    kept["mia"] = {key: curve(key, "mia") for key in MIA}
    ratios = [[log_truth_ratio(row) for row in e["rows"]["forget"]] for e in evaluations]
    if facts["kind"] == "model":
        return kept | {"model_utility": curve("model_utility")[-1],
                       "log_truth_ratios": [round(ratio, 4) for ratio in ratios[-1]]}
    if "key" in facts and "samples" in kept and facts["method"] == "npo+rt":
        kept["answers_start"], kept["samples_start"] = answers_of(data, judged, evaluations[0]["rows"])
    # The last two are what the Kolmogorov-Smirnov test sees, in two numbers.
    return kept | steps | {key: curve(key) for key in CURVES} | {
        "forget_probability": curve("probability", "forget"),
        "retain_probability": curve("probability", "retain"),
        "log_truth_ratio_mean": [short(statistics.mean(some)) for some in ratios],
        "log_truth_ratio_sd": [short(statistics.pstdev(some)) for some in ratios]}


def attacked(path: Path) -> dict:
    """What a robustness.json found, of the unlearned, the retrained and the start model: {name: {state:
    extraction strength in it, "leak": {k: leak@k}, "halfway": {rows: steps}}}."""
    found = {}
    for entries in json.loads(path.read_text(encoding="utf-8"))["attacks"].values():
        for name, entry in entries.items():
            model = found.setdefault(name, {})
            for state in entry["states"]:  # of a curve the last one stays
                if "leak" in state:
                    model["leak"] = {k: short(leak) for k, leak in state["leak"].items()}
                elif "extraction_strength" in state:
                    model[state["what"]] = short(state["extraction_strength"])
            if "halfway" in entry:
                model["halfway"] = {k: short(steps) for k, steps in entry["halfway"]["steps"].items()}
    return found


def take_attacks(study: Study):
    """Into the records of its runs, what `robustness_tofu.py --out FOLDER/robustness` found of them."""
    for run in study.known["runs"]:
        path = Path(grid.run_folder(run, run["key"])) / "robustness" / "robustness.json"
        if path.is_file():
            run["attacks"] = attacked(path)


def short(number: float | None) -> float | None:
    """Five digits: what a figure can show, and a verdict rest on."""
    return None if number is None else float(f"{number:.5g}")


@cache
def texts_of(data: str, split: str) -> tuple:
    """(evaluated rows, word pairs of answers, of refusals) of a forget split."""
    task = load_task(data, split)
    return (task.evaluated, pairs_of([row["answer"] for row in task.full + task.facts()]),
            pairs_of(task.refusals))


def answers_of(data: str, split: str, rows: dict) -> tuple[dict, list]:
    """(`statistics_of` the generations of each set but the holdout, which is not asked; of one question a set
    {"set", "question", "answer", "generation", "kind"})."""
    (evaluated, *pairs), counts, samples = texts_of(data, split), {}, []
    for name, asked in evaluated.items():
        answered = rows[name]
        counts[name] = statistics_of([row["generation"] for row in answered], asked[:len(answered)], *pairs)
        if name in SAMPLED_SETS:
            row = answered[place := min(SAMPLED_ROW, len(answered) - 1)]
            samples.append({"set": name, **{k: row[k][:TEXT] for k in ("question", "answer", "generation")},
                            "kind": kind(row["generation"], asked[place], *pairs)})
    return counts, samples


def differing(runs: list) -> list[str]:
    """The settings in which single runs differ, beside method, data and start."""
    keys = [key for key in COLLECTED if key not in ("method", "data", "model")]
    return [key for key in keys if len({run.get(key) for run in runs}) > 1]


def collected(folder: Path) -> dict:
    """The record of a single run, known by its settings alone. Raises InputError."""
    if not ((folder / "model").is_dir() and (folder / "log.jsonl").is_file()):
        raise InputError(f"{folder} is no finished run: need a run folder with log.jsonl and model/ in it")
    from losses import OBJECTIVES
    from running.settings import read_config
    config = read_config(folder)
    settings, data = config["settings"], config["settings"]["data"]
    if settings.get("forget"):
        raise InputError(f"{folder} unlearned rows of its own: only runs on TOFU's sets are collected")
    facts = {"kind": "model" if settings["loss"] == "sft" else "unlearn",
             "command": without_folders(config["command"]),
             **{k: settings.get(k) for k in COLLECTED}, "data": Path(data).name}
    if settings["loss"] not in OBJECTIVES:
        raise InputError(f"{folder}: its --loss {settings['loss']} is not in losses.OBJECTIVES; add it")
    own = [name for name in OBJECTIVES[settings["loss"]].settings if name not in COLLECTED]
    facts["own_settings"] = ", ".join(f"{name} {settings.get(name)}" for name in own)
    found = record(folder, facts, data)
    quality, utility = found.get("forget_quality_log10", []), found.get("model_utility", [])
    if facts["kind"] == "unlearn" and (len(quality) < 2 or None in quality + utility):
        raise InputError(f"{folder}: need two or more evaluations with forget quality and model utility, so "
                         "--retain-log and TOFU's sets")
    return found


def keep(study: Study, kept: dict):
    """Write one more record to the study's JSON. Raises InputError for a run from another start than the
    others of its split: one name's weights differ from machine to machine, in rounding."""
    known, place = study.known, "retrained" if kept["kind"] == "model" else "runs"
    began = {r["start_weights"] for r in known["runs"] if r["split"] == kept["split"]}
    if began - {kept["start_weights"]}:
        raise InputError(f"{json_path(study.args)} has runs of {kept['split']} that began "
                         f"from weights {min(began)}, and these begin from {kept['start_weights']}: "
                         "they can't be compared; bring that start's folder, or give another --out")
    others = [r for r in known[place] if r["key"] != kept["key"]]
    known[place] = sorted([*others, kept], key=lambda r: [str(r.get(k, "")) for k in ORDER])
    write_json(json_path(study.args), complete(study))


def complete(study: Study) -> dict:
    """The JSON's content: the records, what follows from them, and where they come from."""
    samples = {}  # forget split -> seed -> log R of its retrained model
    for model in study.known["retrained"]:
        if "log_truth_ratios" in model and model["split"] != "full":  # a start may have been evaluated, too
            by_seed = samples.setdefault(evaluation_split(model["split"]), {})
            by_seed[model["seed"]] = model["log_truth_ratios"]
    rows = {split: len(next(iter(by_seed.values()))) for split, by_seed in samples.items()}
    return {**study.known, "chosen": grid.chosen(study), "forget_rows": rows,
            "ceilings": {split: ceilings(by_seed) for split, by_seed in samples.items()}}


def ceilings(log_ratios: dict) -> list:
    """log10 forget quality of pairs of retrained models: what perfect unlearning would score. The test is
    exact, for the rows of TOFU, whose p-values are all above 1e-308."""
    tests = {pair: ks_2samp(*map(log_ratios.get, pair), method="exact")
             for pair in combinations(sorted(log_ratios), 2)}
    return [{"seeds": list(pair), "log10": round(math.log10(test.pvalue), 4)} for pair, test in tests.items()]
