"""How a process joins the others, and how it uses memory and processor."""

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from support.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


def take_device(name: str, rank: int = 0) -> torch.device:
    """auto: CUDA, else CPU; and how this process uses its memory and numbers, so before the first product.
    Raises InputError for a device that isn't there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = ("cuda" if there["cuda"] else "cpu") if name == "auto" else name
    if not there[name]:
        usable = " or ".join(device for device, is_there in there.items() if is_there)
        raise InputError(f"--device {name}: this machine has none; use --device {usable}")
    # Below float32's smallest normal number, 1e-38, is 0: a CPU is many times slower with denormal ones, and
    # a collapsed model is full of them. Threads inherit this.
    torch.set_flush_denormal(True)
    if name == "cpu":  # elsewhere host memory is for loading alone
        keep_freed_memory()
    return torch.device(name, rank % torch.cuda.device_count()) if name == "cuda" else torch.device(name)


def peak_memory() -> int:
    """Most bytes that this process has held in memory since it began. (`ru_maxrss` may be its parent's.)"""
    status = Path("/proc/self/status")
    own = status.read_text().partition("VmHWM:")[2].split() if status.exists() else []
    if own:
        return 1024 * int(own[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory():
    """Let a freed tensor's memory serve the next one: glibc hands large pieces back to the system, which
    clears every page of the next, in every step. Large tensors come on huge pages, which leaves fewer holes.
    Who sets one of glibc's MALLOC_ variables has decided otherwise. And oneDNN, which computes bf16, keeps
    what it made for the last shapes only: of its default of 1024 it holds gigabytes."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)


def meeting_place(rank: int, size: int) -> dict:
    """Where the processes find each other: what torchrun set up. Its store holds, after a restart, the
    addresses of processes that are gone: then under keys of our own."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarts or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    return {"store": dist.PrefixStore(f"restart{restarts}", store), "rank": rank, "world_size": size}
