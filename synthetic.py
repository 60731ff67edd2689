"""Section 4 of the NPO paper: Gaussian-logistic data, a random-feature model, ten unlearning methods; Figures 3 and 4.

    python synthetic.py --alpha 1                   # Figure 4 (a1)-(a3): forget and retain means far apart
    python synthetic.py --all                       # Figure 4 for alpha = 1 and alpha = 0
    python synthetic.py --figure 3                  # NPO's path goes to gradient ascent's as beta -> 0
    python synthetic.py --alpha 1 --instances 50    # does it hold on instances that the paper did not draw?
    python synthetic.py --alpha 1 --grid-search     # the grid behind lr and beta

The experiment: x ~ N(+-alpha 1, I_16), labels from a logistic model whose slope and intercept are opposite on the
forget and the retain set, policy pi_theta(1|x) = sigmoid(theta . relu(W x)) with W fixed. pi_ref is trained on both
sets, pi_retr (the retrained model) on the retain set alone. Unlearning starts at pi_ref and descends one of the
objectives of `losses.py`; a good method comes close to pi_retr in KL(pi_retr || pi_theta), on forget points (the forget
distance) and on retain points (the retain distance). The published curves are reproduced, random stream included.

Where the published runs differ from the paper's text we follow the runs; the flag in brackets gives the text's version:
- DPO has the factor 2/beta, Eq. 2 has 1/beta [--dpo-scale 1]. `losses.dpo_loss` is the text's; here it is doubled.
- K is D(pi_ref || pi_theta), the text's is D(pi_theta || pi_ref) [--kl-direction policy_reference].
- Distances are means over 1000 fresh test points, the text's are over the forget and the retain set [--points train].
- pi_ref and pi_retr are 20,000 steps of gradient descent from 0, not optima. The optimum on the retain set is nearly
  unbounded (a few directions are all but separable), so the "retrained model" is early-stopped, and it has to be.
- Figure 3's caption says "difference"; what is drawn is the distance from pi_retr on both axes, as in Figure 4 (a3).

Speed: the gradient of every objective is (1/n) Z^T (dL/dlogit), so one step of all methods is two matrix products on
the stack of their parameters (closed-form dL/dlogit, checked against autograd on `losses.py` in the tests). One
instance at a time, since its features (1 MB) then stay in a core's cache; instances are spread over processes.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

# the processes share the cores; BLAS threads on 128-column matrices would only get in their way
if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import matplotlib
import numpy as np
import torch
from scipy.interpolate import CubicSpline
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Shapes: D input dimensions, N features, n rows, M methods (unlearned together), K instances, E evaluations.
D, N = 16, 128
RETAIN_ROWS, FORGET_ROWS, TEST_ROWS = 1000, 200, 1000
PUBLISHED_SEEDS = (1000, 2000, 3000, 4000, 5000)
TRAIN_LR, TRAIN_STEPS = 0.05, 20_000  # of pi_ref and pi_retr
METHODS = ("npo+rt", "npo", "npo+kl", "ga+rt", "ga", "ga+kl", "idk+rt", "dpo+rt", "dpo", "dpo+kl")
# what the paper's Figure 4 shows and its claims are about
IN_THE_FIGURE = ("npo+rt", "npo", "ga+rt", "ga", "idk+rt", "dpo+rt")
PUBLISHED = {  # alpha -> family -> (lr, beta)
    1: {"ga": (5e-4, None), "idk": (5e-4, None), "npo": (5e-3, 1.0), "dpo": (5e-3, 0.1)},
    0: {"ga": (1e-4, None), "idk": (1e-4, None), "npo": (5e-2, 10.0), "dpo": (5e-2, 5.0)},
}
FIGURE3_LR, FIGURE3_BETAS = 5e-4, (0.01, 0.1, 0.2, 0.5, 1.0)
GRID_LR = (2e-5, 1e-4, 5e-4, 2e-3, 5e-3, 2e-2, 5e-2)
GRID_BETA = (0.1, 0.5, 1.0, 5.0, 10.0)
COLUMNS = 32  # a grid's settings are unlearned this many at a time, again for the cache
KEPT = Path(__file__).resolve().parent / "runs" / "synthetic"  # pi_ref and pi_retr, one small file an instance


# ---------------------------------------------------------------------------------------------------- the data


@dataclass
class Instance:
    """One draw of the experiment, for every alpha: inputs kept less their mean, which alpha shifts; labels 0 or 1."""
    W: np.ndarray  # (N, D), the fixed first layer
    x_retain: np.ndarray  # (1000, D)
    y_retain: np.ndarray  # (1000,)
    x_forget: np.ndarray  # (200, D)
    y_forget: np.ndarray  # (200,)
    y_idk: np.ndarray  # (200,), Bern(1/2): the "I don't know" of a problem with two answers
    x_retain_test: np.ndarray  # (1000, D)
    x_forget_test: np.ndarray  # (1000, D)

    def features(self, x: np.ndarray, mean: float) -> np.ndarray:
        """relu(W (x + mean)), (n, D) -> (n, N)."""
        return np.maximum((x + mean) @ self.W.T, 0)


def forget_probs(x: np.ndarray) -> np.ndarray:
    """P(y = 1 | x) on forget inputs less their mean, (n, D) -> (n,). Retain inputs have 1 minus this."""
    return 1 / (1 + np.exp(-(x.sum(1) / math.sqrt(D) + 1)))


def fresh_instance(seed: int, number: int) -> Instance:
    """Instance `number` of the stream `seed`: plain numpy, for everything that isn't the published five."""
    rng = np.random.default_rng([seed, number])
    W = rng.standard_normal((N, D)) / math.sqrt(D)
    x_retain, x_forget, x_retain_test, x_forget_test = (
        rng.standard_normal((n, D)) for n in (RETAIN_ROWS, FORGET_ROWS, TEST_ROWS, TEST_ROWS))
    y_retain = (rng.random(RETAIN_ROWS) < 1 - forget_probs(x_retain)).astype(float)
    y_forget = (rng.random(FORGET_ROWS) < forget_probs(x_forget)).astype(float)
    y_idk = (rng.random(FORGET_ROWS) < 0.5).astype(float)
    return Instance(W, x_retain, y_retain, x_forget, y_forget, y_idk, x_retain_test, x_forget_test)


# ------------------------------------------------------------------------------- the models, and the ten methods


def sigmoid_(u: np.ndarray) -> np.ndarray:
    """sigmoid(u), in place: exp overflows to inf and 1/inf is the right 0."""
    np.negative(u, out=u)
    np.exp(u, out=u)
    u += 1
    return np.reciprocal(u, out=u)


def log_sigmoid(u: np.ndarray) -> np.ndarray:
    return np.minimum(u, 0) - np.log1p(np.exp(-np.abs(u)))


def reference_and_retrained(Z_retain: np.ndarray, y_retain: np.ndarray, Z_forget: np.ndarray, y_forget: np.ndarray,
                            lr: float = TRAIN_LR, steps: int = TRAIN_STEPS) -> np.ndarray:
    """theta of pi_ref and pi_retr, (N, 2): full-batch gradient descent on the mean cross-entropy, from 0."""
    def descend(Z, y):
        towards_labels = lr / len(Z) * (y @ Z)  # the gradient is Z^T (p - y); its y half never changes
        theta, probs = np.zeros(N), np.empty(len(Z))
        for _ in range(steps):
            sigmoid_(np.matmul(Z, theta, out=probs))
            theta += towards_labels
            theta -= lr / len(Z) * (probs @ Z)
        return theta

    # One after the other: BLAS is twice as fast on two vectors as on a matrix of two columns, for which it copies Z.
    both = np.concatenate([Z_retain, Z_forget]), np.concatenate([y_retain, y_forget])
    return np.stack([descend(*both), descend(Z_retain, y_retain)], axis=1)


@dataclass(frozen=True)
class Method:
    """An objective and its step: `family` acts on the forget set, `retain` is "rt", "kl" or "" for none."""
    name: str
    family: str  # ga, npo, dpo or idk
    retain: str
    lr: float
    beta: float | None = None


def make_method(name: str, lr: float, beta: float | None, label: str | None = None) -> Method:
    family, _, retain = name.partition("+")
    return Method(label or name, family, retain, lr, beta)


def forget_slope(family: str, margin: np.ndarray, reference_margin: np.ndarray, same: np.ndarray,
                 beta: np.ndarray | None, dpo_scale: float) -> np.ndarray:
    """dL/dmargin of every forget sample, (M, n): the closed form of each objective's gradient.

    margin (M, n) is the logit of the sample's own label y: pi(y|x) = sigmoid(margin), and every gradient is this slope
    times the signed features. `same` (n,) is 1 where y_idk is y; where it isn't, y_idk has log-odds -margin.
    beta (M, 1). The default dpo_scale of the published runs is 2.
    """
    if family == "idk":  # cross-entropy on y_idk
        return sigmoid_(margin.copy()) - same
    if family == "dpo":  # Eq. 2: Delta_chosen - Delta_rejected is reference_margin - margin where y_idk differs, else 0
        return dpo_scale * (1 - same) * sigmoid_(beta * (margin - reference_margin))
    ga = sigmoid_(-margin)  # Eq. 1: d log sigmoid(margin) = 1 - pi(y|x)
    if family == "ga":
        return ga
    log_ratio = log_sigmoid(margin) - log_sigmoid(reference_margin)
    return 2 * sigmoid_(beta * log_ratio) * ga  # Eq. 5: W times gradient ascent's; W as in losses.npo_weight


def kl_distance(retrained_logits: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(pi_retr || pi_theta) in nats, mean over the n points: (n, 1) and (n, M) -> (M,)."""
    probs = sigmoid_(retrained_logits.copy())
    return (probs * (retrained_logits - logits) - log_sigmoid(-logits) + log_sigmoid(-retrained_logits)).mean(0)


def retain_slope(logits: np.ndarray, reference_logits: np.ndarray, y: np.ndarray, retain: str,
                 kl_direction: str) -> np.ndarray:
    """dL/dlogit of the retain term ("rt" or "kl") for logits (n, M) of label 1; reference_logits and y are (n, 1)."""
    # the text's K = D(pi_theta || pi_ref): p (1 - p) (log-odds ratio)
    if retain == "kl" and kl_direction == "policy_reference":
        return sigmoid_(logits.copy()) * sigmoid_(-logits) * (logits - reference_logits)
    # cross-entropy's target is y, that of D(pi_ref || .) p_ref
    target = y if retain == "rt" else sigmoid_(reference_logits.copy())
    return sigmoid_(logits.copy()) - target


class Problem:
    """An instance at one alpha with its pi_ref and pi_retr: unlearns any list of methods and measures on the way."""

    def __init__(self, instance: Instance, alpha: float, models: np.ndarray, points: str = "test"):
        self.y_retain, sign = instance.y_retain, 2 * instance.y_forget - 1
        self.Z_retain = instance.features(instance.x_retain, -alpha)
        self.Z_forget = instance.features(instance.x_forget, +alpha) * sign[:, None]  # signed: Z theta is the margin
        self.same = (instance.y_idk == instance.y_forget).astype(float)
        self.reference, retrained = models[:, :1], models[:, 1:]
        self.test = [(Z, Z @ retrained) for Z in (
            (instance.features(instance.x_forget_test, +alpha), instance.features(instance.x_retain_test, -alpha))
            if points == "test" else (self.Z_forget * sign[:, None], self.Z_retain))]

    def distances(self, theta: np.ndarray) -> np.ndarray:
        """Forget and retain distance of (N, M) parameters, (2, M). Overflow (inf - inf too) is an infinite distance."""
        distance = np.stack([kl_distance(retrained_logits, Z @ theta) for Z, retrained_logits in self.test])
        distance[~np.isfinite(distance)] = math.inf
        return distance

    def unlearn(self, methods: list, steps: int, eval_steps: list, dpo_scale: float, kl_direction: str) -> np.ndarray:
        """Full-batch gradient descent from pi_ref, all methods at once: distances at `eval_steps`, (M, 2, E)."""
        # columns in the order kl, rt, none: each retain term, and the pair of them, is then a slice
        rank = {"kl": 0, "rt": 1, "": 2}
        order = sorted(range(len(methods)), key=lambda m: (rank[methods[m].retain], methods[m].family))
        methods = [methods[m] for m in order]
        with_retain = sum(bool(method.retain) for method in methods)
        kl = slice(0, sum(method.retain == "kl" for method in methods))
        rt = slice(kl.stop, with_retain)
        families = []  # the columns of one family, and their betas
        for family in sorted({method.family for method in methods}):
            columns = [m for m, method in enumerate(methods) if method.family == family]
            families.append((family, columns, np.array([[methods[m].beta or math.nan] for m in columns])))
        # the losses are means over their set
        forget_lr = np.array([method.lr for method in methods]) / len(self.Z_forget)
        retain_lr = np.array([method.lr for method in methods[:with_retain]]) / len(self.Z_retain)
        theta = np.repeat(self.reference, len(methods), axis=1)
        reference_margin, reference_logits = (self.Z_forget @ self.reference).T, self.Z_retain @ self.reference
        y = self.y_retain[:, None]
        slope = np.empty((len(methods), len(self.Z_forget)))
        logits = np.empty((len(self.Z_retain), with_retain))
        kept, wanted = [], set(eval_steps)
        for step in range(steps + 1):
            if step in wanted:
                kept.append(self.distances(theta))
            if step == steps:
                break
            margin = np.ascontiguousarray((self.Z_forget @ theta).T)
            for family, columns, beta in families:
                slope[columns] = forget_slope(family, margin[columns], reference_margin, self.same, beta, dpo_scale)
            move = self.Z_forget.T @ slope.T * forget_lr
            if with_retain:
                np.matmul(self.Z_retain, theta[:, :with_retain], out=logits)
                for retain, columns in (("kl", kl), ("rt", rt)):
                    logits[:, columns] = retain_slope(logits[:, columns], reference_logits, y, retain, kl_direction)
                move[:, :with_retain] += self.Z_retain.T @ logits * retain_lr
            theta -= move
        curves = np.empty((len(methods), 2, len(kept)))
        curves[order] = np.stack(kept, axis=-1).transpose(1, 0, 2)
        return curves


# ------------------------------------------------------------------------------------------------ many instances


def reference_and_retrained_kept(instance: Instance, alpha: float, kept: Path) -> np.ndarray:
    """`reference_and_retrained` of an instance, read from `kept` where the same data and schedule were trained before.

    The file's name is a fingerprint of everything that the result depends on, so a stale one cannot be met.
    """
    Z_retain, Z_forget = instance.features(instance.x_retain, -alpha), instance.features(instance.x_forget, +alpha)
    fingerprint = hashlib.sha256(json.dumps([TRAIN_LR, TRAIN_STEPS]).encode())
    for array in (Z_retain, instance.y_retain, Z_forget, instance.y_forget):
        fingerprint.update(array.tobytes())
    path = kept / f"{fingerprint.hexdigest()[:32]}.npy"
    if path.exists():
        return np.load(path)
    models = reference_and_retrained(Z_retain, instance.y_retain, Z_forget, instance.y_forget)
    kept.mkdir(parents=True, exist_ok=True)
    # written aside and moved: never half a file under the name
    aside = path.with_name(f"{path.stem}.{os.getpid()}.npy")
    np.save(aside, models)
    aside.replace(path)
    return models


def train_job(job) -> np.ndarray:
    with np.errstate(over="ignore"):  # sigmoid_ lets exp overflow
        return reference_and_retrained_kept(*job)


def unlearn_job(job) -> np.ndarray:
    instance, alpha, models, points, *settings = job
    with np.errstate(over="ignore", invalid="ignore"):  # gradient ascent may overflow: reported as an infinite distance
        return Problem(instance, alpha, models, points).unlearn(*settings)


class Workers:
    """map over processes, with a progress bar; in this process for one worker. The numbers are the same."""

    def __init__(self, count: int):
        # fork: a worker inherits numpy in milliseconds where a fresh interpreter would import torch again
        self.pool = ProcessPoolExecutor(count, mp_context=get_context("fork")) if count > 1 else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def map(self, function, jobs: list, what: str) -> list:
        done = (self.pool.map if self.pool else map)(function, jobs)
        return list(tqdm(done, what, len(jobs), ncols=100, file=sys.stderr))


def run(workers: Workers, instances: list, alphas: list, methods: dict, args) -> dict:
    """alpha -> curves (K, M, 2, E) of `methods[alpha]` on every instance: forget distance, retain distance."""
    pairs = [(instance, alpha) for alpha in alphas for instance in instances]
    models = workers.map(train_job, [(*pair, args.kept) for pair in pairs], "pi_ref, pi_retr")
    jobs = [(instance, alpha, model, args.points, methods[alpha][start:start + COLUMNS], args.steps, args.eval_steps,
             args.dpo_scale, args.kl_direction)
            for (instance, alpha), model in zip(pairs, models) for start in range(0, len(methods[alpha]), COLUMNS)]
    curves, result = iter(workers.map(unlearn_job, jobs, "unlearning")), {}
    for alpha in alphas:
        chunks = math.ceil(len(methods[alpha]) / COLUMNS)
        result[alpha] = np.stack([np.concatenate([next(curves) for _ in range(chunks)]) for _ in instances])
    return result


# ------------------------------------------------------------------------------------- the claims, as verdicts
#
# A predicate takes curves {method: (2, E)} (forget, retain), of one instance or of a mean, and the steps (E,). It says
# whether the claim holds there, and the numbers that decide. `verdict` puts it to the mean, and to every instance.

SMALL, WITHIN = 0.005, 1200  # the paper's "small forget distance (less than 0.005) within 1200 steps"
# of the forget distance, at which frontiers are compared; the start, 1.70, is ten times the last
LEVELS = np.geomspace(SMALL, 0.17, 10)
SEEDS = (1, 2, 3, 5, 8, 13, 21, 34, 50)


def gets_small(curves: dict, steps: np.ndarray):
    """All the figure's methods but idk+rt reach a forget distance below SMALL within WITHIN steps."""
    least = {name: curve[0, steps <= WITHIN].min() for name, curve in curves.items()}
    return all(least[name] < SMALL for name in IN_THE_FIGURE if name != "idk+rt"), {"least_forget_distance": least}


def idk_stays_far(curves: dict, steps: np.ndarray):
    least = curves["idk+rt"][0].min()
    return least >= SMALL, {"least_forget_distance": least}


def diverges(curves: dict, steps: np.ndarray, *names: str):
    """The retain distance at least triples, and grows by more in the second half of the run than in the first."""
    numbers = {}
    for name in names:
        start, middle, end = curves[name][1, [0, len(steps) // 2, -1]]
        numbers[name] = {"start": start, "middle": middle, "end": end}
    return all(n["end"] > 3 * n["start"] and n["end"] - n["middle"] > n["middle"] - n["start"] or n["end"] == math.inf
               for n in numbers.values()), numbers


def levels_off(curves: dict, steps: np.ndarray, name: str):
    """The retain distance stays below five times the start, and grows by less in the last quarter than before it."""
    retain, quarter = curves[name][1], (len(steps) - 1) // 4
    start, half, late, end = retain[[0, -1 - 2 * quarter, -1 - quarter, -1]]
    return retain.max() < 5 * start and (end <= late or end - late < late - half), {
        "start": start, "peak": retain.max(), "peak_step": steps[retain.argmax()], "third_quarter_growth": late - half,
        "last_quarter_growth": end - late}


def frontier(curve: np.ndarray) -> np.ndarray:
    """The Pareto frontier: the least retain distance on the path where the forget distance is at most each of LEVELS.

    inf where it never is. Between two evaluations the path is a straight line in (log forget, retain), since a fast
    method jumps over several levels at once.
    """
    (forget, retain), level = curve, LEVELS[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        # of the way to the next point, where it crosses
        part = np.log(forget[:-1] / level) / np.log(forget[:-1] / forget[1:])
        crossing = retain[:-1] + part * np.diff(retain)
    crosses = (forget[:-1] - level) * (forget[1:] - level) < 0
    return np.minimum(np.where(forget <= level, retain, math.inf).min(1), np.where(crosses, crossing, math.inf).min(1))


def better_frontier(curves: dict, steps: np.ndarray, name: str, others: tuple):
    """At every level that any of them reaches, `name` has the smallest retain distance: a ratio of at most 1."""
    own, best = frontier(curves[name]), np.min([frontier(curves[other]) for other in others], axis=0)
    reached = np.isfinite(np.minimum(own, best))
    ratio = own[reached] / best[reached]  # 0 where only `name` gets there, inf where only another does
    return bool((ratio <= 1).all()), {
        "levels": LEVELS[reached], name: own[reached], "best_of_the_others": best[reached],
        "median_ratio": float(np.median(ratio)) if len(ratio) else 1.0, "worst_ratio": ratio.max(initial=0.0)}


def distances_agree(curves: dict, steps: np.ndarray):
    """Forget and retain distance differ by at most a tenth of their sum: all the figure's methods, at every step."""
    gap = {name: (abs(curves[name][0] - curves[name][1]) / curves[name].sum(0)).max() for name in IN_THE_FIGURE}
    return max(gap.values()) <= 0.1, {"largest_relative_gap": gap}


def smallest_distances(curves: dict, steps: np.ndarray, name: str, others: tuple):
    """Its smallest forget and its smallest retain distance along the run are below every other method's."""
    least = {key: curves[key].min(1) for key in (name, *others)}
    return all((least[name] <= least[other]).all() for other in others), {"least_forget_and_retain_distance": least}


def path_gap(curve: np.ndarray, other: np.ndarray, steps: np.ndarray) -> float:
    """How far a path strays from another, in decades: its points' largest distance to the other's line, axes log10.

    The line is a cubic spline through the evaluations: chords cut the corner where gradient ascent turns back.
    """
    path, finite = np.log10(curve[:, np.isfinite(curve).all(0)]), np.isfinite(other).all(0)
    spline = CubicSpline(steps[finite], np.log10(other[:, finite]), axis=1)
    line = spline(np.linspace(0, steps[finite][-1], 1001))
    path = path[:, ::max(1, path.shape[1] // 100), None]  # (2, points, 1), against (2, 1, segments)
    start, along = line[:, None, :-1], np.diff(line)[:, None, :]
    length = np.maximum((along**2).sum(0), 1e-300)
    nearest = start + np.clip((along * (path - start)).sum(0) / length, 0, 1) * along
    return float(np.sqrt(((path - nearest)**2).sum(0)).min(1).max())


def goes_to_ga(curves: dict, steps: np.ndarray):
    """Of all beta, the smallest has the path closest to ga's, and it is within 0.02 decades (5%) everywhere."""
    betas = {name: float(name.partition("@")[2]) for name in curves if name != "ga"}
    gap = {beta: path_gap(curves[name], curves["ga"], steps) for name, beta in betas.items()}
    least = min(gap)
    return gap[least] == min(gap.values()) and gap[least] < 0.02, {
        "path_gap_decades": {f"{beta:g}": gap[beta] for beta in sorted(gap)},
        "smallest_beta": gap[least], "largest_beta": gap[max(gap)]}


def others_in_the_figure(name: str) -> tuple:
    return tuple(other for other in IN_THE_FIGURE if other != name)


FIGURE4_GAP = (  # alpha > 0: claim, methods it needs, predicate
    ("All methods of the figure but idk+rt reach a forget distance below 0.005 within 1200 steps", IN_THE_FIGURE,
     gets_small),
    ("idk+rt never does", ("idk+rt",), idk_stays_far),
    ("The retain distances of ga and ga+rt diverge", ("ga", "ga+rt"), lambda c, s: diverges(c, s, "ga", "ga+rt")),
    ("npo+rt's retain distance grows slowly and levels off", ("npo+rt",), lambda c, s: levels_off(c, s, "npo+rt")),
    ("dpo+rt's retain distance grows slowly and levels off", ("dpo+rt",), lambda c, s: levels_off(c, s, "dpo+rt")),
    ("npo+rt has the best Pareto frontier of the figure", IN_THE_FIGURE,
     lambda c, s: better_frontier(c, s, "npo+rt", others_in_the_figure("npo+rt"))),
    ("Without the retain set npo has a better Pareto frontier than ga", ("npo", "ga"),
     lambda c, s: better_frontier(c, s, "npo", ("ga",))),
)
FIGURE4_NO_GAP = (  # alpha = 0
    ("Forget and retain distances are equal", IN_THE_FIGURE, distances_agree),
    ("npo+rt attains the smallest forget and retain distances", IN_THE_FIGURE,
     lambda c, s: smallest_distances(c, s, "npo+rt", others_in_the_figure("npo+rt"))),
)
FIGURE3 = (("npo's curve goes to ga's as beta -> 0", ("ga",), goes_to_ga),)


def verdict(claim: str, predicate, names: list, curves: np.ndarray, steps: np.ndarray) -> dict:
    """A claim on the mean of the instances (`holds`) and on each of them; with how the answer depends on their number.

    curves (K, M, 2, E). From 20 instances on, `holds_in_means_of` is how often the claim holds on the mean of n
    instances drawn from the K (200 draws each), and `seeds_needed` the least n from which on that gives the answer of
    all K in 95% of draws.
    """
    def judge(values):
        return predicate(dict(zip(names, values)), steps)

    instances = len(curves)
    holds, numbers = judge(curves.mean(0))
    each = [judge(curve) for curve in curves]
    scalars = {key for key, value in numbers.items() if isinstance(value, float)}
    by_instance = {"holds": [bool(held) for held, _ in each]}
    by_instance |= {key: [own[key] for _, own in each] for key in sorted(scalars)}
    numbers = {**numbers, "share_of_instances": sum(by_instance["holds"]) / instances, "instances": by_instance}
    if instances >= 20:
        rng = np.random.default_rng(0)
        draws = {n: rng.integers(instances, size=(200, n)) for n in SEEDS}
        chance = {n: np.mean([bool(judge(curves[draw].mean(0))[0]) for draw in draws[n]]) for n in SEEDS}
        agrees = [n for n in SEEDS if (chance[n] if holds else 1 - chance[n]) >= 0.95]
        steady = [n for n in agrees if all(m in agrees for m in SEEDS if m >= n)]
        numbers |= {"holds_in_means_of": chance, "seeds_needed": steady[0] if steady else f"more than {SEEDS[-1]}"}
    return {"claim": claim, "holds": bool(holds), "numbers": numbers}


def verdicts(claims: tuple, names: list, curves: np.ndarray, steps: np.ndarray, least_steps: int) -> tuple[list, list]:
    """Verdicts, and the claims that this run leaves undecided: a method is missing or the run is too short."""
    decided, undecided = [], []
    for claim, needs, predicate in claims:
        missing = [name for name in needs if name not in names]
        if missing or steps[-1] < least_steps:
            need = f"methods {', '.join(missing)}" if missing else f"--steps {least_steps}"
            undecided.append({"claim": claim, "needs": need})
        else:
            decided.append(verdict(claim, predicate, names, curves, steps))
    return decided, undecided


# --------------------------------------------------------------------------------------------- writing it all down


def tidy(value, digits: int = 10):
    """Plain JSON values: numpy unwrapped, floats to `digits` significant digits, an infinite distance as "inf"."""
    if isinstance(value, dict):
        return {str(key): tidy(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [tidy(item, digits) for item in value]
    if isinstance(value, (float, np.floating)):
        return "inf" if value == math.inf else float(f"{value:.{digits}g}")
    return value.item() if isinstance(value, np.generic) else value


def write_json(path: Path, content: dict):
    """Strict JSON (a NaN raises), written aside and moved into place."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n")
    aside.replace(path)


def statistics(distance: np.ndarray, fresh: bool) -> dict:
    """Mean and sd (ddof 0) over the K instances, (K, E); for fresh ones the median and the 10-90% band too."""
    mean = distance.mean(0)
    finite = np.where(np.isfinite(mean), distance, 0)  # the spread of an infinite mean is infinite
    result = {"mean": mean, "sd": np.where(np.isfinite(mean), finite.std(0), math.inf)}
    if fresh:
        # between two instances, one of them perhaps infinite
        for key, rank in {"median": 0.5, "p10": 0.1, "p90": 0.9}.items():
            quantile = np.quantile(np.minimum(distance, 1e300), rank, axis=0)
            result[key] = np.where(quantile > 1e290, math.inf, quantile)
    return result | {"instances": distance}


def provenance(args, seconds: float) -> dict:
    def git(*command):
        done = subprocess.run(["git", *command], cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    changed = "+changes" if git("status", "--porcelain", "--", "synthetic.py") else ""
    fresh = f"{args.instances} fresh, seed {args.seed}"
    published = f"published, seeds {', '.join(map(str, PUBLISHED_SEEDS))}"
    return {
        "command": shlex.join(["python", "synthetic.py", *args.command]), "commit": git("rev-parse", "HEAD") + changed,
        "instances": fresh if args.instances else published, "steps": args.steps, "eval_every": args.eval_every,
        "train_lr": TRAIN_LR, "train_steps": TRAIN_STEPS, "dpo_scale": args.dpo_scale, "points": args.points,
        "kl_direction": args.kl_direction, "significant_digits": args.digits, "workers": args.workers,
        "seconds_so_far": round(seconds, 1), "python": platform.python_version(), "torch": torch.__version__,
        "numpy": np.__version__, "machine": platform.machine()}


def curves_record(methods: list, curves: np.ndarray, args, began: float, alpha: float) -> dict:
    """The JSON of a figure: every method's settings and curves, every instance kept."""
    record = {"alpha": alpha, "provenance": provenance(args, time.time() - began), "start": {}, "methods": {}}
    for m, method in enumerate(methods):
        entry = record["methods"][method.name] = {"lr": method.lr, "beta": method.beta, "steps": args.eval_steps}
        for axis, key in enumerate(("forget_distance", "retain_distance")):
            entry[key] = statistics(curves[:, m, axis], bool(args.instances))
            record["start"][key] = {"mean": entry[key]["mean"][0], "sd": entry[key]["sd"][0]}  # of any method: step 0
    return tidy(record, args.digits)


# Black, dark and light by family, line by retain term, marker by family: told apart in grey.
STYLE = {"npo": ("#000000", "o"), "dpo": ("#1b7fb8", "s"), "ga": ("#d1495b", "^"), "idk": ("#8f8f8f", "D")}
DASHES = {"rt": "-", "": "--", "kl": ":"}


def draw(axis, method: Method, x, y, low=None, high=None):
    colour, marker = STYLE[method.family]
    every = max(1, len(x) // 8)
    axis.plot(x, y, DASHES[method.retain], color=colour, marker=marker, markevery=every, markersize=4, linewidth=1.4,
              label=method.name)
    if low is not None:
        axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def figure4(path: Path, alpha: float, methods: list, record: dict):
    """Forget and retain distance over steps and against each other: (a1)-(a3); alpha = 0: (b). A row per statistic."""
    fresh = "median" in record["methods"][methods[0].name]["forget_distance"]
    rows = [("mean", "sd")] + ([("median", "p10")] if fresh else [])
    figure, axes = plt.subplots(len(rows), 3, figsize=(15, 4.6 * len(rows)), squeeze=False, layout="constrained")
    letters = ("(a1) ", "(a2) ", "(a3) ") if alpha > 0 else ("(b) ", "(b) ", "(unpublished) ")
    for (middle, spread), (forget_axis, retain_axis, path_axis) in zip(rows, axes):
        for method in methods:
            curves = record["methods"][method.name]
            for axis, key in ((forget_axis, "forget_distance"), (retain_axis, "retain_distance")):
                y = np.array(curves[key][middle])
                if spread == "sd":
                    sd = np.where(np.isfinite(y), curves[key]["sd"], 0)
                    # a mean less its sd may be negative: cut for the log axis
                    low, high = np.maximum(y - sd, 0.1 * y), y + sd
                else:
                    low, high = curves[key]["p10"], curves[key]["p90"]
                draw(axis, method, curves["steps"], y, low, high)
            draw(path_axis, method, curves["forget_distance"][middle], curves["retain_distance"][middle])
        start = [record["methods"][methods[0].name][key][middle][0] for key in ("forget_distance", "retain_distance")]
        path_axis.plot(*start, "*", color="black", markersize=14, label="start ($\\pi_{ref}$)")
        band = "mean, band $\\pm$ 1 sd" if spread == "sd" else "median, band 10-90%"
        forget_axis.set(title=f"{letters[0]}forget distance ({band})", xlabel="step",
                        ylabel="KL($\\pi_{retr}$ || $\\pi_\\theta$), nats")
        retain_axis.set(title=f"{letters[1]}retain distance ({band})", xlabel="step")
        path_axis.set(title=f"{letters[2]}retain against forget distance ({middle})", xlabel="forget distance",
                      ylabel="retain distance")
        for axis in (forget_axis, retain_axis, path_axis):
            axis.grid(alpha=0.25)
        forget_axis.set_yscale("log")
        retain_axis.set_yscale("log")
        if alpha > 0:
            path_axis.set(xscale="log", yscale="log")
        path_axis.legend(fontsize=8, ncols=2)
    instances = len(record["methods"][methods[0].name]["forget_distance"]["instances"])
    figure.suptitle(f"Figure 4, $\\alpha$ = {alpha:g}, {instances} {'fresh' if fresh else 'published'} instances")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def figure3(path: Path, methods: list, record: dict):
    """Retain against forget distance, ga and npo at several beta: the means, as published, and one instance.

    For fresh instances the medians too, with the 10-90% band of the forget distance at the same step (ga, last beta).
    """
    fresh = "median" in record["methods"]["ga"]["forget_distance"]
    panels = 3 if fresh else 2
    figure, axes = plt.subplots(1, panels, figsize=(6 * panels, 4.8), layout="constrained", sharex=True, sharey=True)
    shades = ["#d1495b", *(str(shade) for shade in np.linspace(0, 0.7, len(methods) - 1))]
    for method, shade, dashes, marker in zip(methods, shades, ("-", "--", "-.", ":", "--", "-."), "^osDvP"):
        forget, retain = (record["methods"][method.name][key] for key in ("forget_distance", "retain_distance"))
        every = max(1, len(forget["mean"]) // 12)
        pairs = [(forget["mean"], retain["mean"]), (forget["instances"][0], retain["instances"][0])]
        pairs += [(forget["median"], retain["median"])] if fresh else []
        for axis, (x, y) in zip(axes, pairs):
            axis.plot(x, y, dashes, color=shade, marker=marker, markevery=every, markersize=5, label=method.name)
            axis.plot(x[0], y[0], "*", color="black", markersize=14,
                      label="start ($\\pi_{ref}$)" if method is methods[-1] else None)
        if fresh and method in (methods[0], methods[-1]):
            axes[2].fill_betweenx(retain["median"], forget["p10"], forget["p90"], color=shade, alpha=0.2, linewidth=0)
    instances = len(record["methods"]["ga"]["forget_distance"]["instances"])
    titles = (f"Figure 3: mean of {instances} instances", "the first instance by itself",
              "median, band 10-90% (ga, last $\\beta$)")
    for axis, title in zip(axes, titles):
        axis.set(xscale="log", yscale="log", xlabel="forget distance", title=title)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("retain distance")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(title: str, methods: list, curves: np.ndarray, record: dict) -> str:
    """What a run found, in Markdown: the start, every method's distances, the verdicts."""
    mean, lines = curves.mean(0), [f"## {title}", "", f"`{record['provenance']['command']}`", ""]
    start = ", ".join(f"{key.replace('_', ' ')} {own['mean']:.4g}" for key, own in record["start"].items())
    lines += [f"Start: {start} (means over {len(curves)} instances: {record['provenance']['instances']}).", ""]
    columns = ("method", "lr", "beta", "least forget", "at step", "final forget: mean", "sd", "median",
               "final retain: mean", "sd", "median")
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for m, method in enumerate(methods):
        forget, retain = curves[:, m, 0, -1], curves[:, m, 1, -1]
        at = mean[m, 0].argmin()
        cells = [method.name, f"{method.lr:g}", "-" if method.beta is None else f"{method.beta:g}",
                 f"{mean[m, 0, at]:.4g}", str(record["methods"][method.name]["steps"][at])]
        for final in (forget, retain):
            spread = statistics(final[:, None], fresh=False)
            cells += [f"{spread['mean'][0]:.4g}", f"{spread['sd'][0]:.2g}", f"{np.median(final):.4g}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| claim | on the mean | instances | means of five | seeds needed |", "|---|---|---|---|---|"]
    for item in record["verdicts"]:
        numbers = item["numbers"]
        five = f"{numbers['holds_in_means_of']['5']:.0%}" if "holds_in_means_of" in numbers else "-"
        lines.append(f"| {item['claim']} | {'holds' if item['holds'] else '**fails**'} "
                     f"| {numbers['share_of_instances']:.0%} | {five} | {numbers.get('seeds_needed', '-')} |")
    lines += [f"| {item['claim']} | undecided, needs {item['needs']} | | | |" for item in record["undecided"]]
    if len(curves) >= 20:
        lines += ["", "Instances: the share in which the claim holds by itself. Means of five: the share of means of "
                  "five instances, drawn from these, that show it. Seeds needed: the fewest whose mean gives the first "
                  "column's answer in 95% of draws."]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------- the published instances' random stream


def old_multinomial(probs: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """torch.multinomial(probs, 1) as torch before 2.7 drew it on x86 with MKL, (n, 2) -> (n,).

    The published instances were drawn by it and today's torch draws other labels, so the five are redrawn with its
    rule: argmax of p / Exp(1), the exponentials from MKL's 31-bit multiplicative generator, which is seeded with one
    word of torch's stream.
    """
    modulus, multiplier = 2**31 - 1, 1132489760
    word = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    state = (word % 2**32) % modulus or 1
    exponentials = []
    for _ in range(probs.size):
        exponentials.append(-math.log(state / modulus))
        state = multiplier * state % modulus
    return (probs / np.reshape(exponentials, probs.shape)).argmax(1)


def published_instance(seed: int) -> Instance:
    """One of the published five (PUBLISHED_SEEDS), bit for bit, in the order in which the authors' code draws it."""
    generator = torch.Generator().manual_seed(seed)
    float64 = {"generator": generator, "dtype": torch.float64}

    def data_set(rows: int, forget: bool):
        # which component of a mixture a row comes from: always the first, but it moves the stream
        torch.multinomial(torch.tensor([1.0, 0.0, 0.0] if forget else [1.0]), rows, replacement=True,
                          generator=generator)
        x, y = np.empty((rows, D)), np.empty(rows)
        for row in range(rows):
            x[row] = torch.randn(D, **float64).numpy()
            # the logit of class 1 on the forget set, of class 0 on the retain set
            own = x[row].sum() / math.sqrt(D) + 1
            logits = torch.tensor([[0.0, own] if forget else [own, 0.0]], dtype=torch.float64)
            y[row] = old_multinomial(logits.softmax(1).numpy(), generator)[0]
        return x, y

    W = (torch.randn(N, D, **float64) / math.sqrt(D)).numpy()
    x_retain, y_retain = data_set(RETAIN_ROWS, forget=False)
    x_forget, y_forget = data_set(FORGET_ROWS, forget=True)
    y_idk = old_multinomial(np.full((FORGET_ROWS, 2), 0.5), generator).astype(float)
    x_retain_test, _ = data_set(TEST_ROWS, forget=False)
    x_forget_test, _ = data_set(TEST_ROWS, forget=True)
    return Instance(W, x_retain, y_retain, x_forget, y_forget, y_idk, x_retain_test, x_forget_test)


# -------------------------------------------------------------------------------------------------- the commands


def default_methods(alpha: float, names: tuple, lr: float | None, beta: float | None) -> list:
    """The published settings (alpha = 1's for an alpha that the paper doesn't have); lr and beta win over them."""
    published = PUBLISHED[0 if alpha == 0 else 1]
    result = []
    for name in names:
        own_lr, own_beta = published[name.partition("+")[0]]
        result.append(make_method(name, lr or own_lr, own_beta and (beta or own_beta)))
    return result


def run_figure4(args, workers: Workers, instances: list, began: float):
    methods = {alpha: default_methods(alpha, args.methods, args.lr, args.beta) for alpha in args.alphas}
    for alpha, curves in run(workers, instances, args.alphas, methods, args).items():
        claims, steps = FIGURE4_GAP if alpha > 0 else FIGURE4_NO_GAP, np.array(args.eval_steps)
        decided, undecided = verdicts(claims, list(args.methods), curves, steps, WITHIN)
        record = curves_record(methods[alpha], curves, args, began, alpha)
        record |= tidy({"verdicts": decided, "undecided": undecided}, 6)
        write_down(args, f"synthetic_alpha{alpha:g}", f"Figure 4, alpha = {alpha:g}", methods[alpha], curves, record,
                   lambda path: figure4(path, alpha, methods[alpha], plain(record)))


def run_figure3(args, workers: Workers, instances: list, began: float):
    [alpha] = args.alphas
    methods = [make_method("ga", FIGURE3_LR, None)]
    methods += [make_method("npo", FIGURE3_LR, beta, f"npo@{beta:g}") for beta in FIGURE3_BETAS]
    curves = run(workers, instances, [alpha], {alpha: methods}, args)[alpha]
    decided, undecided = verdicts(FIGURE3, [method.name for method in methods], curves, np.array(args.eval_steps), 2000)
    record = curves_record(methods, curves, args, began, alpha)
    record |= tidy({"verdicts": decided, "undecided": undecided}, 6)
    write_down(args, "synthetic_figure3", "Figure 3", methods, curves, record,
               lambda path: figure3(path, methods, plain(record)))


def plain(value):
    """A record with its "inf" strings as numbers again, for the pictures (which leave them out)."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return math.inf if value == "inf" else value


def write_down(args, stem: str, title: str, methods: list, curves: np.ndarray, record: dict, picture):
    page = report(title, methods, curves, record)
    picture(args.out / f"{stem}.png")
    (args.out / f"{stem}.md").write_text(page)
    write_json(args.out / f"{stem}.json", record)
    print(page, f"\nwritten: {args.out / stem}.json, .png, .md\n", sep="")


CRITERION = ("Every method at every lr (and beta) of the grid. Stable: at the last step the mean over the instances is "
             "finite, and no farther from pi_retr than at the start (forget + retain distance). Chosen: of the stable, "
             "the one with the smallest forget + retain distance at the last step.")


def run_grid(args, workers: Workers, instances: list, began: float):
    """The paper chooses lr and beta by a grid, so that training "remains stable within 2000 steps"; how is ours."""
    settings = {}
    for alpha in args.alphas:
        settings[alpha] = [make_method(name, lr, beta) for name in args.methods for lr in args.grid_lr
                           for beta in (args.grid_beta if name.startswith(("npo", "dpo")) else [None])]
    args.eval_steps = [0, args.steps]
    for alpha, curves in run(workers, instances, args.alphas, settings, args).items():
        (forget, retain), total = curves.mean(0)[:, :, -1].T, curves.mean(0).sum(1)  # (M,) each; (M, 2)
        rows = [{"method": own.name, "lr": own.lr, "beta": own.beta, "forget_distance": forget[m],
                 "retain_distance": retain[m], "stable": bool(np.isfinite(total[m, 1]) and total[m, 1] <= total[m, 0])}
                for m, own in enumerate(settings[alpha])]
        chosen = {method.name: choose(rows, method) for method in default_methods(alpha, args.methods, None, None)}
        record = tidy({"alpha": alpha, "criterion": CRITERION, "grid": {"lr": args.grid_lr, "beta": args.grid_beta},
                       "chosen": chosen, "rows": rows, "provenance": provenance(args, time.time() - began)})
        page = grid_report(alpha, record)
        (args.out / f"synthetic_alpha{alpha:g}_grid.md").write_text(page)
        write_json(args.out / f"synthetic_alpha{alpha:g}_grid.json", record)
        print(page, f"\nwritten: {args.out}/synthetic_alpha{alpha:g}_grid.json, .md\n", sep="")


def choose(rows: list, published: Method) -> dict:
    """The best row of a method by CRITERION (of all, where none is stable), beside the published setting."""
    own = [row for row in rows if row["method"] == published.name]
    best = min(own, key=lambda row: (not row["stable"], row["forget_distance"] + row["retain_distance"]))
    same = [row for row in own if (row["lr"], row["beta"]) == (published.lr, published.beta)]
    return {"chosen": best, "published": same[0] if same else {"lr": published.lr, "beta": published.beta},
            "stable_settings": sum(row["stable"] for row in own), "settings": len(own)}


def grid_report(alpha: float, record: dict) -> str:
    def cells(row):
        beta = "-" if row["beta"] is None else f"{row['beta']:g}"
        if "stable" not in row:
            return [f"{row['lr']:g}", beta, "not on this grid", "", ""]
        distances = [f"{float(row[key]):.4g}" for key in ("forget_distance", "retain_distance")]
        return [f"{row['lr']:g}", beta, *distances, "yes" if row["stable"] else "**no**"]

    columns = ("method", "stable settings", "chosen lr", "beta", "forget", "retain", "stable",
               "published lr", "beta", "forget", "retain", "stable")
    lines = [f"## Grid search, alpha = {alpha:g}", "", f"`{record['provenance']['command']}`", "", record["criterion"],
             "", f"lr in {record['grid']['lr']}, beta in {record['grid']['beta']}.", "",
             "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, item in record["chosen"].items():
        share = f"{item['stable_settings']} of {item['settings']}"
        lines.append("| " + " | ".join([name, share, *cells(item["chosen"]), *cells(item["published"])]) + " |")
    return "\n".join(lines) + "\n"


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one sentence, without the usage block
        self.exit(2, f"{self.prog}: {message}\n")


def number(low: float, kind=float, strict: bool = False):
    """An argparse type: a finite number of at least (strict: above) `low`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low or (strict and value == low):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"{text!r} given, {what} {'above' if strict else 'of at least'} {low} needed")
        return value
    return parse


def parse_args(argv: list):
    parser = Parser(prog="synthetic.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpha", type=number(0), help="half the distance between forget and retain means (default 1)")
    parser.add_argument("--all", action="store_true", help="Figure 4 for alpha = 1 and alpha = 0")
    parser.add_argument("--figure", type=int, choices=(3, 4), default=4, help="default 4")
    parser.add_argument("--methods", nargs="+", metavar="METHOD",
                        help=f"Figure 4: some of {' '.join(METHODS)} (default all)")
    parser.add_argument("--lr", type=number(0, strict=True),
                        help="Figure 4: step size of every method (default: published, per method)")
    parser.add_argument("--beta", type=number(0, strict=True),
                        help="Figure 4: beta of npo and dpo (default: published, per method)")
    parser.add_argument("--instances", type=number(1, int),
                        help="that many fresh instances (default: the published five)")
    parser.add_argument("--seed", type=number(0, int), help="of the fresh instances (default 0)")
    parser.add_argument("--steps", type=number(1, int), help="unlearning steps (default 2000; Figure 3: 10000)")
    parser.add_argument("--eval-every", type=number(1, int), help="steps between evaluations (default 25; Figure 3: 5)")
    parser.add_argument("--grid-search", action="store_true", help="choose lr and beta on a grid, beside the published")
    parser.add_argument("--grid-lr", nargs="+", type=number(0, strict=True),
                        help=f"default {' '.join(f'{x:g}' for x in GRID_LR)}")
    parser.add_argument("--grid-beta", nargs="+", type=number(0, strict=True),
                        help=f"default {' '.join(f'{x:g}' for x in GRID_BETA)}")
    parser.add_argument("--dpo-scale", type=number(0, strict=True), default=2.0,
                        help="s of -(s/beta) log sigmoid: 2 published, 1 Eq. 2 (default 2)")
    parser.add_argument("--kl-direction", choices=("reference_policy", "policy_reference"), default="reference_policy",
                        help="K: D(pi_ref || pi_theta), published (default), or the text's D(pi_theta || pi_ref)")
    parser.add_argument(
        "--points", choices=("test", "train"), default="test",
        help="distances over 1000 fresh points of each kind, published (default), or the text's training sets")
    parser.add_argument("--workers", type=number(1, int),
                        help="processes (default: the cores there are; the numbers don't depend on it)")
    parser.add_argument("--kept", type=Path, default=KEPT,
                        help="folder of trained pi_ref and pi_retr (default runs/synthetic)")
    parser.add_argument("--out", type=Path, default=Path("results/synthetic"),
                        help="folder for JSON, pictures, pages (default results/synthetic)")
    args = parser.parse_args(argv)
    refuse_contradictions(parser, args)
    resolve(args, argv)
    check_writable(parser, "--out", args.out)
    check_writable(parser, "--kept", args.kept)
    return args


def refuse_contradictions(parser: Parser, args):
    if args.all and args.alpha is not None:
        parser.error(f"--all and --alpha {args.alpha:g} given, one needed: --all runs alpha 1 and alpha 0")
    if args.all and args.figure == 3:
        parser.error("--all and --figure 3 given, one needed: --all is Figure 4 for both alpha")
    names = [name for text in args.methods or METHODS for name in text.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown or len(set(names)) < len(names):
        parser.error(f"--methods {' '.join(names)} given, different ones out of {' '.join(METHODS)} needed")
    if args.figure == 3 and (args.methods or args.lr or args.beta or args.grid_search):
        parser.error("--figure 3 has its own methods, lr and beta: drop --methods, --lr, --beta and --grid-search")
    if args.beta and not any(name.startswith(("npo", "dpo")) for name in names):
        parser.error(f"--beta {args.beta:g} given, but none of {' '.join(names)} has one: add npo or dpo, or drop it")
    if args.seed is not None and not args.instances:
        parser.error(f"--seed {args.seed} given without --instances: the published have their own, add --instances 5")
    for name, grid in (("--grid-lr", args.grid_lr), ("--grid-beta", args.grid_beta)):
        if grid and not args.grid_search:
            parser.error(f"{name} given without --grid-search: add it")
        if grid and len(set(grid)) < 2:
            parser.error(f"{name} {' '.join(f'{x:g}' for x in grid)} is one value, a grid has two or more: add another")
    if (args.workers or 1) > 1 and not hasattr(os, "fork"):
        parser.error(f"--workers {args.workers} given, but this system cannot fork: drop it")
    if args.grid_search and (args.lr or args.beta or args.eval_every):
        parser.error("--grid-search chooses lr and beta and looks at the last step: drop --lr, --beta and --eval-every")
    args.methods = tuple(names)


def resolve(args, argv: list):
    """What follows from other settings."""
    args.alphas = [1.0, 0.0] if args.all else [1.0 if args.alpha is None else args.alpha]
    args.steps = args.steps or (10_000 if args.figure == 3 else 2000)
    args.eval_every = min(args.eval_every or (5 if args.figure == 3 else 25), args.steps)
    args.eval_steps = sorted({*range(0, args.steps, args.eval_every), args.steps})
    args.seed = args.seed or 0
    args.grid_lr = list(dict.fromkeys(args.grid_lr or GRID_LR))
    args.grid_beta = list(dict.fromkeys(args.grid_beta or GRID_BETA))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # elsewhere fork isn't safe
    args.workers = args.workers or cores
    args.digits = 10 if (args.instances or 0) <= 10 else 6  # of fifty instances' curves: a file below 1 MB
    args.command = []  # as it will be told, without what changes no number
    for text, before in zip(argv, ["", *argv]):
        if not {text.partition("=")[0], before} & {"--out", "--kept", "--workers"}:
            args.command.append(text)


def check_writable(parser: Parser, flag: str, folder: Path):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"{flag} {folder} cannot be written ({error.strerror}), type {flag} and a folder that can")


def main(argv: list):
    began = time.time()
    args = parse_args(argv)
    if any(alpha not in PUBLISHED for alpha in args.alphas):
        print(f"alpha {args.alphas[0]:g} has no published lr and beta: alpha 1's are used where no flag sets them")
    instances = ([fresh_instance(args.seed, number) for number in range(args.instances)] if args.instances
                 else [published_instance(seed) for seed in PUBLISHED_SEEDS])
    with Workers(min(args.workers, len(instances) * len(args.alphas))) as workers:
        action = run_grid if args.grid_search else run_figure3 if args.figure == 3 else run_figure4
        action(args, workers, instances, began)
    print(f"{time.time() - began:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
