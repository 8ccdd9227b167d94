"""Planted fans: loss against learning rate at several sizes, with known optima."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

SIZES = tuple(1e5 * 4.0**i for i in range(5))
RATES = tuple(0.01 * 2.0**i for i in range(-4, 5))


def best_rate(N: Any, D: Any = 1e8, power: float = -0.2, tokens: float = 0.1) -> Any:
    return 0.01 * (np.asarray(N) / 1.6e6) ** power * (np.asarray(D) / 1e8) ** tokens


def fan(
    sizes: Sequence[float] = SIZES,
    tokens: Sequence[float] = (1e8,),
    rates: Sequence[float] = RATES,
    *,
    seeds: int = 3,
    noise: float = 0.003,
    curvature: float = 0.05,
    seed: int = 0,
    **columns: Any,
) -> pd.DataFrame:
    """ln loss = ln lowest + curvature / 2 (ln rate - ln best)^2 + noise; the lowest falls with N and D."""
    generator = np.random.default_rng(seed)
    N, D, rate, number = (a.ravel() for a in np.meshgrid(sizes, tokens, rates, np.arange(seeds), indexing="ij"))
    away = np.log(rate / best_rate(N, D))
    loss = (1.5 + 20.0 * N**-0.2 + 10.0 * D**-0.2) * np.exp(0.5 * curvature * away**2)
    loss = loss * np.exp(noise * generator.standard_normal(len(N)))
    return pd.DataFrame({"N": N, "D": D, "learning_rate": rate, "seed": number, "loss": loss} | columns)


def crossed(sizes: Sequence[float] = SIZES, *, noise: float = 0.001, seed: int = 0) -> pd.DataFrame:
    """Rates crossed with batches: a tilted valley with the best batch at 1e5 (D / 1e8)^.5 tokens."""
    generator = np.random.default_rng(seed)
    batches = 1e5 * 2.0 ** np.arange(-3, 4)
    N, D, rate, batch = (a.ravel() for a in np.meshgrid(sizes, (5e7, 1e8, 4e8), RATES, batches, indexing="ij"))
    x, b = np.log(rate / best_rate(N, D)), np.log(batch / 1e5 / (D / 1e8) ** 0.5)
    loss = 3.0 * np.exp(0.03 * x**2 + 0.03 * b**2 - 0.02 * x * b + noise * generator.standard_normal(len(N)))
    return pd.DataFrame({"N": N, "D": D, "learning_rate": rate, "batch_tokens": batch, "loss": loss})
