"""The three approaches of Hoffmann et al. 2022 (arXiv 2203.15556) side by side, and how far the second must be off.

One exponent from one method is a claim; three methods that agree on the same runs are evidence. What it guards against:
picking the approach that gives the wanted answer, and blaming noise for a difference that the method itself makes. A
parabola over a grid of sizes does not find the minimum of a law whose two exponents differ, however many seeds it has:
`approach2_bias` says by how much, from the fitted law itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from analysis.envelope import fit_curve_envelope, fit_envelope
from analysis.fitting import fit
from analysis.isoflop import WIDE, fit_isoflop
from analysis.selection import Selection, select
from analysis.uncertainty import Noise, interval
from analysis.verdicts import NAN, NOTHING, Estimate, Fit, Verdict, budget_name, clean
from sweeps.errors import InputError

NAMES = ("envelope", "isoflop", "akima", "parametric")
TELLING = 0.05
"""A bias of the parabola's minimum, as a part of N*, from which on it is cautioned against."""


def approach2_bias(alpha: Any, beta: Any, reach: float = WIDE, sizes: int = 9) -> Any:
    """N found by a parabola over the true compute-optimal N, without noise, for L = E + A / N^alpha + B / D^beta.

    The grid has `sizes` log-spaced sizes from N* / reach to N* reach at one compute with C = 6 N D; the parabola is
    of loss in ln N (in ln loss it is the same to a part in a thousand). alpha, beta: numbers or arrays of one shape
    (bootstrap draws); the result has their shape. At the optimum alpha A / N^alpha = beta B / D^beta, so the ratio
    depends on nothing else: not on C, A, B or E. It is 1 where alpha = beta; it is the same at every budget, which is
    why exponents survive it and sizes do not (arXiv 2603.22339). Raises InputError for a grid of under three sizes or
    a reach that is not above 1.
    """
    if sizes < 3 or not 1.0 < reach < np.inf:
        raise InputError(
            f"a grid of {sizes} sizes within a factor {reach!r} has no parabola: 3 sizes or more, a factor above 1."
        )
    alpha, beta = (np.asarray(v, dtype=float)[..., None] for v in (alpha, beta))
    x = np.linspace(-np.log(reach), np.log(reach), sizes)
    # The reducible loss at N = N* e^x, in units of either term's slope at the optimum.
    loss = np.exp(-alpha * x) / alpha + np.exp(beta * x) / beta
    _, slope, curvature = np.moveaxis(loss @ np.linalg.pinv(np.vander(x, 3, increasing=True)).T, -1, 0)
    ratio = np.exp(-slope / (2.0 * curvature))
    return float(ratio) if ratio.ndim == 0 else ratio


@dataclass(frozen=True, kw_only=True)
class Approaches:
    """The approaches on the same runs. One that cannot answer is None, and a verdict (target: its name) says why.

    envelope: approach 1. isoflop: approach 2 with parabolas; akima: with splines. parametric: approach 3, whose
    exponents are of the compute-optimal path over the compute spanned, under the runs' own FLOP counter.
    bias: what approach 2 multiplies N* by, given the fitted alpha and beta, on grids of +- `reach` about the minimum.
    targets: the compute asked for, FLOPs. verdicts: missing approaches, disagreement and bias; each fit has its own.
    """

    envelope: Fit | None
    isoflop: Fit | None
    akima: Fit | None
    parametric: Fit | None
    bias: Estimate = NOTHING
    reach: float = WIDE
    targets: tuple[float, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    def table(self) -> pd.DataFrame:
        """One row an approach, indexed by its name: exponents, and N* (parameters), D* (tokens), D*/N* at each target.

        Each number has its interval beside it in the columns `.._low` and `.._high`; NaN where there is none.
        `N_at_1e21` is N* at 1e21 FLOPs. `why` is empty, or the reason why the approach has no answer.
        """
        rows = {}
        for name in NAMES:
            found: Fit | None = getattr(self, name)
            row: dict[str, Any] = {}
            for v in ("N", "D"):
                row |= _spread(f"{v}_exponent", exponent(found, v) if found else NOTHING)
            for i, target in enumerate(self.targets):
                entry = found.decisions["targets"][i] if found else {}
                for key, column in (("N", "N"), ("D", "D"), ("tokens_per_parameter", "D_per_N")):
                    row |= _spread(f"{column}_at_{budget_name(target)}", entry.get(key, NOTHING))
            row["why"] = next((v.message for v in self.verdicts if v.target == name and found is None), "")
            rows[name] = row
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("approach")

    def to_json(self) -> dict[str, Any]:
        """JSON values: every fit, the bias and the verdicts."""
        fits = {name: found.to_json() if (found := getattr(self, name)) else None for name in NAMES}
        rest = {"bias": self.bias, "reach": self.reach, "targets": self.targets, "verdicts": self.verdicts}
        return fits | dict(clean(rest))


def exponent(found: Fit, variable: str) -> Estimate:
    """The exponent of N* or D* (variable "N" or "D") in C, with its interval, of a fit by any approach."""
    name = f"{variable}_exponent"
    if name in found.params:
        return Estimate(value=found.params[name], interval=found.intervals[name])
    estimate: Estimate = found.decisions[name]
    return estimate


def compare_approaches(
    runs: pd.DataFrame,
    curves: pd.DataFrame | None = None,
    *,
    targets: Sequence[float] = (),
    loss: str | None = None,
    noise: float | None = None,
    constant_rate: bool | None = None,
    resamples: int | None = None,
    seed: int = 0,
) -> Approaches:
    """Fit the envelope, the isoFLOP minima (parabola and spline) and the Chinchilla law to one table of runs.

    runs: as for `fit`. curves: as from `load_curves`; used for the envelope where their learning rate is constant (or
        constant_rate says so), on the runs that the fits use; else the envelope is that of the runs' end points.
    targets: compute in FLOPs at which N*, D* and D*/N* are wanted. loss, noise, resamples, seed: as for `fit`.
    Raises InputError as `fit` does.
    """
    settings: dict[str, Any] = {"targets": targets, "seed": seed} | ({"resamples": resamples} if resamples else {})
    parametric = fit(runs, "chinchilla", loss=loss, noise=noise, **settings)  # first, since it checks the arguments
    selection = select(runs, loss)
    if noise is not None:
        selection = replace(selection, noise=Noise(sd=noise, freedom=np.inf, source="given"))
    fits = {
        "envelope": _envelope(selection, curves, constant_rate, settings),
        "isoflop": fit_isoflop(selection, **settings),
        "akima": fit_isoflop(selection, method="akima", **settings),
        "parametric": parametric,
    }
    verdicts: list[Verdict] = []
    kept: dict[str, Fit | None] = {}
    for name, found in fits.items():
        stands = np.isfinite(exponent(found, "N").value)
        kept[name] = found if stands else None
        if not stands:
            why = next((v.message for v in found.verdicts if v.severity == "refuse"), "it has no exponent.")
            verdicts.append(Verdict("no_answer", "refuse", "decision", name, why))
    verdicts += _disagreements({k: exponent(v, "N") for k, v in kept.items() if v is not None})
    bias, reach, said = _bias(kept["parametric"], kept["isoflop"])
    return Approaches(
        **kept, bias=bias, reach=reach, targets=tuple(float(t) for t in targets), verdicts=(*verdicts, *said)
    )


def _envelope(
    selection: Selection, curves: pd.DataFrame | None, constant_rate: bool | None, settings: dict[str, Any]
) -> Fit:
    """From curves where they bear one, else from end points; if neither does, the refusal of what was given."""
    ends = fit_envelope(selection, **settings)
    if curves is None:
        return ends
    if "cell" not in curves.columns:
        raise InputError(
            "the curves lack the column cell, which says whose they are; they have "
            f"{', '.join(map(str, curves.columns))}. Name it as in the runs, or leave the curves out."
        )
    used = curves[curves["cell"].astype(str).isin(set(selection.rows["cell"].astype(str)))]
    found = fit_curve_envelope(used, constant_rate=constant_rate, **settings)
    return ends if found.refused and not ends.refused else found


def _disagreements(exponents: dict[str, Estimate]) -> list[Verdict]:
    """Pairs of approaches whose intervals of the exponent of N* do not touch."""
    verdicts = []
    for one, two in combinations(exponents, 2):
        (low, high), (least, most) = exponents[one].interval, exponents[two].interval
        if high < least or most < low:
            message = (
                f"the exponents of N* by {one} ({exponents[one]}) and {two} ({exponents[two]}) lie outside each "
                "other's intervals: at least one of them does not describe these runs."
            )
            verdicts.append(Verdict("approaches_disagree", "caution", "decision", "N_exponent", message))
    return verdicts


def _bias(law: Fit | None, path: Fit | None) -> tuple[Estimate, float, list[Verdict]]:
    """The bias of the parabolas' minima on grids like the runs' own, with its interval; the reach of such a grid."""
    grids = [b.sizes for b in path.budgets if b.accepted] if path else []
    reach = float(np.median([np.sqrt(sizes[-1] / sizes[0]) for sizes in grids])) if grids else WIDE
    count = round(float(np.median([len(sizes) for sizes in grids]))) if grids else 9
    if law is None or np.isnan([law.params["alpha"], law.params["beta"]]).any():
        return NOTHING, reach, []
    value = approach2_bias(law.params["alpha"], law.params["beta"], reach, count)
    draws = approach2_bias(law.draws["alpha"], law.draws["beta"], reach, count) if law.draws else np.array([NAN])
    bias = Estimate(value=value, interval=interval(draws))
    if abs(value - 1.0) < TELLING or bias.interval[0] <= 1.0 <= bias.interval[1]:
        return bias, reach, []
    message = (
        f"with alpha {law.params['alpha']:.3g} and beta {law.params['beta']:.3g}, parabolas over grids of a factor "
        f"{reach:.3g} each way find {value:.3g} times the best N, noise or none. Narrow the grids, or trust the spline."
    )
    return bias, reach, [Verdict("approach2_bias", "caution", "decision", "isoflop", message)]


def _spread(name: str, estimate: Estimate) -> dict[str, float]:
    low, high = estimate.interval
    return {name: estimate.value, f"{name}_low": low, f"{name}_high": high}
