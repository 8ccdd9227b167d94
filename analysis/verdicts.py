"""What a fit may say. A verdict qualifies numbers; a Fit carries both, and nulls what its verdicts refuse.

A refusal cannot be overlooked because the number is gone: `Fit.settle` replaces exactly what a verdict of severity
`refuse` names by NaN, in the parameters, intervals, budgets and decisions alike. NaN is null in JSON and a dash in
tables. What the optimiser returned stays under `diagnostics`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np

Severity = Literal["info", "caution", "refuse"]
Scope = Literal["fit", "budget", "parameter", "decision"]
Interval = tuple[float, float]

NAN = float("nan")
OPEN: Interval = (NAN, NAN)
"""An interval of which nothing is known."""


class Code(StrEnum):
    """What a verdict can be about; the words are stable, for programs."""

    # the runs
    COMPUTE_ASSUMED = "compute_assumed"
    BEST_SETTINGS = "best_settings"
    FEW_STEPS = "few_steps"
    PARTIAL = "partial"
    MIXED_FAMILIES = "mixed_families"
    MIXED_LOSSES = "mixed_losses"
    MIXED_RECIPES = "mixed_recipes"
    EXCLUDED_RUNS = "excluded_runs"
    OUTCOME_SELECTION = "outcome_selection"
    TOO_FEW_RUNS = "too_few_runs"
    TOO_FEW_LEVELS = "too_few_levels"
    ONE_PATH = "one_path"
    NARROW_SPAN = "narrow_span"
    # noise
    NOISE_UNKNOWN = "noise_unknown"
    NOISE_ASSUMED = "noise_assumed"
    NOISE_FROM_RESIDUALS = "noise_from_residuals"
    RESIDUALS_EXCEED_NOISE = "residuals_exceed_noise"
    UNEVEN_NOISE = "uneven_noise"
    TOO_FEW_UNITS = "too_few_units"
    DEPENDENT_RUNS = "dependent_runs"
    OUTLIER_DRIVEN = "outlier_driven"
    # parameters
    AT_BOUND = "at_bound"
    FLOOR_UNSEEN = "floor_unseen"
    OPEN_INTERVAL = "open_interval"
    NOT_IDENTIFIABLE = "not_identifiable"
    STARTS_DISAGREE = "starts_disagree"
    UNDETERMINED_LAW = "undetermined_law"
    # budgets
    TOO_FEW_SIZES = "too_few_sizes"
    TOO_FEW_BUDGETS = "too_few_budgets"
    MIXED_BUDGET = "mixed_budget"
    NO_MINIMUM = "no_minimum"
    EDGE_MINIMUM = "edge_minimum"
    UNSTABLE_MINIMUM = "unstable_minimum"
    WEAK_CURVATURE = "weak_curvature"
    NO_RESIDUAL_FREEDOM = "no_residual_freedom"
    OFF_CENTRE = "off_centre"
    WIDE_GRID = "wide_grid"
    FAR_SIZES = "far_sizes"
    LINE_MISFIT = "line_misfit"
    # envelopes
    ANNEALED_CURVES = "annealed_curves"
    UNKNOWN_SCHEDULE = "unknown_schedule"
    TOO_FEW_HORIZONS = "too_few_horizons"
    SIZES_OFF_ENVELOPE = "sizes_off_envelope"
    FEW_CURVES = "few_curves"
    # the approaches side by side
    NO_ANSWER = "no_answer"
    APPROACHES_DISAGREE = "approaches_disagree"
    APPROACH2_BIAS = "approach2_bias"
    # optima of hyperparameters
    TAKEN_FOR_DIVERGED = "taken_for_diverged"
    REPEATED_LOSSES = "repeated_losses"
    MOVING_SETTINGS = "moving_settings"
    TOO_FEW_POINTS = "too_few_points"
    ALL_DIVERGED = "all_diverged"
    EDGE_OF_STABILITY = "edge_of_stability"
    BAD_RUN = "bad_run"
    SKEWED_VALLEY = "skewed_valley"
    TOO_FEW_OPTIMA = "too_few_optima"
    START_UNKNOWN = "start_unknown"
    NO_COMMON_RANGE = "no_common_range"
    # importance and batches
    CONSTANT_PARAMETER = "constant_parameter"
    TIED_PARAMETERS = "tied_parameters"
    DIVERGED_CAPPED = "diverged_capped"
    FLAT_LOSSES = "flat_losses"
    NO_BEND = "no_bend"
    NOISE_SCALE_NEGATIVE = "noise_scale_negative"
    # decisions
    NO_POWER_LAW = "no_power_law"
    NO_OPTIMUM = "no_optimum"
    UNREACHABLE_LOSS = "unreachable_loss"
    EXTRAPOLATION = "extrapolation"
    BEYOND_BACKTEST = "beyond_backtest"
    # forecasts and comparisons
    NO_FORECAST = "no_forecast"
    SPAN_TOO_SMALL = "span_too_small"
    NO_OVERLAP = "no_overlap"
    NO_SLOPE = "no_slope"
    DIFFERENT_LOSSES = "different_losses"
    DIFFERENT_COMPUTE = "different_compute"
    DIFFERENT_ALLOCATION = "different_allocation"
    DIFFERENT_CORPORA = "different_corpora"
    CHANGES_WITH_SCALE = "changes_with_scale"
    CHANGES_WITH_ALLOCATION = "changes_with_allocation"
    NARROW_RANGE = "narrow_range"
    ROUGH_SURFACE = "rough_surface"
    COMPUTE_APART = "compute_apart"
    UNPAIRED = "unpaired"
    NOT_TOLD_APART = "not_told_apart"
    CORPUS_UNKNOWN = "corpus_unknown"
    WALL_CLOCK = "wall_clock"
    # tuning
    DEFAULT_NOT_RUN = "default_not_run"
    SELECTED_BEST = "selected_best"
    OPTIMUM_UNMEASURED = "optimum_unmeasured"
    MISTUNED = "mistuned"
    TUNING_CONFOUND = "tuning_confound"
    ONE_SETTING = "one_setting"
    LONG_WARMUP = "long_warmup"


@dataclass(frozen=True)
class Verdict:
    """One statement about a fit.

    code: a `Code`, or its word. ValueError for a word that is none.
    severity: info (good to know), caution (read the number with it in mind), refuse (there is no such number).
    scope: what it is about: the whole fit, one budget, one parameter or one decision.
    target: which budget (`budget_name`), parameter or decision; None for all of that scope.
    message: for people: what was found and what would mend it.
    evidence: the numbers behind it.
    """

    code: str
    severity: Severity
    scope: Scope
    target: str | None
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        Code(self.code)

    def to_json(self) -> dict[str, Any]:
        return {
            "code": str(self.code),
            "severity": self.severity,
            "scope": self.scope,
            "target": self.target,
            "message": self.message,
            "evidence": dict(self.evidence),
        }


def budget_name(budget: float) -> str:
    """The name of a compute budget in verdicts and tables, in six digits: 1.5e15 FLOPs is "1.5e15"."""
    mantissa, exponent = f"{budget:.5e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def refused(verdicts: Iterable[Verdict], scope: Scope = "fit", target: str | None = None) -> bool:
    """Whether a verdict takes this number away. A refused fit takes everything with it."""
    return any(
        v.severity == "refuse" and (v.scope == "fit" or (v.scope == scope and v.target in (None, target)))
        for v in verdicts
    )


DECADES = 1.5
"""A span of compute below which exponents are poorly determined."""
FAR, TOO_FAR = 10.0, 1000.0
"""Extrapolation in compute, to either side, that is cautioned against, and that is refused."""


def narrow_span(C: np.ndarray) -> list[Verdict]:
    """A caution where the runs span too little compute to tell exponents apart."""
    decades = float(np.ptp(np.log10(C)))
    if decades >= DECADES:
        return []
    message = f"the runs span {decades:.2f} decades of compute; below {DECADES} exponents are poorly determined."
    return [Verdict("narrow_span", "caution", "fit", None, message)]


def extrapolation(C: float, dearest: float, cheapest: float = 0.0, what: str = "run") -> list[Verdict]:
    """What to say of a decision at compute C when the runs, or `what` it is, used from `cheapest` to `dearest`."""
    below = cheapest > C
    ratio = cheapest / C if below else C / dearest
    if not ratio > FAR:
        return []
    refuse = ratio > TOO_FAR
    place = f"1/{ratio:.3g} of the cheapest {what}" if below else f"{ratio:.3g} times the dearest {what}"
    message = f"{budget_name(C)} FLOPs is {place}" + (
        "; no law fitted here can be trusted that far." if refuse else "; laws bend, and the interval does not know."
    )
    severity = "refuse" if refuse else "caution"
    return [Verdict("extrapolation", severity, "decision", budget_name(C), message)]  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval, at the level of what it belongs to. A bound that the data leave open is NaN."""

    value: float = NAN
    interval: Interval = OPEN

    def __str__(self) -> str:
        low, high = (f"{bound:.4g}" if math.isfinite(bound) else "open" for bound in self.interval)
        if not math.isfinite(self.value):
            return "-"
        return f"{self.value:.4g}" if low == high == "open" else f"{self.value:.4g} ({low} .. {high})"

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "interval": list(self.interval)}


NOTHING = Estimate()
"""The estimate of a number that is not known or was refused."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One isoFLOP budget: the parabola through its sizes and where its minimum lies.

    budget: the target compute in FLOPs. C: the compute that its cells spent (geometric mean).
    sizes: N of its points, ascending. losses: mean loss per size. runs: cells behind each point.
    far: (N, loss) of sizes too far from the minimum to be fitted.
    curve: (k0, k1, k2) of ln loss = k0 + k1 x + k2 x^2 with x = ln N - center.
    N, D, loss: the minimum. tokens_per_parameter: D / N there.
    """

    budget: float
    C: float
    sizes: tuple[float, ...]
    losses: tuple[float, ...]
    runs: tuple[int, ...]
    center: float
    curve: tuple[float, float, float]
    far: tuple[tuple[float, float], ...] = ()
    curvature_se: float = NAN
    interior: float = NAN
    """Share of the bootstrap resamples whose minimum lies inside the grid."""
    accepted: bool = False
    N: Estimate = NOTHING
    D: Estimate = NOTHING
    loss: Estimate = NOTHING
    tokens_per_parameter: Estimate = NOTHING

    @property
    def name(self) -> str:
        return budget_name(self.budget)

    def to_json(self) -> dict[str, Any]:
        numbers = {key: getattr(self, key).to_json() for key in ("N", "D", "loss", "tokens_per_parameter")}
        return {
            "budget": self.budget,
            "C": self.C,
            "accepted": self.accepted,
            "sizes": list(self.sizes),
            "losses": list(self.losses),
            "runs": list(self.runs),
            "far": [list(point) for point in self.far],
            "center": self.center,
            "curve": list(self.curve),
            "curvature_se": self.curvature_se,
            "interior": self.interior,
        } | numbers


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law fitted to runs, or the refusal to fit it. Look at `refused` and `verdicts` before the numbers.

    params, intervals: by parameter name; intervals are bootstrap percentiles at `level`. See the law for units.
    decisions: what the fit recommends; `decisions["targets"]` holds one entry for each compute asked for.
    budgets: the isoFLOP budgets (empty for other laws).
    excluded: the runs left out, each with its reason. planned, finished: how many cells there were.
    noise: the scale of ln loss between equal runs, and where it comes from.
    draws: bootstrap samples of all parameters, arrays of shape (resamples,), for predictions; not in the JSON.
    """

    law: str
    loss: str
    params: Mapping[str, float]
    intervals: Mapping[str, Interval]
    verdicts: tuple[Verdict, ...]
    n_runs: int
    planned: int
    finished: int
    excluded: tuple[Mapping[str, str], ...]
    noise: Mapping[str, Any]
    decisions: Mapping[str, Any]
    provenance: Mapping[str, Any]
    diagnostics: Mapping[str, Any]
    budgets: tuple[Budget, ...] = ()
    draws: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    level: float = 0.95
    """Of the intervals."""

    @property
    def refused(self) -> bool:
        """Whether the whole fit is refused: then no number of it stands."""
        return refused(self.verdicts)

    @property
    def solved(self) -> Mapping[str, float]:
        """The parameters as solved, for predictions within the runs: those hold where one parameter alone is refused.

        NaN where the whole fit or the law as such is refused.
        """
        raw = self.diagnostics.get("params", {})
        lost = refused(self.verdicts, "decision") or not raw
        return dict.fromkeys(self.params, NAN) if lost else raw

    def settle(self) -> "Fit":
        """The same fit with every refused number taken out."""

        def gone(scope: Scope, target: str) -> bool:
            return refused(self.verdicts, scope, target)

        return replace(
            self,
            params={k: NAN if gone("parameter", k) else v for k, v in self.params.items()},
            intervals={k: OPEN if gone("parameter", k) else v for k, v in self.intervals.items()},
            budgets=tuple(
                replace(b, accepted=False, N=NOTHING, D=NOTHING, loss=NOTHING, tokens_per_parameter=NOTHING)
                if gone("budget", b.name)
                else b
                for b in self.budgets
            ),
            decisions={k: _blank(v) if gone("decision", k) else v for k, v in self.decisions.items()}
            | {
                "targets": [
                    _blank(entry) if gone("decision", budget_name(entry["C"])) else entry
                    for entry in self.decisions.get("targets", [])
                ]
            },
            draws={} if self.refused else self.draws,
        )

    def to_json(self) -> dict[str, Any]:
        """The fit as JSON values: NaN and infinity are null."""
        return clean(
            {
                "law": self.law,
                "loss": self.loss,
                "refused": self.refused,
                "level": self.level,
                "params": dict(self.params),
                "intervals": {k: list(v) for k, v in self.intervals.items()},
                "budgets": [b.to_json() for b in self.budgets],
                "decisions": dict(self.decisions),
                "verdicts": [v.to_json() for v in self.verdicts],
                "n_runs": self.n_runs,
                "planned": self.planned,
                "finished": self.finished,
                "excluded": [dict(e) for e in self.excluded],
                "noise": dict(self.noise),
                "provenance": dict(self.provenance),
                "diagnostics": dict(self.diagnostics),
            }
        )


def _blank(value: Any) -> Any:
    """The same decision without its estimates; what was asked for (C, extrapolation) stays."""
    if isinstance(value, Estimate):
        return NOTHING
    if isinstance(value, Mapping):
        return {k: _blank(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_blank(v) for v in value]
    return value


def clean(value: Any) -> Any:
    """Any nest of results as plain JSON values: arrays to lists, NaN and infinity to None."""
    if isinstance(value, Estimate | Budget | Verdict):
        return clean(value.to_json())
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [clean(v) for v in value]
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
