"""Parametrisations: how initial scales, learning rates and forward multipliers follow a model's width and depth.

    standard    nothing follows them
    mup         width (Yang et al. 2022, 2203.03466), AdamW, tables and readout as in the table below
    completep   width and depth (Dey et al. 2025, 2505.01618)

With m = width / base width, m_L = depth / base depth and alpha = 1 (mup: m_L = 1):

    tensor                        init std     rate              decay   eps
    token and position tables     1            1                 1       1/m
    matrices of the layers        1/sqrt(m)    m_L^(alpha-1)/m   m       m_L^-alpha/m
    head, tied or not             1            1                 1       1/m
    gains, biases of the layers   1            m_L^(alpha-1)     none    m_L^-alpha/m
    gain, bias of the last norm   1            1                 none    1/m

    forward: logits / m; q.k sqrt(base head size) / head size; every branch into the residual stream m_L^-alpha

At the base every factor is 1, and the numbers are those of `standard` to the bit. Decay is multiplied by the rate each
step, so that m keeps it fixed. Adam's eps follows the gradients: with logits / m the slope at every activation, and
with it the gradient of every tensor, falls as 1/m, and that of a layer's tensors once more with its branch; an eps that
stays would grow beside them and slow wide models down (tests/sweeps/test_coordinate_check.py measures it). The failure
this guards against: a best learning rate that moves with size, so that what was tuned small is wrong where it matters.
Imports no torch.
"""

import math
from dataclasses import dataclass
from typing import Literal

from sweeps.accounting import Shape
from sweeps.errors import InputError

Role = Literal["table", "hidden", "projection", "head", "vector", "last_vector"]
"""hidden: a matrix of a layer; projection: one whose output joins the residual stream; vector: a layer's gain or bias;
last_vector: one of the last norm."""


@dataclass(frozen=True, kw_only=True)
class Parametrisation:
    """How a cell is parametrised. Sizes of the base, where the recipe's numbers hold as they stand."""

    kind: str = "standard"
    """standard, mup or completep."""
    base_width: int | None = None
    base_head_dim: int | None = None
    base_depth: int | None = None
    """completep only."""


STANDARD = Parametrisation()


@dataclass(frozen=True, kw_only=True)
class TensorFactors:
    """What one tensor's initial deviation, learning rate, weight decay and Adam's eps are multiplied by."""

    init: float = 1.0
    rate: float = 1.0
    decay: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Factors:
    """All that a parametrisation changes in one model."""

    roles: dict[Role, TensorFactors]
    residual: float = 1.0
    """Of every branch, before it joins the residual stream."""
    attention: float | None = None
    """What q.k is multiplied by; None: the family's own, 1 / sqrt(head size)."""
    output: float = 1.0
    """Of the logits."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of a family's models are, by module name."""

    layers: str
    last_norm: str
    attention: str
    """Within a layer; its attribute `scaling` is what q.k is multiplied by."""
    projections: tuple[str, ...]
    """Within a layer: the matrices whose output joins the residual stream."""
    tables: tuple[str, ...]
    shrunk: bool = False
    """The projections are drawn smaller by sqrt(2 depth) (Radford et al. 2019)."""


_LLAMA = Layout(
    layers="model.layers",
    last_norm="model.norm",
    attention="self_attn",
    projections=("self_attn.o_proj", "mlp.down_proj"),
    tables=("model.embed_tokens",),
)
LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout(
        layers="transformer.h",
        last_norm="transformer.ln_f",
        attention="attn",
        projections=("attn.c_proj", "mlp.c_proj"),
        tables=("transformer.wte", "transformer.wpe"),
        shrunk=True,
    ),
    "llama": _LLAMA,
    "qwen3": _LLAMA,
}


def check_parametrisation(kind: str, family: str, optimizer: str) -> None:
    """Raise InputError where a family or an optimizer has no such parametrisation."""
    if kind == "standard":
        return
    if family not in LAYOUTS:
        raise InputError(
            f"family {family} has no parametrisation {kind}: it is defined for {', '.join(LAYOUTS)}. Use one of them, "
            "or parametrisation: standard."
        )
    if optimizer != "adamw":
        raise InputError(
            f"optimizer {optimizer} has no parametrisation {kind}: its factors hold for the updates of AdamW. Use "
            f"optimizer: adamw, or parametrisation: standard, under which {optimizer}'s rate moves little with width."
        )


def factors(parametrisation: Parametrisation, shape: Shape, *, shrunk: bool = False) -> Factors:
    """What a parametrisation changes in a model of this shape. `shrunk`: as in `Layout`."""
    if parametrisation.kind == "standard":
        return Factors(roles={})
    base_width, base_depth = parametrisation.base_width, parametrisation.base_depth
    assert base_width is not None, "every other kind has a base"
    scaled = scaled_factors(shape.width / base_width, shape.depth / base_depth if base_depth else 1.0, shrunk=shrunk)
    if parametrisation.base_head_dim == shape.head_dim:
        return scaled  # the family's own 1 / sqrt(head size), to the bit
    base_head_dim = parametrisation.base_head_dim or 1
    return Factors(
        roles=scaled.roles,
        residual=scaled.residual,
        attention=math.sqrt(base_head_dim) / shape.head_dim,
        output=scaled.output,
    )


def scaled_factors(width: float, depth: float = 1.0, *, alpha: float = 1.0, shrunk: bool = False) -> Factors:
    """The table of the module, for a model `width` times as wide and `depth` times as deep as its base.

    alpha: how branches shrink with depth; 1 is CompleteP, .5 is depth-muP (Yang et al. 2023), whose rates do not
    carry over. Attention is left as it is: it does not follow width, but the head size.
    """
    branch, rate = depth**-alpha, depth ** (alpha - 1)
    hidden = TensorFactors(init=width**-0.5, rate=rate / width, decay=width, eps=branch / width)
    # CompleteP shrinks branches by depth alone: what a family does to its projections stays as it is at the base.
    init = hidden.init * (math.sqrt(depth) if shrunk else 1.0)
    outside = TensorFactors(eps=1 / width)
    return Factors(
        roles={
            "table": outside,
            "hidden": hidden,
            "projection": TensorFactors(init=init, rate=hidden.rate, decay=hidden.decay, eps=hidden.eps),
            "head": outside,
            "vector": TensorFactors(rate=rate, eps=hidden.eps),
            "last_vector": outside,
        },
        residual=branch,
        output=1 / width,
    )


def role(layout: Layout, name: str, axes: int) -> Role:
    """The role of a parameter by its name in the model and its number of axes."""
    if name.startswith(f"{layout.layers}."):
        module = name.removeprefix(f"{layout.layers}.").partition(".")[2].rpartition(".")[0]
        if axes < 2:
            return "vector"
        return "projection" if module in layout.projections else "hidden"
    if axes < 2:
        return "last_vector"
    return "table" if name.rpartition(".")[0] in layout.tables else "head"
