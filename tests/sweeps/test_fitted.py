"""A fitted rule takes another study's law where it holds, and says why not where it does not."""

from pathlib import Path
from typing import Any

import pytest
from plans import POINT, corpus, points

from sweeps.errors import InputError
from sweeps.fitted import Fit, changed_laws, fit_from_json, read_fit
from sweeps.grids import Plan, plan_study
from sweeps.records import write_json
from sweeps.store import open_store
from sweeps.study import Study

FITTED = {"learning_rate": {"fitted": "source"}, "batch_tokens": 640}
LAW = {
    "hyperparameter": "learning_rate",
    "family": "llama",
    "parametrisation": "standard",
    "refused": False,
    "value": 0.0123,
    "at": {"N": 5e4, "D": 1e6},
    "powers": {"N": -0.4, "D": 0.1},
    "intervals": {"value": [0.011, 0.014], "N": [-0.5, -0.3], "D": [0.05, 0.15]},
    "range": {"N": [1e4, 2e5], "D": [5e4, 4e6]},
    "optima": 5,
    "curvature": 0.05,
    "recipe": {"parametrisation": "standard", "batch_tokens": 640, "schedule": "cosine", "optimizer": "adamw"},
    "verdicts": [],
}


def fit(*laws: dict[str, Any], **fields: Any) -> Fit:
    plain = {"corpus": "0123456789abcdef", "tokenizer": "bytes", "context": 64, "written": "2026-01-01T00:00:00"}
    return fit_from_json(plain | {"study": "source", "laws": laws or (LAW,)} | fields)


def plan(declared: Study, found: Fit | None = None) -> Plan:
    return plan_study(declared, corpus(), fits={"source": found or fit()})


def refused(found: Fit, hyperparameter: str = "learning_rate", **fields: Any) -> str:
    training = {"batch_tokens": 640, hyperparameter: {"fitted": "source"}}
    with pytest.raises(InputError) as caught:
        plan(points(POINT, POINT | {"tokens": 128_000}, training=training, **fields), found)
    return str(caught.value)


def test_a_fitted_law_is_taken_at_the_cells_own_n_and_realised_d() -> None:
    vary = {"learning_rate": {"times": [0.5, 1]}}
    cells = plan(points(POINT, POINT | {"tokens": 400_100}, training=FITTED, vary=vary)).cells
    assert len(cells) == 4
    for one in cells:
        law = 0.0123 * (one.counts["N"] / 5e4) ** -0.4 * (one.cell.tokens / 1e6) ** 0.1
        wanted = float(f"{float(f'{law:.6g}') * one.labels['learning_rate_times']:.6g}")
        assert one.cell.optimizer.learning_rate == wanted


def test_a_power_that_was_not_identified_is_not_used() -> None:
    law = LAW | {"powers": {"N": -0.4}, "range": {"N": [1e4, 2e5], "D": [1e6, 1e6]}}
    planned = plan(points(POINT, POINT | {"tokens": 128_000}, training=FITTED), fit(law))
    assert len({one.cell.optimizer.learning_rate for one in planned.cells}) == 1
    assert "D up to 15.6 times below (fitted at 1M alone)" in planned.warnings[0]


def test_a_law_in_its_range_and_recipe_is_used_without_a_word_and_outside_with_one() -> None:
    inside = plan(points(POINT, training=FITTED))
    assert not any("learning_rate by" in text for text in inside.warnings)
    edge = fit(LAW | {"range": {"N": [1e4, 2e5], "D": [POINT["tokens"] * 1.01, 4e6]}})
    assert not any("range" in text for text in plan(points(POINT, training=FITTED), edge).warnings), "rounded lengths"
    outside = plan(points(POINT, {"size": 3.2e5, "tokens": 64_000}, training=FITTED))
    (text,) = [text for text in outside.warnings if "learning_rate by" in text]
    assert "the fit of source: 1 of 2 cells lies outside the range that it was fitted in: N up to 1.6" in text
    assert "times above (fitted 10k to 200k)" in text


def test_a_power_that_cannot_be_told_from_none_is_used_with_a_word_where_it_matters() -> None:
    def told(bounds: list[float | None], **fields: Any) -> list[str]:
        found = fit(LAW | {"intervals": LAW["intervals"] | {"D": bounds}})
        return [text for text in plan(points(POINT, training=FITTED, **fields), found).warnings if "power of" in text]

    (text,) = told([-0.05, 0.25])
    assert "its power of D, 0.1 (-0.05 to 0.25), cannot be told from 0, and moves the value by up to 1.32 times" in text
    assert not told([0.05, 0.15])
    assert not told([None, 0.25]), "of an open interval nothing is said"
    near = fit(LAW | {"intervals": LAW["intervals"] | {"D": [-0.05, 0.25]}, "at": {"N": 5e4, "D": POINT["tokens"]}})
    assert not any("power of" in text for text in plan(points(POINT, training=FITTED), near).warnings)


@pytest.mark.parametrize("unsure", ["llama", "gpt2"])
def test_a_power_that_cannot_be_told_from_none_is_that_of_the_family_whose_law_has_it(unsure: str) -> None:
    laws = [LAW | {"family": name} for name in ("llama", "gpt2")]
    laws = [law | {"intervals": {"D": [-0.05, 0.25] if law["family"] == unsure else [0.05, 0.15]}} for law in laws]
    grid = {"training": FITTED, "families": ["llama", "gpt2"]}
    warnings = plan(points(POINT, **grid), fit(*laws)).warnings
    assert len([text for text in warnings if "its power of D, 0.1 (-0.05 to 0.25)" in text]) == 1
    steep = [law | {"powers": {"N": -0.4, "D": 0.3 if law["family"] == unsure else 0.1}} for law in laws]
    warnings = plan(points(POINT, **grid), fit(*steep)).warnings
    assert len([text for text in warnings if "its power of D, 0.3 (-0.05 to 0.25)" in text]) == 1


@pytest.mark.parametrize("joint", ["llama", "gpt2"])
def test_a_batch_that_was_found_with_a_rate_is_asked_for_by_the_family_whose_law_it_is(joint: str) -> None:
    rates = [LAW | {"family": name, "recipe": {"schedule": "cosine"}} for name in ("llama", "gpt2")]
    batch = LAW | {"hyperparameter": "batch_tokens", "family": joint, "value": 840, "recipe": {"schedule": "cosine"}}
    warnings = plan(points(POINT, training=FITTED, families=["llama", "gpt2"]), fit(*rates, batch)).warnings
    assert len([text for text in warnings if "holds with the batch of the fit of source" in text]) == 1


def test_what_was_equal_in_the_runs_behind_a_law_and_is_another_here_is_named() -> None:
    training = FITTED | {"batch_tokens": 1280, "schedule": "linear", "optimizer": "muon"}
    text = "\n".join(plan(points(POINT, training=training), fit(context=128)).warnings)
    assert "fitted at batch_tokens 640, where another value may be best than at 1,280 (1 of 1 cell)" in text
    assert "fitted at schedule cosine, where another value may be best than at linear" in text
    assert "fitted at optimizer adamw, where another value may be best than at muon" in text
    assert "fitted at context 128, where another value may be best than at 64" in text


def test_a_rate_that_was_found_together_with_its_batch_asks_for_it() -> None:
    rate = LAW | {"recipe": {"schedule": "cosine"}}
    batch = rate | {"hyperparameter": "batch_tokens", "value": 840, "powers": {"D": 0.5}, "at": {"D": 64_000}}
    both = fit(rate, batch)
    together = plan(points(POINT, training={name: {"fitted": "source"} for name in FITTED}), both)
    assert together.cells[0].cell.batch_tokens == 832, "whole sequences"
    assert not any("batch rules" in text for text in together.warnings)
    (text,) = [text for text in plan(points(POINT, training=FITTED), both).warnings if "batch rules" in text]
    assert "holds with the batch of the fit of source, but batch_tokens is given otherwise" in text


def test_a_law_of_something_else_is_refused_with_what_there_is() -> None:
    verdicts = [
        {"severity": "info", "message": "Fine."},
        {"severity": "refuse", "message": "Every optimum lies on an edge."},
    ]
    gone = LAW | {"refused": True, "value": None, "powers": {}, "verdicts": verdicts}
    text = refused(fit(gone))
    assert "the fit of source is refused for llama: Every optimum lies on an edge. Mend the runs of source" in text
    assert text.count("refused") == 1, "once, not for every cell"
    text = refused(fit(), families=["gpt2", "llama"])
    assert "no law for gpt2 in standard parametrisation: it has that of llama in standard parametrisation" in text
    text = refused(fit(LAW | {"parametrisation": "mup"}))
    assert "no law for llama in standard parametrisation: it has that of llama in mup parametrisation" in text
    text = refused(fit(), "weight_decay")
    assert "weight_decay: the fit of source has no law for llama in standard parametrisation: it has laws" in text
    text = refused(fit(corpus="fedcba9876543210", tokenizer="bpe:512"))
    assert "is of corpus fedcba9876543210 (bpe:512), and this study trains on 0123456789abcdef" in text
    with pytest.raises(InputError, match="the fit of source is not at hand"):
        plan_study(points(POINT, training=FITTED), corpus())


def test_of_several_laws_that_of_the_studys_own_setting_is_taken() -> None:
    laws = [
        LAW | {"value": decay / 10, "recipe": {"weight_decay": decay, "schedule": "cosine"}} for decay in (0.1, 0.2)
    ]
    for law, decay in zip(laws, (0.1, 0.2), strict=True):
        planned = plan(points(POINT, training=FITTED | {"weight_decay": decay}), fit(*laws))
        alone = plan(points(POINT, training=FITTED | {"weight_decay": decay}), fit(law))
        assert planned.cells[0].cell.id == alone.cells[0].cell.id
    text = refused(fit(*laws), vary={"weight_decay": [0.5]})
    assert "has 2 laws, for weight_decay 0.1; weight_decay 0.2, and 0 of them hold for this study's own" in text


@pytest.mark.parametrize("first", [0, 1])
def test_of_laws_that_name_different_settings_that_of_the_studys_own_is_taken(first: int) -> None:
    laws = [
        LAW | {"value": 0.01, "recipe": {"schedule": "cosine"}},
        LAW | {"value": 0.02, "recipe": {"schedule": "cosine", "weight_decay": 0.2}},
    ]
    found = fit(*laws[first:], *laws[:first])
    declared = points(POINT, training=FITTED | {"weight_decay": 0.2})
    assert plan(declared, found).cells[0].cell.id == plan(declared, fit(laws[1])).cells[0].cell.id
    text = refused(found, vary={"weight_decay": [0.5]})
    assert "weight_decay None" in text
    assert "weight_decay 0.2" in text
    assert "0 of them hold for this study's own" in text


def test_a_law_may_follow_the_batch() -> None:
    law = LAW | {"powers": {"batch_tokens": 0.5}, "at": {"batch_tokens": 640}, "recipe": {}}
    law["range"] = {"batch_tokens": [320, 1280]}
    planned = plan(points(POINT, training=FITTED, vary={"batch_tokens": [640, 1280, 2560]}), fit(law))
    rates = [one.cell.optimizer.learning_rate for one in planned.cells]
    assert rates == [pytest.approx(0.0123 * factor**0.5, rel=1e-5) for factor in (1, 2, 4)]
    assert any(
        "1 of 3 cells lies outside the range that it was fitted in: batch_tokens up to" in w for w in planned.warnings
    )


def test_a_fit_of_several_texts_or_without_a_word_on_parametrisation() -> None:
    assert "is of several corpora, or of none that it names, and this study trains on" in refused(
        fit(corpus=None, tokenizer=None)
    )
    assert plan(points(POINT, training=FITTED), fit(LAW | {"parametrisation": None})).cells


def test_a_fit_survives_its_record_and_says_what_has_changed() -> None:
    old = fit()
    assert fit_from_json(old.to_json()) == old
    assert changed_laws(old, fit(LAW | {"intervals": {}}, written="later")) == [], "the numbers count"
    assert changed_laws(old, fit(LAW | {"value": 0.02, "powers": {"N": -0.4}})) == [
        "learning_rate of llama 0.0123 at N 5e+04, D 1e+06 (N^-0.4 D^0.1), now 0.02 at N 5e+04 (N^-0.4)"
    ]
    assert changed_laws(old, fit(LAW | {"refused": True})) == [
        "learning_rate of llama 0.0123 at N 5e+04, D 1e+06 (N^-0.4 D^0.1), now refused"
    ]


@pytest.mark.parametrize(
    "damage",
    [
        {"intervals": {"D": [0.1]}},
        {"intervals": {"D": 5}},
        {"intervals": [1, 2]},
        {"powers": {"N": "steep"}},
        {"powers": ["N"]},
        {"range": {"N": [1e4]}},
        {"recipe": ["adamw"]},
        {"refused": True, "verdicts": ["too few"]},
        {"refused": True, "verdicts": [{"severity": "refuse"}]},
    ],
    ids=str,
)
def test_a_fit_that_is_damaged_is_a_sentence(tmp_path: Path, damage: dict[str, Any]) -> None:
    store = open_store(tmp_path / "store")
    write_json(store.study("source") / "plan.json", {"cells": []})
    path = store.study("source") / "fits" / "optimum.json"
    record = fit().to_json()
    write_json(path, record)
    assert read_fit(store, "source") == fit()
    write_json(path, record | {"laws": [LAW | damage]})
    with pytest.raises(InputError, match=r"optimum\.json is no fit of optima\. `escala sensitivity source` writes it"):
        read_fit(store, "source")
