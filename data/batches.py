"""The one definition of the batch: which rows meet in which step, whatever the micro-batch or the number of
processes (a pure function of seed and position), and how texts become tensors."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROWS, PARTNERS, REFUSALS = 0, 1, 2  # three independent streams of one seed


class Item(NamedTuple):
    """One place in the stream, as indices: the row to unlearn (or learn), its retain partner, its refusal."""
    row: int
    partner: int
    refusal: int


def make_stream(n: int, epochs: int, batch_size: int, seed: int, n_retain: int, n_refusals: int,
                pairing: str) -> list[list[Item]]:
    """The global batches of a whole run: per-epoch permutations, concatenated, cut; ceil(epochs*n/batch).

    pairing "stream": partners and refusals are seeded streams too; "fixed" (the authors' rule): row i
    always meets retain row (i + u) mod n_retain and refusal v, u and v each the first `torch.randint` of a
    generator seeded with i. n_retain or n_refusals of 0: none are used.
    """
    rows = permutations(seed, ROWS, n, epochs * n)
    if pairing == "fixed":
        partners = [(row + first_randint(row, n_retain)) % max(n_retain, 1) for row in rows]
        refusals = [first_randint(row, n_refusals) for row in rows]
    else:
        partners = permutations(seed, PARTNERS, n_retain, len(rows))
        refusals = permutations(seed, REFUSALS, n_refusals, len(rows))
    items = [Item(*each) for each in zip(rows, partners, refusals, strict=True)]
    return [items[at:at + batch_size] for at in range(0, len(items), batch_size)]


def permutations(seed: int, stream: int, n: int, length: int) -> list[int]:
    """The first `length` elements of permutations of range(n), one after the other; zeros where n is 0."""
    if n == 0:
        return [0] * length
    each = (np.random.default_rng((seed, stream, k)).permutation(n) for k in range(math.ceil(length / n)))
    return np.concatenate([*each])[:length].tolist()


def first_randint(seed: int, n: int) -> int:
    return int(torch.randint(n, (1,), generator=torch.Generator().manual_seed(seed))) if n else 0


def deal(rows: list, lengths: list, micro_batch_size: int, rank: int, world_size: int) -> list[list]:
    """This process's micro-batches of a global batch: sorted by length, every world_size-th row, cut. All get
    the same number, so that they meet in the last one; where rows run out the list is empty."""
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], i))
    mine = [rows[i] for i in order[rank::world_size]]
    most = math.ceil(len(rows) / world_size)  # rows of the process that has the most
    return [mine[at:at + micro_batch_size] for at in range(0, most, micro_batch_size)]


def sent(x: Tensor, device) -> Tensor:
    """`x` on `device`; to a GPU from pinned memory, so that nobody waits for the copy."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class TokenBatch(NamedTuple):
    """R texts in S lines, padded at the end to T tokens, and where their N answer tokens are predicted.

    ids (S, T); lines, columns, targets, texts (N,): hidden[lines, columns] predicts targets, which are tokens
    of these texts, in the texts' order. A line holds several prompts (`prompts`, (S, T)), each once (its
    `branches` 0) with its answers behind it (1, 2 ..); `position_ids` count within a text.
    """
    ids: Tensor
    lines: Tensor
    columns: Tensor
    targets: Tensor
    texts: Tensor
    answer_tokens: Tensor  # (R,)
    prompts: Tensor
    branches: Tensor
    position_ids: Tensor

    def per_text(self, values: Tensor) -> Tensor:
        """Sums over each text's answer tokens, (R,). values (N,), or of the first texts: 0 elsewhere."""
        return values.new_zeros(len(self.answer_tokens)).index_add(0, self.texts[:len(values)], values)

    def attention(self, dtype) -> dict:
        """The language model's further inputs: a token sees its prompt and its own answer, nothing later."""
        # keys (S, 1, T) against queries (S, T, 1)
        same_prompt = self.prompts.unsqueeze(1) == self.prompts.unsqueeze(2)
        same_answer = self.branches.unsqueeze(1) == self.branches.unsqueeze(2)
        in_prompt = self.branches.unsqueeze(1) == 0
        sees = (same_prompt & (in_prompt | same_answer)).tril()
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        mask = mask.masked_fill_(~sees, torch.finfo(dtype).min)
        return {"attention_mask": mask.unsqueeze(1), "position_ids": self.position_ids}


PACKED_TOKENS = 384  # the most in a line of several prompts: attention's cost grows with the square
ATTENTION_TOKENS = 600  # in so long a line attention costs about as much as all else


def packed_tokens(encoded: list) -> int:
    """Tokens that texts of ONE prompt take in a line."""
    return encoded[0].start + sum(e.answer_tokens for e in encoded)


def within(lengths: list, budget: int) -> list[list[int]]:
    """Places of `lengths`, sorted by length, in batches of at most `budget` tokens; longer ones alone."""
    batches, filled = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        filled += lengths[i]
        if not batches or filled > budget:
            batches.append([])
            filled = lengths[i]
        batches[-1].append(i)
    return batches


def pack(lengths: list) -> list[list[int]]:
    """Places of `lengths`, the longest first to the emptiest of as many lines as cost the least."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    most = max(1, sum(lengths) // max(lengths))
    best, least = None, math.inf
    for count in range(min(most, math.ceil(sum(lengths) / PACKED_TOKENS)), most + 1):
        lines, filled = [[] for _ in range(count)], [0] * count
        for i in longest_first:
            emptiest = filled.index(min(filled))
            lines[emptiest].append(i)
            filled[emptiest] += lengths[i]
        cost = count * max(filled) * (1 + max(filled) / ATTENTION_TOKENS)
        if cost < least:
            best, least = lines, cost
    return best


def collate(encoded: list, pad_id: int, device="cpu", in_one: bool = False) -> TokenBatch:
    """Encoded texts -> TokenBatch with hardly a pad token: several lie in one line (`in_one`: all) and do not
    see each other, and a prompt that several answer stands there once."""
    by_prompt = {}  # prompt -> places of the texts that answer it
    for place, e in enumerate(encoded):
        by_prompt.setdefault(tuple(e.ids[:e.start]), []).append(place)
    groups = list(by_prompt.items())
    lengths = [packed_tokens([encoded[i] for i in places]) for _, places in groups]
    lines = []  # of each token (id, prompt, branch, place in its text)
    predicting = [None] * len(encoded)  # of a text: its line, and the columns that predict its answer
    for line, packed in enumerate([range(len(groups))] if in_one else pack(lengths)):
        tokens = []
        for g in packed:
            prompt, places = groups[g]
            tokens += [(token, g, 0, at) for at, token in enumerate(prompt)]
            last = len(tokens) - 1  # the prompt's last token predicts the first of every answer
            for branch, i in enumerate(places, 1):
                answer = encoded[i].ids[len(prompt):]
                predicting[i] = line, [last, *range(len(tokens), len(tokens) + len(answer) - 1)]
                tokens += [(token, g, branch, at) for at, token in enumerate(answer, len(prompt))]
        lines.append(tokens)
    width = max(map(len, lines))
    padded = [tokens + [(pad_id, -1, 0, 0)] * (width - len(tokens)) for tokens in lines]
    ids, prompts, branches, position_ids = torch.tensor(np.array(padded).transpose(2, 0, 1))
    answer_tokens = torch.tensor([e.answer_tokens for e in encoded])
    batch = TokenBatch(
        ids=ids, lines=torch.tensor([line for line, _ in predicting]).repeat_interleave(answer_tokens),
        columns=torch.tensor([column for _, columns in predicting for column in columns]),
        targets=torch.tensor([token for e in encoded for token in e.ids[e.start:]]),
        texts=torch.arange(len(encoded)).repeat_interleave(answer_tokens), answer_tokens=answer_tokens,
        prompts=prompts, branches=branches, position_ids=position_ids)
    return TokenBatch(*(sent(x, device) for x in batch))
