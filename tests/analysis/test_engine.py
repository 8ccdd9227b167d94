"""The engine at its edges: starts that are far off, tables of very many rows, and noise known from few seeds."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from analysis import fit
from analysis.laws import CHINCHILLA
from analysis.problems import Robust, make_problem
from analysis.solver import SAMPLE_ROWS, descend, solve
from tests.analysis.closed import closed_form
from tests.analysis.synthetic import codes, surface

BES = dict(CHINCHILLA.published["Besiroglu et al. 2024"])


def problem_of_rows(rows: int, noise: float = 0.01):
    generator = np.random.default_rng(0)
    N, D = (np.exp(generator.uniform(np.log(a), np.log(b), rows)) for a, b in ((4e7, 1.6e10), (1e9, 1e12)))
    loss = CHINCHILLA({"N": N, "D": D}, BES) * np.exp(noise * generator.standard_normal(rows))
    return make_problem(CHINCHILLA, {"N": N, "D": D}, loss)


@pytest.mark.parametrize("threshold", [1e-3, 1e-1])
def test_every_start_of_a_coarse_grid_comes_to_the_best_objective(threshold) -> None:
    """Most of Hoffmann's grid lies out of bounds, so that its starts begin at the bounds, where a term is not felt."""
    problem = problem_of_rows(240)
    grid = np.array(list(product((0.0, 10.0, 25.0), (0.0, 10.0, 25.0), (-1.0, 1.0), (0.0, 1.0, 2.0), (0.0, 1.0, 2.0))))
    a, b, e, alpha, beta = grid.T
    starts = problem.theta({"A": np.exp(a), "B": np.exp(b), "E": np.exp(e), "alpha": alpha, "beta": beta})
    assert (np.clip(starts, problem.lower, problem.upper) != starts).any(axis=1).mean() > 0.8
    found = solve(problem, Robust("huber", threshold), starts=starts)
    assert found.agreeing == found.starts == len(grid)
    assert found.objective == pytest.approx(solve(problem, Robust("huber", threshold)).objective, rel=1e-9)


@pytest.mark.parametrize("robust", [Robust("huber", 1e-3), Robust("huber", 0.015), Robust("lad", 1e-9)])
def test_many_rows_end_at_the_optimum_of_all_rows(robust) -> None:
    """The way down is on a sample; the end must not be."""
    problem = problem_of_rows(2 * SAMPLE_ROWS)
    found = solve(problem, robust)
    _, value = descend(problem, robust, problem.theta(BES)[None])
    assert found.objective <= value[0] * (1 + 1e-6)
    _, slopes = problem.jacobian(found.theta)
    misses = problem.predict(found.theta) - problem.target
    own, _ = robust.weights(misses)
    pull = np.abs(slopes @ (own * misses)) / np.sqrt(((slopes * own) ** 2) @ misses**2)
    assert pull.max() < (0.05 if robust.kind == "lad" else 1e-3)


def test_weights_of_many_rows_follow_them_into_the_sample() -> None:
    problem = problem_of_rows(3 * SAMPLE_ROWS)
    spoiled = np.arange(problem.rows) % 2 == 0
    problem.target[spoiled] += 1.0
    found = solve(problem, Robust("l2", 1.0), weights=np.where(spoiled, 0.0, 1.0))
    assert problem.params(found.theta)["E"] == pytest.approx(BES["E"], rel=0.01)


# --- noise -------------------------------------------------------------------------------------------------------


def replicated(seed: int, misfit: float = 0.0):
    """A 5x5 grid with three seeds at two cells."""
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(5e7, 5e9, 5), np.geomspace(1e9, 1e11, 5)))
    extra = [0, 0, 1, 1]
    table = surface(np.append(N, N[extra]), np.append(D, D[extra]), BES, noise=0.005, seed=seed)
    bumps = misfit * np.append(np.cos(np.arange(25.0) * 9), np.cos(np.array(extra) * 9.0))
    return table.assign(loss=table["loss"] * np.exp(bumps), seed=[0] * 25 + [1, 2, 1, 2])


def test_intervals_use_all_that_is_known_of_the_noise() -> None:
    """Four degrees of freedom between seeds leave the noise open by a third; the residuals that agree know better."""
    seeds, drawn = [], []
    for seed in range(24):
        found = fit(replicated(seed), resamples=20)
        assert found.noise["source"] == "seeds"
        assert found.noise["drawn_freedom"] > 4 * found.noise["freedom"]
        seeds.append(found.noise["sd"])
        drawn.append(found.noise["drawn_sd"])
    assert np.std(drawn) < 0.6 * np.std(seeds)
    assert np.mean(drawn) == pytest.approx(0.005, rel=0.1)


def test_noise_that_is_given_is_not_mixed_with_residuals() -> None:
    found = fit(replicated(0), noise=0.02, resamples=20)
    assert found.noise["drawn_sd"] == 0.02


def test_misfit_beyond_the_seeds_still_widens_the_intervals() -> None:
    found = fit(replicated(0, misfit=0.03), resamples=20)
    assert "residuals_exceed_noise" in codes(found)
    assert found.noise["drawn_sd"] == found.noise["residual_sd"] > 0.015


def repeated(seed: int, seeds: int, label: bool = True) -> pd.DataFrame:
    """A 4x4 grid, each cell off by half a percent of its own, as by its tuning, and its seeds by a tenth of that."""
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(5e7, 5e9, 4), np.geomspace(1e9, 1e11, 4)))
    own = np.random.default_rng(seed).normal(0.0, 0.005, 16)
    table = surface(np.tile(N, seeds), np.tile(D, seeds), BES, noise=0.0005, seed=seed)
    table["loss"] *= np.exp(np.tile(own, seeds))
    return table.assign(seed=np.repeat(np.arange(seeds), 16)) if label else table


@pytest.mark.parametrize(("seeds", "label"), [(3, True), (6, True), (3, False)])
def test_what_a_law_misses_at_a_cell_does_not_average_out_over_its_seeds(seeds: int, label: bool) -> None:
    """More seeds of cells that are off say nothing more of the law."""
    alphas, told = [], []
    for seed in range(16):
        found = fit(repeated(seed, seeds, label), resamples=60)
        alphas.append(found.params["alpha"])
        told.append(np.std(found.draws["alpha"]))
    assert np.median(told) > 0.75 * np.std(alphas)
    assert found.noise["common"] > 0.9


def test_runs_that_stand_at_one_place_but_for_the_last_digits_repeat_it() -> None:
    """Whole batches and sums in another order round N and D: the runs are seeds of one cell still."""
    table = repeated(0, 6)
    moved = table.assign(D=table["D"] * (1 + 1e-9 * table["seed"]), N=table["N"] * (1 + 1e-9 * table["seed"]))
    one, two = fit(table, resamples=60), fit(moved, resamples=60)
    for name in ("sd", "freedom", "common"):
        assert two.noise[name] == pytest.approx(one.noise[name], rel=1e-3)
    assert np.std(two.draws["alpha"]) == pytest.approx(np.std(one.draws["alpha"]), rel=1e-3)


def test_seeds_that_scatter_as_cells_do_are_independent_runs() -> None:
    common = []
    for seed in range(24):
        N, D = (v.ravel() for v in np.meshgrid(np.geomspace(5e7, 5e9, 4), np.geomspace(1e9, 1e11, 4)))
        table = surface(np.tile(N, 3), np.tile(D, 3), BES, noise=0.005, seed=seed)
        common.append(fit(table.assign(seed=np.repeat(range(3), 16)), resamples=10).noise.get("common", 0.0))
    assert np.mean(common) < 0.1


def test_one_bad_repeat_does_not_set_the_noise_of_the_whole_fit() -> None:
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(5e7, 5e9, 6), np.geomspace(1e9, 1e11, 6)))
    clean = surface(N, D, BES, noise=0.003)
    bad = clean.iloc[[14]].assign(loss=lambda t: 1.03 * t["loss"])
    one, two = fit(clean, resamples=10), fit(pd.concat([clean, bad], ignore_index=True), resamples=10)
    assert two.noise["sd"] == pytest.approx(one.noise["sd"], rel=0.25)
    assert two.params["alpha"] == pytest.approx(one.params["alpha"], rel=0.01)


@pytest.mark.parametrize("count", [3, 4, 8])
def test_a_few_repeats_leave_the_noise_as_sure_as_all_runs_make_it(count: int) -> None:
    """Where places are off by no more than their runs differ, the noise is not read off the repeats alone."""
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(5e7, 5e9, 5), np.geomspace(1e9, 1e11, 5)))
    again = np.arange(0, 3 * count, 3)
    tables = [surface(np.append(N, N[again]), np.append(D, D[again]), BES, noise=0.005, seed=s) for s in range(24)]
    sds = [fit(table, resamples=2).noise["sd"] for table in tables]
    assert np.mean(sds) == pytest.approx(0.005, rel=0.1)
    assert np.std(sds) < 1.3 * 0.005 / np.sqrt(2 * (20 + count))


@pytest.mark.slow
def test_noise_that_grows_with_compute_is_drawn_by_halves() -> None:
    """The forecast rests on the dearest runs: drawn with the noise of all, its intervals held four in five."""
    said, held = [], []
    for seed in range(24):
        table = replicated(seed).assign(C=lambda t: 6 * t["N"] * t["D"])
        clean = CHINCHILLA({"N": table["N"], "D": table["D"]}, BES)
        dear = table["C"] > table["C"].median()
        table["loss"] = clean * (table["loss"] / clean) ** np.where(dear, 3.0, 0.6)
        found = fit(table, resamples=100, targets=[1e23])
        said.append("uneven_noise" in codes(found))
        low, high = found.decisions["targets"][0]["loss"].interval
        held.append(low <= float(closed_form(1e23, BES).loss) <= high)
        if said[-1]:
            assert found.noise["dearest_sd"] > 1.2 * found.noise["drawn_sd"]
        assert "uneven_noise" not in codes(fit(table, resamples=20, noise=0.015)), "a noise that is given stays"
    assert np.mean(said) > 0.7
    assert np.mean(held) > 0.85
