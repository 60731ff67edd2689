"""The study's page, results/tofu.md: lessons, verdicts, figures and tables from the JSON of each study."""

import statistics
from collections import Counter
from pathlib import Path

from study import grid, verdicts
from study.answers import KINDS, judgement
from study.verdicts import chosen_runs, kept_utility, last, peak, peak_at, rate, tuned_runs

FIGURE_TITLES = {
    "figure2": "Figure 2: forget05, ga and npo over steps, with the answers of the rt variants",
    "figure5": "Figure 5: forget quality against utility at each method's peak",
    "figure6": "Figure 6: both over steps", "figure7": "Figure 7: answers",
    "figure8": "Figure 8: divergence from the start on the forget set, forget10",
    "figure9": "Figure 9: forget50 and forget90 with tuned weights",
    "retain-weight": "The retain weight of npo+rt", "beyond10": "Beyond 10%: as Figure 5"}

# Ten lines for a student: the keys of their verdicts, and what each would mean.
LESSONS = (
    (("ga_falls",), "Gradient ascent has no floor: what peaks early is destroyed by going on."),
    (("npo_plateau",),
     "NPO's weight W vanishes on what is forgotten: its forget quality levels off and stays."),
    (("npo_beats_ga",), "At equal utility NPO forgets better than gradient ascent."),
    (("forget_kl",),
     "The reason shows in the divergence from the start: unbounded for ga, moderate for npo."),
    (("retain_weight",), "A retain term helps forgetting itself, up to a point."),
    (("forget05_only_npo", "forget10_baselines"),
     "Only NPO-based methods pass for a retrained model (a p-value above 0.05)."),
    (("forget10_npo_rt",), "On forget10 it takes npo and rt together to forget and to keep."),
    (("answers_on_forget_set",), "Look at the answers: collapse repeats itself, NPO says something else."),
    (("refusals_elsewhere",), "Teaching \"I don't know\" teaches it for everything."),
    (("beyond10", "tuned_beyond10"), "With tuned weights npo+rt reaches beyond 10% of the data."),
)


def page(studies: dict, folder: Path) -> str:
    """results/tofu.md from the JSON of every study in `folder`; name -> study."""
    lines = ["# The TOFU study: Figures 2 and 5 to 9", "",
             "Written by `python figures_tofu.py` (again with `--draw-only`) from the JSON in `tofu/`; every "
             "number is computed from there. How claims are judged, with their thresholds, is in the opening "
             "of `study/verdicts.py`.", ""]
    for name, study in studies.items():
        lines += section(name, study, folder)
    return "\n".join(lines).rstrip() + "\n"


def section(name: str, study: dict, folder: Path) -> list[str]:
    """One study: what to take away, verdicts, figures, tables."""
    made, scale, covered = study["provenance"], verdicts.scale(study), f"{verdicts.COVERED:.0%} interval"
    judged = verdicts.verdicts(study)
    told = [[v["claim"], verdicts.ANSWER[v["holds"]], verdicts.numbers_of(v)] for v in judged]
    lines = [f"## {study['data']}, {study['model']}", "",
             f"{len(study['runs'])} unlearning runs, {len(study['retrained'])} models; {scale}; "
             f"last command `{made['command']}`, {made['time']}. {origins_line(study)} {seeds_line(study)}",
             "", "### What to take away", "",
             "What the paper teaches, and whether it was seen at this scale, with the number that decides "
             f"(in brackets: {covered} over seeds).", "", *lessons(judged), "", "### Verdicts", "",
             *table(["claim", "holds", "numbers"], told), "",
             f"Scale: {scale}. In brackets: {covered} of the mean over seeds (`interval`).", "",
             *[f"- not made: {f['name']}: {f['why']}" for f in study["failed"]]]
    by_weight = [([f"{w:g}"], chosen_runs(study, "forget10", "npo+rt", w))
                 for w in study["budget"]["retain_weights"]]
    tuned = [([split, m, f"{choice['weights'][split]:g}"], tuned_runs(study, split, m))
             for split in ("forget50", "forget90") for m, choice in study["chosen"].items()
             if split in choice["weights"]]
    tables = {"figure5": [*peak_table(study, grid.SMALL), "", *ceiling_lines(study), "",
                          *second_start_lines(study)],
              "figure7": ["Counts of all answers on forget10, at the end of the run:", "",
                          *answers_table(study), *samples_table(study)],
              "figure9": runs_table(["split", "method", "retain weight"], tuned),
              "retain-weight": runs_table(["retain weight"], by_weight),
              "beyond10": peak_table(study, grid.LARGE)}
    for key, title in FIGURE_TITLES.items():
        if (folder / f"{name}_{key}.png").exists():
            lines += [f"### {title}", "", f"![{title}](tofu/{name}_{key}.png)", "", *tables.get(key, []), ""]
    return [*lines, "### Hyper-parameters", "", *hyper_parameters(study), ""]


def lessons(judged: list) -> list[str]:
    """Ten lines: what the paper teaches, and whether it was seen here."""
    by_key, lines = {v["key"]: v for v in judged}, []
    for place, (keys, sentence) in enumerate(LESSONS, 1):
        holds = verdicts.combined([by_key[k]["holds"] for k in keys])
        tests = [t for k in keys for t in verdicts.deciding(by_key[k])]
        shown = [t for t in tests if t["holds"] == holds] or tests
        seen = {True: "Seen here", False: "NOT seen here", "undecided": "Undecided here"}[holds]
        lines.append(f"{place}. {sentence} **{seen}**: {verdicts.told(shown[0]) if shown else 'not run'}.")
    return lines


def seeds_line(study: dict) -> str:
    """Which splits have how many seeds, over methods."""
    found = []
    for split in sorted({r["split"] for r in study["runs"]}):
        counts = {len(chosen_runs(study, split, m)) for m in study["chosen"]} - {0}
        if counts:
            found.append(f"{split} {' to '.join(map(str, sorted({min(counts), max(counts)})))}")
    return f"Seeds a method: {', '.join(found)}." if found else ""


def origins_line(study: dict) -> str:
    """Commits that the runs were made with, and the starts that they began from."""
    commits = Counter((r["commit"] or "unknown")[:12] + " with changes" * ("+" in (r["commit"] or ""))
                      for r in study["runs"])
    starts = {}  # (seed of the start, its weights) -> split -> seeds of its runs
    for r in study["runs"]:
        by_split = starts.setdefault((r["start_seed"], r["start_weights"]), {})
        by_split.setdefault(r["split"], set()).add(r["seed"])
    told = []
    for (seed, weights), by_split in sorted(starts.items()):
        seeds = [f"{split} seeds {', '.join(map(str, sorted(found)))}"
                 for split, found in sorted(by_split.items())]
        told.append(f"{weights} (start seed {seed}: {'; '.join(seeds)})")
    made = ", ".join(f"{commit} {n}" for commit, n in commits.most_common())
    return f"Runs by commit: {made}. Weights of the start: {' and '.join(told)}."


# ---------------------------------------------------------------- tables

def table(head: list, rows: list) -> list[str]:
    """Markdown; nothing where there is no row."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in [head, *rows]]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]] if rows else []


def runs_table(head: list, named: list) -> list[str]:
    """(names, runs) at their peak and at the end: means over seeds with their standard deviation."""
    rows = []
    for names, runs in named:
        at = [(r, peak_at(r)) for r in runs]
        if runs:
            rows.append([*names, len(runs), mean_sd(list(map(peak, runs))),
                         mean_sd([kept_utility(r, i) for r, i in at]),
                         mean_sd([r["steps"][i] / r["steps"][-1] * r["epochs"] for r, i in at], ".1f"),
                         mean_sd(list(map(last, runs))), mean_sd(list(map(kept_utility, runs)))])
    return table([*head, "seeds", "peak log10 forget quality", "utility there / start", "at epoch",
                  "last log10 forget quality", "utility / start"], rows)


def mean_sd(values: list, spec: str = ".2f") -> str:
    sd = f" ± {statistics.stdev(values):{spec}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{spec}}{sd}"


def peak_table(study: dict, splits: tuple) -> list[str]:
    """Every method on these splits, with weights of 1."""
    return runs_table(["split", "method"], [([split, m], chosen_runs(study, split, m)) for split in splits
                                            for m in study["chosen"]])


def single_runs_table(runs: list) -> list[str]:
    """One line for each record, whatever its settings."""
    keys = ("method", "split", "lr", "beta", "retain_weight", "epochs", "seed")
    return runs_table([key.replace("_", " ") for key in keys],
                      [([r[key] for key in keys], [r]) for r in runs])


def answers_table(study: dict) -> list[str]:
    """Counts of the last answers on forget10, all seeds together, in per cent."""
    start = [r["answers_start"] for r in study["runs"] if "answers_start" in r][:1]
    retrained = [m["answers"] for m in study["retrained"] if m["split"] == "retain90" and "answers" in m]
    named = {m: [r["answers"] for r in chosen_runs(study, "forget10", m)] for m in study["chosen"]}
    elsewhere, rows = verdicts.ELSEWHERE, []
    asked = [*((kind, ("forget",)) for kind in KINDS), ("true", elsewhere), ("refusal", elsewhere)]
    named = {"(start)": start, "(retrained)": retrained, **named} if any(named.values()) else {}
    for name, runs in named.items():
        if runs:
            shares = [f"{100 * statistics.mean(rate(a, *what) for a in runs):.0f}" for what in asked]
            distinct = [d for a in runs if (d := a["forget"]["distinct_2"]) is not None]
            repeated = statistics.mean(a["forget"]["repetition_rate"] for a in runs)
            rows.append([name, len(runs), *shares[:-2],
                         f"{statistics.mean(distinct):.2f}" if distinct else "none", f"{repeated:.2f}",
                         *shares[-2:]])
    return table(["method", "runs", *(f"{kind} %" for kind in KINDS), "distinct-2", "repetition rate",
                  "elsewhere: true %", "elsewhere: refusal %"], rows)


def samples_table(study: dict) -> list[str]:
    """Figure 7 as Markdown: the true answer, and each answer's kind."""
    def plain(text: str) -> str:
        return (text or "(empty)").replace("|", "/").replace("\n", " ")

    named, lines = verdicts.samples_of(study), []
    for place, asked in enumerate(named[0][1] if named else ()):
        lines += [f"\n**{asked['set']}**: {plain(asked['question'])} True answer: {plain(asked['answer'])}\n"]
        given = [(who, samples[place]) for who, samples in named]
        lines += table(["model", "answer", "kind", ""], [
            [who, plain(s["generation"]), s["kind"], judgement(s["set"], s["kind"])] for who, s in given])
    return lines


def second_start_lines(study: dict) -> list[str]:
    lines = []
    for method in grid.SECOND_START:
        same = {r["seed"]: r for r in chosen_runs(study, "forget10", method)}
        for other in verdicts.second_start(study, "forget10", method):
            if first := same.get(other["seed"]):
                lines.append(f"A second fine-tuned start, forget10, {method}, seed {other['seed']}: peak "
                             f"log10 forget quality {peak(other):.2f} against {peak(first):.2f}, utility at "
                             f"the end {kept_utility(other):.2f} against {kept_utility(first):.2f} of the "
                             "start's.")
    return lines


def ceiling_lines(study: dict) -> list[str]:
    """Retrained against retrained, and the p-values that few rows allow."""
    lines = []
    for split, pairs in sorted(study.get("ceilings", {}).items()):
        n = study["forget_rows"][split]
        if pairs:
            values = sorted(p["log10"] for p in pairs)
            lines.append(f"- {split} ({n} rows): one retrained model against another of a different seed has "
                         f"log10 forget quality {statistics.median(values):.2f} in the median of "
                         f"{len(values)} pairs, {values[0]:.2f} to {values[-1]:.2f}; "
                         f"{sum(v > verdicts.LINE for v in values)} of {len(values)} above 0.05.")
        if str(n) in study["lattice"]:
            steps = study["lattice"][str(n)]
            near = [f"{10**p:.3g} (D = {k}/{n})" for k, p in steps if 1e-3 < 10**p < 0.5]
            lines.append(f"- {split}: with {n} rows the p-value can take only {len({p for _, p in steps})} "
                         f"values: from 1 down through {', '.join(near)}, to the floor of "
                         f"10^{steps[-1][1]:.1f} (D = 1).")
    return lines


def hyper_parameters(study: dict) -> list[str]:
    """Every setting that was tried with its score, what was chosen, and how much each method depends on
    it."""
    chosen, budget, tried, spans = study["chosen"], study["budget"], [], {}
    if study.get("choices_from"):
        rows = [[m, f"{c['lr']:g}", f"{c['beta']:g}",
                 ", ".join(f"{s} {w:g}" for s, w in c["weights"].items())] for m, c in chosen.items()]
        return [f"Not tuned here: those of `{study['choices_from']}`.", "",
                *table(["method", "lr", "beta", "retain weight of Figure 9"], rows)]
    for t in study["tried"]:
        choice, weight = chosen.get(t["method"], {}), t["retain_weight"]
        if t["split"] == budget["split"]:
            spans.setdefault(t["method"], []).append(t)
        else:
            weight = choice.get("weights", {}).get(t["split"])
        taken = (t["lr"], t["beta"], t["retain_weight"]) == (choice.get("lr"), choice.get("beta"), weight)
        tried.append([t["method"], t["split"], f"{t['lr']:g}", f"{t['beta']:g}", f"{t['retain_weight']:g}",
                      f"{t['score']:.3f}", f"{t['peak_log10']:.2f}", "chosen" if taken else ""])
    spans = [[m, len(found), *(f"{min(t[key] for t in found):{spec}} to {max(t[key] for t in found):{spec}}"
                               for key, spec in (("score", ".3f"), ("peak_log10", ".2f")))]
             for m, found in spans.items() if m in chosen]
    rates = ", ".join(f"{lr:g}" for lr in budget["learning_rates"])
    further = ", then further betas at the best" * any(len(betas) > 1 for betas in budget["betas"].values())
    head = ["method", "split", "lr", "beta", "retain weight", "score", "peak log10 forget quality", ""]
    return [f"One budget for every method, on {budget['split']}, seed {budget['seed']} (not reported): "
            f"learning rates {rates}{further}. Score: the largest, over evaluations, of the smaller of "
            "1 - D/D_start and U/U_start (D: Kolmogorov-Smirnov statistic, U: utility).", "",
            "How much each method depends on them, over all that was tried on this split:", "",
            *table(["method", "settings", "score", "peak log10 forget quality"], spans), "",
            *table(head, tried)]
