"""The envelope of training curves: which size has the lowest loss at each compute, approach 1 of Hoffmann et al. 2022
(arXiv 2203.15556, section 3.1).

Each size's loss is smoothed and interpolated in log-log over compute; at 1500 log-spaced C the size with the lowest
loss is taken. Where the lowest passes from one size to the next, the two tie, and the best size lies between them: ln
N* runs through these crossings, and straight lines in ln C are fitted to it. (A line through the staircase of winners
itself has a slope that depends on how many sizes there are and where the first and last step are cut.)

What it guards against: a point in the middle of an annealed schedule has a higher loss than a run that ends there, so
the envelope of such curves is no frontier. Only curves at a constant learning rate, or end points of runs of three or
more lengths per size, are taken. And where a curve simply ends, the next size wins by default: that is no crossing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.frontier import LINE_PARAMS, NO_LINE, Counter, Line, fit_lines, flop_counter, line_targets, make_line
from analysis.selection import Selection, provenance
from analysis.verdicts import NAN, Fit, Verdict, budget_name, narrow_span
from sweeps.errors import InputError
from sweeps.units import plural

POINTS = 1500
"""Values of C at which the lowest size is looked up, as in the paper."""
HORIZONS, SIZES = 3, 3
"""Token counts that one size needs where end points stand in for a curve, and sizes that the envelope needs."""
SMOOTHED = 8
"""Points of a curve from which on it is smoothed; fewer are joined."""
MOST_LOST = 0.25
"""Share of resampled curves without an envelope from which on there are no intervals. What is left are copies that hold
nearly the same curves: of three sizes all are the point itself, of four 95% intervals held in three of four trials."""
CONSTANT = 0.01
"""A learning rate that stays within this part of its peak after warm-up is constant."""


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """One cell's smoothed curve, or one size's end points: ln loss on the common grid of ln C, NaN off its range."""

    cell: str
    unit: str
    """What is resampled whole: its trunk, if it shares one."""
    N: float
    values: np.ndarray


def fit_envelope(
    selection: Selection,
    *,
    targets: Sequence[float] = (),
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Fit:
    """Approach 1 from the end points of runs: each size's final losses over three or more token counts are its curve.

    selection: chosen runs (`select`); any learning-rate schedule, as long as it ended with the run. Seeds averaged.
    params: N_exponent, N_coefficient, D_exponent, D_coefficient of N* = coefficient C^exponent (N in parameters, D in
    tokens, C in FLOPs). targets: compute in FLOPs at which N* and D* are wanted. The bootstrap is over sizes.

    Refuses where fewer than three sizes have three token counts, or fewer than three take part in the envelope.
    """
    rows = selection.rows
    horizons = rows.groupby("N")["D"].nunique() if len(rows) else pd.Series(dtype=float)
    enough = horizons.index[horizons >= HORIZONS]
    kept = rows[rows["N"].isin(enough)]
    reason = f"its size was trained for fewer than {HORIZONS} token counts"
    missed = [{"cell": str(c), "reason": reason} for c in rows["cell"][~rows["N"].isin(enough)]]
    verdicts = list(selection.verdicts)
    curves: list[_Curve] = []
    grid = np.array([])
    if len(enough) < SIZES:
        message = (
            f"{plural(len(enough), 'size')} trained for {HORIZONS} or more token counts; approach 1 needs {SIZES} "
            "such sizes, or curves at a constant learning rate."
        )
        verdicts.append(Verdict("too_few_horizons", "refuse", "fit", None, message))
    else:
        ends = kept.assign(x=np.log(kept["C"]), y=np.log(kept["loss"])).groupby(["N", "D"], as_index=False)
        means = ends[["x", "y"]].mean()
        grid = np.linspace(means["x"].min(), means["x"].max(), POINTS)
        curves = [_smooth(f"N = {n:.6g}", g, grid) for n, g in means.groupby("N")]
    counter = flop_counter(kept) if len(kept) else None
    known: dict[str, Any] = {
        "loss": selection.loss,
        "planned": selection.planned,
        "finished": selection.finished,
        "excluded": (*selection.excluded, *missed),
        "n_runs": len(kept),
        "provenance": provenance(
            selection, source="end points", points=POINTS, resamples=resamples, level=level, seed=seed
        ),
    }
    return _fit(curves, grid, counter, verdicts, known, "end points", targets, resamples, level, seed)


def fit_curve_envelope(
    curves: pd.DataFrame,
    *,
    constant_rate: bool | None = None,
    loss: str = "val_loss",
    targets: Sequence[float] = (),
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Fit:
    """Approach 1 from training curves (`load_curves`) of runs at a constant learning rate, such as trunks.

    curves: one row per logged point with cell, N, D, C (of the whole run), tokens and the column `loss` (nats per
        token); compute so far is the column `flops`, else C tokens / D.
    constant_rate: whether the rate was constant. By default the logged `learning_rate` tells: a curve is constant if,
        from where it first comes within 1% of its peak (the end of warm-up), it never leaves that again. Points of
        the warm-up are left out. True or False overrule it.
    params, targets: as for `fit_envelope`. resamples: of the bootstrap over cells, those of one trunk together:
        where each size has one curve it drops whole sizes, and its intervals are wide rather than narrow.

    Refuses annealed curves, curves whose schedule is not known, and fewer than three sizes in the envelope.
    Raises InputError for a missing column.
    """
    needed = ["cell", "N", "D", "C", "tokens", loss]
    if missing := [c for c in needed if c not in curves.columns]:
        raise InputError(
            f"the curves lack {', '.join(missing)}; they have {', '.join(map(str, curves.columns))}. "
            "Take them from analysis.load_curves, or name the loss column."
        )
    cells = int(curves["cell"].nunique())
    used, verdicts = _constant_part(curves, constant_rate)
    if "family" in curves.columns and curves["family"].nunique() > 1:
        message = "the curves are of several families; an envelope holds for one. Fit them apart."
        verdicts.append(Verdict("mixed_families", "refuse", "fit", None, message))
    flops = used["flops"] if "flops" in used.columns else pd.Series(np.nan, used.index)
    used = used.assign(_flops=flops.fillna(used["C"] * used["tokens"] / used["D"]))
    used = used[(used[loss] > 0) & np.isfinite(used[loss]) & (used["_flops"] > 0)]
    used = used.assign(x=np.log(used["_flops"]), y=np.log(used[loss].astype(float))).drop_duplicates(["cell", "x"])
    points = used.groupby("cell")["x"].transform("count")
    short = sorted(set(map(str, curves["cell"])) - set(map(str, used["cell"][points >= HORIZONS])))
    used = used[points >= HORIZONS]
    smooth: list[_Curve] = []
    grid = np.array([])
    if len(used):
        grid = np.linspace(used["x"].min(), used["x"].max(), POINTS)
        smooth = [_smooth(str(cell), g, grid) for cell, g in used.groupby("cell", sort=False)]
    elif not verdicts:
        message = f"no curve has {HORIZONS} or more points with a loss at a constant learning rate."
        verdicts.append(Verdict("too_few_horizons", "refuse", "fit", None, message))
    reason = "no constant-rate curve of three points or more"
    known: dict[str, Any] = {
        "loss": loss,
        "planned": cells,
        "finished": len(smooth),
        "excluded": tuple({"cell": cell, "reason": reason} for cell in short),
        "n_runs": len(smooth),
        "provenance": {"source": "curves", "cells": [c.cell for c in smooth], "points": POINTS, "loss": loss}
        | {"resamples": resamples, "level": level, "seed": seed, "constant_rate": constant_rate},
    }
    counter = flop_counter(used.assign(C=used["_flops"], D=used["tokens"])) if len(used) else None
    return _fit(smooth, grid, counter, verdicts, known, "curves", targets, resamples, level, seed)


def _constant_part(curves: pd.DataFrame, constant_rate: bool | None) -> tuple[pd.DataFrame, list[Verdict]]:
    """The points after warm-up, or none and the reason: the rate falls, or nobody knows."""
    none = curves.iloc[:0]
    if constant_rate is False:
        message = "the curves are of annealed runs: a point in mid-schedule is no result. Give their end points."
        return none, [Verdict("annealed_curves", "refuse", "fit", None, message)]
    known = "learning_rate" in curves.columns
    rates = curves.dropna(subset=["learning_rate"]) if known else none
    if constant_rate is None and set(curves["cell"]) - set(rates["cell"]):
        message = (
            "some curves do not say their learning rate, so they may be annealed, whose points in mid-schedule are no "
            "results. Say so if the rate was constant (constant_rate=True)."
        )
        return none, [Verdict("unknown_schedule", "refuse", "fit", None, message)]
    start, fallen = {}, []
    for cell, rows in rates.sort_values("tokens").groupby("cell"):
        rate = rows["learning_rate"].to_numpy(dtype=float)
        at_peak = rate >= (1.0 - CONSTANT) * rate.max()
        start[cell] = float(rows["tokens"].iloc[at_peak.argmax()])
        if not at_peak[at_peak.argmax() :].all():
            fallen.append(str(cell))
    if fallen and constant_rate is None:
        message = (
            f"the learning rate of {plural(len(fallen), 'curve')} falls (first {fallen[0]}): a point in mid-schedule "
            "is no result. Use trunks at a constant rate, or end points of three or more token counts per size."
        )
        return none, [Verdict("annealed_curves", "refuse", "fit", None, message)]
    warm = curves["cell"].map(start).fillna(0.0) if start else pd.Series(0.0, curves.index)
    return curves[curves["tokens"] >= warm], []


def _smooth(cell: str, points: pd.DataFrame, grid: np.ndarray) -> _Curve:
    """ln loss on the grid of ln C: a smoothing spline (penalty by cross-validation), or few points joined."""
    from scipy.interpolate import PchipInterpolator, make_smoothing_spline

    ordered = points.sort_values("x")
    unit = cell if "trunk" not in points.columns or pd.isna(points["trunk"].iloc[0]) else str(points["trunk"].iloc[0])
    x, y = ordered["x"].to_numpy(dtype=float), ordered["y"].to_numpy(dtype=float)
    curve = make_smoothing_spline(x, y) if len(x) >= SMOOTHED else PchipInterpolator(x, y)
    inside = (grid >= x[0]) & (grid <= x[-1])
    return _Curve(cell=cell, unit=unit, N=float(ordered["N"].iloc[0]), values=np.where(inside, curve(grid), NAN))


# --- the envelope ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Path:
    """Where the lowest loss passes from one size to the next: ln C, ln N* there, and the sizes that take part."""

    x: np.ndarray
    y: np.ndarray
    sizes: tuple[float, ...]


def _path(grid: np.ndarray, sizes: np.ndarray, values: np.ndarray) -> _Path:
    """The crossings of the envelope. values: (sizes, grid), ln loss of each size, NaN where it has none.

    A change of winner where one of the two curves begins or ends is no tie, and is left out.
    """
    covered = np.isfinite(values).any(axis=0)
    winner = np.where(covered, np.argmin(np.where(np.isnan(values), np.inf, values), axis=0), -1)
    changes = np.flatnonzero((winner[1:] != winner[:-1]) & covered[1:] & covered[:-1])
    before, after = winner[changes], winner[changes + 1]
    tie = np.isfinite(values[before, changes + 1]) & np.isfinite(values[after, changes])
    changes, before, after = changes[tie], before[tie], after[tie]
    logs = np.log(sizes)
    return _Path(
        x=(grid[changes] + grid[changes + 1]) / 2.0,
        y=(logs[before] + logs[after]) / 2.0,
        sizes=tuple(sizes[np.union1d(before, after).astype(int)].tolist()),
    )


def _lines(path: _Path, grid: np.ndarray, counter: Counter, pivot: float) -> tuple[np.ndarray, np.ndarray]:
    """(level at ln C = pivot, slope) of ln N* and ln D*, over the grid from the first to the last crossing."""
    x = grid[(grid >= path.x[0]) & (grid <= path.x[-1])]
    log_N = np.interp(x, path.x, path.y)
    log_D = x - np.log(counter(np.exp(log_N)))
    levels, slopes = fit_lines(x - pivot, np.stack([log_N, log_D]), np.ones(len(x)))
    return levels, slopes


def _usable(path: _Path) -> bool:
    return len(path.sizes) >= SIZES and path.x[-1] > path.x[0]


def _fit(
    curves: list[_Curve],
    grid: np.ndarray,
    counter: Counter | None,
    verdicts: list[Verdict],
    known: dict[str, Any],
    source: str,
    targets: Sequence[float],
    resamples: int,
    level: float,
    seed: int,
) -> Fit:
    """The lines through the envelope of the curves, with a bootstrap over the curves."""
    line: Line = NO_LINE
    sizes = np.array(sorted({c.N for c in curves}))
    which = np.array([np.searchsorted(sizes, c.N) for c in curves], dtype=int)
    values = np.array([c.values for c in curves]).reshape(len(curves), len(grid))
    path = _path(grid, sizes, _means(values, which, len(sizes), np.ones(len(curves)))) if curves else None
    lost = NAN
    if path is not None and _usable(path):
        assert counter is not None
        pivot = float((path.x[0] + path.x[-1]) / 2.0)
        levels, slopes = _lines(path, grid, counter, pivot)
        point = {v: (float(levels[i]), float(slopes[i])) for i, v in enumerate("ND")}
        units = np.unique([c.unit for c in curves], return_inverse=True)[1]
        copies, lost = _copies(values, units, which, sizes, grid, counter, pivot, resamples, seed)
        line = make_line(pivot, point, copies if lost <= MOST_LOST else {})
        verdicts = [*verdicts, *narrow_span(np.exp(path.x)), *_said(len(sizes), path, lost)]
    elif path is not None:
        message = (
            f"{plural(len(path.sizes), 'size')} of {len(sizes)} pass the lowest loss on to one another; approach 1 "
            f"needs {SIZES}. Train small sizes longer, so that their curves cross those of larger ones."
        )
        verdicts = [*verdicts, Verdict("too_few_sizes", "refuse", "fit", None, message)]
    ends = (path.x[0], path.x[-1]) if path is not None and len(path.x) else (NAN, NAN)
    cheapest, dearest = (float(np.exp(x)) for x in ends)
    decisions, said = line_targets(line, targets, cheapest, dearest, level)
    crossings = [] if path is None else [{"C": float(np.exp(x)), "N": float(np.exp(y))} for x, y in zip(path.x, path.y)]
    return Fit(
        law="envelope",
        params=line.params or dict.fromkeys(LINE_PARAMS, NAN),
        intervals=line.intervals(level),
        verdicts=(*verdicts, *said),
        noise={},
        decisions={"targets": decisions},
        diagnostics={"source": source, "crossings": crossings, "sizes": len(sizes), "copies_lost": lost},
        draws=line.draws,
        level=level,
        **known,
    ).settle()


def _means(values: np.ndarray, which: np.ndarray, sizes: int, weights: np.ndarray) -> np.ndarray:
    """Weighted mean curve of each size, (sizes, grid); NaN where no cell of weight has a value."""
    share = np.zeros((sizes, len(values)))
    share[which, np.arange(len(values))] = weights
    total, count = share @ np.nan_to_num(values), share @ np.isfinite(values)
    return np.where(count > 0, total / np.maximum(count, 1.0), NAN)


def _copies(
    values: np.ndarray,
    units: np.ndarray,
    which: np.ndarray,
    sizes: np.ndarray,
    grid: np.ndarray,
    counter: Counter,
    pivot: float,
    resamples: int,
    seed: int,
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], float]:
    """Lines through resampled curves (level, slope of N and of D), and the share of resamples without an envelope.

    units: (curves,), counted from 0; curves of equal unit are drawn together.
    """
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        count = int(units.max()) + 1
        weights = np.bincount(generator.integers(0, count, count), minlength=count)[units].astype(float)
        path = _path(grid, sizes, _means(values, which, len(sizes), weights))
        if _usable(path):
            found.append(_lines(path, grid, counter, pivot))
    if not found:
        return {}, 1.0
    levels, slopes = (np.array([f[i] for f in found]) for i in (0, 1))
    return {v: (levels[:, i], slopes[:, i]) for i, v in enumerate("ND")}, 1.0 - len(found) / resamples


def _said(sizes: int, path: _Path, lost: float) -> list[Verdict]:
    """What to keep in mind of an envelope that stands."""
    verdicts = []
    if len(path.sizes) < sizes:
        message = f"{sizes - len(path.sizes)} of {sizes} sizes never tie for the lowest loss, and do not enter."
        verdicts.append(Verdict("sizes_off_envelope", "info", "fit", None, message))
    if lost > 0.05:
        left = (
            "the intervals are those of the rest, and too narrow"
            if lost <= MOST_LOST
            else "what the rest agree on is no interval, so there are none"
        )
        message = (
            f"{lost:.0%} of the resampled curves leave no envelope of {SIZES} sizes; {left}. More sizes between "
            f"{budget_name(np.exp(path.x[0]))} and {budget_name(np.exp(path.x[-1]))} FLOPs, or more seeds, would mend "
            "it."
        )
        verdicts.append(Verdict("few_curves", "caution", "fit", None, message))
    return verdicts
