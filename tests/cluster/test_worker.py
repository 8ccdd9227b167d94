"""What a worker sees of its machine; and one that got its room late, when others have had its cells meanwhile."""

import asyncio
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from searched import make_corpus, search_plan

from cluster import gang, worker
from cluster.calibration import Stopwatch
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


@pytest.mark.parametrize(("gpus", "seen"), [(0.0, "-1"), (0.5, "3"), (1.0, "3")])
def test_a_worker_sees_the_gpus_that_it_was_given_and_without_any_none(
    gpus: float, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node may have GPUs that a run on CPUs does not use: all of its cells would train on the first."""
    at_import: list[str | None] = []

    def loading() -> Any:
        at_import.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return nullcontext()

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as Ray sets it for who has that one
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(worker, "loading", loading)
    monkeypatch.setattr(worker, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(worker, "cap_memory", lambda *_: None)
    Worker(gpus, 1.0, True)
    assert at_import == [seen], "before torch is there"
    assert os.environ["HIP_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize(("gpus", "seen"), [(0.0, "-1"), (1.0, "3")])
def test_a_calibration_of_cpus_sees_no_gpu(gpus: float, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "3")
    monkeypatch.setattr("sweeps.devices.keep_freed_memory", lambda: None)
    Stopwatch(gpus)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize(("gpus", "seen"), [(False, "-1"), (True, "3")])
def test_the_ranks_of_a_gang_without_gpus_see_none_before_they_meet(
    gpus: bool, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Group:
        def execute(self, call: Any, *_: Any) -> None:
            seen_by[call] = os.environ.get("CUDA_VISIBLE_DEVICES")
            if call is gang.hide_gpus:
                call()

        def execute_single(self, rank: int, call: Any) -> int:
            return rank

    seen_by: dict[Any, str | None] = {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "3")
    config = gang._listening(gpus)
    config.backend_cls().on_start(Group(), config)
    assert seen_by[gang._meet] == seen
    assert list(seen_by)[-1] is gang._hear_sigterm
