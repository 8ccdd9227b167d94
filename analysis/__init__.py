"""What the losses say: a plain library over data frames. Only `runs` reads cells and knows MLflow.

    runs = analysis.load_runs("my-study")        one row per planned cell
    fit = analysis.fit(runs, law="isoflop")      parameters, intervals, verdicts
    fit.to_json()

    analysis.sensitivity(runs)                   best learning rates, how much they matter, how they move

Fits of a study are kept in its folder of the store, where other studies find them. The names below are loaded when they
are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.approaches import approach2_bias, compare_approaches
    from analysis.audits import Audit, audit
    from analysis.backtest import Backtest, judge_targets
    from analysis.batches import CriticalBatch, CriticalBatches, critical_batches, sweeps_batches
    from analysis.compare import compare_recipes
    from analysis.conventions import compare_conventions
    from analysis.envelope import fit_curve_envelope, fit_envelope
    from analysis.fitting import fit
    from analysis.forecast import forecast_dearest
    from analysis.importance import Importance, importances
    from analysis.laws import find_law
    from analysis.noise_scale import NoiseScale, gradient_noise, noise_scales
    from analysis.optima import Optimum
    from analysis.optimum_laws import OptimumLaw
    from analysis.plausibility import check_table
    from analysis.profiles import Profile, profile
    from analysis.report import write_report
    from analysis.rulings import judge_rule
    from analysis.runs import load_curves, load_documents, load_runs
    from analysis.sensitivities import Sensitivity, sensitivity, write_optimum
    from analysis.tables import keep_rows, read_table
    from analysis.timescale import Timescale, decay_timescales
    from analysis.transfers import Transfer, transfer
    from analysis.tuning import TuningWorth, tuning_worth
    from analysis.uncertainty import paired_errors, seed_noise
    from analysis.verdicts import Fit, Verdict

__all__ = [
    "Audit",
    "Backtest",
    "CriticalBatch",
    "CriticalBatches",
    "Fit",
    "Importance",
    "NoiseScale",
    "Optimum",
    "OptimumLaw",
    "Profile",
    "Sensitivity",
    "Timescale",
    "Transfer",
    "TuningWorth",
    "Verdict",
    "approach2_bias",
    "audit",
    "check_table",
    "compare_approaches",
    "compare_conventions",
    "compare_recipes",
    "critical_batches",
    "decay_timescales",
    "find_law",
    "fit",
    "fit_curve_envelope",
    "fit_envelope",
    "forecast_dearest",
    "gradient_noise",
    "importances",
    "judge_rule",
    "judge_targets",
    "keep_rows",
    "load_curves",
    "load_documents",
    "load_runs",
    "noise_scales",
    "paired_errors",
    "profile",
    "read_table",
    "seed_noise",
    "sensitivity",
    "sweeps_batches",
    "transfer",
    "tuning_worth",
    "write_optimum",
    "write_report",
]

_HOME = {
    "Audit": "audits",
    "Backtest": "backtest",
    "CriticalBatch": "batches",
    "CriticalBatches": "batches",
    "Fit": "verdicts",
    "Importance": "importance",
    "NoiseScale": "noise_scale",
    "Optimum": "optima",
    "OptimumLaw": "optimum_laws",
    "Profile": "profiles",
    "Sensitivity": "sensitivities",
    "TuningWorth": "tuning",
    "Timescale": "timescale",
    "Transfer": "transfers",
    "Verdict": "verdicts",
    "approach2_bias": "approaches",
    "audit": "audits",
    "check_table": "plausibility",
    "compare_approaches": "approaches",
    "compare_conventions": "conventions",
    "compare_recipes": "compare",
    "critical_batches": "batches",
    "decay_timescales": "timescale",
    "find_law": "laws",
    "fit": "fitting",
    "fit_curve_envelope": "envelope",
    "fit_envelope": "envelope",
    "forecast_dearest": "forecast",
    "gradient_noise": "noise_scale",
    "importances": "importance",
    "judge_rule": "rulings",
    "judge_targets": "backtest",
    "keep_rows": "tables",
    "load_curves": "runs",
    "load_documents": "runs",
    "load_runs": "runs",
    "noise_scales": "noise_scale",
    "paired_errors": "uncertainty",
    "profile": "profiles",
    "read_table": "tables",
    "seed_noise": "uncertainty",
    "sensitivity": "sensitivities",
    "sweeps_batches": "batches",
    "transfer": "transfers",
    "tuning_worth": "tuning",
    "write_optimum": "sensitivities",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(import_module(f"analysis.{_HOME[name]}"), name)
