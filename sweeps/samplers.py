"""Samplers: from a declared space to Optuna's distributions and to the sampler that asks in them.

A sampler is made anew for each trial, seeded by the search, the group and the trial's number: what it asks follows from
these and from what it has been told, so a search that was killed asks what it would have asked. Guarded against:
Optuna's samplers fall back to random draws while they guess the space from finished trials; here they are told it.
"""

import hashlib
import itertools
import math
import random
import warnings
from collections.abc import Mapping
from typing import Any

from sweeps.evolution import evolution_sampler
from sweeps.space import Axis, Search

STARTUP_TRIALS = 10
"""tpe and gp begin with so many random trials."""


def distributions(space: Mapping[str, Axis]) -> dict[str, Any]:
    """The space as Optuna's distributions, sorted by name."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for name, axis in sorted(space.items()):
        if axis.categorical is not None:
            found[name] = CategoricalDistribution(axis.categorical)
        elif axis.whole is not None:
            found[name] = IntDistribution(*axis.whole, step=int(axis.step or 1))
        else:
            found[name] = FloatDistribution(*axis.bounds(), log=axis.log is not None, step=axis.step)
    return found


def make_sampler(search: Search, group: str, number: int) -> Any:
    """The sampler of a group's trial of this number."""
    from optuna import samplers

    space = distributions(search.space)
    fresh = draw(search.seed, group, number)
    if search.sampler == "tpe":
        made = samplers.TPESampler(
            seed=fresh, multivariate=True, constant_liar=True, n_startup_trials=STARTUP_TRIALS, group=False
        )
    elif search.sampler == "gp":
        made = samplers.GPSampler(
            seed=fresh, n_startup_trials=STARTUP_TRIALS, deterministic_objective=False, warn_independent_sampling=False
        )
    elif search.sampler == "qmc":  # one sequence for all trials: the storage counts how far it is
        with warnings.catch_warnings():  # that it is experimental
            warnings.simplefilter("ignore")
            made = samplers.QMCSampler(seed=draw(search.seed, group), scramble=True, warn_independent_sampling=False)
    elif search.sampler == "cmaes":
        return evolution_sampler(search.space, space, draw(search.seed, group), fresh)
    else:  # the settings of a grid are queued, so that nothing of them is left to draw
        made = samplers.RandomSampler(seed=fresh)
    if search.sampler not in ("random", "grid"):
        made.infer_relative_search_space = lambda study, trial: space
    return made


def most_trials(search: Search) -> int:
    """How many trials a group has at most: those declared, and of a grid no more than it has settings."""
    if search.sampler != "grid":
        return search.trials
    return min(search.trials, math.prod(len(axis.values() or []) for axis in search.space.values()))


def grid_order(search: Search, group: str) -> list[dict[str, Any]]:
    """All settings of a finite space, shuffled by the search's seed."""
    names = sorted(search.space)
    settings = [
        dict(zip(names, values)) for values in itertools.product(*(search.space[n].values() or [] for n in names))
    ]
    random.Random(draw(search.seed, group)).shuffle(settings)
    return settings


def draw(*words: Any) -> int:
    """A whole number below 2^32 that follows from these words, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:4], "big")
