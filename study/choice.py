"""Which evaluation do rows pick that the model never saw, and what does that cost in forget quality?

    python study/choice.py runs/NAME .. --out results/choice.json

Of each finished run with a retain log and unseen rows (the built-in set's holdout): the evaluation whose
forget rows are nearest to the unseen rows at the start, as `--unseen --keep best` picks it, beside the
evaluation of the best forget quality, which needs the retrained model.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Parser, environment, run_command, write_json
from metrics import best_step, unseen_metrics
from study.records import record
from study.report import plain, table
from study.verdicts import LINE


def choice(folder: Path) -> dict:
    """The steps that the two criteria pick, with log10 forget quality and utility there."""
    record(folder)  # raises InputError for a run that is not finished, or has no forget quality
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    evaluations = {}
    for file in sorted((folder / "eval").glob("step_*.json")):
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        rows, step = evaluation["rows"], int(file.stem[5:])
        unseen = unseen_metrics(rows["forget"], rows["holdout"])
        evaluations[step] = evaluation["metrics"] | {"unseen": unseen}
    unjudged = {step: metrics | {"forget_quality_log10": None} for step, metrics in evaluations.items()}
    picked = {"by retrained model": best_step(evaluations), "by unseen rows": best_step(unjudged)}
    settings = {name: config["settings"][name] for name in ("split", "seed")}
    return {"method": config["method"], **settings} | {
        name: {"step": step, "log10_forget_quality": evaluations[step]["forget_quality_log10"],
               "utility": evaluations[step]["model_utility"] / evaluations[0]["model_utility"],
               "auc": evaluations[step]["unseen"]["auc"]} for name, step in picked.items()}


def summary(choices: list) -> list[dict]:
    """A row for each method and split: means over seeds, and in how many seeds each choice passes."""
    rows = []
    for method, split in dict.fromkeys((c["method"], c["split"]) for c in choices):
        runs = [c for c in choices if (c["method"], c["split"]) == (method, split)]
        row = {"method": method, "split": split, "seeds": len(runs)}
        for name in ("by retrained model", "by unseen rows"):
            quality = [run[name]["log10_forget_quality"] for run in runs]
            row |= {f"log10 forget quality, {name}": f"{statistics.mean(quality):.2f}",
                    f"passes, {name}": sum(q > LINE for q in quality)}
        for key in ("utility", "auc"):
            mean = statistics.mean(run["by unseen rows"][key] for run in runs)
            row[f"{key}, by unseen rows"] = f"{mean:.2f}"
        rows.append(row)
    return rows


def main(argv: list | None = None):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="finished runs")
    parser.add_argument("--out", type=Path, required=True, help="FILE.json; a table goes to FILE.md")
    args = parser.parse_args(argv)
    choices = plain([choice(folder) for folder in args.folders], 5)
    write_json(args.out, {"choices": choices, "provenance": environment()})
    text = table(summary(choices))
    args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_command(main)
