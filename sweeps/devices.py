"""What a device can do: peak speed for MFU, and the numerics that an attempt records."""

import os
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

# Dense bfloat16 peaks in FLOP/s, by a part of the device's name; the first match counts. Vendors' data sheets; figures
# "with sparsity" are twice these. A device that is not here has no MFU.
PEAK_BFLOAT16_FLOPS = {
    "GB200": 2500e12,
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
    "MI250X": 383e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak FLOP/s of a device at a precision; None, never a guess, where it is not known."""
    if precision != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_BFLOAT16_FLOPS.items() if name in device_name), None)


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How an attempt computes. Chosen at a cell's first attempt and kept; equal numerics give bit-equal losses."""

    device: str
    """cpu, or the name of the GPU."""
    threads: int
    """Of the CPU."""
    stack: int = 1
    """Cells trained as one program."""
    micro_batch: int
    """Sequences a forward pass."""
    compile: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_numerics(sequences: int) -> Numerics:
    """The numerics of a first attempt on this process's device: one thread on a CPU, the whole batch at once."""
    import numpy
    import torch
    import transformers

    return Numerics(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        threads=int(os.environ.get("OMP_NUM_THREADS", "1")),
        micro_batch=sequences,
        versions={
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
