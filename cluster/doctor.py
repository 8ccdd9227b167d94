"""What `escala doctor` checks: each finding says what was found and, where something is wrong, what to do."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.hardware import local_gpus
from sweeps.errors import InputError
from sweeps.store import Store, check_room, open_store

TESTED = {"torch": "2.13", "transformers": "5.23", "ray": "2.60", "mlflow": "3.17", "optuna": "5.0", "pandas": "3.1"}
"""The versions that constraints.txt pins, to their minor number."""
LOW_DISK_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Finding:
    """One check."""

    what: str
    ok: bool
    found: str
    advice: str = ""


def check(store: Path) -> list[Finding]:
    """All checks; none of them trains, starts Ray or writes to the store."""
    return [_escala(), *_python(), *_packages(), _device(), _auth(), _store(store)]


def _escala() -> Finding:
    """Which Escala this is: of a clone that moves on, its number says little."""
    from cluster.nodeprobe import this_process

    try:
        number = version("escala")
    except PackageNotFoundError:
        number = "not installed"
    here = this_process()
    return Finding("Escala", True, f"{number}, code {here['code']} in {here['code_folder']}")


def _python() -> Iterator[Finding]:
    ok = sys.version_info >= (3, 11)
    yield Finding("Python", ok, platform.python_version(), "" if ok else "Escala needs Python 3.11 or newer.")


def _packages() -> Iterator[Finding]:
    for name, tested in TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, False, "not installed", f"pip install -c constraints.txt {name}")
            continue
        same = found.startswith(f"{tested}.")
        yield Finding(name, True, found, "" if same else f"tested with {tested}; constraints.txt pins the tested set.")


def _device() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("device", False, str(error), "see PyTorch's install page for this machine's build.")
    there = local_gpus()
    if there and not torch.cuda.is_available():
        what = (
            "this torch is built without CUDA" if torch.version.cuda is None else f"it wants CUDA {torch.version.cuda}"
        )
        return Finding(
            "device",
            False,
            f"{', '.join(there)}, which torch does not find: {what}",
            "install the torch that suits this GPU's driver (see PyTorch's install page), or a newer driver.",
        )
    if not torch.cuda.is_available():
        return Finding("device", True, f"CPU, {os.cpu_count()} cores, no GPU")
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Finding("device", True, names)


def _auth() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode:
        return Finding("Ray token auth", True, f"RAY_AUTH_MODE={mode}")
    if os.access(Path.home(), os.W_OK):
        return Finding("Ray token auth", True, "a token under the home folder, made by Ray")
    return Finding("Ray token auth", True, "the home folder is not writable: a token for each run")


def _store(store: Path) -> Finding:
    try:
        place = find_store(store)
    except InputError as error:
        return Finding("store", False, str(error))
    if place is None:
        return Finding("store", True, f"none yet at {store.expanduser().resolve()}", "the first plan or run makes it.")
    return disk("store", str(place.root), shutil.disk_usage(place.root).free)


def disk(what: str, found: str, free_bytes: int) -> Finding:
    """Whether a disk that holds, or is to hold, a store has room."""
    enough = free_bytes > LOW_DISK_BYTES
    advice = "" if enough else "free some space: checkpoints and logs need it."
    return Finding(what, enough, f"{found}, {free_bytes / 1024**3:.1f} GiB free", advice)


def find_store(store: Path) -> Store | None:
    """The store; None where there is none yet and it can be made. InputError where it is not to be used."""
    path = store.expanduser().resolve()
    try:
        if (path / "store.json").exists():
            return open_store(path)
        _check_place(path)
    except OSError as error:  # of a folder that may not be looked into
        raise InputError(str(error)) from None
    return None


def _check_place(path: Path) -> None:
    """InputError where a store that is not there yet cannot be made: the first folder above it that is there decides.
    Nothing is written to find out."""
    check_room(path)
    there = next(one for one in (path, *path.parents) if one.exists())
    if not there.is_dir():
        raise InputError(f"{path} cannot be made: {there} is a file. Name another store with --store.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{path} cannot be made: {there} is not writable. Change its permissions, or name another store with "
            "--store."
        )
