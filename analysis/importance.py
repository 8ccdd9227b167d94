"""Importance: which hyperparameters the loss depends on, as shares of its variance (Hutter, Hoos & Leyton-Brown 2014).

On a full grid the decomposition is exact: every main effect, every interaction of two, and the rest add up to 1. On a
search, or a grid with holes, a surrogate is needed, and each number carries the name of its evaluator: Optuna's fANOVA
(main effects of a random forest, over the whole space) and its PED-ANOVA (what tells the best trials from all; Watanabe
et al. 2023). The failures guarded against: one forest's number taken for a fact (so all are repeated over resamples of
the trials), diverged runs whose huge losses are all that is explained (so they are capped), rates spread over decades
that a forest integrates on a straight scale (so positive numbers go in by their logarithm), and what chance between
seeds does taken for an effect.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.effects import Evaluation, exact_effects, surrogate_effects
from analysis.selection import left_out, with_states
from analysis.swept import BLOWN_UP
from analysis.uncertainty import SETTINGS, alike, merged
from analysis.verdicts import NAN, NOTHING, Verdict, clean, refused
from sweeps.errors import InputError, nearest
from sweeps.units import plural

TRIALS = 4
"""Settings for each parameter below which a surrogate is not asked."""
LEVELS = 8
"""Numbers of one column beside which a blank is one more level, as on a grid. Of more, as a search draws them, each
would be a word of its own, for which a forest takes a time that doubles with every second one and learns nothing."""
ONE_LENGTH = 1.1
"""Token counts of one N within this factor are one length: batches round them, and shapes of nearly equal N."""
_GROUP = ("family", "parametrisation", "N", "D", "corpus", "tokenizer", "context", "trainer")
"""What a hyperparameter's importance is asked at."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How important each parameter is for the loss, by one or several evaluators; see `refused` and `verdicts` first.

    group: what was constant (family, N, D). settings: distinct combinations, over which replicates were averaged.
    variance: of the loss between them, nats^2. noise_share: of that variance, what seed noise alone would give; NaN
    where no setting is replicated. diverged: runs that count as `cap` nats; cap_source says what that is.
    """

    group: Mapping[str, Any]
    parameters: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    n_runs: int
    settings: int
    diverged: int
    cap: float
    cap_source: str
    variance: float
    noise_share: float
    verdicts: tuple[Verdict, ...]

    @property
    def refused(self) -> bool:
        return refused(self.verdicts)

    def table(self) -> pd.DataFrame:
        """One row per evaluator and effect: evaluator, region, effect, share, low, high."""
        rows = [
            (one.evaluator, one.region, effect, share.value, *share.interval)
            for one in self.evaluations
            for effect, share in {**one.shares, **one.interactions, "rest": one.rest}.items()
            if share is not NOTHING
        ]
        return pd.DataFrame(rows, columns=["evaluator", "region", "effect", "share", "low", "high"])

    def to_json(self) -> dict[str, Any]:
        names = ("group", "parameters", "n_runs", "settings", "diverged", "cap", "cap_source", "variance")
        plain = {name: getattr(self, name) for name in (*names, "noise_share", "verdicts")}
        plain["evaluations"] = [vars(one) for one in self.evaluations]
        return clean(plain | {"refused": self.refused})


def importances(
    runs: pd.DataFrame, parameters: Sequence[str] | None = None, *, loss: str | None = None, **options: Any
) -> tuple[Importance, ...]:
    """`importance` in each group of family, N and D (and what else runs are not compared across) whose runs vary two
    hyperparameters or more, or in each where parameters are given. Of parameters that make the size, such as width, the
    runs of all N are one group, and of all D too where each N has one."""
    loss = loss or ("val_loss_final" if "val_loss_final" in runs.columns else "loss")
    asked = tuple(parameters or ())
    runs = runs.assign(**{c: merged(runs[c].to_numpy(dtype=float)) for c in ("N", "D") if c in runs.columns})
    keys = [c for c in _GROUP if c in runs.columns and c not in asked and runs[c].notna().any()]
    keys, said = _across_sizes(runs, keys, asked)
    groups = runs.groupby(keys, dropna=False) if keys else [((), runs)]
    found = []
    for key, rows in groups:
        if asked or (loss in rows.columns and len(_known(_counted(rows, loss)[0], None)[1]) > 1):
            group = {name: value for name, value in zip(keys, key) if name in ("family", "parametrisation", "N", "D")}
            one = importance(rows, parameters, loss=loss, group=group, **options)
            found.append(replace(one, verdicts=(*one.verdicts, *said)))
    return tuple(found)


def _across_sizes(runs: pd.DataFrame, keys: list[str], asked: Sequence[str]) -> tuple[list[str], list[Verdict]]:
    """What still divides the runs where a parameter that is asked for makes their size, and what is said of that.

    Such a one is no hyperparameter of training and has one value at most N, where nothing could be said of it: two
    shapes may come to the same N, and heads do not change it.
    """
    if "N" not in keys:
        return keys, []
    named = [c for c in asked if c in runs.columns and c not in SETTINGS and runs[c].nunique() > 1]
    makes = [c for c in named if (runs.groupby("N")[c].nunique() == 1).mean() > 0.5]
    if not makes:
        return keys, []
    spread = runs.groupby("N")["D"].agg(lambda D: D.max() / D.min()) if "D" in keys else pd.Series(np.inf)
    follows = bool(spread.max() < ONE_LENGTH)
    message = (
        f"{'N and D differ' if follows else 'N differs'} between these runs, by {' and '.join(makes)}: their shares "
        "hold what a larger model gains."
    )
    left = [c for c in keys if c != "N" and not (c == "D" and follows)]
    return left, [Verdict("tied_parameters", "info", "parameter", makes[0], message)]


def importance(
    runs: pd.DataFrame,
    parameters: Sequence[str] | None = None,
    *,
    loss: str | None = None,
    cap: float | None = None,
    group: Mapping[str, Any] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Importance:
    """The importance of hyperparameters for the loss (nats) over all rows given, which are of one size and length.

    parameters: columns of `runs`, numbers or words; by default the hyperparameters that vary, without those that only
    follow another. Settings with several runs are averaged. cap: what a diverged run counts as, and the most that any
    run does, nats; by default the mean `loss_at_start` where known, else the highest loss of the others. A table that
    tells no states has runs that diverged where the loss is infinite, or blown up beyond the best rate. Rows that are
    left out for another reason than divergence or have no loss, and early rungs of a search, do not count, nor do rows
    that lack a parameter of more than `LEVELS` numbers. Numbers that are not supported are refused by verdicts.
    Raises InputError for a column that is not there.
    """
    loss = loss or ("val_loss_final" if "val_loss_final" in runs.columns else "loss")
    for name in (*(parameters or ()), loss):
        if name not in runs.columns:
            hint = nearest(name, list(runs.columns))
            raise InputError(f"the runs have no column {name!r}{hint}; they have {', '.join(map(str, runs.columns))}.")
    every = with_states(runs).reset_index(drop=True)
    runs, lost = _counted(every, loss)
    runs, named, blank, verdicts = _known(runs, parameters)
    lost = lost[runs.index]
    empty = every[loss].isna().map({True: "the loss is missing", False: None})
    why = every["excluded"].astype(object).where(every["excluded"].notna(), empty) if "excluded" in every else empty
    why = why.where(~why.index.isin(blank.index), blank)
    verdicts += left_out(why[~why.index.isin(runs.index)].dropna())
    table, capped, source = _capped(runs, lost, named, loss, cap)
    diverged = int(lost.sum())
    if diverged and np.isfinite(capped):  # else all diverged, which is said below
        share = diverged / max(len(table), 1)
        message = (
            f"{diverged} of {plural(len(table), 'run')} diverged and count as {capped:.4g} nats ({source}); shares of "
            "the variance depend on it."
        )
        severity = "caution" if share > 0.1 else "info"
        verdicts.append(Verdict("diverged_capped", severity, "fit", None, message))  # type: ignore[arg-type]
    for name in [n for n in named if table[n].nunique() < 2]:
        message = f"{name} has one value in these runs, so nothing says how important it is. Vary it."
        verdicts.append(Verdict("constant_parameter", "refuse", "parameter", name, message))
    varied = [n for n in named if table[n].nunique() > 1]
    means = table.groupby(varied, sort=True)["_loss"].agg(["mean", "count", "var"]) if varied else pd.DataFrame()
    variance = float(means["mean"].var(ddof=0)) if len(means) else NAN
    sd, freedom = _noise(means) if len(means) else (NAN, 0)
    noise = sd**2 * float((1.0 / means["count"]).mean()) * (1.0 - 1.0 / len(means)) if freedom else NAN
    full = len(means) > 1 and len(means) == math.prod(table[n].nunique() for n in varied)
    verdicts += _objections(table, varied, len(means), variance, full, diverged)
    noise_share = min(noise / variance, 1.0) if variance > 0 else NAN
    if noise_share > 0.5:
        message = f"{noise_share:.0%} of the variance between settings is what seeds alone would give."
        verdicts.append(Verdict("not_told_apart", "caution", "fit", None, message))
    if not full:
        verdicts += _tied(table, varied) if parameters is not None else []
    evaluations: tuple[Evaluation, ...] = ()
    if not refused(verdicts):
        if full:
            one, said = exact_effects(means, varied, sd if freedom else NAN, level, seed)
            evaluations, verdicts = (one,), [*verdicts, *said]
        else:
            evaluations, said = surrogate_effects(means["mean"], varied, level, seed)
            verdicts += said
    return Importance(
        group=dict(group or {}),
        parameters=tuple(named),
        evaluations=tuple(_with_refused(one, set(named) - set(varied)) for one in evaluations),
        n_runs=len(table),
        settings=len(means),
        diverged=diverged,
        cap=capped,
        cap_source=source,
        variance=variance,
        noise_share=noise_share,
        verdicts=tuple(verdicts),
    )


def _with_refused(one: Evaluation, constant: set[str]) -> Evaluation:
    return Evaluation(**{**vars(one), "shares": {**one.shares, **dict.fromkeys(sorted(constant), NOTHING)}})


# --- what is looked at -------------------------------------------------------------------------------------------


def _parameters(runs: pd.DataFrame, asked: Sequence[str] | None) -> tuple[list[str], list[Verdict]]:
    """The parameters to look at: those asked for, or those that vary and do not only follow another."""
    if asked is not None:
        return list(dict.fromkeys(asked)), []
    varied = [name for name in SETTINGS if name in runs.columns and runs[name].nunique(dropna=False) > 1]
    settings, kept, verdicts = runs[varied].drop_duplicates(), list[str](), []
    for name in varied:
        leader = next((k for k in kept if _follows(settings, name, [k])), None)
        if leader is None:
            kept.append(name)
            continue
        message = f"{name} follows {leader} in these runs: what is said of {leader} is of both."
        verdicts.append(Verdict("tied_parameters", "info", "parameter", leader, message))
    return kept, verdicts


def _follows(settings: pd.DataFrame, name: str, leaders: Sequence[str]) -> bool:
    """Whether a column has one value at each of the leaders'. In a search, where values hardly repeat, that says
    nothing unless it also rises or falls with its leader all the way, as what is set by a rule does."""
    groups = settings.groupby(list(leaders), dropna=False)[name]
    if groups.nunique(dropna=False).max() > 1:
        return False
    values = groups.first()
    if len(values) <= len(settings) / 2:
        return True
    numeric = pd.api.types.is_numeric_dtype(values) and len(leaders) == 1
    return numeric and (values.is_monotonic_increasing or values.is_monotonic_decreasing)


def _tied(table: pd.DataFrame, varied: Sequence[str]) -> list[Verdict]:
    """What of the parameters asked for follows up to three others, so that no evaluator can tell them apart."""
    settings, found = table[list(varied)].drop_duplicates(), []
    for name in varied:
        others = [one for one in varied if one != name]
        for leaders in itertools.chain.from_iterable(itertools.combinations(others, k) for k in (1, 2, 3)):
            if _follows(settings, name, leaders):
                message = (
                    f"{name} follows {' and '.join(leaders)} in these runs, so that its share and theirs cannot be "
                    f"told apart. Vary {name} by itself."
                )
                found.append(Verdict("tied_parameters", "caution", "parameter", name, message))
                break
    return found


def _counted(runs: pd.DataFrame, loss: str) -> tuple[pd.DataFrame, pd.Series]:
    """The runs that finished or diverged, and which of them diverged."""
    runs = with_states(runs)
    values = runs[loss].astype(float)
    finite = values.abs() < np.inf  # a missing loss is neither finite nor diverged: the run may only have failed
    if "state" in runs.columns:
        diverged = runs["state"] == "diverged"
    else:
        rates = runs["learning_rate"].astype(float) if "learning_rate" in runs.columns else pd.Series(0.0, runs.index)
        lowest = values[finite].min()
        diverged = (values.abs() == np.inf) | ((values > BLOWN_UP * lowest) & (rates > rates[values == lowest].max()))
    kept = diverged | (finite & runs["excluded"].isna() if "excluded" in runs.columns else finite)
    if "rung" in runs.columns:
        kept &= ~(runs["rung"].astype(float) < 1.0)
    return runs[kept], diverged[kept]


def _known(
    runs: pd.DataFrame, asked: Sequence[str] | None
) -> tuple[pd.DataFrame, list[str], "pd.Series[Any]", list[Verdict]]:
    """The runs that tell their parameters, these, what each of the other runs lacks, and what is said of it.

    A blank among more than `LEVELS` numbers is no level. Of a column that nobody asked for and most runs leave blank,
    the column goes and not the runs.
    """
    blank, few = pd.Series(None, runs.index, dtype=object), []
    for name in (c for c in dict.fromkeys(asked or SETTINGS) if c in runs.columns):
        empty = runs[name].isna()
        if not empty.any() or not pd.api.types.is_numeric_dtype(runs[name]) or runs[name].nunique() <= LEVELS:
            continue
        if asked is None and empty.mean() > 0.5:
            told = f"{name} is told by {int((~empty).sum())} of {plural(len(runs), 'run')} only and not looked at."
            few.append(Verdict("constant_parameter", "info", "parameter", name, f"{told} Ask for it by its name."))
            runs = runs.drop(columns=name)
        else:
            blank = blank.mask(blank.isna() & empty, f"{name} is missing")
    kept = runs[blank.isna()]
    named, verdicts = _parameters(kept, asked)
    return kept, named, blank.dropna(), [*few, *verdicts]


def _capped(
    runs: pd.DataFrame, diverged: pd.Series, names: Sequence[str], loss: str, cap: float | None
) -> tuple[pd.DataFrame, float, str]:
    """The parameters and `_loss` of the runs, the cap, and what it is."""
    table = runs[list(names)].copy()
    for name in names:
        if table[name].isna().any() or not pd.api.types.is_numeric_dtype(table[name]):
            table[name] = table[name].astype(object).where(table[name].notna(), "none").astype(str)
        else:
            table[name] = alike(table, [name])[name]
    table["_loss"] = runs[loss].astype(float).where(~diverged)
    start = runs["loss_at_start"].astype(float).mean() if "loss_at_start" in runs.columns else NAN
    if cap is not None:
        capped, source = float(cap), "given"
    elif np.isfinite(start):
        capped, source = float(start), "the loss at the start"
    else:
        capped, source = float(table["_loss"].max()), "the highest loss of the others"
    table["_loss"] = table["_loss"].fillna(capped).clip(upper=capped)
    return table, capped, source


def _noise(means: pd.DataFrame) -> tuple[float, int]:
    """The pooled standard deviation between runs of one setting, nats, and its degrees of freedom."""
    freedom = int((means["count"] - 1).sum())
    if not freedom:
        return NAN, 0
    return float(np.sqrt((means["var"].fillna(0.0) * (means["count"] - 1)).sum() / freedom)), freedom


def _objections(
    table: pd.DataFrame, varied: Sequence[str], settings: int, variance: float, full: bool, diverged: int
) -> list[Verdict]:
    """Why there can be no importance at all."""
    if diverged and diverged == len(table):
        message = "all runs diverged, so no loss tells the hyperparameters apart. Lower the learning rate."
        return [Verdict("all_diverged", "refuse", "fit", None, message)]
    if not varied or (not full and settings < TRIALS * len(varied)):
        message = (
            f"{plural(settings, 'setting')} of {plural(len(varied), 'parameter')} that vary are too few for a "
            f"surrogate, which takes {TRIALS} for each. Run more, or a full grid, which needs no surrogate."
        )
        return [Verdict("too_few_runs", "refuse", "fit", None, message)]
    if not variance > 0:
        return [Verdict("flat_losses", "refuse", "fit", None, "all settings have the same loss: nothing to explain.")]
    return []
