"""How long training waits: for its log, while MLflow is up, slow or gone; and for its checkpoints.

Escala's own trainer runs inside a user's, which times what it asks of `io`. What a checkpoint costs is the wait for the
copy, and what the steps beside its writing lose to it.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measuring import ROOT, Place, Row, escala

sys.path.insert(0, str(ROOT))
from tests.faultproxy import FaultProxy, start_server

SEEDS, STEPS = 3, 400
LATE_SECONDS = 1.0
"""How late a slow server answers."""
INTERVAL_SECONDS = 5.0
"""Between checkpoints; the default is five minutes."""
TRAINER = """
import statistics, threading, time
from dataclasses import replace
from sweeps.training import train as own

class Timed:
    def __init__(self, io):
        self.io, self.logged, self.left, self.last = io, 0.0, None, 0.0
        self.waits, self.free, self.beside = [], [], []

    def __getattr__(self, name):
        return getattr(self.io, name)

    def log(self, *row):
        began = time.perf_counter()
        self.io.log(*row)
        self.logged += time.perf_counter() - began

    def checkpoint(self, tokens, snapshot, *, last=False):
        came, taken = time.perf_counter(), []
        writes = any(thread.name == "escala-checkpoint" for thread in threading.enumerate())
        if self.left:
            (self.beside if writes else self.free).append(came - self.left)
        self.io.checkpoint(tokens, lambda: taken.append(1) or snapshot(), last=last)
        self.left = time.perf_counter()
        if last:
            self.last = self.left - came
        elif taken:
            self.waits.append(self.left - came)

def train(cell, io):
    timed = Timed(io)
    outcome = own(cell, timed)
    lost = statistics.median(timed.beside) - statistics.median(timed.free) if timed.beside else 0.0
    told = {"log": timed.logged, "waited": sum(timed.waits), "slowed": max(0.0, lost) * len(timed.beside)}
    told |= {"last": timed.last, "checkpoints": len(timed.waits)}
    return replace(outcome, seconds={**outcome.seconds, **told})
"""
STUDY = """
corpus: {{source: markov, options: {{vocab_size: 64, tokens: 1000000}}, repeat: true}}
families: [llama]
context: 128
trainer: timed.py:train
grid: {{type: points, points: [{{size: {size}, tokens: {tokens}}}]}}
training: {{batch_tokens: 1024, learning_rate: 0.003}}
seeds: {seeds}
"""
SMALL = STUDY.format(size=10_000, tokens=STEPS * 1024, seeds=list(range(SEEDS)))
LARGE = STUDY.format(size=1_000_000, tokens=250 * 1024, seeds=[0])


def logging(place: Place) -> list[Row]:
    (place.folder / "timed.py").write_text(TRAINER)
    study = place.study("logging", SMALL)
    with tempfile.TemporaryDirectory(prefix="escala-bench-") as folder:
        server, process = start_server(Path(folder))
        try:
            found = {name: _train(place, study, server.port, name) for name in ("up", "slow", "gone")}
        finally:
            process.terminate()
            process.wait()
    rows = []
    for name, (share, seconds) in found.items():
        note = f"{STEPS} steps, median of {SEEDS}; training {seconds / found['up'][1]:.2f} x that with MLflow up"
        rows.append(Row(what=f"io.log, MLflow {name}", measured=100 * share, unit="%", target=0.5, note=note))
    return rows


def _train(place: Place, study: Path, port: int, name: str) -> tuple[float, float]:
    """io.log's share of the training time, and that time in seconds: medians over the cells."""
    proxy = FaultProxy(port)
    proxy.choose = {"up": lambda *_: "pass", "slow": _slow, "gone": _gone(proxy)}[name]
    cells = _run(study, place.folder / f"logging-{name}", "--tracking-uri", proxy.uri)
    proxy.down()
    if name == "gone" and all(fate == "pass" for _, fate in proxy.log):
        raise RuntimeError("MLflow was to go away and did not")
    shares, seconds = [one["log"] / one["train"] for one in cells], [one["train"] for one in cells]
    return statistics.median(shares), statistics.median(seconds)


def _run(study: Path, store: Path, *options: object) -> list[dict[str, float]]:
    """The seconds that each cell's result tells."""
    escala("run", study, "--store", store, "--allow-code", "--workers", 1, *options)
    return [json.loads(path.read_bytes())["seconds"] for path in (store / "cells").glob("*/result.json")]


def _slow(path: str, number: int) -> str:
    time.sleep(LATE_SECONDS)
    return "pass"


def _gone(proxy: FaultProxy) -> Callable[[str, int], str]:
    """Nothing gets through any more once a cell has its first rows."""
    return lambda *_: "drop" if any(path == "runs/log-batch" for path, _ in proxy.log) else "pass"


def checkpoints(place: Place) -> list[Row]:
    (place.folder / "timed.py").write_text(TRAINER)
    study, store = place.study("checkpoints", LARGE), place.folder / "checkpoints"
    (told,) = _run(study, store, "--checkpoint-seconds", INTERVAL_SECONDS)
    count = told["checkpoints"]
    if not count:
        raise RuntimeError(f"no checkpoint in {told['train']:.0f} s of training")
    each = (told["waited"] + told["slowed"]) / count
    copy, last = told["waited"] / count, told["last"]
    note = f"each {each:.3f} s, {copy:.3f} of it for the copy; the last, waited for, {last:.2f} s"
    return [
        Row(
            what=f"checkpoint every {INTERVAL_SECONDS:g} s, 1 M parameters",
            measured=100 * each / INTERVAL_SECONDS,
            unit="%",
            target=5.0,
            note=f"of the interval, {count:.0f} checkpoints: {note}",
        )
    ]
