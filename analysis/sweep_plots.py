"""Pictures of sweeps: loss against learning rate, the heat map of rate and batch, and how the optimum moves.

Every function returns a matplotlib Figure of its own. What is refused has no mark; runs that diverged stand on the
upper edge, so that a curve that ends is not taken for one that was not tried.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.audits import Audit
from analysis.optima import Optimum
from analysis.optimum_laws import OptimumLaw, by_law
from analysis.sensitivities import Sensitivity
from analysis.style import (
    BAND,
    COLOURS,
    GREY,
    INK,
    NAMES,
    ORANGE,
    WIDTH,
    closed,
    dress,
    figure,
    human_ticks,
    kind,
    log_norm,
    log_ticks,
    plain,
    size_bar,
)
from sweeps.units import human

AXES = {"learning_rate": "learning rate", "batch_tokens": "batch (tokens)", "weight_decay": "weight decay"}
BATCH = "batch_tokens"
HIGH = 0.35
"""Losses so much above the lowest of a panel, in ln, are off the picture: what matters is the bottom of the fan."""
MOST = 8
"""Panels of a picture."""


def fans(optima: Iterable[Optimum]) -> Figure:
    """Loss against learning rate: a curve per size and a panel per token count, or the other way round where that takes
    fewer panels; each optimum with its 95% interval. Of more than `MOST` panels the dearest, which says so."""
    known = [one for one in optima if "learning_rate" in one.axes]
    counts = {name: len({one.group[name] for one in known}) for name in ("D", "N")}
    panel, curve = ("D", "N") if counts["D"] <= counts["N"] else ("N", "D")
    panels: dict[tuple[str, ...], list[Optimum]] = {}
    for one in sorted(known, key=lambda one: one.group[panel]):
        panels.setdefault(_panel(one, curve), []).append(one)
    shown = list(panels.values())[-MOST:]
    picture, every = _grid(max(1, len(shown)))
    levels = sorted({one.group[curve] for group in shown for one in group})
    norm = log_norm(levels or [1.0])
    for axes, group in zip(every, shown):
        _fan(axes, group, curve, norm)
        axes.set_title(_title(group[0], panel, [one for other in shown for one in other]), fontsize=9)
    if len(panels) > MOST:
        picture.suptitle(f"the {MOST} dearest of {len(panels)} panels", fontsize=9)
    picture.supxlabel(AXES["learning_rate"], fontsize=10)
    picture.supylabel("final loss (nats per token)", fontsize=10)
    if len(levels) > 1:
        size_bar(picture, every if len(shown) > 1 else every[0], norm, levels, curve)
    return picture


def heat_map(optimum: Optimum) -> Figure:
    """Excess of the loss over the fitted lowest, in percent, at each learning rate and batch that was tried; with the
    optimum, its interval and the region in which the loss is within 1% of the best."""
    picture = Figure(figsize=(WIDTH * 0.78, 4.0), layout="constrained")
    axes = picture.subplots()
    dress(axes)
    axes.grid(visible=False)
    points = optimum.points
    known = points[points["loss"].notna()]
    best = optimum.loss.value if np.isfinite(optimum.loss.value) else float(known["loss"].min())
    excess = 100.0 * (known["loss"] / best - 1.0)
    norm = LogNorm(0.1, max(30.0, float(excess.max())))
    axes.scatter(
        known["learning_rate"],
        known["batch_tokens"],
        c=COLOURS(norm(np.maximum(excess, 0.1))),
        s=420 if len(points) < 60 else 120,
        marker="s",
        lw=0,
    )
    if len(points) < 60:
        for rate, batch, value in zip(known["learning_rate"], known["batch_tokens"], excess):
            axes.annotate(f"{value:.1f}", (rate, batch), ha="center", va="center", fontsize=7, color="white")
    lost = points[points["loss"].isna()]
    if len(lost):
        axes.plot(lost["learning_rate"], lost["batch_tokens"], "x", color=ORANGE, ms=7, ls="", label="diverged")
    if not optimum.refused:
        rate, batch = optimum.best["learning_rate"], optimum.best["batch_tokens"]
        for estimate, other, swap in ((rate, batch, False), (batch, rate, True)):
            low, high = closed(estimate.interval, (estimate.value, estimate.value))
            ends = ([low, high], [other.value] * 2)
            axes.plot(*(reversed(ends) if swap else ends), color=INK, lw=1.4)
        axes.plot(rate.value, batch.value, "D", color=INK, mfc="white", ms=7, ls="", label="optimum, 95%")
        axes.plot(*_region(optimum), color=INK, lw=1.0, ls="--", label="within 1% of the best")
    axes.set(xscale="log", yscale="log", xlabel=AXES["learning_rate"], ylabel=AXES["batch_tokens"])
    axes.margins(0.12)
    log_ticks(axes, "x", lambda v: f"{v:g}")
    human_ticks(axes, "y")
    bar = picture.colorbar(ScalarMappable(norm, COLOURS), ax=axes, pad=0.02)
    bar.set_label("loss above the lowest (%)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=8)
    return picture


def optimum_moves(found: Sensitivity, axis: str = "learning_rate") -> Figure:
    """The optimum against N, D and, where it varies, the batch, with its 95% intervals; and the fitted power law with
    its 95% band, the other variables at the geometric middle of their range. Of several laws each has its own colour,
    marker and dash."""
    known = [one for one in found.optima if not one.refused and axis in one.best]
    levels = {name: sorted({one.group[name] for one in known if name in one.group}) for name in ("N", "D", BATCH)}
    names = [name for name, values in levels.items() if len(values) > 1] or ["N"]
    middle = {name: float(np.sqrt(values[0] * values[-1])) for name, values in levels.items() if values}
    kinds = by_law(found.optima, axis)
    picture = Figure(figsize=(WIDTH, 3.6))
    picture.set_layout_engine("constrained", wspace=0.06)
    for axes, name in zip(np.atleast_1d(picture.subplots(1, len(names), sharey=True)), names):
        dress(axes)
        other = next((other for other in names if other != name), "D" if name == "N" else "N")
        if len(kinds) == 1:  # of one law the colours are free for the other variable
            norm = log_norm(levels[other] or [1.0])
            for level in levels[other]:
                group = sorted((one for one in known if one.group[other] == level), key=lambda one: one.group[name])
                _moves(axes, group, name, axis, (COLOURS(norm(level)), "o", ""), f"{other} = {human(level)}")
        for order, (law, members) in enumerate(kinds.items()):
            look = kind(order) if len(kinds) > 1 else (INK, "", "--")
            if len(kinds) > 1:
                _moves(axes, [one for one in members if not one.refused and axis in one.best], name, axis, look)
            if law in found.laws and not found.laws[law].refused:
                _line(axes, found.laws[law], name, middle, look)
        axes.set(xscale="log", yscale="log", xlabel=NAMES.get(name, AXES.get(name, name)))
        axes.margins(0.08)
        log_ticks(axes, "x", human, 8 if len(names) < 3 else 4)
        log_ticks(axes, "y", human if axis == BATCH else lambda v: f"{v:g}", 6)
        if len(kinds) == 1 and 1 < len(levels[other]) <= 6:
            axes.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    if len(kinds) > 1:
        _name_laws(picture, kinds)
    picture.axes[0].set_ylabel(f"best {AXES[axis]}")
    return picture


def audit_plot(found: Audit) -> Figure:
    """Each run's learning rate as a multiple of the measured best, against N, coloured by what that is estimated to
    cost; rings are runs that lose more than noise."""
    picture, axes = figure(3.8)
    cells = found.cells[np.isfinite(found.cells["ratio"].astype(float))]
    cost = np.maximum(100.0 * cells["penalty"].astype(float).fillna(0.0), 0.01)
    norm = LogNorm(0.01, max(10.0, float(cost.max())))
    axes.axhline(1.0, color=GREY, lw=1.0)
    axes.scatter(cells["N"], cells["ratio"], c=COLOURS(norm(cost)), s=26, zorder=3, lw=0)
    off = cells[cells["mistuned"]]
    axes.plot(off["N"], off["ratio"], "o", color=ORANGE, mfc="none", ms=9, mew=1.4, ls="", label="lose more than noise")
    axes.set(xscale="log", yscale="log", xlabel=NAMES["N"], ylabel="learning rate / measured best")
    human_ticks(axes)
    log_ticks(axes, "y", lambda v: f"{v:g}", 8)
    bar = picture.colorbar(ScalarMappable(norm, COLOURS), ax=axes, pad=0.02)
    bar.set_label("estimated cost (% of the loss)")
    if len(off):
        axes.legend(frameon=False, fontsize=8)
    return picture


# --- parts -------------------------------------------------------------------------------------------------------


def _panel(one: Optimum, curve: str) -> tuple[str, ...]:
    own = (curve, "width", "depth") if curve == "N" else (curve,)
    return tuple(f"{key}={value}" for key, value in sorted(one.group.items()) if key not in own)


def _title(one: Optimum, panel: str, every: Sequence[Optimum]) -> str:
    """What sets this panel apart from the others."""
    parts = [f"{human(one.group[panel])} {'tokens' if panel == 'D' else 'parameters'}"]
    for key, value in one.group.items():
        if key not in ("N", "D", "width", "depth") and len({str(other.group.get(key)) for other in every}) > 1:
            parts.append(f"{AXES.get(key, key)} {human(value)}" if isinstance(value, int | float) else str(value))
    return plain(", ".join(parts))


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """The visible panels of a picture, two beside each other."""
    columns = min(count, 2)
    rows = -(-count // columns)
    picture = Figure(figsize=(WIDTH, (3.8 if columns == 1 else 2.9) * rows), layout="constrained")
    every = list(np.atleast_1d(picture.subplots(rows, columns)).ravel())
    for axes in every[count:]:
        axes.remove()
    for axes in every[:count]:
        dress(axes)
    return picture, every[:count]


def _fan(axes: Axes, group: Sequence[Optimum], curve: str, norm: LogNorm) -> None:
    losses = pd.concat([one.points["loss"].dropna() for one in group])
    if losses.empty:
        return
    vertices = [one.loss.value for one in group if not one.refused]  # may lie below every point
    top, low = float(losses.min() * np.exp(HIGH)), float(min([losses.min(), *vertices]))
    top = min(top, float(losses.max() * 1.02))
    for one in sorted(group, key=lambda one: one.group[curve]):
        colour = COLOURS(norm(one.group[curve]))
        points = one.points.sort_values("learning_rate")
        if "batch_tokens" in one.axes:  # the best of the batches stands for a rate
            points = points.sort_values("loss").drop_duplicates("learning_rate").sort_values("learning_rate")
        known = points[points["loss"].notna()]
        axes.plot(known["learning_rate"], known["loss"], "-", color=colour, lw=0.8, alpha=0.6)
        for fitted, part in known.groupby("fitted"):
            axes.plot(part["learning_rate"], part["loss"], "o", color=colour, mfc=colour if fitted else "white", ms=4)
        lost = points[points["diverged"] > 0]
        axes.plot(lost["learning_rate"], np.full(len(lost), top), "x", color=colour, ms=6, mew=1.4)
        if not one.refused:
            best = one.best["learning_rate"]
            ends = closed(best.interval, (float(known["learning_rate"].min()), float(known["learning_rate"].max())))
            axes.plot(ends, [one.loss.value] * 2, color=INK, lw=1.4, zorder=4)
            axes.plot(best.value, one.loss.value, "D", color=INK, mfc="white", ms=5, zorder=5)
    axes.set_xscale("log")
    axes.set_ylim(low - 0.04 * (top - low), top + 0.03 * (top - low))
    log_ticks(axes, "x", lambda v: f"{v:g}", 6)


def _region(optimum: Optimum, eps: float = 0.01) -> np.ndarray:
    """The ellipse on which the fitted loss is `eps` above its lowest, (2, points)."""
    assert optimum.hessian is not None
    angle = np.linspace(0.0, 2.0 * np.pi, 200)
    root = np.linalg.cholesky(np.linalg.inv(optimum.hessian))
    around = np.sqrt(2.0 * np.log1p(eps)) * root @ np.stack([np.cos(angle), np.sin(angle)])
    center = np.log([optimum.best[axis].value for axis in optimum.axes])
    return np.asarray(np.exp(center[:, None] + around))


def _moves(
    axes: Axes, group: Sequence[Optimum], name: str, axis: str, look: tuple[Any, str, str], label: str | None = None
) -> None:
    colour, marker, _ = look
    for order, one in enumerate(group):
        best = one.best[axis]
        low, high = closed(best.interval, (best.value, best.value))
        axes.plot([one.group[name]] * 2, [low, high], color=colour, lw=1.2)
        axes.plot(one.group[name], best.value, marker, color=colour, ms=5, label=label if order == 0 else None)


def _line(axes: Axes, law: OptimumLaw, name: str, held: dict[str, float], look: tuple[str, str, str]) -> None:
    """The law along one variable, the others held, over the range that it was fitted in, with its 95% band."""
    if name not in law.powers:
        return
    colour, marker, dash = look
    grid = np.geomspace(*law.range[name], 50)
    steps = {v: np.full(len(grid), np.log(held[v] / law.at[v])) for v in law.powers if v != name}
    steps[name] = np.log(grid / law.at[name])
    path = law.value.value * np.exp(sum(law.powers[v].value * s for v, s in steps.items()))
    axes.plot(grid, path, dash, color=colour)
    if law.draws:
        paths = law.draws["ln value"][:, None] + sum(law.draws[v][:, None] * s for v, s in steps.items())
        low, high = np.nanquantile(paths, [0.025, 0.975], axis=0)
        band = colour if marker else BAND  # one law alone has no marker of its own
        axes.fill_between(grid, np.exp(low), np.exp(high), color=band, alpha=0.15, lw=0)


def _name_laws(picture: Figure, kinds: Mapping[str, Sequence[Optimum]]) -> None:
    """The legend of several laws; the family is named where there are several."""
    families = {str(members[0].group.get("family", "")) for members in kinds.values()}
    handles = []
    for order, law in enumerate(kinds):
        colour, marker, dash = kind(order)
        name = law.rpartition("/")[0]
        name = name.removeprefix(next(iter(families))).strip() if len(families) == 1 else name
        handles.append(Line2D([], [], color=colour, marker=marker, ls=dash, ms=5, label=plain(name)))
    picture.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
