"""Foreign cells: finished runs from elsewhere, as cells of a study of their own.

A foreign cell has an identity that is the row it was read from, a result and no attempts. Its id is the hash of that
row, so the same table imported again adds nothing. The failure it guards against: a run whose recipe nobody here knows
passes for one that Escala trained. So its record says "foreign", what was not told stays unknown, and the study that
holds it trains nothing.

    cell.json    {"format", "id", "identity": {"foreign": {"run", "conventions", "row"}}, "counts": {...}}
    result.json  {"format", "cell", "foreign": true, "state": "finished", "val_loss_final", "tokens", "imported", ...}
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sweeps.errors import InputError
from sweeps.records import timestamp, write_json
from sweeps.store import FORMAT, STUDY_NAME, Store, read_plan, study_names

COUNTS = ("N", "N_nonembedding", "N_nonembedding_head", "N_total")
_FIELDS = ("family", "seed", "data_seed", "batch_tokens", "corpus", "tokenizer", "precision")
_OPTIMIZER = ("learning_rate", "weight_decay", "beta2")
_SHAPE = ("width", "depth", "heads", "mlp_width", "context")


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    new: int
    known: int
    """Rows whose cells the study had already."""
    repeated: int
    """Rows that are equal to another row of the table in everything."""


def is_foreign(record: Mapping[str, Any]) -> bool:
    """Whether a cell's record is of a run that was trained elsewhere."""
    return "foreign" in record["identity"]


def described(record: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's record with every field that a table shows: what is not known of a foreign cell is None."""
    if not is_foreign(record):
        return dict(record)
    run = record["identity"]["foreign"]["run"]
    identity = {key: run.get(key) for key in _FIELDS} | {"tokens": round(run["D"])}
    identity["family"] = identity["family"] or "foreign"
    identity["optimizer"] = {key: run.get(key) for key in _OPTIMIZER}
    identity["schedule"] = {"name": None, "warmup_tokens": run.get("warmup_tokens")}
    identity["shape"] = {key: run.get(key) for key in _SHAPE}
    return {**record, "identity": {"foreign": record["identity"]["foreign"], **identity}}


def import_runs(
    store: Store, name: str, rows: Iterable[Mapping[str, Any]], conventions: Mapping[str, str], source: str
) -> Imported:
    """Add finished runs to the foreign study `name`, which is made where there is none.

    rows: {"run": {"N", "D", "C", "loss", ...}, "row": the raw row}, plain JSON values; C is in FLOPs, loss in nats per
    token. conventions: {"N", "C"}: which parameters and which FLOPs are meant. source: the table's name, for people.
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
    entries = {entry["id"]: entry for entry in before["cells"]}
    seen: set[str] = set()
    new = total = 0
    for one in rows:
        total += 1
        cell_id = _write_cell(store, one, conventions)
        labels = {key: one["run"][key] for key in ("budget",) if one["run"].get(key) is not None}
        new += cell_id not in entries
        entries.setdefault(cell_id, {"id": cell_id, "labels": labels})
        seen.add(cell_id)
    if new:
        study = before.get("study") or {"name": name, "question": f"What do the runs of {source} say?"}
        plan = {"format": FORMAT, "planned": timestamp(), "foreign": True, "study": study, "corpus": {}}
        write_json(store.study(name) / "plan.json", {**plan, "cells": list(entries.values())})
    return Imported(new, len(seen) - new, total - len(seen))


def _write_cell(store: Store, one: Mapping[str, Any], conventions: Mapping[str, str]) -> str:
    run = one["run"]
    identity = {"foreign": {"run": run, "conventions": dict(conventions), "row": one["row"]}}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    cell_id = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    folder = store.cell(cell_id)
    if (folder / "result.json").exists():
        return cell_id
    counts = {key: run.get(key) for key in COUNTS} | {"C": run["C"], "C_6nd": 6.0 * run["N"] * run["D"]}
    counts |= {"flops_per_token": run["C"] / run["D"], "steps": run.get("steps"), "epochs": run.get("epochs")}
    write_json(
        folder / "cell.json", {"format": FORMAT, "id": cell_id, "identity": identity, "counts": counts}, sync=False
    )
    result = {"format": FORMAT, "cell": cell_id, "foreign": True, "state": "finished", "reason": None}
    result |= {"val_loss_final": run["loss"], "val_bpb_final": None, "tokens": round(run["D"]), "flops": run["C"]}
    write_json(folder / "result.json", {**result, "imported": round(time.time(), 3)}, sync=False)
    return cell_id
