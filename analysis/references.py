"""What a study's hyperparameters are held against: where the loss was measured to be lowest, and how fast it rises.

In this order: the study's own sweeps; the newest optima that another study of the same store wrote for the same
corpus, tokenizer, context, family and parametrisation; else nothing. A published rule is shown beside them and judges
nothing: it was fitted on other text, batches and schedules. The failure it guards against: a rule of billions of
parameters taken for the truth about models of a million, or the optimum of one batch and schedule for that of another.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri

from analysis.optima import Optimum
from analysis.optimum_laws import OptimumLaw
from analysis.sensitivities import Sensitivity
from analysis.verdicts import NAN, Estimate, Interval
from sweeps.errors import InputError
from sweeps.records import read_json
from sweeps.store import Store, study_names

NEAR = 0.02
"""ln N and ln D this close are one place."""
TOO_FAR = 10.0
"""Factor in N or D beyond the optima behind a law from which it says nothing."""
BEYOND = 1.5
"""The same from which it extrapolates, which is said."""
SLACK = 0.1
"""ln (value / best) by which the measured range may be overstepped before a penalty is called a lower bound."""
APART = 1.5
"""Factor between batches from which the best rate of one says nothing of the other, where no power of it is known."""
BIN = 0.35
"""Width in ln (value / best) over which places are pooled: half a step of a factor-2 grid."""
UNSURE = 0.35
"""Standard deviation of ln curvature where fewer than three optima tell it: a factor of 2 either way."""
OWN = "its own sweep"
"""The source whose cells are the lowest of the very grids that the optima were found on."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The best value of one hyperparameter over (N, D), and what it costs to be off it.

    source: who measured it, for people. family, parametrisation: of which models; None where the table has none.
    places: optima measured, each (N, D, batch_tokens, ln best, standard deviation, ln curvature); a batch of NaN is
        any. A place goes before the law.
    log_value, powers: ln best at the point `at` and the exponents in N, D and batch_tokens, each (value, standard
        deviation); log_value is NaN where no law could be fitted. range: of the optima behind it.
    curvature: ln of d^2 ln loss / d (ln value)^2 and its standard deviation between places; NaN where not measured.
    fitted: the smallest and the largest ln (value / best) that the quadratics were fitted to.
    flanks: (ln (value / best), excess of ln loss) beyond those, ascending, pooled over places: how the loss was seen
        to rise where it is no quadratic any more; the ends are as far as anything was measured.
    """

    hyperparameter: str
    source: str
    family: str | None
    parametrisation: str | None = None
    places: tuple[tuple[float, ...], ...] = ()
    log_value: tuple[float, float] = (NAN, NAN)
    at: Mapping[str, float]
    powers: Mapping[str, tuple[float, float]]
    range: Mapping[str, Interval]
    curvature: tuple[float, float] = (NAN, NAN)
    fitted: Interval = (NAN, NAN)
    flanks: tuple[tuple[float, float], ...] = ()
    noise: float = NAN
    """Standard deviation of ln loss between equal runs where the optima were measured."""
    step: float = 0.0
    """ln of one step of the grids that the places were swept on, where the cells are the lowest of these grids; else 0.
    Such a cell is never nearer to the optimum than its grid lets it be, and by luck the neighbour on the other side."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """What was constant there: schedule, optimizer, batch_tokens ...; empty for a study's own sweep."""

    def apart(self, rows: pd.DataFrame) -> dict[str, np.ndarray]:
        """Which rows were trained by another recipe than the optima: what differs, in words -> (n,)."""
        found: dict[str, np.ndarray] = {}
        for name in ("schedule", "optimizer"):
            if self.recipe.get(name) is not None and name in rows.columns:
                found[f"{name} {self.recipe[name]}"] = (
                    rows[name].notna() & (rows[name] != self.recipe[name])
                ).to_numpy()
        batch = self.recipe.get("batch_tokens")
        if batch is not None and "batch_tokens" in rows.columns and "batch_tokens" not in self.powers:
            away = np.abs(np.log(rows["batch_tokens"].to_numpy(dtype=float) / float(batch)))
            found[f"a batch of {batch:,.0f} tokens"] = away > math.log(APART)
        return {words: rows for words, rows in found.items() if rows.any()}

    def penalty(self, z: np.ndarray, cells: pd.DataFrame) -> np.ndarray:
        """ln loss lost at z = ln (value / best) of each cell, (..., n).

        1/2 curvature z^2 where quadratics were fitted, with the curvature of the very place where it was measured;
        outside as the flanks tell. Beyond everything measured it is the loss at that end, which is the least it can
        be. NaN where no curvature was measured.
        """
        curvature = np.full(len(cells), self.curvature[0])
        for place, here in zip(self.places, self._at(cells)):
            curvature[here] = place[5]
        inner = 0.5 * np.exp(curvature) * np.clip(z, *self.fitted) ** 2
        if not self.flanks:
            return np.asarray(inner)
        low, high = self.fitted
        # nothing on top at the ends of what was fitted: else a value just beyond one took what lies half a step further
        x, y = np.array(sorted([*self.flanks, (low, 0.0), (high, 0.0)])).T
        return np.where((z < low) | (z > high), np.maximum(inner, np.interp(z, x, y)), inner)

    def beyond(self, z: np.ndarray) -> np.ndarray:
        """Whether the loss was not measured so far from the best: then a penalty is a lower bound."""
        low = min([self.fitted[0], *(x for x, _ in self.flanks[:1])])
        high = max([self.fitted[1], *(x for x, _ in self.flanks[-1:])])
        return np.asarray((z < low - SLACK) | (z > high + SLACK))

    def best(self, cells: pd.DataFrame, errors: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """ln best of each cell (N, D, batch_tokens), (n,), or its copies (copies, n) where errors are given.

        errors: in standard deviations, one column for each variable and for "value" (copies, 1), shared by all cells,
        and "place" (copies, n). NaN where nothing is known.
        """
        own = errors or {}
        found = self.log_value[0] + np.nan_to_num(self.log_value[1]) * own.get("value", 0.0) + np.zeros(len(cells))
        for name, (power, sd) in self.powers.items():
            x = cells[name].to_numpy(dtype=float)
            found = found + (power + np.nan_to_num(sd) * own.get(name, 0.0)) * np.log(x / self.at[name])
        for name, (low, high) in self.range.items():
            x = cells[name].to_numpy(dtype=float)
            found = np.where((x < low / TOO_FAR) | (x > high * TOO_FAR), NAN, found)
        for place, here in zip(self.places, self._at(cells)):
            found = np.where(here, place[3] + np.nan_to_num(place[4]) * own.get("place", 0.0), found)
        return np.asarray(found)

    def _at(self, cells: pd.DataFrame) -> list[np.ndarray]:
        """For each place, which cells stand at it, (n,)."""
        logs = np.log(cells[["N", "D", "batch_tokens"]].to_numpy(dtype=float))
        found = []
        for place in self.places:
            away = np.abs(logs - np.log(place[:3]))
            found.append((away[:, :2] < NEAR).all(axis=1) & ((away[:, 2] < NEAR) | np.isnan(place[2])))
        return found

    def measured(self, cells: pd.DataFrame) -> np.ndarray:
        """Whether the optimum was measured at these very places, (n,)."""
        return np.any([np.zeros(len(cells), dtype=bool), *self._at(cells)], axis=0)

    def outside(self, cells: pd.DataFrame) -> np.ndarray:
        """Whether the law is asked beyond the optima behind it, (n,)."""
        out = np.zeros(len(cells), dtype=bool)
        for name, (low, high) in self.range.items():
            x = cells[name].to_numpy(dtype=float)
            out |= (x < low / BEYOND) | (x > high * BEYOND)
        return out & ~self.measured(cells)


def from_sweep(
    found: Sensitivity, family: str | None, parametrisation: str | None = None, source: str = OWN
) -> dict[str, Reference]:
    """References by hyperparameter, from the optima and laws that `sensitivity` found for one family."""

    def same(one: Optimum | OptimumLaw) -> bool:
        kinds = (
            one.group if isinstance(one, Optimum) else {"family": one.family, "parametrisation": one.parametrisation}
        )
        wanted = (("family", family), ("parametrisation", parametrisation))
        return not one.refused and all(None in (v, kinds.get(k)) or kinds[k] == v for k, v in wanted)

    references = {}
    optima = [o for o in found.optima if same(o)]
    for axis in dict.fromkeys(a for o in optima for a in o.axes):
        law = next((law for law in found.laws.values() if law.hyperparameter == axis and same(law)), None)
        own = [o for o in optima if axis in o.axes]
        fitted, flanks = _shape([(o.points, math.log(o.best[axis].value), math.log(o.loss.value)) for o in own], axis)
        places = []
        for o in sorted(own, key=lambda o: -o.loss.value):  # of several at one place, the best comes last and counts
            N, D, batch = (float(o.group.get(k, NAN)) for k in ("N", "D", "batch_tokens"))
            bend = math.log(_bend(o, axis)) if _bend(o, axis) > 0 else NAN
            places.append((N, D, batch if axis != "batch_tokens" else NAN, *_log(o.best[axis], found.level), bend))
        references[axis] = Reference(
            hyperparameter=axis,
            source=source,
            family=family,
            parametrisation=parametrisation,
            places=tuple(places),
            log_value=_log(law.value, found.level) if law else (NAN, NAN),
            at=dict(law.at) if law else {},
            powers={k: _plain(v, found.level) for k, v in law.powers.items()} if law else {},
            range={k: (float(v[0]), float(v[1])) for k, v in law.range.items()} if law else {},
            curvature=_curvature([_bend(o, axis) for o in own]),
            fitted=fitted,
            flanks=flanks,
            noise=_number(found.noise.get("sd")),
            step=_step(own, axis) if source == OWN else 0.0,
        )
    return references


def from_store(
    store: Store,
    study: str,
    family: str,
    parametrisation: str | None,
    text: Mapping[str, Any],
    runs: pd.DataFrame | None = None,
) -> dict[str, Reference]:
    """References that other studies of the store wrote into fits/optimum.json: the one whose recipe most of the runs
    were trained by, of several the newest.

    text: the `corpus` (fingerprint), `tokenizer` and `context` that must agree. runs: what is held against them. A
    file that cannot be read raises InputError, which names it.
    """
    found: dict[str, tuple[tuple[int, str], Reference]] = {}
    for name in study_names(store):
        path = store.study(name) / "fits" / "optimum.json"
        if name == study or not path.exists():
            continue
        record = read_json(path)
        if any(record.get(k) != v for k, v in text.items()):
            continue
        written = str(record.get("written", ""))
        for law in record.get("laws", []):
            same = law.get("family") == family and (law.get("parametrisation") or "standard") == (
                parametrisation or "standard"
            )
            axis = str(law.get("hyperparameter"))
            if law.get("refused") or not same:
                continue
            try:
                one = _from_record(law, record, name)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{path} is not the record of fitted optima that it should be ({error!r}): run escala "
                    f"sensitivity {name} to write it again."
                ) from error
            apart = one.apart(runs).values() if runs is not None else ()
            rank = (-int(np.any(list(apart), axis=0).sum()) if apart else 0, written)
            if axis not in found or rank > found[axis][0]:
                found[axis] = rank, one
    return {axis: reference for axis, (_, reference) in found.items()}


def _from_record(law: Mapping[str, Any], record: Mapping[str, Any], study: str) -> Reference:
    """One law of optimum.json, with the curvature and the reach of the optima behind it."""
    axis, level = str(law["hyperparameter"]), float(record.get("level") or 0.95)
    optima: Sequence[Mapping[str, Any]] = record.get("optima", [])
    own = [o for o in optima if not o.get("refused") and axis in o.get("axes", ())]
    own = [o for o in own if o.get("group", {}).get("family", law["family"]) == law["family"]]
    kind = law.get("parametrisation") or "standard"
    own = [o for o in own if (o.get("group", {}).get("parametrisation") or "standard") == kind]
    intervals = law.get("intervals", {})
    bends = [o.get("curvature") if axis == "learning_rate" else o.get("bends", {}).get(axis) for o in own]
    curvatures = [float(bend) for bend in bends if bend is not None]
    if not curvatures and axis == "learning_rate" and law.get("curvature") is not None:
        curvatures = [float(law["curvature"])]
    points = [
        (pd.DataFrame(o["points"]), math.log(o["best"][axis]["value"]), math.log(o["loss"]["value"]))
        for o in own
        if o.get("points")
    ]
    fitted, flanks = _shape(points, axis)
    return Reference(
        hyperparameter=axis,
        source=f"study {study}",
        family=law["family"],
        parametrisation=law.get("parametrisation"),
        log_value=_log(Estimate(value=float(law["value"]), interval=_pair(intervals.get("value"))), level),
        at={k: float(v) for k, v in law["at"].items()},
        powers={
            k: _plain(Estimate(value=float(v), interval=_pair(intervals.get(k))), level)
            for k, v in law["powers"].items()
        },
        range={k: _pair(v) for k, v in law["range"].items()},
        curvature=_curvature(curvatures),
        fitted=fitted,
        flanks=flanks,
        noise=_number((record.get("noise") or {}).get("sd")),
        recipe=dict(law.get("recipe") or {}),
    )


def _step(optima: Sequence[Optimum], axis: str) -> float:
    """ln of the step between neighbouring values of an axis: the median of the grids' own medians."""
    grids = [np.unique(np.log(one.points.loc[one.points["count"] > 0, axis].astype(float))) for one in optima]
    return float(np.median([np.median(np.diff(grid)) for grid in grids]))


def _bend(one: Optimum, axis: str) -> float:
    """How the loss rises off the best value: of the rate at its batch, of the batch with the rate that suits it."""
    return one.curvature if axis == "learning_rate" else one.bend(axis)


def _number(value: Any) -> float:
    return NAN if value is None else float(value)


def _pair(bounds: Any) -> Interval:
    low, high = bounds if bounds is not None else (None, None)
    return _number(low), _number(high)


def _log(estimate: Estimate, level: float) -> tuple[float, float]:
    """ln of a positive estimate and its standard deviation, off its interval of that level; NaN where that is open."""
    low, high = estimate.interval
    known = np.isfinite([low, high]).all() and low > 0
    return math.log(estimate.value), (math.log(high / low) / _width(level) if known else NAN)


def _plain(estimate: Estimate, level: float) -> tuple[float, float]:
    return estimate.value, (estimate.interval[1] - estimate.interval[0]) / _width(level)


def _width(level: float) -> float:
    """Of an interval, in standard deviations."""
    return 2.0 * float(ndtri(0.5 + level / 2.0))


def _curvature(values: Sequence[float]) -> tuple[float, float]:
    """ln of the median curvature, and how far places differ in it."""
    logs = np.log([v for v in values if np.isfinite(v) and v > 0])
    if not len(logs):
        return NAN, NAN
    return float(np.median(logs)), float(np.std(logs, ddof=1)) if len(logs) >= 3 else UNSURE


def _shape(
    points: Sequence[tuple[pd.DataFrame, float, float]], axis: str
) -> tuple[Interval, tuple[tuple[float, float], ...]]:
    """The range of ln (value / best) that quadratics were fitted to, and the flanks beyond: (points, ln best, ln loss).

    Of several settings at one value (batch sizes), the best stands for it. The flanks are means over `BIN`, made to
    rise outwards; settings of which any run diverged are not measured.
    """
    inner, outer = [], []
    for frame, best, loss in points:
        if axis not in frame.columns:
            continue
        good = frame[np.isfinite(frame["loss"].astype(float))]
        good = good[good["diverged"] == 0] if "diverged" in good.columns else good
        low = good.assign(_z=np.log(good[axis].astype(float)) - best, _y=np.log(good["loss"].astype(float)) - loss)
        low = low.loc[low.groupby(axis)["_y"].idxmin()]
        fitted = low[low["fitted"].astype(bool)] if "fitted" in low.columns else low
        if len(fitted):
            inner.append((float(fitted["_z"].min()), float(fitted["_z"].max())))
        outer.append(low[["_z", "_y"]])
    if not inner:
        return (NAN, NAN), ()
    low_end, high_end = min(i[0] for i in inner), max(i[1] for i in inner)
    every = pd.concat(outer)
    every = every[(every["_z"] < low_end) | (every["_z"] > high_end)]
    means = every.groupby(np.floor(every["_z"].to_numpy() / BIN)).mean().to_numpy(dtype=float)
    left, right = means[means[:, 0] < 0], means[means[:, 0] > 0]
    left[:, 1] = np.maximum.accumulate(np.maximum(left[::-1, 1], 0.0))[::-1]
    right[:, 1] = np.maximum.accumulate(np.maximum(right[:, 1], 0.0))
    return (low_end, high_end), tuple((float(z), float(y)) for z, y in np.vstack([left, right]))
