"""The reference model without a reference model in memory.

The policy IS the reference until its first step. One pass before that step keeps what the objectives and the
evaluations will ask of it: log pi_ref(y|x), one float32 number an answer; and for K and the KL metrics the last hidden
states at the answers' tokens, from which the frozen LM head gives the exact logits again.
"""

import os
from argparse import Namespace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.batches import collate, deal
from evaluate_tofu import reference_states
from models.loading import AnswerModel, pad_id
from running.processes import World
from running.sharding import whole
from support.errors import InputError


class Reference:
    """log pi_ref of every answer in the stream, and the reference's hidden states for K and for the KL metrics.

    Made by one pass of the policy before its first step, kept in `runs/NAME/reference/` (one file a process), and read
    back memory-mapped. The fingerprint covers weights, data, template, precision and stream; a file with another one is
    refused (InputError).
    """

    def __init__(self, folder: Path, mark: str, device):
        self.device, self.file_of = device, {}
        for path in sorted(folder.glob("rank*.safetensors")):
            file = safe_open(path, framework="pt")
            if file.metadata()["fingerprint"] != mark:
                raise InputError(f"{path} is stale: it was made from other weights, data, template or precision "
                                 f"(fingerprint {file.metadata()['fingerprint']}, now {mark}); start a new run")
            self.file_of.update(dict.fromkeys(file.keys(), file))
        self.head_weight = self["head"].to(device)  # frozen: the policy's own head moves

    def __getitem__(self, key: str) -> Tensor:
        return self.file_of[key].get_tensor(key)

    def logps(self, keys: list) -> Tensor:
        """log pi_ref(y|x) of these answers, (len(keys),)."""
        return torch.stack([self[key] for key in keys]).to(self.device)

    def states(self, keys: list) -> tuple[Tensor, Tensor]:
        """The reference's hidden states at these answers' tokens (N, H), and its head (V, H): together its exact
        logits."""
        return torch.cat([self[key] for key in keys]).to(self.device), self.head_weight

    def evaluation(self) -> dict:
        """(set, index) -> hidden states, as `evaluate` takes them."""
        keys = [key.split("/") for key in self.file_of if key.startswith("evaluation/")]
        return {(name, int(index)): self[f"evaluation/{name}/{index}"] for _, name, index in keys}


@torch.no_grad()
def reference_pass(s: Namespace, model: AnswerModel, plan, prepared, tokenizer, folder: Path, mark: str, w: World):
    """Write this process's share of what `Reference` reads."""
    with_logp = {f"forget/{row}": e for row, e in enumerate(plan.forget)}
    with_logp |= {f"refusal/{row}/{line}": e for (row, line), e in plan.refusal.items()}
    partners = sorted({i.partner for items in plan.stream for i in items}) if s.kl_weight > 0 else []
    with_states = {f"retain/{row}": plan.retain[row] for row in partners}
    tensors = {}
    for needed in with_logp, with_states:
        keys = list(needed)
        for chunk in deal(keys, [len(needed[k].ids) for k in keys], 2 * s.micro_batch_size, w.rank, w.size):
            if chunk or w.sharded:
                batch = collate([needed[k] for k in chunk or keys[:1]], pad_id(tokenizer), w.device)
                hidden = model.hidden(batch)
                values = (model.sums(hidden, batch)[0].cpu() if needed is with_logp else
                          hidden.cpu().split(batch.lengths.tolist()))
                tensors.update((key, value.clone()) for key, value in zip(chunk, values))
    states = reference_states(model, prepared, tokenizer, 2 * s.micro_batch_size, w)
    tensors.update({f"evaluation/{name}/{index}": value for (name, index), value in states.items()})
    head = whole(model.lm.get_output_embeddings().weight)
    if w.rank == 0:
        tensors["head"] = head.detach().cpu().clone()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank{w.rank:04d}.safetensors"
    save_file(tensors, file.with_suffix(".partial"), metadata={"fingerprint": mark})
    os.replace(file.with_suffix(".partial"), file)
