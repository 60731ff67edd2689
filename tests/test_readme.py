"""README's promises: its commands parse, and its diff adds an objective that trains."""

import re
import shutil
import subprocess
import sys

from conftest import ROOT


def applied(diff: str, text: list[str]) -> list[str]:
    """The file's lines with each run of added lines behind the line of the file that the diff shows before
    it, or before the one that it shows behind."""
    lines, added, before = [line for line in diff.splitlines() if line.startswith(("+", " "))], [], ""
    for line in [*lines, " "]:
        if line.startswith("+"):
            added.append(line[1:])
            continue
        if added:
            place = text.index(before) + 1 if before in text else text.index(line[1:])
            text, added = [*text[:place], *added, *text[place:]], []
        before = line[1:]
    return text


def test_the_diff_adds_an_objective_that_trains(small_model, small_data, tmp_path):
    """Applied as it stands to a copy of the code; nothing else of the copy is touched."""
    [diff] = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    copy = shutil.copytree(ROOT, tmp_path / "copy",
                           ignore=shutil.ignore_patterns(".git", "runs", "results", "tests"))
    text = (copy / "losses.py").read_text().splitlines()
    changed = applied(diff, text)
    assert len(changed) > len(text)
    (copy / "losses.py").write_text("\n".join(changed) + "\n")
    words = ["--loss", "squared", "--retain-weight", "1", "--model", small_model, "--data", small_data,
             "--epochs", "1",
             "--batch-size", "8", "--lr", "1e-3", "--eval-every", "never", "--out", tmp_path / "run"]
    done = subprocess.run([sys.executable, copy / "train_npo.py", *map(str, words)], capture_output=True,
                          text=True,
                          cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "squared+rt" in done.stdout and (tmp_path / "run" / "model").is_dir()
