"""The cluster that one run has joined, followed from look to look: its nodes come and go, an autoscaler hears what
waits, and other studies have their turn."""

from collections.abc import Mapping
from typing import Any

from cluster.nodeprobe import Gate
from cluster.nodes import IDLE_SECONDS, Bundle, Members
from cluster.placement import Demand, Fleet
from cluster.pool import Pool
from cluster.scheduling import Schedule
from cluster.shortage import Shortage
from cluster.tasks import Tasks
from cluster.turns import Turns
from sweeps.store import Store
from sweeps.study import Study


class Joined:
    """What a run knows of its cluster, and what it tells the cluster. What there is to say is returned as notes."""

    def __init__(self, ray: Any, store: Store, study: Study, driver: int) -> None:
        """`driver` is the number of the run's claim. RayError where the head does not answer."""
        self.members = Members(ray)
        self.gate = Gate(self.members, store.root)
        self._turns = Turns(store, study.name, driver, self.members.head, study.limits.priority)
        self.shortage = Shortage()
        self.before: str | None = None
        """The study of others that goes first, if one does."""

    def follow(self, schedule: Schedule, pool: Pool, tasks: Tasks) -> list[str]:
        """New nodes get work, what is about to be taken away is left with a checkpoint, idle workers are given back,
        and a study of higher priority goes first."""
        notes = self.gate.look()
        busy = [one.place for one in schedule.running.values()]
        for node, why in self.members.follow(schedule.fleet, busy, pool.gpu_bytes).items():
            pool.give_back(node=node)
            for task in tasks.by_call.values():
                for hand in task.hands if task.start.place.node == node else ():
                    hand.ask_to_stop(why, "preemption")
        self._turns.tell(tasks.late > 0)
        before, self.before = self.before, self._turns.before()
        if self.before is not None and self.before != before:
            notes.append(f"study {self.before} waits for room: nothing is begun here beyond one unit meanwhile")
        pool.give_back(idle_seconds=IDLE_SECONDS if self.before is None else 0.0)
        return notes

    def ask(self, bundles: list[Bundle], waiting: Mapping[Demand, int], fleet: Fleet, *, idle: bool) -> list[str]:
        """Tell an autoscaler for what room there is work. `waiting` counts cells by what they ask for; `idle` says that
        none trains."""
        self.members.ask(bundles)
        return self.shortage.look(fleet, waiting, idle=idle, scales=self.members.scales)

    def close(self) -> None:
        """Take back what was sent and asked. RayError of a cluster that is gone."""
        self.gate.close()
        self.members.close()
