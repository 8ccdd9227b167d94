"""How an optimum moves with size and tokens: power laws through the optima of several groups, with intervals.

    rate* = value x (N / at N)^power x (D / at D)^power

Guards against a power that the design cannot tell: where D was tied to N, or only one D was trained, there is one
power along that path and none of D. Refused optima do not enter; optima that scatter about the law more than their
noise explains widen its intervals.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.optima import Optimum
from analysis.swept import AXES, Swept
from analysis.uncertainty import SETTINGS, interval
from analysis.verdicts import NAN, NOTHING, Estimate, Interval, Verdict, clean, refused
from sweeps.units import plural

LEAST = 3
"""Optima that a power law needs: through two points any line passes."""
TIED = 0.99
"""Squared correlation of ln D with ln N from which on their powers cannot be told apart."""
MANY_LOST = 0.1
"""Share of the optima lost at one edge of the grids from which on those that are left are a selection."""
NEAR_BEST = 0.0025
"""Runs this close to the lowest loss of their (N, D) stand for the optimum in the rule of Step Law and DeepSeek."""
_SHAPE = ("N", "D", "width", "depth", "heads", "mlp_width", "corpus", "tokenizer", "context", *AXES)
_RECIPE = tuple(c for c in SETTINGS if c != "learning_rate")


@dataclass(frozen=True, kw_only=True)
class OptimumLaw:
    """The power law of one hyperparameter's optimum in N (parameters), D (tokens) and, at fixed batches, batch_tokens.

    value: the optimum at the point `at`. powers: those that the design identifies. range: of the optima, per variable.
    optima: how many it goes through. curvature: median of d^2 ln loss / d ln(learning rate)^2 there. recipe: the
    settings that were constant. draws: ln value and powers under the bootstrap (resamples,).
    """

    hyperparameter: str
    family: str | None
    parametrisation: str | None = None
    value: Estimate = NOTHING
    powers: Mapping[str, Estimate] = field(default_factory=dict)
    at: Mapping[str, float] = field(default_factory=dict)
    range: Mapping[str, Interval] = field(default_factory=dict)
    optima: int = 0
    curvature: float = NAN
    verdicts: tuple[Verdict, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    draws: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def refused(self) -> bool:
        """Whether there is no law to use."""
        return refused(self.verdicts)

    def predict(self, **known: Any) -> Any:
        """The optimum at N=..., D=... (numbers or arrays); a variable without a power does not matter."""
        value: Any = self.value.value
        for name, power in self.powers.items():
            value = value * (np.asarray(known[name], dtype=float) / self.at[name]) ** power.value
        return value

    def to_json(self) -> dict[str, Any]:
        """As JSON values, in the form that a study's `fitted:` rules read."""
        intervals = {"value": self.value.interval} | {k: p.interval for k, p in self.powers.items()}
        return dict(
            clean(
                {
                    "hyperparameter": self.hyperparameter,
                    "family": self.family,
                    "parametrisation": self.parametrisation,
                    "refused": self.refused,
                    "value": self.value.value,
                    "at": dict(self.at),
                    "powers": {k: p.value for k, p in self.powers.items()},
                    "intervals": intervals,
                    "range": dict(self.range),
                    "optima": self.optima,
                    "curvature": self.curvature,
                    "recipe": dict(self.recipe),
                    "verdicts": list(self.verdicts),
                }
            )
        )


def optimum_laws(
    optima: Sequence[Optimum], runs: pd.DataFrame, *, level: float = 0.95, seed: int = 0
) -> dict[str, OptimumLaw]:
    """A law per axis and per family, parametrisation and setting that was crossed: "llama/learning_rate".

    Weighted least squares of ln optimum, by 1 / (variance of its draws + variance between groups beyond that, after
    Paule & Mandel 1982). The bootstrap takes the optima's own draws and draws the groups' scatter anew, with as many
    degrees of freedom as it was estimated from.
    """
    laws = {}
    for axis in optima[0].axes if optima else ():
        for name, members in by_law(optima, axis).items():
            labels = {k: v for k, v in members[0].group.items() if k not in _SHAPE}
            laws[name] = _law(axis, members, labels, _recipe(runs, labels, axis), level, seed)
    return laws


def by_law(optima: Iterable[Optimum], axis: str) -> dict[str, list[Optimum]]:
    """The optima that each law goes through, by its name."""
    kinds: dict[tuple[Any, ...], list[Optimum]] = {}
    for one in optima:
        kinds.setdefault(tuple((k, v) for k, v in one.group.items() if k not in _SHAPE), []).append(one)
    named = _telling(kinds)
    return {_name(kind, named, axis): members for kind, members in kinds.items()}


def near_best_laws(
    swept: Swept,
    runs: pd.DataFrame,
    *,
    tolerance: float = NEAR_BEST,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, OptimumLaw]:
    """The rule of Step Law's repository (Li et al. 2025, arXiv 2503.04715; so too DeepSeek, arXiv 2401.02954).

    All settings within `tolerance` of the lowest loss of their group are taken for optimal: ordinary least squares of
    ln rate on ln N and ln D, of ln batch on ln D, bootstrapped over those settings. Its intervals take neighbouring
    settings of one group for independent, and settings at the edge of a grid count as any other.
    """
    kinds: dict[tuple[Any, ...], list[Any]] = {}
    for group in swept.groups:
        kinds.setdefault(tuple((k, v) for k, v in group.key.items() if k not in _SHAPE), []).append(group)
    named, laws = _telling(kinds), {}
    for kind, members in kinds.items():
        rows = []
        for group in members:
            points = group.points[group.points["count"] > 0]
            near = points[points["loss"] <= (1.0 + tolerance) * points["loss"].min()]
            rows.append(near.assign(N=group.key["N"], D=group.key["D"]))
        kept = pd.concat(rows, ignore_index=True)
        generator = np.random.default_rng(seed)
        counts = generator.multinomial(len(kept), np.full(len(kept), 1.0 / len(kept)), size=resamples).astype(float)
        for axis in swept.axes:
            asked = ("N", "D") if axis == "learning_rate" else ("D",)
            table = kept[list(asked)]
            x, at, said = _columns(table, axis, asked)
            labels = dict(kind)
            law: dict[str, Any] = {"hyperparameter": axis, "family": labels.get("family")}
            law |= {"parametrisation": labels.get("parametrisation"), "recipe": _recipe(runs, labels, axis)}
            if len(kept) <= x.shape[1] or len(members) < LEAST:
                said.append(_too_few(axis, len(members), 0))
            y = np.log(kept[axis].to_numpy(dtype=float))
            draws = weighted(x, np.tile(y, (resamples, 1)), counts) if not refused(said) else np.empty((0, 0))
            best = weighted(x, y[None], np.ones((1, len(y))))[0]
            laws[_name(kind, named, axis)] = OptimumLaw(
                **law, **_numbers(table, at, best, draws, level, said), optima=len(kept), verdicts=tuple(said)
            )
    return laws


# --- one law -----------------------------------------------------------------------------------------------------


def _law(
    axis: str, members: Sequence[Optimum], labels: Mapping[str, Any], recipe: Mapping[str, Any], level: float, seed: int
) -> OptimumLaw:
    kept = [one for one in members if not one.refused]
    law: dict[str, Any] = {"hyperparameter": axis, "family": labels.get("family"), "recipe": recipe}
    law |= {"parametrisation": labels.get("parametrisation"), "optima": len(kept)}
    if len(kept) < LEAST:
        return OptimumLaw(**law, verdicts=(_too_few(axis, len(kept), len(members) - len(kept)),))
    other = [a for a in AXES if a not in members[0].axes and len({one.group.get(a) for one in kept}) > 1]
    asked = ("N", "D", *(a for a in other if all(a in one.group for one in kept)))
    table = pd.DataFrame([{name: one.group[name] for name in asked} for one in kept])
    x, at, said = _columns(table, axis, asked)
    if refused(said):
        return OptimumLaw(**law, verdicts=tuple(said))
    y = np.log([one.best[axis].value for one in kept])
    copies = np.stack([one.draws[axis] for one in kept], axis=1)
    own = copies.var(axis=0) if len(copies) else np.zeros(len(y))
    between, weights, freedom = between_groups(x, y, own)
    best = weighted(x, y[None], weights[None])[0]
    generator = np.random.default_rng(seed)
    if not len(copies):
        copies = np.tile(y, (1000, 1))
    scale = np.sqrt(between * freedom / generator.chisquare(freedom, len(copies))) if freedom else np.zeros(len(copies))
    copies = copies + scale[:, None] * generator.standard_normal(copies.shape)
    draws = weighted(x, copies, np.tile(weights, (len(copies), 1)))
    if lost := len(members) - len(kept):
        message = f"{plural(lost, 'refused optimum').replace('optimums', 'optima')} of {len(members)} do not enter."
        said.append(Verdict("excluded_runs", "info", "fit", axis, message))
    said += _selected(axis, members)
    if freedom and between > np.median(own) > 0:
        message = (
            f"the optima scatter about the power law by a factor of {np.exp(np.sqrt(between)):.2f}, more than their "
            "noise explains; the intervals are widened to match."
        )
        said.append(Verdict("line_misfit", "caution", "fit", axis, message))
    curvature = float(np.median([one.curvature for one in kept]))
    numbers = _numbers(table, at, best, draws, level, said)
    return OptimumLaw(**law, **numbers, curvature=curvature, verdicts=tuple(said))


def _selected(axis: str, members: Sequence[Optimum]) -> list[Verdict]:
    """A caution where many optima are missing for lying beyond one and the same edge: the law is of the others."""
    said = []
    for side, bias, further in (("largest", "low", "higher"), ("smallest", "high", "lower")):
        lost = [
            one for one in members if any(v.severity == "refuse" and _edge(v) == (axis, side) for v in one.verdicts)
        ]
        if len(lost) <= MANY_LOST * len(members):
            continue
        word = {"learning_rate": "learning rate", "batch_tokens": "batch"}[axis]
        names = ", ".join(one.name for one in lost[:4]) + (", ..." if len(lost) > 4 else "")
        message = (
            f"{len(lost)} of {len(members)} optima lie at or beyond the {side} {word} tried and do not enter "
            f"({names}). Of their kind only the {'lower' if side == 'largest' else 'higher'} ones are left: there the "
            f"law is too {bias}, as a rule, and its powers too near 0, which the intervals do not know. Train these "
            f"at {further} values."
        )
        evidence = {"lost": len(lost), "optima": len(members), "side": side}
        said.append(Verdict("outcome_selection", "caution", "fit", axis, message, evidence))
    return said


def _edge(verdict: Verdict) -> tuple[Any, Any]:
    """The axis and the side at whose end an optimum was refused; of None for another refusal."""
    return verdict.evidence.get("axis"), verdict.evidence.get("side")


def _columns(
    table: pd.DataFrame, axis: str, asked: Sequence[str]
) -> tuple[np.ndarray, dict[str, float], list[Verdict]]:
    """The columns 1, ln (v / at v) of the variables whose powers the table identifies, and where `at` is."""
    at: dict[str, float] = {}
    columns, said = [np.ones(len(table))], []
    for name in asked:
        logs = np.log(table[name].to_numpy(dtype=float))
        centred = logs - logs.mean()
        total = float((centred**2).sum())
        if total <= 1e-6:
            message = f"all optima stand at one {name} ({np.exp(logs[0]):.4g}), so its power is not known. Add others."
            said.append(Verdict("not_identifiable", "info", "parameter", name, message))
            continue
        before = np.column_stack(columns)
        rest = centred - before @ np.linalg.lstsq(before, centred, rcond=None)[0]
        if float((rest**2).sum()) < (1.0 - TIED) * total or len(table) <= before.shape[1] + 1:
            tied = len(table) > before.shape[1] + 1
            why = f"moves together with {' and '.join(at)}" if tied else f"has {len(table)} optima to tell it"
            message = (
                f"{name} {why}: the power of {' and '.join(at)} is the one along the way that the runs take, and none "
                f"of {name} itself is known. Cross {name} with the others."
            )
            said.append(Verdict("not_identifiable", "caution", "parameter", name, message))
            continue
        at[name] = float(np.exp(logs.mean()))
        columns.append(centred)
    if not at:
        message = f"one {', '.join(asked)} only: how the best {axis} moves cannot be said. Train other sizes or tokens."
        said.append(Verdict("too_few_optima", "refuse", "fit", axis, message))
    return np.column_stack(columns), at, said


def between_groups(x: np.ndarray, y: np.ndarray, own: np.ndarray) -> tuple[float, np.ndarray, int]:
    """Variance between groups beyond their own, by Paule and Mandel; the weights; the degrees of freedom behind it."""
    freedom = len(y) - x.shape[1]

    def excess(between: float) -> float:
        weights = 1.0 / np.maximum(own + between, 1e-12)
        misses = y - x @ weighted(x, y[None], weights[None])[0]
        return float((weights * misses**2).sum()) - freedom

    low, high = 0.0, float(np.var(y)) * len(y) + 1e-12
    if freedom <= 0 or excess(0.0) <= 0:
        high = 0.0
    for _ in range(60 if high else 0):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high, 1.0 / np.maximum(own + high, 1e-12), max(freedom, 0)


def weighted(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares of each row of y (copies, n) on x (n, k): (copies, k); a copy without rank is NaN."""
    weights = weights / weights.mean(axis=1, keepdims=True)
    gram = np.einsum("cn,nj,nk->cjk", weights, x, x, optimize=True)
    right = (weights * y) @ x
    sound = np.linalg.cond(gram) < 1e12
    gram[~sound] = np.eye(x.shape[1])
    found = np.linalg.solve(gram, right[..., None])[..., 0]
    return np.asarray(np.where(sound[:, None], found, NAN))


def _numbers(
    table: pd.DataFrame,
    at: Mapping[str, float],
    best: np.ndarray,
    draws: np.ndarray,
    level: float,
    said: Sequence[Verdict],
) -> dict[str, Any]:
    """The fields of an OptimumLaw that come from a fit; none where it is refused."""
    if refused(said):
        return {}
    height = np.exp(interval(draws[:, 0], level)) if len(draws) else (NAN, NAN)
    spans = {name: table[name] for name in at}
    return {
        "value": Estimate(value=float(np.exp(best[0])), interval=(float(height[0]), float(height[1]))),
        "powers": {
            name: Estimate(value=float(best[j]), interval=interval(draws[:, j], level)) for j, name in enumerate(at, 1)
        },
        "at": dict(at),
        "range": {name: (float(v.min()), float(v.max())) for name, v in spans.items()},
        "draws": {"ln value": draws[:, 0]} | {name: draws[:, j] for j, name in enumerate(at, 1)},
    }


def _too_few(axis: str, count: int, lost: int) -> Verdict:
    message = (
        f"{plural(count, 'group')} with an optimum of the {axis}{f' ({lost} refused)' if lost else ''}; a power law "
        f"needs {LEAST}, because through two points any line passes. Add sizes, or mend the refused ones."
    )
    return Verdict("too_few_optima", "refuse", "fit", axis, message, {"optima": count, "refused": lost})


def _telling(kinds: Mapping[tuple[Any, ...], Any]) -> set[str]:
    """The labels that a law's name needs: the family where there is one, and whatever differs."""
    values: dict[str, set[Any]] = {}
    for kind in kinds:
        for k, v in kind:
            values.setdefault(k, set()).add(v)
    return {k for k, v in values.items() if k == "family" or len(v) > 1}


def _name(kind: tuple[tuple[str, Any], ...], named: set[str], axis: str) -> str:
    """A law's name: "llama/learning_rate", "llama optimizer=lion weight_decay=0.1/learning_rate"."""
    words = []
    for k, v in kind:
        if k in named and k in ("family", "parametrisation"):
            words.append(str(v))
        elif k in named:
            words.append(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}")  # a schedule is a word
    return f"{' '.join(words)}/{axis}" if words else axis


def _recipe(runs: pd.DataFrame, labels: Mapping[str, Any], axis: str) -> dict[str, Any]:
    """The settings that were constant in the runs of these labels."""
    rows = runs
    for name, value in labels.items():
        if name in rows.columns:
            rows = rows[rows[name] == value]
    found = {}
    for name in _RECIPE:
        if name != axis and name in rows.columns and rows[name].nunique() == 1:
            value = rows[name].dropna().iloc[0]
            found[name] = value.item() if isinstance(value, np.generic) else value
    return found
