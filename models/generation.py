"""Greedy answers for a batch of prompts, with a key-value cache that has room."""

import inspect

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from models.loading import AnswerModel, pad_id
from running.processes import World

ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, in memory with room for tokens to come: one more is written behind the others, where
    the plain cache copies all of them for it."""

    memory = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """(S, heads, n, size) of n new tokens -> those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        filled, new = self.get_seq_length(), key_states.shape[-2]
        if self.memory is None or filled + new > self.memory[0].shape[-2]:
            shape = (*key_states.shape[:-2], filled + new + ROOM, key_states.shape[-1])
            self.memory = key_states.new_empty(shape), value_states.new_empty((*shape[:-1], value_states.shape[-1]))
            if filled:
                for memory, before in zip(self.memory, (self.keys, self.values)):
                    memory[..., :filled, :] = before
        for memory, states in zip(self.memory, (key_states, value_states)):
            memory[..., filled:filled + new, :] = states
        self.keys, self.values = (memory[..., :filled + new, :] for memory in self.memory)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor):
        super().batch_select_indices(indices)
        self.memory = None  # what is left has no room behind it


@torch.no_grad()
def generate(model: AnswerModel, tokenizer, prompts: list, max_new_tokens: int, w: World) -> list[str]:
    """Greedy continuations of one batch: padded on the left, each ending at the end-of-sequence token.

    Rows that have ended leave the batch: a model that has collapsed on a few prompts runs on for those alone. Where the
    model is sharded, a process that is done goes on with one token for nothing until all are.
    """
    width, pad, eos = max(map(len, prompts)), pad_id(tokenizer), tokenizer.eos_token_id
    device, context = w.device, getattr(model.lm.config, "max_position_embeddings", None) or width + max_new_tokens
    room = [min(max_new_tokens, context - len(p)) for p in prompts]  # a row's own, whoever it shares the batch with
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, rows, answers = Cache(layer_class_to_replicate=RoomyLayer), list(range(len(prompts))), [[] for _ in prompts]
    # The argument's name has changed with transformers' versions.
    name = "cache" if "cache" in inspect.signature(model.lm.forward).parameters else "past_key_values"
    for length in range(1, max(room) + 1):
        logits = model.next_logits(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                                   **{name: cache})
        new = logits.argmax(-1).tolist()
        for row, token in zip(rows, new):
            if answers[row][-1:] != [eos] and length <= room[row]:
                answers[row].append(token)
        ended = [answers[row][-1:] == [eos] or length >= room[row] for row in rows]
        going_on = not all(ended)
        anyone = w.most(going_on) if w.sharded else False
        if not going_on:
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
        anyone = w.most(False)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
