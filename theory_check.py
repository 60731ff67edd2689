"""Section 3 of the NPO paper as checks that can fail: Proposition 1, Eq. 5, Theorem 2, Section 2.1's example.

    python theory_check.py      # JSON, page, pictures in runs/theory; exit status 1 if a verdict fails

Each check measures with the functions of `losses.py` (by autograd) and predicts with the formulas below, so a
mistake in a loss turns a verdict. Theorem 2 is checked in its regime (n_f <= d, nearly orthogonal rows,
bounded norms, eta <= 1), up to a million steps. The critical retain weight (part 5) is ours and not the
paper's: docs/critical_weight.md has its proof.

Below Eq. 3 the paper prints both gradients with a minus sign. With L_GA = E log pi_theta (Eq. 1) they are
+E grad log pi and +E W grad log pi. Theorem 2's constants are not in the paper; they are derived here.
"""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from scipy.linalg import block_diag
from scipy.optimize import linprog, minimize
from scipy.sparse import csr_matrix
from tqdm import tqdm

import losses
from common import Parser, environment, positive, run_command
from data.synthetic_instances import PUBLISHED_SEEDS, published_instance
from study.report import draw, make_folder, verdict, write

# Shapes: C configurations (problems of Theorem 2), n samples in all of them together, E recorded times.
DTYPE = torch.float64
BETAS = (0.2, 0.5, 1.0, 2.0)
LAST = 10**6  # steps for which the theorem is followed
EXACT = 1000  # steps that are really made; then the flow replaces them
# Configurations of Theorem 2: the base, with one quantity changed at a time
BASE = {"n_f": 16, "d": 128, "eta": 0.5, "beta": 1.0}
SWEEPS = {"n_f": (2, 4, 8, 16, 32, 64), "eta": (0.05, 0.1, 0.25, 0.5, 1.0), "beta": BETAS,
          "d": (64, 128, 256, 512)}
B_THETA, NORMS, C_0 = 1.0, (0.8, 1.2), 0.1  # |theta_init|, the range of |x_i|, and n_f * max |<x_i, x_j>|
LOG_RATIO = "log $\\pi_\\theta/\\pi_{ref}$"
STYLES = {"GA": {"color": "tab:red"}, **{f"_{b:g}": {"color": "0.3", "linestyle": "--"} for b in BETAS},
          **{f"W = {w:g}": {"color": "black", "linestyle": "", "marker": "o"} for w in (0.01, 0.5)}}


# --------------------------------------------------------------------------------- what the theory predicts
def npo_weight(log_ratio, beta):
    """Equation 5's W = 2 pi^beta / (pi^beta + pi_ref^beta) in (0, 2): 1 at the start, 0 once unlearned."""
    return 2 / (1 + torch.exp(-beta * log_ratio))


def ga_rate(n_f, eta, t):
    """Theorem 2's distance of gradient ascent after t steps, up to a constant: n_f^(-1/2) eta t."""
    return n_f**-0.5 * eta * t


def npo_rate(n_f, eta, beta, t, c):
    """Theorem 2's distance of NPO after t steps: sqrt(n_f) log(c eta t / n_f + 1) / beta."""
    return n_f**0.5 * np.log(c * eta * t / n_f + 1) / beta


# The margin m_i = +-<x_i, theta> has the label's sign, so log pi(y_i|x_i) = log sigmoid(m_i). With S the Gram
# matrix of the signed rows, a step on the mean loss moves the margins by m <- m - (eta/n_f) S f(m), where f =
# sigmoid(-m) for gradient ascent and W sigmoid(-m) for NPO. |theta - theta_init| in the norm of X^T X is the
# Euclidean norm of the margins' change. Late in the run, with v = sigmoid(m) -> e^m:
#   GA: f -> 1, the change is (eta t/n_f) S 1, and |theta - theta_init| / (n_f^(-1/2) eta t) -> the rms of the
#       row sums.
#   NPO: f -> W -> 2 (v/v_0)^beta. Every margin falls as (1/beta) log t, so S f = n_f/(beta eta t) 1 and
#       -beta m_i = log(2 beta eta t / n_f) - log (S^-1 1)_i - beta log v_0,i.


def npo_tail(S: np.ndarray, margin_0: np.ndarray, eta: float, beta: float, t: np.ndarray) -> np.ndarray:
    """The late norm |theta_NPO - theta_init| at times t (E,), from the change of the margins above."""
    share = np.linalg.solve(S, np.ones(len(S)))
    change = np.log(2 * beta * eta * t[:, None] / (len(S) * share)) / beta + np.logaddexp(0, margin_0)
    return np.sqrt((change**2).sum(1))


# ------------------------------------------------------------------------------------------------ measuring
def gradient(loss: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """d(sum of loss)/d parameters; 0 if the loss does not depend on them, so that its check fails."""
    return torch.autograd.grad(loss.sum() + 0 * parameters.sum(), parameters, retain_graph=True)[0]


def ends(values) -> list:
    """Least and greatest. NumPy keeps a NaN among the values, Python's min may skip it."""
    return [np.min(values), np.max(values)]


# ----------------------------------------------------------------------------------------- 1. Proposition 1
def proposition1(generator) -> list:
    """L_NPO - (2/beta) log 2 -> L_GA - E log pi_ref with error beta E[r^2]/4, r = log pi/pi_ref, and the
    gradients likewise: on a two-layer tanh network with five classes.

    Why: L_NPO = (2/beta) E log(1 + e^(beta r)), and log(1 + e^u) = log 2 + u/2 + u^2/8 + O(u^4). The 1/beta
    term is (2/beta) log 2, the constant one E r = L_GA - E log pi_ref, the next beta E[r^2]/4. There is no
    beta^2 term.
    """
    x, y = torch.randn(64, 12, generator=generator, dtype=DTYPE), torch.randint(5, (64,), generator=generator)

    def logps(parameters):
        w1, b1, w2, b2 = parameters.split([12 * 24, 24, 24 * 5, 5])
        return losses.token_logps((x @ w1.view(12, 24) + b1).tanh() @ w2.view(24, 5) + b2, y)

    reference = torch.randn(437, generator=generator, dtype=DTYPE) / 3
    noise = torch.randn(reference.shape, generator=generator, dtype=DTYPE)
    policy = (reference + 0.5 * reference.std() * noise).requires_grad_()
    ga, slope = losses.ga_loss(logps(policy)).mean(), ((logps(policy) - logps(reference))**2).mean() / 4
    ga_gradient, slope_gradient = gradient(ga, policy), gradient(slope, policy)
    errors, gradient_gaps = [], []
    for beta in np.geomspace(0.1, 1e-3, 9):
        npo = losses.npo_loss(logps(policy), logps(reference), beta).mean()
        limit = 2 / beta * math.log(2) + ga - logps(reference).mean()
        errors.append((npo - limit).item() / beta)
        gap = (gradient(npo, policy) - ga_gradient) / beta - slope_gradient
        gradient_gaps.append((gap.norm() / slope_gradient.norm()).item())
    return [verdict("Proposition 1: the loss tends to gradient ascent's, error beta E[r^2]/4",
                    np.allclose(errors, slope.item(), rtol=0.01, atol=0), error_over_beta=ends(errors),
                    predicted=slope.item()),
            verdict("Proposition 1: so do the gradients, error beta times that of E[r^2]/4",
                    np.max(gradient_gaps) < 0.01, relative_deviation=ends(gradient_gaps))]


# -------------------------------------------------------------------------------------------- 2. Equation 5
def two_rates() -> dict:
    """One answer that loses u nats at the rate du/dt = eta W, W = 2/(1 + e^(beta u)). The integral is beta u
    + e^(beta u) - 1 = 2 beta eta t. So u is eta t at first, as for gradient ascent, and (1/beta) log(2 beta
    eta t) late. W is measured on `npo_loss`, by autograd."""
    eta, gaps = 0.5, []
    for beta in BETAS:
        def rate(t, u, beta=beta):
            policy_logps = torch.tensor(-u, dtype=DTYPE, requires_grad=True)
            loss = losses.npo_loss(policy_logps, torch.zeros_like(policy_logps), beta)
            return eta * gradient(loss, policy_logps).numpy()

        t = np.geomspace(0.01, 1e4, 50)
        u = solve_ivp(rate, (0, t[-1]), [0.0], "LSODA", t, rtol=1e-10, atol=1e-12).y[0]
        gaps.append(np.max(np.abs((beta * u + np.expm1(beta * u)) / (2 * beta * eta * t) - 1)))
    return verdict("Two rates: beta u + e^(beta u) - 1 = 2 beta eta t for one answer's lost nats u",
                   np.max(gaps) < 1e-6, largest_relative_gap=np.max(gaps))


def equation5(generator) -> tuple[list, list]:
    """NPO's gradient is GA's times W, and its loss is bounded below. Returns verdicts and panels."""
    weights, curves = {}, {}
    reference_logps, gaps, least = -torch.rand(401, generator=generator, dtype=DTYPE) * 20, [], []
    far = torch.linspace(-1e4, 0, 101, dtype=DTYPE)
    for beta in BETAS:
        log_ratio = torch.linspace(-30 / beta, 30 / beta, 401, dtype=DTYPE)  # contains 0, the start
        policy_logps = (reference_logps + log_ratio).requires_grad_()
        loss = losses.npo_loss(policy_logps, reference_logps, beta)
        measured = gradient(loss, policy_logps) / gradient(losses.ga_loss(policy_logps), policy_logps)
        for weight in (measured, losses.npo_weight(policy_logps, reference_logps, beta)):
            gaps.append((weight / npo_weight(log_ratio, beta) - 1).abs().max().item())
        least.append(losses.npo_loss(far, torch.zeros_like(far), beta).min().item() + 0.0)  # -0.0 is 0
        shown, name = (log_ratio >= -15) & (log_ratio <= 2), f"NPO, $\\beta$ = {beta:g}"
        weights[name], curves[name] = ((log_ratio[shown], y.detach()[shown]) for y in (measured, loss))
    ga = losses.ga_loss(far).min().item()
    weights["GA"], curves["GA"] = ([-15, 2], [1, 1]), ([-15, 2], [-15, 2])
    for w in (0.01, 0.5):
        weights[f"W = {w:g}"] = [-math.log(2 / w - 1) / beta for beta in BETAS], [w] * len(BETAS)
    return [
        verdict("Equation 5: NPO's gradient is gradient ascent's times W = 2 pi^beta/(pi^beta + pi_ref^beta)",
                np.max(gaps) < 1e-10, largest_relative_gap=np.max(gaps)),
        verdict("Equation 3: NPO's loss is bounded below by 0; gradient ascent's is not",
                0 <= np.min(least) < 1e-6 and ga == far.min(),
                least_npo_loss=np.min(least), least_ga_loss=ga),
    ], [({"title": "gradient over GA's gradient: W", "xlabel": LOG_RATIO, "xlim": (-15, 4.5)}, weights),
        ({"title": "loss, nats", "xlabel": LOG_RATIO, "xlim": (-15, 4.5)}, curves)]


# --------------------------------------------------------------------------------------------- 3. Theorem 2
def signed_gram(n_f: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The Gram matrix (n_f, n_f) of signed rows, with norms in NORMS and products up to C_0/n_f, and the
    initial margins (n_f,). There is one draw for each (n_f, d).

    X = L Q with L L^T the Gram matrix and Q orthonormal rows of length d, so n_f <= d. The norms are spread
    evenly, so that a sweep over n_f changes n_f alone.
    """
    rng = np.random.default_rng([seed, n_f, d])
    noise = np.triu(rng.uniform(-1, 1, (n_f, n_f)), 1) * C_0 / n_f
    norms = rng.permutation(np.linspace(*NORMS, 2 * n_f + 1)[1::2])
    L = np.linalg.cholesky(np.diag(norms**2) + noise + noise.T)
    X, theta = L @ np.linalg.qr(rng.standard_normal((d, n_f)))[0].T, rng.standard_normal(d)
    signed = X * rng.choice([-1.0, 1.0], n_f)[:, None]
    return signed @ signed.T, signed @ theta * B_THETA / np.linalg.norm(theta)


class Problems:
    """C problems side by side: (S, margin_0) in `grams`, eta and beta (C,). All samples (n,) move at once."""

    def __init__(self, grams: list, eta: np.ndarray, beta: np.ndarray):
        n_f = np.array([len(margin) for _, margin in grams])
        self.S = block_diag(*[S for S, _ in grams])
        self.margin_0 = np.concatenate([margin for _, margin in grams])
        self.first = np.cumsum(n_f) - n_f  # index of each problem's first sample
        self.rate, self.beta = np.repeat(eta / n_f, n_f), torch.from_numpy(np.repeat(beta, n_f))

    def velocity(self, margin: np.ndarray, loss: str) -> np.ndarray:
        """-(change of the margins in a step), (n,): (eta/n_f) S dL/dmargin, the slope by autograd."""
        margins, beta = torch.from_numpy(margin).requires_grad_(), self.beta
        value = losses.ga_loss(F.logsigmoid(margins))
        if loss == "npo":  # beta inside and 1/beta outside is the same loss: one call for all beta
            reference_logps = F.logsigmoid(torch.from_numpy(self.margin_0))
            value = losses.npo_loss(beta * F.logsigmoid(margins), beta * reference_logps, 1.0) / beta
        return self.rate * (self.S @ gradient(value, margins).numpy())

    def steps(self, loss: str, times: np.ndarray) -> np.ndarray:
        """Gradient descent, step by step: margins at the steps `times`, (E, n)."""
        margin, margins = self.margin_0.copy(), []
        for step in tqdm(range(1, times[-1] + 1), f"{loss}, step by step", ncols=100, leave=False):
            margin -= self.velocity(margin, loss)
            if step in times:
                margins.append(margin.copy())
        return np.stack(margins)

    def follow(self, loss: str, times: np.ndarray) -> np.ndarray:
        """|theta - theta_init| at the steps `times` (E,): (E, C). Step by step to EXACT, then along the flow.

        The flow dm/dt = -velocity is smooth in the clock log t. Steps deviate from it early in the run, where
        they are really made. Up to step 8000, the later deviation is below 1e-4 of the distance (a test).
        """
        early, late = times[times <= EXACT], times[times > EXACT]
        margins, clock = self.steps(loss, np.union1d(early, EXACT)), np.log([EXACT, *late])
        flow = solve_ivp(lambda log_t, margin: -math.exp(log_t) * self.velocity(margin, loss), clock[[0, -1]],
                         margins[-1], "DOP853", clock[1:], rtol=1e-8, atol=1e-8)
        return self.norms(np.concatenate([margins[:len(early)], flow.y.T]))

    def norms(self, margins: np.ndarray) -> np.ndarray:
        """|theta - theta_init| in the norm of X^T X: (E, n) -> (E, C)."""
        return np.sqrt(np.add.reduceat((margins - self.margin_0)**2, self.first, axis=1))


def theorem2(seed: int) -> tuple[list, list]:
    """Gradient ascent diverges linearly, NPO logarithmically, with the theorem's powers of n_f, eta, beta, d.

    The distances (E, C) are compared with `ga_rate` and `npo_rate`. The theorem's C_1 is 1/beta, and C_2 and
    C_3 are the least and the greatest c. Returns verdicts and panels.
    """
    rows = [{**BASE, key: value, "sweep": key} for key, values in SWEEPS.items() for value in values]
    n_f, eta, beta, sweep = (np.array([row[key] for row in rows]) for key in ("n_f", "eta", "beta", "sweep"))
    grams = [signed_gram(row["n_f"], row["d"], seed) for row in rows]
    problems = Problems(grams, eta, beta)
    times = np.unique(np.geomspace([1, EXACT], [EXACT, LAST], 25).round().astype(int))  # even in log t
    t, late = times[:, None], times >= LAST // 10  # the last decade
    ga, npo = (problems.follow(loss, times) for loss in ("ga", "npo"))
    C, c = ga / ga_rate(n_f, eta, t), np.expm1(beta * npo / n_f**0.5) * n_f / (eta * t)

    late_C = C[late] / [np.sqrt(np.mean(S.sum(1)**2)) for S, _ in grams]
    # row sums times f, which is in [sigmoid(-|m_0|), 1]
    low, high = NORMS[0]**2 / (1 + math.exp(B_THETA * NORMS[1])) - C_0, NORMS[1]**2 + C_0
    rise, predicted_rise = (np.ptp(distances[late], axis=0)  # late, the value of c does not matter
                            for distances in (npo, npo_rate(n_f, eta, beta, t, 1)))
    tail = [npo_tail(*gram, *rate, times[late]) for gram, *rate in zip(grams, eta, beta, strict=True)]
    tail_ratio = npo[late] / np.array(tail).T
    bounds = {f"beta={value:g}": [1 / value, *ends(c[:, beta == value])] for value in BETAS}
    verdicts = [
        verdict("Theorem 2: gradient ascent's distance is C n_f^(-1/2) eta t, C bounded, late as predicted",
                np.allclose(late_C, 1, rtol=0.01, atol=0) and low <= C.min() and C.max() <= high,
                C_1=C.min(), C_2=C.max(), bounds=[low, high], late_over_predicted=ends(late_C)),
        verdict("Theorem 2: NPO's distance grows by sqrt(n_f)/beta per unit of log t",
                np.allclose(rise, predicted_rise, rtol=0.03, atol=0), C_1_to_C_3=bounds,
                measured_over_predicted=ends(rise / predicted_rise)),
        verdict("Theorem 2: NPO's late distance is the predicted one, constant included",
                np.allclose(tail_ratio, 1, rtol=0.01, atol=0), measured_over_predicted=ends(tail_ratio))]

    over_beta = np.flatnonzero(sweep == "beta")
    curves = {f"NPO, $\\beta$ = {beta[at]:g}": (times, npo[:, at]) for at in over_beta}
    curves["GA"], formula = (times, ga[:, over_beta[0]]), times[times >= EXACT]
    for at in over_beta:
        curves[f"_{beta[at]:g}"] = formula, npo_tail(*grams[at], eta[at], beta[at], formula)
    axes = {"xlabel": "steps t", "ylabel": "size of $X(\\theta^{(t)} - \\theta_{init})$", "yscale": "log"}
    return verdicts, [({**axes, "title": "dashed: the derived late distance", "xscale": "log"}, curves)]


# ---------------------------------------------------------------------------- 4. the linear-softmax example
def softmax_example(generator) -> dict:
    """Section 2.1, pi = softmax(theta x): GA's gradient in theta_y is (1 - pi_y) x, NPO's is W times that."""
    x = torch.randn(8, generator=generator, dtype=DTYPE)
    start = torch.randn(5, 8, generator=generator, dtype=DTYPE) * 0.1
    depths, labels = torch.linspace(0, 40, 41, dtype=DTYPE), torch.full((41,), 2)
    theta = start.repeat(41, 1, 1)  # the label's logit pushed down by `depths`, nats
    theta[:, 2] -= depths[:, None] * x / (x @ x)
    policy_logps = losses.token_logps(theta.requires_grad_() @ x, labels)
    reference_logps = losses.token_logps((start @ x).expand(41, 5), labels)
    cases = {"ga": (losses.ga_loss(policy_logps), 1)}  # loss and weight
    for beta in BETAS:
        cases[f"beta={beta:g}"] = (losses.npo_loss(policy_logps, reference_logps, beta),
                                   npo_weight(policy_logps - reference_logps, beta))
    gaps = {}
    for name, (loss, weight) in cases.items():
        predicted = (weight * (1 - policy_logps.exp()))[:, None] * x
        gaps[name] = (gradient(loss, theta)[:, 2] / predicted - 1).abs().max().item()
    return verdict("Section 2.1: GA's gradient is (1 - pi_y) x while pi_y vanishes, NPO's W times it",
                   np.max([*gaps.values()]) < 1e-9, largest_relative_gap=gaps)


# ---------------------------------------------------------------------------- 5. the critical retain weight
class RetainProgram:
    """max -sum over S of v.x_f / n_f under mean_r (-v.x_r)_+ <= 1, for a set S of forget inputs: a linear
    program in v and a slack for each retain input. Inputs are signed, (n_f, d) and (n_r, d)."""

    def __init__(self, forget_inputs: np.ndarray, retain_inputs: np.ndarray):
        n_r, d = retain_inputs.shape
        self.forget, self.d = forget_inputs, d
        A = np.block([[-retain_inputs, -np.eye(n_r)], [np.zeros((1, d)), np.full((1, n_r), 1 / n_r)]])
        self.constraints = csr_matrix(A), np.r_[np.zeros(n_r), 1.0]
        self.bounds = [(None, None)] * d + [(0, None)] * n_r

    def solve(self, S) -> tuple[float, np.ndarray | None]:
        """(value, v). The value is infinite, without a v, where the program is unbounded."""
        cost = np.zeros(len(self.bounds))
        cost[:self.d] = self.forget[S].sum(0) / len(self.forget)
        result = linprog(cost, *self.constraints, bounds=self.bounds)
        return (-result.fun, result.x[:self.d]) if result.success else (math.inf, None)  # v = 0 is feasible


def critical_retain_weight(forget_inputs: np.ndarray, retain_inputs: np.ndarray) -> float:
    """The smallest retain weight for which ga+rt is bounded below in a logistic model, or infinity.

    forget_inputs (n_f, d) and retain_inputs (n_r, d) are signed: margins are inputs times theta, and log pi =
    log sigmoid(margin). Along a ray t v, L/t -> alpha mean_r (-v.x_r)_+ - mean_f (-v.x_f)_+. So ga+rt is
    unbounded for alpha below alpha* = sup_v mean_f (-v.x_f)_+ / mean_r (-v.x_r)_+, and bounded from there on
    (docs/critical_weight.md). The supremum is the largest of 2^n_f - 1 linear programs, one for each set of
    forget inputs. Raises ValueError for n_f > 16.
    """
    n_f, program = len(forget_inputs), RetainProgram(forget_inputs, retain_inputs)
    if n_f > 16:
        raise ValueError(f"{n_f} forget inputs need 2^{n_f} linear programs: at most 16 inputs")
    sets = itertools.product((False, True), repeat=n_f)
    return max(program.solve(np.array(S))[0] for S in sets)  # the empty set gives 0


def critical_weight_bound(forget_inputs: np.ndarray, retain_inputs: np.ndarray) -> float:
    """A lower bound of the critical weight for any n_f: S becomes the set that the last v makes negative,
    until it stays. Each turn raises the value."""
    program, v, last = RetainProgram(forget_inputs, retain_inputs), -forget_inputs.mean(0), -1.0
    while True:
        value, v = program.solve(forget_inputs @ v < 0)
        if value == math.inf or value <= last * (1 + 1e-9):
            return value
        last = value


def section4_weights() -> dict:
    """Figure 4's ga+rt has retain weight 1. It is below the critical weight in all published instances."""
    bounds = {}
    for alpha in (1, 0):
        for instance in map(published_instance, PUBLISHED_SEEDS):
            signs = (2 * y[:, None] - 1 for y in (instance.y_forget, instance.y_retain))
            features = map(instance.features, (instance.x_forget + alpha, instance.x_retain - alpha))
            forget, retain = map(np.multiply, signs, features)
            bounds.setdefault(f"alpha={alpha}", []).append(critical_weight_bound(forget, retain))
    return verdict("Section 4: Figure 4's retain weight, 1, is below the critical one: ga+rt is unbounded",
                   min(map(min, bounds.values())) > 1, lower_bounds_of_the_critical_weight=bounds)


RETAIN_STEPS, RETAIN_LR, LEVEL_BETAS = 4000, 1.0, (0.25, 0.5, 1.0, 2.0, 4.0)


def retain_instances(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Signed forget and retain inputs of three kinds of instances."""
    rng = np.random.default_rng([seed, 5])
    forget, retain = rng.standard_normal((4, 6)), rng.standard_normal((40, 6))
    half = np.abs(retain[:, :1])  # the first coordinate of every retain input is positive
    return {"finite": (forget, retain),
            "outside the cone": (np.c_[-np.abs(forget[:, :1]), forget[:, 1:]], np.c_[half, retain[:, 1:]]),
            "n_f + n_r <= d": (rng.standard_normal((4, 20)), rng.standard_normal((8, 20)))}


def norms_of_descent(forget: np.ndarray, retain: np.ndarray, loss: str, weights: np.ndarray) -> np.ndarray:
    """|theta| after RETAIN_STEPS and twice as many steps from 0, for each retain weight: (2, weights)."""
    forget, retain, weights = map(torch.from_numpy, (forget, retain, weights))
    theta, norms = torch.zeros(len(weights), forget.shape[1], dtype=DTYPE), []
    start = torch.full((len(weights), len(forget)), math.log(0.5), dtype=DTYPE)  # log pi_ref at theta = 0
    lr = RETAIN_LR / (1 + weights[:, None])
    for step in range(1, 2 * RETAIN_STEPS + 1):
        theta.requires_grad_()
        logps = F.logsigmoid(theta @ forget.T)
        forget_loss = losses.ga_loss(logps) if loss == "ga" else losses.npo_loss(logps, start, 1.0)
        rt = losses.nll_loss(F.logsigmoid(theta @ retain.T))
        theta = theta.detach() - lr * gradient(forget_loss.mean(1) + weights * rt.mean(1), theta)
        if step % RETAIN_STEPS == 0:
            norms.append(theta.norm(dim=1).numpy())
    return np.stack(norms)


def retain_weight(seed: int) -> dict:
    """ga+rt runs away below the critical weight and rests above it; npo+rt rests at every weight above 0."""
    holds, numbers = True, {}
    for name, (forget, retain) in retain_instances(seed).items():
        critical = critical_retain_weight(forget, retain)
        weights = np.array([0.5, 0.9, 1.1, 2.0]) * (critical if math.isfinite(critical) else 1.0)
        growth = {}
        for loss in ("ga", "npo"):
            first, second = norms_of_descent(forget, retain, loss, weights)
            growth[loss] = second / first  # 2 along a ray, 1 at rest
        runs_away = growth["ga"] > 1.5
        holds &= (np.array_equal(runs_away, weights < critical) and (growth["npo"] < 1.5).all()
                  and math.isfinite(critical) == (name == "finite"))
        numbers[name] = {"critical_weight": critical, "weights": weights,
                         **{f"{loss}_growth": values for loss, values in growth.items()}}
    return verdict("Critical retain weight: ga+rt runs away below it, rests above it; npo+rt never runs away",
                   bool(holds), **numbers)


def level(seed: int) -> dict:
    """Where npo+rt rests, W g_f = alpha g_r: nats u that a forget answer has lost there, in the instance with
    a finite critical weight, alpha 1. If W did not depend on beta, beta u would not either."""
    forget, retain = map(torch.from_numpy, retain_instances(seed)["finite"])
    start, products, weights = torch.full((len(forget),), math.log(0.5), dtype=DTYPE), {}, {}
    for beta in LEVEL_BETAS:
        def objective(theta, beta=beta):
            theta = torch.from_numpy(theta).requires_grad_()
            npo = losses.npo_loss(F.logsigmoid(forget @ theta), start, beta).mean()
            loss = npo + losses.nll_loss(F.logsigmoid(retain @ theta)).mean()
            return loss.item(), gradient(loss, theta).numpy()

        theta = torch.from_numpy(minimize(objective, np.zeros(forget.shape[1]), jac=True, tol=1e-8).x)
        logps = F.logsigmoid(forget @ theta)
        products[f"beta={beta:g}"] = beta * (start - logps).mean().item()
        weights[f"beta={beta:g}"] = losses.npo_weight(logps, start, beta).mean().item()
    values = [*products.values()]
    return verdict("Level of npo+rt: beta u at rest changes by less than a factor of 2 over beta 0.25 to 4",
                   max(values) < 2 * min(values), beta_times_nats=products, mean_W=weights)


# ------------------------------------------------------------------------------------------ the command
def check(seed: int) -> tuple[list, dict]:
    """The verdicts of all items, and pictures {name: (title, panels)}."""
    generator = torch.Generator().manual_seed(seed)
    first = proposition1(generator)
    second, weights = equation5(generator)
    third, distances = theorem2(seed)
    return [*first, *second, two_rates(), *third, softmax_example(generator), retain_weight(seed),
            section4_weights(), level(seed)], {
        "equation5": ("NPO's gradient and loss vanish as the answer is unlearned; GA's do not", weights),
        "divergence_rates": ("Gradient ascent diverges linearly, NPO logarithmically", distances)}


def main(argv: list | None = None) -> int:
    torch.set_num_threads(1)  # the matrices are too small to share among threads
    parser = Parser(__doc__)
    parser.add_argument("--seed", type=positive(int, or_zero=True), default=0, help="of all draws")
    parser.add_argument("--out", type=Path, default=Path("runs/theory"), help="default runs/theory")
    args = parser.parse_args(argv)
    make_folder(args.out)
    verdicts, pictures = check(args.seed)
    record = {"verdicts": verdicts, "provenance": {**environment(), "seed": args.seed}}
    print(write(args.out / "theory_check", record, "Section 3, checked"))
    for name, (title, panels) in pictures.items():
        draw(args.out / f"{name}.png", title, panels, STYLES)
    print(f"{sum(result['holds'] for result in verdicts)} of {len(verdicts)} hold; written: {args.out}")
    return 0 if all(result["holds"] for result in verdicts) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
