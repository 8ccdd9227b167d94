"""What a worker is given: stacks of cells that train together, and branches only once their trunk has come so far."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import driver, tasks
from cluster.driver import run_study
from cluster.placement import Demand, Fleet, Node
from cluster.progress import Progress
from cluster.queue import Queue, Unit
from cluster.scheduling import Schedule
from sweeps.corpora import make_source, prepare
from sweeps.grids import Plan, plan_study
from sweeps.records import read_json
from sweeps.stacks import note_gain
from sweeps.store import Store, begin_attempt, cell_state, open_store, read_end, record_error
from sweeps.study import Study

SOURCE = {"source": "markov", "options": {"tokens": 60_000, "vocab_size": 16, "seed": 1}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def make_plan(store: Store) -> Callable[..., Plan]:
    corpus = prepare(make_source("markov", None, SOURCE["options"]), "bytes", store.root)

    def make(**changes: Any) -> Plan:
        declared: dict[str, Any] = {
            "name": "s",
            "corpus": SOURCE,
            "context": 32,
            "families": ["llama"],
            "grid": {"type": "points", "points": [{"size": 10_000, "tokens": 256 * steps} for steps in (20, 60)]},
            "training": {"batch_tokens": 256, "learning_rate": 0.01, "schedule": "wsd", "warmup_tokens": 1024},
            "seeds": [0, 1, 2],
        }
        return plan_study(Study.model_validate(declared | changes), corpus)

    return make


def take(queue: Queue) -> Unit | None:
    """The next unit, which ends at once: all workers are free again."""
    unit = queue.take(0.0, "cpu")
    if unit is not None:
        queue.schedule.end(unit.start)
    return unit


def lengths(unit: Unit | None) -> list[int]:
    return [one.cell.steps for one in unit.cells] if unit is not None else []


def queue_of(store: Store, plan: Plan, cpus: int) -> Queue:
    queue = Queue(store, plan, Schedule(Fleet([Node("here", cpus)])), lambda _: Demand())
    for one in sorted(plan.cells, key=lambda one: -one.cell.tokens):
        queue.put(one)
    return queue


def test_a_branch_waits_for_its_trunks_checkpoint(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(seeds=[0], stack="off")
    queue = queue_of(store, plan, 2)
    assert lengths(take(queue)) == [60]
    queue.look()
    assert take(queue) is None
    assert len(queue) == 1
    trunk = max(plan.cells, key=lambda one: one.cell.tokens).cell
    begin_attempt(store, trunk.id, {})
    (store.checkpoints(trunk.id, 0) / str(16 * 256)).mkdir(parents=True)
    queue.look()
    assert lengths(take(queue)) == [20]


def test_a_branch_whose_trunk_has_failed_trains_by_itself(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(seeds=[0], stack="off")
    queue = queue_of(store, plan, 2)
    trunk = max(plan.cells, key=lambda one: one.cell.tokens)
    assert lengths(take(queue)) == [60]
    record_error(begin_attempt(store, trunk.cell.id, {}), "code", "broken")
    assert cell_state(store, trunk.cell.id).state == "failed"
    queue.look()
    assert lengths(take(queue)) == [20]


def test_equal_shaped_cells_are_taken_together_as_many_as_asked(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(stack=2, training={"batch_tokens": 256, "schedule": "cosine"})
    queue = queue_of(store, plan, 1)
    assert [lengths(take(queue)) for _ in range(4)] == [[60, 60], [60], [20, 20], [20]]
    assert take(queue) is None


def test_what_a_probe_found_not_to_pay_is_not_stacked(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(training={"batch_tokens": 256, "schedule": "cosine"})
    queue = queue_of(store, plan, 1)
    note_gain(store, plan.cells[0].cell, 3, "cpu", 0.9)
    assert lengths(take(queue)) == [60]
    assert lengths(take(queue)) == [60, 60], "two may pay where three did not"


def test_a_cell_that_ran_out_of_memory_trains_alone(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(stack=3, training={"batch_tokens": 256, "schedule": "cosine"})
    large = plan.cells[0].cell
    record_error(begin_attempt(store, large.id, {}), "out_of_memory", "too much")
    queue = queue_of(store, plan, 1)
    units = [take(queue) for _ in range(3)]
    assert [large.id] in [[one.cell.id for one in unit.cells] for unit in units if unit is not None]


def test_a_stack_that_is_smaller_for_one_too_large_is_looked_up_as_it_is(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(training={"batch_tokens": 256, "schedule": "cosine"})
    large, other = [one.cell for one in plan.cells if one.cell.steps == 60][:2]
    record_error(begin_attempt(store, large.id, {}), "out_of_memory", "too much")
    note_gain(store, other, 2, "cpu", 0.9)
    queue = queue_of(store, plan, 1)
    assert [lengths(take(queue)) for _ in range(3)] == [[60], [60], [60]]


@pytest.mark.slow
def test_stacks_of_trunks_and_branches_survive_a_killed_worker(
    store: Store, make_plan: Callable[..., Plan], ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(driver, "LOOK_SECONDS", 0.2)
    points = [{"size": 10_000, "tokens": 256 * steps} for steps in (100, 1_600)]  # the kill hits the last 1,400
    plan = make_plan(stack=3, corpus=SOURCE | {"repeat": True}, grid={"type": "points", "points": points})
    killed: list[int] = []

    def watch(progress: Progress) -> None:
        begun = [one for one in progress.running if one.tokens > 256 * 200]
        if begun and not killed:
            killed.append(read_json(store.attempt(begun[0].cell_id, 0) / "attempt.json")["pid"])
            os.kill(killed[0], signal.SIGKILL)

    tally = run_study(store, plan, b"", watch=watch, address=ray_address, workers=1, checkpoint_seconds=0.2)
    assert killed
    assert (tally.finished, tally.failed, tally.stopped) == (6, {}, None)
    trunks = {one.cell.seed: one.cell.id for one in plan.cells if one.cell.steps == 1_600}
    for one in plan.cells:
        result = cell_state(store, one.cell.id).result
        assert result is not None
        assert result["numerics"]["stack"] == 3
        if one.cell.steps == 100:
            assert result["trunk"] == {"cell": trunks[one.cell.seed], "tokens": 80 * 256}
            assert result["flops_spent"] == pytest.approx(0.2 * result["flops"])
        else:
            end = read_end(store, one.cell.id, 0)
            assert end is not None
            assert end[0] == "infrastructure"
            assert read_json(store.attempt(one.cell.id, 1) / "heartbeat.json")["resumed_from"] > 0
