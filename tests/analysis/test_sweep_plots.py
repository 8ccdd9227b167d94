"""Pictures and answers of sweeps show every optimum that stands, no mark of a refused one, and every divergence."""

import re
from dataclasses import replace
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import audit, sensitivity
from analysis.sweep_page import answer, find_sweep, section
from analysis.sweep_plots import audit_plot, fans, heat_map, optimum_moves
from analysis.verdicts import Estimate
from tests.analysis.fans import RATES, SIZES, crossed, fan


@pytest.fixture(scope="module")
def sweep() -> pd.DataFrame:
    return fan(sizes=SIZES[:3], tokens=(5e7, 2e8))


def marks(figure: Figure, marker: str) -> int:
    """Points drawn with a marker, legends aside."""
    lines = [line for axes in figure.axes for line in axes.lines if line.get_marker() == marker]
    return sum(len(line.get_xdata()) for line in lines)  # type: ignore[arg-type]


def test_every_optimum_that_stands_is_marked_and_no_other(sweep: pd.DataFrame) -> None:
    found = sensitivity(sweep, resamples=100)
    picture = fans(found.optima)
    picture.canvas.draw()
    assert marks(picture, "D") == len(found.optima) == 6
    upper = sweep[sweep["learning_rate"] >= RATES[5]]  # the optimum lies below the rates that are left
    assert marks(fans(sensitivity(upper, resamples=100).optima), "D") == 0


def test_runs_that_diverged_stand_on_the_upper_edge(sweep: pd.DataFrame) -> None:
    lost = sweep["learning_rate"] == RATES[-1]
    table = sweep.assign(state=np.where(lost, "diverged", "finished"), loss=sweep["loss"].where(~lost))
    picture = fans(sensitivity(table, resamples=100).optima)
    picture.canvas.draw()
    assert marks(picture, "x") == 6
    for axes in [axes for axes in picture.axes if axes.lines]:
        crosses = [line for line in axes.lines if line.get_marker() == "x"]
        top = axes.get_ylim()[1]
        assert all(0.9 * top < y <= top for line in crosses for y in line.get_ydata())  # type: ignore[union-attr]


def test_panels_are_of_what_takes_fewer_values(sweep: pd.DataFrame) -> None:
    def panels(table: pd.DataFrame) -> list[str]:
        found = sensitivity(table, resamples=50)
        return [axes.get_title() for axes in fans(found.optima).axes if axes.get_title()]

    assert panels(sweep) == ["50M tokens", "200M tokens"]
    assert len(panels(fan(sizes=SIZES[:1], tokens=(5e7, 1e8, 2e8)))) == 1


def test_of_too_many_panels_the_dearest_are_shown_and_the_picture_says_so() -> None:
    tokens = tuple(5e7 * 2.0 ** np.arange(10))
    optima = sensitivity(fan(sizes=tuple(np.geomspace(1e7, 1e9, 11)), tokens=tokens, seeds=1), resamples=20).optima
    picture = fans(optima)
    titles = [axes.get_title() for axes in picture.axes if axes.get_title()]
    assert len(titles) == 8
    assert titles[0] == "200M tokens"
    assert titles[-1] == "25.6B tokens"
    assert picture.get_suptitle() == "the 8 dearest of 10 panels"
    assert fans([one for one in optima if one.group["D"] < 2e9]).get_suptitle() == ""


def test_a_dollar_in_a_name_is_no_formula(sweep: pd.DataFrame) -> None:
    name = r"cost_$5_\bad$"
    both = pd.concat([sweep.assign(family=name), sweep.assign(family="llama")])
    picture = fans(sensitivity(both, resamples=50).optima)
    picture.savefig(BytesIO())
    assert any(name in axes.get_title().replace(r"\$", "$") for axes in picture.axes)


def test_the_map_shows_the_optimum_and_the_region_around_it() -> None:
    found = sensitivity(crossed(SIZES[:1]), resamples=100)
    for one in found.optima:
        picture = heat_map(one)
        picture.canvas.draw()
        assert marks(picture, "D") == 1
    ellipse = next(line for line in picture.axes[0].lines if len(np.asarray(line.get_xdata())) > 100)
    low, high = found.optima[-1].plateau["learning_rate"]
    drawn = np.asarray(ellipse.get_xdata(), dtype=float)
    assert drawn.min() == pytest.approx(low, rel=0.01) or np.isnan(low)
    assert drawn.max() == pytest.approx(high, rel=0.01) or np.isnan(high)


def test_the_law_is_drawn_over_what_it_was_fitted_on(sweep: pd.DataFrame) -> None:
    found = sensitivity(sweep, resamples=100)
    picture = optimum_moves(found)
    picture.canvas.draw()
    for axes, name in zip(picture.axes, ("N", "D"), strict=True):
        (dashed,) = [line for line in axes.lines if line.get_linestyle() == "--"]
        x = np.asarray(dashed.get_xdata(), dtype=float)
        assert (x.min(), x.max()) == pytest.approx((sweep[name].min(), sweep[name].max()))
    refused = replace(found, laws={})
    assert not [line for axes in optimum_moves(refused).axes for line in axes.lines if line.get_linestyle() == "--"]


def test_the_law_is_drawn_at_the_middle_of_the_other_variable(sweep: pd.DataFrame) -> None:
    found = sensitivity(sweep, resamples=100)
    (law,) = found.laws.values()
    (dashed,) = [line for line in optimum_moves(found).axes[0].lines if line.get_linestyle() == "--"]
    x, y = (np.asarray(data, dtype=float) for data in (dashed.get_xdata(), dashed.get_ydata()))
    assert y == pytest.approx(law.predict(N=x, D=1e8)), "between 50M and 200M tokens"


def test_each_law_has_its_own_colour_marker_and_dash_and_is_named(sweep: pd.DataFrame) -> None:
    wide = fan(sizes=SIZES[:3], tokens=(5e7, 2e8), seed=1).assign(parametrisation="mup")
    both = pd.concat([sweep.assign(parametrisation="standard"), wide]).assign(family="llama")
    picture = optimum_moves(sensitivity(both, resamples=50))
    picture.canvas.draw()
    (legend,) = picture.legends
    assert {text.get_text() for text in legend.get_texts()} == {"mup", "standard"}
    for axes in picture.axes:
        points = {(line.get_color(), line.get_marker()) for line in axes.lines if line.get_marker() not in ("", "None")}
        lines = {
            (line.get_color(), line.get_linestyle()) for line in axes.lines if len(np.asarray(line.get_xdata())) > 2
        }
        for looks in (points, lines):
            assert len({colour for colour, _ in looks}) == len({form for _, form in looks}) == len(looks) == 2
    assert not optimum_moves(sensitivity(sweep, resamples=50)).legends, "one law needs no name"


def test_an_optimum_below_every_point_is_in_the_picture(sweep: pd.DataFrame) -> None:
    optima = sensitivity(sweep, resamples=50).optima
    low = [replace(one, loss=replace(one.loss, value=0.7 * one.loss.value)) for one in optima]
    for axes in fans(low).axes:
        diamonds = [float(np.asarray(line.get_ydata())[0]) for line in axes.lines if line.get_marker() == "D"]
        assert all(axes.get_ylim()[0] < y for y in diamonds)


def test_the_audit_rings_what_loses_more_than_noise() -> None:
    table = fan(sizes=SIZES, tokens=(1e8, 4e8), seeds=2).assign(family="llama", C=lambda t: 6 * t["N"] * t["D"])
    rate = RATES[np.abs(np.log(np.array(RATES) / 0.01)).argmin()]
    alike = table[np.isclose(table["learning_rate"], rate)]
    found = audit(alike, sensitivity(table))
    picture = audit_plot(found)
    picture.canvas.draw()
    (ring,) = [line for line in picture.axes[0].lines if line.get_marker() == "o"]
    assert len(np.asarray(ring.get_xdata())) == len(found.mistuned) > 0


def test_an_answer_names_the_range_of_optima_and_how_they_move(sweep: pd.DataFrame) -> None:
    found = find_sweep(sweep)
    assert found is not None
    text = answer(found)
    assert "over 6 combinations of size and length" in text
    assert "it moves as N<sup>-0." in text
    assert "nats on average" in text
    assert section(found).count("<tr>") >= 6
    assert find_sweep(sweep[sweep["learning_rate"].isin(RATES[3:5])]) is None, "two rates are no sweep"
    alone = find_sweep(sweep[(sweep["N"] == sweep["N"].max()) & (sweep["D"] == sweep["D"].max())])
    assert alone is not None
    assert re.match(r"The best learning rate is \S+ over 1 combination of size and length", answer(alone))


def test_a_power_whose_interval_holds_0_is_not_said_to_move_the_optimum(sweep: pd.DataFrame) -> None:
    found = sensitivity(sweep, resamples=50)
    ((key, law),) = found.laws.items()
    size, length = Estimate(value=-0.5, interval=(-0.6, -0.4)), Estimate(value=-0.14, interval=(-0.32, 0.04))
    text = answer(replace(found, laws={key: replace(law, powers={"N": size, "D": length})}))
    assert "it moves as N<sup>-0.50</sup> (-0.6 to -0.4); its power of D, -0.14 (-0.32 to 0.04), cannot" in text
    neither = answer(replace(found, laws={key: replace(law, powers={"N": length, "D": length})}))
    assert "its powers of N, -0.14 (-0.32 to 0.04), and of D, -0.14 (-0.32 to 0.04), cannot be told from 0." in neither
    assert "it moves" not in neither


def test_no_optimum_is_said_and_not_shown(sweep: pd.DataFrame) -> None:
    upper = sensitivity(sweep[sweep["learning_rate"] >= RATES[5]], resamples=100)
    assert upper.refused
    assert answer(upper).startswith("These runs settle no best learning rate: ")


def test_laws_of_settings_that_were_crossed_are_told_apart_on_the_page() -> None:
    runs = pd.concat([fan(weight_decay=decay, family="llama") for decay in (0.01, 0.1)], ignore_index=True)
    found = sensitivity(runs, resamples=50)
    for decay in ("0.01", "0.1"):
        assert f"<td>llama weight_decay={decay}</td>" in section(found)
        assert f" under weight_decay={decay}" in answer(found)
    assert " under " not in answer(sensitivity(fan(family="llama"), resamples=50))


def test_optima_of_two_parametrisations_are_counted_as_such() -> None:
    runs = pd.concat([fan(parametrisation=kind) for kind in ("mup", "standard")], ignore_index=True)
    assert "over 10 combinations of size, length and parametrisation" in answer(sensitivity(runs, resamples=50))
