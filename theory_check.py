"""Section 3 of the NPO paper as checks that can fail: Proposition 1, Equation 5, Theorem 2, and Section 2.1's example.

    python theory_check.py      # five items; JSON, a page and pictures in results/theory; exit status 1 if one fails

Every item measures with the functions of `losses.py` (by autograd) and predicts with pen and paper, below: a mistake in
a loss turns a verdict. Theorem 2 is checked in its own regime (n_f <= d, nearly orthogonal rows, bounded norms,
eta <= 1), up to a million steps. What happens outside of it is shown without a verdict.

Two remarks on the paper's text. Below Eq. 3 it prints both gradients with a minus sign; with L_GA = E log pi_theta
(Eq. 1) they are +E grad log pi and +E W grad log pi, which is what is checked here. Theorem 2's constants are not given
there: we derive them for orthogonal rows, and predict and measure them for nearly orthogonal ones.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # matrices of 64 rows: threads would spend their time waiting for each other
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import matplotlib
import numpy as np
import scipy
import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from scipy.special import expit, lambertw
from tqdm import tqdm

import losses

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Shapes: B samples; C configurations (problems of Theorem 2), padded to n samples; E recorded times.
DTYPE = torch.float64
BETAS = (0.2, 0.5, 1.0, 2.0)
LAST = 10**6  # the theorem is followed for this many steps
EXACT, CHECKED = 1000, 8000  # steps that are really made, and steps made once more to check what replaces them
# Configurations of Theorem 2: the base, and one quantity at a time
BASE = {"n_f": 16, "d": 128, "eta": 0.5, "beta": 1.0}
SWEEPS = {"n_f": (2, 4, 8, 16, 32, 64), "eta": (0.05, 0.1, 0.25, 0.5, 1.0), "beta": BETAS, "d": (64, 128, 256, 512)}
B_THETA, NORMS, C_0 = 1.0, (0.8, 1.2), 0.1  # |theta_init|, the range of |x_i|, and n_f * max |<x_i, x_j>|


# ------------------------------------------------------------------------------------------ what the theory predicts


def ga_rate(n_f, eta, t):
    """Theorem 2's speed of gradient ascent, up to a constant: n_f^(-1/2) eta t."""
    return n_f**-0.5 * eta * t


def npo_rate(n_f, eta, beta, t, c):
    """Theorem 2's speed of NPO, sqrt(n_f) log(c eta t / n_f + 1) / beta: its C_1 is 1/beta, by the flow below."""
    return n_f**0.5 * np.log(c * eta * t / n_f + 1) / beta


# Orthogonal rows. With the margin m_i = +-<x_i, theta> of the sample's own label, log pi(y_i|x_i) = log sigmoid(m_i),
# and a step on the mean loss moves it by m <- m - a f(m), a = eta |x|^2 / n_f, with f = sigmoid(-m) for gradient ascent
# and f = W sigmoid(-m) for NPO. |theta - theta_init| in the norm of X^T X is the Euclidean norm of the margins' change.
# The flow is dm/ds = -f(m) in the clock s = a t.
#   GA: (1 + e^m) dm = -ds, so m + e^m = K, K = m_0 + e^(m_0) - s, and m = K - LambertW(e^K). Once s is large, m = -s:
#       linear in t.
#   NPO: 1/W = (1 + (v_0/v)^beta)/2 with v = sigmoid(m), so s is the integral of (1 + e^x)(1 + (v_0/v(x))^beta)/2 from m
#       to m_0. For m -> -inf, v = e^m and s = v_0^beta e^(-beta m) / (2 beta): m = -(1/beta) log(2 beta s / v_0^beta):
#       logarithmic in t, with slope 1/beta a sample.
# One step takes a of the clock, the flow over the same distance between a f(m)/f(m') and a (or the reverse, where f
# falls). So the iterate's clock is off by at most a * (total variation of log f), and its margin by that times the
# largest f on the way. In NPO's tail f falls as 1/t: the error vanishes.


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
    return scipy.interpolate.CubicSpline(np.log1p(clock), grid)(np.log1p(s))


# Nearly orthogonal rows, S the Gram matrix of the signed rows: m <- m - (eta/n_f) S f(m), with vectors m and f. Late in
# the run:
#   GA: f -> 1, the change is (eta t/n_f) S 1, and |theta - theta_init| / (n_f^(-1/2) eta t) -> the rms of the row sums.
#   NPO: every margin falls as (1/beta) log t, so S f = n_f/(beta eta t) 1 with f = 2 e^(beta (m - log v_0)), and
#       -beta m_i = log(2 beta eta t / n_f) - log (S^-1 1)_i - beta log v_0,i.


def ga_constant(S: np.ndarray) -> float:
    return float(np.sqrt(np.mean(S.sum(1)**2)))


def npo_tail(S: np.ndarray, margin_0: np.ndarray, eta: float, beta: float, t: np.ndarray) -> np.ndarray:
    """The late norm |theta_NPO - theta_init| at times t (E,): the change of every margin, as above, and its norm."""
    share = np.linalg.solve(S, np.ones(len(S)))
    change = np.log(2 * beta * eta * t[:, None] / (len(S) * share)) / beta + np.logaddexp(0, margin_0)
    return np.sqrt((change**2).sum(1))


# ------------------------------------------------------------------------------------------------- measuring


def gradient(loss: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """d(sum of loss)/d parameters. 0 for a loss that doesn't depend on them: it fails its check, not the program."""
    if not loss.requires_grad:
        return torch.zeros_like(parameters)
    [result] = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
    return torch.zeros_like(parameters) if result is None else result


def verdict(claim: str, holds: bool, **numbers) -> dict:
    return {"claim": claim, "holds": bool(holds), "numbers": numbers}


def close(measured, predicted, tolerance: float) -> bool:
    return bool(np.all(np.abs(np.asarray(measured) - predicted) <= tolerance * np.abs(predicted)))


def exponent(values: np.ndarray, of: np.ndarray) -> float:
    """p of values ~ of^p."""
    return float(np.polyfit(np.log(of), np.log(np.maximum(values, 1e-300)), 1)[0])


# ---------------------------------------------------------------------------------------------- 1. Proposition 1


def small_net(generator) -> tuple:
    """(logps of flat parameters, pi_ref's parameters): a two-layer tanh network on five classes."""
    x, y = torch.randn(64, 12, generator=generator, dtype=DTYPE), torch.randint(5, (64,), generator=generator)
    shapes = [(12, 24), (24,), (24, 5), (5,)]

    def logps(parameters):
        w1, b1, w2, b2 = (part.view(shape)
                          for part, shape in zip(parameters.split([math.prod(s) for s in shapes]), shapes))
        return losses.token_logps((x @ w1 + b1).tanh() @ w2 + b2, y)
    return logps, torch.randn(sum(math.prod(s) for s in shapes), generator=generator, dtype=DTYPE) / 3


def random_feature_logistic(generator) -> tuple:
    """The model of synthetic.py, 32 features: (logps, pi_ref's parameters)."""
    x, y = torch.randn(64, 16, generator=generator, dtype=DTYPE), torch.randint(2, (64,), generator=generator)
    features = (x @ torch.randn(16, 32, generator=generator, dtype=DTYPE) / 4).relu()

    def logps(parameters):
        logits = features @ parameters
        return losses.token_logps(torch.stack([torch.zeros_like(logits), logits], -1), y)
    return logps, torch.randn(32, generator=generator, dtype=DTYPE) / 2


def proposition1(generator) -> tuple[list, dict]:
    """L_NPO - (2/beta) log 2 -> L_GA - E log pi_ref, and gradients, with an error of beta E[r^2]/4, r = log pi/pi_ref.

    Why: L_NPO = (2/beta) E log(1 + e^(beta r)), and log(1 + e^u) = log 2 + u/2 + u^2/8 + O(u^4). The 1/beta term is
    (2/beta) log 2, the constant one E r = L_GA - E log pi_ref, the next beta E[r^2]/4, and then nothing before beta^3.
    """
    betas, verdicts, curves = np.geomspace(1, 1e-3, 13), [], {}
    for name, make in (("small net", small_net), ("random-feature logistic", random_feature_logistic)):
        logps, reference = make(generator)
        policy = reference + 0.5 * reference.std() * torch.randn(reference.shape, generator=generator, dtype=DTYPE)
        policy.requires_grad_()
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
        norms, small = np.array([error.norm().item() for error in gradient_errors]), betas <= 0.1
        order, gradient_order = (exponent(np.abs(values)[small], betas[small]) for values in (np.array(errors), norms))
        deviation = ((gradient_errors[-1] / betas[-1] - constant_gradient).norm() / constant_gradient.norm()).item()
        verdicts.append(verdict(
            f"Proposition 1, {name}: the loss tends to gradient ascent's, with an error of beta E[r^2]/4",
            close(errors[-1] / betas[-1], constant.item(), 0.01) and abs(order - 1) < 0.05,
            error_over_beta=errors[-1] / betas[-1], predicted=constant.item(), order_in_beta=order))
        verdicts.append(verdict(
            f"Proposition 1, {name}: so do the gradients, with an error of beta times the gradient of E[r^2]/4",
            deviation < 0.01 and abs(gradient_order - 1) < 0.05, relative_deviation=deviation,
            order_in_beta=gradient_order))
        curves[name] = {"beta": betas, "error": np.abs(errors), "predicted": betas * constant.item(),
                        "gradient_error": norms, "predicted_gradient_error": betas * constant_gradient.norm().item()}
    return verdicts, curves


def draw_proposition1(path: Path, curves: dict):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    for marker, (name, curve) in zip("os", curves.items()):
        for axis, key in zip(axes, ("error", "gradient_error")):
            predicted = curve["predicted" if key == "error" else "predicted_gradient_error"]
            axis.loglog(curve["beta"], curve[key], marker, color="black" if marker == "o" else "0.5", label=name)
            axis.loglog(curve["beta"], predicted, "--" if marker == "o" else ":", color="#d1495b",
                        label=f"predicted, {name}")
    axes[0].set(title="|loss - (2/$\\beta$) log 2 - limit|", xlabel="$\\beta$", ylabel="nats")
    axes[1].set(title="|$\\nabla L_{NPO} - \\nabla L_{GA}$|", xlabel="$\\beta$")
    finish(figure, axes, path)


# ------------------------------------------------------------------------------------------------- 2. Equation 5


def equation5(generator) -> tuple[list, dict]:
    """NPO's gradient is GA's, weighted with W in (0, 2): 1 at the start, 0 once unlearned. Its loss is above 0."""
    verdicts, curves = [], {}
    reference_logps = -torch.rand(400, generator=generator, dtype=DTYPE) * 20
    logps, reference = small_net(generator)
    policy = (reference + 0.3 * torch.randn(reference.shape, generator=generator, dtype=DTYPE)).requires_grad_()
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
        tail.append(np.polyfit(log_ratio[unlearned], np.log(np.abs(measured.numpy()[unlearned]) + 1e-300), 1)[0] / beta)
        bounds += [measured.min().item(), measured.max().item()]
        near = (reference_logps[:121] + torch.linspace(-15, 15, 121, dtype=DTYPE)).requires_grad_()
        near_loss = losses.npo_loss(near, reference_logps[:121], beta)
        curves[f"{beta:g}"] = {"log_ratio": np.linspace(-15, 15, 121), "weight": gradient(near_loss, near).numpy(),
                               "loss": near_loss.detach().numpy()}
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
    npo = min(losses.npo_loss(far, torch.zeros_like(far), beta).min().item() for beta in BETAS) + 0.0  # -0.0 is 0
    ga = losses.ga_loss(far)
    verdicts.append(verdict(
        "Equation 3: NPO's loss is bounded below by 0; gradient ascent's is not",
        0 <= npo < 1e-6 and ga.min().item() == far.min().item(), least_npo_loss=npo, least_ga_loss=ga.min().item()))
    return verdicts, curves


def draw_equation5(path: Path, curves: dict):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    for (beta, curve), dashes, shade in zip(curves.items(), ("-", "--", "-.", ":"), ("0", "0.25", "0.45", "0.6")):
        axes[0].plot(curve["log_ratio"], curve["weight"], dashes, color=shade, label=f"$\\beta$ = {beta}")
        axes[1].plot(curve["log_ratio"], curve["loss"], dashes, color=shade, label=f"NPO, $\\beta$ = {beta}")
    axes[1].plot([-15, 15], [-15, 15], color="#d1495b", label="gradient ascent")
    axes[0].set(title="W: what NPO multiplies GA's gradient with", xlabel="log $\\pi_\\theta/\\pi_{ref}$")
    axes[1].set(title="loss", xlabel="log $\\pi_\\theta/\\pi_{ref}$", ylabel="nats", ylim=(-16, 32))
    finish(figure, axes, path)


# --------------------------------------------------------------------------------------------------- 3. Theorem 2


def signed_gram(n_f: int, d: int, seed: int, correlation: float = C_0) -> tuple[np.ndarray, np.ndarray]:
    """(S, margin_0): rows with norms in NORMS whose products are at most correlation/n_f, signs of the labels
    multiplied in.

    X = L Q, L L^T the wanted Gram matrix and Q orthonormal rows of length d, so n_f <= d. The norms are spread evenly,
    so that
    a sweep over n_f changes n_f and not their distribution. One draw for each (n_f, d): eta and beta are varied on the
    same rows.
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
        self.scale = np.array([settings["eta"] / size for (_, _, settings), size in zip(problems, self.sizes)])[:, None]
        self.beta = torch.tensor([[settings["beta"]] for _, _, settings in problems], dtype=DTYPE)
        self.reference_logps = F.logsigmoid(torch.from_numpy(self.margin_0))

    def velocity(self, margin: np.ndarray, loss: str) -> np.ndarray:
        """-(change of the margins in one step), (C, n): (eta/n_f) S dL/dmargin, the slope by autograd on losses.py."""
        margins = torch.from_numpy(margin).requires_grad_()
        logps = F.logsigmoid(margins)
        if loss == "npo":  # L depends on beta * log-ratio alone, but for its 1/beta: so one call serves every beta
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
        """Margins at `times` > first, from those at step `first`, along the flow: in the clock log t everything is
        smooth.

        A step is off its flow by a * (total variation of log f) in time (above), and what the first steps, where f
        changes most, add
        to that has been made step by step already. The deviation is measured too, in `theorem2`.
        """
        def velocity(log_t, flat):
            return -math.exp(log_t) * self.velocity(flat.reshape(margin.shape), loss).ravel()

        clock = np.log(np.append(first, times))
        flow = solve_ivp(velocity, (clock[0], clock[-1]), margin.ravel(), "DOP853", clock[1:], rtol=1e-8, atol=1e-8)
        if not flow.success:
            raise RuntimeError(
                f"the flow of {loss} from step {first} to {times[-1]} was not integrated: {flow.message}")
        return flow.y.T.reshape(-1, *margin.shape)

    def norms(self, margins: np.ndarray) -> np.ndarray:
        """|theta - theta_init| in the norm of X^T X: (E, C, n) -> (E, C)."""
        return np.sqrt(((margins - self.margin_0)**2).sum(-1))


def follow(problems: Problems, loss: str, times: np.ndarray) -> np.ndarray:
    """Margins at `times` (E,), whole numbers up to LAST: made step by step to EXACT, along the flow beyond."""
    early = times[times <= EXACT]
    margins = problems.steps(loss, np.append(early, EXACT) if early[-1] < EXACT else early)
    late = problems.skip(loss, margins[-1], EXACT, times[times > EXACT])
    return np.concatenate([margins[:len(early)], late])


def configurations() -> list[dict]:
    """The base and every sweep, each once."""
    found = [dict(BASE)]
    for key, values in SWEEPS.items():
        found += [{**BASE, key: value} for value in values if value != BASE[key]]
    return found


def flow_deviation(problems: Problems, loss: str, times: np.ndarray, margins: np.ndarray) -> tuple[float, float]:
    """Orthogonal rows: the largest |iterate - flow|, and the largest ratio to its bound a TV(log f) max f (must be <=
    1)."""
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
    """Gradient ascent diverges linearly, NPO logarithmically, with the theorem's powers of n_f, eta and beta."""
    found = configurations()
    nearly = Problems([(*signed_gram(c["n_f"], c["d"], seed), c) for c in found])
    orthogonal = Problems([(*signed_gram(c["n_f"], c["d"], seed, correlation=0.0), c) for c in found])
    times = np.unique(np.concatenate([np.geomspace(1, EXACT, 25), np.geomspace(EXACT, LAST, 25)]).round().astype(int))
    margins = {loss: follow(nearly, loss, times) for loss in ("ga", "npo")}
    norms = {loss: nearly.norms(margins[loss]) for loss in margins}
    return (flow_verdicts(orthogonal) + skip_verdicts(nearly) + rate_verdicts(nearly, found, times, norms)
            + constant_verdicts(found, times, norms), {"configurations": found, "times": times, **norms})


def flow_verdicts(orthogonal: Problems) -> list:
    times, result = np.unique(np.geomspace(1, CHECKED, 30).round().astype(int)), []
    for loss, formula in (("ga", "K - LambertW(e^K)"), ("npo", "the quadrature")):
        largest, worst = flow_deviation(orthogonal, loss, times, orthogonal.steps(loss, times))
        result.append(verdict(
            f"Theorem 2, orthogonal rows: {loss}'s iterates follow the flow ({formula}), within the derived bound",
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
        f"Skipping: beyond step {EXACT} the flow replaces the steps, with a relative error below 0.001 that falls",
        worst < 1e-3 and falls, steps=times, **gaps)]


def varied(found: list, key: str) -> list[int]:
    """The configurations of the sweep over `key`: all that is BASE but for it."""
    return [c for c, own in enumerate(found) if all(own[other] == BASE[other] for other in BASE if other != key)]


def rate_verdicts(nearly: Problems, found: list, times: np.ndarray, norms: dict) -> list:
    """Gradient ascent against n_f^(-1/2) eta t and its constant; NPO against sqrt(n_f) log(t)/beta and its constant."""
    n_f, eta, beta = (np.array([own[key] for own in found]) for key in ("n_f", "eta", "beta"))
    constants = norms["ga"] / ga_rate(n_f, eta, times[:, None])
    late_constants = constants[-1] / np.array([ga_constant(S) for S, _, _ in nearly.problems])
    low, high = NORMS[0]**2 * expit(-B_THETA * NORMS[1]) - C_0, NORMS[1]**2 + C_0  # row sums, f in [sigmoid(-|m_0|), 1]
    linear = verdict(
        "Theorem 2: gradient ascent's distance is C n_f^(-1/2) eta t, C bounded for all t >= 1, late as predicted",
        close(late_constants, 1, 0.01) and low <= constants.min() and constants.max() <= high, C_1=constants.min(),
        C_2=constants.max(), bounds=[low, high], late_over_predicted=[late_constants.min(), late_constants.max()])
    late = times >= LAST // 10
    first, last = times[late][[0, -1]]
    slope = np.array([np.polyfit(np.log(times[late]), norms["npo"][late, c], 1)[0] for c in range(len(found))])
    rise = npo_rate(n_f, eta, beta, last, 1e3) - npo_rate(n_f, eta, beta, first, 1e3)  # late, whatever the constant
    slope_ratio = slope / (rise / np.log(last / first))
    logarithmic = verdict(
        "Theorem 2: NPO's distance grows by sqrt(n_f)/beta per unit of log t", close(slope_ratio, 1, 0.03),
        measured_over_predicted_slope=[slope_ratio.min(), slope_ratio.max()])
    tail = [npo_tail(S, margin, own["eta"], own["beta"], times[late]) for S, margin, own in nearly.problems]
    tail_ratio = norms["npo"][late] / np.array(tail).T
    constant = verdict("Theorem 2: NPO's late distance is the predicted one, constant included",
                       close(tail_ratio, 1, 0.01), measured_over_predicted=[tail_ratio.min(), tail_ratio.max()])
    measured = {"ga": norms["ga"][-1], "npo": norms["npo"][-1], "slope of npo": slope}
    powers = {}
    for what, key, power in (("ga", "n_f", -0.5), ("ga", "eta", 1), ("ga", "d", 0), ("npo", "d", 0),
                             ("slope of npo", "n_f", 0.5), ("slope of npo", "beta", -1)):
        sweep = varied(found, key)
        powers[f"{what} in {key}"] = [exponent(measured[what][sweep], np.array([found[c][key] for c in sweep])), power]
    theorems = verdict("Theorem 2: the powers of n_f, eta, beta and d are the theorem's",
                       all(abs(fitted - power) < 0.03 for fitted, power in powers.values()),
                       fitted_and_predicted=powers)
    return [linear, logarithmic, constant, theorems]


def constant_verdicts(found: list, times: np.ndarray, norms: dict) -> list:
    """C_1..C_3 of NPO's bound: C_1 = 1/beta; C_2 and C_3 least and greatest c for which npo_rate is the distance."""
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
                    late_power_in_t=[min(in_t), max(in_t)], fitted=fitted)]


def outside_the_regime(seed: int) -> dict:
    """No verdict: correlated rows; and more samples than dimensions, where random labels are in each other's way."""
    rng, settings = np.random.default_rng(seed + 1), {"eta": 0.5, "beta": 1.0}
    correlated = (0.3 * rng.standard_normal((16, 128)) + 0.95) / math.sqrt(128)  # unit rows, 0.9 of their length shared
    cases = {"within: n_f = 16, d = 128": signed_gram(16, 128, seed),
             "strongly correlated rows": with_labels(correlated, rng),
             "n_f = 64 > d = 16": with_labels(rng.standard_normal((64, 16)) / 4, rng)}
    problems = Problems([(*case, settings) for case in cases.values()])
    times = np.unique(np.concatenate([np.geomspace(1, EXACT, 20), np.geomspace(EXACT, LAST, 20)]).round().astype(int))
    norms = {loss: problems.norms(follow(problems, loss, times)) for loss in ("ga", "npo")}
    late = times >= LAST // 10
    result = {}
    for c, name in enumerate(cases):
        slope = np.polyfit(np.log(times[late]), norms["npo"][late, c], 1)[0]
        result[name] = {"times": times, "ga": norms["ga"][:, c], "npo": norms["npo"][:, c],
                        "ga_power_in_t": exponent(norms["ga"][late, c], times[late]),
                        "npo_slope_over_predicted": slope / problems.sizes[c]**0.5}
    return result


def draw_theorem2(path: Path, curves: dict, outside: dict):
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    found, times = curves["configurations"], curves["times"]
    markers, shades = "osD^vP", ("0", "0.2", "0.35", "0.5", "0.6", "0.7")
    for column, key in enumerate(("n_f", "eta")):
        linear, logarithmic = axes[:, column]
        for c, marker, shade in zip(sorted(varied(found, key), key=lambda c: found[c][key]), markers, shades):
            own, style = found[c], {"color": shade, "markersize": 3, "label": f"{key} = {found[c][key]:g}"}
            scale, late_c = own["beta"] / own["n_f"]**0.5, implied_c(own, times, curves["npo"][:, c])[-1]
            theory = npo_rate(own["n_f"], own["eta"], own["beta"], times, late_c)
            linear.loglog(times, curves["ga"][:, c] / ga_rate(own["n_f"], own["eta"], times), marker + "-", **style)
            logarithmic.semilogx(times, curves["npo"][:, c] * scale, marker, **style)
            logarithmic.semilogx(times, theory * scale, "-", color=shade, linewidth=0.8)
        linear.set(title=f"GA: distance / ($n_f^{{-1/2}}\\eta t$), {key} varied", xlabel="t", ylim=(0.3, 2))
        logarithmic.set(title=f"NPO: distance $\\cdot\\beta/\\sqrt{{n_f}}$, {key} varied;\n"
                        "lines: log(c $\\eta t/n_f$ + 1), late c", xlabel="t")
    for (name, case), dashes, shade in zip(outside.items(), ("-", "--", ":"), ("0", "#d1495b", "0.45")):
        axes[0, 2].loglog(case["times"], case["ga"], dashes, color=shade, label=name)
        axes[1, 2].semilogx(case["times"], case["npo"], dashes, color=shade, label=name)
    axes[0, 2].set(title="outside the regime: GA's distance (no verdict)", xlabel="t")
    axes[1, 2].set(title="outside the regime: NPO's distance (no verdict)", xlabel="t")
    finish(figure, axes.ravel(), path)


def implied_c(settings: dict, times: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """The c(t) for which npo_rate is the measured norm: the theorem's C_2 and C_3 are its least and greatest value."""
    return np.expm1(settings["beta"] * norm / settings["n_f"]**0.5) * settings["n_f"] / (settings["eta"] * times)


# ------------------------------------------------------------------------------------------- 4. divergence rates


def divergence_rates(curves: dict) -> tuple[list, dict]:
    """Gradient ascent's power of t tends to 1, and exp(beta distance/sqrt(n_f))'s for NPO: exponentially slower."""
    found, times = curves["configurations"], curves["times"]
    chosen = sorted(varied(found, "beta"), key=lambda c: found[c]["beta"])
    late = times >= LAST // 10
    power = exponent(curves["ga"][late, chosen[0]], times[late])
    rows, measured = {}, {"times": times, "ga": curves["ga"][:, chosen[0]]}
    for c in chosen:
        beta, npo = found[c]["beta"], curves["npo"][:, c]
        measured[f"npo, beta={beta:g}"] = npo
        rows[f"beta={beta:g}"] = {
            "power_of_exp_distance": exponent(np.exp(beta * npo[late] / BASE["n_f"]**0.5), times[late]),
            "local_power": exponent(npo[late], times[late]),
            "ga_over_npo_at_the_end": curves["ga"][-1, c] / max(npo[-1], 1e-300)}
    slower = all(abs(row["power_of_exp_distance"] - 1) < 0.03 and row["local_power"] < 0.2 for row in rows.values())
    return [verdict("Divergence rates: gradient ascent is linear in t; NPO exponentially slower, for every beta",
                    abs(power - 1) < 0.01 and slower, ga_power=power, npo=rows)], measured


def draw_divergence(path: Path, measured: dict):
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    times = measured["times"]
    shades, marks = ("#d1495b", "0", "0.25", "0.45", "0.6"), "^osDv"
    for (name, norm), shade, marker in zip(((k, v) for k, v in measured.items() if k != "times"), shades, marks):
        if name == "ga":
            rate, label = ga_rate(BASE["n_f"], BASE["eta"], times), "GA"
            bounds = [rate * constant for constant in ((norm / rate).min(), (norm / rate).max())]
        else:
            beta = float(name.partition("=")[2])
            c, label = implied_c({**BASE, "beta": beta}, times, norm), f"NPO, $\\beta$ = {beta:g}"
            bounds = [npo_rate(BASE["n_f"], BASE["eta"], beta, times, constant) for constant in (c.min(), c.max())]
        for axis in axes:
            axis.fill_between(times, *bounds, color=shade, alpha=0.12, linewidth=0)
            for bound in bounds:
                axis.plot(times, bound, "-", color=shade, linewidth=0.8)
            axis.plot(times, norm, marker, color=shade, markersize=4, label=label)
    axes[0].set(title="linear time: GA leaves at constant speed", xlim=(0, 2000), ylim=(0, 80))
    axes[1].set(title="logarithmic time: NPO's lines are straight", xscale="log", ylim=(0, 200))
    axes[2].set(title="both logarithmic", xscale="log", yscale="log")
    axes[0].set_ylabel("|$\\theta^{(t)} - \\theta_{init}$| in $X^TX$\nlines: the theorem's two bounds")
    for axis in axes:
        axis.set_xlabel("t")
    finish(figure, axes, path)


# ----------------------------------------------------------------------------------- 5. the linear-softmax example


def softmax_example(generator) -> tuple[list, dict]:
    """Section 2.1: pi = softmax(theta x). Unlearned, GA's gradient in theta_y is (1 - pi_y) x, and NPO's W times it."""
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
            loss = losses.npo_loss(policy_logps, reference_logps, beta) if beta else losses.ga_loss(policy_logps)
            rows[name].append(gradient(loss, theta)[label].norm().item() / x.norm().item())
        logps.append(policy_logps.item())
    late, logps = depths >= 20, np.array(logps)
    slopes = {}
    for beta in BETAS:  # of the log gradient in log pi
        log_gradient = np.log(np.array(rows[f"npo, beta={beta:g}"])[late] + 1e-300)
        slopes[f"beta={beta:g}"] = np.polyfit(logps[late], log_gradient, 1)[0] / beta
    ga = np.array(rows["ga"])[late]
    return [verdict("Section 2.1: on an unlearned sample GA's gradient keeps the scale |x|, NPO's falls as pi^beta",
                    close(ga, 1, 1e-6) and close(list(slopes.values()), 1, 0.01), ga_over_x=[ga.min(), ga.max()],
                    npo_exponent_over_beta=slopes)], {"log_probability": logps, **rows}


def draw_softmax(path: Path, curves: dict):
    figure, axis = plt.subplots(figsize=(6.5, 4.3), layout="constrained")
    for (name, row), dashes, shade in zip(((k, v) for k, v in curves.items() if k != "log_probability"),
                                          ("-", "-", "--", "-.", ":"), ("#d1495b", "0", "0.25", "0.45", "0.6")):
        axis.semilogy(curves["log_probability"], row, dashes, color=shade, marker="^" if name == "ga" else None,
                      markevery=5, label=name)
    axis.set(title="gradient in $\\theta_y$ / |x| as the sample is unlearned", xlabel="log $\\pi_\\theta$(y|x)",
             ylim=(1e-16, 3))
    axis.invert_xaxis()
    finish(figure, [axis], path)


# -------------------------------------------------------------------------------------------------- putting it down


def finish(figure, axes, path: Path):
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plain(value):
    """JSON values of six significant digits; infinities as the strings "inf" and "-inf"."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return str(float(value)) if math.isinf(value) else float(f"{value:.6g}")
    return value.item() if isinstance(value, np.generic) else value


def provenance(seed: int, seconds: float) -> dict:
    def git(*command):
        done = subprocess.run(["git", *command], cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    changed = git("status", "--porcelain", "--", "theory_check.py", "losses.py")
    return {"command": f"python theory_check.py --seed {seed}",
            "commit": git("rev-parse", "HEAD") + ("+changes" if changed else ""), "seconds": round(seconds, 1),
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "scipy": scipy.__version__, "machine": platform.machine()}


def describe(verdicts: list, outside: dict, record: dict) -> str:
    """The page: every verdict with its numbers, and the cases without one."""
    lines = ["# Section 3, checked", "", f"`{record['command']}`, {record['seconds']} s.", "",
             "| | claim | measured (and predicted) |", "|---|---|---|"]
    for item in verdicts:
        told = [f"{key} {json.dumps(value).replace('|', '/')}" for key, value in plain(item["numbers"]).items()]
        claim = item["claim"].replace("|", "/")
        lines.append(f"| {'holds' if item['holds'] else '**fails**'} | {claim} | {'; '.join(told)} |")
    lines += ["", "Outside Theorem 2's regime, no verdict (eta 0.5, beta 1, last decade of t):", "",
              "| rows | GA: power of t (1 within) | NPO: slope in log t over sqrt(n_f)/beta (1 within) |",
              "|---|---|---|"]
    for name, case in outside.items():
        lines.append(f"| {name} | {case['ga_power_in_t']:.3f} | {case['npo_slope_over_predicted']:.3f} |")
    return "\n".join(lines) + "\n"


def check(out: Path | None, seed: int = 0) -> list:
    """All five items: their verdicts. With `out`, pictures, a page and JSON too."""
    began, generator = time.time(), torch.Generator().manual_seed(seed)
    with tqdm(total=6, ncols=100, file=sys.stderr) as progress:
        def item(what, function, *given):
            progress.set_description(what)
            result = function(*given)
            progress.update()
            return result

        first, proposition_curves = item("Proposition 1", proposition1, generator)
        second, weight_curves = item("Equation 5", equation5, generator)
        third, theorem_curves = item("Theorem 2", theorem2, seed)
        outside = item("outside its regime", outside_the_regime, seed)
        fourth, rates = item("divergence rates", divergence_rates, theorem_curves)
        fifth, softmax_curves = item("linear softmax", softmax_example, generator)
    verdicts = first + second + third + fourth + fifth
    if out:
        draw_proposition1(out / "proposition1.png", proposition_curves)
        draw_equation5(out / "equation5.png", weight_curves)
        draw_theorem2(out / "theorem2.png", theorem_curves, outside)
        draw_divergence(out / "divergence_rates.png", rates)
        draw_softmax(out / "linear_softmax.png", softmax_curves)
        record = provenance(seed, time.time() - began)
        (out / "theory.md").write_text(describe(verdicts, outside, record))
        curves = {"proposition1": proposition_curves, "equation5": weight_curves, "theorem2": theorem_curves,
                  "outside": outside, "softmax": softmax_curves}
        content = {"verdicts": verdicts, "provenance": record, "curves": curves}
        aside = out / "theory_check.json.part"
        aside.write_text(json.dumps(plain(content), allow_nan=False, separators=(",", ":")) + "\n")
        aside.replace(out / "theory_check.json")
    return verdicts


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one sentence, without the usage block
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list) -> int:
    parser = Parser(prog="theory_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of models, rows and starting points (default 0)")
    parser.add_argument("--out", type=Path, default=Path("results/theory"),
                        help="folder for JSON, pictures and a page (default results/theory)")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed {args.seed} given, a whole number of at least 0 needed")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / ".probe").touch()
        (args.out / ".probe").unlink()
    except OSError as error:
        parser.error(f"--out {args.out} cannot be written ({error.strerror}), type --out and a folder that can")
    began = time.time()
    verdicts = check(args.out, args.seed)
    for result in verdicts:
        print(f"{'holds' if result['holds'] else 'FAILS'}  {result['claim']}")
        for key, value in plain(result["numbers"]).items():
            print(f"         {key}: {json.dumps(value)}")
    failed = sum(not result["holds"] for result in verdicts)
    print(f"{len(verdicts) - failed} of {len(verdicts)} hold, {time.time() - began:.1f} s; written: {args.out}/"
          "theory_check.json, theory.md and pictures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
