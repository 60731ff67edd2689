"""Section 5's claims as computed verdicts. Pure functions of the study's JSON: no model, no PyTorch.

A claim is a list of tests. Each test has one number a seed and a threshold; an interval of the mean over
seeds (`interval`: 95%, bootstrap from five seeds on, Student's t below; `share_interval` for yes and no)
decides: the test holds where the whole interval is on the right side, fails where it is on the other, and is
undecided otherwise. One seed decides nothing, and neither do fewer than five that are all equal: their
interval has no width, which shows that the number takes few values and not that the next seed will have the
same. A claim holds where all of its tests hold and fails where one fails.

The thresholds are ours where the paper has words: "early" is the first two thirds of the run, "exponentially
small" a forget quality below 1e-3 that has fallen by two decades, "a plateau" the last third of the run
within one decade of the peak, "greatly preserved" 80% of the start's utility; the paper's 0.55 on forget50
and forget90 is 88% of its start's. Forget quality is averaged in decades, and "exceeds" is said of this mean:
single seeds may do otherwise.
"""

import math
import statistics

import numpy as np
from scipy import stats

LINE = math.log10(0.05)
NPO_BASED, GA_BASED = ("npo", "npo+rt", "npo+kl"), ("ga", "ga+rt", "ga+kl")
BASELINES = (*GA_BASED, "idk+rt", "dpo", "dpo+rt", "dpo+kl", "kto", "kto+rt")
OTHERS = (*BASELINES, "npo", "npo+kl", "simnpo", "simnpo+rt")  # than npo+rt
ELSEWHERE = ("retain", "real_authors", "world_facts")
EARLY, SMALL, FALL, HOLDING = 2 / 3, -3.0, 2.0, 1.0  # share of the run; log10; decades; decades
PRESERVED, PRESERVED_BEYOND = 0.8, 0.88  # shares of the start's utility
REFUSING, REPEATING, OF_THE_WORDING, EXPLODING = 0.1, 0.3, 0.5, 3.0
UTILITIES = (0.5, 0.7, 0.9)  # shares of the start's utility at which methods are compared
RESAMPLES, COVERED, BOOTSTRAP_FROM = 2000, 0.95, 5


# ---------------------------------------------------------------- selecting runs

def chosen_runs(study: dict, split: str, method: str, retain_weight: float | None = None) -> list:
    """A method's runs with its chosen lr and beta, on the reported seeds, in their order; with weights of 1,
    or with another retain weight (0: npo at npo+rt's lr and beta)."""
    if method not in study["chosen"]:
        return []
    choice, plain = study["chosen"][method], method.removesuffix("+rt")
    wanted = {"split": split, "method": plain if retain_weight == 0 else method, "start_seed": 0,
              "epochs": study["epochs"], "forget_weight": 1, "kl_weight": int("+kl" in method),
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


def second_start(study: dict, split: str, method: str) -> list:
    choice = study["chosen"].get(method, {})
    return [r for r in study["runs"] if r["split"] == split and r["method"] == method and r["start_seed"] > 0
            and all(r[k] == choice.get(k) for k in ("lr", "beta"))]


def by_seed(first: list, second: list) -> list:
    """Pairs of runs with the same seed."""
    other = {r["seed"]: r for r in second}
    return [(r, other[r["seed"]]) for r in first if r["seed"] in other]


def samples_of(study: dict) -> list:
    """(who, samples) on forget10: the start, the retrained model, then every method's run of seed 1."""
    start = [("start", r["samples_start"]) for r in study["runs"] if "samples_start" in r][:1]
    retrained = [("retrained", m["samples"]) for m in study["retrained"]
                 if m["split"] == "retain90" and m["seed"] == 1 and "samples" in m]
    return start + retrained + [(m, r["samples"]) for m in study["chosen"]
                                for r in chosen_runs(study, "forget10", m) if "samples" in r]


# ---------------------------------------------------------------- a run in one number

def peak_at(run: dict) -> int:
    """Where in the run's evaluations, after the start, forget quality is largest; the first of equals."""
    values = run["forget_quality_log10"]
    return max(range(1, len(values)), key=values.__getitem__)


def peak(run: dict) -> float:
    return run["forget_quality_log10"][peak_at(run)]


def last(run: dict) -> float:
    return run["forget_quality_log10"][-1]


def kept_utility(run: dict, at: int = -1) -> float:
    """Utility as a share of the start's."""
    return run["model_utility"][at] / run["model_utility"][0]


def lowest_later(run: dict) -> float:
    """The lowest log10 forget quality in the last third of the run."""
    return min(q for step, q in zip(run["steps"], run["forget_quality_log10"], strict=True)
               if step >= 2 / 3 * run["steps"][-1])


def best_at_utility(run: dict, share: float) -> float:
    """The largest log10 forget quality of an evaluation that keeps this share of the start's utility; the
    start does."""
    return max(q for i, q in enumerate(run["forget_quality_log10"]) if kept_utility(run, i) >= share)


def rate(answers: dict, kind: str, sets: tuple) -> float:
    """Share of a kind among the last answers of these sets."""
    counts = [answers[name] for name in sets if name in answers]
    return sum(c[kind] for c in counts) / sum(c["answers"] for c in counts)


# ---------------------------------------------------------------- judging

def interval(values: list) -> tuple[float, float]:
    """95% interval of the mean over seeds, the same at every call. Percentile bootstrap with the percentiles
    moved out for small samples (Hesterberg, 2015); with so few seeds that resampling reaches no further than
    the smallest and the largest value, which cover half of the true means (two seeds) or three quarters
    (three), Student's t."""
    values, n = np.array(values, dtype=float), len(values)
    t = stats.t.ppf((1 + COVERED) / 2, n - 1)
    if n < BOOTSTRAP_FROM:
        half = t * values.std(ddof=1) / math.sqrt(n)
        return float(values.mean() - half), float(values.mean() + half)
    means = values[np.random.default_rng(0).integers(n, size=(RESAMPLES, n))].mean(axis=1)
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * t)
    return tuple(map(float, np.quantile(means, [tail, 1 - tail])))


def share_interval(values: list) -> tuple[float, float]:
    """95% interval of the share of seeds in which something is so: the exact binomial one (Clopper, Pearson,
    1934). With all seeds alike it takes six of them to be on one side of a half."""
    found = stats.binomtest(sum(values), len(values)).proportion_ci(COVERED, method="exact")
    return float(found.low), float(found.high)


def test(what: str, values: list, sign: str, threshold: float) -> dict:
    """{"what", "mean", "interval", "sign", "threshold", "seeds", "equal", "holds"}: is the mean above (sign
    ">") or below ("<") the threshold? Values of True and False are a share. "equal": too few seeds, all with
    one value."""
    is_share = bool(values) and all(isinstance(value, bool) for value in values)
    equal = not is_share and 1 < len(values) < BOOTSTRAP_FROM and bool(np.allclose(values, values[0]))
    found = {"what": what, "mean": statistics.mean(map(float, values)) if values else None, "interval": None,
             "sign": sign, "threshold": threshold, "seeds": len(values), "equal": equal, "holds": "undecided"}
    if len(values) < 2 or equal:
        return found
    low, high = share_interval(values) if is_share else interval(values)
    if low > threshold or high < threshold:
        found["holds"] = (low > threshold) == (sign == ">")
    return {**found, "interval": [low, high]}


def each(study: dict, split: str, methods: tuple, what: str, value, sign: str, threshold: float) -> list:
    """One test a method, of this value of its runs."""
    return [test(f"{split} {m}: {what}", [value(r) for r in chosen_runs(study, split, m)], sign, threshold)
            for m in methods]


def peaks(study: dict, split: str, methods: tuple, sign: str) -> list:
    """One test a method: is its peak forget quality above or below 0.05?"""
    return each(study, split, methods, "peak log10 forget quality", peak, sign, LINE)


def one_of(tests: list) -> dict:
    """The test that speaks for "some of them do": one that holds, else an undecided one, else the nearest to
    it."""
    rank = {True: 2, "undecided": 1, False: 0}
    return max(tests, key=lambda t: (rank[t["holds"]], -math.inf if t["mean"] is None else t["mean"]))


def combined(answers: list) -> bool | str:
    """True where all hold, False where one fails, else (or where there is none) undecided."""
    if False in answers:
        return False
    return "undecided" if not answers or "undecided" in answers else True


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
    return [t for split in ("forget05", "forget10") for t in each(
        study, split, NPO_BASED, "decades lost since the peak, in the last third",
        lambda r: peak(r) - lowest_later(r), "<", HOLDING)]


def npo_beats_ga(study: dict) -> list:
    """npo-based methods beat ga-based ones at equal utility"""
    tests = []
    for split in ("forget05", "forget10"):
        for npo, ga in zip(NPO_BASED, GA_BASED, strict=True):
            pairs = by_seed(chosen_runs(study, split, npo), chosen_runs(study, split, ga))
            for share in UTILITIES:
                gains = [best_at_utility(a, share) - best_at_utility(b, share) for a, b in pairs]
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
    rises, falls = ([peak(b) - peak(a) for a, b in by_seed(*pair)] for pair in ((zero, two), (two, five)))
    return [test("forget10: decades of peak forget quality from weight 0 to 2", rises, ">", 0.0),
            test("forget10: decades from weight 2 to 5", falls, "<", 0.0)]


def forget_kl(study: dict) -> list:
    """the divergence from the start on the forget set explodes for ga and stays moderate for npo"""
    tests = []
    for ga, npo in (("ga", "npo"), ("ga+rt", "npo+rt")):
        pairs = by_seed(chosen_runs(study, "forget10", ga), chosen_runs(study, "forget10", npo))
        ends = [(a["forget_kl"][-1], b["forget_kl"][-1]) for a, b in pairs]
        tests.append(test(f"forget10: log of the last forget KL of {ga} over {npo}'s",
                          [math.log(a / b) for a, b in ends if min(a, b) > 0], ">", math.log(EXPLODING)))
    return tests


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
    """Every claim of Section 5, in the paper's order: {"key", "claim", "holds", "tests", "scale"}."""
    found = []
    for claim in CLAIMS:
        tests = claim(study)
        found.append({"key": claim.__name__, "claim": claim.__doc__, "tests": tests, "scale": scale(study),
                      "holds": combined([t["holds"] for t in tests])})
    return found


# ---------------------------------------------------------------- a verdict in words

ANSWER = {True: "holds", False: "does not hold", "undecided": "undecided"}


def scale(study: dict) -> str:
    size = study["parameters"]
    return f"{study['model']} ({size / 1e6:.2g} M parameters), {study['data']}, {study['epochs']} epochs"


def deciding(v: dict) -> list:
    """The tests that a reader should see first: those that fail, else the undecided ones, else all."""
    run = [t for t in v["tests"] if t["seeds"] > 0]
    return [t for t in run if t["holds"] is False] or [t for t in run if t["holds"] == "undecided"] or run


def told(t: dict) -> str:
    """One test in words."""
    spread = f"{t['seeds']} equal seeds" if t["equal"] else "one seed"
    if t["interval"]:
        spread = "{:.3g} to {:.3g}".format(*t["interval"])
    return f"{t['what']} {t['mean']:.3g} ({spread}), needs {t['sign']} {t['threshold']:.3g}"


def numbers_of(v: dict) -> str:
    """How many of a verdict's tests hold, and the numbers that decide it."""
    shown = deciding(v)
    numbers = "; ".join(map(told, shown if len(shown) <= 3 else shown[:2])) or "not run"
    return f"{sum(t['holds'] is True for t in v['tests'])} of {len(v['tests'])} tests hold; {numbers}"


def line(v: dict) -> str:
    """One verdict in one line."""
    seeds = sorted({t["seeds"] for t in v["tests"]})
    span = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    return f"{v['claim']}: {ANSWER[v['holds']]} ({numbers_of(v)}) [{v['scale']}, {span} seeds]"
