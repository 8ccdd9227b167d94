"""Placement: what a unit of work asks of a cluster, and which room its nodes have left, GPU by GPU.

Pure arithmetic over plain data, the same for Ray's nodes and for simulated ones. Amounts are counted as Ray counts
them, in whole ten-thousandths, so that three thirds of a GPU are never more than it. The failures this guards against:
a share that is spread over two GPUs, a gang over two nodes, and a worker that waits inside Ray for room which is not
there.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sweeps.errors import InputError
from sweeps.memory import demand as bytes_of
from sweeps.memory import workers_for
from sweeps.planned import PlannedCell

KEPT_FREE = 0.08
"""The share of a GPU's memory that is left to its driver and to fragmentation."""
MOST_TOGETHER = 16
"""Processes on one GPU: more take turns rather than run side by side."""
WHOLE = 10_000
"""One GPU, or one CPU, in Ray's own unit."""


@dataclass(frozen=True, order=True)
class Demand:
    """What one unit (a cell, or cells stacked as one program) asks of the cluster while it trains.

    Raises InputError for what Ray could not place either: no worker, negative amounts, one GPU and a part of another.
    """

    workers: int = 1
    """Processes; more than one are a gang, packed strictly on one node."""
    gpus: float = 0.0
    """Of each worker; below 1 a share of one GPU."""
    cpus: float = 1.0
    """Of each worker."""

    def __post_init__(self) -> None:
        parted = self.gpus != int(self.gpus)
        if self.workers < 1 or self.gpus < 0 or self.cpus < 0 or (parted and (self.gpus > 1 or self.workers > 1)):
            raise InputError(
                f"no node can be asked for {self}. Ask for one worker or more with whole GPUs, or for one with a share."
            )

    def __str__(self) -> str:
        each = " each" if self.workers > 1 else ""
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''} with "
        return f"{workers}{self.gpus:g} GPU and {self.cpus:g} CPU{each}" + (" on one node" if each else "")

    @property
    def all_gpus(self) -> float:
        return self.workers * self.gpus

    def options(self) -> dict[str, Any]:
        """Ray's actor options for a single worker. Escala counts attempts itself, so Ray retries nothing."""
        asked = {"num_cpus": self.cpus, "max_restarts": 0, "max_task_retries": 0}
        return asked | ({"num_gpus": self.gpus} if self.gpus else {})

    def bundles(self) -> list[dict[str, float]]:
        """One for each worker: of a placement group, or for the autoscaler."""
        one = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [dict(one) for _ in range(self.workers)]


def demand_of(
    one: PlannedCell,
    *,
    device: Literal["cpu", "cuda"],
    workers: int | None = None,
    gpu_bytes: int = 0,
    gpus_per_node: int = 1,
    crowd: int = 1,
) -> Demand:
    """What a planned cell asks for, where cells train on such a device.

    `workers` are its processes; None: as many as hold it. `gpu_bytes` is the memory of the least GPU; where it is known
    (not 0), cells that fit side by side share one, as many as `crowd` at most: the cells that there are for every GPU;
    and one that none of them holds is parted among those of a node. InputError where a node does not hold it.
    """
    if device == "cpu":
        return Demand(workers or 1)
    if (workers is not None and workers > 1) or not gpu_bytes:
        return Demand(workers or 1, 1.0)
    need = bytes_of(one.cell.shape, one.cell.sequences, one.cell.precision, device="cuda")
    try:
        return Demand(1, gpu_share(max(1, min(crowd, cells_together([need], gpu_bytes)))))
    except InputError:  # it has to be cut into micro-batches, and wants a GPU for itself, or is too large for one
        return Demand(workers or workers_for(one.cell, int(gpu_bytes * memory_share(1)), gpus_per_node), 1.0)


# --- sharing -----------------------------------------------------------------------------------------------------


def cells_together(needs: Iterable[int], capacity: int) -> int:
    """How many of these cells, whichever they are, train side by side on a GPU of so many bytes.

    `needs` are the bytes that each takes at its peak, its process included. Raises InputError where the largest does
    not fit by itself.
    """
    largest = max(needs, default=1)
    usable = int(capacity * (1 - KEPT_FREE))
    if largest > usable:
        found, room = f"{largest / 1024**3:.1f}", f"{usable / 1024**3:.1f}"
        raise InputError(
            f"the largest cell needs {found} GiB at its peak, and {room} GiB of the GPU can be used. Lower its context "
            "or its size, or name workers with more memory."
        )
    return min(MOST_TOGETHER, usable // largest)


def gpu_share(together: int) -> float:
    """Ray's num_gpus for each of so many workers of one GPU: Ray counts ten-thousandths, and so many fit exactly."""
    return 1.0 if together == 1 else WHOLE // together / WHOLE


def memory_share(gpus: float) -> float:
    """The share of its GPU's memory that a worker may hold, its process included."""
    return (1 - KEPT_FREE) / (int(1 / gpus) if 0 < gpus < 1 else 1)


def threads_for(cells_left: int, slots: int, cores: int) -> int:
    """CPU threads of the next worker's cell: one, until fewer cells are left than cores; then these share the cores.

    `cells_left` are those that have not ended, running ones included.
    """
    if cells_left >= cores:
        return 1
    return max(1, cores // max(1, min(cells_left, slots)))


# --- room --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A node as Ray, or a simulation, tells it."""

    id: str
    cpus: float
    gpus: float = 0.0
    gpu_bytes: int = 0
    """The memory of each of its GPUs; 0 where it is not known."""


@dataclass(frozen=True)
class Place:
    """Room that a unit has on a node."""

    number: int
    """Its own: no other place of its fleet ever has it."""
    demand: Demand
    node: str
    gpus: tuple[tuple[int, int], ...]
    """Which GPUs of the node, and how many ten-thousandths of each."""
    until: float
    """When it is estimated to be free again; inf where nobody knows."""


@dataclass(frozen=True)
class Hold:
    """Room that is kept for a unit until it is all free: these GPUs, and so many CPUs (ten-thousandths) of a node."""

    node: str
    gpus: frozenset[int]
    cpus: int
    time: float
    """When all of it is estimated to be free; inf where nobody knows."""


class Fleet:
    """The free room of a cluster, node by node and GPU by GPU. What it gives out is never more than there is."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self._rooms: dict[str, _Room] = {}
        self._by_empty: list[dict[str, _Room]] = [{}]
        """Nodes by how many of their GPUs are empty: a search begins where room is tightest."""
        self._broken: dict[str, _Room] = {}
        """Nodes with a GPU that is neither empty nor full."""
        self._numbers = itertools.count()
        for node in nodes:
            self.add(node)

    def nodes(self) -> list[Node]:
        return [room.node for room in self._rooms.values()]

    @property
    def gpus(self) -> int:
        return sum(len(room.gpus) for room in self._rooms.values())

    def add(self, node: Node, places: Iterable[Place] = ()) -> None:
        """A node joins, or comes back: empty, but for the places on it that are still in use."""
        self.remove(node.id)
        room = self._rooms[node.id] = _Room(node)
        while len(self._by_empty) <= len(room.gpus):
            self._by_empty.append({})
        self._by_empty[room.empty][node.id] = room
        for place in places:
            self._change(room, place, taken=True)

    def remove(self, node_id: str) -> list[Place]:
        """A node is gone, and all that was placed on it, which is returned. Nothing happens where it is not known."""
        room = self._rooms.pop(node_id, None)
        if room is None:
            return []
        del self._by_empty[room.empty][node_id]
        self._broken.pop(node_id, None)
        return list(room.places.values())

    def place(self, demand: Demand, until: float = math.inf, keep: Hold | None = None) -> Place | None:
        """Room for a demand where it is tightest, nothing of what `keep` holds; None where there is none now."""
        found = self._find(demand, keep)
        if found is None:
            return None
        room, gpus = found
        place = Place(next(self._numbers), demand, room.node.id, gpus, until)
        self._change(room, place, taken=True)
        return place

    def free(self, place: Place) -> None:
        """Give room back. Nothing happens where the node, or the place, is gone already."""
        room = self._rooms.get(place.node)
        if room is not None and place.number in room.places:
            self._change(room, place, taken=False)

    def extend(self, place: Place, until: float) -> Place:
        """The same place, estimated to be free again at another time."""
        extended = replace(place, until=until)
        room = self._rooms.get(place.node)
        if room is not None and place.number in room.places:
            room.places[place.number] = extended
        return extended

    def fits(self, demand: Demand, keep: Hold | None = None) -> bool:
        """Whether there is room for a demand now."""
        return self._find(demand, keep) is not None

    def holds_ever(self, demand: Demand) -> bool:
        """Whether a node of the fleet has room for a demand when it is empty."""
        return any(_Room(node).pick(demand, None) is not None for node in set(self._kinds()))

    def count(self, demand: Demand, most: int) -> int:
        """How many units of a demand there is room for now, counted up to `most`."""
        places: list[Place] = []
        while len(places) < most and (place := self.place(demand)) is not None:
            places.append(place)
        for place in places:
            self.free(place)
        return len(places)

    def hold(self, demand: Demand, node_id: str | None = None) -> Hold | None:
        """The room that is estimated to be free first for a demand, on any node or on one; None where none ever is.

        Where nobody knows when units end, the node on which the fewest would have to.
        """
        rooms = self._rooms.values() if node_id is None else filter(None, [self._rooms.get(node_id)])
        found = [best for room in rooms if (best := room.earliest(demand)) is not None]
        return min(found, key=lambda one: one[:2])[2] if found else None

    def _kinds(self) -> Iterator[Node]:
        for room in self._rooms.values():
            yield Node("", room.node.cpus, room.node.gpus)

    def _find(self, demand: Demand, keep: Hold | None) -> "tuple[_Room, tuple[tuple[int, int], ...]] | None":
        for room in self._tightest(demand):
            held = keep if keep is not None and keep.node == room.node.id else None
            if (gpus := room.pick(demand, held)) is not None:
                return room, gpus
        return None

    def _tightest(self, demand: Demand) -> "Iterator[_Room]":
        """The nodes worth asking, those with the least room first."""
        if 0 < demand.gpus < 1:
            yield from self._broken.values()
        fewest = int(demand.all_gpus) if demand.gpus >= 1 else 1 if demand.gpus else 0
        for rooms in self._by_empty[fewest:]:
            yield from rooms.values()

    def _change(self, room: "_Room", place: Place, *, taken: bool) -> None:
        before = room.empty
        room.change(place, taken=taken)
        if room.empty != before:
            del self._by_empty[before][room.node.id]
            self._by_empty[room.empty][room.node.id] = room
        if room.broken:
            self._broken[room.node.id] = room
        else:
            self._broken.pop(room.node.id, None)


class _Room:
    """One node's free room, in ten-thousandths."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.cpus = round(node.cpus * WHOLE)
        self.gpus = [WHOLE] * int(node.gpus)
        self.places: dict[int, Place] = {}
        self.empty, self.broken = len(self.gpus), 0
        """GPUs with nobody on them; the most that is left of one that is neither empty nor full."""

    def pick(self, demand: Demand, held: Hold | None) -> tuple[tuple[int, int], ...] | None:
        """The GPUs for a demand, nothing of what is held: a share where the least is left over."""
        if demand.workers * round(demand.cpus * WHOLE) + (held.cpus if held else 0) > self.cpus:
            return None
        if not demand.gpus:
            return ()
        barred = held.gpus if held else frozenset()
        if demand.gpus >= 1:
            wanted = int(demand.all_gpus)
            if wanted > self.empty:
                return None
            found = [i for i, left in enumerate(self.gpus) if left == WHOLE and i not in barred][:wanted]
            return tuple((i, WHOLE) for i in found) if len(found) == wanted else None
        need = round(demand.gpus * WHOLE)
        if need > self.broken and not self.empty:
            return None
        best = min(((left, i) for i, left in enumerate(self.gpus) if left >= need and i not in barred), default=None)
        return ((best[1], need),) if best is not None else None

    def change(self, place: Place, *, taken: bool) -> None:
        sign = -1 if taken else 1
        self.cpus += sign * _cpus(place)
        for i, amount in place.gpus:
            self.gpus[i] += sign * amount
        if taken:
            self.places[place.number] = place
        else:
            del self.places[place.number]
        self.empty = self.gpus.count(WHOLE)
        self.broken = max((left for left in self.gpus if left < WHOLE), default=0)

    def earliest(self, demand: Demand) -> tuple[float, int, Hold] | None:
        """When this node has room for a demand if nothing new is placed, how many units must end before, and where."""
        if self.node.cpus * WHOLE < demand.workers * round(demand.cpus * WHOLE):
            return None
        if len(self.gpus) < (count := demand.workers * max(1, int(demand.gpus)) if demand.gpus else 0):
            return None
        ends = sorted(self.places.values(), key=lambda place: place.until)
        # 1. GPUs: on each, when enough of it is free, after how many of its units.
        need = round(min(1.0, demand.gpus) * WHOLE)
        free = list(self.gpus)
        ready = {i: (-math.inf, 0) for i, left in enumerate(free) if left >= need}
        waited = [0] * len(free)
        for place in ends if len(ready) < count else ():
            for i, amount in place.gpus:
                free[i] += amount
                waited[i] += 1
                if i not in ready and free[i] >= need:
                    ready[i] = (place.until, waited[i])
        chosen = sorted(ready, key=lambda i: (ready[i], i))[:count]
        time = max((ready[i][0] for i in chosen), default=-math.inf)
        units = sum(ready[i][1] for i in chosen)
        # 2. CPUs: when enough are.
        wanted = demand.workers * round(demand.cpus * WHOLE)
        left = self.cpus
        for place in ends:
            if left >= wanted:
                break
            left += _cpus(place)
            time, units = max(time, place.until), units + 1
        return time, units, Hold(self.node.id, frozenset(chosen), wanted, time)


def _cpus(place: Place) -> int:
    return place.demand.workers * round(place.demand.cpus * WHOLE)


def host_part(demand: Demand, node: Node, cells: int) -> float:
    """The part of a node's own memory that is there for each process of a unit: as many units as have room beside one
    another, or as there are `cells` to train at once."""
    return 1 / (max(1, Fleet([node]).count(demand, cells)) * demand.workers)


def check_holds(fleet: Fleet, demands: Mapping[Demand, str]) -> None:
    """Raise InputError that names the first demand, and whose it is, that no node of the fleet has ever room for."""
    for demand, whose in demands.items():
        if not fleet.holds_ever(demand):
            nodes = fleet.nodes()
            most = max(nodes, key=lambda node: (node.gpus, node.cpus), default=None)
            largest = f"the largest has {most.gpus:g} GPUs and {most.cpus:g} CPUs" if most else "there is none"
            raise InputError(
                f"{whose} asks for {demand}, and no node can ever hold that ({largest}). Add nodes that can, or lower "
                "what it asks for."
            )
