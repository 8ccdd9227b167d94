"""The one exception for input that a user can mend, and the hint that goes with it."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message says what was found, what is allowed and what to do. The command line exits with 2."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`' (did you mean "llama"?)'` when one of `allowed` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
