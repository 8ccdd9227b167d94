"""A study as a researcher declares it: frozen, validated models (sweeps/studyfile.py reads them from YAML)."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sweeps.errors import InputError, nearest, plain_fault
from sweeps.families import find_family, resolve_options
from sweeps.fitted import GIVES, FittedRule, fitted_studies
from sweeps.published import PublishedRule, check_gives
from sweeps.rules import Count, Number, Positive, PowerRule, Whole
from sweeps.space import Search
from sweeps.store import STUDY_NAME


class Declared(BaseModel):
    """A part of a study file: unknown keys, NaN and infinity are errors, and nothing changes after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class CorpusSource(Declared):
    """Where the text comes from."""

    source: Literal["pystdlib", "folder", "jsonl", "parquet", "hf", "markov"] = "pystdlib"
    """pystdlib is the source text of Python's standard library, on every machine; markov is synthetic. `hf:<name>` is
    short for source hf with that path."""
    path: str | None = None
    """The folder or file (folder, jsonl, parquet), relative to the study file, or the dataset's name (hf)."""
    options: dict[str, str | int | float] = {}
    """Options of the source: text_field (jsonl, parquet, hf), split (hf), vocab_size, order, tokens, seed (markov)."""
    fingerprint: str | None = None
    """Pins the corpus: any other content is an error."""
    repeat: bool = False
    """Allows cells of more than four epochs."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> "CorpusSource":
        if self.source in ("folder", "jsonl", "parquet", "hf") and not self.path:
            raise ValueError(f'source {self.source} needs "path"')
        if self.source in ("pystdlib", "markov") and self.path:
            raise ValueError(f'source {self.source} takes no "path"')
        return self


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class LogRange(Declared):
    """`points` numbers from `first` to `last`, evenly spaced in the logarithm."""

    first: Positive = Field(alias="from")
    last: Positive = Field(alias="to")
    points: Count

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
    exponent: Number = 0.5
    """The expected growth: N* = N (C / C_reference) ** exponent."""

    @model_validator(mode="after")
    def _reference_is_whole(self) -> "Optimum":
        if (self.N is None) != (self.C is None):
            raise ValueError("N and C stand together: the expected optimal size at one budget")
        return self


class Replicates(Declared):
    """Extra seeds at the central size of the cheapest budgets: they measure the noise floor."""

    budgets: Count = 2
    seeds: Annotated[Whole, Field(ge=2)] = 3


class IsoflopGrid(Declared):
    """For each budget of training FLOPs, several sizes around the expected optimum."""

    type: Literal["isoflop"]
    budgets: Positives
    """Training FLOPs C of the cells."""
    sizes: Count = 5
    """How many sizes a budget gets."""
    stride: Count = 2
    """Steps on the lattice between sizes: 2 is a factor of 2, 1 a factor of sqrt 2."""
    optimum: Optimum = Optimum()
    replicates: Replicates | None = None


class LadderGrid(Declared):
    """Every size at every number of tokens per parameter."""

    type: Literal["ladder"]
    sizes: Positives
    """Target sizes N; each is snapped to the lattice."""
    tokens_per_parameter: Positives


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


class Point(Declared):
    """One cell by hand: a size, one of tokens, flops or tokens_per_parameter, and any training override."""

    size: Positive
    """Target size N; snapped to the lattice."""
    tokens: Positive | None = None
    flops: Positive | None = None
    tokens_per_parameter: Positive | None = None
    training: dict[str, Any] = {}
    """Hyperparameters of this cell alone."""

    @field_validator("training", mode="after")
    @classmethod
    def _known_hyperparameters(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, single in value.items():
            check_hyperparameter(name, single)
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
    tokens_per_parameter: Positive | None = None

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
    """Linear warm-up. Default min(N, 10 % of D); of wsd and constant, whose cells share trunks, N where that fits."""
    final_fraction: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """The last learning rate as a fraction of the peak (cosine, linear, wsd)."""
    cooldown_fraction: Annotated[Number, AfterValidator(_inside)] = 0.2
    """The share of D in which wsd cools down."""
    cooldown_shape: Literal["sqrt", "linear", "cosine"] = "sqrt"
    """How wsd cools down: 1 - sqrt (Haegele et al. 2024), a line, or half a cosine."""


ScheduleName = Literal["cosine", "linear", "constant", "wsd"]


class NamedSchedule(ScheduleFields):
    """A schedule with its own fields, `{kind: wsd, cooldown_fraction: 0.2}`: the same as to write them beside it."""

    kind: ScheduleName

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> "NamedSchedule":
        has = {"warmup_tokens"} | ({"final_fraction"} if self.kind != "constant" else set())
        has |= {"cooldown_fraction", "cooldown_shape"} if self.kind == "wsd" else set()
        if strange := sorted(self.model_fields_set - has - {"kind"}):
            raise ValueError(f"{self.kind} has no {' and no '.join(strange)}; it has {', '.join(sorted(has))}")
        return self


def _schedule_form(value: Any) -> str:
    return "@kind" if isinstance(value, dict | NamedSchedule) else "@name"


class NamedParametrisation(Declared):
    """A parametrisation with the size of its base, where the recipe's numbers hold as they stand."""

    kind: Literal["standard", "mup", "completep"]
    base_width: Count | None = None
    base_depth: Count | None = None

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
    """muon: for the hidden matrices, at AdamW's size of updates; AdamW for tables, head, gains and biases."""
    learning_rate: Rule = 1e-3
    """Peak learning rate."""
    weight_decay: Decay = 0.1
    """Decoupled decay, multiplied by the learning rate each step; on matrices only."""
    beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[Number, Field(ge=0, lt=1)] | None = None
    """Default .99 below 128 sequences a batch, .95 from there on (Porian et al. 2024)."""
    eps: Positive = 1e-8
    clip_norm: Positive = 1.0
    """The global gradient norm is clipped here."""
    schedule: Annotated[
        Annotated[ScheduleName, Tag("@name")] | Annotated[NamedSchedule, Tag("@kind")], Discriminator(_schedule_form)
    ] = "cosine"
    """A name; `{kind: <name>, ...}` gives its fields with it, and is taken apart when the file is read."""
    precision: Literal["float32", "bfloat16"] = "float32"
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


class Factors(Declared):
    """Multiples of the recipe's own value."""

    times: Annotated[list[Positive], Field(min_length=1)]


class LogVary(Declared):
    """A range of values, evenly spaced in the logarithm."""

    log: LogRange


def _variation_form(value: Any) -> str:
    if isinstance(value, Factors) or (isinstance(value, dict) and "times" in value):
        return "@times"
    return "@log" if isinstance(value, dict | LogVary) else "@list"


Variation = Annotated[
    Annotated[list[Any], Field(min_length=1), Tag("@list")]
    | Annotated[Factors, Tag("@times")]
    | Annotated[LogVary, Tag("@log")],
    Discriminator(_variation_form),
]


def _stack_form(value: Any) -> str:
    return "@word" if isinstance(value, str) and not value.strip().isdigit() else "@number"


Stacking = Annotated[
    Annotated[Literal["off", "auto"], Tag("@word")] | Annotated[Whole, Field(ge=2), Tag("@number")],
    Discriminator(_stack_form),
]

_FAMILY_FILE = re.compile(r".+\.py:\w+")


class Study(Declared):
    """A declared question: families x sizes x token counts x hyperparameters x seeds, on one corpus."""

    name: str
    """Names the study's folder in the store and its MLflow experiment."""
    question: str = ""
    """What the study asks; printed at the head of the report."""
    corpus: CorpusSource = CorpusSource()
    tokenizer: str = "bytes"
    """bytes, bpe:<vocabulary size>, or the path of a local Hugging Face tokenizer."""
    context: Annotated[Whole, Field(ge=2, le=1_048_576)] = 128
    """Tokens a sequence."""
    validation_tokens: Annotated[Whole, Field(ge=8192)] | None = None
    """Tokens that the final loss is taken over, in windows evenly spread over the validation stream; default: all of
    it. Short cells need not spend most of their time there; their losses compare with each other alone."""
    families: dict[str, dict[str, Number | bool]]
    """Family names, each with its options; a list of names will do."""
    grid: Grid
    training: Training = Training()
    seeds: Annotated[list[Annotated[Whole, Field(ge=0, lt=2**31)]], Field(min_length=1)] = [0]
    """Each seed sets both the initial weights and the data order."""
    trainer: str = ""
    """A trainer of one's own, my_file.py:train; empty: Escala's."""
    stack: Stacking = "auto"
    """Cells of equal shape, batch and tokens train as one program: auto, where a probe says that it is faster; off; or
    a number, always, that many together at most."""
    vary: dict[str, Variation] = {}
    """Hyperparameters crossed with the grid: a list of values, {times: [...]} or {log: {from, to, points}}."""
    search: Search | None = None
    """Hyperparameters that a sampler chooses trial by trial (sweeps/space.py): the study's cells are its trials'."""

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, value: str) -> str:
        if not STUDY_NAME.fullmatch(value):
            raise ValueError("letters, digits, dot, dash and underscore only, at most 100")
        return value

    @field_validator("corpus", mode="before")
    @classmethod
    def _corpus_by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"source": value}
        if isinstance(value, dict) and str(value.get("source")).startswith("hf:"):
            value = {**value, "source": "hf", "path": value["source"].removeprefix("hf:")}
        return value

    @field_validator("families", mode="before")
    @classmethod
    def _families_by_name(cls, value: Any) -> Any:
        value = _listed(value)
        if isinstance(value, list):
            value = {name: {} for name in value}
        if value == {}:
            raise ValueError("name at least one family")
        return {name: options or {} for name, options in value.items()} if isinstance(value, dict) else value

    @field_validator("families", mode="after")
    @classmethod
    def _known_families(cls, value: dict[str, Any]) -> dict[str, Any]:
        faults = []
        for name, options in value.items():
            try:
                if not _FAMILY_FILE.fullmatch(name):  # a file of the user's own is looked at when the study is planned
                    resolve_options(find_family(name), options)
            except InputError as error:
                faults.append(str(error))
        if faults:
            raise ValueError(" ".join(faults))
        return value

    @field_validator("stack", mode="before")
    @classmethod
    def _off_is_no_false(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads off as false

    @field_validator("seeds", mode="before")
    @classmethod
    def _seed_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    @field_validator("seeds", mode="after")
    @classmethod
    def _seeds_once(cls, value: list[int]) -> list[int]:
        return list(dict.fromkeys(value))

    @field_validator("vary", mode="after")
    @classmethod
    def _known_hyperparameters(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, variation in value.items():
            check_hyperparameter(name)
            if not isinstance(variation, Factors):
                check_hyperparameter(name, *(variation.log.values() if isinstance(variation, LogVary) else variation))
            elif name in NO_NUMBERS:
                raise ValueError(f"{name} is no number, so it has no multiples; list its values")
        return value

    @field_validator("grid", "training", "vary", mode="after")
    @classmethod
    def _not_fitted_on_itself(cls, value: Any, info: ValidationInfo) -> Any:
        plain = value.model_dump() if isinstance(value, BaseModel) else value
        if str(info.data.get("name")) in fitted_studies(plain):
            raise ValueError("a study cannot take a hyperparameter from its own runs; name another under `fitted`")
        return value

    @model_validator(mode="after")
    def _searched_once(self) -> "Study":
        if self.search is None:
            return self
        for name, axis in self.search.space.items():
            check_hyperparameter(name, *(axis.categorical or axis.bounds()))
            if name in self.vary:
                raise ValueError(f"search: {name} stands in vary too; it is varied or searched")
            if isinstance(self.grid, PointsGrid) and any(name in point.training for point in self.grid.points):
                raise ValueError(f"search: {name} is set at a point of the grid too; take it out there, or here")
        for setting in self.search.start:
            for name, value in setting.items():
                check_hyperparameter(name, value)
        return self
