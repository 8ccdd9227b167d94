"""Corpora: what is read, how it is split, pinned, stored and served; and what is said of bad input."""

import hashlib
import json
import math
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps import builds, markov, order, shards, sources, splits
from sweeps.corpora import Corpus, CorpusInfo, Source, make_source, open_corpus, prepare
from sweeps.errors import InputError

WORDS = [
    "red",
    "green",
    "blue",
    "north",
    "south",
    "east",
    "west",
    "one",
    "two",
    "three",
    "señor",
    "Ωmega",
    "漢字",
    "tab",
    "newline",
]


def text(seed: int, words: int = 120) -> str:
    generator = np.random.default_rng(seed)
    return " ".join(generator.choice(WORDS, words)) + f" {seed}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "texts"
    (place / "deep").mkdir(parents=True)
    for number in range(60):
        (place / ("deep" if number % 3 else ".") / f"{number:03d}.txt").write_text(text(number), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def stdlib_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stdlib-store")
    prepare(Source(), "bytes", root)
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Source, CorpusInfo]:
    root = tmp_path_factory.mktemp("markov-store")
    source = Source(kind="markov", vocab_size=12, order=1, tokens=12_000_000, document_tokens=300, seed=3)
    return root, source, prepare(source, "bytes", root)


def folder_source(place: Path, **options: object) -> Source:
    return make_source("folder", str(place), options)


def stream(root: Path, info: CorpusInfo, name: str = "train") -> np.ndarray:
    _, streams = builds.read_meta(root / "corpora" / info.fingerprint)
    reader = shards.StreamReader(root / "corpora" / info.fingerprint, streams[name])
    return np.concatenate(reader.shards)


def documents_of(tokens: np.ndarray, separator: int) -> list[bytes]:
    return tokens.astype(np.uint8).tobytes().split(bytes([separator]))[:-1]


# -- building --------------------------------------------------------------------------------------------------


def test_every_document_is_on_exactly_one_side_and_unchanged(folder: Path, tmp_path: Path) -> None:
    info = prepare(folder_source(folder), "bytes", tmp_path)
    train = documents_of(stream(tmp_path, info), 0xFF)
    validation = documents_of(stream(tmp_path, info, "validation"), 0xFF)
    written = [path.read_bytes() for path in folder.rglob("*.txt")]
    assert sorted(train + validation) == sorted(written)
    assert (len(train), len(validation)) == (info.train_documents, info.validation_documents)
    assert info.validation_bytes == sum(map(len, validation)) == info.validation_tokens - len(validation)
    assert validation == sorted(validation, key=lambda one: hashlib.sha256(one).digest())


def test_a_duplicate_document_is_kept_once(folder: Path, tmp_path: Path) -> None:
    before = prepare(folder_source(folder), "bytes", tmp_path / "a")
    (folder / "zzz.txt").write_bytes((folder / "deep" / "001.txt").read_bytes())
    after = prepare(folder_source(folder), "bytes", tmp_path / "b")
    assert after.duplicate_documents == 1
    assert after.fingerprint == before.fingerprint


def test_the_choice_of_validation_documents_ignores_their_order() -> None:
    generator = np.random.default_rng(0)
    hashes, sizes = generator.integers(0, 2**62, 2000), generator.integers(10, 8000, 2000)
    documents = [(int(h), f"{n}".encode(), b"x" * int(size)) for n, (h, size) in enumerate(zip(hashes, sizes))]
    one: list[bytes] = []
    other: list[bytes] = []
    kept = splits.split(documents, one.append)
    assert kept == splits.split(sorted(documents), other.append)
    assert sorted(one) == sorted(other)
    assert len(kept) + len(one) == 2000
    # They are the smallest hashes, as many as the cap lets in.
    total = np.cumsum([len(part) + 1 for _, _, part in sorted(documents)])
    assert len(kept) == np.searchsorted(total, splits.VALIDATION_BYTES, side="right") > 100


def test_validation_is_capped_and_each_document_gives_only_its_head(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text(seed, 1800) * 3}) for seed in range(1200)]
    (tmp_path / "big.jsonl").write_text("\n".join(lines), encoding="utf-8")
    info = prepare(make_source("jsonl", str(tmp_path / "big.jsonl")), "bytes", tmp_path)
    ends = np.load(tmp_path / "corpora" / info.fingerprint / "validation_ends.npy")
    most = splits.VALIDATION_DOCUMENT_BYTES + 1  # the separator
    assert splits.VALIDATION_BYTES - most <= info.validation_tokens <= splits.VALIDATION_BYTES
    assert most - 500 <= np.diff(ends, prepend=0).max() <= most  # cut at a line end
    stream(tmp_path, info, "validation").tobytes().replace(b"\xff", b"").decode()  # never cut inside a character


def test_one_big_file_is_cut_into_documents_that_add_up(tmp_path: Path) -> None:
    place = tmp_path / "book.txt"
    place.write_text("".join(text(seed) for seed in range(900)), encoding="utf-8")
    info = prepare(folder_source(place), "bytes", tmp_path)
    assert info.validation_documents >= 2
    assert info.train_documents > 30
    assert open_corpus(tmp_path, info.fingerprint).validation_windows(512) >= 1


@settings(deadline=None, max_examples=60, derandomize=True)
@given(content=st.text(alphabet="ab\nñ漢😀", max_size=300), limit=st.integers(8, 64))
def test_pieces_add_up_and_never_split_a_character(content: str, limit: int) -> None:
    import io

    found = list(sources.pieces(io.BytesIO(content.encode()), limit))
    assert b"".join(found) == content.encode()
    assert all(0 < len(piece) <= limit for piece in found)
    assert "".join(piece.decode() for piece in found) == content


def test_the_standard_library_is_people_s_code_only(stdlib_root: Path) -> None:
    info = prepare(Source(), "bytes", stdlib_root)
    assert info.train_tokens > 5_000_000
    assert info.validation_documents > 30
    root = Path(os.__file__).parent
    found = {file.relative_to(root).as_posix() for file in sources.source_files(Source())}
    assert {"argparse.py", "json/decoder.py"} <= found
    assert not [name for name in found if "/test" in name or name.startswith(("test/", "_sysconfigdata", "site-"))]
    everything = stream(stdlib_root, info).tobytes()
    assert b"Autogenerated by Sphinx" not in everything
    assert b"decoding_table = (" not in everything


def test_a_second_prepare_finds_the_corpus_without_building(stdlib_root: Path) -> None:
    phases: list[str] = []
    begun = time.perf_counter()
    info = prepare(Source(), "bytes", stdlib_root, progress=lambda phase, _: phases.append(phase))
    assert time.perf_counter() - begun < 2.0  # some 20 ms; building would report phases
    assert phases == []
    assert info.description.startswith("pystdlib, Python 3.")


def test_the_same_text_gives_the_same_fingerprint_anywhere(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "renamed"
    folder_info = prepare(folder_source(folder), "bytes", tmp_path / "a")
    folder.rename(elsewhere)
    assert prepare(folder_source(elsewhere), "bytes", tmp_path / "b").fingerprint == folder_info.fingerprint
    assert prepare(folder_source(elsewhere), "bpe:300", tmp_path / "b").fingerprint != folder_info.fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_tables_of_text_give_the_same_corpus_as_the_text(kind: str, tmp_path: Path, monkeypatch) -> None:
    reached: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: reached.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: reached.append(address))
    rows = [text(seed) for seed in range(50)]
    place = tmp_path / "rows"
    place.mkdir()
    for number, row in enumerate(rows):
        (place / f"{number:03d}.txt").write_text(row, encoding="utf-8")
    reference = prepare(folder_source(place), "bytes", tmp_path / "store")
    table = tmp_path / "table"
    table.mkdir()
    if kind == "jsonl":
        lines = [json.dumps({"body": row, "id": 1}) for row in [*rows, "", "  \n"]]
        (table / "rows.jsonl").write_text("\n\n".join(lines))
    else:
        columns = {"id": range(52), "body": [*rows, None, " "]}
        pyarrow.parquet.write_table(pyarrow.table(columns), table / "rows.parquet", row_group_size=7)
    info = prepare(make_source(kind, str(table), {"text_field": "body"}), "bytes", tmp_path / "store")
    assert info.fingerprint == reference.fingerprint
    assert len(list((tmp_path / "store" / "corpora" / info.fingerprint / "sources").iterdir())) == 2
    assert reached == []  # a dataset folder is local, and so is all that is read of it


def test_max_bytes_bounds_what_is_read(folder: Path, tmp_path: Path) -> None:
    info = prepare(folder_source(folder, max_bytes=20_000), "bytes", tmp_path)
    assert 20_000 <= info.train_tokens + info.validation_tokens < 22_000


# -- tokenizers ------------------------------------------------------------------------------------------------


def test_bpe_is_deterministic_and_loses_nothing(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    (folder / "trap.txt").write_text("this <|endoftext|> is text", encoding="utf-8")
    one = prepare(folder_source(folder), "bpe:320", tmp_path / "a")
    two = prepare(folder_source(folder), "bpe:320", tmp_path / "b")
    raw = prepare(folder_source(folder), "bytes", tmp_path / "a")
    assert one == two
    assert one.vocab_size == 320
    assert one.tokenizer.startswith("bpe-320-")
    # The same split and the same text: only the tokens differ.
    assert (one.validation_bytes, one.train_documents) == (raw.validation_bytes, raw.train_documents)
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "corpora" / one.fingerprint / "tokenizer.json"))
    for side in ("train", "validation"):
        tokens = stream(tmp_path / "a", one, side)
        assert tokens.dtype == np.uint16
        assert tokens[-1] == one.separator
        found = np.split(tokens, np.flatnonzero(tokens == one.separator) + 1)[:-1]
        decoded = [tokenizer.decode(list(ids[:-1])).encode() for ids in found]
        assert decoded == documents_of(stream(tmp_path / "a", raw, side), 0xFF)


def save_tokenizer(place: Path, eos: object) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    place.mkdir()
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: n + 2 for n, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))


def test_a_local_tokenizer_separates_with_its_end_of_text_token(folder: Path, tmp_path: Path) -> None:
    (folder / "trap.txt").write_text("red </s> blue", encoding="utf-8")
    save_tokenizer(tmp_path / "words", {"content": "</s>"})
    info = prepare(folder_source(folder), str(tmp_path / "words"), tmp_path)
    assert (info.separator, info.vocab_size) == (1, len(WORDS) + 2)
    documents = info.train_documents + info.validation_documents
    ends = sum(int((stream(tmp_path, info, side) == 1).sum()) for side in ("train", "validation"))
    assert ends == documents == 61
    by_file = prepare(folder_source(folder), str(tmp_path / "words" / "tokenizer.json"), tmp_path)
    assert by_file.fingerprint == info.fingerprint


@pytest.mark.parametrize(
    ("eos", "complaint"), [(None, "declares no end-of-text token"), ("<no>", "does not contain"), ("red", "inside")]
)
def test_a_tokenizer_that_cannot_separate_is_refused(eos, complaint, folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "words", eos)
    with pytest.raises(InputError, match=complaint):
        prepare(folder_source(folder), str(tmp_path / "words"), tmp_path)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("byte", 'did you mean "bytes"'),
        ("gpt2", "not downloaded"),
        ("bpe:256", "from 257"),
        ("bpe:many", "from 257"),
        ("bpe:9000", "for only"),
        (".", "no tokenizer.json"),
    ],
)
def test_bad_tokenizers_are_named(spec: str, complaint: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=complaint):
        prepare(folder_source(folder), spec, tmp_path)
    assert not list(tmp_path.glob("corpora/.building-*"))


# -- reading ---------------------------------------------------------------------------------------------------


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


# -- the synthetic source --------------------------------------------------------------------------------------


def test_the_true_model_of_a_markov_source_attains_its_entropy_rate(drawn) -> None:
    root, source, info = drawn
    chain = markov.draw_chain(source)
    end = 1 / source.document_tokens
    # The whole stream as a chain over symbols and separator: the row of the separator is a fresh start.
    model = np.zeros((13, 13))
    model[:12, :12] = (1 - end) * chain.transition
    model[:12, 12] = end
    model[12, :12] = chain.stationary
    for side in ("train", "validation"):
        tokens = stream(root, info, side).astype(int)
        loss = -np.log(model[tokens[:-1], tokens[1:]])
        batches = loss[: len(loss) // 400 * 400].reshape(400, -1).mean(axis=1)
        error = batches.std(ddof=1) / math.sqrt(400)
        assert abs(loss.mean() - info.entropy_rate) < 4 * error
        assert error < 2e-3
    assert info.train_tokens + info.validation_tokens == pytest.approx(12_000_000 * (1 + end), rel=0.001)
    assert info.validation_tokens <= splits.VALIDATION_BYTES


@pytest.mark.parametrize("size", [2, 3])
def test_the_entropy_rate_of_a_higher_order_is_exact(size: int) -> None:
    source = make_source(
        "markov", None, {"vocab_size": size, "order": 2, "document_tokens": 4, "tokens": 10, "seed": 5}
    )
    chain = markov.draw_chain(source)
    # By brute force: the expected -log p of a whole document, over all documents of up to 10 symbols and the tail.
    end = 0.25
    rate = float(chain.stationary @ -(chain.transition * np.log(chain.transition)).sum(axis=1))
    nats, length = 0.0, 0.0
    first = chain.stationary.reshape(size, size)
    paths = {(a,): first[a].sum() for a in range(size)}
    for n in range(1, 11):
        nats += sum(-p * (1 - end) ** (n - 1) * end * math.log(p * (1 - end) ** (n - 1) * end) for p in paths.values())
        length += (n + 1) * (1 - end) ** (n - 1) * end
        tail = paths
        if n == 1:
            paths = {(a, b): first[a, b] for a in range(size) for b in range(size)}
        else:
            paths = {
                (*path, c): p * chain.transition[path[-2] * size + path[-1], c]
                for path, p in paths.items()
                for c in range(size)
            }
    entropy = -sum(p * math.log(p) for p in tail.values())  # of ten symbols; each further one adds `rate`
    for n in range(11, 400):
        weight = (1 - end) ** (n - 1) * end
        nats += weight * (entropy + (n - 10) * rate - math.log(weight))
        length += weight * (n + 1)
    assert markov.entropy_rate(source, chain) == pytest.approx(nats / length, rel=1e-9)


def test_a_markov_source_is_a_function_of_its_options(tmp_path: Path) -> None:
    options = {"vocab_size": 8, "order": 2, "tokens": 30_000}
    source = make_source("markov", None, options)
    one = prepare(source, "bytes", tmp_path / "a")
    assert one == prepare(source, "bytes", tmp_path / "b")
    other = prepare(make_source("markov", None, {**options, "seed": 1}), "bytes", tmp_path / "a")
    assert other.fingerprint != one.fingerprint
    with pytest.raises(InputError, match="must be bytes"):
        prepare(source, "bpe:300", tmp_path)
    with pytest.raises(InputError, match="probabilities"):
        prepare(make_source("markov", None, {"vocab_size": 5000, "order": 3}), "bytes", tmp_path)


# -- pinning and the store -------------------------------------------------------------------------------------


def test_a_changed_source_is_refused_until_it_is_accepted(folder: Path, tmp_path: Path) -> None:
    source = folder_source(folder)
    pinned = prepare(source, "bytes", tmp_path).fingerprint
    assert prepare(source, "bytes", tmp_path, pinned=pinned).fingerprint == pinned
    (folder / "new.txt").write_text("one more document\n")
    with pytest.raises(InputError, match="--accept-corpus") as refusal:
        prepare(source, "bytes", tmp_path, pinned=pinned)
    new = prepare(source, "bytes", tmp_path, pinned=pinned, accept=True).fingerprint
    assert new != pinned
    for part in (new, pinned, str(folder), f"fingerprint: {new}"):
        assert part in str(refusal.value)
    # A touched file with the old content is no change.
    (folder / "new.txt").unlink()
    os.utime(folder / "000.txt")
    assert prepare(source, "bytes", tmp_path, pinned=pinned).fingerprint == pinned


def test_pinned_shards_are_the_corpus_where_the_source_is_not(folder: Path, tmp_path: Path) -> None:
    pinned = prepare(folder_source(folder), "bpe:300", tmp_path)
    folder.rename(tmp_path / "gone")
    assert prepare(folder_source(folder), "bpe:300", tmp_path, pinned=pinned.fingerprint) == pinned
    with pytest.raises(InputError, match="asks for the tokenizer"):
        prepare(folder_source(folder), "bytes", tmp_path, pinned=pinned.fingerprint)
    with pytest.raises(InputError, match="does not exist"):
        prepare(folder_source(folder), "bpe:300", tmp_path / "other", pinned=pinned.fingerprint)


@pytest.mark.parametrize("damage", ["short", "missing", "meta"])
def test_damaged_shards_are_noticed(damage: str, folder: Path, tmp_path: Path) -> None:
    source = folder_source(folder)
    info = prepare(source, "bytes", tmp_path)
    place = tmp_path / "corpora" / info.fingerprint
    if damage == "short":
        os.truncate(place / "train-00000.bin", 100)
    elif damage == "missing":
        (place / "validation-00000.bin").unlink()
    else:
        (place / "meta.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        open_corpus(tmp_path, info.fingerprint)
    with pytest.raises(InputError, match="is damaged"):
        prepare(source, "bytes", tmp_path)


def build_at_once(place: str, root: str, barrier, found) -> None:
    barrier.wait()
    found.put(prepare(Source(kind="folder", path=place), "bytes", Path(root)).fingerprint)


def test_builders_at_once_agree_and_leave_one_corpus(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(4), context.Queue()
    builders = [
        context.Process(target=build_at_once, args=(str(folder), str(tmp_path), barrier, found)) for _ in range(4)
    ]
    for builder in builders:
        builder.start()
    fingerprints = {found.get(timeout=30) for _ in builders}
    for builder in builders:
        builder.join()
    assert len(fingerprints) == 1
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == list(fingerprints)


def test_a_killed_builder_leaves_nothing_that_is_seen_and_is_cleaned_up(folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from sweeps.corpora import *;"
        "prepare(Source(kind='folder', path=sys.argv[1]), 'bpe:300', Path(sys.argv[2]),"
        "progress=lambda phase, _: phase == 'tokenise' and os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path)], check=False)
    assert killed.returncode == -9
    (left,) = (tmp_path / "corpora").iterdir()
    assert left.name.startswith(".building-")
    prepare(folder_source(folder), "bpe:300", tmp_path)
    assert left.exists()  # it may still be alive
    for path in [*left.rglob("*"), left]:
        os.utime(path, (1, 1))
    info = prepare(folder_source(folder), "bytes", tmp_path)
    assert not left.exists()
    assert open_corpus(tmp_path, info.fingerprint).info == info


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (2**21, before[1])
        )  # no file above 2 MB: write fails as on a full disk
        with pytest.raises(InputError, match="cannot write the corpus to") as refusal:
            prepare(Source(), "bytes", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in str(refusal.value)
    assert list((tmp_path / "corpora").iterdir()) == []


def test_a_store_that_cannot_be_written_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the corpus to"):
        prepare(folder_source(folder), "bytes", tmp_path / "file")


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_inside_is_named_not_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "deep").chmod(0)
    try:
        with pytest.raises(InputError, match=r"cannot read the corpus folder .*deep"):
            prepare(folder_source(folder), "bytes", tmp_path)
    finally:
        (folder / "deep").chmod(0o755)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "name", "content", "complaint"),
    [
        ("folder", "a.txt", b"good\n" * 70_000 + b"\xe9t\xe9", r"a\.txt is not UTF-8 text: byte 350000 is 0xe9"),
        ("folder", "a.txt", b"", "0 distinct non-empty documents"),
        ("folder", "a.txt", b"too small", "1 distinct non-empty documents"),
        ("folder", ".hidden.txt", b"text", "no files that match"),
        ("jsonl", "a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not a line of JSON"),
        (
            "jsonl",
            "a.jsonl",
            b'{"text": "x"}\n\n{"txt": "x", "id": 1}',
            r"a\.jsonl:3: no field .text. .*found: txt, id",
        ),
        ("jsonl", "a.jsonl", b'["x"]', r"a\.jsonl:1: a list, not a JSON object"),
        ("jsonl", "a.jsonl", b'{"text": 3}', "holds a int, not text"),
        ("jsonl", "a.jsonl", b'{"text": "\\ud800"}', "surrogate"),
        ("parquet", "a.parquet", b"nothing of the kind", "cannot be read as Parquet"),
        ("parquet", "a.txt", b"x", r"no files that match \*\*/\*\.parquet"),
    ],
)
def test_bad_content_names_the_place(kind, name, content, complaint, tmp_path: Path) -> None:
    write(tmp_path / "data" / name, content)
    with pytest.raises(InputError, match=complaint):
        prepare(make_source(kind, "data", base_dir=tmp_path), "bytes", tmp_path)


def test_a_missing_parquet_column_lists_those_found(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match='no column "text"; found: body, id'):
        prepare(make_source("parquet", "a.parquet", base_dir=tmp_path), "bytes", tmp_path)


def test_a_dataset_that_cannot_be_opened_is_said(folder: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match="cannot open the dataset"):
        prepare(make_source("hf", str(folder), {"split": "nosuch"}), "bytes", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install"):
        prepare(make_source("hf", str(folder)), "bytes", tmp_path)


@pytest.mark.parametrize(
    ("kind", "path", "options", "complaint"),
    [
        ("pystdlb", None, {}, 'did you mean "pystdlib"'),
        ("folder", None, {}, "needs a path"),
        ("pystdlib", "x", {}, "takes no path"),
        ("jsonl", "x", {"textfield": "body"}, 'did you mean "text_field"'),
        ("markov", None, {"order": "two"}, "must be of type int"),
        ("markov", None, {"vocab_size": 1}, "from 2 to 65535"),
        ("folder", "x", {"max_bytes": 0}, "must be positive"),
        ("folder", "nosuch", {}, "does not exist"),
        ("folder", ".", {"glob": "/abs"}, "not a relative pattern"),
    ],
)
def test_bad_declarations_are_named(kind, path, options, complaint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=complaint):
        prepare(make_source(kind, path, options, base_dir=tmp_path), "bytes", tmp_path)
    assert make_source("hf:org/name").path == "org/name"


def test_importing_corpora_needs_numpy_alone() -> None:
    code = (
        "import sys; import sweeps.corpora;"
        "print([m for m in ('torch','transformers','tokenizers','datasets','pyarrow','ray') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
