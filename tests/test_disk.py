"""A full disk, made by the limit on a file's size: a clear sentence, what was there stays whole, and once
there is room a resumed run ends bitwise as an undisturbed one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import ROOT
from running.checkpoints import latest
from running.settings import parse
from support.world import ALONE
from train_npo import carry_out

# A run whose files may have at most 4000 bytes from the moment on that it writes what NAME says (the
# operating system refuses the rest of a write, as a full disk does; Python ignores the signal that comes with
# it).
FULL_DISK = """
import resource, sys
sys.path.insert(0, ROOT)
import train_npo
from running import checkpoints, run_folder
from support import command_line

def fills(module, name, is_it):
    plain = getattr(module, name)
    def write(*args, **kwargs):
        if is_it(*args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        return plain(*args, **kwargs)
    setattr(module, name, write)

moments = {"checkpoint": (checkpoints, "save", lambda folder, step, *_: step == 4),
           "evaluation": (run_folder, "write_json", lambda path, *_: str(path).endswith("step_000004.json")),
           "best": (run_folder.RunFolder, "save_aside", lambda run, lm, name, *_: name == "best"),
           "model": (run_folder.RunFolder, "save_aside", lambda run, lm, name, *_: name == "model")}
fills(*moments[sys.argv.pop(1)])
command_line.run_command(train_npo.main, "train_npo.py")
"""
FLAGS = ["--retain-weight", 1, "--batch-size", 2, "--epochs", 1, "--lr", 1e-3, "--eval-every", 2, "--keep",
         "best"]
ROWS = 10  # to forget, and as many to keep: five steps


def fails(folder: Path, program: str, *words) -> str:
    """The last line on stderr of a run that ends in exit status 2."""
    done = subprocess.run([sys.executable, "-c", program.replace("ROOT", repr(str(ROOT))), *map(str, words)],
                          cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def undisturbed(small_model, small_data, tmp_path_factory):
    """(flags, the folder of a run that always had room)."""
    folder = tmp_path_factory.mktemp("room") / "run"
    lines = (small_data / "full.json").read_text().splitlines()
    for name, rows in (("forget", lines[-ROWS:]), ("retain", lines[:ROWS])):
        (folder.parent / f"{name}.jsonl").write_text("\n".join(rows))
    flags = ["--model", small_model, "--forget", folder.parent / "forget.jsonl",
             "--retain", folder.parent / "retain.jsonl", *FLAGS]
    flags = list(map(str, flags))
    carry_out(parse([*flags, "--out", str(folder)]), ALONE)
    return flags, folder


SLOW = [pytest.param(moment, marks=pytest.mark.slow) for moment in ("evaluation", "best", "model")]


@pytest.mark.parametrize("moment", ("checkpoint", *SLOW))
def test_a_full_disk_costs_nothing_that_was_there(moment, undisturbed, tmp_path):
    flags, whole = undisturbed
    out = tmp_path / "run"
    sentence = fails(tmp_path, FULL_DISK, moment, *flags, "--out", "run")
    assert sentence.startswith("train_npo.py: ") and "cannot write" in sentence
    assert "File too large" in sentence
    # The previous checkpoint is whole, nothing half-written stands where a whole file belongs, no model yet.
    path, passed_over = latest(out / "checkpoints")
    assert not passed_over and not (out / "model").exists()
    assert (path.name if path else None) == {"checkpoint": "step_000002", "evaluation": "step_000002",
                                             "best": None,
                                             "model": "step_000004"}[moment]
    assert all(json.loads(file.read_text())["metrics"] for file in (out / "eval").glob("*.json"))
    assert not list(out.rglob("*.partial"))
    carry_out(parse(["--resume", str(out)]), ALONE)
    for name in ("model", "best"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (out, whole))
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (out, whole)]
    for line in logs[0] + logs[1]:
        del line["tokens_per_s"], line["memory"]
    assert logs[0] == logs[1]
    for file in (whole / "eval").glob("*.json"):
        ours, theirs = (json.loads((folder / "eval" / file.name).read_text()) for folder in (out, whole))
        assert ours["rows"] == theirs["rows"]


@pytest.mark.parametrize("room", (1000, pytest.param(20_000, marks=pytest.mark.slow)))
def test_little_room_from_the_start(room, undisturbed, tmp_path):
    """One sentence, whatever was being written first; what could be begun can be gone on with."""
    flags, _ = undisturbed
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))\n"
    program = limit + FULL_DISK.split("def fills")[0]
    program += "command_line.run_command(train_npo.main, 'train_npo.py')"
    assert "room" in fails(tmp_path, program, *flags, "--out", "run")
    if (tmp_path / "run").exists():
        assert (carry_out(parse(["--resume", str(tmp_path / "run")]), ALONE) / "model").is_dir()
    else:
        assert not list(tmp_path.iterdir()), "nothing is left of a run that could not begin"
