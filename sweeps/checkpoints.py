"""Checkpoints: the whole state of a training run on disk, such that no reader ever takes half of one for whole.

    cells/<id>/attempts/<k>/checkpoints/<tokens>/state.safetensors      the tensors
                                                 state.json             the rest, and the tensors' SHA-256

1. A state is a nested mapping of tensors, arrays and plain values, such as `optimizer.state_dict()`; it comes back
   equal.
2. A checkpoint is written into a folder beside its place, synced and renamed. Its checksums are verified when it is
   read; a damaged one is passed over for the one before. So is one that is ahead of the log: from it a run would go on
   without the rows before it, which a zombie wrote or a power cut took.
3. Training waits for the copy of the tensors alone: a thread writes them. The newest KEEP stay, and those marked
   permanent.
"""

import errno
import hashlib
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sweeps.faults import fault
from sweeps.records import decode_row, disk_error, encode_row, sync_folder
from sweeps.store import Store, attempt_epochs, checkpoint_paths, is_permanent, log_stops

FORMAT = 1
KEEP = 2
"""Of an attempt, besides permanent ones: the newest, and one to fall back on where that is damaged."""

State = Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A state that was read back."""

    path: Path
    tokens: int
    state: dict[str, Any]
    """Tensors on the CPU."""
    log_bytes: int
    """How long the attempt's log was when the state was copied."""


def save(folder: Path, tokens: int, state: State, *, permanent: bool = False) -> Path:
    """Write a checkpoint into `folder` and remove older ones. Returns its path; InputError where the disk refuses."""
    tensors: dict[str, torch.Tensor] = {}
    return _write(folder, tokens, _pack(state, tensors, ""), tensors, permanent)


def load(path: Path) -> Checkpoint | None:
    """Read a checkpoint back; None where it is damaged, unfinished or of a newer format."""
    try:
        record = decode_row((path / "state.json").read_bytes().rstrip(b"\n"))
        if record is None or record["format"] > FORMAT:
            return None
        with (path / "state.safetensors").open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != record["sha256"]:
                return None
        tensors = load_file(path / "state.safetensors")
    except (OSError, SafetensorError):
        return None
    return Checkpoint(path, record["tokens"], _unpack(record["state"], tensors), record.get("log_bytes", 0))


def newest(store: Store, cell_id: str, most_tokens: float = math.inf) -> Checkpoint | None:
    """The cell's last good checkpoint over all its attempts: the one of most tokens, up to `most_tokens`, whose
    checksums hold and whose log holds what was written before it."""
    stops = log_stops(store, cell_id)
    for path in _candidates(store, cell_id):
        if int(path.name) > most_tokens:
            continue
        found = load(path)
        if found is not None and found.log_bytes <= _counted(path.parent.parent, stops):
            return found
    return None


class Writer:
    """Writes the checkpoints of one attempt from a thread of its own, one at a time."""

    def __init__(self, folder: Path, log: Any = None) -> None:
        """`log` is the attempt's open log, an unbuffered binary stream."""
        self.folder, self._log = folder, log
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def submit(self, tokens: int, state: State, *, permanent: bool = False) -> None:
        """Copy a state and write it. Waits for the one before; raises what that one met."""
        self.wait()
        tensors: dict[str, torch.Tensor] = {}
        skeleton = _pack(state, tensors, "")
        log_bytes = os.fstat(self._log.fileno()).st_size if self._log is not None else 0

        def write() -> None:
            try:
                if self._log is not None:
                    os.fsync(self._log.fileno())
                _write(self.folder, tokens, skeleton, tensors, permanent, log_bytes)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="escala-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises what the last write met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _candidates(store: Store, cell_id: str) -> Iterator[Path]:
    found: list[Path] = []
    for epoch in reversed(attempt_epochs(store, cell_id)):
        found += checkpoint_paths(store.checkpoints(cell_id, epoch))
    yield from sorted(found, key=lambda path: int(path.name), reverse=True)  # stable: the last attempt's


def _counted(attempt: Path, stops: Mapping[int, int | None]) -> float:
    """How many bytes of an attempt's log are there and count."""
    stop = stops.get(int(attempt.name))
    try:
        there = (attempt / "log.jsonl").stat().st_size
    except FileNotFoundError:
        there = 0
    return there if stop is None else min(stop, there)


def _write(
    folder: Path, tokens: int, skeleton: Any, tensors: dict[str, torch.Tensor], permanent: bool, log_bytes: int = 0
) -> Path:
    final, temporary = folder / str(tokens), folder / f".tmp-{tokens}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fault("checkpoint.before_write")
        save_file(tensors, temporary / "state.safetensors")
        with (temporary / "state.safetensors").open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        record = {"format": FORMAT, "tokens": tokens, "time": round(time.time(), 3), "permanent": permanent}
        record |= {"log_bytes": log_bytes}
        with (temporary / "state.json").open("wb") as stream:
            stream.write(encode_row({**record, "sha256": digest, "state": skeleton}))
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(temporary)
        fault("checkpoint.before_rename")
        if final.exists():  # the same step again, after a restore
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(folder)
        fault("checkpoint.after_rename")
    except SafetensorError as error:  # which is how it reports what the disk said
        shutil.rmtree(temporary, ignore_errors=True)
        number = re.search(r"os error (\d+)", str(error))
        raise disk_error(final, cause := OSError(int(number[1]) if number else errno.EIO, str(error))) from cause
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_error(final, error) from error
    for old in checkpoint_paths(folder)[:-KEEP]:
        if not is_permanent(old):
            shutil.rmtree(old, ignore_errors=True)
    fault("checkpoint.after_prune")
    return final


def _pack(value: Any, tensors: dict[str, torch.Tensor], place: str) -> Any:
    """A state as JSON values, its tensors copied into `tensors`. TypeError for what JSON and tensors cannot hold."""
    if isinstance(value, torch.Tensor):
        tensors[name := _free(place, tensors)] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(value, np.ndarray):
        tensors[name := _free(place, tensors)] = torch.from_numpy(np.array(value))
        return {"$array": name}
    if isinstance(value, Mapping):
        packed = [(key, _pack(each, tensors, f"{place}/{key}" if place else str(key))) for key, each in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(packed)
        return {"$items": [[_pack(key, tensors, ""), each] for key, each in packed]}
    if isinstance(value, list | tuple):
        packed_list = [_pack(each, tensors, f"{place}/{index}") for index, each in enumerate(value)]
        return packed_list if isinstance(value, list) else {"$tuple": packed_list}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {place}, a {type(value).__name__}: use tensors, arrays, plain values.")


def _free(place: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """The name of the tensor at a place, itself where it is free: `a/b` is a key or two, and 1 is not "1"."""
    name, count = place, 1
    while name in tensors or name == "__metadata__":  # the format's own
        name, count = f"{place}~{count}", count + 1
    return name


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((mark, content),) = value.items()
        if mark == "$tensor":
            return tensors[content]
        if mark == "$array":
            return tensors[content].numpy()
        if mark == "$tuple":
            return tuple(_unpack(each, tensors) for each in content)
        if mark == "$float":
            return float(content)
        if mark == "$items":
            return {_unpack(key, tensors): _unpack(each, tensors) for key, each in content}
    return {key: _unpack(each, tensors) for key, each in value.items()}
