"""One cell on several processes: rank 0 holds the attempt, the others follow it step by step.

Every rank builds the same model, takes its slice of the same global batch, and steps with the same gradients, so that
neither the order of the data nor, within rounding, the loss depends on how many there are. Only rank 0 has a lease, a
log, a heartbeat, checkpoints and a result. Ranks differ in nothing but their io: each of its calls is a meeting, at
which rank 0 says whether the attempt goes on and hears whether a machine is about to be taken away. An error that only
one rank meets ends its process, and with it the gang (sweeps/ranks.py); the cell is tried again from its checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sweeps.cell import Cell, cell_from_identity
from sweeps.checkpoints import State, load
from sweeps.corpora import Corpus, open_corpus
from sweeps.devices import Numerics
from sweeps.errors import InputError
from sweeps.heartbeat import Stop, terminable
from sweeps.ranks import Ranks
from sweeps.store import Store, read_cell
from sweeps.trainer import Stopped, TrainerIO


class Leader(TrainerIO):
    """The io of rank 0: the attempt's own, whose ends the other ranks hear of."""

    def __init__(self, ranks: Ranks, *args: Any, **named: Any) -> None:
        """Those of `TrainerIO`. Tells the others how to compute."""
        super().__init__(*args, **named)
        self._ranks = ranks
        ranks.tell({"numerics": asdict(self.numerics), "kept": self.numerics_kept})

    def log(self, tokens: int, metrics: Mapping[str, float]) -> None:
        with self._heard():
            super().log(tokens, metrics)

    def checkpoint(self, tokens: int, snapshot: Callable[[], State], *, last: bool = False) -> None:
        due, over = False, True
        try:
            due = self.is_due(tokens, last=last)
            over = False
        finally:
            due = self._meet(over, due)
        if due:
            state = snapshot()  # the ranks make it together where each has a part of it
            with self._heard():
                self.keep(tokens, lambda: state, last=last)

    def restore(self) -> dict[str, Any] | None:
        with self._heard():
            state = super().restore()
        self._ranks.tell({"path": str(self.restored_from) if state is not None else None, "trunk": self.trunk})
        return state

    def progress(self) -> None:
        with self._heard():
            super().progress()

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Do a part of the attempt, then tell the others whether it goes on."""
        over = True
        try:
            yield
            over = False
        finally:
            self._meet(over)

    def _meet(self, over: bool, due: bool = False) -> bool:
        """Tell the others whether the attempt is over; whether a checkpoint is due, here or for one of them."""
        _, wanted, terminated = self._ranks.most(over, due, False)
        if terminated:
            self._heartbeat.stop = self._heartbeat.stop or Stop("preemption", "SIGTERM on another rank")
        return bool(wanted or terminated)


class Follower:
    """The io of every other rank: it writes nothing, and ends when rank 0 does."""

    def __init__(self, ranks: Ranks, cell: Cell, corpus: Corpus, base_dir: Path | None) -> None:
        told = ranks.tell()
        self.corpus, self.base_dir = corpus, base_dir
        self.numerics, self.numerics_kept = Numerics(**told["numerics"]), told["kept"]
        self.trunk: dict[str, Any] | None = None
        self.stop: Stop | None = None
        """Set where this process was told to end: as of `Heartbeat`."""
        self._ranks, self._cell = ranks, cell

    def log(self, tokens: int, metrics: Mapping[str, float]) -> None:
        self._hear()

    def checkpoint(self, tokens: int, snapshot: Callable[[], State], *, last: bool = False) -> None:
        if self._hear():
            snapshot()
            self._hear()

    def choose(self, **changes: Any) -> None:
        self.numerics = replace(self.numerics, **changes)

    def restore(self) -> dict[str, Any] | None:
        self._hear()
        told = self._ranks.tell()
        self.trunk = told["trunk"]
        if told["path"] is None:
            return None
        found = load(Path(told["path"]))
        if found is None:
            raise InputError(f"{told['path']} cannot be read here, and rank 0 reads it. Both must see the same store.")
        return found.state

    def progress(self) -> None:
        self._hear()

    def _hear(self) -> bool:
        """Whether a checkpoint is due. Raises Stopped where rank 0 has ended the attempt."""
        over, due, terminated = self._ranks.most(False, False, self.stop is not None)
        if over:
            raise Stopped(Stop("stopped", "rank 0 has ended the attempt"))
        return bool(due or terminated)


def follow_attempt(store: Store, cell_id: str, ranks: Ranks, *, base_dir: Path | None = None) -> None:
    """Train with rank 0, which runs `run_attempts` on this cell, until it ends. Raises what this process alone met."""
    from sweeps.training import train_together

    cell = cell_from_identity(read_cell(store, cell_id)["identity"])
    io: Any = Follower(ranks, cell, open_corpus(store.root, cell.corpus), base_dir)
    with terminable(io):
        (end,) = train_together([cell], [io], ranks=ranks)
    if isinstance(end, Exception) and not isinstance(end, Stopped):
        raise end
