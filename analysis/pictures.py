"""A picture of an analysis in a file: the one that shows best whether to believe it."""

from pathlib import Path

import pandas as pd

from analysis.sensitivities import Sensitivity
from analysis.verdicts import Fit
from sweeps.errors import InputError

SUFFIXES = (".png", ".pdf", ".svg")


def check_picture(path: Path) -> None:
    """InputError where a picture cannot go to this file; asked before the fit, which may take a while."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"--plot {path}: a picture is a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file.")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {path.parent}.")


def draw_fit(fit: Fit, runs: pd.DataFrame, path: Path) -> str:
    """Draw the parabolas of an isoFLOP fit or the residuals of a law into a file; says what was done.

    A refused law has no picture; budgets without a minimum have: it shows why.
    """
    from analysis import plots

    if fit.refused and not fit.budgets:
        return "no picture: the fit is refused."
    figure = plots.isoflop_curves(fit) if fit.law == "isoflop" else plots.residuals(fit, runs)
    figure.savefig(path, dpi=200, bbox_inches="tight")
    return f"picture: {path}"


def draw_sensitivity(found: Sensitivity, path: Path) -> str:
    """Draw the losses against the learning rate, with the optima, into a file; says what was done. Losses without an
    optimum are drawn as well: they show why."""
    from analysis import sweep_plots

    if not any("learning_rate" in one.axes for one in found.optima):
        return "no picture: no group has several learning rates."
    sweep_plots.fans(found.optima).savefig(path, dpi=200, bbox_inches="tight")
    return f"picture: {path}"
