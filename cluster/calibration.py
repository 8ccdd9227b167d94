"""Calibration: a few shapes of a study timed on each kind of worker, kept in the store for every later plan.

    hardware/<kind>.json    what was timed there, coefficients per family and precision, versions, date, host

All slots time at once, through the same Ray workers' processes as a run has, so that what they take from one another
(memory bandwidth, clock speed, cores) is in the figures. Each shape is timed in several rounds far apart: what else
the machine does for some seconds falls on one round, and the lower quartile of all leaves it out.
"""

import itertools
import os
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from cluster.connection import cluster_nodes, start_ray, stop_ray
from cluster.hardware import kind_of, local_kind, processor
from cluster.placement import Demand, Fleet
from cluster.processes import descendants, end_processes
from sweeps.accounting import parameters
from sweeps.cell import Cell, cell_from_identity
from sweeps.errors import InputError, nearest
from sweeps.grids import Plan, examples
from sweeps.records import read_json, timestamp, write_json
from sweeps.store import Store
from sweeps.timing import Costs, Timed, costs_from_json, fit_costs, pick_cells, timed_from_json
from sweeps.units import plural

FORMAT = 1
ROUNDS = 3
_SECONDS = tuple(field.name for field in fields(Timed) if field.name.endswith("_seconds"))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is known of one kind of worker."""

    kind: str
    device: str
    """The GPU's name, or the processor's."""
    points: tuple[Timed, ...]
    costs: Mapping[str, Costs]
    """By `sweeps.timing.kind_of_work`."""
    workers: int
    """How many timed at once."""
    host: str
    versions: Mapping[str, str]
    measured: str


def calibrate(
    store: Store,
    plan: Plan,
    *,
    progress: Callable[[str, float], None],
    address: str = "local",
    workers: int | None = None,
    base_dir: Path | None = None,
) -> list[Calibration]:
    """Time shapes of a plan's cells on every slot of this machine or a cluster and put the result into the store.

    `workers` limits the slots; `progress(what, share done)` is called after each shape. What earlier calibrations of
    the same kind and versions have timed of other shapes is kept. Raises InputError where nothing can be timed, Ray
    cannot be reached or a worker dies.
    """
    cells = pick_cells(one.cell for one in (*plan.cells, *examples(plan)))
    if not cells:
        raise InputError("all cells of this study have a trainer of their own: there is nothing that can be timed.")
    before = descendants()  # of whoever called this, and not to be ended with Ray
    ray = start_ray(address, workers)
    family = descendants() - before
    try:
        fleet = Fleet(cluster_nodes(ray))
        demand = Demand(gpus=1.0 if fleet.gpus else 0.0)
        count = fleet.count(demand, workers or 1_000_000)
        if not count:
            raise InputError(f"no node of the cluster has room for {demand}: there is nothing to time on.")
        watches = [ray.remote(**demand.options())(Stopwatch).remote(demand.gpus) for _ in range(count)]
        answers = _time_all(ray, watches, str(store.root), cells, str(base_dir) if base_dir else None, progress)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, InputError) else InputError(f"timing failed: {cause!r}")) from None
    except ray.exceptions.RayError as error:
        raise InputError(
            f"a worker died while it timed ({str(error).splitlines()[0]}). Try fewer: --workers."
        ) from None
    finally:
        stop_ray(ray)
        if address == "local":
            end_processes(family | (descendants() - before))
    return [_keep(store, kind, found) for kind, found in sorted(answers.items())]


def _time_all(
    ray: Any,
    watches: Sequence[Any],
    root: str,
    cells: Sequence[Cell],
    base_dir: str | None,
    progress: Callable[[str, float], None],
) -> dict[str, list[dict[str, Any]]]:
    """Every watch times every cell in every round, each beginning elsewhere; the answers by kind of worker."""
    total = len(watches) * len(cells) * ROUNDS
    queues = [
        itertools.islice(itertools.cycle(cells), order * len(cells) // len(watches), None)
        for order in range(len(watches))
    ]
    left = dict.fromkeys(range(len(watches)), len(cells) * ROUNDS)
    pending: dict[Any, int] = {}
    answers: dict[str, list[dict[str, Any]]] = {}

    def ask(order: int) -> None:
        left[order] -= 1
        pending[watches[order].time.remote(root, next(queues[order]).identity, base_dir)] = order

    for order in left:
        ask(order)
    done = 0
    while pending:
        ended, _ = ray.wait(list(pending), timeout=60.0)
        if not ended and not done:
            progress("no word of the workers yet: starts are slow, or others hold the room", 0.0)
        for handle in ended:
            order = pending.pop(handle)
            answer = ray.get(handle)
            answers.setdefault(answer["kind"], []).append(answer | {"worker": order})
            done += 1
            progress(f"timing {plural(len(cells), 'shape')} on {plural(len(watches), 'worker')}", done / total)
            if left[order]:
                ask(order)
    return answers


class Stopwatch:
    """One process in one slot. Ray makes it an unnamed actor."""

    def __init__(self, gpus: float) -> None:
        """`gpus`: what Ray gave it."""
        from sweeps.devices import hide_gpus, keep_freed_memory

        if not gpus:
            hide_gpus()
        # Imported when the worker starts, so that no shape waits for it.
        import sweeps.training  # noqa: F401

        keep_freed_memory()

    def time(self, root: str, identity: dict[str, Any], base_dir: str | None) -> dict[str, Any]:
        """Time one cell; says on which kind of worker."""
        from sweeps.corpora import open_corpus
        from sweeps.devices import choose_numerics
        from sweeps.stopwatch import time_cell

        cell = cell_from_identity(identity)
        timed = time_cell(cell, open_corpus(Path(root), cell.corpus), Path(base_dir) if base_dir else None)
        numerics = choose_numerics(cell)
        device = processor() if numerics.device == "cpu" else numerics.device
        kind = kind_of(device, numerics.threads)
        versions = numerics.versions | {"numerics": str(cell.numerics_version)}
        return {"kind": kind, "device": device, "host": os.uname().nodename, "versions": versions, "timed": timed}


def _keep(store: Store, kind: str, answers: Sequence[Mapping[str, Any]]) -> Calibration:
    """Join what was timed with what the store knows of the kind, fit, and write it down."""
    groups: dict[Any, list[Timed]] = {}
    for answer in answers:
        groups.setdefault(_key(answer["timed"]), []).append(answer["timed"])
    points = {key: _typical(group) for key, group in groups.items()}
    versions = dict(answers[0]["versions"])
    before = read_calibrations(store).get(kind)
    if before is not None and before.versions == versions:
        points = {_key(one): one for one in before.points} | points
    calibration = Calibration(
        kind=kind,
        device=answers[0]["device"],
        points=tuple(points.values()),
        costs=_fit(tuple(points.values())),
        workers=len({answer["worker"] for answer in answers}),
        host=answers[0]["host"],
        versions=versions,
        measured=timestamp(),
    )
    write_json(store.root / "hardware" / f"{kind}.json", _to_json(calibration))
    return calibration


def _key(one: Timed) -> tuple[Any, ...]:
    return one.family, one.precision, one.shape, one.sequences, one.micro_batch


def _typical(group: Sequence[Timed]) -> Timed:
    """The lower quartile of each of the seconds; the median of what the processes had of their cores."""
    quartile = {
        name: statistics.quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0]
        for name in _SECONDS
        for values in [[getattr(one, name) for one in group]]
    }
    shares = [one.core_share for one in group if one.core_share is not None]
    return replace(group[0], **quartile, core_share=statistics.median(shares) if shares else None)


def _fit(points: Sequence[Timed]) -> dict[str, Costs]:
    groups: dict[str, list[Timed]] = {}
    for one in points:
        groups.setdefault(f"{one.family} {one.precision}", []).append(one)
    return {name: fit_costs(group) for name, group in groups.items()}


# --- on record ---------------------------------------------------------------------------------------------------


def read_calibrations(store: Store) -> dict[str, Calibration]:
    """Kind -> calibration, of all that the store holds. Raises InputError for a damaged one."""
    found = {}
    for path in sorted((store.root / "hardware").glob("*.json")):
        try:
            found[path.stem] = _from_json(read_json(path))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the calibration {path} is damaged ({error}). Remove it and calibrate again.") from None
    return found


def find_calibration(store: Store, name: str | None = None) -> Calibration | None:
    """The calibration called `name`; without a name that of this machine's kind, or else the only one that there is.

    None where no such one is known. Raises InputError for a name that the store does not have.
    """
    known = read_calibrations(store)
    if name is not None:
        if name not in known:
            there = ", ".join(known) or "none yet"
            raise InputError(
                f"--hardware: no calibration {name!r} in the store {store.root}{nearest(name, known)} (it has: "
                f"{there}). Make one with `escala calibrate` where such workers are."
            )
        return known[name]
    return known.get(local_kind(), next(iter(known.values())) if len(known) == 1 else None)


def pool_calibration(store: Store, device: Literal["cpu", "cuda"], models: Collection[str]) -> Calibration | None:
    """The calibration of a run's workers: on CPUs that of this machine's processor; on GPUs that of their model, by its
    full name or as Ray shortens it ("H100").

    None where there is none, a model is not known ("") or they are several: what another device takes is no estimate.
    """
    known = read_calibrations(store)
    if device == "cpu":
        return known.get(kind_of(processor(), threads=1))
    words = [f"-{kind_of(model, threads=1)}-" for model in models]
    fitting = [one for one in known.values() if all(word in f"-{kind_of(one.device, threads=1)}-" for word in words)]
    return fitting[0] if words and len(fitting) == 1 else None


def core_share(calibration: Calibration) -> float | None:
    """The median share of their cores that the workers had while they timed; None where it is not known."""
    shares = [one.core_share for one in calibration.points if one.core_share is not None]
    return statistics.median(shares) if shares else None


def calibration_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """One plain row per shape and batch that was timed."""
    return [
        {
            "family": one.family,
            "precision": one.precision,
            "N": parameters(one.shape).active,
            "batch_tokens": one.sequences * one.shape.context,
            **{name: getattr(one, name) for name in _SECONDS},
        }
        for one in sorted(calibration.points, key=lambda one: (one.family, parameters(one.shape).active, one.sequences))
    ]


def _to_json(calibration: Calibration) -> dict[str, Any]:
    plain = {field.name: getattr(calibration, field.name) for field in fields(Calibration)}
    points = [one.to_json() for one in calibration.points]
    costs = {name: one.to_json() for name, one in calibration.costs.items()}
    return {"format": FORMAT, **plain, "points": points, "costs": costs}


def _from_json(record: Mapping[str, Any]) -> Calibration:
    plain = {field.name: record[field.name] for field in fields(Calibration)}
    plain["points"] = tuple(timed_from_json(one) for one in record["points"])
    plain["costs"] = {name: costs_from_json(one) for name, one in record["costs"].items()}
    return Calibration(**plain)
