"""The driver without Ray: cells that others try, outages, and how far a run is."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from alone import ONE, run_of, turn
from refusing import refuse_claims
from searched import end, make_corpus, search_plan

from cluster import connection, driver, pool, standing, tasks
from cluster.claims import Claim
from cluster.control import cancel
from cluster.driver import Tally, _Run, run_study
from cluster.hands import take_up
from cluster.pace import EVALUATIONS, evaluation_work, own_work
from cluster.placement import Demand, Node, Place
from cluster.pulse import Pulse
from cluster.searching import Searching
from cluster.tasks import Task
from sweeps.corpora import CorpusInfo
from sweeps.errors import InputError
from sweeps.grids import Plan
from sweeps.planned import PlannedCell
from sweeps.records import FREE_SPACE, append_rows, write_json
from sweeps.schedules import SUBSET_TOKENS
from sweeps.store import (
    Attempt,
    Store,
    attempt_epochs,
    begin_attempt,
    commit_result,
    forgive,
    open_store,
    read_end,
    read_plan,
    record_error,
)

# --- cells that others try ---------------------------------------------------------------------------------------


def test_a_cell_that_fails_in_another_studys_hands_has_failed_and_is_waited_for_no_more(
    store: Store, claim: Claim, other: Claim, make_plan: Callable[..., Plan]
) -> None:
    plan, tally = make_plan(40_000), Tally()
    cell_id = plan.cells[0].cell.id
    attempt = begin_attempt(store, cell_id, {"study": "other", "driver": other.number})
    run = run_of(store, claim, plan, tally=tally)
    turn(run)
    assert (list(run.standing.elsewhere), tally.failed) == ([cell_id], {})
    record_error(attempt, "code", "it is on fire")
    turn(run)
    assert tally.failed == {cell_id: "code: it is on fire"}
    assert (len(run.queue), run.standing.elsewhere, list(run.standing.failed)) == (0, {}, [cell_id])
    assert [one for one in run.ended if "failed (code: it is on fire)" in one]


def test_a_forgiven_cell_that_another_study_is_quicker_to_train_is_not_said_to_have_failed(
    store: Store, claim: Claim, other: Claim, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(40_000)
    (one,) = plan.cells
    tally = Tally(failed={one.cell.id: "code: it is on fire"})
    mine = {"study": "other", "driver": other.number}
    record_error(begin_attempt(store, one.cell.id, mine), "code", "it is on fire")
    run = run_of(store, claim, plan, tally=tally)
    run.standing.failed = {one.cell.id: one}
    turn(run)
    assert list(tally.failed) == [one.cell.id]
    forgive(store, one.cell.id, "a test")
    attempt = begin_attempt(store, one.cell.id, mine)
    turn(run)
    assert (tally.failed, list(run.standing.elsewhere)) == ({}, [one.cell.id])
    commit_result(attempt, {"state": "finished", "reason": None, "val_loss_final": 2.0, "flops_spent": 1.0})
    turn(run)
    assert (tally.failed, tally.skipped, run.standing.elsewhere, run.standing.failed) == ({}, 1, {}, {})


@pytest.mark.parametrize("told", [{"flops_spent": 0.0}, {"flops_spent": 5.0}, {}])
def test_a_result_is_charged_what_it_cost_also_where_that_is_nothing(
    told: dict[str, float], store: Store, claim: Claim, other: Claim, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(40_000)
    (one,) = plan.cells
    run = run_of(store, claim, plan)
    attempt = begin_attempt(store, one.cell.id, {"study": "other", "driver": other.number})
    turn(run)
    commit_result(attempt, {"state": "diverged", "reason": "val_loss is nan after 0 tokens", **told})
    turn(run)
    assert run.schedule.spent_flops == told.get("flops_spent", one.counts["C"])


def test_a_search_hears_of_a_trial_whose_cell_has_failed_in_another_study_before(
    store: Store, claim: Claim, corpus: CorpusInfo, tmp_path: Path
) -> None:
    plan, tally = search_plan(corpus, trials=1), Tally()
    (tmp_path / "asked").mkdir()
    make_corpus(tmp_path / "asked")
    (one,) = Searching(open_store(tmp_path / "asked" / "store"), plan).grow(1)
    record_error(begin_attempt(store, one.cell.id, {"study": "other", "driver": 0}), "code", "it is on fire")
    run = run_of(store, claim, plan, tally=tally)
    turn(run)
    assert [entry["id"] for entry in read_plan(store, "s")["cells"]] == [one.cell.id], "the same trial is asked"
    turn(run)
    assert tally.failed == {one.cell.id: "code: it is on fire"}
    left = [run.search.goes_on(), len(run.queue), len(run.standing.elsewhere)]
    assert not any(left), "nothing that the loop would wait for"


def test_a_cell_in_other_hands_costs_no_look_at_those_that_wait_and_moves_none_of_them(
    store: Store, claim: Claim, other: Claim, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(20_000, 30_000, 40_000)
    short, _, long = plan.cells
    begin_attempt(store, long.cell.id, {"study": "other", "driver": other.number})
    run = run_of(store, claim, plan)
    run._look()
    assert (len(run.standing.elsewhere), len(run.queue)) == (1, 2)
    run.schedule.remove(short.cell.id)
    run.queue.put(short, first=True)  # as one whose node was taken away
    looked: list[str] = []
    settle = standing.settle
    monkeypatch.setattr(standing, "settle", lambda *given: looked.append(given[1]) or settle(*given))
    run._look()
    assert looked == [long.cell.id]
    unit = run.queue.take(0.0, "cpu")
    assert unit is not None
    assert unit.cells == [short], "it goes before longer ones still"


def test_a_run_waits_for_a_disk_that_refuses_for_a_moment(
    store: Store, make_plan: Callable[..., Plan], claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(store, claim, make_plan(4_096))
    end(store, run.plan.cells[0])
    refuse_claims(monkeypatch, 3)
    run.began = time.monotonic()
    run._work(None)
    assert (run.tally.skipped, run.tally.stopped) == (1, None)


def test_a_worker_is_not_taken_for_dead_since_the_disk_kept_its_signs_back(
    store: Store, make_plan: Callable[..., Plan], claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("pulse.LOOK_SECONDS", 0.0), ("pulse.SILENCE_SECONDS", 1.0), ("tasks.BEAT_SECONDS", 0.5)):
        monkeypatch.setattr(f"cluster.{name}", seconds)
    run = run_of(store, claim, make_plan(4_096))
    attempt = begin_attempt(store, run.plan.cells[0].cell.id, {"study": "s"})
    write_json(attempt.folder / "heartbeat.json", {"progressed": 1.0})
    pulse = Pulse(store, attempt.cell_id, 0, "s")
    assert pulse.fate() is None
    run.tasks.by_call = {"task": SimpleNamespace(hands=[SimpleNamespace(pulse=pulse)])}  # type: ignore[dict-item]
    refuse_claims(monkeypatch, 3)
    assert run._holds()
    assert pulse.fate() is None
    time.sleep(1.1)
    assert pulse.fate() == "no sign of life for 1 s"


def test_a_local_run_keeps_its_only_node_when_ray_does_not_answer_at_a_workers_death(
    store: Store, claim: Claim, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    class RayError(Exception): ...

    class OtherError(RayError): ...

    def silent(*_: object) -> None:
        raise RayError("it does not answer")

    plan = make_plan(40_000)
    run = run_of(store, claim, plan)
    run.standing.sort_elsewhere()
    unit = run.queue.take(0.0, "cpu")
    assert unit is not None
    run.tasks.by_call["call"] = Task(None, take_up(store, "s", unit.cells)[0], unit.start)
    monkeypatch.setattr("cluster.nodes.living_nodes", silent)
    errors = SimpleNamespace(RayError=RayError, OutOfMemoryError=OtherError, RayTaskError=OtherError)
    run.pool.lose = lambda _: None  # type: ignore[method-assign]
    run.tasks.finish(SimpleNamespace(get=silent, exceptions=errors), run.pool, "call")
    end = read_end(store, plan.cells[0].cell.id, 0)
    assert end is not None
    assert end[0] == "preemption"
    assert not run.tasks
    again = run.queue.take(0.0, "cpu")
    assert again is not None, "else the loop would wait for a node that nothing adds"
    assert (again.cells, again.start.place.node) == (unit.cells, unit.start.place.node)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("infrastructure", f"InputError: the disk is full: {FREE_SPACE}"), ("out_of_memory", "the worker died")],
    ids=["a full disk", "one failure thrice"],
)
def test_cells_that_were_only_probed_do_not_end_a_run_by_how_they_ended_in_an_earlier_one(
    kind: str, message: str, store: Store, claim: Claim, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(20_000, 30_000, 40_000)
    for one in plan.cells:
        record_error(begin_attempt(store, one.cell.id, {"study": "s"}), kind, message)
    run = run_of(store, claim, plan)
    run.standing.sort_elsewhere()

    def turn(begins: bool) -> None:
        while (unit := run.queue.take(0.0, "cpu")) is not None:
            hands, _ = take_up(store, "s", unit.cells)
            run.tasks.by_call[len(run.tasks)] = Task(None, hands, unit.start)
        for call, task in list(run.tasks.by_call.items()):
            for hand in task.hands if begins else ():
                record_error(begin_attempt(store, hand.one.cell.id, {"study": "s"}), kind, message)
            run.tasks.finish(ray, run.pool, call)

    ray: Any = SimpleNamespace(get=lambda _: None, exceptions=SimpleNamespace(RayError=RuntimeError))
    run.pool.keep = lambda _: None  # type: ignore[method-assign]
    turn(begins=False)
    assert (run.standing.halt, len(run.queue)) == (None, 3)
    turn(begins=True)
    assert run.standing.halt is not None, "what happens now counts"


def test_a_worker_is_not_killed_for_the_silence_of_an_attempt_of_another_study(
    store: Store, claim: Claim, other: Claim, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left that cell of its stack to the other, whose node has died, and trains the rest."""
    for name, seconds in (("LOOK_SECONDS", 0.0), ("SILENCE_SECONDS", 0.2), ("HANG_SECONDS", 0.2)):
        monkeypatch.setattr(f"cluster.pulse.{name}", seconds)
    plan = make_plan(20_000, 30_000)
    run = run_of(store, claim, plan)
    run.standing.sort_elsewhere()
    hands, _ = take_up(store, "s", list(plan.cells))
    theirs, ours = hands
    task = Task("worker", hands, None)  # type: ignore[arg-type]
    driven = {"study": "other", "driver": other.number}
    for hand, note in ((theirs, driven), (ours, {"study": "s", "driver": claim.number})):
        attempt = begin_attempt(store, hand.one.cell.id, note)
        write_json(attempt.folder / "heartbeat.json", {"progressed": 1.0})
    assert task.fate() is None
    record_error(Attempt(store, ours.one.cell.id, 0), "stopped", "others of its program go on")
    time.sleep(0.3)
    assert task.fate() is None
    begin_attempt(store, ours.one.cell.id, {"study": "s", "driver": claim.number})
    time.sleep(0.3)
    assert task.fate() is not None, "its own attempt is silent"


@pytest.mark.parametrize("now", [False, True])
def test_a_run_that_is_to_end_does_not_wait_for_units_that_have_no_worker_yet(
    now: bool, store: Store, make_plan: Callable[..., Plan], claim: Claim
) -> None:
    run, ended = run_of(store, claim, make_plan(4_096), ONE), list[str]()
    run.standing.sort_elsewhere()
    unit = run.queue.take(time.monotonic(), "cpu")
    assert unit is not None
    taken, _ = take_up(store, "s", unit.cells)
    given = time.monotonic() - tasks.STARTING_SECONDS - 1
    run.tasks.by_call = {"task": Task("worker", taken, unit.start, given)}
    run.pool.end = ended.append  # type: ignore[method-assign]
    cancel(store, "s", now=now)
    run.began = time.monotonic()
    run._work(None)
    assert ended == ["worker"]
    assert (len(run.queue), run.schedule.running, run.schedule.spent_gpu_seconds) == (1, {}, 0.0)
    assert run.tally.stopped is not None
    assert not attempt_epochs(store, unit.cells[0].cell.id), "no cell is charged for it"


def test_ray_ends_with_the_run_where_a_full_disk_takes_no_record_of_what_was_used(
    store: Store, claim: Claim, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(store, claim, make_plan(40_000))
    full, over = InputError("cannot write: the disk is full"), []

    def refuse(*_: object) -> None:
        raise full

    ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=RuntimeError))
    monkeypatch.setattr(driver, "start_ray", lambda *_: ray)
    monkeypatch.setattr(driver, "stop_ray", over.append)
    monkeypatch.setattr(run, "_meet_cluster", refuse)
    monkeypatch.setattr(run.usage, "note", refuse)
    with pytest.raises(InputError, match="the disk is full"):
        run.run("local")
    assert over == [ray]


def test_a_run_that_is_stopped_while_ray_starts_tells_so_as_one_that_is_stopped_later(
    store: Store, claim: Claim, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C that got through to the command line would end it with exit code 130, and without a word."""
    plan = make_plan(40_000)
    run = run_of(store, claim, plan)
    run.standing.elsewhere = {one.cell.id: one for one in plan.cells}

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "start_ray", stopped)
    run.run("local")
    assert (run.tally.stopped, run.tally.planned) == ("interrupted", len(plan.cells))


@pytest.mark.parametrize(("cells", "failing", "left"), [(1, False, 0), (1, True, 0), (2, False, 1)])
def test_a_drain_while_the_last_cells_run_leaves_a_complete_study_and_nothing_that_would_go_on(
    cells: int,
    failing: bool,
    left: int,
    store: Store,
    make_plan: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, running, wishes = make_plan(*[20_000, 30_000][:cells]), list[PlannedCell](), list[str | None]()

    class Ray:
        """Its one worker ends a cell when the driver has heard of the drain."""

        exceptions = SimpleNamespace(RayError=RuntimeError)

        def wait(self, calls: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
            if not wishes:
                cancel(store, "s", now=False)
            if "drain" not in wishes:
                return [], calls
            while running:
                end(store, running.pop(), "failed" if failing else "finished")
            return calls, []

        def get(self, _: Any) -> None: ...

    def give(root: str, ids: list[str], *_: Any) -> str:
        running.extend(one for one in plan.cells if one.cell.id in ids)
        return "call"

    worker = SimpleNamespace(run=SimpleNamespace(options=lambda name: SimpleNamespace(remote=give)))
    stub = SimpleNamespace(device="cpu", cores=1, demand=lambda _: Demand(), worker=lambda _: worker)
    stub.keep = stub.warm = lambda _: None
    stub.models = set

    def meet(run: _Run, *_: Any) -> None:
        run.fleet.add(Node("n", 16))
        run.pool, run.demand = stub, Demand()  # type: ignore[assignment]

    own = SimpleNamespace(look=lambda: None, died=lambda: None, end=lambda: None)
    mirror = SimpleNamespace(fault=None, link=None, connect=lambda: None, start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(_Run, "_meet_cluster", meet)
    monkeypatch.setattr(driver, "LOOK_SECONDS", 0.0)
    for name, value in (("start_ray", Ray()), ("stop_ray", None), ("OwnRay", own), ("Mirror", mirror)):
        monkeypatch.setattr(driver, name, lambda *_, given=value: given)
    tally = run_study(store, plan, b"", watch=lambda progress: wishes.append(progress.wish), workers=1)
    assert (tally.finished, len(tally.failed), tally.planned) == (int(not failing), int(failing), left)
    if left or failing:
        assert tally.stopped is not None
        assert tally.stopped.startswith("drained by")
    else:
        assert tally.stopped is None, "the command would end with exit code 1, and be run again"


@pytest.mark.parametrize("gpus", [4, 0])
def test_the_only_worker_on_a_machine_of_many_cores_may_be_a_gang_and_has_one_thread_a_process(
    gpus: int, store: Store, claim: Claim, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("ray.init", lambda **given: asked.update(given))
    connection._start("local", 1)
    made, killed = list[tuple[Place, float]](), list[Place]()
    monkeypatch.setattr(pool, "cluster_nodes", lambda *_, **__: [Node("m", asked["num_cpus"], gpus)])
    monkeypatch.setattr(pool, "make_worker", lambda _, place, __, part: made.append((place, part)) or place)
    run = run_of(store, claim, make_plan(20_000, 30_000, 40_000, workers=2), workers=1)
    run.fleet.remove("n")
    run._meet_cluster(SimpleNamespace(kill=killed.append), "local")
    run.standing.sort_elsewhere()
    unit = run.queue.take(0.0, run.pool.device)
    assert unit is not None
    assert unit.start.place.demand.workers == 2
    assert run.queue.take(0.0, run.pool.device) is None, "one at a time, as was asked"
    gang = run.pool.worker(unit.start.place)
    assert made == [(gang, 1 / 2)], "its two processes share the memory with no others"
    monkeypatch.setattr(driver, "LARGE_STEP_FLOPS", 0.0)
    assert run._threads(unit.cells) == 1, "the other cores are for something else"
    run.pool.keep(gang)
    place = run.fleet.place(Demand(1, unit.start.place.demand.gpus))
    assert place is not None
    run.pool.worker(place)
    assert killed == [gang], "an idle worker is one too"
    connection._start("local", 100)
    assert asked["num_cpus"] == 100, "who wants more workers than there are cores gets them"


# --- how far it is -----------------------------------------------------------------------------------------------


def test_a_search_that_has_asked_for_nothing_yet_tells_how_it_stands(
    store: Store, claim: Claim, corpus: CorpusInfo
) -> None:
    run = run_of(store, claim, search_plan(corpus))
    run.began = time.monotonic()
    assert not run.plan.cells
    assert run.search.to_come()[1] > 0
    assert run._progress().eta_seconds is None


def test_a_cell_that_diverged_counts_for_the_steps_that_it_took(
    store: Store, claim: Claim, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(40_000, 20_000)
    longer, shorter = sorted(plan.cells, key=lambda one: -one.cell.tokens)
    run = run_of(store, claim, plan)
    run.standing.sort_elsewhere()
    unit = run.queue.take(0.0, "cpu")
    assert unit is not None
    assert unit.cells == [longer]
    run.tasks.by_call["call"] = Task(None, take_up(store, "s", unit.cells)[0], unit.start)
    attempt = begin_attempt(store, longer.cell.id, {"study": "s"})
    steps = 4_000 // longer.cell.batch_tokens
    commit_result(attempt, {"state": "diverged", "reason": "NaN", "val_loss_final": None, "steps": steps})
    run.began = time.monotonic() - 60
    ray: Any = SimpleNamespace(get=lambda _: None, exceptions=SimpleNamespace(RayError=RuntimeError))
    run.pool.keep = lambda _: None  # type: ignore[method-assign]
    run.tasks.finish(ray, run.pool, "call")
    left = own_work(run.queue, shorter) / own_work(run.queue, longer)
    trained = steps * longer.cell.batch_tokens / longer.cell.tokens
    whole = 1 - evaluation_work(run.queue, longer) / own_work(run.queue, longer)
    assert run._progress().eta_seconds == pytest.approx(60 * left / (trained * whole), rel=0.05)


def test_the_end_is_told_by_what_this_run_has_trained_not_by_what_checkpoints_held(
    store: Store, claim: Claim, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(40_000)
    (one,) = plan.cells
    before = begin_attempt(store, one.cell.id, {"study": "s"})
    (store.checkpoints(one.cell.id, 0) / "36000").mkdir(parents=True)
    record_error(before, "preemption", "its driver was gone")
    run = run_of(store, claim, plan)
    run.standing.sort_elsewhere()
    run.began = time.monotonic() - 60

    def take() -> None:
        unit = run.queue.take(0.0, "cpu")
        assert unit is not None
        run.tasks.by_call["call"] = Task(None, take_up(store, "s", unit.cells)[0], unit.start)

    def trained_to(tokens: int) -> None:
        attempt = begin_attempt(store, one.cell.id, {"study": "s"})
        with (attempt.folder / "log.jsonl").open("ab", buffering=0) as stream:
            append_rows(stream, [{"time": 0.0, "tokens": tokens, "metrics": {"train_loss": 2.0}}])

    whole = plan.corpus.validation_tokens
    evaluated = (whole + EVALUATIONS * min(whole, SUBSET_TOKENS)) / 3  # a pass forward alone
    take()
    assert run._progress().eta_seconds is None, "nothing is known of its pace yet"
    trained_to(38_000)
    left = 2_000 + evaluated
    assert run._progress().eta_seconds == pytest.approx(60 * left / 2_000, rel=0.05), "a twentieth took a minute"
    (store.checkpoints(one.cell.id, 1) / "38000").mkdir(parents=True)
    record_error(Attempt(store, one.cell.id, 1), "stopped", "paused")
    ray: Any = SimpleNamespace(get=lambda _: None, exceptions=SimpleNamespace(RayError=RuntimeError))
    run.pool.keep = lambda _: None  # type: ignore[method-assign]
    run.tasks.finish(ray, run.pool, "call")
    take()
    trained_to(39_000)
    left = 1_000 + evaluated
    assert run._progress().eta_seconds == pytest.approx(60 * left / 3_000, rel=0.05), "the time before the pause counts"
