"""The mirror between a store and a real MLflow server: whatever happens in between, each row arrives once."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import ROOT, Escala
from faultproxy import FaultProxy, Server, start_server

import cluster.mirror as mirrors
from analysis import load_curves, load_runs
from cluster.claims import Claim, living_drivers
from cluster.mirror import Mirror
from cluster.sync import sync_study
from sweeps.errors import InputError
from sweeps.records import append_rows, read_json, write_json
from sweeps.store import (
    Store,
    begin_attempt,
    cell_state,
    commit_result,
    open_store,
    read_metrics,
    read_plan,
    read_quarantine,
)
from tests.analysis.synthetic import Run, write_study

CELLS = [Run(width=16, budget=1.2e11, seed=seed) for seed in range(4)]


@pytest.fixture
def study(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Store, str]:
    """A store with a study of four finished cells, named after the test."""
    name = request.node.name.replace("[", "-").replace("]", "")
    return open_store(write_study(tmp_path / "store", CELLS, name=name)), name


@pytest.fixture
def proxy(mlflow_server: Server) -> Iterator[FaultProxy]:
    made = FaultProxy(mlflow_server.port)
    yield made
    for thread in made.late:
        thread.join()
    made.down()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits scaled down."""
    monkeypatch.setattr(mirrors, "INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(mirrors, "LONGEST_SECONDS", 0.4)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


def cells_of(store: Store, name: str) -> list[str]:
    return [entry["id"] for entry in read_plan(store, name)["cells"]]


def connected(store: Store, name: str, uri: str, **options: Any) -> Mirror:
    mirror = Mirror(store, name, uri, **options)
    mirror.connect()
    return mirror


def until_through(mirror: Mirror, passes: int = 60) -> None:
    for _ in range(passes):
        mirror.sync()
        if mirror.fault is None:
            return
    raise AssertionError(f"not through after {passes} passes: {mirror.fault}")


def active_runs(server: Server, name: str, tag: str = "escala.cell") -> list[tuple[str, str]]:
    """(value of the tag, run id) of the runs that are not deleted."""
    query = (
        "select t.value, r.run_uuid from runs r join tags t on t.run_uuid = r.run_uuid and t.key = ? "
        "join experiments e on e.experiment_id = r.experiment_id where e.name = ? and r.lifecycle_stage = 'active'"
    )
    return server.rows(query, tag, name)


def tags_of(server: Server, run_id: str) -> dict[str, str]:
    return dict(server.rows("select key, value from tags where run_uuid = ?", run_id))


def assert_exact(server: Server, store: Store, name: str) -> dict[str, str]:
    """One run per cell; its rows are those of the log, none lost, none doubled. Returns cell -> run."""
    runs = active_runs(server, name)
    assert sorted(cell for cell, _ in runs) == sorted(cells_of(store, name))
    for cell, run_id in runs:
        logged = sorted(
            (key, row["tokens"], value, round(row["time"] * 1000))
            for row in read_metrics(store, cell)
            for key, value in row["metrics"].items()
        )
        rows = server.rows("select key, step, value, timestamp from metrics where run_uuid = ?", run_id)
        assert sorted(rows) == logged
        tags = tags_of(server, run_id)
        state = cell_state(store, cell)
        assert tags["escala.state"] == state.state
        assert len(server.rows("select key from params where run_uuid = ?", run_id)) == 12
        (status,) = server.rows("select status from runs where run_uuid = ?", run_id)
        assert status == ({"finished": "FINISHED", "running": "RUNNING"}[state.state],)
    assert len(active_runs(server, name, "escala.parent")) == 1
    return dict(runs)


# --- faults on the wire ------------------------------------------------------------------------------------------


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
    study: tuple[Store, str], proxy: FaultProxy, mlflow_server: Server
) -> None:
    store, name = study
    cell = begin_cell(store, name, seed=99)
    mirror = connected(store, name, proxy.uri)
    mirror.start()
    wait_for(lambda: len(active_runs(mlflow_server, name)) == 5)
    proxy.down()
    began = time.monotonic()
    for order in range(1, 201):
        log(store, cell, order)
    wait_for(lambda: mirror.fault is not None)
    assert time.monotonic() - began < 5.0
    time.sleep(1.2)
    assert mirror.fault
    assert read_json(store.study(name) / "mirror.json")["cells"][cell]["offset"] < size_of_log(store, cell)
    proxy.up()
    finish(store, cell)
    wait_for(lambda: mirror.fault is None and not mirror._open)
    mirror.stop()
    assert mirror.fault is None
    assert_exact(mlflow_server, store, name)


def test_back_off_doubles_up_to_its_limit_and_is_forgotten_after_a_success(
    study: tuple[Store, str], proxy: FaultProxy
) -> None:
    store, name = study
    mirror = connected(store, name, proxy.uri)
    waits: list[float] = []

    class Clock:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            if len(waits) == 6:
                proxy.up()
            return len(waits) == 8

        def is_set(self) -> bool:
            return False

    proxy.down()
    mirror._stopping = Clock()  # type: ignore[assignment]
    mirror._loop()
    assert waits == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.4, 0.4, 0.05, 0.05])


def test_a_refused_cell_is_named_and_the_others_go_on(study: tuple[Store, str], mlflow_server: Server) -> None:
    store, name = study
    bad, *good = sorted(cells_of(store, name))
    log_path = store.attempt(bad, 0) / "log.jsonl"
    content = log_path.read_bytes()
    with log_path.open("ab", buffering=0) as stream:
        append_rows(stream, [{"time": 1.7e9, "tokens": 5, "metrics": {"no: such <key>": 1.0}}])
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
    study: tuple[Store, str], proxy: FaultProxy, mlflow_server: Server
) -> None:
    store, name = study
    cell = begin_cell(store, name, seed=99)
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


def test_a_superseded_mirror_writes_nothing_more(study: tuple[Store, str], mlflow_server: Server) -> None:
    store, name = study
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


# --- rebuild -----------------------------------------------------------------------------------------------------


def test_rebuild_makes_every_run_anew_and_keeps_what_people_said(
    study: tuple[Store, str], mlflow_server: Server
) -> None:
    client = client_of(mlflow_server)
    store, name = study
    assert sync_study(store, name, mlflow_server.uri) is None
    before = assert_exact(mlflow_server, store, name)
    marked, noted, spoilt, _ = before
    client.set_tag(before[marked], "escala.quarantine", "the node was throttled")
    client.set_tag(before[noted], "mlflow.note.content", "look at this one")
    client.set_tag(before[noted], "reviewed", "yes")
    client.log_metric(before[spoilt], "val_loss", 1e9, step=1)
    shares: list[float] = []
    fault = sync_study(store, name, mlflow_server.uri, rebuild=True, progress=lambda what, share: shares.append(share))
    assert fault is None
    assert shares == [0.25, 0.5, 0.75, 1.0]
    after = assert_exact(mlflow_server, store, name)
    assert not set(before.values()) & set(after.values())
    assert read_quarantine(store, name)[marked]["why"] == "the node was throttled"
    assert tags_of(mlflow_server, after[marked])["escala.quarantine"] == "the node was throttled"
    assert tags_of(mlflow_server, after[noted])["mlflow.note.content"] == "look at this one"
    assert tags_of(mlflow_server, after[noted])["reviewed"] == "yes"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_rebuild_that_is_killed_is_mended_by_the_next_sync(
    count: int, study: tuple[Store, str], mlflow_server: Server
) -> None:
    store, name = study
    assert sync_study(store, name, mlflow_server.uri) is None
    environment = {**os.environ, "ESCALA_FAULT": f"mirror.after_create_run:crash@{count}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "escala.py"), "sync", name, "--rebuild", "--store", str(store.root)]
    ended = subprocess.run([*command, "--tracking-uri", mlflow_server.uri], env=environment, capture_output=True)
    assert ended.returncode == -9
    assert sync_study(store, name, mlflow_server.uri) is None
    assert_exact(mlflow_server, store, name)


def test_a_rebuild_without_a_server_changes_nothing(study: tuple[Store, str], proxy: FaultProxy) -> None:
    store, name = study
    assert sync_study(store, name, proxy.uri) is None
    before = (store.study(name) / "mirror.json").read_bytes()
    proxy.choose = lambda path, n: "500" if path == "runs/search" else "pass"
    with pytest.raises(InputError, match="nothing was changed"):
        sync_study(store, name, proxy.uri, rebuild=True)
    proxy.down()
    with pytest.raises(InputError, match="not reachable"):
        sync_study(store, name, proxy.uri, rebuild=True)
    assert (store.study(name) / "mirror.json").read_bytes() == before
    assert not living_drivers(store)


def test_sync_leaves_a_running_study_to_its_driver(
    study: tuple[Store, str], mlflow_server: Server, escala: Escala
) -> None:
    store, name = study
    with Claim(store, name):
        assert sync_study(store, name, mlflow_server.uri) is None
        assert not active_runs(mlflow_server, name)
        refused = escala("sync", name, "--rebuild", "--store", store.root, "--tracking-uri", mlflow_server.uri, ok=2)
        assert f"is being run by process {os.getpid()}" in refused.stderr


def test_a_lost_database_is_noticed_and_filled_again(study: tuple[Store, str], escala: Escala) -> None:
    store, name = study
    database = Server(0, store.root / "mlflow" / "mlflow.db")
    escala("sync", name, "--store", store.root)
    assert_exact(database, store, name)
    database.database.unlink()
    escala("sync", name, "--store", store.root)
    assert_exact(database, store, name)


def test_a_run_deleted_in_mlflow_comes_again_while_its_cell_is_at_work(
    study: tuple[Store, str], mlflow_server: Server
) -> None:
    store, name = study
    cell = begin_cell(store, name, seed=99)
    mirror = connected(store, name, mlflow_server.uri)
    until_through(mirror)
    client_of(mlflow_server).delete_run(dict(active_runs(mlflow_server, name))[cell])
    log(store, cell, 1)
    until_through(mirror)
    finish(store, cell)
    until_through(mirror)
    assert_exact(mlflow_server, store, name)


# --- quarantine --------------------------------------------------------------------------------------------------


def mark(store: Store, name: str, cell: str, why: str | None) -> None:
    """What the command line does in the store."""
    marks = read_quarantine(store, name)
    marks.pop(cell, None)
    if why is not None:
        marks[cell] = {"why": why, "who": "ann", "when": "2025-01-01T00:00:00Z"}
    write_json(store.study(name) / "quarantine.json", marks)


@pytest.mark.parametrize("merged", [None, "old"])
@pytest.mark.parametrize("tag", [None, "old", "theirs"])
@pytest.mark.parametrize("stored", [None, "old", "ours"])
def test_quarantine_is_a_three_way_merge(
    merged: str | None, tag: str | None, stored: str | None, study: tuple[Store, str], mlflow_server: Server
) -> None:
    store, name = study
    client = client_of(mlflow_server)
    cell = cells_of(store, name)[0]
    mark(store, name, cell, merged)
    mirror = connected(store, name, mlflow_server.uri)
    until_through(mirror)
    run_id = dict(active_runs(mlflow_server, name))[cell]
    assert tags_of(mlflow_server, run_id).get("escala.quarantine") == merged
    if tag != merged:
        client.set_tag(run_id, "escala.quarantine", tag) if tag else client.delete_tag(run_id, "escala.quarantine")
    mark(store, name, cell, stored)
    until_through(mirror)
    wanted = tag if tag != merged else stored
    assert read_quarantine(store, name).get(cell, {}).get("why") == wanted
    assert tags_of(mlflow_server, run_id).get("escala.quarantine") == wanted
    if tag not in (merged, stored, None):
        assert read_quarantine(store, name)[cell]["who"] == "MLflow UI"
    if tag == merged and stored not in (merged, None):
        assert tags_of(mlflow_server, run_id)["escala.quarantine.by"] == "ann"
    until_through(connected(store, name, mlflow_server.uri))
    assert read_quarantine(store, name).get(cell, {}).get("why") == wanted, "the next merge finds nothing to do"
    assert tags_of(mlflow_server, run_id).get("escala.quarantine") == wanted


def test_who_set_a_tag_is_read_from_its_companion(study: tuple[Store, str], mlflow_server: Server) -> None:
    store, name = study
    assert sync_study(store, name, mlflow_server.uri) is None
    cell, run_id = active_runs(mlflow_server, name)[0]
    client = client_of(mlflow_server)
    client.set_tag(run_id, "escala.quarantine.by", "bea")
    client.set_tag(run_id, "escala.quarantine", "a spike")
    assert sync_study(store, name, mlflow_server.uri) is None
    found = read_quarantine(store, name)[cell]
    assert (found["why"], found["who"]) == ("a spike", "bea")


def test_a_tag_set_while_the_study_runs_is_heard(
    study: tuple[Store, str], mlflow_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = study
    monkeypatch.setattr(mirrors, "LOOK_SECONDS", 0.2)
    mirror = connected(store, name, mlflow_server.uri)
    mirror.start()
    wait_for(lambda: len(active_runs(mlflow_server, name)) == 4)
    cell, run_id = active_runs(mlflow_server, name)[0]
    client_of(mlflow_server).set_tag(run_id, "escala.quarantine", "odd")
    wait_for(lambda: read_quarantine(store, name).get(cell, {}).get("why") == "odd")
    mark(store, name, cell, None)
    wait_for(lambda: "escala.quarantine" not in tags_of(mlflow_server, run_id))
    mirror.stop()


# --- what people see ---------------------------------------------------------------------------------------------


def test_a_value_that_a_resume_recomputed_otherwise_flags_the_run_and_is_not_sent(
    study: tuple[Store, str], mlflow_server: Server
) -> None:
    store, name = study
    cell = begin_cell(store, name, seed=99)
    log(store, cell, 3)
    again = begin_attempt(store, cell, {"study": name})
    with (again.folder / "log.jsonl").open("ab", buffering=0) as stream:
        differs = {"train_loss": [2.0, 2.00003]}
        append_rows(stream, [{"time": 1.8e9, "tokens": 30, "metrics": {}, "differs": differs}])
        append_rows(stream, [{"time": 1.8e9, "tokens": 40, "metrics": {"train_loss": 1.0}, "differs": differs}])
    mirror = connected(store, name, mlflow_server.uri)
    until_through(mirror)
    commit_result(again, RESULT)
    until_through(mirror)
    run_id = assert_exact(mlflow_server, store, name)[cell]
    flag = tags_of(mlflow_server, run_id)["escala.nondeterminism"]
    assert flag == "train_loss at 30 tokens differs by 3e-05 after a resume: 2 logged, 2.00003 recomputed; and 1 more"
    flagged = [
        run for _, run in active_runs(mlflow_server, name) if "escala.nondeterminism" in tags_of(mlflow_server, run)
    ]
    assert flagged == [run_id]


def test_a_cell_that_another_study_trained_says_so(study: tuple[Store, str], mlflow_server: Server) -> None:
    store, name = study
    cell = cells_of(store, name)[0]
    record = store.attempt(cell, 0) / "attempt.json"
    write_json(record, read_json(record) | {"study": "elsewhere"})
    assert sync_study(store, name, mlflow_server.uri) is None
    runs = assert_exact(mlflow_server, store, name)
    assert tags_of(mlflow_server, runs[cell])["escala.reused"] == "elsewhere"
    assert sum("escala.reused" in tags_of(mlflow_server, run) for run in runs.values()) == 1


def test_the_study_has_a_run_of_its_own_with_plan_and_report(
    study: tuple[Store, str], mlflow_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET_TOKEN", "hunter2")
    store, name = study
    (store.study(name) / "study.yaml").write_text("name: it\n")
    assert sync_study(store, name, mlflow_server.uri) is None
    runs = assert_exact(mlflow_server, store, name)
    ((_, parent),) = active_runs(mlflow_server, name, "escala.parent")
    assert {tags_of(mlflow_server, run)["mlflow.parentRunId"] for run in runs.values()} == {parent}
    assert not mlflow_server.rows("select key from metrics where run_uuid = ?", parent), "it draws no line"
    client = client_of(mlflow_server)
    assert client.get_run(parent).info.run_name == name
    assert client.get_run(parent).info.status == "FINISHED"
    assert {one.path for one in client.list_artifacts(parent)} == {"plan.json", "study.yaml", "environment.json"}
    (store.study(name) / "report.html").write_text("<html>")
    assert sync_study(store, name, mlflow_server.uri) is None
    assert "report.html" in {one.path for one in client.list_artifacts(parent)}
    text = Path(client.download_artifacts(parent, "environment.json")).read_text()
    found = json.loads(text)
    assert {"python", "platform", "host", "versions"} <= set(found)
    assert "mlflow" in found["versions"]
    assert "hunter2" not in text
    assert not set(load_runs(name, "/nowhere", tracking_uri=mlflow_server.uri)["cell"]) - set(runs)


@pytest.mark.slow
def test_a_server_without_artifacts_costs_the_files_and_nothing_else(study: tuple[Store, str], tmp_path: Path) -> None:
    store, name = study
    server, process = start_server(tmp_path, "--no-serve-artifacts")
    try:
        fault = sync_study(store, name, server.uri)
        assert fault is not None
        assert "artifacts in a folder of its own" in fault
        assert_exact(server, store, name)
    finally:
        process.terminate()
        process.wait(30)


def test_frames_from_the_mirror_are_those_of_the_store(
    study: tuple[Store, str], mlflow_server: Server, tmp_path: Path
) -> None:
    import pandas as pd

    store, name = study
    mark(store, name, cells_of(store, name)[1], "odd")
    assert sync_study(store, name, mlflow_server.uri) is None
    away = {"store": tmp_path / "nowhere", "tracking_uri": mlflow_server.uri}
    pd.testing.assert_frame_equal(load_runs(name, **away), load_runs(name, store))
    pd.testing.assert_frame_equal(load_curves(name, **away), load_curves(name, store))


def test_a_record_longer_than_a_tag_arrives_whole(study: tuple[Store, str], mlflow_server: Server) -> None:
    store, name = study
    result = store.cell(cells_of(store, name)[0]) / "result.json"
    write_json(result, read_json(result) | {"state": "diverged", "reason": "why " * 5000})
    assert sync_study(store, name, mlflow_server.uri) is None
    runs = load_runs(name, "/nowhere", tracking_uri=mlflow_server.uri)
    assert "why " * 5000 in set(runs["reason"])


# --- helpers -----------------------------------------------------------------------------------------------------

RESULT = {"state": "finished", "reason": None, "val_loss_final": 2.0, "val_bpb_final": 2.9, "tokens": 1, "seconds": {}}


def begin_cell(store: Store, name: str, seed: int) -> str:
    """One more cell of the study, at work in this process."""
    plan = read_plan(store, name)
    record = read_json(store.cell(plan["cells"][0]["id"]) / "cell.json")
    cell = f"{seed:016x}"
    write_json(store.cell(cell) / "cell.json", record | {"id": cell, "identity": record["identity"] | {"seed": seed}})
    plan["cells"].append({"id": cell, "labels": {}})
    write_json(store.study(name) / "plan.json", plan)
    begin_attempt(store, cell, {"study": name})
    log(store, cell, 0)
    return cell


def log(store: Store, cell: str, order: int) -> None:
    with (store.attempt(cell, 0) / "log.jsonl").open("ab", buffering=0) as stream:
        metrics = {"train_loss": 5.0 / (1 + order), "flops": 1e6 * order}
        append_rows(stream, [{"time": 1.7e9 + order, "tokens": 10 * order, "metrics": metrics}])


def finish(store: Store, cell: str) -> None:
    from sweeps.store import Attempt

    assert commit_result(Attempt(store, cell, 0), RESULT)


def size_of_log(store: Store, cell: str) -> int:
    return (store.attempt(cell, 0) / "log.jsonl").stat().st_size


def client_of(server: Server) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=server.uri)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
