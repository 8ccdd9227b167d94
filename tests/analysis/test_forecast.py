"""The forecast of the dearest budget: right where the law holds, and caught where it does not."""

import json
from dataclasses import replace

import numpy as np
import pytest

from analysis import fit, forecast_dearest, load_runs
from analysis.forecast import predict
from tests.analysis.synthetic import budgets_table

BUDGETS = (1e11, 4e11, 1.6e12, 6.4e12)


def test_runs_on_the_law_are_foretold() -> None:
    found = forecast_dearest(budgets_table(BUDGETS, seeds=3, noise=0.002))
    assert found.budget == 6.4e12
    assert found.extrapolation == pytest.approx(4.0)
    assert found.N_inside
    assert found.loss_inside
    assert abs(found.N_error) < 0.1
    assert len(found.sizes) == 7
    assert found.mean_absolute_error < 0.01
    assert sum(bool(s.inside) for s in found.sizes) >= 5
    assert found.verdicts == ()


def test_forecast_does_not_see_the_budget_it_foretells() -> None:
    table = budgets_table(BUDGETS, seeds=3, noise=0.002)
    spoiled = table.copy()
    spoiled.loc[spoiled["budget"] == 6.4e12, "loss"] *= 1.2
    one, two = forecast_dearest(table), forecast_dearest(spoiled)
    assert one.N_predicted == two.N_predicted
    assert [s.predicted for s in one.sizes] == [s.predicted for s in two.sizes]
    assert two.mean_absolute_error == pytest.approx(0.2, abs=0.02)
    assert not any(s.inside for s in two.sizes)
    assert not two.loss_inside


def test_law_that_bends_is_caught() -> None:
    table = budgets_table(BUDGETS, seeds=3, noise=0.001)
    bend = table["budget"] == 6.4e12
    shifted = table.assign(N=np.where(bend, table["N"] * 2, table["N"]), D=np.where(bend, table["D"] / 2, table["D"]))
    found = forecast_dearest(shifted)
    assert found.N_inside is False
    assert found.N_error == pytest.approx(1.0, abs=0.15)


def test_three_budgets_foretell_losses_but_no_size() -> None:
    found = forecast_dearest(budgets_table(BUDGETS[:3], seeds=2, noise=0.001))
    assert [(v.code, v.target) for v in found.verdicts] == [("no_forecast", "N")]
    assert np.isnan(found.N_predicted.value)
    assert found.N_inside is None
    assert found.N_found.value > 0
    assert found.mean_absolute_error < 0.01


def test_tables_without_compute_or_with_nameless_runs_are_foretold_alike() -> None:
    table = budgets_table(BUDGETS, noise=0.001)
    one = forecast_dearest(table, resamples=20)
    bare = forecast_dearest(table.drop(columns="C"), resamples=20)
    assert (bare.C, bare.extrapolation) == (pytest.approx(one.C), pytest.approx(one.extrapolation))
    named = table.assign(cell=[f"run {i}" if i < len(table) - 5 else None for i in range(len(table))])
    assert [s.N for s in forecast_dearest(named, resamples=20).sizes] == [s.N for s in one.sizes]


def test_one_budget_foretells_nothing() -> None:
    found = forecast_dearest(budgets_table(BUDGETS[:1]))
    assert [(v.code, v.scope) for v in found.verdicts] == [("no_forecast", "fit")]
    assert found.sizes == ()
    json.dumps(found.to_json(), allow_nan=False)


def test_refused_budget_is_scored_by_its_losses_alone() -> None:
    table = budgets_table(BUDGETS, seeds=3, noise=0.002)
    edge = (table["budget"] == 6.4e12) & (table["N"] < table.loc[table["budget"] == 6.4e12, "N"].median())
    found = forecast_dearest(table[~edge].reset_index(drop=True))
    assert len(found.sizes) == 4
    assert found.mean_absolute_error < 0.01


def test_forecast_of_a_store(good_store) -> None:
    written = forecast_dearest(load_runs("demo", good_store)).to_json()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert written["N_inside"] is True
    assert len(written["sizes"]) == 5
    assert written["mean_absolute_error"] < 0.01


def test_intervals_of_new_runs_are_as_wide_from_a_fit_of_raw_losses_as_from_one_of_their_logarithms() -> None:
    table = budgets_table(BUDGETS[:3], seeds=3, noise=0.01)
    widths = []
    for raw in (False, True):
        predicted, low, high = predict(fit(table, "chinchilla", raw=raw, resamples=200), table[["N", "D"]])
        widths.append(np.median((high - low) / predicted))
    assert widths[1] == pytest.approx(widths[0], rel=0.15), "the noise of the second is in nats"


def test_what_the_seeds_of_a_cell_share_does_not_average_out_of_a_mean_over_them() -> None:
    found = fit(budgets_table(BUDGETS[:3], seeds=3, noise=0.01), "chinchilla", resamples=200)
    found = replace(found, draws={name: np.full(200, value) for name, value in found.params.items()})
    cell = budgets_table(BUDGETS[3:], sizes=1)

    def width(common: float, seeds: float) -> float:
        _, low, high = predict(replace(found, noise=found.noise | {"common": common}), cell, seeds=np.array([seeds]))
        return float(np.log(high / low)[0])

    assert width(1.0, 4.0) == pytest.approx(width(0.0, 1.0))
    assert width(0.0, 4.0) == pytest.approx(width(0.0, 1.0) / 2)
    assert width(0.5, 4.0) == pytest.approx(width(0.0, 1.0) * np.sqrt(0.5 + 0.5 / 4))
