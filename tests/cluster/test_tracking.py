"""The embedded database of MLflow, as a run that begins finds or makes it."""

import signal
import subprocess
import sys

import pytest
from commandline import ROOT

from cluster.tracking import reach
from sweeps.store import Store

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
