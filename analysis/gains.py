"""The tuned and the default loss at one place, with noisy copies of both that share the noise of one sweep.

The failure it guards against is the winner's curse: the minimum of k noisy losses, and to a lesser degree the lowest
point of a curve through them, is too low by luck, and a default judged against it is always worth tuning. Both are
raised by the luck that noise of this size gives them, as the bootstrap finds it. The default's run is a point of the
same sweep, so its noise is that of the curve through it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.optima import Optimum
from analysis.quadratics import lowest_point, quadratic_columns
from analysis.selection import with_states
from analysis.swept import ALWAYS, SHAPES
from analysis.uncertainty import BETAS, SETTINGS, UNKNOWN, Noise, alike, merged, seed_noise
from analysis.verdicts import NAN, Estimate
from sweeps.errors import InputError, nearest
from sweeps.rules import PowerRule, evaluate

AXES = ("learning_rate", "batch_tokens")
"""Hyperparameters whose sweeps have curves; of others the best setting stands for the tuned one."""
TUNABLE = tuple(c for c in SETTINGS if c not in ALWAYS)
"""What can be tuned: not the parametrisation, of which each has rates of its own."""
WITHIN = 1.5
"""A run's setting is the default's where it is this near to it, as a factor."""
SAME_PLACE = 0.02
"""Two ln D this close are one token count: batch sizes round it."""
KNOTS = 41
"""Points along each axis at which a curve without a minimum is searched for its lowest value."""

Default = Mapping[str, float | str | PowerRule | Callable[[Mapping[str, float]], float]]


# --- what was run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The settings tried at one place: `points` holds the axes, `loss` (mean over seeds), `count`, `fitted`.

    rows: the place's runs.
    """

    group: Mapping[str, Any]
    points: pd.DataFrame
    rows: pd.DataFrame
    optimum: Optimum | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place with both sides known; losses in nats, (1 + copies,), the point estimate first."""

    group: Mapping[str, Any]
    C: float
    default: Mapping[str, float | str]
    tuned: Mapping[str, Estimate]
    way: str
    tuned_loss: np.ndarray
    default_loss: np.ndarray
    at_least: bool

    @property
    def N(self) -> float:
        return float(self.group["N"])


def usable(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a size, tokens and a loss, which is named `loss`; C is 6 N D where the table has none."""
    name = next((c for c in ("val_loss_final", "loss") if c in runs.columns), None)
    missing = [c for c in ("N", "D") if c not in runs.columns] + ([] if name else ["loss"])
    if missing:
        raise InputError(
            f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, runs.columns))}. Read a file of your "
            "own with analysis.read_table, which finds common names."
        )
    runs = with_states(runs)
    table = runs[runs["excluded"].isna()] if "excluded" in runs.columns else runs
    if "rung" in table.columns:
        table = table[~(table["rung"].astype(float) < 1.0)]  # an early rung of a search is no run of full length
    table = table.assign(loss=table[name].astype(float))
    table = table[(table[["N", "D", "loss"]].astype(float) > 0).all(axis=1) & np.isfinite(table["loss"])]
    if "C" not in table.columns:
        table = table.assign(C=6.0 * table["N"] * table["D"])
    written = [c for c in TUNABLE if c in table.columns and pd.api.types.is_numeric_dtype(table[c])]
    return table.assign(**alike(table, written)).reset_index(drop=True)


def _keys(table: pd.DataFrame, apart: Iterable[str] = ()) -> list[Any]:
    """What names a place: all that runs must share, N, D as far as batch sizes do not round it, and the settings
    `apart`, numbers as far as they are more than rounding apart."""
    settings = alike(table, list(apart))
    places = (*(table[c] for c in ALWAYS if c in table.columns), table["N"], one_length(table))
    return [*places, *(settings[c] for c in settings)]


def one_length(table: pd.DataFrame) -> "pd.Series[float]":
    """D with the counts made equal that batches round apart at one N. By the least of them, since lengths a little
    apart would else form a chain from the shortest to the longest."""
    return table["D"].astype(float).groupby(table["N"]).transform(lambda D: merged(D.to_numpy(), SAME_PLACE))


def varied_settings(table: pd.DataFrame) -> list[str]:
    """The hyperparameters that take several values at one place, in the order of `TUNABLE`.

    Not those that only follow the learning rate or the batch, as warm-up does its D or decay its rate; in a search,
    where no two settings share a rate, that cannot be seen.
    """
    searched = "search" in table.columns and table["search"].notna().any()
    leaders = [] if searched else [c for c in AXES if c in table.columns]
    followed = [*_keys(table), *(table[c] for c in leaders)]
    return [
        c
        for c in TUNABLE
        if c in table.columns and len(table) and _spread(table, c, _keys(table) if c in AXES else followed)
    ]


def _spread(table: pd.DataFrame, column: str, keys: list[Any]) -> bool:
    """Whether a column differs within any group, as a number by more than rounding."""
    numeric = pd.api.types.is_numeric_dtype(table[column])
    groups = table.assign(_at=_compared(column, table[column]) if numeric else table[column]).groupby(
        keys, dropna=False
    )
    if not numeric:
        return bool((groups["_at"].nunique() > 1).any())
    return bool((groups["_at"].max() > groups["_at"].min() * (1.0 + SAME_PLACE)).any())


def _compared(name: str, values: Any) -> Any:
    """What ratios of a setting are taken of."""
    return 1.0 - values if name in BETAS else values


def tuned_axes(varied: Sequence[str], default: Default | None, table: pd.DataFrame) -> tuple[str, ...]:
    """The hyperparameters that are tuned: those that vary and that the default names, in the order of `TUNABLE`.

    Without a default those on which the study's own runs of it agree: one that was varied by values, beside another in
    multiples, has a default at each of them. Empty where they agree on none.
    """
    if default is None:
        marks = table["is_default"] if "is_default" in table.columns else pd.Series(False, table.index)
        own = marks.eq(True).to_numpy(dtype=bool, na_value=False)
        if varied and not own.any():
            raise InputError(
                f"{', '.join(varied)} vary, and nothing says which value is the default; name it, such as "
                f'default={{"{varied[0]}": ...}}.'
            )
        apart: list[str] = []
        for axis in sorted(varied, key=lambda c: c != "batch_tokens"):  # first, since rules of the others follow it
            if _spread(table[own], axis, [key[own] for key in _keys(table, apart)]):
                apart.append(axis)
        return tuple(c for c in varied if c not in apart)
    if "parametrisation" in default:
        raise InputError(
            "the parametrisation is not tuned: each has its own rates, so each has places of its own. Name the default "
            "of another hyperparameter, such as the learning rate."
        )
    unknown = [k for k in default if k not in TUNABLE]
    if unknown:
        raise InputError(
            f"a default of {unknown[0]!r} is not known{nearest(unknown[0], TUNABLE)}: {', '.join(TUNABLE)}."
        )
    constant = [k for k in default if k not in varied]
    if constant and varied:
        raise InputError(f"{', '.join(constant)} does not vary in these runs; {', '.join(varied)} does.")
    return tuple(c for c in varied if c in default)


def settings_swept(table: pd.DataFrame, axes: tuple[str, ...], apart: Sequence[str]) -> list[Sweep]:
    """Sweeps over hyperparameters of which no curve is known: the settings and their mean losses.

    apart: the settings that vary and are not tuned; runs that differ in them, or in shape, are no seeds of each other.
    """
    shapes = [c for c in SHAPES if c in table.columns and _spread(table, c, _keys(table))]
    names = [*(c for c in ALWAYS if c in table.columns), "N", "D", *apart, *shapes]
    sweeps = []
    keys = _keys(table, [*apart, *shapes])
    for _, rows in table.assign(_y=np.log(table["loss"])).groupby(keys, dropna=False):
        points = rows.groupby(list(axes), dropna=False)["_y"].agg(["mean", "count"]).reset_index()
        points = points.assign(loss=np.exp(points["mean"]), fitted=False)
        values = {c: _middle(rows[c]) for c in names}
        if len(points) > 1:
            group = {c: value for c, value in values.items() if not pd.isna(value)}
            sweeps.append(Sweep(group=group, points=points, rows=rows))
    return sweeps


def curves_swept(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[Sweep]:
    """Sweeps through which curves are known, each with the runs of the table that are equal to it in what names it."""
    names = dict.fromkeys(name for one in optima for name in one.group if name in table.columns)
    sweeps = []
    for one in optima:
        near = np.log(table["D"] / one.group["D"]).abs() <= SAME_PLACE
        for name in (n for n in names if n != "D"):
            column, value = table[name], one.group.get(name)  # a group names no setting that is blank in its runs
            if value is None:
                near = near & column.isna()
            elif is_number(value) and value:
                near = near & ((_compared(name, column) / _compared(name, value) - 1).abs() <= SAME_PLACE)
            else:
                near = near & (column == value)
        sweeps.append(Sweep(group=one.group, points=one.points, rows=table[near], optimum=one))
    return sweeps


def _middle(column: pd.Series) -> Any:
    """The value of a column whose numbers are equal but for rounding, whatever the order of its rows."""
    return float(column.median()) if pd.api.types.is_numeric_dtype(column) else column.iloc[0]


def noise_of(known: Mapping[str, Any], given: float | None, runs: pd.DataFrame) -> Noise:
    """The noise of ln loss between equal runs: as `given` (a standard deviation), else as a fit's JSON told it
    (`known`, with sd, freedom and source), else between the seeds of the runs."""
    if given is not None:
        return Noise(sd=given, freedom=np.inf, source="given")
    if not known:
        return seed_noise(runs, "val_loss_final" if "val_loss_final" in runs.columns else "loss") or UNKNOWN
    sd, freedom = known.get("sd"), known.get("freedom")
    source = known.get("source", "unknown")
    return Noise(sd=NAN if sd is None else float(sd), freedom=np.inf if freedom is None else freedom, source=source)


# --- the gain ----------------------------------------------------------------------------------------------------


def gain_at(
    sweep: Sweep,
    axes: tuple[str, ...],
    default: Default | None,
    noise: Noise,
    resamples: int,
    generator: np.random.Generator,
) -> "Place | str":
    """Both sides at one place, or why not."""
    rows = sweep.rows
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
        errors -= errors.mean(axis=0)  # else the chance of finitely many copies is taken for a gain
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
        again = shrunk + errors
        luck = float((again.min(axis=1) - again[:, own]).mean() - (shrunk.min() - shrunk[own])) if len(errors) else 0.0
        best = points.iloc[kept[int(y.argmin())]]
        tuned = {axis: Estimate(value=float(best[axis])) for axis in axes if is_number(best[axis])}
    # the lowest of noisy losses, and the lowest point of a noisy curve, lie too low by what noise lowers them again;
    # all as differences to the default, so that one that is the best setting in every copy gains 0 to the last digit
    own_copies = np.concatenate([[y[own]], y[own] + errors[:, own]])
    below = copies - own_copies
    if len(errors):
        below[1:] += below[0] - below[1:].mean()
    below -= luck
    return Place(
        group=sweep.group,
        C=C,
        default={axis: points[axis].iloc[at] for axis in axes},
        tuned=tuned,
        way="curve" if curve else "best setting",
        tuned_loss=np.exp(own_copies + below),
        default_loss=np.exp(own_copies),
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
        wanted = {axis: _middle(own[axis]) for axis in axes}
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
        if is_number(value):
            if not 0 < value < np.inf:
                raise InputError(f"the default's {axis} is {value!r}; it must be a positive number.")
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = _compared(axis, points[axis].to_numpy(dtype=float)) / _compared(axis, float(value))
                apart = np.abs(np.log(ratio))
            away = np.maximum(away, np.where(np.isnan(apart), np.inf, apart))  # a blank is near to nothing, and 0 too
        else:
            away = np.where(points[axis] == value, away, np.inf)
    best = int(np.argmin(away))
    if not away[best] <= np.log(WITHIN):
        return "no run is near the default"
    return best


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number, and no word such as a schedule's."""
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
    root = np.sqrt(points.loc[fitted, "count"].to_numpy(dtype=float))
    values = np.vstack([y[fitted], y[fitted] + errors[:, fitted]])
    curves = values @ (np.linalg.pinv(quadratic_columns(x) * root[:, None]) * root).T
    at, _, lowest, convex = lowest_point(curves, len(axes))
    lost = ~(convex & (at >= low).all(axis=1) & (at <= high).all(axis=1))
    if lost.any():
        knots = [np.linspace(a, b, KNOTS) for a, b in zip(low, high)]
        grid = np.stack([m.ravel() for m in np.meshgrid(*knots)], axis=1)
        lowest[lost] = (curves[lost] @ quadratic_columns(grid).T).min(axis=1)
    return np.asarray(lowest - lowest[0])
