"""Pictures hold what they claim, for good fits and refused ones, and leave no global state behind."""

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis import fit, forecast_dearest, load_curves, load_runs, plots
from tests.analysis.synthetic import budgets_table, surface

BUDGETS = (1e11, 4e11, 1.6e12, 6.4e12)


def labels(figure: Figure) -> set[str]:
    """Every legend entry of a figure."""
    found = [axes.get_legend() for axes in figure.axes]
    return {text.get_text() for legend in found if legend for text in legend.get_texts()}


def drawn(figure: Figure) -> None:
    """Render, so that faults in ticks and layout show."""
    figure.canvas.draw()


@pytest.mark.parametrize("against", ["tokens", "flops"])
def test_loss_curves_draw_every_cell(good_store, against) -> None:
    runs, curves = load_runs("demo", good_store), load_curves("demo", good_store)
    figure = plots.loss_curves(curves, runs, against)
    drawn(figure)
    axes = figure.axes[0]
    assert len(axes.lines) == len(runs)
    assert axes.get_xscale() == "log"
    low, high = axes.get_ylim()
    assert low < runs["val_loss_final"].min()
    assert high > runs["val_loss_final"].max()


def test_isoflop_picture_marks_minima_and_refusals() -> None:
    table = budgets_table(BUDGETS, seeds=3, noise=0.002)
    table.loc[table["budget"] == 1e11, "loss"] *= (table["N"] / 1e4) ** 0.3
    found = fit(table, "isoflop")
    figure = plots.isoflop_curves(found)
    drawn(figure)
    assert labels(figure) == {"1e11 (refused)", "4e11", "1.6e12", "6.4e12", "minimum, 95 %"}
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["1e11 (refused)"].get_markerfacecolor() == "white"
    assert lines["4e11"].get_markerfacecolor() != "white"
    assert sum(line.get_linestyle() == "--" for line in figure.axes[0].lines) == 1


def test_paths_show_fit_band_and_the_published_slope() -> None:
    figure = plots.optimum_paths(fit(budgets_table(BUDGETS, seeds=3, noise=0.002), "isoflop"))
    drawn(figure)
    assert {"fit: C^0.50", "95 % band", "Hoffmann et al.: C^0.49", "Hoffmann et al.: C^0.51"} <= labels(figure)


def test_paths_of_a_refused_power_law_show_the_minima_alone() -> None:
    figure = plots.optimum_paths(fit(budgets_table(BUDGETS[:2], seeds=2, noise=0.002), "isoflop"))
    drawn(figure)
    assert not any(label.startswith("fit") for label in labels(figure))
    assert "minima, 95 %" in labels(figure)


def test_residuals_are_percent_of_the_fitted_loss() -> None:
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e6, 4), np.geomspace(1e5, 1e7, 4)))
    table = surface(N, D, noise=0.01)
    table["cell"] = [f"c{i}" for i in range(len(table))]
    figure = plots.residuals(fit(table), table)
    drawn(figure)
    points = figure.axes[0].collections[-1].get_offsets()
    assert len(points) == 16
    assert 0.1 < np.abs(points[:, 1]).max() < 5


def test_forecast_picture(good_store) -> None:
    figure = plots.forecast(forecast_dearest(load_runs("demo", good_store)))
    drawn(figure)
    assert labels(figure) == {"measured", "forecast, 95 %", "found N*", "forecast N*, 95 %"}


def test_pictures_of_one_size_or_nothing_do_not_crash() -> None:
    one = fit(budgets_table(BUDGETS[:1]), "isoflop")
    for figure in (plots.isoflop_curves(one), plots.optimum_paths(one)):
        drawn(figure)
    table = surface(np.full(9, 1e5), np.geomspace(1e5, 1e7, 9))
    table["cell"] = [f"c{i}" for i in range(9)]
    drawn(plots.residuals(fit(table), table))


def test_no_global_matplotlib_state_is_touched() -> None:
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
