"""A cell in a worker's hands, and how its driver follows it."""

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.progress import Running, Tail, apart_words
from cluster.pulse import Pulse, begun_attempt
from sweeps.planned import PlannedCell
from sweeps.store import (
    Attempt,
    Store,
    ask_to_stop,
    attempt_epochs,
    begin_attempt,
    cell_state,
    checkpoint_paths,
    read_end,
    record_error,
)
from sweeps.units import human


@dataclass
class Hand:
    """A cell in a worker's hands."""

    store: Store
    study: str
    """For which it is in hands."""
    one: PlannedCell
    tail: Tail
    pulse: Pulse
    attempts_before: int
    """How many attempts the cell had: a worker that dies before it begins one is charged all the same."""
    kept_tokens: int = 0
    """Of the cell when it was taken up: they are no work of this hand."""
    stopping: str | None = None
    """What it was asked, if it was asked to stop."""

    def attempt(self) -> Attempt | None:
        """The attempt that the worker has begun, if it has."""
        return begun_attempt(self.store, self.one.cell.id, self.attempts_before, self.study)

    def ask_to_stop(self, why: str, kind: str = "stopped") -> None:
        """Once, and when it has begun."""
        if self.stopping is None and (attempt := self.attempt()) is not None:
            ask_to_stop(attempt, kind, why)
            self.stopping = why

    def running(self, varied: Iterable[str]) -> Running:
        """How far it is, as its log tells; and which cell, of a study that varies these hyperparameters."""
        self.tail.read()
        one, tail = self.one, self.tail
        which = (one.cell.id, one.counts["N"], apart_words(one, varied))
        return Running(*which, tail.tokens, one.cell.tokens, tail.loss, tail.tokens_per_second)

    def record_death(self, kind: str, message: str) -> None:
        """Charge a death to the cell, where the attempt did not say itself how it ended. InputError at a full disk."""
        cell_id, attempt = self.one.cell.id, self.attempt()
        if len(attempt_epochs(self.store, cell_id)) == self.attempts_before:
            attempt = begin_attempt(self.store, cell_id, {"study": self.study})
        untold = attempt is not None and read_end(self.store, cell_id, attempt.epoch) is None
        if attempt is not None and untold and cell_state(self.store, cell_id).result is None:
            record_error(attempt, kind, message)


def display_name(unit: list[PlannedCell]) -> str:
    """What Ray's dashboard and `ps` show of a worker at a unit: its first cell, and how many train with it. A display
    name: an actor of that name would bar the next attempt until Ray has forgotten it."""
    one, others = unit[0], len(unit) - 1
    more = f" and {others} more" if others else ""
    return f"{one.cell.family} N={human(one.counts['N'])} D={human(one.cell.tokens)} {one.cell.id[:8]}{more}"


def kept_tokens(store: Store, one: PlannedCell) -> int:
    """Tokens of a cell that no later attempt trains again: up to its end, or to its furthest checkpoint."""
    if (result := cell_state(store, one.cell.id).result) is not None:
        steps = result.get("steps")
        return one.cell.tokens if steps is None else int(steps) * one.cell.batch_tokens
    folders = (store.checkpoints(one.cell.id, epoch) for epoch in attempt_epochs(store, one.cell.id))
    return max((int(path.name) for folder in folders for path in checkpoint_paths(folder)), default=0)


def take_up(store: Store, study: str, unit: list[PlannedCell]) -> tuple[list[Hand], list[PlannedCell]]:
    """The cells of a unit that can be tried now, and those that another study's driver was quicker to try."""
    hands, others = [], []
    for one in unit:
        state = cell_state(store, one.cell.id)
        if state.state == "planned":
            pulse = Pulse(store, one.cell.id, state.attempts, study)
            kept = kept_tokens(store, one) if state.attempts else 0
            hands.append(Hand(store, study, one, Tail(store, one.cell.id), pulse, state.attempts, kept))
        else:
            others.append(one)
    return hands, others
