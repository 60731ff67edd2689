"""log pi(answer | prompt), the one thing that unlearning asks of a language model, and K against a reference.

Only hidden states at answer positions meet the LM head, a chunk of tokens at a time: logits of every token,
(S, T, V), never exist. Shapes: S sequences of T tokens; N answer tokens, M the last of them, which have a K;
H hidden size, V vocabulary.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from data.batches import TokenBatch
from losses import kl_loss, token_logps
from models.sharded import gathered
from support.world import ALONE, World

CHUNK_BYTES = 32 * 2**20  # of float32 logits at a time: enough for a fast product, little beside the model
KEPT_CHUNKS = 4  # the last ones' logits stay for the backward pass; the others' are computed once more there
LEAST_VARIANCE = 1e-6  # square nats, of log pi under the model's own distribution; min-k++ divides by it


class OnLogits(NamedTuple):
    """A loss that asks for logits, at a batch's first answer tokens."""
    tokens: int = 0  # so many
    loss: Callable | None = None  # of the policy's logits (n, V), the reference's, targets (n,): (n,)
    states: tuple[Tensor, Tensor] | None = None  # as `kl_states`, at these tokens; without: logits of (0, V)


NOTHING = OnLogits()


class AnswerModel(nn.Module):
    """A causal language model that returns log-probabilities of answers, float32, in nats."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, batch: TokenBatch, *asked) -> tuple[Tensor, Tensor]:
        """`answer_values` of the batch; asked: its `kl_states`, `direction` and `on_logits`."""
        head = self.lm.get_output_embeddings().weight
        return answer_values(self.hidden(batch), head, batch.targets, *asked)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Last hidden states where the answers' tokens are predicted, (N, H)."""
        inputs = batch.attention(self.lm.dtype)
        states = self.lm.base_model(input_ids=batch.ids, use_cache=False, **inputs).last_hidden_state
        return states[batch.sequences, batch.positions]

    @torch.no_grad()
    def scores(self, batch: TokenBatch, own_tokens: int,
               reference: tuple[Tensor, Tensor] | None = None) -> tuple:
        """All that an evaluation asks, from one pass: log pi (N,), nats; of the last A = `own_tokens` the
        `hits_and_standardised` (A,); of the last M D(pi_ref || pi) (M,), `reference` as `kl_states`."""
        hidden, weight = as_products(self.hidden(batch), self.lm.get_output_embeddings().weight)
        known, known_weight = (x.to(hidden.dtype) for x in reference or (hidden[:0], weight))
        others, size, chunks = len(hidden) - own_tokens, chunk_tokens(len(weight)), []
        for at in range(0, len(hidden), size):
            part = slice(at, at + size)
            compared = known[with_kl(part, len(hidden) - len(known))]
            logits, known_logits = chunk_logits(hidden[part], weight, compared, known_weight)
            targets, own = batch.targets[part], max(0, others - at)  # where the rows' own answers begin
            logps = token_logps(logits, targets)
            kls = kl_loss(logits[len(logits) - len(known_logits):], known_logits, "reference_policy")
            chunks.append((logps, *hits_and_standardised(logits[own:], targets[own:], logps[own:]), kls))
        return tuple(map(torch.cat, zip(*chunks, strict=True)))

    def next_logits(self, **inputs) -> Tensor:
        """Logits of the token that follows each sequence, (S, V), as the model itself computes them."""
        return self.lm(**inputs, logits_to_keep=1).logits[:, -1]

    def all_logits(self, **inputs) -> Tensor:
        """Logits at every position, (S, T, V), as the model itself computes them: for checks alone."""
        return self.lm(**inputs, use_cache=False).logits


@contextmanager
def untouched(model: AnswerModel, world: World = ALONE):
    """Evaluation mode inside, the mode as it was outside. Nothing inside draws a random number, or goes by
    the model's generation settings."""
    training = model.lm.training
    model.lm.eval()
    try:
        with gathered(model, world):
            yield
    finally:
        model.lm.train(training)


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits exist at one time."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def as_products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's precision, as any linear layer takes them."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype)


def with_kl(part: slice, first: int) -> slice:
    """Of a chunk's tokens those with a K, which all from `first` on have, as places among these."""
    return slice(max(0, part.start - first), max(0, part.stop - first))


def answer_values(hidden: Tensor, weight: Tensor, targets: Tensor,
                  kl_states: tuple[Tensor, Tensor] | None = None,
                  direction: str = "policy_reference",
                  on_logits: OnLogits = NOTHING) -> tuple[Tensor, Tensor]:
    """From hidden states (N, H), the LM head's weight (V, H) and targets (N,): log pi of each answer token
    (N,), in its place the loss of those that have one `on_logits`; and K of the last M (M,), empty without
    `kl_states`: the reference's hidden states at these M tokens (M, H) and its LM head's weight (V, H)."""
    hidden, weight = as_products(hidden, weight)
    first_hidden, reference_weight = on_logits.states or (hidden[:0].detach(), weight.detach())
    kl_hidden, reference_weight = kl_states or (hidden[:0].detach(), reference_weight)  # M = 0: no K
    first_hidden, kl_hidden = first_hidden.to(hidden.dtype), kl_hidden.to(hidden.dtype)
    reference_weight = reference_weight.to(hidden.dtype)  # one head, whoever asks for it
    tokens, size, values = on_logits.tokens, chunk_tokens(len(weight)), []
    # No chunk has tokens of both kinds.
    chunks = [(slice(at, min(at + size, tokens)), on_logits.loss) for at in range(0, tokens, size)]
    chunks += [(slice(at, at + size), None) for at in range(tokens, len(hidden), size)]
    for number, (part, loss) in enumerate(chunks):
        compared = first_hidden[part] if loss else kl_hidden[with_kl(part, len(hidden) - len(kl_hidden))]
        inputs = hidden[part], weight, compared, reference_weight
        what = targets[part], direction, loss
        if len(hidden) <= size:  # a small vocabulary or few tokens: nothing to save
            values.append(values_of_logits(*chunk_logits(*inputs), *what))
        elif number < len(chunks) - KEPT_CHUNKS:
            values.append(recomputed(values_of_states, inputs, *what))
        else:
            values.append(recomputed(values_of_logits, *chunk_logits(*inputs), *what))
    logps, kls = zip(*values, strict=True)
    return torch.cat(logps), torch.cat(kls)


recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # backward keeps inputs alone


def values_of_states(inputs: tuple, *what) -> tuple[Tensor, Tensor]:
    return values_of_logits(*chunk_logits(*inputs), *what)


def chunk_logits(hidden: Tensor, weight: Tensor, reference_hidden: Tensor,
                 reference_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's (n, V), and the reference's (m, V) of the chunk's tokens that are held against them."""
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(hidden, weight), linear(reference_hidden, reference_weight)


def values_of_logits(logits: Tensor, reference_logits: Tensor, targets: Tensor, direction: str,
                     loss: Callable | None) -> tuple[Tensor, Tensor]:
    """log pi(target) (n,) and K (m,), or where there is a `loss` its values (n,) and no K."""
    if loss:
        values = loss(logits, reference_logits, targets)
        return values, values[:0]
    logps = token_logps(logits, targets)
    if len(reference_logits) == 0:
        return logps, logps[:0]
    return logps, kl_loss(logits[len(logits) - len(reference_logits):], reference_logits, direction)


def hits_and_standardised(logits: Tensor, targets: Tensor, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (n, V): whether the target is the likeliest token (the first of equals); log pi of the target
    (`logps`) less its mean, over its deviation, under the model's own distribution. (n,) each."""
    every = logits.float().log_softmax(-1)
    share = every.exp()
    mean = (share * every).sum(-1)
    variance = share.mul_(every.sub_(mean[:, None]).square_()).sum(-1)
    return logits.argmax(-1) == targets, (logps - mean) / variance.clamp(min=LEAST_VARIANCE).sqrt()
