"""The engine against answers that are known, against a second solver, and against every change that must not matter."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import huber

from analysis.laws import CHINCHILLA, LAWS, Law, find_law, tissue_areas
from analysis.problems import OBJECTIVES, Problem, Robust, default_starts, make_problem
from analysis.solver import descend, solve

BES = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def crossed(*axes: Any) -> list[np.ndarray]:
    return [v.ravel() for v in np.meshgrid(*axes)]


def schedules() -> dict[str, np.ndarray]:
    """S1 and S2 along cosine, late-decay and constant schedules of three lengths."""
    firsts, seconds = [], []
    for steps in (200, 1000, 4000):
        t = np.arange(steps + 1)
        shapes = (0.5 * (1 + np.cos(np.pi * t / steps)), np.clip((steps - t) / (0.2 * steps), 0, 1), np.ones(steps + 1))
        for rates in shapes:
            S1, S2 = tissue_areas(3e-3 * rates, 0.99)
            at = np.linspace(steps // 10, steps - 1, 8).astype(int)
            firsts.append(S1[at])
            seconds.append(np.maximum(S2[at], 0.0))
    return {"S1": np.concatenate(firsts), "S2": np.concatenate(seconds)}


def worlds() -> dict[str, tuple[dict[str, np.ndarray], dict[str, float]]]:
    """For every law a table of its variables and the parameters that it is to find."""
    N, D = crossed(np.geomspace(5e7, 3.2e9, 5), np.geomspace(1e9, 6.4e10, 5))
    sizes, unique, epochs = crossed(np.geomspace(2e7, 5e9, 6), [1e8, 1e9, 1e10], [1.0, 2.0, 4.0, 10.0, 40.0])
    active, experts = crossed(np.geomspace(1.5e7, 1.3e9, 6), [1.0, 2.0, 8.0, 32.0, 128.0, 512.0])
    losses = np.linspace(2.0, 4.0, 24)
    source = {name: next(iter(law.published.values())) for name, law in LAWS.items() if law.published}
    return {
        "chinchilla": ({"N": N, "D": D}, BES),
        "chinchilla_tied": ({"N": N, "D": D}, dict(source["chinchilla_tied"])),
        "saturating": ({"x": np.geomspace(1e18, 1e23, 25)}, {"E": 1.8, "A": 3e3, "alpha": 0.18}),
        "kaplan": ({"N": N, "D": D / 20}, dict(source["kaplan"])),
        "kaplan_N": ({"N": np.geomspace(1e6, 1e9, 20)}, dict(source["kaplan_N"])),
        "kaplan_D": ({"D": np.geomspace(1e7, 1e10, 20)}, dict(source["kaplan_D"])),
        "kaplan_C": ({"C": np.geomspace(1e16, 1e20, 20)}, dict(source["kaplan_C"])),
        "gadre": ({"N": N, "D": D}, dict(LAWS["gadre"].published["RedPajama"])),
        "data_constrained": ({"N": sizes, "D": unique * epochs, "U": unique}, dict(source["data_constrained"])),
        "clark": ({"N": active, "experts": experts}, dict(source["clark"])),
        "tissue": (schedules(), {"L0": 2.2, "A": 0.5, "alpha": 0.5, "C": 0.3}),
        "accuracy": ({"loss": losses}, {"b": 0.25, "a": 0.6, "k": 5.0, "L0": 2.8}),
        "error": ({"loss": losses}, {"eps": 0.857, "k": 2.21, "g": 0.715}),
        "bnsl:1": (
            {"x": np.geomspace(1e17, 1e24, 40)},
            {"a": 1.5, "b": 5e3, "c0": 0.18, "c1": 0.15, "d1": 1e21, "f1": 0.4},
        ),
    }


WORLDS = worlds()
NOISE = 0.003


def noisy(name: str, noise: float = NOISE, seed: int = 0, raw: bool = False) -> tuple[Problem, Law, np.ndarray]:
    law, (variables, truth) = find_law(name), WORLDS[name]
    exact = law(variables, truth)
    response = exact * np.exp(noise * np.random.default_rng(seed).standard_normal(exact.shape))
    return make_problem(law, variables, response, raw=raw), law, response


def test_every_law_has_a_world() -> None:
    assert set(WORLDS) >= set(LAWS)


# --- recovery ----------------------------------------------------------------------------------------------------


def test_published_grid_gives_the_losses_and_the_parameters_back() -> None:
    N, D = crossed([5e7, 2e8, 8e8, 3.2e9], [1e9, 4e9, 1.6e10, 6.4e10])
    losses = CHINCHILLA({"N": N, "D": D}, BES)
    expected = [
        *(3.893737, 3.506444, 3.267309, 3.119655, 3.470463, 3.083170, 2.844035, 2.696381),
        *(3.215553, 2.828260, 2.589125, 2.441470, 3.062036, 2.674743, 2.435608, 2.287954),
    ]
    assert losses == pytest.approx(expected, abs=5e-7)
    problem = make_problem(CHINCHILLA, {"N": N, "D": D}, losses)
    found = problem.params(solve(problem, Robust("huber", 1e-3)).theta)
    assert found == pytest.approx(BES, rel=1e-6)


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_every_law_is_recovered_from_its_default_starts(name) -> None:
    problem, law, _ = noisy(name, noise=0.0)
    best = solve(problem, Robust("huber", NOISE))
    variables, truth = WORLDS[name]
    assert {k: float(v) for k, v in problem.params(best.theta).items()} == pytest.approx(truth, rel=1e-4)
    assert best.objective < 1e-16
    assert law(variables, problem.params(best.theta)) == pytest.approx(law(variables, truth), rel=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_recovers_an_exact_surface(objective) -> None:
    problem, _, _ = noisy("chinchilla", noise=0.0)
    delta = 1e-9 if objective == "lad" else NOISE
    assert problem.params(solve(problem, Robust(objective, delta)).theta) == pytest.approx(BES, rel=1e-5)


def test_two_breaks_are_found_whatever_their_numbering() -> None:
    truth = {"a": 0.5, "b": 10.0, "c0": 0.05, "c1": 0.3, "d1": 1e3, "f1": 0.5, "c2": -0.2, "d2": 1e6, "f2": 0.5}
    law, x = find_law("bnsl:2"), np.geomspace(1, 1e9, 60)
    problem = make_problem(law, {"x": x}, law({"x": x}, truth))
    found = problem.params(solve(problem, Robust("huber", NOISE)).theta)
    assert [found[k] for k in ("a", "b", "c0")] == pytest.approx([truth[k] for k in ("a", "b", "c0")], rel=1e-3)
    first, second = sorted((1, 2), key=lambda i: found[f"d{i}"])
    for ours, theirs in ((first, 1), (second, 2)):
        assert [found[f"{k}{ours}"] for k in "cdf"] == pytest.approx([truth[f"{k}{theirs}"] for k in "cdf"], rel=1e-3)


# --- a second solver ---------------------------------------------------------------------------------------------


def cost(objective: str, r: np.ndarray, delta: float) -> tuple[float, np.ndarray]:
    """The sum of a robust loss and its derivatives by r, written down apart from the engine."""
    if objective == "huber":
        return float(huber(delta, r).sum()), np.clip(r, -delta, delta)
    if objective == "l2":
        return float(np.square(r).sum() / 2), r
    nu = 4.0
    total = (nu + 1) / 2 * delta**2 * np.log1p(r**2 / (nu * delta**2)).sum()
    return float(total), (nu + 1) * r / (nu + (r / delta) ** 2)


def by_scipy(
    law: Law, variables: Mapping[str, np.ndarray], response: np.ndarray, truth: Mapping[str, float], objective: str
) -> float:
    """The least objective that L-BFGS-B finds from several starts about the truth.

    Own coordinates: logs of the positive parameters, whitened by the curvature at the truth. Gradients by the complex
    step through the law itself; nothing of the engine is used.
    """
    names, target = law.names, np.log(response)
    logs = np.array([name in {t.coefficient for t in law.terms} for name in names])
    logs |= np.array([any(p.name == name and p.log for p in law.parameters) for name in names])
    values = np.array([truth[name] for name in names])
    center = np.where(logs, np.log(np.where(logs, values, 1.0)), values)

    def residuals(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slopes = []
        for k in range(len(names)):
            moved = q.astype(complex)
            moved[k] += 1e-30j
            params = {n: np.exp(moved[i]) if logs[i] else moved[i] for i, n in enumerate(names)}
            slopes.append(np.imag(law.log_response(variables, params)) / 1e-30)
        plain = {n: np.exp(q[i]) if logs[i] else q[i] for i, n in enumerate(names)}
        return law.log_response(variables, plain) - target, np.array(slopes)

    _, J = residuals(center)
    left, size, _ = np.linalg.svd(J, full_matrices=False)
    whiten = left / size * NOISE  # a step of one in z moves the predictions by the noise
    scale = len(target) * NOISE**2

    def value(z: np.ndarray) -> tuple[float, np.ndarray]:
        r, slopes = residuals(center + whiten @ z)
        if not np.isfinite(r).all():
            return 1e30, np.zeros_like(z)
        total, psi = cost(objective, r, 1.5 * NOISE)
        return total / scale, whiten.T @ (slopes @ psi) / scale

    tight = {"ftol": 1e-16, "gtol": 1e-12, "maxiter": 5000, "maxfun": 20000}
    generator = np.random.default_rng(3)
    best = np.inf
    for start in [np.zeros(len(names)), *generator.standard_normal((3, len(names)))]:
        end = minimize(value, start, jac=True, method="L-BFGS-B", options=tight)
        end = minimize(value, end.x, jac=True, method="L-BFGS-B", options=tight)  # with a fresh curvature
        best = min(best, float(end.fun) * scale)
    return best


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        *((name, "huber") for name in sorted(WORLDS)),
        *((name, objective) for name in ("chinchilla", "clark") for objective in ("l2", "student")),
    ],
)
def test_a_second_solver_finds_nothing_lower(name, objective) -> None:
    problem, law, response = noisy(name, seed=4)
    variables, truth = WORLDS[name]
    ours = solve(problem, Robust(objective, 1.5 * NOISE)).objective
    theirs = by_scipy(law, variables, response, truth, objective)
    assert ours <= theirs * (1 + 1e-9)
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_least_absolute_deviations_agree_with_a_solver_of_their_own_kind() -> None:
    """Sum of t with -t <= r <= t, smooth and constrained, by sequential quadratic programming."""
    problem, _, _ = noisy("chinchilla", seed=5)
    best = solve(problem, Robust("lad", 1e-9))
    ours = float(np.abs(problem.predict(best.theta) - problem.target).sum())
    K, n = len(best.theta), problem.rows
    start = descend(problem, Robust("l2", 1.0), best.theta[None])[0][0]
    spread = np.abs(problem.predict(start) - problem.target)

    def bands(v: np.ndarray) -> np.ndarray:
        r = problem.predict(v[:K]) - problem.target
        return np.concatenate([v[K:] - r / NOISE, v[K:] + r / NOISE])

    def slopes(v: np.ndarray) -> np.ndarray:
        J = problem.jacobian(v[:K])[1].T / NOISE
        return np.block([[-J, np.eye(n)], [J, np.eye(n)]])

    weight = np.concatenate([np.zeros(K), np.ones(n)])
    end = minimize(
        lambda v: weight @ v,
        np.concatenate([start, spread / NOISE]),
        jac=lambda v: weight,
        method="SLSQP",
        constraints={"type": "ineq", "fun": bands, "jac": slopes},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert np.min(bands(end.x)) > -1e-9
    assert ours == pytest.approx(float(end.fun) * NOISE, rel=1e-6)


# --- what must not matter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-6, 1 / 25, 1e6])
@pytest.mark.parametrize("objective", ["huber", "l2"])
def test_the_scale_of_the_objective_does_not_move_the_answer(factor, objective) -> None:
    problem, _, _ = noisy("chinchilla", seed=1)
    robust = Robust(objective, 1e-3)
    plain = solve(problem, robust)
    scaled = solve(problem, robust, weights=np.full(problem.rows, factor))
    assert scaled.objective == pytest.approx(plain.objective * factor, rel=1e-12)
    assert scaled.theta == pytest.approx(plain.theta, rel=1e-7)


@pytest.mark.parametrize("factor", [1e-3, 1 / np.log(2), 1e3])
def test_the_unit_of_the_loss_only_scales_the_coefficients(factor) -> None:
    variables, _ = WORLDS["chinchilla"]
    problem, law, response = noisy("chinchilla", seed=1)
    other = make_problem(law, variables, response * factor)
    robust = Robust("huber", 1.5 * NOISE)
    plain, scaled = (p.params(solve(p, robust).theta) for p in (problem, other))
    assert scaled == pytest.approx({k: v * (factor if k in "EAB" else 1.0) for k, v in plain.items()}, rel=1e-6)


def test_absolute_tolerances_stop_an_averaged_objective_early_and_ours_goes_on() -> None:
    """The trap of the first Chinchilla fit: on an exact surface every solver should come to the truth."""
    N, D = crossed([5e7, 2e8, 8e8, 3.2e9], [1e9, 4e9, 1.6e10, 6.4e10])
    target = np.log(CHINCHILLA({"N": N, "D": D}, BES))

    def residuals(q: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce([q[0] - q[3] * np.log(N), q[1] - q[4] * np.log(D), np.full(len(N), q[2])]) - target

    def defaults(scale: float) -> float:
        """B by SciPy with its default tolerances, the best of some starts of the usual grid."""
        starts = crossed([5.0, 10.0], [5.0, 10.0], [0.0, 0.5], [0.5], [0.5])
        ends = [
            minimize(lambda q: scale * huber(1e-3, residuals(q)).sum(), start, method="L-BFGS-B")
            for start in np.transpose(starts)
        ]
        return float(np.exp(min(ends, key=lambda end: end.fun).x[1]))

    averaged = defaults(1 / len(N))
    assert abs(averaged / BES["B"] - 1) > 1e-4
    problem = make_problem(CHINCHILLA, {"N": N, "D": D}, np.exp(target))
    for scale in (1.0, 1 / len(N)):
        best = solve(problem, Robust("huber", 1e-3), weights=np.full(len(N), scale))
        assert problem.params(best.theta)["B"] == pytest.approx(BES["B"], rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_weights_count_rows(seed) -> None:
    variables, _ = WORLDS["chinchilla"]
    problem, law, response = noisy("chinchilla", seed=2)
    counts = np.random.default_rng(seed).multinomial(problem.rows, np.full(problem.rows, 1 / problem.rows))
    repeated = make_problem(
        law, {k: np.repeat(v, counts) for k, v in variables.items()}, np.repeat(response, counts), centred=False
    )
    plain = make_problem(law, variables, response, centred=False)
    robust = Robust("huber", 1.5 * NOISE)
    start = plain.theta(BES)[None]
    (weighted,), (one,) = descend(plain, robust, start, weights=counts.astype(float))
    (listed,), (other,) = descend(repeated, robust, start)
    assert one == pytest.approx(other, rel=1e-9)
    assert plain.predict(weighted)[counts > 0] == pytest.approx(plain.predict(listed)[counts > 0], rel=1e-6)


def test_a_batch_of_targets_is_each_of_them_alone() -> None:
    problem, _, _ = noisy("chinchilla", seed=2)
    robust = Robust("huber", 1.5 * NOISE)
    targets = problem.target + NOISE * np.random.default_rng(0).standard_normal((40, problem.rows))
    starts = np.tile(problem.theta(BES), (40, 1))
    together, values = descend(problem, robust, starts, targets=targets)
    for i in (0, 7, 39):
        alone, value = descend(problem, robust, starts[:1], targets=targets[i])
        assert value[0] == pytest.approx(values[i], rel=1e-12)
        assert alone[0] == pytest.approx(together[i], rel=1e-9)


def test_blocks_of_a_batch_do_not_show() -> None:
    problem, _, _ = noisy("chinchilla", seed=2)
    starts = default_starts(problem, Robust("l2", 1.0))
    many = np.tile(starts, (100, 1))  # several blocks, in threads
    thetas, values = descend(problem, Robust("l2", 1.0), many, rounds=20)
    once, ends = descend(problem, Robust("l2", 1.0), starts, rounds=20)
    assert values.reshape(100, -1) == pytest.approx(np.tile(ends, (100, 1)), rel=1e-12)
    assert thetas[-1] == pytest.approx(once[-1], rel=1e-9)


def test_same_call_same_bits() -> None:
    problem, _, _ = noisy("clark", seed=3)
    first, second = (solve(problem, Robust("huber", NOISE)) for _ in range(2))
    assert np.array_equal(first.theta, second.theta)
    assert first.objective == second.objective


# --- held, fixed, raw, bounds ------------------------------------------------------------------------------------


def test_a_held_coordinate_stays_and_the_others_do_their_best() -> None:
    problem, law, response = noisy("chinchilla", seed=2)
    robust, k = Robust("huber", 1.5 * NOISE), law.names.index("alpha")
    best = solve(problem, robust)
    start, held = best.theta.copy(), np.zeros(len(best.theta), dtype=bool)
    start[k], held[k] = 0.45, True
    (theta,), (value,) = descend(problem, robust, start[None], held=held[None])
    assert theta[k] == 0.45
    assert value > best.objective * 1.5
    fixed = make_problem(law, WORLDS["chinchilla"][0], response, fixed={"alpha": 0.45})
    assert value == pytest.approx(solve(fixed, robust).objective, rel=1e-6)


def test_fixed_parameters_keep_their_values() -> None:
    _, law, response = noisy("data_constrained", noise=0.0)
    variables, truth = WORLDS["data_constrained"]
    base = {k: truth[k] for k in ("E", "A", "B", "alpha", "beta")}
    problem = make_problem(law, variables, response, fixed=base)
    found = problem.params(solve(problem, Robust("huber", 1e-3)).theta)
    assert {k: found[k] for k in base} == pytest.approx(base, rel=1e-14)
    assert [found["RD"], found["RN"]] == pytest.approx([15.387756, 5.309743], rel=1e-5)


def test_raw_residuals_are_differences_of_the_response() -> None:
    problem, law, response = noisy("gadre", seed=2, raw=True)
    best = solve(problem, Robust("l2", 1.0))
    miss = law(WORLDS["gadre"][0], problem.params(best.theta)) - response
    assert best.objective == pytest.approx(float(np.square(miss).sum()) / 2, rel=1e-12)
    logs, _, _ = noisy("gadre", seed=2)
    there = np.exp(logs.predict(solve(logs, Robust("l2", 1.0)).theta)) - response
    assert best.objective < float(np.square(there).sum()) / 2


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_no_solution_leaves_its_bounds(name) -> None:
    problem, _, _ = noisy(name, noise=0.1, seed=6)
    starts = default_starts(problem, Robust("huber", 0.1))[:8]
    thetas, values = descend(problem, Robust("huber", 0.1), starts, rounds=50)
    assert ((thetas >= problem.lower) & (thetas <= problem.upper)).all()
    first = Robust("huber", 0.1).cost(problem.predict(starts) - problem.target).sum(axis=1)
    assert (values <= first).all()


# --- coordinates and slopes --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(WORLDS)), data=st.lists(st.floats(0.0, 1.0), min_size=7, max_size=7), raw=st.booleans()
)
def test_coordinates_and_parameters_are_inverse(name, data, raw) -> None:
    problem, law, _ = noisy(name, raw=raw)
    share = np.array(data)[: len(law.names)]
    theta = problem.lower + share * (problem.upper - problem.lower)
    params = problem.params(theta)
    assert problem.theta(params) == pytest.approx(theta, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", sorted(WORLDS))
def test_slopes_are_those_of_the_law(name, raw) -> None:
    """Against central differences of the law itself, in the parameters' own coordinates."""
    problem, law, _ = noisy(name, raw=raw)
    variables, truth = WORLDS[name]
    generator = np.random.default_rng(0)
    theta = problem.theta(truth) * (1 + 0.02 * generator.uniform(-1, 1, len(law.names)))
    value, slopes = problem.jacobian(theta)

    def direct(theta: np.ndarray) -> np.ndarray:
        params = problem.params(theta)
        return law(variables, params) if raw else law.log_response(variables, params)

    assert value == pytest.approx(direct(theta), rel=1e-10)
    assert problem.predict(theta) == pytest.approx(value, rel=1e-12)
    for k in range(len(theta)):
        step = np.zeros(len(theta))
        step[k] = 1e-5 * max(1.0, abs(theta[k]))
        difference = (direct(theta + step) - direct(theta - step)) / (2 * step[k])
        assert slopes[k] == pytest.approx(difference, rel=1e-5, abs=1e-6 * np.abs(slopes).max())


@given(
    kind=st.sampled_from(OBJECTIVES), r=st.floats(-1.0, 1.0).filter(lambda r: abs(r) > 1e-6), delta=st.floats(1e-3, 0.3)
)
def test_robust_weights_are_the_slope_of_their_cost(kind, r, delta) -> None:
    robust, step = Robust(kind, delta), 1e-7 * max(abs(r), 1e-3)
    slope = float(robust.cost(np.array(r + step)) - robust.cost(np.array(r - step))) / (2 * step)
    weight, _ = robust.weights(np.array(r))
    assert float(weight) * r == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("r", "value"), [(5e-4, 1.25e-7), (1e-3, 5e-7), (1e-2, 9.5e-6)])
def test_huber_costs_what_it_should(r, value) -> None:
    assert float(Robust("huber", 1e-3).cost(np.array(r))) == pytest.approx(value, rel=1e-12)
    assert float(Robust("huber", 1e-3).cost(np.array(-r))) == pytest.approx(value, rel=1e-12)


def test_agreeing_starts_are_counted() -> None:
    problem, _, _ = noisy("chinchilla", seed=2)
    robust = Robust("huber", 1.5 * NOISE)
    good = problem.theta(BES)
    lost = problem.upper.copy()
    lost[:3] = problem.lower[:3]  # no term is there, so nothing pulls back the exponents
    best = solve(problem, robust, starts=np.array([good, good, lost]))
    assert best.starts == 3
    assert best.agreeing == 2 + (best.ends[2] <= best.objective * 1.001)
    assert best.objective == best.ends.min()
