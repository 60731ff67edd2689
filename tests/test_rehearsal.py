"""Every loss, term and parallel mode runs on fake GPUs, and planted mistakes are found.

A rehearsal must be imported before torch. So each test starts a process, which calls a function of this file.
"""

if __name__ == "__main__":
    import rehearsal  # before torch, which the imports below load

import contextlib
import importlib.util
import inspect
import io
import itertools
import json
import subprocess
import sys
import textwrap
from unittest.mock import patch

import pytest

from conftest import ROOT
from losses import OBJECTIVES, TERMS, long_name

SMALL = "--model llama2-7b --batch-size 4 --micro-batch-size 2 --eval-every"
MODES = {"ddp": (1, "--dtype bf16"), "fsdp": (2, "--dtype fp16 --parallel fsdp")}
LORA = ["npo --retain-weight 1 --dtype bf16 --lora 8"] * bool(importlib.util.find_spec("peft"))
MORE = {"ddp": ("kto --activation-checkpointing", *LORA), "fsdp": ()}
# Where a mistake is planted, the source that is replaced, the flags with which it must be found.
MISTAKES = (
    ("train_npo.Reference.logps", ".to(**self.place)", "", "--loss npo"),
    ("train_npo.policy_inputs", ".to(logps.device, non_blocking=logps.is_cuda)", "", "--loss simnpo"),
    ("train_npo.kto_baseline", "torch.zeros((), device=world.device)", "torch.zeros(())", "--loss kto"),
    ("evaluate_tofu.generate", "end, device=device)\n", "end)\n", "--loss ga --eval-every end"),
    ("evaluate_tofu.generate", "torch.arange(len(prompts), device=device)", "torch.arange(len(prompts))",
     "--loss ga --eval-every end"),
    ("model.World.sum", "dist.all_reduce(x)", "dist.all_reduce(x.cpu())", "--loss ga"))


@contextlib.contextmanager
def planted(place: str, before: str, after: str):
    """`before` is replaced by `after` in the source of the function at `place`."""
    module, *names, name = place.split(".")
    holder = importlib.import_module(module)
    holder = getattr(holder, *names) if names else holder
    function = inspect.unwrap(getattr(holder, name))
    source, made = textwrap.dedent(inspect.getsource(function)), {}
    assert before in source, (place, before)
    code = compile(source.replace(before, after), function.__code__.co_filename, "exec")
    exec(code, function.__globals__, made)
    with patch.object(holder, name, made[name]):
        yield


def rehearsed(gpus: int, flags: str) -> dict:
    """What a rehearsal with two layers shows."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        watch, planned, steps = rehearsal.rehearse(flags.split(), gpus, 40, 2)
    return {"peak": max(watch.peaks.values()), "planned": planned["peak"], "steps": steps,
            "waits": [[*place, count] for place, count in watch.waits.items()]}


def every_loss(mode: str) -> dict:
    """By its flags: a rehearsal of each loss, with the terms in turn."""
    (gpus, flags), terms = MODES[mode], itertools.cycle([f"--{long_name(name)}-weight 1" for name in TERMS])
    runs = [f"{loss} {flags} {'' if loss == 'sft' else next(terms)}" for loss in OBJECTIVES]
    evaluations = {"npo": "end"}  # an evaluation is the same for every loss
    return {run: rehearsed(gpus, f"{SMALL} {evaluations.get(run.split()[0], 'never')} --loss {run}")
            for run in (*runs, *MORE[mode])}


def every_mistake() -> list:
    found = []
    for *where, flags in MISTAKES:
        try:
            with planted(*where):
                found.append(rehearsed(2, f"{SMALL} never {flags}"))
        except RuntimeError as error:
            found.append(str(error))
            import torch.distributed as dist
            dist.destroy_process_group()
    return found


@pytest.fixture
def in_process():
    """in_process("every_loss", "ddp"): what this file's function returns in a process of its own."""
    def call(*words: str):
        done = subprocess.run([sys.executable, __file__, *words], cwd=ROOT, capture_output=True, text=True)
        if "a rehearsal needs" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)
    return call


@pytest.mark.parametrize("mode", MODES)
def test_every_loss_and_term_makes_no_mistake_and_waits_twice_per_step(in_process, mode):
    """For the sums with the norm, and for what signals and clocks ask of all processes."""
    results = in_process("every_loss", mode)
    assert {name.split()[0] for name in results} == {*OBJECTIVES}
    for name, result in results.items():
        waits = {}
        for phase, line, count in result["waits"]:
            if phase == "training":
                file = line.split(":")[0]
                waits[file] = waits.get(file, 0) + count
        assert waits["train_npo.py"] <= 2 * result["steps"] + 1, name  # the last step checks the logits, too


def test_planted_mistakes_are_found(in_process):
    for mistake, error in zip(MISTAKES, in_process("every_mistake"), strict=True):
        assert isinstance(error, str) and ("cpu" in error or "CPU" in error), (mistake, error)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
