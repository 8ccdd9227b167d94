"""The noise scale of gradients, tr(Sigma) / |G|^2: it predicts the critical batch to a factor (McCandlish et al. 2018).

It needs no sweep: a run that logs the gradient norms of a part and of the whole of its batch (`gradient_noise: true`)
tells it. What it guards against: a ratio of two noisy averages of which the lower one might be zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.uncertainty import interval
from analysis.verdicts import NAN, NOTHING, Estimate, Verdict, clean, refused
from sweeps.accounting import small_part
from sweeps.units import plural

SETTLED = 0.1
"""Gradient norms count from this share of a run on: its last decade of tokens."""


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """B_simple = tr(Sigma) / |G|^2 (McCandlish et al. 2018, appendix A), in the unit in which batches were given.

    gradient: |G|^2, the squared norm of the true gradient. trace: tr(Sigma), of one unit of a batch. rows: pairs of
    norms behind it. group: what they are of.
    """

    batch: Estimate
    gradient: float
    trace: float
    rows: int
    verdicts: tuple[Verdict, ...] = ()
    group: Mapping[str, Any] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        return refused(self.verdicts)

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("group", "batch", "gradient", "trace", "rows", "verdicts")}
        return clean(plain | {"refused": self.refused})


def gradient_noise(
    small_sq: Sequence[float] | np.ndarray | float,
    big_sq: Sequence[float] | np.ndarray | float,
    small: float,
    big: float,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    group: Mapping[str, Any] | None = None,
) -> NoiseScale:
    """The noise scale from squared gradient norms over batches of two sizes (McCandlish et al. 2018, appendix A.1).

    small_sq, big_sq: (rows,), the squared norms of one step each. small, big: the sizes of the two batches, in tokens
    or sequences; the result is in the same unit. Numerator and denominator are averaged over the rows before they are
    divided: each is free of bias, their ratio in a row is not. The interval is a bootstrap over rows. A gradient (or a
    trace) that is not above zero refuses. ValueError where the batches do not grow or the rows do not pair.
    """
    low, high = np.atleast_1d(np.asarray(small_sq, float)), np.atleast_1d(np.asarray(big_sq, float))
    if not 0 < small < big or low.shape != high.shape:
        raise ValueError(f"batches of {small:g} and {big:g} with {len(low)} and {len(high)} norms are no pairs")
    gradients = (big * high - small * low) / (big - small)
    traces = (low - high) / (1.0 / small - 1.0 / big)
    gradient, trace = (float(one.mean()) if len(one) else NAN for one in (gradients, traces))
    rows, verdicts = len(low), list[Verdict]()
    if not (gradient > 0 and trace > 0):
        what = "the true gradient" if not gradient > 0 else "the noise"
        message = (
            f"the squared norm of {what} comes out as {min(gradient, trace):.3g}, not above zero, over "
            f"{plural(rows, 'row')}: it is lost in the scatter. Log more rows, or use larger batches."
        )
        verdicts.append(Verdict("noise_scale_negative", "refuse", "fit", None, message))
        return NoiseScale(
            batch=NOTHING, gradient=gradient, trace=trace, rows=rows, verdicts=tuple(verdicts), group=group or {}
        )
    picks = np.random.default_rng(seed).integers(rows, size=(resamples, rows))
    above, below = traces[picks].mean(axis=1), gradients[picks].mean(axis=1)
    draws = np.where(below > 0, np.maximum(above, 0.0) / np.where(below > 0, below, 1.0), np.inf)
    bounds = interval(draws, level) if rows > 1 else (NAN, NAN)
    bounds = tuple(bound if np.isfinite(bound) else NAN for bound in bounds)  # type: ignore[assignment]
    if not np.isfinite(bounds).all():
        message = (
            "one row of gradient norms has no spread."
            if rows < 2
            else f"the gradient is not told from zero over {plural(rows, 'row')}: the noise scale has no upper bound."
        )
        verdicts.append(Verdict("open_interval", "caution", "parameter", "batch", message))
    estimate = Estimate(value=trace / gradient, interval=bounds)
    return NoiseScale(
        batch=estimate, gradient=gradient, trace=trace, rows=rows, verdicts=tuple(verdicts), group=group or {}
    )


def noise_scales(runs: pd.DataFrame, curves: pd.DataFrame, **options: Any) -> tuple[NoiseScale, ...]:
    """The noise scale in tokens of every (family, N, D, batch) whose runs logged `gradient_norm_small`.

    runs, curves: as of `load_runs` and `load_curves`. Seeds and learning rates of a group are pooled, from `SETTLED` of
    the run on; norms are those before clipping. Tokens of one sequence come together, so a token here is a sequence's
    share. options: of `gradient_noise`.
    """
    if "gradient_norm_small" not in curves.columns:
        return ()
    known = curves[curves["gradient_norm_small"].notna() & curves["gradient_norm"].notna()]
    known = known.drop(columns=["family", "N", "D"], errors="ignore").merge(
        runs[["cell", "family", "N", "D", "batch_tokens", "context"]], on="cell"
    )
    known = known[known["tokens"] >= SETTLED * known["D"]]
    found = []
    for key, rows in known.groupby(["family", "N", "D", "batch_tokens"]):
        context, batch = int(rows["context"].iloc[0]), float(rows["batch_tokens"].iloc[0])
        small = small_part(round(batch / context)) * context
        if small < batch:
            pair = (rows["gradient_norm_small"].to_numpy() ** 2, rows["gradient_norm"].to_numpy() ** 2)
            group = dict(zip(("family", "N", "D", "batch_tokens"), key))
            found.append(gradient_noise(*pair, small, batch, group=group, **options))
    return tuple(found)
