"""What `synthetic.py` and `theory_check.py` write: verdicts, a JSON file, a page of Markdown and pictures."""

import json
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from common import InputError, cause_of, write_json


def plain(value, digits: int = 6):
    """Plain JSON values: arrays as lists, floats with `digits` significant digits, infinity as a string."""
    text = json.dumps(value, default=lambda array: array.tolist())
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.{digits}g}"),
                      parse_constant=str)


def verdict(claim: str, holds: bool, **numbers) -> dict:
    """A claim, whether it holds, and the numbers that decide."""
    return {"claim": claim, "holds": bool(holds), "numbers": plain(numbers)}


def judged(judge, curves: dict, steps: np.ndarray) -> list[dict]:
    """Verdicts on the mean of K instances, {name: (K, .., E)}; the numbers tell how each instance is judged.
    `judge` returns {claim: (holds, numbers)} for {name: (.., E)} at `steps` (E,)."""
    stack = np.stack([*curves.values()], 1)
    on_mean, *on_instances = [judge(dict(zip(curves, values, strict=True)), steps)
                              for values in [stack.mean(0), *stack]]
    verdicts = []
    for claim, (holds, numbers) in on_mean.items():
        single = [results[claim] for results in on_instances]
        instances = {"holds": [bool(holds_there) for holds_there, _ in single]} | {
            key: [numbers_there[key] for _, numbers_there in single]
            for key, value in numbers.items() if isinstance(value, float)}
        verdicts.append(verdict(claim, holds, **numbers, share_of_instances=np.mean(instances["holds"]),
                                instances=instances))
    return verdicts


def table(rows: list[dict]) -> str:
    """A Markdown table with one column per key; empty if there are no rows."""
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
             for row in rows]
    lines = [[*rows[0]], ["---"] * len(rows[0]), *cells] if rows else []
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make_folder(path: Path):
    """Make the folder for results. Raises InputError if that is impossible, before the work and not after."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {path} ({cause_of(error)})") from None


def write(stem: Path, record: dict, title: str, *paragraphs: str) -> str:
    """Write STEM.json and STEM.md; return the page: title, command, paragraphs, verdicts."""
    write_json(f"{stem}.json", record)
    verdicts = [{**result, "numbers": json.dumps({key: number for key, number in result["numbers"].items()
                                                  if key != "instances"})}
                for result in record.get("verdicts", [])]
    parts = [f"## {title}", f"`python {record['provenance']['command']}`", *paragraphs, table(verdicts)]
    page = "\n\n".join(parts) + "\n"
    Path(f"{stem}.md").write_text(page, encoding="utf-8")
    return page


def name_lines(axis, curves: dict):
    """Write each curve's name beside its last point; of "_NAME" nothing. Names that would overlap move apart
    vertically."""
    axis.get_ylim()  # fixes the limits, which the transformation needs
    to_panel = axis.transData + axis.transAxes.inverted()
    colors = {name: line.get_color() for name, line in zip(curves, axis.lines, strict=True)}
    curves = {name: curve for name, curve in curves.items() if not name.startswith("_")}
    ends = [to_panel.transform((x[-1], y[-1])) for x, y, *_ in curves.values()]
    order = sorted(range(len(ends)), key=lambda place: ends[place][1])
    gaps = 0.055 * np.arange(len(ends))  # in heights of the panel
    heights = np.maximum.accumulate([ends[place][1] for place in order] - gaps) + gaps
    for height, place in zip(np.minimum(heights, 1 - gaps[::-1]), order, strict=True):  # not above the panel
        name = [*curves][place]
        axis.text(ends[place][0] + 0.02, height, name, color=colors[name], transform=axis.transAxes,
                  va="center", fontsize=8)


def draw(path: Path, title: str, panels: list, styles: dict):
    """A row of panels under a title that states the message. A panel is (settings of axes, {name: (x, y)}),
    and the edges of a band may follow y. `styles` is {name: settings of its line}."""
    figure = Figure(figsize=(max(7, 5 * len(panels)), 4.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (settings, curves) in zip(all_axes, panels, strict=True):
        for place, (name, (x, y, *edges)) in enumerate(curves.items()):
            style = {"color": colormaps["viridis"](place / 6), **styles.get(name, {})}
            axis.plot(x, y, **style)
            if edges:
                axis.fill_between(x, *edges, color=style["color"], alpha=0.13, linewidth=0)
        axis.set(**settings)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        name_lines(axis, curves)
    figure.suptitle(title)
    figure.savefig(path, dpi=200)
