"""A quarantine, merged both ways between the store and a real MLflow server."""

import fcntl
import threading

import pytest
from commandline import ids
from faultproxy import Server
from mirroring import active_runs, client_of, connected, mark, tags_of, until_through, wait_for

import cluster.mirror as mirrors
from cluster.sync import sync_study
from sweeps.store import Store, read_quarantine

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("merged", [None, "old"])
@pytest.mark.parametrize("tag", [None, "old", "theirs"])
@pytest.mark.parametrize("stored", [None, "old", "ours"])
def test_quarantine_is_a_three_way_merge(
    merged: str | None, tag: str | None, stored: str | None, study: tuple[Store, str], mlflow_server: Server
) -> None:
    store, name = study
    client = client_of(mlflow_server)
    cell = ids(store, name)[0]
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


def test_a_mark_that_is_made_while_the_two_are_merged_is_kept(study: tuple[Store, str], mlflow_server: Server) -> None:
    store, name = study
    assert sync_study(store, name, mlflow_server.uri) is None
    (told, run_id), (ours, _) = active_runs(mlflow_server, name)[:2]
    client_of(mlflow_server).set_tag(run_id, "escala.quarantine", "a spike")
    mirror = threading.Thread(target=sync_study, args=(store, name, mlflow_server.uri))
    with (store.study(name) / "quarantine.lock").open("ab") as lock:  # a person is at it
        fcntl.flock(lock, fcntl.LOCK_EX)
        mirror.start()
        mirror.join(1.0)
        assert mirror.is_alive()
        mark(store, name, ours, "odd")
    mirror.join(300)
    assert {cell: one["why"] for cell, one in read_quarantine(store, name).items()} == {told: "a spike", ours: "odd"}


def test_a_mark_that_was_lifted_does_not_come_back_from_the_server_that_was_mirrored_to_before(
    study: tuple[Store, str], mlflow_server: Server
) -> None:
    store, name = study
    cell = ids(store, name)[0]
    mark(store, name, cell, "bad data")
    assert sync_study(store, name, mlflow_server.uri) is None
    assert sync_study(store, name, None) is None
    mark(store, name, cell, None)
    assert sync_study(store, name, mlflow_server.uri) is None
    assert cell not in read_quarantine(store, name)
    run_id = dict(active_runs(mlflow_server, name))[cell]
    assert "escala.quarantine" not in tags_of(mlflow_server, run_id)
