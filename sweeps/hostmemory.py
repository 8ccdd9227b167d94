"""Free memory of the host, within what a container or a batch job may take of it (Linux control groups).

The failure this guards against: a pod or a Slurm job of 16 GB on a host of 512, whose first cell takes a micro-batch
that only the host could hold, and is killed.
"""

from pathlib import Path

import psutil

FILES = {
    "memory.max": ("memory.current", "inactive_file"),
    "memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file"),
}
"""Of version 2 and of version 1: the limit -> what is used, and the key in memory.stat of the part of it that the
kernel gives back when asked (file pages)."""


def host_bytes_free(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take, by the host and by each control group that it is in."""
    folders = [folder for start in _starts(groups, mount) for folder in (start, *start.parents)]
    rooms = [room for folder in folders for limit in FILES if (room := _room(folder, limit)) is not None]
    return min([psutil.virtual_memory().available, *rooms])


def _starts(groups: Path, mount: Path) -> list[Path]:
    """The folders of this process's own groups; in a container that sees its groups as the root: the roots."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:  # another system
        return []
    paths = [(mount, path) for _, controllers, path in lines if not controllers]
    paths += [(mount / "memory", path) for _, controllers, path in lines if "memory" in controllers.split(",")]
    return [inside if (inside := root / path.lstrip("/")).is_dir() else root for root, path in paths]


def _room(folder: Path, limit: str) -> int | None:
    """What a group leaves free; None where it has no limit."""
    used, cached = FILES[limit]
    try:
        most = int((folder / limit).read_text())  # "max": no number
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, most - int((folder / used).read_text()) + int(stat.get(cached, 0)))
    except (OSError, ValueError):
        return None
