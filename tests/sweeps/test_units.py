"""Numbers as people read them."""

import pytest

from sweeps.units import duration, flops, human, plural


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (12, "12"), (999, "999"), (999.6, "1k"), (21500, "21.5k"), (999_800, "1M"), (124e6, "124M"),
     (70e9, "70B"), (1.4e12, "1.4T")],
)  # fmt: skip
def test_counts_are_written_in_three_digits(number: float, text: str) -> None:
    assert human(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(1.2e11, "1.2e11"), (4e11, "4e11"), (1.25e16, "1.25e16"), (3.333e20, "3.33e20"), (0, "0")]
)
def test_flops_are_written_as_powers_of_ten(number: float, text: str) -> None:
    assert flops(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4s"), (75, "1m 15s"), (59.7, "1m 00s"), (7384, "2h 03m")])
def test_durations_carry_over(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 cells"), (1, "1 cell"), (2, "2 cells"), (1000, "1,000 cells")])
def test_one_is_not_plural(count: int, text: str) -> None:
    assert plural(count, "cell") == text
