"""The study's page, results/tofu.md: lessons, verdicts, figures and tables from the JSON of each study."""

import statistics
from collections import Counter
from pathlib import Path

from evaluation.logs import words
from study import beyond, grid, verdicts
from study.answers import KINDS
from study.pictures import columns_of
from study.records import differing
from study.verdicts import chosen_runs, kept_utility, last, mean_sd, peak, peak_at, rate
from support.command_line import markdown_table

HOW = {None: "each method's own tuning",  # "choices_from" in words
       "preset": "the preset, the same for all methods, as in the paper"}
FIGURE_TITLES = {
    "overview": "Five methods over the run",
    "figure2": "Figure 2: forget05, with the divergence", "figure5": "Figure 5: at each method's peak",
    "figure6": "Figure 6: over the run", "figure8": "Figure 8: divergence",
    "figure9": "Figure 9: forget50 and forget90 with tuned weights",
    "retain-weight": "The retain weight of npo+rt", "beyond10": "Beyond 10%: as Figure 5",
    "objectives": "Beyond the paper: newer objectives, sharper metrics",
    "attacks": "Beyond the paper: extraction strength of forget rows, before and after each attack"}

LESSONS = {  # ten lines for a student, beside the verdict that each rests on
    "ga_falls": "Gradient ascent has no floor: what peaks early is destroyed by going on.",
    "npo_plateau": "NPO's weight W vanishes on what is forgotten: its forget quality levels off and stays.",
    "npo_beats_ga": "At equal utility NPO forgets better than gradient ascent.",
    "forget05_only_npo": "Only NPO-based methods pass for a retrained model (a p-value above 0.05).",
    "forget10_npo_rt": "On forget10 it takes npo and rt together to forget and to keep.",
    "refusals_elsewhere": "Teaching \"I don't know\" teaches it for everything.",
    "answers_on_forget_set": "Look at the answers: collapse repeats itself, NPO says something else.",
    "retain_weight": "A retain term helps forgetting itself, up to a point.",
    "forget_kl": "The reason shows in the divergence from the start: unbounded for ga, moderate for npo.",
    "tuned_beyond10": "With tuned weights npo+rt reaches beyond 10% of the data."}


def page(studies: dict, folder: Path) -> str:
    """results/tofu.md from the JSON of every study in `folder`; name -> study."""
    lines = ["# The TOFU study: Figures 2 and 5 to 9, and beyond", "",
             "Written by `python figures_tofu.py` (again with `--draw-only`) from the JSON in `tofu/`; every "
             "number is computed from there. How claims are judged, with their thresholds, is in the opening "
             "of `study/verdicts.py`. In brackets: the 95% interval of the mean over seeds; for a share of "
             "seeds the lower and the upper one-sided 95% bound, since each claim has a direction. How "
             "to read what lies beyond the paper is in docs/beyond.md.", ""]
    for name, study in studies.items():
        lines += section(name, study, folder)
    return "\n".join(lines).rstrip() + "\n"


def section(name: str, study: dict, folder: Path) -> list[str]:
    made = study["provenance"]
    origins = Counter((r["commit"], r["start_weights"]) for r in study["runs"])
    lines = [f"## {study['data']}, {study['model']}, hyper-parameters of {HOW[study['choices_from']]}", "",
             f"{len(study['runs'])} unlearning runs, {len(study['retrained'])} models; "
             f"{verdicts.scale(study)}; last command `{made['command']}`, {made['time']}.", "",
             *markdown_table(["commit", "the start's weights", "runs"],
                    [[*origin, runs] for origin, runs in origins.most_common()]),
             *[f"- not made: {f['name']}: {f['why']}" for f in study["failed"]], "", "### Verdicts", "",
             *markdown_table(["what it would teach", "the paper's claim", "holds", "numbers"],
                    [[LESSONS.get(v["key"], ""), v["claim"], verdicts.answer(v), verdicts.numbers_of(v)]
                     for v in verdicts.verdicts(study)]), ""]
    tables = {key: runs_table(["split", "runs"], [
        ([title, label], runs) for title, named in columns_of(study, key.removeprefix("figure"))
        for label, runs in named]) for key in ("figure5", "figure9", "retain-weight", "beyond10")}
    tables["figure5"] += ["", *ceiling_table(study)]
    tables |= {"objectives": beyond.objectives_table(study), "attacks": beyond.attacks_table(study)}
    for key, title in FIGURE_TITLES.items():
        if (folder / f"{name}_{key}.png").exists():
            lines += [f"### {title}", "", f"![{title}](tofu/{name}_{key}.png)", "", *tables.get(key, []), ""]
    asked = [([name], r["samples"]) for name, records in answering(study).items() for r in records
             if "samples" in r]
    if asked:
        lines += ["### Figure 7: answers", "", "Counts of all answers on forget10, at the end of the run; "
                  "then seed 1's answers to one question a set.", "",
                  *answers_table(study), *samples_table(["model"], asked), ""]
    return [*lines, "### Hyper-parameters", "", *hyper_parameters(study), ""]


def runs_table(head: list, named: list) -> list[str]:
    """(names, runs) at their peak and at the end: means over seeds with their standard deviation."""
    rows = []
    for names, runs in named:
        at = [(r, peak_at(r)) for r in runs]
        rows.append([*names, len(runs), mean_sd(list(map(peak, runs))),
                     mean_sd([kept_utility(r, i) for r, i in at]),
                     mean_sd([r["steps"][i] / r["steps"][-1] * r["epochs"] for r, i in at], ".1f"),
                     mean_sd(list(map(last, runs))), mean_sd(list(map(kept_utility, runs)))])
    return markdown_table([*head, "seeds", "peak log10 forget quality", "utility there / start", "at epoch",
                  "last log10 forget quality", "utility / start"], rows)


def single_runs_table(runs: list) -> list[str]:
    always = ("method", "split", "lr", "beta", "retain_weight", "epochs", "seed")
    keys = [*always, *(key for key in differing(runs) if key not in always)]
    return runs_table([key.replace("_", " ") for key in keys],
                      [([r.get(key) for key in keys], [r]) for r in runs])


def samples_table(head: list, named: list) -> list[str]:
    """(names, samples) of models: what each answers in the end to one question a set, and of what kind that
    is; a table for each choice of questions, since splits have their own."""
    tables = {}
    for names, samples in named:
        asked = tuple(f"{s['set'].replace('_', ' ')}: {s['question']} ({s['answer']})" for s in samples)
        said = [words(f"{s['generation']} [{s['kind']}]".replace("|", "/")) for s in samples]
        tables.setdefault(asked, []).append([*names, *said])
    return [line for asked, rows in tables.items() for line in ["", *markdown_table([*head, *asked], rows)]]


def answering(study: dict) -> dict:
    """name -> records with answers on forget10: the start's, the retrained models', each method's runs; of
    those that there are."""
    start = [{"answers": r["answers_start"], "samples": r["samples_start"]} for r in study["runs"]
             if "answers_start" in r][:1]
    retrained = [m for m in study["retrained"] if m["split"] == "retain90" and "answers" in m]
    methods = {m: chosen_runs(study, "forget10", m) for m in grid.METHODS}
    found = {"(start)": start, "(retrained)": retrained, **methods}
    return {name: records for name, records in found.items() if records}


def ceiling_table(study: dict) -> list[str]:
    rows = []
    for split, pairs in sorted(study.get("ceilings", {}).items()):
        logs = [p["log10"] for p in pairs]
        rows.append([split, study["forget_rows"][split], len(logs),
                     f"{statistics.median(logs):.2f}" if logs else "",
                     f"{sum(v > verdicts.LINE for v in logs)} of {len(logs)} above 0.05"])
    return markdown_table(["split", "rows", "pairs of retrained models", "median log10 forget quality",
                           "pass for each other"], rows)


def answers_table(study: dict) -> list[str]:
    """Counts of the last answers on forget10, all seeds together, in per cent."""
    elsewhere, rows = verdicts.ELSEWHERE, []
    asked = [*((kind, ("forget",)) for kind in KINDS), ("true", elsewhere), ("refusal", elsewhere)]
    for name, records in answering(study).items():
        answers = [r["answers"] for r in records]
        shares = [f"{100 * statistics.mean(rate(a, *what) for a in answers):.0f}" for what in asked]
        distinct = [d for a in answers if (d := a["forget"]["distinct_2"]) is not None]
        repeated = [a["forget"]["repetition_rate"] for a in answers]
        rows.append([name, len(answers), *shares, mean_sd(distinct), mean_sd(repeated)])
    return markdown_table(["method", "runs", *(f"{kind} %" for kind in KINDS), "elsewhere: true %",
                  "elsewhere: refusal %", "distinct-2", "repetition rate"], rows)


def hyper_parameters(study: dict) -> list[str]:
    """What was chosen, and every setting that was tried with its score."""
    budget = study["budget"]
    source = f"Not tuned here: those of {HOW['preset']}."
    if not study["choices_from"]:
        source = f"One budget for each method, on {budget['split']}, seed {budget['seed']} (not reported). " \
                 "Score: the largest, over evaluations, of the smaller of 1 - D/D_start and U/U_start (D: " \
                 "Kolmogorov-Smirnov statistic, U: utility)."
    return [source, "", *markdown_table(["method", "lr", "beta", "retain weight of Figure 9"], [
        [m, f"{c['lr']:g}", f"{c['beta']:g}", ", ".join(f"{s} {w:g}" for s, w in c["weights"].items())]
        for m, c in study["chosen"].items()]), "",
        *markdown_table(["method", "split", "lr", "beta", "retain weight", "score",
                         "peak log10 forget quality"], [
            [r["method"], r["split"], *(f"{r[key]:g}" for key in ("lr", "beta", "retain_weight")),
             f"{grid.score(r):.3f}", f"{peak(r):.2f}"]
            for r in study["runs"] if r["seed"] == budget["seed"]])]
