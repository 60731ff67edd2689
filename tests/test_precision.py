"""What float32 master weights are for, what a step that fp16's scaler skips counts for (nothing), and numbers
that float32 can no longer hold whole."""

import json

import pytest
import torch
from safetensors.torch import load_file

from data.tofu import load_task
from models.answers import AnswerModel
from models.loading import load_model
from running.plan import Plan
from running.settings import read_config, resolve
from support.world import ALONE
from train_npo import carry_out, join_world, loss_sums, lr_factor


@pytest.fixture
def settings(small_model, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda **given: resolve({"model": str(small_model), "data": str(small_data), "epochs": 1,
                                    "batch_size": 8, "template": "llama2", "eval_every": "never", **given})


def pure_bf16(s) -> dict:
    """The same steps by a plain loop whose weights, and AdamW's moments with them, are bfloat16."""
    lm, tokenizer, _ = load_model(s.start)
    model, plan = AnswerModel(lm.to(torch.bfloat16)), Plan(s, load_task(s.data, s.split), tokenizer, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.0)
    for step, items in enumerate(plan.stream):
        optimizer.param_groups[0]["lr"] = s.lr * lr_factor(step, plan.steps, plan.warmup_steps)
        counts = plan.counts(items)
        for micro in plan.micro_batches(items, ALONE):
            loss_sums(s, model, plan, micro, None, counts, torch.zeros(()), "cpu")["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().float() for name, p in lm.named_parameters()}


def test_a_small_update_vanishes_in_bf16_weights_and_not_in_ours(settings, small_model):
    """lr 1e-5 against weights of 0.02, where bfloat16's spacing is 1.2e-4: rounding takes the update back,
    every time. Autocast over float32 weights moves all of them, by what a float32 run moves them."""
    start = {name: p.detach() for name, p in load_model(str(small_model))[0].named_parameters()}
    flags = dict(loss="ga", lr=1e-5, weight_decay=0.0)
    weights = {dtype: load_file(carry_out(settings(dtype=dtype, **flags),
                                          ALONE) / "model" / "model.safetensors")
               for dtype in ("fp32", "bf16")}
    weights["pure bf16"] = pure_bf16(settings(**flags))
    begin = {name: {n: p.to(torch.bfloat16).float() if name == "pure bf16" else p for n, p in start.items()}
             for name in weights}
    moved = {name: torch.cat([(weights[name][n] - begin[name][n]).flatten() for n in start])
             for name in weights}
    share = {name: float((m != 0).float().mean()) for name, m in moved.items()}
    assert share["fp32"] > 0.99 and share["bf16"] > 0.99 and share["pure bf16"] < 0.5, share
    for n in (n for n in start if n.endswith("norm.weight")):  # weights of 1: not one of them can move
        assert torch.equal(weights["pure bf16"][n], begin["pure bf16"][n])
        assert (weights["bf16"][n] != start[n]).float().mean() > 0.9
    off = {name: float((m - moved["fp32"]).norm() / moved["fp32"].norm()) for name, m in moved.items()}
    assert off["bf16"] < 0.25 and off["pure bf16"] > 0.8, off


def test_a_step_that_the_scaler_skips_is_not_counted(settings, monkeypatch):
    """A scale so large that the first tries overflow: they are made again, and the run has its three steps
    all the same."""
    tries, plain = [], torch.amp.GradScaler

    class Scaler(plain):
        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0**30, enabled=enabled)

        def update(self):
            tries.append(self.get_scale())
            super().update()

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    flags = dict(loss="npo", retain_weight=1.0, lr=1e-3)
    half = carry_out(settings(dtype="fp16", **flags), ALONE)
    log = [json.loads(line) for line in (half / "log.jsonl").read_text().splitlines()]
    assert len(tries) > 3 + 2 and tries[0] == 2.0**30 and tries[-1] < 2.0**20  # each skip has halved it
    assert [line["step"] for line in log] == [1, 2, 3]
    assert [line["lr"] for line in log] == [1e-3 * lr_factor(k, 3, 2) for k in range(3)]
    # The weights are those of three steps.
    whole = carry_out(settings(**flags), ALONE)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (half, whole))
    start = dict(load_model(read_config(whole)["settings"]["start"])[0].named_parameters())
    moved = [torch.cat([(w[name] - start[name].detach()).flatten() for name in w]) for w in (ours, theirs)]
    assert (moved[0] - moved[1]).norm() < 0.1 * moved[1].norm()


def test_numbers_below_float32s_smallest_are_zero_in_a_run():
    """A collapsed model's steps would be many times slower on a CPU."""
    tiny = torch.tensor(1e-30)
    try:
        torch.set_flush_denormal(False)
        assert tiny * 1e-10 > 0
        join_world("cpu")
        assert tiny * 1e-10 == 0
    finally:
        torch.set_flush_denormal(False)
