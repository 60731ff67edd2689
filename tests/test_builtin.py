"""The built-in stand-in for TOFU: its sizes and slices, and what a forget quality measured on it rests on."""

import json
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from conftest import ROOT
from data import builtin
from data.builtin import FACTS, N_AUTHORS, REFUSALS, SEED, make_builtin
from data.tofu import load_sets, load_task
from data.write_sets import write_sets
from evaluate_tofu import compute_metrics, log_truth_ratio
from support.errors import InputError

PER_AUTHOR = 20
SPLITS = make_builtin()
PERTURBED = SPLITS["retain_perturbed"] + SPLITS["forget10_perturbed"]
HOLDOUT = SPLITS["holdout10"]
OPTIONS = SPLITS["real_authors_perturbed"] + SPLITS["world_facts_perturbed"]


def pattern(wording: str, **known: str) -> str:
    """A wording as a regular expression: its known fields filled in, the others named groups."""
    fields = {field: re.escape(known[field]) if field in known else f"(?P<{field}>.+)"
              for field in ("name", "first", "last", "value")}
    return re.sub(r"\\\{(\w+)\\\}", lambda field: fields[field[1]], re.escape(wording))


def parse_question(question: str) -> tuple[str, str, str]:
    """(fact, question wording, name); exactly one wording fits."""
    found = [(fact, wording, match["name"]) for fact, table in FACTS.items() for wording in table["questions"]
             if (match := re.fullmatch(pattern(wording).replace(".+", r"\w+ \w+"), question))]
    assert len(found) == 1, (question, found)
    return found[0]


def parse_answer(answer: str, fact: str, name: str) -> tuple[str, str]:
    """(answer wording, value); exactly one wording fits with a value of the fact."""
    first, last = name.split()
    found = [(wording, match["value"]) for wording in FACTS[fact]["answers"]
             if (match := re.fullmatch(pattern(wording, name=name, first=first, last=last), answer))
             and match["value"] in FACTS[fact]["values"]]
    assert len(found) == 1, (answer, found)
    return found[0]


@pytest.fixture(scope="module")
def pairs_by_fact():
    """(name, fact) -> [(question wording, answer wording, value)] over the training rows."""
    pairs = defaultdict(list)
    for row in SPLITS["full"]:
        fact, wording, name = parse_question(row["question"])
        pairs[name, fact].append((wording, *parse_answer(row["answer"], fact, name)))
    return pairs


def test_sizes_and_keys():
    assert {split: len(rows) for split, rows in SPLITS.items()} == {
        "full": 4000, "forget10_perturbed": 400, "retain_perturbed": 400,
        "real_authors_perturbed": 100, "world_facts_perturbed": 117, "holdout10": 400}
    assert all(set(row) == {"question", "answer"} for row in SPLITS["full"])
    keys = {"question", "answer", "paraphrased_answer", "perturbed_answer", "paraphrased_question"}
    assert all(set(row) == keys for row in PERTURBED + HOLDOUT)
    assert all(set(row) == {"question", "answer", "perturbed_answer"} for row in OPTIONS)


def test_a_seed_names_one_data_set():
    assert make_builtin(SEED) == SPLITS
    other = make_builtin(SEED + 1)
    assert all(other[split] != rows for split, rows in SPLITS.items())
    for bad in (-1, 1.5, "0"):
        with pytest.raises(ValueError, match="seed"):
            make_builtin(bad)


def test_perturbed_rows_are_the_ends_of_full():
    pairs = [{"question": row["question"], "answer": row["answer"]} for row in PERTURBED]
    assert pairs == SPLITS["full"][:400] + SPLITS["full"][-400:]


def test_questions_are_distinct():
    for split in ("full", "real_authors_perturbed", "world_facts_perturbed"):
        questions = [row["question"] for row in SPLITS[split]]
        assert len(set(questions)) == len(questions), split


def test_each_author_is_one_block_of_twenty_rows():
    names = [parse_question(row["question"])[2] for row in SPLITS["full"]]
    blocks = [set(names[i:i + PER_AUTHOR]) for i in range(0, len(names), PER_AUTHOR)]
    assert all(len(block) == 1 for block in blocks) and len(set.union(*blocks)) == N_AUTHORS


def test_every_fact_is_asked_twice_in_other_words_with_one_value(pairs_by_fact):
    assert len(pairs_by_fact) == N_AUTHORS * len(FACTS)
    for key, pairs in pairs_by_fact.items():
        questions, answers, values = map(set, zip(*pairs, strict=True))
        assert (len(pairs), len(questions), len(answers), len(values)) == (2, 2, 2, 1), (key, pairs)


def test_a_perturbed_answer_has_another_value_and_a_wording_of_its_own(pairs_by_fact):
    same, n_wordings, used = 0, [], Counter()
    for row in PERTURBED:
        fact, _, name = parse_question(row["question"])
        (_, _, truth), _ = pairs_by_fact[name, fact]
        wording, value = parse_answer(row["paraphrased_answer"], fact, name)
        own, _ = parse_answer(row["answer"], fact, name)
        wordings, wrong = zip(
            *(parse_answer(answer, fact, name) for answer in row["perturbed_answer"]), strict=True)
        assert own not in (wording, *wordings), row
        assert value == truth
        assert len({truth, *wrong}) == 6, row
        same += wordings.count(wording)
        n_wordings.append(len(set(wordings)))
        used.update((fact, w) for w in wordings)
    # Drawn uniformly from four: a quarter has the paraphrase's, 4 (1 - 0.75^5) = 3.05 of a row's five differ.
    assert 0.21 < same / (5 * len(PERTURBED)) < 0.29
    assert 2.9 < statistics.mean(n_wordings) < 3.2
    assert len(used) == 5 * len(FACTS) and min(used.values()) > 50


def test_the_kth_value_of_a_fact_has_weight_1_over_k(pairs_by_fact):
    """The true values of 200 authors, their ranks in four classes of about equal weight."""
    for fact, table in FACTS.items():
        values = [pairs[0][2] for (_, of), pairs in pairs_by_fact.items() if of == fact]
        ranks = [1 + table["values"].index(value) for value in values]
        weights = [1 / k for k in range(1, len(table["values"]) + 1)]
        for first, last in ((1, 1), (2, 4), (5, 12), (13, len(weights))):
            expected = N_AUTHORS * sum(weights[first - 1:last]) / sum(weights)
            seen = sum(first <= rank <= last for rank in ranks)
            assert abs(seen - expected) < 4 * expected ** 0.5, (fact, first, last, seen, expected)


def test_the_order_of_the_values_is_shuffled_and_the_same_for_every_seed():
    assert FACTS["birth year"]["values"] != sorted(FACTS["birth year"]["values"])
    # One list, an order for each fact.
    assert FACTS["mother's job"]["values"] != FACTS["father's job"]["values"]


def test_holdout_authors_are_twenty_others_with_rows_of_the_same_form():
    seen = {parse_question(row["question"])[2] for row in SPLITS["full"]}
    by_name = defaultdict(list)
    for row in HOLDOUT:
        by_name[parse_question(row["question"])[2]].append(row)
    assert len(by_name) == 20 and not seen & set(by_name)
    for name, rows in by_name.items():
        values = defaultdict(set)
        for row in rows:
            fact, _, _ = parse_question(row["question"])
            texts = row["answer"], row["paraphrased_answer"]
            values[fact] |= {parse_answer(text, fact, name)[1] for text in texts}
            wrong = {parse_answer(answer, fact, name)[1] for answer in row["perturbed_answer"]}
            assert len(wrong | values[fact]) == 6, row
        assert len(rows) == PER_AUTHOR and len(values) == len(FACTS)
        assert all(len(v) == 1 for v in values.values())


def test_the_authors_do_not_depend_on_the_holdout(monkeypatch):
    monkeypatch.setattr(builtin, "N_HOLDOUT_AUTHORS", 3)
    fewer = make_builtin(SEED)
    assert len(fewer.pop("holdout10")) == 3 * PER_AUTHOR
    assert fewer == {split: rows for split, rows in SPLITS.items() if split != "holdout10"}


def test_the_holdout_changes_nothing_of_a_task(tmp_path):
    write_sets(tmp_path / "data", SPLITS)
    with_holdout, task = load_sets(str(tmp_path / "data"))[0], load_task(str(tmp_path / "data"), "forget10")
    assert with_holdout["holdout10"] == HOLDOUT
    (tmp_path / "data" / "holdout10.json").unlink()
    without = load_task(str(tmp_path / "data"), "forget10")
    assert "holdout10" not in load_sets(str(tmp_path / "data"))[0]
    assert replace(task, holdout=()) == without
    assert task.fingerprint == load_task("builtin", "forget10").fingerprint


def test_a_paraphrase_is_in_words_known_from_other_authors(pairs_by_fact):
    users = defaultdict(set)  # (fact, answer wording) -> names
    for (name, fact), pairs in pairs_by_fact.items():
        for _, answer_wording, _ in pairs:
            users[fact, answer_wording].add(name)
    retained = {parse_question(row["question"])[2] for row in SPLITS["full"][:-400]}
    for row in PERTURBED:
        fact, question_wording, name = parse_question(row["question"])
        own_questions = {wording for wording, _, _ in pairs_by_fact[name, fact]}
        wording, _ = parse_answer(row["paraphrased_answer"], fact, name)
        assert len(users[fact, wording] & retained) >= 40, (fact, wording)
        asked, asked_wording, of = parse_question(row["paraphrased_question"])
        assert (asked, of) == (fact, name)
        assert question_wording in own_questions and asked_wording not in own_questions


def test_wrong_options_are_distinct_and_wrong():
    for row in OPTIONS:
        assert len({row["answer"], *row["perturbed_answer"]}) == 4, row
        assert len(row["answer"].split()) <= 3, row
        for option in row["perturbed_answer"]:
            answer, option = row["answer"].lower(), option.lower()
            assert answer not in option and option not in answer, row


def test_refusals():
    assert len(REFUSALS) == len(set(REFUSALS)) == 100
    assert all("\n" not in refusal and refusal.endswith(".") for refusal in REFUSALS)


def test_the_folder_holds_the_data_set(tmp_path):
    folder = tmp_path / "new" / "builtin"
    write_sets(folder, SPLITS, REFUSALS)
    files = {path.name for path in folder.iterdir()}
    assert files == {"idontknow.jsonl", *(f"{split}.json" for split in SPLITS)}
    for split, rows in SPLITS.items():
        lines = (folder / f"{split}.json").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
    assert (folder / "idontknow.jsonl").read_text(encoding="utf-8").splitlines() == REFUSALS
    assert list(folder.parent.iterdir()) == [folder]  # nothing unfinished stays beside it


def test_an_existing_folder_is_left_alone(tmp_path):
    with pytest.raises(InputError, match="exists"):
        write_sets(tmp_path, SPLITS)
    assert list(tmp_path.iterdir()) == []


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "data" / "write_sets.py", *map(str, arguments)],
                          capture_output=True, text=True)


def test_the_command(tmp_path):
    done = command("builtin", tmp_path / "a")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 6 and not done.stderr
    assert load_sets(str(tmp_path / "a")) == (SPLITS, REFUSALS, "idontknow.jsonl")

    (tmp_path / "file").touch()
    for arguments in (("builtin", tmp_path / "a"), ("builtin",), ("nowhere", tmp_path / "b"),
                      ("builtin", tmp_path / "b", "--rows", "x"), ("builtin", tmp_path / "file" / "b")):
        refused = command(*arguments)
        assert refused.returncode == 2 and not refused.stdout, arguments
        assert len(refused.stderr.splitlines()) == 1, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


def test_a_cut_set_is_whole_authors_with_the_same_forget10(tmp_path):
    write_sets(tmp_path / "a", SPLITS)
    done = command(tmp_path / "a", tmp_path / "cut", "--rows", 400, "--retain-rows", 30, "--fact-rows", 20)
    assert done.returncode == 0, done.stderr
    cut, _, refusals_from = load_sets(str(tmp_path / "cut"))
    assert refusals_from == "builtin"
    assert cut == {"full": SPLITS["full"][:360] + SPLITS["full"][-40:],
                   "forget10_perturbed": SPLITS["forget10_perturbed"][-40:],
                   "retain_perturbed": SPLITS["retain_perturbed"][:30],
                   "real_authors_perturbed": SPLITS["real_authors_perturbed"][:20],
                   "world_facts_perturbed": SPLITS["world_facts_perturbed"][:20], "holdout10": HOLDOUT[:40]}
    load_task(str(tmp_path / "cut"), "forget10")


@pytest.mark.slow
def test_log_r_of_start_and_retrained_model_spreads_as_in_tofu(command, tmp_path):
    """Llama-2-7B's released logs: start 0.73 +- 0.64, retrained 0.25 +- 0.58, forget quality 1e-19."""
    def trained(split: str) -> list[dict]:
        command("train_npo.py", "--loss", "sft", "--split", split, "--out", split, timeout=1800)
        log, = (tmp_path / split / "eval").glob("*.json")
        return json.loads(log.read_text())["rows"]["forget"]

    start, retrained = trained("full"), trained("retain90")
    start_ratios, retrained_ratios = (list(map(log_truth_ratio, rows)) for rows in (start, retrained))
    assert 0.5 < statistics.mean(start_ratios) < 0.9
    assert 0.05 < statistics.mean(retrained_ratios) < 0.3
    assert 0.5 < statistics.stdev(retrained_ratios) < 0.9
    assert -45 < compute_metrics({"forget": start}, retrained)["forget_quality_log10"] < -15
