"""Section 4's data: x ~ N(+-alpha 1, I_16) with labels from a logistic model, whose slope and intercept are
opposite on the forget and on the retain set. Instances are fresh, or the published five."""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import expit

D, N = 16, 128  # input dimensions and features; n below are rows
RETAIN_ROWS, FORGET_ROWS, TEST_ROWS = 1000, 200, 1000
PUBLISHED_SEEDS = (1000, 2000, 3000, 4000, 5000)


class Instance(NamedTuple):
    """One draw for every alpha: the inputs minus their mean, which depends on alpha, and labels 0 or 1."""
    W: np.ndarray  # (N, D), the fixed first layer
    x_retain: np.ndarray  # (1000, D)
    y_retain: np.ndarray  # (1000,)
    x_forget: np.ndarray  # (200, D)
    y_forget: np.ndarray  # (200,)
    y_idk: np.ndarray  # (200,), Bern(1/2): "I don't know" in a problem with two answers
    x_retain_test: np.ndarray  # (1000, D)
    x_forget_test: np.ndarray  # (1000, D)

    def features(self, x: np.ndarray) -> np.ndarray:
        """relu(W x), (n, D) -> (n, N)."""
        return np.maximum(x @ self.W.T, 0)


def fresh_instance(seed: int, number: int) -> Instance:
    """Instance `number` of the stream `seed`, drawn by numpy."""
    rng = np.random.default_rng([seed, number])
    W = rng.standard_normal((N, D)) / math.sqrt(D)
    x_retain, x_forget, x_retain_test, x_forget_test = (
        rng.standard_normal((n, D)) for n in (RETAIN_ROWS, FORGET_ROWS, TEST_ROWS, TEST_ROWS))
    # P(y = 1 | x) is sigmoid(sum(x) / 4 + 1) on the forget set, and 1 minus that on the retain set
    y_retain = (rng.random(RETAIN_ROWS) < expit(-x_retain.sum(1) / math.sqrt(D) - 1)).astype(float)
    y_forget = (rng.random(FORGET_ROWS) < expit(x_forget.sum(1) / math.sqrt(D) + 1)).astype(float)
    y_idk = (rng.random(FORGET_ROWS) < 0.5).astype(float)
    return Instance(W, x_retain, y_retain, x_forget, y_forget, y_idk, x_retain_test, x_forget_test)


def old_multinomial(probs: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """torch.multinomial(probs, 1) as torch before 2.7 drew it on x86 with MKL, (n, 2) -> (n,).

    Today's torch draws other labels than the published ones. The old rule is the argmax of p / Exp(1). The
    exponentials come from MKL's 31-bit multiplicative generator, seeded with one word of torch's stream.
    """
    modulus, multiplier = 2**31 - 1, 1132489760
    word = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    states = [(word % 2**32) % modulus or 1]
    while len(states) < probs.size:
        states.append(multiplier * states[-1] % modulus)
    exponentials = [-math.log(state / modulus) for state in states]
    return (probs / np.reshape(exponentials, probs.shape)).argmax(1)


def published_instance(seed: int) -> Instance:
    """One of the published five, bit for bit, drawn in the order of the authors' code."""
    generator = torch.Generator().manual_seed(seed)
    float64 = {"generator": generator, "dtype": torch.float64}

    def data_set(rows: int, forget: bool):
        # the row's component of a mixture: always the first, but the draw moves the stream
        components = torch.tensor([1.0, 0.0, 0.0] if forget else [1.0])
        torch.multinomial(components, rows, replacement=True, generator=generator)
        x, y = np.empty((rows, D)), np.empty(rows)
        for row in range(rows):
            x[row] = torch.randn(D, **float64).numpy()
            logit = x[row].sum() / math.sqrt(D) + 1  # of class 1 (forget set) or class 0 (retain set)
            logits = torch.tensor([[0.0, logit] if forget else [logit, 0.0]], dtype=torch.float64)
            y[row] = old_multinomial(logits.softmax(1).numpy(), generator)[0]
        return x, y

    W = (torch.randn(N, D, **float64) / math.sqrt(D)).numpy()
    x_retain, y_retain = data_set(RETAIN_ROWS, forget=False)
    x_forget, y_forget = data_set(FORGET_ROWS, forget=True)
    y_idk = old_multinomial(np.full((FORGET_ROWS, 2), 0.5), generator).astype(float)
    x_retain_test, _ = data_set(TEST_ROWS, forget=False)
    x_forget_test, _ = data_set(TEST_ROWS, forget=True)
    return Instance(W, x_retain, y_retain, x_forget, y_forget, y_idk, x_retain_test, x_forget_test)
