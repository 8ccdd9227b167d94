"""An address at which no cluster answers is said at once, in one sentence; and leaving Ray does not end the process."""

import os
import signal
import subprocess
import sys

import pytest
from commandline import ROOT
from faultproxy import free_port

from cluster import connection
from cluster.connection import start_ray, stop_ray
from sweeps.errors import InputError


def test_a_cluster_that_has_ended_is_said_at_once_where_ray_still_has_a_note_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    port = free_port()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)  # others' on this machine
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda _: f"localhost:{port}")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would retry for a minute"))
    with pytest.raises(InputError, match=rf":{port}, which is 'auto' here: .*Connection refused.*correct --address"):
        connection._start("auto", None)


LEAVING = """
import gc, threading
from cluster.connection import start_ray, stop_ray

class Knot:
    pass

def allocate():  # as the mirror's thread does: now and then it makes Python collect
    while True:
        kept = [[] for _ in range(100)]

ray, shutdown, found = start_ray("local", 1), None, []
knot = Knot()
knot.itself, knot.reference = knot, ray.put(1)
del knot
gc.callbacks.append(lambda phase, _: found.append(phase) if shutdown else None)
threading.Thread(target=allocate, daemon=True).start()
original = ray.shutdown

def shutdown_watched():
    global shutdown
    shutdown = True
    original()
    shutdown = False

ray.shutdown = shutdown_watched
stop_ray(ray)
print(len(found), gc.isenabled())
"""


@pytest.mark.slow
def test_no_garbage_is_collected_while_ray_shuts_down_which_would_end_the_process() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    run = subprocess.run([sys.executable, "-c", LEAVING], env=environment, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (0, "0 True\n"), run.stderr


ORPHAN = """
import os, subprocess, sys, time
if sys.argv[1:] != ["child"]:
    subprocess.Popen([sys.executable, "-c", sys.orig_argv[2], "child"], start_new_session=True)
    sys.exit()
import psutil
while os.getppid() != 1:
    time.sleep(0.05)
from cluster.connection import start_ray, stop_ray
ray = start_ray("local", 1)
family = psutil.Process().children(recursive=True)
next(one for one in family if one.name() == "raylet").kill()
stop_ray(ray)
print("goes on", flush=True)
psutil.wait_procs(family, timeout=5)
for one in family:
    if one.is_running():
        one.kill()
"""


@pytest.mark.slow
def test_a_driver_whose_parent_is_gone_outlives_a_ray_that_died() -> None:
    """As under nohup, or as a service: Ray would end the process before it has said why."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    run = subprocess.run([sys.executable, "-c", ORPHAN], env=environment, capture_output=True, text=True, timeout=300)
    assert "goes on\n" in run.stdout, run.stderr


@pytest.mark.slow
def test_a_cluster_without_a_token_is_joined_after_a_ray_of_ones_own_that_had_one(
    ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Worker:
        def answer(self) -> int:
            return 42

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    stop_ray(start_ray("local", 1))
    ray = start_ray(ray_address)
    try:
        assert ray.get(ray.remote(num_cpus=1)(Worker).remote().answer.remote(), timeout=120) == 42
    finally:
        stop_ray(ray)


@pytest.mark.parametrize(("told", "mode"), [(None, 0), ("token", 1), ("disabled", 0)])
def test_ray_is_told_the_mode_of_now_not_that_of_a_ray_before(
    told: str | None, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._raylet import Config, get_authentication_mode

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled" if mode else "token")
    Config.initialize("")
    assert get_authentication_mode() != mode
    if told is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    else:
        monkeypatch.setenv("RAY_AUTH_MODE", told)
    connection.tell_ray_the_mode()
    assert get_authentication_mode() == mode
    assert os.environ.get("RAY_AUTH_MODE") == told


def test_a_ray_that_does_not_start_leaves_no_token_mode_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        os.environ["RAY_AUTH_MODE"] = "token"  # as ray.init does before it starts anything
        raise InputError("no room")

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(connection, "_start", fails)
    with pytest.raises(InputError, match="no room"):
        start_ray("local")
    assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.parametrize("address", ["local", "127.0.0.1:1"])
def test_only_a_ray_of_ones_own_gets_a_token_made_up_where_home_cannot_be_written_and_only_while_it_starts(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def fails(*_: object) -> None:
        seen.append(os.environ.get("RAY_AUTH_MODE") == "token" and "RAY_AUTH_TOKEN" in os.environ)
        raise InputError("no room")

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # what is changed below is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(connection, "_start", fails)
    with pytest.raises(InputError, match="no room"):
        start_ray(address)
    assert seen == [address == "local"]
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(os.environ)


def test_sigterm_while_ray_starts_is_an_interruption_as_at_any_other_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handler of it would end the process with exit code 15."""
    import ray

    def starts(**_: object) -> None:
        ray._private.utils.set_sigterm_handler(lambda number, frame: sys.exit(number))  # as ray.init does
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ray, "init", starts)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            start_ray("local")
    finally:
        signal.signal(signal.SIGTERM, before)
