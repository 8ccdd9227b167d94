"""The driver keeps budgets, hears wishes, ends what hangs, and shares cells with other studies' drivers."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from searched import end

from cluster import driver, pulse, tasks
from cluster.claims import Claim
from cluster.control import cancel, pause, resume
from cluster.driver import Tally, run_study
from cluster.ledger import register
from cluster.progress import Progress
from cluster.turns import Turns
from sweeps.corpora import make_source, prepare
from sweeps.errors import InputError
from sweeps.grids import Plan, plan_study
from sweeps.life import _since_boot
from sweeps.records import read_json, write_json
from sweeps.store import (
    Store,
    attempt_epochs,
    begin_attempt,
    cell_state,
    forgive,
    open_store,
    read_end,
    read_metrics,
    record_error,
)
from sweeps.study import Study
from sweeps.units import flops as in_words

TRAINER = """
import os, pathlib, time

def train(cell, io):
    here = pathlib.Path(__file__).parent
    state = io.restore() or {"step": 0, "x": 1.0 + cell.seed}
    if (here / f"hang-{cell.seed}").exists():
        (here / f"hang-{cell.seed}").unlink()
        time.sleep(3600)
    if (here / "broken").exists():
        raise RuntimeError("the disk of node 17 is on fire")
    for step in range(state["step"] + 1, cell.steps + 1):
        time.sleep(0.02 if (here / "slow").exists() else 0.001)
        while step == 25 and (here / "hold").exists() and not io.should_stop():
            time.sleep(0.01)
            io.checkpoint((step - 1) * cell.batch_tokens, lambda: state)
        state = {"step": step, "x": state["x"] * 0.9}
        io.log(step * cell.batch_tokens, {"train_loss": state["x"]})
        io.checkpoint(step * cell.batch_tokens, lambda: state)
    return state["x"]
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits scaled down."""
    monkeypatch.setattr(tasks, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(driver, "LOOK_SECONDS", 0.2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """While this file is there, cells wait before their 25th step."""
    (tmp_path / "hold").touch()
    return tmp_path / "hold"


@pytest.fixture
def make_plan(store: Store, tmp_path: Path) -> Callable[..., Plan]:
    (tmp_path / "mine.py").write_text(TRAINER)
    source = make_source("markov", None, {"vocab_size": 8, "tokens": 60_000})
    corpus = prepare(source, "bytes", store.root)

    def make(cells: int, steps: int, name: str = "s", **more: Any) -> Plan:
        declared: dict[str, Any] = {
            "name": name,
            "corpus": {"source": "markov", "options": {"vocab_size": 8, "tokens": 60_000}},
            "context": 32,
            "families": ["llama"],
            "grid": {"type": "points", "points": [{"size": 10_000, "tokens": steps * 64}]},
            "training": {"batch_tokens": 64},
            "seeds": list(range(cells)),
            "trainer": "mine.py:train",
        }
        return plan_study(Study.model_validate(declared | more), corpus, allow_code=True, base_dir=tmp_path)

    return make


@pytest.fixture
def drive(ray_address: str, store: Store, tmp_path: Path) -> Callable[..., Tally]:
    def run(plan: Plan, watch: Callable[[Progress], None] = lambda _: None, **options: Any) -> Tally:
        return run_study(
            store,
            plan,
            b"",
            watch=watch,
            address=ray_address,
            workers=2,
            base_dir=tmp_path,
            checkpoint_seconds=0.1,
            **options,
        )

    return run


def ids(plan: Plan) -> list[str]:
    return [one.cell.id for one in plan.cells]


def ends(store: Store, plan: Plan) -> list[str]:
    """The kinds of end of all attempts, cell by cell."""
    found = [read_end(store, one, epoch) for one in ids(plan) for epoch in attempt_epochs(store, one)]
    return [end[0] for end in found if end is not None]


def assert_whole(store: Store, plan: Plan, steps: int) -> None:
    """Every cell has the result and the rows of an undisturbed run."""
    for one in plan.cells:
        result = read_json(store.cell(one.cell.id) / "result.json")
        x, rows = 1.0 + one.cell.seed, []
        for _ in range(steps):
            x *= 0.9
            rows.append({"train_loss": x})
        assert result["val_loss_final"] == x
        assert [row["metrics"] for row in read_metrics(store, one.cell.id)] == rows


class Once:
    """Does something at the first moment of a run that a condition holds for."""

    def __init__(self, condition: Callable[[Progress], bool], act: Callable[[], object]) -> None:
        self.condition, self.act, self.done = condition, act, False

    def __call__(self, progress: Progress) -> None:
        if not self.done and self.condition(progress):
            self.done = True
            self.act()


def each(*watches: Once) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        for one in watches:
            one(progress)

    return watch


def trained(progress: Progress) -> bool:
    return any(one.tokens > 64 * 20 for one in progress.running)


def both_trained(progress: Progress) -> bool:
    """Both workers have come so far: on a busy machine one begins long after the other."""
    return sum(one.tokens > 64 * 20 for one in progress.running) == 2


def pids(store: Store, plan: Plan) -> list[int]:
    """The processes of the attempts that run."""
    running = [one for one in ids(plan) if cell_state(store, one).state == "running"]
    return [read_json(store.attempt(one, attempt_epochs(store, one)[-1]) / "attempt.json")["pid"] for one in running]


@pytest.mark.slow
def test_a_worker_that_is_killed_four_times_over_uses_up_the_budget_of_one_cell(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store, hold: Path
) -> None:
    plan = make_plan(1, 40)
    killed: set[int] = set()

    def kill(progress: Progress) -> None:
        epochs = attempt_epochs(store, ids(plan)[0])
        beats = bool(epochs) and (store.attempt(ids(plan)[0], epochs[-1]) / "heartbeat.json").exists()
        for pid in pids(store, plan) if progress.running and beats else []:
            if pid not in killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)

    tally = drive(plan, kill, give_up_after=9)
    assert list(tally.failed) == ids(plan)
    assert len(killed) == 4
    assert ends(store, plan) == ["infrastructure"] * 4
    assert "the worker died" in tally.failed[ids(plan)[0]]
    again = drive(plan)
    assert list(again.failed) == ids(plan), "it stays failed"
    assert len(attempt_epochs(store, ids(plan)[0])) == 4
    forgive(store, ids(plan)[0], "a test")
    hold.unlink()
    assert drive(plan).finished == 1
    assert_whole(store, plan, 40)


@pytest.mark.slow
def test_a_preempted_worker_keeps_a_checkpoint_is_replaced_and_costs_nothing(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store, hold: Path
) -> None:
    plan = make_plan(2, 40)
    preempted = Once(trained, lambda: os.kill(pids(store, plan)[0], signal.SIGTERM))
    tally = drive(plan, each(preempted, Once(lambda _: bool(ends(store, plan)), hold.unlink)))
    assert (tally.finished, tally.failed) == (2, {})
    assert ends(store, plan) == ["preemption"]
    assert_whole(store, plan, 40)


@pytest.mark.slow
def test_a_frozen_worker_is_taken_for_dead_and_a_hung_one_is_told_from_a_slow_one(
    make_plan: Callable[..., Plan],
    drive: Callable[..., Tally],
    store: Store,
    tmp_path: Path,
    hold: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = make_plan(3, 150)
    monkeypatch.setattr(pulse, "SILENCE_SECONDS", 10.0)
    monkeypatch.setattr(pulse, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(pulse, "HANG_SECONDS", 20.0)
    (tmp_path / "hang-2").touch()
    (tmp_path / "slow").touch()

    def freeze() -> None:  # a cell that is held: on a busy machine it might end between the look and the signal
        os.kill(pids(store, plan)[0], signal.SIGSTOP)
        hold.unlink()

    tally = drive(plan, Once(trained, freeze))
    assert (tally.finished, tally.failed) == (3, {})
    said = [read_end(store, one, epoch) for one in ids(plan) for epoch in attempt_epochs(store, one)]
    assert sorted(end[1] for end in said if end) == ["hung: no step for 20 s", "no sign of life for 10 s"]
    assert_whole(store, plan, 150)


@pytest.mark.slow
def test_a_study_begins_one_unit_and_no_more_while_one_of_a_higher_priority_waits_for_room(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store, hold: Path, ray_address: str
) -> None:
    said: list[str] = []
    together: list[int] = []
    with Claim(store, "high") as claim:
        high = Turns(store, "high", claim.number, ray_address, 1)
        high.tell(True)
        has_room = Once(lambda now: len(together) > 10 and trained(now), lambda: high.tell(False))
        freed = Once(lambda now: has_room.done and len(now.running) == 2, hold.unlink)

        def watch(progress: Progress) -> None:
            said.extend(progress.notes)
            if not has_room.done:
                together.append(len(progress.running))
            each(has_room, freed)(progress)

        tally = drive(make_plan(3, 40, limits={"priority": 0}), watch)
    assert set(together) <= {0, 1}
    assert (tally.finished, tally.stopped, freed.done) == (3, None, True)
    assert "study high (priority 1) waits for room: nothing is begun here beyond one unit meanwhile" in said


def test_a_pause_stops_the_cells_with_a_checkpoint_until_it_is_lifted(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store, hold: Path
) -> None:
    plan = make_plan(3, 40)
    moments: list[tuple[str | None, int]] = []
    paused = Once(trained, lambda: pause(store, "s"))
    released = Once(lambda now: now.wish == "pause" and not now.running, hold.unlink)
    lifted = Once(lambda now: released.done, lambda: resume(store, "s"))

    def watch(progress: Progress) -> None:
        moments.append((progress.wish, len(progress.running)))
        each(paused, released, lifted)(progress)

    tally = drive(plan, watch)
    assert ("pause", 0) in moments
    assert (tally.finished, tally.stopped) == (3, None)
    assert set(ends(store, plan)) == {"stopped"}
    assert_whole(store, plan, 40)


def test_a_paused_study_is_not_run(make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store) -> None:
    plan = make_plan(1, 10)
    with Claim(store, "s"):
        pause(store, "s")
    with pytest.raises(InputError, match=r"study s is paused by .* Lift it first: escala resume s"):
        drive(plan)


@pytest.mark.slow
@pytest.mark.parametrize("now", [False, True])
def test_a_cancelled_study_ends_and_goes_on_when_it_is_run_again(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store, hold: Path, now: bool
) -> None:
    plan = make_plan(3, 40)
    cancelled = Once(both_trained, lambda: cancel(store, "s", now=now))
    tally = drive(plan, each(cancelled, Once(lambda progress: progress.wish == "drain", hold.unlink)))
    assert tally.stopped is not None
    assert tally.stopped.startswith("cancelled by" if now else "drained by")
    assert tally.finished == (0 if now else 2)
    assert tally.planned == (3 if now else 1)
    assert ends(store, plan) == (["stopped"] * 2 if now else [])
    hold.unlink(missing_ok=True)
    assert drive(plan).finished == tally.planned
    assert_whole(store, plan, 40)


@pytest.mark.slow
def test_a_failed_cell_that_is_forgiven_while_the_driver_works_is_tried_again(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store, hold: Path
) -> None:
    plan = make_plan(2, 40)
    register(store, plan, b"")
    failed = ids(plan)[1]
    record_error(begin_attempt(store, failed, {"study": "s", "driver": 0}), "code", "a test")
    forgiven = Once(trained, lambda: forgive(store, failed, "a test"))
    heard = Once(lambda now: now.counts["failed"] == 0, hold.unlink)
    tally = drive(plan, each(forgiven, heard))
    assert (tally.finished, tally.failed) == (2, {})
    assert_whole(store, plan, 40)


@pytest.mark.slow
def test_a_study_whose_first_attempts_fail_alike_is_given_up(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store, tmp_path: Path
) -> None:
    plan = make_plan(12, 10)
    (tmp_path / "broken").touch()
    tally = drive(plan)
    assert tally.stopped is not None
    assert tally.stopped.startswith(
        "given up: the first 3 attempts failed alike (code: RuntimeError: the disk of node 17"
    )
    assert 3 <= len(tally.failed) <= 4
    assert tally.planned == 12 - len(tally.failed)


@pytest.mark.slow
def test_what_a_dead_driver_left_is_ended_before_its_cell_is_tried_again(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store
) -> None:
    plan = make_plan(1, 30)
    cell_id = ids(plan)[0]
    left = psutil.Popen(["sleep", "600"])
    attempt = begin_attempt(store, cell_id, {"study": "s", "driver": 0})
    owner = {"pid": left.pid, **_since_boot(left.pid)}
    write_json(attempt.folder / "attempt.json", read_json(attempt.folder / "attempt.json") | owner)
    assert cell_state(store, cell_id).state == "running"
    assert drive(plan).finished == 1
    assert left.wait(5) == -signal.SIGKILL
    assert ends(store, plan) == ["preemption"]
    assert_whole(store, plan, 30)


@pytest.mark.slow
def test_a_cell_that_another_studys_driver_trains_is_waited_for_and_trained_once(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store
) -> None:
    plan, other = make_plan(2, 60), make_plan(2, 60, "other")
    assert ids(plan) == ids(other)
    with Claim(store, "other") as claim:
        attempt = begin_attempt(store, ids(plan)[0], {"study": "other", "driver": claim.number})
        waited: list[Progress] = []

        def watch(progress: Progress) -> None:
            if progress.counts["finished"] == 1:
                waited.append(progress)
                if len(waited) == 10:  # it has looked a few times since its own cell was done
                    assert attempt_epochs(store, ids(plan)[0]) == [0]
                    record_error(attempt, "stopped", "a test")

        tally = drive(plan, watch)
        assert len(waited) >= 10
    assert tally.finished == 2
    assert attempt_epochs(store, ids(plan)[0]) == [0, 1]
    assert_whole(store, plan, 60)


@pytest.mark.slow
def test_a_run_ends_although_a_cell_that_another_studys_driver_trains_fails_there(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store
) -> None:
    plan = make_plan(2, 40)
    theirs = ids(plan)[0]
    with Claim(store, "other") as claim:
        attempt = begin_attempt(store, theirs, {"study": "other", "driver": claim.number})
        after = 0

        def watch(progress: Progress) -> None:
            nonlocal after
            if progress.counts["finished"] == 1:
                after += 1
                assert after < 100, "it waits for what has failed"
            if after == 1:
                record_error(attempt, "code", "it is on fire")

        tally = drive(plan, watch)
    assert (tally.finished, tally.planned, tally.stopped) == (1, 0, None)
    assert tally.failed == {theirs: "code: it is on fire"}


def test_a_driver_that_was_replaced_ends_without_touching_a_cell(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store, hold: Path
) -> None:
    plan = make_plan(2, 40)

    def replace() -> None:
        write_json(store.study("s") / "driver-7.json", {"host": "elsewhere", "pid": 1, "started": "now"})

    tally = drive(plan, Once(trained, replace))
    assert tally.stopped is not None
    assert tally.stopped.startswith("taken over")
    assert tally.planned == 2
    assert set(ends(store, plan)) <= {"preemption"}, "Ray sends a SIGTERM some time before it kills"
    assert not any((store.cell(one) / "result.json").exists() for one in ids(plan))
    assert all(attempt_epochs(store, one) in ([], [0]) for one in ids(plan)), "no attempt was taken over"


def test_a_driver_that_was_replaced_before_its_first_turn_claims_no_work_of_its_successor(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store
) -> None:
    plan = make_plan(1, 40)

    def freeze() -> None:
        write_json(store.study("s") / "driver-7.json", {"host": "elsewhere", "pid": 1, "started": "now"})
        for one in plan.cells:
            end(store, one)

    tally = drive(plan, starting=freeze)
    assert tally.stopped is not None
    assert tally.stopped.startswith("taken over")


@pytest.mark.slow
def test_a_limit_of_cells_at_once_is_kept(make_plan: Callable[..., Plan], drive: Callable[..., Tally]) -> None:
    plan = make_plan(3, 40, limits={"cells": 1})
    most = 0

    def watch(progress: Progress) -> None:
        nonlocal most
        most = max(most, progress.counts["running"])

    assert drive(plan, watch).finished == 3
    assert most == 1


@pytest.mark.slow
def test_the_loss_of_a_cell_that_ended_is_its_result_not_the_last_that_it_logged(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(TRAINER.replace('return state["x"]', 'return 3.0 + state["x"]'))
    said: list[str] = []
    plan = make_plan(1, 40)
    assert drive(plan, lambda progress: said.extend(progress.ended)).finished == 1
    result = read_json(store.cell(plan.cells[0].cell.id) / "result.json")
    assert [one.rpartition(": ")[2] for one in said] == [f"finished, loss {result['val_loss_final']:.4f}"]


@pytest.mark.slow
def test_a_budget_of_gpu_hours_is_said_to_hold_nothing_back_where_cells_train_on_cpus(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally]
) -> None:
    said: list[str] = []
    tally = drive(make_plan(1, 40, limits={"gpu_hours": 1e-9}), lambda progress: said.extend(progress.notes))
    assert (tally.finished, tally.stopped) == (1, None)
    assert [one for one in said if "limits.gpu_hours holds nothing back: cells train on CPUs" in one]


@pytest.mark.slow
def test_a_budget_of_flops_ends_the_run_in_words_and_a_larger_one_goes_on(
    make_plan: Callable[..., Plan], drive: Callable[..., Tally], store: Store
) -> None:
    plan = make_plan(3, 40)
    each = plan.cells[0].counts["C"]
    tally = drive(make_plan(3, 40, limits={"flops": 2.5 * each}))
    assert tally.stopped is not None
    assert tally.stopped.startswith(
        f"out of budget: of the budget of {in_words(2.5 * each)} FLOPs {in_words(2 * each)}"
    )
    assert (tally.finished, tally.planned, tally.failed) == (2, 1, {})
    again = drive(make_plan(3, 40, limits={"flops": 2.5 * each}))
    assert (again.finished, again.skipped, again.stopped) == (0, 2, tally.stopped), "what is spent stays spent"
    assert drive(make_plan(3, 40, limits={"flops": 3 * each})).finished == 1
    assert_whole(store, plan, 40)
