"""Claims: which process is the one driver of a study.

Claims are numbered, studies/<name>/driver-<k>.json, and the highest counts. The highest is never taken away, only
outbid by the next number, which one process alone can link: so of many that find a dead driver, one replaces it. A
driver that was frozen wakes up to a higher number, even if its successor has ended; it looks whether it still holds
the study before it writes anything.
"""

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sweeps.errors import InputError
from sweeps.faults import fault
from sweeps.life import BEAT_SECONDS, SILENCE_SECONDS, here, is_alive
from sweeps.records import Json, disk_error, read_json, read_or_none, timestamp, write_beside, write_json
from sweeps.store import STUDY_NAME, Store

AGAIN_SECONDS = 0.5
"""Between two looks at a disk that refuses."""


@dataclass(frozen=True)
class Holder:
    """A claim that was found."""

    number: int
    path: Path
    record: Json
    silent_seconds: float

    @property
    def lives(self) -> bool:
        """A process that is gone, or that gave no sign for long (frozen, or on a machine that is gone), does not."""
        if "ended" in self.record:
            return False
        return self.silent_seconds < SILENCE_SECONDS and is_alive(self.record, time.time() - self.silent_seconds)


def read_holder(store: Store, study: str) -> Holder | None:
    """The study's highest claim; None where there is none."""
    while True:
        path = max(_claims(store.study(study)), key=_number, default=None)
        if path is None:
            return None
        with suppress(FileNotFoundError):  # it has just been outbid
            return Holder(_number(path), path, read_json(path), time.time() - path.stat().st_mtime)


def _claims(folder: Path) -> list[Path]:
    """Those of a study's folder. What a program left beside them, such as `driver-0 (copy).json`, is none."""
    return [path for path in folder.glob("driver-*.json") if path.stem.removeprefix("driver-").isdecimal()]


def _number(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def living_drivers(store: Store) -> list[tuple[str, Json]]:
    """(study, claim) of every driver that works on the store now."""
    folders = sorted({path.parent.name for path in (store.root / "studies").glob("*/driver-*.json")})
    holders = {name: read_holder(store, name) for name in folders if STUDY_NAME.fullmatch(name)}
    return [(name, holder.record) for name, holder in holders.items() if holder is not None and holder.lives]


def driver_lives(store: Store, study: str, number: int) -> bool:
    """Whether the driver with this claim is at work."""
    holder = read_holder(store, study)
    return holder is not None and holder.number == number and holder.lives


def read_eta(store: Store, study: str) -> float | None:
    """In how many seconds the study's driver expects to be done; None where none lives, or it does not know."""
    holder = read_holder(store, study)
    path = _eta_path(store, study)
    told = read_or_none(path) if holder is not None and holder.lives else None
    if holder is None or told is None or told["driver"] != holder.number or told["seconds"] is None:
        return None
    with suppress(FileNotFoundError):  # it has just ended
        return max(0.0, float(told["seconds"]) - max(0.0, time.time() - path.stat().st_mtime))
    return None


def _eta_path(store: Store, study: str) -> Path:
    return store.study(study) / "eta.json"


class Claim:
    """This process as a study's driver, from entering to leaving its `with` block. A thread keeps it alive.

    Entering raises InputError that names the holder where another driver lives.
    """

    def __init__(self, store: Store, study: str) -> None:
        self.store, self.study = store, study
        self.number = -1
        self._path = Path()
        self._eta: tuple[float, float | None] = (0.0, None)
        """When it was expected, and what."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="escala-claim", daemon=True)

    def holds(self, patience: float = 0.0) -> bool:
        """Whether no other driver has taken the study over. Looks at the disk, and where that refuses again and again
        for so many seconds, in which the caller does nothing; then InputError."""
        deadline = time.monotonic() + patience
        while True:
            try:
                holder = read_holder(self.store, self.study)
                return holder is not None and holder.number == self.number
            except (InputError, OSError) as error:
                if time.monotonic() >= deadline:
                    raise InputError(
                        f"the claim on study {self.study} cannot be read ({error}). When the disk is back, run the "
                        "study again: nothing that was finished is lost."
                    ) from error
            time.sleep(AGAIN_SECONDS)

    def expect(self, eta_seconds: float | None) -> None:
        """In how long the driver will be done, as far as it knows: told with the next sign of life."""
        self._eta = (time.monotonic(), eta_seconds)

    def __enter__(self) -> "Claim":
        folder = self.store.study(self.study)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._outbid(folder)
        except OSError as error:
            raise disk_error(folder, error) from error
        for lower in _claims(folder):
            if _number(lower) < self.number:
                lower.unlink(missing_ok=True)
        self._thread.start()
        return self

    def _outbid(self, folder: Path) -> None:
        while True:
            holder = read_holder(self.store, self.study)
            if holder is not None and holder.lives:
                raise InputError(_held(self.study, holder))
            self.number = holder.number + 1 if holder else 0
            self._path = folder / f"driver-{self.number}.json"
            temporary = write_beside(self._path, json.dumps(here()).encode())
            try:
                fault("claim.before_link")
                os.link(temporary, self._path)
                fault("claim.after_link")
                return
            except FileExistsError:  # another was quicker
                continue
            finally:
                os.unlink(temporary)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        with suppress(InputError):  # a disk that refuses: the next driver sees that this process is gone
            if self.holds():
                _eta_path(self.store, self.study).unlink(missing_ok=True)
                write_json(self._path, {**read_json(self._path), "ended": timestamp()})

    def _loop(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(OSError, InputError):  # a disk that refuses for a moment must not end the signs for good
                if self.holds():
                    os.utime(self._path)
                    self._tell_eta()

    def _tell_eta(self) -> None:
        since, seconds = self._eta
        path = _eta_path(self.store, self.study)
        if seconds is None and not path.exists():
            return
        left = None if seconds is None else max(0.0, seconds - (time.monotonic() - since))
        write_json(path, {"driver": self.number, "seconds": left}, sync=False)


def _held(study: str, holder: Holder) -> str:
    record, silent = holder.record, max(0.0, holder.silent_seconds)
    return (
        f"study {study} is being run by process {record['pid']} on {record['host']} since {record['started']}, last "
        f"sign of life {silent:.0f} s ago. Wait for it, or stop it: escala cancel {study}. If that machine is gone, "
        f"run this again in {SILENCE_SECONDS - silent:.0f} s: who is silent for {SILENCE_SECONDS:.0f} s is replaced "
        "safely."
    )
