"""Hyperparameter rules: a number, or a power law in what is known of a cell before it is trained.

In a study file a rule is a number, or a mapping such as

    learning_rate: {value: 0.01, at: {width: 32}, power: {width: -0.5}}

which reads: 0.01 at width 32, and falling with the square root of the width. Or its constants come from elsewhere, a
paper (sweeps/published.py) or the runs of another study (sweeps/fitted.py): then it is a `PowerLaw`, which knows where
it was fitted. The failure that this guards against is a law that is trusted where nobody has measured it, or beside a
batch that it was not made for.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sweeps.units import flops, human, plural

VARIABLES = ("N", "D", "C", "width", "depth", "batch_tokens")
"""What a rule may depend on: parameters, training tokens, training FLOPs, width, depth, tokens a batch."""


UNSURE = 1.1
"""What a power that cannot be told from 0 moves a value by less than this factor is not worth a word."""
RANGE_SLACK = 1.05
"""What is off the range of a law by less than this factor is inside: lengths are rounded to whole batches."""


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


def parse_whole(value: Any) -> Any:
    """As `parse_number`. A whole number of hundreds of digits is no float, and would fail wherever it is divided."""
    value = parse_number(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("a whole number below 2^63 is wanted")
    return value


Number = Annotated[float, BeforeValidator(parse_number)]
Whole = Annotated[int, BeforeValidator(parse_whole)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[Whole, Field(gt=0)]


class Declared(BaseModel):
    """A part of a study file: unknown keys, NaN and infinity are errors, and nothing changes after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class PowerRule(Declared):
    """value x product over the variables v of (v / at[v]) ** power[v]."""

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


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """value x product over the variables v of (v / at[v]) ** power[v], with constants that the study does not give."""

    source: str
    """Where the constants come from, for people: `step-law`, `the fit of lr-sensitivity`."""
    value: float
    power: Mapping[str, float]
    """The exponent of each variable: one of VARIABLES, or a count by another convention, such as N_nonembedding."""
    at: Mapping[str, float] = field(default_factory=dict)
    """The reference point; 1 where it has no entry."""
    range: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """From where to where each variable went in the runs behind the law; empty where that is not known."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Between which bounds each power lies (95%), as far as they are known."""
    batch: str = ""
    """What a law of the learning rate presumes of batch_tokens: `constant`, or the source of the law that gives it."""
    held: Mapping[str, Any] = field(default_factory=dict)
    """What was equal in all runs behind the law: batch_tokens, schedule, optimizer, context."""


def evaluate(rule: float | PowerRule | PowerLaw, known: Mapping[str, float]) -> float:
    """The rule's value, rounded to six significant digits so that the cell id is the same on every machine.

    `known` maps the variables that are settled so far to their values. Raises ValueError where the rule asks for
    one that is not (the batch size cannot depend on itself), or overflows.
    """
    if not isinstance(rule, PowerRule | PowerLaw):
        return float(rule)
    value = rule.value
    for name, exponent in rule.power.items():
        if name not in known:
            settled = [one for one in VARIABLES if one in known]
            raise ValueError(f"this rule cannot depend on {name}; allowed here: {', '.join(settled)}")
        try:
            value *= (known[name] / rule.at.get(name, 1.0)) ** exponent
        except ArithmeticError:  # also of 0 to a negative power
            raise ValueError(f"this rule overflows at {name} = {known[name]:g}; lower its power of {name}") from None
    return float(f"{value:.6g}")


def adamw_timescale(
    learning_rate: float | None, weight_decay: float | None, batch_tokens: float | None, tokens: float
) -> float | None:
    """B / (learning rate x decay x D): the memory of the weights as a fraction of the run (Wang and Aitchison 2024,
    Bergsma et al. 2025). None without decay, or where one of them is not known, as of a run from elsewhere."""
    if not learning_rate or not weight_decay or not batch_tokens:
        return None
    return batch_tokens / (learning_rate * weight_decay * tokens)


# --- what to say of laws from elsewhere --------------------------------------------------------------------------


@dataclass(frozen=True)
class Ruled:
    """Where one cell stands, and the laws from elsewhere that gave its hyperparameters."""

    laws: Mapping[str, PowerLaw]
    """By hyperparameter."""
    known: Mapping[str, float]
    """The variables of the cell, as `evaluate` takes them, with its batch_tokens."""
    recipe: Mapping[str, Any]
    """What `PowerLaw.held` may name: batch_tokens, schedule, optimizer, context."""


def law_warnings(cells: Iterable[Ruled]) -> Iterator[str]:
    """What a researcher should know of the laws that a plan takes from elsewhere: where they are used outside the range
    that they were fitted in and how far, by powers that may be none, beside a batch that they were not made for, or in
    another recipe."""
    uses: dict[str, tuple[str, PowerLaw, list[Ruled]]] = {}
    for cell in cells:
        for name, law in cell.laws.items():
            alike = replace(law, value=1.0)  # that of another family need not have its powers, nor their intervals
            uses.setdefault(f"{name} {alike}", (name, law, []))[2].append(cell)
    for name, law, ruled in uses.values():
        by = f"{name} by {law.source}"
        if not law.range:
            yield (
                f"{by}: in what range it was fitted is not known here; {plural(len(ruled), 'cell')} take it, of "
                f"{_span(ruled, 'N')} and {_span(ruled, 'D')}."
            )
        elif outside := _outside(law, ruled):
            yield f"{by}: {outside}."
        yield from (f"{by}: {told}" for told in _unsure_powers(law, ruled))
        yield from (f"{by}: {told}" for told in _batch_conflicts(law, ruled))
        for key, held in law.held.items():
            others = [cell.recipe[key] for cell in ruled if key in cell.recipe and cell.recipe[key] != held]
            if others:
                found = " and ".join(_amount(other) for other in dict.fromkeys([min(others), max(others)]))
                yield (
                    f"{by}: it was fitted at {key} {_amount(held)}, where another value may be best than at {found} "
                    f"({len(others)} of {plural(len(ruled), 'cell')})."
                )


def _outside(law: PowerLaw, ruled: list[Ruled]) -> str:
    """How many cells lie outside the law's range, and how far in each variable; empty where none does."""
    count, parts = 0, []
    for cell in ruled:
        count += any(
            not low / RANGE_SLACK <= cell.known[name] <= high * RANGE_SLACK for name, (low, high) in law.range.items()
        )
    for name, (low, high) in law.range.items():
        values = [cell.known[name] for cell in ruled]
        far = [f"up to {_times(low / min(values))} below"] if min(values) < low / RANGE_SLACK else []
        far += [f"up to {_times(max(values) / high)} above"] if max(values) > high * RANGE_SLACK else []
        if far:
            fitted = f"{_count(name, low)} to {_count(name, high)}" if high > low else f"at {_count(name, low)} alone"
            parts.append(f"{name} {' and '.join(far)} (fitted {fitted})")
    lie = "lies" if count == 1 else "lie"
    told = f"{count} of {plural(len(ruled), 'cell')} {lie} outside the range that it was fitted in: {', '.join(parts)}"
    return told if count else ""


def _unsure_powers(law: PowerLaw, ruled: list[Ruled]) -> Iterator[str]:
    """The powers that cannot be told from 0, and how far they move the cells' values from the law's reference point."""
    for name, (low, high) in law.intervals.items():
        if not low <= 0.0 <= high or name not in law.power:
            continue
        moved = [(cell.known[name] / law.at.get(name, 1.0)) ** law.power[name] for cell in ruled]
        factor = max(max(one, 1.0 / one) for one in moved)
        if factor > UNSURE:
            yield (
                f"its power of {name}, {law.power[name]:.2g} ({low:.2g} to {high:.2g}), cannot be told from 0, and "
                f"moves the value by up to {_times(factor)} here. More seeds or more range in {name} would settle it."
            )


def _batch_conflicts(law: PowerLaw, ruled: list[Ruled]) -> Iterator[str]:
    """Where a law of the learning rate stands beside a batch that it was not made for (its sign in D depends on it)."""
    batches = sorted({cell.known["batch_tokens"] for cell in ruled})
    if law.batch == "constant" and len(batches) > 1:
        yield (
            f"it holds at a constant batch, but batch_tokens goes from {batches[0]:,} to {batches[-1]:,}: laws of "
            "different batch rules do not combine. Let batch_tokens be a number, or take the rate and the batch from "
            "one law."
        )
    elif law.batch not in ("", "constant"):
        others = {cell.laws["batch_tokens"].source if "batch_tokens" in cell.laws else "" for cell in ruled}
        if others - {law.batch}:
            yield (
                f"it holds with the batch of {law.batch}, but batch_tokens "
                f"{'is given otherwise' if '' in others else 'is by ' + ' and '.join(sorted(others - {law.batch}))}: "
                "laws of different batch rules do not combine. Take the rate and the batch from one law."
            )


def _span(ruled: list[Ruled], name: str) -> str:
    values = [cell.known[name] for cell in ruled]
    low, high = _count(name, min(values)), _count(name, max(values))
    return f"{name} {low} to {high}" if high != low else f"{name} {low}"


def _count(name: str, value: float) -> str:
    return flops(value) if name.startswith("C") else human(value)


def _times(factor: float) -> str:
    return f"{float(f'{factor:.3g}'):,g} times"


def _amount(value: Any) -> str:
    return str(value) if isinstance(value, str) else f"{value:,.10g}"
