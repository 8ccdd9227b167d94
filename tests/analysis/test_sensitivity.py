"""Sensitivity over one range, laws of the optimum, rules judged: oracles, planted powers and published figures."""

import json
import re
from itertools import product

import numpy as np
import pandas as pd
import pytest

from analysis import Sensitivity, fit, judge_rule, load_runs, read_table, write_optimum
from analysis.sensitivities import sensitivity, wortsman
from analysis.swept import swept_groups
from analysis.uncertainty import UNKNOWN
from sweeps.errors import InputError
from sweeps.store import open_store
from tests.analysis.fans import RATES, SIZES, best_rate, fan
from tests.analysis.synthetic import Run, codes, interpolated_budgets, published
from tests.analysis.test_optima import STEP_LAW, one

WORTSMAN = [3.3, 3.1, 3.0, 3.02, 3.1, 3.5, 12.0]
SEVEN = 1e-3 * 2.0 ** np.arange(7)


def rule_lr(N, D):
    return 1.79 * N**-0.713 * D**0.307


def rule_batch(N, D):
    return 0.58 * D**0.571


# --- Wortsman et al. ---------------------------------------------------------------------------------------------


def test_sensitivity_of_the_worked_example() -> None:
    (found,) = sensitivity(one(SEVEN, WORTSMAN, loss_at_start=10.8)).optima
    assert found.sensitivity.value == pytest.approx(1.26, abs=1e-9)


def test_a_diverged_run_counts_as_the_loss_at_start() -> None:
    table = one(SEVEN, WORTSMAN, loss_at_start=10.8, state="finished")
    table.loc[6, ["loss", "state"]] = [np.nan, "diverged"]
    assert sensitivity(table).optima[0].sensitivity.value == pytest.approx(1.26, abs=1e-9)
    kept = table.assign(loss=[*WORTSMAN[:6], 4.0])  # where it stood when it was given up is no loss of a trained model
    assert sensitivity(kept).optima[0].sensitivity.value == pytest.approx(1.26, abs=1e-9)
    named = table.drop(columns="loss_at_start").assign(tokenizer="bpe-49021-0123abcd")  # ln V = 10.8
    assert sensitivity(named).optima[0].sensitivity.value == pytest.approx(1.26, abs=1e-4)
    unknown = sensitivity(table.drop(columns="loss_at_start"))
    assert np.isnan(unknown.optima[0].sensitivity.value)
    assert "start_unknown" in codes(unknown)


def test_states_of_other_tools_are_read_and_only_finished_and_diverged_runs_count() -> None:
    table = one([*SEVEN, 0.016, 0.016, 0.016], [*WORTSMAN, 1.0, 1.1, 1.2], loss_at_start=10.8)
    table["State"] = [*["Finished"] * 6, " Diverged", "RUNNING", "crashed", "killed"]
    found = sensitivity(table)
    assert found.optima[0].sensitivity.value == pytest.approx(1.26, abs=1e-9)
    assert (found.runs, found.diverged) == (7, 1)
    assert {"partial", "excluded_runs"} <= codes(found)
    assert {why.split(",")[0] for why in found.left_out} == {"state crashed", "state killed"}


def test_all_sizes_share_the_range_that_every_grid_covers() -> None:
    long = one(SEVEN, WORTSMAN, loss_at_start=10.8)
    short = one(SEVEN[1:6], WORTSMAN[1:6], loss_at_start=10.8).assign(N=2e6)
    found = sensitivity(pd.concat([long, short]))
    assert found.range == pytest.approx((0.002, 0.032))
    expected = np.mean(WORTSMAN[1:6]) - 3.0
    assert [each.sensitivity.value for each in found.optima] == pytest.approx([expected, expected])
    assert "narrow_range" in codes(found)
    apart = sensitivity(pd.concat([long, short.assign(learning_rate=short["learning_rate"] * 1000)]))
    assert "no_common_range" in codes(apart)
    assert all(np.isnan(each.sensitivity.value) for each in apart.optima)


def test_no_grid_is_called_the_narrowest_where_grids_of_one_width_stand_apart() -> None:
    short, long = one(SEVEN[1:6], WORTSMAN[1:6]), one(SEVEN, WORTSMAN).assign(N=2e6)
    apart = one(SEVEN, WORTSMAN).assign(N=3e6, learning_rate=lambda t: 4 * t["learning_rate"])
    told = {}
    for name, tables in (("narrow", [short, long]), ("apart", [long, apart])):
        (said,) = [v.message for v in sensitivity(pd.concat(tables)).verdicts if v.code == "narrow_range"]
        told[name] = "has the narrowest grid" in said
    assert told == {"narrow": True, "apart": False}


def test_losses_that_are_all_equal_have_a_sensitivity_of_zero_and_no_scatter() -> None:
    flat = pd.concat([one(SEVEN, [4.653] * 7).assign(seed=seed) for seed in range(2)])
    found = sensitivity(pd.concat([flat, flat.assign(N=2e6, loss=3.0)]))
    assert [each.sensitivity.value for each in found.optima] == [0.0, 0.0]
    assert "residuals_exceed_noise" not in codes(found)


def test_a_start_that_no_run_got_below_is_not_known() -> None:
    """Such as a start in bits per byte: losses capped at it would all lie below the best."""
    plain, wrong = one(SEVEN, WORTSMAN), one(SEVEN, WORTSMAN, loss_at_start=1.0)
    assert sensitivity(wrong).optima[0].sensitivity.value == sensitivity(plain).optima[0].sensitivity.value > 0


def test_grids_of_other_spacing_are_interpolated_onto_one() -> None:
    dense = one(np.geomspace(1e-3, 0.064, 25)).assign(N=2e6)
    coarse, fine = sensitivity(pd.concat([one(SEVEN), dense])).optima
    assert coarse.sensitivity.value == pytest.approx(fine.sensitivity.value, rel=0.1)


def test_noise_widens_the_sensitivity_by_its_own_size() -> None:
    groups = swept_groups(fan(sizes=(1e6,), noise=0.003)).groups
    (value,), _, _ = wortsman(groups, UNKNOWN)
    assert np.isnan(value.interval).all()
    (found,) = sensitivity(fan(sizes=(1e6,), noise=0.003)).optima
    low, high = found.sensitivity.interval
    assert low < found.sensitivity.value < high < low + 0.05


def test_a_batch_is_one_level_however_many_seeds_its_rates_have() -> None:
    once = one(SEVEN, WORTSMAN, loss_at_start=10.8, seed=0)
    again = [once[1:4].assign(seed=k, loss=once["loss"] * (1 + 1e-4 * k)) for k in (1, 2)]
    expected = sensitivity(pd.concat([once, *again]))
    found = sensitivity(pd.concat([once, *again]).assign(batch_tokens=131_072.0))  # ln 131072 is no round number
    assert found.range == expected.range == pytest.approx((0.001, 0.064))
    assert found.optima[0].sensitivity.value == expected.optima[0].sensitivity.value


def test_batches_that_were_merged_are_one_level() -> None:
    table = one(SEVEN, WORTSMAN, loss_at_start=10.8)
    found = sensitivity(table.assign(batch_tokens=np.where(np.arange(7) % 2, 500_000.0, 499_712.0)))
    assert found.range == pytest.approx((0.001, 0.064))
    assert found.optima[0].sensitivity.value == pytest.approx(1.26, abs=1e-9)
    (batch,) = found.optima[0].points["batch_tokens"].unique()
    assert 499_712 < batch < 500_000


# --- laws --------------------------------------------------------------------------------------------------------


def test_planted_powers_in_size_and_tokens_come_back() -> None:
    law = sensitivity(fan(tokens=(5e7, 1e8, 4e8), family="llama")).laws["llama/learning_rate"]
    assert (law.family, law.optima, law.refused) == ("llama", 15, False)
    for name, power in (("N", -0.2), ("D", 0.1)):
        low, high = law.powers[name].interval
        assert low < power < high < low + 0.05
    assert law.range["N"] == (SIZES[0], SIZES[-1])
    assert law.predict(N=1e6, D=2e8) == pytest.approx(best_rate(1e6, 2e8), rel=0.02)


@pytest.mark.parametrize("method", ["quadratic", "near-best"])
def test_settings_in_words_that_were_crossed_have_a_law_each(method) -> None:
    crossed = [fan(seeds=1, family="llama").assign(optimizer=name, precision="bf16") for name in ("adamw", "lion")]
    laws = sensitivity(pd.concat(crossed), method=method, resamples=50).laws
    assert list(laws) == ["llama optimizer=adamw/learning_rate", "llama optimizer=lion/learning_rate"]
    assert laws["llama optimizer=lion/learning_rate"].recipe["optimizer"] == "lion"


def test_a_power_that_the_design_does_not_tell_is_left_out() -> None:
    one_horizon = sensitivity(fan()).laws["learning_rate"]
    assert list(one_horizon.powers) == ["N"]
    assert "not_identifiable" in codes(one_horizon)
    tied = pd.concat([fan(sizes=(N,), tokens=(20 * N,)) for N in SIZES])
    law = sensitivity(tied).laws["learning_rate"]
    assert list(law.powers) == ["N"]
    assert law.powers["N"].value == pytest.approx(-0.1, abs=0.02)  # -.2 + .1 along D = 20 N
    assert "moves together with N" in law.verdicts[0].message


def test_refused_optima_do_not_enter_and_two_make_no_law() -> None:
    table = fan()
    cut = table[(table["N"] > 1e5) | (table["learning_rate"] < 0.005)]
    law = sensitivity(cut).laws["learning_rate"]
    assert law.optima == 4
    assert "excluded_runs" in codes(law)
    few = sensitivity(fan(sizes=SIZES[:2])).laws["learning_rate"]
    assert few.refused
    assert np.isnan(few.value.value)
    assert few.powers == {}
    assert codes(few) == {"too_few_optima"}


@pytest.mark.parametrize(("top", "words"), [(True, "largest .* too low"), (False, "smallest .* too high")])
def test_many_optima_lost_at_one_edge_are_said_to_bend_the_law(top, words) -> None:
    table = fan(tokens=(5e7, 1e8, 2e8))
    tried = table["learning_rate"]
    law = sensitivity(table[tried < 0.015 if top else tried > 0.007]).laws["learning_rate"]
    assert 3 <= law.optima <= 12
    (said,) = [v for v in law.verdicts if v.code == "outcome_selection"]
    assert said.severity == "caution"
    assert re.search(words, said.message)
    assert said.evidence["lost"] > 1
    assert "outcome_selection" not in codes(sensitivity(table).laws["learning_rate"])


def test_optima_that_scatter_more_than_their_noise_widen_the_interval() -> None:
    def width(table: pd.DataFrame) -> float:
        low, high = sensitivity(table).laws["learning_rate"].powers["N"].interval
        return high - low

    table = fan(noise=0.0005)
    shaken = table.assign(
        learning_rate=table["learning_rate"] * table["N"].map(dict(zip(SIZES, (1, 1.3, 0.8, 1.2, 1))))
    )
    assert width(shaken) > 5 * width(table)
    assert "line_misfit" in codes(sensitivity(shaken).laws["learning_rate"])


def test_families_and_parametrisations_have_laws_of_their_own() -> None:
    both = pd.concat([fan(family="llama"), fan(family="gpt2")])
    assert set(sensitivity(both).laws) == {"llama/learning_rate", "gpt2/learning_rate"}
    kinds = pd.concat([fan(family="llama", parametrisation="mup"), fan(family="llama", parametrisation="standard")])
    found = sensitivity(kinds)
    assert set(found.laws) == {"llama mup/learning_rate", "llama standard/learning_rate"}
    assert found.laws["llama mup/learning_rate"].recipe["parametrisation"] == "mup"


def test_at_fixed_batches_the_rate_has_a_power_of_the_batch() -> None:
    parts = []
    for batch in (1e4, 2e4, 4e4):
        part = fan(batch_tokens=batch)
        parts.append(part.assign(learning_rate=part["learning_rate"] * (batch / 1e4) ** 0.5))
    law = sensitivity(pd.concat(parts), axes=("learning_rate",)).laws["learning_rate"]
    assert law.powers["batch_tokens"].value == pytest.approx(0.5, abs=0.03)
    assert law.powers["N"].value == pytest.approx(-0.2, abs=0.02)


def test_runs_of_one_trunk_are_said_to_depend_on_each_other() -> None:
    table = fan(tokens=(5e7, 1e8)).assign(cell=lambda t: [f"c{i}" for i in range(len(t))])
    assert "dependent_runs" not in codes(sensitivity(table.assign(trunk=table["cell"])))
    trunk = table["N"].astype(str) + table["learning_rate"].astype(str) + table["seed"].astype(str)
    assert "dependent_runs" in codes(sensitivity(table.assign(trunk=trunk)))


# --- on disk -----------------------------------------------------------------------------------------------------


def test_the_optimum_is_kept_in_the_form_that_rules_read(study) -> None:
    store = open_store(study())
    runs = load_runs("demo", store)
    found = sensitivity(fan(tokens=(5e7, 2e8), family="llama"))
    path = write_optimum(found, runs, "demo", store)
    kept = json.loads(path.read_text())
    assert path.name == "optimum.json"
    assert {"corpus", "tokenizer", "context", "written", "laws", "optima"} <= set(kept)
    (law,) = kept["laws"]
    assert law["hyperparameter"] == "learning_rate"
    assert law["family"] == "llama"
    assert set(law["powers"]) == set(law["at"]) == set(law["range"]) == {"N", "D"}
    assert set(law["intervals"]) == {"value", "N", "D"}
    assert isinstance(law["value"], float)
    assert isinstance(law["powers"]["N"], float)
    assert len(kept["optima"]) == 10
    assert kept["optima"][0]["points"][0]["count"] == 3


def test_a_study_is_measured_with_its_own_losses_at_start(study) -> None:
    rates = 0.01 * 2.0 ** np.arange(-3, 4)
    runs = [
        Run(
            width=width,
            tokens=1_000_448,
            seed=seed,
            changes={"learning_rate": float(rate)},
            loss=4.0 * np.exp(0.03 * np.log(rate / 0.01) ** 2) + 0.002 * seed,
            state="diverged" if rate == rates[-1] else "finished",
        )
        for width, rate, seed in product((16, 32, 64), rates, (0, 1))
    ]
    table = load_runs("demo", open_store(study(runs)))
    assert table["loss_at_start"].eq(5.5).all()
    found = sensitivity(table)
    assert [each.best["learning_rate"].value for each in found.optima] == pytest.approx([0.01] * 3, rel=0.03)
    assert found.diverged == 6
    losses = [each.points["loss"].iloc[:-1] for each in found.optima]
    expected = [(y.sum() + 5.5) / 7 - y.min() for y in losses]
    assert [each.sensitivity.value for each in found.optima] == pytest.approx(expected)
    law = found.laws["llama/learning_rate"]
    assert law.powers["N"].value == pytest.approx(0.0, abs=0.02)
    assert law.recipe["batch_tokens"] == 512
    assert {v.target for v in law.verdicts if v.code == "not_identifiable"} == {"D"}


def test_a_table_of_optima_has_a_row_per_group() -> None:
    found = sensitivity(fan())
    assert isinstance(found, Sensitivity)
    table = found.table()
    assert len(table) == 5
    assert (table["learning_rate_low"] < table["learning_rate_best"]).all()
    assert (table["runs"] == len(RATES) * 3).all()


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"noise": -1.0}, {"level": 1.0}, {"method": "cubic"}])
def test_options_that_make_no_sense_are_input_errors(options) -> None:
    with pytest.raises(InputError):
        sensitivity(fan(), **options)


# --- published runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step_law() -> pd.DataFrame:
    return read_table(published("step-law-dense/dense_lr_bs_loss.csv"), STEP_LAW, "sensitivity")


def test_the_rule_of_step_laws_repository_is_reproduced(step_law) -> None:
    laws = sensitivity(step_law, method="near-best").laws
    rate, batch = laws["learning_rate"], laws["batch_tokens"]
    assert rate.optima == 129
    for law, name, value, error in (
        (rate, "N", -0.766, 0.054),
        (rate, "D", 0.197, 0.033),
        (batch, "D", 0.613, 0.039),
    ):
        assert law.powers[name].value == pytest.approx(value, abs=6e-4)
        assert law.draws[name].std() == pytest.approx(error, abs=0.003)


def test_quadratics_agree_with_it_within_both_intervals(step_law) -> None:
    laws = sensitivity(step_law).laws
    assert laws["learning_rate"].powers["N"].value == pytest.approx(-0.766, abs=0.06)
    assert laws["learning_rate"].powers["D"].value == pytest.approx(0.197, abs=0.06)
    low, high = laws["learning_rate"].powers["N"].interval
    assert low < -0.713 < high  # as published


def test_the_published_law_costs_little_on_their_grids(step_law) -> None:
    told = judge_rule(step_law, {"learning_rate": rule_lr, "batch_tokens": rule_batch})
    assert len(told) == 17
    assert told["excess"].mean() == pytest.approx(0.0012, abs=1e-4)
    assert told["excess"].max() == pytest.approx(0.0024, abs=1e-4)


def test_a_rule_outside_the_grid_is_not_judged_and_of_the_rate_alone_it_is() -> None:
    told = judge_rule(fan(noise=0.0, seeds=1), {"learning_rate": lambda N, D: best_rate(N) * 2.0**0.5})
    assert told["excess"].to_numpy() == pytest.approx(np.exp(0.025 * np.log(2.0**0.5) ** 2) - 1.0, rel=1.0, abs=0.01)
    assert judge_rule(fan(), {"learning_rate": lambda N, D: 10.0})["excess"].isna().all()
    with pytest.raises(InputError, match="cannot be judged"):
        judge_rule(fan(), {"weight_decay": rule_lr})


def test_choosing_misfittings_learning_rate_moves_the_isoflop_exponent() -> None:
    table = read_table(published("misfitting/scaling_results_last_ckpt_only.csv"), law="sensitivity")

    def exponent(runs: pd.DataFrame) -> float:
        return fit(interpolated_budgets(runs), law="isoflop", resamples=50).params["N_exponent"]

    best = exponent(table.sort_values("loss").drop_duplicates(["N", "D"]))
    fixed = exponent(table[table["learning_rate"] == 0.002].sort_values("loss").drop_duplicates(["N", "D"]))
    assert best == pytest.approx(0.500, abs=0.02)
    assert abs(fixed - best) > 0.02
