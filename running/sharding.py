"""Fully sharded data parallelism, torch's FSDP2 (`--parallel fsdp`): every process holds a part of each parameter, of
its gradient and of AdamW's moments.

A parameter's first dimension is cut into equal runs of rows, process r holds the r-th. Each decoder layer is gathered
when it is needed and let go behind it, in the forward and in the backward pass; embedding, final norm and head, which
the first and the last operation of a step need, stay gathered from one micro-batch to the next. No process ever holds
the whole model: it is built without weights, cut, and filled with each process's rows from the safetensors files; the
result is written a few gigabytes at a time.

Below, `whole` and `local` are the only two ways across: `whole` is a collective operation, `local` is not.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from running.processes import World
from support.errors import InputError

FILE_BYTES = 4 * 2**30  # of weights in one file of a sharded model's result


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process: all must ask for it together. Others come back as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor, sharing its memory. Others come back as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Where this process's rows begin: FSDP2 cuts the first dimension into equal runs, of which the last may be
    short."""
    if not isinstance(tensor, DTensor):
        return 0
    rows, mesh = tensor.shape[0], tensor.device_mesh
    start = min(rows, -(-rows // mesh.size()) * mesh.get_local_rank())
    assert len(local(tensor)) == min(rows - start, -(-rows // mesh.size())), (tensor.shape, local(tensor).shape)
    return start


@contextmanager
def parameters_on_meta():
    """Modules made inside have parameters without memory; their buffers (rotary frequencies) are real."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None and not parameter.is_meta:  # a tied one stays the same object
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)
    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def shard(model, dtype: torch.dtype, w: World):
    """Cut `model` (an AnswerModel) in place. Layers are gathered, and their products taken, in `dtype`; weights, summed
    gradients and AdamW's state are float32."""
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(w.device.type, (w.size,))
    for layer in decoder_layers(model.lm):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for method in ("hidden", "sums", "next_logits"):  # ways into the model beside its forward
        register_fsdp_forward_method(model, method)


def release(model):
    """After forward passes that no backward pass followed, a sharded model still holds its gathered embedding and head:
    let them go. What holds the parameters afterwards holds the sharded ones."""
    if isinstance(model, FSDPModule):
        model.reshard()


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """The layers that a model is a stack of. Raises InputError where there is no such list."""
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == lm.config.num_hidden_layers:
            return module
    raise InputError(f"{type(lm).__name__} has no list of {lm.config.num_hidden_layers} decoder layers to shard; use "
                     "--parallel ddp")


@torch.no_grad()
def fill(model, lm_folder: Path, device):
    """Give a cut model that has no memory yet its weights: each process reads its own rows, as float32.

    Raises InputError where the folder lacks a parameter or has it in another shape.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    file_of = weight_files(lm_folder)
    for name, parameter in model.lm.named_parameters():  # tied weights come once
        if name not in file_of:
            raise InputError(f"--model {lm_folder}: weights are missing, among them {name}; need the whole model")
        stored = file_of[name].get_slice(name)
        if tuple(stored.get_shape()) != tuple(parameter.shape):
            raise InputError(f"--model {lm_folder}: {name} is {stored.get_shape()}, config.json says "
                             f"{list(parameter.shape)}; they are not of one model")
        mine, start = local(parameter), first_row(parameter)
        mine.copy_(stored[start:start + len(mine)])


def weight_files(folder: Path) -> dict:
    """parameter name -> its open safetensors file. Raises InputError for an index that names files outside."""
    index = folder / "model.safetensors.index.json"
    names = {path.name for path in folder.glob("*.safetensors")}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index} is not an index of weight files ({type(error).__name__}: {error})") from None
    outside = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if outside:
        raise InputError(f"{index} names {outside[0]}, which is no file of this folder; fetch the model again")
    files = [safe_open(folder / name, framework="pt") for name in sorted(names)]
    return {key: file for file in files for key in file.keys()}


@torch.no_grad()
def write_weights(lm: nn.Module, folder: Path, rank: int):
    """The safetensors files that `from_pretrained` loads, gathered one parameter at a time; process 0 writes."""
    parts, at_hand, size, total = [], {}, 0, 0

    def write():
        name = f"model-{len(parts) + 1:05d}.safetensors"
        save_file(at_hand, folder / name, metadata={"format": "pt"})
        parts.append((name, list(at_hand)))
        at_hand.clear()

    for name, parameter in lm.named_parameters():
        tensor = whole(parameter)
        if rank > 0:
            continue
        if size and size + tensor.nbytes > FILE_BYTES:
            write()
            size = 0
        at_hand[name] = tensor.cpu().contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if rank == 0:
        write()
        if len(parts) == 1:
            (folder / parts[0][0]).rename(folder / "model.safetensors")
            return
        index = {"metadata": {"total_size": total}, "weight_map": {key: name for name, keys in parts for key in keys}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
