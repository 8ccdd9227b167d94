"""From `escala submit` to the first step of the first cell, on a local cluster that is up, and where the time goes.

The head has token auth on. The store has the corpus, as after any first study; the cells are small, so what is timed
is the way to them: the client, Ray's start of the driver, planning there, MLflow, and the workers with their imports.
"""

import json
import os
import sys
import time
from pathlib import Path

from measuring import ROOT, SMALL_STUDY, Place, Row, escala

sys.path.insert(0, str(ROOT / "tests"))
from heads import TOKEN, running_head

CPUS = 3
"""One for the driver, two for workers."""
TARGET_SECONDS = 20.0


def submit(place: Place) -> list[Row]:
    store = place.store_with_corpus
    rows = []
    with running_head(cpus=CPUS, token=TOKEN) as head:
        os.environ["RAY_AUTH_TOKEN"] = TOKEN
        try:
            for name, seeds in (("first", "[100, 101]"), ("second", "[102, 103]")):
                study = place.study(name, SMALL_STUDY.replace("seeds: [0, 1, 2, 3, 4, 5, 6, 7]", f"seeds: {seeds}"))
                began = time.time()
                ended = escala("submit", study, "--address", head.address, "--store", store, "--json")
                rows += _rows(name, store, began, json.loads(ended.output)["started"])
        finally:
            del os.environ["RAY_AUTH_TOKEN"]
    return rows


def _rows(name: str, store: Path, began: float, sent: float) -> list[Row]:
    """The whole, and its parts as the files tell them; seconds."""
    record = store / "studies" / name / "plan.json"
    planned = record.stat().st_mtime
    attempts = [store / "cells" / one["id"] / "attempts" / "0" for one in json.loads(record.read_text())["cells"]]
    attempted = min((one / "attempt.json").stat().st_mtime for one in attempts)
    steps = (json.loads(line) for one in attempts for line in (one / "log.jsonl").read_text().splitlines())
    logged = min(row["time"] for row in steps if row["tokens"])
    parts = {
        "until the job is sent": sent - began,
        "Ray starts the driver, it plans": planned - sent,
        "MLflow, workers": attempted - planned,
        "the cell's first step": logged - attempted,
    }
    what = f"submit, {name} study to first step"
    note = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
    return [Row(what=what, measured=logged - began, unit="s", target=TARGET_SECONDS, note=note)]
