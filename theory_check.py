"""Section 3 of the NPO paper as checks that can fail: Proposition 1, Eq. 5, Theorem 2, Section 2.1's example.

    python theory_check.py      # JSON, page, pictures in runs/theory; exit status 1 where a verdict fails

Every item measures with the functions of `losses.py` (by autograd) and predicts with pen and paper, below: a
mistake in a loss turns a verdict. Theorem 2 is checked in its own regime (n_f <= d, nearly orthogonal rows,
bounded norms, eta <= 1), up to a million steps.

Two remarks on the paper's text. Below Eq. 3 it prints both gradients with a minus sign; with L_GA = E log
pi_theta (Eq. 1) they are +E grad log pi and +E W grad log pi, which is what is checked here. Theorem 2's
constants are not given there: we derive them for orthogonal rows, and predict and measure them for nearly
orthogonal ones.
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
from scipy.special import expit
from tqdm import tqdm

import losses
from study.sections import draw, table, verdict, write
from support.command_line import Parser, not_negative, run_command
from support.errors import refuse
from support.provenance import environment

# Shapes: B samples; C configurations (problems of Theorem 2), padded to n samples; E recorded times.
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
    """Theorem 2's speed of NPO, sqrt(n_f) log(c eta t / n_f + 1) / beta: C_1 is 1/beta, by the flow below."""
    return n_f**0.5 * np.log(c * eta * t / n_f + 1) / beta


# Orthogonal rows. With the margin m_i = +-<x_i, theta> of the sample's own label, log pi(y_i|x_i) is
# log sigmoid(m_i), and a step on the mean loss moves it by m <- m - a f(m), a = eta |x|^2 / n_f, with
# f = sigmoid(-m) for gradient ascent and f = W sigmoid(-m) for NPO. |theta - theta_init| in the norm of X^T X
# is the Euclidean norm of the margins' change. The flow is dm/ds = -f(m) in the clock s = a t.
#   GA: (1 + e^m) dm = -ds, so m + e^m = m_0 + e^(m_0) - s. Once s is large, m = -s: linear in t.
#   NPO: 1/W = (1 + (v_0/v)^beta)/2 with v = sigmoid(m), so s is the integral from m to m_0 of
#       (1 + e^x)(1 + (v_0/v(x))^beta)/2. For m -> -inf, v = e^m and s = v_0^beta e^(-beta m) / (2 beta), so
#       m = -(1/beta) log(2 beta s / v_0^beta): logarithmic in t, with slope 1/beta a sample.
# One step takes a of the clock, the flow over the same distance between a f(m)/f(m') and a (or the reverse,
# where f falls). So for small a beta the iterate's clock is off by at most a * (total variation of log f),
# its margin by that times the largest f on the way. In NPO's tail f falls as 1/t: the error vanishes.


def speed(loss: str, margin, margin_0, beta):
    """f = sigmoid(-m), for NPO times W = 2 v^beta / (v^beta + v_0^beta), written with logarithms."""
    log_ratio = np.logaddexp(0, -margin_0) - np.logaddexp(0, -margin)
    return expit(-margin) * (2 * expit(beta * log_ratio) if loss == "npo" else 1)


def flow(loss: str, margin_0: np.ndarray, beta, a, times: np.ndarray) -> np.ndarray:
    """The margins (E, n) at `times` (E,) of n samples that start at margin_0, beta and a (n,) their own."""
    return solve_ivp(lambda t, margin: -a * speed(loss, margin, margin_0, beta), (0, times[-1]), margin_0,
                     "DOP853", times, rtol=1e-9, atol=1e-9).y.T


# Nearly orthogonal rows, S the Gram matrix of the signed rows: m <- m - (eta/n_f) S f(m), vectors m and f.
# Late in the run:
#   GA: f -> 1, the change is (eta t/n_f) S 1, and |theta - theta_init| / (n_f^(-1/2) eta t) -> the rms of the
#       row sums.
#   NPO: every margin falls as (1/beta) log t, so S f = n_f/(beta eta t) 1, f = 2 e^(beta (m - log v_0)) and
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
    return [np.min(values), np.max(values)]


def close(measured, predicted, tolerance: float) -> bool:
    return np.allclose(measured, predicted, rtol=tolerance, atol=0)


def slope(values: np.ndarray, of: np.ndarray) -> float:
    """b of values ~ a + b of, by least squares."""
    return float(np.polyfit(of, values, 1)[0])


def exponent(values: np.ndarray, of: np.ndarray) -> float:
    """p of values ~ of^p."""
    return slope(np.log(np.maximum(values, 1e-300)), np.log(of))


# ----------------------------------------------------------------------------------------- 1. Proposition 1
def small_net(generator) -> tuple:
    """(logps of flat parameters, pi_ref's parameters): a two-layer tanh network on five classes."""
    x, y = torch.randn(64, 12, generator=generator, dtype=DTYPE), torch.randint(5, (64,), generator=generator)

    def logps(parameters):
        w1, b1, w2, b2 = parameters.split([12 * 24, 24, 24 * 5, 5])
        return losses.token_logps((x @ w1.view(12, 24) + b1).tanh() @ w2.view(24, 5) + b2, y)
    return logps, torch.randn(437, generator=generator, dtype=DTYPE) / 3


def proposition1(generator) -> list:
    """L_NPO - (2/beta) log 2 -> L_GA - E log pi_ref, and gradients: error beta E[r^2]/4, r = log pi/pi_ref.

    Why: L_NPO = (2/beta) E log(1 + e^(beta r)), and log(1 + e^u) = log 2 + u/2 + u^2/8 + O(u^4). The 1/beta
    term is (2/beta) log 2, the constant one E r = L_GA - E log pi_ref, the next beta E[r^2]/4, and then
    nothing before beta^3.
    """
    logps, reference = small_net(generator)
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
                    max(gradient_gaps) < 0.01, relative_deviation=ends(gradient_gaps))]


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
                max(gaps) < 1e-10, largest_relative_gap=max(gaps)),
        verdict("Equation 3: NPO's loss is bounded below by 0; gradient ascent's is not",
                0 <= min(least) < 1e-6 and ga == far.min(), least_npo_loss=min(least), least_ga_loss=ga),
    ], [({"title": "W: what NPO multiplies GA's gradient with", "xlabel": LOG_RATIO}, weights),
        ({"title": "loss, nats", "xlabel": LOG_RATIO, "ylim": (-16, 32)}, npo_curves)]


# --------------------------------------------------------------------------------------------- 3. Theorem 2
def signed_gram(n_f: int, d: int, seed: int, correlation: float = C_0) -> tuple[np.ndarray, np.ndarray]:
    """(S, margin_0): rows with norms in NORMS, products of at most correlation/n_f, labels' signs in them.

    X = L Q, L L^T the wanted Gram matrix and Q orthonormal rows of length d, so n_f <= d. The norms are
    spread evenly, so that a sweep over n_f changes n_f alone. One draw for each (n_f, d).
    """
    rng = np.random.default_rng([seed, n_f, d])
    noise = np.triu(rng.uniform(-1, 1, (n_f, n_f)), 1) * correlation / n_f
    norms = rng.permutation(np.linspace(*NORMS, 2 * n_f + 1)[1::2])
    L = np.linalg.cholesky(np.diag(norms**2) + noise + noise.T)
    X, theta = L @ np.linalg.qr(rng.standard_normal((d, n_f)))[0].T, rng.standard_normal(d)
    signed = X * rng.choice([-1.0, 1.0], n_f)[:, None]
    return signed @ signed.T, signed @ theta * B_THETA / np.linalg.norm(theta)


class Problems:
    """C problems as one padded batch: the same step, or the same flow, moves all of them."""

    def __init__(self, grams: list, eta: np.ndarray, beta: np.ndarray):
        """grams: (S, margin_0) of each; eta and beta (C,)."""
        self.grams, self.eta, self.beta = grams, eta, beta
        self.n_f = np.array([len(margin) for _, margin in grams])
        n = self.n_f.max()
        self.S = np.stack([np.pad(S, (0, n - len(S))) for S, _ in grams])
        self.margin_0 = np.stack([np.pad(margin, (0, n - len(margin))) for _, margin in grams])

    def velocity(self, margin: np.ndarray, loss: str) -> np.ndarray:
        """-(change of the margins in a step), (C, n): (eta/n_f) S dL/dmargin, the slope by autograd."""
        margins, beta = torch.from_numpy(margin).requires_grad_(), torch.from_numpy(self.beta)[:, None]
        value = losses.ga_loss(F.logsigmoid(margins))
        if loss == "npo":  # beta inside and 1/beta outside is the same loss: one call for all beta
            reference_logps = F.logsigmoid(torch.from_numpy(self.margin_0))
            value = losses.npo_loss(beta * F.logsigmoid(margins), beta * reference_logps, 1.0) / beta
        slopes = gradient(value, margins).numpy()[:, :, None]
        return (self.eta / self.n_f)[:, None] * (self.S @ slopes)[:, :, 0]

    def steps(self, loss: str, wanted: np.ndarray) -> np.ndarray:
        """Gradient descent, step by step: margins at the steps `wanted` (E, C, n)."""
        margin, kept = self.margin_0.copy(), []
        for step in tqdm(range(1, wanted[-1] + 1), f"{loss}, step by step", ncols=100, leave=False):
            margin -= self.velocity(margin, loss)
            if step in wanted:
                kept.append(margin.copy())
        return np.stack(kept)

    def follow(self, loss: str, times: np.ndarray) -> np.ndarray:
        """|theta - theta_init| at the steps `times` (E,): (E, C). Step by step to EXACT, then along the flow.

        The flow is smooth in the clock log t. A step is off it by a * (total variation of log f) in time
        (above), most of it in the first steps, which are made. The deviation is measured too.
        """
        def velocity(log_t, flat):
            return -math.exp(log_t) * self.velocity(flat.reshape(self.margin_0.shape), loss).ravel()

        early, late = times[times <= EXACT], times[times > EXACT]
        margins, clock = self.steps(loss, np.union1d(early, EXACT)), np.log([EXACT, *late])
        flow = solve_ivp(velocity, clock[[0, -1]], margins[-1].ravel(), "DOP853", clock[1:], rtol=1e-8,
                         atol=1e-8)
        late_margins = flow.y.T.reshape(-1, *self.margin_0.shape)
        return self.norms(np.concatenate([margins[:len(early)], late_margins]))

    def norms(self, margins: np.ndarray) -> np.ndarray:
        """|theta - theta_init| in the norm of X^T X: (E, C, n) -> (E, C)."""
        return np.sqrt(((margins - self.margin_0)**2).sum(-1))


def recorded(count: int) -> np.ndarray:
    """The steps that are looked at, evenly in log t: `count` up to EXACT, as many from there to LAST."""
    return np.unique(np.geomspace([1, EXACT], [EXACT, LAST], count).round().astype(int))


def theorem2(seed: int) -> tuple[list, dict]:
    """Gradient ascent diverges linearly, NPO logarithmically, with the theorem's powers of n_f, eta, beta.

    The verdicts, and what was followed: quantities and sweep of each configuration, times (E,), distances of
    ga and npo (E, C), the c (E, C) for which npo_rate is NPO's: the least and greatest are C_2 and C_3.
    """
    rows = [{**BASE, key: value, "sweep": key} for key, values in SWEEPS.items() for value in values]
    found = {column: np.array([row[column] for row in rows]) for column in rows[0]}
    times, problems = recorded(25), {}
    for correlation in (C_0, 0.0):
        grams = [signed_gram(n_f, d, seed, correlation)
                 for n_f, d in zip(found["n_f"], found["d"], strict=True)]
        problems[correlation] = Problems(grams, found["eta"], found["beta"])
    ga, npo = (problems[C_0].follow(loss, times) for loss in ("ga", "npo"))
    c = np.expm1(found["beta"] * npo / found["n_f"]**0.5) * found["n_f"] / (found["eta"] * times[:, None])
    followed = {"found": found, "times": times, "ga": ga, "npo": npo, "c": c}
    return [*flow_verdicts(problems[0.0]), skip_verdict(problems[C_0]),
            *rate_verdicts(problems[C_0], **followed)], followed


def flow_verdicts(orthogonal: Problems):
    """|iterate - flow|, and its ratio to the bound a TV(log f) max f, over all samples and times."""
    times = np.unique(np.geomspace(1, CHECKED, 30).round().astype(int))
    start = orthogonal.margin_0.ravel()
    of_problem = np.repeat(np.arange(len(orthogonal.n_f)), orthogonal.margin_0.shape[1])
    beta, a = orthogonal.beta[of_problem], (orthogonal.eta / orthogonal.n_f)[of_problem]
    a = a * np.diagonal(orthogonal.S, axis1=1, axis2=2).ravel()  # 0 for padding, which doesn't move
    for loss in ("ga", "npo"):
        margins, predicted = orthogonal.steps(loss, times), flow(loss, start, beta, a, times)
        margins = margins.reshape(predicted.shape)
        path = speed(loss, np.linspace(start, np.minimum(predicted[-1], margins[-1]), 400), start, beta)
        bound = a * np.abs(np.diff(np.log(path), axis=0)).sum(0) * path.max(0)
        deviation = np.abs(margins - predicted).max(0)
        over_bound = (deviation / (bound + 1e-7)).max()
        yield verdict(f"Theorem 2, orthogonal rows: {loss} follows the flow within the bound",
                      over_bound <= 1, largest_margin_deviation=deviation.max(),
                      largest_deviation_over_bound=over_bound, steps=CHECKED)


def skip_verdict(nearly: Problems) -> dict:
    times, gaps = CHECKED // np.array([4, 2, 1]), {}
    for loss in ("ga", "npo"):
        made = nearly.norms(nearly.steps(loss, times)) + 1e-300
        gaps[loss] = np.abs(nearly.follow(loss, times) / made - 1).max(1)
    holds = all(gap.max() < 1e-3 and gap[-1] <= gap[0] + 1e-9 for gap in gaps.values())
    return verdict(f"Skipping: from step {EXACT} on the flow replaces steps, relative error < 0.001, falling",
                   holds, steps=times, **gaps)


def rate_verdicts(nearly: Problems, found: dict, times: np.ndarray, ga: np.ndarray, npo: np.ndarray,
                  c: np.ndarray) -> list:
    """Gradient ascent against C n_f^(-1/2) eta t, NPO against sqrt(n_f) log(t)/beta and its constants."""
    n_f, eta, beta = found["n_f"], found["eta"], found["beta"]
    constants = ga / ga_rate(n_f, eta, times[:, None])
    late_constants = constants[-1] / [np.sqrt(np.mean(S.sum(1)**2)) for S, _ in nearly.grams]
    # row sums times f, which is in [sigmoid(-|m_0|), 1]
    low, high = NORMS[0]**2 * expit(-B_THETA * NORMS[1]) - C_0, NORMS[1]**2 + C_0
    late = times >= LAST // 10
    first, last = times[late][[0, -1]]
    slopes = np.array([slope(distance, np.log(times[late])) for distance in npo[late].T])
    # late, whatever the constant
    rise = npo_rate(n_f, eta, beta, last, 1e3) - npo_rate(n_f, eta, beta, first, 1e3)
    slope_ratio = slopes / (rise / np.log(last / first))
    tail = [npo_tail(*gram, eta[own], beta[own], times[late]) for own, gram in enumerate(nearly.grams)]
    tail_ratio = npo[late] / np.array(tail).T
    sweep, fitted = {key: found["sweep"] == key for key in SWEEPS}, {}
    for what, values, key, power in (
            ("ga", ga[-1], "n_f", -0.5), ("ga", ga[-1], "eta", 1), ("ga", ga[-1], "d", 0),
            ("npo", npo[-1], "d", 0), ("slope of npo", slopes, "n_f", 0.5),
            ("slope of npo", slopes, "beta", -1)):
        fitted[f"{what} in {key}"] = [exponent(values[sweep[key]], found[key][sweep[key]]), power]
    in_t = [exponent(own, times[times >= LAST // 100]) for own in c[times >= LAST // 100].T]
    drift = {key: exponent(c[-1, sweep[key]], found[key][sweep[key]]) for key in ("n_f", "eta", "d")}
    bounds = {f"beta={own:g}": [1 / own, *ends(c[:, beta == own])] for own in BETAS}
    return [
        verdict("Theorem 2: gradient ascent's distance is C n_f^(-1/2) eta t, C bounded, late as predicted",
                close(late_constants, 1, 0.01) and low <= constants.min() and constants.max() <= high,
                C_1=constants.min(), C_2=constants.max(), bounds=[low, high],
                late_over_predicted=ends(late_constants)),
        verdict("Theorem 2: NPO's distance grows by sqrt(n_f)/beta per unit of log t",
                close(slope_ratio, 1, 0.03), measured_over_predicted_slope=ends(slope_ratio)),
        verdict("Theorem 2: NPO's late distance is the predicted one, constant included",
                close(tail_ratio, 1, 0.01), measured_over_predicted=ends(tail_ratio)),
        verdict("Theorem 2: the powers of n_f, eta, beta and d are the theorem's",
                all(abs(own - power) < 0.03 for own, power in fitted.values()), fitted_and_predicted=fitted),
        verdict("Theorem 2: NPO's constants C_2, C_3 don't drift with n_f, eta, d or t",
                max(map(abs, [*drift.values(), *in_t])) < 0.05, late_power_in=drift,
                late_power_in_t=ends(in_t), fitted_C_1_to_C_3=bounds)]


def rate_panels(found: dict, times: np.ndarray, ga: np.ndarray, npo: np.ndarray, c: np.ndarray) -> list:
    """Distances in units of the rates, n_f varied and eta varied; with the late c for NPO's prediction."""
    t, unit, panels = times[:, None], found["n_f"]**0.5 / found["beta"], []
    linear = ga / ga_rate(found["n_f"], found["eta"], t)
    predicted = npo_rate(found["n_f"], found["eta"], found["beta"], t, c[-1])
    for key in ("n_f", "eta"):
        sweep = {f"{key} = {found[key][own]:g}": own for own in np.flatnonzero(found["sweep"] == key)}
        panels += [({"title": "GA: distance / ($n_f^{-1/2}\\eta t$)", "xlabel": "t", "xscale": "log",
                     "yscale": "log", "ylim": (0.3, 2)},
                    {label: (times, linear[:, own]) for label, own in sweep.items()}),
                   ({"title": "NPO: distance $\\cdot\\beta/\\sqrt{n_f}$ and log(c $\\eta t/n_f$ + 1), late c",
                     "xlabel": "t", "xscale": "log"},
                    {label: (times, (npo / unit)[:, own], (predicted / unit)[:, own])
                     for label, own in sweep.items()})]
    return panels


# -------------------------------------------------------------------------------------- 4. divergence rates
def divergence_rates(found: dict, times: np.ndarray, ga: np.ndarray, npo: np.ndarray, c: np.ndarray) -> tuple:
    """The power of t tends to 1 for gradient ascent, and for NPO that of exp(beta distance/sqrt(n_f))."""
    n_f, eta, late, rows = BASE["n_f"], BASE["eta"], times >= LAST // 10, {}
    sweep = np.flatnonzero(found["sweep"] == "beta")
    ga = ga[:, sweep[0]]  # beta doesn't matter
    power, rate = exponent(ga[late], times[late]), ga_rate(n_f, eta, times)
    curves = {"GA": (times, ga, *(rate * constant for constant in ends(ga / rate)))}
    for own in sweep:
        beta, distance = found["beta"][own], npo[:, own]
        curves[f"NPO, $\\beta$ = {beta:g}"] = (
            times, distance, *(npo_rate(n_f, eta, beta, times, constant) for constant in ends(c[:, own])))
        rows[f"beta={beta:g}"] = {
            "power_of_exp_distance": exponent(np.exp(beta * distance[late] / n_f**0.5), times[late]),
            "local_power": exponent(distance[late], times[late]),
            "ga_over_npo_at_the_end": ga[-1] / max(distance[-1], 1e-300)}
    slower = all(abs(row["power_of_exp_distance"] - 1) < 0.03 and row["local_power"] < 0.2
                 for row in rows.values())
    panels = [{"title": "GA leaves at constant speed", "xlim": (0, 2000), "ylim": (0, 80),
               "ylabel": "|$\\theta^{(t)} - \\theta_{init}|$ in $X^TX$, bands: the bounds"},
              {"title": "NPO's lines are straight", "xscale": "log", "ylim": (0, 200)},
              {"title": "both logarithmic", "xscale": "log", "yscale": "log"}]
    result = verdict("Divergence rates: gradient ascent is linear in t, NPO exponentially slower at any beta",
                     abs(power - 1) < 0.01 and slower, ga_power=power, npo=rows)
    return result, [({"xlabel": "t", **axes}, curves) for axes in panels]


# ---------------------------------------------------------------------------- 5. the linear-softmax example
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
                   max(gaps.values()) < 1e-9, largest_relative_gap=gaps)


# ------------------------------------------------------------------------------------------ putting it down
def check(out: Path | None, seed: int = 0) -> list:
    """All five items: their verdicts. With `out`, pictures, a page and JSON too."""
    generator, panels = torch.Generator().manual_seed(seed), {}
    first = proposition1(generator)
    second, panels["equation5"] = equation5(generator)
    third, followed = theorem2(seed)
    fourth, panels["divergence_rates"] = divergence_rates(**followed)
    verdicts = [*first, *second, *third, fourth, softmax_example(generator)]
    if out:
        for name, shown in {**panels, "theorem2": rate_panels(**followed)}.items():
            draw(out / f"{name}.png", shown)
        claims = table([{**own, "numbers": json.dumps(own["numbers"])} for own in verdicts])
        write(out / "theory_check", {"verdicts": verdicts, "provenance": {**environment(), "seed": seed}},
              "Section 3, checked", claims)
    return verdicts


def main(argv: list | None = None) -> int:
    torch.set_num_threads(1)  # matrices of 64 rows: threads would spend their time waiting for each other
    began, parser = time.time(), Parser(prog="theory_check.py", description=__doc__)
    parser.add_argument("--seed", type=not_negative(int), default=0, help="of all that is drawn (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/theory"), help="default runs/theory")
    args = parser.parse_args(argv)
    refuse({f"--seed {args.seed} is too large: need less than 2^63": args.seed >= 2**63})
    args.out.mkdir(parents=True, exist_ok=True)
    verdicts = check(args.out, args.seed)
    for own in verdicts:
        print("holds" if own["holds"] else "FAILS", own["claim"], json.dumps(own["numbers"]), sep="  ")
    failed = sum(not own["holds"] for own in verdicts)
    print(f"{len(verdicts) - failed} of {len(verdicts)} hold, {time.time() - began:.1f} s; "
          f"written: {args.out}/theory_check.json, theory_check.md and pictures")
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()), "theory_check.py")
