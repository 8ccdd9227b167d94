"""The queue of a run: a study's cells before the scheduling code, with what only the store's files tell.

A branch is held until its trunk has left the checkpoint from which it goes on, or will never leave one, and cells of
one shape that a probe found to be faster together go together. Which cell is next, and where, cluster/scheduling.py
says.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from cluster.placement import Demand
from cluster.scheduling import Job, Schedule, Start, chains
from cluster.workload import own_flops, waits
from sweeps.errors import InputError
from sweeps.grids import Plan
from sweeps.planned import PlannedCell
from sweeps.stacks import LEAST_GAIN, known_gain, stack_key, stack_size
from sweeps.store import Store, attempt_epochs, cell_state


@dataclass(frozen=True)
class Unit:
    """Cells that a worker tries as one program, and the room for it."""

    cells: list[PlannedCell]
    start: Start


class Queue:
    """The cells that no worker has."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        schedule: Schedule,
        demand: Callable[[PlannedCell], Demand],
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """`demand` says what a cell asks for, once for each; `seconds`, by id, how long cells are estimated to take on
        one GPU."""
        self.schedule = schedule
        self._store, self._stacking, self._demand = store, plan.study.stack, demand
        self.validation_tokens = plan.corpus.validation_tokens
        """Of the corpus: what a cell is evaluated over that says nothing else."""
        self._demands: dict[str, Demand] = {}
        self._seconds: Mapping[str, float] = {}
        self._keys: dict[str, str | None] = {}
        self._cells: dict[str, PlannedCell] = {}
        """Those that wait, by id."""
        self._held: dict[str, list[PlannedCell]] = {}
        """Branches by the trunk that they wait for."""
        self._alike: dict[str, dict[str, PlannedCell]] = {}
        """Ready cells by stack key."""
        self._timed: bool | None = None
        """Whether chains are in seconds, and not in FLOPs."""
        self.extend(plan, plan.cells, seconds or {})

    def __len__(self) -> int:
        return len(self.schedule)

    def extend(self, plan: Plan, new: Iterable[PlannedCell], seconds: Mapping[str, float]) -> None:
        """Know the `new` cells of a plan that has grown, before any of them is put; and the `seconds` of all of its
        cells, as far as they are told."""
        self._branches, self._own, self._seconds = plan.branches, own_flops(plan), seconds
        before, self._timed = self._timed, all(cell_id in self._seconds for cell_id in self._own)
        self._chains = self._lengths(plan)
        for one in new if self._stacking != "off" else ():
            self._keys[one.cell.id] = stack_key(one.cell)
        if self._timed != before:  # what waits was put by the other unit, which must not be held against this one
            ready = self.schedule.ready()
            for index, one in enumerate(list(self.cells())):
                self.schedule.remove(one.cell.id)
                self.schedule.put(self._job(one), held=index >= ready)

    def cells(self) -> Iterator[PlannedCell]:
        """All that wait, those that could begin before those that are held."""
        return (self._cells[job.id] for job in self.schedule.waiting())

    def put(self, one: PlannedCell, *, first: bool = False) -> None:
        """Add a cell, in its order or as the `first` to be taken."""
        cell_id = one.cell.id
        held = cell_id in self._branches and not self._may_begin(one)
        self._cells[cell_id] = one
        self.schedule.put(self._job(one), first=first, held=held)
        if held:
            self._held.setdefault(self._branches[cell_id].parent, []).append(one)
        else:
            self._make_ready(one)

    def _job(self, one: PlannedCell) -> Job:
        cell_id = one.cell.id
        return Job(
            id=cell_id,
            demand=self._asks(one),
            chain=self._chains[cell_id],
            seconds=self._seconds[cell_id] / self._speed(one) if cell_id in self._seconds else None,
            flops=self.own_flops(one),
        )

    def _asks(self, one: PlannedCell) -> Demand:
        if one.cell.id not in self._demands:  # it takes the memory model, and the plan of a search grows by one
            self._demands[one.cell.id] = self._demand(one)
        return self._demands[one.cell.id]

    def _speed(self, one: PlannedCell) -> float:
        """How many times faster than on one GPU a cell is taken to train: a gang as all its GPUs, as in
        cluster/workload.py; a share was timed as a whole."""
        with suppress(InputError):
            return max(1.0, self._asks(one).all_gpus)
        return 1.0  # it has ended on other nodes; what waits was held against these

    def own_flops(self, one: PlannedCell) -> float:
        """The FLOPs of a cell that no trunk trains for it."""
        return self._own[one.cell.id]

    def shared_flops(self, one: PlannedCell) -> float:
        """What of a cell its trunk trains."""
        return float(one.counts["C"]) - self._own[one.cell.id]

    def look(self, trunks: Iterable[str] | None = None) -> None:
        """Let go the branches of these trunks, or of all, whose trunks have come so far."""
        for trunk in list(self._held) if trunks is None else [one for one in trunks if one in self._held]:
            for one in [one for one in self._held[trunk] if self._may_begin(one)]:
                self.schedule.release(one.cell.id)
                self._make_ready(one)
                self._held[trunk].remove(one)
            if not self._held[trunk]:
                del self._held[trunk]

    def take(self, now: float, device: Literal["cpu", "cuda"]) -> Unit | None:
        """The next cell that can begin with those that train together with it; None where there is none, or no room."""
        start = self.schedule.take(now)
        if start is None:
            return None
        one = self._pop(start.jobs[0].id)
        key = self._keys.get(one.cell.id)
        alike = len(self._alike.get(key, ())) + 1 if key is not None and not self._was_too_large(one) else 1
        cells = [one]
        if alike > 1 and start.place.demand.workers == 1:
            workers = 1 + self.schedule.room(start.place.demand, alike)
            size = stack_size(alike, workers, self._stacking, device, one.cell)
            others = self._like(start, key, size - 1, now) if size > 1 else []
            if others and self._stacking == "auto":
                gain = known_gain(self._store, one.cell, 1 + len(others), device)
                others = [] if gain is not None and gain < LEAST_GAIN else others
            self.schedule.join(start, [other.cell.id for other in others])
            cells += [self._pop(other.cell.id) for other in others]
        return Unit(cells, start)

    def _like(self, start: Start, key: str | None, most: int, now: float) -> list[PlannedCell]:
        """The first ready cells of a stack key, at most so many, that have not proved too large for a stack and may
        join a unit."""
        found: list[PlannedCell] = []
        for one in self._alike.get(key or "", {}).values():
            if len(found) == most:
                break
            if not self._was_too_large(one):
                found.append(one)
        return found[: self.schedule.admits(start, [one.cell.id for one in found], now)]

    def _make_ready(self, one: PlannedCell) -> None:
        if (key := self._keys.get(one.cell.id)) is not None:
            self._alike.setdefault(key, {})[one.cell.id] = one

    def _pop(self, cell_id: str) -> PlannedCell:
        self._alike.get(self._keys.get(cell_id) or "", {}).pop(cell_id, None)
        return self._cells.pop(cell_id)

    def _lengths(self, plan: Plan) -> dict[str, float]:
        """The longest chain that each cell begins: in seconds where all are known, else in FLOPs."""
        length = self._own
        if self._timed:
            length = {one.cell.id: self._seconds[one.cell.id] / self._speed(one) for one in plan.cells}
        before = {cell_id: (trunk, share * length[trunk]) for cell_id, (trunk, share) in waits(plan, self._own).items()}
        return chains(length, before)

    def _may_begin(self, one: PlannedCell) -> bool:
        branch = self._branches[one.cell.id]
        if attempt_epochs(self._store, one.cell.id):  # it has begun before
            return True
        if cell_state(self._store, branch.parent).state in ("finished", "diverged", "failed"):
            return True
        tokens = str(branch.steps * one.cell.batch_tokens)
        attempts = attempt_epochs(self._store, branch.parent)
        return any((self._store.checkpoints(branch.parent, epoch) / tokens).is_dir() for epoch in attempts)

    def _was_too_large(self, one: PlannedCell) -> bool:
        """Whether a cell has run out of memory before: it trains alone from then on."""
        return "out_of_memory" in (cell_state(self._store, one.cell.id).reason or "")
