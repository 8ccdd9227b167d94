"""A search as a study declares it: the space of settings, the sampler that walks it, and when it ends.

Guarded against: a search that fails at its hundredth trial for what its file says. A range without room, a sampler that
cannot take the space, a rung that no sampler learns from are faults of the file.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from sweeps.recipe import check_hyperparameters
from sweeps.rules import Count, Declared, Number, Positive, Whole, parse_number

MOST_VALUES = 10_000
"""As many as a list may have: more are a range."""
MOST_SETTINGS = 100_000
"""Of a grid, whose settings are listed each time that one is asked for."""
SamplerName = Literal["tpe", "gp", "qmc", "cmaes", "random", "grid"]


class Axis(Declared):
    """The values of one hyperparameter: exactly one of log, linear, int, categorical."""

    log: tuple[Number, Number] | None = None
    """From, to: evenly in the logarithm."""
    linear: tuple[Number, Number] | None = None
    """From, to: evenly."""
    whole: tuple[Whole, Whole] | None = Field(default=None, alias="int")
    """From, to: whole numbers, both ends among them."""
    categorical: list[Any] | None = None
    """A list of choices without an order."""
    step: Positive | None = None
    """Of linear and int: only from + a whole number of steps."""

    @model_validator(mode="before")
    @classmethod
    def _in_one_of_four_forms(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("one of {log: [a, b]}, {linear: [a, b]}, {int: [a, b]}, {categorical: [a, b]} is wanted")
        return value

    @model_validator(mode="after")
    def _one_form_with_room(self) -> "Axis":
        forms = {"log": self.log, "linear": self.linear, "int": self.whole, "categorical": self.categorical}
        given = [name for name, form in forms.items() if form is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(forms)}; found {' and '.join(given) or 'none'}")
        if self.step is not None and given[0] not in ("linear", "int"):
            raise ValueError(f"step goes with linear or int, not with {given[0]}")
        if self.categorical is not None:
            return self
        low, high = self.bounds()
        if low >= high:
            raise ValueError(f"{given[0]}: [{low:g}, {high:g}] is empty; the lower end comes first, and is less")
        if self.log is not None and low <= 0:
            raise ValueError(f"log: [{low:g}, {high:g}] reaches zero; begin above it, or take linear")
        steps = (high - low) / self.step if self.step is not None else 0
        if not math.isfinite(steps):
            raise ValueError(f"step {self.step} is too small for {low:g} to {high:g}; raise it, or leave it out")
        if abs(steps - round(steps)) > 1e-9:
            raise ValueError(f"{high - low:g} is no whole number of steps of {self.step:g}; change the step or an end")
        return self

    @field_validator("categorical", mode="after")
    @classmethod
    def _several_plain_choices(cls, value: list[Any] | None) -> list[Any] | None:
        if value is None:
            return None
        plain = [one if isinstance(one, bool) else parse_number(one) for one in value]
        if strange := [one for one in plain if not isinstance(one, str | int | float)]:
            raise ValueError(f"a choice is a name or a number, not {strange[0]!r}")
        if len(set(plain)) != len(plain) or len(plain) < 2:
            raise ValueError("a categorical has at least two different values; for one value write it under training")
        return plain

    def bounds(self) -> tuple[float, float]:
        """The ends of a range; ValueError for a categorical."""
        found = self.log or self.linear or self.whole
        if found is None:
            raise ValueError("a categorical has no ends")
        return found

    def ends(self) -> tuple[Any, Any]:
        """The first and the last value."""
        return (self.categorical[0], self.categorical[-1]) if self.categorical is not None else self.bounds()

    def values(self) -> list[Any] | None:
        """All values, ascending; None where they are too many to be listed."""
        if self.categorical is not None:
            return list(self.categorical)
        low, high = self.bounds()
        step = self.step if self.whole is None else int(self.step or 1)
        if step is None or (high - low) / step >= MOST_VALUES:
            return None
        if self.whole is not None:
            return list(range(self.whole[0], self.whole[1] + 1, int(step)))
        # rounded, to know a value again that a start setting names
        return [float(f"{low + index * step:.12g}") for index in range(round((high - low) / step) + 1)]


class Search(Declared):
    """Trials of settings at every place of the grid, each asked of a sampler that knows how the others ended."""

    space: Annotated[dict[str, Axis], Field(min_length=1)]
    """The hyperparameters that are searched."""
    sampler: SamplerName = "tpe"
    """tpe (multivariate, a trial that runs counts as bad), gp (Gaussian process), qmc (Sobol), cmaes, random, grid."""
    seed: Whole = 0
    """Of the sampler."""
    trials: Count = 30
    """Of each group; more in an edited file go on from those that are there."""
    flops: Positive | None = None
    """Training FLOPs of all trials together, from which on none is asked."""
    per: Literal["size", "study"] = "size"
    """size: a setting for each family, size, length and variation, its loss the mean of ln loss over the seeds. study:
    one for all of them, its loss the mean of ln loss over all."""
    batch: Count = 1
    """So many trials are asked together at least; as many as workers are idle, if those are more."""
    rungs: list[Number] = Field(default_factory=list)
    """Shorter lengths, as shares of the full one, after which only promising trials go on. Of schedule wsd alone."""
    start: list[dict[str, Any]] = Field(default_factory=list)
    """Settings that are tried first; what one does not name has the recipe's own value."""

    @field_validator("start", mode="after")
    @classmethod
    def _numbers_as_such(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        parsed = [
            {name: one if isinstance(one, bool) else parse_number(one) for name, one in setting.items()}
            for setting in value
        ]
        check_hyperparameters(
            ((index, name), name, one, [one]) for index, setting in enumerate(parsed) for name, one in setting.items()
        )
        return parsed

    @field_validator("rungs", mode="after")
    @classmethod
    def _rungs_ascend(cls, value: list[float]) -> list[float]:
        if any(not 0 < one < 1 for one in value):
            raise ValueError("a rung is a share of the full length: more than 0 and less than 1")
        value = sorted(set(value))
        for one, following in itertools.pairwise(value):
            if rung_step(one) == rung_step(following):
                raise ValueError(f"{one:g} and {following:g} differ by less than a thousandth of the length; keep one")
        return value

    @field_validator("space", mode="after")
    @classmethod
    def _hyperparameters_with_their_values(cls, value: dict[str, Axis]) -> dict[str, Axis]:
        check_hyperparameters(
            ((name,), name, axis.model_dump(by_alias=True, exclude_unset=True), axis.categorical or axis.bounds())
            for name, axis in value.items()
        )
        return value

    @field_validator("space", mode="after")
    @classmethod
    def _whole_steps(cls, value: dict[str, Axis]) -> dict[str, Axis]:
        for name, axis in value.items():
            if axis.whole is not None and axis.step is not None and axis.step != int(axis.step):
                raise ValueError(f"{name}: a step of int is a whole number, not {axis.step:g}")
        return value

    @model_validator(mode="after")
    def _sampler_takes_the_space(self) -> "Search":
        if fault := why_not(self.sampler, self.space, self.rungs):
            able = [name for name in get_args(SamplerName) if not why_not(name, self.space, self.rungs)]
            raise ValueError(f"sampler {self.sampler} {fault}; take {', '.join(able)}")
        for setting in self.start:
            if strange := sorted(setting.keys() - self.space.keys()):
                raise ValueError(
                    f"start names {strange[0]}, which is not searched; the space has {', '.join(self.space)}"
                )
        return self


def rung_step(share: float) -> int:
    """A rung as Optuna's step, a whole number: its share of the length in thousandths. Search's rungs differ in it."""
    return round(1000 * share)


def why_not(sampler: str, space: Mapping[str, Axis], rungs: list[float]) -> str | None:
    """Why a sampler cannot take a space, as the end of a sentence; None where it can."""
    categorical = [name for name, axis in space.items() if axis.categorical is not None]
    endless = [name for name, axis in space.items() if axis.values() is None]
    if sampler == "cmaes" and categorical:
        return f"takes no categorical ({', '.join(categorical)})"
    if sampler == "cmaes" and len(space) < 2:
        return "needs a space of at least two hyperparameters"
    if sampler == "grid" and endless:
        return f"needs a list of values, and {', '.join(endless)} has none: give a (larger) step, or categorical"
    count = math.prod(len(axis.values() or []) for axis in space.values())
    if sampler == "grid" and count > MOST_SETTINGS:
        return f"would go through {count:,} settings, and {MOST_SETTINGS:,} are the most: give larger steps"
    if sampler in ("gp", "cmaes") and rungs:
        return "learns nothing from trials that end at a rung"
    return None
