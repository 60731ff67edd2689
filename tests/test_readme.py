"""README's and the lecture's promises: commands parse, pictures exist, and the diff adds an objective that
trains."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import synthetic
from conftest import ROOT
from data.tofu import load_task
from models.presets import PRESETS
from running.settings import parse, resolve, tiny_settings


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
    assert "squared+rt" in done.stdout and "margin 20.0" in done.stdout  # the default, while there is no flag
    assert (tmp_path / "run" / "model").is_dir()


PARSERS = {"train_npo.py": parse, "synthetic.py": synthetic.parse_args}  # others have a `build_parser`
NO_PARSER = ("theory_check.py", "write_sets.py")


def test_every_documents_commands_have_valid_flags(tmp_path, monkeypatch):
    """With their placeholders, in every block of every document."""
    monkeypatch.chdir(tmp_path)  # where no run is
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/*.md")]
    blocks = [block for path in documents for block in re.findall(r"```\n(.*?)```", path.read_text(), re.S)]
    tried = set()
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    for line in [line for line in lines if re.match(r"([A-Z_]+=\w+ )*(python|torchrun) ", line)]:
        words = shlex.split(line, comments=True)
        found = [i for i, word in enumerate(words) if word.endswith(".py")]
        if not found or {"--resume", "squared"} & set(words):  # needs a run; is README's diff, tested above
            continue
        monkeypatch.setenv("WORLD_SIZE", "2" if "torchrun" in words else "1")
        script, flags = Path(words[found[0]]).name, words[found[0] + 1:]
        if script not in NO_PARSER:
            parser = PARSERS.get(script) or importlib.import_module(script[:-3]).build_parser().parse_args
            parser(flags)
            tried.add(line)
    assert len(tried) > 40


def test_the_lectures_exercises_are_whole():
    """Every exercise has a command, a question, a picture of at most 150 KB and its answer in a fold."""
    exercises = re.split(r"^## \d+\. ", (ROOT / "docs" / "lecture.md").read_text(), flags=re.M)[1:]
    assert 8 <= len(exercises) <= 9
    for exercise in exercises:
        assert len(re.findall(r"```\npython .*?```", exercise, re.S)) == 1
        asked, folded = exercise.split("<details>")
        assert "**Before you run it.**" in asked and folded.strip().endswith("</details>")
        pictures = re.findall(r"!\[.+\]\(\.\./(results/.+?\.png)\)", exercise)
        assert pictures and all(10_000 < (ROOT / file).stat().st_size <= 150_000 for file in pictures)


def test_what_is_shown_was_made_with_todays_preset():
    """README's picture and its eight starts: another preset, or built-in set, needs them made again."""
    study, starts = (json.loads((ROOT / "results" / name).read_text())
                     for name in ("tofu/builtin_tiny_preset.json", "builtin_starts.json"))
    preset, task = PRESETS["tiny"], load_task("builtin", "forget10")
    assert study["start"] == Path(tiny_settings(resolve({}), "full", task).out).name
    assert (study["chosen"]["npo+rt"]["lr"], study["chosen"]["npo+rt"]["beta"]) == (preset.lr, preset.beta)
    expected = {"runs": (preset.lr, preset.epochs, preset.weight_decay),
                "retrained": (preset.sft_lr, preset.sft_epochs, preset.sft_weight_decay)}
    for kind, settings in expected.items():
        assert {(r["lr"], r["epochs"], r["weight_decay"]) for r in starts[kind]} == {settings}
