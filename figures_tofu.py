"""Section 5 whole: plan a figure's runs, run what is missing, distil them into one small JSON, draw, judge.

    python figures_tofu.py                       # built-in data, the tiny model, everything: see --plan first
    python figures_tofu.py --figure 5 --seeds 2 --data TOFU_DIR --methods ga ga+rt npo npo+rt
    python figures_tofu.py --draw-only           # from the JSON alone: no model, no run folder
    python figures_tofu.py --collect runs/NAME --out FILE.json    # single runs: records, table, picture

It leaves OUT/tofu/DATA_MODEL.json, its pictures beside it, and OUT/tofu.md over every such JSON;
docs/study.md has the figures. A run is known by its settings, data, start and retrained model, which its
folder's name stands for: one that is in the JSON, or finished in runs/, is not made again; one that was
interrupted goes on. Seeds vary unlearning and retraining; the fine-tuned start is shared. The story:
`study/`'s grid (what is needed), workers (running it), records (what is kept), verdicts, pages, pictures and
beyond (from the JSON alone).
"""

import signal
from argparse import Namespace
from pathlib import Path

from study import beyond, grid, pages, pictures, records, verdicts, workers
from support.command_line import Parser, cores, positive, run_command
from support.errors import InputError
from support.files import locked, write_json
from support.provenance import environment


def build_parser() -> Parser:
    parser = Parser(prog="figures_tofu.py", description=__doc__)
    add = parser.add_argument
    add("--figure", nargs="+", choices=grid.FIGURES, default=[*grid.FIGURES], metavar="FIGURE",
        help=f"what to make: {', '.join(grid.FIGURES)} (default: all)")
    add("--seeds", type=positive(int), default=5, help="unlearning seeds 1 to N")
    methods, splits = grid.METHODS + grid.NEWER, grid.SMALL + grid.LARGE + grid.LARGEST
    add("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD",
        help="make runs of these only (default: all)")
    add("--splits", nargs="+", choices=splits, default=splits, metavar="SPLIT",
        help="likewise (default: all)")
    add("--model", default="tiny", help="preset, or PRESET=FOLDER")
    add("--data", default="builtin", help="builtin, a folder of TOFU's, or a Hub id")
    add("--choices", choices=["preset"],
        help="in place of tuning: the preset's lr and beta for all methods, as in the paper")
    add("--epochs", type=positive(int), help="of every unlearning run (default: the preset's)")
    add("--jobs", type=positive(int), help="runs at a time (default: tiny: one a core; else 1)")
    add("--plan", action="store_true", help="print runs, time and memory, and stop")
    add("--draw-only", action="store_true", help="draw and judge from the JSON alone")
    add("--collect", nargs="+", type=Path, metavar="FOLDER",
        help="finished run folders: write their records to --out, a table and a picture beside it")
    add("--out", default="results",
        help="where tofu/*.json, its pictures and tofu.md go; with --collect FILE.json, with --draw-only too")
    return parser


def draw(args: Namespace):
    """Pictures of this study, and the page over all studies in OUT/tofu."""
    path, page = records.json_path(args), Path(args.out) / "tofu.md"
    studies = {p.stem: records.read_study(p) for p in sorted({path, *path.parent.glob("*.json")})}
    study = studies[path.stem]
    drawn = pictures.draw(study, args.figure, path.with_suffix(""))
    if "objectives" in args.figure:
        drawn += beyond.draw(study, path.with_suffix(""))
    page.write_text(pages.page(studies, path.parent), encoding="utf-8")
    print(verdicts.scale(study), *map(verdicts.line, verdicts.verdicts(study)), sep="\n")
    print(f"drawn: {', '.join(map(str, drawn)) or 'no picture'}; {page}")


def collect(folders: list, out: Path):
    """The records of single runs in one JSON."""
    found = [records.collected(folder) for folder in folders]
    runs, models = ([r for r in found if r["kind"] == kind] for kind in ("unlearn", "model"))
    write_json(out, {"runs": runs, "retrained": models, "provenance": environment()})


def draw_single_runs(out: Path):
    """A table and a picture beside the JSON that `collect` wrote."""
    study = records.read_study(out, needed={"runs", "retrained"})
    keys = ("method", "beta", "retain_weight", "seed")
    answers = [([r[key] for key in keys], r["samples"]) for r in study["runs"] + study["retrained"]
               if "samples" in r]
    lines = [*pages.single_runs_table(study["runs"]),
             *pages.samples_table([key.replace("_", " ") for key in keys], answers)]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pictures.single_runs(study["runs"], out.with_suffix(".png"))
    print("\n".join(lines))


def run(args: Namespace):
    """Make what is missing, and write it down."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # saved like Ctrl-C
    path = records.json_path(args)
    with locked(path.with_suffix(".lock")):  # two commands would overwrite each other's records
        study = records.open_study(args)
        workers.run_missing(study)
        records.take_attacks(study)
        write_json(path, records.complete(study))
    for failure in study.known["failed"]:
        print(f"not made: {failure['name']}: {failure['why']}")


def main():
    args = build_parser().parse_args()
    args.jobs = args.jobs or (cores() if args.model.partition("=")[0] == "tiny" else 1)
    out = Path(args.out)
    if args.collect and out.suffix != ".json":
        raise InputError(f"--collect with --out {out}: give the JSON to write, --out FILE.json")
    if args.collect:
        collect(args.collect, out)
    if args.collect or args.draw_only and out.suffix == ".json":
        return draw_single_runs(out)
    if args.plan:
        return workers.print_plan(records.open_study(args))
    if not args.draw_only:
        run(args)
    draw(args)


if __name__ == "__main__":
    run_command(main, "figures_tofu.py")
