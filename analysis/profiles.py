"""Profile likelihoods: how much worse a law fits when one parameter is held away from its best value.

The parameter is held on a grid, all others are fitted anew, and the interval is where the log-likelihood has fallen by
no more than half a chi-square quantile (1.920729 at 95%; Venzon & Moolgavkar 1988). Unlike a standard error it knows
valleys and one-sided bounds. What it guards against: such an interval means something only for a likelihood. A Huber
sum with a fixed threshold is none, and its "rise by 1.92" depends on the threshold's unit; here the scale of the noise
is fitted at every point, so that the unit drops out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from analysis import judging
from analysis.fitting import Settings, problem_of
from analysis.laws import find_law
from analysis.problems import STUDENT_FREEDOM, Problem, Robust, check_fixed
from analysis.selection import select
from analysis.solver import descend, solve
from analysis.verdicts import NAN, OPEN, Interval, Verdict, clean, refused
from sweeps.errors import InputError, nearest

Likelihood = Literal["gaussian", "laplace", "student"]
SHOWN = 2.0
"""A profile is followed until it has fallen by so many times what ends the interval."""
STRIDE = 1.5
"""Each step away from the best value is so many times the one before."""
EXACT = 1e-9
"""Residuals of ln loss below this are rounding, not noise."""
FLAT = 0.05
"""Where a profile changes by less than this part of the limit, all the way to the bound, it need not be shown."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A profile likelihood of one parameter of a law.

    value: the best value. values: (P,) the values held, rising; drop: (P,) how far the log-likelihood lies below its
    best at each, >= 0. params: all parameters along the way, (P,) each: what is traded for what.
    interval: where drop <= limit; NaN for an end that stays open, since the drop never reaches the limit before the
    bound of what is searched. verdicts: what was said of the runs, and of open ends. Refused: no values, all NaN.
    """

    law: str
    parameter: str
    likelihood: Likelihood
    level: float
    limit: float
    value: float
    values: np.ndarray
    drop: np.ndarray
    interval: Interval
    n_runs: int
    verdicts: tuple[Verdict, ...] = ()
    params: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def refused(self) -> bool:
        return refused(self.verdicts)

    @property
    def open_ends(self) -> tuple[bool, bool]:
        """Whether the interval is open towards smaller and towards larger values."""
        return bool(np.isnan(self.interval[0])), bool(np.isnan(self.interval[1]))

    def to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = clean(vars(self) | {"verdicts": [v.to_json() for v in self.verdicts]})
        return result


def profile(
    runs: pd.DataFrame,
    law: str,
    parameter: str,
    *,
    likelihood: Likelihood = "gaussian",
    level: float = 0.95,
    points: int = 41,
    loss: str | None = None,
    raw: bool = False,
    fixed: Mapping[str, float] | None = None,
) -> Profile:
    """The profile likelihood of a law's parameter over a table of runs, and the interval that it gives.

    likelihood: of the residuals of ln loss, its scale fitted at every point: gaussian (the log-likelihood is
        -n/2 ln sum r^2), laplace (-n ln sum |r|) or student (4 degrees of freedom; for runs with outliers).
    level: of the interval. The chi-square limit is that of many runs: with 25 runs and 5 parameters an interval of
        95% holds about 92%.
    points: values on the grid, half of them on each side of the best. loss, raw, fixed: as for `analysis.fit`.

    Returns a Profile; runs that cannot bear the law give a refused one. Raises InputError for an unknown law,
    parameter, likelihood or number, and for a missing column.
    """
    form = find_law(law)
    if parameter not in form.names:
        listed = ", ".join(form.names)
        raise InputError(f"{law} has no parameter {parameter!r}{nearest(parameter, form.names)}: {listed}.")
    if parameter in (fixed or {}):
        raise InputError(f"{parameter} is fixed, so it has no profile; leave it out of fixed.")
    check_fixed(form, fixed or {})
    if likelihood not in get_args(Likelihood):
        allowed = get_args(Likelihood)
        raise InputError(
            f"likelihood is {likelihood!r}{nearest(likelihood, allowed)}; it must be one of {', '.join(allowed)}. "
            "(Huber's is none: its threshold is fixed.)"
        )
    if not 0.5 <= level < 1:
        raise InputError(f"level is {level!r}; it must be from 0.5 to below 1, such as 0.95.")
    if points < 5:
        raise InputError(f"points is {points!r}; a profile needs at least 5.")
    limit = _limit(level)
    selection = select(runs, loss, form.variables, form.response)
    verdicts = [*selection.verdicts, *judging.design(form, selection.rows, len(fixed or {}))]
    known: dict[str, Any] = {
        "law": form.name,
        "parameter": parameter,
        "likelihood": likelihood,
        "level": level,
        "limit": limit,
        "n_runs": len(selection.rows),
    }
    if refused(verdicts):
        nothing = np.array([])
        return Profile(value=NAN, values=nothing, drop=nothing, interval=OPEN, verdicts=tuple(verdicts), **known)
    settings = Settings(raw=raw, fixed=dict(fixed or {}))
    problem = problem_of(form, selection.rows, settings, centred=False)  # there every parameter is a coordinate
    best = _best(problem, problem_of(form, selection.rows, settings), likelihood)
    k = form.names.index(parameter)
    thetas, drop, reached = _follow(problem, likelihood, best, k, limit, points)
    params = problem.params(thetas)
    low, high = _crossings(thetas[:, k], drop, limit, reached)
    ends = [float(np.exp(end)) if problem.logs[k] else end for end in (low, high)]
    for end, side in zip(ends, ("lower", "higher")):
        if np.isnan(end):
            message = f"the runs leave {parameter} open towards {side} values: there they fit about as well."
            verdicts.append(Verdict("open_interval", "caution", "parameter", parameter, message))
    return Profile(
        value=float(params[parameter][int(np.argmin(drop))]),
        values=params[parameter],
        drop=drop,
        interval=(ends[0], ends[1]),
        verdicts=tuple(verdicts),
        params=params,
        **known,
    )


def _limit(level: float) -> float:
    """How far the log-likelihood falls at the ends of an interval."""
    from scipy.special import chdtri

    return float(chdtri(1, 1.0 - level) / 2.0)


# --- likelihoods with a fitted scale -----------------------------------------------------------------------------


def log_likelihood(residuals: np.ndarray, likelihood: Likelihood) -> np.ndarray:
    """The log-likelihood of residuals (..., n) at their best scale, up to a constant that depends on n alone."""
    n = residuals.shape[-1]
    if likelihood == "gaussian":
        return np.asarray(-0.5 * n * np.log(np.square(residuals).sum(axis=-1) + n * EXACT**2))
    if likelihood == "laplace":
        return np.asarray(-n * np.log(np.abs(residuals).sum(axis=-1) + n * EXACT))
    scale = student_scale(residuals)
    spread = np.log1p(np.square(residuals / scale[..., None]) / STUDENT_FREEDOM).sum(axis=-1)
    return np.asarray(-n * np.log(scale) - 0.5 * (STUDENT_FREEDOM + 1.0) * spread)


def student_scale(residuals: np.ndarray) -> np.ndarray:
    """The most likely scale (...) of Student's t with 4 degrees of freedom for residuals (..., n).

    By the parameter-expanded EM algorithm (Liu, Rubin & Wu 1998), which comes to rest within a few dozen rounds.
    """
    squares = np.square(residuals) + EXACT**2
    scale = squares.mean(axis=-1)
    for _ in range(60):
        weights = (STUDENT_FREEDOM + 1.0) / (STUDENT_FREEDOM + squares / scale[..., None])
        scale = (weights * squares).sum(axis=-1) / weights.sum(axis=-1)
    return np.asarray(np.sqrt(scale))


def _maximise(
    problem: Problem, likelihood: Likelihood, starts: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The most likely coordinates (S, K) from each start, with those `held` (S, K) kept, and log-likelihoods (S,)."""
    thetas = starts
    if likelihood == "gaussian":
        thetas, _ = descend(problem, Robust("l2", 1.0), starts, held=held)
    elif likelihood == "laplace":
        # least absolute deviations, reached through ever smaller thresholds: on its creases nothing descends
        scale = max(float(np.median(np.abs(problem.predict(starts) - problem.target))), EXACT)
        for part in (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6):
            thetas, _ = descend(problem, Robust("huber", part * scale), thetas, held=held, rounds=60)
    else:
        for _ in range(50):
            # EM: least squares, each row weighed by what it says under the present scale
            residuals = problem.predict(thetas) - problem.target
            scaled = residuals / student_scale(residuals)[:, None]
            weights = (STUDENT_FREEDOM + 1.0) / (STUDENT_FREEDOM + np.square(scaled))
            before = thetas
            thetas, _ = descend(problem, Robust("l2", 1.0), thetas, weights=weights, held=held, rounds=15)
            if np.abs(thetas - before).max() < 1e-9:
                break
    return thetas, log_likelihood(problem.predict(thetas) - problem.target, likelihood)


def _best(problem: Problem, centred: Problem, likelihood: Likelihood) -> np.ndarray:
    """The most likely coordinates, (K,), over many starts; these are found where the law is centred."""
    robust = Robust("l2", 1.0) if likelihood == "gaussian" else Robust("lad", EXACT)
    theta = problem.theta(centred.params(solve(centred, robust).theta))
    theta = np.clip(theta, problem.lower, problem.upper)[None]
    thetas, _ = _maximise(problem, likelihood, theta, np.zeros(theta.shape, dtype=bool))
    return np.asarray(thetas[0])


# --- along the profile -------------------------------------------------------------------------------------------


def _follow(
    problem: Problem, likelihood: Likelihood, best: np.ndarray, k: int, limit: float, points: int
) -> tuple[np.ndarray, np.ndarray, tuple[bool, bool]]:
    """Coordinates (P, K) along the profile of coordinate k, their drops (P,), and whether each end reached the limit.

    A walk outwards finds how far the profile reaches; the grid then starts from between the walk's steps. Where the
    walk comes upon a better optimum, all begins again from there.
    """
    mask = np.zeros(len(best), dtype=bool)
    mask[k] = True
    for _ in range(3):
        top = float(log_likelihood(problem.predict(best) - problem.target, likelihood))
        sides = [_walk(problem, likelihood, best, k, sign, top, limit) for sign in (-1.0, 1.0)]
        steps = np.concatenate([sides[0][0][:0:-1], sides[1][0]])
        falls = np.concatenate([sides[0][1][:0:-1], sides[1][1]])
        if falls.min() > -1e-6:
            break
        free = np.zeros((1, len(best)), dtype=bool)
        best = _maximise(problem, likelihood, steps[int(np.argmin(falls))][None], free)[0][0]
    reached = (bool(sides[0][1][-1] > limit), bool(sides[1][1][-1] > limit))
    left, right = (_spread(theta[:, k], drop, limit, points // 2 + 1) for theta, drop in sides)
    values = np.unique(np.concatenate([left, right]))  # both begin at the best; a side of no width has no others
    starts = np.column_stack([np.interp(values, steps[:, k], steps[:, j]) for j in range(len(best))])
    thetas, likely = _maximise(problem, likelihood, starts, np.tile(mask, (len(values), 1)))
    return thetas, np.maximum(top - likely, 0.0), reached


def _walk(
    problem: Problem, likelihood: Likelihood, best: np.ndarray, k: int, sign: float, top: float, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Steps of coordinate k away from the best, to one side: coordinates (W, K) and drops (W,), the best first."""
    bound, width = (problem.lower if sign < 0 else problem.upper)[k], float(problem.upper[k] - problem.lower[k])
    mask = np.arange(len(best))[None] == k
    along, step = _tangent(problem, best, k)
    thetas, drops = [best], [0.0]
    while drops[-1] < SHOWN * limit and thetas[-1][k] != bound:
        value = np.clip(thetas[-1][k] + sign * step, problem.lower[k], problem.upper[k])
        start = np.clip(thetas[-1] + along * (value - thetas[-1][k]), problem.lower, problem.upper)
        start[k] = value
        theta, likely = _maximise(problem, likelihood, start[None], mask)
        drop = top - float(likely[0])
        if drop > 2.0 * SHOWN * limit and step > 1e-6 * width:  # over a cliff: a smaller step shows where it begins
            step /= 3.0
            continue
        along = (theta[0] - thetas[-1]) / (value - thetas[-1][k])
        thetas.append(theta[0])
        drops.append(drop)
        step *= STRIDE
    return np.array(thetas), np.array(drops)


def _tangent(problem: Problem, best: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """How the other coordinates follow coordinate k at first, (K,), and a first step of half a standard error."""
    predicted, slopes = problem.jacobian(best)
    sd = max(1.4826 * float(np.median(np.abs(predicted - problem.target))), EXACT)
    width = float(problem.upper[k] - problem.lower[k])
    size = np.linalg.norm(slopes, axis=1)
    inner = (problem.lower < best) & (best < problem.upper) & (size > 0.0)
    along = (np.arange(len(best)) == k).astype(float)
    if not inner[k]:  # nothing known: begin with a small part of what is searched
        return along, width / 1000.0
    scaled = slopes[inner] / size[inner, None]
    ridge = 1e-12 * np.eye(len(scaled))  # directions that change nothing get a large error, not none
    covariance = np.linalg.inv(scaled @ scaled.T + ridge) / np.outer(size[inner], size[inner])
    own = int(inner[:k].sum())
    along[inner] = covariance[own] / covariance[own, own]
    return along, float(np.clip(0.5 * sd * np.sqrt(covariance[own, own]), 1e-9 * width, 1e-2 * width))


def _spread(values: np.ndarray, drop: np.ndarray, limit: float, count: int) -> np.ndarray:
    """A side's values on the grid, from its walk (W,): equal paces along the curve, so that a cliff gets its share.

    They reach to twice the limit, or, of an open end, to where the profile has become flat.
    """
    if len(values) < 2:
        return values
    root = np.sqrt(np.maximum(drop, 0.0))  # nearly straight, where the drop is nearly a parabola
    wanted = np.sqrt(SHOWN * limit)
    if root[-1] > wanted:
        share = (wanted - root[-2]) / (root[-1] - root[-2])
        values = np.append(values[:-1], values[-2] + share * (values[-1] - values[-2]))
        root = np.append(root[:-1], wanted)
    else:
        changing = np.flatnonzero(np.abs(drop - drop[-1]) > FLAT * limit)
        last = min(changing[-1] + 2 if len(changing) else 1, len(values) - 1)
        values, root = values[: last + 1], root[: last + 1]
    paces = np.abs(np.diff(values)) / np.ptp(values) + np.abs(np.diff(root)) / max(float(np.ptp(root)), EXACT)
    path = np.concatenate([[0.0], np.cumsum(paces)])
    return np.interp(np.linspace(0.0, path[-1], count), path, values)


def _crossings(values: np.ndarray, drop: np.ndarray, limit: float, reached: tuple[bool, bool]) -> Interval:
    """Where the drop passes the limit, outermost; NaN on a side that never reached it."""
    within = np.flatnonzero(drop <= limit)
    root, wanted = np.sqrt(drop), np.sqrt(limit)
    ends = []
    for inside, outside, there in ((within[0], within[0] - 1, reached[0]), (within[-1], within[-1] + 1, reached[1])):
        if not there or not 0 <= outside < len(values):
            ends.append(NAN)
            continue
        share = (wanted - root[inside]) / (root[outside] - root[inside])
        ends.append(float(values[inside] + share * (values[outside] - values[inside])))
    return ends[0], ends[1]
