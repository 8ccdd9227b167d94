"""The engine that fits every law: many starts and many resamples of one table, solved as one batch.

A problem is put into coordinates in which it is well behaved: positive parameters by their logarithms, features of
terms centred, so that ln A and alpha come apart (their correlation drops from .999 and the condition number of the
fit from thousands to tens). `descend` is Levenberg-Marquardt with robust weights. The curvature of the robust loss is
taken between two bounds: reweighted least squares, which always goes down but crawls where most residuals lie beyond
the threshold, and Newton's, which counts only the residuals within it and then converges quadratically; a batch
member moves towards Newton's as long as its steps gain.

The objective is a plain weighted sum. Steps are judged by relative gains, so its scale cannot matter: with absolute
tolerances it does, and that is what went wrong in the original Chinchilla fit (Besiroglu et al. 2024).
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from analysis.laws import Law, Parameter

OBJECTIVES = ("huber", "lad", "l2", "student")
Objective = Literal["huber", "lad", "l2", "student"]
STUDENT_FREEDOM = 4.0
BLOCK_ELEMENTS = 32_768
"""Residuals of one block of the batch: small enough to stay in the processor's cache."""
ROUNDS = 400
LONGEST = 0.25
"""The longest step of a coordinate, as a share of its range. A term that is not felt yet, since its coefficient is
tiny, has hardly any curvature: unbounded, its step would leap across the range, be refused, and stall all others.
"""
SAMPLE_ROWS = 4000
_STARTS = 48
"""Starts of a fit that names none: the best of a grid, by their objective."""


@dataclass(frozen=True)
class Robust:
    """What a residual r costs. delta: Huber's threshold, the scale of Student's t; LAD is Huber with a tiny one."""

    kind: Objective
    delta: float

    def cost(self, r: np.ndarray) -> np.ndarray:
        """r^2 / 2 near zero for all of them; lad: |r|, in units of its tiny threshold."""
        if self.kind == "l2":
            return 0.5 * r * r
        if self.kind == "student":
            scale = STUDENT_FREEDOM * self.delta**2
            return 0.5 * (scale + self.delta**2) * np.log1p(r * r / scale)
        size = np.abs(r)
        inner = np.minimum(size, self.delta)
        return inner * (size - 0.5 * inner)

    def weights(self, r: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(cost' / r, which residuals are within the threshold); None where Newton's curvature is not used."""
        if self.kind == "l2":
            return np.ones_like(r), None
        if self.kind == "student":
            scale = STUDENT_FREEDOM * self.delta**2
            return (scale + self.delta**2) / (scale + r * r), None
        size = np.maximum(np.abs(r), 1e-300)
        return np.minimum(1.0, self.delta / size), size <= self.delta


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A law on a table, in the solver's coordinates theta (K,).

    target: (n,) ln y, or y where `raw`. features: for laws of terms, per term the (index of theta, centred feature
    (n,)) of its exponents; means: (T, K), what centring took out. logs: which coordinates are logarithms.
    """

    law: Law
    variables: Mapping[str, np.ndarray]
    target: np.ndarray
    raw: bool
    features: tuple[tuple[tuple[int, np.ndarray], ...], ...]
    means: np.ndarray
    logs: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    fixed: Mapping[str, float]

    @property
    def rows(self) -> int:
        return len(self.target)

    def predict(self, theta: np.ndarray) -> np.ndarray:
        """What `target` is compared with, (..., n), for theta (..., K)."""
        if self.features:
            log = np.log(sum(np.exp(t) for t in self._terms(theta)))
        else:
            with np.errstate(all="ignore"):
                log = np.asarray(self.law.log_response(self.variables, self._named(theta)))
            log = np.broadcast_to(log, (*theta.shape[:-1], self.rows))
        return np.exp(log) if self.raw else log

    def jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`predict` and its derivatives by theta, (..., K, n)."""
        count = theta.shape[-1]
        slopes = np.empty((*theta.shape[:-1], count, self.rows))
        if self.features:
            parts = [np.exp(t) for t in self._terms(theta)]
            total = parts[0] + 0.0
            for part in parts[1:]:
                total = total + part
            inverse = 1.0 / np.broadcast_to(total, (*theta.shape[:-1], self.rows))
            filled = set()
            for t, part in enumerate(parts):
                share = np.multiply(part, inverse, out=slopes[..., t, :])
                for k, feature in self.features[t]:
                    if k in filled:  # an exponent that several terms share
                        slopes[..., k, :] += share * feature
                    else:
                        np.multiply(share, feature, out=slopes[..., k, :])
                        filled.add(k)
            log = -np.log(inverse)
        else:
            log = np.array(self.predict(theta)) if not self.raw else np.log(self.predict(theta))
            step = 1e-30
            slopes[..., self.lower == self.upper, :] = 0.0
            for k in map(int, np.flatnonzero(self.lower < self.upper)):
                moved = theta.astype(complex)
                moved[..., k] += 1j * step
                with np.errstate(all="ignore"):
                    slopes[..., k, :] = np.imag(self.law.log_response(self.variables, self._named(moved))) / step
        if not self.raw:
            return log, slopes
        value = np.exp(log)
        slopes *= value[..., None, :]
        return value, slopes

    def params(self, theta: np.ndarray) -> dict[str, Any]:
        """The law's own parameters, arrays over the leading axes of theta."""
        plain = theta + 0.0
        if self.features:  # a term is exp(c + sum k (x - mean)): its coefficient at x = 0 is exp(c - sum k mean)
            plain[..., : len(self.means)] -= theta @ self.means.T
        return {name: np.exp(plain[..., i]) if self.logs[i] else plain[..., i] for i, name in enumerate(self.law.names)}

    def theta(self, params: Mapping[str, Any]) -> np.ndarray:
        """The solver's coordinates of parameters; the inverse of `params`."""
        plain = np.stack(
            [
                np.log(np.asarray(params[name], dtype=float)) if self.logs[i] else np.asarray(params[name], dtype=float)
                for i, name in enumerate(self.law.names)
            ],
            axis=-1,
        )
        if self.features:
            plain[..., : len(self.means)] += plain @ self.means.T
        return plain

    def _terms(self, theta: np.ndarray) -> list[np.ndarray]:
        """Logs of the terms, (..., n) or (..., 1) for a constant."""
        result = []
        for t, features in enumerate(self.features):
            value = theta[..., t, None]
            for k, feature in features:
                value = value + theta[..., k, None] * feature
            result.append(value)
        return result

    def _named(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: (np.exp(theta[..., i, None]) if self.logs[i] else theta[..., i, None])
            for i, name in enumerate(self.law.names)
        }


def make_problem(
    law: Law,
    variables: Mapping[str, np.ndarray],
    response: np.ndarray,
    *,
    raw: bool = False,
    fixed: Mapping[str, float] | None = None,
    centred: bool = True,
) -> Problem:
    """Put a law on a table: variables and a positive response, arrays (n,).

    `fixed` holds parameters at a value. A coefficient is a coordinate of its own only where features are not centred.
    """
    values = {name: np.asarray(variables[name], dtype=float) for name in law.variables}
    response = np.asarray(response, dtype=float)
    held, names = dict(fixed or {}), law.names
    logs = np.array([True] * len(law.terms) + [p.log for p in law.parameters])
    features: tuple[tuple[tuple[int, np.ndarray], ...], ...] = ()
    means = np.zeros((len(law.terms), len(names)))
    lows, highs = [], []
    centred = centred and not held
    if law.terms:
        parts = []
        for t, term in enumerate(law.terms):
            own = []
            for name, x in term.features.items():
                feature, k = np.broadcast_to(x(values), response.shape), names.index(name)
                means[t, k] = feature.mean() if centred else 0.0
                own.append((k, feature - means[t, k]))
            parts.append(tuple(own))
        features = tuple(parts)
    low = float(np.log(response.min()))
    for term in law.terms:
        if centred:  # a term that is e^-12 of the response is not there; a floor lies below every response
            lows.append(low - 12.0)
            highs.append(low + (6.0 if term.features else 0.05))
        else:
            lows.append(-40.0)
            highs.append(80.0)
    for p in law.parameters:
        lows.append(np.log(p.low) if p.log else p.low)
        highs.append(np.log(p.high) if p.log else p.high)
    lower, upper = np.array(lows), np.array(highs)
    for name, value in held.items():
        i = names.index(name)
        lower[i] = upper[i] = np.log(value) if logs[i] else value
    return Problem(
        law=law,
        variables=values,
        target=response if raw else np.log(response),
        raw=raw,
        features=features,
        means=means,
        logs=logs,
        lower=lower,
        upper=upper,
        fixed=held,
    )


# --- starts ------------------------------------------------------------------------------------------------------


def default_starts(problem: Problem, robust: Robust, count: int = _STARTS) -> np.ndarray:
    """The best `count` points of a grid, (count, K).

    Laws of terms: a grid over the exponents, and for each of its points the coefficients by linear least squares,
    since the response is linear in them (variable projection; Golub & Pereyra 1973). Formulas: the parameters' starts,
    those in which they are linear by the same projection.
    """
    law = problem.law
    points = np.array(list(product(*(_places(problem, p) for p in law.parameters))))
    places = [i for i, p in enumerate(law.parameters) if p.position]
    points = points[(np.diff(points[:, places], axis=1) > 0).all(axis=1)]  # breaks in their order
    if problem.features:
        grid = np.concatenate([np.zeros((len(points), len(law.terms))), points], axis=1)
        _project(problem, grid, np.arange(len(law.terms)))
    else:
        grid = np.where(problem.logs, np.log(np.where(problem.logs, points, 1.0)), points)
        if law.linear:
            _project(problem, grid, np.array([law.names.index(name) for name in law.linear]))
    grid = np.unique(np.clip(grid, problem.lower, problem.upper), axis=0)
    costs = robust.cost(problem.predict(grid) - problem.target).sum(axis=-1)
    return np.asarray(grid[np.argsort(np.where(np.isfinite(costs), costs, np.inf))[:count]])


def _places(problem: Problem, parameter: Parameter) -> tuple[float, ...]:
    """The starts of a parameter; of a position, between the ends of its variable."""
    if not parameter.position:
        return parameter.starts
    logs = np.log(problem.variables[parameter.position])
    return tuple(float(np.exp(logs.min() + share * np.ptp(logs))) for share in parameter.starts)


def _project(problem: Problem, theta: np.ndarray, linear: np.ndarray) -> None:
    """Set the `linear` coordinates of theta (S, K), logs, by least squares of relative errors, kept positive."""
    count = len(linear)
    response = problem.target if problem.raw else np.exp(problem.target)
    if problem.features:
        parts = problem._terms(theta)
    else:  # what is left of the formula with the other coefficients at zero
        parts = []
        for one in linear:
            alone = theta.copy()
            alone[:, linear] = -np.inf
            alone[:, one] = 0.0
            with np.errstate(all="ignore"):
                parts.append(problem.law.log_response(problem.variables, problem._named(alone)))
    basis = np.stack([np.exp(np.broadcast_to(t, (len(theta), problem.rows))) for t in parts], axis=1)
    scaled = basis / response
    normal = np.matmul(scaled, scaled.swapaxes(1, 2))
    normal[:, np.arange(count), np.arange(count)] *= 1.0 + 1e-9
    best = np.linalg.solve(normal, scaled.sum(axis=2)[..., None])[..., 0]
    smallest = 1e-3 * float(response.min()) / np.maximum(basis.max(axis=2), 1e-300)
    theta[:, linear] = np.log(np.maximum(best, smallest))


# --- descent -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """The best end point. objective: the weighted sum there; ends: (S,) objectives of all starts."""

    theta: np.ndarray
    objective: float
    ends: np.ndarray

    @property
    def starts(self) -> int:
        return len(self.ends)

    @property
    def agreeing(self) -> int:
        """Starts that came within 0.1 % of the best objective."""
        return int((self.ends <= self.objective * 1.001 + 1e-30).sum())


def solve(
    problem: Problem,
    robust: Robust,
    *,
    weights: np.ndarray | None = None,
    starts: np.ndarray | None = None,
) -> Solution:
    """The best fit over all starts (S, K), by default `default_starts`; those out of bounds begin at the bounds.

    On very many rows every start comes down on a sample of them first, and then on all.
    """
    stages = [(problem, weights)]
    if problem.rows > 2 * SAMPLE_ROWS:
        chosen = np.random.default_rng(0).permutation(problem.rows)[:SAMPLE_ROWS]
        stages.insert(0, (_at_rows(problem, chosen), weights if weights is None else weights[chosen]))
    if starts is None:
        starts = default_starts(stages[0][0], _wide(problem, robust))
    thetas = np.clip(starts, problem.lower, problem.upper)
    for stage, own in stages:
        if robust.kind == "lad" or (robust.kind == "huber" and robust.delta < 1e-4):
            # A tiny threshold makes a landscape of creases: come down to it from a wide one.
            thetas, _ = descend(stage, _wide(problem, robust), thetas, weights=own, rounds=60)
            delta = 1e-3
            while delta > 3.0 * robust.delta:
                thetas, _ = descend(stage, Robust("huber", delta), thetas, weights=own, rounds=60)
                delta /= 10.0
        thetas, ends = descend(stage, robust, thetas, weights=own)
    best = int(np.argmin(ends))
    again, value = descend(problem, robust, thetas[best][None], weights=weights)
    if value[0] < ends[best]:
        thetas[best], ends[best] = again[0], value[0]
    return Solution(thetas[best], float(ends[best]), ends)


def _at_rows(problem: Problem, rows: np.ndarray) -> Problem:
    """The same problem on some of its rows, in the same coordinates."""
    return replace(
        problem,
        variables={name: np.broadcast_to(v, problem.target.shape)[rows] for name, v in problem.variables.items()},
        target=problem.target[rows],
        features=tuple(tuple((k, feature[rows]) for k, feature in own) for own in problem.features),
    )


def _wide(problem: Problem, robust: Robust) -> Robust:
    """A robust loss to begin with: thresholds of a percent."""
    return Robust("huber", max(robust.delta, 1e-2)) if robust.kind in ("huber", "lad") else robust


def descend(
    problem: Problem,
    robust: Robust,
    starts: np.ndarray,
    *,
    targets: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    held: np.ndarray | None = None,
    rounds: int = ROUNDS,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise from every start: end points (S, K) and objectives (S,).

    targets: (n,) or (S, n), one set for each start (parametric bootstrap). weights: the same (bootstrap by rows,
    where they count how often a row was drawn). held: (S, K), coordinates that stay at their start (profiles).
    Memory stays near a block's, whatever S.
    """
    S, n = len(starts), problem.rows
    size = max(1, BLOCK_ELEMENTS // n)
    blocks = [slice(i, min(i + size, S)) for i in range(0, S, size)]
    thetas, values = np.empty_like(starts), np.empty(S)

    def work(block: slice) -> None:
        own_targets = problem.target if targets is None else targets if targets.ndim == 1 else targets[block]
        own_weights = weights if weights is None or weights.ndim == 1 else weights[block]
        own_held = np.zeros(starts[block].shape, dtype=bool) if held is None else held[block]
        thetas[block], values[block] = _descend_block(
            problem, robust, starts[block], own_targets, own_weights, own_held, rounds
        )

    if len(blocks) == 1:
        work(blocks[0])
    else:  # numpy lets go of the interpreter in its loops
        with ThreadPoolExecutor(min(len(blocks), os.cpu_count() or 1, 8)) as pool:
            list(pool.map(work, blocks))
    return thetas, values


def _descend_block(
    problem: Problem,
    robust: Robust,
    starts: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray | None,
    frozen: np.ndarray,
    rounds: int,
) -> tuple[np.ndarray, np.ndarray]:
    S, K = starts.shape
    diagonal, longest = np.arange(K), LONGEST * (problem.upper - problem.lower)
    end_theta, end_value = starts.copy(), np.full(S, np.inf)

    def state(theta: np.ndarray, target: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """Objective, gradient, and both curvatures."""
        predicted, slopes = problem.jacobian(theta)
        miss = predicted - target
        cost, (own, inside) = robust.cost(miss), robust.weights(miss)
        if weight is not None:
            cost, own = cost * weight, own * weight
        value = cost.sum(axis=-1)
        count = 1 if inside is None else 2
        weighted = np.empty((len(theta), count * K, problem.rows))
        np.multiply(slopes, own[:, None, :], out=weighted[:, :K])
        if inside is not None:
            np.multiply(weighted[:, :K], inside[:, None, :], out=weighted[:, K:])
        gradient = np.matmul(weighted[:, :K], miss[:, :, None])[:, :, 0]
        both = np.matmul(weighted, slopes.swapaxes(1, 2))  # one product for both curvatures: half the passes
        return value, gradient, both[:, :K], both[:, -K:]

    def some(a: np.ndarray | None, which: np.ndarray) -> np.ndarray | None:
        return a if a is None or a.ndim == 1 else a[which]

    theta, index = starts.copy(), np.arange(S)
    target, weight, frozen = targets, weights, frozen | (problem.lower == problem.upper)
    with np.errstate(all="ignore"):
        value, gradient, slow, fast = state(theta, target, weight)
        damping, blend, calm = np.full(S, 1e-2), np.full(S, 1.0), np.zeros(S, dtype=int)
        for _ in range(rounds):
            # 1. a damped step, in which parameters pressed against their bounds stay there
            held = ((theta <= problem.lower) & (gradient > 0)) | ((theta >= problem.upper) & (gradient < 0))
            held |= frozen
            curvature = fast + blend[:, None, None] * (slow - fast)
            scale = slow[:, diagonal, diagonal]
            scale = np.maximum(scale, 1e-12 * scale.max(axis=1, keepdims=True)) + 1e-300
            root = np.sqrt(scale)
            system = curvature / (root[:, :, None] * root[:, None, :])
            system = np.where(held[:, :, None] | held[:, None, :], 0.0, system)
            system[:, diagonal, diagonal] += damping[:, None] + held
            right = np.where(held, 0.0, gradient / root)
            broken = ~(np.isfinite(system).all(axis=(1, 2)) & np.isfinite(right).all(axis=1))
            system[broken], right[broken] = np.eye(K), 0.0
            step = np.linalg.solve(system, right[..., None])[..., 0] / root
            hoped = (np.where(held, 0.0, gradient) * step).sum(axis=1)
            trial = np.clip(theta - np.clip(step, -longest, longest), problem.lower, problem.upper)

            # 2. judged by what it gains
            new = state(trial, target, weight)
            better = new[0] < value
            gain = np.where(better, value - new[0], 0.0)
            calm = np.where(gain <= 1e-12 * value, calm + 1, 0)
            keep = better[:, None]
            theta = np.where(keep, trial, theta)
            value = np.where(better, new[0], value)
            gradient = np.where(keep, new[1], gradient)
            slow = np.where(keep[..., None], new[2], slow)
            fast = np.where(keep[..., None], new[3], fast)
            damping = np.clip(damping * np.where(better, 0.3, 5.0), 1e-14, 1e14)
            blend = np.clip(blend * np.where(better, 0.3, 20.0), 1e-9, 1.0)

            # 3. those that no longer gain, nor could, are done
            over = (calm >= 10) | (hoped <= 1e-12 * value) | broken
            if over.any():
                done = index[over]
                end_theta[done], end_value[done] = theta[over], value[over]
                on = ~over
                if not on.any():
                    return end_theta, np.where(np.isfinite(end_value), end_value, np.inf)
                index, theta, value, gradient = index[on], theta[on], value[on], gradient[on]
                slow, fast, damping, blend, calm = slow[on], fast[on], damping[on], blend[on], calm[on]
                target, weight, frozen = some(target, on), some(weight, on), frozen[on]  # type: ignore[assignment]
        end_theta[index], end_value[index] = theta, value
    return end_theta, np.where(np.isfinite(end_value), end_value, np.inf)
