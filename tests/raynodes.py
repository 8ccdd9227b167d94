"""Ray nodes as their own processes, started and ended as `ray start --block` is on a real machine."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from commandline import ROOT


@contextmanager
def ray_node(log: Path, *arguments: object, before: str = "", **env: str) -> Iterator[None]:
    """`ray start` with these arguments, after a shell command in a mount namespace of its own if `before` is given."""
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
    command = [*ray, "--object-store-memory", str(80 * 1024**2), *map(str, arguments)]
    if before:
        command = ["unshare", "-m", "sh", "-c", f'{before} && exec "$@"', "sh", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **env}
    with log.open("wb") as stream:
        node = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        yield
    finally:
        family = _family(node.pid)
        node.terminate()
        with suppress(subprocess.TimeoutExpired):
            node.wait(20)
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        node.wait(30)


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def over(folder: Path) -> str:
    """The shell command that mounts an empty folder over one, in a namespace of its own; skips where that is barred."""
    mount = f"mount -t tmpfs none {folder}"
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("a mount namespace of one's own needs root and unshare")
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode != 0:
        pytest.skip("mount namespaces are not permitted on this machine")
    return mount


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(condition: Callable[[], bool], log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.2)
