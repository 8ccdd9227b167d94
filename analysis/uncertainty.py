"""How far a loss can be trusted: noise between seeds, and sampling error of the validation text.

Two different errors. Training again with another seed moves a loss by the seed noise; it is what a fit has to
survive. Scoring on other documents moves all losses together (the level error) and the difference between two models
very little, because both read the same documents: that paired error says which differences between neighbouring
sizes can be seen at all. Tokens of one document are not independent, so documents are the unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import fdtrc

from analysis.runs import load_documents, load_runs
from analysis.verdicts import NAN, OPEN, Interval, Verdict
from sweeps.store import Store

SEEDS = ("seed", "data_seed")
SETTINGS = (
    *("learning_rate", "weight_decay", "beta2", "batch_tokens", "warmup_tokens", "precision"),
    *("schedule", "cooldown_fraction", "cooldown_shape", "parametrisation"),
    *("optimizer", "init_std", "beta1", "eps", "clip_norm", "final_fraction"),
)
"""Hyperparameters that a study may vary at fixed N and D: all that a recipe has, else one would pass for a seed."""
DESIGN = (
    *("family", "N", "D", "C", *SETTINGS, "steps", "width", "depth", "heads", "mlp_width"),
    *("corpus", "tokenizer", "context"),
    *("U", "experts", "x", "S1", "S2"),  # what laws vary beside N, D and C
)
"""What tells runs apart beside their seeds."""
SAME = 0.01
"""Rates, batches, sizes and token counts closer than this in logs are one: tables round, batches do not divide D."""
BETAS = ("beta1", "beta2")
"""Compared by their distance from 1: .99 and .999 are a percent apart, but average over 100 steps and over 1000."""
LAST_DIGITS = 1e-6
"""Of what is counted or derived: single precision and sums in another order differ by less, two values by more."""
ROUNDING = 1e-12
"""Scatter of ln losses that are equal but for the last digit of a double."""
MANY = 1e9
"""Degrees of freedom of a noise that was given: scipy's F distribution is NaN for infinitely many."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The standard deviation of ln loss between equal runs.

    freedom: degrees of freedom behind it; inf where it was given. groups: replicated cells it was pooled over.
    source: measured between seeds, taken from the residuals of a fit, given by the caller, or not known at all.
    """

    sd: float
    freedom: float
    source: Literal["seeds", "residuals", "given", "unknown"]
    groups: int = 0

    def draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """`count` standard deviations: the sd is itself uncertain, sd^2 freedom / sd'^2 is chi-square distributed."""
        if not self.sd > 0 or not np.isfinite(self.freedom):
            return np.full(count, self.sd)
        return self.sd * np.sqrt(self.freedom / generator.chisquare(self.freedom, count))

    def pooled(self, residual_sd: float, residual_freedom: float) -> "Noise":
        """What copies are drawn with: noise between seeds pooled with residuals of the means over seeds.

        A few replicated cells tell the noise to within a third, and only there: seeds of other sizes may differ more.
        Where residuals agree with them (`judge_noise` has asked), all runs measure one noise: the residual mean square
        after a passed test for lack of fit (Draper & Smith 1998, 2.1). Any other noise stays as it is.
        """
        if self.source != "seeds" or not residual_freedom > 0 or not np.isfinite([residual_sd, self.freedom]).all():
            return self
        freedom = self.freedom + residual_freedom
        squares = self.freedom * self.sd**2 + residual_freedom * residual_sd**2
        return replace(self, sd=float(np.sqrt(squares / freedom)), freedom=freedom)

    def to_json(self) -> dict[str, Any]:
        return {"sd": self.sd, "freedom": self.freedom, "source": self.source, "groups": self.groups}


UNEVEN = 1.5
"""Noises of two halves that differ by less than this factor are one: intervals would hardly change."""
UNKNOWN = Noise(sd=NAN, freedom=0, source="unknown")


_COUNTS = ("", "false", "f", "no", "n", "0", "0.0", "none", "nan")
_LEFT_OUT = ("true", "t", "yes", "y", "1", "1.0")
"""How tables write that a row counts, and that it does not, where `excluded` holds a mark in place of a reason."""


def exclusions(runs: pd.DataFrame) -> "pd.Series[Any]":
    """Why each row does not count, None where it does: the column `excluded`, in which a mark says no reason."""
    if "excluded" not in runs.columns:
        return pd.Series(None, runs.index, dtype=object)
    told = runs["excluded"].astype(object)
    said = told.where(told.notna(), "").astype(str).str.strip().astype(object)
    mark = said.str.lower()
    return said.mask(mark.isin(_LEFT_OUT), "excluded in the table").where(~mark.isin(_COUNTS), None)


def merged(values: np.ndarray, tolerance: float = SAME) -> np.ndarray:
    """The values with those that lie within `tolerance` in ln of a smaller one made equal to it. NaN stay."""
    known = np.unique(values[np.isfinite(values) & (values > 0)])
    if not known.size:
        return values
    kept = [known[0]]
    for value in known[1:]:
        if np.log(value / kept[-1]) > tolerance:
            kept.append(value)
    at = np.searchsorted(np.array(kept), values, side="right") - 1
    return np.where(np.isfinite(values) & (values > 0), np.array(kept)[np.maximum(at, 0)], values)


def alike(runs: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """These columns with the values made equal that are one value but for how they were written; words stay.

    What runs are grouped by has to pass through here: 0.1 * 0.003 is not 0.0003, nor is a rate in single precision.
    """
    return pd.DataFrame({name: _alike(name, runs[name]) for name in columns}, index=runs.index)


def _alike(name: str, column: "pd.Series[Any]") -> "pd.Series[Any]":
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.notna().sum() < column.notna().sum():
        return column
    values = numbers.astype(float)
    if name in BETAS:
        return values.groupby(merged(1.0 - values.to_numpy())).transform("first")
    tolerance = SAME if name in ("N", "D", "C", *SETTINGS) else LAST_DIGITS
    return pd.Series(merged(values.to_numpy(), tolerance), index=column.index)


def seed_noise(runs: pd.DataFrame, loss: str = "val_loss_final") -> Noise | None:
    """Pooled standard deviation of ln loss over groups of runs that differ in nothing but their seeds.

    None where no group has two finished runs. Rows with a reason in `excluded` do not count.
    """
    seeds = [c for c in SEEDS if c in runs.columns and runs[c].notna().any()]
    if not seeds or loss not in runs.columns:
        return None
    kept = runs[exclusions(runs).isna()]
    kept = kept[np.isfinite(kept[loss]) & (kept[loss] > 0)]
    keys = [c for c in DESIGN if c in kept.columns and kept[c].notna().any()]
    if not keys or kept.empty:
        return None
    groups = kept.assign(_log=np.log(kept[loss]), **alike(kept, keys)).groupby(keys, dropna=False)
    count, spread = groups["_log"].count(), groups["_log"].var(ddof=1)
    many = count[(count > 1) & (groups[seeds].nunique().max(axis=1) > 1)].index
    if not len(many):
        return None
    freedom = float((count[many] - 1).sum())
    sd = float(np.sqrt(((count[many] - 1) * spread[many]).sum() / freedom))
    return Noise(sd=sd, freedom=freedom, source="seeds", groups=len(many))


def judge_noise(
    seeds: Noise | None, residual_sd: float, residual_freedom: float, between: tuple[float, float] | None = None
) -> tuple[Noise, list[Verdict]]:
    """The noise that the intervals of a fit are built on, and what has to be said about it.

    Seed noise where it was measured, unless the runs scatter about the law significantly more than seeds do (F test,
    5%): then the law or the tuning of the cells is off, or seeds differ more elsewhere, and intervals from seed noise
    alone would be too narrow. Residuals where no seeds were replicated. between: root mean square and freedom of
    what is tested, where it is not the residuals of single runs: runs at one place have their miss in common, which
    shows the better the more they are.
    """
    known = residual_freedom > 0 and np.isfinite(residual_sd)
    residual = Noise(sd=residual_sd, freedom=residual_freedom, source="residuals") if known else UNKNOWN
    if seeds is None:
        if not known:
            message = "no seeds are replicated and no residual freedom is left, so there are no intervals. Add seeds."
            return UNKNOWN, [Verdict("noise_unknown", "caution", "fit", None, message)]
        message = (
            f"no seeds are replicated: the noise ({residual_sd:.2%} of the loss) is read off the residuals, which "
            "also hold what the law misses. Train some cells with two or more seeds."
        )
        return residual, [Verdict("noise_from_residuals", "caution", "fit", None, message)]
    if not known or residual_sd <= max(seeds.sd, ROUNDING):
        return seeds, []
    tested_sd, tested_freedom = between or (residual_sd, residual_freedom)
    freedom = min(seeds.freedom, MANY)
    if seeds.sd > 0 and fdtrc(tested_freedom, freedom, (tested_sd / seeds.sd) ** 2) >= 0.05:
        return seeds, []
    whose = "between seeds" if seeds.source == "seeds" else "of their noise"
    message = (
        f"the runs scatter by {residual_sd:.2%} about the curves, more than the {seeds.sd:.2%} {whose}: the "
        "form, or the tuning of the cells, is off by more than noise, or seeds differ more where they were not "
        "replicated. Intervals use the larger figure."
    )
    return residual, [Verdict("residuals_exceed_noise", "caution", "fit", None, message)]


def upper_half(scale: np.ndarray) -> np.ndarray:
    """Which units lie above the median, (n,); where more than half of them share the largest scale, those at it."""
    middle = np.median(scale) if len(scale) else 0.0
    return scale > middle if (scale > middle).any() else scale >= middle


def noise_by_scale(
    scale: np.ndarray, squares: np.ndarray, freedom: np.ndarray, noise: Noise
) -> tuple[list[Noise], list[Verdict]]:
    """The noise of each unit (a budget, a size, a run): one for all, or one for each half where these differ.

    Seeds of larger models often differ more, and one figure for all then says too much of the dearest runs, on which
    forecasts rest. scale: what the units are ordered by, (n,). squares, freedom: of each unit's ln losses about what
    is fitted, (n,). The halves are split at the median and told apart by the ratio of their variances (Goldfeld &
    Quandt 1965, two-sided, 5%) where they differ by a factor that matters. A noise that was given, or is not known,
    stays.
    """
    same = [noise] * len(scale)
    high = upper_half(scale)
    halves = [(float(squares[half].sum()), float(freedom[half].sum())) for half in (~high, high)]
    if noise.source not in ("seeds", "residuals") or min(f for _, f in halves) < 2 or min(s for s, _ in halves) <= 0:
        return same, []
    (below, own_below), (above, own_above) = halves
    ratio = (above / own_above) / (below / own_below)
    chance = min(fdtrc(own_above, own_below, ratio), fdtrc(own_below, own_above, 1.0 / ratio))
    if chance >= 0.025 or 1.0 / UNEVEN**2 < ratio < UNEVEN**2:
        return same, []
    apart = [replace(noise, sd=float(np.sqrt(s / f)), freedom=f) for s, f in halves]
    message = (
        f"the dearer half scatters by {apart[1].sd:.2%} of the loss, the cheaper by {apart[0].sd:.2%}, more apart than "
        "chance: each is drawn with its own noise. Replicate seeds at the dearest runs too."
    )
    evidence = {"cheaper": apart[0].sd, "dearer": apart[1].sd}
    return [apart[int(h)] for h in high], [Verdict("uneven_noise", "caution", "fit", None, message, evidence)]


def interval(draws: np.ndarray, level: float = 0.95) -> Interval:
    """Percentile interval of bootstrap draws. Draws may be infinite; NaN draws are left out; (NaN, NaN) if none."""
    kept = np.sort(draws[~np.isnan(draws)])
    if not kept.size:
        return OPEN
    tail = (1.0 - level) / 2.0
    low, high = (kept[round(q * (kept.size - 1))] for q in (tail, 1.0 - tail))
    return float(low), float(high)


# --- validation documents ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClusteredMean:
    """A loss (nats per token), or the difference of two, with its standard error clustered by document."""

    value: float
    error: float
    documents: int


def clustered_loss(loss_sum: Sequence[float] | np.ndarray, tokens: Sequence[int] | np.ndarray) -> ClusteredMean:
    """Loss over documents as a ratio of sums, with the linearised error of a ratio (Cochran 1977, 6.3)."""
    sums, counts = np.asarray(loss_sum, dtype=float), np.asarray(tokens, dtype=float)
    value = float(sums.sum() / counts.sum())
    return ClusteredMean(value, _clustered((sums - value * counts) / counts.sum()), int((counts > 0).sum()))


def paired_difference(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> ClusteredMean:
    """Loss of `first` minus loss of `second`, each (loss_sum, tokens) over the same documents in the same order.

    What the two models find equally hard cancels document by document. ValueError where the documents differ.
    """
    if len(first[0]) != len(second[0]):
        raise ValueError(f"{len(first[0])} and {len(second[0])} documents cannot be paired")
    one, two = clustered_loss(*first), clustered_loss(*second)
    deviations = [
        (np.asarray(sums, dtype=float) - mean.value * np.asarray(counts, dtype=float)) / np.sum(counts)
        for (sums, counts), mean in ((first, one), (second, two))
    ]
    return ClusteredMean(one.value - two.value, _clustered(deviations[0] - deviations[1]), one.documents)


def _clustered(deviations: np.ndarray) -> float:
    """Standard error of a sum of independent, centred document contributions; empty documents contribute nothing."""
    count = int(np.count_nonzero(deviations))
    return float(np.sqrt(count / (count - 1) * np.square(deviations).sum())) if count > 1 else NAN


def paired_errors(study: str, store: str | Path | Store | None = None) -> pd.DataFrame:
    """What the validation text can tell apart: neighbouring sizes of each budget, compared document by document.

    One row per budget and pair of neighbouring sizes at a seed that both have: `budget`, `cell_small`, `cell_large`,
    `N_small`, `N_large`, `difference` (loss of the small minus the large, % of the loss), `paired_error` (its
    standard error, %), `level_error` (of the smaller model's loss alone, %: shared by all cells, so a fit does not
    feel it) and `documents`. Empty where the study has no budgets or no document losses.
    """
    runs = load_runs(study, store)
    documents = load_documents(study, store)
    sums = {
        str(c): (g["loss_sum"].to_numpy(), g["tokens"].to_numpy()) for c, g in documents.groupby("cell", sort=False)
    }
    usable = runs[runs["excluded"].isna() & runs["budget"].notna() & runs["cell"].isin(list(sums))]
    rows = []
    for _, group in usable.groupby(["family", "budget"]):
        budget = float(group["budget"].iloc[0])
        sizes = sorted(group["N"].unique())
        for small, large in pairwise(sizes):
            pair = _same_seed(group[group["N"] == small], group[group["N"] == large])
            if pair is not None and len(sums[pair[0]][0]) == len(sums[pair[1]][0]):
                rows.append(_paired_row(budget, pair, (small, large), sums))
    columns = ["budget", "cell_small", "cell_large", "N_small", "N_large"]
    return pd.DataFrame(rows, columns=[*columns, "difference", "paired_error", "level_error", "documents"])


def _same_seed(small: pd.DataFrame, large: pd.DataFrame) -> tuple[str, str] | None:
    """The best cell of each size among those of the first seed that both sizes have."""
    for seed in sorted(set(small["seed"]) & set(large["seed"])):
        one, two = (g[g["seed"] == seed].sort_values("val_loss_final").iloc[0]["cell"] for g in (small, large))
        return str(one), str(two)
    return None


def _paired_row(
    budget: float,
    pair: tuple[str, str],
    sizes: tuple[float, float],
    sums: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    level = clustered_loss(*sums[pair[0]])
    difference = paired_difference(sums[pair[0]], sums[pair[1]])
    percent = 100.0 / level.value
    return {
        "budget": budget,
        "cell_small": pair[0],
        "cell_large": pair[1],
        "N_small": sizes[0],
        "N_large": sizes[1],
        "difference": difference.value * percent,
        "paired_error": difference.error * percent,
        "level_error": level.error * percent,
        "documents": level.documents,
    }
