"""The kinds of grid that a study may declare: which sizes, or shapes, train how long."""

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from sweeps.recipe import check_hyperparameters, flat_recipe
from sweeps.rules import Count, Declared, Number, Positive, Whole


class LogRange(Declared):
    """`points` numbers from `first` to `last`, evenly spaced in the logarithm."""

    first: Positive = Field(alias="from")
    last: Positive = Field(alias="to")
    points: Annotated[Count, Field(le=10_000)]

    @model_validator(mode="after")
    def _has_room(self) -> "LogRange":
        if not 0 < self.last / self.first < math.inf:
            raise ValueError(f"from {self.first:g} to {self.last:g} is too far to be divided; set the ends nearer")
        if len(found := set(self.values())) < self.points:
            raise ValueError(
                f"from {self.first:g} to {self.last:g} there are not {self.points} values in six digits but "
                f"{len(found)}; set the ends further apart, or list the values"
            )
        return self

    def values(self) -> tuple[float, ...]:
        if self.points == 1:
            return (self.first,)
        ratio = (self.last / self.first) ** (1 / (self.points - 1))
        return tuple(float(f"{self.first * ratio**i:.6g}") for i in range(self.points))


def _list_or_range(value: Any) -> str:
    return "@range" if isinstance(value, dict | LogRange) else "@list"


# A discriminator keeps an error about one form from being reported for the other as well.
Positives = Annotated[
    Annotated[list[Positive], Field(min_length=1), Tag("@list")] | Annotated[LogRange, Tag("@range")],
    Discriminator(_list_or_range),
]


def listed(values: list[float] | LogRange) -> tuple[float, ...]:
    """The values of a list or a range, ascending, each once."""
    return tuple(sorted(set(values.values() if isinstance(values, LogRange) else values)))


class Optimum(Declared):
    """Where the compute-optimal size is expected, so that the grid is centred on it."""

    tokens_per_parameter: Positive = 20.0
    """The expected D/N at the optimum of every budget, if no reference point is given."""
    N: Positive | None = None
    """The expected optimal size at the reference budget C."""
    C: Positive | None = None
    """The reference budget, in training FLOPs."""
    exponent: Number = 0.5
    """The expected growth: N* = N (C / C_reference) ** exponent."""

    @model_validator(mode="after")
    def _reference_is_whole(self) -> "Optimum":
        if (self.N is None) != (self.C is None):
            raise ValueError("N and C stand together: the expected optimal size at one budget")
        return self


class Replicates(Declared):
    """Several seeds at the central size of the cheapest budgets: they measure the noise floor."""

    budgets: Annotated[Count, Field(le=10_000)] = 2
    """How many budgets, from the cheapest on."""
    seeds: Annotated[Whole, Field(ge=2, le=10_000)] = 3
    """At least so many seeds there: the study's first, and beside it 0, 1, 2, ... without that one. Those that the
    study declares itself are not added again: in a study of the seeds 0, 1, 2, three seeds add none."""


class IsoflopGrid(Declared):
    """For each budget of training FLOPs, several sizes around the expected optimum."""

    type: Literal["isoflop"]
    budgets: Positives
    """Training FLOPs C of the cells."""
    sizes: Annotated[Count, Field(le=10_000)] = 5
    """How many sizes a budget gets."""
    stride: Count = 2
    """Steps on the lattice between sizes: 2 is a factor of 2, 1 a factor of sqrt 2."""
    optimum: Optimum = Optimum()
    replicates: Replicates | None = None
    """Left out: no seeds beyond the study's."""


class LadderGrid(Declared):
    """Every size at every length."""

    type: Literal["ladder"]
    sizes: Positives
    """Target sizes N; each is snapped to the lattice."""
    tokens_per_parameter: Positives | None = None
    """Lengths D / N, the same for all sizes; or `tokens`."""
    tokens: Positives | None = None
    """Lengths D, the same for all sizes; or `tokens_per_parameter`."""

    @model_validator(mode="after")
    def _one_kind_of_length(self) -> "LadderGrid":
        if (self.tokens is None) == (self.tokens_per_parameter is None):
            raise ValueError("give exactly one of tokens, tokens_per_parameter")
        return self


class Point(Declared):
    """One cell by hand: a size, one of tokens, flops or tokens_per_parameter, and any training override."""

    size: Positive
    """Target size N; snapped to the lattice."""
    tokens: Positive | None = None
    """Its length D."""
    flops: Positive | None = None
    """Its training FLOPs C."""
    tokens_per_parameter: Positive | None = None
    """Its length D / N."""
    training: dict[str, Any] = {}
    """Hyperparameters of this cell alone."""

    @field_validator("training", mode="after")
    @classmethod
    def _known_hyperparameters(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_hyperparameters(((name,), name, single, [single]) for name, single in value.items())
        return flat_recipe(value)

    @model_validator(mode="after")
    def _one_length(self) -> "Point":
        given = [name for name in ("tokens", "flops", "tokens_per_parameter") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of tokens, flops, tokens_per_parameter; found {given or 'none'}")
        return self


class ShapesGrid(Declared):
    """Widths times depths at one head size, all as long: the grid of a transfer study. Sizes off the lattice."""

    type: Literal["shapes"]
    widths: Annotated[list[Count], Field(min_length=1)]
    """Sizes of the residual stream, each a multiple of the head size; the MLP keeps the family's ratio."""
    depths: Annotated[list[Count], Field(min_length=1)]
    """Numbers of layers."""
    head_dim: Annotated[Whole, Field(ge=2, multiple_of=2)]
    """Size of every head: with the width only their number grows."""
    tokens: Positive | None = None
    """Length D of every shape; or `tokens_per_parameter`."""
    tokens_per_parameter: Positive | None = None
    """Length D / N of every shape; or `tokens`."""

    @model_validator(mode="after")
    def _whole_heads_and_one_length(self) -> "ShapesGrid":
        if odd := [width for width in self.widths if width % self.head_dim]:
            raise ValueError(f"widths {', '.join(map(str, odd))}: no multiples of head_dim {self.head_dim}")
        if (self.tokens is None) == (self.tokens_per_parameter is None):
            raise ValueError("give exactly one of tokens, tokens_per_parameter")
        return self


class PointsGrid(Declared):
    """An explicit list of cells."""

    type: Literal["points"]
    points: Annotated[list[Point], Field(min_length=1)]


Grid = Annotated[IsoflopGrid | LadderGrid | PointsGrid | ShapesGrid, Field(discriminator="type")]
