"""Noise between seeds, and what a sample of documents can tell apart."""

import numpy as np
import pandas as pd
import pytest

from analysis import load_runs, paired_errors, seed_noise
from analysis.uncertainty import Noise, clustered_loss, interval, judge_noise, noise_by_scale, paired_difference
from tests.analysis.synthetic import LAW, Run, grid, surface


def table(noise: float = 0.01, groups: int = 400, seeds: int = 3) -> pd.DataFrame:
    N = np.repeat(np.geomspace(1e4, 1e6, groups), seeds)
    return surface(N, 1e6, noise=noise).assign(seed=np.tile(np.arange(seeds), groups))


def test_seed_noise_is_the_pooled_sd_of_log_loss() -> None:
    found = seed_noise(table(), "loss")
    assert found is not None
    assert found.sd == pytest.approx(0.01, rel=0.05)
    assert (found.freedom, found.groups, found.source) == (800, 400, "seeds")


def test_runs_that_differ_in_more_than_the_seed_are_no_replicates() -> None:
    runs = table(groups=1, seeds=2).assign(learning_rate=[0.01, 0.02])
    assert seed_noise(runs, "loss") is None


@pytest.mark.parametrize("column", ["learning_rate", "weight_decay", "beta2", "N", "D", "C", "S1"])
def test_runs_that_differ_in_the_last_digits_of_a_number_are_replicates(column) -> None:
    runs = table(groups=20).assign(learning_rate=0.0003, weight_decay=0.1, beta2=0.999, S1=1234.5)
    single = runs[column].astype(np.float32).astype(float)
    runs[column] = runs[column].where(runs["seed"] != 1, single * (1.0 + 1e-7))
    found = seed_noise(runs, "loss")
    assert found is not None
    assert (found.groups, found.freedom) == (20, 40)


@pytest.mark.parametrize(("column", "values"), [("beta2", [0.99, 0.999]), ("S1", [100.0, 100.5])])
def test_values_that_are_near_and_yet_two_are_told_apart(column, values) -> None:
    assert seed_noise(table(groups=1, seeds=2).assign(**{column: values}), "loss") is None


def test_repeats_without_another_seed_are_no_replicates() -> None:
    assert seed_noise(table(groups=2, seeds=2).assign(seed=0), "loss") is None


def test_excluded_runs_do_not_count() -> None:
    runs = table(groups=2, seeds=2).assign(excluded=[None, "quarantined: odd", None, None])
    found = seed_noise(runs, "loss")
    assert found is not None
    assert found.groups == 1


def test_seed_noise_of_a_real_store(good_store) -> None:
    found = seed_noise(load_runs("demo", good_store))
    assert found is not None
    assert (found.groups, found.freedom) == (10, 20)
    assert found.sd == pytest.approx(0.003, rel=0.4)


def test_few_degrees_of_freedom_make_heavy_tails() -> None:
    generator = np.random.default_rng(0)
    few = Noise(sd=1.0, freedom=3, source="seeds").draw(generator, 20000)
    many = Noise(sd=1.0, freedom=300, source="seeds").draw(generator, 20000)
    given = Noise(sd=1.0, freedom=np.inf, source="given").draw(generator, 5)
    assert np.quantile(few, 0.975) == pytest.approx(np.sqrt(3 / 0.215795), rel=0.05)  # chi-square, 2.5%, 3 degrees
    assert np.std(many) < 0.06
    assert given.tolist() == [1.0] * 5


def test_residuals_replace_seeds_only_where_they_are_clearly_larger() -> None:
    seeds = Noise(sd=0.01, freedom=20, source="seeds", groups=10)
    assert judge_noise(seeds, 0.005, 10) == (seeds, [])
    assert judge_noise(seeds, 0.012, 10) == (seeds, [])
    noise, (verdict,) = judge_noise(seeds, 0.05, 10)
    assert (noise.source, noise.sd, verdict.code) == ("residuals", 0.05, "residuals_exceed_noise")
    assert judge_noise(None, 0.02, 5)[1][0].code == "noise_from_residuals"
    assert judge_noise(None, np.nan, 0)[1][0].code == "noise_unknown"


def test_residuals_a_little_above_a_given_noise_do_not_replace_it() -> None:
    given = Noise(sd=0.01, freedom=np.inf, source="given")
    assert judge_noise(given, 0.012, 10) == (given, [])  # chi-square of 14.4 with 10 degrees: a chance of .16
    noise, (verdict,) = judge_noise(given, 0.014, 10)  # 19.6: .03
    assert (noise.source, verdict.code) == ("residuals", "residuals_exceed_noise")


def test_places_are_held_against_seeds_by_their_own_mean_square() -> None:
    """The sd of a run holds the noise of its place's runs too, which tells nothing of what the law misses."""
    given = Noise(sd=0.01, freedom=np.inf, source="given")
    assert judge_noise(given, 0.012, 60, between=(0.012, 10)) == (given, [])
    noise, (verdict,) = judge_noise(given, 0.011, 60, between=(0.014, 10))
    assert (noise.source, noise.sd, verdict.code) == ("residuals", 0.011, "residuals_exceed_noise")


def test_few_seeds_are_pooled_with_residuals_and_a_given_noise_is_not() -> None:
    seeds = Noise(sd=0.002, freedom=2, source="seeds", groups=2)
    pooled = seeds.pooled(0.004, 6)
    assert (pooled.source, pooled.freedom) == ("seeds", 8)
    assert pooled.sd == pytest.approx(np.sqrt((2 * 0.002**2 + 6 * 0.004**2) / 8))
    assert seeds.pooled(np.nan, 0) == seeds
    for source in ("given", "residuals"):
        noise = Noise(sd=0.002, freedom=np.inf, source=source)
        assert noise.pooled(0.004, 6) == noise


@pytest.mark.parametrize("ratio", [5.0, 0.2])
def test_noise_that_differs_between_cheap_and_dear_units_is_told_apart(ratio) -> None:
    scale, free = np.array([4.0, 1.0, 3.0, 2.0]), np.full(4, 4.0)
    sds = np.where(scale > 2.5, 0.002 * ratio, 0.002)
    pooled = Noise(sd=0.007, freedom=16, source="seeds", groups=4)
    found, (said,) = noise_by_scale(scale, free * sds**2, free, pooled)
    assert said.code == "uneven_noise"
    assert [one.sd for one in found] == pytest.approx(sds)
    assert {one.freedom for one in found} == {8.0}
    given = Noise(sd=0.002, freedom=np.inf, source="given")
    assert noise_by_scale(scale, free * sds**2, free, given) == ([given] * 4, [])


def test_halves_are_compared_where_most_units_are_of_the_largest_scale() -> None:
    scale, free = np.array([1.0, 1.0, 2.0, 2.0, 2.0]), np.full(5, 4.0)
    sds = np.where(scale > 1.5, 0.01, 0.002)
    found, said = noise_by_scale(scale, free * sds**2, free, Noise(sd=0.007, freedom=20, source="seeds", groups=5))
    assert [v.code for v in said] == ["uneven_noise"]
    assert [one.sd for one in found] == pytest.approx(sds)


def test_halves_that_differ_by_chance_or_by_little_have_one_noise() -> None:
    scale, pooled = np.arange(4.0), Noise(sd=0.003, freedom=16, source="seeds", groups=4)
    few, many = np.full(4, 1.0), np.full(4, 1000.0)
    for free, dear in ((few, 0.006), (many, 0.0024)):
        sds = np.where(scale > 1.5, dear, 0.002)
        assert noise_by_scale(scale, free * sds**2, free, pooled) == ([pooled] * 4, [])
    assert noise_by_scale(np.array([]), np.array([]), np.array([]), pooled) == ([], [])


def test_interval_leaves_out_nan_and_keeps_infinity() -> None:
    draws = np.concatenate([np.linspace(0, 1, 1001), [np.nan] * 50])
    assert interval(draws) == pytest.approx((0.025, 0.975))
    assert interval(np.where(draws > 0.9, np.inf, draws))[1] == np.inf
    assert np.isnan(interval(np.array([np.nan]))).all()


# --- documents ---------------------------------------------------------------------------------------------------


def documents(generator: np.random.Generator, count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, loss sums of two models) with hardness shared by both models."""
    tokens = generator.integers(50, 5000, count)
    hardness = generator.normal(2.0, 0.3, count)
    one, two = (tokens * (hardness + generator.normal(shift, 0.02, count)) for shift in (0.05, 0.0))
    return tokens, one, two


def test_clustered_errors_are_those_of_repeated_sampling() -> None:
    generator = np.random.default_rng(0)
    levels, differences = [], []
    for _ in range(1500):
        tokens, one, two = documents(generator)
        levels.append(clustered_loss(one, tokens))
        differences.append(paired_difference((one, tokens), (two, tokens)))
    for found in (levels, differences):
        spread = np.std([f.value for f in found])
        assert np.mean([f.error for f in found]) == pytest.approx(spread, rel=0.1)
    assert np.mean([d.error for d in differences]) < 0.15 * np.mean([one.error for one in levels])
    assert np.mean([d.value for d in differences]) == pytest.approx(0.05, abs=0.002)


def test_loss_is_the_ratio_of_sums_and_empty_documents_do_not_matter() -> None:
    whole = clustered_loss([6.0, 1.0], [2, 1])
    assert whole.value == pytest.approx(7 / 3)
    assert clustered_loss([6.0, 1.0, 0.0], [2, 1, 0]) == whole


def test_different_documents_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference((np.ones(3), np.ones(3)), (np.ones(4), np.ones(4)))


def test_paired_errors_of_a_study(good_store) -> None:
    found = paired_errors("demo", good_store)
    assert len(found) == 4 * 4  # four budgets, four pairs of neighbours
    assert (found["N_small"] < found["N_large"]).all()
    assert (found["paired_error"] < found["level_error"]).all()
    assert (found["documents"] == 40).all()
    runs = load_runs("demo", good_store).set_index("cell")["val_loss_final"]
    first = found.iloc[0]
    small, large = runs[first["cell_small"]], runs[first["cell_large"]]
    assert first["difference"] == pytest.approx(100 * (small - large) / small, rel=1e-6)


def test_study_without_budgets_has_no_pairs(study) -> None:
    assert paired_errors("demo", study([Run(width=w, tokens=51200) for w in (16, 32)])).empty


def test_sizes_without_a_common_seed_are_not_paired(study) -> None:
    runs = grid(budgets=(1.2e11,), sizes=2)
    other = Run(width=runs[1].width, budget=runs[1].budget, seed=5)
    assert paired_errors("demo", study([runs[0], other], law=LAW)).empty
