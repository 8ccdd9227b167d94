"""The policy: what starts next. Longest chain first, backfill that delays nobody, limits and budgets kept."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import Demand, Fleet, Node
from cluster.scheduling import Bounds, Job, Schedule, Start, chains
from sweeps.errors import InputError

ONE, TWO, EIGHT, QUARTER = Demand(1, 1.0), Demand(2, 1.0), Demand(8, 1.0), Demand(1, 0.25)


def job(name: str, demand: Demand = ONE, seconds: float | None = 10.0, **more: float) -> Job:
    return Job(id=name, demand=demand, seconds=seconds, chain=more.pop("chain", seconds or 0.0), **more)


def schedule(*gpus: int, **bounds: float) -> Schedule:
    fleet = Fleet(Node(str(i), 64, count) for i, count in enumerate(gpus))
    return Schedule(fleet, Bounds(**bounds))  # type: ignore[arg-type]


def fill(made: Schedule, now: float = 0.0) -> list[str]:
    """Start all that starts now."""
    started = []
    while (start := made.take(now)) is not None:
        started += [one.id for one in start.jobs]
    return started


def running(made: Schedule, name: str) -> Start:
    return next(start for start in made.running.values() if start.jobs[0].id == name)


def test_the_longest_chain_goes_first_and_equals_in_the_order_in_which_they_came() -> None:
    made = schedule(3)
    for one in (job("short"), job("trunk", seconds=5.0, chain=100.0), job("also short"), job("long", seconds=20.0)):
        made.put(one)
    assert fill(made) == ["trunk", "long", "short"]


def test_what_is_put_first_goes_before_longer_ones() -> None:
    made = schedule(1)
    made.put(job("long", seconds=50.0))
    made.put(job("again"), first=True)
    assert fill(made) == ["again"]


def test_what_is_held_waits_until_it_is_released() -> None:
    made = schedule(2)
    made.put(job("branch", seconds=90.0), held=True)
    made.put(job("trunk"))
    assert fill(made) == ["trunk"]
    assert len(made) == 1
    made.release("branch")
    made.release("trunk")  # no longer there
    assert fill(made) == ["branch"]


def test_what_waits_can_be_taken_out() -> None:
    made = schedule(1)
    made.put(job("a"))
    made.put(job("b"), held=True)
    assert [made.remove(name).id for name in ("a", "b")] == ["a", "b"]
    assert (len(made), fill(made)) == (0, [])
    with pytest.raises(KeyError):
        made.remove("a")


# --- backfill ----------------------------------------------------------------------------------------------------


def test_backfill_does_not_delay_a_gang_by_the_estimates() -> None:
    made = schedule(8)
    made.put(job("running", seconds=30.0))
    assert fill(made) == ["running"]
    for one in (job("gang", EIGHT, seconds=100.0), job("long", seconds=31.0), job("fits", seconds=30.0)):
        made.put(one)
    made.put(job("short", seconds=5.0))
    assert fill(made) == ["fits", "short"], "it could not start before 30 s anyway; `long` would end after them"
    made.end(running(made, "short"), 5.0)
    assert fill(made, 5.0) == []
    for name in ("running", "fits"):
        made.end(running(made, name), 30.0)
    assert fill(made, 30.0) == ["gang"]


def test_a_stack_that_begins_in_a_gangs_room_ends_before_its_turn() -> None:
    made = schedule(8)
    made.put(job("running", seconds=30.0))
    assert fill(made) == ["running"]
    made.put(job("gang", EIGHT, seconds=100.0))
    for name in ("a", "b", "c", "d"):
        made.put(job(name, seconds=12.0))
    start = made.take()
    assert start is not None
    assert made.admits(start, ["b", "c", "d"], 0.0) == 1, "three in a row may take 36 s"
    made.join(start, ["b"])
    assert start.place.until == 24.0


def test_a_stack_keeps_its_room_for_as_long_as_all_its_cells_may_take() -> None:
    made = schedule(2)
    for name in ("a", "b", "c"):
        made.put(job(name, seconds=30.0))
    start = made.take()
    assert start is not None
    assert made.admits(start, ["b", "c"], 0.0) == 2
    made.join(start, ["b", "c"])
    made.put(job("gang", TWO, seconds=100.0))
    made.put(job("long", seconds=80.0))
    assert fill(made) == ["long"], "the gang has no room before 90 s"


def test_a_gang_that_waits_leaves_the_other_nodes_to_everyone() -> None:
    made = schedule(8, 8)
    made.put(job("a", Demand(5, 1.0), seconds=10.0))
    made.put(job("b", Demand(5, 1.0), seconds=90.0))
    assert fill(made) == ["b", "a"]
    made.put(job("gang", EIGHT, seconds=500.0))
    for i in range(6):
        made.put(job(f"long {i}", seconds=200.0))
    assert len(fill(made)) == 3, "the gang has the node of `a`, three GPUs are left beside `b`"
    assert all(start.place.node == running(made, "b").place.node for start in list(made.running.values())[2:])
    made.end(running(made, "a"), 10.0)
    assert fill(made, 10.0) == ["gang"]


def test_without_estimates_a_node_drains_for_a_gang_and_the_rest_goes_on() -> None:
    made = schedule(8, 8)
    for i in range(16):
        made.put(job(f"one {i}", seconds=None))
    assert len(fill(made)) == 16
    made.put(job("gang", EIGHT, seconds=None, chain=5.0))
    for i in range(100):
        made.put(job(f"more {i}", seconds=None))
    now, ended = 0.0, 0
    while "gang" not in {start.jobs[0].id for start in made.running.values()}:
        now += 1.0
        made.end(list(made.running.values())[-(ended % 2)], now)  # by turns the oldest and the youngest
        ended += 1
        fill(made, now)
        assert ended <= 16, "the node on which the first one ended drains"
    assert len(made.running) == 9, "all GPUs of the other one are at work"


def test_what_is_known_to_be_short_does_not_start_where_a_node_drains_for_a_gang() -> None:
    made = schedule(8)
    made.put(job("of unknown length", seconds=None))
    assert fill(made) == ["of unknown length"]
    made.put(job("gang", EIGHT, seconds=90.0))
    made.put(job("short", seconds=1.0))
    assert fill(made) == []


def test_a_share_may_use_what_is_left_of_a_broken_gpu_beside_what_is_kept() -> None:
    made = schedule(2)
    made.put(job("share", QUARTER, seconds=50.0))
    made.put(job("whole", seconds=90.0))
    assert sorted(fill(made)) == ["share", "whole"]
    made.put(job("next whole", seconds=80.0))
    made.put(job("long share", QUARTER, seconds=70.0))
    made.put(job("short share", QUARTER, seconds=40.0))
    assert fill(made) == ["short share"], "the GPU of the first share is the next whole one's at 50 s"


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([QUARTER, ONE, TWO]), st.floats(1, 50)), max_size=60),
    st.booleans(),
    st.lists(st.integers(0, 1000), min_size=400, max_size=400),
)
def test_a_gang_starts_in_finite_time_whatever_else_arrives_and_however_wrong_the_estimates_are(
    small: list[tuple[Demand, float]], estimated: bool, luck: list[int]
) -> None:
    made = schedule(8, 4)
    for i, (demand, seconds) in enumerate(small):
        made.put(job(f"first {i}", demand, seconds if estimated else None))
    fill(made)
    made.put(job("gang", EIGHT, 10.0 if estimated else None, chain=1000.0))
    for step, number in enumerate(luck):  # one ends, at random, and one more comes
        fill(made, float(step))
        if any(start.jobs[0].id == "gang" for start in made.running.values()):
            return
        ends = list(made.running.values())
        made.end(ends[number % len(ends)], float(step))
        made.put(job(f"more {step}", [QUARTER, ONE, TWO][number % 3], number / 20 if estimated else None))
    raise AssertionError("the gang never started")


# --- limits and budgets ------------------------------------------------------------------------------------------


def test_limits_at_once_are_kept_and_a_gang_is_not_starved_by_that_on_gpus() -> None:
    made = schedule(8, 8, gpus=8)
    for i in range(4):
        made.put(job(f"one {i}", seconds=20.0 + i))
    assert len(fill(made)) == 4
    made.put(job("gang", EIGHT, seconds=90.0))
    made.put(job("long", seconds=60.0))
    made.put(job("short", seconds=23.0))
    assert fill(made) == ["short"], "it ends when the limit lets the gang start"
    for start in list(made.running.values()):
        made.end(start, 23.0)
    assert fill(made, 23.0) == ["gang"]


@given(st.lists(st.tuples(st.sampled_from([QUARTER, ONE, TWO, EIGHT]), st.floats(0, 10)), max_size=40), st.data())
def test_limits_and_budgets_hold_whatever_comes_and_goes(
    arrivals: list[tuple[Demand, float]], data: st.DataObject
) -> None:
    bounds = Bounds(units=5, cells=4, gpus=10.0, flops=100.0, gpu_hours=0.01)
    made = Schedule(Fleet([Node("a", 64, 8), Node("b", 64, 8)]), bounds)
    for i, (demand, size) in enumerate(arrivals):
        made.put(job(str(i), demand, seconds=size, flops=size))
    now = 0.0
    while made.running or fill(made, now):
        fill(made, now)
        starts = list(made.running.values())
        flops = made.spent_flops + sum(one.flops for start in starts for one in start.jobs)
        used = made.spent_gpu_seconds + sum(start.gpu_seconds(now) for start in starts)
        assert len(starts) <= 4
        assert sum(start.place.demand.all_gpus for start in starts) <= 10.0
        assert flops <= 100.0 * (1 + 1e-9)
        assert used <= 36.0 * (1 + 1e-9)
        ended = min(starts, key=lambda one: one.place.until)
        now = ended.place.until
        made.end(ended, now)
        if data.draw(st.booleans()):
            made.spend(ended.jobs[0].flops)
        else:
            made.put(ended.jobs[0], first=True) if data.draw(st.booleans()) else None
    assert (made.out_of_budget(now) is not None) == bool(made.ready())


def test_a_budget_passes_over_what_is_too_large_for_it_and_then_says_so() -> None:
    made = schedule(4, flops=10.0)
    for name, size in {"large": 9.0, "middle": 6.0, "small": 4.0, "tiny": 0.5}.items():
        made.put(job(name, seconds=size, flops=size))
    assert fill(made) == ["large", "tiny"]
    assert made.out_of_budget() is None, "something runs"
    made.end(running(made, "large"), 9.0)  # it failed: its FLOPs are free again
    assert fill(made, 9.0) == ["middle"]
    for name in ("middle", "tiny"):
        made.end(running(made, name), 20.0)
        made.spend({"middle": 6.0, "tiny": 0.5}[name])
    said = made.out_of_budget(20.0)
    assert said == (
        "out of budget: of the budget of 1e1 FLOPs 6.5e0 are spent, and the smallest cell that is left takes 4e0. "
        "Raise it under `limits` in the study file"
    )


def test_gpu_hours_count_what_was_used_and_stop_what_would_use_more() -> None:
    made = schedule(8, gpu_hours=1.0)
    made.put(job("gang", TWO, seconds=1200.0))
    made.put(job("long", seconds=1300.0))
    made.put(job("short", seconds=1000.0))
    assert fill(made) == ["short"] or fill(made) == []
    assert {one.jobs[0].id for one in made.running.values()} == {"long", "short"}
    for start in list(made.running.values()):
        made.end(start, 2000.0)
    assert made.spent_gpu_seconds == 4000.0, "both took longer than was thought"
    assert fill(made, 2000.0) == []
    assert "of the budget of 1 GPU-hours 1.11 are spent" in (made.out_of_budget(2000.0) or "")


def test_where_only_a_prediction_holds_the_rest_back_its_gpu_hours_are_said() -> None:
    made = schedule(8, gpu_hours=1.0)
    made.put(job("gang", TWO, seconds=3600.0))
    made.put(job("long", seconds=5400.0))
    assert fill(made) == []
    assert made.out_of_budget() == (
        "out of budget: of the budget of 1 GPU-hours 0 are spent, and the smallest cell that is left is predicted to "
        "take 1.5. Raise it under `limits` in the study file"
    )


def test_a_stack_counts_each_of_its_cells() -> None:
    made = schedule(4, cells=3, flops=35.0)
    for i in range(5):
        made.put(job(str(i), seconds=10.0, flops=10.0))
    start = made.take()
    assert start is not None
    assert made.admits(start, ["1", "2", "3", "4"], 0.0) == 2
    made.join(start, ["1", "2"])
    assert fill(made) == []
    made.end(start, 10.0)
    made.spend(30.0)
    assert fill(made, 10.0) == [], "five FLOPs are left"


def test_room_counts_units_within_limits() -> None:
    assert schedule(8, 8).room(ONE, 100) == 16
    assert schedule(8, 8, units=5).room(ONE, 100) == 5
    assert schedule(8, 8, gpus=6).room(TWO, 100) == 3
    assert schedule(8, 8, cells=2).room(QUARTER, 100) == 2


# --- chains ------------------------------------------------------------------------------------------------------


def test_a_chain_is_what_comes_in_a_row() -> None:
    seconds = {"trunk": 10.0, "early": 3.0, "late": 8.0, "last": 1.0, "alone": 5.0, "orphan": 2.0}
    parents = {"early": ("trunk", 4.0), "late": ("trunk", None), "last": ("late", 99.0), "orphan": ("gone", None)}
    found = chains(seconds, parents)
    assert found == {"trunk": 19.0, "early": 3.0, "late": 9.0, "last": 1.0, "alone": 5.0, "orphan": 2.0}
    assert not math.isnan(sum(chains({}, {}).values()))


def test_jobs_that_wait_for_one_another_are_refused() -> None:
    with pytest.raises(InputError, match="the jobs a, b wait for one another"):
        chains({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": ("b", None), "b": ("a", None)})
