"""A run trains every planned cell once, whatever is killed, and a second run does nothing."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from commandline import ROOT, TINY, Escala, Finished

from cluster.claims import read_holder
from sweeps.records import append_rows, read_json, read_rows, write_json
from sweeps.store import Store, attempt_epochs, attempt_lives, read_metrics, read_plan


def results(store: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: read_json(path) for path in (store / "cells").glob("*/result.json")}


def mirrored(store: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{store / 'mlflow' / 'mlflow.db'}?mode=ro", uri=True)


def assert_mirror_is_exact(store: Path, study: str) -> None:
    """One MLflow run per cell; its metric rows are the log's, none lost, none doubled."""
    cells = [entry["id"] for entry in read_plan(Store(store), study)["cells"]]
    with mirrored(store) as database:
        runs = dict(database.execute("select value, run_uuid from tags where key = 'escala.cell'").fetchall())
        count = database.execute("select count(*) from tags where key = 'escala.cell'").fetchone()[0]
        assert count == len(runs)
        assert set(cells) <= set(runs)
        for cell_id in cells:
            logged = {
                (key, row["tokens"]): (value, round(row["time"] * 1000))
                for row in read_metrics(Store(store), cell_id)
                for key, value in row["metrics"].items()
            }
            query = "select key, step, value, timestamp from metrics where run_uuid = ?"
            rows = database.execute(query, (runs[cell_id],)).fetchall()
            assert len(rows) == len(logged)
            assert {(key, step): (value, stamp) for key, step, value, stamp in rows} == logged


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early:\n{process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def long_study(cells: int, tokens: int = 150_000) -> str:
    """Cells of a few seconds each, so that a kill comes in the middle."""
    grid = f"grid: {{type: points, points: [{{size: 10000, tokens: {tokens}}}]}}\nseeds: {list(range(cells))}\n"
    return re.sub(r"grid:.*?\ntraining", f"{grid}training", TINY, flags=re.S)


def test_every_planned_cell_finishes_once(finished: Finished) -> None:
    plan = read_plan(Store(finished.store), "tiny")
    ended = results(finished.store)
    assert set(ended) == {entry["id"] for entry in plan["cells"]}
    assert len(ended) == 7, "two budgets of three sizes, and one more seed at the centre of the cheaper one"
    assert {result["state"] for result in ended.values()} == {"finished"}
    assert {result["attempt"] for result in ended.values()} == {0}
    assert "7 finished" in finished.output


def test_every_cell_is_one_mlflow_run_over_tokens(finished: Finished) -> None:
    assert_mirror_is_exact(finished.store, "tiny")
    with mirrored(finished.store) as database:
        params = Counter(run for (run,) in database.execute("select run_uuid from params"))
        keys = database.execute("select count(distinct key) from metrics").fetchone()[0]
        states = {value for (value,) in database.execute("select value from tags where key = 'escala.state'")}
        statuses = {value for (value,) in database.execute("select status from runs")}
        query = "select r.name from runs r join tags t on t.run_uuid = r.run_uuid where t.key = 'escala.cell'"
        names = [name for (name,) in database.execute(query)]
    assert set(params.values()) == {12}
    assert keys < 50
    assert states == {"finished"}
    assert statuses == {"FINISHED"}
    assert all(re.match(r"llama N=\S+k D=\S+k C=\de8", name) for name in names), names


def test_a_second_run_trains_nothing_and_starts_neither_ray_nor_mlflow(finished: Finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.store.glob("cells/*/*")}
    code = (
        "import sys, escala; sys.argv[1:] = sys.argv[1:]\n"
        "try: escala.app()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'ray', 'mlflow', 'torch'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "run", str(finished.study), "--store", str(finished.store)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "nothing to train: all 7 cells have ended already" in run.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.store.glob("cells/*/*")} == before


@pytest.mark.slow
def test_an_edited_study_trains_only_what_is_new_and_says_so(copy_of_finished: Callable[[], Finished]) -> None:
    copy = copy_of_finished()
    study = copy.escala.study(TINY.replace("budgets: [4e8, 8e8]", "budgets: [2e8, 4e8, 8e8]"), "tiny.yaml")
    before = results(copy.store)
    plan = json.loads(copy.escala("plan", study, "--store", copy.store, "--json").stdout)
    assert Counter(cell["state"] for cell in plan["cells"])["planned"] == plan["totals"]["missing"]
    run = copy.escala("run", study, "--store", copy.store, "--workers", 2)
    assert "+4 cells, 6 kept, 1 no longer planned, 6 done" in run.stdout
    after = results(copy.store)
    assert len(after) == 11
    assert all(after[cell_id] == result for cell_id, result in before.items())
    assert_mirror_is_exact(copy.store, "tiny")


@pytest.mark.slow
def test_a_killed_driver_loses_nothing_and_only_the_missing_cells_train_again(escala: Escala, tmp_path: Path) -> None:
    alone = long_study(5, tokens=60_000) + "stack: off\n"  # a stack's members would all end at once
    study, store = escala.study(alone), tmp_path / "store"
    process = escala.start("run", study, "--store", store, "--workers", 2)
    wait_for(lambda: bool(results(store)), process)
    process.kill()
    process.communicate()
    cells, deadline = [path.name for path in store.glob("cells/*")], time.monotonic() + 120
    while any(attempt_lives(Store(store), one, epoch) for one in cells for epoch in attempt_epochs(Store(store), one)):
        assert time.monotonic() < deadline  # workers of a dead driver write for about two seconds more
        time.sleep(0.05)
    before = results(store)
    assert 1 <= len(before) < 5
    status = json.loads(escala("status", "tiny", "--store", store, "--json").stdout)
    assert status["counts"]["finished"] == len(before)
    assert "running" not in status["counts"]
    escala("run", study, "--store", store, "--workers", 2)
    after = results(store)
    assert len(after) == 5
    assert all(after[cell_id] == result for cell_id, result in before.items())
    assert_mirror_is_exact(store, "tiny")


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_cell_tried_again(escala: Escala, tmp_path: Path) -> None:
    study, store = escala.study(long_study(2)), tmp_path / "store"
    process = escala.start("run", study, "--store", store, "--workers", 2)

    def training() -> list[int]:
        found = [path.parent for path in store.glob("cells/*/attempts/0/log.jsonl") if path.stat().st_size > 500]
        return [read_json(folder / "attempt.json")["pid"] for folder in found]

    wait_for(lambda: bool(training()), process)
    os.kill(training()[0], signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    ended = results(store)
    assert sorted(result["attempt"] for result in ended.values()) == [0, 1]
    retried = next(cell_id for cell_id, result in ended.items() if result["attempt"] == 1)
    error = (store / "cells" / retried / "attempts" / "0" / "error.txt").read_text()
    assert error.startswith("infrastructure: the worker died")
    assert_mirror_is_exact(store, "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_cleanly_and_leaves_no_process_behind(
    escala: Escala, tmp_path: Path, number: signal.Signals
) -> None:
    study, store = escala.study(long_study(16)), tmp_path / "store"  # on a busy machine too it outlives the second run
    process = escala.start("run", study, "--store", store, "--workers", 2)
    wait_for(lambda: bool(list(store.glob("cells/*/attempts/0/log.jsonl"))), process)
    family = psutil.Process(process.pid).children(recursive=True)
    second = escala("run", study, "--store", store, ok=2)
    assert f"study tiny is being run by process {process.pid} on " in second.stderr
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, out + err
    assert "interrupted. What was done is kept" in out
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(family, timeout=180)
    assert not alive
    holder = read_holder(Store(store), "tiny")
    assert holder is not None
    assert not holder.lives


@pytest.mark.slow
def test_a_run_whose_ray_died_says_so_and_leaves_no_process_behind(escala: Escala, tmp_path: Path) -> None:
    study, store = escala.study(long_study(4)), tmp_path / "store"
    process = escala.start("run", study, "--store", store, "--workers", 2)
    wait_for(lambda: bool(list(store.glob("cells/*/attempts/0/log.jsonl"))), process)
    family = psutil.Process(process.pid).children(recursive=True)
    worker = read_json(next(store.glob("cells/*/attempts/0/attempt.json")))["pid"]
    os.kill(worker, signal.SIGSTOP)  # nobody but the driver can end it now
    next(one for one in family if one.name() == "raylet").kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, out + err
    assert "Ray is gone" in out
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(family, timeout=180)
    assert not alive


FAMILY = """
from dataclasses import replace
from sweeps.families import FAMILIES

def picky():
    def build(shape, init_std):
        if shape.width > 20:
            raise RuntimeError(f"this width is cursed: {shape.width}")
        from sweeps.families import build_model
        return build_model(FAMILIES["llama"], shape, init_std=init_std, seed=0)
    return replace(FAMILIES["llama"], config=None, build=build)
"""


@pytest.mark.slow
def test_one_failing_cell_does_not_stop_the_others_and_its_traceback_is_in_its_own_file(
    escala: Escala, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(FAMILY)
    study = escala.study(TINY.replace("[llama]", '["mine.py:picky"]').replace(", 8e8", ""))
    store = tmp_path / "store"
    refused = escala("run", study, "--store", store, ok=2)
    assert "--allow-code" in refused.stderr
    run = escala("run", study, "--store", store, "--workers", 2, "--allow-code", "--give-up-after", 4, ok=1)
    assert re.search(r"1 finished, 0 diverged, 3 failed", run.stdout), run.stdout
    status = json.loads(escala("status", study, "--store", store, "--json").stdout)
    assert status["counts"] == {"finished": 1, "failed": 3}
    failed = next(cell for cell in status["cells"] if cell["state"] == "failed")
    assert failed["reason"].startswith("code: RuntimeError: this width is cursed")
    shown = escala("logs", failed["id"][:10], "--store", store).stdout
    assert "Traceback" in shown
    assert "mine.py" in shown


def test_a_cell_that_another_study_has_trained_is_not_trained_again(copy_of_finished: Callable[[], Finished]) -> None:
    copy = copy_of_finished()
    other = copy.escala.study(TINY.replace("name: tiny", "name: other"), "other.yaml")
    before = results(copy.store)
    run = copy.escala("run", other, "--store", copy.store)
    assert "7 cells, 7 of them done already in this store" in run.stdout
    assert results(copy.store) == before
    assert all(attempt_epochs(Store(copy.store), cell_id) == [0] for cell_id in before)
    with mirrored(copy.store) as database:
        count = database.execute("select count(*) from tags where key = 'escala.cell'").fetchone()[0]
    assert count == 14, "each study has its own run of a shared cell"


@pytest.mark.slow
def test_a_quarantine_tag_set_in_mlflow_takes_the_run_out_of_the_fit(copy_of_finished: Callable[[], Finished]) -> None:
    from mlflow.tracking import MlflowClient

    copy = copy_of_finished()
    client = MlflowClient(tracking_uri=Store(copy.store).tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    run = client.search_runs([experiment.experiment_id], "tags.`escala.cell` != ''")[0]
    client.set_tag(run.info.run_id, "escala.quarantine", "the node was throttled")
    copy.escala("sync", "tiny", "--store", copy.store)
    cell_id = run.data.tags["escala.cell"]
    status = json.loads(copy.escala("status", "tiny", "--store", copy.store, "--json").stdout)
    cell = next(cell for cell in status["cells"] if cell["id"] == cell_id)
    assert (cell["state"], cell["reason"]) == ("quarantined", "the node was throttled")
    fit = json.loads(copy.escala("fit", "tiny", "--store", copy.store, "--law", "chinchilla", "--json").stdout)
    assert [(one["cell"], one["reason"]) for one in fit["excluded"]] == [
        (cell_id, "quarantined: the node was throttled")
    ]
    client.delete_tag(run.info.run_id, "escala.quarantine")
    copy.escala("sync", "tiny", "--store", copy.store)
    status = json.loads(copy.escala("status", "tiny", "--store", copy.store, "--json").stdout)
    assert status["counts"] == {"finished": 7}


@pytest.mark.slow
def test_a_lost_mlflow_database_is_rebuilt_whole_from_the_files(copy_of_finished: Callable[[], Finished]) -> None:
    copy = copy_of_finished()
    (copy.store / "mlflow" / "mlflow.db").unlink()
    copy.escala("sync", "tiny", "--store", copy.store)
    assert_mirror_is_exact(copy.store, "tiny")
    state = read_json(copy.store / "studies" / "tiny" / "mirror.json")
    for kept in state["cells"].values():
        kept |= {"offset": 0, "closed": False, "state": None}
    write_json(copy.store / "studies" / "tiny" / "mirror.json", state)
    copy.escala("sync", "tiny", "--store", copy.store)
    assert_mirror_is_exact(copy.store, "tiny")


def test_a_later_attempt_says_nothing_twice_of_what_a_dead_driver_shipped(
    copy_of_finished: Callable[[], Finished],
) -> None:
    copy = copy_of_finished()
    place, path = Store(copy.store), copy.store / "studies" / "tiny" / "mirror.json"
    state = read_json(path)
    state["tracking_uri"] = place.tracking_uri  # the copy knows its own database
    cell_id, kept = next(iter(state["cells"].items()))
    rows, end = read_rows(place.attempt(cell_id, 0) / "log.jsonl")
    kept |= {"attempt": 0, "offset": end, "closed": False, "state": None}
    write_json(path, state)
    again = place.attempt(cell_id, 1)
    again.mkdir()
    with (again / "log.jsonl").open("ab", buffering=0) as stream:
        append_rows(stream, [{**row, "time": row["time"] + 60} for row in rows])
    copy.escala("sync", "tiny", "--store", copy.store)
    assert_mirror_is_exact(copy.store, "tiny")
