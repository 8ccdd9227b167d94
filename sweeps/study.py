"""A study as a researcher declares it: frozen, validated models (sweeps/studyfile.py reads them from YAML)."""

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sweeps.errors import InputError
from sweeps.families import find_family, resolve_options
from sweeps.fitted import fitted_studies
from sweeps.gridkinds import Grid, LogRange, PointsGrid
from sweeps.recipe import NO_NUMBERS, Training, check_hyperparameters, raise_together
from sweeps.rules import Count, Declared, Positive, Whole, parse_whole
from sweeps.sources import check_option
from sweeps.space import Search
from sweeps.store import CORPUS_NAME, STUDY_NAME


class CorpusSource(Declared):
    """Where the text comes from."""

    source: Literal["pystdlib", "folder", "jsonl", "parquet", "hf", "markov"] = "pystdlib"
    """pystdlib is the source text of Python's standard library, on every machine; markov is synthetic. `hf:<name>` is
    short for source hf with that path."""
    path: str | None = None
    """The folder or file (folder, jsonl, parquet), relative to the study file, or the dataset's name (hf)."""
    options: dict[str, Any] = {}
    """Options of the source: text_field (jsonl, parquet, hf), split (hf), vocab_size, order, tokens, seed (markov)."""
    fingerprint: str | None = None
    """Pins the corpus: any other content is an error."""
    repeat: bool = False
    """Allows cells of more than four epochs."""

    @field_validator("fingerprint")
    @classmethod
    def _fingerprint_is_one(cls, value: str | None) -> str | None:
        if value is not None and not CORPUS_NAME.fullmatch(value):
            raise ValueError("a fingerprint is 16 hex digits (0-9, a-f), the name of a folder in the store's corpora")
        return value

    @field_validator("options", mode="after")
    @classmethod
    def _options_of_its_source(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if (kind := info.data.get("source")) is None:
            return value
        checked, faults = {}, []
        for name, given in value.items():
            try:
                checked[name] = check_option(kind, name, given)
            except InputError as error:
                faults.append(((name,), given, str(error)))
        raise_together(faults)
        return checked

    @model_validator(mode="after")
    def _path_where_needed(self) -> "CorpusSource":
        if self.source in ("folder", "jsonl", "parquet", "hf") and not self.path:
            raise ValueError(f'source {self.source} needs "path"')
        if self.source in ("pystdlib", "markov") and self.path:
            raise ValueError(f'source {self.source} takes no "path"')
        return self


class Factors(Declared):
    """Multiples of the recipe's own value."""

    times: Annotated[list[Positive], Field(min_length=1)]
    """1 is the recipe's own value, and is not added where it is left out."""


class LogVary(Declared):
    """A range of values, evenly spaced in the logarithm."""

    log: LogRange

    @model_validator(mode="before")
    @classmethod
    def _in_one_of_three_forms(cls, value: Any) -> Any:
        if isinstance(value, dict) and "log" not in value:
            raise ValueError("a list of values, {times: [a, b]} or {log: {from: a, to: b, points: n}} is wanted")
        return value


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


def _values_of(variation: Any) -> Sequence[Any]:
    """The values of a variation; none of one by factors, which the recipe's own value must tell."""
    if isinstance(variation, Factors):
        return ()
    return variation.log.values() if isinstance(variation, LogVary) else variation


def _plain(variation: Any) -> Any:
    """A variation as the file has it."""
    return variation.model_dump(by_alias=True) if isinstance(variation, BaseModel) else variation


def _stack_form(value: Any) -> str:
    return "@word" if isinstance(value, str) and not value.strip().isdigit() else "@number"


Stacking = Annotated[
    Annotated[Literal["off", "auto"], Tag("@word")] | Annotated[Whole, Field(ge=2), Tag("@number")],
    Discriminator(_stack_form),
]

Workers = Annotated[
    Annotated[Literal["auto"], Tag("@word")] | Annotated[Count, Tag("@number")], Discriminator(_stack_form)
]


class Limits(Declared):
    """What a study may take of a cluster. Changes no number of a cell."""

    cells: Count | None = None
    """In training at once."""
    gpus: Positive | None = None
    """In use at once."""
    flops: Positive | None = None
    """Training FLOPs of its cells in all, whoever trained them; a cell with which they would be more is not begun."""
    gpu_hours: Positive | None = None
    """GPU-hours of its runs in all. No cell is begun once they are used up, or whose predicted time is more than is
    left; those that train then go on to their ends."""
    priority: Whole = 0
    """On a cluster and in a store that studies share: while one with a higher number waits for room, this one begins
    nothing beyond one unit."""


def _option(value: Any) -> Any:
    """An option's value in one of its two kinds: a union would tell a fault once for each of them."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    plain = value if isinstance(value, bool) else parse_whole(value)
    if not isinstance(plain, int | float) or not math.isfinite(plain):
        raise ValueError("a number, or true or false, is wanted")
    return plain


Option = Annotated[float | bool, BeforeValidator(_option)]

_FAMILY_FILE = re.compile(r".+\.py:\w+")


class Study(Declared):
    """A declared question: families x sizes x token counts x hyperparameters x seeds, on one corpus."""

    name: str
    """Names the study's folder in the store and its MLflow experiment."""
    question: str = ""
    """What the study asks; printed at the head of the report."""
    corpus: CorpusSource = CorpusSource()
    tokenizer: str = "bytes"
    """bytes, bpe:<vocabulary size>, or the path of a local Hugging Face tokenizer, relative to where the command is
    given."""
    context: Annotated[Whole, Field(ge=2, le=1_048_576)] = 128
    """Tokens a sequence."""
    validation_tokens: Annotated[Whole, Field(ge=8192)] | None = None
    """Tokens that the final loss is taken over, in windows evenly spread over the validation stream; default: all of
    it. Short cells need not spend most of their time there; their losses compare with each other alone."""
    families: dict[str, dict[str, Option]]
    """Family names, each with its options; a list of names will do."""
    grid: Grid
    """Which sizes, or shapes, train how long: isoflop, ladder, shapes or points."""
    training: Training = Training()
    """The recipe of every cell (sweeps/recipe.py)."""
    seeds: Annotated[list[Annotated[Whole, Field(ge=0, lt=2**31)]], Field(min_length=1)] = [0]
    """Each seed sets both the initial weights and the data order."""
    trainer: str = ""
    """A trainer of one's own, my_file.py:train; empty: Escala's."""
    stack: Stacking = "auto"
    """Cells of equal shape, batch and tokens train as one program: auto, where a probe says that it is faster; off; or
    a number, always, that many together at most."""
    limits: Limits = Limits()
    """What a run of it may take of a cluster, at once and in all."""
    workers: Workers = "auto"
    """Processes, with a GPU each, that train one cell together on one node: auto, one unless a cell does not fit; or a
    number. Changes neither the batch nor the order of the data."""
    vary: dict[str, Variation] = {}
    """Hyperparameters crossed with the grid: a list of values, {times: [...]} or {log: {from, to, points}}."""
    search: Search | None = None
    """Hyperparameters that a sampler chooses trial by trial (sweeps/space.py): the study's cells are its trials'."""

    @model_validator(mode="before")
    @classmethod
    def _gangs_train_no_stacks(cls, value: Any) -> Any:
        gang = isinstance(value, dict) and isinstance(value.get("workers"), int) and value["workers"] > 1
        return {"stack": "off"} | value if gang else value

    @field_validator("workers", mode="after")
    @classmethod
    def _one_cell_for_all(cls, value: int | str, info: ValidationInfo) -> int | str:
        if isinstance(value, int) and value > 1:
            if trainer := info.data.get("trainer"):
                raise ValueError(f"trainer {trainer} trains in one process; leave out workers, or set it to 1")
            if info.data.get("stack") not in ("off", "auto"):
                raise ValueError("several workers train one cell, and a stack is several cells; leave out stack")
        return value

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, value: str) -> str:
        if not STUDY_NAME.fullmatch(value):
            raise ValueError("letters, digits, dot, dash and underscore only, at most 100")
        return value

    @field_validator("tokenizer")
    @classmethod
    def _vocabulary_in_range(cls, value: str) -> str:
        if value.startswith("bpe:"):
            from sweeps.tokenizers import bpe_vocabulary  # with numpy, which no other command line waits for

            bpe_vocabulary(value)
        return value  # a path is looked up when the study is planned

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
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list):
            if strange := [one for one in value if not isinstance(one, str)]:
                raise ValueError(
                    f"a list names families; found {strange[0]!r}. With options, write "
                    "families: {llama: {heads_per_kv: 4}}"
                )
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
    def _known_hyperparameters(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        grid = info.data.get("grid")
        points = grid.points if isinstance(grid, PointsGrid) else []
        check_hyperparameters(((name,), name, _plain(each), _values_of(each)) for name, each in value.items())
        for name, variation in value.items():
            if not isinstance(variation, Factors):
                if any(name in point.training for point in points):
                    raise ValueError(
                        f"{name} is set at a point of the grid too; take it out there, or vary its {{times: ..}}"
                    )
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

    @field_validator("search", mode="after")
    @classmethod
    def _searched_once(cls, value: Search | None, info: ValidationInfo) -> Search | None:
        grid, vary = info.data.get("grid"), info.data.get("vary", {})
        for name in value.space if value else ():
            if name in vary:
                raise ValueError(f"{name} stands in vary too; it is varied or searched")
            if isinstance(grid, PointsGrid) and any(name in point.training for point in grid.points):
                raise ValueError(f"{name} is set at a point of the grid too; take it out there, or here")
        return value
