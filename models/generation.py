"""Greedy answers for a batch of prompts, with a key-value cache that has room."""

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
        filled, new = self.get_seq_length(), key_states.shape[-2]
        if self.memory is None or filled + new > self.memory[0].shape[-2]:
            shape = (*key_states.shape[:-2], filled + new + ROOM, key_states.shape[-1])
            self.memory = key_states.new_empty(shape), value_states.new_empty((*shape[:-1],
                                                                               value_states.shape[-1]))
            if filled:
                for memory, before in zip(self.memory, (self.keys, self.values), strict=True):
                    memory[..., :filled, :] = before
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            memory[..., filled:filled + new, :] = states
        self.keys, self.values = (memory[..., :filled + new, :] for memory in self.memory)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor):
        super().batch_select_indices(indices)
        self.memory = None  # what is left has no room behind it


def generate(model: AnswerModel, tokenizer, prompts: list, max_new_tokens: int, world: World) -> list[str]:
    """Greedy continuations of one batch of prompts (lists of token ids), as text."""
    answers = greedy(model, prompts, max_new_tokens, tokenizer.eos_token_id, world)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


@torch.no_grad()
def greedy(model: AnswerModel, prompts: list, max_new_tokens: int, end: int, world: World) -> list[list[int]]:
    """Each prompt's greedy continuation, up to and with the token `end`. Padding stands on the left.

    Rows that have ended leave the batch: a model that has collapsed on a few prompts runs on for those alone.
    Where the model is sharded, a process that is done goes on with one token for nothing until all are.
    """
    width, device = max(map(len, prompts)), world.device
    context = getattr(model.lm.config, "max_position_embeddings", None) or width + max_new_tokens
    room = [min(max_new_tokens, context - len(p)) for p in prompts]  # a row's own, whoever shares the batch
    ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, answers = Cache(layer_class_to_replicate=RoomyLayer), [[] for _ in prompts]
    rows = list(range(len(prompts)))  # those still in the batch
    # The argument's name has changed with transformers' versions.
    name = "cache" if "cache" in inspect.signature(model.lm.forward).parameters else "past_key_values"
    anyone = False
    for length in range(1, max(room) + 1):
        logits = model.next_logits(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                                   **{name: cache})
        new = logits.argmax(-1).tolist()
        for row, token in zip(rows, new, strict=True):
            if answers[row][-1:] != [end] and length <= room[row]:
                answers[row].append(token)
        ended = [answers[row][-1:] == [end] or length >= room[row] for row in rows]
        anyone = world.sharded and world.most(not all(ended))
        if all(ended):
            break
        ids = torch.tensor(new, device=device).unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
        if sum(ended) * 4 >= len(rows):  # by quarters: each time costs a copy of the cache
            kept = [i for i, e in enumerate(ended) if not e]
            select = torch.tensor(kept, device=device)
            cache.batch_select_indices(select)
            ids, mask, positions, rows = ids[select], mask[select], positions[select], [rows[i] for i in kept]
    while anyone:
        model.next_logits(input_ids=ids[:1, :1], use_cache=False)
        anyone = world.most(False)
    return answers
