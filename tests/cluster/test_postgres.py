"""The mirror against a shared MLflow: Postgres below it, accounts before it, a name that it serves under."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from commandline import Escala, ids
from faultproxy import FaultProxy
from mirroring import active_runs, assert_exact, client_of, connected, finish, log, tags_of, until_through
from sharedmlflow import PASSWORD, USER, PostgresServer, mlflow_on, postgres, why_not

from analysis import load_runs
from cluster import tracking
from cluster.credentials import check_file, check_uri
from cluster.sync import sync_study
from sweeps.errors import InputError
from sweeps.store import Store, read_quarantine

NAMES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with postgres() as database, mlflow_on(database, tmp_path_factory.mktemp("mlflow-postgres")) as server:
        yield server


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The administrator's account, from the environment; no file of the user's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in zip(NAMES, (USER, PASSWORD, None), strict=True):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)


def credentials_file(mode: int, user: str = USER, password: str = PASSWORD) -> Path:
    path = Path(os.environ["HOME"]) / ".mlflow" / "credentials"
    path.parent.mkdir(parents=True)
    path.write_text(f"[mlflow]\nmlflow_tracking_username = {user}\nmlflow_tracking_password = {password}\n")
    path.chmod(mode)
    return path


# --- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_every_row_arrives_once_in_postgres_whatever_is_lost_on_the_way(
    at_work: tuple[Store, str, str], shared: PostgresServer
) -> None:
    store, name, cell = at_work
    proxy = FaultProxy(shared.port)
    try:
        mirror = connected(store, name, proxy.uri)
        fates = {0: "drop", 1: "lose", 3: "500-after"}
        changing = ("runs/create", "runs/log-batch", "runs/update")
        proxy.choose = lambda path, n: fates.get(n, "pass") if path in changing else "pass"
        until_through(mirror)
        for order in range(1, 30):
            log(store, cell, order)
        finish(store, cell)
        until_through(mirror)
        assert {what for _, what in proxy.log} == {"pass", *fates.values()}
    finally:
        proxy.down()
    runs = assert_exact(shared, store, name)
    assert len(runs) == 5
    there = load_runs(name, tracking_uri=shared.uri, store="nowhere")
    here = load_runs(name, store)
    assert there["val_loss_final"].tolist() == here["val_loss_final"].tolist()


def test_a_quarantine_that_a_person_sets_in_the_shared_mlflow_is_read_back(
    study: tuple[Store, str], shared: PostgresServer
) -> None:
    store, name = study
    assert sync_study(store, name, shared.uri) is None
    cell, run = active_runs(shared, name)[0]
    client_of(shared).set_tag(run, "escala.quarantine", "the node was too hot")
    assert sync_study(store, name, shared.uri) is None
    assert read_quarantine(store, name)[cell]["why"] == "the node was too hot"


def test_the_plan_and_the_report_go_through_the_server_where_artifacts_are_kept(
    study: tuple[Store, str], shared: PostgresServer
) -> None:
    store, name = study
    assert sync_study(store, name, shared.uri) is None
    ((_, parent),) = active_runs(shared, name, "escala.parent")
    assert "plan.json" in [found.path for found in client_of(shared).list_artifacts(parent)]
    assert tags_of(shared, parent)["mlflow.runName"]


# --- accounts ------------------------------------------------------------------------------------------------------


def test_an_account_in_a_file_of_its_owner_alone_is_used(
    study: tuple[Store, str], shared: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = study
    for variable in NAMES:
        monkeypatch.delenv(variable, raising=False)
    credentials_file(0o600)
    assert sync_study(store, name, shared.uri) is None
    assert len(active_runs(shared, name)) == len(ids(store, name))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"MLFLOW_TRACKING_PASSWORD": "wrong-and-secret"}, "it was sent the one of MLFLOW_TRACKING_USERNAME and"),
        ({"MLFLOW_TRACKING_PASSWORD": None}, "none was sent, since MLFLOW_TRACKING_PASSWORD is not set"),
        (dict.fromkeys(NAMES), "none was sent"),
        ({**dict.fromkeys(NAMES), "MLFLOW_TRACKING_TOKEN": "wrong-and-secret"}, "it was sent MLFLOW_TRACKING_TOKEN"),
    ],
)
def test_a_wrong_account_is_refused_before_anything_trains(
    changes: dict[str, str | None],
    sentence: str,
    study: tuple[Store, str],
    shared: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, name = study
    for variable, value in changes.items():
        monkeypatch.delenv(variable, raising=False) if value is None else monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match="does not accept the account") as refused:
        sync_study(store, name, shared.uri)
    assert sentence in str(refused.value)
    assert "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in str(refused.value)
    assert "wrong-and-secret" not in str(refused.value)
    with pytest.raises(InputError, match="cannot be read"):
        load_runs(name, tracking_uri=shared.uri, store="nowhere")


@pytest.mark.slow
def test_an_account_without_the_permission_is_told_which_one_it_needs(
    study: tuple[Store, str], shared: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = study
    assert sync_study(store, name, shared.uri) is None
    reader = {"username": "reader", "password": "reads-and-reads-and-reads"}
    made = requests.post(f"{shared.uri}/api/2.0/mlflow/users/create", json=reader, auth=(USER, PASSWORD), timeout=60)
    made.raise_for_status()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", reader["username"])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", reader["password"])
    client_of(shared).get_experiment_by_name(name)  # may look
    (store.study(name) / "mirror.json").unlink()
    fault = sync_study(store, name, shared.uri)
    assert fault is not None
    assert "403" in fault or "PERMISSION_DENIED" in fault


def test_a_name_that_the_server_does_not_serve_under_is_explained(
    study: tuple[Store, str], shared: PostgresServer
) -> None:
    store, name = study
    other = f"http://0.0.0.0:{shared.port}"  # the same machine by another name
    with pytest.raises(InputError, match="does not serve under that name") as refused:
        sync_study(store, name, other)
    assert f"--allowed-hosts 0.0.0.0:{shared.port}" in str(refused.value)


# --- without a server ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_can_read_is_refused_with_its_remedy(mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    path = credentials_file(mode)
    with pytest.raises(InputError, match=f"chmod 600 {path}") as refused:
        check_file()
    assert PASSWORD not in str(refused.value)
    path.chmod(0o600)
    check_file()


def test_a_file_that_is_not_used_is_not_looked_at() -> None:
    credentials_file(0o644)
    check_file()


@pytest.mark.parametrize(
    "uri",
    [
        "http://ann:secret-word@127.0.0.1:5000",
        "https://secret-word@mlflow.example.org",
        "postgresql://ann:secret-word@db:5432/mlflow",
        "postgresql+psycopg2://db/mlflow?user=ann&password=secret-word",
    ],
)
def test_an_address_that_carries_a_password_is_refused_without_showing_it(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="carries a password") as refused:
        check_uri(uri)
    assert "secret-word" not in str(refused.value)
    escala = Escala(tmp_path)
    study = escala.study("name: none\n")
    said = escala("run", study, "--store", tmp_path / "store", "--tracking-uri", uri, ok=2).stderr
    assert said.startswith("error: the tracking URI ")
    assert "secret-word" not in said
    assert not (tmp_path / "store").exists()


def test_addresses_without_a_password_pass() -> None:
    for uri in ("http://127.0.0.1:5000", "sqlite:////a/b.db", "postgresql://ann@db/mlflow", "databricks"):
        assert check_uri(uri) == uri


def test_a_database_whose_driver_is_not_installed_is_refused_with_what_is_missing(
    study: tuple[Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = study

    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'")

    monkeypatch.setattr(tracking, "_experiment", missing)
    with pytest.raises(InputError, match=r"No module named 'psycopg'\. Install that package here"):
        tracking.reach(store, name, "postgresql://127.0.0.1:1/mlflow")


@pytest.mark.slow
@pytest.mark.parametrize("taken", [False, True])
def test_a_database_that_is_not_there_or_refuses_is_said_within_seconds(
    taken: bool, study: tuple[Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg2")
    monkeypatch.setattr("mlflow.store.db.utils.create_sqlalchemy_engine_with_retry", lambda _: pytest.fail("minutes"))
    store, name = study
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, over = server.getsockname()[1], threading.Event()

        def hang_up() -> None:
            while not over.is_set():
                server.accept()[0].close()

        if taken:
            threading.Thread(target=hang_up, daemon=True).start()
        else:
            server.close()
        with pytest.raises(InputError, match=rf"MLflow is not reachable at postgresql\S+:{port}/mlflow: .*Start the"):
            tracking.reach(store, name, f"postgresql+psycopg2://ann@127.0.0.1:{port}/mlflow")
        over.set()
        if taken:
            socket.create_connection(("127.0.0.1", port)).close()
