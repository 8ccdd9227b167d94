"""The best learning rate, or the best rate and batch, of one group of runs: the vertex of a quadratic in their logs.

ln loss is fitted by least squares near its lowest point, and runs that the rest of the curve contradicts are taken out
before the vertex is read. The interval comes from noisy copies, which are linear in the noise, so a thousand of them
are one matrix product.

What it guards against: an optimum at the edge of what was tried is no optimum, and a single bad run moves a vertex as
far as it likes. Both are refused or taken out, with the reason and the remedy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from analysis.swept import Group
from analysis.uncertainty import Noise, interval, judge_noise
from analysis.verdicts import NAN, NOTHING, OPEN, Estimate, Interval, Verdict, clean, plural, refused

HEIGHT = 0.01
"""Settings whose ln loss is at most this above the lowest are fitted, whatever their number. On Step Law's grids the
vertex of 1 % costs .09 % of the loss over the cell's best run, that of 2 % .15 %: the valley is no quadratic."""
NOISES = 4.0
"""... or at most so many standard deviations of one run between seeds, where those are more."""
ENOUGH = {1: 5, 2: 12}
"""By the number of axes: settings that are fitted in any case where there are so many (twice the coefficients in 2)."""
DOUBT = 0.01
"""Chance, over all settings of an analysis, that a good run is taken out for a bad one."""


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The optimum of one group, or the refusal to name one.

    group: what is equal in it: N, D, and family, parametrisation, batch_tokens ... where they are known.
    best: axis -> optimum (learning_rate without unit, batch_tokens in tokens). loss: there, nats.
    plateau: axis -> where the fitted loss is within `eps` of the best (of two axes: with the other at its best for
        it); a bound beyond what was tried is NaN. curvature: d^2 ln loss / d ln(learning rate)^2, the first entry of
        the hessian over the axes.
    sensitivity: Wortsman et al. 2023 (arXiv 2309.14322), nats; see `analysis.sensitivities`.
    points: learning_rate, batch_tokens, loss (mean over seeds), count, diverged, fitted.
    draws: axis -> ln optimum under noise (resamples,); those beyond the grid stand one span outside it.
    """

    group: Mapping[str, Any]
    name: str
    axes: tuple[str, ...]
    points: pd.DataFrame
    verdicts: tuple[Verdict, ...]
    best: Mapping[str, Estimate] = field(default_factory=dict)
    loss: Estimate = NOTHING
    plateau: Mapping[str, Interval] = field(default_factory=dict)
    curvature: float = NAN
    hessian: np.ndarray | None = field(default=None, repr=False, compare=False)
    sensitivity: Estimate = NOTHING
    draws: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def refused(self) -> bool:
        """Whether there is no optimum to name; then best, plateau and curvature are NaN."""
        return refused(self.verdicts)

    def bend(self, axis: str) -> float:
        """d^2 ln loss / d ln(axis)^2 with the other axis at its best for each value; NaN where there is no optimum."""
        if self.hessian is None:
            return NAN
        j = self.axes.index(axis)
        return float(1.0 / np.linalg.inv(self.hessian)[j, j])

    def to_json(self) -> dict[str, Any]:
        """As JSON values; NaN is null."""
        return dict(
            clean(
                {
                    "group": dict(self.group),
                    "name": self.name,
                    "axes": list(self.axes),
                    "refused": self.refused,
                    "best": dict(self.best),
                    "loss": self.loss,
                    "plateau": {k: list(v) for k, v in self.plateau.items()},
                    "curvature": self.curvature,
                    "bends": {axis: self.bend(axis) for axis in self.axes},
                    "sensitivity": self.sensitivity,
                    "points": self.points.to_dict("records"),
                    "verdicts": list(self.verdicts),
                }
            )
        )


def find_optima(
    groups: Sequence[Group],
    axes: Sequence[str],
    *,
    eps: float = 0.01,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    noise: float | None = None,
) -> tuple[list[Optimum], Noise, list[Verdict]]:
    """The optimum of each group, the noise of one run's ln loss behind the intervals, and what is said of the noise.

    noise: standard deviation of ln loss between equal runs; by default it is measured between seeds, pooled over the
    settings that are fitted, and checked against the scatter about the quadratics (`uncertainty.judge_noise`).
    """
    seeds = Noise(sd=noise, freedom=np.inf, source="given") if noise is not None else _between_seeds(groups)
    reach = max(HEIGHT, NOISES * seeds.sd) if seeds else HEIGHT
    surfaces = [_surface(group, axes, reach) for group in groups]
    _take_out_bad_runs([s for s in surfaces if s is not None])
    scatter = [s.scatter() for s in surfaces if s is not None and s.fits]
    freedom = float(sum(free for _, free in scatter))
    residual = float(np.sqrt(sum(squares for squares, _ in scatter) / freedom)) if freedom > 0 else NAN
    judged, said = judge_noise(seeds, residual, freedom)
    said += _skew([s for s in surfaces if s is not None and s.fits]) if len(axes) == 1 else []
    generator = np.random.default_rng(seed)
    scales = judged.draw(generator, resamples) if judged.sd >= 0 else np.empty(0)
    found = [
        _optimum(group, tuple(axes), surface, scales, generator, eps, level) for group, surface in zip(groups, surfaces)
    ]
    return found, judged, said if scatter else []


# --- the quadratic -----------------------------------------------------------------------------------------------


def _design(x: np.ndarray) -> np.ndarray:
    """Columns 1, x_j, x_j^2 / 2 and, of two axes, x_1 x_2; x is (n, axes), centred."""
    columns = [np.ones(len(x)), *x.T, *(x.T**2 / 2.0)]
    return np.column_stack([*columns, x[:, 0] * x[:, 1]] if x.shape[1] == 2 else columns)


def _vertex(curve: np.ndarray, axes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of quadratics (..., k): vertex (..., axes), Hessian (..., axes, axes), lowest value and whether it is one."""
    slope, bend = curve[..., 1 : 1 + axes], curve[..., 1 + axes : 1 + 2 * axes]
    hessian = np.zeros((*curve.shape[:-1], axes, axes))
    for j in range(axes):
        hessian[..., j, j] = bend[..., j]
    if axes == 2:
        hessian[..., 0, 1] = hessian[..., 1, 0] = curve[..., 5]
    convex = np.asarray((np.linalg.eigvalsh(hessian) > 0).all(axis=-1))
    safe = np.where(convex[..., None, None], hessian, np.eye(axes))
    vertex = -np.linalg.solve(safe, slope[..., None])[..., 0]
    lowest = np.asarray(curve[..., 0] + 0.5 * (slope * vertex).sum(axis=-1))
    return vertex, hessian, lowest, convex


@dataclass
class _Surface:
    """The settings of a group that have a loss, and which of them are fitted. x: ln of the axes, (n, axes)."""

    x: np.ndarray
    y: np.ndarray
    count: np.ndarray
    used: np.ndarray
    position: np.ndarray
    bad: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.solve_again()

    def solve_again(self) -> None:
        self.center = self.x[self.used].mean(axis=0)
        design = _design(self.x[self.used] - self.center)
        root = np.sqrt(self.count[self.used])
        self.fits = np.linalg.matrix_rank(design) == design.shape[1]
        self.solve = np.linalg.pinv(design * root[:, None]) * root
        self.curve = self.solve @ self.y[self.used]
        self.misses = (self.y[self.used] - design @ self.curve) * root
        self.leverage = np.einsum("nk,kn->n", design, self.solve)

    def scatter(self) -> tuple[float, int]:
        """Sum of squared residuals of one run's ln loss, and its degrees of freedom."""
        return float((self.misses**2).sum()), len(self.misses) - len(self.curve)


def _surface(group: Group, axes: Sequence[str], reach: float) -> _Surface | None:
    """None where nothing has a loss, or the settings cannot carry a quadratic."""
    count = group.columns["count"]
    usable = (count > 0) & (group.columns["diverged"] <= count)
    x = np.log(np.stack([group.columns[axis][usable] for axis in axes], axis=1))
    y = np.log(group.columns["loss"][usable])
    if not len(y) or any(len(np.unique(column)) < 3 for column in x.T):
        return None
    used = _beside_lowest(x[:, 0], y, reach) if len(axes) == 1 else _lowest(x, y, reach)
    return _Surface(x, y, count[usable].astype(float), used, np.flatnonzero(usable))


def _beside_lowest(x: np.ndarray, y: np.ndarray, reach: float) -> np.ndarray:
    """The lowest setting, its neighbours, and on from there to the lower side, up to `reach` or until there are enough.

    Without a gap, so that a lucky run beyond a wall of bad ones does not count.
    """
    order = np.argsort(x)
    low = high = int(np.argmin(y[order]))
    low, high = max(low - 1, 0), min(high + 1, len(order) - 1)
    height = y[order] - y.min()
    while low > 0 or high < len(order) - 1:
        left = height[low - 1] if low > 0 else np.inf
        right = height[high + 1] if high < len(order) - 1 else np.inf
        if min(left, right) > reach and high - low + 1 >= ENOUGH[1]:
            break
        low, high = (low - 1, high) if left <= right else (low, high + 1)
    return np.sort(order[low : high + 1])


def _lowest(x: np.ndarray, y: np.ndarray, reach: float) -> np.ndarray:
    """The lowest settings, up to `reach` or until there are enough, on three levels of each axis."""
    order = np.argsort(y)
    size = max(int((y - y.min() <= reach).sum()), min(ENOUGH[2], len(y)))
    while size < len(y) and any(len(np.unique(column)) < 3 for column in x[order[:size]].T):
        size += 1
    return np.sort(order[:size])


def _take_out_bad_runs(surfaces: Sequence[_Surface]) -> None:
    """Take out, one after another, settings that the others contradict: at most one of a group's ten.

    By residuals studentised without the setting itself and pooled over the groups (Cook & Weisberg 1982): a bad run at
    the end of a curve pulls it to itself, so that its plain residual is small, and weights by residual (Huber's) do
    not see it. Groups keep a degree of freedom more than the quadratic needs.
    """
    while True:
        able = [s for s in surfaces if s.fits]
        squares, freedom = (sum(part) for part in zip(*(s.scatter() for s in able))) if able else (0.0, 0)
        total = sum(len(s.misses) for s in able)
        if freedom < 3 or squares <= 1e-20:
            return
        bound = float(stdtrit(freedom - 1, 1.0 - DOUBT / (2.0 * total)))
        worst: tuple[float, _Surface, int] | None = None
        for s in able:
            most = max(1, (len(s.used) + len(s.bad)) // 10)
            if s.scatter()[1] < 2 or len(s.bad) >= most:
                continue
            own = s.misses**2 / np.maximum(1.0 - s.leverage, 1e-9)
            rest = np.maximum(squares - own, 1e-300) / (freedom - 1)
            scores = np.where(s.leverage < 1 - 1e-6, np.sqrt(own / rest), 0.0)
            at = int(scores.argmax())
            if scores[at] > bound and (worst is None or scores[at] > worst[0]):
                worst = float(scores[at]), s, at
        if worst is None:
            return
        _, s, at = worst
        s.bad.append(int(s.used[at]))
        s.used = np.delete(s.used, at)
        s.solve_again()


def _skew(surfaces: Sequence[_Surface]) -> list[Verdict]:
    """A caution where the valleys are steeper on one side, in all groups alike: by how much their vertices are off.

    The cubic term that all groups share, by regression of what the quadratics leave on what they leave of x^3 (t test
    at .1 %), and what it does to the vertices to first order.
    """
    across, own, squares, freedom, shifts = 0.0, 0.0, 0.0, -1, []
    for s in surfaces:
        x = (s.x[s.used] - s.center)[:, 0]
        taken = s.solve @ x**3
        left = (x**3 - _design(x[:, None]) @ taken) * np.sqrt(s.count[s.used])
        across, own = across + float(left @ s.misses), own + float(left @ left)
        squares, freedom = squares + s.scatter()[0], freedom + s.scatter()[1]
        if s.curve[2] > 0:
            at = -s.curve[1] / s.curve[2]
            shifts.append((taken[1] + taken[2] * at - 3.0 * at**2) / s.curve[2])
    if freedom < 1 or not own > 1e-12 or not shifts:
        return []
    skew, rest = across / own, max(squares - across**2 / own, 1e-20) / freedom
    if abs(skew) <= float(stdtrit(freedom, 0.9995)) * np.sqrt(rest / own):
        return []
    shift = skew * float(np.median(shifts))
    side = "above" if skew > 0 else "below"
    message = (
        f"the loss rises faster {side} the optimum than on the other side, in all groups alike: the lowest points lie "
        f"about {np.expm1(abs(shift)):.0%} {'above' if shift > 0 else 'below'} the vertices named, and the intervals "
        "do not know it. Ratios between groups and powers hardly feel it; a finer grid of rates narrows it."
    )
    return [Verdict("skewed_valley", "caution", "fit", None, message, {"cubic": skew, "ln_shift": shift})]


def _between_seeds(groups: Sequence[Group]) -> Noise | None:
    """Pooled over the settings within a tenth of each group's lowest: rates near the edge of stability are noisier."""
    squares, freedom, many = 0.0, 0, 0
    for group in groups:
        count, loss = group.columns["count"], group.columns["loss"]
        near = (count > 1) & (loss <= 1.1 * np.min(loss[count > 0], initial=np.inf))
        squares += float(group.columns["squares"][near].sum())
        freedom += int((count[near] - 1).sum())
        many += int(near.sum())
    return (
        Noise(sd=float(np.sqrt(squares / freedom)), freedom=freedom, source="seeds", groups=many) if freedom else None
    )


# --- one group ---------------------------------------------------------------------------------------------------


def _optimum(
    group: Group,
    axes: tuple[str, ...],
    surface: _Surface | None,
    scales: np.ndarray,
    generator: np.random.Generator,
    eps: float,
    level: float,
) -> Optimum:
    shown = {k: group.columns[k] for k in ("learning_rate", "batch_tokens", "loss", "count", "diverged")}
    fitted = np.zeros(len(shown["loss"]), dtype=bool)
    if surface is not None and surface.fits:
        fitted[surface.position[surface.used]] = True
    points = pd.DataFrame(shown | {"fitted": fitted})
    if surface is None or not surface.fits:
        said = _cannot(group, axes)
        return Optimum(group=group.key, name=group.name, axes=axes, points=points, verdicts=(said,))
    errors = generator.standard_normal((len(scales), len(surface.used))) / np.sqrt(surface.count[surface.used])
    copies = surface.curve + (errors * scales[:, None]) @ surface.solve.T
    vertex, hessian, lowest, convex = _vertex(surface.curve, len(axes))
    drawn, _, lows, rises = _vertex(copies, len(axes))
    low, high = surface.x.min(axis=0), surface.x.max(axis=0)
    seen = surface.x[surface.used].min(axis=0), surface.x[surface.used].max(axis=0)
    # a copy that is no valley is lowest at an end of the grid: at that to which it falls
    fall = np.where(copies[:, 1 : 1 + len(axes)] < 0, np.inf, -np.inf)
    drawn = np.clip(np.where(rises[:, None], drawn + surface.center, fall), 2 * low - high, 2 * high - low)
    inside = ((drawn >= low) & (drawn <= high)).all(axis=1)
    verdicts = _judge(group, axes, surface, vertex + surface.center, bool(convex), seen, inside)
    if refused(verdicts):
        return Optimum(group=group.key, name=group.name, axes=axes, points=points, verdicts=tuple(verdicts))
    best = vertex + surface.center
    spread = np.sqrt(2.0 * np.log1p(eps) * np.diag(np.linalg.inv(hessian)))
    bests, plateau = {}, {}
    for j, axis in enumerate(axes):
        bests[axis] = Estimate(
            value=float(np.exp(best[j])), interval=_within(interval(drawn[:, j], level), low[j], high[j])
        )
        plateau[axis] = _within((float(best[j] - spread[j]), float(best[j] + spread[j])), low[j], high[j])
    if len(drawn) and any(not np.isfinite(one.interval).all() for one in bests.values()):
        flat = 1.0 - float(rises.mean())
        message = (
            f"{group.name}: the interval of the optimum reaches beyond the grid; in {flat:.0%} of the noisy copies the "
            "curve is no valley at all. Add seeds, or rates further out."
        )
        verdicts.append(Verdict("open_interval", "caution", "fit", group.name, message, {"flat": flat}))
    bottom = interval(lows[rises], level)
    return Optimum(
        group=group.key,
        name=group.name,
        axes=axes,
        points=points,
        verdicts=tuple(verdicts),
        best=bests,
        loss=Estimate(value=float(np.exp(lowest)), interval=(float(np.exp(bottom[0])), float(np.exp(bottom[1])))),
        plateau=plateau,
        curvature=float(hessian[0, 0]),
        hessian=hessian,
        draws={axis: drawn[:, j] for j, axis in enumerate(axes)},
    )


def _within(bounds: Interval, low: float, high: float) -> Interval:
    """Bounds in ln as numbers; one outside what was tried is open."""
    first, last = (float(np.exp(b)) if low - 1e-9 <= b <= high + 1e-9 else NAN for b in bounds)
    return (first, last) if np.isfinite(bounds).all() else OPEN


_WORDS = {"learning_rate": "rate", "batch_tokens": "batch"}
_MANY = {"learning_rate": "rates", "batch_tokens": "batches"}


def _cannot(group: Group, axes: tuple[str, ...]) -> Verdict:
    """Why there is no quadratic at all."""
    points, name = group.points, group.name
    usable = points[points["count"] > 0]
    if usable.empty:
        message = f"{name}: all {plural(int(points['diverged'].sum()), 'run')} diverged. Train at lower learning rates."
        return Verdict("all_diverged", "refuse", "fit", name, message)
    counts = {axis: usable[axis].nunique() for axis in axes}
    few, count = min(counts.items(), key=lambda pair: pair[1])
    tried = ", ".join(f"{v:.4g}" for v in sorted(usable[few].unique()))
    lost = int((points["count"] == 0).sum())
    least = "3 of each axis and 7 settings" if len(axes) == 2 else "3, better 5"
    message = (
        f"{name}: {plural(count, f'learning {_WORDS[few]}' if few == 'learning_rate' else 'batch size')} with a loss "
        f"({tried}){f', {lost} more diverged' if lost else ''}; a quadratic needs {least}. Train more beside the best."
    )
    return Verdict("too_few_points", "refuse", "fit", name, message, {"levels": counts, "settings": len(usable)})


def _judge(
    group: Group,
    axes: tuple[str, ...],
    surface: _Surface,
    vertex: np.ndarray,
    convex: bool,
    seen: tuple[np.ndarray, np.ndarray],
    inside: np.ndarray,
) -> list[Verdict]:
    """What the quadratic of one group can bear."""
    name, said = group.name, []
    if surface.bad:
        told = [group.points.iloc[int(surface.position[i])] for i in surface.bad]
        listed = ", ".join(f"rate {p['learning_rate']:.4g} (loss {p['loss']:.4g})" for p in told[:4])
        message = f"{name}: {plural(len(told), 'setting')} off the curve of the others not fitted: {listed}. Repeat it."
        said.append(Verdict("bad_run", "caution", "fit", name, message, {"settings": len(told)}))
    kept = surface.used
    lowest = kept[int(np.argmin(surface.y[kept]))]
    for j, axis in enumerate(axes):
        column, word = surface.x[:, j], _WORDS[axis]
        # of two axes the lowest of many near-equal settings may stand at an edge by chance: there the vertex decides
        at_low = (convex and vertex[j] <= column.min()) or (len(axes) == 1 and column[lowest] <= column.min() + 1e-9)
        at_high = (convex and vertex[j] >= column.max()) or (len(axes) == 1 and column[lowest] >= column.max() - 1e-9)
        if not (at_low or at_high):
            continue
        edge = float(np.exp(column.max() if at_high else column.min()))
        lost = group.points[group.points["count"] == 0]
        beyond = lost.loc[lost["learning_rate"] > edge, "learning_rate"] if axis == "learning_rate" else lost.iloc[:0]
        if at_high and len(axes) == 1 and len(beyond):
            message = (
                f"{name}: the loss is lowest at the largest {word} that did not diverge ({edge:.4g}; at "
                f"{beyond.min():.4g} it did): the optimum lies at the edge of stability. Train at rates between, or "
                "with more warm-up."
            )
            said.append(Verdict("edge_of_stability", "refuse", "fit", name, message, {"edge": edge}))
            return said
        side, further = ("largest", "higher") if at_high else ("smallest", "lower")
        reach = edge * (2.0 if at_high else 0.5)
        message = (
            f"{name}: the loss falls towards the {side} {word} tried ({edge:.4g}), so its lowest point is not inside "
            f"the grid. Train at {further} {_MANY[axis]}, such as {reach:.3g}."
        )
        said.append(Verdict("edge_minimum", "refuse", "fit", name, message, {"axis": axis, "edge": edge}))
        return said
    if not convex:
        message = (
            f"{name}: the curve through {len(kept)} settings does not rise to both sides, so it has no lowest point. "
            "Spread the rates wider, or add seeds."
        )
        said.append(Verdict("no_minimum", "refuse", "fit", name, message))
    elif len(inside) and inside.mean() < 0.5:
        message = (
            f"{name}: within the noise the optimum lies outside the grid more often than not. Add seeds, or rates."
        )
        said.append(
            Verdict(
                "unstable_minimum",
                "refuse",
                "fit",
                name,
                message,
                {"inside": float(inside.mean()) if len(inside) else NAN},
            )
        )
    elif surface.scatter()[1] == 0:
        message = (
            f"{name}: the quadratic passes through its {len(kept)} settings exactly; only seeds can contradict it."
        )
        said.append(Verdict("no_residual_freedom", "caution", "fit", name, message))
    return said
