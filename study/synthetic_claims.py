"""Section 4's claims as verdicts on the curves of `synthetic.py`.

A predicate takes curves {method: (2, E)} (forget, retain) of the methods that the claim is about, of one
instance or of a mean, and the steps (E,). It says whether the claim holds there, and the numbers that decide.
"""

import math

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial import KDTree

from study.sections import verdict

IN_THE_FIGURE = ("npo+rt", "npo", "ga+rt", "ga", "idk+rt", "dpo+rt")  # Figure 4: its claims are about these
APART = 100  # steps between evaluations, at most: the claims ask for halves and quarters of a run
SMALL, WITHIN = 0.005, 1200  # the paper's "small forget distance (less than 0.005) within 1200 steps"
LEVELS = np.geomspace(SMALL, 0.17, 10)  # forget distances at which frontiers are compared; the start is 1.70
NEAR = "at forget distances of at most a tenth of the start's"


def gets_small(curves: dict, steps: np.ndarray):
    """All reach a forget distance below SMALL within WITHIN steps."""
    least = {name: curve[0, steps <= WITHIN].min() for name, curve in curves.items()}
    return max(least.values()) < SMALL, {"least_forget_distance": least}


def stays_far(curves: dict, steps: np.ndarray):
    [curve] = curves.values()
    return curve[0].min() >= SMALL, {"least_forget_distance": curve[0].min()}


def diverges(curves: dict, steps: np.ndarray):
    """The retain distance at least triples, and grows by more in the second half than in the first."""
    numbers = {}
    for name, curve in curves.items():
        start, middle, end = curve[1, [0, len(steps) // 2, -1]]
        numbers[name] = {"start": start, "middle": middle, "end": end}
    holds = all(n["end"] > 3 * n["start"] and n["end"] - n["middle"] > n["middle"] - n["start"]
                or n["end"] == math.inf for n in numbers.values())
    return holds, numbers


def levels_off(curves: dict, steps: np.ndarray):
    """The retain distance: below five times its start, and growing less in the last quarter than before;
    while the forget distance has halved."""
    [(forget, retain)], quarter = curves.values(), (len(steps) - 1) // 4
    start, half, late, end = retain[[0, -1 - 2 * quarter, -1 - quarter, -1]]
    forgets = forget.min() < forget[0] / 2
    return forgets and retain.max() < 5 * start and (end <= late or end - late < late - half), {
        "start": start, "peak": retain.max(), "peak_step": steps[retain.argmax()],
        "third_quarter_growth": late - half, "last_quarter_growth": end - late}


def frontier(curve: np.ndarray) -> np.ndarray:
    """The Pareto frontier: the least retain distance at a forget distance of at most each of LEVELS, or inf.

    The path is straight in (log forget, retain) between evaluations: a fast method jumps over several levels.
    """
    (forget, retain), level = curve, LEVELS[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.log(forget[:-1] / level) / np.log(forget[:-1] / forget[1:])  # of the way to the next point
        crossing = retain[:-1] + part * np.diff(retain)
    crosses = ((forget[:-1] - level) * (forget[1:] - level) < 0) & np.isfinite(crossing)
    at_points = np.where(forget <= level, retain, math.inf).min(1)
    return np.minimum(at_points, np.where(crosses, crossing, math.inf).min(1))


def better_frontier(curves: dict, steps: np.ndarray):
    """At every level that any of them reaches, one at least, none has a smaller retain distance than the
    first, and at one it is the smallest."""
    own, *others = [frontier(curve) for curve in curves.values()]
    best = np.min(others, axis=0)
    reached = np.isfinite(np.minimum(own, best))
    ratio = own[reached] / best[reached]  # 0 where only the first gets there, inf where only another does
    median = float(np.median(ratio)) if len(ratio) else math.nan
    return (ratio <= 1).all() and (ratio < 1).any(), {
        "levels": LEVELS[reached], next(iter(curves)): own[reached], "best_of_the_others": best[reached],
        "median_ratio": median, "worst_ratio": ratio.max(initial=0.0)}


def distances_agree(curves: dict, steps: np.ndarray):
    """Forget and retain distance always differ by at most a tenth of their sum."""
    gap = {name: (abs(forget - retain) / (forget + retain)).max()
           for name, (forget, retain) in curves.items()}
    return np.max([*gap.values()]) <= 0.1, {"largest_relative_gap": gap}  # NaN, of two infinite ones, stays


def comes_closest(curves: dict, steps: np.ndarray):
    """The first's least forget and its least retain distance along the run are below the others', and below
    its start's."""
    first, *_ = curves.values()
    least = {name: curve.min(1) for name, curve in curves.items()}
    own, *others = least.values()
    holds = all((own < other).all() for other in [first[:, 0], *others])
    return holds, {"least_forget_and_retain_distance": least}


def path_gap(curve: np.ndarray, other: np.ndarray, steps: np.ndarray) -> float:
    """How far a path strays from another's line, in decades (axes log10), at its farthest point.

    The line is a cubic spline through the evaluations: chords cut the corner where ga turns back.
    """
    path, finite = np.log10(curve[:, np.isfinite(curve).all(0)]), np.isfinite(other).all(0)
    spline = CubicSpline(steps[finite], np.log10(other[:, finite]), axis=1)
    line = spline(np.linspace(0, steps[finite][-1], 20_001))  # so dense that its points stand for the line
    return float(KDTree(line.T).query(path.T)[0].max())


def goes_to_ga(curves: dict, steps: np.ndarray):
    """Of all beta, the smallest has the path closest to ga's, within 0.02 decades (5%) everywhere."""
    gap = {float(name.partition("@")[2]): path_gap(curve, curves["ga"], steps)
           for name, curve in curves.items() if name != "ga"}
    least = min(gap)
    return gap[least] == min(gap.values()) and gap[least] < 0.02, {
        "path_gap_decades": {f"{beta:g}": gap[beta] for beta in sorted(gap)},
        "smallest_beta": gap[least], "largest_beta": gap[max(gap)]}


# A claim, the methods that it is about, its predicate.
FIGURE4_GAP = (  # alpha > 0
    ("All methods of the figure but idk+rt reach a forget distance below 0.005 within 1200 steps",
     tuple(name for name in IN_THE_FIGURE if name != "idk+rt"), gets_small),
    ("idk+rt never does", ("idk+rt",), stays_far),
    ("The retain distances of ga and ga+rt diverge", ("ga", "ga+rt"), diverges),
    ("npo+rt's retain distance grows slowly and levels off", ("npo+rt",), levels_off),
    ("dpo+rt's retain distance grows slowly and levels off", ("dpo+rt",), levels_off),
    (f"npo+rt has the best Pareto frontier of the figure, {NEAR}", IN_THE_FIGURE, better_frontier),
    (f"Without the retain set npo has a better Pareto frontier than ga, {NEAR}", ("npo", "ga"),
     better_frontier))
FIGURE4_NO_GAP = (  # alpha = 0
    ("Forget and retain distances are equal", IN_THE_FIGURE, distances_agree),
    ("npo+rt attains the smallest forget and retain distances", IN_THE_FIGURE, comes_closest))
FIGURE3 = (("npo's curve goes to ga's as beta -> 0",
            ("ga", "npo@0.01", "npo@0.1", "npo@0.2", "npo@0.5", "npo@1"), goes_to_ga),)


def judged(claim: str, predicate, names: tuple, curves: np.ndarray, steps: np.ndarray) -> dict:
    """A claim on the mean of the instances, (K, M, 2, E), on each, and on means of five of many."""
    def judge(values):
        return predicate(dict(zip(names, values, strict=True)), steps)

    (holds, numbers), each = judge(curves.mean(0)), [judge(curve) for curve in curves]
    scalars = {key: [own[key] for _, own in each] for key in numbers if isinstance(numbers[key], float)}
    held = [bool(own_holds) for own_holds, _ in each]
    numbers |= {"share_of_instances": sum(held) / len(held), "instances": {"holds": held, **scalars}}
    if len(curves) >= 20:
        draws = np.random.default_rng(0).integers(len(curves), size=(200, 5))
        numbers["share_of_means_of_five"] = np.mean([judge(curves[draw].mean(0))[0] for draw in draws])
    return verdict(claim, holds, **numbers)


def verdicts(figure: int, alpha: float, names: list, curves: np.ndarray, steps: np.ndarray) -> dict:
    """Verdicts on a run; and the claims that it leaves undecided: it is too short, too seldom evaluated, or
    without a method they need."""
    claims, least_steps = FIGURE4_GAP if alpha > 0 else FIGURE4_NO_GAP, WITHIN
    if figure == 3:
        claims, least_steps = FIGURE3, 2000
    decided, undecided = [], []
    for claim, about, predicate in claims:
        missing = ", ".join(name for name in about if name not in names)
        needed = [f"methods {missing}"] * bool(missing)
        needed += [f"--steps {least_steps}"] * bool(steps[-1] < least_steps)
        needed += [f"--eval-every {APART}"] * bool(np.diff(steps).max() > APART)
        if needed:
            undecided.append({"claim": claim, "needs": ", ".join(needed)})
        else:
            own = curves[:, [names.index(name) for name in about]]
            decided.append(judged(claim, predicate, about, own, steps))
    return {"verdicts": decided, "undecided": undecided}
