"""A Ray of one's own is known to be dead by its processes, and none of them outlives it."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.processes import OwnRay, descendants


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the name of Ray's, and another beside it."""
    sleep = shutil.which("sleep")
    assert sleep is not None
    before = descendants()
    process = subprocess.Popen(["raylet", "600"], executable=shutil.copy(sleep, tmp_path / "raylet"))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    for left in (process, other):
        left.kill()
        left.wait()
    assert not descendants() - before


@pytest.mark.parametrize("reaped", [False, True])
def test_the_process_without_which_ray_is_dead_is_named_once_it_died(
    reaped: bool, raylet: subprocess.Popen[bytes]
) -> None:
    mine = psutil.Process(raylet.pid)
    own = OwnRay(descendants() - {mine})
    assert own.died() is None
    raylet.kill()
    if reaped:
        raylet.wait()
    while not reaped and mine.status() != psutil.STATUS_ZOMBIE:
        pass
    assert own.died() == "raylet"


@pytest.mark.slow
def test_what_ray_has_started_ends_with_it_and_what_was_there_before_does_not(
    raylet: subprocess.Popen[bytes],
) -> None:
    own = OwnRay(descendants() - {psutil.Process(raylet.pid)})
    own.end()
    assert raylet.wait(5) != 0
    assert descendants(), "the other process was there before"
