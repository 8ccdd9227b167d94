"""`escala sync`: MLflow brought up to date, or made anew, from the store's files, without a driver."""

import time
from collections.abc import Callable

from cluster.claims import Claim, read_holder
from cluster.mirror import Mirror
from cluster.tracking import words
from sweeps.errors import InputError
from sweeps.records import read_json
from sweeps.store import Store

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

    Holds the study meanwhile, so that no driver mirrors it too. While a driver holds it nothing is sent, for the driver
    mirrors; InputError then for a rebuild, and for another server than the driver's. Returns what did not get through,
    or None.
    """
    driver = None if rebuild else mirrored_by(store, study)
    if driver is not None:
        wanted, there = tracking_uri or store.tracking_uri, _driver_uri(store, study)
        if there not in (None, wanted):
            raise InputError(
                f"study {study} is mirrored by {driver} to {there}, and to no other server meanwhile: nothing was sent "
                f"to {wanted}. Sync again when it has ended."
            )
        return None
    with Claim(store, study) as claim:
        mirror = Mirror(store, study, tracking_uri, holds=claim.holds)
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


def mirrored_by(store: Store, study: str) -> str | None:
    """The driver that mirrors the study now, in words."""
    holder = read_holder(store, study)
    if holder is None or not holder.lives:
        return None
    return f"its driver, process {holder.record['pid']} on {holder.record['host']},"


def _driver_uri(store: Store, study: str) -> str | None:
    """Where the study was mirrored to last; None where that is not known."""
    path = store.study(study) / "mirror.json"
    return read_json(path).get("tracking_uri") if path.exists() else None
