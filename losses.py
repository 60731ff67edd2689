"""The objectives of Negative Preference Optimization and of its baselines (Zhang, Lin, Bai, Mei, 2024).

They are pure functions of log-probabilities, which `train_npo.py`, `synthetic.py` and `theory_check.py` call.

    NPO, Eq. 3:         L = -(2/beta) log sigmoid(-beta (log pi_theta(y|x) - log pi_ref(y|x)))
    its weight, Eq. 5:  grad L = W * grad log pi_theta,  W = 2 pi_theta^beta / (pi_theta^beta + pi_ref^beta)

W is 1 where the policy equals the reference, and vanishes on what is forgotten. So NPO is gradient ascent
whose steps become small once an answer is unlikely. (In a run, ga is a mean over tokens and npo over
sequences, so npo's gradient is larger by the tokens per answer: `mean` in OBJECTIVES.)

Shapes: B sequences, N answer tokens, V vocabulary. `*_logps` are (B,): the SUM over a sequence's answer
tokens (the end-of-sequence token included) of log pi(token), in nats. `*_token_logps` are (N,): log pi of
each answer token. A function returns one value per sequence (B,) or per token (N,). The caller takes the
mean, because only the caller knows the size of the whole batch. Values and gradients are finite for |beta *
log-ratio| up to 1e4, because every formula stays in logarithms.

Where the paper's text and the authors' code differ, docs/departures.md says which we follow.
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


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log pi(target) per answer token in nats, at least float32: (N, V) logits, (N,) targets -> (N,)."""
    assert logits.shape[:-1] == targets.shape, (logits.shape, targets.shape)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def nll_loss(policy_logps: Tensor) -> Tensor:
    """-log pi_theta in nats, (B,) or (N,): RT and IDK (Section 2), and fine-tuning."""
    return -policy_logps


def ga_loss(policy_logps: Tensor) -> Tensor:
    """log pi_theta(y|x), (B,): gradient ascent on the forget set's likelihood (Eq. 1). Not bounded below."""
    return policy_logps


def npo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """-(2/beta) log sigmoid(-beta (log pi_theta - log pi_ref)), (B,) (Eq. 3). Bounded below by 0.

    It is (2/beta) log 2 where the policy equals the reference. The factor 2/beta makes W = 1 there, and
    gradient ascent the limit beta -> 0 (Proposition 1). Raises ValueError for a beta that is not positive.
    """
    _check(beta, policy_logps, reference_logps)
    return -(2 / beta) * F.logsigmoid(-beta * (policy_logps - reference_logps))


def npo_weight(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """W, (B,) in (0, 2) (Eq. 5): NPO's gradient is GA's times W. 2 sigmoid(..) cannot become 0/0."""
    _check(beta, policy_logps, reference_logps)
    return 2 * torch.sigmoid(beta * (policy_logps - reference_logps))


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor, beta: float) -> Tensor:
    """-(1/beta) log sigmoid(beta (Delta_chosen - Delta_rejected)), (B,) (Eq. 2), where Delta is log pi_theta
    - log pi_ref. The chosen answer is the refusal ("I don't know"), the rejected one is the forget answer."""
    _check(beta, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return -(1 / beta) * F.logsigmoid(beta * (chosen - rejected))


def kto_loss(policy_logps: Tensor, reference_logps: Tensor, kl_baseline: Tensor | float,
             beta: float) -> Tensor:
    """-(2/beta) log sigmoid(beta (z - (log pi_theta - log pi_ref))), (B,), with z = `kl_baseline` >= 0.
    It is the log-sigmoid variant of KTO's loss for undesirable answers (Ethayarajh et al. 2024), so z = 0
    gives NPO. z estimates a divergence over the global batch (`train_npo.kto_baseline`), without gradient."""
    _check(beta, policy_logps, reference_logps)
    baseline = torch.as_tensor(kl_baseline, dtype=policy_logps.dtype, device=policy_logps.device).detach()
    return -(2 / beta) * F.logsigmoid(beta * (baseline - (policy_logps - reference_logps)))


def simnpo_loss(policy_logps: Tensor, answer_lengths: Tensor, beta: float = 2.5,
                gamma: float = 0.0) -> Tensor:
    """-(2/beta) log sigmoid(-(beta/|y|) log pi_theta - gamma), (B,) (Fan et al. 2024): no reference, and
    normalised by `answer_lengths` (B,), the numbers of answer tokens, at least 1."""
    _check(beta, policy_logps, answer_lengths)
    return -(2 / beta) * F.logsigmoid(-beta * policy_logps / answer_lengths - gamma)


def kl_loss(policy_logits: Tensor, reference_logits: Tensor, direction: str = "policy_reference") -> Tensor:
    """K per answer token in nats, (N, V) and (N, V) -> (N,) (Section 2). The reference side has no gradient.
    "policy_reference": D(pi_theta || pi_ref), the paper's K. "reference_policy": D(pi_ref || pi_theta), the
    authors' code. Raises ValueError for another direction."""
    if direction not in KL_DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(KL_DIRECTIONS)}, got {direction!r}")
    assert policy_logits.shape == reference_logits.shape, (policy_logits.shape, reference_logits.shape)
    dtype = torch.promote_types(policy_logits.dtype, torch.float32)
    policy = policy_logits.log_softmax(-1, dtype=dtype)
    reference = reference_logits.detach().log_softmax(-1, dtype=dtype)
    first, second = (policy, reference) if direction == "policy_reference" else (reference, policy)
    return (first.exp() * (first - second)).sum(-1)


# ---------------------------------------------------------------- newer objectives, per answer token

# They were published as means over the forget answers' tokens. p = pi_theta(y_t|..), q = pi_ref(y_t|..).
# No gradient flows through a weight or a target. Defaults are the published ones. docs/beyond.md says where
# implementations differ.

def wga_loss(policy_token_logps: Tensor, beta: float = 1.0) -> Tensor:
    """p^beta log p, (N,): gradient ascent whose weight vanishes on forgotten tokens (WGA, Wang et al. 2025,
    arXiv 2502.19301)."""
    _check(beta, policy_token_logps)
    return (beta * policy_token_logps.detach().clamp(max=0)).exp() * policy_token_logps


def satimp_loss(policy_token_logps: Tensor, beta: float = 5.0, beta2: float = 1.0) -> Tensor:
    """p^beta (1 - p)^beta2 log p, (N,): saturation times importance (SatImp, Yang et al. 2025, arXiv
    2505.11953; beta and beta2 are its beta_1 and beta_2)."""
    _check(beta, policy_token_logps)
    _check(beta2)
    logps = policy_token_logps.detach().clamp(max=0)  # rounding can lift log p above 0, and 1 - p below 0
    return (beta * logps).exp() * (-logps.expm1()) ** beta2 * policy_token_logps


def tnpo_loss(policy_token_logps: Tensor, reference_token_logps: Tensor, beta: float = 4.0) -> Tensor:
    """2 p^beta / (p^beta + q^beta) log p, (N,): gradient ascent with NPO's weight W (Eq. 5), computed per
    token (TNPO, Wang et al. 2025, arXiv 2502.19301)."""
    return npo_weight(policy_token_logps, reference_token_logps, beta).detach() * policy_token_logps


def ceu_loss(policy_logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_v r_v log p_v, (N, V) and (N,) -> (N,): r is the softmax of the policy's own logits with the
    target's logit at -infinity (CE-U, Yang 2025, arXiv 2503.01224). The caller skips the first token of each
    answer (`Objective.skips`)."""
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

# What the step can compute from a batch. Log-probabilities are sums per sequence unless they say token.
# Targets and lengths are the forget answers', for losses with a policy_ input. kl_baseline is KTO's z.
COMPUTED = ("policy_logps", "refusal_logps", "reference_logps", "reference_refusal_logps", "answer_lengths",
            "kl_baseline", "policy_token_logps", "reference_token_logps", "policy_logits", "reference_logits",
            "targets")
signature = cache(inspect.signature)  # every step asks for it


class Objective(NamedTuple):
    """A loss on the forget rows. The loss's parameter names select its inputs: a parameter is one of
    COMPUTED, or a setting such as beta. A setting's default in the signature wins over the preset's value,
    and a flag wins over both."""
    loss: Callable[..., Tensor]  # one value per sequence (B,) or per answer token (N,), never their mean
    renamed: dict[str, str] = {}  # parameter name -> name in COMPUTED, where the two differ
    mean: str = "sequences"  # the global batch's loss is a mean over sequences or over (answer) tokens
    value_at_start_times_beta: float | None = None  # checked at step 0; times 1 for a loss without beta
    weight: Callable[..., Tensor] | None = None  # W, with the same parameters as the loss; 1 at the start
    skips: int = 0  # the loss leaves out this many tokens at the beginning of an answer
    alternatives: bool = False  # a row's `alternative_answer`, where rows have one, replaces the refusal

    @property
    def inputs(self) -> dict[str, inspect.Parameter]:
        """Name in COMPUTED, or of a setting -> parameter of the loss, in the loss's order."""
        return {self.renamed.get(name, name): p for name, p in signature(self.loss).parameters.items()}

    @property
    def settings(self) -> tuple[str, ...]:
        """Command-line settings that this loss uses."""
        return tuple(name for name in self.inputs if name not in COMPUTED)

    @property
    def defaults(self) -> dict[str, float]:
        """Settings for which the loss has a default of its own."""
        return {name: p.default for name, p in self.inputs.items()
                if name in self.settings and p.default is not p.empty}

    @property
    def needs_answers(self) -> bool:
        """Whether the policy reads the forget rows' own answers (idk reads refusals alone)."""
        return any(name.startswith("policy_") for name in self.inputs)

    @property
    def needs_refusals(self) -> bool:
        return any("refusal" in name or name == "kl_baseline" for name in self.inputs)


OBJECTIVES = {
    "sft": Objective(nll_loss, mean="tokens"),
    "ga": Objective(ga_loss, mean="tokens"),
    "idk": Objective(nll_loss, {"policy_logps": "refusal_logps"}, mean="tokens"),
    "dpo": Objective(dpo_loss, {
        "policy_chosen_logps": "refusal_logps", "policy_rejected_logps": "policy_logps",
        "reference_chosen_logps": "reference_refusal_logps", "reference_rejected_logps": "reference_logps"},
        value_at_start_times_beta=math.log(2), alternatives=True),
    "kto": Objective(kto_loss, value_at_start_times_beta=2 * math.log(2)),
    "npo": Objective(npo_loss, value_at_start_times_beta=2 * math.log(2), weight=npo_weight),
    "simnpo": Objective(simnpo_loss),
    "wga": Objective(wga_loss, mean="tokens"),
    "satimp": Objective(satimp_loss, mean="tokens"),
    "tnpo": Objective(tnpo_loss, mean="tokens", weight=npo_weight),
    "ceu": Objective(ceu_loss, mean="tokens", skips=1),
    "undial": Objective(undial_loss, mean="tokens"),
}
