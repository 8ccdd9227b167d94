"""Estimates: what a plan will take on calibrated workers: seconds per cell, the end of the queue, energy, money.

Guarded against: a number without grounds. What is not calibrated, or not in the device table, is None with a reason,
and no total is made of the rest.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cluster.calibration import Calibration, core_share
from cluster.hardware import Amount, energy, local_gpus, money
from cluster.placement import Demand, Node
from cluster.scheduling import Job
from cluster.simulation import Edge, simulate
from sweeps.cell import Cell
from sweeps.grids import Plan
from sweeps.lineage import Branch
from sweeps.stacks import stack_key, stack_size
from sweeps.timing import cell_seconds, is_far, kind_of_work, seconds_until

BUSY = 0.9
"""Workers that had less of their cores than this were not alone when they timed."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A plan on one kind of worker. Totals are over the cells that are still to do."""

    kind: str
    device: str
    measured: str
    workers: int
    seconds: Mapping[str, float | None]
    """Cell id -> wall-clock seconds on a warm worker; a branch only from where it leaves its trunk."""
    worker_seconds: float | None
    makespan_seconds: float | None
    """From the first cell's start to the last one's end, longest first; the start of Ray comes on top."""
    energy_kwh: Amount
    dollars: Amount
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        plain = {key: value for key, value in asdict(self).items() if key != "seconds"}
        return plain | {"energy_kwh": self.energy_kwh.value, "dollars": self.dollars.value} | {"notes": self.notes}


def cells_seconds(plan: Plan, calibration: Calibration) -> tuple[dict[str, float | None], dict[str, str]]:
    """Seconds by cell id, None where they are not known; and by reason the cell that it was first met at."""
    branches = plan.branches
    seconds: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for one in plan.cells:
        cell = one.cell
        costs = calibration.costs.get(kind_of_work(cell))
        if cell.trainer:
            why = "cells with a trainer of their own have no predicted time"
        elif costs is None:
            why = f"no {kind_of_work(cell)} cell was timed on {calibration.kind}: escala calibrate {plan.study.name}"
        else:
            first = branches[cell.id].steps if cell.id in branches else 0
            seconds[cell.id] = cell_seconds(costs, cell, plan.corpus.validation_tokens, first_step=first)
            if is_far(costs, cell):
                reasons.setdefault(
                    "some cells are far larger than any that was timed: their times are extrapolated", ""
                )
            continue
        seconds[cell.id] = None
        reasons.setdefault(why, cell.id)
    return seconds, reasons


def predicted_seconds(plan: Plan, calibration: Calibration | None) -> dict[str, float]:
    """Seconds by cell id, of the cells for which a calibration tells them."""
    if calibration is None:
        return {}
    seconds, _ = cells_seconds(plan, calibration)
    return {cell_id: round(value, 3) for cell_id, value in seconds.items() if value is not None}


def estimate(
    plan: Plan,
    calibration: Calibration,
    missing: Collection[str],
    workers: int | None = None,
    branches: Mapping[str, Branch] | None = None,
) -> Estimate:
    """What a plan takes on so many workers of a calibrated kind, by default this machine's slots.

    `missing` are the ids of the cells that are still to do. A branch waits until its trunk has come so far.
    `branches`: where cells leave what is trained before them, if not as the plan says (`ledger.expected_branches`).
    """
    seconds, reasons = cells_seconds(plan if branches is None else replace(plan, branches=branches), calibration)
    count = min(workers or len(local_gpus()) or os.cpu_count() or 1, max(1, len(missing)))
    notes = [*reasons]
    share = core_share(calibration)
    if share is not None and share < BUSY:
        notes.append(
            f"other work had the cores while this was calibrated (its workers had {share:.0%} of them): times on a "
            f"quiet machine are shorter, down to {share:.2f} times these"
        )
    if stacked := _stackable(plan, calibration, missing, count):
        notes.append(
            f"{stacked} of the cells may train as stacks, which takes less time than is told here: that of cells one "
            "by one"
        )
    todo = [one.cell.id for one in plan.cells if one.cell.id in missing]
    known = [(cell_id, value) for cell_id in todo if (value := seconds[cell_id]) is not None]
    total = sum(value for _, value in known) if len(known) == len(todo) else None
    span = None
    if total is not None:
        jobs = [Job(id=cell_id, demand=Demand(), seconds=value) for cell_id, value in known]
        span = simulate(jobs, [Node("all workers", count)], edges=edges(plan, calibration)).makespan_seconds
    unknown = Amount(None, "not every cell's time is known")
    used = energy(calibration.device, total) if total is not None else unknown
    paid = money(calibration.device, total) if total is not None else unknown
    return Estimate(
        kind=calibration.kind,
        device=calibration.device,
        measured=calibration.measured,
        workers=count,
        seconds=seconds,
        worker_seconds=total,
        makespan_seconds=span,
        energy_kwh=used,
        dollars=paid,
        notes=tuple(dict.fromkeys([*notes, used.note, paid.note])),
    )


def _stackable(plan: Plan, calibration: Calibration, missing: Collection[str], workers: int) -> int:
    """How many of the cells that are still to do are alike enough, and small enough, for stacks."""
    stacking = plan.study.stack
    if stacking == "off":
        return 0
    device: Literal["cpu", "cuda"] = "cpu" if core_share(calibration) is not None else "cuda"
    alike: dict[str | None, list[Cell]] = {}
    for one in plan.cells:
        if one.cell.id in missing:
            alike.setdefault(stack_key(one.cell), []).append(one.cell)
    sizes = [len(cells) for cells in alike.values() if stack_size(len(cells), workers, stacking, device, cells[0]) > 1]
    return sum(sizes)


def edges(plan: Plan, calibration: Calibration) -> dict[str, Edge]:
    """What branches wait for: a branch may start when its trunk has taken the steps that they share."""
    cells = {one.cell.id: one.cell for one in plan.cells}
    found = {}
    for cell_id, branch in plan.branches.items():
        trunk = cells[branch.parent]
        costs = calibration.costs.get(kind_of_work(trunk))
        after = seconds_until(costs, trunk, branch.steps) if costs is not None and not trunk.trainer else None
        found[cell_id] = Edge(parent=branch.parent, after=after)
    return found
