"""Transfer: whether the best learning rate stays where it is when a model grows wider.

    for one in transfer(analysis.load_runs("mup-transfer")):
        one.parametrisation, one.slope          d log2(best rate) / d log2(width), with its interval

Under mup the interval should contain 0, under the standard parametrisation it should not (Yang et al. 2022,
2203.03466). Only widths of one depth, batch and length are compared: neither mup nor this claims anything of the
others. Guards against a transfer that was not tested: an optimum at the edge of the rates tried counts for nothing, and
an interval over a narrow span, or one that is so wide that it would hold anything, says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.optima import Optimum, find_optima
from analysis.optimum_laws import between_groups, weighted
from analysis.swept import swept_groups
from analysis.uncertainty import LAST_DIGITS, SAME, interval, merged
from analysis.verdicts import NOTHING, Estimate, Verdict, clean, refused
from sweeps.errors import InputError
from sweeps.units import plural

LEAST_WIDTHS = 3
SPAN = 8.0
"""Largest over smallest width from which on a slope is read without a caution."""
RATIO = 0.2
"""MLP widths over widths closer than this in logs are one ratio, rounded to whole heads or multiples of 64."""
WIDE = 0.5
"""Half an interval's width from which on it tells the two parametrisations apart no more: standard's slope is about
-.5 to -1."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """How the best rate of one family and parametrisation moves with width, or the refusal to say.

    group: what is equal in all widths: family, parametrisation, D, depth ..., and mlp_ratio (of MLP width to width)
        where there are several at a width. slope: d log2(rate) / d log2(width).
    optima: width, learning_rate, low, high (its interval), refused; one row per width.
    """

    group: Mapping[str, Any]
    optima: pd.DataFrame
    slope: Estimate = NOTHING
    verdicts: tuple[Verdict, ...] = field(default=())

    @property
    def parametrisation(self) -> str:
        return str(self.group.get("parametrisation", "standard"))

    @property
    def name(self) -> str:
        """The parametrisation, and the MLP ratio where there are several."""
        return self.parametrisation + (f", MLP ratio {self.group['mlp_ratio']:g}" if "mlp_ratio" in self.group else "")

    @property
    def refused(self) -> bool:
        return refused(self.verdicts)

    @property
    def moves(self) -> bool | None:
        """Whether the interval excludes 0; None where there is no interval."""
        low, high = self.slope.interval
        return None if self.refused or not np.isfinite([low, high]).all() else not low <= 0.0 <= high

    def to_json(self) -> dict[str, Any]:
        """As JSON values; NaN is null."""
        told = {"group": dict(self.group), "slope": self.slope, "moves": self.moves, "refused": self.refused}
        told |= {"optima": self.optima.to_dict("records"), "verdicts": list(self.verdicts)}
        return dict(clean(told))

    def __str__(self) -> str:
        if self.moves is None:
            return f"{self.name}: no answer; {self.verdicts[-1].message}"
        low, high = self.slope.interval
        return (
            f"{self.name}: the best rate goes as width^{self.slope.value:.2f} ({low:.2f} to {high:.2f}): it "
            f"{'moves' if self.moves else 'stays'}"
        )


def transfer(
    runs: pd.DataFrame, *, resamples: int = 1000, level: float = 0.95, seed: int = 0, noise: float | None = None
) -> list[Transfer]:
    """The slope of log2 best rate against log2 width for every family, parametrisation, depth and length of a table,
    and for every ratio of MLP width to width where widths have several. Models of one width that nothing tells apart
    are refused.

    runs: of `load_runs`: N, D, width, learning_rate, val_loss_final, and parametrisation, depth where they vary.
    noise: standard deviation of ln loss between equal runs; by default it is measured between seeds.
    The vertices are those of `analysis.optima`, the interval holds their noise and what they scatter about a line
    beyond it. Raises InputError where the table has no widths, or no usable run.
    """
    widths = runs["width"].astype(float) if "width" in runs.columns else pd.Series(np.nan, runs.index)
    known = ((widths > 0) & (widths < np.inf)).to_numpy()
    if not known.any():
        raise InputError("the table has no column width, along which a best learning rate could stay. Name one.")
    lost, runs = int((~known).sum()), runs[known]
    swept = swept_groups(runs, ("learning_rate",))
    found, _, _ = find_optima(swept.groups, swept.axes, resamples=resamples, level=level, seed=seed, noise=noise)
    kinds: dict[tuple[tuple[str, Any], ...], list[_Member]] = {}
    for one in found:
        shape = _shape(runs, one)
        kind = {k: v for k, v in one.group.items() if k not in ("N", "width", "mlp_width")}
        kind |= {"depth": shape["depth"]} if np.isfinite(shape.get("depth", np.nan)) else {}  # no NaN equals another
        member = _Member(shape["width"], shape.get("mlp_width", np.nan) / shape["width"], one)
        kinds.setdefault(tuple(kind.items()), []).append(member)
    lines = [
        _line(group, sorted(own, key=lambda one: one.width), level, seed)
        for kind, members in kinds.items()
        for group, own in _by_ratio(dict(kind), members)
    ]
    if lost:
        message = f"{plural(lost, 'run')} without a positive width left out."
        said = Verdict("excluded_runs", "info", "fit", None, message, {"runs": lost})
        lines = [replace(one, verdicts=(said, *one.verdicts)) for one in lines]
    return lines


class _Member(NamedTuple):
    """The optimum of one width, and how much wider its MLP is (NaN where that is not told)."""

    width: float
    ratio: float
    optimum: Optimum


def _shape(runs: pd.DataFrame, one: Optimum) -> dict[str, float]:
    """Width, depth and MLP width of a group: its own, or those of the runs of its N (as `merged` made it)."""
    above = np.log(runs["N"].astype(float) / one.group["N"])
    same = runs[(above > -LAST_DIGITS) & (above <= SAME)]
    names = [name for name in ("width", "depth", "mlp_width") if name in same.columns]
    for name in names:
        if name in one.group:
            same = same[np.abs(same[name].astype(float) / one.group[name] - 1.0) < LAST_DIGITS]
    return {name: float(same[name].iloc[0]) for name in names}


def _by_ratio(kind: dict[str, Any], members: Sequence[_Member]) -> list[tuple[dict[str, Any], list[_Member]]]:
    """The members as they are where each width is there once, since MLPs are rounded and their ratios differ a little;
    else by the ratio of MLP width to width."""
    ratios = merged(np.array([one.ratio for one in members]), RATIO)
    levels = np.unique(ratios)
    if len({one.width for one in members}) == len(members) or not np.isfinite(ratios).all() or len(levels) == 1:
        return [(kind, list(members))]
    return [
        (kind | {"mlp_ratio": float(f"{level:.3g}")}, [one for one, own in zip(members, ratios) if own == level])
        for level in levels
    ]


def _line(group: Mapping[str, Any], every: Sequence[_Member], level: float, seed: int) -> Transfer:
    rows = [_row(one.width, one.optimum) for one in every]
    optima = pd.DataFrame(rows)
    members = {one.width: one.optimum for one in every}
    if len(members) < len(every):
        message = (
            f"{plural(len(every), 'group')} of runs at {plural(len(members), 'width')}: models of one width differ in "
            "what the table does not tell, or in more than the width of their MLPs. Look at each kind by itself."
        )
        mixed = Verdict("mixed_recipes", "refuse", "fit", None, message, {"widths": [one.width for one in every]})
        return Transfer(group=group, optima=optima, verdicts=(mixed,))
    said = _judge(members)
    if refused(said):
        return Transfer(group=group, optima=optima, verdicts=tuple(said))
    kept = {width: one for width, one in members.items() if not one.refused}
    x = np.log2(list(kept))
    x = np.column_stack([np.ones(len(x)), x - x.mean()])
    y = np.log2([one.best["learning_rate"].value for one in kept.values()])
    copies = np.stack([one.draws["learning_rate"] for one in kept.values()], axis=1) / np.log(2.0)
    if not len(copies):
        message = (
            "no seeds are replicated and no residual freedom is left: the interval of the slope holds what the widths "
            "scatter about the line, and no noise of a run. Add seeds, or rates."
        )
        said.append(Verdict("noise_unknown", "caution", "fit", None, message))
        copies = np.tile(y, (1000, 1))
    between, weights, freedom = between_groups(x, y, copies.var(axis=0))
    generator = np.random.default_rng(seed)
    scale = np.sqrt(between * freedom / generator.chisquare(freedom, len(copies)))
    copies = copies + scale[:, None] * generator.standard_normal(copies.shape)
    slope = float(weighted(x, y[None], weights[None])[0, 1])
    low, high = interval(weighted(x, copies, np.tile(weights, (len(copies), 1)))[:, 1], level)
    if high - low > 2.0 * WIDE:
        message = (
            f"the interval of the slope is {high - low:.2f} wide: it would hold the slope of either parametrisation. "
            "Add seeds, or widths."
        )
        said.append(Verdict("open_interval", "caution", "fit", None, message, {"width": high - low}))
    return Transfer(group=group, optima=optima, slope=Estimate(value=slope, interval=(low, high)), verdicts=tuple(said))


def _row(width: float, one: Optimum) -> dict[str, Any]:
    best = one.best.get("learning_rate", NOTHING)
    row = {"width": int(width), "learning_rate": best.value, "low": best.interval[0], "high": best.interval[1]}
    return row | {"refused": one.refused}


def _judge(members: Mapping[float, Optimum]) -> list[Verdict]:
    """What the optima of these widths can bear, before a line is laid through them."""
    kept = [width for width, one in members.items() if not one.refused]
    said = []
    for width, one in members.items():
        why: Sequence[Verdict] = [v for v in one.verdicts if v.severity == "refuse"]
        said += [
            Verdict("no_optimum", "caution", "fit", f"{width:g}", f"width {width:g} does not enter: {v.message}")
            for v in why
        ]
    if len(kept) < LEAST_WIDTHS:
        message = (
            f"{plural(len(kept), 'width')} of {len(members)} with an optimum inside the rates tried; a slope with an "
            f"interval needs {LEAST_WIDTHS}. Train more widths, or at other rates."
        )
        return [*said, Verdict("too_few_levels", "refuse", "fit", None, message, {"widths": kept})]
    span = max(kept) / min(kept)
    if span < SPAN:
        message = f"the widths span a factor of {span:.3g}: with less than {SPAN:g}, little of a slope shows."
        said.append(Verdict("narrow_span", "caution", "fit", None, message, {"span": span}))
    return said
