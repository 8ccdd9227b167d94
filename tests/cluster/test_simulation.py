"""The simulated cluster: known small schedules, nothing before its parent, nothing lost, close to the lower bound."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from commandline import TINY, Escala, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import WHOLE, Demand, Node
from cluster.scheduling import Bounds, Job
from cluster.simulation import Edge, Faults, Simulated, Turn, simulate
from sweeps.errors import InputError

ONE, EIGHT = Demand(1, 1.0), Demand(8, 1.0)
SHARED = """
name: shared
corpus: {source: markov, options: {vocab_size: 16, tokens: 200000, seed: 1}}
context: 32
families: [llama]
grid: {type: points, points: [{size: 1e4, tokens: 20480}, {size: 1e4, tokens: 81920}]}
training: {batch_tokens: 512, learning_rate: 0.01, schedule: {kind: wsd, cooldown_fraction: 0.25, warmup_tokens: 4096}}
seeds: [0, 1]
"""


def job(name: str, seconds: float, demand: Demand = Demand()) -> Job:
    return Job(id=name, demand=demand, seconds=seconds, flops=seconds)


def spans(found: Simulated) -> dict[str, tuple[float, float]]:
    return {turn.id: (turn.start, turn.end) for turn in found.turns}


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[Job], dict[str, Edge]]:
    demands = [Demand(1, 0.25), Demand(1, 0.5), ONE, Demand(2, 1.0), Demand(4, 1.0)]
    jobs: list[Job] = []
    edges: dict[str, Edge] = {}
    for number in range(draw(st.integers(1, 25))):
        if jobs and draw(st.booleans()):
            parent = draw(st.sampled_from(jobs))
            edges[str(number)] = Edge(parent=parent.id, after=draw(st.none() | st.floats(0, 300)))
        jobs.append(job(str(number), draw(st.floats(0.01, 200)), draw(st.sampled_from(demands))))
    return draw(st.permutations(jobs)), edges


FAULTS = st.builds(
    Faults,
    mtbf_seconds=st.sampled_from([math.inf, 2000.0, 300.0]),
    preemptions_per_hour=st.sampled_from([0.0, 5.0]),
    checkpoint_seconds=st.sampled_from([0.0, 5.0, 20.0]),
    repair_seconds=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 1000),
)


@settings(deadline=None, max_examples=60)
@given(workloads(), FAULTS)
def test_capacity_order_and_work_hold_through_failures_and_returns(
    work: tuple[list[Job], dict[str, Edge]], faults: Faults
) -> None:
    jobs, edges = work
    nodes = [Node("a", 16, 4), Node("b", 16, 8)]
    found = simulate(jobs, nodes, edges=edges, faults=faults)
    known = {one.id: one for one in jobs}
    turns: dict[str, list[Turn]] = {one.id: [] for one in jobs}
    for turn in sorted(found.turns, key=lambda turn: turn.start):
        turns[turn.id].append(turn)
    # Every job's turns lead from nothing to its end, each from where a checkpoint left it.
    for name, tries in turns.items():
        assert [turn.done_before for turn in tries] == pytest.approx([0.0, *(turn.done_after for turn in tries[:-1])])
        assert tries[-1].done_after == pytest.approx(known[name].seconds)
        assert tries[-1].end - tries[-1].start == pytest.approx(tries[-1].done_after - tries[-1].done_before)
    # No GPU is ever more than full.
    moments = [(turn.start, 1, turn) for turn in found.turns] + [(turn.end, 0, turn) for turn in found.turns]
    used: Counter[tuple[str, int]] = Counter()
    for _, begins, turn in sorted(moments, key=lambda one: one[:2]):
        for gpu, amount in turn.gpus:
            used[turn.node, gpu] += amount if begins else -amount
            assert used[turn.node, gpu] <= WHOLE
    # No child before its parent has come so far.
    for name, edge in edges.items():
        tries = turns[edge.parent]
        if edge.after is None or edge.after >= (known[edge.parent].seconds or 0.0):
            allowed = tries[-1].end
        else:
            allowed = min(
                turn.start + edge.after - turn.done_before
                for turn in tries
                if turn.start + edge.after - turn.done_before <= turn.end + 1e-9
            )
        assert turns[name][0].start >= allowed - 1e-6
    assert found.makespan_seconds >= found.lower_bound_seconds * (1 - 1e-9)
    assert found.recomputed_hours >= 0.0
    lost = sum((turn.end - turn.start - (turn.done_after - turn.done_before)) * known[turn.id].demand.all_gpus
               for turn in found.turns)  # fmt: skip
    assert found.recomputed_hours * 3600 == pytest.approx(lost, abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1000), max_size=30), st.integers(1, 5))
def test_longest_first_takes_at_most_a_third_more_than_the_best_and_so_less_than_twice_the_bound(
    seconds: list[float], cpus: int
) -> None:
    jobs = [job(str(i), value) for i, value in enumerate(seconds)]
    found = simulate(jobs, [Node("a", cpus)])
    assert found.lower_bound_seconds * (1 - 1e-12) <= found.makespan_seconds <= 2 * found.lower_bound_seconds + 1e-9


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([ONE, Demand(2, 1.0), EIGHT]), st.floats(1, 100)), max_size=40))
def test_mixed_demands_take_no_more_than_twice_the_bound_and_the_longest(work: list[tuple[Demand, float]]) -> None:
    jobs = [job(str(i), seconds, demand) for i, (demand, seconds) in enumerate(work)]
    found = simulate(jobs, [Node("a", 64, 8), Node("b", 64, 8)])
    longest = max((seconds for _, seconds in work), default=0.0)
    assert found.makespan_seconds <= 2 * found.lower_bound_seconds + longest + 1e-6


def test_longest_first_of_a_known_queue() -> None:
    jobs = [job(name, seconds) for name, seconds in {"a": 2.0, "b": 3.0, "c": 2.0, "d": 3.0, "e": 2.0}.items()]
    found = simulate(jobs, [Node("here", 2)])
    assert spans(found) == {"b": (0, 3), "d": (0, 3), "a": (3, 5), "c": (3, 5), "e": (5, 7)}
    assert found.makespan_seconds == 7.0, "the best is 6: longest first is a rule, not an optimum"
    assert found.lower_bound_seconds == 6.0


def test_a_trunk_goes_before_a_longer_cell_that_nothing_waits_for() -> None:
    jobs, edges = [job("alone", 5.0), job("trunk", 4.0), job("branch", 3.0)], {"branch": Edge(parent="trunk")}
    one = simulate(jobs, [Node("here", 1)], edges=edges)
    assert spans(one) == {"trunk": (0, 4), "alone": (4, 9), "branch": (9, 12)}
    two = simulate(jobs, [Node("here", 2)], edges=edges)
    assert (two.makespan_seconds, two.lower_bound_seconds) == (7.0, 7.0)


def test_a_branch_starts_when_its_trunk_has_come_so_far_and_waits_for_none_that_ended_long_ago() -> None:
    jobs = [job("trunk", 4.0), job("branch", 1.0), job("other", 1.0)]
    edges = {"branch": Edge(parent="trunk", after=1.5), "other": Edge(parent="finished long ago")}
    assert spans(simulate(jobs, [Node("here", 3)], edges=edges))["branch"] == (1.5, 2.5)
    assert spans(simulate(jobs, [Node("here", 3)], edges=edges))["other"] == (0.0, 1.0)


def test_a_gang_has_its_node_as_soon_as_those_that_run_there_end() -> None:
    jobs = [job(f"long {i}", 100.0, ONE) for i in range(9)] + [job("gang", 50.0, EIGHT)]
    jobs += [job(f"short {i}", 49.0, ONE) for i in range(100)]
    found = simulate(jobs, [Node("a", 64, 8), Node("b", 64, 8)])
    assert spans(found)["gang"] == (100.0, 150.0)


def test_a_failure_loses_what_is_after_the_last_checkpoint_and_a_preemption_nothing() -> None:
    one = [job("x", 1000.0, ONE)]
    nodes = [Node("a", 1, 1)]
    failing = Faults(mtbf_seconds=700.0, checkpoint_seconds=100.0, repair_seconds=10.0, seed=3)
    found = simulate(one, nodes, faults=failing)
    tries = found.turns
    assert found.failures == len(tries) - 1 > 0
    assert [turn.done_after % 100 for turn in tries] == pytest.approx([0.0] * len(tries))
    assert all(later.start - earlier.end == pytest.approx(10.0) for earlier, later in itertools.pairwise(tries))
    assert found.makespan_seconds == pytest.approx(1000 + 10 * found.failures + 3600 * found.recomputed_hours)
    assert simulate(one, nodes, faults=failing) == found, "the seed decides"
    assert simulate(one, nodes, faults=replace(failing, seed=4)) != found
    preempted = simulate(one, nodes, faults=Faults(preemptions_per_hour=10.0, repair_seconds=10.0))
    assert preempted.preemptions > 0
    assert (preempted.failures, preempted.recomputed_hours) == (0, 0.0)
    assert preempted.makespan_seconds == pytest.approx(1000 + 10 * preempted.preemptions)


def test_a_branch_goes_on_from_a_trunk_that_was_lost_after_it_left() -> None:
    jobs, edges = [job("trunk", 1000.0, ONE), job("branch", 10.0, ONE)], {"branch": Edge(parent="trunk", after=30.0)}
    faults = Faults(mtbf_seconds=200.0, checkpoint_seconds=1e6, repair_seconds=1.0, seed=1)
    found = simulate(jobs, [Node("a", 2, 2)], edges=edges, faults=faults)
    trunk = [turn for turn in found.turns if turn.id == "trunk"]
    assert {turn.done_after for turn in trunk[:-1]} <= {0.0, 30.0}
    assert 30.0 in {turn.done_after for turn in trunk}, "the checkpoint that its branch leaves from is kept"


def test_a_branch_does_not_leave_a_trunk_that_was_lost_before_it_came_so_far() -> None:
    jobs, edges = [job("trunk", 1000.0, ONE), job("branch", 10.0, ONE)], {"branch": Edge(parent="trunk", after=900.0)}
    faults = Faults(mtbf_seconds=600.0, checkpoint_seconds=1e6, repair_seconds=1.0, seed=5)
    found = simulate(jobs, [Node("a", 2, 2)], edges=edges, faults=faults)
    trunk = [turn for turn in found.turns if turn.id == "trunk"]
    branch = min(turn.start for turn in found.turns if turn.id == "branch")
    assert any(turn.end - turn.start < 900.0 for turn in trunk), "one was lost before"
    assert branch == pytest.approx(next(turn.start + 900.0 for turn in trunk if turn.end - turn.start >= 900.0))


def test_a_budget_ends_a_simulated_run_as_it_ends_a_real_one() -> None:
    jobs = [job(str(i), 10.0, ONE) for i in range(9)]
    found = simulate(jobs, [Node("a", 2, 2)], bounds=Bounds(flops=45.0))
    assert (len(found.turns), found.trained, found.makespan_seconds) == (4, 4, 20.0)
    assert found.stopped is not None
    assert found.stopped.startswith("out of budget: of the budget of 4.5e1 FLOPs 4e1 are spent")


def test_what_can_never_run_is_refused() -> None:
    with pytest.raises(InputError, match="job gang asks for 8 workers"):
        simulate([job("gang", 1.0, EIGHT)], [Node("a", 8, 4), Node("b", 8, 4)])
    with pytest.raises(InputError, match=r"limits\.gpus: 4 are allowed at once, and job gang asks for 8 workers"):
        simulate([job("gang", 1.0, EIGHT)], [Node("a", 8, 8)], bounds=Bounds(gpus=4))
    with pytest.raises(InputError, match="no node to run anything on"):
        simulate([], [])
    edges = {"a": Edge(parent="b"), "b": Edge(parent="a")}
    with pytest.raises(InputError, match="wait for one another"):
        simulate([job("a", 1.0), job("b", 1.0)], [Node("here", 1)], edges=edges)
    never = Faults(mtbf_seconds=60.0, checkpoint_seconds=1e6)
    with pytest.raises(InputError, match="this cluster gets nowhere"):
        simulate([job("x", 1e4, ONE)], [Node("a", 1, 1)], faults=never)


# --- the command -------------------------------------------------------------------------------------------------


def test_simulate_prints_what_a_study_takes_and_where_its_times_come_from(escala: Escala) -> None:
    study = escala.study(SHARED)
    text = escala("simulate", study, "--gpus", 4, "--nodes", 2, "--store", "store").stdout
    assert "shared: 4 cells on 4 GPUs in 2 nodes, simulated." in text
    assert "on 1 GPU in 1 node, simulated." in escala("simulate", study, "--gpus", 1, "--store", "store").stdout
    assert "times the lower bound of" in text
    assert "assumed, from FLOPs at 40% of the 989 TFLOP/s of one H100 in bfloat16" in text
    options = ("--gpus", 4, "--nodes", 2, "--mtbf", "1h", "--preempt", 0.5, "--device", "A100", "--mfu", 0.5, "--json")
    told = json.loads(escala("simulate", study, *options, "--gpu-memory", 80, "--store", "store").stdout)
    assert (told["cells"], told["gpus"], told["stopped"]) == (4, 4, None)
    assert told["makespan_seconds"] >= told["lower_bound_seconds"] > 0
    assert "50% of the 312 TFLOP/s of one A100" in told["times"]
    assert not list((escala.folder / "store").glob("studies/*")), "nothing is put on record"


def test_simulate_keeps_the_limits_of_the_study(escala: Escala) -> None:
    study = escala.study(SHARED + "limits: {gpus: 1}\n")
    told = json.loads(escala("simulate", study, "--gpus", 4, "--json", "--store", "store").stdout)
    assert told["makespan_seconds"] == pytest.approx(4 * told["lower_bound_seconds"], rel=1), "one at a time"
    assert told["makespan_seconds"] == pytest.approx(3600 * told["work_hours"])
    study = escala.study(SHARED + "limits: {flops: 1}\n")
    told = json.loads(escala("simulate", study, "--gpus", 4, "--json", "--store", "store", ok=1).stdout)
    assert told["stopped"].startswith("out of budget")
    assert told["trained"] == 0
    said = escala("simulate", study, "--gpus", 4, "--store", "store", ok=1).stdout
    assert "It ends early after 0 s, with 0 of its cells trained in 0 GPU-hours: out of budget" in said
    assert "lower bound" not in said, "which is that of the whole study"


def test_a_search_is_simulated_as_all_its_trials(escala: Escala) -> None:
    searched = (
        TINY.replace("name: tiny", "name: searched")
        + "search: {space: {learning_rate: {log: [1e-4, 1e-1]}}, trials: 5}\n"
    )
    told = json.loads(escala("simulate", escala.study(searched), "--gpus", 2, "--json", "--store", "store").stdout)
    assert told["cells"] == 5 * 7, "the tiny study's seven places"
    assert any("5 trials" in note for note in told["notes"])
    settings = "search: {space: {weight_decay: {categorical: [0.1, 0.2, 0.3]}}, sampler: grid}\n"
    grid = escala.study(TINY.replace("name: tiny", "name: listed") + settings)
    told = json.loads(escala("simulate", grid, "--gpus", 2, "--json", "--store", "store").stdout)
    assert told["cells"] == 3 * 7, "no more than the grid has settings"
    assert "does not go with a search" in refused(
        escala, "simulate", grid, "--gpus", 2, "--hardware", "abacus", "--store", "store"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpus", 4, "--nodes", 0), "4 GPUs cannot be shared evenly among 0 nodes"),
        (("--gpus", 10, "--nodes", 4), "10 GPUs cannot be shared evenly among 4 nodes"),
        (("--gpus", 0), "0 GPUs cannot be shared evenly among 1 node. Give"),
        (("--gpus", 4, "--mtbf", "soon"), "--mtbf: found 'soon'; a time above 0 with its unit"),
        (("--gpus", 4, "--mtbf", "0h"), "--mtbf: found '0h'"),
        (("--gpus", 4, "--device", "H1000"), "the peak speed of 'H1000' is not known"),
        (("--gpus", 4, "--device", "TPU"), "the peak speed of 'TPU' is not known"),
        (("--gpus", 4, "--mfu", 0), "--mfu: found 0"),
        (("--gpus", 4, "--gpu-memory", 0), "--gpu-memory: found 0"),
        (("--gpus", 4, "--gpu-memory", "nan"), "--gpu-memory: found nan; a finite number"),
        (("--gpus", 4, "--preempt", "inf"), "--preempt: found inf; a finite number"),
        (("--gpus", 4, "--checkpoint-seconds", "inf"), "--checkpoint-seconds: found inf"),
        (("--gpus", 4, "--hardware", "abacus"), "no calibration 'abacus'"),
        (("--gpus", 4, "--hardware", "abacus", "--device", "H100"), "--hardware: a calibration does not go with"),
    ],
)
def test_what_cannot_be_simulated_is_refused(escala: Escala, options: tuple[object, ...], said: str) -> None:
    study = escala.study(SHARED)
    escala("plan", study, "--store", "store")
    assert said in refused(escala, "simulate", study, *options, "--store", "store")
