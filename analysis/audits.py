"""The confound audit: is a scaling law of these runs a law of size and tokens, or of how well each cell was tuned?

Half of the published disagreement about scaling laws is untuned hyperparameters (Porian et al. 2024, arXiv 2406.19146,
took the exponent of the best size from .84 to .50 by mending them one by one). A rate that is right for small models
and wrong for large ones bends the law exactly as scale would. So each cell's settings are held against the measured
optimum, the loss that being off it costs is estimated, and the exponents are fitted again without that cost.

    penalty in ln loss = 1/2 curvature (ln rate / best rate)^2, within the range where the loss was measured

Beyond that range a penalty is a lower bound and is called one. Where nothing was measured the audit says so, and names
the study that would measure it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.corrections import Change, audited_laws, change_of, judge_change
from analysis.published import published_timescale, published_value, within_range
from analysis.references import Reference, from_sweep
from analysis.selection import select
from analysis.sensitivities import Sensitivity, sensitivity
from analysis.uncertainty import interval
from analysis.verdicts import NAN, Verdict, clean
from sweeps.errors import InputError
from sweeps.published import PUBLISHED
from sweeps.units import human, plural

LEAST = 0.001
"""Penalties (ln loss) below a tenth of a percent are nobody's finding, however well they are known."""
ONE_RATE_SPAN = 8.0
"""Sizes so many times apart at one learning rate are a finding: the best rate falls with size under most recipes."""
WARMUP_SHARE, WARMUP_SHORT = 0.2, 0.1
"""Share of a run above which warm-up is too much in any case, and above which it is where it is beyond N tokens."""
COPIES = 200
"""Noisy copies of the penalties."""


def audit(
    runs: pd.DataFrame,
    optimum: Sensitivity | Mapping[str, Reference] | None = None,
    *,
    laws: Sequence[str] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> "Audit":
    """Hold the tuning of every cell of one family against the optimum, and fit the laws without what it cost.

    runs: a run table; the audit is of the rows that a law's fit would use. optimum: what was measured, by
    `sensitivity`, or `references` by hyperparameter; by default the study's own sweep.
    laws: whose exponents are told before and after, where any optimum is known: by default "isoflop" where the runs
    have budgets, and "chinchilla". level, seed: of the intervals.

    Raises InputError for a missing column, or runs of several families or parametrisations.
    """
    chosen = select(runs)
    rows = chosen.rows
    family, kind = (_only(rows, column) for column in ("family", "parametrisation"))
    references = _references(optimum, runs, family, kind, level, seed)
    rate = references.get("learning_rate")
    verdicts: list[Verdict] = []

    # 1. where every cell stands
    cells = _stand(rows, references)
    noise = chosen.noise.sd if chosen.noise is not None else rate.noise if rate is not None else NAN
    penalties = _penalties(cells, rate, "learning_rate", "ratio", seed)
    of_batch = _penalties(cells, references.get("batch_tokens"), "batch_tokens", "batch_ratio", seed + 1)
    for name, found in (("penalty", penalties), ("batch_penalty", of_batch)):
        bounds = [interval(p, level) for p in found[1:].T]
        cells[name] = found[0]
        cells[f"{name}_low"], cells[f"{name}_high"] = ([b[i] for b in bounds] for i in (0, 1))
    floor = max(LEAST, noise) if np.isfinite(noise) else LEAST
    step = rate.step if rate is not None else 0.0
    next_to = cells["measured"] & (np.abs(np.log(cells["ratio"].astype(float))) <= step)
    cells["mistuned"] = (cells["penalty_low"] > floor) & ~next_to
    if cells.empty:
        why = " ".join(v.message for v in chosen.verdicts if v.code in ("excluded_runs", "partial"))
        message = f"no run has ended with a loss, so there is nothing to audit. {why}".strip()
        verdicts.append(Verdict("too_few_runs", "refuse", "fit", None, message))
    verdicts += _judge_rate(cells, rate, rate.apart(rows) if rate else ())
    verdicts += [*_one_rate(rows, cells), *_warmup(cells), *_published(cells, _body(rows), rate)]

    # 2. the laws before and after; where nothing is known of any cell there is no after
    names = tuple(laws) if laws is not None else audited_laws(rows)
    total = np.where(np.isnan(penalties) & np.isnan(of_batch), NAN, np.nan_to_num(penalties) + np.nan_to_num(of_batch))
    names = names if np.isfinite(total[0]).any() else ()
    changes = tuple(change_of(rows, chosen.loss, name, total, level, seed) for name in names)
    verdicts += [v for change in changes for v in judge_change(change)]
    return Audit(
        family=family,
        cells=cells,
        changes=changes,
        references=references,
        verdicts=tuple(verdicts),
        floor=floor,
        level=level,
    )


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Where each cell of a study stands against the best hyperparameters, and what that does to its laws.

    cells: one row a run that a fit uses: cell, N, D, learning_rate, best_learning_rate (NaN where nothing is known),
        ratio of the two, `measured` (at this very place), `outside` (of the law's optima), penalty in ln loss with its
        interval, `at_least`, `mistuned` (its penalty's lower end is above `floor`, and it is not next to the optimum
        on the grid of its own sweep, which lets no run be nearer than that for certain); batch_tokens, batch_ratio and
        batch_penalty with its interval; warmup_share, warmup_per_parameter; timescale (AdamW's, as a fraction of the
        run) and timescale_ratio (to Power Lines); rule_ratio and rule_batch_ratio (to Step Law).
    changes: each law's exponents as trained and without the penalties. references: by hyperparameter, what the cells
    are held against. floor: penalties (ln loss) up to it are noise. level: of the intervals.
    """

    family: str | None
    cells: pd.DataFrame
    changes: tuple[Change, ...]
    references: Mapping[str, Reference]
    verdicts: tuple[Verdict, ...]
    floor: float
    level: float

    @property
    def mistuned(self) -> pd.DataFrame:
        """The cells that tuning has cost more than noise."""
        return self.cells[self.cells["mistuned"]]

    def table(self) -> pd.DataFrame:
        """The cells, the most costly first."""
        return self.cells.sort_values("penalty", ascending=False, na_position="last", ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """As JSON values: NaN is null."""
        found: dict[str, Any] = clean(
            {
                "family": self.family,
                "level": self.level,
                "floor": self.floor,
                "sources": {axis: r.source for axis, r in self.references.items()},
                "cells": self.cells.to_dict("records"),
                "changes": [dict(vars(c)) for c in self.changes],
                "verdicts": [v.to_json() for v in self.verdicts],
            }
        )
        return found


# --- the cells ---------------------------------------------------------------------------------------------------


def _only(rows: pd.DataFrame, column: str) -> str | None:
    """The one family or parametrisation of the runs, None where none is told; InputError where there are several."""
    found = sorted(map(str, rows[column].dropna().unique())) if column in rows.columns else []
    if len(found) > 1:
        several = {"family": "families"}.get(column, f"{column}s")
        raise InputError(
            f"the runs are of several {several} ({', '.join(found)}), whose learning rates do not compare; audit them "
            "apart."
        )
    return found[0] if found else None


def _references(
    optimum: Sensitivity | Mapping[str, Reference] | None,
    runs: pd.DataFrame,
    family: str | None,
    kind: str | None,
    level: float,
    seed: int,
) -> Mapping[str, Reference]:
    """What was measured, by hyperparameter; the study's own sweep where nothing is given."""
    if isinstance(optimum, Sensitivity):
        return from_sweep(optimum, family, kind, "the optima given")
    if optimum is not None:
        return optimum
    if "learning_rate" not in runs.columns or not _swept(runs):
        return {}
    return from_sweep(sensitivity(runs, level=level, seed=seed), family, kind)


def _swept(runs: pd.DataFrame) -> bool:
    """Whether any (N, D) was run at three learning rates or more, without which no optimum can be inside."""
    keys = [runs["N"], np.round(np.log(runs["D"].astype(float).clip(lower=1.0)), 1)]
    return bool((runs.groupby(keys)["learning_rate"].nunique() >= 3).any())


def _column(rows: pd.DataFrame, name: str) -> np.ndarray:
    """A column as floats; NaN where the table lacks it."""
    return rows[name].to_numpy(dtype=float) if name in rows.columns else np.full(len(rows), NAN)


def _body(rows: pd.DataFrame) -> np.ndarray:
    """Parameters as Step Law counts them, without embeddings; all of them where the table does not tell."""
    body = _column(rows, "N_nonembedding")
    return np.where(np.isfinite(body), body, _column(rows, "N"))


def _stand(rows: pd.DataFrame, references: Mapping[str, Reference]) -> pd.DataFrame:
    N, D = _column(rows, "N"), _column(rows, "D")
    rate, batch, warmup = (_column(rows, c) for c in ("learning_rate", "batch_tokens", "warmup_tokens"))
    decay = _column(rows, "weight_decay")
    nothing = np.full(len(rows), NAN)
    best, batches = references.get("learning_rate"), references.get("batch_tokens")
    places = pd.DataFrame({"N": N, "D": D, "batch_tokens": batch})
    best_rate = np.exp(best.best(places)) if best else nothing
    for other in best.apart(rows).values() if best else ():
        best_rate = np.where(other, NAN, best_rate)
    best_batch = np.exp(batches.best(places)) if batches else nothing
    for other in batches.apart(rows).values() if batches else ():
        best_batch = np.where(other, NAN, best_batch)
    ruled = {"N_nonembedding": _body(rows), "D": D}
    with np.errstate(divide="ignore", invalid="ignore"):
        timescale = np.where(rate * decay > 0, batch / (rate * decay * D), NAN)
        z = np.log(rate / best_rate)
        return pd.DataFrame(
            {
                "cell": rows["cell"].astype(str).to_numpy(),
                "N": N,
                "D": D,
                "learning_rate": rate,
                "best_learning_rate": best_rate,
                "ratio": np.exp(z),
                "measured": best.measured(places) if best else np.zeros(len(rows), dtype=bool),
                "outside": best.outside(places) if best else np.zeros(len(rows), dtype=bool),
                "at_least": best.beyond(z) & np.isfinite(z) if best else np.zeros(len(rows), dtype=bool),
                "batch_tokens": batch,
                "batch_ratio": batch / best_batch,
                "warmup_share": warmup / D,
                "warmup_per_parameter": warmup / N,
                "timescale": timescale,
                "timescale_ratio": timescale / published_timescale(D / N),
                "rule_ratio": rate / published_value("step-law", "learning_rate", **ruled),
                "rule_batch_ratio": batch / published_value("step-law", "batch_tokens", D=D),
            }
        )


def _penalties(cells: pd.DataFrame, reference: Reference | None, value: str, ratio: str, seed: int) -> np.ndarray:
    """What being off the best value costs each cell, in ln loss: the estimate and its copies, (1 + COPIES, cells)."""
    n = len(cells)
    if reference is None or not np.isfinite(reference.curvature[0]):
        return np.full((1 + COPIES, n), NAN)
    generator = np.random.default_rng(seed)
    errors = {name: generator.standard_normal((COPIES, 1)) for name in ("value", "N", "D", "batch_tokens")}
    errors["place"] = generator.standard_normal((COPIES, n))
    away = np.log(cells[value].to_numpy(dtype=float)) - reference.best(cells, errors)
    copies = reference.penalty(away, cells) * np.exp(reference.curvature[1] * generator.standard_normal((COPIES, 1)))
    off = np.log(cells[ratio].to_numpy(dtype=float))
    found = np.vstack([reference.penalty(off, cells), copies])
    return np.where(np.isfinite(off), found, NAN)


# --- what is said of them ----------------------------------------------------------------------------------------


def _judge_rate(cells: pd.DataFrame, rate: Reference | None, apart: Iterable[str]) -> list[Verdict]:
    """Mistuned cells, cells that nothing was measured for, and laws that are asked beyond their optima."""
    known = np.isfinite(cells["penalty"])
    verdicts = []
    if cells.empty:
        return []
    if not known.all():
        lost = cells[~known]
        sizes, lengths = (_reach(lost[name]) for name in ("N", "D"))
        source = "No sweep measured it" if rate is None else f"Its optimum as measured by {rate.source} does not reach"
        if rate is not None and (other := " and ".join(apart)):
            source = f"What {rate.source} measured is for {other}, and these runs were trained otherwise"
        message = (
            f"the best learning rate is not known for {len(lost)} of {plural(len(cells), 'run')}, so what being off it "
            f"costs is not known either. {source}: vary learning_rate {{times: [0.25, 0.5, 1, 2, 4]}} at three sizes "
            f"{sizes} parameters and at two token counts {lengths}, in this study or in one of the same corpus, "
            "tokenizer, context, family and recipe, and analyse it with escala sensitivity."
        )
        verdicts.append(Verdict("optimum_unmeasured", "caution", "fit", None, message, {"runs": len(lost)}))
    outside = cells["outside"] & np.isfinite(cells["penalty"])
    if rate is not None and outside.any():
        message = (
            f"{int(outside.sum())} of {plural(len(cells), 'run')} lie beyond the sizes or tokens at which "
            f"{rate.source} measured optima; their best rate is extrapolated."
        )
        verdicts.append(Verdict("extrapolation", "caution", "fit", None, message))
    off = cells[cells["mistuned"]].sort_values("penalty", ascending=False)
    if len(off):
        places = off.groupby(["N", "D"], sort=False).first().reset_index()
        named = "; ".join(_words(row) for row in places.head(4).to_dict("records"))
        more = f"; and {plural(len(places) - 4, 'other place')}" if len(places) > 4 else ""
        message = (
            f"{len(off)} of {plural(len(cells), 'run')} trained at a learning rate off the best one "
            f"({rate.source if rate else ''}) by more than noise: {named}{more}."
        )
        evidence = {"cells": off["cell"].tolist(), "penalty": off["penalty"].tolist()}
        verdicts.append(Verdict("mistuned", "caution", "fit", None, message, evidence))
    return verdicts


def _reach(values: pd.Series) -> str:
    """From where to where numbers reach: "from 10k to 20k", "around 10k"."""
    low, high = human(values.min()), human(values.max())
    return f"around {low}" if low == high else f"from {low} to {high}"


def _words(row: Mapping[Any, Any]) -> str:
    ratio = row["ratio"]
    off = f"{ratio:.2g} times too high" if ratio > 1 else f"{1 / ratio:.2g} times too low"
    cost = f"{'at least ' if row['at_least'] else ''}{row['penalty']:.1%} of the loss"
    return (
        f"{human(row['N'])} parameters on {human(row['D'])} tokens, {off}, {cost} "
        f"({row['penalty_low']:.1%} to {row['penalty_high']:.1%})"
    )


def _one_rate(rows: pd.DataFrame, cells: pd.DataFrame) -> list[Verdict]:
    """One learning rate for sizes far apart, unless the parametrisation is made for that."""
    kinds = set(rows["parametrisation"].dropna()) if "parametrisation" in rows.columns else set()
    rates = cells["learning_rate"].dropna()
    if rates.empty or rates.nunique() > 1 or kinds - {"standard"}:
        return []
    span = float(cells["N"].max() / cells["N"].min())
    if span < ONE_RATE_SPAN:
        return []
    judged = np.isfinite(cells["penalty"]).all()
    message = f"one learning rate, {rates.iloc[0]:g}, for sizes {span:.2g}x apart" + (
        ": what it costs each is estimated above."
        if judged
        else "; the best rate falls with size under most recipes, so the ends of the grid may be tuned unequally."
    )
    severity: Any = "info" if judged else "caution"
    return [Verdict("one_setting", severity, "fit", None, message, {"span": span})]


def _warmup(cells: pd.DataFrame) -> list[Verdict]:
    """Warm-up over a fifth of a run, or over a tenth of it and longer than N tokens (after Porian et al. 2024)."""
    share, length = cells["warmup_share"], cells["warmup_per_parameter"]
    long = (share > WARMUP_SHARE) | ((length > 1.0) & (share > WARMUP_SHORT))
    if not long.any():
        return []
    worst = cells[long].sort_values("warmup_share").iloc[-1]
    message = (
        f"{int(long.sum())} of {plural(len(cells), 'run')} spend much of their tokens on warm-up, up to "
        f"{worst['warmup_share']:.0%} ({worst['warmup_per_parameter']:.2g} tokens per parameter): short runs lose most "
        f"by it, which tilts the law. Counted are warm-ups over {WARMUP_SHARE:.0%} of a run, and those over "
        f"{WARMUP_SHORT:.0%} that are longer than N tokens too (after Porian et al. 2024); keep it to a tenth."
    )
    return [Verdict("long_warmup", "caution", "fit", None, message, {"cells": cells.loc[long, "cell"].tolist()})]


def _published(cells: pd.DataFrame, body: np.ndarray, rate: Reference | None) -> list[Verdict]:
    """How the cells stand to published rules: never more than information."""
    verdicts = []
    ratios = cells["rule_ratio"].dropna()
    if len(ratios) and (rate is None or not np.isfinite(cells["penalty"]).any()):
        near = within_range("step-law", N_nonembedding=body, D=cells["D"])
        told = f"by Step Law ({PUBLISHED['step-law'].paper}) these rates are {_span(ratios)} times its best ones."
        why = (
            "Its own text, batches and schedule differ, so this is no measurement."
            if near
            else "That rule was fitted on 0.2 to 1.1 billion parameters and 4 to 100 billion tokens, and says "
            "nothing certain here."
        )
        severity: Any = "info" if near else "caution"
        verdicts.append(Verdict("extrapolation", severity, "decision", "step-law", f"{told} {why}"))
    decays = cells["timescale_ratio"].dropna()
    if len(decays):
        inside = within_range("power-lines", N=cells["N"])
        message = f"AdamW's timescale is {_span(decays)} times the best one by Power Lines "
        message += f"({PUBLISHED['power-lines'].paper})"
        message += "." if inside else ", which was fitted on 0.11 to 3.3 billion parameters: outside its range."
        verdicts.append(Verdict("extrapolation", "info", "decision", "power-lines", message))
    return verdicts


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():.2g}", f"{values.max():.2g}"
    return low if low == high else f"{low} to {high}"
