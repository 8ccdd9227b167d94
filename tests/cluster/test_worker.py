"""A worker that got its room late, and what others have done with its cells meanwhile."""

import asyncio
from pathlib import Path

import pytest
from searched import make_corpus, search_plan

from cluster.gang import Gang
from cluster.hands import take_up
from cluster.ledger import register
from cluster.placement import Demand
from cluster.searching import Searching
from cluster.worker import Worker
from sweeps.planned import PlannedCell
from sweeps.store import Store, attempt_epochs, begin_attempt, commit_result, open_store, read_end

RESULT = {"state": "finished", "reason": None, "val_loss_final": 1.5}


@pytest.fixture
def cell(tmp_path: Path) -> tuple[Store, PlannedCell]:
    """A planned cell of the study `s`, on a store."""
    corpus = make_corpus(tmp_path)
    store = open_store(tmp_path / "store")
    search = Searching(store, search_plan(corpus, trials=1))
    (one,) = search.grow(1)
    register(store, search.plan, b"")
    return store, one


@pytest.mark.parametrize("over", [False, True])
def test_a_cell_that_another_studys_worker_has_begun_or_ended_is_left_to_it(
    cell: tuple[Store, PlannedCell], over: bool
) -> None:
    store, one = cell
    theirs = begin_attempt(store, one.cell.id, {"study": "other", "driver": 0})
    if over:
        assert commit_result(theirs, RESULT)
    given = (str(store.root), [one.cell.id], "s", None, 60.0, 0, False, 1)
    assert Worker.__new__(Worker).run(*given) == []
    assert asyncio.run(Gang(Demand(2, 1.0).bundles(), 0.5, None).run(*given)) == []
    assert attempt_epochs(store, one.cell.id) == [0], "it is trained once"


def test_anothers_attempt_is_neither_stopped_nor_charged_by_a_driver_whose_worker_waited(
    cell: tuple[Store, PlannedCell],
) -> None:
    store, one = cell
    ((hand,), _) = take_up(store, "s", [one])
    theirs = begin_attempt(store, one.cell.id, {"study": "other", "driver": 0})
    assert hand.attempt() is None
    hand.ask_to_stop("paused")
    hand.record_death("infrastructure", "the worker died")
    assert not (theirs.folder / "stop.json").exists()
    assert read_end(store, one.cell.id, 0) is None
    assert attempt_epochs(store, one.cell.id) == [0]
    ours = begin_attempt(store, one.cell.id, {"study": "s", "driver": 0})
    hand.record_death("infrastructure", "the worker died")
    assert read_end(store, one.cell.id, ours.epoch) == ("infrastructure", "the worker died")
