"""How a corpus gets into the store: written beside its place, synced, renamed, so that no reader sees half of one.

Two builders at once do the work twice and the second to finish discards its own. Whatever fails, the folder of the
build is removed; one that a killed builder left is removed by a later build.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sweeps import markov, shards, sources, splits, tokenizers
from sweeps.errors import InputError
from sweeps.sources import Source
from sweeps.store import CORPUS_NAME
from sweeps.units import plural

FORMAT = 1
"""Raise it when the same source would give other files: signatures of older builds are then not found again."""
DEAD_AFTER_SECONDS = 24 * 3600.0
"""A build folder that nothing was written to for so long was left by a killed builder."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class CorpusInfo:
    """What a study needs to know of a corpus."""

    fingerprint: str
    """16 hex digits of the SHA-256 over tokens, document boundaries, split and tokenizer identity."""
    name: str
    tokenizer: str
    """bytes, bpe-<vocab>-<hash>, <folder>-<vocab>-<hash> or markov-<symbols>."""
    vocab_size: int
    """The separator included."""
    separator: int
    train_tokens: int
    """Separators included, as everywhere below."""
    train_documents: int
    validation_tokens: int
    validation_documents: int
    validation_bytes: int
    """UTF-8 bytes of the kept parts of the validation documents, without separators (markov: one per symbol)."""
    duplicate_documents: int
    """Exact duplicates that were dropped."""
    entropy_rate: float | None
    """markov: nats per token of the stream, separators included; the loss of a perfect model."""
    description: str
    altered_documents: int = 0
    """Validation documents that their tokens do not give back: part of their text is predicted by nobody."""

    def windows(self, context: int) -> int:
        """Training windows in an epoch. Raises InputError where the context is too long for the corpus.

        One window less than fit, so that the grid can shift by up to a window from epoch to epoch.
        """
        count = self.train_tokens // context - 1 if context > 0 else 0
        if count < 1:
            raise InputError(
                f"a context of {context:,} tokens does not fit the corpus {self.name}: its training split has "
                f"{self.train_tokens:,} tokens and must have at least two contexts. Shorten the context or use a "
                "larger corpus."
            )
        return count

    def epochs(self, tokens: int, context: int) -> float:
        """How often `tokens` training tokens go through the corpus. Raises InputError as `windows` does."""
        return tokens / (self.windows(context) * context)

    def validation_windows(self, context: int) -> int:
        """Full, non-overlapping windows of the validation stream. Raises InputError where there is none."""
        count = (self.validation_tokens - 1) // context if context > 0 else 0
        if count < 1:
            raise InputError(
                f"a context of {context:,} tokens does not fit the validation split of the corpus {self.name}, "
                f"which has {self.validation_tokens:,} tokens. Shorten the context or use a larger corpus."
            )
        return count

    def bits_per_byte(self, loss: float) -> float | None:
        """Validation loss in nats per token to bits per byte of validation text; None where the tokens lose some of
        it: bytes that nobody predicts would count as predicted for nothing."""
        if self.altered_documents:
            return None
        return loss * self.validation_tokens / self.validation_bytes / math.log(2)


def build(corpora: Path, source: Source, tokenizer: str, signature: str, progress: Progress | None) -> str:
    """Build a corpus into the folder `corpora`, note the signature with it and return its fingerprint."""
    kind = tokenizers.tokenizer_kind(tokenizer)
    with _building(corpora) as folder:
        fingerprint = _write(source, tokenizer, kind, folder, _throttled(progress))
        _publish(folder, corpora / fingerprint, signature)
    return fingerprint


def read_meta(folder: Path) -> tuple[CorpusInfo, dict[str, shards.Stream]]:
    """Info and streams of a stored corpus, its shards checked for their sizes."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta["format"] > FORMAT:
            raise InputError(f"the corpus at {folder} was written by a newer Escala (format {meta['format']}); update")
        info = CorpusInfo(**meta["info"])
        if not CORPUS_NAME.fullmatch(info.fingerprint):  # cells will name it, and be trained on what it names
            raise ValueError(f"a fingerprint {info.fingerprint!r}")
        streams = {one["name"]: shards.Stream(**{**one, "shards": tuple(one["shards"])}) for one in meta["streams"]}
        for stream in streams.values():  # they name files, and how their bytes are read
            if stream.name not in ("train", "validation") or stream.dtype not in shards.DTYPES:
                raise ValueError(f"a stream {stream.name!r} of {stream.dtype!r}")
        # mapped, so that a header which tells of more than the file holds takes no memory
        if len(np.load(folder / "validation_ends.npy", mmap_mode="r", allow_pickle=False)) != info.validation_documents:
            raise ValueError("validation_ends.npy has the wrong length")
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the corpus at {folder} is damaged ({error}). Delete this folder; the next plan or run builds it again "
            "from its source."
        ) from error
    for stream in streams.values():
        shards.check_stream(folder, stream)
    return info, streams


@contextmanager
def _building(corpora: Path) -> Iterator[Path]:
    """A fresh folder to build in, gone afterwards if not renamed. OSErrors inside are the store's: InputError."""
    folder = corpora / f".building-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        corpora.mkdir(parents=True, exist_ok=True)
        for old in corpora.glob(".building-*"):
            _remove_dead(old)
        folder.mkdir()
        yield folder
    except OSError as error:
        raise InputError(
            f"cannot write the corpus to {corpora}: {error.strerror or error}. "
            "Free space or permissions there, or choose another store."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_dead(folder: Path) -> None:
    """Remove a build folder that has not been written to for long. Another builder may be doing the same."""
    try:
        newest = max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
    except OSError:
        return
    if time.time() - newest > DEAD_AFTER_SECONDS:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, place: Path, signature: str) -> None:
    """Sync and rename a built corpus into place; where it stands already, only note the signature."""
    for path in [*folder.iterdir(), folder]:
        if path.suffix != ".bin":  # shards are synced as they are written
            _sync(path)
    try:
        folder.rename(place)
        _sync(place.parent)
    except OSError:
        if not (place / "meta.json").is_file():
            raise
    (place / "sources").mkdir(exist_ok=True)
    (place / "sources" / signature).touch()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(source: Source, tokenizer: str, kind: str, folder: Path, progress: Progress) -> str:
    """Write a corpus into an empty folder and return its fingerprint.

    Text goes through a byte stream first, whatever the tokenizer: the source is read once, and the split is its own.
    """
    counts: dict[str, int] = dict.fromkeys(("train", "duplicates"), 0)
    chain = markov.draw_chain(source) if source.kind == "markov" else None
    vocab_size, separator, identity = 256, tokenizers.BYTE_SEPARATOR, "bytes"
    documents: Iterable[tuple[int, Any, Any]]
    if chain is not None:
        vocab_size, separator = source.vocab_size + 1, source.vocab_size
        identity = f"markov-{source.vocab_size}"
        documents = splits.markov_documents(source, chain, progress)
    else:
        documents = splits.text_documents(source, counts, progress)

    # 1. Split. The bytes of the training side go to disk at once; the validation side is small and stays in memory.
    spool = folder if kind == "bytes" else folder / "text"
    spool.mkdir(exist_ok=True)
    with shards.writing(spool, "train", shards.token_dtype(vocab_size)) as writer:

        def train(document: Any) -> None:
            counts["train"] += 1
            writer.write(document)
            writer.write(np.array([separator]))

        kept = splits.split(documents, train)
        stream = writer.finish()
    if not kept or not counts["train"]:
        found = len(kept) + counts["train"]
        raise InputError(
            f"the corpus {sources.describe(source)} has {plural(found, 'distinct non-empty document')}; "
            "at least 3 are needed to split off validation. Use a larger corpus.",
            field=("corpus", "path"),
        )
    validation_bytes, altered = sum(len(document) for document in kept), 0

    # 2. Encode, unless the bytes are the tokens.
    if kind != "bytes":
        if kind == "bpe":
            progress("train tokenizer", 0.0)
            text = shards.read_documents(spool, stream, separator)
            encoder = tokenizers.train_bpe(text, tokenizers.bpe_vocabulary(tokenizer))
        else:
            encoder = tokenizers.load_tokenizer(tokenizer)
        text, total, done = shards.read_documents(spool, stream, separator), stream.tokens, 0
        vocab_size, separator, identity = encoder.vocab_size, encoder.separator, encoder.identity
        with shards.writing(folder, "train", shards.token_dtype(vocab_size)) as writer:
            for document, ids in tokenizers.encode_documents(encoder, text, tokenizer):
                writer.write(ids)
                done += len(document) + 1
                progress("tokenise", done / total)
            stream = writer.finish()
        shutil.rmtree(spool)
        encoded = list(tokenizers.encode_documents(encoder, iter(kept), tokenizer))
        kept = [ids[:-1] for _, ids in encoded]
        altered = sum(not encoder.gives_back(document.decode(), ids[:-1]) for document, ids in encoded)
        (folder / "tokenizer.json").write_text(encoder.tokenizer.to_str(), encoding="utf-8")

    # 3. The validation stream, and where its documents end.
    with shards.writing(folder, "validation", shards.token_dtype(vocab_size)) as writer:
        for document in kept:
            writer.write(document)
            writer.write(np.array([separator]))
        validation = writer.finish()
    ends = np.cumsum([len(document) + 1 for document in kept], dtype=np.int64)
    np.save(folder / "validation_ends.npy", ends, allow_pickle=False)

    # 4. The fingerprint, over what defines the tokens and nothing else (not names, paths or the shards' size).
    defining = [identity, vocab_size, separator, stream.dtype, stream.tokens, stream.sha256, validation.sha256]
    defining.append(hashlib.sha256(ends.astype("<i8").tobytes()).hexdigest())
    info = CorpusInfo(
        fingerprint=hashlib.sha256(json.dumps(defining).encode()).hexdigest()[:16],
        name=source.name,
        tokenizer=identity,
        vocab_size=vocab_size,
        separator=separator,
        train_tokens=stream.tokens,
        train_documents=counts["train"],
        validation_tokens=validation.tokens,
        validation_documents=len(kept),
        validation_bytes=validation_bytes,
        duplicate_documents=counts["duplicates"],
        entropy_rate=None if chain is None else markov.entropy_rate(source, chain),
        description=sources.describe(source),
        altered_documents=altered,
    )
    # told only where there are any, so that an older Escala reads all other corpora
    told = {name: value for name, value in asdict(info).items() if value or name != "altered_documents"}
    meta = {"format": FORMAT, "info": told, "streams": [asdict(stream), asdict(validation)]}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return info.fingerprint


def _throttled(progress: Progress | None) -> Progress:
    """At most ten calls a second and phase reach the caller."""
    before: tuple[str, float] = ("", 0.0)

    def report(phase: str, fraction: float) -> None:
        nonlocal before
        now = time.monotonic()
        if progress is not None and (phase != before[0] or now - before[1] >= 0.1):
            before = (phase, now)
            progress(phase, fraction)

    return report
