"""Stopwatch: times a cell's training steps and evaluations, by the trainer itself.

What is timed is `sweeps.training.train` with an `io` that keeps nothing and ends it early: the same model, optimizer,
batches, loss and evaluations as in an attempt, so that no second training loop can drift away from the first.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps.cell import Cell
from sweeps.corpora import Corpus
from sweeps.devices import Numerics, choose_numerics
from sweeps.timing import Timed, evaluations_after

if TYPE_CHECKING:
    from sweeps.trainer import TrainerIO

POINT_SECONDS = 0.5
"""Steps are timed for so long, and the final evaluation for half of it."""
WARM_STEPS = 5
"""The first steps, with their evaluations, are not timed: memory is laid out, kernels are chosen."""
LEAST = 3
"""So many steps and forward passes are timed however long they take."""
STEPS = 400
"""A run of so many steps has its first evaluations, and steps without one between them, from the fourth step on."""


class _Enough(Exception):
    """What was to be timed has been."""


def time_cell(cell: Cell, corpus: Corpus, base_dir: Path | None = None) -> Timed:
    """Time a cell's shape and batch on this process's device, with the numerics that an attempt would choose."""
    numerics = choose_numerics(cell)
    steps = _Watch(corpus, numerics, base_dir, replace(cell, tokens=STEPS * cell.batch_tokens))
    wall, core = time.perf_counter(), time.process_time()
    steps.run()
    share = min(1.0, (time.process_time() - core) / (time.perf_counter() - wall))
    last = _Watch(corpus, numerics, base_dir, replace(cell, tokens=cell.batch_tokens))
    last.run()
    step = statistics.median(steps.plain)
    return Timed(
        family=cell.family,
        precision=cell.precision,
        shape=cell.shape,
        sequences=cell.sequences,
        micro_batch=numerics.micro_batch,
        step_seconds=step,
        forward_seconds=statistics.median(last.forwards),
        subset_seconds=max(0.0, statistics.median(steps.evaluated) - step),
        build_seconds=last.built,
        core_share=share if numerics.device == "cpu" and numerics.threads == 1 else None,
    )


class _Watch:
    """The io of a trainer that is timed: it notes when it is called, writes nothing, and ends the run in time."""

    def __init__(self, corpus: Corpus, numerics: Numerics, base_dir: Path | None, cell: Cell) -> None:
        self.corpus, self.numerics, self.base_dir, self.trunk = corpus, numerics, base_dir, None
        self.numerics_kept = True  # nothing is tried out meanwhile
        self.built = 0.0
        self.plain: list[float] = []
        """Seconds of steps without an evaluation."""
        self.evaluated: list[float] = []
        """Seconds of steps with one."""
        self.forwards: list[float] = []
        self._cell = cell
        self._since = self._began = self._timed = time.perf_counter()
        self._last: list[float] = []

    def run(self) -> None:
        from sweeps.training import train

        io: TrainerIO = self  # type: ignore[assignment]  # all of it that a trainer uses
        with suppress(_Enough):
            train(self._cell, io)

    def restore(self) -> None:
        self.built = time.perf_counter() - self._began

    def log(self, tokens: int, metrics: Mapping[str, float]) -> None:
        pass

    def should_stop(self) -> bool:
        return False

    def checkpoint(self, tokens: int, snapshot: Callable[[], Any], *, last: bool = False) -> None:
        """After every step."""
        now, step = self._now(), tokens // self._cell.batch_tokens
        if step > WARM_STEPS:
            evaluates = evaluations_after(self._cell.steps, step - 1) > evaluations_after(self._cell.steps, step)
            (self.evaluated if evaluates else self.plain).append(now - self._since)
            enough = len(self.plain) >= LEAST and bool(self.evaluated)
            if enough and now - self._timed > POINT_SECONDS:
                raise _Enough
        else:
            self._timed = now
        self._since = self._now() if last else now

    def progress(self) -> None:
        """After every forward pass of the final evaluation; its first is left out, and a last, shorter one."""
        now = self._now()
        self._last.append(now - self._since)
        self._since = now
        self.forwards = self._last[1:-1] or self._last
        if len(self.forwards) >= LEAST and sum(self._last) > POINT_SECONDS / 2:
            raise _Enough

    def _now(self) -> float:
        if self.numerics.device != "cpu":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()
