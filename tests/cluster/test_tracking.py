"""The embedded database of MLflow, as a run that begins finds or makes it, and as `escala ui` finds it."""

import http.server
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from commandline import ROOT, Escala, FrontDoor

from cluster.interface import experiment_url
from cluster.tracking import _make_database, reach
from sweeps.errors import InputError
from sweeps.store import Store, open_store
from tests.analysis.synthetic import Run, write_study

MISSING = b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}'

KILLED = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine

@event.listens_for(Engine, "after_cursor_execute")
def among_the_changes(connection, cursor, statement, *rest):
    if "CREATE TABLE _alembic_tmp_" in statement:
        os.kill(os.getpid(), signal.SIGKILL)

from cluster.tracking import reach
from sweeps.store import open_store

store = open_store(Path(sys.argv[1]))
reach(store, sys.argv[2], store.tracking_uri)
"""


@pytest.mark.slow
def test_a_database_whose_making_was_killed_is_made_by_the_next_run(study: tuple[Store, str]) -> None:
    store, name = study
    killed = subprocess.run([sys.executable, "-c", KILLED, str(store.root), name], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    reached = reach(store, name, store.tracking_uri)
    assert reached.client.get_experiment(reached.experiment_id).name == name
    left = {path.name for path in (store.root / "mlflow").iterdir()}
    assert left == {"mlflow.db", "artifacts", "making.lock"}


@pytest.mark.parametrize("damaged", [False, True])
def test_a_database_of_another_mlflow_or_a_damaged_one_is_told_in_a_sentence_by_the_ui(
    tmp_path: Path, damaged: bool
) -> None:
    store = open_store(tmp_path / "store")
    database = store.root / "mlflow" / "mlflow.db"
    database.parent.mkdir()
    if damaged:
        database.write_bytes(b"no database" * 100)
    else:
        _make_database(database)
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("UPDATE alembic_version SET version_num = '0a8213491aaa'")
    said = r"cannot be read: .*(schema \(found version 0a8213491aaa|not a database).* mlflow db upgrade sqlite:////.*"
    with pytest.raises(InputError, match=said):
        experiment_url(store, "s", 5000)


def test_the_ui_is_that_of_the_server_where_runs_go_to_one(
    place: tuple[Escala, Store], front_door: FrontDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = place
    for name in ("MAX_RETRIES", "TIMEOUT"):  # put back afterwards
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")

    class Tracking(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            there = "experiment_name=demo" in self.path
            body = b'{"experiment": {"experiment_id": "7", "name": "demo"}}' if there else MISSING
            self.send_response(200 if there else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Tracking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{uri}/")
        shown = front_door("ui", "demo", "--store", store.root, "--no-browser")
        write_study(store.root, [Run(width=64, budget=1.2e11, state="planned")], name="other")
        strange = front_door("ui", "other", "--store", store.root, "--no-browser")
        every = front_door("ui", "--store", store.root, "--no-browser")
        server.shutdown()
    assert (shown.code, every.code) == (0, 0)
    assert f"MLflow UI: {uri}/#/experiments/7/runs?" in shown.out
    assert f"MLflow UI: {uri} " in every.out
    assert strange.code == 2
    assert f"not in MLflow at {uri}/" in strange.err
    assert "escala sync other" in strange.err
    gone = front_door("ui", "demo", "--store", store.root, "--no-browser")
    assert f"not reachable at {uri}/, which MLFLOW_TRACKING_URI names" in gone.err
