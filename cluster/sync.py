"""`escala sync`: MLflow brought up to date, or made anew, from the store's files, without a driver."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from cluster.mirror import Mirror
from cluster.tracking import words
from sweeps.errors import InputError
from sweeps.store import Json, Store, claim_study, is_alive, read_json

PASSES = 3
"""A fault that lasts longer than so many passes is told, not waited for."""


def sync_study(
    store: Store,
    study: str,
    tracking_uri: str | None = None,
    *,
    rebuild: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> str | None:
    """Ship what MLflow lacks and merge quarantines; with `rebuild`, make every run anew and delete the old ones.

    Holds the study meanwhile, so that no driver mirrors it too. While a driver holds it there is nothing to do, for the
    driver mirrors; InputError then for a rebuild. Returns what did not get through, or None.
    """
    if not rebuild and _driver(store, study) is not None:
        return None
    claim = claim_study(store, study)
    try:
        mirror = Mirror(store, study, tracking_uri, holds=lambda: _still_ours(claim))
        mirror.connect()
        if rebuild:
            try:
                mirror.rebuild()
            except InputError:
                raise
            except Exception as error:
                raise InputError(
                    f"MLflow at {mirror.tracking_uri} did not say what people marked there ({words(error)}): nothing "
                    "was changed. Rebuild when it answers."
                ) from None
        for order in range(PASSES):
            if order:
                time.sleep(order)
            mirror.sync(progress=progress)
            if mirror.fault is None:
                break
        return mirror.fault
    finally:
        claim.unlink(missing_ok=True)


def _driver(store: Store, study: str) -> Json | None:
    """The record of the living driver of a study."""
    for path in store.study(study).glob("driver-*.json"):
        try:
            if is_alive(record := read_json(path), path.stat().st_mtime):
                return record
        except FileNotFoundError:  # it has just ended
            continue
    return None


def _still_ours(claim: Path) -> bool:
    """Touch the claim, so that it is seen to live; False where a higher one stands."""
    os.utime(claim)
    return claim == max(claim.parent.glob("driver-*.json"), key=lambda path: int(path.stem.partition("-")[2]))
