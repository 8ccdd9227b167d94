"""Lineages: cells that are one and the same run until their learning rate begins to fall.

A wsd run of D tokens knows nothing of D before its cooldown. So cells that differ in tokens and cooldown alone share
that past, their trunk: the longest trains it and leaves a permanent checkpoint where each of the others branches off,
at the last step before its own cooldown. A branch is an ordinary cell with the numbers of a run from scratch; where its
trunk's checkpoint is gone it is one. Who shares with whom is written into the store when a study is planned, so that
studies share trunks and a study that grows goes on from the cells that it has.

    lineages/<lineage>/<cell id>     empty: this cell is of this lineage

What prevents sharing is a hyperparameter that follows D (or C): a batch, a rate or a warm-up by rule.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from sweeps.cell import Cell, cell_from_identity, differences
from sweeps.errors import InputError
from sweeps.records import write_bytes
from sweeps.schedules import stable_steps
from sweeps.store import Store, attempt_epochs, checkpoint_paths, read_cell

_OWN = ("tokens",)
_OWN_SCHEDULE = ("name", "final_fraction", "cooldown_fraction", "cooldown_shape")


@dataclass(frozen=True)
class Branch:
    """Where a cell leaves its trunk."""

    parent: str
    """The cell that trains the trunk."""
    steps: int
    """Optimizer steps that the parent takes for the branch."""


def lineage(cell: Cell) -> str | None:
    """The 16 hexadecimal digits that cells with a common past share; None for a cell that has none to share."""
    if not stable_steps(cell) or cell.trainer:  # what a user's own trainer keeps in a checkpoint is not known
        return None
    canonical = json.dumps(_past(cell), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _past(cell: Cell) -> dict[str, Any]:
    past = {key: value for key, value in cell.identity.items() if key not in _OWN}
    past["schedule"] = {key: value for key, value in past["schedule"].items() if key not in _OWN_SCHEDULE}
    return past


def plan_branches(cells: Iterable[Cell]) -> dict[str, Branch]:
    """Cell id -> where it branches off, for every cell whose past a longer one of its lineage trains."""
    families: dict[str, list[Cell]] = {}
    for cell in cells:
        if (key := lineage(cell)) is not None:
            families.setdefault(key, []).append(cell)
    branches: dict[str, Branch] = {}
    for members in families.values():
        trunk = max(members, key=lambda one: (stable_steps(one), one.tokens, one.id))
        branches |= {one.id: Branch(trunk.id, stable_steps(one)) for one in members if one is not trunk}
    return branches


def what_prevents(cells: Iterable[Cell]) -> tuple[str, ...]:
    """The fields, dotted, that keep cells of one model and seed, equal but for their length, from sharing a trunk."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if stable_steps(cell):
            key = json.dumps([cell.family, dict(cell.options), vars(cell.shape), cell.seed, cell.data_seed])
            groups.setdefault(key, []).append(cell)
    found: set[str] = set()
    for members in groups.values():
        shortest, longest = (pick(members, key=lambda one: one.tokens) for pick in (min, max))
        keys = {lineage(one) for one in members}
        if longest.tokens > shortest.tokens and len(keys) >= len(members):
            # the longest that differs in least, since a study may vary something at every length
            past, most = _past(shortest), longest.tokens
            names = [{name for name, _, _ in differences(past, _past(one))} for one in members if one.tokens == most]
            found |= min(names, key=len)
    return tuple(sorted(found))


def apart_by_warmup(cells: Iterable[Cell]) -> list[Cell]:
    """The cells that would branch off a longer one if they had its warm-up, and do not since theirs is another."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        alike = replace(cell, schedule=replace(cell.schedule, warmup_tokens=0)) if stable_steps(cell) else cell
        if (key := lineage(alike)) is not None:
            groups.setdefault(key, []).append(cell)
    found = []
    for members in groups.values():
        longest = max(members, key=lambda one: one.tokens)
        shorter = [one for one in members if one.tokens < longest.tokens]
        found += [one for one in shorter if one.schedule.warmup_tokens != longest.schedule.warmup_tokens]
    return found


# --- on record ---------------------------------------------------------------------------------------------------


def note_lineage(store: Store, cell: Cell) -> None:
    """Put it on record that a cell is of its lineage, if it has one."""
    if (key := lineage(cell)) is not None:
        path = store.root / "lineages" / key / cell.id
        if not path.exists():
            write_bytes(path, b"", sync=False)


def relatives(store: Store, cell: Cell) -> Iterator[Cell]:
    """The other cells of a cell's lineage that the store knows."""
    key = lineage(cell)
    for name in _members(store, key) if key else ():
        if name != cell.id:
            with suppress(InputError):  # nobody planned it any more, and it was taken away
                yield cell_from_identity(read_cell(store, name)["identity"])


def _members(store: Store, key: str) -> list[str]:
    """The ids of the cells of a lineage that the store knows."""
    folder = store.root / "lineages" / key
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def kept_pasts(store: Store, cells: Iterable[Cell]) -> dict[str, Branch]:
    """Cell id -> the other cell of its lineage that has kept the longest piece of its past, and the steps that it is:
    what a first attempt goes on from. So say the names of checkpoints, which are verified when they are read."""
    if not (store.root / "lineages").is_dir():
        return {}
    lineages: dict[str, list[Cell]] = {}
    for cell in cells:
        if (key := lineage(cell)) is not None:
            lineages.setdefault(key, []).append(cell)
    found: dict[str, Branch] = {}
    for key, members in lineages.items():
        kept = {name: steps for name in _members(store, key) if (steps := _kept_steps(store, name))}
        for cell in members:
            own = stable_steps(cell)
            pieces = [(max(few), name) for name in kept if (few := [n for n in kept[name] if n <= own])]
            if others := [piece for piece in pieces if piece[1] != cell.id]:
                longest, parent = max(others)
                found[cell.id] = Branch(parent, longest)
    return found


def _kept_steps(store: Store, cell_id: str) -> set[int]:
    """The steps of a cell's checkpoints that do not depend on its length."""
    try:
        folders = [store.checkpoints(cell_id, epoch) for epoch in attempt_epochs(store, cell_id)]
        tokens = {int(path.name) for folder in folders for path in checkpoint_paths(folder)}
        if not tokens:
            return set()
        cell = cell_from_identity(read_cell(store, cell_id)["identity"])
    except InputError:  # as in `relatives`; or its name is none of a cell
        return set()
    return {count // cell.batch_tokens for count in tokens if count <= stable_steps(cell) * cell.batch_tokens}


def branch_points(store: Store, cell: Cell) -> frozenset[int]:
    """The tokens at which a cell keeps a permanent checkpoint: where others of its lineage leave it, and where its own
    cooldown begins, so that a longer one that is planned later goes on from there."""
    own = stable_steps(cell)
    if lineage(cell) is None:
        return frozenset()
    steps = {min(own, stable_steps(one)) for one in relatives(store, cell)} | {own}
    return frozenset(count * cell.batch_tokens for count in steps if count < cell.steps)
