"""Usage: the GPU time that the drivers of a study have used, on record, so that a budget holds over all its runs.

    studies/<name>/usage/<driver>.json    {"gpu_seconds": ...}, of the driver with that claim

A driver that is killed has not told of its last seconds, and a power cut may lose what the last drivers used; no more
than that is lost.
"""

import time

from cluster.scheduling import Schedule
from sweeps.records import read_or_none, write_json
from sweeps.store import Store


class Usage:
    """What one driver uses, after what others have used before."""

    def __init__(self, store: Store, study: str, driver: int) -> None:
        folder = store.study(study) / "usage"
        self._path = folder / f"{driver}.json"
        told = (read_or_none(path) for path in folder.glob("*.json"))
        self.before = sum(float(one["gpu_seconds"]) for one in told if one is not None)
        """GPU-seconds of the drivers before."""

    def note(self, schedule: Schedule) -> None:
        """Put on record what was used so far, that of units which run included. A run without GPUs leaves nothing."""
        now = time.monotonic()
        busy = sum(one.place.demand.all_gpus * (now - one.began) for one in schedule.running.values())
        if used := schedule.spent_gpu_seconds - self.before + busy:
            write_json(self._path, {"gpu_seconds": round(used, 3)}, sync=False)
