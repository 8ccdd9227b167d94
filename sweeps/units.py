"""How numbers are written for people, the same in terminals, run names, pictures and pages."""


def human(number: float) -> str:
    """A count in three digits: 20,480 is 20.5k, 1.5e9 is 1.5B."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


def flops(number: float) -> str:
    """FLOPs in three digits: 225000000000.0 is 2.25e11."""
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def duration(seconds: float) -> str:
    """75 is 1m 15s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s" if minutes else f"{rest}s"
