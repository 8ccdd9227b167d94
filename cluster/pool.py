"""The pool: the warm workers of a run, each in the room that the scheduling code gave it.

A worker that has nothing to do keeps its room in Ray, for the next unit of its kind; where a unit of another kind was
given that room, idle workers there go first. So a cluster is never full of workers that nobody needs.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cluster.connection import cluster_nodes, make_worker
from cluster.nodes import REPORT_SECONDS
from cluster.placement import WHOLE, Demand, Fleet, Node, Place, demand_of, host_part
from sweeps.errors import InputError
from sweeps.planned import PlannedCell


@dataclass(eq=False)
class _Kept:
    worker: Any
    place: Place
    idle_since: float | None = None


class Pool:
    """The workers of one run, by the node on which they are."""

    def __init__(
        self,
        ray: Any,
        fleet: Fleet,
        cells: int,
        workers: int | None,
        own_trainer: bool,
        barred: Collection[str] = (),
        most: int | None = None,
    ) -> None:
        """Adds the cluster's nodes to `fleet`, but for the barred ones. There are so many `cells` to train, each by so
        many `workers`, or as many as hold it, and by the study's own trainer or by Escala's; `most` of them at once."""
        self._ray, self._fleet, self._workers, self._own_trainer = ray, fleet, workers, own_trainer
        self._kept: list[_Kept] = []
        nodes = cluster_nodes(ray, memory_too=True, barred=barred)
        for node in nodes:
            fleet.add(node)
        self.cores = int(sum(node.cpus for node in nodes))
        self.device: Literal["cpu", "cuda"] = "cuda" if fleet.gpus else "cpu"
        self.gpu_bytes = min((node.gpu_bytes for node in nodes if node.gpus), default=0)
        self._gpus_per_node = int(max((node.gpus for node in nodes), default=1))
        self._most, self._at_once = most, min(cells, most or cells)
        self._crowd = -(-cells // max(1, fleet.gpus))

    def meet_gpus(self, before: str | None, scales: Callable[[float], bool], address: str) -> list[str]:
        """Notes on the device of a joined cluster. `before` is the GPU on which cells of the study have trained, if
        they have: that the last node with one is away must not move the others to CPUs. `scales` tells of an
        autoscaler, and waits so long to hear of it; where there is none InputError is raised then."""
        if self.device == "cuda":
            blind = "torch finds none of the GPUs that Ray counts: each cell gets a whole one and trains on a CPU there"
            return [] if self.gpu_bytes else [f"{blind}; `escala doctor` says what is wrong"]
        if before is None and scales(0.0):
            return [
                "no node with a GPU is up, so cells train on CPUs. If they are to train on GPUs, end this run and have "
                "one such node up when the next begins"
            ]
        if before is not None:
            if not scales(REPORT_SECONDS):
                raise InputError(
                    f"cells of this study have trained on a GPU ({before}), and no node at {address} has one now. Add "
                    "one that has, or use --address local to go on on this machine."
                )
            self.device = "cuda"
        return []

    def models(self) -> set[str]:
        """The models of the GPUs, as Ray names them; "" where it does not."""
        ours = {node.id for node in self._fleet.nodes() if node.gpus}
        there = [node["Resources"] for node in self._ray.nodes() if node["Alive"] and node["NodeID"] in ours]
        prefix = "accelerator_type:"
        return {next((one.removeprefix(prefix) for one in told if one.startswith(prefix)), "") for told in there}

    def demand(self, one: PlannedCell) -> Demand:
        """What a cell asks for: a GPU, or a share of one where it fits and cells are many, if there are any."""
        return demand_of(
            one,
            device=self.device,
            workers=self._workers,
            gpu_bytes=self.gpu_bytes,
            gpus_per_node=self._gpus_per_node,
            crowd=self._crowd,
        )

    def worker(self, place: Place) -> Any:
        """A worker in this place: the warm one that is there, or a new one. Idle ones in its way are given back."""
        there = [one for one in self._kept if one.place.node == place.node]
        wanted = {gpu for gpu, _ in place.gpus}
        idle = [one for one in there if one.idle_since is not None]
        idle.sort(key=lambda one: (wanted.isdisjoint(gpu for gpu, _ in one.place.gpus), one.idle_since))
        for one in idle:
            if (one.place.demand, one.place.gpus) == (place.demand, place.gpus):
                one.place, one.idle_since = place, None
                return one.worker
        for one in idle:  # those on its GPUs first
            full = self._most is not None and len(self._kept) >= self._most
            if full or not self._has_room([place, *(other.place for other in there)]):
                self._give_back(one)
                there.remove(one)
        node = self._node(place.node)
        part = host_part(place.demand, node, self._at_once) if node is not None else 1.0
        kept = _Kept(make_worker(self._ray, place, self._own_trainer, part), place)
        self._kept.append(kept)
        return kept.worker

    def warm(self, demands: Iterable[Demand]) -> None:
        """Start the workers that these demands get first, in this order, before there is anything for them to do."""
        places = [place for demand in demands if (place := self._fleet.place(demand)) is not None]
        for worker in [self.worker(place) for place in places]:
            self.keep(worker)
        for place in places:
            self._fleet.free(place)

    def keep(self, worker: Any) -> None:
        """A worker has nothing to do."""
        for one in self._kept:
            if one.worker is worker:
                one.idle_since = time.monotonic()

    def end(self, worker: Any) -> None:
        """End a worker, whatever it does, or waits for."""
        self._ray.kill(worker)
        self.lose(worker)

    def lose(self, worker: Any) -> None:
        """A worker is dead."""
        self._kept = [one for one in self._kept if one.worker is not worker]

    def give_back(self, *, node: str | None = None, idle_seconds: float = 0.0) -> int:
        """End the workers that have been idle for so long, on a node or everywhere; how many."""
        now = time.monotonic()
        old = [
            one
            for one in self._kept
            if one.idle_since is not None and now - one.idle_since >= idle_seconds and node in (None, one.place.node)
        ]
        for one in old:
            self._give_back(one)
        return len(old)

    def _give_back(self, one: _Kept) -> None:
        self._ray.kill(one.worker)
        self._kept.remove(one)

    def _node(self, node_id: str) -> Node | None:
        return next((node for node in self._fleet.nodes() if node.id == node_id), None)

    def _has_room(self, places: list[Place]) -> bool:
        """Whether Ray has room for workers in all these places of one node."""
        node = self._node(places[0].node)
        used: Counter[int] = Counter()
        for place in places:
            used.update(dict(place.gpus))
        cpus = sum(place.demand.workers * place.demand.cpus for place in places)
        return node is None or (cpus <= node.cpus + 1e-6 and all(amount <= WHOLE for amount in used.values()))
