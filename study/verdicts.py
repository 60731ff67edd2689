"""Section 5's claims as computed verdicts. Pure functions of the study's JSON: no model, no PyTorch.

A claim is a list of tests. Each test has one number a seed and a threshold; an interval of the mean over seeds
(`interval`: 95%, bootstrap from five seeds on, Student's t below; `share_interval` for yes and no) decides: the test
holds where the whole interval is on the right side, fails where it is on the other, and is undecided otherwise. One seed
decides nothing, and neither do fewer than five that are all equal: their interval would have no width, which says that
the number takes few values and not that the next seed must take the same. A claim holds where all of its tests hold and
fails where one fails.

The thresholds are ours where the paper has words: "early" is the first two thirds of the run, "exponentially small" a
forget quality below 1e-3 that has fallen by two decades, "a plateau" the last third of the run within one decade of the
peak, "greatly preserved" 80% of the start's utility; the paper's 0.55 on forget50 and forget90 is 88% of its start's.
Forget quality is averaged in decades, and "exceeds" is said of this mean: single seeds may do otherwise.
"""

import math
import statistics

import numpy as np
from scipy import stats

LINE = math.log10(0.05)
NPO_BASED = ("npo", "npo+rt", "npo+kl")
GA_BASED = ("ga", "ga+rt", "ga+kl")
BASELINES = (*GA_BASED, "idk+rt", "dpo", "dpo+rt", "dpo+kl", "kto", "kto+rt")
ELSEWHERE = ("retain", "real_authors", "world_facts")
EARLY, SMALL, FALL, HOLDING = 2 / 3, -3.0, 2.0, 1.0  # share of the run; log10; decades; decades
PRESERVED, PRESERVED_BEYOND = 0.8, 0.88  # shares of the start's utility
REFUSING, REPEATING, OF_THE_WORDING, EXPLODING = 0.1, 0.3, 0.5, 3.0
UTILITIES = (0.5, 0.7, 0.9)  # shares of the start's utility at which methods are compared
RESAMPLES, COVERED, BOOTSTRAP_FROM = 2000, 0.95, 5


# ---------------------------------------------------------------- selecting runs

def chosen_runs(study: dict, split: str, method: str, retain_weight: float | None = None) -> list:
    """A method's runs with its chosen lr and beta, on the reported seeds, in their order; with weights of 1, or with
    another retain weight (0: npo at npo+rt's lr and beta)."""
    if method not in study["chosen"]:
        return []
    wanted = {"split": split, "method": method.removesuffix("+rt") if retain_weight == 0 else method, "start_seed": 0,
              "epochs": study["epochs"], "forget_weight": 1, "kl_weight": int("+kl" in method),
              "retain_weight": int("+rt" in method) if retain_weight is None else retain_weight,
              **{k: study["chosen"][method][k] for k in ("lr", "beta")}}
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
    methods = [(m, r["samples"]) for m in study["chosen"] for r in chosen_runs(study, "forget10", m) if "samples" in r]
    return start + retrained + methods


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
    """The largest log10 forget quality of an evaluation that keeps this share of the start's utility; the start
    does."""
    return max(q for i, q in enumerate(run["forget_quality_log10"]) if kept_utility(run, i) >= share)


def rate(answers: dict, kind: str, sets: tuple) -> float:
    """Share of a kind among the last answers of these sets."""
    counts = [answers[name] for name in sets if name in answers]
    return sum(c[kind] for c in counts) / sum(c["answers"] for c in counts)


# ---------------------------------------------------------------- judging

def interval(values: list) -> tuple[float, float]:
    """95% interval of the mean over seeds, the same at every call. Percentile bootstrap with the percentiles moved out
    for small samples (Hesterberg, 2015); with so few seeds that resampling reaches no further than the smallest and the
    largest value, which cover half of the true means (two seeds) or three quarters (three), Student's t."""
    values, n = np.array(values, dtype=float), len(values)
    t = stats.t.ppf((1 + COVERED) / 2, n - 1)
    if n < BOOTSTRAP_FROM:
        half = t * values.std(ddof=1) / math.sqrt(n)
        return float(values.mean() - half), float(values.mean() + half)
    means = values[np.random.default_rng(0).integers(n, size=(RESAMPLES, n))].mean(axis=1)
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * t)
    return tuple(map(float, np.quantile(means, [tail, 1 - tail])))


def share_interval(values: list) -> tuple[float, float]:
    """95% interval of the share of seeds in which something is so: the exact binomial one (Clopper and Pearson)."""
    found = stats.binomtest(sum(values), len(values)).proportion_ci(COVERED, method="exact")
    return float(found.low), float(found.high)


def test(what: str, values: list, sign: str, threshold: float) -> dict:
    """{"what", "mean", "interval", "sign", "threshold", "seeds", "equal", "holds"}: is the mean above (sign ">") or
    below ("<") the threshold? Values of True and False are a share. "equal": the values are too few to be all the same
    and decide."""
    is_share = False
    equal = False
    found = {"what": what, "mean": statistics.mean(map(float, values)) if values else None, "interval": None,
             "sign": sign, "threshold": threshold, "seeds": len(values), "equal": equal, "holds": "undecided"}
    if len(values) < 2 or equal:
        return found
    low, high = share_interval(values) if is_share else interval(values)
    if low > threshold or high < threshold:
        found["holds"] = (low > threshold) == (sign == ">")
    return {**found, "interval": [low, high]}


def combined(answers: list) -> bool | str:
    """True where all hold, False where one fails, else (or where there is none) undecided."""
    if False in answers:
        return False
    return "undecided" if not answers or "undecided" in answers else True


def scale(study: dict) -> str:
    size = study["parameters"]
    return f"{study['model']} ({size / 1e6:.2g} M parameters), {study['data']}, {study['epochs']} epochs"


def peaks(study: dict, split: str, methods: tuple, sign: str) -> list:
    """One test a method: is its peak forget quality above or below 0.05?"""
    return [test(f"{split} {m}: peak log10 forget quality", [peak(r) for r in chosen_runs(study, split, m)], sign, LINE)
            for m in methods]


# ---------------------------------------------------------------- the claims: what the paper says, and its tests

def ga_falls(study: dict) -> tuple[str, list]:
    tests = []
    for split in ("forget05", "forget10"):
        for method in ("ga", "ga+rt"):
            runs = chosen_runs(study, split, method)
            tests += [test(f"{split} {method}: peak at this share of the run",
                           [r["steps"][peak_at(r)] / r["steps"][-1] for r in runs], "<", EARLY),
                      test(f"{split} {method}: decades fallen since", [peak(r) - last(r) for r in runs], ">", FALL),
                      test(f"{split} {method}: last log10 forget quality", [last(r) for r in runs], "<", SMALL)]
    return "ga and ga+rt peak early, then fall to exponentially small forget quality", tests


def npo_plateau(study: dict) -> tuple[str, list]:
    tests = [test(f"{split} {m}: decades lost since the peak, in the last third",
                  [peak(r) - lowest_later(r) for r in chosen_runs(study, split, m)], "<", HOLDING)
             for split in ("forget05", "forget10") for m in NPO_BASED]
    return "npo-based methods reach a plateau of forget quality and hold it", tests


def npo_beats_ga(study: dict) -> tuple[str, list]:
    tests = []
    for split in ("forget05", "forget10"):
        for npo, ga in zip(NPO_BASED, GA_BASED, strict=True):
            pairs = by_seed(chosen_runs(study, split, npo), chosen_runs(study, split, ga))
            tests += [test(f"{split} {npo} over {ga}: decades of forget quality at {share:.0%} of the start's utility",
                           [best_at_utility(a, share) - best_at_utility(b, share) for a, b in pairs], ">", 0.0)
                      for share in UTILITIES]
    return "npo-based methods beat ga-based ones at equal utility", tests


def forget05_only_npo(study: dict) -> tuple[str, list]:
    return ("on forget05 npo-based methods exceed a forget quality of 0.05, and no other does",
            [one_of(peaks(study, "forget05", NPO_BASED, ">")), *peaks(study, "forget05", BASELINES, "<")])


def one_of(tests: list) -> dict:
    """The test that speaks for "some of them do": one that holds, else an undecided one, else the nearest to it."""
    rank = {True: 2, "undecided": 1, False: 0}
    return max(tests, key=lambda t: (rank[t["holds"]], -math.inf if t["mean"] is None else t["mean"]))


def forget10_npo_rt(study: dict) -> tuple[str, list]:
    runs = chosen_runs(study, "forget10", "npo+rt")
    tests = [test("forget10 npo+rt: lowest log10 forget quality of the last third", [lowest_later(r) for r in runs], ">",
                  LINE),
             test("forget10 npo+rt: utility at the end, share of the start's", [kept_utility(r) for r in runs], ">",
                  PRESERVED)]
    for method in (*BASELINES, "npo", "npo+kl", "simnpo", "simnpo+rt"):
        both = [lowest_later(r) > LINE and kept_utility(r) > PRESERVED for r in chosen_runs(study, "forget10", method)]
        tests.append(test(f"forget10 {method}: share of seeds that do both", both, "<", 0.5))
    return "on forget10 npo+rt alone stays above 0.05 with its utility greatly preserved", tests


def forget10_baselines(study: dict) -> tuple[str, list]:
    return "on forget10 no baseline exceeds 0.05", peaks(study, "forget10", BASELINES, "<")


def refusals_elsewhere(study: dict) -> tuple[str, list]:
    tests = [test(f"forget10 {m}: refusals among answers outside the forget set",
                  [rate(r["answers"], "refusal", ELSEWHERE) for r in chosen_runs(study, "forget10", m)], ">", REFUSING)
             for m in ("idk+rt", "dpo", "dpo+rt")]
    return "idk and dpo answer \"I don't know\" to questions outside the forget set", tests


def answers_on_forget_set(study: dict) -> tuple[str, list]:
    ga, npo = ([r["answers"] for r in chosen_runs(study, "forget10", m)] for m in ("ga", "npo+rt"))
    tests = [test("forget10 ga: repetition rate", [a["forget"]["repetition_rate"] for a in ga], ">", REPEATING),
             test("forget10 npo+rt: repetition rate", [a["forget"]["repetition_rate"] for a in npo], "<", REPEATING),
             test("forget10 npo+rt: answers of the wording with another fact",
                  [rate(a, "other fact", ("forget",)) for a in npo], ">", OF_THE_WORDING)]
    return "on the forget set ga's answers are repetitive, npo+rt's fluent, of the wording, with other facts", tests


def retain_weight(study: dict) -> tuple[str, list]:
    zero, two, five = (chosen_runs(study, "forget10", "npo+rt", w) for w in (0, 2, 5))
    tests = [test("forget10: decades of peak forget quality from weight 0 to 2",
                  [peak(b) - peak(a) for a, b in by_seed(zero, two)], ">", 0.0),
             test("forget10: decades from weight 2 to 5", [peak(b) - peak(a) for a, b in by_seed(two, five)], "<", 0.0)]
    return "npo+rt's forget quality rises with the retain weight from 0 to 2 and falls to 5", tests


def forget_kl(study: dict) -> tuple[str, list]:
    tests = []
    for ga, npo in (("ga", "npo"), ("ga+rt", "npo+rt")):
        pairs = by_seed(chosen_runs(study, "forget10", ga), chosen_runs(study, "forget10", npo))
        ends = [(a["forget_kl"][-1], b["forget_kl"][-1]) for a, b in pairs]
        tests.append(test(f"forget10: log of the last forget KL of {ga} over {npo}'s",
                          [math.log(a / b) for a, b in ends if min(a, b) > 0], ">", math.log(EXPLODING)))
    return "the divergence from the start on the forget set explodes for ga and stays moderate for npo", tests


def beyond10(study: dict) -> tuple[str, list]:
    return ("on forget20 and forget30 npo+rt exceeds 0.05",
            [t for split in ("forget20", "forget30") for t in peaks(study, split, ("npo+rt",), ">")])


def tuned_beyond10(study: dict) -> tuple[str, list]:
    tests = [test(f"{split} npo+rt, tuned: best log10 forget quality with {PRESERVED_BEYOND:.0%} of the start's utility",
                  [best_at_utility(r, PRESERVED_BEYOND) for r in tuned_runs(study, split, "npo+rt")], ">", LINE)
             for split in ("forget50", "forget90")]
    return (f"on forget50 and forget90 npo+rt with tuned weights exceeds 0.05 and keeps {PRESERVED_BEYOND:.0%} of the "
            "start's utility", tests)


CLAIMS = (ga_falls, npo_plateau, npo_beats_ga, forget05_only_npo, forget10_npo_rt, forget10_baselines,
          refusals_elsewhere, answers_on_forget_set, retain_weight, forget_kl, beyond10, tuned_beyond10)


def verdicts(study: dict) -> list[dict]:
    """Every claim of Section 5, in the paper's order: {"key", "claim", "holds", "tests", "scale"}."""
    found = []
    for claim in CLAIMS:
        words, tests = claim(study)
        found.append({"key": claim.__name__, "claim": words, "holds": combined([t["holds"] for t in tests]),
                      "tests": tests, "scale": scale(study)})
    return found


# ---------------------------------------------------------------- a verdict in words

ANSWER = {True: "holds", False: "does not hold", "undecided": "undecided"}


def number(x: float) -> str:
    return f"{x:.3g}"


def deciding(v: dict) -> list:
    """The tests that a reader should see first: those that fail, else the undecided ones, else all."""
    run = [t for t in v["tests"] if t["seeds"] > 0]
    return [t for t in run if t["holds"] is False] or [t for t in run if t["holds"] == "undecided"] or run


def told(t: dict) -> str:
    """One test in words."""
    spread = "one seed"
    if t["equal"]:
        spread = f"{t['seeds']} equal seeds"
    elif t["interval"]:
        spread = f"{number(t['interval'][0])} to {number(t['interval'][1])}"
    return f"{t['what']} {number(t['mean'])} ({spread}), needs {t['sign']} {number(t['threshold'])}"


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
