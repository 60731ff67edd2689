"""The LM head and the log-probabilities behind it, chunk by chunk of tokens: (N, V) logits never exist whole.

`losses.token_logps` and `losses.kl_loss` say what is computed, here is only how little of it is held at a time.
Shapes: N answer tokens, M the last of them, which have a K; H hidden size, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from losses import kl_loss, token_logps

CHUNK_BYTES = 32 * 2**20  # of float32 logits at a time: large enough for a fast product, small beside the model
KEPT_CHUNKS = 4  # of them, kept for the backward pass; the others' logits are computed once more there


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits exist at one time."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def answer_values(hidden: Tensor, weight: Tensor, targets: Tensor, reference: tuple[Tensor, Tensor] | None = None,
                  direction: str = "policy_reference") -> tuple[Tensor, Tensor]:
    """log pi(target) of each token (N,), and K of the last M (M,), in nats, float32.

    hidden (N, H), weight (V, H), targets (N,); `reference` holds the reference's hidden states (M, H) and head (V, H).
    Under autocast the logits are products in its precision, as any linear layer's are.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    reference_hidden, reference_weight = reference or (hidden[:0].detach(), weight.detach())
    inputs = hidden, weight, targets, reference_hidden, reference_weight, direction
    head = _Head(*inputs)
    if len(head.chunks) == 1:  # a small vocabulary or few tokens: nothing to save
        return head.values(head.chunks[0], *head.logits(head.chunks[0]))
    return ChunkedHead.apply(*inputs)


class ChunkedHead(torch.autograd.Function):
    """`answer_values`, with its gradient for `hidden` and `weight`.

    A token's gradient is scaled by what its loss says (for NPO by W), known only after the forward pass, and needs the
    logits again: the last chunks' are kept, so that a small micro-batch does nothing twice, the others' computed anew.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, reference_hidden, reference_weight, direction):
        head = _Head(hidden, weight, targets, reference_hidden, reference_weight, direction)
        values, kept = [], []
        for chunk in head.chunks:
            both = head.logits(chunk)
            values.append(head.values(chunk, *both))
            kept = [*kept, both][-KEPT_CHUNKS:]
        ctx.direction = direction
        ctx.save_for_backward(hidden, weight, targets, reference_hidden, reference_weight, *sum(kept, ()))
        logps, kl = map(torch.cat, zip(*values))
        return logps, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps, grad_kl):
        inputs, kept = ctx.saved_tensors[:5], list(ctx.saved_tensors[5:])
        head = _Head(*inputs, ctx.direction)
        grad_hidden = torch.empty_like(head.hidden)
        grad_weight = torch.zeros_like(inputs[1])  # in the weight's own precision, whatever the products have
        for chunk in reversed(head.chunks):
            reference_logits, logits = (kept.pop(), kept.pop()) if kept else reversed(head.logits(chunk))
            with torch.enable_grad():
                values = head.values(chunk, logits.requires_grad_(), reference_logits)
            grad_logits, = torch.autograd.grad(values, logits, (grad_logps[chunk], grad_kl[head.last(chunk)]))
            grad_hidden[chunk] = grad_logits @ head.weight
            if grad_logits.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.T, head.hidden[chunk])
            else:
                grad_weight += grad_logits.T @ head.hidden[chunk]
        return grad_hidden, grad_weight, None, None, None, None


class _Head:
    """Both models' heads in the precision of the products, and the chunks of tokens that meet them."""

    def __init__(self, hidden, weight, targets, reference_hidden, reference_weight, direction):
        self.hidden, self.weight, self.targets = hidden, weight.to(hidden.dtype), targets
        self.reference_hidden = reference_hidden.to(hidden.dtype)
        self.reference_weight = reference_weight.to(hidden.dtype)
        self.direction = direction
        size = chunk_tokens(len(weight))
        self.chunks = [slice(at, min(at + size, len(hidden))) for at in range(0, len(hidden), size)]

    def last(self, chunk: slice) -> slice:
        """The chunk's place among the last M tokens, those with a K."""
        before = len(self.hidden) - len(self.reference_hidden)
        return slice(max(0, chunk.start - before), max(0, chunk.stop - before))

    def logits(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """The policy's (n, V), and the reference's (m, V) of the chunk's tokens that have a K."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            return (linear(self.hidden[chunk], self.weight),
                    linear(self.reference_hidden[self.last(chunk)], self.reference_weight))

    def values(self, chunk: slice, logits: Tensor, reference_logits: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(target) (n,) and K (m,)."""
        with_kl = logits[len(logits) - len(reference_logits):]
        return token_logps(logits, self.targets[chunk]), kl_loss(with_kl, reference_logits, self.direction)
