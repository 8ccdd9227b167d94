"""A graph is used where it equals the model to the bit, and nowhere else."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small import CONTEXT, MemoryIO, make_cell

from sweeps import tracing
from sweeps.corpora import Corpus
from sweeps.families import FAMILIES, resolve_options
from sweeps.models import make_model
from sweeps.sizes import shape_for
from sweeps.tracing import traced
from sweeps.training import train

CPU = torch.device("cpu")
DENSE = sorted(set(FAMILIES) - {"mixtral"})


def cell_of(corpus: Corpus, family: str = "llama", size: int = 14_000, **changes: Any) -> Any:
    shape = shape_for(FAMILIES[family], size, vocab_size=corpus.info.vocab_size, context=CONTEXT)
    options = tuple(sorted(resolve_options(FAMILIES[family]).items()))
    return make_cell(corpus, family=family, shape=shape, options=options, steps=200, **changes)


def model_of(cell: Any) -> torch.nn.Module:
    return make_model(FAMILIES[cell.family], cell).train()


@pytest.mark.slow
@pytest.mark.parametrize("size", [14_000, 100_000], ids=["padded heads", "whole heads"])
@pytest.mark.parametrize("family", DENSE)
def test_a_run_of_every_dense_family_is_the_same_to_the_bit(
    family: str, size: int, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "LEAST_STEPS", 30)
    cell = cell_of(corpus, family, size)
    cell = replace(cell, tokens=30 * cell.batch_tokens)
    quick = MemoryIO(cell, corpus)
    train(cell, quick)
    monkeypatch.setattr(tracing, "LEAST_STEPS", 1000)
    plain = MemoryIO(cell, corpus)
    train(cell, plain)
    assert quick.rows == plain.rows


def test_dense_models_are_traced(corpus: Corpus) -> None:
    cells = [cell_of(corpus, family, size) for family in DENSE for size in (14_000, 100_000)]
    found = [traced(model_of(cell), cell, CPU, cell.sequences) is not None for cell in cells]
    assert sum(found) > len(found) / 2, "a processor may round one family otherwise, which then goes its own way"


def test_batches_of_another_shape_take_the_models_own_way(corpus: Corpus) -> None:
    cell = cell_of(corpus)
    loss, model = traced(model_of(cell), cell, CPU, 3), model_of(cell)
    assert loss is not None
    tokens = torch.randint(corpus.info.vocab_size, (5, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loss(tokens), tracing.MeanLoss(model)(tokens))


def test_a_model_is_left_as_it_was(corpus: Corpus) -> None:
    cell = cell_of(corpus)
    model, before = model_of(cell), torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert traced(model, cell, CPU, cell.sequences) is not None
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),  # what it computes depends on the data
        ("llama", {"precision": "bfloat16"}),
        ("llama", {"tokens": 199 * 512}),
    ],
)
def test_what_does_not_pay_or_depends_on_data_is_not_traced(
    family: str, changes: dict[str, Any], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.jit, "trace", lambda *_, **__: pytest.fail("it was traced"))
    cell = replace(cell_of(corpus, family), **changes)
    assert traced(model_of(cell), cell, CPU, cell.sequences) is None


def test_large_micro_batches_are_not_traced(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST_FLOPS", 1e6)
    cell = cell_of(corpus)
    assert traced(model_of(cell), cell, CPU, cell.sequences) is None


def test_a_graph_that_is_not_the_model_is_not_used(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = torch.jit.trace

    def frozen(module: Any, tokens: torch.Tensor, **options: Any) -> Any:
        """As of a model that looks at its data: the graph answers every batch as it did the first."""
        logits = trace(module, tokens, **options)(tokens)
        return lambda _: logits

    monkeypatch.setattr(torch.jit, "trace", frozen)
    cell = cell_of(corpus)
    assert traced(model_of(cell), cell, CPU, cell.sequences) is None


def test_gradients_that_differ_are_noticed(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = torch.jit.trace

    def other_gradients(module: Any, tokens: torch.Tensor, **options: Any) -> Any:
        graph = trace(module, tokens, **options)
        return lambda tokens: doubled(graph(tokens))

    def doubled(logits: torch.Tensor) -> torch.Tensor:
        return logits.detach() + 2 * (logits - logits.detach())

    monkeypatch.setattr(torch.jit, "trace", other_gradients)
    cell = cell_of(corpus)
    assert traced(model_of(cell), cell, CPU, cell.sequences) is None


def test_a_torch_that_cannot_trace_leaves_the_models_own_way(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> Any:
        raise RuntimeError("TorchScript is gone")

    monkeypatch.setattr(torch.jit, "trace", gone)
    cell = cell_of(corpus)
    model = model_of(cell)
    assert traced(model, cell, CPU, cell.sequences) is None
    assert model.config._attn_implementation in ("sdpa", "escala_padded")
