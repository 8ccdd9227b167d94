"""Resampling: draws of a law's parameters by refitting, from noise or from the runs themselves.

The failure it guards against: intervals from points that are not independent (checkpoints of one run, branches of one
trunk) or from a fit's residuals as if the fit had cost nothing. Units are drawn whole, and their spread is enlarged by
the degrees of freedom that the parameters took.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from analysis.problems import Problem, Robust
from analysis.solver import descend
from analysis.uncertainty import DESIGN, SEEDS, Noise, alike
from analysis.verdicts import Verdict
from sweeps.units import plural

Way = Literal["noise", "rows", "delta"]
Draws = Callable[[int], np.ndarray]
"""Draws so many sets of targets or weights, (size, n)."""


def trunk_labels(rows: pd.DataFrame) -> np.ndarray | None:
    """The trunk of each run, (n,), where any two share one; else None.

    rows: with `cell`, and `trunk` as of `load_runs`. Seed and data made runs of one trunk better or worse together.
    """
    if "trunk" not in rows.columns:
        return None
    labels = group_labels(rows, "trunk")
    return labels if len(np.unique(labels)) < len(labels) else None


def group_labels(rows: pd.DataFrame, column: str) -> np.ndarray:
    """The group of each run by a column, (n,); a run without a value there is a group of its own, named by `cell`."""
    return rows[column].astype(object).where(rows[column].notna(), rows["cell"]).astype(str).to_numpy()


RUN_NAMES = ("run", "run_id", "runid", "run_name", "run_uuid", "job_id", "trial_id", "trial", "cell")
"""What tables call the column that names a run."""
MANY_LENGTHS = 10
"""Token counts at one size and setting from which on, in the median, they look like the points of a curve: who trains
each of them from the start does not take so many."""


def along_curves(rows: pd.DataFrame, meaning: str) -> Verdict | None:
    """A caution where rows look like points along training curves: one run's name, or one size and setting, at many D.

    meaning: what follows from that, and what to do, "{column}" being what names the curves. None for the runs of
    `load_runs`, whose column `trunk` tells what is shared.
    """
    if "trunk" in rows.columns or not {"N", "D"} <= set(rows.columns):
        return None
    for column in rows.columns:
        if str(column).strip().lower().replace(" ", "_").replace("-", "_") in RUN_NAMES:
            groups = rows.groupby(column)
            if len(groups) < len(rows) and (groups["N"].nunique() == 1).all() and (groups["D"].nunique() > 1).any():
                return _curves_verdict(column, len(groups), len(rows), meaning)
    own = [c for c in (*SEEDS, *DESIGN) if c in rows.columns and c not in ("D", "C", "steps", "U", "x", "S1", "S2")]
    lengths = rows.groupby(own, dropna=False)["D"].nunique()
    if lengths.median() < MANY_LENGTHS:
        return None
    return _curves_verdict("N", rows["N"].nunique(), len(rows), meaning)


def _curves_verdict(column: str, curves: int, rows: int, meaning: str) -> Verdict:
    message = (
        f"{rows} rows stand at {curves} values of {column} with several token counts each, as points along training "
        f"curves do: chance moves such points together, {meaning.replace('{column}', repr(column))}"
    )
    return Verdict("dependent_runs", "caution", "fit", None, message, {"runs": rows, "curves": curves})


def dependent_runs(labels: np.ndarray, remedy: str) -> Verdict:
    """The caution that intervals took runs of one trunk for independent."""
    trunks, counts = np.unique(labels, return_counts=True)
    shared = int((counts > 1).sum())
    message = (
        f"{int(counts[counts > 1].sum())} of {len(labels)} runs share {plural(shared, 'trunk')}: what chance did to a "
        "trunk is common to its branches and does not average out over them, but these intervals draw the noise of "
        f"each run by itself, so they may be too narrow. {remedy}"
    )
    evidence = {"runs": len(labels), "trunks": len(trunks), "shared": shared}
    return Verdict("dependent_runs", "caution", "fit", None, message, evidence)


def shared_past(rows: pd.DataFrame, fitted: np.ndarray) -> Verdict | None:
    """The caution that runs which a fit is scored by share trunks with those that it knows: `fitted` is (n,)."""
    labels = trunk_labels(rows)
    if labels is None or not (shared := np.intersect1d(labels[fitted], labels[~fitted])).size:
        return None
    scored = int(np.isin(labels[~fitted], shared).sum())
    message = (
        f"{plural(scored, 'run')} that the fit is scored by share {plural(len(shared), 'trunk')} with runs that it "
        "knows: what chance did to a trunk is in both, so new runs would be missed by more."
    )
    return Verdict("dependent_runs", "caution", "fit", None, message, {"scored": scored, "trunks": len(shared)})


FEW_REPEATS = 4
"""Runs beyond the first at their places below which one that went wrong would pass for what all of them differ by."""


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Runs that repeat the places of others: by seeds, as a rule.

    places: (n,), the place of each run, counted from 0. each: runs at a place, the effective mean (Searle 1971).
    sd: of one run about the law. common: the share of its variance that all runs of a place have in common: what the
    law, or the tuning of that cell, misses. freedom: of the places about the law, or of all runs where places are off
    by no more than their runs differ. between: root mean square of the places about the law, as of one run, and its
    degrees of freedom: what differs from seed noise only by what the law misses.
    """

    places: np.ndarray
    each: float
    sd: float
    common: float
    freedom: float
    between: tuple[float, float]


def places_of(table: pd.DataFrame, variables: Sequence[str]) -> np.ndarray:
    """The place of each run, (n,), counted from 0: where all these variables are alike."""
    return alike(table, variables).groupby(list(variables)).ngroup().to_numpy()


def repeats_of(problem: Problem, misses: np.ndarray, free: int) -> Repeats | None:
    """The components of the residuals `misses` (n,), in units of a run of weight 1; None where hardly any run
    repeats a place, or there are no more places than the `free` parameters."""
    places = places_of(pd.DataFrame(problem.variables), problem.law.variables)
    runs = np.bincount(places).astype(float)
    n, m = len(misses), len(runs)
    if not max(free, 1) < m <= n - FEW_REPEATS:
        return None
    means = np.bincount(places, misses) / runs
    several = runs[places] > 1
    within = robust_scale((misses - means[places])[several], n - m) ** 2
    between = robust_scale(np.sqrt(runs) * means, m - free) ** 2
    each = (n - float(np.square(runs).sum()) / n) / (m - 1)
    if between > within:
        excess, freedom = (between - within) / each, m - free
        total = within + excess
    else:  # all runs measure one noise
        excess, freedom = 0.0, n - free
        total = (within * (n - m) + between * (m - free)) / freedom
    return Repeats(
        places=places,
        each=each,
        sd=float(np.sqrt(total)),
        common=excess / total if total > 0 else 0.0,
        freedom=0.9 * freedom,
        between=(float(np.sqrt(between)), 0.9 * (m - free)),
    )


def robust_scale(misses: np.ndarray, freedom: float) -> float:
    """The scale of residuals that have so many degrees of freedom (Huber's proposal 2): an outlier counts as one and a
    half scales. Where they are few, nothing can be called an outlier."""
    full = misses * np.sqrt(len(misses) / freedom)  # as large as before the fit took its part
    scale = float(np.sqrt(np.square(full).mean()))
    for _ in range(20 if len(misses) >= 2 * (len(misses) - freedom) else 0):
        # the mean of min(z, 1.5)^2 over a standard normal is .7784
        new = float(np.sqrt(np.square(np.clip(full, -1.5 * scale, 1.5 * scale)).mean() / 0.7784))
        if abs(new - scale) <= 1e-3 * scale:
            break
        scale = new
    return scale


def draw_thetas(
    problem: Problem,
    robust: Robust,
    best: np.ndarray,
    noise: Noise,
    way: Way,
    labels: np.ndarray,
    *,
    by_row: Sequence[Noise],
    repeats: Repeats | None = None,
    count: int,
    seed: int,
) -> np.ndarray:
    """Draws of the solver's coordinates around a fit, (count, K); none where there is nothing to draw from.

    noise: new losses from the fitted law with Gaussian noise, that of `by_row` (n,), its scale drawn too; rows: whole
    groups of rows that share a label (n,), with replacement; delta: a normal approximation. repeats: what runs of one
    place have in common of their noise, drawn once for all of them.
    """
    generator = np.random.default_rng(seed)
    free = int((problem.lower < problem.upper).sum())
    if way == "rows":
        units, unit = np.unique(labels, return_inverse=True)
        if len(units) <= free + 1:
            return np.empty((0, len(best)))
        share = np.full(len(units), 1.0 / len(units))

        def counts(size: int) -> np.ndarray:
            return generator.multinomial(len(units), share, size=size)[:, unit].astype(float)

        thetas = _many(problem, robust, best, count, weights=counts)
        # drawing from n residuals that lost `free` degrees of freedom to the fit understates their spread
        return np.asarray(best + np.sqrt(len(units) / (len(units) - free)) * (thetas - best))
    if not np.isfinite(noise.sd) or noise.freedom <= 0:
        return np.empty((0, len(best)))
    if way == "delta":
        # what k runs have in common weighs as k times as much in each
        sd = noise.sd * (np.sqrt(1.0 + (repeats.each - 1.0) * repeats.common) if repeats else 1.0)
        scales, root = noise.draw(generator, count), _covariance_root(problem, robust, best, sd)
        steps = generator.standard_normal((count, root.shape[1])) @ root.T
        return np.asarray(np.clip(best + steps * (scales / noise.sd)[:, None], problem.lower, problem.upper))
    center = problem.predict(best)

    def copies(size: int) -> np.ndarray:
        scales = {own: own.draw(generator, size)[:, None] for own in dict.fromkeys(by_row)}
        of_rows = np.hstack([scales[own] for own in by_row])
        shocks = generator.standard_normal((size, problem.rows))
        if repeats is not None and repeats.common > 0:
            places = generator.standard_normal((size, int(repeats.places.max()) + 1))[:, repeats.places]
            shocks = np.sqrt(1.0 - repeats.common) * shocks + np.sqrt(repeats.common) * places
        return center + shocks * of_rows / root_weights(problem)

    return _many(problem, robust, best, count, targets=copies)


def _many(
    problem: Problem,
    robust: Robust,
    best: np.ndarray,
    count: int,
    *,
    weights: Draws | None = None,
    targets: Draws | None = None,
) -> np.ndarray:
    """Refits from the best point, in parts, so that what is drawn for them stays small."""
    most = max(64, 4_000_000 // problem.rows)
    ends = []
    for done in range(0, count, most):
        size = min(most, count - done)
        starts = np.tile(best, (size, 1))
        own_weights, own_targets = weights(size) if weights else None, targets(size) if targets else None
        ends.append(descend(problem, robust, starts, weights=own_weights, targets=own_targets)[0])
    return np.concatenate(ends)


def _covariance_root(problem: Problem, robust: Robust, theta: np.ndarray, sd: float) -> np.ndarray:
    """A root of the covariance of theta: sd^2 (J'J)^-1 with the efficiency that the robust loss gives up (Huber 1981).

    The sandwich of a robust fit is its least-squares covariance times E psi^2 / (E psi')^2, here at Gaussian residuals
    of the given scale.
    """
    _, slopes = problem.jacobian(theta)
    inner = problem.lower < problem.upper
    _, values, vt = np.linalg.svd((slopes[inner] * root_weights(problem)).T, full_matrices=False)
    keep = values > 1e-10 * values[0]
    root = np.zeros((len(theta), int(keep.sum())))
    z = np.linspace(-8.0, 8.0, 4001)
    density = np.exp(-0.5 * z * z) / np.exp(-0.5 * z * z).sum()
    own, _ = robust.weights(z * sd)
    psi = own * z
    slope = np.gradient(psi, z)
    loss = float((psi**2 * density).sum() / max(float((slope * density).sum()), 1e-9) ** 2)
    if robust.kind == "lad":
        loss = np.pi / 2.0
    root[inner] = (vt[keep].T / values[keep]) * sd * np.sqrt(loss)
    return root


def root_weights(problem: Problem) -> np.ndarray:
    """A row of weight w is taken to have 1 / sqrt(w) of the noise."""
    return np.ones(problem.rows) if problem.weights is None else np.sqrt(problem.weights)
