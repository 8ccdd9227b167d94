"""How the exponents of a fit move with what is counted as a parameter and as compute.

Papers count parameters with and without embeddings, and compute as 6 N D or operation by operation; in small models
the exponents of the optimum move by .1 and more between them (Pearce & Song 2024, arXiv 2406.12907; Porian et al.
2024, arXiv 2406.19146). The failure it guards against: exponents under two conventions set side by side as if the
models differed. One table holds the same runs under each.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.decisions import splits_compute
from analysis.fitting import Settings, fit, problem_of
from analysis.laws import CHINCHILLA, LAWS
from analysis.problems import Robust
from analysis.selection import select
from analysis.solver import solve
from analysis.verdicts import Estimate, Fit
from sweeps.errors import InputError

SIZES = ("N", "N_nonembedding", "N_nonembedding_head", "N_total")
"""How a study's runs count parameters; `N` is the total (of a mixture of experts: the active total)."""
Compute = Literal["C", "C_6nd"]
_EXPONENTS = ("N_exponent", "D_exponent")


def compare_conventions(
    runs: pd.DataFrame, law: str = "isoflop", *, sizes: Sequence[str] | None = None, **options: Any
) -> pd.DataFrame:
    """The same fit under every counting convention: one row for each count of parameters and each of compute.

    runs: a run table, with one column for each count of parameters. law: "isoflop", or a law of loss over N and D.
    sizes: those columns, by default the `SIZES` that the table has. options: as `analysis.fit` takes them.

    Compute is the table's own `C` (where it was counted, not assumed), and `C_6nd`: 6 N D with that row's N.
    IsoFLOP runs share a budget under their own C only. Under 6 N D the losses of a budget are moved to its mean
    compute, along the Chinchilla law fitted to the same runs; the intervals do not know of that step.

    Columns: `N` and `C` (the conventions), `N_exponent` and `D_exponent` of the optimum over the compute that the
    runs span, `alpha` and `beta` where the law has them, each with `_low` and `_high` at the level of the fit; `runs`
    used; `verdicts`, the codes of the cautions and refusals. A refused number is NaN.
    Raises InputError where a column is missing, or no second convention is there to compare.
    """
    if law != "isoflop" and not (law in LAWS and splits_compute(LAWS[law])):
        allowed = ", ".join(("isoflop", *(name for name, form in LAWS.items() if splits_compute(form))))
        raise InputError(f"{law!r} does not say how compute is split; conventions can be compared for {allowed}.")
    chosen = tuple(sizes) if sizes is not None else tuple(c for c in SIZES if c in runs.columns)
    missing = [c for c in dict.fromkeys((*chosen, "D")) if c not in runs.columns]
    if missing:
        raise InputError(f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, runs.columns))}.")
    counted = "C" in runs.columns and not ("C_assumed" in runs.columns and runs["C_assumed"].all())
    computes: tuple[Compute, ...] = ("C", "C_6nd") if counted else ("C_6nd",)
    if len(chosen) * len(computes) < 2:
        raise InputError(
            f"the table holds one convention only; to compare, it needs C, or one of {', '.join(SIZES)} beside "
            f"{', '.join(chosen) or 'D'}. Name columns of other counts in sizes."
        )
    return pd.DataFrame([_row(runs, law, size, compute, options) for size, compute in product(chosen, computes)])


def _row(runs: pd.DataFrame, law: str, size: str, compute: Compute, options: Mapping[str, Any]) -> dict[str, Any]:
    table = runs.drop(columns="C_assumed", errors="ignore").assign(N=runs[size])
    if compute == "C_6nd":
        table["C"] = 6.0 * table["N"] * table["D"]
        if law == "isoflop" and "budget" in table.columns:
            table = _at_equal_compute(table, options.get("loss"))
    found = fit(table, law, **options)
    said = dict.fromkeys(str(v.code) for v in found.verdicts if v.severity != "info")
    return {"N": size, "C": compute} | _numbers(found) | {"runs": found.n_runs, "verdicts": ", ".join(said)}


def _numbers(found: Fit) -> dict[str, float]:
    estimates = {
        name: Estimate(value=found.params[name], interval=found.intervals[name])
        for name in (*_EXPONENTS, "alpha", "beta")
        if name in found.params
    }
    estimates = {name: found.decisions[name] for name in _EXPONENTS if name in found.decisions} | estimates
    return {
        f"{name}{end}": value
        for name, e in estimates.items()
        for end, value in (("", e.value), ("_low", e.interval[0]), ("_high", e.interval[1]))
    }


def _at_equal_compute(table: pd.DataFrame, loss: str | None) -> pd.DataFrame:
    """The runs of each budget moved along D to the budget's mean compute, their losses along a Chinchilla law.

    Where no such law can be fitted the table comes back as it is, without its budgets: runs of unequal compute have
    none in common.
    """
    selection = select(table, loss)
    rows = selection.rows
    settings = Settings(fixed={})
    if len(rows) <= len(CHINCHILLA.names):
        return table.drop(columns="budget")
    problem = problem_of(CHINCHILLA, rows, settings)
    best = solve(problem, Robust("l2", 1.0)).theta
    params = {name: float(v) for name, v in problem.params(best).items()}
    logs = np.log(rows["C"])
    moved = rows["D"] * np.exp(logs.groupby(rows["budget"]).transform("mean") - logs)
    size = rows["N"].to_numpy(dtype=float)
    ratio = CHINCHILLA({"N": size, "D": moved.to_numpy()}, params) / CHINCHILLA({"N": size, "D": rows["D"]}, params)
    return rows.assign(**{selection.loss: rows["y"] * ratio}, D=moved, C=6.0 * rows["N"] * moved)
