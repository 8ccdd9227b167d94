"""The coordinate check (Yang & Hu 2021, appendix D): under mup a few steps move every activation by as much in a wide
model as in a narrow one, under completep also in a deep one; under `standard` they do not.

Whoever breaks a factor of sweeps/parametrisation.py moves a slope here by about a half or by one.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from sweeps.accounting import Shape
from sweeps.cell import Optimizer
from sweeps.families import FAMILIES, build_model, resolve_options
from sweeps.models import parametrise, tensor_factors
from sweeps.parametrisation import LAYOUTS, STANDARD, Parametrisation, role
from sweeps.sizes import shape_of
from sweeps.stacking import Solo

VOCABULARY, CONTEXT, SEQUENCES, HEAD = 64, 16, 4, 16
STEPS = 6
RECIPE = Optimizer(learning_rate=2e-3, weight_decay=0.0, beta1=0.9, beta2=0.95, eps=1e-12, clip_norm=1e9)
WIDTHS, DEPTHS = (64, 128, 256, 512), (2, 4, 8, 16)
MUP = Parametrisation(kind="mup", base_width=64, base_head_dim=HEAD)
COMPLETEP = Parametrisation(kind="completep", base_width=64, base_head_dim=HEAD, base_depth=2)


def shape_at(family: str, width: int, depth: int) -> Shape:
    traits = FAMILIES[family]
    options = resolve_options(traits)
    return shape_of(traits, width, depth, HEAD, vocab_size=VOCABULARY, context=CONTEXT, options=options)


def program_of(family: str, width: int, depth: int, parametrisation: Parametrisation, seed: int = 0) -> Solo:
    shape = shape_at(family, width, depth)
    model = build_model(FAMILIES[family], shape, init_std=0.01, seed=seed)
    parametrise(model, family, shape, parametrisation)
    return Solo(model, RECIPE, factors=tensor_factors(model, family, shape, parametrisation))


def tokens_of(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (1, SEQUENCES, CONTEXT + 1), generator=generator)


def activations(family: str, model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What every layer gives on, and the logits."""
    found: list[torch.Tensor] = []

    def keep(module: object, inputs: object, output: Any) -> None:
        found.append(output if isinstance(output, torch.Tensor) else output[0])

    hooks = [layer.register_forward_hook(keep) for layer in model.get_submodule(LAYOUTS[family].layers)]
    with torch.no_grad():
        logits = model(tokens[0, :, :-1]).logits
    for hook in hooks:
        hook.remove()
    return [*found, logits]


def changes(family: str, width: int, depth: int, parametrisation: Parametrisation) -> np.ndarray:
    """ln RMS change of the activations at half depth, at the last layer and of the logits; the mean of two seeds."""
    found = []
    for seed in (0, 1):
        program, tokens = program_of(family, width, depth, parametrisation, seed), tokens_of(seed)
        model = program.models[0]
        before = activations(family, model, tokens)
        for _ in range(STEPS):
            program.table.set_rate(0, RECIPE.learning_rate)
            program.backward(tokens, SEQUENCES, nullcontext())
            program.table.step([0])
        moved = [float((b - a).square().mean().sqrt()) for a, b in zip(before, activations(family, model, tokens))]
        found.append([moved[depth // 2 - 1], moved[depth - 1], moved[depth]])
    return np.log(found).mean(axis=0)


def slopes(family: str, sizes: list[tuple[int, int]], parametrisation: Parametrisation) -> np.ndarray:
    """Of `changes` against the ln of whichever of width and depth grows."""
    grows = [max(width / sizes[0][0], depth / sizes[0][1]) for width, depth in sizes]
    return np.polyfit(np.log(grows), [changes(family, *size, parametrisation) for size in sizes], 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_under_mup_updates_move_activations_as_much_at_every_width(family: str) -> None:
    sizes = [(width, 2) for width in WIDTHS]
    assert np.abs(slopes(family, sizes, MUP)).max() < 0.1
    assert slopes(family, sizes[:3], STANDARD).max() > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_under_completep_updates_move_activations_as_much_at_every_depth(family: str) -> None:
    sizes = [(64, depth) for depth in DEPTHS]
    assert np.abs(slopes(family, sizes, COMPLETEP)).max() < 0.1
    assert slopes(family, sizes[::2], MUP).max() > 0.3


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_completep_is_flat_in_width_too(family: str) -> None:
    assert np.abs(slopes(family, [(width, 4) for width in (64, 256)], COMPLETEP)).max() < 0.1


def gradients_and_eps(family: str, width: int, depth: int) -> dict[str, tuple[float, float]]:
    """Role -> the geometric mean of its tensors' RMS gradients at the start, and the factor of its eps."""
    model = (program := program_of(family, width, depth, COMPLETEP)).models[0]
    program.backward(tokens_of(), SEQUENCES, nullcontext())
    factors = tensor_factors(model, family, shape_at(family, width, depth), COMPLETEP)
    found: dict[str, list[tuple[float, float]]] = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(("q_norm.weight", "k_norm.weight")):  # all heads share them: their gradients fall slower
            size = float(parameter.grad.square().mean().log()) / 2
            found.setdefault(role(LAYOUTS[family], name, parameter.ndim), []).append((size, factors[name].eps))
    return {name: (float(np.exp(np.mean([g for g, _ in of]))), of[0][1]) for name, of in found.items()}


@pytest.mark.parametrize(("width", "depth"), [(256, 2), (64, 8)])
@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_eps_falls_as_the_gradients_do(family: str, width: int, depth: int) -> None:
    base, other = gradients_and_eps(family, 64, 2), gradients_and_eps(family, width, depth)
    for name, (size, eps) in other.items():
        assert 0.6 < (size / base[name][0]) / (eps / base[name][1]) < 1.6, name
