"""The engine that fits every law: many starts and many resamples of one table, solved as one batch.

`descend` is Levenberg-Marquardt with robust weights. The curvature of the robust loss is taken between two bounds:
reweighted least squares, which always goes down but crawls where most residuals lie beyond the threshold, and Newton's,
which counts only the residuals within it and then converges quadratically; a batch member moves towards Newton's as
long as its steps gain.

The objective is a plain weighted sum. Steps are judged by relative gains, so its scale cannot matter: with absolute
tolerances it does, and that is what went wrong in the original Chinchilla fit (Besiroglu et al. 2024).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from analysis.problems import Problem, Robust, default_starts

BLOCK_ELEMENTS = 262_144
"""Residuals of one block of the batch: some 40 MB of work, and few enough blocks that threads seldom wait on Python."""
ROUNDS = 400
LONGEST = 0.25
"""The longest step of a coordinate, as a share of its range. A term that is not felt yet, since its coefficient is
tiny, has hardly any curvature: unbounded, its step would leap across the range, be refused, and stall all others.
"""
SAMPLE_ROWS = 4000


@dataclass(frozen=True)
class Solution:
    """The best end point. objective: the weighted sum there; ends: (S,) objectives of all starts."""

    theta: np.ndarray
    objective: float
    ends: np.ndarray

    @property
    def starts(self) -> int:
        return len(self.ends)

    @property
    def agreeing(self) -> int:
        """Starts that came within 0.1% of the best objective."""
        return int((self.ends <= self.objective * 1.001 + 1e-30).sum())


def solve(
    problem: Problem,
    robust: Robust,
    *,
    weights: np.ndarray | None = None,
    starts: np.ndarray | None = None,
) -> Solution:
    """The best fit over all starts (S, K), by default `default_starts`; those out of bounds begin at the bounds.

    On very many rows every start comes down on a sample of them first, and then on all.
    """
    stages = [(problem, weights)]
    if problem.rows > 2 * SAMPLE_ROWS:
        chosen = np.random.default_rng(0).permutation(problem.rows)[:SAMPLE_ROWS]
        stages.insert(0, (_at_rows(problem, chosen), weights if weights is None else weights[chosen]))
    if starts is None:
        starts = default_starts(stages[0][0], _wide(robust))
    thetas = np.clip(starts, problem.lower, problem.upper)
    for stage, own in stages:
        if robust.kind == "lad" or (robust.kind == "huber" and robust.delta < 1e-4):
            # A tiny threshold makes a landscape of creases: come down to it from a wide one.
            thetas, _ = descend(stage, _wide(robust), thetas, weights=own, rounds=60)
            delta = 1e-3
            while delta > 3.0 * robust.delta:
                thetas, _ = descend(stage, Robust("huber", delta), thetas, weights=own, rounds=60)
                delta /= 10.0
        thetas, ends = descend(stage, robust, thetas, weights=own)
    best = int(np.argmin(ends))
    again, value = descend(problem, robust, thetas[best][None], weights=weights)
    if value[0] < ends[best]:
        thetas[best], ends[best] = again[0], value[0]
    return Solution(thetas[best], float(ends[best]), ends)


def _at_rows(problem: Problem, rows: np.ndarray) -> Problem:
    """The same problem on some of its rows, in the same coordinates."""
    return replace(
        problem,
        variables={name: np.broadcast_to(v, problem.target.shape)[rows] for name, v in problem.variables.items()},
        target=problem.target[rows],
        features=tuple(tuple((k, feature[rows]) for k, feature in own) for own in problem.features),
        weights=None if problem.weights is None else problem.weights[rows],
    )


def _wide(robust: Robust) -> Robust:
    """A robust loss to begin with: thresholds of a percent."""
    return Robust("huber", max(robust.delta, 1e-2)) if robust.kind in ("huber", "lad") else robust


def descend(
    problem: Problem,
    robust: Robust,
    starts: np.ndarray,
    *,
    targets: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    held: np.ndarray | None = None,
    rounds: int = ROUNDS,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise from every start: end points (S, K) and objectives (S,).

    targets: (n,) or (S, n), one set for each start (parametric bootstrap). weights: the same (bootstrap by rows,
    where they count how often a row was drawn). held: (S, K), coordinates that stay at their start (profiles).
    Memory stays near a block's, whatever S.
    """
    S, n = len(starts), problem.rows
    size = max(1, BLOCK_ELEMENTS // n)
    blocks = [slice(i, min(i + size, S)) for i in range(0, S, size)]
    thetas, values = np.empty_like(starts), np.empty(S)

    def work(block: slice) -> None:
        own_targets = problem.target if targets is None else targets if targets.ndim == 1 else targets[block]
        own_weights = weights if weights is None or weights.ndim == 1 else weights[block]
        if problem.weights is not None:
            own_weights = problem.weights if own_weights is None else own_weights * problem.weights
        own_held = np.zeros(starts[block].shape, dtype=bool) if held is None else held[block]
        thetas[block], values[block] = _descend_block(
            problem, robust, starts[block], own_targets, own_weights, own_held, rounds
        )

    if len(blocks) == 1:
        work(blocks[0])
    else:  # numpy lets go of the interpreter in its loops
        with ThreadPoolExecutor(min(len(blocks), os.cpu_count() or 1, 8)) as pool:
            list(pool.map(work, blocks))
    return thetas, values


def _descend_block(
    problem: Problem,
    robust: Robust,
    starts: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray | None,
    frozen: np.ndarray,
    rounds: int,
) -> tuple[np.ndarray, np.ndarray]:
    S, K = starts.shape
    diagonal, longest = np.arange(K), LONGEST * (problem.upper - problem.lower)
    end_theta, end_value = starts.copy(), np.full(S, np.inf)

    def state(theta: np.ndarray, target: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """Objective, gradient, and both curvatures."""
        predicted, slopes = problem.jacobian(theta)
        miss = predicted - target
        cost, (own, inside) = robust.cost(miss), robust.weights(miss)
        if weight is not None:
            cost, own = cost * weight, own * weight
        value = cost.sum(axis=-1)
        count = 1 if inside is None else 2
        weighted = np.empty((len(theta), count * K, problem.rows))
        np.multiply(slopes, own[:, None, :], out=weighted[:, :K])
        if inside is not None:
            np.multiply(weighted[:, :K], inside[:, None, :], out=weighted[:, K:])
        gradient = np.matmul(weighted[:, :K], miss[:, :, None])[:, :, 0]
        both = np.matmul(weighted, slopes.swapaxes(1, 2))  # one product for both curvatures: half the passes
        return value, gradient, both[:, :K], both[:, -K:]

    def some(a: np.ndarray | None, which: np.ndarray) -> np.ndarray | None:
        return a if a is None or a.ndim == 1 else a[which]

    theta, index = starts.copy(), np.arange(S)
    target, weight, frozen = targets, weights, frozen | (problem.lower == problem.upper)
    with np.errstate(all="ignore"):
        value, gradient, slow, fast = state(theta, target, weight)
        damping, blend, calm = np.full(S, 1e-2), np.full(S, 1.0), np.zeros(S, dtype=int)
        for _ in range(rounds):
            # 1. a damped step, in which parameters pressed against their bounds stay there
            held = ((theta <= problem.lower) & (gradient > 0)) | ((theta >= problem.upper) & (gradient < 0))
            held |= frozen
            curvature = fast + blend[:, None, None] * (slow - fast)
            scale = slow[:, diagonal, diagonal]
            scale = np.maximum(scale, 1e-12 * scale.max(axis=1, keepdims=True)) + 1e-300
            root = np.sqrt(scale)
            system = curvature / (root[:, :, None] * root[:, None, :])
            system = np.where(held[:, :, None] | held[:, None, :], 0.0, system)
            system[:, diagonal, diagonal] += damping[:, None] + held
            right = np.where(held, 0.0, gradient / root)
            broken = ~(np.isfinite(system).all(axis=(1, 2)) & np.isfinite(right).all(axis=1))
            system[broken], right[broken] = np.eye(K), 0.0
            step = np.linalg.solve(system, right[..., None])[..., 0] / root
            hoped = (np.where(held, 0.0, gradient) * step).sum(axis=1)
            trial = np.clip(theta - np.clip(step, -longest, longest), problem.lower, problem.upper)

            # 2. judged by what it gains
            new = state(trial, target, weight)
            better = new[0] < value
            gain = np.where(better, value - new[0], 0.0)
            calm = np.where(gain <= 1e-12 * value, calm + 1, 0)
            keep = better[:, None]
            theta = np.where(keep, trial, theta)
            value = np.where(better, new[0], value)
            gradient = np.where(keep, new[1], gradient)
            slow = np.where(keep[..., None], new[2], slow)
            fast = np.where(keep[..., None], new[3], fast)
            damping = np.clip(damping * np.where(better, 0.3, 5.0), 1e-14, 1e14)
            blend = np.clip(blend * np.where(better, 0.3, 20.0), 1e-9, 1.0)

            # 3. those that no longer gain, nor could, are done
            over = (calm >= 10) | (hoped <= 1e-12 * value) | broken
            if over.any():
                done = index[over]
                end_theta[done], end_value[done] = theta[over], value[over]
                on = ~over
                if not on.any():
                    return end_theta, np.where(np.isfinite(end_value), end_value, np.inf)
                index, theta, value, gradient = index[on], theta[on], value[on], gradient[on]
                slow, fast, damping, blend, calm = slow[on], fast[on], damping[on], blend[on], calm[on]
                target, weight, frozen = some(target, on), some(weight, on), frozen[on]  # type: ignore[assignment]
        end_theta[index], end_value[index] = theta, value
    return end_theta, np.where(np.isfinite(end_value), end_value, np.inf)
