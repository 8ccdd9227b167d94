"""Fits. `fit` is the public function; what every law shares stands below it, the isoFLOP fit in its own file.

A fit is five steps: choose the runs (`selection`), measure the noise, solve (`solver`), resample, and judge what the
numbers can bear (`judging`, `decisions`). Refusals come back as verdicts, not as exceptions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import pandas as pd

from analysis import judging
from analysis.decisions import decide, undecided
from analysis.isoflop import Method, fit_isoflop
from analysis.laws import Law, find_law
from analysis.problems import OBJECTIVES, Objective, Problem, Robust, check_fixed, check_floor, make_problem
from analysis.resampling import (
    Way,
    along_curves,
    dependent_runs,
    draw_thetas,
    group_labels,
    places_of,
    repeats_of,
    robust_scale,
    root_weights,
    trunk_labels,
)
from analysis.selection import Selection, drop_rows, provenance, select
from analysis.solver import Solution, descend, solve
from analysis.uncertainty import Noise, interval, judge_noise, noise_by_scale, upper_half
from analysis.verdicts import NAN, OPEN, Fit, Verdict, narrow_span, refused
from sweeps.errors import InputError, nearest
from sweeps.units import plural

ISOFLOP: Mapping[str, Method] = {"isoflop": "parabola", "akima": "akima"}
MANY_ROWS = 20
"""From so many rows on, and without seed noise, the rows themselves are resampled."""
ALONG_CURVES = (
    "but these intervals take each for a run of its own, so they may be far too narrow. --cluster {column} (in "
    "Python cluster=) draws curves whole; the ends of runs alone are safer, since on the way the learning rate is not "
    "annealed."
)
CREASE = 1e-9
"""Threshold of least absolute deviations, which the solver reaches as a limit of Huber's."""


def fit(
    runs: pd.DataFrame,
    law: str = "chinchilla",
    *,
    loss: str | None = None,
    targets: Sequence[float] = (),
    loss_targets: Sequence[float] = (),
    noise: float | None = None,
    objective: Objective = "huber",
    threshold: float | None = None,
    raw: bool = False,
    fixed: Mapping[str, float] | None = None,
    drop_worst: int = 0,
    resample: Way | Literal["auto"] = "auto",
    cluster: str | None = None,
    weights: str | None = None,
    resamples: int | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Fit:
    """Fit a law to a table of runs: `load_runs`, `read_table`, or any frame with the law's variables and a response.

    law: a name of `analysis.laws.LAWS`, bnsl:<breaks>, or "isoflop": N*(C) and D*(C) through the minima of budgets,
        each that of a parabola; "akima" takes the minima of splines (Porian et al. 2024).
    loss: the column to fit, by default `val_loss_final`, else the law's response (a loss in nats per token).
    targets: compute, in FLOPs, at which the best N and D are wanted. loss_targets: losses whose least compute is.
    noise: standard deviation of ln loss between equal runs; by default it is measured between seeds.
    objective: of the residuals of ln loss: huber, lad (least absolute deviations), l2, student (4 degrees of freedom).
    threshold: Huber's, and the scale of Student's t, in ln loss; by default 1.5 times the noise, measured between
        seeds, else robustly from the residuals. 1e-3 is Hoffmann's, which at .5% noise is nearly lad.
    raw: residuals of the response itself in place of its logarithm; their scatter is taken for the noise.
    fixed: parameters held at a value. drop_worst: leave out so many of the worst-fitting runs (a verdict says so).
    resample: where intervals come from. noise: a parametric bootstrap with the seeds' noise, or the residuals' scale;
        rows: rows drawn with replacement, or whole groups of equal `cluster` (a configuration), by default the cells
        of each trunk; delta: a normal approximation with sandwich covariance. auto: rows where runs are grouped so,
        else noise where it was measured or rows are few, else rows.
    weights: a column of positive weights of the rows, such as 1 / variance.
    resamples: by default 2000 for isoflop, 1000 otherwise. level: of the intervals. seed: of the draws.

    Returns a Fit; a fit that the runs do not support comes back refused, with verdicts that say why. Raises
    InputError for an unknown law or option, a missing column or a number that makes no sense.
    """
    _check_choice("objective", objective, OBJECTIVES)
    _check_choice("resample", resample, ("auto", *get_args(Way)))
    numbers = {"noise": noise, "threshold": threshold, "resamples": resamples}
    for name, value in (*numbers.items(), *(("a target", t) for t in (*targets, *loss_targets))):
        if value is not None and not 0 < value < np.inf:
            raise InputError(f"{name} is {value!r}; it must be a positive number.")
    if not 0.5 <= level < 1:
        raise InputError(f"level is {level!r}; it must be from 0.5 to below 1, such as 0.95.")
    if law in ISOFLOP:
        selection = _with_noise(select(runs, loss), noise)
        return fit_isoflop(
            selection, targets=targets, method=ISOFLOP[law], resamples=resamples or 2000, level=level, seed=seed
        )
    if raw and noise is not None:
        raise InputError(
            "noise is that of ln loss, and raw fits the loss itself, by its own scatter: give one of them."
        )
    form = find_law(law)
    check_fixed(form, fixed or {})
    selection = _with_noise(
        select(runs, loss, form.variables, form.response, [c for c in (cluster, weights) if c]), noise
    )
    if len(selection.rows):
        check_floor(form, fixed or {}, selection.rows["y"].to_numpy(dtype=float))
    settings = Settings(
        objective=objective,
        threshold=threshold,
        raw=raw,
        fixed=dict(fixed or {}),
        resample=resample,
        cluster=cluster,
        weights=weights,
        resamples=resamples or 1000,
        level=level,
        seed=seed,
    )
    if drop_worst:
        selection = _without_worst(form, selection, settings, drop_worst)
    return fit_law(form, selection, settings, targets=targets, loss_targets=loss_targets)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a law is fitted; `fit` describes the fields."""

    objective: Objective = "huber"
    threshold: float | None = None
    raw: bool = False
    fixed: Mapping[str, float]
    resample: Way | Literal["auto"] = "auto"
    cluster: str | None = None
    weights: str | None = None
    resamples: int = 1000
    level: float = 0.95
    seed: int = 0


def fit_law(
    form: Law,
    selection: Selection,
    settings: Settings,
    *,
    targets: Sequence[float] = (),
    loss_targets: Sequence[float] = (),
) -> Fit:
    """Fit a law to selected runs. Decisions are those of laws of N and D; see `decisions`."""
    rows = selection.rows
    verdicts = [*selection.verdicts, *judging.design(form, rows, len(settings.fixed))]
    if any(v.severity == "refuse" and v.scope == "fit" for v in verdicts):
        return _refused(form, selection, verdicts, targets, loss_targets)
    problem = problem_of(form, rows, settings)

    # 1. the noise sets the threshold, and the threshold what counts as an outlier
    free = len(form.names) - len(settings.fixed)
    best, spread = _calibrate(problem, free)
    freedom = max(0.9 * (problem.rows - free), 0.0)
    seeds = selection.noise if not settings.raw else None
    repeats = repeats_of(problem, (problem.predict(best.theta) - problem.target) * root_weights(problem), free)
    if repeats is None:
        noise, said = judge_noise(seeds, spread, freedom)
    else:
        noise, said = judge_noise(seeds, repeats.sd, repeats.freedom, repeats.between)
    if repeats is not None and noise.source == "residuals":
        spread, freedom = repeats.sd, repeats.freedom
    else:  # nothing is seen that the runs of a place have in common
        repeats = None
    if settings.raw and noise.source == "residuals":
        message = (
            f"residuals of {form.response} itself: their scatter ({noise.sd:.3g}, in its unit) is taken for the noise, "
            "and also holds what the law misses. What seeds differ by is known of the logarithm alone."
        )
        said = [Verdict("noise_from_residuals", "info", "fit", None, message)]
    verdicts += said
    robust = _robust(settings, noise if np.isfinite(noise.sd) else Noise(sd=1e-3, freedom=0, source="unknown"))
    best = solve(problem, robust)

    # 2. draws of the parameters
    way: Way = settings.resample if settings.resample != "auto" else "noise"
    trunks = trunk_labels(rows)
    cluster = settings.cluster or ("cell" if trunks is None else "trunk")
    labels = trunks if cluster == "trunk" and trunks is not None else group_labels(rows, cluster)
    if settings.resample == "auto" and settings.cluster is None and trunks is None and repeats is not None:
        labels = repeats.places.astype(str)  # what the law misses at a place is common to its runs
    units = len(np.unique(labels))
    many = selection.noise is None and units >= MANY_ROWS
    if trunks is not None:
        many = units >= free + 2  # fewer cannot be resampled
    if settings.resample == "auto" and (settings.cluster or many):
        way = "rows"
    drawn = _pooled(noise, spread, freedom)
    own, said = [drawn] * len(rows), list[Verdict]()
    if "C" in rows.columns:
        own, said = _by_compute(problem, best.theta, rows["C"].to_numpy(dtype=float), drawn, spread, free)
    verdicts += said if way == "noise" else []  # rows and trunks that are drawn bring their own scatter along
    thetas = draw_thetas(
        problem,
        robust,
        best.theta,
        drawn,
        way,
        labels,
        by_row=own,
        repeats=repeats,
        count=settings.resamples,
        seed=settings.seed,
    )
    draws = problem.params(thetas) if len(thetas) else {}
    if not len(thetas) and way == "rows":
        verdicts.append(_too_few_units(units, None if cluster == "cell" else cluster, free))
    if settings.cluster is None and (curves := along_curves(rows, ALONG_CURVES)) is not None:
        verdicts.append(curves)
    if trunks is not None and way != "rows":
        remedy = f'In Python resample="rows" draws trunks whole, from {free + 2} on; more seeds or sizes make more.'
        verdicts.append(dependent_runs(trunks, remedy))
    intervals = {k: interval(draws[k], settings.level) if draws else OPEN for k in form.names}

    # 3. what the parameters and the decisions can bear
    verdicts += narrow_span(rows["C"].to_numpy(dtype=float)) if "C" in rows.columns else []
    said, notes = judging.judge(problem, robust, best, thetas, rows)
    verdicts += said
    params = {k: float(v) for k, v in problem.params(best.theta).items()}
    decisions, said = decide(form, params, draws, rows, targets, loss_targets, settings.level)
    verdicts += said if not refused(verdicts, "decision") else []  # a law that is not determined says nothing of them
    misses = problem.predict(best.theta) - problem.target
    worst = int(np.abs(misses).argmax())
    dearest = int(rows["C"].to_numpy(dtype=float).argmax()) if "C" in rows.columns else 0
    return Fit(
        law=form.name,
        loss=selection.loss,
        params=params,
        intervals=intervals,
        verdicts=tuple(verdicts),
        n_runs=len(rows),
        planned=selection.planned,
        finished=selection.finished,
        excluded=selection.excluded,
        noise=noise.to_json()
        | {"residual_sd": spread, "residual_freedom": freedom}
        | ({"common": repeats.common} if repeats is not None else {})
        | {"drawn_sd": drawn.sd, "drawn_freedom": drawn.freedom}
        | {"dearest_sd": own[dearest].sd, "dearest_freedom": own[dearest].freedom},
        decisions=decisions,
        provenance=provenance(
            selection,
            objective=settings.objective,
            threshold=robust.delta,
            resample=way,
            resamples=len(thetas),
            cluster=None if cluster == "cell" else cluster,
            weights=settings.weights,
            fixed=dict(settings.fixed),
            level=settings.level,
            seed=settings.seed,
            scale="response" if settings.raw else f"ln {form.response}",
        ),
        diagnostics={
            "params": params,
            "objective": best.objective,
            "threshold": robust.delta,
            "starts": best.starts,
            "starts_agreeing": best.agreeing,
            "largest_miss": {"cell": str(rows["cell"].iloc[worst]), "ln_loss": float(-misses[worst])},
            **notes,
        },
        draws=draws,
        level=settings.level,
    ).settle()


def problem_of(form: Law, rows: pd.DataFrame, settings: Settings, *, centred: bool = True) -> Problem:
    """The solver's problem of a law on selected rows."""
    variables = {name: rows[name].to_numpy(dtype=float) for name in form.variables}
    weights = pd.to_numeric(rows[settings.weights], errors="coerce").to_numpy(dtype=float) if settings.weights else None
    if weights is not None and not ((weights > 0) & (weights < np.inf)).all():
        raise InputError(f"the weights in {settings.weights} must be positive numbers; leave rows without one out.")
    return make_problem(
        form,
        variables,
        rows["y"].to_numpy(dtype=float),
        raw=settings.raw,
        fixed=settings.fixed,
        centred=centred,
        weights=weights,
    )


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}{nearest(value, allowed)}; it must be one of {', '.join(allowed)}.")


def _with_noise(selection: Selection, noise: float | None) -> Selection:
    return selection if noise is None else replace(selection, noise=Noise(sd=noise, freedom=np.inf, source="given"))


def _without_worst(form: Law, selection: Selection, settings: Settings, count: int) -> Selection:
    """The selection without the worst-fitting runs of a fit to all of it."""
    least = len(form.names) + 1
    if not 0 < count <= len(selection.rows) - least:
        raise InputError(
            f"drop_worst is {count}; from {len(selection.rows)} usable runs at most "
            f"{max(len(selection.rows) - least, 0)} can go."
        )
    problem = problem_of(form, selection.rows, settings)
    best, _ = _calibrate(problem, len(form.names) - len(settings.fixed))
    misses = np.abs(problem.predict(best.theta) - problem.target)
    worst = np.argsort(misses)[-count:]
    message = (
        f"{count} of {plural(len(misses), 'run')}, the worst-fitting, left out on request: the fit looks better than "
        "it is, and its intervals do not know of the choice."
    )
    verdict = Verdict("outcome_selection", "caution", "fit", None, message, {"dropped": count})
    return drop_rows(selection, worst, "among the worst-fitting runs (drop_worst)", verdict)


# --- noise and threshold -----------------------------------------------------------------------------------------


def _calibrate(problem: Problem, free: int) -> tuple[Solution, float]:
    """A first solution, and the scale of its residuals (Huber's proposal 2: threshold and scale found together)."""
    best = solve(problem, Robust("l2", 1.0))
    freedom = max(problem.rows - free, 1)
    root = root_weights(problem)
    misses = (problem.predict(best.theta) - problem.target) * root
    scale = float(np.sqrt(np.square(misses).sum() / freedom))
    # With few rows per parameter nothing can be called an outlier; and a scale of nothing has no threshold.
    for _ in range(6 if problem.rows >= 3 * free else 0):
        if scale < 1e-12:
            break
        robust = Robust("huber", 1.5 * scale)
        theta, _ = descend(problem, robust, best.theta[None])
        misses = (problem.predict(theta[0]) - problem.target) * root
        # the mean of min(z, 1.5)^2 over a standard normal is .7784
        new = float(np.sqrt(np.square(np.clip(misses, -1.5 * scale, 1.5 * scale)).sum() / (0.7784 * freedom)))
        best = Solution(theta[0], best.objective, best.ends)
        done, scale = abs(new - scale) < 0.01 * scale, new
        if done:
            break
    return best, scale


def _robust(settings: Settings, noise: Noise) -> Robust:
    if settings.objective == "lad":
        return Robust("lad", CREASE)
    if settings.objective == "student":
        return Robust("student", settings.threshold or max(noise.sd, 1e-6))
    return Robust(settings.objective, settings.threshold or max(1.5 * noise.sd, 1e-6))


def _pooled(noise: Noise, spread: float, freedom: float) -> Noise:
    """The noise that resamples are drawn with: that of the residuals where seeds were replicated, since they agree.

    A few replicated seeds tell the noise only to within a third, and intervals built on that are as unsure. Where the
    residuals scatter no more than the seeds do, all runs measure one noise, replicates included: the residual mean
    square after a passed test for lack of fit (Draper & Smith 1998, 2.1). `Noise.pooled` is for residuals of means over
    seeds; those of rows hold what seeds differ by already, which it would count twice.
    """
    if noise.source != "seeds" or freedom <= noise.freedom or not spread > 0:
        return noise
    return replace(noise, sd=spread, freedom=freedom)


def _by_compute(
    problem: Problem, theta: np.ndarray, C: np.ndarray, drawn: Noise, spread: float, free: int
) -> tuple[list[Noise], list[Verdict]]:
    """The noise of each row's copies, by its compute.

    Whether halves differ is asked of residuals clipped as Huber does, so that outliers make no half noisy. How much
    they do is told by each half's own scale: at the clip for all the noisier one would lose a third.
    """
    misses = (problem.predict(theta) - problem.target) * root_weights(problem)
    # what the law misses is common to the seeds of a cell, which then count as one
    cells = int(places_of(pd.DataFrame(problem.variables), problem.law.variables).max()) + 1
    count = cells / len(C) if drawn.source == "residuals" else 1.0
    kept = max(1.0 - free / len(C), 0.0)
    freedom = np.full(len(C), count * kept)
    clipped = np.clip(misses, -1.5 * spread, 1.5 * spread)
    own, said = noise_by_scale(C, count * clipped**2 / 0.7784, freedom, drawn)
    if not said:
        return own, said
    high = upper_half(C)
    scales = np.where(high, *(robust_scale(misses[half], half.sum() * kept) for half in (high, ~high)))
    wider, told = noise_by_scale(C, count * kept * scales**2, freedom, drawn)
    return (wider, told) if told else (own, said)


def _too_few_units(units: int, cluster: str | None, free: int) -> Verdict:
    """Why a bootstrap by rows or groups gave nothing."""
    name = f"groups of equal {cluster}" if cluster else "runs"
    message = (
        f"{units} {name} cannot be resampled for {free} parameters, so there are no intervals; at least {free + 2} "
        "are needed."
    )
    return Verdict("too_few_units", "caution", "fit", None, message, {"units": units, "parameters": free})


def _refused(
    form: Law,
    selection: Selection,
    verdicts: list[Verdict],
    targets: Sequence[float],
    loss_targets: Sequence[float],
) -> Fit:
    """A fit without numbers."""
    return Fit(
        law=form.name,
        loss=selection.loss,
        params=dict.fromkeys(form.names, NAN),
        intervals=dict.fromkeys(form.names, OPEN),
        verdicts=tuple(verdicts),
        n_runs=len(selection.rows),
        planned=selection.planned,
        finished=selection.finished,
        excluded=selection.excluded,
        noise=selection.noise.to_json() if selection.noise else {},
        decisions=undecided(form, targets, loss_targets),
        provenance=provenance(selection),
        diagnostics={},
    )
