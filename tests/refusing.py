"""A disk that refuses, as one in a network does for a while."""

import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import claims
from sweeps.errors import InputError


def refuse_claims(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """The disk refuses the next so many reads of a claim."""
    left, read = [times], claims.read_json

    def refuse(path: Path) -> dict[str, Any]:
        left[0] -= 1
        if left[0] >= 0:
            raise InputError(f"{path} cannot be read as a record: [Errno 116] Stale file handle")
        return read(path)

    monkeypatch.setattr(claims, "read_json", refuse)


class RefusingDisk:
    """A disk that tells and takes files, and refuses some calls of the main thread in `folder`: real files, and the
    error of a network file system in place of the call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.only = "?", ""
        """Under this, paths with this word in them."""
        self.calls = 0
        """So many there were."""
        self.refused: Callable[[int], bool] = lambda _: False
        """Whether the call of this number is refused."""
        self.last = ""
        """What was refused last."""
        reads, writes = "listdir scandir stat open", "replace rename link symlink unlink mkdir chmod utime"
        for module, names in ((io, "open"), (os, f"{reads} {writes}")):
            for name in names.split():
                monkeypatch.setattr(module, name, self._guarded(getattr(module, name)))

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(path: Any = ".", *given: Any, **named: Any) -> Any:
            mine = threading.current_thread() is threading.main_thread()
            if mine and isinstance(path, str | Path) and str(path).startswith(self.folder) and self.only in str(path):
                self.calls += 1
                if self.refused(self.calls):
                    self.last = f"{call.__name__} {path}"
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return call(path, *given, **named)

        return guarded
