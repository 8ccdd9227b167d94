"""Scheduling: which unit of a study starts next, and where. The policy alone, without Ray, clock or files.

The driver and the simulation (cluster/simulation.py) ask the same code, so that what was simulated is what will happen:

- longest chain first: a unit goes before another if what it and all that waits for it take in a row is longer
- backfill: where the next unit has no room, shorter ones go on in what is left
- a reservation, as in EASY backfill (Lifka 1995): the first unit that has no room keeps the place that will be free for
  it first. Nothing starts there that is not estimated to end before; with no estimates the place drains. Without it a
  gang of eight GPUs would wait as long as there is work for one
- a branch never before its trunk has come so far: what is held is not looked at until it is released
- limits and budgets are never exceeded by what is started. A budget stops admission: what runs goes on to its end
"""

import bisect
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.placement import Demand, Fleet, Hold, Place, check_holds
from sweeps.errors import InputError
from sweeps.units import flops as in_words

HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a run may take at most; None where nobody said."""

    units: int | None = None
    """At once."""
    cells: int | None = None
    """At once; a stack's members count each."""
    gpus: float | None = None
    """At once."""
    flops: float | None = None
    """In all, of cells' training FLOPs as planned, a branch's without its trunk's."""
    gpu_hours: float | None = None
    """In all."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A cell as the policy sees it."""

    id: str
    demand: Demand
    chain: float = 0.0
    """The longest chain that begins with it, in seconds, or in any other unit that all jobs share."""
    seconds: float | None = None
    """How long it is estimated to take; None where nobody knows."""
    flops: float = 0.0
    """What of its training is its own."""


@dataclass
class Start:
    """A unit that was started: one job, or several as one program."""

    jobs: list[Job]
    place: Place
    began: float
    ends_by: float = math.inf
    """When it must have ended by the estimates: from then on its room is kept for a unit that goes before it."""

    def gpu_seconds(self, now: float) -> float:
        """What it takes of GPUs by the estimates, or has taken by now if that is more."""
        estimated = sum(job.seconds or 0.0 for job in self.jobs)
        return self.place.demand.all_gpus * max(estimated, now - self.began)


@dataclass(frozen=True)
class _Left:
    """What budgets leave."""

    flops: float
    gpu_seconds: float

    def admits(self, job: Job) -> bool:
        """Without an estimate, a job on GPUs is begun as long as anything is left."""
        used = job.demand.all_gpus * (job.seconds or 0.0)
        return job.flops <= self.flops and (not job.demand.gpus or 0 < self.gpu_seconds >= used)

    def without(self, job: Job) -> "_Left":
        used = job.demand.all_gpus * (job.seconds or 0.0)
        return _Left(self.flops - job.flops, self.gpu_seconds - used)


Rank = tuple[bool, float, float, str]
"""Goes first, chain, the later the less, id: the greatest is next."""


class Schedule:
    """What is held, what is ready and what runs, on the room of a fleet."""

    def __init__(self, fleet: Fleet, bounds: Bounds = Bounds()) -> None:
        self.fleet, self.bounds = fleet, bounds
        self.running: dict[int, Start] = {}
        """By the number of their place."""
        self.spent_flops = self.spent_gpu_seconds = 0.0
        """By what has ended."""
        self._jobs: dict[str, Job] = {}
        """All that are held or ready."""
        self._held: dict[str, Rank] = {}
        """Held jobs, and how they will rank when they are released."""
        self._ranks: dict[str, Rank] = {}
        """Of the ready jobs."""
        self._groups: dict[Demand, list[Rank]] = {}
        """Ready jobs by demand, the next one last."""
        self._put = 0
        self._hold: tuple[str, Hold] | None = None
        """The reservation, and whose it is."""
        self._cells = 0
        self._gpus = 0.0
        self._flops = 0.0
        """Of what runs."""

    def __len__(self) -> int:
        return len(self._jobs)

    def check(self, demands: Mapping[Demand, str]) -> None:
        """Raise InputError that names a demand, and whose it is, for which there will never be room."""
        check_holds(self.fleet, demands)
        for demand, whose in demands.items():
            if self.bounds.gpus is not None and demand.all_gpus > self.bounds.gpus:
                raise InputError(
                    f"limits.gpus: {self.bounds.gpus:g} are allowed at once, and {whose} asks for {demand}. Raise the "
                    "limit in the study file."
                )

    # --- what waits --------------------------------------------------------------------------------------------------

    def put(self, job: Job, *, first: bool = False, held: bool = False) -> None:
        """Add a job; `first` before all others that are ready, `held` until it is released."""
        self._put += 1
        self._jobs[job.id] = job
        self._held[job.id] = (first, job.chain, -float(self._put), job.id)
        if not held:
            self.release(job.id)

    def release(self, job_id: str) -> None:
        """A held job may start. Nothing happens to others."""
        if job_id in self._held:
            rank = self._ranks[job_id] = self._held.pop(job_id)
            bisect.insort(self._groups.setdefault(self._jobs[job_id].demand, []), rank)

    def remove(self, job_id: str) -> Job:
        """Take out a job that waits. KeyError where it does not."""
        job = self._jobs.pop(job_id)
        if self._held.pop(job_id, None) is None:
            ranks = self._groups[job.demand]
            del ranks[bisect.bisect_left(ranks, self._ranks.pop(job_id))]
        return job

    def waiting(self) -> Iterator[Job]:
        """All that wait, ready ones first."""
        yield from (self._jobs[job_id] for job_id in self._ranks)
        yield from (self._jobs[job_id] for job_id in self._held)

    def ready(self) -> int:
        """How many may start as soon as there is room."""
        return len(self._ranks)

    def demands(self) -> dict[Demand, int]:
        """How many are ready, by what they ask for."""
        return {demand: len(ranks) for demand, ranks in self._groups.items() if ranks}

    def first(self, most: int) -> list[Demand]:
        """What those that are ready ask for, in their order, of so many at most."""
        ranks = heapq.nlargest(most, self._ranks.values())
        return [self._jobs[rank[3]].demand for rank in ranks]

    # --- what starts -------------------------------------------------------------------------------------------------

    def take(self, now: float = 0.0) -> Start | None:
        """Start the next unit, of one job; None where nothing can start now. `now` is in seconds, on any clock."""
        bounds, blocked = self.bounds, None
        if bounds.units is not None and len(self.running) >= bounds.units:
            return None
        if bounds.cells is not None and self._cells >= bounds.cells:
            return None
        left = self._left(now)
        groups = sorted((ranks[-1], demand) for demand, ranks in self._groups.items() if ranks)
        for _, demand in reversed(groups):
            job = self._next(demand, left)
            if job is None:  # none of them is within the budgets
                continue
            if blocked is None:
                if (start := self._start(job, now)) is not None:
                    return start
                blocked = job
            elif (start := self._backfill(blocked, demand, left, now)) is not None:
                return start
        return None

    def room(self, demand: Demand, most: int) -> int:
        """How many units of a demand could start now beside those that run, counted up to `most`."""
        if self.bounds.units is not None:
            most = min(most, self.bounds.units - len(self.running))
        if self.bounds.cells is not None:
            most = min(most, self.bounds.cells - self._cells)
        if self.bounds.gpus is not None and demand.gpus:
            most = min(most, int((self.bounds.gpus - self._gpus + 1e-9) / demand.all_gpus))
        return self.fleet.count(demand, most)

    def admits(self, start: Start, job_ids: Sequence[str], now: float) -> int:
        """How many of these waiting jobs, the first ones, limits, budgets and the unit that its room is kept for leave
        room for in a unit that started."""
        room = len(job_ids) if self.bounds.cells is None else self.bounds.cells - self._cells
        left, until = self._left(now), start.place.until
        for count, job_id in enumerate(job_ids[:room]):
            job = self._jobs[job_id]
            until += _seconds(job)
            if not left.admits(job) or until > start.ends_by:
                return count
            left = left.without(job)
        return min(room, len(job_ids))

    def join(self, start: Start, job_ids: Iterable[str]) -> None:
        """Jobs of the same demand that wait train with a unit that was started, as one program: what waits for its room
        waits as long as all of them take in a row, for how much faster they are together nobody knows."""
        for job_id in job_ids:
            job = self.remove(job_id)
            start.jobs.append(job)
            start.place = self.fleet.extend(start.place, start.place.until + _seconds(job))
            self._cells += 1
            self._flops += job.flops

    def end(self, start: Start, now: float = 0.0) -> None:
        """A unit has ended, well or not: its room is free, its GPU time is spent. FLOPs are spent by `spend`."""
        del self.running[start.place.number]
        self.fleet.free(start.place)
        self._cells -= len(start.jobs)
        self._gpus -= start.place.demand.all_gpus
        self._flops -= sum(job.flops for job in start.jobs)
        self.spent_gpu_seconds += start.place.demand.all_gpus * (now - start.began)

    def spend(self, flops: float) -> None:
        """So many FLOPs were well spent."""
        self.spent_flops += flops

    def _start(self, job: Job, now: float, keep: Hold | None = None, ends_by: float = math.inf) -> Start | None:
        if self._over_limit(job.demand):
            return None
        place = self.fleet.place(job.demand, now + _seconds(job), keep)
        if place is None:
            return None
        if self._hold is not None and self._hold[0] == job.id:
            self._hold = None
        start = self.running[place.number] = Start([self.remove(job.id)], place, now, ends_by)
        self._cells += 1
        self._gpus += job.demand.all_gpus
        self._flops += job.flops
        return start

    # --- backfill ----------------------------------------------------------------------------------------------------

    def _backfill(self, blocked: Job, demand: Demand, left: _Left, now: float) -> Start | None:
        """Start a job of a demand that does not delay one that goes before it and has no room."""
        if not self.fleet.fits(demand):
            return None
        if self._over_limit(blocked.demand):
            time = self._limit_lifts(blocked.demand)
        else:
            keep = self._reserve(blocked)  # None where no node can hold it now: nothing is to be kept
            job = self._next(demand, left)
            if job is not None and (start := self._start(job, now, keep)) is not None:
                return start
            time = keep.time if keep is not None else -math.inf
        if math.isinf(time):
            return None
        job = self._next(demand, left, within=time - now)
        return self._start(job, now, ends_by=time) if job is not None else None

    def _reserve(self, job: Job) -> Hold | None:
        """The room that is kept for a job: once chosen, the same until it starts, or its node is gone."""
        node = self._hold[1].node if self._hold is not None and self._hold[0] == job.id else None
        found = self.fleet.hold(job.demand, node) if node is not None else None
        found = found or self.fleet.hold(job.demand)
        self._hold = (job.id, found) if found is not None else None
        return found

    def _over_limit(self, demand: Demand) -> bool:
        return self.bounds.gpus is not None and self._gpus + demand.all_gpus > self.bounds.gpus + 1e-9

    def _limit_lifts(self, demand: Demand) -> float:
        """When the limit on GPUs at once is estimated to leave room for a demand."""
        assert self.bounds.gpus is not None
        left = self.bounds.gpus - self._gpus
        for start in sorted(self.running.values(), key=lambda one: one.place.until):
            left += start.place.demand.all_gpus
            if left + 1e-9 >= demand.all_gpus:
                return start.place.until
        return -math.inf

    def _next(self, demand: Demand, left: _Left, within: float | None = None) -> Job | None:
        """The first ready job of a demand that the budgets admit, and that ends `within` so many seconds if asked."""
        ranks = self._groups[demand]
        last = len(ranks) if within is None else bisect.bisect_right(ranks, (False, within, 0.0, ""))
        for index in range(last - 1, -1, -1):
            job = self._jobs[ranks[index][3]]
            if within is not None and (job.seconds is None or job.seconds > within):
                return None
            if left.admits(job):
                return job
        return None

    # --- budgets -----------------------------------------------------------------------------------------------------

    def _left(self, now: float) -> _Left:
        """What the budgets leave beside what is spent and what runs."""
        flops = gpu_seconds = math.inf
        if self.bounds.flops is not None:
            flops = self.bounds.flops * (1 + 1e-12) - self.spent_flops - self._flops
        if self.bounds.gpu_hours is not None:
            used = self.spent_gpu_seconds + sum(start.gpu_seconds(now) for start in self.running.values())
            gpu_seconds = self.bounds.gpu_hours * HOUR * (1 + 1e-12) - used
        return _Left(flops, gpu_seconds)

    def out_of_budget(self, now: float = 0.0) -> str | None:
        """Why nothing more will start although jobs are ready, in words; None while something runs or may start."""
        left = self._left(now)
        if self.running or not self._ranks or any(left.admits(self._jobs[job_id]) for job_id in self._ranks):
            return None
        jobs, said = [self._jobs[job_id] for job_id in self._ranks], []
        if self.bounds.flops is not None:
            least = min(job.flops for job in jobs)
            said.append(
                f"of the budget of {in_words(self.bounds.flops)} FLOPs {in_words(self.spent_flops)} are spent, and the "
                f"smallest cell that is left takes {in_words(least)}"
            )
        if self.bounds.gpu_hours is not None:
            used = self.spent_gpu_seconds / HOUR
            words = f"of the budget of {self.bounds.gpu_hours:g} GPU-hours {used:.3g} are spent"
            hours = [job.demand.all_gpus * job.seconds / HOUR for job in jobs if job.seconds is not None]
            too_long = [one for one in hours if one * HOUR > left.gpu_seconds]
            if left.gpu_seconds > 0 and too_long:
                words += f", and the smallest cell that is left is predicted to take {min(too_long):.3g}"
            said.append(words)
        return f"out of budget: {'; '.join(said)}. Raise it under `limits` in the study file"


def _seconds(job: Job) -> float:
    """How long it is estimated to take; inf where nobody knows."""
    return math.inf if job.seconds is None else job.seconds


def chains(seconds: Mapping[str, float], parents: Mapping[str, tuple[str, float | None]]) -> dict[str, float]:
    """Id -> the longest chain that a job begins: itself, or what comes until a child may start and the child's chain.

    `parents` tells of a job which one comes before it, and after how much of that it may start (None: its end); a
    parent without seconds has ended long ago. Raises InputError where jobs wait for one another.
    """
    children: dict[str, list[str]] = {}
    for job_id, (parent, _) in parents.items():
        if parent in seconds and job_id in seconds:
            children.setdefault(parent, []).append(job_id)
    order = [job_id for job_id in seconds if job_id not in parents or parents[job_id][0] not in seconds]
    for job_id in order:  # grows while it is read: parents before their children
        order += children.get(job_id, ())
    if len(order) < len(seconds):
        raise InputError(f"the jobs {', '.join(sorted(set(seconds) - set(order)))[:200]} wait for one another.")
    found: dict[str, float] = {}

    def below(job_id: str, child: str) -> float:
        after = parents[child][1]
        return (seconds[job_id] if after is None else min(after, seconds[job_id])) + found[child]

    for job_id in reversed(order):
        found[job_id] = max([seconds[job_id], *(below(job_id, child) for child in children.get(job_id, ()))])
    return found
