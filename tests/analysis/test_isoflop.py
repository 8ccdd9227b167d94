"""IsoFLOP fits: the known biases of the parabola, honest intervals, and a refusal for every surface that earns one."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis import read_table
from analysis.fitting import fit
from analysis.isoflop import assumed_noise, fit_isoflop, parabola
from analysis.laws import CHINCHILLA
from analysis.selection import select
from analysis.uncertainty import Noise
from sweeps.errors import InputError
from tests.analysis.closed import closed_form
from tests.analysis.synthetic import LAW, budgets_table, codes, published

BES = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
HOFFMANN = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
BUDGETS = (1e11, 4e11, 1.6e12, 6.4e12)


def test_parabola_finds_its_vertex() -> None:
    x = np.log([1e8, 2e8, 4e8, 8e8, 1.6e9])
    found = parabola(x, 3 + 0.05 * (x - np.log(5e8)) ** 2)
    assert np.exp(found.vertex) == pytest.approx(5e8, rel=1e-9)
    assert found.curve[2] == pytest.approx(0.05, rel=1e-9)


@pytest.mark.parametrize(
    ("law", "reach", "ratio"),
    [
        *((BES, 2, 0.99894), (BES, 4, 0.99576), (BES, 8, 0.99048), (BES, 16, 0.98313)),
        *((HOFFMANN, 2, 1.00355), (HOFFMANN, 4, 1.01427), (HOFFMANN, 8, 1.03239), (HOFFMANN, 16, 1.05829)),
    ],
)
def test_bias_of_the_vertex_is_the_known_one(law, reach, ratio) -> None:
    best = float(closed_form(1e21, law).N)
    N = best * np.geomspace(1 / reach, reach, 9)
    found = parabola(np.log(N), CHINCHILLA({"N": N, "D": 1e21 / 6 / N}, law))
    assert np.exp(found.vertex) / best == pytest.approx(ratio, abs=1e-5)


@pytest.mark.parametrize(("law", "exponent"), [(BES, 0.512612), (HOFFMANN, 0.451613)])
def test_bias_does_not_reach_the_exponents(law, exponent) -> None:
    table = budgets_table([1e19, 1e20, 1e21, 1e22], law=law, sizes=9)
    found = fit(table, "isoflop")
    assert found.params["N_exponent"] == pytest.approx(exponent, abs=2e-4)
    assert found.params["D_exponent"] == pytest.approx(1 - exponent, abs=2e-4)


def test_clean_study_raises_no_verdict() -> None:
    found = fit(budgets_table(BUDGETS, seeds=3, noise=0.002), "isoflop")
    assert codes(found) == set()
    assert all(b.accepted for b in found.budgets)
    assert found.noise["source"] == "seeds"
    assert found.noise["freedom"] == 4 * 7 * 2
    assert found.noise["sd"] == pytest.approx(0.002, rel=0.25)
    for b in found.budgets:
        best = closed_form(b.C, LAW)
        assert b.N.value == pytest.approx(float(best.N), rel=0.05)
        assert b.loss.value == pytest.approx(float(best.loss), rel=0.005)
        assert b.D.value * b.N.value * 6 == pytest.approx(b.C, rel=1e-6)
        assert b.tokens_per_parameter.value == pytest.approx(b.D.value / b.N.value)
        assert b.N.interval[0] < b.N.value < b.N.interval[1]
        assert b.D.interval[0] < b.D.value < b.D.interval[1]


def test_minimum_loss_of_exact_data() -> None:
    found = fit(budgets_table(BUDGETS, reach=2.0), "isoflop")
    for b in found.budgets:
        assert b.loss.value == pytest.approx(float(closed_form(b.C, LAW).loss), rel=1e-4)


def test_target_lies_on_the_fitted_line() -> None:
    found = fit(budgets_table(BUDGETS, seeds=3, noise=0.002), "isoflop", targets=[2e13])
    (target,) = found.decisions["targets"]
    best = closed_form(2e13, LAW)
    assert target["N"].interval[0] < float(best.N) < target["N"].interval[1]
    assert target["N"].value == pytest.approx(
        found.params["N_coefficient"] * 2e13 ** found.params["N_exponent"], rel=1e-9
    )
    assert target["N"].value * target["D"].value * 6 == pytest.approx(2e13, rel=1e-6)
    assert target["extrapolation"] == pytest.approx(2e13 / 6.4e12)


def test_same_seed_same_intervals_other_seed_nearly_so() -> None:
    table = budgets_table(BUDGETS, seeds=3, noise=0.002)
    one, same, other = (fit(table, "isoflop", seed=s).intervals["N_exponent"] for s in (0, 0, 1))
    assert one == same
    assert other == pytest.approx(one, abs=0.01)


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    inside, count = 0, 300
    for seed in range(count):
        table = budgets_table(BUDGETS, reach=3.0, sizes=5, seeds=2, noise=0.004, seed=seed)
        low, high = fit(table, "isoflop", resamples=400, seed=seed).intervals["N_exponent"]
        inside += low <= 0.5 <= high
    assert 0.91 <= inside / count <= 0.99


# --- refusals ----------------------------------------------------------------------------------------------------


def spoiled(budget: int, change) -> dict[str, object]:
    """A fit to a good table whose losses at one budget were changed: change(ln N - ln N*, ln loss) -> ln loss."""
    table = budgets_table(BUDGETS, seeds=3, noise=0.001)
    here = table["budget"] == BUDGETS[budget]
    x = np.log(table["N"][here])
    table.loc[here, "loss"] = np.exp(change(x - x.mean(), np.log(table["loss"][here])))
    return fit(table, "isoflop")


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("no_minimum", lambda x, y: y.mean() - 0.05 * (y - y.mean()) - 0.02 * x**2),
        ("edge_minimum", lambda x, y: y + 0.3 * x),
        ("edge_minimum", lambda x, y: y - 0.3 * x),
    ],
)
def test_budget_without_an_interior_minimum_is_refused_alone(code, change) -> None:
    found = spoiled(0, change)
    first, *rest = found.budgets
    assert [v.code for v in found.verdicts if v.severity == "refuse"] == [code]
    assert not first.accepted
    assert np.isnan(first.N.value)
    assert np.isnan(first.D.value)
    assert all(b.accepted for b in rest)
    assert found.params["N_exponent"] == pytest.approx(0.5, abs=0.03)  # from the three that remain


def test_edge_minimum_says_where_to_add_sizes() -> None:
    message = next(v.message for v in spoiled(1, lambda x, y: y - 0.3 * x).verdicts if v.code == "edge_minimum")
    assert "larger" in message


def test_minimum_that_noise_throws_about_is_refused() -> None:
    table = budgets_table(BUDGETS, seeds=2, noise=0.003)
    here = table["budget"] == BUDGETS[0]
    x = np.log(table["N"][here]) - np.log(table["N"][here]).mean()
    middle = float(np.log(table["loss"][here]).mean())
    table.loc[here, "loss"] = np.exp(middle + 1e-4 * x**2 + np.where(table["seed"][here] == 0, 3e-3, -3e-3))
    found = fit(table, "isoflop")
    assert {(v.code, v.target) for v in found.verdicts if v.severity == "refuse"} == {("unstable_minimum", "1e11")}


def test_two_sizes_are_too_few() -> None:
    table = budgets_table(BUDGETS, seeds=2, noise=0.001)
    first = table["budget"] == BUDGETS[0]
    found = fit(table[~first | (table["N"].rank(method="dense") <= 2)], "isoflop")
    assert codes(found, "refuse") == {"too_few_sizes"}
    assert found.budgets[0].losses


def test_three_sizes_are_cautioned() -> None:
    found = fit(budgets_table(BUDGETS, sizes=3, seeds=2, noise=0.001), "isoflop")
    assert codes(found) == {"no_residual_freedom"}


def test_two_budgets_give_minima_but_no_power_law() -> None:
    found = fit(budgets_table(BUDGETS[:2], seeds=2, noise=0.001), "isoflop", targets=[1e13])
    assert codes(found, "refuse") == {"too_few_budgets", "no_power_law"}
    assert not found.refused
    assert np.isnan(list(found.params.values())).all()
    assert np.isnan(found.decisions["targets"][0]["N"].value)
    assert all(b.accepted and b.N.value > 0 for b in found.budgets)


def test_no_budgets_at_all_is_a_refusal_not_a_crash() -> None:
    table = budgets_table(BUDGETS).assign(budget=np.nan)
    found = fit(table, "isoflop", targets=[1e13])
    assert found.budgets == ()
    assert found.refused
    assert codes(found, "refuse") == {"too_few_budgets", "no_power_law"}
    assert len(found.excluded) == len(table)


def test_far_target_is_refused_alone() -> None:
    found = fit(budgets_table(BUDGETS, seeds=2, noise=0.001), "isoflop", targets=[1e13, 1e14, 1e16])
    near, far, too_far = found.decisions["targets"]
    assert np.isfinite([near["N"].value, far["N"].value]).all()
    assert np.isnan(too_far["N"].value)
    said = [(v.severity, v.target) for v in found.verdicts if v.code == "extrapolation"]
    assert said == [("caution", "1e14"), ("refuse", "1e16")]


def test_a_target_is_measured_from_the_budgets_that_the_line_rests_on() -> None:
    near = budgets_table((1e17, 3e17, 1e18, 3e18), seeds=2, noise=0.001)
    edge = budgets_table((1e21,), shift=20.0, seeds=2, noise=0.001)
    found = fit(pd.concat([near, edge], ignore_index=True), "isoflop", targets=[1e21, 9e21])
    assert [b.accepted for b in found.budgets] == [True] * 4 + [False]
    between, beyond = found.decisions["targets"]
    assert between["extrapolation"] == pytest.approx(1e21 / 3e18)
    assert beyond["extrapolation"] == pytest.approx(3000.0)
    assert np.isnan(beyond["N"].value)
    said = [v for v in found.verdicts if v.code == "extrapolation"]
    assert [(v.severity, v.target) for v in said] == [("caution", "1e21"), ("refuse", "9e21")]
    assert "times the dearest budget with a usable minimum" in said[0].message, "a run of 1e21 there was"


# --- cautions ----------------------------------------------------------------------------------------------------


def test_off_centre_and_wide_grids_are_cautioned() -> None:
    found = fit(budgets_table(BUDGETS, shift=2.5, reach=3.0, seeds=3, noise=0.001), "isoflop")
    assert codes(found, "caution") == {"off_centre", "wide_grid"}


def test_weak_curvature_is_cautioned() -> None:
    found = fit(budgets_table(BUDGETS, reach=1.7, seeds=2, noise=0.008, seed=4), "isoflop")
    assert codes(found, "caution") & {"weak_curvature", "unstable_minimum"}


def test_open_interval_is_open_in_the_json() -> None:
    table = budgets_table(BUDGETS, reach=2.2, sizes=5, seeds=2, noise=0.012, seed=11)
    found = fit(table, "isoflop")
    opened = [b for b in found.budgets if b.accepted and np.isnan(b.N.interval).any()]
    assert opened
    assert "open_interval" in codes(found)
    low, high = opened[0].N.interval
    d_low, d_high = opened[0].D.interval
    assert (np.isnan(low), np.isnan(high)) == (np.isnan(d_high), np.isnan(d_low))


def test_without_seeds_the_residuals_stand_in_and_it_is_said() -> None:
    found = fit(budgets_table(BUDGETS, noise=0.002).drop(columns="seed"), "isoflop")
    assert codes(found) == {"noise_from_residuals"}
    assert found.noise["source"] == "residuals"
    assert found.noise["sd"] == pytest.approx(0.002, rel=0.5)


def test_without_any_freedom_there_are_no_intervals() -> None:
    found = fit(budgets_table(BUDGETS, sizes=3).drop(columns="seed"), "isoflop")
    assert "noise_unknown" in codes(found)
    assert found.params["N_exponent"] == pytest.approx(0.5, abs=1e-3)
    assert np.isnan(found.intervals["N_exponent"]).all()


def test_scatter_beyond_the_seeds_widens_the_intervals() -> None:
    table = budgets_table(BUDGETS, seeds=3, noise=0.0005)
    calm = fit(table, "isoflop")
    bumps = np.random.default_rng(0).normal(0, 0.01, len(BUDGETS) * 7)
    rough = fit(table.assign(loss=table["loss"] * np.exp(np.repeat(bumps, 3))), "isoflop")
    assert "residuals_exceed_noise" in codes(rough)
    width = [np.ptp(f.intervals["N_exponent"]) for f in (calm, rough)]
    assert width[1] > 5 * width[0]


def test_minima_off_their_line_widen_the_exponents() -> None:
    table = budgets_table(BUDGETS, seeds=3, noise=0.0005)
    shift = table["budget"].map(dict(zip(BUDGETS, (1.0, 1.5, 1.0, 1.5))))
    found = fit(table.assign(N=table["N"] * shift, D=table["D"] / shift), "isoflop")
    assert "line_misfit" in codes(found)
    assert np.ptp(found.intervals["N_exponent"]) > 0.1


def test_given_noise_replaces_the_measured_one() -> None:
    table = budgets_table(BUDGETS, seeds=3, noise=0.001)
    found = fit(table, "isoflop", noise=0.01)
    assert found.noise["source"] == "given"
    assert np.ptp(found.intervals["N_exponent"]) > 5 * np.ptp(fit(table, "isoflop").intervals["N_exponent"])


def test_sizes_far_from_the_minimum_are_left_out_and_named() -> None:
    found = fit(budgets_table(BUDGETS, reach=64.0, sizes=13, seeds=2, noise=0.001), "isoflop")
    assert "far_sizes" in codes(found, "info")
    for b in found.budgets:
        assert len(b.far) + len(b.sizes) == 13
        assert len(b.sizes) >= 5
        assert min(loss for _, loss in b.far) > np.exp(0.15) * min(b.losses) >= max(b.losses)
    assert found.params["N_exponent"] == pytest.approx(0.5, abs=0.02)


def test_runs_of_unequal_compute_under_one_budget_are_cautioned() -> None:
    table = budgets_table([1e18, 1e19, 1e20], noise=0.002)
    assert "mixed_budget" not in codes(fit(table, "isoflop", resamples=50))
    found = fit(table.assign(budget=1e18), "isoflop", resamples=50)
    (told,) = [v for v in found.verdicts if v.code == "mixed_budget"]
    assert (told.severity, told.scope) == ("caution", "budget")
    assert "differ by a factor of 100 in compute" in told.message


def test_budgets_stand_in_the_order_of_their_compute_whatever_they_are_called() -> None:
    table = budgets_table([1e18, 1e19, 1e20], noise=0.002)
    found = fit(table.assign(budget=1e38 / table["budget"]), "isoflop", resamples=50)
    assert [round(np.log10(b.C)) for b in found.budgets] == [18, 19, 20]
    assert found.params == fit(table, "isoflop", resamples=50).params


def test_budgets_are_found_from_compute_where_no_column_names_them() -> None:
    table = budgets_table(BUDGETS, seeds=2, noise=0.001).drop(columns="budget")
    table["D"] *= 1.0 + np.random.default_rng(0).uniform(-0.01, 0.01, len(table))
    table["C"] = 6 * table["N"] * table["D"]
    found = fit(table, "isoflop")
    assert [b.budget for b in found.budgets] == pytest.approx(BUDGETS, rel=0.01)


@pytest.mark.parametrize("method", ["parabola", "akima"])
def test_a_size_and_a_budget_of_one_seed_in_single_precision_are_the_same(method) -> None:
    table = budgets_table(BUDGETS, seeds=2, noise=0.003)
    names = ["N", "budget"]
    single = table[names].astype("float32").astype(float).where(table["seed"] == 1, table[names], axis=0)
    one, other = (fit_isoflop(select(t), method=method, resamples=100) for t in (table, table.assign(**single)))
    assert [b.runs for b in other.budgets] == [b.runs for b in one.budgets]
    assert other.params == pytest.approx(one.params, rel=1e-4)


def test_cloud_of_runs_is_no_budget() -> None:
    table = budgets_table(BUDGETS).drop(columns="budget")
    table["C"] = np.geomspace(1e11, 2e11, len(table))
    found = fit(table, "isoflop")
    assert found.budgets == ()
    assert "belongs to no compute budget" in {e["reason"] for e in found.excluded}


def test_level_sets_the_width_of_the_intervals() -> None:
    table = select(budgets_table(BUDGETS, seeds=3, noise=0.002))
    wide, narrow = (fit_isoflop(table, level=level).intervals["N_exponent"] for level in (0.95, 0.8))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_fit_names_the_level_of_its_intervals() -> None:
    found = fit_isoflop(select(budgets_table(BUDGETS, seeds=3, noise=0.002)), level=0.8)
    assert found.level == found.to_json()["level"] == 0.8


@pytest.mark.parametrize(("option", "word"), [({"method": "akimo"}, "akima"), ({"height": 0.0}, "positive")])
def test_wrong_options_are_named(option, word) -> None:
    with pytest.raises(InputError, match=word):
        fit_isoflop(select(budgets_table(BUDGETS)), **option)


# --- splines -----------------------------------------------------------------------------------------------------


def test_spline_finds_the_minimum_of_a_wide_lopsided_grid_where_the_parabola_does_not() -> None:
    law = {"E": 1.0, "A": 2000.0, "B": 50.0, "alpha": 0.8, "beta": 0.28}
    selection = select(budgets_table([1e10, 1e11, 1e12, 1e13], law=law, reach=32.0, sizes=13, seeds=2, noise=2e-4))
    off = {}
    for method in ("parabola", "akima"):
        found = fit_isoflop(selection, method=method, height=np.inf)
        off[method] = [abs(np.log(b.N.value / float(closed_form(b.C, law).N))) for b in found.budgets]
    assert max(off["akima"]) < 0.1
    assert min(off["parabola"]) > 0.2


def test_clean_splines_give_the_law_and_raise_no_verdict() -> None:
    found = fit_isoflop(select(budgets_table(BUDGETS, seeds=3, noise=0.001)), method="akima", targets=[2e13])
    assert codes(found) == set()
    assert found.params["N_exponent"] == pytest.approx(0.5, abs=0.03)
    low, high = found.intervals["N_exponent"]
    assert low < 0.5 < high
    for b in found.budgets:
        best = closed_form(b.C, LAW)
        assert b.N.interval[0] < b.N.value < b.N.interval[1]
        assert b.N.value == pytest.approx(float(best.N), rel=0.15)
        assert b.loss.value == pytest.approx(float(best.loss), rel=0.003)
    assert found.decisions["targets"][0]["N"].value == pytest.approx(float(closed_form(2e13, LAW).N), rel=0.1)


def test_spline_refuses_minima_at_the_edge() -> None:
    table = budgets_table(BUDGETS, seeds=3, noise=0.001)
    first = table["budget"] == BUDGETS[0]
    table.loc[first, "loss"] *= (table["N"][first] / 1e4) ** 0.3
    found = fit_isoflop(select(table), method="akima")
    assert {(v.code, v.target) for v in found.verdicts if v.severity == "refuse"} == {("edge_minimum", "1e11")}
    assert not found.budgets[0].accepted
    assert found.params["N_exponent"] == pytest.approx(0.5, abs=0.05)


def test_spline_drops_budgets_whose_minimum_leaves_the_grid_in_most_copies() -> None:
    table = budgets_table(BUDGETS, seeds=1, noise=0.0)
    flat = table["budget"] == BUDGETS[1]
    middle = table["N"] == table["N"][flat].median()
    table.loc[flat, "loss"] = np.where(middle[flat], 2.9999, 3.0)
    ends = table["N"].isin([table["N"][flat].min(), table["N"][flat].max()])
    table = table[~flat | middle | ends]
    found = fit_isoflop(select(table), method="akima")
    assert ("unstable_minimum", "refuse", "4e11") in {(v.code, v.severity, v.target) for v in found.verdicts}


def test_spline_keeps_the_best_of_each_size_but_the_mean_of_its_seeds() -> None:
    table = budgets_table(BUDGETS)
    worse = table.assign(loss=table["loss"] * 1.05)
    tried = select(pd.concat([table, worse], ignore_index=True).assign(seed=0))
    seeded = select(pd.concat([table, worse.assign(seed=1)], ignore_index=True))
    best, mean = (fit_isoflop(s, method="akima", resamples=20).budgets[0] for s in (tried, seeded))
    assert best.losses == pytest.approx(table["loss"][:7].to_numpy())
    assert mean.losses == pytest.approx(table["loss"][:7].to_numpy() * np.sqrt(1.05))
    assert (best.runs, mean.runs) == ((1,) * 7, (2,) * 7)


def test_unmeasured_noise_of_a_spline_is_assumed_and_it_is_said() -> None:
    found = fit_isoflop(select(budgets_table(BUDGETS).drop(columns="seed")), method="akima")
    assert codes(found) == {"noise_assumed"}
    assert found.noise["source"] == "assumed"


def test_assumed_noise_rises_as_published() -> None:
    assert assumed_noise(np.exp([0.5, 3.0, np.sqrt(18.0), 6.0, 9.0])) == pytest.approx(
        [0.005, 0.005, np.sqrt(0.005 * 0.1), 0.1, 0.1]
    )


# --- published runs ----------------------------------------------------------------------------------------------

CONDITION = ["hparams", "warmup", "decay", "param_count", "val"]


def porian() -> list[tuple[pd.Series, pd.DataFrame]]:
    """(published fit, isoFLOP points) of each of the ten conditions of Porian et al. 2024."""
    table = pd.read_csv(published("porian-isoflop/isoflop_points.csv"))
    fits = pd.read_csv(published("porian-isoflop/published_fits.csv")).set_index(CONDITION)
    named = table.rename(columns={"n": "N", "t": "D", "flops": "budget"}).assign(C=table["flops"])
    return [(fits.loc[key], group) for key, group in named.groupby(CONDITION)]


def test_splines_reproduce_all_ten_exponents_of_porian() -> None:
    conditions = porian()
    assert len(conditions) == 10
    for wanted, points in conditions:
        found = fit_isoflop(select(points), method="akima", resamples=1000)
        assert found.params["N_exponent"] == pytest.approx(wanted["a_exponent"], abs=0.007)
        assert found.params["D_exponent"] == pytest.approx(wanted["b_exponent_tokens"], abs=0.007)


def test_with_their_own_noise_the_intervals_are_theirs_too() -> None:
    """0.002 nats, as they took for these runs, at the losses that matter: those near the minima."""
    for wanted, points in porian():
        lowest = float(points.groupby("budget")["loss"].min().median())
        given = Noise(sd=0.002 / lowest, freedom=np.inf, source="given")
        found = fit_isoflop(replace(select(points), noise=given), method="akima", resamples=1000)
        assert found.params["N_exponent"] == pytest.approx(wanted["a_exponent"], abs=0.002)
        assert found.draws["N_exponent"].std() == pytest.approx(wanted["a_boot_std"], rel=0.2)


@pytest.mark.parametrize(("data", "exponent"), [("comma", 0.405), ("dclm", 0.424), ("nemotron", 0.422)])
def test_marin_exponents_are_those_of_a_plain_refit(data, exponent) -> None:
    """As a user reads either table, by default; and as the refit was done (all sizes, a line without weights)."""
    table = read_table(published("isoflop-marin/isoflops.csv"))
    table = table[table["experiment"].str.contains(data)]
    assert fit(table, "isoflop").params["N_exponent"] == pytest.approx(exponent, abs=0.01)
    raw = read_table(published(f"isoflop-marin/isoflop-{data}.csv"))
    assert fit(raw, "isoflop").params["N_exponent"] == pytest.approx(exponent, abs=0.01)
    named = table.assign(C=table["budget"], C_assumed=False)
    plain = fit_isoflop(select(named), height=np.inf, weighted=False)
    assert plain.params["N_exponent"] == pytest.approx(exponent, abs=0.005)


# --- noise that differs between cells -----------------------------------------------------------------------------


def small_study(seed: int, sd) -> pd.DataFrame:
    """Four budgets of five sizes, three seeds at the centre of the two cheapest; sd(budget, size) of ln loss."""
    generator = np.random.default_rng(seed)
    table = budgets_table(BUDGETS, sizes=5, seed=seed)
    order, size = table["budget"].rank(method="dense").to_numpy(int) - 1, table.groupby("budget").cumcount().to_numpy()
    more = table[(order < 2) & (size == 2)]
    cells = np.append(np.arange(len(table)), np.repeat(more.index.to_numpy(), 2))
    noise = np.array([sd(b, s) for b, s in zip(order, size)])[cells] * generator.standard_normal(len(cells))
    seeds = np.append(np.zeros(len(table), dtype=int), np.tile([1, 2], len(more)))
    grown = table.iloc[cells].reset_index(drop=True)
    return grown.assign(loss=grown["loss"] * np.exp(noise), seed=seeds)


def test_a_few_replicates_do_not_speak_for_all_runs() -> None:
    """Where seeds and scatter agree by their small number alone, copies are drawn with the noise of both."""
    agreed = 0
    for seed in range(20):
        found = fit(small_study(seed, lambda b, s: 0.002 if s == 2 else 0.006), "isoflop", resamples=50)
        if found.noise["source"] == "seeds":
            agreed += 1
            assert found.noise["drawn_freedom"] == found.noise["freedom"] + found.noise["residual_freedom"]
            assert found.noise["sd"] < found.noise["drawn_sd"] < found.noise["residual_sd"]
    assert agreed > 5


def test_noise_that_grows_with_compute_is_told_and_drawn_by_halves() -> None:
    tables = [small_study(seed, lambda b, s: 0.001 * 8 ** (b / 3)) for seed in range(40)]
    found = [fit(table, "isoflop", resamples=400) for table in tables]
    assert np.mean(["uneven_noise" in codes(each, "caution") for each in found]) > 0.5
    for each in (f for f in found if "uneven_noise" in codes(f, "caution")):
        said = next(v for v in each.verdicts if v.code == "uneven_noise")
        assert said.evidence["dearer"] > 1.5 * said.evidence["cheaper"]
        assert each.noise["drawn_sd"] < said.evidence["dearer"]
    even = [fit(small_study(seed, lambda b, s: 0.003), "isoflop", resamples=50) for seed in range(60)]
    assert np.mean(["uneven_noise" in codes(each) for each in even]) < 0.12
