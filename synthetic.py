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

Where the published runs differ from the paper's text we follow the runs:
- DPO has the factor 2/beta, Eq. 2 has 1/beta. `losses.dpo_loss` is Eq. 2; here it is doubled.
- K is D(pi_ref || pi_theta), the text's is D(pi_theta || pi_ref).
- Distances are means over 1000 fresh test points, the text's over forget and retain set.
- pi_ref and pi_retr are 20,000 steps of gradient descent from 0, not optima. The optimum on the retain set is
  nearly unbounded (a few directions are all but separable), so the "retrained model" is early-stopped, and it
  has to be.
- Figure 3's caption says "difference"; drawn is the distance from pi_retr on both axes, as in Figure 4 (a3).
"""

import math
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import losses
from data.synthetic_instances import PUBLISHED_SEEDS, fresh_instance, published_instance
from study.sections import draw, plain, table, write
from study.synthetic_claims import verdicts
from support.command_line import Parser, cores, not_negative, positive, run_command
from support.errors import refuse
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
DISTANCES, START = ("forget_distance", "retain_distance"), "start ($\\pi_{ref}$)"
FAMILY_STYLE = {"npo": {"color": "#000000", "marker": "o"}, "dpo": {"color": "#1b7fb8", "marker": "s"},
                "ga": {"color": "#d1495b", "marker": "^"}, "idk": {"color": "#8f8f8f", "marker": "D"}}
TERM_LINE = {"rt": "-", "": "--", "kl": ":"}
TOGETHER = 3  # instances that are unlearned as one stack


def published_methods(alpha: float, names: tuple = METHODS) -> list:
    """The published settings; alpha 1's where the paper has no such alpha."""
    settings = PUBLISHED.get(alpha, PUBLISHED[1])
    return [Method(name, *settings[name.partition("+")[0]]) for name in names]


# ----------------------------------------------------------------------- the models, and the ten methods
def reference_and_retrained(Z_retain: np.ndarray, y_retain: np.ndarray, Z_forget: np.ndarray,
                            y_forget: np.ndarray, steps: int) -> np.ndarray:
    """theta of pi_ref and pi_retr, (N, 2): full-batch gradient descent on the mean cross-entropy, from 0."""
    def descend(Z, y):
        Z, y = torch.from_numpy(Z), torch.from_numpy(y)
        theta = torch.zeros(Z.shape[1], dtype=torch.float64)
        for _ in range(steps):  # autograd takes three times as long
            theta -= TRAIN_LR / len(Z) * (((Z @ theta).sigmoid() - y) @ Z)
        return theta.numpy()

    both = np.concatenate([Z_retain, Z_forget]), np.concatenate([y_retain, y_forget])
    return np.stack([descend(*both), descend(Z_retain, y_retain)], axis=1)


def forget_loss(logits: torch.Tensor, method: Method, reference_logits: torch.Tensor, answer: torch.Tensor,
                idk: torch.Tensor) -> torch.Tensor:
    """The loss on every forget point, (K, M, n), of methods that differ in lr or retain term alone.

    logits (K, M, n) are log-odds; the reference's, the labels and the "I don't know" labels are (K, 1, n). A
    label is 1 or -1, so that its log pi, `losses.token_logps` of two classes, is logsigmoid(label * logits).
    """
    policy, policy_idk = F.logsigmoid(answer * logits), F.logsigmoid(idk * logits)
    if method.family == "ga":
        return losses.ga_loss(policy)
    if method.family == "idk":
        return losses.nll_loss(policy_idk)
    reference = F.logsigmoid(answer * reference_logits).expand_as(logits)
    if method.family == "npo":
        return losses.npo_loss(policy, reference, method.beta)
    reference_idk = F.logsigmoid(idk * reference_logits).expand_as(logits)
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
    """[(rows of the stack, one of their methods)] for every combination of the methods' attributes `keys`."""
    found = {}
    for row, method in enumerate(methods):
        found.setdefault(tuple(getattr(method, key) for key in keys), []).append(row)
    return [(torch.tensor(rows), methods[rows[0]]) for rows in found.values()]


class Problem:
    """K instances at one alpha with their pi_ref and pi_retr: unlearns any methods, measures on the way."""

    def __init__(self, instances: list, alpha: float, models: list):
        def features(name: str, mean: float):  # (K, n, N)
            return torch.from_numpy(np.stack([own.features(getattr(own, name), mean) for own in instances]))

        def signs(name: str):  # -1 for label 0, (K, 1, n)
            return torch.from_numpy(np.stack([2 * getattr(own, name)[None] - 1 for own in instances]))

        self.Z_forget, self.Z_retain = features("x_forget", alpha), features("x_retain", -alpha)
        tests = features("x_forget_test", alpha), features("x_retain_test", -alpha)
        self.reference, retrained = torch.from_numpy(np.stack(models)).mT.split(1, dim=1)  # (K, 1, N) each
        self.tests = [(Z, retrained @ Z.mT) for Z in tests]
        self.forget = {"reference_logits": self.reference @ self.Z_forget.mT, "answer": signs("y_forget"),
                       "idk": signs("y_idk")}
        self.retain = {"reference_logits": self.reference @ self.Z_retain.mT, "answer": signs("y_retain")}

    def distances(self, theta: torch.Tensor) -> torch.Tensor:
        """Forget and retain distance of (K, M, N) parameters, (K, M, 2). An overflow is an infinite one."""
        distance = torch.stack([kl(retrained, theta @ Z.mT).mean(-1) for Z, retrained in self.tests], -1)
        return distance.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)

    def objectives(self, theta: torch.Tensor, by_loss: list, by_term: list) -> torch.Tensor:
        """The sum of all that instances and methods descend, a scalar: its gradient is each one's own."""
        logits = theta @ self.Z_forget.mT
        total = sum(forget_loss(logits[:, rows], method, **self.forget).mean(-1).sum()
                    for rows, method in by_loss)
        if by_term:
            logits = theta @ self.Z_retain.mT
            total += sum(retain_loss(logits[:, rows], method, **self.retain).mean(-1).sum()
                         for rows, method in by_term)
        return total

    def unlearn(self, methods: list, eval_steps: list) -> np.ndarray:
        """Full-batch gradient descent from pi_ref, all at once: distances at `eval_steps`, (K, M, 2, E)."""
        by_loss = grouped(methods, "family", "beta")
        by_term = [group for group in grouped(methods, "retain") if group[1].retain]
        lr = torch.tensor([[method.lr] for method in methods], dtype=torch.float64)
        theta, kept, wanted = self.reference.repeat(1, len(methods), 1), [], set(eval_steps)
        for step in range(eval_steps[-1] + 1):
            if step in wanted:
                kept.append(self.distances(theta))
            theta.requires_grad_()
            [gradient] = torch.autograd.grad(self.objectives(theta, by_loss, by_term), theta)
            theta = theta.detach() - lr * gradient
        return torch.stack(kept, -1).numpy()


def unlearned(instances: list, alpha: float, methods: list, eval_steps: list, steps: int) -> np.ndarray:
    """pi_ref and pi_retr of each instance in so many steps, then every method: distances, (K, M, 2, E)."""
    models = [reference_and_retrained(*instance.training_rows(alpha), steps) for instance in instances]
    return Problem(instances, alpha, models).unlearn(methods, eval_steps)


def run(instances: list, methods: dict, eval_steps: list) -> dict:
    """alpha -> curves (K, M, 2, E) of `methods[alpha]` on every instance; a process a core."""
    stacks = [instances[start:start + TOGETHER] for start in range(0, len(instances), TOGETHER)]
    jobs = [(stack, alpha, methods[alpha], eval_steps, TRAIN_STEPS) for alpha in methods for stack in stacks]
    processes = min(cores(), len(jobs))
    # threads on matrices this small would only get in each other's way
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = iter(tqdm(pool.map(unlearned, *zip(*jobs, strict=True)), "unlearning", len(jobs), ncols=100))
        return {alpha: np.concatenate([next(done) for _ in stacks]) for alpha in methods}


# ---------------------------------------------------------------------------------------------- a figure
def curves_record(alpha: float, methods: list, curves: np.ndarray, steps: list) -> dict:
    """What a figure shows, from curves (K, M, 2, E): settings, mean and sd (ddof 0) over the instances."""
    mean = curves.mean(0)  # where it is infinite, so is the spread
    sd = np.where(np.isfinite(mean), np.where(np.isfinite(mean), curves, 0).std(0), math.inf)
    record = {"alpha": alpha, "start": {}, "methods": {}}
    for axis, key in enumerate(DISTANCES):
        record["start"][key] = {"mean": mean[0, axis, 0], "sd": sd[0, axis, 0]}  # every method's
        for m, method in enumerate(methods):
            own = record["methods"].setdefault(
                method.name, {"lr": method.lr, "beta": method.beta, "steps": steps})
            own[key] = {"mean": mean[m, axis], "sd": sd[m, axis], "instances": curves[:, m, axis]}
    return record


def against_each_other(title: str, alpha: float, paths: dict) -> tuple:
    """The panel of retain against forget distance; paths {method: (forget, retain)}."""
    scale = "log" if alpha > 0 else "linear"
    start = [distances[:1] for distances in next(iter(paths.values()))]
    return {"title": f"retain against forget distance\n{title}", "xlabel": "forget distance",
            "ylabel": "retain distance", "xscale": scale, "yscale": scale}, {**paths, START: start}


def over_steps(key: str, methods: dict) -> tuple:
    """The panel of a distance over steps, as far as it is finite: its mean in a band of 1 sd."""
    curves = {}
    for name, own in methods.items():
        finite = np.isfinite(own[key]["mean"])
        mean, sd = own[key]["mean"][finite], own[key]["sd"][finite]
        curves[name] = (np.array(own["steps"])[finite], mean,
                        np.maximum(mean - sd, 0.1 * mean), mean + sd)  # cut for the log axis
    return {"title": f"{key}\nmean, band $\\pm$ 1 sd", "xlabel": "step", "ylabel": "nats",
            "yscale": "log"}, curves


def draw_figure(path: Path, figure: int, methods: list, record: dict):
    """Figure 4: means over steps and against each other; Figure 3: the latter, and one instance's."""
    found = record["methods"]
    styles = {START: {"marker": "*", "color": "0", "linestyle": "", "markersize": 12}}
    panels = [against_each_other("mean", record["alpha"], {
        name: [own[key]["mean"] for key in DISTANCES] for name, own in found.items()})]
    if figure == 3:
        panels.append(against_each_other("the first instance by itself", record["alpha"], {
            name: [own[key]["instances"][0] for key in DISTANCES] for name, own in found.items()}))
    else:
        panels = [*(over_steps(key, found) for key in DISTANCES), *panels]
        styles |= {method.name: {**FAMILY_STYLE[method.family], "linestyle": TERM_LINE[method.retain]}
                   for method in methods}
    draw(path, panels, styles)


def run_figures(args, instances: list):
    """Figure 4 for every alpha, or Figure 3."""
    methods = {alpha: FIGURE3_METHODS if args.figure == 3 else published_methods(alpha, args.methods)
               for alpha in args.alphas}
    for alpha, curves in run(instances, methods, args.eval_steps).items():
        record = curves_record(alpha, methods[alpha], curves, args.eval_steps)
        judged = verdicts(args.figure, alpha, list(record["methods"]), curves, np.array(args.eval_steps))
        alone = "figure3" if args.figure == 3 else f"alpha{alpha:g}"
        name, title = f"synthetic_{alone}", f"Figure {args.figure}, alpha = {alpha:g}"
        draw_figure(args.out / f"{name}.png", args.figure, methods[alpha], record)
        shown = [{"method": method, "lr": own["lr"], "beta": own["beta"]} | {
            f"last {key}, {of}": own[key][of][-1] for key in DISTANCES for of in ("mean", "sd")}
            for method, own in record["methods"].items()]
        claims = [{"claim": own["claim"], "holds on the mean": own["holds"]} | {
            key: own["numbers"].get(key) for key in ("share_of_instances", "share_of_means_of_five")}
            for own in judged["verdicts"]]
        claims += [{"claim": own["claim"], "holds on the mean": f"undecided, needs {own['needs']}"}
                   for own in judged["undecided"]]
        digits = 10 if len(instances) <= 10 else 6  # of fifty instances' curves: a file below 1 MB
        record = plain(record, digits) | judged | {"provenance": provenance(args)}
        print(write(args.out / name, record, title, f"Instances: {record['provenance']['instances']}.",
                    table(shown), table(claims)))


# -------------------------------------------------------------------------------------- the grid search
CRITERION = ("Every method at every lr (and beta) of the grid. Stable: at the last step the mean over the "
             "instances is finite, and no farther from pi_retr than at the start (forget + retain distance). "
             "Chosen: of the stable, the one with the smallest forget + retain distance at the last step.")


def choose(rows: list, published: Method) -> dict:
    """The best row of a method by CRITERION (of all, where none is stable), beside the published setting."""
    own = [row for row in rows if row["method"] == published.name]
    best = min(own, key=lambda row: (not row["stable"], row["forget_distance"] + row["retain_distance"]))
    [same] = [row for row in own if (row["lr"], row["beta"]) == (published.lr, published.beta)]
    return {"chosen": best, "published": same, "stable_settings": sum(row["stable"] for row in own),
            "settings": len(own)}


def run_grid(args, instances: list):
    """The paper's grid, chosen so that training "remains stable within 2000 steps"; the criterion is ours."""
    grid = [Method(name, lr, beta) for name in args.methods for lr in GRID_LR
            for beta in (GRID_BETA if name.startswith(("npo", "dpo")) else [None])]
    for alpha, curves in run(instances, dict.fromkeys(args.alphas, grid), [0, args.steps]).items():
        rows = []
        for method, (forget, retain) in zip(grid, curves.mean(0), strict=True):
            start, end = forget + retain
            rows.append({"method": method.name, "lr": method.lr, "beta": method.beta,
                         "forget_distance": forget[1], "retain_distance": retain[1],
                         "stable": bool(np.isfinite(end) and end <= start)})
        chosen = {method.name: choose(rows, method) for method in published_methods(alpha, args.methods)}
        record = {"alpha": alpha, "criterion": CRITERION, "grid": {"lr": GRID_LR, "beta": GRID_BETA},
                  "chosen": chosen, "rows": rows}
        shown = [{"": which, **own[which], "stable settings": own["stable_settings"]}
                 for own in chosen.values() for which in ("chosen", "published")]
        print(write(args.out / f"synthetic_alpha{alpha:g}_grid",
                    plain(record, 10) | {"provenance": provenance(args)}, f"Grid search, alpha = {alpha:g}",
                    CRITERION, f"lr in {GRID_LR}, beta in {GRID_BETA}.", table(shown)))


# ------------------------------------------------------------------------------------------ the command
def provenance(args) -> dict:
    published = f"published, seeds {', '.join(map(str, PUBLISHED_SEEDS))}"
    instances = f"{args.instances} fresh, seed {args.seed}" if args.instances else published
    return {**environment(), "instances": instances, "train_lr": TRAIN_LR, "train_steps": TRAIN_STEPS,
            "steps": args.steps, "eval_every": args.eval_every, "numpy": np.__version__}


def parse_args(argv: list | None):
    """Raises InputError for settings that don't go together."""
    parser = Parser(prog="synthetic.py", description=__doc__)
    add = parser.add_argument
    alphas = parser.add_mutually_exclusive_group()
    alphas.add_argument("--alpha", type=not_negative(float), default=1.0,
                        help="half the distance of forget and retain means (default 1)")
    alphas.add_argument("--all", action="store_true", help="Figure 4 for alpha = 1 and alpha = 0")
    add("--figure", type=int, choices=(3, 4), default=4, help="default 4")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="Figure 4: some of them (default all)")
    add("--instances", type=positive(int), help="that many fresh instances (default: the published five)")
    add("--seed", type=not_negative(int), help="of the fresh instances (default 0)")
    add("--steps", type=positive(int), help="unlearning steps (default 2000; Figure 3: 10000)")
    add("--eval-every", type=positive(int), help="steps between evaluations (default 25; Figure 3: 5)")
    add("--grid-search", action="store_true", help="choose lr and beta on a grid, beside the published")
    add("--out", type=Path, default=Path("runs/synthetic"), help="folder to write (default runs/synthetic)")
    args = parser.parse_args(argv)
    refuse({"--methods names one twice: name each once": len(set(args.methods)) < len(args.methods),
            "--figure 3 has its own methods, lr and beta: drop --all, --methods and --grid-search":
                args.figure == 3 and (args.all or args.grid_search or args.methods != METHODS),
            "--figure 3 is at alpha 1, as in the paper: drop --alpha": args.figure == 3 and args.alpha != 1,
            "--seed given, but the published instances have their own: add --instances 5":
                args.seed is not None and not args.instances,
            "--grid-search has one evaluation: drop --eval-every": args.grid_search and args.eval_every})
    args.alphas = [1.0, 0.0] if args.all else [args.alpha]
    args.steps = args.steps or (10_000 if args.figure == 3 else 2000)
    args.eval_every = min(args.eval_every or (5 if args.figure == 3 else 25), args.steps)
    args.eval_steps = sorted({*range(0, args.steps, args.eval_every), args.steps})
    args.seed = args.seed or 0
    return args


def main(argv: list | None = None):
    began, args = time.time(), parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # a folder that can't be written is refused before the work
    if any(alpha not in PUBLISHED for alpha in args.alphas):
        print(f"alpha {args.alphas[0]:g} has no published lr and beta: alpha 1's are used")
    instances = [published_instance(seed) for seed in PUBLISHED_SEEDS]
    if args.instances:
        instances = [fresh_instance(args.seed, number) for number in range(args.instances)]
    (run_grid if args.grid_search else run_figures)(args, instances)
    print(f"written: {args.out}; {time.time() - began:.1f} s")


if __name__ == "__main__":
    run_command(main, "synthetic.py")
