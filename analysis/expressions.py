"""Arithmetic on the columns of a table: `C/(6*N)`, 1e9*`Model Size (B)`, `log(perplexity)`.

Text from the command line is never run as Python. It is parsed into a syntax tree of which only numbers, column
names, + - * / **, parentheses, log, exp and sqrt are computed, by the code below; all else is refused.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sweeps.errors import InputError

LONGEST = 400
"""Characters of an expression; far more than any needs, far fewer than would exhaust the parser."""
_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"log": np.log, "exp": np.exp, "sqrt": np.sqrt}
_ALLOWED = (
    "allowed are numbers, column names, + - * / **, parentheses, log (natural), exp and sqrt; a name with blanks or "
    "other signs goes into quotes or backquotes"
)


def evaluate(text: str, column: Callable[[str], Any]) -> Any:
    """The value of an expression. `column` gives the numbers of a column by its name, or raises InputError.

    A column is named bare (`C`, `optimizer.lr`), in quotes or in backquotes. What has no value (a division by zero,
    the logarithm of a negative number) is infinite or NaN. Raises InputError for anything but arithmetic.
    """
    if len(text) > LONGEST:
        raise InputError(f"an expression of {len(text)} characters; at most {LONGEST} are read.")
    try:
        tree = ast.parse(re.sub("`([^`]*)`", lambda name: repr(name[1]), text).strip(), mode="eval")
        with np.errstate(all="ignore"):
            return _value(tree.body, text, column)
    except InputError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"{text!r} is no arithmetic that can be read: {_ALLOWED}.") from None


def _value(node: ast.expr, text: str, column: Callable[[str], Any]) -> Any:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as number):
            return np.float64(number)  # Python's own whole numbers would grow without end under **
        case ast.Constant(value=str() as name) | ast.Name(id=name):
            return column(name)
        case ast.Attribute():
            return column(ast.unparse(node))  # a dotted name, as trackers write them; nothing is looked up on objects
        case ast.UnaryOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](_value(node.operand, text, column))
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](_value(node.left, text, column), _value(node.right, text, column))
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_value(inner, text, column))
    raise InputError(f"{ast.unparse(node)!r} in {text!r} is not understood: {_ALLOWED}.")


def split_definitions(texts: list[str], what: str) -> dict[str, str]:
    """{"N": "params", "D": "C/(6*N)"} from "N=params,D=C/(6*N)", in one text or several.

    Commas inside quotes, backquotes and parentheses do not split. Raises InputError for a part without `=` or a name
    that is given twice; `what` names the option in the message.
    """
    found: dict[str, str] = {}
    for part in (part for text in texts for part in _parts(text)):
        name, sign, value = (word.strip() for word in part.partition("="))
        if not (name and sign and value):
            raise InputError(f"{what} has {part!r}; each part is NAME=VALUE, with commas between.")
        if name in found:
            raise InputError(f"{what} gives {name} twice: {found[name]!r} and {value!r}.")
        found[name] = value
    return found


def _parts(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "`'\"":
            quote = letter
        else:
            depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def numbers(definitions: Mapping[str, str], option: str) -> dict[str, float]:
    """Definitions whose values are plain numbers. InputError, which names the option, for one that is not."""
    found = {}
    for name, text in definitions.items():
        try:
            found[name] = float(text)
        except ValueError:
            raise InputError(f"{option}: {name} is {text!r}; a number is wanted, as in {name}=1.8.") from None
    return found
