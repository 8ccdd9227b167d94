"""Pictures of what hyperparameters are worth looking at, and of the batch: importance bars, tokens against batch.

As all pictures: what is refused is hollow or grey, a number that is NaN is not drawn.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.batches import SEEN, CriticalBatch
from analysis.importance import Importance
from analysis.style import (
    BAND,
    COLOURS,
    GREY,
    INK,
    ORANGE,
    WIDTH,
    closed,
    dress,
    figure,
    human_ticks,
    kind,
    log_norm,
    plain,
)
from analysis.verdicts import Estimate
from sweeps.units import human

SHOWN = 0.01
"""Interactions below this share of the variance are left to the table."""


def importance_bars(result: Importance) -> Figure:
    """A bar for each effect and evaluator, with its spread; one panel for each evaluator, which names it and what its
    numbers are about."""
    evaluations = result.evaluations
    order = list(result.parameters)
    if evaluations:
        order.sort(key=lambda name: -np.nan_to_num(evaluations[0].shares[name].value, nan=-1.0))
    extra = [name for name, one in (evaluations[0].interactions.items() if evaluations else ()) if one.value >= SHOWN]
    rest = ["rest"] if any(np.isfinite(one.rest.value) for one in evaluations) else []
    rows = order + extra + rest
    picture = Figure(figsize=(WIDTH, 1.5 + 0.32 * max(len(rows), 2)), layout="constrained")
    panels = np.atleast_1d(picture.subplots(1, max(len(evaluations), 1), sharey=True))
    for axes in panels:
        dress(axes)
        axes.grid(visible=False, axis="y")
        axes.set(
            yticks=range(len(rows)),
            yticklabels=[plain(name) for name in rows],
            ylim=(len(rows) - 0.4, -0.6),
            xlim=(0.0, 1.16),
        )
        axes.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}%"))
    for axes, one in zip(panels, evaluations):
        shares: dict[str, Estimate] = {**one.shares, **one.interactions, "rest": one.rest}
        for place, name in enumerate(rows):
            share = shares.get(name)
            if share is None or not np.isfinite(share.value):
                axes.text(0.01, place, "-", va="center", color=GREY)
                continue
            colour = BAND if name in result.parameters else GREY
            axes.barh(place, share.value, height=0.62, color=colour, alpha=0.85, lw=0)
            end = share.value
            if np.isfinite(share.interval).all():
                axes.plot(share.interval, [place, place], color=INK, lw=1.4, solid_capstyle="butt")
                end = max(end, share.interval[1])
            axes.text(end + 0.015, place, f"{100 * share.value:.2g}%", va="center", fontsize=8, color=INK)
        name = one.evaluator.replace(" (", "\n(")
        axes.set_title(plain(f"{name}\n{one.region}"), fontsize=9, loc="left")
    if evaluations:
        spread = any(np.isfinite(one.interval).all() for e in evaluations for one in e.shares.values())
        share_of = "share of the loss's variance" if len(evaluations) == 1 else "share"
        picture.supxlabel(share_of + (" (line: 95%)" if spread else " (no spread: no replicates)"), fontsize=9)
    else:
        message = next((v.message for v in result.verdicts if v.severity == "refuse"), "no importance")
        panels[0].text(
            0.5, 0.5, plain(message), transform=panels[0].transAxes, ha="center", color=GREY, wrap=True, fontsize=9
        )
    return picture


def batch_curves(sweeps: Sequence[CriticalBatch]) -> Figure:
    """Tokens to each target loss against the batch, on log axes: points (hollow where not fitted), the curve (dashed
    where refused) and B_crit with its interval, at twice E_min; crosses where tokens stay above 1.2 times the least
    (Zhang et al. 2024)."""
    picture, axes = figure(4.4)
    drawn = [one for one in sweeps if len(one.points)]
    norm = log_norm([one.points["tokens"].min() for one in drawn] or [1.0])
    for order, one in enumerate(drawn):
        colour, marker = COLOURS(norm(one.points["tokens"].min())), kind(order)[1]
        x, y = one.points["batch_tokens"].to_numpy(float), one.points["tokens"].to_numpy(float)
        note = " (refused)" if one.refused else ""
        label = plain(f"{one.name} {human(one.group['N'])}, {one.target:.3f} nats{note}".strip())
        error = one.points["error"].to_numpy(float)
        bars = np.where(np.isfinite(error), 1.96 * y * error, 0.0)
        face = "white" if one.refused else colour
        axes.errorbar(x, y, bars, fmt=marker, color=colour, mfc=face, ms=5, lw=1.0, label=label, zorder=3)
        if one.refused:
            axes.plot(x, y, "--", color=colour, lw=0.8)
            continue
        used = np.isfinite(one.points["fitted"].to_numpy(float))
        axes.plot(x[~used], y[~used], marker, color=colour, mfc="white", ms=5, zorder=4)
        grid = np.geomspace(x[used].min() / 1.2, max(x.max(), one.batch.value) * 1.2, 200)
        axes.plot(grid, one.tokens.value * (1.0 + grid / one.batch.value), color=colour, lw=1.3)
        height = 2.0 * one.tokens.value
        bar = closed(one.batch.interval, (x.min() / SEEN, x.max() * SEEN))
        axes.plot(bar, [height] * 2, color=INK, lw=1.6, zorder=4)
        axes.plot(one.batch.value, height, "D", color=INK, mfc="white", ms=6, zorder=5)
        if np.isfinite(one.beyond_linear.value):
            axes.plot(one.beyond_linear.value, 1.2 * y.min(), "x", color=ORANGE, ms=7, mew=1.6, zorder=5)
    axes.plot([], [], "D-", color=INK, mfc="white", ms=6, lw=1.6, label="B_crit, 95% (at 2 E_min)")
    axes.plot([], [], "x", color=ORANGE, ms=7, mew=1.6, label="20% beyond linear scaling")
    axes.set(xscale="log", yscale="log", xlabel="batch (tokens a step)", ylabel="tokens to the target loss")
    human_ticks(axes)
    human_ticks(axes, "y")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return picture
