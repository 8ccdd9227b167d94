"""Batches are those of the corpus in their order, wherever they were prepared, and no thread is left behind."""

import threading

import numpy as np
import pytest
import torch
from small import make_cell

from sweeps.batches import AHEAD, Ahead, Batches
from sweeps.corpora import Corpus, make_source, open_corpus, prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("batches")
    source = make_source("markov", None, {"vocab_size": 8, "tokens": 100_000, "seed": 3})
    return open_corpus(root, prepare(source, "bytes", root).fingerprint)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_each_step_gets_its_own_batch_of_the_corpus(corpus: Corpus, device: str) -> None:
    cell = make_cell(corpus, 12, data_seed=5)
    batches = Batches(corpus, cell, torch.device(device), 4)
    try:
        for step in range(4, 13):
            found = batches.take(step)
            assert found.device.type == device
            expected = corpus.batch(5, step - 1, cell.sequences, cell.shape.context)
            assert np.array_equal(found.cpu().numpy(), expected)
    finally:
        batches.close()


def test_what_is_prepared_ahead_comes_in_order_and_only_a_little_ahead(corpus: Corpus) -> None:
    prepared: list[int] = []

    def read(step: int) -> np.ndarray:
        prepared.append(step)
        return corpus.batch(0, step, 4, 32)

    ahead = Ahead(read, 3, 20)
    for step in range(3, 15):
        assert np.array_equal(ahead.take(step), corpus.batch(0, step, 4, 32))
        assert max(prepared) <= step + AHEAD + 1
    with pytest.raises(ValueError, match="step 3 was asked for where 15 is next"):
        ahead.take(3)
    ahead.close()
    assert not any(thread.name == "escala-batches" for thread in threading.enumerate())


def test_what_reading_raises_is_raised_where_the_batch_is_taken() -> None:
    def read(step: int) -> int:
        if step == 2:
            raise OSError("the disk is gone")
        return step

    ahead = Ahead(read, 1, 9)
    assert ahead.take(1) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(2)
    ahead.close()
