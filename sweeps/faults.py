"""Fault points: named places where tests make a process crash, hang, meet a full disk or lose a reply.

Off, a point costs a look into an empty table. Armed from the environment, before the process starts:

    ESCALA_FAULT="result.before_link:crash"         at its first passing
    ESCALA_FAULT="checkpoint.before_rename:enospc@3,mirror.after_log_batch:lose"

Every point is listed in POINTS, so that a test can try them all: a crash that nobody tried is a crash that loses data.
"""

import errno
import os
import signal
import threading
import time

POINTS = {
    "attempt.before_lease": "the record of an attempt stands beside its place, the lease is not taken",
    "attempt.after_lease": "the lease is taken, where earlier logs end is not noted",
    "attempt.after_record": "the attempt is on record, nothing has been done",
    "log.before_write": "rows are ready",
    "log.after_write": "rows are in the log",
    "record.before_write": "a record's temporary file is made, empty",
    "record.before_rename": "a record stands beside its place, synced",
    "record.after_rename": "a record is in its place",
    "checkpoint.before_write": "the folder of a checkpoint is made",
    "checkpoint.before_rename": "a checkpoint stands beside its place, synced",
    "checkpoint.after_rename": "a checkpoint is in its place, older ones still stand",
    "checkpoint.after_prune": "older checkpoints are gone",
    "documents.before_write": "the cell is trained, its losses by document are not written",
    "result.before_link": "a result stands beside its place, synced",
    "result.after_link": "a result is in its place",
    "error.before_write": "an attempt has failed and cannot say so yet",
    "plan.before_write": "the cells are on record, the plan is not",
    "search.after_ask": "a trial is asked, its cells are not on record",
    "search.before_tell": "the cells of a trial have ended, the search does not know",
    "search.after_rung": "a trial's loss at a rung is on record, whether it goes on is not",
    "search.after_tell": "a trial is told",
    "claim.before_link": "a driver's claim stands beside its place",
    "claim.after_link": "a driver holds the study, the claim that it outbid still stands",
    "leftovers.after_kill": "a dead driver's worker is ended, its attempt is not on record as ended",
    "mirror.before_create_run": "a cell has no run yet",
    "mirror.after_create_run": "a run is made, the mirror has not noted it",
    "mirror.before_log_batch": "rows are ready to be sent",
    "mirror.after_log_batch": "rows are in MLflow, the mirror has not noted it",
    "mirror.before_state": "a pass is done, its offsets are not written",
    "mirror.after_state": "the offsets are written",
}
"""Name -> what stands at that moment."""

ACTIONS = ("crash", "hang", "enospc", "lose")


def fault(point: str) -> None:
    """Pass a point. Does nothing unless the environment armed it."""
    if point in _armed:
        _trip(point)


def arm(text: str) -> None:
    """Arm this process as ESCALA_FAULT would have; for a process that was forked after the import."""
    _armed.clear()
    _armed.update(_read(text))


def _trip(point: str) -> None:
    with _counting:
        action, left = _armed.get(point, ("", 0))
        if left > 1:
            _armed[point] = (action, left - 1)
        else:
            _armed.pop(point, None)
    if left != 1:
        return
    if action == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        time.sleep(1e9)
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise ConnectionError(f"the reply was lost at {point}")


def _read(text: str) -> dict[str, tuple[str, int]]:
    """{point: (action, passings until it trips)} of ESCALA_FAULT; ValueError where it names what is not there."""
    armed = {}
    for part in filter(None, text.split(",")):
        point, _, action = part.partition(":")
        action, _, count = action.partition("@")
        if point not in POINTS or action not in ACTIONS:
            raise ValueError(f"ESCALA_FAULT: {part!r} is no POINT:ACTION[@N]; actions: {', '.join(ACTIONS)}")
        armed[point] = (action, int(count or 1))
    return armed


_counting = threading.Lock()
_armed = _read(os.environ.get("ESCALA_FAULT", ""))
