"""The laws against published numbers, and what must hold of every law object."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.laws import CHINCHILLA, LAWS, find_law, log_sum, smaller, tissue_areas, worth
from sweeps.errors import InputError

BES = dict(CHINCHILLA.published["Besiroglu et al. 2024"])
TEX = dict(CHINCHILLA.published["Hoffmann et al. 2022, TeX source"])
ROUNDED = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
MUENNIGHOFF = dict(LAWS["data_constrained"].published["Muennighoff et al. 2023"])
TIED = dict(LAWS["chinchilla_tied"].published["Muennighoff et al. 2023"])


def value(law: str, source: str | dict[str, float], **variables: float) -> float:
    form = find_law(law)
    return float(form(variables, form.published[source] if isinstance(source, str) else source))


# --- losses of N and D -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "large", "small"),
    [(ROUNDED, 1.936645, 2.580048), (TEX, 1.920846, 2.530668), (BES, 1.973882, 2.530050)],
)
def test_point_losses_of_chinchilla_laws(params, large, small) -> None:
    assert value("chinchilla", params, N=70e9, D=1.4e12) == pytest.approx(large, abs=1e-6)
    assert value("chinchilla", params, N=1e9, D=20e9) == pytest.approx(small, abs=1e-6)


def test_point_losses_of_the_tied_law() -> None:
    assert value("chinchilla_tied", TIED, N=70e9, D=1.4e12) == pytest.approx(2.024597, abs=1e-6)
    assert value("chinchilla_tied", TIED, N=1e9, D=20e9) == pytest.approx(2.564635, abs=1e-6)


def test_log_loss_of_the_notebook_refit() -> None:
    refit = {"E": np.exp(0.59711196), "A": np.exp(6.17795598), "B": np.exp(7.64273236)}
    refit |= {"alpha": 0.34781303, "beta": 0.36585412}
    assert float(CHINCHILLA.log_response({"N": 1e9, "D": 2e10}, refit)) == pytest.approx(0.9278869, abs=1e-7)


def test_rounding_an_exponent_shifts_the_data_term() -> None:
    """Why constants of two digits are not for evaluation: .2849 as .28 is 13% of B / D^beta at 1e11 tokens."""
    kept, rounded = (value("chinchilla", TEX | {"E": 0.0, "A": 0.0, "beta": b}, N=1.0, D=1e11) for b in (0.2849, 0.28))
    assert rounded / kept - 1 == pytest.approx(0.132140, abs=1e-6)


@pytest.mark.parametrize(
    ("law", "source", "variables", "loss"),
    [
        ("kaplan_N", "Kaplan et al. 2020", {"N": 1e8}, 2.829963),
        ("kaplan_N", "Kaplan et al. 2020", {"N": 1.5e9}, 2.303551),
        ("kaplan_D", "Kaplan et al. 2020", {"D": 1e9}, 2.815642),
        ("kaplan_C", "Kaplan et al. 2020, C_min", {"C": 8.64e19}, 2.658080),
        ("kaplan", "Kaplan et al. 2020", {"N": 1e8, "D": 1e9}, 2.956734),
        ("kaplan", "Kaplan et al. 2020", {"N": 1e9, "D": 23e9}, 2.367307),
        ("kaplan_N", "Clark et al. 2022, dense", {"N": 1e8}, 2.710748),
    ],
)
def test_kaplan_losses(law, source, variables, loss) -> None:
    assert value(law, source, **variables) == pytest.approx(loss, abs=1e-6)


def test_sums_of_kaplan_terms_are_a_law_of_terms_without_a_floor() -> None:
    """L(N, S_min) = (Nc / N)^.077 + (Sc / S_min)^.76, its constants from memory: a test of the formula alone."""
    params = {"E": 0.0, "A": 6.5e13**0.077, "alpha": 0.077, "B": 2.1e3**0.76, "beta": 0.76}
    assert value("chinchilla", params, N=1e8, D=1e4) == pytest.approx(3.108227, abs=1e-6)


def test_kaplan_tends_to_its_one_dimensional_limits() -> None:
    params = LAWS["kaplan"].published["Kaplan et al. 2020"]
    assert value("kaplan", dict(params), N=1e8, D=1e40) == pytest.approx((6.4e13 / 1e8) ** 0.076, rel=1e-9)
    assert value("kaplan", dict(params), N=1e60, D=1e9) == pytest.approx((1.8e13 / 1e9) ** 0.103, rel=1e-4)


def test_gadre_loss_in_both_of_its_forms() -> None:
    params = LAWS["gadre"].published["RedPajama"]
    assert value("gadre", "RedPajama", N=1.4e9, D=640 * 1.4e9) == pytest.approx(2.525071, abs=1e-6)
    N, M = 1.4e9, 640.0
    C = 6 * N * M * N
    direct = params["E"] + (params["a"] * M ** params["h"] + params["b"] * M ** -params["h"]) * C ** -params["h"]
    assert value("gadre", "RedPajama", N=N, D=M * N) == pytest.approx(direct, rel=1e-12)


# --- repeated data -----------------------------------------------------------------------------------------------

EPOCHS = np.array([1, 2, 4, 8, 16, 40, 100.0])


def test_what_repeated_data_are_worth() -> None:
    expected = [1, 1.968199, 3.725673, 6.624119, 10.582457, 15.167465, 16.363035]
    assert worth(1.0, EPOCHS - 1, MUENNIGHOFF["RD"]) == pytest.approx(expected, rel=1e-6)
    assert worth(250e9, 3.0, MUENNIGHOFF["RD"]) == pytest.approx(931.418e9, rel=1e-6)
    step = 1e-5
    slope = worth(1.0, EPOCHS - 1 + step, MUENNIGHOFF["RD"]) - worth(1.0, EPOCHS - 1 - step, MUENNIGHOFF["RD"])
    marginal = [1, 0.937080, 0.822867, 0.634507, 0.377267, 0.079303, 0.001607]
    assert slope / (2 * step) == pytest.approx(marginal, abs=1e-6)


@pytest.mark.parametrize(("unique", "loss"), [(178e9, 2.192164), (44e9, 2.207302)])
def test_losses_on_repeated_data(unique, loss) -> None:
    assert value("data_constrained", MUENNIGHOFF, N=8.7e9, D=178e9, U=unique) == pytest.approx(loss, abs=1e-6)


def test_one_epoch_of_a_size_that_it_can_use_is_plain_chinchilla() -> None:
    plain = {k: MUENNIGHOFF[k] for k in BES}
    for N, D in ((1e8, 1e11), (1e9, 1e12)):
        assert value("data_constrained", MUENNIGHOFF, N=N, D=D, U=D) == pytest.approx(
            value("chinchilla", plain, N=N, D=D), rel=1e-12
        )


def test_usable_parameters_are_the_optimal_ones_for_the_unique_tokens() -> None:
    """U_N = 2.243407e9 for 44e9 unique tokens: below it more unique tokens change nothing, above it they do."""
    slow = MUENNIGHOFF | {"RN": 0.05}  # excess parameters are worth almost nothing
    at, twice = (value("data_constrained", slow, N=N, D=44e9, U=44e9) for N in (2.243407e9, 2 * 2.243407e9))
    plain = value("chinchilla", {k: slow[k] for k in BES}, N=2.243407e9 * 1.05, D=44e9)
    assert at - twice == pytest.approx(at - plain, rel=1e-4)


# --- experts, breaks, curves -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "losses"),
    [(1e8, (2.744146, 2.596153, 2.430530, 2.320403)), (1.3e9, (2.237357, 2.149630, 2.049779, 1.982337))],
)
def test_routed_losses(N, losses) -> None:
    for experts, loss in zip((1, 8, 64, 512), losses):
        assert value("clark", "S-BASE", N=N, experts=float(experts)) == pytest.approx(loss, abs=1e-6)


def test_saturated_expert_counts() -> None:
    """The law with b = -1 alone is 1 / Eh."""
    shape = dict(LAWS["clark"].published["S-BASE"]) | {"a": 0.0, "b": -1.0, "c": 0.0, "d": 0.0}
    for experts, count in ((1, 1.847), (8, 8.615246), (64, 53.768667), (512, 194.942016)):
        assert 1 / value("clark", shape, N=1e8, experts=float(experts)) == pytest.approx(count, rel=1e-6)


def test_broken_power_law_bends_once() -> None:
    params = {"a": 1.0, "b": 10.0, "c0": 0.2, "c1": 0.3, "d1": 100.0, "f1": 0.5}
    expected = [10.999850, 7.300163, 4.587943, 2.257047, 1.398101]
    assert find_law("bnsl:1")({"x": np.array([1, 10, 100, 1e3, 1e4])}, params) == pytest.approx(expected, abs=1e-6)


def test_a_break_without_a_change_of_slope_is_no_break() -> None:
    plain = {"a": 0.5, "b": 2.0, "c0": 0.3}
    flat = {"c1": 0.0, "d1": 10.0, "f1": 0.5, "c2": 0.0, "d2": 50.0, "f2": 2.0}
    x = {"x": np.array([1.0, 10.0, 100.0])}
    assert find_law("bnsl:2")(x, plain | flat) == pytest.approx([2.5, 1.502374, 1.002377], abs=1e-6)


def test_saturating_power_law() -> None:
    losses = find_law("saturating")({"x": np.array([1.0, 10.0, 100.0])}, {"E": 0.5, "A": 2.0, "alpha": 0.3})
    assert losses == pytest.approx([2.5, 1.502374, 1.002377], abs=1e-6)


def test_areas_under_a_schedule_and_the_loss_at_its_end() -> None:
    S1, S2 = tissue_areas(np.array([1, 1, 1, 1, 0.5, 0.25, 0]), decay=0.9)
    assert (S1[-1], S2[-1]) == pytest.approx((3.75, 2.08), rel=1e-12)
    loss = value("tissue", {"L0": 2.0, "A": 1.0, "alpha": 0.5, "C": 0.1}, S1=S1[-1], S2=S2[-1])
    assert loss == pytest.approx(2.308398, abs=1e-6)
    _, S2 = tissue_areas(np.array([1, 1, 1, 1, 0.5, 0.25, 0]), decay=0.999)
    assert S2[-1] == pytest.approx(2.2482505, abs=1e-7)
    assert len(S1) == 6  # one value a step


def test_a_constant_rate_has_no_annealing_area() -> None:
    S1, S2 = tissue_areas(np.full(101, 3e-4))
    assert S1[-1] == pytest.approx(0.03)
    assert not S2.any()


# --- tasks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "error"), [(3.0, 0.598280), (2.5, 0.487094), (2.2, 0.398597)])
def test_task_errors(loss, error) -> None:
    assert value("error", "RedPajama, 17 tasks", loss=loss) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(("loss", "accuracy"), [(1.2, 0.312380), (0.8, 0.625), (0.5, 0.893612)])
def test_ladder_accuracies(loss, accuracy) -> None:
    params = {"b": 0.25, "a": 0.75, "k": 6.0, "L0": 0.8}
    assert value("accuracy", params, loss=loss) == pytest.approx(accuracy, abs=1e-6)


# --- every law ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [*LAWS.values(), find_law("bnsl:1"), find_law("bnsl:4")], ids=lambda law: law.name)
def test_a_law_is_complete(law) -> None:
    assert find_law(law.name) == law
    assert law.source
    assert bool(law.terms) != (law.formula is not None)
    assert len(set(law.names)) == len(law.names)
    assert {name for term in law.terms for name in term.features} <= set(law.names)
    assert set(law.linear) <= {p.name for p in law.parameters if p.log}
    for p in law.parameters:
        inside = (0.0, 1.0) if p.position else (p.low, p.high)
        assert p.low < p.high
        assert all(inside[0] <= start <= inside[1] for start in p.starts)
        assert p.low > 0 or not p.log
        assert p.position in ("", *law.variables)


@pytest.mark.parametrize(
    ("law", "source"), [(law, source) for law in LAWS.values() for source in law.published], ids=lambda v: str(v)[:40]
)
def test_published_constants_name_the_parameters_and_lie_within_their_bounds(law, source) -> None:
    params = law.published[source]
    assert set(params) == set(law.names)
    for p in law.parameters:
        assert p.low < params[p.name] < p.high


def test_constants_that_were_never_checked_are_not_exported() -> None:
    """Constants of these laws are known from memory alone."""
    assert not LAWS["tissue"].published
    assert not LAWS["accuracy"].published


def test_an_unknown_law_is_refused_with_its_neighbours() -> None:
    with pytest.raises(InputError, match="chinchilla"):
        find_law("chinchila")
    for name in ("bnsl", "bnsl:0", "bnsl:9", "bnsl:x"):
        with pytest.raises(InputError, match="bnsl:<breaks>"):
            find_law(name)


@given(st.lists(st.floats(-700, 700), min_size=1, max_size=4))
def test_log_sum_is_stable(terms) -> None:
    assert float(log_sum(*terms)) == pytest.approx(float(np.logaddexp.reduce(terms)), rel=1e-12, abs=1e-12)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_smaller_passes_the_imaginary_part_on(a, b) -> None:
    low = complex(smaller(a + 1e-30j, b + 2e-30j))
    assert low.real == min(a, b)
    assert low.imag == (1e-30 if a < b else 2e-30)
