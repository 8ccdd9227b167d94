"""Nothing half-written is read, an attempt is won once, and a result stands."""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.errors import InputError
from sweeps.records import append_rows, decode_row, encode_row, read_json, read_rows, write_json
from sweeps.store import (
    Attempt,
    Store,
    attempt_epochs,
    begin_attempt,
    cell_state,
    commit_result,
    open_store,
    read_cell,
    read_end,
    read_metrics,
    record_error,
)

ROOT = Path(__file__).resolve().parents[2]
RESULT = {"state": "finished", "reason": None, "val_loss_final": 1.5}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def write_log(attempt: Attempt, *rows: dict) -> Path:
    path = attempt.folder / "log.jsonl"
    with path.open("ab", buffering=0) as stream:
        append_rows(stream, rows)
    return path


def row(tokens: int, seconds: float = 1.0, **metrics: float) -> dict:
    return {"time": seconds, "tokens": tokens, "metrics": metrics}


ROWS = st.dictionaries(
    st.text(max_size=5), st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=9)), max_size=4
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(ROWS)
def test_a_row_survives_its_line_and_the_line_is_json(value: dict) -> None:
    line = encode_row(value).removesuffix(b"\n")
    assert decode_row(line) == value
    if value:
        assert json.loads(line)["crc"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_line_is_never_read(data: st.DataObject) -> None:
    line = encode_row(row(128, loss=1.25)).removesuffix(b"\n")
    place = data.draw(st.integers(0, len(line) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != line[place]))
    assert decode_row(line[:place] + bytes([byte]) + line[place + 1 :]) is None
    assert decode_row(line[:place]) is None


def test_a_torn_tail_waits_until_it_is_whole(store: Store) -> None:
    path = write_log(begin_attempt(store, "c", {}), row(1, loss=3.0))
    line = encode_row(row(2, loss=2.0))
    with path.open("ab") as stream:
        stream.write(line[:10])
    rows, offset = read_rows(path)
    assert [r["tokens"] for r in rows] == [1]
    with path.open("ab") as stream:
        stream.write(line[10:])
    rows, end = read_rows(path, offset)
    assert [r["tokens"] for r in rows] == [2]
    assert end == path.stat().st_size


def test_the_first_committed_value_of_a_step_wins(store: Store) -> None:
    write_log(begin_attempt(store, "c", {}), row(1, 10.0, loss=3.0), row(2, 11.0, loss=2.0))
    write_log(begin_attempt(store, "c", {}), row(2, 20.0, loss=9.0, extra=1.0), row(3, 21.0, loss=1.0))
    merged = read_metrics(store, "c")
    assert [(r["tokens"], r["time"], r["metrics"]) for r in merged] == [
        (1, 10.0, {"loss": 3.0}),
        (2, 11.0, {"loss": 2.0, "extra": 1.0}),
        (3, 21.0, {"loss": 1.0}),
    ]


def _race(root: str, start: "multiprocessing.synchronize.Event", won: "multiprocessing.Queue[int]") -> None:
    start.wait()
    for _ in range(20):
        won.put(begin_attempt(Store(Path(root)), "c", {}).epoch)


def test_an_epoch_is_won_by_one_process_alone(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    start, won = context.Event(), context.Queue()
    racers = [context.Process(target=_race, args=(str(store.root), start, won)) for _ in range(3)]
    for racer in racers:
        racer.start()
    start.set()
    epochs = [won.get(timeout=60) for _ in range(60)]
    for racer in racers:
        racer.join()
    assert sorted(epochs) == list(range(60)) == attempt_epochs(store, "c")


def test_a_superseded_attempt_cannot_commit(store: Store) -> None:
    old = begin_attempt(store, "c", {})
    new = begin_attempt(store, "c", {})
    assert not commit_result(old, RESULT)
    assert cell_state(store, "c").result is None
    assert commit_result(new, RESULT)
    assert not commit_result(new, {**RESULT, "val_loss_final": 9.9}), "a result is written once"
    state = cell_state(store, "c")
    assert (state.state, state.attempts) == ("finished", 2)
    assert state.result is not None
    assert state.result["val_loss_final"] == 1.5
    assert [path.name for path in store.cell("c").iterdir() if path.name.startswith(".")] == []


def test_states_come_from_files_alone(store: Store) -> None:
    assert cell_state(store, "c").state == "planned"
    attempt = begin_attempt(store, "c", {})
    assert cell_state(store, "c").state == "running"
    record_error(attempt, "code", "ValueError: no\nsuch thing", "Traceback ...")
    assert cell_state(store, "c").state == "failed"
    assert cell_state(store, "c").reason == "code: ValueError: no such thing"
    begin_attempt(store, "c", {})
    assert cell_state(store, "c").state == "running"


def test_an_attempt_whose_process_is_gone_is_interrupted_even_if_its_id_is_used_again(store: Store) -> None:
    attempt = begin_attempt(store, "c", {})
    record = read_json(attempt.folder / "attempt.json")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    older = {name: value for name, value in record.items() if name not in ("process_ticks", "boot", "pid_namespace")}
    older |= {"process_started": record["process_started"] - 100}
    changes = {"pid": dead.pid}, {"process_ticks": record["process_ticks"] - 1}, {"boot": "the one before"}
    for changed in (*(record | change for change in changes), older):
        write_json(attempt.folder / "attempt.json", changed)
        state = cell_state(store, "c")
        assert (state.state, state.reason) == ("planned", "attempt 0 was interrupted")


def test_a_clock_that_is_set_ends_no_attempt(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_attempt(store, "c", {})
    told = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: told(self) + 3600)
    assert cell_state(store, "c").state == "running"


def test_a_store_where_its_database_has_no_address_is_refused(tmp_path: Path) -> None:
    for name in ("what?", "50%25"):
        with pytest.raises(InputError, match="in its path, which the address of its MLflow database cannot hold"):
            open_store(tmp_path / name)
        assert not (tmp_path / name).exists()


def test_a_cell_whose_record_is_gone_is_named_with_what_to_do(store: Store) -> None:
    with pytest.raises(InputError, match=r"lacks the record .*cell\.json: run the study again"):
        read_cell(store, "c")


def test_an_attempt_elsewhere_lives_by_its_last_sign(store: Store) -> None:
    attempt = begin_attempt(store, "c", {})
    path = attempt.folder / "attempt.json"
    write_json(path, read_json(path) | {"host": "another"})
    assert cell_state(store, "c").state == "running"
    os.utime(path, (time.time() - 1000, time.time() - 1000))
    assert cell_state(store, "c").state == "planned"
    write_log(attempt, row(1, loss=1.0))
    assert cell_state(store, "c").state == "running"


def test_an_attempt_in_another_container_that_shares_the_machines_name_lives_by_its_last_sign(store: Store) -> None:
    attempt = begin_attempt(store, "c", {})
    path = attempt.folder / "attempt.json"
    write_json(path, read_json(path) | {"pid_namespace": "pid:[1]", "pid": 2**22 + 1})  # no process here has that id
    assert cell_state(store, "c").state == "running"
    os.utime(path, (time.time() - 1000, time.time() - 1000))
    assert cell_state(store, "c").state == "planned"
    write_json(path, read_json(path) | {"pid_namespace": "pid:[1]", "pid": os.getpid()})
    os.utime(path, (time.time() - 1000, time.time() - 1000))
    assert cell_state(store, "c").state == "planned", "a process here that has its id is another"


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path / "s")
    write_json(tmp_path / "s" / "store.json", {"format": 99})
    with pytest.raises(InputError, match="format 99; this version of Escala reads up to 1"):
        open_store(tmp_path / "s")


def test_places_that_cannot_be_a_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a part of the path is a file"):
        open_store(tmp_path / "file" / "store")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not an Escala store"):
        open_store(tmp_path / "full")
    with pytest.raises(InputError, match="no Escala store at"):
        open_store(tmp_path / "none", create=False)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "store.json").write_text("half a rec")
    with pytest.raises(InputError, match="cannot be read as a record"):
        open_store(tmp_path / "odd")


def test_a_write_that_the_disk_refuses_leaves_the_old_record(store: Store) -> None:
    path = store.root / "record.json"
    write_json(path, {"value": "old"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = (
        "import resource, signal, sys; from pathlib import Path; from sweeps.records import write_json\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_json(Path(sys.argv[1]), {'value': 'x' * 5000})"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert "InputError: cannot write" in run.stderr
    assert read_json(path) == {"value": "old"}
    assert [entry.name for entry in store.root.iterdir() if entry.name.startswith(".")] == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == limits


def test_an_end_is_on_record_whatever_bytes_its_message_holds(store: Store) -> None:
    attempt = begin_attempt(store, "cell", {})
    record_error(attempt, "code", f"no file {os.fsdecode(b'caf' + bytes([0xE9]))}\0.txt", "Traceback: \udce9")
    end = read_end(store, "cell", 0)
    assert end == ("code", r"no file caf\udce9\0.txt")
    assert cell_state(store, "cell").state == "failed"
