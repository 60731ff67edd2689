"""Weights and AdamW's moments stay in float32. --dtype is the precision of matrix products."""

import pytest
import torch
from conftest import log, weights
from transformers import AutoModelForCausalLM

import train_npo
from common import InputError
from data.batches import TokenBatch
from evaluate_tofu import store_linear
from model import AnswerModel, autocast, join_world, load_model
from train_npo import lr_factor


def moved(after: dict, before: dict) -> torch.Tensor:
    return torch.cat([(after[name] - before[name]).flatten() for name in before])


def test_bf16_is_the_precision_of_products_and_not_of_weights(run, small_model):
    """lr 1e-5 against weights of 0.1, where bfloat16's spacing is 5e-4: weights kept in bfloat16 would not
    move. Float32 weights move as those of a float32 run do."""
    runs = [run(f"--loss ga --lr 1e-5 --weight-decay 0 --dtype {dtype}", out=dtype)
            for dtype in ("fp32", "bf16")]
    expected, change = (moved(weights(folder / "model"), weights(small_model)) for folder in runs)
    assert (expected != 0).float().mean() > 0.9 and (change != 0).float().mean() > 0.9
    assert 0 < (change - expected).norm() < 0.3 * expected.norm()


@torch.no_grad()
def test_weights_stored_in_16_bits_for_an_evaluation_change_no_number(small_model):
    """Its head is the embedding, which stays in float32."""
    lm, batch = load_model(str(small_model)).lm, TokenBatch(torch.arange(8)[None], *[torch.arange(4)] * 3)
    batch, model = batch._replace(lines=torch.zeros(4, dtype=torch.long)), AnswerModel(lm)
    with autocast("bf16", torch.device("cpu")):
        _, before = model([batch])
        store_linear(lm, torch.bfloat16)
        _, after = model([batch])
    assert torch.equal(before, after)
    dtypes = {p.dtype for name, p in lm.named_parameters() if "proj" in name}
    assert dtypes == {torch.bfloat16} and lm.lm_head.weight.dtype == torch.float32


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


def test_a_machine_with_fewer_gpus_than_processes_runs_on_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert join_world("auto").device.type == "cpu"
    with pytest.raises(InputError, match="no such device for each of 2 processes"):
        join_world("cuda")
