"""What a dead driver left is ended where it can be, and asked to end elsewhere."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.leftovers import kill_worker, settle
from sweeps.life import _since_boot
from sweeps.records import read_json, write_json
from sweeps.store import Attempt, begin_attempt, open_store


@pytest.fixture
def other() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


@pytest.fixture
def attempt(tmp_path: Path, other: "subprocess.Popen[bytes]") -> Attempt:
    """Of a study without a driver, by the process of that id."""
    made = begin_attempt(open_store(tmp_path / "store"), "c", {"study": "s", "driver": 0})
    path = made.folder / "attempt.json"
    write_json(path, read_json(path) | {"pid": other.pid, **_since_boot(other.pid)})
    return made


def test_a_worker_here_is_killed(attempt: Attempt, other: "subprocess.Popen[bytes]") -> None:
    assert settle(attempt.store, "c", "s", 1)
    assert other.wait(10) == -9


def test_a_worker_in_another_container_is_asked_and_its_id_is_nobodys_here(
    attempt: Attempt, other: "subprocess.Popen[bytes]"
) -> None:
    path = attempt.folder / "attempt.json"
    write_json(path, read_json(path) | {"pid_namespace": "pid:[1]"})
    assert not settle(attempt.store, "c", "s", 1)
    kill_worker(attempt)
    assert other.poll() is None
    assert read_json(attempt.folder / "stop.json")["kind"] == "preemption"
