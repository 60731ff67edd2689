"""What decoder layers keep for the backward pass, and whether they are compiled: speed and memory, never a number."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from running.sharding import decoder_layers

SMALL_HIDDEN = 512  # below this hidden size nothing is recomputed: at 192 that cost a fifth of a step, for few bytes


def prepare_layers(lm: nn.Module, activation_checkpointing: bool = False, compile: bool = False):
    """Make `lm` ready for training, in place.

    Without `activation_checkpointing`, norms and the gated products inside MLPs are computed again in the backward
    pass (not in a small model): a third of all that layers keep, for no matrix product. With it, a layer keeps its
    input and all else is computed again, a forward pass more. `compile` compiles each layer for training, once for all
    lengths; evaluations, whose cache grows in place, run as they are written.
    """
    as_it_is = activation_checkpointing or lm.config.hidden_size < SMALL_HIDDEN
    for layer in decoder_layers(lm):
        if activation_checkpointing:
            layer.__class__ = mixed(Whole, type(layer))
        for module in () if as_it_is else layer.modules():
            recompute = Norm if is_norm(module) else GatedMLP if is_gated_mlp(module) else None
            if recompute and not isinstance(module, recompute):
                module.__class__ = mixed(recompute, type(module))
        if compile:
            layer.forward = training_or_not(torch.compile(layer.forward, dynamic=True), layer.forward)


def training_or_not(compiled, plain):
    return lambda *args, **kwargs: (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def is_gated_mlp(module: nn.Module) -> bool:
    return {"gate_proj", "up_proj", "down_proj", "act_fn"} <= {name for name, _ in module.named_children()}


@functools.cache
def mixed(recompute: type, kind: type) -> type:
    return type(kind.__name__, (recompute, kind), {})


def recomputed(function, *inputs):
    """function(*inputs); for the backward pass only the inputs are kept. Torch's checkpoint computes again up to the
    last tensor that is needed: a linear layer at the end asks for its input, and its product isn't taken twice."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Norm:
    """A norm that keeps its input alone, which the residual stream keeps anyway."""

    def forward(self, hidden):
        return recomputed(super().forward, hidden)


class GatedMLP:
    """down(act(gate) * up), of which only gate and up are kept."""

    def forward(self, hidden):
        return recomputed(lambda gate, up: self.down_proj(self.act_fn(gate) * up), self.gate_proj(hidden),
                          self.up_proj(hidden))


class Whole:
    """A layer that keeps its input alone."""

    def forward(self, hidden, *args, **kwargs):
        return recomputed(functools.partial(super().forward, **kwargs), hidden, *args)
