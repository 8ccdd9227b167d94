"""Searching: lets a driver's plan grow by the trials of a search, while workers are idle and the search wants more.

The order is what makes a kill harmless: a trial is in Optuna's journal before its cells are in the plan on record, and
these before a worker has them. What a driver leaves between two of these steps the next one finds and goes on with.
"""

from dataclasses import replace

from cluster.calibration import Calibration, find_calibration
from cluster.estimate import predicted_seconds
from cluster.ledger import recorded_seconds, register_growth
from sweeps.grids import Plan, examples
from sweeps.planned import PlannedCell
from sweeps.search import Searcher
from sweeps.store import Store


class Searching:
    """The search of the study that a driver holds; of a study that searches nothing, the plan as it is."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self._store, self._plan = store, plan
        self._searcher = Searcher(store, plan) if plan.study.search is not None else None
        self._calibration: Calibration | None = None
        self.seconds: dict[str, float] = {}
        """How long the plan's cells are predicted to take, by id."""
        self._told = {one.cell.id for one in self.plan.cells}
        """Cells that the driver knows of."""
        self._broken = False
        if self._searcher is not None:
            self.predict(find_calibration(store))

    @property
    def plan(self) -> Plan:
        """With the cells of all trials that are on record."""
        return self._searcher.plan if self._searcher else self._plan

    @property
    def said(self) -> tuple[str, ...]:
        """What people should know of it, in sentences."""
        return tuple(self._searcher.said) if self._searcher else ()

    def predict(self, calibration: Calibration | None) -> None:
        """From now on cells are predicted to take as long as by this calibration, of what they train on. Those that
        have ended keep what was said of them before, maybe of another cluster, and their runs in MLflow need no word.
        """
        recorded = recorded_seconds(self._store, self.plan.study.name)
        kept = {one: told for one, told in recorded.items() if (self._store.cell(one) / "result.json").exists()}
        self._calibration, self.seconds = calibration, predicted_seconds(self.plan, calibration) | kept

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
        if self._broken:  # by the disk, in the middle: what it holds is true, as after a kill
            self._searcher = Searcher(self._store, self._plan)
        self._broken = True
        self._searcher.look()
        if idle and not self._new():
            self._searcher.ask(max(idle, self._searcher.search.batch))
        self._searcher.sync()
        if new := self._new():  # only they are predicted: a search has thousands, and grows by one
            self.seconds |= predicted_seconds(replace(self.plan, cells=tuple(new)), self._calibration)
            register_growth(self._store, self.plan, new, self.seconds)
        self._told |= {one.cell.id for one in new}
        self._broken = False
        return new

    def _new(self) -> list[PlannedCell]:
        return [one for one in self.plan.cells if one.cell.id not in self._told]

    def to_come(self) -> tuple[int, float]:
        """Cells and FLOPs of the trials that are not asked yet, as far as they can be told."""
        if self._searcher is None or not self._searcher.wants():
            return 0, 0.0
        return self._searcher.cells_to_come(), self._searcher.flops_to_come()
