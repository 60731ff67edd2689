"""The benchmark's arithmetic, and that its opponents do the same work as the real code."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import synthetic
from data.prompts import Encoded
from models.loading import load_model


class Here(bench.Opponents):
    """In this process, where a test can reach them."""

    def close(self):
        pass


@pytest.fixture
def args(small_model, small_data):
    return Namespace(model=str(small_model), data=str(small_data), batch_size=4, repeats=2, a_rows=2, plain_rows=3,
                     max_rows=6, max_new_tokens=8, evaluations=1, device=torch.device("cpu"), dtype="fp32", threads=1)


def test_ratios_are_taken_repeat_by_repeat():
    assert bench.ratios([1.0, 2.0, 4.0], [3.0, 4.0, 20.0]) == {"median": 3.0, "min": 2.0, "max": 5.0, "repeats": 3}
    with pytest.raises(ValueError):
        bench.ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize("method", bench.METHODS)
def test_a_and_b_take_the_same_steps_as_the_real_loop(args, method):
    row = bench.measure_step(args, method, bench.Apart if method == "npo+kl" else Here)
    assert max(row["checked"].values()) < 1e-4 and row["update_gap_of_B"] < 0.02
    assert {name: ratio["repeats"] for name, ratio in row["ratio"].items()} == {"A": 2, "B": 2}
    assert row["rows"] == {"ours": 4, "B": 4, "A": 2} and (row["reference_pass_share"] > 0) == (method != "sft")
    assert bench.table({method: row}).count("\n") == 3


def test_an_opponent_that_does_something_else_is_caught(args, monkeypatch):
    plain = bench.npo_loss
    monkeypatch.setattr(bench, "npo_loss", lambda *given: 1.01 * plain(*given))
    with pytest.raises(RuntimeError, match="did not compute the same"):
        bench.measure_step(args, "npo+rt", Here)


def test_plain_evaluation_gives_the_same_scores(args):
    row = bench.measure_evaluation(args, Here)
    assert row["checked"]["scores"] < 1e-4 and row["checked"]["equal_generations"] == 1
    assert row["rows"]["B'"] >= 12 and row["rows"]["A'"] == 4  # of four sets


def test_s_walks_the_same_path():
    instance = synthetic.fresh_instance(0, 0)
    rows = (instance.features(instance.x_retain, -1), instance.y_retain, instance.features(instance.x_forget, 1),
            instance.y_forget)
    models = synthetic.reference_and_retrained(*rows, steps=50)
    plain = np.stack(bench.plain_models(*map(torch.from_numpy, rows), 50), 1)
    np.testing.assert_allclose(plain, models, rtol=1e-9)
    methods = synthetic.default_methods(1, synthetic.METHODS, None, None)
    curves = synthetic.Problem([instance], 1, [models]).unlearn(methods, 10, [0, 5, 10], 2.0, "reference_policy")[0]
    reference, retrained = (torch.from_numpy(models[:, i].copy()) for i in (0, 1))
    for method, curve in zip(methods, curves):
        path = bench.plain_unlearning(method, instance, 1, reference, retrained, 10, 5)
        np.testing.assert_allclose(np.array(path).T, curve, rtol=1e-8, err_msg=method.name)


def test_useful_flops_by_hand(small_model):
    lm, _, _ = load_model(str(small_model))  # 2 layers, hidden 32, MLP 64, 4 heads, vocabulary 400, tied
    a_layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    body = 2 * a_layer + 32
    row = Encoded(list(range(10)), 7)
    assert bench.useful_flops(lm, [row]) == 6 * body * 10 + 6 * 400 * 32 * 3 + 6 * 2 * 32 * 10**2


def test_products_that_are_counted(args):
    """Ours are 6 FLOPs a parameter and real token, some for padding, and for attention where torch's version counts it;
    B's reference and padding cost more."""
    row = bench.measure_products(args)
    for method, flops in row["flops"].items():
        assert flops["ours"] < flops["B"] < flops["A"], method
    side = bench.Side(args, bench.METHODS["sft"], [args.batch_size])
    rows, _, _ = side.rows(side.plan.stream[0])
    attention = sum(6 * 2 * 32 * len(e.ids) ** 2 for e in rows)
    useful = (bench.useful_flops(side.lm, rows) - attention) / len(rows)
    assert 0.99 * useful < row["flops"]["sft"]["ours"] < 2 * useful


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_a_child_in_a_session_of_its_own_is_family():
    code = "import subprocess; subprocess.run(['sleep', '60'], start_new_session=True)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        until = time.monotonic() + 30
        while len(bench.family(parent.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        found = bench.family(parent.pid)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        parent.wait()
    assert found[0] == parent.pid and len(found) == 2


def test_picture(tmp_path):
    ratio = bench.ratios([1.0, 1.0], [2.0, 3.0])
    rows = {"npo+rt": {"ratio": {"A": ratio, "B": ratio}}, "synthetic": {"ratio": {"S": ratio}}}
    bench.draw(rows, "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
