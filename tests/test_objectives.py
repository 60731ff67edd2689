"""Every method against its formulas, written out once more: a resident reference, one row at a time, all
logits."""

import argparse
import copy
import inspect
import json
import math
import shutil

import pytest
import test_training
import torch
from test_training import ALONE, assert_close, prepared_step

import train_npo
from data.tofu import load_task
from losses import OBJECTIVES, Objective
from models.loading import load_model
from running.settings import build_parser

settings = test_training.settings  # a fixture
BETA, BETA2, GAMMA = 0.2, 0.6, 0.3
WEIGHTS = {"forget_loss": 0.7, "retain_loss": 1.3, "kl_loss": 0.4}
METHODS = ("ga", "ga+rt", "ga+kl", "idk+rt", "dpo", "dpo+rt", "dpo+kl", "kto", "kto+rt", "npo", "npo+rt",
           "npo+kl",
           "simnpo", "simnpo+rt", "sft", "wga", "satimp+rt", "tnpo", "tnpo+kl", "ceu+rt", "undial",
           "undial+rt", "undial+kl")
CASES = [(method, "policy_reference") for method in METHODS] + [("npo+kl", "reference_policy")]


class Oracle:
    """The batch as text, and the two models that read it row by row: the policy, and what it was before it
    moved."""

    def __init__(self, s, lm, items):
        task, self.tokenizer = load_task(s.data, s.split), load_model(s.start)[1]
        rows = task.forget or task.retain  # sft learns what its split holds
        self.answers = [(rows[i.row]["question"], rows[i.row]["answer"]) for i in items]
        self.refusals = [(rows[i.row]["question"], task.refusals[i.refusal]) for i in items]
        self.kept = [(task.retain[i.partner]["question"], task.retain[i.partner]["answer"]) for i in items]
        self.policy, self.reference = lm, copy.deepcopy(lm).requires_grad_(False)

    def read(self, lm, question, answer):
        """(log-probabilities of the vocabulary where the answer is predicted (n, V), the answer's tokens (n,
        1))."""
        prompt = f"[INST] {question} [/INST]"
        ids = torch.tensor([self.tokenizer(prompt + answer)["input_ids"] + [self.tokenizer.eos_token_id]])
        start = len(self.tokenizer(prompt)["input_ids"])
        return lm(ids).logits[0, start - 1:-1].log_softmax(-1), ids[0, start:, None]

    def log_pi(self, text, lm=None):
        """log pi of each token of an answer, (n,); the policy's unless told."""
        log_p, tokens = self.read(lm or self.policy, *text)
        return log_p.gather(1, tokens)[:, 0]

    def token_mean(self, texts):
        """Mean log pi_theta over all answer tokens of the batch."""
        return torch.cat([self.log_pi(text) for text in texts]).mean()

    def log_ratios(self, texts):
        """log pi_theta(y|x) - log pi_ref(y|x) of each answer, (b,)."""
        return torch.stack([self.log_pi(text).sum() - self.log_pi(text, self.reference).sum()
                            for text in texts])

    def labels_and_rows(self, skip=0):
        """Of each answer token of the batch: its id, log-probabilities of the vocabulary (V,) by the policy
        and by the reference; without the first `skip` tokens of each answer."""
        for text in self.answers:
            (log_p, tokens), (log_q, _) = (self.read(lm, *text) for lm in (self.policy, self.reference))
            yield from list(zip(tokens[:, 0].tolist(), log_p, log_q, strict=True))[skip:]

    def divergence(self, text, direction):
        """D(policy || reference), or the reverse, at each token of an answer, (n,)."""
        log_p, log_q = (self.read(lm, *text)[0] for lm in (self.policy, self.reference))
        if direction == "reference_policy":
            log_p, log_q = log_q, log_p
        return (log_p.exp() * (log_p - log_q)).sum(1)

    def move(self, toward_refusals):
        """Move the policy off its reference: noise, then a step that makes refusals likelier (+1) or less so
        (-1)."""
        parameters = list(self.policy.parameters())
        uphill = torch.autograd.grad(self.token_mean(self.refusals), parameters)
        length = torch.sqrt(sum((g**2).sum() for g in uphill))
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, uphill, strict=False)):
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
                p += 0.02 * noise + toward_refusals * g / length


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def forget_formula(loss, o):
    """L_forget of the batch."""
    if loss == "sft":
        return -o.token_mean(o.answers)
    if loss == "ga":
        return o.token_mean(o.answers)  # descending on it is ascent on the forget rows' loss
    if loss == "idk":
        return -o.token_mean(o.refusals)
    if loss == "npo":
        return -(2 / BETA) * log_sigmoid(-BETA * o.log_ratios(o.answers)).mean()
    if loss == "dpo":
        return -(1 / BETA) * log_sigmoid(BETA * (o.log_ratios(o.refusals) - o.log_ratios(o.answers))).mean()
    if loss == "kto":
        z = o.log_ratios(o.refusals).mean().clamp(min=0).detach()
        return -(2 / BETA) * log_sigmoid(BETA * (z - o.log_ratios(o.answers))).mean()
    if loss == "simnpo":
        per_token = torch.stack([o.log_pi(text).mean() for text in o.answers])
        return -(2 / BETA) * log_sigmoid(-BETA * per_token - GAMMA).mean()
    values = []
    for label, log_p, log_q in o.labels_and_rows(skip=int(loss == "ceu")):
        p, q = log_p.detach().exp(), log_q.exp()
        if loss in ("ceu", "undial"):
            target = p.clone() if loss == "ceu" else q.clone()
            target[label] *= 0 if loss == "ceu" else math.exp(-BETA)
            values.append(-(target / target.sum() * log_p).sum())
        else:
            weight = {"wga": p[label]**BETA, "satimp": p[label]**BETA * (1 - p[label])**BETA2,
                      "tnpo": 2 * p[label]**BETA / (p[label]**BETA + q[label]**BETA)}[loss]
            values.append(weight * log_p[label])
    return torch.stack(values).mean()


def detached(parts):
    return {name: float(value.detach()) for name, value in parts.items()}


def expected(method, direction, o):
    """(parts, gradients) by the formulas."""
    parts = {"forget_loss": forget_formula(method.split("+")[0], o)}
    if "+rt" in method:
        parts["retain_loss"] = -o.token_mean(o.kept)
    if "+kl" in method:
        parts["kl_loss"] = torch.cat([o.divergence(text, direction) for text in o.kept]).mean()
    parts["loss"] = sum(WEIGHTS[name] * value for name, value in parts.items())
    return detached(parts), torch.autograd.grad(parts["loss"], list(o.policy.parameters()))


def computed(s, model, plan, reference, items):
    """(parts, gradients) as the training loop sums them over micro-batches."""
    counts, parts = plan.counts(items), {}
    z = train_npo.kto_baseline(s, model, plan, items, reference,
                               ALONE) if s.loss == "kto" else torch.zeros(())
    for micro in plan.micro_batches(items, ALONE):
        for name, value in train_npo.loss_sums(s, model, plan, micro, reference, counts, z, "cpu").items():
            parts[name] = parts.get(name, 0) + value
    return detached(parts), torch.autograd.grad(parts["loss"], list(model.parameters()))


def settings_of(settings, method, direction="policy_reference"):
    """Uneven weights, and a global batch of 8 rows in three micro-batches."""
    s = settings(loss=method.split("+")[0], split="retain90" if method == "sft" else "forget10", epochs=1,
                 micro_batch_size=3, forget_weight=WEIGHTS["forget_loss"],
                 retain_weight=WEIGHTS["retain_loss"] if "+rt" in method else 0.0,
                 kl_weight=WEIGHTS["kl_loss"] if "+kl" in method else 0.0)
    s.beta, s.beta2, s.gamma, s.kl_direction = BETA, BETA2, GAMMA, direction  # not every method takes all
    return s


@pytest.mark.parametrize("method, direction", CASES)
def test_losses_and_gradient_follow_the_methods_formulas(settings, tmp_path, method, direction):
    """Each part, their weighted total and its gradient, with a policy that has left its reference."""
    s = settings_of(settings, method, direction)
    model, plan, reference, items = prepared_step(s, tmp_path)
    oracle = Oracle(s, model.lm, items)
    oracle.move(toward_refusals=1)
    parts, gradients = computed(s, model, plan, reference, items)
    right_parts, right_gradients = expected(method, direction, oracle)
    assert parts.keys() - {"mean_W"} == right_parts.keys()
    for name, value in right_parts.items():
        assert parts[name] == pytest.approx(value, rel=1e-4), name
    names = [name for name, _ in model.named_parameters()]
    assert_close(dict(zip(names, right_gradients, strict=False)), dict(zip(names, gradients, strict=False)),
                 1e-4)


@pytest.mark.parametrize("loss", ("dpo", "kto"))
def test_dpos_chosen_side_is_the_rows_alternative_answer(settings, small_data, tmp_path, loss):
    """AltPO: DPO against the row's own other answer. KTO keeps its refusals, here as without alternatives."""
    rows = [json.loads(line) for line in (small_data / "full.json").read_text().splitlines()]
    with_alternatives = [{**row, "alternative_answer": f"Perhaps {row['answer'][::-1]}"} for row in rows]
    data = shutil.copytree(small_data, tmp_path / "data")
    (data / "full.json").write_text("\n".join(map(json.dumps, with_alternatives)))
    s = settings_of(settings, loss)
    s.data = str(data)
    model, plan, reference, items = prepared_step(s, tmp_path)
    oracle = Oracle(s, model.lm, items)
    forget = load_task(s.data, s.split).forget
    if loss == "dpo":
        assert plan.refusals_from == "each row's alternative_answer" and len(plan.refusals) == len(forget)
        oracle.refusals = [(forget[i.row]["question"], forget[i.row]["alternative_answer"]) for i in items]
    oracle.move(toward_refusals=1)
    parts, gradients = computed(s, model, plan, reference, items)
    right_parts, right_gradients = expected(loss, "policy_reference", oracle)
    assert parts["forget_loss"] == pytest.approx(right_parts["forget_loss"], rel=1e-4)
    for ours, right in zip(gradients, right_gradients, strict=True):
        assert (ours - right).norm() <= 1e-4 * right.norm()


def test_npos_mean_weight_is_equation_5s(settings, tmp_path):
    """W = 2 pi_theta^beta / (pi_theta^beta + pi_ref^beta), a mean over sequences."""
    s = settings_of(settings, "npo")
    model, plan, reference, items = prepared_step(s, tmp_path)
    oracle = Oracle(s, model.lm, items)
    oracle.move(toward_refusals=1)
    parts, _ = computed(s, model, plan, reference, items)
    power = torch.exp(BETA * oracle.log_ratios(oracle.answers).detach())  # (pi_theta / pi_ref)^beta
    assert parts["mean_W"] == pytest.approx(float((2 * power / (power + 1)).mean()), rel=1e-4)


@pytest.mark.parametrize("toward_refusals", (1, -1))
def test_ktos_baseline_is_the_refusals_mean_log_ratio_clamped_at_0(settings, tmp_path, toward_refusals):
    """Positive once the policy has moved towards the refusals, exactly 0 once it has moved away."""
    s = settings_of(settings, "kto")
    model, plan, reference, items = prepared_step(s, tmp_path)
    oracle = Oracle(s, model.lm, items)
    oracle.move(toward_refusals)
    mean = float(oracle.log_ratios(oracle.refusals).mean().detach())
    assert toward_refusals * mean > 1
    z = train_npo.kto_baseline(s, model, plan, items, reference, ALONE)
    assert not z.requires_grad and float(z) == pytest.approx(max(0.0, mean), rel=1e-4)


def mean_of(policy_logps):
    return policy_logps.mean()


def kept_mean_of(policy_logps):
    return policy_logps.mean(0, keepdim=True)


@pytest.mark.parametrize("wrong", (mean_of, kept_mean_of))
def test_a_loss_that_returns_a_mean_is_refused(wrong):
    plan = argparse.Namespace(objective=Objective(wrong))
    with pytest.raises(AssertionError, match="one value a sequence"):
        train_npo.forget_loss(plan, {"policy_logps": torch.zeros(3)})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_is_given_what_its_arguments_say(name):
    """What is called otherwise in the record is an argument, once each; a setting has a flag or a default."""
    objective, flags = OBJECTIVES[name], vars(build_parser().parse_args([]))
    assert objective.given.keys() <= inspect.signature(objective.loss).parameters.keys()
    assert len(objective.takes) == len(inspect.signature(objective.loss).parameters)
    assert set(objective.settings) <= flags.keys() | objective.defaults.keys()
