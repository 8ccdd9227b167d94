"""A search under the driver: workers train its trials, a killed driver's search goes on, rungs cost only the rest."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commandline import Escala

from analysis import load_runs
from cluster import driver, tasks
from cluster.driver import run_study
from sweeps.corpora import make_source, prepare
from sweeps.grids import plan_study
from sweeps.records import read_json
from sweeps.store import attempt_epochs, cell_state, iterate_cells, open_store, read_end, read_plan
from sweeps.study import Study
from sweeps.trials import journal_path, open_journal, with_trials

STUDY: dict[str, Any] = {
    "name": "s",
    "corpus": {"source": "markov", "options": {"vocab_size": 8, "tokens": 60_000}},
    "context": 32,
    "families": ["llama"],
    "grid": {"type": "points", "points": [{"size": 10_000, "tokens": 8_000}]},
    "training": {"batch_tokens": 64, "warmup_tokens": 640, "schedule": "wsd", "final_fraction": 0.0},
    "stack": "off",
    "search": {"space": {"learning_rate": {"log": [1e-4, 1e-1]}, "weight_decay": {"linear": [0, 0.3]}}, "trials": 6},
}
TRAINER = """
import time

def train(cell, io):
    time.sleep(0.3)
    io.log(cell.tokens, {"train_loss": 2.0})
    return 2.0 + abs(cell.optimizer.learning_rate - 0.01)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits scaled down."""
    monkeypatch.setattr(tasks, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(driver, "LOOK_SECONDS", 0.2)


@pytest.mark.slow
def test_workers_train_the_trials_and_a_promoted_one_pays_only_the_rest(ray_address: str, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    corpus = prepare(make_source("markov", None, STUDY["corpus"]["options"]), "bytes", store.root)
    declared = STUDY | {"search": STUDY["search"] | {"sampler": "qmc", "rungs": [0.25], "batch": 2}}
    plan = plan_study(Study.model_validate(declared), corpus)
    tally = run_study(store, plan, b"", watch=lambda _: None, address=ray_address, workers=2)
    assert (tally.failed, tally.stopped, tally.planned, tally.mirror_fault) == ({}, None, 0, None)
    plan = with_trials(store, plan)
    assert tally.finished == len(plan.cells)
    runs = load_runs("s", store)
    early = runs[runs["rung"] == 0.25]
    full = runs[runs["rung"] == 1.0]
    assert sorted(early["trial"]) == list(range(6))
    assert 1 <= len(full) < 6
    assert set(early["excluded"]) == {"an early rung of a search"}
    assert full["excluded"].isna().all()
    for cell_id in full["cell"]:  # what it goes on from is what the rung kept where its cooldown began
        result = cell_state(store, cell_id).result
        assert result is not None
        parent = plan.branches[cell_id].parent
        assert result["trunk"] == {"cell": parent, "tokens": 64 * plan.branches[cell_id].steps}
        per_token = next(one.counts["flops_per_token"] for one in plan.cells if one.cell.id == cell_id)
        assert result["flops_spent"] == (result["tokens"] - result["trunk"]["tokens"]) * per_token
        assert result["trunk"]["tokens"] == pytest.approx(0.8 * 0.25 * result["tokens"], abs=64)
    mirrored = load_runs("s", tmp_path / "none", tracking_uri=store.tracking_uri)
    assert mirrored.drop(columns="seconds").equals(runs.drop(columns="seconds"))


@pytest.mark.slow
def test_a_killed_search_goes_on_with_no_trial_lost_or_run_twice(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESCALA_BEAT_SECONDS", "0.25")
    escala = Escala(tmp_path)
    (tmp_path / "mine.py").write_text(TRAINER)
    search = STUDY["search"] | {"sampler": "random", "trials": 12}
    study = escala.study(json.dumps(STUDY | {"search": search, "trainer": "mine.py:train"}))
    options = ("run", study, "--store", "store", "--address", ray_address, "--workers", 2, "--allow-code")
    running = escala.start(*options)
    store = open_store(tmp_path / "store")
    while sum((path / "result.json").exists() for path in (store.root / "cells").glob("*")) < 4:
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    before = {path.parent.name: path.stat().st_mtime_ns for path in (store.root / "cells").glob("*/result.json")}
    assert len(before) < 12
    said = escala(*options).stdout
    assert "12 of 12 trials asked (12 told)" in said
    cells = read_plan(store, "s")["cells"]
    assert len({one["labels"]["trial"] for one in cells}) == len(cells) == 12
    for cell_id, stamp in before.items():
        assert (store.cell(cell_id) / "result.json").stat().st_mtime_ns == stamp, "none is run twice"
    for entry, _, state in iterate_cells(store, "s"):
        assert state.state == "finished"
        ends = [read_end(store, entry["id"], epoch) for epoch in attempt_epochs(store, entry["id"])[:-1]]
        assert len(ends) <= 1, "only those that ran at the kill were tried again"
    import optuna

    name = cells[0]["labels"]["search"]
    found = optuna.load_study(study_name=name, storage=open_journal(journal_path(store, "s")))
    whole = [one.number for one in found.trials if one.state.name == "COMPLETE"]
    assert sorted(one["labels"]["trial"] for one in cells) == whole
    half = [one for one in found.trials if one.number not in whole]  # the kill came while it was asked
    assert [(one.state.name, one.values) for one in half] in ([], [("FAIL", None)])
    values = {read_json(store.cell(one["id"]) / "result.json")["val_loss_final"] for one in cells}
    assert {one.value for one in found.trials if one.number in whole} == values
    told = json.loads(escala("status", "s", "--store", "store", "--json").stdout)["search"][0]
    assert (told["asked"], told["told"], told["to_come"]) == (12, 12, 0)
    again = escala(*options).stdout
    assert "nothing to train" in again
    assert "starting Ray" not in again
