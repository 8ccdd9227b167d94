"""Reading study files: YAML to a Study, with every fault reported at once.

Each fault names the file, the line, the field, what was found and what is allowed. Tags, anchors and repeated keys are
refused, so that no file can execute or explode.
"""

import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sweeps.errors import InputError, nearest, plain_fault
from sweeps.fitted import FittedRule
from sweeps.gridkinds import LogRange
from sweeps.published import PublishedRule
from sweeps.recipe import NamedSchedule
from sweeps.rules import PowerRule
from sweeps.study import Factors, LogVary, Study
from sweeps.units import plural

MAX_FILE_BYTES = 1_000_000
MAX_BITS = 4096
"""Of a whole number, which could not even be shown if it were longer."""
SHIPPED = Path(__file__).parent / "studies"


def find_study_file(study: str) -> Path:
    """The file that the command line's STUDY means: a path, or the name of a shipped study."""
    path = Path(study)
    if path.is_file():
        return path
    shipped = {entry.stem: entry for entry in sorted(SHIPPED.glob("*.yaml"))}
    if study in shipped:
        return shipped[study]
    raise InputError(
        f"no study file {study!r}{nearest(study, shipped)}. Give the path of a YAML file, "
        f"or the name of a shipped study: {', '.join(shipped)}."
    )


def load_study(path: Path) -> Study:
    """Read and check a study file. Raises InputError that lists every fault with its line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the study file {path}: {error.strerror}.") from None
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{path} has {len(content):,} bytes; a study file has at most {MAX_FILE_BYTES:,}.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}{_yaml_fault(error)}") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply for a study file.") from None
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path} is no study: a mapping with the keys {', '.join(Study.model_fields)} is wanted.")
    try:
        declared = yaml.load(text, Loader=_Loader)
        return Study.model_validate(declared)
    except yaml.YAMLError as error:
        raise InputError(f"{path}{_yaml_fault(error)}") from None
    except ValidationError as error:
        lines = sorted({(_line_of(root, fault["loc"]), _describe(fault)) for fault in error.errors()})
        faults = "\n".join(f"  {path}:{line}: {text}" for line, text in lines)
        raise InputError(f"{plural(len(lines), 'fault')} in the study file:\n{faults}") from None


def place_of(path: Path, *keys: str) -> str:
    """`file:line` of a field of a study file that `load_study` has read: for what is found wrong with it later."""
    root: Any = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    return f"{path}:{_line_of(root, keys)}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that also refuses anchors (which can explode), and keys that stand twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases (& and *) are not allowed in study files", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """YAML's own rules leave Python's errors to the caller: of month 13, of a number of 5,000 digits."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise ValueError("a number of far too many digits")
            return value
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise yaml.constructor.ConstructorError(None, None, f"cannot be read ({error})", node.start_mark) from None


def _yaml_fault(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    if "could not determine a constructor for the tag" in problem:
        problem += "; tags are not allowed in study files"
    return f":{mark.line + 1}: {problem}." if mark else f": {problem}."


def _line_of(root: yaml.Node, location: tuple[str | int, ...]) -> int:
    """The line of the deepest node on the way; parts that name a union's member are passed over."""
    node, line = root, root.start_mark.line
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    node, line = value, key.start_mark.line
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
    return line + 1


def _describe(fault: Mapping[str, Any]) -> str:
    location = fault["loc"]
    names = [part for i, part in enumerate(location) if not _is_union_member(location, i)]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".") or "the study"
    if fault["type"] == "extra_forbidden":
        allowed = _keys_at(location[:-1])
        return f"{field}: unknown key{nearest(str(location[-1]), allowed)}; allowed: {', '.join(allowed)}"
    if fault["type"] == "missing":
        return f"{field}: missing; it must be given"
    if fault["type"] == "union_tag_not_found":  # which form of several is meant
        forms = [_form_of(model) for model in _models_at(location)]
        hint = next((f" (found {key!r})" for key in fault["input"] if nearest(str(key), ["type"])), "")
        return f"{field}.type: missing{hint}; allowed: {', '.join(forms)}"
    found, wanted = repr(fault["input"]), plain_fault(fault)
    if fault["type"] in ("model_type", "dict_type", "model_attributes_type"):
        keys = _keys_at(location) if fault["type"] == "model_type" else []
        wanted = f"a mapping is wanted{', of the keys ' if keys else ''}{', '.join(keys)}"
    return f"{field}: found {found if len(found) < 80 else found[:77] + '...'}; {wanted}"


def _is_union_member(location: tuple[str | int, ...], index: int) -> bool:
    """Whether a part of a fault's location names a form (a tag of ours, or the grid's type) and no key of the file."""
    return str(location[index]).startswith("@") or (index == 1 and location[0] == "grid")


def _keys_at(location: tuple[str | int, ...]) -> list[str]:
    """The keys that the model at `location` allows."""
    return [field.alias or name for model in _models_at(location) for name, field in model.model_fields.items()]


def _models_at(location: tuple[str | int, ...]) -> list[Any]:
    """The model at `location`, or all forms that there may be."""
    models: list[Any] = [Study]
    for part in location:
        fields = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        if fields:
            models = [model for field in fields for model in _models_in(field)]
        else:
            models = [model for model in models if _form_of(model) == part] or models
    return models


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def _form_of(model: Any) -> str:
    """The tag under which a union holds this model."""
    if "type" in model.model_fields:
        return str(typing.get_args(model.model_fields["type"].annotation)[0])
    forms = {PowerRule: "@rule", LogRange: "@range", Factors: "@times", LogVary: "@log", NamedSchedule: "@kind"}
    forms |= {PublishedRule: "@published", FittedRule: "@fitted"}
    return forms.get(model, "")
