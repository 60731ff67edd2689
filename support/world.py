"""The processes that work together, or this one alone as a world of size 1."""

import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


class World(NamedTuple):
    """This process among all: rank of size, and its device."""
    rank: int
    size: int
    device: torch.device
    sharded: bool = False  # each holds a part of every parameter (FSDP): all must run the model equally often

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
        return self.collect(value)[0]

    def collect(self, value) -> list:
        """All processes' values, in their order, on all."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def say(self, *words):
        if self.rank == 0:
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()


ALONE = World(0, 1, torch.device("cpu"))
