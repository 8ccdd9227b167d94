"""Learning-rate schedules: the rate as a fraction of its peak, a pure function of tokens."""

import math
from collections.abc import Callable

from sweeps.cell import Cell, Schedule

NAMES = ("cosine", "linear", "constant", "wsd")

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
