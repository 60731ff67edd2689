"""README's and the lecture's promises: commands parse, pictures exist, and the diff adds an objective that
trains."""

import re
import shlex
import shutil

import evaluate_tofu
import synthetic
from conftest import ROOT
from running.settings import parse
from support.command_line import Parser


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


def test_the_diff_adds_an_objective_that_trains(forked, small_model, small_data, tmp_path):
    """Applied as it stands to a copy of the code; nothing else of the copy is touched."""
    [diff] = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    copy = shutil.copytree(ROOT, tmp_path / "copy",
                           ignore=shutil.ignore_patterns(".*", "runs", "results", "tests"))
    text = (copy / "losses.py").read_text().splitlines()
    changed = applied(diff, text)
    assert len(changed) > len(text)
    (copy / "losses.py").write_text("\n".join(changed) + "\n")
    done = forked(copy / "train_npo.py", "--loss", "squared", "--retain-weight", 1, "--model", small_model,
                  "--data", small_data, "--epochs", 1, "--batch-size", 8, "--lr", 1e-3,
                  "--eval-every", "never", "--out", "run")
    assert "squared+rt" in done.stdout and (tmp_path / "run" / "model").is_dir()


def test_the_lectures_commands_parse_and_its_pictures_are_there(tmp_path, monkeypatch):
    """Every exercise has a command, a question, a picture of at most 150 KB and its answer in a fold."""
    monkeypatch.chdir(tmp_path)  # where no run is
    exercises = re.split(r"^## \d+\. ", (ROOT / "docs" / "lecture.md").read_text(), flags=re.M)[1:]
    assert 8 <= len(exercises) <= 9
    parsers = {"train_npo.py": parse, "synthetic.py": synthetic.parse_args,
               "evaluate_tofu.py": evaluate_tofu.build_parser().parse_args,
               "theory_check.py": lambda words: Parser().parse_args(words)}  # it is given none
    shown = []
    for exercise in exercises:
        [block] = re.findall(r"```\n(.*?)```", exercise, re.S)
        for line in block.splitlines():
            python, script, *words = shlex.split(line, comments=True)
            assert python == "python"
            if "squared" not in words:  # README's diff, tested above
                parsers[script](words)
        asked, folded = exercise.split("<details>")
        assert "**Before you run it.**" in asked and folded.strip().endswith("</details>")
        shown += re.findall(r"!\[.+\]\(\.\./(results/.+?\.png)\)", exercise)
    assert len(shown) >= len(exercises)
    for picture in shown:
        assert 10_000 < (ROOT / picture).stat().st_size <= 150_000, picture
