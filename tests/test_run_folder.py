"""What a run leaves: which evaluation is best, the model card, and a config.json that tells how it was
made."""

import json
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest

from evaluate_tofu import log_truth_ratio, task_of
from models.loading import load_model, template_note
from running import run_folder
from running.job import describe, prepare_job
from running.pages import draw_trajectory
from running.run_folder import best_step
from running.settings import parse, resolve
from study import records
from support import provenance
from support.errors import InputError
from support.files import write_json
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
    card = (folder / "model" / "README.md").read_text()
    for step in (0, max(evaluations)):
        _, _, told = card.partition(f"Step {step}:")
        assert f"- model utility: {evaluations[step]['model_utility']:.6f}" in told
    # The command can be typed again anywhere: no interpreter, no folder of the script.
    assert config["command"] == "train_npo.py " + " ".join(flags)
    assert (config["dirty"] is None) == (config["commit"] is None)  # both, where there is no git


def test_the_command_is_told_with_its_quotes_and_processes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/train_npo.py", "--data", "a folder"])
    assert provenance.environment()["command"] == "train_npo.py --data 'a folder'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert provenance.environment()["command"].startswith("torchrun --nproc_per_node=2 train_npo.py ")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    assert provenance.environment()["command"].startswith("torchrun --nnodes=3 --nproc_per_node=2 ")


@pytest.mark.parametrize("command,told", [
    ("x.py --data=/a/tofu --out runs/a/b", "x.py --data=tofu --out runs/a/b"),
    ("x.py --model smollm2-135m=/a/m --data '../my data'", "x.py --model smollm2-135m=m --data 'my data'")])
def test_a_command_is_told_without_folders_of_this_machine(command, told):
    assert records.without_folders(command) == told


def test_a_chat_model_without_a_record_is_not_asked_otherwise_without_a_word():
    with_template, bare = Namespace(chat_template="{{ x }}"), Namespace(chat_template=None)
    assert "--template chat takes" in template_note("FOLDER", with_template, {}, "llama2")
    for model, tokenizer, meta, template in (
            ("llama2-7b=FOLDER", with_template, {}, "llama2"), ("FOLDER", bare, {}, "llama2"),
            ("FOLDER", with_template, {"template": "qa"}, "qa"), ("FOLDER", with_template, {}, "chat")):
        assert template_note(model, tokenizer, meta, template) == ""


# ---------------------------------------------------------------- the picture

def panels(log: list, samples: dict, quality=-3.0, utility=0.5) -> dict:
    """title -> axes of a picture with two evaluations."""
    curve = {0: metrics(quality, utility, 0.9, 0.9), 2: metrics(quality, utility, 0.1, 0.8)}
    return {axes.get_title(): axes for axes in draw_trajectory("npo", curve, log, samples).axes}


def lines(axes) -> dict:
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_the_picture_has_the_weight_and_every_models_truth_ratios():
    samples = {"start": [1.0, 2.0, 2.0], "retrained": [-1.0, 0.0], "unlearned": [-1.0] * 5}
    drawn = panels([{"step": 1, "mean_W": 1.0}, {"step": 2, "mean_W": 0.4}], samples)
    assert list(drawn) == ["forget quality", "what is kept and what is lost",
                           "weight on gradient ascent's gradient", "truth ratios"]
    assert lines(drawn["forget quality"])["0.05"] == [np.log10(0.05)] * 2
    assert lines(drawn["weight on gradient ascent's gradient"])["mean W"] == [1.0, 0.4]
    outlines = {patch.get_label(): patch.get_xy() for patch in drawn["truth ratios"].patches}
    edges = np.linspace(-1, 2, 31)  # all samples are counted in the same bins
    for name, sample in samples.items():
        x, heights = outlines[name].T
        counts, _ = np.histogram(sample, edges)
        assert np.allclose(x[::2], edges) and np.array_equal(heights[1:-1:2], counts)


def test_a_picture_without_retain_log_perturbed_answers_or_weight_has_the_other_panels():
    row = {"answer_nll": 1.0, "answer_tokens": 1}
    samples = {"start": [log_truth_ratio(row)], "retrained": [], "unlearned": [log_truth_ratio(row)]}
    log = [{"step": k, "loss": 0.0, "forget_loss": -k, "retain_loss": k} for k in (1, 2)]
    drawn = panels(log, samples, quality=None, utility=None)
    assert list(drawn) == ["what is kept and what is lost", "parts of the loss"]
    assert lines(drawn["parts of the loss"]) == {"forget loss": [-1, -2], "retain loss": [1, 2]}
    assert set(lines(drawn["what is kept and what is lost"])) == {"forget probability", "retain probability"}


def test_the_samples_are_first_and_last_evaluation_and_retain_log(small_model, small_data, tmp_path,
                                                                  monkeypatch):
    seen, given = [], {"model": str(small_model), "data": str(small_data), "epochs": 2, "lr": 1e-2,
                             "batch_size": 10, "out": str(tmp_path / "run")}
    monkeypatch.setattr(run_folder, "draw_trajectory",
                        lambda *content: seen.append(content) or draw_trajectory(*content))
    job = start_of(small_model, small_data, tmp_path)
    retain_log = retain_log_of(job, tmp_path / "log.json", template="llama2")
    folder = carry_out(resolve({**given, "retain_log": str(retain_log)}), ALONE)
    [(_, evaluations, log, samples)] = seen
    files = {"start": folder / "eval" / "step_000000.json", "retrained": retain_log,
             "unlearned": folder / "eval" / "step_000004.json"}
    expected = {name: list(map(log_truth_ratio, json.loads(path.read_text())["rows"]["forget"]))
                for name, path in files.items()}
    assert samples == expected and samples["start"] != samples["unlearned"]
    # Before the first step it is the start's evaluation.
    before, after = (json.loads(files[name].read_text())["provenance"] for name in ("start", "unlearned"))
    assert before["trained_on"] == job.start_record["trained_on"] and after["trained_on"]["loss"] == "npo"
    assert list(evaluations) == [0, 2, 4] and [line["step"] for line in log] == [1, 2, 3, 4]
    assert (folder / "trajectory.png").stat().st_size > 5000


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


def retain_log_of(job, path, **provenance):
    """A log with made-up numbers for the job's forget rows."""
    rows = [{"index": i, "question": row["question"], "answer": row["answer"], "generation": "g",
             "answer_nll": 1.0, "answer_tokens": 1, "rouge_l_recall": 0.0, "perturbed_nll": [i / 10],
             "perturbed_tokens": [1]} for i, row in enumerate(job.prepared.rows["forget"])]
    path.write_text(json.dumps({"rows": {"forget": rows}, "provenance": provenance}))
    return path


def test_another_template_than_the_starts_is_refused(small_model, small_data, tmp_path):
    model = model_with(small_model, tmp_path / "model", template="qa", trained_on={"split": "full"})
    assert start_of(model, small_data, tmp_path).settings.template == "qa"
    with pytest.raises(InputError, match="--template llama2: .* was trained with qa"):
        start_of(model, small_data, tmp_path, template="llama2")


def test_of_two_commands_with_one_folder_the_second_says_so(tmp_path):
    s = Namespace(resume=None, out=str(tmp_path / "run"), method="npo", split="forget10")
    run_folder.open_folder(s, {}, ALONE)
    with pytest.raises(InputError, match="another command"):  # both had looked before either was there
        run_folder.open_folder(s, {}, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_the_start_was_trained_on_is_said(small_model, small_data, tmp_path, capsys):
    trained_on = {"split": "retain90", "loss": "sft", "data": "elsewhere", "data_fingerprint": "0"}
    model = model_with(small_model, tmp_path / "model", trained_on=trained_on)
    describe(start_of(model, small_data, tmp_path), ALONE)
    assert "it was trained on retain90 of elsewhere (sft)" in capsys.readouterr().out


def test_a_retain_log_of_another_template_or_other_data_is_refused(small_model, small_data, tmp_path):
    job = start_of(small_model, small_data, tmp_path)
    log = retain_log_of(job, tmp_path / "log.json", template="llama2")
    start_of(small_model, small_data, tmp_path, retain_log=str(log))
    for other, said in (({"template": "qa"}, "measured with --template qa"),
                        ({"data_fingerprint": "0"}, "is of other data")):
        retain_log_of(job, log, **other)
        with pytest.raises(InputError, match=said):
            start_of(small_model, small_data, tmp_path, retain_log=str(log))


def test_evaluation_takes_the_split_from_the_models_record():
    args = Namespace(data=None, split=None, forget=None, retain=None)
    assert [task_of(args, record).split
            for record in ({"split": "forget05"}, {"split": "retain95"}, {"split": "full"}, {})] \
        == ["forget05", "forget05", "forget10", "forget10"]
    with pytest.raises(InputError, match="rows of its own"):
        task_of(args, {"split": "own"})
    args.data = "builtin"  # a model that unlearned rows of its own, asked about published ones
    assert task_of(args, {"split": "own", "data": "forget.json, retain.json"}).split == "forget10"


def test_other_texts_are_another_reference(small_model, small_data, tmp_path):
    """The mark covers tokens: another day's prompts, or another tokenizer's, are no longer those of the
    cache."""
    job = start_of(small_model, small_data, tmp_path)
    job.config["start_weights"] = "0"
    mark = job.mark()
    assert job.mark() == mark
    job.plan.answers[0].ids[0] += 1
    assert job.mark() != mark


def test_a_newer_transformers_is_the_same_run_and_another_precision_is_not(small_model, small_data, tmp_path):
    job = start_of(small_model, small_data, tmp_path)
    job.config["start_weights"], job.folder = "0", tmp_path / "run"
    write_json(job.folder / "config.json", job.config)
    mark = job.mark()
    job.config["model_config"] |= {"transformers_version": "99.0", "_name_or_path": "elsewhere", "new": 1}
    assert job.mark() == mark
    for part, key, other in (("settings", "dtype", "bf16"), ("settings", "template", "qa"),
                             ("model_config", "hidden_size", 1)):
        now, job.config[part][key] = job.config[part][key], other
        assert job.mark() != mark
        job.config[part][key] = now


def test_the_card_says_with_which_system_prompt_it_was_asked(small_model, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = resolve({"model": str(small_model), "data": str(small_data), "template": "chat", "epochs": 1,
                 "batch_size": 8, "eval_every": "never", "system_prompt": "Be brief\n| and kind."})
    folder = carry_out(s, ALONE)
    assert "| system_prompt | Be brief / and kind. |" in (folder / "model" / "README.md").read_text()
