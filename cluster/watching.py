"""What `escala status`, `logs` and `why` know beyond a cell's state: its attempts, its progress, its nearest cells.

All of it is read from the store's files at the moment of asking. The failure it guards against: a display that trusts
a driver's memory shows a dead study as running. What is shown of a running cell is its own last sign of life.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cluster.claims import living_drivers, read_eta, read_holder
from cluster.control import read_pause
from cluster.ledger import ledger_rows
from sweeps.cell import differences
from sweeps.errors import InputError
from sweeps.records import read_json, read_or_none, read_rows
from sweeps.store import (
    CELL_ID,
    Store,
    attempt_epochs,
    cell_state,
    read_cell,
    read_end,
    read_plan,
    read_quarantine,
    study_names,
)
from sweeps.units import plural

Json = dict[str, Any]
TAIL_BYTES = 65_536
"""The end of a log that is read for a running cell's last figures."""
NEAREST = 3
"""Cells that are as near as the nearest, at most so many of them."""


def status_rows(store: Store, name: str) -> list[Json]:
    """The ledger's rows, each with `ends` (attempts by kind of end), `host`, and for a running cell `progress`:
    {"tokens", "horizon", "loss", "tokens_per_second", "silent_seconds"}; `numerics`: what an attempt computed otherwise
    than the one before, in words."""
    rows = ledger_rows(store, name)
    for row in rows:
        tried = row["attempts"] > (row["state"] in ("finished", "diverged"))
        row["ends"] = attempt_ends(store, row["id"]) if tried else {}
        row["numerics"] = changed_numerics(store, row["id"]) if row["attempts"] > 1 else None
        row["progress"] = row["host"] = None
        if row["state"] == "running":
            row["progress"] = progress(store, row["id"], row["D"])
            row["host"] = _attempts(store, row["id"])[-1].get("host")
    return rows


def study_rows(store: Store) -> list[Json]:
    """The studies of a store: {"study", "cells", "counts" (cells by state), "paused", "driver" and "eta_seconds"
    (as `driver_of`)}."""
    found = []
    for name in study_names(store):
        cells = [entry["id"] for entry in read_plan(store, name)["cells"]]
        marked = read_quarantine(store, name)
        states = Counter("quarantined" if one in marked else cell_state(store, one).state for one in cells)
        stands = read_pause(store, name)
        paused = None if stands is None else str(stands)
        row = {"study": name, "cells": len(cells), "counts": dict(states), "paused": paused}
        found.append(row | driver_of(store, name))
    return found


def driver_of(store: Store, name: str) -> Json:
    """{"driver": {"host", "pid", "started"} of the one that lives, or None, "eta_seconds": until it expects to be done,
    None where that is not known}."""
    holder = read_holder(store, name)
    if holder is None or not holder.lives:
        return {"driver": None, "eta_seconds": None}
    eta = read_eta(store, name)
    driver = {key: holder.record[key] for key in ("host", "pid", "started")}
    return {"driver": driver, "eta_seconds": None if eta is None else round(eta, 1)}


def attempt_ends(store: Store, cell_id: str) -> dict[str, int]:
    """How many attempts of a cell ended in each kind of error; one that left no word is not counted."""
    ends = (read_end(store, cell_id, epoch) for epoch in attempt_epochs(store, cell_id))
    return dict(Counter(end[0] for end in ends if end))


BEFORE_GANGS = {"workers": 1, "sharded": False}
"""Numerics that a record lacks which was written when a cell had one worker."""


def changed_numerics(store: Store, cell_id: str) -> str | None:
    """What the last attempt that changed them computed otherwise than the one before: its losses agree with theirs to
    rounding, not to the bit. None where all computed alike."""
    told: str | None = None
    before: Json = {}
    for one in _attempts(store, cell_id):
        now = BEFORE_GANGS | one["numerics"] if one["numerics"] else before
        changed = [f"{field} {a} -> {b}" for field, a, b in differences(before, now)] if before else []
        if changed:
            told = f"attempt {one['attempt']}: {', '.join(changed)}"
        before = now
    return told


def progress(store: Store, cell_id: str, horizon: int) -> Json:
    """How far a running cell is, by its last log rows, and for how many seconds it has given no sign of life."""
    folder = store.attempt(cell_id, attempt_epochs(store, cell_id)[-1])
    log = folder / "log.jsonl"
    size = log.stat().st_size if log.exists() else 0
    rows, _ = read_rows(log, max(0, size - TAIL_BYTES))
    found: Json = {"tokens": 0, "horizon": horizon, "loss": None, "tokens_per_second": None}
    for row in rows:
        found["tokens"] = row["tokens"]
        found["loss"] = row["metrics"].get("val_loss_final", row["metrics"].get("train_loss", found["loss"]))
        found["tokens_per_second"] = row["metrics"].get("tokens_per_second", found["tokens_per_second"])
    signs = [path.stat().st_mtime for path in (log, folder / "attempt.json") if path.exists()]
    if (beat := read_or_none(folder / "heartbeat.json")) is not None:
        signs.append(beat["time"])
        found["tokens"] = max(found["tokens"], beat["tokens"])
    found["silent_seconds"] = round(max(0.0, time.time() - max(signs, default=time.time())), 1)
    return found


def _attempts(store: Store, cell_id: str) -> list[Json]:
    """Every attempt: {"attempt", "study", "host", "started", "numerics", "end"}."""
    found = []
    for epoch in attempt_epochs(store, cell_id):
        try:
            record = read_json(store.attempt(cell_id, epoch) / "attempt.json")
        except FileNotFoundError:  # its process died before it wrote it
            record = {}
        told = {key: record.get(key) for key in ("study", "host", "started", "numerics")}
        end = read_end(store, cell_id, epoch)
        found.append({"attempt": epoch, **told, "end": end and ": ".join(end)})
    return found


# --- the log of a cell while it runs -----------------------------------------------------------------------------


def follow(store: Store, cell_id: str, poll_seconds: float = 0.5) -> Iterator[Json]:
    """The cell's rows as they come, over its attempts, each (tokens, key) once; ends when the cell does.

    {"attempt", "time", "tokens", "metrics"}, and where an attempt failed {"attempt", "error": the whole text}.
    """
    seen: set[tuple[int, str]] = set()
    offsets: dict[int, int] = {}
    failed: set[int] = set()
    while True:
        over = not _goes_on(store, cell_id)  # asked before the last rows are read, so that none is missed
        for epoch in attempt_epochs(store, cell_id):
            folder = store.attempt(cell_id, epoch)
            rows, offsets[epoch] = read_rows(folder / "log.jsonl", offsets.get(epoch, 0))
            for row in rows:
                fresh = {k: v for k, v in row["metrics"].items() if (row["tokens"], k) not in seen}
                seen |= {(row["tokens"], key) for key in fresh}
                if fresh:
                    yield {"attempt": epoch, **row, "metrics": fresh}
            if epoch not in failed and (folder / "error.txt").exists():
                failed.add(epoch)
                yield {"attempt": epoch, "error": (folder / "error.txt").read_text(errors="replace")}
        if over:
            return
        time.sleep(poll_seconds)


def failures(store: Store, cell_id: str) -> list[Json]:
    """The attempts that failed, as `follow` tells them: {"attempt", "error": the whole text}."""
    found = []
    for epoch in attempt_epochs(store, cell_id):
        path = store.attempt(cell_id, epoch) / "error.txt"
        if path.exists():
            found.append({"attempt": epoch, "error": path.read_text(errors="replace")})
    return found


def _goes_on(store: Store, cell_id: str) -> bool:
    """Whether more may come: the cell runs, or a driver lives that may yet try it."""
    state = cell_state(store, cell_id)
    if state.result is not None or (state.reason or "").startswith("code"):
        return False
    if state.state == "running":
        return True
    driven = {name for name, _ in living_drivers(store)}
    return bool(driven & planning_studies(store, [cell_id])[cell_id].keys())


# --- why a cell is what it is ------------------------------------------------------------------------------------


def planning_studies(store: Store, cells: list[str]) -> dict[str, dict[str, Json]]:
    """Which studies plan these cells: {cell id: {study: labels}}."""
    found: dict[str, dict[str, Json]] = {cell_id: {} for cell_id in cells}
    for name in study_names(store):
        for entry in read_plan(store, name)["cells"]:
            if entry["id"] in found:
                found[entry["id"]][name] = entry["labels"]
    return found


def explain(store: Store, cell_id: str) -> Json:
    """Why a cell is one of its own: {"cell", "state", "reason", "studies", "quarantine", "attempts",
    "numerics", "nearest"}.

    nearest: the cells of the store that differ in the fewest fields, those first that no study plans any more: a study
    that was edited leaves its old cells so. Each is {"cell", "state", "studies", "fields"}, a field {"field", "one",
    "other"}, where `one` is this cell's.
    """
    own = read_cell(store, cell_id)["identity"]
    near: list[tuple[int, str, list[Any]]] = []
    least = None
    for name in cell_names(store):
        record = read_or_none(store.cell(name) / "cell.json") if name != cell_id else None
        if record is None:  # a plan that is killed may leave half a cell, and a power cut an empty record
            continue
        fields = list(differences(own, record["identity"]))
        if least is None or len(fields) <= least:
            least = len(fields)
            near.append((len(fields), name, fields))
    tied = {name: fields for count, name, fields in near if count == least}
    plans = planning_studies(store, [cell_id, *tied])
    order = sorted(tied, key=lambda name: (bool(plans[name]), not plans[name].keys() & plans[cell_id].keys(), name))
    state = cell_state(store, cell_id)
    marks = {name: read_quarantine(store, name).get(cell_id) for name in plans[cell_id]}
    return {
        "cell": cell_id,
        "state": state.state,
        "reason": state.reason,
        "studies": plans[cell_id],
        "quarantine": {name: mark for name, mark in marks.items() if mark},
        "attempts": _attempts(store, cell_id),
        "numerics": changed_numerics(store, cell_id),
        "nearest": [
            {
                "cell": name,
                "state": cell_state(store, name).state,
                "studies": sorted(plans[name]),
                "fields": [{"field": field, "one": a, "other": b} for field, a, b in tied[name]],
            }
            for name in order[:NEAREST]
        ],
    }


def explain_lines(found: Json) -> Iterator[str]:
    """The same in words."""
    because = f": {found['reason']}" if found["reason"] else ""
    yield f"{found['cell']} is {found['state']}{because}"
    for name, labels in found["studies"].items():
        said = ", ".join(
            f"{key} {f'{value:g}' if isinstance(value, float) else value}" for key, value in labels.items()
        )
        yield f"planned by {name}" + (f" ({said})" if said else "")
    if not found["studies"]:
        yield "no study plans it any more"
    for name, mark in found["quarantine"].items():
        yield f"in quarantine in {name} since {mark['when']} by {mark['who']}: {mark['why']}"
    for one in found["attempts"]:
        where = f"on {one['host']} since {one['started']}, for {one['study']}" if one["host"] else "left no record"
        yield f"attempt {one['attempt']} {where}" + (f": {one['end']}" if one["end"] else "")
    if found["numerics"]:
        yield f"other numerics since {found['numerics']}"
    if not found["nearest"]:
        yield "it is the only cell of the store"
    for one in found["nearest"]:
        by = f"planned by {', '.join(one['studies'])}" if one["studies"] else "no longer planned"
        yield f"nearest: {one['cell']} ({one['state']}, {by}) differs in {plural(len(one['fields']), 'field')}"
        yield from (f"  {each['field']}: {each['one']!r} here, {each['other']!r} there" for each in one["fields"])


def cell_names(store: Store, prefix: str = "") -> list[str]:
    """The cells of the store whose ids begin so, sorted: what a file manager or a person left beside them is none, nor
    a copy under a name of theirs."""
    try:
        entries = list(os.scandir(store.root / "cells"))
    except FileNotFoundError:
        return []
    found = (one for one in entries if one.name.startswith(prefix) and CELL_ID.fullmatch(one.name))
    return sorted(one.name for one in found if one.is_dir())


def cells_named(store: Store, prefix: str) -> list[str]:
    """The ids that begin with a prefix, sorted."""
    return cell_names(store, prefix) if prefix.isalnum() else []


def ambiguous(store: Store, prefix: str, found: list[str]) -> InputError:
    """Several cells begin with a prefix: what tells them apart."""
    shown = found[:6]
    records = {name: read_or_none(store.cell(name) / "cell.json") for name in shown}
    known = {name: record["identity"] for name, record in records.items() if record is not None}
    first, *others = list(known.values()) or [{}]
    fields = list(dict.fromkeys(field for other in others for field, _, _ in differences(first, other)))
    told = {name: ", ".join(f"{field} {_at(one, field)!r}" for field in fields[:6]) for name, one in known.items()}
    lines = [f"  {name}  {told.get(name, 'without a record of what it is')}" for name in shown]
    more = [f"  and {len(found) - 6} more"] if len(found) > 6 else []
    listed = "\n".join([*lines, *more])
    return InputError(f"{len(found)} cells of {store.root} begin with {prefix!r}; give more digits of one:\n{listed}")


def _at(identity: Json, field: str) -> Any:
    value: Any = identity
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
