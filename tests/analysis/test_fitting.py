"""The Chinchilla fit from end to end: what it recovers, how sure it says it is, and what it refuses."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import fit
from analysis.allocation import optimum
from analysis.laws import CHINCHILLA
from cluster.arguments import fit_options
from sweeps.errors import InputError
from tests.analysis.closed import closed_form
from tests.analysis.synthetic import LAW, codes, surface

BES = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
N, D = (v.ravel() for v in np.meshgrid([5e7, 2e8, 8e8, 3.2e9], [1e9, 4e9, 1.6e10, 6.4e10]))


def replicated(noise: float = 0.003, seeds: int = 2, law=BES, seed: int = 0) -> pd.DataFrame:
    table = surface(np.tile(N, seeds), np.tile(D, seeds), law, noise=noise, seed=seed)
    return table.assign(seed=np.repeat(np.arange(seeds), len(N)))


def test_exact_surface_is_recovered_through_the_front_door() -> None:
    found = fit(surface(N, D, BES), targets=[1e21])
    assert found.params == pytest.approx(BES, rel=1e-4)
    assert found.decisions["N_exponent"].value == pytest.approx(0.512612, abs=1e-5)
    assert found.decisions["D_exponent"].value == pytest.approx(1 - 0.512612, abs=1e-5)
    (target,) = found.decisions["targets"]
    assert [target[k].value for k in ("N", "D", "loss")] == pytest.approx([2.778459e9, 5.998528e10, 2.305529], rel=1e-4)


def test_clean_replicated_runs_raise_no_verdict() -> None:
    found = fit(replicated(), targets=[1e21])
    assert codes(found) == set()
    assert found.noise["source"] == "seeds"
    assert found.provenance["settings"]["threshold"] == pytest.approx(1.5 * found.noise["sd"])
    for name, value in BES.items():
        low, high = found.intervals[name]
        assert low < found.params[name] < high
        assert low < value < high
    (target,) = found.decisions["targets"]
    assert target["N"].interval[0] < float(closed_form(1e21, BES).N) < target["N"].interval[1]


def test_a_fit_of_the_loss_itself_takes_its_own_scatter_for_the_noise_and_says_so() -> None:
    found = fit(replicated(), raw=True, resamples=20)
    (said,) = [v.message for v in found.verdicts if v.code == "noise_from_residuals"]
    assert "in its unit" in said
    assert "no seeds are replicated" not in said, "they are"
    assert 0.005 < found.noise["sd"] < 0.015, "in nats, of losses of two to four"
    with pytest.raises(InputError, match="give one of them"):
        fit(replicated(), raw=True, noise=0.003)


def test_json_of_a_fit_is_complete_and_strict() -> None:
    written = fit(replicated(), targets=[1e21]).to_json()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert set(written) >= {"law", "params", "intervals", "verdicts", "n_runs", "excluded", "planned", "finished"}
    assert set(written) >= {"noise", "decisions", "provenance", "diagnostics"}
    assert written["diagnostics"]["params"]["E"] > 0
    assert len(written["provenance"]["cells"]) == 32


def test_exponents_follow_the_counter_of_the_runs() -> None:
    table = surface(N, D, BES)
    table["C"] = (6 * table["N"] + 2e5 * table["N"] ** 0.5) * table["D"]
    found = fit(table)
    assert found.decisions["N_exponent_6nd"].value == pytest.approx(0.512612, abs=1e-5)
    low, high = (optimum(C, BES, lambda n: 6 * n + 2e5 * n**0.5) for C in (table["C"].min(), table["C"].max()))
    exact = np.log(high.N / low.N) / np.log(table["C"].max() / table["C"].min())
    assert found.decisions["N_exponent"].value == pytest.approx(exact, abs=0.005)
    assert abs(exact - 0.512612) > 0.005


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    inside, count = {"alpha": 0, "E": 0}, 50
    for seed in range(count):
        found = fit(replicated(noise=0.004, seed=seed), resamples=150, seed=seed)
        for name in inside:
            low, high = found.intervals[name]
            inside[name] += low <= BES[name] <= high
    assert all(0.87 <= hits / count <= 1.0 for hits in inside.values()), inside


def test_outlier_hardly_moves_the_fit() -> None:
    table = replicated(noise=0.002)
    spoiled = table.copy()
    spoiled.loc[5, "loss"] *= 1.3
    assert fit(spoiled, noise=0.002).params["alpha"] == pytest.approx(fit(table).params["alpha"], abs=0.02)


def test_residuals_stand_in_for_seeds_and_keep_their_tails() -> None:
    table = surface(N, D, BES, noise=0.004, seed=2)
    found = fit(table)
    assert codes(found) == {"noise_from_residuals"}
    assert np.ptp(found.intervals["alpha"]) > 0.01


# --- refusals ----------------------------------------------------------------------------------------------------


def refusals(found) -> set[tuple[str, str, str | None]]:
    return {(v.code, v.scope, v.target) for v in found.verdicts if v.severity == "refuse"}


def test_five_runs_are_too_few_for_five_parameters() -> None:
    found = fit(surface(N[:5], D[:5], BES), targets=[1e21])
    assert refusals(found) == {("too_few_runs", "fit", None)}
    assert found.refused
    assert np.isnan(list(found.params.values())).all()
    assert np.isnan(found.decisions["targets"][0]["N"].value)
    json.dumps(found.to_json(), allow_nan=False)


def test_an_empty_table_is_refused() -> None:
    assert refusals(fit(surface(N[:0], D[:0], BES))) == {("too_few_runs", "fit", None)}
    assert not fit(surface(N[:0], D[:0], BES), "isoflop").budgets


def test_two_sizes_show_no_curvature() -> None:
    sizes, tokens = (v.ravel() for v in np.meshgrid([5e7, 8e8], np.geomspace(1e9, 1e11, 6)))
    assert refusals(fit(surface(sizes, tokens, BES))) == {("too_few_levels", "fit", None)}


def test_runs_on_one_path_cannot_be_told_apart() -> None:
    sizes = np.geomspace(1e7, 1e10, 12)
    assert refusals(fit(surface(sizes, 20 * sizes, BES, noise=0.001))) == {("one_path", "fit", None)}


def test_a_term_that_is_not_there_is_refused_with_its_decisions() -> None:
    law = BES | {"A": 1e-9}
    found = fit(replicated(law=law, noise=0.001), targets=[1e21])
    assert {("at_bound", "parameter", "alpha"), ("undetermined_law", "decision", None)} <= refusals(found)
    assert np.isnan([found.params["A"], found.params["alpha"]]).all()
    assert found.params["beta"] == pytest.approx(BES["beta"], abs=0.03)
    assert np.isnan(found.decisions["N_exponent"].value)
    assert np.isnan(found.decisions["targets"][0]["N"].value)
    assert np.isfinite(found.diagnostics["params"]["A"])  # the raw output stays


def test_a_floor_that_is_not_seen_is_refused_alone() -> None:
    found = fit(replicated(law=BES | {"E": 1e-6}))
    assert refusals(found) == {("floor_unseen", "parameter", "E")}
    assert np.isnan(found.params["E"])
    assert np.isfinite(found.params["alpha"])


def test_target_without_an_interior_optimum_is_refused_alone() -> None:
    found = fit(replicated(), targets=[1.0, 1e21])
    assert refusals(found) == {("no_optimum", "decision", "1e0"), ("extrapolation", "decision", "1e0")}
    none, some = found.decisions["targets"]
    assert np.isnan(none["N"].value)
    assert some["N"].value > 1e9


def test_target_too_far_is_refused_alone() -> None:
    found = fit(replicated(), targets=[1e26])
    assert refusals(found) == {("extrapolation", "decision", "1e26")}


def test_families_and_corpora_are_not_mixed() -> None:
    table = replicated().assign(family="llama", corpus="a", tokenizer="bytes", context=128)
    assert not fit(table).refused
    for column, other, code in (
        ("family", "gpt2", "mixed_families"),
        ("corpus", "b", "mixed_losses"),
        ("tokenizer", "bpe", "mixed_losses"),
        ("context", 256, "mixed_losses"),
    ):
        mixed = table.copy()
        mixed.loc[3, column] = other
        for law in ("chinchilla", "isoflop"):
            assert (code, "fit", None) in refusals(fit(mixed, law))


def test_bits_per_byte_may_be_mixed() -> None:
    table = replicated().assign(tokenizer="bytes")
    table.loc[3, "tokenizer"] = "bpe"
    table["val_bpb_final"] = table["loss"] / np.log(2)
    found = fit(table, loss="val_bpb_final")
    assert not found.refused
    assert found.params["E"] == pytest.approx(BES["E"] / np.log(2), rel=0.05)


# --- cautions and bad input --------------------------------------------------------------------------------------


def test_narrow_span_of_compute_is_cautioned() -> None:
    sizes, tokens = (v.ravel() for v in np.meshgrid([2e8, 3e8, 4.5e8, 6e8], [4e9, 6e9, 9e9, 1.2e10]))
    assert "narrow_span" in codes(fit(surface(sizes, tokens, BES)), "caution")


def test_open_exponent_is_said() -> None:
    found = fit(replicated(law=BES | {"A": 3.0}, noise=0.02))
    assert codes(found) & {"open_interval", "at_bound"}


@pytest.mark.parametrize(
    "bad", [{"law": "chinchila"}, {"noise": -1.0}, {"threshold": 0.0}, {"targets": [np.nan]}, {"loss": "perplexity"}]
)
def test_bad_arguments_are_input_errors(bad) -> None:
    with pytest.raises(InputError):
        fit(replicated(), **bad)


@pytest.mark.parametrize(
    ("law", "fixed", "words"),
    [
        ("chinchilla", {"E": 0.0}, "E is fixed at 0; in chinchilla it must be a positive number.*without it is kaplan"),
        ("chinchilla", {"A": -1.0}, r"A is fixed at -1; .* must be a positive number\.$"),
        ("data_constrained", {"RD": 0.0}, "RD is fixed at 0; .* must be a positive number"),
        ("chinchilla", {"alpha": float("nan")}, "alpha is fixed at nan; it must be a finite number"),
        ("chinchilla", {"E": float("inf")}, "E is fixed at inf; it must be a finite number"),
        ("chinchilla", {"alpha": 50.0}, r"alpha is fixed at 50; chinchilla takes it from 0\.01 to 3\. Fix it there"),
        ("chinchilla", {"beta": -0.3}, r"beta is fixed at -0\.3; chinchilla takes it from 0\.01 to 3"),
        ("chinchilla", {"E": 50.0}, r"E is fixed at 50, above the lowest loss of these runs \([\d.]+\)"),
        ("chinchilla", BES, "nothing is left to fit"),
        ("chinchilla", {"alhpa": 0.3}, 'did you mean "alpha"'),
    ],
)
def test_parameters_are_only_fixed_at_values_that_they_can_have(law, fixed, words) -> None:
    with pytest.raises(InputError, match=words):
        fit(replicated().assign(U=1e9), law, fixed=fixed)


def test_an_option_of_zero_is_not_taken_for_one_that_was_not_given() -> None:
    options = fit_options("chinchilla", None, 0.0, 0, None, None, None, [], 0.95, 0)
    assert options == {"threshold": 0.0}
    with pytest.raises(InputError, match=r"threshold is 0\.0; it must be a positive number"):
        fit(replicated(), **options)
    assert fit_options("isoflop", None, None, 0, None, None, None, [], 0.95, 0) == {}


def test_missing_column_is_named_with_those_found() -> None:
    with pytest.raises(InputError, match=r"lacks D.*has .*N.*loss"):
        fit(replicated().drop(columns="D"))


def test_small_study_under_its_own_counter() -> None:
    sizes, tokens = (v.ravel() for v in np.meshgrid([5e3, 2e4, 8e4, 3.2e5], [2e5, 1e6, 5e6]))
    table = surface(np.tile(sizes, 2), np.tile(tokens, 2), LAW, noise=0.002).assign(seed=np.repeat([0, 1], 12))
    table["C"] = (6 * table["N"] + 5e4) * table["D"]
    found = fit(table)
    truth = CHINCHILLA({"N": 2e4, "D": 1e6}, LAW)
    assert CHINCHILLA({"N": 2e4, "D": 1e6}, found.params) == pytest.approx(truth, rel=0.003)


def test_weights_count_like_runs_that_stand_there_several_times() -> None:
    table = replicated(noise=0.004).assign(w=1.0)
    table.loc[:3, "w"] = 3.0
    again = [table.iloc[:4].assign(seed=seed) for seed in (2, 3)]  # of equal seeds they would be listed twice
    repeated = pd.concat([table, *again], ignore_index=True)
    options = {"threshold": 0.01, "noise": 0.004, "resamples": 50}
    weighted = fit(table, weights="w", **options)
    assert weighted.params == pytest.approx(fit(repeated, **options).params, rel=1e-4)
    assert weighted.params["B"] != pytest.approx(fit(table, **options).params["B"], rel=1e-3)
    with pytest.raises(InputError, match="must be positive"):
        fit(table.assign(w=-1.0), weights="w")
    with pytest.raises(InputError, match="must be positive"):
        fit(table.assign(w="heavy"), weights="w")
