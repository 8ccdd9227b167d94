"""Points: the places of a study's grid for one family, each a size or a shape and one way to say how long."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sweeps import accounting
from sweeps.errors import InputError
from sweeps.families import Family
from sweeps.gridkinds import IsoflopGrid, LadderGrid, ShapesGrid, listed
from sweeps.sizes import LATTICE, lattice_index, lattice_position, log2_ratio, shape_for, shape_of
from sweeps.study import Study


@dataclass(frozen=True)
class GridPoint:
    """One place of a grid for one family: a target size, or a shape, and one way to say how long."""

    size: float = 0.0
    """Target parameters, on the lattice; 0 where `shape` is given."""
    shape: accounting.Shape | None = None
    tokens: float | None = None
    flops: float | None = None
    """Training FLOPs C."""
    tokens_per_parameter: float | None = None
    extra_seeds: int = 0
    """Seeds beyond the study's first, of a replicated point."""
    overrides: tuple[tuple[str, Any], ...] = ()
    """Hyperparameters of this point alone, by name."""
    labels: tuple[tuple[str, Any], ...] = ()
    """What a table calls it: budget (FLOPs) and size (parameters)."""


def grid_points(study: Study, family: Family, vocab_size: int, options: Mapping[str, Any]) -> Iterator[GridPoint]:
    """The points of a study's grid for one family, whose options are resolved, in the order of the file.

    Raises InputError where sizes leave the lattice, or the family has none on it, or no such shape.
    """
    grid = study.grid
    if isinstance(grid, IsoflopGrid):
        yield from _isoflop_points(grid, family, vocab_size, study.context, options)
    elif isinstance(grid, ShapesGrid):
        for width, depth in itertools.product(dict.fromkeys(grid.widths), dict.fromkeys(grid.depths)):
            shape = shape_of(
                family, width, depth, grid.head_dim, vocab_size=vocab_size, context=study.context, options=options
            )
            yield GridPoint(shape=shape, tokens=grid.tokens, tokens_per_parameter=grid.tokens_per_parameter)
    elif isinstance(grid, LadderGrid):
        for size in dict.fromkeys(LATTICE[lattice_index(size)] for size in listed(grid.sizes)):
            for ratio in listed(grid.tokens_per_parameter or []):
                yield GridPoint(size, tokens_per_parameter=ratio, labels=(("size", size),))
            for tokens in listed(grid.tokens or []):
                yield GridPoint(size, tokens=tokens, labels=(("size", size),))
    else:
        for point in grid.points:
            size = LATTICE[lattice_index(point.size)]
            yield GridPoint(
                size,
                tokens=point.tokens,
                flops=point.flops,
                tokens_per_parameter=point.tokens_per_parameter,
                overrides=tuple(point.training.items()),
                labels=(("size", size),),
            )


def _isoflop_points(
    grid: IsoflopGrid, family: Family, vocab_size: int, context: int, options: Mapping[str, Any]
) -> Iterator[GridPoint]:
    """Sizes around the expected optimum of each budget, on the sublattice of the stride, so that budgets share them."""
    budgets = listed(grid.budgets)
    for order, budget in enumerate(budgets):
        centre = _expected_optimum(grid, budget, family, vocab_size, context, options)
        middle = round(centre / grid.stride) * grid.stride
        first = middle - grid.stride * ((grid.sizes - 1) // 2)
        indices = range(first, first + grid.stride * grid.sizes, grid.stride)
        if indices[0] < 0 or indices[-1] >= len(LATTICE):
            raise InputError(
                f"budget {budget:g}: {grid.sizes} sizes around {LATTICE[0] * 2 ** (centre / 2):.3g} parameters leave "
                f"the lattice of {LATTICE[0]:,.0f} to {LATTICE[-1]:,.0f}. Use fewer sizes, a smaller stride, or "
                "another budget."
            )
        for index in indices:
            replicated = grid.replicates is not None and order < grid.replicates.budgets and index == middle
            extra = grid.replicates.seeds - 1 if replicated and grid.replicates else 0
            size = LATTICE[index]
            yield GridPoint(size, flops=budget, extra_seeds=extra, labels=(("budget", budget), ("size", size)))


def _expected_optimum(
    grid: IsoflopGrid, budget: float, family: Family, vocab_size: int, context: int, options: Mapping[str, Any]
) -> float:
    """The lattice position (a fraction) of the size expected to be best for this budget."""
    optimum = grid.optimum
    if optimum.N is not None and optimum.C is not None:
        position = lattice_position(optimum.N) + 2 * (optimum.exponent * log2_ratio(budget, optimum.C))
        return min(max(position, -len(LATTICE)), 2 * len(LATTICE))  # far off the lattice is far enough

    def log_ratio(index: int) -> float:  # of the budget that this size spends at the expected D/N
        shape = cached_shape(family, LATTICE[index], vocab_size, context, tuple(sorted(options.items())))
        tokens = optimum.tokens_per_parameter * accounting.parameters(shape).active
        return log2_ratio(accounting.flops_per_token(shape) * tokens, budget)

    feasible = [index for index in range(len(LATTICE)) if _is_feasible(family, index, vocab_size, context, options)]
    if not feasible:
        raise InputError(
            f"family {family.name} has no size on the lattice with a vocabulary of {vocab_size:,} and context "
            f"{context:,}. Use a smaller vocabulary."
        )
    return float(min(feasible, key=lambda index: abs(log_ratio(index))))


@lru_cache(maxsize=4096)
def cached_shape(
    family: Family, size: float, vocab_size: int, context: int, options: tuple[tuple[str, Any], ...]
) -> accounting.Shape:
    """As `shape_for`, remembered: a plan asks for one shape at every seed and setting. `options` as sorted pairs."""
    return shape_for(family, size, vocab_size=vocab_size, context=context, options=dict(options))


def _is_feasible(family: Family, index: int, vocab_size: int, context: int, options: Mapping[str, Any]) -> bool:
    try:
        cached_shape(family, LATTICE[index], vocab_size, context, tuple(sorted(options.items())))
    except InputError:
        return False
    return True
