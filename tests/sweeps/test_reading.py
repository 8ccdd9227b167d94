"""What training reads of a corpus: windows in an order of their own for each seed, and the validation stream."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import folder_source, stream, text

from sweeps import order, shards
from sweeps.corpora import Corpus, open_corpus, prepare
from sweeps.errors import InputError


@settings(deadline=None, max_examples=80, derandomize=True)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 9))
def test_the_window_order_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    keys = order.epoch_keys("0" * 16, seed, epoch)[:-1]
    found = order.permute(np.arange(size, dtype=np.uint64), size, keys)
    assert np.array_equal(np.sort(found), np.arange(size))


def test_the_window_order_looks_random_and_reaches_huge_corpora() -> None:
    keys = order.epoch_keys("0" * 16, 1, 0)[:-1]
    size = 20_000
    found = order.permute(np.arange(size, dtype=np.uint64), size, keys).astype(float)
    assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.03
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03
    steps = np.histogram(np.diff(found) % size, bins=20)[0]  # uniform for a random order: 1000 +- 31 a bin
    assert np.abs(steps - size / 20).max() < 160
    far = np.arange(2**58, 2**58 + 1000, dtype=np.uint64)
    huge = order.permute(far, 2**60 + 12345, keys)
    assert len(np.unique(huge)) == 1000
    assert huge.max() < 2**60 + 12345


@settings(deadline=None, max_examples=25, derandomize=True)
@given(context=st.integers(1, 400), seed=st.integers(-5, 10**9), epoch=st.integers(0, 3), split=st.integers(1, 40))
def test_an_epoch_shows_every_window_once_however_it_is_batched(
    context: int, seed: int, epoch: int, split: int, small: Corpus
) -> None:
    count = small.info.windows(context)
    whole = small.batch(seed, epoch, count, context)  # one step of a whole epoch
    # Windows are distinct, aligned on one grid and cover it without a gap.
    tokens = np.concatenate(small._train.shards)
    starts = order.epoch_keys(small.info.fingerprint, seed, epoch)[-1] % np.uint64(context)
    expected = {tokens[int(starts) + n * context :][: context + 1].tobytes() for n in range(count)}
    assert {row.astype(tokens.dtype).tobytes() for row in whole} == expected
    assert int(starts) + count * context < len(tokens)
    # Grouped otherwise, the stream is the same, also across the border of an epoch.
    first = epoch * count // split
    rows = np.concatenate([small.batch(seed, step, split, context) for step in range(first, first + 3)])
    single = np.concatenate([small.batch(seed, p, 1, context) for p in range(first * split, (first + 3) * split)])
    assert np.array_equal(rows, single)
    assert rows.dtype == np.int64


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    place = tmp_path_factory.mktemp("small")
    (place / "one.txt").write_text("".join(text(seed) for seed in range(20)), encoding="utf-8")
    info = prepare(folder_source(place), "bytes", place / "store")
    return open_corpus(place / "store", info.fingerprint)


def test_different_data_seeds_and_epochs_give_different_orders(small: Corpus) -> None:
    count = small.info.windows(64)
    batches = [small.batch(seed, step, count, 64) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], batches[2])
    assert small.info.epochs(count * 64, 64) == pytest.approx(1.0)


def test_validation_windows_tile_the_stream_and_know_their_documents(folder: Path, tmp_path: Path) -> None:
    info = prepare(folder_source(folder), "bytes", tmp_path)
    corpus = open_corpus(tmp_path, info.fingerprint)
    count = corpus.validation_windows(100)
    tokens, owner = corpus.validation_batch(0, count, 100)
    flat = stream(tmp_path, info, "validation")
    assert np.array_equal(tokens[:, :-1].ravel(), flat[: count * 100])
    assert np.array_equal(tokens[:, 1:].ravel(), flat[1 : count * 100 + 1])
    expected = np.cumsum(flat == 0xFF) - (flat == 0xFF)  # a separator belongs to the document that it ends
    assert np.array_equal(owner.ravel(), expected[1 : count * 100 + 1])
    part, part_owner = corpus.validation_batch(1, 2, 100)
    assert np.array_equal(part, tokens[1:3])
    assert np.array_equal(part_owner, owner[1:3])
    with pytest.raises(IndexError):
        corpus.validation_batch(count, 1, 100)


def test_bits_per_byte_of_uniform_bytes_is_eight_times_the_separators(small: Corpus) -> None:
    info = small.info
    assert info.bits_per_byte(math.log(256)) == pytest.approx(8 * info.validation_tokens / info.validation_bytes)


def test_a_stream_reads_the_same_from_one_shard_or_many(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 60_000, 5000)
    readers = []
    for name, size in (("one", 10**6), ("many", 256)):
        with shards.writing(tmp_path, name, np.dtype("<u2"), size) as writer:
            for part in np.array_split(tokens, 17):
                writer.write(part)
            readers.append(shards.StreamReader(tmp_path, writer.finish()))
    assert len(readers[1].shards) == 40
    starts = np.array([0, 100, 127, 128, 4800, 1])
    assert np.array_equal(readers[0].rows(starts, 200), tokens[starts[:, None] + np.arange(200)])
    assert np.array_equal(readers[1].rows(starts, 200), readers[0].rows(starts, 200))


def test_a_context_that_does_not_fit_is_refused(small: Corpus) -> None:
    with pytest.raises(InputError, match="at least two contexts"):
        small.batch(0, 0, 1, 10**6)
    with pytest.raises(InputError, match="does not fit the validation split"):
        small.validation_windows(10**6)
