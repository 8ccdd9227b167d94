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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

IDLE_SECONDS = 60.0
"""A worker that had no cell for so long is given back, so that its node can be scaled down."""
GONE_SECONDS = 20.0
"""A head that refuses connections for so long is gone. Ray kills a driver that lost it after 60 s, without a word."""
ANSWER_SECONDS = 2.0
"""How long the head may take to accept a connection."""
ASK_AGAIN_SECONDS = 30.0
"""Of drivers on one cluster, the one that asked the autoscaler last is heard: each asks again."""
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
    leaving: str | None = None
    """Why it takes no new work, if so."""

    def __str__(self) -> str:
        return f"{self.id[:8]} at {self.address}"


def living_nodes(ray: Any) -> list[LivingNode]:
    """The nodes that live, those among them that are drained: Ray's autoscaler, a cloud's notice of preemption, SIGTERM
    to `ray start --block` with RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, or `ray drain-node` announce their end so."""
    drained: Mapping[str, int] = ray._private.state.state.get_draining_nodes()  # no public call tells it
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            leaving = _notice(drained[node["NodeID"]]) if node["NodeID"] in drained else None
            found.append(
                LivingNode(
                    node["NodeID"], node["NodeManagerAddress"], has.get("CPU", 0.0), has.get("GPU", 0.0), leaving
                )
            )
    return sorted(found, key=lambda node: node.id)


def _notice(deadline_ms: int) -> str:
    left = deadline_ms / 1000 - time.time()
    return f"its node is drained and ends in {left:.0f} s" if left > 0 else "its node is drained"


def death(ray: Any, error: Exception, node: str | None = None) -> tuple[str, str]:
    """(kind of end, what happened) of the death of a worker, which was placed on `node`, or of one that never started.

    "preemption", where its node died or is taken away, or Ray ended the workers of a driver that it took for dead;
    "out_of_memory", where Ray killed it for want of memory; else "infrastructure". `error` is that of its call.
    """
    said = f"the worker died ({_first_line(error)})"
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "out_of_memory", said
    if getattr(error, "preempted", False):
        return "preemption", "its node was preempted"
    if not answers(ray.get_runtime_context().gcs_address):  # a call would wait for it until Ray ends this process
        return "preemption", "the head of the cluster does not answer"
    actor = getattr(error, "actor_id", None)
    table = ray._private.state.state.actor_table(actor) if actor else None
    cause = table["DeathCause"].actor_died_error_context if table else None
    if cause is not None and cause.reason == cause.NODE_DIED:
        return "preemption", f"its node died ({cause.node_death_info.reason_message or 'Ray does not say why'})"
    if cause is not None and cause.reason == cause.OWNER_DIED:
        return "preemption", "Ray took its driver for dead"
    if node is not None:  # a machine that goes down may end its worker a moment before Ray's own process there
        left = {one.id: one.leaving for one in living_nodes(ray)}
        if node not in left or left[node]:
            return "preemption", left.get(node) or "its node died"
    return "infrastructure", said


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- the autoscaler ----------------------------------------------------------------------------------------------


def has_autoscaler(ray: Any) -> bool:
    """Whether the cluster starts and ends nodes by itself.

    A monitor runs beside every head and reports in either case; where it only looks on, it names each node's type after
    the node (version 1 of Ray's autoscaler) or not at all (version 2).
    """
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
    from ray.experimental.internal_kv import _internal_kv_get

    told = json.loads(_internal_kv_get("__autoscaling_status") or "{}").get("autoscaler_report") or {}
    if any(not kind.startswith("node_") for kind in told.get("active_nodes") or ()):
        return True
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10))
    reports = reply.autoscaling_state.autoscaler_state_version > 0
    return reports and any(node.ray_node_type_name for node in reply.cluster_resource_state.node_states)


def ask_autoscaler(bundles: Sequence[Bundle]) -> None:
    """Ask for room for so much in all, what has room already counted in. None takes earlier wishes back: they stand in
    the cluster until then, whether their driver lives or not."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle) for bundle in bundles[:MOST_ASKED]])


class Members:
    """A joined cluster as one driver follows it from look to look. Calls Ray only while the head answers."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        context = ray.get_runtime_context()
        self.head: str = context.gcs_address
        self.here: str = context.get_node_id()
        """The node to which this driver is connected."""
        self.autoscaled = has_autoscaler(ray)
        self.barred: dict[str, str] = {}
        """Nodes on which no worker may start, and why."""
        self._answered = time.monotonic()
        self._asked: tuple[float, list[Bundle]] = (0.0, [])

    def lost(self) -> str | None:
        """Why this driver can no longer reach the cluster, if so. Waits a moment for a head that is silent."""
        gone = f"its head at {self.head} does not answer"
        while not answers(self.head):
            if time.monotonic() - self._answered > GONE_SECONDS:
                return gone
            time.sleep(0.5)  # no call of Ray returns meanwhile
        self._answered = time.monotonic()
        if all(node.id != self.here for node in living_nodes(self.ray)):
            return "the node to which this driver was connected died"
        return None

    def living(self) -> list[LivingNode]:
        """The nodes that live; one that is barred says why it takes no work."""
        nodes = living_nodes(self.ray)
        return [replace(node, leaving=node.leaving or self.barred.get(node.id)) for node in nodes]

    def ask(self, bundles: list[Bundle]) -> None:
        """Tell an autoscaler what is wished for now, where there is one: at changes, and now and then."""
        when, before = self._asked
        stale = bool(bundles) and time.monotonic() - when > ASK_AGAIN_SECONDS
        if self.autoscaled and (bundles != before or stale):
            ask_autoscaler(bundles)
            self._asked = (time.monotonic(), bundles)

    def close(self) -> None:
        """Take back what was asked for."""
        if self._asked[1] and answers(self.head):
            self.ask([])


def answers(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS):
            return True
    except OSError:
        return False
