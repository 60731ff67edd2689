"""Section 3 of the NPO paper as checks that can fail: Proposition 1, Eq. 5, Theorem 2, Section 2.1's example.

    python theory_check.py      # five items; JSON, page, pictures in runs/theory; exit status 1 if one fails

Every item measures with the functions of `losses.py` (by autograd) and predicts with pen and paper, below: a
mistake in a loss turns a verdict. Theorem 2 is checked in its own regime (n_f <= d, nearly orthogonal rows,
bounded norms, eta <= 1), up to a million steps. What happens outside of it is shown without a verdict.

Two remarks on the paper's text. Below Eq. 3 it prints both gradients with a minus sign; with L_GA = E log
pi_theta (Eq. 1) they are +E grad log pi and +E W grad log pi, which is what is checked here. Theorem 2's
constants are not given there: we derive them for orthogonal rows, and predict and measure them for nearly
orthogonal ones.
"""

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # matrices of 64 rows: threads would spend their time waiting for each other
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import numpy as np
import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline
from scipy.special import expit, lambertw
from tqdm import tqdm

import losses
from study import theory_pages as pages
from study.synthetic_pages import tidy
from support.command_line import Parser, not_negative, run_command
from support.files import write_json
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
B_THETA, NORMS, C_0 = 1.0, (0.8, 1.2), 0.1  # |theta_init|, the range of |x_i|, and n_f * max |<x_i, x_j>|


# --------------------------------------------------------------------------------- what the theory predicts


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
#   GA: (1 + e^m) dm = -ds, so m + e^m = K, K = m_0 + e^(m_0) - s, and m = K - LambertW(e^K). Once s is large,
#       m = -s: linear in t.
#   NPO: 1/W = (1 + (v_0/v)^beta)/2 with v = sigmoid(m), so s is the integral from m to m_0 of
#       (1 + e^x)(1 + (v_0/v(x))^beta)/2. For m -> -inf, v = e^m and s = v_0^beta e^(-beta m) / (2 beta), so
#       m = -(1/beta) log(2 beta s / v_0^beta): logarithmic in t, with slope 1/beta a sample.
# One step takes a of the clock, the flow over the same distance between a f(m)/f(m') and a (or the reverse,
# where f falls). So the iterate's clock is off by at most a * (total variation of log f), and its margin by
# that times the largest f on the way. In NPO's tail f falls as 1/t: the error vanishes.


def ga_flow(margin_0: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The margin at flow time s."""
    K = margin_0 + np.exp(margin_0) - s
    return K - lambertw(np.exp(K)).real


def npo_speed(margin, margin_0, beta):
    """f = W sigmoid(-m), W = 2 v^beta / (v^beta + v_0^beta), written with logarithms."""
    log_ratio = np.logaddexp(0, -margin_0) - np.logaddexp(0, -margin)
    return 2 * expit(beta * log_ratio) * expit(-margin)


def npo_flow(margin_0: float, beta: float, s: np.ndarray) -> np.ndarray:
    """The margin at flow times s (E,), increasing: s(m) by quadrature on a fine grid, then inverted."""
    lowest = margin_0 - (math.log1p(2 * beta * s[-1]) + 3 * beta + 3) / beta  # beyond the tail's formula
    grid = np.linspace(margin_0, lowest, 20_001)
    nodes, weights = np.polynomial.legendre.leggauss(3)
    step = (lowest - margin_0) / (len(grid) - 1)
    points = grid[:-1, None] + step * (nodes + 1) / 2
    clock = np.concatenate([[0], np.cumsum((1 / npo_speed(points, margin_0, beta)) @ weights * -step / 2)])
    return CubicSpline(np.log1p(clock), grid)(np.log1p(s))


# Nearly orthogonal rows, S the Gram matrix of the signed rows: m <- m - (eta/n_f) S f(m), vectors m and f.
# Late in the run:
#   GA: f -> 1, the change is (eta t/n_f) S 1, and |theta - theta_init| / (n_f^(-1/2) eta t) -> the rms of the
#       row sums.
#   NPO: every margin falls as (1/beta) log t, so S f = n_f/(beta eta t) 1, f = 2 e^(beta (m - log v_0)) and
#       -beta m_i = log(2 beta eta t / n_f) - log (S^-1 1)_i - beta log v_0,i.


def ga_constant(S: np.ndarray) -> float:
    return float(np.sqrt(np.mean(S.sum(1)**2)))


def npo_tail(S: np.ndarray, margin_0: np.ndarray, eta: float, beta: float, t: np.ndarray) -> np.ndarray:
    """The late norm |theta_NPO - theta_init| at times t (E,): of the change of the margins, as above."""
    share = np.linalg.solve(S, np.ones(len(S)))
    change = np.log(2 * beta * eta * t[:, None] / (len(S) * share)) / beta + np.logaddexp(0, margin_0)
    return np.sqrt((change**2).sum(1))


# ------------------------------------------------------------------------------------------------ measuring


def gradient(loss: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """d(sum of loss)/d parameters; 0 where the loss doesn't depend on them, so that its check fails."""
    if not loss.requires_grad:
        return torch.zeros_like(parameters)
    [result] = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
    return torch.zeros_like(parameters) if result is None else result


def verdict(claim: str, holds: bool, **numbers) -> dict:
    return {"claim": claim, "holds": bool(holds), "numbers": numbers}


def ends(values: np.ndarray) -> list:
    return [values.min(), values.max()]


def close(measured, predicted, tolerance: float) -> bool:
    return bool(np.all(np.abs(np.asarray(measured) - predicted) <= tolerance * np.abs(predicted)))


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
    shapes = [(12, 24), (24,), (24, 5), (5,)]

    def logps(parameters):
        parts = parameters.split([math.prod(shape) for shape in shapes])
        w1, b1, w2, b2 = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return losses.token_logps((x @ w1 + b1).tanh() @ w2 + b2, y)
    count = sum(math.prod(shape) for shape in shapes)
    return logps, torch.randn(count, generator=generator, dtype=DTYPE) / 3


def random_feature_logistic(generator) -> tuple:
    """The model of synthetic.py, 32 features: (logps, pi_ref's parameters)."""
    x, y = torch.randn(64, 16, generator=generator, dtype=DTYPE), torch.randint(2, (64,), generator=generator)
    features = (x @ torch.randn(16, 32, generator=generator, dtype=DTYPE) / 4).relu()

    def logps(parameters):
        logits = features @ parameters
        return losses.token_logps(torch.stack([torch.zeros_like(logits), logits], -1), y)
    return logps, torch.randn(32, generator=generator, dtype=DTYPE) / 2


def proposition1(generator) -> tuple[list, dict]:
    """L_NPO - (2/beta) log 2 -> L_GA - E log pi_ref, and gradients: error beta E[r^2]/4, r = log pi/pi_ref.

    Why: L_NPO = (2/beta) E log(1 + e^(beta r)), and log(1 + e^u) = log 2 + u/2 + u^2/8 + O(u^4). The 1/beta
    term is (2/beta) log 2, the constant one E r = L_GA - E log pi_ref, the next beta E[r^2]/4, and then
    nothing before beta^3.
    """
    betas, verdicts, curves = np.geomspace(1, 1e-3, 13), [], {}
    for name, make in (("small net", small_net), ("random-feature logistic", random_feature_logistic)):
        logps, reference = make(generator)
        noise = torch.randn(reference.shape, generator=generator, dtype=DTYPE)
        policy = (reference + 0.5 * reference.std() * noise).requires_grad_()
        reference_logps = logps(reference)
        limit = (losses.ga_loss(logps(policy)).mean() - reference_logps.mean()).item()
        ga_gradient = gradient(losses.ga_loss(logps(policy)).mean(), policy)
        constant = ((logps(policy) - reference_logps)**2).mean() / 4
        constant_gradient = gradient(constant, policy)
        errors, gradient_errors = [], []
        for beta in betas:
            loss = losses.npo_loss(logps(policy), reference_logps, beta).mean()
            errors.append(loss.item() - 2 / beta * math.log(2) - limit)
            gradient_errors.append(gradient(loss, policy) - ga_gradient)
        errors, norms = np.abs(errors), np.array([error.norm().item() for error in gradient_errors])
        small, scale = betas <= 0.1, constant_gradient.norm().item()
        order, gradient_order = (exponent(values[small], betas[small]) for values in (errors, norms))
        deviation = (gradient_errors[-1] / betas[-1] - constant_gradient).norm().item() / scale
        last = errors[-1] / betas[-1]
        verdicts.append(verdict(
            f"Proposition 1, {name}: the loss tends to gradient ascent's, with an error of beta E[r^2]/4",
            close(last, constant.item(), 0.01) and abs(order - 1) < 0.05,
            error_over_beta=last, predicted=constant.item(), order_in_beta=order))
        verdicts.append(verdict(
            f"Proposition 1, {name}: so do the gradients, with an error of beta times the gradient of "
            "E[r^2]/4",
            deviation < 0.01 and abs(gradient_order - 1) < 0.05, relative_deviation=deviation,
            order_in_beta=gradient_order))
        curves[name] = {"beta": betas, "error": errors, "predicted": betas * constant.item(),
                        "gradient_error": norms, "predicted_gradient_error": betas * scale}
    return verdicts, curves


# -------------------------------------------------------------------------------------------- 2. Equation 5


def equation5(generator) -> tuple[list, dict]:
    """NPO's gradient is GA's times W in (0, 2): 1 at the start, 0 once unlearned. Its loss is above 0."""
    verdicts, curves = [], {}
    reference_logps = -torch.rand(400, generator=generator, dtype=DTYPE) * 20
    logps, reference = small_net(generator)
    noise = torch.randn(reference.shape, generator=generator, dtype=DTYPE)
    policy = (reference + 0.3 * noise).requires_grad_()
    weight_gap, model_gap, start_gap, tail, bounds = [], [], [], [], []
    for beta in BETAS:
        log_ratio = torch.linspace(-30 / beta, 30 / beta, 400, dtype=DTYPE)
        policy_logps = (reference_logps + log_ratio).requires_grad_()
        loss = losses.npo_loss(policy_logps, reference_logps, beta)
        measured = gradient(loss, policy_logps) / gradient(losses.ga_loss(policy_logps), policy_logps)
        predicted = 2 / (1 + torch.exp(-beta * log_ratio))  # 2 pi^beta / (pi^beta + pi_ref^beta)
        weight = losses.npo_weight(policy_logps, reference_logps, beta).detach()
        weight_gap += [(measured - predicted).abs().max().item(), (weight - predicted).abs().max().item()]
        whole = gradient(losses.npo_loss(logps(policy), logps(reference), beta).mean(), policy)
        weighted = gradient((losses.npo_weight(logps(policy), logps(reference), beta).detach() *
                             losses.ga_loss(logps(policy))).mean(), policy)
        model_gap.append((whole - weighted).norm().item() / (weighted.norm().item() + 1e-300))
        start = reference_logps.clone().requires_grad_()
        start_loss = losses.npo_loss(start, reference_logps, beta)
        start_gap += [(gradient(start_loss, start) - 1).abs().max().item(),
                      (start_loss - 2 / beta * math.log(2)).abs().max().item()]
        unlearned = log_ratio < -10 / beta
        log_weight = np.log(np.abs(measured.numpy()[unlearned]) + 1e-300)
        tail.append(slope(log_weight, log_ratio[unlearned]) / beta)
        bounds += [measured.min().item(), measured.max().item()]
        near = (reference_logps[:121] + torch.linspace(-15, 15, 121, dtype=DTYPE)).requires_grad_()
        near_loss = losses.npo_loss(near, reference_logps[:121], beta)
        curves[f"{beta:g}"] = {"log_ratio": np.linspace(-15, 15, 121), "loss": near_loss.detach().numpy(),
                               "weight": gradient(near_loss, near).numpy()}
    verdicts.append(verdict(
        "Equation 5: NPO's gradient is gradient ascent's times W = 2 pi^beta/(pi^beta + pi_ref^beta)",
        max(weight_gap) < 1e-12 and max(model_gap) < 1e-10, largest_gap=max(weight_gap),
        largest_relative_gap_of_a_net=max(model_gap)))
    verdicts.append(verdict(
        "Equation 5: W is in (0, 2), and 1 at the start, where the loss is (2/beta) log 2",
        0 < min(bounds) and max(bounds) < 2 and max(start_gap) < 1e-12, least=min(bounds),
        greatest_below_2_by=2 - max(bounds), largest_gap_at_start=max(start_gap)))
    verdicts.append(verdict(
        "Equation 5: W vanishes on unlearned samples, as 2 (pi/pi_ref)^beta", close(tail, 1, 0.01),
        exponent_over_beta=tail))
    far = torch.linspace(-1e4, 0, 101, dtype=DTYPE)
    least = [losses.npo_loss(far, torch.zeros_like(far), beta).min().item() for beta in BETAS]
    npo, ga = min(least) + 0.0, losses.ga_loss(far).min().item()  # -0.0 is 0
    verdicts.append(verdict(
        "Equation 3: NPO's loss is bounded below by 0; gradient ascent's is not",
        0 <= npo < 1e-6 and ga == far.min().item(), least_npo_loss=npo, least_ga_loss=ga))
    return verdicts, curves


# --------------------------------------------------------------------------------------------- 3. Theorem 2


def signed_gram(n_f: int, d: int, seed: int, correlation: float = C_0) -> tuple[np.ndarray, np.ndarray]:
    """(S, margin_0): rows with norms in NORMS whose products are at most correlation/n_f, signs of the labels
    multiplied in.

    X = L Q, L L^T the wanted Gram matrix and Q orthonormal rows of length d, so n_f <= d. The norms are
    spread evenly, so that a sweep over n_f changes n_f and not their distribution. One draw for each (n_f,
    d): eta and beta are varied on the same rows.
    """
    rng = np.random.default_rng([seed, n_f, d])
    noise = np.triu(rng.uniform(-1, 1, (n_f, n_f)), 1) * correlation / n_f
    norms = rng.permutation(np.linspace(*NORMS, 2 * n_f + 1)[1::2])
    L = np.linalg.cholesky(np.diag(norms**2) + noise + noise.T)
    return with_labels(L @ np.linalg.qr(rng.standard_normal((d, n_f)))[0].T, rng)


def with_labels(X: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    """Signs for rows X (n_f, d), a theta_init of norm B_THETA: (S, margin_0)."""
    theta = rng.standard_normal(X.shape[1])
    signed = X * rng.choice([-1.0, 1.0], len(X))[:, None]
    return signed @ signed.T, signed @ theta * B_THETA / np.linalg.norm(theta)


class Problems:
    """C problems as one padded batch: the same step, or the same flow, moves all of them."""

    def __init__(self, problems: list):
        """problems: (S, margin_0, settings with eta and beta)."""
        self.problems = problems
        self.sizes = np.array([len(margin) for _, margin, _ in problems])
        n = self.sizes.max()
        self.S = np.zeros((len(problems), n, n))
        self.margin_0 = np.zeros((len(problems), n))
        for c, (S, margin, _) in enumerate(problems):
            self.S[c, :len(S), :len(S)], self.margin_0[c, :len(S)] = S, margin
        self.scale = np.array([[settings["eta"] / len(margin)] for _, margin, settings in problems])
        self.beta = torch.tensor([[settings["beta"]] for _, _, settings in problems], dtype=DTYPE)
        self.reference_logps = F.logsigmoid(torch.from_numpy(self.margin_0))

    def velocity(self, margin: np.ndarray, loss: str) -> np.ndarray:
        """-(change of the margins in a step), (C, n): (eta/n_f) S dL/dmargin, the slope by autograd."""
        margins = torch.from_numpy(margin).requires_grad_()
        logps = F.logsigmoid(margins)
        if loss == "npo":  # beta inside and 1/beta outside is the same loss: one call for all beta
            value = losses.npo_loss(self.beta * logps, self.beta * self.reference_logps, 1.0) / self.beta
        else:
            value = losses.ga_loss(logps)
        return self.scale * (self.S @ gradient(value, margins).numpy()[:, :, None])[:, :, 0]

    def steps(self, loss: str, wanted: np.ndarray) -> np.ndarray:
        """Gradient descent, step by step: margins at the steps `wanted` (E, C, n)."""
        margin, kept = self.margin_0.copy(), []
        for step in range(1, wanted[-1] + 1):
            margin -= self.velocity(margin, loss)
            if step in wanted:
                kept.append(margin.copy())
        return np.stack(kept)

    def skip(self, loss: str, margin: np.ndarray, first: int, times: np.ndarray) -> np.ndarray:
        """Margins at `times` > first, from those at step `first`, along the flow: smooth in the clock log t.

        A step is off its flow by a * (total variation of log f) in time (above), and what the first steps,
        where f changes most, add to that has been made step by step already. The deviation is measured too,
        in `theorem2`.
        """
        def velocity(log_t, flat):
            return -math.exp(log_t) * self.velocity(flat.reshape(margin.shape), loss).ravel()

        clock = np.log(np.append(first, times))
        flow = solve_ivp(velocity, (clock[0], clock[-1]), margin.ravel(), "DOP853", clock[1:], rtol=1e-8,
                         atol=1e-8)
        if not flow.success:
            raise RuntimeError(
                f"the flow of {loss} from step {first} to {times[-1]} was not integrated: {flow.message}")
        return flow.y.T.reshape(-1, *margin.shape)

    def norms(self, margins: np.ndarray) -> np.ndarray:
        """|theta - theta_init| in the norm of X^T X: (E, C, n) -> (E, C)."""
        return np.sqrt(((margins - self.margin_0)**2).sum(-1))


def follow(problems: Problems, loss: str, times: np.ndarray) -> np.ndarray:
    """Margins at the steps `times` (E,), up to LAST: made step by step to EXACT, along the flow beyond."""
    early = times[times <= EXACT]
    margins = problems.steps(loss, np.append(early, EXACT) if early[-1] < EXACT else early)
    late = problems.skip(loss, margins[-1], EXACT, times[times > EXACT])
    return np.concatenate([margins[:len(early)], late])


def recorded(count: int) -> np.ndarray:
    """The steps that are looked at, evenly in log t: `count` up to EXACT, as many from there to LAST."""
    times = np.concatenate([np.geomspace(1, EXACT, count), np.geomspace(EXACT, LAST, count)])
    return np.unique(times.round().astype(int))


def configurations() -> list[dict]:
    """The base and every sweep, each once."""
    found = [dict(BASE)]
    for key, values in SWEEPS.items():
        found += [{**BASE, key: value} for value in values if value != BASE[key]]
    return found


def flow_deviation(problems: Problems, loss: str, times: np.ndarray, margins: np.ndarray) -> tuple:
    """Orthogonal rows: the largest |iterate - flow|, and its largest ratio to the bound a TV(log f) max f."""
    largest, worst = 0.0, 0.0
    for c, (S, margin_0, settings) in enumerate(problems.problems):
        for i, start in enumerate(margin_0):
            a = settings["eta"] * S[i, i] / len(S)
            flow = ga_flow(start, a * times) if loss == "ga" else npo_flow(start, settings["beta"], a * times)
            path = np.linspace(start, min(flow[-1], margins[-1, c, i]), 400)
            speed = expit(-path) if loss == "ga" else npo_speed(path, start, settings["beta"])
            bound = a * np.abs(np.diff(np.log(speed))).sum() * speed.max()
            deviation = np.abs(margins[:, c, i] - flow).max()
            largest, worst = max(largest, deviation), max(worst, deviation / (bound + 1e-7))
    return largest, worst


def theorem2(seed: int) -> tuple[list, dict]:
    """Gradient ascent diverges linearly, NPO logarithmically, with the theorem's powers of n_f, eta, beta."""
    found = configurations()
    nearly = Problems([(*signed_gram(c["n_f"], c["d"], seed), c) for c in found])
    orthogonal = Problems([(*signed_gram(c["n_f"], c["d"], seed, correlation=0.0), c) for c in found])
    times = recorded(25)
    norms = {loss: nearly.norms(follow(nearly, loss, times)) for loss in ("ga", "npo")}
    return (flow_verdicts(orthogonal) + skip_verdicts(nearly) + rate_verdicts(nearly, found, times, norms)
            + constant_verdicts(found, times, norms), {"configurations": found, "times": times, **norms})


def flow_verdicts(orthogonal: Problems) -> list:
    times, result = np.unique(np.geomspace(1, CHECKED, 30).round().astype(int)), []
    for loss, formula in (("ga", "K - LambertW(e^K)"), ("npo", "the quadrature")):
        largest, worst = flow_deviation(orthogonal, loss, times, orthogonal.steps(loss, times))
        result.append(verdict(
            f"Theorem 2, orthogonal rows: {loss}'s iterates follow the flow ({formula}), within the derived "
            "bound",
            worst <= 1, largest_margin_deviation=largest, largest_deviation_over_bound=worst, steps=CHECKED))
    return result


def skip_verdicts(nearly: Problems) -> list:
    times, gaps = CHECKED // np.array([4, 2, 1]), {}
    for loss in ("ga", "npo"):
        made = nearly.norms(nearly.steps(loss, times))
        followed = nearly.norms(follow(nearly, loss, np.array([EXACT, *times])))[1:]
        gaps[loss] = (np.abs(followed - made) / np.maximum(made, 1e-300)).max(1)
    worst = max(gap.max() for gap in gaps.values())
    falls = all(gap[-1] <= gap[0] + 1e-9 for gap in gaps.values())
    return [verdict(
        f"Skipping: beyond step {EXACT} the flow replaces the steps, with a relative error below 0.001 that "
        "falls",
        worst < 1e-3 and falls, steps=times, **gaps)]


def varied(found: list, key: str) -> list[int]:
    """The configurations of the sweep over `key`, by its values: all that is BASE but for it."""
    others = [other for other in BASE if other != key]
    sweep = [c for c, own in enumerate(found) if all(own[other] == BASE[other] for other in others)]
    return sorted(sweep, key=lambda c: found[c][key])


def rate_verdicts(nearly: Problems, found: list, times: np.ndarray, norms: dict) -> list:
    """Gradient ascent against C n_f^(-1/2) eta t, NPO against sqrt(n_f) log(t)/beta and its constant."""
    n_f, eta, beta = (np.array([own[key] for own in found]) for key in ("n_f", "eta", "beta"))
    constants = norms["ga"] / ga_rate(n_f, eta, times[:, None])
    late_constants = constants[-1] / np.array([ga_constant(S) for S, _, _ in nearly.problems])
    # row sums times f, which is in [sigmoid(-|m_0|), 1]
    low, high = NORMS[0]**2 * expit(-B_THETA * NORMS[1]) - C_0, NORMS[1]**2 + C_0
    linear = verdict(
        "Theorem 2: gradient ascent's distance is C n_f^(-1/2) eta t, C bounded for all t >= 1, late as "
        "predicted",
        close(late_constants, 1, 0.01) and low <= constants.min() and constants.max() <= high,
        C_1=constants.min(), C_2=constants.max(), bounds=[low, high],
        late_over_predicted=ends(late_constants))
    late = times >= LAST // 10
    first, last = times[late][[0, -1]]
    slopes = np.array([slope(norm, np.log(times[late])) for norm in norms["npo"][late].T])
    # late, whatever the constant
    rise = npo_rate(n_f, eta, beta, last, 1e3) - npo_rate(n_f, eta, beta, first, 1e3)
    slope_ratio = slopes / (rise / np.log(last / first))
    logarithmic = verdict(
        "Theorem 2: NPO's distance grows by sqrt(n_f)/beta per unit of log t", close(slope_ratio, 1, 0.03),
        measured_over_predicted_slope=ends(slope_ratio))
    tail = [npo_tail(S, margin, own["eta"], own["beta"], times[late]) for S, margin, own in nearly.problems]
    tail_ratio = norms["npo"][late] / np.array(tail).T
    constant = verdict("Theorem 2: NPO's late distance is the predicted one, constant included",
                       close(tail_ratio, 1, 0.01), measured_over_predicted=ends(tail_ratio))
    measured = {"ga": norms["ga"][-1], "npo": norms["npo"][-1], "slope of npo": slopes}
    powers = {}
    for what, key, power in (("ga", "n_f", -0.5), ("ga", "eta", 1), ("ga", "d", 0), ("npo", "d", 0),
                             ("slope of npo", "n_f", 0.5), ("slope of npo", "beta", -1)):
        sweep = varied(found, key)
        values = np.array([found[c][key] for c in sweep])
        powers[f"{what} in {key}"] = [exponent(measured[what][sweep], values), power]
    theorems = verdict("Theorem 2: the powers of n_f, eta, beta and d are the theorem's",
                       all(abs(fitted - power) < 0.03 for fitted, power in powers.values()),
                       fitted_and_predicted=powers)
    return [linear, logarithmic, constant, theorems]


def constant_verdicts(found: list, times: np.ndarray, norms: dict) -> list:
    """C_1..C_3 of NPO's bound: 1/beta, and least and greatest c for which npo_rate is the distance."""
    column = {key: np.array([own[key] for own in found]) for key in BASE}
    c_of_t, late = implied_c(column, times[:, None], norms["npo"]), times >= LAST // 100
    in_t = [exponent(c_of_t[late, c], times[late]) for c in range(len(found))]
    sweeps = {key: varied(found, key) for key in ("n_f", "eta", "d")}
    drift = {key: exponent(c_of_t[-1, sweep], column[key][sweep]) for key, sweep in sweeps.items()}
    fitted = {}
    for beta in BETAS:
        own = c_of_t[:, column["beta"] == beta]
        fitted[f"beta={beta:g}"] = {"C_1": 1 / beta, "C_2": own.min(), "C_3": own.max()}
    return [verdict("Theorem 2: NPO's constants C_2, C_3 don't drift with n_f, eta, d or t",
                    max(map(abs, [*drift.values(), *in_t])) < 0.05, late_power_in=drift,
                    late_power_in_t=ends(np.array(in_t)), fitted=fitted)]


def outside_the_regime(seed: int) -> dict:
    """No verdict: correlated rows; more samples than dimensions, whose labels are in each other's way."""
    rng, settings = np.random.default_rng(seed + 1), {"eta": 0.5, "beta": 1.0}
    correlated = (0.3 * rng.standard_normal((16, 128)) + 0.95) / math.sqrt(128)  # unit rows that share 0.9
    cases = {"within: n_f = 16, d = 128": signed_gram(16, 128, seed),
             "strongly correlated rows": with_labels(correlated, rng),
             "n_f = 64 > d = 16": with_labels(rng.standard_normal((64, 16)) / 4, rng)}
    problems = Problems([(*case, settings) for case in cases.values()])
    times = recorded(20)
    norms = {loss: problems.norms(follow(problems, loss, times)) for loss in ("ga", "npo")}
    late = times >= LAST // 10
    result = {}
    for c, name in enumerate(cases):
        rise = slope(norms["npo"][late, c], np.log(times[late]))
        result[name] = {"times": times, "ga": norms["ga"][:, c], "npo": norms["npo"][:, c],
                        "ga_power_in_t": exponent(norms["ga"][late, c], times[late]),
                        "npo_slope_over_predicted": rise / problems.sizes[c]**0.5}
    return result


def implied_c(settings: dict, times: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """The c(t) for which npo_rate is the norm: the theorem's C_2 and C_3 are its least and greatest value."""
    units = settings["beta"] * norm / settings["n_f"]**0.5
    return np.expm1(units) * settings["n_f"] / (settings["eta"] * times)


def sweep_curves(curves: dict) -> dict:
    """What `pages.draw_theorem2` shows: distances in units of the rates, with the late c for NPO's."""
    found, times, result = curves["configurations"], curves["times"], {}
    for key in ("n_f", "eta"):
        result[key] = {}
        for c in varied(found, key):
            own, ga, npo = found[c], curves["ga"][:, c], curves["npo"][:, c]
            unit, late_c = own["n_f"]**0.5 / own["beta"], implied_c(own, times, npo)[-1]
            predicted = npo_rate(own["n_f"], own["eta"], own["beta"], times, late_c)
            result[key][own[key]] = ga / ga_rate(own["n_f"], own["eta"], times), npo / unit, predicted / unit
    return result


# -------------------------------------------------------------------------------------- 4. divergence rates


def divergence_rates(curves: dict) -> tuple[list, dict]:
    """The power of t tends to 1 for gradient ascent, and for NPO that of exp(beta distance/sqrt(n_f)).

    The curves are {label: (distance, the theorem's lower bound, its upper bound)}.
    """
    found, times = curves["configurations"], curves["times"]
    chosen, late = varied(found, "beta"), times >= LAST // 10
    ga = curves["ga"][:, chosen[0]]
    power, ga_over_rate = exponent(ga[late], times[late]), ga / ga_rate(BASE["n_f"], BASE["eta"], times)
    rows, rates = {}, {"GA": (ga, *(ga / ga_over_rate * constant for constant in ends(ga_over_rate)))}
    for c in chosen:
        own, npo = found[c], curves["npo"][:, c]
        bounds = [npo_rate(own["n_f"], own["eta"], own["beta"], times, constant)
                  for constant in ends(implied_c(own, times, npo))]
        rates[f"NPO, $\\beta$ = {own['beta']:g}"] = npo, *bounds
        rows[f"beta={own['beta']:g}"] = {
            "power_of_exp_distance": exponent(np.exp(own["beta"] * npo[late] / own["n_f"]**0.5), times[late]),
            "local_power": exponent(npo[late], times[late]),
            "ga_over_npo_at_the_end": curves["ga"][-1, c] / max(npo[-1], 1e-300)}
    slower = all(abs(row["power_of_exp_distance"] - 1) < 0.03 and row["local_power"] < 0.2
                 for row in rows.values())
    return [verdict(
        "Divergence rates: gradient ascent is linear in t; NPO exponentially slower, for every beta",
        abs(power - 1) < 0.01 and slower, ga_power=power, npo=rows)], rates


# ---------------------------------------------------------------------------- 5. the linear-softmax example


def softmax_example(generator) -> tuple[list, dict]:
    """Section 2.1, pi = softmax(theta x): GA's gradient in theta_y is (1 - pi_y) x, and NPO's W times it."""
    classes, dimension, label = 5, 8, 2
    x = torch.randn(dimension, generator=generator, dtype=DTYPE)
    start = torch.randn(classes, dimension, generator=generator, dtype=DTYPE) * 0.1
    target = torch.tensor([label])
    reference_logps = losses.token_logps((start @ x)[None], target)
    depths = np.linspace(0, 40, 41)  # how far the label's logit is pushed down, nats
    rows = {"ga": [], **{f"npo, beta={beta:g}": [] for beta in BETAS}}
    logps = []
    for depth in depths:
        theta = start.clone()
        theta[label] -= depth * x / (x @ x)
        theta.requires_grad_()
        for name in rows:
            policy_logps = losses.token_logps((theta @ x)[None], target)
            beta = 0 if name == "ga" else float(name.partition("=")[2])
            loss = losses.ga_loss(policy_logps)
            if beta:
                loss = losses.npo_loss(policy_logps, reference_logps, beta)
            rows[name].append(gradient(loss, theta)[label].norm().item() / x.norm().item())
        logps.append(policy_logps.item())
    late, logps = depths >= 20, np.array(logps)
    slopes = {}
    for beta in BETAS:  # of the log gradient in log pi
        log_gradient = np.log(np.array(rows[f"npo, beta={beta:g}"])[late] + 1e-300)
        slopes[f"beta={beta:g}"] = slope(log_gradient, logps[late]) / beta
    ga = np.array(rows["ga"])[late]
    result = verdict(
        "Section 2.1: on an unlearned sample GA's gradient keeps the scale |x|, NPO's falls as pi^beta",
        close(ga, 1, 1e-6) and close(list(slopes.values()), 1, 0.01), ga_over_x=ends(ga),
        npo_exponent_over_beta=slopes)
    return [result], {"log_probability": logps, **rows}


# ------------------------------------------------------------------------------------------ putting it down


def check(out: Path | None, seed: int = 0) -> list:
    """All five items: their verdicts. With `out`, pictures, a page and JSON too."""
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=6, ncols=100, file=sys.stderr) as progress:
        def item(what, function, *given):
            progress.set_description(what)
            result = function(*given)
            progress.update()
            return result

        first, proposition = item("Proposition 1", proposition1, generator)
        second, weight = item("Equation 5", equation5, generator)
        third, theorem = item("Theorem 2", theorem2, seed)
        outside = item("outside its regime", outside_the_regime, seed)
        fourth, rates = item("divergence rates", divergence_rates, theorem)
        fifth, softmax = item("linear softmax", softmax_example, generator)
    verdicts = first + second + third + fourth + fifth
    if out:
        pages.draw_proposition1(out / "proposition1.png", proposition)
        pages.draw_equation5(out / "equation5.png", weight)
        pages.draw_theorem2(out / "theorem2.png", theorem["times"], sweep_curves(theorem), outside)
        pages.draw_divergence(out / "divergence_rates.png", theorem["times"], rates)
        pages.draw_softmax(out / "linear_softmax.png", softmax)
        provenance = environment()
        (out / "theory.md").write_text(pages.page(verdicts, outside, provenance["command"]))
        curves = {"proposition1": proposition, "equation5": weight, "theorem2": theorem, "outside": outside,
                  "softmax": softmax}
        content = {"verdicts": verdicts, "provenance": {**provenance, "seed": seed}, "curves": curves}
        write_json(out / "theory_check.json", tidy(content, 6))
    return verdicts


def main(argv: list | None = None) -> int:
    began = time.time()
    parser = Parser(prog="theory_check.py", description=__doc__)
    parser.add_argument("--seed", type=not_negative(int), default=0,
                        help="of models, rows and starting points (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/theory"),
                        help="folder for JSON, pictures and a page (default runs/theory)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # a folder that can't be written is refused before the work
    verdicts = check(args.out, args.seed)
    for result in verdicts:
        print(f"{'holds' if result['holds'] else 'FAILS'}  {result['claim']}")
        for key, value in tidy(result["numbers"], 6).items():
            print(f"         {key}: {json.dumps(value)}")
    failed = sum(not result["holds"] for result in verdicts)
    print(f"{len(verdicts) - failed} of {len(verdicts)} hold, {time.time() - began:.1f} s; "
          f"written: {args.out}/theory_check.json, theory.md and pictures")
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()), "theory_check.py")
