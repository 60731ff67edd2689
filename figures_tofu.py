"""Section 5: plan the runs of a figure, make those that are missing, draw, and judge the paper's claims.

    python figures_tofu.py --figure 8 --out runs/my --plan     # the runs of Figure 8, as command lines
    python figures_tofu.py --figure 8 --out runs/my --seeds 2  # make them two at a time, draw, judge
    python figures_tofu.py --draw-only                         # pictures and results/tofu.md from stored JSON
    python figures_tofu.py --collect runs/NAME .. --out FILE.json   # single runs: records, table, picture

A run is missing if OUT/tofu/STUDY.json has no record of it and runs/tofu/STUDY/ has no finished run. Records
are added to that file and never removed. Seeds vary unlearning and retraining; all runs have one start.
In `study/`, `pictures.py` lists the figures, `verdicts.py` the claims, `records.py` what is kept of a run.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import product
from pathlib import Path

from common import ROOT, InputError, Parser, environment, positive, run_command, write_json
from data.tofu import complement, load_task, slice_rows
from study.pages import page, single_runs_page
from study.pictures import (FIGURES, METHODS, SMALL, WITH_RT, columns_of, columns_of_single, draw_evolution,
                            has_beta, picture_of)
from study.records import attacks, record
from study.verdicts import settings_of, verdicts

RESULTS = ("start", "model", "model", "robustness.png")  # of a wave's runs: done if the folder has it


# ---------------------------------------------------------------- a figure's runs

def name_of(run: dict) -> str:
    """What identifies an unlearning run in a study, and names its folder."""
    return "{split}_{method}_weight{retain_weight:g}_lr{lr:g}_beta{beta:g}_seed{seed}".format_map(run)


def evaluated(split: str, rows: int) -> str:
    """The steps that are evaluated: every second epoch, and of the small splits, which change most within the
    first two epochs, every fifth step until then."""
    pair = math.ceil(2 * rows / 32)
    early = [*range(5, pair, 5)] if split in SMALL else []
    return ",".join(map(str, early + [*range(pair, 5 * pair, pair)]))


def plan(args, study: dict, folder: Path) -> list[dict]:
    """Four waves, folder -> command, each needing those before: start, retraining, unlearning, attacks."""
    recorded, waves = {name_of(run): run for run in study["runs"]}, [{}, {}, {}, {}]
    full, base, start = load_task(args.data, "full").retain, "tiny", "tiny"
    if args.data != "builtin":  # its tiny model does not ship
        base, start = f"tiny={folder}/tiny/untrained", f"tiny={folder}/tiny/start"
        waves[0][folder / "tiny"] = ["data/make_tiny.py", "--data", args.data, "--out", folder, "--only",
                                     "untrained", "start"]
    runs = [(figure, settings | {"seed": seed}) for figure in args.figure
            for split, name, seed in product(*FIGURES[figure][1:3], range(1, args.seeds + 1))
            if name.split("@")[0] in args.methods and (settings := settings_of(study, split, name))]
    for figure, run in runs:
        if (name := name_of(run)) in recorded and (figure != "attacks" or "attacks" in recorded[name]):
            continue
        split, (loss, _, term) = run["split"], run["method"].partition("+")
        retrained, unlearned = folder / f"{complement(split)}_seed{run['seed']}", folder / name
        flags = ["--data", args.data, "--seed", run["seed"]]
        waves[1][retrained] = ["train_npo.py", "--loss", "sft", "--split", complement(split), "--model", base,
                               *flags, "--out", retrained]
        beta = ["--beta", run["beta"]] if has_beta(loss) else []
        waves[2][unlearned] = [
            "train_npo.py", "--loss", loss, "--split", split, "--retain-weight", run["retain_weight"],
            "--kl-weight", int(term == "kl"), "--lr", run["lr"], *beta, "--model", start, *flags,
            "--eval-every", evaluated(split, len(slice_rows(full, split))),
            "--retain-log", f"{retrained}/eval/*.json", "--out", unlearned]
        if figure == "attacks":
            waves[3][unlearned / "robustness"] = [
                "robustness_tofu.py", "--model", unlearned / "model", "--start", start, "--retrained",
                retrained / "model", "--data", args.data, "--out", unlearned / "robustness"]
    return waves


def make(folder: Path, command: list) -> str:
    """Make a run, or resume it. Returns its log's last line if it fails, else an empty text."""
    script, *flags = map(str, command)
    if script == "train_npo.py" and folder.exists():
        flags = ["--resume", str(folder)]
    flags = [path for flag in flags for path in (glob(flag) if "*" in flag else [flag])]
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        status = subprocess.run([sys.executable, ROOT / script, *flags], stdout=file, stderr=file,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    print(f"{folder}: {'failed' if status else 'done'}", flush=True)
    if status:
        return f"{log}: {(log.read_text(errors='replace').strip() or 'empty').splitlines()[-1]}"
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a hundred runs would fill the disk
    (folder / "reference.safetensors").unlink(missing_ok=True)
    return ""


# ---------------------------------------------------------------- records, pictures, verdicts

def add_records(study: dict, waves: list[dict]):
    """Add the records of finished runs that the study lacks."""
    _, trained, unlearned, attacked = ([folder for folder in wave if (folder / result).exists()]
                                       for wave, result in zip(waves, RESULTS, strict=True))
    models = [(model["split"], model["seed"]) for model in study["retrained"]]
    study["retrained"] += [m for m in map(record, trained) if (m["split"], m["seed"]) not in models]
    names, finished = set(map(name_of, study["runs"])), list(map(record, unlearned))
    starts = {run["start_weights"] for run in study["runs"] + finished}  # of runs that the study has, too
    study["runs"] += [run for run in finished if name_of(run) not in names]
    if len(starts) > 1:
        raise InputError(f"stored and new runs began at different weights ({' and '.join(starts)}): they "
                         "cannot be compared; give another --out")
    for run, folder in product(study["runs"], attacked):
        if folder.parent.name == name_of(run):
            run["attacks"] = attacks(folder / "robustness.json")


def collect(folders: list, path: Path):
    """Records of single runs in one JSON; a table and a picture of what it holds."""
    if folders:
        models, runs = ([entry for entry in map(record, folders) if (entry["method"] == "sft") is is_model]
                        for is_model in (True, False))
        for split, named in columns_of_single(runs).items():
            for name, seeds in named.items():
                if len({tuple(run["steps"]) for run in seeds}) > 1:
                    raise InputError(f"the seeds of {name} on {split} were evaluated at different steps: "
                                     "give all of them the same --eval-every")
        write_json(path, {"runs": runs, "retrained": models, "provenance": environment()})
    study = json.loads(path.read_text(encoding="utf-8"))
    path.with_suffix(".md").write_text(single_runs_page(study), encoding="utf-8")
    if len(columns := columns_of_single(study["runs"])) == 1:  # more splits are a table
        draw_evolution(study, path.with_suffix(".png"), columns)


def draw(out: Path, stems: list, figures: list):
    """Pictures and verdicts of these studies, and the page over all studies in OUT/tofu."""
    studies = {path.stem: json.loads(path.read_bytes()) for path in sorted((out / "tofu").glob("*.json"))}
    if not studies.keys() & set(stems):
        raise InputError(f"{out}/tofu has no such study: check --out, --figure and --methods")
    for stem in stems:
        for figure in figures:
            if (columns := columns_of(studies[stem], figure)) and FIGURES[figure][3]:
                print(FIGURES[figure][3](studies[stem], picture_of(out / "tofu" / stem, figure), columns))
        print(f"\n{stem}", *(f"{v['claim']}: {v['words']}" for v in verdicts(studies[stem])), sep="\n")
    (out / "tofu.md").write_text(page(studies), encoding="utf-8")


def build_parser() -> Parser:
    parser, methods = Parser(__doc__), list(dict.fromkeys(METHODS + WITH_RT))
    add = parser.add_argument
    add("--figure", nargs="+", choices=FIGURES, metavar="FIGURE",
        help=f"{', '.join(FIGURES)} (default: overview; with --draw-only all)")
    add("--seeds", type=positive(int), default=5, help="unlearning seeds 1 to N (default: 5)")
    add("--choices", choices=("preset", "tuned"), default="preset",
        help="lr and beta of the preset for all methods (default), or tuned for each method")
    add("--data", default="builtin", help="builtin, a folder with TOFU's files, or a Hub id")
    add("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD",
        help="only these methods of the study; runs of another method: --collect")
    add("--plan", action="store_true", help="print the command lines of missing runs")
    add("--draw-only", action="store_true", help="draw and judge what is stored")
    add("--collect", nargs="+", type=Path, metavar="FOLDER", help="finished runs; their records go to --out")
    add("--out", type=Path, default=Path("results"), help="folder (default: results), or FILE.json")
    return parser


def main(argv: list | None = None):
    args = build_parser().parse_args(argv)
    if args.collect or args.out.suffix == ".json":
        if args.out.suffix != ".json" or not (args.collect or args.out.exists()):
            raise InputError("--collect FOLDER .. needs --out FILE.json, and a new file needs --collect")
        return collect(args.collect, args.out)
    if args.draw_only:
        stems = [path.stem for path in sorted((args.out / "tofu").glob("*.json"))]
        return draw(args.out, stems, args.figure or list(FIGURES))
    args.figure, kind = args.figure or ["overview"], "_preset" * (args.choices == "preset")
    stem = f"{Path(args.data).name}_tiny{kind}"
    path, folder = args.out / "tofu" / f"{stem}.json", Path("runs", "tofu", stem)
    chosen = json.loads((ROOT / "results" / "tofu" / f"builtin_tiny{kind}.json").read_bytes())["chosen"]
    study = {"runs": [], "retrained": [], "data": Path(args.data).name, "model": "tiny", "chosen": chosen,
             "choices_from": "preset" if kind else None}
    if path.exists():
        study |= json.loads(path.read_text(encoding="utf-8"))
    waves = plan(args, study, folder)
    missing = [[(folder, command) for folder, command in wave.items() if not (folder / result).exists()]
               for wave, result in zip(waves, RESULTS, strict=True)]
    if args.plan:
        commands = ["python " + " ".join(map(str, command)) for wave in missing for _, command in wave]
        return print("\n".join(commands) or f"{path} has all these runs")
    failures = []
    for wave in missing:
        with ThreadPoolExecutor(2) as pool:
            failures += filter(None, pool.map(lambda run: make(*run), wave))
    if any(waves):
        add_records(study, waves)
        weights = (folder if args.data != "builtin" else ROOT / "data") / "tiny" / "start"
        size = sum(file.stat().st_size for file in weights.glob("*.safetensors"))
        study["parameters"] = size // 4  # float32
        write_json(path, study | {"provenance": environment()})
    draw(args.out, [stem], args.figure)
    if failures:
        raise InputError(f"{len(failures)} runs failed: {'; '.join(failures)}")


if __name__ == "__main__":
    run_command(main)
