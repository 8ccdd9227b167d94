"""What people and readers find in MLflow: states, flags, files, and the same frames as from the store."""

import json
import shutil
from pathlib import Path

import pytest
from commandline import Escala, ids
from faultproxy import Server, start_server
from mirroring import (
    RESULT,
    active_runs,
    assert_exact,
    client_of,
    connected,
    log,
    mark,
    tags_of,
    until_through,
)

from analysis import load_curves, load_runs
from cluster.cellruns import run_name
from cluster.parent import bring_command
from cluster.sync import sync_study
from sweeps.records import append_rows, read_json, write_json
from sweeps.store import Store, begin_attempt, commit_result, open_store
from tests.analysis.synthetic import Run, record

pytestmark = pytest.mark.usefixtures("quick")


def test_a_value_that_a_resume_recomputed_otherwise_flags_the_run_and_is_not_sent(
    at_work: tuple[Store, str, str], mlflow_server: Server
) -> None:
    store, name, cell = at_work
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
    cell = ids(store, name)[0]
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
    (store.study(name) / "pictures").mkdir()
    (store.study(name) / "pictures" / "audit.png").write_bytes(b"a picture")
    assert sync_study(store, name, mlflow_server.uri) is None
    assert "report.html" in {one.path for one in client.list_artifacts(parent)}
    assert [one.path for one in client.list_artifacts(parent, "pictures")] == ["pictures/audit.png"]
    text = Path(client.download_artifacts(parent, "environment.json")).read_text()
    found = json.loads(text)
    assert {"python", "platform", "host", "versions"} <= set(found)
    assert "mlflow" in found["versions"]
    assert "hunter2" not in text
    assert not set(load_runs(name, "/nowhere", tracking_uri=mlflow_server.uri)["cell"]) - set(runs)


@pytest.mark.slow
def test_a_store_that_was_moved_says_why_mlflow_shows_no_new_report(study: tuple[Store, str], tmp_path: Path) -> None:
    store, name = study
    escala = Escala(tmp_path)
    assert "note:" not in escala("sync", name, "--store", store.root).stdout
    assert f"MLflow shows it after: escala sync {name}" in escala("report", name, "--store", store.root).stdout
    moved = open_store(store.root.rename(tmp_path / "elsewhere"))
    for told in (escala(verb, name, "--store", moved.root).stdout for verb in ("sync", "report")):
        assert f"remove {moved.root / 'mlflow'}, and sync again" in told
    assert not store.root.exists(), "nothing is written where it was"
    shutil.rmtree(moved.root / "mlflow")
    assert "note:" not in escala("sync", name, "--store", moved.root).stdout
    assert list(moved.root.glob("mlflow/artifacts/*/artifacts/report.html"))


@pytest.mark.parametrize("uri", ["", "sqlite:////elsewhere/mlflow.db", "http://127.0.0.1:5001"])
def test_how_a_new_report_comes_into_mlflow_is_said_of_a_study_that_is_there(tmp_path: Path, uri: str) -> None:
    store = open_store(tmp_path)
    assert bring_command(store, "it") is None
    write_json(store.study("it") / "mirror.json", {"tracking_uri": uri or store.tracking_uri})
    server = f" --tracking-uri {uri}" if uri.startswith("http") else ""
    assert bring_command(store, "it") == f"escala sync it{server}"


@pytest.mark.slow
def test_the_table_of_runs_has_what_tells_cells_of_a_size_apart(
    mlflow_server: Server, study: tuple[Store, str]
) -> None:
    store, name = study
    assert sync_study(store, name, mlflow_server.uri) is None
    experiment = client_of(mlflow_server).get_experiment_by_name(name)
    columns = json.loads(experiment.tags["mlflow.sharedViewState.escala"])["selectedColumns"]
    assert columns == [*(f"params.`{key}`" for key in ("N", "D", "C", "learning_rate", "seed")), columns[-1]]


def test_a_runs_name_tells_what_the_study_varies() -> None:
    made = record(Run(width=24, tokens=51_200, seed=2, changes={"learning_rate": 0.004}))
    plain = run_name(made, {})
    assert run_name(made, {}, ["learning_rate", "parametrisation", "schedule"]) == plain.replace(
        " seed 2", " lr=0.004 standard cosine seed 2"
    )
    made["identity"]["parametrisation"] = {"kind": "mup", "base_width": 16}
    assert run_name(made, {"trial": 7}, ["parametrisation"]) == plain.replace(" seed 2", " trial 7 mup seed 2")


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
    mark(store, name, ids(store, name)[1], "odd")
    assert sync_study(store, name, mlflow_server.uri) is None
    away = {"store": tmp_path / "nowhere", "tracking_uri": mlflow_server.uri}
    pd.testing.assert_frame_equal(load_runs(name, **away), load_runs(name, store))
    pd.testing.assert_frame_equal(load_curves(name, **away), load_curves(name, store))


def test_a_record_longer_than_a_tag_arrives_whole(study: tuple[Store, str], mlflow_server: Server) -> None:
    store, name = study
    result = store.cell(ids(store, name)[0]) / "result.json"
    write_json(result, read_json(result) | {"state": "diverged", "reason": "why " * 5000})
    assert sync_study(store, name, mlflow_server.uri) is None
    runs = load_runs(name, "/nowhere", tracking_uri=mlflow_server.uri)
    assert "why " * 5000 in set(runs["reason"])
