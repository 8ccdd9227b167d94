"""The model of a cell: its family's, under its parametrisation, and what its optimizer must know of that.

Multipliers are hooks on modules of the family's own model, so that every way to its loss meets them: plain or in
chunks, under torch.func.functional_call and vmap, compiled. That of the logits stands behind the last norm, before the
head: the same number, also where the head shares the token table. A factor of 1 leaves no hook and no rounding behind.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from sweeps.accounting import Shape
from sweeps.attention import drop_mask, is_causal, pad_heads
from sweeps.cell import Cell
from sweeps.families import Family, build_model
from sweeps.parametrisation import LAYOUTS, Parametrisation, TensorFactors, factors, role


def make_model(family: Family, cell: Cell, device: str = "cpu") -> torch.nn.Module:
    """The cell's model with its initial weights, on the CPU, to train on such a device (cpu, cuda). Raises InputError
    as `build_model` does."""
    model = build_model(family, cell.shape, init_std=cell.init_std, seed=cell.seed, options=dict(cell.options))
    parametrise(model, cell.family, cell.shape, cell.parametrisation)
    pad_heads(model)
    if device != "cpu" and is_causal(model):
        drop_mask(model)
    return model


def parametrise(model: torch.nn.Module, family: str, shape: Shape, parametrisation: Parametrisation) -> None:
    """Rescale the initial weights of a fresh model of a built-in family, and multiply what its forward pass makes."""
    if parametrisation.kind == "standard":
        return
    layout = LAYOUTS[family]
    found = factors(parametrisation, shape, shrunk=layout.shrunk)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            init = found.roles[role(layout, name, parameter.ndim)].init
            if init != 1:
                parameter.mul_(init)
    layers: Any = model.get_submodule(layout.layers)
    for layer in layers:
        if found.attention is not None:
            layer.get_submodule(layout.attention).scaling = found.attention
        for name in layout.projections:
            _multiply(layer.get_submodule(name), found.residual)
    _multiply(model.get_submodule(layout.last_norm), found.output)


def tensor_factors(
    model: torch.nn.Module, family: str, shape: Shape, parametrisation: Parametrisation
) -> Mapping[str, TensorFactors]:
    """Parameter name -> what its rate, decay and eps are multiplied by; empty at `standard`."""
    if parametrisation.kind == "standard":
        return {}
    layout = LAYOUTS[family]
    roles = factors(parametrisation, shape, shrunk=layout.shrunk).roles
    return {name: roles[role(layout, name, parameter.ndim)] for name, parameter in model.named_parameters()}


def _multiply(module: torch.nn.Module, factor: float) -> None:
    if factor != 1:
        module.register_forward_hook(partial(_scaled, factor))


def _scaled(factor: float, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * factor
