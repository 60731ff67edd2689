"""What `synthetic.py` writes: a run's JSON, the pictures of Figures 3 and 4, a page of Markdown."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from support.files import write_json

DISTANCES = ("forget_distance", "retain_distance")
# Black, dark and light by family, line by retain term, marker by family: told apart in grey.
STYLE = {"npo": ("#000000", "o"), "dpo": ("#1b7fb8", "s"), "ga": ("#d1495b", "^"), "idk": ("#8f8f8f", "D")}
DASHES = {"rt": "-", "": "--", "kl": ":"}


def tidy(value, digits: int):
    """Plain JSON values: numpy unwrapped, floats to `digits` significant digits, infinite ones as strings."""
    if isinstance(value, dict):
        return {str(key): tidy(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [tidy(item, digits) for item in value]
    if isinstance(value, (float, np.floating)):
        return str(float(value)) if math.isinf(value) else float(f"{value:.{digits}g}")
    return value.item() if isinstance(value, np.generic) else value


def statistics(distance: np.ndarray, fresh: bool) -> dict:
    """Mean and sd (ddof 0) over the K instances, (K, E); for fresh ones the median and 10-90% band too."""
    mean = distance.mean(0)
    finite = np.where(np.isfinite(mean), distance, 0)  # the spread of an infinite mean is infinite
    result = {"mean": mean, "sd": np.where(np.isfinite(mean), finite.std(0), math.inf)}
    if fresh:
        for key, rank in {"median": 0.5, "p10": 0.1, "p90": 0.9}.items():
            # between two instances, one of them perhaps infinite
            quantile = np.quantile(np.minimum(distance, 1e300), rank, axis=0)
            result[key] = np.where(quantile > 1e290, math.inf, quantile)
    return result | {"instances": distance}


def curves_record(alpha: float, methods: list, curves: np.ndarray, steps: list, fresh: bool) -> dict:
    """What a figure shows, from curves (K, M, 2, E): settings and curves of all methods."""
    record = {"alpha": alpha, "start": {}, "methods": {}}
    for m, method in enumerate(methods):
        entry = record["methods"][method.name] = {"lr": method.lr, "beta": method.beta, "steps": steps}
        for axis, key in enumerate(DISTANCES):
            entry[key] = statistics(curves[:, m, axis], fresh)
            # step 0 is every method's
            record["start"][key] = {name: entry[key][name][0] for name in ("mean", "sd")}
    return record


def instances_of(record: dict) -> int:
    return len(next(iter(record["methods"].values()))["forget_distance"]["instances"])


def has_median(record: dict) -> bool:
    return "median" in next(iter(record["methods"].values()))["forget_distance"]


# ---------------------------------------------------------------------------------------------- pictures


def band(own: dict, middle: str) -> tuple:
    """Lower and upper edge around the mean (1 sd, cut for the log axis) or the median (10-90%)."""
    if middle == "median":
        return own["p10"], own["p90"]
    sd = np.where(np.isfinite(own["mean"]), own["sd"], 0)
    return np.maximum(own["mean"] - sd, 0.1 * own["mean"]), own["mean"] + sd


def draw_figure4(path: Path, methods: list, record: dict):
    """Distances over steps and against each other: (a1)-(a3); alpha = 0: (b). A row of panels a statistic."""
    alpha, rows = record["alpha"], {"mean": "mean, band $\\pm$ 1 sd"}
    if has_median(record):
        rows["median"] = "median, band 10-90%"
    figure = Figure(figsize=(15, 4.6 * len(rows)), layout="constrained")
    letters = ("(a1)", "(a2)", "(a3)") if alpha > 0 else ("(b)", "(b)", "(unpublished)")
    scale = "log" if alpha > 0 else "linear"
    for (middle, told), axes in zip(rows.items(), figure.subplots(len(rows), 3, squeeze=False), strict=True):
        for method in methods:
            own, (colour, marker) = record["methods"][method.name], STYLE[method.family]
            style = {"color": colour, "marker": marker, "linestyle": DASHES[method.retain], "markersize": 4,
                     "linewidth": 1.4, "markevery": max(1, len(own["steps"]) // 8), "label": method.name}
            for axis, key in zip(axes, DISTANCES, strict=False):
                axis.plot(own["steps"], own[key][middle], **style)
                low, high = band(own[key], middle)
                axis.fill_between(own["steps"], low, high, color=colour, alpha=0.13, linewidth=0)
            axes[2].plot(own["forget_distance"][middle], own["retain_distance"][middle], **style)
        start = [own[key][middle][0] for key in DISTANCES]
        axes[2].plot(*start, "*", color="black", markersize=14, label="start ($\\pi_{ref}$)")
        axes[0].set(title=f"{letters[0]} forget distance ({told})", xlabel="step", yscale="log",
                    ylabel="KL($\\pi_{retr}$ || $\\pi_\\theta$), nats")
        axes[1].set(title=f"{letters[1]} retain distance ({told})", xlabel="step", yscale="log")
        axes[2].set(title=f"{letters[2]} retain against forget distance ({middle})", xlabel="forget distance",
                    ylabel="retain distance", xscale=scale, yscale=scale)
        axes[2].legend(fontsize=8, ncols=2)
        for axis in axes:
            axis.grid(alpha=0.25)
    kind = "fresh" if has_median(record) else "published"
    figure.suptitle(f"Figure 4, $\\alpha$ = {alpha:g}, {instances_of(record)} {kind} instances")
    figure.savefig(path, dpi=110)


def draw_figure3(path: Path, methods: list, record: dict):
    """Retain against forget distance, ga and npo at several beta: the means, as published, and one instance.

    For fresh instances the medians too, with the 10-90% band of the forget distance (ga, last beta).
    """
    fresh = has_median(record)
    titles = [f"Figure 3: mean of {instances_of(record)} instances", "the first instance by itself"]
    titles += ["median, band 10-90% (ga, last $\\beta$)"] if fresh else []
    figure = Figure(figsize=(6 * len(titles), 4.8), layout="constrained")
    axes = figure.subplots(1, len(titles), sharex=True, sharey=True)
    shades = ["#d1495b", *(str(shade) for shade in np.linspace(0, 0.7, len(methods) - 1))]
    dashes = ("-", "--", "-.", ":", "--", "-.")
    for method, shade, dash, marker in zip(methods, shades, dashes, "^osDvP", strict=True):
        forget, retain = (record["methods"][method.name][key] for key in DISTANCES)
        paths = [(forget["mean"], retain["mean"]), (forget["instances"][0], retain["instances"][0])]
        paths += [(forget["median"], retain["median"])] if fresh else []
        for axis, (x, y) in zip(axes, paths, strict=True):
            axis.plot(x, y, dash, color=shade, marker=marker, markevery=max(1, len(x) // 12), markersize=5,
                      label=method.name)
        if fresh and method in (methods[0], methods[-1]):
            axes[2].fill_betweenx(retain["median"], forget["p10"], forget["p90"], color=shade, alpha=0.2,
                                  linewidth=0)
    for axis, (x, y), title in zip(axes, paths, titles, strict=True):
        axis.plot(x[0], y[0], "*", color="black", markersize=14, label="start ($\\pi_{ref}$)")
        axis.set(xscale="log", yscale="log", xlabel="forget distance", title=title)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("retain distance")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------------- pages


def table(columns: tuple, rows: list) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def setting(row: dict) -> list[str]:
    return [f"{row['lr']:g}", "-" if row["beta"] is None else f"{row['beta']:g}"]


def method_row(name: str, own: dict) -> list[str]:
    forget = own["forget_distance"]["mean"]
    cells = [name, *setting(own), f"{forget.min():.4g}", str(own["steps"][forget.argmin()])]
    for key in DISTANCES:
        median = np.median(own[key]["instances"][:, -1])
        cells += [f"{own[key]['mean'][-1]:.4g}", f"{own[key]['sd'][-1]:.2g}", f"{median:.4g}"]
    return cells


def claim_row(item: dict) -> list[str]:
    numbers = item["numbers"]
    five = f"{numbers['holds_in_means_of'][5]:.0%}" if "holds_in_means_of" in numbers else "-"
    return [item["claim"], "holds" if item["holds"] else "**fails**", f"{numbers['share_of_instances']:.0%}",
            five, str(numbers.get("seeds_needed", "-"))]


def figure_page(title: str, record: dict) -> str:
    """What a run found, in Markdown: the start, every method's distances, the verdicts."""
    instances, told = instances_of(record), record["provenance"]["instances"]
    start = ", ".join(f"{key.replace('_', ' ')} {own['mean']:.4g}" for key, own in record["start"].items())
    claims = [claim_row(item) for item in record["verdicts"]]
    for item in record["undecided"]:
        claims.append([item["claim"], f"undecided, needs {item['needs']}", "", "", ""])
    lines = [f"## {title}", "", f"`python {record['provenance']['command']}`", "",
             f"Start: {start} (means over {instances} instances: {told}).", "",
             *table(("method", "lr", "beta", "least forget", "at step", "final forget: mean", "sd", "median",
                     "final retain: mean", "sd", "median"),
                    [method_row(name, own) for name, own in record["methods"].items()]), "",
             *table(("claim", "on the mean", "instances", "means of five", "seeds needed"), claims)]
    if instances >= 20:
        lines += ["", "Instances: the share in which the claim holds by itself. Means of five: the share of "
                  "means of five instances, drawn from these, that show it. Seeds needed: the fewest whose "
                  "mean gives the first column's answer in 95% of draws."]
    return "\n".join(lines) + "\n"


def grid_row(name: str, item: dict) -> list[str]:
    cells = [name, f"{item['stable_settings']} of {item['settings']}"]
    for row in (item["chosen"], item["published"]):
        found = ["not on this grid", "", ""]
        if "stable" in row:
            found = [*(f"{row[key]:.4g}" for key in DISTANCES), "yes" if row["stable"] else "**no**"]
        cells += [*setting(row), *found]
    return cells


def grid_page(record: dict) -> str:
    columns = ("method", "stable settings", "chosen lr", "beta", "forget", "retain", "stable",
               "published lr", "beta", "forget", "retain", "stable")
    grid = f"lr in {record['grid']['lr']}, beta in {record['grid']['beta']}."
    rows = [grid_row(name, item) for name, item in record["chosen"].items()]
    return "\n".join([f"## Grid search, alpha = {record['alpha']:g}", "",
                      f"`python {record['provenance']['command']}`", "", record["criterion"], "", grid, "",
                      *table(columns, rows)]) + "\n"


def write(out: Path, stem: str, record: dict, page: str):
    write_json(out / f"{stem}.json", record)
    (out / f"{stem}.md").write_text(page)
    print(f"{page}\nwritten: {out}/{stem}.*\n")


def write_figure(out: Path, figure: int, methods: list, record: dict):
    stem, title = f"synthetic_alpha{record['alpha']:g}", f"Figure 4, alpha = {record['alpha']:g}"
    draw = draw_figure4
    if figure == 3:
        stem, title, draw = "synthetic_figure3", "Figure 3", draw_figure3
    draw(out / f"{stem}.png", methods, record)
    digits = 10 if instances_of(record) <= 10 else 6  # of fifty instances' curves: a file below 1 MB
    rounded = tidy(record, digits) | {key: tidy(record[key], 6) for key in ("verdicts", "undecided")}
    write(out, stem, rounded, figure_page(title, record))


def write_grid(out: Path, record: dict):
    write(out, f"synthetic_alpha{record['alpha']:g}_grid", tidy(record, 10), grid_page(record))
