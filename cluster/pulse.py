"""The pulse of a running cell, as its driver feels it: does it live, and does it get on?

Silence is measured by the driver's own clock from the last change that it saw: the clocks of two machines never meet.
"""

import os
import time
from contextlib import suppress

from sweeps.life import SILENCE_SECONDS
from sweeps.records import read_json, read_or_none
from sweeps.store import Attempt, Store, attempt_epochs, read_end

HANG_SECONDS = float(os.environ.get("ESCALA_HANG_SECONDS", "1800"))
"""A cell that beats but makes no step for this long hangs. A slow one makes steps."""
LOOK_SECONDS = min(5.0, SILENCE_SECONDS / 4)


def begun_attempt(store: Store, cell_id: str, attempts: int, study: str) -> Attempt | None:
    """The attempt of a study's worker that follows `attempts` earlier ones, if there is one; never that of another
    study's worker, which was quicker while this one waited for room, and which is none of ours to stop, to kill, to
    charge or to wait for."""
    epochs = attempt_epochs(store, cell_id)
    if len(epochs) <= attempts:
        return None
    found = Attempt(store, cell_id, epochs[-1])
    with suppress(FileNotFoundError):  # of an older version, which was killed before it could write it
        if read_json(found.folder / "attempt.json").get("study") not in (None, study):
            return None
    return found


class Pulse:
    """Watches the heartbeat of the attempt of a study's worker that follows `attempts` earlier ones."""

    def __init__(self, store: Store, cell_id: str, attempts: int, study: str) -> None:
        self.killed: str | None = None
        """Why the driver killed the worker, once it did."""
        self._store, self._cell_id, self._attempts, self._study = store, cell_id, attempts, study
        self._beat, self._step = 0.0, 0.0
        self._beaten = self._stepped = self._looked = time.monotonic()

    def fate(self) -> str | None:
        """Why the worker must be killed, if it must; None for one that was killed already."""
        now = time.monotonic()
        if self.killed or now - self._looked < LOOK_SECONDS:
            return None
        self._looked = now
        self._feel(now)
        if now - self._beaten > SILENCE_SECONDS:
            return f"no sign of life for {SILENCE_SECONDS:.0f} s"
        if now - self._stepped > HANG_SECONDS:
            return f"hung: no step for {HANG_SECONDS:.0f} s"
        return None

    def excuse(self, seconds: float) -> None:
        """The disk told nothing of anyone for so long: that silence is not the worker's."""
        self._beaten, self._stepped = self._beaten + seconds, self._stepped + seconds

    def _feel(self, now: float) -> None:
        attempt = begun_attempt(self._store, self._cell_id, self._attempts, self._study)
        # None while the worker starts (importing torch on a busy disk takes its time), and where it leaves the cell to
        # another study's. That, or a cell that has ended, tells nothing of the others of its program, which go on.
        if attempt is None or self._has_ended(attempt.epoch):
            self._beaten = self._stepped = now
            return
        path = attempt.folder / "heartbeat.json"
        if (told := read_or_none(path)) is None:
            return
        step, beat = told["progressed"], path.stat().st_mtime
        if beat != self._beat:
            self._beat, self._beaten = beat, now
        if step != self._step:
            self._step, self._stepped = step, now

    def _has_ended(self, epoch: int) -> bool:
        result = self._store.cell(self._cell_id) / "result.json"
        return result.exists() or read_end(self._store, self._cell_id, epoch) is not None
