"""The connection to Ray: an embedded one on this machine, or a cluster's; and the workers that it gives."""

import json
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from cluster.placement import Slots, memory_share
from sweeps.errors import InputError

OBJECT_STORE_BYTES = 80 * 1024**2
"""Ray's least: nothing heavy goes through it."""
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0: no other machine can join."""


def start_ray(address: str, workers: int | None = None) -> Any:
    """Start Ray on this machine ("local") or join a cluster; returns the ray module. InputError where it fails."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray keeps its auth token under HOME; where that cannot be written, one that lives as long as this process will do.
    if "RAY_AUTH_MODE" not in os.environ and not os.access(Path.home(), os.W_OK):
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if address == "local":  # its workers inherit it: large pages, which a step on a CPU runs 2 to 6 % faster on
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    code = str(Path(__file__).resolve().parent.parent)  # where `sweeps` and `cluster` are, for the workers
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
    with _on_loopback() if address == "local" else nullcontext():
        ray = _start(address, workers)
    _protect_token()  # Ray makes one where there was none, for everybody to read
    return ray


def _start(address: str, workers: int | None) -> Any:
    import ray

    before = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    try:
        if address == "local":
            cpus = workers or os.cpu_count()
            ray.init(address="local", num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        else:
            _join(ray, address, quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"Ray is not reachable at {address!r}: {str(error).splitlines()[0]}. Start the cluster, correct --address "
            "(or RAY_ADDRESS), or use --address local for a Ray of its own on this machine."
        ) from None
    # Ray puts a handler of its own in the driver, which kills Ray under it; whoever set one before keeps it.
    if before not in (None, signal.SIG_DFL) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
    return ray


@contextmanager
def _on_loopback() -> Iterator[None]:
    """What starts in here listens on 127.0.0.1 alone; else each process of Ray would on every interface.

    Ray made this switch for desktops, whose firewalls ask at every start. It is read when Ray is imported and by each
    of its processes, and is put back, so that a cluster that is started later from here is none of its business."""
    before = os.environ.get(LOOPBACK)
    os.environ.setdefault(LOOPBACK, "0")
    try:
        yield
    finally:
        if before is None:
            del os.environ[LOOPBACK]


def _protect_token() -> None:
    """Take others' right to read Ray's token, with which they could run code here, where the file is this user's."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with suppress(OSError):  # there is none, or the file system knows no permissions
        status = path.stat()
        if status.st_uid == os.getuid() and status.st_mode & 0o077:
            path.chmod(0o600)


def _join(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    """Join a cluster. Ray retries an address that does not answer for a long time; ask the port first."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        with socket.create_connection((host, int(port)), timeout=10):
            pass
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


def make_worker(ray: Any, slots: Slots) -> Any:
    """A new worker, unnamed: a name that a dead one had may be taken for a while."""
    from cluster.worker import Worker

    return ray.remote(**slots.options)(Worker).remote(memory_share(slots.together))


def gpu_bytes(ray: Any) -> int:
    """The memory of a GPU of the cluster, as a process on it sees it."""

    def look() -> int:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)

    return int(ray.get(ray.remote(num_gpus=0.01, num_cpus=1, max_retries=0)(look).remote()))
