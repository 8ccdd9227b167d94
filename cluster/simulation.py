"""Simulation: a study on a cluster that is not there, by the driver's own scheduling code and a clock that jumps.

What it adds to cluster/scheduling.py is what a cluster does by itself: units take their seconds, nodes fail and are
preempted, come back, and cells go on from their last checkpoints. The failure this guards against: a plan for a
thousand GPUs whose idle time, tail and lost work are found out on the bill.
"""

import heapq
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from cluster.placement import Fleet, Node
from cluster.scheduling import HOUR, Bounds, Job, Schedule, Start, chains
from sweeps.errors import InputError
from sweeps.units import duration

CHECKPOINT_SECONDS = 300.0
"""As sweeps.trainer.CHECKPOINT_SECONDS, which would load numpy."""
REPAIR_SECONDS = 600.0
"""From a node's loss until it, or another in its place, is there."""
MOST_TIMES_THE_BOUND = 50.0
"""A simulation that takes so many times its lower bound is given up: it recomputes rather than trains."""


@dataclass(frozen=True, kw_only=True)
class Edge:
    """What comes before a job: another one, and how many seconds of it (None: all)."""

    parent: str
    after: float | None = None


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What happens to nodes."""

    mtbf_seconds: float = math.inf
    """Mean time between the failures of one node, exponentially distributed. What its cells did since their last
    checkpoints is lost."""
    preemptions_per_hour: float = 0.0
    """Of one node. It is announced: its cells keep checkpoints first."""
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    repair_seconds: float = REPAIR_SECONDS
    seed: int = 0


@dataclass(frozen=True)
class Turn:
    """One try at a job: where and when, and how many seconds of the job were done before and after it."""

    id: str
    node: str
    gpus: tuple[tuple[int, int], ...]
    start: float
    end: float
    done_before: float
    done_after: float


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What a simulated run took."""

    makespan_seconds: float
    """From the first unit's start to the last one's end."""
    lower_bound_seconds: float
    """Without a failure: the larger of all work spread evenly, and the longest chain."""
    utilisation: float
    """Of the GPUs, or without any of the CPUs, over the makespan: the share that did work which was kept."""
    work_hours: float
    """GPU-hours, or CPU-hours, of work."""
    recomputed_hours: float
    """Work that failures destroyed, and that was done once more: it comes on top."""
    failures: int
    preemptions: int
    trained: int
    """Jobs that came to their end."""
    stopped: str | None
    """Why not all was trained: a budget."""
    turns: tuple[Turn, ...]

    @property
    def recomputed_share(self) -> float:
        """Of all that was computed."""
        return self.recomputed_hours / (self.work_hours + self.recomputed_hours) if self.recomputed_hours else 0.0

    def to_json(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "turns"}
        return plain | {"recomputed_share": self.recomputed_share}


def simulation_lines(found: Simulated) -> Iterator[str]:
    """What a simulated run took, in sentences."""
    if found.stopped is not None:  # the bound is that of the whole study
        yield (
            f"It ends early after {_time(found.makespan_seconds)}, with {found.trained:,} of its cells trained in "
            f"{found.work_hours:.4g} GPU-hours: {found.stopped}."
        )
    else:
        over = found.makespan_seconds / found.lower_bound_seconds if found.lower_bound_seconds else 1.0
        yield (
            f"It takes {_time(found.makespan_seconds)}, {over:.3f} times the lower bound of "
            f"{_time(found.lower_bound_seconds)}, with {found.utilisation:.1%} of the GPUs at work that is kept: "
            f"{found.work_hours:.4g} GPU-hours."
        )
    if found.failures or found.preemptions:
        yield (
            f"{found.failures:,} failures and {found.preemptions:,} preemptions of nodes; recomputed are "
            f"{found.recomputed_hours:.3g} GPU-hours ({found.recomputed_share:.2%})."
        )


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:.3g} s"


def simulate(
    jobs: Sequence[Job],
    nodes: Iterable[Node],
    *,
    edges: Mapping[str, Edge] | None = None,
    bounds: Bounds = Bounds(),
    faults: Faults = Faults(),
) -> Simulated:
    """Run jobs with known seconds on nodes. Their `chain` is set here; `edges` tells by id what they wait for.

    A parent that is not among the jobs has come far enough. Raises InputError for a job that no node can hold, jobs
    that wait for one another, and a cluster that fails too often to get anywhere.
    """
    seconds = {job.id: job.seconds or 0.0 for job in jobs}
    edges = {job_id: edge for job_id, edge in (edges or {}).items() if edge.parent in seconds}
    longest = chains(seconds, {job_id: (edge.parent, edge.after) for job_id, edge in edges.items()})
    run = _Run(list(nodes), edges, bounds, faults)
    if not run.nodes:
        raise InputError("there is no node to run anything on. Name one at least.")
    run.schedule.check({job.demand: f"job {job.id}" for job in jobs})
    bound = lower_bound(jobs, run.nodes, longest)
    for job in jobs:
        run.schedule.put(replace(job, chain=longest[job.id]), held=job.id in edges)
    run.go(bound)
    unit = run.amount
    useful = sum(seconds[job_id] * unit(run.jobs[job_id]) for job_id in run.ended)
    capacity = sum(node.gpus for node in run.nodes) or sum(node.cpus for node in run.nodes)
    return Simulated(
        makespan_seconds=run.last,
        lower_bound_seconds=bound,
        utilisation=useful / (capacity * run.last) if run.last else 0.0,
        work_hours=useful / HOUR,
        recomputed_hours=run.lost / HOUR,
        failures=run.failures,
        preemptions=run.preemptions,
        trained=len(run.ended),
        stopped=run.stopped,
        turns=tuple(run.turns),
    )


def lower_bound(jobs: Sequence[Job], nodes: Sequence[Node], longest: Mapping[str, float]) -> float:
    """Seconds that no schedule beats: the work on GPUs, or on CPUs, spread evenly, and the longest chain."""
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    on_gpus = sum((job.seconds or 0.0) * job.demand.all_gpus for job in jobs)
    on_cpus = sum((job.seconds or 0.0) * job.demand.workers * job.demand.cpus for job in jobs)
    return max(on_gpus / gpus if gpus else 0.0, on_cpus / cpus if cpus else 0.0, *longest.values(), 0.0)


class _Run:
    """The simulated cluster and its clock."""

    def __init__(self, nodes: list[Node], edges: Mapping[str, Edge], bounds: Bounds, faults: Faults) -> None:
        self.nodes, self.faults, self.edges = nodes, faults, edges
        self.schedule = Schedule(Fleet(nodes), bounds)
        self.jobs: dict[str, Job] = {}
        self.turns: list[Turn] = []
        self.ended: dict[str, None] = {}
        self.last = self.lost = 0.0
        self.failures = self.preemptions = 0
        self.stopped: str | None = None
        self.amount = _gpus if any(node.gpus for node in nodes) else _cpus
        self._children: dict[str, list[tuple[str, float | None]]] = {}
        for job_id, edge in edges.items():
            self._children.setdefault(edge.parent, []).append((job_id, edge.after))
        self._done: dict[str, float] = {}
        """Seconds of a job that its checkpoints hold."""
        self._random = random.Random(faults.seed)
        self._events: list[tuple[float, int, str, Node | Start]] = []
        """When, in which order, what, to whom: back, failure or preemption of a node; "end" of a unit, or the id of a
        branch that may leave it."""
        self._count = 0

    def go(self, bound: float) -> None:
        for node in self.nodes:
            self._expect(node, 0.0)
        now, most = 0.0, MOST_TIMES_THE_BOUND * bound + 100 * self.faults.repair_seconds
        while True:
            while (start := self.schedule.take(now)) is not None:
                self._begin(start, now)
            if self.stopped is None and (why := self.schedule.out_of_budget(now)) is not None:
                self.stopped = why
            if not self.schedule.running and (self.stopped is not None or not len(self.schedule)):
                return
            now, _, what, about = heapq.heappop(self._events)
            if now > most:
                raise InputError(
                    f"this cluster gets nowhere: after {duration(now)} of a study that takes {duration(bound)} without "
                    f"failures, {self.failures} failures have cost {self.lost / HOUR:.3g} GPU-hours. Checkpoint more "
                    "often than nodes fail (--checkpoint-seconds), or expect fewer failures."
                )
            self._happen(now, what, about)
            while self._events and self._events[0][0] == now:  # all that happens at once, before anything starts
                _, _, what, about = heapq.heappop(self._events)
                self._happen(now, what, about)

    def _happen(self, now: float, what: str, about: Node | Start) -> None:
        if isinstance(about, Node):
            if what == "back":
                self.schedule.fleet.add(about)
                self._expect(about, now)
            else:
                self._lose(about, now, announced=what == "preemption")
        elif about.place.number in self.schedule.running:  # else its node was lost before
            if what == "end":
                self._finish(about, now)
            else:
                self.schedule.release(what)

    def _begin(self, start: Start, now: float) -> None:
        (job,) = start.jobs
        self.jobs[job.id] = job
        self._at(now + (job.seconds or 0.0), "end", start)
        done = self._done.get(job.id, 0.0)
        for child, after in self._children.get(job.id, ()):
            if after is not None and done <= after < done + (job.seconds or 0.0):
                self._at(now + after - done, child, start)

    def _finish(self, start: Start, now: float) -> None:
        (job,) = start.jobs
        self.schedule.end(start, now)
        self.schedule.spend(job.flops)
        done = self._done.pop(job.id, 0.0)
        self._note(start, now, done, done + (job.seconds or 0.0))
        self.ended[job.id] = None
        self.last = now
        for child, _ in self._children.get(job.id, ()):
            self.schedule.release(child)

    def _lose(self, node: Node, now: float, *, announced: bool) -> None:
        """A node is gone: its units wait again, with what their checkpoints hold."""
        if announced:
            self.preemptions += 1
        else:
            self.failures += 1
        self.schedule.fleet.remove(node.id)
        for start in [one for one in self.schedule.running.values() if one.place.node == node.id]:
            (job,) = start.jobs
            self.schedule.end(start, now)
            before = self._done.get(job.id, 0.0)
            done = before + (now - start.began)
            kept = done if announced else self._kept(job.id, before, done)
            self.lost += (done - kept) * self.amount(job)
            self._done[job.id] = kept
            self._note(start, now, before, kept)
            left = (job.seconds or 0.0) - (kept - before)
            self.schedule.put(replace(job, seconds=left, chain=max(left, job.chain - (kept - before))), first=True)
        self._at(now + self.faults.repair_seconds, "back", node)

    def _kept(self, job_id: str, before: float, done: float) -> float:
        """What the last checkpoint holds: one every so many seconds of an attempt, and one where each branch leaves."""
        every = self.faults.checkpoint_seconds
        kept = before + (math.floor((done - before) / every) * every if every > 0 else done - before)
        left = (after for _, after in self._children.get(job_id, ()) if after is not None and before <= after <= done)
        return max(kept, *left, before)

    def _expect(self, node: Node, now: float) -> None:
        """Draw when a node will be lost, and how."""
        failing, preempted = 1.0 / self.faults.mtbf_seconds, self.faults.preemptions_per_hour / HOUR
        if failing + preempted > 0:
            after = self._random.expovariate(failing + preempted)
            failed = self._random.random() < failing / (failing + preempted)
            self._at(now + after, "failure" if failed else "preemption", node)

    def _note(self, start: Start, now: float, before: float, after: float) -> None:
        place = start.place
        self.turns.append(Turn(start.jobs[0].id, place.node, place.gpus, start.began, now, before, after))

    def _at(self, time: float, what: str, about: Node | Start) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, what, about))


def _gpus(job: Job) -> float:
    return job.demand.all_gpus


def _cpus(job: Job) -> float:
    return job.demand.workers * job.demand.cpus
