"""The mirror and the reading of runs: points a second into SQLite, and frames of a thousand runs.

Each figure is beside the plain way of the MLflow client, measured in the same process on the same rows.
"""

import json
import sys

from measuring import ROOT, Place, Row, timed

RUNS, POINTS = 1000, 200
CELLS = 20
"""Of the study that is shipped; its rows are of six keys."""

COMMON = f"""
import json, sys, time
from pathlib import Path
from sweeps.records import encode_row, write_json
from sweeps.store import begin_attempt, commit_result, open_store
sys.path.insert(0, {str(ROOT)!r})
from tests.analysis.synthetic import Run, record

def write(root, name, cells, points):
    store, entries = open_store(root), []
    for seed in range(cells):
        cell = record(Run(width=16, tokens=512 * 10 * points, seed=seed))
        write_json(store.cell(cell["id"]) / "cell.json", cell, sync=False)
        attempt = begin_attempt(store, cell["id"], {{"study": name}})
        rows = []
        for step in range(1, points + 1):
            metrics = {{"train_loss": 3 + 2 / step, "learning_rate": 0.01 / step, "gradient_norm": 1 / step}}
            metrics |= {{"tokens_per_second": 1e5 + step, "flops": 1e9 * step, "val_loss": 3 + 2.1 / step}}
            rows.append(encode_row({{"time": 1.7e9 + step, "tokens": 5120 * step, "metrics": metrics}}))
        (attempt.folder / "log.jsonl").write_bytes(b"".join(rows))
        end = {{"state": "finished", "reason": None, "val_loss_final": 3.0, "val_bpb_final": 4.0}}
        commit_result(attempt, end | {{"seconds": {{"total": 1.0}}, "tokens_per_second": 1e5}})
        entries.append({{"id": cell["id"], "labels": {{}}}})
    study = {{"name": name, "question": "?"}}
    write_json(store.study(name) / "plan.json", {{"format": 1, "study": study, "cells": entries}}, sync=False)
    return store
"""

SHIP = """
from cluster.mirror import Mirror
store = write(sys.argv[1], "ship", int(sys.argv[2]), 500)
mirror = Mirror(store, "ship")
mirror.connect()
began = time.perf_counter()
mirror.sync()
seconds = time.perf_counter() - began
assert mirror.fault is None, mirror.fault
client, points = mirror._client, int(sys.argv[2]) * 500 * 6
run = client.create_run("0").info.run_id
began = time.perf_counter()
for step in range(300):
    client.log_metric(run, "train_loss", 1.0 / (1 + step), step=step)
single = 300 / (time.perf_counter() - began)
print(json.dumps({"points": points / seconds, "single": single}))
"""

READ = """
from analysis import load_curves, load_runs
from cluster.sync import sync_study
cells, points = int(sys.argv[2]), int(sys.argv[3])
store = write(sys.argv[1], "read", cells, points)
began = time.perf_counter()
runs, curves = load_runs("read", store), load_curves("read", store)
seconds = time.perf_counter() - began
assert (len(runs), len(curves)) == (cells, cells * points)
few = write(sys.argv[1] + "-few", "read", cells // 20, points)
assert sync_study(few, "read") is None
from mlflow import MlflowClient
client = MlflowClient(few.tracking_uri)
experiment = client.get_experiment_by_name("read").experiment_id
began, rows = time.perf_counter(), []
for run in client.search_runs([experiment], "tags.`escala.cell` != ''", max_results=1000):
    for key in run.data.metrics:
        rows += [(run.info.run_id, key, m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
loop = (time.perf_counter() - began) * 20
assert len(rows) == cells // 20 * points * 6
print(json.dumps({"seconds": seconds, "loop": loop}))
"""


def mirror(place: Place) -> list[Row]:
    shipped = _measure(SHIP, place.folder / "ship", CELLS)
    read = _measure(READ, place.folder / "read", RUNS, POINTS)
    what = f"load_runs, load_curves, {RUNS:,} x {POINTS}"
    return [
        Row(
            what="mirror into SQLite",
            measured=shipped["points"],
            unit="points/s",
            target=3000.0,
            at_least=True,
            note=f"{CELLS} cells of 3,000 points, runs made too",
        ),
        Row(
            what="mirror over log_metric",
            measured=shipped["points"] / shipped["single"],
            unit="x",
            target=50.0,
            at_least=True,
            note=f"single calls: {shipped['single']:.0f} points/s",
        ),
        Row(what=what, measured=read["seconds"], unit="s", target=3.0, note="from the store, after import"),
        Row(
            what=f"{what}, over client",
            measured=read["loop"] / read["seconds"],
            unit="x",
            target=10.0,
            at_least=True,
            note=f"a loop over the MLflow client: {read['loop']:.0f} s, from a twentieth of the runs",
        ),
    ]


def _measure(code: str, *arguments: object) -> dict[str, float]:
    ended = timed([sys.executable, "-c", COMMON + code, *map(str, arguments)])
    found: dict[str, float] = json.loads(ended.output.splitlines()[-1])
    return found
