"""Torch's FSDP2 (`--parallel fsdp`): every process holds a part of each parameter, gradient and moment.

Each decoder layer is gathered when it is needed and let go behind it, in both passes; embedding, final norm
and head stay gathered from one micro-batch to the next. No process ever holds the whole model: it is built
without weights, cut, and filled with each process's rows from the safetensors files. A parameter's first
dimension is cut into equal runs of rows, process r holds the r-th.
"""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from support.errors import InputError, cause_of
from support.world import World


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process: all must ask for it together. Others come as is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor, sharing its memory. Others come back as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Where this process's rows begin, of equal runs, the last shorter."""
    if not isinstance(tensor, DTensor):
        return 0
    rows, mesh = tensor.shape[0], tensor.device_mesh
    each = math.ceil(rows / mesh.size())
    start = min(rows, each * mesh.get_local_rank())
    assert len(local(tensor)) == min(rows - start, each), (tensor.shape, local(tensor).shape)
    return start


def shard(model, dtype: torch.dtype, world: World):
    """Cut `model` (an AnswerModel) in place. Layers are gathered, and their products taken, in `dtype`;
    weights, summed gradients and AdamW's state are float32."""
    precision = {} if dtype == torch.float32 else {"param_dtype": dtype, "reduce_dtype": torch.float32}
    policy = fsdp.MixedPrecisionPolicy(**precision, cast_forward_inputs=False)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in decoder_layers(model.lm):
        fsdp.fully_shard(layer, mesh=mesh, mp_policy=policy)
    fsdp.fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for method in ("hidden", "next_logits", "all_logits"):  # beside its forward
        fsdp.register_fsdp_forward_method(model, method)


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
    for name, buffer in model.lm.named_buffers():
        if name in file_of:
            buffer.copy_(file_of[name].get_tensor(name))


@contextmanager
def gathered(model, world: World):
    """Inside, a sharded model's layers stay gathered once they are, where all of it fits in memory:
    generating gathers the model once, not once a token. Otherwise layer by layer, as in training."""
    keeps = isinstance(model, fsdp.FSDPModule) and not world.most(not fits(model, world.device))
    if keeps:
        model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for module in model.modules():  # let go what passes without a backward pass have left gathered
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
        if keeps:
            model.set_reshard_after_forward(True)
            model.set_reshard_after_forward(False, recurse=False)  # embedding and head stay


def fits(model, device: torch.device) -> bool:
    """The whole model takes at most half of the memory that is free, or kept for tensors to come."""
    if device.type == "cuda":
        free, kept = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved()
        free += kept - torch.cuda.memory_allocated()
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    else:  # a system that does not say
        return False
    return 2 * sum(p.numel() * p.element_size() for p in model.parameters()) < free


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """The layers that a model is a stack of. Raises InputError where there is no such list."""
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == lm.config.num_hidden_layers:
            return module
    raise InputError(f"{type(lm).__name__} has no list of decoder layers; use ddp, without --compile")


def weight_names(folder: Path) -> list[str]:
    """The safetensors files of a model's folder. Raises InputError for an index that names others."""
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return there
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is not an index of weights: {cause_of(error)}") from None
    astray = [name for name in named if name not in there]
    if astray:
        raise InputError(f"{index} points to {astray[0]!r}: only .safetensors files in the folder itself")
    return named
