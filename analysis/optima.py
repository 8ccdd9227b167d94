"""The best learning rate, or the best rate and batch, of one group of runs: the vertex of a quadratic in their logs.

ln loss is fitted by least squares near its lowest point, without the runs that the rest of the curve contradicts
(`analysis.quadratics`). The interval comes from noisy copies, which are linear in the noise, so a thousand of them are
one matrix product.

What it guards against: an optimum at the edge of what was tried, or of a curve that noise turns over, is no optimum. It
is refused, with the reason and the remedy; a bad run that was taken out is named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.quadratics import Surface, lowest_point, skewed, surface_of, take_out_bad_runs
from analysis.swept import Group
from analysis.uncertainty import Noise, interval, judge_noise, noise_by_scale
from analysis.verdicts import NAN, NOTHING, OPEN, Estimate, Interval, Verdict, clean, refused
from sweeps.units import plural

HEIGHT = 0.01
"""Settings whose ln loss is at most this above the lowest are fitted, whatever their number. On Step Law's grids the
vertex of 1% costs .09% of the loss over the cell's best run, that of 2% .15%: the valley is no quadratic."""
NOISES = 4.0
"""... or at most so many standard deviations of one run between seeds, where those are more."""


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
    settings that are fitted, checked against the scatter about the quadratics (`uncertainty.judge_noise`), and pooled
    with it.
    """
    seeds = Noise(sd=noise, freedom=np.inf, source="given") if noise is not None else _between_seeds(groups)
    reach = max(HEIGHT, NOISES * seeds.sd) if seeds else HEIGHT
    surfaces = [surface_of(group, axes, reach) for group in groups]
    take_out_bad_runs([s for s in surfaces if s is not None])
    scatter = [s.scatter() for s in surfaces if s is not None and s.fits]
    freedom = float(sum(free for _, free in scatter))
    residual = float(np.sqrt(sum(squares for squares, _ in scatter) / freedom)) if freedom > 0 else NAN
    judged, said = judge_noise(seeds, residual, freedom)
    drawn = judged.pooled(residual, freedom)
    own, uneven = _by_size(groups, surfaces, drawn)
    said += uneven
    said += skewed([s for s in surfaces if s is not None and s.fits]) if len(axes) == 1 else []
    generator = np.random.default_rng(seed)
    draws = {one: one.draw(generator, resamples) if one.sd >= 0 else np.empty(0) for one in dict.fromkeys(own)}
    found = [
        _optimum(group, tuple(axes), surface, draws[one], generator, eps, level)
        for group, surface, one in zip(groups, surfaces, own)
    ]
    return found, drawn, said if scatter else []


def _between_seeds(groups: Sequence[Group]) -> Noise | None:
    """Pooled over the groups; None where no setting near a group's best has two seeds."""
    squares, freedom, many = map(sum, zip(*map(_replicates, groups))) if groups else (0.0, 0, 0)
    return (
        Noise(sd=float(np.sqrt(squares / freedom)), freedom=freedom, source="seeds", groups=many) if freedom else None
    )


def _replicates(group: Group) -> tuple[float, int, int]:
    """Squares about the means over seeds, their degrees of freedom, and the number of settings: of those within a tenth
    of the group's lowest, since rates near the edge of stability are noisier."""
    count, loss = group.columns["count"], group.columns["loss"]
    near = (count > 1) & (loss <= 1.1 * np.min(loss[count > 0], initial=np.inf))
    return float(group.columns["squares"][near].sum()), int((count[near] - 1).sum()), int(near.sum())


def _by_size(
    groups: Sequence[Group], surfaces: Sequence[Surface | None], drawn: Noise
) -> tuple[list[Noise], list[Verdict]]:
    """The noise of each group's copies, by its N D, which compute goes by."""
    parts = np.zeros((len(groups), 2))
    for i, (group, surface) in enumerate(zip(groups, surfaces)):
        parts[i] = surface.scatter() if surface is not None and surface.fits else (0.0, 0.0)
        if drawn.source == "seeds":
            parts[i] += _replicates(group)[:2]
    size = np.array([float(group.key["N"]) * float(group.key["D"]) for group in groups])
    return noise_by_scale(size, parts[:, 0], parts[:, 1], drawn)


# --- one group ---------------------------------------------------------------------------------------------------


def _optimum(
    group: Group,
    axes: tuple[str, ...],
    surface: Surface | None,
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
    vertex, hessian, lowest, convex = lowest_point(surface.curve, len(axes))
    drawn, _, lows, rises = lowest_point(copies, len(axes))
    low, high = surface.x.min(axis=0), surface.x.max(axis=0)
    # a copy that is no valley is lowest at an end of the grid: at that to which it falls
    fall = np.where(copies[:, 1 : 1 + len(axes)] < 0, np.inf, -np.inf)
    drawn = np.clip(np.where(rises[:, None], drawn + surface.center, fall), 2 * low - high, 2 * high - low)
    inside = ((drawn >= low) & (drawn <= high)).all(axis=1)
    verdicts = _judge(group, axes, surface, vertex + surface.center, bool(convex), inside)
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
        lost = f"; in {flat:.0%} of the noisy copies the curve is no valley at all" if flat >= 0.005 else ""
        message = (
            f"{group.name}: the interval of the optimum reaches beyond the grid{lost}. Add seeds, or rates further out."
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
    surface: Surface,
    vertex: np.ndarray,
    convex: bool,
    inside: np.ndarray,
) -> list[Verdict]:
    """What the quadratic of one group can bear."""
    name, said = group.name, []
    if surface.bad:
        told = [group.points.iloc[int(surface.position[i])] for i in surface.bad]
        listed = ", ".join(f"rate {p['learning_rate']:.4g} (loss {p['loss']:.4g})" for p in told[:4])
        but = ", though counted in the sensitivity" if "learning_rate" in axes else ""
        off = f"{plural(len(told), 'setting')} off the curve of the others not fitted{but}"
        message = f"{name}: {off}: {listed}. Repeat it."
        said.append(Verdict("bad_run", "caution", "fit", name, message, {"settings": len(told)}))
    if np.ptp(surface.y) < 1e-12:
        message = (
            f"{name}: all {len(surface.y)} settings have the same loss ({np.exp(surface.y[0]):.4g}), so none is best. "
            "Look at what the loss was read from, or spread the settings wider."
        )
        return [*said, Verdict("flat_losses", "refuse", "fit", name, message)]
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
        evidence = {"axis": axis, "edge": edge, "side": "largest" if at_high else "smallest"}
        lost = group.points[group.points["count"] == 0]
        beyond = lost.loc[lost["learning_rate"] > edge, "learning_rate"] if axis == "learning_rate" else lost.iloc[:0]
        if at_high and len(axes) == 1 and len(beyond):
            message = (
                f"{name}: the loss is lowest at the largest {word} that did not diverge ({edge:.4g}; at "
                f"{beyond.min():.4g} it did): the optimum lies at the edge of stability. Train at rates between, or "
                "with more warm-up."
            )
            said.append(Verdict("edge_of_stability", "refuse", "fit", name, message, evidence))
            return said
        side, further = ("largest", "higher") if at_high else ("smallest", "lower")
        reach = edge * (2.0 if at_high else 0.5)
        message = (
            f"{name}: the loss falls towards the {side} {word} tried ({edge:.4g}), so its lowest point is not inside "
            f"the grid. Train at {further} {_MANY[axis]}, such as {reach:.3g}."
        )
        said.append(Verdict("edge_minimum", "refuse", "fit", name, message, evidence))
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
