"""What a run leaves: which evaluation is best, the model card, and a config.json that tells how it was made."""

import json
import sys

import pytest

import train_npo
from models.loading import load_model
from running.processes import ALONE
from running.run_folder import best_step
from support import provenance
from support.errors import InputError
from train_npo import resolve, run


def metrics(quality, utility, forget, retain):
    return {"forget_quality_log10": quality, "model_utility": utility, "forget": {"probability": forget},
            "retain": {"probability": retain}}


def test_what_best_means():
    """Step 0 is the start and never the best; step 5 has collapsed, and only the utility shows it."""
    curve = {0: metrics(0.0, 0.9, 0.9, 0.9), 1: metrics(-9.0, 0.8, 0.6, 0.9), 3: metrics(-2.0, 0.7, 0.1, 0.8),
             5: metrics(-1.0, 0.0, 0.0, 0.0), 6: metrics(-1.0, 0.1, 0.0, 0.1)}
    assert best_step(curve) == best_step(curve, "forget-quality") == 5
    assert best_step(curve, "retain-minus-forget") == 3
    assert best_step(curve, "model-utility") == 1
    without = {step: {**m, "forget_quality_log10": None} for step, m in curve.items()}
    assert best_step(without) == 3


def test_a_criterion_that_cannot_be_measured_is_refused_at_once(small_model, tmp_path):
    with pytest.raises(InputError, match="--retain-log"):
        resolve({"model": str(small_model), "best_by": "forget-quality"})
    with pytest.raises(InputError, match="two"):
        resolve({"model": str(small_model), "forget": "a", "retain": "b", "best_by": "model-utility"})


def test_the_card_has_the_numbers_and_no_path_of_this_machine(small_model, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(small_model), "--data", str(small_data), "--retain-weight", "1", "--epochs", "1",
             "--batch-size", "10", "--lr", "1e-3", "--keep", "best", "--best-by", "model-utility", "--out", "run"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_npo.py", *flags])
    folder = run(train_npo.parse(flags)[0], ALONE)
    config = json.loads((folder / "config.json").read_text())
    evaluations = {int(p.stem[5:]): json.loads(p.read_text())["metrics"] for p in (folder / "eval").glob("*.json")}
    for name in ("model", "best"):
        _, front, text = (folder / name / "README.md").read_text().split("---\n", 2)
        assert all(line.startswith(("- ", "tags:", "library_name: ", "pipeline_tag: ")) for line in front.splitlines())
        assert "- npo" in front and "npo+rt on forget10" in text and "no proof" in text and "from_pretrained" in text
        assert str(tmp_path) not in text and str(small_data.parent) not in text and small_data.name in text
        assert config["start_weights"] in text and config["data_fingerprint"] in text and "beta | 0.1" in text
        load_model(str(folder / name))
    last = max(evaluations)
    utility = " | ".join(f"{evaluations[step]['model_utility']:.4f}" for step in (0, last))
    assert f"| model utility | {utility} |" in (folder / "model" / "README.md").read_text()
    # The command can be typed again anywhere: no interpreter, no folder of the script.
    assert config["command"] == "train_npo.py " + " ".join(flags) and isinstance(config["dirty"], bool)


def test_the_command_is_told_with_its_quotes_and_processes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/train_npo.py", "--data", "a folder"])
    assert provenance.environment()["command"] == "train_npo.py --data 'a folder'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert provenance.environment()["command"].startswith("torchrun --nproc_per_node=2 train_npo.py ")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    assert provenance.environment()["command"].startswith("torchrun --nnodes=3 --nproc_per_node=2 ")
