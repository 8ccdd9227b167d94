"""Pictures of runs and fits. Every function returns a matplotlib Figure of its own and touches no global state.

What a fit refuses is drawn hollow, dashed or in grey; a number that is NaN is not drawn.
"""

from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.forecast import Forecast
from analysis.laws import find_law
from analysis.portraits import frontier, pair_plot, profile_curves, surface, used_runs
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
    power_ticks,
    size_bar,
    trim_start,
)
from analysis.verdicts import Fit
from sweeps.units import flops, human

__all__ = [
    "backtest",
    "envelope",
    "forecast",
    "frontier",
    "isoflop_curves",
    "loss_curves",
    "optimum_paths",
    "pair_plot",
    "profile_curves",
    "residuals",
    "surface",
    "times",
]


def loss_curves(curves: pd.DataFrame, runs: pd.DataFrame, against: Literal["tokens", "flops"] = "tokens") -> Figure:
    """Validation loss of every run against tokens or FLOPs (log axis), coloured by size; dots are final losses."""
    picture, axes = figure(4.3)
    label = {"tokens": "training tokens", "flops": "training compute (FLOPs)"}[against]
    end = {"tokens": "D", "flops": "C"}[against]
    known = curves[curves["val_loss"].notna()]
    sizes = sorted(known["N"].unique())
    norm = log_norm(sizes)
    for _, line in known.groupby("cell", sort=False):
        line = line[line[against] > 0]
        colour = COLOURS(norm(line["N"].iloc[0])) if len(line) else INK
        axes.plot(line[against], line["val_loss"], color=colour, lw=1.0, alpha=0.8)
    done = runs[runs["val_loss_final"].notna()]
    axes.scatter(
        done[end], done["val_loss_final"], c=COLOURS(norm(done["N"])), s=14, zorder=3, edgecolors="white", lw=0.4
    )
    axes.set_xscale("log")
    trim_start(axes, known[against], known["val_loss"], done["val_loss_final"])
    axes.set(xlabel=label, ylabel="validation loss (nats per token)")
    power_ticks(axes)
    size_bar(picture, axes, norm, sizes)
    return picture


def isoflop_curves(fit: Fit) -> Figure:
    """Loss against N at each compute budget, with its parabola and, where it stands, its minimum and interval."""
    picture, axes = figure(4.6)
    norm = log_norm([b.C for b in fit.budgets])
    for budget in fit.budgets:
        colour = COLOURS(norm(budget.C))
        note = "" if budget.accepted else " (refused)"
        axes.plot(
            budget.sizes,
            budget.losses,
            "o",
            color=colour,
            mfc=colour if budget.accepted else "white",
            ms=5,
            label=f"{flops(budget.budget)}{note}",
        )
        for N, loss in budget.far:
            axes.plot(N, loss, "x", color=colour, ms=4)
        if np.isfinite(budget.curve).all():
            x = np.linspace(np.log(budget.sizes[0]), np.log(budget.sizes[-1]), 200)
            k0, k1, k2 = budget.curve
            y = np.exp(k0 + k1 * (x - budget.center) + k2 * (x - budget.center) ** 2)
            axes.plot(np.exp(x), y, "-" if budget.accepted else "--", color=colour, lw=1.2)
        if budget.accepted:
            low, high = closed(budget.N.interval, (budget.sizes[0], budget.sizes[-1]))
            axes.plot([low, high], [budget.loss.value] * 2, color=INK, lw=1.6, zorder=4)
            axes.plot(budget.N.value, budget.loss.value, "D", color=INK, mfc="white", ms=6, zorder=5)
    axes.plot([], [], "D-", color=INK, mfc="white", ms=6, lw=1.6, label=f"minimum, {fit.level:.0%}")
    axes.set_xscale("log")
    axes.set(xlabel="parameters N", ylabel="final validation loss (nats per token)")
    human_ticks(axes)
    axes.legend(title="budget (FLOPs)", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return picture


def optimum_paths(fit: Fit) -> Figure:
    """N* and D* against compute: the fitted power laws, their bands, and the slopes of Hoffmann et al. 2022."""
    picture = Figure(figsize=(WIDTH, 3.6))
    picture.set_layout_engine("constrained", wspace=0.06)
    panels = picture.subplots(1, 2)
    kept = [b for b in fit.budgets if b.accepted]
    C = np.array([b.C for b in kept])
    names = {"N": ("best size N* (parameters)", 0.49), "D": ("best token count D*", 0.51)}
    for axes, (name, (label, published)) in zip(panels, names.items()):
        dress(axes)
        values = np.array([getattr(b, name).value for b in kept])
        if len(kept):
            grid = np.geomspace(C.min() / 1.6, C.max() * 1.6, 60)
            slope, level = fit.params[f"{name}_exponent"], fit.params[f"{name}_coefficient"]
            if np.isfinite(slope):
                axes.plot(grid, level * grid**slope, color=BAND, lw=1.6, label=f"fit: C^{slope:.2f}")
                if f"{name}_exponent" in fit.draws:
                    slopes, levels = fit.draws[f"{name}_exponent"], fit.draws[f"{name}_coefficient"]
                    paths = np.log(levels)[:, None] + slopes[:, None] * np.log(grid)
                    tail = (1.0 - fit.level) / 2.0
                    low, high = np.nanquantile(paths, [tail, 1.0 - tail], axis=0)
                    band = f"{fit.level:.0%} band"
                    axes.fill_between(grid, np.exp(low), np.exp(high), color=BAND, alpha=0.18, lw=0, label=band)
            centre = np.exp(np.log(C).mean()), np.exp(np.log(values).mean())
            axes.plot(
                grid,
                centre[1] * (grid / centre[0]) ** published,
                "--",
                color=ORANGE,
                lw=1.2,
                label=f"Hoffmann et al.: C^{published}",
            )
            bars = [closed(getattr(b, name).interval, (v, v)) for b, v in zip(kept, values)]
            spread = np.abs(np.array(bars).T - values)
            told = f"minima, {fit.level:.0%}"
            axes.errorbar(C, values, spread, fmt="none", color=INK, capsize=2, lw=1.0, zorder=4)
            sure = np.array([np.isfinite(getattr(b, name).interval).all() for b in kept])
            axes.plot(C[sure], values[sure], "o", color=INK, ms=5, label=told, zorder=5)
            if not sure.all():
                axes.plot(C[~sure], values[~sure], "o", color=INK, mfc="white", ms=5, label="an end open", zorder=5)
            axes.legend(frameon=False, fontsize=8, loc="upper left")
        axes.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)", ylabel=label)
        human_ticks(axes, "y")
        power_ticks(axes, 6)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
    return picture


def envelope(curves: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """Validation loss of every run against FLOPs, in grey, and the lowest of them at each compute, coloured by size.

    curves: as of `load_curves` (cell, flops, val_loss); points: C, N, D, loss, one row per compute looked at.
    """
    picture, axes = figure(4.3)
    known = curves[curves["val_loss"].notna() & (curves["flops"] > 0)]
    for _, line in known.groupby("cell", sort=False):
        axes.plot(line["flops"], line["val_loss"], color="#b4b4b4", lw=0.8, zorder=2)
    axes.set_xscale("log")
    if len(points):
        norm = log_norm(points["N"])
        axes.scatter(points["C"], points["loss"], c=COLOURS(norm(points["N"])), s=9, lw=0, zorder=3)
        trim_start(axes, known["flops"], known["val_loss"], points["loss"])
        size_bar(picture, axes, norm, sorted(points["N"].unique()))
    axes.set(xlabel=NAMES["C"], ylabel="validation loss (nats per token)")
    power_ticks(axes)
    return picture


def residuals(fit: Fit, runs: pd.DataFrame) -> Figure:
    """Measured over fitted response of any law, in percent, against compute where it is known; coloured by size N.

    Without compute, the law's first variable stands on the axis.
    """
    form, used = find_law(fit.law), used_runs(fit, runs)
    axis = "C" if "C" in used.columns else form.variables[0]
    fitted = form({v: used[v].astype(float) for v in form.variables}, fit.solved)
    percent = 100.0 * (used[fit.loss].astype(float) / fitted - 1.0)
    picture, axes = figure(3.6)
    sized = "N" in used.columns
    norm = log_norm(used["N"] if sized else [1.0])
    sd = fit.noise.get("sd", np.nan) if fit.provenance["settings"].get("scale") != "response" else np.nan
    axes.axhline(0.0, color=INK, lw=0.8)
    if np.isfinite(sd):
        axes.axhspan(-196.0 * sd, 196.0 * sd, color=GREY, alpha=0.15, lw=0, label=f"noise, 95% ({fit.noise['source']})")
        axes.legend(frameon=False, loc="best", fontsize=8)
    colour = COLOURS(norm(used["N"])) if sized else BAND
    axes.scatter(used[axis], percent, c=colour, s=24, zorder=3, edgecolors="white", lw=0.4)
    axes.set(xlabel=NAMES.get(axis, axis), ylabel=f"measured / fitted {form.response} - 1 (%)")
    if used[axis].max() > 3 * used[axis].min() > 0:
        axes.set_xscale("log")
        power_ticks(axes)
    if sized:
        size_bar(picture, axes, norm, sorted(used["N"].unique()))
    return picture


def forecast(result: Forecast) -> Figure:
    """The dearest budget as the cheaper ones foretold it, and as it was found."""
    picture, axes = figure(3.8)
    N = np.array([s.N for s in result.sizes])
    predicted = np.array([s.predicted for s in result.sizes])
    if len(N):
        spread = np.abs(np.array([closed(s.interval, (s.predicted, s.predicted)) for s in result.sizes]).T - predicted)
        axes.errorbar(
            N, predicted, spread, fmt="s", color=BAND, mfc="white", ms=6, capsize=3, lw=1.2, label="forecast, 95%"
        )
        axes.plot(N, [s.measured for s in result.sizes], "o", color=INK, ms=5, label="measured")
    best = result.N_predicted
    if np.isfinite(best.value):
        low, high = best.interval
        if np.isfinite([low, high]).all():
            axes.axvspan(low, high, color=BAND, alpha=0.12, lw=0)
        axes.axvline(best.value, color=BAND, ls="--", lw=1.2, label="forecast N*, 95%")
    if np.isfinite(result.N_found.value):
        axes.axvline(result.N_found.value, color=INK, lw=1.2, label="found N*")
    axes.set(xscale="log", xlabel="parameters N", ylabel="final validation loss (nats per token)")
    axes.set_title(f"budget {flops(result.budget)} FLOPs, left out of the fit", fontsize=9, loc="left")
    human_ticks(axes)
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles))
    order = [k for k in ("measured", "forecast, 95%", "found N*", "forecast N*, 95%") if k in named]
    axes.legend(
        [named[k] for k in order], order, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5)
    )
    return picture


def backtest(scores: pd.DataFrame, noise: float | None = None) -> Figure:
    """The error of forecasts against how far they reached beyond the runs fitted, one line per law (its mean).

    scores: one row per law, cut and ratio: law, cut (FLOPs), ratio (compute over the dearest fitted), error (relative,
    a fraction), inside (whether the measured loss lay in the interval, or the share that did) and chosen (whether the
    law was chosen at a cheaper cut). Hollow where mostly outside, ringed where chosen; NaN errors are not drawn.
    noise: standard deviation of ln loss between equal runs: what the forecast of a perfect law would still miss.
    """
    picture, axes = figure(3.8)
    known = scores[np.isfinite(scores["error"].astype(float))]
    known = known.assign(percent=100.0 * known["error"].astype(float).abs())
    laws = scores["law"].nunique()
    for order, law in enumerate(scores["law"].unique()):
        colour, marker, dash = kind(order)
        own = known[known["law"] == law]
        own = own.assign(ratio=own["ratio"] * 1.05 ** (order - (laws - 1) / 2))  # side by side
        mean = own.groupby("ratio")["percent"].mean()
        axes.plot(mean.index, mean, dash, color=colour, lw=1.5, zorder=3)
        axes.plot([], [], dash, color=colour, lw=1.5, marker=marker, ms=5, label=plain(law))
        for row in own.itertuples():
            face = colour if row.inside is not None and row.inside >= 0.5 else "white"
            axes.plot(row.ratio, row.percent, marker, color=colour, mfc=face, ms=5, zorder=4)
            if row.chosen:
                axes.plot(row.ratio, row.percent, "o", color=INK, mfc="none", ms=10, mew=1.0, zorder=5)
    if noise is not None and np.isfinite(noise):
        # the mean of |z| over a standard normal
        floor = 100.0 * noise * np.sqrt(2.0 / np.pi)
        axes.axhline(floor, color=GREY, lw=1.0, ls=(0, (1, 2)), label="noise alone", zorder=1)
    axes.plot([], [], "o", color=GREY, mfc="white", ms=5, label="outside its interval")
    axes.plot([], [], "o", color=INK, mfc="none", ms=10, label="chosen at a cheaper cut")
    axes.set(xscale="log", yscale="log", xlabel="compute, times the dearest run fitted")
    axes.set_ylabel("absolute error of the forecast loss (%)")
    axes.xaxis.set_major_locator(FixedLocator(sorted(scores["ratio"].unique())))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: human(v)))
    axes.xaxis.set_minor_locator(NullLocator())
    log_ticks(axes, "y", human)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return picture


def times(runs: pd.DataFrame) -> Figure:
    """Seconds of every run against the seconds that were planned, coloured by size; the line is a plan that is met."""
    picture, axes = figure(3.6)
    planned, real = runs["seconds_predicted"], runs["seconds"]
    norm = log_norm(runs["N"])
    ends = [min(planned.min(), real.min()), max(planned.max(), real.max())]
    axes.plot(ends, ends, color=INK, lw=0.8)
    axes.scatter(planned, real, c=COLOURS(norm(runs["N"])), s=24, zorder=3, edgecolors="white", lw=0.4)
    axes.set(xscale="log", yscale="log", xlabel="seconds planned", ylabel="seconds taken")
    human_ticks(axes)
    human_ticks(axes, "y")
    size_bar(picture, axes, norm, sorted(runs["N"].unique()))
    return picture
