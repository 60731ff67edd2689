"""The run on fake GPUs: every loss and term, and mistakes that it must find. rehearsal.py says what is faked.

A rehearsal must load its library before torch, so each test starts one process, which imports this file and
calls a function below it.
"""

import contextlib
import importlib
import inspect
import io
import json
import subprocess
import sys
import textwrap
import time

import pytest

from conftest import ROOT
from losses import OBJECTIVES, TERMS, long_name

SMALL = ["--model", "smollm2-135m", "--batch-size", "8"]
MODES = {"ddp": (1, ["--dtype", "bf16"]), "fsdp": (2, ["--dtype", "fp16", "--parallel", "fsdp"])}
# What is patched: module or class, function, a piece of its source, what stands there instead, and flags.
MISTAKES = {
    "the reference's log-probabilities on the CPU":
        ("train_npo.Reference", "logps", ".to(**self.place)", "", "--loss npo"),
    "the lengths of the answers on the CPU":
        ("train_npo", "policy_inputs", ".to(logps.device, non_blocking=logps.is_cuda)", "", "--loss simnpo"),
    "the texts of a generation on the CPU":
        ("evaluate_tofu", "generate", "max_new_tokens), end, device=device)", "max_new_tokens), end)",
         "--loss ga"),
    "the rows of a generation on the CPU":
        ("evaluate_tofu", "generate", "torch.arange(len(prompts), device=device)",
         "torch.arange(len(prompts), device='cpu')", "--loss ga"),
    "a process's requests on the CPU":
        ("train_npo", "train", ".to(**reference.place)", "", "--loss ga"),
    "a tensor on the CPU in a collective":
        ("train_npo", "train", "world.sum(torch.stack(", "world.sum(torch.stack(", "--loss ga")}


def planted(place: str, name: str, before: str, after: str):
    """A patch of a function: `before` is replaced by `after` in its source."""
    from unittest.mock import patch
    module, _, kind = place.partition(".")
    module = importlib.import_module(module)
    holder = getattr(module, kind) if kind else module
    source = textwrap.dedent(inspect.getsource(getattr(holder, name)))
    assert before in source, (name, before)
    made = {}
    exec(compile(source.replace(before, after), module.__file__, "exec"), vars(module), made)
    return patch.object(holder, name, made[name])


def rehearse_all(mode: str):
    """Prints seconds and waits by loss, of every loss with a term each in turn."""
    import rehearsal
    gpus, flags = MODES[mode]
    for number, loss in enumerate(OBJECTIVES):
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            watch, _, steps = rehearsal.rehearse([*SMALL, *flags, "--loss", loss], gpus, 40, 2)
        print(loss, time.perf_counter()-begin, steps)


if __name__ == "__main__":
    rehearse_all("ddp")
