"""A problem: a law on a table in the coordinates that the solver works in, what a residual costs, and where to start.

The coordinates are well behaved: positive parameters by their logarithms, features of terms centred, so that ln A and
alpha come apart (their correlation drops from .999 and the condition number of the fit from thousands to tens).
Starts solve for what a law is linear in, so that a grid over the other parameters is enough.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

from analysis.laws import LAWS, Law, Parameter
from sweeps.errors import InputError, nearest

OBJECTIVES = ("huber", "lad", "l2", "student")
Objective = Literal["huber", "lad", "l2", "student"]
STUDENT_FREEDOM = 4.0
FLOOR_ROOM = 0.05
"""So far above the lowest response, in its logarithm, may a floor lie: noise takes some runs below it."""
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
    weights: (n,), of the rows in the objective, 1 on average; None where all are equal.
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
    weights: np.ndarray | None = None

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
    weights: np.ndarray | None = None,
) -> Problem:
    """Put a law on a table: variables and a positive response, arrays (n,).

    `fixed` holds parameters at a value; `weights` (n,) are positive. A coefficient is a coordinate of its own only
    where features are not centred.
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
            highs.append(low + (6.0 if term.features else FLOOR_ROOM))
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
        weights=None if weights is None else np.asarray(weights, dtype=float) / np.mean(weights),
    )


def check_fixed(law: Law, fixed: Mapping[str, float]) -> None:
    """InputError for a parameter that the law lacks, a value that it cannot have or that is not searched, or where
    nothing is left to fit."""
    searched = {p.name: p for p in law.parameters}
    positive = {term.coefficient for term in law.terms} | {p.name for p in law.parameters if p.log}
    floors = {term.coefficient for term in law.terms if not term.features}
    for name, value in fixed.items():
        if name not in law.names:
            raise InputError(f"{law.name} has no parameter {name!r}{nearest(name, law.names)}: {', '.join(law.names)}.")
        if not np.isfinite(value):
            raise InputError(f"{name} is fixed at {value}; it must be a finite number.")
        if name in positive and value <= 0:
            alike = [o for o in LAWS.values() if (o.variables, o.response) == (law.variables, law.response)]
            without = [o.name for o in alike if name in floors and name not in o.names]
            other = f" A law without it is {' or '.join(without)}." if without else ""
            raise InputError(f"{name} is fixed at {value:g}; in {law.name} it must be a positive number.{other}")
        if name in searched and not searched[name].low <= value <= searched[name].high:
            ends = f"{searched[name].low:g} to {searched[name].high:g}"
            raise InputError(
                f"{name} is fixed at {value:g}; {law.name} takes it from {ends}. Fix it there, or free it."
            )
    if set(law.names) <= set(fixed):
        raise InputError(f"all of {', '.join(law.names)} are fixed, so nothing is left to fit; leave one of them free.")


def check_floor(law: Law, fixed: Mapping[str, float], response: np.ndarray) -> None:
    """InputError where a term that nothing makes smaller is held above the lowest response (n,), as far as a fit may
    put it there."""
    for name in (term.coefficient for term in law.terms if not term.features and term.coefficient in fixed):
        if np.log(fixed[name]) > np.log(response.min()) + FLOOR_ROOM:
            raise InputError(
                f"{name} is fixed at {fixed[name]:g}, above the lowest {law.response} of these runs "
                f"({response.min():.4g}): no run gets below it in {law.name}. Fix it lower, or free it."
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
