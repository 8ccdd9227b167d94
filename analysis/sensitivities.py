"""How much the learning rate matters, and how its optimum moves with size and tokens.

    found = sensitivity(analysis.load_runs("lr-sensitivity"))
    found.optima                      one per (family, N, D): optimum, plateau, sensitivity, verdicts
    found.laws["llama/learning_rate"] the power law through them

Guards against comparing sensitivities over different ranges: the figure of Wortsman et al. depends on where the sweep
stops, so all groups share one absolute range, or have none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from analysis.optima import Optimum, find_optima
from analysis.optimum_laws import OptimumLaw, near_best_laws, optimum_laws
from analysis.resampling import dependent_runs, trunk_labels
from analysis.swept import Group, swept_groups
from analysis.uncertainty import Noise, exclusions, interval
from analysis.verdicts import NOTHING, OPEN, Estimate, Interval, Verdict, clean
from sweeps.errors import InputError, nearest
from sweeps.records import timestamp, write_json
from sweeps.store import Store

Method = Literal["quadratic", "near-best"]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The optima of all groups and the laws through them. Look at `refused` and the verdicts before the numbers.

    range: the absolute learning rates that every group covers, over which sensitivities are taken.
    noise: the scale of ln loss between equal runs, and where it comes from. left_out: reason -> cells.
    runs, diverged: how many entered, and how many of them diverged or were taken for it.
    """

    optima: tuple[Optimum, ...]
    laws: Mapping[str, OptimumLaw]
    noise: Mapping[str, Any]
    verdicts: tuple[Verdict, ...]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    range: Interval = OPEN
    eps: float = 0.01
    level: float = 0.95
    method: str = "quadratic"
    runs: int = 0
    diverged: int = 0

    @property
    def refused(self) -> bool:
        """Whether no group has an optimum."""
        return all(one.refused for one in self.optima)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; NaN is null."""
        return dict(
            clean(
                {
                    "laws": [law.to_json() | {"name": name} for name, law in self.laws.items()],
                    "optima": [one.to_json() for one in self.optima],
                    "range": list(self.range),
                    "noise": dict(self.noise),
                    "verdicts": list(self.verdicts),
                    "left_out": {why: list(cells) for why, cells in self.left_out.items()},
                    "runs": self.runs,
                    "diverged": self.diverged,
                    "eps": self.eps,
                    "level": self.level,
                    "method": self.method,
                    "refused": self.refused,
                }
            )
        )

    def table(self) -> pd.DataFrame:
        """One row per group: its key, each axis's optimum with interval and plateau, loss, sensitivity, refused."""
        rows = []
        for one in self.optima:
            row: dict[str, Any] = {**one.group}
            for axis in one.axes:
                best, plateau = one.best.get(axis, NOTHING), one.plateau.get(axis, OPEN)
                row |= {f"{axis}_best": best.value, f"{axis}_low": best.interval[0], f"{axis}_high": best.interval[1]}
                row |= {f"{axis}_plateau_low": plateau[0], f"{axis}_plateau_high": plateau[1]}
            row |= {"loss": one.loss.value, "curvature": one.curvature, "sensitivity": one.sensitivity.value}
            row |= {"settings": len(one.points), "runs": int((one.points["count"] + one.points["diverged"]).sum())}
            rows.append(row | {"refused": one.refused})
        return pd.DataFrame(rows)


def sensitivity(
    runs: pd.DataFrame,
    *,
    axes: Sequence[str] | None = None,
    eps: float = 0.01,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    noise: float | None = None,
    method: Method = "quadratic",
) -> Sensitivity:
    """Find the best learning rate (and batch) of every group of runs, what it is worth to be near, and how it moves.

    runs: of `load_runs` or `read_table`. axes: what the optimum is sought over; see `swept.swept_groups`.
    eps: the plateau is where the fitted loss is within this fraction of the lowest.
    noise: standard deviation of ln loss between equal runs; by default it is measured between seeds.
    resamples, level, seed: of the noisy copies behind the intervals.
    method: of the laws. quadratic: through the vertices, weighted by their noise. near-best: all runs within .25% of
        the lowest loss of their (N, D), which is how Step Law and DeepSeek fitted theirs.

    Groups without an optimum come back refused, with the reason and a remedy. Raises InputError for an unknown axis or
    method, a number that makes no sense, a missing column, or a table without one usable run.
    """
    if method not in get_args(Method):
        raise InputError(f"method {method!r}{nearest(method, get_args(Method))}: quadratic or near-best.")
    for name, value in (("eps", eps), ("noise", noise), ("resamples", resamples)):
        if value is not None and not 0 < value < np.inf:
            raise InputError(f"{name} is {value!r}; it must be a positive number.")
    if not 0.5 <= level < 1:
        raise InputError(f"level is {level!r}; it must be from 0.5 to below 1, such as 0.95.")
    swept = swept_groups(runs, axes)
    found, judged, said = find_optima(
        swept.groups, swept.axes, eps=eps, resamples=resamples, level=level, seed=seed, noise=noise
    )
    verdicts = [*swept.verdicts, *said]
    if (trunks := trunk_labels(runs[exclusions(runs).isna()])) is not None:
        verdicts.append(dependent_runs(trunks, "More seeds make more of them."))
    if "learning_rate" in swept.axes:
        values, shared, said = wortsman(swept.groups, judged, resamples=resamples, level=level, seed=seed)
        found = [replace(one, sensitivity=value) for one, value in zip(found, values)]
        verdicts += said
    else:
        shared = OPEN
    if method == "near-best":
        laws = near_best_laws(swept, runs, resamples=resamples, level=level, seed=seed)
    else:
        laws = optimum_laws(found, runs, level=level, seed=seed)
    return Sensitivity(
        optima=tuple(found),
        laws=laws,
        noise=judged.to_json(),
        verdicts=tuple(verdicts),
        left_out=swept.left_out,
        range=shared,
        eps=eps,
        level=level,
        method=method,
        runs=swept.runs,
        diverged=swept.diverged,
    )


def wortsman(
    groups: Sequence[Group], noise: Noise, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[list[Estimate], Interval, list[Verdict]]:
    """Learning-rate sensitivity of each group, the range it was taken over, and what is said of it.

    Wortsman et al. 2023 (arXiv 2309.14322): the mean of min(loss, loss at start) - best loss over learning rates
    spread equally in logs. The range is what the grids of all groups with two rates or more cover, the rates in it lie
    as densely as in the median grid, and losses between the rates tried are interpolated in ln rate. Where a group
    has several batches, its sensitivity is that at the batch with its lowest loss. A diverged run counts as the loss
    at start; one whose start is not known, or that is only taken for diverged, as it ended.
    """
    slices = [_slice(group) for group in groups]
    grids = [np.log(s["learning_rate"]) for s in slices]
    wide = [g for g, s in zip(grids, slices) if len(g) >= 2 and np.isfinite(s["loss"]).any()]
    nothing = [NOTHING] * len(groups)
    if not wide:
        return nothing, OPEN, []
    low, high = max(float(g.min()) for g in wide), min(float(g.max()) for g in wide)
    if high - low < 1e-9:
        message = (
            "no two learning rates are covered by the grids of all groups, so there is no range over which their "
            "sensitivities could be compared. Sweep every size over one absolute range."
        )
        return nothing, OPEN, [Verdict("no_common_range", "caution", "fit", None, message)]
    shared = (float(np.exp(low)), float(np.exp(high)))
    said = _limits(groups, grids, low, high)
    step = float(np.median([np.median(np.diff(g)) for g in wide]))
    at = np.linspace(low, high, max(round((high - low) / step), 1) + 1)
    generator = np.random.default_rng(seed)
    scales = noise.draw(generator, resamples) if noise.sd >= 0 else np.empty(0)
    found, unknown, ended = [], 0, 0
    for group, rows, grid in zip(groups, slices, grids):
        capped, loss = rows["capped"], rows["loss"]
        lost = rows["diverged"] > 0
        if len(grid) < 2 or not np.isfinite(loss).any():
            found.append(NOTHING)
            continue
        shares = np.stack([np.interp(at, grid, one) for one in np.eye(len(grid))], axis=1).mean(axis=0)
        if np.isnan(capped[shares > 0]).any():
            unknown += 1
            found.append(NOTHING)
            continue
        ended += bool(lost[shares > 0].any() and np.isnan(group.start))
        best = int(np.nanargmin(loss))
        weights = shares * np.where(np.isnan(capped), 0.0, capped)
        noisy = np.where(lost, 0.0, weights) - loss[best] * (np.arange(len(grid)) == best)
        value = max(float(weights.sum() - loss[best]), 0.0)  # which equal losses may miss by rounding
        errors = generator.standard_normal((len(scales), len(grid))) * scales[:, None]
        draws = value + errors @ (noisy / np.sqrt(np.maximum(rows["count"], 1)))
        found.append(Estimate(value=value, interval=interval(draws, level)))
    if unknown or ended:
        message = (
            f"the loss at the start is not known: in {unknown} of {len(groups)} groups diverged runs have no loss to "
            f"count with, in {ended} they count as they ended. A column loss_at_start (nats, ln V) would say it."
        )
        said.append(Verdict("start_unknown", "caution", "fit", None, message, {"none": unknown, "ended": ended}))
    return found, shared, said


def _slice(group: Group) -> dict[str, np.ndarray]:
    """The settings of a group at the batch of its lowest loss, by rate."""
    batch, loss = group.columns["batch_tokens"], group.columns["loss"]
    kept = np.ones(len(loss), dtype=bool)
    if np.isfinite(batch).all():
        kept = batch == batch[int(np.nanargmin(loss)) if np.isfinite(loss).any() else 0]
    order = np.argsort(group.columns["learning_rate"][kept])
    return {name: values[kept][order] for name, values in group.columns.items()}


def _limits(groups: Sequence[Group], grids: Sequence[np.ndarray], low: float, high: float) -> list[Verdict]:
    """What the shared range leaves out, and which group is to blame, if one is."""
    wide = [(group, g) for group, g in zip(groups, grids) if len(g) >= 2]
    bottom, top = min(g.min() for _, g in wide), max(g.max() for _, g in wide)
    if high - low >= 0.75 * (top - bottom):
        return []
    widths = [float(np.ptp(g)) for _, g in wide]
    blame = ""  # where grids of one width stand apart
    if min(widths) < 0.9 * float(np.median(widths)):
        blame = f" ({wide[int(np.argmin(widths))][0].name} has the narrowest grid)"
    message = (
        f"sensitivities are taken from {np.exp(low):.3g} to {np.exp(high):.3g}, the learning rates that all groups "
        f"cover, of {np.exp(bottom):.3g} to {np.exp(top):.3g} tried{blame}."
    )
    return [Verdict("narrow_range", "info", "fit", None, message)]


def write_optimum(found: Sensitivity, runs: pd.DataFrame, study: str, store: Store) -> Path:
    """Keep the analysis as fits/optimum.json of the study, from which rules `fitted: <study>` are read."""
    head: dict[str, Any] = {}
    for name in ("corpus", "tokenizer", "context"):
        values = runs[name].dropna().unique().tolist() if name in runs.columns else []
        head[name] = values[0] if len(values) == 1 else None
    path = store.study(study) / "fits" / "optimum.json"
    body = found.to_json()
    for law in body["laws"]:
        law["parametrisation"] = law["parametrisation"] or "standard"  # what a study is that says none
    write_json(path, head | {"written": timestamp()} | body)
    return path
