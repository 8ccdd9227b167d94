"""Effects of parameters on the loss: exact on a full grid, by Optuna's evaluators where there is none.

What the shares mean, and what is guarded against, stands in analysis/importance.py, which chooses between the two.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.uncertainty import interval
from analysis.verdicts import NAN, NOTHING, OPEN, Estimate, Verdict

RESAMPLES = 1000
"""Of the noise, on a grid."""
FORESTS = 20
"""Resamples of a search's trials, each with a forest of its own seed: a 95% interval is then all but their range."""
TREES, TREES_RESAMPLED = 64, 8
"""Of the forest on all trials, and of those on resamples: Optuna takes 2 s over 64 trees of 400 trials."""
BEST, LEAST_BEST = 0.1, 5
"""The better part that PED-ANOVA tells from the rest: a tenth, but five trials (what Optuna's documentation asks)."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one evaluator says. Shares are fractions with their spread: a 95% interval over noise or resamples.

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


# --- full grids --------------------------------------------------------------------------------------------------


def exact_effects(
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


def surrogate_effects(
    means: "pd.Series[float]", names: Sequence[str], level: float, seed: int
) -> tuple[tuple[Evaluation, ...], list[Verdict]]:
    """Optuna's two evaluators on settings that are no full grid: on all of them, and on resamples for the spread.

    PED-ANOVA is left out where so many settings share the highest loss that the better part is all of them: it then
    calls every parameter worthless. So are the resamples in which that happens.
    """
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
        if all(_has_better_part(some, quantile) for some in (values, values[pick])):
            better = _ask(PedAnovaImportanceEvaluator(target_quantile=quantile), study, names)
            ped.append(better / (better.sum() or 1.0))
    fanova = Evaluation(
        evaluator=f"fANOVA (Optuna {version}, random forest)",
        region="the whole space",
        shares=_spread(names, np.array(forests), level),
        rest=_spread(("rest",), np.maximum(1.0 - np.array(forests).sum(axis=1, keepdims=True), 0.0), level)["rest"],
    )
    if not ped:
        message = (
            f"{int((values == values.max()).sum())} of {len(values)} settings share the highest loss, so there is no "
            "better part for PED-ANOVA to tell from the rest. Run more settings that do not diverge."
        )
        return (fanova,), [Verdict("flat_losses", "info", "fit", None, message)]
    best = Evaluation(
        evaluator=f"PED-ANOVA (Optuna {version})",
        region=f"the best {100 * quantile:.0f}% of the settings against all",
        shares=_spread(names, np.array(ped), level),
    )
    return (fanova, best), []


def _has_better_part(values: np.ndarray, quantile: float) -> bool:
    """Whether the lowest values, up to a quantile and with all that equal it, are not all of them."""
    return bool(np.sort(values)[math.ceil(quantile * len(values)) - 1] < values.max())


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
