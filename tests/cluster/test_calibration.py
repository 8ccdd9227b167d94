"""A calibrated plan: shapes timed by real workers, kept by kind, and every number with its grounds."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commandline import TINY, Escala, Finished

from cluster import calibration
from cluster.calibration import Calibration, find_calibration, read_calibrations
from cluster.estimate import cells_seconds, estimate
from cluster.hardware import local_kind
from sweeps.corpora import make_source, prepare
from sweeps.errors import InputError
from sweeps.grids import Plan, plan_study
from sweeps.lineage import plan_branches
from sweeps.records import read_json, write_json
from sweeps.store import Store, open_store, read_plan
from sweeps.studyfile import load_study

LADDER = """
name: ladder
corpus: {source: markov, options: {vocab_size: 16, tokens: 200000, seed: 1}}
context: 32
families: [llama]
grid: {type: ladder, sizes: [10000, 20000], tokens_per_parameter: [2, 4, 8]}
training: {batch_tokens: 256, learning_rate: 0.01, schedule: wsd, warmup_tokens: 512}
"""


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny study's shapes, timed once a session on two workers."""
    escala = Escala(tmp_path_factory.mktemp("calibrated"))
    study = escala.study(TINY, "tiny.yaml")
    run = escala("calibrate", study, "--store", "store", "--workers", 2, "--json")
    return Finished(escala, study, escala.folder / "store", run.stdout)


def plan_of(text: str, store: Store) -> Plan:
    path = store.root / "study.yaml"
    path.write_text(text)
    study = load_study(path)
    source = make_source(study.corpus.source, None, dict(study.corpus.options))
    return plan_study(study, prepare(source, study.tokenizer, store.root))


def planned(finished: Finished, *options: object) -> dict[str, Any]:
    run = finished.escala("plan", finished.study, "--store", finished.store, "--json", *options)
    parsed: dict[str, Any] = json.loads(run.stdout)
    return parsed


@pytest.mark.slow
def test_calibrate_keeps_what_was_timed_under_the_kind_of_worker(calibrated: Finished) -> None:
    rows = json.loads(calibrated.output)[local_kind()]
    assert len(rows) == 3, "three sizes at one batch, whatever their budgets and seeds"
    kept = read_json(calibrated.store / "hardware" / f"{local_kind()}.json")
    assert kept["workers"] == 2
    assert {"torch", "transformers", "python", "numpy"} <= set(kept["versions"])
    assert all(point["step_seconds"] > 0 for point in kept["points"])
    found = find_calibration(Store(calibrated.store))
    assert found is not None
    assert set(found.costs) == {"llama float32"}
    assert not (calibrated.store / "cells").exists(), "nothing was trained"


@pytest.mark.slow
def test_a_plan_tells_seconds_of_every_cell_and_of_the_queue(calibrated: Finished) -> None:
    plan = planned(calibrated, "--workers", 2)
    seconds = [cell["seconds_predicted"] for cell in plan["cells"]]
    assert min(seconds) > 0
    told = plan["estimate"]
    assert told["worker_seconds"] == pytest.approx(sum(seconds))
    assert sum(seconds) / 2 <= told["makespan_seconds"] < sum(seconds)
    assert (told["energy_kwh"], told["dollars"]) == (None, None), "no processor is in the device table"
    assert any("not in the table" in note for note in told["notes"])
    alone = planned(calibrated, "--workers", 1)["estimate"]
    assert alone["makespan_seconds"] == pytest.approx(sum(seconds))
    table = calibrated.escala("plan", calibrated.study, "--store", calibrated.store).stdout
    assert " time " in table
    assert "worker-hours" in table


def test_without_a_calibration_one_line_says_how_to_get_one_where_something_is_to_do(
    finished: Finished, tmp_path: Path
) -> None:
    assert planned(finished)["estimate"] is None
    assert "seconds_predicted" not in planned(finished)["cells"][0]
    larger = tmp_path / "tiny.yaml"
    larger.write_text(finished.study.read_text().replace("seeds: 2", "seeds: 3"))
    for study, asked in ((finished.study, False), (larger, True)):
        told = finished.escala("plan", study, "--store", finished.store).stdout
        assert ("escala calibrate" in told) == asked


def test_workers_that_wait_for_room_are_said_to() -> None:
    said: list[str] = []
    room = [False, True, False, True, True]
    ray = SimpleNamespace(
        wait=lambda handles, timeout: (handles if room.pop(0) else [], handles),
        get=lambda _: {"kind": "k"},
    )
    watch = SimpleNamespace(time=SimpleNamespace(remote=lambda *_: object()))
    cell: Any = SimpleNamespace(identity={})
    found = calibration._time_all(ray, [watch], "store", [cell], None, lambda words, _: said.append(words))
    assert said[0] == "no word of the workers yet: starts are slow, or others hold the room"
    assert len(found["k"]) == calibration.ROUNDS
    assert not [words for words in said[1:] if "no word" in words]


@pytest.mark.slow
def test_a_hardware_that_was_not_calibrated_is_refused(calibrated: Finished) -> None:
    run = calibrated.escala("plan", calibrated.study, "--store", calibrated.store, "--hardware", "h100", ok=2)
    assert run.stderr.startswith("error: --hardware: no calibration 'h100'")
    assert local_kind() in run.stderr


@pytest.mark.slow
def test_another_kinds_calibration_gives_energy_and_money(calibrated: Finished, tmp_path: Path) -> None:
    shutil.copytree(calibrated.store, tmp_path / "store")
    record = read_json(tmp_path / "store" / "hardware" / f"{local_kind()}.json")
    record |= {"kind": "nvidia-h200", "device": "NVIDIA H200"}
    write_json(tmp_path / "store" / "hardware" / "nvidia-h200.json", record)
    copy = replace(calibrated, store=tmp_path / "store")
    told = planned(copy, "--hardware", "nvidia-h200", "--workers", 2)["estimate"]
    hours = told["worker_seconds"] / 3600
    assert told["energy_kwh"] == pytest.approx(0.7 * hours)
    assert told["dollars"] == pytest.approx(7.91 * hours)
    assert planned(copy)["estimate"]["kind"] == local_kind(), "this machine's own kind goes first"


@pytest.mark.slow
def test_a_run_records_the_predicted_seconds_and_the_frame_has_them(calibrated: Finished, tmp_path: Path) -> None:
    import analysis

    shutil.copytree(calibrated.store, tmp_path / "store")
    copy = Finished(Escala(tmp_path), calibrated.study, tmp_path / "store", "")
    copy.escala("run", copy.study, "--store", copy.store, "--workers", 2)
    entries = {entry["id"]: entry for entry in read_plan(Store(copy.store), "tiny")["cells"]}
    foretold = {cell["id"]: cell["seconds_predicted"] for cell in planned(copy)["cells"]}
    for cell_id, entry in entries.items():
        assert entry["seconds_predicted"] == pytest.approx(foretold[cell_id], abs=1e-3)
    runs = analysis.load_runs("tiny", copy.store).set_index("cell")
    assert runs["seconds_predicted"].to_dict() == pytest.approx(foretold, abs=1e-3)
    page = analysis.write_report("tiny", copy.store).read_text()
    assert "Planned and real time" in page
    away = {"store": tmp_path / "nowhere", "tracking_uri": Store(copy.store).tracking_uri}
    mirrored = analysis.load_runs("tiny", **away).set_index("cell")
    assert mirrored["seconds_predicted"].to_dict() == runs["seconds_predicted"].to_dict()


@pytest.mark.slow
def test_a_second_calibration_keeps_what_the_first_has_timed(calibrated: Finished, tmp_path: Path) -> None:
    shutil.copytree(calibrated.store, tmp_path / "store")
    escala = Escala(tmp_path)
    before = read_calibrations(Store(tmp_path / "store"))[local_kind()]
    study = escala.study(TINY.replace("name: tiny", "name: gpts").replace("[llama]", "[gpt2]"), "gpts.yaml")
    told = escala("plan", study, "--store", "store").stdout
    assert "no gpt2 float32 cell was timed" in told
    assert "- kWh" in told
    escala("calibrate", study, "--store", "store", "--workers", 1)
    after = read_calibrations(Store(tmp_path / "store"))[local_kind()]
    assert set(after.costs) == {"llama float32", "gpt2 float32"}
    assert set(before.points) < set(after.points)
    assert "no gpt2 float32" not in escala("plan", study, "--store", "store").stdout


# --- estimates, without Ray ---------------------------------------------------------------------------------------


@pytest.fixture
def known(calibrated: Finished) -> Calibration:
    return read_calibrations(Store(calibrated.store))[local_kind()]


def test_a_branch_costs_its_own_segment_and_waits_until_its_trunk_has_come_so_far(
    known: Calibration, tmp_path: Path
) -> None:
    plan = plan_of(LADDER, open_store(tmp_path / "store"))
    branches = plan_branches(one.cell for one in plan.cells)
    assert len(branches) == 4, "two sizes, three lengths each"
    seconds, _ = cells_seconds(plan, known)
    apart = {
        one.cell.id: next(iter(cells_seconds(replace(plan, cells=(one,), branches={}), known)[0].values()))
        for one in plan.cells
    }
    for cell_id, value in seconds.items():
        assert value is not None
        assert (value < apart[cell_id]) if cell_id in branches else (value == apart[cell_id])  # type: ignore[operator]
    everything = {one.cell.id for one in plan.cells}
    many = estimate(plan, known, everything, workers=6)
    trunks = [seconds[branch.parent] for branch in branches.values()]
    longest = max(value for value in trunks if value is not None)
    assert many.makespan_seconds is not None
    assert longest <= many.makespan_seconds < 1.5 * longest, "on many workers only what is shared is waited for"
    left = {cell_id for cell_id in everything if cell_id in branches}
    rest = estimate(plan, known, left, workers=6)
    assert rest.makespan_seconds == pytest.approx(max(seconds[i] for i in left)), "a trunk that has ended holds nobody"  # type: ignore[type-var]


def test_what_was_not_timed_has_no_seconds_and_no_total(known: Calibration, tmp_path: Path) -> None:
    plan = plan_of(TINY.replace("[llama]", "[llama, qwen3]"), open_store(tmp_path / "store"))
    told = estimate(plan, known, {one.cell.id for one in plan.cells}, workers=2)
    families = {one.cell.id: one.cell.family for one in plan.cells}
    assert {families[i] for i, value in told.seconds.items() if value is None} == {"qwen3"}
    assert (told.worker_seconds, told.makespan_seconds, told.dollars.value) == (None, None, None)
    assert any("no qwen3 float32 cell was timed" in note for note in told.notes)
    finished = estimate(plan, known, {i for i, family in families.items() if family == "llama"}, workers=2)
    assert finished.makespan_seconds is not None, "what is done already needs no prediction"


def test_cells_that_may_train_as_stacks_are_told_to_take_less_time(known: Calibration, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    for text, said in (("", []), ("vary: {learning_rate: [0.01, 0.02, 0.03, 0.04]}", ["24 of the cells"])):
        for stack, expected in (("auto", said), ("off", [])):
            plan = plan_of(f"{LADDER}{text}\nstack: {stack}\n", store)
            told = estimate(plan, known, {one.cell.id for one in plan.cells}, workers=2)
            assert [note[:15] for note in told.notes if "may train as stacks" in note] == expected


def test_far_beyond_what_was_timed_a_plan_says_that_it_extrapolates(known: Calibration, tmp_path: Path) -> None:
    text = TINY.replace("budgets: [4e8, 8e8]", "budgets: [4e9]").replace("N: 14142", "N: 250000")
    plan = plan_of(text.replace("tokens: 200000", "tokens: 2000000"), open_store(tmp_path / "store"))
    told = estimate(plan, known, {one.cell.id for one in plan.cells})
    assert any("extrapolated" in note for note in told.notes)


def test_a_calibration_beside_other_work_says_so(known: Calibration, tmp_path: Path) -> None:
    plan = plan_of(TINY, open_store(tmp_path / "store"))
    for share, said in ((0.5, True), (0.98, False)):
        shared = replace(known, points=tuple(replace(one, core_share=share) for one in known.points))
        told = estimate(plan, shared, {one.cell.id for one in plan.cells})
        assert any("other work had the cores" in note for note in told.notes) is said


@pytest.mark.slow
def test_a_damaged_calibration_is_named(calibrated: Finished, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    (store.root / "hardware").mkdir()
    (store.root / "hardware" / "odd.json").write_text('{"kind": "odd"}')
    with pytest.raises(InputError, match=r"odd\.json is damaged .*calibrate again"):
        find_calibration(store)


def test_predicting_loads_neither_torch_nor_ray() -> None:
    import subprocess

    code = "import cluster.estimate, cluster.calibration, sweeps.timing, sys"
    check = (
        "heavy = {'torch', 'ray', 'mlflow', 'scipy', 'numpy'} & set(sys.modules) - {'numpy'}; assert not heavy, heavy"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True, cwd=root)


def test_the_kind_of_this_machine_is_that_of_its_workers_whatever_the_shell_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = local_kind()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert local_kind() == kind
