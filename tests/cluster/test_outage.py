"""A disk that refuses in the middle of a driver's turn is waited for, whichever call it refuses."""

import errno
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from refusing import RefusingDisk
from searched import CORPUS, end, make_corpus, search_plan

from cluster import claims, driver, outage, tasks
from cluster.claims import Claim
from cluster.driver import Tally, _Run
from cluster.ledger import register
from cluster.outage import Outage
from cluster.placement import Demand, Node
from cluster.searching import Searching
from sweeps import trials
from sweeps.corpora import CorpusInfo
from sweeps.errors import InputError
from sweeps.grids import Plan, plan_study
from sweeps.planned import PlannedCell
from sweeps.records import disk_error
from sweeps.store import Store, attempt_epochs, begin_attempt, cell_state, open_store
from sweeps.study import Study

ONE = Demand(1, 1.0)


class WorkerDied(Exception):
    """What Ray says of the call of a worker that died."""


class QuickRay:
    """Workers that end each cell at once, but for the first attempt, which is the death of its worker."""

    cores, device = 1, "cuda"
    exceptions = SimpleNamespace(RayError=WorkerDied, RayTaskError=WorkerDied)

    def __init__(self, store: Store) -> None:
        self.store, self.cells, self.calls = store, dict[str, PlannedCell](), 0

    def demand(self, _: Any) -> Demand:
        return ONE

    def models(self) -> set[str]:
        return {"H100"}

    def worker(self, _: Any) -> Any:
        return SimpleNamespace(run=SimpleNamespace(options=lambda name: SimpleNamespace(remote=self._give)))

    def _give(self, root: str, ids: list[str], *_: Any) -> tuple[int, bool]:
        first, self.calls = self.calls == 0, self.calls + 1
        work = threading.Thread(target=self._train, args=(ids, first))  # its disk is another
        work.start()
        work.join()
        return self.calls, first

    def _train(self, ids: list[str], dies: bool) -> None:
        for cell_id in ids:
            if dies:
                begin_attempt(self.store, cell_id, {"study": "s"})
            else:
                end(self.store, self.cells[cell_id])

    def wait(self, handles: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return handles, []

    def get(self, handle: tuple[int, bool]) -> None:
        if handle[1]:
            raise WorkerDied("it is gone")

    def keep(self, _: Any) -> None: ...

    def give_back(self, **_: Any) -> None: ...


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look in every turn, and no waits."""
    monkeypatch.setattr(driver, "local_gpus", tuple)
    monkeypatch.setattr(tasks, "death", lambda *_: ("infrastructure", "the worker died"))
    monkeypatch.setattr(trials, "_LOCK_SECONDS", 0.01)  # of a lock that the disk did not take away
    for place, name in ((tasks, "POLL_SECONDS"), (driver, "LOOK_SECONDS"), (claims, "AGAIN_SECONDS")):
        monkeypatch.setattr(place, name, 0.0)


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusInfo:
    return make_corpus(tmp_path)


def branching_plan(corpus: CorpusInfo) -> Plan:
    """A trunk, and the cell that branches off it."""
    declared = {
        "name": "s",
        "corpus": CORPUS,
        "context": 32,
        "families": ["llama"],
        "grid": {"type": "points", "points": [{"size": 10_000, "tokens": tokens} for tokens in (20_000, 40_000)]},
        "training": {"batch_tokens": 64, "warmup_tokens": 2_000, "schedule": "wsd"},
    }
    plan = plan_study(Study.model_validate(declared), corpus)
    assert len(plan.branches) == 1
    return plan


def run_of(store: Store, claim: Claim, plan: Plan) -> tuple[_Run, QuickRay]:
    search, ray = Searching(store, plan), QuickRay(store)
    search.grow(0)
    register(store, search.plan, b"")
    mirror = SimpleNamespace(fault=None, link=None)
    run = _Run(store, search, mirror, claim, Tally(), lambda _: None, None, 60.0, 3, 1)  # type: ignore[arg-type]
    run.standing.elsewhere = {one.cell.id: one for one in search.plan.cells}
    run.fleet.add(Node("n", 16, 8))
    run.pool, run.demand, run.slots = ray, ONE, 1  # type: ignore[assignment]
    run._predict()
    run.began = time.monotonic()
    start = run.tasks.start

    def know(pool: Any, unit: Any, threads: int) -> None:
        ray.cells |= {one.cell.id: one for one in unit.cells}
        start(pool, unit, threads)

    run.tasks.start = know  # type: ignore[method-assign]
    return run, ray


def work(root: Path, plan: Plan, disk: RefusingDisk, refused: Any) -> tuple[Any, ...]:
    """Run a study in a store of its own while the disk refuses some calls; how all stands after it."""
    store = open_store(root)
    disk.folder = str(root)
    with Claim(store, "s") as claim:
        run, ray = run_of(store, claim, plan)
        disk.calls, disk.refused = 0, refused
        run._work(ray)
        disk.refused = lambda _: False
    tally, ids = run.tally, [one.cell.id for one in run.plan.cells]
    states = sorted((cell_state(store, one).state, len(attempt_epochs(store, one))) for one in ids)
    counts = [tally.finished, tally.diverged, tally.failed, tally.skipped, tally.stopped]
    return states, counts, run.schedule.running, run.tasks.by_call, run.schedule.spent_flops, ray.calls, len(run.queue)


@pytest.mark.filterwarnings("ignore:The value of `grace_period`")
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("searches", [False, True])
def test_a_run_that_the_disk_refuses_any_one_call_ends_as_an_undisturbed_one(
    searches: bool, step: int, corpus: CorpusInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = search_plan(corpus, trials=2) if searches else branching_plan(corpus)
    disk = RefusingDisk(monkeypatch)
    expected = work(tmp_path / "undisturbed", plan, disk, lambda _: False)
    assert expected[0] == [("finished", 1), ("finished", 2)]
    assert disk.calls > 50
    for number in range(1, disk.calls + 1, step):
        found = work(tmp_path / str(number), plan, disk, lambda call, one=number: call == one)
        assert found == expected, f"call {number}: {disk.last}"


def test_a_disk_that_goes_on_refusing_ends_a_run_in_words(
    corpus: CorpusInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "SILENCE_SECONDS", 0.2)
    disk = RefusingDisk(monkeypatch)
    disk.only = "cells"
    with pytest.raises(InputError, match=r"refuses again and again \(.*Stale file handle.*run the study again"):
        work(tmp_path / "store", branching_plan(corpus), disk, lambda call: call > 3)


def test_what_the_disk_broke_off_is_told_once_it_is_over_and_only_a_full_disk_is_not_waited_for() -> None:
    told: list[float] = []
    part = Outage(told.append)
    for _ in range(2):
        with part:
            raise disk_error(Path("x"), OSError(errno.EIO, "Input/output error")) from OSError(errno.EIO, "the same")
    with part:
        pass
    with part:
        pass
    assert len(told) == 1
    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (full, InputError("no such column"), TimeoutError("of Ray, and no disk's")):
        with pytest.raises(type(error)), part:
            raise error
    with pytest.raises(InputError, match="the disk is full"), part:
        raise disk_error(Path("x"), full) from full
