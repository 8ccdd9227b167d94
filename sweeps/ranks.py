"""Ranks: the processes of a gang, which train one cell together, each on a device of its own.

What they share is a process group of torch.distributed: gloo for what the host holds, NCCL beside it for a GPU's
tensors. Every rank makes the same calls in the same order. What must never happen is that one waits for another that
will not come: a rank that meets an error of its own leaves its process, and the others hear of it in their next call.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

DYING_SECONDS = 1.0
"""Between the first and the last process of a machine that goes down."""


@dataclass(frozen=True)
class Ranks:
    """The gang as one of its processes sees it."""

    rank: int
    """0: the one that holds the attempt and writes."""
    count: int
    group: Any
    """Of torch.distributed."""

    def share(self, count: int) -> slice:
        """This rank's part of so many: neighbours, in the order of the ranks, as even as it can be."""
        return slice(self.rank * count // self.count, (self.rank + 1) * count // self.count)

    def add(self, tensor: torch.Tensor) -> None:
        """Replace a tensor, in place, by its sum over the ranks: the same bits on all of them."""
        with hearing():
            dist.all_reduce(tensor, group=self.group)

    def most(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks."""
        found = torch.tensor(numbers, dtype=torch.int64)
        with hearing():
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found.tolist()

    def tell(self, value: Any = None) -> Any:
        """What rank 0 tells, a JSON value, on all."""
        text = json.dumps(value).encode() if self.rank == 0 else b""
        (size,) = self.most(len(text))
        letters = torch.zeros(size, dtype=torch.uint8)
        if self.rank == 0:
            letters.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        with hearing():
            dist.broadcast(letters, group_src=0, group=self.group)
        return json.loads(bytes(letters.tolist()))


def join_ranks() -> Ranks:
    """This process's place among the ranks of the default process group, which was set up with gloo."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend=backend))


@contextmanager
def hearing() -> Iterator[None]:
    """ConnectionError, charged to the machines and not to the cell, where another rank is gone.

    It comes after a moment: on a machine that goes down this process does not live to say it, so that the driver can
    tell that end, which no budget counts, from the death of one process."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        time.sleep(DYING_SECONDS)
        raise ConnectionError(f"a rank of the gang is gone ({str(error).splitlines()[0]})") from error
