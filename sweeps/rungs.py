"""Rungs: which trials go on after a shorter length, and whether the shorter length tells anything of the full one.

Compared are losses at the end of a cooldown: a rung is a whole wsd run of its length, the branch of a trunk from which
the longer run goes on. Losses on the trunk would favour low learning rates. A fixed share of the trials, drawn by lot
before their losses are known, goes on whatever its rank (controls): over these alone the rank correlation of rung and
full length is free of the selection that promotion is.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sweeps.samplers import draw
from sweeps.units import plural

ETA = 3
"""A trial goes on if it is among the best 1/ETA of those that have come to the rung (asynchronous successive halving,
Li et al. 2020, as a decision to stop: taken once, when the trial comes)."""
CONTROLS = 0.25
"""The share of the trials that go on by lot."""
ENOUGH_PAIRS = 8
"""Controls from which on a correlation that cannot be told from 0 ends the use of a rung."""
_Z = 1.959963984540054


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of a rung's losses with those at full length, over the controls."""

    rung: float
    pairs: int
    rho: float | None
    """None below four pairs, or where all are equal."""
    interval: tuple[float, float] | None
    """95%: Fisher's z with the variance (1 + rho^2 / 2) / (pairs - 3) of Bonett and Wright (2000)."""

    @property
    def is_refuted(self) -> bool:
        """Whether there are enough pairs and the interval does not lie above 0."""
        if self.pairs < ENOUGH_PAIRS:
            return False
        return self.interval is None or self.interval[0] <= 0

    def __str__(self) -> str:
        if self.rho is None or self.interval is None:
            return f"rung {self.rung:g}: rank correlation with full length not known yet ({plural(self.pairs, 'pair')})"
        low, high = self.interval
        told = f"rung {self.rung:g}: rank correlation with full length {self.rho:.2f} ({low:.2f} to {high:.2f}"
        told += f", {self.pairs} pairs)"
        return told + ("; not told from 0: trials run at full length" if self.is_refuted else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"refuted": self.is_refuted}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Correlation":
        return cls(**{name: told[name] for name in ("rung", "pairs", "rho", "interval")})


def correlation(rung: float, pairs: Sequence[tuple[float, float]]) -> Correlation:
    """Of (loss at the rung, loss at full length) of the controls."""
    from scipy.stats import rankdata

    if len(pairs) < 4:
        return Correlation(rung, len(pairs), None, None)
    first, second = (rankdata([pair[side] for pair in pairs]) for side in (0, 1))
    spread = float(first.std() * second.std())
    if not spread:
        return Correlation(rung, len(pairs), None, None)
    rho = float(((first - first.mean()) * (second - second.mean())).mean()) / spread
    inner = min(max(rho, -1 + 1e-9), 1 - 1e-9)
    width = _Z * math.sqrt((1 + inner**2 / 2) / (len(pairs) - 3))
    interval = (math.tanh(math.atanh(inner) - width), math.tanh(math.atanh(inner) + width))
    return Correlation(rung, len(pairs), rho, interval)


def pairs_of(trials: Iterable[Any], seed: int, group: str, rung: float) -> list[tuple[float, float]]:
    """(loss at a rung, loss at full length) of a group's controls (sweeps.trials.Trial) that have come there."""
    return [
        (one.losses[rung], one.value)
        for one in trials
        if one.state == "COMPLETE" and one.length == 1.0 and rung in one.losses and is_control(seed, group, one.number)
    ]


def is_control(seed: int, group: str, number: int) -> bool:
    """Whether the lot lets a trial go on whatever its rank."""
    return draw("control", seed, group, number) < CONTROLS * 2**32


def is_promising(loss: float, others: Sequence[float]) -> bool:
    """Whether a loss is among the best 1/ETA of those at its rung; the first to come always is."""
    room = max(1, (len(others) + 1) // ETA)
    return sum(other < loss for other in others) < room
