"""Shortage: cells that wait for a node which a joined cluster does not have, in words, and for how long at most.

Guards against a run that idles without a word because the one node that could hold what is left is gone, and against a
job that waits for ever for a node that nobody can start. Ray does not tell which nodes an autoscaler could start: for
one that it has not started before the wait is as long as that may take, for another as long as it takes.
"""

import time
from collections.abc import Callable, Mapping

from cluster.placement import Demand, Fleet
from sweeps.units import duration

JOIN_SECONDS = 600.0
"""How long a run without a cell in training waits for a node that somebody has to start."""
LAUNCH_SECONDS = 1800.0
"""And for one that the autoscaler is asked for, and that no node was like before."""


class Shortage:
    """What one run waits for."""

    def __init__(self) -> None:
        self._seen: set[Demand] = set()
        """What a node held at some time of this run."""
        self._said: set[Demand] = set()
        self._since: float | None = None
        """Since when nothing could train for want of a node."""
        self.over: str | None = None
        """Why the run is to end, once it has waited too long."""

    def look(self, fleet: Fleet, waiting: Mapping[Demand, int], *, idle: bool, scales: Callable[[], bool]) -> list[str]:
        """Notes on demands that no node of the fleet holds now, each once until that changes.

        `waiting` counts cells by what they ask for, `idle` says that none trains, `scales` whether there is an
        autoscaler.
        """
        missing = {demand for demand in waiting if not fleet.holds_ever(demand)}
        self._seen |= waiting.keys() - missing
        new, self._said = missing - self._said, missing
        if not (idle and missing):
            self._since = None
        if not missing:
            return []
        asked = scales()
        if idle:
            self._since = self._since or time.monotonic()
            self.over = self._over(waiting, LAUNCH_SECONDS if asked else JOIN_SECONDS, self._seen if asked else set())
        long = duration(JOIN_SECONDS)
        how = (
            "the autoscaler is asked for one" if asked else f"waiting for one to join, {long} once nothing else trains"
        )
        return [f"{_wait(waiting, one)}, and no node holds that now: {how}" for one in sorted(new)]

    def _over(self, waiting: Mapping[Demand, int], seconds: float, to_come: set[Demand]) -> str | None:
        if self._since is None or time.monotonic() - self._since < seconds or self._said & to_come:
            return None
        words = f"{_wait(waiting, max(self._said))}, and no node that holds that joined in {duration(seconds)}"
        return f"{words}. Add such a node, or lower what the study asks for"


def _wait(waiting: Mapping[Demand, int], demand: Demand) -> str:
    return f"{waiting[demand]:,} cell{' waits' if waiting[demand] == 1 else 's wait'} for {demand}"
