"""Senders: the threads in which the mirror syncs several cells at once."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

SENDERS = 4
"""Cells that are sent to a server at once: what a pass waits for is the server and the way to it."""
LAST_SECONDS = 2.0
"""What each request under way gets at Ctrl-C."""


def send(
    cells: Sequence[str],
    sync: Callable[[str], list[str]],
    *,
    senders: int,
    gone: threading.Event,
    tell: Callable[[], None],
) -> list[str]:
    """Call `sync` for each cell, by so many senders, this thread among them; what it found of all, in no order.

    `tell` is called after each, by one thread at a time. At Ctrl-C `gone` is set, by which `sync` knows that nothing
    more is to begin.
    """
    left, lock = iter(cells), threading.Lock()
    found: list[str] = []

    def work() -> None:
        for cell_id in left:  # each goes to one thread
            faults = sync(cell_id)
            with lock:
                found.extend(faults)
                tell()

    others: list[threading.Thread] = []
    try:
        with suppress(RuntimeError):  # no room for more threads: this one does it all
            while len(others) < min(senders, len(cells)) - 1:
                # a daemon, unlike those of concurrent.futures: a request that hangs does not keep the process
                one = threading.Thread(target=work, name="escala-sender", daemon=True)
                one.start()
                others.append(one)
        work()
        for one in others:
            one.join()
    except BaseException:  # what is under way may end
        gone.set()
        for one in others:
            one.join(LAST_SECONDS)
        raise
    return found
