"""What workers have in hands: a cell, or several that train as one program, and how its driver follows each."""

from dataclasses import dataclass
from typing import Any

from cluster.leftovers import kill_worker
from cluster.progress import Tail
from cluster.pulse import Pulse
from cluster.scheduling import Start
from sweeps.planned import PlannedCell
from sweeps.store import Attempt, Store, ask_to_stop, attempt_epochs, cell_state
from sweeps.units import human


@dataclass
class Hand:
    """A cell in a worker's hands."""

    store: Store
    one: PlannedCell
    tail: Tail
    pulse: Pulse
    attempts_before: int
    """How many attempts the cell had: a worker that dies before it begins one is charged all the same."""
    stopping: str | None = None
    """What it was asked, if it was asked to stop."""

    def attempt(self) -> Attempt | None:
        """The attempt that the worker has begun, if it has."""
        epochs = attempt_epochs(self.store, self.one.cell.id)
        return Attempt(self.store, self.one.cell.id, epochs[-1]) if len(epochs) > self.attempts_before else None

    def ask_to_stop(self, why: str, kind: str = "stopped") -> None:
        """Once, and when it has begun."""
        if self.stopping is None and (attempt := self.attempt()) is not None:
            ask_to_stop(attempt, kind, why)
            self.stopping = why


@dataclass
class Task:
    """What one worker has in hands."""

    worker: Any
    hands: list[Hand]
    start: Start
    """Its room, as the scheduling code gave it."""

    def fate(self) -> str | None:
        """Why the worker must be killed, if it must."""
        return next((fate for hand in self.hands if (fate := hand.pulse.fate()) is not None), None)

    def kill(self, ray: Any, fate: str) -> None:
        """Kill the worker; the end of its cells is recorded when Ray reports the death."""
        ray.kill(self.worker)
        for hand in self.hands:
            hand.pulse.killed = fate
        if (attempt := self.hands[0].attempt()) is not None:  # all are of one process
            kill_worker(attempt)


def display_name(unit: list[PlannedCell]) -> str:
    """What Ray's dashboard and `ps` show of a worker at a unit: its first cell, and how many train with it. A display
    name: an actor of that name would bar the next attempt until Ray has forgotten it."""
    one, others = unit[0], len(unit) - 1
    more = f" and {others} more" if others else ""
    return f"{one.cell.family} N={human(one.counts['N'])} D={human(one.cell.tokens)} {one.cell.id[:8]}{more}"


def take_up(store: Store, unit: list[PlannedCell]) -> tuple[list[Hand], list[PlannedCell]]:
    """The cells of a unit that can be tried now, and those that another study's driver was quicker to try."""
    hands, others = [], []
    for one in unit:
        state = cell_state(store, one.cell.id)
        if state.state == "planned":
            pulse = Pulse(store, one.cell.id, state.attempts)
            hands.append(Hand(store, one, Tail(store, one.cell.id), pulse, state.attempts))
        else:
            others.append(one)
    return hands, others
