"""The compute-optimal frontier as two straight lines in logs: ln N* and ln D* against ln C, with bootstrap copies.

Approaches 1 and 2 of Hoffmann et al. 2022 (arXiv 2203.15556) find optima in different ways and end here. What it
guards against: a line through two points has no error of its own, and a line through minima that scatter more than
their noise explains looks more certain than it is. The first is refused, the second stretched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.special import fdtrc

from analysis.allocation import Counter, interpolated_counter
from analysis.uncertainty import Noise, interval
from analysis.verdicts import NAN, NOTHING, Budget, Estimate, Interval, Scope, Verdict, budget_name, extrapolation
from sweeps.units import plural

LINE_PARAMS = ("N_exponent", "N_coefficient", "D_exponent", "D_coefficient")


@dataclass(frozen=True, kw_only=True)
class Line:
    """ln N* and ln D* as straight lines in ln C about `pivot`: (level, exponent) of the point estimate and of copies.

    params: N_exponent, N_coefficient (parameters), D_exponent, D_coefficient (tokens) of y = coefficient C^exponent.
    draws: the same for the bootstrap copies, arrays (resamples,). stretch: how far the copies were widened.
    """

    pivot: float = NAN
    point: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    copies: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    params: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(LINE_PARAMS, NAN))
    draws: Mapping[str, np.ndarray] = field(default_factory=dict)
    stretch: float = NAN

    def intervals(self, level: float) -> dict[str, Interval]:
        """Percentile intervals of the parameters; open where there are no copies."""
        return {k: interval(self.draws[k], level) if k in self.draws else (NAN, NAN) for k in self.params}


NO_LINE = Line()


def flop_counter(rows: pd.DataFrame) -> Counter:
    """Training FLOPs per token as a function of N, read off the columns N, D and C of runs."""
    return interpolated_counter(rows["N"], rows["C"] / rows["D"])


def fit_lines(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Level at x = 0 and slope of weighted lines through y (copies, points), both (copies,).

    NaN points are left out of their copy; a copy with fewer than two points left has a NaN slope.
    """
    w = np.where(np.isnan(y), 0.0, weights)
    filled = np.where(np.isnan(y), 0.0, y)
    total = w.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        x_mean, y_mean = w @ x / total, (w * filled).sum(axis=1) / total
        away = x - x_mean[:, None]
        slope = (w * away * filled).sum(axis=1) / (w * away**2).sum(axis=1)
        slope = np.where((w > 0).sum(axis=1) >= 2, slope, NAN)
    return y_mean - slope * x_mean, slope


def make_line(
    pivot: float,
    point: Mapping[str, tuple[float, float]],
    copies: Mapping[str, tuple[np.ndarray, np.ndarray]],
    stretch: float = 1.0,
) -> Line:
    """A Line from (level at ln C = pivot, exponent) of "N" and "D", and of their copies, which may be missing."""
    params: dict[str, float] = {}
    draws: dict[str, np.ndarray] = {}
    for v, (height, exponent) in point.items():
        params |= {f"{v}_exponent": exponent, f"{v}_coefficient": float(np.exp(height - exponent * pivot))}
    for v, (heights, exponents) in copies.items():
        with np.errstate(over="ignore"):  # a wild copy may have an infinite coefficient
            draws |= {f"{v}_exponent": exponents, f"{v}_coefficient": np.exp(heights - exponents * pivot)}
    return Line(pivot=pivot, point=point, copies=copies, params=params, draws=draws, stretch=stretch)


def line_through_minima(
    budgets: Sequence[Budget], copies: Sequence[Mapping[str, np.ndarray]], noise: Noise, *, weighted: bool = True
) -> tuple[Line, list[Verdict]]:
    """The weighted lines through the minima of accepted budgets.

    copies: for each budget the noisy copies of its minimum, "N" and "D" (ln, (resamples,), NaN outside the grid), its
    "weight" and the "variance" of ln N* that noise explains.
    """
    if len(budgets) < 3:
        message = (
            f"{plural(len(budgets), 'budget')} with a usable minimum; a power law needs 3, because through two points "
            "any line passes. Add budgets, or mend the refused ones."
        )
        # With a minimum or two the budgets still say something; without any, no number of the fit stands.
        scope: Scope = "parameter" if budgets else "fit"
        return NO_LINE, [Verdict("too_few_budgets", "refuse", scope, None, message)]
    x = np.log([b.C for b in budgets])
    weights = np.array([float(c["weight"]) for c in copies]) if weighted else np.ones(len(x))
    pivot = float((weights * x).sum() / weights.sum())
    values = {"N": np.log([b.N.value for b in budgets]), "D": np.log([b.D.value for b in budgets])}
    fitted = {v: fit_lines(x - pivot, y[None, :], weights) for v, y in values.items()}
    point = {v: (float(p[0][0]), float(p[1][0])) for v, p in fitted.items()}

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
    lines = {}
    if noise.sd > 0:
        for v in values:
            level, slope = fit_lines(x - pivot, np.stack([c[v] for c in copies], axis=1), weights)
            lines[v] = (point[v][0] + stretch * (level - point[v][0]), point[v][1] + stretch * (slope - point[v][1]))
    return make_line(pivot, point, lines, stretch), verdicts


def line_targets(
    line: Line, targets: Sequence[float], cheapest: float, dearest: float, level: float = 0.95, what: str = "run"
) -> tuple[list[dict[str, object]], list[Verdict]]:
    """N*, D* and D*/N* at each compute (FLOPs) asked for, with the factor by which it lies beyond `dearest`.

    what: that was dearest and cheapest.
    """
    decisions: list[dict[str, object]] = []
    verdicts: list[Verdict] = []
    for C in targets:
        entry: dict[str, object] = {"C": float(C), "extrapolation": float(C) / dearest}
        if line.point:
            away = np.log(C) - line.pivot
            N, D = (line.point[v][0] + line.point[v][1] * away for v in ("N", "D"))
            empty = np.array([]), np.array([])
            Ns, Ds = (h + slope * away for h, slope in (line.copies.get(v, empty) for v in ("N", "D")))
            for name, value, draws in (("N", N, Ns), ("D", D, Ds), ("tokens_per_parameter", D - N, Ds - Ns)):
                low, high = np.exp(interval(draws, level))
                entry[name] = Estimate(value=float(np.exp(value)), interval=(float(low), float(high)))
        else:
            entry |= dict.fromkeys(("N", "D", "tokens_per_parameter"), NOTHING)
            message = "without a power law there is no best size to name at other compute."
            verdicts.append(Verdict("no_power_law", "refuse", "decision", budget_name(float(C)), message))
        decisions.append(entry)
        verdicts += extrapolation(float(C), dearest, cheapest, what)
    return decisions, verdicts
