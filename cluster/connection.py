"""The connection to Ray: an embedded one on this machine, or a cluster's; and the workers that it gives."""

import gc
import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from cluster.placement import Node, Place
from sweeps.errors import InputError

OBJECT_STORE_BYTES = 80 * 1024**2
"""Ray's least: nothing heavy goes through it."""
GPU_SECONDS = 120.0
"""How long a node gets to start a process, import torch and tell the memory of a GPU."""
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0: no other machine can join."""
NODE_PROCESS = "RAY_RAYLET_PID"
"""The process without which Ray's native code sees no use in going on."""
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
_ours: list[str] = []
"""Which of them are set, if at all, for the Ray that was started last from this process, and not by the user."""


def start_ray(address: str, workers: int | None = None) -> Any:
    """Start Ray on this machine ("local"), with room for so many `workers` at least, or join a cluster; returns the ray
    module. InputError where it fails."""
    global _ours
    untold = [name for name in AUTH if name not in os.environ]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray keeps its auth token under HOME; where that cannot be written, one that lives as long as this Ray will do. A
    # cluster has one of its own, or none.
    if address == "local" and "RAY_AUTH_MODE" not in os.environ and not os.access(Path.home(), os.W_OK):
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if address == "local":  # its workers inherit it: large pages, which a step on a CPU runs 2 to 6% faster on
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    code = str(Path(__file__).resolve().parent.parent)  # where `sweeps` and `cluster` are, for the workers
    others = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one not in ("", code)]
    os.environ["PYTHONPATH"] = os.pathsep.join([code, *others])
    _outlive_ray()
    tell_ray_the_mode()
    try:
        with _on_loopback() if address == "local" else nullcontext():
            ray = _start(address, workers)
    except BaseException:
        _forget(untold)
        raise
    _ours = untold
    protect_token()  # Ray makes one where there was none, for everybody to read
    return ray


def _start(address: str, workers: int | None) -> Any:
    import ray

    before = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    where = repr(address)
    try:
        if address == "local":
            cpus = max(os.cpu_count() or 1, workers or 1)  # all of them: a worker may be a gang of several processes
            ray.init(address="local", num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        else:
            if address == "auto":  # Ray's note of its last cluster, which may long have ended
                address = ray._private.services.canonicalize_bootstrap_address(address) or address
                where = f"{address}, which is 'auto' here"
            _join(ray, address, quiet)
    except InputError:  # it says itself what to do
        raise
    except SystemExit:  # SIGTERM, which Ray answers so while it starts: whoever called this takes it as Ctrl-C
        raise KeyboardInterrupt from None
    except Exception as error:  # of a node that starts too slowly Ray raises no other kind
        if address == "local":
            raise InputError(
                f"Ray did not start on this machine: {_plainly(error)}. Where the machine is busy or short of memory "
                "or of space under /tmp, make room and run this again; else escala doctor says more."
            ) from None
        raise InputError(
            f"Ray is not reachable at {where}: {_plainly(error)}. Start the cluster, correct --address "
            "(or RAY_ADDRESS), or use --address local for a Ray of its own on this machine."
        ) from None
    # Ray puts a handler of its own in the driver, which kills Ray under it; whoever set one before keeps it.
    if before not in (None, signal.SIG_DFL) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
    return ray


def stop_ray(ray: Any) -> None:
    """Leave a cluster, or end a Ray of one's own. This process may join another then, with token or without.

    A reference to one of Ray's objects that dies while Ray shuts down ends this process at once, with exit code 1 and
    without a word; and a garbage collection, which may find one, comes in whatever thread allocates. So all garbage
    goes before, and none while it lasts.
    """
    global _ours
    collects = gc.isenabled()
    gc.disable()
    try:
        gc.collect()
        ray.shutdown()
    finally:
        if collects:
            gc.enable()
    _forget(_ours)  # and not those of the next, nor of this process's children
    _ours = []


def _forget(names: list[str]) -> None:
    for name in names:
        os.environ.pop(name, None)


def _outlive_ray() -> None:
    """Ray ends a process at once, without a word, whose connection to its node breaks while that node's process is
    dead. A driver knows of none, so Ray looks at its parent instead: that of a driver under nohup, or of a service, is
    init, which counts as dead. So it is told to look at this process. It reads that once, at its import."""
    if "ray" in sys.modules:
        return
    before = os.environ.get(NODE_PROCESS)
    os.environ[NODE_PROCESS] = str(os.getpid())
    import ray  # noqa: F401

    if before is None:
        del os.environ[NODE_PROCESS]
    else:
        os.environ[NODE_PROCESS] = before


def tell_ray_the_mode() -> None:
    """Ray keeps copies of the mode and of the token: those of a Ray of one's own, which turns token auth on, or of what
    was set before. A cluster without would take such a driver for dead."""
    if "ray" not in sys.modules:  # it will read them at its import
        return
    import ray

    told = "RAY_AUTH_MODE" in os.environ
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
    if not told:
        del os.environ["RAY_AUTH_MODE"]


@contextmanager
def _on_loopback() -> Iterator[None]:
    """What starts in here listens on 127.0.0.1 alone; else each process of Ray would on every interface.

    Ray made this switch for desktops, whose firewalls ask at every start. Each of its processes reads it from the
    environment, and this one did so at its import, whoever imported it. All is put back, so that a cluster that is
    started or joined later from here is none of its business."""
    from ray._private import ray_constants

    before, among_many = os.environ.get(LOOPBACK), ray_constants.ENABLE_RAY_CLUSTER
    os.environ.setdefault(LOOPBACK, "0")
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(LOOPBACK, False)
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = among_many
        if before is None:
            del os.environ[LOOPBACK]


def protect_token() -> None:
    """Take others' right to read Ray's token, with which they could run code here, where the file is this user's."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with suppress(OSError):  # there is none, or the file system knows no permissions
        status = path.stat()
        if status.st_uid == os.getuid() and status.st_mode & 0o077:
            path.chmod(0o600)


def _join(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    """Join a cluster. Ray retries an address that does not answer, or that asks for a token, for a long time."""
    if "://" in address:
        raise ValueError("that is an address for `escala submit`, or for Ray's client, which hides the nodes")
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass
        try:
            with _hushed():
                ray._raylet.GcsClient(address=address)
        except ray.exceptions.AuthenticationError:
            raise InputError(
                f"the Ray cluster at {address} asks for a token, and takes "
                f"{'not the one' if os.environ.get('RAY_AUTH_MODE') == 'token' else 'none'} of this process. Set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the token that its nodes have."
            ) from None
        except ray.exceptions.RayError as error:
            raise ConnectionError(_plainly(error)) from None
    # Of a node that dies Ray prints the last forty lines of its log; what that means here is said in words.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    ray.init(address=address, log_to_driver=quiet["log_to_driver"], logging_level=quiet["logging_level"])


def driver_cpus(ray: Any) -> float:
    """CPUs of the cluster that the job of this process holds for it, so that no worker waits for them for ever."""
    told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    job_id = told.get("metadata", {}).get("job_submission_id")
    if job_id is None:  # not submitted
        return 0.0
    # Ray's own record of the job: nothing that it shows to others tells the job's resources.
    record = ray.experimental.internal_kv._internal_kv_get(f"_ray_internal_job_info_{job_id}", namespace="job")
    return float(json.loads(record or "{}").get("entrypoint_num_cpus") or 0.0)


@contextmanager
def _hushed() -> Iterator[None]:
    """Without what native code writes to stderr: what it says is raised as well."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _plainly(error: Exception) -> str:
    """The first line of what Ray says; of a mismatch of versions, all of it."""
    lines = str(error).split("\n")
    return " ".join(str(error).split()) if lines[0].startswith("Version mismatch") else lines[0].rstrip(".")


def make_worker(ray: Any, place: Place, own_trainer: bool, host_part: float) -> Any:
    """A new worker in a place, unnamed: a name that a dead one had may be taken for a while. `own_trainer`: the study
    brings its own. `host_part`: of its node's memory, each process's."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    demand = place.demand
    if demand.workers > 1:
        from cluster.gang import make_gang

        return make_gang(ray, demand, host_part, place.node)
    from cluster.worker import Worker

    there = NodeAffinitySchedulingStrategy(node_id=place.node, soft=False)
    actor = ray.remote(**demand.options(), scheduling_strategy=there)(Worker)
    return actor.remote(demand.gpus, host_part, own_trainer)


def cluster_nodes(ray: Any, *, memory_too: bool = False, barred: Collection[str] = ()) -> list[Node]:
    """The living nodes that are not barred, with what Ray may give of them; the memory of their GPUs, if asked, is
    looked up once a kind, and 0 where no node of the kind tells it."""
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in barred]
    memory: dict[str, int] = {}
    here, held = ray.get_runtime_context().get_node_id(), driver_cpus(ray)
    kinds = {
        node["NodeID"]: next((name for name in node["Resources"] if name.startswith("accelerator_type:")), "")
        for node in alive
        if node["Resources"].get("GPU")
    }
    for node_id, kind in kinds.items() if memory_too else ():
        if kind not in memory:
            with suppress(ray.exceptions.RayError):  # it may have died a moment ago: another of its kind is asked
                memory[kind] = gpu_bytes(ray, node_id)
    found = []
    for node in alive:
        resources, node_id = node["Resources"], node["NodeID"]
        cpus = resources.get("CPU", 0.0) - (held if node_id == here else 0.0)
        found.append(Node(node_id, max(0.0, cpus), resources.get("GPU", 0.0), memory.get(kinds.get(node_id, "-"), 0)))
    return found


def gpu_bytes(ray: Any, node_id: str) -> int:
    """The memory of a GPU of a node, as a process on it sees it; 0 where none is seen: Ray was only told of GPUs.

    It takes nothing of the node's room, which another study's workers may hold for days. RayError where the node does
    not answer in time.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look() -> int:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0

    there = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    options = {"num_cpus": 0, "max_retries": 0, "max_calls": 1, "scheduling_strategy": there}
    call = ray.remote(**options)(look).remote()
    try:
        return int(ray.get(call, timeout=GPU_SECONDS))
    except ray.exceptions.GetTimeoutError:
        ray.cancel(call, force=True)
        raise
