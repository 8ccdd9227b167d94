"""The driver without Ray: cells that others try, and the time that cells are predicted to take on the pool's GPUs."""

import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from refusing import refuse_claims
from searched import end, make_corpus, search_plan

from cluster import connection, driver, ledger, pool, standing, tasks
from cluster.calibration import Calibration, _to_json, pool_calibration
from cluster.claims import Claim
from cluster.control import cancel
from cluster.driver import Tally, _Run, run_study
from cluster.hands import take_up
from cluster.hardware import kind_of, processor
from cluster.ledger import register
from cluster.placement import Demand, Fleet, Node, Place
from cluster.pulse import Pulse
from cluster.queue import Queue
from cluster.scheduling import Bounds, Job, Schedule
from cluster.searching import Searching
from cluster.simulation import simulate
from cluster.tasks import Task
from sweeps.cell import Cell
from sweeps.corpora import CorpusInfo
from sweeps.errors import InputError
from sweeps.grids import Plan, examples, plan_study
from sweeps.planned import PlannedCell
from sweeps.records import FREE_SPACE, append_rows, write_json
from sweeps.store import (
    Attempt,
    Store,
    attempt_epochs,
    begin_attempt,
    cell_state,
    commit_result,
    forgive,
    open_store,
    read_end,
    read_plan,
    record_error,
)
from sweeps.study import Study
from sweeps.timing import Costs, forward_features, step_features

HOUR = 3600.0
ONE, GANG, QUARTER = Demand(1, 1.0), Demand(8, 1.0), Demand(1, 0.25)
H100 = "NVIDIA H100 80GB HBM3"


class StubPool:
    """Room of which every cell takes the same."""

    def __init__(self, demand: Demand, models: Collection[str]) -> None:
        self._demand, self._models = demand, set(models)
        self.device = "cuda" if demand.gpus else "cpu"

    def demand(self, _: Any) -> Demand:
        return self._demand

    def models(self) -> set[str]:
        return self._models


@pytest.fixture(autouse=True)
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's machine has no GPU, whatever that of the test has."""
    monkeypatch.setattr(driver, "local_gpus", tuple)


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusInfo:
    return make_corpus(tmp_path)


@pytest.fixture
def store(tmp_path: Path, corpus: CorpusInfo) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def claim(store: Store) -> Iterator[Claim]:
    with Claim(store, "s") as held:
        yield held


@pytest.fixture
def other(store: Store) -> Iterator[Claim]:
    """The living driver of another study on the store."""
    with Claim(store, "other") as held:
        yield held


@pytest.fixture
def make_plan(corpus: CorpusInfo) -> Callable[..., Plan]:
    def make(*tokens: int, **more: Any) -> Plan:
        declared: dict[str, Any] = {
            "name": "s",
            "corpus": {"source": "markov", "options": {"vocab_size": 8, "tokens": 60_000}},
            "context": 32,
            "families": ["llama"],
            "grid": {"type": "points", "points": [{"size": 10_000, "tokens": one} for one in tokens]},
            "training": {"batch_tokens": 64, "warmup_tokens": 2_000},
        }
        return plan_study(Study.model_validate(declared | more), corpus)

    return make


def run_of(
    store: Store,
    claim: Claim,
    plan: Plan,
    demand: Demand = Demand(),
    models: Collection[str] = ("H100",),
    gpu_hours: float | None = None,
    tally: Tally | None = None,
    workers: int | None = None,
) -> _Run:
    """A run that has met a cluster of one node with eight GPUs."""
    search = Searching(store, plan)
    search.grow(0)
    register(store, search.plan, b"")
    mirror = SimpleNamespace(fault=None, link=None)
    missing = [one for one in search.plan.cells if cell_state(store, one.cell.id).state in ("planned", "running")]
    tally = tally or Tally()
    run = _Run(store, search, mirror, claim, tally, lambda _: None, None, 60.0, 3, workers)  # type: ignore[arg-type]
    run.standing.elsewhere = {one.cell.id: one for one in missing}
    run.schedule.bounds = Bounds(units=workers, gpu_hours=gpu_hours)
    run.fleet.add(Node("n", 16, 8))
    run.pool, run.demand, run.slots = StubPool(demand, models), demand, 1  # type: ignore[assignment]
    run._predict()
    return run


def turn(run: _Run) -> None:
    """A turn of the driver's loop in which no worker is asked: what others have taken is all that is there."""
    run._look()
    run._grow()
    while (unit := run.queue.take(time.monotonic(), "cpu")) is not None:
        run.tasks.start(run.pool, unit, 1)


def calibrate(store: Store, cell: Cell, device: str, seconds: float, kind: str | None = None) -> None:
    """By this calibration every cell takes so long on one worker of a kind."""
    steps = len(step_features(cell.shape, cell.sequences, cell.sequences))
    forwards = len(forward_features(cell.shape, 1))
    costs = Costs(step=(0.0,) * steps, forward=(0.0,) * forwards, window=0.0, build=seconds, largest=1e30)
    kind = kind or device.lower().replace(" ", "-")
    made = Calibration(
        kind=kind,
        device=device,
        points=(),
        costs={f"{cell.family} {cell.precision}": costs},
        workers=1,
        host="h",
        versions={},
        measured="2026-01-01T00:00:00Z",
    )
    write_json(store.root / "hardware" / f"{kind}.json", _to_json(made))


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

    take()
    assert run._progress().eta_seconds is None, "nothing is known of its pace yet"
    trained_to(38_000)
    assert run._progress().eta_seconds == pytest.approx(60, rel=0.05), "a twentieth in a minute, another is left"
    (store.checkpoints(one.cell.id, 1) / "38000").mkdir(parents=True)
    record_error(Attempt(store, one.cell.id, 1), "stopped", "paused")
    ray: Any = SimpleNamespace(get=lambda _: None, exceptions=SimpleNamespace(RayError=RuntimeError))
    run.pool.keep = lambda _: None  # type: ignore[method-assign]
    run.tasks.finish(ray, run.pool, "call")
    take()
    trained_to(39_000)
    assert run._progress().eta_seconds == pytest.approx(20, rel=0.05), "what it did before the pause counts"


# --- predicted times ---------------------------------------------------------------------------------------------


def test_the_trials_of_a_search_keep_a_budget_of_gpu_hours_by_their_predicted_times(
    store: Store, claim: Claim, corpus: CorpusInfo
) -> None:
    plan = search_plan(corpus)
    calibrate(store, examples(plan)[0].cell, H100, HOUR)
    run = run_of(store, claim, plan, ONE, gpu_hours=1.5)
    run._grow()
    assert len(run.queue) > 1
    assert run.queue.take(0.0, "cuda") is not None
    assert run.queue.take(0.0, "cuda") is None, "a second one would come to two GPU-hours"
    told = [entry["seconds_predicted"] for entry in read_plan(store, "s")["cells"]]
    assert told == [pytest.approx(HOUR, abs=1.0)] * len(run.plan.cells)
    for one in run.plan.cells[:1]:
        end(store, one)
    again = run_of(store, claim, plan, ONE)
    again._grow()
    assert all("seconds_predicted" in entry for entry in read_plan(store, "s")["cells"]), "later growth erases none"


def test_a_gang_is_predicted_to_take_its_gpus_for_its_part_of_the_time_and_a_share_for_all_of_it(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(40_000)
    for demand, hours in ((GANG, 1.0), (ONE, 1.0), (QUARTER, 0.25)):
        for budget, begins in ((1.01 * hours, True), (0.99 * hours, False)):
            schedule = Schedule(Fleet([Node("n", 16, 8)]), Bounds(gpu_hours=budget))
            queue = Queue(store, plan, schedule, lambda _, d=demand: d, {plan.cells[0].cell.id: HOUR})  # type: ignore[misc]
            queue.put(plan.cells[0])
            assert (queue.take(0.0, "cuda") is not None) is begins, (demand, budget)


def test_cells_on_gpus_are_not_predicted_from_the_processor_of_the_drivers_machine(
    store: Store, claim: Claim, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(40_000)
    cell = plan.cells[0].cell
    calibrate(store, cell, processor(), 100 * HOUR, kind_of(processor(), threads=1))

    def seconds(demand: Demand, models: Collection[str] = ()) -> list[float | None]:
        run = run_of(store, claim, plan, demand, models)
        run.standing.sort_elsewhere()
        (job,) = run.schedule.waiting()
        (entry,) = read_plan(store, "s")["cells"]
        assert entry.get("seconds_predicted") == job.seconds, "what is on record is what is gone by"
        return [job.seconds and round(job.seconds / HOUR)]

    assert seconds(Demand()) == [100]
    assert seconds(ONE, {"H100"}) == [None]
    calibrate(store, cell, H100, 2 * HOUR)
    assert seconds(ONE, {"H100"}) == [2]
    assert seconds(ONE, {H100}) == [2], "by its full name"
    assert seconds(Demand()) == [100]
    for others in ({"A100"}, {"H100", "A100"}, {""}, set()):
        assert seconds(ONE, others) == [None], others


def test_a_run_says_nothing_new_of_cells_that_have_ended_whatever_else_is_calibrated(
    store: Store, claim: Claim, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(40_000, 50_000)
    done, left = plan.cells
    written: list[dict[str, float]] = []
    write = ledger._write_plan

    def note(*given: Any) -> None:
        write(*given)
        written.append({entry["id"]: entry["seconds_predicted"] for entry in read_plan(store, "s")["cells"]})

    monkeypatch.setattr(ledger, "_write_plan", note)
    calibrate(store, done.cell, processor(), 100 * HOUR, kind_of(processor(), threads=1))
    calibrate(store, done.cell, H100, 2 * HOUR)
    run_of(store, claim, plan, ONE)
    first = written[-1]
    assert first == {one.cell.id: pytest.approx(2 * HOUR, abs=1.0) for one in plan.cells}
    end(store, done)
    written.clear()
    run_of(store, claim, plan, ONE)
    assert written == [first], "the plan is written once, as it was"
    run_of(store, claim, plan)
    assert written[-1][done.cell.id] == first[done.cell.id], "it has trained there"
    assert written[-1][left.cell.id] == pytest.approx(100 * HOUR, abs=1.0)


def test_a_budget_of_gpu_hours_without_predictions_is_said_to_be_of_what_was_used(
    store: Store, claim: Claim, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(40_000)
    run = run_of(store, claim, plan, ONE, gpu_hours=5.0)
    assert [one for one in run.notes if "may go beyond it. `escala calibrate` measures it" in one]
    calibrate(store, plan.cells[0].cell, H100, HOUR)
    assert not run_of(store, claim, plan, ONE, gpu_hours=5.0).notes


def test_a_run_that_ends_before_it_could_begin_anything_tells_its_notes_all_the_same(
    store: Store, claim: Claim, make_plan: Callable[..., Plan]
) -> None:
    said: list[str] = []
    run = run_of(store, claim, make_plan(40_000), ONE, gpu_hours=5.0)
    run.watch = lambda progress: said.extend(progress.notes)
    run.schedule.spent_gpu_seconds, run.began = 6.0 * HOUR, time.monotonic()
    run._work(None)
    assert run.tally.stopped is not None
    assert run.tally.stopped.startswith("out of budget")
    assert [one for one in said if "no calibration tells how long cells take" in one]


def test_a_pool_knows_its_gpus_by_the_names_that_ray_has_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node("a", 8, 8), Node("b", 8, 8), Node("head", 8)]
    monkeypatch.setattr(pool, "cluster_nodes", lambda *_, **__: nodes)
    resources = {"a": {"GPU": 8.0, "accelerator_type:H100": 1.0}, "b": {"GPU": 8.0}, "head": {"CPU": 8.0}}
    there = [{"NodeID": name, "Alive": True, "Resources": told} for name, told in resources.items()]
    there.append({"NodeID": "gone", "Alive": False, "Resources": {}})
    ray = SimpleNamespace(nodes=lambda: there)
    made = pool.Pool(ray, Fleet(), 1, 1, False)
    assert made.models() == {"H100", ""}
    resources["b"]["accelerator_type:H100"] = 1.0
    assert made.models() == {"H100"}


def test_where_two_calibrations_may_be_meant_by_the_name_of_a_gpu_none_is_taken(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    cell = make_plan(40_000).cells[0].cell
    calibrate(store, cell, H100, 1.0)
    assert pool_calibration(store, "cuda", ()) is None, "nor the only one, by no name at all"
    calibrate(store, cell, "NVIDIA H100 PCIe", 2.0)
    assert pool_calibration(store, "cuda", {"H100"}) is None
    found = pool_calibration(store, "cuda", {"NVIDIA H100 PCIe"})
    assert found is not None
    assert found.device == "NVIDIA H100 PCIe"


def test_cells_that_wait_by_their_seconds_are_put_anew_where_others_come_that_have_none(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    few, grown = make_plan(20_000, 30_000), make_plan(20_000, 30_000, 10_000)
    short, middle, long = sorted(grown.cells, key=lambda one: one.cell.tokens)
    seconds = {middle.cell.id: 9.0, long.cell.id: 8.0}
    asked: list[str] = []

    def demand(one: PlannedCell) -> Demand:
        asked.append(one.cell.id)
        return ONE

    queue = Queue(store, few, Schedule(Fleet([Node("n", 16, 8)])), demand, seconds)
    for one in few.cells:
        queue.put(one)
    queue.extend(grown, grown.cells[len(few.cells) :], seconds)
    queue.put(short)
    taken = []
    while (unit := queue.take(0.0, "cuda")) is not None:
        taken += unit.cells
    assert taken == [long, middle, short], "all by their FLOPs"
    assert sorted(asked) == sorted(one.cell.id for one in grown.cells), "each what it asks for once"


def test_a_gang_waits_for_its_turn_by_its_own_time_as_in_a_simulation(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(20_000, 30_000)
    alone, parted = plan.cells
    seconds = {alone.cell.id: 1000.0, parted.cell.id: 8 * 200.0}
    demands = {alone.cell.id: ONE, parted.cell.id: GANG}
    nodes = [Node("n", 16, 8)]
    queue = Queue(store, plan, Schedule(Fleet(nodes)), lambda one: demands[one.cell.id], seconds)
    for one in plan.cells:
        queue.put(one)
    unit = queue.take(0.0, "cuda")
    assert unit is not None
    jobs = [Job(id=name, demand=demands[name], seconds=seconds[name] / demands[name].all_gpus) for name in seconds]
    first = min(simulate(jobs, nodes).turns, key=lambda turn: turn.start)
    assert [one.cell.id for one in unit.cells] == [first.id] == [alone.cell.id]
