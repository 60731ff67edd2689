"""Low-rank adapters (LoRA, Hu et al., 2021): `--lora RANK`, by the optional package peft.

Every linear layer but the head becomes W x + s B A x with A (RANK, in), B (out, RANK) and s = 2; W, embedding
and norms are frozen. B begins at 0, so that the policy is the reference at the first step. What is written is
the merged model, W + s B A, which loads without peft.
"""

import torch
from torch import nn

from support.errors import InputError

SCALE = 2


def add_adapters(lm: nn.Module, rank: int, seed: int, dtype: torch.dtype) -> str:
    """Freeze `lm` and give it adapters, in place; a sentence on them. Frozen linear weights take `dtype`, the
    products', in which autocast would have them anyway."""
    from peft import LoraConfig, inject_adapter_in_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # A is drawn from the global stream, which is put back
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules="all-linear",
                                           task_type="CAUSAL_LM"), lm)
    found = adapted(lm)
    if not all(hasattr(layer.get_base_layer(), "weight") for layer in found.values()):
        raise InputError("--lora: this model has experts in one piece, which take no adapters; leave it out")
    for layer in found.values():
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.to(dtype)
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    return f"adapters of rank {rank} on {len(found)} linear layers: {trained / 1e6:.2f} M parameters to train"


def adapted(lm: nn.Module) -> dict:
    """name of a weight, as the model without adapters has it -> the layer with its adapter."""
    return {f"{name}.weight": layer for name, layer in lm.named_modules()
            if hasattr(layer, "get_delta_weight")}
