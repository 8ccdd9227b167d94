"""A disk that refuses, as one in a network does for a while."""

from pathlib import Path
from typing import Any

import pytest

from cluster import claims
from sweeps.errors import InputError


def refuse_claims(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """The disk refuses the next so many reads of a claim."""
    left, read = [times], claims.read_json

    def refuse(path: Path) -> dict[str, Any]:
        left[0] -= 1
        if left[0] >= 0:
            raise InputError(f"{path} cannot be read as a record: [Errno 116] Stale file handle")
        return read(path)

    monkeypatch.setattr(claims, "read_json", refuse)
