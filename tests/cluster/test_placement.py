"""The queue: no device holds more than it can, every cell runs once and after its trunk, and no slot idles for long."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import (
    Job,
    Turn,
    cells_together,
    choose_slots,
    gpu_share,
    longest_first,
    makespan,
    memory_share,
    simulate,
    threads_for,
)
from sweeps.errors import InputError

GIB = 1024**3
ROOM = 8


@st.composite
def queues(draw: st.DrawFn, size: int = ROOM, branches: bool = True) -> list[Job]:
    jobs: list[Job] = []
    for number in range(draw(st.integers(0, 30))):
        trunks = [job.id for job in jobs if job.parent is None]
        parent = draw(st.none() | st.sampled_from(trunks)) if trunks and branches else None
        seconds = draw(st.floats(0.01, 1000))
        after = draw(st.none() | st.floats(0, 2000)) if parent else None
        jobs.append(Job(str(number), seconds, draw(st.integers(1, size)), parent, after))
    return draw(st.permutations(jobs))


@given(queues(), st.integers(1, 4))
def test_no_device_holds_more_than_its_room_and_every_job_runs_once_after_its_parent(
    jobs: list[Job], devices: int
) -> None:
    turns = simulate(longest_first(jobs), devices, ROOM)
    known = {job.id: job for job in jobs}
    assert Counter(turn.id for turn in turns) == Counter(list(known))
    begun = {turn.id: turn for turn in turns}
    for turn in turns:
        job = known[turn.id]
        assert 0 <= turn.device < devices
        assert turn.end == turn.start + job.seconds
        assert job.parent is None or turn.start >= may_start(job, begun[job.parent])
        together = [other for other in turns if other.device == turn.device and other.start <= turn.start < other.end]
        assert sum(known[other.id].size for other in together) <= ROOM


def may_start(job: Job, parent: Turn) -> float:
    return parent.end if job.after is None else min(parent.end, parent.start + job.after)


def lower_bound(jobs: list[Job], devices: int) -> float:
    """No schedule is shorter than the work shared evenly, nor than the longest chain."""
    known = {job.id: job for job in jobs}
    before = [may_start(job, Turn("", 0, 0.0, known[job.parent].seconds)) if job.parent else 0.0 for job in jobs]
    chains = [job.seconds + wait for job, wait in zip(jobs, before, strict=True)]
    return max(sum(job.seconds for job in jobs) / devices, max(chains, default=0.0))


@given(queues(size=1), st.integers(1, 5))
def test_no_queue_ends_before_its_lower_bound(jobs: list[Job], devices: int) -> None:
    assert makespan(simulate(longest_first(jobs), devices)) >= lower_bound(jobs, devices) * (1 - 1e-12)


@given(queues(size=1, branches=False), st.integers(1, 5))
def test_longest_first_takes_at_most_a_third_more_than_the_best_and_so_less_than_twice_the_bound(
    jobs: list[Job], devices: int
) -> None:
    assert makespan(simulate(longest_first(jobs), devices)) <= 2 * lower_bound(jobs, devices) + 1e-9


def test_longest_first_of_a_known_queue() -> None:
    jobs = [Job(name, seconds) for name, seconds in {"a": 2.0, "b": 3.0, "c": 2.0, "d": 3.0, "e": 2.0}.items()]
    turns = simulate(longest_first(jobs), 2)
    assert [turn.id for turn in turns] == ["b", "d", "a", "c", "e"]
    assert makespan(turns) == 7.0, "the best is 6: longest first is a rule, not an optimum"


def test_a_trunk_goes_before_a_longer_cell_that_nothing_waits_for() -> None:
    jobs = [Job("alone", 5.0), Job("trunk", 4.0), Job("branch", 3.0, parent="trunk")]
    assert simulate(longest_first(jobs), 1) == [
        Turn("trunk", 0, 0.0, 4.0),
        Turn("alone", 0, 4.0, 9.0),
        Turn("branch", 0, 9.0, 12.0),
    ]
    assert makespan(simulate(longest_first(jobs), 2)) == 7.0


def test_a_branch_starts_when_its_trunk_has_come_so_far() -> None:
    jobs = [Job("trunk", 4.0), Job("branch", 1.0, parent="trunk", after=1.5)]
    assert simulate(longest_first(jobs), 2) == [Turn("trunk", 0, 0.0, 4.0), Turn("branch", 1, 1.5, 2.5)]


def test_a_branch_of_a_trunk_that_has_ended_waits_for_nobody() -> None:
    assert simulate([Job("branch", 1.0, parent="finished long ago")], 1) == [Turn("branch", 0, 0.0, 1.0)]


def test_what_can_never_run_is_refused() -> None:
    with pytest.raises(InputError, match="needs 9 of a device that has 8"):
        simulate([Job("large", 1.0, 9)], 2, ROOM)
    with pytest.raises(InputError, match="wait for one another"):
        simulate([Job("a", 1.0, parent="b"), Job("b", 1.0, parent="a")], 2)


@given(st.lists(st.integers(1, 60 * GIB), min_size=1, max_size=8))
def test_cells_that_share_a_gpu_fit_its_memory_whichever_they_are(needs: list[int]) -> None:
    together = cells_together(needs, 80 * GIB)
    assert together >= 1
    assert max(needs) <= 80 * GIB * memory_share(together)
    assert together * memory_share(together) <= 1.0
    assert together * gpu_share(together) <= 1.0 < (together + 1) * gpu_share(together), "Ray starts exactly so many"


def test_a_cell_that_no_gpu_holds_is_refused_with_its_size() -> None:
    with pytest.raises(InputError, match=r"needs 80\.0 GiB at its peak, and 73\.6 GiB"):
        cells_together([80 * GIB], 80 * GIB)


def test_slots_follow_gpus_then_cores_then_cells() -> None:
    assert choose_slots({"CPU": 8.0}, 100).count == 8
    assert choose_slots({"CPU": 8.0}, 3).count == 3
    assert "num_gpus" not in choose_slots({"CPU": 8.0}, 3).options
    shared = choose_slots({"CPU": 16.0, "GPU": 2.0}, 100, together=3)
    assert (shared.count, shared.options["num_gpus"]) == (6, 0.3333)


@given(st.integers(1, 100), st.integers(1, 64), st.integers(1, 64))
def test_threads_share_the_cores_only_when_cells_are_fewer(cells_left: int, slots: int, cores: int) -> None:
    threads = threads_for(cells_left, slots, cores)
    assert threads >= 1
    if cells_left >= cores:
        assert threads == 1
    else:
        assert threads * min(cells_left, slots) <= cores


def test_the_last_cells_take_the_cores_that_are_left() -> None:
    assert [threads_for(left, 8, 8) for left in (9, 8, 7, 4, 3, 2, 1)] == [1, 1, 1, 2, 2, 4, 8]
