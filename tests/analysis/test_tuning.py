"""What tuning is worth: known gains and multipliers come back, luck is not taken for a gain, and bounds are bounds."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis import read_table
from analysis.allocation import compute_for_loss
from analysis.audit_page import worth_section, worth_words
from analysis.laws import CHINCHILLA
from analysis.multipliers import NO_SIZE, size_multiplier, tuned_frontier
from analysis.sensitivities import sensitivity
from analysis.tuning import tuning_worth
from analysis.verdicts import Estimate
from sweeps.errors import InputError
from tests.analysis.sweeps_of_rates import CURVATURE, RATES, best_rate, sweep, tuned_by
from tests.analysis.synthetic import LAW, codes, published, surface

SIZES = np.geomspace(2e4, 1e6, 5)
TOKENS = np.geomspace(1e6, 6e7, 4)


def off(times: float):
    """A default at so many times the best rate of each place."""
    return {"learning_rate": lambda known: times * best_rate(known["N"], known["D"])}


@pytest.fixture(scope="module")
def found():
    return tuning_worth(sweep(SIZES, TOKENS, seeds=2), default=off(4.0))


def test_gain_of_a_known_surface_comes_back_with_its_interval(found) -> None:
    truth = 100 * (1 - np.exp(-0.5 * CURVATURE * np.log(4.0) ** 2))
    assert len(found.worths) == len(SIZES) * len(TOKENS)
    assert all(w.told_apart and w.way == "curve" and not w.at_least for w in found.worths)
    inside = [w.percent.interval[0] <= truth <= w.percent.interval[1] for w in found.worths]
    assert np.mean(inside) >= 0.85
    assert np.mean([w.percent.value for w in found.worths]) == pytest.approx(truth, abs=0.1)


def test_compute_multiplier_is_that_of_the_known_frontier(found) -> None:
    hits = []
    for w in found.worths:
        tuned = float(CHINCHILLA({"N": w.group["N"], "D": w.group["D"]}, LAW))
        default = tuned * np.exp(0.5 * CURVATURE * np.log(4.0) ** 2)
        truth = float(compute_for_loss(tuned, LAW) / compute_for_loss(default, LAW))
        assert w.compute.value == pytest.approx(truth, rel=0.1)
        hits.append(w.compute.interval[0] <= truth <= w.compute.interval[1])
    assert np.mean(hits) >= 0.85


def test_size_multiplier_is_that_of_the_known_law_or_a_true_bound(found) -> None:
    hits, bounded = [], 0
    for w in found.worths:
        tuned = float(CHINCHILLA({"N": w.group["N"], "D": w.group["D"]}, LAW))
        share = tuned * np.expm1(0.5 * CURVATURE * np.log(4.0) ** 2) * w.group["N"] ** LAW["alpha"] / LAW["A"]
        truth = (1 - share) ** (-1 / LAW["alpha"]) if share < 1 else np.inf
        if w.size.bounded:
            bounded += 1
            assert truth > w.size.estimate.value
            assert str(w.size).startswith("> ")
        else:
            low, high = w.size.estimate.interval
            hits.append(low <= truth and (np.isnan(high) or truth <= high))
    assert bounded, "some gains are beyond half of A / N^alpha"
    assert len(hits) >= 8, "and some below"
    assert np.mean(hits) >= 0.85


def test_default_at_the_optimum_is_worth_nothing_that_can_be_told() -> None:
    found = tuning_worth(sweep(SIZES, np.geomspace(1e6, 6e7, 8), noise=0.004, seeds=1), default=off(1.0))
    assert np.mean([w.told_apart for w in found.worths]) <= 0.1
    assert abs(np.mean([w.percent.value for w in found.worths])) < 0.1
    assert "not_told_apart" in codes(found)
    assert "gains nothing that can be told from noise" in str(found.worths[0]) or found.worths[0].told_apart


def test_gains_lost_in_noise_are_counted_at_the_level_of_the_intervals() -> None:
    runs = sweep(SIZES, TOKENS[:2], seeds=1)
    silent = {}
    for level in (0.5, 0.999):
        found = tuning_worth(runs, default=off(1.4), level=level, resamples=400)
        silent[level] = sum(not w.told_apart for w in found.worths)
        said = sum(v.evidence["places"] for v in found.verdicts if v.code == "not_told_apart")
        assert said == silent[level]
    assert silent[0.5] < silent[0.999]


def test_best_of_many_equal_settings_is_raised_by_its_luck() -> None:
    """Weight decay without any effect: the lowest of nine lies 1.5 standard deviations too low."""
    N, D, decay, seeds = (
        a.ravel()
        for a in np.meshgrid(SIZES, np.geomspace(1e6, 6e7, 8), np.geomspace(0.01, 1, 9), [0, 1], indexing="ij")
    )
    table = surface(N, D, noise=0.01, seed=3).assign(weight_decay=decay, seed=seeds.astype(int), family="llama")
    found = tuning_worth(table, default={"weight_decay": 0.1})
    assert {w.way for w in found.worths} == {"best setting"}
    assert "selected_best" in codes(found, "caution")
    naive = table.assign(y=np.log(table["loss"])).groupby(["N", "D", "weight_decay"])["y"].mean()
    default = naive.xs(found.worths[0].default["weight_decay"], level="weight_decay")
    uncorrected = 100 * float((default - naive.groupby(["N", "D"]).min()).mean())
    corrected = float(np.mean([w.percent.value for w in found.worths]))
    assert uncorrected > 0.8
    assert abs(corrected) < 0.35 * uncorrected
    assert np.mean([w.told_apart for w in found.worths]) <= 0.1


def test_settings_that_are_words_are_held_against_each_other() -> None:
    N, D, seed = (a.ravel() for a in np.meshgrid(SIZES, TOKENS, [0, 1], indexing="ij"))
    cosine = surface(N, D, noise=0.001, seed=1).assign(schedule="cosine", seed=seed)
    linear = surface(N, D, noise=0.001, seed=2).assign(schedule="linear", seed=seed)
    runs = pd.concat([cosine.assign(loss=1.02 * cosine["loss"]), linear], ignore_index=True)
    found = tuning_worth(runs, default={"schedule": "cosine"})
    assert len(found.worths) == len(SIZES) * len(TOKENS)
    assert np.mean([w.percent.value for w in found.worths]) == pytest.approx(2.0, abs=0.1)
    assert all(w.default == {"schedule": "cosine"} for w in found.worths)


@pytest.mark.filterwarnings("error")
def test_a_setting_that_is_blank_or_zero_does_not_hide_the_default() -> None:
    one = sweep([1e5, 4e5], [1e7], rates=[1.0], seeds=2)
    tried = {0.1: 1.0, 0.2: 1.01, 0.0: 1.02, np.nan: 1.03}
    runs = pd.concat([one.assign(weight_decay=d, loss=one["loss"] * off) for d, off in tried.items()])
    found = tuning_worth(runs, default={"weight_decay": 0.2}, resamples=20)
    assert [w.default["weight_decay"] for w in found.worths] == [0.2, 0.2]
    assert "default_not_run" not in codes(found)


def test_optimum_beyond_the_rates_tried_makes_the_gain_a_lower_bound() -> None:
    runs = sweep(SIZES, TOKENS, 2.0 ** np.arange(-4, 0))
    found = tuning_worth(runs, default=off(2.0**-4), noise=0.002)
    assert all(w.at_least for w in found.worths)
    truth = 1 - np.exp(-0.5 * CURVATURE * np.log(16.0) ** 2)
    assert all(w.percent.value < 100 * truth for w in found.worths)
    assert "at least" in str(found.worths[0])
    assert "selected_best" in codes(found)


def test_one_token_count_gives_size_by_the_law_of_size_alone() -> None:
    runs = sweep(np.geomspace(2e4, 1e6, 7), [2e7], seeds=2, noise=0.001)
    found = tuning_worth(runs, default=off(2.0))
    assert "one_path" in codes(found, "info")
    w = found.worths[2]
    tuned = float(CHINCHILLA({"N": w.group["N"], "D": w.group["D"]}, LAW))
    share = tuned * np.expm1(0.5 * CURVATURE * np.log(2.0) ** 2) * w.group["N"] ** LAW["alpha"] / LAW["A"]
    assert w.size.estimate.value == pytest.approx((1 - share) ** (-1 / LAW["alpha"]), rel=0.1)


def test_sizes_with_their_tokens_give_compute_but_no_size() -> None:
    parts = [sweep([N], [20 * N], seeds=2, noise=0.001, seed=i) for i, N in enumerate(np.geomspace(2e4, 1e6, 7))]
    found = tuning_worth(pd.concat(parts, ignore_index=True), default=off(2.0))
    assert all(np.isfinite(w.compute.value) and w.compute.value > 1 for w in found.worths)
    assert all(np.isnan(w.size.estimate.value) for w in found.worths)
    assert "no_power_law" in codes(found, "refuse")


def test_too_few_sizes_give_gains_without_multipliers() -> None:
    found = tuning_worth(sweep([5e4, 2e5], [1e7], seeds=2), default=off(2.0))
    assert len(found.worths) == 2
    assert not found.refused
    assert all(np.isnan(w.compute.value) and w.gain.value > 0 for w in found.worths)
    assert "no_power_law" in codes(found, "refuse")


def test_default_that_nobody_ran_is_a_verdict_with_the_remedy() -> None:
    found = tuning_worth(sweep(SIZES[:2], TOKENS[:1]), default={"learning_rate": 0.9})
    assert found.refused
    assert "default_not_run" in codes(found, "refuse")
    assert "Not known" in str(found)


def test_runs_without_a_sweep_are_a_verdict() -> None:
    runs = tuned_by(surface(SIZES, 1e7), 1.0).assign(seed=0)
    found = tuning_worth(runs, default=off(1.0))
    assert found.refused
    assert codes(found, "refuse") == {"optimum_unmeasured"}


@pytest.mark.parametrize(
    ("default", "words"),
    [
        (None, "nothing says which value is the default"),
        ({"learning_rat": 0.01}, 'did you mean "learning_rate"'),
        ({"learning_rate": -0.01}, "must be a positive number"),
        ({"weight_decay": 0.1, "learning_rate": 0.01}, "weight_decay does not vary"),
    ],
)
def test_bad_defaults_say_what_is_wrong(default, words) -> None:
    with pytest.raises(InputError, match=words):
        tuning_worth(sweep(SIZES[:2], TOKENS[:1]), default=default)


def test_the_studys_own_default_is_the_setting_at_one_times_its_rule() -> None:
    runs = sweep(SIZES, TOKENS)
    times = runs["learning_rate"] / best_rate(runs["N"], runs["D"])
    own = tuning_worth(runs.assign(is_default=np.isclose(times, 4.0)))
    named = tuning_worth(runs, default=off(4.0))
    pd.testing.assert_frame_equal(own.table(), named.table())


def test_settings_that_follow_the_rate_are_no_search_of_their_own() -> None:
    runs = sweep(SIZES[:3], TOKENS[:3])
    own = np.isclose(runs["learning_rate"] / best_rate(runs["N"], runs["D"]), 4.0)
    runs = runs.assign(weight_decay=1e-3 / runs["learning_rate"], warmup_tokens=runs["D"] / 20, is_default=own)
    found = tuning_worth(runs)
    assert found.axes == ("learning_rate",)
    assert {w.way for w in found.worths} == {"curve"}


def test_early_rungs_of_a_search_are_no_runs() -> None:
    runs = sweep(SIZES[:3], TOKENS[:3])
    early = runs.assign(loss=0.5 * runs["loss"], rung=0.25)
    both = pd.concat([runs.assign(rung=np.nan), early], ignore_index=True)
    pd.testing.assert_frame_equal(
        tuning_worth(both, default=off(2.0)).table(), tuning_worth(runs, default=off(2.0)).table()
    )


def test_noise_is_shared_by_default_and_curve_so_that_a_given_noise_scales_the_interval() -> None:
    runs = sweep(SIZES[:3], TOKENS[:3], noise=1e-6)
    widths = []
    for noise in (0.001, 0.004):
        w = tuning_worth(runs, default=off(4.0), noise=noise).worths[0]
        widths.append(w.percent.interval[1] - w.percent.interval[0])
    assert widths[1] == pytest.approx(4 * widths[0], rel=0.25)


def test_size_multiplier_grows_with_the_gain_and_is_bounded_from_half_on() -> None:
    N, D = (a.ravel() for a in np.meshgrid(SIZES, TOKENS))
    frontier = tuned_frontier(surface(N, D, noise=1e-4))
    height = LAW["A"] / 1e5 ** LAW["alpha"]
    values = [size_multiplier(frontier, 1e5, np.full(401, share * height), 0.95) for share in (0.1, 0.3, 0.49, 0.6)]
    assert [v.bounded for v in values] == [False, False, False, True]
    assert values[0].estimate.value == pytest.approx(0.9 ** (-1 / LAW["alpha"]), rel=0.02)
    assert np.all(np.diff([v.estimate.value for v in values[:3]]) > 0)
    assert values[3].estimate.value == pytest.approx(2 ** (1 / LAW["alpha"]), rel=0.05)


def test_an_alpha_that_the_runs_do_not_determine_gives_no_size_multiplier_instead_of_its_bound() -> None:
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e4, 4e4, 4), 8e4 * 4.0 ** np.arange(3)))
    frontier = tuned_frontier(surface(N, D, noise=0.03), noise=0.03)
    assert frontier.law is not None
    assert (frontier.law.draws["alpha"] >= 2.99).mean() > 0.025
    assert np.isnan(size_multiplier(frontier, 1e4, np.full(401, 1.0), 0.95).estimate.value), "2^(1/3) is no finding"
    (said,) = [v for v in frontier.verdicts if v.target == "size"]
    assert said.severity == "refuse"
    assert "alpha is not determined by these runs" in said.message


def test_a_sweep_with_seeds_is_not_told_to_add_seeds(found) -> None:
    assert found.noise["source"] == "seeds"
    assert "noise_from_residuals" not in codes(found)


def test_each_parametrisation_has_its_own_places_and_law() -> None:
    runs = sweep(SIZES[:4], TOKENS[:3], seeds=2)
    other = runs.assign(loss=runs["loss"] * 1.1, parametrisation="mup")
    found = tuning_worth(pd.concat([runs.assign(parametrisation="standard"), other]), default=off(4.0))
    assert list(found.laws) == ["llama mup", "llama standard"]
    lines = str(found).splitlines()
    assert {line.split(": tuning at")[0] for line in lines} == {"llama mup", "llama standard"}
    table = found.table().set_index(["parametrisation", "N", "D"])
    ratio = table.loc["mup", "loss_default"] / table.loc["standard", "loss_default"]
    assert ratio.to_numpy() == pytest.approx(1.1)


def test_everything_goes_into_json_and_a_table(found) -> None:
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert len(record["worths"]) == len(found.worths) == len(found.table())
    assert {"gain", "compute", "size", "told_apart", "at_least"} <= set(record["worths"][0])


def test_a_sweep_found_before_is_used_with_its_noise_where_it_is_over_the_tuned_axes() -> None:
    runs = sweep(SIZES[:3], TOKENS[:3], RATES)
    known = sensitivity(runs)
    some = replace(known, optima=known.optima[:4], noise=dict(known.noise, sd=0.5))
    found = tuning_worth(runs, default=off(2.0), sweep=some)
    assert len(found.worths) == 4
    assert found.noise["sd"] == 0.5
    other = replace(some, optima=tuple(replace(one, axes=("batch_tokens",)) for one in some.optima))
    anew = tuning_worth(runs, default=off(2.0), sweep=other)
    assert len(anew.worths) == 9
    assert anew.noise["sd"] == pytest.approx(known.noise["sd"])


# --- what is tuned, and what only keeps places apart -------------------------------------------------------------


def decays(losses: dict[float, float], sizes=SIZES, rate: float = 1.0, seed: int = 15) -> pd.DataFrame:
    """Runs at one rate and a few weight decays, with so many times the loss, two seeds and noise of a thousandth."""
    one = [
        sweep(sizes, [1e7], [rate], seeds=2, noise=0.001, seed=seed + i).assign(weight_decay=decay)
        for i, decay in enumerate(losses)
    ]
    return pd.concat([t.assign(loss=t["loss"] * times) for t, times in zip(one, losses.values())], ignore_index=True)


def shuffled(runs: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    return runs.sample(frac=1.0, random_state=seed).reset_index(drop=True)


def test_a_rate_that_is_not_named_is_no_seed_of_another() -> None:
    same = {0.05: 1.0, 0.1: 1.0, 0.2: 1.0}
    runs = pd.concat([decays(same), decays({0.1: 1.0}, rate=8.0, seed=25)], ignore_index=True)
    found = tuning_worth(runs, default={"weight_decay": 0.1})
    assert found.axes == ("weight_decay",)
    assert len(found.worths) == len(SIZES), "the bad rate was run at one decay only, so nothing is tuned there"
    rates = [w.group["learning_rate"] for w in found.worths]
    assert rates == pytest.approx([best_rate(w.group["N"], 1e7) for w in found.worths])
    assert not any(w.told_apart for w in found.worths)
    assert max(w.percent.value for w in found.worths) < 0.5, "pooled with the bad rate it would be 6%"


def test_betas_a_percent_apart_are_no_seeds_of_each_other() -> None:
    """.99 and .999 average over 100 steps and over 1000."""
    same = {0.05: 1.0, 0.1: 1.0, 0.2: 1.0}
    tables = [decays(same, seed=35 + i).assign(beta2=beta2) for i, beta2 in enumerate((0.99, 0.999))]
    found = tuning_worth(pd.concat(tables, ignore_index=True), default={"weight_decay": 0.1})
    assert sorted(w.group["beta2"] for w in found.worths) == [0.99] * len(SIZES) + [0.999] * len(SIZES)


def test_a_beta_ten_times_as_near_to_one_does_not_stand_for_the_default() -> None:
    tables = [decays({0.1: 1.0}, seed=35 + i).assign(beta2=beta2) for i, beta2 in enumerate((0.9, 0.95))]
    runs = pd.concat(tables, ignore_index=True)
    assert "no run is near the default" in str(tuning_worth(runs, default={"beta2": 0.999}).verdicts)
    assert len(tuning_worth(runs, default={"beta2": 0.96}).worths) == len(SIZES)


def test_a_decay_of_one_seed_in_single_precision_is_the_same_setting() -> None:
    runs = decays({0.05: 1.0, 0.1: 0.98, 0.2: 1.0})
    single = runs["weight_decay"].astype("float32").astype(float).where(runs["seed"] == 1, runs["weight_decay"])
    one, other = (tuning_worth(t, default={"weight_decay": 0.2}) for t in (runs, runs.assign(weight_decay=single)))
    gains = [[w.percent.value for w in found.worths] for found in (one, other)]
    assert gains[1] == pytest.approx(gains[0])


def test_more_tokens_are_no_tuning_though_lengths_follow_each_other_closely() -> None:
    lengths = 1e8 * 1.015 ** np.arange(60)
    one = [sweep([1e5], lengths, [1.0], noise=1e-4, seed=i).assign(weight_decay=d) for i, d in enumerate((0.1, 0.2))]
    found = tuning_worth(pd.concat(one, ignore_index=True), default={"weight_decay": 0.1}, noise=1e-4)
    assert len(found.worths) == 30, "two lengths that are less than 2% apart are one"
    assert max(w.percent.value for w in found.worths) < 0.5


def test_the_law_of_the_tuned_runs_has_one_run_of_a_length_that_batches_round() -> None:
    tables = []
    for i, batch in enumerate((2**14, 2**15, 2**16)):
        for decay, times in ((0.05, 1.02), (0.1, 1.0), (0.2, 1.01)):
            table = sweep(SIZES[:4], [5e6, 2e7, 8e7], [1.0], seeds=2, noise=0.001, seed=i)
            D = np.round(table["D"] / batch) * batch
            worse = times * (1.0 + 0.01 * i)
            tables.append(table.assign(D=D, batch_tokens=batch, weight_decay=decay, loss=table["loss"] * worse))
    found = tuning_worth(pd.concat(tables, ignore_index=True), default={"weight_decay": 0.05})
    assert len(found.worths) == 36
    assert [law.n_runs for law in found.laws.values() if law is not None] == [12]


def test_a_parametrisation_is_never_tuned() -> None:
    runs = sweep(SIZES[:4], TOKENS[:3], seeds=2)
    runs = runs.assign(is_default=np.isclose(runs["learning_rate"] / best_rate(runs["N"], runs["D"]), 1.0))
    mup = runs.assign(loss=runs["loss"] * 0.95, parametrisation="mup")
    found = tuning_worth(shuffled(pd.concat([runs.assign(parametrisation="standard"), mup])))
    assert found.axes == ("learning_rate",)
    assert {w.group["parametrisation"] for w in found.worths} == {"standard", "mup"}
    assert len(found.worths) == 2 * 4 * 3
    assert np.mean([w.told_apart for w in found.worths]) <= 0.1
    with pytest.raises(InputError, match="the parametrisation is not tuned"):
        tuning_worth(runs, default={"parametrisation": "standard"})


def test_runs_on_another_text_or_at_another_context_share_no_place() -> None:
    runs = decays({0.05: 1.0, 0.1: 1.02})
    for column, values in (("corpus", ("a", "b")), ("context", (128, 256))):
        both = pd.concat([runs.assign(**{column: v}, loss=runs["loss"] * f) for v, f in zip(values, (1.0, 0.7))])
        found = tuning_worth(shuffled(both), default={"weight_decay": 0.1})
        assert [w.group[column] for w in found.worths] == [v for v in values for _ in SIZES]
        assert all(w.percent.value == pytest.approx(2.0, abs=0.4) for w in found.worths)
        assert len(found.laws) == 2, "losses on two texts bear no common law"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_default_at_each_of_several_decays_makes_a_place_of_each_in_any_order_of_rows(seed: int) -> None:
    runs = sweep(SIZES[:3], TOKENS[:2], seeds=2)
    times = runs["learning_rate"] / best_rate(runs["N"], runs["D"])
    runs = runs.assign(is_default=np.isclose(times, 1.0))
    parts = [runs.assign(weight_decay=0.01, loss=runs["loss"] * 1.1), runs.assign(weight_decay=0.1)]
    crossed = pd.concat(parts, ignore_index=True)
    found = tuning_worth(crossed)
    assert found.axes == ("learning_rate",)
    assert sorted(w.group["weight_decay"] for w in found.worths) == [0.01] * 6 + [0.1] * 6
    assert max(w.percent.value for w in found.worths) < 1.0, "the better decay is no gain over the other's default"
    pd.testing.assert_frame_equal(tuning_worth(shuffled(crossed, seed)).table(), found.table())
    assert "weight decay 0.01: tuning at 20k" in str(found), "places of one N and D are told apart"
    assert "<th>weight decay</th>" in worth_section(found, "the study's own setting")


def test_places_of_searched_settings_do_not_depend_on_the_order_of_rows() -> None:
    runs = pd.concat([decays({0.05: 1.01, 0.1: 1.0, 0.4: 1.03}), decays({0.1: 1.0, 0.4: 1.0}, rate=8.0, seed=25)])
    runs = runs.assign(is_default=runs["weight_decay"] == 0.1)
    found = tuning_worth(runs)
    assert found.axes == ("weight_decay",), "the default was run at both rates, so each has places of its own"
    assert len(found.worths) == 2 * len(SIZES)
    pd.testing.assert_frame_equal(tuning_worth(shuffled(runs)).table(), found.table())


def test_a_rate_whose_default_follows_the_batch_is_tuned_at_each_batch() -> None:
    parts = []
    for batch in (2048.0, 8192.0):
        one = sweep(SIZES[:3], TOKENS[:2], seeds=2)
        times = one["learning_rate"] / best_rate(one["N"], one["D"])
        rate = one["learning_rate"] * (batch / 2048) ** 0.5
        parts.append(one.assign(batch_tokens=batch, learning_rate=rate, is_default=np.isclose(times, 1.0)))
    found = tuning_worth(shuffled(pd.concat(parts)))
    assert found.axes == ("learning_rate",)
    assert sorted(w.group["batch_tokens"] for w in found.worths) == [2048.0] * 6 + [8192.0] * 6


def test_a_setting_that_only_moves_along_with_another_is_not_tuned_by_its_name_alone() -> None:
    runs = pd.concat([decays({0.05: 1.0}).assign(beta2=0.9), decays({0.1: 1.02}).assign(beta2=0.99)])
    found = tuning_worth(runs, default={"weight_decay": 0.1})
    assert found.refused
    assert "no runs differ in weight_decay alone: beta2 moves along" in str(found)
    both = tuning_worth(runs, default={"weight_decay": 0.1, "beta2": 0.99})
    assert all(w.told_apart for w in both.worths)


def test_a_search_whose_default_names_the_rate_alone_says_what_moved_along() -> None:
    runs = sweep(SIZES[:2], TOKENS[:1]).assign(search="a search")
    runs["weight_decay"] = np.random.default_rng(0).uniform(0.01, 0.1, len(runs))
    assert "moving_settings" in codes(tuning_worth(runs, default=off(4.0)), "caution")


def test_a_default_run_at_every_value_of_all_that_varies_names_nothing() -> None:
    runs = decays({0.05: 1.0, 0.1: 1.02}).assign(is_default=True)
    found = tuning_worth(runs)
    assert codes(found, "refuse") == {"optimum_unmeasured"}
    assert "the study's own default was run at several values of weight_decay" in str(found)


@pytest.mark.parametrize("seed", range(3))
def test_a_default_that_is_clearly_the_best_setting_gains_nothing(seed: int) -> None:
    runs = decays({0.01: 1.02, 0.1: 1.0, 1.0: 1.03}, np.geomspace(2e4, 4e6, 7))
    found = tuning_worth(runs, default={"weight_decay": 0.1}, seed=seed)
    assert len(found.worths) == 7
    assert not any(w.told_apart for w in found.worths)
    for w in found.worths:
        assert (w.gain.value, *w.gain.interval) == (0.0, 0.0, 0.0)
    assert worth_words(found) == ""


def test_the_answer_tells_the_range_over_the_places_and_not_the_best_of_them_alone() -> None:
    found = tuning_worth(sweep(SIZES, TOKENS, seeds=2), default=off(4.0))
    low, high = (end(w.percent.value for w in found.worths) for end in (min, max))
    most = max(found.worths, key=lambda w: w.percent.value)
    start = (
        f"Tuning is worth {low:.1f} to {high:.1f}% of the loss over {len(found.worths)} places; most at {most.place}"
    )
    assert worth_words(found).startswith(f"{start}: {most.gained}")
    assert "larger model" in worth_words(found)
    silent = replace(found, worths=(replace(most, size=NO_SIZE), replace(most, gain=Estimate(value=0.0))))
    assert "at 1 of 2 places, at the others nothing that can be told from noise; most at" in worth_words(silent)
    assert worth_words(silent).endswith("; how much larger a model that is, these runs do not tell.")
    assert worth_words(replace(found, worths=(most,))) == f"Tuning at {most.place} is worth {most.gained}."


# --- published runs ----------------------------------------------------------------------------------------------


def test_step_law_grid_at_one_common_recipe() -> None:
    """A rate of 1e-3 and half a million tokens a batch everywhere: right for 1 B, a third of a model short at 0.2 B."""
    path = published("step-law-dense/dense_lr_bs_loss.csv")
    runs = read_table(path, {"loss": "smooth loss", "batch_tokens": "2048*bs"})
    found = tuning_worth(runs, default={"learning_rate": 1e-3, "batch_tokens": 524288})
    table = found.table()
    assert len(table) == 17
    assert set(table["way"]) == {"curve"}
    small = table[(table["N"] < 2.2e8) & (table["D"] < 5e9)].iloc[0]
    assert small["told_apart"]
    assert 1.3 < small["percent"] < 2.2
    assert 1.15 < small["size_low"] < small["size"] < small["size_high"] < 1.5
    assert 1.2 < small["compute"] < 1.5
    large = table[table["N"] > 1e9]
    assert not large["told_apart"].any()
    assert (large["percent"] < 0.3).all()
    # the best runs themselves lie no further from the curve than the gain's interval says
    best = runs.groupby(["N", "D"])["loss"].min().to_numpy()
    assert np.abs(table.sort_values(["N", "D"])["loss_tuned"].to_numpy() / best - 1).max() < 0.004


def test_misfitting_runs_are_tuned_by_their_best_settings_where_three_rates_show_no_minimum() -> None:
    runs = read_table(published("misfitting/scaling_results_last_ckpt_only.csv"))
    runs = runs.drop(columns="excluded", errors="ignore")
    found = tuning_worth(runs, default={"learning_rate": 1e-3})
    table = found.table()
    assert "selected_best" in codes(found)
    assert table["at_least"].sum() > 20
    small = table[table["N"] < 1e8]
    assert small["told_apart"].mean() > 0.7
    assert small["percent"].median() > 3
    assert table.loc[table["N"] > 4e8, "told_apart"].mean() < 0.2, "1e-3 is right for the large models"
