"""A disk that is full or read-only: one sentence, nothing half-written, and the same command goes on from there."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commandline import TINY, Escala, Finished
from small import make_cell, put

from sweeps.attempt import run_attempt
from sweeps.corpora import make_source, open_corpus, prepare
from sweeps.records import read_json
from sweeps.store import Store, cell_state, open_store, read_metrics
from sweeps.usercode import trainer_identity

MIB = 1024**2
Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a small file system in memory; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if sys.platform != "linux" or shutil.which("mount") is None:
            pytest.skip("no mount of Linux here")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def make_read_only(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    """Fill a disk with one file, but for so many bytes."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            pass
    if leave:
        os.truncate(ballast, ballast.stat().st_size - leave)
    return ballast


# A state of 200 KB: a checkpoint does not fit where a record still does.
TRAINER = """
import numpy as np
def train(cell, io):
    state = io.restore() or {"step": 0, "x": 0.3, "ballast": np.zeros(200_000, dtype=np.uint8)}
    for step in range(state["step"] + 1, cell.steps + 1):
        state = {**state, "step": step, "x": 3.9 * state["x"] * (1 - state["x"])}
        io.log(step * cell.batch_tokens, {"train_loss": state["x"]})
        io.checkpoint(step * cell.batch_tokens, lambda: state, last=True)
    return state["x"]
"""


@pytest.mark.parametrize("left", [0, 4096, 12_288, 100_000, 300_000, 500_000])
def test_an_attempt_on_a_full_disk_says_so_and_goes_on_when_there_is_space(
    mount: Mount, tmp_path: Path, left: int
) -> None:
    (tmp_path / "mine.py").write_text(TRAINER)
    outcomes = []
    for full in (False, True):
        disk = mount(6 * MIB)
        store = open_store(disk / "store")
        source = make_source("markov", None, {"vocab_size": 8, "tokens": 60_000, "seed": 3})
        corpus = open_corpus(store.root, prepare(source, "bytes", store.root).fingerprint)
        cell = make_cell(corpus, 12, trainer=trainer_identity("mine.py:train", tmp_path))
        put(store, cell)
        if full:
            ballast = fill(disk, leave=left)
            try:
                ended = run_attempt(store, cell.id, study="s", base_dir=tmp_path, checkpoint_seconds=0)
                said, kind = ended.reason or "", ended.state
            except Exception as error:  # not even the error could be written
                said, kind = str(error), "infrastructure"
            assert "the disk is full: free some space, then run again" in said
            assert kind == "infrastructure"
            assert cell_state(store, cell.id).state in ("planned", "running")  # running: this process lives
            for path in store.root.rglob("*.json"):
                read_json(path)
            ballast.unlink()
        ended = run_attempt(store, cell.id, study="s", base_dir=tmp_path, checkpoint_seconds=0)
        assert ended.state == "finished"
        rows = [(row["tokens"], row["metrics"]) for row in read_metrics(store, cell.id)]
        outcomes.append((rows, read_json(store.cell(cell.id) / "result.json")["val_loss_final"]))
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0][0]) == 12


@pytest.mark.slow
def test_a_study_on_a_disk_that_fills_up_ends_with_the_sentence_and_then_converges(
    mount: Mount, escala: Escala, finished: Finished
) -> None:
    disk = mount(24 * MIB)
    study, store = escala.study(TINY), disk / "store"
    shutil.copytree(finished.store, store, ignore=shutil.ignore_patterns("cells", "studies"))  # with its database
    ballast = fill(disk, leave=60_000)
    command = ("run", study, "--store", store, "--workers", 2, "--checkpoint-seconds", 0)
    full = subprocess.run(
        [sys.executable, str(Path(__file__).resolve().parents[2] / "escala.py"), *map(str, command)],
        cwd=escala.folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = " ".join((full.stdout + full.stderr).split())
    assert full.returncode in (1, 2), said
    assert "the disk is full: free some space, then run again" in said
    assert "Traceback" not in said, full.stdout + full.stderr
    states = json.loads(escala("status", "tiny", "--store", store, "--json").stdout)["counts"]
    assert "failed" not in states, "a full disk is not the cells' fault"
    ballast.unlink()
    again = escala(*command)
    assert "7 finished" in again.stdout
    for cell in (finished.store / "cells").iterdir():
        assert losses(Store(store), cell.name) == losses(Store(finished.store), cell.name)


def losses(store: Store, cell_id: str) -> list[tuple[int, float]]:
    return [
        (row["tokens"], row["metrics"]["train_loss"])
        for row in read_metrics(store, cell_id)
        if "train_loss" in row["metrics"]
    ]


@pytest.mark.slow
def test_a_read_only_store_is_refused_by_what_writes_and_read_by_what_reads(
    mount: Mount, escala: Escala, finished: Finished
) -> None:
    disk = mount(64 * MIB)
    store = disk / "store"
    shutil.copytree(finished.store, store)
    make_read_only(disk)
    more = escala.study(TINY.replace("[4e8, 8e8]", "[2e8, 4e8, 8e8]"))
    refused = escala("run", more, "--store", store, ok=2)
    assert "is not writable. Change its permissions, or name another with --store" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
    status = json.loads(escala("status", "tiny", "--store", store, "--json").stdout)
    assert status["counts"] == {"finished": 7}
    plan = json.loads(escala("plan", finished.study, "--store", store, "--json").stdout)
    assert plan["totals"]["missing"] == 0
    fit = escala("fit", "tiny", "--store", store, "--json", "--law", "chinchilla")
    assert json.loads(fit.stdout)["params"]
    refused = escala("report", "tiny", "--store", store, ok=2)
    assert "is not writable. Name a file for the report: --out report.html." in " ".join(refused.stderr.split())
    assert escala("report", "tiny", "--store", store, "--out", "r.html").stdout == "report: r.html\n"
