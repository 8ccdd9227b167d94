"""Transfer: planted slopes of the best rate against width come back in their intervals; edges are refused."""

import numpy as np
import pandas as pd
import pytest

from analysis.transfers import Transfer, transfer
from sweeps.errors import InputError

WIDTHS = (16, 32, 64, 128)
RATES = tuple(0.001 * 2.0**k for k in range(9))


def table(
    slopes: dict[str, float],
    *,
    widths: tuple[int, ...] = WIDTHS,
    rates: tuple[float, ...] = RATES,
    noise: float = 0.003,
    seed: int = 0,
) -> pd.DataFrame:
    """Three seeds at every rate; the best rate goes as .016 (width / 45) ^ slope."""
    generator = np.random.default_rng(seed)
    rows = []
    for parametrisation, slope in slopes.items():
        for width in widths:
            best = 0.016 * (width / 45.0) ** slope
            for rate in rates:
                for number in range(3):
                    loss = 2.5 * width**-0.05 * np.exp(0.02 * np.log(rate / best) ** 2 + noise * generator.normal())
                    row = {"parametrisation": parametrisation, "width": width, "depth": 1, "N": 20.0 * width**2}
                    rows.append(row | {"D": 6e4, "learning_rate": rate, "seed": number, "loss": loss})
    return pd.DataFrame(rows)


def by_name(found: list[Transfer]) -> dict[str, Transfer]:
    return {one.parametrisation: one for one in found}


def test_a_rate_that_stays_is_told_from_one_that_moves() -> None:
    found = by_name(transfer(table({"standard": -0.8, "mup": 0.0})))
    assert found["standard"].moves is True
    assert found["mup"].moves is False
    assert found["standard"].slope.value == pytest.approx(-0.8, abs=0.1)
    assert str(found["mup"]).endswith("it stays")
    assert list(found["mup"].optima["width"]) == list(WIDTHS)


def test_three_rates_without_seeds_have_the_scatter_of_their_widths_for_an_interval_and_say_so() -> None:
    three = table({"standard": -0.3}, widths=(64, 128, 256, 512), rates=(0.004, 0.012, 0.036), noise=0.001)
    (one,) = transfer(three[three["seed"] == 0].drop(columns="seed"), resamples=100)
    low, high = one.slope.interval
    assert low < one.slope.value < high
    assert one.slope.value == pytest.approx(-0.3, abs=0.1)
    assert "noise_unknown" in {v.code for v in one.verdicts}


def test_intervals_cover_planted_slopes_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(60):
        (one,) = transfer(table({"standard": -0.5}, seed=seed), resamples=300)
        low, high = one.slope.interval
        covered += low <= -0.5 <= high
    assert covered >= 52, "95% of 60 is 57; fewer than 52 has a chance below 1%"


def test_optima_at_the_edge_do_not_enter_and_too_few_of_them_give_no_slope() -> None:
    (one,) = transfer(table({"standard": -1.0}, rates=tuple(rate for rate in RATES if rate < 0.02)))
    assert one.optima["refused"].tolist()[0]
    assert any("does not enter" in v.message for v in one.verdicts)
    (none,) = transfer(table({"standard": 0.0}, rates=tuple(rate for rate in RATES if rate < 0.02)))
    assert none.refused
    assert none.moves is None
    assert np.isnan(none.slope.value)
    assert none.to_json()["slope"]["value"] is None
    assert "0 widths of 4" in str(none)


def test_a_narrow_span_and_a_wide_interval_are_cautions() -> None:
    (quiet,) = transfer(table({"mup": 0.0}))
    assert not quiet.verdicts
    (noisy,) = transfer(table({"mup": 0.0}, widths=(32, 48, 64), noise=0.03))
    assert {v.code for v in noisy.verdicts} == {"narrow_span", "open_interval"}


def test_depths_and_lengths_are_lines_of_their_own() -> None:
    one = table({"mup": 0.0})
    deep = one.assign(depth=4, N=3.7 * one["N"], loss=one["loss"] * 0.98)
    found = transfer(pd.concat([one, deep, one.assign(D=1.2e5)]))
    assert sorted((t.group["depth"], t.group["D"]) for t in found) == [(1.0, 6e4), (1.0, 1.2e5), (4.0, 6e4)]
    assert all(len(t.optima) == len(WIDTHS) for t in found)


def test_an_empty_column_of_depths_divides_nothing() -> None:
    (found,) = transfer(table({"mup": 0.0}).assign(depth=np.nan))
    assert "depth" not in found.group
    assert list(found.optima["width"]) == list(WIDTHS)


def test_mlp_ratios_are_lines_of_their_own() -> None:
    one = table({"mup": 0.0})
    four, two = one.assign(mlp_width=4 * one["width"]), one.assign(mlp_width=2 * one["width"], N=0.7 * one["N"])
    found = transfer(pd.concat([four, two]))
    assert [t.group["mlp_ratio"] for t in found] == [2.0, 4.0]
    assert [list(t.optima["width"]) for t in found] == [list(WIDTHS)] * 2
    assert [t.moves for t in found] == [False, False]
    rounded = one.assign(mlp_width=np.ceil(one["width"] * 2.67 / 8.0) * 8.0)
    assert ["mlp_ratio" in t.group for t in transfer(rounded)] == [False]


def test_models_of_one_width_that_nothing_tells_apart_are_refused_in_words() -> None:
    one = table({"mup": 0.0})
    (found,) = transfer(pd.concat([one, one.assign(N=0.7 * one["N"])]))
    assert found.refused
    assert "8 groups of runs at 4 widths" in found.verdicts[-1].message
    assert len(found.optima) == 8


@pytest.mark.parametrize("nothing", [np.nan, 0.0])
def test_runs_without_a_width_are_left_out_and_counted(nothing) -> None:
    runs = table({"standard": -0.8})
    other = runs[runs["width"] == 16].assign(width=nothing)
    (whole,), (one,) = transfer(runs), transfer(pd.concat([runs, other.assign(N=3e4)], ignore_index=True))
    assert one.slope == whole.slope
    assert [v.message for v in one.verdicts if v.code == "excluded_runs"] == [
        f"{len(other)} runs without a positive width left out."
    ]


def test_a_table_without_widths_is_refused() -> None:
    with pytest.raises(InputError, match="no column width"):
        transfer(table({"mup": 0.0}).drop(columns="width"))
