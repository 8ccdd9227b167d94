"""The solver of the Chinchilla law: `solve` for one set of losses, `descend` for a batch of them.

L(N, D) = E + A / N^alpha + B / D^beta is fitted by Huber loss on ln L (Hoffmann et al. 2022, approach 3) as a
log-sum-exp of its three terms, with ln N and ln D centred so that ln A and alpha come apart. Two methods work on it:
Levenberg-Marquardt with Huber weights in one batch over many starts, then L-BFGS-B with the analytic gradient on the
best of them. The objective is scaled to order one and the tolerances are tight, because with SciPy's defaults the
answer depends on the scale of the objective: that is what went wrong in the original fit (Besiroglu et al. 2024).
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import minimize


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Points in centred logs. theta = (ln E, ln of the N term and of the D term at the centre, alpha, beta)."""

    x: np.ndarray
    z: np.ndarray
    log_loss: np.ndarray
    center: tuple[float, float]
    lower: np.ndarray
    upper: np.ndarray

    @staticmethod
    def of(N: np.ndarray, D: np.ndarray, log_loss: np.ndarray) -> "Problem":
        x, z, low = np.log(N), np.log(D), float(log_loss.min())
        return Problem(
            x=x - x.mean(),
            z=z - z.mean(),
            log_loss=log_loss,
            center=(float(x.mean()), float(z.mean())),
            # A term that is e^-12 of the loss is not there; an exponent of 3 is no scaling law.
            lower=np.array([low - 12.0, low - 12.0, low - 12.0, 0.01, 0.01]),
            upper=np.array([low + 0.05, low + 6.0, low + 6.0, 3.0, 3.0]),
        )

    def terms(self, theta: np.ndarray) -> np.ndarray:
        """Logs of the three terms at every point, (3, ..., n), for theta (..., 5)."""
        e, a, b, alpha, beta = (theta[..., i, None] for i in range(5))
        return np.stack(np.broadcast_arrays(e, a - alpha * self.x, b - beta * self.z))

    def predict(self, theta: np.ndarray) -> np.ndarray:
        """ln loss at every point."""
        return np.asarray(np.logaddexp.reduce(self.terms(theta), axis=0))

    def jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln loss at every point (..., n) and its derivatives by theta (..., n, 5)."""
        terms = self.terms(theta)
        total = np.logaddexp.reduce(terms, axis=0)
        e, a, b = np.exp(terms - total)
        return total, np.stack([e, a, b, -self.x * a, -self.z * b], axis=-1)

    def params(self, theta: np.ndarray) -> dict[str, Any]:
        """The law's own parameters."""
        e, a, b, alpha, beta = (theta[..., i] + 0.0 for i in range(5))  # plain numbers for a single theta
        x, z = self.center
        return {"E": np.exp(e), "A": np.exp(a + alpha * x), "B": np.exp(b + beta * z), "alpha": alpha, "beta": beta}

    def starts(self) -> np.ndarray:
        """A grid of starts: exponents, the share of the smallest loss that is E, and how A and B share the rest."""
        low, middle = float(self.log_loss.min()), float(np.exp(self.log_loss.mean()))
        grid = []
        for alpha, beta, floor, share in product(
            (0.1, 0.3, 0.5, 0.9), (0.1, 0.3, 0.5, 0.9), (0.1, 0.5, 0.9), (0.3, 0.7)
        ):
            e = low + np.log(floor)
            rest = max(middle - np.exp(e), 1e-3)
            grid.append([e, np.log(share * rest), np.log((1 - share) * rest), alpha, beta])
        return np.clip(np.array(grid), self.lower, self.upper)


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2 within delta, delta (|r| - delta / 2) beyond."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


@dataclass(frozen=True)
class Solution:
    """The best end point; objective is the plain sum of Huber terms. near_best: starts that came within 0.1 %."""

    theta: np.ndarray
    objective: float
    starts: int
    near_best: int


def solve(problem: Problem, delta: float, *, scale: float | None = None) -> Solution:
    """The best fit over all starts. `scale` multiplies the objective of the last solver; the answer must not care."""
    starts = problem.starts()
    thetas, objectives = descend(problem, problem.log_loss, delta, starts)
    order = np.argsort(objectives)
    polished = [_polish(problem, thetas[i], delta, scale) for i in order[:3]]
    theta, objective = min(polished, key=lambda end: end[1])
    # The pure solver may still gain after the polish, where most residuals lie beyond the threshold.
    again, value = descend(problem, problem.log_loss, delta, theta[None])
    if value[0] < objective:
        theta, objective = again[0], float(value[0])
    near = int((objectives <= objective * 1.001 + 1e-18).sum())
    return Solution(theta, objective, len(starts), near)


def descend(
    problem: Problem, log_loss: np.ndarray, delta: float, starts: np.ndarray, *, rounds: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt with Huber weights, one batch over all starts. Returns end points and objectives.

    starts: (S, 5). log_loss: (n,) or (S, n), one set of losses for each start (bootstrap copies).
    """
    target = np.broadcast_to(log_loss, (len(starts), len(problem.x)))
    theta, damping = starts.copy(), np.full(len(starts), 1e-2)
    value = huber(problem.predict(theta) - target, delta).sum(axis=1)
    running, calm = np.arange(len(starts)), np.zeros(len(starts), dtype=int)
    for _ in range(rounds):
        now = theta[running]
        predicted, slopes = problem.jacobian(now)
        miss = predicted - target[running]
        weight = np.minimum(1.0, delta / np.maximum(np.abs(miss), 1e-300))
        # Parameters pressed against their bound stay there for this step.
        gradient = np.einsum("snk,sn->sk", slopes, weight * miss)
        pressed = ((now <= problem.lower) & (gradient > 0)) | ((now >= problem.upper) & (gradient < 0))
        slopes = np.where(pressed[:, None, :], 0.0, slopes)
        gradient = np.where(pressed, 0.0, gradient)
        normal = np.einsum("snk,sn,snl->skl", slopes, weight, slopes)
        diagonal = np.einsum("skk->sk", normal)
        normal = normal + np.eye(5) * (damping[running, None] * diagonal + 1e-14 + pressed)[:, None, :]
        step = -np.linalg.solve(normal, gradient[..., None])[..., 0]
        trial = np.clip(now + step, problem.lower, problem.upper)
        reached = huber(problem.predict(trial) - target[running], delta).sum(axis=1)
        better = reached < value[running]
        small = value[running] - reached <= 1e-13 * value[running]
        theta[running] = np.where(better[:, None], trial, now)
        value[running] = np.where(better, reached, value[running])
        damping[running] = np.clip(damping[running] * np.where(better, 0.2, 5.0), 1e-12, 1e12)
        # Done after several steps in a row that no longer gain anything.
        calm[running] = np.where(small, calm[running] + 1, 0)
        running = running[calm[running] < 8]
        if not running.size:
            break
    return theta, value


def _polish(problem: Problem, theta: np.ndarray, delta: float, scale: float | None) -> tuple[np.ndarray, float]:
    """L-BFGS-B with analytic gradient, scaled so that its tolerances mean something."""
    factor = 1.0 / (len(problem.x) * delta**2) if scale is None else scale

    def objective(at: np.ndarray) -> tuple[float, np.ndarray]:
        predicted, slopes = problem.jacobian(at)
        miss = predicted - problem.log_loss
        return factor * float(huber(miss, delta).sum()), factor * (np.clip(miss, -delta, delta) @ slopes)

    end = minimize(
        objective,
        theta,
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(problem.lower, problem.upper)),
        options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000, "maxfun": 20000, "maxcor": 20},
    )
    return np.asarray(end.x), float(end.fun) / factor
