"""IsoFLOP fits: where the loss is lowest at each compute budget, and how that place moves with compute.

Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556): per budget a parabola of ln loss in ln N by least squares; its
vertex is N*(C); power laws through the vertices. Everything is linear in ln loss except the vertex itself, so the
parametric bootstrap (noise added to every point, both steps refitted) runs as one batch of matrix products.

What it guards against: a vertex read off noise or off the edge of the grid looks as precise as any other number.
Budgets without an interior minimum are refused and do not enter the power law (Porian et al. 2024, arXiv 2406.19146).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.special import fdtrc

from analysis.allocation import Counter, interpolated_counter
from analysis.selection import Selection, provenance
from analysis.uncertainty import Noise, interval, judge_noise
from analysis.verdicts import (
    NAN,
    NOTHING,
    Budget,
    Estimate,
    Fit,
    Interval,
    Verdict,
    budget_name,
    extrapolation,
    narrow_span,
    plural,
)

SAME_BUDGET = 0.05
"""Runs of a table without a budget column share one where their ln C is this close to the next."""
WIDE = 4.0
"""A parabola is a good likeness of a Chinchilla curve within this factor of its minimum."""
WINDOW, ENOUGH = 8.0, 5
"""Sizes farther than this factor from the lowest loss are left out of the parabola while so many remain."""


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


def fit_isoflop(selection: Selection, *, targets: Sequence[float] = (), resamples: int = 2000, seed: int = 0) -> Fit:
    """Fit N*(C) and D*(C) to the budgets of the selected runs.

    params: N_exponent, N_coefficient, D_exponent, D_coefficient of N* = coefficient C^exponent (N in parameters, D in
    tokens, C in FLOPs). targets: compute in FLOPs at which N* and D* are wanted. resamples: of the bootstrap.
    """
    rows, missed = _with_budgets(selection.rows)
    verdicts = list(selection.verdicts)
    points = [_points(group) for _, group in rows.groupby("budget")] if len(rows) else []
    curves = [parabola(p["x"], p["y"], p["count"]) if len(p["x"]) >= 3 else None for p in points]

    # 1. noise of one run's ln loss: between seeds, checked against the scatter about the parabolas
    squares, freedom = 0.0, 0
    for p, curve in zip(points, curves):
        if curve is not None and len(p["x"]) > 3:
            misses = p["y"] - np.vander(p["x"] - curve.center, 3, increasing=True) @ curve.curve
            squares += float(p["count"] @ misses**2)
            freedom += len(p["x"]) - 3
    residual_sd = float(np.sqrt(squares / freedom)) if freedom else NAN
    noise, said = judge_noise(selection.noise, residual_sd, freedom)
    verdicts += said if points else []

    # 2. the minimum of each budget, with a batch of noisy copies
    generator = np.random.default_rng(seed)
    scales = noise.draw(generator, resamples)
    counter = interpolated_counter(rows["N"], rows["C"] / rows["D"]) if len(rows) else None
    budgets, copies = [], []
    for p, curve in zip(points, curves):
        budget, draws, said = _budget(p, curve, counter, noise, scales, generator)
        budgets.append(budget)
        copies.append(draws)
        verdicts += said

    # 3. the power laws through the accepted minima
    kept = [i for i, b in enumerate(budgets) if b.accepted]
    line, said = _power_laws([budgets[i] for i in kept], [copies[i] for i in kept], noise)
    verdicts += said
    if len(kept) >= 2:
        verdicts += narrow_span(np.array([budgets[i].C for i in kept]))
    decisions, said = _targets(line, targets, max((b.C for b in budgets), default=NAN))
    verdicts += said
    return Fit(
        law="isoflop",
        loss=selection.loss,
        params=line.params,
        intervals={k: interval(line.draws[k]) if k in line.draws else (NAN, NAN) for k in line.params},
        verdicts=tuple(verdicts),
        n_runs=len(rows),
        planned=selection.planned,
        finished=selection.finished,
        excluded=(*selection.excluded, *missed),
        noise=noise.to_json() | {"residual_sd": residual_sd, "residual_freedom": freedom},
        decisions={"targets": decisions},
        provenance=provenance(selection, resamples=resamples, seed=seed, scale="ln loss"),
        diagnostics={"line": line.params, "accepted": len(kept), "line_stretch": line.stretch},
        budgets=tuple(budgets),
        draws=line.draws,
    ).settle()


# --- budgets -----------------------------------------------------------------------------------------------------


def _with_budgets(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """The rows that belong to a budget. Without a budget column, runs of nearly equal C share one."""
    if "budget" not in rows.columns:
        order = np.argsort(rows["C"].to_numpy())
        logs = np.log(rows["C"].to_numpy()[order])
        cluster = np.concatenate([[0], np.cumsum(np.diff(logs) > SAME_BUDGET)]).astype(int)[: len(logs)]
        width = pd.Series(logs).groupby(cluster).agg(np.ptp) if len(logs) else pd.Series(dtype=float)
        center = pd.Series(logs).groupby(cluster).mean() if len(logs) else pd.Series(dtype=float)
        # A chain of neighbours that spreads is a cloud of runs, not a budget.
        named = [float(f"{np.exp(center[c]):.4g}") if width[c] <= 4 * SAME_BUDGET else NAN for c in cluster]
        budget = np.empty(len(rows))
        budget[order] = named
        rows = rows.assign(budget=budget)
    without = rows["budget"].isna()
    missed = [{"cell": str(c), "reason": "belongs to no compute budget"} for c in rows["cell"][without]]
    return rows[~without], missed


def _points(group: pd.DataFrame) -> dict[str, np.ndarray]:
    """One point per size: the mean ln loss over its runs, their number as its weight. `far` ones are not fitted."""
    sizes = group.assign(_y=np.log(group["loss"])).groupby("N")
    x = np.log(np.array(sizes["N"].first(), dtype=float))
    y, count = sizes["_y"].mean().to_numpy(), sizes["_y"].count().to_numpy().astype(float)
    near = np.abs(x - x[y.argmin()]) <= np.log(WINDOW) + 0.05
    if near.sum() < ENOUGH:
        near = np.ones_like(near)
    budget, C = np.array(group["budget"].iloc[0]), np.array(np.exp(np.log(group["C"]).mean()))
    points = {"budget": budget, "C": C, "x": x[near], "y": y[near], "count": count[near]}
    return points | {"far_x": x[~near], "far_y": y[~near]}


def _budget(
    p: dict[str, np.ndarray],
    curve: Parabola | None,
    counter: Counter | None,
    noise: Noise,
    scales: np.ndarray,
    generator: np.random.Generator,
) -> tuple[Budget, dict[str, np.ndarray], list[Verdict]]:
    """The minimum of one budget, its bootstrap copies (ln N, ln D, interior) and its verdicts."""
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

    if curve is None:
        say("too_few_sizes", "refuse", f"{plural(len(x), 'size')} finished; a parabola needs 3, better 5.")
        return shown, {}, verdicts
    assert counter is not None

    # 1. noisy copies: the coefficients are linear in ln loss, so adding noise to them is exact
    noisy = noise.sd > 0
    errors = generator.standard_normal((len(scales), len(x))) * scales[:, None] / np.sqrt(count)
    copies = curve.curve + (errors @ curve.solve.T if noisy else np.zeros((len(scales), 3)))
    curvature_se = float(noise.sd * np.sqrt((curve.solve[2] ** 2 / count).sum()))
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = curve.center - copies[:, 1] / (2.0 * copies[:, 2])
        lowest = copies[:, 0] - copies[:, 1] ** 2 / (4.0 * copies[:, 2])
    bent = copies[:, 2] > 0
    vertex = np.where(bent, vertex, np.where(copies[:, 1] > 0, -np.inf, np.inf))
    inside = bent & (vertex > x[0]) & (vertex < x[-1])
    shown = replace(shown, curvature_se=curvature_se, interior=float(inside.mean()) if noisy else NAN)

    # 2. is there a minimum at all?
    if curve.curve[2] <= 0:
        say("no_minimum", "refuse", "the losses do not curve upwards over these sizes. Widen the grid, or add seeds.")
        return shown, {}, verdicts
    best = curve.vertex
    if not x[0] < best < x[-1]:
        side, move = ("smaller", "below") if best <= x[0] else ("larger", "above")
        edge = np.exp(x[0] if best <= x[0] else x[-1])
        say(
            "edge_minimum",
            "refuse",
            f"the loss is lowest at the edge of the grid; add {side} sizes, {move} {edge:.3g}.",
        )
        return shown, {}, verdicts
    if noisy and inside.mean() < 0.5:
        say("unstable_minimum", "refuse", f"in {1 - inside.mean():.0%} of noisy copies the minimum leaves the grid.")
        return shown, {}, verdicts

    # 3. what to keep in mind
    if shown.far:
        say(
            "far_sizes",
            "info",
            f"{plural(len(shown.far), 'size')} over {WINDOW:g} times away from the lowest not fitted.",
        )
    if noisy and inside.mean() < 0.975:
        say("unstable_minimum", "caution", f"in {1 - inside.mean():.0%} of noisy copies the minimum leaves the grid.")
    elif noisy and curve.curve[2] < 3.0 * curvature_se:
        say("weak_curvature", "caution", f"the curvature is {curve.curve[2] / curvature_se:.1f} standard errors.")
    if len(x) == 3:
        say("no_residual_freedom", "caution", "three sizes determine the parabola exactly; its form cannot be checked.")
    middle, half = (x[0] + x[-1]) / 2.0, (x[-1] - x[0]) / 2.0
    if abs(best - middle) > half / 2.0:
        say("off_centre", "caution", "the minimum lies in the outer quarter of the grid; centre the sizes on it.")
    reach = float(np.exp(max(best - x[0], x[-1] - best)))
    if reach > 1.1 * WIDE:
        say(
            "wide_grid",
            "caution",
            f"the grid reaches {reach:.2g} times away from the minimum; beyond {WIDE:g} times the parabola's vertex "
            "is biased by a percent or more.",
        )
    with np.errstate(over="ignore", divide="ignore"):
        log_D = np.log(C) - np.log(counter(np.exp(vertex)))
    best_D = np.log(C) - float(np.log(counter(np.exp(np.array(best)))))
    low, high = _bounded(interval(vertex), (float(x[0]), float(x[-1]))) if noisy else (NAN, NAN)
    if noisy and np.isnan([low, high]).any():
        say("open_interval", "caution", f"the noise leaves its minimum open towards {_sides(low, high)} sizes.")
    d_low, d_high = interval(log_D) if noisy else (NAN, NAN)
    t_low, t_high = interval(log_D - vertex) if noisy else (NAN, NAN)
    shown = replace(
        shown,
        accepted=True,
        N=Estimate(value=float(np.exp(best)), interval=_exp(low, high)),
        # D falls where N rises, so an open upper bound of N is an open lower bound of D.
        D=Estimate(value=float(np.exp(best_D)), interval=_exp(_if(high, d_low), _if(low, d_high))),
        loss=Estimate(
            value=float(np.exp(curve.curve[0] - curve.curve[1] ** 2 / (4.0 * curve.curve[2]))),
            interval=_exp(*interval(lowest[inside])) if noisy else (NAN, NAN),
        ),
        tokens_per_parameter=Estimate(
            value=float(np.exp(best_D - best)), interval=_exp(_if(high, t_low), _if(low, t_high))
        ),
    )
    gradient = np.array([0.0, -0.5 / curve.curve[2], 0.5 * curve.curve[1] / curve.curve[2] ** 2])
    variance = float(noise.sd**2 * ((gradient @ curve.solve) ** 2 / count).sum()) if noisy else 0.0
    spacing = float(np.diff(x).mean())
    draws = {
        "N": np.where(inside, vertex, NAN),
        "D": np.where(inside, log_D, NAN),
        # A minimum is never known better than a third of the grid's spacing (Porian et al. 2024).
        "weight": np.array(1.0 / (variance + (spacing / 3.0) ** 2)),
        "variance": np.array(variance),
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
    return " and ".join(side for side, value in (("smaller", low), ("larger", high)) if np.isnan(value))


def _if(other: float, bound: float) -> float:
    return NAN if np.isnan(other) else bound


def _exp(low: float, high: float) -> Interval:
    return float(np.exp(low)), float(np.exp(high))


# --- power laws --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """ln N* and ln D* as straight lines in ln C about `pivot`: point estimates and draws of (level, exponent)."""

    pivot: float
    point: dict[str, tuple[float, float]]
    copies: dict[str, tuple[np.ndarray, np.ndarray]]
    params: dict[str, float]
    draws: dict[str, np.ndarray]
    stretch: float


def _power_laws(
    budgets: list[Budget], copies: list[dict[str, np.ndarray]], noise: Noise
) -> tuple[_Line, list[Verdict]]:
    names = [f"{v}_{k}" for v in ("N", "D") for k in ("exponent", "coefficient")]
    if len(budgets) < 3:
        message = (
            f"{plural(len(budgets), 'budget')} with a usable minimum; a power law needs 3, because through two points "
            "any line passes. Add budgets, or mend the refused ones."
        )
        verdict = Verdict("too_few_budgets", "refuse", "parameter", None, message)
        return _Line(NAN, {}, {}, dict.fromkeys(names, NAN), {}, NAN), [verdict]
    x = np.log([b.C for b in budgets])
    weights = np.array([float(c["weight"]) for c in copies])
    pivot = float((weights * x).sum() / weights.sum())
    values = {"N": np.log([b.N.value for b in budgets]), "D": np.log([b.D.value for b in budgets])}
    point = {v: _line(x - pivot, y[None, :], weights) for v, y in values.items()}

    # Do the minima scatter about their line more than their own errors allow? Then stretch the draws to match.
    verdicts, stretch = [], 1.0
    variances = np.array([float(c["variance"]) for c in copies])
    if (variances > 0).all():
        misses = values["N"] - point["N"][0] - point["N"][1] * (x - pivot)
        spread = float((misses**2 / variances).sum() / (len(x) - 2))
        freedom = noise.freedom if np.isfinite(noise.freedom) else 1e9
        if spread > 1 and fdtrc(len(x) - 2, freedom, spread) < 0.01:
            stretch = float(np.sqrt(spread))
            message = (
                f"the minima scatter about their line {stretch:.1f} times as much as noise explains; the exponents' "
                "intervals are widened by that factor."
            )
            verdicts.append(Verdict("line_misfit", "caution", "fit", None, message))
    draws, lines = {}, {}
    for v, y in values.items():
        known = bool(noise.sd > 0)
        level, slope = _line(x - pivot, np.stack([c[v] for c in copies], axis=1) if known else y[None, :], weights)
        lines[v] = tuple(p + stretch * (d - p) for p, d in zip(point[v], (level, slope)))
        if known:
            draws[f"{v}_exponent"] = lines[v][1]
            draws[f"{v}_coefficient"] = np.exp(lines[v][0] - lines[v][1] * pivot)
    points = {v: (float(p[0][0]), float(p[1][0])) for v, p in point.items()}
    params: dict[str, float] = {}
    for v, (height, exponent) in points.items():
        params |= {f"{v}_exponent": exponent, f"{v}_coefficient": float(np.exp(height - exponent * pivot))}
    return _Line(pivot, points, {v: (p[0], p[1]) for v, p in lines.items()}, params, draws, stretch), verdicts


def _line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Level at x = 0 and slope of weighted lines through y (copies, points); NaN points are left out of their copy."""
    w = np.where(np.isnan(y), 0.0, weights)
    filled = np.where(np.isnan(y), 0.0, y)
    total = w.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        x_mean, y_mean = w @ x / total, (w * filled).sum(axis=1) / total
        away = x - x_mean[:, None]
        slope = (w * away * filled).sum(axis=1) / (w * away**2).sum(axis=1)
        slope = np.where((w > 0).sum(axis=1) >= 2, slope, NAN)
    return y_mean - slope * x_mean, slope


def _targets(line: _Line, targets: Sequence[float], dearest: float) -> tuple[list[dict[str, object]], list[Verdict]]:
    """N*, D* and D*/N* at each compute asked for, with the factor by which it lies beyond the dearest budget."""
    decisions: list[dict[str, object]] = []
    verdicts: list[Verdict] = []
    for C in targets:
        entry: dict[str, object] = {"C": float(C), "extrapolation": float(C) / dearest}
        if line.point:
            away = np.log(C) - line.pivot
            value = {v: p[0] + p[1] * away for v, p in line.point.items()}
            draws = {v: p[0] + p[1] * away for v, p in line.copies.items()}
            wide = {v: interval(d) if len(d) > 1 else (NAN, NAN) for v, d in draws.items()}
            ratio = draws["D"] - draws["N"]
            entry |= {v: Estimate(value=float(np.exp(value[v])), interval=_exp(*wide[v])) for v in ("N", "D")}
            entry["tokens_per_parameter"] = Estimate(
                value=float(np.exp(value["D"] - value["N"])),
                interval=_exp(*interval(ratio)) if len(ratio) > 1 else (NAN, NAN),
            )
        else:
            entry |= dict.fromkeys(("N", "D", "tokens_per_parameter"), NOTHING)
            message = "without a power law there is no best size to name at other compute."
            verdicts.append(Verdict("no_power_law", "refuse", "decision", budget_name(float(C)), message))
        decisions.append(entry)
        verdicts += extrapolation(float(C), dearest)
    return decisions, verdicts
