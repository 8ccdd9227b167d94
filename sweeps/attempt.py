"""An attempt: one try at a cell, from its lease to its committed result. Runs in any process, with or without Ray."""

import io
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sweeps.cell import Cell, cell_from_identity
from sweeps.corpora import Corpus, open_corpus
from sweeps.devices import Numerics, choose_numerics
from sweeps.errors import InputError
from sweeps.faults import fault
from sweeps.heartbeat import Heartbeat, terminable
from sweeps.records import read_json, timestamp, write_bytes
from sweeps.redaction import redact
from sweeps.store import Attempt, Store, attempt_epochs, begin_attempt, commit_result, read_cell, read_end, record_error
from sweeps.trainer import CHECKPOINT_SECONDS, Diverged, Outcome, Stopped, Trainer, TrainerIO
from sweeps.usercode import load_function

if TYPE_CHECKING:
    from sweeps.ranks import Ranks

GPU_TOLERANCE = 1e-3
"""Relative difference of a recomputed value that a GPU's kernels may make at equal numerics; a CPU makes none."""
OTHER_TOLERANCE = 2e-2
"""And where the numerics are not those of the first computation."""

_LOSSES = ("val_loss_final", "val_bpb_final", "loss_at_start")


@dataclass(frozen=True)
class Ended:
    """How an attempt ended. `state` is finished or diverged, an end kind of the store, or superseded."""

    cell_id: str
    attempt: int
    state: str
    reason: str | None


def run_attempt(
    store: Store,
    cell_id: str,
    *,
    study: str,
    base_dir: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    driver: int = 0,
) -> Ended:
    """Try a cell once, as `run_attempts` does."""
    (ended,) = run_attempts(
        store,
        [cell_id],
        study=study,
        base_dir=base_dir,
        checkpoint_seconds=checkpoint_seconds,
        driver=driver,
    )
    return ended


def run_attempts(
    store: Store,
    cell_ids: Sequence[str],
    *,
    study: str,
    base_dir: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    driver: int = 0,
    threads: int = 1,
    ranks: "Ranks | None" = None,
) -> list[Ended]:
    """Try a cell once, or several as one program, each from its last checkpoint where it has one.

    A failure of the cell's own code is not raised: its traceback goes to the attempt's error.txt. A result is committed
    only while the attempt still holds the cell's lease, and as soon as its cell has ended; a superseded one says so.
    `driver` is the number of the claim for which it runs; `threads`, of a CPU, are those of a cell's first attempt. In
    a main thread, SIGTERM keeps a checkpoint and ends the attempts as preempted. `ranks`: of a gang that trains the one
    cell, for its rank 0; the others follow (sweeps/gang.py).
    """
    started = time.time()
    tries: list[_Try] = []
    make_io: Callable[..., TrainerIO] = TrainerIO
    if ranks:
        from sweeps.gang import Leader

        make_io = partial(Leader, ranks)
    with ExitStack() as open_things:
        try:
            records = [read_cell(store, cell_id) for cell_id in cell_ids]
            cells = [cell_from_identity(record["identity"]) for record in records]
            note: dict[str, Any] = {"study": study, "driver": driver}
            try:
                chosen = _numerics(store, cells, threads, ranks.count if ranks else 1)
            except InputError as error:  # not even one sequence fits, or not one of each member, at this moment
                attempt = begin_attempt(store, cell_ids[0], note)
                tries.append(_Try(attempt, cells[0], records[0]["counts"], started, len(cells)))
                raise MemoryError(str(error)) from error
            members = zip(cell_ids, cells, records, chosen, strict=True)
            for cell_id, cell, record, (numerics, tolerance, kept) in members:
                attempt = begin_attempt(store, cell_id, note | {"numerics": numerics.to_json()})
                one = _Try(attempt, cell, record["counts"], started, len(cells))
                tries.append(one)
                heartbeat = one.heartbeat = open_things.enter_context(Heartbeat(one.attempt))
                corpus = _corpus(store.root, cell.corpus)
                stream = open_things.enter_context((one.attempt.folder / "log.jsonl").open("ab", buffering=0))
                one.io = make_io(
                    heartbeat,
                    stream,
                    corpus,
                    numerics,
                    cell=cell,
                    tolerance=tolerance,
                    numerics_kept=kept,
                    base_dir=base_dir,
                    checkpoint_seconds=checkpoint_seconds,
                )
            with terminable(*(one.heartbeat for one in tries if one.heartbeat is not None)):
                _train(tries, base_dir, ranks)
        except Exception as error:
            if not tries:
                raise
            for one in tries:
                one.settle(error)
    return [one.ended for one in tries if one.ended is not None]


@dataclass
class _Try:
    """One attempt under way."""

    attempt: Attempt
    cell: Cell
    counts: Mapping[str, Any]
    started: float
    members: int
    """Of the program that it is part of."""
    heartbeat: Heartbeat | None = None
    io: TrainerIO | None = None
    ended: Ended | None = None

    def settle(self, end: Outcome | Exception) -> None:
        """Put on record how the attempt ended, once."""
        if self.ended is not None:
            return
        try:
            if self.io is not None:
                self.io.close()
            if isinstance(end, Diverged) and self.heartbeat is not None:  # of a trainer of one's own
                taken = self.heartbeat.tokens // self.cell.batch_tokens
                end = Outcome(state="diverged", reason=str(end), steps=min(taken, self.cell.steps))
            if isinstance(end, Outcome):
                assert self.io is not None
                end = replace(end, reason=end.reason and redact(end.reason))
                state, reason = _commit(self, self.io, _finite(end))
            else:
                raise end
        except Stopped as stopped:
            state, reason = stopped.stop.kind, stopped.stop.why
            if state != "superseded":
                record_error(self.attempt, state, reason)
        except Exception as error:
            state, reason = kind_of(error), redact(f"{type(error).__name__}: {error}")
            record_error(self.attempt, state, reason, traceback.format_exc())
        if isinstance(end, Exception):  # with it the frames that hold it, and all that these do: a model on its GPU
            end.__traceback__ = None
        self.ended = Ended(self.attempt.cell_id, self.attempt.epoch, state, reason)


def _train(tries: Sequence[_Try], base_dir: Path | None, ranks: "Ranks | None") -> None:
    """Train one cell with its trainer, or several together with Escala's."""
    ios = [one.io for one in tries if one.io is not None]
    if ranks and tries[0].cell.trainer:
        raise InputError(f"trainer {tries[0].cell.trainer} trains in one process. Leave out workers, or set it to 1.")
    if len(tries) == 1 and tries[0].cell.trainer:
        name = tries[0].cell.trainer
        try:
            end: Outcome | Exception = _outcome(name, _find_trainer(name, base_dir)(tries[0].cell, ios[0]))
        except Exception as error:
            end = error
        except SystemExit as error:  # the worker would go with it, and nobody would hear why
            end = InputError(f"trainer {name} ended its process, sys.exit({error.code!r}). Let it return, or raise.")
        tries[0].settle(end)
        return
    from sweeps.training import train_together

    train_together([one.cell for one in tries], ios, lambda member, end: tries[member].settle(end), ranks)


def _outcome(trainer: str, returned: Any) -> Outcome:
    """What a trainer of one's own has returned. InputError where it is neither a loss nor an Outcome."""
    found = returned if isinstance(returned, Outcome) else Outcome(val_loss_final=returned)
    losses = {name: getattr(found, name) for name in _LOSSES}
    try:
        if any(isinstance(value, bool | str) for value in losses.values()):
            raise TypeError
        plain: dict[str, Any] = {name: float(value) for name, value in losses.items() if value is not None}
        found = replace(found, **plain)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several values
        known = False
    else:
        known = found.state == "diverged" or (found.state == "finished" and found.val_loss_final is not None)
    if not known:
        raise InputError(
            f"trainer {trainer} returned {str(returned)[:200]}. Let it return its final validation loss, a number in "
            "nats per token, or an Outcome that is finished with such a loss, or diverged."
        )
    return found


def _finite(outcome: Outcome) -> Outcome:
    """An outcome whose losses are finite or None: a trainer of one's own may end with a loss that is lost."""
    losses = {name: getattr(outcome, name) for name in _LOSSES}
    lost = {name: value for name, value in losses.items() if value is not None and not math.isfinite(value)}
    if not lost:
        return outcome
    reason = outcome.reason or ", ".join(f"{name} is {value}" for name, value in lost.items())
    kept: dict[str, Any] = {"state": "diverged", "reason": reason, "document_losses": None, "document_tokens": None}
    return replace(outcome, **kept | dict.fromkeys([*lost, "val_loss_final", "val_bpb_final"]))


def _find_trainer(name: str, base_dir: Path | None) -> Trainer:
    """The function of `my_file.py:train@<hash>`.

    A file is looked up from `base_dir`; None allows no such code. InputError where it is missing, or is not the file
    that the cell was planned with.
    """
    declared, _, planned = name.rpartition("@")
    function, digest = load_function("trainer", declared, base_dir)
    if digest != planned:
        raise InputError(f"trainer {declared}: the file has changed since this cell was planned. Run the study again.")
    found: Trainer = function
    return found


def _commit(one: _Try, trainer_io: TrainerIO, outcome: Outcome) -> tuple[str, str | None]:
    attempt, cell, counts = one.attempt, one.cell, one.counts
    fault("documents.before_write")
    if outcome.document_losses is not None and outcome.document_tokens is not None:
        _write_documents(attempt.folder / "documents.npz", outcome.document_losses, outcome.document_tokens)
    corpus, trunk = trainer_io.corpus, trainer_io.trunk
    steps = cell.steps if outcome.steps is None else outcome.steps
    tokens = steps * cell.batch_tokens
    seconds = {name: round(value, 3) for name, value in (outcome.seconds or {}).items()}
    result = {
        "state": outcome.state,
        "reason": outcome.reason,
        "val_loss_final": outcome.val_loss_final,
        "val_bpb_final": outcome.val_bpb_final,
        "loss_at_start": outcome.loss_at_start,
        "tokens": tokens,
        "flops": tokens * counts["flops_per_token"],
        "flops_spent": (tokens - (trunk["tokens"] if trunk else 0)) * counts["flops_per_token"],
        "trunk": trunk,
        "steps": steps,
        "epochs": round(corpus.info.epochs(tokens, cell.shape.context), 4),
        "seconds": seconds | {"total": round((time.time() - one.started) / one.members, 3)},
        "tokens_per_second": None if outcome.tokens_per_second is None else round(outcome.tokens_per_second, 1),
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "started": timestamp(one.started),
        "ended": timestamp(),
        "host": read_json(attempt.folder / "attempt.json")["host"],
        "numerics": trainer_io.numerics.to_json(),
    }
    if not commit_result(attempt, result):
        return "superseded", "a later attempt has taken this cell over, or its result stands"
    return outcome.state, outcome.reason


def _numerics(store: Store, cells: Sequence[Cell], threads: int, workers: int) -> list[tuple[Numerics, float, bool]]:
    """For each member of a program: its numerics; the relative difference that they allow between a value that is
    computed again and its first, which any earlier attempt may have logged; and whether they are those of an earlier
    attempt.

    Members take the least micro-batch of any of them and the threads of the first, since the program has one of each,
    and a stack is never compiled.
    """
    here = choose_numerics(cells[0], stack=len(cells), threads=threads, workers=workers)  # members are of one shape
    own = 0.0 if here.device == "cpu" else GPU_TOLERANCE
    earlier = [_earlier_numerics(store, cell) for cell in cells]
    chosen = [_next_numerics(store, cell, before, here) for cell, before in zip(cells, earlier, strict=True)]
    least = min(numerics.micro_batch for numerics, _ in chosen)
    shared: dict[str, Any] = {"micro_batch": least, "threads": chosen[0][0].threads}
    shared |= {"compile": False} if len(cells) > 1 else {}
    found = []
    for (numerics, kept), before in zip(chosen, earlier, strict=True):
        numerics = replace(numerics, **shared)
        same = all(numerics == one for one in before.values())
        found.append((numerics, own if same else OTHER_TOLERANCE, kept))
    return found


def _earlier_numerics(store: Store, cell: Cell) -> dict[int, Numerics]:
    """Those of the cell's attempts so far."""
    earlier: dict[int, Numerics] = {}
    for epoch in attempt_epochs(store, cell.id):
        try:
            found = read_json(store.attempt(cell.id, epoch) / "attempt.json").get("numerics")
        except FileNotFoundError:
            found = None
        if found is not None:  # else its process died before it wrote them
            known = {field.name: found[field.name] for field in fields(Numerics) if field.name in found}
            earlier[epoch] = Numerics(**known)
    return earlier


def _next_numerics(store: Store, cell: Cell, earlier: Mapping[int, Numerics], here: Numerics) -> tuple[Numerics, bool]:
    """Those of the cell's last attempt, where there was one, else those of this process; and whether there was one.

    After an attempt that ran out of memory, half its micro-batch; in a stack of another size, or alone after one, no
    more than fits here. Another number of workers chooses its own.
    """
    if not earlier:
        return here, False
    last = max(earlier)
    if earlier[last].workers != here.workers:
        return replace(here, threads=earlier[last].threads), False
    kept = replace(earlier[last], device=here.device, versions=here.versions, stack=here.stack)
    end = read_end(store, cell.id, last)
    if end is not None and end[0] == "out_of_memory":
        kept = replace(kept, micro_batch=max(1, kept.micro_batch // 2))
    if earlier[last].stack != here.stack:  # each sequence is one of every member
        kept = replace(kept, micro_batch=min(kept.micro_batch, here.micro_batch))
    return kept, True


@lru_cache(maxsize=4)
def _corpus(root: Path, fingerprint: str) -> Corpus:
    return open_corpus(root, fingerprint)


def _write_documents(path: Path, losses: np.ndarray, tokens: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, loss_sum=losses, tokens=tokens)
    write_bytes(path, buffer.getvalue())


def kind_of(error: Exception) -> str:
    """Which budget an error is charged to."""
    refused = isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)  # torch's, without a class
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or refused:
        return "out_of_memory"
    disk = isinstance(error, OSError) or (isinstance(error, InputError) and isinstance(error.__cause__, OSError))
    return "infrastructure" if disk else "code"
