"""Cells through the real driver: what a run costs besides its training, in time and memory."""

import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path

from measuring import Place, Row, escala


def run(place: Place) -> list[Row]:
    study, store = place.small_study, place.store_with_corpus
    first = escala("run", study, "--store", store, "--workers", 2)
    warm, between, peak, cells = _overheads(store)
    again = escala("run", study, "--store", store)
    note = f"median of {len(warm)}, warm workers"
    return [
        Row(what="cell, all but train, evaluate", measured=statistics.median(warm), unit="s", target=0.5, note=note),
        Row(
            what="same, result to result",
            measured=statistics.median(between),
            unit="s",
            target=0.5,
            note="with commit and hand-over",
        ),
        Row(what="worker, memory", measured=peak / 1e9, unit="GB", target=1.2, note="peak resident, largest"),
        Row(what=f"escala run, {cells} tiny cells", measured=first.seconds, unit="s", note="whole process, 2 workers"),
        Row(what="escala run again, finished", measured=again.seconds, unit="s", note="whole process"),
    ]


def _overheads(store: Path) -> tuple[list[float], list[float], int, int]:
    """Seconds besides training and evaluation, for all but each worker's first cell: inside the attempt, and from the
    result before to its own; the largest peak memory; and the number of cells."""
    workers: dict[int, list[tuple[float, dict[str, float]]]] = defaultdict(list)
    peak = cells = 0
    for path in (store / "cells").glob("*/result.json"):
        result = json.loads(path.read_bytes())
        attempt = json.loads((path.parent / "attempts" / str(result["attempt"]) / "attempt.json").read_bytes())
        workers[attempt["pid"]].append((path.stat().st_mtime, result["seconds"]))
        peak = max(peak, result["peak_memory_bytes"])
        cells += 1
    inside, between = [], []
    for ended in workers.values():
        for (before, _), (after, seconds) in itertools.pairwise(sorted(ended, key=lambda one: one[0])):
            work = seconds["train"] + seconds["evaluate"]
            inside.append(seconds["total"] - work)
            between.append(after - before - work)
    return inside, between, peak, cells
