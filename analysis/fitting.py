"""Fits. `fit` is the public function; the Chinchilla fit stands below it, the isoFLOP fit in its own file.

A fit is four steps: choose the runs (`selection`), measure the noise, solve, and judge what the numbers can bear.
Refusals come back as verdicts, not as exceptions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.isoflop import fit_isoflop
from analysis.laws import CHINCHILLA, Counter, optimum, smooth_counter
from analysis.selection import Selection, provenance, select
from analysis.solver import Problem, descend, solve
from analysis.uncertainty import Noise, interval, judge_noise
from analysis.verdicts import (
    NAN,
    NOTHING,
    OPEN,
    Estimate,
    Fit,
    Interval,
    Verdict,
    budget_name,
    extrapolation,
    narrow_span,
)
from sweeps.errors import InputError, nearest

LAWS = ("chinchilla", "isoflop")
MIN_RUNS = 8
BATCH = 1_000_000
"""Losses that one batch of the bootstrap solves for at once."""
PATH_SPREAD = 0.2
"""Runs within about 20 % of one line in (ln N, ln D) cannot tell the two terms apart."""


def fit(
    runs: pd.DataFrame,
    law: str = "chinchilla",
    *,
    loss: str | None = None,
    targets: Sequence[float] = (),
    noise: float | None = None,
    threshold: float | None = None,
    resamples: int | None = None,
    seed: int = 0,
) -> Fit:
    """Fit a law to a table of runs: `load_runs`, `read_table`, or any frame with N, D and a loss.

    law: "chinchilla", E + A / N^alpha + B / D^beta over all runs; "isoflop", N*(C) and D*(C) through the minima of
        the compute budgets.
    loss: the column to fit, by default `val_loss_final`, else `loss` (nats per token).
    targets: compute, in FLOPs, at which the best N and D are wanted.
    noise: standard deviation of ln loss between equal runs; by default it is measured between seeds.
    threshold: of the Huber loss of the Chinchilla fit, in ln loss; by default 1.5 times the noise. 1e-3 is Hoffmann's.
    resamples: of the parametric bootstrap (by default 2000 for isoflop, 1000 for chinchilla). seed: of its draws.

    Returns a Fit; a fit that the runs do not support comes back refused, with verdicts that say why. Raises
    InputError for an unknown law, a missing column or a number that makes no sense.
    """
    if law not in LAWS:
        raise InputError(f"unknown law {law!r}{nearest(law, LAWS)}. Known laws: {', '.join(LAWS)}.")
    for name, value in (("noise", noise), ("threshold", threshold), *(("a target", t) for t in targets)):
        if value is not None and not 0 < value < np.inf:
            raise InputError(f"{name} is {value!r}; it must be a positive number.")
    selection = select(runs, loss)
    if noise is not None:
        given = Noise(sd=noise, freedom=np.inf, source="given")
        selection = replace(selection, noise=given)
    if law == "isoflop":
        return fit_isoflop(selection, targets=targets, resamples=resamples or 2000, seed=seed)
    return fit_chinchilla(selection, targets=targets, threshold=threshold, resamples=resamples or 1000, seed=seed)


def fit_chinchilla(
    selection: Selection,
    *,
    targets: Sequence[float] = (),
    threshold: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Fit:
    """Fit the Chinchilla law to selected runs.

    params: E (nats), A, B, alpha, beta. decisions: N_exponent and D_exponent of the compute-optimal path over the
    compute that the runs span, under their own FLOP counter; the same under 6 N D; and N, D, loss at each target.
    """
    rows = selection.rows
    N, D, C = (rows[c].to_numpy(dtype=float) for c in ("N", "D", "C"))
    log_loss = np.log(rows["loss"].to_numpy(dtype=float))
    verdicts = [*selection.verdicts, *_design_verdicts(N, D)]
    if any(v.severity == "refuse" and v.scope == "fit" for v in verdicts):
        return _refused(selection, verdicts, targets)

    # 1. a robust pilot tells the scale of the residuals; with the seeds' noise it sets the Huber threshold
    problem = Problem.of(N, D, log_loss)
    pilot = solve(problem, 1e-3)
    spread = _residual_sd(problem, pilot.theta)
    # A median-based scale is worth 37 % of the points that a root mean square would be.
    freedom = 0.37 * (len(rows) - len(CHINCHILLA))
    noise, said = judge_noise(selection.noise, spread, freedom)
    verdicts += [*said, *narrow_span(C)]
    delta = threshold or max(1.5 * noise.sd, 1e-6)

    # 2. the fit, and the parametric bootstrap around it
    best = solve(problem, delta)
    params = problem.params(best.theta)
    generator = np.random.default_rng(seed)
    errors = _errors(problem, best.theta, noise, generator, resamples)
    copies = problem.predict(best.theta) + errors
    parts = np.array_split(copies, max(1, copies.size // BATCH))  # in parts, so that memory stays small
    thetas = np.concatenate([descend(problem, p, delta, np.tile(best.theta, (len(p), 1)))[0] for p in parts])
    draws = problem.params(thetas)
    intervals = {k: interval(v) for k, v in draws.items()}

    # 3. what the parameters and the decisions can bear
    intervals, said = _parameter_verdicts(problem, best.theta, intervals, draws)
    verdicts += said
    counter = smooth_counter(N, C / D)
    decisions, said = _decisions(params, draws, counter, C, targets)
    verdicts += said
    misses = log_loss - problem.predict(best.theta)
    return Fit(
        law="chinchilla",
        loss=selection.loss,
        params={k: float(v) for k, v in params.items()},
        intervals=intervals,
        verdicts=tuple(verdicts),
        n_runs=len(rows),
        planned=selection.planned,
        finished=selection.finished,
        excluded=selection.excluded,
        noise=noise.to_json() | {"residual_sd": spread, "residual_freedom": freedom},
        decisions=decisions,
        provenance=provenance(selection, threshold=delta, resamples=resamples, seed=seed, scale="ln loss"),
        diagnostics={
            "params": {k: float(v) for k, v in params.items()},
            "objective": best.objective,
            "threshold": delta,
            "starts": best.starts,
            "starts_near_best": best.near_best,
            "largest_miss": {"cell": str(rows["cell"][int(np.abs(misses).argmax())]), "ln_loss": _largest(misses)},
        },
        draws=draws,
    ).settle()


def _residual_sd(problem: Problem, theta: np.ndarray) -> float:
    """Scale of the residuals from their median size, with the freedom that five parameters take."""
    misses = np.abs(problem.log_loss - problem.predict(theta))
    count = len(misses)
    return float(1.4826 * np.median(misses) * np.sqrt(count / (count - len(CHINCHILLA))))


def _errors(
    problem: Problem, theta: np.ndarray, noise: Noise, generator: np.random.Generator, count: int
) -> np.ndarray:
    """Noise for the bootstrap copies, (count, n): Gaussian where its scale was measured or given.

    Noise that was read off the residuals keeps their shape instead, since real ones have heavy tails and grow with
    the loss: a wild bootstrap, every point's own residual, enlarged by its leverage as in HC3, with a random sign
    (Feng, He & Hu 2011, who show that robust fits need signs rather than Gaussian factors).
    """
    shape = (count, len(problem.x))
    if noise.source != "residuals":
        return generator.standard_normal(shape) * noise.draw(generator, count)[:, None]
    predicted, slopes = problem.jacobian(theta)
    leverage = np.einsum("nk,kn->n", slopes, np.linalg.pinv(slopes))
    own = (problem.log_loss - predicted) / np.clip(1.0 - leverage, 0.1, 1.0)
    freedom = len(problem.x) - len(CHINCHILLA)
    return generator.choice([-1.0, 1.0], shape) * own * np.sqrt(freedom / generator.chisquare(freedom, count))[:, None]


def _largest(misses: np.ndarray) -> float:
    return float(misses[np.abs(misses).argmax()])


# --- verdicts and decisions --------------------------------------------------------------------------------------


def _design_verdicts(N: np.ndarray, D: np.ndarray) -> list[Verdict]:
    """What the placement of the runs alone forbids."""
    if len(N) < MIN_RUNS:
        message = f"{len(N)} usable runs for five parameters; at least {MIN_RUNS} are needed, better 12."
        return [Verdict("too_few_runs", "refuse", "fit", None, message)]
    sizes, tokens = (len(np.unique(np.round(np.log(v), 2))) for v in (N, D))
    if sizes < 3 or tokens < 3:
        message = f"{sizes} sizes and {tokens} token counts; the law needs three of each to show its curvature."
        return [Verdict("too_few_levels", "refuse", "fit", None, message)]
    across = float(np.sqrt(max(np.linalg.eigvalsh(np.cov(np.log(N), np.log(D)))[0], 0.0)))
    if across < PATH_SPREAD:
        message = (
            "all runs lie along one path in (N, D), so its two terms cannot be told apart. Add runs off that path: "
            "small models on many tokens, large ones on few."
        )
        return [Verdict("one_path", "refuse", "fit", None, message)]
    return []


def _parameter_verdicts(
    problem: Problem, theta: np.ndarray, intervals: Mapping[str, Interval], draws: Mapping[str, np.ndarray]
) -> tuple[dict[str, Interval], list[Verdict]]:
    """Parameters at the edge of what was searched, and a floor that cannot be told from zero."""
    verdicts: list[Verdict] = []
    bounded = dict(intervals)
    near = 1e-6 * (problem.upper - problem.lower)
    at_edge = (theta <= problem.lower + near) | (theta >= problem.upper - near)
    for i, names in ((1, ("A", "alpha")), (2, ("B", "beta")), (3, ("alpha", "A")), (4, ("beta", "B"))):
        if at_edge[i]:
            message = f"{names[0]} ran into the edge of what was searched: the runs do not determine this term."
            verdicts += [Verdict("at_bound", "refuse", "parameter", name, message) for name in names]
    if verdicts:
        message = "a term of the law is not determined, so the law recommends nothing."
        verdicts.append(Verdict("at_bound", "refuse", "decision", None, message))
    least = float(np.exp(problem.log_loss.min()))
    if at_edge[0] or float((draws["E"] < 0.02 * least).mean()) > 0.025:
        message = (
            "E cannot be told from zero: over these runs the loss still falls like a pure power law. Longer or "
            "larger runs would show the floor."
        )
        verdicts.append(Verdict("floor_unseen", "refuse", "parameter", "E", message))
    for i, name in ((3, "alpha"), (4, "beta")):
        low, high = intervals[name]
        open_low, open_high = low <= problem.lower[i] + 1e-9, high >= problem.upper[i] - 1e-9
        if open_low or open_high:
            bounded[name] = (NAN if open_low else low, NAN if open_high else high)
            message = f"the noise leaves {name} open towards {'lower' if open_low else 'higher'} values."
            verdicts.append(Verdict("open_interval", "caution", "parameter", name, message))
    return bounded, verdicts


def _decisions(
    params: Mapping[str, Any],
    draws: Mapping[str, np.ndarray],
    counter: Counter,
    C: np.ndarray,
    targets: Sequence[float],
) -> tuple[dict[str, Any], list[Verdict]]:
    """What the law recommends: exponents of the compute-optimal path, and the optimum at each target."""
    verdicts: list[Verdict] = []
    middle = float(np.exp(np.log(C).mean()))
    span = (min(float(C.min()), middle / np.sqrt(10)), max(float(C.max()), middle * np.sqrt(10)))
    width = np.log(span[1] / span[0])

    def exponents(law: Mapping[str, Any]) -> tuple[Any, Any]:
        low, high = (optimum(c, law, counter) for c in span)
        return np.log(high.N / low.N) / width, np.log(high.D / low.D) / width

    points, copies = exponents(params), exponents(draws)
    share, shares = (v["beta"] / (v["alpha"] + v["beta"]) for v in (params, draws))
    decisions: dict[str, Any] = {
        "N_exponent": Estimate(value=float(points[0]), interval=interval(copies[0])),
        "D_exponent": Estimate(value=float(points[1]), interval=interval(copies[1])),
        "N_exponent_6nd": Estimate(value=float(share), interval=interval(shares)),
        "D_exponent_6nd": Estimate(value=float(1 - share), interval=interval(1 - shares)),
        "targets": [],
    }
    for target in targets:
        point, copy = optimum(float(target), params, counter), optimum(float(target), draws, counter)
        entry: dict[str, Any] = {"C": float(target), "extrapolation": float(target) / float(C.max())}
        for name in ("N", "D", "loss"):
            entry[name] = Estimate(value=float(getattr(point, name)), interval=interval(getattr(copy, name)))
        entry["tokens_per_parameter"] = Estimate(value=float(point.D / point.N), interval=interval(copy.D / copy.N))
        decisions["targets"].append(entry)
        verdicts += extrapolation(float(target), float(C.max()))
        lost = float(np.isnan(copy.N).mean())
        if np.isnan(point.N) or lost > 0.05:
            severity: Any = "refuse" if np.isnan(point.N) or lost > 0.5 else "caution"
            message = (
                f"at {budget_name(target)} FLOPs the law has no interior optimum in {lost:.0%} of its noisy copies."
            )
            verdicts.append(Verdict("no_optimum", severity, "decision", budget_name(target), message))
    return decisions, verdicts


def _refused(selection: Selection, verdicts: list[Verdict], targets: Sequence[float]) -> Fit:
    """A Chinchilla fit without numbers."""
    noise = selection.noise.to_json() if selection.noise else {}
    blank = ("N_exponent", "D_exponent", "N_exponent_6nd", "D_exponent_6nd")
    estimates = ("N", "D", "loss", "tokens_per_parameter")
    return Fit(
        law="chinchilla",
        loss=selection.loss,
        params=dict.fromkeys(CHINCHILLA, NAN),
        intervals=dict.fromkeys(CHINCHILLA, OPEN),
        verdicts=tuple(verdicts),
        n_runs=len(selection.rows),
        planned=selection.planned,
        finished=selection.finished,
        excluded=selection.excluded,
        noise=noise,
        decisions=dict.fromkeys(blank, NOTHING)
        | {"targets": [{"C": float(t)} | dict.fromkeys(estimates, NOTHING) for t in targets]},
        provenance=provenance(selection),
        diagnostics={},
    )
