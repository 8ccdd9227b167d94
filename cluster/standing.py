"""How the cells of a run stand, as their files tell: ended, failed, in others' hands, or free to be queued."""

from collections.abc import Callable, Mapping
from typing import Any

from cluster.hands import Hand
from cluster.leftovers import settle
from cluster.outage import refuses
from cluster.pace import evaluation_work, own_work
from cluster.progress import Tally, ended_words
from cluster.queue import Queue
from cluster.searching import Searching
from sweeps.errors import InputError
from sweeps.planned import PlannedCell
from sweeps.records import FREE_SPACE
from sweeps.store import CellState, Store, cell_state, read_end


class Standing:
    """The cells that no worker of a run has, and what came of those that one had."""

    def __init__(
        self,
        store: Store,
        search: Searching,
        queue: Queue,
        *,
        driver: int,
        tally: Tally,
        give_up_after: int,
        say: Callable[[str], None],
    ) -> None:
        """`driver` is the number of the run's claim; `say` tells people how a cell ended."""
        self._store, self._search, self._queue, self._driver = store, search, queue, driver
        self._tally, self._give_up_after, self._say = tally, give_up_after, say
        self.elsewhere: dict[str, PlannedCell] = {}
        """Cells that the living driver of another study trains, or that a dead one's workers have not let go of; and,
        until it is known how each stands, all."""
        self.failed: dict[str, PlannedCell] = {}
        """Looked at now and then: a person may forgive them."""
        self.work_done = 0.0
        self.halt: str | None = None
        """Why nothing more is to be tried, if so."""
        self.gpu: str | None = None
        """On which GPU cells of the study trained before, if they did."""
        self._first_failures: list[str] | None = []
        """The first attempts' failures while there is nothing else; None once anything else happened."""

    def know(self, one: PlannedCell, result: Mapping[str, Any]) -> None:
        """A result is there from before this run."""
        self._spend(one, result)
        device = (result.get("numerics") or {}).get("device", "cpu")
        self.gpu = self.gpu if device == "cpu" else device

    def look(self) -> None:
        """What people and other studies have changed: a failed cell may be forgiven, and be in other hands by now."""
        for cell_id, one in list(self.failed.items()):
            if cell_state(self._store, cell_id).state != "failed":
                del self.failed[cell_id], self._tally.failed[cell_id]
                self.elsewhere[cell_id] = one
        if self.elsewhere:
            self.sort_elsewhere()

    def sort_elsewhere(self) -> None:
        """Sort the cells that others may have. Those in the queue are looked at when they are taken: a look at each of
        thousands every two seconds would hold up what is ready."""
        self.sort(list(self.elsewhere.values()))

    def sort(self, waiting: list[PlannedCell]) -> None:
        """Sort cells by what others have left: ended or failed meanwhile, in other hands, or free to be queued."""
        self.elsewhere |= {one.cell.id: one for one in waiting}
        for one in waiting:
            if not settle(self._store, one.cell.id, self._search.plan.study.name, self._driver):
                continue
            state = cell_state(self._store, one.cell.id)
            if state.result is not None:
                self._spend(one, state.result)
                self._tally.skipped += 1
                self.work_done += own_work(self._queue, one)
            elif state.state == "failed":
                self._note_failed(one, state.reason)
                self._say(self._ended(one, state))
            else:
                self._queue.put(one)
            del self.elsewhere[one.cell.id]

    def record_death(self, hand: Hand, kind: str, message: str) -> None:
        """A worker died, which a cell is charged with."""
        try:
            hand.record_death(kind, message)
        except InputError as error:
            if refuses(error):
                raise
            self.halt = str(error)  # the disk is full: what cannot be recorded must not go on

    def settle(self, hand: Hand, *, note: bool) -> bool:
        """Put a cell that a worker had where its files say that it belongs. `note`: its failure is one to count;
        returns whether it was counted."""
        one, cell_id, counted = hand.one, hand.one.cell.id, False
        state, begun = cell_state(self._store, cell_id), hand.attempt()
        if state.state in ("planned", "running"):
            # A unit that was only probed has begun none: how an earlier attempt ended says nothing of now.
            end = read_end(self._store, cell_id, begun.epoch) if begun is not None else None
            if state.state == "running":
                self.elsewhere[cell_id] = one
            else:
                self._queue.put(one, first=True)
            if note and end is not None and end[0] not in ("preemption", "stopped"):
                self._count_failure(f"{end[0]}: {end[1]}")
                counted = True
            if end is not None and FREE_SPACE in end[1]:  # every cell would fail like this one, and be charged for it
                self.halt = end[1].removeprefix("InputError: ")
            return counted
        if state.state == "failed":
            self._note_failed(one, state.reason)
            if note and begun is not None:
                self._count_failure(state.reason or "unknown")
                counted = True
        elif state.state == "diverged":
            self._tally.diverged += 1
            self._first_failures = None
        else:
            self._tally.finished += 1
            self._first_failures = None
        if state.result is not None:
            self._spend(one, state.result)
            self.work_done += evaluation_work(self._queue, one) if state.state == "finished" else 0.0
        words, branches = self._ended(one, state), self._search.plan.branches
        if cell_id in branches and state.result is not None and state.result.get("trunk") is None:
            words += f" (from the start: its trunk {branches[cell_id].parent[:8]} left no checkpoint for it)"
        self._say(words)
        return counted

    def _ended(self, one: PlannedCell, state: CellState) -> str:
        return ended_words(one, state, self._search.plan.study.vary)

    def _spend(self, one: PlannedCell, result: Mapping[str, Any]) -> None:
        """A result is there: its FLOPs are spent, whoever trained it."""
        spent = result.get("flops_spent")  # 0 where it diverged at once, or its trunk took every step
        self._queue.schedule.spend(self._queue.own_flops(one) if spent is None else float(spent))

    def _note_failed(self, one: PlannedCell, reason: str | None) -> None:
        """A cell has failed, whoever tried it. It is not tried again until a person forgives it."""
        self._tally.failed[one.cell.id] = reason or "unknown"
        self.failed[one.cell.id] = one

    def _count_failure(self, reason: str) -> None:
        """The first attempts that all fail in the same way end the run."""
        if self._first_failures is None:
            return
        self._first_failures.append("".join(letter for letter in reason if not letter.isdigit()))
        if len(self._first_failures) >= self._give_up_after and len(set(self._first_failures)) == 1:
            self.halt = f"given up: the first {self._give_up_after} attempts failed alike ({reason})"
