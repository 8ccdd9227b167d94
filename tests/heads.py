"""A real head of a Ray cluster with its dashboard on loopback, in processes of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from faultproxy import free_port

START_SECONDS = 180.0
TOKEN = "5ca1ab1e" * 8


@dataclass(frozen=True)
class Head:
    """A running `ray start --head`."""

    port: int
    """Where nodes join."""
    dashboard: int
    token: str | None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"


@contextmanager
def running_head(cpus: int, token: str | None) -> Iterator[Head]:
    """Start a head, with token auth or without, and wait until its agent can start jobs; end all of it afterwards."""
    head = Head(free_port(), free_port(), token)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets in it have short names
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--port", str(head.port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(head.dashboard)]
    command += ["--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port())]
    command += ["--min-worker-port", "0", "--max-worker-port", "0", "--temp-dir", str(folder)]
    command += ["--num-cpus", str(cpus), "--object-store-memory", str(80 * 1024**2)]
    log = (folder / "head.log").open("wb")
    process = subprocess.Popen(
        command, env=_environment(token), cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        _wait(head, process, folder / "head.log")
        yield head
    finally:
        _end(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _environment(token: str | None) -> dict[str, str]:
    """That of a node: this Python first, signs of life as quick as in other tests, its own answer on tokens."""
    foreign = ("RAY_", "ESCALA_", "MLFLOW_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    kept |= {"ESCALA_BEAT_SECONDS": "0.25", "RAY_USAGE_STATS_ENABLED": "0"}
    return kept | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"})


def _wait(head: Head, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the node is there: the dashboard answers before it, and takes no job then."""
    headers = {"Authorization": f"Bearer {head.token}"} if head.token else {}
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the head ended:\n{log.read_text(errors='replace')}"
        try:
            request = urllib.request.Request(f"{head.address}/api/cluster_status", headers=headers)
            with urllib.request.urlopen(request, timeout=5) as reply:
                if b'"CPU"' in reply.read():
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"the head did not answer:\n{log.read_text(errors='replace')}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(15)
    _, alive = psutil.wait_procs(family, timeout=5)
    for one in alive:
        one.kill()
    psutil.wait_procs(alive, timeout=5)
