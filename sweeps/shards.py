"""A stream of tokens on disk: numbered files of little-endian unsigned integers, read through memory maps.

Every shard but the last of a stream holds the same number of tokens, so that a position is found by division.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sweeps.errors import InputError

SHARD_BYTES = 256_000_000
DTYPES = ("<u1", "<u2", "<u4")


@dataclass(frozen=True)
class Stream:
    """What is known of a written stream."""

    name: str
    dtype: str
    """<u1, <u2 or <u4"""
    shards: tuple[int, ...]
    """Tokens in each shard; the files are <name>-00000.bin and so on."""
    sha256: str
    """Of the tokens' bytes, all shards in a row."""

    @property
    def tokens(self) -> int:
        return sum(self.shards)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every token."""
    return np.dtype("<u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


def shard_path(folder: Path, name: str, index: int) -> Path:
    return folder / f"{name}-{index:05d}.bin"


class StreamWriter:
    """Appends tokens to a stream's shards; `finish` syncs them and says what was written. OSErrors are the caller's."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_bytes: int) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.capacity = shard_bytes // dtype.itemsize * dtype.itemsize
        self.sizes: list[int] = []
        self.digest = hashlib.sha256()
        self.handle = self._next()

    def write(self, tokens: np.ndarray | bytes) -> None:
        """Append tokens: an array of any integer type that fits, or raw bytes of the stream's own type."""
        data = tokens if isinstance(tokens, bytes) else tokens.astype(self.dtype, copy=False).tobytes()
        self.digest.update(data)
        view = memoryview(data)
        while len(view):
            if self.sizes[-1] == self.capacity:
                self._close()
                self.handle = self._next()
            written = self.handle.write(view[: self.capacity - self.sizes[-1]])
            self.sizes[-1] += written
            view = view[written:]

    def finish(self) -> Stream:
        """Sync the last shard; what the stream holds, for the corpus's meta.json."""
        self._close()
        shards = tuple(size // self.dtype.itemsize for size in self.sizes)
        return Stream(self.name, self.dtype.str.replace("|", "<"), shards, self.digest.hexdigest())

    def abandon(self) -> None:
        """Close the file without caring for its content; harmless after `finish`."""
        with suppress(OSError):  # the buffered rest may not fit on the disk; the shard is thrown away in any case
            self.handle.close()

    def _next(self) -> BinaryIO:
        self.sizes.append(0)
        return shard_path(self.folder, self.name, len(self.sizes) - 1).open("wb", buffering=1 << 20)

    def _close(self) -> None:
        self.handle.flush()
        os.fsync(self.handle.fileno())
        self.handle.close()


@contextmanager
def writing(folder: Path, name: str, dtype: np.dtype, shard_bytes: int = SHARD_BYTES) -> Iterator[StreamWriter]:
    """A writer whose file is closed whatever happens; the stream counts only if `finish` was called."""
    writer = StreamWriter(folder, name, dtype, shard_bytes)
    try:
        yield writer
    finally:
        writer.abandon()


def read_documents(folder: Path, stream: Stream, separator: int) -> Iterator[bytes]:
    """The documents of a byte stream, in order and without separators, at most a few megabytes at a time."""
    rest = b""
    for index in range(len(stream.shards)):
        with shard_path(folder, stream.name, index).open("rb") as handle:
            while block := handle.read(1 << 20):
                *whole, rest = (rest + block).split(bytes([separator]))
                yield from whole


def check_stream(folder: Path, stream: Stream) -> None:
    """Raise InputError where a shard is missing or its size is not what was written."""
    for index, tokens in enumerate(stream.shards):
        path, expected = shard_path(folder, stream.name, index), tokens * np.dtype(stream.dtype).itemsize
        found = path.stat().st_size if path.exists() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found:,} bytes instead of {expected:,}"
            raise InputError(
                f"the corpus at {folder} is damaged: {path.name} {state}. "
                "Delete this folder; the next plan or run builds it again from its source."
            )


class StreamReader:
    """Random access to a written stream. Raises InputError where it is damaged."""

    def __init__(self, folder: Path, stream: Stream) -> None:
        check_stream(folder, stream)
        self.tokens = stream.tokens
        self.capacity = max(stream.shards[0], 1)
        dtype = np.dtype(stream.dtype)
        # np.asarray drops memmap's slow indexing and keeps the map itself alive; an empty file cannot be mapped.
        self.shards = [
            np.asarray(np.memmap(shard_path(folder, stream.name, index), dtype=dtype, mode="r"))
            if tokens
            else np.empty(0, dtype)
            for index, tokens in enumerate(stream.shards)
        ]

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int64 (len(starts), length): the tokens from each start on."""
        index = starts[:, None] + np.arange(length)
        if len(self.shards) == 1:
            return self.shards[0][index].astype(np.int64)
        result = np.empty(index.shape, dtype=np.int64)
        shard = index // self.capacity
        for number in np.unique(shard):
            here = shard == number
            result[here] = self.shards[number][index[here] - number * self.capacity]
        return result
