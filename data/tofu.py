"""TOFU's rows and splits (Maini et al., 2024), the built-in stand-in, or own forget and retain files.

Every published split is a slice of `full`: forgetNN is its last NN per cent, retain(100-NN) the rest.
Evaluation rows, with paraphrased and perturbed answers, are its last (forget) and first (retain) rows.

Folders and own files are read here, so that an error names file and line and a private forget set leaves no
copy in a cache; a Hub id goes through `datasets`.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.builtin import REFUSALS, make_builtin
from support.errors import InputError, cause_of
from support.files import fingerprint, read_text

SETS = ("full", "forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
HOLDOUT = "holdout10"  # rows like forget10_perturbed's that no model sees; a folder may have them
TEXTS = {"question": str, "answer": str}
PERTURBED = {"paraphrased_answer": str, "perturbed_answer": list}  # the further fields of a perturbed row
ALTERNATIVE = "alternative_answer"  # of all rows to unlearn or of none: DPO's chosen side for a refusal
NO_HOLDOUT = f"note: the data has no {HOLDOUT}: no MIA metrics, which need rows that no model saw"
EVALUATED = ("forget", "retain", "real_authors", "world_facts")
TINY_FACT_REPEATS = 4  # an epoch shows a from-scratch model each real-author and world-fact answer so often


@dataclass(frozen=True)
class Task:
    """What is trained on and what is evaluated: rows only, no tokens."""
    source: str
    split: str  # "own" for the user's own files
    full: list  # the whole data set
    forget: list  # rows to unlearn; none of a full or retain split
    retain: list
    evaluated: dict  # set name -> rows, those of EVALUATED that exist (own data has forget and retain only)
    refusals: list
    refusals_from: str
    fingerprint: str  # of every row above
    holdout: tuple | list = ()  # rows that no model sees, where the data has them

    def facts(self) -> list:
        """The real-author and world-fact rows that a from-scratch model learns in an epoch."""
        facts = [row for name in ("real_authors", "world_facts") for row in self.evaluated.get(name, [])]
        return TINY_FACT_REPEATS * facts

    def texts(self) -> list:
        """All that a tokenizer is fitted to, whatever the split: models of one data set share it."""
        rows = self.full + self.facts()
        return [row[key] for row in rows for key in ("question", "answer")] + self.refusals


def parse_split(split: str) -> tuple[str, int]:
    """"forget10" -> ("forget", 10), "retain90" -> ("retain", 90), "full" -> ("full", 100), or InputError."""
    match = re.fullmatch(r"(forget|retain)([0-9]{2})", split)
    if split == "full":
        return "full", 100
    if not match or match[2] == "00":
        raise InputError(f"unknown split {split!r}: need full, forgetNN or retainNN with NN from 01 to 99")
    return match[1], int(match[2])


def complement(split: str) -> str:
    """The other half: "forget05" -> "retain95" and back."""
    kind, percent = parse_split(split)
    return f"{'retain' if kind == 'forget' else 'forget'}{100 - percent:02d}"


def evaluation_split(split: str) -> str:
    """The forget split a model is judged on: its own, or what its retain split leaves out; full: forget10."""
    if split == "full":
        return "forget10"
    return complement(split) if split.startswith("retain") else split


def slice_rows(rows: list, split: str) -> list:
    """A split's rows, a slice of `full`. At least one row on either side."""
    kind, percent = parse_split(split)
    if kind == "full":
        return rows
    n_forget = round(len(rows) * (percent if kind == "forget" else 100 - percent) / 100)
    n_forget = min(max(n_forget, 1), len(rows) - 1)
    return rows[-n_forget:] if kind == "forget" else rows[:-n_forget]


def load_task(data: str, split: str, forget_file: str | None = None, retain_file: str | None = None) -> Task:
    """Rows of `data` ("builtin", a folder, a Hub id), or of the user's own files. Raises InputError."""
    if forget_file or retain_file:
        return _own_task(forget_file, retain_file)
    forgets, judged_split = parse_split(split)[0] == "forget", evaluation_split(split)
    sets, refusals, refusals_from = load_sets(data)
    full = sets["full"]
    if len(full) < 2:
        raise InputError(f"{data}: full.json has one row: need one to forget and one to keep")
    # Above 10%, forget quality is measured on the last 10%: there are no further perturbed rows. Names of
    # forget splits sort as their percentages do.
    perturbed = sets["forget10_perturbed"][-len(slice_rows(full, min(judged_split, "forget10"))):]
    for row, other in zip(full[-len(perturbed):], perturbed, strict=True):
        if row["question"] != other["question"]:
            raise InputError(f"{data}: forget10_perturbed is not the end of full: {other['question']!r} "
                             f"against {row['question']!r}")
    forget = slice_rows(full, split) if forgets else []
    check_optional(forget, f"{data}: full.json", {ALTERNATIVE: str}, len(full) - len(forget) + 1)
    # A split so large that it reaches into retain_perturbed shortens it.
    kept = len(slice_rows(full, complement(judged_split)))
    evaluated = {"forget": perturbed, "retain": sets["retain_perturbed"][:kept],
                 "real_authors": sets["real_authors_perturbed"], "world_facts": sets["world_facts_perturbed"]}
    retain = slice_rows(full, complement(split) if forgets else split)
    return Task(data, split, full, forget, retain, evaluated, refusals, refusals_from,
                fingerprint({name: sets[name] for name in SETS}, refusals),  # no holdout: it changes nothing
                holdout=sets.get(HOLDOUT, ()))


def load_sets(data: str) -> tuple[dict, list, str]:
    """The five sets by their published names and, where there are any, the holdout rows; the refusals, and
    where those are from. Raises InputError."""
    if data == "builtin":
        return make_builtin(), REFUSALS, "builtin"
    folder, refusals, refusals_from = Path(data), REFUSALS, "builtin"
    files = [f"{name}.json" for name in SETS]
    if folder.is_dir():
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise InputError(f"--data {data}: {', '.join(missing)} not found; need {', '.join(files)}")
        found = [name for name in (*SETS, HOLDOUT) if (folder / f"{name}.json").is_file()]
        sets = {name: read_rows(folder / f"{name}.json") for name in found}
        own = folder / "idontknow.jsonl"  # TOFU's own name; plain text, one refusal a line
        if own.is_file():
            refusals = [line.strip() for line in read_text(own).split("\n") if line.strip()]
            refusals_from = own.name
            if not refusals:
                raise InputError(f"{own} has no line: write one refusal a line, or remove the file")
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", data) and not folder.exists():
        sets = {name: _from_hub(data, name) for name in SETS}
        with suppress(InputError):  # not every data set has one; whoever needs it says so
            sets[HOLDOUT] = _from_hub(data, HOLDOUT)
    else:
        raise InputError(f"--data {data}: not 'builtin', no folder, and no Hub id such as locuslab/TOFU")
    options = {"perturbed_answer": list}  # their answer is its own paraphrase
    further = {"full": {}, HOLDOUT: {}, "real_authors_perturbed": options, "world_facts_perturbed": options}
    for name, rows in sets.items():
        check_rows(rows, f"{data}: {name}.json", TEXTS | further.get(name, PERTURBED))
    return sets, refusals, refusals_from


def read_rows(path: Path) -> list:
    """The rows of a JSON-lines file or of a JSON list. Raises InputError with file and line."""
    text, rows = read_text(path), []
    is_list = text.lstrip().startswith("[")
    for number, line in enumerate([text] if is_list else text.split("\n")):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                at = f"{path} line {number + getattr(error, 'lineno', 1)}"
                raise InputError(f"{at}: not JSON ({error}); write one object a line") from None
    rows = rows[0] if is_list else rows
    if not rows:
        raise InputError(f"{path} has no rows: write one object with question and answer a line")
    check_rows(rows, path, TEXTS)
    return rows


def check_rows(rows: list, where, fields: dict, first: int = 1):
    """Every row has these fields, and none is empty. Raises InputError, with `where` and the row's number."""
    for number, row in enumerate(rows, first):
        if not isinstance(row, dict):
            raise InputError(f"{where} row {number}: a row must be an object, got {str(row)[:60]}")
        for field, kind in fields.items():
            value = row.get(field)
            texts = value if isinstance(value, list) else [value]
            filled = texts and all(isinstance(text, str) and text.strip() for text in texts)
            if filled and any("\ud800" <= c <= "\udfff" for text in texts for c in text):
                raise InputError(f"{where} row {number}: {field} has half of a character (a surrogate), "
                                 "which is no text")
            if not (isinstance(value, kind) and filled):
                needed = "a list of non-empty texts" if kind is list else "a non-empty text"
                raise InputError(f"{where} row {number}: {field} must be {needed}, got {value!r}"[:400])


def check_optional(rows: list, where, fields: dict, first: int = 1):
    """All rows have these fields where one row has one of them. Raises InputError."""
    if any(row.get(field) is not None for row in rows for field in fields):
        check_rows(rows, where, fields, first)


def _own_task(forget_file: str | None, retain_file: str | None) -> Task:
    if not (forget_file and retain_file):
        raise InputError(f"own data needs both files: got --forget {forget_file} and --retain {retain_file}")
    files = {"forget": Path(forget_file), "retain": Path(retain_file)}
    sets = {name: read_rows(file) for name, file in files.items()}
    for name, file in files.items():
        check_optional(sets[name], file, PERTURBED)
    check_optional(sets["forget"], files["forget"], {ALTERNATIVE: str})
    shared = set.intersection(*({(row["question"], row["answer"]) for row in some} for some in sets.values()))
    if shared:
        raise InputError(f"{len(shared)} rows are in --forget and in --retain, such as {min(shared)[0]!r}; "
                         "take them out of one"[:400])
    return Task(f"{files['forget'].name}, {files['retain'].name}", "own", sets["forget"] + sets["retain"],
                sets["forget"], sets["retain"], sets, REFUSALS, "builtin", fingerprint(sets))


def _from_hub(data: str, name: str) -> list:
    import datasets  # only a Hub id needs it, and its import takes a second
    try:
        return [dict(row) for row in datasets.load_dataset(data, name, split="train")]
    except Exception as error:  # network, cache and format failures: the sentence carries it
        raise InputError(f"--data {data}: cannot load {name} from the Hub ({cause_of(error)}); without "
                         f"network, bring {'.json, '.join(SETS)}.json by hand into a folder, or take builtin"
                         ) from None
