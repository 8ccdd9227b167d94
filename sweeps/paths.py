"""One question, asked in one way: may this path be used, or does it leave the folder that it belongs to?

What a study, a store or a dataset from a stranger names is a path below a folder that the reader has chosen. `..`, an
absolute path or a link in it would read, run or delete what lies elsewhere.
"""

from pathlib import Path

from sweeps.errors import InputError


def inside(folder: Path, path: str | Path, what: str) -> Path:
    """`folder / path`, where that stays in the folder with every link followed; it need not exist.

    Raises InputError, which begins with `what`, where it leaves the folder.
    """
    place = folder / path
    try:
        there = place.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name that is too long, a null byte
        raise InputError(f"{what}: {str(place)!r} is no path that can be followed ({error}).") from None
    if not there.is_relative_to(folder.resolve()):
        raise InputError(f"{what}: {place} leads out of {folder}, to {there}. Only what lies in that folder is used.")
    return place
