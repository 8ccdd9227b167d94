"""What people wish of a study while it runs: pause, resume, cancel. A file in the store, which its driver reads.

A pause holds until it is lifted, whoever drives the study; a cancel is meant for the driver at work and no later one.
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
    """The wish that stands, whether a driver is at work or not."""
    try:
        record = read_json(_path(store, study))
    except FileNotFoundError:
        return None
    return Wish(record["wish"], record["who"], record["when"], record.get("driver"))


def pause(store: Store, study: str) -> Wish:
    """Stop the study's cells, with a checkpoint, until `resume`. InputError where it is paused already
    or trains nothing."""
    if study in study_names(store) and read_plan(store, study).get("foreign"):
        raise InputError(f"study {study} holds imported runs and trains nothing: there is nothing to pause.")
    stands = read_wish(store, study)
    if stands is not None and stands.wish == "pause":
        raise InputError(f"study {study} is {stands} already. `escala resume {study}` lifts it.")
    return _put(store, study, Wish("pause", person(), timestamp()))


def resume(store: Store, study: str) -> bool:
    """Lift a pause. Returns whether a driver is at work that goes on now. InputError where there is no pause."""
    stands = read_wish(store, study)
    if stands is None or stands.wish != "pause":
        raise InputError(f"study {study} is not paused. `escala status {study}` shows what it does.")
    _path(store, study).unlink(missing_ok=True)
    holder = read_holder(store, study)
    return holder is not None and holder.lives


def cancel(store: Store, study: str, *, now: bool) -> Wish:
    """End the driver at work: after the cells that run, or `now`, with a checkpoint of each. InputError without one."""
    holder = read_holder(store, study)
    if holder is None or not holder.lives:
        raise InputError(f"no driver is at work on study {study}: there is nothing to cancel.")
    return _put(store, study, Wish("cancel" if now else "drain", person(), timestamp(), holder.number))


def _put(store: Store, study: str, wish: Wish) -> Wish:
    write_json(_path(store, study), vars(wish))
    return wish


def _path(store: Store, study: str) -> Path:
    return store.study(study) / "control.json"
