"""The objectives against their definitions, their limits, autograd and extreme inputs."""

import math

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (
    ceu_loss,
    dpo_loss,
    ga_loss,
    kl_loss,
    kto_loss,
    nll_loss,
    npo_loss,
    npo_weight,
    satimp_loss,
    simnpo_loss,
    tnpo_loss,
    token_logps,
    undial_loss,
    wga_loss,
)

BETAS = (0.01, 0.1, 1.0, 5.0)


def logps(n=7, seed=0, scale=20.0):
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("beta", BETAS)
def test_values_where_the_policy_is_the_reference(beta):
    x, y = logps(), logps(seed=1)
    torch.testing.assert_close(npo_loss(x, x, beta), torch.full_like(x, 2 / beta * math.log(2)))
    torch.testing.assert_close(npo_weight(x, x, beta), torch.ones_like(x))
    torch.testing.assert_close(dpo_loss(x, y, x, y, beta), torch.full_like(x, math.log(2) / beta))
    torch.testing.assert_close(kto_loss(x, x, 0.0, beta), npo_loss(x, x, beta))


@pytest.mark.parametrize("beta", BETAS)
def test_npo_gradient_is_ga_gradient_times_its_weight(beta):
    """Eq. 5, against autograd and against the definition 2 p^b / (p^b + q^b)."""
    policy, reference = logps().requires_grad_(), logps(seed=1)
    gradient, = torch.autograd.grad(npo_loss(policy, reference, beta).sum(), policy)
    p, q = policy.detach().exp(), reference.exp()
    torch.testing.assert_close(gradient, 2 * p**beta / (p**beta + q**beta))
    torch.testing.assert_close(gradient, npo_weight(policy.detach(), reference, beta))


def test_the_first_npo_gradient_is_gradient_ascents():
    policy = logps().requires_grad_()
    npo, = torch.autograd.grad(npo_loss(policy, policy.detach(), 0.1).sum(), policy)
    ga, = torch.autograd.grad(ga_loss(policy).sum(), policy)
    torch.testing.assert_close(npo, ga)


def test_npo_tends_to_gradient_ascent_as_beta_vanishes():
    """Proposition 1: L_NPO - (2/beta) log 2 -> L_GA - E log pi_ref, with an error of beta r^2 / 4."""
    policy, reference = logps(), logps(seed=1)
    r = policy - reference
    for beta in (1e-2, 1e-3, 1e-4):
        error = npo_loss(policy, reference, beta) - 2 / beta * math.log(2) - (ga_loss(policy) - reference)
        torch.testing.assert_close(error, beta * r**2 / 4, rtol=0.02, atol=1e-8)


@pytest.mark.parametrize("beta", BETAS)
def test_npo_is_dpo_without_its_preferred_half(beta):
    """Where the chosen answer's ratio stays 1, NPO is twice DPO (2/beta against 1/beta)."""
    policy, reference, chosen = logps(), logps(seed=1), logps(seed=2)
    torch.testing.assert_close(npo_loss(policy, reference, beta),
                               2 * dpo_loss(chosen, policy, chosen, reference, beta))


def test_formulas():
    policy, reference, lengths = logps(), logps(seed=1), torch.arange(1, 8)
    s = torch.sigmoid
    torch.testing.assert_close(nll_loss(policy), -policy)
    torch.testing.assert_close(kto_loss(policy, reference, 1.5, 0.3),
                               -(2 / 0.3) * s(0.3 * (1.5 - (policy - reference))).log())
    torch.testing.assert_close(simnpo_loss(policy, lengths, 2.5, 0.5),
                               -(2 / 2.5) * s(-2.5 / lengths * policy - 0.5).log())
    torch.testing.assert_close(dpo_loss(policy, reference, 0 * policy, 0 * policy, 0.2),
                               -(1 / 0.2) * s(0.2 * (policy - reference)).log())


def test_simnpo_of_one_token_is_npo_against_a_certain_reference():
    policy = logps()
    torch.testing.assert_close(simnpo_loss(policy, torch.ones(7, dtype=torch.long), 0.1),
                               npo_loss(policy, torch.zeros_like(policy), 0.1))


def test_simnpo_keeps_float64_beside_whole_lengths():
    logps, lengths = torch.tensor([-20.0, -3.0], dtype=torch.float64), torch.tensor([7, 3])
    expected = 2 / 2.5 * torch.log1p(torch.exp(2.5 * logps / lengths.double()))
    torch.testing.assert_close(losses.simnpo_loss(logps, lengths, 2.5), expected, rtol=1e-14, atol=0)


def test_no_gradient_flows_through_the_kto_baseline():
    policy = logps().requires_grad_()
    baseline = (policy.mean() ** 2)
    gradient, = torch.autograd.grad(kto_loss(policy, logps(seed=1), baseline, 0.1).sum(), policy)
    expected, = torch.autograd.grad(kto_loss(policy, logps(seed=1), float(baseline), 0.1).sum(), policy)
    torch.testing.assert_close(gradient, expected)
    nan = torch.full((1,), math.nan)  # of a model that has diverged, whose loss the loop reports
    assert kto_loss(nan, torch.zeros(1), nan[0], 0.1).isnan()


def some_logits(n=6, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("beta", BETAS)
def test_token_losses_are_a_weight_times_log_p(beta):
    """WGA, SatImp, TNPO by their definitions; the gradient is the weight: none flows through it."""
    x, y = (logps(seed=s, scale=3.0) for s in (0, 1))
    p, q = x.exp(), y.exp()
    for loss, weight in ((lambda x: wga_loss(x, beta), p**beta),
                         (lambda x: satimp_loss(x, beta, 0.7), p**beta * (1 - p)**0.7),
                         (lambda x: tnpo_loss(x, y, beta), 2 * p**beta / (p**beta + q**beta))):
        policy = x.clone().requires_grad_()
        values = loss(policy)
        gradient, = torch.autograd.grad(values.sum(), policy)
        torch.testing.assert_close(values, weight * x)
        torch.testing.assert_close(gradient, weight)


def test_tnpo_where_the_policy_is_the_reference_is_gradient_ascent():
    x = logps().requires_grad_()
    torch.testing.assert_close(tnpo_loss(x, x.detach(), 4.0), ga_loss(x))
    gradient, = torch.autograd.grad(tnpo_loss(x, x.detach(), 4.0).sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))


def test_ceu_and_undial_are_cross_entropies_with_a_target_that_lacks_the_label():
    """One token at a time, by hand; the gradient for logits is p - r, none flows through the target r."""
    z, z_ref, targets, beta = some_logits(), some_logits(seed=1), torch.tensor([0, 10, 3, 3, 7, 1]), 1.5
    for loss, teacher, strength in ((lambda x: ceu_loss(x, targets), z, math.inf),
                                    (lambda x: undial_loss(x, z_ref, targets, beta), z_ref, beta)):
        policy = z.clone().requires_grad_()
        values = loss(policy)
        gradient, = torch.autograd.grad(values.sum(), policy)
        for i, label in enumerate(targets.tolist()):
            weights, p = teacher[i].exp(), z[i].exp() / z[i].exp().sum()
            weights[label] *= math.exp(-strength)
            r = weights / weights.sum()
            torch.testing.assert_close(values[i], -(r * p.log()).sum())
            torch.testing.assert_close(gradient[i], p - r)


def test_ceu_is_undial_of_itself_without_bounds():
    z, targets = some_logits(), torch.arange(6)
    torch.testing.assert_close(ceu_loss(z, targets), undial_loss(z, z, targets, 1e4))
    assert ceu_loss(z.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize("loss", [
    lambda x, y: npo_loss(x, y, 0.1), lambda x, y: dpo_loss(x, x * 0.5, y, y * 0.5, 0.3),
    lambda x, y: kto_loss(x, y, 0.7, 0.2), lambda x, y: simnpo_loss(x, torch.arange(1, 8), 2.0, 0.1),
    lambda x, y: nll_loss(x), lambda x, y: ga_loss(x)])
def test_gradcheck(loss):
    reference = logps(seed=1)
    assert torch.autograd.gradcheck(lambda x: loss(x, reference), logps().requires_grad_())


@pytest.mark.parametrize("direction", losses.KL_DIRECTIONS)
def test_gradcheck_kl(direction):
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: kl_loss(x, reference, direction), policy.requires_grad_())


@pytest.mark.parametrize("sign", (-1, 1))
@pytest.mark.parametrize("beta", (0.1, 1.0))
def test_finite_for_extreme_ratios(sign, beta):
    """|beta * log-ratio| up to 1e4, in float32, value and gradient."""
    ratio = torch.tensor([sign * 1e4 / beta], requires_grad=True)
    zero = torch.zeros(1)
    for value in (npo_loss(ratio, zero, beta), dpo_loss(ratio, zero, zero, zero, beta),
                  dpo_loss(zero, ratio, zero, zero, beta), kto_loss(ratio, zero, 0.0, beta),
                  simnpo_loss(ratio, torch.ones(1), beta), npo_weight(ratio, zero, beta)):
        gradient, = torch.autograd.grad(value.sum(), ratio)
        assert value.isfinite().all() and gradient.isfinite().all()
    for value in (wga_loss(ratio, beta), satimp_loss(ratio, beta, 0.3), tnpo_loss(ratio, zero, beta),
                  tnpo_loss(ratio, -ratio.detach(), beta)):
        gradient, = torch.autograd.grad(value.sum(), ratio)
        assert value.isfinite().all() and gradient.isfinite().all()
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    best, worst = torch.tensor([0]), torch.tensor([2])
    for value in (*(kl_loss(logits, -logits.detach(), direction) for direction in losses.KL_DIRECTIONS),
                  ceu_loss(logits, best), ceu_loss(logits, worst),
                  undial_loss(logits, -logits.detach(), best, 1e4 * beta)):
        gradient, = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all() and gradient.isfinite().all()


def test_kl_in_both_directions_against_torch():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(6, 11, generator=generator) for _ in range(2))
    log_p, log_q = policy.log_softmax(-1), reference.log_softmax(-1)
    # D(target || other).
    def by_torch(target, other):
        return F.kl_div(other, target, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_loss(policy, reference, "policy_reference"), by_torch(log_p, log_q))
    torch.testing.assert_close(kl_loss(policy, reference, "reference_policy"), by_torch(log_q, log_p))
    assert not torch.allclose(by_torch(log_p, log_q), by_torch(log_q, log_p))
    torch.testing.assert_close(kl_loss(policy, policy), torch.zeros(6))


def test_token_logps_are_the_log_softmax_at_the_target():
    logits, targets = torch.randn(5, 9,
                                  generator=torch.Generator().manual_seed(0)), torch.tensor([0, 8, 3, 3, 1])
    torch.testing.assert_close(token_logps(logits, targets), logits.log_softmax(-1)[torch.arange(5), targets])
    assert token_logps(logits.bfloat16(), targets).dtype == torch.float32


def test_what_is_refused():
    x = logps()
    with pytest.raises(ValueError, match="beta"):
        npo_loss(x, x, 0.0)
    with pytest.raises(ValueError, match="shape"):
        npo_loss(x, x.unsqueeze(1), 0.1)
    with pytest.raises(ValueError, match="beta"):
        satimp_loss(x, 1.0, -1.0)
    with pytest.raises(ValueError, match="shape"):
        tnpo_loss(x, x[:3], 0.1)
    with pytest.raises(ValueError, match="negative"):
        kto_loss(x, x, -0.1, 0.1)
    with pytest.raises(ValueError, match="direction"):
        kl_loss(torch.zeros(1, 2), torch.zeros(1, 2), "both")
    with pytest.raises(ValueError, match="answer_lengths"):
        simnpo_loss(x, torch.zeros(7), 0.1)
