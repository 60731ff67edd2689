"""Section 4 of the NPO paper: Gaussian-logistic data, a random-feature model, ten methods; Figures 3 and 4.

    python synthetic.py --alpha 1                   # Figure 4 (a1)-(a3): forget and retain means far apart
    python synthetic.py --all                       # Figure 4 for alpha = 1 and alpha = 0
    python synthetic.py --figure 3                  # NPO's path goes to gradient ascent's as beta -> 0
    python synthetic.py --alpha 1 --instances 50    # does it hold on instances that the paper did not draw?
    python synthetic.py --alpha 1 --grid-search     # the grid behind lr and beta

The experiment: data as in `data/synthetic_instances.py`, policy pi_theta(1|x) = sigmoid(theta . relu(W x))
with W fixed. pi_ref is trained on both sets, pi_retr (the retrained model) on the retain set alone.
Unlearning starts at pi_ref and descends one of the objectives of `losses.py`, by autograd; a good method
comes close to pi_retr in KL(pi_retr || pi_theta), on forget points (the forget distance) and on retain points
(the retain distance). The published curves are reproduced, random stream included.

Where the published runs differ from the paper's text we follow the runs; a flag in brackets gives the text's:
- DPO has the factor 2/beta, Eq. 2 has 1/beta [--dpo-scale 1]. `losses.dpo_loss` is Eq. 2; here it is doubled.
- K is D(pi_ref || pi_theta), the text's is D(pi_theta || pi_ref) [--kl-direction policy_reference].
- Distances are means over 1000 fresh test points, the text's over forget and retain set [--points train].
- pi_ref and pi_retr are 20,000 steps of gradient descent from 0, not optima. The optimum on the retain set is
  nearly unbounded (a few directions are all but separable), so the "retrained model" is early-stopped, and it
  has to be.
- Figure 3's caption says "difference"; drawn is the distance from pi_retr on both axes, as in Figure 4 (a3).

Speed: the methods of some instances are one stack of parameters, so a step is two matrix products for their
logits, autograd on the losses of the logits, and two products back. Stacks are spread over processes.
"""

import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

# the processes share the cores; threads on matrices this small would only get in their way
if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit
from tqdm import tqdm

import losses
from data.synthetic_instances import PUBLISHED_SEEDS, Instance, fresh_instance, published_instance
from study import synthetic_claims as claims
from study import synthetic_pages as pages
from support.command_line import Parser, not_negative, positive, run_command
from support.errors import InputError
from support.provenance import environment


@dataclass(frozen=True)
class Method:
    """An objective and its step. Its name is the family that acts on the forget set (ga, npo, dpo, idk), then
    a retain term (+rt or +kl) if it has one, or a beta (@0.1) that tells it from its like."""
    name: str
    lr: float
    beta: float | None = None

    @property
    def family(self) -> str:
        return re.split("[+@]", self.name)[0]

    @property
    def retain(self) -> str:
        return self.name.partition("+")[2]


# Shapes: N features, n rows, M methods and K instances (unlearned together), E evaluations.
TRAIN_LR, TRAIN_STEPS = 0.05, 20_000  # of pi_ref and pi_retr
METHODS = ("npo+rt", "npo", "npo+kl", "ga+rt", "ga", "ga+kl", "idk+rt", "dpo+rt", "dpo", "dpo+kl")
PUBLISHED = {  # alpha -> family -> (lr, beta)
    1: {"ga": (5e-4, None), "idk": (5e-4, None), "npo": (5e-3, 1.0), "dpo": (5e-3, 0.1)},
    0: {"ga": (1e-4, None), "idk": (1e-4, None), "npo": (5e-2, 10.0), "dpo": (5e-2, 5.0)},
}
FIGURE3_METHODS = [Method("ga", 5e-4)]
FIGURE3_METHODS += [Method(f"npo@{beta:g}", 5e-4, beta) for beta in (0.01, 0.1, 0.2, 0.5, 1.0)]
GRID_LR, GRID_BETA = (2e-5, 1e-4, 5e-4, 2e-3, 5e-3, 2e-2, 5e-2), (0.1, 0.5, 1.0, 5.0, 10.0)
TOGETHER = 3  # instances that are unlearned as one stack
KEPT = Path(__file__).resolve().parent / "runs" / "synthetic"  # pi_ref and pi_retr, a small file an instance


# ----------------------------------------------------------------------- the models, and the ten methods


def reference_and_retrained(Z_retain: np.ndarray, y_retain: np.ndarray, Z_forget: np.ndarray,
                            y_forget: np.ndarray, steps: int = TRAIN_STEPS) -> np.ndarray:
    """theta of pi_ref and pi_retr, (N, 2): full-batch gradient descent on the mean cross-entropy, from 0."""
    def descend(Z, y):
        theta = np.zeros(Z.shape[1])
        for _ in range(steps):
            theta -= TRAIN_LR / len(Z) * ((expit(Z @ theta) - y) @ Z)  # autograd takes three times as long
        return theta

    both = np.concatenate([Z_retain, Z_forget]), np.concatenate([y_retain, y_forget])
    return np.stack([descend(*both), descend(Z_retain, y_retain)], axis=1)


def two_class(logits: torch.Tensor) -> torch.Tensor:
    """Log-odds of label 1, (..., n), as the logits of labels 0 and 1, (..., n, 2)."""
    return torch.stack([torch.zeros_like(logits), logits], -1)


def label_logps(logits: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """`losses.token_logps` of two classes, (K, M, n), from log-odds of 1; sign (K, 1, n) of labels."""
    return F.logsigmoid(sign * logits)


def forget_loss(logits: torch.Tensor, method: Method, reference_logits: torch.Tensor, answer: torch.Tensor,
                idk: torch.Tensor, dpo_scale: float) -> torch.Tensor:
    """The loss on every forget point, (K, M, n), of methods that differ in lr or retain term alone.

    logits (K, M, n); the reference's, the labels and the "I don't know" labels are (K, 1, n).
    """
    if method.family == "ga":
        return losses.ga_loss(label_logps(logits, answer))
    if method.family == "idk":
        return losses.nll_loss(label_logps(logits, idk))
    policy, reference = label_logps(logits, answer), label_logps(reference_logits, answer).expand_as(logits)
    if method.family == "npo":
        return losses.npo_loss(policy, reference, method.beta)
    reference_idk = label_logps(reference_logits, idk).expand_as(logits)
    policy_idk = label_logps(logits, idk)
    return dpo_scale * losses.dpo_loss(policy_idk, policy, reference_idk, reference, method.beta)


def retain_loss(logits: torch.Tensor, method: Method, reference_logits: torch.Tensor, answer: torch.Tensor,
                kl_direction: str) -> torch.Tensor:
    """The retain term on every retain point, (K, M, n), shapes as in `forget_loss`."""
    if method.retain == "rt":
        return losses.nll_loss(label_logps(logits, answer))
    return losses.kl_loss(two_class(logits), two_class(reference_logits.expand_as(logits)), kl_direction)


def grouped(methods: list, *keys: str) -> list:
    """[(rows of the stack, one of their methods)] for every combination of the methods' attributes `keys`."""
    found = {}
    for row, method in enumerate(methods):
        found.setdefault(tuple(getattr(method, key) for key in keys), []).append(row)
    return [(torch.tensor(rows), methods[rows[0]]) for rows in found.values()]


def mean_gradient(theta: torch.Tensor, Z: torch.Tensor, terms: list) -> torch.Tensor:
    """Gradient (K, M, N) of the mean losses over the points with features Z (K, n, N).

    terms: (rows of M, their loss as a function of their logits).
    """
    logits = theta @ Z.mT
    slopes = torch.zeros_like(logits)
    for rows, loss in terms:
        own = logits[:, rows].requires_grad_()
        [slopes[:, rows]] = torch.autograd.grad(loss(own), own, torch.ones_like(own))
    return slopes @ Z / Z.shape[1]


def kl_distance(retrained_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(pi_retr || pi_theta) in nats, mean over the n points: (K, 1, n) and (K, M, n) -> (K, M)."""
    retrained = two_class(retrained_logits.expand_as(logits))
    return losses.kl_loss(two_class(logits), retrained, "reference_policy").mean(-1)


class Problem:
    """K instances at one alpha with their pi_ref and pi_retr: unlearns any methods, measures on the way."""

    def __init__(self, instances: list, alpha: float, models: list, points: str = "test"):
        def features(name: str, mean: float):
            return torch.from_numpy(np.stack([own.features(getattr(own, name), mean) for own in instances]))

        def signs(name: str):
            return torch.from_numpy(np.stack([2 * getattr(own, name)[None] - 1 for own in instances]))

        self.Z_forget, self.Z_retain = features("x_forget", alpha), features("x_retain", -alpha)
        self.labels = {name: signs(name) for name in ("y_forget", "y_idk", "y_retain")}
        self.reference, retrained = torch.from_numpy(np.stack(models)).mT.split(1, dim=1)  # (K, 1, N) each
        tests = self.Z_forget, self.Z_retain
        if points == "test":
            tests = features("x_forget_test", alpha), features("x_retain_test", -alpha)
        self.tests = [(Z, retrained @ Z.mT) for Z in tests]

    def distances(self, theta: torch.Tensor) -> torch.Tensor:
        """Forget and retain distance of (K, M, N) parameters, (K, M, 2). An overflow is an infinite one."""
        distance = torch.stack([kl_distance(retrained, theta @ Z.mT) for Z, retrained in self.tests], -1)
        return distance.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)

    def terms(self, methods: list, dpo_scale: float, kl_direction: str) -> tuple[list, list]:
        """Terms of `mean_gradient` on the forget and on the retain set, for a stack of methods."""
        forget = {"reference_logits": self.reference @ self.Z_forget.mT, "answer": self.labels["y_forget"],
                  "idk": self.labels["y_idk"], "dpo_scale": dpo_scale}
        retain = {"reference_logits": self.reference @ self.Z_retain.mT, "answer": self.labels["y_retain"],
                  "kl_direction": kl_direction}
        return ([(rows, partial(forget_loss, method=method, **forget))
                 for rows, method in grouped(methods, "family", "beta")],
                [(rows, partial(retain_loss, method=method, **retain))
                 for rows, method in grouped(methods, "retain") if method.retain])

    def unlearn(self, methods: list, steps: int, eval_steps: list, dpo_scale: float,
                kl_direction: str) -> np.ndarray:
        """Full-batch gradient descent from pi_ref, all at once: distances at `eval_steps`, (K, M, 2, E)."""
        forget, retain = self.terms(methods, dpo_scale, kl_direction)
        lr = torch.tensor([[method.lr] for method in methods], dtype=torch.float64)
        theta, kept, wanted = self.reference.repeat(1, len(methods), 1), [], set(eval_steps)
        for step in range(steps + 1):
            if step in wanted:
                kept.append(self.distances(theta))
            gradient = mean_gradient(theta, self.Z_forget, forget)
            if retain:
                gradient += mean_gradient(theta, self.Z_retain, retain)
            theta -= lr * gradient
        return torch.stack(kept, -1).numpy()


# ---------------------------------------------------------------------------------------- many instances


def reference_and_retrained_kept(instance: Instance, alpha: float, kept: Path) -> np.ndarray:
    """`reference_and_retrained` of an instance, read from `kept` where the same data and schedule were
    trained before.

    The file's name is a fingerprint of everything that the result depends on, so a stale one cannot be met.
    """
    rows = (instance.features(instance.x_retain, -alpha), instance.y_retain,
            instance.features(instance.x_forget, +alpha), instance.y_forget)
    digest = hashlib.sha256(json.dumps([TRAIN_LR, TRAIN_STEPS]).encode())
    for array in rows:
        digest.update(array.tobytes())
    path = kept / f"{digest.hexdigest()[:32]}.npy"
    if path.exists():
        return np.load(path)
    models = reference_and_retrained(*rows)
    kept.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.stem}.{os.getpid()}.npy")  # moved into place: never half a file
    np.save(aside, models)
    aside.replace(path)
    return models


def unlearn(instances: list, alpha: float, models: list, points: str, *settings) -> np.ndarray:
    return Problem(instances, alpha, models, points).unlearn(*settings)


class Workers:
    """map over processes, with a progress bar; in this process for one worker. The numbers are the same."""

    def __init__(self, count: int):
        # fork: a worker inherits torch in milliseconds where a fresh interpreter would import it again
        self.pool = None
        if count > 1:
            self.pool = ProcessPoolExecutor(count, get_context("fork"), torch.set_num_threads, (1,))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def map(self, function, jobs: list, what: str) -> list:
        done = (self.pool.map if self.pool else map)(function, *zip(*jobs, strict=True))
        return list(tqdm(done, what, len(jobs), ncols=100, file=sys.stderr))


def run(workers: Workers, instances: list, alphas: list, methods: dict, args) -> dict:
    """alpha -> curves (K, M, 2, E) of `methods[alpha]` on every instance: forget and retain distance."""
    jobs = [(instance, alpha, args.kept) for alpha in alphas for instance in instances]
    models = iter(workers.map(reference_and_retrained_kept, jobs, "pi_ref, pi_retr"))
    stacks = [instances[start:start + TOGETHER] for start in range(0, len(instances), TOGETHER)]
    jobs = [(stack, alpha, [next(models) for _ in stack], args.points, methods[alpha], args.steps,
             args.eval_steps, args.dpo_scale, args.kl_direction) for alpha in alphas for stack in stacks]
    curves = iter(workers.map(unlearn, jobs, "unlearning"))
    return {alpha: np.concatenate([next(curves) for _ in stacks]) for alpha in alphas}


# ------------------------------------------------------------------------------------------ the commands


def default_methods(alpha: float, names: tuple, lr: float | None, beta: float | None) -> list:
    """The published settings (alpha 1's where the paper has no such alpha), or lr and beta where given."""
    result = []
    for name in names:
        own_lr, own_beta = PUBLISHED[0 if alpha == 0 else 1][name.partition("+")[0]]
        result.append(Method(name, lr or own_lr, own_beta and (beta or own_beta)))
    return result


def provenance(args) -> dict:
    instances = f"published, seeds {', '.join(map(str, PUBLISHED_SEEDS))}"
    if args.instances:
        instances = f"{args.instances} fresh, seed {args.seed}"
    settings = ("steps", "eval_every", "dpo_scale", "points", "kl_direction", "workers")
    return {**environment(), "instances": instances, "train_lr": TRAIN_LR, "train_steps": TRAIN_STEPS,
            **{key: getattr(args, key) for key in settings}, "numpy": np.__version__}


def run_figures(args, workers: Workers, instances: list):
    """Figure 4 for every alpha, or Figure 3."""
    methods = {alpha: default_methods(alpha, args.methods, args.lr, args.beta) for alpha in args.alphas}
    if args.figure == 3:
        methods = {alpha: FIGURE3_METHODS for alpha in args.alphas}
    for alpha, curves in run(workers, instances, args.alphas, methods, args).items():
        record = pages.curves_record(alpha, methods[alpha], curves, args.eval_steps, bool(args.instances))
        record |= claims.verdicts(args.figure, record, curves) | {"provenance": provenance(args)}
        pages.write_figure(args.out, args.figure, methods[alpha], record)


CRITERION = ("Every method at every lr (and beta) of the grid. Stable: at the last step the mean over the "
             "instances is finite, and no farther from pi_retr than at the start (forget + retain distance). "
             "Chosen: of the stable, the one with the smallest forget + retain distance at the last step.")


def run_grid(args, workers: Workers, instances: list):
    """The paper's grid, chosen so that training "remains stable within 2000 steps"; the criterion is ours."""
    settings = {}
    for alpha in args.alphas:
        settings[alpha] = [Method(name, lr, beta) for name in args.methods for lr in args.grid_lr
                           for beta in (args.grid_beta if name.startswith(("npo", "dpo")) else [None])]
    args.eval_steps = [0, args.steps]
    for alpha, curves in run(workers, instances, args.alphas, settings, args).items():
        rows = []
        for method, curve in zip(settings[alpha], curves.mean(0), strict=True):
            start, end = curve.sum(0)
            rows.append({"method": method.name, "lr": method.lr, "beta": method.beta,
                         "forget_distance": curve[0, 1], "retain_distance": curve[1, 1],
                         "stable": bool(np.isfinite(end) and end <= start)})
        published = default_methods(alpha, args.methods, None, None)
        record = {"alpha": alpha, "criterion": CRITERION,
                  "grid": {"lr": args.grid_lr, "beta": args.grid_beta},
                  "chosen": {method.name: choose(rows, method) for method in published}, "rows": rows,
                  "provenance": provenance(args)}
        pages.write_grid(args.out, record)


def choose(rows: list, published: Method) -> dict:
    """The best row of a method by CRITERION (of all, where none is stable), beside the published setting."""
    own = [row for row in rows if row["method"] == published.name]
    best = min(own, key=lambda row: (not row["stable"], row["forget_distance"] + row["retain_distance"]))
    same = [row for row in own if (row["lr"], row["beta"]) == (published.lr, published.beta)]
    return {"chosen": best, "published": same[0] if same else {"lr": published.lr, "beta": published.beta},
            "stable_settings": sum(row["stable"] for row in own), "settings": len(own)}


def build_parser() -> Parser:
    parser = Parser(prog="synthetic.py", description=__doc__)
    add = parser.add_argument
    add("--alpha", type=not_negative(float), help="half the distance of forget and retain means (default 1)")
    add("--all", action="store_true", help="Figure 4 for alpha = 1 and alpha = 0")
    add("--figure", type=int, choices=(3, 4), default=4, help="default 4")
    add("--methods", nargs="+", metavar="METHOD", default=METHODS,
        help=f"Figure 4: some of {' '.join(METHODS)} (default all)")
    add("--lr", type=positive(float), help="Figure 4: step size of every method (default: published)")
    add("--beta", type=positive(float), help="Figure 4: beta of npo and dpo (default: published)")
    add("--instances", type=positive(int), help="that many fresh instances (default: the published five)")
    add("--seed", type=not_negative(int), help="of the fresh instances (default 0)")
    add("--steps", type=positive(int), help="unlearning steps (default 2000; Figure 3: 10000)")
    add("--eval-every", type=positive(int), help="steps between evaluations (default 25; Figure 3: 5)")
    add("--grid-search", action="store_true", help="choose lr and beta on a grid, beside the published")
    for flag, grid in (("--grid-lr", GRID_LR), ("--grid-beta", GRID_BETA)):
        add(flag, nargs="+", type=positive(float), help=f"default {' '.join(f'{x:g}' for x in grid)}")
    add("--dpo-scale", type=positive(float), default=2.0,
        help="s of -(s/beta) log sigmoid: 2 published, 1 Eq. 2 (default 2)")
    add("--kl-direction", choices=losses.KL_DIRECTIONS, default="reference_policy",
        help="K: D(pi_ref || pi_theta), published (default), or the text's D(pi_theta || pi_ref)")
    add("--points", choices=("test", "train"), default="test",
        help="distances over 1000 fresh points of each kind, published (default), or over the training sets")
    add("--workers", type=positive(int), help="processes, the numbers don't depend on it (default: cores)")
    add("--kept", type=Path, default=KEPT, help="folder of pi_ref and pi_retr (default runs/synthetic)")
    add("--out", type=Path, default=Path("runs/synthetic"),
        help="folder for JSON, pictures, pages (default runs/synthetic)")
    return parser


def refuse_contradictions(args):
    """Raises InputError for settings that don't go together."""
    names, grids = " ".join(args.methods), [grid for grid in (args.grid_lr, args.grid_beta) if grid]
    unknown = set(args.methods) - set(METHODS) or len(set(args.methods)) < len(args.methods)
    without_beta = not any(name.startswith(("npo", "dpo")) for name in args.methods)
    of_figure4 = args.methods != METHODS or args.lr or args.beta or args.grid_search
    no_fork = (args.workers or 1) > 1 and not hasattr(os, "fork")
    for wrong, sentence in (
            (args.all and args.alpha is not None, "--all runs alpha 1 and 0: drop it, or --alpha"),
            (args.all and args.figure == 3, "--all is Figure 4 for both alpha: drop it, or --figure 3"),
            (unknown, f"--methods {names} given, different ones out of {' '.join(METHODS)} needed"),
            (args.figure == 3 and of_figure4,
             "--figure 3 has its own methods, lr and beta: drop --methods, --lr, --beta and --grid-search"),
            (args.beta and without_beta, f"--beta given, but none of {names} has one: add npo or dpo"),
            (args.seed is not None and not args.instances,
             "--seed given, but the published instances have their own: add --instances 5"),
            (grids and not args.grid_search, "--grid-lr or --grid-beta given: add --grid-search"),
            (any(len(set(grid)) < 2 for grid in grids),
             "--grid-lr or --grid-beta has one value, a grid has two or more: add another"),
            (args.grid_search and (args.lr or args.beta or args.eval_every),
             "--grid-search chooses lr and beta and looks at the last step: drop --lr, --beta, --eval-every"),
            (no_fork, f"--workers {args.workers} given, but this system cannot fork: drop it")):
        if wrong:
            raise InputError(sentence)


def parse_args(argv: list | None):
    args = build_parser().parse_args(argv)
    args.methods = tuple(name for text in args.methods for name in text.split(","))
    refuse_contradictions(args)
    args.alphas = [1.0, 0.0] if args.all else [1.0 if args.alpha is None else args.alpha]
    args.steps = args.steps or (10_000 if args.figure == 3 else 2000)
    args.eval_every = min(args.eval_every or (5 if args.figure == 3 else 25), args.steps)
    args.eval_steps = sorted({*range(0, args.steps, args.eval_every), args.steps})
    args.seed = args.seed or 0
    args.grid_lr = list(dict.fromkeys(args.grid_lr or GRID_LR))
    args.grid_beta = list(dict.fromkeys(args.grid_beta or GRID_BETA))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # elsewhere fork isn't safe
    args.workers = args.workers or cores
    for folder in (args.out, args.kept):  # what can't be written is refused before the work
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return args


def main(argv: list | None = None):
    began = time.time()
    args = parse_args(argv)
    if any(alpha not in PUBLISHED for alpha in args.alphas):
        print(f"alpha {args.alphas[0]:g} has no published lr and beta: alpha 1's are used, or the flags'")
    if args.instances:
        instances = [fresh_instance(args.seed, number) for number in range(args.instances)]
    else:
        instances = [published_instance(seed) for seed in PUBLISHED_SEEDS]
    action = run_grid if args.grid_search else run_figures
    with Workers(min(args.workers, len(instances) * len(args.alphas))) as workers:
        action(args, workers, instances)
    print(f"{time.time() - began:.1f} s")


if __name__ == "__main__":
    run_command(main, "synthetic.py")
