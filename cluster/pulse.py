"""The pulse of a running cell, as its driver feels it: does it live, and does it get on?

Silence is measured by the driver's own clock from the last change that it saw: the clocks of two machines never meet.
"""

import os
import time

from sweeps.life import SILENCE_SECONDS
from sweeps.records import read_json
from sweeps.store import Store, attempt_epochs, read_end

HANG_SECONDS = float(os.environ.get("ESCALA_HANG_SECONDS", "1800"))
"""A cell that beats but makes no step for this long hangs. A slow one makes steps."""
LOOK_SECONDS = min(5.0, SILENCE_SECONDS / 4)


class Pulse:
    """Watches the heartbeat of the attempt that follows `attempts` earlier ones."""

    def __init__(self, store: Store, cell_id: str, attempts: int) -> None:
        self.killed: str | None = None
        """Why the driver killed the worker, once it did."""
        self._store, self._cell_id, self._attempts = store, cell_id, attempts
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
        epochs = attempt_epochs(self._store, self._cell_id)
        if len(epochs) <= self._attempts:  # the worker still starts: importing torch on a busy disk takes its time
            self._beaten = self._stepped = now
            return
        if self._has_ended(epochs[-1]):  # while others of its program go on
            self._beaten = self._stepped = now
            return
        try:
            path = self._store.attempt(self._cell_id, epochs[-1]) / "heartbeat.json"
            step, beat = read_json(path)["progressed"], path.stat().st_mtime
        except FileNotFoundError:
            return
        if beat != self._beat:
            self._beat, self._beaten = beat, now
        if step != self._step:
            self._step, self._stepped = step, now

    def _has_ended(self, epoch: int) -> bool:
        result = self._store.cell(self._cell_id) / "result.json"
        return result.exists() or read_end(self._store, self._cell_id, epoch) is not None
