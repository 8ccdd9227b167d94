"""The exponents of a law before and after taking out of the losses what bad tuning has cost them.

The failure it guards against: a corrected exponent that looks as certain as if the penalties were known. Its interval
holds the runs' noise and the penalties' own, and the difference only the latter, since the runs are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.fitting import Settings, fit, problem_of
from analysis.laws import CHINCHILLA
from analysis.problems import Robust
from analysis.solver import descend, solve
from analysis.uncertainty import interval
from analysis.verdicts import NOTHING, Estimate, Fit, Verdict

ISOFLOP_COPIES = 24
"""Copies of the penalties for which budgets are fitted again."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """The exponents of one law, of the losses as they are and without the estimated penalties.

    before, after: exponent by name (N_exponent, D_exponent; of Chinchilla's law also alpha and beta).
    difference: after minus before, with the interval that the penalties' own uncertainty gives it: the runs, and so
    their noise, are the same on both sides. beyond_noise: the exponent of best N leaves its interval, and the
    difference excludes 0.
    """

    law: str
    before: Mapping[str, Estimate]
    after: Mapping[str, Estimate] = field(default_factory=dict)
    difference: Mapping[str, Estimate] = field(default_factory=dict)
    beyond_noise: bool = False
    refused: str = ""


def audited_laws(rows: pd.DataFrame) -> tuple[str, ...]:
    """The laws that an audit fits before and after its correction: isoFLOP too where the runs belong to budgets."""
    budgets = "budget" in rows.columns and rows["budget"].notna().any()
    return ("isoflop", "chinchilla") if budgets else ("chinchilla",)


def _exponents(found: Fit) -> dict[str, Estimate]:
    names = ("N_exponent", "D_exponent", "alpha", "beta")
    own = {k: Estimate(value=found.params[k], interval=found.intervals[k]) for k in names if k in found.params}
    return {k: v for k, v in found.decisions.items() if k in names[:2]} | own


def change_of(
    rows: pd.DataFrame,
    loss: str,
    law: str,
    penalties: np.ndarray,
    level: float,
    seed: int,
) -> Change:
    """The law of the rows before and after taking the penalties out of their losses. Unknown penalties are left in."""
    before = fit(rows, law, loss=loss, level=level, seed=seed)
    exponents = _exponents(before)
    if not np.isfinite(exponents.get("N_exponent", NOTHING).value):
        said = next((v.message for v in before.verdicts if v.severity == "refuse"), "the fit is refused.")
        return Change(law=law, before=exponents, refused=said)
    known = np.nan_to_num(penalties)
    if not (known[0] > 0).any():
        return Change(law=law, before=exponents)
    after = fit(rows.assign(**{loss: rows["y"] * np.exp(-known[0])}), law, loss=loss, level=level, seed=seed)
    corrected = _exponents(after)
    copies = _copies(rows, loss, law, known, level, seed)
    difference = {}
    for name in ("N_exponent", "D_exponent"):
        by = corrected[name].value - exponents[name].value
        spread = copies[name][1:] - copies[name][0]
        difference[name] = Estimate(value=by, interval=_shift(interval(spread, level), by))
        corrected[name] = _widen(corrected[name], spread, level)
    moved = difference["N_exponent"]
    low, high = exponents["N_exponent"].interval
    left = not low <= corrected["N_exponent"].value <= high
    certain = moved.interval[0] > 0 or moved.interval[1] < 0
    return Change(
        law=law, before=exponents, after=corrected, difference=difference, beyond_noise=bool(left and certain)
    )


def _copies(
    rows: pd.DataFrame, loss: str, law: str, penalties: np.ndarray, level: float, seed: int
) -> dict[str, np.ndarray]:
    """The exponents of best N and D with each copy of the penalties taken out, the estimate first."""
    y = np.log(rows["y"].to_numpy(dtype=float))
    if law == "chinchilla":
        problem = problem_of(CHINCHILLA, rows, Settings(fixed={}))
        robust = Robust("huber", 1e-2)
        targets = y - penalties
        start = solve(problem, robust).theta
        params = problem.params(descend(problem, robust, np.tile(start, (len(targets), 1)), targets=targets)[0])
        a = params["beta"] / (params["alpha"] + params["beta"])
        return {"N_exponent": a, "D_exponent": 1.0 - a}
    fits = [
        fit(rows.assign(**{loss: np.exp(y - p)}), law, loss=loss, level=level, seed=seed, resamples=2).params
        for p in penalties[: 1 + ISOFLOP_COPIES]
    ]
    return {name: np.array([f[name] for f in fits]) for name in ("N_exponent", "D_exponent")}


def _shift(bounds: tuple[float, float], by: float) -> tuple[float, float]:
    return bounds[0] + by, bounds[1] + by


def _widen(estimate: Estimate, spread: np.ndarray, level: float) -> Estimate:
    """The interval of an exponent after correction: the runs' noise and the penalties' uncertainty in quadrature."""
    low, high = interval(spread, level)
    value, (a, b) = estimate.value, estimate.interval
    return Estimate(
        value=value, interval=(value - float(np.hypot(value - a, low)), value + float(np.hypot(b - value, high)))
    )


def judge_change(change: Change) -> list[Verdict]:
    """A caution where tuning moves the exponent of the best N by more than its noise."""
    if not change.beyond_noise:
        return []
    before, after = (e["N_exponent"] for e in (change.before, change.after))
    message = (
        f"{change.law}: how the cells were tuned bends the law. Without the estimated penalties the exponent of the "
        f"best N goes from {_exponent(before)} to {_exponent(after)}."
    )
    return [Verdict("tuning_confound", "caution", "fit", None, message, {"law": change.law})]


def _exponent(e: Estimate) -> str:
    return f"{e.value:.3f} ({e.interval[0]:.3f} to {e.interval[1]:.3f})"
