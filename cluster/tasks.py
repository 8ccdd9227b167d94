"""The tasks of a run: what each of its workers has in hands, from the unit that it was given until its end is settled.

What a worker says is only a hint: the files tell how each cell stands. Whatever reads or writes them may be broken off
by a disk that refuses (cluster/outage.py) and is then done again, so each change here comes after what it rests on.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.hands import Hand, display_name, kept_tokens, take_up
from cluster.leftovers import kill_worker
from cluster.nodes import death
from cluster.pace import work_won
from cluster.pool import Pool
from cluster.queue import Queue, Unit
from cluster.scheduling import Start
from cluster.standing import Standing
from sweeps.life import BEAT_SECONDS
from sweeps.planned import PlannedCell
from sweeps.store import Store, cell_state
from sweeps.study import Study

POLL_SECONDS = 0.5
STARTING_SECONDS = 60.0
"""A worker that has begun nothing after so long may wait for room that idle ones have."""
MOST_NAMES = 300
"""Units that Ray shows with their cells' names. It keeps 38 kB of every name in the driver for good."""


@dataclass
class Task:
    """What one worker has in hands."""

    worker: Any
    hands: list[Hand]
    start: Start
    """Its room, as the scheduling code gave it."""
    given: float = field(default_factory=time.monotonic)
    """When the worker got it."""
    noted: bool = False
    """Whether a failure of one of its cells was counted: a program's failure of many cells is one failure."""

    def waits(self) -> bool:
        """Whether it has begun nothing: its worker starts, or has no room yet."""
        return all(hand.attempt() is None for hand in self.hands)

    def is_old(self) -> bool:
        """Whether its worker has had long enough to start."""
        return time.monotonic() - self.given > STARTING_SECONDS

    def fate(self) -> str | None:
        """Why the worker must be killed, if it must."""
        return next((fate for hand in self.hands if (fate := hand.pulse.fate()) is not None), None)

    def kill(self, ray: Any, fate: str) -> None:
        """Kill the worker; the end of its cells is recorded when Ray reports the death."""
        ray.kill(self.worker)
        begun = (attempt for hand in self.hands if (attempt := hand.attempt()) is not None)
        if (one := next(begun, None)) is not None:  # all that it has begun are of its process
            kill_worker(one)
        for hand in self.hands:
            hand.pulse.killed = fate


class Tasks:
    """The tasks of one run."""

    def __init__(
        self,
        store: Store,
        study: Study,
        driver: int,
        queue: Queue,
        standing: Standing,
        lost: Callable[[str], None],
        *,
        base_dir: Path | None,
        checkpoint_seconds: float,
    ) -> None:
        """`driver` is the number of the run's claim; `lost` hears of a node that is gone before Ray tells of it."""
        self._store, self._study, self._driver, self._lost = store, study, driver, lost
        self._queue, self._schedule, self._standing = queue, queue.schedule, standing
        self._base_dir, self._checkpoint_seconds = str(base_dir) if base_dir else None, checkpoint_seconds
        self.by_call: dict[Any, Task] = {}
        """By Ray's reference to the call."""
        self.late = 0
        """Those that have waited long for their worker."""
        self._begun = 0

    def __len__(self) -> int:
        return len(self.by_call)

    def hands(self) -> list[Hand]:
        """The cells in hands, each."""
        return [hand for task in self.by_call.values() for hand in task.hands]

    def start(self, pool: Pool, unit: Unit, threads: int) -> None:
        """Give a unit to a worker in its room, but for the cells that another study was quicker to try."""
        hands, others = take_up(self._store, self._study.name, unit.cells)
        self._standing.elsewhere |= {one.cell.id: one for one in others}
        if not hands:
            self._schedule.end(unit.start, unit.start.began)
            return
        worker, probe = pool.worker(unit.start.place), self._study.stack == "auto"
        ids, study, root = [hand.one.cell.id for hand in hands], self._study.name, str(self._store.root)
        name = display_name(unit.cells) if self._begun < MOST_NAMES else unit.cells[0].cell.family
        self._begun += 1
        shown = worker.run.options(name=name)
        call = shown.remote(root, ids, study, self._base_dir, self._checkpoint_seconds, self._driver, probe, threads)
        self.by_call[call] = Task(worker, hands, unit.start)

    def undo(self, cells: Iterable[PlannedCell]) -> None:
        """A unit that got room and no worker, since the disk broke its beginning off, has neither. `cells` are those of
        the plan."""
        begun = {task.start.place.number for task in self.by_call.values()}
        for number in self._schedule.running.keys() - begun:
            start = self._schedule.running[number]
            ids = {job.id for job in start.jobs}
            self._schedule.end(start, start.began)
            self._standing.elsewhere |= {one.cell.id: one for one in cells if one.cell.id in ids}

    def wait(self, ray: Any) -> list[Any]:
        """The calls of the workers that are done, after a moment at most."""
        if not self.by_call:
            time.sleep(POLL_SECONDS)
            return []
        done: list[Any] = ray.wait(list(self.by_call), timeout=POLL_SECONDS)[0]
        if done:  # others that have ended too: a turn costs more than they do
            done = ray.wait(list(self.by_call), num_returns=len(self.by_call), timeout=0)[0]
        return done

    def finish(self, ray: Any, pool: Pool, call: Any) -> None:
        """A worker is done, or dead."""
        task, lives = self.by_call[call], True
        try:
            ray.get(call)
        except ray.exceptions.RayError as error:
            kind, words = death(ray, error, task.start.place.node)
            if kind == "preemption":
                self._lost(task.start.place.node)
            for hand in task.hands:
                self._standing.record_death(hand, kind, hand.pulse.killed or words)
            # It lives where it raised an error before the attempt could record one: a bug, the disk, a rank's death.
            lives = isinstance(error, ray.exceptions.RayTaskError) and kind != "preemption"
        ids = [hand.one.cell.id for hand in task.hands]
        while task.hands:
            hand = task.hands[0]
            won = work_won(self._queue, hand, kept_tokens(self._store, hand.one))
            counted = self._standing.settle(hand, note=not task.noted)
            self._standing.work_done += won
            task.hands, task.noted = task.hands[1:], task.noted or counted
        (pool.keep if lives else pool.lose)(task.worker)  # no sooner: it could be given a unit, and then be kept again
        del self.by_call[call]
        self._schedule.end(task.start, time.monotonic())
        self._queue.look(ids)

    def kill_silent(self, ray: Any) -> None:
        """Kill the workers that give no sign of life, or have lost their way."""
        for task in self.by_call.values():
            if (fate := task.fate()) is not None:
                task.kill(ray, fate)

    def excuse(self, seconds: float) -> None:
        """The disk refused for so long: workers could give no sign of life either."""
        for hand in self.hands() if seconds >= BEAT_SECONDS else ():
            hand.pulse.excuse(seconds)

    def count_late(self, pool: Pool) -> list[str]:
        """Count those that have waited long for their worker: idle ones of this run do not stand in their way. What
        there is to say of it."""
        waiting = [task for task in self.by_call.values() if task.waits()]
        for task in waiting:
            task.start.began = time.monotonic()  # what has no worker yet uses no GPU time
        before, late = self.late, [task for task in waiting if task.is_old()]
        for task in late:
            pool.give_back(node=task.start.place.node)
        self.late = len(late)
        if not late or before:
            return []
        words = "no worker yet after a minute: others may hold the room that Ray tells of, or starts are slow"
        return [f"{self.late} of {len(self)} units have {words}"]

    def take_back(self, pool: Pool) -> None:
        """Where nothing more is to begin, what still has no worker is not waited for: others may hold its room for
        hours. One that begins at this very moment is in its cell's way until it has ended, as any that is left over."""
        for call, task in list(self.by_call.items()):
            if task.is_old() and task.waits():
                del self.by_call[call]
                pool.end(task.worker)
                self._schedule.end(task.start, task.start.began)
                self._standing.elsewhere |= {hand.one.cell.id: hand.one for hand in task.hands}

    def ask_to_stop(self, why: str) -> None:
        """Ask each cell that has begun to keep a checkpoint and end."""
        for hand in self.hands():
            hand.ask_to_stop(why)

    def let_go(self, why: str, seconds: float) -> None:
        """Ray is gone, and workers of other nodes live on for a minute: they get so long to keep a checkpoint."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            running = [one for one in self.hands() if cell_state(self._store, one.one.cell.id).state == "running"]
            if not running:
                return
            for hand in running:
                hand.ask_to_stop(why, "preemption")
            time.sleep(POLL_SECONDS)
