"""The optimum of a group: planted vertices come back, intervals hold, and what is no optimum is refused."""

import numpy as np
import pandas as pd
import pytest

from analysis import read_table
from analysis.optima import find_optima
from analysis.sensitivities import sensitivity
from analysis.swept import swept_groups
from analysis.uncertainty import merged
from sweeps.errors import InputError
from tests.analysis.fans import RATES, SIZES, best_rate, crossed, fan
from tests.analysis.synthetic import codes, published

STEP_LAW = {"loss": "smooth loss", "batch": "2048*bs"}


def only(table: pd.DataFrame, **options):
    (found,) = sensitivity(table, **options).optima
    return found


def one(rates=RATES, losses=None, **columns) -> pd.DataFrame:
    """One group; by default a clean quadratic about .01."""
    rates = np.asarray(rates, dtype=float)
    losses = 3.0 * np.exp(0.025 * np.log(rates / 0.01) ** 2) if losses is None else losses
    return pd.DataFrame({"N": 1e6, "D": 1e8, "learning_rate": rates, "loss": losses} | columns)


# --- the vertex --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_planted_vertices_of_quadratics_come_back_exactly(seed) -> None:
    generator = np.random.default_rng(seed)
    table = fan(noise=0.0, seeds=1, curvature=float(generator.uniform(0.01, 0.3)))
    for found in sensitivity(table).optima:
        assert found.best["learning_rate"].value == pytest.approx(best_rate(found.group["N"]), rel=1e-6)
        assert found.loss.value == pytest.approx(1.5 + 20.0 * found.group["N"] ** -0.2 + 10.0 * 1e8**-0.2, rel=1e-6)


def test_plateau_and_curvature_are_those_of_the_quadratic() -> None:
    found = only(one(), eps=0.02)
    reach = np.exp(np.sqrt(2.0 * np.log(1.02) / 0.05))
    assert found.curvature == pytest.approx(0.05, rel=1e-6)
    assert found.plateau["learning_rate"] == pytest.approx((0.01 / reach, 0.01 * reach), rel=1e-6)


def test_plateau_beyond_the_grid_is_open() -> None:
    low, high = only(one(RATES[3:]), eps=0.05).plateau["learning_rate"]
    assert np.isnan(low)
    assert np.isfinite(high)


def test_rate_and_batch_are_found_together_where_they_were_crossed() -> None:
    found = sensitivity(crossed())
    assert found.optima[0].axes == ("learning_rate", "batch_tokens")
    for each in found.optima:
        N, D = each.group["N"], each.group["D"]
        assert each.best["learning_rate"].value == pytest.approx(best_rate(N, D), rel=0.1)
        assert each.best["batch_tokens"].value == pytest.approx(1e5 * (D / 1e8) ** 0.5, rel=0.1)
    assert found.laws["batch_tokens"].powers["D"].value == pytest.approx(0.5, abs=0.03)


@pytest.mark.slow
def test_intervals_hold_as_often_as_they_say() -> None:
    held, laws = [], []
    for seed in range(40):
        found = sensitivity(fan(seed=seed), resamples=200, seed=seed)
        for each in found.optima:
            low, high = each.best["learning_rate"].interval
            held.append(low <= best_rate(each.group["N"]) <= high)
        low, high = found.laws["learning_rate"].powers["N"].interval
        laws.append(low <= -0.2 <= high)
    assert 0.9 < np.mean(held) < 0.99  # 200 intervals
    assert np.mean(laws) > 0.87  # 40


def test_noise_between_seeds_is_measured_beside_the_optimum_alone() -> None:
    table = fan(noise=0.002)
    wild = table["learning_rate"] > 0.1
    table.loc[wild, "loss"] *= np.exp(0.2 * np.random.default_rng(1).standard_normal(int(wild.sum())))
    noise = sensitivity(table).noise
    assert noise["source"] == "seeds"
    assert noise["sd"] == pytest.approx(0.002, rel=0.3)


def test_a_few_replicates_are_pooled_with_the_scatter_about_the_curves() -> None:
    table = fan(noise=0.003, seed=3)
    few = sensitivity(table[(table["seed"] == 0) | (table["N"] == table["N"].min())], resamples=20).noise
    seeds = sensitivity(table[table["N"] == table["N"].min()], resamples=20).noise
    assert few["source"] == "seeds"
    assert few["freedom"] > 1.5 * seeds["freedom"]
    assert few["sd"] == pytest.approx(0.003, rel=0.3)


def test_sizes_that_are_noisier_have_wider_intervals() -> None:
    table, even = fan(noise=0.0, seeds=1), fan(noise=0.004, seeds=1, seed=5)
    grown = (even["loss"] / table["loss"]) ** np.where(table["N"] > table["N"].median(), 2.5, 0.5)
    found = sensitivity(table.assign(loss=table["loss"] * grown), resamples=400)
    assert "uneven_noise" in [v.code for v in found.verdicts]
    widths = [
        np.log(one.best["learning_rate"].interval[1] / one.best["learning_rate"].interval[0]) for one in found.optima
    ]
    assert widths[-1] > 2.0 * widths[0]


def test_one_bad_run_is_taken_out_and_named() -> None:
    table = fan(seeds=1, noise=0.001)
    spoiled = table.index[(table["N"] == 1.6e6) & np.isclose(table["learning_rate"], 0.02)]
    clean = sensitivity(table).optima[2]
    table.loc[spoiled, "loss"] *= 1.03
    found = sensitivity(table).optima[2]
    assert "bad_run" in codes(found)
    told = next(v.message for v in found.verdicts if v.code == "bad_run")
    assert "0.02 " in told
    assert "not fitted, though counted in the sensitivity" in told
    assert found.best["learning_rate"].value == pytest.approx(clean.best["learning_rate"].value, rel=0.05)


def test_clean_runs_are_seldom_taken_for_bad() -> None:
    flagged = sum("bad_run" in codes(each) for seed in range(20) for each in sensitivity(fan(seed=seed)).optima)
    assert flagged <= 3  # of 100 groups


def test_valleys_steeper_on_one_side_are_said_with_how_far_the_vertices_are_off() -> None:
    table = fan(noise=0.001)
    assert "skewed_valley" not in codes(sensitivity(table))
    away = np.log(table["learning_rate"] / best_rate(table["N"]))
    found = sensitivity(table.assign(loss=table["loss"] * np.exp(0.003 * away**3)))
    (verdict,) = [v for v in found.verdicts if v.code == "skewed_valley"]
    off = np.log([best_rate(each.group["N"]) / each.best["learning_rate"].value for each in found.optima])
    assert verdict.evidence["ln_shift"] == pytest.approx(np.median(off), rel=0.25)
    assert "faster above" in verdict.message
    assert found.laws["learning_rate"].powers["N"].value == pytest.approx(-0.2, abs=0.02)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "side"), [(RATES[:4], "largest"), (RATES[5:], "smallest")])
def test_optimum_at_the_edge_of_the_grid_is_refused_with_a_remedy(kept, side) -> None:
    found = only(one(kept))
    assert found.refused
    (verdict,) = found.verdicts
    assert verdict.code == "edge_minimum"
    assert side in verdict.message
    assert "Train at" in verdict.message
    assert found.best == {}
    assert np.isnan(found.curvature)


def test_equal_losses_are_called_flat_and_send_nobody_to_other_rates() -> None:
    (verdict,) = only(one(losses=3.0)).verdicts
    assert (verdict.code, verdict.severity) == ("flat_losses", "refuse")
    assert "same loss" in verdict.message
    assert "Train at" not in verdict.message


def test_optimum_beside_divergence_is_refused_as_the_edge_of_stability() -> None:
    rates = np.array([0.001, 0.002, 0.004, 0.008, 0.016, 0.032])
    table = one(rates, np.where(rates < 0.01, 3.0 * rates**-0.02, np.inf))
    found = only(table)
    assert codes(found, "refuse") == {"edge_of_stability"}
    assert "0.008" in found.verdicts[0].message
    assert "0.016" in found.verdicts[0].message


def test_all_diverged_is_a_verdict() -> None:
    table = one(losses=np.inf, loss_at_start=10.8)
    assert codes(only(table)) == {"all_diverged"}


@pytest.mark.parametrize(("rates", "words"), [([0.01], "1 learning rate"), ([0.01, 0.02], "2 learning rates")])
def test_too_few_rates_are_a_verdict(rates, words) -> None:
    found = only(one(rates))
    assert codes(found) == {"too_few_points"}
    assert words in found.verdicts[0].message


def test_three_rates_have_an_optimum_that_only_seeds_can_contradict() -> None:
    found = only(one([0.005, 0.01, 0.02]))
    assert not found.refused
    assert "no_residual_freedom" in codes(found)
    assert np.isnan(found.best["learning_rate"].interval).all()


def test_curve_that_is_no_valley_is_refused() -> None:
    assert only(one(losses=3.0 + 0.001 * np.array([1.0, 4, 6, 7, 0, 7, 6, 4, 1]))).refused  # a hill, and a lucky run
    flat = only(one(losses=3.0 + 0.001 * np.array([1.0, 4, 2, 4, 0.9, 4, 2, 4, 1])))
    assert codes(flat, "refuse") == {"no_minimum"}


def test_an_optimum_that_noise_may_put_anywhere_is_open_or_refused() -> None:
    tries = [only(fan(sizes=(1e6,), noise=0.02, curvature=0.002, seed=seed)) for seed in range(12)]
    wide = [each for each in tries if not each.refused and np.isnan(each.best["learning_rate"].interval).any()]
    assert len(wide) + sum(each.refused for each in tries) >= 9
    assert wide
    assert all("open_interval" in codes(each) for each in wide)


def test_of_an_open_optimum_copies_that_are_no_valley_are_told_where_there_are_some() -> None:
    found = only(fan(sizes=(1.6e6,), rates=tuple(0.008 * 3.0**i for i in range(-3, 2)), noise=0.03, curvature=0.06))
    (verdict,) = (each for each in found.verdicts if each.code == "open_interval")
    assert verdict.evidence == {"flat": 0.0}
    assert verdict.message.endswith("reaches beyond the grid. Add seeds, or rates further out.")


# --- what is one setting, and what is not ------------------------------------------------------------------------


def test_values_that_differ_by_rounding_are_one_and_chains_are_not() -> None:
    assert merged(np.array([0.000345, 0.0003453, 0.0005, np.nan]))[:3] == pytest.approx([0.000345, 0.000345, 0.0005])
    assert len(np.unique(merged(1.006 ** np.arange(10)))) == 5


def test_a_setting_that_differs_in_its_last_digits_divides_no_group() -> None:
    table = fan(SIZES[:2]).assign(weight_decay=0.1)
    table["weight_decay"] = table["weight_decay"].where(table["seed"] != 1, float(np.float32(0.1)))
    swept = swept_groups(table)
    assert len(swept.groups) == 2
    assert not swept.verdicts


def test_seeds_do_not_make_two_levels_of_one_batch() -> None:
    batches = [131_072.0, 262_144.0]
    once = pd.concat([one().assign(batch_tokens=b, loss=lambda t, b=b: t["loss"] * b**0.01) for b in batches])
    few = once[once["learning_rate"] < 0.02]
    again = [few.assign(loss=few["loss"] * (1 + 1e-4 * k)) for k in (1, 2)]
    (found,) = sensitivity(pd.concat([once, *again]), axes=["learning_rate", "batch_tokens"]).optima
    assert sorted(found.points["batch_tokens"].unique()) == batches
    assert "2 batch sizes with a loss (1.311e+05, 2.621e+05)" in found.verdicts[-1].message


def test_runs_that_blew_up_are_taken_for_diverged_but_slow_ones_are_not() -> None:
    rates = np.array([1e-4, 0.0025, 0.005, 0.01, 0.02, 0.04])
    groups = swept_groups(one(rates, [5.5, 3.1, 3.0, 3.05, 3.2, 7.0]))
    assert groups.diverged == 1
    assert groups.groups[0].points["diverged"].tolist() == [0, 0, 0, 0, 0, 1]
    assert "taken_for_diverged" in {v.code for v in groups.verdicts}


def test_a_batch_that_nobody_named_does_not_pass_for_a_seed() -> None:
    table = pd.concat([one().assign(bs=64), one().assign(bs=128, loss=4.0)])
    with pytest.raises(InputError, match=r"differ in bs.*batch=bs\*2048"):
        sensitivity(table)


def test_settings_that_were_crossed_divide_groups_and_those_that_move_along_are_said() -> None:
    both = pd.concat([one(weight_decay=0.1), one(weight_decay=0.01)])
    assert len(sensitivity(both).optima) == 2
    moving = one(weight_decay=np.asarray(RATES))
    found = sensitivity(moving)
    assert len(found.optima) == 1
    assert "moving_settings" in codes(found)


def test_what_a_search_scattered_over_rate_and_batch_is_one_group() -> None:
    generator = np.random.default_rng(0)
    rate, batch = 0.01 * np.exp(generator.uniform(-2, 2, 60)), 1e5 * np.exp(generator.uniform(-2, 2, 60))
    x, b = np.log(rate / 0.01), np.log(batch / 1e5)
    found = only(one(rate, 3.0 * np.exp(0.02 * x**2 + 0.02 * b**2 - 0.01 * x * b), batch_tokens=batch))
    assert found.axes == ("learning_rate", "batch_tokens")
    assert found.best["learning_rate"].value == pytest.approx(0.01, rel=0.02)
    assert found.best["batch_tokens"].value == pytest.approx(1e5, rel=0.02)


def test_cells_still_to_come_are_said() -> None:
    planned = one([0.32], [np.nan], state="planned", excluded="not finished (planned)")
    found = sensitivity(pd.concat([one(state="finished", excluded=None), planned], ignore_index=True))
    assert found.runs == 9
    assert "partial" in codes(found)
    assert found.left_out == {}


def test_rates_that_are_not_positive_are_left_out_and_none_left_is_an_error() -> None:
    table = pd.concat([one(), one([1e-9], [3.0]).assign(learning_rate=-1.0)], ignore_index=True)
    found = sensitivity(table)
    assert [len(cells) for cells in found.left_out.values()] == [1]
    with pytest.raises(InputError, match="not positive"):
        sensitivity(one().assign(learning_rate=0.0))


def test_a_run_is_left_out_for_the_columns_that_it_lacks_and_no_others() -> None:
    table = fan(sizes=(1e6,), batch_tokens=4096.0)
    table.loc[0, "learning_rate"] = np.nan
    table.loc[1, ["N", "batch_tokens"]] = 0.0
    left_out = {"learning_rate is missing or not positive": ("row 0",)}
    left_out["N and batch_tokens are missing or not positive"] = ("row 1",)
    assert sensitivity(table).left_out == left_out


@pytest.mark.parametrize("column", ["N", "D", "learning_rate"])
def test_a_column_that_is_empty_in_every_row_is_an_error(column) -> None:
    with pytest.raises(InputError, match=f"{column}.* is missing or not positive"):
        sensitivity(fan().assign(**{column: np.nan}))


def test_seeds_at_one_batch_are_one_setting_where_the_rate_is_not_known() -> None:
    runs = crossed(noise=0.0)
    runs = runs[runs["learning_rate"] == RATES[4]].assign(learning_rate=np.nan)
    runs = pd.concat([runs.assign(seed=s, loss=runs["loss"] * (1 + 0.001 * s)) for s in (0, 1)], ignore_index=True)
    groups = swept_groups(runs, ("batch_tokens",)).groups
    assert all((g.columns["count"] == 2).all() and len(g.columns["count"]) == 7 for g in groups)


def test_early_rungs_of_a_search_are_left_out() -> None:
    table = pd.concat([one(rung=1.0), one(losses=9.0, rung=0.25)], ignore_index=True)
    found = sensitivity(table)
    assert found.runs == 9
    assert list(found.left_out) == ["an early rung of a search"]


def test_unknown_axis_and_missing_column_are_input_errors() -> None:
    with pytest.raises(InputError, match='did you mean "learning_rate"'):
        sensitivity(one(), axes=("learning_rat",))
    with pytest.raises(InputError, match="lacks learning_rate"):
        sensitivity(one().drop(columns="learning_rate"))


# --- published grids ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step_law() -> pd.DataFrame:
    return read_table(published("step-law-dense/dense_lr_bs_loss.csv"), STEP_LAW, "sensitivity")


def test_step_laws_diverged_runs_are_recognised(step_law) -> None:
    groups = swept_groups(step_law)
    assert (groups.runs, groups.diverged, len(groups.groups)) == (1911, 181, 17)
    assert groups.axes == ("learning_rate", "batch_tokens")
    blown = sum(int(((g.points["diverged"] > 0) & (g.points["capped"] > 4)).sum()) for g in groups.groups)
    assert blown == 181 == int((step_law["loss"] > 4).sum())


def test_all_of_step_laws_surfaces_are_convex_inside_their_grids(step_law) -> None:
    found = sensitivity(step_law)
    assert len(found.optima) == 17
    assert not any(each.refused for each in found.optima)
    narrow = found.optima[-1]  # 47 runs on 5 rates: nearly every rate is as good
    assert len(narrow.points) == 47
    assert np.isnan(narrow.plateau["learning_rate"]).all()


def test_step_laws_small_batches_are_refused_at_the_lowest_rate_tried(step_law) -> None:
    groups = swept_groups(step_law, ("learning_rate",))
    optima, _, _ = find_optima(groups.groups, groups.axes)
    edges = [v for each in optima for v in each.verdicts if v.code == "edge_minimum"]
    assert len(edges) >= 1
    assert all("inside the grid. Train at" in v.message for v in edges)


@pytest.mark.parametrize(("digits", "runs"), [(2, 14), (9, 7)])
def test_runs_that_agree_by_rounding_are_not_taken_for_one_that_is_listed_twice(digits: int, runs: int) -> None:
    rates = 1e-3 * 2.0 ** np.arange(7)
    losses = np.round(3.141592653 * (1.0 + 0.02 * np.log(rates / 8e-3) ** 2), digits)
    table = pd.DataFrame({"N": 1e6, "D": 1e8, "learning_rate": rates, "loss": losses})
    assert swept_groups(pd.concat([table, table])).runs == runs


def test_misfittings_mislabelled_rows_are_said() -> None:
    found = sensitivity(read_table(published("misfitting/scaling_results_last_ckpt_only.csv"), law="sensitivity"))
    assert len(found.optima) == 81
    said = [v for v in found.verdicts if v.code == "repeated_losses"]
    assert {v.severity for v in said} == {"info", "caution"}  # listed twice; and one loss under two rates
    assert any("losses were rounded, or some rows carry the wrong rate" in v.message for v in said)
    refused = [each for each in found.optima if each.refused]
    assert len(refused) > 40  # most sweeps end at their best rate
    assert found.laws["learning_rate"].optima == 81 - len(refused)
