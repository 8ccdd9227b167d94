"""A quadratic in the logs of the axes through the settings of a group, near its lowest loss, and its vertex.

What it guards against: settings far up the valley's sides, where it is no quadratic, and a single bad run at an end,
which moves a vertex as far as it likes. The first are not fitted, the others are taken out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit

from analysis.swept import Group
from analysis.verdicts import Verdict

ENOUGH = {1: 5, 2: 12}
"""By the number of axes: settings that are fitted in any case where there are so many (twice the coefficients in 2)."""
DOUBT = 0.01
"""Chance, over all settings of an analysis, that a good run is taken out for a bad one."""


def quadratic_columns(x: np.ndarray) -> np.ndarray:
    """Columns 1, x_j, x_j^2 / 2 and, of two axes, x_1 x_2; x is (n, axes), centred."""
    columns = [np.ones(len(x)), *x.T, *(x.T**2 / 2.0)]
    return np.column_stack([*columns, x[:, 0] * x[:, 1]] if x.shape[1] == 2 else columns)


def lowest_point(curve: np.ndarray, axes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of quadratics (..., k): vertex (..., axes), Hessian (..., axes, axes), lowest value and whether it is one."""
    slope, bend = curve[..., 1 : 1 + axes], curve[..., 1 + axes : 1 + 2 * axes]
    hessian = np.zeros((*curve.shape[:-1], axes, axes))
    for j in range(axes):
        hessian[..., j, j] = bend[..., j]
    if axes == 2:
        hessian[..., 0, 1] = hessian[..., 1, 0] = curve[..., 5]
    convex = np.asarray((np.linalg.eigvalsh(hessian) > 0).all(axis=-1))
    safe = np.where(convex[..., None, None], hessian, np.eye(axes))
    vertex = -np.linalg.solve(safe, slope[..., None])[..., 0]
    lowest = np.asarray(curve[..., 0] + 0.5 * (slope * vertex).sum(axis=-1))
    return vertex, hessian, lowest, convex


@dataclass
class Surface:
    """The settings of a group that have a loss, and which of them are fitted. x: ln of the axes, (n, axes)."""

    x: np.ndarray
    y: np.ndarray
    count: np.ndarray
    used: np.ndarray
    position: np.ndarray
    bad: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.solve_again()

    def solve_again(self) -> None:
        self.center = self.x[self.used].mean(axis=0)
        design = quadratic_columns(self.x[self.used] - self.center)
        root = np.sqrt(self.count[self.used])
        self.fits = np.linalg.matrix_rank(design) == design.shape[1]
        self.solve = np.linalg.pinv(design * root[:, None]) * root
        self.curve = self.solve @ self.y[self.used]
        self.misses = (self.y[self.used] - design @ self.curve) * root
        self.leverage = np.einsum("nk,kn->n", design, self.solve)

    def scatter(self) -> tuple[float, int]:
        """Sum of squared residuals of one run's ln loss, and its degrees of freedom."""
        return float((self.misses**2).sum()), len(self.misses) - len(self.curve)


def surface_of(group: Group, axes: Sequence[str], reach: float) -> Surface | None:
    """None where nothing has a loss, or the settings cannot carry a quadratic."""
    count = group.columns["count"]
    usable = (count > 0) & (group.columns["diverged"] <= count)
    x = np.log(np.stack([group.columns[axis][usable] for axis in axes], axis=1))
    y = np.log(group.columns["loss"][usable])
    if not len(y) or any(len(np.unique(column)) < 3 for column in x.T):
        return None
    used = _beside_lowest(x[:, 0], y, reach) if len(axes) == 1 else _lowest(x, y, reach)
    return Surface(x, y, count[usable].astype(float), used, np.flatnonzero(usable))


def _beside_lowest(x: np.ndarray, y: np.ndarray, reach: float) -> np.ndarray:
    """The lowest setting, its neighbours, and on from there to the lower side, up to `reach` or until there are enough.

    Without a gap, so that a lucky run beyond a wall of bad ones does not count.
    """
    order = np.argsort(x)
    low = high = int(np.argmin(y[order]))
    low, high = max(low - 1, 0), min(high + 1, len(order) - 1)
    height = y[order] - y.min()
    while low > 0 or high < len(order) - 1:
        left = height[low - 1] if low > 0 else np.inf
        right = height[high + 1] if high < len(order) - 1 else np.inf
        if min(left, right) > reach and high - low + 1 >= ENOUGH[1]:
            break
        low, high = (low - 1, high) if left <= right else (low, high + 1)
    return np.sort(order[low : high + 1])


def _lowest(x: np.ndarray, y: np.ndarray, reach: float) -> np.ndarray:
    """The lowest settings, up to `reach` or until there are enough, on three levels of each axis."""
    order = np.argsort(y)
    size = max(int((y - y.min() <= reach).sum()), min(ENOUGH[2], len(y)))
    while size < len(y) and any(len(np.unique(column)) < 3 for column in x[order[:size]].T):
        size += 1
    return np.sort(order[:size])


def take_out_bad_runs(surfaces: Sequence[Surface]) -> None:
    """Take out, one after another, settings that the others contradict: at most one of a group's ten.

    By residuals studentised without the setting itself and pooled over the groups (Cook & Weisberg 1982): a bad run at
    the end of a curve pulls it to itself, so that its plain residual is small, and weights by residual (Huber's) do
    not see it. Groups keep a degree of freedom more than the quadratic needs.
    """
    while True:
        able = [s for s in surfaces if s.fits]
        squares, freedom = (sum(part) for part in zip(*(s.scatter() for s in able))) if able else (0.0, 0)
        total = sum(len(s.misses) for s in able)
        if freedom < 3 or squares <= 1e-20:
            return
        bound = float(stdtrit(freedom - 1, 1.0 - DOUBT / (2.0 * total)))
        worst: tuple[float, Surface, int] | None = None
        for s in able:
            most = max(1, (len(s.used) + len(s.bad)) // 10)
            if s.scatter()[1] < 2 or len(s.bad) >= most:
                continue
            own = s.misses**2 / np.maximum(1.0 - s.leverage, 1e-9)
            rest = np.maximum(squares - own, 1e-300) / (freedom - 1)
            scores = np.where(s.leverage < 1 - 1e-6, np.sqrt(own / rest), 0.0)
            at = int(scores.argmax())
            if scores[at] > bound and (worst is None or scores[at] > worst[0]):
                worst = float(scores[at]), s, at
        if worst is None:
            return
        _, s, at = worst
        s.bad.append(int(s.used[at]))
        s.used = np.delete(s.used, at)
        s.solve_again()


def skewed(surfaces: Sequence[Surface]) -> list[Verdict]:
    """A caution where the valleys are steeper on one side, in all groups alike: by how much their vertices are off.

    The cubic term that all groups share, by regression of what the quadratics leave on what they leave of x^3 (t test
    at .1%), and what it does to the vertices to first order.
    """
    across, own, squares, freedom, shifts = 0.0, 0.0, 0.0, -1, []
    for s in surfaces:
        x = (s.x[s.used] - s.center)[:, 0]
        taken = s.solve @ x**3
        left = (x**3 - quadratic_columns(x[:, None]) @ taken) * np.sqrt(s.count[s.used])
        across, own = across + float(left @ s.misses), own + float(left @ left)
        squares, freedom = squares + s.scatter()[0], freedom + s.scatter()[1]
        if s.curve[2] > 0:
            at = -s.curve[1] / s.curve[2]
            shifts.append((taken[1] + taken[2] * at - 3.0 * at**2) / s.curve[2])
    if freedom < 1 or not own > 1e-12 or not shifts:
        return []
    skew, rest = across / own, max(squares - across**2 / own, 1e-20) / freedom
    if abs(skew) <= float(stdtrit(freedom, 0.9995)) * np.sqrt(rest / own):
        return []
    shift = skew * float(np.median(shifts))
    side = "above" if skew > 0 else "below"
    message = (
        f"the loss rises faster {side} the optimum than on the other side, in all groups alike: the lowest points lie "
        f"about {np.expm1(abs(shift)):.0%} {'above' if shift > 0 else 'below'} the vertices named, and the intervals "
        "do not know it. Ratios between groups and powers hardly feel it; a finer grid of rates narrows it."
    )
    return [Verdict("skewed_valley", "caution", "fit", None, message, {"cubic": skew, "ln_shift": shift})]
