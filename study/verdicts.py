"""Section 5's claims as computed verdicts, and the page that tells them. Pure functions of the JSON of
`figures_tofu.py`: no model, no PyTorch.

A claim is a list of tests. Each test has one number a seed and a threshold; an interval of the mean over seeds
(`interval`: 95%, bootstrap from five seeds on, Student's t below) decides: the test holds where the whole interval is
on the right side, fails where it is on the other, and is undecided otherwise, with fewer than two seeds too. A claim
holds where all of its tests hold and fails where one fails.

The thresholds are ours where the paper has words: "early" is the first two thirds of the run, "exponentially small" a
forget quality below 1e-3 that has fallen by two decades, "a plateau" the last third of the run within one decade of the
peak, "greatly preserved" 80% of the start's utility; the paper's 0.55 on forget50 and forget90 is 88% of its start's.
Forget quality is averaged in decades, and "exceeds" is said of this mean: single seeds may do otherwise.
"""

import math
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
from scipy import stats

from study.answers import KINDS, judgement

LINE = math.log10(0.05)
NPO_BASED = ("npo", "npo+rt", "npo+kl")
GA_BASED = ("ga", "ga+rt", "ga+kl")
BASELINES = (*GA_BASED, "idk+rt", "dpo", "dpo+rt", "dpo+kl", "kto", "kto+rt")
EARLY, SMALL, FALL, HOLDING = 2 / 3, -3.0, 2.0, 1.0  # share of the run; log10; decades; decades
PRESERVED, PRESERVED_BEYOND = 0.8, 0.88  # shares of the start's utility
REFUSING, REPEATING, OF_THE_WORDING, EXPLODING = 0.1, 0.3, 0.5, 3.0
UTILITIES = (0.5, 0.7, 0.9)  # shares of the start's utility at which methods are compared
RESAMPLES, COVERED, BOOTSTRAP_FROM = 2000, 0.95, 5


# ---------------------------------------------------------------- selecting runs

def chosen_runs(study: dict, split: str, method: str) -> list:
    """A method's runs with its chosen lr and beta and weights of 1, on the reported seeds, in their order."""
    hyper = study["chosen"].get(method)
    weights = dict(forget_weight=1, retain_weight=int("+rt" in method), kl_weight=int("+kl" in method))
    return _select(study, split=split, method=method, start_seed=0, **weights, **_lr_beta(hyper)) if hyper else []


def weighted_runs(study: dict, split: str, method: str, retain_weight: float) -> list:
    """The same with another retain weight (0: npo at npo+rt's lr and beta)."""
    hyper = study["chosen"].get(method)
    plain = method.removesuffix("+rt") if retain_weight == 0 else method
    return _select(study, split=split, method=plain, start_seed=0, forget_weight=1, retain_weight=retain_weight,
                   kl_weight=0, **_lr_beta(hyper)) if hyper else []


def tuned_runs(study: dict, split: str, method: str) -> list:
    """A method's runs with the retain weight that was chosen for this split (Figure 9)."""
    weight = study["chosen"].get(method, {}).get("weights", {}).get(split)
    return [] if weight is None else weighted_runs(study, split, method, weight)


def second_start(study: dict, split: str, method: str) -> list:
    hyper = study["chosen"].get(method)
    return [r for r in study["runs"] if hyper and r["split"] == split and r["method"] == method and r["start_seed"] > 0
            and all(r[k] == v for k, v in _lr_beta(hyper).items())]


def _lr_beta(hyper: dict) -> dict:
    return {k: hyper[k] for k in ("lr", "beta")}


def _select(study: dict, **wanted) -> list:
    wanted["epochs"] = study["epochs"]
    found = [r for r in study["runs"] if all(r[k] == v for k, v in wanted.items())
             and r["seed"] != study["budget"]["seed"]]
    assert len({r["seed"] for r in found}) == len(found), f"two records of one seed: {wanted}"
    return sorted(found, key=lambda r: r["seed"])


def peak_at(run: dict) -> int:
    """Where in the run's evaluations, after the start, forget quality is largest; the first of equals."""
    values = run["forget_quality_log10"]
    return max(range(1, len(values)), key=lambda i: (values[i], -i))


def peak(run: dict) -> float:
    return run["forget_quality_log10"][peak_at(run)]


def kept_utility(run: dict, at: int = -1) -> float:
    """Utility as a share of the start's."""
    return run["model_utility"][at] / run["model_utility"][0]


def later(run: dict) -> list:
    """Log10 forget quality in the last third of the run."""
    return [q for step, q in zip(run["steps"], run["forget_quality_log10"]) if step >= 2 / 3 * run["steps"][-1]]


def best_at_utility(run: dict, share: float) -> float:
    """The largest log10 forget quality of an evaluation that keeps this share of the start's utility; the start
    does."""
    return max(q for i, q in enumerate(run["forget_quality_log10"]) if kept_utility(run, i) >= share)


def rate(run: dict, kind: str, sets: tuple) -> float:
    """Share of a kind among the last answers of these sets."""
    counts = [run["answers"][name] for name in sets if name in run["answers"]]
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


def test(what: str, values: list, sign: str, threshold: float) -> dict:
    """{"what", "values", "mean", "interval", "threshold", "holds"}: is the mean above (sign ">") or below ("<") the
    threshold?"""
    if len(values) < 2:
        mean = statistics.mean(values) if values else None
        return {"what": what, "mean": mean, "interval": None, "sign": sign, "threshold": threshold,
                "seeds": len(values), "holds": "undecided"}
    low, high = interval(values)
    over, under = low > threshold, high < threshold
    holds = {">": (over, under), "<": (under, over)}[sign]
    return {"what": what, "mean": statistics.mean(values), "interval": [low, high], "sign": sign,
            "threshold": threshold, "seeds": len(values),
            "holds": True if holds[0] else False if holds[1] else "undecided"}


def combined(tests: list) -> bool | str:
    """True where all hold, False where one fails, else (or where there is none) undecided."""
    answers = [t["holds"] for t in tests]
    if False in answers:
        return False
    return "undecided" if not answers or "undecided" in answers else True


def verdict(study: dict, key: str, claim: str, tests: list) -> dict:
    """{"key", "claim", "holds", "tests", "scale"}."""
    return {"key": key, "claim": claim, "holds": combined(tests), "tests": tests, "scale": scale(study)}


def scale(study: dict) -> str:
    size = study["parameters"]
    return f"{study['model']} ({size / 1e6:.2g} M parameters), {study['data']}, {study['epochs']} epochs"


def peaks(study: dict, split: str, methods: tuple, sign: str) -> list:
    """One test a method: is its peak forget quality above or below 0.05?"""
    return [test(f"{split} {m}: peak log10 forget quality", [peak(r) for r in chosen_runs(study, split, m)], sign, LINE)
            for m in methods]


# ---------------------------------------------------------------- the claims

def ga_falls(study: dict) -> dict:
    tests = []
    for split in ("forget05", "forget10"):
        for method in ("ga", "ga+rt"):
            runs = chosen_runs(study, split, method)
            tests += [test(f"{split} {method}: peak at this share of the run",
                           [r["steps"][peak_at(r)] / r["steps"][-1] for r in runs], "<", EARLY),
                      test(f"{split} {method}: decades fallen since",
                           [peak(r) - r["forget_quality_log10"][-1] for r in runs], ">", FALL),
                      test(f"{split} {method}: last log10 forget quality",
                           [r["forget_quality_log10"][-1] for r in runs], "<", SMALL)]
    return verdict(study, "ga_falls", "ga and ga+rt peak early, then fall to exponentially small forget quality", tests)


def npo_plateau(study: dict) -> dict:
    lost = lambda split, m: [peak(r) - min(later(r)) for r in chosen_runs(study, split, m)]
    tests = [test(f"{split} {m}: decades lost since the peak, in the last third", lost(split, m), "<", HOLDING)
             for split in ("forget05", "forget10") for m in NPO_BASED]
    return verdict(study, "npo_plateau", "npo-based methods reach a plateau of forget quality and hold it", tests)


def npo_beats_ga(study: dict) -> dict:
    tests = []
    for split in ("forget05", "forget10"):
        for npo, ga in zip(NPO_BASED, GA_BASED):
            pairs = by_seed(chosen_runs(study, split, npo), chosen_runs(study, split, ga))
            tests += [test(f"{split} {npo} over {ga}: decades of forget quality at {share:.0%} of the start's utility",
                           [best_at_utility(a, share) - best_at_utility(b, share) for a, b in pairs], ">", 0.0)
                      for share in UTILITIES]
    return verdict(study, "npo_beats_ga", "npo-based methods beat ga-based ones at equal utility", tests)


def by_seed(first: list, second: list) -> list:
    """Pairs of runs with the same seed."""
    other = {r["seed"]: r for r in second}
    return [(r, other[r["seed"]]) for r in first if r["seed"] in other]


def forget05_only_npo(study: dict) -> dict:
    return verdict(study, "forget05_only_npo",
                   "on forget05 npo-based methods exceed a forget quality of 0.05, and no other does",
                   [one_of(peaks(study, "forget05", NPO_BASED, ">")), *peaks(study, "forget05", BASELINES, "<")])


def one_of(tests: list) -> dict:
    """The test that speaks for "some of them do": one that holds, else an undecided one, else the nearest to it."""
    rank = {True: 2, "undecided": 1, False: 0}
    return max(tests, key=lambda t: (rank[t["holds"]], -math.inf if t["mean"] is None else t["mean"]))


def forget10_npo_rt(study: dict) -> dict:
    runs = chosen_runs(study, "forget10", "npo+rt")
    tests = [test("forget10 npo+rt: lowest log10 forget quality of the last third", [min(later(r)) for r in runs], ">",
                  LINE),
             test("forget10 npo+rt: utility at the end, share of the start's", [kept_utility(r) for r in runs], ">",
                  PRESERVED)]
    for method in (*BASELINES, "npo", "npo+kl", "simnpo", "simnpo+rt"):
        both = [float(min(later(r)) > LINE and kept_utility(r) > PRESERVED)
                for r in chosen_runs(study, "forget10", method)]
        tests.append(test(f"forget10 {method}: share of seeds that do both", both, "<", 0.5))
    return verdict(study, "forget10_npo_rt",
                   "on forget10 npo+rt alone stays above 0.05 with its utility greatly preserved", tests)


def forget10_baselines(study: dict) -> dict:
    return verdict(study, "forget10_baselines", "on forget10 no baseline exceeds 0.05",
                   peaks(study, "forget10", BASELINES, "<"))


def refusals_elsewhere(study: dict) -> dict:
    others = ("retain", "real_authors", "world_facts")
    refused = lambda m: [rate(r, "refusal", others) for r in chosen_runs(study, "forget10", m)]
    tests = [test(f"forget10 {m}: refusals among answers outside the forget set", refused(m), ">", REFUSING)
             for m in ("idk+rt", "dpo", "dpo+rt")]
    return verdict(study, "refusals_elsewhere",
                   "idk and dpo answer \"I don't know\" to questions outside the forget set", tests)


def answers_on_forget_set(study: dict) -> dict:
    ga, npo = (chosen_runs(study, "forget10", m) for m in ("ga", "npo+rt"))
    repetition = lambda runs: [r["answers"]["forget"]["repetition_rate"] for r in runs]
    tests = [test("forget10 ga: repetition rate", repetition(ga), ">", REPEATING),
             test("forget10 npo+rt: repetition rate", repetition(npo), "<", REPEATING),
             test("forget10 npo+rt: answers of the wording with another fact",
                  [rate(r, "other fact", ("forget",)) for r in npo], ">", OF_THE_WORDING)]
    return verdict(study, "answers_on_forget_set",
                   "on the forget set ga's answers are repetitive, npo+rt's fluent, of the wording, with other facts",
                   tests)


def retain_weight(study: dict) -> dict:
    zero, two, five = (weighted_runs(study, "forget10", "npo+rt", w) for w in (0, 2, 5))
    gain = lambda a, b: [peak(y) - peak(x) for x, y in by_seed(a, b)]
    tests = [test("forget10: decades of peak forget quality from weight 0 to 2", gain(zero, two), ">", 0.0),
             test("forget10: decades from weight 2 to 5", gain(two, five), "<", 0.0)]
    return verdict(study, "retain_weight",
                   "npo+rt's forget quality rises with the retain weight from 0 to 2 and falls to 5", tests)


def forget_kl(study: dict) -> dict:
    tests = []
    for ga, npo in (("ga", "npo"), ("ga+rt", "npo+rt")):
        pairs = by_seed(chosen_runs(study, "forget10", ga), chosen_runs(study, "forget10", npo))
        last = [(a["forget_kl"][-1], b["forget_kl"][-1]) for a, b in pairs]
        ratios = [math.log(a / b) for a, b in last if min(a, b) > 0]
        tests.append(test(f"forget10: log of the last forget KL of {ga} over {npo}'s", ratios, ">",
                          math.log(EXPLODING)))
    return verdict(study, "forget_kl",
                   "the divergence from the start on the forget set explodes for ga and stays moderate for npo", tests)


def beyond10(study: dict) -> dict:
    tests = [t for split in ("forget20", "forget30") for t in peaks(study, split, ("npo+rt",), ">")]
    return verdict(study, "beyond10", "on forget20 and forget30 npo+rt exceeds 0.05", tests)


def tuned_beyond10(study: dict) -> dict:
    tests = [test(f"{split} npo+rt, tuned: best log10 forget quality with {PRESERVED_BEYOND:.0%} of the "
                  "start's utility",
                  [best_at_utility(r, PRESERVED_BEYOND) for r in tuned_runs(study, split, "npo+rt")], ">", LINE)
             for split in ("forget50", "forget90")]
    return verdict(study, "tuned_beyond10", "on forget50 and forget90 npo+rt with tuned weights exceeds 0.05 and keeps "
                   f"{PRESERVED_BEYOND:.0%} of the start's utility", tests)


CLAIMS = (ga_falls, npo_plateau, npo_beats_ga, forget05_only_npo, forget10_npo_rt, forget10_baselines,
          refusals_elsewhere, answers_on_forget_set, retain_weight, forget_kl, beyond10, tuned_beyond10)


def verdicts(study: dict) -> list[dict]:
    """Every claim of Section 5, in the paper's order."""
    return [claim(study) for claim in CLAIMS]


# ---------------------------------------------------------------- words

ANSWER = {True: "holds", False: "does not hold", "undecided": "undecided"}


def number(x: float | None) -> str:
    return "none" if x is None else f"{x:.3g}"


def deciding(v: dict) -> list:
    """The tests that a reader should see first: those that fail, else the undecided ones, else all."""
    failing = [t for t in v["tests"] if t["holds"] is False]
    return failing or [t for t in v["tests"] if t["holds"] == "undecided" and t["seeds"] > 0] or \
        [t for t in v["tests"] if t["seeds"] > 0]


def told(t: dict) -> str:
    """One test in words."""
    if t["seeds"] == 0:
        return f"{t['what']}: not run"
    spread = f" ({number(t['interval'][0])} to {number(t['interval'][1])})" if t["interval"] else " (one seed)"
    return f"{t['what']} {number(t['mean'])}{spread}, needs {t['sign']} {number(t['threshold'])}"


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


# Ten lines for a student: the keys of their verdicts, and what each would mean.
LESSONS = (
    (("ga_falls",), "Gradient ascent has no floor: what peaks early is destroyed by going on."),
    (("npo_plateau",), "NPO's weight W vanishes on what is forgotten: its forget quality levels off and stays."),
    (("npo_beats_ga",), "At equal utility NPO forgets better than gradient ascent."),
    (("forget_kl",), "The reason shows in the divergence from the start: unbounded for ga, moderate for npo."),
    (("retain_weight",), "A retain term helps forgetting itself, up to a point."),
    (("forget05_only_npo", "forget10_baselines"),
     "Only NPO-based methods pass for a retrained model (a p-value above 0.05)."),
    (("forget10_npo_rt",), "On forget10 it takes npo and rt together to forget and to keep."),
    (("answers_on_forget_set",), "Look at the answers: collapse repeats itself, NPO says something else."),
    (("refusals_elsewhere",), "Teaching \"I don't know\" teaches it for everything."),
    (("beyond10", "tuned_beyond10"), "With tuned weights npo+rt reaches beyond 10% of the data."),
)


def lessons(study: dict) -> list[str]:
    """Ten lines: what the paper teaches, and whether it was seen here."""
    by_key = {v["key"]: v for v in verdicts(study)}
    lines = []
    for place, (keys, sentence) in enumerate(LESSONS, 1):
        parts = [by_key[k] for k in keys]
        holds = combined([{"holds": v["holds"]} for v in parts])
        seen = {True: "Seen here", False: "NOT seen here", "undecided": "Undecided here"}[holds]
        shown = [t for v in parts for t in deciding(v) if t["holds"] == holds][:1] or [t for v in parts
                                                                                       for t in deciding(v)][:1]
        lines.append(f"{place}. {sentence} **{seen}**: {told(shown[0]) if shown else 'not run'}.")
    return lines


# ---------------------------------------------------------------- tables

def table(head: list, rows: list) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def mean_sd(values: list, spec: str = ".2f") -> str:
    sd = f" ± {statistics.stdev(values):{spec}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{spec}}{sd}"


def peak_row(names: list, runs: list) -> list:
    """A method at its peak and at the end: means over seeds with their standard deviation."""
    at = [peak_at(r) for r in runs]
    return [*names, len(runs), mean_sd([peak(r) for r in runs]),
            mean_sd([kept_utility(r, i) for r, i in zip(runs, at)]),
            mean_sd([r["steps"][i] / r["steps"][-1] * r["epochs"] for r, i in zip(runs, at)], ".1f"),
            mean_sd([r["forget_quality_log10"][-1] for r in runs]), mean_sd([kept_utility(r) for r in runs])]


PEAK_HEAD = ["seeds", "peak log10 forget quality", "utility there / start", "at epoch", "last log10 forget quality",
             "utility / start"]


def peak_table(study: dict, splits: tuple) -> list[str]:
    """Every method on these splits, with weights of 1."""
    found = [(split, m, chosen_runs(study, split, m)) for split in splits for m in study["chosen"]]
    rows = [peak_row([split, m], runs) for split, m, runs in found if runs]
    return table(["split", "method", *PEAK_HEAD], rows) if rows else []


def tuned_table(study: dict) -> list[str]:
    """Figure 9: every method with the retain weight that was chosen for the split; npo and ga have none to choose."""
    weight = lambda split, m: study["chosen"][m].get("weights", {}).get(split)
    found = [(split, m, weight(split, m), tuned_runs(study, split, m)) for split in ("forget50", "forget90")
             for m in study["chosen"]]
    rows = [peak_row([split, m, f"{w:g}"], runs) for split, m, w, runs in found if runs]
    return table(["split", "method", "retain weight", *PEAK_HEAD], rows) if rows else []


def weight_table(study: dict) -> list[str]:
    """npo+rt on forget10 by retain weight."""
    found = [(w, weighted_runs(study, "forget10", "npo+rt", w)) for w in study["budget"]["retain_weights"]]
    rows = [peak_row([f"{w:g}"], runs) for w, runs in found if runs]
    return table(["retain weight", *PEAK_HEAD], rows) if rows else []


def answers_table(study: dict) -> list[str]:
    """Counts of the last answers on forget10, all seeds together, in per cent."""
    named = [(m, [r["answers"] for r in chosen_runs(study, "forget10", m)]) for m in study["chosen"]]
    start = [r["answers_start"] for r in study["runs"] if "answers_start" in r][:1]
    retrained = [m["answers"] for m in study["retrained"] if m["split"] == "retain90" and "answers" in m]
    rows, others = [], ("retain", "real_authors", "world_facts")
    share = lambda runs, kind, sets: f"{100 * statistics.mean(rate({'answers': a}, kind, sets) for a in runs):.0f}"
    for name, runs in [("(start)", start), ("(retrained)", retrained), *named]:
        if runs:
            forget = [a["forget"] for a in runs]
            distinct = [f["distinct_2"] for f in forget if f["distinct_2"] is not None]
            rows.append([name, len(runs),
                         *(share(runs, k, ("forget",)) for k in KINDS),
                         f"{statistics.mean(distinct):.2f}" if distinct else "none",
                         f"{statistics.mean(f['repetition_rate'] for f in forget):.2f}", share(runs, "true", others),
                         share(runs, "refusal", others)])
    head = ["method", "runs", "true %", "other fact %", "refusal %", "repetitive %", "garbled %", "empty %",
            "distinct-2", "repetition rate", "elsewhere: true %", "elsewhere: refusal %"]
    return table(head, rows) if any(named_runs for _, named_runs in named) else []


def tuning_table(study: dict) -> list[str]:
    """Every setting that was tried, its score, and what was chosen."""
    rows = []
    for t in study["tried"]:
        choice = study["chosen"].get(t["method"], {})
        same = t["lr"] == choice.get("lr") and t["beta"] == choice.get("beta")
        default = t["split"] == study["budget"]["split"]
        taken = same and (default or t["retain_weight"] == choice["weights"].get(t["split"]))
        rows.append([t["method"], t["split"], f"{t['lr']:g}", f"{t['beta']:g}", f"{t['retain_weight']:g}",
                     f"{t['score']:.3f}", f"{t['peak_log10']:.2f}", "chosen" if taken else ""])
    head = ["method", "split", "lr", "beta", "retain weight", "score", "peak log10 forget quality", ""]
    return table(head, rows) if rows else []


def sensitivity_table(study: dict) -> list[str]:
    """Worst and best of each method's tuning runs."""
    rows = []
    for method in study["chosen"]:
        tried = [t for t in study["tried"] if t["method"] == method and t["split"] == study["budget"]["split"]]
        if tried:
            scores, peaks_ = sorted(t["score"] for t in tried), sorted(t["peak_log10"] for t in tried)
            rows.append([method, len(tried), f"{scores[0]:.3f} to {scores[-1]:.3f}",
                         f"{peaks_[0]:.2f} to {peaks_[-1]:.2f}"])
    return table(["method", "settings", "score", "peak log10 forget quality"], rows) if rows else []


def samples_of(study: dict) -> list:
    """(who, samples) on forget10: the start, the retrained model, then every method's run of seed 1."""
    start = [("start", r["samples_start"]) for r in study["runs"] if "samples_start" in r][:1]
    retrained = [("retrained", m["samples"]) for m in study["retrained"]
                 if m["split"] == "retain90" and m["seed"] == 1 and "samples" in m]
    methods = [(m, r["samples"]) for m in study["chosen"] for r in chosen_runs(study, "forget10", m) if "samples" in r]
    return start + retrained + methods


def samples_table(study: dict) -> list[str]:
    """Figure 7 as Markdown: the true answer, and each answer's kind."""
    named, lines = samples_of(study), []
    plain = lambda text: (text or "(empty)").replace("|", "/").replace("\n", " ")
    for place, sample in enumerate(named[0][1] if named else ()):
        lines += [f"\n**{sample['set']}**: {plain(sample['question'])} True answer: {plain(sample['answer'])}\n"]
        rows = [[who, plain(samples[place]["generation"]), samples[place]["kind"],
                 judgement(sample["set"], samples[place]["kind"])] for who, samples in named]
        lines += table(["model", "answer", "kind", ""], rows)
    return lines


def second_start_lines(study: dict) -> list[str]:
    lines = []
    for method in ("npo+rt", "ga+rt"):
        for other in second_start(study, "forget10", method):
            same = [r for r in chosen_runs(study, "forget10", method) if r["seed"] == other["seed"]]
            if same:
                lines.append(f"A second fine-tuned start, forget10, {method}, seed {other['seed']}: peak log10 forget "
                             f"quality {peak(other):.2f} against {peak(same[0]):.2f}, utility at the end "
                             f"{kept_utility(other):.2f} against {kept_utility(same[0]):.2f} of the start's.")
    return lines


def ceiling_lines(study: dict) -> list[str]:
    """Retrained against retrained, and the p-values that few rows allow."""
    lines = []
    for split, pairs in sorted(study.get("ceilings", {}).items()):
        n = study["forget_rows"][split]
        if pairs:
            values = sorted(p["log10"] for p in pairs)
            lines.append(f"- {split} ({n} rows): one retrained model against another of a different seed has log10 "
                         f"forget quality {statistics.median(values):.2f} in the median of {len(values)} pairs, "
                         f"{values[0]:.2f} to {values[-1]:.2f}; {sum(v > LINE for v in values)} of {len(values)} above "
                         "0.05.")
        if str(n) in study["lattice"]:
            steps = study["lattice"][str(n)]
            near = [f"{10**p:.3g} (D = {k}/{n})" for k, p in steps if 1e-3 < 10**p < 0.5]
            lines.append(f"- {split}: with {n} rows the p-value can take only {len({p for _, p in steps})} values: "
                         f"from 1 down through {', '.join(near)}, to the floor of 10^{steps[-1][1]:.1f} (D = 1).")
    return lines


# ---------------------------------------------------------------- the page

FIGURE_TITLES = {
    "figure2": "Figure 2: forget05, ga and npo over steps, with the answers of the rt variants",
    "figure5": "Figure 5: forget quality against utility at each method's peak",
    "figure6": "Figure 6: both over steps", "figure7": "Figure 7: answers",
    "figure8": "Figure 8: divergence from the start on the forget set, forget10",
    "figure9": "Figure 9: forget50 and forget90 with tuned weights", "retain-weight": "The retain weight of npo+rt",
    "beyond10": "Beyond 10%: as Figure 5"}


def page(studies: dict, folder: Path) -> str:
    """results/tofu.md from the JSON of every study in `folder`; name -> study."""
    lines = ["# The TOFU study: Figures 2 and 5 to 9", "",
             "Written by `python figures_tofu.py` (again with `--draw-only`) from the JSON in `tofu/`; every number is "
             "computed from there. How claims are judged, with their thresholds, is in the opening of "
             "`tofu_verdicts.py`.", ""]
    for name, study in studies.items():
        lines += section(name, study, folder)
    return "\n".join(lines).rstrip() + "\n"


def section(name: str, study: dict, folder: Path) -> list[str]:
    """One study: what to take away, verdicts, figures, tables."""
    made = study["provenance"]
    failed = [f"- not made: {f['name']}: {f['why']}" for f in study["failed"]]
    lines = [f"## {study['data']}, {study['model']}", "",
             f"{len(study['runs'])} unlearning runs, {len(study['retrained'])} models; {scale(study)}; "
             f"last command `{made['command']}`, {made['time']}. {origins_line(study)} {seeds_line(study)}", "",
             "### What to take away", "",
             "What the paper teaches, and whether it was seen at this scale, with the number that decides "
             f"(in brackets: {COVERED:.0%} interval over seeds).", "", *lessons(study), "", "### Verdicts", "",
             *table(["claim", "holds", "numbers"],
                    [[v["claim"], ANSWER[v["holds"]], numbers_of(v)] for v in verdicts(study)]),
             "", f"Scale: {scale(study)}. In brackets: {COVERED:.0%} interval of the mean over seeds (`interval`).", "",
             *failed]
    tables = {"figure5": [*peak_table(study, ("forget01", "forget05", "forget10")), "", *ceiling_lines(study), "",
                          *second_start_lines(study)],
              "figure7": ["Counts of all answers on forget10, at the end of the run:", "", *answers_table(study),
                          *samples_table(study)],
              "figure9": tuned_table(study),
              "retain-weight": weight_table(study),
              "beyond10": peak_table(study, ("forget20", "forget30", "forget50", "forget90"))}
    for key, title in FIGURE_TITLES.items():
        if (folder / f"{name}_{key}.png").exists():
            lines += [f"### {title}", "", f"![{title}](tofu/{name}_{key}.png)", "", *tables.get(key, []), ""]
    budget = study["budget"]
    if study.get("choices_from"):
        rows = [[m, f"{c['lr']:g}", f"{c['beta']:g}", ", ".join(f"{s} {w:g}" for s, w in c["weights"].items())]
                for m, c in study["chosen"].items()]
        return lines + ["### Hyper-parameters", "", f"Not tuned here: those of `{study['choices_from']}`.", "",
                        *table(["method", "lr", "beta", "retain weight of Figure 9"], rows), ""]
    rates = ", ".join(f"{lr:g}" for lr in budget["learning_rates"])
    further = ", then further betas at the best" * any(len(betas) > 1 for betas in budget["betas"].values())
    lines += ["### Hyper-parameters", "",
              f"One budget for every method, on {budget['split']}, seed {budget['seed']} (not reported): learning "
              f"rates {rates}{further}. Score: the largest, over evaluations, of the smaller of 1 - D/D_start and "
              "U/U_start (D: Kolmogorov-Smirnov statistic, U: utility).", "",
              "How much each method depends on them, over all that was tried on this split:", "",
              *sensitivity_table(study), "", *tuning_table(study), ""]
    return lines


def seeds_line(study: dict) -> str:
    """Which splits have how many seeds, over methods."""
    found = {}
    for split in sorted({r["split"] for r in study["runs"]}):
        counts = {len(chosen_runs(study, split, m)) for m in study["chosen"]} - {0}
        if counts:
            found[split] = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return "Seeds a method: " + ", ".join(f"{split} {n}" for split, n in found.items()) + "." if found else ""


def origins_line(study: dict) -> str:
    """Commits that the runs were made with, and the starts that they began from."""
    commits = Counter((r["commit"] or "unknown")[:12] + " with changes" * ("+" in (r["commit"] or ""))
                      for r in study["runs"])
    starts = {}  # (seed of the start, its weights) -> split -> seeds of its runs
    for r in study["runs"]:
        starts.setdefault((r["start_seed"], r["start_weights"]), {}).setdefault(r["split"], set()).add(r["seed"])
    seeds = lambda by_split: "; ".join(f"{split} seeds {', '.join(map(str, sorted(found)))}"
                                       for split, found in sorted(by_split.items()))
    return "Runs by commit: " + ", ".join(f"{c} {n}" for c, n in commits.most_common()) + ". Weights of the start: " + \
        " and ".join(f"{weights} (start seed {seed}: {seeds(by_split)})"
                     for (seed, weights), by_split in sorted(starts.items())) + "."
