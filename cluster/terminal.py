"""Text for a terminal: without secrets, and with every control character made visible.

What the commands print comes in part from others: a study's keys, the message of an exception, a reason that somebody
typed in MLflow, the family named in a table. An escape sequence in it would move the cursor, hide lines, set the
window's title or, in some terminals, type. JSON needs none of this: it escapes them itself.
"""

import re
import sys
from typing import TextIO

from sweeps.redaction import redact

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""All but tab and newline; also the signs that turn the direction of writing, which can show a text that is not."""


def visible(text: str) -> str:
    """The text with control characters written as Python would: `\\x1b[2J` clears no screen."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str = "", file: TextIO | None = None) -> None:
    """Print text that is for people; by default to stdout."""
    print(visible(redact(text)), file=file or sys.stdout, flush=True)
