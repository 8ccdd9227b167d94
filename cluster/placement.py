"""Placement: what one worker asks of Ray, how many fit, and when a queue of cells would be done.

Pure functions over plain data. The simulation hands out work as the driver does, longest first to whoever is free, a
branch once its trunk has come so far; so what a plan says of the end of a run is what the queue would do.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sweeps.errors import InputError

KEPT_FREE = 0.08
"""The share of a GPU's memory that is left to its driver and to fragmentation."""
MOST_TOGETHER = 16
"""Processes on one GPU: more take turns rather than run side by side."""


@dataclass(frozen=True, order=True)
class Demand:
    """What one unit (a cell, or cells stacked as one program) asks of the cluster while it trains."""

    workers: int = 1
    """Processes; more than one are a gang, packed strictly on one node."""
    gpus: float = 0.0
    """Of each worker; below 1 a share of one GPU."""
    cpus: float = 1.0
    """Of each worker."""

    def bundles(self) -> list[dict[str, float]]:
        """One for each worker: of a placement group, or for the autoscaler."""
        one = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [dict(one) for _ in range(self.workers)]


@dataclass(frozen=True)
class Slots:
    """How many workers run side by side, and the Ray options of each."""

    count: int
    options: dict[str, Any]
    device: Literal["cpu", "cuda"]
    together: int = 1
    """Workers that share a GPU."""


def choose_slots(resources: Mapping[str, float], cells: int, limit: int | None = None, together: int = 1) -> Slots:
    """One worker per GPU where the cluster has any, or `together` on each, else one per CPU; no more than there are
    cells, or than `limit`."""
    gpus = int(resources.get("GPU", 0))
    available = gpus * together or int(resources.get("CPU", 1))
    count = max(1, min(available, cells, limit or available))
    options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
    if gpus:
        return Slots(count, options | {"num_gpus": gpu_share(together)}, "cuda", together)
    return Slots(count, options, "cpu")


# --- sharing -----------------------------------------------------------------------------------------------------


def cells_together(needs: Iterable[int], capacity: int) -> int:
    """How many of these cells, whichever they are, train side by side on a GPU of so many bytes.

    `needs` are the bytes that each takes at its peak, its process included. Raises InputError where the largest does
    not fit by itself.
    """
    largest = max(needs, default=1)
    usable = int(capacity * (1 - KEPT_FREE))
    if largest > usable:
        found, room = f"{largest / 1024**3:.1f}", f"{usable / 1024**3:.1f}"
        raise InputError(
            f"the largest cell needs {found} GiB at its peak, and {room} GiB of the GPU can be used. Lower its context "
            "or its size, or name workers with more memory."
        )
    return min(MOST_TOGETHER, usable // largest)


def gpu_share(together: int) -> float:
    """Ray's num_gpus for each of so many workers of one GPU: Ray counts ten-thousandths, and so many fit exactly."""
    return 1.0 if together == 1 else 10_000 // together / 10_000


def memory_share(together: int) -> float:
    """The share of a GPU's memory that each of so many processes may hold: for set_per_process_memory_fraction."""
    return (1 - KEPT_FREE) / together


def threads_for(cells_left: int, slots: int, cores: int) -> int:
    """CPU threads of the next worker's cell: one, until fewer cells are left than cores; then these share the cores.

    `cells_left` are those that have not ended, running ones included.
    """
    if cells_left >= cores:
        return 1
    return max(1, cores // max(1, min(cells_left, slots)))


# --- the queue ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A cell, or a stack of cells, in a queue."""

    id: str
    seconds: float
    size: int = 1
    """Of a device's room: bytes on a GPU, 1 of a slot that holds one job."""
    parent: str | None = None
    """The job that comes before: the trunk of a branch. One that is not in the queue has come far enough."""
    after: float | None = None
    """Seconds from the parent's start at which this job may start; None: at the parent's end."""


@dataclass(frozen=True)
class Turn:
    """When and where a job runs."""

    id: str
    device: int
    start: float
    end: float


def simulate(jobs: Sequence[Job], devices: int, room: int = 1) -> list[Turn]:
    """Run a queue: whenever a device has room, the first job in the order given that fits and may start.

    Turns come in the order of their starts. Raises InputError for a job that is larger than a device, and for one that
    waits for itself.
    """
    known = {job.id for job in jobs}
    ready: list[tuple[int, Job]] = []
    waiting: dict[str, list[tuple[int, Job]]] = {}
    freed: list[tuple[float, int, Job]] = []
    """When jobs whose parents have started may start themselves."""
    for rank, job in enumerate(jobs):
        if job.size > room:
            raise InputError(f"job {job.id} needs {job.size:,} of a device that has {room:,}. Make it smaller.")
        if job.parent in known:
            waiting.setdefault(str(job.parent), []).append((rank, job))
        else:
            ready.append((rank, job))  # by rank: a heap already
    smallest = min((job.size for job in jobs), default=1)
    free = [(-room, device) for device in range(devices)]
    spare = dict.fromkeys(range(devices), room)
    running: list[tuple[float, str, int, int]] = []
    turns: list[Turn] = []
    now = 0.0
    while ready or running or freed:
        passed = deque[tuple[int, Job]]()
        while ready and free and -free[0][0] >= smallest:
            rank, job = heapq.heappop(ready)
            most, device = free[0]
            if job.size > -most:
                passed.append((rank, job))
                continue
            spare[device] -= job.size
            heapq.heapreplace(free, (-spare[device], device))
            turns.append(Turn(job.id, device, now, now + job.seconds))
            heapq.heappush(running, (now + job.seconds, job.id, device, job.size))
            for later, child in waiting.pop(job.id, ()):
                wait = job.seconds if child.after is None else min(child.after, job.seconds)
                heapq.heappush(freed, (now + wait, later, child))
        for one in passed:
            heapq.heappush(ready, one)
        if freed and (not running or freed[0][0] <= running[0][0]):
            now, rank, job = heapq.heappop(freed)
            heapq.heappush(ready, (rank, job))
        elif running:
            now, _, device, size = heapq.heappop(running)
            spare[device] += size
            free = [(-left, one) for one, left in spare.items()]
            heapq.heapify(free)
        else:
            break
    if waiting:
        raise InputError(f"the jobs {', '.join(sorted(waiting))[:200]} wait for one another.")
    return turns


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    """The order of a queue: by the longest chain that a job begins, so that a trunk comes before what waits for it."""
    children: dict[str, list[Job]] = {}
    for job in jobs:
        if job.parent is not None:
            children.setdefault(job.parent, []).append(job)
    chain: dict[str, float] = {}

    def length(job: Job) -> float:
        if job.id not in chain:
            below = (
                (job.seconds if one.after is None else one.after) + length(one) for one in children.get(job.id, ())
            )
            chain[job.id] = max([job.seconds, *below])
        return chain[job.id]

    return sorted(jobs, key=lambda job: (-length(job), job.id))


def makespan(turns: Sequence[Turn]) -> float:
    """Seconds from the first start to the last end."""
    return max((turn.end for turn in turns), default=0.0)
