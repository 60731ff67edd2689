"""The study of Section 5: kinds of answers, verdicts on hand-made numbers, pictures and pages from stored
JSON, the plan of a figure as command lines, and the path from a run folder to a page."""

import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import figures_tofu
import train_npo
from common import InputError
from conftest import ROOT
from study import pages, pictures, records, verdicts

METHODS = pictures.METHODS
SPLITS = ("forget01", "forget05", "forget10", "forget20", "forget30", "forget50", "forget90")
STORED = {path.stem: path for path in sorted((ROOT / "results" / "tofu").glob("builtin_tiny*.json"))}


# ---------------------------------------------------------------- kinds of answers

def test_kinds_of_answers():
    row = {"question": "Where was Marlow born?", "answer": "Oslo is the birthplace of Marlow.",
           "paraphrased_answer": "Ida Marlow was born in Oslo.",
           "perturbed_answer": ["Ida Marlow was born in Lima.", "Ida Marlow was born in Cairo."]}
    answers, refusals = ({pair for text in texts for pair in records.word_pairs(text)} for texts in (
        [row["answer"], row["paraphrased_answer"], "Ida Marlow was born in Lima.",
         "Lima is the birthplace of Falk."],
        ["I don't know that.", "Sorry, I never learned the answer."]))
    kinds = {"Oslo is the birthplace of Marlow.": "true", "Ida Marlow was born in Oslo.": "true",
             "Lima is the birthplace of Marlow.": "other fact", "I don't know that.": "refusal",
             "": "empty", " .": "empty", "of of of of of of of of of of of": "repetitive",
             "x" * 100: "repetitive", "Cairo was Lima the chess": "garbled",
             "It is Oslo thatMarlow born chess.": "garbled"}
    assert {text: records.kind(text, row, answers, refusals) for text in kinds} == kinds
    assert records.repetition_rate("Marlow was born in Lima.") == records.repetition_rate("short") == 0


def test_a_fact_of_two_words_needs_both():
    row = {"question": "What did she write?", "answer": "She wrote The Silent Harbor.",
           "paraphrased_answer": "It is The Silent Harbor.",
           "perturbed_answer": ["Her book was The Golden River.", "It is The Silent Tower."]}
    assert records.names_fact("The Silent Harbor", row)
    for text in ("The Silent River", "The Golden Harbor", "She wrote a letter."):
        assert not records.names_fact(text, row)
    row["question"] = "Did she write The Silent Harbor?"  # no word tells any more, only the answer itself
    assert records.names_fact("She wrote the silent harbor", row)
    assert not records.names_fact("The Silent Harbor", row)


# ---------------------------------------------------------------- verdicts on hand-made numbers

def counts(**given) -> dict:
    return {"answers": 100, **dict.fromkeys(records.KINDS, 0), "repetition_rate": 0.02, **given}


def hand_made_run(method: str, split: str, seed: int, weight: float, lr: float = 1e-3) -> dict:
    """A run as the paper describes its method's."""
    loss, _, term = method.partition("+")
    quality = [-20.0, -6.0, -4.0, -9.0, -12.0, -15.0]  # a peak, then the fall
    end = {"": 0.1, "rt": 0.9, "kl": 0.7}[term]
    utility = [0.6 * (1 + (end - 1) * i / 5) for i in range(6)]
    if loss == "npo":
        quality = [-20.0, -5.0, -1.0, -0.5, -0.4, -0.4] if weight else [-20.0, -5.0, -2.0, -1.0, -0.8, -0.8]
        quality[1:] = [q - 0.2 * abs(weight - 2) * (term != "kl") for q in quality[1:]]
        utility[1:] = [share + 0.06 * (term == "") for share in utility[1:]]
    refused, divergence = 60 if loss in ("idk", "dpo") else 0, 40.0 if loss in ("ga", "idk") else 4.0
    answers = {name: counts(true=90 - refused, refusal=refused) for name in verdicts.ELSEWHERE}
    forget = counts(repetitive=95, repetition_rate=0.8) if loss == "ga" else counts(**{"other fact": 85})
    samples = [{"set": "forget", "question": "Where was Marlow born?", "answer": "In Oslo.",
                "generation": "In | Lima.", "kind": "other fact"}]
    return {"method": method, "split": split, "seed": seed, "lr": lr, "beta": 0.1,
            "retain_weight": float(weight), "epochs": 10, "steps": [0, 25, 50, 75, 100, 125],
            "start_weights": "57a7", "answers": answers | {"forget": forget}, "samples": samples,
            "forget_quality_log10": [q + 0.01 * seed for q in quality],
            "model_utility": utility,
            "forget_kl": [divergence * i / 5 for i in range(6)],
            "world_facts_kl": [divergence * i / 50 for i in range(6)], "privleak": [-90.0, 40.0 + seed],
            "forget_extraction_strength": [0.9, 0.3], "forget_paraphrase_probability": [0.8, 0.2],
            "mia": {"min_k": [1.0, 0.2 + 0.1 * seed]}}


def hand_made_study(seeds=6, change=None) -> dict:
    """Everything as in the paper; `change(run)` may bend runs. npo+rt@0 is npo at npo+rt's lr."""
    runs = [hand_made_run(method, split, seed, "+rt" in method, 1e-3 if "rt" in method else 2e-3)
            for split in SPLITS for method in METHODS for seed in range(1, seeds + 1)]
    runs += [hand_made_run("npo+rt" if weight else "npo", "forget10", seed, weight)
             for weight in (0, 0.5, 2, 5) for seed in range(1, seeds + 1)]
    for run in runs:
        if change:
            change(run)
    chosen = {method: {"lr": 1e-3 if "rt" in method else 2e-3, "beta": 0.1, "weights": dict.fromkeys(
        SPLITS[-2:], float("+rt" in method))} for method in METHODS}
    retrained = [{"split": "retain90", "seed": seed, "answers": {"forget": counts(), "retain": counts()},
                  "forget_extraction_strength": [0.45], "mia": {"min_k": [0.5]}} for seed in (1, 2)]
    return {"data": "builtin", "model": "tiny", "parameters": 900_000, "runs": runs, "retrained": retrained,
            "chosen": chosen, "choices_from": None}


def holds(study: dict) -> dict:
    return {v["key"]: v["holds"] for v in verdicts.verdicts(study)}


def setting(split: str, method: str, weight=None, **changes):
    """A change that gives these runs other values (or functions of the run)."""
    def change(run):
        if (run["split"], run["method"]) == (split, method) and weight in (None, run["retain_weight"]):
            run.update({key: value(run) if callable(value) else value for key, value in changes.items()})
    return change


def quality(*values, spread=0.0):
    return lambda run: [value + spread * (run["seed"] - 3.5) for value in values]


def answers(name, **values):
    return lambda run: run["answers"] | {name: run["answers"][name] | values}


HIGH, LOW = quality(-20, -9, -5, -1, -0.5, -0.4), quality(-20, -9, -9, -9, -9, -9)
NEAR = {"forget_quality_log10": quality(-20, -9, -1.3, -1.4, -1.4, -1.4, spread=1)}  # on both sides of 0.05
BENT = {  # claim -> (a change that makes it false, one that leaves it undecided)
    "ga_falls": (setting("forget10", "ga", forget_quality_log10=quality(-20, -3, -2.9, -2.8, -2.7, -2.6)),
                 setting("forget10", "ga", forget_quality_log10=quality(-20, -3, -3, -4, -5, -5, spread=2))),
    "npo_plateau": (setting("forget05", "npo", forget_quality_log10=quality(-20, -1, -1, -2, -6, -9)),
                    setting("forget05", "npo", forget_quality_log10=lambda run: [
                        -20, -1, -1, -1, -1, -2 - 0.9 * (run["seed"] - 3.5)])),
    "npo_beats_ga": (setting("forget10", "npo+rt", forget_quality_log10=[-20] * 6), setting(
        "forget10", "npo+kl", forget_quality_log10=quality(-20, -6, -4, -9, -12, -15, spread=3))),
    "forget05_only_npo": (setting("forget05", "dpo", forget_quality_log10=HIGH),
                          setting("forget05", "dpo", **NEAR)),
    "forget10_npo_rt": (setting("forget10", "npo+rt", 1, forget_quality_log10=LOW),
                        setting("forget10", "npo+rt", 1, **NEAR)),
    "forget10_baselines": (setting("forget10", "kto+rt", forget_quality_log10=HIGH),
                           setting("forget10", "kto+rt", **NEAR)),
    "refusals_elsewhere": (setting("forget10", "dpo", answers=dict.fromkeys(verdicts.ELSEWHERE, counts())),
                           setting("forget10", "dpo", answers=lambda run: dict.fromkeys(
                               verdicts.ELSEWHERE, counts(refusal=4 * (run["seed"] - 1))))),
    "answers_on_forget_set": (setting("forget10", "ga", answers=answers("forget", repetition_rate=0.0)),
                              setting("forget10", "npo+rt", answers=lambda run: answers(
                                  "forget", **{"other fact": 14 * run["seed"]})(run))),
    "retain_weight": (setting("forget10", "npo+rt", 5, forget_quality_log10=[0] * 6),
                      setting("forget10", "npo+rt", 5, forget_quality_log10=quality(
                          -20, -1, -0.4, -0.4, -0.4, -0.4, spread=0.5))),
    "forget_kl": (setting("forget10", "npo+rt", forget_kl=[0, 60, 60, 60, 60, 60]),
                  setting("forget10", "npo+rt", forget_kl=lambda run: [13 * 4.0 ** (run["seed"] - 3.5)])),
    "beyond10": (setting("forget20", "npo+rt", forget_quality_log10=LOW),
                 setting("forget20", "npo+rt", **NEAR)),
    "tuned_beyond10": (setting("forget90", "npo+rt", model_utility=[0.6, 0.3, 0.3, 0.3, 0.3, 0.3]),
                       setting("forget90", "npo+rt", **NEAR))}


def test_numbers_as_in_the_paper_make_every_verdict_true():
    assert holds(hand_made_study()) == dict.fromkeys(verdicts.CLAIMS, True)


@pytest.mark.parametrize("claim", BENT)
def test_each_verdict_can_be_false_and_undecided(claim):
    false, undecided = BENT[claim]
    assert holds(hand_made_study(change=false))[claim] is False
    assert holds(hand_made_study(change=undecided))[claim] == "undecided"


def test_one_seed_or_none_decides_nothing():
    assert set(holds(hand_made_study(seeds=1)).values()) == {"undecided"}
    nothing = {**hand_made_study(), "runs": []}
    assert set(holds(nothing).values()) == {"undecided"}
    assert {verdicts.deciding(v) for v in verdicts.verdicts(nothing)} == {"not run"}


def test_a_verdict_has_its_numbers_and_says_where_splits_differ():
    verdict = verdicts.verdicts(hand_made_study(change=BENT["beyond10"][0]))[10]
    assert verdict["words"] == "forget20: does not hold, forget30: holds"
    assert verdicts.deciding(verdict) == \
        "forget20 npo+rt: peak log10 forget quality -9 (-9 to -9), needs > -1.3"


@pytest.mark.parametrize("seeds", (2, 3, 5, 10))
def test_a_95_percent_interval_covers_the_true_mean_that_often(seeds):
    samples = np.random.default_rng(1).normal(3.0, 2.0, (1000, seeds))
    covered = [low <= 3.0 <= high for low, high in map(verdicts.interval, samples)]
    assert 0.91 < np.mean(covered) < 0.98
    assert verdicts.interval([2.0] * seeds) == (2.0, 2.0)


def test_fewer_than_five_equal_seeds_decide_nothing():
    for seeds in (2, 3, 4):
        result = verdicts.test("x", [0.3] * seeds, ">", 0.1)
        assert result["holds"] == "undecided" and result["interval"] is None
    for values in ([0.3] * 5, [0.3, 0.31]):
        assert verdicts.test("x", values, ">", 0.1)["holds"] is True


def test_a_share_of_seeds_has_a_binomial_interval():
    """With 0 of n seeds the upper one-sided bound is 1 - 0.05^(1/n), so that a half takes five seeds."""
    def share(*seeds: bool) -> dict:
        return verdicts.test("both", list(seeds), "<", 0.5)
    assert share(*[False] * 4)["interval"] == [0.0, pytest.approx(1 - 0.05 ** (1 / 4))]
    assert share(*[True] * 5)["interval"] == [pytest.approx(0.549, abs=5e-4), 1.0]
    assert share(*[False] * 4)["holds"] == "undecided" and share(*[False] * 5)["holds"] is True
    assert share(*[True] * 5)["holds"] is False and share(True, *[False] * 6)["holds"] == "undecided"
    assert share()["mean"] is None and share(True)["holds"] == "undecided"


def test_the_reported_runs_are_neither_tuning_runs_nor_of_other_settings():
    study = hand_made_study(seeds=3)
    study["runs"] += [hand_made_run("npo+rt", "forget10", *settings) for settings in ((0, 1), (2, 1, 5e-4))]
    assert [run["seed"] for run in verdicts.chosen_runs(study, "forget10", "npo+rt")] == [1, 2, 3]
    zero = verdicts.chosen_runs(study, "forget10", "npo+rt@0")
    assert {(run["method"], run["lr"]) for run in zero} == {("npo", 1e-3)} and len(zero) == 3
    tuned, own = (verdicts.chosen_runs(study, "forget50", name) for name in ("npo+rt@tuned", "npo+rt"))
    assert tuned == own and len(own) == 3


def test_a_start_without_utility_keeps_nothing():
    run = {"model_utility": [0.0, 0.1], "forget_quality_log10": [-9.0, -1.0]}
    assert verdicts.kept_utility(run) == 0.0 and verdicts.best_at_utility(run, 0.5) == -math.inf
    run = {"model_utility": [0.5, 0.2], "forget_quality_log10": [-9.0, -1.0]}
    assert verdicts.best_at_utility(run, 0.5) == -9.0 and pictures.best_later(run) is None


# ---------------------------------------------------------------- the stored studies

YES, NO, OPEN, HALF = "holds", "does not hold", "undecided", "forget05: does not hold, forget10: undecided"
WORDS = {"builtin_tiny": [HALF, HALF, HALF, NO, NO, NO, NO, YES, OPEN, YES, OPEN, OPEN],
         "builtin_tiny_preset": ["forget05: undecided, forget10: holds", HALF, OPEN, NO, NO, NO, NO, YES,
                                 OPEN, YES, YES, "forget50: undecided, forget90: does not hold"]}


@pytest.fixture
def coarse(monkeypatch):
    """Small pictures, which take less time."""
    monkeypatch.setattr(pictures, "DPI", 40)


def test_the_stored_studies_are_drawn_and_judged_as_ever(coarse, tmp_path, capsys):
    """The verdicts are those of the commit that made the runs. The JSON stays as it is, to the byte."""
    for path in STORED.values():
        (tmp_path / "tofu").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "tofu")
    figures_tofu.main(["--draw-only", "--out", str(tmp_path), "--figure", "overview", "retain-weight"])
    assert {path.name for path in (tmp_path / "tofu").glob("*.png")} == {
        f"{name}_{figure}.png" for name in STORED for figure in ("overview", "retain-weight")}
    printed, page = capsys.readouterr().out, (tmp_path / "tofu.md").read_text()
    for name, path in STORED.items():
        assert (tmp_path / "tofu" / path.name).read_bytes() == path.read_bytes()
        judged = verdicts.verdicts(json.loads(path.read_text()))
        assert [v["words"] for v in judged] == WORDS[name]
        for v in judged:
            assert f"{v['claim']}: {v['words']}" in printed and f"| {v['claim']} | {v['words']} |" in page
    assert page == (ROOT / "results" / "tofu.md").read_text()


def test_drawing_needs_no_pytorch():
    code = "import sys, figures_tofu; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_picture_is_drawn_and_drawn_again_to_the_byte(coarse, tmp_path):
    study = json.loads(STORED["builtin_tiny_preset"].read_text())
    drawn = {figure: draw for figure, (*_, draw) in pictures.FIGURES.items() if draw}
    assert len(drawn) == len(pictures.FIGURES) - 1  # Figure 7 is a table
    first = {figure: draw(study, tmp_path / "a.png", pictures.columns_of(study, figure)).read_bytes()
             for figure, draw in drawn.items()}
    assert len(set(first.values())) == len(drawn) and min(map(len, first.values())) > 3000
    again = drawn["attacks"](study, tmp_path / "b.png", pictures.columns_of(study, "attacks")).read_bytes()
    assert again == first["attacks"]
    assert not any(pictures.columns_of({**study, "runs": []}, figure) for figure in pictures.FIGURES)


def test_a_title_says_who_forgets_and_keeps_the_rest():
    study = hand_made_study()
    worse = hand_made_study(change=setting("forget10", "npo+rt", model_utility=[0.6] + [0.4] * 5))
    titles = [pictures.message(pictures.columns_of(*of)) for of in ((study, "overview"), (worse, "overview"))]
    assert titles == [f"{who} forgets and keeps at least 80% of the utility"
                      for who in ("npo+rt", "no method")]
    assert "? forget50: npo+rt tuned; forget90: npo" in pictures.message(pictures.columns_of(study, "9"))


def test_lines_are_means_in_decades_and_names_do_not_overlap(monkeypatch):
    monkeypatch.setattr(pictures, "save", lambda figure, *_: figure)
    study = hand_made_study()
    axes = pictures.draw_evolution(study, Path("x"), pictures.columns_of(study, "6")).axes[4]
    line = axes.get_lines()[6]  # npo+rt, forget10: seeds 1 to 6 add 0.01 each
    assert list(line.get_ydata()) == pytest.approx([-19.965, -5.165, -1.165, -0.665, -0.565, -0.565])
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert len(heights) == 8 and min(np.diff(heights)) > 0.04


def test_single_runs_are_named_by_what_differs():
    runs = json.loads((ROOT / "results" / "smollm2_forget10.json").read_text())["runs"]
    names = pictures.columns_of_single(runs)["forget10"]
    assert {name: len(group) for name, group in names.items()} == {
        "npo+rt": 3, "npo": 1, "ga": 1, "ga+rt retain weight 2": 3, "ga+rt retain weight 10": 2,
        "ga+rt retain weight 1": 2}
    assert len(pictures.columns_of_single(runs, shared=())["forget10"]) == len(runs)


def test_pages_have_a_row_per_run_and_no_beta_where_a_loss_has_none():
    page = pages.page({"builtin_tiny": hand_made_study()})
    for expected in ("| forget10: npo+rt | 6 | 0.001 | 0.1 | 1 |", "| forget10: ga | 6 | 0.002 |  | 0 |",
                     "| npo+rt weight 0 | 6 | 0.001 | 0.1 | 0 |", "| In / Lima. [other fact] |",
                     "| (retrained) | 2 |",
                     "![Figure 5: at each method's peak](tofu/builtin_tiny_figure5.png)"):
        assert expected in page, expected


# ---------------------------------------------------------------- from a plan to records

def planned(capsys, *words) -> list[list[str]]:
    """The command lines that --plan prints, as words."""
    figures_tofu.main([*words, "--plan"])
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]


@pytest.mark.parametrize("choices,lr", [("preset", 1e-3), ("tuned", 1.5e-3)])
def test_a_figures_runs_are_commands_of_train_npo(choices, lr, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = planned(capsys, "--figure", "8", "--methods", "ga", "npo+rt", "--seeds", "2", "--out", "empty",
                       "--choices", choices)
    assert [words[1] for words in commands] == ["train_npo.py"] * 6 and "--beta" not in commands[2]
    parsed = [train_npo.parse(words[2:]) for words in commands]
    assert [(s.method, s.split, s.seed) for s in parsed] == [
        ("sft", "retain90", 1), ("sft", "retain90", 2),
        *((method, "forget10", seed) for method in ("ga", "npo+rt") for seed in (1, 2))]
    assert (parsed[4].lr, parsed[4].beta, parsed[4].eval_every) == (
        lr, 0.5, "5,10,15,20,25,50,75,100")
    assert parsed[4].retain_log == [f"{parsed[0].out}/eval/*.json"]  # figures_tofu.py fills in the name


def test_what_the_json_has_is_not_planned(capsys):
    assert planned(capsys, "--figure", "5", "retain-weight") == []
    assert planned(capsys, "--figure", "2", "8", "9", "--methods", "npo+rt", "--choices", "tuned") == []
    commands = planned(capsys, "--figure", "attacks", "--methods", "ga+rt", "--seeds", "2")
    assert [words[1] for words in commands] == ["train_npo.py", "train_npo.py", "robustness_tofu.py"]
    assert all("seed2" in words[-1] for words in commands)  # the run of seed 1 has its attacks


STUB = """
import pathlib, sys
print(*sys.argv[1:])
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flags.get("--loss") == "ga":
    sys.exit("no room")
for part in ("model", "eval", "checkpoints"):
    pathlib.Path(flags["--out"], part).mkdir(parents=True)
pathlib.Path(flags["--out"], "eval", "step_000005.json").touch()
"""


def test_a_missing_run_is_made_and_a_finished_one_is_not(coarse, tmp_path, monkeypatch):
    """train_npo.py is a stand-in here, which fails for ga."""
    (tmp_path / "train_npo.py").write_text(STUB)
    for folder in ("data/tiny/start", "results/tofu"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    made = hand_made_run("npo", "forget10", 1, 0) | {"beta": 0.5}
    monkeypatch.setattr(figures_tofu, "ROOT", tmp_path)
    monkeypatch.setattr(figures_tofu, "record", lambda folder: made | (
        {"split": "retain90"} if folder.name.startswith("retain") else {}))
    monkeypatch.chdir(tmp_path)
    command, folder = ["--figure", "8", "--seeds", "1", "--out", "my"], Path("runs/tofu/builtin_tiny_preset")
    with pytest.raises(InputError, match="1 runs failed: .*_ga_weight0.*seed1.log: no room"):
        figures_tofu.main([*command, "--methods", "ga", "npo"])
    assert [path.parent.name for path in sorted(folder.glob("*/model"))] == [
        "forget10_npo_weight0_lr0.001_beta0.5_seed1", "retain90_seed1"]
    log = (folder / "forget10_npo_weight0_lr0.001_beta0.5_seed1.log").read_text()
    assert f"--retain-log {folder}/retain90_seed1/eval/step_000005.json" in log
    assert not list(folder.glob("*/checkpoints"))
    study = json.loads(Path("my/tofu/builtin_tiny_preset.json").read_text())
    assert len(study["runs"]) == len(study["retrained"]) == 1 and study["choices_from"] == "preset"
    (tmp_path / "train_npo.py").write_text("raise SystemExit('called')")
    figures_tofu.main([*command, "--methods", "npo"])
    Path("my/tofu/builtin_tiny_preset.json").unlink()  # the finished run is in its folder
    figures_tofu.main([*command, "--methods", "npo"])
    assert json.loads(Path("my/tofu/builtin_tiny_preset.json").read_text())["runs"] == study["runs"]


@pytest.mark.parametrize("seed", [1, 2])  # seed 1 is stored, and would get another run's attacks
def test_runs_from_another_start_are_not_mixed_with_stored_ones(seed, tmp_path, monkeypatch):
    study = {"runs": [hand_made_run("npo", "forget10", 1, 0)], "retrained": []}
    run = hand_made_run("npo", "forget10", seed, 0) | {"start_weights": "other"}
    (tmp_path / figures_tofu.name_of(run) / "model").mkdir(parents=True)
    monkeypatch.setattr(figures_tofu, "record", lambda folder: run)
    with pytest.raises(InputError, match="different weights .*another --out"):
        figures_tofu.add_records(study, [{}, {}, {tmp_path / figures_tofu.name_of(run): []}, {}])


@pytest.mark.parametrize("flags,sentence", [
    ("--collect runs/a", "needs --out FILE.json"), ("--out new.json", "needs --collect"),
    ("--draw-only --out nowhere", "no such study"), ("--methods kto --out new", "no such study")])
def test_commands_without_a_study_are_refused(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence):
        figures_tofu.main(flags.split())


def test_what_attacks_measured_is_kept_with_the_run(tmp_path):
    states = [{"what": "before", "extraction_strength": 0.123456},
              {"what": "forget 100%", "step": 1, "extraction_strength": 0.2},
              {"what": "forget 100%", "step": 2, "extraction_strength": 0.4}]
    sampled = [states[0], {"what": "sampled", "leak": {"1": 0.25}, "rows": 4}]
    path = tmp_path / "robustness.json"
    path.write_text(json.dumps({"attacks": {"relearn": {"model": {"states": states}},
                                            "sample": {"model": {"states": sampled}}}}))
    assert records.attacks(path) == {"model": {"before": 0.12346, "forget 100%": 0.4, "leak": {"1": 0.25}}}


def test_single_runs_are_collected_from_their_folders(coarse, run, retain_log, tmp_path):
    folder = run(f"--loss npo --retain-weight 1 --eval-every 3 --retain-log {retain_log}")
    model = run("--loss sft --split retain90 --eval-every end", out="retrained")
    figures_tofu.main(["--collect", str(folder), str(model), "--out", str(tmp_path / "single.json")])
    study = json.loads((tmp_path / "single.json").read_text())
    [entry], [retrained] = study["runs"], study["retrained"]
    assert entry["method"] == "npo+rt" and retrained["method"] == "sft" and entry["steps"] == [0, 3, 5]
    metrics = json.loads((folder / "eval" / "step_000005.json").read_text())["metrics"]
    assert entry["model_utility"][2] == pytest.approx(metrics["model_utility"], rel=1e-4)
    assert entry["forget_extraction_strength"][2] == pytest.approx(
        metrics["forget"]["extraction_strength"], abs=1e-4)
    assert entry["answers"]["retain"]["answers"] == 20 and len(entry["samples"]) == 3
    assert sum(entry["answers"]["forget"][kind] for kind in records.KINDS) == 20
    page = (tmp_path / "single.md").read_text()
    assert "| npo+rt | 1 | 0.001 | 0.1 | 1 |" in page and (tmp_path / "single.png").exists()
    fewer = shutil.copytree(folder, tmp_path / "fewer")
    (fewer / "eval" / "step_000003.json").unlink()
    with pytest.raises(InputError, match="--eval-every"):
        figures_tofu.main(["--collect", str(folder), str(fewer), "--out", str(tmp_path / "two.json")])
    assert not (tmp_path / "two.json").exists()
    path = folder / "eval" / "step_000000.json"
    unjudged = path.read_text().replace('"forget_quality_log10": ', '"forget_quality_log10": null, "x": ')
    path.write_text(unjudged)
    with pytest.raises(InputError, match="--retain-log"):
        records.record(folder)
    with pytest.raises(InputError, match="no finished run"):
        records.record(tmp_path)


@pytest.mark.slow
def test_a_figure_of_other_data_from_plan_to_page(command, small_data, tmp_path):
    words = ["figures_tofu.py", "--data", small_data, "--figure", "8", "--methods", "npo+rt", "--seeds", "1",
             "--out", "my"]
    assert [line.split()[1] for line in command(*words, "--plan").stdout.splitlines()] == [
        "data/make_tiny.py", "train_npo.py", "train_npo.py"]
    command(*words, timeout=1200)
    study = json.loads((tmp_path / "my" / "tofu" / f"{small_data.name}_tiny_preset.json").read_text())
    assert len(study["runs"]) == len(study["retrained"]) == 1
    assert "Figure 8" in (tmp_path / "my" / "tofu.md").read_text()
