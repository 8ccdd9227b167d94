"""What `escala doctor --address` checks of a Ray cluster: each of its nodes, the store that they share, MLflow, auth.

It joins the cluster, sends one small actor to each node and leaves nothing: no actor, no file, and in MLflow a deleted
experiment. Every finding says what was found, and a fault what to do.
"""

import ipaddress
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.connection import start_ray, stop_ray
from cluster.credentials import check_file, check_uri, forbids, refusal
from cluster.doctor import Finding, disk, find_store
from cluster.nodeprobe import Probes, Report, caution, obstacle, this_process
from cluster.nodes import has_autoscaler, living_nodes
from sweeps.errors import InputError
from sweeps.units import plural

SKEW_SECONDS = 2.0
"""Clocks may differ by so much. Escala times out by the clock of who waits, but logs and claims show wall clocks."""
MLFLOW_SECONDS = 10


def check_cluster(address: str, store: Path, tracking_uri: str | None) -> list[Finding]:
    """All checks of a cluster. Trains nothing; writes a file into the store and an experiment into the MLflow server,
    and takes both away again.

    Raises InputError where the cluster cannot be joined.
    """
    path = store.expanduser().resolve()
    root = path if os.path.exists(path / "store.json") else None  # not one that may not be looked into either
    findings = [_driver_store(store)]
    ray = start_ray(address)
    try:
        here, nodes = this_process(), living_nodes(ray)
        cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
        words = f"{plural(len(nodes), 'node')} with {cpus:g} CPUs and {gpus:g} GPUs at {address}"
        findings.append(Finding("cluster", True, words, "it has no CPU for a worker: add nodes." if not cpus else ""))
        findings.append(_scaling(ray))
        with Probes(ray, root) as probes:
            probes.begin(nodes)
            reports = probes.reports()
        for report in reports:
            findings += examine(report, here, root)
    finally:
        stop_ray(ray)
    return [*findings, _auth(address), check_mlflow(store, tracking_uri)]


def _driver_store(store: Path) -> Finding:
    try:
        place = find_store(store)
    except InputError as error:
        return Finding("store", False, str(error))
    if place is None:
        found = f"none yet at {store.expanduser().resolve()}: what the nodes see of it is not checked"
        return Finding("store", True, found, "the first plan or run makes it; then ask again.")
    return Finding("store", True, f"{place.root}, writable here")


def _scaling(ray: Any) -> Finding:
    found = has_autoscaler(ray)
    if found:
        return Finding("autoscaler", True, "present: it is told what waits, and idle workers are given back")
    words = "not known: its monitor has not reported" if found is None else "none"
    return Finding("autoscaler", True, f"{words}; the nodes that there are take cells, and those that join")


def examine(report: Report, here: dict[str, Any], root: Path | None) -> list[Finding]:
    """What a node's report says, held against this process (`here`)."""
    return list(_examine(report, here, root))


def _examine(report: Report, here: dict[str, Any], root: Path | None) -> Iterator[Finding]:
    what = f"node {report.node}"
    if wrong := obstacle(report, here, root):
        yield Finding(what, False, "may not train", wrong)
    if report.silent:
        return
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in report.versions.items())
    yield Finding(
        what, *_versions(report, here, f"{report.host}: Python {report.python}, {versions}, code {report.code}")
    )
    if report.node.gpus or report.gpus:
        names = ", ".join(report.gpus) or "none seen"
        driver = f", driver {report.driver}" if report.driver else ""
        seen = len(report.gpus) >= report.node.gpus
        advice = (
            f"Ray counts {report.node.gpus:g} and the node's driver shows {len(report.gpus)}: start its container with "
            "its GPUs, or Ray with the number that there is (--num-gpus)."
        )
        yield Finding(f"{what} GPUs", seen, f"{names}{driver}", "" if seen else advice)
    if report.free_bytes is not None and report.store == "same":
        yield disk(f"{what} store", "the same folder, written and read back", report.free_bytes)
    if report.clock_seconds is not None:
        ahead, off = report.clock_seconds, max(0.01, report.clock_error)
        side = "ahead of" if ahead > 0 else "behind"
        fine = abs(ahead) - off < SKEW_SECONDS
        advice = f"set its clock (chrony, ntpd): more than {SKEW_SECONDS:g} s make logs and curves hard to read."
        words = f"{abs(ahead):.2f} s {side} this machine's, give or take {off:.2f} s"
        yield Finding(f"{what} clock", fine, words, "" if fine else advice)


def _versions(report: Report, here: dict[str, Any], found: str) -> tuple[bool, str, str]:
    missing = [name for name, version in report.versions.items() if version is None]
    if missing:
        return False, found, f"pip install -c constraints.txt {' '.join(missing)} there."
    if report.versions["ray"] != here["versions"]["ray"]:
        return False, found, f"this process has Ray {here['versions']['ray']}: install one version everywhere."
    if report.python.split(".")[:2] != here["python"].split(".")[:2]:
        return False, found, f"this process has Python {here['python']}: use one minor version everywhere."
    return True, found, caution(report, here) or ""


def _auth(address: str) -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode == "token":
        return Finding("Ray token auth", True, "on: RAY_AUTH_MODE=token, and the cluster took this machine's token")
    host = address.rpartition(":")[0].strip("[]")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    advice = "" if loopback else "who reaches its ports runs code there: set RAY_AUTH_MODE=token and one token on all."
    return Finding("Ray token auth", True, "off: the cluster let this process in without a token", advice)


def check_mlflow(store: Path, tracking_uri: str | None) -> Finding:
    """The database in the store, or whether a server answers this process and lets it write."""
    if tracking_uri is None:
        found = f"the database in the store ({store.expanduser().resolve() / 'mlflow' / 'mlflow.db'})"
        return Finding("MLflow", True, found, "only this driver writes it; a team wants a server: --tracking-uri.")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    from cluster.tracking import ask_database, try_once, words

    try_once(MLFLOW_SECONDS)
    try:
        if check_uri(tracking_uri).startswith(("http://", "https://")):
            check_file()
        ask_database(tracking_uri)
        client = MlflowClient(tracking_uri=tracking_uri)
        client.search_experiments(max_results=1)
    except InputError as error:
        return Finding("MLflow", False, str(error))
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        if refused := refusal(error, tracking_uri):
            return Finding("MLflow", False, refused)
        advice = "start the server, or correct --tracking-uri (MLFLOW_TRACKING_URI)."
        return Finding("MLflow", False, f"not reachable at {tracking_uri} from here: {words(error)}", advice)
    try:
        client.delete_experiment(client.create_experiment(f"escala-doctor-{secrets.token_hex(4)}"))
    except (MlflowException, SQLAlchemyError, OSError) as error:
        fault, advice = "an experiment could not be made and deleted", "a run makes one: the server's log says more."
        if forbids(error):
            fault = "this account may not write"
            advice = "a run makes an experiment there: ask its administrator for an account that may."
        return Finding("MLflow", False, f"reachable at {tracking_uri} from here, but {fault}: {words(error)}", advice)
    return Finding("MLflow", True, f"reachable at {tracking_uri} from here: an experiment was made and deleted")
