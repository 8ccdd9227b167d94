"""What a dead driver left is ended where it can be, and asked to end elsewhere."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.leftovers import kill_worker, settle
from sweeps.life import SILENCE_SECONDS, _since_boot
from sweeps.records import read_json, write_json
from sweeps.store import Attempt, begin_attempt, open_store, read_end


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


def test_a_worker_of_another_user_is_asked_and_its_cell_is_free_when_it_is_silent(
    attempt: Attempt, other: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    assert not settle(attempt.store, "c", "s", 1)
    assert read_json(attempt.folder / "stop.json")["kind"] == "preemption"
    assert not settle(attempt.store, "c", "s", 1), "it may take a while to keep a checkpoint"
    kill_worker(attempt)
    assert read_end(attempt.store, "c", 0) is None
    old = time.time() - SILENCE_SECONDS - 1
    os.utime(attempt.folder / "attempt.json", (old, old))
    assert settle(attempt.store, "c", "s", 1), "it is stopped, perhaps, and will find its lease gone"
    assert read_end(attempt.store, "c", 0) == ("preemption", "its driver was gone")
    assert other.poll() is None
