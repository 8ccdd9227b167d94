"""Padded heads compute what plain ones do, in every family, and where nothing is gained no model has them."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sweeps.attention import PADDED, pad_heads, pays_to_pad, stackable
from sweeps.families import FAMILIES, build_model
from sweeps.sizes import shape_for

SIZES = {"gpt2": 40_000, "gpt_neox": 40_000, "llama": 40_000, "qwen3": 40_000, "granite": 40_000, "mixtral": 80_000}


def model_of(name: str) -> Any:
    """A model whose heads are padded."""
    family = FAMILIES[name]
    for size in range(SIZES[name], 10 * SIZES[name], 1_000):
        shape = shape_for(family, size, vocab_size=64, context=32)
        if pays_to_pad(shape.head_dim):
            return build_model(family, shape, init_std=0.2, seed=0).double()
    raise AssertionError(f"no {name} of such heads")


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_over_padded_heads_are_those_over_plain_ones(name: str) -> None:
    model = model_of(name)
    tokens = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for way in ("sdpa", PADDED):
        if way == PADDED:
            pad_heads(model)
        assert model.config._attn_implementation == way
        model.zero_grad()
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        found.append((logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (plain, slopes), (padded, others) = found
    assert torch.allclose(plain, padded, rtol=1e-9, atol=1e-9)
    assert len(slopes) == len(others)
    assert all(torch.allclose(one, two, rtol=1e-8, atol=1e-9) for one, two in zip(slopes, others, strict=True))
    assert not torch.equal(plain, model(tokens.flip(0)).logits), "the tokens matter"


def test_attention_over_padded_heads_looks_at_nothing_ahead() -> None:
    model = model_of("llama")
    pad_heads(model)
    tokens = torch.randint(64, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 64
    one, two = model(tokens).logits, model(changed).logits
    assert torch.equal(one[:, :20], two[:, :20])
    assert not torch.allclose(one[:, 20:], two[:, 20:])


@pytest.mark.parametrize(("width", "heads", "padded"), [(16, 2, False), (20, 2, True), (48, 4, False), (36, 2, False)])
def test_only_heads_that_gain_by_it_are_padded(width: int, heads: int, padded: bool) -> None:
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=16,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    pad_heads(model)
    assert (model.config._attn_implementation == PADDED) is padded
    before = model.config._attn_implementation
    with stackable(model):
        assert model.config._attn_implementation not in (PADDED, "sdpa")
    assert model.config._attn_implementation == before


def test_a_model_of_ones_own_is_left_alone() -> None:
    model = torch.nn.Linear(2, 2)
    pad_heads(model)
    with stackable(model):
        pass
