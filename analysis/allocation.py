"""Allocation: how compute should be split between parameters and tokens, under the FLOP counter of the runs.

The compute-optimal split minimises numerically under the counter of the runs themselves. A closed form exists only for
C = 6 N D, and the two differ by tens of percent in small models, whose head and attention cost much.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.laws import CHINCHILLA, Law

Array = np.ndarray
Counter = Callable[[Array], Array]
"""Training FLOPs per token as a function of N."""


def six_n(N: Array) -> Array:
    """The rule of thumb of 6 N FLOPs per trained token (Kaplan et al. 2020)."""
    return 6.0 * np.asarray(N, dtype=float)


def interpolated_counter(N: Any, flops_per_token: Any) -> Counter:
    """FLOPs per token read off the runs: ln(FLOPs per token / N) interpolated in ln N, constant beyond the sizes run.

    It goes through every size exactly, which makes it right for reading D off C, and wrong for a search: an optimum
    sticks to its kinks.
    """
    x, inverse = np.unique(np.log(np.asarray(N, dtype=float)), return_inverse=True)
    ratio = np.log(np.asarray(flops_per_token, dtype=float)) - x[inverse]
    mean = np.bincount(inverse, ratio) / np.bincount(inverse)
    return lambda sizes: np.exp(np.log(sizes) + np.interp(np.log(sizes), x, mean))


def smooth_counter(N: Any, flops_per_token: Any) -> Counter:
    """FLOPs per token as a smooth function of N, for the search of an optimum and beyond the sizes run.

    FLOPs per token / N = 6 + c / N^p by least squares, p on a grid: attention, head and tables weigh less and less as
    a model grows, and the ratio settles at 6. A constant ratio is taken where that fits better (C = k N D). It stays
    within half and twice the ratios seen.
    """
    x = np.log(np.asarray(N, dtype=float))
    ratios = np.exp(np.log(np.asarray(flops_per_token, dtype=float)) - x)
    center, constant = float(x.mean()), float(np.exp(np.log(ratios).mean()))
    best = (float(np.square(constant / ratios - 1.0).sum()), constant, 0.0, 1.0)
    for p in np.linspace(0.05, 1.5, 30) if best[0] > 1e-18 * len(x) else ():
        falling, wanted = np.exp(-p * (x - center)) / ratios, 1.0 - 6.0 / ratios
        c = float(falling @ wanted / (falling @ falling))
        error = float(np.square(falling * c - wanted).sum())
        if error < best[0]:
            best = (error, 6.0, c, float(p))
    _, level, c, p = best
    low, high = float(ratios.min()) / 2.0, float(ratios.max()) * 2.0

    def counter(sizes: Array) -> Array:
        falling = np.exp(-p * np.clip(np.log(sizes) - center, -100.0, 100.0))
        return np.asarray(np.asarray(sizes) * np.clip(level + c * falling, low, high))

    return counter


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal model: arrays over whatever the parameters and C broadcast to."""

    N: Array
    D: Array
    loss: Array


def optimum(C: Any, params: Mapping[str, Any], counter: Counter = six_n, law: Law = CHINCHILLA) -> Optimum:
    """Minimise the loss of a law of N and D over N with D = C / counter(N), by a search that narrows step by step.

    C and the parameters may be arrays of one shape (bootstrap draws). An optimum outside 1 .. 1e18 parameters comes
    back as NaN: there the law has no interior minimum to speak of.
    """
    shape = np.broadcast_shapes(np.shape(C), *(np.shape(v) for v in params.values()))
    flops = np.broadcast_to(np.asarray(C, dtype=float), shape).ravel()[:, None]
    own = {k: np.broadcast_to(np.asarray(v, dtype=float), shape).ravel()[:, None] for k, v in params.items()}
    low, high = np.full((flops.size, 1), 0.0), np.full((flops.size, 1), np.log(1e18))
    steps = np.linspace(0.0, 1.0, 41)
    # A constant term would cost the digits that tell neighbours apart.
    falling = replace(law, terms=tuple(t for t in law.terms if t.features)) if law.terms else law
    with np.errstate(all="ignore"):
        for _ in range(9):
            grid = low + (high - low) * steps
            sizes = np.exp(grid)
            losses = falling.log_response({"N": sizes, "D": flops / counter(sizes)}, own)
            best = np.argmin(np.where(np.isnan(losses), np.inf, losses), axis=1)[:, None]
            low = np.take_along_axis(grid, np.maximum(best - 1, 0), axis=1)
            high = np.take_along_axis(grid, np.minimum(best + 1, len(steps) - 1), axis=1)
        size = np.exp((low + high) / 2)
        tokens = flops / counter(size)
        lost = (size < 1.5) | (size > 6e17) | ~np.isfinite(losses.min(axis=1, keepdims=True))
        N, D = np.where(lost, np.nan, size), np.where(lost, np.nan, tokens)
        loss = law({"N": N, "D": D}, own)
    return Optimum(*(a.ravel().reshape(shape) for a in (N, D, loss)))


def compute_for_loss(loss: float, params: Mapping[str, Any], counter: Counter = six_n, law: Law = CHINCHILLA) -> Array:
    """The least training FLOPs that reach a loss (nats per token), by bisection in ln C between 1 and 1e40 FLOPs.

    NaN where the law does not come down to that loss. Parameters may be arrays of one shape.
    """

    def enough(logs: Array) -> Array:
        reached = optimum(np.exp(logs), params, counter, law).loss
        return np.isfinite(reached) & (reached <= loss)

    # 1. the first decade that reaches it; there may be no optimum before it, where compute is too little, nor beyond
    shape, decade = np.broadcast_shapes(*(np.shape(v) for v in params.values())), np.log(10.0)
    first = np.full(shape, np.nan)
    for i in range(40, 0, -1):
        first = np.where(enough(np.full(shape, i * decade)), i * decade, first)

    # 2. the place within it
    low, high = first - decade, first
    for _ in range(30):
        middle = (low + high) / 2
        found = enough(np.where(np.isnan(middle), 0.0, middle))
        low, high = np.where(found, low, middle), np.where(found, middle, high)
    return np.exp((low + high) / 2)


def regret(
    C: float, factor: float, params: Mapping[str, Any], counter: Counter = six_n, law: Law = CHINCHILLA
) -> Array:
    """What it costs to train a model `factor` times the best size at the same compute: nats per token lost."""
    best = optimum(C, params, counter, law)
    size = best.N * factor
    own = {k: np.asarray(v, dtype=float) for k, v in params.items()}
    return np.asarray(law({"N": size, "D": C / counter(size)}, own) - best.loss)
