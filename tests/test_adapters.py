"""--lora: adapters alone are trained, and the result is the merged model. Most tests need the package
peft."""

from importlib.util import find_spec

import pytest
import torch
from conftest import assert_close, log, weights
from safetensors.torch import load_file

import train_npo
from common import InputError
from data.batches import collate
from data.prompts import encode
from model import AnswerModel, add_adapters, load_model, save_model
from train_npo import parse

peft = pytest.mark.skipif(find_spec("peft") is None, reason="the optional package peft is not installed")


def adapted(lm) -> dict:
    return {name: layer for name, layer in lm.named_modules() if hasattr(layer, "get_delta_weight")}


def batch_of(tokenizer):
    pairs = [("Where was Marlow born?", "Marlow was born in Lima."), ("And Ember?", "In Oslo, like all.")]
    return collate(encode(tokenizer, "llama2", pairs), tokenizer.eos_token_id)


@peft
def test_an_adapters_gradient_follows_from_the_weights_gradient(small_model):
    """With B = 0 the model is as without adapters. With G = dL/dW, dL/dB = 2 G A^T and dL/dA = 0."""
    plain, lm = (load_model(str(small_model)) for _ in range(2))
    batch = [batch_of(plain.tokenizer)]
    add_adapters(lm.lm, 3, 0, torch.float32)
    assert len(adapted(lm.lm)) == 14  # 7 per layer
    logits, expected = AnswerModel(lm.lm)(batch)[1], AnswerModel(plain.lm)(batch)[1]
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in plain.lm.named_parameters()}
    for name, layer in adapted(lm.lm).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(b.grad, 2 * gradients[f"{name}.weight"] @ a.T, rtol=1e-4, atol=1e-4)
        assert not a.grad.any() and layer.base_layer.weight.grad is None
    trained = {name for name, p in lm.lm.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained) and len(trained) == 28


@peft
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_is_written_is_the_merged_model(small_model, tmp_path, dtype):
    lm, tokenizer, meta, _ = load_model(str(small_model))
    meta["trained_on"] = {"loss": "npo", "split": "forget10", "data": "builtin"}
    add_adapters(lm, 2, 0, dtype)
    for layer in adapted(lm).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    save_model(AnswerModel(lm), tokenizer, tmp_path / "model", meta)
    merged = load_model(str(tmp_path / "model")).lm
    assert not adapted(merged) and {p.dtype for p in merged.parameters()} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        logits, expected = (AnswerModel(each)([batch_of(tokenizer)])[1] for each in (lm, merged))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)


@peft
@pytest.mark.parametrize("flags", ("--retain-weight 1", "--loss undial --kl-weight 1"))
def test_a_run_moves_linear_layers_by_a_matrix_of_low_rank(run, small_model, flags):
    folder = run(f"{flags} --lora 2 --lr 1e-2 --activation-checkpointing")
    first, *_, last = log(folder)
    if "undial" not in flags:
        assert first["mean_W"] == pytest.approx(1, abs=1e-5) and last["loss"] < first["loss"]
    before, after = weights(small_model), weights(folder / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and moved == {name for name in before if "_proj" in name}
    for name in moved:
        singular = torch.linalg.svdvals((after[name] - before[name]).double())
        assert singular[2] < 1e-4 * singular[0], name


@peft
def test_processes_micro_batches_and_a_resume_change_nothing(run, forked, small_model, small_data):
    flags = "--retain-weight 1 --lora 2 --checkpoint-every 2"
    one = run(flags, out="one")
    forked("train_npo.py", "--model", small_model, "--data", small_data, "--epochs", 2, "--batch-size", 8,
           "--lr", 1e-3, "--eval-every", "never", *flags.split(), "--micro-batch-size", 2, "--out", "two",
           processes=2)
    expected = weights(one / "model")
    assert_close(expected, weights(one.with_name("two") / "model"))
    file = one / "checkpoints" / "step_000004"
    names = {name for path in file.glob("*.safetensors") for name in load_file(path)}
    assert len(names) == 3 * 28 and all(".lora_" in name for name in names)
    (one / "model").rename(one / "uninterrupted")
    train_npo.main(["--resume", str(one)])
    resumed = weights(one / "model")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_what_lora_cannot_do_is_refused(monkeypatch):
    flags = ["--lora", "2", "--eval-every", "never"]
    if find_spec("peft"):
        assert parse(flags).lr == 10 * parse(flags[2:]).lr  # adapters take a larger lr
    monkeypatch.setattr(train_npo, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install peft"):
        train_npo.main(flags)
