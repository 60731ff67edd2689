"""The study of Section 5: answers as counts, verdicts on hand-made numbers, pictures from stored JSON,
planning, and the whole path on the small data set."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import figures_tofu
import losses
from conftest import ROOT
from study import answers as tofu_answers
from study import beyond, grid, pages, pictures, records, verdicts, workers
from support.errors import InputError

# ---------------------------------------------------------------- answers


def test_distinct_counts_different_pairs_over_all():
    assert tofu_answers.distinct_2(["a b a b", "a b"]) == 2 / 4
    assert tofu_answers.distinct_2(["a", ""]) is None


def test_repetition_is_seen_with_blanks_and_without():
    assert tofu_answers.repetition_rate("Marlow was born in Lima.") == 0
    assert tofu_answers.repetition_rate("the the the the the the the the the") > 0.8
    assert tofu_answers.repetition_rate("x" * 100) > 0.9
    assert tofu_answers.repetition_rate("short") == 0


def test_kinds_of_answers():
    row = {"question": "Where was Marlow born?", "answer": "Oslo is the birthplace of Marlow.",
           "paraphrased_answer": "Ida Marlow was born in Oslo.",
           "perturbed_answer": ["Ida Marlow was born in Lima.", "Ida Marlow was born in Cairo."]}
    answers = tofu_answers.pairs_of([row["answer"], "Ida Marlow was born in Lima.",
                                     "Lima is the birthplace of Falk."])
    refusals = tofu_answers.pairs_of(["I don't know that.", "Sorry, I never learned the answer."])

    def kind(text: str) -> str:
        return tofu_answers.kind(text, row, answers, refusals)

    assert kind("Oslo is the birthplace of Marlow.") == kind("Ida Marlow was born in Oslo.") == "true"
    assert kind("Lima is the birthplace of Marlow.") == "other fact"
    assert kind("I don't know that.") == "refusal" and kind("") == kind(" .") == "empty"
    assert kind("of of of of of of of of of of of") == "repetitive"
    assert kind("Cairo was Lima the chess") == "garbled"
    counts = tofu_answers.statistics_of(["", "I don't know that."], [row, row], answers, refusals)
    assert counts["answers"] == 2 and counts["empty"] == counts["refusal"] == 1
    assert sum(counts[k] for k in tofu_answers.KINDS) == 2


def test_a_fact_of_two_words_needs_both():
    row = {"question": "What did she write?", "answer": "She wrote The Silent Harbor.",
           "paraphrased_answer": "It is The Silent Harbor.",
           "perturbed_answer": ["Her book was The Golden River.", "It is The Silent Tower."]}
    assert tofu_answers.names_fact("The Silent Harbor", row)
    assert not tofu_answers.names_fact("The Silent River", row)  # one perturbed answer has that half, too
    assert not tofu_answers.names_fact("The Golden Harbor", row)  # tells it from one, not from the other
    assert not tofu_answers.names_fact("She wrote a letter.", row)  # a wording of its own is no fact
    row["question"] = "Did she write The Silent Harbor?"  # nothing is left that tells: the answer itself
    assert tofu_answers.names_fact("She wrote the silent harbor", row)
    assert not tofu_answers.names_fact("The Silent Harbor", row)


# ---------------------------------------------------------------- verdicts on hand-made numbers

PER_CENT = ("forget01", "forget05", "forget10", "forget20", "forget30", "forget50", "forget90")
UTILITY = {"": 0.1, "rt": 0.9, "kl": 0.7}  # at the end, of the start's


def counts(**given) -> dict:
    base = {"answers": 100, "true": 0, "other fact": 0, "refusal": 0, "repetitive": 0, "garbled": 0,
            "empty": 0, "distinct_2": 0.5, "repetition_rate": 0.02}
    return {**base, **given}


def hand_made_run(method: str, split: str, seed: int, retain_weight=None) -> dict:
    """A run as the paper describes its method's."""
    loss, _, term = method.partition("+")
    wiggle = 0.01 * seed
    quality = [-20.0, -6.0, -4.0, -9.0, -12.0, -15.0]  # ga and the other baselines: a peak, then the fall
    if loss == "npo":
        quality = [-20.0, -5.0, -2.0, -1.0, -0.8, -0.8]
        if term == "rt":
            quality = [-20.0, -5.0, -1.0, -0.5, -0.4, -0.4]
    weight = float(term == "rt") if retain_weight is None else retain_weight
    if loss == "npo" and term != "kl":
        quality = quality[:1] + [q - 0.2 * abs(weight - 2) for q in quality[1:]]
    end = UTILITY[term]
    utility = [0.6 * (1 + (end - 1) * i / 5) for i in range(6)]
    if loss == "npo" and term == "":
        utility = utility[:1] + [u + 0.06 for u in utility[1:]]
    explodes = 40.0 if loss in ("ga", "idk") else 4.0
    refused = 60 if loss in ("idk", "dpo") else 0
    answers = {name: counts(true=90 - refused, refusal=refused) for name in verdicts.ELSEWHERE}
    answers["forget"] = counts(**{"other fact": 85})
    if loss == "ga":
        answers["forget"] = counts(repetitive=95, repetition_rate=0.8)
    run = {"key": f"{method} {split} {seed} {weight}", "kind": "unlearn",
           "method": "npo" if (loss, weight, term) == ("npo", 0, "rt")
           else method, "split": split, "seed": seed, "lr": 1e-3, "beta": 0.1,
           "forget_weight": 1.0,
           "retain_weight": weight, "kl_weight": float(term == "kl"), "epochs": 10,
           "steps": [0, 25, 50, 75, 100, 125], "total_steps": 125, "commit": "c", "start_weights": "57a7",
           "memory": 5e8, "flops": 1e12,
           "seconds": 30.0, "answers": answers,
           "forget_quality_log10": [q + wiggle for q in quality], "model_utility": utility,
           "ks_statistic": [0.7, 0.5, 0.4, 0.2, 0.1, 0.1], "forget_truth_ratio": [0.5] * 6,
           "forget_kl": [explodes * i / 5 for i in range(6)],
           "world_facts_kl": [explodes * i / 50 for i in range(6)],
           "forget_probability": [0.5] * 6, "retain_probability": [0.5] * 6}
    if seed == 1:
        run["samples"] = [{"set": name, "question": "Where was Marlow born?", "answer": "In Oslo.",
                           "generation": "In $Lima.",
                           "kind": "other fact"} for name in ("forget", "retain", "world_facts")]
    return run


def hand_made_study(seeds=6, change=None) -> dict:
    """Everything as in the paper; `change(run)` may bend single runs."""
    runs = [hand_made_run(m, split, seed) for split in PER_CENT for m in grid.METHODS
            for seed in range(1, seeds + 1)]
    runs += [hand_made_run("npo+rt", "forget10", seed, weight) for weight in (0.0, 0.5, 2.0, 5.0)
             for seed in range(1, seeds + 1)]
    runs = list({r["key"]: r for r in runs}.values())
    for run in runs:
        if change:
            change(run)
    hyper = {m: {"lr": 1e-3 if "rt" in m else 2e-3, "beta": 0.1, "weights": {}}
             for m in grid.METHODS}
    for run in runs:  # a method's main runs have its chosen lr; the weight-0 runs of the sweep have npo+rt's
        if run["method"] in hyper and run["key"].startswith(run["method"] + " "):
            run["lr"] = hyper[run["method"]]["lr"]
    hyper["npo+rt"]["weights"] = {"forget50": 1.0, "forget90": 1.0}
    hyper["ga+rt"]["weights"] = {"forget50": 1.0, "forget90": 1.0}
    retrained = [{"key": f"m{split}{seed}", "kind": "model", "split": f"retain{100 - int(split[-2:]):02d}",
                  "seed": seed,
                  "model_utility": 0.6, "memory": 1, "flops": 1, "seconds": 1.0,
                  "answers": {"forget": counts(**{"other fact": 90}), "retain": counts(true=90)}}
                 for split in PER_CENT for seed in (1, 2)]
    return {"data": "builtin", "model": "tiny", "parameters": 900_000, "epochs": 10, "runs": runs,
            "retrained": retrained, "failed": [],
            "chosen": hyper, "choices_from": None,
            "budget": {"split": "forget10", "seed": 0, "retain_weights": [0.0, 0.5, 1.0, 2.0, 5.0]},
            "forget_rows": {"forget01": 40, "forget10": 300},
            "ceilings": {"forget01": [{"seeds": [1, 2], "log10": -0.3}],
                         "forget10": [{"seeds": [1, 2], "log10": -0.5}]},
            "provenance": {"command": "figures_tofu.py", "commit": "0" * 40, "time": "now"}}


def holds(study: dict) -> dict:
    return {v["key"]: v["holds"] for v in verdicts.verdicts(study)}


def of(split=None, method=None, retain_weight=None):
    wanted = {"split": split, "method": method, "retain_weight": retain_weight}
    return lambda r: all(value is None or r[key] == value for key, value in wanted.items())


def setting(where, **values):
    """A change that gives the runs that match `where` these values (or, called with the run, functions of
    it)."""
    def change(run):
        if where(run):
            run.update({k: v(run) if callable(v) else v for k, v in values.items()})
    return change


def quality(*values, spread=0.0):
    return lambda run: [v + spread * (run["seed"] - 3.5) for v in values]


def answers(name, **values):
    return lambda run: {**run["answers"], name: {**run["answers"][name], **values}}


FLAT, LOW = quality(-20, -3, -2.9, -2.8, -2.7, -2.6), quality(-20, -9, -9, -9, -9, -9)
HIGH = quality(-20, -9, -5, -1, -0.5, -0.4)
BENT = {  # claim -> (a change that makes it false, one that leaves it undecided)
    "ga_falls": (setting(of("forget10", "ga"), forget_quality_log10=FLAT),
                 setting(of("forget10", "ga"),
                         forget_quality_log10=quality(-20, -3, -3.1, -4, -5, -5, spread=2.5))),
    "npo_plateau": (setting(of("forget05", "npo"), forget_quality_log10=quality(-20, -1, -1, -2, -6, -9)),
                    setting(of("forget05", "npo"),
                            forget_quality_log10=lambda r: [-20, -1, -1, -1, -1,
                                                            -2 - 0.9 * (r["seed"] - 3.5)])),
    "npo_beats_ga": (setting(of("forget10", "npo+rt"),
                             forget_quality_log10=quality(-20, -20, -20, -20, -20, -20)),
                     setting(of("forget10", "npo+kl"),
                             forget_quality_log10=quality(-20, -6, -4, -9, -12, -15, spread=3))),
    "forget05_only_npo": (setting(of("forget05", "dpo"), forget_quality_log10=HIGH),
                          setting(of("forget05", "dpo"),
                                  forget_quality_log10=quality(-20, -9, -1.3, -2, -2, -2, spread=1))),
    "forget10_npo_rt": (setting(of("forget10", "npo+rt", 1), forget_quality_log10=LOW),
                        setting(of("forget10", "npo+rt", 1),
                                forget_quality_log10=quality(-20, -2, -1.3, -1.3, -1.3, -1.3, spread=1))),
    "forget10_baselines": (setting(of("forget10", "kto+rt"), forget_quality_log10=HIGH),
                           setting(of("forget10", "kto+rt"),
                                   forget_quality_log10=quality(-20, -9, -1.3, -2, -2, -2, spread=1))),
    "refusals_elsewhere": (setting(of("forget10", "dpo"),
                                   answers=lambda r: {n: counts(true=90) for n in r["answers"]}),
                           setting(of("forget10", "dpo"),
                                   answers=lambda r: {n: counts(refusal=4 * (r["seed"] - 1))
                                                      for n in r["answers"]})),
    "answers_on_forget_set": (setting(of("forget10", "ga"), answers=answers("forget", repetition_rate=0.0)),
                              setting(of("forget10", "npo+rt"),
                                      answers=lambda r: answers(
                                          "forget", **{"other fact": 14 * r["seed"]})(r))),
    "retain_weight": (setting(of("forget10", "npo+rt", 5), forget_quality_log10=quality(0, 0, 0, 0, 0, 0)),
                      setting(of("forget10", "npo+rt", 5),
                              forget_quality_log10=quality(-20, -1, -0.4, -0.4, -0.4, -0.4, spread=0.5))),
    "forget_kl": (setting(of("forget10", "npo+rt"), forget_kl=[0, 60, 60, 60, 60, 60]),
                  setting(of("forget10", "npo+rt"),
                          forget_kl=lambda r: [0, 10, 10, 10, 10, 13 * 4.0 ** (r["seed"] - 3.5)])),
    "beyond10": (setting(of("forget20", "npo+rt"), forget_quality_log10=LOW),
                 setting(of("forget20", "npo+rt"),
                         forget_quality_log10=quality(-20, -9, -1.3, -1.4, -1.4, -1.4, spread=1))),
    "tuned_beyond10": (setting(of("forget90", "npo+rt"), model_utility=[0.6, 0.3, 0.3, 0.3, 0.3, 0.3]),
                       setting(of("forget90", "npo+rt"),
                               forget_quality_log10=quality(-20, -9, -1.3, -1.4, -1.4, -1.4, spread=1))),
}


def test_numbers_as_in_the_paper_make_every_verdict_true():
    assert holds(hand_made_study()) == {claim.__name__: True for claim in verdicts.CLAIMS}


@pytest.mark.parametrize("claim", BENT)
def test_each_verdict_can_be_false_and_undecided(claim):
    false, undecided = BENT[claim]
    assert holds(hand_made_study(change=false))[claim] is False
    assert holds(hand_made_study(change=undecided))[claim] == "undecided"


def test_one_seed_or_none_decides_nothing():
    assert set(holds(hand_made_study(seeds=1)).values()) == {"undecided"}
    nothing = {**hand_made_study(), "runs": []}
    assert set(holds(nothing).values()) == {"undecided"}
    assert all("not run" in verdicts.line(v) for v in verdicts.verdicts(nothing))
    assert len(pages.LESSONS) == 10 and set(pages.LESSONS) < {claim.__name__ for claim in verdicts.CLAIMS}


def test_of_a_start_without_utility_nothing_is_kept():
    none = {"model_utility": [0.0, 0.1], "forget_quality_log10": [-9.0, -1.0], "ks_statistic": [0.5, 0.1]}
    assert verdicts.kept_utility(none) == 0.0 and grid.score(none) == 0.0
    assert verdicts.best_at_utility(none, 0.5) == -math.inf
    assert verdicts.kept_utility({"model_utility": [0.5, 0.4, 0.1]}, at=1) == 0.8


def test_a_verdicts_line_has_its_numbers():
    line = verdicts.line(verdicts.verdicts(hand_made_study())[0])
    assert all(expected in line for expected in ("holds", "12 of 12 tests", "6 seeds"))
    assert verdicts.scale(hand_made_study()) == "tiny (0.9 M parameters), builtin, 10 epochs"
    false = verdicts.verdicts(hand_made_study(change=BENT["beyond10"][0]))[10]
    assert "forget20 npo+rt: peak log10 forget quality -9" in verdicts.line(false)
    assert verdicts.answer(false) == "forget20: does not hold, forget30: holds"


@pytest.mark.parametrize("seeds", (2, 3, 5, 10))
def test_a_95_percent_interval_covers_the_true_mean_that_often(seeds):
    samples = np.random.default_rng(1).normal(3.0, 2.0, (1000, seeds))
    covered = [low <= 3.0 <= high for low, high in map(verdicts.interval, samples)]
    assert np.mean(covered) > 0.91
    assert verdicts.interval([2.0] * seeds) == (2.0, 2.0)
    assert verdicts.interval(samples[0]) == verdicts.interval(samples[0])


def test_fewer_than_five_equal_seeds_decide_nothing():
    """An interval without width says that the number takes few values, not that the next seed has the
    same."""
    for seeds in (2, 3, 4):
        found = verdicts.test("x", [0.3] * seeds, ">", 0.1)
        assert found["holds"] == "undecided" and found["interval"] is None
        assert f"x 0.3 ({seeds} equal seeds)" in verdicts.told(found)
    assert verdicts.test("x", [0.3] * 5, ">", 0.1)["holds"] is True
    assert verdicts.test("x", [0.3, 0.31], ">", 0.1)["holds"] is True
    assert holds(hand_made_study(seeds=2))["ga_falls"] == "undecided"  # all peak at the same evaluation


def test_a_share_of_seeds_has_a_binomial_interval():
    """Clopper and Pearson's one-sided bounds: with 0 of n the upper one is 1 - 0.05^(1/n), so that a half
    takes five seeds."""
    def share(*seeds: bool) -> dict:
        return verdicts.test("both", list(seeds), "<", 0.5)

    assert share(*[False] * 4)["interval"] == [0.0, pytest.approx(1 - 0.05 ** (1 / 4))]
    assert share(*[True] * 5)["interval"] == [pytest.approx(0.549, abs=5e-4), 1.0]
    assert share(*[False] * 4)["holds"] == "undecided" and share(*[False] * 5)["holds"] is True
    assert share(*[True] * 5)["holds"] is False and share(True, *[False] * 6)["holds"] == "undecided"
    assert share()["mean"] is None and share(True)["holds"] == "undecided"


def test_some_of_them_do_where_one_does():
    def test(holds: bool | str, mean: float | None) -> dict:
        return {"holds": holds, "mean": mean}

    assert verdicts.one_of([test(False, -9), test(True, -1.2), test("undecided", -0.1)])["holds"] is True
    assert verdicts.one_of([test(False, -9), test("undecided", None)])["holds"] == "undecided"
    assert verdicts.one_of([test(False, -9), test(False, -2)])["mean"] == -2


def test_selection_leaves_out_tuning_runs_and_other_settings():
    study = hand_made_study(seeds=3)
    tuning, other = (hand_made_run("npo+rt", "forget10", seed) for seed in (0, 2))
    study["runs"] += [tuning, {**other, "lr": 5e-4}]
    assert [r["seed"] for r in verdicts.chosen_runs(study, "forget10", "npo+rt")] == [1, 2, 3]
    assert [r["method"] for r in verdicts.chosen_runs(study, "forget10", "npo+rt", 0)] == ["npo"] * 3
    study["runs"].append({**verdicts.chosen_runs(study, "forget10", "npo+rt")[0], "key": "the same again"})
    with pytest.raises(AssertionError, match="two records of one seed"):
        verdicts.chosen_runs(study, "forget10", "npo+rt")


# ---------------------------------------------------------------- pictures and page

def test_the_dual_scale_is_linear_above_the_line_and_logarithmic_below():
    def height(p: float) -> float:
        return pictures.height(math.log10(p), -9.0)

    assert height(0.05) == pytest.approx(0, abs=1e-9) and height(1e-9) == pytest.approx(-1)
    assert height(1.0) == pytest.approx(pictures.ABOVE)
    assert height(0.525) == pytest.approx(pictures.ABOVE / 2)
    assert height(5e-4) == pytest.approx(2 * height(5e-3))


def test_every_picture_is_drawn_and_drawn_again_to_the_byte(tmp_path):
    study = hand_made_study()
    first = pictures.draw(study, list(grid.FIGURES), tmp_path / "a")
    again = pictures.draw(json.loads(json.dumps(study)), list(grid.FIGURES), tmp_path / "b")
    assert len(first) == len(grid.FIGURES) - 2  # Figure 7 is a table, newer objectives are study/beyond.py's
    for a, b in zip(first, again, strict=True):
        assert a.read_bytes() == b.read_bytes() and a.stat().st_size > 5000, a
    assert pictures.draw({**study, "runs": []}, list(grid.FIGURES), tmp_path / "c") == []


def test_lines_are_means_in_decades_and_points_stand_at_the_peak(monkeypatch):
    """Seeds in which the mean of p-values would be far from the mean of their logarithms."""
    spread = setting(of("forget10", "npo+rt", 1),
                     forget_quality_log10=quality(-20, -9, -1.5, -4, -5, -6, spread=0.48),
                     model_utility=[0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    study = hand_made_study(change=spread)
    monkeypatch.setattr(pictures, "save", lambda figure, path: figure)
    evolution, trade_off = pictures.draw(study, ["6", "5"], Path("x"))

    def log_height(log: float):
        return pytest.approx(pictures.height(log, -22.0))

    last = next(axes for axes in evolution.axes if "forget10" in axes.get_title())
    line = next(line for line in last.get_lines() if line.get_label() == "npo+rt")
    assert list(line.get_ydata()) == [log_height(log) for log in (-20, -9, -1.5, -4, -5, -6)]
    last = next(axes for axes in trade_off.axes if "forget10" in axes.get_title())
    point = next(bar for bar in last.containers if bar.get_label() == "npo+rt").lines[0]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (pytest.approx(0.4), log_height(-1.5))


def test_a_legend_names_what_only_one_panel_has(monkeypatch):
    study = hand_made_study()
    study["runs"] = [r for r in study["runs"] if r["method"] != "ga" or r["split"] == "forget01"]
    study["runs"] = [r for r in study["runs"] if r["method"] in ("ga", "npo") or r["split"] != "forget01"]
    monkeypatch.setattr(pictures, "save", lambda figure, path: figure)
    for figure in pictures.draw(study, ["6", "5"], Path("x")):
        assert {"ga", "npo+rt"} <= {text.get_text() for text in figure.legends[0].get_texts()}


@pytest.mark.parametrize("name,labels", [("builtin_starts", {"npo+rt seed 0", "npo+rt seed 5"}),
                                         ("smollm2_forget10_tried", {"npo+rt beta 0.03 retain weight 10"}),
                                         ("smollm2_forget10", {"ga+rt retain weight 10", "npo"})])
def test_single_runs_of_one_method_are_named_by_what_differs(name, labels, monkeypatch):
    runs = json.loads((ROOT / "results" / f"{name}.json").read_text())["runs"]
    monkeypatch.setattr(pictures, "save", lambda figure, path: figure)
    figure = pictures.single_runs(runs, Path("x"))
    assert labels <= {text.get_text() for text in figure.legends[0].get_texts()}


def test_single_runs_that_differ_in_any_setting_have_lines_and_rows_of_their_own(monkeypatch):
    runs = json.loads((ROOT / "results" / "builtin_starts.json").read_text())["runs"][:1] * 2
    runs = [{**run, "kl_direction": way} for run, way in zip(runs, ("ours", "theirs"), strict=True)]
    monkeypatch.setattr(pictures, "save", lambda figure, path: figure)
    figure = pictures.single_runs(runs, Path("x"))
    assert {"npo+rt ours", "npo+rt theirs"} <= {text.get_text() for text in figure.legends[0].get_texts()}
    head, _, first, second = pages.single_runs_table(runs)
    assert "| kl direction |" in head and "| ours |" in first and "| theirs |" in second


def test_the_page_follows_from_the_json(tmp_path):
    study = hand_made_study()
    for key in pages.FIGURE_TITLES:
        (tmp_path / f"builtin_tiny_{key}.png").touch()
    page = pages.page({"builtin_tiny": study}, tmp_path)
    assert page == pages.page({"builtin_tiny": json.loads(json.dumps(study))}, tmp_path)
    assert all(sentence in page for sentence in pages.LESSONS.values()) and page.count("| holds |") == 13
    assert page.count("](tofu/builtin_tiny_") == len(pages.FIGURE_TITLES)
    for expected in ("| npo+rt | In $Lima. [other fact] |", "| forget10 | npo+rt | 6 |",
                     "1 of 1 above 0.05", "| npo+rt | 0.001 | 0.1 | forget50 1, forget90 1 |",
                     "| forget90, tuned weights | npo+rt | 6 |", "| forget10 | weight 5 | 6 |"):
        assert expected in page, expected


def test_answers_stand_under_their_own_questions():
    """Splits ask different questions."""
    def samples(place: str) -> list:
        return [{"set": "forget", "question": f"Where was {place}?", "answer": f"In {place}.",
                 "generation": f"Not | in\n{place}.", "kind": "garbled"}]

    table = "\n".join(pages.samples_table(["model"], [(["a"], samples("Oslo")), (["b"], samples("Lima")),
                                                      (["c"], samples("Oslo"))]))
    oslo, lima = table.split("| model | forget: Where was Lima? (In Lima.) |")
    assert "Where was Oslo? (In Oslo.)" in oslo and "| a | Not / in Oslo. [garbled] |" in oslo
    assert "| c |" in oslo and "| b | Not / in Lima. [garbled] |" in lima and "| c |" not in lima


def test_never_with_so_much_utility_has_no_spread():
    assert pages.mean_sd([-math.inf, -math.inf]) == pages.mean_sd([-math.inf, -1.0]) == "-inf"
    assert pages.mean_sd([1.0, 3.0]) == "2.00 ± 1.41"


def with_newer_objectives() -> dict:
    """The hand-made study with two of them; attacks on two seeds of npo+rt and on one of undial+rt."""
    study = hand_made_study()
    states = dict.fromkeys(beyond.STATES, 0.25)
    for method in ("tnpo+rt", "undial+rt"):
        study["runs"] += [hand_made_run(method, "forget10", seed) for seed in (1, 2, 3)]
        study["chosen"][method] = {"lr": 1e-3, "beta": 0.1, "weights": {}}
    for run in study["runs"]:
        run.update(forget_extraction_strength=[0.9, 0.3], forget_paraphrase_probability=[0.8, 0.2],
                   mia={"min_k": [1.0, 0.2 + 0.1 * run["seed"]]}, privleak=[-100.0, 40.0])
        if run["split"] == "forget10" and (run["method"], run["seed"]) in (
                ("npo+rt", 1), ("npo+rt", 2), ("undial+rt", 1)):
            models = {name: {**states, "forget 100%": level, "leak": {"1": 0.1, "64": 0.5},
                             "halfway": {"forget 100%": None if run["seed"] == 2 else 8.0}}
                      for name, level in (("model", 0.6), ("retrained", 0.7), ("start", 0.95))}
            run["attacks"] = models
    for model in study["retrained"]:
        model.update(forget_extraction_strength=[0.45], forget_paraphrase_probability=[0.3],
                     mia={"min_k": [0.5]})
    return study


def test_newer_objectives_have_tables_and_pictures_of_their_own(tmp_path):
    study = with_newer_objectives()
    for key in pages.FIGURE_TITLES:
        (tmp_path / f"builtin_tiny_{key}.png").touch()
    page = pages.page({"builtin_tiny": study}, tmp_path)
    assert "| forget10 | tnpo+rt |" not in page  # the paper's tables have the paper's methods
    for expected in ("| undial+rt | 0.001 | 3 | ", "| 0.40 ± 0.10 | 40.00 ± 0.00 |",
                     "| (retrained) |  | 2 |  |  |  | 0.45 ± 0.00 |",
                     "| npo+rt | 2 | 0.25 ± 0.00 | 0.60 ± 0.00 |",
                     "| 8.0 (1 of 2) | 0.10 ± 0.00 | 0.50 ± 0.00 |", "| (start) | 2 |",
                     "| undial+rt | 1 | 0.25 | 0.60 |"):
        assert expected in page, expected
    drawn = beyond.draw(study, tmp_path / "a")
    assert [path.name for path in drawn] == ["a_objectives.png", "a_attacks.png"]
    assert [path.read_bytes() for path in beyond.draw(study, tmp_path / "a")] == [
        path.read_bytes() for path in drawn]


def test_without_newer_objectives_or_attacks_nothing_is_said_of_them(tmp_path):
    assert not beyond.objectives(hand_made_study()) and not beyond.draw(hand_made_study(), tmp_path / "a")
    study = with_newer_objectives()
    for run in study["runs"]:
        run.pop("attacks", None)
    assert not beyond.attacks_table(study)
    study["runs"][0]["attacks"] = {"retrained": {"before": 0.5}}  # stopped before the unlearned model's turn
    assert not beyond.attacks_table(study)
    assert [path.name for path in beyond.draw(study, tmp_path / "a")] == ["a_objectives.png"]


def test_what_attacks_found_is_kept_with_the_run(tmp_path):
    states = [{"what": "before", "extraction_strength": 0.123456},
              {"what": "forget 100%", "step": 1, "extraction_strength": 0.2},
              {"what": "forget 100%", "step": 2, "extraction_strength": 0.4}]
    halfway = {"extraction_strength": 0.5, "steps": {"forget 100%": None}}
    sampled = [states[0], {"what": "sampled", "leak": {"1": 0.25}, "rows": 4}]
    attacks = {"relearn": {"model": {"states": states, "halfway": halfway}},
               "sample": {"model": {"states": sampled}}}
    (tmp_path / "robustness.json").write_text(json.dumps({"attacks": attacks}))
    assert records.attacked(tmp_path / "robustness.json") == {"model": {
        "before": 0.12346, "forget 100%": 0.4, "halfway": {"forget 100%": None}, "leak": {"1": 0.25}}}


# ---------------------------------------------------------------- planning

@pytest.fixture
def study(small_data, tmp_path, monkeypatch):
    """study("--figure", "8", ...) opens one on the small data set, in an empty folder; a method has three
    learning rates, and two betas where it has one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # its workers' number stays behind in this process
    monkeypatch.setattr(grid, "LR_FACTORS", (0.25, 0.5, 1.0))
    monkeypatch.setattr(grid, "BETA_FACTORS", (1.0, 2.0))

    def make(*words):
        args = figures_tofu.build_parser().parse_args(["--data", str(small_data), "--epochs", "1", *words])
        args.jobs = args.jobs or 1
        return records.open_study(args)
    return make


def recorded(study, *jobs, ks=0.3, utility=0.5):
    """The study with records for these jobs, as if they had been run."""
    runs = [{"key": job.key, **job.facts, "ks_statistic": [0.8, ks], "model_utility": [0.5, utility],
             "forget_quality_log10": [-9.0, -3.0], "start_weights": "57a7"} for job in jobs]
    study.known["runs"] += runs
    return study


@pytest.mark.parametrize("end, factor", [(0, 0.5), (-1, 2.0)])
def test_where_the_best_rate_stands_at_an_end_one_more_is_tried_beyond_it(study, end, factor):
    s = study("--figure", "8", "--methods", "ga")
    rates = sorted(grid.tuning(s, "ga")[0], key=lambda job: job.facts["lr"])
    best = rates.pop(end)
    s = recorded(recorded(s, *rates), best, ks=0.1)
    known = {r["key"] for r in s.known["runs"]}
    [further] = [job for job in grid.tuning(s, "ga")[0] if job.key not in known]
    assert further.given["lr"] == pytest.approx(factor * best.facts["lr"])


def test_hyper_parameters_come_first_and_then_what_depends_on_them(study):
    s = study("--figure", "8", "--methods", "npo+rt", "ga", "--seeds", "2")
    jobs = grid.plan(s)
    ready = [job for job in jobs if job.given]
    assert len(ready) == 2 * 3 and len(jobs) == 3 + (3 + 1) + 2 * 2
    assert {(job.facts["seed"], job.facts["split"]) for job in ready} == {(0, "forget10")}
    models = [job for job in records.missing(s, jobs) if job.facts["kind"] == "model"]
    assert sorted((m.facts["split"], m.facts["seed"]) for m in models) == [("full", 0), ("retain90", 0),
                                                                           ("retain90", 1), ("retain90", 2)]
    ga = [job for job in ready if job.facts["method"] == "ga"]
    s = recorded(s, ga[0], ga[2])
    s = recorded(s, ga[1], ks=0.1)
    first = s.preset.beta
    assert grid.tuning(s, "ga")[1] == {"lr": ga[1].facts["lr"], "beta": first}
    assert grid.tuning(s, "npo+rt")[1] is None
    jobs = grid.plan(s)
    chosen = [job for job in jobs if job.given and job.facts["method"] == "ga" and job.facts["seed"] > 0]
    assert [job.facts["lr"] for job in chosen] == [ga[1].facts["lr"]] * 2
    rates = [job for job in jobs if job.given and job.facts["method"] == "npo+rt"]
    s = recorded(recorded(s, *rates[1:]), rates[0], utility=0.2)
    assert grid.tuning(s, "npo+rt")[1] is None  # the second beta, at the best rate, is next
    beta = grid.tuning(s, "npo+rt")[0][-1]
    assert beta.facts["beta"] == pytest.approx(2 * first) and beta.facts["lr"] == rates[1].facts["lr"]
    s = recorded(s, beta, ks=0.0)
    assert grid.tuning(s, "npo+rt")[1] is None  # the best stands at the end of the betas: once more beyond it
    beyond = grid.tuning(s, "npo+rt")[0][-1]
    assert beyond.facts["beta"] == pytest.approx(4 * first)
    assert grid.tuning(recorded(s, beyond), "npo+rt")[1] == {k: beta.facts[k] for k in ("lr", "beta")}


def test_every_method_has_the_same_budget(study):
    s = study("--seeds", "1")
    for method in grid.METHODS + grid.NEWER:
        tuning = grid.tuning(s, method)[0]
        assert len(tuning) == 3 + grid.has_beta(method)


def test_a_score_rewards_the_smaller_of_forgetting_and_keeping():
    def run(ks: list, utility: list) -> dict:
        return {"ks_statistic": [0.8, *ks], "model_utility": [0.6, *utility]}

    assert grid.score(run([0.2], [0.6])) == pytest.approx(0.75)
    assert grid.score(run([0.0], [0.3])) == pytest.approx(0.5)
    assert grid.score(run([0.4, 0.0], [0.48, 0.0])) == pytest.approx(0.5)
    assert grid.score(run([0.8], [0.6])) == 0  # untouched


def test_a_run_is_known_by_its_folder_whose_name_has_its_key(study):
    s = study("--figure", "8", "--methods", "ga", "--seeds", "1")
    jobs = [job for job in grid.plan(s) if job.given]
    assert len({job.folder for job in jobs}) == len(jobs) and all(job.key[:8] in job.folder for job in jobs)
    assert [job.key for job in records.missing(s, jobs)][-3:] == [job.key for job in jobs]
    assert records.missing(recorded(s, *jobs), jobs) == []  # the JSON is enough


def test_what_is_in_the_json_is_not_made_again(study, capsys):
    s = study("--figure", "8", "--methods", "ga", "--seeds", "1")
    while jobs := [job for job in records.missing(s, grid.plan(s)) if job.needs]:
        recorded(s, *[job for job in jobs if job.given])
    workers.run_missing(s)
    assert "runs to make" not in capsys.readouterr().out and not Path("runs").exists()
    assert set(records.complete(s)["chosen"]) == {"ga"}


def test_what_is_finished_is_taken_down_and_not_planned(study, capsys, monkeypatch):
    s = study("--figure", "8", "--methods", "ga", "--seeds", "1")
    model, *_, run = [job for job in records.missing(s, grid.plan(s)) if job.given]
    for job in (model, run):
        Path(job.folder, "model").mkdir(parents=True)
    workers.print_plan(s)
    said = capsys.readouterr().out
    assert "4 unlearning runs, 3 missing (1 wait" in said and "2 models to fine-tune or retrain first" in said
    assert {model.key, run.key} <= {job.key for job in records.missing(s, grid.plan(s))}
    monkeypatch.setattr(records, "record", lambda folder, facts, data: {**facts, "start_weights": "57a7"})
    workers.execute(s, [model, run])  # a folder without config.json: nothing is asked of it
    assert [r["key"] for r in s.known["retrained"] + s.known["runs"]] == [model.key, run.key]
    assert not {model.key, run.key} & {job.key for job in records.missing(s, grid.plan(s))}
    s.known["retrained"], s.known["runs"] = [], []
    workers.ended(s, run, 0, 0.2)
    assert workers.duration(s, [run]) == "time unknown before one has ended"  # it says nothing of others


def test_a_job_is_a_command_of_train_npo(study):
    """Begun with its flags, gone on with by its folder."""
    from running.settings import parse, resolve
    s = study("--figure", "8", "--methods", "npo+rt", "--seeds", "1")
    for job in records.missing(s, grid.plan(s))[:3]:
        if job.needs:
            evaluations = Path(job.given["retain_log"]) / "eval"
            evaluations.mkdir(parents=True, exist_ok=True)
            (evaluations / "step_000005.json").touch()
        _, script, *flags = workers.command_of(job)
        told, settings = vars(parse(flags)), vars(resolve(job.given))
        assert Path(script).name == "train_npo.py" and told["out"] == job.folder
        assert all(told[key] == settings[key] for key in grid.SIGNIFICANT)
    Path(job.folder).mkdir(parents=True)
    assert workers.command_of(job)[2:] == ["--resume", job.folder]


def test_other_data_another_start_or_another_retrained_model_make_another_run(study):
    s = study("--figure", "5", "--methods", "npo+rt", "--seeds", "2")
    of = [("data", "start", "retrained"), ("other", "start", "retrained"), ("data", "other", "retrained"),
          ("data", "start", "other")]
    assert len({grid.run_key(grid.defaults(s), *facts) for facts in of}) == 4
    hyper = {"lr": 1e-3, "beta": 0.1}
    jobs = [grid.unlearn_job(s, "npo+rt", "forget10", 1, hyper),
            grid.unlearn_job(s, "npo+rt", "forget10", 2, hyper),
            grid.unlearn_job(s, "npo+rt", "forget10", 1, {**hyper, "retain_weight": 2.0})]
    assert len({job.key for job in jobs}) == 3


def test_a_beta_without_effect_makes_no_other_run(study):
    s = study("--figure", "8")
    for method, same in (("ga", True), ("npo", False)):
        one, other = (grid.unlearn_job(s, method, "forget10", 1, {"lr": 1e-3, "beta": beta})
                      for beta in (0.1, 0.2))
        assert (one.key == other.key) is same and other.facts["beta"] == 0.2


def test_retain_weight_0_shares_nothing_but_npos_own_settings(study):
    s = study("--figure", "retain-weight", "--seeds", "1")
    hyper = {"lr": 1e-3, "beta": 0.1}
    zero = grid.unlearn_job(s, "npo+rt", "forget10", 1, {**hyper, "retain_weight": 0.0})
    assert zero.key == grid.unlearn_job(s, "npo", "forget10", 1, hyper).key
    assert zero.facts["method"] == "npo"
    assert len(grid.plan(s)) == 4 + len(grid.RETAIN_WEIGHTS)


@pytest.mark.parametrize("changed", ({"start": "another"}, {"data_fingerprint": "another"}, {"epochs": 5}))
def test_a_json_of_another_study_is_refused_and_kept(study, changed):
    s = study("--figure", "8")
    path = records.json_path(s.args)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**records.complete(s), **changed}))
    with pytest.raises(InputError, match=f"was made with {next(iter(changed))} .*another --out"):
        study("--figure", "8")
    assert json.loads(path.read_text())["runs"] == []
    path.write_text("[]")
    with pytest.raises(InputError, match="lacks"):
        study("--figure", "8")


def test_runs_from_other_weights_of_the_start_do_not_go_into_one_json(study):
    s = study("--figure", "8", "--methods", "ga")
    job, other = [j for j in grid.plan(s) if j.given][:2]
    s = recorded(s, job)
    kept = {**s.known["runs"][0], "key": other.key}
    records.keep(s, kept)
    assert len(s.known["runs"]) == 2
    for same in ({}, {"seed": 9}):
        with pytest.raises(InputError, match="began from weights 57a7"):
            records.keep(s, {**kept, "start_weights": "0", **same})
    records.keep(s, {**kept, "start_weights": "0", "split": "forget20"})


FATES = {  # in place of a run
    "killed": "import os, signal; print('step 1', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
    "ends": "print('step 1')",
    "refused": "import sys; print('train_npo.py: no room\\n'); sys.exit(2)",
    "asked to stop": "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                     "os.kill(os.getppid(), signal.SIGINT); time.sleep(1)"}  # comes when it has just ended


@pytest.fixture
def run_fates(study, monkeypatch, tmp_path):
    """run_fates("killed", "ends") runs stand-ins with these fates, one after the other; the study after
    them."""
    def run(*fates):
        s = study("--figure", "8", "--methods", "ga", "--jobs", "1")
        monkeypatch.setattr(records, "record", lambda folder, facts, data: {**facts, "start_weights": "57a7"})
        monkeypatch.setattr(records, "complete", lambda s: {})
        jobs = [j for j in grid.plan(s) if j.given][:len(fates)]
        scripts = dict(zip((job.folder for job in jobs), fates, strict=True))
        monkeypatch.setattr(workers, "command_of",
                            lambda job: [sys.executable, "-c", FATES[scripts[job.folder]]])
        workers.execute(s, jobs)
        return jobs, s
    return run


def test_a_run_that_is_killed_or_refused_fails_and_the_others_go_on(run_fates):
    jobs, s = run_fates("killed", "ends", "refused")
    assert [r["key"] for r in s.known["runs"]] == [jobs[1].key]
    assert [(f["key"], f["why"]) for f in s.known["failed"]] == [
        (jobs[0].key, "exit status -9: step 1"), (jobs[2].key, "exit status 2: train_npo.py: no room")]


def test_a_failed_tuning_run_is_known_until_it_is_tried_again(study):
    s = study("--figure", "8", "--methods", "ga")
    first, *others = grid.tuning(s, "ga")[0]
    s = recorded(s, *others)
    s.known["failed"].append({"key": first.key, "name": first.name, "why": "exit status 1"})
    records.json_path(s.args).parent.mkdir(parents=True)
    records.json_path(s.args).write_text(json.dumps(records.complete(s)))
    later = study("--figure", "8", "--methods", "npo")
    assert "ga" in grid.chosen(later) and [f["key"] for f in later.known["failed"]] == [first.key]
    again = study("--figure", "8", "--methods", "ga")
    missing = {job.key for job in records.missing(again, grid.plan(again))}
    assert "ga" not in grid.chosen(again) and first.key in missing


def test_a_run_that_ends_as_it_is_asked_to_stop_ends_too(run_fates, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    started, begin = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **how: started.append(begin(*given, **how))
                        or started[-1])
    with pytest.raises(KeyboardInterrupt):
        run_fates("asked to stop", "ends")
    assert started[-1].returncode == 0  # it was waited for


def test_figure_9_takes_the_weight_with_the_best_score_on_its_own_split(study):
    s = study("--figure", "9", "--methods", "npo+rt", "--splits", "forget50")
    hyper = {"lr": 1e-3, "beta": 0.1}
    one, two, five = grid.tuned_weight(s, "npo+rt", "forget50", hyper)[0]
    s = recorded(s, one, five)
    assert grid.tuned_weight(s, "npo+rt", "forget50", hyper)[1] is None
    s = recorded(s, two, ks=0.1)
    assert grid.tuned_weight(s, "npo+rt", "forget50", hyper)[1] == 2.0 == two.facts["retain_weight"]
    assert {job.facts["split"] for job in (one, two, five)} == {"forget50"} and two.facts["seed"] == 0
    assert grid.tuned_weight(s, "npo", "forget50", hyper) == ([], 0.0)  # no retain term, nothing to choose


def test_a_ceiling_compares_different_retrained_models(study):
    from scipy.stats import ks_2samp

    s = study("--figure", "5")
    models = {"full": (0, [5.0, 6.0]), "retain90": (1, [0.0, 0.1]), "retain95": (2, [0.1, 0.2])}
    s.known["retrained"] = [{"split": split, "seed": seed, "log_truth_ratios": ratios}
                            for split, (seed, ratios) in models.items()]
    assert records.complete(s)["ceilings"] == {"forget10": [], "forget05": []}  # a start is no such model
    samples = {1: [0.0, 0.1, 0.2, 0.3], 2: [0.25, 0.35, 0.45, 0.55], 3: [5.0, 6.0, 7.0, 8.0]}
    found = {tuple(pair["seeds"]): 10 ** pair["log10"] for pair in records.ceilings(samples)}
    assert found == {(a, b): pytest.approx(ks_2samp(samples[a], samples[b]).pvalue, rel=1e-3)
                     for a, b in ((1, 2), (1, 3), (2, 3))}


def test_the_presets_choices_are_one_lr_for_all_in_a_json_of_their_own(study):
    s = study("--figure", "8", "--seeds", "1", "--choices", "preset")
    preset, jobs = s.preset, grid.plan(s)
    assert len(jobs) == len(grid.METHODS) and {j.facts["lr"] for j in jobs} == {preset.lr}
    assert {j.facts["beta"] for j in jobs} == {preset.beta, grid.SIMNPO_BETA}
    published = {m: grid.tuning(s, m)[1]["beta"] for m in ("wga+rt", "satimp+rt", "tnpo+rt", "undial+rt")}
    assert published == {"wga+rt": 1.0, "satimp+rt": 5.0, "tnpo+rt": 4.0, "undial+rt": 10.0}
    assert records.json_path(s.args).name.endswith("_tiny_preset.json")
    assert s.known["choices_from"] == "preset" in pages.HOW
    s = study("--figure", "9", "--seeds", "1", "--methods", "npo+rt", "--choices", "preset")
    tuned = [j.facts for j in grid.plan(s) if j.given]  # the retain weight is still the method's own
    assert {facts["retain_weight"] for facts in tuned} == set(grid.TUNED_WEIGHTS)
    assert {facts["lr"] for facts in tuned} == {preset.lr}


def test_a_model_that_is_no_preset_is_refused(study):
    with pytest.raises(InputError, match="PRESET"):
        study("--model", "unknown/model")


# ---------------------------------------------------------------- the whole path

@pytest.mark.slow
def test_plan_stop_go_on_reuse_and_draw(command, small_data, tmp_path):
    """One command on the small data set: plan, stopped by a signal, the same again to the end, then reuse
    from the JSON alone."""
    args = ["--data", small_data, "--figure", "8", "--methods", "npo+rt", "--seeds", "1", "--epochs", "2",
            "--jobs", "2", "--out", "res"]
    planned = command("figures_tofu.py", *args, "--plan").stdout
    tuning = len(grid.LR_FACTORS) + len(grid.BETA_FACTORS) - 1
    assert f"together {tuning + 1} unlearning runs, {tuning + 1} missing" in planned
    assert "3 models" in planned and "memory:" in planned
    assert not (tmp_path / "runs").exists()
    process = subprocess.Popen([sys.executable, str(ROOT / "figures_tofu.py"), *map(str, args)], cwd=tmp_path,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    begin = time.monotonic()
    while not list((tmp_path / "runs" / "models").glob("tiny-*/log.jsonl")):
        assert process.poll() is None and time.monotonic() - begin < 300, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "the same command goes on" in output, output
    done = command("figures_tofu.py", *args, timeout=600).stdout
    known = json.loads((tmp_path / "res" / "tofu" / f"{small_data.name}_tiny.json").read_text())
    tuned = sum(r["seed"] == 0 for r in known["runs"])  # one more where the best lr or beta stood at an end
    assert tuning <= tuned <= tuning + 2 and len(known["runs"]) == tuned + 1, done
    assert len(known["retrained"]) == 3 and not known["failed"], done
    assert set(known["chosen"]) == {"npo+rt"} and "beta" in known["chosen"]["npo+rt"]
    assert str(tmp_path) not in json.dumps(known) and str(small_data) not in json.dumps(known)
    run = next(r for r in known["runs"] if r["method"] == "npo+rt" and r["seed"] == 1)
    assert run["steps"][0] == 0 and run["samples"][0]["set"] == "forget"
    assert run["answers"]["retain"]["answers"] == 20
    assert not list((tmp_path / "runs" / "tofu").glob("*/checkpoints"))
    picture = tmp_path / "res" / "tofu" / f"{small_data.name}_tiny_figure8.png"
    files = [picture, tmp_path / "res" / "tofu.md"]
    before = [path.read_bytes() for path in files]
    (tmp_path / "runs").rename(tmp_path / "gone")
    again = command("figures_tofu.py", *args).stdout
    assert "runs to make" not in again and not (tmp_path / "runs").exists()
    words = ["figures_tofu.py", *map(str, args), "--draw-only"]
    without_torch = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {words!r}; " \
                    "import figures_tofu; figures_tofu.main(); assert 'torch' not in sys.modules"
    for path in files:
        path.unlink()
    subprocess.run([sys.executable, "-c", without_torch], cwd=tmp_path, check=True)
    assert files[0].read_bytes() == before[0]
    page = files[1].read_text()
    assert "Figure 8" in page and "## " in page


def test_a_single_runs_record_has_the_settings_of_a_loss_of_ones_own(monkeypatch, tmp_path):
    def hinge(policy_logps, margin=20.0):
        return (policy_logps + margin).relu()
    monkeypatch.setitem(losses.OBJECTIVES, "hinge", losses.Objective(hinge))
    monkeypatch.setattr(records, "record", lambda _, facts, __: {
        **facts, "forget_quality_log10": [0, 0], "model_utility": [1, 1]})
    (tmp_path / "model").mkdir()
    (tmp_path / "log.jsonl").touch()
    found = []
    for margin in (20.0, 5.0):
        settings = {**dict.fromkeys((*records.COLLECTED, "start")), "data": "builtin", "loss": "hinge",
                    "margin": margin}
        (tmp_path / "config.json").write_text(json.dumps({"settings": settings, "command": "train_npo.py"}))
        found.append(records.collected(tmp_path))
    assert [run["own_settings"] for run in found] == ["margin 20.0", "margin 5.0"]
    assert records.differing(found) == ["own_settings"]


def test_a_run_that_no_picture_could_show_is_not_collected(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "log.jsonl").touch()
    settings = {**dict.fromkeys((*records.COLLECTED, "start")), "data": "builtin", "loss": "npo"}
    config = {"settings": settings, "command": "train_npo.py"}
    unjudged = {"forget_quality_log10": [None, None], "model_utility": [0.5, 0.5]}
    for curves, own, said in (({}, None, "two or more evaluations"), (unjudged, None, "--retain-log"),
                              ({}, "rows", "of its own")):
        config["settings"]["forget"] = own
        (tmp_path / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr(records, "record", lambda *_, curves=curves: curves)
        with pytest.raises(InputError, match=said):
            records.collected(tmp_path)
    for torn in ("{", "{}"):
        (tmp_path / "config.json").write_text(torn)
        with pytest.raises(InputError, match="config.json is not a run's"):
            records.collected(tmp_path)
    assert pictures.style("squared+rt") and pictures.style("npo+rt+kl")  # of one's own


def test_collected_runs_are_shown_again_from_their_json(monkeypatch, tmp_path, capsys):
    kept = ROOT / "results" / "builtin_beta_tried"
    again = Path(shutil.copy(kept.with_suffix(".json"), tmp_path))
    monkeypatch.setattr(sys, "argv", ["figures_tofu.py", "--draw-only", "--out", str(again)])
    figures_tofu.main()
    assert again.with_suffix(".md").read_text() == kept.with_suffix(".md").read_text()
    assert again.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize("flags,said", [(["--figure", "5", "--splits", "forget50"], "nothing to make"),
                                        (["--figure", "9", "--methods", "kto"], "nothing to make"),
                                        (["--model", "tiny=folder"], "makes its tiny models itself")])
def test_flags_that_leave_nothing_to_make_are_refused(monkeypatch, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures_tofu.py", *flags, "--plan"])
    with pytest.raises(InputError, match=said):
        figures_tofu.main()
