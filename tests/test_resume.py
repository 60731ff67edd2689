"""One process, three with ddp and two with FSDP end at the same weights. A run that is killed (SIGKILL) and
resumed ends as one that was never interrupted."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import assert_close, fork, log, weights
from safetensors.torch import load_file, save_file

import train_npo
from common import InputError

PARALLEL = {"ddp": 3, "fsdp": 2}  # processes


def die_in_the_second_checkpoint():
    """SIGKILL in every process once the checkpoint's tensors are written, and before it gets its name."""
    import torch.distributed.checkpoint as dcp
    plain, count = dcp.save, iter((1, 2))

    def save(*args, **kwargs):
        plain(*args, **kwargs)
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    dcp.save = save


@pytest.fixture(scope="module")
def runs(small_model, small_data, tmp_path_factory) -> Path:
    """A folder with runs of one command: alone, ddp (three processes: a sum of two has no order), fsdp (two),
    and killed_ddp and killed_fsdp, which are resumed.
    12 steps, the last of one row, which only the first process has. In the others FSDP's 5 and 4 rows are
    three and two micro-batches. KTO's z takes one and two passes more, and is above 0 because of the large
    retain weight. Checkpoints come after steps 4 and 8, one evaluation after step 12."""
    folder = tmp_path_factory.mktemp("runs")
    args = ["--loss", "kto", "--retain-weight", 20, "--kl-weight", 1, "--model", f"tiny={small_model}",
            "--data", small_data, "--epochs", 5, "--batch-size", 9, "--micro-batch-size", 2, "--lr", 1e-3,
            "--max-grad-norm", 42, "--checkpoint-every", 4, "--eval-every", "end"]
    fork(folder, "train_npo.py", *args, "--out", "alone")
    for parallel, size in PARALLEL.items():
        flags = [*args, "--parallel", parallel, "--out"]
        fork(folder, "train_npo.py", *flags, parallel, processes=size)
        fork(folder, "train_npo.py", *flags, f"killed_{parallel}", processes=size, status=-signal.SIGKILL,
             prepare=die_in_the_second_checkpoint)
        shutil.copytree(folder / f"killed_{parallel}", folder / f"torn_{parallel}")
        done = fork(folder, "train_npo.py", "--resume", f"killed_{parallel}", processes=size)
        assert "resumed after step 4 of 12" in done.stdout
    return folder


@pytest.fixture
def resume(tmp_path, monkeypatch):
    """resume(run) continues a copy of it in this process, and returns the copy."""
    monkeypatch.chdir(tmp_path)

    def go_on(run: Path, *flags: str, change=None) -> Path:
        copy = tmp_path / f"copy_of_{run.name.removeprefix('copy_of_')}"
        if copy != run:
            shutil.copytree(run, copy)
        shutil.rmtree(copy / "model", ignore_errors=True)
        if change:
            change(copy)
        train_npo.main(["--resume", str(copy), *flags])
        return copy
    return go_on


def rows(run: Path, step: int) -> dict:
    return json.loads((run / "eval" / f"step_{step:06d}.json").read_text())["rows"]


# ---------------------------------------------------------------- one process or two

@pytest.mark.parametrize("parallel", PARALLEL)
def test_several_processes_match_one(runs, parallel):
    """Losses alone do not show a head that FSDP failed to train: the first steps have the start's weights."""
    assert_close(weights(runs / "alone" / "model"), weights(runs / parallel / "model"))
    alone, two = log(runs / "alone"), log(runs / parallel)
    assert len(alone) == 12 and {line["grad_norm"] > 42 for line in alone} == {True, False}
    for expected, line in zip(alone, two, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_several_processes_evaluate_as_one(runs, parallel):
    alone, two = rows(runs / "alone", 12), rows(runs / parallel, 12)
    assert {name: len(group) for name, group in alone.items()} == {
        "forget": 20, "retain": 20, "real_authors": 6, "world_facts": 7, "holdout": 20}
    for name in alone:
        for expected, row in zip(alone[name], two[name], strict=True):
            assert row.get("generation") == expected.get("generation") and row["index"] == expected["index"]
            for key in ("answer_nll", "perturbed_nll", "kl"):
                assert row.get(key, 0) == pytest.approx(expected.get(key, 0), rel=1e-4, abs=1e-6), key


# ---------------------------------------------------------------- killed and resumed

def assert_same_run(expected: Path, run: Path):
    """Bitwise equal weights, each line of the log once, the same evaluations, and nothing left over."""
    a, b = weights(expected / "model"), weights(run / "model")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert log(run) == log(expected)
    for folder in ("eval", "checkpoints"):
        names = sorted(path.name for path in (expected / folder).glob("*"))
        assert sorted(path.name for path in (run / folder).glob("*")) == names
    for path in (expected / "eval").glob("*"):
        assert rows(run, int(path.stem[5:])) == rows(expected, int(path.stem[5:]))


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_killed_run_ends_bitwise_as_an_undisturbed_one(runs, parallel):
    """It died after step 8. Its newest whole checkpoint is of step 4."""
    torn = runs / f"torn_{parallel}"
    assert {path.name for path in (torn / "checkpoints").iterdir()} == {"step_000004", ".step_000008"}
    assert len(log(torn)) == 8 and not (torn / "model").exists()
    assert_same_run(runs / parallel, runs / f"killed_{parallel}")


def test_a_run_resumes_on_another_number_of_processes(runs, resume, forked, tmp_path):
    """FSDP on two processes continues alone, and one process continues as FSDP on two."""
    expected = weights(runs / "alone" / "model")
    resumed = resume(runs / "torn_fsdp", "--parallel", "ddp", "--micro-batch-size", "3")
    assert_close(expected, weights(resumed / "model"))
    assert [line["step"] for line in log(resumed)] == list(range(1, 13))
    eighth = resumed / "checkpoints" / "step_000008"  # nothing is left of the processes' torn one
    assert len(list(eighth.glob("*.safetensors"))) == 1
    shutil.copytree(runs / "alone", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "model")
    done = forked("train_npo.py", "--resume", "two", "--parallel", "fsdp", processes=2)
    assert "resumed after step 8 of 12" in done.stdout
    assert_close(expected, weights(tmp_path / "two" / "model"))


def test_a_run_that_died_before_its_first_checkpoint_starts_again(run, resume, monkeypatch):
    expected = run("--retain-weight 1 --kl-weight 1", out="expected")
    plain = train_npo.Run.log

    def die(self, step, *args):
        assert step < 3, "dead"
        plain(self, step, *args)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="dead"):
        patch.setattr(train_npo.Run, "log", die)
        run("--retain-weight 1 --kl-weight 1", out="died")
    assert len(log(Path("died"))) == 2 and Path("died/reference.safetensors").exists()
    assert_same_run(expected, resume(Path("died")))


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_saves_after_the_step_and_names_the_command_that_continues(run, resume, monkeypatch, number):
    flags = "--loss undial --retain-weight 1 --checkpoint-every 3"
    expected, plain = run(flags, out="expected"), train_npo.Run.log

    def interrupt(self, step, *args):
        if step == 3:
            signal.raise_signal(number)
        plain(self, step, *args)
    sentence = "saved after step 3/5: --resume stopped continues"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=sentence):
        patch.setattr(train_npo.Run, "log", interrupt)
        run(flags, out="stopped")
    assert_same_run(expected, resume(Path("stopped")))


# ---------------------------------------------------------------- what is refused

def test_a_full_disk_at_a_checkpoint_leaves_no_half_and_the_run_goes_on(run, resume, monkeypatch):
    flags = "--retain-weight 1 --checkpoint-every 2"
    expected, save, count = run(flags, out="expected"), train_npo.dcp.save, iter((1, 2, 3, 4))

    def full_at_the_second(*args, **kwargs):
        save(*args, **kwargs)
        if next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="after making room, continue with"):
        patch.setattr(train_npo.dcp, "save", full_at_the_second)
        run(flags, out="full")
    assert [path.name for path in Path("full/checkpoints").iterdir()] == ["step_000002"]
    assert_same_run(expected, resume(Path("full")))


def test_a_finished_run_is_finished(runs, capsys):
    train_npo.main(["--resume", str(runs / "alone")])
    assert "alone is finished" in capsys.readouterr().out


def test_a_run_with_adapters_is_not_resumed_on_parts_of_the_model(runs, tmp_path):
    config = json.loads((runs / "alone" / "config.json").read_text())
    config["settings"]["lora"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train_npo.parse(["--resume", str(tmp_path)]).lora == 2
    with pytest.raises(InputError, match="--lora needs --parallel ddp"):
        train_npo.parse(["--resume", str(tmp_path), "--parallel", "fsdp"])


def other_checkpoint(run: Path):
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(run.parent / "other" / "checkpoints", run / "checkpoints")


def other_data(run: Path):
    file = run.parent / "data" / "full.json"
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | {"answer": "Nobody knows."}), *rest]))


def other_start(run: Path):
    file = run.parent / "model" / "model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file, {"format": "pt"})


def other_retain_log(run: Path):
    file = run.parent / "retrained.json"
    file.write_text(file.read_text().replace("[80]", "[81]"))


@pytest.mark.parametrize("change, sentence", (
    (other_checkpoint, "step_000004 is a checkpoint of another run"),
    (other_data, "trained_on was .* start a new run"), (other_start, "start_hash was .* start a new run"),
    (other_retain_log, "retrained_hash was .* start a new run")))
def test_a_run_continues_only_as_itself(run, resume, small_data, small_model, retain_log, change, sentence):
    shutil.copytree(small_data, "data")
    shutil.copytree(small_model, "model")
    flags = f"--data data --model model --retain-log {retain_log.name} --checkpoint-every 2"
    if change is other_checkpoint:
        run(f"{flags} --seed 1", out="other")
    resumed = resume(run(flags))  # without a change it continues
    with pytest.raises(InputError, match=sentence):
        resume(resumed, change=change)
