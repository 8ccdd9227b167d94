"""How a run stands at a moment, for displays: read from the logs of the cells that run; and what it did, at its end."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.cellruns import told_apart
from sweeps.planned import PlannedCell
from sweeps.records import read_rows
from sweeps.store import CellState, Store, attempt_epochs


@dataclass
class Tally:
    """What one run of the driver did."""

    finished: int = 0
    diverged: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Cell id -> reason."""
    skipped: int = 0
    """Cells that had ended before, or that another study trained meanwhile."""
    planned: int = 0
    """Cells that are still to do."""
    stopped: str | None = None
    """Why the run ended before its cells: interrupted, cancelled, given up, taken over."""
    notes: tuple[str, ...] = ()
    """What people should know of a search, in sentences."""
    seconds: float = 0.0
    mirror_fault: str | None = None


@dataclass(frozen=True)
class Running:
    """A cell in training as its log tells it."""

    cell_id: str
    N: int
    apart: str
    """What sets it off from others of its size, as `apart_words` tells."""
    tokens: int
    horizon: int
    loss: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class Progress:
    """A moment of a run."""

    counts: dict[str, int]
    total: int
    running: tuple[Running, ...]
    eta_seconds: float | None
    workers: int
    mirror_fault: str | None
    ended: tuple[str, ...]
    """The cells that ended since the last moment, in words."""
    notes: tuple[str, ...] = ()
    """What there was to say since then of no cell: of nodes, room, budgets."""
    wish: str | None = None
    """pause, drain or cancel, where a person wishes so."""
    link: str | None = None
    """The study's experiment in MLflow, where that is a server."""


def apart_words(one: PlannedCell, varied: Iterable[str]) -> str:
    """What sets a cell off from others of its size and length, each value after a space."""
    return told_apart({"identity": one.cell.identity, "counts": one.counts}, one.labels, varied)


def ended_words(one: PlannedCell, state: CellState, varied: Iterable[str]) -> str:
    """How a cell ended, for people: which it is of a study that varies these hyperparameters, and its final loss, as
    its result has it."""
    loss = (state.result or {}).get("val_loss_final")
    words = f"{one.cell.id[:8]} {one.cell.family} N={one.counts['N']:,} D={one.cell.tokens:,}{apart_words(one, varied)}"
    words += f": {state.state}"
    return words + (f" ({state.reason})" if state.reason else f", loss {loss:.4f}" if loss else "")


class Tail:
    """The last figures in a running cell's log."""

    def __init__(self, store: Store, cell_id: str) -> None:
        self.tokens = 0
        self.loss: float | None = None
        self.tokens_per_second = 0.0
        self._store, self._cell_id = store, cell_id
        self._epoch, self._offset = -1, 0

    def read(self) -> None:
        """Take in what was written since the last call."""
        epochs = attempt_epochs(self._store, self._cell_id)
        if not epochs:
            return
        if epochs[-1] != self._epoch:
            self._epoch, self._offset = epochs[-1], 0
        rows, self._offset = read_rows(self._store.attempt(self._cell_id, self._epoch) / "log.jsonl", self._offset)
        for row in rows:
            self.tokens = row["tokens"]
            self.loss = row["metrics"].get("val_loss_final", row["metrics"].get("train_loss", self.loss))
            self.tokens_per_second = row["metrics"].get("tokens_per_second", self.tokens_per_second)
