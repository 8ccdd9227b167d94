"""A study keeps the fits that it was first planned with, tells when they have changed, and takes new ones when told."""

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commandline import Escala, refused
from rich.console import Console

from analysis.sensitivities import sensitivity, write_optimum
from cluster.display import cell_table
from cluster.ledger import plan_rows, register
from cluster.planning import read_study
from sweeps.grids import Plan
from sweeps.records import read_json, write_json
from sweeps.store import Store

SOURCE = """
name: lr-sensitivity
corpus: {source: markov, options: {vocab_size: 16, tokens: 200000, seed: 1}}
context: 32
families: [llama]
grid: {type: ladder, sizes: [10000, 20000], tokens_per_parameter: [2, 4]}
training: {batch_tokens: 256, learning_rate: 0.01}
"""
TARGET = SOURCE.replace("lr-sensitivity", "target").replace("rate: 0.01", "rate: {fitted: lr-sensitivity}")


def planned(escala: Escala, text: str, *, refit: bool = False) -> tuple[Store, Plan]:
    """What a command plans, as it does; put on record as `run` does it before it trains."""
    path = escala.study(text, f"{text.split()[1]}.yaml")
    place, plan, _ = read_study(str(path), escala.folder / "s", False, False, refit=refit)
    register(place, plan, path.read_bytes())
    return place, plan


def write_fit(place: Store, plan: Plan, value: float, **changes: Any) -> Path:
    law = {
        "hyperparameter": "learning_rate",
        "family": "llama",
        "parametrisation": "standard",
        "refused": False,
        "value": value,
        "at": {"N": 1e4, "D": 2e4},
        "powers": {"N": -0.4},
        "verdicts": [],
        "range": {"N": [9e3, 2.2e4], "D": [1e4, 1e5]},
        "recipe": {"batch_tokens": 256, "schedule": "cosine"},
    }
    path = place.study("lr-sensitivity") / "fits" / "optimum.json"
    record = {"corpus": plan.corpus.fingerprint, "tokenizer": "bytes", "context": 32, "written": "2026-01-01T00:00:00"}
    write_json(path, record | {"laws": [law | changes], "optima": []})
    return path


def rates(plan: Plan) -> list[float]:
    return [one.cell.optimizer.learning_rate for one in plan.cells]


def told(plan: Plan) -> list[str]:
    return [text for text in plan.warnings if "fit of lr-sensitivity" in text]


def test_a_later_fit_of_the_source_changes_no_cell_until_the_study_is_refitted(escala: Escala) -> None:
    place, source = planned(escala, SOURCE)
    path = write_fit(place, source, 0.02)
    _, first = planned(escala, TARGET)
    assert rates(first) == [float(f"{0.02 * (one.counts['N'] / 1e4) ** -0.4:.6g}") for one in first.cells]
    assert told(first) == []
    pin = read_json(place.study("target") / "plan.json")["fitted"]["lr-sensitivity"]
    assert pin["laws"] == read_json(path)["laws"]
    assert "fitted" not in read_json(place.study("lr-sensitivity") / "plan.json")

    write_fit(place, source, 0.02, verdicts=["other words, the same numbers"])
    assert told(planned(escala, TARGET)[1]) == []

    write_fit(place, source, 0.04)
    _, again = planned(escala, TARGET)
    assert [one.cell.id for one in again.cells] == [one.cell.id for one in first.cells]
    (text,) = told(again)
    assert "has changed since this study was planned (learning_rate of llama 0.02 at N 1e+04 (N^-0.4), now 0.04" in text
    assert "--refit (plan, run) takes the new one" in text
    assert told(planned(escala, TARGET)[1]) == [text], "the pin is kept however often it is planned"

    path.unlink()
    assert rates(planned(escala, TARGET)[1]) == rates(first), "the source may even be gone"

    write_fit(place, source, 0.04)
    _, refitted = planned(escala, TARGET, refit=True)
    assert rates(refitted) == [pytest.approx(2 * rate, rel=1e-5) for rate in rates(first)]
    _, after = planned(escala, TARGET)
    assert rates(after) == rates(refitted)
    assert told(after) == []


def test_the_law_that_the_analysis_writes_is_the_one_that_a_study_takes(escala: Escala) -> None:
    place, source = planned(escala, SOURCE)
    rows = []
    for N, D, step in itertools.product((1e4, 2e4, 4e4), (2e4, 4e4, 8e4), range(-3, 4)):
        best = 0.02 * (N / 2e4) ** -0.5 * (D / 4e4) ** 0.25
        loss = (2 + 100 / N**0.5) * math.exp(0.02 * (step * math.log(2)) ** 2)
        rows.append({"N": N, "D": D, "learning_rate": best * 2**step, "loss": loss, "batch_tokens": 256.0})
    runs = pd.DataFrame(rows).assign(family="llama", corpus=source.corpus.fingerprint, tokenizer="bytes", context=32)
    write_optimum(sensitivity(runs, noise=0.001, resamples=50), runs, "lr-sensitivity", place)
    for one in planned(escala, TARGET)[1].cells:
        wanted = 0.02 * (one.counts["N"] / 2e4) ** -0.5 * (one.cell.tokens / 4e4) ** 0.25
        assert one.cell.optimizer.learning_rate == pytest.approx(wanted, rel=0.01)


def test_a_family_that_the_pinned_fit_lacks_points_to_the_newer_fit(escala: Escala) -> None:
    place, source = planned(escala, SOURCE)
    write_fit(place, source, 0.02)
    planned(escala, TARGET)
    write_fit(place, source, 0.02, family="gpt2")
    study = escala.study(TARGET.replace("[llama]", "[gpt2]"))
    text = refused(escala, "plan", study, "--store", "s")
    assert "no law for gpt2" in text
    assert "has changed since this study was planned: --refit takes it" in text
    plan = json.loads(escala("plan", study, "--store", "s", "--refit", "--json").stdout)
    assert {cell["family"] for cell in plan["cells"]} == {"gpt2"}
    assert all(cell["learning_rate"] < 0.025 for cell in plan["cells"])


def test_a_fit_that_is_not_there_is_refused_with_what_to_do(escala: Escala) -> None:
    study = escala.study(TARGET)
    assert "store" in refused(escala, "run", study, "--store", "s")
    place, source = planned(escala, SOURCE)
    text = refused(escala, "run", study, "--store", "s")
    assert "study.yaml: fitted: lr-sensitivity: no law has been fitted to its runs yet." in text
    assert "`escala sensitivity lr-sensitivity` fits one" in text
    other = escala.study(TARGET.replace("fitted: lr-sensitivity", "fitted: lr-sensitivty"), "other.yaml")
    text = refused(escala, "plan", other, "--store", "s")
    assert 'has no such study (did you mean "lr-sensitivity"?); it has: lr-sensitivity. Run that study first' in text
    path = write_fit(place, source, 0.02)
    path.write_text('{"laws": [{"value": 3}]}')
    assert "optimum.json is no fit of optima" in refused(escala, "run", study, "--store", "s")
    write_fit(place, source, 0.02, refused=True, verdicts=[{"severity": "refuse", "message": "All on an edge."}])
    assert "is refused for llama: All on an edge." in refused(escala, "run", study, "--store", "s")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("{rule: steplaw}", "learning_rate.rule: found 'steplaw'; allowed: step-law, deepseek, bjorck, minicpm"),
        ("{rule: steplaw}", '(did you mean "step-law"?)'),
        ("{rul: step-law}", 'learning_rate.rul: unknown key (did you mean "rule"?)'),
        (
            "{rule: minicpm, loss: 3}",
            "minicpm gives batch_tokens only; learning_rate is given by step-law, deepseek, bj",
        ),
        ("{rule: step-law, fitted: a}", "by a published rule or fitted, not both"),
        ("{rule: bjorck}", "give it at a reference point, such as {rule: bjorck, value: 0.003, at: {N: 1.0e+6"),
        ("{rule: bjorck, value: 0.1, at: {N: 1e4}}", "give it at a reference point"),
        ("{rule: step-law, value: 0.1}", "step-law takes no value; its constants are published"),
        ("{fitted: lr-sensitivity, at: {N: 1}}", "learning_rate.at: unknown key; allowed: fitted"),
        ("{fitted: a b}", "the name of a study in the store"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_its_line(escala: Escala, rule: str, words: str) -> None:
    study = escala.study(TARGET.replace("{fitted: lr-sensitivity}", rule).replace("batch_tokens: 256", "beta1: 7"))
    text = refused(escala, "run", study, "--store", "s")
    assert words in text
    assert "study.yaml:7: training" in text
    assert "beta1: found 7" in text, "with every other fault"


def test_a_study_is_not_fitted_on_itself(escala: Escala) -> None:
    text = refused(escala, "plan", escala.study(TARGET.replace("lr-sensitivity", "target")), "--store", "s")
    assert (
        "study.yaml:7: training: found {'batch_tokens': 256, 'learning_rate': {'fitted': 'target'}}; a study cannot"
        in text
    )


def test_the_plan_shows_each_cells_rate_batch_and_decay_where_they_vary(escala: Escala) -> None:
    rules = "batch_tokens: {rule: step-law}, learning_rate: {rule: step-law}, weight_decay: {rule: power-lines}"
    study = escala.study(SOURCE.replace("batch_tokens: 256, learning_rate: 0.01", rules))
    cells = json.loads(escala("plan", study, "--store", "s", "--json").stdout)["cells"]
    shown = escala("plan", study, "--store", "s").stdout
    assert len({(cell["batch_tokens"], cell["learning_rate"], cell["weight_decay"]) for cell in cells}) == 4
    for cell in cells:
        (line,) = [line for line in shown.splitlines() if line.startswith(cell["id"][:8])]
        values = {f"{cell['batch_tokens']:,}", f"{cell['learning_rate']:.3g}", f"{cell['weight_decay']:.3g}"}
        assert values <= set(line.split())
    header = shown.splitlines()[1].split()
    assert header.index("batch") < header.index("lr") < header.index("wd")
    header = escala("plan", escala.study(SOURCE), "--store", "s").stdout.splitlines()[1].split()
    assert "lr" in header
    assert not {"batch", "wd"} & set(header)


def test_a_narrow_terminal_goes_without_what_follows_from_the_rest_and_cuts_nothing_off(escala: Escala) -> None:
    rules = "batch_tokens: {rule: step-law}, learning_rate: {rule: deepseek}, weight_decay: {rule: power-lines}"
    text = SOURCE.replace("batch_tokens: 256, learning_rate: 0.01", rules) + "vary: {learning_rate: {times: [0.5, 1]}}"
    place, plan = planned(escala, text)
    rows = plan_rows(place, plan, plan.branches)
    for width, gone in ((80, {"steps", "timescale"}), (160, set())):
        terminal = Console(width=width, file=io.StringIO())
        terminal.print(cell_table(rows, title="all", width=width))
        shown = terminal.file.getvalue()  # type: ignore[attr-defined]
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown
        names = set(shown.splitlines()[1].split())
        assert {"cell", "N", "D", "C", "batch", "lr", "wd", "seed", "state"} <= names
        assert gone <= {"steps", "timescale", "D/N", "epochs"} - names
        assert gone or {"steps", "timescale", "D/N", "epochs"} <= names
