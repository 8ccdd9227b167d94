"""The critical batch: how large a batch may be before tokens are wasted, from sweeps over batches.

A sweep gives the steps S and tokens E that each batch takes to a target loss, and (S / S_min - 1) (E / E_min - 1) = 1
(McCandlish et al. 2018) gives B_crit = E_min / S_min. What it guards against: a B_crit read off a sweep that never
leaves one of the two straight ends of that curve. Gradient norms predict it to a factor (analysis/noise_scale.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.selection import with_states
from analysis.swept import SHAPES, told_apart
from analysis.uncertainty import SETTINGS, alike, exclusions, interval, seed_noise
from analysis.verdicts import NAN, NOTHING, Estimate, Interval, Verdict, clean, refused
from sweeps.errors import InputError
from sweeps.units import human, plural

LEAST_BATCHES = 3
"""A curve of two parameters, and one batch to contradict it: so many at one size and length are a sweep."""
SEEN = 2.0
"""B_crit is seen by batches that reach within this factor of it from both sides."""
BEYOND = 1.2
"""Steps over those of linear scaling at the critical batch as Zhang et al. 2024 define it."""
LEAST_SPAN = 2.0
"""Tokens of the longest target over those of the shortest: below, no growth of B_crit is told."""


@dataclass(frozen=True, kw_only=True)
class CriticalBatch:
    """The steps and tokens that batches take to one target loss, and the curve through them.

    group: {"family", "N" and, where they differ, "corpus", "width" ...}. target: nats per token. points: batch_tokens,
    learning_rate (the best at that batch; NaN where it changes with length), tokens, steps, error (standard error of ln
    tokens), fitted (tokens; NaN for small batches that took more than larger ones). batch: B_crit in tokens; tokens,
    steps: E_min and S_min. beyond_linear: the batch whose steps exceed linear scaling from the best batch of the sweep
    by 20% (Zhang et al. 2024), by interpolation and without the curve. scatter: of ln tokens about the curve. draws: ln
    B_crit and ln E_min under noise, (resamples, 2).
    """

    group: Mapping[str, Any]
    target: float
    points: pd.DataFrame
    batch: Estimate = NOTHING
    tokens: Estimate = NOTHING
    steps: Estimate = NOTHING
    beyond_linear: Estimate = NOTHING
    scatter: float = NAN
    verdicts: tuple[Verdict, ...] = ()
    draws: np.ndarray = field(default_factory=lambda: np.empty((0, 2)), repr=False, compare=False)

    @property
    def name(self) -> str:
        """Of what: "llama", "llama mup depth=4"."""
        return " ".join(f"{k}={v:g}" if isinstance(v, float) else str(v) for k, v in self.group.items() if k != "N")

    @property
    def refused(self) -> bool:
        return refused(self.verdicts)

    def to_json(self) -> dict[str, Any]:
        names = ("group", "target", "batch", "tokens", "steps", "beyond_linear", "scatter", "verdicts")
        plain = {name: getattr(self, name) for name in names} | {"points": self.points.to_dict("records")}
        return clean(plain | {"refused": self.refused})


@dataclass(frozen=True, kw_only=True)
class CriticalBatches:
    """The critical batches of a study and, by family (and corpus ... where they differ), how they grow with tokens:
    B_crit ~ E_min ^ exponent."""

    sweeps: tuple[CriticalBatch, ...]
    growth: Mapping[str, Estimate]
    verdicts: tuple[Verdict, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return clean(
            {"sweeps": [one.to_json() for one in self.sweeps], "growth": self.growth, "verdicts": self.verdicts}
        )


def sweeps_batches(runs: pd.DataFrame) -> bool:
    """Whether the runs, of `load_runs` or `read_table`, are a sweep over batches: at some N and D, to whole batches."""
    if "batch_tokens" not in runs.columns:
        return False
    usable = runs[exclusions(runs).isna()]
    return bool((usable.groupby([usable["N"], usable["D"].round(-2)])["batch_tokens"].nunique() >= LEAST_BATCHES).any())


def critical_batches(
    runs: pd.DataFrame,
    curves: pd.DataFrame | None = None,
    *,
    targets: Sequence[float] | np.ndarray | None = None,
    loss: str | None = None,
    resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> CriticalBatches:
    """B_crit of every (family, N) whose runs vary the batch, at several target losses, and its growth with tokens.

    Corpora, contexts, shapes ... that differ are told apart. Tokens to a target are interpolated, ln loss in ln tokens:
    between final losses, at the best setting (learning rate, weight decay ...) of each batch and length, where batches
    were trained for two or more lengths; else along the curves, at the setting that gets there first, which is only
    fair where the rate is not annealed. targets: nats; by default four that all batches reach, or most. A loss between
    seeds that is noisier than the differences of batches shows in the intervals. Rows without a positive N, D, batch
    and loss do not count. Raises InputError for a missing column.
    """
    found: list[CriticalBatch] = []
    verdicts: list[Verdict] = []
    loss = loss or ("val_loss_final" if "val_loss_final" in runs.columns else "loss")
    if missing := [c for c in ("N", "D", "batch_tokens", loss) if c not in runs.columns]:
        raise InputError(
            f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, runs.columns))}. Read a file of "
            "your own with analysis.read_table, which finds common names."
        )
    kept = with_states(runs)
    kept = kept[kept["excluded"].isna()] if "excluded" in kept.columns else kept
    numbers = kept[["N", "D", "batch_tokens", loss]].astype(float)
    kept = kept[((numbers > 0) & np.isfinite(numbers)).all(axis=1)]
    kept = kept.assign(**alike(kept, ["N", "D", *(c for c in SETTINGS if c in kept.columns)]))
    noise = seed_noise(kept, loss)
    told = kept["family"] if "family" in kept.columns else pd.Series(None, index=kept.index, dtype=object)
    kept = kept.assign(family=told.astype(object).where(told.notna(), ""))
    apart = [c for c in told_apart(kept) if c != "family"]
    for order, (_, rows) in enumerate(kept.groupby(["family", "N", *apart], dropna=False)):
        if rows["batch_tokens"].nunique() < 2:
            continue
        paths, said = _paths(rows, curves, loss, noise.sd if noise else NAN)
        first = rows.iloc[0]
        known = [c for c in apart if not pd.isna(first[c])]
        group = {"family": first["family"], "N": float(first["N"])}
        group |= {c: float(first[c]) if isinstance(first[c], int | float | np.number) else first[c] for c in known}
        verdicts += [v for v in said if v not in verdicts]
        for target in _targets(paths) if targets is None or not len(targets) else targets:
            found.append(_sweep(group, float(target), paths, resamples, level, [seed, order]))
    growth: dict[str, Estimate] = {}
    # N and the shape do not move it (Zhang et al. 2024)
    kinds = [" ".join(str(v) for k, v in one.group.items() if k not in ("N", *SHAPES)) for one in found]
    for kind in dict.fromkeys(kinds):
        good = [one for one, own in zip(found, kinds) if own == kind and not one.refused]
        growth[kind], said = _growth(kind, good, level)
        verdicts += said
    return CriticalBatches(sweeps=tuple(found), growth=growth, verdicts=tuple(verdicts))


def fit_critical_batch(batches: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln B_crit, ln E_min and the root mean square misfit of ln tokens, each (draws,).

    batches: (n,), tokens an optimizer step; tokens: (draws, n), tokens to the target at each. Least squares in ln E of
    E = E_min (1 + B / B_crit), which is (S / S_min - 1) (E / E_min - 1) = 1 in terms of the batch; E_min follows from
    B_crit, so one number is searched, on a grid from a hundredth of the smallest batch to a hundred times the largest.
    """
    x, y = np.log(np.asarray(batches, float)), np.log(np.atleast_2d(tokens))
    low, high = x.min() - np.log(100.0), x.max() + np.log(100.0)
    center, width = np.full(len(y), (low + high) / 2), (high - low) / 2
    for _ in range(7):  # each round looks eight times closer
        grid = np.clip(center[:, None] + np.linspace(-width, width, 41), low, high)
        bend = np.logaddexp(0.0, x[None, None, :] - grid[:, :, None])
        rest = y[:, None, :] - bend
        misfit = rest.var(axis=2)
        best = misfit.argmin(axis=1)
        center, width = grid[np.arange(len(y)), best], width / 8
    level = (y - np.logaddexp(0.0, x - center[:, None])).mean(axis=1)
    return center, level, np.sqrt(misfit.min(axis=1))


def _sweep(
    group: Mapping[str, Any], target: float, paths: pd.DataFrame, resamples: int, level: float, seed: Sequence[int]
) -> CriticalBatch:
    reached = _reached(paths, target)
    points = reached.drop(columns=["before", "after", "share"])
    blank = CriticalBatch(group=group, target=target, points=points)
    where = f"{blank.name or 'runs'} with N = {human(group['N'])} at {target:.4g} nats"
    if points.empty:
        few = Verdict("too_few_levels", "refuse", "fit", None, f"{where}: no batch size reached it.")
        return replace(blank, verdicts=(few,))
    taken = points["tokens"].to_numpy(float)
    small = (np.arange(len(taken)) < taken.argmin()) & (taken > BEYOND * taken.min())
    used, verdicts = reached[~small], list[Verdict]()
    if small.any():
        message = (
            f"{where}: {plural(int(small.sum()), 'small batch size')} took over {BEYOND - 1:.0%} more tokens than "
            "larger ones, which no critical batch explains (decay or betas were not tuned to it): not fitted."
        )
        verdicts.append(Verdict("line_misfit", "info", "fit", None, message))
    if len(used) < LEAST_BATCHES:
        message = f"{where}: {plural(len(used), 'batch size')} from the best one on; B_crit needs {LEAST_BATCHES}."
        few = Verdict("too_few_levels", "refuse", "fit", None, message)
        return replace(blank, verdicts=(*verdicts, few))
    batches, tokens = used["batch_tokens"].to_numpy(float), used["tokens"].to_numpy(float)
    (log_batch,), (log_tokens,), (misfit,) = fit_critical_batch(batches, tokens)
    points = points.assign(fitted=pd.Series(_curve(log_batch, log_tokens, batches), index=used.index))
    freedom = len(used) - 2
    scatter = float(misfit * np.sqrt(len(used) / freedom))
    # Noise: between seeds where it is known, and no less than the curve leaves.
    errors = used["error"].to_numpy(float)
    errors = np.maximum(np.where(np.isfinite(errors), errors, 0.0), scatter)
    shocks = _shocks(used, paths, freedom, resamples, seed)
    copies = np.log(tokens) + shocks * errors
    drawn_batch, drawn_tokens, _ = fit_critical_batch(batches, np.exp(copies))
    low, high = batches.min(), batches.max()
    batch = float(np.exp(log_batch))
    bounds = interval(drawn_batch, level)
    edges = (np.log(low / SEEN), np.log(high * SEEN))
    if not low / SEEN <= batch <= high * SEEN:
        end = (
            f"tokens hardly grow up to the largest batch ({high:,.0f} tokens). Add larger batches"
            if batch > high
            else f"tokens grow in proportion to the batch from the smallest on ({low:,.0f} tokens). Add smaller batches"
        )
        message = f"{where}: the sweep does not bend: {end}."
        verdicts.append(Verdict("no_bend", "refuse", "fit", None, message, {"batch": batch, "batches": [low, high]}))
    open_ends: Interval = (
        float(np.exp(bounds[0])) if bounds[0] > edges[0] else NAN,
        float(np.exp(bounds[1])) if bounds[1] < edges[1] else NAN,
    )
    if not refused(verdicts) and not np.isfinite(open_ends).all():
        message = f"{where}: under noise B_crit leaves the range of the batches, so its interval is open at that end."
        verdicts.append(Verdict("open_interval", "caution", "parameter", "batch", message))
    beyond = _beyond_linear(batches, np.vstack([np.log(tokens), copies]))
    if refused(verdicts):
        found = {"beyond_linear": _estimate(beyond[0], beyond[1:], level)}
    else:
        drawn = {"batch": drawn_batch, "tokens": drawn_tokens, "steps": drawn_tokens - drawn_batch}
        value = {"batch": log_batch, "tokens": log_tokens, "steps": log_tokens - log_batch}
        found = {name: _estimate(np.exp(value[name]), np.exp(drawn[name]), level) for name in value}
        found["batch"] = Estimate(value=batch, interval=open_ends)
        found["beyond_linear"] = _estimate(beyond[0], beyond[1:], level)
    draws = np.stack([drawn_batch, drawn_tokens], axis=1)
    return CriticalBatch(
        group=group, target=target, points=points, scatter=scatter, verdicts=tuple(verdicts), draws=draws, **found
    )


def _shocks(used: pd.DataFrame, paths: pd.DataFrame, freedom: int, resamples: int, seed: Sequence[int]) -> np.ndarray:
    """Draws of t-distributed noise of scale 1 for points that lie between two knots, (resamples, points). Targets of a
    group that hang on the same runs have the same shocks, so that chance in one run moves all of them."""
    generator = np.random.default_rng(seed)
    rows = np.searchsorted(np.sort(paths["batch_tokens"].unique()), used["batch_tokens"])
    first, last = used["before"].to_numpy(int), used["after"].to_numpy(int)
    ways = paths["batch_tokens"].nunique(), int(paths["knot"].max()) + 1
    shocks = generator.standard_normal((resamples, *ways))
    share = np.where(first == last, 0.0, used["share"].to_numpy(float))
    mixed = (1.0 - share) * shocks[:, rows, first] + share * shocks[:, rows, last]
    scale = np.sqrt(freedom / generator.chisquare(freedom, resamples))[:, None]
    return np.asarray(mixed / np.hypot(1.0 - share, share) * scale)


def _curve(log_batch: float, log_tokens: float, batches: np.ndarray) -> np.ndarray:
    return np.exp(log_tokens + np.logaddexp(0.0, np.log(batches) - log_batch))


def _estimate(value: float, draws: np.ndarray, level: float) -> Estimate:
    if not np.isfinite(value):
        return NOTHING
    known = np.isfinite(draws).mean() > 0.5 + level / 2  # else an end of the interval is not there to be seen
    return Estimate(value=float(value), interval=interval(draws, level) if known else (NAN, NAN))


def _beyond_linear(batches: np.ndarray, log_tokens: np.ndarray) -> np.ndarray:
    """The batch from which on tokens stay above BEYOND times the least, (draws,); NaN where they are not at the end."""
    x, found = np.log(batches), np.full(len(log_tokens), NAN)
    for draw, y in enumerate(log_tokens - log_tokens.min(axis=1, keepdims=True) - np.log(BEYOND)):
        if y[-1] >= 0:
            k = int(np.flatnonzero(y < 0)[-1])
            found[draw] = np.exp(x[k] - y[k] * (x[k + 1] - x[k]) / (y[k + 1] - y[k]))
    return found


def _growth(family: str, good: Sequence[CriticalBatch], level: float) -> tuple[Estimate, list[Verdict]]:
    """d ln B_crit / d ln E_min over the sweeps of a family, whatever their N (Zhang et al. 2024 find none in N)."""
    tokens = np.array([one.tokens.value for one in good])
    if len(good) < 3 or tokens.max() < LEAST_SPAN * tokens.min():
        message = (
            f"{family or 'runs'}: {plural(len(good), 'target')} with a critical batch do not tell how it grows with "
            f"tokens; that takes 3 that span a factor of {LEAST_SPAN:g}. Train longer, or at more sizes."
        )
        return NOTHING, [Verdict("no_power_law", "caution", "decision", family or None, message)]
    best = np.polyfit(np.log(tokens), np.log([one.batch.value for one in good]), 1)[0]
    x, y = (np.stack([one.draws[:, k] for one in good], axis=1) for k in (1, 0))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    slopes = (x * y).sum(axis=1) / np.square(x).sum(axis=1)
    return Estimate(value=float(best), interval=interval(slopes, level)), []


# --- tokens to a loss --------------------------------------------------------------------------------------------


def _paths(rows: pd.DataFrame, curves: pd.DataFrame | None, loss: str, sd: float) -> tuple[pd.DataFrame, list[Verdict]]:
    """Falling losses along tokens, from final losses of several lengths, else from curves: batch_tokens, learning_rate,
    setting (a number for all other hyperparameters), path (what belongs together), x = ln tokens, y = ln loss, error
    (of y), knot (where equal, chance is common: of one length, or all along a curve)."""
    rates = rows["learning_rate"] if "learning_rate" in rows.columns else pd.Series(NAN, index=rows.index)
    rows = rows.assign(learning_rate=rates.astype(float).fillna(-1.0))
    others = [c for c in SETTINGS if c in rows.columns and c not in ("batch_tokens", "learning_rate")]
    rows["setting"] = rows.groupby(others, dropna=False).ngroup() if others else 0
    lengths = rows.groupby("batch_tokens")["D"].nunique()
    if (lengths >= 2).sum() >= LEAST_BATCHES:
        # the best rate (and decay, warm-up ...) of each length: one that is best at all lengths there need not be
        at = ["batch_tokens", "D", "learning_rate", "setting"]
        groups = rows.assign(y=np.log(rows[loss].astype(float))).groupby(at)["y"]
        means = groups.agg(["mean", "count"]).reset_index()
        best = means.loc[means.groupby(["batch_tokens", "D"])["mean"].idxmin()]
        best = best[best["batch_tokens"].map(lengths) >= 2]
        error = sd / np.sqrt(best["count"])
        best = best.assign(x=np.log(best["D"].astype(float)), y=best["mean"], error=error, path="final")
        knots = best["D"].rank(method="dense").astype(int)
        return best.assign(learning_rate=-1.0, setting=0, knot=knots)[[*_PATH]], []
    if curves is None or curves.empty:
        message = (
            "final losses at one length each do not tell how many tokens a batch takes to a given loss. Train every "
            "batch for two or more lengths, or give the curves."
        )
        return pd.DataFrame(columns=list(_PATH)), [Verdict("too_few_horizons", "refuse", "fit", None, message)]
    own = curves[curves["val_loss"].notna() & (curves["tokens"] > 0)][["cell", "tokens", "val_loss"]]
    warm = rows["warmup_tokens"].fillna(0.0) if "warmup_tokens" in rows.columns else 0.0
    own = own.merge(rows.assign(warm=warm)[["cell", "batch_tokens", "learning_rate", "setting", "warm"]], on="cell")
    own = own[own["tokens"] > own["warm"]]  # until then a loss says more about the warm-up than about the batch
    table = own.assign(
        x=np.log(own["tokens"].astype(float)), y=np.log(own["val_loss"]), error=sd, path=own["cell"], knot=0
    )
    annealed = "schedule" not in rows.columns or not rows["schedule"].isin(["constant", "wsd"]).all()
    said = []
    if annealed:
        message = (
            "tokens to a loss are read off curves whose learning rate is annealed: losses on the way are higher than "
            "those of a run that ends there. Use schedule constant or wsd, or several lengths of every batch."
        )
        said.append(Verdict("annealed_curves", "caution", "fit", None, message))
    return table[[*_PATH]], said


_PATH = ("batch_tokens", "learning_rate", "setting", "path", "knot", "x", "y", "error")


def _targets(paths: pd.DataFrame) -> list[float]:
    """Four losses that as many batches pass as pass any, evenly in ln loss from the lowest on."""
    if paths.empty:
        return []
    ends = paths.groupby("batch_tokens")["y"].agg(["min", "max"])
    tried = np.linspace(ends["min"].min(), ends["max"].max(), 2001)
    passing = ((ends["min"].to_numpy()[:, None] <= tried) & (tried < ends["max"].to_numpy()[:, None])).sum(axis=0)
    common = tried[passing == passing.max()]
    return [float(np.exp(y)) for y in np.linspace(common[0], common[-1], 4)]


def _reached(paths: pd.DataFrame, target: float) -> pd.DataFrame:
    """The tokens, steps and error of ln tokens of each batch at a target loss, at its best rate and setting."""
    found = []
    for (batch, rate, setting, _), path in paths.groupby(["batch_tokens", "learning_rate", "setting", "path"]):
        path = path.sort_values("x")
        x, y = path["x"].to_numpy(float), path["y"].to_numpy(float) - np.log(target)
        falls = np.flatnonzero((y[:-1] > 0) & (y[1:] <= 1e-12))
        if len(falls):
            k = falls[0]
            slope = (y[k + 1] - y[k]) / (x[k + 1] - x[k])
            knots = path["knot"].to_numpy(int)[k : k + 2]
            share = -y[k] / (y[k + 1] - y[k])
            found.append((batch, rate, setting, x[k] - y[k] / slope, path["error"].iloc[k] / abs(slope), *knots, share))
    names = ["batch_tokens", "learning_rate", "setting", "ln", "error", "before", "after", "share"]
    table = pd.DataFrame(found, columns=names)
    groups = table.groupby(["batch_tokens", "learning_rate", "setting"], as_index=False)
    one = {name: (name, "first") for name in ("before", "after", "share")}
    mean = groups.agg(ln=("ln", "mean"), error=("error", "mean"), count=("ln", "size"), **one)
    mean["error"] /= np.sqrt(mean["count"])
    best = mean.loc[mean.groupby("batch_tokens")["ln"].idxmin()].reset_index(drop=True)
    best = best.assign(tokens=np.exp(best["ln"]), learning_rate=best["learning_rate"].where(best["learning_rate"] > 0))
    best["steps"] = best["tokens"] / best["batch_tokens"]
    return best[["batch_tokens", "learning_rate", "tokens", "steps", "error", "before", "after", "share"]]
