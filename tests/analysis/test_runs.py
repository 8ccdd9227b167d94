"""Runs as frames: one row per planned cell with its reason, the same from the store and from MLflow."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import fit, load_curves, load_documents, load_runs, read_table
from analysis.foreign import read_foreign
from analysis.runs import COLUMNS, METRICS
from analysis.uncertainty import SETTINGS, seed_noise
from sweeps.errors import InputError
from sweeps.foreign import import_runs
from sweeps.recipe import Training
from sweeps.store import Store, iterate_cells, open_store, read_metrics
from tests.analysis.synthetic import Run, grid, surface, write_study

MIXED = [
    Run(width=16, budget=1.2e11),
    Run(width=24, budget=1.2e11, seed=1),
    Run(width=32, budget=1.2e11, state="diverged"),
    Run(width=40, budget=1.2e11, state="failed"),
    Run(width=48, budget=1.2e11, state="planned"),
    Run(width=56, budget=1.2e11),
    Run(width=64, tokens=80_000_000 // 512 * 512),
    Run(width=12, tokens=512_000, changes={"weight_decay": 0.0}),
]


@pytest.fixture
def mixed(study) -> Path:
    """A study with a cell in every state; the sixth is quarantined."""
    return study(MIXED, quarantine={5: "loss spike at the end"})


def test_every_planned_cell_is_a_row_with_its_columns(mixed) -> None:
    runs = load_runs("demo", mixed)
    assert list(runs.columns) == list(COLUMNS)
    assert len(runs) == len(MIXED)
    assert runs["cell"].is_unique
    assert (runs["study"] == "demo").all()


def test_excluded_says_why(mixed) -> None:
    runs = load_runs("demo", mixed).set_index("width")
    reasons = runs["excluded"]
    assert reasons[16] is None
    assert reasons[24] is None
    assert reasons[32] == "diverged: the loss is not finite"
    assert reasons[40] == "not finished (failed: code: ValueError: it broke)"
    assert reasons[48] == "not finished (planned)"
    assert reasons[56] == "quarantined: loss spike at the end"
    assert reasons[64].startswith("repeats its corpus (2 epochs")
    assert runs["state"][56] == "quarantined"
    assert np.isnan(runs["val_loss_final"][[32, 40, 48]]).all()


def test_derived_columns(mixed) -> None:
    runs = load_runs("demo", mixed).set_index("width")
    row = runs.loc[16]
    assert row["tokens_per_parameter"] == pytest.approx(row["D"] / row["N"])
    assert row["C"] == pytest.approx(row["flops_per_token"] * row["D"])
    assert row["adamw_timescale"] == pytest.approx(512 / (0.01 * 0.1 * row["D"]))
    assert np.isnan(runs["adamw_timescale"][12])
    assert runs["budget"].isna().sum() == 2
    assert (row["heads"], row["context"], row["attempts"], row["beta2"]) == (2, 128, 1, 0.95)
    assert runs["attempts"][48] == 0


def test_store_is_found_by_environment_and_by_default(mixed, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ESCALA_STORE", str(mixed))
    assert len(load_runs("demo")) == len(MIXED)
    assert len(load_runs("demo", Store(mixed))) == len(MIXED)
    monkeypatch.delenv("ESCALA_STORE")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no Escala store"):
        load_runs("demo")
    mixed.rename(tmp_path / "escala-store")
    assert len(load_runs("demo")) == len(MIXED)


def test_unknown_study_is_an_input_error_that_names_the_known(mixed) -> None:
    with pytest.raises(InputError, match="demo"):
        load_runs("demoo", mixed)


def test_curves_hold_every_logged_row_once(mixed) -> None:
    curves = load_curves("demo", mixed)
    store = open_store(mixed)
    logged = sum(len(read_metrics(store, entry["id"])) for entry, _, _ in iterate_cells(store, "demo"))
    assert len(curves) == logged
    assert not curves.duplicated(["cell", "tokens"]).any()
    assert set(METRICS) <= set(curves.columns)
    runs = load_runs("demo", mixed).set_index("cell")
    last = curves[curves["val_loss_final"].notna()].set_index("cell")
    assert (last["tokens"] == runs.loc[last.index, "D"]).all()
    done = last.index[runs.loc[last.index, "val_loss_final"].notna()]
    assert last.loc[done, "val_loss_final"].tolist() == runs.loc[done, "val_loss_final"].tolist()


def test_documents_add_up_to_the_final_loss(good_store) -> None:
    documents = load_documents("demo", good_store)
    sums = documents.groupby("cell")[["loss_sum", "tokens"]].sum()
    losses = load_runs("demo", good_store).set_index("cell")["val_loss_final"]
    assert (sums["loss_sum"] / sums["tokens"]).to_numpy() == pytest.approx(losses[sums.index].to_numpy(), rel=1e-9)


def test_a_study_without_finished_cells_loads_empty(study) -> None:
    root = study([Run(width=16, budget=1e11, state="planned")])
    assert len(load_runs("demo", root)) == 1
    assert load_curves("demo", root).empty
    assert load_documents("demo", root).empty


# --- MLflow ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mirrored(tmp_path_factory) -> tuple[Path, str]:
    """A store and an MLflow database that mirrors it, as (store root, tracking URI)."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    folder = tmp_path_factory.mktemp("mirrored")
    root = write_study(folder / "store", MIXED, quarantine={5: "loss spike at the end"})
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client, store = MlflowClient(uri), open_store(root)
    experiment = client.create_experiment("demo")
    client.create_run(experiment, run_name="a person's own run")  # without our tags: no cell
    for entry, cell, state in reversed(list(iterate_cells(store, "demo"))):
        record = {"entry": entry, "cell": {k: v for k, v in cell.items() if k != "format"}, "state": state.state}
        record |= {"reason": state.reason, "attempts": state.attempts, "result": state.result}
        tags = {"escala.cell": entry["id"], "escala.record": json.dumps(record)}
        run_id = client.create_run(experiment, tags=tags).info.run_id
        rows = read_metrics(store, entry["id"])
        metrics = [Metric(k, v, int(r["time"] * 1000), r["tokens"]) for r in rows for k, v in r["metrics"].items()]
        client.log_batch(run_id, metrics=metrics)
    return root, uri


def test_frames_from_mlflow_are_identical(mirrored, tmp_path) -> None:
    root, uri = mirrored
    away = tmp_path / "nowhere"
    pd.testing.assert_frame_equal(load_runs("demo", away, tracking_uri=uri), load_runs("demo", root))
    pd.testing.assert_frame_equal(load_curves("demo", away, tracking_uri=uri), load_curves("demo", root))


def test_visible_store_comes_before_mlflow(mirrored) -> None:
    root, _ = mirrored
    assert len(load_runs("demo", root, tracking_uri="sqlite:////nowhere/at/all.db")) == len(MIXED)


def test_store_without_the_study_falls_back_to_mlflow(mirrored, tmp_path) -> None:
    _, uri = mirrored
    other = open_store(tmp_path / "other")
    assert len(load_runs("demo", other, tracking_uri=uri)) == len(MIXED)


def test_unknown_experiment_is_an_input_error(mirrored, tmp_path) -> None:
    with pytest.raises(InputError, match="no experiment"):
        load_runs("nothing", tmp_path / "nowhere", tracking_uri=mirrored[1])


def test_quarantine_set_in_mlflow_counts_at_once(mirrored, tmp_path) -> None:
    from mlflow import MlflowClient

    _, uri = mirrored
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("demo")
    runs = load_runs("demo", tmp_path / "nowhere", tracking_uri=uri)
    cell = runs[runs["excluded"].isna()]["cell"].iloc[0]
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`escala.cell` = '{cell}'")
    client.set_tag(run.info.run_id, "escala.quarantine", "looks odd")
    try:
        marked = load_runs("demo", tmp_path / "nowhere", tracking_uri=uri).set_index("cell")
        assert marked["excluded"][cell] == "quarantined: looks odd"
    finally:
        client.delete_tag(run.info.run_id, "escala.quarantine")


def test_fit_of_a_store_names_what_it_left_out(mixed) -> None:
    found = fit(load_runs("demo", mixed))
    assert (found.planned, found.finished, found.n_runs) == (8, 4, 3)
    assert len(found.excluded) == 5
    assert {"partial", "too_few_runs"} <= {v.code for v in found.verdicts}


def test_a_database_whose_host_is_not_there_is_said_at_once_and_not_after_minutes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"MLflow at postgresql://127.0.0.1:9/x cannot be read \(.*refused"):
        load_runs("nothing", tmp_path / "nowhere", tracking_uri="postgresql://127.0.0.1:9/x")
    with pytest.raises(InputError, match=r"cannot be read .*Invalid IPv6"):
        load_runs("nothing", tmp_path / "nowhere", tracking_uri="http://[x")


def test_grid_of_the_tests_is_a_real_isoflop_grid() -> None:
    assert len({run.width for run in grid(budgets=(1.2e11,))}) == 5


def test_every_hyperparameter_of_a_recipe_is_a_column_or_a_variation_would_pass_for_a_seed() -> None:
    held = {"parametrisation", "gradient_noise"}  # a column of its own, and what moves no loss
    assert {*Training.model_fields} - held <= {*SETTINGS}
    assert {*SETTINGS} <= {*COLUMNS}


def test_runs_of_two_optimizers_are_no_replicates(tmp_path: Path) -> None:
    runs = [
        Run(width=24, budget=1.2e11, seed=seed, loss=loss, changes={"name": name})
        for name, loss in (("adamw", 3.0), ("muon", 2.5))
        for seed in (0, 1)
    ]
    frame = load_runs("demo", write_study(tmp_path / "store", runs))
    assert sorted(frame["optimizer"]) == ["adamw", "adamw", "muon", "muon"]
    noise = seed_noise(frame)
    assert noise is not None
    assert (noise.freedom, noise.sd) == (2, pytest.approx(0.0, abs=1e-12))


def test_imported_runs_of_which_little_is_known_can_be_loaded_and_fitted(tmp_path: Path) -> None:
    N, D = (a.ravel() for a in np.meshgrid([1e7, 5e7, 2e8, 1e9], [1e9, 4e9, 2e10]))
    table = surface(N, D, noise=0.003).assign(learning_rate=1e-3, weight_decay=0.1, seed="first", context="long")
    table.to_csv(tmp_path / "theirs.csv", index=False)
    store = open_store(tmp_path / "store")
    rows, conventions, _ = read_foreign(tmp_path / "theirs.csv")
    import_runs(store, "theirs", rows, conventions, "theirs.csv")
    runs = load_runs("theirs", store)
    assert (runs["weight_decay"] == 0.1).all()
    assert runs[["adamw_timescale", "batch_tokens", "seed", "context"]].isna().all(axis=None), "words are no numbers"
    assert rows[0]["row"]["context"] == "long"
    assert not fit(runs, "chinchilla", resamples=10).refused


def test_imported_runs_of_equal_compute_share_a_budget_as_those_of_their_table_do(tmp_path: Path) -> None:
    C, N = (a.ravel() for a in np.meshgrid([1e19, 1e20, 1e21], np.geomspace(1e8, 6e9, 9)))
    table = surface(N, C / (6 * N), noise=0.002).assign(C=C)
    alone = surface(np.array([1e9]), np.array([3e10]), noise=0.0).assign(C=1.8e20)
    pd.concat([table, alone]).to_csv(tmp_path / "theirs.csv", index=False)
    store = open_store(tmp_path / "store")
    rows, conventions, _ = read_foreign(tmp_path / "theirs.csv")
    import_runs(store, "theirs", rows, conventions, "theirs.csv")
    runs = load_runs("theirs", store)
    assert runs["budget"].value_counts().to_dict() == {1e19: 9, 1e20: 9, 1e21: 9}, "one run is no budget"
    found, read = fit(runs, "isoflop"), fit(read_table(tmp_path / "theirs.csv"), "isoflop", loss="loss")
    assert found.params == pytest.approx(read.params)
    assert not np.isnan(found.params["N_exponent"])


def test_what_tells_runs_apart_survives_an_export_and_its_import(study, tmp_path: Path) -> None:
    """Else two parametrisations at one rate would pass for seeds, and branches of one trunk for independent runs."""
    cells = [Run(width=width, budget=1.2e11, seed=seed) for width in (16, 24) for seed in (0, 1)]
    table = load_runs("demo", study(cells)).assign(
        parametrisation=["standard", "mup"] * 2,
        schedule="wsd",
        cooldown_fraction=[0.1, 0.4] * 2,
        cooldown_shape="linear",
        final_fraction=0.0,
        optimizer=["adamw", "muon"] * 2,
        validation_tokens=8192,
        trunk=["one", "one", "two", "two"],
        C_spent=[1e9, 2e9, 3e9, 4e9],
    )
    table.to_csv(tmp_path / "runs.csv", index=False)
    store = open_store(tmp_path / "other")
    rows, conventions, _ = read_foreign(tmp_path / "runs.csv")
    import_runs(store, "again", rows, conventions, "runs.csv")
    runs = load_runs("again", store)
    told = [*SETTINGS, "validation_tokens", "trunk", "C_spent", "val_loss_final"]
    pd.testing.assert_frame_equal(
        runs.sort_values("val_loss_final")[told].reset_index(drop=True),
        table.sort_values("val_loss_final")[told].reset_index(drop=True),
        check_dtype=False,
    )


def test_runs_that_a_table_takes_out_of_fits_are_not_imported_as_runs_that_count(tmp_path: Path) -> None:
    N, D = np.full(4, 1e7), np.full(4, 1e9)
    table = surface(N, D, noise=0.003).assign(
        excluded=["", "an early rung of a search", "", "repeats its corpus (2 epochs)"], epochs=[0.1, 0.1, 0.1, 2.0]
    )
    table.to_csv(tmp_path / "runs.csv", index=False)
    store = open_store(tmp_path / "store")
    rows, conventions, left_out = read_foreign(tmp_path / "runs.csv")
    assert (len(rows), left_out) == (3, [2])
    import_runs(store, "theirs", rows, conventions, "runs.csv")
    assert load_runs("theirs", store)["excluded"].notna().sum() == 1, "what repeats its corpus is there, and left out"
