"""Section 5 whole: plan the runs of a figure, run what is missing, distil them into one small JSON, draw,
judge.

    python figures_tofu.py                       # built-in data, the tiny model, everything: see --plan first
    python figures_tofu.py --figure 5 --seeds 2 --data TOFU_DIR --methods ga ga+rt npo npo+rt
    python figures_tofu.py --draw-only           # from the JSON alone: no model, no run folder
    python figures_tofu.py --collect runs/NAME --out FILE.json    # single runs: records, table, picture

    --figure 2               forget05: ga and npo, with and without rt, over steps, and answers
    --figure 5               forget01, 05, 10: forget quality against model utility at each method's peak
    --figure 6               the same runs over steps
    --figure 7               answers to one question of three sets, every method
    --figure 8               divergence from the start on forget10
    --figure 9               forget50 and forget90 with tuned weights
    --figure retain-weight   npo+rt on forget10, retain weights 0 to 5
    --figure beyond10        forget20, 30, 50, 90

It leaves OUT/tofu/DATA_MODEL.json, its pictures beside it, and OUT/tofu.md, a page over every such JSON. A
run is known by its settings, data, start and retrained model: one that is in the JSON, or finished in --runs,
is not made again; one that was interrupted goes on. Seeds vary unlearning and retraining; the fine-tuned
start is shared. The story: `study/`'s grid (what is needed), workers (running it), records (what is kept),
verdicts, pages and pictures (from the JSON alone).
"""

import signal
from argparse import Namespace
from pathlib import Path

from data.tofu import load_task
from study import grid, pages, pictures, records, verdicts, workers
from support.command_line import Parser, given_flags, positive, run_command
from support.errors import InputError
from support.files import locked, write_json
from support.provenance import environment

DECIDED_HERE = {"loss", "split", "model", "data", "seed", "epochs", "out", "resume", "lr", "beta",
                "eval_every", "retain_log", "template"}


def build_parser() -> Parser:
    parser = Parser(prog="figures_tofu.py", description=__doc__)
    add = parser.add_argument
    add("--figure", default="all", choices=[*grid.FIGURES, "all"],
        help="what to plan, run and draw (default: all)")
    add("--seeds", type=positive(int), default=5,
        help=f"unlearning seeds 1 to N; with --figure all, figures {', '.join(grid.FEWER_SEEDS)} have at "
        f"most {grid.ALL_SEEDS} (default: 5)")
    add("--retrained", type=positive(int),
        help="retrained models a split; seeds share them in turn (default: one a seed)")
    add("--methods", nargs="+", choices=grid.METHODS, metavar="METHOD",
        help="only these (default: all of a figure)")
    add("--splits", nargs="+", metavar="SPLIT", help="only these (default: all of a figure)")
    add("--model", default="tiny", help="preset, or PRESET=FOLDER (default: tiny)")
    add("--base", help="folder with the base model that retraining starts from (default: the preset's)")
    add("--data", default="builtin",
        help="builtin, a folder with TOFU's files, or a Hub id (default: builtin)")
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
    add("--collect", nargs="+", type=Path, metavar="FOLDER",
        help="finished run folders: write their records to --out, a table and a picture beside it, and stop")
    add("--runs", default="runs/tofu", help="where run folders are (default: runs/tofu)")
    add("--out", default="results",
        help="where tofu/*.json, its pictures and tofu.md go; with --collect the JSON (default: results)")
    return parser


def core() -> grid.Core:
    """The functions of the other two scripts that the study is given."""
    from evaluate_tofu import ks_log10_p, log_truth_ratio
    from running.settings import resolve, tiny_settings
    return grid.Core(resolve, tiny_settings, train, log_truth_ratio, ks_log10_p)


def train(given: dict, start_rows: dict | None):
    """One run of train_npo.py in this process: flags as given, or {"resume": folder}."""
    from running.settings import resolve, resumed
    from train_npo import carry_out, join_world
    s = resumed(Path(given["resume"]), {}) if "resume" in given else resolve(given)
    carry_out(s, join_world(s.device), start_rows)


def open_study(args: Namespace) -> grid.Study:
    """Everything that planning depends on. Raises InputError, for a JSON of other data, start or flags
    too."""
    from models.presets import PRESETS
    from running.memory_plan import read_shape
    from running.settings import build_parser as train_parser
    name, _, path = args.model.partition("=")
    if name not in PRESETS:
        raise InputError(f"--model {args.model}: need one of the presets {', '.join(PRESETS)}, or "
                         "PRESET=FOLDER: retraining needs to know the base model and its settings")
    extra = given_flags(train_parser(), args.train_flags.split())
    if DECIDED_HERE & set(extra):
        flag = min(DECIDED_HERE & set(extra)).replace("_", "-")
        raise InputError(f"--train-flags {args.train_flags}: --{flag} is decided here; leave it out")
    task = load_task(args.data, grid.TUNING_SPLIT)
    shape = read_shape(Namespace(preset=name, start=path, model=args.model), task.full)
    setup = grid.Setup(args, core(), task, name, PRESETS[name], extra, records.read_choices(args),
                       shape.parameters, *grid.token_counts(task))
    return records.open_study(setup)


def draw(args: Namespace):
    """Pictures of this study, and the page over all studies in OUT/tofu."""
    path = records.json_path(args)
    study = records.read_study(path)
    shown = records.only(study, args.splits, args.methods) if args.draw_only else study
    drawn = pictures.draw(shown, grid.wanted_figures(args), path.with_suffix(""))
    page = Path(args.out) / "tofu.md"
    studies = {p.stem: records.read_study(p) for p in sorted(path.parent.glob("*.json"))}
    page.write_text(pages.page(studies, path.parent), encoding="utf-8")
    for verdict in verdicts.verdicts(study):
        print(verdicts.line(verdict))
    print(f"drawn: {', '.join(map(str, drawn)) or 'nothing, for lack of runs'}; {page}")


def collect(folders: list, out: Path):
    """The records of single runs in one JSON, with a table and a picture beside it."""
    if out.suffix != ".json":
        raise InputError(f"--collect with --out {out}: give the JSON to write, --out FILE.json")
    found = [records.collected(folder, core().log_truth_ratio) for folder in folders]
    runs, models = ([r for r in found if r["kind"] == kind] for kind in ("unlearn", "model"))
    write_json(out, {"runs": runs, "retrained": models, "provenance": environment()})
    lines = pages.single_runs_table(runs)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pictures.single_runs(runs, out.with_suffix(".png"))
    print("\n".join(lines))


def run(args: Namespace):
    """Make what is missing, and write it down."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # saved like Ctrl-C
    path = records.json_path(args)
    with locked(path.with_suffix(".lock")):  # two commands would overwrite each other's records
        study = workers.run_missing(open_study(args))
        known = records.complete(study)
        write_json(path, known)
    print(f"{'method':12}{'lr':>9}{'beta':>7}{'score':>8}   retain weight of Figure 9")
    for method, c in known["chosen"].items():
        print(f"{method:12}{c['lr']:9g}{c['beta']:7g}{c['score']:8.3f}   "
              + ", ".join(f"{split} {weight:g}" for split, weight in c["weights"].items()))
    for failure in known["failed"]:
        print(f"not made: {failure['name']}: {failure['why']}")


def main():
    args = build_parser().parse_args()
    known = (*grid.SMALL, *grid.LARGE)
    for split in set(args.splits or ()) - set(known):
        raise InputError(f"--splits {split}: no figure has it; need some of {', '.join(known)}")
    args.jobs = args.jobs or (workers.cores() if args.model.partition("=")[0] == "tiny" else 1)
    if args.collect:
        return collect(args.collect, Path(args.out))
    if args.plan:
        return workers.print_plan(open_study(args))
    if not args.draw_only:
        run(args)
    draw(args)


if __name__ == "__main__":
    run_command(main, "figures_tofu.py")
