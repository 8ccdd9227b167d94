"""A store with the four studies of hyperparameters that the third notebook reads, with losses that were planted."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from tests.analysis.synthetic import Run, write_study

RATES = tuple(float(f"{0.0005 * 2**i:.6g}") for i in range(9))


def loss(N: float, D: float, rate: float, *, seed: int = 0, batch: float = 256.0, power: float = -0.5) -> float:
    """A valley in ln rate, whose lowest point falls with N and rises with the batch; small batches are best."""
    best = 0.005 * (N / 4e4) ** power * (D / 1e5) ** -0.1 * (batch / 256) ** 0.3
    lowest = (1.0 + 31.5 * N**-0.4 + 151.0 * D**-0.4) * (1.0 + batch / 4e3)
    noise = np.random.default_rng([seed, round(1e7 * rate), round(N), round(D), round(batch)]).standard_normal()
    return float(lowest * np.exp(0.04 * np.log(rate / best) ** 2 + 0.003 * noise))


def size(width: int) -> float:
    """N of a `Run` of two layers."""
    return 24 * width**2 + 256 * width


def write_sweeps(root: Path) -> Path:
    """Write the store; returns its root."""

    def run(width: int, tokens: int, rate: float, seed: int, batch: int = 256, **changes: object) -> Run:
        found = loss(size(width), tokens, rate, seed=seed, batch=batch)
        fields = {"learning_rate": rate, "batch_tokens": batch, **changes}
        return Run(width=width, tokens=tokens, seed=seed, loss=found, changes=fields)

    widths, lengths, seeds = (16, 24, 36, 48), (81_920, 163_840, 327_680), (0, 1, 2)
    many = [run(*one) for one in product(widths, lengths[::2], RATES, seeds)]
    write_study(root, many, name="lr-sensitivity")
    crossed = product((24, 36), lengths[::2], (0.002, 0.004, 0.008, 0.016, 0.032), seeds[:2], (128, 256, 512, 1024))
    write_study(root, [run(*one) for one in crossed], name="batch-size")
    default = [
        replace(run(*one), labels={"learning_rate_times": one[2] / RATES[1]})
        for one in product(widths, lengths, RATES[1:8], seeds[:2])
    ]
    write_study(root, default, name="tuned-small-against-untuned-large")
    transfer = []
    for (kind, power), width, rate, seed in product((("standard", -0.5), ("mup", 0.0)), widths, RATES[1:8], seeds[:2]):
        found = loss(size(width), lengths[0], rate, seed=seed, power=power)
        base = {"kind": kind, "base_width": 16, "base_head_dim": 8, "base_depth": 2}
        fields = {"learning_rate": rate, "batch_tokens": 256} | (
            {} if kind == "standard" else {"parametrisation": base}
        )
        transfer.append(Run(width=width, tokens=lengths[0], seed=seed, loss=found, changes=fields))
    return write_study(root, transfer, name="mup-transfer")
