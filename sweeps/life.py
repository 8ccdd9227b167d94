"""Who writes a record, and whether that process still lives.

Guarded against: a process id that is used again, a clock that is set while a driver works (its start is told in ticks
since this boot), and a machine that nobody can ask (there the last sign of life counts).
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from sweeps.records import Json, timestamp

BEAT_SECONDS = float(os.environ.get("ESCALA_BEAT_SECONDS", "5"))
"""Between the signs of life of attempts and drivers."""
SILENCE_SECONDS = 12 * BEAT_SECONDS
"""Who gave no sign for this long is taken to be dead, or frozen, which comes to the same."""


def here() -> Json:
    """Who writes a record: host, process and time, so that `is_alive` can tell whether it lives."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "process_started": round(process.create_time(), 1),
        **_since_boot(process.pid),
        "started": timestamp(),
    }


def _since_boot(pid: int) -> Json:
    """When a process started, in the kernel's ticks since this boot: its time of day moves when the clock is set.
    Empty where the kernel does not tell."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return {"process_ticks": int(words[19]), "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    except OSError:
        return {}


def is_alive(record: Mapping[str, Any], last_sign: float) -> bool:
    """Whether the process that wrote `here()` into a record lives: by its id and start time on this host (an id may be
    used again), elsewhere by its last sign of life (Unix seconds)."""
    if record["host"] != socket.gethostname():
        return time.time() - last_sign < SILENCE_SECONDS
    try:
        process = psutil.Process(record["pid"])
        since = _since_boot(record["pid"])
        if since and "process_ticks" in record:
            same = all(record[name] == value for name, value in since.items())
        else:  # a record of an older version
            same = abs(round(process.create_time(), 1) - record["process_started"]) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
