"""`escala sync`: MLflow brought up to date, or made anew, from the store's files, without a driver."""

import time
from collections.abc import Callable

from cluster.claims import Claim, read_holder
from cluster.mirror import Mirror
from cluster.tracking import words
from sweeps.errors import InputError
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

    Holds the study meanwhile, so that no driver mirrors it too. While a driver holds it there is nothing to do, for the
    driver mirrors; InputError then for a rebuild. Returns what did not get through, or None.
    """
    holder = read_holder(store, study)
    if not rebuild and holder is not None and holder.lives:
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
