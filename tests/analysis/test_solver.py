"""The solver of the Chinchilla law: recovery, and indifference to the scale of its objective."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.laws import chinchilla
from analysis.solver import Problem, descend, huber, solve

BES = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
N, D = (v.ravel() for v in np.meshgrid([5e7, 2e8, 8e8, 3.2e9], [1e9, 4e9, 1.6e10, 6.4e10]))
LOSSES = [
    *(3.893737, 3.506444, 3.267309, 3.119655, 3.470463, 3.083170, 2.844035, 2.696381),
    *(3.215553, 2.828260, 2.589125, 2.441470, 3.062036, 2.674743, 2.435608, 2.287954),
]


def problem(noise: float = 0.0) -> Problem:
    error = noise * np.random.default_rng(3).standard_normal(len(N))
    return Problem.of(N, D, np.log(chinchilla(N, D, BES)) + error)


def test_grid_of_losses_is_the_published_one() -> None:
    assert chinchilla(N, D, BES) == pytest.approx(LOSSES, abs=1e-6)


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 0.1])
def test_noise_free_grid_is_recovered(delta) -> None:
    found = problem().params(solve(problem(), delta).theta)
    assert found == pytest.approx(BES, rel=1e-4)


@pytest.mark.parametrize("delta", [1e-3, 0.01])
def test_scale_of_the_objective_does_not_move_the_answer(delta) -> None:
    noisy = problem(noise=0.005)
    ends = [noisy.params(solve(noisy, delta, scale=scale).theta) for scale in (1.0, 1.0 / len(N), 1e6, None)]
    for end in ends[1:]:
        assert end == pytest.approx(ends[0], rel=1e-4)


def test_both_solvers_agree() -> None:
    noisy = problem(noise=0.005)
    alone, value = descend(noisy, noisy.log_loss, 0.01, noisy.starts())
    best = alone[value.argmin()]
    assert noisy.params(best) == pytest.approx(noisy.params(solve(noisy, 0.01).theta), rel=1e-4)


def test_every_start_reaches_the_same_end_on_clean_data() -> None:
    found = solve(problem(), 1e-3)
    assert found.near_best == found.starts


def test_batch_of_losses_is_solved_one_by_one() -> None:
    noisy = problem(noise=0.005)
    copies = noisy.log_loss + np.random.default_rng(1).normal(0, 0.005, (3, len(N)))
    start = np.repeat(solve(noisy, 0.01).theta[None], 3, axis=0)
    together, _ = descend(noisy, copies, 0.01, start)
    for copy, theta in zip(copies, together):
        alone = solve(Problem.of(N, D, copy), 0.01)
        assert noisy.params(theta) == pytest.approx(noisy.params(alone.theta), rel=1e-3)


def test_huber_values() -> None:
    assert huber(np.array([5e-4, 1e-3, 1e-2, -1e-2]), 1e-3) == pytest.approx([1.25e-7, 5e-7, 9.5e-6, 9.5e-6])


def test_log_sum_exp_of_the_notebook_refit() -> None:
    law = {"E": np.exp(0.59711196), "A": np.exp(6.17795598), "B": np.exp(7.64273236)}
    assert np.log(chinchilla(1e9, 2e10, law | {"alpha": 0.34781303, "beta": 0.36585412})) == pytest.approx(
        0.9278869, abs=1e-7
    )


@settings(deadline=None, max_examples=20, derandomize=True)
@given(theta=st.tuples(*(st.floats(-1.0, 1.0) for _ in range(3)), st.floats(0.05, 1.5), st.floats(0.05, 1.5)))
def test_derivatives_match_differences(theta) -> None:
    here, at = problem(), np.array(theta)
    _, slopes = here.jacobian(at)
    for k in range(5):
        step = np.zeros(5)
        step[k] = 1e-5
        change = (here.predict(at + step) - here.predict(at - step)) / 2e-5
        assert slopes[:, k] == pytest.approx(change, rel=1e-5, abs=1e-8)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    alpha=st.floats(0.2, 0.8),
    beta=st.floats(0.2, 0.8),
    floor=st.floats(0.3, 2.5),
    share=st.floats(0.2, 0.8),
)
def test_any_reasonable_surface_is_recovered(alpha, beta, floor, share) -> None:
    law = {"E": floor, "A": 2 * share * 4e8**alpha, "B": 2 * (1 - share) * 8e9**beta, "alpha": alpha, "beta": beta}
    clean = Problem.of(N, D, np.log(chinchilla(N, D, law)))
    assert clean.params(solve(clean, 1e-3).theta) == pytest.approx(law, rel=1e-4)
