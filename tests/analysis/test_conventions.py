"""Counting conventions: a table whose counts are powers of each other, so that every exponent is known exactly."""

import numpy as np
import pandas as pd
import pytest

from analysis.conventions import compare_conventions
from sweeps.errors import InputError
from tests.analysis.synthetic import LAW, budgets_table, published, surface

STRETCH = 1.2
"""N_nonembedding ~ N^1.2: then L is a Chinchilla law of it as well, with alpha / 1.2."""
ALPHA, BETA = LAW["alpha"], LAW["beta"]
OWN = BETA / (ALPHA + BETA)
STRETCHED = BETA / (ALPHA / STRETCH + BETA)


def two_counts(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(N_nonembedding=0.05 * table["N"] ** STRETCH)


def grid_table(noise: float = 0.0) -> pd.DataFrame:
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e6, 5), np.geomspace(3e5, 3e7, 5)))
    return two_counts(surface(N, D, noise=noise))


def isoflop_table(noise: float = 0.0) -> pd.DataFrame:
    return two_counts(budgets_table([1e11, 4e11, 1.6e12, 6.4e12], reach=3.0, noise=noise))


def by_convention(frame: pd.DataFrame) -> dict[tuple[str, str], pd.Series]:
    return {(row["N"], row["C"]): row for _, row in frame.iterrows()}


def test_law_of_both_counts_has_the_known_exponents_in_each() -> None:
    rows = by_convention(compare_conventions(grid_table(), "chinchilla", resamples=20))
    assert list(rows) == [("N", "C"), ("N", "C_6nd"), ("N_nonembedding", "C"), ("N_nonembedding", "C_6nd")]
    for row in rows.values():
        assert row["alpha"] == pytest.approx(ALPHA / (1 if row["N"] == "N" else STRETCH), rel=1e-4)
        assert row["beta"] == pytest.approx(BETA, rel=1e-4)
    assert rows["N", "C"]["N_exponent"] == pytest.approx(OWN, abs=1e-4)
    assert rows["N_nonembedding", "C_6nd"]["N_exponent"] == pytest.approx(STRETCHED, abs=1e-4)
    assert rows["N_nonembedding", "C_6nd"]["D_exponent"] == pytest.approx(1 - STRETCHED, abs=1e-4)


def test_isoflop_exponents_move_with_the_count_as_they_must() -> None:
    rows = by_convention(compare_conventions(isoflop_table(), "isoflop"))
    assert rows["N", "C"]["N_exponent"] == pytest.approx(OWN, abs=0.003)
    # the same optima under another name: N' = N^1.2, and the same tokens
    assert rows["N_nonembedding", "C"]["N_exponent"] == pytest.approx(STRETCH * OWN, abs=0.003)
    assert rows["N_nonembedding", "C"]["D_exponent"] == pytest.approx(1 - OWN, abs=0.003)
    # other optima: those at equal 6 N' D
    assert rows["N_nonembedding", "C_6nd"]["N_exponent"] == pytest.approx(STRETCHED, abs=0.01)
    assert rows["N_nonembedding", "C_6nd"]["D_exponent"] == pytest.approx(1 - STRETCHED, abs=0.01)
    assert "alpha" not in rows["N", "C"]


def test_equal_counts_give_equal_rows_and_intervals_hold_their_values() -> None:
    table = isoflop_table(noise=0.002).assign(N_total=lambda t: t["N"])
    rows = by_convention(compare_conventions(table, sizes=("N", "N_total")))
    one, two = rows["N", "C"].drop("N"), rows["N_total", "C"].drop("N")
    assert one.equals(two)
    for row in rows.values():
        for name in ("N_exponent", "D_exponent"):
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]


def test_options_reach_every_fit() -> None:
    table = grid_table(noise=0.005)
    wide, narrow = (compare_conventions(table, "chinchilla", resamples=100, level=v) for v in (0.95, 0.5))
    assert ((wide["alpha_high"] - wide["alpha_low"]) > 1.5 * (narrow["alpha_high"] - narrow["alpha_low"])).all()


def test_refused_fit_keeps_its_row_without_numbers() -> None:
    table = grid_table().head(4)
    frame = compare_conventions(table, "chinchilla")
    assert len(frame) == 4
    assert frame[["N_exponent", "alpha", "D_exponent_high"]].isna().all(axis=None)
    assert frame["verdicts"].str.contains("too_few_runs").all()


def test_assumed_compute_is_no_convention_of_its_own() -> None:
    frame = compare_conventions(grid_table().assign(C_assumed=True), "chinchilla", resamples=20)
    assert frame["C"].tolist() == ["C_6nd", "C_6nd"]


@pytest.mark.parametrize(
    ("table", "sizes", "named"),
    [
        (lambda: surface([1e5], [1e6]).drop(columns="C"), None, "N_nonembedding, N_nonembedding_head, N_total"),
        (grid_table, ("N", "N_total"), "lacks N_total"),
        (lambda: grid_table().drop(columns="D"), None, "lacks D"),
    ],
)
def test_missing_columns_are_named(table, sizes, named) -> None:
    with pytest.raises(InputError, match=named):
        compare_conventions(table(), "chinchilla", sizes=sizes)


@pytest.mark.parametrize("law", ["saturating", "data_constrained", "nonsense"])
def test_law_without_a_split_is_an_input_error(law) -> None:
    with pytest.raises(InputError, match=r"isoflop, chinchilla"):
        compare_conventions(grid_table(), law)


def test_leaving_out_embeddings_raises_the_published_exponent() -> None:
    table = pd.read_csv(published("misfitting/scaling_results_last_ckpt_only.csv"))
    table = table.sort_values("loss").drop_duplicates(["N", "D"])
    rows = by_convention(compare_conventions(table, "chinchilla", sizes=("N", "N_no_emb"), resamples=50))
    with_head, without = rows["N", "C_6nd"], rows["N_no_emb", "C_6nd"]
    assert with_head["N_exponent"] + with_head["D_exponent"] == pytest.approx(1.0, abs=1e-6)
    assert without["alpha"] < 0.6 * with_head["alpha"]
    assert without["N_exponent"] > with_head["N_exponent"] + 0.05
