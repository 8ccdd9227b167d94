"""What a trainer sees of the system: a cell, and an `io` through which it logs, keeps checkpoints and hears to stop.

A trainer is a function `train(cell, io) -> Outcome | float`: Escala's own (sweeps/training.py), or a user's,
`my_file.py:train`. Both run under the same store, leases, checkpoints and mirror, and use nothing but `io`:

    def train(cell, io):
        state = io.restore() or {"step": 0, "x": 0.0}
        for step in range(state["step"] + 1, cell.steps + 1):
            state = {"step": step, "x": ...}                                  # one step of training
            io.log(step * cell.batch_tokens, {"train_loss": ...})             # nats per token
            io.checkpoint(step * cell.batch_tokens, lambda: state)            # costs nothing until one is due
        return final_validation_loss

What was logged stays: after a resume a trainer runs through steps that are in the log already. Equal values are not
written again; values that differ are noted beside the first, which stands.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sweeps.cell import Cell
from sweeps.devices import Numerics
from sweeps.heartbeat import Heartbeat, Stop
from sweeps.lineage import branch_points, relatives
from sweeps.records import append_rows, disk_error, read_json, read_or_none, write_json
from sweeps.schedules import stable_steps
from sweeps.store import read_metrics

if TYPE_CHECKING:
    from sweeps.checkpoints import Checkpoint, State, Writer
    from sweeps.corpora import Corpus

CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a cell ended. Losses in nats per token; None where the cell diverged, and one that is not finite says so."""

    state: str = "finished"
    """finished or diverged."""
    reason: str | None = None
    val_loss_final: float | None = None
    val_bpb_final: float | None = None
    loss_at_start: float | None = None
    steps: int | None = None
    """Optimizer steps taken; None: all that were planned."""
    seconds: Mapping[str, float] | None = None
    """Wall-clock seconds of this attempt by part of the work."""
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    """The most that was held: of the GPU's memory by the attempt, or of the host's by its process."""
    document_losses: np.ndarray | None = None
    """Summed loss of each validation document in the final evaluation, float64."""
    document_tokens: np.ndarray | None = None


Trainer = Callable[[Cell, "TrainerIO"], "Outcome | float"]


class Stopped(Exception):
    """The attempt must end now; its checkpoint is kept. A trainer lets it pass."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.why)
        self.stop = stop


class Diverged(Exception):
    """The cell's loss is lost for good: a result, not a failure. A trainer may raise it with the reason.

    The cell counts as trained as far as its io was last told: raised after `io.log` or `io.checkpoint` of its step."""


class TrainerIO:
    """One attempt as its trainer sees it."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        stream: Any,
        corpus: "Corpus",
        numerics: Numerics,
        *,
        cell: Cell,
        tolerance: float,
        numerics_kept: bool = False,
        base_dir: Path | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        self.corpus = corpus
        """The tokens: batch(seed, step, sequences, context) and the validation stream."""
        self.numerics = numerics
        """How to compute: device, threads, micro-batch."""
        self.numerics_kept = numerics_kept
        """Whether they are those of an earlier attempt, which found out what the device bears."""
        self.base_dir = base_dir
        """Where the study's own code lives; None where none may run."""
        self._heartbeat, self._stream, self._tolerance, self._cell = heartbeat, stream, tolerance, cell
        self._attempt = heartbeat.attempt
        self.branch_points = branch_points(self._attempt.store, cell)
        """Tokens at which cells of the same lineage leave this one: checkpoints there stay."""
        self.trunk: dict[str, Any] | None = None
        """The cell whose past this attempt goes on from, and its tokens: {"cell", "tokens"}."""
        self.restored_from: Path | None = None
        """The checkpoint that `restore` has read."""
        self._interval = checkpoint_seconds
        self._kept = time.monotonic()
        self._writer: Writer | None = None
        logged = read_metrics(self._attempt.store, self._attempt.cell_id) if self._attempt.epoch else []
        self._logged: dict[int, dict[str, float]] = {row["tokens"]: row["metrics"] for row in logged}

    def log(self, tokens: int, metrics: Mapping[str, float]) -> None:
        """Write metrics at so many tokens seen. A value that is not finite ends the cell as diverged.

        Pairs of (tokens, key) that are in the log already are not written again. Names that end in _seconds,
        _per_second or mfu are taken to be of the clock and may differ.
        """
        tokens = _whole(tokens)
        known = self._logged.setdefault(tokens, {})
        values = {key: float(value) for key, value in metrics.items()}
        for key, value in values.items():
            if not math.isfinite(value) and not (key in known and _is_clock(key)):
                self._heartbeat.progress(tokens)  # so far it came
                raise Diverged(f"{key} is {value} after {tokens:,} tokens")
        fresh = {key: value for key, value in values.items() if key not in known}
        differs = {
            key: [known[key], value]
            for key, value in values.items()
            if key in known and not _is_clock(key) and not self._agree(known[key], value)
        }
        if fresh or differs:
            row = {"time": round(time.time(), 3), "tokens": tokens, "metrics": fresh}
            try:
                append_rows(self._stream, [row | ({"differs": differs} if differs else {})])
            except OSError as error:
                raise disk_error(self._attempt.folder / "log.jsonl", error) from error
            known |= fresh
        self._heartbeat.progress(tokens)

    def checkpoint(self, tokens: int, snapshot: "Callable[[], State]", *, last: bool = False) -> None:
        """Keep a checkpoint where one is due: after the interval, at the `last` step, or before a stop.

        `snapshot` returns the state as a nested mapping of tensors, arrays and plain values, and is called only when
        it is due; the copy is written by a thread. At a branch point it is due and stays. Raises Stopped where the
        attempt must end.
        """
        tokens = _whole(tokens)
        if self.is_due(tokens, last=last):
            self.keep(tokens, snapshot, last=last)

    def is_due(self, tokens: int, *, last: bool = False) -> bool:
        """Whether `checkpoint` would keep one now. Raises Stopped where another attempt has taken the cell over."""
        self._heartbeat.progress(tokens)
        stop = self._heartbeat.stop
        if stop is not None and stop.kind == "superseded":
            raise Stopped(stop)
        if stop or last or tokens in self.branch_points:
            return True
        busy = self._writer is not None and self._writer.busy()
        return not busy and time.monotonic() - self._kept >= self._interval

    def keep(self, tokens: int, snapshot: "Callable[[], State]", *, last: bool = False) -> None:
        """Keep a checkpoint now; the rest as `checkpoint`."""
        if self._writer is None:
            from sweeps.checkpoints import Writer

            folder = self._attempt.store.checkpoints(self._attempt.cell_id, self._attempt.epoch)
            self._writer = Writer(folder, self._stream)
        stop = self._heartbeat.stop
        self._writer.submit(tokens, snapshot(), permanent=tokens in self.branch_points)
        self._kept = time.monotonic()
        if stop or last:
            self._writer.wait()
        if stop:
            raise Stopped(stop)

    def choose(self, **changes: Any) -> None:
        """Put fields of the numerics on record that only a try on the device could tell."""
        self.numerics = replace(self.numerics, **changes)
        path = self._attempt.folder / "attempt.json"
        write_json(path, read_json(path) | {"numerics": self.numerics.to_json()})

    def restore(self) -> "dict[str, Any] | None":
        """The state to go on from, tensors on the CPU: that of the cell's last good checkpoint, or else of its trunk's
        where the two part, or before; None where there is none."""
        from sweeps.checkpoints import newest

        store, cell_id = self._attempt.store, self._attempt.cell_id
        found = newest(store, cell_id) if self._attempt.epoch else None
        if found is not None:
            self.trunk = read_or_none(found.path.parent.parent / "trunk.json")
        else:
            found = self._inherited()
        if found is None:
            return None
        if self.trunk is not None:
            write_json(self._attempt.folder / "trunk.json", self.trunk)
        self._heartbeat.resumed_from, self.restored_from = found.tokens, found.path
        self._heartbeat.progress(found.tokens)
        return found.state

    def _inherited(self) -> "Checkpoint | None":
        """The longest piece of this cell's past that another cell of its lineage has trained and kept."""
        from sweeps.checkpoints import newest

        own, best = stable_steps(self._cell), None
        for other in relatives(self._attempt.store, self._cell):
            shared = min(own, stable_steps(other)) * self._cell.batch_tokens
            if best is not None and shared <= best.tokens:
                continue
            found = newest(self._attempt.store, other.id, shared)
            if found is not None and (best is None or found.tokens > best.tokens):
                best, self.trunk = found, {"cell": other.id, "tokens": found.tokens}
        return best

    def should_stop(self) -> bool:
        """Whether the attempt was asked to end: the next `checkpoint` will keep the state and raise Stopped."""
        return self._heartbeat.stop is not None

    def progress(self) -> None:
        """Say that work goes on where neither log nor checkpoint is called for long. Raises Stopped as they do."""
        self._heartbeat.progress()
        if self._heartbeat.stop is not None:
            raise Stopped(self._heartbeat.stop)

    def close(self) -> None:
        """Wait for the last checkpoint to be written."""
        if self._writer is not None:
            self._writer.wait()

    def _agree(self, one: float, two: float) -> bool:
        return abs(one - two) <= self._tolerance * max(abs(one), abs(two))


def _whole(tokens: Any) -> int:
    """Tokens seen as an int, which records and MLflow's steps want; a trainer of one's own may count in numpy's."""
    try:
        whole: int | None = int(tokens)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != tokens:
        raise ValueError(f"found {tokens!r} tokens seen; a whole number is wanted, such as step * cell.batch_tokens")
    return whole


def _is_clock(key: str) -> bool:
    return key.endswith(("_seconds", "_per_second", "mfu"))
