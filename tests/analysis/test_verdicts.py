"""A refusal takes away exactly what it names, everywhere."""

import json
import math

import numpy as np

from analysis import fit
from analysis.verdicts import NAN, Budget, Estimate, Fit, Verdict, budget_name, clean, extrapolation, narrow_span
from tests.analysis.synthetic import BUDGETS, budgets_table, codes


def example(*verdicts: Verdict) -> Fit:
    known = Estimate(value=2.0, interval=(1.0, 3.0))
    budget = {"sizes": (1.0, 2.0, 3.0), "losses": (3.0, 2.0, 3.0), "runs": (1, 1, 1), "center": 0.0}
    budgets = tuple(
        Budget(budget=C, C=C, curve=(1.0, 0.0, 1.0), accepted=True, N=known, D=known, loss=known, **budget)
        for C in (1e15, 2e15)
    )
    return Fit(
        law="isoflop",
        loss="loss",
        params={"one": 1.0, "two": 2.0},
        intervals={"one": (0.0, 2.0), "two": (NAN, 3.0)},
        verdicts=verdicts,
        n_runs=3,
        planned=4,
        finished=3,
        excluded=({"cell": "x", "reason": "y"},),
        noise={"sd": math.inf},
        decisions={"N_exponent": known, "targets": [{"C": 1e16, "N": known}, {"C": 1e17, "N": known}]},
        provenance={},
        diagnostics={"raw": np.float64(7.0)},
        budgets=budgets,
        draws={"one": np.ones(3)},
    ).settle()


def refusal(scope, target) -> Verdict:
    return Verdict("off_centre", "refuse", scope, target, "because")


def test_without_refusals_nothing_is_lost() -> None:
    fit = example(Verdict("few_steps", "caution", "fit", None, "mind this"))
    assert not fit.refused
    assert fit.params == {"one": 1.0, "two": 2.0}
    assert all(b.accepted and b.N.value == 2.0 for b in fit.budgets)


def test_refused_parameter_alone_is_nulled() -> None:
    written = example(refusal("parameter", "one")).to_json()
    assert written["params"] == {"one": None, "two": 2.0}
    assert written["intervals"] == {"one": [None, None], "two": [None, 3.0]}
    assert all(b["accepted"] for b in written["budgets"])
    assert written["decisions"]["N_exponent"]["value"] == 2.0


def test_refused_budget_alone_is_nulled() -> None:
    written = example(refusal("budget", budget_name(2e15))).to_json()
    assert [b["accepted"] for b in written["budgets"]] == [True, False]
    assert [b["N"]["value"] for b in written["budgets"]] == [2.0, None]
    assert written["budgets"][1]["losses"] == [3.0, 2.0, 3.0]  # what was measured stays
    assert written["params"] == {"one": 1.0, "two": 2.0}


def test_refused_target_alone_is_nulled() -> None:
    targets = example(refusal("decision", budget_name(1e17))).to_json()["decisions"]["targets"]
    assert [t["N"]["value"] for t in targets] == [2.0, None]
    assert targets[1]["C"] == 1e17


def test_refusal_of_all_parameters_leaves_the_budgets() -> None:
    fit = example(refusal("parameter", None))
    assert not fit.refused
    assert np.isnan(list(fit.params.values())).all()
    assert all(b.accepted for b in fit.budgets)


def test_refused_fit_has_no_number_left_but_keeps_the_raw_output() -> None:
    fit = example(refusal("fit", None))
    written = fit.to_json()
    assert fit.refused
    assert written["refused"]
    assert set(written["params"].values()) == {None}
    assert not any(b["accepted"] or b["N"]["value"] for b in written["budgets"])
    assert [t["N"]["value"] for t in written["decisions"]["targets"]] == [None, None]
    assert written["diagnostics"] == {"raw": 7.0}
    assert not fit.draws


def test_json_is_strict() -> None:
    text = json.dumps(example().to_json(), allow_nan=False)
    assert json.loads(text)["noise"] == {"sd": None}


def test_clean_takes_any_nest() -> None:
    nest = {"a": (np.array([1.0, np.nan]), np.int64(3)), "b": [np.bool_(True), None, "x"]}
    assert clean(nest) == {"a": [[1.0, None], 3], "b": [True, None, "x"]}


def test_estimates_print_for_people() -> None:
    assert str(Estimate(value=1234.5, interval=(1000.0, NAN))) == "1234 (1000 .. open)"
    assert str(Estimate()) == "-"


def test_extrapolation_is_cautioned_then_refused() -> None:
    assert extrapolation(9e15, 1e15) == []
    assert [v.severity for v in extrapolation(5e16, 1e15)] == ["caution"]
    assert [v.severity for v in extrapolation(2e18, 1e15)] == ["refuse"]


def test_far_below_the_cheapest_run_is_as_far_as_above_the_dearest() -> None:
    assert extrapolation(2e13, 1e15, 1e14) == []
    (near,), (far,) = (extrapolation(C, 1e15, 1e14) for C in (5e12, 5e10))
    assert (near.severity, far.severity) == ("caution", "refuse")
    assert near.message.startswith("5e12 FLOPs is 1/20 of the cheapest run;")
    table = budgets_table(BUDGETS, noise=0.001)
    for law in ("isoflop", "chinchilla"):
        found = fit(table, law, targets=[1e7], resamples=20)
        assert np.isnan(found.decisions["targets"][0]["N"].value)
        assert "extrapolation" in codes(found, "refuse")


def test_narrow_span_of_compute_is_cautioned() -> None:
    assert narrow_span(np.array([1e12, 1e14])) == []
    assert [v.code for v in narrow_span(np.array([1e12, 1e13]))] == ["narrow_span"]
