"""What `synthetic.py` and `theory_check.py` write: verdicts, strict JSON, a page of Markdown, pictures."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from support.command_line import markdown_table
from support.files import write_json

# Of the first curve in a panel, the second, ..: told apart in grey too.
STYLES = [{"color": colour, "marker": marker, "linestyle": line} for colour, marker, line in (
    ("#d1495b", "^", "-"), ("0", "o", "--"), ("0.25", "s", "-."), ("0.4", "D", ":"), ("0.55", "v", "--"),
    ("0.7", "P", "-."))]


def plain(value, digits: int = 6):
    """Plain JSON values: numpy unwrapped, floats to `digits` significant digits, infinite ones as strings."""
    text = json.dumps(value, default=lambda array: array.tolist())
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.{digits}g}"),
                      parse_constant=lambda name: str(float(name)))


def verdict(claim: str, holds: bool, **numbers) -> dict:
    return {"claim": claim, "holds": bool(holds), "numbers": plain(numbers)}


def table(rows: list[dict]) -> str:
    """Markdown: a column a key of the first row."""
    cells = [["-" if value is None else f"{value:.4g}" if isinstance(value, float) else value
              for value in row.values()] for row in rows]
    return "\n".join(markdown_table(list(rows[0]), cells))


def write(stem: Path, record: dict, title: str, *paragraphs: str) -> str:
    """STEM.json; and STEM.md, which is returned: title, command, paragraphs."""
    command = f"`python {record['provenance']['command']}`"
    page = "\n\n".join([f"## {title}", command, *paragraphs]) + "\n"
    write_json(f"{stem}.json", record)
    Path(f"{stem}.md").write_text(page)
    return page


def draw(path: Path, panels: list, styles: dict | None = None):
    """Panels in equal rows of at most three: each (settings of its axes, {label: (x, y, *edges of a band)}).
    A label's style goes before that of its place."""
    columns = next(count for count in (3, 2, 1) if len(panels) % count == 0)
    rows = len(panels) // columns
    figure = Figure(figsize=(5 * columns, 4.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (settings, curves) in zip(axes, panels, strict=True):
        for place, (label, (x, y, *edges)) in enumerate(curves.items()):
            style = {"markersize": 4, **STYLES[place % len(STYLES)], **(styles or {}).get(label, {})}
            if edges:
                axis.fill_between(x, *edges, color=style["color"], alpha=0.13)
            axis.plot(x, y, label=label, markevery=max(1, len(x) // 12), **style)
        axis.set(**settings)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
