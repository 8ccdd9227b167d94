"""What a driver without Ray runs on."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from searched import make_corpus

from cluster import driver
from cluster.claims import Claim
from sweeps.corpora import CorpusInfo
from sweeps.grids import Plan, plan_study
from sweeps.store import Store, open_store
from sweeps.study import Study


@pytest.fixture(autouse=True)
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's machine has no GPU, whatever that of the test has."""
    monkeypatch.setattr(driver, "local_gpus", tuple)


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusInfo:
    return make_corpus(tmp_path)


@pytest.fixture
def store(tmp_path: Path, corpus: CorpusInfo) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def claim(store: Store) -> Iterator[Claim]:
    with Claim(store, "s") as held:
        yield held


@pytest.fixture
def other(store: Store) -> Iterator[Claim]:
    """The living driver of another study on the store."""
    with Claim(store, "other") as held:
        yield held


@pytest.fixture
def make_plan(corpus: CorpusInfo) -> Callable[..., Plan]:
    def make(*tokens: int, **more: Any) -> Plan:
        declared: dict[str, Any] = {
            "name": "s",
            "corpus": {"source": "markov", "options": {"vocab_size": 8, "tokens": 60_000}},
            "context": 32,
            "families": ["llama"],
            "grid": {"type": "points", "points": [{"size": 10_000, "tokens": one} for one in tokens]},
            "training": {"batch_tokens": 64, "warmup_tokens": 2_000},
        }
        return plan_study(Study.model_validate(declared | more), corpus)

    return make
