"""What decoder layers keep for the backward pass, and whether they are compiled: speed and memory, never a
number. A module's code stays its own: its forward pass is run again (torch.utils.checkpoint)."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.sharded import decoder_layers

SMALL_HIDDEN = 512  # below this hidden size nothing is recomputed: a fifth of a step, for few bytes


def prepare_layers(lm: nn.Module, activation_checkpointing: bool = False, compile: bool = False):
    """Make `lm` ready for training, in place. Norms keep their input alone and MLPs their wide products, the
    rest is computed again (not in a small model): a third less memory, for no matrix product. With
    `activation_checkpointing` a layer keeps its input alone, a forward pass more. `compile` compiles each
    layer for training, once for all lengths; evaluations, whose cache grows in place, run as written."""
    for layer in decoder_layers(lm):
        if activation_checkpointing:
            recompute(layer)
        elif lm.config.hidden_size >= SMALL_HIDDEN:
            for module in layer.modules():
                kind = type(module).__name__
                if kind.endswith("RMSNorm"):
                    recompute(module)
                elif kind.endswith("MLP"):
                    keep = partial(create_selective_checkpoint_contexts, keep_wide_products)
                    recompute(module, context_fn=keep)
        if compile:
            layer.forward = in_training(torch.compile(layer.forward, dynamic=True), layer.forward)


def recompute(module: nn.Module, **how):
    kept = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False, **how)
    module.forward = in_training(kept, module.forward)


def in_training(trained, plain):
    """`trained` where there will be a backward pass, else `plain`."""
    def forward(*args, **kwargs):
        return (trained if torch.is_grad_enabled() else plain)(*args, **kwargs)
    return forward


def keep_wide_products(context, operation, *args, **kwargs) -> CheckpointPolicy:
    """A product wider than what goes in (an MLP's gate and up) is kept. The narrow one at the end is not, and
    is not computed again either, since nothing needs it in the backward pass."""
    factors = [x for x in args if isinstance(x, torch.Tensor) and x.ndim == 2][-2:]
    wide = "mm." in str(operation) and factors[1].shape[1] > factors[0].shape[1]
    return CheckpointPolicy.MUST_SAVE if wide else CheckpointPolicy.PREFER_RECOMPUTE
