"""The queue of a run: which cells a free worker takes next, alone or as a stack.

Cells come in the order in which they were put, but a branch waits until its trunk has left the checkpoint from which it
goes on, or will never leave one, and cells of one shape that a probe found to be faster together go together.
"""

import itertools
from collections import Counter, deque
from typing import Literal

from sweeps.grids import Plan
from sweeps.planned import PlannedCell
from sweeps.stacks import LEAST_GAIN, known_gain, stack_key, stack_size
from sweeps.store import Store, attempt_epochs, cell_state


class Queue:
    """The cells that no worker has."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self._store, self._stacking = store, plan.study.stack
        self._keys: dict[str, str | None] = {}
        self.extend(plan)
        self._ready: deque[PlannedCell] = deque()
        self._alike: Counter[str | None] = Counter()
        """Ready cells by stack key."""
        self._waiting: dict[str, list[PlannedCell]] = {}
        """Branches by the trunk that they wait for."""

    def __len__(self) -> int:
        return len(self._ready) + sum(map(len, self._waiting.values()))

    def extend(self, plan: Plan, known: int = 0) -> None:
        """Know the cells of a plan that has grown since it had `known`, before any of them is put."""
        self._branches = plan.branches
        for one in plan.cells[known:] if self._stacking != "off" else ():
            self._keys[one.cell.id] = stack_key(one.cell)

    def cells(self) -> list[PlannedCell]:
        """All that wait, those that could begin first."""
        return [*self._ready, *(one for those in self._waiting.values() for one in those)]

    def put(self, one: PlannedCell, *, first: bool = False) -> None:
        """Add a cell, at the end or as the `first` to be taken."""
        branch = self._branches.get(one.cell.id)
        if branch is not None and not self._may_begin(one):
            self._waiting.setdefault(branch.parent, []).append(one)
            return
        (self._ready.appendleft if first else self._ready.append)(one)
        self._alike[self._keys.get(one.cell.id)] += 1

    def drain(self) -> list[PlannedCell]:
        """Take all out."""
        found = self.cells()
        self._ready.clear()
        self._alike.clear()
        self._waiting.clear()
        return found

    def shared_flops(self, one: PlannedCell) -> float:
        """What of a cell its trunk trains."""
        branch = self._branches.get(one.cell.id)
        return float(branch.steps * one.cell.batch_tokens * one.counts["flops_per_token"]) if branch else 0.0

    def look(self) -> None:
        """Let go the branches whose trunks have come so far."""
        for trunk in list(self._waiting):
            for one in self._waiting.pop(trunk):
                self.put(one)

    def take(self, workers: int, device: Literal["cpu", "cuda"]) -> list[PlannedCell]:
        """The next cell that can begin with those that train together with it; none where all wait."""
        if not self._ready:
            return []
        one = self._ready.popleft()
        key = self._keys.get(one.cell.id)
        alike = self._alike[key] if key is not None and not self._was_too_large(one) else 1
        self._alike[key] -= 1
        size = stack_size(alike, workers, self._stacking, device, one.cell) if alike > 1 else 1
        others = self._like(key, size - 1) if size > 1 else []
        if others and self._stacking == "auto":
            gain = known_gain(self._store, one.cell, 1 + len(others), device)
            others = [] if gain is not None and gain < LEAST_GAIN else others
        for other in others:
            self._ready.remove(other)
            self._alike[key] -= 1
        return [one, *others]

    def _like(self, key: str | None, most: int) -> list[PlannedCell]:
        """The first ready cells of a stack key, at most so many, that have not proved too large for a stack."""
        alike = (one for one in self._ready if self._keys[one.cell.id] == key and not self._was_too_large(one))
        return list(itertools.islice(alike, most))

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
