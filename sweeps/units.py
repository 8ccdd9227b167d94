"""How numbers are written for people, the same in terminals, run names, pictures and pages; how people write times."""

import re

from sweeps.errors import InputError


def human(number: float) -> str:
    """A count in three digits: 20,480 is 20.5k, 1.5e9 is 1.5B."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


def flops(number: float) -> str:
    """FLOPs in three digits: 225000000000.0 is 2.25e11."""
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if number else "0"


def plural(count: int, word: str) -> str:
    """ "1 budget", "2 budgets", "1,000 budgets"."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    """75 is 1m 15s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s" if minutes else f"{rest}s"


def parse_duration(text: str, what: str) -> float:
    """Seconds of 90s, 30m, 200h or 7d. InputError that begins with `what` for anything else, and for nothing."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0.0
    if seconds <= 0:
        raise InputError(f"{what}: found {text!r}; a time above 0 with its unit is wanted, such as 90s, 30m, 200h, 7d.")
    return seconds
