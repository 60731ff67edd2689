"""Torch's FSDP2 (`--parallel fsdp`): every process holds a part of each parameter, gradient and moment.

Each decoder layer is gathered when it is needed and let go behind it, in both passes; embedding, final norm
and head stay gathered from one micro-batch to the next. No process ever holds the whole model: it is built
without weights, cut, and filled with each process's rows from the safetensors files.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from models.sharded import decoder_layers, first_row, local, weight_names
from support.errors import InputError
from support.world import World


def shard(model, dtype: torch.dtype, world: World):
    """Cut `model` (an AnswerModel) in place. Layers are gathered, and their products taken, in `dtype`;
    weights, summed gradients and AdamW's state are float32."""
    precision = {} if dtype == torch.float32 else {"param_dtype": dtype, "reduce_dtype": torch.float32}
    policy = MixedPrecisionPolicy(**precision, cast_forward_inputs=False)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in decoder_layers(model.lm):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for method in ("hidden", "token_values", "scores", "next_logits", "all_logits"):  # beside its forward
        register_fsdp_forward_method(model, method)


@torch.no_grad()
def fill(model, lm_folder: Path, device):
    """Give a cut model that has no memory yet its weights: each process reads its own rows, as float32.
    Raises InputError where the folder lacks a parameter or has it in another shape."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    files = [safe_open(lm_folder / name, framework="pt") for name in weight_names(lm_folder)]
    file_of = {key: file for file in files for key in file.keys()}
    for name, parameter in model.lm.named_parameters():  # tied weights come once
        if name not in file_of:
            raise InputError(f"--model {lm_folder}: weights are missing, among them {name}; need them all")
        stored = file_of[name].get_slice(name)
        if tuple(stored.get_shape()) != tuple(parameter.shape):
            raise InputError(f"--model {lm_folder}: {name} is {stored.get_shape()}, config.json says "
                             f"{list(parameter.shape)}; they are not of one model")
        mine, start = local(parameter), first_row(parameter)
        mine.copy_(stored[start:start + len(mine)])
