"""Killed for real (SIGKILL), resumed, and ended as if never interrupted; several machines; a restart by
torchrun."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import assert_close

from conftest import ROOT, fork

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def log(folder: Path) -> list:
    """log.jsonl without what tells of time and memory."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("tokens_per_s", "memory")}
            for line in lines]


def assert_same_run(expected: Path, folder: Path):
    """Bitwise equal weights, every log line once, the same evaluations."""
    a, b = (load_file(path / "model" / "model.safetensors") for path in (expected, folder))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert log(folder) == log(expected)
    names = sorted(path.name for path in (expected / "eval").glob("*"))
    assert sorted(path.name for path in (folder / "eval").glob("*")) == names
    for name in names:
        rows = [json.loads((path / "eval" / name).read_text())["rows"] for path in (expected, folder)]
        assert rows[0] == rows[1]


def start(args: list, cwd: Path, launcher=(sys.executable,)) -> subprocess.Popen:
    return subprocess.Popen([*map(str, launcher), str(ROOT / "train_npo.py"), *map(str, args)], cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def kill_when(process: subprocess.Popen, moment) -> bool:
    """SIGKILL as soon as `moment()`; False where the process ended before."""
    while not moment():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    process.kill()
    process.wait()
    return True


@pytest.fixture(scope="module")
def small(small_model, small_data, tmp_path_factory):
    """(flags of a run of 24 steps with four evaluations, an undisturbed run of it)."""
    args = ["--retain-weight", 1, "--model", small_model, "--data", small_data, "--epochs", 8, "--batch-size",
            7, "--lr", 1e-3, "--eval-every", 8, "--checkpoint-every", 2]
    folder = tmp_path_factory.mktemp("whole")
    fork(folder, "train_npo.py", *args, "--out", "run")
    return args, folder / "run"


@pytest.mark.parametrize("moment", ("before the first checkpoint", "inside a checkpoint",
                                    pytest.param("inside an evaluation", marks=pytest.mark.slow)))
def test_a_killed_run_ends_as_if_never_interrupted(small, forked, tmp_path, moment):
    args, whole = small
    run = tmp_path / "run"
    def lines():
        return len(log(run)) if (run / "log.jsonl").exists() else 0
    reached = {"before the first checkpoint": lambda: lines() >= 1,
               "inside a checkpoint": lambda: lines() > 3
               and list((run / "checkpoints").glob(".step_*.partial")),
               "inside an evaluation": lambda: lines() == 16
               and not (run / "eval" / "step_000016.json").exists()}
    process = start([*args, "--out", "run"], tmp_path)
    assert kill_when(process, reached[moment]), process.stdout.read()
    assert not (run / "model").exists()
    forked("train_npo.py", "--resume", "run")
    assert_same_run(whole, run)


@pytest.mark.slow
def test_20_kills_at_random_moments(small_data, tmp_path):
    """The whole of the user's command: fine-tuning, retraining, unlearning. Killed at 20 random moments of
    it, each time resumed (or started again, where nothing was there yet), and killed no more than once a
    run."""
    args = ["--retain-weight", 1, "--data", small_data, "--epochs", 4, "--batch-size", 8,
            "--checkpoint-every", 2]
    (tmp_path / "whole").mkdir()
    begin = time.monotonic()
    assert start([*args, "--out", "run"], tmp_path / "whole").wait() == 0
    duration = time.monotonic() - begin
    for seed in range(20):
        folder = tmp_path / f"kill{seed}"
        folder.mkdir()
        at = time.monotonic() + random.Random(seed).uniform(0.05, 1) * duration
        process = start([*args, "--out", "run"], folder)
        kill_when(process, lambda at=at: time.monotonic() > at)
        again = ["--resume", "run"] if (folder / "run").exists() else [*args, "--out", "run"]
        resumed = start(again, folder)
        assert resumed.wait() == 0, resumed.stdout.read()
        assert_same_run(tmp_path / "whole" / "run", folder / "run")
        for model in (tmp_path / "whole" / "runs" / "models").iterdir():
            if model.is_dir():
                assert_same_run(model, folder / "runs" / "models" / model.name)
        shutil.rmtree(folder)


# ---------------------------------------------------------------- several machines

def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def agents(args: list, cwd: Path, *flags) -> list[subprocess.Popen]:
    """Two torchrun agents that meet at a loopback address, each with one process: two machines."""
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=test",
            f"--rdzv-endpoint=localhost:{free_port()}", *flags]
    return [start(args, cwd, [*TORCHRUN, *meet]) for _ in range(2)]


def test_two_machines_equal_one_process(small, tmp_path):
    args, whole = small
    for agent in agents([*args, "--out", "run"], tmp_path):
        out, _ = agent.communicate(timeout=600)
        assert agent.returncode == 0, out
    a, b = (load_file(path / "model" / "model.safetensors") for path in (whole, tmp_path / "run"))
    assert_close(a, b)
    assert len(log(tmp_path / "run")) == len(log(whole))


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")


@needs_proc
@pytest.mark.parametrize("restarts", (0, pytest.param(1, marks=pytest.mark.slow)))
def test_a_killed_worker_ends_the_job_or_torchrun_starts_it_again(small, forked, tmp_path, restarts):
    """Within 30 seconds and with the reason; with --max-restarts the run goes on from its last checkpoint."""
    args, whole = small
    launcher = [*TORCHRUN, "--nproc_per_node=2", "--standalone", f"--max-restarts={restarts}"]
    job = start([*args, "--out", "run"], tmp_path, launcher)
    while not list((tmp_path / "run" / "checkpoints").glob("step_*")):
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.01)
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    begin = time.monotonic()
    out, _ = job.communicate(timeout=600)
    if not restarts:
        assert job.returncode != 0 and time.monotonic() - begin < 30
        assert "SIGKILL" in out or "Signal 9" in out
        forked("train_npo.py", "--resume", "run", processes=2)
    else:
        assert job.returncode == 0, out
        assert "resumed after step" in out
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert_close(load_file(whole / "model" / "model.safetensors"), weights)
    assert [line["step"] for line in log(tmp_path / "run")] == list(range(1, len(log(whole)) + 1))
