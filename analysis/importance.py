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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.swept import BLOWN_UP, merged
from analysis.uncertainty import SETTINGS, interval
from analysis.verdicts import NAN, NOTHING, OPEN, Estimate, Verdict, clean, plural, refused
from sweeps.errors import InputError, nearest

TRIALS = 4
"""Settings for each parameter below which a surrogate is not asked."""
RESAMPLES = 1000
"""Of the noise, on a grid."""
FORESTS = 20
"""Resamples of a search's trials, each with a forest of its own seed: a 95 % interval is then all but their range."""
TREES, TREES_RESAMPLED = 64, 8
"""Of the forest on all trials, and of those on resamples: Optuna takes 2 s over 64 trees of 400 trials."""
BEST, LEAST_BEST = 0.1, 5
"""The better part that PED-ANOVA tells from the rest: a tenth, but five trials (what Optuna's documentation asks)."""
_GROUP = ("family", "parametrisation", "N", "D", "corpus", "tokenizer", "context", "trainer")
"""What a hyperparameter's importance is asked at."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one evaluator says. Shares are fractions with their spread: a 95 % interval over noise or resamples.

    evaluator: its name. region: what its numbers are about, the whole space or the better part of the trials.
    shares: by parameter, of the loss's variance that the parameter explains alone (on a grid of the variance beyond
    seed noise, where that is known); of PED-ANOVA they sum to 1 by construction. interactions: of pairs, "a x b" (exact
    only). rest: what else there is of the variance.
    """

    evaluator: str
    region: str
    shares: Mapping[str, Estimate]
    interactions: Mapping[str, Estimate] = field(default_factory=dict)
    rest: Estimate = NOTHING


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
    hyperparameters or more, or in each where parameters are given."""
    loss = loss or ("val_loss_final" if "val_loss_final" in runs.columns else "loss")
    asked = tuple(parameters or ())
    runs = runs.assign(**{c: merged(runs[c].to_numpy(dtype=float)) for c in ("N", "D") if c in runs.columns})
    keys = [c for c in _GROUP if c in runs.columns and c not in asked and runs[c].notna().any()]
    groups = runs.groupby(keys, dropna=False) if keys else [((), runs)]
    found = []
    for key, rows in groups:
        if asked or (loss in rows.columns and len(_parameters(_counted(rows, loss)[0], None)[0]) > 1):
            group = {name: value for name, value in zip(keys, key) if name in ("family", "parametrisation", "N", "D")}
            found.append(importance(rows, parameters, loss=loss, group=group, **options))
    return tuple(found)


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
    left out for another reason than divergence, and early rungs of a search, do not count. Numbers that are not
    supported are refused by verdicts.
    Raises InputError for a column that is not there.
    """
    loss = loss or ("val_loss_final" if "val_loss_final" in runs.columns else "loss")
    for name in (*(parameters or ()), loss):
        if name not in runs.columns:
            hint = nearest(name, list(runs.columns))
            raise InputError(f"the runs have no column {name!r}{hint}; they have {', '.join(map(str, runs.columns))}.")
    runs, lost = _counted(runs, loss)
    named, verdicts = _parameters(runs, parameters)
    table, capped, source = _capped(runs, lost, named, loss, cap)
    diverged = int(lost.sum())
    if diverged:
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
            one, said = _exact(means, varied, sd if freedom else NAN, level, seed)
            evaluations, verdicts = (one,), [*verdicts, *said]
        else:
            evaluations = _surrogates(means["mean"], varied, level, seed)
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
    values = runs[loss].astype(float)
    finite = values.abs() < np.inf
    if "state" in runs.columns:
        diverged = runs["state"] == "diverged"
    else:
        rates = runs["learning_rate"].astype(float) if "learning_rate" in runs.columns else pd.Series(0.0, runs.index)
        lowest = values[finite].min()
        diverged = ~finite | ((values > BLOWN_UP * lowest) & (rates > rates[values == lowest].max()))
    kept = diverged | (finite & runs["excluded"].isna() if "excluded" in runs.columns else finite)
    if "rung" in runs.columns:
        kept &= ~(runs["rung"].astype(float) < 1.0)
    return runs[kept], diverged[kept]


def _capped(
    runs: pd.DataFrame, diverged: pd.Series, names: Sequence[str], loss: str, cap: float | None
) -> tuple[pd.DataFrame, float, str]:
    """The parameters and `_loss` of the runs, the cap, and what it is."""
    table = runs[list(names)].copy()
    for name in names:
        if table[name].isna().any() or not pd.api.types.is_numeric_dtype(table[name]):
            table[name] = table[name].astype(object).where(table[name].notna(), "none").astype(str)
        else:
            table[name] = merged(table[name].to_numpy(dtype=float))
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


# --- full grids --------------------------------------------------------------------------------------------------


def _exact(
    means: pd.DataFrame, names: Sequence[str], sd: float, level: float, seed: int
) -> tuple[Evaluation, list[Verdict]]:
    """The variance over a full grid, decomposed. Noise: of seeds, else of the interactions of three and more.

    What seed noise adds to the variance of each effect on average is taken off, once for the noise in the means and
    once more for that which the draws put on them: a parameter without effect then has a share near 0.
    """
    cube = means["mean"].to_numpy().reshape([means.index.unique(k).size for k in range(len(names))])
    sets = [s for order in (1, 2) for s in itertools.combinations(range(len(names)), order)]
    freedom = np.array([math.prod(cube.shape[k] - 1 for k in s) for s in sets], dtype=float)
    freedom = np.append(freedom, cube.size - 1 - freedom.sum())
    parts = _decompose(cube[None], sets)
    seeds, verdicts = np.isfinite(sd), list[Verdict]()
    if seeds:
        spread = sd / np.sqrt(means["count"].to_numpy(float)).reshape(cube.shape)
    elif freedom[-1] > 0:
        spread = np.full(cube.shape, np.sqrt(max(parts[0, -1], 0.0) * cube.size / freedom[-1]))
        message = (
            "no setting is replicated: the spread is read off the interactions of three and more parameters, which "
            "may be real. Train some settings with two or more seeds."
        )
        verdicts.append(Verdict("noise_from_residuals", "caution", "fit", None, message))
    else:
        spread = np.zeros(cube.shape)
        message = "no setting is replicated, so the shares have no spread. Train some settings with two or more seeds."
        verdicts.append(Verdict("noise_unknown", "caution", "fit", None, message))
    chance = freedom * float(np.square(spread).mean()) / cube.size  # what noise adds to the variance of each effect
    shocks = np.random.default_rng(seed).standard_normal((RESAMPLES, *cube.shape)) * spread
    shares = _shares(parts - (chance if seeds else 0.0))[0]
    draws = _shares(_decompose(cube + shocks, sets) - (2.0 * chance if seeds else chance))
    known = bool(spread.any())
    estimates = [
        Estimate(value=float(share), interval=interval(drawn, level) if known else OPEN)
        for share, drawn in zip(shares, draws.T)
    ]
    effects = {" x ".join(names[k] for k in s): one for s, one in zip(sets, estimates)}
    return Evaluation(
        evaluator="exact fANOVA",
        region="the whole grid",
        shares={name: effects[name] for name in names},
        interactions={name: one for name, one in effects.items() if name not in names},
        rest=estimates[-1] if len(names) > 2 else NOTHING,
    ), verdicts


def _decompose(cubes: np.ndarray, sets: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The variance of each effect over full grids (draws, *levels), and what is left, (draws, effects + 1).

    f_U = E[f | x_U] - the effects of all subsets of U, V_U = Var f_U (Hutter, Hoos & Leyton-Brown 2014, section 3).
    """
    axes = tuple(range(1, cubes.ndim))
    mean = cubes.mean(axis=axes, keepdims=True)
    effects: dict[tuple[int, ...], np.ndarray] = {}
    for one in sets:  # rising in order
        marginal = cubes.mean(axis=tuple(a for a in axes if a - 1 not in one), keepdims=True) - mean
        effects[one] = marginal - sum(effect for other, effect in effects.items() if set(other) < set(one))
    parts = [np.square(effect).mean(axis=axes) for effect in effects.values()]
    left = np.square(cubes - mean).mean(axis=axes) - sum(parts)
    return np.stack([*parts, left], axis=1)


def _shares(parts: np.ndarray) -> np.ndarray:
    """Variances as shares of their sum, by row; NaN where nothing is left of any."""
    kept = np.maximum(parts, 0.0)
    whole = kept.sum(axis=1, keepdims=True)
    return kept / np.where(whole > 0, whole, NAN)


# --- searches ----------------------------------------------------------------------------------------------------


def _surrogates(means: "pd.Series[float]", names: Sequence[str], level: float, seed: int) -> tuple[Evaluation, ...]:
    """Optuna's two evaluators on settings that are no full grid: on all of them, and on resamples for the spread."""
    from optuna import __version__ as version  # a second to import; only where it is asked
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator

    rows, values = [key if isinstance(key, tuple) else (key,) for key in means.index], means.to_numpy()
    space, codes = _space(rows, names)
    generator = np.random.default_rng(seed)
    quantile = min(0.5, max(BEST, LEAST_BEST / len(values)))
    forests, ped = [], []
    for turn in range(FORESTS + 1):
        pick = np.arange(len(values)) if not turn else generator.integers(len(values), size=len(values))
        if np.ptp(values[pick]) == 0:
            continue
        study = _study(space, [codes[k] for k in pick], values[pick])
        forests.append(
            _ask(FanovaImportanceEvaluator(n_trees=TREES_RESAMPLED if turn else TREES, seed=seed + turn), study, names)
        )
        better = _ask(PedAnovaImportanceEvaluator(target_quantile=quantile), study, names)
        ped.append(better / (better.sum() or 1.0))
    fanova = Evaluation(
        evaluator=f"fANOVA (Optuna {version}, random forest)",
        region="the whole space",
        shares=_spread(names, np.array(forests), level),
        rest=_spread(("rest",), np.maximum(1.0 - np.array(forests).sum(axis=1, keepdims=True), 0.0), level)["rest"],
    )
    best = Evaluation(
        evaluator=f"PED-ANOVA (Optuna {version})",
        region=f"the best {100 * quantile:.0f} % of the settings against all",
        shares=_spread(names, np.array(ped), level),
    )
    return fanova, best


def _spread(names: Sequence[str], found: np.ndarray, level: float) -> dict[str, Estimate]:
    """The first row, of all trials, with the interval of the others."""
    return {
        name: Estimate(value=float(found[0, k]), interval=interval(found[1:, k], level)) for k, name in enumerate(names)
    }


def _space(rows: Sequence[tuple[Any, ...]], names: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Distributions by name, over the range that was tried, and each setting in their terms. Positive numbers go in by
    logarithm, since Optuna's fANOVA integrates over the straight scale of a log distribution."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    space: dict[str, Any] = {}
    codes: list[dict[str, Any]] = [{} for _ in rows]
    for name, column in zip(names, zip(*rows)):
        if any(isinstance(value, str) for value in column):
            space[name] = CategoricalDistribution(sorted(set(column)))
            coded: Sequence[Any] = column
        else:
            numbers = np.array(column, dtype=float)
            numbers = np.log(numbers) if (numbers > 0).all() else numbers
            space[name] = FloatDistribution(float(numbers.min()), float(numbers.max()))
            coded = [float(number) for number in numbers]
        for code, value in zip(codes, coded):
            code[name] = value
    return space, codes


def _study(space: Mapping[str, Any], codes: Sequence[Mapping[str, Any]], values: np.ndarray) -> Any:
    """Finished trials as a study in memory."""
    from optuna import create_study, logging
    from optuna.trial import create_trial

    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)  # a line for every study is no news
    try:
        study = create_study()
        study.add_trials(
            [
                create_trial(params=dict(code), distributions=dict(space), value=float(v))
                for code, v in zip(codes, values)
            ]
        )
    finally:
        logging.set_verbosity(before)
    return study


def _ask(evaluator: Any, study: Any, names: Sequence[str]) -> np.ndarray:
    found = evaluator.evaluate(study, params=list(names))
    return np.array([found[name] for name in names])
