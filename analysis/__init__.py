"""What the losses say: a plain library over data frames. Only `runs` knows the store and MLflow.

    runs = analysis.load_runs("my-study")        one row per planned cell
    fit = analysis.fit(runs, law="isoflop")      parameters, intervals, verdicts
    fit.to_json()

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.backtest import forecast_dearest
    from analysis.fitting import fit
    from analysis.profiles import Profile, profile
    from analysis.report import write_report
    from analysis.runs import load_curves, load_documents, load_runs, read_table
    from analysis.uncertainty import paired_errors, seed_noise
    from analysis.verdicts import Fit, Verdict

__all__ = [
    "Fit",
    "Profile",
    "Verdict",
    "fit",
    "forecast_dearest",
    "load_curves",
    "load_documents",
    "load_runs",
    "paired_errors",
    "profile",
    "read_table",
    "seed_noise",
    "write_report",
]

_HOME = {
    "Fit": "verdicts",
    "Profile": "profiles",
    "Verdict": "verdicts",
    "fit": "fitting",
    "forecast_dearest": "backtest",
    "load_curves": "runs",
    "load_documents": "runs",
    "load_runs": "runs",
    "paired_errors": "uncertainty",
    "profile": "profiles",
    "read_table": "runs",
    "seed_noise": "uncertainty",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(import_module(f"analysis.{_HOME[name]}"), name)
