"""What `escala gc` takes away, and when it takes nothing."""

import json
import os
import time
from pathlib import Path

from commandline import Escala, ids, refused

from cluster.claims import Claim
from sweeps.records import encode_row
from sweeps.store import Store, begin_attempt, record_error
from tests.analysis.synthetic import Run, write_study


def old(path: Path, seconds: float = 2 * 3600) -> Path:
    """Make a file or folder look as if nobody had written to it for long."""
    for one in [*path.rglob("*"), path]:
        os.utime(one, (time.time() - seconds,) * 2)
    return path


def littered(store: Store) -> dict[str, Path]:
    """One thing of each kind that may go, and beside each something like it that must stay."""
    done, failed = ids(store)[0], ids(store)[4]
    made = {}
    for key, cell, name, permanent in (
        ("checkpoint", done, "1000", False),
        ("permanent", done, "2000", True),
        ("resumable", failed, "1000", False),
    ):
        made[key] = store.attempt(cell, 0) / "checkpoints" / name
        made[key].mkdir(parents=True)
        (made[key] / "state.json").write_bytes(encode_row({"permanent": permanent}))
        (made[key] / "state.safetensors").write_bytes(b"0" * 1000)
    made["leftover"] = store.attempt(done, 0) / "checkpoints" / ".tmp-3000"
    made["leftover"].mkdir()
    (made["leftover"] / "half").write_bytes(b"0" * 500)
    made["fresh"] = store.cell(done) / ".result.json.xyz"
    made["fresh"].write_bytes(b"half")
    write_study(store.root, [Run(width=80, budget=1.2e11)], name="gone")
    made["cell"] = store.cell(ids(store, "gone")[0])
    (store.study("gone") / "plan.json").unlink()
    made["corpus"] = store.root / "corpora" / "feedfeedfeedfeed"
    made["used"] = store.root / "corpora" / "0123456789abcdef"
    for key in ("corpus", "used"):
        made[key].mkdir(parents=True)
        (made[key] / "train-00000.bin").write_bytes(b"0" * 300)
    for key in ("leftover", "cell", "corpus", "used"):
        old(made[key])
    return made


def test_gc_lists_first_and_removes_only_what_nobody_needs(place: tuple[Escala, Store]) -> None:
    escala, store = place
    made = littered(store)
    kept = {
        p: p.read_bytes() for c in ids(store) for p in store.cell(c).rglob("*.json*") if "checkpoints" not in str(p)
    }
    listed = json.loads(escala("gc", "--store", store.root, "--json").stdout)
    goes = {"checkpoint", "leftover", "cell", "corpus"}
    assert {item["path"] for item in listed["items"]} == {str(made[key].relative_to(store.root)) for key in goes}
    assert [item["kind"] for item in listed["items"]] == ["checkpoints", "leftovers", "cells", "corpora"]
    assert listed["items"][1]["bytes"] == 500
    assert listed["items"][3]["bytes"] == 300
    asked = escala("gc", "--store", store.root).stdout
    assert "--yes" in asked
    assert all(path.exists() for path in made.values()), "nothing goes unasked"
    only = json.loads(escala("gc", "--only", "corpora", "--store", store.root, "--json").stdout)
    assert [item["kind"] for item in only["items"]] == ["corpora"]
    done = json.loads(escala("gc", "--yes", "--store", store.root, "--json").stdout)
    assert done["freed"] == listed["bytes"]
    assert {key for key, path in made.items() if not path.exists()} == goes
    assert {path: path.read_bytes() for path in kept} == kept
    assert "nothing to remove" in escala("gc", "--store", store.root).stdout


def test_gc_is_refused_while_a_driver_or_an_attempt_lives(place: tuple[Escala, Store]) -> None:
    escala, store = place
    littered(store)
    assert 'mean "corpora"' in refused(escala, "gc", "--only", "corpra", "--store", store.root)
    claim = Claim(store, "demo")
    claim.__enter__()
    message = refused(escala, "gc", "--yes", "--store", store.root)
    assert f"study demo is being run by process {os.getpid()}" in message
    claim.__exit__(None, None, None)
    attempt = begin_attempt(store, ids(store)[5], {"numerics": {}})
    assert f"attempt 0 of cell {ids(store)[5]} is still alive" in refused(escala, "gc", "--yes", "--store", store.root)
    record_error(attempt, "stopped", "a test")
