"""Evaluation logs, read again: the JSON that `evaluate_tofu.py` writes, and TOFU's released logs."""

import json

from common import InputError, cause_of, locate
from data.tofu import complement

MAX_ROWS = 300  # TOFU evaluates the first 300 rows of a set
TOFU_LOGS = {"retain": "eval_log.json", "real_authors": "eval_real_author_wo_options.json",
             "world_facts": "eval_real_world_wo_options.json", "forget": "eval_log_forget.json"}
TOFU_COLUMNS = {
    "answer_nll": "gt_loss", "answer_tokens": "num_token_gt", "paraphrased_nll": "paraphrased_loss",
    "paraphrased_tokens": "num_token_paraphrased", "perturbed_nll": "perturb_loss",
    "perturbed_tokens": "num_token_perturb", "rouge_l_recall": "rougeL_recall",
    "generated_text": "generated_text"}


def read_log(path: str) -> tuple[dict, dict]:
    """(rows, provenance) of an evaluation's JSON, ours or a released one. Raises InputError."""
    try:
        log = json.loads(locate(path).read_text(encoding="utf-8"))
        released = {name: file for name, file in TOFU_LOGS.items() if file in log}
        rows = {name: tofu_rows(log[file]) for name, file in released.items()} or log["rows"]
        if not rows["forget"] or any([row["index"] for row in rows[name]] != [*range(len(rows[name]))]
                                     for name in rows):
            raise ValueError("it needs forget rows, and every index of a set once and in order")
        for row in rows["forget"]:
            row["answer"].split(), row["answer_nll"] / row["answer_tokens"]  # fails where one is missing
        return rows, {"format": "TOFU"} if released else log.get("provenance", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"cannot read the log {path} ({cause_of(error)}): need an evaluation's JSON, ours "
                         "or TOFU's") from None


def tofu_rows(columns: dict) -> list:
    """TOFU's columns (lists, or dictionaries keyed by row) -> our rows."""
    lists = [columns[name] for name in TOFU_COLUMNS.values()]
    lists = [[c[str(i)] for i in range(len(c))] if isinstance(c, dict) else c for c in lists]
    rows = [dict(zip(TOFU_COLUMNS, values, strict=True)) for values in zip(*lists, strict=True)]
    for index, row in enumerate(rows):
        row["question"], row["generation"], row["answer"] = row.pop("generated_text")
        row["index"] = index
    return rows


def read_retain_log(path: str | None, split: str, forget_rows: list, source: dict) -> tuple:
    """(The retrained model's results on `forget_rows`, on the holdout), or (None, None) without a path.
    Raises InputError for a log of other rows, data, template or system prompt than `source` says, and for a
    log of a model that was not trained on exactly the other rows."""
    if path is None:
        return None, None
    rows, provenance = read_log(path)
    trained = provenance.get("trained_on") or {}
    if split != "own" and trained.get("split") not in (None, complement(split)):
        raise InputError(f"{path} is of a model trained on {trained['split']}; --split {split} needs one "
                         f"trained on {complement(split)}")
    stated = {**provenance, "trained_on": trained.get("data_fingerprint")}
    needed = {**source, "trained_on": source.get("data_fingerprint")}
    for name in ("data_fingerprint", "trained_on", "template", "system_prompt"):
        if None not in (stated.get(name), needed.get(name)) and stated[name] != needed[name]:
            raise InputError(f"{path} was made with another {name} ({stated[name]}, here {needed[name]}): "
                             "its forget rows cannot be compared")
    retrained = rows["forget"][:len(forget_rows)]
    # TOFU's logs keep the whole prompt and ours the question, but both keep the answer.
    answers, logged = ([row["answer"].split() for row in sample] for sample in (forget_rows, retrained))
    if logged != answers:
        raise InputError(f"{path} has {len(rows['forget'])} forget rows, not the {len(answers)} of {split}: "
                         "need the log of the model retrained without these rows")
    if not all(row.get("perturbed_nll") or row.get("perturbed_answer") for row in (*forget_rows, *retrained)):
        raise InputError(f"forget quality against {path} needs perturbed answers in every forget row")
    return retrained, rows.get("holdout")


def read_retain_logs(paths: list | None, *of) -> tuple:
    """(Forget rows, holdout rows) of the first log, and the forget rows of the others. Each log must fit `of`
    as `read_retain_log` says."""
    first, *more = [read_retain_log(path, *of) for path in paths or [None]]
    return *first, [rows for rows, _ in more]
