"""Where documents come from: the standard library, text files, JSONL, Parquet or a Hugging Face dataset.

`documents(source)` streams UTF-8 documents in a fixed order and holds one of them at a time. Everything wrong with the
input (no such path, not UTF-8, no such field) is an InputError that names the place. The order of the documents is
that of their relative POSIX paths, and inside a file that of the file, so a source gives the same stream anywhere.
A folder is read for what lies in it: a link in it that leads out, to a key or to somebody's letters, is an error, and
so is a dataset folder whose card names files elsewhere.
"""

import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from sweeps.errors import InputError, about, nearest
from sweeps.paths import inside

DOCUMENT_BYTES = 256 * 1024
"""A longer document is cut into consecutive documents (at a line end where there is one)."""

KINDS = ("pystdlib", "folder", "jsonl", "parquet", "hf", "markov")

_TEXTS = ("text_field", "max_bytes")
OPTIONS: dict[str, tuple[str, ...]] = {
    "pystdlib": ("max_bytes",),
    "folder": ("glob", "max_bytes"),
    "jsonl": ("glob", *_TEXTS),
    "parquet": ("glob", *_TEXTS),
    "hf": ("split", "subset", "revision", *_TEXTS),
    "markov": ("vocab_size", "order", "tokens", "seed", "document_tokens"),
}
"""What each kind of source reads of a `Source`, besides its path."""
_LIMITS = {
    "max_bytes": (1, 2**63 - 1),
    "vocab_size": (2, 65_535),
    "order": (1, 8),
    "tokens": (1, 2**40),
    "seed": (0, 2**63 - 1),
    "document_tokens": (2, 2**16),
}
"""Of the options that are whole numbers: least and most."""

# What of the standard library is left out, and why: tests are mostly literals made to be odd; installed packages and
# files written when Python was built or set up differ between machines; generated tables are not written by people,
# and pydoc_data/topics.py alone would be 7% of the text.
SKIPPED_FOLDERS = re.compile(r"tests?|idle_test|site-packages|dist-packages|lib-dynload|config-.*|__pycache__|\..*")
SKIPPED_FILES = re.compile(r"_sysconfigdata.*|sitecustomize\.py|usercustomize\.py|\..*")
GENERATED = re.compile(rb"(auto-?|automatically |file is )generated|do not edit|mapping codec", re.IGNORECASE)
GENERATED_WITHIN = 200  # bytes: a generated file says so at its top; further down the word is about something else


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a corpus is made from. Fields that do not concern a kind are left at their defaults."""

    kind: str = "pystdlib"
    """pystdlib | folder | jsonl | parquet | hf | markov"""
    path: str | None = None
    """folder, jsonl, parquet: a file or a folder; hf: a dataset's name or a local dataset folder."""
    glob: str = "**/*"
    """Which regular files of a folder are taken; hidden files and folders never are."""
    text_field: str = "text"
    """jsonl, parquet, hf: the field that holds the text."""
    split: str = "train"
    """hf: which split of the dataset is read (validation is split off by Escala, not by the dataset)."""
    subset: str | None = None
    """hf: the configuration name of the dataset."""
    revision: str | None = None
    """hf: the commit or tag of a dataset on the Hub."""
    max_bytes: int | None = None
    """Stop reading once so many bytes of text were seen (None: read all)."""
    vocab_size: int = 64
    """markov: number of symbols; the separator is one more."""
    order: int = 1
    """markov: how many preceding symbols the next one depends on."""
    tokens: int = 10_000_000
    """markov: symbols to draw, about."""
    seed: int = 0
    """markov: seed of the transition matrix and of the draw."""
    document_tokens: int = 512
    """markov: mean length of a document (lengths are geometric)."""

    @property
    def name(self) -> str:
        """A short name for tables."""
        if self.kind == "markov":
            return f"markov-{self.vocab_size}-{self.order}"
        return f"hf:{self.path}" if self.kind == "hf" else Path(self.path).name if self.path else self.kind


def make_source(
    kind: str, path: str | None = None, options: Mapping[str, Any] | None = None, *, base_dir: Path | None = None
) -> Source:
    """A checked Source from what a study file declares.

    `kind` may be "hf:<name>". A relative path is taken from `base_dir`. Raises InputError for an unknown kind or
    option, a path that is missing or not wanted, and an option of the wrong type or out of range.
    """
    if kind.startswith("hf:") and path is None:
        kind, path = "hf", kind[3:]
    if kind not in KINDS:
        raise InputError(f'unknown corpus source "{kind}"{nearest(kind, KINDS)}; known: {", ".join(KINDS)}')
    if kind in ("pystdlib", "markov") and path:
        raise InputError(f'the corpus source {kind} takes no path, but one is given: "{path}"')
    if kind not in ("pystdlib", "markov") and not path:
        raise InputError(f"the corpus source {kind} needs a path")
    source = Source(kind=kind, path=path, **{key: check_option(kind, key, one) for key, one in (options or {}).items()})
    if path and base_dir and (kind != "hf" or (base_dir / path).exists()):
        source = replace(source, path=str(base_dir / Path(path).expanduser()))
    return source


def check_option(kind: str, name: str, value: Any) -> Any:
    """An option as a source of this kind takes it; a whole number may be written as 1e6.

    Raises InputError for an unknown one, one of another kind, which would change nothing, a wrong type or range.
    """
    allowed = OPTIONS[kind]
    if name not in allowed:
        others = [other for other, names in OPTIONS.items() if name in names]
        known = f"{kind} has {', '.join(allowed)}"
        if others:
            raise InputError(
                f"corpus option {name} is of {' and '.join(others)} and would change nothing here; {known}"
            )
        raise InputError(f'unknown corpus option "{name}"{nearest(name, allowed)}; {known}')
    if name not in _LIMITS:
        if not isinstance(value, str):
            raise InputError(f"corpus option {name} must be of type str, found {value!r}")
        return value
    number = value
    if isinstance(value, str | float):
        with suppress(ValueError):
            number = int(float(value)) if float(value).is_integer() else value
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError(f"corpus option {name} must be of type int, found {value!r}")
    low, high = _LIMITS[name]
    if not low <= number <= high:
        raise InputError(f"corpus option {name} must be from {low} to {high}, found {number}")
    return number


def is_here(source: Source) -> bool:
    """Whether this machine holds the source itself; a dataset on the Hub is not here, and looking is free."""
    if source.kind == "markov":
        return True
    if source.kind == "pystdlib":
        return _stdlib().is_dir()
    return source.path is not None and Path(source.path).expanduser().exists()


def describe(source: Source) -> str:
    """One phrase for messages and tables."""
    if source.kind == "pystdlib":
        return f"pystdlib, Python {platform.python_version()}"
    if source.kind == "markov":
        return f"markov of order {source.order} over {source.vocab_size} symbols, seed {source.seed}"
    return f"hf:{source.path}" if source.kind == "hf" else f"{source.kind} {source.path}"


def signature(source: Source) -> str:
    """16 hex digits that stay while the source looks unchanged: options, names, sizes and times of its files.

    Cheap (nothing is read). Equal signatures save a new tokenisation; they never define a corpus.
    """
    seen: list[Any] = [asdict(source)]
    if source.kind == "hf" and is_here(source):
        root = Path(source.path or "").expanduser().resolve()
        seen.append(str(root))
        seen += [_stamp(file) for file in sorted(root.rglob("*") if root.is_dir() else [root]) if file.is_file()]
    elif source.kind not in ("hf", "markov"):
        listed = source_files(source)
        seen.append(str(listed[0].resolve()))
        seen += [_stamp(file) for file in listed]
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


@about("corpus", "path")
def source_files(source: Source) -> list[Path]:
    """The files of a source, sorted by relative POSIX path. Raises InputError where there are none."""
    if source.kind == "pystdlib":
        root = _stdlib()
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not SKIPPED_FOLDERS.fullmatch(name)]
            found += [
                Path(folder, name) for name in names if name.endswith(".py") and not SKIPPED_FILES.fullmatch(name)
            ]
        if not found:
            raise InputError(f"no source text of Python's standard library at {root}; name another corpus")
        return sorted(found, key=lambda file: file.relative_to(root).as_posix())
    root = Path(source.path or "").expanduser()
    if root.is_file():
        return [root]
    if not root.exists():
        raise InputError(f'the corpus path {root} does not exist (source "{source.kind}")')
    pattern = source.glob
    if pattern == "**/*" and source.kind in ("jsonl", "parquet"):
        pattern = f"**/*.{source.kind}"
    try:
        _check_readable(root)
        found = [
            file
            for file in root.glob(pattern)
            if not any(part.startswith(".") for part in file.relative_to(root).parts) and file.is_file()
        ]
    except (ValueError, NotImplementedError) as error:
        raise InputError(f'corpus option glob "{pattern}" is not a relative pattern like **/*.txt') from error
    except OSError as error:
        raise InputError(f"cannot read the corpus folder {error.filename or root}: {error.strerror}") from error
    if not found:
        raise InputError(f"the corpus folder {root} has no files that match {pattern} (hidden files are skipped)")
    for file in found:
        inside(root, file, "the corpus folder")
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def documents(source: Source) -> Iterator[tuple[bytes, float]]:
    """Documents as UTF-8 text of 1 to DOCUMENT_BYTES bytes, each with the fraction of the source read so far.

    Documents of nothing but white space are dropped. Raises InputError that names the file and the place.
    """
    readers = {"pystdlib": _from_text, "folder": _from_text, "jsonl": _from_jsonl, "parquet": _from_parquet}
    seen = 0
    with about("corpus", "path"):
        for document, fraction in readers.get(source.kind, _from_datasets)(source):
            if not document.strip():
                continue
            yield document, max(fraction, seen / source.max_bytes) if source.max_bytes else fraction
            seen += len(document)
            if source.max_bytes and seen >= source.max_bytes:
                return


def pieces(handle: BinaryIO, limit: int) -> Iterator[bytes]:
    """Cut a byte stream into consecutive pieces of at most `limit` bytes, never inside a UTF-8 character.

    A cut falls after the last line end of the second half of a piece where there is one.
    """
    rest = b""
    while True:
        buffer = rest + handle.read(limit + 1 - len(rest))
        if len(buffer) <= limit:
            if buffer:
                yield buffer
            return
        cut = buffer.rfind(b"\n", limit // 2, limit) + 1 or limit
        if cut == limit:  # step back to the start of a character: at most three continuation bytes precede it
            cut = next((at for at in range(limit, limit - 4, -1) if buffer[at] & 0xC0 != 0x80), limit)
        yield buffer[:cut]
        rest = buffer[cut:]


# -- readers: each yields (document, fraction read) ----------------------------------------------------------------


def _from_text(source: Source) -> Iterator[tuple[bytes, float]]:
    files = source_files(source)
    total, done = sum(file.stat().st_size for file in files) or 1, 0
    for file in files:
        at = 0
        with _reading(file), file.open("rb") as handle:
            if source.kind == "pystdlib":
                if GENERATED.search(handle.read(GENERATED_WITHIN)):
                    continue
                handle.seek(0)
            for piece in pieces(handle, DOCUMENT_BYTES):
                try:
                    piece.decode()
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{file} is not UTF-8 text: byte {at + error.start} is 0x{piece[error.start]:02x}. "
                        "Convert it to UTF-8, or leave it out with the corpus option glob (such as **/*.txt)."
                    ) from error
                at += len(piece)
                done += len(piece)
                yield piece, min(1.0, done / total)


def _from_jsonl(source: Source) -> Iterator[tuple[bytes, float]]:
    files = source_files(source)
    total, done = sum(file.stat().st_size for file in files) or 1, 0
    for file in files:
        with _reading(file), file.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                done += len(line)
                if not line.strip():
                    continue
                place = f"{file}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
                    raise InputError(f"{place}: not a line of JSON in UTF-8 ({error})") from error
                if not isinstance(row, dict):
                    raise InputError(f"{place}: a {type(row).__name__}, not a JSON object with a text field")
                yield from ((piece, done / total) for piece in _field(row, source.text_field, place))


def _from_parquet(source: Source) -> Iterator[tuple[bytes, float]]:
    import pyarrow
    import pyarrow.parquet

    files = source_files(source)
    for index, file in enumerate(files):
        with _reading(file), file.open("rb") as handle:
            try:
                table = pyarrow.parquet.ParquetFile(handle)
                if source.text_field not in table.schema_arrow.names:
                    raise InputError(_no_field(str(file), "column", source.text_field, table.schema_arrow.names))
                rows, done = table.metadata.num_rows or 1, 0
                for batch in table.iter_batches(batch_size=256, columns=[source.text_field]):
                    for row in batch.to_pylist():
                        done += 1
                        for piece in _field(row, source.text_field, f"{file}, row {done}"):
                            yield piece, (index + done / rows) / len(files)
            except pyarrow.ArrowException as error:
                raise InputError(f"{file} cannot be read as Parquet: {error}") from error


def _from_datasets(source: Source) -> Iterator[tuple[bytes, float]]:
    if importlib.util.find_spec("datasets") is None:
        raise InputError(
            f'the corpus hf:{source.path} needs the package "datasets", which is not installed. In the repository: '
            "pip install -c constraints.txt -e '.[datasets]'"
        )
    import datasets

    place = f"hf:{source.path} (split {source.split})"
    name = str(Path(source.path or "").expanduser()) if is_here(source) else str(source.path)
    try:
        builder = datasets.load_dataset_builder(name, source.subset, revision=source.revision)
        _check_data_files(builder, Path(name) if is_here(source) else None, place)
        rows = iter(builder.as_streaming_dataset(split=source.split))
    except InputError:
        raise
    except Exception as error:  # datasets raises errors of many libraries, down to the network's
        raise InputError(f"cannot open the dataset {place}: {type(error).__name__}: {error}") from error
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise InputError(f"{place}: reading failed after row {number}: {type(error).__name__}: {error}") from error
        if row is None:
            return
        number += 1
        yield from ((piece, 0.0) for piece in _field(row, source.text_field, f"{place}, row {number}"))


def _check_data_files(builder: Any, folder: Path | None, place: str) -> None:
    """Raise InputError where a dataset's card names files that are not its own: outside its folder, or, of a dataset
    on the Hub, on this machine."""
    named = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    for file in named:
        last = file.rpartition("::")[2]  # of zip://inner::outer
        remote = "://" in last and not last.startswith(("file://", "local://"))
        if folder is None and not remote:
            raise InputError(f"{place}: its card names a file of this machine, {last}. It is not read.")
        if folder is not None and remote:
            raise InputError(f"{place}: its card names a file elsewhere, {last}. Only what lies in the folder is read.")
        if folder is not None:
            root = folder if folder.is_dir() else folder.parent
            inside(root, last.removeprefix("file://").removeprefix("local://"), place)


def _field(row: Mapping[str, Any], field: str, place: str) -> Iterator[bytes]:
    """The text of one row, in pieces. Null and empty texts give none."""
    if field not in row:
        raise InputError(_no_field(place, "field", field, row))
    text = row[field]
    if text is None:
        return
    if not isinstance(text, str):
        raise InputError(f'{place}: the field "{field}" holds {str(text)[:40]}, not text')
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: character {error.start} is half of a surrogate pair, which is no text") from error
    yield from pieces(io.BytesIO(encoded), DOCUMENT_BYTES)


def _check_readable(root: Path) -> None:
    """Raise the OSError of a folder that cannot be listed: pathlib's glob leaves its files out without a word."""

    def fail(error: OSError) -> None:
        raise error

    for _, folders, _ in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]


def _no_field(place: str, what: str, field: str, found: Any) -> str:
    names = [str(name) for name in found]
    listed = ", ".join(names[:20]) or "none"
    return (
        f'{place}: no {what} "{field}"{nearest(field, names)}; found: {listed}. '
        "Name it with the corpus option text_field."
    )


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """An OSError here is the source's fault; anywhere else in a build it is the store's."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error


def _stamp(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))
