"""What a rule for learning rate and batch would have cost on runs that were trained: its excess over each group's best.

A published law can be judged on any grid that somebody else swept. Guards against judging by exponents: two laws whose
exponents differ in the first digit may choose equally good settings, since the valley is flat.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import LinearNDInterpolator

from analysis.swept import AXES, Group, swept_groups
from analysis.verdicts import NAN
from sweeps.errors import InputError, nearest

Ruling = Callable[..., Any]
"""The value of a hyperparameter at (N, D), numbers."""


def judge_rule(runs: pd.DataFrame, rules: Mapping[str, Ruling]) -> pd.DataFrame:
    """What a rule costs: one row per group with N, D, the ruled values, `loss`, `best` and `excess` (loss / best - 1).

    rules: {"learning_rate": rate(N, D), "batch_tokens": batch(N, D)}, or one of them; called with N (parameters) and
        D (tokens). A group's loss is interpolated linearly in the logs of the ruled hyperparameters between settings
        that did not diverge; `best` is the lowest loss that was measured. Where the ruled value lies outside the
        group's grid, loss and excess are NaN.
    Raises InputError for a hyperparameter that is none of the axes, or a column that is missing.
    """
    for name in rules:
        if name not in AXES:
            raise InputError(f"a rule for {name!r}{nearest(name, AXES)} cannot be judged; only for {', '.join(AXES)}.")
    axes = [axis for axis in AXES if axis in rules]
    rows = []
    for group in swept_groups(runs, axes).groups:
        N, D = group.key["N"], group.key["D"]
        ruled = {axis: float(rules[axis](N, D)) for axis in axes}
        loss = _interpolated(group, ruled)
        best = float(group.points["loss"].min())
        rows.append({**group.key, **ruled, "loss": loss, "best": best, "excess": loss / best - 1.0})
    return pd.DataFrame(rows)


def _interpolated(group: Group, ruled: Mapping[str, float]) -> float:
    """Along the rates of the two batches beside the ruled one, then between them: on a grid that is unambiguous, where
    a triangulation draws one diagonal or the other (on Step Law's grids that moves single cells by .05%). Settings
    that form no grid are triangulated."""
    points = group.points[group.points["count"] > 0]
    x, y = np.log(points[list(ruled)].to_numpy(dtype=float)), points["loss"].to_numpy()
    at = np.log(list(ruled.values()))
    if not len(y):
        return NAN
    if len(ruled) == 1:
        return _between(at[0], x[:, 0], y)
    batches = np.unique(np.round(x[:, 1], 6))
    lines = [np.abs(x[:, 1] - batch) < 1e-5 for batch in batches]
    along = np.array([_between(at[0], x[line, 0], y[line]) for line in lines])
    kept = np.isfinite(along)
    if kept.sum() >= 2:
        return _between(at[1], batches[kept], along[kept])
    if len(y) < 3 or (np.ptp(x, axis=0) == 0).any():
        return NAN
    return float(LinearNDInterpolator(x, y, rescale=True)(at)[0])


def _between(at: float, x: np.ndarray, y: np.ndarray) -> float:
    """Linear between the points, NaN beyond them."""
    order = np.argsort(x)
    return float(np.interp(at, x[order], y[order], left=NAN, right=NAN))
