"""What the tests share: studies with cells in all states, a proxy before a real server, and waits scaled down."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import ROOT, Escala
from faultproxy import FaultProxy, Server
from mirroring import begin_cell

import cluster.mirror as mirrors
from sweeps.store import Store, open_store
from tests.analysis.synthetic import Run, write_study

HEAD = {"num_cpus": 2, "object_store_memory": 80 * 1024**2, "include_dashboard": False}  # which is ten processes

CELLS = [Run(width=16, budget=1.2e11, seed=seed) for seed in range(4)]

RUNS = [
    *(Run(width=width, budget=1.2e11) for width in (16, 24, 32)),
    Run(width=24, budget=1.2e11, seed=1),
    Run(width=40, budget=1.2e11, state="failed"),
    Run(width=48, budget=1.2e11, state="planned"),
]


@pytest.fixture
def place(tmp_path: Path) -> tuple[Escala, Store]:
    """A command line, and a store that holds the study `demo`: four cells finished, one failed, one planned."""
    return Escala(tmp_path), open_store(write_study(tmp_path / "store", RUNS))


@pytest.fixture
def study(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Store, str]:
    """A store with a study of four finished cells, named after the test."""
    name = re.sub(r"[^\w.-]", "-", request.node.name)[-90:].strip("-_.")
    return open_store(write_study(tmp_path / "store", CELLS, name=name)), name


@pytest.fixture
def at_work(study: tuple[Store, str]) -> tuple[Store, str, str]:
    """The same store and study, and one more cell of it, at work in this process."""
    store, name = study
    return store, name, begin_cell(store, name)


@pytest.fixture
def proxy(mlflow_server: Server) -> Iterator[FaultProxy]:
    made = FaultProxy(mlflow_server.port)
    yield made
    for thread in made.late:
        thread.join()
    made.down()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits scaled down."""
    monkeypatch.setattr(mirrors, "INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(mirrors, "LONGEST_SECONDS", 0.4)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray of two CPUs that all tests of the driver join: starting one costs more than they do."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(ROOT), "ESCALA_BEAT_SECONDS": "0.25"}  # for its workers alone
    try:
        cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    finally:
        for name in ("PYTHONPATH", "ESCALA_BEAT_SECONDS"):
            os.environ.pop(name)
        os.environ |= before
    yield cluster.address
    cluster.shutdown()
