"""Section 5's claims as computed verdicts: pure functions of a study's JSON, without a model or PyTorch.

A claim is a list of tests. It holds where all tests hold, and fails where one test fails. A test compares one
number per seed with a threshold, and a 95% interval over seeds decides: `interval` for a mean, `share_bounds`
for a yes or no. The test holds if the interval lies on the right side of the threshold, fails if it lies on
the other side, and is undecided otherwise. One seed decides nothing. Fewer than five equal seeds decide
nothing either: an interval without width shows that the number takes few values, and not that the next seed
will have the same one.

The thresholds are ours where the paper has words; its utility of 0.55 on forget50 and forget90 is 88% of its
start's. Forget quality is averaged in decades, and "exceeds" is said of this mean.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy import stats

LINE = math.log10(0.05)  # above it the test does not tell a model from a retrained one
NPO_BASED, GA_BASED = ("npo", "npo+rt", "npo+kl"), ("ga", "ga+rt", "ga+kl")
BASELINES = (*GA_BASED, "idk+rt", "dpo", "dpo+rt", "dpo+kl", "kto", "kto+rt")
ELSEWHERE = ("retain", "real_authors", "world_facts")
PRESERVED = 0.8  # share of the start's utility that is "greatly preserved"
COVERED, EQUAL_SEEDS, TUNING_SEED = 0.95, 5, 0
RANK = {False: 0, "undecided": 1, True: 2}
WORDS = {True: "holds", False: "does not hold", "undecided": "undecided"}


# ---------------------------------------------------------------- runs and their numbers

def settings_of(study: dict, split: str, name: str) -> dict:
    """What the runs of a method have: the lr and beta that were chosen for it, and its own retain weight.
    METHOD@WEIGHT has another weight: a number, or `tuned` for the one that was chosen for this split. Weight
    0 of npo+rt is npo with the settings of npo+rt. {} where nothing was chosen."""
    method, _, weight = name.partition("@")
    choice = study["chosen"].get(method)
    if not choice or weight == "tuned" and split not in choice["weights"]:
        return {}
    weight = choice["weights"][split] if weight == "tuned" else float(weight or "+rt" in method)
    return {"split": split, "method": method if weight else method.removesuffix("+rt"),
            "retain_weight": weight, "lr": choice["lr"], "beta": choice["beta"]}


def chosen_runs(study: dict, split: str, name: str) -> list:
    """The reported runs with these settings, by seed."""
    needed = settings_of(study, split, name).items()
    runs = [run for run in study["runs"] if needed and needed <= run.items()]
    return sorted((run for run in runs if run["seed"] != TUNING_SEED), key=lambda run: run["seed"])


def peak_at(run: dict) -> int:
    """Index of the evaluation, after the start, with the largest forget quality; the first of equal ones."""
    quality = run["forget_quality_log10"]
    return max(range(1, len(quality)), key=quality.__getitem__)


def peak(run: dict) -> float:
    return run["forget_quality_log10"][peak_at(run)]


def last(run: dict) -> float:
    return run["forget_quality_log10"][-1]


def kept_utility(run: dict, at: int = -1) -> float:
    """Model utility of an evaluation as a share of the start's; 0 if the start has none."""
    start = run["model_utility"][0]
    return run["model_utility"][at] / start if start else 0.0


def lowest_later(run: dict) -> float:
    """The lowest log10 forget quality in the last third of the run."""
    return min(quality for step, quality in zip(run["steps"], run["forget_quality_log10"], strict=True)
               if step >= 2 / 3 * run["steps"][-1])


def best_at_utility(run: dict, share: float, first: int = 0) -> float:
    """The largest log10 forget quality of the evaluations, from number `first` on, that keep this share of
    the start's utility; -inf if there is none."""
    return max((quality for i, quality in enumerate(run["forget_quality_log10"])
                if i >= first and kept_utility(run, i) >= share), default=-math.inf)


def rate(answers: dict, kind: str, sets: tuple) -> float:
    """Share of a kind of answer among the last answers to these sets."""
    counts = [answers[name] for name in sets if name in answers]
    return sum(count[kind] for count in counts) / sum(count["answers"] for count in counts)


# ---------------------------------------------------------------- statistics over seeds

def interval(values: list) -> tuple[float, float]:
    """95% interval of the mean over two or more seeds (Student's t)."""
    mean, half = statistics.mean(values), stats.t.ppf((1 + COVERED) / 2, len(values) - 1) * stats.sem(values)
    return float(mean - half), float(mean + half)


def share_bounds(values: list) -> tuple[float, float]:
    """The one-sided 95% bounds, lower and upper, of the share of seeds in which something is true (Clopper
    and Pearson, 1934). A claim about a share has a direction, so one bound judges it: 5 of 5 seeds give 0.549
    or more. A two-sided interval would reach down to 0.478, and five seeds could never show a majority."""
    two_sided = 2 * COVERED - 1  # the level whose tails are the one-sided ones
    bounds = stats.binomtest(sum(values), len(values)).proportion_ci(two_sided, method="exact")
    return float(bounds.low), float(bounds.high)


def test(subject: str, values: list, sign: str, threshold: float) -> dict:
    """Is the mean of the values, one per seed, above (sign ">") or below ("<") the threshold? Values of True
    and False are a share. The interval is None where nothing is decided."""
    mean = statistics.mean(map(float, values)) if values else None
    result = {"what": subject, "mean": mean, "interval": None, "sign": sign, "threshold": threshold,
              "seeds": len(values), "holds": "undecided"}
    is_share = bool(values) and isinstance(values[0], bool)
    equal = not is_share and len(values) < EQUAL_SEEDS and np.allclose(values, values[:1])
    if len(values) > 1 and not equal:
        result["interval"] = low, high = list(share_bounds(values) if is_share else interval(values))
        if low > threshold or high < threshold:
            result["holds"] = (low > threshold) == (sign == ">")
    return result


# ---------------------------------------------------------------- the claims, in the paper's order and words

class Row(NamedTuple):
    """Tests of a claim: one for each split and name. A pair of names is tested by its difference, over the
    seeds that both have."""
    splits: tuple
    names: tuple
    subject: str
    value: Callable  # of a run
    sign: str
    threshold: float
    one_is_enough: bool = False  # the strongest of the tests speaks for all


SMALL, FORGET05, FORGET10, BOTH = ("forget05", "forget10"), ("forget05",), ("forget10",), GA_BASED[:2]
PEAK = ("peak log10 forget quality", peak)
REPETITION = ("repetition rate", lambda run: run["answers"]["forget"]["repetition_rate"])
CLAIMS = {
    "ga_falls": ("ga and ga+rt peak early, then fall to exponentially small forget quality", (
        Row(SMALL, BOTH, "peak at this share of the run",
            lambda run: run["steps"][peak_at(run)] / run["steps"][-1], "<", 2 / 3),
        Row(SMALL, BOTH, "decades fallen since", lambda run: peak(run) - last(run), ">", 2.0),
        Row(SMALL, BOTH, "last log10 forget quality", last, "<", -3.0))),
    "npo_plateau": ("npo-based methods reach a plateau of forget quality and hold it", (
        Row(SMALL, NPO_BASED, "decades above the start, in the last third",
            lambda run: lowest_later(run) - run["forget_quality_log10"][0], ">", 2.0),
        Row(SMALL, NPO_BASED, "decades lost since the peak, in the last third",
            lambda run: peak(run) - lowest_later(run), "<", 1.0))),
    "npo_beats_ga": ("npo-based methods beat ga-based ones at equal utility", [
        Row(SMALL, tuple(zip(NPO_BASED, GA_BASED, strict=True)),
            f"decades of forget quality at {share:.0%} of the start's utility",
            partial(best_at_utility, share=share), ">", 0.0) for share in (0.5, 0.7, 0.9)]),
    "forget05_only_npo": (
        "on forget05 npo-based methods exceed a forget quality of 0.05, and no other does", (
            Row(FORGET05, NPO_BASED, *PEAK, ">", LINE, one_is_enough=True),
            Row(FORGET05, BASELINES, *PEAK, "<", LINE))),
    "forget10_npo_rt": ("on forget10 npo+rt alone stays above 0.05 with its utility greatly preserved", (
        Row(FORGET10, ("npo+rt",), "lowest log10 forget quality of the last third", lowest_later, ">", LINE),
        Row(FORGET10, ("npo+rt",), "utility at the end, share of the start's", kept_utility, ">", PRESERVED),
        Row(FORGET10, (*BASELINES, "npo", "npo+kl"), "share of seeds that do both",
            lambda run: lowest_later(run) > LINE and kept_utility(run) > PRESERVED, "<", 0.5))),
    "forget10_baselines": ("on forget10 no baseline exceeds 0.05", (
        Row(FORGET10, BASELINES, *PEAK, "<", LINE),)),
    "refusals_elsewhere": ("idk and dpo answer \"I don't know\" to questions outside the forget set", (
        Row(FORGET10, ("idk+rt", "dpo", "dpo+rt"), "refusals among answers outside the forget set",
            lambda run: rate(run["answers"], "refusal", ELSEWHERE), ">", 0.1),)),
    "answers_on_forget_set": (
        "on the forget set ga's answers are repetitive, npo+rt's fluent, of the wording, with other facts", (
            Row(FORGET10, ("ga",), *REPETITION, ">", 0.3),
            Row(FORGET10, ("npo+rt",), *REPETITION, "<", 0.3),
            Row(FORGET10, ("npo+rt",), "answers of the wording with another fact",
                lambda run: rate(run["answers"], "other fact", ("forget",)), ">", 0.5))),
    "retain_weight": ("npo+rt's forget quality rises with the retain weight from 0 to 2 and falls to 5", (
        Row(FORGET10, (("npo+rt@2", "npo+rt@0"),), "decades of peak forget quality", peak, ">", 0.0),
        Row(FORGET10, (("npo+rt@5", "npo+rt@2"),), "decades of peak forget quality", peak, "<", 0.0))),
    "forget_kl": (
        "the divergence from the start on the forget set explodes for ga and stays moderate for npo", (
            Row(FORGET10, BOTH, "last forget KL", lambda run: run["forget_kl"][-1], ">", 3.0),
            Row(FORGET10, (("ga", "npo"), ("ga+rt", "npo+rt")), "log of the last forget KL",
                lambda run: math.log(max(run["forget_kl"][-1], 1e-9)), ">", math.log(3)))),
    "beyond10": ("on forget20 and forget30 npo+rt exceeds 0.05", (
        Row(("forget20", "forget30"), ("npo+rt",), *PEAK, ">", LINE),)),
    "tuned_beyond10": (
        "on forget50 and forget90 npo+rt with tuned weights exceeds 0.05 and keeps 88% of the start's "
        "utility", (Row(("forget50", "forget90"), ("npo+rt@tuned",),
                        "best log10 forget quality with 88% of the start's utility",
                        partial(best_at_utility, share=0.88), ">", LINE),))}


def tests_of(study: dict, row: Row) -> list[dict]:
    tests = []
    for split in row.splits:
        for name in row.names:
            first, *second = (name,) if isinstance(name, str) else name
            values = {run["seed"]: row.value(run) for run in chosen_runs(study, split, first)}
            for other in second:
                less = {run["seed"]: row.value(run) for run in chosen_runs(study, split, other)}
                values = {seed: values[seed] - less[seed] for seed in values if seed in less}
            tests.append(test(f"{split} {' over '.join([first, *second])}: {row.subject}",
                              list(values.values()), row.sign, row.threshold))
    if row.one_is_enough:
        return [max(tests, key=lambda t: (RANK[t["holds"]], -math.inf if t["mean"] is None else t["mean"]))]
    return tests


def verdicts(study: dict) -> list[dict]:
    """Every claim of Section 5: {"key", "claim", "tests", "holds", "words"}. The words name each split where
    splits differ."""
    results = []
    for key, (claim, rows) in CLAIMS.items():
        tests, splits = [t for row in rows for t in tests_of(study, row)], {}
        for t in tests:  # the first word of a test's subject is its split
            splits.setdefault(t["what"].split()[0], []).append(t["holds"])
        worst = {split: min(holds, key=RANK.get) for split, holds in splits.items()}
        holds = min(worst.values(), key=RANK.get)
        words = ", ".join(f"{split}: {WORDS[answer]}" for split, answer in worst.items())
        results.append({"key": key, "claim": claim, "tests": tests, "holds": holds,
                        "words": words if len(set(worst.values())) > 1 else WORDS[holds]})
    return results


def deciding(verdict: dict) -> str:
    """The numbers behind a verdict: at most three of the tests that answer as it does."""
    tests = [t for t in verdict["tests"] if t["holds"] == verdict["holds"] and t["seeds"]][:3]
    spreads = ["{:.3g} to {:.3g}".format(*t["interval"]) if t["interval"] else "no interval" for t in tests]
    return "; ".join("{what} {mean:.3g} ({}), needs {sign} {threshold:.3g}".format(spread, **t)
                     for t, spread in zip(tests, spreads, strict=True)) or "not run"
