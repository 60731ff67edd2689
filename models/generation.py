"""Answers for a batch of prompts, greedy or sampled, with a key-value cache that has room."""

import inspect

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from models.answers import AnswerModel
from support.world import World

ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, in memory with room for tokens to come: one more is written behind the
    others, where the plain cache copies all of them for it."""

    memory = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """(S, heads, n, size) of n new tokens -> those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states, filled = (key_states, value_states), self.get_seq_length()
        length = filled + key_states.shape[-2]
        if self.memory is None or length > self.memory[0].shape[-2]:
            self.memory = [x.new_empty((*x.shape[:-2], length + ROOM, x.shape[-1])) for x in states]
            for memory, before in zip(self.memory, (self.keys, self.values), strict=True):
                if filled:
                    memory[..., :filled, :] = before
        for memory, new in zip(self.memory, states, strict=True):
            memory[..., filled:length, :] = new
        self.keys, self.values = (memory[..., :length, :] for memory in self.memory)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor):
        super().batch_select_indices(indices)
        self.memory = None  # what is left has no room behind it


def generate(model: AnswerModel, tokenizer, prompts: list, max_new_tokens: int, world: World,
             generator: torch.Generator | None = None) -> list[str]:
    """Continuations of one batch of prompts (lists of token ids), as text: greedy, or, with a generator,
    sampled at temperature 1."""
    answers = greedy(model, prompts, max_new_tokens, tokenizer.eos_token_id, world, generator)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


@torch.no_grad()
def greedy(model: AnswerModel, prompts: list, max_new_tokens: int, end: int, world: World,
           generator: torch.Generator | None = None) -> list[list[int]]:
    """Each prompt's greedy continuation, up to and with the token `end`; with a generator each token is drawn
    in place of taking the likeliest. Padding on the left. Rows that have ended leave the batch. Where the
    model is sharded, a process that is done goes on with one token for nothing until all are."""
    width, device = max(map(len, prompts)), world.device
    context = getattr(model.lm.config, "max_position_embeddings", None) or width + max_new_tokens
    room = [min(max_new_tokens, context - len(p)) for p in prompts]  # a row's own, whoever shares the batch
    ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    answers, rows, anyone = [[] for _ in prompts], list(range(len(prompts))), False  # rows still in the batch
    # The argument's name has changed with transformers' versions.
    name = "cache" if "cache" in inspect.signature(model.lm.forward).parameters else "past_key_values"
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    for length in range(1, max(room) + 1):
        logits = model.next_logits(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                                   **{name: cache})
        new = logits.argmax(-1)
        if generator is not None:
            new = logits.float().softmax(-1).multinomial(1, generator=generator)[:, 0]
        for row, token in zip(rows, new.tolist(), strict=True):
            if answers[row][-1:] != [end] and length <= room[row]:
                answers[row].append(token)
        goes_on = [answers[row][-1:] != [end] and length < room[row] for row in rows]
        anyone = world.sharded and world.most(any(goes_on))
        if not any(goes_on):
            break
        ids = new.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = (positions[:, -1:] + 1).clamp(max=context - 1)  # of rows without room, which go nowhere
        if (len(rows) - sum(goes_on)) * 4 >= len(rows):  # by quarters: each time costs a copy of the cache
            kept = torch.tensor(goes_on, device=device).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            rows = [row for row, on in zip(rows, goes_on, strict=True) if on]
    while anyone:
        model.next_logits(input_ids=ids[:1, :1], use_cache=False)
        anyone = world.most(False)
    return answers
