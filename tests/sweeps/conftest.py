"""What the tests share: a folder of texts, and a store with a small synthetic corpus to train on."""

from pathlib import Path

import pytest
from texts import text

from sweeps.corpora import Corpus, make_source, open_corpus, prepare
from sweeps.store import Store, open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "texts"
    (place / "deep").mkdir(parents=True)
    for number in range(60):
        (place / ("deep" if number % 3 else ".") / f"{number:03d}.txt").write_text(text(number), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(tmp_path_factory.mktemp("cells") / "store")


@pytest.fixture(scope="module")
def corpus(store: Store) -> Corpus:
    source = make_source("markov", None, {"vocab_size": 8, "tokens": 400_000, "seed": 3})
    return open_corpus(store.root, prepare(source, "bytes", store.root).fingerprint)
