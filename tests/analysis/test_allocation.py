"""The compute-optimal split against published numbers, in closed form and by search."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.allocation import (
    compute_for_loss,
    interpolated_counter,
    optimum,
    regret,
    smooth_counter,
)
from analysis.laws import CHINCHILLA, LAWS
from tests.analysis.closed import closed_form

BES = dict(CHINCHILLA.published["Besiroglu et al. 2024"])
HOFFMANN = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
TEX = dict(CHINCHILLA.published["Hoffmann et al. 2022, TeX source"])
TIED = dict(LAWS["chinchilla_tied"].published["Muennighoff et al. 2023"])
MUENNIGHOFF = TIED | {"beta": TIED["alpha"]}

OPTIMA = [
    (HOFFMANN, 1e18, 8.058198e7, 2.068287e9, 25.6669, 3.535298),
    (HOFFMANN, 1e21, 1.824218e9, 9.136336e10, 50.0836, 2.328883),
    (HOFFMANN, 5.76e23, 3.218986e10, 2.982306e12, 92.6474, 1.930748),
    (TEX, 1e21, 2.216955e9, 7.517819e10, 33.9106, 2.295491),
    (TEX, 5.76e23, 4.036094e10, 2.378537e12, 58.9317, 1.918412),
    (BES, 1e18, 8.053186e7, 2.069574e9, 25.6988, 3.490492),
    (BES, 1e20, 8.534773e8, 1.952796e10, 22.8805, 2.553405),
    (BES, 1e21, 2.778459e9, 5.998528e10, 21.5894, 2.305529),
    (BES, 5.76e23, 7.224870e10, 1.328744e12, 18.3912, 1.974441),
    (BES, 1e26, 1.015932e12, 1.640530e13, 16.1480, 1.879902),
    (MUENNIGHOFF, 5.76e23, 6.996217e10, 1.372170e12, 19.6130, 2.025162),
]


@pytest.mark.parametrize(("law", "C", "N", "D", "ratio", "loss"), OPTIMA)
@pytest.mark.parametrize("way", [optimum, closed_form])
def test_optimum_of_published_laws(way, law, C, N, D, ratio, loss) -> None:
    best = way(C, law)
    assert [float(best.N), float(best.D), float(best.loss)] == pytest.approx([N, D, loss], rel=1e-6)
    assert float(best.D / best.N) == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize(
    ("law", "G", "a"),
    [
        (HOFFMANN, 1.344711, 0.451613),
        (TEX, 1.300046, 0.456526),
        (BES, 0.119630, 0.512612),
        (MUENNIGHOFF, 0.225802, 0.5),
    ],
)
def test_scale_and_exponent_of_the_optimal_path(law, G, a) -> None:
    assert float(closed_form(6.0, law).N) == pytest.approx(G, rel=5e-6)
    sizes = optimum(np.array([1e19, 1e23]), law).N
    assert np.log(sizes[1] / sizes[0]) / np.log(1e4) == pytest.approx(a, abs=1e-6)


@pytest.mark.parametrize(("factor", "penalty"), [(0.25, 0.0604196), (0.5, 0.0149386), (2, 0.0150635), (4, 0.0614372)])
def test_penalty_of_a_wrong_size(factor, penalty) -> None:
    assert float(regret(1e21, factor, BES)) == pytest.approx(penalty, rel=1e-5)


def test_the_right_size_costs_nothing() -> None:
    assert float(regret(1e21, 1.0, BES)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("law", "K", "g"), [(BES, 1967.861778576, 0.178286491), (HOFFMANN, 813.679831009, 0.153548387)]
)
@pytest.mark.parametrize("way", [optimum, closed_form])
def test_frontier_constant(way, law, K, g) -> None:
    C = np.array([1e18, 1e21, 1e24])
    assert way(C, law).loss - law["E"] == pytest.approx(K * (C / 6) ** -g, rel=1e-8)


@pytest.mark.parametrize(("loss", "C"), [(2.30, 1.065947e21), (2.20, 3.918244e21)])
def test_compute_that_a_loss_needs(loss, C) -> None:
    assert float(compute_for_loss(loss, BES)) == pytest.approx(C, rel=1e-6)


def test_a_loss_below_the_floor_needs_more_than_all_compute() -> None:
    needed = compute_for_loss(1.9, {k: np.array([v, v, v]) for k, v in BES.items()} | {"E": np.array([1.8, 1.9, 2.0])})
    assert np.isfinite(needed[0])
    assert np.isnan(needed[1:]).all()


@settings(max_examples=15, deadline=None)
@given(st.floats(18.0, 26.0), st.floats(0.2, 0.5), st.floats(0.2, 0.5))
def test_compute_for_the_best_loss_is_the_compute(decades, alpha, beta) -> None:
    law = BES | {"alpha": alpha, "beta": beta}
    C = 10.0**decades
    assert float(compute_for_loss(float(optimum(C, law).loss), law)) == pytest.approx(C, rel=1e-5)


def test_optimum_of_gadres_law_is_that_of_tied_exponents() -> None:
    """L = E + a 6^-h N^-2h + b 6^-h D^-2h, so its optimum has the closed form with both exponents 2 h."""
    gadre = dict(LAWS["gadre"].published["RedPajama"])
    shrink = 6.0 ** -gadre["h"]
    same = {"E": gadre["E"], "A": gadre["a"] * shrink, "B": gadre["b"] * shrink}
    exact = closed_form(1e21, same | {"alpha": 2 * gadre["h"], "beta": 2 * gadre["h"]})
    found = optimum(1e21, gadre, law=LAWS["gadre"])
    assert [float(found.N), float(found.loss)] == pytest.approx([float(exact.N), float(exact.loss)], rel=1e-6)


def test_kaplans_law_has_its_own_optimum() -> None:
    """At the optimum alpha (Nc / N)^(alpha / beta) = beta Dc / D."""
    params = dict(LAWS["kaplan"].published["Kaplan et al. 2020"])
    best = optimum(1e21, params, law=LAWS["kaplan"])
    first = params["alpha"] * (params["Nc"] / float(best.N)) ** (params["alpha"] / params["beta"])
    assert first == pytest.approx(params["beta"] * params["Dc"] / float(best.D), rel=1e-5)


def test_marginal_losses_are_equal_at_the_optimum_of_any_counter() -> None:
    """d ln L / d ln N balances d ln L / d ln D times the counter's own slope, by the counter's numbers."""

    def counter(N):
        return 6.0 * N + 4e5 * np.sqrt(N)

    best = optimum(1e18, BES, counter)
    N, D = float(best.N), float(best.D)
    assert D * counter(N) == pytest.approx(1e18)
    slope = (6.0 * N + 2e5 * np.sqrt(N)) / counter(N)
    falls = BES["alpha"] * BES["A"] * N ** -BES["alpha"], BES["beta"] * BES["B"] * D ** -BES["beta"]
    assert falls[0] == pytest.approx(slope * falls[1], rel=1e-5)
    assert float(optimum(1e18, BES).N) > N  # small models are dearer than 6 N: spend on fewer parameters


def test_arrays_of_parameters_give_arrays_of_optima() -> None:
    draws = {k: np.array([v, v * 1.02]) for k, v in BES.items()}
    both = optimum(1e21, draws)
    assert both.N.shape == (2,)
    assert both.N[0] == pytest.approx(2.778459e9, rel=1e-6)
    grown = closed_form(1e21, {k: v[1] for k, v in draws.items()})
    assert both.N[1] == pytest.approx(float(grown.N), rel=1e-6)


def test_an_optimum_out_of_all_bounds_is_no_number() -> None:
    assert np.isnan(optimum(5.0, BES).N)


def test_interpolated_counter_goes_through_the_runs() -> None:
    N = np.array([1e4, 1e5, 1e6, 1e6])
    counter = interpolated_counter(N, N * np.array([9.0, 7.0, 6.0, 6.4]))
    assert counter(np.array([1e3, 1e4, 1e5, 1e8])) == pytest.approx([9e3, 9e4, 7e5, np.sqrt(6.0 * 6.4) * 1e8])


@pytest.mark.parametrize("ratio", [6.0, 5.3])
def test_smooth_counter_is_exact_for_a_constant_ratio(ratio) -> None:
    N = np.array([1e4, 1e5, 1e6])
    assert smooth_counter(N, ratio * N)(np.array([12345.6, 1e9])) == pytest.approx([ratio * 12345.6, ratio * 1e9])


def test_smooth_counter_settles_at_six() -> None:
    N = np.geomspace(1e4, 3e5, 8)
    counter = smooth_counter(N, 6 * N + 100 * np.sqrt(N))
    assert counter(N) == pytest.approx(6 * N + 100 * np.sqrt(N), rel=1e-6)
    assert counter(np.array([1e9])) == pytest.approx([6e9], rel=1e-3)
    assert counter(np.array([1e-2]))[0] > 0  # no nonsense where no model lives
