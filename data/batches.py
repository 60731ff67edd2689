"""Which rows meet in which step, and how their texts become tensors.

The stream of global batches is a pure function of the seed. It does not depend on micro-batches or processes:
each process takes its share of a global batch.

Shapes: S texts padded to T tokens, N answer tokens.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import InputError
from data.prompts import Encoded, encode
from data.tofu import Task
from losses import OBJECTIVES, TERMS

ROWS, PARTNERS, REFUSALS = 0, 1, 2  # three independent random streams from one seed


class Item(NamedTuple):
    """One place in the stream, as indices: a row to unlearn (or learn), its retain partner, its refusal."""
    row: int
    partner: int
    refusal: int


class MicroBatch(NamedTuple):
    """Keys of the texts that a process runs at once, such as "run/row/3", "run/refusal/3/17", "run/retain/5".
    rows and refusals belong to each other by position; the retain texts are other items' partners."""
    rows: list
    refusals: list
    retain: list


class Counts(NamedTuple):
    """What the sums over a global batch are divided by. Every process computes the same numbers."""
    rows: int
    forget_tokens: int  # answer tokens of the texts that the forget loss is about
    retain_tokens: int
    tokens: int  # all tokens that the policy reads, prompts included


def permutations(seed: int, stream: int, n: int, length: int) -> list[int]:
    """The first `length` elements of permutations of range(n), one after the other; zeros where n is 0."""
    if n == 0:
        return [0] * length
    shuffled = (np.random.default_rng((seed, stream, k)).permutation(n) for k in range(math.ceil(length / n)))
    return np.concatenate([*shuffled])[:length].tolist()


def first_randint(seed: int, n: int) -> int:
    return int(torch.randint(n, (1,), generator=torch.Generator().manual_seed(seed))) if n else 0


def make_stream(rows: int, retain: int, refusals: int, s) -> list[list[Item]]:
    """The global batches of a run: per-epoch permutations, concatenated and cut every `s.batch_size` items.
    `s` has epochs, batch_size, seed and retain_pairing. Pairing "stream": partners and refusals are
    permutations too. Pairing "fixed", the authors' rule: row i always meets retain row (i + u) mod n_retain
    and refusal v, where u and v are each the first `torch.randint` of a generator seeded with i."""
    order = permutations(s.seed, ROWS, rows, s.epochs * rows)
    if s.retain_pairing == "fixed":
        partners = [(row + first_randint(row, retain)) % max(retain, 1) for row in order]
        answers = [first_randint(row, refusals) for row in order]
    else:
        partners = permutations(s.seed, PARTNERS, retain, len(order))
        answers = permutations(s.seed, REFUSALS, refusals, len(order))
    items = [Item(*place) for place in zip(order, partners, answers, strict=True)]
    return [items[at:at + s.batch_size] for at in range(0, len(items), s.batch_size)]


def deal(things: list, length, size: int, rank: int, world_size: int) -> list[list]:
    """This process's batches of `things`: sorted by length, every world_size-th thing, cut into batches of
    `size`. All processes get the same number of batches, so the last one may be empty."""
    share = sorted(things, key=length)[rank::world_size]
    largest_share = math.ceil(len(things) / world_size)
    return [share[at:at + size] for at in range(0, largest_share, size)]


class Plan:
    """A run's texts as tokens (key, as in MicroBatch -> Encoded), and its stream: the items of each step.
    Raises InputError for a text above `context` tokens, and for a run that ends within its warm-up."""

    def __init__(self, s, task: Task, tokenizer, context: int | None):
        self.objective, self.terms = OBJECTIVES[s.loss], [TERMS[name] for name in s.terms]
        self.batch_size, self.micro_batch_size = s.batch_size, s.micro_batch_size
        self.pad = tokenizer.eos_token_id
        rows = task.forget or task.retain
        if s.loss == "sft" and s.model.partition("=")[0] == "tiny":
            rows = rows + task.facts()
        self.stream = make_stream(len(rows), len(task.retain) if self.terms else 0,
                                  len(task.refusals) if self.objective.needs_refusals else 0, s)
        self.rows, self.epochs, self.steps = len(rows), s.epochs, len(self.stream)
        self.warmup_steps = max(1, int(s.warmup_epochs * len(rows) / s.batch_size))
        if self.steps == 1 or self.warmup_steps > self.steps:
            raise InputError(f"{len(rows)} rows, {s.epochs} epochs and batch {s.batch_size} give "
                             f"{self.steps} step(s), and the warm-up, which begins at lr 0, takes "
                             f"{self.warmup_steps}: use more --epochs, a smaller "
                             "--batch-size, or fewer --warmup-epochs")
        pairs = self.question_answer_pairs(rows, task)
        encoded = encode(tokenizer, s.template, list(pairs.values()), context)
        self.texts = dict(zip(pairs, encoded, strict=True))
        if self.objective.skips:
            for key in [f"run/row/{i}" for i in range(len(rows))]:
                self.texts[key] = self.texts[key].without_first(self.objective.skips)

    def question_answer_pairs(self, rows: list, task: Task) -> dict[str, tuple]:
        """Key -> (question, answer) of all rows, and of the stream's refusals and retain rows."""
        pairs = {f"run/row/{i}": (row["question"], row["answer"]) for i, row in enumerate(rows)}
        for item in (item for step in self.stream for item in step):
            if self.objective.needs_refusals:
                question, answer = pairs[f"run/row/{item.row}"]
                space = answer[:len(answer) - len(answer.lstrip())]  # of a completion or a document
                refusal = space + task.refusals[item.refusal]
                pairs[f"run/refusal/{item.row}/{item.refusal}"] = question, refusal
            if self.terms:
                partner = task.retain[item.partner]
                pairs[f"run/retain/{item.partner}"] = partner["question"], partner["answer"]
        return pairs

    def micro_batch_of(self, items: list[Item]) -> MicroBatch:
        """The texts of these items that the objective and the terms use."""
        refusals = [f"run/refusal/{i.row}/{i.refusal}" for i in items if self.objective.needs_refusals]
        retain = [f"run/retain/{i.partner}" for i in items if self.terms]
        return MicroBatch([f"run/row/{i.row}" for i in items], refusals, retain)

    def read_by_policy(self, micro_batch: MicroBatch) -> list[list[Encoded]]:
        """[answers, refusals, retain answers] that the policy reads; empty where the loss needs none."""
        reads = self.objective.needs_answers, "policy_chosen_logps" in self.objective.inputs, bool(self.terms)
        return [[self.texts[key] for key in keys] if read else []
                for keys, read in zip(micro_batch, reads, strict=True)]

    def micro_batches(self, items: list[Item], rank: int, world_size: int) -> list[MicroBatch]:
        """This process's share of a global batch. Rows and retain partners are sorted by length apart from
        each other: the losses are sums over the batch, so a partner need not run beside its row. The longest
        texts come first, before gradients take memory."""
        share = self.micro_batch_size, rank, world_size
        dealt = deal(items, lambda item: len(self.texts[f"run/row/{item.row}"].ids), *share)
        batches = [self.micro_batch_of(batch) for batch in dealt]
        if self.terms:
            partners = deal(self.micro_batch_of(items).retain, lambda key: len(self.texts[key].ids), *share)
            batches = [batch._replace(retain=keys) for batch, keys in zip(batches, partners, strict=True)]
        return batches[::-1]

    def counts(self, items: list[Item]) -> Counts:
        groups = self.read_by_policy(self.micro_batch_of(items))
        answers, refusals, retain = groups
        return Counts(rows=len(items), forget_tokens=sum(text.answer_tokens for text in answers or refusals),
                      retain_tokens=sum(text.answer_tokens for text in retain),
                      tokens=sum(len(text.ids) for group in groups for text in group))

    def steps_at(self, every: str) -> set:
        """Steps that `every` names: epoch, end, never, a number of steps, or the steps as "5,10,50".
        All but never name the last."""
        epoch_ends = {math.ceil(e * self.rows / self.batch_size) for e in range(1, self.epochs + 1)}
        steps = {"never": set(), "end": {self.steps}, "epoch": epoch_ends}
        if every in steps:
            return steps[every]
        numbers = [int(number) for number in every.split(",")]
        chosen = numbers if len(numbers) > 1 else range(numbers[0], self.steps, numbers[0])
        return {step for step in chosen if step < self.steps} | {self.steps}


class TokenBatch(NamedTuple):
    """S texts padded at the end to T tokens, and the places where their N answer tokens are predicted: the
    model's output at [lines, columns] predicts `targets`, text after text."""
    ids: Tensor  # (S, T)
    lines: Tensor  # (N,)
    columns: Tensor  # (N,)
    targets: Tensor  # (N,)


def collate(encoded: list[Encoded], pad: int, device="cpu") -> TokenBatch:
    width = max(len(e.ids) for e in encoded)
    batch = TokenBatch(
        ids=torch.tensor([e.ids + [pad] * (width - len(e.ids)) for e in encoded]),
        lines=torch.tensor([line for line, e in enumerate(encoded) for _ in range(e.answer_tokens)]),
        columns=torch.tensor([place - 1 for e in encoded for place in e.places]),
        targets=torch.tensor([e.ids[place] for e in encoded for place in e.places]))
    return TokenBatch(*(x.to(device, non_blocking="cuda" in str(device)) for x in batch))
