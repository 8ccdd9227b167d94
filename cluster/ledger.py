"""The ledger: a study's plan on record, and the state of each of its cells, read from files alone."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.calibration import find_calibration
from cluster.estimate import predicted_seconds
from sweeps.cellrow import cell_row
from sweeps.faults import fault
from sweeps.foreign import described
from sweeps.grids import Plan
from sweeps.lineage import Branch, kept_pasts, lineage, note_lineage
from sweeps.planned import PlannedCell
from sweeps.records import is_whole, timestamp, write_bytes, write_json
from sweeps.store import (
    FORMAT,
    CellState,
    Store,
    attempt_epochs,
    cell_state,
    iterate_cells,
    read_plan,
    study_names,
    trunk_of,
)
from sweeps.units import flops, plural


@dataclass(frozen=True)
class Change:
    """How a plan differs from the one on record, and what of it is done."""

    new: int
    """Cells that this study did not plan before."""
    kept: int
    dropped: int
    """Cells that it planned before and no longer does; they stay in the store."""
    done: int
    """Planned cells that have ended already, in this study or in another on the same store."""
    first: bool
    """Whether the study is new to this store."""

    def __str__(self) -> str:
        if self.first:
            return plural(self.new, "cell") + (f", {self.done} of them done already in this store" if self.done else "")
        parts = [f"+{plural(self.new, 'cell')}, {self.kept} kept"]
        if self.dropped:
            parts.append(f"{self.dropped} no longer planned")
        return ", ".join([*parts, f"{self.done} done"])


def compare(store: Store, plan: Plan) -> Change:
    """Hold a plan against the store without writing anything."""
    planned = {one.cell.id for one in plan.cells}
    known = plan.study.name in study_names(store)
    before = {entry["id"] for entry in read_plan(store, plan.study.name)["cells"]} if known else set()
    done = sum((store.cell(cell_id) / "result.json").exists() for cell_id in planned)
    return Change(len(planned - before), len(planned & before), len(before - planned), done, not known)


def register(store: Store, plan: Plan, text: bytes) -> None:
    """Put a plan on record: each cell's cell.json, then the study's plan.json and the text of its file.

    Cells of which the plan on record tells how long they take keep that; who trains them says what it is there
    (`register_growth`). Of others it is what this machine would take.
    """
    _note_cells(store, plan.cells)
    known = replace(plan, branches=expected_branches(store, plan))
    seconds = predicted_seconds(known, find_calibration(store)) | recorded_seconds(store, plan.study.name)
    fault("plan.before_write")
    write_bytes(store.study(plan.study.name) / "study.yaml", text)
    _write_plan(store, plan, seconds)


def register_growth(store: Store, plan: Plan, new: Sequence[PlannedCell], seconds: Mapping[str, float]) -> None:
    """Put on record the `new` cells that a plan has won, those of a search's new trials; and how many `seconds` all of
    its cells are predicted to take, by id."""
    _note_cells(store, new)
    fault("plan.before_write")
    _write_plan(store, plan, seconds)


def recorded_seconds(store: Store, name: str) -> dict[str, float]:
    """How long the cells of the plan on record are predicted to take, by id, as far as it tells."""
    if name not in study_names(store):
        return {}
    entries = read_plan(store, name)["cells"]
    return {entry["id"]: entry["seconds_predicted"] for entry in entries if "seconds_predicted" in entry}


def _note_cells(store: Store, cells: Sequence[PlannedCell]) -> None:
    for one in cells:
        if not _is_kept(store, one.cell.id):
            record = {"format": FORMAT, "id": one.cell.id, "identity": one.cell.identity, "counts": dict(one.counts)}
            write_json(store.cell(one.cell.id) / "cell.json", record, sync=False)
        note_lineage(store, one.cell)


def _is_kept(store: Store, cell_id: str) -> bool:
    """Whether it is on record what the cell is: a plan that is killed may leave half a cell, and a power cut an empty
    record, which is written without waiting for the disk. A start opens no record of cells that have ended: these are
    told by their size alone, since the disk had long enough."""
    record = store.cell(cell_id) / "cell.json"
    if record.with_name("result.json").exists() and record.exists():
        return record.stat().st_size > 0
    return is_whole(record)


def _write_plan(store: Store, plan: Plan, seconds: Mapping[str, float]) -> None:
    record = {
        "format": FORMAT,
        "planned": timestamp(),
        "study": plan.study.model_dump(mode="json", by_alias=True),
        "corpus": asdict(plan.corpus),
        "cells": [_entry(plan, one) | _predicted(seconds.get(one.cell.id)) for one in plan.cells],
    }
    record |= {"fitted": {name: fit.to_json() for name, fit in plan.fits.items()}} if plan.fits else {}
    indent = None if plan.places else 1  # that of a search is written for each trial; indenting takes ten times as long
    content = json.dumps(record, indent=indent, allow_nan=False).encode() + b"\n"
    write_bytes(store.study(plan.study.name) / "plan.json", content)


def _entry(plan: Plan, one: PlannedCell) -> dict[str, Any]:
    """A cell as plan.json names it."""
    entry = {"id": one.cell.id, "labels": dict(one.labels)}
    branch = plan.branches.get(one.cell.id)
    return entry | (
        {"trunk": {"cell": branch.parent, "tokens": branch.steps * one.cell.batch_tokens}} if branch else {}
    )


def _predicted(seconds: float | None) -> dict[str, float]:
    return {} if seconds is None else {"seconds_predicted": seconds}


def plan_rows(store: Store, plan: Plan, branches: Mapping[str, Branch]) -> list[dict[str, Any]]:
    """One plain row per planned cell, with its state in this store; `branches` as of `expected_branches`."""
    known = replace(plan, branches=branches)
    return [
        _row(_entry(known, one), {"identity": one.cell.identity, "counts": one.counts}, cell_state(store, one.cell.id))
        for one in plan.cells
    ]


def expected_branches(store: Store, plan: Plan) -> dict[str, Branch]:
    """Where each cell leaves its trunk, by id: as planned, but for cells that are still to begin. These go on from the
    longest piece of their past that the store has, or that a trunk of the plan is still to train."""
    expected = dict(plan.branches)
    waiting = [one.cell for one in plan.cells if not (store.cell(one.cell.id) / "result.json").exists()]
    fresh = [cell for cell in waiting if lineage(cell) is not None and not attempt_epochs(store, cell.id)]
    kept = kept_pasts(store, fresh)
    for cell in fresh:
        branch = plan.branches.get(cell.id)
        to_come = branch if branch and not (store.cell(branch.parent) / "result.json").exists() else None
        both = [one for one in (to_come, kept.get(cell.id)) if one is not None]
        expected.pop(cell.id, None)
        if both:
            expected[cell.id] = max(both, key=lambda one: one.steps)
    return expected


def ledger_rows(store: Store, name: str) -> list[dict[str, Any]]:
    """The same rows for a study on record."""
    return [_row(entry, record, state) for entry, record, state in iterate_cells(store, name)]


def count_states(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many cells are in each state."""
    return dict(Counter(row["state"] for row in rows))


def sharing(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the cells of a study save by sharing trunks; None where none does. C and C_spent are FLOPs over all cells:
    what they are worth, and what they cost or will cost."""
    branches = [row for row in rows if row["trunk"]]
    if not branches:
        return None
    attributed = sum(row["C"] for row in rows)
    saved = sum(row["C"] * row["trunk_tokens"] / row["D"] for row in branches)
    trunks = len({row["trunk"] for row in branches})
    told = {"branches": len(branches), "trunks": trunks, "C": attributed, "C_spent": attributed - saved}
    return told | {"saved": saved / attributed}


def sharing_words(told: dict[str, Any]) -> str:
    """`15 cells branch off 9 trunks: 6.2e12 of 9.8e12 FLOPs are spent (37% saved)`."""
    cells = f"{told['branches']} cell{'s branch' if told['branches'] > 1 else ' branches'} off"
    return (
        f"{cells} {plural(told['trunks'], 'trunk')}: {flops(told['C_spent'])} of {flops(told['C'])} FLOPs are spent "
        f"({100 * told['saved']:.0f}% saved)"
    )


def _row(entry: Mapping[str, Any], record: Mapping[str, Any], state: CellState) -> dict[str, Any]:
    trunk = trunk_of(dict(entry), state.result) or {}
    return {
        "id": entry["id"],
        **cell_row(entry, described(record), state.result),
        "trunk": trunk.get("cell"),
        "trunk_tokens": trunk.get("tokens"),
        "labels": dict(entry["labels"]),
        "state": state.state,
        "reason": state.reason,
        "attempts": state.attempts,
    }
