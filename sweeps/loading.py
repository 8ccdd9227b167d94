"""Loading large libraries without a garbage collector that looks through them while they come."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Import in here. torch and transformers make a million objects, which stay: looking at them again and again takes
    a quarter of the time of their import, and a second at the exit of a process that did not set them apart."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
