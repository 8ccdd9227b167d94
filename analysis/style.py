"""The house style of all pictures: sizes, colours, axes and how numbers stand on them.

Quiet, and readable in print: one sequential, colour-blind-safe colour map for what is ordered (size, compute, loss),
whose lightness tells the order in grey as well; kinds (laws, likelihoods) differ in marker and dash, not in colour
alone.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from sweeps.units import flops, human

# Viridis without its palest end, which is hard to see on white.
COLOURS = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.88, 256)))
INK, GREY, BAND, ORANGE = "#222222", "#767676", "#3b6fb6", "#c4500a"
KINDS = (("#0072b2", "o", "-"), ("#d55e00", "s", "--"), ("#009e73", "^", "-."), ("#cc79a7", "D", ":"), (INK, "v", "-"))
"""Colour (of Okabe & Ito's palette), marker and dash of the first, second, ... kind."""
WIDTH = 7.2
"""Of a picture, in inches."""
_ROUND = (
    tuple(np.arange(10, 100) / 10.0),
    (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.2, 2.4, 2.6, 2.8, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9),
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 2, 5),
    (1, 3),
    (1,),
)
"""Mantissas of round numbers, from fine to coarse."""
NAMES = {
    "N": "parameters N",
    "D": "training tokens D",
    "C": "training compute C (FLOPs)",
    "U": "unique tokens U",
    "loss": "loss (nats per token)",
    "E": "E (nats per token)",
}
"""What stands at the axis of a variable or parameter; others stand for themselves."""


def figure(height: float) -> tuple[Figure, Axes]:
    """A picture of one panel; height in inches."""
    result = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = result.subplots()
    dress(axes)
    return result, axes


def dress(axes: Axes) -> None:
    """The house style of one pair of axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e3e3", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def plain(text: object) -> str:
    """Words from data (names of families, columns, corpora) as they stand: a dollar begins no formula."""
    return str(text).replace("$", r"\$")


def kind(order: int) -> tuple[str, str, str]:
    """Colour, marker and dash of the kind at a place in the order."""
    return KINDS[order % len(KINDS)]


def log_norm(values: Any) -> LogNorm:
    """The colours' scale over values."""
    low, high = float(np.min(values)), float(np.max(values))
    return LogNorm(low / 1.05, high * 1.05) if low > 0 else LogNorm(0.1, 1.0)


def size_bar(
    picture: Figure, axes: Axes | Sequence[Axes], norm: LogNorm, sizes: Sequence[float], name: str = "N"
) -> None:
    """The colour bar of sizes N, or of another variable, named at the sizes that were run; of one panel or several."""
    one = isinstance(axes, Axes)
    colours = ScalarMappable(norm, COLOURS)
    bar = picture.colorbar(colours, ax=axes, pad=0.02, fraction=0.15 if one else 0.03, aspect=20 if one else 40)
    bar.ax.yaxis.set_major_locator(FixedLocator(_apart(sizes, np.log(sizes[-1] / sizes[0]) / 9)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: human(v)))
    bar.ax.tick_params(labelsize=8)
    bar.set_label(NAMES.get(name, name))


def trim_start(axes: Axes, x: pd.Series, curve: pd.Series, final: pd.Series) -> None:
    """Show where curves differ: the fall from the initial loss takes at most half of the picture."""
    if not len(curve) or not len(final):
        return
    low, end = float(min(curve.min(), final.min())), float(final.max())
    top = min(float(curve.max()), end + (end - low) + 0.05 * end)
    seen = x[(curve <= top) & (x > 0)]
    if top > low and len(seen):
        margin = 0.04 * (top - low)
        axes.set_ylim(low - margin, top + margin)
        axes.set_xlim(float(seen.min()) / 1.3, axes.get_xlim()[1])


def human_ticks(axes: Axes, which: Literal["x", "y"] = "x") -> None:
    """Counts on a log axis, written as 20k, 50k, 100k."""
    log_ticks(axes, which, human)


def power_ticks(axes: Axes, most: int = 10) -> None:
    """Tokens or FLOPs on the log x axis, written as 2e11, 5e11, 1e12; at most so many of them."""
    log_ticks(axes, "x", flops, most)


def few_ticks(axes: Axes, which: Literal["x", "y"]) -> None:
    """Three or four named ticks, for small panels."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if axis.get_scale() == "log":
        log_ticks(axes, which, human, 4)
    else:
        axis.set_major_locator(MaxNLocator(3, prune="both"))
        axis.set_major_formatter(FuncFormatter(lambda v, _: human(v)))


def log_ticks(axes: Axes, which: Literal["x", "y"], name: Callable[[float], str], most: int = 10) -> None:
    """Named ticks at round numbers on a log axis."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    if low <= 0:
        return
    axis.set_major_locator(FixedLocator(round_numbers(low, high, most)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: name(v)))
    axis.set_minor_locator(NullLocator())
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two positive ones, no closer on a log axis than if `most` shared it evenly."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in _ROUND:
        found = [m * 10.0**k for k in powers for m in steps if low <= m * 10.0**k <= high]
        close = min((b / a for a, b in pairwise(found)), default=np.inf)
        if np.log(close) >= np.log(high / low) / most:
            break
    if len(found) < 2:  # a range as narrow as that is straight
        found = [float(t) for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    return _apart(found, np.log(high / low) / most)


def axis_scale(low: float, high: float) -> Literal["linear", "log"]:
    """Logarithmic for what spans a factor, but not for what runs into zero."""
    return "log" if 0 < 1.8 * low < high < 1e4 * low else "linear"


def closed(bounds: tuple[float, float], instead: tuple[float, float]) -> tuple[float, float]:
    """An interval whose open ends are put somewhere."""
    low, high = bounds
    return (low if np.isfinite(low) else instead[0]), (high if np.isfinite(high) else instead[1])


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Rising values without those whose names would run into their neighbour's: closer than `gap` in logarithms."""
    kept: list[float] = []
    for value in values:
        if not kept or np.log(value / kept[-1]) > 0.999 * gap:
            kept.append(value)
    return kept
