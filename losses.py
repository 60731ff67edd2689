"""The objectives of Negative Preference Optimization and of its baselines (Zhang, Lin, Bai, Mei, 2024): pure
functions of log-probabilities, which know no model, no device and no setting. The Llama of `train_npo.py`,
the random-feature model of `synthetic.py` and the theorem of `theory_check.py` all call them.

    NPO, Eq. 3:         L = -(2/beta) log sigmoid(-beta (log pi_theta(y|x) - log pi_ref(y|x)))
    its weight, Eq. 5:  grad L = W * grad log pi_theta,  W = 2 pi_theta^beta / (pi_theta^beta + pi_ref^beta)

W is 1 where the policy still is the reference and vanishes on what is forgotten: gradient ascent that knows
when to stop.

Shapes: B sequences, N answer tokens, V vocabulary. `*_logps` are (B,): the SUM over a sequence's answer
tokens (the end-of-sequence token included) of log pi(token), in nats. Functions return one value per sequence
(B,) or token (N,); means are taken by the caller, who knows the size of the whole batch. All are finite,
value and gradient, for |beta * log-ratio| up to 1e4: no probability is ever formed where its logarithm will
do. `*_token_logps` are (N,): log pi(y_t|..) of each answer token, what the newer objectives weigh one by one.

Where we differ from the authors' code, we follow the paper's text: DPO has 1/beta (Eq. 2; theirs 2/beta), K
is D(policy || reference) by default (theirs is the other direction). KTO is in none of its equations; see
`kto_loss`.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KL_DIRECTIONS = ("policy_reference", "reference_policy")


def _check(beta: float, *logps: Tensor):
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a positive finite number, got {beta}")
    # Broadcasting (B,) with (B, 1) would silently pair every sequence with every other.
    if len({x.shape for x in logps}) > 1:
        raise ValueError(f"log-probabilities must have one shape, got {[tuple(x.shape) for x in logps]}")


def _expect(holds: Tensor, sentence: str, value: Tensor):
    """Raises ValueError on a CPU. A GPU isn't asked: everything would wait for its answer."""
    if holds.device.type == "cpu" and not holds.all():
        raise ValueError(f"{sentence}, got {value}")


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log pi(target) for each answer token, (N, V) logits and (N,) targets -> (N,), nats, at least float32.

    The target's logit less the log-sum-exp: the softmax is never materialised.
    """
    assert logits.shape[:-1] == targets.shape, (logits.shape, targets.shape)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def nll_loss(policy_logps: Tensor) -> Tensor:
    """-log pi_theta, nats, (B,) or of tokens (N,): the retain loss RT, FG and IDK (Section 2), and sft."""
    return -policy_logps


def ga_loss(policy_logps: Tensor) -> Tensor:
    """log pi_theta(y|x), (B,): gradient ascent on the forget set's likelihood (Eq. 1). Not bounded below."""
    return policy_logps


def npo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """-(2/beta) log sigmoid(-beta (log pi_theta - log pi_ref)), (B,) (Eq. 3). Bounded below by 0.

    (2/beta) log 2 where the policy is the reference. The factor 2/beta makes W = 1 there, and gradient ascent
    the limit beta -> 0 (Proposition 1). Raises ValueError for a beta that isn't positive, or for shapes that
    differ.
    """
    _check(beta, policy_logps, reference_logps)
    return -(2 / beta) * F.logsigmoid(-beta * (policy_logps - reference_logps))


def npo_weight(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """W = 2 pi_theta^beta / (pi_theta^beta + pi_ref^beta), (B,) in (0, 2) (Eq. 5): what NPO's gradient
    multiplies GA's with.

    Written as 2 sigmoid(beta * log-ratio), which neither over- nor underflows into 0/0.
    """
    _check(beta, policy_logps, reference_logps)
    return 2 * torch.sigmoid(beta * (policy_logps - reference_logps))


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor, beta: float) -> Tensor:
    """-(1/beta) log sigmoid(beta (Delta_chosen - Delta_rejected)), (B,) (Eq. 2), Delta = log pi_theta - log
    pi_ref.

    Chosen is the refusal ("I don't know"), rejected the forget answer. NPO is twice this without the chosen
    half.
    """
    _check(beta, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return -(1 / beta) * F.logsigmoid(beta * (chosen - rejected))


def kto_loss(policy_logps: Tensor, reference_logps: Tensor, kl_baseline: Tensor | float,
             beta: float) -> Tensor:
    """-(2/beta) log sigmoid(beta (z - (log pi_theta - log pi_ref))), (B,), z = `kl_baseline` >= 0: KTO's
    undesirable side.

    After Ethayarajh et al. (2024), whose loss is lambda (1 - sigmoid(beta (z - r))); this is its log-sigmoid
    variant, so that z = 0 gives NPO. The authors' code has 1 - (2/beta) log sigmoid(z - beta r) with z
    unclamped. z estimates a divergence over the global batch (see `kto_baseline`); no gradient flows through
    it.
    """
    _check(beta, policy_logps, reference_logps)
    baseline = torch.as_tensor(kl_baseline, dtype=policy_logps.dtype, device=policy_logps.device).detach()
    _expect(~(baseline < 0), "kl_baseline must not be negative (clamp it at 0)", baseline)  # NaN may pass
    return -(2 / beta) * F.logsigmoid(beta * (baseline - (policy_logps - reference_logps)))


def simnpo_loss(policy_logps: Tensor, answer_lengths: Tensor, beta: float, gamma: float = 0.0) -> Tensor:
    """-(2/beta) log sigmoid(-(beta/|y|) log pi_theta - gamma), (B,) (Fan et al. 2024): no reference,
    length-normalised.

    `answer_lengths` (B,) counts the answer's tokens, at least 1.
    """
    _check(beta, policy_logps, answer_lengths)
    _expect(answer_lengths >= 1, "answer_lengths must be at least 1", answer_lengths)
    return -(2 / beta) * F.logsigmoid(-beta * policy_logps / answer_lengths - gamma)


def kl_loss(policy_logits: Tensor, reference_logits: Tensor, direction: str = "policy_reference") -> Tensor:
    """K per answer token in nats, (N, V) and (N, V) -> (N,) (Section 2). The reference side has no gradient.

    "policy_reference": D(pi_theta || pi_ref), the paper's K. "reference_policy": D(pi_ref || pi_theta), the
    authors' code. Raises ValueError for another direction.
    """
    if direction not in KL_DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(KL_DIRECTIONS)}, got {direction!r}")
    assert policy_logits.shape == reference_logits.shape, (policy_logits.shape, reference_logits.shape)
    dtype = torch.promote_types(policy_logits.dtype, torch.float32)
    policy = policy_logits.log_softmax(-1, dtype=dtype)
    reference = reference_logits.detach().log_softmax(-1, dtype=dtype)
    first, second = (policy, reference) if direction == "policy_reference" else (reference, policy)
    return (first.exp() * (first - second)).sum(-1)


# ---------------------------------------------------------------- newer objectives, per answer token

# Published as means over the forget answers' tokens. p = pi_theta(y_t|..), q = pi_ref(y_t|..); no gradient
# flows through a weight or a target. Defaults are the published ones; where implementations differ:
# docs/beyond.md.

def wga_loss(policy_token_logps: Tensor, beta: float = 1.0) -> Tensor:
    """p^beta log p, (N,): gradient ascent with a weight that vanishes on what is forgotten (WGA, Wang et al.
    2025, arXiv 2502.19301)."""
    _check(beta, policy_token_logps)
    return (beta * policy_token_logps.detach().clamp(max=0)).exp() * policy_token_logps


def satimp_loss(policy_token_logps: Tensor, beta: float = 5.0, beta2: float = 1.0) -> Tensor:
    """p^beta (1 - p)^beta2 log p, (N,): saturation times importance (SatImp, Yang et al. 2025, arXiv
    2505.11953; beta and beta2 are its beta_1 and beta_2)."""
    _check(beta, policy_token_logps)
    _check(beta2)
    logps = policy_token_logps.detach().clamp(max=0)  # rounding may lift it above 0, where 1 - p has no power
    return (beta * logps).exp() * (-logps.expm1()) ** beta2 * policy_token_logps


def tnpo_loss(policy_token_logps: Tensor, reference_token_logps: Tensor, beta: float = 4.0) -> Tensor:
    """2 p^beta / (p^beta + q^beta) log p, (N,): NPO's weight W (Eq. 5) of a token in place of a sequence
    (TNPO, Wang et al. 2025, arXiv 2502.19301). log p where the policy is the reference."""
    return npo_weight(policy_token_logps, reference_token_logps, beta).detach() * policy_token_logps


def ceu_loss(policy_logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_v r_v log p_v, (N, V) and (N,) -> (N,), r the softmax of the policy's own logits with the target's
    at -infinity (CE-U, Yang 2025, arXiv 2503.01224): UNDIAL of the policy itself. That an answer's first
    token is skipped, as published, is the caller's (`Objective.skips`)."""
    beyond_every_logit = torch.finfo(torch.float64).max
    return undial_loss(policy_logits, policy_logits, targets, beyond_every_logit)


def undial_loss(policy_logits: Tensor, reference_logits: Tensor, targets: Tensor,
                beta: float = 10.0) -> Tensor:
    """-sum_v r_v log p_v, (N, V), (N, V) and (N,) -> (N,), r = softmax(z_ref - beta 1[v = target]): the
    reference's distribution with the target made less likely (UNDIAL, Dong et al. 2024, arXiv 2402.10052)."""
    _check(beta, policy_logits, reference_logits)
    assert policy_logits.shape[:-1] == targets.shape, (policy_logits.shape, targets.shape)
    dtype = torch.promote_types(policy_logits.dtype, torch.float32)
    reference = reference_logits.detach().to(dtype)
    less = reference.new_full((*targets.shape, 1), -min(beta, torch.finfo(dtype).max))
    r = reference.scatter_add(-1, targets.unsqueeze(-1), less).softmax(-1)
    return -(r * policy_logits.log_softmax(-1, dtype=dtype)).sum(-1)


# ---------------------------------------------------------------- what `--loss NAME` means

# What is computed of a batch, by name: log pi of the row's own answer and of a refusal, the policy's and the
# reference's, sums in nats; the answers' tokens; KTO's z. Of the own answer's tokens: log pi, and logits (a
# chunk of tokens at a time, with the tokens that they should predict).
COMPUTED = ("policy_logps", "refusal_logps", "reference_logps", "reference_refusal_logps", "answer_lengths",
            "kl_baseline", "policy_token_logps", "reference_token_logps", "policy_logits", "reference_logits",
            "targets")
signature = cache(inspect.signature)  # asked in every step


class Objective(NamedTuple):
    """A loss on the forget rows. Its arguments' names say what it needs: of COMPUTED, or a setting, such as
    beta, whose default wins over the preset's, and a flag over it. Nothing else asks which loss it is."""
    loss: Callable[..., Tensor]  # one value a sequence (B,) or answer token (N,), never their mean
    given: dict[str, str] = {}  # an argument's name -> what it is given, where that is called otherwise
    mean: str = "sequences"  # what the global batch's mean is over: sequences or (answer) tokens
    at_reference: float | None = None  # its value where the policy is the reference, times beta if it has one
    weight: Callable[..., Tensor] | None = None  # W, 1 at the reference: of the same arguments as the loss
    skips: int = 0  # an answer's first tokens that the loss passes over
    alternatives: bool = False  # a row's `alternative_answer`, where rows have one, stands for the refusal

    @property
    def takes(self) -> dict[str, inspect.Parameter]:
        """What it is given -> the argument, in their order."""
        return {self.given.get(name, name): own for name, own in signature(self.loss).parameters.items()}

    @property
    def settings(self) -> tuple[str, ...]:
        """The flags that it has an ear for."""
        return tuple(name for name in self.takes if name not in COMPUTED)

    @property
    def defaults(self) -> dict[str, float]:
        """Those of its settings that its arguments bring along."""
        return {name: own.default for name, own in self.takes.items()
                if name in self.settings and own.default is not own.empty}

    @property
    def needs_refusals(self) -> bool:
        return any("refusal" in name or name == "kl_baseline" for name in self.takes)


OBJECTIVES = {
    "sft": Objective(nll_loss, mean="tokens"),
    "ga": Objective(ga_loss, mean="tokens"),
    "idk": Objective(nll_loss, {"policy_logps": "refusal_logps"}, mean="tokens"),
    "dpo": Objective(dpo_loss, {
        "policy_chosen_logps": "refusal_logps", "policy_rejected_logps": "policy_logps",
        "reference_chosen_logps": "reference_refusal_logps", "reference_rejected_logps": "reference_logps"},
        at_reference=math.log(2), alternatives=True),
    "kto": Objective(kto_loss, at_reference=2 * math.log(2)),
    "npo": Objective(npo_loss, at_reference=2 * math.log(2), weight=npo_weight),
    "simnpo": Objective(simnpo_loss),
    "wga": Objective(wga_loss, mean="tokens"),
    "satimp": Objective(satimp_loss, mean="tokens"),
    "tnpo": Objective(tnpo_loss, mean="tokens", weight=npo_weight),
    "ceu": Objective(ceu_loss, mean="tokens", skips=1),
    "undial": Objective(undial_loss, mean="tokens"),
}
