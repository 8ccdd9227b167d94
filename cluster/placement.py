"""Placement: what one worker asks of Ray, and how many fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Slots:
    """How many workers run side by side, and the Ray options of each."""

    count: int
    options: dict[str, Any]
    device: Literal["cpu", "cuda"]


def choose_slots(resources: Mapping[str, float], cells: int, limit: int | None = None) -> Slots:
    """One worker per GPU where the cluster has any, else one per CPU; no more than there are cells, or than `limit`."""
    gpus = int(resources.get("GPU", 0))
    available = gpus or int(resources.get("CPU", 1))
    count = max(1, min(available, cells, limit or available))
    options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
    if gpus:
        return Slots(count, options | {"num_gpus": 1}, "cuda")
    return Slots(count, options, "cpu")
