"""The jobs of a cluster, as Ray's dashboard tells and takes them.

Guarded against: a wrong address that a client waits at for ever, or that is handed the cluster's token. So the address
is first asked without it, within seconds, whether it is a dashboard of Ray, and whether that wants a token; each way in
which it is not has a sentence. What the Jobs API knows of a job (its command, its environment variables, its metadata)
it shows to everyone who may ask; so no secret ever goes into a job.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.connection import protect_token, tell_ray_the_mode
from sweeps.errors import InputError

PROBE_SECONDS = 10.0
"""How long a dashboard has to say its version."""
ANSWER_SECONDS = 60.0
"""How long it has for anything else, and how long it may be gone while a job is followed."""
STOP_SECONDS = 60
"""What a driver gets between SIGTERM and SIGKILL: cells keep checkpoints within 20 s, then the mirror is brought up to
date. Ray's own 3 s are too few. Given to Ray as the job's RAY_JOB_STOP_WAIT_TIME_S."""
QUIET_SECONDS = 120.0
"""After so many without a line the log's connection is made anew: that of a machine which is gone says nothing for
ever. Not fewer: Ray holds a connection that was left until the job's next line."""
POLL_SECONDS = 0.25
MOST_NODES = 10_000
"""As many as Ray's dashboard lists at most."""
WAITING_SECONDS = 15.0
"""After so many without a start it is said what a job waits for."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
TOKEN_PLACES = "RAY_AUTH_TOKEN, a file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
TOKEN_HELP = f"`ray get-auth-token` prints it on the head; it is read from {TOKEN_PLACES}"
UNREACHED = {"refused": "connection refused", "resolve": "no such host", "unreachable": "no way to that host"}


class ClusterGone(Exception):
    """A cluster that ended under a job that was followed."""


@dataclass(frozen=True)
class Job:
    """A job of Escala."""

    id: str
    study: str
    store: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    started: float
    """Unix seconds."""
    ended: float | None
    exit_code: int | None
    person: str
    commit: str
    package: str
    """The digest of what was sent."""
    message: str
    """Ray's own words."""

    @property
    def lives(self) -> bool:
        return self.status not in ENDED


@dataclass(frozen=True)
class Dashboard:
    """A cluster's dashboard that answers, and takes this client's token."""

    address: str
    client: Any
    """ray.job_submission.JobSubmissionClient"""
    wants_token: bool


def check_address(address: str) -> str:
    """The address of a dashboard, cleaned. InputError for anything else that Ray calls an address."""
    example = "--address http://HOST:8265"
    if not address:
        raise InputError(
            f"--address is missing: the dashboard of a cluster, {example} (or RAY_API_SERVER_ADDRESS). To train on "
            "this machine: escala run."
        )
    if address in ("auto", "local"):
        raise InputError(
            f"--address: found {address!r}; a job goes to the dashboard of a cluster: {example}. To train on this "
            "machine: escala run."
        )
    if "://" not in address:
        host = address.partition(":")[0]
        port = address.partition(":")[2] or "8265"
        found = "8265" if port in ("6379", "10001") else port
        raise InputError(
            f"--address: found {address!r}, without http://. Did you mean --address http://{host}:{found}?"
        )
    address = address.partition("#")[0]  # of a page that was copied from a browser
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise InputError(f"--address: found {address!r}, which is no address ({error}); write {example}.") from None
    if parts.scheme not in ("http", "https"):
        hint = f" Ray's client port takes no jobs: --address http://{parts.hostname}:8265?" if parts.hostname else ""
        raise InputError(f"--address: found {parts.scheme}://; a dashboard speaks http or https: {example}.{hint}")
    if parts.username or parts.password:
        raise InputError(
            "--address: found a password in it, which would be printed and kept. Leave it out; a token is read from "
            f"{TOKEN_PLACES}."
        )
    try:
        whole = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        whole = False
    if not whole:
        raise InputError(f"--address: found {address!r}, which names no host and port; write {example}.")
    return address.rstrip("/")


def connect(address: str) -> Dashboard:
    """Reach a cluster's dashboard. InputError that says what is wrong with address, token or version."""
    address = check_address(address)
    found = _ask(address, {})
    wants_token = found is None
    if found is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        tell_ray_the_mode()
        protect_token()  # `ray get-auth-token --generate` makes one for everybody to read
        found = _ask(address, _token_header(address))
    if found is None:
        raise InputError(f"{address} does not see the token that was sent: does a proxy drop its header?")
    _check_version(address, found)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets this variable overrule what its client is told
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        """Ray's, which waits for ever for a dashboard that does not answer."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": ANSWER_SECONDS, **options})

    with answering(address):
        return Dashboard(address, Client(address), wants_token)


def _ask(address: str, headers: dict[str, str]) -> str | None:
    """The version of Ray at an address; None where it wants a token. InputError where it is no dashboard."""
    import requests

    try:
        reply = requests.get(f"{address}/api/version", headers=headers, timeout=PROBE_SECONDS, allow_redirects=False)
    except requests.exceptions.SSLError as error:
        raise InputError(
            f"no https with {address} ({_reason(error)}): the dashboard speaks http, or has a certificate of your own "
            "authority, whose file REQUESTS_CA_BUNDLE names."
        ) from None
    except requests.exceptions.Timeout:
        raise InputError(
            f"{address} does not answer within {PROBE_SECONDS:.0f} s: a firewall, or a host that is gone. From outside "
            "a cluster the dashboard is reached through a tunnel, such as ssh -L 8265:localhost:8265 HEAD."
        ) from None
    except requests.exceptions.ConnectionError as error:
        if reason := next((reason for word, reason in UNREACHED.items() if word in str(error)), None):
            raise InputError(
                f"nothing answers at {address} ({reason}). Start the cluster, or correct --address (or "
                "RAY_API_SERVER_ADDRESS): the dashboard's port is 8265 unless the head was started with another."
            ) from None
        raise InputError(
            f"{address} answers, but not as a web server does: it is another port of the cluster, perhaps. 6379 is "
            "where nodes join and 10001 where Ray's clients do; jobs go to the dashboard's port, 8265 by default."
        ) from None
    except requests.exceptions.RequestException as error:
        raise InputError(f"--address: {address} cannot be asked ({_reason(error)}). Write http://HOST:8265.") from None
    if reply.status_code == 401 and "authentication token" in reply.text:
        return None
    if reply.status_code == 403 and "authentication token" in reply.text:
        raise InputError(f"{address} does not take the token of {_token_source()}: it has another. {TOKEN_HELP}.")
    if reply.status_code == 401:
        raise InputError(f"{address} asks for a login, but not as Ray does: a proxy before the dashboard, perhaps.")
    try:
        return str(reply.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{address} is a web server, but no dashboard of Ray (status {reply.status_code} for /api/version). The "
            "dashboard's port is 8265 by default."
        ) from None


def _token_header(address: str) -> dict[str, str]:
    """What Ray's own client sends. InputError where there is no token."""
    wanted = f"{address} wants a token, and"
    if os.environ["RAY_AUTH_MODE"].lower() != "token":
        mode = os.environ["RAY_AUTH_MODE"]
        raise InputError(f"{wanted} RAY_AUTH_MODE={mode} sends none: set RAY_AUTH_MODE=token. {TOKEN_HELP}.")
    if not _token_source():
        raise InputError(f"{wanted} there is none here. {TOKEN_HELP}.")
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray.exceptions import RayError

    headers: dict[str, str] = {}
    with suppress(RayError):  # a file that is not there
        headers = get_auth_headers_if_auth_enabled({})
    if not headers:
        raise InputError(f"{wanted} {_token_source()} holds none. {TOKEN_HELP}.")
    return headers


def _token_source() -> str:
    """Where Ray's client takes its token from, in its order; empty where from nowhere."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            return name
    return "~/.ray/auth_token" if (Path.home() / ".ray" / "auth_token").is_file() else ""


def _check_version(address: str, found: str) -> None:
    here = version("ray")
    if found.split(".")[:2] != here.split(".")[:2]:
        raise InputError(
            f"the cluster at {address} runs Ray {found}, and this is Ray {here}: neither the Jobs API nor this code is "
            f"tested across them. Install the same here (pip install 'ray[default]=={found}', in an environment of its "
            f"own), or give the cluster's nodes Ray {here}."
        )


@contextmanager
def answering(address: str) -> Iterator[None]:
    """Whatever Ray's client raises, in a sentence."""
    import requests
    from ray.exceptions import RayError

    try:
        yield
    except (requests.exceptions.RequestException, ConnectionError) as error:
        raise InputError(
            f"the dashboard at {address} no longer answers ({_reason(error)}). Look again with: escala jobs --address "
            f"{address}"
        ) from None
    except (RuntimeError, RayError) as error:
        raise InputError(f"the dashboard at {address} refuses: {_reason(error)}.") from None


def _reason(error: Exception) -> str:
    """The last words of an error: those before are about libraries."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].rpartition(": ")[2].strip("'\")([]. ")[:200]


# --- what there is -------------------------------------------------------------------------------------------------


def list_jobs(dashboard: Dashboard) -> list[Job]:
    """The jobs of Escala on a cluster, the oldest first."""
    with answering(dashboard.address):
        found = dashboard.client.list_jobs()
    mine = [one for one in found if one.submission_id and "escala.study" in (one.metadata or {})]
    return sorted(map(_job, mine), key=lambda job: job.started)


def head_cpus(dashboard: Dashboard) -> float | None:
    """The CPUs that the cluster's head has for Ray; None where the dashboard does not tell."""
    with answering(dashboard.address):
        reply = dashboard.client._do_request("GET", f"/api/v0/nodes?limit={MOST_NODES}")
    with suppress(ValueError, KeyError, TypeError):
        for node in reply.json()["data"]["result"]["result"]:
            if node["is_head_node"] and node["state"] == "ALIVE":
                return float(node["resources_total"].get("CPU", 0.0))
    return None


def find_job(dashboard: Dashboard, job_id: str) -> Job:
    """One of them. InputError where there is none of that name."""
    known = {job.id: job for job in list_jobs(dashboard)}
    if job_id not in known:
        raise InputError(
            f"no job {job_id!r} of Escala at {dashboard.address} (it has: {', '.join(known) or 'none'}). Jobs of "
            "others are stopped with: ray job stop."
        )
    return known[job_id]


def _job(details: Any) -> Job:
    told = details.metadata
    return Job(
        id=details.submission_id,
        study=told["escala.study"],
        store=told.get("escala.store", ""),
        status=details.status.value,
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        person=told.get("escala.person", ""),
        commit=told.get("escala.commit", ""),
        package=told.get("escala.package", ""),
        message=details.message or "",
    )


# --- what is done with them ----------------------------------------------------------------------------------------


def stop(dashboard: Dashboard, job_id: str, say: Callable[[str], None]) -> Job:
    """Stop a job and wait until it has ended: its cells keep checkpoints. InputError where there is no such job."""
    job = find_job(dashboard, job_id)
    if not job.lives:
        return job
    with answering(dashboard.address):
        dashboard.client.stop_job(job_id)
    say(f"{job_id} is asked to stop; its cells keep checkpoints ...")
    deadline = time.monotonic() + STOP_SECONDS + 30
    while (job := find_job(dashboard, job_id)).lives:
        if time.monotonic() > deadline:
            raise InputError(f"{job_id} has not stopped yet. Look with: escala jobs --address {dashboard.address}")
        time.sleep(POLL_SECONDS)
    return job


def follow(dashboard: Dashboard, job_id: str, write: Callable[[str], None], say: Callable[[str], None]) -> Job:
    """Write a job's log as it grows, in pieces that may end within a line, from its beginning until the job has ended;
    `say` is for what is no log.

    A dashboard that is gone for a while is waited for. Raises ClusterGone where it stays away, or comes back as another
    cluster that does not know the job.
    """
    import aiohttp

    written, gone = 0, None
    began, told = time.monotonic(), False

    def put(text: str) -> None:
        nonlocal written
        write(text)
        written += len(text)

    while True:
        try:
            job = next((one for one in list_jobs(dashboard) if one.id == job_id), None)
            if job is not None and not job.lives:
                with suppress(InputError), answering(dashboard.address):  # a job that never started may have no log
                    put(dashboard.client.get_job_logs(job_id)[written:])  # what a broken connection has lost
                return job
            if job is not None and job.status == "RUNNING":
                asyncio.run(_tail(dashboard.client, job_id, written, put))
            gone = None
        except (InputError, RuntimeError, OSError, aiohttp.ClientError):
            gone = gone or time.monotonic()
            if time.monotonic() - gone > ANSWER_SECONDS:
                raise ClusterGone(
                    f"the dashboard at {dashboard.address} is gone for {ANSWER_SECONDS:.0f} s. The store keeps what "
                    "was done: submit the study again when the cluster is back."
                ) from None
        else:
            if job is None:
                raise ClusterGone(
                    f"the cluster at {dashboard.address} no longer knows {job_id}: it was started anew, perhaps. The "
                    "store keeps what was done: submit the study again."
                )
        if not written and not told and time.monotonic() - began > WAITING_SECONDS:
            told = True
            say("waiting for a free CPU on the cluster's head, and for it to be set up ...")
        time.sleep(POLL_SECONDS)


async def _tail(client: Any, job_id: str, skip: int, write: Callable[[str], None]) -> None:
    """Write a log but for its first `skip` characters, as it grows, until it ends or is quiet for long."""
    clock, seen = asyncio.get_running_loop().time, 0
    with suppress(TimeoutError):
        async with asyncio.timeout(QUIET_SECONDS) as patience:
            async for text in client.tail_job_logs(job_id):
                patience.reschedule(clock() + QUIET_SECONDS)
                if fresh := text[max(0, skip - seen) :]:
                    write(fresh)
                seen += len(text)
