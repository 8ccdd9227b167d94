"""The driver without Ray: a run of a study that has met a cluster, and no worker but what the test says."""

import time
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from cluster.calibration import Calibration, _to_json
from cluster.claims import Claim
from cluster.driver import Tally, _Run
from cluster.ledger import register
from cluster.placement import Demand, Node
from cluster.scheduling import Bounds
from cluster.searching import Searching
from sweeps.cell import Cell
from sweeps.grids import Plan
from sweeps.records import write_json
from sweeps.store import Store, cell_state
from sweeps.timing import Costs, forward_features, step_features

HOUR = 3600.0
ONE, GANG, QUARTER = Demand(1, 1.0), Demand(8, 1.0), Demand(1, 0.25)
H100 = "NVIDIA H100 80GB HBM3"


class StubPool:
    """Room of which every cell takes the same."""

    def __init__(self, demand: Demand, models: Collection[str]) -> None:
        self._demand, self._models = demand, set(models)
        self.device = "cuda" if demand.gpus else "cpu"

    def demand(self, _: Any) -> Demand:
        return self._demand

    def models(self) -> set[str]:
        return self._models


def run_of(
    store: Store,
    claim: Claim,
    plan: Plan,
    demand: Demand = Demand(),
    models: Collection[str] = ("H100",),
    gpu_hours: float | None = None,
    tally: Tally | None = None,
    workers: int | None = None,
) -> _Run:
    """A run that has met a cluster of one node with eight GPUs."""
    search = Searching(store, plan)
    search.grow(0)
    register(store, search.plan, b"")
    mirror = SimpleNamespace(fault=None, link=None)
    missing = [one for one in search.plan.cells if cell_state(store, one.cell.id).state in ("planned", "running")]
    tally = tally or Tally()
    run = _Run(store, search, mirror, claim, tally, lambda _: None, None, 60.0, 3, workers)  # type: ignore[arg-type]
    run.standing.elsewhere = {one.cell.id: one for one in missing}
    run.schedule.bounds = Bounds(units=workers, gpu_hours=gpu_hours)
    run.fleet.add(Node("n", 16, 8))
    run.pool, run.demand, run.slots = StubPool(demand, models), demand, 1  # type: ignore[assignment]
    run._predict()
    return run


def turn(run: _Run) -> None:
    """A turn of the driver's loop in which no worker is asked: what others have taken is all that is there."""
    run._look()
    run._grow()
    while (unit := run.queue.take(time.monotonic(), "cpu")) is not None:
        run.tasks.start(run.pool, unit, 1)


def calibrate(store: Store, cell: Cell, device: str, seconds: float, kind: str | None = None) -> None:
    """By this calibration every cell takes so long on one worker of a kind."""
    steps = len(step_features(cell.shape, cell.sequences, cell.sequences))
    forwards = len(forward_features(cell.shape, 1))
    costs = Costs(step=(0.0,) * steps, forward=(0.0,) * forwards, window=0.0, build=seconds, largest=1e30)
    kind = kind or device.lower().replace(" ", "-")
    made = Calibration(
        kind=kind,
        device=device,
        points=(),
        costs={f"{cell.family} {cell.precision}": costs},
        workers=1,
        host="h",
        versions={},
        measured="2026-01-01T00:00:00Z",
    )
    write_json(store.root / "hardware" / f"{kind}.json", _to_json(made))
