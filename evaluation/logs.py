"""Evaluation logs, ours and TOFU's released ones: read, checked row by row, matched by question, and told."""

import json
import sys
from pathlib import Path

import numpy as np

from data.tofu import EVALUATED, complement, parse_split
from support.command_line import markdown_table, number
from support.errors import InputError, cause_of
from support.files import holds_texts, read_text

MAX_ROWS = 300  # of a set, the first ones: TOFU's own

# TOFU's released format: one file a set inside one JSON, one list (or dict keyed by row) a quantity.
TOFU_LOGS = {"retain": "eval_log.json", "real_authors": "eval_real_author_wo_options.json",
             "world_facts": "eval_real_world_wo_options.json", "forget": "eval_log_forget.json"}
TOFU_KEYS = {"answer_nll": "gt_loss", "answer_tokens": "num_token_gt", "paraphrased_nll": "paraphrased_loss",
             "paraphrased_tokens": "num_token_paraphrased", "perturbed_nll": "perturb_loss",
             "perturbed_tokens": "num_token_perturb", "rouge_l_recall": "rougeL_recall",
             "generated_text": "generated_text"}
# The least and the most that a row's numbers may be, all finite: sums in nats, counts of tokens, shares.
MAX = sys.float_info.max
SUM, COUNT, SHARE, ANY = (0, MAX), (1, MAX), (0, 1), (-MAX, MAX)
BOUNDS = {"answer_nll": SUM, "answer_tokens": COUNT, "paraphrased_nll": SUM, "paraphrased_tokens": COUNT,
          "rouge_l_recall": SHARE, "exact_memorization": SHARE, "extraction_strength": SHARE,
          "reference_nll": SUM, "min_k": ANY, "min_k_plus_plus": ANY, "kl": ANY}
TEXTS = ("question", "answer", "generation")
NEEDED = (*TEXTS, "answer_nll", "answer_tokens", "rouge_l_recall")
# Names of what is measured of a set beside the paper's metrics, and of what membership is guessed by.
SHARPER = ("exact_memorization", "extraction_strength", "paraphrase_probability")
MIA = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference")


def read_log(path: str) -> tuple[dict, dict]:
    """(rows, provenance) of an evaluation's JSON, ours or TOFU's released one. Raises InputError."""
    try:
        log = json.loads(read_text(Path(path)))
    except (ValueError, RecursionError) as error:  # an InputError is a ValueError
        raise InputError(f"cannot read the log {path}: {error}; need JSON, ours or TOFU's") from None
    log = log if isinstance(log, dict) else {}
    theirs = {name: file for name, file in TOFU_LOGS.items() if file in log}
    rows, provenance = log.get("rows"), log.get("provenance", {})
    if theirs:
        rows = {name: _tofu_rows(log[file], f"{path}: {file}") for name, file in theirs.items()}
        provenance = {"format": "TOFU"}
    recorded = (holds_texts(provenance, "split", "template", "data_fingerprint")
                and holds_texts(provenance.get("trained_on", {}), "split", "data"))
    if not isinstance(rows, dict) or not recorded:
        raise InputError(f"{path} is no evaluation log: need rows and provenance (ours), or "
                         f"{', '.join(TOFU_LOGS.values())} (TOFU's)")
    if not rows.get("forget"):
        raise InputError(f"{path} has no forget rows")
    for name, some in rows.items():  # the holdout is not asked
        check_rows(some, f"{path}: {name}", ("generation", "rouge_l_recall") if name == "holdout" else ())
    return rows, provenance


def _tofu_rows(columns: dict, where: str) -> list:
    """TOFU's columns, lists or dicts keyed by row, -> our rows. Raises InputError where they don't match."""
    rows = []
    try:
        columns = [columns[theirs] for theirs in TOFU_KEYS.values()]
        lists = [[column[str(i)] for i in range(len(column))] if isinstance(column, dict) else column
                 for column in columns]
        for index, values in enumerate(zip(*lists, strict=True)):
            row = {"index": index, **dict(zip(TOFU_KEYS, values, strict=True))}
            row["question"], row["generation"], row["answer"] = row.pop("generated_text")
            rows.append(row)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where} needs {', '.join(TOFU_KEYS.values())} of the same rows, the last with "
                         f"prompt, generation and truth ({cause_of(error)})") from None
    return rows


def check_rows(rows: list, where: str, unasked: tuple):
    """Raises InputError, with `where`, unless every index is there once and in order, and every number there
    and finite; those named in `unasked` may lack."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{where}: need a list of row objects, got {str(rows)[:60]}")
    if [row.get("index") for row in rows] != list(range(len(rows))):
        raise InputError(f"{where} needs every index from 0 to {len(rows) - 1} once, in order")
    for row in rows:
        sums, counts = row.get("perturbed_nll") or [], row.get("perturbed_tokens") or []
        if not (isinstance(sums, list) and isinstance(counts, list)):
            raise InputError(f"{where} row {row['index']}: perturbed_nll and perturbed_tokens must be lists")
        numbers = [(row[key], bounds) for key, bounds in BOUNDS.items() if row.get(key) is not None]
        numbers += [(x, SUM) for x in sums] + [(x, COUNT) for x in counts]
        finite = all(isinstance(x, (int, float)) and least <= x <= most
                     for x, (least, most) in numbers)
        there = all(row.get(key) is not None for key in NEEDED if key not in unasked)
        texts = all(isinstance(row[key], str) for key in TEXTS if row.get(key) is not None)
        paired = len(sums) == len(counts) and ((row.get("paraphrased_nll") is None)
                                               == (row.get("paraphrased_tokens") is None))
        if not (finite and there and texts and paired):
            raise InputError(f"{where} row {row['index']}: needs question, answer, generation, "
                             "rouge_l_recall and finite sums (.._nll) with as many token counts of "
                             "at least 1 (.._tokens)")


def log_truth_ratio(row: dict) -> float | None:
    """log R of a row, above 0 where the (paraphrased) truth is likelier than the falsehoods; None without
    perturbed answers."""
    if not row.get("perturbed_nll"):
        return None
    # Real authors and world facts: the answer stands for its paraphrase.
    truth = "answer" if row.get("paraphrased_nll") is None else "paraphrased"
    perturbed = np.divide(row["perturbed_nll"], row["perturbed_tokens"])
    return float(perturbed.mean() - row[f"{truth}_nll"] / row[f"{truth}_tokens"])


def words(text) -> str:
    return " ".join(str(text).split())


def match_retain_rows(rows: list, retain_rows: list, model_name: str, retain_name: str) -> list:
    """The retained model's rows of the same questions, in order. Raises InputError where they aren't."""
    flaw = "different rows; need the log of the model retrained without this forget split"
    if len(retain_rows) < len(rows):
        raise InputError(f"{retain_name} has {len(retain_rows)} rows, {model_name} {len(rows)}: {flaw}, and "
                         "of as many rows (--max-rows)")
    # TOFU's logs keep the whole prompt, ours the question: answers are in both.
    for index, (row, other) in enumerate(zip(rows, retain_rows, strict=False)):
        if not other.get("perturbed_nll") or not (row.get("perturbed_nll") or row.get("perturbed_answer")):
            raise InputError(f"forget quality needs perturbed answers in every forget row: row {index} of "
                             f"{model_name} or of {retain_name} has none")
        scored = "answer_nll" in row  # else it is a row of the data
        if scored and (row.get("paraphrased_nll") is None) != (other.get("paraphrased_nll") is None):
            raise InputError(f"row {index} has a paraphrased answer in one of {model_name} and {retain_name}:"
                             " their truth ratios are not of the same")
        if words(row["answer"]) != words(other["answer"]):
            raise InputError(f"row {index} is {words(row['answer'])[:60]!r} in {model_name}, "
                             f"{words(other['answer'])[:60]!r} in {retain_name}: {flaw}")
    return retain_rows[:len(rows)]


def read_retain_log(path: str | None, split: str, forget_rows: list, fingerprint: str | None = None,
                    template: str | None = None, name: str = "this data") -> tuple[list | None, list | None]:
    """A retrained model's rows on the same questions as `forget_rows`, in their order, and of the holdout;
    None for what isn't there. Raises InputError where the log lacks the former, or was, by its own word,
    measured on other data, with another template, or on a model of another split than the complement."""
    if path is None:
        return None, None
    rows, provenance = read_log(path)
    trained = provenance.get("trained_on", {}).get("split")
    if split != "own" and trained not in (None, complement(split)):
        raise InputError(f"{path} is of a model trained on {trained}; --split {split} needs one trained on "
                         f"{complement(split)}")
    if fingerprint and provenance.get("data_fingerprint") not in (None, fingerprint):
        raise InputError(f"{path} is of other data ({provenance['data_fingerprint']}, here {fingerprint})")
    if template and provenance.get("template") not in (None, template):
        raise InputError(f"{path} was measured with --template {provenance['template']}, not {template}")
    return match_retain_rows(forget_rows, rows["forget"], name, path), rows.get("holdout")


def expect_split(rows: dict, provenance: dict, split: str, path: str):
    """A log's split, or a released one's number of forget rows, is this one's. Raises InputError."""
    if provenance.get("split") not in (None, split):
        raise InputError(f"{path} was measured for --split {provenance['split']}, not {split}")
    if provenance.get("format") == "TOFU":
        expected, rows_there = min(MAX_ROWS, 40 * parse_split(split)[1]), len(rows["forget"])
        if rows_there != expected:
            raise InputError(f"{path} holds {rows_there} rows, {split} has {expected}: of another split")


def metrics_table(metrics: dict) -> str:
    """What was measured of each set, a Markdown table, and of all of them; `evaluate_tofu.py` defines it."""
    columns = ("rouge_l_recall", "probability", "truth_ratio", *SHARPER)
    sets = {name: metrics[name] for name in EVALUATED if name in metrics}
    lines = markdown_table(["set (rows)", *(column.replace("_", " ") for column in columns)], [
        [f"{name} ({m['rows']})", *(number(m.get(column)) for column in columns)]
        for name, m in sets.items()])
    totals = {"forget quality": metrics["forget_quality"], "KS statistic": metrics["ks_statistic"],
              "model utility": metrics["model_utility"], "forget KL": metrics["forget_kl"],
              "world-facts KL": metrics["world_facts_kl"], "PrivLeak": metrics.get("privleak")}
    totals |= {f"MIA AUC {name}": auc for name, auc in metrics.get("mia", {}).items()}
    return "\n".join([*lines, "", *(f"- {name}: {number(value, 6)}" for name, value in totals.items())])
