"""Training batches on their device, each exactly `corpus.batch(data_seed, step - 1, ...)`.

For a GPU a thread reads the next batches into pinned memory and copies them beside the work, so that a step never waits
for the disk or the bus. A CPU takes each when it is due: there a thread would only take the core from the step.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from sweeps.cell import Cell
from sweeps.corpora import Corpus

AHEAD = 2
"""Batches prepared before they are due."""


class Batches:
    """The batches of one attempt from `first_step` (counted from 1) to the cell's last, one after another."""

    def __init__(self, corpus: Corpus, cell: Cell, device: torch.device, first_step: int) -> None:
        self._corpus, self._cell, self._device = corpus, cell, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead = Ahead(self._copied, first_step, cell.steps) if self._stream is not None else None

    def take(self, step: int) -> torch.Tensor:
        """The batch of a step, int64 (sequences, context + 1), on the device. Raises what reading it raised."""
        if self._ahead is None:
            return self._read(step)
        batch, copied = self._ahead.take(step)
        torch.cuda.current_stream(self._device).wait_event(copied)
        batch.record_stream(torch.cuda.current_stream(self._device))  # its memory was taken by the side stream
        found: torch.Tensor = batch
        return found

    def close(self) -> None:
        """Prepare no more."""
        if self._ahead is not None:
            self._ahead.close()

    def _read(self, step: int) -> torch.Tensor:
        cell = self._cell
        return torch.from_numpy(self._corpus.batch(cell.data_seed, step - 1, cell.sequences, cell.shape.context))

    def _copied(self, step: int) -> tuple[torch.Tensor, Any]:
        with torch.cuda.stream(self._stream):
            batch = self._read(step).pin_memory().to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return batch, copied


class Ahead:
    """What `prepare(step)` gives for the steps first..last, made by a thread a little before it is taken."""

    def __init__(self, prepare: Callable[[int], Any], first: int, last: int) -> None:
        self._ready: queue.Queue[tuple[int, Any, BaseException | None]] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(prepare, first, last), name="escala-batches", daemon=True
        )
        self._thread.start()

    def take(self, step: int) -> Any:
        """Of the steps in their order. Raises what `prepare` raised, and ValueError for any other step."""
        found, value, error = self._ready.get()
        if error is not None:
            raise error
        if found != step:
            raise ValueError(f"step {step} was asked for where {found} is next")
        return value

    def close(self) -> None:
        self._closed.set()
        while self._thread.is_alive():  # it may wait for room
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _work(self, prepare: Callable[[int], Any], first: int, last: int) -> None:
        for step in range(first, last + 1):
            if self._closed.is_set():
                return
            try:
                self._ready.put((step, prepare(step), None))
            except BaseException as error:
                self._ready.put((step, None, error))
                return
