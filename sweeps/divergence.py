"""How far a run is, and when its losses and gradients say that it has diverged."""

import math
import statistics
from dataclasses import dataclass, field

DIVERGED_NATS = 1.0
"""A mean training loss so far above the loss at start is high."""
DIVERGED_NORM = 1000.0
"""A gradient norm of so many times the median of the rows before is high."""
DIVERGED_ROWS = 3
"""Rows in a row that are high: the run has diverged."""


@dataclass
class Progress:
    """How far a run is, in plain values: what a checkpoint keeps besides tensors."""

    start: float
    """Validation loss before the first step, over the subset."""
    step: int = 0
    high: int = 0
    """Rows in a row whose loss or gradient was high."""
    norms: list[float] = field(default_factory=list)
    row: dict[str, float] = field(default_factory=dict)
    """The metrics of the last row."""

    def judge(self, loss: float, norm: float, tokens: int) -> str | None:
        """Take a row in; say why the run has diverged, if it has."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            return f"training {what} not finite after {tokens:,} tokens (start: {self.start:.4g})"
        blown = len(self.norms) >= 10 and norm > DIVERGED_NORM * statistics.median(self.norms)
        self.high = self.high + 1 if loss > self.start + DIVERGED_NATS or blown else 0
        self.norms.append(norm)
        if self.high < DIVERGED_ROWS:
            return None
        if blown:
            return f"gradient norm {norm:.4g} after {tokens:,} tokens, {DIVERGED_NORM:g} times what it was"
        return f"training loss {loss:.4g} nats after {tokens:,} tokens (start: {self.start:.4g})"
