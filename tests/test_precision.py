"""Weights and AdamW's moments stay in float32. --dtype is the precision of matrix products."""

import pytest
import torch
from conftest import log, weights
from transformers import AutoModelForCausalLM

import train_npo
from data.batches import Plan
from data.tofu import load_task
from model import AnswerModel, join_world, load_model
from train_npo import Reference, adamw, loss_sums, lr_factor, parse


def moved(after: dict, before: dict) -> torch.Tensor:
    return torch.cat([(after[name] - before[name]).flatten() for name in before])


def loop_with_bf16_weights(s) -> torch.Tensor:
    """What the run's steps change where weights and moments are bfloat16."""
    lm, tokenizer, *_ = load_model(s.model)
    model, plan = AnswerModel(lm.bfloat16()), Plan(s, load_task(s.data, s.split), tokenizer, None)
    before = {name: p.detach().float() for name, p in lm.named_parameters()}
    optimizer, reference = adamw(model, s), Reference({}, "cpu")
    for step, items in enumerate(plan.stream):
        optimizer.param_groups[0]["lr"] = s.lr * lr_factor(step, plan.steps, plan.warmup_steps)
        for keys in plan.micro_batches(items, 0, 1):
            loss_sums(s, model, plan, keys, plan.counts(items), reference, None)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return moved({name: p.detach().float() for name, p in lm.named_parameters()}, before)


def test_small_updates_vanish_in_bf16_weights_and_not_in_autocast(run, small_model, small_data):
    """lr 1e-5 against weights of 0.1, where bfloat16's spacing is 5e-4: rounding takes most updates back.
    Autocast over float32 weights moves the weights as a float32 run does."""
    flags = "--loss ga --lr 1e-5 --weight-decay 0"
    runs = {dtype: run(f"{flags} --dtype {dtype}", out=dtype) for dtype in ("fp32", "bf16")}
    change = {dtype: moved(weights(folder / "model"), weights(small_model)) for dtype, folder in runs.items()}
    change["bf16 weights"] = loop_with_bf16_weights(parse([
        "--model", str(small_model), "--data", str(small_data), "--epochs", "2", "--batch-size", "8",
        "--template", "llama2", *flags.split()]))
    share = {name: float((delta != 0).float().mean()) for name, delta in change.items()}
    assert share["fp32"] > 0.9 and share["bf16"] > 0.9 and share["bf16 weights"] < 0.5, share
    expected = change["fp32"]
    error = {name: float((delta - expected).norm() / expected.norm()) for name, delta in change.items()}
    assert error["bf16"] < 0.3 and error["bf16 weights"] > 0.8, error


def test_a_step_that_overflows_in_fp16_is_made_again(run, small_model, monkeypatch):
    """The scaler begins with a scale that overflows. Each skip halves the scale, and the run has its five
    steps all the same, with the schedule's lr."""
    scales, plain = [], torch.amp.GradScaler

    class Scaler(plain):
        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0**30, enabled=enabled)

        def update(self):
            scales.append(self.get_scale())
            super().update()
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    flags = "--retain-weight 1 --max-grad-norm 20"
    half = run(f"{flags} --dtype fp16 --checkpoint-every 4", out="fp16")
    assert len(scales) > 5 + 5 and scales[0] == 2.0**30 and scales[-1] < 2.0**25
    assert [line["step"] for line in log(half)] == [1, 2, 3, 4, 5]
    assert [line["lr"] for line in log(half)] == [1e-3 * lr_factor(k, 5, 2) for k in range(5)]
    start, single = weights(small_model), weights(run(flags, out="fp32") / "model")
    change, expected = moved(weights(half / "model"), start), moved(single, start)
    assert (change - expected).norm() < 0.1 * expected.norm()
    # A resumed run goes on with the checkpoint's scale.
    (half / "model").rename(half.with_name("uninterrupted"))
    scales.clear()
    train_npo.main(["--resume", str(half)])
    assert len(scales) == 1 and scales[0] < 2.0**25
    resumed, expected = weights(half / "model"), weights(half.with_name("uninterrupted"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_fp16_gives_up_when_no_scale_helps(run, monkeypatch):
    def broken(policy_logps):
        """Its value is finite, and its gradient is not."""
        return policy_logps + 0 * (policy_logps - policy_logps.detach()).sqrt()
    ga = train_npo.OBJECTIVES["ga"]._replace(loss=broken)
    monkeypatch.setitem(train_npo.OBJECTIVES, "ga", ga)
    with pytest.raises(train_npo.InputError, match="step 1: loss .* gradient norm nan"):
        run("--loss ga --dtype fp16")


@pytest.mark.parametrize("dtype", ("bf16", pytest.param("fp16", marks=pytest.mark.slow)))
def test_a_sharded_run_in_16_bits_follows_float32(run, forked, small_model, small_data, dtype):
    flags = ["--retain-weight", 1, "--kl-weight", 1, "--epochs", 1]
    alone = run(" ".join(map(str, flags)), out="alone")
    forked("train_npo.py", "--model", small_model, "--data", small_data, "--lr", 1e-3, "--batch-size", 8,
           "--eval-every", "never", *flags, "--out", dtype, "--parallel", "fsdp", "--dtype", dtype,
           processes=2)
    sharded = alone.with_name(dtype)
    assert all(weight.dtype == torch.float32 for weight in weights(sharded / "model").values())
    for line, expected in zip(log(sharded), log(alone), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=0.02)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    AutoModelForCausalLM.from_pretrained(sharded / "model")


def test_numbers_below_float32s_smallest_are_zero_in_a_run():
    """A collapsed model has many of them, and a CPU computes with them many times slower."""
    tiny = torch.tensor(1e-30)
    try:
        torch.set_flush_denormal(False)
        assert tiny * 1e-10 > 0
        join_world("cpu")
        assert tiny * 1e-10 == 0
    finally:
        torch.set_flush_denormal(False)
