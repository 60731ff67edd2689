"""GPUs that are not there, for rehearsal.py, whose docstring lists what is faked. Import it before torch.

`import torch` asks once whether CUDA is there. So a small C++ library that says yes is loaded before it. Without
the library a CPU build of torch neither indexes a fake cuda tensor nor runs its backward pass.
"""

import collections
import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import weakref
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

KNOWN_TORCH = "2.13."  # fake tensors and the functions that are replaced here change between versions
HOOKS = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>) }
namespace at {
struct FakeHooks : CUDAHooksInterface {
  FakeHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 8; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", FakeHooks)
}
"""
ROOT = Path(__file__).resolve().parent.parent
torch_folder = Path(find_spec("torch").origin).parent
library = Path(__file__).parent / "__pycache__" / f"fake_gpu-{version('torch')}.so"
if not version("torch").startswith(KNOWN_TORCH):
    sys.exit(f"a rehearsal needs torch {KNOWN_TORCH}x, and this is {version('torch')}")
if not library.exists():
    if not shutil.which("g++"):
        sys.exit("a rehearsal needs the compiler g++, which is not installed")
    library.parent.mkdir(exist_ok=True)
    aside = library.with_suffix(f".{os.getpid()}")
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", "-x", "c++", "-", "-o", aside, f"-I{torch_folder}/include",
                    f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10", f"-Wl,--no-as-needed,-rpath,{torch_folder}/lib"],
                   input=HOOKS, text=True, check=True)
    aside.rename(library)
ctypes.CDLL(str(library))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Nothing:
    """A CUDA stream or event: every method returns it."""
    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: self


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The kernels that a GPU has, with their memory. On fake tensors torch would take its plain formula."""
    if query.device.type != "cuda":
        return plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                               enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if query.dtype != torch.float32 and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale)[0]


plain_attention = torch.nn.functional.scaled_dot_product_attention
start_processes, reduce, resize_storage = dist.init_process_group, dist.all_reduce, torch.UntypedStorage.resize_
infer_shapes = ShardingPropagator._propagate_tensor_meta_non_cached
base_data = torch._C.TensorBase.data


def set_data(tensor, value):
    """Torch would leave a fake tensor's device as it was."""
    base_data.__set__(tensor, value)
    if isinstance(value, FakeTensor):
        tensor.fake_device = value.fake_device


def all_reduce(tensor, *args, **kwargs):
    """nccl's refusal. The fake backend takes tensors of any device."""
    if tensor.device.type != "cuda":
        raise RuntimeError("all_reduce: nccl has no backend for tensors on the CPU")
    return reduce(tensor, *args, **kwargs)


def fake_cuda(gpus: int):
    """Replace what torch asks a GPU, its driver or other processes. This process becomes the first of `gpus`."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(gpus), "LOCAL_WORLD_SIZE": str(gpus)}
    FakeTensor.data = property(lambda tensor: base_data.__get__(tensor), set_data)
    torch.utils.swap_tensors = set_data  # for Module.to, which cannot swap what has weak references
    sys.modules["torch.cuda.amp.common"].amp_definitely_not_available = lambda: False
    stream = Nothing()
    for name, answer in {"device_count": gpus, "set_device": None, "current_device": 0, "is_initialized": True,
                         "is_bf16_supported": True, "current_stream": stream, "synchronize": None,
                         "stream": contextlib.nullcontext()}.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.Stream = torch.cuda.Event = Nothing
    torch.nn.functional.scaled_dot_product_attention = attention
    dist.all_reduce = all_reduce
    dist.init_process_group = lambda *args, **kwargs: start_processes(
        "fake", store=FakeStore(), rank=0, world_size=gpus)


def caller() -> str:
    """file:line and function of the innermost frame in the project. The autograd engine's threads have none."""
    frame = sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(f"{ROOT}/") and not file.startswith(f"{ROOT}/tests/"):
            return f"{file[len(str(ROOT)) + 1:]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"


class Watch(TorchDispatchMode):
    """Sees every operation on fake tensors: the bytes alive on the GPU, waits of the host for the GPU, and
    mistakes that fake tensors let pass. The host reads 0 from every number and True from every condition."""

    def __init__(self):
        super().__init__()
        self.phase, self.peaks, self.waits = "start", collections.Counter(), collections.Counter()
        self.now, self.lines, self.at_peak, self.alive = 0, collections.Counter(), {}, {}
        self.row_ends, self.paused = False, False  # row_ends: the next search for unended rows finds one less
        torch.UntypedStorage.resize_ = lambda storage, size: (resize_storage(storage, size), self.count(storage))
        ShardingPropagator._propagate_tensor_meta_non_cached = lambda *args: self.unseen(*args)
        FakeTensor.tolist = lambda tensor: self.read(tensor)

    def unseen(self, *args, **kwargs):
        """DTensor infers shapes with fake tensors of its own, also on a real GPU."""
        self.paused = True
        try:
            return infer_shapes(*args, **kwargs)
        finally:
            self.paused = False

    def count(self, storage):
        """A storage that is new or was resized, in blocks of 512 bytes as in torch's allocator."""
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.alive:
            weakref.finalize(storage, self.forget, key)
        before, line = self.alive.get(key) or (0, caller())
        self.alive[key], self.now = (size, line), self.now + size - before
        self.lines[line] += size - before
        if self.now > max(self.peaks.values(), default=0):
            self.at_peak = dict(self.lines)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)

    def forget(self, key):
        size, line = self.alive.pop(key)
        self.now, self.lines[line] = self.now - size, self.lines[line] - size

    def wait(self, what: str):
        self.waits[self.phase, caller(), what] += 1

    def read(self, tensor):
        """What .item() and .tolist() give."""
        if tensor.device.type == "cuda":
            self.wait("reads a number")
        value = True if tensor.dtype == torch.bool else 0.0 if tensor.dtype.is_floating_point else 0
        for size in reversed(tensor.shape):
            value = [value] * size
        return value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(not issubclass(kind, FakeTensor) and kind is not torch.nn.Parameter for kind in types):
            return NotImplemented  # a DTensor takes itself apart first
        if func is aten._local_scalar_dense.default and args[0].constant is None:
            return self.read(args[0].reshape(()))
        if func is aten.nonzero.default:
            if args[0].device.type == "cuda":
                self.wait("counts rows")
            rows, self.row_ends = args[0].numel() - self.row_ends, False
            return args[0].new_empty((rows, args[0].dim()), dtype=torch.long)
        self.check(func, args, kwargs)
        outputs = func(*args, **kwargs)
        for x in () if self.paused else tree_leaves(outputs):
            x = getattr(x, "_local_tensor", x)
            if isinstance(x, FakeTensor) and x.device.type == "cuda" and x.untyped_storage()._cdata not in self.alive:
                self.count(x.untyped_storage())
        return outputs

    def check(self, func, args, kwargs):
        """Waits for copies, and two mistakes that fake tensors let pass: the place of an index, and of a
        generator of random numbers."""
        if func in (aten._to_copy.default, aten.copy_.default):
            to = kwargs.get("device") if func is aten._to_copy.default else args[0].device
            source = args[0] if func is aten._to_copy.default else args[1]
            places = source.device.type, torch.device(to or source.device).type
            waits = not kwargs.get("non_blocking") and not (len(args) > 2 and args[2])
            if set(places) == {"cuda", "cpu"} and (waits or places[1] == "cpu"):
                self.wait(f"copies {places[0]} to {places[1]}")
        elif func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            places = {index.device.type for index in args[1] if index is not None}
            if args[0].device.type == "cpu" and "cuda" in places:
                raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
            if args[0].device.type == "cuda" and "cpu" in places:
                self.wait("copies an index")
        for generator in (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)):
            place = torch.device(kwargs.get("device") or getattr(args[0], "device", "cpu")).type
            if place != generator.device.type:
                raise RuntimeError(f"expected a generator on {place}, not on {generator.device.type}")
