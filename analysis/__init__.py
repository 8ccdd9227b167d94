"""What the losses say: a plain library over data frames. Only `runs` knows the store and MLflow.

    runs = analysis.load_runs("my-study")        one row per planned cell
    fit = analysis.fit(runs, law="isoflop")      parameters, intervals, verdicts
    fit.to_json()

    from analysis.sensitivity import sensitivity (the room's own name, so it is not among those below)
    sensitivity(runs)                            best learning rates, how much they matter, how they move

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.approaches import approach2_bias, compare_approaches
    from analysis.backtest import Backtest, judge_targets
    from analysis.compare import compare_recipes
    from analysis.conventions import compare_conventions
    from analysis.envelope import fit_curve_envelope, fit_envelope
    from analysis.fitting import fit
    from analysis.forecast import forecast_dearest
    from analysis.laws import find_law
    from analysis.optima import Optimum
    from analysis.optimum_laws import OptimumLaw
    from analysis.plausibility import check_table
    from analysis.profiles import Profile, profile
    from analysis.report import write_report
    from analysis.rulings import judge_rule
    from analysis.runs import load_curves, load_documents, load_runs
    from analysis.sensitivity import Sensitivity, write_optimum
    from analysis.tables import keep_rows, read_table
    from analysis.uncertainty import paired_errors, seed_noise
    from analysis.verdicts import Fit, Verdict

__all__ = [
    "Backtest",
    "Fit",
    "Optimum",
    "OptimumLaw",
    "Profile",
    "Sensitivity",
    "Verdict",
    "approach2_bias",
    "check_table",
    "compare_approaches",
    "compare_conventions",
    "compare_recipes",
    "find_law",
    "fit",
    "fit_curve_envelope",
    "fit_envelope",
    "forecast_dearest",
    "judge_rule",
    "judge_targets",
    "keep_rows",
    "load_curves",
    "load_documents",
    "load_runs",
    "paired_errors",
    "profile",
    "read_table",
    "seed_noise",
    "write_optimum",
    "write_report",
]

_HOME = {
    "Backtest": "backtest",
    "Fit": "verdicts",
    "Optimum": "optima",
    "OptimumLaw": "optimum_laws",
    "Profile": "profiles",
    "Sensitivity": "sensitivity",
    "Verdict": "verdicts",
    "approach2_bias": "approaches",
    "check_table": "plausibility",
    "compare_approaches": "approaches",
    "compare_conventions": "conventions",
    "compare_recipes": "compare",
    "find_law": "laws",
    "fit": "fitting",
    "fit_curve_envelope": "envelope",
    "fit_envelope": "envelope",
    "forecast_dearest": "forecast",
    "judge_rule": "rulings",
    "judge_targets": "backtest",
    "keep_rows": "tables",
    "load_curves": "runs",
    "load_documents": "runs",
    "load_runs": "runs",
    "paired_errors": "uncertainty",
    "profile": "profiles",
    "read_table": "tables",
    "seed_noise": "uncertainty",
    "write_optimum": "sensitivity",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(import_module(f"analysis.{_HOME[name]}"), name)
