"""Pictures of runs and fits. Every function returns a matplotlib Figure of its own and touches no global state.

Size and compute are ordered, so they get one sequential, colour-blind-safe colour map; what a fit refuses is drawn
hollow and dashed. A number that is NaN is not drawn.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.backtest import Forecast
from analysis.laws import find_law
from analysis.verdicts import Fit
from sweeps.units import flops, human

# Viridis without its palest end, which is hard to see on white.
COLOURS = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.88, 256)))
INK, GREY, BAND, ORANGE = "#222222", "#767676", "#3b6fb6", "#c4500a"
WIDTH = 7.2


def loss_curves(curves: pd.DataFrame, runs: pd.DataFrame, against: Literal["tokens", "flops"] = "tokens") -> Figure:
    """Validation loss of every run against tokens or FLOPs (log axis), coloured by size; dots are final losses."""
    figure, axes = _figure(4.3)
    label = {"tokens": "training tokens", "flops": "training compute (FLOPs)"}[against]
    end = {"tokens": "D", "flops": "C"}[against]
    known = curves[curves["val_loss"].notna()]
    sizes = sorted(known["N"].unique())
    norm = _norm(sizes)
    for _, line in known.groupby("cell", sort=False):
        line = line[line[against] > 0]
        colour = COLOURS(norm(line["N"].iloc[0])) if len(line) else INK
        axes.plot(line[against], line["val_loss"], color=colour, lw=1.0, alpha=0.8)
    done = runs[runs["val_loss_final"].notna()]
    axes.scatter(
        done[end], done["val_loss_final"], c=COLOURS(norm(done["N"])), s=14, zorder=3, edgecolors="white", lw=0.4
    )
    axes.set_xscale("log")
    _trim_start(axes, known[against], known["val_loss"], done["val_loss_final"])
    axes.set(xlabel=label, ylabel="validation loss (nats per token)")
    _power_ticks(axes)
    _size_bar(figure, axes, norm, sizes)
    return figure


def isoflop_curves(fit: Fit) -> Figure:
    """Loss against N at each compute budget, with its parabola and, where it stands, its minimum and interval."""
    figure, axes = _figure(4.6)
    norm = _norm([b.C for b in fit.budgets])
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
            low, high = _closed(budget.N.interval, (budget.sizes[0], budget.sizes[-1]))
            axes.plot([low, high], [budget.loss.value] * 2, color=INK, lw=1.6, zorder=4)
            axes.plot(budget.N.value, budget.loss.value, "D", color=INK, mfc="white", ms=6, zorder=5)
    axes.plot([], [], "D-", color=INK, mfc="white", ms=6, lw=1.6, label="minimum, 95 %")
    axes.set_xscale("log")
    axes.set(xlabel="parameters N", ylabel="final validation loss (nats per token)")
    _human_ticks(axes)
    axes.legend(title="budget (FLOPs)", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def optimum_paths(fit: Fit) -> Figure:
    """N* and D* against compute: the fitted power laws, their 95 % bands, and the slopes of Hoffmann et al. 2022."""
    figure = Figure(
        figsize=(WIDTH, 3.6),
    )
    figure.set_layout_engine("constrained", wspace=0.06)
    panels = figure.subplots(1, 2)
    kept = [b for b in fit.budgets if b.accepted]
    C = np.array([b.C for b in kept])
    names = {"N": ("best size N* (parameters)", 0.49), "D": ("best token count D*", 0.51)}
    for axes, (name, (label, published)) in zip(panels, names.items()):
        _dress(axes)
        values = np.array([getattr(b, name).value for b in kept])
        if len(kept):
            grid = np.geomspace(C.min() / 1.6, C.max() * 1.6, 60)
            slope, level = fit.params[f"{name}_exponent"], fit.params[f"{name}_coefficient"]
            if np.isfinite(slope):
                axes.plot(grid, level * grid**slope, color=BAND, lw=1.6, label=f"fit: C^{slope:.2f}")
                if f"{name}_exponent" in fit.draws:
                    slopes, levels = fit.draws[f"{name}_exponent"], fit.draws[f"{name}_coefficient"]
                    paths = np.log(levels)[:, None] + slopes[:, None] * np.log(grid)
                    low, high = np.nanquantile(paths, [0.025, 0.975], axis=0)
                    axes.fill_between(grid, np.exp(low), np.exp(high), color=BAND, alpha=0.18, lw=0, label="95 % band")
            centre = np.exp(np.log(C).mean()), np.exp(np.log(values).mean())
            axes.plot(
                grid,
                centre[1] * (grid / centre[0]) ** published,
                "--",
                color=ORANGE,
                lw=1.2,
                label=f"Hoffmann et al.: C^{published}",
            )
            bars = [_closed(getattr(b, name).interval, (v, v)) for b, v in zip(kept, values)]
            spread = np.abs(np.array(bars).T - values)
            axes.errorbar(
                C, values, spread, fmt="o", color=INK, ms=5, capsize=2, lw=1.0, label="minima, 95 %", zorder=4
            )
            axes.legend(frameon=False, fontsize=8, loc="upper left")
        axes.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)", ylabel=label)
        _human_ticks(axes, "y")
        _power_ticks(axes)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
    return figure


def residuals(fit: Fit, runs: pd.DataFrame) -> Figure:
    """Measured over predicted loss of a Chinchilla fit, in percent against compute, coloured by size."""
    figure, axes = _figure(3.6)
    used = runs[runs["cell"].astype(str).isin(fit.provenance["cells"])] if "cell" in runs.columns else runs
    losses = used[fit.loss].astype(float)
    percent = 100.0 * (losses / find_law(fit.law)({v: used[v] for v in find_law(fit.law).variables}, fit.solved) - 1.0)
    norm = _norm(used["N"])
    sd = fit.noise.get("sd", np.nan)
    axes.axhline(0.0, color=INK, lw=0.8)
    if np.isfinite(sd):
        axes.axhspan(
            -196.0 * sd, 196.0 * sd, color=GREY, alpha=0.15, lw=0, label=f"noise, 95 % ({fit.noise['source']})"
        )
        axes.legend(frameon=False, loc="best", fontsize=8)
    axes.scatter(used["C"], percent, c=COLOURS(norm(used["N"])), s=24, zorder=3, edgecolors="white", lw=0.4)
    axes.set(xscale="log", xlabel="training compute C (FLOPs)", ylabel="measured / fitted loss - 1 (%)")
    _power_ticks(axes)
    _size_bar(figure, axes, norm, sorted(used["N"].unique()))
    return figure


def forecast(result: Forecast) -> Figure:
    """The dearest budget as the cheaper ones foretold it, and as it was found."""
    figure, axes = _figure(3.8)
    N = np.array([s.N for s in result.sizes])
    predicted = np.array([s.predicted for s in result.sizes])
    if len(N):
        spread = np.abs(np.array([_closed(s.interval, (s.predicted, s.predicted)) for s in result.sizes]).T - predicted)
        axes.errorbar(
            N, predicted, spread, fmt="s", color=BAND, mfc="white", ms=6, capsize=3, lw=1.2, label="forecast, 95 %"
        )
        axes.plot(N, [s.measured for s in result.sizes], "o", color=INK, ms=5, label="measured")
    best = result.N_predicted
    if np.isfinite(best.value):
        low, high = best.interval
        if np.isfinite([low, high]).all():
            axes.axvspan(low, high, color=BAND, alpha=0.12, lw=0)
        axes.axvline(best.value, color=BAND, ls="--", lw=1.2, label="forecast N*, 95 %")
    if np.isfinite(result.N_found.value):
        axes.axvline(result.N_found.value, color=INK, lw=1.2, label="found N*")
    axes.set(xscale="log", xlabel="parameters N", ylabel="final validation loss (nats per token)")
    axes.set_title(f"budget {flops(result.budget)} FLOPs, left out of the fit", fontsize=9, loc="left")
    _human_ticks(axes)
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles))
    order = [k for k in ("measured", "forecast, 95 %", "found N*", "forecast N*, 95 %") if k in named]
    axes.legend(
        [named[k] for k in order], order, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5)
    )
    return figure


# --- parts -------------------------------------------------------------------------------------------------------


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    _dress(axes)
    return figure, axes


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e3e3", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _norm(values: Any) -> LogNorm:
    low, high = float(np.min(values)), float(np.max(values))
    return LogNorm(low / 1.05, high * 1.05) if low > 0 else LogNorm(0.1, 1.0)


def _size_bar(figure: Figure, axes: Axes, norm: LogNorm, sizes: Sequence[float]) -> None:
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, pad=0.02)
    ticks: list[float] = []
    gap = (np.log(sizes[-1]) - np.log(sizes[0])) / 9.0 if len(sizes) > 1 else 0.0
    for size in sizes:  # all sizes, unless their names would run into each other
        if not ticks or np.log(size / ticks[-1]) > gap:
            ticks.append(size)
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: human(v)))
    bar.ax.tick_params(labelsize=8)
    bar.set_label("parameters N")


def _trim_start(axes: Axes, x: pd.Series, curve: pd.Series, final: pd.Series) -> None:
    """Show where runs differ: the fall from the initial loss takes at most half of the picture."""
    if not len(curve) or not len(final):
        return
    low, end = float(min(curve.min(), final.min())), float(final.max())
    top = min(float(curve.max()), end + (end - low) + 0.05 * end)
    seen = x[(curve <= top) & (x > 0)]
    if top > low and len(seen):
        margin = 0.04 * (top - low)
        axes.set_ylim(low - margin, top + margin)
        axes.set_xlim(float(seen.min()) / 1.3, axes.get_xlim()[1])


def _human_ticks(axes: Axes, which: Literal["x", "y"] = "x") -> None:
    """Counts on a log axis, written as 20k, 50k, 100k."""
    _ticks(axes, which, human)


def _power_ticks(axes: Axes) -> None:
    """Tokens or FLOPs on the log x axis, written as 2e11, 5e11, 1e12."""
    _ticks(axes, "x", flops)


def _ticks(axes: Axes, which: Literal["x", "y"], name: Callable[[float], str]) -> None:
    """Named ticks at 1, 2 and 5 times powers of ten, fewer where they would collide."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    if low <= 0:
        return
    decades = np.log10(high / low)
    steps = (
        (1, 1.5, 2, 3, 4, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    )
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    axis.set_major_locator(FixedLocator([m * 10.0**k for k in powers for m in steps]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: name(v)))
    axis.set_minor_locator(NullLocator())
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)


def _closed(bounds: tuple[float, float], instead: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    return (low if np.isfinite(low) else instead[0]), (high if np.isfinite(high) else instead[1])
