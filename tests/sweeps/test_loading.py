"""Loading sets what it made apart, and leaves the collector as it was."""

import gc
from collections.abc import Iterator

import pytest

from sweeps.loading import loading


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_what_was_loaded_is_looked_at_no_more_and_the_collector_goes_on() -> None:
    before = gc.get_freeze_count()
    with loading():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before


def test_a_library_that_is_not_there_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), loading():
        import escala_has_no_such_library  # noqa: F401
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with loading():
        pass
    assert not gc.isenabled()
