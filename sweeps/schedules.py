"""Schedules: the rate as a fraction of its peak, and when a run is evaluated. Pure functions, without torch."""

import math
from collections.abc import Callable

from sweeps.cell import Cell, Schedule

EVALUATIONS_PER_DECADE = 10
"""During a run, evenly in the logarithm of tokens."""
FIRST_EVALUATION = 0.01
"""Evaluations during the run start at this share of its steps."""
SUBSET_TOKENS = 8192
"""Validation tokens of an evaluation during the run: windows spread evenly over the fixed stream."""
EVALUATION_TOKENS = 8192
"""Tokens of one forward pass in an evaluation."""

# Cooldown shape -> how much of the peak is gone after the share x of the cooldown.
COOLDOWNS: dict[str, Callable[[float], float]] = {
    "sqrt": math.sqrt,
    "linear": lambda x: x,
    "cosine": lambda x: (1.0 - math.cos(math.pi * x)) / 2,
}


def fraction(schedule: Schedule, tokens: float, horizon: float) -> float:
    """The learning rate after `tokens` of a run of `horizon` tokens, as a fraction of the peak.

    All schedules warm up linearly over schedule.warmup_tokens. Then: cosine and linear fall to final_fraction at the
    horizon; constant stays at 1; wsd stays at 1 and falls over the last cooldown_fraction of the horizon in the
    cooldown's shape, by default 1 - sqrt(x) (Haegele et al. 2024).
    """
    if tokens < schedule.warmup_tokens:
        return tokens / schedule.warmup_tokens
    last = schedule.final_fraction
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        cooldown = schedule.cooldown_fraction * horizon
        progress = max(0.0, (tokens - (horizon - cooldown)) / cooldown)
        return 1.0 - (1.0 - last) * COOLDOWNS[schedule.cooldown_shape](progress)
    progress = (tokens - schedule.warmup_tokens) / max(horizon - schedule.warmup_tokens, 1.0)
    if schedule.name == "linear":
        return 1.0 - (1.0 - last) * progress
    return last + (1.0 - last) * (1.0 + math.cos(math.pi * progress)) / 2


def stable_steps(cell: Cell) -> int:
    """How many first steps of a cell do not depend on its horizon: those before a wsd's rate begins to fall."""
    if cell.schedule.name == "constant":
        return cell.steps
    if cell.schedule.name != "wsd":
        return 0
    end = cell.tokens - cell.schedule.cooldown_fraction * cell.tokens
    steps = int(end / cell.batch_tokens + 0.5)  # a step has the rate of its middle token
    while steps > 0 and fraction(cell.schedule, (steps - 0.5) * cell.batch_tokens, cell.tokens) < 1.0:
        steps -= 1
    return steps


def evaluation_steps(steps: int) -> set[int]:
    """The steps of the evaluations during a run: ten a decade, evenly in log tokens, from 1% of the run on.

    The last step is not among them: the final evaluation covers it.
    """
    first = math.floor(EVALUATIONS_PER_DECADE * math.log10(max(1.0, FIRST_EVALUATION * steps)))
    last = math.ceil(EVALUATIONS_PER_DECADE * math.log10(steps)) + 1
    wanted = {round(10 ** (index / EVALUATIONS_PER_DECADE)) for index in range(first, last)}
    return {step for step in wanted if 1 <= step < steps}
