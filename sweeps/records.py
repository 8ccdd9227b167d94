"""Records on disk: JSON files and log lines that a reader sees whole or not at all.

A record is written beside its place, synced and renamed. A log line ends with the checksum of what stands before it. Of
a disk that refuses, the message says what to do.
"""

import errno
import fcntl
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sweeps.errors import InputError
from sweeps.faults import fault

Json = dict[str, Any]


def timestamp(seconds: float | None = None) -> str:
    """UTC time as ISO 8601, now or of the given Unix seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() if seconds is None else seconds))


def write_json(path: Path, value: Mapping[str, Any], *, sync: bool = True) -> None:
    """Write a JSON record so that a reader sees the old one or the new one, never half. NaN and infinity raise.

    Without `sync` a power cut may lose it: for records that can be made again.
    """
    write_bytes(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n", sync=sync)


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file atomically: a temporary file beside it, synced, renamed. InputError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = write_beside(path, content, sync=sync)
        os.replace(temporary, path)
        fault("record.after_rename")
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error


def read_json(path: Path) -> Json:
    """Read a record. InputError where it is unreadable or is no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a record: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a record: it holds a {type(value).__name__}, not an object.")
    return value


def read_or_none(path: Path) -> Json | None:
    """Read a record that was written without `sync`: None where there is none, or a power cut has emptied it.
    InputError where the disk does not tell."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return None


def is_whole(path: Path) -> bool:
    """Whether a record is there that a power cut has not emptied. Told by its ends, since decoding thousands would take
    its time."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    except OSError:  # whoever needs it says what is wrong
        return True
    return content.startswith(b"{") and content.endswith(b"}\n")


def write_beside(path: Path, content: bytes, *, sync: bool = True) -> str:
    """Write the content into a new dot file beside `path` and return its path, for the caller to move into place.

    Synced, unless told otherwise, and with the permissions that the umask allows. OSError where the disk refuses, and
    nothing is left.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            fault("record.before_write")
            stream.write(content)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        fault("record.before_rename")
    except BaseException:
        os.unlink(temporary)
        raise
    return temporary


def sync_folder(folder: Path) -> None:
    """Until the names in a folder are on disk: a rename or a link may else be lost in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


FREE_SPACE = "free some space, then run again; nothing that was finished is lost"
"""What every message about a full disk says."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time in here, by the lock of a file that is made and stays."""
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def disk_error(path: Path, error: OSError) -> InputError:
    """What the disk said when `path` was written, with what to do about it. To be raised from `error`."""
    advice = {
        errno.ENOSPC: f"the disk is full: {FREE_SPACE}",
        errno.EDQUOT: f"the disk quota is used up: {FREE_SPACE}",
        errno.EACCES: "permission denied: change the permissions, or name another place for it",
        errno.EROFS: "the file system is read-only: name another place for it",
        errno.ENOTDIR: "a part of the path is a file, not a folder: name another place for it",
    }.get(error.errno or 0, str(error))
    return InputError(f"cannot write {path}: {advice}.")


# The umask can only be read by setting it; once, at import, while there is one thread.
_UMASK = os.umask(0)
os.umask(_UMASK)


# --- log lines ---------------------------------------------------------------------------------------------------


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One log line: a JSON object whose last key is the CRC-32 of all that stands before it."""
    body = json.dumps(row, allow_nan=False, separators=(",", ":"))[:-1]
    return f'{body},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def decode_row(line: bytes) -> Json | None:
    """The row of one log line without its newline, or None where the line is torn or damaged."""
    body = _checked(line)
    row: Json | None = None if body is None else json.loads(body + b"}")
    return row


def _checked(line: bytes) -> bytes | None:
    """What stands before the checksum of a whole line; None where the line is torn or damaged."""
    body, mark, tail = line.rpartition(b',"crc":"')
    return body if mark and tail == b'%08x"}' % zlib.crc32(body) else None


def append_rows(stream: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append whole lines to an unbuffered binary stream in one write. OSError where the disk takes but a part."""
    content = b"".join(encode_row(row) for row in rows)
    fault("log.before_write")
    if stream.write(content) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fault("log.after_write")


def read_rows(path: Path, offset: int = 0, stop: int | None = None) -> tuple[list[Json], int]:
    """The complete, undamaged rows from byte `offset` on, before byte `stop`, and the offset after the last of them."""
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            content = stream.read() if stop is None else stream.read(max(0, stop - offset))
    except FileNotFoundError:
        return [], offset
    end = content.rfind(b"\n") + 1
    bodies = [body for line in content[:end].split(b"\n") if (body := _checked(line)) is not None]
    # in one go: a call of the parser for each line takes twice as long as the parsing
    rows: list[Json] = json.loads(b"[" + b"},".join(bodies) + b"}]") if bodies else []
    return rows, offset + end
