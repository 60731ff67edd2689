"""What the documents promise: commands have valid flags, links lead somewhere, README's diff adds an
objective that trains, and the lecture's notebook asks what the lecture asks."""

import dataclasses
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from conftest import ROOT
from train_npo import Settings

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/*.md"), *ROOT.glob("data/tiny/*.md")]


def parse(script: Path, flags: list[str]):
    """Parse a command's flags as its script does; raises InputError for a wrong one."""
    source = (ROOT / script).read_text()
    if parser := re.search(r"^def (parse|parse_args|build_parser)\(", source, re.M):
        module = importlib.import_module(".".join(script.with_suffix("").parts))
        make = getattr(module, parser[1])
        return make().parse_args(flags) if parser[1] == "build_parser" else make(flags)
    defined = {*re.findall(r'"(--[a-z-]+)"', source)}  # its main makes the parser
    if re.search("^(from|import) train_npo", source, re.M):  # these pass flags on
        defined |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Settings)}
    assert {flag for flag in flags if flag.startswith("--")} <= defined, (script, flags)


def test_every_documents_commands_have_valid_flags(tmp_path, monkeypatch):
    """Also those with placeholders, such as TOFU_DIR, in every block of code of every document."""
    monkeypatch.chdir(tmp_path)  # where no run is
    monkeypatch.setattr("train_npo.find_spec", str)  # optional packages, such as peft, count as there
    text = "".join(path.read_text() for path in DOCUMENTS)
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M))
    lines = blocks.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines
                if re.match(r"([A-Z_]+=\w+ )*(python|torchrun) (?!-)|torchrun --", line)]
    for words in commands:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        # These need a run, README's diff (tested below), or a file that the lecture makes.
        if not {"--resume", "squared", "no_momentum.py"} & {*words}:
            monkeypatch.setenv("WORLD_SIZE", "2" if "torchrun" in words else "1")
            parse(Path(words[script]), words[script + 1:])
    assert len(commands) > 40


def test_links_and_pictures_exist():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


def applied(diff: str, lines: list[str]) -> list[str]:
    """`lines` with each run of added lines behind the line that the diff shows before it, or before the one
    that it shows behind."""
    shown, added, before = [line for line in diff.splitlines() if line.startswith(("+", " "))], [], ""
    for line in [*shown, " "]:
        if line.startswith("+"):
            added.append(line[1:])
            continue
        if added:
            place = lines.index(before) + 1 if before in lines else lines.index(line[1:])
            lines, added = [*lines[:place], *added, *lines[place:]], []
        before = line[1:]
    return lines


def test_the_diff_adds_an_objective_and_a_term_that_train(forked, small_model, small_data, tmp_path):
    """Applied as printed to a copy of losses.py; no other file is changed."""
    [diff] = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    copy = shutil.copytree(ROOT, tmp_path / "copy",
                           ignore=shutil.ignore_patterns(".*", "runs", "results", "tests"))
    lines = (copy / "losses.py").read_text().splitlines()
    (copy / "losses.py").write_text("\n".join(applied(diff, lines)) + "\n")
    done = forked(copy / "train_npo.py", "--loss", "squared", "--l2-weight", 1, "--model", small_model,
                  "--data", small_data, "--epochs", 2, "--batch-size", 8, "--eval-every", "never",
                  "--out", "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert "squared+l2" in done.stdout and (tmp_path / "run" / "model").is_dir()
    assert lines[0]["l2_loss"] < 1e-10 < 1e-6 < lines[-1]["l2_loss"]


LECTURE = (ROOT / "docs" / "lecture.md").read_text()
CELLS = json.loads((ROOT / "docs" / "lecture.ipynb").read_text())["cells"]


def test_the_notebook_has_the_lectures_questions_and_commands_and_no_answer():
    texts = {kind: "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind)
             for kind in ("markdown", "code")}
    questions = re.sub(r"<details>.*?</details>", "", LECTURE, flags=re.S)
    commands = [command.split(" 2>&1")[0] for command in re.findall(r"!(python .*)", texts["code"])]
    assert len(commands) == 10 and all(command in questions + (ROOT / "README.md").read_text().replace(
        "torchrun --nproc_per_node=2", "python") for command in commands)
    for asked in re.findall(r"\*\*Before you .*?(?=\n\n)", questions, re.S):
        assert asked in texts["markdown"]
    for answer in re.findall(r"<details>.*?</details>", LECTURE, re.S):
        assert max(answer.splitlines(), key=len) not in texts["markdown"]
    assert not any(cell.get("outputs") for cell in CELLS)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "runs", "tests"))
    notebook = nbformat.read(copy / "docs" / "lecture.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": copy / "docs"}}).execute()
    printed = json.dumps(notebook)
    assert printed.count("after step 125") == 6 and "image/png" in printed
