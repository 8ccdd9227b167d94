"""Schedules hit their published values, start and end where they should, and never jump."""

import itertools
import math
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.cell import Schedule
from sweeps.recipe import ScheduleName
from sweeps.schedules import fraction


def schedule(name: str, warmup: int = 100, final: float = 0.0, cooldown: float = 0.2) -> Schedule:
    return Schedule(name=name, warmup_tokens=warmup, final_fraction=final, cooldown_fraction=cooldown)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(50, 0.5), (800, 1.0), (850, 0.5), (900, 1 - math.sqrt(0.5)), (950, 1 - math.sqrt(0.75)), (1000, 0.0)],
)
def test_wsd_cools_down_with_one_minus_sqrt(tokens: int, expected: float) -> None:
    assert fraction(schedule("wsd"), tokens, 1000) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("tokens", "expected"), [(50, 0.5), (550, 0.55), (1000, 0.1)])
def test_cosine_falls_to_the_final_fraction(tokens: int, expected: float) -> None:
    assert fraction(schedule("cosine", final=0.1), tokens, 1000) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(get_args(ScheduleName)),
    warmup=st.integers(0, 500),
    final=st.floats(0, 1),
    cooldown=st.floats(0.05, 0.5),
    horizon=st.integers(1000, 100_000),
)
def test_a_schedule_stays_between_zero_and_its_peak_and_falls_after_the_warmup(
    name: str, warmup: int, final: float, cooldown: float, horizon: int
) -> None:
    plan = schedule(name, warmup, final, cooldown)
    values = [fraction(plan, horizon * i / 200, horizon) for i in range(201)]
    assert all(-1e-12 <= value <= 1 + 1e-12 for value in values)
    after = [value for i, value in enumerate(values) if horizon * i / 200 >= warmup]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    if name != "constant":
        assert values[-1] == pytest.approx(final, abs=1e-9)
