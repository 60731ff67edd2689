"""The figures of Section 5: which runs each one needs, and its picture, from a study's JSON alone.

A line or a point is the mean over seeds (for forget quality: in decades). A band or a bar goes from the
smallest to the largest seed. The axis of forget quality is linear in the square root of its decades, so that
both 0.5 and 1e-40 can be read. Titles are computed: a method "forgets" if its forget quality lies in the
green band, and "keeps the rest" if at least 80% of the start's utility is left.
"""

import math
import statistics
import textwrap
import zlib
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import metrics
from data.tofu import complement
from study.verdicts import LINE, PRESERVED, best_at_utility, chosen_runs, kept_utility, peak, peak_at

METHODS = ("ga", "ga+rt", "ga+kl", "idk+rt", "dpo", "dpo+rt", "dpo+kl", "kto", "kto+rt", "npo", "npo+rt",
           "npo+kl", "simnpo", "simnpo+rt")
WITH_RT = (*(method for method in METHODS if method.endswith("+rt")),
           "wga+rt", "satimp+rt", "tnpo+rt", "ceu+rt", "undial+rt")  # the newer ones: docs/beyond.md
COLORS = {"ga": "tab:red", "idk": "0.55", "dpo": "tab:blue", "kto": "tab:green", "npo": "black",
          "simnpo": "tab:purple"}
LINES, MARKERS = {"": ":", "rt": "-", "kl": "--"}, {"": "o", "rt": "s", "kl": "^"}  # the term for the rest
QUALITY, UTILITY = "forget_quality_log10", "kept_utility"
PANELS = {QUALITY: ("Forgotten?", "forget quality (p-value)"),  # metric -> title, label of its axis
          UTILITY: ("Rest kept?", "model utility, share of the start's"),
          "forget_kl": ("divergence on the forget set", "KL to the start, nats per token"),
          "world_facts_kl": ("divergence on world facts", "KL to the start, nats per token")}
DPI = 200
BAND = "green: this test does not tell it from a retrained model (p > 0.05)"
ATTACKS = {"relearn: an epoch\non forget rows": ("before", "forget 100%"),  # panel -> state before and after
           "relearn: as long\non retain rows": ("before", "retain"),
           "round weights\nto 4 bits": ("before", "int4"),
           "paraphrase\nthe question": ("before", "paraphrased question"),
           "sample 64 answers\nrather than 1": ("1", "64")}


# ---------------------------------------------------------------- titles

def has_beta(method: str) -> bool:
    return method.split("+")[0] not in ("ga", "idk", "ceu")


def join(names: list) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names or ["no method"])


def message(columns: dict, at=lambda run: -1, when: str = "") -> str:
    """Which methods forget and keep the rest, as means over seeds, at evaluation `at(run)` of each split."""
    winners = {split: [name for name, runs in named.items()
                       if statistics.mean(run[QUALITY][at(run)] for run in runs) > LINE
                       and statistics.mean(kept_utility(run, at(run)) for run in runs) >= PRESERVED]
               for split, named in columns.items()}
    texts = {split: join(names) if len(names) < 6 else f"{len(names)} of {len(columns[split])} methods"
             for split, names in winners.items()}
    if len(texts) > 1:
        return f"Who forgets and keeps 80% of the utility{when}? {'; '.join(map(': '.join, texts.items()))}"
    [(split, text)] = texts.items()
    s = "s" * (len(winners[split]) < 2)
    return f"{text} forget{s} and keep{s} at least 80% of the utility{when}"


def subtitle_of(study: dict, columns: dict) -> str:
    """Model, data, epochs, seeds, lr and beta. Single runs have no common model."""
    named = {name: runs for column in columns.values() for name, runs in column.items()}
    counts, run = sorted(map(len, named.values())), next(iter(named.values()))[0]
    seeds = f"{counts[0]} to {counts[-1]} seeds" if counts[0] < counts[-1] else f"seeds: {counts[0]}"
    model = f"{study['model']} ({study['parameters'] / 1e6:.2g} M parameters)" if "model" in study else (
        "single runs")
    source = "lr and β of the preset" if study.get("choices_from") else "lr and β tuned for each method"
    if not study.get("choices_from") and (len(named) < 5 or "model" not in study):
        source = "; ".join(f"{name}: lr {runs[0]['lr']:.2g}" + f", β {runs[0]['beta']:g}" * has_beta(name)
                           + f", weight {runs[0]['retain_weight']:g}" * (runs[0]["retain_weight"] > 1)
                           for name, runs in named.items() if " " not in name)
    data = study.get("data") or run["data"]
    epochs = sorted({run["epochs"] for runs in named.values() for run in runs})
    return f"{model}, {data}, {' or '.join(map(str, epochs))} epochs, {seeds}; {source}".strip("; ")


# ---------------------------------------------------------------- axes, lines, names

def style(name: str) -> dict:
    loss, _, term = name.split(" ")[0].partition("+")
    other = f"C{zlib.crc32(loss.encode()) % 10}"  # an objective of one's own keeps its colour in all pictures
    return {"color": COLORS.get(loss, other), "linestyle": LINES.get(term, "-."),
            "marker": MARKERS.get(term, "D")}


def canvas(rows: int, columns: int, height: float, **shared):
    figure = Figure(figsize=(11, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def save(figure, path: Path, title: str, subtitle: str, note: str = BAND) -> Path:
    """Write the picture: its message as the title, below it the settings and what is green."""
    title, height = textwrap.fill(title, 90), figure.get_figheight()
    figure.suptitle(f"{title}\n\n", fontsize=13, fontweight="bold")
    top = 1 - (0.4 + 0.22 * title.count("\n")) / height
    for line, color, place in ((subtitle, "0.35", top), (note, "green", top - 0.17 / height)):
        figure.text(0.5, place, line, ha="center", va="top", fontsize=9, color=color)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})  # the same JSON gives the same bytes
    return path


def agreements(study: dict, split: str) -> list[dict]:
    """How far retrained models differ from each other in log R: a record for each pair."""
    ratios = [np.array(model["log_truth_ratios"]) for model in study.get("retrained", [])
              if model["split"] == complement(split) and "log_truth_ratios" in model]
    return [metrics.agreement(x, y) for x, y in combinations(ratios, 2) if len(x) == len(y)]


def name_points(axes, points: dict, title: str):
    """The title, and each name beside the panel, joined to its point (x, y). Close names move apart."""
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.get_ylim()  # fixes the limits, which the transformation below needs
    to_panel = axes.transData + axes.transAxes.inverted()
    heights = {name: to_panel.transform(point)[1] for name, point in points.items()}
    names = sorted(heights, key=heights.get)
    line = 0.17 * axes.get_gridspec().nrows / axes.figure.get_figheight()  # of text, in panel heights
    ends = np.array([heights[name] for name in names]) - line * np.arange(len(names))
    places = (np.maximum.accumulate(ends) + np.minimum.accumulate(ends[::-1])[::-1]) / 2
    for i, (name, place) in enumerate(zip(names, places, strict=True)):
        arrow = {"arrowstyle": "-", "color": style(name)["color"], "linewidth": 0.5, "shrinkA": 0}
        axes.annotate(name, points[name], (1.04, place + line * i), textcoords="axes fraction", fontsize=8,
                      color=style(name)["color"], va="center", arrowprops=arrow)


def curve(run: dict, key: str) -> list:
    return [kept_utility(run, i) for i in range(len(run["steps"]))] if key == UTILITY else run[key]


def bars(axes, x: list, y: list, look: dict) -> tuple:
    """A point at the mean over seeds of x and y, with bars from the smallest to the largest; the point."""
    middle = statistics.mean(x), statistics.mean(y)
    ranges = [[[max(0, mean - min(seeds))], [max(0, max(seeds) - mean)]]
              for mean, seeds in zip(middle, (x, y), strict=True)]
    axes.errorbar(*middle, *ranges[::-1], elinewidth=0.8, **look | {"linestyle": ""})
    return middle


# ---------------------------------------------------------------- pictures: (study, path, columns) -> path

def draw_evolution(study: dict, path: Path, columns: dict, keys: tuple = (QUALITY, UTILITY)) -> Path:
    """Metrics over the run: a row of panels for each split, a panel for each metric."""
    figure, panels = canvas(len(columns), len(keys), 1.6 + (2.8 if len(keys) > 1 else 4) * len(columns))
    for ((split, named), key), axes in zip(product(columns.items(), keys), panels.flat, strict=True):
        points = {}
        for place, (name, runs) in enumerate(named.items()):
            epochs = np.array(runs[0]["steps"]) / runs[0]["steps"][-1] * runs[0]["epochs"]
            seeds, look = np.array([curve(run, key) for run in runs]), style(name)
            if " " in name:  # several settings of one method
                look["marker"] = "osD^vP*X"[place % 8]
            axes.plot(epochs, seeds.mean(0), markersize=3.5, **look)
            axes.fill_between(epochs, seeds.min(0), seeds.max(0), color=look["color"], alpha=0.1, linewidth=0)
            points[name] = epochs[-1], seeds.mean(0)[-1]
        if key == QUALITY:
            metrics.quality_axis(axes, min(min(run[QUALITY]) for runs in named.values() for run in runs),
                                 floor=agreements(study, split))
        elif key == UTILITY:
            axes.set_ylim(bottom=-0.03)
        else:
            axes.set_yscale("symlog", linthresh=0.1)
        axes.margins(x=0)
        axes.set(xlabel="epoch", ylabel=PANELS[key][1])
        name_points(axes, points, f"{split}: {PANELS[key][0]}")
    if QUALITY in keys:
        return save(figure, path, message(columns), subtitle_of(study, columns))
    ends = [f"{name} {points[name][1]:.2g}" for name in ("ga", "ga+rt", "npo", "npo+rt") if name in points]
    title = f"Divergence from the start at the end, nats per token: {', '.join(ends)}"
    return save(figure, path, title, subtitle_of(study, columns), "")


def draw_points(study: dict, path: Path, columns: dict, keys: tuple = (QUALITY,)) -> Path:
    """Metrics at each run's peak, a point for each name: against utility, or with two metrics against the
    retain weight. A panel for each split and metric."""
    figure, panels = canvas(1, len(columns) * len(keys), 5)
    label = PANELS[UTILITY][1] if len(keys) == 1 else "retain weight"
    for axes, ((split, named), key) in zip(panels[0], product(columns.items(), keys), strict=True):
        points = {}
        for name, runs in named.items():
            x = [kept_utility(run, peak_at(run)) if len(keys) == 1 else run["retain_weight"] for run in runs]
            points[name] = bars(axes, x, [curve(run, key)[peak_at(run)] for run in runs], style(name))
        if key == QUALITY:
            metrics.quality_axis(axes, min(peak(run) for runs in named.values() for run in runs),
                                 floor=agreements(study, split))
        axes.set(xlabel=label, ylabel=PANELS[key][1])
        name_points(axes, points, split if len(keys) == 1 else PANELS[key][0])
    title = message(columns, peak_at, " at the peak")
    if len(keys) > 1:
        best = max(named.values(), key=lambda runs: statistics.mean(map(peak, runs)))[0]
        title = f"{best['method']} forgets best with a retain weight of {best['retain_weight']:g}"
    return save(figure, path, title, subtitle_of(study, columns))


def best_later(run: dict) -> float | None:
    """The best log10 forget quality with 90% of the utility after the start."""
    best = best_at_utility(run, 0.9, first=1)
    return best if best > -math.inf else None


def values(records: list, key: str) -> list:
    """A number of each record, or the last of a curve (`mia`: the AUC of min-k), where it was measured."""
    numbers = [record.get(key, {}).get("min_k") if key == "mia" else record.get(key) for record in records]
    numbers = [number[-1] if isinstance(number, list) else number for number in numbers]
    return [number for number in numbers if number is not None]


def draw_objectives(study: dict, path: Path, columns: dict) -> Path:
    """Objectives with a retain term: forget quality at equal utility, memorisation, membership."""
    named = columns["forget10"]
    best = {name: [q for q in map(best_later, runs) if q is not None] for name, runs in named.items()}
    means = {name: statistics.mean(seeds or [-math.inf]) for name, seeds in best.items()}
    order = sorted(named, key=means.get)
    winners = [name for name in order[::-1] if means[name] > LINE and len(best[name]) == len(named[name])]
    lowest = min((min(seeds) for seeds in best.values() if seeds), default=-4)
    keys = {"best forget quality with\n90% of the utility": "", "PrivLeak\nat the end": "privleak",
            "extraction strength\nat the end": "forget_extraction_strength"}
    figure, panels = canvas(1, len(keys), 1.6 + 0.32 * len(named), sharey=True)
    for axes, (title, key) in zip(panels[0], keys.items(), strict=True):
        for place, name in enumerate(order):
            color = "green" if name in winners else "tab:red"
            if seeds := values(named[name], key) if key else best[name]:
                bars(axes, seeds, [place], {"color": color, "marker": "o"})
            elif not key:
                axes.text(lowest, place, "never after the start", color=color, fontsize=8, va="center")
        if key:
            models = [model for model in study["retrained"] if model["split"] == "retain90"]
            control = 0 if key == "privleak" else statistics.mean(values(models, key))
            axes.axvline(control, color="green", linewidth=1)
            axes.text(control, len(order) - 0.4, " retrained", color="green", fontsize=8)
        axes.grid(alpha=0.25)
        axes.set(title=title, yticks=range(len(order)), yticklabels=order, ylim=(-0.6, len(order) + 0.3))
    metrics.quality_axis(panels[0, 0], lowest, "x")
    title = f"{join(winners)} forget{'s' * (len(winners) < 2)} with 90% of the utility kept"
    return save(figure, path, title, subtitle_of(study, columns))


def attacked(columns: dict) -> dict:
    """Method -> what the attacks found for each seed, state -> number. "(retrained)" and "(start)" are the
    controls, attacked alike."""
    attacks = {name: [run["attacks"] for run in runs] for name, runs in columns["forget10"].items()}
    most = max(attacks.values(), key=len)
    models = {f"({name})": [seed[name] for seed in most] for name in ("retrained", "start")}
    models |= {name: [seed["model"] for seed in seeds] for name, seeds in attacks.items()}
    return {name: [{**seed, **seed["leak"]} for seed in seeds] for name, seeds in models.items()}


def draw_attacks(study: dict, path: Path, columns: dict) -> Path:
    """Extraction strength of forget answers (samples: leak@k) before and after each attack, as arrows."""
    models, returning = attacked(columns), set()
    relearned = {name: statistics.mean(values(models[name], "forget 100%")) for name in columns["forget10"]}
    order = sorted(relearned, key=relearned.get, reverse=True)
    figure, panels = canvas(1, len(ATTACKS), 1.8 + 0.32 * len(order), sharey=True)
    for axes, (title, states) in zip(panels[0], ATTACKS.items(), strict=True):
        limit = max(values(models["(retrained)"], states[1]))
        for place, name in enumerate(order):
            before, after = (statistics.mean(values(models[name], state)) for state in states)
            returning |= {name} if after > limit else set()
            look = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0,
                    "color": "tab:red" if after > limit else "black"}
            axes.plot([before], [place], "o", color=look["color"], markersize=4)
            if abs(after - before) > 0.05:  # a shorter arrow is hidden by its point
                axes.annotate("", (after, place), (before, place), arrowprops=look)
        axes.axvspan(-0.04, limit, color="tab:green", alpha=0.15, linewidth=0)
        axes.grid(alpha=0.25)
        axes.set_title(title, fontsize=10)
        axes.set(yticks=range(len(order)), yticklabels=order, xlim=(-0.04, 1.04))
    safe = join([name for name in order[::-1] if name not in returning])
    note = "extraction strength (last panel: leak@k); dot: before; green: no more than in a retrained model"
    return save(figure, path, f"Attacks find no more than in a retrained model: {safe}",
                subtitle_of(study, columns), note)


# ---------------------------------------------------------------- figure -> (title, splits, names, draw)

# A name is a method, or METHOD@RETAIN_WEIGHT. A figure without a function to draw it is a table.
FORGET10, SMALL = ("forget10",), ("forget01", "forget05", "forget10")
FIGURES = {
    "overview": ("Five methods over the run", FORGET10, ("ga", "ga+rt", "idk+rt", "npo", "npo+rt"),
                 draw_evolution),
    "2": ("Figure 2: forget05, with the divergence", SMALL[1:2], ("ga", "ga+rt", "npo", "npo+rt"),
          partial(draw_evolution, keys=(QUALITY, UTILITY, "world_facts_kl"))),
    "5": ("Figure 5: at each method's peak", SMALL, METHODS, draw_points),
    "6": ("Figure 6: over the run", SMALL, ("ga", "npo", *WITH_RT[:6]), draw_evolution),
    "7": ("Figure 7: answers", FORGET10, METHODS, None),
    "8": ("Figure 8: divergence", FORGET10, METHODS, partial(draw_evolution, keys=("forget_kl",))),
    "9": ("Figure 9: forget50 and forget90 with tuned weights", ("forget50", "forget90"),
          ("ga", "ga+rt@tuned", "npo", "npo+rt@tuned", "dpo+rt@tuned"), draw_evolution),
    "retain-weight": ("The retain weight of npo+rt", FORGET10, ("npo+rt@0", "npo+rt@0.5", "npo+rt",
                      "npo+rt@2", "npo+rt@5"), partial(draw_points, keys=(QUALITY, UTILITY))),
    "beyond10": ("Beyond 10%: as Figure 5", ("forget20", "forget30"),
                 ("npo", "npo+rt", "ga+rt", "dpo+rt", "idk+rt"), draw_points),
    "objectives": ("Beyond the paper: newer objectives, sharper metrics", FORGET10, WITH_RT,
                   draw_objectives),
    "attacks": ("Beyond the paper: extraction strength before and after each attack", FORGET10, WITH_RT,
                draw_attacks)}


def columns_of(study: dict, figure: str) -> dict:
    """Split -> {name: runs} of a figure, for the names with runs; of `attacks`: with attacked runs."""
    columns, (_, splits, names, _) = {}, FIGURES[figure]
    for split, name in product(splits, names):
        runs = chosen_runs(study, split, name)
        if figure == "attacks":
            runs = [run for run in runs if "model" in run.get("attacks", {})]
        if runs:
            label = name.replace("@tuned", " tuned").replace("@", " weight ")
            columns.setdefault(split, {})[label] = runs
    return columns


def columns_of_single(runs: list, shared: tuple = ("seed",)) -> dict:
    """The same of single runs, named by the settings in which the runs of a method differ. Runs that differ
    in the `shared` settings or in their start have one name."""
    columns, hidden = {}, {*shared, "split", "data", "model", "command", "commit", "start_weights", "memory",
                           "total_steps"}
    for run in runs:
        alike = [other for other in runs if other["method"] == run["method"]]
        telling = [f"{key.replace('_', ' ')} {value}".removesuffix(".0") for key, value in run.items()
                   if key not in hidden and not isinstance(value, list | dict)
                   and len({other.get(key) for other in alike}) > 1]
        columns.setdefault(run["split"], {}).setdefault(" ".join([run["method"], *telling]), []).append(run)
    return columns


def picture_of(stem: Path, figure: str) -> Path:
    return stem.with_name(f"{stem.name}_{'figure' * figure.isdigit()}{figure}.png")
