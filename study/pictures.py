"""The study's pictures, from its JSON alone.

Forget quality has the paper's dual scale: linear above 0.05, logarithmic below, a third of the height for the
first. Lines and points are means over seeds (of forget quality: in decades), bands and bars go from the
smallest to the largest seed. The same JSON gives the same bytes on the same machine.
"""

import math
import statistics
from collections import Counter
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from data.tofu import complement
from study.grid import FIGURES, STEP_SPLIT
from study.records import COLLECTED, differing
from study.verdicts import LINE, chosen_runs, peak, peak_at, tuned_runs

COLORS = {"ga": "tab:red", "idk": "tab:orange", "dpo": "tab:blue", "kto": "tab:green", "npo": "black",
          "simnpo": "tab:purple", "wga": "tab:brown", "satimp": "tab:pink", "tnpo": "tab:gray",
          "ceu": "tab:olive", "undial": "tab:cyan"}
LINES, MARKERS = {"": ":", "rt": "-", "kl": "--"}, {"": "o", "rt": "s", "kl": "^"}  # what keeps the rest
ABOVE = 0.5  # height of the linear part, in heights of the logarithmic one
QUALITY = "forget_quality_log10"
KLS = ("forget_kl", "world_facts_kl")
LABELS = {QUALITY: "forget quality", "model_utility": "model utility",
          **dict.fromkeys(KLS, "KL to the start, nats a token")}


def style(method: str) -> tuple[str, str, str]:
    loss, _, term = method.partition("+")
    return COLORS.get(loss, "tab:gray"), LINES.get(term, "-."), MARKERS.get(term, "D")  # a loss of one's own


def height(log10_p: float, floor: float) -> float:
    """Where a p-value stands: 0 at 0.05, ABOVE at 1, -1 at the floor (a log10)."""
    if log10_p >= LINE:
        return ABOVE * (10**log10_p - 0.05) / 0.95
    return -(LINE - log10_p) / (LINE - floor)


def floor_of(values: list) -> float:
    """The lowest tick that holds all of them: at least three decades below the line."""
    return min([-5.0, *(math.floor(v) for v in values)])


def dual_axis(axes, study: dict, split: str, floor: float):
    """Ticks and the 0.05 line for `height`; in cyan one retrained model against another: median, range."""
    decades = math.ceil((LINE - floor) / 5)
    ticks = {math.log10(p): f"{p:g}" for p in (0.05, 0.5, 1.0)}
    ticks |= {-i: f"$10^{{{-i}}}$" for i in range(decades, 5 * decades + 1, decades) if floor < -i <= -2}
    axes.yaxis.set_major_locator(FixedLocator([height(log, floor) for log in ticks]))
    axes.set_yticklabels(ticks.values())
    axes.axhline(0, color="tab:red", linewidth=0.8, linestyle="--", label="forget quality 0.05")
    axes.axhspan(0, ABOVE, color="black", alpha=0.04, linewidth=0)
    axes.set_ylim(-1.05, ABOVE * 1.08)
    if values := [p["log10"] for p in study.get("ceilings", {}).get(split, [])]:
        low, middle, high = (height(pick(values), floor) for pick in (min, statistics.median, max))
        axes.axhline(middle, color="tab:cyan", linewidth=1.2, linestyle="-.",
                     label="retrained against retrained")
        axes.axhspan(low, high, color="tab:cyan", alpha=0.12, linewidth=0)


def canvas(rows: int, columns: int, width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def panel(axes, study: dict, named: list, key: str, against: str, title: str):
    """A metric over steps or epochs, a line for each (label, runs of seeds); a method's second is
    paler, and more than four have colours of their own."""
    drawn, seen, lines = float, Counter(), Counter(runs[0]["method"] for _, runs in named)
    if key == QUALITY:
        floor = floor_of([q for _, runs in named for r in runs for q in r[QUALITY]])
        drawn = partial(height, floor=floor)
    for label, runs in named:
        method = runs[0]["method"]
        (color, line, marker), alpha = style(method), 0.65 ** seen[method]
        if lines[method] > 4:
            color, line, alpha = f"C{seen[method] % 10}", "-:"[seen[method] // 10 % 2], 1
        steps = runs[0]["steps"]  # seeds have the same
        x = [step / (steps[-1] / runs[0]["epochs"] if against == "epochs" else 1) for step in steps]
        columns = [[r[key][i] for r in runs] for i in range(len(steps))]
        middle, low, high = ([drawn(pick(column)) for column in columns]
                             for pick in (statistics.mean, min, max))
        axes.plot(x, middle, line, color=color, label=label, linewidth=1.4, marker=marker, markersize=3,
                  alpha=alpha)
        if len(runs) > 1:
            axes.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)
        seen[method] += 1
    if key == QUALITY:
        dual_axis(axes, study, named[0][1][0]["split"], floor)
    if key in KLS:
        axes.set_yscale("symlog", linthresh=0.1)
    axes.set(title=title, xlabel=against, ylabel=LABELS[key])
    axes.grid(alpha=0.25)


def finish(figure, path: Path) -> Path:
    """With one legend of all panels below, at most seven entries in a row, as a file."""
    entries = {label: handle for axes in figure.axes
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    inches = max(1.3, 0.75 + 0.055 * max(map(len, entries)))  # an entry
    columns = max(1, min(7, int(figure.get_figwidth() // inches)))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncol=columns, fontsize=8)
    return save(figure, path)


def save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return path


def trade_off(study: dict, path: Path, columns: list) -> Path:
    """Forget quality against utility, a panel a split: each method's point at its peak with the seeds' range,
    the start and the retrained model."""
    figure, panels = canvas(1, len(columns), 5.2 * len(columns), 5.2)
    for axes, (split, named) in zip(panels[0], columns, strict=True):
        runs = [r for _, own in named for r in own]
        floor = floor_of([q for r in runs for q in (r[QUALITY][0], peak(r))])
        for method, own in named:
            color, _, marker = style(method)
            x, y = [r["model_utility"][peak_at(r)] for r in own], [height(peak(r), floor) for r in own]
            middle = statistics.mean(x), height(statistics.mean(map(peak, own)), floor)
            x_error, y_error = ([[max(0, mean - min(values))], [max(0, max(values) - mean)]]
                                for values, mean in zip((x, y), middle, strict=True))
            axes.errorbar(*middle, xerr=x_error, yerr=y_error, fmt=marker, color=color, markersize=7,
                          markerfacecolor=color if "+" in method else "white", elinewidth=0.8, label=method)
        start, quality = (statistics.mean(r[key][0] for r in runs) for key in ("model_utility", QUALITY))
        axes.plot(start, height(quality, floor), "P", color="tab:brown", markersize=10,
                  label="fine-tuned start")
        utilities = [m["model_utility"] for m in study["retrained"]
                     if m["split"] == complement(split) and m.get("model_utility")]
        if utilities:
            axes.plot(statistics.mean(utilities), ABOVE, "*", color="tab:cyan", markersize=14,
                      label="retrained (p = 1)")
        dual_axis(axes, study, split, floor)
        axes.grid(alpha=0.25)
        seeds = sorted({len(own) for _, own in named})
        axes.set(title=f"{split} (seeds: {'-'.join(map(str, seeds))})", xlabel="model utility",
                 ylabel="forget quality at its peak", xlim=(-0.03, 1.08 * axes.get_xlim()[1]))
    return finish(figure, path)


def evolution(study: dict, path: Path, columns: list, keys: tuple = (QUALITY, "model_utility")) -> Path:
    """Metrics below each other, one column a split, over epochs (forget01: over steps)."""
    figure, panels = canvas(len(keys), len(columns), 5.2 * len(columns), 2.2 + 2.6 * len(keys))
    for (title, named), column in zip(columns, panels.T, strict=True):
        against = "steps" if title == STEP_SPLIT else "epochs"
        for axes, key in zip(column, keys, strict=True):
            panel(axes, study, named, key, against, title if key == keys[0] else "")
    return finish(figure, path)


def single_runs(runs: list, path: Path) -> Path:
    """Records of any settings, a line for those that differ in their seed alone; the same method is named by
    what differs of the settings, and by its place too where only data or start do."""
    alike = {}  # settings without the seed -> runs
    for run in runs:
        settings = [run.get(key) for key in COLLECTED if key != "seed"]
        alike.setdefault((*run["steps"], *settings), []).append(run)
    firsts, names = [some[0] for some in alike.values()], []
    for run in firsts:
        same = [r for r in firsts if r["method"] == run["method"]]
        telling = {key: run[key] for key in differing(same) if run.get(key) is not None}
        names.append(" ".join([run["method"], *(
            value if isinstance(value, str) else f"{key.replace('_', ' ')} {value:g}"
            for key, value in telling.items())]))
    if len(set(names)) < len(names):
        names = [f"{place}: {name}" for place, name in enumerate(names, 1)]
    return evolution({}, path, [("forget quality", list(zip(names, alike.values(), strict=True)))])


MAKERS = {"overview": evolution, "2": partial(evolution, keys=(QUALITY, "model_utility", "world_facts_kl")),
          "5": trade_off, "6": evolution, "8": partial(evolution, keys=("forget_kl",)), "9": evolution,
          "retain-weight": evolution, "beyond10": trade_off}


def columns_of(study: dict, figure: str) -> list:
    """A figure's [(title, [(label, its runs)])], of what there are runs for."""
    splits, methods = FIGURES[figure]
    methods, least = [m for m in study["chosen"] if m in methods], 1
    if figure == "retain-weight":
        weights, least = study["budget"]["retain_weights"], 2  # one weight compares nothing
        columns = {"forget10": [(f"weight {w:g}", chosen_runs(study, "forget10", "npo+rt", w))
                                for w in weights]}
    elif figure == "9":
        columns = {f"{split}, tuned weights": [(m, tuned_runs(study, split, m)) for m in methods]
                   for split in splits}
    else:
        columns = {split: [(m, chosen_runs(study, split, m)) for m in methods] for split in splits}
    found = [(title, [(label, runs) for label, runs in named if runs]) for title, named in columns.items()]
    return [(title, named) for title, named in found if len(named) >= least]


def draw(study: dict, figures: list, stem: Path) -> list[Path]:
    """The wanted figures of the paper that the study has runs for, as STEM_figureN.png; their paths."""
    drawn = []
    for figure in figures:
        if figure in MAKERS and (columns := columns_of(study, figure)):
            name = f"figure{figure}" if figure.isdigit() else figure
            drawn.append(MAKERS[figure](study, stem.with_name(f"{stem.name}_{name}.png"), columns))
    return drawn
