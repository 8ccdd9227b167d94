"""Every row of a table is used, or named with the reason why not."""

import numpy as np
import pandas as pd
import pytest

from analysis import fit
from analysis.forecast import forecast_dearest
from analysis.gains import usable
from analysis.selection import select
from analysis.sensitivities import sensitivity
from analysis.uncertainty import seed_noise
from tests.analysis.sweeps_of_rates import sweep
from tests.analysis.synthetic import BUDGETS, budgets_table, surface

N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e6, 4), np.geomspace(1e5, 1e7, 4)))


def test_used_and_left_out_add_up() -> None:
    table = surface(N, D)
    table["state"] = "finished"
    table["excluded"] = None
    table.loc[0, "excluded"] = "quarantined: odd"
    table.loc[1, "loss"] = np.nan
    table.loc[2, "N"] = 0.0
    table.loc[3, ["state", "excluded"]] = ["running", "not finished (running)"]
    chosen = select(table)
    assert len(chosen.rows) + len(chosen.excluded) == chosen.planned == 16
    assert chosen.finished == 15
    assert [e["cell"] for e in chosen.excluded] == ["row 0", "row 1", "row 2", "row 3"]
    assert chosen.excluded[0]["reason"] == "quarantined: odd"
    assert "missing or not positive" in chosen.excluded[1]["reason"]
    assert [v.code for v in chosen.verdicts] == ["partial", "excluded_runs"]


def test_a_run_without_a_name_is_called_by_its_row() -> None:
    table = pd.concat([surface(N, D, noise=0.003, seed=k) for k in (1, 2)], ignore_index=True)
    table["cell"] = [f"run {i}" for i in range(len(table))]
    table.loc[[3, 4], ["cell", "loss"]] = [[None, 3.0], [None, np.nan]]
    found = fit(table, resamples=20)
    assert np.isfinite(found.intervals["E"]).all()
    assert "row 3" in found.provenance["cells"]
    assert [e["cell"] for e in found.excluded] == ["row 4"]


def test_best_setting_stands_for_its_place_with_all_its_seeds() -> None:
    table = pd.concat(
        [surface(N, D).assign(learning_rate=rate, seed=seed) for rate in (0.01, 0.02) for seed in (0, 1)],
        ignore_index=True,
    )
    worse = table["learning_rate"] == 0.02
    table.loc[worse, "loss"] *= 1.01
    lucky = worse & (table["seed"] == 0)
    table.loc[lucky, "loss"] *= 0.985  # one lucky seed does not make a good setting
    table.loc[worse & (table["seed"] == 1), "loss"] *= 1.03
    chosen = select(table)
    assert set(chosen.rows["learning_rate"]) == {0.01}
    assert len(chosen.rows) == 32
    assert [v.code for v in chosen.verdicts] == ["best_settings"]
    assert {e["reason"] for e in chosen.excluded} == {"a better setting was tried at this size and token count"}


@pytest.mark.parametrize("written", [0.1 * 0.003, float(np.float32(0.0003))])
def test_a_rate_that_differs_in_its_last_digits_is_the_same_setting(written) -> None:
    """One seed's rate as another program, or single precision, writes it: still three seeds of one setting."""
    seeds = [surface(N[:3], D[:3], noise=0.002, seed=k).assign(seed=k, learning_rate=0.0003) for k in range(3)]
    seeds[1]["learning_rate"] = written
    chosen = select(pd.concat(seeds, ignore_index=True))
    assert len(chosen.rows) == 9
    assert chosen.noise is not None
    assert chosen.noise.freedom == 6


def test_settings_that_follow_the_size_are_not_compared() -> None:
    table = surface(N, D).assign(learning_rate=1 / np.sqrt(N))
    assert len(select(table).rows) == 16


def test_batch_sizes_of_one_budget_are_compared_though_tokens_round_apart() -> None:
    one = surface(N, D).assign(batch_tokens=512.0, budget=6 * N * D)
    two = surface(N, D * 1.001).assign(batch_tokens=1024.0, budget=6 * N * D)
    two["loss"] *= 1.01
    assert set(select(pd.concat([one, two])).rows["batch_tokens"]) == {512.0}


def test_batch_sizes_of_one_token_count_are_compared_though_whole_batches_round_it() -> None:
    batches = {4096.0: 1.0, 8192.0: 1.01, 16384.0: 1.03}
    tables = [
        surface(N, np.round(D * 20 / batch) * batch, batch_tokens=batch).assign(loss=lambda t, c=cost: c * t["loss"])
        for batch, cost in batches.items()
    ]
    chosen = select(pd.concat(tables, ignore_index=True))
    assert set(chosen.rows["batch_tokens"]) == {4096.0}
    assert len(chosen.rows) == 16
    apart = [surface(N, D * more, batch_tokens=512.0 * more) for more in (1.0, 1.05)]
    assert len(select(pd.concat(apart, ignore_index=True)).rows) == 32


def test_settings_tuned_anew_at_each_value_of_another_variable_are_not_compared() -> None:
    tables = [
        surface(N, D).assign(U=D / part, learning_rate=rate, loss=lambda t, part=part: t["loss"] * part**0.01)
        for part, rate in ((1, 1e-3), (4, 7e-4), (16, 5e-4))
    ]
    table = pd.concat(tables)
    assert len(select(table, variables=("N", "D", "U")).rows) == 48
    worse = table.assign(learning_rate=0.1, loss=table["loss"] * 1.01)
    chosen = select(pd.concat([table, worse]), variables=("N", "D", "U"))
    assert len(chosen.rows) == 48
    assert chosen.rows["learning_rate"].max() < 0.1
    budget = (6 * N * D).round(-6)
    one = surface(N, D).assign(U=D, budget=budget, batch_tokens=512.0)
    two = surface(N, D * 1.0002).assign(U=D * 1.0002, budget=budget, batch_tokens=1024.0)
    two["loss"] *= 1.01  # the tokens of one budget, rounded to its batches
    rows = select(pd.concat([one, two]), variables=("N", "D", "U")).rows
    assert set(rows["batch_tokens"]) == {512.0}


def test_a_law_of_other_things_takes_all_settings() -> None:
    table = pd.concat([surface(N, D).assign(learning_rate=rate) for rate in (0.01, 0.02)])
    table["loss"] *= np.where(table["learning_rate"] > 0.01, 1.01, 1.0)
    accuracy = table.assign(accuracy=1.0 / table["loss"])
    assert len(select(accuracy, "accuracy", ("loss",), "accuracy").rows) == 32
    assert len(select(table.assign(x=N.tolist() * 2), variables=("x",)).rows) == 32
    assert len(select(table, variables=("C",)).rows) == 16


def test_a_row_that_is_listed_twice_is_one_run() -> None:
    table = surface(N, D, noise=0.003).round({"loss": 3}).assign(seed=0)
    twice = pd.concat([table, table])
    chosen = select(twice)
    pd.testing.assert_frame_equal(chosen.rows, select(table).rows)
    assert [(v.code, v.severity) for v in chosen.verdicts] == [("repeated_losses", "info")]
    assert {e["reason"] for e in chosen.excluded} == {"listed twice: another row has the same setting and loss"}
    assert len(chosen.rows) + len(chosen.excluded) == chosen.planned == 32


def test_equal_losses_of_different_runs_are_kept() -> None:
    table = surface(N, D, noise=0.003)
    assert len(select(pd.concat([table.assign(seed=0), table.assign(seed=1)])).rows) == 32
    assert len(select(pd.concat([table, table.assign(width=64)])).rows) == 32
    assert len(select(pd.concat([table, table.assign(loss=table["loss"] * 1.001)])).rows) == 32  # seeds without a name
    rounded = table.round({"loss": 2})  # to three digits two runs agree by chance
    assert len(select(pd.concat([rounded, rounded])).rows) == 32


def test_missing_compute_is_taken_as_six_n_d_and_said() -> None:
    chosen = select(surface(N, D).drop(columns="C"))
    assert (chosen.rows["C"] == 6 * N * D).all()
    assert [v.code for v in chosen.verdicts] == ["compute_assumed"]


def test_few_steps_are_cautioned_not_excluded() -> None:
    chosen = select(surface(N, D).assign(steps=np.where(np.arange(16) < 2, 120, 1000)))
    assert len(chosen.rows) == 16
    assert [v.code for v in chosen.verdicts] == ["few_steps"]
    assert "2 of 16" in chosen.verdicts[0].message


def test_the_table_given_is_not_changed() -> None:
    table = surface(N, D)
    before = table.copy()
    fit(table)
    pd.testing.assert_frame_equal(table, before)


def test_cells_that_diverged_among_the_sizes_of_a_budget_are_outcome_selection() -> None:
    table = budgets_table((1e11, 4e11), seeds=1, noise=0.002).assign(state="finished", excluded=None)
    assert not [v for v in select(table).verdicts if v.code == "outcome_selection"]
    middle = table.index[table["budget"] == 4e11][2]
    table.loc[middle, ["state", "excluded", "loss"]] = ["diverged", "diverged: loss is not finite", np.nan]
    (verdict,) = [v for v in select(table).verdicts if v.code == "outcome_selection"]
    assert (verdict.severity, verdict.scope, verdict.target) == ("caution", "budget", "4e11")


@pytest.mark.parametrize("no", [False, np.False_, 0, "", " ", "no", "False"])
def test_a_mark_that_a_row_counts_excludes_nothing_in_a_bare_frame(no) -> None:
    grid = sweep([1e5, 4e5], [1e7], seeds=2)
    marked = grid.assign(excluded=pd.Series([no] * len(grid), dtype=object))
    assert seed_noise(marked, "loss") == seed_noise(grid, "loss")
    assert len(sensitivity(marked, resamples=20).optima) == len(sensitivity(grid, resamples=20).optima)
    assert len(usable(marked)) == len(usable(grid))
    table = surface(N, D)
    assert not fit(table.assign(excluded=pd.Series([no] * 16, dtype=object)), resamples=10).excluded
    told = fit(table.assign(excluded=pd.Series([True, "odd", *[no] * 14], dtype=object)), resamples=10).excluded
    assert [each["reason"] for each in told] == ["excluded in the table", "odd"]


def test_a_mark_that_a_budget_counts_does_not_take_its_forecast_away() -> None:
    budgets = budgets_table(BUDGETS[:3])
    said = forecast_dearest(budgets.assign(excluded=False), resamples=20).verdicts
    assert said == forecast_dearest(budgets, resamples=20).verdicts
