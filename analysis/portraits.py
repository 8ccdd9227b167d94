"""Pictures of a fitted law: what it says of compute, how it lies on the runs, and how well they determine it.

Every function returns a matplotlib Figure of its own. They are reached as `plots.frontier` and so on.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.allocation import optimum, smooth_counter
from analysis.decisions import splits_compute
from analysis.laws import Law, find_law
from analysis.profiles import Profile
from analysis.style import (
    BAND,
    COLOURS,
    GREY,
    INK,
    NAMES,
    ORANGE,
    WIDTH,
    axis_scale,
    closed,
    dress,
    few_ticks,
    figure,
    human_ticks,
    kind,
    log_norm,
    log_ticks,
    power_ticks,
    round_numbers,
    size_bar,
)
from analysis.verdicts import Fit
from sweeps.errors import InputError
from sweeps.units import flops, human

_BAND_DRAWS = 200
"""Draws that a band uses: each is searched at every compute."""


def frontier(fit: Fit, runs: pd.DataFrame) -> Figure:
    """Loss against compute (log axes): the runs, and the least loss that a law of N and D reaches at each compute.

    Drawn to ten times the dearest run, dashed where no run has been, with the band of the fit's draws and the floor E.
    FLOPs are counted as for the runs. InputError for a law of other variables.
    """
    form = _split_law(fit, "frontier")
    used = used_runs(fit, runs)
    picture, axes = figure(4.3)
    norm = log_norm(used["N"])
    end = float(used["C"].max())
    grid = np.concatenate([np.geomspace(used["C"].min(), end, 25), np.geomspace(end, 10 * end, 11)[1:]])
    counter = smooth_counter(used["N"], used["C"] / used["D"])
    least = optimum(grid, fit.solved, counter, form).loss
    if np.isfinite(least).any():
        axes.plot(grid[:25], least[:25], color=BAND, lw=1.8, label=f"least loss ({form.name})", zorder=4)
        axes.plot(grid[24:], least[24:], "--", color=BAND, lw=1.5, label="beyond the runs", zorder=4)
        if fit.draws:
            some = {k: v[:_BAND_DRAWS] for k, v in fit.draws.items()}
            tail = (1.0 - fit.level) / 2.0
            copies = optimum(grid[:, None], some, counter, form).loss
            low, high = np.nanquantile(copies, [tail, 1.0 - tail], axis=1)
            axes.fill_between(grid, low, high, color=BAND, alpha=0.2, lw=0, label=f"{fit.level:.0%} band", zorder=1)
    else:
        _no_law(axes)
    E = fit.params.get("E", np.nan)
    if np.isfinite(E):
        axes.axhline(E, color=ORANGE, ls=":", lw=1.5, label=f"floor E = {E:.3g}", zorder=1)
    axes.scatter(used["C"], used[fit.loss], c=COLOURS(norm(used["N"])), s=16, zorder=3, edgecolors="white", lw=0.4)
    axes.set(xscale="log", yscale="log", xlabel=NAMES["C"], ylabel=NAMES["loss"])
    power_ticks(axes)
    log_ticks(axes, "y", human, 14)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    size_bar(picture, axes, norm, sorted(used["N"].unique()))
    return picture


def surface(fit: Fit, runs: pd.DataFrame) -> Figure:
    """The fitted loss as contours over N and D (log axes), with the runs, lines of equal compute and the best split.

    FLOPs are counted as for the runs. InputError for a law of variables other than N and D.
    """
    form = _split_law(fit, "surface")
    used = used_runs(fit, runs)
    picture, axes = figure(5.2)
    spans = [(float(used[v].min()) / 1.6, float(used[v].max()) * 1.6) for v in ("N", "D")]
    N, D = (np.geomspace(*span, 200) for span in spans)
    losses = form({"N": N, "D": D[:, None]}, fit.solved)
    axes.set(xscale="log", yscale="log", xlim=spans[0], ylim=spans[1], xlabel=NAMES["N"], ylabel=NAMES["D"])
    if np.isfinite(losses).all():
        spread = np.quantile(losses, np.linspace(0.01, 0.97, 13))
        levels = np.unique(np.round(spread, 1 if spread[-1] - spread[0] > 1.0 else 2))
        drawn = axes.contour(N, D, losses, levels=levels, cmap=COLOURS.reversed(), linewidths=1.3)
        axes.clabel(drawn, fontsize=8, fmt="%g")
    else:
        _no_law(axes)
    counter = smooth_counter(used["N"], used["C"] / used["D"])
    C = np.geomspace(used["C"].min(), used["C"].max(), 60)
    for budget in round_numbers(C[0], C[-1], 6):
        line = budget / counter(N)
        axes.plot(N, line, ls=(0, (4, 3)), color=GREY, lw=0.8, zorder=1)
        enters = int(np.argmax(line <= D[-1]))  # named where it comes into the picture, at the top or at the left
        axes.annotate(
            flops(budget), (N[enters], min(line[enters], D[-1])), (2, 2) if enters > 8 else (4, -2), fontsize=7.5,
            color=GREY, textcoords="offset points", annotation_clip=False,
        )  # fmt: skip
    axes.plot([], [], ls=(0, (4, 3)), color=GREY, lw=0.8, label="equal compute (FLOPs)")
    best = optimum(C, fit.solved, counter, form)
    if np.isfinite(best.N).any():
        axes.plot(best.N, best.D, color=ORANGE, lw=2.2, label="best split", zorder=4)
    axes.plot(used["N"], used["D"], "o", color=INK, mec="white", mew=0.5, ms=4.5, label="runs", zorder=5)
    human_ticks(axes, "x")
    human_ticks(axes, "y")
    axes.grid(visible=False)
    title = "contours: fitted loss\n(nats per token)"
    axes.legend(
        frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), title=title, title_fontsize=8,
        alignment="left",
    )  # fmt: skip
    return picture


def profile_curves(profiles: Sequence[Profile]) -> Figure:
    """Profile likelihoods, a panel for each parameter: how far the log-likelihood falls, and where an interval ends.

    Profiles of one parameter under several likelihoods share its panel.
    """
    names = list(dict.fromkeys(p.parameter for p in profiles))
    kinds = list(dict.fromkeys(p.likelihood for p in profiles))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    picture = Figure(figsize=(WIDTH, 0.4 + 2.2 * rows), layout="constrained")
    panels = picture.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names):
        dress(axes)
        own = [p for p in profiles if p.parameter == name]
        for p in own:
            _profile_line(axes, p, kinds.index(p.likelihood), shaded=len(own) == 1)
        axes.set_ylim(0.0, 2.0 * max(p.limit for p in own))
        axes.set_xlabel(NAMES.get(name, name))
        seen = np.concatenate([p.values for p in own])
        if len(seen):
            axes.set_xscale(axis_scale(seen.min(), seen.max()))
        few_ticks(axes, "x")
    for axes in panels[::columns]:
        axes.set_ylabel("fall of log-likelihood")
    found = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels())}
    picture.legend(found.values(), found, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return picture


def _profile_line(axes: Axes, profile: Profile, order: int, *, shaded: bool) -> None:
    colour, _, dash = kind(order)
    axes.axhline(profile.limit, color=GREY, lw=0.9, ls=(0, (1, 2)), zorder=1, label=f"limit, {profile.level:.0%}")
    if profile.refused:
        axes.text(0.5, 0.5, "refused", transform=axes.transAxes, ha="center", color=GREY, fontsize=8)
        return
    axes.plot(profile.values, profile.drop, dash, color=colour, lw=1.6, label=profile.likelihood)
    if shaded:
        axes.axvspan(*closed(profile.interval, (profile.values[0], profile.values[-1])), color=colour, alpha=0.12, lw=0)
    for is_open, at, side, words in zip(profile.open_ends, (0.02, 0.98), ("left", "right"), ("← open", "open →")):
        if is_open:
            axes.text(at, 0.9 - 0.1 * order, words, transform=axes.transAxes, ha=side, fontsize=8, color=colour)


def pair_plot(fit: Fit) -> Figure:
    """The draws behind a fit's intervals, parameter against parameter; in grey where the fit refuses one of the two.

    On the diagonal their spread with the fit's value and interval; above it their correlation, of logarithms where the
    axis is logarithmic. InputError where the fit has no draws.
    """
    names = [k for k in fit.draws if np.ptp(fit.draws[k]) > 0]
    if not names:
        raise InputError(f"the {fit.law} fit has no draws to show: it is refused, or its noise is not known.")
    spans = {k: np.quantile(fit.draws[k], [0.004, 0.996]) for k in names}
    falling = {term.coefficient for term in find_law(fit.law).terms if term.features}
    scales = {k: "log" if k in falling else axis_scale(*spans[k]) for k in names}
    views = [np.log(fit.draws[k]) if scales[k] == "log" else fit.draws[k] for k in names]
    correlation = np.atleast_2d(np.corrcoef(views))
    picture = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
    panels = picture.subplots(len(names), len(names), squeeze=False)
    for (i, j), axes in np.ndenumerate(panels):
        across, below = names[j], names[i]
        if j > i:
            axes.set_axis_off()
            axes.text(0.5, 0.5, f"{correlation[i, j]:.2f}", ha="center", va="center", transform=axes.transAxes)
            continue
        dress(axes)
        axes.grid(visible=False)
        colour = BAND if np.isfinite([fit.params[across], fit.params[below]]).all() else GREY
        axes.set(xscale=scales[across], xlim=spans[across])
        if i == j:
            ends = spans[across]
            space = np.geomspace if scales[across] == "log" else np.linspace
            edges = space(ends[0], ends[1], 31)
            axes.hist(fit.draws[across], edges, color=colour, alpha=0.6)
            axes.axvline(fit.params[across], color=INK, lw=1.2)
            for end in fit.intervals[across]:
                axes.axvline(end, color=INK, lw=0.9, ls="--")
            axes.spines["left"].set_visible(False)
        else:
            axes.plot(
                fit.draws[across], fit.draws[below], "o", color=colour, ms=1.8, mew=0, alpha=0.35, rasterized=True
            )
            axes.plot(fit.params[across], fit.params[below], "D", color=INK, mfc="white", ms=4.5)
            axes.set(yscale=scales[below], ylim=spans[below])
            few_ticks(axes, "y")
        few_ticks(axes, "x")
        axes.tick_params(labelsize=7.5, labelbottom=i == len(names) - 1, labelleft=0 == j < i, left=j < i)
        if i == len(names) - 1:
            axes.set_xlabel(NAMES.get(across, across), fontsize=9)
        if 0 == j < i:
            axes.set_ylabel(NAMES.get(below, below), fontsize=9)
    picture.align_ylabels()
    return picture


# --- what a law's pictures share ---------------------------------------------------------------------------------


def used_runs(fit: Fit, runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of a run table that a fit used, with compute C = 6 N D where the table has none."""
    table = runs.reset_index(drop=True)
    cells = table["cell"].astype(str) if "cell" in table.columns else "row " + table.index.astype(str)
    table = table[np.isin(np.asarray(cells, dtype=str), fit.provenance["cells"])]
    if "C" not in table.columns and {"N", "D"} <= set(table.columns):
        table = table.assign(C=6.0 * table["N"].astype(float) * table["D"].astype(float))
    return table


def _no_law(axes: Axes) -> None:
    words = "the fit refuses the law; its verdicts say why"
    paper = {"fc": "white", "ec": "none", "alpha": 0.85}
    axes.text(0.98, 0.96, words, transform=axes.transAxes, ha="right", va="top", fontsize=8, bbox=paper, zorder=6)


def _split_law(fit: Fit, picture: str) -> Law:
    """The law of a fit that says how compute is split; InputError for others."""
    if fit.law == "isoflop" or not splits_compute(find_law(fit.law)):
        raise InputError(f"a {picture} is drawn of a law of N and D, such as chinchilla; the fit is of {fit.law}.")
    return find_law(fit.law)
