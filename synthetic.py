"""Section 4 of the NPO paper: Gaussian-logistic data, a random-feature model, ten methods; Figures 3 and 4.

    python synthetic.py --alpha 1                   # Figure 4 (a1)-(a3): forget and retain means far apart
    python synthetic.py --all                       # Figure 4 for alpha = 1 and alpha = 0
    python synthetic.py --figure 3                  # NPO's path tends to gradient ascent's as beta -> 0
    python synthetic.py --alpha 1 --instances 50    # do the claims hold on instances the paper did not draw?
    python synthetic.py --alpha 1 --grid-search     # every lr and beta of the paper's grid

The data are drawn in `data/synthetic_instances.py`. The policy is pi_theta(1|x) = sigmoid(theta . relu(W x))
with a fixed W. The reference pi_ref is trained on both sets, the retrained model pi_retr on the retain set
alone. Unlearning starts at pi_ref and descends an objective from `losses.py` by autograd. A good method ends
near pi_retr: the forget distance is KL(pi_retr || pi_theta) on forget points, the retain distance the same on
retain points. The published curves are reproduced, including their random stream.

Where the published runs differ from the paper's text, this script follows the runs:
- DPO has the factor 2/beta. Eq. 2 and `losses.dpo_loss` have 1/beta, so the loss is doubled here.
- K is D(pi_ref || pi_theta). The text has D(pi_theta || pi_ref).
- Distances are means over 1000 fresh test points. The text takes the forget and the retain set.
- pi_ref and pi_retr are 20,000 steps of gradient descent from 0, not optima. They must not be: the retain set
  is nearly separable in some directions, so its optimum is nearly unbounded.
- Figure 3 shows the distance from pi_retr on both axes. Its caption says "difference" (from pi_ref).
"""

import math
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import CubicSpline
from scipy.spatial import KDTree
from tqdm import tqdm

import losses
from common import InputError, Parser, environment, positive, run_command
from data.synthetic_instances import PUBLISHED_SEEDS, Instance, fresh_instance, published_instance
from study.report import draw, judged, make_folder, plain, table, write


class Method(NamedTuple):
    """An objective and its step size. The name is the forget loss (ga, npo, dpo, idk) and the retain term, if
    there is one (npo+rt, npo+kl). In Figure 3 it is the forget loss and beta (npo@0.1)."""
    name: str
    lr: float
    beta: float | None = None

    @property
    def loss(self) -> str:
        return re.split("[+@]", self.name)[0]

    @property
    def retain(self) -> str:
        return self.name.partition("+")[2]


# Shapes: N features, n rows, M methods and K instances (unlearned together), E evaluations.
TRAIN_LR, TRAIN_STEPS = 0.05, 20_000  # of pi_ref and pi_retr
METHODS = ("npo+rt", "npo", "npo+kl", "ga+rt", "ga", "ga+kl", "idk+rt", "dpo+rt", "dpo", "dpo+kl")
FIGURE4 = ("npo+rt", "npo", "ga+rt", "ga", "idk+rt", "dpo+rt")  # the methods that the paper's figure shows
PUBLISHED = {  # alpha -> loss -> (lr, beta)
    1: {"ga": (5e-4, None), "idk": (5e-4, None), "npo": (5e-3, 1.0), "dpo": (5e-3, 0.1)},
    0: {"ga": (1e-4, None), "idk": (1e-4, None), "npo": (5e-2, 10.0), "dpo": (5e-2, 5.0)}}
FIGURE3_METHODS = [Method("ga", 5e-4), *(Method(f"npo@{b:g}", 5e-4, b) for b in (0.01, 0.1, 0.2, 0.5, 1.0))]
GRID_LR, GRID_BETA = (2e-5, 1e-4, 5e-4, 2e-3, 5e-3, 2e-2, 5e-2), (0.1, 0.5, 1.0, 5.0, 10.0)
DISTANCES = ("forget_distance", "retain_distance")
COLOR = {"npo": "black", "dpo": "tab:blue", "ga": "tab:red", "idk": "tab:gray"}
LINE = {"rt": "-", "": "--", "kl": ":"}
TOGETHER = 3  # instances that are unlearned as one stack


def published_methods(alpha: float, names: tuple = METHODS) -> list:
    """The published settings; alpha 1's if the paper has no such alpha."""
    settings = PUBLISHED.get(alpha, PUBLISHED[1])
    return [Method(name, *settings[name.partition("+")[0]]) for name in names]


# ----------------------------------------------------------------------- the models, and the ten methods
def reference_and_retrained(instance: Instance, alpha: float, steps: int) -> np.ndarray:
    """theta of pi_ref and pi_retr, (2, N): full-batch gradient descent on the mean cross-entropy, from 0."""
    x = np.concatenate([instance.x_retain - alpha, instance.x_forget + alpha])
    Z = torch.from_numpy(instance.features(x)).T.contiguous()  # (N, n)
    y = torch.from_numpy(np.concatenate([instance.y_retain, instance.y_forget]))
    rates, retain = torch.zeros(2, len(y), dtype=torch.float64), len(instance.y_retain)
    rates[0], rates[1, :retain] = TRAIN_LR / len(y), TRAIN_LR / retain  # 0 on pi_retr's forget rows
    theta = torch.zeros(2, len(Z), dtype=torch.float64)
    for _ in range(steps):  # the gradient by hand: autograd takes three times as long
        theta -= (rates * ((theta @ Z).sigmoid() - y)) @ Z.T
    return theta.numpy()


def forget_loss(logits: torch.Tensor, method: Method, reference_logits: torch.Tensor, answer: torch.Tensor,
                idk: torch.Tensor) -> torch.Tensor:
    """The loss on every forget point, (K, M, n), of methods that differ only in lr or retain term.

    logits (K, M, n) are log-odds. The reference's logits, the labels and the "I don't know" labels are
    (K, 1, n). Labels are 1 or -1, so log pi(label) is logsigmoid(label * logits).
    """
    policy, policy_idk = F.logsigmoid(answer * logits), F.logsigmoid(idk * logits)
    reference, reference_idk = (F.logsigmoid(labels * reference_logits).expand_as(logits)
                                for labels in (answer, idk))
    if method.loss == "ga":
        return losses.ga_loss(policy)
    if method.loss == "idk":
        return losses.nll_loss(policy_idk)
    if method.loss == "npo":
        return losses.npo_loss(policy, reference, method.beta)
    return 2 * losses.dpo_loss(policy_idk, policy, reference_idk, reference, method.beta)


def kl(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(pi_reference || pi_theta) in nats, (K, M, n), from log-odds (K, 1, n) and (K, M, n)."""
    policy, reference = (torch.stack([torch.zeros_like(logits), log_odds], -1)  # logits of labels 0 and 1
                         for log_odds in (logits, reference_logits.expand_as(logits)))
    return losses.kl_loss(policy, reference, "reference_policy")


def retain_loss(logits: torch.Tensor, method: Method, reference_logits: torch.Tensor,
                answer: torch.Tensor) -> torch.Tensor:
    """The retain term on every retain point, (K, M, n), shapes as in `forget_loss`."""
    if method.retain == "rt":
        return losses.nll_loss(F.logsigmoid(answer * logits))
    return kl(reference_logits, logits)


def grouped(methods: list, *keys: str) -> list:
    """[(places in `methods`, one of these methods)] for every combination of the attributes `keys`."""
    groups = {}
    for place, method in enumerate(methods):
        groups.setdefault(tuple(getattr(method, key) for key in keys), []).append(place)
    return [(torch.tensor(places), methods[places[0]]) for places in groups.values()]


class Problem:
    """K instances at one alpha with their pi_ref and pi_retr: unlearns methods and measures distances."""

    def __init__(self, instances: list, alpha: float, models: list):
        def features(name: str, mean: float):  # (K, N, n)
            Z = np.stack([instance.features(getattr(instance, name) + mean) for instance in instances])
            return torch.from_numpy(Z).mT.contiguous()

        def signs(name: str):  # -1 for label 0, (K, 1, n)
            return torch.from_numpy(np.stack([2 * getattr(x, name)[None] - 1 for x in instances]))

        self.Z_forget, self.Z_retain = features("x_forget", alpha), features("x_retain", -alpha)
        tests = features("x_forget_test", alpha), features("x_retain_test", -alpha)
        self.reference, retrained = torch.from_numpy(np.stack(models)).split(1, dim=1)  # (K, 1, N) each
        self.tests = [(Z, retrained @ Z) for Z in tests]
        self.forget = {"reference_logits": self.reference @ self.Z_forget, "answer": signs("y_forget"),
                       "idk": signs("y_idk")}
        self.retain = {"reference_logits": self.reference @ self.Z_retain, "answer": signs("y_retain")}

    def distances(self, theta: torch.Tensor) -> torch.Tensor:
        """Forget and retain distance of (K, M, N) parameters in nats, (K, M, 2)."""
        return torch.stack([kl(retrained, theta @ Z).mean(-1) for Z, retrained in self.tests], -1)

    def objective(self, theta: torch.Tensor, by_loss: list, by_term: list) -> torch.Tensor:
        """The sum of the objectives over methods and instances. These share no parameters, so the gradient of
        the sum is the gradient of each."""
        logits = theta @ self.Z_forget
        terms = [forget_loss(logits[:, places], method, **self.forget) for places, method in by_loss]
        if by_term:
            logits = theta @ self.Z_retain
            terms += [retain_loss(logits[:, places], method, **self.retain) for places, method in by_term]
        return sum(term.mean(-1).sum() for term in terms)

    def unlearn(self, methods: list, eval_steps: list) -> np.ndarray:
        """Full-batch gradient descent from pi_ref, all at once: distances at `eval_steps`, (K, M, 2, E)."""
        by_loss = grouped(methods, "loss", "beta")
        by_term = [group for group in grouped(methods, "retain") if group[1].retain]
        lr = torch.tensor([[method.lr] for method in methods], dtype=torch.float64)
        theta, curves = self.reference.repeat(1, len(methods), 1), []
        for step in range(eval_steps[-1] + 1):
            if step == eval_steps[len(curves)]:
                curves.append(self.distances(theta))
            theta.requires_grad_()
            [gradient] = torch.autograd.grad(self.objective(theta, by_loss, by_term), theta)
            theta = theta.detach() - lr * gradient
        return torch.stack(curves, -1).numpy()


def unlearned(instances: list, alpha: float, methods: list, eval_steps: list, train_steps: int) -> np.ndarray:
    """Train pi_ref and pi_retr, then unlearn with every method: distances, (K, M, 2, E)."""
    models = [reference_and_retrained(instance, alpha, train_steps) for instance in instances]
    return Problem(instances, alpha, models).unlearn(methods, eval_steps)


def run(instances: list, methods: dict, eval_steps: list) -> dict:
    """alpha -> curves (K, M, 2, E) of `methods[alpha]` on every instance, in one process per core."""
    stacks = [instances[start:start + TOGETHER] for start in range(0, len(instances), TOGETHER)]
    jobs = [(stack, alpha, methods[alpha], eval_steps, TRAIN_STEPS) for stack in stacks for alpha in methods]
    # one thread per process: the matrices are too small to share
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        curves = [*tqdm(pool.map(unlearned, *zip(*jobs, strict=True)), "unlearning", len(jobs), ncols=100)]
    return {alpha: np.concatenate(curves[i::len(methods)]) for i, alpha in enumerate(methods)}


# ------------------------------------------------------------------------------------- the paper's claims
# A path (2, E) is a method's forget and retain distance at `steps` (E,), of an instance or of the mean over
# instances. A claim's result is (whether it holds, the numbers that decide).
SMALL, WITHIN = 0.005, 1200  # "small forget distance (less than 0.005) within 1200 steps"
LEVELS = np.geomspace(SMALL, 0.17, 10)  # forget distances at which frontiers are compared; the start is 1.70
NEAR = "at forget distances of at most a tenth of the start's"


def levels_off(path: np.ndarray, steps: np.ndarray) -> tuple:
    """The retain distance stays below five times its start and grows less in the last quarter of the run than
    in the third, while the forget distance at least halves."""
    (forget, retain), quarter = path, (len(steps) - 1) // 4
    half, late, end = retain[[-1 - 2 * quarter, -1 - quarter, -1]]
    slows_down = end <= late or end - late < late - half
    return forget.min() < forget[0] / 2 and retain.max() < 5 * retain[0] and slows_down, {
        "start": retain[0], "peak": retain.max(), "peak_step": steps[retain.argmax()],
        "third_quarter_growth": late - half, "last_quarter_growth": end - late}


def frontier(path: np.ndarray) -> np.ndarray:
    """The Pareto frontier (10,): the least retain distance at a forget distance of at most each of LEVELS, or
    infinity. Between evaluations the path is taken as straight in (log forget, retain)."""
    (forget, retain), level = path, LEVELS[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.log(forget[:-1] / level) / np.log(forget[:-1] / forget[1:])  # of the way to the next point
        crossing = retain[:-1] + part * np.diff(retain)
    crosses = (forget[:-1] - level) * (forget[1:] - level) < 0
    at_points = np.where(forget <= level, retain, math.inf).min(1)
    return np.minimum(at_points, np.where(crosses, crossing, math.inf).min(1))


def better_frontier(paths: dict) -> tuple:
    """At every level that a method reaches, none has a smaller retain distance than the first method. At one
    level or more, all have a larger one."""
    first, *rivals = map(frontier, paths.values())
    best = np.min(rivals, axis=0)
    reached = np.isfinite(np.minimum(first, best))
    ratio = first[reached] / best[reached]  # 0 where only the first gets there, inf where only a rival does
    return (ratio <= 1).all() and (ratio < 1).any(), {
        "levels_reached": int(reached.sum()), "median_ratio": np.median(ratio) if len(ratio) else math.nan,
        "worst_ratio": ratio.max(initial=0.0)}


def figure4_gap(paths: dict, steps: np.ndarray) -> dict:
    """Figure 4 at alpha > 0: {claim: result}. A retain distance diverges if it at least triples, and grows by
    more in the second half of the run than in the first."""
    least = {name: forget[steps <= WITHIN].min() for name, (forget, _) in paths.items() if name != "idk+rt"}
    places = {"start": 0, "middle": len(steps) // 2, "end": -1}
    growth = {name: {at: paths[name][1, place] for at, place in places.items()} for name in ("ga", "ga+rt")}
    diverge = all(n["end"] > 3 * n["start"] and n["end"] - n["middle"] > n["middle"] - n["start"]
                  for n in growth.values())
    return {
        "All methods of the figure but idk+rt reach a forget distance below 0.005 within 1200 steps":
            (max(least.values()) < SMALL, {"least_forget_distance": least}),
        "idk+rt never does": (paths["idk+rt"][0].min() >= SMALL,
                              {"least_forget_distance": paths["idk+rt"][0].min()}),
        "The retain distances of ga and ga+rt diverge": (diverge, growth),
        "npo+rt's retain distance grows slowly and levels off": levels_off(paths["npo+rt"], steps),
        "dpo+rt's retain distance grows slowly and levels off": levels_off(paths["dpo+rt"], steps),
        f"npo+rt has the best Pareto frontier of the figure, {NEAR}": better_frontier(paths),
        f"Without the retain set npo has a better Pareto frontier than ga, {NEAR}":
            better_frontier({name: paths[name] for name in ("npo", "ga")})}


def figure4_no_gap(paths: dict, steps: np.ndarray) -> dict:
    """Figure 4 at alpha = 0: {claim: result}. Equal means never farther apart than a tenth of their sum. The
    smallest distances are those along the run; they must also be below the start."""
    gap = {name: (abs(np.diff(path, axis=0)) / path.sum(0)).max() for name, path in paths.items()}
    least = {name: path.min(1) for name, path in paths.items()}
    rivals = [paths["npo+rt"][:, 0], *(least[name] for name in paths if name != "npo+rt")]
    return {
        "Forget and retain distances are equal": (max(gap.values()) <= 0.1, {"largest_relative_gap": gap}),
        "npo+rt attains the smallest forget and retain distances": (
            (least["npo+rt"] < rivals).all(), {"least_forget_and_retain_distance": least})}


def figure3(paths: dict, steps: np.ndarray) -> dict:
    """Figure 3: {claim: result}. Of npo's paths, that for the smallest beta is the closest to ga's, within
    0.02 decades (5%) of it. Each evaluation is compared with the nearest point of a spline through ga's."""
    dense = np.linspace(0, steps[-1], 20_001)
    ga_path = KDTree(CubicSpline(steps, np.log10(paths["ga"]), axis=1)(dense).T)
    gap = {name.partition("@")[2]: float(ga_path.query(np.log10(path).T)[0].max())
           for name, path in paths.items() if name != "ga"}
    smallest, largest = gap[min(gap, key=float)], gap[max(gap, key=float)]
    return {"npo's curve goes to ga's as beta -> 0": (smallest == min(gap.values()) and smallest < 0.02, {
        "path_gap_decades": gap, "smallest_beta": smallest, "largest_beta": largest})}


def verdicts(figure: int, alpha: float, paths: dict, steps: np.ndarray) -> list:
    """Verdicts on {method: (K, 2, E)}. There are none for an alpha that the paper lacks, a run without all
    methods of the figure, a short run, or one that is evaluated rarely."""
    judge = figure3 if figure == 3 else figure4_gap if alpha > 0 else figure4_no_gap
    complete = figure == 3 or (alpha in PUBLISHED and set(paths) == set(FIGURE4))
    long = steps[-1] >= (2000 if figure == 3 else WITHIN) and np.diff(steps).max() <= 100
    return judged(judge, paths, steps) if complete and long else []


# ---------------------------------------------------------------------------------------------- a figure
def curves_record(alpha: float, methods: list, curves: np.ndarray, steps: list) -> dict:
    """What a figure shows, from curves (K, M, 2, E): settings, mean and sd (ddof 0) over the instances."""
    record = {"alpha": alpha, "start": {}, "methods": {}}
    for m, method in enumerate(methods):
        entry = record["methods"][method.name] = {"lr": method.lr, "beta": method.beta, "steps": steps}
        for axis, key in enumerate(DISTANCES):
            values = curves[:, m, axis]
            entry[key] = {"mean": values.mean(0), "sd": values.std(0), "instances": values}
            record["start"][key] = {of: entry[key][of][0] for of in ("mean", "sd")}  # of every method
    return record


def draw_figure(path: Path, figure: int, alpha: float, paths: dict, steps: list):
    """Figure 4: {method: (K, 2, E)} over steps and against each other. Figure 3: against each other, the mean
    over the instances and the first instance."""
    def path_panel(title: str, curves: dict) -> tuple:
        scale = "log" if alpha > 0 else "linear"
        return {"title": title, "xlabel": "forget distance, nats", "ylabel": "retain distance, nats",
                "xscale": scale, "yscale": scale}, {**curves, "start": next(iter(curves.values()))[:, :1]}

    mean, sd = ({name: getattr(values, of)(0) for name, values in paths.items()} for of in ("mean", "std"))
    if figure == 3:
        title = "The smaller $\\beta$, the closer npo's path comes to ga's"
        panels = [path_panel("mean over instances", mean),
                  path_panel("the first instance", {name: values[0] for name, values in paths.items()})]
        styles = {"ga": {"color": COLOR["ga"]}}
    else:
        closest = min(mean, key=lambda name: mean[name][:, -1].sum())
        title = f"$\\alpha$ = {alpha:g}: {closest} ends closest to the retrained model"
        panels = [({"title": f"{key.replace('_', ' ')}, nats: mean ± sd", "xlabel": "step", "yscale": "log"},
                   {name: (steps, y[axis], np.maximum(y - sd[name], 0.1 * y)[axis], (y + sd[name])[axis])
                    for name, y in mean.items()}) for axis, key in enumerate(DISTANCES)]
        panels.append(path_panel("mean over instances: lower left is better", mean))
        styles = {name: {"color": COLOR[name.partition("+")[0]], "linestyle": LINE[name.partition("+")[2]]}
                  for name in paths}
    draw(path, title, panels, {**styles, "start": {"marker": "*", "color": "black", "markersize": 12}})


def run_figures(args, instances: list):
    """Figure 4 for every alpha, or Figure 3: a JSON file, a page and a picture each."""
    methods = {alpha: FIGURE3_METHODS if args.figure == 3 else published_methods(alpha, args.methods)
               for alpha in args.alphas}
    for alpha, curves in run(instances, methods, args.eval_steps).items():
        record = curves_record(alpha, methods[alpha], curves, args.eval_steps)
        paths = dict(zip(record["methods"], curves.swapaxes(0, 1), strict=True))
        if set(FIGURE4) <= set(paths):
            paths = {name: paths[name] for name in FIGURE4}  # the paper's picture and claims are about these
        results = verdicts(args.figure, alpha, paths, np.array(args.eval_steps))
        last = [{"method": name, "lr": entry["lr"], "beta": entry["beta"]} | {
            f"last {key.replace('_', ' ')}": f"{entry[key]['mean'][-1]:.4g} ± {entry[key]['sd'][-1]:.2g}"
            for key in DISTANCES} for name, entry in record["methods"].items()]
        stem = args.out / ("synthetic_figure3" if args.figure == 3 else f"synthetic_alpha{alpha:g}")
        print(write(stem, {**plain(record, 10), "verdicts": results, "provenance": args.provenance},
                    f"Figure {args.figure}, alpha = {alpha:g}", table(last)))
        draw_figure(Path(f"{stem}.png"), args.figure, alpha, paths, args.eval_steps)


def run_grid(args, instances: list):
    """Every method at every lr and beta of the grid. The paper chose so that training "remains stable within
    2000 steps". Here, stable means that forget + retain distance (means over the instances) is not larger at
    the last step than at the start. Chosen is the stable setting with the smallest sum."""
    grid = [Method(name, lr, beta) for name in args.methods for lr in GRID_LR
            for beta in (GRID_BETA if name.startswith(("npo", "dpo")) else [None])]
    for alpha, curves in run(instances, dict.fromkeys(args.alphas, grid), [0, args.steps]).items():
        rows = [{"method": method.name, "lr": method.lr, "beta": method.beta, "forget_distance": forget[1],
                 "retain_distance": retain[1], "stable": bool(forget[1] + retain[1] <= forget[0] + retain[0])}
                for method, (forget, retain) in zip(grid, curves.mean(0), strict=True)]
        rows.sort(key=lambda row: (not row["stable"], row["forget_distance"] + row["retain_distance"]))
        chosen = {name: next(row for row in rows if row["method"] == name) for name in args.methods}
        record = {"alpha": alpha, "grid": {"lr": GRID_LR, "beta": GRID_BETA}, "chosen": chosen, "rows": rows}
        print(write(args.out / f"synthetic_alpha{alpha:g}_grid",
                    plain(record, 10) | {"provenance": args.provenance}, f"Grid search, alpha = {alpha:g}",
                    " ".join(run_grid.__doc__.split()), table([*chosen.values()])))


# ------------------------------------------------------------------------------------------ the command
def parse_args(argv: list | None):
    """Raises InputError for a wrong flag, or for settings that contradict each other."""
    parser = Parser(__doc__)
    add, alphas = parser.add_argument, parser.add_mutually_exclusive_group()
    alphas.add_argument("--alpha", type=positive(float, or_zero=True), default=1.0,
                        help="half the means' difference per input (default 1; published: 1 and 0)")
    alphas.add_argument("--all", action="store_true", help="Figure 4 for alpha = 1 and alpha = 0")
    add("--figure", type=int, choices=(3, 4), default=4, help="default 4")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="of Figure 4 (default: all ten)")
    add("--instances", type=positive(int), help="number of fresh instances (default: the published five)")
    add("--seed", type=positive(int, or_zero=True), help="of the fresh instances (default 0)")
    add("--steps", type=positive(int), help="unlearning steps (default 2000; Figure 3: 10000)")
    add("--eval-every", type=positive(int), help="steps between evaluations (default 25; Figure 3: 5)")
    add("--grid-search", action="store_true", help="run every lr and beta of the paper's grid")
    add("--out", type=Path, default=Path("runs/synthetic"), help="folder to write (default runs/synthetic)")
    args = parser.parse_args(argv)
    if args.figure == 3 and (args.all or args.alpha != 1 or args.grid_search or args.methods != METHODS):
        raise InputError("--figure 3 has its own methods, lr and beta at alpha 1, as in the paper: drop "
                         "--alpha, --all, --methods and --grid-search")
    if args.seed is not None and not args.instances:
        raise InputError("--seed is for fresh instances; the published ones have seeds: add --instances 5")
    args.alphas = [1.0, 0.0] if args.all else [args.alpha]
    args.steps = args.steps or (10_000 if args.figure == 3 else 2000)
    args.eval_every = args.eval_every or (5 if args.figure == 3 else 25)
    args.eval_steps = [*range(0, args.steps, args.eval_every), args.steps]
    return args


def main(argv: list | None = None):
    args = parse_args(argv)
    make_folder(args.out)
    if args.instances:
        drawn = f"{args.instances} fresh, seed {args.seed or 0}"
        instances = [fresh_instance(args.seed or 0, number) for number in range(args.instances)]
    else:
        drawn = f"published, seeds {', '.join(map(str, PUBLISHED_SEEDS))}"
        instances = [published_instance(seed) for seed in PUBLISHED_SEEDS]
    args.provenance = {**environment(), "instances": drawn, "train_lr": TRAIN_LR, "train_steps": TRAIN_STEPS,
                       "steps": args.steps, "eval_every": args.eval_every}
    (run_grid if args.grid_search else run_figures)(args, instances)
    print(f"written: {args.out}")


if __name__ == "__main__":
    run_command(main)
