"""What a fit of a law can bear: verdicts on the design, on each parameter, and on the runs that drive it.

The failure it guards against: numbers that the runs do not determine look as precise as any other. A parameter is not
identifiable where the fit is about as good with it at the edge of what was searched; a fit is driven by outliers where
it moves by more than its own error once the worst-fitting runs go, all together, since outliers mask each other.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import chdtri

from analysis.laws import Law
from analysis.problems import Problem, Robust
from analysis.resampling import root_weights
from analysis.solver import Solution, descend
from analysis.verdicts import Verdict
from sweeps.units import plural

PATH_SPREAD = 0.2
"""Runs within about 20% of one line in (ln N, ln D) cannot tell two terms apart."""
RANK = 1e-7
"""Singular values of the scaled Jacobian below this share of the largest are no information."""
OUTLIER_SHARE, OUTLIER_SCALES = 0.03, 3.0
"""At most so many runs, and only those so many scales away from the law, are tried as outliers."""
MANY = 5000


def design(form: Law, rows: pd.DataFrame, fixed: int = 0) -> list[Verdict]:
    """What the placement of the runs alone forbids."""
    free = len(form.names) - fixed
    if len(rows) < free + 1:
        message = (
            f"{plural(len(rows), 'usable run')} for {free} parameters; at least {free + 1} are needed, better "
            f"{free + 8}."
        )
        evidence = {"runs": len(rows), "parameters": free}
        return [Verdict("too_few_runs", "refuse", "fit", None, message, evidence)]
    levels = {v: len(np.unique(np.round(np.log(rows[v].clip(lower=1e-300)), 2))) for v in form.variables}
    needed = 3 if len(form.variables) <= 2 and not fixed else 2
    if poor := {v: count for v, count in levels.items() if count < needed}:
        found = " and ".join(f"{count} of {v}" for v, count in poor.items())
        message = f"the runs have {found} different values; the law needs {needed} to show its curvature."
        return [Verdict("too_few_levels", "refuse", "fit", None, message, poor)]
    if {"N", "D"} <= set(form.variables) and not fixed:
        logs = np.log(rows[["N", "D"]].to_numpy(dtype=float))
        across = float(np.sqrt(max(np.linalg.eigvalsh(np.cov(logs.T))[0], 0.0)))
        if across < PATH_SPREAD:
            message = (
                "all runs lie along one path in (N, D), so the law's terms cannot be told apart. Add runs off that "
                "path: small models on many tokens, large ones on few."
            )
            return [Verdict("one_path", "refuse", "fit", None, message, {"spread_across": across})]
    return []


def judge(
    problem: Problem, robust: Robust, best: Solution, thetas: np.ndarray, rows: pd.DataFrame
) -> tuple[list[Verdict], dict[str, Any]]:
    """All verdicts on a solved fit, and notes for its diagnostics."""
    said = [*_starts(best), *_rank(problem, best.theta)]
    if not any(v.code == "not_identifiable" for v in said):
        said += _edges(problem, robust, best)
    lost = {v.target for v in said if v.severity == "refuse" and v.scope == "parameter"}
    said += [v for v in _open_draws(problem, thetas) if not lost & {v.target, None}]
    steady = np.array([name not in lost for name in problem.law.names]) & (None not in lost)
    found, notes = _outliers(problem, robust, best, rows, steady)
    return [*said, *found], notes


def _starts(best: Solution) -> list[Verdict]:
    if best.agreeing >= max(2, 0.1 * best.starts) or best.starts == 1:
        return []
    message = (
        f"only {best.agreeing} of {best.starts} starts came to the best objective: there may be a better one, or a "
        "valley of equally good parameters."
    )
    evidence = {"agreeing": best.agreeing, "starts": best.starts}
    return [Verdict("starts_disagree", "caution", "fit", None, message, evidence)]


def _rank(problem: Problem, theta: np.ndarray) -> list[Verdict]:
    """Directions in which the predictions do not change at all."""
    _, slopes = problem.jacobian(theta)
    inner = (problem.lower < theta) & (theta < problem.upper)
    size = np.linalg.norm(slopes, axis=1)
    live = inner & (size > 1e-12)
    if live.sum() < 2:
        return []
    values = np.linalg.svd(slopes[live] / size[live, None], compute_uv=False)
    if values[-1] > RANK * values[0]:
        return []
    message = (
        f"the runs determine only {int((values > RANK * values[0]).sum())} combinations of "
        f"{plural(int(live.sum()), 'parameter')}: some of them can be traded for others at no cost."
    )
    evidence = {"smallest_singular_value": float(values[-1] / values[0])}
    return [Verdict("not_identifiable", "refuse", "parameter", None, message, evidence)]


def _edges(problem: Problem, robust: Robust, best: Solution) -> list[Verdict]:
    """Refits with each coordinate held at the edges of what is searched: a good fit there says it is not determined."""
    theta, width = best.theta, problem.upper - problem.lower
    free = np.flatnonzero(width > 0)
    starts, held = [], []
    for k in free:
        for edge in (problem.lower[k], problem.upper[k]):
            start, mask = theta.copy(), np.zeros(len(theta), dtype=bool)
            start[k], mask[k] = edge, True
            starts.append(start)
            held.append(mask)
    _, values = descend(problem, robust, np.array(starts), held=np.array(held), rounds=150)
    worse = likelihood_drop(problem, robust, values, best.objective).reshape(len(free), 2)
    limit = chdtri(1, 0.05) / 2.0  # 1.92: the profile-likelihood bound at 95%
    names, terms = problem.law.names, problem.law.terms
    at_edge = np.minimum(theta - problem.lower, problem.upper - theta) <= 1e-6 * width
    verdicts: dict[str, Verdict] = {}
    # those at an edge speak first: each parameter is refused once
    for k, (low, high) in sorted(zip(free, worse), key=lambda pair: (not at_edge[pair[0]], pair[0])):
        if low > limit and high > limit:
            continue
        side = "both sides" if low <= limit and high <= limit else "smaller values" if low <= limit else "larger values"
        evidence = {"likelihood_drop_low": float(low), "likelihood_drop_high": float(high)}
        floor = k < len(terms) and not terms[k].features
        if floor and high > limit:
            message = (
                f"{names[k]} cannot be told from zero: over these runs the {problem.law.response} still falls like a "
                "pure power law. Longer or larger runs would show the floor."
            )
            verdicts[names[k]] = Verdict("floor_unseen", "refuse", "parameter", names[k], message, evidence)
            continue
        code = "at_bound" if at_edge[k] else "not_identifiable"
        # a term is its coefficient and its exponents: neither means anything where the other is open
        involved = {names[k]}
        for term in terms:
            if names[k] == term.coefficient or names[k] in term.features:
                involved |= {term.coefficient, *term.features}
        found = "ran into the edge of what was searched" if at_edge[k] else f"is open towards {side}"
        message = f"{names[k]} {found}: the runs do not determine it."
        for name in sorted(involved):
            verdicts.setdefault(name, Verdict(code, "refuse", "parameter", name, message, evidence))
    said = list(verdicts.values())
    if any(v.code != "floor_unseen" for v in said) and terms:
        message = "a term of the law is not determined, so the law recommends nothing."
        said.append(Verdict("undetermined_law", "refuse", "decision", None, message))
    return said


def likelihood_drop(problem: Problem, robust: Robust, values: np.ndarray, best: float) -> np.ndarray:
    """By how much the log-likelihood falls, the noise's scale fitted anew at each point.

    Gaussian for least squares and Student's t, Laplace for sums that are nearly absolute deviations. A Huber sum of a
    fixed threshold is no likelihood; its share of residuals beyond the threshold decides which of the two is nearer.
    """
    rows = problem.rows
    smallest = 1e-12 * rows * max(robust.delta, 1e-12) ** 2
    ratio = np.maximum(values, smallest) / max(best, smallest)
    if robust.kind in ("l2", "student"):
        return np.asarray(0.5 * rows * np.log(ratio))
    # sum of |r| if all lie beyond the threshold, sum of squares if all within
    beyond = min(1.0, best / (0.5 * rows * robust.delta**2)) if robust.delta > 0 else 1.0
    return np.asarray(rows * (0.5 + 0.5 * (beyond >= 1.0)) * np.log(ratio))


def _open_draws(problem: Problem, thetas: np.ndarray) -> list[Verdict]:
    """Exponents whose draws pile up at an edge: that end of the interval is open."""
    verdicts = []
    for k in range(len(problem.law.terms), thetas.shape[1] if len(thetas) else 0):
        name, near = problem.law.names[k], 1e-9
        low = float((thetas[:, k] <= problem.lower[k] + near).mean())
        high = float((thetas[:, k] >= problem.upper[k] - near).mean())
        if problem.lower[k] < problem.upper[k] and max(low, high) > 0.025:
            side = "lower" if low > 0.025 else "higher"
            message = f"the noise leaves {name} open towards {side} values."
            evidence = {"share_at_lower": low, "share_at_upper": high}
            verdicts.append(Verdict("open_interval", "caution", "parameter", name, message, evidence))
    return verdicts


def _outliers(
    problem: Problem, robust: Robust, best: Solution, rows: pd.DataFrame, steady: np.ndarray
) -> tuple[list[Verdict], dict[str, Any]]:
    """Take out the k worst-fitting runs together, k up to 3%, and see what moves by more than its error afterwards.

    steady: (K,), the parameters that stand; the others move anyhow.
    """
    count, free = problem.rows, int((problem.lower < problem.upper).sum())
    most = min(max(1, math.floor(OUTLIER_SHARE * count)), count - free - 2)
    misses = np.abs(problem.predict(best.theta) - problem.target) * root_weights(problem)
    order = np.argsort(misses)[::-1]
    # Someone is always worst: an outlier lies beyond the others' scale.
    most = min(most, int((misses > OUTLIER_SCALES * 1.4826 * np.median(misses)).sum()))
    if most < 1 or np.median(misses) < 1e-12:
        return [], {}
    sizes = np.unique(np.round(np.geomspace(1, most, min(most, 8))).astype(int))
    weights = np.ones((len(sizes), count))
    for row, k in zip(weights, sizes):
        row[order[:k]] = 0.0
    thetas, _ = descend(problem, robust, np.tile(best.theta, (len(sizes), 1)), weights=weights)

    def moved(i: int, errors: np.ndarray) -> np.ndarray:
        """By how many errors each parameter that stands has moved without the worst sizes[i] runs."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(steady & (errors > 0), np.abs(thetas[i] - best.theta) / errors, 0.0)

    # The cheap error finds the number of runs that matters most, the dear one decides.
    most_moved = [moved(i, _sandwich(problem, robust, t, w > 0)).max() for i, (t, w) in enumerate(zip(thetas, weights))]
    worst = int(np.nanargmax(most_moved))
    shifts = moved(worst, standard_errors(problem, robust, thetas[worst], weights[worst] > 0))
    j, k, theta = int(np.nanargmax(shifts)), int(sizes[worst]), thetas[worst]
    if shifts[j] <= 1.0:
        return [], {}
    z = float(shifts[j])
    before, after = problem.params(best.theta), problem.params(theta)
    name = problem.law.names[j]
    cells = rows["cell"].astype(str).iloc[order[:k]].tolist()
    message = (
        f"the fit hangs on {plural(k, 'run')} that it fits worst ({', '.join(cells[:3])}{', ...' if k > 3 else ''}): "
        f"without {'it' if k == 1 else 'them'} {name} goes from {float(before[name]):.4g} to {float(after[name]):.4g}, "
        f"{z:.1f} standard errors."
    )
    evidence = {"runs": k, "parameter": name, "standard_errors": z}
    notes = {"without_worst": {"cells": cells, "params": {n: float(v) for n, v in after.items()}}}
    return [Verdict("outlier_driven", "caution", "fit", None, message, evidence)], notes


def standard_errors(problem: Problem, robust: Robust, theta: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Standard errors of the coordinates over the kept rows (n,), from 100 resamples of them; (K,).

    Of very many rows the sandwich: there it is right, and much cheaper. With a small threshold on few rows it is not,
    because the density of residuals at zero, which it needs, is not to be had.
    """
    inside = np.flatnonzero(kept)
    if len(inside) > MANY:
        return _sandwich(problem, robust, theta, kept)
    drawn = np.random.default_rng(0).multinomial(len(inside), np.full(len(inside), 1 / len(inside)), size=100)
    weights = np.zeros((len(drawn), problem.rows))
    weights[:, inside] = drawn
    thetas, _ = descend(problem, robust, np.tile(theta, (len(drawn), 1)), weights=weights, rounds=100)
    return np.asarray(thetas.std(axis=0, ddof=1))


def _sandwich(problem: Problem, robust: Robust, theta: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Asymptotic standard errors of a robust fit (Huber 1981) over the kept rows, (K,)."""
    inside = np.flatnonzero(kept)
    predicted, slopes = problem.jacobian(theta)
    misses = (predicted - problem.target)[inside]
    inner = problem.lower < problem.upper
    J = slopes[inner][:, inside]
    scale = max(1.4826 * float(np.median(np.abs(misses))), 1e-12)
    wide = Robust("huber", max(robust.delta, 1.5 * scale)) if robust.kind in ("huber", "lad") else robust
    own, within = wide.weights(misses)
    J, own = J * root_weights(problem)[inside], own * root_weights(problem)[inside]
    inverse = np.linalg.pinv(J * (own if within is None else within.astype(float)) @ J.T)
    errors = np.zeros(len(theta))
    errors[inner] = np.sqrt(np.maximum(np.diag(inverse @ ((J * (own * misses) ** 2) @ J.T) @ inverse), 0.0))
    return errors
