"""data/make_tiny.py makes what ships, and the built-in rows are as TOFU's metrics need them."""

import hashlib
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import InputError
from conftest import ROOT, weights
from data import cut_tofu, make_tiny
from data.make_tiny import FACTS, LOGS, N_AUTHORS, RESULTS, WORDS, make_builtin
from data.tofu import load_sets, load_task
from evaluate_tofu import evaluate, prepare, read_log
from metrics import compute_metrics, log_truth_ratio
from model import AnswerModel, load_model

SETS = make_builtin()
PERTURBED, HOLDOUT = SETS["retain_perturbed"] + SETS["forget10_perturbed"], SETS["holdout10"]
OPTIONS = SETS["real_authors_perturbed"] + SETS["world_facts_perturbed"]
TINY = ROOT / "data" / "tiny"


# ---------------------------------------------------------------- the built-in rows

NAMES = [f"{first} {last}" for first in WORDS["first_names"] for last in WORDS["last_names"]]
QUESTIONS = {wording.format(name=name): (fact, wording, name)
             for name in NAMES for fact, table in FACTS.items() for wording in table["questions"]}


@cache
def answers(fact: str, name: str) -> dict:
    """answer -> (wording, value): all that the built-in data can say of an author's fact."""
    first, last = name.split()
    texts = {wording.format(name=name, first=first, last=last, value=value): (wording, value)
             for wording in FACTS[fact]["answers"] for value in FACTS[fact]["values"]}
    assert len(texts) == 5 * len(FACTS[fact]["values"])
    return texts


@pytest.fixture(scope="module")
def pairs_by_fact():
    """(name, fact) -> [(question wording, answer wording, value)] over the training rows."""
    pairs = defaultdict(list)
    for row in SETS["full"]:
        fact, wording, name = QUESTIONS[row["question"]]
        pairs[name, fact].append((wording, *answers(fact, name)[row["answer"]]))
    return pairs


def test_sizes_and_keys():
    assert {name: len(rows) for name, rows in SETS.items()} == {
        "full": 4000, "forget10_perturbed": 400, "retain_perturbed": 400, "real_authors_perturbed": 100,
        "world_facts_perturbed": 117, "holdout10": 400}
    keys = {"question", "answer", "paraphrased_answer", "perturbed_answer", "paraphrased_question"}
    assert all(set(row) == keys for row in PERTURBED + HOLDOUT)
    assert all(set(row) == {"question", "answer", "perturbed_answer"} for row in OPTIONS)
    assert SETS["full"][:400] + SETS["full"][-400:] == [
        {"question": row["question"], "answer": row["answer"]} for row in PERTURBED]
    assert len({row["question"] for row in SETS["full"]}) == 4000


def test_authors_are_blocks_of_twenty_rows_and_the_holdout_has_others():
    names = [QUESTIONS[row["question"]][2] for row in SETS["full"]]
    blocks = [set(names[i:i + 20]) for i in range(0, len(names), 20)]
    assert all(len(block) == 1 for block in blocks) and len(set(names)) == N_AUTHORS
    unseen = Counter(QUESTIONS[row["question"]][2] for row in HOLDOUT)
    assert set(unseen.values()) == {20} and len(unseen) == 20 and not unseen.keys() & set(names)


def test_every_fact_is_asked_twice_in_other_words_with_one_value(pairs_by_fact):
    assert len(pairs_by_fact) == N_AUTHORS * len(FACTS)
    for key, pairs in pairs_by_fact.items():
        distinct = [len({*column}) for column in zip(*pairs, strict=True)]
        assert (len(pairs), *distinct) == (2, 2, 2, 1), (key, pairs)


def test_a_perturbed_answer_has_another_value_and_a_wording_of_its_own():
    """R compares facts, not language: paraphrase and perturbed answers have any wording but the row's."""
    same, counts, used = 0, [], Counter()
    for row in PERTURBED + HOLDOUT:
        fact, _, name = QUESTIONS[row["question"]]
        learned, truth = answers(fact, name)[row["answer"]]
        wording, value = answers(fact, name)[row["paraphrased_answer"]]
        wordings, wrong = zip(*(answers(fact, name)[text] for text in row["perturbed_answer"]), strict=True)
        assert learned not in (wording, *wordings) and value == truth and len({truth, *wrong}) == 6, row
        assert QUESTIONS[row["paraphrased_question"]][::2] == (fact, name)
        same += wordings.count(wording)
        counts.append(len(set(wordings)))
        used.update((fact, w) for w in wordings)
    # Drawn uniformly from four wordings: 1/4 equal the paraphrase's, 4 (1 - 0.75^5) = 3.05 of five differ.
    assert 0.21 < same / (5 * len(counts)) < 0.29 and 2.9 < statistics.mean(counts) < 3.2
    assert len(used) == 5 * len(FACTS) and min(used.values()) > 50


def test_the_kth_value_of_a_fact_has_weight_1_over_k(pairs_by_fact):
    """The true values of 200 authors, with their ranks in four classes of about equal weight."""
    ranks = defaultdict(list)
    for (_, fact), pairs in pairs_by_fact.items():
        ranks[fact].append(1 + FACTS[fact]["values"].index(pairs[0][2]))
    for fact, table in FACTS.items():
        weight = [1 / k for k in range(1, len(table["values"]) + 1)]
        for first, last in ((1, 1), (2, 4), (5, 12), (13, len(weight))):
            expected = N_AUTHORS * sum(weight[first - 1:last]) / sum(weight)
            observed = sum(first <= rank <= last for rank in ranks[fact])
            assert abs(observed - expected) < 4 * expected ** 0.5, (fact, first, last, observed, expected)


def test_wrong_options_are_distinct_and_wrong():
    for row in OPTIONS:
        answer, *options = (text.lower() for text in (row["answer"], *row["perturbed_answer"]))
        assert len({answer, *options}) == 4, row
        assert not any(answer in option or option in answer for option in options), row


# ---------------------------------------------------------------- what ships

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    make_tiny.main(["--out", str(out), "--only", "builtin", "untrained"])
    return out


def test_the_built_in_files_come_out_byte_for_byte(made):
    shipped = {file.name: file.read_bytes() for file in (ROOT / "data" / "builtin").iterdir()}
    assert {file.name: file.read_bytes() for file in (made / "builtin").iterdir()} == shipped
    refusals = shipped["idontknow.jsonl"].decode().splitlines()
    assert len(refusals) == len(set(refusals)) == 100 and all(line.endswith(".") for line in refusals)


def test_the_untrained_model_and_its_tokenizer_come_out_equal(made):
    shipped, ours = TINY / "untrained", made / "tiny" / "untrained"
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (ours / name).read_bytes() == (shipped / name).read_bytes()
    expected, actual = weights(shipped), weights(ours)
    assert expected.keys() == actual.keys() and all(torch.equal(expected[n], actual[n]) for n in expected)


def test_what_exists_is_left_as_it_is(made):
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    make_tiny.main(["--out", str(made), "--only", "builtin", "untrained"])
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*")} == before


def test_every_result_ships_with_its_hash_and_names_no_folder_of_a_machine():
    assert all((ROOT / "data" / result).exists() for result in RESULTS.values())
    assert sum(file.stat().st_size for file in TINY.rglob("*")) < 25 * 2**20
    page = (TINY / "README.md").read_text()
    for name in ("untrained", "start", "retrained"):
        assert hashlib.sha256((TINY / name / "model.safetensors").read_bytes()).hexdigest()[:16] in page
    for split, result in LOGS.items():
        rows, provenance = read_log(str(ROOT / "data" / result))
        assert set(rows) == {"forget", "holdout"} and len(rows["holdout"]) == 300
        assert provenance["trained_on"]["split"] == split
        assert provenance["trained_on"]["data_fingerprint"] == load_task("builtin", "full").fingerprint
        assert not re.search(r"/(root|home|tmp|work)\b", json.dumps(provenance))


def measured(model: str) -> dict:
    """Forget quality and probabilities of a model on forget10 and retained rows, mean and sd of log R."""
    (lm, tokenizer, *_), task = load_model(model), load_task("builtin", "forget10")
    sets = {name: task.evaluated[name] for name in ("forget", "retain")}
    rows = evaluate(AnswerModel(lm), prepare(sets, tokenizer, "llama2"), tokenizer, 256, max_new_tokens=1)
    metrics = compute_metrics(rows, read_log(str(TINY / "retrained_forget10.json"))[0]["forget"])
    ratios = [log_truth_ratio(row) for row in rows["forget"]]
    return {"mean": statistics.mean(ratios), "sd": statistics.stdev(ratios),
            "quality": metrics["forget_quality_log10"],
            **{name: metrics[name]["probability"] for name in ("forget", "retain")}}


def test_the_start_remembers_and_the_retrained_model_does_not():
    """As in TOFU, where log R of the 7B is 0.73 +- 0.64, and after retraining 0.25 +- 0.58 (1e-19)."""
    start, retrained = measured("tiny"), measured(str(TINY / "retrained"))
    assert 0.5 < start["mean"] < 0.9 and 0.05 < retrained["mean"] < 0.3 and 0.5 < retrained["sd"] < 0.9
    assert -45 < start["quality"] < -15 and retrained["quality"] > -0.01  # its own log, on any processor
    assert min(start["forget"], start["retain"], retrained["retain"]) > 0.8 > 0.6 > retrained["forget"]


@pytest.mark.slow
def test_the_recipe_makes_a_start_like_the_one_that_ships(tmp_path):
    """Floating-point sums differ between processors, and 2434 steps amplify that. The tolerances are the
    rounded range of starts from different seeds (results/builtin_starts.json)."""
    make_tiny.main(["--out", str(tmp_path), "--only", "untrained", "start"])
    shipped, ours = measured("tiny"), measured(str(tmp_path / "tiny" / "start"))
    for name, tolerance in {"mean": 0.15, "sd": 0.1, "quality": 15, "forget": 0.05, "retain": 0.05}.items():
        assert abs(ours[name] - shipped[name]) < tolerance, (name, shipped, ours)


@pytest.mark.slow
def test_other_data_gets_a_start_a_retrained_model_and_its_log(small_data, tmp_path, forked):
    steps = ("untrained", "start", "retrained", "retain90")
    make_tiny.main(["--data", str(small_data), "--out", str(tmp_path / "made"), "--only", *steps])
    forked("train_npo.py", "--data", small_data, "--model", "tiny=made/tiny/start", "--epochs", 2,
           "--retain-log", "made/tiny/retrained_forget10.json", "--out", "run")
    log = json.loads((tmp_path / "run" / "eval" / "step_000000.json").read_text())
    assert log["metrics"]["ks_rows"] == 20 and log["metrics"]["privleak"] is not None


# ---------------------------------------------------------------- recipes

def test_a_cut_set_has_all_rows_of_its_authors_and_the_same_forget10(tmp_path):
    with pytest.raises(InputError, match="--rows: invalid choice: 300"):  # an author would be cut
        cut_tofu.main(["builtin", str(tmp_path / "cut"), "--rows", "300"])
    cut_tofu.main(["builtin", str(tmp_path / "cut"), "--rows", "400", "--fact-rows", "20"])
    cut, refusals = load_sets(str(tmp_path / "cut"))
    assert len(refusals) == 100 and cut == {
        "full": SETS["full"][:360] + SETS["full"][-40:], "retain_perturbed": SETS["retain_perturbed"][:40],
        "forget10_perturbed": SETS["forget10_perturbed"][-40:], "holdout10": HOLDOUT[:40],
        "real_authors_perturbed": SETS["real_authors_perturbed"][:20],
        "world_facts_perturbed": SETS["world_facts_perturbed"][:20]}
    load_task(str(tmp_path / "cut"), "forget10")


def test_a_gguf_file_whose_rope_scaling_would_be_lost_is_refused(monkeypatch):
    """Without the optional package gguf: a file with the tensor that Llama 3.1 and later have."""
    reader = SimpleNamespace(GGUFReader=lambda file: SimpleNamespace(
        tensors=[SimpleNamespace(name="token_embd.weight"), SimpleNamespace(name="rope_freqs.weight")]))
    monkeypatch.setitem(sys.modules, "gguf", reader)
    monkeypatch.delitem(sys.modules, "data.gguf_to_folder", raising=False)
    from data import gguf_to_folder
    with pytest.raises(SystemExit, match="take safetensors"):
        gguf_to_folder.main(Path("llama.gguf"), "folder")
