"""IsoFLOP fits: where the loss is lowest at each compute budget, and how that place moves with compute.

Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556): per budget the minimum of ln loss over ln N, then power laws
through the minima (`frontier`). The minimum is the vertex of a least-squares parabola, whose noisy copies are linear in
the noise and run as one batch of matrix products; or that of an Akima spline through the points, with the bootstrap of
Porian et al. 2024 (arXiv 2406.19146), for grids too wide or too lopsided for a parabola.

What it guards against: a minimum read off noise or off the edge of the grid looks as precise as any other number.
Budgets without an interior minimum are refused and do not enter the power law.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import pandas as pd

from analysis.frontier import Counter, flop_counter, line_targets, line_through_minima
from analysis.resampling import dependent_runs, trunk_labels
from analysis.runs import shared_budgets
from analysis.selection import Selection, provenance
from analysis.uncertainty import SEEDS, Noise, alike, interval, judge_noise, noise_by_scale
from analysis.verdicts import NAN, Budget, Estimate, Fit, Interval, Verdict, budget_name, narrow_span
from sweeps.errors import InputError, nearest
from sweeps.units import plural

Method = Literal["parabola", "akima"]
WIDE = 4.0
"""A parabola is a good likeness of a Chinchilla curve within this factor of its minimum."""
HEIGHT, ENOUGH = 0.15, 5
"""Sizes whose ln loss is more above the lowest are left out of the parabola while so many remain: a loss far up the
sides of the curve says nothing about its bottom but bends the parabola."""
AKIMA_POINTS = 25
"""Points of the spline's grid for each gap between neighbouring sizes, as in Porian et al. 2024."""
ONE_BUDGET = 2.0
"""Factor in C up to which runs count as runs of one budget, however that is counted."""
RESOLUTION = 1.0 / 3.0
"""A minimum is never known better than this part of the grid's spacing (Porian et al. 2024)."""


@dataclass(frozen=True)
class Parabola:
    """k0 + k1 x + k2 x^2 with x = ln N - center; `solve` maps the points' values to the three coefficients."""

    center: float
    curve: np.ndarray
    solve: np.ndarray

    @property
    def vertex(self) -> float:
        """ln N of the extremum."""
        return float(self.center - self.curve[1] / (2.0 * self.curve[2]))


def parabola(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> Parabola:
    """Weighted least squares of y on 1, x, x^2, centred for accuracy. At least three distinct x."""
    weights = np.ones_like(x) if weights is None else weights
    center = float(x.mean())
    design = np.vander(x - center, 3, increasing=True)
    root = np.sqrt(weights)
    solve = np.linalg.pinv(design * root[:, None]) * root
    return Parabola(center, solve @ y, solve)


def assumed_noise(losses: np.ndarray) -> np.ndarray:
    """Standard deviation of a loss (nats) between seeds where nobody measured it: the default of Porian et al. 2024.

    0.005 nats up to ln loss = 3, 0.1 from ln loss = 6 on, a power law of ln loss between. Language models stay below
    e^3 = 20 nats: there it is 0.005 throughout. (For their own RefinedWeb runs they took 0.002.)
    """
    height = np.log(np.clip(np.log(losses), 3.0, 6.0))
    return np.asarray(np.exp(np.interp(height, np.log([3.0, 6.0]), np.log([0.005, 0.1]))))


def fit_isoflop(
    selection: Selection,
    *,
    targets: Sequence[float] = (),
    method: Method = "parabola",
    height: float = HEIGHT,
    weighted: bool = True,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Fit:
    """Fit N*(C) and D*(C) to the budgets of the selected runs.

    params: N_exponent, N_coefficient, D_exponent, D_coefficient of N* = coefficient C^exponent (N in parameters, D in
    tokens, C in FLOPs). targets: compute in FLOPs at which N* and D* are wanted.

    method: "parabola" through the mean ln loss of each size, with noise between seeds, else that of the residuals; or
        "akima", a spline through the lowest loss of each size (the mean over seeds where there are several), with
        noise between seeds, else `assumed_noise`; the minimum is the median over noisy copies.
    height: of the parabola; sizes whose ln loss is more above the lowest are left out. inf keeps all.
    weighted: weigh the minima of the line by their variances. Without, the line is the one that most papers draw.
    resamples: of the bootstrap. level: of the intervals. seed: of the draws.

    Refuses budgets whose minimum is not interior, or not in half of the noisy copies, and the power law where fewer
    than three remain. Raises InputError for an unknown method or a height not above 0.
    """
    if method not in get_args(Method):
        raise InputError(f"unknown method {method!r}{nearest(method, get_args(Method))}: parabola or akima.")
    if not height > 0.0:
        raise InputError(
            f"height is {height!r}; it is a positive distance in ln loss above the lowest (inf: all sizes)."
        )
    rows, missed = _with_budgets(selection.rows)
    verdicts = list(selection.verdicts)
    splined = method == "akima"
    groups = sorted((group for _, group in rows.groupby("budget")), key=lambda group: float(group["C"].mean()))
    points = [_points(_best(group), np.inf) if splined else _points(group, height) for group in groups]
    curves = [parabola(p["x"], p["y"], p["count"]) if len(p["x"]) >= 3 and not splined else None for p in points]

    # 1. noise of one run's ln loss: between seeds, checked against the scatter about the parabolas and pooled with it
    squares, free = _scatter(points, curves)
    freedom = float(free.sum())
    residual_sd = float(np.sqrt(squares.sum() / freedom)) if freedom else NAN
    if splined:
        noise, said = _spline_noise(selection.noise, rows)
    else:
        noise, said = judge_noise(selection.noise, residual_sd, freedom)
    drawn = noise if splined else noise.pooled(residual_sd, freedom)
    if noise.source == "seeds":
        squares += [float(p["squares"].sum()) for p in points]
        free += [float((p["count"] - 1).sum()) for p in points]
    own, uneven = noise_by_scale(np.array([float(p["C"]) for p in points]), squares, free, drawn)
    said = [*said, *uneven]
    verdicts += said if points else []
    if points and (trunks := trunk_labels(rows)) is not None:
        verdicts.append(dependent_runs(trunks, "A law fitted to these runs draws trunks whole; more seeds help too."))

    # 2. the minimum of each budget, with a batch of noisy copies
    generator = np.random.default_rng(seed)
    assumed = splined and selection.noise is None
    budgets, copies = [], []
    for p, curve, noise_here in zip(points, curves, own):
        scales = noise_here.draw(generator, resamples)[:, None]
        here = assumed_noise(np.exp(p["y"])) / np.exp(p["y"]) if assumed else scales
        errors = generator.standard_normal((resamples, len(p["x"]))) * here / np.sqrt(p["count"])
        budget, draws, said = _budget(p, curve, flop_counter(rows), noise_here, errors, level)
        budgets.append(budget)
        copies.append(draws)
        verdicts += said

    # 3. the power laws through the accepted minima
    kept = [i for i, b in enumerate(budgets) if b.accepted]
    line, said = line_through_minima([budgets[i] for i in kept], [copies[i] for i in kept], drawn, weighted=weighted)
    verdicts += said
    if len(kept) >= 2:
        verdicts += narrow_span(np.array([budgets[i].C for i in kept]))
    # a refused budget carries no minimum, so nothing of the line reaches up to it
    spent = [budgets[i].C for i in kept] or [b.C for b in budgets] or [NAN]
    what = "run" if len(kept) in (0, len(budgets)) else "budget with a usable minimum"
    decisions, said = line_targets(line, targets, min(spent), max(spent), level, what)
    verdicts += said
    extra: dict[str, object] = {"residual_sd": residual_sd, "residual_freedom": freedom}
    extra |= {"drawn_sd": drawn.sd, "drawn_freedom": drawn.freedom} | ({"source": "assumed"} if assumed else {})
    options = {"method": method, "height": height, "weighted": weighted, "resamples": resamples, "level": level}
    return Fit(
        law="isoflop",
        loss=selection.loss,
        params=line.params,
        intervals=line.intervals(level),
        verdicts=tuple(verdicts),
        n_runs=len(rows),
        planned=selection.planned,
        finished=selection.finished,
        excluded=(*selection.excluded, *missed),
        noise=noise.to_json() | extra,
        decisions={"targets": decisions},
        provenance=provenance(selection, **options, seed=seed, scale="ln loss"),
        diagnostics={"method": method, "line": line.params, "accepted": len(kept), "line_stretch": line.stretch},
        budgets=tuple(budgets),
        draws=line.draws,
        level=level,
    ).settle()


def _scatter(points: list[dict[str, np.ndarray]], curves: list[Parabola | None]) -> tuple[np.ndarray, np.ndarray]:
    """Squares of one run's ln loss about each parabola, and their degrees of freedom; (budgets,) each."""
    squares, freedom = np.zeros(len(points)), np.zeros(len(points))
    for i, (p, curve) in enumerate(zip(points, curves)):
        if curve is not None and len(p["x"]) > 3:
            misses = p["y"] - np.vander(p["x"] - curve.center, 3, increasing=True) @ curve.curve
            squares[i], freedom[i] = p["count"] @ misses**2, len(p["x"]) - 3
    return squares, freedom


def _spline_noise(seeds: Noise | None, rows: pd.DataFrame) -> tuple[Noise, list[Verdict]]:
    """A spline leaves no residuals to read the noise off: it is measured, given, or assumed, which is said."""
    if seeds is not None or rows.empty:
        return seeds or Noise(sd=NAN, freedom=0, source="unknown"), []
    losses = rows["loss"].to_numpy(dtype=float)
    sd = float(np.median(assumed_noise(losses) / losses))
    message = (
        f"no seeds are replicated: their noise is assumed to be that of Porian et al. ({sd:.2%} of the loss). Train "
        "some cells with two or more seeds, or give the noise."
    )
    return Noise(sd=sd, freedom=np.inf, source="given"), [Verdict("noise_assumed", "caution", "fit", None, message)]


# --- budgets -----------------------------------------------------------------------------------------------------


def _with_budgets(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """The rows that belong to a budget. Without a budget column, runs of nearly equal C share one."""
    if "budget" not in rows.columns:
        rows = rows.assign(budget=shared_budgets(rows["C"].to_numpy()))
    one = alike(rows, ["N", "budget"])
    rows = rows.assign(budget=one["budget"], _size=one["N"])  # the size keeps its N as written
    without = rows["budget"].isna()
    missed = [{"cell": str(c), "reason": "belongs to no compute budget"} for c in rows["cell"][without]]
    return rows[~without], missed


def _best(group: pd.DataFrame) -> pd.DataFrame:
    """The lowest loss of each size, and of each seed where there are several."""
    keys = ["_size", *(c for c in SEEDS if c in group.columns)]
    return group.loc[group.groupby(keys, dropna=False)["loss"].idxmin()]


def _points(group: pd.DataFrame, height: float) -> dict[str, np.ndarray]:
    """One point per size: the mean ln loss over its runs, their number as its weight. `far` ones are not fitted."""
    sizes = group.assign(_y=np.log(group["loss"])).groupby("_size")
    x = np.log(np.array(sizes["N"].median(), dtype=float))
    y, count = sizes["_y"].mean().to_numpy(), sizes["_y"].count().to_numpy().astype(float)
    squares = sizes["_y"].var(ddof=0).to_numpy() * count
    near = y - y.min() <= max(height, float(np.sort(y)[:ENOUGH][-1] - y.min()))
    budget, C = np.array(group["budget"].iloc[0]), np.array(np.exp(np.log(group["C"]).mean()))
    far = {"far_x": x[~near], "far_y": y[~near], "C_span": np.array(group["C"].max() / group["C"].min())}
    return far | {"budget": budget, "C": C, "x": x[near], "y": y[near], "count": count[near], "squares": squares[near]}


@dataclass(frozen=True, kw_only=True)
class _Minimum:
    """The minimum of one budget's curve: `at` (ln N) and `loss` (ln), and the same of its noisy copies.

    at is NaN where the curve has no minimum, at or beyond the ends of the grid where it is not interior. copies beyond
    the grid are not `inside`. variance: of `at`, as far as noise explains it. weight: of the minimum in the line.
    """

    at: float
    loss: float
    copies: np.ndarray
    copy_losses: np.ndarray
    inside: np.ndarray
    variance: float
    weight: float


def _parabola_minimum(p: dict[str, np.ndarray], curve: Parabola, noise: Noise, errors: np.ndarray) -> _Minimum:
    """The vertex. The coefficients are linear in ln loss, so adding noise to them is exact."""
    x, (k0, k1, k2) = p["x"], curve.curve
    copies = curve.curve + errors @ curve.solve.T if noise.sd > 0 else np.tile(curve.curve, (len(errors), 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = curve.center - copies[:, 1] / (2.0 * copies[:, 2])
        lowest = copies[:, 0] - copies[:, 1] ** 2 / (4.0 * copies[:, 2])
    bent = copies[:, 2] > 0
    vertex = np.where(bent, vertex, np.where(copies[:, 1] > 0, -np.inf, np.inf))
    gradient = np.array([0.0, -0.5 / k2, 0.5 * k1 / k2**2]) if k2 > 0 else np.zeros(3)
    variance = float(noise.sd**2 * ((gradient @ curve.solve) ** 2 / p["count"]).sum()) if noise.sd > 0 else 0.0
    return _Minimum(
        at=curve.vertex if k2 > 0 else NAN,
        loss=float(k0 - k1**2 / (4.0 * k2)) if k2 > 0 else NAN,
        copies=vertex,
        copy_losses=lowest,
        inside=bent & (vertex > x[0]) & (vertex < x[-1]),
        variance=variance,
        weight=1.0 / (variance + (RESOLUTION * float(np.diff(x).mean())) ** 2),
    )


def _spline_minimum(p: dict[str, np.ndarray], errors: np.ndarray) -> _Minimum:
    """The lowest point of an Akima spline on a fine grid; the median over the noisy copies that have it inside."""
    from scipy.interpolate import Akima1DInterpolator

    x = p["x"]
    grid = np.linspace(x[0], x[-1], AKIMA_POINTS * (len(x) - 1))
    own = Akima1DInterpolator(x, p["y"])(grid)
    values = Akima1DInterpolator(x, (p["y"] + errors).T)(grid)
    place = values.argmin(axis=0)
    inside = (place > 0) & (place < len(grid) - 1)
    interior = 0 < own.argmin() < len(grid) - 1
    # Their variance: floored at the grid's resolution, and larger where copies were lost over the edge.
    floor = RESOLUTION * float(np.diff(x).mean())
    sd = max(float(grid[place[inside]].std()), floor) / inside.mean() if inside.any() else NAN
    return _Minimum(
        at=float(np.median(grid[place[inside]])) if interior and inside.any() else float(grid[own.argmin()]),
        loss=float(own.min()),
        copies=np.where(inside, grid[place], np.where(place == 0, -np.inf, np.inf)),
        copy_losses=values.min(axis=0),
        inside=inside,
        variance=sd**2,
        weight=1.0 / sd**2,
    )


def _budget(
    p: dict[str, np.ndarray],
    curve: Parabola | None,
    counter: Counter,
    noise: Noise,
    errors: np.ndarray,
    level: float,
) -> tuple[Budget, dict[str, np.ndarray], list[Verdict]]:
    """The minimum of one budget, its bootstrap copies (ln N, ln D, interior) and its verdicts. No curve: a spline."""
    x, count, C = p["x"], p["count"], float(p["C"])
    name = budget_name(float(p["budget"]))
    shown = Budget(
        budget=float(p["budget"]),
        C=C,
        sizes=tuple(np.exp(x).round(6).tolist()),
        losses=tuple(np.exp(p["y"]).tolist()),
        runs=tuple(int(c) for c in count),
        far=tuple(zip(np.exp(p["far_x"]).round(6).tolist(), np.exp(p["far_y"]).tolist())),
        center=curve.center if curve else NAN,
        curve=(float(curve.curve[0]), float(curve.curve[1]), float(curve.curve[2])) if curve else (NAN, NAN, NAN),
    )
    verdicts: list[Verdict] = []

    def say(code: str, severity: str, message: str) -> None:
        verdicts.append(Verdict(code, severity, "budget", name, f"budget {name}: {message}"))  # type: ignore[arg-type]

    if (span := float(p["C_span"])) > ONE_BUDGET:
        say("mixed_budget", "caution", f"its runs differ by a factor of {span:.3g} in compute, which moves a minimum.")
    if len(x) < 3:
        say("too_few_sizes", "refuse", f"{plural(len(x), 'size')} finished; a minimum needs 3, better 5.")
        return shown, {}, verdicts

    # 1. noisy copies of the minimum
    noisy = noise.sd > 0
    found = _parabola_minimum(p, curve, noise, errors) if curve else _spline_minimum(p, errors)
    best, inside = found.at, found.inside
    curvature_se = float(noise.sd * np.sqrt((curve.solve[2] ** 2 / count).sum())) if curve else NAN
    shown = replace(shown, curvature_se=curvature_se, interior=float(inside.mean()) if noisy else NAN)

    # 2. is there a minimum at all?
    if np.isnan(best):
        say("no_minimum", "refuse", "the losses do not curve upwards over these sizes. Widen the grid, or add seeds.")
        return shown, {}, verdicts
    if not x[0] < best < x[-1]:
        more = f"smaller sizes, below {np.exp(x[0]):.3g}" if best <= x[0] else f"larger ones, above {np.exp(x[-1]):.3g}"
        say("edge_minimum", "refuse", f"the loss is lowest at the edge of the grid; add {more}.")
        return shown, {}, verdicts
    if noisy and inside.mean() < 0.5:
        say("unstable_minimum", "refuse", f"in {1 - inside.mean():.0%} of noisy copies the minimum leaves the grid.")
        return shown, {}, verdicts

    # 3. what to keep in mind
    if shown.far:
        say("far_sizes", "info", f"{plural(len(shown.far), 'size')} far above the lowest loss not fitted.")
    if noisy and inside.mean() < 0.975:
        say("unstable_minimum", "caution", f"in {1 - inside.mean():.0%} of noisy copies the minimum leaves the grid.")
    elif curve and noisy and curve.curve[2] < 3.0 * curvature_se:
        say("weak_curvature", "caution", f"the curvature is {curve.curve[2] / curvature_se:.1f} standard errors.")
    if curve and len(x) == 3:
        say("no_residual_freedom", "caution", "three sizes determine the parabola exactly; its form cannot be checked.")
    if abs(best - (x[0] + x[-1]) / 2.0) > (x[-1] - x[0]) / 4.0:
        say("off_centre", "caution", "the minimum lies in the outer quarter of the grid; centre the sizes on it.")
    reach = float(np.exp(max(best - x[0], x[-1] - best)))
    if curve and reach > 1.1 * WIDE:
        away = f"the grid reaches {reach:.2g} times away from its minimum"
        say("wide_grid", "caution", f"{away}; beyond {WIDE:g} times the vertex is biased by a percent or more.")
    with np.errstate(over="ignore", divide="ignore"):
        log_D = np.log(C) - np.log(counter(np.exp(found.copies)))
    best_D = np.log(C) - float(np.log(counter(np.exp(np.array(best)))))
    low, high = _bounded(interval(found.copies, level), (float(x[0]), float(x[-1]))) if noisy else (NAN, NAN)
    if noisy and np.isnan([low, high]).any():
        say("open_interval", "caution", f"the noise leaves its minimum open towards {_sides(low, high)} sizes.")
    d_low, d_high = interval(log_D, level)
    t_low, t_high = interval(log_D - found.copies, level)
    shown = replace(
        shown,
        accepted=True,
        N=Estimate(value=float(np.exp(best)), interval=_exp(low, high)),
        # D falls where N rises: an open upper bound of N is an open lower bound of D, and without noise all are open.
        D=Estimate(value=float(np.exp(best_D)), interval=_exp(_unless_open(high, d_low), _unless_open(low, d_high))),
        loss=Estimate(
            value=float(np.exp(found.loss)),
            interval=_exp(*interval(found.copy_losses[inside], level)) if noisy else (NAN, NAN),
        ),
        tokens_per_parameter=Estimate(
            value=float(np.exp(best_D - best)), interval=_exp(_unless_open(high, t_low), _unless_open(low, t_high))
        ),
    )
    draws = {
        "N": np.where(inside, found.copies, NAN),
        "D": np.where(inside, log_D, NAN),
        "weight": np.array(found.weight),
        "variance": np.array(found.variance),
    }
    return shown, draws, verdicts


def _bounded(bounds: Interval, grid: Interval) -> Interval:
    """Bounds in ln N; one that lies more than the grid's width beyond the grid is no number but an open end."""
    width = grid[1] - grid[0]
    return (
        bounds[0] if bounds[0] > grid[0] - width else NAN,
        bounds[1] if bounds[1] < grid[1] + width else NAN,
    )


def _sides(low: float, high: float) -> str:
    """Towards which sizes an interval is open."""
    return " and ".join(side for side, value in (("smaller", low), ("larger", high)) if np.isnan(value))


def _unless_open(other: float, bound: float) -> float:
    """A bound of D or D/N, which is open where the bound of N that it comes from is."""
    return NAN if np.isnan(other) else bound


def _exp(low: float, high: float) -> Interval:
    """Bounds in a logarithm as bounds of the number."""
    return float(np.exp(low)), float(np.exp(high))
