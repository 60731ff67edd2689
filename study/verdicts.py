"""Section 5's claims as computed verdicts. Pure functions of the study's JSON: no model, no PyTorch.

A claim is a list of tests, and holds where all of them hold, fails where one fails. Each test has one number
a seed and a threshold; a 95% interval over seeds decides (`interval` of a mean; `share_bounds` of a yes or
no): the test holds where all of it is on the right side, fails where all is on the other, and is undecided
otherwise. One seed decides nothing, and neither do fewer than five that are all equal: an interval without
width shows that the number takes few values, and not that the next seed will have the same.

The thresholds are ours where the paper has words: "early" is the first two thirds of the run, "exponentially
small" a forget quality below 1e-3 that has fallen by two decades, "a plateau" the last third of the run
within one decade of the peak and two above the start, "explodes" three nats a token and three times npo's,
"greatly preserved" 80% of the start's utility; the paper's 0.55 on forget50 and forget90 is 88% of its
start's. Forget quality is averaged in decades, and "exceeds" is said of this mean.
"""

import math
import statistics
from functools import partial

import numpy as np
from scipy import stats

LINE = math.log10(0.05)
NPO_BASED, GA_BASED = ("npo", "npo+rt", "npo+kl"), ("ga", "ga+rt", "ga+kl")
BASELINES = (*GA_BASED, "idk+rt", "dpo", "dpo+rt", "dpo+kl", "kto", "kto+rt")
OTHERS = (*BASELINES, "npo", "npo+kl")  # of the paper's methods, than npo+rt
ELSEWHERE = ("retain", "real_authors", "world_facts")
EARLY, SMALL, FALL, HOLDING = 2 / 3, -3.0, 2.0, 1.0  # share of the run; log10; decades; decades
PRESERVED, PRESERVED_BEYOND = 0.8, 0.88  # shares of the start's utility
REFUSING, REPEATING, OF_THE_WORDING, EXPLODING = 0.1, 0.3, 0.5, 3.0
UTILITIES = (0.5, 0.7, 0.9)  # shares of the start's utility at which methods are compared
COVERED, EQUAL_SEEDS = 0.95, 5  # of equal values fewer than so many decide nothing
RANK = {False: 0, "undecided": 1, True: 2}


def chosen_runs(study: dict, split: str, method: str, retain_weight: float | None = None) -> list:
    """A method's runs with its chosen lr and beta, on the reported seeds, in their order; with weights of 1,
    or with another retain weight (0: npo at npo+rt's lr and beta)."""
    choice = study["chosen"].get(method)
    if not choice:
        return []
    wanted = {"split": split, "method": method.removesuffix("+rt") if retain_weight == 0 else method,
              "retain_weight": int("+rt" in method) if retain_weight is None else retain_weight,
              "lr": choice["lr"], "beta": choice["beta"]}
    found = [r for r in study["runs"] if all(r[k] == v for k, v in wanted.items())
             and r["seed"] != study["budget"]["seed"]]
    assert len({r["seed"] for r in found}) == len(found), f"two records of one seed: {wanted}"
    return sorted(found, key=lambda r: r["seed"])


def tuned_runs(study: dict, split: str, method: str) -> list:
    """A method's runs with the retain weight that was chosen for this split (Figure 9)."""
    weight = study["chosen"].get(method, {}).get("weights", {}).get(split)
    return [] if weight is None else chosen_runs(study, split, method, weight)


def differences(first: list, second: list, value) -> list:
    """value(a) - value(b) for runs a and b of the same seed."""
    other = {r["seed"]: r for r in second}
    return [value(r) - value(other[r["seed"]]) for r in first if r["seed"] in other]


def peak_at(run: dict) -> int:
    """Where in the run's evaluations, after the start, forget quality is largest; the first of equals."""
    values = run["forget_quality_log10"]
    return max(range(1, len(values)), key=values.__getitem__)


def peak(run: dict) -> float:
    return run["forget_quality_log10"][peak_at(run)]


def last(run: dict) -> float:
    return run["forget_quality_log10"][-1]


def kept_utility(run: dict, at: int = -1) -> float:
    """Utility as a share of the start's; of a start that has none nothing is kept."""
    start = run["model_utility"][0]
    return run["model_utility"][at] / start if start else 0.0


def lowest_later(run: dict) -> float:
    """The lowest log10 forget quality in the last third of the run."""
    return min(q for step, q in zip(run["steps"], run["forget_quality_log10"], strict=True)
               if step >= 2 / 3 * run["steps"][-1])


def best_at_utility(run: dict, share: float) -> float:
    """The largest log10 forget quality of an evaluation with this share of the start's utility or more."""
    return max((q for i, q in enumerate(run["forget_quality_log10"]) if kept_utility(run, i) >= share),
               default=-math.inf)


def rate(answers: dict, kind: str, sets: tuple) -> float:
    """Share of a kind among the last answers of these sets."""
    counts = [answers[name] for name in sets if name in answers]
    return sum(c[kind] for c in counts) / sum(c["answers"] for c in counts)


def mean_sd(values: list, spec: str = ".2f") -> str:
    """Over seeds; "-" for none."""
    if not values:
        return "-"
    finite = math.isfinite(sum(values))  # -inf: never with so much of the utility
    sd = f" ± {statistics.stdev(values):{spec}}" if len(values) > 1 and finite else ""
    return f"{statistics.mean(values):{spec}}{sd}"


def interval(values: list) -> tuple[float, float]:
    """95% interval of the mean over two or more seeds, Student's t."""
    mean, half = statistics.mean(values), stats.t.ppf((1 + COVERED) / 2, len(values) - 1) * stats.sem(values)
    return float(mean - half), float(mean + half)


def share_bounds(values: list) -> tuple[float, float]:
    """The lower and the upper one-sided 95% bound of the share of seeds in which something is so (Clopper,
    Pearson, 1934). A claim about a share has a direction, so one bound judges it: 5 of 5 give 0.549 or more,
    where a two-sided interval would reach down to 0.478 and five seeds could never show a majority."""
    both = 2 * COVERED - 1  # the two-sided level whose tails are the one-sided ones
    found = stats.binomtest(sum(values), len(values)).proportion_ci(both, method="exact")
    return float(found.low), float(found.high)


def test(what: str, values: list, sign: str, threshold: float) -> dict:
    """{"what", "mean", "interval", "sign", "threshold", "seeds", "holds"}: is the mean above (sign ">") or
    below ("<") the threshold? Values of True and False are a share. No interval: nothing is decided."""
    found = {"what": what, "mean": None, "interval": None, "sign": sign, "threshold": threshold,
             "seeds": len(values), "holds": "undecided"}
    if not values:
        return found
    found["mean"], is_share = statistics.mean(map(float, values)), isinstance(values[0], bool)
    equal = not is_share and len(values) < EQUAL_SEEDS and np.allclose(values, values[0])
    if len(values) > 1 and not equal:
        found["interval"] = low, high = list(share_bounds(values) if is_share else interval(values))
        if low > threshold or high < threshold:
            found["holds"] = (low > threshold) == (sign == ">")
    return found


def each(study: dict, split: str, methods: tuple, what: str, value, sign: str, threshold: float) -> list:
    """One test a method, of this value of its runs."""
    return [test(f"{split} {m}: {what}", [value(r) for r in chosen_runs(study, split, m)], sign, threshold)
            for m in methods]


def peaks(study: dict, split: str, methods: tuple, sign: str) -> list:
    return each(study, split, methods, "peak log10 forget quality", peak, sign, LINE)


def one_of(tests: list) -> dict:
    """What speaks for "some of them do": a test that holds, else an undecided one, else the nearest. Of
    several tests chance finds a good one more often."""
    return max(tests, key=lambda t: (RANK[t["holds"]], -math.inf if t["mean"] is None else t["mean"]))


# ---------------------------------------------------------------- the claims, each in the paper's words

def ga_falls(study: dict) -> list:
    """ga and ga+rt peak early, then fall to exponentially small forget quality"""
    return [t for split in ("forget05", "forget10") for m in ("ga", "ga+rt") for t in (
        *each(study, split, (m,), "peak at this share of the run",
              lambda r: r["steps"][peak_at(r)] / r["steps"][-1], "<", EARLY),
        *each(study, split, (m,), "decades fallen since", lambda r: peak(r) - last(r), ">", FALL),
        *each(study, split, (m,), "last log10 forget quality", last, "<", SMALL))]


def npo_plateau(study: dict) -> list:
    """npo-based methods reach a plateau of forget quality and hold it"""
    return [t for split in ("forget05", "forget10") for t in (
        *each(study, split, NPO_BASED, "decades above the start, in the last third",
              lambda r: lowest_later(r) - r["forget_quality_log10"][0], ">", FALL),
        *each(study, split, NPO_BASED, "decades lost since the peak, in the last third",
              lambda r: peak(r) - lowest_later(r), "<", HOLDING))]


def npo_beats_ga(study: dict) -> list:
    """npo-based methods beat ga-based ones at equal utility"""
    tests = []
    for split in ("forget05", "forget10"):
        for npo, ga in zip(NPO_BASED, GA_BASED, strict=True):
            ours, theirs = chosen_runs(study, split, npo), chosen_runs(study, split, ga)
            for share in UTILITIES:
                gains = differences(ours, theirs, partial(best_at_utility, share=share))
                what = f"decades of forget quality at {share:.0%} of the start's utility"
                tests.append(test(f"{split} {npo} over {ga}: {what}", gains, ">", 0.0))
    return tests


def forget05_only_npo(study: dict) -> list:
    """on forget05 npo-based methods exceed a forget quality of 0.05, and no other does"""
    return [one_of(peaks(study, "forget05", NPO_BASED, ">")), *peaks(study, "forget05", BASELINES, "<")]


def forget10_npo_rt(study: dict) -> list:
    """on forget10 npo+rt alone stays above 0.05 with its utility greatly preserved"""
    def does_both(run: dict) -> bool:
        return lowest_later(run) > LINE and kept_utility(run) > PRESERVED

    at, ours = (study, "forget10"), ("npo+rt",)
    return [*each(*at, ours, "lowest log10 forget quality of the last third", lowest_later, ">", LINE),
            *each(*at, ours, "utility at the end, share of the start's", kept_utility, ">", PRESERVED),
            *each(*at, OTHERS, "share of seeds that do both", does_both, "<", 0.5)]


def forget10_baselines(study: dict) -> list:
    """on forget10 no baseline exceeds 0.05"""
    return peaks(study, "forget10", BASELINES, "<")


def refusals_elsewhere(study: dict) -> list:
    """idk and dpo answer "I don't know" to questions outside the forget set"""
    what = "refusals among answers outside the forget set"
    return each(study, "forget10", ("idk+rt", "dpo", "dpo+rt"), what,
                lambda r: rate(r["answers"], "refusal", ELSEWHERE), ">", REFUSING)


def answers_on_forget_set(study: dict) -> list:
    """on the forget set ga's answers are repetitive, npo+rt's fluent, of the wording, with other facts"""
    def repetition(run: dict) -> float:
        return run["answers"]["forget"]["repetition_rate"]

    return [*each(study, "forget10", ("ga",), "repetition rate", repetition, ">", REPEATING),
            *each(study, "forget10", ("npo+rt",), "repetition rate", repetition, "<", REPEATING),
            *each(study, "forget10", ("npo+rt",), "answers of the wording with another fact",
                  lambda r: rate(r["answers"], "other fact", ("forget",)), ">", OF_THE_WORDING)]


def retain_weight(study: dict) -> list:
    """npo+rt's forget quality rises with the retain weight from 0 to 2 and falls to 5"""
    zero, two, five = (chosen_runs(study, "forget10", "npo+rt", w) for w in (0, 2, 5))
    what = "forget10 npo+rt: decades of peak forget quality from weight"
    return [test(f"{what} 0 to 2", differences(two, zero, peak), ">", 0.0),
            test(f"{what} 2 to 5", differences(five, two, peak), "<", 0.0)]


def forget_kl(study: dict) -> list:
    """the divergence from the start on the forget set explodes for ga and stays moderate for npo"""
    def log_last(run: dict) -> float:
        return math.log(max(run["forget_kl"][-1], 1e-9))  # what is smaller is rounding

    large = each(study, "forget10", ("ga", "ga+rt"), "last forget KL", lambda r: r["forget_kl"][-1], ">",
                 EXPLODING)
    return large + [test(f"forget10 {ga} over {npo}: log of the last forget KL",
                         differences(*(chosen_runs(study, "forget10", m) for m in (ga, npo)), log_last), ">",
                         math.log(EXPLODING)) for ga, npo in (("ga", "npo"), ("ga+rt", "npo+rt"))]


def beyond10(study: dict) -> list:
    """on forget20 and forget30 npo+rt exceeds 0.05"""
    return peaks(study, "forget20", ("npo+rt",), ">") + peaks(study, "forget30", ("npo+rt",), ">")


def tuned_beyond10(study: dict) -> list:
    """on forget50 and forget90 npo+rt with tuned weights exceeds 0.05 and keeps 88% of the start's utility"""
    what = f"npo+rt, tuned: best log10 forget quality with {PRESERVED_BEYOND:.0%} of the start's utility"
    found = {split: tuned_runs(study, split, "npo+rt") for split in ("forget50", "forget90")}
    return [test(f"{split} {what}", [best_at_utility(r, PRESERVED_BEYOND) for r in runs], ">", LINE)
            for split, runs in found.items()]


CLAIMS = (ga_falls, npo_plateau, npo_beats_ga, forget05_only_npo, forget10_npo_rt, forget10_baselines,
          refusals_elsewhere, answers_on_forget_set, retain_weight, forget_kl, beyond10, tuned_beyond10)


def verdicts(study: dict) -> list[dict]:
    """Every claim of Section 5, in the paper's order: {"key", "claim", "tests", "holds"}."""
    found = [{"key": claim.__name__, "claim": claim.__doc__, "tests": claim(study)} for claim in CLAIMS]
    return [{**v, "holds": min((t["holds"] for t in v["tests"]), key=RANK.get)} for v in found]


ANSWER = {True: "holds", False: "does not hold", "undecided": "undecided"}


def answer(v: dict) -> str:
    """Whether a claim holds; of each split by itself where these answer differently."""
    splits = {}
    for t in v["tests"]:  # the first word of what a test is of
        splits.setdefault(t["what"].split()[0], []).append(t["holds"])
    found = {split: min(holds, key=RANK.get) for split, holds in splits.items()}
    if len(set(found.values())) == 1:
        return ANSWER[v["holds"]]
    return ", ".join(f"{split}: {ANSWER[holds]}" for split, holds in found.items())


def scale(study: dict) -> str:
    size = study["parameters"]
    return f"{study['model']} ({size / 1e6:.2g} M parameters), {study['data']}, {study['epochs']} epochs"


def told(t: dict) -> str:
    """One test in words."""
    spread = f"{t['seeds']} equal seeds" if t["seeds"] > 1 else "one seed"
    if t["interval"]:
        spread = "{:.3g} to {:.3g}".format(*t["interval"])
    return f"{t['what']} {t['mean']:.3g} ({spread}), needs {t['sign']} {t['threshold']:.3g}"


def numbers_of(v: dict) -> str:
    """How many of a verdict's tests hold, and the numbers that decide it: tests that answer as it does."""
    shown = [t for t in v["tests"] if t["holds"] == v["holds"] and t["seeds"] > 0]
    numbers = "; ".join(map(told, shown if len(shown) <= 3 else shown[:2])) or "not run"
    return f"{sum(t['holds'] is True for t in v['tests'])} of {len(v['tests'])} tests hold; {numbers}"


def line(v: dict) -> str:
    """One verdict in one line."""
    seeds = max(t["seeds"] for t in v["tests"])
    return f"{v['claim']}: {answer(v)} ({numbers_of(v)}) [{seeds} seeds]"
