"""What a device can do: peak speed for MFU, and the numerics that an attempt records."""

import ctypes
import gc
import os
import platform
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sweeps.cell import Cell
from sweeps.errors import InputError
from sweeps.hostmemory import host_bytes_free
from sweeps.memory import allocator_share, choose_micro_batch, part_sizes, step_bytes
from sweeps.units import plural

if TYPE_CHECKING:
    import torch

HOST_SHARE = 0.5
"""Of the host's free memory, the most that an attempt on a CPU takes for granted."""
_host_part = 1.0
"""Of the host's memory, what is for this process among those that may train beside it (`cap_memory`)."""

# Dense bfloat16 peaks in FLOP/s, by words of the device's name; the first match counts. Vendors' data sheets; figures
# "with sparsity" are twice these, and that of an MI250X is for two devices. A device that is not here has no MFU.
PEAK_BFLOAT16_FLOPS = {
    "GB200": 2500e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "L40S": 362e12,
    "L4": 121e12,
    "MI300X": 1307.4e12,
    "MI325X": 1307.4e12,
    "MI250X": 191.5e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak FLOP/s of a device at a precision; None, never a guess, where it is not known."""
    if precision != "bfloat16":
        return None
    if re.search(r"\bMIG\b|Laptop| Ti\b| D\b", device_name):  # a part of a device, or another of that name
        return None
    return next((peak for name, peak in PEAK_BFLOAT16_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How an attempt computes. Chosen at a cell's first attempt and kept; equal numerics give bit-equal losses."""

    device: str
    """cpu, or the name of the GPU."""
    threads: int
    """Of the CPU."""
    stack: int = 1
    """Cells trained as one program."""
    workers: int = 1
    """Processes that train the cell together, each with its slice of every batch."""
    sharded: bool = False
    """Whether they have a part of the model each instead of all of it."""
    micro_batch: int
    """Sequences a forward pass, of each worker."""
    compile: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_numerics(cell: Cell, *, stack: int = 1, threads: int = 1, workers: int = 1) -> Numerics:
    """The numerics of a first attempt on this process's device, with as much of a batch at once as fits.

    `stack` cells of this shape train as one program; or `workers` processes train one cell, sharded where it does not
    fit otherwise. InputError where not even one sequence fits, or a batch has none for some of the workers.
    """
    if cell.sequences < workers:
        raise InputError(
            f"a batch of {plural(cell.sequences, 'sequence')} has none for some of {workers} workers. Use fewer "
            "workers, or raise batch_tokens."
        )
    import numpy
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        gc.collect()  # what an earlier cell of this process left in cycles is on the device until then
    share, room = -(-cell.sequences // workers), bytes_available()
    whole = step_bytes(cell.shape, 1, cell.precision, device, stack).total
    if device == "cpu" and workers == 1 and whole > room:  # others may be smaller than their part
        room = min(whole, int(host_bytes_free() * HOST_SHARE))
    sharded = workers > 1 and whole > room
    shards = workers if sharded else 1
    return Numerics(
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        threads=threads,
        stack=stack,
        workers=workers,
        sharded=sharded,
        micro_batch=choose_micro_batch(
            cell.shape, share, cell.precision, room, device=device, stack=stack, shards=shards
        ),
        versions={
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def keep_freed_memory() -> bool:
    """Have glibc keep what a step frees for the next step, for this process; False where the C library is another.

    By default large blocks go back to the kernel, which hands them out again page by page, zeroed: 2 to 5% of the
    time of a step on a CPU. Numbers do not change.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def hide_gpus() -> None:
    """Let torch see no GPU in this process, which was given none: Ray hides them from none of its own accord. To be
    called before anything asks for one. An empty list would hide NVIDIA's and no AMD's."""
    os.environ |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "-1")


def cap_memory(share: float, host_part: float) -> None:
    """Let this process take no more than a share of its GPU's memory, if it has one, or plan with no more than its part
    of the host's: others may have theirs."""
    global _host_part
    import torch

    _host_part = host_part
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(allocator_share(share, total))


def bytes_available() -> int:
    """Memory that this process may still take: a share of the host's, or of its device within the process's own cap."""
    import torch

    if not torch.cuda.is_available():
        return int(host_bytes_free() * min(HOST_SHARE, _host_part))
    free, total = torch.cuda.mem_get_info()
    reserved, held = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    cap = int(total * torch.cuda.get_per_process_memory_fraction())
    return min(free + reserved, cap) - held  # what is reserved and not held is the allocator's to give


def peak_memory_bytes(device: "torch.device") -> int:
    """The most that was held: of a GPU, by the tensors of this attempt; of the host, by the process so far, which
    Linux counts in KiB and macOS in bytes."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def probe_micro_batch(
    loss: "Callable[[torch.Tensor], torch.Tensor]",
    model: "torch.nn.Module",
    cell: Cell,
    micro_batch: int,
    workers: int = 1,
) -> int:
    """The micro-batch after one forward and backward pass on a GPU has shown what it takes; on a CPU as it was.

    The model is on its device, without gradients and without an optimizer's state, and is left so.
    """
    import torch

    if next(model.parameters()).device.type == "cpu":
        return micro_batch
    weights = sum(parameter.nbytes for parameter in model.parameters())
    room = bytes_available() - 3 * weights  # gradients and two moments
    sizes = sorted(part_sizes(-(-cell.sequences // workers)))
    while True:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
                shape = (micro_batch, cell.shape.context + 1)
                loss(torch.zeros(shape, dtype=torch.int64, device="cuda")).backward()
        except torch.cuda.OutOfMemoryError:
            if micro_batch == 1:
                raise
            most = micro_batch / 2
        else:
            taken = torch.cuda.max_memory_allocated() - before - weights
            return max([size for size in sizes if size * taken / micro_batch <= room], default=1)
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        micro_batch = max(size for size in sizes if size <= most)
