"""--lora: adapters alone move, the result is the merged model, and everything around them stays as it is."""

import json
from importlib.util import find_spec

import pytest
import torch
import transformers
from safetensors.torch import load_file

from data.batches import collate
from data.prompts import encode
from models.adapters import SCALE, adapted, add_adapters
from models.answers import AnswerModel
from models.loading import load_model
from models.saving import save_model
from running import settings as run_settings
from running.settings import resolve
from support.errors import InputError

peft = pytest.mark.skipif(find_spec("peft") is None, reason="the optional package peft is not installed")


def batch_of(tokenizer):
    pairs = [("Where was Marlow born?", "Marlow was born in Lima."), ("And Ember?", "In Oslo, like all.")]
    return collate(encode(tokenizer, "llama2", pairs, None), tokenizer.eos_token_id, "cpu")


@peft
def test_an_adapters_gradient_is_the_full_gradients_shadow(small_model):
    """With B = 0 the model is as without adapters; dL/dB = s G A^T, G the weight's gradient; dL/dA = 0."""
    plain, tokenizer, _ = load_model(str(small_model))
    batch = batch_of(tokenizer)
    values = AnswerModel(plain)(batch)[0]
    values.sum().backward()
    lm = load_model(str(small_model))[0]
    state = torch.get_rng_state()
    assert "rank 3 on 14 linear layers" in add_adapters(lm, 3, 0, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    again = AnswerModel(lm)(batch)[0]
    assert torch.equal(again, values)
    again.sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, layer in adapted(lm).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.allclose(b.grad, SCALE * gradients[name] @ a.T, rtol=1e-4, atol=1e-7), name
        assert not a.grad.any() and layer.base_layer.weight.grad is None


@peft
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_is_written_is_the_merged_model(small_model, tmp_path, dtype):
    lm, tokenizer, meta = load_model(str(small_model))
    add_adapters(lm, 2, 0, dtype)
    for layer in adapted(lm).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    save_model(lm, tokenizer, tmp_path, meta)
    merged = load_model(str(tmp_path))[0]
    assert not adapted(merged)
    batch = batch_of(tokenizer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        ours, theirs = (AnswerModel(m)(batch)[0] for m in (lm, merged))
    assert torch.allclose(ours, theirs, atol=1e-4 if dtype == torch.float32 else 0.2)


@peft
@pytest.mark.parametrize("flags", (["--retain-weight", "1"], ["--loss", "undial", "--kl-weight", "1"]))
def test_a_run_moves_linear_layers_alone_and_begins_at_the_reference(forked, small_model, small_data,
                                                                     tmp_path, flags):
    forked("train_npo.py", *flags, "--lora", 2, "--model", small_model, "--data", small_data, "--epochs", 2,
           "--batch-size", 8, "--lr", 1e-2, "--keep", "best", "--activation-checkpointing", "--out", "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    if "undial" not in flags:
        assert log[0]["mean_W"] == pytest.approx(1, abs=1e-5) and log[-1]["loss"] < log[0]["loss"]
    result = tmp_path / "run" / "model"
    before, after = (load_file(folder / "model.safetensors") for folder in (small_model, result))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}
    for name in moved:  # by a matrix of rank 2
        singular = torch.linalg.svdvals((after[name] - before[name]).double())
        assert singular[2] < 1e-4 * singular[0], name


@peft
def test_processes_micro_batches_and_a_resume_change_nothing(forked, small_model, small_data, tmp_path):
    flags = ["--retain-weight", 1, "--lora", 2, "--model", small_model, "--data", small_data, "--epochs", 2,
             "--batch-size", 8, "--lr", 1e-3, "--eval-every", "never", "--checkpoint-every", 2]
    forked("train_npo.py", *flags, "--out", "one")
    forked("train_npo.py", *flags, "--micro-batch-size", 2, "--out", "two", processes=2)
    weights = {name: load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")}
    for name, weight in weights["one"].items():
        assert torch.allclose(weight, weights["two"][name], atol=1e-5), name
    checkpoint = max((tmp_path / "one" / "checkpoints").glob("step_*"))
    assert set(load_file(checkpoint / "weights-00000.safetensors")) and all(
        ".lora_" in name for name in load_file(checkpoint / "weights-00000.safetensors"))
    (tmp_path / "one" / "model").rename(tmp_path / "away")
    forked("train_npo.py", "--resume", "one")
    again = load_file(tmp_path / "one" / "model" / "model.safetensors")
    assert all(torch.equal(again[name], weights["one"][name]) for name in again)


def test_what_lora_cannot_do_is_refused(small_model, monkeypatch):
    given = {"model": str(small_model), "lora": 2}
    monkeypatch.setattr(run_settings, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install peft"):
        resolve(given)
    monkeypatch.setattr(run_settings, "find_spec", lambda name: name)
    with pytest.raises(InputError, match="goes with --parallel ddp"):
        resolve({**given, "parallel": "fsdp"})
    with pytest.raises(InputError, match="give --model"):
        resolve({"loss": "sft", "lora": 2})


@peft
def test_experts_in_one_piece_take_no_adapters():
    lm = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
        num_key_value_heads=1, num_local_experts=2))
    with pytest.raises(InputError, match="take no adapters"):
        add_adapters(lm, 2, 0, torch.float32)


def test_a_dry_run_counts_what_adapters_spare(forked):
    def peak(*flags) -> float:
        told = forked("train_npo.py", "--model", "llama2-7b", "--dry-run", "--dtype", "bf16", *flags).stdout
        return float(next(line for line in told.splitlines() if line.split()[:1] == ["peak"]).split()[-1])

    assert peak("--lora", 8) < 40 < peak()
