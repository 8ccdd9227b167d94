"""CMA-ES for a search, on the package `cmaes` (Hansen 2016, arXiv 1604.00772).

Optuna's own CmaEsSampler keeps its state as a pickle in the journal, which whoever reads a shared store would execute.
This one keeps nothing: at each trial it replays the generations that are told. A trial notes the generation from which
it was drawn; of each generation the first to be told count, as many as a generation has, in the order of their ends.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sweeps.space import Axis

GENERATION = "cmaes:generation"
"""System attribute of a trial."""
SIGMA = 1 / 6
"""The first standard deviation, as a share of each range."""


def evolution_sampler(space: Mapping[str, Axis], distributions: Mapping[str, Any], first: int, fresh: int) -> Any:
    """A sampler that asks by CMA-ES; `first` seeds the search, `fresh` this trial's draw."""
    from cmaes import CMA
    from optuna.samplers import RandomSampler

    names = sorted(space)

    class Evolution(RandomSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return dict(distributions)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            if "fixed_params" in trial.system_attrs:
                return {}
            bounds = np.tile([0.0, 1.0], (len(names), 1))
            optimizer = CMA(mean=np.full(len(names), 0.5), sigma=SIGMA, bounds=bounds, seed=first)
            generations: dict[int, list[tuple[np.ndarray, float]]] = {}
            told = (one for one in study.get_trials(deepcopy=False) if one.state.name == "COMPLETE")
            for one in sorted(told, key=lambda one: (one.datetime_complete, one.number)):
                if GENERATION in one.system_attrs:
                    place = np.array([to_unit(space[name], one.params[name]) for name in names])
                    generations.setdefault(one.system_attrs[GENERATION], []).append((place, one.value))
            while len(these := generations.get(optimizer.generation, [])) >= optimizer.population_size:
                optimizer.tell(these[: optimizer.population_size])
            optimizer.reseed_rng(fresh)
            study._storage.set_trial_system_attr(trial._trial_id, GENERATION, optimizer.generation)
            return {name: from_unit(space[name], value) for name, value in zip(names, optimizer.ask())}

    return Evolution(seed=fresh)


def to_unit(axis: Axis, value: float) -> float:
    """Where a value lies in its range, 0 to 1; evenly in the logarithm of a log range."""
    low, high = axis.bounds()
    if axis.log is not None:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def from_unit(axis: Axis, share: float) -> float:
    """The value at a share of a range, at the nearest step where there are steps."""
    low, high = axis.bounds()
    if axis.log is not None:
        return min(max(low * (high / low) ** float(share), low), high)
    step = axis.step or (1 if axis.whole is not None else 0)
    value = low + float(share) * (high - low)
    value = low + round((value - low) / step) * step if step else value
    value = min(max(value, low), high)
    return round(value) if axis.whole is not None else value
