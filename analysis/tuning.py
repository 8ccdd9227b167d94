"""What tuning is worth: the tuned loss against the default's at each size, as a gain, as compute, as a larger model.

The failure it guards against is the winner's curse: the minimum of k noisy losses, and to a lesser degree the lowest
point of a curve through them, is too low by luck, and a default judged against it is always worth tuning. So the tuned
loss is that of the curve through a sweep (`optima`), or where there is none of the best setting, and both are raised by
the luck that noise of this size gives them, as the bootstrap finds it. The default's run is a point of the same sweep:
both sides share its noise, and so do their draws.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pandas as pd

from analysis.multipliers import NO_SIZE, SizeMultiplier, compute_multiplier, far_below, size_multiplier, tuned_frontier
from analysis.optima import Optimum
from analysis.sensitivity import sensitivity
from analysis.uncertainty import SETTINGS, UNKNOWN, Noise, interval, seed_noise
from analysis.verdicts import NAN, NOTHING, Estimate, Fit, Verdict, clean, plural, refused
from sweeps.errors import InputError, nearest
from sweeps.rules import PowerRule, evaluate
from sweeps.units import human

AXES = ("learning_rate", "batch_tokens")
"""Hyperparameters whose sweeps have curves; of others the best setting stands for the tuned one."""
WITHIN = 1.5
"""A run's setting is the default's where it is this near to it, as a factor."""
SAME_PLACE = 0.02
"""Two ln D this close are one token count: batch sizes round it."""
KNOTS = 41
"""Points along each axis at which a curve without a minimum is searched for its lowest value."""

Default = Mapping[str, float | PowerRule | Callable[[Mapping[str, float]], float]]


def tuning_worth(
    runs: pd.DataFrame,
    *,
    default: Default | None = None,
    optima: Sequence[Optimum] | None = None,
    noise: float | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> "TuningWorth":
    """What choosing hyperparameters gains over a default, at each (family, N, D) where both are known.

    runs: a run table with N, D, the hyperparameters that vary, and losses (nats), as for `sensitivity`.
    default: the recipe that is not tuned, by hyperparameter: a number, a rule of a study, or a function of a place's
        N, D and C; the runs nearest to it, within a factor of `WITHIN`, stand for it. Without it the study's own:
        the runs whose `is_default` is true. A hyperparameter that varies and is not named is tuned on neither side:
        each of its values is a place of its own.
    optima: as `sensitivity` found them; by default it is asked. noise: standard deviation of ln loss between seeds;
        by default measured. resamples, level, seed: of the intervals.

    Returns a TuningWorth, with verdicts on what could not be told. Raises InputError for a missing column, a default
    that is no positive number or no hyperparameter that varies.
    """
    table = _usable(runs)
    varied = [c for c in SETTINGS if c in table.columns and _varies(table, c)]
    axes = _axes(varied, default, table)
    if not axes:
        message = (
            "no hyperparameter varies at equal N and D, so there is nothing tuned to hold the default against. Vary "
            "the learning rate at some sizes: five values a factor 2 apart."
        )
        return TuningWorth(verdicts=(Verdict("optimum_unmeasured", "refuse", "fit", None, message),), level=level)

    # 1. the sweeps, and the noise between seeds
    verdicts: list[Verdict] = []
    if set(axes) <= set(AXES):
        if optima is None:
            found = sensitivity(runs, axes=axes, noise=noise, resamples=100, level=level, seed=seed)
            optima, known = found.optima, found.noise
        else:
            known = sensitivity(runs, axes=axes, noise=noise, resamples=100, seed=seed).noise if noise is None else {}
        sweeps = [_Sweep(group=o.group, points=o.points, optimum=o) for o in optima if tuple(o.axes) == axes]
    else:
        sweeps, known = _settings_swept(table, axes), {}
    spread = _noise(known, noise, runs)
    if not spread.sd > 0:
        message = "no seeds are replicated and no curve tells the noise, so there are no intervals. Add seeds."
        verdicts.append(Verdict("noise_unknown", "caution", "fit", None, message))

    # 2. the gain at each place
    generator = np.random.default_rng(seed)
    places, lost = [], []
    for sweep in sweeps:
        place = _gain(sweep, axes, default, table, spread, resamples, level, generator)
        places.append(place) if isinstance(place, _Place) else lost.append(place)
    verdicts += _said(places, lost, axes)
    if not places:
        return TuningWorth(axes=axes, verdicts=tuple(verdicts), noise=spread.to_json(), level=level)

    # 3. what that is in compute and in size, through the law of the tuned runs of each family
    worths, laws = [], {}
    for family in dict.fromkeys(str(p.group.get("family", "")) for p in places):
        own = [p for p in places if str(p.group.get("family", "")) == family]
        frontier = tuned_frontier(_tuned_runs(own), level, seed)
        laws[family] = frontier.law
        name = f"{family}: " if len({str(p.group.get("family", "")) for p in places}) > 1 else ""
        verdicts += [replace(v, message=name + v.message) for v in frontier.verdicts]
        verdicts += far_below(frontier, np.array([p.default_loss[0] for p in own]))
        for p in own:
            compute = compute_multiplier(frontier, p.tuned_loss, p.default_loss, level)
            size = size_multiplier(frontier, p.N, p.default_loss - p.tuned_loss, level)
            worths.append(_worth(p, compute, size, level))
    return TuningWorth(
        axes=axes, worths=tuple(worths), laws=laws, verdicts=tuple(verdicts), noise=spread.to_json(), level=level
    )


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What tuning is worth at one place.

    group: family, N, D and what else is constant there. default: the setting of the runs that stand for it.
    tuned: the best setting by hyperparameter. way: "curve", or "best setting" corrected for luck.
    default_loss, tuned_loss, gain: nats. percent: of the default's loss. compute, size: how many times more compute
    (along the tuned frontier), or a larger model (at equal tokens), the default needs to reach the tuned loss.
    at_least: the optimum lies beyond the settings tried, so tuning is worth more than this.
    told_apart: whether the gain's interval excludes 0.
    """

    group: Mapping[str, Any]
    default: Mapping[str, float]
    tuned: Mapping[str, Estimate]
    way: str
    default_loss: float
    tuned_loss: Estimate
    gain: Estimate
    percent: Estimate
    compute: Estimate = NOTHING
    size: SizeMultiplier = NO_SIZE
    at_least: bool = False

    @property
    def told_apart(self) -> bool:
        return bool(self.gain.interval[0] > 0)

    def __str__(self) -> str:
        """One sentence: "tuning at 1 M is worth a 1.8x larger model, 1.5 to 2.1"."""
        N, D = (human(float(self.group[v])) for v in ("N", "D"))
        start = f"tuning at {N} parameters on {D} tokens"
        if not self.told_apart:
            return f"{start} gains nothing that can be told from noise ({self.percent.value:.2f} % of the loss)"
        more = "at least " if self.at_least else ""
        parts = [f"{more}{self.percent.value:.2f} % of the loss{_range(self.percent, '{:.2f}')}"]
        if np.isfinite(self.compute.value):
            parts.append(f"{self.compute.value:.3g} times the compute{_range(self.compute, '{:.3g}')}")
        if np.isfinite(self.size.estimate.value):
            sign = "more than " if self.size.bounded else ""
            parts.append(f"a {sign}{self.size.estimate.value:.3g}x larger model{_range(self.size.estimate, '{:.3g}')}")
        return f"{start} is worth {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k != "size"}
        size = self.size.estimate.to_json() | {"bounded": self.size.bounded}
        found: dict[str, Any] = clean(own | {"size": size, "told_apart": self.told_apart})
        return found


def _range(estimate: Estimate, form: str) -> str:
    low, high = estimate.interval
    if np.isfinite([low, high]).all():
        return f", {form.format(low)} to {form.format(high)}"
    return f", above {form.format(low)}" if np.isfinite(low) else ""


@dataclass(frozen=True, kw_only=True)
class TuningWorth:
    """What tuning `axes` is worth at every place, or why it is not known: look at `refused` and `verdicts` first.

    laws: by family, the law of the tuned runs that the compute multipliers run along; None where there is none.
    noise: of ln loss between seeds, and where it comes from. level: of the intervals.
    """

    axes: tuple[str, ...] = ()
    worths: tuple[Worth, ...] = ()
    laws: Mapping[str, Fit | None] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    noise: Mapping[str, Any] = field(default_factory=dict)
    level: float = 0.95

    @property
    def refused(self) -> bool:
        return refused(self.verdicts) or not self.worths

    def __str__(self) -> str:
        if not self.worths:
            return "Not known: " + next((v.message for v in self.verdicts if v.severity == "refuse"), "no runs.")
        return "\n".join(map(str, self.worths))

    def table(self) -> pd.DataFrame:
        """One row for each place: group, default, losses (nats), gain (percent), compute and size multipliers."""
        rows = []
        for w in self.worths:
            row = dict(w.group) | {f"default_{k}": v for k, v in w.default.items()}
            row |= {f"tuned_{k}": v.value for k, v in w.tuned.items()}
            row |= {"way": w.way, "loss_default": w.default_loss, "loss_tuned": w.tuned_loss.value}
            for name, e in (("percent", w.percent), ("compute", w.compute), ("size", w.size.estimate)):
                row |= {name: e.value, f"{name}_low": e.interval[0], f"{name}_high": e.interval[1]}
            rows.append(row | {"size_bounded": w.size.bounded, "at_least": w.at_least, "told_apart": w.told_apart})
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """As JSON values: NaN is null."""
        laws = {k: v.to_json() if v is not None else None for k, v in self.laws.items()}
        own = {"axes": list(self.axes), "refused": self.refused, "level": self.level, "noise": dict(self.noise)}
        found: dict[str, Any] = clean(own | {"verdicts": [v.to_json() for v in self.verdicts]})
        return found | {"worths": [w.to_json() for w in self.worths], "laws": laws}


# --- what was run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """The settings tried at one place: `points` holds the axes, `loss` (mean over seeds), `count`, `fitted`."""

    group: Mapping[str, Any]
    points: pd.DataFrame
    optimum: Optimum | None = None


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A place with both sides known; losses in nats, (1 + copies,), the point estimate first."""

    group: Mapping[str, Any]
    C: float
    default: Mapping[str, float]
    tuned: Mapping[str, Estimate]
    way: str
    tuned_loss: np.ndarray
    default_loss: np.ndarray
    at_least: bool

    @property
    def N(self) -> float:
        return float(self.group["N"])


def _usable(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a size, tokens and a loss, which is named `loss`; C is 6 N D where the table has none."""
    name = next((c for c in ("val_loss_final", "loss") if c in runs.columns), None)
    missing = [c for c in ("N", "D") if c not in runs.columns] + ([] if name else ["loss"])
    if missing:
        raise InputError(
            f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, runs.columns))}. Read a file of your "
            "own with analysis.read_table, which finds common names."
        )
    table = runs[runs["excluded"].isna()] if "excluded" in runs.columns else runs
    table = table.assign(loss=table[name].astype(float))
    table = table[(table[["N", "D", "loss"]].astype(float) > 0).all(axis=1) & np.isfinite(table["loss"])]
    if "C" not in table.columns:
        table = table.assign(C=6.0 * table["N"] * table["D"])
    return table.reset_index(drop=True)


def _keys(table: pd.DataFrame) -> list[Any]:
    """What names a place: family, N, and D as far as batch sizes do not round it."""
    D = np.log(table["D"].to_numpy(dtype=float))
    order = np.argsort(D, kind="stable")
    rank = np.empty(len(D), dtype=int)
    rank[order] = np.concatenate([[0], np.cumsum(np.diff(D[order]) > SAME_PLACE)])[: len(D)]
    return [*([table["family"]] if "family" in table.columns else []), table["N"], rank]


def _varies(table: pd.DataFrame, column: str) -> bool:
    return bool((table.groupby(_keys(table), dropna=False)[column].nunique() > 1).any()) if len(table) else False


def _axes(varied: Sequence[str], default: Default | None, table: pd.DataFrame) -> tuple[str, ...]:
    """The hyperparameters that are tuned: those that vary and that the default names, in the order of `SETTINGS`."""
    if default is None:
        if varied and ("is_default" not in table.columns or not table["is_default"].eq(True).any()):
            raise InputError(
                f"{', '.join(varied)} vary, and nothing says which value is the default; name it, such as "
                f'default={{"{varied[0]}": ...}}.'
            )
        return tuple(varied)
    unknown = [k for k in default if k not in SETTINGS]
    if unknown:
        raise InputError(
            f"a default of {unknown[0]!r} is not known{nearest(unknown[0], SETTINGS)}: {', '.join(SETTINGS)}."
        )
    constant = [k for k in default if k not in varied]
    if constant and varied:
        raise InputError(f"{', '.join(constant)} does not vary in these runs; {', '.join(varied)} does.")
    return tuple(c for c in varied if c in default)


def _settings_swept(table: pd.DataFrame, axes: tuple[str, ...]) -> list[_Sweep]:
    """Sweeps over hyperparameters of which no curve is known: the settings and their mean losses."""
    keys = _keys(table)
    sweeps = []
    for _, group in table.assign(_y=np.log(table["loss"])).groupby(keys, dropna=False):
        points = group.groupby(list(axes), dropna=False)["_y"].agg(["mean", "count"]).reset_index()
        points = points.assign(loss=np.exp(points["mean"]), fitted=False)
        own = {"family": group["family"].iloc[0]} if "family" in group.columns else {}
        own |= {"N": float(group["N"].iloc[0]), "D": float(group["D"].median())}
        if len(points) > 1:
            sweeps.append(_Sweep(group=own, points=points))
    return sweeps


def _noise(known: Mapping[str, Any], given: float | None, runs: pd.DataFrame) -> Noise:
    if given is not None:
        return Noise(sd=given, freedom=np.inf, source="given")
    if not known:
        return seed_noise(runs, "val_loss_final" if "val_loss_final" in runs.columns else "loss") or UNKNOWN
    sd, freedom = known.get("sd"), known.get("freedom")
    source = known.get("source", "unknown")
    return Noise(sd=NAN if sd is None else float(sd), freedom=np.inf if freedom is None else freedom, source=source)


# --- the gain ----------------------------------------------------------------------------------------------------


def _gain(
    sweep: _Sweep,
    axes: tuple[str, ...],
    default: Default | None,
    table: pd.DataFrame,
    noise: Noise,
    resamples: int,
    level: float,
    generator: np.random.Generator,
) -> "_Place | str":
    """Both sides at one place, or why not."""
    near = table["N"].sub(sweep.group["N"]).abs().le(1e-6 * sweep.group["N"])
    near &= np.log(table["D"] / sweep.group["D"]).abs() <= SAME_PLACE
    if "family" in table.columns and sweep.group.get("family") is not None:
        near &= table["family"] == sweep.group["family"]
    rows = table[near]
    C = float(rows["C"].mean()) if len(rows) else 6.0 * sweep.group["N"] * sweep.group["D"]
    points = sweep.points.reset_index(drop=True)
    at = _default_point(points, axes, default, sweep.group, C, rows)
    if isinstance(at, str):
        return at
    kept = np.flatnonzero(np.isfinite(points["loss"].astype(float)) & (points["loss"].astype(float) > 0))
    if at not in kept:
        return "the default diverged"
    if len(kept) < 2:
        return "one setting only"
    y = np.log(points["loss"].to_numpy(dtype=float)[kept])
    count = points["count"].to_numpy(dtype=float)[kept]
    own = int(np.flatnonzero(kept == at)[0])

    # copies of all points: the default is one of them, so both sides share its noise
    errors = np.zeros((0, len(y)))
    if noise.sd > 0:
        errors = generator.standard_normal((resamples, len(y))) * noise.draw(generator, resamples)[:, None]
        errors /= np.sqrt(count)
    optimum = sweep.optimum
    curve = optimum is not None and not optimum.refused
    if curve and optimum is not None:
        fitted = points["fitted"].to_numpy(dtype=bool)[kept]
        copies = float(np.log(optimum.loss.value)) + _shifts(points.iloc[kept], axes, y, errors, fitted)
        luck = float(copies[1:].mean() - copies[0]) if len(errors) else 0.0
        tuned = dict(optimum.best)
    else:
        copies = np.concatenate([[y.min()], (y + errors).min(axis=1)])
        # noise has spread the settings already: its luck is that of settings as near as they would be without it
        apart = float(np.var(y, ddof=1))
        true = np.sqrt(max(0.0, 1.0 - float(errors.var(axis=0).mean()) / apart)) if apart > 0 and len(errors) else 1.0
        shrunk = y.mean() + true * (y - y.mean())
        luck = float((shrunk + errors).min(axis=1).mean() - shrunk.min()) if len(errors) else 0.0
        best = points.iloc[kept[int(y.argmin())]]
        tuned = {axis: Estimate(value=float(best[axis])) for axis in axes if _is_number(best[axis])}
    # the lowest of noisy losses, and the lowest point of a noisy curve, lie too low by what noise lowers them again
    lowest = copies[0] - luck + np.concatenate([[0.0], copies[1:] - copies[1:].mean() if len(errors) else []])
    return _Place(
        group=sweep.group,
        C=C,
        default={axis: points[axis].iloc[at] for axis in axes},
        tuned=tuned,
        way="curve" if curve else "best setting",
        tuned_loss=np.exp(lowest),
        default_loss=np.exp(np.concatenate([[y[own]], y[own] + errors[:, own]])),
        at_least=not curve and optimum is not None and any(v.code == "edge_minimum" for v in optimum.verdicts),
    )


def _default_point(
    points: pd.DataFrame,
    axes: tuple[str, ...],
    default: Default | None,
    group: Mapping[str, Any],
    C: float,
    rows: pd.DataFrame,
) -> int | str:
    """The position of the default's setting among the points, or why there is none."""
    wanted: dict[str, Any] = {}
    if default is None:
        own = rows[rows["is_default"].eq(True)]
        if own.empty:
            return "the default was not run"
        wanted = {axis: own[axis].iloc[0] for axis in axes}
    else:
        known = {k: float(group[k]) for k in ("N", "D", "batch_tokens") if group.get(k) is not None} | {"C": C}
        for axis in axes:
            value = default[axis]
            if callable(value):
                wanted[axis] = value(known)
            else:
                try:
                    wanted[axis] = value if isinstance(value, str) else evaluate(value, known)
                except (KeyError, ValueError) as error:
                    raise InputError(f"the rule of the default's {axis} cannot be evaluated: {error}.") from None
    away = np.zeros(len(points))
    for axis, value in wanted.items():
        if _is_number(value):
            if not 0 < value < np.inf:
                raise InputError(f"the default's {axis} is {value!r}; it must be a positive number.")
            away = np.maximum(away, np.abs(np.log(points[axis].to_numpy(dtype=float) / float(value))))
        else:
            away = np.where(points[axis] == value, away, np.inf)
    best = int(np.argmin(away))
    if not away[best] <= np.log(WITHIN):
        return "no run is near the default"
    return best


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and np.isfinite(value)


def _shifts(
    points: pd.DataFrame, axes: Sequence[str], y: np.ndarray, errors: np.ndarray, fitted: np.ndarray
) -> np.ndarray:
    """How far noise moves the lowest point of the quadratic through the fitted points, (1 + copies,), 0 first.

    Coefficients are linear in ln loss, so that adding noise to them is exact. Where a copy has no minimum among the
    points it is the lowest value of the quadratic over their range.
    """
    x = np.log(points.loc[fitted, list(axes)].to_numpy(dtype=float))
    x = x - x.mean(axis=0)
    low, high = x.min(axis=0), x.max(axis=0)
    pairs = list(combinations_with_replacement(range(len(axes)), 2))
    root = np.sqrt(points.loc[fitted, "count"].to_numpy(dtype=float))
    values = np.vstack([y[fitted], y[fitted] + errors[:, fitted]])
    coefficients = values @ (np.linalg.pinv(_design(x, pairs) * root[:, None]) * root).T
    slope, bend = coefficients[:, 1 : 1 + len(axes)], coefficients[:, 1 + len(axes) :]
    hessian = np.zeros((len(values), len(axes), len(axes)))
    for k, (i, j) in enumerate(pairs):
        hessian[:, i, j] += bend[:, k]
        hessian[:, j, i] += bend[:, k]
    convex = np.linalg.eigvalsh(hessian)[:, 0] > 0
    hessian[~convex] = np.eye(len(axes))
    at = -np.linalg.solve(hessian, slope[:, :, None])[:, :, 0]
    lowest = coefficients[:, 0] + 0.5 * (slope * at).sum(axis=1)
    lost = ~(convex & (at >= low).all(axis=1) & (at <= high).all(axis=1))
    if lost.any():
        knots = [np.linspace(a, b, KNOTS) for a, b in zip(low, high)]
        grid = np.stack([m.ravel() for m in np.meshgrid(*knots)], axis=1)
        lowest[lost] = (coefficients[lost] @ _design(grid, pairs).T).min(axis=1)
    return np.asarray(lowest - lowest[0])


def _design(x: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Columns 1, x_i and x_i x_j of a quadratic in the columns of x."""
    return np.column_stack([np.ones(len(x)), x, *(x[:, i] * x[:, j] for i, j in pairs)])


def _tuned_runs(places: Sequence[_Place]) -> pd.DataFrame:
    """The tuned loss of each (N, D): of several places there (batch sizes), the lowest."""
    rows = pd.DataFrame(
        {
            "N": [p.N for p in places],
            "D": [float(p.group["D"]) for p in places],
            "C": [p.C for p in places],
            "loss": [float(p.tuned_loss[0]) for p in places],
        }
    )
    return rows.loc[rows.groupby(["N", "D"])["loss"].idxmin()].reset_index(drop=True)


def _worth(p: _Place, compute: Estimate, size: SizeMultiplier, level: float) -> Worth:
    gain, share = p.default_loss - p.tuned_loss, 100.0 * (1.0 - p.tuned_loss / p.default_loss)
    return Worth(
        group=p.group,
        default=p.default,
        tuned=p.tuned,
        way=p.way,
        default_loss=float(p.default_loss[0]),
        tuned_loss=_estimate(p.tuned_loss, level),
        gain=_estimate(gain, level),
        percent=_estimate(share, level),
        compute=compute,
        size=size,
        at_least=p.at_least,
    )


def _estimate(values: np.ndarray, level: float) -> Estimate:
    return Estimate(value=float(values[0]), interval=interval(values[1:], level))


def _said(places: Sequence[_Place], lost: Iterable[str], axes: Sequence[str]) -> list[Verdict]:
    verdicts = []
    lost = list(lost)
    if lost:
        listed = "; ".join(f"{lost.count(reason)}: {reason}" for reason in dict.fromkeys(lost))
        severity: Any = "info" if places else "refuse"
        message = (
            f"{plural(len(lost), 'place')} cannot be held against the default ({listed}). Run the default's "
            f"{' and '.join(axes)} there, within a factor of {WITHIN:g}."
        )
        verdicts.append(Verdict("default_not_run", severity, "fit", None, message, {"places": len(lost)}))
    chosen = [p for p in places if p.way != "curve"]
    if chosen:
        edge = sum(p.at_least for p in chosen)
        message = (
            f"at {len(chosen)} of {plural(len(places), 'place')} no curve through the settings has a minimum, so the "
            "best one tried stands for the tuned one, its loss raised by the luck of the best of several"
            + (f"; at {edge} it is the last one tried, and tuning is worth more." if edge else ".")
        )
        verdicts.append(Verdict("selected_best", "caution", "fit", None, message, {"places": len(chosen)}))
    gains = [interval(p.default_loss[1:] - p.tuned_loss[1:])[0] for p in places]
    silent = sum(not low > 0 for low in gains)
    if silent:
        message = f"at {silent} of {plural(len(places), 'place')} the gain cannot be told from noise."
        verdicts.append(Verdict("not_told_apart", "info", "fit", None, message, {"places": silent}))
    return verdicts
