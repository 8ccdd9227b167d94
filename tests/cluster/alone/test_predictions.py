"""The driver without Ray: the time that cells are predicted to take on the pool's workers, and what goes by it."""

import time
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import pytest
from alone import GANG, H100, HOUR, ONE, QUARTER, calibrate, run_of
from searched import end, search_plan

from cluster import ledger, pool
from cluster.calibration import pool_calibration
from cluster.claims import Claim
from cluster.hardware import kind_of, processor
from cluster.placement import Demand, Fleet, Node
from cluster.queue import Queue
from cluster.scheduling import Bounds, Job, Schedule
from cluster.simulation import simulate
from sweeps.corpora import CorpusInfo
from sweeps.grids import Plan, examples
from sweeps.planned import PlannedCell
from sweeps.store import Store, read_plan


def test_the_trials_of_a_search_keep_a_budget_of_gpu_hours_by_their_predicted_times(
    store: Store, claim: Claim, corpus: CorpusInfo
) -> None:
    plan = search_plan(corpus)
    calibrate(store, examples(plan)[0].cell, H100, HOUR)
    run = run_of(store, claim, plan, ONE, gpu_hours=1.5)
    run._grow()
    assert len(run.queue) > 1
    assert run.queue.take(0.0, "cuda") is not None
    assert run.queue.take(0.0, "cuda") is None, "a second one would come to two GPU-hours"
    told = [entry["seconds_predicted"] for entry in read_plan(store, "s")["cells"]]
    assert told == [pytest.approx(HOUR, abs=1.0)] * len(run.plan.cells)
    for one in run.plan.cells[:1]:
        end(store, one)
    again = run_of(store, claim, plan, ONE)
    again._grow()
    assert all("seconds_predicted" in entry for entry in read_plan(store, "s")["cells"]), "later growth erases none"


def test_a_gang_is_predicted_to_take_its_gpus_for_its_part_of_the_time_and_a_share_for_all_of_it(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(40_000)
    for demand, hours in ((GANG, 1.0), (ONE, 1.0), (QUARTER, 0.25)):
        for budget, begins in ((1.01 * hours, True), (0.99 * hours, False)):
            schedule = Schedule(Fleet([Node("n", 16, 8)]), Bounds(gpu_hours=budget))
            queue = Queue(store, plan, schedule, lambda _, d=demand: d, {plan.cells[0].cell.id: HOUR})  # type: ignore[misc]
            queue.put(plan.cells[0])
            assert (queue.take(0.0, "cuda") is not None) is begins, (demand, budget)


def test_cells_on_gpus_are_not_predicted_from_the_processor_of_the_drivers_machine(
    store: Store, claim: Claim, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(40_000)
    cell = plan.cells[0].cell
    calibrate(store, cell, processor(), 100 * HOUR, kind_of(processor(), threads=1))

    def seconds(demand: Demand, models: Collection[str] = ()) -> list[float | None]:
        run = run_of(store, claim, plan, demand, models)
        run.standing.sort_elsewhere()
        (job,) = run.schedule.waiting()
        (entry,) = read_plan(store, "s")["cells"]
        assert entry.get("seconds_predicted") == job.seconds, "what is on record is what is gone by"
        return [job.seconds and round(job.seconds / HOUR)]

    assert seconds(Demand()) == [100]
    assert seconds(ONE, {"H100"}) == [None]
    calibrate(store, cell, H100, 2 * HOUR)
    assert seconds(ONE, {"H100"}) == [2]
    assert seconds(ONE, {H100}) == [2], "by its full name"
    assert seconds(Demand()) == [100]
    for others in ({"A100"}, {"H100", "A100"}, {""}, set()):
        assert seconds(ONE, others) == [None], others


def test_a_run_says_nothing_new_of_cells_that_have_ended_whatever_else_is_calibrated(
    store: Store, claim: Claim, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(40_000, 50_000)
    done, left = plan.cells
    written: list[dict[str, float]] = []
    write = ledger._write_plan

    def note(*given: Any) -> None:
        write(*given)
        written.append({entry["id"]: entry["seconds_predicted"] for entry in read_plan(store, "s")["cells"]})

    monkeypatch.setattr(ledger, "_write_plan", note)
    calibrate(store, done.cell, processor(), 100 * HOUR, kind_of(processor(), threads=1))
    calibrate(store, done.cell, H100, 2 * HOUR)
    run_of(store, claim, plan, ONE)
    first = written[-1]
    assert first == {one.cell.id: pytest.approx(2 * HOUR, abs=1.0) for one in plan.cells}
    end(store, done)
    written.clear()
    run_of(store, claim, plan, ONE)
    assert written == [first], "the plan is written once, as it was"
    run_of(store, claim, plan)
    assert written[-1][done.cell.id] == first[done.cell.id], "it has trained there"
    assert written[-1][left.cell.id] == pytest.approx(100 * HOUR, abs=1.0)


def test_a_budget_of_gpu_hours_without_predictions_is_said_to_be_of_what_was_used(
    store: Store, claim: Claim, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(40_000)
    run = run_of(store, claim, plan, ONE, gpu_hours=5.0)
    assert [one for one in run.notes if "may go beyond it. `escala calibrate` measures it" in one]
    calibrate(store, plan.cells[0].cell, H100, HOUR)
    assert not run_of(store, claim, plan, ONE, gpu_hours=5.0).notes


def test_a_run_that_ends_before_it_could_begin_anything_tells_its_notes_all_the_same(
    store: Store, claim: Claim, make_plan: Callable[..., Plan]
) -> None:
    said: list[str] = []
    run = run_of(store, claim, make_plan(40_000), ONE, gpu_hours=5.0)
    run.watch = lambda progress: said.extend(progress.notes)
    run.schedule.spent_gpu_seconds, run.began = 6.0 * HOUR, time.monotonic()
    run._work(None)
    assert run.tally.stopped is not None
    assert run.tally.stopped.startswith("out of budget")
    assert [one for one in said if "no calibration tells how long cells take" in one]


def test_a_pool_knows_its_gpus_by_the_names_that_ray_has_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node("a", 8, 8), Node("b", 8, 8), Node("head", 8)]
    monkeypatch.setattr(pool, "cluster_nodes", lambda *_, **__: nodes)
    resources = {"a": {"GPU": 8.0, "accelerator_type:H100": 1.0}, "b": {"GPU": 8.0}, "head": {"CPU": 8.0}}
    there = [{"NodeID": name, "Alive": True, "Resources": told} for name, told in resources.items()]
    there.append({"NodeID": "gone", "Alive": False, "Resources": {}})
    ray = SimpleNamespace(nodes=lambda: there)
    made = pool.Pool(ray, Fleet(), 1, 1, False)
    assert made.models() == {"H100", ""}
    resources["b"]["accelerator_type:H100"] = 1.0
    assert made.models() == {"H100"}


def test_where_two_calibrations_may_be_meant_by_the_name_of_a_gpu_none_is_taken(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    cell = make_plan(40_000).cells[0].cell
    calibrate(store, cell, H100, 1.0)
    assert pool_calibration(store, "cuda", ()) is None, "nor the only one, by no name at all"
    calibrate(store, cell, "NVIDIA H100 PCIe", 2.0)
    assert pool_calibration(store, "cuda", {"H100"}) is None
    found = pool_calibration(store, "cuda", {"NVIDIA H100 PCIe"})
    assert found is not None
    assert found.device == "NVIDIA H100 PCIe"


def test_cells_that_wait_by_their_seconds_are_put_anew_where_others_come_that_have_none(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    few, grown = make_plan(20_000, 30_000), make_plan(20_000, 30_000, 10_000)
    short, middle, long = sorted(grown.cells, key=lambda one: one.cell.tokens)
    seconds = {middle.cell.id: 9.0, long.cell.id: 8.0}
    asked: list[str] = []

    def demand(one: PlannedCell) -> Demand:
        asked.append(one.cell.id)
        return ONE

    queue = Queue(store, few, Schedule(Fleet([Node("n", 16, 8)])), demand, seconds)
    for one in few.cells:
        queue.put(one)
    queue.extend(grown, grown.cells[len(few.cells) :], seconds)
    queue.put(short)
    taken = []
    while (unit := queue.take(0.0, "cuda")) is not None:
        taken += unit.cells
    assert taken == [long, middle, short], "all by their FLOPs"
    assert sorted(asked) == sorted(one.cell.id for one in grown.cells), "each what it asks for once"


def test_a_gang_waits_for_its_turn_by_its_own_time_as_in_a_simulation(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(20_000, 30_000)
    alone, parted = plan.cells
    seconds = {alone.cell.id: 1000.0, parted.cell.id: 8 * 200.0}
    demands = {alone.cell.id: ONE, parted.cell.id: GANG}
    nodes = [Node("n", 16, 8)]
    queue = Queue(store, plan, Schedule(Fleet(nodes)), lambda one: demands[one.cell.id], seconds)
    for one in plan.cells:
        queue.put(one)
    unit = queue.take(0.0, "cuda")
    assert unit is not None
    jobs = [Job(id=name, demand=demands[name], seconds=seconds[name] / demands[name].all_gpus) for name in seconds]
    first = min(simulate(jobs, nodes).turns, key=lambda turn: turn.start)
    assert [one.cell.id for one in unit.cells] == [first.id] == [alone.cell.id]
