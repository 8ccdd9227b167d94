"""What a cell costs when it trains nothing: the full path of `escala run`, beside Ray Tune with its MLflow callback.

The cells' trainer logs one row and returns, so that all that is left is plan, lease, worker, log, result, mirror and
MLflow's rows. Startup is counted: whole process over number of cells. Tune runs an empty function that reports one row,
without the start of Ray, on fewer trials.
"""

import json
import statistics
import sys
import time
from contextlib import suppress

import psutil
from measuring import Place, Row, escala, timed

CELLS, TRIALS, WORKERS = 1000, 30, 2
TRAINER = """
def train(cell, io):
    io.log(cell.tokens, {"train_loss": 1.0})
    return 1.0
"""
NOOP = f"""
corpus: pystdlib
families: [llama]
context: 128
trainer: noop.py:train
grid: {{type: ladder, sizes: [10000], tokens_per_parameter: [5]}}
training: {{batch_tokens: 1024, learning_rate: 0.01}}
seeds: {list(range(CELLS))}
"""
TUNE = f"""
import json, sys, time
try:
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
except ImportError as error:
    print(json.dumps({{"missing": str(error)}}))
    raise SystemExit

def empty(config):
    tune.report({{"loss": 1.0}})

folder = sys.argv[1]
ray.init(address="local", num_cpus={WORKERS}, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
callback = MLflowLoggerCallback(tracking_uri=f"sqlite:///{{folder}}/mlflow.db", experiment_name="empty")
tuner = tune.Tuner(
    tune.with_resources(empty, {{"cpu": 1}}),
    param_space={{"seed": tune.grid_search(list(range({TRIALS})))}},
    run_config=tune.RunConfig(storage_path=f"{{folder}}/results", callbacks=[callback], verbose=0),
)
began = time.perf_counter()
results = tuner.fit()
seconds = time.perf_counter() - began
assert len(results) == {TRIALS} and not results.errors, results.errors
print(json.dumps({{"seconds": seconds / {TRIALS}}}))
"""


def overhead(place: Place) -> list[Row]:
    (place.folder / "noop.py").write_text(TRAINER)
    study, store = place.study("noop", NOOP), place.folder / "overhead"
    options = ("--store", store, "--allow-code")
    escala("plan", study, *options)  # tokenises the corpus
    sizes: list[tuple[float, int]] = []

    def look(process: int) -> None:
        with suppress(psutil.Error):
            sizes.append((time.time(), psutil.Process(process).memory_info().rss))

    began = time.time()
    ended = escala("run", study, *options, "--workers", WORKERS, watch=look)
    results = sorted(path.stat().st_mtime for path in (store / "cells").glob("*/result.json"))
    if len(results) != CELLS or f"{CELLS} finished" not in ended.output:
        raise RuntimeError(f"{CELLS} cells were to finish, {len(results)} did:\n{ended.output[-500:]}")
    working = [size for at, size in sizes if at >= results[0]]
    third = len(working) // 3
    growth = statistics.median(working[-third:]) - statistics.median(working[:third])
    seconds = ended.seconds / CELLS
    name, note = f"no-op cell, of {CELLS:,}", f"whole process, {WORKERS} workers"
    return [
        Row(what=name, measured=1e3 * (results[-1] - began) / CELLS, unit="ms", target=50.0, note="to the last result"),
        Row(what=f"{name}, mirror drained", measured=1e3 * seconds, unit="ms", target=100.0, note=note),
        Row(what="driver, memory", measured=max(size for _, size in sizes) / 1e6, unit="MB", target=500.0, note="peak"),
        Row(what="driver, memory, growth", measured=growth / 1e6, unit="MB", target=20.0, note="last third over first"),
        *_tune(place, seconds),
    ]


def _tune(place: Place, ours: float) -> list[Row]:
    folder = place.folder / "tune"
    folder.mkdir()
    found = json.loads(timed([sys.executable, "-c", TUNE, str(folder)]).output.splitlines()[-1])
    if "missing" in found:
        print(f"Ray Tune is left out: {found['missing']}", file=sys.stderr)
        return []
    ratio, note = found["seconds"] / ours, f"{found['seconds']:.2f} s a trial of {TRIALS}, MLflow callback, empty"
    return [Row(what="Ray Tune over a drained cell", measured=ratio, unit="x", target=20.0, at_least=True, note=note)]
