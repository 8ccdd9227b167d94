"""What the tests share: one tiny study, run once a session through the real command line."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commandline import TINY, Escala, Finished, FrontDoor, Said
from faultproxy import Server, start_server
from hypothesis import HealthCheck, settings

from escala import main

# No test run may reach out, and none may see the user's own settings.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1")
os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # eight processes beside each server, and 10 s of a core
for name in ("ESCALA_STORE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
    os.environ.pop(name, None)

# The same examples each time, however slow the machine is.
settings.register_profile("tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# A shell starts what runs in its background deaf to Ctrl-C, and so would be every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def escala(tmp_path: Path) -> Escala:
    return Escala(tmp_path)


@pytest.fixture
def front_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> FrontDoor:
    """The command line in this process, in a folder of its own: front_door(*words)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["escala", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    escala = Escala(tmp_path_factory.mktemp("finished"))
    study = escala.study(TINY, "tiny.yaml")
    store = escala.folder / "store"
    run = escala("run", study, "--store", store, "--workers", 2)
    return Finished(escala, study, store, run.stdout)


@pytest.fixture
def copy_of_finished(finished: Finished, tmp_path: Path) -> Callable[[], Finished]:
    """A fresh copy of the finished store, for tests that change it."""

    def copy() -> Finished:
        shutil.copytree(finished.store, tmp_path / "store")
        return Finished(Escala(tmp_path), finished.study, tmp_path / "store", finished.output)

    return copy


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One real MLflow server over SQLite; every test names its own experiment."""
    server, process = start_server(tmp_path_factory.mktemp("mlflow"))
    yield server
    process.terminate()
    process.wait(30)
