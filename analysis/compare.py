"""Two recipes, one number: how many times the baseline's compute is needed to reach the candidate's loss.

A difference in loss means little by itself: one per cent is a lot where the curve is flat and nothing where it is
steep. What can be compared across scales, and paid for, is compute. Above 1 the candidate is better.

    L_candidate(C, D/N) = L_baseline(M C, D/N)

Both tables are fitted at once by one surface f: the Chinchilla law (Hoffmann et al. 2022, arXiv 2203.15556) in the
coordinates compute and tokens per parameter, or a saturating power law of compute where the runs lie along one path.
ln M is linear in ln C and ln D/N, and curved in ln C where the runs clearly are: a constant multiplier is exactly
inside the model, and any change with scale shows.
What a run costs is its own column C, so a recipe that spends more FLOPs per token pays for them.

What this guards against: differences between runs that share seed and data order hold less noise than the runs
themselves, and what the surface misses, both recipes miss alike. So cells that both tables have form pairs, whose sum
and difference are weighted and resampled apart; only the difference speaks of M. And a multiplier outside what the
baseline's runs reached would be an extrapolation of the law: its range ends where the baseline's runs end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from analysis.joint import MIN_WIDE, Joint, bend, by_cells, join, resample, solve, spreads
from analysis.resampling import along_curves
from analysis.selection import Selection, provenance, select
from analysis.uncertainty import interval
from analysis.verdicts import NAN, NOTHING, OPEN, Estimate, Interval, Verdict, budget_name, clean, refused
from sweeps.errors import InputError
from sweeps.units import plural

TABLES = ("baseline", "candidate")
MIN_RUNS, MIN_LEVELS = 4, 3
"""Runs, and clearly different amounts of compute, that each recipe needs."""
MIN_FREEDOM = 3.0
"""Degrees of freedom below which the noise of the comparison is not known."""
SAME_PLACE = 1.5
"""Factor in tokens per parameter within which two recipes on single paths count as trained alike."""
FAR_ABOVE = 1.1
"""IsoFLOP runs with a loss above the best of their budget times this are left out."""
ROUGH = 0.02
"""Scatter of ln loss about the surface beyond which it is more than seeds do, where no seeds tell."""
ALONG_CURVES = (
    "but these intervals take each for a run of its own, so they may be far too narrow. Compare the ends of runs alone."
)
NARROW = 0.5
"""Decades of compute below which a multiplier is one point, not a statement about scale."""


def compare_recipes(
    baseline: pd.DataFrame,
    candidate: pd.DataFrame,
    *,
    loss: str | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> "Comparison":
    """The compute multiplier of `candidate` over `baseline`, two tables of runs as for `fit`.

    loss: the column to compare, by default `val_loss_final`, else `loss` (nats per token); "val_bpb_final" (bits per
        byte) where tokenizers differ. level: of the intervals. resamples, seed: of the wild bootstrap by pair.

    Runs with equal size (`size`, else N), place (`budget`, else D), `seed` and `data_seed` in both tables are paired.
    Seconds are compared where both tables have the column `seconds`.

    Returns a Comparison, refused with verdicts that say why where the runs do not support one. Raises InputError for
    a missing column or a number that makes no sense.
    """
    if not 0 < level < 1:
        raise InputError(f"level is {level!r}; it must lie between 0 and 1, such as 0.95.")
    if resamples < 100:
        raise InputError(f"resamples is {resamples!r}; intervals need at least 100, better 1000.")
    chosen = (_near(select(baseline, loss)), _near(select(candidate, loss)))
    one, two = (s.rows for s in chosen)
    verdicts = [*_said(chosen), *_comparable(chosen)]
    if not refused(verdicts):
        verdicts += _judge_design(one, two)
    blank = Comparison(
        loss=chosen[0].loss,
        level=level,
        runs=(len(one), len(two)),
        verdicts=tuple(verdicts),
        excluded=tuple({"table": name, **e} for name, s in zip(TABLES, chosen) for e in s.excluded),
        provenance={name: provenance(s, resamples=resamples, seed=seed) for name, s in zip(TABLES, chosen)},
    )
    return blank if blank.refused else _compared(blank, one, two, resamples, seed)


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """How many times the baseline's cost (FLOPs or seconds) is needed for the candidate's loss.

    value: in the middle of the range. low, high: at its cheap and its dear end.
    trend: the factor by which the multiplier changes per tenfold compute, in the mean over the range.
    """

    value: Estimate = NOTHING
    low: Estimate = NOTHING
    high: Estimate = NOTHING
    trend: Estimate = NOTHING

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = clean(vars(self))
        return plain


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two recipes compared, or the refusal to compare them, which carries no numbers: look at `refused` first.

    flops, seconds: the multiplier in compute and in wall clock, kept apart: seconds also hold the hardware, its load
        and the software. The candidate is better above 1. Intervals are at `level`.
    C: the candidate's compute (FLOPs) in the middle of the range, where `flops.value` holds.
    compute_range: the candidate's compute over which the multiplier is read off runs of both recipes.
    loss_range: the losses reached there, from cheap to dear. tokens_per_parameter: D / N at which all of this holds.
    allocation: the factor by which the FLOP multiplier changes per tenfold D / N; NaN for runs along one path.
    pairs: cells that both tables have. runs: usable runs of baseline and candidate.
    noise: `run_sd`, of ln loss about the surface; `difference_sd`, of a pair's difference; `shared`, the share of
        the noise variance that a pair has in common.
    draws: bootstrap samples of ln multiplier in the middle; not in the JSON.
    diagnostics: the raw solution, refused or not.
    """

    loss: str
    level: float
    runs: tuple[int, int]
    verdicts: tuple[Verdict, ...]
    excluded: tuple[Mapping[str, str], ...]
    provenance: Mapping[str, Any]
    flops: Multiplier = Multiplier()
    seconds: Multiplier = Multiplier()
    C: float = NAN
    compute_range: Interval = OPEN
    loss_range: Interval = OPEN
    tokens_per_parameter: float = NAN
    allocation: Estimate = NOTHING
    pairs: int = 0
    noise: Mapping[str, float] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    draws: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def refused(self) -> bool:
        """Whether the two cannot be compared: then no number stands."""
        return refused(self.verdicts)

    def __str__(self) -> str:
        """One sentence with the answer, or with the first reason why there is none."""
        if self.refused:
            return "Not comparable: " + next(v.message for v in self.verdicts if v.severity == "refuse")
        low, high = map(budget_name, self.compute_range)
        return (
            f"The baseline needs {self.flops.value} times the candidate's FLOPs for the same loss, between {low} and "
            f"{high} FLOPs at {self.tokens_per_parameter:.3g} tokens per parameter."
        )

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values: NaN is null."""
        own = {k: v for k, v in vars(self).items() if k not in ("flops", "seconds", "draws")}
        result: dict[str, Any] = clean(own)
        return result | {"refused": self.refused, "flops": self.flops.to_json(), "seconds": self.seconds.to_json()}


# --- what may be compared ----------------------------------------------------------------------------------------


def _near(selection: Selection) -> Selection:
    """Without the isoFLOP runs far above the best of their budget, where no law of two terms follows the losses."""
    rows = selection.rows
    if "budget" not in rows.columns:
        return selection
    far = (rows["loss"] > FAR_ABOVE * rows.groupby("budget")["loss"].transform("min")).to_numpy()
    reason = f"its loss is more than {FAR_ABOVE - 1:.0%} above the best of its budget"
    excluded = tuple({"cell": str(cell), "reason": reason} for cell in rows["cell"][far])
    return replace(selection, rows=rows[~far].reset_index(drop=True), excluded=(*selection.excluded, *excluded))


def _said(chosen: tuple[Selection, Selection]) -> list[Verdict]:
    """What was said while the runs of each table were chosen."""
    curves = [along_curves(s.rows, ALONG_CURVES) for s in chosen]
    said = [(*s.verdicts, *([v] if v else [])) for s, v in zip(chosen, curves)]
    return [replace(v, message=f"{name}: {v.message}") for name, own in zip(TABLES, said) for v in own]


def _comparable(chosen: tuple[Selection, Selection]) -> list[Verdict]:
    """Losses of different text, tokens or context, and compute counted in two ways, are different quantities."""
    seen = {
        c: [set(s.rows[c].dropna()) if c in s.rows.columns else set() for s in chosen]
        for c in ("corpus", "tokenizer", "context", "validation_tokens")
    }
    differ = [c for c, (one, two) in seen.items() if one and two and one != two]
    verdicts = []
    if chosen[0].loss != chosen[1].loss:
        message = f"the losses are of different columns ({chosen[0].loss} and {chosen[1].loss}); name one with loss=."
        verdicts.append(Verdict("different_losses", "refuse", "fit", None, message))
    if differ and chosen[0].loss != "val_bpb_final":
        message = (
            f"the recipes differ in {', '.join(differ)}, so their losses per token cannot be compared. Ask for bits "
            'per byte (loss="val_bpb_final").'
        )
        verdicts.append(Verdict("different_losses", "refuse", "fit", None, message))
    elif unlike := [c for c in ("corpus", "validation_tokens") if c in differ]:
        message = (
            f"bits per byte at two values of {' and '.join(unlike)}: where the validation texts differ too, the "
            "multiplier also holds how much harder one text is than the other."
        )
        verdicts.append(Verdict("different_corpora", "caution", "fit", None, message))
    elif not all(seen["corpus"]):
        message = "the tables do not both name their corpus: losses are taken to be of the same text and tokens."
        verdicts.append(Verdict("corpus_unknown", "info", "fit", None, message))
    if len({any(v.code == "compute_assumed" for v in s.verdicts) for s in chosen}) == 2:
        message = "one table counts its compute and the other has none; give both the column C, or neither (6 N D)."
        verdicts.append(Verdict("different_compute", "refuse", "fit", None, message))
    return verdicts


def _judge_design(one: pd.DataFrame, two: pd.DataFrame) -> list[Verdict]:
    """What the placement of the runs and their losses forbid before anything is fitted."""
    for name, rows in zip(TABLES, (one, two)):
        levels = np.unique(np.round(np.log(rows["C"].astype(float)), 1)).size
        if len(rows) < MIN_RUNS or levels < MIN_LEVELS:
            message = (
                f"the {name} has {plural(len(rows), 'usable run')} at {plural(levels, 'amount')} of compute; at least "
                f"{MIN_RUNS} runs at {MIN_LEVELS} amounts are needed, better 9."
            )
            return [Verdict("too_few_runs", "refuse", "fit", None, message)]
    losses = [(float(r["loss"].min()), float(r["loss"].max())) for r in (one, two)]
    if max(low for low, _ in losses) > min(high for _, high in losses):
        message = (
            "no loss was reached by both recipes ({:.4g} .. {:.4g} and {:.4g} .. {:.4g}). Train the worse one "
            "longer, or the better one on less.".format(*losses[0], *losses[1])
        )
        return [Verdict("no_overlap", "refuse", "fit", None, message)]
    places = [np.log(r["D"].astype(float) / r["N"].astype(float)) for r in (one, two)]
    apart = max(p.min() for p in places) - min(p.max() for p in places)
    if apart > np.log(SAME_PLACE):
        message = (
            f"the recipes were trained at different tokens per parameter, {np.exp(apart):.3g} times apart, so a gain "
            "of the recipe cannot be told from one of the allocation. Train both at the same."
        )
        return [Verdict("different_allocation", "refuse", "fit", None, message)]
    slope, error, freedom = _slope(one)
    if not slope + stdtrit(freedom, 0.99) * error < 0:
        message = (
            f"the baseline's loss does not clearly fall with compute (ln loss per unit of ln C: {slope:.3g}, standard "
            f"error {error:.2g}), so no amount of compute stands for a loss. Span more compute, or add seeds."
        )
        return [Verdict("no_slope", "refuse", "fit", None, message)]
    spent = [(float(r["C"].min()), float(r["C"].max())) for r in (one, two)]
    if max(low for low, _ in spent) > min(high for _, high in spent):
        message = "no two runs of the recipes are near in compute: the multiplier compares different scales."
        return [Verdict("compute_apart", "caution", "fit", None, message)]
    return []


def _slope(rows: pd.DataFrame) -> tuple[float, float, float]:
    """Slope of ln loss by ln C at fixed tokens per parameter, its standard error and degrees of freedom.

    A parabola across the tokens per parameter, where the runs show one: a U of isoFLOP runs is no noise.
    """
    C, ratio, y = (np.log(v.astype(float).to_numpy()) for v in (rows["C"], rows["D"] / rows["N"], rows["loss"]))
    c, a = C - C.mean(), ratio - ratio.mean()
    columns = [np.ones(len(c)), c]
    if len(rows) >= 8 and spreads(c, a):
        columns += [a, a**2]
    X = np.stack(columns, axis=1)
    inverse = np.linalg.pinv(X)
    beta = inverse @ y
    freedom = len(y) - X.shape[1]
    error = np.sqrt(np.square(y - X @ beta).sum() / freedom * np.square(inverse[1]).sum())
    return float(beta[1]), float(error), float(freedom)


# --- the answer --------------------------------------------------------------------------------------------------


def _compared(blank: Comparison, one: pd.DataFrame, two: pd.DataFrame, resamples: int, seed: int) -> Comparison:
    """The comparison of two tables that may be compared."""
    joint = join(one, two)
    rows = len(joint.c)
    poor = f"{rows} runs leave nothing over to judge their noise by. Add sizes, token counts or seeds."
    if _freedom(joint) < MIN_FREEDOM:
        return _refuse(blank, "too_few_runs", poor)
    first = solve(joint)
    alone, joint = joint, by_cells(joint, first)
    if (freedom := _freedom(joint, cells=joint is not alone)) < MIN_FREEDOM:
        return _refuse(
            blank, "too_few_runs", f"{poor} (Cells are off by more than their seeds: more seeds do not help.)"
        )

    # 1. one surface for both, and copies of it: g holds the fitted coefficients first, then those of the copies
    joint, best = bend(joint, first, freedom)
    generator = np.random.default_rng(seed)
    g = np.vstack([best.theta[-len(joint.powers) :], resample(joint, best, freedom, generator, resamples)])
    difference, single = best.scales[1:]
    paired = {"difference_sd": difference, "shared": 1.0 - difference**2 / (2 * single**2)} if joint.pairs else {}
    blank = replace(
        blank,
        pairs=joint.pairs,
        noise={"run_sd": single} | paired,
        diagnostics={"theta": best.theta.tolist(), "terms": 2 if joint.across else 1, "freedom": freedom},
    )

    # 2. where both have runs: the candidate at C, the baseline at M C
    ends = _overlap(joint, g[0])
    if not ends[0] < ends[1]:
        equal = np.exp(joint.log_multiplier(g[0], joint.c[joint.new].mean()))
        message = (
            f"over no range did both recipes reach the same losses: the baseline would need {equal:.3g} times the "
            "compute, where it has no runs. Train the worse recipe further."
        )
        return _refuse(blank, "no_overlap", message)

    # 3. the multipliers in the middle and at the ends
    flops = _multiplier(lambda c: joint.log_multiplier(g, c), ends, blank.level)
    allocation = _estimate(g[:, 2] * np.log(10), blank.level) if joint.powers[:, 1].any() else NOTHING
    seconds, said = _wall_clock(one, two, joint, g, ends, blank.level, generator)
    C = np.exp(np.array([ends[0], sum(ends) / 2, ends[1]]) + joint.center[0])
    line = replace(joint, c=np.array(ends), a=np.zeros(2), new=np.ones(2, dtype=bool))
    losses = np.exp(line.predict(best.theta[None])[0][0])
    return replace(
        blank,
        verdicts=(*blank.verdicts, *said, *_judge(joint, single, flops, allocation, float(np.log10(C[2] / C[0])))),
        flops=flops,
        seconds=seconds,
        C=float(C[1]),
        compute_range=(float(C[0]), float(C[2])),
        loss_range=(float(losses[0]), float(losses[1])),
        tokens_per_parameter=float(np.exp(joint.center[1])),
        allocation=allocation,
        draws={"ln_multiplier": joint.log_multiplier(g[1:], sum(ends) / 2)},
    )


def _freedom(joint: Joint, cells: bool = False) -> float:
    """Of the fit. A pair counts once: its difference alone speaks of the recipes. So do the runs of a trunk. cells:
    `by_cells` made one unit of the seeds of a cell, which then count as one run."""
    rows, units = len(joint.c), int(joint.unit.max()) + 1
    if cells:
        rows = len(np.unique(np.stack([joint.cell, joint.new]), axis=1).T)
    return (rows - len(joint.bounds[0])) * units / rows


def _refuse(blank: Comparison, code: str, message: str) -> Comparison:
    return replace(blank, verdicts=(*blank.verdicts, Verdict(code, "refuse", "fit", None, message)))


def _overlap(joint: Joint, g: np.ndarray) -> tuple[float, float]:
    """The candidate's ln C within its own runs whose equal, ln C + g, lies within the baseline's runs."""
    old, c = joint.c[~joint.new], np.linspace(joint.c[joint.new].min(), joint.c[joint.new].max(), 1001)
    equal = c + joint.log_multiplier(g, c)
    inside = c[(equal >= old.min() - 1e-9) & (equal <= old.max() + 1e-9)]
    return (float(inside[0]), float(inside[-1])) if inside.size else OPEN


def _estimate(logs: np.ndarray, level: float) -> Estimate:
    """exp of the first, with the percentile interval of the others."""
    return Estimate(value=float(np.exp(logs[0])), interval=interval(np.exp(logs[1:]), level))


def _multiplier(logs: Callable[[float], np.ndarray], ends: tuple[float, float], level: float) -> Multiplier:
    """logs(ln C): ln multiplier, first the fitted one, then its copies."""
    low, middle, high = (logs(c) for c in (ends[0], sum(ends) / 2, ends[1]))
    return Multiplier(
        value=_estimate(middle, level),
        low=_estimate(low, level),
        high=_estimate(high, level),
        trend=_estimate((high - low) / (ends[1] - ends[0]) * np.log(10), level),
    )


def _wall_clock(
    one: pd.DataFrame,
    two: pd.DataFrame,
    joint: Joint,
    g: np.ndarray,
    ends: tuple[float, float],
    level: float,
    generator: np.random.Generator,
) -> tuple[Multiplier, list[Verdict]]:
    """Seconds of the baseline at M C over those of the candidate at C, where both tables have them."""
    before, after = (_seconds(rows, joint, generator, len(g) - 1) for rows in (one, two))
    if before is None or after is None:
        return Multiplier(), []

    def logs(c: float) -> np.ndarray:
        reached = c + joint.log_multiplier(g, c)
        return np.asarray(before[:, 0] + before[:, 1] * reached - after[:, 0] - after[:, 1] * c)

    message = "seconds also hold the hardware, its load and the software of these runs; FLOPs do not."
    return _multiplier(logs, ends, level), [Verdict("wall_clock", "info", "decision", "seconds", message)]


def _seconds(rows: pd.DataFrame, joint: Joint, generator: np.random.Generator, count: int) -> np.ndarray | None:
    """ln seconds as a line in ln C about the centre, (1 + count, 2), the fitted one first. None without enough runs.

    Where runs spread over tokens per parameter these are in the line too: small models use hardware badly.
    """
    if "seconds" not in rows.columns:
        return None
    spent = rows["seconds"].to_numpy(dtype=float)
    timed = rows[np.isfinite(spent) & (spent > 0)]
    c = np.log(timed["C"].to_numpy(dtype=float)) - joint.center[0]
    a = np.log((timed["D"] / timed["N"]).to_numpy(dtype=float)) - joint.center[1]
    wide = len(c) >= MIN_WIDE // 2 and spreads(c, a)
    X = np.stack([np.ones(len(c)), c, a] if wide else [np.ones(len(c)), c], axis=1)
    freedom = len(c) - X.shape[1]
    if freedom < 2 or np.unique(np.round(c, 1)).size < MIN_LEVELS:
        return None
    inverse = np.linalg.pinv(X)
    y = np.log(timed["seconds"].to_numpy(dtype=float))
    if "C_spent" in timed.columns:  # a branch took seconds for its own part alone
        share = (timed["C_spent"] / timed["C"]).astype(float).fillna(1.0).to_numpy()
        y -= np.log(np.where(share > 0, share, 1.0))
    beta = inverse @ y
    own = (y - X @ beta) / np.sqrt(np.clip(1.0 - np.einsum("nk,kn->n", X, inverse), 0.1, 1.0))
    errors = generator.choice([-1.0, 1.0], (count, len(y))) * own
    errors *= np.sqrt(freedom / generator.chisquare(freedom, count))[:, None]
    return np.vstack([beta, beta + errors @ inverse.T])[:, :2]


def _judge(joint: Joint, run_sd: float, flops: Multiplier, allocation: Estimate, decades: float) -> list[Verdict]:
    """What a reader has to know beside the multiplier."""
    verdicts = []
    if not joint.pairs:
        message = "fewer than five cells are in both tables with one seed, so all noise of both counts in full."
        verdicts.append(Verdict("unpaired", "info", "fit", None, message))
    if run_sd > ROUGH:
        message = (
            f"the runs scatter by {run_sd:.2g} of ln loss about the surface, more than seeds do: its ends may be off. "
            "Tune the cells alike, or leave out those far from the best allocation."
        )
        verdicts.append(Verdict("rough_surface", "caution", "fit", None, message))
    low, high = flops.value.interval
    if low <= 1.0 <= high:
        message = (
            f"the two cannot be told apart: the runs are in accord with any multiplier of {low:.3g} to {high:.3g}."
        )
        verdicts.append(Verdict("not_told_apart", "info", "decision", "flops", message))
    if decades < NARROW:
        message = f"the recipes overlap over {decades:.2g} decades of compute only; elsewhere the answer may differ."
        verdicts.append(Verdict("narrow_range", "caution", "decision", "flops", message))
    if not flops.trend.interval[0] <= 1.0 <= flops.trend.interval[1]:
        turns = " and changes sides" if (flops.low.value - 1.0) * (flops.high.value - 1.0) < 0 else ""
        message = (
            f"the multiplier changes with scale, from {flops.low.value:.3g} to {flops.high.value:.3g} over the "
            f"range{turns}: quote it with its compute, and do not carry it to larger runs."
        )
        verdicts.append(Verdict("changes_with_scale", "caution", "decision", "flops", message))
    if not np.isnan(allocation.value) and not allocation.interval[0] <= 1.0 <= allocation.interval[1]:
        message = (
            f"the multiplier changes by a factor of {allocation.value:.3g} per tenfold tokens per parameter: the "
            "recipes have different best allocations."
        )
        verdicts.append(Verdict("changes_with_allocation", "caution", "decision", "flops", message))
    return verdicts
