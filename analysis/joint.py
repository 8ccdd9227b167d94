"""One loss surface under two tables of runs: what `compare` solves.

    ln L_baseline(C, D/N)  = f(ln C - g/2, ln D/N)
    ln L_candidate(C, D/N) = f(ln C + g/2, ln D/N)       g linear in ln C and ln D/N, bent where the runs demand it

f is the Chinchilla law in compute and tokens per parameter, or a saturating power law of compute where the runs lie
along one path. g acts on both recipes alike, with opposite signs: so it can take up nothing that both have in common,
such as a misfit of f, and exchanging the tables inverts the answer.

Cells that both tables have form pairs. The mean and the difference of a pair have noise of their own: the mean holds
what seed, data order and the misses of the law do to both runs, the difference does not. So they are weighted apart;
a plain fit of all runs would drown the difference in what both share.
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import fdtrc, stdtrit

from analysis.resampling import trunk_labels
from analysis.uncertainty import merged

MIN_PAIRS = 5
"""Fewer pairs than this cannot tell how much of their noise is shared."""
PATH_SPREAD = 0.2
"""Runs within about 20% of one line in (ln C, ln D/N) show nothing across it."""
MIN_WIDE = 12
"""Runs of both recipes together that a surface of two terms needs; fewer get the one of a single term."""
MIN_BEND = 10.0
"""Degrees of freedom below which a curvature of g cannot be told from noise."""
HUBER = 1.5
"""Threshold of the Huber loss, in units of the noise."""
BATCH = 4_000_000
"""Numbers in one Jacobian of the bootstrap."""


def spreads(c: np.ndarray, a: np.ndarray) -> bool:
    """Whether runs at ln C and ln D/N spread across a line: then they show what allocation does."""
    return float(np.sqrt(max(np.linalg.eigvalsh(np.cov(c, a))[0], 0.0))) >= PATH_SPREAD


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Runs of both recipes: the baseline's and then the candidate's run of each pair, then all others.

    unit: (n,), counted from 0: runs of one unit share noise, those of a pair and those of a trunk. cell: (n,), counted
    from 0: runs of one size and length.
    c, a, log_loss: (n,), ln C and ln D/N about `center`, ln loss. new: (n,), whether the candidate's. pairs: how many.
    powers: (2 to 4, 2), the powers of c and a whose sum g is: 1, c and where they are shown a, c^2.
    across: two terms, which fall with size and with tokens; otherwise one that falls with compute.
    theta = (ln E, ln of each term at the centre, exponent of each term, coefficients of g).
    """

    c: np.ndarray
    a: np.ndarray
    new: np.ndarray
    powers: np.ndarray
    log_loss: np.ndarray
    unit: np.ndarray
    cell: np.ndarray
    center: tuple[float, float]
    pairs: int
    across: bool

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        low, terms = float(self.log_loss.min()), 2 if self.across else 1
        # A multiplier of 1000, or a loss that does not fall with compute, is none to speak of.
        g = np.where(self.powers.sum(axis=1) == 0, 7.0, 1.5)
        lower = [low - 12.0] * (1 + terms) + [0.01] * terms
        upper = [low + 0.05] + [low + 6.0] * terms + [3.0] * terms
        return np.array([*lower, *-g]), np.array([*upper, *g])

    @property
    def whitened_unit(self) -> np.ndarray:
        """The unit of every whitened number, (n,)."""
        return self.whitened(self.unit)

    def whitened(self, labels: np.ndarray) -> np.ndarray:
        """The label of every whitened number, (n,), from those of the runs, which are equal within pairs."""
        return np.concatenate([labels[: self.pairs], labels[: self.pairs], labels[2 * self.pairs :]])

    @property
    def z(self) -> np.ndarray:
        """What the shift of each run is linear in, (2 to 4, n)."""
        return np.stack([self.c**i * self.a**j for i, j in self.powers]) * np.where(self.new, 0.5, -0.5)

    def log_multiplier(self, g: np.ndarray, c: float | np.ndarray) -> np.ndarray:
        """ln of the baseline's compute over the candidate's exp(c) at equal loss and middle allocation.

        g: (..., 2 to 4). Where g changes with compute the baseline's own g is another: b - g(b)/2 = c + g(c)/2.
        """

        def half(at: np.ndarray) -> np.ndarray:
            return np.asarray(sum(g[..., k] * at**i for k, (i, j) in enumerate(self.powers) if j == 0)) / 2

        candidate = np.broadcast_to(np.asarray(c, dtype=float), np.broadcast_shapes(np.shape(c), g.shape[:-1]))
        equal = candidate + half(candidate)
        reached = equal
        for _ in range(60):
            reached = np.clip(equal + half(reached), equal - 10.0, equal + 10.0)
        return np.asarray(reached - candidate)

    def predict(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln loss (S, n) and its derivatives (S, k, n) for theta (S, k)."""
        terms = 2 if self.across else 1
        level, exponent, g = theta[:, 1 : 1 + terms], theta[:, 1 + terms : 1 + 2 * terms], theta[:, 1 + 2 * terms :]
        z = self.z
        c = self.c + g @ z
        # ln N and ln D up to a constant, since C is close to a multiple of N D
        along = np.stack([(c - self.a) / 2, (c + self.a) / 2], axis=1) if self.across else c[:, None]
        logs = level[..., None] - exponent[..., None] * along
        floor = np.broadcast_to(theta[:, :1, None], (len(theta), 1, len(self.c)))
        parts = np.concatenate([floor, logs], axis=1)
        total = np.logaddexp.reduce(parts, axis=1)
        share = np.exp(parts - total[:, None])
        slope = -(exponent[..., None] * share[:, 1:]).sum(axis=1) / terms
        return total, np.concatenate([share, -along * share[:, 1:], slope[:, None] * z], axis=1)

    def whiten(self, values: np.ndarray, scales: tuple[float, float, float]) -> np.ndarray:
        """Means and differences of the pairs, and the other runs, each in units of its own noise: (..., n)."""
        one, two, rest = np.split(values, [self.pairs, 2 * self.pairs], axis=-1)
        return np.concatenate([(one + two) / 2 / scales[0], (two - one) / scales[1], rest / scales[2]], axis=-1)

    def starts(self) -> np.ndarray:
        """Exponents and the share of the smallest loss that is its floor, on a grid; no difference of recipes."""
        low, middle = float(self.log_loss.min()), float(self.log_loss.mean())
        grid = []
        for floor, *exponents in product((0.1, 0.5, 0.9), *[(0.15, 0.4, 0.9)] * (2 if self.across else 1)):
            rest = np.log(max(np.exp(middle) - floor * np.exp(low), 1e-3) / len(exponents))
            grid.append([low + np.log(floor), *[rest] * len(exponents), *exponents, *[0.0] * len(self.powers)])
        return np.clip(np.array(grid), *self.bounds)


def join(one: pd.DataFrame, two: pd.DataFrame) -> Joint:
    """Both tables in one, pairs first."""
    keys = [place.reset_index(names="row") for place in _places(one, two)]
    matched = keys[0].merge(keys[1], on=[c for c in keys[0].columns if c != "row"])
    first, second = matched["row_x"].to_numpy(dtype=int), matched["row_y"].to_numpy(dtype=int)
    if len(first) < MIN_PAIRS:
        first, second = first[:0], second[:0]
    rest = [np.setdiff1d(np.arange(len(t)), used) for t, used in ((one, first), (two, second))]
    table = pd.concat([one.iloc[first], two.iloc[second], one.iloc[rest[0]], two.iloc[rest[1]]])
    parts = ((0, first), (1, second), (0, rest[0]), (1, rest[1]))
    cells = pd.concat([keys[which].set_index("row").loc[rows, ["size", "place"]] for which, rows in parts])
    # Without a partner a run has nothing in common with the other table's.
    cells["table"] = np.repeat([0, 0, 0, 1], [len(rows) for _, rows in parts])
    new = np.repeat([False, True, False, True], [len(first), len(second), len(rest[0]), len(rest[1])])
    N, D, C, loss = (table[c].to_numpy(dtype=float) for c in ("N", "D", "C", "loss"))
    center = (float(np.log(C).mean()), float(np.log(D / N)[new].mean()))
    c, a = np.log(C) - center[0], np.log(D / N) - center[1]
    wide = [len(c) >= MIN_WIDE and spreads(c[own], a[own]) for own in (~new, new)]
    # Only where both show what allocation does can g depend on it.
    powers = np.array([(0, 0), (1, 0), (0, 1)] if all(wide) else [(0, 0), (1, 0)])
    return Joint(
        c=c,
        a=a,
        new=new,
        powers=powers,
        log_loss=np.log(loss),
        unit=_units(table, new, len(first)),
        cell=cells.groupby(list(cells.columns), sort=False).ngroup().to_numpy(),
        center=center,
        pairs=len(first),
        across=any(wide),
    )


def _units(table: pd.DataFrame, new: np.ndarray, pairs: int) -> np.ndarray:
    """What is linked by being a pair or of one trunk, numbered in order of appearance."""
    n = len(table)
    trunks = trunk_labels(table)
    own = np.arange(n) if trunks is None else np.unique(trunks + np.where(new, " b", " a"), return_inverse=True)[1]
    one = np.concatenate([np.arange(n), np.arange(pairs)])
    other = np.concatenate([n + own, np.arange(pairs, 2 * pairs)])
    links = coo_array((np.ones(len(one)), (one, other)), shape=(2 * n, 2 * n))
    return np.asarray(pd.factorize(connected_components(links, directed=False)[1][:n])[0])


def by_cells(joint: Joint, best: "Solution") -> Joint:
    """The same with all runs of a cell as one unit, where cells are off by more than their seeds differ: what the
    surface, or the tuning of a cell, misses is common to its seeds, and does not average out over them.

    The test is that for lack of fit (Draper & Smith 1998, 2.1; 5%), of the differences of pairs where there are any.
    """
    part = slice(joint.pairs, 2 * joint.pairs or None)
    misses, cells = best.residual[part], np.unique(joint.whitened(joint.cell)[part], return_inverse=True)[1]
    runs = np.bincount(cells)
    between, within = len(runs) - len(best.theta), len(misses) - len(runs)
    if joint.pairs:
        between = len(runs) - len(joint.powers)
    if between < 1 or within < 1:
        return joint
    means = np.bincount(cells, misses) / runs
    inside = float(np.square(misses - means[cells]).sum()) / within
    ratio = float(runs @ np.square(means)) / between / inside if inside > 0 else np.inf
    if fdtrc(between, within, ratio) >= 0.05:
        return joint
    n, units = len(joint.c), int(joint.unit.max()) + 1
    one, other = np.tile(np.arange(n), 2), np.concatenate([n + joint.unit, n + units + joint.cell])
    size = n + units + int(joint.cell.max()) + 1
    links = coo_array((np.ones(2 * n), (one, other)), shape=(size, size))
    return replace(joint, unit=pd.factorize(connected_components(links, directed=False)[1][:n])[0])


def _places(one: pd.DataFrame, two: pd.DataFrame) -> list[pd.DataFrame]:
    """What a run of each table must share with its partner in the other. Lattice sizes and budgets stand for the N and
    D that they round to."""

    def labelled(label: str, number: str) -> np.ndarray:
        values = [table[number].astype(float) for table in (one, two)]
        if label in one.columns and label in two.columns:
            values = [table[label].astype(float).fillna(own) for table, own in zip((one, two), values)]
        return merged(np.concatenate(values))

    key = pd.DataFrame({"size": labelled("size", "N"), "place": labelled("budget", "D")})
    for seed in ("seed", "data_seed"):
        if seed in one.columns and seed in two.columns:
            key[seed] = np.concatenate([one[seed], two[seed]])
    # Replicates without seeds of their own pair up in order.
    return [
        part.reset_index(drop=True).assign(order=part.groupby(list(key.columns), dropna=False).cumcount().to_numpy())
        for part in (key.iloc[: len(one)], key.iloc[len(one) :])
    ]


@dataclass(frozen=True, kw_only=True)
class Solution:
    """theta (k,); scales of pair means, pair differences and single runs; everything else in whitened units."""

    theta: np.ndarray
    scales: tuple[float, float, float]
    predicted: np.ndarray
    residual: np.ndarray
    slopes: np.ndarray


def solve(joint: Joint, starts: np.ndarray | None = None) -> Solution:
    """Fit from many starts (S, k), then again with the scales and Huber weights that the residuals ask for."""
    freedom = np.sqrt(len(joint.c) / (len(joint.c) - len(joint.bounds[0])))
    theta = joint.starts() if starts is None else starts
    # The first round is least squares, with a guess of the scales that gives pairs of independent runs their due.
    scales, threshold = (0.01 / np.sqrt(2), 0.01 * np.sqrt(2), 0.01), np.inf
    for _ in range(4):
        target = joint.whiten(joint.log_loss, scales)
        ends, values = _descend(joint, target, theta, scales, threshold)
        theta = ends[[int(values.argmin())]]
        total, slopes = joint.predict(theta)
        solution = Solution(
            theta=theta[0],
            scales=scales,
            predicted=joint.whiten(total[0], scales),
            residual=target - joint.whiten(total[0], scales),
            slopes=joint.whiten(slopes[0], scales),
        )
        scales, threshold = _scales(joint, joint.log_loss - total[0], float(freedom)), HUBER
    return solution


def _scales(joint: Joint, misses: np.ndarray, freedom: float) -> tuple[float, float, float]:
    """Robust scales of pair means, pair differences and single runs; a millionth where runs agree exactly."""
    parts = np.split(joint.whiten(misses, (1.0, 1.0, 1.0)), [joint.pairs, 2 * joint.pairs])
    if joint.pairs:
        mean, difference = (max(1.4826 * freedom * float(np.median(np.abs(p))), 1e-6) for p in parts[:2])
        return mean, difference, float(np.hypot(mean, difference / 2))
    single = max(1.4826 * freedom * float(np.median(np.abs(parts[2]))), 1e-6)
    return single, single, single


def _huber(residual: np.ndarray, threshold: float) -> np.ndarray:
    size = np.abs(residual)
    inside = np.minimum(size, threshold)
    return np.asarray((inside * (size - inside / 2)).sum(axis=-1))


def _descend(
    joint: Joint,
    target: np.ndarray,
    starts: np.ndarray,
    scales: tuple[float, float, float],
    threshold: float,
    *,
    rounds: int = 200,
    gain: float = 1e-12,
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt with Huber weights, one batch over all starts (S, k), to whitened targets (n,) or (S, n)."""
    lower, upper = joint.bounds
    target = np.broadcast_to(target, (len(starts), target.shape[-1]))
    theta, damping = starts.copy(), np.full(len(starts), 1e-2)
    value = _huber(target - joint.whiten(joint.predict(theta)[0], scales), threshold)
    running, calm = np.arange(len(starts)), np.zeros(len(starts), dtype=int)
    for _ in range(rounds):
        now = theta[running]
        total, slopes = joint.predict(now)
        slopes, miss = joint.whiten(slopes, scales), joint.whiten(total, scales) - target[running]
        weight = np.minimum(1.0, threshold / np.maximum(np.abs(miss), 1e-300))
        gradient = (slopes @ (weight * miss)[..., None])[..., 0]
        # Parameters pressed against their bound stay there for this step.
        pressed = ((now <= lower) & (gradient > 0)) | ((now >= upper) & (gradient < 0))
        slopes, gradient = np.where(pressed[..., None], 0.0, slopes), np.where(pressed, 0.0, gradient)
        normal = (slopes * weight[:, None]) @ slopes.swapaxes(1, 2)
        diagonal = np.einsum("skk->sk", normal)
        damped = damping[running, None] * diagonal + 1e-9 * diagonal.max(axis=1, keepdims=True) + pressed
        step = -np.linalg.solve(normal + np.eye(theta.shape[1]) * damped[:, None], gradient[..., None])[..., 0]
        trial = np.clip(now + step, lower, upper)
        reached = _huber(target[running] - joint.whiten(joint.predict(trial)[0], scales), threshold)
        better = reached < value[running]
        small = value[running] - reached <= gain * value[running]
        theta[running] = np.where(better[:, None], trial, now)
        value[running] = np.where(better, reached, value[running])
        damping[running] = np.clip(damping[running] * np.where(better, 0.2, 5.0), 1e-12, 1e12)
        calm[running] = np.where(small, calm[running] + 1, 0)
        running = running[calm[running] < 4]
        if not running.size:
            break
    return theta, value


def bend(joint: Joint, straight: Solution, freedom: float) -> tuple[Joint, Solution]:
    """The same with a term of c^2 in g, where its t value is clear (0.1%): a line would then be wrong at its ends."""
    if freedom < MIN_BEND:
        return joint, straight
    bent = replace(joint, powers=np.vstack([joint.powers, (2, 0)]))
    found = solve(bent, np.append(straight.theta, 0.0)[None])
    weight, slopes = _weighted(found)
    unit = joint.whitened_unit
    scores = found.slopes * weight * _enlarged(found, unit, 1.0)
    inverse = np.linalg.pinv(slopes @ slopes.T, rcond=1e-12)
    units = scores @ (unit[:, None] == np.arange(unit.max() + 1))
    error = np.sqrt((inverse[-1] @ units) @ (inverse[-1] @ units))
    return (bent, found) if abs(found.theta[-1]) > stdtrit(freedom, 0.9995) * error else (joint, straight)


def _weighted(best: Solution) -> tuple[np.ndarray, np.ndarray]:
    """Huber weights (n,), and slopes (k, n) times their roots."""
    weight = np.minimum(1.0, HUBER / np.maximum(np.abs(best.residual), 1e-300))
    return weight, best.slopes * np.sqrt(weight)


def _enlarged(best: Solution, unit: np.ndarray, power: float) -> np.ndarray:
    """The residuals (n,), those of each unit times (1 - H)^-power, H being its block of the hat matrix.

    With 1/2 a unit's residuals have the size that they would have in one that the fit does not know; with 1 they err
    on the safe side (Bell & McCaffrey 2002; of single runs HC2 and HC3, MacKinnon & White 1985). The leverage of
    single runs is that of a unit shared among them, and so too small for all of them together.
    """
    _, slopes = _weighted(best)
    inverse = np.linalg.pinv(slopes, rcond=1e-9)
    enlarged = np.empty_like(best.residual)
    order = np.argsort(unit, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(unit[order])) + 1):
        left, axes = np.linalg.eigh(np.eye(len(rows)) - inverse[rows] @ slopes[:, rows])
        enlarged[rows] = axes @ (np.clip(left, 0.1, 1.0) ** -power * (axes.T @ best.residual[rows]))
    return enlarged


def resample(joint: Joint, best: Solution, freedom: float, generator: np.random.Generator, count: int) -> np.ndarray:
    """Coefficients of g in bootstrap copies, (count, 2 to 4).

    A wild bootstrap by pair, or by trunk: each copy is the fitted surface plus every run's own residuals, enlarged by
    their leverage, all of a pair and of a trunk with one random sign: the design stays whole, shared noise stays
    shared, and the larger noise of small runs stays theirs. A scale known from few degrees of freedom gives heavy
    tails.
    """
    unit = joint.whitened_unit
    signs = generator.choice([-1.0, 1.0], (count, int(unit.max()) + 1))[:, unit]
    stretch = np.sqrt(freedom / generator.chisquare(freedom, count))
    targets = best.predicted + signs * _enlarged(best, unit, 0.5) * stretch[:, None]
    parts = np.array_split(targets, max(1, targets.size * len(best.theta) // BATCH))
    starts = (np.tile(best.theta, (len(p), 1)) for p in parts)
    ends = [_descend(joint, p, s, best.scales, HUBER, rounds=60, gain=1e-6)[0] for p, s in zip(parts, starts)]
    return np.concatenate(ends)[:, -len(joint.powers) :]
