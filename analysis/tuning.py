"""What tuning is worth: the tuned loss against the default's at each size, as a gain, as compute, as a larger model.

The tuned loss is that of the curve through a sweep (`optima`), or where there is none of the best setting; both sides
and their noise are found in `gains`, and what a gain is worth by the law of the tuned runs in `multipliers`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.gains import (
    AXES,
    WITHIN,
    Default,
    Place,
    curves_swept,
    gain_at,
    noise_of,
    one_length,
    settings_swept,
    tuned_axes,
    usable,
    varied_settings,
)
from analysis.multipliers import NO_SIZE, SizeMultiplier, compute_multiplier, far_below, size_multiplier, tuned_frontier
from analysis.sensitivities import Sensitivity, sensitivity
from analysis.swept import ALWAYS
from analysis.uncertainty import interval
from analysis.verdicts import NOTHING, Estimate, Fit, Verdict, clean, refused
from sweeps.units import human, plural


def tuning_worth(
    runs: pd.DataFrame,
    *,
    default: Default | None = None,
    sweep: Sensitivity | None = None,
    noise: float | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> "TuningWorth":
    """What choosing hyperparameters gains over a default, at each (family, parametrisation, N, D) where both are known.

    runs: a run table with N, D, the hyperparameters that vary, and losses (nats), as for `sensitivity`.
    default: the recipe that is not tuned, by hyperparameter: a number, a word, a rule of a study, or a function of
        a place's N, D and C; the runs nearest to it, within a factor of `WITHIN`, stand for it. Without it the
        study's own: the runs whose `is_default` is true, which name all that vary but those in which they differ at
        one place. A hyperparameter that varies and is not named is tuned on neither side: each of its values is a place
        of its own. One that only follows the rate or the batch goes with it.
    sweep: what `sensitivity` found of these runs; it is asked where that is not given, or is over other axes.
    noise: standard deviation of ln loss between seeds; by default measured. resamples, level, seed: of the intervals.

    Returns a TuningWorth, with verdicts on what could not be told. Raises InputError for a missing column, a default
    that is no positive number or no hyperparameter that varies.
    """
    table = usable(runs)
    varied = varied_settings(table)
    axes = tuned_axes(varied, default, table)
    apart = [c for c in varied if c not in axes]
    if not axes:
        message = (
            f"the study's own default was run at several values of {' and '.join(apart)}, so nothing says which is it. "
            f'Name it, such as default={{"{apart[0]}": ...}}.'
            if apart
            else "no hyperparameter varies at equal N and D, so there is nothing tuned to hold the default against. "
            "Vary the learning rate at some sizes: five values a factor 2 apart."
        )
        return TuningWorth(verdicts=(Verdict("optimum_unmeasured", "refuse", "fit", None, message),), level=level)

    # 1. the sweeps, and the noise between seeds
    verdicts: list[Verdict] = []
    if set(axes) <= set(AXES):
        if sweep is None or any(one.axes != axes for one in sweep.optima):
            sweep = sensitivity(runs, axes=axes, noise=noise, resamples=100, level=level, seed=seed)
        known = sweep.noise
        sweeps = curves_swept(table, sweep.optima)
        moving = [v for v in sweep.verdicts if v.code == "moving_settings"]  # those of a search are tuned along
        verdicts += [v for v in moving if not set(apart).isdisjoint(v.evidence["settings"])]
    else:
        sweeps, known = settings_swept(table, axes, apart), {}
        if not sweeps:
            message = (
                f"no runs differ in {' or '.join(axes)} alone: {' and '.join(apart) or 'the shape'} moves along. Cross "
                "them, or name in the default all that moves."
            )
            verdicts.append(Verdict("optimum_unmeasured", "refuse", "fit", None, message))
    spread = noise_of(known, noise, runs)
    if not spread.sd > 0:
        message = "no seeds are replicated and no curve tells the noise, so there are no intervals. Add seeds."
        verdicts.append(Verdict("noise_unknown", "caution", "fit", None, message))

    # 2. the gain at each place
    generator = np.random.default_rng(seed)
    places, lost = [], []
    for one in sweeps:
        place = gain_at(one, axes, default, spread, resamples, generator)
        places.append(place) if isinstance(place, Place) else lost.append(place)
    verdicts += _said(places, lost, axes, level, spread.sd > 0)
    if not places:
        return TuningWorth(axes=axes, verdicts=tuple(verdicts), noise=spread.to_json(), level=level)

    # 3. what that is in compute and in size, through the law of the tuned runs of each kind
    worths, laws = [], {}
    kinds = _kinds(places)
    for kind in dict.fromkeys(kinds):
        own = [p for p, its in zip(places, kinds) if its == kind]
        frontier = tuned_frontier(_tuned_runs(own), level, seed, _noise_of_tuned(own))
        laws[kind] = frontier.law
        name = f"{kind}: " if len(set(kinds)) > 1 else ""
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
    default: Mapping[str, float | str]
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

    @property
    def noise_known(self) -> bool:
        """Whether there is anything to tell the gain apart from: seeds, or a curve that the runs scatter about."""
        return bool(np.isfinite(self.gain.interval).any())

    def __str__(self) -> str:
        """One sentence: "tuning at 1M parameters on 20M tokens is worth 2.10% of the loss (1.90 to 2.30)"."""
        start = f"tuning at {self.place}"
        if not self.noise_known:
            return f"{start} gains {self.percent.value:.2f}% of the loss, if that is no noise, which nothing tells"
        if not self.told_apart:
            return f"{start} gains nothing that can be told from noise ({self.percent.value:.2f}% of the loss)"
        return f"{start} is worth {self.gained}"

    @property
    def place(self) -> str:
        """Where it is: "10k parameters on 82k tokens"."""
        N, D = (human(float(self.group[v])) for v in ("N", "D"))
        return f"{N} parameters on {D} tokens"

    @property
    def gained(self) -> str:
        """The gain in loss, compute and size, as far as each is known, with intervals."""
        more = "at least " if self.at_least else ""
        parts = [f"{more}{self.percent.value:.2f}% of the loss{_range(self.percent, '{:.2f}')}"]
        if np.isfinite(self.compute.value):
            parts.append(f"{self.compute.value:.3g} times the compute{_range(self.compute, '{:.3g}')}")
        if np.isfinite(self.size.estimate.value):
            sign = "more than " if self.size.bounded else ""
            parts.append(f"a {sign}{self.size.estimate.value:.3g}x larger model{_range(self.size.estimate, '{:.3g}')}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k != "size"}
        size = self.size.estimate.to_json() | {"bounded": self.size.bounded}
        found: dict[str, Any] = clean(own | {"size": size, "told_apart": self.told_apart})
        return found


def _range(estimate: Estimate, form: str) -> str:
    low, high = estimate.interval
    if np.isfinite([low, high]).all():
        return f" ({form.format(low)} to {form.format(high)})"
    return f" (above {form.format(low)})" if np.isfinite(low) else ""


@dataclass(frozen=True, kw_only=True)
class TuningWorth:
    """What tuning `axes` is worth at every place, or why it is not known: look at `refused` and `verdicts` first.

    laws: by family (and parametrisation, and text), the law of the tuned runs that the compute multipliers run along,
    or None.
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
        return "\n".join(f"{name}: {worth}" if name else str(worth) for name, worth in zip(self.names, self.worths))

    @property
    def names(self) -> list[str]:
        """What each place is called beside N and D: "llama mup, weight decay 0.1", empty where nothing else differs."""
        kinds = _kinds(self.worths)
        several = len(set(kinds)) > 1
        settings = [k for k in self.labels if k not in ALWAYS]
        names = []
        for kind, worth in zip(kinds, self.worths):
            own = [f"{k.replace('_', ' ')} {_plain(worth.group[k])}" for k in settings if k in worth.group]
            names.append(", ".join([*([kind] if several else []), *own]))
        return names

    @property
    def labels(self) -> list[str]:
        """What tells places apart beside N and D: recipes and texts that differ, settings that do at one N and D."""
        places: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for w in self.worths:
            places.setdefault((human(float(w.group["N"])), human(float(w.group["D"]))), []).append(w.group)
        keys = dict.fromkeys(k for w in self.worths for k in w.group if k not in ("N", "D"))
        everywhere = [[w.group for w in self.worths]]
        return [
            k
            for k in keys
            if any(len({g.get(k) for g in own}) > 1 for own in (everywhere if k in ALWAYS else places.values()))
        ]

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


# --- the law of the tuned runs, and what is said ---------------------------------------------------------------


def _kinds(places: Sequence[Place] | Sequence[Worth]) -> list[str]:
    """What the law of each place is for: a family in one parametrisation, on one text where there are several."""
    own = ("family", "parametrisation")
    names = [c for c in ALWAYS if c in own or len({p.group.get(c) for p in places}) > 1]
    return [" ".join(_plain(p.group[c]) for c in names if c in p.group) for p in places]


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tuned_runs(places: Sequence[Place]) -> pd.DataFrame:
    """The tuned loss of each (N, D): of several places there (batch sizes, which round D), the lowest."""
    rows = pd.DataFrame(
        {
            "N": [p.N for p in places],
            "D": [float(p.group["D"]) for p in places],
            "C": [p.C for p in places],
            "loss": [float(p.tuned_loss[0]) for p in places],
        }
    )
    return rows.loc[rows.groupby(["N", one_length(rows)])["loss"].idxmin()].reset_index(drop=True)


def _noise_of_tuned(places: Sequence[Place]) -> float | None:
    """Standard deviation of the tuned ln losses, None where no noise is known."""
    variance = float(np.mean([np.log(p.tuned_loss).var() if len(p.tuned_loss) > 1 else 0.0 for p in places]))
    return float(np.sqrt(variance)) if variance > 0 else None


def _worth(p: Place, compute: Estimate, size: SizeMultiplier, level: float) -> Worth:
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


def _said(
    places: Sequence[Place], lost: Iterable[str], axes: Sequence[str], level: float, known: bool
) -> list[Verdict]:
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
    gains = [interval(p.default_loss[1:] - p.tuned_loss[1:], level)[0] for p in places]
    silent = sum(not low > 0 for low in gains) if known else 0  # else nothing tells it, which is said
    if silent:
        message = f"at {silent} of {plural(len(places), 'place')} the gain cannot be told from noise."
        verdicts.append(Verdict("not_told_apart", "info", "fit", None, message, {"places": silent}))
    return verdicts
