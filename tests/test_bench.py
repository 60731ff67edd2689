"""The benchmark's arithmetic, and that its opponents do the same work as the code they are compared with."""

import json
from argparse import Namespace

import pytest

import bench
import minimal_npo
import train_npo


@pytest.mark.parametrize("method", bench.METHODS)
def test_a_and_b_take_the_steps_of_train_npo(method, small_model, small_data, tmp_path, monkeypatch):
    flags = ["--split", "forget10", *bench.METHODS[method].split(), "--model", str(small_model), "--data",
             str(small_data), "--epochs", "4", "--batch-size", "4", "--micro-batch-size", "2", "--lr", "1e-3"]
    train_npo.main([*flags, "--eval-every", "never", "--out", str(tmp_path / "run")])
    ours = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    monkeypatch.setattr(minimal_npo, "answer_logps", minimal_npo.answer_logps)  # A replaces it
    for name in ("B", "A"):
        seconds, losses, peak = bench.opponent(name, flags)
        assert seconds > 0 and peak > 0.1 and len(losses) >= 2
        assert losses == pytest.approx(ours[:len(losses)], rel=1e-5)  # A takes 4 steps


def test_an_opponent_that_computes_something_else_is_caught():
    assert bench.agree("losses", [1.0, -3.0], [1.0, -3.0001]) == pytest.approx(5e-5)
    for theirs in ([1.0, -3.0003], [1.0, float("nan")]):
        with pytest.raises(RuntimeError, match="losses differ by"):
            bench.agree("losses", [1.0, -3.0], theirs)


def test_plain_evaluation_gives_the_same_scores(small_model, small_data, monkeypatch):
    monkeypatch.setattr(bench, "STRIDE", 3)
    row = bench.compare_evaluations(Namespace(data=str(small_data), repeats=1), str(small_model))
    assert row["largest_difference"] < 1e-5 and row["costs"]["B'"]["median"] > 0


def test_ratios_are_taken_repeat_by_repeat_and_shown():
    row = bench.row_of("s", {"ours": [1.0, 2.0, 4.0], "B": [3.0, 4.0, 20.0]})
    assert row["ratio"]["B"] == {"median": 3.0, "min": 2.0, "max": 5.0, "n": 3}
    shown = {"work": "step", "ours": "2 s", "against": "B", "ratio, median (range)": "3.00 (2.00 to 5.00, 3)"}
    assert bench.lines_of({"step": row}) == [shown]
