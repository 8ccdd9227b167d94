"""Compiling is tried only where it can pay, and a compiled loss is the eager one but for rounding."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from sweeps import compiling
from sweeps.compiling import can_compile, maybe_compile
from sweeps.families import FAMILIES, build_model
from sweeps.losses import MeanLoss, mean_loss
from sweeps.sizes import shape_for


def model_and_tokens() -> tuple[torch.nn.Module, torch.Tensor]:
    shape = shape_for(FAMILIES["gpt2"], 10_000, vocab_size=64, context=16)
    model = build_model(FAMILIES["gpt2"], shape, init_std=0.02, seed=0)
    return model, torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))


def test_a_short_cell_is_never_compiled() -> None:
    model, tokens = model_and_tokens()
    state = torch.get_rng_state()
    loss, compiled = maybe_compile(model, tokens, 10, nullcontext())
    assert not compiled
    assert torch.equal(loss(tokens), mean_loss(model, tokens))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_compiled_without_a_compiler_whatever_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model, tokens = model_and_tokens()
    assert not can_compile(tokens.device)
    for chosen in (None, True, False):
        assert isinstance(maybe_compile(model, tokens, 10**9, nullcontext(), chosen=chosen)[0], MeanLoss)


def test_what_the_first_attempt_chose_is_kept() -> None:
    model, tokens = model_and_tokens()
    assert maybe_compile(model, tokens, 10**9, nullcontext(), chosen=False)[1] is False
    if can_compile(tokens.device):
        assert maybe_compile(model, tokens, 1, nullcontext(), chosen=True)[1] is True  # compiled at its first call


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_however_many_shapes_a_worker_trains_each_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def count(graph: Any, inputs: Any) -> Any:
        def run(*values: Any) -> Any:
            nonlocal calls
            calls += 1
            return graph(*values)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))  # Inductor takes its time
    model, _ = model_and_tokens()
    for context in (*range(4, 14), 13):
        loss, compiled = maybe_compile(
            model, torch.zeros((2, context), dtype=torch.int64), 1, nullcontext(), chosen=True
        )
        before = calls
        loss(torch.zeros((2, context), dtype=torch.int64))
        assert compiled
        assert calls > before, f"eager at a context of {context}"


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_a_compiled_loss_has_the_eager_value_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_and_tokens()
    monkeypatch.setattr(compiling, "LEAST_GAIN", 0.0)
    loss, compiled = maybe_compile(model, tokens, 10**9, nullcontext())
    assert compiled
    found = loss(tokens)
    found.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    plain = mean_loss(model, tokens)
    plain.backward()
    assert float(found.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    for one, parameter in zip(gradients, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(one, parameter.grad, rtol=1e-3, atol=1e-6)
