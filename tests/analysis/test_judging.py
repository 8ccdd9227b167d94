"""One surface for every verdict on a fit of a law: it is said there, alone, and not on a clean surface."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import fit, judging
from analysis.laws import CHINCHILLA, Law, find_law
from analysis.problems import Robust, make_problem
from analysis.solver import descend, solve
from analysis.verdicts import Fit
from tests.analysis.synthetic import budgets_table, codes, surface

BES = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
N, D = (v.ravel() for v in np.meshgrid(np.geomspace(3e7, 3e9, 5), np.geomspace(1e9, 1e11, 5)))


def grid(
    noise: float = 0.004, *, law: Mapping[str, float] = BES, seed: int = 0, seeds: int = 2, N: Any = N, D: Any = D
) -> pd.DataFrame:
    """Every point with `seeds` seeds."""
    table = surface(np.tile(N, seeds), np.tile(D, seeds), law, noise=noise, seed=seed)
    return table.assign(seed=np.repeat(np.arange(seeds), np.size(N)))


def table_of(
    law: Law, variables: Mapping[str, np.ndarray], params: Mapping[str, float], noise: float, seed: int = 0
) -> pd.DataFrame:
    """Any law's surface, two seeds at every point."""
    exact = law(variables, params)
    errors = noise * np.random.default_rng(seed).standard_normal((2, len(exact)))
    frame = pd.DataFrame({k: np.tile(v, 2) for k, v in variables.items()})
    frame[law.response] = (exact * np.exp(errors)).ravel()
    return frame.assign(seed=np.repeat([0, 1], len(exact)))


def judged(runs: pd.DataFrame, law: str = "chinchilla", **options: Any) -> Fit:
    return fit(runs, law, **({"resamples": 200} | options))


def said(found: Fit) -> set[tuple[str, str, str, str | None]]:
    return {(str(v.code), v.severity, v.scope, v.target) for v in found.verdicts}


# --- nothing to say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0005, 0.004, 0.01])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_clean_surface_raises_no_verdict(noise, seed) -> None:
    found = judged(grid(noise, seed=seed), targets=[1e21], loss_targets=[2.3])
    assert said(found) == set()
    assert np.isfinite(list(found.params.values())).all()
    assert np.isfinite(list(found.intervals.values())).all()


def test_a_clean_surface_raises_no_verdict_under_any_objective() -> None:
    for objective in ("l2", "lad", "student"):
        assert said(judged(grid(), objective=objective)) == set()


def test_false_alarms_are_rare_on_noisy_studies() -> None:
    """Half a percent of noise, one seed: nothing refused, and hardly a caution beyond that the noise is a guess."""
    budgets = np.geomspace(1e18, 3e21, 8)
    alarms = 0
    for seed in range(10):
        for runs in (
            surface(N, D, BES, noise=0.005, seed=seed),
            budgets_table(budgets, law=BES, sizes=7, noise=0.005, seed=seed),
        ):
            found = judged(runs, resamples=20)
            assert not codes(found, "refuse")
            alarms += codes(found) != {"noise_from_residuals"}
    assert alarms <= 2


# --- the design --------------------------------------------------------------------------------------------------


def test_too_few_runs() -> None:
    found = judged(grid().iloc[:5], targets=[1e21], loss_targets=[2.3])
    assert said(found) == {("too_few_runs", "refuse", "fit", None)}
    assert np.isnan([*found.params.values(), found.decisions["targets"][0]["N"].value]).all()
    json.dumps(found.to_json(), allow_nan=False)


def test_two_sizes_are_too_few_levels() -> None:
    sizes, tokens = (v.ravel() for v in np.meshgrid([3e7, 3e9], np.geomspace(1e9, 1e11, 6)))
    assert said(judged(grid(N=sizes, D=tokens))) == {("too_few_levels", "refuse", "fit", None)}


@pytest.mark.parametrize("slope", [0.5, 1.0, -1.0])
def test_runs_along_one_path(slope) -> None:
    sizes = np.geomspace(1e8, 1e10, 12)
    tokens = 2e10 * (sizes / 1e9) ** slope
    assert said(judged(grid(N=sizes, D=tokens))) == {("one_path", "refuse", "fit", None)}


def test_narrow_span() -> None:
    sizes, tokens = (v.ravel() for v in np.meshgrid([2e8, 3.5e8, 6e8], [4e9, 7e9, 1.2e10]))
    found = judged(grid(0.0005, N=sizes, D=tokens, seeds=3))
    assert said(found) == {("narrow_span", "caution", "fit", None)}


@pytest.mark.parametrize(
    ("column", "code"),
    [
        ("family", "mixed_families"),
        ("corpus", "mixed_losses"),
        ("tokenizer", "mixed_losses"),
        ("context", "mixed_losses"),
    ],
)
def test_mixed_runs(column, code) -> None:
    table = grid().assign(**{column: "a"})
    table.loc[3, column] = "b"
    assert said(judged(table)) == {(code, "refuse", "fit", None)}


def test_excluded_runs() -> None:
    table = grid()
    table.loc[3, "loss"] = np.nan
    found = judged(table)
    assert said(found) == {("excluded_runs", "info", "fit", None)}
    assert [entry["cell"] for entry in found.excluded] == ["row 3"]
    assert found.n_runs == 49


def test_outcome_selection() -> None:
    found = judged(grid(), drop_worst=2)
    assert said(found) == {("outcome_selection", "caution", "fit", None)}
    assert found.n_runs == 48
    assert len(found.excluded) == 2


# --- noise -------------------------------------------------------------------------------------------------------


def test_noise_from_residuals() -> None:
    found = judged(surface(N, D, BES, noise=0.004))
    assert said(found) == {("noise_from_residuals", "caution", "fit", None)}
    assert found.noise["sd"] == pytest.approx(0.004, rel=0.5)


def test_residuals_exceed_noise() -> None:
    """Cells are off the law by 2%, both seeds alike."""
    off = np.exp(0.02 * np.random.default_rng(1).standard_normal(len(N)))
    table = grid().assign(loss=lambda t: t["loss"] * np.tile(off, 2))
    found = judged(table)
    assert said(found) == {("residuals_exceed_noise", "caution", "fit", None)}
    assert found.noise["sd"] == pytest.approx(0.02, rel=0.4)


@pytest.mark.parametrize("name", ["clark", "saturating", "tissue"])
def test_seeds_are_replicates_only_where_every_variable_of_the_law_is_equal(name) -> None:
    """Runs of one size with other expert counts are not equal runs: taken for such, they drown the law in noise."""
    active, experts = (
        v.ravel() for v in np.meshgrid(np.geomspace(1.5e7, 1.3e9, 6), [1.0, 2.0, 8.0, 32.0, 128.0, 512.0])
    )
    S1, S2 = (v.ravel() for v in np.meshgrid(np.geomspace(1, 100, 6), np.linspace(0, 1, 5)))
    variables, params = {
        "clark": ({"N": active, "experts": experts}, dict(find_law("clark").published["S-BASE"])),
        "saturating": ({"x": np.geomspace(1e18, 1e23, 25)}, {"E": 1.8, "A": 3e3, "alpha": 0.18}),
        "tissue": ({"S1": S1, "S2": S2}, {"L0": 2.0, "A": 1.5, "alpha": 0.5, "C": 0.2}),
    }[name]
    found = judged(table_of(find_law(name), variables, params, 0.003), name, resamples=100)
    assert said(found) == set()
    assert found.noise["source"] == "seeds"
    assert found.noise["sd"] == pytest.approx(0.003, rel=0.3)


# --- outliers ----------------------------------------------------------------------------------------------------


def test_one_outlier() -> None:
    table = grid()
    table.loc[3, "loss"] *= 1.3
    found = judged(table)
    assert said(found) == {("outlier_driven", "caution", "fit", None)}
    assert found.diagnostics["without_worst"]["cells"] == ["row 3"]
    clean = judged(grid().drop(index=3)).params
    # both fits are shown, and the one without it is that of the clean runs (at its own threshold)
    assert found.diagnostics["without_worst"]["params"]["alpha"] == pytest.approx(clean["alpha"], abs=0.01)


def test_two_outliers_that_mask_each_other() -> None:
    """Both seeds of a corner cell are 5% off: no single run moves the fit by its error, both together do."""
    sizes, tokens = (v.ravel() for v in np.meshgrid(np.geomspace(3e7, 3e9, 6), np.geomspace(1e9, 1e11, 6)))
    table = grid(N=sizes, D=tokens, seed=1)
    table.loc[[0, 36], "loss"] *= 1.05
    found = judged(table, objective="l2")
    assert said(found) == {("outlier_driven", "caution", "fit", None)}
    assert set(found.diagnostics["without_worst"]["cells"]) == {"row 0", "row 36"}
    (verdict,) = found.verdicts
    assert verdict.evidence["standard_errors"] > 2

    problem = make_problem(CHINCHILLA, {k: table[k].to_numpy() for k in ("N", "D")}, table["loss"].to_numpy())
    robust = Robust("l2", 1.0)
    best = solve(problem, robust)
    for row in (0, 36):
        kept = np.arange(72) != row
        (theta,), _ = descend(problem, robust, best.theta[None], weights=kept[None].astype(float))
        moved = np.abs(theta - best.theta) / judging.standard_errors(problem, robust, theta, kept)
        assert moved.max() < 1.0  # leave one out, and nothing shows


def test_heavy_noise_without_outliers_is_not_called_one() -> None:
    fired = sum("outlier_driven" in codes(judged(grid(0.02, seed=seed), resamples=20)) for seed in range(8))
    assert fired <= 1


# --- parameters --------------------------------------------------------------------------------------------------


def test_a_term_that_is_not_there_runs_into_its_bounds() -> None:
    found = judged(grid(law=BES | {"A": 1e-9}))
    assert said(found) == {
        ("at_bound", "refuse", "parameter", "A"),
        ("at_bound", "refuse", "parameter", "alpha"),
        ("undetermined_law", "refuse", "decision", None),
    }
    assert np.isnan([found.params["A"], found.params["alpha"]]).all()
    assert found.params["beta"] == pytest.approx(BES["beta"], abs=0.03)
    assert np.isnan(found.decisions["N_exponent"].value)
    assert np.isfinite(found.diagnostics["params"]["A"])  # the raw output stays


def test_a_floor_that_is_not_seen() -> None:
    found = judged(grid(law=BES | {"E": 1e-6}))
    assert said(found) == {("floor_unseen", "refuse", "parameter", "E")}
    assert np.isnan(found.params["E"])
    assert np.isfinite([found.params["alpha"], found.decisions["N_exponent"].value]).all()


def test_an_exponent_that_the_noise_leaves_open() -> None:
    """The runs happen to lie near the law, but equal runs are said to differ by 2%: then a weak term is open."""
    found = judged(grid(law=BES | {"A": 30.0}), noise=0.02)
    assert said(found) == {("open_interval", "caution", "parameter", "alpha")}


def test_a_flat_profile_is_not_identifiable() -> None:
    """No data are repeated, so nothing is known about what repeats are worth."""
    law = find_law("data_constrained")
    sizes, tokens = (v.ravel() for v in np.meshgrid(np.geomspace(1e8, 1e10, 6), np.geomspace(1e9, 1e11, 6)))
    constants = dict(law.published["Muennighoff et al. 2023"])
    base = {k: constants[k] for k in BES}
    runs = table_of(law, {"N": sizes, "D": tokens, "U": tokens}, constants, 0.003)
    found = judged(runs.assign(C=6 * runs["N"] * runs["D"]), "data_constrained", fixed=base)
    assert said(found) == {("not_identifiable", "refuse", "parameter", "RD")}
    low, high = found.intervals["RN"]
    assert low < constants["RN"] < high
    (verdict,) = found.verdicts
    assert "both sides" in verdict.message
    assert np.isnan([found.params["RD"], *found.intervals["RD"]]).all()


def test_a_weak_term_is_open_towards_one_side() -> None:
    found = judged(grid(law=BES | {"A": 3.0}, seed=1))
    assert said(found) == {
        ("not_identifiable", "refuse", "parameter", "A"),
        ("not_identifiable", "refuse", "parameter", "alpha"),
        ("undetermined_law", "refuse", "decision", None),
    }


def test_parameters_that_can_be_traded_are_not_identifiable() -> None:
    """Two areas that always move together: only A - C is seen, so the Jacobian has lost a rank."""
    law, S1 = find_law("tissue"), np.geomspace(1, 100, 12)
    runs = table_of(law, {"S1": S1, "S2": S1**-0.5}, {"L0": 2.0, "A": 1.0, "alpha": 0.5, "C": 0.1}, 0.0)
    found = judged(runs, "tissue", noise=0.003)
    assert said(found) == {("not_identifiable", "refuse", "parameter", None)}
    assert np.isnan(list(found.params.values())).all()
    raw = found.diagnostics["params"]
    assert raw["A"] - raw["C"] == pytest.approx(0.9, abs=1e-3)


def test_starts_disagree() -> None:
    """A threshold far below the scatter makes a landscape of many valleys."""
    found = judged(grid(0.02), objective="student", threshold=1e-4)
    assert said(found) == {("starts_disagree", "caution", "fit", None)}
    assert found.diagnostics["starts_agreeing"] < 0.1 * found.diagnostics["starts"]


# --- decisions ---------------------------------------------------------------------------------------------------


def test_extrapolation_is_cautioned_and_then_refused() -> None:
    found = judged(grid(), targets=[1e21, 1e23, 1e26])
    assert said(found) == {
        ("extrapolation", "caution", "decision", "1e23"),
        ("extrapolation", "refuse", "decision", "1e26"),
    }
    near, far, too_far = (entry["N"].value for entry in found.decisions["targets"])
    assert near < far
    assert np.isnan(too_far)


def test_no_optimum() -> None:
    found = judged(grid(), targets=[1.0, 1e21])
    assert said(found) == {(code, "refuse", "decision", "1e0") for code in ("no_optimum", "extrapolation")}
    none, some = found.decisions["targets"]
    assert np.isnan(none["N"].value)
    assert some["N"].value > 1e9


def test_unreachable_loss() -> None:
    found = judged(grid(), loss_targets=[1.5, 2.3])
    assert said(found) == {("unreachable_loss", "refuse", "decision", "loss 1.5")}
    (told,) = [v.message for v in found.verdicts if v.code == "unreachable_loss"]
    assert told.endswith("at any compute, and so it does in 100% of its noisy copies.")
    none, some = found.decisions["losses"]
    assert np.isnan(none["C"].value)
    assert some["C"].value == pytest.approx(1.065947e21, rel=0.2)


def test_a_law_that_is_not_determined_does_not_say_what_can_be_reached() -> None:
    runs = grid()
    noise = np.random.default_rng(0).normal(0.0, 0.1, len(runs))
    found = fit(runs.assign(loss=3.0 * np.exp(noise)), targets=[1e24], loss_targets=[1.5], resamples=20)
    assert {v.code for v in found.verdicts if v.scope == "decision"} == {"undetermined_law"}
    assert np.isnan([found.decisions["losses"][0]["C"].value, found.decisions["targets"][0]["N"].value]).all()


def test_compute_of_a_loss_too_far_down_is_refused() -> None:
    found = judged(grid(), loss_targets=[2.3, 1.86])
    assert said(found) == {("extrapolation", "refuse", "decision", "loss 1.86")}
    near, far = found.decisions["losses"]
    assert np.isfinite(near["C"].value)
    assert np.isnan([far["C"].value, *far["C"].interval]).all()


# --- the likelihood that decides ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l2", "huber", "lad", "student"])
def test_likelihood_does_not_fall_where_the_objective_does_not_rise(kind) -> None:
    table = grid()
    problem = make_problem(CHINCHILLA, {k: table[k].to_numpy() for k in ("N", "D")}, table["loss"].to_numpy())
    robust = Robust(kind, 1e-3)
    best = 0.5 * len(table) * 1e-6
    drops = judging.likelihood_drop(problem, robust, best * np.array([1.0, 1.05, 2.0]), best)
    assert drops[0] == 0
    assert 0 < drops[1] < drops[2]


def test_standard_errors_are_those_of_least_squares_and_of_the_sandwich() -> None:
    """Three roads to one number: rows resampled, the sandwich of many rows, and the textbook's covariance."""
    sizes = np.exp(np.random.default_rng(0).uniform(np.log(3e7), np.log(3e9), 6000))
    tokens = np.exp(np.random.default_rng(1).uniform(np.log(1e9), np.log(1e11), 6000))
    table = surface(sizes, tokens, BES, noise=0.01)
    problem = make_problem(CHINCHILLA, {"N": sizes, "D": tokens}, table["loss"].to_numpy())
    robust = Robust("l2", 1.0)
    theta = solve(problem, robust, starts=problem.theta(BES)[None]).theta
    _, slopes = problem.jacobian(theta)
    textbook = 0.01 * np.sqrt(np.diag(np.linalg.inv(slopes @ slopes.T)))
    assert judging.standard_errors(problem, robust, theta, np.full(6000, True)) == pytest.approx(textbook, rel=0.1)
    few = np.arange(6000) < 400
    textbook = 0.01 * np.sqrt(np.diag(np.linalg.inv(slopes[:, few] @ slopes[:, few].T)))
    assert judging.standard_errors(problem, robust, theta, few) == pytest.approx(textbook, rel=0.35)
