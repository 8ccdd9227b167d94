"""Comparisons of recipes whose true multiplier is known, and refusals of those that have none."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from analysis import load_runs, read_table
from analysis.compare import Comparison, compare_recipes
from analysis.laws import CHINCHILLA
from sweeps.errors import InputError
from tests.analysis.synthetic import codes, published

BESIROGLU = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
SIZES, TOKENS = (axis.ravel() for axis in np.meshgrid(1e8 * 2.0 ** np.arange(5), 2e9 * 2.0 ** np.arange(5)))


def recipe(
    multiplier: Any = 1.0, *, noise: Any = 0.0, N: np.ndarray = SIZES, D: np.ndarray = TOKENS, **columns: Any
) -> pd.DataFrame:
    """Runs of a recipe that gets out of C FLOPs what the Chinchilla law gets out of `multiplier` times as many."""
    N, D = np.asarray(N, dtype=float), np.asarray(D, dtype=float)
    scale = np.sqrt(multiplier)
    loss = CHINCHILLA({"N": N * scale, "D": D * scale}, BESIROGLU) * np.exp(noise)
    return pd.DataFrame({"N": N, "D": D, "C": 6 * N * D, "loss": loss, "seed": 0} | columns)


def noisy(multiplier: float, seed: int, *, sd: float = 0.005, shared: float = 0.0, **design: Any) -> list[pd.DataFrame]:
    """A baseline and a candidate on one design; `shared` is the part of the noise variance that pairs share."""
    generator = np.random.default_rng(seed)
    common, *own = sd * generator.standard_normal((3, len(design.get("N", SIZES))))
    noises = [np.sqrt(shared) * common + np.sqrt(1 - shared) * e for e in own]
    return [recipe(noise=noises[0], **design), recipe(multiplier, noise=noises[1], **design)]


def width(found: Comparison) -> float:
    low, high = found.flops.value.interval
    return float(np.log(high / low))


# --- the multiplier ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.floats(0.3, 4.0))
def test_a_planted_multiplier_is_found_at_both_ends_of_its_range(multiplier: float) -> None:
    found = compare_recipes(recipe(), recipe(multiplier), resamples=100)
    for estimate in (found.flops.value, found.flops.low, found.flops.high):
        assert estimate.value == pytest.approx(multiplier, rel=0.005)
    assert found.flops.trend.value == pytest.approx(1.0, abs=0.01)
    assert found.allocation.value == pytest.approx(1.0, abs=0.01)


def test_the_range_ends_where_the_baseline_has_no_run_as_good() -> None:
    found = compare_recipes(recipe(), recipe(4.0), resamples=100)
    C = 6 * SIZES * TOKENS
    assert found.compute_range == pytest.approx((C.min(), C.max() / 4.0), rel=0.03)
    assert found.compute_range[0] < found.C < found.compute_range[1]
    assert found.loss_range[1] == pytest.approx(recipe()["loss"].min(), rel=0.01)


def test_a_table_is_worth_exactly_itself() -> None:
    runs = recipe(noise=0.01 * np.random.default_rng(0).standard_normal(25))
    found = compare_recipes(runs, runs, resamples=100)
    assert found.flops.value.value == pytest.approx(1.0, abs=1e-6)
    assert found.flops.value.interval == pytest.approx((1.0, 1.0), abs=1e-4)


def test_exchanging_the_tables_inverts_the_answer() -> None:
    one, two = noisy(1.5, 1)
    there, back = compare_recipes(one, two, resamples=100), compare_recipes(two, one, resamples=100)
    # The ranges differ by the multiplier, hence the middles; without a trend that hardly matters.
    assert there.flops.value.value * back.flops.value.value == pytest.approx(1.0, abs=0.02)


@pytest.mark.slow
def test_two_samples_of_one_recipe_are_worth_the_same() -> None:
    held, logs = 0, []
    for seed in range(24):
        found = compare_recipes(*noisy(1.0, seed, shared=0.5), level=0.9, resamples=100)
        low, high = found.flops.value.interval
        held += low <= 1.0 <= high
        logs.append(np.log(found.flops.value.value))
    # 24 draws: fewer than 18 would have a chance of 1% at 85%.
    assert held >= 18
    assert abs(np.mean(logs)) < 3 * 0.017 / np.sqrt(24)


def test_what_the_tuning_of_a_cell_misses_does_not_average_out_over_its_seeds() -> None:
    """Two recipes that are one, whose cells are off by half a percent each, and their seeds by a fifth of that."""
    N, D = (axis.ravel() for axis in np.meshgrid(1e8 * 4.0 ** np.arange(4), 2e9 * 4.0 ** np.arange(3)))
    found, told = [], []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        tables = []
        for _ in range(2):
            off = 0.005 * generator.standard_normal(12)
            runs = [recipe(noise=off + 0.001 * generator.standard_normal(12), N=N, D=D, seed=k) for k in range(4)]
            tables.append(pd.concat(runs, ignore_index=True))
        comparison = compare_recipes(*tables, resamples=100)
        found.append(np.log(comparison.flops.value.value))
        told.append(np.std(comparison.draws["ln_multiplier"]))
    assert np.median(told) > 0.7 * np.std(found)


@pytest.mark.parametrize("N", [1.0e8, 1.00423e8, 1.0049e8])
def test_runs_pair_up_wherever_their_sizes_lie(N: float) -> None:
    """Of one seed and length, at sizes half a thousandth apart."""
    D = 2e9 * 1.3 ** np.arange(14)
    one, two = noisy(1.1, 4, shared=0.9, N=np.full(14, N), D=D)
    assert compare_recipes(one, two.assign(N=1.0005 * two["N"]), resamples=100).pairs == 14


def test_seeds_that_say_nothing_new_make_no_interval_narrower() -> None:
    """Their cells are off by far more than they differ."""
    N, D = (axis.ravel() for axis in np.meshgrid(1e8 * 4.0 ** np.arange(3), 2e9 * 4.0 ** np.arange(3)))
    widths: dict[int, list[float]] = {1: [], 4: []}
    for design in range(8):
        off = 0.005 * np.random.default_rng(design).standard_normal((2, 9))
        for seeds, found in widths.items():
            noise = 0.0005 * np.random.default_rng(design).standard_normal((2, seeds, 9))
            tables = [
                pd.concat([recipe(noise=off[k] + noise[k, s], N=N, D=D, seed=s) for s in range(seeds)])
                for k in range(2)
            ]
            found.append(width(compare_recipes(*tables, resamples=200)))
    assert np.median(widths[4]) > 0.8 * np.median(widths[1])


def test_a_quarter_more_compute_is_seen_on_five_by_five() -> None:
    told = sum(
        compare_recipes(*noisy(1.25, 100 + seed), level=0.9, resamples=100).flops.value.interval[0] > 1
        for seed in range(8)
    )
    assert told >= 7


def test_wider_levels_give_wider_intervals() -> None:
    tables = noisy(1.2, 3)
    assert width(compare_recipes(*tables, level=0.8, resamples=300)) < width(
        compare_recipes(*tables, level=0.99, resamples=300)
    )


def test_the_same_seed_gives_the_same_numbers() -> None:
    tables = noisy(1.2, 4)
    first = compare_recipes(*tables, seed=5, resamples=100).to_json()["flops"]
    assert first == compare_recipes(*tables, seed=5, resamples=100).to_json()["flops"]


# --- pairs -------------------------------------------------------------------------------------------------------


def test_pairs_cancel_the_noise_that_they_share() -> None:
    one, two = noisy(1.2, 5, shared=0.9)
    paired, unpaired = compare_recipes(one, two, resamples=300), compare_recipes(one, two.assign(seed=1), resamples=300)
    assert (paired.pairs, unpaired.pairs) == (25, 0)
    assert width(paired) < 0.6 * width(unpaired)
    assert paired.noise["shared"] == pytest.approx(0.9, abs=0.08)
    assert "unpaired" in codes(unpaired)


def test_lattice_sizes_and_budgets_pair_cells_that_round_differently() -> None:
    labels = {"size": SIZES, "budget": 6 * SIZES * TOKENS}
    one = recipe(N=SIZES * 1.03, **labels)
    two = recipe(N=SIZES * 0.96, **labels)
    # The budgets are the same; the runs far above the best of their budget are left out of both tables.
    assert compare_recipes(one, two, resamples=100).pairs == compare_recipes(one, two, resamples=100).runs[0] >= 5
    assert compare_recipes(one.drop(columns="size"), two.drop(columns="size"), resamples=100).pairs == 0


def test_other_data_orders_are_no_pairs() -> None:
    one, two = noisy(1.0, 6)
    assert compare_recipes(one.assign(data_seed=0), two.assign(data_seed=1), resamples=100).pairs == 0


def test_unpaired_runs_count_with_the_pairs() -> None:
    one, two = noisy(1.3, 7)
    found = compare_recipes(one, two.iloc[:15], resamples=200)
    assert (found.pairs, found.runs) == (15, (25, 15))
    assert found.flops.value.interval[0] < 1.3 < found.flops.value.interval[1]


def test_one_bad_run_hardly_moves_the_multiplier() -> None:
    one, two = noisy(1.2, 8)
    spoilt = two.assign(loss=two["loss"].where(two.index != 12, two["loss"] * 1.1))
    clean, found = compare_recipes(one, two, resamples=200), compare_recipes(one, spoilt, resamples=200)
    assert abs(np.log(found.flops.value.value / clean.flops.value.value)) < 0.25 * width(clean)


# --- scale and allocation ----------------------------------------------------------------------------------------


def test_a_gain_that_fades_with_scale_is_said_to() -> None:
    C = 6 * SIZES * TOKENS
    fading = 2.0 * (C / C.min()) ** -0.12
    one, two = noisy(1.0, 9, sd=0.002)
    found = compare_recipes(one, recipe(fading, noise=np.log(two["loss"] / recipe()["loss"])))
    assert "changes_with_scale" in codes(found, "caution")
    assert found.flops.low.value > found.flops.value.value > found.flops.high.value
    assert found.flops.trend.interval[0] < 10**-0.12 < found.flops.trend.interval[1]


def test_a_gain_that_turns_is_not_fitted_with_a_line() -> None:
    C = 6 * SIZES * TOKENS
    turning = np.exp(0.1 * np.log(C / np.exp(np.log(C).mean())) ** 2 - 0.2)
    one, two = noisy(1.0, 10, sd=0.001)
    found = compare_recipes(one, recipe(turning, noise=np.log(two["loss"] / recipe()["loss"])))
    middle = np.exp(0.1 * np.log(found.C / np.exp(np.log(C).mean())) ** 2 - 0.2)
    assert found.flops.value.value == pytest.approx(middle, rel=0.05)
    assert found.flops.low.value > 1.3 * found.flops.value.value


def test_a_gain_from_size_alone_is_larger_where_size_is_what_lacks() -> None:
    """Candidate parameters count 1.6 fold: the multiplier is the root of its loss on the baseline's law."""
    found = compare_recipes(
        recipe(), recipe().assign(loss=CHINCHILLA({"N": SIZES * 1.6, "D": TOKENS}, BESIROGLU)), resamples=200
    )

    def exact(ratio: float) -> float:
        N = np.sqrt(found.C / 6 / ratio)
        wanted = CHINCHILLA({"N": 1.6 * N, "D": ratio * N}, BESIROGLU)
        return float(
            brentq(lambda m: CHINCHILLA({"N": N * m**0.5, "D": ratio * N * m**0.5}, BESIROGLU) - wanted, 1.0, 3.0)
        )

    assert found.flops.value.value == pytest.approx(exact(found.tokens_per_parameter), rel=0.01)
    assert found.allocation.value == pytest.approx(
        exact(found.tokens_per_parameter * 10**0.5) / exact(found.tokens_per_parameter / 10**0.5), rel=0.02
    )
    assert "changes_with_allocation" in codes(found)


def test_runs_along_one_path_are_compared_along_it() -> None:
    N = 1e8 * 2.0 ** np.arange(6)
    found = compare_recipes(recipe(N=N, D=20 * N), recipe(1.3, N=N, D=20 * N), resamples=100)
    assert found.flops.value.value == pytest.approx(1.3, rel=0.02)
    assert found.tokens_per_parameter == pytest.approx(20)
    assert np.isnan(found.allocation.value)


def test_isoflop_runs_far_from_their_minimum_do_not_speak() -> None:
    budget = np.repeat(1e19 * 4.0 ** np.arange(4), 5)
    N = np.sqrt(budget / 120) * np.tile(4.0 ** np.arange(-2, 3), 4)
    one, two = (recipe(m, N=N, D=budget / (6 * N), budget=budget) for m in (1.0, 1.4))
    for table in (one, two):
        table.loc[table["N"] == N.max(), "loss"] *= 1.5
    found = compare_recipes(one, two, resamples=100)
    assert found.flops.value.value == pytest.approx(1.4, rel=0.02)
    assert any("best of its budget" in e["reason"] for e in found.excluded)


# --- wall clock --------------------------------------------------------------------------------------------------


def test_wall_clock_is_kept_apart_from_flops() -> None:
    one, two = noisy(1.5, 11)
    timing = np.exp(0.02 * np.random.default_rng(0).standard_normal((2, 25)))
    found = compare_recipes(
        one.assign(seconds=one["C"] / 1e15 * timing[0]), two.assign(seconds=two["C"] / 1e15 * 2.0 * timing[1])
    )
    assert found.flops.value.value == pytest.approx(1.5, rel=0.06)
    assert found.seconds.value.value == pytest.approx(0.75, rel=0.06)  # half the speed eats the gain
    assert found.seconds.value.interval[1] < 1.0 < found.flops.value.interval[0]
    assert "wall_clock" in codes(found, "info")


def test_without_seconds_on_both_sides_there_is_no_wall_clock() -> None:
    one, two = noisy(1.5, 11)
    found = compare_recipes(one.assign(seconds=1.0), two, resamples=100)
    assert np.isnan(found.seconds.value.value)
    assert "wall_clock" not in codes(found)


# --- refusals ----------------------------------------------------------------------------------------------------

FEW = {"N": SIZES[:3], "D": TOKENS[:3]}


@pytest.mark.parametrize(
    ("one", "two", "code"),
    [
        (recipe(corpus="a"), recipe(corpus="b"), "different_losses"),
        (recipe(tokenizer="bytes"), recipe(tokenizer="bpe"), "different_losses"),
        (recipe(context=128), recipe(context=256), "different_losses"),
        (recipe(corpus="a", validation_tokens=0), recipe(corpus="a", validation_tokens=65_536), "different_losses"),
        (recipe(family=["a", "b"] * 12 + ["a"]), recipe(), "mixed_families"),
        (recipe().drop(columns="C"), recipe(), "different_compute"),
        (recipe().rename(columns={"loss": "val_loss_final"}), recipe(), "different_losses"),
        (recipe(), recipe(**FEW), "too_few_runs"),
        (recipe(**FEW), recipe(), "too_few_runs"),
        (recipe(), recipe(noise=-0.8), "no_overlap"),
        (recipe(D=20 * SIZES), recipe(D=200 * SIZES), "different_allocation"),
        (recipe().assign(loss=3.0 + 0.01 * np.cos(np.arange(25.0))), recipe(), "no_slope"),
    ],
)
def test_what_cannot_be_compared_is_refused(one: pd.DataFrame, two: pd.DataFrame, code: str) -> None:
    found = compare_recipes(one, two, resamples=100)
    assert code in codes(found, "refuse")
    assert np.isnan(found.flops.value.value)
    assert np.isnan(found.compute_range).all()
    assert str(found).startswith("Not comparable: ")
    assert json.loads(json.dumps(found.to_json()))["flops"]["value"]["value"] is None


def test_a_recipe_beyond_the_reach_of_the_other_is_refused() -> None:
    small, large = (recipe(m, N=s * SIZES, D=s * TOKENS) for m, s in ((1.0, 1.0), (30.0, 1.0)))
    found = compare_recipes(small, large, resamples=100)
    assert found.refused or found.compute_range[1] < large["C"].max() / 25


def test_bits_per_byte_compare_across_tokenizers() -> None:
    one, two = (
        recipe(m, tokenizer=t, corpus=t).rename(columns={"loss": "val_bpb_final"}) for m, t in ((1, "a"), (2, "b"))
    )
    found = compare_recipes(one, two, loss="val_bpb_final", resamples=100)
    assert found.flops.value.value == pytest.approx(2.0, rel=0.01)
    assert "different_corpora" in codes(found, "caution")


def test_bits_per_byte_of_another_part_of_the_validation_text_are_cautioned() -> None:
    one, two = (
        recipe(1.0, corpus="a", validation_tokens=count, noise=off).rename(columns={"loss": "val_bpb_final"})
        for count, off in ((0, 0.0), (65_536, -0.01))
    )
    found = compare_recipes(one, two, loss="val_bpb_final", resamples=100)
    said = [v.message for v in found.verdicts if v.code == "different_corpora"]
    assert ["validation_tokens" in message for message in said] == [True]


def test_numbers_that_make_no_sense_are_input_errors() -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        compare_recipes(recipe(), recipe(), level=95)
    with pytest.raises(InputError, match="at least 100"):
        compare_recipes(recipe(), recipe(), resamples=1)
    with pytest.raises(InputError, match="lacks"):
        compare_recipes(recipe(), recipe().drop(columns="loss"))


# --- real runs ---------------------------------------------------------------------------------------------------


def test_a_study_compared_with_itself_by_seed(good_store) -> None:
    runs = load_runs("demo", good_store)
    first = runs[runs["seed"] == 0]
    found = compare_recipes(first, first.assign(seed=1), resamples=200)
    assert not found.refused
    assert found.flops.value.value == pytest.approx(1.0, abs=1e-3)
    assert "seconds" in json.dumps(found.to_json())


def test_halves_of_the_chinchilla_runs_are_worth_the_same() -> None:
    table = read_table(published("chinchilla-epoch/svg_extracted_data.csv"))
    runs = table[table["loss"] < np.sort(table["loss"])[-5]]
    half = np.random.default_rng(0).permutation(len(runs)) < len(runs) // 2
    found = compare_recipes(runs[half], runs[~half], resamples=300)
    low, high = found.flops.value.interval
    assert 0.93 < low < 1.0 < high < 1.07


def test_the_constant_rate_of_porian_gains_at_small_scale_and_loses_at_large() -> None:
    """Read off their tables: at 2.56e19 FLOPs its best loss, 3.097, cost the cosine runs about 1.2e19."""
    table = pd.read_csv(published("porian-isoflop/isoflop_points.csv"))
    table = table[(table["param_count"] == "standard") & (table["val"] == "val")]
    table = table.rename(columns={"n": "N", "t": "D", "flops": "budget"}).assign(C=lambda t: t["budget"])
    cosine = table[(table["hparams"] == "base") & (table["decay"] == "chinchilla")]
    constant = table[(table["hparams"] == "tuned") & (table["decay"] == "const")]
    found = compare_recipes(cosine, constant, resamples=300)
    assert found.flops.low.interval[0] > 2.0
    assert found.flops.high.interval[1] < 0.5
    assert "changes_with_scale" in codes(found)
