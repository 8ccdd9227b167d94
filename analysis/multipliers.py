"""What a difference in loss is worth: in compute along a frontier, and in model size at equal tokens.

A loss means little by itself; both multipliers read it off a law fitted to runs that were tuned. The failure it guards
against: a law with an irreducible loss cannot pay for every gain. Where the gain is more than half of what size can
still bring, A / N^alpha, the size multiplier runs away with the last digits of E and A, so only a bound is given. And
where the noise leaves alpha open, that bound is 2^(1 / alpha) at the edge of what was searched, so none is given.

    compute   C(L) inverts L_tuned(C), the lowest loss at each compute; the multiplier is C(L_tuned) / C(L_default)
    size      A / N^alpha - A / (x N)^alpha = L_default - L_tuned,  so  x = (1 - gain N^alpha / A)^(-1 / alpha)
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.allocation import optimum, smooth_counter
from analysis.decisions import FEW_DRAWS
from analysis.fitting import fit
from analysis.uncertainty import interval
from analysis.verdicts import NAN, NOTHING, Estimate, Fit, Verdict

HALF = 0.5
"""Share of A / N^alpha beyond which a size multiplier is only bounded from below."""
ONE_LEVEL = 0.05
"""Token counts whose ln spread less than this are one."""
MARGIN = np.log(1e4)
"""How far, in ln C, beyond the runs the frontier is tabled."""
KNOTS = 33
OPEN_ALPHA = ("open_interval", "at_bound", "not_identifiable")
"""What a law's fit says of an alpha that its runs do not determine."""


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The tuned runs' lowest loss as a function of compute, and their loss as a function of size.

    law: the Chinchilla law over N and D; where the runs cannot bear it, of one path through them: "saturating" in C.
    size_law: whose A and alpha say what size brings: the Chinchilla law, or at one token count the saturating law in N.
    x: ln C, (knots,). losses: nats, (1 + copies, knots), the point estimate first. floor: E of each, (1 + copies,).
    """

    law: Fit | None
    size_law: Fit | None
    x: np.ndarray
    losses: np.ndarray
    floor: np.ndarray
    compute_range: tuple[float, float]
    verdicts: tuple[Verdict, ...]


def tuned_frontier(rows: pd.DataFrame, level: float = 0.95, seed: int = 0, noise: float | None = None) -> Frontier:
    """The frontier of tuned runs: rows of N, D, C and `loss` (nats), one for each (N, D). May be refused in parts.

    noise: standard deviation of their ln loss; by default read off the residuals.
    """
    law = fit(rows, "chinchilla", level=level, seed=seed, resamples=FEW_DRAWS, noise=noise)
    verdicts: list[Verdict] = []
    size_law: Fit | None = law
    if law.refused:
        reason = next(v.message for v in law.verdicts if v.severity == "refuse")
        law = _saturating(rows, "C", level, seed, noise)
        if law.refused:
            why = next(v.message for v in law.verdicts if v.severity == "refuse")
            message = f"the tuned runs bear no law, so there are no multipliers: {why}"
            return _none(Verdict("no_power_law", "refuse", "decision", None, message))
        one_length = np.ptp(np.log(rows["D"].to_numpy(dtype=float))) < ONE_LEVEL
        size_law = _saturating(rows, "N", level, seed, noise) if one_length else None
        if size_law is None or size_law.refused:
            size_law = None
            message = f"the tuned runs bear no law of size and tokens, so there is no size multiplier: {reason}"
            verdicts.append(Verdict("no_power_law", "refuse", "decision", "size", message))
        message = "compute multipliers run along the one path of these runs, not along a frontier of free N and D."
        verdicts.append(Verdict("one_path", "info", "decision", "compute", message))
    open_ends = [v for v in size_law.verdicts if v.target == "alpha" and v.code in OPEN_ALPHA] if size_law else []
    if open_ends:
        size_law = None
        message = f"alpha is not determined by these runs, so there is no size multiplier: {open_ends[0].message}"
        message += " More sizes, further apart, would tell it."
        verdicts.append(Verdict("not_identifiable", "refuse", "decision", "size", message, open_ends[0].evidence))
    copies = {k: np.concatenate([[law.solved[k]], law.draws.get(k, np.empty(0))[:FEW_DRAWS]]) for k in law.params}
    if not all(np.isfinite(v[0]) for v in copies.values()):
        message = "the law of the tuned runs is refused, so there are no multipliers."
        return _none(Verdict("no_power_law", "refuse", "decision", None, message))
    C = rows["C"].to_numpy(dtype=float)
    x = np.linspace(np.log(C.min()) - MARGIN, np.log(C.max()) + MARGIN, KNOTS)
    if "beta" in copies:
        counter = smooth_counter(rows["N"], C / rows["D"].to_numpy(dtype=float))
        losses = optimum(np.exp(x)[None, :], {k: v[:, None] for k, v in copies.items()}, counter).loss
    else:
        losses = copies["E"][:, None] + copies["A"][:, None] * np.exp(-copies["alpha"][:, None] * x[None, :])
    verdicts += [v for v in law.verdicts if v.severity == "caution" and v.scope == "fit"]
    return Frontier(
        law=law,
        size_law=size_law,
        x=x,
        losses=np.asarray(losses),
        floor=copies["E"],
        compute_range=(float(C.min()), float(C.max())),
        verdicts=tuple(verdicts),
    )


def _saturating(rows: pd.DataFrame, variable: str, level: float, seed: int, noise: float | None) -> Fit:
    """The law E + A / x^alpha in one variable."""
    return fit(rows.assign(x=rows[variable]), "saturating", level=level, seed=seed, resamples=FEW_DRAWS, noise=noise)


def _none(verdict: Verdict) -> Frontier:
    empty = np.empty(0)
    return Frontier(
        law=None,
        size_law=None,
        x=empty,
        losses=np.empty((0, 0)),
        floor=empty,
        compute_range=(NAN, NAN),
        verdicts=(verdict,),
    )


def compute_multiplier(frontier: Frontier, tuned: np.ndarray, default: np.ndarray, level: float) -> Estimate:
    """How many times the compute the default needs for the tuned loss, along the tuned frontier.

    tuned, default: losses in nats, (1 + copies,), the point estimate first. An end where noisy copies leave the law's
    reach is open.
    """
    if frontier.law is None:
        return NOTHING
    count = min(len(tuned), len(frontier.losses))
    logs = _compute_at(frontier, tuned[:count]) - _compute_at(frontier, default[:count])
    if not np.isfinite(logs[0]):
        return NOTHING
    draws = np.exp(np.where(np.isnan(logs[1:]), np.inf, logs[1:]))  # out of reach: no compute of the law is enough
    low, high = interval(draws, level)
    return Estimate(
        value=float(np.exp(logs[0])), interval=(low if np.isfinite(low) else NAN, high if np.isfinite(high) else NAN)
    )


def _compute_at(frontier: Frontier, losses: np.ndarray) -> np.ndarray:
    """ln C at which each copy of the frontier, from the first on, has a loss; NaN beyond what is tabled or its floor.

    ln (L - E) is nearly straight in ln C, so that interpolation between the knots is exact to 1e-4 and better.
    """
    floor, table = frontier.floor[: len(losses), None], frontier.losses[: len(losses)]
    with np.errstate(invalid="ignore", divide="ignore"):
        above, wanted = np.log(table - floor), np.log(losses - floor[:, 0])
    # the knot before the loss: heights fall from knot to knot
    after = (above > wanted[:, None]).sum(axis=1)
    inside = (after > 0) & (after < len(frontier.x)) & np.isfinite(above).all(axis=1) & np.isfinite(wanted)
    i, rows = np.clip(after, 1, len(frontier.x) - 1), np.arange(len(losses))
    left, right = above[rows, i - 1], above[rows, i]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (left - wanted) / (left - right)
    return np.where(inside, frontier.x[i - 1] + share * (frontier.x[i] - frontier.x[i - 1]), NAN)


@dataclass(frozen=True, kw_only=True)
class SizeMultiplier:
    """How many times larger a model would have to be. `bounded`: only more than the value is known; its end is open."""

    estimate: Estimate = NOTHING
    bounded: bool = False

    def __str__(self) -> str:
        if not np.isfinite(self.estimate.value):
            return "-"
        return f"> {self.estimate.value:.2g}" if self.bounded else str(self.estimate)


NO_SIZE = SizeMultiplier()
"""The multiplier where no law tells what size brings."""


def size_multiplier(frontier: Frontier, N: float, gain: np.ndarray, level: float) -> SizeMultiplier:
    """How many times N parameters are needed at equal tokens for a gain (nats, (1 + copies,)), by the tuned law.

    Refused (NaN) where the law's A or alpha is. Where the gain exceeds half of A / N^alpha the value is the least
    that the interval allows, and `bounded`.
    """
    law = frontier.size_law
    if law is None or not np.isfinite([law.params["A"], law.params["alpha"]]).all():
        return NO_SIZE
    drawn = [law.draws.get(k, np.empty(0)) for k in ("A", "alpha")]
    count = min(len(gain) - 1, len(drawn[0]))
    A, alpha = (np.concatenate([[law.params[k]], d[:count]]) for k, d in zip(("A", "alpha"), drawn))
    share = gain[: count + 1] * N**alpha / A
    x = np.minimum(share, HALF)
    times = (1.0 - x) ** (-1.0 / alpha)
    low, high = interval(times[1:], level) if count else (NAN, NAN)
    if share[0] > HALF:
        return SizeMultiplier(estimate=Estimate(value=low if count else float(times[0])), bounded=True)
    if np.quantile(share[1:], (1 + level) / 2) > HALF if count else False:
        high = NAN
    return SizeMultiplier(estimate=Estimate(value=float(times[0]), interval=(low, high)))


def far_below(frontier: Frontier, losses: np.ndarray) -> list[Verdict]:
    """A caution where default losses lie on a part of the frontier far cheaper than any tuned run."""
    if frontier.law is None:
        return []
    least = min((float(_compute_at(frontier, np.array([v]))[0]) for v in losses), default=NAN)
    if not np.exp(least) < frontier.compute_range[0] / 10.0:
        return []
    message = (
        f"the worst default losses are those of tuned runs of {np.exp(least):.2g} FLOPs, far cheaper than any that was "
        "tuned; their compute multipliers extrapolate the law."
    )
    return [Verdict("extrapolation", "caution", "decision", "compute", message)]
