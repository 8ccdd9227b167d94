"""Hardware: what a device-hour draws and costs, from one dated table; and what this machine's device is called.

Guarded against: a guess that looks like a figure. A device, or a price, that is not in the table has no number, and the
sentence that says so. Peak speeds are in sweeps/devices.py.
"""

import os
import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

AWS = "AWS on demand, us-east, an eighth of a node"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One board."""

    pattern: str
    """A regular expression found in the name that the driver gives the device."""
    watts: float
    """Its published power limit, not a measurement. The mean draw of dense training is 60 to 90% of it."""
    dollars_per_hour: float | None = None
    """A public cloud's list price, on demand; None where none is on record."""
    source: str = ""
    """Whose price, where, when."""


# The first match counts; a form factor that is not listed matches nothing.
DEVICES = (
    Device(pattern=r"\bB200", watts=1000),
    Device(pattern=r"\bH200(?! NVL)", watts=700, dollars_per_hour=7.91, source=f"{AWS}, 2026-08"),
    Device(pattern=r"\bH100(?! NVL| PCIe)", watts=700, dollars_per_hour=6.88, source=f"{AWS}, 2026-11"),
    Device(pattern=r"A100-SXM4-80GB", watts=400, dollars_per_hour=3.43, source=f"{AWS}, 2026-11"),
    Device(pattern=r"A100-SXM4-40GB", watts=400, dollars_per_hour=2.74, source=f"{AWS}, 2026-11"),
    Device(pattern=r"A100 80GB PCIe", watts=300, dollars_per_hour=3.67, source="Azure pay as you go, East US, 2026-11"),
    Device(pattern=r"V100-SXM2", watts=300),
    Device(pattern=r"\bL40S", watts=350),
    Device(pattern=r"\bL4\b", watts=72),
    Device(pattern=r"\bT4\b", watts=70),
    Device(pattern=r"RTX 4090(?! Laptop| D)", watts=450),
    Device(pattern=r"RTX 3090(?! Ti)", watts=350),
)


@dataclass(frozen=True)
class Amount:
    """A figure with what it means, or None with why there is none."""

    value: float | None
    note: str


def find_device(name: str) -> Device | None:
    """The table's entry for a device's name; None where it has none."""
    return next((device for device in DEVICES if re.search(device.pattern, name)), None)


def _unknown(name: str) -> str:
    return f"the device {name!r} is not in the table of cluster/hardware.py: neither its power nor its price is known"


def energy(name: str, device_seconds: float) -> Amount:
    """Kilowatt-hours that devices of a name draw at most in so many seconds, all devices together."""
    device = find_device(name)
    if device is None:
        return Amount(None, _unknown(name))
    note = f"at the board's limit of {device.watts:g} W, without hosts and cooling"
    return Amount(device.watts / 1000 * device_seconds / 3600, note)


def money(name: str, device_seconds: float) -> Amount:
    """US dollars for so many device-seconds at the list price."""
    device = find_device(name)
    if device is None:
        return Amount(None, _unknown(name))
    if device.dollars_per_hour is None:
        return Amount(None, f"the table of cluster/hardware.py has no price for {name!r}")
    note = f"at ${device.dollars_per_hour:.2f} an hour ({device.source})"
    return Amount(device.dollars_per_hour * device_seconds / 3600, note)


# --- this machine ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def local_gpus(root: Path = Path("/proc/driver/nvidia/gpus")) -> tuple[str, ...]:
    """The names of this machine's GPUs, as the driver's files tell them: asking CUDA would load torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    names = []
    for path in sorted(root.glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", path.read_text(errors="replace"), re.MULTILINE)
        names += [found[1].strip()] if found else []
    return tuple(names)


@lru_cache(maxsize=1)
def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """The model name of this machine's processor."""
    try:
        lines = info.read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "unknown processor"


def kind_of(device: str, threads: int) -> str:
    """The name of a kind of worker, fit for a file: its device, and on a CPU its threads."""
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device.lower())).strip("-")
    return f"{slug}-{threads}-thread{'s' if threads > 1 else ''}" if device == processor() else slug


def local_kind() -> str:
    """The kind of worker that a run on this machine would start."""
    gpus = local_gpus()
    return kind_of(gpus[0] if gpus else processor(), threads=1)
