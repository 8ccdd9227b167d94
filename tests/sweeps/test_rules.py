"""Published rules say what their papers say, count as their papers count, and tell when they are trusted too far."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import CONTEXT, POINT, only, planned, points, study

from sweeps.accounting import Shape, flops_per_token
from sweeps.grids import Plan
from sweeps.planned import PlannedCell
from sweeps.published import PUBLISHED, PublishedRule, published_law
from sweeps.rules import adamw_timescale, evaluate

BJORCK = {"rule": "bjorck", "value": 0.003, "at": {"N": 1e6, "D": 2e7}}

GPT2 = Shape(
    width=768,
    depth=12,
    heads=12,
    kv_heads=12,
    head_dim=64,
    mlp_width=3072,
    mlp_matrices=2,
    vocab_size=50257,
    context=1024,
    tied=True,
    learned_positions=True,
    qk_norm=False,
    attention_bias=True,
    mlp_bias=True,
    norm_bias=True,
)


def value(hyperparameter: str, given: dict[str, Any], **known: float) -> float:
    return evaluate(published_law(PublishedRule.model_validate(given), hyperparameter), known)


def told(plan: Plan, begin: str) -> list[str]:
    return [warning for warning in plan.warnings if warning.startswith(begin)]


# --- the papers' numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "D", "rate", "batch"),
    [
        (1e8, 1e10, 4.157699e-3, 297459.6),
        (1e9, 2e10, 9.960227e-4, 441892.0),
        (1e9, 1e11, 1.632499e-3, 1107714.9),
        (7e9, 1.4e12, 9.165569e-4, 4998815.4),
    ],
)
def test_step_law(N: float, D: float, rate: float, batch: float) -> None:
    assert value("learning_rate", {"rule": "step-law"}, N_nonembedding=N, D=D) == float(f"{rate:.6g}")
    assert value("batch_tokens", {"rule": "step-law"}, D=D) == float(f"{batch:.6g}")


@pytest.mark.parametrize(
    ("C", "rate", "batch"),
    [(1e17, 2.338170e-3, 106189.8), (1e20, 9.859982e-4, 1017144.9), (1e23, 4.157920e-4, 9742779.0)],
)
def test_deepseek(C: float, rate: float, batch: float) -> None:
    assert value("learning_rate", {"rule": "deepseek"}, C_nonembedding=C) == float(f"{rate:.6g}")
    assert value("batch_tokens", {"rule": "deepseek"}, C_nonembedding=C) == float(f"{batch:.6g}")


@pytest.mark.parametrize(("loss", "batch"), [(4, 211802.5), (3, 1275113.2), (2.5, 3977770.4)])
def test_minicpm(loss: float, batch: float) -> None:
    assert value("batch_tokens", {"rule": "minicpm", "loss": loss}) == pytest.approx(batch, rel=3e-6)


@pytest.mark.parametrize(("N", "D", "factor"), [(1, 10, 0.478630), (1, 2, 0.801070), (10, 1, 0.588844)])
def test_bjorck_changes_the_rate_of_the_reference_point(N: float, D: float, factor: float) -> None:
    assert value("learning_rate", BJORCK, N=1e6, D=2e7) == 0.003
    assert value("learning_rate", BJORCK, N=N * 1e6, D=D * 2e7) == pytest.approx(0.003 * factor, rel=2e-6)


@pytest.mark.parametrize(("ratio", "tau"), [(1, 1.084), (20, 0.223556), (200, 0.066433), (1000, 0.028447)])
def test_power_lines_decay_gives_the_run_its_timescale(ratio: float, tau: float) -> None:
    cell = {"batch_tokens": 5e5, "learning_rate": 3e-3, "D": 2e10, "tokens_per_parameter": ratio}
    decay = value("weight_decay", {"rule": "power-lines"}, **cell)
    assert adamw_timescale(3e-3, decay, 5e5, 2e10) == pytest.approx(tau, rel=2e-5)
    if ratio == 20:
        assert decay == 0.0372763


# --- in a study --------------------------------------------------------------------------------------------------


def test_each_rule_is_handed_the_counts_of_its_paper() -> None:
    one = only(points(POINT, training={"batch_tokens": {"rule": "step-law"}, "learning_rate": {"rule": "step-law"}}))
    tokens = one.cell.tokens
    assert one.cell.batch_tokens == round(0.58 * 64_000**0.571 / CONTEXT) * CONTEXT, "of the tokens that were asked for"
    rate = 1.79 * one.counts["N_nonembedding"] ** -0.713 * tokens**0.307
    assert one.cell.optimizer.learning_rate == float(f"{rate:.6g}"), "non-embedding parameters, and the realised tokens"
    assert one.counts["N_nonembedding"] < one.counts["N"]

    one = only(points(POINT, training={"batch_tokens": 640, "learning_rate": {"rule": "deepseek"}}))
    C = _without_head(one)
    assert one.cell.optimizer.learning_rate == float(f"{0.3118 * C**-0.1250:.6g}")


def test_the_compute_of_deepseek_is_that_of_the_paper_for_a_shape_such_as_theirs() -> None:
    assert flops_per_token(GPT2, head=False) == 72 * 12 * 768**2 + 12 * 12 * 768 * 1024


def test_the_decay_of_power_lines_follows_the_rate_and_the_batch_that_a_cell_ends_up_with() -> None:
    training = {"batch_tokens": {"rule": "step-law"}, "learning_rate": BJORCK, "weight_decay": {"rule": "power-lines"}}
    vary = {"learning_rate": {"times": [0.5, 1, 2]}, "batch_tokens": {"times": [1, 3]}}
    cells = planned(points(POINT, training=training, vary=vary)).cells
    assert len({one.cell.optimizer.weight_decay for one in cells}) == len(cells) == 6
    for one in cells:
        recipe, ratio = one.cell.optimizer, one.cell.tokens / one.counts["N"]
        rate = 0.003 * (one.counts["N"] / 1e6) ** -0.23 * (one.cell.tokens / 2e7) ** -0.32
        assert recipe.learning_rate == pytest.approx(one.labels["learning_rate_times"] * rate, rel=1e-5)
        tau = adamw_timescale(recipe.learning_rate, recipe.weight_decay, one.cell.batch_tokens, one.cell.tokens)
        assert tau == pytest.approx(1.084 * ratio**-0.527, rel=1e-5)


def test_rules_are_varied_and_overridden_like_numbers() -> None:
    vary = {"learning_rate": [0.01, {"rule": "deepseek"}, BJORCK]}
    rates = [one.cell.optimizer.learning_rate for one in planned(points(POINT, vary=vary)).cells]
    override = [POINT | {"training": {"learning_rate": rule}} for rule in vary["learning_rate"]]
    assert rates == [one.cell.optimizer.learning_rate for one in planned(points(*override)).cells]
    assert len(set(rates)) == 3


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    tokens=st.floats(2e5, 2e6),
    longer=st.floats(1.5, 4),
    rule=st.sampled_from(["step-law", "deepseek"]),
)
def test_a_longer_run_has_a_batch_that_is_not_smaller_and_whole_sequences(
    tokens: float, longer: float, rule: str
) -> None:
    rates = {"step-law": {"rule": "step-law"}, "deepseek": {"rule": "deepseek"}, "bjorck": BJORCK}
    for name, rate in rates.items():
        training = {"batch_tokens": {"rule": rule}, "learning_rate": rate}
        both = [{"size": 2e4, "tokens": t} for t in (tokens, longer * tokens)]
        short, long = (only(points(one, training=training)) for one in both)
        for one in (short, long):
            assert one.cell.batch_tokens % CONTEXT == 0
            assert one.cell.tokens % one.cell.batch_tokens == 0
        assert short.cell.batch_tokens <= long.cell.batch_tokens
        rising = long.cell.optimizer.learning_rate > short.cell.optimizer.learning_rate
        assert rising == (name == "step-law"), "the sign in D is that of the paper's own batch rule"


def test_a_rule_that_says_what_a_number_says_plans_the_same_cells() -> None:
    by_rule = only(points(POINT, training={"batch_tokens": 640, "learning_rate": BJORCK}))
    number = by_rule.cell.optimizer.learning_rate
    assert only(points(POINT, training={"batch_tokens": 640, "learning_rate": number})).cell.id == by_rule.cell.id


# --- what the plan says ------------------------------------------------------------------------------------------


def large(rate: Any, batch: Any, tokens: float = 2e10, **training: Any) -> Plan:
    """One cell inside the ranges of step-law and deepseek."""
    grid = {"type": "points", "points": [{"size": 3e8, "tokens": tokens}]}
    recipe = {"learning_rate": rate, "batch_tokens": batch, **training}
    return planned(study(grid, training=recipe, corpus={"repeat": True}))


def test_a_rule_inside_its_range_is_used_without_a_word() -> None:
    assert told(large({"rule": "step-law"}, {"rule": "step-law"}), "learning_rate") == []
    assert told(large({"rule": "deepseek"}, {"rule": "deepseek"}, tokens=2e9), "learning_rate") == []


def test_a_rule_outside_its_range_says_how_many_cells_and_how_far() -> None:
    (text,) = told(large({"rule": "step-law"}, {"rule": "step-law"}, tokens=4e11), "learning_rate")
    assert "1 of 1 cell lies outside the range that it was fitted in: D up to 4 times above (fitted 4B to 100B)" in text
    plan = planned(points(POINT, training={"batch_tokens": 640, "learning_rate": {"rule": "deepseek"}}))
    (text,) = [text for text in told(plan, "learning_rate") if "range" in text]
    times = 1e17 / _without_head(plan.cells[0])
    assert f"C_nonembedding up to {float(f'{times:.3g}'):,g} times below (fitted 1e17 to 2e19)" in text


def _without_head(one: PlannedCell) -> float:
    return one.cell.tokens * flops_per_token(one.cell.shape, head=False)


def test_a_rule_of_unknown_range_says_so() -> None:
    both = points(POINT, training={"batch_tokens": 640, "learning_rate": BJORCK}, seeds=[0, 1])
    (text,) = told(planned(both), "learning_rate")
    assert "by bjorck: in what range it was fitted is not known here; 2 cells take it, of N 20.3k and D 64k" in text


@pytest.mark.parametrize(
    ("rate", "batch", "words"),
    [
        ({"rule": "step-law"}, 640, "holds with the batch of step-law, but batch_tokens is given otherwise"),
        ({"rule": "step-law"}, {"rule": "deepseek"}, "the batch of step-law, but batch_tokens is by deepseek"),
        ({"rule": "deepseek"}, {"rule": "step-law"}, "the batch of deepseek, but batch_tokens is by step-law"),
        (BJORCK, {"rule": "step-law"}, "holds at a constant batch, but batch_tokens goes from "),
        (BJORCK, {"value": 640, "at": {"D": 64_000}, "power": {"D": 0.5}}, "holds at a constant batch"),
        (BJORCK, 640, ""),
        ({"rule": "step-law"}, {"rule": "step-law"}, ""),
        ({"rule": "deepseek"}, {"rule": "deepseek"}, ""),
        (0.01, {"rule": "step-law"}, ""),
    ],
)
def test_laws_of_different_batch_rules_are_not_combined_in_silence(rate: Any, batch: Any, words: str) -> None:
    both = [POINT, POINT | {"tokens": 400_000}]
    plan = planned(points(*both, training={"learning_rate": rate, "batch_tokens": batch}))
    found = [text for text in told(plan, "learning_rate") if "batch rules do not combine" in text]
    assert len(found) == bool(words)
    assert not words or words in found[0]


def test_a_rule_that_follows_the_length_is_named_where_it_keeps_trunks_from_being_shared() -> None:
    training = {"schedule": "wsd", "warmup_tokens": 6400, "batch_tokens": 640, "learning_rate": {"rule": "deepseek"}}
    plan = planned(points(POINT, POINT | {"tokens": 128_000}, training=training))
    assert any("because learning_rate follows C_nonembedding. Let it be a number" in text for text in plan.warnings)


def test_every_rule_names_its_paper_and_counts_that_a_cell_has() -> None:
    assert set(PUBLISHED) == {"step-law", "deepseek", "bjorck", "minicpm", "power-lines"}
    for one in PUBLISHED.values():
        assert "arXiv" in one.paper
        assert all(math.isfinite(low) and low < high for low, high in one.range.values())
