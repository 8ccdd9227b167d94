"""Stores that the analysis tests share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.analysis.synthetic import Run, grid, write_study


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Path]:
    """Writes a store under the test's folder: study(runs, **options) -> its root."""

    def write(runs: Sequence[Run] | None = None, **options: Any) -> Path:
        chosen = grid(seeds=3, replicated=2) if runs is None else runs
        return write_study(tmp_path / "store", chosen, **options)

    return write


@pytest.fixture(scope="session")
def good_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study `demo`: four budgets, five sizes, three seeds at the first two budgets. Treat it as read-only."""
    return write_study(tmp_path_factory.mktemp("good") / "store", grid(seeds=3, replicated=2))
