"""What people wish of a study while it runs: pause, resume, cancel. Files in the store, which its driver reads.

A pause holds until it is lifted, whoever drives the study; a cancel is meant for the driver at work and no later one.
So each has a file of its own, and neither takes the other back: a paused study whose driver is cancelled (as the Slurm
script does at each time limit) is paused still.
"""

import getpass
import socket
from dataclasses import dataclass
from pathlib import Path

from cluster.claims import read_holder
from sweeps.errors import InputError
from sweeps.records import read_json, timestamp, write_json
from sweeps.store import Store, read_plan, study_names


@dataclass(frozen=True)
class Wish:
    """pause: keep checkpoints and wait. drain: end what runs, start nothing. cancel: keep checkpoints and end."""

    wish: str
    who: str
    when: str
    driver: int | None = None

    def __str__(self) -> str:
        done = {"pause": "paused", "drain": "drained", "cancel": "cancelled"}[self.wish]
        return f"{done} by {self.who} at {self.when}"


def person() -> str:
    """Who gives a command: login name and host."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        name = "unknown"
    return f"{name}@{socket.gethostname()}"


def read_wish(store: Store, study: str) -> Wish | None:
    """The wish that its driver is to heed: first the end that is meant for it, then a pause that was never lifted."""
    return _end_wish(store, study) or read_pause(store, study)


def read_pause(store: Store, study: str) -> Wish | None:
    """The pause that stands, whether a driver is at work or not."""
    found = _read(_pause_path(store, study)) or _read(_end_path(store, study))
    return found if found is not None and found.wish == "pause" else None


def read_ending(store: Store, study: str) -> Wish | None:
    """The cancel or drain by which the driver at work ends."""
    holder = read_holder(store, study)
    return _end_wish(store, study) if holder is not None and holder.lives else None


def pause(store: Store, study: str) -> Wish:
    """Stop the study's cells, with a checkpoint, until `resume`. InputError where it is paused already
    or trains nothing."""
    if study in study_names(store) and read_plan(store, study).get("foreign"):
        raise InputError(f"study {study} holds imported runs and trains nothing: there is nothing to pause.")
    stands = read_pause(store, study)
    if stands is not None:
        raise InputError(f"study {study} is {stands} already. `escala resume {study}` lifts it.")
    return _put(_pause_path(store, study), Wish("pause", person(), timestamp()))


def resume(store: Store, study: str) -> bool:
    """Lift a pause, and nothing else. Returns whether a driver is at work that goes on now. InputError where there is
    no pause."""
    if read_pause(store, study) is None:
        raise InputError(f"study {study} is not paused. `escala status {study}` shows what it does.")
    _pause_path(store, study).unlink(missing_ok=True)
    old = _read(_end_path(store, study))
    if old is not None and old.wish == "pause":  # of an older version
        _end_path(store, study).unlink(missing_ok=True)
    holder = read_holder(store, study)
    return holder is not None and holder.lives and read_wish(store, study) is None


def cancel(store: Store, study: str, *, now: bool) -> Wish:
    """End the driver at work: after the cells that run, or `now`, with a checkpoint of each; who asked for the latter
    before is not overruled. Returns what holds; InputError without a driver."""
    holder = read_holder(store, study)
    if holder is None or not holder.lives:
        raise InputError(f"no driver is at work on study {study}: there is nothing to cancel.")
    old = _read(_end_path(store, study))
    if old is not None and old.wish == "pause":  # an older version kept it in the file that is written now
        _put(_pause_path(store, study), old)
    stands = _end_wish(store, study)
    if stands is not None and stands.wish == "cancel" and not now:
        return stands
    return _put(_end_path(store, study), Wish("cancel" if now else "drain", person(), timestamp(), holder.number))


def _end_wish(store: Store, study: str) -> Wish | None:
    """What is meant for the study's last driver, unless that has ended. A driver that was frozen heeds it too."""
    found = _read(_end_path(store, study))
    if found is None or found.wish == "pause":  # an older version kept a pause there too
        return None
    holder = read_holder(store, study)
    if holder is None or "ended" in holder.record or found.driver not in (None, holder.number):
        return None
    return found


def _read(path: Path) -> Wish | None:
    try:
        record = read_json(path)
    except FileNotFoundError:
        return None
    return Wish(record["wish"], record["who"], record["when"], record.get("driver"))


def _put(path: Path, wish: Wish) -> Wish:
    write_json(path, vars(wish))
    return wish


def _pause_path(store: Store, study: str) -> Path:
    return store.study(study) / "pause.json"


def _end_path(store: Store, study: str) -> Path:
    """Of a cancel or a drain; in a store of an older version of a pause too, which holds as any other."""
    return store.study(study) / "control.json"
