"""The embedded database of MLflow, as a run that begins finds or makes it, and as `escala ui` finds it."""

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from commandline import ROOT

from cluster.interface import experiment_url
from cluster.tracking import _make_database, reach
from sweeps.errors import InputError
from sweeps.store import Store, open_store

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
