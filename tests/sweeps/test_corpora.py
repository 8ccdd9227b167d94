"""Corpora: what is read, how it is split, pinned and stored; and what is said of bad input."""

import hashlib
import json
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
from texts import documents_of, folder_source, stream, text

from sweeps import sources, splits
from sweeps.corpora import Source, make_source, open_corpus, prepare
from sweeps.errors import InputError


@pytest.fixture(scope="module")
def stdlib_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stdlib-store")
    prepare(Source(), "bytes", root)
    return root


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


def test_many_copies_of_a_file_are_the_corpus_of_one(tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    content = "".join(text(seed) for seed in range(100))
    for place, copies in ((one, 1), (many, 40)):
        place.mkdir()
        for number in range(copies):
            (place / f"{number}.txt").write_text(content, encoding="utf-8")
    found = [prepare(folder_source(place), "bytes", tmp_path / f"{place.name}-store") for place in (one, many)]
    assert found[0].fingerprint == found[1].fingerprint
    assert [info.duplicate_documents for info in found] == [0, 39]


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


@pytest.mark.parametrize("copy", ["{}.bak", ".{}", "copy of {}"])
def test_somebodys_copy_of_a_corpus_is_not_taken_for_it(copy: str, folder: Path, tmp_path: Path) -> None:
    info = prepare(folder_source(folder), "bytes", tmp_path)
    place = tmp_path / "corpora" / info.fingerprint
    place.rename(place.with_name(copy.format(place.name)))
    assert prepare(folder_source(folder), "bytes", tmp_path) == info
    assert open_corpus(tmp_path, info.fingerprint).info == info


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
    fingerprints = {found.get(timeout=120) for _ in builders}
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
        ("folder", "a.txt", b"too small", "1 distinct non-empty document;"),
        ("folder", ".hidden.txt", b"text", "no files that match"),
        ("jsonl", "a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not a line of JSON"),
        ("jsonl", "a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, r"a\.jsonl:2: not a line of JSON"),
        (
            "jsonl",
            "a.jsonl",
            b'{"text": "x"}\n\n{"txt": "x", "id": 1}',
            r"a\.jsonl:3: no field .text. .*found: txt, id",
        ),
        ("jsonl", "a.jsonl", b'["x"]', r"a\.jsonl:1: a list, not a JSON object"),
        ("jsonl", "a.jsonl", b'{"text": 3}', "holds 3, not text"),
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
        ("markov", None, {"seed": -1}, "seed must be from 0 to"),
        ("folder", "x", {"max_bytes": 0}, "must be from 1 to"),
        ("folder", "x", {"max_bytes": True}, "must be of type int, found True"),
        ("folder", "x", {"max_bytes": 1.5}, "must be of type int, found 1.5"),
        ("folder", "x", {"tokens": 9}, "tokens is of markov and would change nothing here; folder has glob, max_bytes"),
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
