"""Section 3 of the NPO paper as checks that can fail: Proposition 1, Eq. 5, Theorem 2, Section 2.1's example.

    python theory_check.py      # JSON, page, pictures in runs/theory; exit status 1 where a verdict fails

Every item measures with the functions of `losses.py` (by autograd) and predicts with pen and paper, below: a
mistake in a loss turns a verdict. Theorem 2 is checked in its own regime (n_f <= d, nearly orthogonal rows,
bounded norms, eta <= 1), up to a million steps.

Two remarks on the paper's text. Below Eq. 3 it prints both gradients with a minus sign; with L_GA = E log
pi_theta (Eq. 1) they are +E grad log pi and +E W grad log pi, which is what is checked here. Theorem 2's
constants are not given there: we derive them.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from scipy.linalg import block_diag
from scipy.special import expit
from tqdm import tqdm

import losses
from study.sections import draw, table, verdict, write
from support.command_line import Parser, not_negative, run_command
from support.errors import refuse
from support.provenance import environment

# Shapes: C configurations (problems of Theorem 2), n samples of all together; E recorded times.
DTYPE = torch.float64
BETAS = (0.2, 0.5, 1.0, 2.0)
LAST = 10**6  # the theorem is followed for this many steps
EXACT, CHECKED = 1000, 8000  # steps that are really made; and made once more, to check what replaces them
# Configurations of Theorem 2: the base, and one quantity at a time
BASE = {"n_f": 16, "d": 128, "eta": 0.5, "beta": 1.0}
SWEEPS = {"n_f": (2, 4, 8, 16, 32, 64), "eta": (0.05, 0.1, 0.25, 0.5, 1.0), "beta": BETAS,
          "d": (64, 128, 256, 512)}
LOG_RATIO = "log $\\pi_\\theta/\\pi_{ref}$"
B_THETA, NORMS, C_0 = 1.0, (0.8, 1.2), 0.1  # |theta_init|, the range of |x_i|, and n_f * max |<x_i, x_j>|


# --------------------------------------------------------------------------------- what the theory predicts
def npo_weight(log_ratio, beta):
    """Equation 5's W = 2 pi^beta / (pi^beta + pi_ref^beta) in (0, 2): 1 at the start, 0 once unlearned."""
    return 2 / (1 + torch.exp(-beta * log_ratio))


def ga_rate(n_f, eta, t):
    """Theorem 2's speed of gradient ascent, up to a constant: n_f^(-1/2) eta t."""
    return n_f**-0.5 * eta * t


def npo_rate(n_f, eta, beta, t, c):
    """Theorem 2's speed of NPO, sqrt(n_f) log(c eta t / n_f + 1) / beta: C_1 is 1/beta, as below."""
    return n_f**0.5 * np.log(c * eta * t / n_f + 1) / beta


# The margin m_i = +-<x_i, theta> is the sample's own label's: log pi(y_i|x_i) = log sigmoid(m_i). With S the
# Gram matrix of the signed rows a step on the mean loss moves the margins by m <- m - (eta/n_f) S f(m), where
# f = sigmoid(-m) for gradient ascent and W sigmoid(-m) for NPO. |theta - theta_init| in the norm of X^T X is
# the Euclidean norm of the margins' change. Late in the run, with v = sigmoid(m) -> e^m:
#   GA: f -> 1, the change is (eta t/n_f) S 1, and |theta - theta_init| / (n_f^(-1/2) eta t) -> the rms of the
#       row sums.
#   NPO: f -> W -> 2 (v/v_0)^beta. Every margin falls as (1/beta) log t, so S f = n_f/(beta eta t) 1 and
#       -beta m_i = log(2 beta eta t / n_f) - log (S^-1 1)_i - beta log v_0,i.


def npo_tail(S: np.ndarray, margin_0: np.ndarray, eta: float, beta: float, t: np.ndarray) -> np.ndarray:
    """The late norm |theta_NPO - theta_init| at times t (E,): of the change of the margins, as above."""
    share = np.linalg.solve(S, np.ones(len(S)))
    change = np.log(2 * beta * eta * t[:, None] / (len(S) * share)) / beta + np.logaddexp(0, margin_0)
    return np.sqrt((change**2).sum(1))


# ------------------------------------------------------------------------------------------------ measuring
def gradient(loss: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """d(sum of loss)/d parameters; 0 where the loss doesn't depend on them, so that its check fails."""
    return torch.autograd.grad(loss.sum() + 0 * parameters.sum(), parameters, retain_graph=True)[0]


def largest(gap: torch.Tensor) -> float:
    return gap.abs().max().item()


def ends(values) -> list:
    """Least and greatest. By NumPy, as in every verdict: a NaN among them stays one, Python may skip it."""
    return [np.min(values), np.max(values)]


def close(measured, predicted, tolerance: float) -> bool:
    return np.allclose(measured, predicted, rtol=tolerance, atol=0)


# ----------------------------------------------------------------------------------------- 1. Proposition 1
def proposition1(generator) -> list:
    """L_NPO - (2/beta) log 2 -> L_GA - E log pi_ref, and gradients: error beta E[r^2]/4, r = log pi/pi_ref.
    On a two-layer tanh network, five classes.

    Why: L_NPO = (2/beta) E log(1 + e^(beta r)), and log(1 + e^u) = log 2 + u/2 + u^2/8 + O(u^4). The 1/beta
    term is (2/beta) log 2, the constant one E r = L_GA - E log pi_ref, the next beta E[r^2]/4, and then
    nothing before beta^3.
    """
    x, y = torch.randn(64, 12, generator=generator, dtype=DTYPE), torch.randint(5, (64,), generator=generator)

    def logps(parameters):
        w1, b1, w2, b2 = parameters.split([12 * 24, 24, 24 * 5, 5])
        return losses.token_logps((x @ w1.view(12, 24) + b1).tanh() @ w2.view(24, 5) + b2, y)
    reference = torch.randn(437, generator=generator, dtype=DTYPE) / 3
    noise = torch.randn(reference.shape, generator=generator, dtype=DTYPE)
    policy = (reference + 0.5 * reference.std() * noise).requires_grad_()
    ga, constant = losses.ga_loss(logps(policy)).mean(), ((logps(policy) - logps(reference))**2).mean() / 4
    ga_gradient, constant_gradient = gradient(ga, policy), gradient(constant, policy)
    errors, gradient_gaps = [], []
    for beta in np.geomspace(0.1, 1e-3, 9):
        npo = losses.npo_loss(logps(policy), logps(reference), beta).mean()
        limit = 2 / beta * math.log(2) + ga - logps(reference).mean()
        errors.append((npo - limit).item() / beta)
        gap = (gradient(npo, policy) - ga_gradient) / beta - constant_gradient
        gradient_gaps.append((gap.norm() / constant_gradient.norm()).item())
    constant = constant.item()
    return [verdict("Proposition 1: the loss tends to gradient ascent's, error beta E[r^2]/4",
                    close(errors, constant, 0.01), error_over_beta=ends(errors), predicted=constant),
            verdict("Proposition 1: so do the gradients, error beta times that of E[r^2]/4",
                    np.max(gradient_gaps) < 0.01, relative_deviation=ends(gradient_gaps))]


# -------------------------------------------------------------------------------------------- 2. Equation 5
def equation5(generator) -> tuple[list, list]:
    """NPO's gradient is GA's times W, from certain to all but gone. Its loss is above 0. Verdicts, panels."""
    weights = {"gradient ascent": ([-15, 15], [1, 1])}
    npo_curves = {"gradient ascent": ([-15, 15], [-15, 15])}
    reference_logps, gaps, least = -torch.rand(401, generator=generator, dtype=DTYPE) * 20, [], []
    far = torch.linspace(-1e4, 0, 101, dtype=DTYPE)
    for beta in BETAS:
        log_ratio = torch.linspace(-30 / beta, 30 / beta, 401, dtype=DTYPE)  # the start, 0, among them
        policy_logps = (reference_logps + log_ratio).requires_grad_()
        loss = losses.npo_loss(policy_logps, reference_logps, beta)
        measured = gradient(loss, policy_logps) / gradient(losses.ga_loss(policy_logps), policy_logps)
        for weight in (measured, losses.npo_weight(policy_logps, reference_logps, beta)):
            gaps.append(largest(weight / npo_weight(log_ratio, beta) - 1))
        least.append(losses.npo_loss(far, torch.zeros_like(far), beta).min().item() + 0.0)  # -0.0 is 0
        shown, drawn = log_ratio.abs() <= 15, f"$\\beta$ = {beta:g}"
        weights[drawn] = log_ratio[shown], measured[shown]
        npo_curves[f"NPO, {drawn}"] = log_ratio[shown], loss.detach()[shown]
    ga = losses.ga_loss(far).min().item()
    return [
        verdict("Equation 5: NPO's gradient is gradient ascent's times W = 2 pi^beta/(pi^beta + pi_ref^beta)",
                np.max(gaps) < 1e-10, largest_relative_gap=np.max(gaps)),
        verdict("Equation 3: NPO's loss is bounded below by 0; gradient ascent's is not",
                0 <= np.min(least) < 1e-6 and ga == far.min(), least_npo_loss=np.min(least),
                least_ga_loss=ga),
    ], [({"title": "W: what NPO multiplies GA's gradient with", "xlabel": LOG_RATIO}, weights),
        ({"title": "loss, nats", "xlabel": LOG_RATIO, "ylim": (-16, 32)}, npo_curves)]


# --------------------------------------------------------------------------------------------- 3. Theorem 2
def signed_gram(n_f: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(S, margin_0): rows with norms in NORMS, products of at most C_0/n_f, labels' signs in them.

    X = L Q, L L^T the wanted Gram matrix and Q orthonormal rows of length d, so n_f <= d. The norms are
    spread evenly, so that a sweep over n_f changes n_f alone. One draw for each (n_f, d).
    """
    rng = np.random.default_rng([seed, n_f, d])
    noise = np.triu(rng.uniform(-1, 1, (n_f, n_f)), 1) * C_0 / n_f
    norms = rng.permutation(np.linspace(*NORMS, 2 * n_f + 1)[1::2])
    L = np.linalg.cholesky(np.diag(norms**2) + noise + noise.T)
    X, theta = L @ np.linalg.qr(rng.standard_normal((d, n_f)))[0].T, rng.standard_normal(d)
    signed = X * rng.choice([-1.0, 1.0], n_f)[:, None]
    return signed @ signed.T, signed @ theta * B_THETA / np.linalg.norm(theta)


class Problems:
    """C problems side by side, their samples (n,) in one vector: a step, or the flow, moves all of them."""

    def __init__(self, grams: list, eta: np.ndarray, beta: np.ndarray):
        """grams: (S, margin_0) of each; eta and beta (C,)."""
        n_f = np.array([len(margin) for _, margin in grams])
        self.S = block_diag(*[S for S, _ in grams])
        self.margin_0 = np.concatenate([margin for _, margin in grams])
        self.first = np.cumsum(n_f) - n_f  # of each problem's samples
        self.rate, self.beta = np.repeat(eta / n_f, n_f), torch.from_numpy(np.repeat(beta, n_f))

    def velocity(self, margin: np.ndarray, loss: str) -> np.ndarray:
        """-(change of the margins in a step), (n,): (eta/n_f) S dL/dmargin, the slope by autograd."""
        margins, beta = torch.from_numpy(margin).requires_grad_(), self.beta
        value = losses.ga_loss(F.logsigmoid(margins))
        if loss == "npo":  # beta inside and 1/beta outside is the same loss: one call for all beta
            reference_logps = F.logsigmoid(torch.from_numpy(self.margin_0))
            value = losses.npo_loss(beta * F.logsigmoid(margins), beta * reference_logps, 1.0) / beta
        return self.rate * (self.S @ gradient(value, margins).numpy())

    def steps(self, loss: str, wanted: np.ndarray) -> np.ndarray:
        """Gradient descent, step by step: margins at the steps `wanted` (E, n)."""
        margin, kept = self.margin_0.copy(), []
        for step in tqdm(range(1, wanted[-1] + 1), f"{loss}, step by step", ncols=100, leave=False):
            margin -= self.velocity(margin, loss)
            if step in wanted:
                kept.append(margin.copy())
        return np.stack(kept)

    def follow(self, loss: str, times: np.ndarray) -> np.ndarray:
        """|theta - theta_init| at the steps `times` (E,): (E, C). Step by step to EXACT, then along the flow.

        The flow dm/dt = -velocity is smooth in the clock log t. Steps leave it early on, where they are
        made; what they would still do later is measured too.
        """
        early, late = times[times <= EXACT], times[times > EXACT]
        margins, clock = self.steps(loss, np.union1d(early, EXACT)), np.log([EXACT, *late])
        flow = solve_ivp(lambda log_t, margin: -math.exp(log_t) * self.velocity(margin, loss), clock[[0, -1]],
                         margins[-1], "DOP853", clock[1:], rtol=1e-8, atol=1e-8)
        return self.norms(np.concatenate([margins[:len(early)], flow.y.T]))

    def norms(self, margins: np.ndarray) -> np.ndarray:
        """|theta - theta_init| in the norm of X^T X: (E, n) -> (E, C)."""
        return np.sqrt(np.add.reduceat((margins - self.margin_0)**2, self.first, axis=1))


def theorem2(seed: int) -> tuple[list, dict]:
    """Gradient ascent diverges linearly, NPO logarithmically, with the theorem's powers of n_f, eta, beta.

    The verdicts, and what was followed: quantities and sweep of each configuration, times (E,), distances of
    ga and npo (E, C), the c (E, C) for which npo_rate is NPO's: the least and greatest are C_2 and C_3.
    """
    rows = [{**BASE, key: value, "sweep": key} for key, values in SWEEPS.items() for value in values]
    found = {column: np.array([row[column] for row in rows]) for column in rows[0]}
    n_f, eta, beta = found["n_f"], found["eta"], found["beta"]
    grams = [signed_gram(row["n_f"], row["d"], seed) for row in rows]
    problems = Problems(grams, eta, beta)
    times = np.unique(np.geomspace([1, EXACT], [EXACT, LAST], 25).round().astype(int))  # even in log t
    ga, npo = (problems.follow(loss, times) for loss in ("ga", "npo"))
    c = np.expm1(beta * npo / n_f**0.5) * n_f / (eta * times[:, None])
    followed = {"found": found, "times": times, "ga": ga, "npo": npo, "c": c}
    return [skip_verdict(problems), *rate_verdicts(grams, **followed)], followed


def skip_verdict(problems: Problems) -> dict:
    times, gaps = CHECKED // np.array([4, 2, 1]), {}
    for loss in ("ga", "npo"):
        made = problems.norms(problems.steps(loss, times)) + 1e-300
        gaps[loss] = np.abs(problems.follow(loss, times) / made - 1).max(1)
    holds = all(gap.max() < 1e-3 and gap[-1] <= gap[0] + 1e-9 for gap in gaps.values())
    return verdict(f"Skipping: from step {EXACT} on the flow replaces steps, relative error < 0.001, falling",
                   holds, steps=times, **gaps)


def rate_verdicts(grams: list, found: dict, times: np.ndarray, ga: np.ndarray, npo: np.ndarray,
                  c: np.ndarray) -> list:
    """Gradient ascent against C n_f^(-1/2) eta t, NPO against sqrt(n_f) log(t)/beta; in every configuration,
    so that the powers of n_f, eta, beta and d are the theorem's."""
    n_f, eta, beta, late = found["n_f"], found["eta"], found["beta"], times >= LAST // 10
    constants = ga / ga_rate(n_f, eta, times[:, None])
    late_constants = constants[late] / [np.sqrt(np.mean(S.sum(1)**2)) for S, _ in grams]
    # row sums times f, which is in [sigmoid(-|m_0|), 1]
    low, high = NORMS[0]**2 * expit(-B_THETA * NORMS[1]) - C_0, NORMS[1]**2 + C_0
    decade = times[late][[0, -1]]  # the last; late, c doesn't matter
    rise = np.diff(npo[late][[0, -1]], axis=0) / np.diff(npo_rate(n_f, eta, beta, decade[:, None], 1), axis=0)
    tail = [npo_tail(*gram, eta[own], beta[own], times[late]) for own, gram in enumerate(grams)]
    tail_ratio = npo[late] / np.array(tail).T
    bounds = {f"beta={own:g}": [1 / own, *ends(c[:, beta == own])] for own in BETAS}
    return [
        verdict("Theorem 2: gradient ascent's distance is C n_f^(-1/2) eta t, C bounded, late as predicted",
                close(late_constants, 1, 0.01) and low <= constants.min() and constants.max() <= high,
                C_1=constants.min(), C_2=constants.max(), bounds=[low, high],
                late_over_predicted=ends(late_constants)),
        verdict("Theorem 2: NPO's distance grows by sqrt(n_f)/beta per unit of log t",
                close(rise, 1, 0.03), measured_over_predicted=ends(rise), C_1_to_C_3=bounds),
        verdict("Theorem 2: NPO's late distance is the predicted one, constant included",
                close(tail_ratio, 1, 0.01), measured_over_predicted=ends(tail_ratio))]


def rate_panels(found: dict, times: np.ndarray, ga: np.ndarray, npo: np.ndarray, c: np.ndarray) -> list:
    """Theorem 2's constants over time, bounded whatever n_f and eta are."""
    constants, panels = ga / ga_rate(found["n_f"], found["eta"], times[:, None]), []
    shown = {"GA: C of distance = C $n_f^{-1/2}\\eta t$": constants,
             "NPO: c of distance = $\\sqrt{n_f}$ log(c $\\eta t/n_f$ + 1)/$\\beta$": c}
    for key in ("n_f", "eta"):
        sweep = {f"{key} = {found[key][own]:g}": own for own in np.flatnonzero(found["sweep"] == key)}
        panels += [({"title": title, "xlabel": "t", "xscale": "log", "yscale": "log"},
                    {label: (times, values[:, own]) for label, own in sweep.items()})
                   for title, values in shown.items()]
    return panels


def divergence_panels(found: dict, times: np.ndarray, ga: np.ndarray, npo: np.ndarray, c: np.ndarray) -> list:
    """Distances over time, the sweep over beta: each in its band, the rate with the least and greatest C."""
    n_f, eta, sweep = BASE["n_f"], BASE["eta"], np.flatnonzero(found["sweep"] == "beta")
    ga, rate = ga[:, sweep[0]], ga_rate(n_f, eta, times)  # beta doesn't matter
    curves = {"GA": (times, ga, *(rate * constant for constant in ends(ga / rate)))}
    for own in sweep:
        beta = found["beta"][own]
        curves[f"NPO, $\\beta$ = {beta:g}"] = (
            times, npo[:, own], *(npo_rate(n_f, eta, beta, times, constant) for constant in ends(c[:, own])))
    panels = [{"title": "GA leaves at constant speed", "xlim": (0, 2000), "ylim": (0, 80),
               "ylabel": "|$\\theta^{(t)} - \\theta_{init}|$ in $X^TX$, bands: the bounds"},
              {"title": "NPO's lines are straight", "xscale": "log", "ylim": (0, 200)},
              {"title": "both logarithmic", "xscale": "log", "yscale": "log"}]
    return [({"xlabel": "t", **axes}, curves) for axes in panels]


# ---------------------------------------------------------------------------- 4. the linear-softmax example
def softmax_example(generator) -> dict:
    """Section 2.1, pi = softmax(theta x): GA's gradient in theta_y is (1 - pi_y) x, and NPO's W times it."""
    x = torch.randn(8, generator=generator, dtype=DTYPE)
    start = torch.randn(5, 8, generator=generator, dtype=DTYPE) * 0.1
    depths, labels = torch.linspace(0, 40, 41, dtype=DTYPE), torch.full((41,), 2)
    theta = start.repeat(41, 1, 1)  # the label's logit pushed down by `depths`, nats
    theta[:, 2] -= depths[:, None] * x / (x @ x)
    policy_logps = losses.token_logps(theta.requires_grad_() @ x, labels)
    reference_logps = losses.token_logps((start @ x).expand(41, 5), labels)
    wanted, gaps = {"ga": (losses.ga_loss(policy_logps), 1)}, {}  # loss and weight
    for beta in BETAS:
        wanted[f"beta={beta:g}"] = (losses.npo_loss(policy_logps, reference_logps, beta),
                                    npo_weight(policy_logps - reference_logps, beta))
    for name, (loss, weight) in wanted.items():
        predicted = (weight * (1 - policy_logps.exp()))[:, None] * x
        gaps[name] = largest(gradient(loss, theta)[:, 2] / predicted - 1)
    return verdict("Section 2.1: GA's gradient is (1 - pi_y) x while pi_y vanishes, NPO's W times it",
                   np.max([*gaps.values()]) < 1e-9, largest_relative_gap=gaps)


# ------------------------------------------------------------------------------------------ putting it down
def check(seed: int) -> tuple[list, dict]:
    """The verdicts of all items, and pictures: name -> panels."""
    generator = torch.Generator().manual_seed(seed)
    first = proposition1(generator)
    second, weight_panels = equation5(generator)
    third, followed = theorem2(seed)
    return [*first, *second, *third, softmax_example(generator)], {
        "equation5": weight_panels, "theorem2": rate_panels(**followed),
        "divergence_rates": divergence_panels(**followed)}


def main(argv: list | None = None) -> int:
    torch.set_num_threads(1)  # matrices of 64 rows: threads would spend their time waiting for each other
    began, parser = time.time(), Parser(prog="theory_check.py", description=__doc__)
    parser.add_argument("--seed", type=not_negative(int), default=0, help="of all that is drawn (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/theory"), help="default runs/theory")
    args = parser.parse_args(argv)
    refuse({f"--seed {args.seed} is too large: need less than 2^63": args.seed >= 2**63})
    args.out.mkdir(parents=True, exist_ok=True)
    verdicts, pictures = check(args.seed)
    for name, panels in pictures.items():
        draw(args.out / f"{name}.png", panels)
    claims = table([{**own, "numbers": json.dumps(own["numbers"])} for own in verdicts])
    record = {"verdicts": verdicts, "provenance": {**environment(), "seed": args.seed}}
    write(args.out / "theory_check", record, "Section 3, checked", claims)
    for own in verdicts:
        print("holds" if own["holds"] else "FAILS", own["claim"], json.dumps(own["numbers"]), sep="  ")
    failed = sum(not own["holds"] for own in verdicts)
    print(f"{len(verdicts) - failed} of {len(verdicts)} hold, {time.time() - began:.1f} s; "
          f"written: {args.out}/theory_check.json, theory_check.md and pictures")
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()), "theory_check.py")
