"""Does a law predict runs that it has not seen? It is fitted to the cheap runs and scored on the dear ones.

The compute axis is cut at several places; at each, every law is fitted to the runs up to the cut. The error on the
largest scale is the number that a scaling law is judged by; how well a curve passes through its own points says little
(Choshen et al. 2024, arXiv 2410.11840).

The failure it guards against is the winner's curse: of several laws the one that did best on some runs looks better on
those runs than it is. A law is chosen by what was known at one cut, and its error is quoted at the next, dearer one,
on runs that had no part in the choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from analysis.fitting import Settings, fit_law
from analysis.forecast import predict
from analysis.laws import find_law
from analysis.resampling import along_curves, places_of, shared_past
from analysis.selection import Selection, select
from analysis.uncertainty import Noise, seed_noise
from analysis.verdicts import NAN, Fit, Verdict, budget_name, clean, refused
from sweeps.errors import InputError
from sweeps.units import plural

LAWS = ("chinchilla", "chinchilla_tied", "kaplan")
RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
SLACK = 0.9
"""Budgets are realised to within some percent: from 0.9 times a ratio on, a run counts as that many times dearer."""
USEFUL = 4.0
"""A backtest over less than this compute ratio says little about extrapolation."""
MOST_CUTS, LEAST_RUNS = 8, 4
ENOUGH, TOO_FEW = 8, 3
"""Runs scored at a ratio that settle it, and cells fewer than which say nothing."""
ERROR_BOUND = 0.02
"""Mean error of a predicted loss up to which a ratio counts as supported: half of what Choshen et al. call good."""
HOLDS = 0.6
"""Intervals hold where at least so much of what their level promises lies inside. Runs at one cut miss together, so a
share near the level cannot be asked for: on simulated studies of a law that holds, 5% of ratios fell below this."""
RESAMPLES = 200
ALONG_CURVES = (
    "so a dear one that is scored is no new run where a cheap one of its curve was fitted, and the law may look better "
    "than on runs of their own. Test the ends of runs alone."
)
_TOO_POOR = ("too_few_runs", "too_few_levels", "one_path")
"""Refusals that are about the number and placing of the runs that were fitted."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One law, fitted to the runs up to a cut, on the runs about `ratio` times dearer.

    cut: the dearest compute fitted, FLOPs. fitted, runs: how many runs were fitted, and scored. cells: those that were
    scored, all seeds of one counted once, since what the law misses is common to them. reach: median C / cut
    of the runs scored. error: mean of |predicted / measured - 1|, the absolute relative error. bias: mean of
    predicted / measured - 1. inside: share of the runs within their interval, a prediction's for a new run, seed
    noise included; NaN where the fit has no intervals. chosen: the law was the choice of an earlier cut, so that its
    numbers are free of the choice. refused: the code of the verdict that refused the fit; then there are no numbers.
    """

    law: str
    cut: float
    ratio: float
    fitted: int
    runs: int
    cells: int
    reach: float
    error: float = NAN
    bias: float = NAN
    inside: float = NAN
    chosen: bool = False
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The law that led at one cut, and how it did at the next: error and inside as in `Score`, over all ratios."""

    law: str
    chosen_at: float
    quoted_at: float
    runs: int
    error: float
    inside: float


@dataclass(frozen=True, kw_only=True)
class Backtest:
    """How laws fitted to the cheap runs predict the dear ones.

    laws: as asked for. dearest: the largest compute of all runs, FLOPs. level: of the intervals.
    chosen: the law that led at the last cut but one, or the only law; None where there was nothing to choose by.
    choices: every choice, with its error at the next cut; none for a single law, which is no choice.
    """

    laws: tuple[str, ...]
    dearest: float = NAN
    level: float = 0.95
    scores: tuple[Score, ...] = ()
    choices: tuple[Choice, ...] = ()
    chosen: str | None = None
    verdicts: tuple[Verdict, ...] = ()

    def table(self) -> pd.DataFrame:
        """One row per law, cut and ratio, with the fields of `Score`; a refused fit has a row without numbers."""
        return pd.DataFrame([vars(s) for s in self.scores], columns=list(Score.__dataclass_fields__))

    @property
    def ranking(self) -> dict[str, float]:
        """Mean error by law, best first, over the cuts and ratios that all answered; NaN for those that did not.

        For comparison only: the leader's own figure is too good by luck; `choices` has the honest one.
        """
        table = self.table()
        errors = _compare(table.pivot(index=["cut", "ratio"], columns="law", values="error")) if len(table) else {}
        return {**errors, **{law: NAN for law in self.laws if law not in errors}}

    @property
    def supported_ratio(self) -> float:
        """The largest compute ratio that the chosen law's quoted scores support; see `supports`."""
        return self.supports(self.chosen) if self.chosen else NAN

    def at_ratio(self, law: str, ratio: float) -> tuple[float, float, int]:
        """A law's mean error at a ratio, the share of runs inside their intervals, and how many cells: NaN, NaN, 0.

        Of the cuts that can be scored there the dearest count, as many as give eight runs of three cells: they are
        nearest to a fit of all runs. For the chosen law of several only those scores count that had no part in its
        choice.
        """
        own = [s for s in self.scores if s.law == law and s.ratio == ratio and s.refused is None]
        used: list[Score] = []
        for score in sorted(own, key=lambda s: -s.cut):
            short = sum(s.runs for s in used) < ENOUGH or sum(s.cells for s in used) < TOO_FEW
            if short and (score.chosen or law != self.chosen):
                used.append(score)
        weights = [s.runs for s in used]
        if not used:
            return NAN, NAN, 0
        error, inside = (
            float(np.average([getattr(s, of) for s in used], weights=weights)) for of in ("error", "inside")
        )
        return error, inside, sum(s.cells for s in used)

    def supports(self, law: str) -> float:
        """The largest ratio up to which a law's mean error stays within 2% and its intervals hold; see `at_ratio`.

        Intervals hold where the share of runs inside them is at least .6 of their level. 1.0 if the smallest ratio
        fails already; NaN where fewer than three cells could be scored at every ratio, or where the number is refused.
        InputError for a law that was not tested.
        """
        if law not in self.laws:
            raise InputError(f"the backtest holds {', '.join(self.laws)}, and not {law}: run it with that law.")
        best = NAN
        if refused(self.verdicts, "decision", "supported_ratio"):
            return best
        for ratio in sorted({s.ratio for s in self.scores}):
            error, inside, cells = self.at_ratio(law, ratio)
            if cells < TOO_FEW:
                continue
            if not (error <= ERROR_BOUND and inside >= HOLDS * self.level):
                return 1.0 if np.isnan(best) else best
            best = ratio
        return best

    def limit(self, law: str) -> str:
        """Why a law is supported no further, in words."""
        supported = self.supports(law)
        if np.isnan(supported):
            return f"the backtest has too few scores of {law} to support any ratio."
        beyond = [r for r in sorted({s.ratio for s in self.scores}) if r > supported]
        tested = [(r, *self.at_ratio(law, r)) for r in beyond]
        failed = next(((r, error, inside, cells) for r, error, inside, cells in tested if cells >= TOO_FEW), None)
        if failed is None:
            return f"the backtest reaches no further than {supported:g} times, where {law} held."
        ratio, error, inside, cells = failed
        least = HOLDS * self.level
        digits = 1 if f"{error:.1%}" != f"{ERROR_BOUND:.1%}" else 2 if f"{error:.2%}" != f"{ERROR_BOUND:.2%}" else 4
        off = f"off by {error:.{digits}%} on average over {plural(cells, 'cell')}"
        bounds = [] if error <= ERROR_BOUND else [f"{ERROR_BOUND:.0%} is the most that is asked for"]
        if np.isnan(inside):
            held = "had no intervals"
            bounds.append("without them nothing holds")
        else:
            held = f"held {inside:.0%} of them in its {self.level:.0%} intervals"
            bounds += [] if inside >= least else [f"{least:.0%}, {HOLDS:g} of {self.level:.0%}, is the least"]
        return f"in the backtest at {ratio:g} times, {law} was {off} and {held}: {', and '.join(bounds)}."

    def to_json(self) -> dict[str, Any]:
        rows = {"scores": [vars(s) for s in self.scores], "choices": [vars(c) for c in self.choices]}
        answers = {"ranking": self.ranking, "supported_ratio": self.supported_ratio}
        result: dict[str, Any] = clean(vars(self) | rows | answers)
        return result


def backtest(
    runs: pd.DataFrame,
    laws: Sequence[str] = LAWS,
    *,
    ratios: Sequence[float] = RATIOS,
    loss: str | None = None,
    noise: float | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Backtest:
    """Fit each law to the runs up to several cuts in compute, and score it on the dearer runs.

    Every law sees the same runs, those that have the variables of all of them. Cuts fall into the widest gaps of the
    compute axis, a factor of two or more apart, at most eight; the dearest compute fitted names a cut. A run counts
    for the largest of the `ratios` (ascending, above 1) that it reaches over the cut. Losses are predicted by
    `Fit.solved`; intervals come from draws of the parameters with the noise of a run added. See `Choice` for how a law
    is chosen: by the mean error, over all cuts so far, on the runs up to the next cut.

    runs, loss, noise, level, seed: as for `fit`; `runs` needs C (FLOPs), or N and D. Where no law can be scored at a
    ratio of 4 or more, a verdict says `span_too_small`. Raises InputError for unknown laws, laws of different
    responses, a missing column, or ratios that make no sense.
    """
    forms = [find_law(name) for name in laws]
    edges = SLACK * np.asarray(ratios, dtype=float)
    if not len(edges) or not (np.isfinite(edges).all() and edges[0] > SLACK and (np.diff(edges) > 0).all()):
        raise InputError(f"ratios are {tuple(ratios)}; they must be ascending numbers above 1, such as (2, 4, 8).")
    if not forms or len(set(laws)) < len(forms) or len({form.response for form in forms}) > 1:
        raise InputError(f"laws are {', '.join(laws) or 'none'}; name different laws of one response.")
    if noise is not None and not 0 < noise < np.inf:
        raise InputError(f"noise is {noise!r}; it must be a positive number.")
    if not 0.5 <= level < 1:
        raise InputError(f"level is {level!r}; it must be from 0.5 to below 1, such as 0.95.")
    needed = dict.fromkeys([*(v for form in forms for v in form.variables), *({"C"} & set(runs.columns))])
    selection = select(runs, loss, tuple(needed), forms[0].response)
    if "C" not in selection.rows.columns:
        raise InputError("a backtest sorts the runs by compute: the table needs a column C (FLOPs), or both N and D.")
    if noise is not None:
        selection = replace(selection, noise=Noise(sd=noise, freedom=np.inf, source="given"))
    empty = Backtest(laws=tuple(laws), level=level)
    if unfit := tuple(v for v in selection.verdicts if v.severity == "refuse"):
        return replace(empty, verdicts=unfit)
    selection = replace(selection, rows=selection.rows.sort_values("C", kind="stable").reset_index(drop=True))
    compute = selection.rows["C"].to_numpy(dtype=float)
    if not len(compute):
        return replace(empty, verdicts=(_span_too_small(compute, []),))

    # 1. every law at every cut
    cuts = _cuts(compute, edges[0])
    settings = Settings(fixed={}, resamples=RESAMPLES, level=level, seed=seed)
    trials = {(law, cut): _trial(law, selection, cut, settings) for cut in cuts for law in laws}

    names = dict.fromkeys(name for form in forms for name in form.variables)
    place = places_of(selection.rows, list(names))

    # 2. the choice at each cut, by what was known at the next, and what became of it there
    choices: list[Choice] = []
    for now, after in pairwise(cuts) if len(laws) > 1 else ():
        known = {law: [trials[law, cut].mean(compute <= after) for cut in cuts if cut <= now] for law in laws}
        leader = next(iter(_compare(pd.DataFrame(known))), None)
        if leader is not None:
            trial, scored = trials[leader, after], compute / after >= edges[0]
            choices.append(
                Choice(
                    law=leader,
                    chosen_at=now,
                    quoted_at=after,
                    runs=int(scored.sum()),
                    error=trial.mean(scored),
                    inside=trial.share(scored),
                )
            )

    # 3. scores by ratio
    quoted_at = {(c.law, c.quoted_at) for c in choices} if len(laws) > 1 else set(trials)
    scores = []
    for (law, cut), trial in trials.items():
        band = np.searchsorted(edges, compute / cut, side="right") - 1
        for k in np.unique(band[band >= 0]):
            which = band == k
            scores.append(
                Score(
                    law=law,
                    cut=cut,
                    ratio=float(ratios[k]),
                    fitted=int((compute <= cut).sum()),
                    runs=int(which.sum()),
                    cells=len(np.unique(place[which])),
                    reach=float(np.median(compute[which]) / cut),
                    error=trial.mean(which),
                    bias=float(trial.misses[which].mean()),
                    inside=trial.share(which),
                    chosen=(law, cut) in quoted_at,
                    refused=trial.refused.code if trial.refused else None,
                )
            )
    chosen = (choices[-1].law if choices else None) if len(laws) > 1 else laws[0]
    result = replace(empty, dearest=float(compute[-1]), scores=tuple(scores), choices=tuple(choices), chosen=chosen)
    curves = along_curves(selection.rows, ALONG_CURVES)
    trunks = next((v for cut in cuts if (v := shared_past(selection.rows, compute <= cut)) is not None), None)
    said = _judge(result, compute, [t.refused for t in trials.values() if t.refused])
    return replace(result, verdicts=(*said, *filter(None, (curves, trunks))))


def judge_targets(fit: Fit, backtest: Backtest) -> Fit:
    """The fit with a caution on each decision that extrapolates further than the backtest of its law supports.

    `backtest` must be of the fit's law and runs: InputError where it does not hold the law. A decision within the
    compute of the runs is no extrapolation. Nothing is said of numbers that are refused already.
    """
    supported = backtest.supports(fit.law)
    asked = [(entry["C"], budget_name(entry["C"]), entry["N"]) for entry in fit.decisions.get("targets", [])]
    asked += [(e["C"].value, f"loss {e['loss']:g}", e["C"]) for e in fit.decisions.get("losses", [])]
    said = []
    for C, target, answer in asked:
        ratio = C / backtest.dearest
        known = np.isfinite(answer.value) and not refused(fit.verdicts, "decision", target)
        if not known or ratio <= (supported if supported >= 1 else 1.0):
            continue
        message = f"{budget_name(C)} FLOPs is {ratio:.3g} times the dearest run; {backtest.limit(fit.law)}"
        evidence = {"ratio": ratio, "supported_ratio": supported}
        said.append(Verdict("beyond_backtest", "caution", "decision", target, message, evidence))
    return replace(fit, verdicts=(*fit.verdicts, *said))


@dataclass(frozen=True)
class _Trial:
    """A law at a cut: predicted / measured - 1 and whether it lies in its interval, by run, NaN where not predicted."""

    misses: np.ndarray
    inside: np.ndarray
    refused: Verdict | None = None

    def mean(self, which: np.ndarray) -> float:
        """The mean absolute miss over the runs named that were predicted; NaN where there are none."""
        own = np.abs(self.misses[which & np.isfinite(self.misses)])
        return float(own.mean()) if own.size else NAN

    def share(self, which: np.ndarray) -> float:
        own = self.inside[which & np.isfinite(self.inside)]
        return float(own.mean()) if own.size else NAN


def _cuts(C: np.ndarray, least: float) -> list[float]:
    """Where to cut the sorted compute axis: the widest gaps, so that no budget is split, spaced by `SLACK` x 2 or more.

    Cheaper than every cut are at least `LEAST_RUNS` runs, and `least` times dearer at least one.
    """
    x = np.log(C)
    gaps = np.diff(x)
    room = (gaps > 0) & (x[-1] - x[:-1] >= np.log(least)) & (np.arange(1, len(x)) >= LEAST_RUNS)
    order = np.flatnonzero(room)[np.argsort(-gaps[room], kind="stable")]
    spacing = np.log(SLACK * 2.0)
    while True:
        kept: list[float] = []
        for i in order:
            if all(abs(x[i] - other) >= spacing for other in kept):
                kept.append(x[i])
                if len(kept) > MOST_CUTS:
                    break
        if len(kept) <= MOST_CUTS:
            return sorted(float(C[np.searchsorted(x, value)]) for value in kept)
        spacing *= 1.1


def _trial(law: str, selection: Selection, cut: float, settings: Settings) -> _Trial:
    """Fit a law to the runs up to a cut and predict the dearer ones. The noise, too, is measured up to the cut."""
    cheap = selection.rows["C"].to_numpy(dtype=float) <= cut
    rows, dear = selection.rows[cheap].reset_index(drop=True), selection.rows[~cheap]
    given = selection.noise is not None and selection.noise.source == "given"
    noise = selection.noise if given else seed_noise(rows, "y")
    found = fit_law(find_law(law), replace(selection, rows=rows, noise=noise), settings)
    misses, inside = np.full(len(cheap), NAN), np.full(len(cheap), NAN)
    if np.isnan(list(found.solved.values())).any():
        lost = (v for v in found.verdicts if v.severity == "refuse" and v.scope in ("fit", "decision"))
        return _Trial(misses, inside, next(lost))
    predicted, low, high = predict(found, dear, settings.seed)
    measured = dear["y"].to_numpy(dtype=float)
    misses[~cheap] = predicted / measured - 1.0
    inside[~cheap] = np.where(np.isnan(low), NAN, (low <= measured) & (measured <= high))
    return _Trial(misses, inside)


def _compare(errors: pd.DataFrame) -> dict[str, float]:
    """Mean error by law (columns), best first, over the rows that all answered.

    In the running are the laws that answered the last row that anyone did, the dearest: a law that is refused where
    the others answer cannot lead, and one that answered easy cuts only is not compared by them.
    """
    answered = errors[errors.notna().any(axis=1)]
    if answered.empty:
        return {}
    running = answered.loc[:, answered.iloc[-1].notna()].dropna()
    return {str(law): float(mean) for law, mean in running.mean().sort_values(kind="stable").items()}


def _span_too_small(C: np.ndarray, refusals: Sequence[Verdict]) -> Verdict:
    span = float(C.max() / C.min()) if len(C) else NAN
    if refusals:
        why = f"the runs before a cut that leaves so much dearer ones are too poor to fit: {refusals[-1].message}"
    elif len(C):
        why = f"{len(C)} runs over a factor of {span:.3g} in compute leave no such cut."
    else:
        why = "no run has finished."
    message = f"span too small for a backtest over a compute ratio of {USEFUL:g}: {why}"
    evidence = {"span": span, "runs": len(C)}
    return Verdict("span_too_small", "refuse", "decision", "supported_ratio", message, evidence)


def _judge(found: Backtest, C: np.ndarray, refusals: Sequence[Verdict]) -> tuple[Verdict, ...]:
    """What keeps the backtest from an answer."""
    far = [s for s in found.scores if s.ratio >= USEFUL]
    codes = {s.refused for s in far}
    if not far or codes <= set(_TOO_POOR):
        return (_span_too_small(C, [v for v in refusals if v.code in codes]),)
    if None not in codes:
        why = next(v.message for v in refusals if v.code in codes - set(_TOO_POOR))
        message = f"every fit to cheaper runs was refused, so none is scored at a ratio of {USEFUL:g}: {why}"
        return (Verdict("no_forecast", "refuse", "decision", "supported_ratio", message),)
    if found.chosen is None:
        message = "no law answered at a cut and had a dearer cut to be quoted at, so none is chosen."
        return (Verdict("no_forecast", "caution", "decision", "chosen", message),)
    return ()
