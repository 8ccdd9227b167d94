"""Tables of learning-rate sweeps on a known surface: ln loss rises as 1/2 CURVATURE (ln rate / best rate)^2."""

from typing import Any

import numpy as np
import pandas as pd

from tests.analysis.synthetic import surface

CURVATURE = 0.06
RATES = 2.0 ** np.arange(-3, 4)


def best_rate(N: Any, D: Any) -> Any:
    """The optimum law of the surface."""
    return 0.01 * (N / 1e5) ** -0.5 * (D / 1e7) ** 0.1


def tuned_by(table: pd.DataFrame, times: Any, *, noise: float = 0.002, seed: int = 1) -> pd.DataFrame:
    """The runs of a table at so many times their best rate, with the loss that costs and noise between seeds."""
    errors = noise * np.random.default_rng(seed).standard_normal(len(table))
    cost = 0.5 * CURVATURE * np.log(np.broadcast_to(times, len(table))) ** 2
    rates = best_rate(table["N"], table["D"]) * times
    return table.assign(learning_rate=rates, loss=table["loss"] * np.exp(cost + errors), family="llama")


def sweep(
    sizes: Any, tokens: Any, rates: Any = RATES, *, seeds: int = 1, noise: float = 0.002, seed: int = 2
) -> pd.DataFrame:
    """Every size crossed with every token count, multiple of the best rate and seed."""
    N, D, times, number = (a.ravel() for a in np.meshgrid(sizes, tokens, rates, np.arange(seeds), indexing="ij"))
    table = surface(N, D).assign(seed=number.astype(int))
    return tuned_by(table, times, noise=noise, seed=seed)
