"""What workers have in hands, from the unit that is given to its end, without Ray."""

import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from alone import run_of
from searched import end

from cluster import driver, tasks
from cluster.claims import Claim
from cluster.hands import take_up
from cluster.outage import Outage
from cluster.placement import Node
from cluster.pool import Pool
from cluster.tasks import Task
from sweeps.grids import Plan
from sweeps.store import Store, begin_attempt, record_error

RAY: Any = SimpleNamespace(get=lambda _: None, exceptions=SimpleNamespace(RayError=RuntimeError))
"""Its calls are done, and well."""


@pytest.mark.parametrize("dead", [False, True], ids=["well", "its call raised"])
def test_a_worker_whose_end_the_disk_broke_off_is_idle_when_that_is_settled_and_gets_nothing_before(
    dead: bool, store: Store, claim: Claim, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    class RayTaskError(Exception): ...

    def get(_: Any) -> None:
        if dead:
            raise RayTaskError("a bug")

    errors = SimpleNamespace(RayError=RayTaskError, RayTaskError=RayTaskError)
    monkeypatch.setattr("cluster.pool.cluster_nodes", lambda *_, **__: [Node("n", 4)])
    monkeypatch.setattr("cluster.pool.make_worker", lambda *_: object())
    monkeypatch.setattr(tasks, "death", lambda *_: ("code", "a bug"))
    refused, kept_tokens = [True], tasks.kept_tokens

    def refuse_once(*given: Any) -> int:
        if refused and refused.pop():
            raise OSError(errno.ESTALE, "Stale file handle")
        return kept_tokens(*given)

    monkeypatch.setattr(tasks, "kept_tokens", refuse_once)
    run = run_of(store, claim, make_plan(20_000, 30_000))
    run.pool = Pool(RAY, run.fleet, 2, None, False)
    run.standing.sort_elsewhere()
    unit = run.queue.take(0.0, "cpu")
    assert unit is not None
    worker = run.pool.worker(unit.start.place)
    run.tasks.by_call["call"] = Task(worker, take_up(store, "s", unit.cells)[0], unit.start)
    end(store, unit.cells[0])
    ray = SimpleNamespace(get=get, exceptions=errors)
    with Outage(lambda _: None):
        run.tasks.finish(ray, run.pool, "call")
    assert list(run.tasks.by_call) == ["call"], "it is done again"
    other = run.queue.take(0.0, "cpu")
    assert other is not None
    second = run.pool.worker(other.start.place)
    assert second is not worker
    run.tasks.finish(ray, run.pool, "call")
    assert [one.worker for one in run.pool._kept if one.idle_since is not None] == [worker]


def test_a_run_that_is_stopped_while_a_unit_is_given_to_a_worker_counts_its_cells_as_planned(
    store: Store, claim: Claim, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the command would end with exit code 0, as that of a study which is complete."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    run = run_of(store, claim, make_plan(20_000, 30_000))
    ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=RuntimeError))
    own = SimpleNamespace(look=lambda: None, died=lambda: None, end=lambda: None)
    for name, value in (("start_ray", ray), ("stop_ray", None), ("OwnRay", own)):
        monkeypatch.setattr(driver, name, lambda *_, given=value: given)
    monkeypatch.setattr(run, "_meet_cluster", lambda *_: None)
    run.pool.warm = lambda _: None  # type: ignore[method-assign]
    run.mirror.connect = run.mirror.start = lambda: None  # type: ignore[method-assign]
    monkeypatch.setattr(run.tasks, "start", stopped)
    run.run("local")
    assert (run.tally.stopped, run.tally.planned) == ("interrupted", 2)


def test_a_frozen_worker_is_killed_by_the_attempt_that_is_its_own(
    store: Store, claim: Claim, other: Claim, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cell of its unit it left to another study, which was quicker."""
    plan = make_plan(20_000, 30_000)
    hands, _ = take_up(store, "s", list(plan.cells))
    begin_attempt(store, hands[0].one.cell.id, {"study": "other", "driver": other.number})
    own = begin_attempt(store, hands[1].one.cell.id, {"study": "s", "driver": claim.number})
    killed = list[Any]()
    monkeypatch.setattr(tasks, "kill_worker", killed.append)
    Task("worker", hands, None).kill(SimpleNamespace(kill=killed.append), "it is silent")  # type: ignore[arg-type]
    assert killed == ["worker", own]


@pytest.mark.parametrize(
    ("programs", "quicker", "over"), [(2, False, False), (3, True, True)], ids=["two programs", "three programs"]
)
def test_a_program_is_one_failure_whichever_of_its_cells_tells_of_it(
    programs: int,
    quicker: bool,
    over: bool,
    store: Store,
    claim: Claim,
    other: Claim,
    make_plan: Callable[..., Plan],
) -> None:
    """`quicker`: the first cell of each is left to another study, and tells of no failure."""
    plan = make_plan(*range(20_000, 20_000 + 2_000 * programs, 1_000))
    run = run_of(store, claim, plan)
    run.standing.sort_elsewhere()
    for number in range(programs):
        unit = run.queue.take(0.0, "cpu")
        assert unit is not None
        hands, _ = take_up(store, "s", list(plan.cells[2 * number : 2 * number + 2]))
        run.tasks.by_call[number] = Task(None, hands, unit.start)
        for hand in hands:
            if quicker and hand is hands[0]:
                begin_attempt(store, hand.one.cell.id, {"study": "other", "driver": other.number})
            else:
                record_error(begin_attempt(store, hand.one.cell.id, {"study": "s"}), "code", "it is on fire")
    run.pool.keep = lambda _: None  # type: ignore[method-assign]
    for number in range(programs):
        run.tasks.finish(RAY, run.pool, number)
    assert (run.standing.halt is not None) == over
