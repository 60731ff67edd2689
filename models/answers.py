"""log pi(answer | prompt), the one thing that unlearning asks of a language model, and K against a reference.

Only hidden states at answer positions meet the LM head, a chunk of tokens at a time: logits of every token,
(S, T, V), never exist. Shapes: S lines of T tokens; N answer tokens; H hidden size, V vocabulary.
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
from losses import token_logps
from models.sharded import gathered
from support.world import ALONE, World

CHUNK_BYTES = 32 * 2**20  # of float32 logits at a time: enough for a fast product, little beside the model
KEPT_CHUNKS = 4  # a span's last ones' logits stay for the backward pass; the others' are made once more there
LEAST_VARIANCE = 1e-6  # square nats, of log pi under the model's own distribution; min-k++ divides by it


class Span(NamedTuple):
    """So many answer tokens of a batch, one behind the other, and what is asked of them."""
    tokens: int
    # Of the policy's logits (n, V), targets (n,), and where there is a `reference` its logits: (n,), or
    # several, (k, n). By default log pi.
    values: Callable[..., Tensor] = token_logps
    reference: tuple[Tensor, Tensor] | None = None  # its hidden states (tokens, H) and its head (V, H)


class AnswerModel(nn.Module):
    """A causal language model that returns log-probabilities of answers, float32, in nats."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, batch: TokenBatch, spans: list[Span] | None = None) -> list[Tensor]:
        """What each of the spans, which together are the batch, asks; by default [log pi of all tokens]."""
        head = self.lm.get_output_embeddings().weight
        return answer_values(self.hidden(batch), head, batch.targets, spans)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Last hidden states where the answers' tokens are predicted, (N, H)."""
        inputs = batch.attention(self.lm.dtype)
        states = self.lm.base_model(input_ids=batch.ids, use_cache=False, **inputs).last_hidden_state
        return states[batch.lines, batch.columns]

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


recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # backward keeps inputs alone


def answer_values(hidden: Tensor, weight: Tensor, targets: Tensor,
                  spans: list[Span] | None = None) -> list[Tensor]:
    """What each span asks of its tokens, from hidden states (N, H), the LM head's weight (V, H) and targets
    (N,). Products are taken in autocast's precision, as any linear layer takes them."""
    device, spans, values = hidden.device.type, spans or [Span(len(hidden))], []
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, weight, tokens = hidden.to(dtype), weight.to(dtype), [span.tokens for span in spans]
    for span, own, some in zip(spans, hidden.split(tokens), targets.split(tokens), strict=True):
        states_and_heads = [(own, weight)]
        if span.reference:
            states_and_heads.append([x.to(dtype) for x in span.reference])
        values.append(in_chunks(span.values, some, states_and_heads))
    return values


def in_chunks(values: Callable, targets: Tensor, states_and_heads: list) -> Tensor:
    """`values` of the policy's logits and the reference's, which exist for a chunk of tokens at a time."""
    size = chunk_tokens(len(states_and_heads[0][1]))
    chunks = [slice(at, at + size) for at in range(0, len(targets), size)]

    def logits_of(chunk: slice) -> list[Tensor]:
        with torch.autocast(targets.device.type, enabled=False):
            return [linear(states[chunk], head) for states, head in states_and_heads]

    def of_logits(chunk: slice, logits: list) -> Tensor:
        return values(logits[0], targets[chunk], *logits[1:])

    def of_states(chunk: slice) -> Tensor:
        return of_logits(chunk, logits_of(chunk))

    if len(chunks) == 1:  # a small vocabulary or few tokens: nothing to save
        return of_states(chunks[0])
    return torch.cat([*(recomputed(of_states, chunk) for chunk in chunks[:-KEPT_CHUNKS]),
                      *(recomputed(of_logits, chunk, logits_of(chunk)) for chunk in chunks[-KEPT_CHUNKS:])],
                     dim=-1)


def hits_and_standardised(logits: Tensor, targets: Tensor, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (n, V): whether the target is the likeliest token (the first of equals); log pi of the target
    (`logps`) less its mean, over its deviation, under the model's own distribution. (n,) each."""
    every = logits.float().log_softmax(-1)
    share = every.exp()
    mean = (share * every).sum(-1)
    variance = share.mul_(every.sub_(mean[:, None]).square_()).sum(-1)
    return logits.argmax(-1) == targets, (logps - mean) / variance.clamp(min=LEAST_VARIANCE).sqrt()
