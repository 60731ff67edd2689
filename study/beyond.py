"""What came after the paper, from the study's JSON: who forgets best, and who stays forgotten.

Two pictures and two tables of the study's page; docs/beyond.md says how to read each number.
"""

import statistics
from pathlib import Path

import numpy as np

from study.grid import FIGURES, NEWER
from study.pictures import canvas, save
from study.verdicts import LINE, best_at_utility, chosen_runs, kept_utility, last, mean_sd
from support.command_line import markdown_table

SPLIT, UTILITY = "forget10", 0.9  # share of the start's utility at which objectives are compared
# What attacks find -> column: extraction strength in a state, steps of relearning, leak@k.
STATES = {"before": "before", "forget 100%": "relearned", "retain": "after retain rows", "int8": "8 bits",
          "int4": "4 bits", "nf4": "NF4", "paraphrased question": "paraphrased", "prefix": "answer begun",
          "few-shot": "few-shot", "halfway": "steps to halfway", "1": "leak@1", "64": "leak@64"}
SHOWN = {"extraction strength, relearning": ("before", "forget 100%", "retain"),  # of these, in the picture
         "extraction strength, rounding, another wording": ("before", "int4", "paraphrased question"),
         "sampling, leak@k": ("1", "64")}


def objectives(study: dict) -> dict:
    """method -> its runs of the reported seeds; none where the study has no newer objective."""
    found = {m: runs for m in FIGURES["objectives"][1] if (runs := chosen_runs(study, SPLIT, m))}
    return found if found.keys() & set(NEWER) else {}


def attacked(study: dict) -> dict:
    """method -> what attacks found of its seeds, by STATES; "(retrained)" and "(start)" are the controls."""
    def flat(model: dict) -> dict:
        return {**model, **model.get("leak", {}), "halfway": model.get("halfway", {}).get("forget 100%")}

    found = {m: [r["attacks"] for r in runs if "model" in r.get("attacks", {})]  # not stopped on the way
             for m, runs in objectives(study).items()}
    most = max(found.values(), key=len, default=[])
    controls = {f"({name})": [a[name] for a in most if name in a] for name in ("retrained", "start")}
    models = controls | {method: [a["model"] for a in attacks] for method, attacks in found.items()}
    return {name: list(map(flat, some)) for name, some in models.items() if some}


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


def measured(models: list, what: str) -> list:
    """What attacks found of these models, without those of which it is not known."""
    return [m[what] for m in models if m.get(what) is not None]


def attacks_table(study: dict) -> list[str]:
    """Extraction strength before and after each attack, steps of relearning to halfway, leak@k."""
    rows = []
    for name, models in attacked(study).items():
        cells = {what: mean_sd(measured(models, what)) for what in STATES}
        if reached := measured(models, "halfway"):
            some = f" ({len(reached)} of {len(models)})" if len(reached) < len(models) else ""
            cells["halfway"] = f"{statistics.mean(reached):.1f}{some}"
        rows.append([name, len(models), *cells.values()])
    return markdown_table(["model", "seeds", *STATES.values()], rows)


def draw(study: dict, stem: Path) -> list[Path]:
    """STEM_objectives.png and STEM_attacks.png, where the study has runs for them; their paths."""
    named, found, pictures = objectives(study), attacked(study), {}
    if named:
        best = {m: [best_at_utility(r, UTILITY) for r in runs] for m, runs in named.items()}
        extraction, leak = ({m: at_the_end(key, runs) for m, runs in named.items()}
                            for key in ("forget_extraction_strength", "privleak"))
        controls = at_the_end("forget_extraction_strength", retrained(study))
        pictures["objectives"] = {
            f"log10 forget quality, best with {UTILITY:.0%} of the utility\nline: 0.05": {"": (best, [LINE])},
            "extraction strength, end of the run\nline: retrained": {"": (extraction, controls)},
            "PrivLeak, end of the run\nline: retrained": {"": (leak, [0])}}
    if found:
        methods = {m: models for m, models in found.items() if not m.startswith("(")}
        pictures["attacks"] = {f"{title}\nlines: retrained": {
            STATES[what]: ({m: measured(models, what) for m, models in methods.items()},
                           measured(found.get("(retrained)", []), what))
            for what in whats} for title, whats in SHOWN.items()}
    return [picture(stem.with_name(f"{stem.name}_{name}.png"), panels) for name, panels in pictures.items()]


def picture(path: Path, panels: dict) -> Path:
    """Panels side by side, title -> {what: (method -> its seeds' values, the control's values)}. A point for
    a mean, a bar from the smallest to the largest seed, a line for the control."""
    figure, axes_of = canvas(1, len(panels), 16, 4.6)
    for axes, (title, shown) in zip(axes_of[0], panels.items(), strict=True):
        looks = zip(shown.items(), "o^s", ("black", "tab:red", "tab:blue"), strict=False)
        for (what, (columns, control)), marker, color in looks:
            some = {place: values for place, values in enumerate(columns.values()) if values}
            middle, low, high = (np.array(list(map(pick, some.values())))
                                 for pick in (statistics.mean, min, max))
            axes.errorbar(list(some), middle, np.maximum(0, [middle - low, high - middle]), fmt=marker,
                          color=color, elinewidth=1, label=what)
            if control:
                axes.axhline(statistics.mean(control), color=color, linewidth=0.9, linestyle="-.")
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_title(title)
        axes.grid(alpha=0.25)
        if len(shown) > 1:
            axes.legend(fontsize=8)
    return save(figure, path)
