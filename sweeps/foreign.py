"""Foreign cells: finished runs from elsewhere, as cells of a study of their own.

A foreign cell has an identity that is the row it was read from, a result and no attempts. Its id is the hash of that
row and of how it was read: the same table imported again adds nothing, and read otherwise it replaces what it was. The
failure it guards against: a run whose recipe nobody here knows passes for one that Escala trained. So its record says
"foreign", what was not told stays unknown, and the study that holds it trains nothing.

    cell.json    {"format", "id", "identity": {"foreign": {"run", "conventions", "row"}}, "counts": {...}}
    result.json  {"format", "cell", "foreign": true, "state", "val_loss_final", "tokens", "imported", ...}
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sweeps.errors import InputError
from sweeps.records import disk_error, is_whole, locked, timestamp, write_json
from sweeps.store import FORMAT, STUDY_NAME, Store, quarantine_cell, read_cell, read_plan, read_quarantine, study_names

COUNTS = ("N", "N_nonembedding", "N_nonembedding_head", "N_total")
_FIELDS = ("family", "seed", "data_seed", "batch_tokens", "corpus", "tokenizer", "precision")
_OPTIMIZER = ("learning_rate", "weight_decay", "beta2")
_SHAPE = ("width", "depth", "heads", "mlp_width", "context")
_ROW_OPTIMIZER = ("beta1", "eps", "clip_norm")
_ROW_SCHEDULE = ("cooldown_fraction", "final_fraction")
"""What tells settings apart that is read from the raw row alone, under these very names, as a fit of the table does:
else two parametrisations at one rate would pass for seeds. Not in `run`, so that a run's id stays what it was."""


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    new: int
    known: int
    """Rows whose cells the study had already."""
    repeated: int
    """Rows that are equal to another row of the table in everything."""
    replaced: int
    """Cells of the study that were the same rows, read in another way: other conventions or columns."""


def is_foreign(record: Mapping[str, Any]) -> bool:
    """Whether a cell's record is of a run that was trained elsewhere."""
    return "foreign" in record["identity"]


def described(record: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's record with every field that a table shows: what is not known of a foreign cell is None."""
    if not is_foreign(record):
        return dict(record)
    run, row = (record["identity"]["foreign"][part] for part in ("run", "row"))

    def word(name: str) -> str | None:
        return None if row.get(name) in (None, "") else str(row[name])

    def number(name: str) -> float | None:
        return row[name] if isinstance(row.get(name), int | float) else None

    identity = {key: run.get(key) for key in _FIELDS} | {"tokens": round(run["D"])}
    identity["family"] = identity["family"] or "foreign"
    identity["optimizer"] = {key: run.get(key) for key in _OPTIMIZER} | {key: number(key) for key in _ROW_OPTIMIZER}
    identity["optimizer"]["name"] = word("optimizer")
    identity["schedule"] = {"name": word("schedule"), "warmup_tokens": run.get("warmup_tokens")}
    identity["schedule"] |= {key: number(key) for key in _ROW_SCHEDULE} | {"cooldown_shape": word("cooldown_shape")}
    identity["parametrisation"] = {"kind": word("parametrisation")}
    identity["trunk"] = word("trunk")
    identity |= {key: number(key) for key in ("C_spent", "init_std", "validation_tokens")}
    identity["shape"] = {key: run.get(key) for key in _SHAPE}
    return {**record, "identity": {"foreign": record["identity"]["foreign"], **identity}}


def import_runs(
    store: Store, name: str, rows: Iterable[Mapping[str, Any]], conventions: Mapping[str, str], source: str
) -> Imported:
    """Add ended runs to the foreign study `name`, which is made where there is none.

    rows: {"run": {"N", "D", "C", "loss", ...}, "row": the raw row}, plain JSON values; C is in FLOPs, loss in nats per
    token. A run with "state" has diverged, and may have no loss. conventions: {"N", "C"}: which parameters and which
    FLOPs are meant. source: the table's name, for people.
    Raises InputError where a study of that name trains cells of its own, or the store cannot be written.
    """
    if not STUDY_NAME.fullmatch(name):
        raise InputError(f"--study: found {name!r}; letters, digits, dot, dash and underscore only, at most 100.")
    before: dict[str, Any] = {"cells": []}
    if name in study_names(store):
        before = read_plan(store, name)
        if not before.get("foreign"):
            raise InputError(
                f"study {name} of {store.root} trains cells of its own: finished runs are imported into a study apart. "
                "Give another name with --study."
            )
    rows = list(rows)
    if small := next((one["run"]["D"] for one in rows if one["run"]["D"] < 1), None):
        raise InputError(f"found a run of {small:g} tokens. Are these billions? Then write --columns 'D=D*1e9'.")
    found = {_write_cell(store, one, conventions): one for one in rows}
    with _plan_lock(store, name):
        before = read_plan(store, name) if name in study_names(store) else before
        old = {entry["id"]: entry for entry in before["cells"]}
        again = {_row_key(one["row"]): cell_id for cell_id, one in found.items()}
        replaced = {cell_id: again.get(_row(store, cell_id)) for cell_id in old.keys() - found.keys()}
        kept = {cell_id: entry for cell_id, entry in old.items() if replaced.get(cell_id) is None}
        entries = dict(kept)
        for cell_id, one in found.items():
            entries[cell_id] = {"id": cell_id, "labels": _labels(one["run"], one["row"])}
        if entries != old:
            study = before.get("study") or {"name": name, "question": f"What do the runs of {source} say?"}
            plan = {"format": FORMAT, "planned": timestamp(), "foreign": True, "study": study, "corpus": {}}
            write_json(store.study(name) / "plan.json", {**plan, "cells": list(entries.values())})
    for cell_id, mark in read_quarantine(store, name).items():
        if (now := replaced.get(cell_id)) is not None:
            quarantine_cell(store, name, now, mark["why"], mark["who"])
    known = len(found.keys() & old.keys())
    return Imported(len(found) - known, known, len(rows) - len(found), len(old) - len(kept))


def _labels(run: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan says of a cell, under the names that an export has for it: where it stands in its grid or search, and
    whether its settings are the defaults, against which tuning is held."""
    found = {"budget": run.get("budget")}
    found |= {key: row.get(key) for key in ("size", "trial", "rung") if isinstance(row.get(key), int | float)}
    found["search"] = row["search"] if isinstance(row.get("search"), str) else None
    found["default"] = {"true": True, "false": False}.get(str(row.get("is_default")).lower())
    return {key: value for key, value in found.items() if value is not None}


@contextmanager
def _plan_lock(store: Store, name: str) -> Iterator[None]:
    """One import into a study at a time, so that no runs of another are lost."""
    path = store.study(name) / "import.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            yield
    except OSError as error:
        raise disk_error(path, error) from error


def _row(store: Store, cell_id: str) -> str:
    return _row_key(read_cell(store, cell_id)["identity"]["foreign"]["row"])


def _row_key(row: Any) -> str:
    return json.dumps(row, sort_keys=True)


def _write_cell(store: Store, one: Mapping[str, Any], conventions: Mapping[str, str]) -> str:
    run = one["run"]
    identity = {"foreign": {"run": run, "conventions": dict(conventions), "row": one["row"]}}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    cell_id = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    folder = store.cell(cell_id)
    if is_whole(folder / "cell.json") and is_whole(folder / "result.json"):
        return cell_id
    counts = {key: run.get(key) for key in COUNTS} | {"C": run["C"], "C_6nd": 6.0 * run["N"] * run["D"]}
    counts |= {"flops_per_token": run["C"] / run["D"], "steps": run.get("steps"), "epochs": run.get("epochs")}
    write_json(
        folder / "cell.json", {"format": FORMAT, "id": cell_id, "identity": identity, "counts": counts}, sync=False
    )
    state, row = run.get("state", "finished"), one["row"]
    reason = str(row.get("reason") or "as the table tells") if state == "diverged" else None
    result = {"format": FORMAT, "cell": cell_id, "foreign": True, "state": state, "reason": reason}
    result |= {"val_loss_final": run.get("loss"), "val_bpb_final": None, "tokens": round(run["D"]), "flops": run["C"]}
    if isinstance(row.get("loss_at_start"), int | float):
        result["loss_at_start"] = row["loss_at_start"]  # what a diverged run counts as, in an optimum
    write_json(folder / "result.json", {**result, "imported": round(time.time(), 3)}, sync=False)
    return cell_id
