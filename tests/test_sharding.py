"""FSDP2: a sharded run is the run of one process. Gloo, CPU."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_gguf import write_gguf
from test_training import assert_close
from transformers import AutoModelForCausalLM

from conftest import ROOT
from models import saving, sharded
from models.answers import AnswerModel
from models.loading import load_model
from models.saving import save_model, weights_hash
from running.checkpoints import Rows
from support.errors import InputError

# 20 rows in batches of 6, the last of 2 rows, so that with four processes two have none: 20 steps. kto needs
# its scalar.
ARGS = ["--loss", "kto", "--retain-weight", 1, "--kl-weight", 1, "--epochs", 6, "--batch-size", 6,
        "--micro-batch-size", 2, "--lr", 1e-3, "--max-grad-norm", 1]


def weights(folder: Path) -> dict:
    return dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())


def log(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "tnpo"), (2, "undial"), (4, "kto"))]


@pytest.mark.parametrize("processes, loss", ((2, "kto"), *SLOW))
def test_a_sharded_run_equals_one_process(forked, small_model, small_data, tmp_path, processes, loss):
    """Weights after 20 clipped steps, losses, gradient norms, evaluation with generation and KL, start-weight
    hash."""
    args = ["--loss", loss, *ARGS[2:], "--model", small_model, "--data", small_data, "--eval-every", 20,
            "--checkpoint-every", 10]
    forked("train_npo.py", *args, "--out", "alone")
    done = forked("train_npo.py", *args, "--out", "sharded", "--parallel", "fsdp", processes=processes)
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    assert_close(weights(alone), weights(sharded))
    parts = {path.name for path in (sharded / "checkpoints").glob("step_*/weights-*")}
    assert parts == {f"weights-{rank:05d}.safetensors" for rank in range(processes)}  # each its own rows
    assert len(log(alone)) == 20 and "resumed" not in done.stdout
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in log(sharded)] == pytest.approx([line[key] for line in log(alone)],
                                                                     rel=1e-4)
    for step in (0, 20):
        ours, theirs = (json.loads((folder / "eval" / f"step_{step:06d}.json").read_text())["rows"]
                        for folder in (sharded, alone))
        for name in ours:
            for a, b in zip(ours[name], theirs[name], strict=False):
                assert a["generation"] == b["generation"]
                assert a["answer_nll"] == pytest.approx(b["answer_nll"], rel=1e-4)
                assert a["perturbed_nll"] == pytest.approx(b["perturbed_nll"], rel=1e-4)
                assert a.get("kl", 0.0) == pytest.approx(b.get("kl", 0.0), rel=1e-2, abs=1e-4)
    starts = [json.loads((folder / "config.json").read_text())["start_weights"]
              for folder in (alone, sharded)]
    assert starts[0] == starts[1]


@pytest.mark.parametrize("dtype", ("bf16", pytest.param("fp16", marks=pytest.mark.slow)))
def test_a_sharded_run_in_16_bits_follows_float32(forked, small_model, small_data, tmp_path, dtype):
    args = ["--loss", "npo", "--retain-weight", 1, "--kl-weight", 1, "--epochs", 2, "--batch-size", 6,
            "--micro-batch-size", 2, "--lr", 1e-3, "--model", small_model, "--data", small_data,
            "--eval-every", 7]
    forked("train_npo.py", *args, "--out", "alone")
    forked("train_npo.py", *args, "--out", dtype, "--parallel", "fsdp", "--dtype", dtype, processes=2)
    assert all(p.dtype == torch.float32 for p in weights(tmp_path / dtype).values())
    for ours, theirs in zip(log(tmp_path / dtype), log(tmp_path / "alone"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ("ddp", "fsdp"))
def test_two_processes_start_from_a_gguf_file_and_compile(command, small_model, small_data, tmp_path,
                                                          parallel):
    write_gguf(small_model, tmp_path / "small.gguf", quantised=False)
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler: --compile needs one")
    args = [*ARGS, "--model", "small.gguf", "--data", small_data, "--eval-every", 20, "--template", "llama2"]
    command("train_npo.py", *args, "--out", "alone")
    command("train_npo.py", *args, "--compile", "--parallel", parallel, "--out", parallel, processes=2)
    assert_close(weights(tmp_path / "alone"), weights(tmp_path / parallel), 1e-4)
    assert "forget quality" in (tmp_path / parallel / "model" / "README.md").read_text().lower()


@pytest.mark.slow
def test_a_sharded_run_resumes_as_another(command, small_model, small_data, tmp_path):
    """Killed under fsdp with two processes, goes on alone; and the other way round."""
    args = [*ARGS, "--model", small_model, "--data", small_data, "--eval-every", "never",
            "--checkpoint-every", 4]
    command("train_npo.py", *args, "--out", "whole")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    for name, first, second in (("a", 2, 0), ("b", 0, 2)):
        flags = ["--parallel", "fsdp"] if first else []
        words = [*(torchrun if first else [sys.executable]), ROOT / "train_npo.py", *args, "--out", name,
                 *flags]
        process = subprocess.Popen([*map(str, words)], cwd=tmp_path, stdout=subprocess.DEVNULL)
        while not list((tmp_path / name / "checkpoints").glob("step_*")):
            time.sleep(0.02)
            assert process.poll() is None, "finished before it could be stopped"
        process.send_signal(signal.SIGTERM)  # saves first
        assert process.wait() != 0 and not (tmp_path / name / "model").exists()
        done = command("train_npo.py", "--resume", name, "--parallel", "fsdp" if second else "ddp",
                       processes=second)
        assert "resumed after step" in done.stdout
        assert_close(weights(tmp_path / "whole"), weights(tmp_path / name))
        assert [line["step"] for line in log(tmp_path / name)] == list(range(1, 21))


@pytest.fixture
def swapped():
    """Unsharded parameters get their memory as sharded ones do: in place, so that tied ones stay tied."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapped")
def test_weights_are_read_without_a_whole_model(small_model, tmp_path):
    expected, _, _ = load_model(str(small_model))
    lm, _, _ = load_model(str(small_model), without_weights=True)
    assert all(p.is_meta for p in lm.parameters()) and not any(b.is_meta for b in lm.buffers())
    sharded.fill(AnswerModel(lm), small_model, "cpu")
    assert weights_hash(lm) == weights_hash(expected)
    ids = torch.arange(3, 30).unsqueeze(0)
    assert torch.equal(lm(ids).logits, expected(ids).logits)  # the rotary frequencies are there too


@pytest.mark.usefixtures("swapped")
def test_a_result_of_several_files_loads(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "FILE_BYTES", 20_000)
    lm, tokenizer, _ = load_model(str(small_model))
    folder = tmp_path / "model"
    save_model(lm, tokenizer, folder, {})
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert weights_hash(load_model(str(folder))[0]) == weights_hash(lm)
    empty, _, _ = load_model(str(folder), without_weights=True)
    sharded.fill(AnswerModel(empty), folder, "cpu")
    assert weights_hash(empty) == weights_hash(lm)


def test_flaws_of_a_folder_are_named(small_model, tmp_path):
    folder = Path(shutil.copytree(small_model, tmp_path / "model"))
    lm, _, _ = load_model(str(folder), without_weights=True)
    index = folder / "model.safetensors.index.json"
    astray = "only .safetensors files in the folder itself"
    for content, sentence in (('{"weight_map": {"a": "../model/model.safetensors"}}', astray),
                              ('{"weight_map": {"a": "absent.safetensors"}}', astray),
                              ("[1]", "not an index")):
        index.write_text(content)
        with pytest.raises(InputError, match=sentence):
            sharded.fill(AnswerModel(lm), folder, "cpu")
    index.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 72}))
    wider, _, _ = load_model(str(folder), without_weights=True)
    with pytest.raises(InputError, match="config.json says"):
        sharded.fill(AnswerModel(wider), folder, "cpu")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    deeper, _, _ = load_model(str(folder), without_weights=True)
    with pytest.raises(InputError, match="weights are missing, among them model.layers.2"):
        sharded.fill(AnswerModel(deeper), folder, "cpu")


def test_rows_of_a_checkpoint_are_found_whoever_wrote_them(tmp_path):
    from safetensors.torch import save_file
    whole = torch.arange(21.0).view(7, 3)
    for rank, (start, stop) in enumerate(((0, 4), (4, 7), (7, 7))):  # the third process has none
        tensors = {"w": whole[start:stop].clone(), "n": torch.tensor(5.0)}
        save_file(tensors, tmp_path / f"weights-{rank:05d}.safetensors",
                  metadata={"first_rows": json.dumps({"w": start, "n": 0})})
    rows = Rows(tmp_path, "weights")
    assert torch.equal(rows.read("w", torch.zeros(7, 3)), whole)
    assert rows.read("n", torch.zeros(())) == 5
