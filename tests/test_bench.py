"""The benchmark's arithmetic, and that its opponents do the same work as the real code."""

import subprocess
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import synthetic
from benchmark import opponents
from benchmark.measurements import (
    METHODS,
    measure_evaluation,
    measure_step,
    peak_of,
    ratios,
    spread,
    training_flops,
)
from conftest import FORKS
from data.prompts import Encoded
from models.loading import load_model
from running.memory_plan import shape_of
from running.settings import parse
from train_npo import train


@contextmanager
def here():
    """In this process, where a test can reach them."""
    yield lambda function, *given: function(*given)
    opponents.LOOPS.clear()


@pytest.fixture
def args(small_model, small_data):
    return Namespace(model=str(small_model), data=str(small_data), device=torch.device("cpu"), batch_size=4,
                     repeats=2, a_rows=2, few=1, plain_rows=3, max_rows=6, max_new_tokens=8,
                     train=train)


def test_ratios_are_taken_repeat_by_repeat():
    assert ratios([1.0, 2.0, 4.0], [3.0, 4.0, 20.0]) == {"median": 3.0, "min": 2.0, "max": 5.0, "repeats": 3}
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize("method", METHODS)
def test_a_and_b_take_the_same_steps_as_the_real_loop(args, method):
    row = measure_step(args, method, opponents.fresh_process if method == "npo+kl" else here)
    assert max(row["checked"].values()) < 1e-4
    assert {name: ratio["repeats"] for name, ratio in row["ratio"].items()} == {"A": 2, "B": 2}
    assert row["rows"] == {"ours": 4, "B": 4, "A": 2}
    assert (row["reference_pass_share"] > 0) == (method != "sft")
    assert bench.table({method: row}, tiny=True).count("\n") == 3


def test_an_opponent_that_does_something_else_is_caught(args, monkeypatch):
    plain = opponents.npo_loss
    monkeypatch.setattr(opponents, "npo_loss", lambda *given: 1.01 * plain(*given))
    with pytest.raises(RuntimeError, match="did not compute the same"):
        measure_step(args, "npo+rt", here)


def test_plain_evaluation_gives_the_same_scores(args):
    row = measure_evaluation(args, here)
    assert row["checked"]["scores"] < 1e-4 and row["checked"]["equal_generations"] == 1
    assert row["rows"]["B'"] >= 12  # of four sets


def test_s_walks_the_same_path():
    instance = synthetic.fresh_instance(0, 0)
    rows = instance.training_rows(1)
    models = synthetic.reference_and_retrained(*rows, steps=50)
    plain = np.stack(opponents.models(instance, 1, synthetic.TRAIN_LR, 50), 1)
    np.testing.assert_allclose(plain, models, rtol=1e-9)
    methods = synthetic.published_methods(1)
    curves = synthetic.Problem([instance], 1, [models]).unlearn(methods, [0, 5, 10])[0]
    thetas = torch.from_numpy(models.T.copy())
    for method, curve in zip(methods, curves, strict=True):
        path = opponents.unlearning(method, instance, 1, thetas, 10, 5)
        np.testing.assert_allclose(np.array(path).T, curve, rtol=1e-8, err_msg=method.name)


def test_useful_flops_by_hand(small_model):
    lm, _, _ = load_model(str(small_model))  # 2 layers, hidden 32, MLP 64, 4 heads, vocabulary 400, tied
    a_layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    row = Encoded(list(range(10)), 7)
    useful = training_flops(shape_of(lm), len(row.ids), row.answer_tokens)
    assert useful == 6 * 2 * a_layer * 10 + 6 * 400 * 32 * 3 + 6 * 2 * 32 * 10**2


def test_a_case_of_memory_is_measured(args, monkeypatch):
    """In processes of their own; so small a model is lost in what Python itself holds."""
    monkeypatch.setattr(opponents, "get_context", lambda kind: FORKS)
    with opponents.fresh_process() as ours, opponents.fresh_process() as theirs:
        assert ours(peak_of, args, 8, True) > 0 and theirs(peak_of, args, 8, False) > 0


def test_the_tiny_model_is_trained_by_the_command_once(small_data, tmp_path, monkeypatch):
    """An interrupted training is gone on with."""
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(subprocess, "check_call", lambda words, **_: begun.append(words[2:]))
    args = Namespace(data=str(small_data), device=torch.device("cpu"))
    model = bench.small_start(args).removeprefix("tiny=")
    s = parse(begun[0])
    assert (s.loss, s.split, s.epochs, s.data) == ("sft", "full", 3, str(small_data))
    assert str(Path(s.out, "model")) == model
    Path(s.out).mkdir(parents=True)
    assert bench.small_start(args) == f"tiny={model}" and begun[1] == ["--resume", s.out]
    Path(model).mkdir()
    assert bench.small_start(args) == f"tiny={model}" and len(begun) == 2


def test_the_table():
    ratio = {"B, 8 rows": ratios([2.0], [4.0]), "untold": spread([0.9])}
    rows = {"memory": {"unit": "GB", "costs": {"B, 8 rows": "2.00 GB"}, "ratio": ratio},
            "first-command": {"unit": "s", "seconds": {"ours": spread([170.0])}, "ratio": {}}}
    _, _, plain, untold, first = bench.table(rows, tiny=True).splitlines()
    assert "| 2.00 GB | B, 8 rows | 2.00 (2.00 to 2.00, 1) | 1.54 | yes |" in plain
    assert "0.90" in untold and untold.endswith("|  |  |") and "| 150 s | **no** |" in first
