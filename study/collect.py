"""Collect finished runs into one small JSON and one picture, so that what was found outlives the run folders.

    python study/collect.py runs/grid/* --out results/builtin_forget10.json

For each run: its settings, provenance, and the metrics of every evaluation (no rows, no texts). The picture shows
forget quality and model utility over steps, one line a run, coloured by method. `--pick FILE` reads such a JSON and
prints, for each method, the learning rate that ends best: one rule for all methods.
"""

import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluate_tofu import log_truth_ratio, read_log  # noqa: E402
from support.command_line import Parser, run_command
from support.errors import InputError  # noqa: E402
from support.files import write_json
from support.provenance import environment  # noqa: E402

STYLES = {"npo+rt": ("black", "-"), "npo": ("tab:blue", "-"), "ga": ("tab:red", "--"), "ga+rt": ("tab:orange", "--")}
KEPT = ("forget_quality", "forget_quality_log10", "ks_statistic", "model_utility", "forget_truth_ratio", "forget_kl",
        "world_facts_kl")
SETTINGS = ("loss", "split", "data", "model", "lr", "beta", "epochs", "batch_size", "seed", "forget_weight",
            "retain_weight", "kl_weight", "warmup_epochs", "weight_decay", "template")
PROVENANCE = ("versions", "commit", "command", "time", "device", "world_size", "start_weights", "data_fingerprint")


def collect(folder: Path) -> dict:
    """Settings, provenance and metrics over steps of a finished run. Raises InputError for another folder."""
    if not (folder / "model").is_dir():
        raise InputError(f"{folder} is no finished run: need a run folder with model/ in it")
    config = json.loads((folder / "config.json").read_text())
    evaluations = [json.loads(path.read_text()) for path in sorted((folder / "eval").glob("step_*.json"))]
    short = lambda x: None if x is None else float(f"{x:.6g}")
    curves = {key: [short(e["metrics"][key]) for e in evaluations] for key in KEPT}
    spreads = [log_ratio_spread(e["rows"]["forget"]) for e in evaluations]
    curves["forget_log_truth_ratio_mean"], curves["forget_log_truth_ratio_sd"] = map(list, zip(*spreads))
    for name in ("forget", "retain", "real_authors", "world_facts"):
        for key in ("probability", "rouge_l_recall", "truth_ratio"):
            curves[f"{name}_{key}"] = [short(e["metrics"][name][key]) for e in evaluations]
    settings = {k: config["settings"][k] for k in SETTINGS}
    rows = evaluations[-1]["rows"]
    answers = [{k: rows[name][i][k] for k in ("question", "answer", "generation")} | {"set": name}
               for name in ("forget", "retain") for i in (0, 150) if i < len(rows[name])]
    dims = {k: config["model_config"].get(k) for k in ("hidden_size", "num_hidden_layers", "vocab_size")}
    return {"method": config["settings"]["method"], "settings": settings,
            "steps": [e["provenance"]["step"] for e in evaluations], "metrics": curves,
            "last_answers": [{k: v[:300] for k, v in a.items()} for a in answers], "model_config": dims,
            "provenance": {k: config[k] for k in PROVENANCE}}


def log_ratio_spread(rows: list) -> tuple:
    """(mean, sd) of log R over forget rows: what the Kolmogorov-Smirnov test sees, in two numbers. None without R."""
    log_ratios = [log_truth_ratio(row) for row in rows]
    if None in log_ratios:
        return None, None
    return round(statistics.mean(log_ratios), 4), round(statistics.pstdev(log_ratios), 4)


def peak(run: dict) -> tuple[float, int]:
    """(log10 of the best forget quality after the start, its place in the run)."""
    values = run["metrics"]["forget_quality_log10"]
    at = max(range(1, len(values)), key=lambda i: values[i])
    return values[at], at


def table(runs: list) -> str:
    """One line a run: peak and last forget quality with the utility there, relative to the start."""
    lines = ["| method | lr | beta | retain weight | batch | epochs | seed | peak forget quality | step | "
             "utility there / start | last forget quality | utility / start | retain probability |", "|---" * 13 + "|"]
    for run in sorted(runs, key=lambda r: (r["method"], r["settings"]["lr"], r["settings"]["seed"])):
        s, m, (best, at) = run["settings"], run["metrics"], peak(run)
        start = m["model_utility"][0]
        cells = [run["method"], *(f"{s[k]:g}" for k in ("lr", "beta", "retain_weight", "batch_size", "epochs", "seed")),
                 f"{10**best:.2g}", run["steps"][at], f"{m['model_utility'][at] / start:.2f}",
                 f"{10**m['forget_quality_log10'][-1]:.2g}", f"{m['model_utility'][-1] / start:.2f}",
                 f"{m['retain_probability'][-1]:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(runs: list, path: Path):
    """Forget quality, model utility and retain probability over steps, a line a run."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    named, rates = set(), sorted({run["settings"]["lr"] for run in runs})
    markers = dict(zip(rates, "os^Dv<>"))  # a marker a learning rate
    for run in runs:
        color, line = STYLES.get(run["method"], ("gray", ":"))
        label = run["method"] if run["method"] not in named else None
        named.add(run["method"])
        for axes, key in zip(panels, ("forget_quality_log10", "model_utility", "retain_probability")):
            axes.plot(run["steps"], run["metrics"][key], line, color=color, label=label, alpha=0.8,
                      marker=markers.get(run["settings"]["lr"], "."), markersize=5)
    panels[0].axhline(math.log10(0.05), color="gray", linewidth=1, label="0.05")
    for axes, title in zip(panels, ("log10 forget quality", "model utility", "retain probability")):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    for rate in rates:
        panels[0].plot([], [], markers.get(rate, "."), color="gray", label=f"lr {rate:g}")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pick(runs: list) -> dict:
    """method -> the learning rate with the best forget quality at its last step: one rule for every method.

    The last and not the best step, since nobody who unlearns knows beforehand when to stop.
    """
    last = {}
    for run in runs:
        last.setdefault(run["method"], []).append((run["metrics"]["forget_quality_log10"][-1], run["settings"]["lr"]))
    return {method: max(values)[1] for method, values in last.items()}


def main():
    parser = Parser(prog="study/collect.py", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="finished run folders")
    parser.add_argument("--out", type=Path,
                        help="JSON to write; the picture goes beside it, as .png, and the table as .md")
    parser.add_argument("--pick", type=Path,
                        help="print the best learning rate of each method in this JSON, as 'method lr' lines")
    parser.add_argument("--retrained", help="the retrained model's evaluation: adds the mean and sd of its log R")
    args = parser.parse_args()
    if args.pick:
        for method, lr in pick(json.loads(args.pick.read_text())["runs"]).items():
            print(method, f"{lr:g}")
        return
    if not args.runs or not args.out:
        raise InputError("give run folders and --out FILE, or --pick FILE")
    runs = [collect(folder) for folder in args.runs]
    collected = {"runs": runs, "provenance": environment()}
    if args.retrained:
        mean, sd = log_ratio_spread(read_log(args.retrained)[0]["forget"])
        collected["retrained_log_truth_ratio"] = {"mean": mean, "sd": sd}
    write_json(args.out, collected)
    args.out.with_suffix(".md").write_text(table(runs) + "\n")
    draw(runs, args.out.with_suffix(".png"))
    print(table(runs))


if __name__ == "__main__":
    run_command(main, "study/collect.py")
