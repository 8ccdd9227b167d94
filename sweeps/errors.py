"""The one exception for input that a user can mend, and the hint that goes with it."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """Bad input: the message says what was found, what is allowed and what to do. The command line exits with 2."""

    def __init__(self, message: str, *, field: tuple[str, ...] = ()) -> None:
        """`field` of the study file is at fault, if one is: ("corpus", "path")."""
        super().__init__(message)
        self.field = field


@contextmanager
def about(*field: str) -> Iterator[None]:
    """Whatever is found wrong in here is the fault of this field of the study file."""
    try:
        yield
    except InputError as error:
        error.field = field
        raise


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`' (did you mean "llama"?)'` when one of `allowed` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""


def plain_fault(fault: Mapping[str, Any]) -> str:
    """One entry of a pydantic ValidationError as a clause: what is allowed, with the nearest match where a name was."""
    if fault["type"] == "too_short":
        least = fault["ctx"]["min_length"]
        return f"at least {least} item{'s are' if least > 1 else ' is'} wanted"
    if fault["type"] == "too_long":
        most, found = fault["ctx"]["max_length"], fault["ctx"]["actual_length"]
        return f"at most {most} item{'s are' if most > 1 else ' is'} wanted, not {found}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    expected = fault.get("ctx", {}).get("expected") or fault.get("ctx", {}).get("expected_tags")
    if expected and isinstance(fault["input"], str | dict):
        found = fault["input"].get("type", "") if isinstance(fault["input"], dict) else fault["input"]
        allowed = [word.strip(" '") for word in re.split(r",| or ", str(expected))]
        return f"allowed: {', '.join(allowed)}{nearest(str(found), allowed)}"
    return message[:1].lower() + message[1:]
