"""Counts against published models, and against themselves."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.accounting import (
    Shape,
    flops_6nd,
    flops_per_token,
    forward_flops,
    parameter_parts,
    parameters,
)

ROOT = Path(__file__).parents[2]


def gpt2(width: int, depth: int, *, vocab_size: int = 50257, context: int = 1024, head_dim: int = 64) -> Shape:
    return Shape(
        width=width,
        depth=depth,
        heads=width // head_dim,
        kv_heads=width // head_dim,
        head_dim=head_dim,
        mlp_width=4 * width,
        vocab_size=vocab_size,
        context=context,
        mlp_matrices=2,
        tied=True,
        learned_positions=True,
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        qk_norm=False,
    )


def pythia(width: int, depth: int, vocab_size: int = 50304) -> Shape:
    shape = gpt2(width, depth, vocab_size=vocab_size, context=2048, head_dim=32)
    return dataclasses.replace(shape, tied=False, learned_positions=False)


def llama(
    width: int,
    depth: int,
    mlp_width: int,
    heads: int,
    kv_heads: int,
    *,
    vocab_size: int = 32000,
    context: int = 2048,
    head_dim: int | None = None,
    experts: int = 0,
    experts_per_token: int = 0,
) -> Shape:
    return Shape(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or width // heads,
        mlp_width=mlp_width,
        vocab_size=vocab_size,
        context=context,
        mlp_matrices=3,
        tied=False,
        learned_positions=False,
        attention_bias=False,
        mlp_bias=False,
        norm_bias=False,
        qk_norm=False,
        experts=experts,
        experts_per_token=experts_per_token,
    )


def chinchilla(depth: int, width: int, mlp_width: int, heads: int, head_dim: int) -> Shape:
    shape = gpt2(width, depth, vocab_size=32000, context=2048, head_dim=head_dim)
    return dataclasses.replace(shape, heads=heads, kv_heads=heads, mlp_width=mlp_width)


GPT2 = gpt2(768, 12)
LLAMA_7B = llama(4096, 32, 11008, 32, 32)
MIXTRAL = llama(4096, 32, 14336, 32, 8, experts=8, experts_per_token=2)


@pytest.mark.parametrize(
    ("shape", "total", "non_embedding"),
    [
        (GPT2, 124439808, 85056000),
        (gpt2(1024, 24), 354823168, 302311424),
        (gpt2(1280, 36), 774030080, 708390400),
        (gpt2(1600, 48), 1557611200, 1475561600),
        (pythia(128, 6), 14067712, 1189888),
        (pythia(512, 6), 70426624, 18915328),
        (pythia(768, 12), 162322944, 85056000),
        (pythia(1024, 24), 405334016, 302311424),
        (pythia(2048, 16), 1011781632, 805736448),
        (pythia(2048, 24), 1414647808, 1208602624),
        (pythia(2560, 32), 2775208960, 2517652480),
        (pythia(4096, 32, 50432), 6857302016, 6444163072),
        (pythia(5120, 36, 50688), 11846072320, 11327027200),
        (LLAMA_7B, 6738415616, 6476271616),
        (llama(5120, 40, 13824, 40, 40), 13015864320, 12688184320),
        (llama(8192, 80, 28672, 64, 8), 68976648192, 68452360192),
        (llama(4096, 32, 14336, 32, 8, vocab_size=128256), 8030261248, 6979588096),
        (llama(8192, 80, 28672, 64, 8, vocab_size=128256), 70553706496, 68452360192),
        (llama(16384, 126, 53248, 128, 8, vocab_size=128256), 405853388800, 401650696192),
        (llama(4096, 32, 14336, 32, 8), 7241732096, 6979588096),
    ],
)
def test_dense_parameters_equal_the_published_models(shape: Shape, total: int, non_embedding: int) -> None:
    count = parameters(shape)
    assert (count.active, count.total, count.non_embedding) == (total, total, non_embedding)


def flops_conventions(shape: Shape) -> dict[str, int]:
    """Training FLOPs per token under the conventions of the papers, which tell their numbers in these.

    The three DeepSeek numbers (Bi et al. 2024) assume, as that paper does, an MLP of 4 x width and no biases.
    """
    n = parameters(shape)
    attention = 12 * shape.depth * shape.heads * shape.head_dim * shape.context
    kaplan = 72 * shape.depth * shape.width**2
    return {
        "C": flops_per_token(shape),
        "C_causal": flops_per_token(shape, causal=True),
        "C_without_head": flops_per_token(shape, head=False),
        "C_6nd": 6 * n.active,
        "C_6nd_non_embedding": 6 * n.non_embedding,  # Kaplan et al. 2020
        "C_6nd_non_embedding_head": 6 * n.non_embedding_head,  # Porian et al. 2024
        "palm": 6 * n.active + attention,  # Chowdhery et al. 2022, Appendix B
        "palm_without_input_table": 6 * n.non_embedding_head + attention,
        "deepseek_m": kaplan + attention,
        "deepseek_6n1": kaplan,
        "deepseek_6n2": kaplan + 6 * shape.vocab_size * shape.width,
        "chinchilla": flops_per_token(shape, softmax=True, lookup=True),  # Appendix F
        "chinchilla_without_lookup": flops_per_token(shape, softmax=True),
    }


def test_gpt2_short_forms() -> None:
    assert parameters(GPT2).total - parameter_parts(GPT2)["position_table"] == 123653376
    assert flops_conventions(GPT2)["deepseek_6n1"] == 6 * 84934656


def test_mixture_of_experts_counts_the_experts_that_a_token_passes_through() -> None:
    count = parameters(MIXTRAL)
    assert (count.total, count.active) == (46702792704, 12879925248)
    assert parameter_parts(MIXTRAL)["router"] == 32 * 4096 * 8
    assert flops_6nd(MIXTRAL) == 6 * 12879925248


@pytest.mark.parametrize(
    ("depth", "width", "mlp_width", "heads", "kv_heads", "non_embedding"),
    [
        (8, 256, 640, 4, 1, 5247232),
        (12, 512, 1280, 8, 2, 31470080),
        (18, 768, 1920, 12, 3, 106196736),
        (24, 1024, 2560, 16, 2, 245416960),
        (30, 1280, 3200, 20, 2, 476852480),
        (36, 1536, 3840, 24, 3, 828225024),
    ],
)
def test_density_reference_models(
    depth: int, width: int, mlp_width: int, heads: int, kv_heads: int, non_embedding: int
) -> None:
    shape = llama(width, depth, mlp_width, heads, kv_heads, head_dim=64)
    assert parameters(shape).non_embedding == non_embedding


def test_the_default_is_c_and_gpt2_costs_what_the_design_says() -> None:
    assert flops_per_token(GPT2) == flops_conventions(GPT2)["C"] == 854438400


def test_gpt2_under_every_convention() -> None:
    named = flops_conventions(GPT2)
    assert flops_6nd(GPT2) == named["C_6nd"] == 746638848
    assert named["palm"] == 859885056
    assert named["palm"] - 6 * parameter_parts(GPT2)["position_table"] == 855166464
    assert named["deepseek_m"] == 622854144
    assert named["deepseek_6n1"] == 509607936
    assert named["deepseek_6n2"] == 741192192
    assert named["C_6nd_non_embedding"] == 6 * 85056000
    assert named["C_6nd_non_embedding_head"] == 6 * (85056000 + 50257 * 768)


def test_gpt2_under_chinchilla_appendix_f() -> None:
    assert sum(forward_flops(GPT2).values()) * 1024 == 371148718080
    assert flops_per_token(GPT2, softmax=True, lookup=True) * 1024 == 1113446154240
    assert flops_conventions(GPT2)["chinchilla"] == 1087349760
    assert flops_conventions(GPT2)["chinchilla_without_lookup"] == 855765504


@pytest.mark.parametrize(
    ("shape", "blocks", "with_logits", "with_lookup"),
    [
        (chinchilla(10, 640, 2560, 10, 64), 454041600, 576921600, 699801600),
        (chinchilla(20, 1024, 4096, 16, 64), 2019164160, 2215772160, 2412380160),
        (chinchilla(40, 3584, 14336, 28, 128), 40537620480, 41225748480, 41913876480),
    ],
)
def test_chinchilla_shapes(shape: Shape, blocks: int, with_logits: int, with_lookup: int) -> None:
    assert flops_per_token(shape, softmax=True, head=False) == blocks
    assert flops_per_token(shape, softmax=True) == with_logits
    assert flops_per_token(shape, softmax=True, lookup=True) == with_lookup


def test_llama_7b_under_the_palm_rule() -> None:
    longer = flops_conventions(dataclasses.replace(LLAMA_7B, context=4096))
    assert flops_6nd(LLAMA_7B) == 40430493696
    assert flops_conventions(LLAMA_7B)["palm"] == 43651719168
    assert longer["palm"] == 46872944640
    assert longer["palm_without_input_table"] == 46086512640


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    experts = draw(st.sampled_from([0, 0, 1, 4, 64]))
    booleans = {
        name: draw(st.booleans())
        for name in ("tied", "learned_positions", "attention_bias", "mlp_bias", "norm_bias", "qk_norm")
    }
    return Shape(
        width=draw(st.integers(1, 300)),
        depth=draw(st.integers(1, 40)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 64)),
        mlp_width=draw(st.integers(1, 900)),
        vocab_size=draw(st.integers(1, 200000)),
        context=2 * draw(st.integers(1, 4096)),
        mlp_matrices=draw(st.sampled_from([2, 3])),
        experts=experts,
        experts_per_token=draw(st.integers(1, experts)) if experts else 0,
        extra_parameters=draw(st.sampled_from([0, 17])),
        extra_flops=draw(st.sampled_from([0, 34])),
        **booleans,
    )


@settings(deadline=None, max_examples=200, derandomize=True)
@given(shapes())
def test_parts_add_up_for_any_shape(shape: Shape) -> None:
    count, parts = parameters(shape), parameter_parts(shape)
    assert sum(parts.values()) == count.total
    assert sum(parameter_parts(shape, active=True).values()) == count.active
    assert min(parts.values()) >= 0
    assert 0 < count.non_embedding < count.non_embedding_head
    assert count.non_embedding < count.active <= count.total
    assert (count.active == count.total) == (shape.experts == shape.experts_per_token)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(shapes())
def test_counts_respond_to_a_shape_as_the_architecture_does(shape: Shape) -> None:
    def total(**changes: Any) -> int:
        return parameters(dataclasses.replace(shape, **changes)).total

    tables = shape.vocab_size * shape.width
    assert total(tied=False) - total(tied=True) == tables
    # every layer costs the same, in parameters and in FLOPs
    more, most = (dataclasses.replace(shape, depth=shape.depth + k) for k in (1, 2))
    assert total(depth=shape.depth + 2) - total(depth=shape.depth + 1) == total(depth=shape.depth + 1) - total()
    assert flops_per_token(most) - flops_per_token(more) == flops_per_token(more) - flops_per_token(shape)
    # the flags add what they name
    flops = forward_flops(shape)
    assert flops_per_token(shape) - flops_per_token(shape, head=False) == 6 * tables
    assert flops_per_token(shape, lookup=True) - flops_per_token(shape) == 6 * tables
    assert flops_per_token(shape, softmax=True) - flops_per_token(shape) == 3 * flops["softmax"]
    scores = flops["attention_scores"] + flops["attention_values"]
    assert flops_per_token(shape) - flops_per_token(shape, causal=True) == 3 * scores // 2
    assert min(flops.values()) >= 0
    assert flops_per_token(shape) > 0


def test_counting_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, sweeps.accounting, sweeps.families as f, sweeps.sizes as s\n"
        "s.shape_for(f.FAMILIES['llama'], 1e6, vocab_size=256, context=128)\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'ray') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
