"""The objectives of Negative Preference Optimization and of its baselines (Zhang, Lin, Bai, Mei, 2024).

They are pure functions of log-probabilities, which `train_npo.py`, `synthetic.py` and `theory_check.py` call.
The tables at the end name them for the command line: OBJECTIVES on forget rows, TERMS on retain rows.

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

Number = float | Tensor  # a tensor broadcasts with the log-probabilities
KL_DIRECTIONS = ("policy_reference", "reference_policy")


def _check(beta: Number, *logps: Tensor):
    if not (torch.all((beta > 0) & (beta < math.inf)) if isinstance(beta, Tensor) else 0 < beta < math.inf):
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
    """-log pi_theta in nats, (B,) or (N,): RT (Section 2), and fine-tuning."""
    return -policy_logps


def idk_loss(policy_chosen_logps: Tensor) -> Tensor:
    """-log pi_theta of the refusal ("I don't know"), (B,): the paper's FG/IDK (Section 2)."""
    return nll_loss(policy_chosen_logps)


def ga_loss(policy_logps: Tensor) -> Tensor:
    """log pi_theta(y|x), (B,): gradient ascent on the forget set's likelihood (Eq. 1). Not bounded below."""
    return policy_logps


def npo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: Number) -> Tensor:
    """-(2/beta) log sigmoid(-beta (log pi_theta - log pi_ref)), (B,) (Eq. 3). Bounded below by 0.

    It is (2/beta) log 2 where the policy equals the reference. The factor 2/beta makes W = 1 there, and
    gradient ascent the limit beta -> 0 (Proposition 1). Raises ValueError for a beta that is not positive.
    """
    _check(beta, policy_logps, reference_logps)
    return -(2 / beta) * F.logsigmoid(-beta * (policy_logps - reference_logps))


def npo_weight(policy_logps: Tensor, reference_logps: Tensor, beta: Number) -> Tensor:
    """W, (B,) in (0, 2) (Eq. 5): NPO's gradient is GA's times W. 2 sigmoid(..) cannot become 0/0."""
    _check(beta, policy_logps, reference_logps)
    return 2 * torch.sigmoid(beta * (policy_logps - reference_logps))


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor, beta: Number) -> Tensor:
    """-(1/beta) log sigmoid(beta (Delta_chosen - Delta_rejected)), (B,) (Eq. 2), where Delta is log pi_theta
    - log pi_ref. The chosen answer is the refusal ("I don't know"), the rejected one is the forget answer."""
    _check(beta, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return -(1 / beta) * F.logsigmoid(beta * (chosen - rejected))


def kto_loss(policy_logps: Tensor, reference_logps: Tensor, kl_baseline: Number, beta: Number) -> Tensor:
    """-(2/beta) log sigmoid(beta (z - (log pi_theta - log pi_ref))), (B,), with z = `kl_baseline` >= 0.
    It is the log-sigmoid variant of KTO's loss for undesirable answers (Ethayarajh et al. 2024), so z = 0
    gives NPO. z estimates a divergence over the global batch (`train_npo.kto_baseline`), without gradient."""
    _check(beta, policy_logps, reference_logps)
    baseline = torch.as_tensor(kl_baseline, dtype=policy_logps.dtype, device=policy_logps.device).detach()
    return -(2 / beta) * F.logsigmoid(beta * (baseline - (policy_logps - reference_logps)))


def simnpo_loss(policy_logps: Tensor, answer_lengths: Tensor, beta: Number = 2.5,
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

def wga_loss(policy_token_logps: Tensor, beta: Number = 1.0) -> Tensor:
    """p^beta log p, (N,): gradient ascent whose weight vanishes on forgotten tokens (WGA, Wang et al. 2025,
    arXiv 2502.19301)."""
    _check(beta, policy_token_logps)
    return (beta * policy_token_logps.detach().clamp(max=0)).exp() * policy_token_logps


def satimp_loss(policy_token_logps: Tensor, beta: Number = 5.0, beta2: Number = 1.0) -> Tensor:
    """p^beta (1 - p)^beta2 log p, (N,): saturation times importance (SatImp, Yang et al. 2025, arXiv
    2505.11953; beta and beta2 are its beta_1 and beta_2)."""
    _check(beta, policy_token_logps)
    _check(beta2)
    logps = policy_token_logps.detach().clamp(max=0)  # rounding can lift log p above 0, and 1 - p below 0
    return (beta * logps).exp() * (-logps.expm1()) ** beta2 * policy_token_logps


def tnpo_loss(policy_token_logps: Tensor, reference_token_logps: Tensor, beta: Number = 4.0) -> Tensor:
    """2 p^beta / (p^beta + q^beta) log p, (N,): gradient ascent with NPO's weight W (Eq. 5), computed per
    token (TNPO, Wang et al. 2025, arXiv 2502.19301)."""
    return npo_weight(policy_token_logps, reference_token_logps, beta).detach() * policy_token_logps


def ceu_loss(policy_logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_v r_v log p_v, (N, V) and (N,) -> (N,): r is the softmax of the policy's own logits with the
    target's logit at -infinity (CE-U, Yang 2025, arXiv 2503.01224). The caller skips the first token of each
    answer (`Objective.skips`)."""
    assert policy_logits.shape[:-1] == targets.shape, (policy_logits.shape, targets.shape)
    dtype = torch.promote_types(policy_logits.dtype, torch.float32)
    logits = policy_logits.detach().to(dtype)
    r = logits.scatter(-1, targets.unsqueeze(-1), -math.inf).softmax(-1)
    return -(r * policy_logits.log_softmax(-1, dtype=dtype)).sum(-1)


def undial_loss(policy_logits: Tensor, reference_logits: Tensor, targets: Tensor,
                beta: Number = 10.0) -> Tensor:
    """-sum_v r_v log p_v, (N, V), (N, V) and (N,) -> (N,), r = softmax(z_ref - beta 1[v = target]): the
    reference's distribution with the target made less likely (UNDIAL, Dong et al. 2024, arXiv 2402.10052)."""
    _check(beta, policy_logits, reference_logits)
    assert policy_logits.shape[:-1] == targets.shape, (policy_logits.shape, targets.shape)
    dtype = torch.promote_types(policy_logits.dtype, torch.float32)
    reference = reference_logits.detach().to(dtype)
    less = -torch.as_tensor(beta).to(reference).clamp(max=torch.finfo(dtype).max).expand(targets.shape)
    r = reference.scatter_add(-1, targets.unsqueeze(-1), less.unsqueeze(-1)).softmax(-1)
    return -(r * policy_logits.log_softmax(-1, dtype=dtype)).sum(-1)


# ---------------------------------------------------------------- what `--loss NAME` and `+NAME` mean

# What the step can compute from its rows: forget rows for an objective, retain rows for a term. *_logps are
# sums per sequence unless they say token; *_states are the last hidden states where answer tokens are
# predicted, (N, H). For objectives alone: chosen is the refusal and rejected the forget answer, as DPO calls
# them, and kl_baseline is KTO's z.
COMPUTED = ("policy_logps", "policy_token_logps", "policy_logits", "policy_states", "reference_logps",
            "reference_token_logps", "reference_logits", "reference_states", "targets", "answer_lengths",
            "policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps",
            "reference_rejected_logps", "kl_baseline")
signature = cache(inspect.signature)  # every step asks for it


class Objective(NamedTuple):
    """A loss on the forget rows, or a term on the retain rows. The loss's parameter names select its inputs:
    a parameter is one of COMPUTED, or a setting such as beta. A setting's default in the signature wins over
    the preset's value, and a flag wins over both."""
    loss: Callable[..., Tensor]  # one value per sequence (B,) or per answer token (N,), never their mean
    mean: str = "sequences"  # the sum over the global batch is divided by its sequences, or by answer tokens
    value_at_start_times_beta: float | None = None  # checked at step 0: the loss is this / beta, or this
    weight: Callable[..., Tensor] | None = None  # W, with the same parameters as the loss; 1 at the start
    skips: int = 0  # tokens at an answer's beginning that the loss leaves out (Plan moves the answer's start)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The loss's parameters, in its order."""
        return tuple(signature(self.loss).parameters)

    @property
    def settings(self) -> tuple[str, ...]:
        """Those parameters that are settings."""
        return tuple(name for name in self.inputs if name not in COMPUTED)

    @property
    def defaults(self) -> dict[str, float]:
        """Settings for which the loss has a default of its own."""
        parameters = signature(self.loss).parameters
        return {name: parameters[name].default for name in self.settings
                if parameters[name].default is not inspect.Parameter.empty}

    @property
    def needs_answers(self) -> bool:
        """Whether the policy reads the rows' own answers (idk reads refusals alone)."""
        return any(name.startswith("policy_") and "chosen" not in name for name in self.inputs)

    @property
    def needs_refusals(self) -> bool:
        return any("chosen" in name or name == "kl_baseline" for name in self.inputs)

    @property
    def needs_reference(self) -> bool:
        """Whether the reference reads the rows' own answers."""
        return any(name.startswith("reference_") and "chosen" not in name for name in self.inputs)

    @property
    def needs_reference_states(self) -> bool:
        return not {"reference_logits", "reference_states"}.isdisjoint(self.inputs)


OBJECTIVES = {
    "sft": Objective(nll_loss, mean="tokens"),
    "ga": Objective(ga_loss, mean="tokens"),
    "idk": Objective(idk_loss, mean="tokens"),
    "dpo": Objective(dpo_loss, value_at_start_times_beta=math.log(2)),
    "kto": Objective(kto_loss, value_at_start_times_beta=2 * math.log(2)),
    "npo": Objective(npo_loss, value_at_start_times_beta=2 * math.log(2), weight=npo_weight),
    "simnpo": Objective(simnpo_loss),
    "wga": Objective(wga_loss, mean="tokens"),
    "satimp": Objective(satimp_loss, mean="tokens"),
    "tnpo": Objective(tnpo_loss, mean="tokens", weight=npo_weight),
    "ceu": Objective(ceu_loss, mean="tokens", skips=1),
    "undial": Objective(undial_loss, mean="tokens"),
}

# Terms that keep the rest. The key NAME gives the flag --NAME-weight, the method's name +NAME, the log's key
# NAME_loss, and --NAME-direction for a setting `direction`.
TERMS = {
    "rt": Objective(nll_loss, mean="tokens"),
    "kl": Objective(kl_loss, mean="tokens", value_at_start_times_beta=0.0),
}


def long_name(term: str) -> str:
    """A term's name in flags and in the log: the paper's RT is called retain there."""
    return {"rt": "retain"}.get(term, term)
