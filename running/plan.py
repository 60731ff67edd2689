"""What a run will compute, before anything is: rows as tokens, global batches, what follows from these."""

import math
from argparse import Namespace
from typing import NamedTuple

from data.batches import Item, deal, make_stream
from data.prompts import Encoded, encode
from data.tofu import ALTERNATIVE, Task
from losses import OBJECTIVES
from support.errors import InputError
from support.world import World


class Counts(NamedTuple):
    """What a step's sums are divided by: the whole global batch's, known to every process without asking."""
    rows: int
    forget_tokens: int  # of the answers, or refusals, that the loss is a mean over
    retain_tokens: int
    tokens: int  # that pass forward and backward, prompts included


class Plan:
    """Raises InputError for a text above `context` tokens, and for a run of one step.

    answers: Encoded, of the rows that the loss is about (to unlearn; for sft to learn); partners: of the
    retain rows; refusals: (row, refusal line) -> Encoded. Empty where the objective uses none."""

    def __init__(self, s: Namespace, task: Task, tokenizer, context: int | None):
        self.objective, self.pad = OBJECTIVES[s.loss], tokenizer.eos_token_id  # nothing looks at padding
        self.micro_batch_size = s.micro_batch_size
        rows = task.forget
        if s.loss == "sft":  # a model made from scratch knows no author and no fact
            rows = (task.forget or task.retain) + ([] if s.start else task.facts())
        uses_partners = s.loss != "sft" and (s.retain_weight > 0 or s.kl_weight > 0)
        uses_refusals = self.objective.needs_refusals
        alternatives = self.objective.alternatives and rows[0].get(ALTERNATIVE) is not None
        refusals = [None] if alternatives else task.refusals  # None: the row's own
        self.refusals_from = f"each row's {ALTERNATIVE}" if alternatives else task.refusals_from
        self.stream = make_stream(len(rows), s.epochs, s.batch_size, s.seed, len(task.retain) * uses_partners,
                                  len(refusals) * uses_refusals, s.retain_pairing)

        def encoded(some: list) -> list[Encoded]:
            pairs = [(row["question"], row["answer"]) for row in some]
            return encode(tokenizer, s.template, pairs, context) if pairs else []

        self.answers = [e._replace(start=e.start + self.objective.skips) for e in encoded(rows)]
        self.partners = encoded(task.retain if uses_partners else [])
        met = sorted({(i.row, i.refusal) for items in self.stream for i in items}) if uses_refusals else []
        refused = [{"question": rows[row]["question"],
                    "answer": refusals[line] or rows[row][ALTERNATIVE]} for row, line in met]
        self.refusals = dict(zip(met, encoded(refused), strict=True))
        self.rows, self.steps = len(rows), len(self.stream)
        self.warmup_steps = max(1, int(s.warmup_epochs * len(rows) / s.batch_size))
        if self.steps == 1:
            raise InputError(f"{self.rows} rows, {s.epochs} epochs, batch {s.batch_size}: that is one step, "
                             "whose lr the warm-up has at 0; give more --epochs or a smaller --batch-size")
        self.epoch_ends = [math.ceil(e * len(rows) / s.batch_size) for e in range(1, s.epochs + 1)]

    # ---- a step

    def micro_batches(self, items: list[Item], world: World) -> list[list[Item]]:
        """This process's share of a global batch, ordered by what a row's texts take; none left: empty."""
        lengths = [self.counts([item]).tokens for item in items]
        mine = deal(items, lengths, self.micro_batch_size, world.rank, world.size)
        # The longest first: its activations meet no gradients yet, and the next fit into what it leaves.
        return mine[::-1]

    def texts(self, items: list[Item]) -> list[list[Encoded]]:
        """[answers, refusals, retain answers] that the policy reads, empty where the objective has none."""
        takes = self.objective.takes
        of_answers = any(name in takes for name in ("policy_logps", "policy_token_logps", "policy_logits"))
        answers = [self.answers[i.row] for i in items] if of_answers else []
        refusals = [self.refusals[i.row, i.refusal] for i in items] if "refusal_logps" in takes else []
        return [answers, refusals, [self.partners[i.partner] for i in items] if self.partners else []]

    def counts(self, items: list[Item]) -> Counts:
        texts = answers, refusals, retain = self.texts(items)
        # The loss is about the rows' answers, or where it takes none, about refusals.
        return Counts(rows=len(items), forget_tokens=sum(e.answer_tokens for e in answers or refusals),
                      retain_tokens=sum(e.answer_tokens for e in retain),
                      tokens=sum(len(e.ids) for some in texts for e in some))

    # ---- the run

    def evaluation_steps(self, every: str) -> set:
        """Steps after which it is evaluated, or saved (0: before the first): epoch, step, never, end, N; none
        of the clock's (10m)."""
        if every == "never" or every.endswith("m"):
            return set()
        if every == "end":
            return {self.steps}
        if every == "epoch":
            return {0, *self.epoch_ends}
        return {*range(0, self.steps, 1 if every == "step" else int(every)), self.steps}
