"""trajectory.png: what a run did, on one page, from its evaluations, its log and the truth ratios.

Four panels, each where there is something to show: forget quality; model utility and probabilities; the mean
weight W (of a loss without one: the parts of the loss); the log R that forget quality compares.
"""

import math

from matplotlib.figure import Figure

BINS = 30  # of a histogram


def draw_trajectory(method: str, evaluations: dict, log: list, samples: dict) -> Figure:
    """evaluations: step -> metrics; log: the lines of log.jsonl; samples: model -> log R of its forget rows.
    A curve or a sample that wasn't measured everywhere (None) is left out."""
    steps, metrics = zip(*sorted(evaluations.items()), strict=True)
    weighted = "mean_W" in log[0]
    parts = ["mean_W"] if weighted else ["forget_loss", "retain_loss", "kl_loss"]
    what_is_kept = {"model utility": [m["model_utility"] for m in metrics],
                    "forget probability": [m["forget"]["probability"] for m in metrics],
                    "retain probability": [m["retain"]["probability"] for m in metrics],
                    "extraction strength": [m["forget"].get("extraction_strength") for m in metrics],
                    "MIA AUC (min-k)": [m.get("mia", {}).get("min_k") for m in metrics]}
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    figure.suptitle(method)
    quality, kept, weight, ratios = grid = figure.subplots(2, 2).flatten()
    draw_curves(quality, steps, {"log10 of its p-value": [m["forget_quality_log10"] for m in metrics]}, "o-")
    draw_curves(kept, steps, what_is_kept, "o-")
    draw_curves(weight, [line["step"] for line in log],
                {part.replace("_", " "): [line.get(part) for line in log] for part in parts})
    quality.set(title="forget quality")
    kept.set(title="what is kept and what is lost", ylim=(-0.02, 1.02))
    weight.set(title="weight on gradient ascent's gradient" if weighted else "parts of the loss")
    if quality.lines:
        quality.axhline(math.log10(0.05), color="tab:red", linestyle="--", label="0.05")
    if weighted:
        weight.axhline(1, color="tab:red", linestyle="--", label="gradient ascent")
    samples = {name: sample for name, sample in samples.items() if sample and None not in sample}
    if samples:
        ratios.hist(list(samples.values()), BINS, histtype="step", label=list(samples))
    ratios.set(title="truth ratios", ylabel="forget rows",
               xlabel="log R (above 0: the truth is likelier than the falsehoods)")
    for axes in grid:
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=8)
        else:
            axes.remove()
    return figure


def draw_curves(axes, steps: list, curves: dict, look: str = "-"):
    axes.set(xlabel="step")
    for label, values in curves.items():
        if None not in values:
            axes.plot(steps, values, look, label=label)
