"""TOFU's rows and splits (Maini et al., 2024), the built-in stand-in in its format, or the user's own rows.

Every published split is a slice of `full`: forgetNN is its last NN per cent, retain(100-NN) the rest. The
rows for evaluation, which have paraphrased and perturbed answers, are its last (forget) and first (retain)
rows.
"""

import csv
import json
import re
import unicodedata
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from common import InputError, cause_of, fingerprint
from data.prompts import Chat, Document, Prompt

BUILTIN = Path(__file__).with_name("builtin")
SETS = ("full", "forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
HOLDOUT = "holdout10"  # rows like those of forget10_perturbed that no model is trained on; optional
EVALUATED = ("forget", "retain", "real_authors", "world_facts")
KINDS = {"question": ("question", "answer"), "prompt": ("prompt", "completion"), "messages": ("messages",),
         "text": ("text",)}  # of rows, by a field that tells them
NEEDED = dict.fromkeys(("question", "answer", "prompt", "completion", "text"), "a non-empty text") | {
    "messages": "at least two turns with role and content, the first not the assistant's, the last its"}
FIELDS = {*sum(KINDS.values(), ()), "paraphrased_answer", "perturbed_answer"}
PART = re.compile("forget[0-9]{2}_([0-9]+)to([0-9]+)")  # rows of a forget split, the end left out
TINY_FACT_REPEATS = 4  # the tiny model sees each real-author and world-fact row this often per epoch


@dataclass(frozen=True)
class Task:
    """The rows to train on and to evaluate. A row is a dictionary with at least a question and an answer."""
    source: str
    forget: list  # rows to unlearn; empty for a full or retain split
    retain: list
    evaluated: dict  # name in EVALUATED -> rows; own data has only forget and retain
    refusals: list  # "I don't know" answers
    holdout: list
    fingerprint: str  # of all rows but the holdout

    def facts(self) -> list:
        """The real-author and world-fact rows that the tiny model learns in each epoch of fine-tuning."""
        return TINY_FACT_REPEATS * [row for name in ("real_authors", "world_facts")
                                    for row in self.evaluated.get(name, [])]


def parse_split(split: str) -> tuple[str, int]:
    """"forget10" and its part "forget10_0to100" -> ("forget", 10), "full" -> ("full", 100). Raises
    InputError."""
    match = re.fullmatch(r"(forget|retain)([0-9]{2})", split.partition("_")[0])
    if split == "full":
        return "full", 100
    if not match or match[2] == "00" or "_" in split and not PART.fullmatch(split):
        raise InputError(f"unknown split {split!r}: need full, forgetNN or retainNN with NN from 01 to 99, "
                         "or a part such as forget10_0to100")
    return match[1], int(match[2])


def complement(split: str) -> str:
    """The split with all other rows: "forget05" -> "retain95", and back."""
    kind, percent = parse_split(split)
    return f"{'retain' if kind == 'forget' else 'forget'}{100 - percent:02d}"


def evaluation_split(split: str) -> str:
    """The forget split on which a model is judged: "retain95" -> "forget05", "full" -> "forget10"."""
    if split == "full":
        return "forget10"
    return complement(split) if split.startswith("retain") else split.partition("_")[0]


def slice_rows(rows: list, split: str) -> list:
    """The split's rows, a slice of `rows`. A forget and a retain split have at least one row each. Raises
    InputError for a part without rows."""
    kind, percent = parse_split(split)
    if kind == "full":
        return rows
    n_forget = round(len(rows) * (percent if kind == "forget" else 100 - percent) / 100)
    n_forget = min(max(n_forget, 1), len(rows) - 1)
    if part := PART.fullmatch(split):
        first, end = map(int, part.groups())
        if not first < end <= n_forget:
            raise InputError(f"--split {split}: forget{percent:02d} has {n_forget} rows, counted from 0")
        return rows[-n_forget:][first:end]
    return rows[-n_forget:] if kind == "forget" else rows[:-n_forget]


def load_task(data: str, split: str, forget_file: str | None = None, retain_file: str | None = None,
              unseen_file: str | None = None) -> Task:
    """The rows of `data` (builtin, a folder, a Hub id), or of the user's own files. Raises InputError."""
    if forget_file or retain_file or unseen_file:
        return own_task({"forget": forget_file, "retain": retain_file, "unseen": unseen_file})
    sets, refusals = load_sets(data)
    full, judged = sets["full"], evaluation_split(split)
    # No row before the last 10% has perturbed answers, so a larger split is judged on the last 10%.
    # The names of forget splits sort as their percentages do.
    perturbed = sets["forget10_perturbed"][-len(slice_rows(full, min(judged, "forget10"))):]
    if [row["question"] for row in perturbed] != [row["question"] for row in full[-len(perturbed):]]:
        raise InputError(f"{data}: the questions in forget10_perturbed.json are not the last of full.json")
    # A large forget split may reach into the rows of retain_perturbed.
    n_kept = len(slice_rows(full, complement(judged)))
    evaluated = {"forget": perturbed, "retain": sets["retain_perturbed"][:n_kept],
                 "real_authors": sets["real_authors_perturbed"], "world_facts": sets["world_facts_perturbed"]}
    forget = slice_rows(full, split) if split.startswith("forget") else []
    retain = slice_rows(full, complement(split) if forget else split)
    kept, forgotten, measured = ({row["question"] for row in rows} for rows in (
        slice_rows(full, complement(judged)), perturbed, evaluated["retain"]))
    if measured & forgotten - kept:
        raise InputError(f"{data}: retain_perturbed.json has questions of forget10_perturbed.json")
    source = Path(data).resolve().name if Path(data).is_dir() else data  # records keep no path of a machine
    return Task(source, forget, retain, evaluated, refusals, sets.get(HOLDOUT, []),
                fingerprint({name: sets[name] for name in SETS}, refusals))


def load_sets(data: str) -> tuple[dict, list]:
    """Name in SETS (and HOLDOUT where the data has one) -> rows, and the refusals. Raises InputError."""
    folder = BUILTIN if data == "builtin" else Path(data)
    if not folder.is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", data):
        return sets_from_hub(data), read_refusals(BUILTIN)
    files = {name: file for name in (*SETS, HOLDOUT) if (file := folder / f"{name}.json").is_file()}
    if missing := [f"{name}.json" for name in SETS if name not in files]:
        raise InputError(f"--data {data}: {', '.join(missing)} not found; give builtin, a folder with TOFU's "
                         "files, or a Hub id such as locuslab/TOFU")
    return {name: read_rows(file) for name, file in files.items()}, read_refusals(folder)


def sets_from_hub(data: str) -> dict:
    import datasets  # imported here because the import takes a second
    try:
        return {name: list(datasets.load_dataset(data, name, split="train")) for name in SETS}
    except Exception as error:  # the network, the cache and the format each raise their own kinds
        raise InputError(f"--data {data}: cannot load it from the Hub ({cause_of(error)}); without network, "
                         f"put {'.json, '.join(SETS)}.json by hand into a folder") from None


def read_refusals(folder: Path) -> list:
    """The lines of idontknow.jsonl, which is plain text in spite of its name. The built-in file stands in."""
    file = folder / "idontknow.jsonl"
    file = file if file.is_file() else BUILTIN / file.name
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_file(path: Path) -> list:
    """The rows of a file: CSV, Parquet, JSON lines or a JSON list. Raises InputError with file and line."""
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet  # imported here because the import takes half a second
            rows = parquet.read_table(path).to_pylist()
            return [{name: row[name] for name in FIELDS & row.keys()} for row in rows]
        if path.suffix.lower() == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                csv.field_size_limit(2**31 - 1)  # of a document, in characters
                return list(csv.DictReader(file, strict=True))
        text, rows = path.read_text(encoding="utf-8-sig"), []  # Windows begins files with a byte-order mark
    except (OSError, ValueError, csv.Error) as error:  # also bytes that are not UTF-8, and pyarrow's
        raise InputError(f"cannot read {path} ({cause_of(error)}): need an existing file in UTF-8") from None
    is_list = text.lstrip().startswith("[")
    for number, line in enumerate([text] if is_list else text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"{path} line {number}: not JSON ({error}); need one object") from None
    return rows[0] if is_list else rows


def read_rows(path: Path) -> list:
    """The file's rows, each with question and answer. Raises InputError with file and row."""
    if not (rows := read_file(path)):
        raise InputError(f"{path} has no rows: write one object with question and answer per line")
    first = rows[0].keys() if isinstance(rows[0], dict) else {}
    kind = next((kind for kind, fields in KINDS.items() if {*fields} <= {*first}),
                next((kind for kind in KINDS if kind in first), "question"))
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict) and None in row:  # where csv puts what is behind the last column
            raise InputError(f"{path} row {number}: more fields than columns: put quotes around a text that "
                             "has a comma")
        for field in KINDS[kind]:
            text = row.get(field) if isinstance(row, dict) else None
            if not (is_chat if field == "messages" else is_text)(text):
                raise InputError(f"{path} row {number}: {field} must be {NEEDED[field]}, got {row!r}"[:500] +
                                 "; a row has question and answer, prompt and completion, messages, or text")
        perturbed = row.get("perturbed_answer") or []
        if not isinstance(perturbed, list) or not all(
                map(is_text, [*perturbed, row.get("paraphrased_answer") or "none"])):
            raise InputError(f"{path} row {number}: perturbed_answer must be a list of texts, and "
                             "paraphrased_answer a text")
    return [with_question(row, kind) for row in rows]


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_chat(messages) -> bool:
    """Whether these are at least two turns with a text each, the last one the assistant's."""
    turns = isinstance(messages, list) and len(messages) > 1 and all(
        isinstance(m, dict) and is_text(m.get("role")) and is_text(m.get("content")) for m in messages)
    return turns and messages[0]["role"] != "assistant" and messages[-1]["role"] == "assistant"


def with_question(row: dict, kind: str) -> dict:
    """The row with a question, whose class says how its prompt is made, and its answer."""
    if kind == "question":
        return row
    if kind == "messages":
        *before, last = row["messages"]
        question, answer = Chat(before[-1]["content"]), last["content"]
        question.messages = before
    elif kind == "prompt":
        question, answer = Prompt(row["prompt"]), row["completion"]
    else:
        text = row["text"]
        cut = max(0, text.rfind(" ", 0, len(text) // 4 + 1)) or max(1, len(text) // 4)  # the first quarter
        question, answer = Document(text[:cut]), text[cut:]
    question.rest = answer
    return row | {"question": question, "answer": answer}


def normalised(row: dict) -> tuple:
    """All of the row's text without differences of Unicode form, case and white space."""
    turns = [turn["content"] for turn in getattr(row["question"], "messages", [])] or [row["question"]]
    texts = [row["text"]] if isinstance(row["question"], Document) else [*turns, row["answer"]]
    return tuple(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)


def own_task(files: dict) -> Task:
    """The user's own rows. Without a retain file only objectives without a retain or K term can be used."""
    files = {name: Path(path) for name, path in files.items() if path}
    if "forget" not in files:
        raise InputError(f"--{min(files)} needs --forget: give the file with the rows to unlearn")
    sets = {name: read_rows(path) for name, path in files.items()}
    if len({type(rows[0]["question"]) for rows in sets.values()}) > 1:
        raise InputError("the files have rows of different kinds: write all rows in one way")
    for one, other in combinations(sets, 2):
        texts = {*map(normalised, sets[other])}
        if in_both := [row["question"] for row in sets[one] if normalised(row) in texts]:
            raise InputError(f"{len(in_both)} rows are in --{one} and in --{other}, such as "
                             f"{min(in_both)[:200]!r}: take them out of one file")
    if "unseen" in sets and min(len(sets["forget"]), len(sets["unseen"])) < 2:
        raise InputError("--unseen compares rows: give at least two, and two to forget")
    unseen, names = sets.pop("unseen", []), ", ".join(path.name for path in files.values())
    return Task(names, sets["forget"], sets.get("retain", []), sets, read_refusals(BUILTIN), unseen,
                fingerprint(sets))
