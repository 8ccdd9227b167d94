"""Grids: the plan holds what the study file asks for, counts exactly, refuses the impossible, and grows in place."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import CONTEXT, POINT, corpus, only, planned, points, study

from sweeps.accounting import flops_per_token, parameters
from sweeps.corpora import CorpusInfo
from sweeps.errors import InputError
from sweeps.families import FAMILIES
from sweeps.planned import PlannedCell
from sweeps.sizes import LATTICE, lattice_index, lattice_position
from sweeps.study import Study

ISOFLOP = {"type": "isoflop", "budgets": [1e10, 4e10], "sizes": 3, "stride": 1, "optimum": {"N": 2e4, "C": 1e10}}


def ids(declared: Study) -> set[str]:
    return {one.cell.id for one in planned(declared).cells}


def faults(declared: Study, info: CorpusInfo | None = None) -> str:
    with pytest.raises(InputError) as caught:
        planned(declared, info)
    return str(caught.value)


# --- the grids -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    budgets=st.lists(st.floats(3e10, 1e12), min_size=1, max_size=4, unique=True),
    sizes=st.integers(1, 5),
    stride=st.integers(1, 2),
    optimum=st.one_of(
        st.fixed_dictionaries({"N": st.floats(2e5, 4e5), "C": st.just(1e11), "exponent": st.floats(0.3, 0.6)}),
        st.fixed_dictionaries({"tokens_per_parameter": st.floats(0.2, 1)}),
    ),
)
def test_isoflop_sizes_share_a_sublattice_around_the_expected_optimum_and_spend_the_budget(
    budgets: list[float], sizes: int, stride: int, optimum: dict[str, float]
) -> None:
    grid = {"type": "isoflop", "budgets": budgets, "sizes": sizes, "stride": stride, "optimum": optimum}
    declared = study(grid, training={"batch_tokens": CONTEXT}, corpus={"repeat": True})
    by_budget: dict[float, list[PlannedCell]] = {}
    for one in planned(declared).cells:
        by_budget.setdefault(one.labels["budget"], []).append(one)
        # C is the budget to within half a batch, D is whole batches, and the counts are those of the shape
        batch_flops = one.cell.batch_tokens * one.counts["flops_per_token"]
        assert abs(one.counts["C"] - one.labels["budget"]) <= batch_flops / 2 * (1 + 1e-9)
        assert one.cell.tokens == one.counts["steps"] * one.cell.batch_tokens == one.cell.steps * one.cell.batch_tokens
        assert one.counts["flops_per_token"] == flops_per_token(one.cell.shape)
        assert one.counts["C"] == one.cell.tokens * one.counts["flops_per_token"]
        assert one.counts["N"] == parameters(one.cell.shape).active == pytest.approx(one.labels["size"], rel=0.08)
    assert list(by_budget) == sorted(budgets), "budgets come in rising order"
    for budget, cells in by_budget.items():
        indices = [lattice_index(one.labels["size"]) for one in cells]
        assert indices == list(range(indices[0], indices[0] + sizes * stride, stride))
        assert indices[0] % stride == 0, "one sublattice for every budget"
        middle = indices[(sizes - 1) // 2]
        if "N" in optimum:
            expected = lattice_position(optimum["N"] * (budget / optimum["C"]) ** optimum["exponent"])
            assert abs(middle - expected) <= stride / 2 + 1e-9
        else:
            ratio = {lattice_index(one.labels["size"]): one.cell.tokens / one.counts["N"] for one in cells}[middle]
            # a place on the lattice changes D/N by a factor of about 2; the middle is at most half a stride off
            assert abs(math.log2(ratio / optimum["tokens_per_parameter"])) <= 0.5 * stride + 1


def test_replicates_add_seeds_at_the_central_size_of_the_cheapest_budgets_only() -> None:
    grid = ISOFLOP | {"budgets": [8e10, 2e10, 4e10, 1e10], "replicates": {"budgets": 2, "seeds": 3}}
    seeds: dict[tuple[float, float], list[int]] = {}
    for one in planned(study(grid)).cells:
        seeds.setdefault((one.labels["budget"], one.labels["size"]), []).append(one.cell.seed)
        assert one.cell.seed == one.cell.data_seed
    extra = {place: found for place, found in seeds.items() if found != [0]}
    # with an exponent of 1/2, twice the budget is one step of the lattice
    assert extra == {(1e10, LATTICE[2]): [0, 1, 2], (2e10, LATTICE[3]): [0, 1, 2]}
    assert len(seeds) == 4 * 3
    assert all(found == [7, 0] for found in _seeds_at_the_centre(grid | {"replicates": {"seeds": 2}}, [7]))
    assert all(found == [4, 3, 2] for found in _seeds_at_the_centre(grid | {"replicates": None}, [4, 3, 2]))


@pytest.mark.parametrize(
    ("declared", "there"), [([0, 1, 2], [0, 1, 2]), ([1], [1, 0, 2]), ([0, 7], [0, 7, 1, 2]), ([7, 8], [7, 8, 0, 1])]
)
def test_replicates_make_sure_of_seeds_that_follow_the_first_and_add_none_twice(
    declared: list[int], there: list[int]
) -> None:
    grid = ISOFLOP | {"budgets": [1e10, 2e10], "replicates": {"budgets": 2, "seeds": 3}}
    assert all(found == there for found in _seeds_at_the_centre(grid, declared))


@pytest.mark.parametrize(
    ("grid", "training", "told"),
    [
        ({"type": "ladder", "sizes": [1e-323], "tokens": [1e6]}, {}, "size 1e-323 is outside the lattice"),
        ({"type": "ladder", "sizes": [1e308], "tokens": [1e6]}, {}, r"size 1e\+308 is outside the lattice"),
        (ISOFLOP | {"budgets": [1e-200], "optimum": {"N": 1e5, "C": 1e200}}, {}, "budget 1e-200: .* leave the lattice"),
        (ISOFLOP | {"budgets": [1e200], "optimum": {"N": 1e5, "C": 1e-200}}, {}, r"budget 1e\+200: .* leave the"),
        (ISOFLOP | {"budgets": [1e308], "optimum": {"tokens_per_parameter": 1e-323}}, {}, r"budget 1e\+308: .* leave"),
        (
            {"type": "ladder", "sizes": [1e5], "tokens": [1e-320]},
            {"batch_tokens": {"value": 1, "at": {"D": 1e300}, "power": {"D": -1}}},
            "batch_tokens: this rule overflows at D",
        ),
    ],
)
def test_numbers_that_leave_the_range_of_floats_are_faults_of_their_field(
    grid: dict[str, Any], training: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        planned(study(grid, training=training))


def test_what_cannot_be_counted_is_a_fault_of_the_study_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(*_: object) -> None:
        raise OverflowError("int too large to convert to float")

    for part in ("plan_cell", "grid_points"):
        with monkeypatch.context() as broken:
            broken.setattr(f"sweeps.grids.{part}", overflow)
            assert "family llama: a number of the grid or of training is too large or too small" in faults(
                points(POINT)
            )


def _seeds_at_the_centre(grid: dict[str, Any], seeds: list[int]) -> list[list[int]]:
    cells = planned(study(grid, seeds=seeds)).cells
    return [
        [one.cell.seed for one in cells if (one.labels["budget"], one.labels["size"]) == place]
        for place in ((1e10, LATTICE[2]), (2e10, LATTICE[3]))
    ]


def test_a_ladder_is_every_size_at_every_number_of_tokens_per_parameter() -> None:
    grid = {"type": "ladder", "sizes": [2e4, 1.9e4, 4e4], "tokens_per_parameter": {"from": 5, "to": 20, "points": 3}}
    cells = planned(study(grid, families={"llama": {"tied": True}, "gpt2": {}}, seeds=[0, 1])).cells
    assert len(cells) == 2 * 2 * 3 * 2, "1.9e4 snaps to the same place as 2e4"
    for one, (family, size, ratio, seed) in zip(
        cells, itertools.product(("llama", "gpt2"), (2e4, 4e4), (5, 10, 20), (0, 1)), strict=True
    ):
        assert (one.cell.family, one.cell.seed) == (family, seed)
        assert one.labels == {"size": pytest.approx(size)}
        assert abs(one.cell.tokens - ratio * one.counts["N"]) <= one.cell.batch_tokens / 2
        assert one.cell.shape.tied
    assert dict(cells[0].cell.options)["tied"] is True


def test_a_ladder_may_name_its_lengths_in_tokens() -> None:
    cells = planned(study({"type": "ladder", "sizes": [2e4, 4e4], "tokens": [64_000, 128_000]})).cells
    assert sorted((one.labels["size"], one.cell.tokens) for one in cells) == [
        (size, tokens) for size in (2e4, 4e4) for tokens in (64_000, 128_000)
    ]
    assert {one.cell.id for one in cells} == ids(
        points(*({"size": size, "tokens": tokens} for size in (2e4, 4e4) for tokens in (64_000, 128_000)))
    ), "the same cells as by hand"


def test_the_optimizer_is_varied_like_any_hyperparameter_and_the_default_keeps_its_cells() -> None:
    cells = planned(points(POINT, vary={"optimizer": ["adamw", "muon"]})).cells
    assert [one.cell.optimizer.name for one in cells] == ["adamw", "muon"]
    assert cells[0].cell.id == only(points(POINT)).cell.id


def test_points_say_how_long_in_three_ways_and_may_have_their_own_recipe() -> None:
    cells = planned(
        points(
            {"size": 2e4, "tokens": 64_000, "training": {"learning_rate": "3e-3", "schedule": "wsd"}},
            {"size": 2e4, "flops": 1e10},
            {"size": 2e4, "tokens_per_parameter": 7},
        )
    ).cells
    assert [one.cell.tokens for one in cells[:1]] == [64_000]
    assert (cells[0].cell.optimizer.learning_rate, cells[0].cell.schedule.name) == (3e-3, "wsd")
    assert (cells[1].cell.optimizer.learning_rate, cells[1].cell.schedule.name) == (1e-3, "cosine")
    assert cells[1].counts["C"] == pytest.approx(1e10, abs=640 * cells[1].counts["flops_per_token"] / 2)
    assert cells[2].cell.tokens == pytest.approx(7 * cells[2].counts["N"], abs=320)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    tokens=st.floats(1e4, 1e7),
    batch=st.floats(1, 8000),
    size=st.floats(1e4, 1e6),
    name=st.sampled_from(sorted(FAMILIES)),
)
def test_tokens_are_the_nearest_whole_number_of_batches_of_whole_sequences(
    tokens: float, batch: float, size: float, name: str
) -> None:
    one = only(points({"size": size, "tokens": tokens}, families=[name], training={"batch_tokens": batch}))
    assert one.cell.batch_tokens == max(1, round(batch / CONTEXT)) * CONTEXT
    assert one.cell.sequences * CONTEXT == one.cell.batch_tokens
    assert one.cell.tokens % one.cell.batch_tokens == 0
    assert abs(one.cell.tokens - tokens) <= one.cell.batch_tokens / 2
    assert one.counts["C_6nd"] == 6 * one.counts["N"] * one.cell.tokens
    assert one.counts["epochs"] == round(corpus().epochs(one.cell.tokens, CONTEXT), 4)


# --- variations ----------------------------------------------------------------------------------------------


def test_everything_varied_is_crossed_and_factors_multiply_the_recipes_own_value() -> None:
    vary = {
        "learning_rate": {"times": [0.5, 1, 2]},
        "weight_decay": [0, 0.1],
        "init_std": {"log": {"from": 0.01, "to": 0.04, "points": 3}},
    }
    rule = {"value": 0.01, "at": {"width": 32}, "power": {"width": -1}}
    cells = planned(points(POINT, vary=vary, training={"batch_tokens": 640, "learning_rate": rule})).cells
    own = 0.01 * 32 / cells[0].cell.shape.width
    found = {(one.cell.optimizer.learning_rate, one.cell.optimizer.weight_decay, one.cell.init_std) for one in cells}
    rates = [float(f"{factor * own:.6g}") for factor in (0.5, 1, 2)]
    assert found == set(itertools.product(rates, (0.0, 0.1), (0.01, 0.02, 0.04)))
    assert len(cells) == 18
    assert {one.labels["learning_rate_times"] for one in cells} == {0.5, 1, 2}


def test_a_varied_batch_stays_whole_sequences_and_moves_what_depends_on_it() -> None:
    vary = {"batch_tokens": {"times": [0.5, 1, 16]}}
    training = {
        "batch_tokens": 640,
        "learning_rate": {"value": 0.01, "at": {"batch_tokens": 640}, "power": {"batch_tokens": 0.5}},
    }
    cells = planned(points({"size": 2e4, "tokens": 102_400}, vary=vary, training=training)).cells
    assert [one.cell.batch_tokens for one in cells] == [320, 640, 10_240]
    assert {one.cell.tokens for one in cells} == {102_400}
    assert [one.cell.optimizer.learning_rate for one in cells] == [0.00707107, 0.01, 0.04]
    assert [one.cell.optimizer.beta2 for one in cells] == [0.99, 0.99, 0.95]


def test_equal_cells_are_planned_once() -> None:
    one = only(points(POINT, POINT, {"size": 2.1e4, "tokens": 64_001}))
    assert only(points(POINT, vary={"beta1": [0.9, "0.9"]})).cell == one.cell
    assert only(points(POINT, {**POINT, "training": {"learning_rate": 1e-3, "eps": 1e-8}})).cell == one.cell
    assert only(points(POINT, vary={"learning_rate": {"times": [1]}})).cell == one.cell
    assert len(planned(points(POINT, vary={"learning_rate": [1e-3, 2e-3]})).cells) == 2


def test_a_number_in_the_file_is_the_number_in_the_cell() -> None:
    rate, warmup = 0.001234567891, 1_234_567
    training = {"batch_tokens": 640, "learning_rate": rate, "warmup_tokens": warmup}
    cell = only(points({"size": 2e4, "tokens": 6.4e6}, training=training)).cell
    assert (cell.optimizer.learning_rate, cell.schedule.warmup_tokens) == (rate, warmup)


# --- defaults and rules --------------------------------------------------------------------------------------


def test_the_default_warm_up_is_a_tenth_of_the_run_and_at_most_n_tokens() -> None:
    short, long = planned(points({"size": 2e4, "tokens": 64_000}, {"size": 2e4, "tokens": 640_000})).cells
    assert short.cell.schedule.warmup_tokens == 6_400
    assert long.cell.schedule.warmup_tokens == long.counts["N"]
    large = only(points({"size": 1.3e6, "tokens": 2e7}, corpus={"repeat": True}))
    assert large.cell.schedule.warmup_tokens == large.counts["N"] > 1_000_000, "exact above six digits as well"


def test_a_warm_up_as_long_as_the_run_is_told() -> None:
    def warnings(warmup: float) -> list[str]:
        declared = points(
            POINT, {"size": 2e4, "tokens": 640_000}, training={"batch_tokens": 64, "warmup_tokens": warmup}
        )
        return [text for text in planned(declared).warnings if "warm-up does" in text]

    assert warnings(63_999) == []
    assert "1 of 2 cells end before their warm-up does" in warnings(64_000)[0]
    (told,) = warnings(3.2e6)
    assert "2 of 2 cells end before" in told
    assert "the shortest has 64,000 tokens and warms up over 3,200,000, to 0.02 of its peak" in told


def test_the_default_warm_up_of_cells_that_can_share_a_trunk_does_not_follow_their_length() -> None:
    lengths = [{"size": 2e4, "tokens": tokens} for tokens in (30_720, 64_000, 128_000, 640_000)]
    N = planned(points(*lengths)).cells[0].counts["N"]
    assert 0.8 * 30_720 / 2 < N < 0.8 * 64_000 / 2

    def warmups(schedule: str) -> list[int]:
        cells = planned(points(*lengths, training={"batch_tokens": 640, "schedule": schedule})).cells
        return [one.cell.schedule.warmup_tokens for one in cells]

    assert warmups("wsd") == [3_072, N, N, N], "the shortest has no room for it and a share of its own"
    assert warmups("constant") == [3_072, N, N, N]
    assert warmups("cosine") == warmups("linear") == [3_072, 6_400, 12_800, N]


@pytest.mark.parametrize(("sequences", "beta2"), [(1, 0.99), (127, 0.99), (128, 0.95), (500, 0.95)])
def test_the_default_beta2_follows_the_batch(sequences: int, beta2: float) -> None:
    point = {"size": 2e4, "tokens": 1e6}
    training = {"batch_tokens": sequences * CONTEXT}
    assert only(points(point, training=training)).cell.optimizer.beta2 == beta2
    assert only(points(point, training=training | {"beta2": 0.9})).cell.optimizer.beta2 == 0.9


def test_rules_are_taken_at_the_realised_tokens_and_a_batch_rule_at_the_wanted_ones() -> None:
    training = {
        "batch_tokens": {"value": 640, "at": {"D": 64_000}, "power": {"D": 0.5}},
        "learning_rate": {"value": 1.0, "at": {"D": 1, "C": 1}, "power": {"D": -1, "C": 0}},
        "weight_decay": {"value": 1.0, "at": {"N": 1, "depth": 1}, "power": {"N": -1, "depth": 1}},
    }
    one = only(points({"size": 2e4, "tokens": 100_100}, training=training))
    assert one.cell.batch_tokens == round(640 * math.sqrt(100_100 / 64_000) / CONTEXT) * CONTEXT == 832
    assert one.cell.tokens == 99_840
    assert one.cell.optimizer.learning_rate == float(f"{1 / 99_840:.6g}")
    assert one.cell.optimizer.weight_decay == pytest.approx(one.cell.shape.depth / one.counts["N"], rel=1e-5)


# --- what is refused, and what is said -----------------------------------------------------------------------


def test_a_run_shorter_than_a_batch_is_refused() -> None:
    text = faults(points({"size": 2e4, "tokens": 300}))
    assert "300 training tokens are less than one batch of 640. Lower batch_tokens, or raise the budget." in text
    assert only(points({"size": 2e4, "tokens": 330})).counts["steps"] == 1


def test_a_size_below_the_familys_minimum_is_refused() -> None:
    assert "its smallest size is" in faults(points(POINT), corpus(vocab_size=50257))


def test_a_context_that_the_corpus_cannot_fill_is_refused() -> None:
    assert planned(points(POINT, corpus={"repeat": True}), corpus(2 * CONTEXT, CONTEXT + 1)).cells
    assert "at least two contexts" in faults(points(POINT, corpus={"repeat": True}), corpus(2 * CONTEXT - 1))
    assert "validation split" in faults(points(POINT), corpus(validation_tokens=CONTEXT))


def test_a_study_may_validate_on_fewer_tokens_and_one_that_wants_all_has_the_cells_of_before() -> None:
    plain, few, every = (
        only(points(POINT, **fields)).cell
        for fields in ({}, {"validation_tokens": 100_000}, {"validation_tokens": 10**9})
    )
    assert few.validation_tokens == round(100_000 / CONTEXT) * CONTEXT
    assert few.id != plain.id == every.id


def test_more_than_four_epochs_need_the_studys_word() -> None:
    long = {"size": 2e4, "tokens": 64_000 * 5}
    info = corpus(train_tokens=64_000)
    text = faults(points(POINT, long), info)
    assert "1 of the cells repeat the corpus more than 4 times" in text
    assert "320,000 tokens of 64,000 (5.0 epochs)" in text
    assert "`repeat: true`" in text
    cells = planned(points(POINT, long, corpus={"repeat": True}), info).cells
    assert [one.counts["epochs"] for one in cells] == [1.001, 5.005], "an epoch is one window less than fits"


def test_sizes_off_the_lattice_are_refused() -> None:
    assert "outside the lattice of 10,000 to 10,485,760,000" in faults(points({"size": 5e3, "tokens": 64_000}))
    grid = {"type": "ladder", "sizes": [2e4, 1e12], "tokens_per_parameter": [20]}
    assert "size 1,000,000,000,000 is outside the lattice" in faults(study(grid))
    assert "5 sizes around 2e+04 parameters leave the lattice" in faults(study(ISOFLOP | {"sizes": 5, "stride": 2}))
    for optimum in ({"N": 1e300, "C": 1}, {"N": 2e4, "C": 1, "exponent": 900}, {"N": 1e-300, "C": 1, "exponent": 0}):
        assert "leave the lattice" in faults(study(ISOFLOP | {"optimum": optimum}))


def test_all_faults_of_a_plan_come_at_once() -> None:
    text = faults(
        points({"size": 2e4, "tokens": 300}, {"size": 2e4, "tokens": 64_000}, families=["mine.py:family", "llama"])
    )
    assert text.startswith("the study cannot be planned:\n")
    assert 'family "mine.py:family" runs code from a file' in text
    assert "less than one batch" in text
    many = points(*({"size": 2e4, "tokens": tokens} for tokens in range(1, 13)))
    assert faults(many).endswith("and 2 more")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vary": {"beta1": {"times": [1, 2]}}}, "beta1: found 1.8"),
        ({"vary": {"final_fraction": {"times": [20]}}}, "final_fraction: found 2.0"),
        ({"training": {"learning_rate": {"value": 1, "at": {"N": 1}, "power": {"N": 1000}}}}, "overflows at N"),
        (
            {"training": {"batch_tokens": {"value": 1, "at": {"batch_tokens": 1}, "power": {"batch_tokens": 1}}}},
            "batch_tokens: this rule cannot depend on batch_tokens; allowed here: N, D, C, width, depth",
        ),
        (
            {"training": {"learning_rate": {"value": 1e300, "at": {"N": 1}, "power": {"N": 10}}}},
            "learning_rate: found inf; input should be a finite number",
        ),
        (
            {"training": {"batch_tokens": {"value": 9, "at": {"batch_tokens": 1}, "power": {"batch_tokens": 1}}}},
            "depend",
        ),
        ({"training": {"batch_tokens": 1e300}}, "less than one batch"),
    ],
)
def test_hyperparameters_that_leave_their_range_are_refused(fields: dict[str, Any], words: str) -> None:
    assert words in faults(points(POINT, **fields))


def test_a_batch_has_a_sequence_for_every_worker() -> None:
    text = faults(points(POINT, workers=640 // CONTEXT + 1))
    assert f"a batch of {640 // CONTEXT} sequences (640 tokens) has none for some of {640 // CONTEXT + 1} work" in text
    one, many = only(points(POINT)), only(points(POINT, workers=640 // CONTEXT))
    assert one.cell.id == many.cell.id, "the number of workers changes no number"


@pytest.mark.parametrize("how", [{"tokens": 1e300}, {"flops": 1e300}, {"tokens_per_parameter": 1e308}])
def test_absurd_lengths_are_refused(how: dict[str, float]) -> None:
    assert "training tokens are more than 1e+16" in faults(points({"size": 2e4, **how}, corpus={"repeat": True}))


@pytest.mark.slow
def test_a_study_of_too_many_cells_is_refused_before_they_are_planned() -> None:
    vary = {name: {"log": {"from": 1e-4, "to": 1e-1, "points": 320}} for name in ("learning_rate", "init_std")}
    assert "declares more than 100,000 cells" in faults(points({"size": 2e4, "tokens": 300}, vary=vary))


def test_few_steps_and_repeated_text_are_warned_of() -> None:
    info = corpus(train_tokens=400_000)
    quiet = points({"size": 2e4, "tokens": 640 * 500}, {"size": 2e4, "tokens": 640 * 600})
    assert planned(quiet, info).warnings == ()
    short, repeated = planned(points(POINT, {"size": 2e4, "tokens": 640 * 1000}), info).warnings
    assert "1 of 2 cells have fewer than 500 optimizer steps (fewest: 100)" in short
    assert "1 of 2 cells see the corpus more than once (most: 1.60 epochs)" in repeated
    search = {"space": {"learning_rate": {"log": [1e-3, 1e-1]}}}
    (short,) = planned(points(POINT, search=search)).warnings
    assert short.startswith("2 of 2 cells at the ends of the searched space have fewer"), "it has no cells yet"


def test_a_batch_of_less_than_a_sequence_is_told() -> None:
    def warnings(*batches: float) -> list[str]:
        declared = points({"size": 2e4, "tokens": 64 * 500}, vary={"batch_tokens": [*batches]})
        return [text for text in planned(declared).warnings if "a batch of one" in text]

    assert warnings(CONTEXT) == []
    for batches in ((8,), (CONTEXT, 8), (8, 16)):
        (told,) = warnings(*batches)
        assert told.startswith(f"batch_tokens is 8 where a sequence has {CONTEXT} tokens"), batches


def test_what_is_varied_to_no_effect_is_told() -> None:
    def warnings(schedule: str, *names: str, more: Any = None) -> list[str]:
        values = {"final_fraction": [0.0, 0.1], "cooldown_fraction": [0.2, 0.4]}
        vary = {name: values[name] for name in names} | (more or {})
        declared = points(POINT, training={"batch_tokens": 640, "schedule": schedule}, vary=vary)
        return [text for text in planned(declared).warnings if "no effect" in text]

    assert warnings("wsd", "cooldown_fraction") == warnings("cosine", "final_fraction") == []
    assert warnings("cosine", "cooldown_fraction", more={"schedule": ["cosine", "wsd"]}) == [], "one of them uses it"
    (told,) = warnings("cosine", "cooldown_fraction", "final_fraction")
    assert told.startswith("cooldown_fraction is varied to no effect: the schedule cosine does not use it")
    (told,) = warnings("constant", "cooldown_fraction", "final_fraction")
    assert told.startswith("cooldown_fraction and final_fraction are varied to no effect: the schedule constant")


# --- growth --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    budgets=st.lists(st.sampled_from([1e10, 2e10, 4e10, 8e10]), min_size=1, max_size=3, unique=True),
    seeds=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True),
    more_seeds=st.lists(st.integers(0, 9), max_size=3),
    replicates=st.sampled_from([None, {"budgets": 1, "seeds": 2}, {"budgets": 2, "seeds": 4}]),
)
def test_a_study_that_grows_keeps_every_cell_it_had(
    budgets: list[float], seeds: list[int], more_seeds: list[int], replicates: dict[str, int] | None
) -> None:
    grid = ISOFLOP | {"budgets": budgets, "replicates": replicates}
    before = ids(study(grid, seeds=seeds))
    assert before < ids(study(grid | {"budgets": [*budgets, 1.6e11]}, seeds=seeds))
    assert before <= ids(study(grid, seeds=[*seeds, *more_seeds]))
    assert before < ids(study(grid, seeds=seeds, families=["qwen3", "llama"]))
    assert before < ids(study(grid, seeds=seeds, vary={"learning_rate": {"times": [1, 2]}}))
    assert before == ids(study(grid, seeds=seeds, name="other", question="Another?"))


def test_a_cheaper_budget_keeps_the_cells_of_the_others() -> None:
    before = ids(study(ISOFLOP))
    assert before < ids(study(ISOFLOP | {"budgets": [*ISOFLOP["budgets"], 0.8e10]}))


def test_ten_thousand_cells_are_all_different_and_repeat_themselves() -> None:
    grid = {"type": "ladder", "sizes": {"from": 1e4, "to": 7.2e6, "points": 20}, "tokens_per_parameter": [5, 20]}
    vary = {"learning_rate": {"log": {"from": 1e-4, "to": 1e-1, "points": 250}}}
    declared = study(grid, vary=vary, corpus={"repeat": True})
    first = [one.cell.id for one in planned(declared).cells]
    assert len(set(first)) == len(first) == 10_000
    assert [one.cell.id for one in planned(declared).cells] == first


# --- trunks and branches -------------------------------------------------------------------------------------


WSD = {"batch_tokens": 640, "schedule": {"kind": "wsd", "cooldown_fraction": 0.2, "final_fraction": 0}}
LENGTHS = tuple({"size": 2e4, "tokens": tokens} for tokens in (64_000, 128_000, 256_000))


def test_cells_that_differ_in_length_alone_branch_off_the_longest() -> None:
    plan = planned(points(*LENGTHS, training=WSD, seeds=[0, 1]))
    cells = {one.cell.id: one.cell for one in plan.cells}
    assert len(plan.branches) == 4
    for cell_id, branch in plan.branches.items():
        cell, trunk = cells[cell_id], cells[branch.parent]
        assert trunk.tokens == 256_000
        assert trunk.seed == cell.seed
        assert branch.steps == 0.8 * cell.steps
    assert plan.warnings == tuple(text for text in plan.warnings if "trunk" not in text)
    assert planned(points(*LENGTHS)).branches == {}, "a cosine knows its end from the first step"


def test_a_shape_and_a_fraction_of_the_cooldown_are_cells_of_their_own_on_one_trunk() -> None:
    vary = {"cooldown_shape": ["sqrt", "linear", "cosine"], "cooldown_fraction": [0.1, 0.3]}
    plan = planned(points({"size": 2e4, "tokens": 256_000}, training=WSD, vary=vary))
    assert (len(plan.cells), len(plan.branches)) == (6, 5)
    late = {"cooldown_fraction": {"times": [1, 4]}}
    text = faults(points({"size": 2e4, "tokens": 64_000}, training=WSD | {"warmup_tokens": 20_000}, vary=late))
    assert "does not fit into the 12,800" in text
    assert len(planned(points({"size": 2e4, "tokens": 256_000}, vary=vary | {"cooldown_fraction": [0.2]})).cells) == 1


def test_schedules_with_their_fields_can_be_varied_and_overridden() -> None:
    schedules = ["cosine", {"kind": "wsd", "cooldown_fraction": 0.5}]
    cells = planned(points({"size": 2e4, "tokens": 256_000}, vary={"schedule": schedules})).cells
    told = [(one.cell.schedule.name, one.cell.schedule.cooldown_fraction) for one in cells]
    assert told == [("cosine", 0.2), ("wsd", 0.5)]
    cell = only(points({"size": 2e4, "tokens": 256_000, "training": {"schedule": schedules[1]}}, training=WSD)).cell
    assert (cell.schedule.cooldown_fraction, cell.schedule.final_fraction) == (0.5, 0.0)
    twice = points({"size": 2e4, "tokens": 256_000}, vary={"schedule": schedules, "cooldown_fraction": [0.1]})
    assert "cooldown_fraction given twice" in faults(twice)


@pytest.mark.parametrize(("schedule", "fits"), [("wsd", 51_200), ("constant", 64_000), ("cosine", 10**9)])
def test_a_warm_up_that_reaches_into_the_cooldown_is_refused(schedule: str, fits: int) -> None:
    def with_warmup(tokens: int) -> Study:
        training = {"batch_tokens": 640, "schedule": schedule, "warmup_tokens": tokens}
        return points({"size": 2e4, "tokens": 64_000}, training=training)

    assert only(with_warmup(fits)).cell.schedule.warmup_tokens == fits
    if schedule != "cosine":
        text = faults(with_warmup(fits + 1))
        assert f"a warm-up of {fits + 1:,} tokens does not fit into the {fits:,}" in text
        assert "a branch cannot leave its trunk before" in text


def test_what_keeps_lengths_from_sharing_a_trunk_is_named_with_its_remedy() -> None:
    rule = {"value": 640, "at": {"D": 64_000}, "power": {"D": 0.5}}
    plan = planned(points(*LENGTHS, training=WSD | {"batch_tokens": rule}))
    assert plan.branches == {}
    (told,) = [text for text in plan.warnings if "share no trunk" in text]
    assert "their schedule would let them, because batch_tokens follows D. Let it be a number, or a rule of N" in told
    rate = {"value": 0.01, "at": {"C": 1e10}, "power": {"C": -0.1}}
    override = [point | {"training": {"warmup_tokens": point["tokens"] / 10}} for point in LENGTHS]
    (told,) = [
        text
        for text in planned(points(*override, training=WSD | {"learning_rate": rate})).warnings
        if "share no trunk" in text
    ]
    assert "learning_rate follows C, warmup_tokens differs between their lengths. Let them be numbers" in told


def test_a_default_warm_up_that_keeps_the_short_cells_from_the_trunk_is_told() -> None:
    def told(**training: Any) -> list[str]:
        lengths = [{"size": 2e4, "tokens": tokens} for tokens in (32_000, 64_000, 128_000)]
        warnings = planned(points(*lengths, training={"batch_tokens": 640, "schedule": "wsd"} | training)).warnings
        return [text for text in warnings if "no trunk" in text]

    (text,) = told()
    assert "1 of 3 cells share no trunk with the longer ones of their model: their warm-up is 10% of D" in text
    assert "Give warmup_tokens as a number, such as 3,200" in text
    assert told(warmup_tokens=3200) == []


def test_what_a_schedule_does_not_use_makes_no_other_cell() -> None:
    def ids_of(**training: Any) -> set[str]:
        return ids(points(POINT, training={"batch_tokens": 640} | training))

    assert ids_of(schedule="cosine", cooldown_fraction=0.3, cooldown_shape="linear") == ids_of(schedule="cosine")
    assert ids_of(schedule="constant", final_fraction=0.5) == ids_of(schedule="constant")
    assert ids_of(schedule="wsd", cooldown_fraction=0.3) != ids_of(schedule="wsd")
    assert ids_of(schedule="cosine", final_fraction=0.5) != ids_of(schedule="cosine")


def test_fewer_validation_tokens_than_a_window_are_one_window_and_not_all() -> None:
    long = {"context": 32_768, "training": {"batch_tokens": 32_768}}
    assert only(points(POINT, **long, validation_tokens=10_000)).cell.validation_tokens == 32_768
