"""Figures 2 and 5 to 9, the retain weight and the splits beyond 10%, drawn from the JSON of `figures_tofu.py` alone.

Forget quality has the paper's dual scale: linear above 0.05, logarithmic below, a third of the height for the first.
Lines and points are means over seeds (of forget quality: in decades), bands and bars go from the smallest to the
largest seed. The same JSON gives the same bytes on the same machine.
"""

import math
import statistics
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FixedLocator, NullLocator  # noqa: E402

from study.answers import judgement  # noqa: E402
from study.verdicts import (  # noqa: E402
    LINE,
    chosen_runs,
    kept_utility,
    peak,
    peak_at,
    samples_of,
    tuned_runs,
    weighted_runs,
)

COLORS = {"ga": "tab:red", "idk": "tab:orange", "dpo": "tab:blue", "kto": "tab:green", "npo": "black",
          "simnpo": "tab:purple"}
LINES = {"": ":", "rt": "-", "kl": "--"}
MARKERS = {"": "o", "rt": "s", "kl": "^"}
ABOVE = 0.5  # height of the linear part, in heights of the logarithmic one
KIND_COLORS = {"desired": "#e2f2df", "undesired": "#f9dedc"}


def style(method: str) -> tuple[str, str, str]:
    """(colour by objective, line and marker by what keeps the rest)."""
    loss, _, term = method.partition("+")
    return COLORS[loss], LINES[term], MARKERS[term]


# ---------------------------------------------------------------- the dual scale

def height(log10_p: float, floor: float) -> float:
    """Where a p-value stands: 0 at 0.05, ABOVE at 1, -1 at the floor (a log10)."""
    if log10_p >= LINE:
        return ABOVE * (10**log10_p - 0.05) / 0.95
    return -(LINE - log10_p) / (LINE - floor)


def dual_axis(axes, floor: float):
    """Ticks, grid and the 0.05 line of an axis whose values went through `height`."""
    decades = math.ceil((LINE - floor) / 5)
    logs = [-decades * i for i in range(1, 6) if floor < -decades * i <= -2]
    ticks = [(0.0 + math.log10(p), f"{p:g}") for p in (0.05, 0.5, 1.0)] + [(log, f"$10^{{{log}}}$") for log in logs]
    axes.yaxis.set_major_locator(FixedLocator([height(log, floor) for log, _ in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticklabels([text for _, text in ticks])
    axes.axhline(0, color="tab:red", linewidth=0.8, linestyle="--")
    axes.axhspan(0, ABOVE, color="black", alpha=0.04, linewidth=0)
    axes.set_ylim(-1.05, ABOVE * 1.08)
    axes.grid(alpha=0.25)


def floor_of(values: list) -> float:
    """The lowest tick that holds all of them: at least three decades below the line."""
    return min([-5.0, *(math.floor(v) for v in values)])


# ---------------------------------------------------------------- pieces

def curve(axes, runs: list, method: str, key: str, against: str, drawn=float):
    """Mean over seeds as a line, the seeds' range as a band; `drawn` makes a height of what was averaged."""
    color, line, marker = style(method)
    columns = [[r[key][i] for r in runs] for i in range(len(runs[0]["steps"]))]  # seeds have the same steps
    heights = lambda summary: [drawn(summary(column)) for column in columns]
    x = [step / (runs[0]["steps"][-1] / runs[0]["epochs"] if against == "epochs" else 1) for step in runs[0]["steps"]]
    axes.plot(x, heights(statistics.mean), line, color=color, label=method, linewidth=1.4, marker=marker, markersize=3)
    if len(runs) > 1:
        axes.fill_between(x, heights(min), heights(max), color=color, alpha=0.1, linewidth=0)


def quality_panel(axes, study: dict, named: list, against: str, title: str):
    """Forget quality on the dual scale, one line for each (method, runs)."""
    floor = floor_of([q for _, runs in named for r in runs for q in r["forget_quality_log10"]])
    for method, runs in named:
        curve(axes, runs, method, "forget_quality_log10", against, lambda log: height(log, floor))
    dual_axis(axes, floor)
    ceiling(axes, study, named[0][1][0]["split"], floor)
    axes.set(title=title, xlabel=against, ylabel="forget quality")


def metric_panel(axes, named: list, key: str, against: str, title: str, ylabel: str):
    for method, runs in named:
        curve(axes, runs, method, key, against)
    axes.set(title=title, xlabel=against, ylabel=ylabel)
    axes.grid(alpha=0.25)


def ceiling(axes, study: dict, split: str, floor: float):
    """Retrained against retrained: median as a line, range as a band."""
    values = [p["log10"] for p in study.get("ceilings", {}).get(split, [])]
    if values:
        axes.axhline(height(statistics.median(values), floor), color="tab:cyan", linewidth=1.2, linestyle="-.")
        axes.axhspan(height(min(values), floor), height(max(values), floor), color="tab:cyan", alpha=0.12, linewidth=0)


def lattice(axes, study: dict, split: str, floor: float):
    """The p-values that this few rows can take, as ticks on the right, as far down as the axis goes."""
    steps = study.get("lattice", {}).get(str(study.get("forget_rows", {}).get(split)))
    if steps:
        for log in sorted({p for _, p in steps if p >= floor}):
            axes.plot([0.975, 1.0], [height(log, floor)] * 2, color="gray", linewidth=0.7,
                      transform=axes.get_yaxis_transform())
        n, last = study["forget_rows"][split], steps[-1][1]
        axes.set_title(f"right: the p-values that {n} rows allow, floor $10^{{{last:.0f}}}$", loc="right", fontsize=7,
                       color="gray", y=0.005)


def with_runs(study: dict, split: str, methods) -> list:
    """(method, its runs) for those that have any."""
    return [(m, runs) for m in methods if (runs := chosen_runs(study, split, m))]


def save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
    return path


def legend_below(figure, axes, columns: int):
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=legend_columns(figure, columns), fontsize=8)


def legend_columns(figure, most: int) -> int:
    """As many as the figure is wide enough for, 1.3 inches each."""
    return min(most, int(figure.get_figwidth() // 1.3))


# ---------------------------------------------------------------- the figures

def figure2(study: dict, path: Path):
    """forget05 over steps: forget quality, utility, KL to the start on world facts; the rt variants' answers beside
    them."""
    named = with_runs(study, "forget05", ("ga", "ga+rt", "npo", "npo+rt"))
    if not named:
        return None
    figure, panels = plt.subplots(1, 4, figsize=(17, 4.4), layout="constrained", width_ratios=(1, 1, 1, 1.25))
    quality_panel(panels[0], study, named, "steps", "forget05: forget quality")
    metric_panel(panels[1], named, "model_utility", "steps", "model utility", "model utility")
    metric_panel(panels[2], named, "world_facts_kl", "steps", "KL to the start, world facts", "nats a token")
    panels[2].set_yscale("symlog", linthresh=0.01)
    panels[3].axis("off")
    lines = []
    for method, runs in named:
        sample = next((s for r in runs for s in r.get("samples", []) if s["set"] == "forget"), None)
        if sample and method.endswith("+rt"):
            if not lines:
                lines = [wrapped("question", sample["question"]), wrapped("true", sample["answer"])]
            lines.append(wrapped(method, f"{sample['generation'] or '(empty)'}  [{sample['kind']}]"))
    panels[3].text(0, 1, "\n\n".join(lines), va="top", fontsize=8.5, family="monospace", parse_math=False)
    panels[3].set_title("answers at the end, seed 1")
    legend_below(figure, panels[0], 4)
    return save(figure, path)


def wrapped(name: str, text: str) -> str:
    return "\n".join(textwrap.wrap(f"{name}: {text}", 46, subsequent_indent="  "))


def trade_off(study: dict, splits: tuple, path: Path):
    """Forget quality against utility at each method's peak, one panel a split."""
    named = {split: with_runs(study, split, study["chosen"]) for split in splits}
    if not any(named.values()):
        return None
    splits = [split for split in splits if named[split]]
    figure, panels = plt.subplots(1, len(splits), figsize=(5.2 * len(splits), 5.2), layout="constrained", squeeze=False)
    entries = {}
    for axes, split in zip(panels[0], splits):
        runs = [r for _, own in named[split] for r in own]
        floor = floor_of([r["forget_quality_log10"][0] for r in runs] + [peak(r) for r in runs])
        for method, own in named[split]:
            color, _, marker = style(method)
            x, y = [r["model_utility"][peak_at(r)] for r in own], [height(peak(r), floor) for r in own]
            middle = statistics.mean(x), height(statistics.mean(map(peak, own)), floor)
            error = lambda values, mean: [[max(0, mean - min(values))], [max(0, max(values) - mean)]]
            entries[method] = axes.errorbar(*middle, xerr=error(x, middle[0]), yerr=error(y, middle[1]), fmt=marker,
                                            color=color, markerfacecolor=color if "+" in method else "white",
                                            markersize=7, elinewidth=0.8, label=method)
        start, quality = (statistics.mean(r[key][0] for r in runs) for key in ("model_utility", "forget_quality_log10"))
        entries["fine-tuned start"] = axes.plot(start, height(quality, floor), "P", color="tab:brown", markersize=10,
                                                label="fine-tuned start", linestyle="")[0]
        utilities = [m["model_utility"] for m in study["retrained"]
                     if m["split"] == f"retain{100 - int(split[-2:]):02d}" and m.get("model_utility")]
        if utilities:
            entries["retrained (p = 1)"] = axes.plot(statistics.mean(utilities), ABOVE, "*", color="tab:cyan",
                                                     markersize=14, label="retrained", linestyle="")[0]
        dual_axis(axes, floor)
        ceiling(axes, study, split, floor)
        lattice(axes, study, split, floor)
        seeds = sorted({len(own) for _, own in named[split]})
        axes.set(title=f"{split} (seeds: {'-'.join(map(str, seeds))})", xlabel="model utility",
                 ylabel="forget quality at its peak")
        axes.set_xlim(-0.03, max([start, *utilities]) * 1.1)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center",
                  ncol=legend_columns(figure, 8), fontsize=8,
                  title="dashed red: 0.05; cyan: one retrained model against another", title_fontsize=8)
    return save(figure, path)


def evolution(study: dict, columns: list, path: Path, select=None):
    """Forget quality above, utility below; columns of (title, split, methods, "steps" or "epochs")."""
    select = select or chosen_runs
    columns = [(title, [(m, runs) for m in methods if (runs := select(study, split, m))], against)
               for title, split, methods, against in columns]
    columns = [column for column in columns if column[1]]
    if not columns:
        return None
    figure, panels = plt.subplots(2, len(columns), figsize=(5.2 * len(columns), 7.4), layout="constrained",
                                  squeeze=False)
    for (title, named, against), (above, below) in zip(columns, panels.T):
        quality_panel(above, study, named, against, title)
        metric_panel(below, named, "model_utility", against, "", "model utility")
    legend_below(figure, max(panels[0], key=lambda axes: len(axes.get_legend_handles_labels()[0])), 7)
    return save(figure, path)


def figure7(study: dict, path: Path):
    """One question of three sets and every model's answer: green where it is desired, red where not."""
    named = samples_of(study)
    if len(named) < 3:
        return None
    sets = named[0][1]
    figure, axes = plt.subplots(figsize=(17, 0.62 * (len(named) + 2)), layout="constrained")
    axes.axis("off")
    fit = lambda text: "\n".join(textwrap.wrap(text or "(empty)", 58, max_lines=2, placeholder=" ..."))
    cells = [["true answer", *(fit(s["answer"]) for s in sets)]]
    colors = [["white"] * (len(sets) + 1)]
    for who, samples in named:
        cells.append([who, *(fit(f"[{s['kind']}] {s['generation']}") for s in samples)])
        colors.append(["white", *(KIND_COLORS[judgement(s["set"], s["kind"])] for s in samples)])
    head = ["", *(fit(f"{s['set']}: {s['question']}") for s in sets)]
    grid = axes.table(cellText=cells, colLabels=head, cellColours=colors, cellLoc="left", colLoc="left",
                      bbox=(0, 0, 1, 1), colWidths=(0.1, 0.3, 0.3, 0.3))
    grid.auto_set_font_size(False)
    grid.set_fontsize(8)
    for cell in grid.get_celld().values():
        cell.get_text().set_parse_math(False)
    axes.set_title("forget10, seed 1, end of the run; green: desired (forget set: readable, but not the truth; "
                   "elsewhere: the truth)", fontsize=10)
    return save(figure, path)


def figure8(study: dict, path: Path):
    """Divergence from the start on the forget set, forget10."""
    named = with_runs(study, "forget10", study["chosen"])
    if not named:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
    metric_panel(axes, named, "forget_kl", "epochs", "forget10: forget KL to the start", "nats a token")
    axes.set_yscale("symlog", linthresh=0.1)
    legend_below(figure, axes, 7)
    return save(figure, path)


def retain_weight(study: dict, path: Path):
    """npo+rt on forget10: peak and last forget quality, and utility there, against the retain weight."""
    weights = study["budget"]["retain_weights"]
    found = [(w, runs) for w in weights if (runs := weighted_runs(study, "forget10", "npo+rt", w))]
    if len(found) < 2:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    floor = floor_of([r["forget_quality_log10"][-1] for _, runs in found for r in runs])
    last = lambda r: r["forget_quality_log10"][-1]
    for name, color, quality, utility in (("peak", "black", peak, lambda r: kept_utility(r, peak_at(r))),
                                          ("end of the run", "tab:gray", last, kept_utility)):
        for axes, value, drawn in ((left, quality, lambda log: height(log, floor)), (right, utility, float)):
            heights = lambda summary: [drawn(summary(map(value, runs))) for _, runs in found]
            x = [w for w, _ in found]
            axes.plot(x, heights(statistics.mean), "o-", color=color, label=name)
            axes.fill_between(x, heights(min), heights(max), color=color, alpha=0.12, linewidth=0)
    dual_axis(left, floor)
    ceiling(left, study, "forget10", floor)
    left.set(xlabel="retain weight", ylabel="forget quality", title="npo+rt, forget10")
    right.set(xlabel="retain weight", ylabel="utility, share of the start's", title="utility kept")
    right.grid(alpha=0.25)
    left.legend(fontsize=8)
    return save(figure, path)


def draw(study: dict, figures: list, stem: Path) -> list[Path]:
    """The wanted figures that the study has runs for, as STEM_figureN.png; their paths."""
    small, methods = ("forget01", "forget05", "forget10"), list(study["chosen"])
    makers = {
        "2": lambda p: figure2(study, p),
        "5": lambda p: trade_off(study, small, p),
        "6": lambda p: evolution(study, [(s, s, methods, "steps" if s == "forget01" else "epochs") for s in small], p),
        "7": lambda p: figure7(study, p),
        "8": lambda p: figure8(study, p),
        "9": lambda p: evolution(study, [(f"{s}, tuned weights", s, methods, "epochs")
                                         for s in ("forget50", "forget90")], p, tuned_runs),
        "retain-weight": lambda p: retain_weight(study, p),
        "beyond10": lambda p: trade_off(study, ("forget20", "forget30", "forget50", "forget90"), p),
    }
    drawn = []
    for figure in figures:
        name = f"figure{figure}" if figure.isdigit() else figure
        drawn.append(makers[figure](stem.with_name(f"{stem.name}_{name}.png")))
    return [path for path in drawn if path]
