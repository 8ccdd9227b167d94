"""Trials: what a search's journal holds, and the cells that follow from it by the code that plans a grid's cells.

    studies/<name>/search/journal.log      Optuna's own storage (JournalStorage): the trials of every group

Read here without a lock: a line that is being written is not seen yet. Guarded against: a trial that counts for another
recipe than it was trained with. A group's name ends in a hash of all that defines its losses; after an edit of recipe,
corpus or space it is another group, and the old one stays in the journal, unused.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sweeps.errors import InputError
from sweeps.grids import Place, Plan, corners
from sweeps.lineage import Branch, lineage, what_prevents
from sweeps.planned import PlannedCell
from sweeps.records import disk_error
from sweeps.samplers import distributions
from sweeps.schedules import stable_steps
from sweeps.space import Search, rung_step
from sweeps.store import Store
from sweeps.units import human

LENGTH = "length"
"""User attribute of a trial: the share of the full length that it trains, or trained last. Only where rungs are."""
AGAIN = "again"
"""User attribute of a trial that repeats a failed one, whose cells a person has forgiven."""
FAULT = "fault"
"""User attribute of a trial whose setting makes no cell: why."""
_LOCK_SECONDS = 5
"""After so long a lock is taken to be that of a killed driver."""


@dataclass(frozen=True)
class Group:
    """The places that one search chooses a setting for."""

    name: str
    """Words and a hash of all that defines the losses: an edited recipe or space begins a search of its own."""
    places: tuple[Place, ...]

    @cached_property
    def recipe_cells(self) -> frozenset[str]:
        """The ids of the cells of the recipe's own setting, at full length. What is searched may have no value there
        that makes a cell."""
        found = set()
        for place in self.places:
            with suppress(ValueError):
                found.add(place.plan().cell.id)
        return frozenset(found)


def groups(plan: Plan) -> tuple[Group, ...]:
    """The groups of a study that searches. InputError where a start setting or the rungs do not fit the recipe."""
    search = plan.study.search
    assert search is not None
    found: dict[str, list[Place]] = {}
    for place in plan.places:
        key = repr((place.family.name, place.options, place.point, place.variation))  # all but the seed
        found.setdefault("study" if search.per == "study" else key, []).append(place)
    made = []
    for places in found.values():
        words = "study" if search.per == "study" else _words(places[0])
        known = [place.plan(setting).cell.id for place in places for setting in corners(plan.study)]
        known += [one for place in places for one in _cooled(search, place)]
        text = json.dumps([search.model_dump(mode="json", by_alias=True)["space"], known])
        group = Group(f"{words} {hashlib.sha256(text.encode()).hexdigest()[:8]}", tuple(places))
        _check_rungs(search, group)
        start_settings(search, group)
        made.append(group)
    return tuple(made)


def _cooled(search: Search, place: Place) -> list[str]:
    """The cell of a wsd that the ends of the space do not show: fields of the recipe concern it alone."""
    axis = search.space.get("schedule")
    if axis is None or "wsd" not in (axis.categorical or [])[1:-1]:
        return []
    with suppress(ValueError):  # a setting between the ends need not make a cell
        return [place.plan(corners(place.study)[0] | {"schedule": "wsd"}).cell.id]
    return []


def _words(place: Place) -> str:
    """The group of a place in words."""
    one = place.plan(corners(place.study)[0])
    told = f"{one.cell.family} N={human(one.counts['N'])} D={human(one.cell.tokens)}"
    given = dict(place.point.overrides) | {name: value for name, (_, value) in place.variation.items()}
    return told + "".join(f" {name}={value}" for name, value in given.items())


def _check_rungs(search: Search, group: Group) -> None:
    for place in group.places if search.rungs else ():
        for setting in corners(place.study):
            full = place.plan(setting).cell
            if full.schedule.name != "wsd" or full.trainer:
                raise InputError(
                    "search: rungs need Escala's trainer and schedule wsd in every trial, so that a rung is a "
                    f"cooled-down branch of the full run; found "
                    f"{'a trainer of your own' if full.trainer else 'schedule ' + full.schedule.name}. Set "
                    "training: {schedule: wsd}, or take the rungs out."
                )
            for share in search.rungs:
                try:
                    short = place.plan(setting, share).cell
                except ValueError as error:
                    raise InputError(f"search: at rung {share:g}: {error}") from None
                if lineage(short) != lineage(full):
                    raise InputError(
                        f"search: a rung is a branch of the full run, and at {share:g} of the length "
                        f"{' and '.join(what_prevents([short, full])) or 'the past'} differs. Let it be a number that "
                        "does not follow D."
                    )


def start_settings(search: Search, group: Group) -> list[dict[str, Any]]:
    """The settings that a group begins with. What one does not name has the value of the recipe at the group."""
    found = []
    space = distributions(search.space) if search.start else {}
    for given in search.start:
        setting = dict(given)
        for name, distribution in space.items():
            if name not in setting:
                setting[name] = _common_value(group, name)
            value = setting[name]
            try:
                inside = distribution._contains(distribution.to_internal_repr(value))
            except ValueError:
                inside = False
            if not inside:
                axis = search.space[name].model_dump(by_alias=True, exclude_unset=True)
                room = ", ".join(f"{form}: {values}" for form, values in axis.items())
                whose = "Change it" if name in given else "It is the recipe's own: name another in start"
                raise InputError(
                    f"search: start has {name} {value!r}, which is not in the space ({room}). {whose}, or widen the "
                    "space."
                )
        found.append(setting)
    return found


def _common_value(group: Group, name: str) -> Any:
    """The recipe's value of a hyperparameter at every place of a group."""
    try:
        own = {_own_value(place, name) for place in group.places}
    except ValueError as error:
        raise InputError(f"search: start names no {name}, and the recipe's makes no cell ({error}). Name it.") from None
    if len(own) > 1:
        raise InputError(f"search: start names no {name}, and the recipe's differs between places. Name it.")
    return own.pop()


def _own_value(place: Place, name: str) -> Any:
    """The recipe's value of a hyperparameter at a place."""
    cell = place.plan().cell
    if name in ("schedule", "optimizer"):
        return getattr(cell, name).name
    return next(getattr(part, name) for part in (cell, cell.optimizer, cell.schedule) if hasattr(part, name))


def expected_costs(group: Group, search: Search) -> tuple[float, float]:
    """About what a trial costs in FLOPs, by the first corner of the space: up to its first length, and on average,
    where half go on from the first rung."""
    first, full = (first_cost(group, search, share) for share in ([*search.rungs, 1.0][0], 1.0))
    return first, (first + full) / 2


def first_cost(group: Group, search: Search, share: float) -> float:
    """What a trial costs in FLOPs up to a share of the length, by the first corner of the space."""
    setting = {name: axis.ends()[0] for name, axis in search.space.items()}
    return float(sum(place.plan(setting, share).counts["C"] for place in group.places))


# --- trials ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A trial as the journal has it."""

    number: int
    state: str
    """RUNNING, COMPLETE, PRUNED or FAIL."""
    value: float | None
    setting: Mapping[str, Any]
    losses: Mapping[float, float]
    """Loss at each rung that it has come to."""
    length: float
    """The share of the full length that it trains or trained last."""
    counts: bool
    """Whether it is one of the trials that the study declares; one that repeats a failed one is not."""
    fault: str | None
    """Why its setting makes no cell, if so."""

    @property
    def lengths(self) -> list[float]:
        """Every share that it trained or trains, ascending."""
        return sorted({*self.losses, self.length})


def read_trial(frozen: Any, search: Search) -> Trial | None:
    """A trial of Optuna's; None where it was never fully asked. Values have six digits, so that a cell's id is the same
    on every machine."""
    if frozen.params.keys() != search.space.keys():
        return None
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in sorted(frozen.params.items())}
    shortest = search.rungs[0] if search.rungs and not frozen.state.is_finished() else 1.0
    length = frozen.user_attrs.get(LENGTH, shortest)
    # of a rung that the file has no more, and that the trial did not end at, thousandths are all that is known
    shares = {rung_step(share): share for share in (*search.rungs, length) if share < 1}
    return Trial(
        frozen.number,
        frozen.state.name,
        frozen.value,
        rounded,
        {shares.get(step, step / 1000): value for step, value in sorted(frozen.intermediate_values.items())},
        length,
        AGAIN not in frozen.user_attrs,
        frozen.user_attrs.get(FAULT),
    )


def trial_cells(group: Group, trial: Trial, share: float) -> list[PlannedCell]:
    """A trial's cells of a share of the length, place by place. ValueError where its setting makes none."""
    labels = {"search": group.name, "trial": trial.number, "rung": share}
    planned = [place.plan(trial.setting, share) for place in group.places]
    return [
        replace(one, labels={**one.labels, **labels, "default": one.cell.id in group.recipe_cells}) for one in planned
    ]


def makes_cells(group: Group, trial: Trial) -> bool:
    """Whether a trial can be planned: that it cannot need not be on record yet."""
    try:
        trial_cells(group, trial, trial.length)
    except ValueError:
        return False
    return True


def grown(plan: Plan, group: Group, trials: Sequence[Trial]) -> Plan:
    """A plan with the cells of more trials of a group, or of more lengths of them. ValueError as `trial_cells`."""
    cells = {one.cell.id: one for one in plan.cells}
    branches = dict(plan.branches)
    for trial in trials:
        shorter: list[PlannedCell] = []
        for share in trial.lengths if trial.fault is None else ():
            these = trial_cells(group, trial, share)
            for one in these:
                cells.setdefault(one.cell.id, one)
            for one, before in zip(these, shorter):  # it goes on where the shorter one's cooldown began
                branches.setdefault(one.cell.id, Branch(before.cell.id, stable_steps(before.cell)))
            shorter = these
    return replace(plan, cells=tuple(cells.values()), branches=branches)


def with_trials(store: Store, plan: Plan) -> Plan:
    """A plan with the cells of the trials that are on record; a plan that searches nothing as it is."""
    if plan.study.search is None:
        return plan
    known, path = groups(plan), journal_path(store, plan.study.name)
    if path.exists():
        storage = open_journal(path)
        for group in known:
            trials = read_group(storage, group.name, plan.study.search)
            plan = grown(plan, group, [one for one in trials if one.state != "RUNNING" or makes_cells(group, one)])
    return plan


# --- the journal -------------------------------------------------------------------------------------------------


def journal_path(store: Store, study: str) -> Path:
    """Where a study's journal is, whether or not there is one yet."""
    return store.study(study) / "search" / "journal.log"


def open_journal(path: Path) -> Any:
    """Optuna's storage of a search, for reading and writing. InputError where the file is damaged.

    What is written is on disk after `sync_journal`; Optuna's own file backend syncs each of a trial's six lines, which
    costs more than all else of it.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    class Backend(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
            lock.acquire()
            try:
                with path.open("ab") as stream:
                    stream.write(lines)
            except OSError as error:
                raise disk_error(path, error) from error
            finally:
                self._release()

        def _release(self) -> None:
            try:
                lock.release()
            except RuntimeError as error:  # Optuna's one word for whatever the disk says
                if isinstance(error.__context__, OSError):
                    raise disk_error(path, error.__context__) from error.__context__
                raise

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock = JournalFileSymlinkLock(str(path), grace_period=_LOCK_SECONDS)
    try:
        return JournalStorage(Backend(str(path), lock))
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}). Restore it, or give the study another name.") from None


def sync_journal(path: Path) -> None:
    """Until all that was written is on disk. InputError where the disk refuses."""
    try:
        with path.open("ab") as stream:
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_error(path, error) from error


def read_group(storage: Any, group: str, search: Search) -> list[Trial]:
    """The trials of a group that were fully asked; none where the journal does not know it."""
    import optuna

    if group not in {summary.study_name for summary in storage.get_all_studies()}:
        return []
    there = optuna.load_study(study_name=group, storage=storage).get_trials(deepcopy=False)
    return [trial for one in there if (trial := read_trial(one, search)) is not None]
