"""What MLflow has lost is made again from the store: by a rebuild, by a sync, by the next pass."""

import os
import subprocess
import sys

import pytest
from commandline import ROOT, Escala
from faultproxy import FaultProxy, Server
from mirroring import active_runs, assert_exact, client_of, connected, finish, log, tags_of, until_through

from cluster.claims import Claim, living_drivers
from cluster.sync import sync_study
from sweeps.errors import InputError
from sweeps.store import Store, read_quarantine

pytestmark = pytest.mark.usefixtures("quick")


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_lost_database_is_noticed_and_filled_again(study: tuple[Store, str], escala: Escala) -> None:
    store, name = study
    database = Server(0, store.root / "mlflow" / "mlflow.db")
    escala("sync", name, "--store", store.root)
    assert_exact(database, store, name)
    database.database.unlink()
    escala("sync", name, "--store", store.root)
    assert_exact(database, store, name)


def test_a_run_deleted_in_mlflow_comes_again_while_its_cell_is_at_work(
    at_work: tuple[Store, str, str], mlflow_server: Server
) -> None:
    store, name, cell = at_work
    mirror = connected(store, name, mlflow_server.uri)
    until_through(mirror)
    client_of(mlflow_server).delete_run(dict(active_runs(mlflow_server, name))[cell])
    log(store, cell, 1)
    until_through(mirror)
    finish(store, cell)
    until_through(mirror)
    assert_exact(mlflow_server, store, name)
