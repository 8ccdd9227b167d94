"""The sbatch script on a real Slurm of one node: a study ends over a time limit as it would have without one."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commandline import ROOT, TINY, Escala
from slurmbox import SlurmBox, start_slurm, why_not

from cluster.ledger import register
from cluster.planning import read_study
from sweeps.attempt import run_attempt
from sweeps.records import read_json
from sweeps.store import Store, attempt_epochs, open_store, read_end, read_metrics

SCRIPT = ROOT / "cluster" / "deploy" / "slurm" / "escala.sbatch"
WAIT_SECONDS = 900.0

# Escala's own trainer; where HOLD is set, each cell's first attempt waits half-way until it is asked to stop.
TRAINER = """
import os, time
from sweeps.training import train as real

class Held:
    def __init__(self, cell, io):
        self.half, self.io, self.first = cell.steps // 2 * cell.batch_tokens, io, False

    def __getattr__(self, name):
        return getattr(self.io, name)

    def restore(self):
        found = self.io.restore()
        self.first = found is None
        return found

    def checkpoint(self, tokens, snapshot, **options):
        while self.first and tokens == self.half and not self.io.should_stop():
            time.sleep(0.05)
        self.io.checkpoint(tokens, snapshot, **options)

def train(cell, io):
    return real(cell, Held(cell, io) if os.environ.get("HOLD") else io)
"""
STUDY = yaml.safe_load(TINY) | {
    "trainer": "held.py:train",
    "grid": {"type": "ladder", "sizes": [10000], "tokens_per_parameter": [1]},
    "seeds": [0, 1],
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmBox]:
    """A Slurm whose jobs find this code as `escala`, and the interpreter's own `ray`."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "bin").mkdir()
    program = folder / "bin" / "escala"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "escala.py"} "$@"\n')
    program.chmod(0o755)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    box, process = start_slurm(folder, {**os.environ, "PATH": path, "HOLD": "1"})
    yield box
    process.kill()
    process.wait(60)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the study and its trainer."""
    (tmp_path / "held.py").write_text(TRAINER)
    Escala(tmp_path).study(yaml.safe_dump(STUDY))
    return tmp_path


def rows(store: Store, cell_id: str) -> list[tuple[int, dict[str, float]]]:
    """What a cell logged, but for what the clock says."""
    clock = ("_seconds", "_per_second", "mfu")
    return [
        (row["tokens"], {key: value for key, value in row["metrics"].items() if not key.endswith(clock)})
        for row in read_metrics(store, cell_id)
    ]


def undisturbed(place: Path) -> Store:
    """The same study trained in this process, without Ray."""
    store, plan, path = read_study(str(place / "study.yaml"), place / "reference", True, False)
    register(store, plan, path.read_bytes())
    for one in plan.cells:
        ended = run_attempt(store, one.cell.id, study=plan.study.name, base_dir=place)
        assert ended.state == "finished", ended
    return store


def state_of(slurm: SlurmBox, job: str) -> dict[str, str]:
    shown = slurm("scontrol", "show", "job", job).stdout
    return dict(part.split("=", 1) for part in shown.split() if "=" in part)


def run_to_its_end(slurm: SlurmBox, place: Path, job: str, cells: list[str], *asked: str) -> dict[str, str]:
    """What Slurm says of a job after its end, during which it was asked so, once all cells had begun."""
    deadline, told = time.monotonic() + WAIT_SECONDS, False
    while (state := state_of(slurm, job))["JobState"] not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
        assert time.monotonic() < deadline, f"{state}\n{(place / f'escala-{job}.log').read_text()}"
        begun = [place / "store" / "cells" / cell / "attempts" / "0" / "log.jsonl" for cell in cells]
        if not told and all(path.exists() and path.stat().st_size for path in begun):
            slurm(*asked, job)
            told = True
        time.sleep(0.2)
    return state


@pytest.mark.slow
def test_a_job_that_meets_its_time_limit_is_requeued_and_ends_with_the_same_losses(
    slurm: SlurmBox, place: Path
) -> None:
    job = slurm("sbatch", "--parsable", SCRIPT, "study.yaml", "store", "--allow-code", cwd=place).stdout.strip()
    expected = undisturbed(place)
    cells = sorted(path.name for path in (place / "reference" / "cells").iterdir())
    assert len(cells) == 2
    # As Slurm does before the limit, by --signal=B:USR1.
    state = run_to_its_end(slurm, place, job, cells, "scancel", "--signal=USR1", "--batch")
    said = (place / f"escala-{job}.log").read_text()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    assert said.count("cells keep a checkpoint, and the job is requeued") == 1
    assert "asked to end" not in said
    store = open_store(place / "store", create=False)
    for cell in cells:
        assert attempt_epochs(store, cell) == [0, 1]
        end = read_end(store, cell, 0)
        assert end is not None
        assert end[0] == "stopped", "asked, with a checkpoint, not killed"
        assert rows(store, cell) == rows(expected, cell)
        results = [read_json(one.cell(cell) / "result.json") for one in (store, expected)]
        assert results[0]["val_loss_final"] == results[1]["val_loss_final"]
    nothing_is_left(slurm, job)


@pytest.mark.slow
def test_a_job_that_is_cancelled_stops_its_study_and_is_not_requeued(slurm: SlurmBox, place: Path) -> None:
    job = slurm("sbatch", "--parsable", SCRIPT, "study.yaml", "store", "--allow-code", cwd=place).stdout.strip()
    _, plan, _ = read_study(str(place / "study.yaml"), place / "planned", True, False)
    cells = sorted(one.cell.id for one in plan.cells)
    run_to_its_end(slurm, place, job, cells, "scancel")
    deadline = time.monotonic() + 180
    while slurm("squeue", "--noheader", f"--jobs={job}", ok=False).stdout.strip():  # cancelled at once, ended later
        assert time.monotonic() < deadline
        time.sleep(0.2)
    said = (place / f"escala-{job}.log").read_text()
    state = state_of(slurm, job)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0"), said
    assert "asked to end: cells keep a checkpoint" in said
    assert "time limit" not in said
    assert "error: Ray did not start" not in said
    store = open_store(place / "store", create=False)
    assert [end and end[0] for end in (read_end(store, cell, 0) for cell in cells)] == ["stopped", "stopped"]
    nothing_is_left(slurm, job)


def nothing_is_left(slurm: SlurmBox, job: str) -> None:
    assert not Path(f"/tmp/escala-{job}").exists(), "what Ray left is removed"
    assert slurm("pgrep", "-f", "raylet|gcs_server", ok=False).stdout == "", "nothing of Ray is left"


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (
            ("--time=7", SCRIPT, "study.yaml", "store"),
            {},
            "the time limit of 7:00 is shorter than a checkpoint interval",
        ),
        (("--time=1-0", SCRIPT, "study.yaml", "store"), {"ESCALA_CHECKPOINT_SECONDS": "90000"}, "of 1-00:00:00 is"),
        ((SCRIPT, "study.yaml"), {}, "a study and a store are needed"),
    ],
)
def test_bad_input_is_refused_with_a_sentence_and_code_2_and_is_not_requeued(
    slurm: SlurmBox,
    place: Path,
    arguments: tuple[object, ...],
    environment: dict[str, str],
    sentence: str,
) -> None:
    ended = slurm("sbatch", "--wait", "--parsable", *arguments, cwd=place, ok=False, **environment)
    job = ended.stdout.strip()
    said = (place / f"escala-{job}.log").read_text()
    assert ended.returncode == 2, said
    assert sentence in said
    assert state_of(slurm, job)["Restarts"] == "0"
    assert not (place / "store").exists()
