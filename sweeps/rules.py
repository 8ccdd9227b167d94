"""Hyperparameter rules: a number, or a power law in what is known of a cell before it is trained.

In a study file a rule is a number, or a mapping such as

    learning_rate: {value: 0.01, at: {width: 32}, power: {width: -0.5}}

which reads: 0.01 at width 32, and falling with the square root of the width.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

VARIABLES = ("N", "D", "C", "width", "depth", "batch_tokens")
"""What a rule may depend on: parameters, training tokens, training FLOPs, width, depth, tokens a batch."""


def parse_number(value: Any) -> Any:
    """YAML 1.1 reads `1e9` as text; take it as the number that was meant. True and False are no numbers."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return value


Number = Annotated[float, BeforeValidator(parse_number)]
Whole = Annotated[int, BeforeValidator(parse_number)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[Whole, Field(gt=0)]


class PowerRule(BaseModel):
    """value x product over the variables v of (v / at[v]) ** power[v]."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    value: Positive
    """The hyperparameter at the reference point."""
    at: dict[str, Positive]
    """The reference point."""
    power: dict[str, Number]
    """The exponent of each variable."""

    @model_validator(mode="after")
    def _variables_are_known(self) -> "PowerRule":
        unknown = sorted(set(self.power) - set(VARIABLES))
        if unknown:
            raise ValueError(f"unknown variable {unknown[0]!r} in power; allowed: {', '.join(VARIABLES)}")
        if set(self.at) != set(self.power):
            raise ValueError(
                f"at names {sorted(self.at)} but power names {sorted(self.power)}; they must name the same"
            )
        return self


def rule_or_number(value: Any) -> str:
    """The form of a rule in a study file, for pydantic."""
    return "@rule" if isinstance(value, dict | PowerRule) else "@number"


# The discriminator keeps an error about one form from being reported for the other as well.
Rule = Annotated[
    Annotated[Positive, Tag("@number")] | Annotated[PowerRule, Tag("@rule")], Discriminator(rule_or_number)
]


def evaluate(rule: float | PowerRule, known: Mapping[str, float]) -> float:
    """The rule's value, rounded to six significant digits so that the cell id is the same on every machine.

    `known` maps the VARIABLES that are settled so far to their values. Raises ValueError where the rule asks for
    one that is not (the batch size cannot depend on itself), or overflows.
    """
    if not isinstance(rule, PowerRule):
        return float(rule)
    value = rule.value
    for name, exponent in rule.power.items():
        if name not in known:
            raise ValueError(f"this rule cannot depend on {name}; allowed here: {', '.join(known)}")
        try:
            value *= (known[name] / rule.at[name]) ** exponent
        except OverflowError:
            raise ValueError(f"this rule overflows at {name} = {known[name]:g}; lower its power of {name}") from None
    return float(f"{value:.6g}")


def adamw_timescale(learning_rate: float, weight_decay: float, batch_tokens: float, tokens: float) -> float | None:
    """B / (learning rate x decay x D): the memory of the weights as a fraction of the run; None without decay.

    Wang and Aitchison 2024, Bergsma et al. 2025.
    """
    rate = learning_rate * weight_decay
    return batch_tokens / (rate * tokens) if rate else None
