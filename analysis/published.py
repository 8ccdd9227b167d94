"""Published rules evaluated at runs: the table of sweeps/published.py over arrays, and where its laws were fitted."""

from typing import Any

import numpy as np

from sweeps.published import PUBLISHED
from sweeps.rules import RANGE_SLACK


def published_value(rule: str, hyperparameter: str, **known: Any) -> Any:
    """A hyperparameter by a published rule, at numbers or arrays of the counts that its law names."""
    value, powers = PUBLISHED[rule].laws[hyperparameter]
    for name, power in powers.items():
        value = value * known[name] ** power
    return value


def published_timescale(tokens_per_parameter: Any) -> Any:
    """The best AdamW timescale B / (rate decay D) as a fraction of the run: 1.084 (D / N)^-0.527, by Power Lines
    (Bergsma et al. 2025, arXiv 2505.13738)."""
    own = {"batch_tokens": 1.0, "learning_rate": 1.0, "D": 1.0}
    return 1.0 / published_value("power-lines", "weight_decay", tokens_per_parameter=tokens_per_parameter, **own)


def within_range(rule: str, **known: Any) -> bool:
    """Whether all values of a count lie where the rule was fitted, as near as `RANGE_SLACK`."""
    ends = PUBLISHED[rule].range
    return all(
        bool(np.all((values >= ends[name][0] / RANGE_SLACK) & (values <= ends[name][1] * RANGE_SLACK)))
        for name, values in known.items()
    )
