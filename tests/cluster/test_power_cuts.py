"""Records that are written without waiting for the disk: what a power cut has emptied ends no study."""

import time
from pathlib import Path

import pytest
from commandline import Escala, ids
from plans import planned, points

from cluster.claims import Claim
from cluster.garbage import collectable
from cluster.pulse import Pulse
from cluster.turns import Turns
from cluster.usage import Usage
from cluster.watching import explain, progress
from sweeps.errors import InputError
from sweeps.foreign import import_runs
from sweeps.records import read_json, write_json
from sweeps.stacks import known_gain, note_gain
from sweeps.store import Store, begin_attempt, open_store, read_cell

emptied = pytest.mark.parametrize("left", [b"", b"\0" * 500, b'{"driver": 1,\n "clu'], ids=["empty", "zeros", "half"])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@emptied
def test_a_usage_of_which_nothing_is_known_counts_as_none(store: Store, left: bytes) -> None:
    folder = store.study("s") / "usage"
    for driver in (1, 2):
        write_json(folder / f"{driver}.json", {"gpu_seconds": 10.0 * driver})
    (folder / "1.json").write_bytes(left)
    assert Usage(store, "s", 3).before == 20.0


def test_a_usage_that_the_disk_does_not_tell_is_not_taken_for_none(store: Store) -> None:
    (store.study("s") / "usage" / "1.json").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be read as a record"):
        Usage(store, "s", 3)


@emptied
def test_a_turn_of_which_nothing_is_known_holds_nobody_back_and_is_told_anew(store: Store, left: bytes) -> None:
    low = Turns(store, "low", 0, "head:6379", 0)
    with Claim(store, "high") as claim, Claim(store, "higher") as second:
        Turns(store, "high", claim.number, "head:6379", 5).tell(True)
        higher = Turns(store, "higher", second.number, "head:6379", 9)
        higher.tell(True)
        assert low.before() == "high (priority 5)"
        turn = store.study("high") / "turn.json"
        before = turn.read_bytes()
        turn.write_bytes(left)
        assert low.before() == "higher (priority 9)"
        Turns(store, "high", claim.number, "head:6379", 5).tell(True)
        assert turn.read_bytes() == before


@emptied
def test_a_probe_of_which_nothing_is_known_is_made_again(store: Store, left: bytes) -> None:
    (one,) = planned(points({"size": 2e4, "tokens": 64_000})).cells
    note_gain(store, one.cell, 4, "cpu", 1.7)
    (probe,) = (store.root / "probes").iterdir()
    probe.write_bytes(left)
    assert known_gain(store, one.cell, 4, "cpu") is None
    note_gain(store, one.cell, 4, "cpu", 1.5)
    assert known_gain(store, one.cell, 4, "cpu") == 1.5


@emptied
@pytest.mark.parametrize("name", ["cell.json", "result.json"])
def test_a_run_that_is_imported_again_is_written_anew(store: Store, name: str, left: bytes) -> None:
    rows = [{"run": {"N": 1e4 + i, "D": 1e5, "C": 6e9, "loss": 3.0}, "row": {"i": i}} for i in range(2)]
    conventions = {"N": "unknown", "C": "unknown"}
    import_runs(store, "lit", rows, conventions, "a.csv")
    whole, damaged = sorted((store.root / "cells").iterdir())
    before = {path: path.stat().st_ino for path in whole.iterdir()}
    expected = {path: read_json(path) | {"imported": 0} for path in damaged.iterdir()}
    (damaged / name).write_bytes(left)
    told = import_runs(store, "lit", rows, conventions, "a.csv")
    assert (told.new, told.known) == (0, 2)
    assert {path: read_json(path) | {"imported": 0} for path in damaged.iterdir()} == expected
    assert {path: path.stat().st_ino for path in whole.iterdir()} == before, "what is whole is left alone"
    assert read_cell(store, damaged.name)["id"] == damaged.name


@pytest.mark.parametrize(
    ("left", "ended"), [(b"", False), (b"\0" * 500, False), (b'{"id": "', False), (b"", True), (b"\0" * 500, True)]
)
def test_cells_of_which_nothing_is_on_record_any_more_are_nobodys_neighbours_and_stop_no_gc(
    place: tuple[Escala, Store], left: bytes, ended: bool
) -> None:
    _, store = place
    own, *others = ids(store)
    damaged = others[0 if ended else -1]
    assert (store.cell(damaged) / "result.json").exists() == ended
    (store.cell(damaged) / "cell.json").write_bytes(left)
    near = {one["cell"] for one in explain(store, own)["nearest"]}
    assert near
    assert near <= set(others) - {damaged}
    collectable(store, ("corpora",))


@emptied
def test_a_heartbeat_that_tells_nothing_is_silence_to_the_driver_and_to_people(
    store: Store, left: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power of the disk's machine was cut, not that of the worker's."""
    monkeypatch.setattr("cluster.pulse.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("cluster.pulse.SILENCE_SECONDS", 0.2)
    attempt = begin_attempt(store, "0123456789abcdef", {"study": "s"})
    (attempt.folder / "heartbeat.json").write_bytes(left)
    pulse = Pulse(store, attempt.cell_id, 0, "s")
    assert pulse.fate() is None
    assert progress(store, attempt.cell_id, 1_000)["tokens"] == 0
    time.sleep(0.3)
    assert pulse.fate() is not None
