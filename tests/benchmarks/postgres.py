"""A shared MLflow on Postgres under the metric traffic of 100 cells that train at once: points a second, no row lost.

The logs grow while they are shipped, as a driver does it: by the mirror's own thread, through the server script of
cluster/deploy/mlflow with accounts on, into a Postgres that has what it committed on the disk. First all cells are of
one study, then of four, each with a mirror in a process of its own. The rows are counted in Postgres itself.
"""

import json
import sys

from measuring import ROOT, Place, Row, timed

CELLS, ROWS, KEYS = 100, 200, 6
GROW_SECONDS = 10.0
"""How long the cells train: a row of each every twentieth of a second."""

SHIP = f"""
import json, os, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from sweeps.records import encode_row, write_json
from sweeps.store import begin_attempt, commit_result, open_store
from tests.analysis.synthetic import Run, record

root, name, cells, uri = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
store, entries, attempts = open_store(root), [], []
for seed in range(cells):
    cell = record(Run(width=16, tokens=5120 * {ROWS}, seed=seed))
    write_json(store.cell(cell["id"]) / "cell.json", cell, sync=False)
    attempts.append(begin_attempt(store, cell["id"], {{"study": name}}))
    entries.append({{"id": cell["id"], "labels": {{}}}})
plan = {{"format": 1, "study": {{"name": name, "question": "?"}}, "cells": entries}}
write_json(store.study(name) / "plan.json", plan, sync=False)

def grow():
    streams = [(attempt.folder / "log.jsonl").open("ab", buffering=0) for attempt in attempts]
    for step in range(1, {ROWS} + 1):
        metrics = {{"train_loss": 3 + 2 / step, "learning_rate": 0.01 / step, "gradient_norm": 1 / step}}
        metrics |= {{"tokens_per_second": 1e5 + step, "flops": 1e9 * step, "val_loss": 3 + 2.1 / step}}
        row = encode_row({{"time": 1.7e9 + step, "tokens": 5120 * step, "metrics": metrics}})
        for stream in streams:
            stream.write(row)
        time.sleep({GROW_SECONDS / ROWS})
    end = {{"state": "finished", "reason": None, "val_loss_final": 3.0, "val_bpb_final": 4.0}}
    for attempt in attempts:
        commit_result(attempt, end | {{"seconds": {{"total": 1.0}}, "tokens_per_second": 1e5}})

if not (writer := os.fork()):
    sys.stdin.readline()
    grow()
    os._exit(0)
from cluster.mirror import Mirror

mirror = Mirror(store, name, uri)
mirror.connect()
print("ready", flush=True)
began = time.monotonic()
mirror.start()
_, status = os.waitpid(writer, 0)
assert status == 0
mirror.stop()
complete = mirror.fault is None and mirror.is_complete()
print(json.dumps({{"began": began, "ended": time.monotonic(), "fault": mirror.fault, "complete": complete}}))
"""

TRAFFIC = f"""
import json, os, subprocess, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from sharedmlflow import PASSWORD, USER, mlflow_on, postgres, why_not

if (reason := why_not()) is not None:
    print(json.dumps({{"skipped": reason}}))
    sys.exit()
folder, ship = Path(sys.argv[1]), sys.argv[2]
folder.mkdir()
account = {{"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}}
rates = {{}}
with postgres(durable=True) as database, mlflow_on(database, folder, workers=min(4, os.cpu_count() or 1)) as server:
    for mirrors in (1, 4):
        names = [f"of-{{mirrors}}-{{number}}" for number in range(mirrors)]
        cells = {CELLS} // mirrors
        commands = [[sys.executable, "-c", ship, str(folder / name), name, str(cells), server.uri] for name in names]
        pipes = {{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": os.environ | account}}
        running = [subprocess.Popen(command, **pipes) for command in commands]
        for process in running:
            assert process.stdout.readline() == "ready\\n"
        for process in running:  # all have reached the server: now the cells begin to train
            process.stdin.write("go\\n")
            process.stdin.flush()
        told = [json.loads(process.communicate()[0]) for process in running]
        assert all(one["complete"] for one in told), told
        for name in names:
            query = "select count(*), count(distinct r.run_uuid) from metrics m join runs r on r.run_uuid = m.run_uuid "
            query += "join experiments e on e.experiment_id = r.experiment_id where e.name = %s"
            found = database.rows(query, (name,))
            assert found == [(cells * {ROWS * KEYS}, cells)], (name, found)
        seconds = max(one["ended"] for one in told) - min(one["began"] for one in told)
        rates[mirrors] = cells * mirrors * {ROWS * KEYS} / seconds
print(json.dumps(rates))
"""


def shared(place: Place) -> list[Row]:
    ended = timed([sys.executable, "-c", TRAFFIC, str(place.folder / "postgres"), SHIP])
    found: dict[str, float] = json.loads(ended.output.splitlines()[-1])
    if "skipped" in found:
        print(f"postgres is not measured: {found['skipped']}", file=sys.stderr)
        return []
    return [
        Row(
            what=f"{CELLS} cells at once into MLflow on Postgres",
            measured=found[mirrors],
            unit="points/s",
            target=5000.0,
            at_least=True,
            note=f"{CELLS * ROWS * KEYS:,} points by {how}; each counted in Postgres",
        )
        for mirrors, how in (("1", "one mirror"), ("4", "four mirrors at once"))
    ]
