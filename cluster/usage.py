"""Usage: the GPU time that the drivers of a study have used, on record, so that a budget holds over all its runs.

    studies/<name>/usage/<driver>.json    {"gpu_seconds": ...}, of the driver with that claim

A driver that is killed has not told of its last seconds; no more than those are lost.
"""

from sweeps.records import read_json, write_json
from sweeps.store import Store


def note_usage(store: Store, study: str, driver: int, gpu_seconds: float) -> None:
    """Put on record what a driver has used so far."""
    path = store.study(study) / "usage" / f"{driver}.json"
    write_json(path, {"gpu_seconds": round(gpu_seconds, 3)}, sync=False)


def used_gpu_seconds(store: Store, study: str) -> float:
    """What all drivers of a study have used so far."""
    return sum(float(read_json(path)["gpu_seconds"]) for path in (store.study(study) / "usage").glob("*.json"))
