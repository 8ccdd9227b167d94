"""A run that waits for a node says so, and does not wait for ever for one that nobody can start."""

import pytest

from cluster import shortage
from cluster.placement import Demand, Fleet, Node
from cluster.shortage import Shortage

SMALL, LARGE = Demand(), Demand(4, 1.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(shortage.time, "monotonic", lambda: now[0])
    return now


def test_a_demand_that_lost_its_only_node_is_named_though_smaller_ones_have_room(clock: list[float]) -> None:
    fleet, here = Fleet([Node("small", 2), Node("large", 8, 4)]), Shortage()
    waiting = {SMALL: 3, LARGE: 1}
    assert here.look(fleet, waiting, idle=False, scales=lambda: False) == []
    fleet.remove("large")
    (said,) = here.look(fleet, waiting, idle=False, scales=lambda: False)
    assert said.startswith("1 cell waits for 4 workers with 1 GPU and 1 CPU each on one node, and no node holds")
    assert "waiting for one to join, 10m 00s once nothing else trains" in said
    assert here.look(fleet, waiting, idle=False, scales=lambda: False) == [], "once"
    fleet.add(Node("large again", 8, 4))
    assert here.look(fleet, waiting, idle=False, scales=lambda: False) == []
    fleet.remove("large again")
    assert len(here.look(fleet, waiting, idle=False, scales=lambda: False)) == 1, "and when it is gone again"


def test_the_wait_ends_in_words_once_nothing_trained_for_long(clock: list[float]) -> None:
    fleet, here, waiting = Fleet([Node("small", 2)]), Shortage(), {LARGE: 2}
    here.look(fleet, waiting, idle=False, scales=lambda: False)
    clock[0] += 5000
    here.look(fleet, waiting, idle=True, scales=lambda: False)
    clock[0] += shortage.JOIN_SECONDS - 1
    here.look(fleet, waiting, idle=True, scales=lambda: False)
    assert here.over is None, "what trained meanwhile does not count as a wait"
    clock[0] += 1
    here.look(fleet, waiting, idle=True, scales=lambda: False)
    assert here.over == (
        "2 cells wait for 4 workers with 1 GPU and 1 CPU each on one node, and no node that holds that joined in "
        "10m 00s. Add such a node, or lower what the study asks for"
    )


def test_an_autoscaler_gets_longer_and_for_what_it_has_started_before_as_long_as_it_takes(clock: list[float]) -> None:
    waiting, never, before = {LARGE: 2}, Shortage(), Shortage()
    fleet = Fleet([Node("large", 8, 4)])
    before.look(fleet, waiting, idle=False, scales=lambda: True)
    fleet.remove("large")
    for one in (never, before):
        (said,) = one.look(fleet, waiting, idle=True, scales=lambda: True)
        assert said.endswith("the autoscaler is asked for one")
    for seconds in (shortage.LAUNCH_SECONDS - 1, 1.0):
        clock[0] += seconds
        for one in (never, before):
            assert one.over is None
            one.look(fleet, waiting, idle=True, scales=lambda: True)
    assert never.over is not None
    assert "joined in 30m 00s" in never.over
    assert before.over is None
