"""Room: no GPU and no CPU is ever given out twice, a share stays on one GPU, a gang on one node."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import (
    WHOLE,
    Demand,
    Fleet,
    Hold,
    Node,
    Place,
    cells_together,
    check_holds,
    demand_of,
    gpu_share,
    host_part,
    memory_share,
    threads_for,
)
from sweeps.errors import InputError
from sweeps.memory import PROCESS_BYTES, allocator_share
from tests.plans import POINT, only, points

GIB = 1024**3
SHARES = [gpu_share(together) for together in (2, 3, 4, 7, 16)]
DEMANDS = st.one_of(
    st.builds(Demand, st.just(1), st.sampled_from(SHARES), st.sampled_from([0.5, 1.0])),
    st.builds(Demand, st.integers(1, 4), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.0, 0.5, 1.0, 3.0])),
)
NODES = st.lists(st.tuples(st.integers(0, 16), st.integers(0, 4)), min_size=1, max_size=4)


def assert_within(nodes: dict[str, Node], places: list[Place]) -> None:
    """What is placed is never more than there is, GPU by GPU, and each has what it asked for."""
    gpus: Counter[tuple[str, int]] = Counter()
    cpus: Counter[str] = Counter()
    for place in places:
        demand = place.demand
        cpus[place.node] += demand.workers * round(demand.cpus * WHOLE)
        gpus.update({(place.node, gpu): amount for gpu, amount in place.gpus})
        wanted = (
            [WHOLE] * int(demand.all_gpus) if demand.gpus >= 1 else [round(demand.gpus * WHOLE)] * (demand.gpus > 0)
        )
        assert [amount for _, amount in place.gpus] == wanted
        assert len({gpu for gpu, _ in place.gpus}) == len(place.gpus)
        assert all(gpu < nodes[place.node].gpus for gpu, _ in place.gpus)
    assert all(amount <= WHOLE for amount in gpus.values())
    assert all(amount <= nodes[node].cpus * WHOLE for node, amount in cpus.items())


@given(NODES, st.data())
def test_capacity_is_never_exceeded_under_random_arrivals_ends_and_losses(
    sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    nodes = {str(i): Node(str(i), cpus, gpus) for i, (cpus, gpus) in enumerate(sizes)}
    fleet, there, places = Fleet(nodes.values()), dict(nodes), list[Place]()
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["place", "place", "place", "free", "lose", "return"]))
        if what == "place":
            demand = data.draw(DEMANDS)
            fits = fleet.fits(demand)
            place = fleet.place(demand)
            assert fits == (place is not None)
            if place is not None:
                assert fleet.holds_ever(demand)
                places.append(place)
        elif what == "free" and places:
            fleet.free(places.pop(data.draw(st.integers(0, len(places) - 1))))
        elif what == "lose":
            node = data.draw(st.sampled_from(sorted(nodes)))
            lost = fleet.remove(node)
            assert lost == [place for place in places if place.node == node]
            places = [place for place in places if place.node != node]
            there.pop(node, None)
            for place in lost:
                fleet.free(place)  # whoever had it says so too
        elif what == "return":
            node = data.draw(st.sampled_from(sorted(nodes)))
            kept = [place for place in places if place.node == node]
            fleet.add(nodes[node], kept)  # whether it was gone or not
            there[node] = nodes[node]
        assert_within(there, places)
    for place in places:
        fleet.free(place)
        fleet.free(place)  # twice is once
    whole = {Demand(1, float(node.gpus), node.cpus) for node in there.values() if node.gpus}
    assert all(fleet.fits(demand) for demand in whole), "all room is back"


@given(NODES, st.lists(DEMANDS, max_size=20), DEMANDS)
def test_what_an_empty_fleet_has_room_for_it_can_hold_and_the_other_way_round(
    sizes: list[tuple[int, int]], before: list[Demand], demand: Demand
) -> None:
    fleet = Fleet(Node(str(i), cpus, gpus) for i, (cpus, gpus) in enumerate(sizes))
    assert fleet.holds_ever(demand) == fleet.fits(demand)
    places = [place for one in before if (place := fleet.place(one)) is not None]
    count = fleet.count(demand, 100)
    taken = [place for _ in range(100) if (place := fleet.place(demand)) is not None]
    assert len(taken) == count, "what was counted is there, and counting took nothing"
    nodes = {node.id: node for node in fleet.nodes()}
    assert_within(nodes, [*places, *taken])


@given(NODES, st.lists(st.tuples(DEMANDS, st.floats(0, 100)), max_size=20), DEMANDS)
def test_what_is_held_for_a_demand_is_free_for_it_when_it_was_said_to_be(
    sizes: list[tuple[int, int]], before: list[tuple[Demand, float]], demand: Demand
) -> None:
    fleet = Fleet(Node(str(i), cpus, gpus) for i, (cpus, gpus) in enumerate(sizes))
    places = [place for one, until in before if (place := fleet.place(one, until)) is not None]
    hold = fleet.hold(demand)
    assert (hold is not None) == fleet.holds_ever(demand)
    if hold is None:
        return
    while (place := fleet.place(Demand(1, SHARES[0], 0.5), keep=hold)) is not None:  # what others take is not of it
        assert place.node != hold.node or not hold.gpus & {gpu for gpu, _ in place.gpus}
    for place in places:
        if place.until <= hold.time:
            fleet.free(place)
    assert fleet.fits(demand)


def test_a_share_goes_where_the_least_is_left_over_and_a_gang_where_all_of_it_fits() -> None:
    fleet = Fleet([Node("small", 8, 2), Node("large", 32, 8)])
    third = fleet.place(Demand(1, gpu_share(3)))
    assert third is not None
    again = fleet.place(Demand(1, gpu_share(3)))
    assert again is not None
    assert (again.node, again.gpus) == (third.node, third.gpus)
    half = fleet.place(Demand(1, 0.5))
    assert half is not None
    assert half.gpus != third.gpus, "a third is left of that one"
    gang = fleet.place(Demand(8, 1.0))
    assert gang is not None
    assert (gang.node, len(gang.gpus)) == ("large", 8)
    assert fleet.place(Demand(2, 1.0)) is None, "two GPUs are no gang's where a share has one of them"


def test_a_hold_with_no_estimates_is_where_the_fewest_must_end() -> None:
    fleet = Fleet([Node("a", 8, 2), Node("b", 8, 2)])
    places = [fleet.place(Demand(1, 1.0)) for _ in range(4)]
    first = next(place for place in places if place is not None and place.node == "b")
    fleet.free(first)
    hold = fleet.hold(Demand(2, 1.0))
    assert hold is not None
    assert (hold.node, hold.gpus, hold.time) == ("b", frozenset({0, 1}), float("inf"))
    assert fleet.place(Demand(1, 1.0), keep=hold) is None
    assert fleet.place(Demand(1, 1.0), keep=Hold("a", frozenset({0, 1}), 0, 0.0)) is not None


def test_a_demand_that_no_node_can_ever_hold_is_named_with_the_largest_node() -> None:
    fleet = Fleet([Node("a", 64, 8), Node("b", 64, 4)])
    check_holds(fleet, {Demand(8, 1.0): "x"})
    said = (
        r"cell 1 asks for 16 workers with 1 GPU and 1 CPU each on one node, .* \(the largest has 8 GPUs and 64 CPUs\)"
    )
    with pytest.raises(InputError, match=said):
        check_holds(fleet, {Demand(8, 1.0): "x", Demand(16, 1.0): "cell 1"})
    with pytest.raises(InputError, match="there is none"):
        check_holds(Fleet(), {Demand(): "x"})


@pytest.mark.parametrize("asked", [(0, 1.0, 1.0), (1, -1.0, 1.0), (1, 1.5, 1.0), (2, 0.5, 1.0), (1, 1.0, -1.0)])
def test_a_demand_that_ray_could_not_place_is_refused(asked: tuple[int, float, float]) -> None:
    with pytest.raises(InputError, match="no node can be asked for"):
        Demand(*asked)


def test_a_demand_says_what_ray_and_its_autoscaler_are_asked_for() -> None:
    assert Demand().options() == {"num_cpus": 1.0, "max_restarts": 0, "max_task_retries": 0}
    assert Demand(1, 0.25).options()["num_gpus"] == 0.25
    assert Demand(2, 1.0, 3.0).bundles() == [{"CPU": 3.0, "GPU": 1.0}] * 2
    assert Demand().bundles() == [{"CPU": 1.0}]


def test_a_cell_shares_a_gpu_with_as_many_as_fit_and_as_there_are() -> None:
    one = only(points(POINT))
    assert demand_of(one, device="cpu", gpu_bytes=80 * GIB) == Demand(1, 0.0)
    assert demand_of(one, device="cuda") == Demand(1, 1.0), "its memory is not known"
    assert demand_of(one, device="cuda", gpu_bytes=80 * GIB, crowd=100).gpus == gpu_share(16)
    assert demand_of(one, device="cuda", gpu_bytes=80 * GIB, crowd=3).gpus == gpu_share(3)
    with pytest.raises(InputError, match="does not fit on one GPU"):
        demand_of(one, device="cuda", gpu_bytes=GIB // 2, crowd=9)
    assert demand_of(one, device="cuda", workers=4, gpu_bytes=80 * GIB, crowd=9) == Demand(4, 1.0)


def test_a_cell_that_no_gpu_holds_is_parted_among_those_of_a_node() -> None:
    large = only(points({"size": 5e9, "tokens": 640_000}))
    assert demand_of(large, device="cuda", gpu_bytes=140 * GIB, gpus_per_node=8) == Demand(1, 1.0)
    parted = demand_of(large, device="cuda", gpu_bytes=40 * GIB, gpus_per_node=8)
    assert 2 <= parted.workers <= 8
    assert demand_of(large, device="cuda", workers=1, gpu_bytes=40 * GIB, gpus_per_node=8) == Demand(1, 1.0)
    with pytest.raises(InputError, match="does not fit on one GPU"):
        demand_of(large, device="cuda", gpu_bytes=40 * GIB, gpus_per_node=1)


@given(st.lists(st.integers(1, 60 * GIB), min_size=1, max_size=8))
def test_cells_that_share_a_gpu_fit_its_memory_whichever_they_are(needs: list[int]) -> None:
    together = cells_together(needs, 80 * GIB)
    assert together >= 1
    share = gpu_share(together)
    assert max(needs) <= 80 * GIB * memory_share(share)
    assert together * memory_share(share) <= 1.0
    assert together * Fraction(str(share)) <= 1 < (together + 1) * Fraction(str(share)), "Ray starts exactly so many"


@pytest.mark.parametrize("together", [1, 3, 16])
@pytest.mark.parametrize("device_bytes", [24 * GIB, 80 * GIB])
def test_the_contexts_of_workers_that_share_a_gpu_have_their_place_on_it(together: int, device_bytes: int) -> None:
    cap = allocator_share(memory_share(gpu_share(together)), device_bytes) * device_bytes
    assert together * (cap + PROCESS_BYTES["cuda"]) <= device_bytes
    assert cap > 0


@pytest.mark.parametrize(
    ("demand", "node", "cells", "processes"),
    [
        (Demand(), Node("n", 2), 100, 2),
        (Demand(), Node("n", 16), 100, 16),
        (Demand(), Node("n", 16), 3, 3),
        (Demand(4), Node("n", 18), 100, 16),
        (Demand(1, 1.0), Node("n", 64, 8), 100, 8),
        (Demand(1, 0.25), Node("n", 64, 8), 100, 32),
        (Demand(2), Node("n", 1), 100, 2),
    ],
)
def test_the_processes_that_train_on_a_node_have_a_part_of_its_memory_each(
    demand: Demand, node: Node, cells: int, processes: int
) -> None:
    assert host_part(demand, node, cells) == 1 / processes


def test_a_cell_that_no_gpu_holds_is_refused_with_its_size() -> None:
    with pytest.raises(InputError, match=r"needs 80\.0 GiB at its peak, and 73\.6 GiB"):
        cells_together([80 * GIB], 80 * GIB)


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
