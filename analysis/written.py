"""Numbers as people write them in tables: 124M, 1,300,000, and the units that stand in the names of columns.

Guarded against: a decimal comma that is taken for one between thousands, and so makes another number.
"""

import re

import numpy as np
import pandas as pd

from sweeps.errors import InputError

UNITS = {
    **dict.fromkeys(("k", "thousand", "thousands"), 1e3),
    **dict.fromkeys(("m", "million", "millions", "mtok"), 1e6),
    **dict.fromkeys(("b", "bn", "billion", "billions", "g", "gflop", "gflops"), 1e9),
    **dict.fromkeys(("t", "trillion", "trillions", "tflop", "tflops"), 1e12),
    **dict.fromkeys(("pflop", "pflops"), 1e15),
    **dict.fromkeys(("eflop", "eflops"), 1e18),
    **dict.fromkeys(("zflop", "zflops"), 1e21),
}
"""What a word or a letter multiplies a number by."""
_WRITTEN = re.compile(r"\s*([-+]?)([\d.,]*\d[.]?)((?:[eE][-+]?\d+)?)\s*([kKmMbBtT]?)\s*$")
_POINTS = re.compile(r"\d+(\.\d*)?|\.\d+|[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
"""Digits without commas, or with commas that divide thousands: 0,001 is no thousand."""


def numbers_of(column: pd.Series) -> pd.Series:
    """A column as numbers; text that is none becomes NaN. 124M and 1,300,000 are numbers.

    Raises InputError for a number with a decimal comma, which without its comma would be another number.
    """
    numbers, wrong = parsed(column)
    if wrong:
        each = list(dict.fromkeys(wrong))
        held = ", ".join(each[:3]) + (", ..." if len(each) > 3 else "")
        raise InputError(
            f"{column.name} holds {held}: decimal commas are not read, only commas between thousands (1,300,000). "
            "Write decimal points in the file, 1.5 for 1,5."
        )
    return numbers


def parsed(column: pd.Series) -> tuple[pd.Series, list[str]]:
    """A column as numbers, and the texts in it whose commas do not divide thousands."""
    numbers = pd.to_numeric(column, errors="coerce").astype("float64").to_numpy(copy=True)
    texts, wrong = column.to_numpy(dtype=object), []
    for row in np.flatnonzero(np.isnan(numbers) & column.notna().to_numpy()):
        text = str(texts[row])
        if not (written := _WRITTEN.match(text)):
            continue
        sign, digits, power, unit = written.groups()
        if _POINTS.fullmatch(digits):
            numbers[row] = float(sign + digits.replace(",", "") + power) * UNITS.get(unit.lower(), 1.0)
        elif "," in digits:
            wrong.append(text.strip())
    return pd.Series(numbers, column.index, name=column.name), wrong
