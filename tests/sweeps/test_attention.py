"""Padded heads compute what plain ones do, in every family, and where nothing is gained no model has them."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import make_cell
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from sweeps import attention
from sweeps.attention import PADDED, drop_mask, is_causal, pad_heads, pays_to_pad, stackable
from sweeps.cell import Cell, Optimizer
from sweeps.corpora import Corpus
from sweeps.errors import InputError
from sweeps.families import FAMILIES, Family, build_model
from sweeps.losses import MeanLoss, mean_loss
from sweeps.models import make_model
from sweeps.sizes import shape_for
from sweeps.stacking import Stack

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


@pytest.mark.parametrize("whole", [4, 16])
@pytest.mark.parametrize(("width", "heads"), [(16, 2), (20, 2), (48, 4), (32, 2), (36, 2)])
def test_only_heads_that_are_no_whole_vectors_of_this_cpu_are_padded(
    width: int, heads: int, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(attention, "WHOLE", whole)
    padded = width // heads in ({10} if whole == 4 else {8, 10, 12})
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


# --- a family of one's own, whose attention is its own -----------------------------------------------------------


def own(corpus: Corpus, **fields: Any) -> tuple[Family, Cell]:
    """A family of one's own, llama but for some fields of its config, and a cell of it with heads of 10."""
    llama = FAMILIES["llama"]
    assert llama.config is not None
    config = llama.config
    family = replace(llama, config=lambda shape, options: config(shape, options) | fields)
    cell = make_cell(corpus)
    return family, replace(cell, shape=replace(cell.shape, width=20, heads=2, kv_heads=2, head_dim=10))


def stack_of(models: list[torch.nn.Module]) -> Stack:
    recipe = Optimizer(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_norm=1.0)
    return Stack(models, [recipe] * len(models))


def test_a_model_with_a_sliding_window_keeps_it_alone_and_in_a_stack(corpus: Corpus) -> None:
    family, cell = own(corpus, model_type="mistral", sliding_window=4)
    cell = replace(cell, init_std=0.5)  # enough that what is seen matters
    models = [make_model(family, replace(cell, seed=seed)).double() for seed in (0, 1)]
    for model in models:
        assert type(model).__name__ == "MistralForCausalLM"
    tokens = torch.randint(cell.shape.vocab_size, (2, 3, 33), generator=torch.Generator().manual_seed(0))
    changed = tokens[0, :, :-1].clone()
    changed[:, 0] = (changed[:, 0] + 1) % cell.shape.vocab_size
    seen = 3 * cell.shape.depth  # tokens after it that its first token reaches through windows of four
    one, two = (models[0](batch).logits for batch in (tokens[0, :, :-1], changed))
    assert not torch.allclose(one[:, seen], two[:, seen], rtol=0, atol=1e-12)
    torch.testing.assert_close(one[:, seen + 1 :], two[:, seen + 1 :], rtol=0, atol=1e-12)
    alone = torch.stack([mean_loss(model, batch) for model, batch in zip(models, tokens, strict=True)])
    together = stack_of(models).backward(tokens, 3, nullcontext())
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


def test_a_model_that_drops_attention_does_so_alone_and_is_refused_in_a_stack(corpus: Corpus) -> None:
    for fields in (
        {"attention_dropout": 0.5},
        {"model_type": "mistral", "sliding_window": None, "attention_dropout": 0.5},
    ):
        family, cell = own(corpus, **fields)
        models = [make_model(family, replace(cell, seed=seed)).train() for seed in (0, 1)]
        tokens = torch.randint(cell.shape.vocab_size, (2, 3, 33), generator=torch.Generator().manual_seed(0))
        assert mean_loss(models[0], tokens[0]) != mean_loss(models[0], tokens[0]), "it draws anew each time"
        with pytest.raises(InputError, match="as dropout does"):
            stack_of(models).backward(tokens, 3, nullcontext())


def test_gpt2s_dropout_of_attention_has_another_name() -> None:
    shape = shape_for(FAMILIES["gpt2"], 20_000, vocab_size=64, context=32)
    gpt2 = FAMILIES["gpt2"]
    assert gpt2.config is not None
    config = gpt2.config
    assert is_causal(build_model(gpt2, shape, init_std=0.02, seed=0))
    dropping = replace(gpt2, config=lambda shape, options: config(shape, options) | {"attn_pdrop": 0.1})
    assert not is_causal(build_model(dropping, shape, init_std=0.02, seed=0))


# --- without a mask: what training on a GPU has ------------------------------------------------------------------

DENSE = sorted(set(FAMILIES) - {"mixtral"})


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def plain_model(name: str) -> Any:
    shape = shape_for(FAMILIES[name], 100_000, vocab_size=64, context=32)
    return build_model(FAMILIES[name], shape, init_std=0.2, seed=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_mask_a_model_is_the_same_to_the_bit(name: str) -> None:
    model = plain_model(name)
    tokens = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(0))
    before = model(tokens).logits
    drop_mask(model)
    assert model.config._attn_implementation != "sdpa"
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("name", DENSE)
def test_without_a_mask_no_value_of_a_tensor_is_asked_for(name: str) -> None:
    model = plain_model(name)
    tokens = torch.randint(64, (3, 33), generator=torch.Generator().manual_seed(0))
    drop_mask(model)
    with Reads() as reads:
        MeanLoss(model)(tokens).backward()
    assert reads.count == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_without_a_mask_a_compiled_model_has_none_either(name: str) -> None:
    """The attention of a GPU that is fast takes no mask, and skips what lies ahead."""
    found = []

    def look(graph: Any, inputs: Any) -> Any:
        found.extend(node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph

    model = plain_model(name)
    drop_mask(model)
    torch.compiler.reset()
    torch.compile(MeanLoss(model), backend=look, dynamic=False)(torch.zeros(3, 33, dtype=torch.int64))
    assert found
    assert all(node.kwargs["attn_mask"] is None and node.kwargs["is_causal"] for node in found)


def test_only_models_that_attend_to_all_before_lose_their_mask() -> None:
    from transformers import AutoModelForCausalLM

    fields = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    for kind, window, causal in (("mixtral", None, True), ("mixtral", 4, False), ("mistral", 4, False)):
        config = AutoConfig.for_model(kind, vocab_size=16, num_key_value_heads=2, sliding_window=window, **fields)
        assert is_causal(AutoModelForCausalLM.from_config(config)) is causal
    assert not is_causal(torch.nn.Linear(2, 2))


class Attentions(TorchFunctionMode):
    """The shapes of what fused attention is asked for, and its options."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[torch.Size], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.asked.append(([one.shape for one in args], kwargs))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite"])
@pytest.mark.parametrize("narrow", [False, True])
def test_in_float32_on_a_gpu_attention_is_what_its_fused_kernel_takes(name: str, narrow: bool) -> None:
    """By torch's own checks: heads of whole vectors of four, and as many of keys as of queries."""
    model = (model_of if narrow else plain_model)(name).float()
    drop_mask(model)
    model.to("meta")  # a device that is no CPU
    with Attentions() as attentions:
        model(torch.zeros((3, 32), dtype=torch.int64, device="meta"))
    assert attentions.asked
    for (query, key, value), options in attentions.asked:
        assert query == key == value
        assert query[-1] % 4 == 0
        assert options["is_causal"]
        assert options.get("attn_mask") is None
        assert not options.get("enable_gqa")
