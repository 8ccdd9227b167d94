"""A graph is used where it equals the model to the bit, and nowhere else."""

from collections.abc import Callable
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
from sweeps.stacking import Stack
from sweeps.tracing import traced, traced_stack
from sweeps.training import train, train_together

CPU = torch.device("cpu")
DENSE = sorted(set(FAMILIES) - {"mixtral"})


def cell_of(corpus: Corpus, family: str = "llama", size: int = 14_000, **changes: Any) -> Any:
    shape = shape_for(FAMILIES[family], size, vocab_size=corpus.info.vocab_size, context=CONTEXT)
    options = tuple(sorted(resolve_options(FAMILIES[family]).items()))
    return make_cell(corpus, family=family, shape=shape, options=options, steps=200, **changes)


def model_of(cell: Any) -> torch.nn.Module:
    return make_model(FAMILIES[cell.family], cell).train()


def stack_graph(cell: Any, micro_batch: int = 100) -> Any:
    """The graph of a stack of two of a cell, over all its steps."""
    stack = Stack([model_of(cell), model_of(replace(cell, seed=1))], [cell.optimizer] * 2)
    return traced_stack(stack.models[0], stack._parameters, cell, cell.steps, micro_batch)


def solo_graph(cell: Any, micro_batch: int = 100) -> Any:
    return traced(model_of(cell), cell, CPU, micro_batch)


BOTH = pytest.mark.parametrize("graph_of", [solo_graph, stack_graph], ids=["solo", "stack"])


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


@pytest.mark.slow
@pytest.mark.parametrize("family", DENSE)
def test_a_stack_of_every_dense_family_is_the_same_to_the_bit(
    family: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = cell_of(corpus, family)
    cell = replace(cell, tokens=30 * cell.batch_tokens)
    cells = [cell, replace(cell, seed=1), replace(cell, data_seed=1)]
    rows = []
    for least in (30, 1000):
        monkeypatch.setattr(tracing, "LEAST_STEPS", least)
        ios = [MemoryIO(one, corpus) for one in cells]
        train_together(cells, ios)
        rows.append([io.rows for io in ios])
    assert rows[0] == rows[1]


@BOTH
def test_dense_models_are_traced(graph_of: Callable[..., Any], corpus: Corpus) -> None:
    found = [graph_of(cell_of(corpus, family, size)) is not None for family in DENSE for size in (14_000, 100_000)]
    assert sum(found) > len(found) / 2, "a processor may round one family otherwise, which then goes its own way"


def test_batches_of_another_shape_take_the_models_own_way(corpus: Corpus) -> None:
    cell = cell_of(corpus)
    loss, model = traced(model_of(cell), cell, CPU, 3), model_of(cell)
    assert loss is not None
    tokens = torch.randint(corpus.info.vocab_size, (5, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loss(tokens), tracing.MeanLoss(model)(tokens))


def test_a_stacks_batches_of_another_shape_take_the_models_own_way(corpus: Corpus) -> None:
    cell = cell_of(corpus)
    stack = Stack([model_of(cell), model_of(replace(cell, seed=1))], [cell.optimizer] * 2)
    losses = traced_stack(stack.models[0], stack._parameters, cell, cell.steps, 3)
    assert losses is not None
    tokens = torch.randint(corpus.info.vocab_size, (2, 5, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    found = losses(stack._parameters, tokens)
    assert torch.equal(found, tracing.stack_loss(stack.models[0])(stack._parameters, tokens))


def test_a_stack_is_left_as_it_was_and_goes_on_by_its_graph(corpus: Corpus) -> None:
    cell = cell_of(corpus)
    stack, before = (
        Stack([model_of(cell), model_of(replace(cell, seed=1))], [cell.optimizer] * 2),
        torch.get_rng_state(),
    )
    values, own = stack.table.values.clone(), stack._losses
    stack.trace(cell, 199, cell.sequences)
    assert stack._losses is own, "too few steps are left"
    stack.trace(cell, 200, cell.sequences)
    assert stack._losses is not own
    assert torch.equal(values, stack.table.values)
    assert not stack.table.gradients.any()
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_is_left_as_it_was(corpus: Corpus) -> None:
    cell = cell_of(corpus)
    model, before = model_of(cell), torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert traced(model, cell, CPU, cell.sequences) is not None
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(before, torch.get_rng_state())


@BOTH
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),  # what it computes depends on the data
        ("llama", {"precision": "bfloat16"}),
        ("llama", {"tokens": 199 * 512}),
    ],
)
def test_what_does_not_pay_or_depends_on_data_is_not_traced(
    graph_of: Callable[..., Any],
    family: str,
    changes: dict[str, Any],
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.jit, "trace", lambda *_, **__: pytest.fail("it was traced"))
    assert graph_of(replace(cell_of(corpus, family), **changes)) is None


@BOTH
def test_large_micro_batches_are_not_traced(
    graph_of: Callable[..., Any], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "MOST_FLOPS", 1e6)
    assert graph_of(cell_of(corpus)) is None


@BOTH
def test_a_graph_that_is_not_the_model_is_not_used(
    graph_of: Callable[..., Any], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = torch.jit.trace

    def frozen(module: Any, inputs: tuple[torch.Tensor, ...], **options: Any) -> Any:
        """As of a model that looks at its data: the graph answers every batch as it did the first."""
        logits = trace(module, inputs, **options)(*inputs)
        return lambda *_: logits

    monkeypatch.setattr(torch.jit, "trace", frozen)
    assert graph_of(cell_of(corpus)) is None


@BOTH
def test_gradients_that_differ_are_noticed(
    graph_of: Callable[..., Any], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = torch.jit.trace

    def other_gradients(module: Any, inputs: tuple[torch.Tensor, ...], **options: Any) -> Any:
        graph = trace(module, inputs, **options)
        return lambda *inputs: doubled(graph(*inputs))

    def doubled(logits: torch.Tensor) -> torch.Tensor:
        return logits.detach() + 2 * (logits - logits.detach())

    monkeypatch.setattr(torch.jit, "trace", other_gradients)
    assert graph_of(cell_of(corpus)) is None


def test_a_torch_that_cannot_trace_leaves_the_models_own_way(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> Any:
        raise RuntimeError("TorchScript is gone")

    monkeypatch.setattr(torch.jit, "trace", gone)
    cell = cell_of(corpus)
    model = model_of(cell)
    assert traced(model, cell, CPU, cell.sequences) is None
    assert model.config._attn_implementation in ("sdpa", "escala_padded")
