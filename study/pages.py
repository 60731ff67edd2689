"""Tables from stored JSON: results/tofu.md over the studies, and a page for each JSON of single runs."""

import statistics
from pathlib import Path

from data.tofu import evaluation_split
from study.pictures import (FIGURES, agreements, attacked, best_later, columns_of, columns_of_single,
                            has_beta, picture_of, values)
from study.records import KINDS
from study.report import table
from study.verdicts import ELSEWHERE, deciding, kept_utility, last, peak, peak_at, rate, verdicts

INTRODUCTION = """# The TOFU study: Figures 2 and 5 to 9, and beyond

Written by `python figures_tofu.py --draw-only` from the JSON in `tofu/`; every number is computed from there.
`study/verdicts.py` says how claims are judged. Beside a verdict stand tests that decide it, with the 95%
interval of the mean over seeds, or for a share of seeds its one-sided 95% bounds. In tables, ± is the
standard deviation over seeds. A forget quality of 0.05 is -1.30 in log10. docs/beyond.md says how to read
what lies beyond the paper."""
PEAKS = {"peak log10 forget quality": "peak", "utility there / start": "kept there", "at epoch": "epoch",
         "last log10 forget quality": "last", "utility / start": "kept"}
COLUMNS = {  # figure -> title of a column -> number of a record
    **dict.fromkeys(("5", "9", "retain-weight", "beyond10"), PEAKS),
    "7": {f"{kind} %": kind for kind in (*KINDS, "elsewhere: true", "elsewhere: refusal")},
    "objectives": {"best log10 forget quality at 90% of the utility": "best",
                   "last log10 forget quality": "last", "utility / start": "kept",
                   "extraction strength": "forget_extraction_strength", "AUC min-k": "mia",
                   "paraphrase probability": "forget_paraphrase_probability", "PrivLeak": "privleak"},
    "attacks": {"before": "before", "relearned": "forget 100%", "after retain rows": "retain",
                "8 bits": "int8", "4 bits": "int4", "NF4": "nf4", "paraphrased": "paraphrased question",
                "answer begun": "prefix", "few-shot": "few-shot", "leak@1": "1", "leak@64": "64"}}


def with_numbers(run: dict) -> dict:
    """A run's record with its numbers at the peak and at the end."""
    at = peak_at(run)
    lost = [nats - run["forget_nll"][0] for nats in run.get("forget_nll", [])]  # of a forget answer, nats
    return {**run, "peak": peak(run), "kept there": kept_utility(run, at), "last": last(run),
            "kept": kept_utility(run), "best": best_later(run), "lost": lost or None,
            "epoch": run["steps"][at] / run["steps"][-1] * run["epochs"]}


def with_kinds(record: dict) -> dict:
    """A record with the kinds of its last answers, in per cent."""
    shares = {kind: rate(record["answers"], kind, ("forget",)) for kind in KINDS}
    shares |= {f"elsewhere: {kind}": rate(record["answers"], kind, ELSEWHERE) for kind in ("true", "refusal")}
    return record | {name: 100 * share for name, share in shares.items()}


def models_table(models: dict, columns: dict) -> str:
    """A row for each name: mean and standard deviation over seeds; how many have the number, if not all."""
    rows, all_records = [], [record for records in models.values() for record in records]
    columns = {title: key for title, key in columns.items() if values(all_records, key)}
    for name, records in models.items():
        row = {"runs": name, "seeds": len(records)}
        if "peak" in columns.values():
            row |= {key.replace("_", " "): f"{records[0][key]:g}" for key in ("lr", "beta", "retain_weight")}
            row["beta"] *= has_beta(records[0]["method"])
        for title, key in columns.items():
            numbers = values(records, key)
            row[title] = f"{statistics.mean(numbers):.2f}" if numbers else "-"
            row[title] += f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
            row[title] += f" ({len(numbers)} of {len(records)})" if 0 < len(numbers) < len(records) else ""
        rows.append(row)
    return table(rows)


def samples_tables(models: dict) -> str:
    """What the first record of each name answers to one question per set. A table for each choice of
    questions, since splits have their own."""
    tables = {}
    for name, records in models.items():
        samples = next((record["samples"] for record in records if "samples" in record), [])
        cells = {f"{s['set'].replace('_', ' ')}: {s['question']} ({s['answer']})":
                 " ".join(f"{s['generation']} [{s['kind']}]".replace("|", "/").split()) for s in samples}
        tables.setdefault(tuple(cells), []).append({"runs": name} | cells)
    return "\n\n".join(table(rows) for questions, rows in tables.items() if questions)


def floor_table(study: dict) -> str:
    """How far retrained models of a split are from each other: the range over all pairs."""
    titles = {"forget quality": "ks_p", "paired p": "paired_p", "correlation of log R": "correlation"}
    splits = sorted({evaluation_split(model["split"]) for model in study["retrained"]})
    return table([{"retrained models of": split, "pairs": len(pairs)} | {
        title: f"{min(pair[key] for pair in pairs):.2g} to {max(pair[key] for pair in pairs):.2g}"
        for title, key in titles.items()} for split in splits if (pairs := agreements(study, split))])


def by_name(columns: dict) -> dict:
    return {f"{split}: {name}" if len(columns) > 1 else name: list(map(with_numbers, runs))
            for split, named in columns.items() for name, runs in named.items()}


def section(study: dict, name: str, figure: str) -> list[str]:
    """A figure's paragraphs: title, picture, tables; none without runs."""
    columns, (title, *_, draw) = columns_of(study, figure), FIGURES[figure]
    if not columns:
        return []
    models = attacked(columns) if figure == "attacks" else by_name(columns)
    retrained = [model for model in study["retrained"] if model["split"] == "retain90"]
    if figure == "objectives":
        models |= {"(retrained)": retrained}
    if figure == "7":
        start = [{"answers": run["answers_start"], "samples": run["samples_start"]} for run in study["runs"]
                 if "answers_start" in run][:1]
        models = {label: list(map(with_kinds, records)) for label, records in (
            {"(start)": start, "(retrained)": retrained} | models).items() if records}
    parts = [f"### {title}"] + [f"![{title}](tofu/{picture_of(Path(name), figure)})"] * bool(draw)
    parts += [models_table(models, COLUMNS[figure])] if figure in COLUMNS else []
    return parts + [samples_tables(models)] * (figure == "7") + [floor_table(study)] * (figure == "overview")


def page(studies: dict) -> str:
    """results/tofu.md over all studies: name -> JSON."""
    parts = [INTRODUCTION]
    for name, study in studies.items():
        source = "of the preset, as in the paper" if study["choices_from"] else "tuned for each method"
        rows = [{"the paper's claim": v["claim"], "verdict": v["words"], "tests": deciding(v)}
                for v in verdicts(study)]
        parts += [f"## {study['data']}, {study['model']}, lr and beta {source}", "### Verdicts", table(rows)]
        parts += [part for figure in FIGURES for part in section(study, name, figure)]
    return "\n\n".join(parts) + "\n"


def single_runs_page(study: dict) -> str:
    """A row for each run, with the settings in which the runs differ in its name; samples of the answers."""
    models = by_name(columns_of_single(study["runs"], shared=()))
    retrained = {f"retrained, {model['split']}": [model] for model in study["retrained"]}
    columns = PEAKS | {"nats lost per forget answer": "lost"}
    return f"{models_table(models, columns)}\n\n{samples_tables(models | retrained)}\n"
