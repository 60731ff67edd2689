"""Section 3's checks: they hold, their formulas are right, and a deliberate mistake turns a verdict."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import losses
import theory_check
from common import InputError
from data.synthetic_instances import published_instance


@pytest.fixture
def small(monkeypatch):
    """The same checks with fewer steps and configurations, in a second."""
    monkeypatch.setattr(theory_check, "EXACT", 300)
    monkeypatch.setattr(theory_check, "LAST", 200_000)
    monkeypatch.setattr(theory_check, "RETAIN_STEPS", 2000)
    instance = published_instance(1000)
    fewer = instance._replace(x_retain=instance.x_retain[:300], y_retain=instance.y_retain[:300])
    monkeypatch.setattr(theory_check, "PUBLISHED_SEEDS", (1000,))
    monkeypatch.setattr(theory_check, "published_instance", {1000: fewer}.get)
    monkeypatch.setattr(theory_check, "SWEEPS", {"n_f": (4, 8, 16), "eta": (0.25, 0.5, 1.0),
                                                 "beta": theory_check.BETAS, "d": (64, 128)})


def failed() -> list[str]:
    return [result["claim"] for result in theory_check.check(0)[0] if not result["holds"]]


def without_the_two(policy, reference, beta):
    return -(1 / beta) * F.logsigmoid(-beta * (policy - reference))


def plus_beta(policy, reference, beta):
    return -(2 / beta) * F.logsigmoid(beta * (policy - reference))


NPO_LOSS, GA_RATE, NPO_RATE = losses.npo_loss, theory_check.ga_rate, theory_check.npo_rate


@pytest.mark.parametrize(
    "mistake",
    [without_the_two, plus_beta, lambda policy, reference, beta: NPO_LOSS(policy.detach(), reference, beta)],
    ids=["no factor 2", "sigma(+beta ..)", "policy detached"])
def test_a_mistake_in_the_loss_turns_verdicts_of_every_item(small, monkeypatch, mistake):
    monkeypatch.setattr(losses, "npo_loss", mistake)
    claims = failed()
    for item in ("Proposition 1", "Equation 5", "Theorem 2: NPO's late distance", "Section 2.1"):
        assert any(claim.startswith(item) for claim in claims), (item, claims)


def test_a_nan_far_from_the_start_turns_verdicts(small, monkeypatch):
    """Only for the greatest beta, which is measured last."""
    def mistake(policy, reference, beta):
        loss, gone = NPO_LOSS(policy, reference, beta), beta * (policy - reference) < -20
        return torch.where(gone, loss * np.nan, loss) if beta == max(theory_check.BETAS) else loss

    monkeypatch.setattr(losses, "npo_loss", mistake)
    claims = failed()
    for item in ("Equation 5", "Equation 3", "Section 2.1"):
        assert any(claim.startswith(item) for claim in claims), (item, claims)


def test_half_of_n_f_in_the_rates_turns_their_verdicts(small, monkeypatch):
    monkeypatch.setattr(theory_check, "ga_rate", lambda n_f, eta, t: GA_RATE(n_f / 2, eta, t))
    monkeypatch.setattr(theory_check, "npo_rate",
                        lambda n_f, eta, beta, t, c: NPO_RATE(n_f / 2, eta, beta, t, c))
    claims = failed()
    for item in ("Theorem 2: gradient ascent's distance", "Theorem 2: NPO's distance grows"):
        assert any(claim.startswith(item) for claim in claims), (item, claims)


def test_a_wrong_weight_turns_equation_5(monkeypatch):
    monkeypatch.setattr(losses, "npo_weight", lambda policy, ref, beta: torch.sigmoid(beta * (policy - ref)))
    assert not theory_check.equation5(torch.Generator().manual_seed(0))[0][0]["holds"]


def test_every_item_holds_and_the_exit_status_says_so(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.touch())  # drawn, but not rendered
    assert theory_check.main(["--out", str(tmp_path)]) == 0
    assert "12 of 12 hold" in capsys.readouterr().out
    record = json.loads((tmp_path / "theory_check.json").read_text())
    assert {"verdicts", "provenance"} == set(record) and record["provenance"]["command"]
    assert {"claim", "holds", "numbers"} == set(record["verdicts"][0])
    assert len(list(tmp_path.glob("*.png"))) == 2 and all(result["holds"] for result in record["verdicts"])

    false = theory_check.verdict("a claim", False, measured=1.0)
    monkeypatch.setattr(theory_check, "check", lambda seed: ([false], {}))
    assert theory_check.main(["--out", str(tmp_path)]) == 1
    assert "| a claim | False |" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["ga", "npo"])
def test_margins_move_as_gradient_descent_moves_theta(loss):
    """The recursion on all problems' margins against autograd on theta itself."""
    rng = np.random.default_rng(0)
    X, labels, theta_0 = rng.standard_normal((5, 9)) / 3, rng.choice([-1.0, 1.0], 5), rng.standard_normal(9)
    signed = X * labels[:, None]
    problems = theory_check.Problems(
        [(signed @ signed.T, signed @ theta_0), theory_check.signed_gram(8, 16, 0)],
        np.array([0.7, 0.1]), np.array([0.5, 2.0]))
    steps = [1, 2, 40]
    norms = problems.norms(problems.steps(loss, np.array(steps)))[:, 0]
    rows, reference = torch.from_numpy(signed), F.logsigmoid(torch.from_numpy(signed @ theta_0))
    theta = torch.from_numpy(theta_0.copy()).requires_grad_()
    for step in range(1, 41):
        logps = F.logsigmoid(rows @ theta)
        value = losses.ga_loss(logps) if loss == "ga" else losses.npo_loss(logps, reference, 0.5)
        theta = (theta - 0.7 * torch.autograd.grad(value.mean(), theta)[0]).detach().requires_grad_()
        if step in steps:  # the norm in X^T X is the length of X times the change
            change = torch.from_numpy(X) @ (theta.detach() - torch.from_numpy(theta_0))
            np.testing.assert_allclose(norms[steps.index(step)], change.norm().item(), rtol=1e-10)


@pytest.mark.parametrize("loss", ["ga", "npo"])
def test_the_flow_that_replaces_steps_has_their_distances(loss):
    """In every configuration: from EXACT on the relative error stays below 1e-4, and falls."""
    sweeps = theory_check.SWEEPS.items()
    rows = [theory_check.BASE | {key: value} for key, values in sweeps for value in values]
    problems = theory_check.Problems([theory_check.signed_gram(row["n_f"], row["d"], 0) for row in rows],
                                     *(np.array([row[key] for row in rows]) for key in ("eta", "beta")))
    times = np.array([2000, 4000, 8000])
    errors = abs(problems.follow(loss, times) / problems.norms(problems.steps(loss, times)) - 1).max(1)
    assert errors.max() < 1e-4 and errors[-1] < errors[0]


def test_rows_are_in_the_theorems_regime():
    for n_f, d in ((2, 128), (16, 64), (64, 128)):
        S, margin = theory_check.signed_gram(n_f, d, 0)
        norms, products = np.sqrt(np.diag(S)), np.abs(S - np.diag(np.diag(S)))
        assert products.max() <= theory_check.C_0 / n_f * (1 + 1e-9) and np.linalg.matrix_rank(S) == n_f
        assert theory_check.NORMS[0] <= norms.min() and norms.max() <= theory_check.NORMS[1]
        assert np.abs(margin).max() <= theory_check.B_THETA * theory_check.NORMS[1]


@pytest.mark.parametrize("flags", ["--seed -1", "--seed x", "--nonsense", "--out {here}/file"])
def test_bad_settings_are_refused_with_one_sentence(flags, capsys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as refusal:
        theory_check.main(flags.format(here=tmp_path).split())
    assert capsys.readouterr().out == "" and "\n" not in str(refusal.value)


# ---------------------------------------------------------------- the critical retain weight

@pytest.mark.parametrize("forget,retain,weight", [
    ([[1.0]], [[2.0]], 0.5), ([[-1.0]], [[2.0]], np.inf), ([[1.0], [-1.0]], [[1.0], [-1.0]], 1.0),
    ([[1.0, 0.0]], [[0.0, 1.0]], np.inf), ([[1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], 2.0)])
def test_the_critical_weight_of_small_instances_by_hand(forget, retain, weight):
    assert theory_check.critical_retain_weight(np.array(forget), np.array(retain)) == pytest.approx(weight)


def test_no_direction_has_a_larger_ratio_than_the_critical_weight():
    forget, retain = theory_check.retain_instances(3)["finite"]
    v = np.random.default_rng(0).standard_normal((200_000, forget.shape[1]))
    ratios = np.maximum(0, -v @ forget.T).mean(1) / np.maximum(0, -v @ retain.T).mean(1)
    critical = theory_check.critical_retain_weight(forget, retain)
    assert 0.9 * critical < ratios.max() <= critical * (1 + 1e-9)


def test_the_bound_is_the_critical_weight_or_below_it():
    for seed in range(3):
        forget, retain = theory_check.retain_instances(seed)["finite"]
        critical, bound = (weight(forget, retain) for weight in (
            theory_check.critical_retain_weight, theory_check.critical_weight_bound))
        assert 0.5 * critical < bound <= critical * (1 + 1e-9)
    assert theory_check.critical_weight_bound(*theory_check.retain_instances(0)["n_f + n_r <= d"]) == math.inf


def test_a_weight_that_ignores_beta_turns_the_level(monkeypatch):
    assert theory_check.level(0)["holds"]
    npo_loss = losses.npo_loss
    monkeypatch.setattr(losses, "npo_loss", lambda policy, reference, beta: npo_loss(policy, reference, 1.0))
    assert not theory_check.level(0)["holds"]


@pytest.mark.parametrize("name,mistake", [
    ("nll_loss", lambda logps: -logps * logps.shape[1]),  # RT without its 1/n_r
    ("npo_loss", lambda policy, reference, beta: policy - reference)])  # gradient ascent
def test_a_mistake_in_rt_or_in_npo_turns_the_critical_weights_verdict(monkeypatch, name, mistake):
    monkeypatch.setattr(theory_check, "RETAIN_STEPS", 2000)
    assert theory_check.retain_weight(0)["holds"]
    monkeypatch.setattr(losses, name, mistake)
    assert not theory_check.retain_weight(0)["holds"]


def test_a_loss_without_its_factor_two_turns_the_two_rates(monkeypatch):
    assert theory_check.two_rates()["holds"]
    monkeypatch.setattr(losses, "npo_loss", without_the_two)
    assert not theory_check.two_rates()["holds"]
