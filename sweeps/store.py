"""The store: the one place that knows the layout and the record formats on disk. Needs neither torch, ray nor mlflow.

    store.json                                   {"format": 1, ...}
    corpora/<fingerprint>/                       token shards (sweeps/corpora.py)
    cells/<id>/cell.json                         what the cell is: identity, counts
    cells/<id>/attempts/<k>/attempt.json         who tries it, where, since when, with which numerics
    cells/<id>/attempts/<k>/log.jsonl            metric rows, one checksummed line each
    cells/<id>/attempts/<k>/heartbeat.json       the last sign of life: time, tokens, time of the last progress
    cells/<id>/attempts/<k>/stop.json            asks the attempt to keep a checkpoint and end: kind, why
    cells/<id>/attempts/<k>/checkpoints/<tokens>/{state.safetensors, state.json}
    cells/<id>/attempts/<k>/trunk.json           the cell and tokens from which it went on, where it branched off
    cells/<id>/attempts/<k>/documents.npz        per-document losses of the final evaluation
    cells/<id>/attempts/<k>/error.txt            why it ended without a result: "kind: message", then the traceback
    cells/<id>/retry.json                        attempts up to this one are no longer held against the cell
    cells/<id>/result.json                       the end of the cell, written once
    lineages/<lineage>/<id>                      cells that share a past (sweeps/lineage.py)
    studies/<name>/{study.yaml, plan.json, quarantine.json, fits/<law>.json, report.html}
    studies/<name>/search/journal.log            the trials of a search, in Optuna's own format (sweeps/trials.py)
    studies/<name>/driver-<k>.json               who drives it (cluster/claims.py)
    studies/<name>/{pause.json, control.json}    what people wish: a pause; a drain or cancel (cluster/control.py)
    studies/<name>/turn.json                     its priority, and whether it waits for room (cluster/turns.py)
    studies/<name>/mirror.json                   what MLflow has acknowledged (cluster/mirror.py)
    hardware/<kind>.json                         how fast a kind of worker is (cluster/calibration.py)
    mlflow/                                      the embedded tracking database

Four rules keep it safe on a disk that several machines share. A record is written beside its place, synced and
renamed, so no reader sees half of one. The folder of attempt k is made beside its place too, with its record inside,
and its renaming can succeed for one caller only: its number is the lease epoch of the cell. A result is linked into
place only while no higher attempt exists and no result stands, so a worker that outlives its driver cannot overwrite
what came after it. An attempt notes how long the logs of its predecessors are; what a zombie writes there later does
not count.
"""

import errno
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.errors import InputError
from sweeps.faults import fault
from sweeps.life import here, is_alive
from sweeps.records import (
    Json,
    decode_row,
    disk_error,
    locked,
    read_json,
    read_rows,
    sync_folder,
    timestamp,
    write_beside,
    write_bytes,
    write_json,
)
from sweeps.redaction import redact

FORMAT = 1
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a study may be called: its name is that of a folder. So is a cell's id, under the same rule."""
CELL_ID = re.compile(r"[0-9a-f]{16}")
"""What Escala itself calls cells. A folder of another name among them is somebody's copy."""
CORPUS_NAME = re.compile(r"[0-9a-f]{16}")
"""The fingerprint of a corpus, which names its folder: one of another name beside them is somebody's text."""

END_KINDS = ("code", "infrastructure", "out_of_memory", "preemption", "stopped")
"""How an attempt may end without a result. Divergence is a result."""
BUDGETS: dict[str, float] = {"code": 0, "infrastructure": 3, "out_of_memory": 1}
"""How many ends of a kind a cell survives; ends of the other kinds are not counted. Each kind has its own budget."""


@dataclass(frozen=True)
class Store:
    """A store's root folder and the places in it. Their names are checked here, where they become paths: a plan or a
    tag that somebody else wrote cannot name a place outside the store."""

    root: Path

    def cell(self, cell_id: str) -> Path:
        return self.root / "cells" / _name(cell_id, "a cell")

    def attempt(self, cell_id: str, epoch: int) -> Path:
        return self.cell(cell_id) / "attempts" / str(epoch)

    def checkpoints(self, cell_id: str, epoch: int) -> Path:
        return self.attempt(cell_id, epoch) / "checkpoints"

    def corpus(self, fingerprint: str) -> Path:
        if not CORPUS_NAME.fullmatch(str(fingerprint)):
            raise InputError(
                f"{fingerprint!r} cannot be a corpus of a store: a fingerprint is 16 hex digits (0-9, a-f).",
                field=("corpus", "fingerprint"),
            )
        return self.root / "corpora" / fingerprint

    def study(self, name: str) -> Path:
        return self.root / "studies" / _name(name, "a study")

    @property
    def tracking_uri(self) -> str:
        """The MLflow tracking URI of the embedded database."""
        return f"sqlite:///{self.root / 'mlflow' / 'mlflow.db'}"


def _name(name: str, what: str) -> str:
    if not STUDY_NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be {what} of a store: up to 100 letters, digits, dots, dashes and underscores, a letter "
            "or digit first."
        )
    return name


def open_store(root: str | Path, *, create: bool = True) -> Store:
    """Open (and, if asked, make) a store.

    Raises InputError where it is missing, cannot be written or was written by a newer format.
    """
    path = Path(root).expanduser().resolve()
    if strange := re.search("[?]|%[0-9A-Fa-f]{2}", str(path)):
        raise InputError(
            f"the store {path} has {strange[0]} in its path, which the address of its MLflow database cannot hold. "
            "Name another folder."
        )
    marker = path / "store.json"
    if not marker.exists():
        if not create:
            raise InputError(f"no Escala store at {path}. Name one with --store or ESCALA_STORE, or run a study first.")
        check_room(path)
        write_json(marker, {"format": FORMAT, "created": timestamp()})
    found = read_json(marker).get("format")
    if not isinstance(found, int) or found > FORMAT:
        raise InputError(
            f"the store {path} was written in format {found!r}; this version of Escala reads up to {FORMAT}. "
            "Upgrade Escala, or name another store."
        )
    if create and not os.access(path, os.W_OK):
        raise InputError(f"the store {path} is not writable. Change its permissions, or name another with --store.")
    return Store(path)


def check_room(path: Path) -> None:
    """InputError where something is in the place of a store that is to be made."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, not an Escala store. Name an empty folder or a new one.")
    if path.is_dir() and any(not one.name.startswith(".store.json.") for one in path.iterdir()):  # a crash's
        raise InputError(f"{path} is a folder with other things in it, not an Escala store. Name an empty or new one.")


def read_metrics(store: Store, cell_id: str) -> list[Json]:
    """The cell's metric rows over all its attempts: the first committed value of a (step, key) wins.

    A row is {"time": Unix seconds fixed at first write, "tokens": step, "metrics": {key: value}}.
    """
    merged: dict[int, Json] = {}
    stops = log_stops(store, cell_id)
    if not stops:
        return _imported_rows(store, cell_id)
    for epoch, stop in stops.items():
        for row in read_rows(store.attempt(cell_id, epoch) / "log.jsonl", 0, stop)[0]:
            if (kept := merged.setdefault(row["tokens"], row)) is not row:
                kept["metrics"] = row["metrics"] | kept["metrics"]
    return [row for tokens in sorted(merged) if (row := merged[tokens])["metrics"]]


def log_stops(store: Store, cell_id: str) -> dict[int, int | None]:
    """Attempt -> the byte at which its log ended when the next attempt began; None for the last one."""
    epochs = attempt_epochs(store, cell_id)
    stops: dict[int, int | None] = dict.fromkeys(epochs)
    for epoch in reversed(epochs[1:]):  # the earlier the successor, the less counts
        try:
            noted = read_json(store.attempt(cell_id, epoch) / "attempt.json").get("earlier_logs", {})
        except FileNotFoundError:
            continue
        stops |= {int(earlier): size for earlier, size in noted.items()}
    return stops


def _imported_rows(store: Store, cell_id: str) -> list[Json]:
    """The one row of a run that was trained elsewhere: its final loss, if its table tells one."""
    try:
        result = read_json(store.cell(cell_id) / "result.json")
    except FileNotFoundError:
        return []
    if not result.get("foreign"):
        return []
    if result["val_loss_final"] is None:  # it diverged
        return []
    metrics = {"val_loss_final": result["val_loss_final"]}
    return [{"time": result["imported"], "tokens": result["tokens"], "metrics": metrics}]


# --- attempts and results ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One try at a cell. `epoch` is its number, counted from 0, and its lease on the cell."""

    store: Store
    cell_id: str
    epoch: int

    @property
    def folder(self) -> Path:
        return self.store.attempt(self.cell_id, self.epoch)

    def holds_lease(self) -> bool:
        """Whether no later attempt has taken the cell over."""
        return attempt_epochs(self.store, self.cell_id)[-1] == self.epoch


def attempt_epochs(store: Store, cell_id: str) -> list[int]:
    """The numbers of the cell's attempts, ascending."""
    try:
        names = os.listdir(store.cell(cell_id) / "attempts")
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isdecimal())


def begin_attempt(store: Store, cell_id: str, record: Mapping[str, Any]) -> Attempt:
    """Take the next lease epoch of a cell and write its attempt.json: `record` with process, host and time.

    The folder appears with its record inside: a lease whose holder nobody knows would have to be waited out.
    """
    folder = store.cell(cell_id) / "attempts"
    known = {"format": FORMAT, **record, **here()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder, prefix=".attempt."))
        made.chmod(folder.stat().st_mode)
        epoch = (attempt_epochs(store, cell_id) or [-1])[-1] + 1
        while True:
            write_json(made / "attempt.json", known | {"attempt": epoch})
            fault("attempt.before_lease")
            try:
                made.rename(folder / str(epoch))
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                epoch += 1
    except OSError as error:
        raise disk_error(folder, error) from error
    fault("attempt.after_lease")
    logs = {earlier: folder / str(earlier) / "log.jsonl" for earlier in attempt_epochs(store, cell_id)[:-1]}
    if logs:
        sizes = {str(earlier): _synced_size(path) for earlier, path in logs.items()}
        write_json(folder / str(epoch) / "attempt.json", known | {"attempt": epoch, "earlier_logs": sizes})
    fault("attempt.after_record")
    return Attempt(store, cell_id, epoch)


def _synced_size(path: Path) -> int:
    """The length of an earlier attempt's log, which is on disk from now on: its rows will not be written again."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            os.fsync(stream.fileno())
            return size
    except FileNotFoundError:
        return 0


def commit_result(attempt: Attempt, result: Mapping[str, Any]) -> bool:
    """Make `result` the cell's result. False, and nothing changes, where a later attempt or a result stands."""
    path = attempt.store.cell(attempt.cell_id) / "result.json"
    record = {"format": FORMAT, "cell": attempt.cell_id, "attempt": attempt.epoch, **result}
    try:
        temporary = write_beside(path, json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
        try:
            if not attempt.holds_lease():
                return False
            fault("result.before_link")
            os.link(temporary, path)
            fault("result.after_link")
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    return True


def record_error(attempt: Attempt, kind: str, message: str, traceback: str = "") -> None:
    """Write the attempt's error.txt, "kind: message" first, without secrets; `kind` is one of END_KINDS.

    Whatever the message holds: the name of a file that is no text, or a NUL, which no database takes.
    """
    first_line = " ".join(message.replace("\0", "\\0").split()) or "no message"
    text = redact(f"{kind}: {first_line}\n\n{traceback}")
    fault("error.before_write")
    write_bytes(attempt.folder / "error.txt", text.encode(errors="backslashreplace"))


def read_end(store: Store, cell_id: str, epoch: int) -> tuple[str, str] | None:
    """How an attempt ended without a result: (kind, message); None where it did not say."""
    try:
        with (store.attempt(cell_id, epoch) / "error.txt").open(errors="replace") as stream:
            kind, _, message = stream.readline().strip().partition(": ")
    except FileNotFoundError:
        return None
    return (kind, message) if kind in END_KINDS else ("code", f"{kind}: {message}")


@dataclass(frozen=True)
class CellState:
    """The state of a cell as its files tell it: planned, running, finished, diverged or failed, and why."""

    state: str
    reason: str | None
    attempts: int
    result: Json | None


def cell_state(store: Store, cell_id: str) -> CellState:
    """Derive a cell's state from its files alone. It has failed where the budget of a kind of end is used up."""
    try:
        result = read_json(store.cell(cell_id) / "result.json")
        attempts = 0 if result.get("foreign") else result["attempt"] + 1
        return CellState(result["state"], result.get("reason"), attempts, result)
    except FileNotFoundError:
        pass
    epochs = attempt_epochs(store, cell_id)
    if not epochs:
        return CellState("planned", None, 0, None)
    last = epochs[-1]
    end = read_end(store, cell_id, last)
    if end is None:
        if attempt_lives(store, cell_id, last):
            return CellState("running", None, len(epochs), None)
        return CellState("planned", f"attempt {last} was interrupted", len(epochs), None)
    words = f"{end[0]}: {end[1]}"
    if spent_budget(store, cell_id, epochs) is not None:
        return CellState("failed", words, len(epochs), None)
    return CellState("planned", f"attempt {last} ended, {words}", len(epochs), None)


def count_ends(store: Store, cell_id: str, epochs: Sequence[int]) -> dict[str, int]:
    """How many of these attempts ended in which kind, those left out that a person has forgiven (`forgive`)."""
    try:
        forgiven = read_json(store.cell(cell_id) / "retry.json")["attempt"]
    except FileNotFoundError:
        forgiven = -1
    ends = [end for epoch in epochs if epoch > forgiven and (end := read_end(store, cell_id, epoch))]
    return dict(Counter(kind for kind, _ in ends))


def spent_budget(store: Store, cell_id: str, epochs: Sequence[int]) -> str | None:
    """The kind of end whose budget these attempts have used up, if any."""
    ends = count_ends(store, cell_id, epochs)
    return next((kind for kind, budget in BUDGETS.items() if ends.get(kind, 0) > budget), None)


def forgive(store: Store, cell_id: str, who: str) -> None:
    """Give a failed cell its budgets back: its attempts so far are no longer held against it."""
    last = attempt_epochs(store, cell_id)[-1]
    write_json(store.cell(cell_id) / "retry.json", {"attempt": last, "who": who, "when": timestamp()})


def ask_to_stop(attempt: Attempt, kind: str, why: str) -> None:
    """Ask a running attempt, wherever it runs, to keep a checkpoint and to end with this kind and reason."""
    write_json(attempt.folder / "stop.json", {"kind": kind, "why": why}, sync=False)


def attempt_lives(store: Store, cell_id: str, epoch: int) -> bool:
    """Whether the process of an attempt lives (see `is_alive`)."""
    folder = store.attempt(cell_id, epoch)
    try:
        return is_alive(read_json(folder / "attempt.json"), last_sign(store, cell_id, epoch))
    except FileNotFoundError:
        return False


def last_sign(store: Store, cell_id: str, epoch: int) -> float:
    """When an attempt last wrote anything, in Unix seconds by the clock of the store's disk."""
    folder = store.attempt(cell_id, epoch)
    signs = ("attempt.json", "log.jsonl", "heartbeat.json")
    return max((path.stat().st_mtime for name in signs if (path := folder / name).exists()), default=0.0)


def checkpoint_paths(folder: Path) -> list[Path]:
    """The finished checkpoints of a folder, fewest tokens first. Nothing is verified (sweeps/checkpoints.py does)."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted((name for name in names if name.isdecimal()), key=int)]


def is_permanent(checkpoint: Path) -> bool:
    """Whether a checkpoint is to stay for branches. True where it cannot be told."""
    try:
        record = decode_row((checkpoint / "state.json").read_bytes().rstrip(b"\n"))
    except OSError:
        return False
    return record is None or bool(record["permanent"])


# --- studies -----------------------------------------------------------------------------------------------------


def study_names(store: Store) -> list[str]:
    """The studies that the store holds, sorted. A copy of a folder, such as `study (copy)`, is none."""
    names = (path.parent.name for path in (store.root / "studies").glob("*/plan.json"))
    return sorted(name for name in names if STUDY_NAME.fullmatch(name))


def read_plan(store: Store, name: str) -> Json:
    """The plan of a study as it was last run: {"study": declaration, "corpus": {...}, "cells": [{"id", "labels"}]}.

    The entry of a cell that branches off another of the study says where: "trunk": {"cell", "tokens"}. Where
    hyperparameters come from the fits of other studies, "fitted" has them by study (sweeps/fitted.py).
    """
    try:
        return read_json(store.study(name) / "plan.json")
    except FileNotFoundError:
        known = ", ".join(study_names(store)) or "none"
        raise InputError(f"the store {store.root} has no study {name!r} (it has: {known}). Run it first.") from None


def read_cell(store: Store, cell_id: str) -> Json:
    """A cell's record: {"id", "identity": {...}, "counts": {...}}. InputError where it is gone or damaged."""
    try:
        return read_json(store.cell(cell_id) / "cell.json")
    except FileNotFoundError as error:
        why = f"the store {store.root} lacks the record {error.filename}"
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        why = str(error).rstrip(".")
    raise InputError(f"{why}: run the study again, which writes it anew, or import its table again.")


def trunk_of(entry: Json, result: Json | None) -> Json | None:
    """Where a cell leaves its trunk, {"cell", "tokens"}: that it went on from; before its end, the planned one."""
    found: Json | None = entry.get("trunk") if result is None else result.get("trunk")
    return found


def spent_flops(entry: Json, counts: Json, result: Json | None) -> float | None:
    """What a cell cost in FLOPs, before its end as planned: its C without what its trunk trains for it."""
    if result is not None:
        return result.get("flops_spent", counts["C"])
    trunk = entry.get("trunk")
    return counts["C"] - trunk["tokens"] * counts["flops_per_token"] if trunk else counts["C"]


def read_quarantine(store: Store, name: str) -> dict[str, Json]:
    """Cells taken out of the study's fits by a person: {cell id: {"why", "who", "when"}}."""
    try:
        return read_json(store.study(name) / "quarantine.json")
    except FileNotFoundError:
        return {}


def quarantine_cell(store: Store, name: str, cell_id: str, why: str, who: str) -> None:
    """Take a cell out of the study's fits, or change the reason. The cell itself stays as it is."""
    with _quarantine(store, name) as marks:
        if marks.get(cell_id, {}).get("why") != why:
            marks[cell_id] = {"why": why, "who": who, "when": timestamp()}


def release_cell(store: Store, name: str, cell_id: str) -> bool:
    """Let the study's fits use a cell again. False where it was not in quarantine."""
    with _quarantine(store, name) as marks:
        return marks.pop(cell_id, None) is not None


@contextmanager
def _quarantine(store: Store, name: str) -> Iterator[dict[str, Json]]:
    """The study's quarantine, to change: one process at a time, so that no mark of another is lost."""
    try:
        with locked(store.study(name) / "quarantine.lock"):
            before = read_quarantine(store, name)
            marks = dict(before)
            yield marks
            if marks != before:
                write_json(store.study(name) / "quarantine.json", marks)
    except OSError as error:
        raise disk_error(store.study(name) / "quarantine.json", error) from error


def iterate_cells(store: Store, name: str) -> Iterator[tuple[Json, Json, CellState]]:
    """(plan entry, cell record, state) of every cell that the study plans; a quarantined cell says so."""
    quarantine = read_quarantine(store, name)
    for entry in read_plan(store, name)["cells"]:
        state = cell_state(store, entry["id"])
        if entry["id"] in quarantine:
            state = CellState("quarantined", quarantine[entry["id"]]["why"], state.attempts, state.result)
        yield entry, read_cell(store, entry["id"]), state
