"""Turns: of the studies that share a cluster and a store, one with a higher priority goes first.

    studies/<name>/turn.json    {"driver": k, "cluster": ..., "priority": 5, "waits": true}, of its driver k

Ray knows no priorities, and every driver counts on the whole cluster, so that a unit which has begun nothing waits for
room that others have. Their drivers step aside: what they train goes on to its end, idle workers are given back, and
nothing new begins beyond one unit, so that no study starves behind one which waits for what it will never get.
"""

from dataclasses import dataclass

from cluster.claims import driver_lives
from sweeps.records import read_or_none, write_json
from sweeps.store import STUDY_NAME, Store


@dataclass
class Turns:
    """One driver among others on its cluster."""

    store: Store
    study: str
    driver: int
    """The number of its claim."""
    cluster: str
    """The address of the cluster's head."""
    priority: int

    def tell(self, waits: bool) -> None:
        """Let others know whether this study waits for room. InputError at a full disk."""
        told = {"driver": self.driver, "cluster": self.cluster, "priority": self.priority, "waits": waits}
        path = self.store.study(self.study) / "turn.json"
        if read_or_none(path) != told:
            write_json(path, told, sync=False)

    def before(self) -> str | None:
        """The study that goes first, in words, if one of a higher priority waits for room now."""
        for path in sorted((self.store.root / "studies").glob("*/turn.json")):
            if not STUDY_NAME.fullmatch(path.parent.name):  # somebody's copy of a study's folder
                continue
            told = read_or_none(path) or {"waits": False}  # none where its study was just taken away
            higher = told["waits"] and told["cluster"] == self.cluster and told["priority"] > self.priority
            if higher and driver_lives(self.store, path.parent.name, told["driver"]):
                return f"{path.parent.name} (priority {told['priority']})"
        return None
