"""A gang for tests, without Ray: two processes that join over gloo and train one cell after another."""

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

from sweeps.heartbeat import Heartbeat, Stop
from sweeps.store import Store

PATIENCE_SECONDS = 180


@dataclass(frozen=True)
class Order:
    """A cell to be tried."""

    root: Path
    cell_id: str
    room: int = 2**40
    """Bytes of memory that each rank may take."""
    stop_at: float = math.inf
    """Tokens after which rank 0 hears a request to stop."""
    sigterm_at: float = math.inf
    """Tokens after which rank 1 gets a SIGTERM."""


class Gang:
    """Two ranks that stay warm."""

    def __init__(self, folder: Path) -> None:
        context: Any = multiprocessing.get_context("spawn")
        self._orders, self._ends = [context.Queue(), context.Queue()], context.Queue()
        self.processes = [
            context.Process(target=_work, args=(rank, folder / "meet", self._orders[rank], self._ends), daemon=True)
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def start(self, store: Store, cell_id: str, **changes: Any) -> None:
        for orders in self._orders:
            orders.put(Order(store.root, cell_id, **changes))

    def end(self) -> tuple[str, str | None]:
        """The state and reason of the attempt."""
        found: tuple[str, str | None] = self._ends.get(timeout=PATIENCE_SECONDS)
        return found

    def train(self, store: Store, cell_id: str, **changes: Any) -> tuple[str, str | None]:
        self.start(store, cell_id, **changes)
        return self.end()


@contextmanager
def stopping(tokens: float) -> Iterator[None]:
    """Attempts of this process hear a request to stop after so many tokens."""
    progress = Heartbeat.progress

    def heard(self: Heartbeat, seen: int | None = None) -> None:
        progress(self, seen)
        if seen is not None and seen >= tokens:
            self.stop = Stop("stopped", "asked")

    Heartbeat.progress = heard  # type: ignore[method-assign]
    try:
        yield
    finally:
        Heartbeat.progress = progress  # type: ignore[method-assign]


@contextmanager
def gang(folder: Path) -> Iterator[Gang]:
    made = Gang(folder)
    try:
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.join()


def _work(rank: int, meet: Path, orders: Any, ends: Any) -> None:
    import torch
    import torch.distributed as dist

    import sweeps.devices
    from sweeps.attempt import run_attempts
    from sweeps.gang import Follower, follow_attempt
    from sweeps.ranks import join_ranks

    due = Follower.checkpoint

    def checkpoint(self: Follower, tokens: int, snapshot: Any, *, last: bool = False) -> None:
        if tokens >= order.sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)
        due(self, tokens, snapshot, last=last)

    Follower.checkpoint = checkpoint  # type: ignore[method-assign]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    ranks = join_ranks()
    while True:
        order: Order = orders.get()
        sweeps.devices.bytes_available = lambda room=order.room: room
        store = Store(order.root)
        if rank:
            follow_attempt(store, order.cell_id, ranks)
            continue
        with stopping(order.stop_at):
            (ended,) = run_attempts(store, [order.cell_id], study="demo", ranks=ranks)
        ends.put((ended.state, ended.reason))
