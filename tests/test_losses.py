"""The objectives against their definitions, their limits, autograd and extreme inputs.

Shapes: B sequences, N answer tokens, V vocabulary.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from losses import (KL_DIRECTIONS, OBJECTIVES, ceu_loss, dpo_loss, ga_loss, kl_loss, kto_loss, nll_loss,
                    npo_loss, npo_weight, satimp_loss, simnpo_loss, tnpo_loss, token_logps, undial_loss,
                    wga_loss)

BETAS = (0.01, 0.1, 1.0, 5.0)
TARGETS = torch.tensor([0, 10, 3, 3, 7, 1])


def logps(seed: int = 0, scale: float = 20.0):
    """Seven log-probabilities between -scale and 0."""
    return -scale * torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(seed: int = 0):
    """(N, V) for six tokens out of eleven."""
    return 2 * torch.randn(6, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


P, Q = torch.tensor([-12.0, -3.0]), torch.tensor([-10.0, -4.0])  # log pi_theta, log pi_ref of two answers
R, S = torch.tensor([-8.0, -9.0]), torch.tensor([-9.0, -7.0])  # the same of their refusals
LENGTHS = torch.tensor([6, 2])
p, q = torch.tensor([math.log(0.8), math.log(0.1)]), torch.tensor([math.log(0.4), math.log(0.2)])  # of tokens


@pytest.mark.parametrize("loss, arguments, values", [
    (nll_loss, (P,), [12, 3]),
    (ga_loss, (P,), [-12, -3]),
    (npo_loss, (P, Q, 0.1), [11.962777389, 14.887933200]),  # 20 ln(1 + e^(0.1 (P - Q)))
    (npo_weight, (P, Q, 0.1), [0.900332005, 1.049958375]),
    (dpo_loss, (R, P, S, Q, 0.1), [5.543552445, 8.543552445]),  # 10 ln(1 + e^-(0.1 (R - S - P + Q)))
    (kto_loss, (P, Q, 1.5, 0.1), [10.667643108, 13.36919296]),  # 20 ln(1 + e^(0.1 (P - Q - 1.5)))
    (simnpo_loss, (P, LENGTHS, 2.5, 0.5), [0.008838196, 0.030433097]),  # 0.8 ln(1 + e^(2.5 P/|y| + 0.5))
    (wga_loss, (p, 2.0), [0.64 * math.log(0.8), 0.01 * math.log(0.1)]),
    (satimp_loss, (p, 2.0, 3.0), [0.64 * 0.008 * math.log(0.8), 0.01 * 0.729 * math.log(0.1)]),
    (tnpo_loss, (p, q, 2.0), [2 * 0.8 * math.log(0.8), 2 * 0.2 * math.log(0.1)]),
    # p = (0.8, 0.2), q = (0.4, 0.6); then the token 0 is the label
    (kl_loss, (torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.4, 0.6]]).log()), [0.334795287]),
    (ceu_loss, (torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0])), [-math.log(0.2)]),
    (undial_loss, (torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.4, 0.6]]).log(), torch.tensor([0]),
                   math.log(2)), [-0.25 * math.log(0.8) - 0.75 * math.log(0.2)])])
def test_values_worked_out_by_hand(loss, arguments, values):
    assert_close(loss(*arguments), torch.tensor(values, dtype=torch.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_values_where_the_policy_is_the_reference(beta):
    x, y = logps(), logps(seed=1)
    assert_close(npo_loss(x, x, beta), torch.full_like(x, 2 / beta * math.log(2)))
    assert_close(npo_weight(x, x, beta), torch.ones_like(x))
    assert_close(dpo_loss(x, y, x, y, beta), torch.full_like(x, math.log(2) / beta))
    assert_close(kto_loss(x, x, 0.0, beta), npo_loss(x, x, beta))
    assert_close(tnpo_loss(x, x, beta), ga_loss(x))
    for direction in KL_DIRECTIONS:
        assert_close(kl_loss(logits(), logits(), direction), torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("beta", BETAS)
def test_npos_gradient_is_gradient_ascents_times_its_weight(beta):
    """Eq. 5, against autograd and against the definition 2 p^beta / (p^beta + q^beta)."""
    policy, reference = logps(), logps(seed=1)
    p, q = policy.exp(), reference.exp()
    npo = gradient(partial(npo_loss, reference_logps=reference, beta=beta), policy)
    assert_close(npo, 2 * p**beta / (p**beta + q**beta))
    assert_close(npo, npo_weight(policy, reference, beta) * gradient(ga_loss, policy))


def test_the_first_npo_gradient_is_gradient_ascents():
    policy = logps()
    npo = gradient(partial(npo_loss, reference_logps=policy, beta=0.1), policy)
    assert_close(npo, gradient(ga_loss, policy))


def test_npo_tends_to_gradient_ascent_as_beta_vanishes():
    """Proposition 1: L_NPO - (2/beta) log 2 -> L_GA - E log pi_ref, with an error of beta r^2 / 4."""
    policy, reference = logps(), logps(seed=1)
    for beta in (1e-2, 1e-3, 1e-4):
        error = npo_loss(policy, reference, beta) - 2 / beta * math.log(2) - (ga_loss(policy) - reference)
        assert_close(error, beta * (policy - reference)**2 / 4, rtol=0.02, atol=1e-8)


@pytest.mark.parametrize("beta", BETAS)
def test_npo_is_dpo_without_its_preferred_half(beta):
    """Where the chosen answer's ratio stays 1, NPO is twice DPO (2/beta against 1/beta)."""
    policy, reference, chosen = logps(), logps(seed=1), logps(seed=2)
    assert_close(npo_loss(policy, reference, beta), 2 * dpo_loss(chosen, policy, chosen, reference, beta))


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_of_a_token_loss_is_its_weight(beta):
    """WGA, SatImp and TNPO are a weight times log p, and no gradient flows through the weight."""
    x, y = logps(scale=3.0), logps(seed=1, scale=3.0)
    p, q = x.exp(), y.exp()
    for loss, weight in ((partial(wga_loss, beta=beta), p**beta),
                         (partial(satimp_loss, beta=beta, beta2=0.7), p**beta * (1 - p)**0.7),
                         (partial(tnpo_loss, reference_token_logps=y, beta=beta),
                          2 * p**beta / (p**beta + q**beta))):
        assert_close(loss(x), weight * x)
        assert_close(gradient(loss, x), weight)


def test_weights_of_tokens_that_rounding_lifts_above_probability_1():
    x = torch.tensor([1e-3])
    assert_close(wga_loss(x, 5.0), x)
    assert_close(satimp_loss(x, 5.0, 0.5), torch.zeros(1))


def test_ceu_and_undial_are_cross_entropies_with_a_target_that_lacks_the_label():
    """One token at a time, by hand. The gradient for the logits is p - r: none flows through r."""
    z, z_ref, beta = logits(), logits(seed=1), 1.5
    for loss, teacher, strength in ((partial(ceu_loss, targets=TARGETS), z, math.inf), (
            partial(undial_loss, reference_logits=z_ref, targets=TARGETS, beta=beta), z_ref, beta)):
        values, gradients = loss(z), gradient(loss, z)
        for i, label in enumerate(TARGETS.tolist()):
            weights, p = teacher[i].exp(), z[i].softmax(0)
            weights[label] *= math.exp(-strength)
            r = weights / weights.sum()
            assert_close(values[i], -(r * p.log()).sum())
            assert_close(gradients[i], p - r)


def test_kl_in_both_directions_against_torch():
    policy, reference = logits(), logits(seed=1)
    log_p, log_q = policy.log_softmax(-1), reference.log_softmax(-1)
    p_from_q = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # D(p || q)
    q_from_p = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    assert_close(kl_loss(policy, reference), p_from_q)
    assert_close(kl_loss(policy, reference, "policy_reference"), p_from_q)
    assert_close(kl_loss(policy, reference, "reference_policy"), q_from_p)
    assert not torch.allclose(p_from_q, q_from_p)


@pytest.mark.parametrize("loss, x, side", [
    (lambda x, y: kto_loss(x, logps(seed=1), y, 0.1), logps(), lambda x: -x.mean()),
    (lambda x, y: undial_loss(x, y, TARGETS, 1.5), logits(), torch.tanh),
    *((partial(kl_loss, direction=direction), logits(), torch.tanh) for direction in KL_DIRECTIONS)])
def test_no_gradient_flows_through_the_reference_side(loss, x, side):
    fixed = side(x)
    assert_close(gradient(lambda x: loss(x, side(x)), x), gradient(lambda x: loss(x, fixed), x))


@pytest.mark.parametrize("loss", [
    lambda x, y: npo_loss(x, y, 0.1), lambda x, y: dpo_loss(x, x * 0.5, y, y * 0.5, 0.3),
    lambda x, y: kto_loss(x, y, 0.7, 0.2), lambda x, y: simnpo_loss(x, torch.arange(1, 8), 2.0, 0.1)])
def test_gradients_against_finite_differences(loss):
    reference = logps(seed=1)
    assert torch.autograd.gradcheck(lambda x: loss(x, reference), logps().requires_grad_())


@pytest.mark.parametrize("sign", (-1, 1))
@pytest.mark.parametrize("beta", (0.1, 1.0))
def test_values_and_gradients_are_finite_for_extreme_ratios(sign, beta):
    """|beta * log-ratio| up to 1e4, in float32."""
    ratio, zero = torch.tensor([sign * 1e4 / beta], requires_grad=True), torch.zeros(1)
    z, best, worst = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True), *torch.tensor([[0], [2]])
    of_ratio = (npo_loss(ratio, zero, beta), dpo_loss(ratio, zero, zero, zero, beta),
                dpo_loss(zero, ratio, zero, zero, beta), kto_loss(ratio, zero, 0.0, beta),
                simnpo_loss(ratio, torch.ones(1), beta), npo_weight(ratio, zero, beta), wga_loss(ratio, beta),
                satimp_loss(ratio, beta, 0.3), tnpo_loss(ratio, zero, beta))
    of_logits = (*(kl_loss(z, -z, direction) for direction in KL_DIRECTIONS), ceu_loss(z, best),
                 ceu_loss(z, worst), undial_loss(z, -z, best, 1e4 * beta), token_logps(z, worst))
    for x, values in ((ratio, of_ratio), (z, of_logits)):
        for value in values:
            slope, = torch.autograd.grad(value.sum(), x, retain_graph=True)
            assert value.isfinite().all() and slope.isfinite().all()


def test_values_are_computed_in_float32_at_least():
    half, targets = logits().bfloat16(), TARGETS
    for value, exact in ((token_logps(half, targets), token_logps(half.double(), targets)),
                         (kl_loss(half, -half), kl_loss(half.double(), -half.double())),
                         (ceu_loss(half, targets), ceu_loss(half.double(), targets))):
        assert value.dtype == torch.float32 and exact.dtype == torch.float64
        assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert_close(token_logps(logits(), targets), logits().log_softmax(-1)[torch.arange(6), targets])
    assert simnpo_loss(logps(), torch.arange(1, 8), 2.5).dtype == torch.float64


@pytest.mark.parametrize("message, loss", [
    *(("beta must be a positive finite number", partial(npo_loss, logps(), logps(), beta))
      for beta in (0.0, -1.0, math.nan, math.inf)),
    ("beta", lambda: satimp_loss(logps(), 1.0, -1.0)),
    ("one shape", lambda: npo_loss(logps(), logps().unsqueeze(1), 0.1)),  # (B,) with (B, 1) would be (B, B)
    ("one shape", lambda: dpo_loss(logps(), logps(), logps(), logps()[:1], 0.1)),
    ("one shape", lambda: tnpo_loss(logps(), logps()[:1], 0.1)),
    ("one shape", lambda: simnpo_loss(logps(), torch.ones(1), 0.1)),
    ("direction", lambda: kl_loss(logits(), logits(), "both"))])
def test_wrong_arguments_are_refused(message, loss):
    with pytest.raises(ValueError, match=message):
        loss()


# name: (inputs in the loss's order, the loss's defaults, whether the answers are read, whether refusals are)
TABLE = {
    "sft": ("policy_logps", {}, True, False),
    "ga": ("policy_logps", {}, True, False),
    "idk": ("policy_chosen_logps", {}, False, True),
    "dpo": ("policy_chosen_logps policy_rejected_logps reference_chosen_logps reference_rejected_logps beta",
            {}, True, True),
    "kto": ("policy_logps reference_logps kl_baseline beta", {}, True, True),
    "npo": ("policy_logps reference_logps beta", {}, True, False),
    "simnpo": ("policy_logps answer_lengths beta gamma", {"beta": 2.5, "gamma": 0.0}, True, False),
    "wga": ("policy_token_logps beta", {"beta": 1.0}, True, False),
    "satimp": ("policy_token_logps beta beta2", {"beta": 5.0, "beta2": 1.0}, True, False),
    "tnpo": ("policy_token_logps reference_token_logps beta", {"beta": 4.0}, True, False),
    "ceu": ("policy_logits targets", {}, True, False),
    "undial": ("policy_logits reference_logits targets beta", {"beta": 10.0}, True, False)}


@pytest.mark.parametrize("name", TABLE)
def test_a_losss_parameter_names_select_its_inputs(name):
    objective, (inputs, defaults, answers, refusals) = OBJECTIVES[name], TABLE[name]
    settings = [word for word in inputs.split() if word in ("beta", "beta2", "gamma")]
    assert (list(objective.inputs), list(objective.settings)) == (inputs.split(), settings)
    assert objective.defaults == defaults
    assert (objective.needs_answers, objective.needs_refusals) == (answers, refusals)


def test_what_the_records_say_beside_the_loss():
    def names(field: str, value) -> set:
        return {name for name in TABLE if getattr(OBJECTIVES[name], field) == value}

    assert names("mean", "sequences") == {"dpo", "kto", "npo", "simnpo"}
    assert names("mean", "tokens") == TABLE.keys() - names("mean", "sequences")
    assert names("weight", npo_weight) == {"npo", "tnpo"}
    assert names("skips", 1) == {"ceu"} and names("skips", 0) == TABLE.keys() - {"ceu"}
    starts = {name: OBJECTIVES[name].value_at_start_times_beta for name in TABLE}
    assert {name: value for name, value in starts.items() if value is not None} == {
        "dpo": math.log(2), "kto": 2 * math.log(2), "npo": 2 * math.log(2)}


@pytest.mark.parametrize("loss", [npo_loss, npo_weight, tnpo_loss])
def test_beta_may_be_a_tensor_that_broadcasts(loss):
    policy, reference = torch.tensor([-1.0, -5.0, -9.0]), torch.tensor([-2.0, -3.0, -1.0])
    betas = torch.tensor([0.1, 0.5, 2.0])
    one_by_one = [loss(policy[i:i + 1], reference[i:i + 1], beta.item()) for i, beta in enumerate(betas)]
    assert_close(loss(policy, reference, betas), torch.cat(one_by_one))
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta must be"):
            loss(policy, reference, torch.tensor([0.1, wrong, 2.0]))
