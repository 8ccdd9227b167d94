"""The weight decay's timescale: where the loss is lowest in terms of tau = B / (eta lambda D).

AdamW's weights are an average over past updates with the time scale 1 / (eta lambda) steps (Wang & Aitchison 2024); tau
is that as a fraction of the run. Bergsma et al. 2025 (Power Lines) find the best tau to be a power law of tokens per
parameter alone, so it is printed beside what a study measures; the failure guarded against is a decay called tuned that
was tuned at another rate, batch or length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.published import published_timescale
from analysis.selection import with_states
from analysis.swept import told_apart
from analysis.uncertainty import SETTINGS, alike, interval, merged, seed_noise
from analysis.verdicts import NAN, NOTHING, Estimate, Verdict, clean, refused
from sweeps.errors import InputError

LEAST = 3
"""Decays, and timescales, of one size and length from which on a study varies them."""


@dataclass(frozen=True, kw_only=True)
class Timescale:
    """The best AdamW timescale of one group {"N", "D" and, where told, "family", "parametrisation"; "corpus", "width"
    ... where they differ}, as a fraction of the run.

    best: the vertex of a parabola in ln tau through the lowest point and its neighbours, with its interval under seed
    noise. published: Power Lines' value at the group's tokens per parameter. points: timescale, loss (nats; of the best
    other settings at it, mean over seeds), count.
    """

    group: Mapping[str, Any]
    best: Estimate
    published: float
    points: pd.DataFrame
    verdicts: tuple[Verdict, ...] = ()

    @property
    def refused(self) -> bool:
        return refused(self.verdicts)

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("group", "best", "published", "verdicts")}
        return clean(plain | {"points": self.points.to_dict("records")})


def decay_timescales(
    runs: pd.DataFrame, *, loss: str | None = None, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Timescale, ...]:
    """The best timescale of every family, parametrisation, N and D that varies the weight decay over three values or
    more; of a study or a table of N, D (tokens), weight_decay, learning_rate, batch_tokens and a loss (nats).

    Corpora, contexts, shapes ... are told apart; of all other settings the best stands for a timescale. Trials of a
    search do not count: no two of them differ in the decay alone. Raises InputError for a missing column.
    """
    loss = loss or ("val_loss_final" if "val_loss_final" in runs.columns else "loss")
    own = ("adamw_timescale",) if "adamw_timescale" in runs.columns else ("learning_rate", "batch_tokens")
    if missing := [c for c in ("N", "D", "weight_decay", *own, loss) if c not in runs.columns]:
        raise InputError(
            f"the table lacks {', '.join(missing)}; a decay's timescale is batch_tokens / (learning_rate weight_decay "
            f"D). It has {', '.join(map(str, runs.columns))}: name them to analysis.read_table."
        )
    kept = with_states(runs)
    kept = kept[kept["excluded"].isna()] if "excluded" in kept.columns else kept
    kept = kept[kept["search"].isna()] if "search" in kept.columns else kept
    kept = kept.assign(timescale=_timescales(kept))
    values = kept[loss].astype(float)
    kept = kept[np.isfinite(values) & (values > 0) & kept["timescale"].notna()]
    others = [c for c in SETTINGS if c in kept.columns and c != "weight_decay"]
    kept = kept.assign(
        **alike(kept, ["N", "D", "weight_decay", *others]), timescale=merged(kept["timescale"].to_numpy())
    )
    noise, found = seed_noise(kept, loss), []
    told = [c for c in ("family", "parametrisation") if c in kept.columns and kept[c].notna().any()]
    keys = [*dict.fromkeys([*told, *told_apart(kept)]), "N", "D"]
    for _, rows in kept.groupby(keys, dropna=False):
        if min(rows["weight_decay"].nunique(), rows["timescale"].nunique()) < LEAST:
            continue
        means = rows.groupby(["timescale", *others], dropna=False)[loss].agg(["mean", "count"])
        table = means.loc[means.groupby("timescale")["mean"].idxmin()].reset_index()
        points = table.rename(columns={"mean": "loss"})[["timescale", "loss", "count"]]
        x, y = np.log(points["timescale"].to_numpy(float)), np.log(points["loss"].to_numpy(float))
        value, verdicts = _vertex(x, y[None])[0], []
        best = NOTHING
        if np.isfinite(value):
            bounds = (NAN, NAN)
            if noise is not None:
                generator = np.random.default_rng(seed)
                errors = noise.draw(generator, resamples)[:, None] / np.sqrt(points["count"].to_numpy(float))
                draws = _vertex(x, y + errors * generator.standard_normal((resamples, len(y))))
                inside = np.isfinite(draws).mean() >= level
                bounds = interval(np.exp(draws), level) if inside else bounds
            best = Estimate(value=float(np.exp(value)), interval=bounds)
        else:
            message = (
                f"the lowest loss lies at an end of the timescales tried ({points['timescale'].min():.3g} to "
                f"{points['timescale'].max():.3g} of the run). Try weight decays beyond it."
            )
            verdicts.append(Verdict("edge_minimum", "refuse", "fit", None, message))
        first = rows.iloc[0]
        group = {k: first[k] for k in keys if not pd.isna(first[k])}
        published = published_timescale(float(rows["D"].iloc[0]) / float(rows["N"].iloc[0]))
        found.append(Timescale(group=group, best=best, published=published, points=points, verdicts=tuple(verdicts)))
    return tuple(found)


def _timescales(runs: pd.DataFrame) -> np.ndarray:
    """tau of each run, (n,), NaN without decay."""
    if "adamw_timescale" in runs.columns:
        return runs["adamw_timescale"].to_numpy(dtype=float)
    rate, decay, batch, D = (
        runs[c].to_numpy(dtype=float) for c in ("learning_rate", "weight_decay", "batch_tokens", "D")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(rate * decay > 0, batch / (rate * decay * D), NAN)


def _vertex(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The vertex of the parabola through the lowest point of each row of y (draws, n) and its two neighbours, (draws,);
    NaN where that point is an end."""
    best = y.argmin(axis=1)
    inner = np.clip(best, 1, len(x) - 2)
    rows = np.arange(len(y))
    xl, xm, xr = (x[inner + k] for k in (-1, 0, 1))
    yl, ym, yr = (y[rows, inner + k] for k in (-1, 0, 1))
    left, right = (xm - xl) * (ym - yr), (xm - xr) * (ym - yl)
    top, bottom = (xm - xl) * left - (xm - xr) * right, left - right
    vertex = xm - 0.5 * top / np.where(bottom == 0, np.nan, bottom)
    return np.where(best == inner, vertex, np.nan)
