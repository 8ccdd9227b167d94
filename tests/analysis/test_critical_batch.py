"""The critical batch from sweeps and from gradient noise, and the decay's timescale: oracles, noise, refusals."""

import json
from io import BytesIO

import numpy as np
import pandas as pd
import pytest

from analysis.batches import CriticalBatches, critical_batches, fit_critical_batch
from analysis.importance_plots import batch_curves
from analysis.noise_scale import gradient_noise, noise_scales
from analysis.published import published_timescale
from analysis.timescale import decay_timescales
from sweeps.accounting import small_part
from sweeps.errors import InputError
from tests.analysis.synthetic import published

BATCHES = tuple(2.0**k for k in range(10, 19))


def loss_of(effective: np.ndarray | float) -> np.ndarray:
    return np.asarray(1.7 + 400.0 * np.asarray(effective) ** -0.3)


def sweep(
    batches: tuple[float, ...] = BATCHES, critical: float = 3e4, growth: float = 0.0, noise: float = 0.0, seed: int = 0
) -> pd.DataFrame:
    """Runs of five lengths whose tokens count for E_min: D = E_min (1 + B / B_crit(E_min)), B_crit at 1e8 given."""
    generator, rows = np.random.default_rng(seed), []
    worth = np.geomspace(1e6, 1e11, 4001)
    for B in batches:
        cost = worth * (1.0 + B / (critical * (worth / 1e8) ** growth))
        for D in np.geomspace(1e8, 3e9, 5):
            effective = np.interp(D, cost, worth)
            rows += [
                {"family": "llama", "N": 1e6, "D": D, "batch_tokens": B, "learning_rate": rate, "seed": s}
                | {"val_loss_final": float(loss_of(effective)) * off * np.exp(noise * generator.standard_normal())}
                for rate, off in ((1e-3, 1.0), (4e-3, 1.01))
                for s in range(2)
            ]
    return pd.DataFrame(rows)


def codes(result: CriticalBatches) -> set[str]:
    return {str(v.code) for one in result.sweeps for v in one.verdicts} | {str(v.code) for v in result.verdicts}


# --- gradient noise ----------------------------------------------------------------------------------------------


def test_the_two_batch_estimator_gives_the_published_numbers() -> None:
    found = gradient_noise(5.0, 2.0, 10, 100)
    assert found.gradient == pytest.approx(1.666667, rel=1e-6)
    assert found.trace == pytest.approx(33.333333, rel=1e-6)
    assert found.batch.value == pytest.approx(20.0)
    assert np.isnan(found.batch.interval).all()
    assert [v.code for v in found.verdicts] == ["open_interval"], "one row has no spread"


def norms(rows: int, seed: int, dimensions: int = 400, noise: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Squared gradient norms over batches of 4 and 32, the small one a part of the large, |G|^2 = 1."""
    generator = np.random.default_rng(seed)
    true = np.zeros(dimensions)
    true[0] = 1.0
    single = true + noise / np.sqrt(dimensions) * generator.standard_normal((rows, 32, dimensions))
    return np.square(single[:, :4].mean(axis=1)).sum(axis=1), np.square(single.mean(axis=1)).sum(axis=1)


def test_its_interval_covers_the_truth() -> None:
    hits = []
    for seed in range(60):
        found = gradient_noise(*norms(20, seed), 4, 32, seed=seed)
        low, high = found.batch.interval
        hits.append(low < 9.0 < high)
    assert np.mean(hits) > 0.85
    assert gradient_noise(*norms(400, 0), 4, 32).batch.value == pytest.approx(9.0, rel=0.1)


def test_averages_are_divided_and_not_ratios_averaged() -> None:
    small, big = np.array([5.0, 9.0]), np.array([2.0, 1.5])
    found = gradient_noise(small, big, 10, 100)
    ratios = [gradient_noise(s, b, 10, 100).batch.value for s, b in zip(small, big)]
    assert found.batch.value == pytest.approx((4.0 + 7.5 - 0.5) / 2 / 0.09 / ((150 / 90 + 60 / 90) / 2), rel=0.05)
    assert found.batch.value < np.mean(ratios)


def test_a_gradient_lost_in_the_noise_is_refused() -> None:
    found = gradient_noise([5.0, 6.0], [0.3, 0.4], 10, 100)
    assert found.refused
    assert np.isnan(found.batch.value)
    assert found.verdicts[0].code == "noise_scale_negative"
    assert gradient_noise([1.0, 1.1], [2.0, 2.1], 10, 100).refused, "a larger batch has no larger norm"
    with pytest.raises(ValueError, match="no pairs"):
        gradient_noise([1.0], [1.0, 2.0], 10, 100)
    with pytest.raises(ValueError, match="no pairs"):
        gradient_noise([1.0], [1.0], 100, 100)


def test_noise_scales_are_read_from_curves_in_tokens_over_the_last_decade() -> None:
    runs = pd.DataFrame({"cell": ["a", "b"], "family": "llama", "N": 1e5, "D": 1e6, "batch_tokens": 32 * 64.0})
    runs["context"] = 64
    small, big = norms(40, 1)
    rows = {"cell": ["a", "b"] * 20, "tokens": np.linspace(1.1e5, 1e6, 40)}
    curves = pd.DataFrame(rows | {"gradient_norm_small": np.sqrt(small), "gradient_norm": np.sqrt(big)})
    early = curves.assign(tokens=5e4, gradient_norm_small=50.0)
    plain = curves.assign(gradient_norm_small=np.nan)
    (found,) = noise_scales(runs, pd.concat([curves, early, plain]))
    assert small_part(32) == 4
    assert found.batch.value == pytest.approx(gradient_noise(small, big, 4, 32).batch.value * 64)
    assert (found.rows, found.group["batch_tokens"]) == (40, 2048.0)
    assert noise_scales(runs, plain) == ()
    json.dumps(found.to_json(), allow_nan=False)


# --- sweeps ------------------------------------------------------------------------------------------------------


def test_steps_against_tokens_give_the_published_critical_batch() -> None:
    steps, tokens = np.array([1100.0, 1500.0, 2000.0, 4000.0]), np.array([1.1e10, 3e9, 2e9, 4e9 / 3])
    (batch,), (least,), (misfit,) = fit_critical_batch(tokens / steps, tokens)
    assert np.exp(batch) == pytest.approx(1e6, rel=1e-4)
    assert np.exp(least) == pytest.approx(1e9, rel=1e-4)
    assert np.exp(least - batch) == pytest.approx(1000.0, rel=1e-4)
    assert misfit < 1e-5


def test_a_sweep_with_noise_gives_its_critical_batch_and_says_how_well() -> None:
    hits, values = [], []
    for seed in range(12):
        for one in critical_batches(sweep(noise=1e-3, seed=seed), resamples=200, seed=seed).sweeps[::3]:
            assert not one.refused
            low, high = one.batch.interval
            hits.append(low < 3e4 < high)
            values.append(one.batch.value)
            assert one.steps.value == pytest.approx(one.tokens.value / one.batch.value, rel=1e-6)
    assert np.mean(hits) > 0.8
    assert np.median(values) == pytest.approx(3e4, rel=0.1)


def test_twenty_percent_beyond_linear_scaling_lies_at_a_fifth_of_it() -> None:
    one = critical_batches(sweep()).sweeps[1]
    assert one.batch.value == pytest.approx(3e4, rel=0.02)
    # 1.2 times the tokens of the smallest batch, which itself takes 1 + B / B_crit of the least
    assert one.beyond_linear.value == pytest.approx(0.2 * 3e4 + 1.2 * BATCHES[0], rel=0.15)


@pytest.mark.parametrize(("critical", "what"), [(3e7, "Add larger"), (10.0, "Add smaller")])
def test_a_sweep_that_does_not_bend_is_refused(critical: float, what: str) -> None:
    result = critical_batches(sweep(critical=critical))
    assert all(one.refused for one in result.sweeps)
    assert any(what in v.message for one in result.sweeps for v in one.verdicts if v.code == "no_bend")
    assert np.isnan(result.sweeps[0].batch.value)
    assert np.isnan(result.growth["llama"].value)
    json.dumps(result.to_json(), allow_nan=False)


def test_of_a_crossed_decay_the_best_counts_and_not_the_mean() -> None:
    plain = sweep().assign(weight_decay=0.1)
    worse = plain.assign(weight_decay=0.0, val_loss_final=plain["val_loss_final"] * (1.0 + plain["batch_tokens"] / 5e6))
    one, other = (critical_batches(t, resamples=50).sweeps for t in (plain, pd.concat([plain, worse])))
    assert [o.batch.value for o in other] == pytest.approx([o.batch.value for o in one])
    table = plain.query("D > 2.9e9").reset_index(drop=True).assign(schedule="constant")
    table["cell"] = table.index.astype(str)
    curves = curves_of(table)
    late = table.assign(weight_decay=0.0, cell=[f"late {c}" for c in table["cell"]])
    slow = curves.assign(cell="late " + curves["cell"], val_loss=1.05 * curves["val_loss"])
    both = critical_batches(pd.concat([table, late]), pd.concat([curves, slow]), targets=[2.6], resamples=50)
    alone = critical_batches(table, curves, targets=[2.6], resamples=50)
    assert both.sweeps[0].batch.value == pytest.approx(alone.sweeps[0].batch.value)
    assert not alone.sweeps[0].refused


@pytest.mark.parametrize("column", ["corpus", "context", "parametrisation", "width"])
def test_runs_on_another_corpus_or_of_another_shape_do_not_stand_for_a_batch(column) -> None:
    one = sweep(batches=BATCHES[2:7]).assign(**{column: 64 if column in ("context", "width") else "a"})
    rest = one[one["batch_tokens"] <= BATCHES[4]].assign(**{column: 128 if column in ("context", "width") else "b"})
    rest["val_loss_final"] *= 0.95
    alone = critical_batches(one, targets=[2.6, 2.8, 3.0], resamples=50)
    both = critical_batches(pd.concat([one, rest], ignore_index=True), targets=[2.6, 2.8, 3.0], resamples=50)
    first = [found for found in both.sweeps if found.group[column] in ("a", 64)]
    assert [found.batch.value for found in first] == pytest.approx([found.batch.value for found in alone.sweeps])
    assert not any(found.refused for found in first)
    assert len(both.sweeps) == 6
    assert len(both.growth) == (1 if column == "width" else 2), "no shape moves the growth"
    assert len({found.name for found in both.sweeps}) == 2
    json.dumps(both.to_json(), allow_nan=False)


def test_two_batches_are_too_few() -> None:
    result = critical_batches(sweep(batches=(2048.0, 65536.0)), targets=[3.0])
    assert {"too_few_horizons"} <= codes(result) or {"too_few_levels"} <= codes(result)
    assert all(one.refused for one in result.sweeps)


def test_targets_may_be_an_array() -> None:
    found, listed = (critical_batches(sweep(), targets=t, resamples=20) for t in (np.array([2.6, 2.8]), [2.6, 2.8]))
    assert [one.batch for one in found.sweeps] == [one.batch for one in listed.sweeps]
    defaults, empty = (critical_batches(sweep(), targets=t, resamples=20) for t in (None, ()))
    assert [one.target for one in defaults.sweeps] == [one.target for one in empty.sweeps]


def test_runs_of_no_named_family_have_a_critical_batch() -> None:
    (one, *_), (named, *_) = (
        critical_batches(table, resamples=50).sweeps for table in (sweep().assign(family=None), sweep())
    )
    assert one.batch == named.batch


def test_runs_without_a_loss_of_a_finished_run_do_not_count() -> None:
    plain = sweep()
    lost = plain.iloc[:40].assign(val_loss_final=np.tile([-1.0, 0.0, np.nan, np.inf], 10))
    running = plain.iloc[:40].assign(state="running", val_loss_final=9.0)
    table = pd.concat([plain.assign(state="finished"), lost, running], ignore_index=True)
    one, other = (critical_batches(t, resamples=50).sweeps for t in (plain, table))
    assert [o.batch for o in one] == [o.batch for o in other]


@pytest.mark.parametrize("column", ["N", "D", "batch_tokens", "val_loss_final"])
def test_a_missing_column_is_named(column) -> None:
    with pytest.raises(InputError, match="lacks " + column.removeprefix("val_").removesuffix("_final")):
        critical_batches(sweep().drop(columns=column))


def test_its_growth_with_tokens_is_found() -> None:
    result = critical_batches(sweep(growth=0.5, noise=5e-4))
    low, high = result.growth["llama"].interval
    assert low < 0.5 < high
    assert high - low < 0.4


def test_small_batches_that_waste_tokens_are_no_part_of_the_curve() -> None:
    table = sweep()
    tiny = table["batch_tokens"] == BATCHES[0]
    table.loc[tiny, "val_loss_final"] *= 1.05
    one = critical_batches(table).sweeps[1]
    assert one.batch.value == pytest.approx(3e4, rel=0.05)
    assert np.isnan(one.points["fitted"].iloc[0])
    assert "line_misfit" in {v.code for v in one.verdicts}


def curves_of(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for run in table.itertuples():
        for tokens in np.geomspace(run.D / 50, run.D, 30):
            effective = tokens / (1.0 + run.batch_tokens / 3e4)
            rows.append({"cell": run.cell, "tokens": tokens, "val_loss": float(loss_of(effective))})
    return pd.DataFrame(rows)


def test_curves_serve_where_every_batch_has_one_length() -> None:
    table = sweep().query("D > 2.9e9 and learning_rate < 2e-3").reset_index(drop=True)
    table = table.assign(cell=table.index.astype(str), schedule="constant", warmup_tokens=1e6)
    without = critical_batches(table)
    assert "too_few_horizons" in codes(without)
    assert without.sweeps == ()
    result = critical_batches(table, curves_of(table))
    assert [round(one.batch.value / 3e4, 1) for one in result.sweeps] == [1.0] * 4
    assert "annealed_curves" not in codes(result)
    assert "annealed_curves" in codes(critical_batches(table.assign(schedule="cosine"), curves_of(table)))


def test_the_step_law_runs_have_a_critical_batch_that_grows_with_tokens() -> None:
    runs = pd.read_csv(published("step-law-dense/dense_lr_bs_loss.csv"))
    runs = runs.rename(columns={"smooth loss": "val_loss_final", "lr": "learning_rate"})
    runs = runs.assign(batch_tokens=2048.0 * runs["bs"], family="dense")
    result = critical_batches(runs)
    good = [one for one in result.sweeps if not one.refused]
    assert len(good) >= 18
    assert all(1e6 < one.batch.value < 1e7 for one in good)
    assert all(one.scatter < 0.11 for one in good)
    # Bergsma et al. 2025 and Zhang et al. 2024: 0.47, whatever N
    low, high = result.growth["dense"].interval
    assert low < 0.47 < high
    assert result.growth["dense"].value == pytest.approx(0.555, abs=0.01)


def test_the_picture_shows_points_curve_and_critical_batch() -> None:
    result = critical_batches(sweep(noise=1e-3))
    axes = batch_curves(result.sweeps).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("llama" in label for label in labels)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    refused = batch_curves(critical_batches(sweep(critical=3e7)).sweeps).axes[0]
    assert all("(refused)" in t.get_text() for t in refused.get_legend().get_texts() if "llama" in t.get_text())


def test_a_dollar_in_the_name_of_a_family_is_no_formula_in_the_legend() -> None:
    result = critical_batches(sweep().assign(family=r"cost_$5_\bad$"), targets=[2.6], resamples=20)
    picture = batch_curves(result.sweeps)
    picture.savefig(BytesIO())
    labels = [text.get_text().replace(r"\$", "$") for text in picture.axes[0].get_legend().get_texts()]
    assert any(label.startswith(r"cost_$5_\bad$ 1M") for label in labels)


# --- the decay's timescale ---------------------------------------------------------------------------------------


def decays(best: float, noise: float = 0.0) -> pd.DataFrame:
    """One size, five decays, two seeds; lowest at a timescale of `best`."""
    generator, rows = np.random.default_rng(0), []
    for decay in 0.025 * 2.0 ** np.arange(5):
        tau = 4096 / (1e-3 * decay * 2e7)
        loss = 3.0 * np.exp(0.01 * np.log(tau / best) ** 2)
        rows += [
            {"family": "llama", "N": 1e6, "D": 2e7, "learning_rate": 1e-3, "batch_tokens": 4096, "weight_decay": decay}
            | {"adamw_timescale": tau, "seed": s, "val_loss_final": loss * np.exp(noise * generator.standard_normal())}
            for s in range(2)
        ]
    return pd.DataFrame(rows)


def test_the_best_timescale_stands_beside_the_published_one() -> None:
    (found,) = decay_timescales(decays(2.3))
    assert found.best.value == pytest.approx(2.3, rel=1e-3)
    assert found.published == pytest.approx(0.223556, rel=1e-4)
    assert published_timescale(200.0) == pytest.approx(0.066433, rel=1e-4)
    (noisy,) = decay_timescales(decays(2.3, noise=1e-4))
    low, high = noisy.best.interval
    assert low < 2.3 < high
    json.dumps(noisy.to_json(), allow_nan=False)


def test_the_timescale_of_a_table_follows_from_rate_decay_batch_and_tokens() -> None:
    table = decays(2.3, noise=1e-4).rename(columns={"val_loss_final": "loss"})
    (one,) = decay_timescales(table)
    (derived,) = decay_timescales(table.drop(columns=["adamw_timescale", "family"]))
    assert derived.best == one.best
    assert derived.group == {"N": 1e6, "D": 2e7}
    with pytest.raises(InputError, match="lacks batch_tokens"):
        decay_timescales(table.drop(columns=["adamw_timescale", "batch_tokens"]))


@pytest.mark.parametrize("column", ["corpus", "context", "width"])
def test_decays_on_another_corpus_or_of_another_shape_do_not_stand_for_a_timescale(column) -> None:
    table = decays(100.0).assign(**{column: 64 if column != "corpus" else "a"})
    rest = table[table["weight_decay"].isin(0.025 * 2.0 ** np.arange(1, 4))]
    rest = rest.assign(val_loss_final=0.8 * rest["val_loss_final"], **{column: 128 if column != "corpus" else "b"})
    found = decay_timescales(pd.concat([table, rest], ignore_index=True))
    assert [set(one.points["count"]) for one in found] == [{2}, {2}]
    assert {one.group[column] for one in found} == set(table[column]) | set(rest[column])
    assert [v.code for one in found for v in one.verdicts] == ["edge_minimum"] * 2
    json.dumps([one.to_json() for one in found], allow_nan=False)


def test_of_a_crossed_setting_the_best_counts_at_its_timescale_and_not_the_mean() -> None:
    table = decays(1.6).assign(beta2=0.95)
    worse = table[table["weight_decay"] > 0.09].assign(beta2=0.999)
    worse["val_loss_final"] *= 1.01
    (found,) = decay_timescales(pd.concat([table, worse], ignore_index=True))
    assert found.best.value == pytest.approx(1.6, rel=1e-3)
    assert list(found.points["count"]) == [2] * 5


@pytest.mark.parametrize("mark", [-1.0, 0.0, np.inf, np.nan])
def test_a_mark_for_a_failed_run_is_no_loss_at_its_timescale(mark) -> None:
    table = decays(2.3)
    (sound,) = decay_timescales(table)
    table.loc[0, "val_loss_final"] = mark  # of two seeds
    (found,) = decay_timescales(table)
    assert found.best.value == pytest.approx(sound.best.value, rel=1e-6)
    assert found.points["count"].sum() == len(table) - 1


def test_a_timescale_at_the_edge_is_refused_and_one_decay_is_no_sweep() -> None:
    (found,) = decay_timescales(decays(100.0))
    assert found.refused
    assert np.isnan(found.best.value)
    assert [v.code for v in found.verdicts] == ["edge_minimum"]
    assert decay_timescales(decays(2.3).iloc[:4]) == ()
