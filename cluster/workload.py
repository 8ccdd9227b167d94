"""Workload: a plan's cells as jobs, with what each waits for and how long it takes on GPUs that may not be there.

Seconds come from a calibration where the store has one for all of the cells, else from FLOPs at a share of a device's
peak that was assumed and is said. Guarded against: an assumption that passes for a measurement.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.calibration import find_calibration
from cluster.estimate import cells_seconds
from cluster.placement import Node, demand_of
from cluster.scheduling import Job
from cluster.simulation import Edge
from sweeps.devices import PEAK_BFLOAT16_FLOPS
from sweeps.errors import InputError, nearest
from sweeps.grids import Plan, first_trials
from sweeps.planned import PlannedCell
from sweeps.samplers import most_trials
from sweeps.store import Store
from sweeps.timing import AROUND_SECONDS
from sweeps.units import plural

DEVICE, MFU = "H100", 0.4
"""What is assumed where nothing was calibrated: a usual model FLOPs utilisation of dense training in bfloat16."""
CPUS_A_GPU = 16
"""Of a simulated node: enough for any way to share it."""
GIB = 1024**3


@dataclass(frozen=True)
class Workload:
    """The jobs of a study on a cluster, and where their seconds come from, in a sentence."""

    jobs: list[Job]
    edges: dict[str, Edge]
    times: str
    notes: tuple[str, ...] = ()


def own_flops(plan: Plan) -> dict[str, float]:
    """Cell id -> the FLOPs that no trunk trains for it."""
    found = {}
    for one in plan.cells:
        branch = plan.branches.get(one.cell.id)
        shared = branch.steps * one.cell.batch_tokens * one.counts["flops_per_token"] if branch else 0.0
        found[one.cell.id] = float(one.counts["C"]) - shared
    return found


def waits(plan: Plan, own: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """Branch -> the cell that it leaves, and the share of that cell's own work after which it may."""
    cells = {one.cell.id: one for one in plan.cells}
    found = {}
    for cell_id, branch in plan.branches.items():
        trunk = cells[branch.parent]
        until = branch.steps * trunk.cell.batch_tokens * trunk.counts["flops_per_token"]
        before = float(trunk.counts["C"]) - own[branch.parent]
        found[cell_id] = (branch.parent, min(1.0, max(0.0, (until - before) / own[branch.parent])))
    return found


def simulated_nodes(gpus: int, nodes: int, gpu_gib: float | None = None) -> list[Node]:
    """So many equal nodes. InputError where the GPUs cannot be shared evenly among them."""
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise InputError(
            f"{plural(gpus, 'GPU')} cannot be shared evenly among {plural(nodes, 'node')}. Give --gpus as a multiple "
            "of --nodes, both at least 1."
        )
    each = gpus // nodes
    memory = int((gpu_gib or 0) * GIB)
    return [Node(f"node-{i:0{len(str(nodes))}}", CPUS_A_GPU * each, each, memory) for i in range(nodes)]


def workload(
    store: Store,
    plan: Plan,
    nodes: list[Node],
    *,
    device: str | None = None,
    mfu: float | None = None,
    hardware: str | None = None,
) -> Workload:
    """All cells of a plan, as if none were done, as jobs for these nodes.

    `hardware` names a calibration; `device` or `mfu` ask for an assumption though there may be one. Of a search, every
    trial is taken to train its cells in full. Raises InputError for what is not known, or no number.
    """
    cells, trials = list(plan.cells), 1
    notes: tuple[str, ...] = ()
    if plan.study.search is not None:
        cells, trials = first_trials(plan), most_trials(plan.study.search)
        notes = (f"Of {plural(trials, 'trial')}, all are taken to be asked at once, and to train in full.",)
    seconds, times = _seconds(store, plan, cells, device, mfu, hardware)
    gpus = sum(node.gpus for node in nodes)
    crowd = -(-len(cells) * trials // max(1, int(gpus)))
    memory = min((node.gpu_bytes for node in nodes), default=0)
    room: dict[str, Any] = {"gpu_bytes": memory, "gpus_per_node": int(nodes[0].gpus), "crowd": crowd}
    demands = {one.cell.id: demand_of(one, device="cuda", workers=study_workers(plan), **room) for one in cells}
    own = own_flops(plan)
    jobs = [
        Job(
            id=one.cell.id if trials == 1 else f"{one.cell.id}/{trial}",
            demand=demands[one.cell.id],
            seconds=seconds[one.cell.id] / demands[one.cell.id].all_gpus,
            flops=own.get(one.cell.id, float(one.counts["C"])),
        )
        for trial in range(trials)
        for one in cells
    ]
    by_id = {job.id: job for job in jobs}
    edges = {}
    for cell_id, (parent, share) in waits(plan, own).items() if trials == 1 else ():
        edges[cell_id] = Edge(parent=parent, after=share * (by_id[parent].seconds or 0.0))
    if any(demand.all_gpus != 1 for demand in demands.values()):
        notes += ("a share of a GPU is taken to compute that share, and a gang as fast as all its GPUs.",)
    return Workload(jobs, edges, times, notes)


def study_workers(plan: Plan) -> int | None:
    """The processes that a study asks for each of its cells; None where it leaves that to memory."""
    return None if plan.study.workers == "auto" else plan.study.workers


def _seconds(
    store: Store,
    plan: Plan,
    cells: list[PlannedCell],
    device: str | None,
    mfu: float | None,
    hardware: str | None,
) -> tuple[dict[str, float], str]:
    """Seconds by cell id on one GPU, and where they come from."""
    why, searches = "", plan.study.search is not None
    if hardware is not None and (device is not None or mfu is not None or searches):
        other = "a search" if searches else "--device or --mfu"
        raise InputError(f"--hardware: a calibration does not go with {other}, whose times are assumed. Take it out.")
    if device is None and mfu is None and not searches:
        calibration = find_calibration(store, hardware)
        if calibration is not None:
            known, _ = cells_seconds(plan, calibration)
            seconds = {cell_id: value for cell_id, value in known.items() if value is not None}
            if len(seconds) == len(cells):
                return seconds, f"as calibrated on {calibration.kind}, one such worker in each GPU's place"
            why = f" (the calibration on {calibration.kind} does not tell all of them)"
    device, mfu = device or DEVICE, mfu or MFU
    peak = PEAK_BFLOAT16_FLOPS.get(device)
    if peak is None:
        there, near = ", ".join(PEAK_BFLOAT16_FLOPS), nearest(device, PEAK_BFLOAT16_FLOPS)
        raise InputError(f"--device: the peak speed of {device!r} is not known{near}; known are {there}.")
    own = own_flops(plan)
    pace = peak * mfu
    assumed = (
        f"assumed, from FLOPs at {mfu:.0%} of the {peak / 1e12:g} TFLOP/s of one {device} in bfloat16 and "
        f"{AROUND_SECONDS:g} s around each{why}"
    )
    flops = {one.cell.id: own.get(one.cell.id, float(one.counts["C"])) for one in cells}
    return {cell_id: count / pace + AROUND_SECONDS for cell_id, count in flops.items()}, assumed
