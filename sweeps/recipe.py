"""The recipe of a study: how a cell is trained, each number plain or by a rule, and which of it may be varied."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from sweeps.errors import nearest, plain_fault
from sweeps.fitted import GIVES, FittedRule
from sweeps.published import PublishedRule, check_gives
from sweeps.rules import Count, Declared, Number, Positive, PowerRule


def check_hyperparameter(name: str, *values: Any) -> None:
    """Raise ValueError where the recipe has no such hyperparameter, or it cannot have one of these values."""
    if name not in Training.model_fields:
        hint = nearest(name, Training.model_fields)
        raise ValueError(f"unknown hyperparameter {name!r}{hint}; allowed: {', '.join(Training.model_fields)}")
    for value in values:
        try:
            Training.model_validate({name: value})
        except ValidationError as error:
            raise ValueError(f"{name}: found {value!r}; {plain_fault(error.errors()[0])}") from None


Place = tuple[str | int, ...]
"""Keys and indices in what is validated."""


def check_hyperparameters(given: Iterable[tuple[Place, str, Any, Iterable[Any]]]) -> None:
    """Raise a ValidationError of everything that `check_hyperparameter` says of several, each (its place, name, what
    was found there, values)."""
    faults: list[tuple[Place, Any, str]] = []
    for place, name, found, values in given:
        # one at a time, since several may be wrong; without a value it is the name that is looked at
        singles: list[tuple[Any, ...]] = [(value,) for value in values] or [()]
        for single in singles:
            try:
                check_hyperparameter(name, *single)
            except ValueError as error:
                faults.append((place, found, str(error)))
    raise_together(faults)


def raise_together(faults: Iterable[tuple[Place, Any, str]]) -> None:
    """Raise a ValidationError of these faults, where there are any, each (its place, what was found there, what is
    allowed): all faults of a file come at once, with their lines."""
    once = {(place, told): found for place, found, told in faults}
    if once:
        details = [
            InitErrorDetails(type=PydanticCustomError("value_error", told), loc=place, input=found)
            for (place, told), found in once.items()
        ]
        raise ValidationError.from_exception_data("study", details)


def _rule_form(value: Any) -> str:
    if isinstance(value, PublishedRule) or (isinstance(value, dict) and "rule" in value):
        return "@published"
    if isinstance(value, FittedRule) or (isinstance(value, dict) and "fitted" in value):
        return "@fitted"
    if isinstance(value, dict) and not value.keys() & PowerRule.model_fields.keys():  # which was meant?
        for word, form in (("rule", "@published"), ("fitted", "@fitted")):
            if any(nearest(key, [word]) for key in value):
                return form
    return "@rule" if isinstance(value, dict | PowerRule) else "@number"


_Law = (
    Annotated[PowerRule, Tag("@rule")]
    | Annotated[PublishedRule, Tag("@published")]
    | Annotated[FittedRule, Tag("@fitted")]
)
# The discriminator keeps an error about one form from being reported for the others as well.
Rule = Annotated[Annotated[Positive, Tag("@number")] | _Law, Discriminator(_rule_form)]
Decay = Annotated[Annotated[Number, Field(ge=0), Tag("@number")] | _Law, Discriminator(_rule_form)]


def _inside(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError("the cooldown is a share of the run: more than 0 and less than 1")
    return value


class ScheduleFields(Declared):
    """What shapes the learning rate over a run, beside the schedule's name."""

    warmup_tokens: Annotated[Number, Field(ge=0)] | None = None
    """Linear warm-up. Default min(N, 10% of D); of wsd and constant, whose cells share trunks, N where that fits."""
    final_fraction: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """The last learning rate as a fraction of the peak (cosine, linear, wsd)."""
    cooldown_fraction: Annotated[Number, AfterValidator(_inside)] = 0.2
    """The share of D in which wsd cools down."""
    cooldown_shape: Literal["sqrt", "linear", "cosine"] = "sqrt"
    """How wsd cools down: 1 - sqrt (Haegele et al. 2024), a line, or half a cosine."""


ScheduleName = Literal["cosine", "linear", "constant", "wsd"]


def schedule_fields(kind: str) -> set[str]:
    """The fields that a schedule uses."""
    has = {"warmup_tokens"} | ({"final_fraction"} if kind != "constant" else set())
    return has | ({"cooldown_fraction", "cooldown_shape"} if kind == "wsd" else set())


class NamedSchedule(ScheduleFields):
    """A schedule with its own fields, `{kind: wsd, cooldown_fraction: 0.2}`: the same as to write them beside it."""

    kind: ScheduleName

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> "NamedSchedule":
        has = schedule_fields(self.kind)
        if strange := sorted(self.model_fields_set - has - {"kind"}):
            raise ValueError(f"{self.kind} has no {' and no '.join(strange)}; it has {', '.join(sorted(has))}")
        return self


def _schedule_form(value: Any) -> str:
    return "@kind" if isinstance(value, dict | NamedSchedule) else "@name"


class NamedParametrisation(Declared):
    """A parametrisation with the size of its base, where the recipe's numbers hold as they stand."""

    kind: Literal["standard", "mup", "completep"]
    base_width: Count | None = None
    """The width (of mup and completep) at which every factor is 1."""
    base_depth: Count | None = None
    """The number of layers (of completep) at which every factor is 1."""

    @model_validator(mode="after")
    def _base_of_its_kind(self) -> "NamedParametrisation":
        wanted = {"standard": [], "mup": ["base_width"], "completep": ["base_width", "base_depth"]}[self.kind]
        given = [name for name in ("base_width", "base_depth") if getattr(self, name) is not None]
        if given != wanted:
            raise ValueError(f"{self.kind} takes {' and '.join(wanted) or 'no base'}; found {given or 'none'}")
        return self


def _named_parametrisation(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class Training(ScheduleFields):
    """The recipe. Every number may be varied; a Rule may be a number, a power law in N, D, C, width, depth, a published
    rule (sweeps/published.py) or one that was fitted to another study (sweeps/fitted.py)."""

    batch_tokens: Rule = 16_384.0
    """Tokens an optimizer step; rounded to whole sequences."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum (Jordan et al. 2024) for the hidden matrices, at AdamW's size of updates; AdamW
    for tables, head, gains and biases."""
    learning_rate: Rule = 1e-3
    """Peak learning rate."""
    weight_decay: Decay = 0.1
    """Decoupled decay, multiplied by the learning rate each step; on matrices only."""
    beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: Annotated[Number, Field(ge=0, lt=1)] | None = None
    """AdamW's decay of the mean squared gradient. Default .99 below 128 sequences a batch, .95 from there on (Porian et
    al. 2024)."""
    eps: Positive = 1e-8
    """Added to AdamW's denominator."""
    clip_norm: Positive = 1.0
    """The global gradient norm is clipped here."""
    schedule: Annotated[
        Annotated[ScheduleName, Tag("@name")] | Annotated[NamedSchedule, Tag("@kind")], Discriminator(_schedule_form)
    ] = "cosine"
    """A name; `{kind: <name>, ...}` gives its fields with it, and is taken apart when the file is read."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: of matrix products; weights and the optimizer's state stay float32."""
    init_std: Rule = 0.02
    """Standard deviation of the initial matrices."""
    gradient_noise: bool = False
    """Also log, at every evaluation, the gradient norm of an eighth of the batch: what the noise scale, an estimate of
    the critical batch, is computed from. Moves no loss; costs a little time."""
    parametrisation: Annotated[NamedParametrisation, BeforeValidator(_named_parametrisation)] = NamedParametrisation(
        kind="standard"
    )
    """How initial scales, rates and multipliers follow size (sweeps/parametrisation.py): standard,
    {kind: mup, base_width: 32} or {kind: completep, base_width: 32, base_depth: 2}."""

    @field_validator("batch_tokens", "learning_rate", "weight_decay", "init_std", mode="after")
    @classmethod
    def _rule_gives_it(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        if isinstance(value, PublishedRule):
            check_gives(value, name)
        if isinstance(value, FittedRule) and name not in GIVES:
            raise ValueError(f"no law of {name} is fitted; allowed: {', '.join(GIVES)}")
        return value

    @model_validator(mode="after")
    def _schedule_taken_apart(self) -> "Training":
        if isinstance(self.schedule, str):
            return self
        return self.model_copy(update=flat_recipe({name: getattr(self, name) for name in self.model_fields_set}))


def flat_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters with the fields of a `schedule: {kind: ...}` beside it. ValueError where one stands twice."""
    schedule = given.get("schedule")
    if schedule is None or isinstance(schedule, str):
        return dict(given)
    named = NamedSchedule.model_validate(schedule)
    fields = {name: getattr(named, name) for name in named.model_fields_set if name != "kind"}
    if twice := sorted(fields.keys() & given.keys()):
        raise ValueError(f"{', '.join(twice)} given twice, beside schedule and inside it; give it once")
    return {**given, "schedule": named.kind, **fields}


NO_NUMBERS = ("optimizer", "schedule", "cooldown_shape", "precision", "gradient_noise", "parametrisation")
"""Hyperparameters that are words, or yes or no."""
