"""The page's JavaScript under node equals torch: logits, gradients, ten steps of npo+rt, greedy answers."""

import copy
import json
import shutil
import subprocess
from collections import namedtuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import losses
import minimal_npo
import synthetic
from conftest import ROOT
from data.prompts import Encoded
from data.synthetic_instances import fresh_instance

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")
LR, BETA, STEPS, ROWS = 1e-3, 0.5, 10, 4
OBJECTIVES = [{"loss": "ga"}, {"loss": "npo", "beta": BETA}, {"loss": "npo", "beta": BETA, "retainWeight": 1}]
METHODS = [synthetic.Method("ga", 0.005), synthetic.Method("npo", 0.05, 0.5),
           synthetic.Method("npo+rt", 0.05, 2.0)]
PATH_STEPS = 60
Item = namedtuple("Item", "row partner")


def data() -> dict:
    text = (ROOT / "docs" / "unlearn" / "data.js").read_text(encoding="utf-8")
    return json.loads(text[text.index("const DATA = ") + 13:text.rindex(";\nif")])


@pytest.fixture(scope="module")
def rows() -> dict:
    return data()["rows"]


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
def page(rows, stream, start, instance, tmp_path_factory) -> dict:
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
    content = {"texts": texts, "prompts": [row["ids"][:row["start"]] for row in rows["forget"][:6]],
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
