"""Timing: how many seconds a cell takes, from a few shapes that were timed (sweeps/stopwatch.py).

Seconds are a sum of what a step does, each part times a coefficient of the machine that cannot be negative: work that
comes with every step and every layer whatever their size, matmul FLOPs, what streams through memory, attention scores,
the optimizer's pass over the parameters, the softmax over the vocabulary. Coefficients are fitted to relative errors,
for a plan is as wrong about a small cell as about a large one. Prediction is arithmetic, so that a plan of thousands of
cells loads nothing and waits for nothing. Guarded against: a number for what was not timed. A family, a precision or a
trainer that is not in the calibration has no seconds, and a reason instead.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from sweeps.accounting import Shape, flops_per_token, parameters
from sweeps.cell import Cell
from sweeps.schedules import EVALUATION_TOKENS, SUBSET_TOKENS, evaluation_steps

PICKED = 8
"""Shapes and batches that are timed of a study."""
AROUND_SECONDS = 0.08
"""Of a cell on a warm worker beside build, training and evaluation: lease, records, last checkpoint, hand-over; median
of tests/benchmarks/cells.py on two cores."""
FAR = 4.0
"""So many times the FLOPs a step of the largest that was timed are far beyond what was timed."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One shape and batch, timed on one kind of worker. Seconds are medians of wall-clock time."""

    family: str
    precision: str
    shape: Shape
    sequences: int
    """Of a batch."""
    micro_batch: int
    """Sequences a forward pass."""
    step_seconds: float
    """A training step, without evaluations."""
    forward_seconds: float
    """A full forward pass of the final evaluation."""
    subset_seconds: float
    """An evaluation during the run."""
    build_seconds: float
    core_share: float | None = None
    """Of a CPU with one thread: processor time over wall-clock time. Below 1, something else had the core meanwhile."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def timed_from_json(record: Mapping[str, Any]) -> Timed:
    """The point that `Timed.to_json` described."""
    return Timed(**{**record, "shape": Shape(**record["shape"])})


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one kind of worker needs for one family at one precision: coefficients in seconds."""

    step: tuple[float, ...]
    """Of `step_features`."""
    forward: tuple[float, ...]
    """Of `forward_features`."""
    window: float
    """Of a window of an evaluation during the run, beyond its forward pass: they lie apart and are read singly."""
    build: float
    largest: float
    """FLOPs of the dearest step that was timed."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def costs_from_json(record: Mapping[str, Any]) -> Costs:
    """The costs that `Costs.to_json` described."""
    return Costs(**{**record, "step": tuple(record["step"]), "forward": tuple(record["forward"])})


def kind_of_work(cell: Cell) -> str:
    """What cells must share to be predicted from one another: family and precision."""
    return f"{cell.family} {cell.precision}"


# --- predicting --------------------------------------------------------------------------------------------------


def cell_seconds(
    costs: Costs, cell: Cell, validation_tokens: int, *, first_step: int = 0, micro_batch: int | None = None
) -> float:
    """Wall-clock seconds of a cell on a warm worker: build, steps after `first_step`, every evaluation, records.

    `validation_tokens` is the length of the validation stream; `first_step` is where a branch leaves its trunk, which
    has then evaluated what comes before it.
    """
    shape, micro = cell.shape, micro_batch or cell.sequences
    step = _step_seconds(costs, shape, cell.sequences, micro)
    evaluated = cell.validation_tokens + 1 if cell.validation_tokens else validation_tokens
    subset, whole = _evaluation_seconds(costs, shape, evaluated)
    evaluations = evaluations_after(cell.steps, first_step) + (first_step == 0)  # one before the first step
    return costs.build + (cell.steps - first_step) * step + evaluations * subset + whole + AROUND_SECONDS


def seconds_until(costs: Costs, cell: Cell, step: int) -> float:
    """Wall-clock seconds from a cell's start until it has taken so many steps."""
    subset, _ = _evaluation_seconds(costs, cell.shape, SUBSET_TOKENS + 1)
    evaluations = 1 + evaluations_after(cell.steps) - evaluations_after(cell.steps, step)
    return costs.build + step * _step_seconds(costs, cell.shape, cell.sequences, cell.sequences) + evaluations * subset


@lru_cache(maxsize=4096)
def _step_seconds(costs: Costs, shape: Shape, sequences: int, micro_batch: int) -> float:
    return _dot(costs.step, step_features(shape, sequences, micro_batch))


@lru_cache(maxsize=4096)
def _evaluation_seconds(costs: Costs, shape: Shape, validation_tokens: int) -> tuple[float, float]:
    """An evaluation of the subset, and one of the whole validation stream."""
    windows = (validation_tokens - 1) // shape.context
    subset = min(windows, max(1, SUBSET_TOKENS // shape.context))
    return _forward(costs, shape, subset) + subset * costs.window, _forward(costs, shape, windows)


def _forward(costs: Costs, shape: Shape, windows: int) -> float:
    most = max(1, EVALUATION_TOKENS // shape.context)
    passes, rest = divmod(windows, most)
    seconds = passes * _dot(costs.forward, forward_features(shape, most))
    return seconds + (_dot(costs.forward, forward_features(shape, rest)) if rest else 0.0)


@lru_cache(maxsize=16384)
def evaluations_after(steps: int, first_step: int = 0) -> int:
    """How many evaluations of the subset a run of so many steps makes after `first_step`."""
    return sum(step > first_step for step in evaluation_steps(steps))


def is_far(costs: Costs, cell: Cell) -> bool:
    """Whether a cell's step is far dearer than any that was timed: its seconds are an extrapolation."""
    return cell.batch_tokens * flops_per_token(cell.shape) > FAR * costs.largest


# --- features ----------------------------------------------------------------------------------------------------


def step_features(shape: Shape, sequences: int, micro_batch: int) -> tuple[float, ...]:
    """What a training step does: steps, passes through layers, FLOPs, elements streamed, scores, parameters, logits."""
    tokens, passes = sequences * shape.context, -(-sequences // micro_batch)
    constant, layers, flops, elements, scores, logits = _pass_features(shape, tokens)
    return (constant, passes * layers, 3 * flops, elements, scores, float(parameters(shape).total), logits)


def forward_features(shape: Shape, windows: int) -> tuple[float, ...]:
    """What a forward pass over so many full windows does; as above, without the optimizer."""
    return _pass_features(shape, windows * shape.context)


def _pass_features(shape: Shape, tokens: int) -> tuple[float, float, float, float, float, float]:
    experts = max(1, shape.experts_per_token)
    return (
        1.0,
        float(shape.depth * (1 + shape.experts)),  # each expert is launched by itself
        tokens * flops_per_token(shape) / 3,
        float(tokens * shape.depth * (shape.width + experts * shape.mlp_width)),
        float(tokens * shape.depth * shape.heads * shape.context),
        float(tokens * shape.vocab_size),
    )


def _dot(coefficients: Sequence[float], features: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(coefficients, features, strict=True))


# --- fitting -----------------------------------------------------------------------------------------------------


def pick_cells(cells: Iterable[Cell], most: int = PICKED) -> list[Cell]:
    """One cell for each shape and batch that is worth timing: at most so many of each family and precision.

    They span the study: each next one is the farthest, in the logarithms of its sizes, from those taken before. Cells
    of a trainer of one's own are left out.
    """
    groups: dict[str, dict[Any, Cell]] = {}
    for cell in cells:
        if not cell.trainer:
            groups.setdefault(kind_of_work(cell), {}).setdefault((cell.shape, cell.sequences), cell)
    picked: list[Cell] = []
    for group in groups.values():
        left = {cell: _position(cell) for cell in group.values()}
        taken: list[Cell] = []
        while left and len(taken) < most:
            near = taken or None
            chosen = max(
                left,
                key=lambda one: (
                    min((math.dist(left[one], _position(other)) for other in near or ()), default=0.0)
                    if near
                    else sum(left[one])
                ),
            )
            del left[chosen]
            taken.append(chosen)
        picked += taken
    return picked


def _position(cell: Cell) -> tuple[float, ...]:
    shape = cell.shape
    return tuple(math.log(value) for value in (cell.batch_tokens, parameters(shape).total, shape.depth, shape.context))


def fit_costs(points: Sequence[Timed]) -> Costs:
    """The coefficients of points of one family and precision, by non-negative least squares in relative error."""
    steps = [step_features(one.shape, one.sequences, one.micro_batch) for one in points]
    most = [max(1, EVALUATION_TOKENS // one.shape.context) for one in points]
    forwards = [forward_features(one.shape, windows) for one, windows in zip(points, most)]
    return Costs(
        step=_nonnegative(steps, [one.step_seconds for one in points]),
        forward=_nonnegative(forwards, [one.forward_seconds for one in points]),
        window=statistics.median(
            max(0.0, one.subset_seconds - one.forward_seconds) / windows for one, windows in zip(points, most)
        ),
        build=statistics.median(one.build_seconds for one in points),
        largest=max(one.sequences * one.shape.context * float(flops_per_token(one.shape)) for one in points),
    )


def _nonnegative(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    import numpy as np
    from scipy.optimize import nnls

    rows = np.array(features) / np.array(seconds)[:, None]
    scale = rows.max(axis=0)
    coefficients, _ = nnls(rows / scale, np.ones(len(rows)))
    return tuple(float(value) for value in coefficients / scale)
