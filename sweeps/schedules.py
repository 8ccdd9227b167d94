"""Learning-rate schedules: the rate as a fraction of its peak, a pure function of tokens."""

import math

from sweeps.cell import Schedule

NAMES = ("cosine", "linear", "constant", "wsd")


def fraction(schedule: Schedule, tokens: float, horizon: float) -> float:
    """The learning rate after `tokens` of a run of `horizon` tokens, as a fraction of the peak.

    All schedules warm up linearly over schedule.warmup_tokens. Then: cosine and linear fall to final_fraction at the
    horizon; constant stays at 1; wsd stays at 1 and falls with 1 - sqrt(x) over the last cooldown_fraction of the
    horizon (Haegele et al. 2024).
    """
    if tokens < schedule.warmup_tokens:
        return tokens / schedule.warmup_tokens
    last = schedule.final_fraction
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        cooldown = schedule.cooldown_fraction * horizon
        progress = max(0.0, (tokens - (horizon - cooldown)) / cooldown)
        return 1.0 - (1.0 - last) * math.sqrt(progress)
    progress = (tokens - schedule.warmup_tokens) / max(horizon - schedule.warmup_tokens, 1.0)
    if schedule.name == "linear":
        return 1.0 - (1.0 - last) * progress
    return last + (1.0 - last) * (1.0 + math.cos(math.pi * progress)) / 2
