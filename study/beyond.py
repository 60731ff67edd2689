"""What came after the paper, from the study's JSON: who forgets best, and who stays forgotten.

It draws two pictures and writes one page, results/beyond.md; docs/beyond.md says how to read each number.
"""

import math
import statistics
from functools import partial
from pathlib import Path

from study.grid import FIGURES, NEWER
from study.pages import mean_sd
from study.pictures import LABELS, QUALITY, canvas, dual_axis, floor_of, height, save, style
from study.verdicts import best_at_utility, chosen_runs, kept_utility, last
from support.command_line import markdown_table

SPLIT, UTILITY = "forget10", 0.9  # share of the start's utility at which objectives are compared
STATES = {"before": "before", "forget 100%": "relearned", "retain": "after retain rows", "int8": "8 bits",
          "int4": "4 bits", "nf4": "NF4", "paraphrased question": "paraphrased", "prefix": "answer begun",
          "few-shot": "few-shot"}  # of an attack -> column
LEAKS = ("1", "64")
CONTROLS = ("retrained", "start")


def objectives(study: dict) -> dict:
    """method -> its runs of the reported seeds; none where the study has no newer objective."""
    found = {method: chosen_runs(study, SPLIT, method) for method in FIGURES["objectives"][1]}
    found = {method: runs for method, runs in found.items() if runs}
    return found if found.keys() & set(NEWER) else {}


def attacked(study: dict) -> dict:
    """method -> what attacks found of its seeds; "(retrained)" and "(start)" are the controls."""
    found = {m: [r["attacks"] for r in runs if "attacks" in r] for m, runs in objectives(study).items()}
    found = {method: attacks for method, attacks in found.items() if attacks}
    most = max(found.values(), key=len, default=[])
    controls = {f"({name})": [a[name] for a in most if name in a] for name in CONTROLS}
    return controls | {method: [a["model"] for a in attacks] for method, attacks in found.items()}


def at_the_end(name: str, runs: list) -> list:
    """A sharper metric's values, one a run; `mia` is of min-k."""
    values = [r["mia"]["min_k"][-1] if name == "mia" else r[name][-1] for r in runs]
    return [value for value in values if value is not None]


def objectives_table(study: dict) -> list[str]:
    """Means over seeds and their standard deviations; the retrained models below."""
    keys = ("forget_extraction_strength", "forget_paraphrase_probability", "mia", "privleak")
    rows = [[method, f"{runs[0]['lr']:g}", len(runs), mean_sd([best_at_utility(r, UTILITY) for r in runs]),
             mean_sd([last(r) for r in runs]), mean_sd([kept_utility(r) for r in runs]),
             *(mean_sd(at_the_end(key, runs)) for key in keys)] for method, runs in objectives(study).items()]
    models = retrained(study)
    if models:
        rows.append(["(retrained)", "", len(models), "", "", "",
                     *(mean_sd(at_the_end(key, models)) for key in keys[:3]), "0"])
    best = f"best log10 forget quality at {UTILITY:.0%} of the utility"
    return markdown_table(["method", "lr", "seeds", best, "last log10 forget quality", "utility / start",
                           "extraction strength", "paraphrase probability", "AUC min-k", "PrivLeak"], rows)


def retrained(study: dict) -> list:
    """The retrained models of the split, those with sharper metrics."""
    return [m for m in study["retrained"] if m["split"] == "retain90" and "mia" in m]


def attacks_table(study: dict) -> list[str]:
    """Extraction strength before and after each attack, steps of relearning to halfway, leak@k."""
    found, rows = attacked(study), []
    for name, models in found.items():
        cells = [mean_sd([m[what] for m in models if what in m]) for what in STATES]
        steps = [m.get("halfway", {}).get("forget 100%") for m in models]
        reached = [n for n in steps if n is not None]
        halfway = f"{statistics.mean(reached):.1f}" if reached else "-"
        if reached and len(reached) < len(steps):
            halfway += f" ({len(reached)} of {len(steps)})"
        leaks = [mean_sd([m["leak"][k] for m in models if "leak" in m]) for k in LEAKS]
        rows.append([name, len(models), *cells, halfway, *leaks])
    return markdown_table(["model", "seeds", *STATES.values(), "steps to halfway",
                           *(f"leak@{k}" for k in LEAKS)], rows if len(found) > len(CONTROLS) else [])


def page(studies: dict) -> str:
    """results/beyond.md from the JSON of every study; name -> study."""
    lines = ["# Beyond the paper: newer objectives, sharper metrics, attacks", "",
             "Written by `python figures_tofu.py` (again with `--draw-only`) from the JSON in `tofu/`. Each "
             "method has retain weight 1 and the study's budget of learning rates and betas. Means over "
             "seeds ± their standard deviation. docs/beyond.md says how to read each number.", ""]
    for name, study in studies.items():
        head = f"## {study['data']}, {study['model']}, {SPLIT}: who"
        if objectives(study):
            lines += [f"{head} forgets best", "", f"![objectives](tofu/{name}_objectives.png)", "",
                      *objectives_table(study), ""]
        if attacks := attacks_table(study):
            lines += [f"{head} stays forgotten", "",
                      "Extraction strength of forget rows, before and after each attack.", "",
                      f"![attacks](tofu/{name}_attacks.png)", "", *attacks, ""]
    return "\n".join(lines).rstrip() + "\n"


def points(axes, columns: dict, drawn=float):
    """A point for the mean of each method's values, a bar from the smallest to the largest."""
    for place, (method, values) in enumerate(columns.items()):
        if not values:
            continue
        color, _, marker = style(method)
        middle, low, high = (drawn(pick(values)) for pick in (statistics.mean, min, max))
        axes.errorbar(place, middle, yerr=[[max(0, middle - low)], [max(0, high - middle)]], fmt=marker,
                      color=color, markersize=7, elinewidth=1)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.grid(alpha=0.25)


def draw(study: dict, stem: Path) -> list[Path]:
    """Both pictures, where the study has runs for them: STEM_objectives.png, STEM_attacks.png."""
    drawn = [draw_objectives(study, stem.with_name(f"{stem.name}_objectives.png")),
             draw_attacks(study, stem.with_name(f"{stem.name}_attacks.png"))]
    return [path for path in drawn if path]


def draw_objectives(study: dict, path: Path) -> Path | None:
    """Forget quality at equal utility, what is left of the answers, and whether membership shows."""
    named = objectives(study)
    if not named:
        return None
    figure, ((quality, extraction, leak),) = canvas(1, 3, 16, 4.6)
    best = {m: [best_at_utility(r, UTILITY) for r in runs] for m, runs in named.items()}
    floor = floor_of([value for values in best.values() for value in values])
    points(quality, best, partial(height, floor=floor))
    dual_axis(quality, study, SPLIT, floor)
    quality.set(title=f"best with {UTILITY:.0%} of the start's utility", ylabel=LABELS[QUALITY])
    for axes, key, title, control in (
            (extraction, "forget_extraction_strength", "extraction strength, end of the run",
             at_the_end("forget_extraction_strength", retrained(study))),
            (leak, "privleak", "PrivLeak, end of the run", [0])):
        points(axes, {m: at_the_end(key, runs) for m, runs in named.items()})
        axes.set_title(title)
        if control:
            axes.axhline(statistics.mean(control), color="tab:cyan", linestyle="-.", label="retrained")
            axes.legend(fontsize=8)
    return save(figure, path)


def mean_after(models: list, what: str) -> float:
    """Of extraction strength after an attack, or of leak@what; nan where none was attacked so."""
    values = [(m.get("leak", {}) if what in LEAKS else m).get(what, math.nan) for m in models]
    return statistics.mean(values) if values else math.nan


def draw_attacks(study: dict, path: Path) -> Path | None:
    """Before and after relearning, rounded and asked otherwise, and what sampling finds."""
    found = attacked(study)
    methods = {name: models for name, models in found.items() if not name.startswith("(")}
    if not methods:
        return None
    figure, panels = canvas(1, 3, 16, 4.6)
    shown = ((("before", "forget 100%", "retain"), "extraction strength: relearning"),
             (("before", "int4", "paraphrased question"), "rounding to 4 bits, another wording"),
             (LEAKS, "sampling: leak@k"))
    for axes, (whats, title) in zip(panels[0], shown, strict=True):
        for what, marker, color in zip(whats, "o^s", ("black", "tab:red", "tab:blue"), strict=False):
            means = {name: mean_after(models, what) for name, models in found.items()}
            axes.plot(range(len(methods)), [means[m] for m in methods], marker, color=color,
                      label=STATES.get(what, f"leak@{what}"))
            axes.axhline(means["(retrained)"], color=color, linewidth=0.9, linestyle="-.")
        axes.set_xticks(range(len(methods)), methods, rotation=45, ha="right")
        axes.set(title=title, ylim=(-0.02, 1.3))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, title="lines: the retrained model's", title_fontsize=7)
    return save(figure, path)
