"""Memory and its plan: logits in chunks, what --dry-run predicts, and switches that change no number."""

import pytest
import torch
from torch.nn.functional import linear

import chunked_head
from chunked_head import answer_values
from losses import KL_DIRECTIONS, kl_loss, token_logps

N, M, H, V = 23, 9, 8, 50  # tokens, those with a K, hidden size, vocabulary


def head_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
    return draw(N, H), draw(V, H), torch.randint(V, (N,), generator=generator), (draw(M, H), draw(V, H))


def values_and_gradients(function, hidden, weight):
    """(log-probabilities, K, gradient for hidden, gradient for weight), every token with its own upstream gradient."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps, kl = function(hidden, weight)
    loss = (logps * torch.linspace(-1, 2, N)).sum() + (kl * torch.linspace(1, 3, len(kl))).sum()
    loss.backward()
    return logps.detach(), kl.detach(), hidden.grad, weight.grad


@pytest.fixture(params=(1, 5, 9, 22))
def small_chunks(request, monkeypatch):
    """So many tokens a chunk; the last two chunks are kept."""
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", request.param * 4 * V)
    monkeypatch.setattr(chunked_head, "KEPT_CHUNKS", 2)


@pytest.mark.parametrize("direction", KL_DIRECTIONS)
@pytest.mark.parametrize("with_kl", (True, False))
def test_chunks_change_neither_values_nor_gradients(small_chunks, direction, with_kl):
    hidden, weight, targets, reference = head_inputs()
    reference = reference if with_kl else None

    def whole(hidden, weight):
        logits = linear(hidden, weight)
        kl = kl_loss(logits[N - M:], linear(*reference), direction) if with_kl else logits.new_zeros(0)
        return token_logps(logits, targets), kl
    chunked = lambda hidden, weight: answer_values(hidden, weight, targets, reference, direction)
    for a, b in zip(values_and_gradients(whole, hidden, weight), values_and_gradients(chunked, hidden, weight)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_chunks_under_autocast_have_its_logits_and_a_float32_gradient(small_chunks, dtype):
    hidden, weight, targets, reference = head_inputs(torch.float32)

    def whole(hidden, weight):
        logits = linear(hidden, weight)
        return token_logps(logits, targets), kl_loss(logits[N - M:], linear(*reference))
    with torch.autocast("cpu", dtype):
        right = values_and_gradients(whole, hidden, weight)
        ours = values_and_gradients(lambda h, w: answer_values(h, w, targets, reference), hidden, weight)
    for value, expected in zip(ours, right):
        assert value.dtype == torch.float32
        assert (value - expected).norm() <= 1e-2 * expected.norm()
    torch.testing.assert_close(ours[0], right[0])


def test_no_step_of_the_head_holds_the_logits_of_all_tokens(monkeypatch):
    """The largest tensor that forward and backward make has a chunk's size (or the weight's)."""
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (made if isinstance(made, (tuple, list)) else [made])
                         if isinstance(x, torch.Tensor))
            return made
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 10 * 4 * V)
    hidden, weight, targets, reference = head_inputs()
    with Watch():
        values_and_gradients(lambda h, w: answer_values(h, w, targets, reference), hidden, weight)
    assert max(sizes) == 10 * V < N * V
