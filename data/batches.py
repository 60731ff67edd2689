"""The one definition of the batch: which rows meet in which step, whatever the micro-batch or the number of processes.

Everything is a pure function of (seed, position): the position in the stream is all that a resumed run needs to know.
"""

import os
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


def within(lengths: list, budget: int) -> list[list[int]]:
    """Places of `lengths`, sorted by length and cut into batches of at most `budget` tokens; what is longer goes
    alone."""
    batches, filled = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        filled += lengths[i]
        if not batches or filled > budget:
            batches.append([])
            filled = lengths[i]
        batches[-1].append(i)
    return batches


class TokenBatch(NamedTuple):
    """R texts in S sequences, padded at the end to T tokens, and where their N answer tokens are predicted.

    ids (S, T); sequences, positions, targets, rows (N,): hidden[sequences, positions] predicts targets, which are
    tokens of the texts `rows`. Where a sequence is one text there is no attention mask: with causal attention no real
    token looks at padding that comes after it. Else a sequence holds groups of texts (`groups`, (S, T)), a group's
    common beginning once (its `branches` 0) and then the rest of each (1, 2 ..); `order` are places in the text.
    """
    ids: Tensor
    sequences: Tensor
    positions: Tensor
    targets: Tensor
    rows: Tensor
    lengths: Tensor  # (R,) answer tokens
    groups: Tensor | None = None
    branches: Tensor | None = None
    order: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Sequences x padded length: what the forward pass computes."""
        return self.ids.numel()

    def attention(self, dtype) -> dict:
        """The language model's further inputs: a token sees its group's beginning and its own text, nothing later."""
        if self.groups is None:
            return {}
        pairs = lambda x: (x.unsqueeze(1), x.unsqueeze(2))  # keys (S, 1, T), queries (S, T, 1)
        (group, of_group), (branch, of_branch) = pairs(self.groups), pairs(self.branches)
        sees = ((group == of_group) & ((branch == 0) | (branch == of_branch))).tril()
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
        return {"attention_mask": mask.unsqueeze(1), "position_ids": self.order}


def collate(encoded: list, pad_id: int, device="cpu", pad_to: int = 0) -> TokenBatch:
    """Encoded texts -> TokenBatch, each a sequence, padded to the longest or to `pad_to` tokens."""
    width = max(pad_to, max(len(e.ids) for e in encoded))
    ids = torch.tensor([e.ids + [pad_id] * (width - len(e.ids)) for e in encoded])
    lengths = torch.tensor([e.answer_tokens for e in encoded])
    rows = torch.arange(len(encoded)).repeat_interleave(lengths)
    positions = torch.cat([torch.arange(e.start - 1, len(e.ids) - 1) for e in encoded])  # the token before predicts
    targets = ids[rows, positions + 1]
    return TokenBatch(*(x.to(device) for x in (ids, rows, positions, targets, rows, lengths)))


PACKED_TOKENS = 384  # the most in a sequence of several groups: attention's cost grows with the square
ATTENTION_TOKENS = 600  # in so long a sequence attention costs about as much as all else


def common(encoded: list) -> int:
    """Tokens that all texts begin with, none of them an answer's."""
    return min(len(os.path.commonprefix([e.ids for e in encoded])), *(e.start for e in encoded))


def group_tokens(encoded: list) -> int:
    """Tokens of a group: the texts' common beginning once, then the rest of each."""
    return sum(len(e.ids) for e in encoded) - (len(encoded) - 1) * common(encoded)


def pack(lengths: list) -> list[list[int]]:
    """Places of `lengths`, dealt to sequences: as many of these as cost the least, padding and attention together."""
    def dealt(count: int) -> tuple[list, int]:
        sequences, filled = [[] for _ in range(count)], [0] * count
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # the longest first, to the emptiest
            s = filled.index(min(filled))
            sequences[s].append(i)
            filled[s] += lengths[i]
        return sequences, max(filled)

    most = max(1, sum(lengths) // max(lengths))
    fewest = min(most, -(-sum(lengths) // PACKED_TOKENS))
    cost = lambda sequences, width: len(sequences) * width * (1 + width / ATTENTION_TOKENS)
    return min((dealt(count) for count in range(fewest, most + 1)), key=lambda some: cost(*some))[0]


def collate_packed(encoded: list, groups: list, pad_id: int, device="cpu", pad_to: int = 0) -> TokenBatch:
    """As `collate`, with hardly a pad token: several texts lie in one sequence, and do not see each other.

    Texts of one group (places in `encoded`) share their beginning: several answers to a question cost it once. `pad_to`
    pads the sequences to so many tokens.
    """
    lengths = [group_tokens([encoded[i] for i in group]) for group in groups]
    packed = pack(lengths)
    ids, of_group, branches, order = ([[] for _ in packed] for _ in range(4))
    predicting = [None] * len(encoded)  # of a text: its sequence, and the positions that predict its answer
    for s, g in ((s, g) for s, some in enumerate(packed) for g in some):
        texts = [encoded[i] for i in groups[g]]
        shared, begin = common(texts), len(ids[s])
        ids[s] += texts[0].ids[:shared]
        branches[s] += [0] * shared
        order[s] += range(shared)
        for branch, (i, e) in enumerate(zip(groups[g], texts), 1):
            at = len(ids[s])
            place = lambda j: begin + j if j < shared else at + j - shared  # of the text's j-th token
            predicting[i] = s, [place(j) for j in range(e.start - 1, len(e.ids) - 1)]
            ids[s] += e.ids[shared:]
            branches[s] += [branch] * (len(e.ids) - shared)
            order[s] += range(shared, len(e.ids))
        of_group[s] += [g] * lengths[g]
    width = max(pad_to, *map(len, ids))
    padded = lambda lists, value: torch.tensor([x + [value] * (width - len(x)) for x in lists], device=device)
    answer_tokens = torch.tensor([e.answer_tokens for e in encoded])
    rows = torch.arange(len(encoded)).repeat_interleave(answer_tokens)
    sequences = torch.tensor([s for s, _ in predicting]).repeat_interleave(answer_tokens)
    positions = torch.tensor([place for _, places in predicting for place in places])
    targets = torch.tensor([token for e in encoded for token in e.ids[e.start:]])
    places = (x.to(device) for x in (sequences, positions, targets, rows, answer_tokens))
    return TokenBatch(padded(ids, pad_id), *places,
                      padded(of_group, -1), padded(branches, 0), padded(order, 0))
