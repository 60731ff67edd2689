"""Each method's loss and gradient against its formula, written out once more: a reference model in memory,
one text at a time, logits at all places."""

import copy
import dataclasses
import math
from functools import cache

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import InputError
from data.batches import Plan
from data.tofu import load_task
from losses import OBJECTIVES, TERMS, Objective, long_name
from model import ALONE, AnswerModel, load_model
from train_npo import (Reference, Settings, kto_baseline, loss_sums, parse, reference_pass,
                       refuse_contradictions)

BETA, BETA2, GAMMA = 0.2, 0.6, 0.3
WEIGHTS = {"forget_loss": 0.7, "retain_loss": 1.3, "kl_loss": 0.4}
METHODS = ("sft", "ga+rt", "idk+rt", "dpo+kl", "kto+rt", "npo", "npo+rt", "npo+kl", "simnpo+rt", "wga",
           "satimp+rt", "tnpo", "ceu+rt", "undial+kl")
CASES = [(method, "policy_reference") for method in METHODS] + [("npo+kl", "reference_policy")]


load_data, load_tiny = cache(load_task), cache(load_model)


class Step:
    """The first global batch of a run (5 rows, in micro-batches of 2) with a policy that has left its
    reference: as the trainer computes it, and as text for the formulas below."""

    def __init__(self, method: str, direction: str = "policy_reference", toward_refusals: int = 1):
        self.s = s = Settings(
            loss=method.split("+")[0], forget_weight=WEIGHTS["forget_loss"],
            retain_weight=WEIGHTS["retain_loss"] * ("+rt" in method),
            kl_weight=WEIGHTS["kl_loss"] * ("+kl" in method), kl_direction=direction, beta=BETA, beta2=BETA2,
            gamma=GAMMA, model="start", template="llama2", epochs=2, batch_size=5, micro_batch_size=2)
        task = load_data("builtin", "retain90" if s.loss == "sft" else "forget10")
        task = dataclasses.replace(task, forget=task.forget[:5], retain=task.retain[:5])
        torch.manual_seed(0)
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=2048, hidden_size=32, intermediate_size=64,
                                          num_hidden_layers=1, num_attention_heads=4)).eval()
        self.tokenizer, self.policy = load_tiny("tiny").tokenizer, AnswerModel(lm)
        self.plan = Plan(s, task, self.tokenizer, None)
        tensors = reference_pass(s, self.policy, self.plan.texts, self.plan.pad, ALONE)
        self.reference_lm, self.reference = copy.deepcopy(lm), Reference(tensors, ALONE.device)
        self.items, rows = self.plan.stream[0], task.forget or task.retain
        self.answers = [(rows[item.row]["question"], rows[item.row]["answer"]) for item in self.items]
        self.refusals = [(rows[item.row]["question"], task.refusals[item.refusal]) for item in self.items]
        self.kept = [(task.retain[item.partner]["question"], task.retain[item.partner]["answer"])
                     for item in self.items]
        self.move(toward_refusals)

    def move(self, toward_refusals: int):
        """Noise, then a step that makes refusals likelier (1) or less likely (-1)."""
        parameters = list(self.policy.parameters())
        uphill = torch.autograd.grad(self.token_mean(self.refusals), parameters)
        length = torch.sqrt(sum((slope**2).sum() for slope in uphill))
        with torch.no_grad():
            for i, (p, slope) in enumerate(zip(parameters, uphill, strict=True)):
                p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
                p += toward_refusals * slope / length

    def baseline(self):
        refusals = self.plan.micro_batch_of(self.items).refusals
        return kto_baseline(self.s, self.policy, self.plan, refusals, self.reference, ALONE)

    def computed(self):
        """(parts, gradients) as the trainer adds them up over micro-batches."""
        counts, parts = self.plan.counts(self.items), {}
        z = self.baseline() if self.s.loss == "kto" else torch.zeros(())
        for keys in self.plan.micro_batches(self.items, 0, 1):
            sums = loss_sums(self.s, self.policy, self.plan, keys, counts, self.reference, z)
            parts = {name: parts.get(name, 0) + value for name, value in sums.items()}
        return parts, torch.autograd.grad(parts["loss"], list(self.policy.parameters()))

    def predictions(self, text, lm=None):
        """(log-probabilities of the vocabulary where an answer's tokens are predicted (n, V), those tokens
        (n, 1)), by the policy or by `lm`."""
        prompt = f"[INST] {text[0]} [/INST]"
        ids = torch.tensor([self.tokenizer(prompt + text[1])["input_ids"] + [self.tokenizer.eos_token_id]])
        start = len(self.tokenizer(prompt)["input_ids"])
        return (lm or self.policy.lm)(ids).logits[0, start - 1:-1].log_softmax(-1), ids[0, start:, None]

    def log_pi(self, text, lm=None):
        log_p, tokens = self.predictions(text, lm)
        return log_p.gather(1, tokens)[:, 0]

    def token_mean(self, texts):
        """Mean log pi_theta over all answer tokens of the batch."""
        return torch.cat([self.log_pi(text) for text in texts]).mean()

    def log_ratios(self, texts):
        """log pi_theta(y|x) - log pi_ref(y|x) of each answer."""
        return torch.stack([self.log_pi(text).sum() - self.log_pi(text, self.reference_lm).sum()
                            for text in texts])

    def divergences(self, texts):
        """K at each answer token."""
        for text in texts:
            log_p, log_q = (self.predictions(text, lm)[0] for lm in (self.policy.lm, self.reference_lm))
            if self.s.kl_direction == "reference_policy":
                log_p, log_q = log_q, log_p
            yield (log_p.exp() * (log_p - log_q)).sum(1)

    def token_losses(self, loss: str):
        """One value per answer token. CE-U leaves out the first token of an answer."""
        for text in self.answers:
            policy, tokens = self.predictions(text)
            reference, _ = self.predictions(text, self.reference_lm)
            places = list(zip(tokens[:, 0], policy, reference, strict=True))
            for label, log_p, log_q in places[int(loss == "ceu"):]:
                p, q = log_p.detach().exp(), log_q.exp()
                if loss in ("ceu", "undial"):
                    target = p.clone() if loss == "ceu" else q.clone()
                    target[label] *= 0 if loss == "ceu" else math.exp(-BETA)
                    yield -(target / target.sum() * log_p).sum()
                else:
                    weight = {"wga": p[label]**BETA, "satimp": p[label]**BETA * (1 - p[label])**BETA2,
                              "tnpo": 2 * p[label]**BETA / (p[label]**BETA + q[label]**BETA)}[loss]
                    yield weight * log_p[label]

    def forget_loss(self):
        loss, log_sigmoid = self.s.loss, torch.nn.functional.logsigmoid
        if loss in ("sft", "ga", "idk"):  # descending on GA's loss is ascent on -log pi
            return {"sft": -1, "ga": 1, "idk": -1}[loss] * self.token_mean(
                self.refusals if loss == "idk" else self.answers)
        if loss == "npo":
            return -2 / BETA * log_sigmoid(-BETA * self.log_ratios(self.answers)).mean()
        if loss == "dpo":
            margins = self.log_ratios(self.refusals) - self.log_ratios(self.answers)
            return -1 / BETA * log_sigmoid(BETA * margins).mean()
        if loss == "kto":
            z = self.log_ratios(self.refusals).mean().clamp(min=0).detach()
            return -2 / BETA * log_sigmoid(BETA * (z - self.log_ratios(self.answers))).mean()
        if loss == "simnpo":
            per_token = torch.stack([self.log_pi(text).mean() for text in self.answers])
            return -2 / BETA * log_sigmoid(-BETA * per_token - GAMMA).mean()
        return torch.stack([*self.token_losses(loss)]).mean()

    def expected(self):
        """(parts, gradients) by the formulas."""
        parts = {"forget_loss": self.forget_loss()}
        if self.s.retain_weight:
            parts["retain_loss"] = -self.token_mean(self.kept)
        if self.s.kl_weight:
            parts["kl_loss"] = torch.cat([*self.divergences(self.kept)]).mean()
        parts["loss"] = sum(WEIGHTS[name] * value for name, value in parts.items())
        return parts, torch.autograd.grad(parts["loss"], list(self.policy.parameters()))


def assert_as_expected(step: Step):
    (parts, gradients), (expected_parts, expected_gradients) = step.computed(), step.expected()
    assert parts.keys() - {"mean_W"} == expected_parts.keys()
    for name, value in expected_parts.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-4), name
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("method, direction", CASES)
def test_loss_and_gradient_follow_the_methods_formula(method, direction):
    assert_as_expected(Step(method, direction))


def test_the_mean_weight_is_equation_5s():
    """W = 2 pi_theta^beta / (pi_theta^beta + pi_ref^beta), a mean over sequences."""
    step = Step("npo")
    power = torch.exp(BETA * step.log_ratios(step.answers))  # (pi_theta / pi_ref)^beta
    parts, _ = step.computed()
    assert parts["mean_W"].item() == pytest.approx((2 * power / (power + 1)).mean().item(), rel=1e-4)


@pytest.mark.parametrize("toward_refusals", (1, -1))
def test_ktos_baseline_is_the_refusals_mean_log_ratio_clamped_at_0(toward_refusals):
    """Positive once the policy has moved towards the refusals, exactly 0 once it has moved away."""
    step = Step("kto", toward_refusals=toward_refusals)
    mean, z = step.log_ratios(step.refusals).mean().item(), step.baseline()
    assert toward_refusals * mean > 1
    assert not z.requires_grad and float(z) == pytest.approx(max(0.0, mean), rel=1e-4)


def mean_of_all(policy_logps):
    return policy_logps.mean()


def test_a_loss_that_returns_another_number_of_values_is_refused():
    step = Step("ga")
    for objective in (Objective(mean_of_all), Objective(mean_of_all, mean="tokens")):
        step.plan.objective = objective
        with pytest.raises(InputError, match="need one value per sequence or per answer token"):
            step.computed()


def test_a_parameter_that_nothing_sets_is_refused(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "floored", Objective(lambda policy_logps, floor: policy_logps - floor))
    with pytest.raises(InputError, match="floored: a step computes no input floor, .* needs a default"):
        parse(["--loss", "floored"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_losss_own_settings_win_over_the_presets_and_a_flag_over_both(name):
    settings = {"beta": load_tiny("tiny").preset.beta} | OBJECTIVES[name].defaults
    s = parse(["--loss", name])
    assert s.settings_of(OBJECTIVES[name]) == {key: settings[key] for key in OBJECTIVES[name].settings}
    for setting in OBJECTIVES[name].settings:
        if setting in vars(s):  # it has a flag
            given = parse(["--loss", name, f"--{setting.replace('_', '-')}", "0.7"])
            assert given.settings_of(OBJECTIVES[name])[setting] == 0.7


@pytest.mark.parametrize("name", TERMS)
def test_a_terms_settings_have_its_name_before_them(name, monkeypatch):
    """Without a flag the loss's own default; a flag of the bare name has no effect, and is refused."""
    def slack_loss(policy_logps, slack=0.25):
        return policy_logps - slack
    monkeypatch.setitem(TERMS, name, Objective(slack_loss, mean="tokens"))
    s = parse([f"--{long_name(name)}-weight", "1"])
    assert s.settings_of(TERMS[name], f"{name}_") == {"slack": 0.25}
    s = dataclasses.replace(s)
    setattr(s, f"{name}_slack", 0.5)
    assert s.settings_of(TERMS[name], f"{name}_") == {"slack": 0.5}
    with pytest.raises(InputError, match="--slack has no effect"):
        refuse_contradictions(s, {"slack": 0.5})


def test_values_per_token_may_be_summed_per_sequence(monkeypatch):
    """(N,) with mean="sequences" is divided by the rows, and with mean="tokens" by the answer tokens."""
    parts = {}
    for mean in ("sequences", "tokens"):
        monkeypatch.setitem(OBJECTIVES, "tnpo", OBJECTIVES["tnpo"]._replace(mean=mean))
        step = Step("tnpo")
        parts[mean], tokens = step.computed()[0], step.plan.counts(step.items).forget_tokens
    losses = [float(parts[mean]["forget_loss"]) for mean in ("sequences", "tokens")]
    assert losses[0] * 5 == pytest.approx(losses[1] * tokens, rel=1e-5)
    assert float(parts["sequences"]["mean_W"]) == pytest.approx(float(parts["tokens"]["mean_W"]))
