"""Schedules of faults: what is done to which process and when, drawn from a seed, and the doing of it.

A fault comes when the study has logged so many rows, not at a time: slow machines are hit at the same places as fast
ones. Only processes that inherited the schedule's mark in their environment are ever touched.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from sweeps.records import read_json
from sweeps.store import Store, attempt_epochs, read_end

MARK = "ESCALA_CHAOS"
"""The environment variable whose value every process of a schedule inherits."""
FAULTS = {
    "driver killed": "SIGKILL of the driver at work",
    "driver killed at start": "SIGKILL of the driver while it plans, starts Ray or registers",
    "driver frozen": "SIGSTOP of the driver past its lease, a second one takes over, then SIGCONT",
    "driver terminated": "SIGTERM of the driver",
    "worker killed": "SIGKILL of a worker in a cell",
    "worker frozen": "SIGSTOP of a worker in a cell, never continued",
    "worker terminated": "SIGTERM of a worker in a cell, as before a preemption",
    "raylet killed": "SIGKILL of Ray's node process",
    "GCS killed": "SIGKILL of Ray's control store",
    "MLflow killed": "SIGKILL of the MLflow server, started again after seconds",
}
"""Name -> what is done."""
COUNT = 3
"""Faults a schedule: as many as the infrastructure budget of one cell survives, should all of them hit it."""
SERVED = 3
"""Every so many-th schedule mirrors to an MLflow server, the others to the database in the store."""


@dataclass(frozen=True)
class Fault:
    """One thing that is done to a running study."""

    name: str
    rows: int
    """It comes when the logs hold so many rows,"""
    delay: float
    """and so many seconds later."""


def is_served(seed: int) -> bool:
    return seed % SERVED == SERVED - 1


def draw(seed: int, rows: int) -> list[Fault]:
    """The faults of a seed for a study of so many rows. Seeds that follow each other begin with all kinds in turn."""
    dice = random.Random(seed)
    names = [name for name in FAULTS if is_served(seed) or name != "MLflow killed"]
    first = "MLflow killed" if is_served(seed) and dice.random() < 0.5 else names[seed % len(names)]
    chosen = [first, *dice.choices(names, k=COUNT - 1)]
    dice.shuffle(chosen)
    places = sorted(dice.randint(0, int(0.85 * rows)) for _ in chosen)
    return [Fault(name, place, round(dice.uniform(0, 1.5), 2)) for name, place in zip(chosen, places)]


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that inherited a mark, those of dead parents too."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def named(mark: str, name: str) -> list[psutil.Process]:
    """Those of them whose program has this name."""
    found = []
    for process in marked(mark):
        with suppress(psutil.Error):
            if process.name() == name:
                found.append(process)
    return found


def training(store: Store, mark: str) -> list[psutil.Process]:
    """The workers that are in a cell, by the records of their attempts; frozen ones left out."""
    ours = {process.pid: process for process in marked(mark)}
    found = []
    for folder in (store.root / "cells").glob("*"):
        epochs = attempt_epochs(store, folder.name)
        if not epochs or (folder / "result.json").exists() or read_end(store, folder.name, epochs[-1]):
            continue
        with suppress(FileNotFoundError, psutil.Error):
            process = ours.get(read_json(store.attempt(folder.name, epochs[-1]) / "attempt.json")["pid"])
            if process is not None and process.status() != psutil.STATUS_STOPPED:
                found.append(process)
    return found


def strike(fault: Fault, store: Store, mark: str, alive: Callable[[], bool], seconds: float = 20.0) -> str | None:
    """Do a fault to a process of Ray or to a worker. Says to which; None where none came up while the driver lived."""
    what, _, deed = fault.name.partition(" ")
    number = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP, "terminated": signal.SIGTERM}[deed]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and alive():
        found = {"worker": lambda: training(store, mark), "raylet": lambda: named(mark, "raylet")}.get(
            what, lambda: named(mark, "gcs_server")
        )()
        for process in found[-1:]:  # the last started: an earlier driver's may be about to go
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
                return f"{signal.Signals(number).name} to {what} {process.pid}"
        time.sleep(0.1)
    return None
