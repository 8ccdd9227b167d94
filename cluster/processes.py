"""The processes of a Ray that this process started for itself: none may be left when it has ended."""

from collections.abc import Iterable
from contextlib import suppress

import psutil

CORE = ("raylet", "gcs_server")
"""Without these Ray is dead, and a call to it would wait for minutes."""


class OwnRay:
    """The processes of one such Ray, from its start to its end."""

    def __init__(self, before: set[psutil.Process]) -> None:
        """`before` are the descendants that this process had before the start: they are not to be ended with Ray."""
        self._family = descendants() - before
        self._core = {process: name for process in self._family if (name := _name(process)) in CORE}

    def look(self) -> None:
        """Take in what Ray has started since."""
        self._family |= descendants(self._core)

    def died(self) -> str | None:
        """The name of a process whose death is that of Ray, if one has died."""
        return next((name for process, name in self._core.items() if not _runs(process)), None)

    def end(self) -> None:
        """After Ray was stopped."""
        end_processes(self._family)


def descendants(parents: Iterable[psutil.Process] = ()) -> set[psutil.Process]:
    """The processes that these have started, by default this one, and theirs."""
    found: set[psutil.Process] = set()
    for parent in parents or [psutil.Process()]:
        with suppress(psutil.Error):
            found |= set(parent.children(recursive=True))
    return found


def _runs(process: psutil.Process) -> bool:
    """Whether a process is there and no zombie."""
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _name(process: psutil.Process) -> str | None:
    with suppress(psutil.Error):  # it is gone: Ray starts some that end at once
        return str(process.name())
    return None


def end_processes(processes: Iterable[psutil.Process]) -> None:
    """Kill those that do not end by themselves. One whose parent died first is told by nobody else."""
    _, alive = psutil.wait_procs(list(processes), timeout=5.0)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
