"""The time of a cell is predicted from a few shapes, counted exactly, and never guessed."""

import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import make_cell

from sweeps.accounting import Shape, flops_per_token
from sweeps.cell import Cell
from sweeps.corpora import Corpus, make_source, open_corpus, prepare
from sweeps.evaluation import spread_windows
from sweeps.families import FAMILIES
from sweeps.schedules import evaluation_steps
from sweeps.sizes import shape_for
from sweeps.stopwatch import time_cell
from sweeps.store import open_store
from sweeps.timing import (
    Timed,
    cell_seconds,
    evaluations_after,
    fit_costs,
    forward_features,
    pick_cells,
    seconds_until,
    step_features,
    timed_from_json,
)

TRUE_STEP = (2e-3, 4e-4, 2e-11, 3e-9, 1e-9, 5e-9, 2e-9)
TRUE_FORWARD = (1e-3, 2e-4, 1e-11, 2e-9, 1e-9, 2e-9)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    store = open_store(tmp_path_factory.mktemp("timing") / "store")
    source = make_source("markov", None, {"vocab_size": 8, "tokens": 400_000, "seed": 3})
    return open_corpus(store.root, prepare(source, "bytes", store.root).fingerprint)


def shapes() -> list[Shape]:
    sizes = [1e4, 2e4, 5e4, 1e5, 3e5, 1e6, 3e6]
    return [shape_for(FAMILIES["llama"], size, vocab_size=256, context=128) for size in sizes]


def point(shape: Shape, sequences: int, noise: float = 0.0) -> Timed:
    """What a machine with the true coefficients would show."""
    draw = random.Random(f"{shape} {sequences}")
    step = sum(a * b for a, b in zip(TRUE_STEP, step_features(shape, sequences, sequences)))
    forward = sum(a * b for a, b in zip(TRUE_FORWARD, forward_features(shape, 64)))
    return Timed(
        family="llama",
        precision="float32",
        shape=shape,
        sequences=sequences,
        micro_batch=sequences,
        step_seconds=step * (1 + noise * draw.uniform(-1, 1)),
        forward_seconds=forward * (1 + noise * draw.uniform(-1, 1)),
        subset_seconds=forward + 64 * 1e-4,
        build_seconds=0.01,
    )


@given(st.integers(1, 200_000), st.integers(0, 200_000))
def test_evaluations_are_counted_as_training_makes_them(steps: int, first: int) -> None:
    made = evaluation_steps(steps)
    assert evaluations_after(steps) == len(made)
    assert evaluations_after(steps, first) == sum(step > first for step in made)


def test_the_costs_of_a_known_machine_predict_what_was_not_timed() -> None:
    every = shapes()
    costs = fit_costs([point(shape, sequences) for shape in every[::2] for sequences in (4, 16)])
    for shape in every[1::2]:
        truth = point(shape, 8)
        predicted = sum(a * b for a, b in zip(costs.step, step_features(shape, 8, 8)))
        assert predicted == pytest.approx(truth.step_seconds, rel=0.02)
        predicted = sum(a * b for a, b in zip(costs.forward, forward_features(shape, 64)))
        assert predicted == pytest.approx(truth.forward_seconds, rel=0.02)
    assert costs.window == pytest.approx(1e-4)


def test_ten_percent_of_noise_leaves_a_median_error_below_ten() -> None:
    every = shapes()
    costs = fit_costs([point(shape, sequences, 0.1) for shape in every[::2] for sequences in (4, 16)])
    errors = [
        abs(sum(a * b for a, b in zip(costs.step, step_features(shape, 8, 8))) / point(shape, 8).step_seconds - 1)
        for shape in every
    ]
    assert statistics.median(errors) < 0.1
    assert min(costs.step) >= 0.0
    assert min(costs.forward) >= 0.0


def test_a_cell_is_the_sum_of_its_parts(corpus: Corpus) -> None:
    costs = fit_costs([point(shape, sequences) for shape in shapes() for sequences in (4, 16)])
    cell = make_cell(corpus, steps=100)
    tokens = corpus.info.validation_tokens
    longer = replace(cell, tokens=2 * cell.tokens)
    step = sum(a * b for a, b in zip(costs.step, step_features(cell.shape, 16, 16)))
    subset = spread_windows(corpus.validation_windows(32), 32)
    forward = sum(a * b for a, b in zip(costs.forward, forward_features(cell.shape, len(subset))))
    evaluations = len(evaluation_steps(200)) - len(evaluation_steps(100))
    added = 100 * step + evaluations * (forward + len(subset) * costs.window)
    gained = cell_seconds(costs, longer, tokens) - cell_seconds(costs, cell, tokens)
    assert gained == pytest.approx(added, rel=1e-9)


def test_a_branch_costs_only_its_own_segment(corpus: Corpus) -> None:
    costs = fit_costs([point(shape, sequences) for shape in shapes() for sequences in (4, 16)])
    cell, tokens = make_cell(corpus, steps=1000), corpus.info.validation_tokens
    whole, branch = cell_seconds(costs, cell, tokens), cell_seconds(costs, cell, tokens, first_step=800)
    step = sum(a * b for a, b in zip(costs.step, step_features(cell.shape, 16, 16)))
    assert 800 * step < whole - branch
    assert branch > 200 * step


def test_what_comes_before_a_branch_and_its_own_segment_make_the_whole(corpus: Corpus) -> None:
    costs = fit_costs([point(shape, sequences) for shape in shapes() for sequences in (4, 16)])
    cell, tokens = make_cell(corpus, steps=1000), corpus.info.validation_tokens
    parts = seconds_until(costs, cell, 800) + cell_seconds(costs, cell, tokens, first_step=800)
    assert parts == pytest.approx(cell_seconds(costs, cell, tokens) + costs.build)


def test_micro_batches_repeat_the_launches_and_nothing_else() -> None:
    shape = shapes()[3]
    whole, split = step_features(shape, 16, 16), step_features(shape, 16, 4)
    assert split[1] == 4 * whole[1]
    assert (split[0], *split[2:]) == (whole[0], *whole[2:])


def test_picked_cells_span_the_study_and_no_shape_is_timed_twice(corpus: Corpus) -> None:
    cells = [
        make_cell(corpus, steps=steps, shape=shape, batch_tokens=128 * sequences, tokens=128 * sequences * steps)
        for shape in shapes()
        for sequences in (4, 8, 16)
        for steps in (50, 100)
    ]
    picked = pick_cells(cells)
    assert len(picked) == 8
    assert len({(cell.shape, cell.sequences) for cell in picked}) == 8
    assert picked == pick_cells(cells), "deterministic"
    work = [cell.batch_tokens * flops_per_token(cell.shape) for cell in picked]
    every = [cell.batch_tokens * flops_per_token(cell.shape) for cell in cells]
    assert max(work) == max(every), "the dearest step is timed, not extrapolated"
    assert min(cell.shape.width for cell in picked) == min(cell.shape.width for cell in cells)
    assert pick_cells([replace(cells[0], trainer="mine.py:train@0")]) == []


@pytest.mark.slow
def test_the_stopwatch_times_real_steps_of_the_trainer(corpus: Corpus) -> None:
    small: Cell = make_cell(corpus)
    large = replace(small, shape=shape_for(FAMILIES["llama"], 1e6, vocab_size=corpus.info.vocab_size, context=32))
    one, two = time_cell(small, corpus), time_cell(large, corpus)
    assert (one.sequences, one.micro_batch, one.family, one.precision) == (16, 16, "llama", "float32")
    assert 0 < one.step_seconds < two.step_seconds
    assert 0 < one.forward_seconds < two.forward_seconds
    assert one.subset_seconds > 0
    assert 0 < one.build_seconds < 30
    assert timed_from_json(one.to_json()) == one
