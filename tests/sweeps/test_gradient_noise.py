"""The gradient norm of a part of the batch: logged where it is asked for, and without moving a bit of anything else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import Killed, MemoryIO, make_cell, put

from analysis.noise_scale import gradient_noise
from sweeps.accounting import small_part
from sweeps.attempt import run_attempt
from sweeps.cell import cell_from_identity
from sweeps.corpora import Corpus, make_source, open_corpus, prepare
from sweeps.errors import InputError
from sweeps.families import FAMILIES, build_model, resolve_options
from sweeps.grids import plan_study
from sweeps.losses import MeanLoss
from sweeps.schedules import evaluation_steps
from sweeps.stacks import stack_key
from sweeps.store import Store, read_metrics
from sweeps.study import Study
from sweeps.training import train, train_together

SMALL = "gradient_norm_small"


@pytest.fixture(scope="module")
def corpus(store: Store) -> Corpus:
    source = make_source("markov", None, {"vocab_size": 8, "tokens": 60_000, "seed": 3})
    return open_corpus(store.root, prepare(source, "bytes", store.root).fingerprint)


def without(rows: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {tokens: {key: value for key, value in row.items() if key != SMALL} for tokens, row in rows.items()}


@pytest.mark.parametrize("micro_batch", [3, 16])
def test_a_run_that_logs_it_has_the_bits_of_one_that_does_not(corpus: Corpus, micro_batch: int) -> None:
    cell = make_cell(corpus, 12)
    plain = MemoryIO(cell, corpus)
    plain.numerics = replace(plain.numerics, micro_batch=micro_batch)
    measured = MemoryIO(replace(cell, gradient_noise=True), corpus, numerics=plain.numerics)
    one, other = train(cell, plain), train(replace(cell, gradient_noise=True), measured)
    assert one.val_loss_final == other.val_loss_final
    assert without(measured.rows) == plain.rows
    for name, value in plain.last_state["model"].items():
        assert torch.equal(value, measured.last_state["model"][name]), name
    logged = {tokens // cell.batch_tokens for tokens, row in measured.rows.items() if SMALL in row}
    assert logged == evaluation_steps(cell.steps) | {cell.steps}, "at the evaluations alone"


@pytest.mark.slow
def test_members_of_a_stack_log_their_own_and_keep_their_bits(corpus: Corpus) -> None:
    cells = [make_cell(corpus, 10, learning_rate=0.002 * (k + 1), seed=k, data_seed=k) for k in range(3)]
    noisy = [replace(cell, gradient_noise=True) for cell in cells]
    assert stack_key(cells[0]) != stack_key(noisy[0]), "a stack measures for all of its members or for none"
    plain, measured = [MemoryIO(cell, corpus) for cell in cells], [MemoryIO(cell, corpus) for cell in noisy]
    train_together(cells, plain)
    train_together(noisy, measured)
    for cell, mine, other in zip(noisy, measured, plain, strict=True):
        assert without(mine.rows) == other.rows
        own = MemoryIO(cell, corpus)
        train(cell, own)
        for tokens, row in own.rows.items():
            assert mine.rows[tokens] == pytest.approx(row, rel=1e-5), tokens
    assert len({io.rows[cells[0].tokens][SMALL] for io in measured}) == 3


def test_a_run_that_was_killed_goes_on_measuring(corpus: Corpus, tmp_path: Path) -> None:
    cell = make_cell(corpus, 10, gradient_noise=True)
    whole = MemoryIO(cell, corpus)
    train(cell, whole)
    with pytest.raises(Killed):
        train(cell, MemoryIO(cell, corpus, folder=tmp_path, kill_at=7))
    rest = MemoryIO(cell, corpus, folder=tmp_path)
    train(cell, rest)
    assert all(whole.rows[tokens] == row for tokens, row in rest.rows.items())


@pytest.mark.slow
def test_the_estimate_agrees_with_the_gradient_of_every_sequence(corpus: Corpus) -> None:
    # The rate is next to nothing, so all rows are of one set of weights.
    cell = make_cell(corpus, 200, learning_rate=1e-12, gradient_noise=True)
    io = MemoryIO(cell, corpus)
    train(cell, io)
    rows = [row for row in io.rows.values() if SMALL in row]
    small, big = (np.array([row[key] ** 2 for row in rows]) for key in (SMALL, "gradient_norm"))
    part, whole = small_part(cell.sequences), cell.sequences
    found = gradient_noise(small, big, part, whole)
    # Directly: tr(Sigma) and |G|^2 from the gradients of many single sequences.
    options = resolve_options(FAMILIES["llama"])
    model = build_model(FAMILIES["llama"], cell.shape, init_std=cell.init_std, seed=cell.seed, options=options)
    loss, total, squares, count = MeanLoss(model), 0.0, 0.0, 0
    for step in range(24):
        for sequence in torch.from_numpy(corpus.batch(1, step, whole, cell.shape.context)):
            model.zero_grad()
            loss(sequence[None]).backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
            total, squares, count = total + gradient, squares + float(gradient @ gradient), count + 1
    mean_square = float(torch.as_tensor(total) @ torch.as_tensor(total)) / count**2
    trace = (squares / count - mean_square) * count / (count - 1)
    truth = trace / (mean_square - trace / count)
    assert not found.refused
    assert found.rows == len(evaluation_steps(cell.steps)) + 1
    low, high = found.batch.interval
    assert low < truth < high
    assert found.batch.value == pytest.approx(truth, rel=0.35)


def test_it_is_of_the_id_only_where_it_is_on(corpus: Corpus) -> None:
    cell = make_cell(corpus)
    noisy = replace(cell, gradient_noise=True)
    assert "gradient_noise" not in cell.identity
    assert noisy.id != cell.id
    assert cell_from_identity(noisy.identity) == noisy
    assert cell_from_identity(cell.identity) == cell


def test_a_study_asks_for_it_and_an_attempt_logs_it(corpus: Corpus, store: Store) -> None:
    study = {
        "name": "noise",
        "corpus": {"source": "markov"},
        "context": 32,
        "families": ["llama"],
        "grid": {"type": "points", "points": [{"size": 1e4, "tokens": 5120}]},
        "training": {"batch_tokens": 256, "gradient_noise": True},
    }
    (planned,) = plan_study(Study.model_validate(study), corpus.info).cells
    assert planned.cell.gradient_noise
    assert run_attempt(store, put(store, planned.cell), study="s").state == "finished"
    assert any(SMALL in row["metrics"] for row in read_metrics(store, planned.cell.id))
    study["training"] = {"batch_tokens": 32, "gradient_noise": True}
    with pytest.raises(InputError, match="one sequence"):
        plan_study(Study.model_validate(study), corpus.info)
