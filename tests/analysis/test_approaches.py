"""The three approaches agree where the world lets them, say so where they do not, and know approach 2's own bias."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.approaches import approach2_bias, compare_approaches
from sweeps.errors import InputError
from tests.analysis.closed import closed_form
from tests.analysis.synthetic import LAW, surface

SIZES = 2e3 * 2.0 ** np.arange(10)
LOPSIDED = {"E": 1.0, "A": 2000.0, "B": 50.0, "alpha": 0.8, "beta": 0.28}


def study(law=LAW, *, noise: float = 0.002, seeds: int = 2, reach: float = 4.5, budgets: int = 9) -> pd.DataFrame:
    """IsoFLOP budgets on a lattice of sizes that they share, so that every size has several token counts."""
    rows = []
    for i, C in enumerate(np.geomspace(1e10, 1e14, budgets)):
        N = SIZES[np.abs(np.log(SIZES / float(closed_form(C, law).N))) < np.log(reach)]
        rows += [
            surface(N, C / 6 / N, law, noise=noise, seed=100 * i + s, budget=C).assign(seed=s) for s in range(seeds)
        ]
    return pd.concat(rows, ignore_index=True).assign(cell=lambda t: [f"c{i}" for i in range(len(t))])


def constant_curves(runs: pd.DataFrame, law=LAW) -> pd.DataFrame:
    """Constant-rate curves of the runs, exactly on the law."""
    rows = []
    for run in runs.itertuples():
        tokens = run.D * np.geomspace(0.01, 1.0, 30)
        known = {"cell": run.cell, "N": run.N, "D": run.D, "C": run.C, "learning_rate": 0.01}
        rows.append(pd.DataFrame({"tokens": tokens, "val_loss": surface(run.N, tokens, law)["loss"]} | known))
    return pd.concat(rows, ignore_index=True)


@pytest.mark.parametrize(
    ("alpha", "beta", "reach", "ratio"),
    [
        *((0.3478, 0.3658, w, r) for w, r in ((2, 0.99894), (4, 0.99576), (8, 0.99048), (16, 0.98313))),
        *((0.34, 0.28, w, r) for w, r in ((2, 1.00355), (4, 1.01427), (8, 1.03239), (16, 1.05829))),
    ],
)
def test_bias_of_approach_two_is_the_known_one(alpha, beta, reach, ratio) -> None:
    assert approach2_bias(alpha, beta, reach) == pytest.approx(ratio, abs=6e-6)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(alpha=st.floats(0.1, 1.0), beta=st.floats(0.1, 1.0), reach=st.floats(1.2, 30.0), sizes=st.integers(3, 15))
def test_bias_has_the_symmetry_of_the_law(alpha, beta, reach, sizes) -> None:
    """Trading N for D turns the ratio over; equal exponents have none; the sign is that of alpha - beta."""
    ratio = approach2_bias(alpha, beta, reach, sizes)
    assert ratio * approach2_bias(beta, alpha, reach, sizes) == pytest.approx(1.0, rel=1e-9)
    assert approach2_bias(alpha, alpha, reach, sizes) == pytest.approx(1.0, rel=1e-9)
    assert (ratio - 1.0) * (alpha - beta) >= -1e-9


def test_bias_of_draws_is_that_of_each_draw() -> None:
    many = approach2_bias(np.array([0.3478, 0.34]), np.array([0.3658, 0.28]), 4.0)
    assert many == pytest.approx([0.99576, 1.01427], abs=6e-6)


@pytest.mark.parametrize("grid", [{"sizes": 2}, {"reach": 1.0}, {"reach": np.inf}])
def test_bias_needs_a_grid(grid) -> None:
    with pytest.raises(InputError, match="parabola"):
        approach2_bias(0.3, 0.3, **grid)


@pytest.fixture(scope="module")
def compared():
    return compare_approaches(study(), targets=[3e14], resamples=300)


def test_all_approaches_agree_in_a_world_that_obeys_the_law(compared) -> None:
    table = compared.table()
    assert list(table.index) == ["envelope", "isoflop", "akima", "parametric"]
    best = closed_form(3e14, LAW)
    assert table["N_exponent"].to_numpy() == pytest.approx(0.5, abs=0.03)
    assert table["D_exponent"].to_numpy() == pytest.approx(0.5, abs=0.03)
    assert table["N_at_3e14"].to_numpy() == pytest.approx(float(best.N), rel=0.15)
    assert table["D_at_3e14"].to_numpy() == pytest.approx(float(best.D), rel=0.15)
    assert table["D_per_N_at_3e14"].to_numpy() == pytest.approx(float(best.D / best.N), rel=0.3)
    for column in ("N_exponent", "D_exponent", "N_at_3e14"):
        assert (table[f"{column}_low"] < table[column]).all()
        assert (table[column] < table[f"{column}_high"]).all()
    assert (table["why"] == "").all()
    assert compared.verdicts == ()
    assert compared.bias.value == pytest.approx(1.0, abs=0.01)


def test_comparison_is_json(compared) -> None:
    read = json.loads(json.dumps(compared.to_json()))
    assert read["bias"]["value"] == compared.bias.value
    assert read["akima"]["diagnostics"]["method"] == "akima"


def test_curves_carry_the_envelope_where_their_rate_is_constant() -> None:
    runs = study(seeds=1, budgets=6)
    curves = constant_curves(runs)
    found = compare_approaches(runs, curves, resamples=30)
    assert found.envelope.diagnostics["source"] == "curves"
    assert found.envelope.params["N_exponent"] == pytest.approx(0.5, abs=0.01)
    falling = curves.assign(learning_rate=0.01 * (1.1 - curves["tokens"] / curves["D"]))
    assert compare_approaches(runs, falling, resamples=30).envelope.diagnostics["source"] == "end points"


def test_runs_that_fits_leave_out_do_not_enter_the_envelope() -> None:
    runs = study(seeds=1, budgets=6)
    curves = constant_curves(runs)
    bad = runs["N"] == 3.2e4
    curves.loc[curves["N"] == 3.2e4, "val_loss"] *= 0.5
    found = compare_approaches(runs.assign(excluded=np.where(bad, "diverged", None)), curves, resamples=30)
    assert found.envelope.params["N_exponent"] == pytest.approx(0.5, abs=0.02)


def test_curves_that_do_not_say_whose_they_are_are_bad_input() -> None:
    runs = study(seeds=1, budgets=6)
    with pytest.raises(InputError, match="curves lack the column cell"):
        compare_approaches(runs, constant_curves(runs).drop(columns="cell"), resamples=10)


def test_missing_approach_is_none_and_says_why() -> None:
    N = np.repeat(SIZES[:6], 5)
    grid = surface(N, N * np.tile([11.0, 23.0, 53.0, 131.0, 290.0], 6), noise=0.002)
    found = compare_approaches(grid, targets=[1e13], resamples=50)
    assert found.isoflop is None
    assert found.akima is None
    assert found.parametric is not None
    table = found.table()
    assert np.isnan(table.loc["isoflop", ["N_exponent", "N_at_1e13"]].astype(float)).all()
    assert "budget" in table.loc["isoflop", "why"]
    assert {v.target for v in found.verdicts if v.severity == "refuse"} == {"isoflop", "akima"}
    assert found.reach == 4.0
    assert np.isfinite(found.bias.value)


def test_nothing_at_all_is_four_reasons_and_no_crash() -> None:
    found = compare_approaches(study()[:2], targets=[1e13])
    assert (found.envelope, found.isoflop, found.akima, found.parametric) == (None, None, None, None)
    assert (found.table()["why"] != "").all()
    assert np.isnan(found.bias.value)


def test_biased_parabolas_are_named_and_the_bias_is_what_is_seen() -> None:
    runs = study(LOPSIDED, noise=0.0005, reach=12.0)
    found = compare_approaches(runs, resamples=100)
    (verdict,) = (v for v in found.verdicts if v.code == "approach2_bias")
    assert verdict.severity == "caution"
    seen = [b.N.value / float(closed_form(b.C, LOPSIDED).N) for b in found.isoflop.budgets if b.accepted]
    assert found.bias.value > 1.05
    assert np.median(seen) == pytest.approx(found.bias.value, rel=0.15)


def test_approaches_that_contradict_each_other_are_named() -> None:
    runs = study(noise=0.0005)
    # A penalty on the larger models of each budget, steeper with compute, moves minima but bends the surface too.
    tilt = 0.02 * np.log(runs["N"] / np.sqrt(runs["budget"])) * np.log10(runs["budget"] / 1e12)
    found = compare_approaches(runs.assign(loss=runs["loss"] * np.exp(tilt)), resamples=200)
    assert "approaches_disagree" in {v.code for v in found.verdicts}


def test_given_noise_reaches_every_approach() -> None:
    found = compare_approaches(study(seeds=1, budgets=5), noise=0.01, resamples=30)
    assert [f.noise["source"] for f in (found.isoflop, found.akima, found.parametric)] == ["given"] * 3
