"""The nodes of a joined Ray cluster: which live, which are about to be taken away, and what their end means for cells.

A node that dies takes its workers along, and a preempted one is taken away within moments. Neither is a fault of the
cells that train there: they end as "preemption", which no budget counts, and go on elsewhere from their last
checkpoint. What dies by itself on a node that lives stays "infrastructure".

Ray's word that a node is dead is enough to try its cells again at once: the minute of silence (cluster/leftovers.py) is
for drivers whose attempts nobody else watches. The word may be wrong: a node that is only cut off from the head may
train on and write to the store. That does no harm. The next attempt takes the next lease epoch of the cell, so that the
old one is told that it is superseded, what it still logs does not count, and it cannot commit a result any more.
"""

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from cluster.connection import driver_cpus
from cluster.placement import Demand, Fleet, Node, Place
from cluster.scheduling import Schedule

IDLE_SECONDS = 60.0
"""A worker that had no cell for so long is given back, so that its node can be scaled down."""
GONE_SECONDS = 20.0
"""A head that did not answer for so long is gone. Ray kills a driver that lost it after 60 s, without a word."""
ANSWER_SECONDS = 5.0
"""How long the head may take to answer."""
ASK_AGAIN_SECONDS = 30.0
"""Of drivers on one cluster, the one that asked the autoscaler last is heard: each asks again."""
DYING_SECONDS = 1.0
"""Between the first and the last process of a machine that goes down."""
DOUBT_SECONDS = 60.0
"""How long a node on which a worker died with it gets no work although Ray says that it lives: Ray finds out late."""
REPORT_SECONDS = 15.0
"""The monitor of a cluster that was just started reports within so long."""
MOST_ASKED = 1000
"""Bundles that the autoscaler is asked for at most: it weighs every one of them each few seconds."""

Bundle = dict[str, float]
"""What is asked of one node: {"CPU": ..., "GPU": ...}."""


@dataclass(frozen=True)
class LivingNode:
    """A node that Ray takes for alive."""

    id: str
    address: str
    cpus: float
    gpus: float
    port: int = 0
    """Of Ray's own process there."""
    leaving: str | None = None
    """Why it takes no new work, if so."""

    def __str__(self) -> str:
        return f"{self.id[:8]} at {self.address}"


def living_nodes(ray: Any) -> list[LivingNode]:
    """The nodes that live, those among them that are drained: Ray's autoscaler, a cloud's notice of preemption, SIGTERM
    to `ray start --block` with RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, or `ray drain-node` announce their end so.

    Raises RayError where the head does not answer in time. (ray.nodes() would wait until Ray ends this process.)
    """
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    client = ray._private.worker.global_worker.gcs_client
    drained: dict[str, int] = client.get_draining_nodes(timeout=ANSWER_SECONDS)
    found = []
    for told in client.get_all_node_info(timeout=ANSWER_SECONDS).values():
        if told.state == GcsNodeInfo.ALIVE:
            node, has = told.node_id.hex(), told.resources_total
            leaving = _notice(drained[node]) if node in drained else None
            address = told.node_manager_address
            sizes = has.get("CPU", 0.0), has.get("GPU", 0.0)
            found.append(LivingNode(node, address, *sizes, told.node_manager_port, leaving))
    return sorted(found, key=lambda node: node.id)


def _notice(deadline_ms: int) -> str:
    left = deadline_ms / 1000 - time.time()
    return f"its node is drained and ends in {left:.0f} s" if left > 0 else "its node is drained"


def death(ray: Any, error: Exception, node: str) -> tuple[str, str]:
    """(kind of end, what happened) of the death of a worker that was placed on a node, or of ranks of a gang that lives
    for a moment more; `error` is that of its call.

    "preemption", where its node, or the one to which this driver is connected, died or is taken away, or the head does
    not answer: Ray ends the workers of a driver that it takes for dead. "out_of_memory", where Ray killed it for want
    of memory, or a rank that could not record it met that; else "infrastructure". The head learns of a node's end after
    seconds, and a machine that goes down may end its worker before Ray's own process: so that process is asked, and
    once more a moment later.
    """
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "out_of_memory", f"the worker died ({_first_line(error)})"
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, MemoryError):
        return "out_of_memory", _first_line(error.cause)
    if getattr(error, "preempted", False):
        return "preemption", "its node was preempted"
    try:
        living = {one.id: one for one in living_nodes(ray)}
    except ray.exceptions.RayError:
        return "preemption", "the head of the cluster does not answer"
    if node not in living:
        return "preemption", f"its node died ({_first_line(error)})"
    if (leaving := living[node].leaving) is not None:
        return "preemption", leaving
    if (here := ray.get_runtime_context().get_node_id()) not in living:
        return "preemption", "the node to which its driver was connected died"
    for seconds in (0.0, DYING_SECONDS) if node != here else ():
        time.sleep(seconds)
        if not _answers(living[node]):
            return "preemption", f"its node died ({_first_line(error)})"
    if isinstance(error, ray.exceptions.RayTaskError):
        return "infrastructure", _first_line(error.cause)
    return "infrastructure", f"the worker died ({_first_line(error)})"


def _answers(node: LivingNode) -> bool:
    try:
        with socket.create_connection((node.address, node.port), timeout=ANSWER_SECONDS):
            return True
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- the autoscaler ----------------------------------------------------------------------------------------------


def has_autoscaler(ray: Any) -> bool | None:
    """Whether the cluster starts and ends nodes by itself; None while its monitor has not reported.

    A monitor runs beside every head; where it only looks on, it names each node's type after the node (version 1 of
    Ray's autoscaler) or not at all (version 2).
    """
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
    from ray.experimental.internal_kv import _internal_kv_get

    told = json.loads(_internal_kv_get("__autoscaling_status") or "{}").get("autoscaler_report") or {}
    kinds = told.get("active_nodes") or {}
    if any(not kind.startswith("node_") for kind in kinds):
        return True
    client = ray._private.worker.global_worker.gcs_client
    reply = GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=ANSWER_SECONDS))
    if reply.autoscaling_state.autoscaler_state_version > 0:
        return any(node.ray_node_type_name for node in reply.cluster_resource_state.node_states)
    return False if kinds else None


def ask_autoscaler(bundles: Sequence[Bundle]) -> None:
    """Ask for room for so much in all, what has room already counted in. None takes earlier wishes back: they stand in
    the cluster until then, whether their driver lives or not."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle) for bundle in bundles[:MOST_ASKED]])


def wanted(schedule: Schedule, *, more: bool = True) -> list[Bundle]:
    """What runs and, if there is to be `more`, what could begin: one bundle a unit, since a gang is packed on one node;
    no more than the limits on what runs at once allow."""
    bounds, gpus = schedule.bounds, 0.0
    demands = [one.place.demand for one in schedule.running.values()]
    if more:
        demands += [job.demand for job in islice(schedule.waiting(), min(schedule.ready(), MOST_ASKED))]
    most = min(one for one in (bounds.units, bounds.cells, MOST_ASKED) if one is not None)
    found = []
    for demand in demands[:most]:
        gpus += demand.all_gpus
        if bounds.gpus is None or gpus <= bounds.gpus + 1e-9:
            found.append(bundle(demand))
    return found


def bundle(demand: Demand) -> Bundle:
    """A demand as one bundle of a node."""
    asked = {"CPU": demand.workers * demand.cpus, "GPU": demand.all_gpus}
    return {name: amount for name, amount in asked.items() if amount}


class Members:
    """A joined cluster as one driver follows it from look to look; `lost` is the look."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        context = ray.get_runtime_context()
        self.head: str = context.gcs_address
        self.here: str = context.get_node_id()
        """The node to which this driver is connected."""
        self._held = driver_cpus(ray)
        self._scales: bool | None = None
        self.barred: dict[str, str] = {}
        """Nodes on which no worker may start, and why."""
        self._doubted: dict[str, float] = {}
        """Nodes that are taken for dead, and until when."""
        self._nodes = living_nodes(ray)
        self._answered = time.monotonic()
        self._asked: tuple[float, list[Bundle]] = (0.0, [])

    def lost(self) -> str | None:
        """Why this driver can no longer reach the cluster, if so. Waits for a head that is silent."""
        while True:
            try:
                self._nodes = living_nodes(self.ray)
                break
            except self.ray.exceptions.RayError:
                if time.monotonic() - self._answered > GONE_SECONDS:
                    return f"its head at {self.head} does not answer"
            time.sleep(0.5)
        self._answered = time.monotonic()
        if all(node.id != self.here for node in self._nodes):
            return "the node to which this driver was connected died"
        return None

    def doubt(self, node_id: str) -> None:
        """A worker died with this node, whatever Ray says."""
        self._doubted[node_id] = time.monotonic() + DOUBT_SECONDS

    def living(self) -> list[LivingNode]:
        """The nodes that lived at the last look; one that takes no work says why."""
        now = time.monotonic()
        dead = {node: "its node is taken for dead" for node, until in self._doubted.items() if now < until}
        return [replace(one, leaving=one.leaving or self.barred.get(one.id) or dead.get(one.id)) for one in self._nodes]

    def follow(self, fleet: Fleet, busy: Sequence[Place], gpu_bytes: int = 0) -> dict[str, str]:
        """Make a fleet's nodes those that take new work, each GPU of a new one with so many bytes; `busy` are the
        places in use. Why the other living ones take none, by node id."""
        living = {node.id: node for node in self.living()}
        for known in fleet.nodes():
            if known.id not in living or living[known.id].leaving is not None:
                fleet.remove(known.id)
        left = {node.id for node in fleet.nodes()}
        for node in living.values():
            if node.leaving is None and node.id not in left:
                there = [place for place in busy if place.node == node.id]
                cpus = node.cpus - (self._held if node.id == self.here else 0.0)
                fleet.add(Node(node.id, cpus, node.gpus, gpu_bytes if node.gpus else 0), there)
        return {node.id: node.leaving for node in living.values() if node.leaving is not None}

    def scales(self, seconds: float = 0.0) -> bool:
        """Whether the cluster has an autoscaler; waits so long for one that may only have been started."""
        deadline = time.monotonic() + seconds
        while self._scales is None:
            self._scales = has_autoscaler(self.ray)
            if time.monotonic() >= deadline:
                break
            time.sleep(0.5)
        return bool(self._scales)

    def ask(self, bundles: list[Bundle]) -> None:
        """Tell an autoscaler what is wished for now, where there is one: at changes, and now and then."""
        when, before = self._asked
        stale = bool(bundles) and time.monotonic() - when > ASK_AGAIN_SECONDS
        if (bundles != before or stale) and self.scales():
            ask_autoscaler(bundles)
            self._asked = (time.monotonic(), bundles)

    def close(self) -> None:
        """Take back what was asked for, of a head that answers."""
        if self._asked[1] and self.lost() is None:
            self.ask([])
