"""The page's JavaScript under node equals torch: logits, gradients, ten steps of npo+rt, greedy answers."""

import copy
import json
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from transformers import AutoModelForCausalLM

import losses
import metrics
import minimal_npo
import synthetic
from conftest import ROOT
from data.prompts import Encoded
from data.synthetic_instances import fresh_instance

sys.path.insert(0, str(ROOT / "docs" / "unlearn"))
import make_data

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")
LR, BETA, STEPS, ROWS = 1e-3, 0.5, 10, 4
OBJECTIVES = [{"loss": "ga"}, {"loss": "npo", "beta": BETA}, {"loss": "npo", "beta": BETA, "retainWeight": 1}]
METHODS = [synthetic.Method("ga", 0.005), synthetic.Method("npo", 0.05, 0.5),
           synthetic.Method("npo+rt", 0.05, 2.0)]
PATH_STEPS = 60
Item = namedtuple("Item", "row partner")


@pytest.fixture(scope="module")
def data() -> dict:
    return make_data.read_data(ROOT / "docs" / "unlearn" / "data.js")


@pytest.fixture(scope="module")
def rows(data) -> dict:
    return data["rows"]


@pytest.fixture(scope="module")
def samples() -> list:
    """Pairs of samples of one size: near and far, small and large, with ties, and twice the same."""
    rng = np.random.default_rng(0)
    pairs = [rng.normal(0, 1, (2, n)) + [[0], [shift]] for n in (5, 40, 300) for shift in (0, 0.3, 3)]
    return [pair.tolist() for pair in (*pairs, rng.integers(0, 9, (2, 300)), np.ones((2, 20)))]


@pytest.fixture(scope="module")
def start():
    """The tiny start with weights rounded to float16, as the page has them."""
    lm = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny/start")
    for p in lm.parameters():
        p.data = p.data.half().float()
    return lm


@pytest.fixture(scope="module")
def stream() -> list:
    return [[Item((ROWS * step + k) % 40, (3 * ROWS * step + k) % 120) for k in range(ROWS)]
            for step in range(STEPS)]


@pytest.fixture(scope="module")
def instance() -> dict:
    """Section 4's instance with models that were trained for 500 steps."""
    drawn = fresh_instance(0, 0)
    reference, retrained = synthetic.reference_and_retrained(drawn, 1, 500)
    return {"drawn": drawn, "models": np.stack([reference, retrained]), "alpha": 1}


@pytest.fixture(scope="module")
def page(rows, stream, start, instance, samples, tmp_path_factory) -> dict:
    folder, ids = tmp_path_factory.mktemp("page"), ("ids", "start")
    texts = [{"ids": row["ids"], "places": list(range(len(row["ids"])))} for row in rows["forget"][:6]]
    short = {name: [{key: row[key] for key in ids} for row in part] for name, part in rows.items()}
    first = texts_of(rows["forget"][:ROWS])
    # W is 1 where the reference is the start, so here it is some nats away.
    reference = minimal_npo.answer_logps(start, first).sum(-1) + torch.tensor([1.0, -1.0, 3.0, 0.5])
    steps, warmup = [], max(1, 40 // ROWS)
    for step, items in enumerate(stream):
        lr = LR * (step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup))
        steps.append({"forget": [short["forget"][i.row] for i in items],
                      "retain": [short["retain"][i.partner] for i in items], "lr": lr})
    content = {"texts": texts, "samples": samples,
               "prompts": [row["ids"][:row["start"]] for row in rows["forget"][:6]],
               "instance": {
                   "alpha": 1,
                   **{name: values.tolist() for name, values in instance["drawn"]._asdict().items()},
                   **dict(zip(("reference", "retrained"), instance["models"].tolist(), strict=True))},
               "methods": [{"loss": m.loss, "beta": m.beta, "lr": m.lr, "retainWeight": int(m.retain == "rt"),
                            "steps": PATH_STEPS} for m in METHODS],
               "newTokens": 20, "objectives": OBJECTIVES, "steps": steps,
               "batch": {"forget": short["forget"][:ROWS], "retain": short["retain"][:ROWS],
                         "referenceLogps": reference.tolist()}}
    (folder / "input.json").write_text(json.dumps(content))
    subprocess.run([NODE, ROOT / "tests" / "unlearn_page.js", folder / "input.json", folder / "output.json"],
                   check=True)
    return {**content, **json.loads((folder / "output.json").read_text())}


def texts_of(part: list) -> list:
    return [Encoded(row["ids"], row["start"]) for row in part]


def gap(values, expected: torch.Tensor) -> float:
    """The largest difference over the largest value expected."""
    expected = expected.detach().double().numpy().ravel()
    return np.abs(np.array(values) - expected).max() / np.abs(expected).max()


def test_logits_equal_transformers(page, start):
    for text, logits in zip(page["texts"], page["logits"], strict=True):
        with torch.no_grad():
            expected = start(input_ids=torch.tensor([text["ids"]])).logits[0]
        assert gap(logits, expected) < 1e-5


@pytest.mark.parametrize("number", range(3), ids=["ga", "npo", "npo+rt"])
def test_gradients_equal_torch(page, rows, start, number):
    lm, objective = copy.deepcopy(start), OBJECTIVES[number]
    forget, retain = texts_of(rows["forget"][:ROWS]), texts_of(rows["retain"][:ROWS])
    logps = minimal_npo.answer_logps(lm, forget).sum(-1)
    if objective["loss"] == "ga":
        loss = losses.ga_loss(logps).sum() / sum(text.answer_tokens for text in forget)
    else:
        reference_logps = torch.tensor(page["batch"]["referenceLogps"])
        loss = losses.npo_loss(logps, reference_logps, BETA).mean()
    if "retainWeight" in objective:
        rt = losses.nll_loss(minimal_npo.answer_logps(lm, retain).sum(-1)).sum()
        loss = loss + rt / sum(text.answer_tokens for text in retain)
    loss.backward()
    result = page["gradients"][number]
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, p in lm.named_parameters():
        assert gap(result["gradients"][name], p.grad) < 1e-5, name


def test_ten_steps_of_npo_rt_end_at_the_weights_of_the_page_of_npo(page, rows, start, stream):
    lm = copy.deepcopy(start)
    forget, retain = texts_of(rows["forget"]), texts_of(rows["retain"])
    steps = minimal_npo.unlearn(lm, start, forget, retain, stream, LR, BETA)
    expected = [loss for loss, _ in steps]
    assert page["steps"] == pytest.approx(expected, rel=1e-4)
    for name, p in lm.named_parameters():
        assert gap(page["trained"][name], p) < 1e-4, name


def test_greedy_answers_are_the_same(page, start):
    for prompt, answer in zip(page["prompts"], page["answers"], strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        expected = start.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
        assert answer == expected[0, len(prompt):].tolist()


def test_section_4s_paths_equal_synthetic_py(page, instance):
    problem = synthetic.Problem([instance["drawn"]], 1, [instance["models"]])
    [paths] = problem.unlearn(METHODS, list(range(PATH_STEPS + 1)))
    for path, (forget, retain) in zip(page["paths"], paths, strict=True):
        assert path["forgetDistance"] == pytest.approx(forget, rel=1e-6)
        assert path["retainDistance"] == pytest.approx(retain, rel=1e-6)


def test_the_kolmogorov_smirnov_test_equals_scipys(page, samples):
    for (x, y), result in zip(samples, page["tests"], strict=True):
        expected = ks_2samp(x, y)
        assert result["rows"] == round(expected.statistic * len(x))
        assert result["p"] == pytest.approx(expected.pvalue, rel=1e-9)
        if result["rows"]:
            gap = abs(np.mean(np.array(x) <= result["at"]) - np.mean(np.array(y) <= result["at"]))
            assert gap == pytest.approx(expected.statistic)


def test_the_pages_runs_have_the_gap_and_the_p_of_their_records(page, data):
    judge = json.loads(make_data.LOGS[0].read_text(encoding="utf-8"))["rows"]["forget"]
    assert data["judge"]["logR"] == pytest.approx(metrics.log_truth_ratios(judge), abs=5e-5)
    assert {"ga", "npo", "npo+rt"} <= {run["name"] for run in data["runs"]}
    for run, tests in zip(data["runs"], page["runs"], strict=True):
        assert [test["rows"] for test in tests] == run["gapRows"]
        for test, decades in zip(tests, run["qualityLog10"], strict=True):
            assert np.log10(test["p"]) == pytest.approx(decades, abs=6e-4)


def made_up_run(folder, rng) -> dict:
    """A run folder of `train_npo.py` with random rows, evaluated at steps 0, 4 and 5 (which is not shown)."""
    judge = json.loads(make_data.LOGS[0].read_text(encoding="utf-8"))["rows"]["forget"]
    evaluations, names = {}, ("forget", "retain")
    for step in (0, 4, 5):
        rows = {name: [{"answer_nll": nlls[0], "answer_tokens": 9, "paraphrased_nll": nlls[1],
                        "paraphrased_tokens": 8, "perturbed_nll": nlls[2:].tolist(),
                        "perturbed_tokens": [7, 8, 9, 10, 11], "rouge_l_recall": 0.5,
                        "generation": f"{name} {i} {step}"}
                       for i, nlls in enumerate(rng.uniform(1, 90, (300, 7)))] for name in names}
        scores = {**metrics.compute_metrics(rows, judge), "model_utility": rng.random()}
        evaluations[step] = {"metrics": scores, "rows": rows}
    (folder / "eval").mkdir()
    for step, evaluation in evaluations.items():
        (folder / "eval" / f"step_{step:06d}.json").write_text(json.dumps(evaluation))
    settings = {"loss": "npo", "beta": 2.0, "retain_weight": 1.0}
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    return evaluations


def test_a_runs_record_holds_the_numbers_of_its_folder(tmp_path):
    evaluations = made_up_run(tmp_path, np.random.default_rng(0))
    make_data.write_data({"runs": [make_data.run_record(tmp_path)]}, tmp_path / "data.js")
    [run] = make_data.read_data(tmp_path / "data.js")["runs"]
    assert (run["name"], run["steps"], run["beta"]) == ("npo+rt@2", [0, 4], 2)
    for at, step in enumerate(run["steps"]):
        rows, scores = evaluations[step]["rows"], evaluations[step]["metrics"]
        for name, shown in make_data.QUESTIONS.items():
            expected = [first["answer_nll"] - row["answer_nll"]
                        for first, row in zip(evaluations[0]["rows"][name], rows[name], strict=True)]
            assert run["delta"][name][at] == pytest.approx(expected, abs=0.0051)
            assert run["answers"][name][at] == [rows[name][i]["generation"] for i in shown]
            assert run["probability"][name][at] == pytest.approx(scores[name]["probability"], abs=1e-4)
        assert run["logR"][at] == pytest.approx(metrics.log_truth_ratios(rows["forget"]), abs=5e-5)
        assert run["qualityLog10"][at] == pytest.approx(scores["forget_quality_log10"], abs=6e-4)
        assert run["gapRows"][at] == round(300 * scores["ks_statistic"])
        assert run["utility"][at] == pytest.approx(scores["model_utility"], abs=1e-4)
