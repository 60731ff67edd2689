"""The one definition of the batch: which rows meet in which step, whatever the micro-batch or the number of processes.

Everything is a pure function of (seed, position): the position in the stream is all that a resumed run needs to know.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROWS, PARTNERS, REFUSALS = 0, 1, 2  # three independent streams of one seed


class Item(NamedTuple):
    """One place in the stream, as indices: the row to unlearn (or to learn), its retain partner, its refusal."""
    row: int
    partner: int
    refusal: int


def shuffled(seed: int, stream: int, n: int, position: int) -> int:
    """The element at `position` of the endless stream of permutations of range(n)."""
    return int(_permutation(seed, stream, n, position // n)[position % n])


def make_stream(n: int, epochs: int, batch_size: int, seed: int, n_retain: int, n_refusals: int,
                pairing: str) -> list[list[Item]]:
    """The global batches of a whole run: per-epoch permutations, concatenated, cut; ceil(epochs*n/batch) of them.

    Every row is visited exactly `epochs` times. pairing "stream": partners and refusals are seeded streams of their
    own; "fixed" (the authors' rule): row i always meets retain row (i + u) mod n_retain and refusal v, u and v each the
    first `torch.randint` of a generator seeded with i. n_retain or n_refusals of 0: the objective uses none.
    """
    def partner(row: int, position: int) -> tuple[int, int]:
        if pairing == "fixed":
            return (row + _first_randint(row, n_retain)) % max(n_retain, 1), _first_randint(row, n_refusals)
        retain = shuffled(seed, PARTNERS, n_retain, position) if n_retain else 0
        return retain, shuffled(seed, REFUSALS, n_refusals, position) if n_refusals else 0

    items = []
    for position in range(epochs * n):
        row = shuffled(seed, ROWS, n, position)
        items.append(Item(row, *partner(row, position)))
    return [items[at:at + batch_size] for at in range(0, len(items), batch_size)]


_permutations: dict = {}  # the current epoch's, so that a walk along the stream draws each once


def _permutation(seed: int, stream: int, n: int, epoch: int) -> np.ndarray:
    key = (seed, stream, n)
    if key not in _permutations or _permutations[key][0] != epoch:
        _permutations[key] = epoch, np.random.default_rng((seed, stream, epoch)).permutation(n)
    return _permutations[key][1]


def _first_randint(seed: int, n: int) -> int:
    return int(torch.randint(n, (1,), generator=torch.Generator().manual_seed(seed))) if n else 0


def deal(rows: list, lengths: list, micro_batch_size: int, rank: int, world_size: int) -> list[list]:
    """This process's micro-batches of a global batch: sorted by length, every world_size-th row, cut.

    All processes get the same number of micro-batches, so that they meet in the last one; where rows run out the list
    is empty.
    """
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], i))
    mine = [rows[i] for i in order[rank::world_size]]
    count = -(-(-(-len(rows) // world_size)) // micro_batch_size)
    return [mine[i * micro_batch_size:(i + 1) * micro_batch_size] for i in range(count)]


class TokenBatch(NamedTuple):
    """S sequences, padded at the end to T tokens, and where their N answer tokens are predicted.

    ids (S, T); rows, positions, targets (N,): hidden[rows, positions] predicts targets. No attention mask: with causal
    attention no real token looks at padding that comes after it.
    """
    ids: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    lengths: Tensor  # (S,) answer tokens

    @property
    def tokens(self) -> int:
        """Sequences x padded length: what the forward pass computes."""
        return self.ids.numel()


def collate(encoded: list, pad_id: int, device="cpu", pad_to: int = 0) -> TokenBatch:
    """Encoded sequences -> TokenBatch, padded to the longest or to `pad_to` tokens."""
    width = max(pad_to, max(len(e.ids) for e in encoded))
    ids = torch.tensor([e.ids + [pad_id] * (width - len(e.ids)) for e in encoded])
    lengths = torch.tensor([e.answer_tokens for e in encoded])
    rows = torch.arange(len(encoded)).repeat_interleave(lengths)
    positions = torch.cat([torch.arange(e.start - 1, len(e.ids) - 1) for e in encoded])  # the token before predicts
    targets = ids[rows, positions + 1]
    return TokenBatch(*(x.to(device) for x in (ids, rows, positions, targets, lengths)))
