"""Outages: a disk that refuses for a moment, as one in a network does, is waited for and ends no run.

What it breaks off is done again from its beginning, so that whoever works in an `Outage` reads first and changes what
it knows after. A full disk is none: it fills further while one waits.
"""

import errno
import time
from collections.abc import Callable
from types import TracebackType

from sweeps.errors import InputError
from sweeps.life import SILENCE_SECONDS

FULL = {errno.ENOSPC, errno.EDQUOT}


def refuses(error: BaseException | None) -> bool:
    """Whether an error is that of a disk which may take or tell the same a moment later."""
    if isinstance(error, InputError):  # who says in words what the disk said
        error = error.__cause__
    return isinstance(error, OSError) and error.errno is not None and error.errno not in FULL


class Outage:
    """A part of a driver's turn, as a `with` block that a refusing disk leaves early, and without a word.

    InputError where it did so in every turn for as long as a driver may be silent.
    """

    def __init__(self, over: Callable[[float], None]) -> None:
        """`over` is called with the seconds that an outage took, at its end."""
        self._over = over
        self._since: float | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        now = time.monotonic()
        if error is None and self._since is not None:
            self._over(now - self._since)
            self._since = None
        if not refuses(error):
            return False
        self._since = self._since or now
        if now - self._since >= SILENCE_SECONDS:
            raise InputError(
                f"the disk refuses again and again ({str(error).rstrip('.')}). When it is back, run the study again: "
                "nothing that was finished is lost."
            ) from error
        return True
