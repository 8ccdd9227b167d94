"""Searching: lets a driver's plan grow by the trials of a search, while workers are idle and the search wants more.

The order is what makes a kill harmless: a trial is in Optuna's journal before its cells are in the plan on record, and
these before a worker has them. What a driver leaves between two of these steps the next one finds and goes on with.
"""

from cluster.ledger import register_growth
from sweeps.grids import Plan, examples
from sweeps.planned import PlannedCell
from sweeps.search import Searcher
from sweeps.store import Store


class Searching:
    """The search of the study that a driver holds; of a study that searches nothing, the plan as it is."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self._store, self._plan = store, plan
        self._searcher = Searcher(store, plan) if plan.study.search is not None else None

    @property
    def plan(self) -> Plan:
        """With the cells of all trials that are on record."""
        return self._searcher.plan if self._searcher else self._plan

    @property
    def said(self) -> tuple[str, ...]:
        """What people should know of it, in sentences."""
        return tuple(self._searcher.said) if self._searcher else ()

    def goes_on(self) -> bool:
        """Whether a trial is not told yet, or more are to be asked."""
        return self._searcher is not None and self._searcher.goes_on()

    def examples(self) -> list[PlannedCell]:
        """Cells as they will come."""
        return examples(self._plan)

    def grow(self, idle: int) -> list[PlannedCell]:
        """Tell what has ended; ask as many trials as workers are `idle`, or as the study asks together. Returns the
        cells that the plan has won, on record, with those of trials that go on after a rung."""
        if self._searcher is None:
            return []
        known = len(self._searcher.plan.cells)
        self._searcher.look()
        if idle and len(self._searcher.plan.cells) == known:
            self._searcher.ask(max(idle, self._searcher.search.batch))
        self._searcher.sync()
        if len(self._searcher.plan.cells) > known:
            register_growth(self._store, self._searcher.plan, known)
        return list(self._searcher.plan.cells[known:])

    def to_come(self) -> tuple[int, float]:
        """Cells and FLOPs of the trials that are not asked yet, as far as they can be told."""
        if self._searcher is None or not self._searcher.wants():
            return 0, 0.0
        return self._searcher.cells_to_come(), self._searcher.flops_to_come()
