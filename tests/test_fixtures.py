"""Stores that a released format wrote stay readable: frozen small stores, read by every later version."""

import json
import shutil
from pathlib import Path

import pytest
from commandline import ROOT, Escala

import analysis

FROZEN = ROOT / "tests" / "fixtures"
LOSSES = {
    "3d2661cb575d535f": 2.9665143031792844,
    "8d97b147e06e74be": 2.7032691069580763,
    "e9ed045275fdd48e": 2.5619180479015293,
}


@pytest.fixture(params=sorted(path.name for path in FROZEN.glob("store-*")))
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> Escala:
    """A copy of a frozen folder: study files, text, store."""
    shutil.copytree(FROZEN / request.param, tmp_path / "copy")
    return Escala(tmp_path / "copy")


def test_a_frozen_store_gives_the_runs_and_curves_that_it_was_written_with(frozen: Escala) -> None:
    runs = analysis.load_runs("small", frozen.folder / "store").set_index("cell")
    assert runs["val_loss_final"].to_dict() == LOSSES
    assert runs["excluded"].isna().all()
    curves = analysis.load_curves("small", frozen.folder / "store")
    assert curves.groupby("cell")["val_loss_final"].last().to_dict() == LOSSES
    assert len(curves) == sum(
        len((frozen.folder / "store" / "cells" / cell / "attempts" / "0" / "log.jsonl").read_bytes().splitlines())
        for cell in LOSSES
    )
    assert set(analysis.load_documents("small", frozen.folder / "store")["cell"]) == set(LOSSES)
    trouble = analysis.load_runs("trouble", frozen.folder / "store").set_index("cell")["excluded"]
    assert trouble["bbdb467d8572267f"].startswith("diverged: training loss not finite after 768 tokens")
    assert trouble["ba6da29fc867c6c7"] == "not finished (failed: code: RuntimeError: this model cannot be built)"


def test_a_frozen_store_is_planned_and_shown_as_finished(frozen: Escala) -> None:
    plan = json.loads(frozen("plan", "small.yaml", "--store", "store", "--json").stdout)
    assert {cell["id"]: cell["state"] for cell in plan["cells"]} == dict.fromkeys(LOSSES, "finished")
    assert plan["totals"]["missing"] == 0
    status = json.loads(frozen("status", "trouble", "--store", "store", "--json").stdout)
    assert status["counts"] == {"diverged": 1, "failed": 1}
    plan = json.loads(frozen("plan", "trouble.yaml", "--store", "store", "--allow-code", "--json").stdout)
    assert sorted(cell["state"] for cell in plan["cells"]) == ["diverged", "failed"]


def test_a_frozen_store_is_fitted_and_explained(frozen: Escala) -> None:
    fit = json.loads(frozen("fit", "small", "--store", "store", "--json", ok=1).stdout)
    assert (fit["planned"], fit["n_runs"], fit["refused"]) == (3, 3, True)
    assert [one["code"] for one in fit["verdicts"] if one["scope"] == "budget"] == ["edge_minimum"]
    one, two, _ = sorted(LOSSES)
    named = frozen("why", one, two, "--store", "store").stdout
    assert "shape.width:" in named
    assert "tokens: 2688 -> 3840" in named
    assert "this model cannot be built" in frozen("logs", "ba6da29fc867c6c7", "--store", "store").stdout


@pytest.mark.slow
def test_a_frozen_store_trains_nothing_again(frozen: Escala) -> None:
    before = {path: path.read_bytes() for path in (frozen.folder / "store" / "cells").rglob("*") if path.is_file()}
    run = frozen("run", "small.yaml", "--store", "store", "--workers", 1)
    assert "all 3 cells have ended already" in run.stdout
    assert {path: path.read_bytes() for path in before} == before
