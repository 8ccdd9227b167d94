"""Leftovers: attempts that no living driver watches any more, ended before their cells are tried again.

Workers outlive a killed driver by seconds and go on writing. Their lease protects the result; this ends them, or waits
until they have let go, so that no two processes train one cell.
"""

import os
import signal
import time
from contextlib import suppress

from cluster.claims import driver_lives
from sweeps.errors import InputError
from sweeps.faults import fault
from sweeps.life import SILENCE_SECONDS, is_here
from sweeps.records import Json, read_json
from sweeps.store import (
    Attempt,
    Store,
    ask_to_stop,
    attempt_epochs,
    attempt_lives,
    last_sign,
    read_end,
    record_error,
)

END_SECONDS = 10.0


def settle(store: Store, cell_id: str, study: str, driver: int) -> bool:
    """Whether a cell is free to be tried by this driver (the number of its claim on `study`), or has ended.

    A worker of a dead driver on this machine is killed; on another, or of another user, it is asked to stop, and the
    cell is not free until it does or falls silent. A cell that a living driver trains for another study is not free.
    """
    epochs = attempt_epochs(store, cell_id)
    if not epochs or read_end(store, cell_id, epochs[-1]) or (store.cell(cell_id) / "result.json").exists():
        return True
    attempt = Attempt(store, cell_id, epochs[-1])
    try:
        record = read_json(attempt.folder / "attempt.json")
    except FileNotFoundError:  # an older version wrote it after the lease was taken, or was killed before it could
        record = {}
    owner = (record.get("study"), record.get("driver", -1))
    if owner[0] is not None and owner != (study, driver) and driver_lives(store, owner[0], owner[1]):
        return False
    if attempt_lives(store, cell_id, attempt.epoch) and not _end(attempt, record):
        return False
    fault("leftovers.after_kill")
    if read_end(store, cell_id, attempt.epoch) is None and not (store.cell(cell_id) / "result.json").exists():
        record_error(attempt, "preemption", "its driver was gone")
    return True


def kill_worker(attempt: Attempt) -> None:
    """Kill the process of an attempt where it is on this machine: Ray's order does not reach a frozen one."""
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # Ray may run as another user
        record = read_json(attempt.folder / "attempt.json")
        ours = is_here(record) and record["pid"] != os.getpid()
        if ours and attempt_lives(attempt.store, attempt.cell_id, attempt.epoch):
            os.kill(record["pid"], signal.SIGKILL)


def _end(attempt: Attempt, record: Json) -> bool:
    """End a living attempt. Whether it is over."""
    if is_here(record):
        with suppress(PermissionError):  # another user's, of the group that shares the store
            if record["pid"] != os.getpid():  # ours is one that this driver began for a worker that died too early
                _kill(record, attempt)
            return True
    silent = time.time() - last_sign(attempt.store, attempt.cell_id, attempt.epoch)
    if record and not (attempt.folder / "stop.json").exists():
        ask_to_stop(attempt, "preemption", "its driver was gone")
    return silent > SILENCE_SECONDS


def _kill(record: Json, attempt: Attempt) -> None:
    with suppress(ProcessLookupError):
        os.kill(record["pid"], signal.SIGKILL)  # `attempt_lives` has just held its start time against the record's
    deadline = time.monotonic() + END_SECONDS
    while attempt_lives(attempt.store, attempt.cell_id, attempt.epoch):
        if time.monotonic() > deadline:
            raise InputError(
                f"process {record['pid']}, which a dead driver left behind, does not end. End it, then run again."
            )
        time.sleep(0.05)
