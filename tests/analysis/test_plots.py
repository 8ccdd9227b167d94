"""Pictures hold what they claim, for good fits and refused ones, and leave no global state behind."""

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from analysis import fit, forecast_dearest, load_curves, load_runs, plots, profile
from analysis.laws import CHINCHILLA, ERROR
from analysis.style import KINDS, axis_scale, round_numbers
from sweeps.errors import InputError
from tests.analysis.closed import closed_form
from tests.analysis.synthetic import LAW, budgets_table, surface

BUDGETS = (1e11, 4e11, 1.6e12, 6.4e12)


def labels(figure: Figure) -> set[str]:
    """Every legend entry of a figure."""
    found = [axes.get_legend() for axes in figure.axes]
    return {text.get_text() for legend in found if legend for text in legend.get_texts()}


def drawn(figure: Figure) -> None:
    """Render, so that faults in ticks and layout show."""
    figure.canvas.draw()


def words(figure: Figure) -> str:
    """All text inside the panels."""
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


@pytest.fixture(scope="module")
def grid() -> pd.DataFrame:
    """Runs on a 5 x 5 grid with three seeds."""
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e6, 5), np.geomspace(1e5, 1e7, 5)))
    return surface(np.tile(N, 3), np.tile(D, 3), noise=0.003, seed=1, data_seed=np.repeat([0, 1, 2], 25))


@pytest.fixture(scope="module")
def found(grid):
    return fit(grid, resamples=200)


@pytest.fixture(scope="module")
def refused():
    """A fit of runs along one path, which bear no law, and the runs."""
    along = np.geomspace(1e5, 1e7, 12)
    table = surface(along, 20 * along, noise=0.01)
    return fit(table), table


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
    assert labels(figure) == {"1e11 (refused)", "4e11", "1.6e12", "6.4e12", "minimum, 95%"}
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["1e11 (refused)"].get_markerfacecolor() == "white"
    assert lines["4e11"].get_markerfacecolor() != "white"
    assert sum(line.get_linestyle() == "--" for line in figure.axes[0].lines) == 1


def test_paths_show_fit_band_and_the_published_slope() -> None:
    figure = plots.optimum_paths(fit(budgets_table(BUDGETS, seeds=3, noise=0.002), "isoflop"))
    drawn(figure)
    assert {"fit: C^0.50", "95% band", "Hoffmann et al.: C^0.49", "Hoffmann et al.: C^0.51"} <= labels(figure)


def test_intervals_of_budgets_are_labelled_with_their_own_level() -> None:
    narrow = fit(budgets_table(BUDGETS, seeds=3, noise=0.002), "isoflop", level=0.8)
    assert "minimum, 80%" in labels(plots.isoflop_curves(narrow))
    assert {"80% band", "minima, 80%"} <= labels(plots.optimum_paths(narrow))


def test_a_minimum_with_an_open_end_is_hollow() -> None:
    found = fit(budgets_table(BUDGETS, seeds=3, noise=0.002), "isoflop")
    first, *others = found.budgets
    loose = replace(first, N=replace(first.N, interval=(first.N.interval[0], np.nan)))
    lines = {
        line.get_label(): line for line in plots.optimum_paths(replace(found, budgets=(loose, *others))).axes[0].lines
    }
    assert lines["an end open"].get_markerfacecolor() == "white"
    assert lines["an end open"].get_xdata() == [first.C]
    assert len(lines["minima, 95%"].get_xdata()) == len(others)
    assert "an end open" not in labels(plots.optimum_paths(found))


def test_paths_of_a_refused_power_law_show_the_minima_alone() -> None:
    figure = plots.optimum_paths(fit(budgets_table(BUDGETS[:2], seeds=2, noise=0.002), "isoflop"))
    drawn(figure)
    assert not any(label.startswith("fit") for label in labels(figure))
    assert "minima, 95%" in labels(figure)


def test_residuals_are_percent_of_the_fitted_loss() -> None:
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e6, 4), np.geomspace(1e5, 1e7, 4)))
    table = surface(N, D, noise=0.01)
    table["cell"] = [f"c{i}" for i in range(len(table))]
    figure = plots.residuals(fit(table), table)
    drawn(figure)
    points = figure.axes[0].collections[-1].get_offsets()
    assert len(points) == 16
    assert 0.1 < np.abs(points[:, 1]).max() < 5


def test_residuals_of_a_law_without_compute_stand_over_its_own_variable() -> None:
    losses = np.linspace(2.0, 5.0, 12)
    errors = ERROR({"loss": losses}, {"eps": 0.85, "k": 2.0, "g": 0.75})
    table = pd.DataFrame({"loss": losses, "error": errors * np.exp(0.01 * np.sin(9 * losses))})
    figure = plots.residuals(fit(table, "error", resamples=20), table)
    drawn(figure)
    assert figure.axes[0].get_xlabel() == "loss (nats per token)"
    assert "error" in figure.axes[0].get_ylabel()
    points = figure.axes[0].collections[-1].get_offsets()
    assert np.allclose(points[:, 0], losses)
    assert 0.2 < np.abs(points[:, 1]).max() < 2.0
    assert len(figure.axes) == 1  # no bar of sizes where there are none


def test_residuals_leave_out_what_the_fit_left_out(grid) -> None:
    table = grid.assign(loss=grid["loss"].where(grid.index != 7))
    figure = plots.residuals(fit(table, resamples=20), table)
    assert len(figure.axes[0].collections[-1].get_offsets()) == len(grid) - 1


def test_frontier_is_the_least_loss_at_each_compute(grid, found) -> None:
    figure = plots.frontier(found, grid)
    drawn(figure)
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    C, loss = lines["least loss (chinchilla)"].get_data()
    assert loss == pytest.approx(closed_form(C, found.solved).loss, rel=1e-6)
    assert C[[0, -1]] == pytest.approx([grid["C"].min(), grid["C"].max()])
    beyond = lines["beyond the runs"]
    assert beyond.get_linestyle() == "--"
    assert beyond.get_xdata()[[0, -1]] == pytest.approx([grid["C"].max(), 10 * grid["C"].max()])
    assert lines[f"floor E = {found.params['E']:.3g}"].get_ydata()[0] == found.params["E"]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() < np.min(beyond.get_ydata()) < closed_form(band[:, 0].max(), LAW).loss * 1.05
    assert "95% band" in labels(figure)


def test_surface_shows_contours_runs_equal_compute_and_the_best_split(grid, found) -> None:
    figure = plots.surface(found, grid)
    drawn(figure)
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert (lines["runs"].get_xdata() == grid["N"]).all()
    N, D = lines["best split"].get_data()
    assert pytest.approx(closed_form(6 * N * D, found.solved).N, rel=1e-4) == N
    contours = next(c for c in axes.collections if hasattr(c, "levels"))
    assert len(contours.levels) >= 5
    for level, path in zip(contours.levels, contours.get_paths()):
        if len(path.vertices):
            on = CHINCHILLA({"N": path.vertices[:, 0], "D": path.vertices[:, 1]}, found.solved)
            assert on == pytest.approx(level, rel=2e-3)
    for line in (line for line in axes.lines if line.get_color() == "#767676" and len(line.get_xdata())):
        assert np.ptp(line.get_xdata() * line.get_ydata()) < 1e-6 * np.max(line.get_xdata() * line.get_ydata())


@pytest.mark.parametrize("name", ["frontier", "surface"])
def test_refused_law_is_not_drawn_but_its_runs_are(name, refused) -> None:
    figure = getattr(plots, name)(*refused)
    drawn(figure)
    assert "refuses the law" in words(figure)
    assert not {"best split", "least loss (chinchilla)", "beyond the runs"} & labels(figure)
    assert any(len(c.get_offsets()) == 12 for c in figure.axes[0].collections) or "runs" in labels(figure)


@pytest.mark.parametrize("name", ["frontier", "surface"])
def test_pictures_of_the_split_refuse_other_laws(name) -> None:
    table = budgets_table(BUDGETS, noise=0.002)
    for law in ("isoflop", "kaplan_N"):
        with pytest.raises(InputError, match="law of N and D"):
            getattr(plots, name)(fit(table, law, resamples=20), table)


def test_profile_curves_mark_limit_interval_and_open_ends(grid) -> None:
    steep = surface(grid["N"], grid["D"], {"E": 0.3, "A": 60, "B": 150, "alpha": 0.2, "beta": 0.2}, noise=0.02)
    profiles = [profile(t, "chinchilla", p, points=9) for t, p in ((steep, "E"), (grid, "alpha"), (grid, "B"))]
    assert profiles[0].open_ends == (True, False)
    figure = plots.profile_curves(profiles)
    drawn(figure)
    assert [axes.get_xlabel() for axes in figure.axes] == ["E (nats per token)", "alpha", "B"]
    assert [bool(axes.texts) for axes in figure.axes] == [True, False, False]
    assert "open" in words(figure)
    for axes, own in zip(figure.axes, profiles):
        curve = next(line for line in axes.lines if line.get_label() == "gaussian")
        assert (curve.get_ydata() == own.drop).all()
        assert any(np.allclose(line.get_ydata(), own.limit) for line in axes.lines)
        shade = axes.patches[0].get_extents().transformed(axes.transData.inverted())
        if not any(own.open_ends):
            assert (shade.x0, shade.x1) == pytest.approx(own.interval)


def test_profiles_of_one_parameter_share_a_panel(grid, refused) -> None:
    kinds = ("gaussian", "student")
    figure = plots.profile_curves([profile(grid, "chinchilla", "alpha", likelihood=k, points=5) for k in kinds])
    drawn(figure)
    assert len(figure.axes) == 1
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"limit, 95%", *kinds}
    nothing = plots.profile_curves([profile(refused[1], "chinchilla", "alpha")])
    drawn(nothing)
    assert "refused" in words(nothing)


def test_pair_plot_shows_draws_values_and_correlations(found) -> None:
    figure = plots.pair_plot(found)
    drawn(figure)
    names = list(CHINCHILLA.names)
    panels = np.array(figure.axes).reshape(5, 5)
    assert [axes.get_xlabel() for axes in panels[-1]] == ["E (nats per token)", *names[1:]]
    assert [axes.get_xscale() for axes in panels[-1]] == ["linear", "log", "log", "linear", "linear"]
    draws = panels[3, 1].lines[0]  # alpha over A
    assert (draws.get_xdata() == found.draws["A"]).all()
    assert (draws.get_ydata() == found.draws["alpha"]).all()
    both = np.corrcoef(np.log(found.draws["A"]), found.draws["alpha"])[0, 1]
    assert panels[1, 3].texts[0].get_text() == f"{both:.2f}"
    ends = sorted(float(line.get_xdata()[0]) for line in panels[4, 4].lines)
    assert ends == pytest.approx(sorted((*found.intervals["beta"], found.params["beta"])))


def test_pair_plot_greys_what_is_refused_and_needs_draws(grid, refused) -> None:
    steep = surface(grid["N"], grid["D"], {"E": 0.3, "A": 60, "B": 150, "alpha": 0.2, "beta": 0.2}, noise=0.02)
    unseen = fit(steep, resamples=60)
    assert np.isnan(unseen.params["E"])
    assert np.isfinite(unseen.params["alpha"])
    figure = plots.pair_plot(unseen)
    drawn(figure)
    panels = np.array(figure.axes).reshape(5, 5)
    assert to_hex(panels[0, 0].patches[0].get_facecolor()) == "#767676"
    assert to_hex(panels[3, 3].patches[0].get_facecolor()) == "#3b6fb6"
    with pytest.raises(InputError, match="no draws"):
        plots.pair_plot(refused[0])


def test_envelope_stands_out_of_the_curves(good_store) -> None:
    curves = load_curves("demo", good_store)
    known = curves[curves["val_loss"].notna()]
    best = known.loc[known.groupby("N")["val_loss"].idxmin()]
    points = pd.DataFrame({"C": best["flops"], "N": best["N"], "D": best["tokens"], "loss": best["val_loss"]})
    figure = plots.envelope(curves, points)
    drawn(figure)
    axes = figure.axes[0]
    assert len(axes.lines) == curves["cell"].nunique()
    assert {line.get_color() for line in axes.lines} == {"#b4b4b4"}
    assert np.allclose(axes.collections[0].get_offsets(), points[["C", "loss"]])
    assert len({to_hex(c) for c in axes.collections[0].get_facecolors()}) == points["N"].nunique()
    drawn(plots.envelope(curves, points.iloc[:0]))


def test_backtest_lines_are_mean_errors_and_misses_are_hollow() -> None:
    rows = [
        ("chinchilla", 1e12, 2.0, 0.01, True, True),
        ("chinchilla", 2e12, 2.0, -0.03, False, False),
        ("chinchilla", 1e12, 4.0, 0.04, True, False),
        ("kaplan", 1e12, 2.0, 0.08, False, False),
        ("kaplan", 1e12, 4.0, np.nan, None, False),
    ]
    scores = pd.DataFrame(rows, columns=["law", "cut", "ratio", "error", "inside", "chosen"])
    figure = plots.backtest(scores, noise=0.005)
    drawn(figure)
    axes = figure.axes[0]
    means = [line.get_ydata() for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata())]
    assert means[0] == pytest.approx([2.0, 4.0])
    assert means[1] == pytest.approx([8.0])
    assert means[2][0] == pytest.approx(0.5 * np.sqrt(2 / np.pi))
    dots = [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata()) == 1]
    hollow = [float(d.get_ydata()[0]) for d in dots if d.get_markerfacecolor() == "white"]
    ringed = [float(d.get_ydata()[0]) for d in dots if d.get_markerfacecolor() == "none"]
    assert hollow == pytest.approx([3.0, 8.0])
    assert ringed == pytest.approx([1.0])
    assert {"chinchilla", "kaplan", "noise alone"} <= labels(figure)


def test_forecast_picture(good_store) -> None:
    figure = plots.forecast(forecast_dearest(load_runs("demo", good_store)))
    drawn(figure)
    assert labels(figure) == {"measured", "forecast, 95%", "found N*", "forecast N*, 95%"}


def test_pictures_of_one_size_or_nothing_do_not_crash() -> None:
    one = fit(budgets_table(BUDGETS[:1]), "isoflop")
    for figure in (plots.isoflop_curves(one), plots.optimum_paths(one)):
        drawn(figure)
    table = surface(np.full(9, 1e5), np.geomspace(1e5, 1e7, 9))
    table["cell"] = [f"c{i}" for i in range(9)]
    drawn(plots.residuals(fit(table), table))


def test_no_global_matplotlib_state_is_touched() -> None:
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.floats(-6, 24), st.floats(0.05, 12), st.integers(3, 14))
def test_ticks_are_few_inside_and_apart(start: float, decades: float, most: int) -> None:
    low, high = 10.0**start, 10.0 ** (start + decades)
    ticks = np.array(round_numbers(low, high, most))
    assert 1 <= len(ticks) <= most + 1
    assert (ticks >= low).all()
    assert (ticks <= high).all()
    assert (np.diff(np.log(ticks)) > 0.99 * np.log(high / low) / most).all()


def test_scale_is_logarithmic_for_factors_and_not_for_what_runs_into_zero() -> None:
    assert axis_scale(10.0, 30.0) == "log"
    assert axis_scale(1.7, 1.9) == "linear"
    assert axis_scale(1e-15, 0.4) == "linear"
    assert axis_scale(-1.0, 3.0) == "linear"


def test_kinds_differ_without_colour() -> None:
    """In grey, marker and dash still tell the laws apart."""
    assert len({(marker, dash) for _, marker, dash in KINDS}) == len(KINDS)
