"""Approach 1: the envelope finds the known frontier, and is refused where the curves do not bear one."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.envelope import fit_curve_envelope, fit_envelope
from analysis.selection import select
from sweeps.errors import InputError
from tests.analysis.closed import closed_form
from tests.analysis.synthetic import codes, published, surface

BES = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
EXPONENT = 0.512612


def curves(
    sizes: int = 6,
    *,
    law=BES,
    seeds: int = 1,
    noise: float = 0.0,
    wiggle: float = 0.0,
    points: int = 40,
    longest: float = 8.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Constant-rate curves of sizes 1e8 2^i, each from 1/8 to `longest` times its optimal tokens, with warm-up."""
    generator, rows = np.random.default_rng(seed), []
    for i in range(sizes):
        N = 1e8 * 2.0**i
        best = 20.0 * N
        for s in range(seeds):
            tokens = np.concatenate(
                [best / 8 * np.array([0.02, 0.1, 0.5]), np.geomspace(best / 8, best * longest, points)]
            )
            shift = noise * generator.standard_normal() + wiggle * generator.standard_normal(len(tokens))
            loss = surface(N, tokens, law)["loss"].to_numpy() * np.exp(shift)
            loss[:3] = [11.0, 9.0, 7.0]
            rate = np.concatenate([[1e-4, 5e-4, 9e-4], np.full(points, 1e-3)])
            known = {"cell": f"{i}.{s}", "family": "llama", "seed": s, "N": N, "D": tokens[-1], "C": 6 * N * tokens[-1]}
            rows.append(pd.DataFrame({"tokens": tokens, "val_loss": loss, "learning_rate": rate} | known))
    return pd.concat(rows, ignore_index=True)


def annealed(table: pd.DataFrame, fraction) -> pd.DataFrame:
    """The same curves with rate = peak fraction(share of the run)."""
    return table.assign(learning_rate=1e-3 * fraction(table["tokens"] / table["D"]))


def horizons(sizes: int = 6, count: int = 4, law=BES) -> pd.DataFrame:
    """End points of `count` lengths per size, over a factor of 16 about the optimum."""
    N = np.repeat(1e8 * 2.0 ** np.arange(sizes), count)
    return surface(N, 20.0 * N * np.tile(np.geomspace(0.25, 4.0, count), sizes), law)


@pytest.mark.parametrize("sizes", [3, 4, 6, 8])
def test_envelope_of_exact_curves_is_the_frontier_however_many_sizes(sizes) -> None:
    found = fit_curve_envelope(curves(sizes), targets=[3e20], resamples=20)
    assert found.params["N_exponent"] == pytest.approx(EXPONENT, abs=0.002)
    assert found.params["D_exponent"] == pytest.approx(1 - EXPONENT, abs=0.002)
    (target,) = found.decisions["targets"]
    best = closed_form(3e20, BES)
    assert target["N"].value == pytest.approx(float(best.N), rel=0.02)
    assert target["D"].value == pytest.approx(float(best.D), rel=0.02)
    assert target["tokens_per_parameter"].value == pytest.approx(float(best.D / best.N), rel=0.04)


def test_end_points_of_several_lengths_give_the_same_frontier() -> None:
    found = fit_envelope(select(horizons()), targets=[3e20], resamples=50)
    assert found.diagnostics["source"] == "end points"
    assert found.params["N_exponent"] == pytest.approx(EXPONENT, abs=0.01)
    assert found.decisions["targets"][0]["N"].value == pytest.approx(float(closed_form(3e20, BES).N), rel=0.03)
    assert codes(found, "refuse") == set()


@settings(deadline=None, max_examples=8, derandomize=True)
@given(alpha=st.floats(0.25, 0.5), beta=st.floats(0.25, 0.5))
def test_envelope_follows_any_law(alpha, beta) -> None:
    law = {"E": 1.8, "alpha": alpha, "beta": beta}
    # A and B that put the optimum of 5.6e8 parameters at 20 tokens per parameter, the middle of the curves.
    law |= {"A": 0.3 / alpha * 5.6e8**alpha, "B": 0.3 / beta * 1.12e10**beta}
    found = fit_curve_envelope(curves(5, law=law, longest=64.0, points=60), resamples=2)
    assert found.params["N_exponent"] == pytest.approx(beta / (alpha + beta), abs=0.01)


def test_interval_holds_the_truth_for_replicated_noisy_curves() -> None:
    inside = 0
    for seed in range(10):
        found = fit_curve_envelope(curves(seeds=3, noise=0.003, wiggle=0.002, seed=seed), resamples=50)
        low, high = found.intervals["N_exponent"]
        inside += low <= EXPONENT <= high
        assert high - low < 0.25
    assert inside >= 8


def test_smoothing_keeps_wiggles_from_winning() -> None:
    found = fit_curve_envelope(curves(wiggle=0.004, points=80), resamples=20)
    assert len(found.diagnostics["crossings"]) == 5  # each size hands over to the next once
    assert found.params["N_exponent"] == pytest.approx(EXPONENT, abs=0.05)


def test_curve_that_ends_is_no_crossing() -> None:
    table = curves(6)
    short = table["N"] == 4e8
    ended = table[~short | (table["tokens"] < 20 * 4e8)]
    found = fit_curve_envelope(ended, resamples=20)
    assert found.params["N_exponent"] == pytest.approx(EXPONENT, abs=0.03)
    handed = {round(c["N"] / 1e8, 3) for c in found.diagnostics["crossings"]}
    assert round(4 * np.sqrt(2), 3) not in handed  # 4e8 stops before 8e8 could beat it


def test_same_seed_same_intervals() -> None:
    table = curves(seeds=2, noise=0.003)
    one, two = (fit_curve_envelope(table, resamples=50, seed=3) for _ in range(2))
    assert one.intervals == two.intervals


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fraction",
    [
        lambda x: 0.1 + 0.45 * (1 + np.cos(np.pi * x)),  # cosine
        lambda x: 1.0 - 0.9 * x,  # linear
        lambda x: np.where(x < 0.8, 1.0, 1.0 - np.sqrt((x - 0.8).clip(0) / 0.2)),  # constant with a cooldown
    ],
)
def test_annealed_curves_are_refused(fraction) -> None:
    found = fit_curve_envelope(annealed(curves(), fraction), targets=[1e20])
    assert found.refused
    assert codes(found, "refuse") >= {"annealed_curves"}
    assert np.isnan(found.params["N_exponent"])
    assert np.isnan(found.decisions["targets"][0]["N"].value)


def test_one_annealed_curve_spoils_the_envelope_unless_the_user_knows_better() -> None:
    table = curves()
    one = table["cell"] == "3.0"
    table.loc[one, "learning_rate"] *= np.where(table["tokens"][one] > 0.9 * table["D"][one], 0.5, 1.0)
    assert "annealed_curves" in codes(fit_curve_envelope(table, resamples=5), "refuse")
    assert not fit_curve_envelope(table, constant_rate=True, resamples=5).refused
    assert "annealed_curves" in codes(fit_curve_envelope(curves(), constant_rate=False), "refuse")


def test_curves_of_unknown_schedule_are_refused_until_the_user_says() -> None:
    table = curves().drop(columns="learning_rate")
    assert codes(fit_curve_envelope(table), "refuse") == {"unknown_schedule"}
    table = table[table["val_loss"] < 6.5]
    assert fit_curve_envelope(table, constant_rate=True, resamples=5).params["N_exponent"] == pytest.approx(
        EXPONENT, abs=0.002
    )


def test_two_sizes_are_too_few() -> None:
    assert codes(fit_curve_envelope(curves(2)), "refuse") == {"too_few_sizes"}


def test_curves_that_never_cross_are_refused() -> None:
    table = curves()
    table["val_loss"] *= (table["N"] / 1e8) ** -0.2  # the largest always wins
    assert codes(fit_curve_envelope(table), "refuse") == {"too_few_sizes"}


def test_two_lengths_per_size_are_no_curve() -> None:
    found = fit_envelope(select(horizons(count=2)))
    assert codes(found, "refuse") == {"too_few_horizons"}
    assert len(found.excluded) == 12


def test_mixed_families_are_refused() -> None:
    table = curves()
    table.loc[table["N"] > 4e8, "family"] = "gpt2"
    assert "mixed_families" in codes(fit_curve_envelope(table, resamples=5), "refuse")


def test_empty_tables_are_refusals_and_missing_columns_are_errors() -> None:
    assert codes(fit_envelope(select(horizons()[:0])), "refuse") == {"too_few_horizons"}
    assert fit_curve_envelope(curves()[:0]).refused
    with pytest.raises(InputError, match="tokens"):
        fit_curve_envelope(curves().drop(columns="tokens"))


def test_noisy_single_curves_confess_that_resamples_are_lost() -> None:
    found = fit_curve_envelope(curves(3), resamples=50)
    assert "few_curves" in codes(found, "caution")
    assert found.diagnostics["copies_lost"] > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_three_sizes_have_an_exponent_and_no_interval_of_width_zero(seed) -> None:
    noisy = fit_curve_envelope(curves(3, noise=0.003, seed=seed), resamples=50)
    assert np.isfinite(noisy.params["N_exponent"])
    assert np.isnan(noisy.intervals["N_exponent"]).all()
    (said,) = [v.message for v in noisy.verdicts if v.code == "few_curves"]
    assert "no interval, so there are none" in said
    many = fit_curve_envelope(curves(8, noise=0.003, seed=seed), resamples=50)
    low, high = many.intervals["N_exponent"]
    assert low < many.params["N_exponent"] < high


# --- published runs ----------------------------------------------------------------------------------------------


def test_envelope_of_published_end_points_has_a_plausible_exponent() -> None:
    table = pd.read_csv(published("chinchilla-epoch/svg_extracted_data.csv"))
    table = table.rename(columns={"Model Size": "N", "Training FLOP": "C"}).assign(D=lambda t: t["C"] / 6 / t["N"])
    found = fit_envelope(select(table), resamples=200)
    assert not found.refused
    low, high = found.intervals["N_exponent"]
    assert low < 0.5 < high


def test_the_fit_names_the_level_of_its_intervals() -> None:
    assert fit_curve_envelope(curves(), resamples=20, level=0.8).level == 0.8
