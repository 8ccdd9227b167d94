"""What `escala status` tells of a study and of the studies of a store, whether a driver lives or not."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commandline import ROOT, Escala, FrontDoor, ids, refused

from cluster import claims, display, watching
from cluster.claims import Claim, read_eta
from sweeps.records import append_rows, write_json
from sweeps.store import Store, begin_attempt, open_store, quarantine_cell
from tests.analysis.synthetic import Run, write_study

SECONDS = 180.0
"""In which a command line has started and ended, on a busy machine too."""


def test_status_shows_how_far_a_running_cell_is_and_how_its_attempts_ended(place: tuple[Escala, Store]) -> None:
    escala, store = place
    cell = ids(store)[4]
    attempt = begin_attempt(store, cell, {"numerics": {}})
    with (attempt.folder / "log.jsonl").open("ab", buffering=0) as stream:
        append_rows(
            stream, [{"time": 1.7e9, "tokens": 1000, "metrics": {"train_loss": 3.5, "tokens_per_second": 2500.0}}]
        )
    shown = json.loads(escala("status", "demo", "--store", store.root, "--json").stdout)["cells"]
    running = next(one for one in shown if one["id"] == cell)
    assert running["state"] == "running"
    assert running["ends"] == {"code": 1}
    assert {key: running["progress"][key] for key in ("tokens", "loss", "tokens_per_second")} == {
        "tokens": 1000,
        "loss": 3.5,
        "tokens_per_second": 2500.0,
    }
    assert running["progress"]["horizon"] == running["D"]
    os.utime(attempt.folder / "log.jsonl", (time.time() - 86_400,) * 2)
    os.utime(attempt.folder / "attempt.json", (time.time() - 86_400,) * 2)
    write_json(attempt.folder / "heartbeat.json", {"time": time.time() - 7_500, "tokens": 2000, "progressed": 0.0})
    text = escala("status", "demo", "--store", store.root).stdout
    assert "2k/" in text
    assert re.search(r"\b2h \d\dm", text), "as long ago as its last sign, whenever a busy machine tells it"
    assert "attempts that failed: 1 code" in text


@pytest.mark.parametrize("columns", [80, 120])
def test_the_status_table_is_whole_on_narrow_terminals(place: tuple[Escala, Store], columns: int) -> None:
    _, store = place
    begin_attempt(store, ids(store)[5], {"numerics": {}})
    code = (
        "import sys\nfrom rich.console import Console\nfrom cluster import display, overview\n"
        "from cluster.watching import status_rows\nfrom sweeps.store import Store\nfrom pathlib import Path\n"
        "overview.console = Console(width=int(sys.argv[2]))\n"
        "overview.console.print(overview.study_picture(status_rows(Store(Path(sys.argv[1])), 'demo'), 'demo'))"
    )
    command = [sys.executable, "-c", code, str(store.root), str(columns)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert sum("finished" in line for line in lines) == 5, "four cells and the counts"
    assert any("failed: code: Val" in line for line in lines)
    assert ("timescale" in run.stdout) == (columns >= 120)


def test_of_many_cells_a_terminal_shows_those_that_failed_or_run_and_a_pipe_all(
    place: tuple[Escala, Store], front_door: FrontDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = place
    begin_attempt(store, ids(store)[5], {"numerics": {}})
    rows = watching.status_rows(store, "demo")
    rows = [*(300 * rows[:1]), *rows[1:]]
    monkeypatch.setattr(watching, "status_rows", lambda *_: rows)

    def listed(*options: str) -> list[str]:
        shown = front_door("status", "demo", "--store", store.root, *options).out.partition("\n\n")[0]
        return [line.split()[-1] for line in shown.splitlines()[2:]]

    assert len(listed()) == 305, "in a pipe a program looks for some of them"
    monkeypatch.setattr(display, "_SHOWN", 5)
    monkeypatch.setattr(display.console, "_force_terminal", True)
    text = front_door("status", "demo", "--store", store.root).out
    first, second = text.splitlines()[2:4]
    assert ids(store)[4][:8] in first
    assert ids(store)[5][:8] in second
    assert "300 more cells" in text
    assert "--all shows them" in text
    assert "303 finished, 1 failed, 1 running" in text, "the counts are of all"
    assert len(listed("--all")) == 305


def test_watching_ends_by_itself_when_nothing_is_left(tmp_path: Path) -> None:
    store = open_store(write_study(tmp_path / "store", [Run(width=width, budget=1.2e11) for width in (16, 24, 32)]))
    cell = ids(store)[0]
    (store.cell(cell) / "result.json").rename(tmp_path / "result.json")
    escala = Escala(tmp_path)
    watch = escala.start("status", "demo", "--watch", "--store", store.root)
    time.sleep(3)
    assert watch.poll() is None, "a cell is still to come"
    (tmp_path / "result.json").rename(store.cell(cell) / "result.json")
    text, _ = watch.communicate(timeout=SECONDS)
    assert watch.returncode == 0
    assert "3 finished" in text
    assert "--json" not in text
    assert "--watch" in refused(escala, "status", "demo", "--watch", "--json", "--store", store.root)
    assert "--watch" in refused(escala, "status", "demo", "--watch", "--all", "--store", store.root)


def test_status_without_a_study_lists_those_of_the_store_and_who_drives_them(
    place: tuple[Escala, Store], front_door: FrontDoor
) -> None:
    _, store = place
    write_study(store.root, [Run(width=64, budget=1.2e11, state="planned")], name="other")
    quarantine_cell(store, "demo", ids(store)[0], "odd", "me")
    with Claim(store, "other"):
        shown = front_door("status", "--store", store.root).out
        demo, other = json.loads(front_door("status", "--store", store.root, "--json").out)["studies"]
    assert demo == {
        "study": "demo",
        "cells": 6,
        "counts": {"quarantined": 1, "finished": 3, "failed": 1, "planned": 1},
        "paused": None,
        "driver": None,
        "eta_seconds": None,
    }
    assert (other["counts"], other["driver"]["pid"]) == ({"planned": 1}, os.getpid())
    assert [line.split()[:6] for line in shown.splitlines()[1:]] == [
        ["demo", "6", "3", "1", "0", "1"],
        ["other", "1", "0", "0", "0", "1"],
    ]
    assert f"driver {os.getpid()} on {other['driver']['host']}, ETA unknown" in shown
    assert "`escala status STUDY` lists" in front_door("logs", "ffff", "--store", store.root).err
    assert "name it" in front_door("status", "--watch", "--store", store.root).err
    open_store(store.root / "empty")
    assert "no study yet" in front_door("status", "--store", store.root / "empty").out


def test_status_says_who_drives_the_study_and_when_it_is_done(
    place: tuple[Escala, Store], front_door: FrontDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = place

    def told() -> tuple[dict[str, Any] | None, float | None, str]:
        found = json.loads(front_door("status", "demo", "--store", store.root, "--json").out)
        return found["driver"], found["eta_seconds"], front_door("status", "demo", "--store", store.root).out

    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    with Claim(store, "demo") as claim:
        driver, eta, text = told()
        assert driver is not None
        assert (driver["pid"], eta) == (os.getpid(), None)
        assert f"driver {os.getpid()} on {driver['host']}, ETA unknown" in text
        claim.expect(7_000.0)
        wait_until(lambda: read_eta(store, "demo") is not None)
        _, eta, text = told()
        assert eta is not None
        assert 6_000 < eta <= 7_000
        assert ", ETA 1h 5" in text
        claim.expect(None)  # of a pause nobody knows how long it takes
        wait_until(lambda: read_eta(store, "demo") is None)
        claim.expect(7_000.0)
        wait_until(lambda: read_eta(store, "demo") is not None)
    assert told()[:2] == (None, None)
    assert "no driver runs" in told()[2]
    assert not (store.study("demo") / "eta.json").exists()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
