"""What a run leaves: config.json, log.jsonl, eval/, checkpoints/, reference.safetensors, model/, best/ and
trajectory.png."""

import json
import sys
import time
from argparse import Namespace
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from conftest import log, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_npo
from common import InputError
from model import ALONE, PRESETS, load_model
from train_npo import best_step, parse


def test_a_run_leaves_a_complete_folder(run, small_model, small_data, retain_log, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], max_new_tokens=4))
    monkeypatch.setattr(train_npo, "best_step", lambda evaluations: 3)
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_npo.py", "--data", "two words"])
    folder = run(f"--retain-weight 1 --model tiny={small_model} --retain-log {retain_log.name} --keep best "
                 "--eval-every epoch --beta 0.2", out="mine/run")
    paths = {path.relative_to(folder).as_posix() for pattern in ("*", "eval/*", "checkpoints/*")
             for path in folder.glob(pattern)}
    assert paths == {"config.json", "log.jsonl", "reference.safetensors", "trajectory.png", "model", "best",
                     "eval", "eval/step_000000.json", "eval/step_000003.json", "eval/step_000005.json",
                     "checkpoints", "checkpoints/step_000003"}  # no half-written file is among them
    assert (folder / "trajectory.png").stat().st_size > 5000

    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["lr"] == 1e-3 and config["settings"]["beta"] == 0.2
    expected = {"method": "npo+rt", "rows": 20, "steps": 5, "warmup_steps": 2, "world_size": 1,
                "device": "cpu", "template": "llama2", "command": "train_npo.py --data 'two words'"}
    assert config.items() >= expected.items() and len(config["start_hash"]) == 16
    assert config["versions"].keys() == {"python", "torch", "transformers"}
    trained_on = {"split": "forget10", "loss": "npo+rt", "template": "llama2"}
    assert config["trained_on"].items() >= trained_on.items()

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [" ".join(line) for line in lines] == 5 * [
        "step epoch lr loss forget_loss retain_loss mean_W grad_norm tokens_per_s"]
    assert [line["epoch"] for line in lines] == [0.4, 0.8, 1.2, 1.6, 2.0]
    for line in lines:
        assert line["loss"] == pytest.approx(line["forget_loss"] + line["retain_loss"])

    first, last = (json.loads((folder / "eval" / f"step_00000{step}.json").read_text()) for step in (0, 5))
    assert list(first) == ["metrics", "rows", "provenance"] and last["provenance"]["step"] == 5
    assert abs(first["metrics"]["forget_kl"]) < 1e-5 < last["metrics"]["forget_kl"]
    assert 0 < last["metrics"]["forget_quality"] <= 1 and last["metrics"]["model_utility"] >= 0
    printed = capsys.readouterr().out
    for words in ("npo+rt on forget10", "5 steps, the first 2 warm-up", "template llama2",
                  "step     5/5", "after step 3: forget quality"):
        assert words in printed

    third = load_file(next((folder / "checkpoints" / "step_000003").glob("*.safetensors")))
    best, model = weights(folder / "best"), weights(folder / "model")
    assert all(torch.equal(best[name], third[f"weight/lm.{name}"]) for name in best)
    assert not all(torch.equal(best[name], model[name]) for name in best)
    loaded = load_model(str(folder / "model"))
    assert loaded.preset is PRESETS["tiny"] and loaded.meta["trained_on"] == config["trained_on"]
    card = (folder / "model" / "README.md").read_text()
    assert "npo+rt on forget10" in card and "does not prove" in card and str(Path.cwd()) not in card
    assert json.loads((folder / "model" / "npo.json").read_text())["start_hash"] == config["start_hash"]


def test_the_result_is_a_model_of_the_library(run, small_model):
    """Tied weights are saved once, and the tokenizer and its settings come along."""
    folder = run("--epochs 1 --batch-size 10") / "model"
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert weights(folder).keys() == weights(small_model).keys() and "lm_head.weight" not in weights(folder)
    trained = dict(lm.named_parameters())
    assert all(torch.equal(trained[name], weight) for name, weight in weights(folder).items())
    start = AutoTokenizer.from_pretrained(small_model)
    assert tokenizer("Who wrote it?").input_ids == start("Who wrote it?").input_ids
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_what_best_means():
    """The best forget quality; without a retain log, the largest retain minus forget probability. Step 0 is
    the start and never the best."""
    def metrics(quality, forget, retain):
        return {"forget_quality_log10": quality, "forget": {"probability": forget},
                "retain": {"probability": retain}}
    curve = {0: metrics(0.0, 0.0, 0.9), 1: metrics(-9.0, 0.6, 0.9), 3: metrics(-2.0, 0.1, 0.8),
             5: metrics(-1.0, 0.0, 0.0), 6: metrics(-1.5, 0.0, 0.1)}
    assert best_step(curve) == 5
    assert best_step({step: m | {"forget_quality_log10": None} for step, m in curve.items()}) == 3
    assert best_step({0: curve[0]}) is None
    own = {step: {"forget_quality_log10": None, "forget": m["forget"]} for step, m in curve.items()}
    assert best_step(own) == 5  # without retain rows, the first of the smallest forget probabilities


def test_runs_of_one_method_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = parse(["--loss", "ga", "--kl-weight", "1", "--split", "forget05", "--eval-every", "never"])
    folders = [train_npo.open_folder(s, {}, ALONE).as_posix() for _ in range(3)]
    assert folders == ["runs/ga+kl_forget05", "runs/ga+kl_forget05-2", "runs/ga+kl_forget05-3"]


@pytest.mark.parametrize("every, elapsed, due_after", (("3", 0, {3, 6}), ("1", 0, {*range(1, 8)}),
                                                       ("1m", 30, set()), ("1m", 61, {*range(1, 8)}),
                                                       ("10m", 500, set()), ("10m", 601, {*range(1, 8)})))
def test_checkpoints_come_by_steps_or_minutes(every, elapsed, due_after):
    s = parse(["--checkpoint-every", every, "--eval-every", "never"])
    run = Namespace(s=s, stopped=False, world=ALONE, saved_at=time.monotonic() - elapsed)
    requests = {step: train_npo.Run.requests(run, step) for step in range(1, 8)}
    assert {step for step, (_, due) in requests.items() if due} == due_after
    run.stopped = True
    assert train_npo.Run.requests(run, 1)[0] and not any(stop for stop, _ in requests.values())


def test_a_signal_of_another_process_stops_and_its_clock_saves(run, monkeypatch):
    def with_another(request):
        def add_up(world, x):  # loss, forget_loss, W, stop, due
            return x + torch.tensor([0.0, 0, 0, *request]) if x.shape == (5,) else x
        return add_up
    monkeypatch.setattr(ALONE.__class__, "sum", with_another([0, 1]))
    assert len([*(run(out="saved") / "checkpoints").glob("step_*")]) == 2
    monkeypatch.setattr(ALONE.__class__, "sum", with_another([1, 0]))
    with pytest.raises(KeyboardInterrupt, match="saved after step 1/5"):
        run(out="stopped")


@pytest.mark.parametrize("every", ("0", "0m", "m", "1.5m", "-1", "10s", "1h"))
def test_other_intervals_of_checkpoints_are_refused(every):
    with pytest.raises(InputError, match="need minutes, such as 10m, or a number of steps"):
        parse(["--eval-every", "never", f"--checkpoint-every={every}"])


@pytest.mark.parametrize("kind", ("tensorboard", "wandb"))
def test_numbers_are_also_logged_elsewhere(run, monkeypatch, kind):
    """Into stubs of the two packages: each step's line, with the step."""
    logged, module = [], Namespace(__spec__=ModuleSpec(kind, None))

    def log_numbers(numbers, step):
        logged.append((step, numbers))

    def add_scalar(name, value, step):
        logged.append((step, {name: value}))
    module.init = lambda project, name, dir: Namespace(log=log_numbers)
    module.SummaryWriter = lambda folder, flush_secs: Namespace(add_scalar=add_scalar)
    monkeypatch.setitem(sys.modules, kind, module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    lines = log(run(f"--log-to {kind}"))
    assert len(lines) == 5
    for line in lines:
        numbers = [part for step, part in logged if step == line["step"]]
        assert {name: part[name] for part in numbers for name in part}.items() >= line.items()


def test_a_logger_that_is_not_installed_is_named(monkeypatch, run):
    monkeypatch.setattr(train_npo, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        run("--log-to wandb")
    assert not Path("run").exists()
