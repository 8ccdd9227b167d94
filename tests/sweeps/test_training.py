"""Training learns, repeats itself to the bit, evaluates exactly, and says when it diverged."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CONTEXT, MemoryIO, make_cell, put

from sweeps.attempt import run_attempt
from sweeps.corpora import Corpus
from sweeps.devices import peak_flops
from sweeps.evaluation import evaluate, spread_windows
from sweeps.families import FAMILIES, build_model, find_family
from sweeps.models import make_model
from sweeps.records import read_json
from sweeps.schedules import evaluation_steps
from sweeps.sizes import shape_for
from sweeps.stacking import Solo
from sweeps.store import Store, read_metrics
from sweeps.training import train

ROOT = Path(__file__).resolve().parents[2]
DROPPING = """
from dataclasses import replace
from sweeps.families import FAMILIES
def dropping():
    own = FAMILIES["gpt2"]
    return replace(own, config=lambda shape, options: own.config(shape, options) | {"resid_pdrop": 0.1})
"""


def test_a_small_model_reaches_the_entropy_rate_of_its_source_from_above(corpus: Corpus) -> None:
    cell = make_cell(corpus, steps=500, learning_rate=0.02)
    outcome = train(cell, MemoryIO(cell, corpus))
    rate = corpus.info.entropy_rate
    assert outcome.state == "finished"
    assert rate is not None
    assert outcome.val_loss_final is not None
    assert rate - 0.01 < outcome.val_loss_final < rate + 0.06
    assert outcome.loss_at_start == pytest.approx(math.log(corpus.info.vocab_size), abs=0.15)


@pytest.mark.slow
def test_equal_numerics_give_bit_equal_losses(corpus: Corpus) -> None:
    cell = make_cell(corpus)
    runs = [MemoryIO(cell, corpus), MemoryIO(cell, corpus)]
    finals = [train(cell, run).val_loss_final for run in runs]
    assert finals[0] == finals[1]
    assert runs[0].rows == runs[1].rows


def test_dropout_in_a_family_of_ones_own_follows_the_seed_and_not_what_ran_before(
    corpus: Corpus, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(DROPPING)
    family = find_family("own.py:dropping", allow_code=True, base_dir=tmp_path)
    shape = shape_for(family, 10_000, vocab_size=corpus.info.vocab_size, context=CONTEXT)
    options = tuple(sorted(family.options.items()))
    cell = make_cell(corpus, 12, family=family.name, family_version=str(family.version), options=options, shape=shape)
    losses = []
    for one in (cell, cell, replace(cell, seed=1)):
        io = MemoryIO(one, corpus)
        io.base_dir = tmp_path
        losses.append(train(one, io).val_loss_final)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"data_seed": 1}])
def test_each_seed_moves_the_losses(corpus: Corpus, changes: dict[str, int]) -> None:
    one, other = make_cell(corpus, 10), make_cell(corpus, 10, **changes)
    losses = [train(cell, MemoryIO(cell, corpus)).val_loss_final for cell in (one, other)]
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_bfloat16_stays_near_float32(corpus: Corpus) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        cell = make_cell(corpus, precision=precision)
        losses.append(train(cell, MemoryIO(cell, corpus)).val_loss_final)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_learning_rate_far_too_high_ends_as_diverged_and_never_as_infinite(corpus: Corpus, store: Store) -> None:
    cell = make_cell(corpus, steps=60, learning_rate=1000.0)
    assert run_attempt(store, put(store, cell), study="s").state == "diverged"
    result = read_json(store.cell(cell.id) / "result.json")
    assert result["state"] == "diverged"
    assert result["val_loss_final"] is None
    assert "start" in result["reason"]
    for row in read_metrics(store, cell.id):
        assert all(math.isfinite(value) for value in row["metrics"].values())


def test_the_evaluation_is_the_mean_over_the_validation_stream(corpus: Corpus) -> None:
    cell = make_cell(corpus)
    model = build_model(FAMILIES["llama"], cell.shape, init_std=0.3, seed=1)
    windows = corpus.validation_windows(CONTEXT)
    found = evaluate(model, corpus, CONTEXT, torch.device("cpu"), torch.no_grad())
    tokens, documents = corpus.validation_batch(0, windows, CONTEXT)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[:, :-1])).logits.double()
    losses = -torch.log_softmax(logits, -1).gather(2, torch.from_numpy(tokens[:, 1:, None]))[..., 0].numpy()
    assert found.loss == pytest.approx(losses.mean(), rel=1e-6)
    assert found.window_sums == pytest.approx(losses.sum(axis=1), rel=1e-5)
    assert found.document_tokens.sum() == windows * CONTEXT
    for document in (0, documents.max()):
        assert found.document_sums[document] == pytest.approx(losses[documents == document].sum(), rel=1e-5)
    subset = spread_windows(windows, CONTEXT)
    part = evaluate(model, corpus, CONTEXT, torch.device("cpu"), torch.no_grad(), subset)
    assert part.loss == pytest.approx(losses[subset].mean(), rel=1e-6)


def test_the_final_loss_is_over_as_many_tokens_as_the_cell_asks_for(corpus: Corpus) -> None:
    cell = make_cell(corpus, validation_tokens=320 * CONTEXT)
    io = MemoryIO(cell, corpus)
    outcome = train(cell, io)
    windows = spread_windows(corpus.validation_windows(CONTEXT), CONTEXT, cell.validation_tokens)
    assert outcome.document_tokens is not None
    assert outcome.document_tokens.sum() == len(windows) * CONTEXT == cell.validation_tokens
    model = make_model(FAMILIES["llama"], cell)  # with the attention that training has
    model.load_state_dict(io.last_state["model"])
    whole = evaluate(model, corpus, CONTEXT, torch.device("cpu"), torch.no_grad())
    assert outcome.val_loss_final == pytest.approx(whole.subset_loss(windows, CONTEXT), rel=1e-9)
    assert outcome.val_loss_final != whole.loss
    assert io.rows[cell.tokens]["val_loss"] != io.rows[cell.tokens]["val_loss_final"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 10**6))
def test_evaluations_are_ten_a_decade_and_inside_the_run(steps: int) -> None:
    wanted = evaluation_steps(steps)
    assert all(1 <= step < steps for step in wanted)
    assert len(wanted) <= 10 * 2 + 2
    if steps >= 10_000:
        decade = [step for step in wanted if steps / 20 <= step < steps / 2]
        assert len(decade) in (9, 10, 11)


def test_decay_is_on_matrices_only(corpus: Corpus) -> None:
    cell = make_cell(corpus)
    model = build_model(FAMILIES["llama"], cell.shape, init_std=0.02, seed=0)
    program = Solo(model, replace(cell.optimizer, learning_rate=0.01))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    program.table.gradients.zero_()
    program.table.step([0])  # without a gradient only the decay moves a parameter
    shrunk = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert shrunk == {name for name, parameter in before.items() if parameter.ndim >= 2}
    for name in shrunk:
        torch.testing.assert_close(dict(model.named_parameters())[name], before[name] * (1 - 0.01 * 0.1))


@pytest.mark.slow
def test_an_attempt_needs_neither_ray_nor_mlflow_and_leaves_a_whole_record(corpus: Corpus, store: Store) -> None:
    cell = make_cell(corpus, steps=30, seed=5)
    put(store, cell)
    code = (
        "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None\n"
        "from pathlib import Path; from sweeps.store import Store; from sweeps.attempt import run_attempt\n"
        f"print(run_attempt(Store(Path({str(store.root)!r})), {cell.id!r}, study='s').state)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "finished"
    result = read_json(store.cell(cell.id) / "result.json")
    assert (result["tokens"], result["steps"], result["attempt"]) == (30 * 512, 30, 0)
    assert result["val_bpb_final"] == pytest.approx(corpus.info.bits_per_byte(result["val_loss_final"]))
    rows = read_metrics(store, cell.id)
    assert rows[0]["tokens"] == 0
    assert rows[-1]["tokens"] == cell.tokens
    assert rows[-1]["metrics"]["val_loss_final"] == result["val_loss_final"]
    assert len({key for row in rows for key in row["metrics"]}) < 50
    with np.load(store.attempt(cell.id, 0) / "documents.npz", allow_pickle=False) as documents:
        assert documents["loss_sum"].sum() / documents["tokens"].sum() == pytest.approx(result["val_loss_final"])
    again = train(cell, MemoryIO(cell, corpus))
    assert again.val_loss_final == result["val_loss_final"], "another process, the same bits"


def test_a_run_on_tokens_that_lose_text_has_no_bits_per_byte(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "info", replace(corpus.info, altered_documents=1))
    cell = make_cell(corpus, steps=2)
    run = MemoryIO(cell, corpus)
    outcome = train(cell, run)
    assert (outcome.state, outcome.val_bpb_final) == ("finished", None)
    assert "val_loss_final" in run.rows[cell.tokens]
    assert "val_bpb_final" not in run.rows[cell.tokens]


def test_mfu_is_given_only_where_the_peak_is_known() -> None:
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA H200", "float32") is None
    assert peak_flops("cpu", "bfloat16") is None
