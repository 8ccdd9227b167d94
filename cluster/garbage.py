"""What of a store may go: checkpoints of ended cells, leftovers of killed writers, cells and corpora nobody needs.

Nothing of a planned cell's result or log ever goes. The failure it guards against: a file that somebody is still
writing, or a cell that a driver is about to plan, is taken away. So nothing goes while a driver or an attempt lives.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.claims import living_drivers
from cluster.watching import cell_names
from sweeps.errors import InputError, nearest
from sweeps.paths import inside
from sweeps.records import read_or_none
from sweeps.store import (
    CELL_ID,
    CORPUS_NAME,
    Store,
    attempt_epochs,
    attempt_lives,
    checkpoint_paths,
    is_permanent,
    read_end,
    read_plan,
    study_names,
)

LEFTOVER_SECONDS = 3600.0
"""A temporary file that nobody wrote to for so long was left by a killed writer."""
IMPORT_SECONDS = 60.0
"""A cell that is younger may belong to an import that has not put its study on record yet."""
HALF_WRITTEN = re.compile(r"\.(?:.+\.[a-z]+|attempt|[0-9a-f]{16})\.[a-z0-9_]{8}|\.(?:tmp|building|probe)-.+")
"""What writers call a file or folder until it is in its place. Other names with a dot, such as `.git`, are people's."""
KINDS = {
    "checkpoints": "checkpoints of cells that have ended, but for permanent ones",
    "leftovers": "temporary files that killed writers left",
    "cells": "cells that no study plans any more, with their results and logs",
    "corpora": "corpora that no cell and no study uses",
    "trunks": "permanent checkpoints that no planned cell waits for: one that is planned later, longer or shorter, "
    "trains its past again",
}
BY_DEFAULT = tuple(kind for kind in KINDS if kind != "trunks")
"""A study may grow, and its next cells go on from the trunks that are there: these go only when they are named."""


@dataclass(frozen=True)
class Item:
    """One file or folder that may go."""

    kind: str
    path: Path
    size: int
    """Bytes that it frees."""


def collectable(store: Store, kinds: Sequence[str] = BY_DEFAULT) -> list[Item]:
    """All that may go now. InputError for an unknown kind, and while a driver or an attempt lives."""
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"--only: found {kind!r}{nearest(kind, KINDS)}; allowed: {', '.join(KINDS)}.")
    if not os.access(store.root, os.W_OK):
        raise InputError(f"the store {store.root} is not writable: nothing can be removed from it.")
    refuse_while_running(store)
    planned = {entry["id"] for name in study_names(store) for entry in read_plan(store, name)["cells"]}
    folder = store.root / "cells"
    cells = set(cell_names(store))
    gone = cells - planned if "cells" in kinds else set()
    old = (folder / name for name in sorted(gone) if _is_old(folder / name, IMPORT_SECONDS))
    found = [Item("cells", path, _size(path)) for path in old]
    gone = {item.path.name for item in found}
    if "checkpoints" in kinds:
        found += [item for name in sorted(cells - gone) for item in _checkpoints(store, name)]
    if "leftovers" in kinds:
        found += _leftovers(store, gone)
    if "trunks" in kinds:
        found += _trunks(store, planned, gone)
    if "corpora" in kinds:
        found += _corpora(store, cells - gone)
    order = list(KINDS)
    return sorted(found, key=lambda item: (order.index(item.kind), str(item.path)))


def remove(store: Store, items: Sequence[Item]) -> tuple[int, list[Item]]:
    """Take these away. Returns the bytes freed, and what was kept since it may not go any more.

    Who was asked may have answered late: a study that grew meanwhile plans a cell again that was listed. So it is asked
    again before each that nobody works on the store, and what may go is found anew whenever a plan has changed.
    InputError, and nothing goes, where a link leads out of the store.
    """
    for item in items:  # the folders of a store may be links to another disk; one below them may lead anywhere
        first, *rest = item.path.relative_to(store.root).parts
        inside(store.root / first if rest else store.root, item.path.parent, "gc")
    freed = 0
    kept: list[Item] = []
    kinds = list({item.kind for item in items})
    known = None
    still: set[tuple[str, Path]] = set()
    for item in items:
        refuse_while_running(store, attempts=False)
        if (plans := _plans(store)) != known:
            known, still = plans, {(one.kind, one.path) for one in collectable(store, kinds)}
        if (item.kind, item.path) not in still:
            kept += [item] if os.path.lexists(item.path) else []  # or somebody else took it away
            continue
        try:
            if item.path.is_dir() and not item.path.is_symlink():
                shutil.rmtree(item.path)
            else:
                item.path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"{item.path} cannot be removed ({error.strerror}); {freed:,} bytes were freed."
            ) from error
        freed += item.size
    return freed, kept


def _plans(store: Store) -> list[tuple[str, int, int]]:
    """What changes whenever a plan is put on record, which is a new file each time. Cheaper than reading them."""
    found = [(path, path.stat()) for path in sorted((store.root / "studies").glob("*/plan.json"))]
    return [(str(path), told.st_ino, told.st_mtime_ns) for path, told in found]


def refuse_while_running(store: Store, *, attempts: bool = True) -> None:
    """InputError that names the driver or the attempt that lives."""
    for name, holder in living_drivers(store):
        raise InputError(
            f"study {name} is being run by process {holder['pid']} on {holder['host']} since {holder['started']}: "
            "nothing is removed from its store meanwhile. Wait for it, or stop it first."
        )
    for name in cell_names(store) if attempts else ():
        if (store.cell(name) / "result.json").exists():
            continue
        for epoch in attempt_epochs(store, name):
            if read_end(store, name, epoch) is None and attempt_lives(store, name, epoch):
                raise InputError(
                    f"attempt {epoch} of cell {name} is still alive: nothing is removed meanwhile. Wait for it."
                )


# --- the kinds ---------------------------------------------------------------------------------------------------


def _checkpoints(store: Store, cell_id: str) -> Iterator[Item]:
    if not (store.cell(cell_id) / "result.json").exists():
        return
    for epoch in attempt_epochs(store, cell_id):
        for path in checkpoint_paths(store.checkpoints(cell_id, epoch)):
            if not is_permanent(path):
                yield Item("checkpoints", path, _size(path))


def _trunks(store: Store, planned: set[str], gone: set[str]) -> Iterator[Item]:
    """Permanent checkpoints of lineages whose planned cells have all ended, outside cells that go whole."""
    for line in sorted((store.root / "lineages").glob("*/")):
        members = {path.name for path in line.iterdir() if CELL_ID.fullmatch(path.name)}
        ended = {name for name in members if (store.cell(name) / "result.json").exists()}
        for name in sorted(ended - gone) if members & planned <= ended else ():
            for epoch in attempt_epochs(store, name):
                for path in checkpoint_paths(store.checkpoints(name, epoch)):
                    if is_permanent(path):
                        yield Item("trunks", path, _size(path))


def _leftovers(store: Store, gone: set[str]) -> Iterator[Item]:
    """What writers left beside its place, and lineages' notes of cells that are gone."""
    for path in sorted((store.root / "lineages").glob("*/*")):
        if CELL_ID.fullmatch(path.name) and (path.name in gone or not store.cell(path.name).exists()):
            yield Item("leftovers", path, _size(path))
    places = [store.root]
    while places:
        place = places.pop()
        for entry in os.scandir(place):
            path = Path(entry.path)
            if entry.name.startswith("."):
                if HALF_WRITTEN.fullmatch(entry.name) and _is_old(path):
                    yield Item("leftovers", path, _size(path))
            elif entry.is_dir(follow_symlinks=False) and entry.name != "mlflow" and entry.name not in gone:
                places.append(path)


def _corpora(store: Store, cells: set[str]) -> Iterator[Item]:
    used = {read_plan(store, name)["corpus"].get("fingerprint") for name in study_names(store)}
    for cell_id in cells:
        record = read_or_none(store.cell(cell_id) / "cell.json")
        if record is not None:  # a plan that is killed may leave half a cell, and a power cut an empty record
            used.add(record["identity"].get("corpus"))
    folder = store.root / "corpora"
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if CORPUS_NAME.fullmatch(path.name) and path.name not in used and _is_old(path):
            yield Item("corpora", path, _size(path))


def _files(path: Path) -> Iterator[os.stat_result]:
    yield path.lstat()
    if path.is_dir() and not path.is_symlink():
        for folder, _, names in os.walk(path):
            yield from (os.lstat(os.path.join(folder, name)) for name in names)


def _size(path: Path) -> int:
    sizes = [found.st_size for found in _files(path)]
    return sum(sizes[1:]) if path.is_dir() and not path.is_symlink() else sizes[0]


def _is_old(path: Path, seconds: float = LEFTOVER_SECONDS) -> bool:
    """Whether nobody wrote to it lately: what is in the making (an import, a plan's corpus) is not on record yet."""
    return time.time() - max(found.st_mtime for found in _files(path)) > seconds
