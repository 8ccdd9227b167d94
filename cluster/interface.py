"""The MLflow UI on a store, for `escala ui`: bound to 127.0.0.1, opened where the curves are. Where runs go to a server
that MLFLOW_TRACKING_URI names, the UI is that server's."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser

from cluster.charts import SHARE_KEY
from cluster.credentials import check_file, check_uri, refusal
from cluster.terminal import say
from cluster.tracking import try_once, words
from sweeps.errors import InputError
from sweeps.store import Store

START_SECONDS = 120.0


def experiment_url(store: Store, study: str | None, port: int) -> str:
    """The page of a study's charts, or the list of experiments. InputError where the database does not tell."""
    base = f"http://127.0.0.1:{port}"
    if study is None:
        return base
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    try:
        experiment = MlflowClient(tracking_uri=store.tracking_uri).get_experiment_by_name(study)
    except (MlflowException, SQLAlchemyError) as error:
        raise InputError(
            f"the MLflow database of the store {store.root} cannot be read: {words(error)}. After an upgrade of MLflow "
            f"run mlflow db upgrade {store.tracking_uri}. Where the file is damaged, delete it: `escala sync {study}` "
            "makes it anew from the store's files."
        ) from None
    if experiment is None:
        raise InputError(f"study {study} is not in MLflow yet: run it, or `escala sync {study}`.")
    return _charts(base, experiment.experiment_id)


def _charts(base: str, experiment_id: str) -> str:
    return f"{base}/#/experiments/{experiment_id}/runs?compareRunsMode=CHART&viewStateShareKey={SHARE_KEY}"


def server_url(uri: str, study: str | None) -> str:
    """The page of a study's charts on a tracking server, or its list of experiments. InputError where the server does
    not tell."""
    base = check_uri(uri).rstrip("/")
    if study is None:
        return base
    check_file()
    try_once()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        experiment = MlflowClient(tracking_uri=uri).get_experiment_by_name(study)
    except (MlflowException, OSError) as error:
        if refused := refusal(error, uri):
            raise InputError(refused) from None
        raise InputError(
            f"MLflow is not reachable at {uri}, which MLFLOW_TRACKING_URI names: {words(error)}. Start the server, or "
            "unset the variable to see the database in the store."
        ) from None
    if experiment is None:
        raise InputError(
            f"study {study} is not in MLflow at {uri}, which MLFLOW_TRACKING_URI names: `escala sync {study}` sends it "
            "there. Unset the variable to see the database in the store."
        )
    return _charts(base, experiment.experiment_id)


def show_server(uri: str, study: str | None, open_browser: bool) -> None:
    """Say where a tracking server shows the study, and open it."""
    url = server_url(uri, study)
    say(f"MLflow UI: {url}   (the server of MLFLOW_TRACKING_URI)")
    if open_browser:
        webbrowser.open(url)


def serve(store: Store, study: str | None, port: int, open_browser: bool) -> None:
    """Run the UI until Ctrl-C. InputError where there is nothing to show or the port is taken."""
    if not (store.root / "mlflow" / "mlflow.db").exists():
        raise InputError(f"the store {store.root} has no MLflow database yet: run a study first.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(
                f"port {port} on 127.0.0.1 cannot be used ({error.strerror}). Name another: --port."
            ) from None
    url = experiment_url(store, study, port)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store.tracking_uri]
    command += ["--artifacts-destination", (store.root / "mlflow" / "artifacts").as_uri()]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes, for judging of texts
    say("starting MLflow ...")
    server = subprocess.Popen(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_up(port, server)
        say(f"MLflow UI: {url}   (Ctrl-C ends it)")
        if open_browser:
            webbrowser.open(url)
        server.wait()
    except KeyboardInterrupt:
        say()
    finally:
        server.terminate()
        server.wait(10)


def _wait_until_up(port: int, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            if server.poll() is not None:
                raise InputError(f"the MLflow server ended with code {server.returncode} before it answered.") from None
            time.sleep(0.3)
    raise InputError(f"the MLflow server did not answer within {START_SECONDS:.0f} s.")
