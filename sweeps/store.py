"""The store: the one place that knows the layout and the record formats on disk. Needs neither torch, ray nor mlflow.

    store.json                                   {"format": 1, ...}
    corpora/<fingerprint>/                       token shards (sweeps/corpora.py)
    cells/<id>/cell.json                         what the cell is: identity, counts
    cells/<id>/attempts/<k>/attempt.json         who tries it, where, since when, with which numerics
    cells/<id>/attempts/<k>/log.jsonl            metric rows, one checksummed line each
    cells/<id>/attempts/<k>/documents.npz        per-document losses of the final evaluation
    cells/<id>/attempts/<k>/error.txt            why it failed: "kind: message", then the traceback
    cells/<id>/result.json                       the end of the cell, written once
    studies/<name>/{study.yaml, plan.json, quarantine.json, fits/<law>.json, report.html}
    mlflow/                                      the embedded tracking database

Three rules keep it safe on a disk that several machines share. A record is written beside its place, synced and
renamed, so no reader sees half of one. The folder of attempt k is made with mkdir, which only one caller can win:
its number is the lease epoch of the cell. A result is linked into place only while no higher attempt exists and no
result stands, so a worker that outlives its driver cannot overwrite what came after it.
"""

import errno
import json
import os
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sweeps.errors import InputError

FORMAT = 1
HEARTBEAT_SECONDS = 60.0
"""An attempt on another machine that wrote nothing for this long is taken to be dead."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """A store's root folder and the places in it."""

    root: Path

    def cell(self, cell_id: str) -> Path:
        return self.root / "cells" / cell_id

    def attempt(self, cell_id: str, epoch: int) -> Path:
        return self.cell(cell_id) / "attempts" / str(epoch)

    def study(self, name: str) -> Path:
        return self.root / "studies" / name

    @property
    def tracking_uri(self) -> str:
        """The MLflow tracking URI of the embedded database."""
        return f"sqlite:///{self.root / 'mlflow' / 'mlflow.db'}"


def open_store(root: str | Path, *, create: bool = True) -> Store:
    """Open (and, if asked, make) a store.

    Raises InputError where it is missing, cannot be written or was written by a newer format.
    """
    path = Path(root).expanduser().resolve()
    marker = path / "store.json"
    if not marker.exists():
        if not create:
            raise InputError(f"no Escala store at {path}. Name one with --store or ESCALA_STORE, or run a study first.")
        if path.is_dir() and any(path.iterdir()):
            raise InputError(
                f"{path} is a folder with other things in it, not an Escala store. Name an empty or new one."
            )
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


def timestamp(seconds: float | None = None) -> str:
    """UTC time as ISO 8601, now or of the given Unix seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() if seconds is None else seconds))


# --- records -----------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Mapping[str, Any], *, sync: bool = True) -> None:
    """Write a JSON record so that a reader sees the old one or the new one, never half. NaN and infinity raise.

    Without `sync` a power cut may lose it: for records that can be made again.
    """
    write_bytes(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n", sync=sync)


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file atomically: a temporary file beside it, synced, renamed. InputError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _write_beside(path, content, sync=sync)
        os.replace(temporary, path)
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        raise _disk_error(path, error) from error


def read_json(path: Path) -> Json:
    """Read a record. InputError where it is unreadable or is no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a record: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a record: it holds a {type(value).__name__}, not an object.")
    return value


def _write_beside(path: Path, content: bytes, *, sync: bool = True) -> str:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
    except BaseException:
        os.unlink(temporary)
        raise
    return temporary


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(path: Path, error: OSError) -> InputError:
    advice = {
        errno.ENOSPC: "the disk is full: free some space, then run again; nothing that was finished is lost",
        errno.EDQUOT: "the disk quota is used up: free some space, then run again; nothing that was finished is lost",
        errno.EACCES: "permission denied: change the permissions, or name another store with --store",
        errno.EROFS: "the file system is read-only: name another store with --store",
        errno.ENOTDIR: "a part of the path is a file, not a folder: name another store with --store",
    }.get(error.errno or 0, str(error))
    return InputError(f"cannot write {path}: {advice}.")


# The umask can only be read by setting it; once, at import, while there is one thread.
_UMASK = os.umask(0)
os.umask(_UMASK)


# --- log lines ---------------------------------------------------------------------------------------------------


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One log line: a JSON object whose last key is the CRC-32 of all that stands before it."""
    body = json.dumps(row, allow_nan=False, separators=(",", ":"))[:-1]
    return f'{body},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def decode_row(line: bytes) -> Json | None:
    """The row of one log line without its newline, or None where the line is torn or damaged."""
    body = _checked(line)
    row: Json | None = None if body is None else json.loads(body + b"}")
    return row


def _checked(line: bytes) -> bytes | None:
    """What stands before the checksum of a whole line; None where the line is torn or damaged."""
    body, mark, tail = line.rpartition(b',"crc":"')
    return body if mark and tail == b'%08x"}' % zlib.crc32(body) else None


def append_rows(stream: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append whole lines to an unbuffered binary stream in one write."""
    stream.write(b"".join(encode_row(row) for row in rows))


def read_rows(path: Path, offset: int = 0, stop: int | None = None) -> tuple[list[Json], int]:
    """The complete, undamaged rows from byte `offset` on, before byte `stop`, and the offset after the last of them."""
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            content = stream.read() if stop is None else stream.read(stop - offset)
    except FileNotFoundError:
        return [], offset
    end = content.rfind(b"\n") + 1
    bodies = [body for line in content[:end].split(b"\n") if (body := _checked(line)) is not None]
    # in one go: a call of the parser for each line takes twice as long as the parsing
    rows: list[Json] = json.loads(b"[" + b"},".join(bodies) + b"}]") if bodies else []
    return rows, offset + end


def read_metrics(store: Store, cell_id: str) -> list[Json]:
    """The cell's metric rows over all its attempts: the first committed value of a (step, key) wins.

    A row is {"time": Unix seconds fixed at first write, "tokens": step, "metrics": {key: value}}.
    """
    merged: dict[int, Json] = {}
    for epoch in attempt_epochs(store, cell_id):
        for row in read_rows(store.attempt(cell_id, epoch) / "log.jsonl")[0]:
            if (kept := merged.setdefault(row["tokens"], row)) is not row:
                kept["metrics"] = row["metrics"] | kept["metrics"]
    return [merged[tokens] for tokens in sorted(merged)]


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
    """Take the next lease epoch of a cell and write its attempt.json: `record` with process, host and time."""
    folder = store.cell(cell_id) / "attempts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        epoch = (attempt_epochs(store, cell_id) or [-1])[-1] + 1
        while True:
            try:
                (folder / str(epoch)).mkdir()
                break
            except FileExistsError:
                epoch += 1
    except OSError as error:
        raise _disk_error(folder, error) from error
    write_json(folder / str(epoch) / "attempt.json", {"format": FORMAT, "attempt": epoch, **record, **here()})
    return Attempt(store, cell_id, epoch)


def commit_result(attempt: Attempt, result: Mapping[str, Any]) -> bool:
    """Make `result` the cell's result. False, and nothing changes, where a later attempt or a result stands."""
    path = attempt.store.cell(attempt.cell_id) / "result.json"
    record = {"format": FORMAT, "cell": attempt.cell_id, "attempt": attempt.epoch, **result}
    try:
        temporary = _write_beside(path, json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
        try:
            if not attempt.holds_lease():
                return False
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        _sync_folder(path.parent)
    except OSError as error:
        raise _disk_error(path, error) from error
    return True


def record_error(attempt: Attempt, kind: str, message: str, traceback: str = "") -> None:
    """Write the attempt's error.txt, "kind: message" first. Kinds: code, infrastructure, out_of_memory, preemption."""
    first_line = " ".join(message.split()) or "no message"
    write_bytes(attempt.folder / "error.txt", f"{kind}: {first_line}\n\n{traceback}".encode())


@dataclass(frozen=True)
class CellState:
    """The state of a cell as its files tell it: planned, running, finished, diverged or failed, and why."""

    state: str
    reason: str | None
    attempts: int
    result: Json | None


def cell_state(store: Store, cell_id: str) -> CellState:
    """Derive a cell's state from its files alone."""
    try:
        result = read_json(store.cell(cell_id) / "result.json")
        return CellState(result["state"], result.get("reason"), result["attempt"] + 1, result)
    except FileNotFoundError:
        pass
    epochs = attempt_epochs(store, cell_id)
    if not epochs:
        return CellState("planned", None, 0, None)
    folder = store.attempt(cell_id, epochs[-1])
    try:
        with (folder / "error.txt").open(errors="replace") as stream:
            return CellState("failed", stream.readline().strip(), len(epochs), None)
    except FileNotFoundError:
        pass
    if _is_alive(folder):
        return CellState("running", None, len(epochs), None)
    return CellState("planned", f"attempt {epochs[-1]} was interrupted", len(epochs), None)


def _is_alive(folder: Path) -> bool:
    signs = [path.stat().st_mtime for name in ("attempt.json", "log.jsonl") if (path := folder / name).exists()]
    try:
        return is_alive(read_json(folder / "attempt.json"), max(signs, default=0.0))
    except FileNotFoundError:  # the folder is made a moment before its record
        return time.time() - folder.stat().st_mtime < HEARTBEAT_SECONDS


def here() -> Json:
    """Who writes a record: host, process and time, so that `is_alive` can tell whether it lives."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "process_started": round(process.create_time(), 1),
        "started": timestamp(),
    }


def is_alive(record: Mapping[str, Any], last_sign: float) -> bool:
    """Whether the process that wrote `here()` into a record lives: by its id and start time on this host (an id may be
    used again), elsewhere by its last sign of life (Unix seconds)."""
    if record["host"] != socket.gethostname():
        return time.time() - last_sign < HEARTBEAT_SECONDS
    try:
        process = psutil.Process(record["pid"])
        started = round(process.create_time(), 1)
        return process.status() != psutil.STATUS_ZOMBIE and abs(started - record["process_started"]) < 1.0
    except psutil.Error:
        return False


# --- drivers -----------------------------------------------------------------------------------------------------


def claim_study(store: Store, name: str) -> Path:
    """Make this process the study's only driver. Returns the claim's file: touch it now and then, unlink it at last.

    Claims are numbered, driver-<k>.json, and the highest counts. A dead one is never taken away, only outbid by the
    next number, which one process alone can link: so of many that find a dead driver, one replaces it.
    Raises InputError that names the holder where another driver lives.
    """
    folder = store.study(name)
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        number = max((int(path.stem.partition("-")[2]) for path in folder.glob("driver-*.json")), default=-1)
        path = folder / f"driver-{number}.json"
        try:
            if number >= 0 and is_alive(holder := read_json(path), path.stat().st_mtime):
                raise InputError(
                    f"study {name} is being run by process {holder['pid']} on {holder['host']} "
                    f"since {holder['started']}. Wait for it, or stop it first."
                )
        except FileNotFoundError:  # it has just ended
            continue
        path = folder / f"driver-{number + 1}.json"
        temporary = _write_beside(path, json.dumps(here()).encode())
        try:
            os.link(temporary, path)
            return path
        except FileExistsError:  # another was quicker
            continue
        finally:
            os.unlink(temporary)


# --- studies -----------------------------------------------------------------------------------------------------


def study_names(store: Store) -> list[str]:
    """The studies that the store holds, sorted."""
    return sorted(path.parent.name for path in (store.root / "studies").glob("*/plan.json"))


def read_plan(store: Store, name: str) -> Json:
    """The plan of a study as it was last run: {"study": declaration, "corpus": {...}, "cells": [{"id", "labels"}]}."""
    try:
        return read_json(store.study(name) / "plan.json")
    except FileNotFoundError:
        known = ", ".join(study_names(store)) or "none"
        raise InputError(f"the store {store.root} has no study {name!r} (it has: {known}). Run it first.") from None


def read_cell(store: Store, cell_id: str) -> Json:
    """A cell's record: {"id", "identity": {...}, "counts": {...}}."""
    return read_json(store.cell(cell_id) / "cell.json")


def read_quarantine(store: Store, name: str) -> dict[str, Json]:
    """Cells taken out of the study's fits by a person: {cell id: {"why", "who", "when"}}."""
    try:
        return read_json(store.study(name) / "quarantine.json")
    except FileNotFoundError:
        return {}


def iterate_cells(store: Store, name: str) -> Iterator[tuple[Json, Json, CellState]]:
    """(plan entry, cell record, state) of every cell that the study plans; a quarantined cell says so."""
    quarantine = read_quarantine(store, name)
    for entry in read_plan(store, name)["cells"]:
        state = cell_state(store, entry["id"])
        if entry["id"] in quarantine:
            state = CellState("quarantined", quarantine[entry["id"]]["why"], state.attempts, state.result)
        yield entry, read_cell(store, entry["id"]), state
