"""The mirror between a store and a real MLflow server: whatever happens in between, each row arrives once."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from commandline import ROOT, ids
from faultproxy import FaultProxy, Server
from mirroring import (
    active_runs,
    assert_exact,
    begin_cell,
    connected,
    finish,
    log,
    size_of_log,
    tags_of,
    until_through,
    wait_for,
)

import cluster.mirror as mirrors
from analysis import load_runs
from cluster.mirror import Mirror
from cluster.sync import sync_study
from cluster.tracking import Reached
from sweeps.errors import InputError
from sweeps.records import append_rows, read_json, write_json
from sweeps.store import Attempt, Store, begin_attempt, open_store, read_plan, record_error
from tests.analysis.synthetic import Run, write_study

pytestmark = pytest.mark.usefixtures("quick")

# --- faults on the wire ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["drop", "lose", "500", "500-after", "late:0.3"])
def test_each_request_lost_once_in_each_way_leaves_exactly_one_run_and_one_row(
    fate: str, study: tuple[Store, str], proxy: FaultProxy, mlflow_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = study
    mirror = connected(store, name, proxy.uri)
    changing = ("runs/create", "runs/log-batch", "runs/update")
    proxy.choose = lambda path, n: fate if path in changing and n in (0, 2, 5) else "pass"
    until_through(mirror)
    struck = {path for path, what in proxy.log if what == fate}
    assert struck == set(changing)
    for thread in proxy.late:
        thread.join()
    proxy.choose = lambda path, n: "pass"
    assert not mirror.is_complete(), "what was given up may still be carried out: the mirror looks again"
    monkeypatch.setattr(mirrors, "SETTLED_SECONDS", 0.0)
    until_through(mirror)
    assert_exact(mlflow_server, store, name)
    assert mirror.is_complete()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_faults_on_every_path_lose_and_double_nothing(
    seed: int, study: tuple[Store, str], proxy: FaultProxy, mlflow_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = study
    monkeypatch.setattr(mirrors, "BATCH", 7)  # many requests a cell
    mirror = connected(store, name, proxy.uri)
    chance = random.Random(seed)
    fates = ["drop", "lose", "500", "500-after", "late:0.1"]
    proxy.choose = lambda path, n: chance.choice(fates) if chance.random() < 0.25 else "pass"
    for _ in range(12):
        mirror.sync()
        if chance.random() < 0.2:  # killed and started again: only mirror.json is left
            proxy.choose, before = (lambda path, n: "pass"), proxy.choose
            mirror = connected(store, name, proxy.uri)
            proxy.choose = before
    for thread in proxy.late:
        thread.join()
    proxy.choose = lambda path, n: "pass"
    until_through(connected(store, name, proxy.uri))
    assert_exact(mlflow_server, store, name)


def test_an_outage_is_caught_up_and_asked_after_less_and_less_often(
    at_work: tuple[Store, str, str], proxy: FaultProxy, mlflow_server: Server
) -> None:
    store, name, cell = at_work
    mirror = connected(store, name, proxy.uri)
    mirror.start()
    wait_for(lambda: len(active_runs(mlflow_server, name)) == 5)
    proxy.down()
    for order in range(1, 201):
        log(store, cell, order)
    wait_for(lambda: mirror.fault is not None)
    time.sleep(1.2)
    assert mirror.fault
    assert read_json(store.study(name) / "mirror.json")["cells"][cell]["offset"] < size_of_log(store, cell)
    proxy.up()
    finish(store, cell)
    wait_for(lambda: mirror.fault is None and not mirror._record.open)
    mirror.stop()
    assert mirror.fault is None
    assert_exact(mlflow_server, store, name)


class Clock:
    """Waits no time, notes how long it was to wait, and says that it is enough after so many waits."""

    def __init__(self, most: int, meanwhile: Callable[[int], None]) -> None:
        self.waits: list[float] = []
        self._most, self._meanwhile = most, meanwhile

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self._meanwhile(len(self.waits))
        return len(self.waits) == self._most

    def is_set(self) -> bool:
        return False


def test_back_off_doubles_up_to_its_limit_and_is_forgotten_after_a_success(
    study: tuple[Store, str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = study
    monkeypatch.setattr(mirrors, "SLOW_SECONDS", 0.05)
    mirror = connected(store, name, proxy.uri)
    clock = Clock(8, lambda waits: proxy.up() if waits == 6 else None)
    proxy.down()
    mirror._stopping = clock  # type: ignore[assignment]
    mirror._loop()
    assert clock.waits == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.4, 0.4, 0.05, 0.05])


def test_a_pass_that_took_long_is_followed_by_as_long_a_rest(
    study: tuple[Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(*study)
    took, now = iter([0.01, 0.3, 7.0, 60.0, 0.0]), [0.0]

    def sync(**_: object) -> bool:
        now[0] += next(took)
        return True

    monkeypatch.setattr(mirror, "sync", sync)
    monkeypatch.setattr(mirrors, "time", SimpleNamespace(monotonic=lambda: now[0]))
    mirror._stopping = clock = Clock(5, lambda _: None)  # type: ignore[assignment]
    mirror._loop()
    assert clock.waits == pytest.approx([0.05, 0.05, 0.3, 7.0, 10.0])


def test_a_refused_cell_is_named_and_the_others_go_on(study: tuple[Store, str], mlflow_server: Server) -> None:
    store, name = study
    bad, *good = sorted(ids(store, name))
    log_path = store.attempt(bad, 0) / "log.jsonl"
    content = log_path.read_bytes()
    with log_path.open("ab", buffering=0) as stream:
        append_rows(stream, [{"time": -1.0, "tokens": 5, "metrics": {"before_1970": 1.0}}])
    mirror = connected(store, name, mlflow_server.uri)
    assert mirror.sync(), "the server answers"
    assert mirror.fault is not None
    assert mirror.fault.startswith(f"cell {bad}: ")
    state = read_json(store.study(name) / "mirror.json")["cells"]
    assert all(state[cell]["closed"] for cell in good)
    assert "closed" not in state[bad]
    mirror.sync(final=False)
    assert f"cell {bad}" in mirror.fault, "said as long as it lasts, also while the cell rests"
    log_path.write_bytes(content)
    until_through(mirror)
    assert_exact(mlflow_server, store, name)


def test_the_offset_goes_on_only_after_the_server_acknowledged(
    at_work: tuple[Store, str, str], proxy: FaultProxy, mlflow_server: Server
) -> None:
    store, name, cell = at_work
    mirror = connected(store, name, proxy.uri)
    until_through(mirror)
    before = read_json(store.study(name) / "mirror.json")["cells"][cell]["offset"]
    log(store, cell, 1)
    proxy.choose = lambda path, n: "drop" if path == "runs/log-batch" else "pass"
    mirror.sync()
    assert mirror.fault
    assert read_json(store.study(name) / "mirror.json")["cells"][cell]["offset"] == before
    proxy.choose = lambda path, n: "pass"
    until_through(mirror)
    assert read_json(store.study(name) / "mirror.json")["cells"][cell]["offset"] == size_of_log(store, cell)
    finish(store, cell)
    until_through(mirror)
    assert_exact(mlflow_server, store, name)


# --- crashes of the mirror's own process -------------------------------------------------------------------------

POINTS = ("create_run", "log_batch", "state")


@pytest.mark.slow
@pytest.mark.parametrize("point", [f"mirror.{when}_{what}" for what in POINTS for when in ("before", "after")])
@pytest.mark.parametrize("action", ["crash", "lose"])
def test_a_mirror_that_dies_or_loses_a_reply_at_any_point_is_carried_on_by_the_next(
    point: str, action: str, study: tuple[Store, str], mlflow_server: Server, tmp_path: Path
) -> None:
    store, name = study
    environment = {**os.environ, "ESCALA_FAULT": f"{point}:{action}@2", "PYTHONPATH": str(ROOT)}
    code = f"import sys; sys.argv = ['escala', 'sync', {name!r}, '--store', {str(store.root)!r}, "
    code += f"'--tracking-uri', {mlflow_server.uri!r}]; import cluster.sync, escala; "
    code += "cluster.sync.PASSES = 1; escala.app()"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == (-9 if action == "crash" else 1), ended.stderr
    assert sync_study(store, name, mlflow_server.uri) is None
    assert_exact(mlflow_server, store, name)


def test_where_no_more_threads_can_be_had_one_sends_all(
    study: tuple[Store, str], mlflow_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object) -> None:
        raise RuntimeError("can't start new thread")

    store, name = study
    mirror = connected(store, name, mlflow_server.uri)
    with monkeypatch.context() as patched:
        patched.setattr(mirrors.threading.Thread, "start", refused)
        assert mirror.sync()
    assert mirror.fault is None
    assert_exact(mlflow_server, store, name)


def test_where_it_cannot_be_told_whose_the_study_is_nothing_is_written_and_that_is_said(
    study: tuple[Store, str], mlflow_server: Server
) -> None:
    def unreadable() -> bool:
        raise InputError("driver-0.json cannot be read")

    store, name = study
    mirror = connected(store, name, mlflow_server.uri, holds=unreadable)
    assert not mirror.sync()
    assert "cannot be told: driver-0.json cannot be read" in str(mirror.fault)
    assert active_runs(mlflow_server, name) == []


def test_a_superseded_mirror_writes_nothing_more(
    study: tuple[Store, str], mlflow_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = study
    monkeypatch.setattr(mirrors, "SENDERS", 1)  # so that it is known which cell is the second
    monkeypatch.setattr(mirrors, "TURN", 1)
    lost: list[bool] = []  # the study is lost while the second cell's run is made, and stays so

    def holds() -> bool:
        if len(active_runs(mlflow_server, name)) > 1:
            lost.append(True)
        return not lost

    mirror = connected(store, name, mlflow_server.uri, holds=holds)
    assert not mirror.sync()
    assert "taken the study over" in str(mirror.fault)
    mirror.sync()
    assert len(active_runs(mlflow_server, name)) == 1, "the run that came too late is gone"
    noted = (store.study(name) / "mirror.json").read_bytes()
    assert len(json.loads(noted)["cells"]) == 1, "what it noted while the study was its own"
    assert sync_study(store, name, mlflow_server.uri) is None
    assert_exact(mlflow_server, store, name)


def test_a_pass_costs_nothing_for_cells_that_have_not_begun(tmp_path: Path) -> None:
    planned = [Run(width=16, budget=1.2e11, seed=seed, state="planned") for seed in range(40)]
    store = open_store(write_study(tmp_path / "store", planned, name="large"))
    looks: list[str] = []

    def holds() -> bool:
        looks.append("a look at the claim reads the study's folder")
        return True

    mirror = Mirror(store, "large", holds=holds)
    mirror._reached = Reached(SimpleNamespace(), "1", 0)  # type: ignore[arg-type]
    mirror._found = {}
    mirror._record.parent["run_id"] = "1"
    assert mirror._sync_cells(False, [], None)
    assert not looks
    begun = read_plan(store, "large")["cells"][-1]["id"]
    begin_attempt(store, begun, {})
    assert [one for one in mirror._record.open if mirror._has_begun(one)] == [begun]


def test_what_a_plan_says_anew_of_a_cell_that_is_closed_is_shown(
    study: tuple[Store, str], mlflow_server: Server
) -> None:
    store, name = study
    until_through(connected(store, name, mlflow_server.uri))
    plan = read_plan(store, name)
    for entry in plan["cells"]:
        entry["seconds_predicted"] = 12.5  # as after a calibration
    write_json(store.study(name) / "plan.json", plan)
    until_through(connected(store, name, mlflow_server.uri))
    for _, run_id in active_runs(mlflow_server, name):
        record = json.loads(tags_of(mlflow_server, run_id)["escala.record"])
        assert record["entry"]["seconds_predicted"] == 12.5


def test_fits_leave_out_the_runs_of_cells_that_the_study_has_dropped_until_they_are_back(
    study: tuple[Store, str], mlflow_server: Server, tmp_path: Path
) -> None:
    store, name = study

    def cells() -> list[str]:
        return sorted(load_runs(name, tmp_path / "nowhere", tracking_uri=mlflow_server.uri)["cell"])

    until_through(connected(store, name, mlflow_server.uri))
    plan, every = read_plan(store, name), sorted(ids(store, name))
    write_json(store.study(name) / "plan.json", plan | {"cells": plan["cells"][:1]})
    mirror = connected(store, name, mlflow_server.uri)
    assert not mirror.is_complete()
    until_through(mirror)
    assert cells() == ids(store, name)
    assert len(active_runs(mlflow_server, name)) == len(every), "none is deleted"
    assert mirror.is_complete()
    write_json(store.study(name) / "plan.json", plan)
    until_through(connected(store, name, mlflow_server.uri))
    assert cells() == every


def test_a_failure_that_a_killed_driver_did_not_tell_is_not_complete(
    study: tuple[Store, str], mlflow_server: Server
) -> None:
    store, name = study
    cell = begin_cell(store, name)
    mirror = connected(store, name, mlflow_server.uri)
    until_through(mirror)
    record_error(Attempt(store, cell, 0), "code", "on fire")
    assert not mirror.is_complete()
    until_through(mirror)
    assert mirror.is_complete()
    assert tags_of(mlflow_server, dict(active_runs(mlflow_server, name))[cell])["escala.state"] == "failed"


def test_a_server_that_is_gone_is_asked_again_after_4_8_and_more_seconds_also_after_a_slow_pass(
    study: tuple[Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, clock, waits = Mirror(*study), [0.0], list[float]()
    passes = [(0.0, True), (30.0, True), (1.0, False), (1.0, False), (1.0, False), (0.0, True), (1.0, False)]

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) > len(passes)

    def sync(final: bool = True) -> bool:
        took, answers = (0.0, True) if final else passes[len(waits) - 1]
        clock[0] += took
        return answers

    monkeypatch.setattr(mirrors, "INTERVAL_SECONDS", 2.0)
    monkeypatch.setattr(mirrors, "LONGEST_SECONDS", 60.0)
    monkeypatch.setattr(mirror, "_stopping", SimpleNamespace(wait=wait))
    monkeypatch.setattr(mirror, "sync", sync)
    monkeypatch.setattr(mirrors, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    mirror._loop()
    assert waits == [2, 2, 10, 4, 8, 16, 2, 4]
