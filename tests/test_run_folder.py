"""What a run leaves: which evaluation is best, the model card, and a config.json that tells how it was
made."""

import json
import shutil
import sys

import pytest

from evaluate_tofu import recorded_split
from models.loading import load_model
from running.job import doubts_of_start, prepare_job
from running.run_folder import best_step
from running.settings import parse, resolve
from support import provenance
from support.errors import InputError
from support.world import ALONE
from train_npo import carry_out


def metrics(quality, utility, forget, retain):
    return {"forget_quality_log10": quality, "model_utility": utility, "forget": {"probability": forget},
            "retain": {"probability": retain}}


def test_what_best_means():
    """Step 0 is the start and never the best; of equals the first is."""
    curve = {0: metrics(0.0, 0.9, 0.9, 0.9), 1: metrics(-9.0, 0.8, 0.6, 0.9), 3: metrics(-2.0, 0.7, 0.1, 0.8),
             5: metrics(-1.0, 0.0, 0.0, 0.0), 6: metrics(-1.0, 0.1, 0.0, 0.1)}
    assert best_step(curve) == 5
    without = {step: {**m, "forget_quality_log10": None} for step, m in curve.items()}
    assert best_step(without) == 3


def test_the_card_has_the_numbers_and_no_path_of_this_machine(small_model, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(small_model), "--data", str(small_data), "--retain-weight", "1", "--epochs", "1",
             "--batch-size", "10", "--lr", "1e-3", "--keep", "best", "--out", "run"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_npo.py", *flags])
    folder = carry_out(parse(flags), ALONE)
    config = json.loads((folder / "config.json").read_text())
    evaluations = {int(p.stem[5:]): json.loads(p.read_text())["metrics"]
                   for p in (folder / "eval").glob("*.json")}
    for name in ("model", "best"):
        _, front, text = (folder / name / "README.md").read_text().split("---\n", 2)
        assert all(line.startswith(("- ", "tags:", "library_name: ", "pipeline_tag: "))
                   for line in front.splitlines())
        assert "- npo" in front and "npo+rt on forget10" in text
        assert "no proof" in text and "from_pretrained" in text
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


# ---------------------------------------------------------------- what fits together

def model_with(small_model, folder, **meta):
    shutil.copytree(small_model, folder)
    record = json.loads((folder / "npo.json").read_text())
    (folder / "npo.json").write_text(json.dumps({**record, **meta}))
    return folder


def start_of(small_model, small_data, tmp_path, **flags):
    return prepare_job(resolve({"model": str(small_model), "data": str(small_data), "epochs": 1,
                                "batch_size": 8,
                                "eval_every": "epoch", **flags}), ALONE)


def test_another_template_than_the_starts_is_refused(small_model, small_data, tmp_path):
    model = model_with(small_model, tmp_path / "model", template="qa", trained_on={"split": "full"})
    assert start_of(model, small_data, tmp_path).settings.template == "qa"
    with pytest.raises(InputError, match="--template llama2: .* was trained with qa"):
        start_of(model, small_data, tmp_path, template="llama2")


def test_a_start_that_may_not_know_the_rows_is_warned_of(small_model, small_data, tmp_path):
    assert doubts_of_start(start_of(small_model, small_data, tmp_path)) == []
    trained_on = {"split": "retain90", "loss": "sft", "data": "elsewhere", "data_fingerprint": "0"}
    model = model_with(small_model, tmp_path / "model", trained_on=trained_on)
    first, second = doubts_of_start(start_of(model, small_data, tmp_path))
    assert "retain90" in first and "elsewhere" in second


def test_a_retain_log_of_another_template_is_refused(small_model, small_data, tmp_path):
    job = start_of(small_model, small_data, tmp_path)
    rows = [{"index": i, "question": row["question"], "answer": row["answer"], "generation": "g",
             "answer_nll": 1.0,
             "answer_tokens": 1, "rouge_l_recall": 0.0, "perturbed_nll": [1.0], "perturbed_tokens": [1]}
            for i, row in enumerate(job.prepared.rows["forget"])]
    log = tmp_path / "log.json"
    log.write_text(json.dumps({"rows": {"forget": rows}, "provenance": {"template": "llama2"}}))
    start_of(small_model, small_data, tmp_path, retain_log=str(log))
    log.write_text(json.dumps({"rows": {"forget": rows}, "provenance": {"template": "qa"}}))
    with pytest.raises(InputError, match="measured with --template qa"):
        start_of(small_model, small_data, tmp_path, retain_log=str(log))


def test_evaluation_takes_the_split_from_the_models_record():
    assert [recorded_split(record)
            for record in ({"split": "forget05"}, {"split": "retain95"}, {"split": "full"}, {})] \
        == ["forget05", "forget05", "forget10", "forget10"]


def test_other_texts_are_another_reference(small_model, small_data, tmp_path):
    """The mark covers tokens: another day's prompts, or another tokenizer's, are no longer those of the
    cache."""
    job = start_of(small_model, small_data, tmp_path)
    job.config["start_weights"] = "0"
    mark = job.reference_mark()
    assert job.reference_mark() == mark
    job.plan.answers[0].ids[0] += 1
    assert job.reference_mark() != mark
