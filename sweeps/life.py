"""Who writes a record, and whether that process still lives.

Guarded against: a process id that is used again, a clock that is set while a driver works (its start is told in ticks
since this boot), and processes that nobody here can ask (there the last sign of life counts): those of another machine,
and of another container that has this machine's name, and ids of its own.
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
        **_container(),
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


def _container() -> Json:
    """Where process ids are counted: containers that share the name of their machine (--net=host) each count their own.
    Empty where the kernel does not tell."""
    try:
        return {"pid_namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {}


def is_here(record: Mapping[str, Any]) -> bool:
    """Whether the process that wrote `here()` into a record can be asked from here: it is of this machine's name, and
    its id is counted as ours. A record of an older version tells the name alone."""
    counted = all(record.get(name, value) == value for name, value in _container().items())
    return bool(record.get("host") == socket.gethostname() and counted)


def is_alive(record: Mapping[str, Any], last_sign: float) -> bool:
    """Whether the process that wrote `here()` into a record lives: by its id and start time where it is here (an id may
    be used again), elsewhere by its last sign of life (Unix seconds)."""
    if not is_here(record):
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
