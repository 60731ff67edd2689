"""trajectory.png: what a run did, on one page, from its evaluations, its log and the truth ratios.

Four panels, each where there is something to show: forget quality; model utility and probabilities; the mean
weight W (of a loss without one: the parts of the loss); the log R that forget quality compares.
"""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

LOOKS = {"start": "tab:blue", "retrained": "tab:orange", "unlearned": "black"}  # of the models with log R
BINS = 30  # of a histogram


def log_ratios(forget_rows: dict, log_ratio_of: Callable) -> dict:
    """model -> log R of its forget rows; without the models that have no rows, or whose rows have no R."""
    samples = {name: [log_ratio_of(row) for row in rows] for name, rows in forget_rows.items() if rows}
    return {name: sample for name, sample in samples.items() if None not in sample}


def draw_trajectory(method: str, evaluations: dict, log: list, samples: dict) -> Figure:
    """evaluations: step -> metrics; log: the lines of log.jsonl; samples: model (of LOOKS) -> log R."""
    steps, metrics = zip(*sorted(evaluations.items()), strict=True)
    panels = {draw_what_is_kept: (steps, metrics), draw_weight: (log,)}
    if metrics[0]["forget_quality_log10"] is not None:
        panels = {draw_forget_quality: (steps, metrics), **panels}
    if samples:
        panels[draw_log_ratios] = (samples,)
    rows = 2 if len(panels) == 4 else 1
    columns = len(panels) // rows
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (draw, content) in zip(grid.flat, panels.items(), strict=True):
        draw(axes, *content)
        if not axes.get_legend():
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle(method)
    return figure


def draw_forget_quality(axes, steps: list, metrics: list):
    """Its log10: below the line the model and the retrained one are told apart."""
    axes.plot(steps, [m["forget_quality_log10"] for m in metrics], "o-", color="black", label="this model")
    axes.axhline(math.log10(0.05), color="tab:red", linestyle="--", label="0.05")
    axes.set(xlabel="step", ylabel="log10 forget quality", title="forget quality")


def draw_what_is_kept(axes, steps: list, metrics: list):
    """Model utility, the two probabilities, the forget rows' extraction strength and their AUC against the
    holdout: those of them that were measured."""
    curves = [("model utility", [m["model_utility"] for m in metrics], "o-", "black")]
    for name, style, color in (("forget", "s--", "tab:red"), ("retain", "^:", "tab:blue")):
        curves.append((f"{name} probability", [m[name]["probability"] for m in metrics], style, color))
    curves += [("extraction strength", [m["forget"].get("extraction_strength") for m in metrics], "v--",
                "tab:orange"),
               ("MIA AUC (min-k)", [m.get("mia", {}).get("min_k") for m in metrics], "D:", "tab:gray")]
    for label, values, style, color in curves:
        if None not in values:
            axes.plot(steps, values, style, color=color, label=label)
    axes.set(xlabel="step", ylim=(-0.02, 1.02), title="what is kept and what is lost")


def draw_weight(axes, log: list):
    """The mean of Eq. 5's W over a step's batch; of a loss without a weight, its parts."""
    steps = [line["step"] for line in log]
    if "mean_W" in log[0]:
        weights = [line["mean_W"] for line in log]
        axes.plot(steps, weights, color="black", label="mean W of the batch")
        axes.axhline(1, color="tab:red", linestyle="--", label="gradient ascent")
        axes.set(xlabel="step", ylabel="W", ylim=(-0.02, 1.05 * max(1, *weights)),
                 title="weight on gradient ascent's gradient")
        axes.legend(fontsize=8, loc="center right")  # it falls from 1 to 0
        return
    for part in ("forget_loss", "retain_loss", "kl_loss"):
        if part in log[0]:
            axes.plot(steps, [line[part] for line in log], label=part.replace("_", " "))
    axes.set(xlabel="step", ylabel="nats", title="parts of the loss")


def draw_log_ratios(axes, samples: dict):
    """Histograms over the same bins: forget quality asks whether the last two are alike."""
    every = np.concatenate(list(samples.values()))
    bins = np.linspace(every.min(), every.max(), BINS + 1)
    for name, sample in samples.items():
        counts, _ = np.histogram(sample, bins)
        axes.stairs(counts, bins, color=LOOKS[name], alpha=0.25, fill=True)
        axes.stairs(counts, bins, color=LOOKS[name], linewidth=1.5, label=name)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set(xlabel="log R (above 0: the truth is likelier than the falsehoods)", ylabel="forget rows",
             title="truth ratios")
