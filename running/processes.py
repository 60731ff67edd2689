"""The processes that train together: torchrun's (gloo on a CPU, nccl on GPUs), or this one alone as a world of
size 1."""

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from support.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


class World(NamedTuple):
    """This process among all: rank of size, and its device. One process is a world of size 1.

    `sharded`: each process holds a part of every parameter (FSDP), so all must run the model forward equally often.
    """
    rank: int
    size: int
    device: torch.device
    sharded: bool = False

    def sum(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        box = torch.tensor(number, device=self.device)
        if self.size > 1:
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def agree(self, value):
        """Process 0's value, on all."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def collect(self, value) -> list:
        """All processes' values, in their order, on all."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def together(self, action) -> list:
        """What `action` returns on each process. Raises OSError on all where it fails to write on one."""
        result = flaw = None
        try:
            result = action()
        except (OSError, SafetensorError) as error:
            flaw = getattr(error, "strerror", None) or str(error)
        results = self.collect((result, flaw))
        flaw = next((flaw for _, flaw in results if flaw), None)
        if flaw:
            raise OSError(flaw)
        return [result for result, _ in results]

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def say(self, *words):
        if self.rank == 0:
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()


ALONE = World(0, 1, torch.device("cpu"))


def pick_device(name: str, rank: int = 0) -> torch.device:
    """auto: CUDA, else CPU. Raises InputError for a device that isn't there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = ("cuda" if there["cuda"] else "cpu") if name == "auto" else name
    if not there[name]:
        raise InputError(f"--device {name}: this machine has none; use --device "
                         f"{' or '.join(d for d in there if there[d])}")
    return torch.device(name, rank % torch.cuda.device_count()) if name == "cuda" else torch.device(name)


def peak_memory() -> int:
    """Most bytes that this process has held in memory since it began. (`ru_maxrss` may be its parent's.)"""
    status = Path("/proc/self/status")
    own = status.read_text().partition("VmHWM:")[2].split() if status.exists() else []
    if own:
        return 1024 * int(own[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory():
    """Let a freed tensor's memory serve the next one. glibc hands large pieces back to the system, which clears every
    page of the next, in every step. Large tensors come on huge pages (PyTorch's THP_MEM_ALLOC_ENABLE), which leaves
    fewer holes. Who sets one of glibc's MALLOC_ variables has decided otherwise; other C libraries are
    left alone."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def flush_denormals():
    """Take numbers below float32's smallest normal one, 1e-38, for 0: a CPU is many times slower with them, and a
    collapsed model's probabilities and gradients are full of them. Threads inherit this from the one that starts them,
    so it must come before the first product."""
    torch.set_flush_denormal(True)


def meeting_place(rank: int, size: int) -> dict:
    """Where the processes find each other: what torchrun set up. It keeps one store over its restarts, and in it the
    addresses of processes that are gone: after a restart, keys of our own."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarts or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    return {"store": dist.PrefixStore(f"restart{restarts}", store), "rank": rank, "world_size": size}


def join_world(device: str, parallel: str = "ddp") -> World:
    """The processes that torchrun started (gloo on a CPU, nccl on GPUs), or this one alone, which has nothing to
    shard."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = pick_device(device, local_rank)
    keep_freed_memory()
    flush_denormals()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif local_size > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default; share the cores evenly
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        torch.set_num_threads(max(1, cores // local_size))
    if size > 1:
        # nccl wants a GPU a process; where several share one, gloo carries CUDA tensors too.
        backend = "nccl" if chosen.type == "cuda" and local_size <= torch.cuda.device_count() else "gloo"
        dist.init_process_group(backend, **meeting_place(rank, size))
    return World(rank, size, chosen, sharded=parallel == "fsdp" and size > 1)
