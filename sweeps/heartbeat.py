"""The heartbeat of an attempt: says that it lives, and hears that it must stop.

A thread beside training writes heartbeat.json and looks for three reasons to stop: a request in the attempt's folder
(a person's, or the driver's), a later attempt that has taken the cell over, and SIGTERM, which a machine gets a
moment before it is taken away. Training itself never waits for a disk to learn of them.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from sweeps.errors import InputError
from sweeps.life import BEAT_SECONDS
from sweeps.records import read_json, write_json
from sweeps.store import Attempt

LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Stop:
    """Why an attempt must end."""

    kind: str
    """preemption, stopped, or superseded: a later attempt holds the cell."""
    why: str


class Heartbeat:
    """Runs from entering to leaving its `with` block."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.stop: Stop | None = None
        """Set once there is a reason to stop."""
        self.resumed_from = 0
        """Tokens of the checkpoint from which the attempt went on."""
        self.tokens = 0
        """The last that training told of."""
        self._progressed = time.time()
        self._path = attempt.folder / "heartbeat.json"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="escala-heartbeat", daemon=True)

    def progress(self, tokens: int | None = None) -> None:
        """Training goes on: a process that beats without progress hangs."""
        if tokens is not None:
            self.tokens = tokens
        self._progressed = time.time()

    def __enter__(self) -> "Heartbeat":
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError, InputError):  # how the attempt ended is on record, or is on its way there
            self._beat()

    def _loop(self) -> None:
        beaten = time.monotonic()
        while not self._over.wait(LOOK_SECONDS):
            with suppress(OSError, InputError):  # a disk that fails stops training where it writes, not here
                self._look()
                if time.monotonic() - beaten >= BEAT_SECONDS:
                    beaten = time.monotonic()
                    self._beat()

    def _look(self) -> None:
        if self.stop is None and not self.attempt.holds_lease():
            self.stop = Stop("superseded", "a later attempt has taken this cell over")
        if self.stop is None:
            with suppress(FileNotFoundError):
                asked = read_json(self.attempt.folder / "stop.json")
                self.stop = Stop(asked["kind"], asked["why"])

    def _beat(self) -> None:
        record = {"time": round(time.time(), 3), "tokens": self.tokens, "progressed": round(self._progressed, 3)}
        record |= {"resumed_from": self.resumed_from}
        try:
            write_json(self._path, record, sync=False)
        except InputError:
            if not self._path.exists():  # the first: an attempt on such a disk must not begin
                raise
            os.utime(self._path)  # a full disk can still take a new time


class Stoppable(Protocol):
    """What hears that it must stop: a heartbeat, or a rank that follows one (sweeps/gang.py)."""

    stop: Stop | None


_under_way: set[Stoppable] = set()
"""What SIGTERM is told to."""


@contextmanager
def terminable(*heartbeats: Stoppable) -> Iterator[None]:
    """SIGTERM asks the attempts to stop, as a preempted machine does. Elsewhere than in the main thread only where
    `hear_sigterm` was called."""
    before = None
    _under_way.update(heartbeats)
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _ask_all)
    try:
        yield
    finally:
        _under_way.difference_update(heartbeats)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def hear_sigterm() -> None:
    """SIGTERM asks the attempts of this process to stop wherever they train; while there is none it does what it did.

    To be called in the main thread, for trainers that run in another, as under Ray Train.
    """
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: object) -> None:
        if _under_way:
            _ask_all()
        elif callable(before):
            before(number, frame)  # type: ignore[arg-type]
        else:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, handle)


def _ask_all(*_: object) -> None:
    for one in _under_way:
        one.stop = one.stop or Stop("preemption", "SIGTERM")
