"""Attention of the library's models, where Escala's own way to the fused kernel is faster or the only one.

- Heads of 6, 10 or 14 are not whole vectors of a CPU, nor are those of 4, 8 or 12 of one with AVX-512, and its fused
  attention takes up to twice as long over them: they are padded to 16 with zeros, which add nothing to a product.
- A forward pass that is traced or compiled: the library would make a mask too, where it otherwise leaves it out, and a
  GPU's fastest attention takes none. A forward pass on a GPU: to leave it out, the library waits for the device.
- float32 on a GPU: fused attention wants heads of whole vectors there, and as many of keys and values as of queries.
  Without it all scores lie in memory at once, which sweeps/memory.py does not reckon with.
- The members of a stack: fused attention on a CPU has no batching rule under `vmap` and would loop over them.

Ours attends to all that came before and knows of no mask, window or dropout. The failure this guards against: a model
of one's own family that has one of these would lose it without a word. It keeps its own attention (`is_causal`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

PADDED, UNMASKED, STACKED = "escala_padded", "escala_unmasked", "escala_stacked"
"""Our attentions' names in transformers."""
LANES = 16
"""What narrow heads are padded to on a CPU."""
WHOLE = LANES if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4
"""Heads of a multiple of so many are fast on this CPU as they are. Read once: a compiled forward pass cannot ask."""
GPU_LANES = 4
"""And in float32 on a GPU, to a multiple of so many."""
CAUSAL = {"gpt2", "gpt_neox", "llama", "qwen3", "granite", "mixtral"}
"""Model types of transformers that attend to all before where their configuration says nothing else."""


def pays_to_pad(head_dim: int) -> bool:
    """Whether fused attention on this CPU is faster over heads padded to `LANES`."""
    return head_dim < LANES and head_dim % WHOLE != 0


def is_causal(model: torch.nn.Module) -> bool:
    """Whether it is a model of transformers' own whose tokens attend to all that came before them, and to no other, and
    no part of that attention is dropped: what our attention computes too."""
    if type_of(model) not in CAUSAL:
        return False
    config: Any = model.config
    dropped = getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0)  # GPT-2's name
    return not dropped and getattr(config, "sliding_window", None) is None and getattr(config, "is_causal", True)


def type_of(model: torch.nn.Module) -> str | None:
    """The type of a model of transformers'; None of any other, also of a user's own subclass, which may do anything."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "model_type", None) if type(model).__module__.startswith("transformers.") else None


def pad_heads(model: torch.nn.Module) -> None:
    """Let a causal model attend over padded heads while it is on a CPU, if its heads are of such a width."""
    if not is_causal(model):
        return
    config: Any = model.config
    heads = config.num_attention_heads
    if config._attn_implementation == "sdpa" and heads and pays_to_pad(config.hidden_size // heads):
        _register()
        config._attn_implementation = PADDED


@contextmanager
def unmasked(model: torch.nn.Module) -> Iterator[None]:
    """Meanwhile a model of transformers' attends without a mask: to what came before, as it does anyway."""
    config: Any = model.config
    before = config._attn_implementation
    drop_mask(model)
    try:
        yield
    finally:
        config._attn_implementation = before


def drop_mask(model: torch.nn.Module) -> None:
    """From now on a model of transformers' attends without a mask: to all that came before, which must be what it does
    anyway."""
    config: Any = model.config
    if config._attn_implementation == "sdpa":  # ours know of no mask
        _register()
        config._attn_implementation = UNMASKED


@contextmanager
def stackable(model: torch.nn.Module) -> Iterator[None]:
    """Meanwhile the model, if it is one of transformers', attends through `_Folded` if it is causal, and runs experts
    without loops whose length depends on the data."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before not in ("sdpa", PADDED, UNMASKED):
        yield
        return
    config._experts_implementation = "batched_mm"
    if is_causal(model):
        _register()
        config._attn_implementation = STACKED
    try:
        yield
    finally:
        config._attn_implementation, config._experts_implementation = before, "eager"


class _Folded(torch.autograd.Function):
    """Fused attention of all members as one larger batch."""

    @staticmethod
    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        raise AssertionError("only for use under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, query: Any, key: Any, value: Any, scale: float) -> Any:
        query, key, value = (
            (one.movedim(axis, 0) if axis is not None else one.expand(info.batch_size, *one.shape)).flatten(0, 1)
            for one, axis in zip((query, key, value), in_dims, strict=False)
        )
        return _causal(query, key, value, scale).unflatten(0, (info.batch_size, -1)), 0


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention over (sequences, heads, tokens, head_dim)."""
    width = query.shape[-1]
    if query.device.type == "cpu":
        lacking = LANES - width if pays_to_pad(width) else 0
    else:
        lacking = -width % GPU_LANES if value.dtype == torch.float32 else 0
    if lacking:
        query, key, value = (pad(one, (0, lacking)) for one in (query, key, value))
    mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return mixed[..., :width]


def _attend(
    causal: Callable[..., torch.Tensor],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it, but for `causal`: the way to attend."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal(*_grouped(query, key, value), scale).transpose(1, 2).contiguous(), None


def _attend_unmasked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    wide = value.dtype == torch.float32  # under autocast queries may be, but no values
    if wide and value.device.type != "cpu" and not options.get("dropout"):
        return _attend(_causal, module, query, key, value, None, **options)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, None, **options)


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values that several heads share, once for each of these."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return query, key, value


def _register() -> None:
    """Ours have no way to make a mask, so that the library makes none, and reads no tensor to find whether it could."""
    from transformers import AttentionInterface

    padded, stacked = partial(_attend, _causal), partial(_attend, _Folded.apply)
    for name, attend in ((PADDED, padded), (UNMASKED, _attend_unmasked), (STACKED, stacked)):
        if name not in AttentionInterface().valid_keys():
            AttentionInterface.register(name, attend)
