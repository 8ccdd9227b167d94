"""What strangers and neighbours cannot do to a person at the command line, and what a run opens to the machine.

tests/sweeps/test_hostile_files.py and tests/analysis/test_hostile_tables.py hold the attacks by single files.
"""

import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
from commandline import ROOT, Escala, Finished, ids, refused
from rich.text import Text

from sweeps.errors import InputError
from sweeps.records import read_json, write_json
from sweeps.store import begin_attempt, open_store, quarantine_cell, read_plan, record_error
from tests.analysis.synthetic import Run, write_study

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b2J\r\u202eevil[link=http://evil]x[/link][/nothing] :bomb:"
"""Sets the window's title, clears the screen, colours, goes back, turns the writing; markup that would be a fault."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")

ONE = """
name: one
corpus: {source: markov, options: {vocab_size: 16, tokens: 200000, seed: 1}}
context: 32
families: [llama]
grid: {type: points, points: [{size: 14142, tokens: 20000}]}
training: {batch_tokens: 256, learning_rate: 0.01}
"""


# --- the terminal --------------------------------------------------------------------------------------------------


def test_no_escape_sequence_or_markup_of_others_acts_on_the_terminal(tmp_path: Path) -> None:
    escala = Escala(tmp_path)
    store = open_store(write_study(tmp_path / "store", [Run(width=w, budget=1.2e11) for w in (16, 24, 32, 40)]))
    first, second, third, _ = ids(store)
    quarantine_cell(store, "demo", first, ESCAPE, ESCAPE)
    (store.cell(second) / "result.json").unlink()
    record_error(begin_attempt(store, second, {"host": ESCAPE}), "code", ESCAPE, f"Traceback\n{ESCAPE}\n")
    result = store.cell(third) / "result.json"
    write_json(result, read_json(result) | {"state": "diverged", "reason": ESCAPE, "val_loss_final": None})
    for path in store.root.glob("cells/*/cell.json"):
        record = read_json(path)
        write_json(path, record | {"identity": record["identity"] | {"family": f"{path.parent.name}{ESCAPE}"}})
    table = tmp_path / "table.csv"
    table.write_text(
        f"N,D,loss,{ESCAPE[:-1]!r}\n" + "".join(f"{n}e6,{1 + n % 3}e8,{3 - n / 10},{ESCAPE}\n" for n in range(1, 9))
    )
    study = escala.study(f'name: x\n"{ESCAPE.encode("unicode_escape").decode()}": 1\n'.replace("\\x9b", "\\x9B"))
    kind: dict[str, Any] = {"kind": ESCAPE, "device": ESCAPE, "points": [], "costs": {}, "workers": 1, "versions": {}}
    write_json(store.root / "hardware" / "x.json", kind | {"host": ESCAPE, "measured": ESCAPE})
    sound = escala.study(ONE, "sound.yaml")
    at = ["--store", store.root]
    for command, code in (
        (["status", "demo", *at], 0),
        (["logs", second, *at], 0),
        (["why", second, *at], 0),
        (["why", first, third, *at], 0),
        (["fit", "demo", "--law", "isoflop", *at], 1),
        (["fit", table, "--columns", f"N={ESCAPE}"], 2),
        (["fit", table, "--law", "chinchilla"], 0),
        (["plan", study, *at], 2),
        (["simulate", sound, "--gpus", 1, *at], 0),
        (["retry", "--failed", "demo", *at], 0),
        (["status", ESCAPE, *at], 2),
    ):
        run = escala(*command, ok=code)
        assert not CONTROL.search(run.stdout + run.stderr), command
        assert "Traceback (most recent" not in run.stderr, command


def test_a_terminal_gets_the_colours_of_escala_and_none_of_others() -> None:
    from cluster.display import _Console

    console = _Console(force_terminal=True, width=400, color_system="standard", legacy_windows=False)
    with console.capture() as captured:
        console.print(Text.assemble(("ours", "red"), f" {ESCAPE}"))
        console.print(f"[bold]{ESCAPE}")
    written = captured.get()
    assert "\x1b[31mours\x1b[0m" in written
    assert not CONTROL.search(written.replace("\x1b[31mours\x1b[0m", ""))
    assert "[bold]" in written
    assert ":bomb:" in written


# --- a store from a stranger -------------------------------------------------------------------------------------


def test_a_plan_that_names_cells_outside_its_store_is_refused(tmp_path: Path) -> None:
    escala = Escala(tmp_path)
    store = open_store(write_study(tmp_path / "store", [Run(width=16, budget=1.2e11, state="failed")]))
    (cell,) = ids(store)
    shutil.move(store.cell(cell), tmp_path / "victim")
    plan = read_plan(store, "demo")
    plan["cells"][0]["id"] = "../../victim"
    write_json(store.study("demo") / "plan.json", plan)
    for command in (["status", "demo"], ["retry", "--failed", "demo"], ["fit", "demo"], ["report", "demo"]):
        assert "cannot be a cell" in refused(escala, *command, "--store", store.root)


def test_gc_takes_nothing_away_through_a_link_that_leaves_the_store(tmp_path: Path) -> None:
    escala = Escala(tmp_path)
    store = open_store(write_study(tmp_path / "store", [Run(width=16, budget=1.2e11)]))
    (cell,) = ids(store)
    victim = tmp_path / "victim" / "20261122"
    victim.mkdir(parents=True)
    (victim / "state.json").write_text('{"mine": 1}\n')
    shutil.rmtree(store.checkpoints(cell, 0), ignore_errors=True)
    (victim.parent / "20261123").mkdir()
    store.checkpoints(cell, 0).symlink_to(victim.parent)
    assert "leads out of" in refused(escala, "gc", "--store", store.root, "--yes")
    assert (victim / "state.json").exists()
    assert (victim.parent / "20261123").exists()


def test_sync_writes_no_files_where_the_database_of_a_strangers_store_says(
    copy_of_finished: Callable[[], Finished], tmp_path: Path
) -> None:
    finished = copy_of_finished()
    (victim := tmp_path / "victim").mkdir()
    (finished.store / "studies" / "tiny" / "report.html").write_text("<p>new, so it is to be sent</p>")
    inside = f"{(finished.store / 'mlflow').as_uri()}/../../victim"
    for place in (victim.as_uri(), inside):
        with sqlite3.connect(finished.store / "mlflow" / "mlflow.db") as database:
            database.execute("UPDATE runs SET artifact_uri = ?", (place,))
        finished.escala("sync", "tiny", "--store", finished.store)
        assert list(victim.iterdir()) == []


# --- what a run opens ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "program"),
    [("token", [str(ROOT / "escala.py")]), ("disabled", ["-c", "import ray, escala; escala.main()"])],
)
def test_a_local_run_listens_on_loopback_alone_and_keeps_its_token_to_itself(
    tmp_path: Path, mode: str, program: list[str]
) -> None:
    """Also in a process that had imported Ray before, as a notebook may."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": mode}
    study = Escala(tmp_path).study(ONE)
    command = [sys.executable, *program, "run", str(study), "--store", str(tmp_path / "store")]
    run = subprocess.Popen(
        [*command, "--workers", "1"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    heard: set[tuple[str, str]] = set()
    deadline = time.monotonic() + 240
    while run.poll() is None:
        assert time.monotonic() < deadline
        heard |= listening(run.pid)
        time.sleep(0.1)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert "1 finished" in output
    assert len(heard) >= 3, "Ray's processes were seen"
    assert {address.removeprefix("::ffff:") for _, address in heard} <= {"127.0.0.1", "::1"}, heard
    token = home / ".ray" / "auth_token"
    assert token.exists() == (mode == "token")
    if token.exists():
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        written = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
        assert not [path for path in written if token.read_bytes() in path.read_bytes()]


def listening(pid: int) -> set[tuple[str, str]]:
    """(command, address) of every socket that a process or a child of it listens on."""
    found = set()
    try:
        everyone = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return set()
    for process in everyone:
        try:
            name = process.name()
            found |= {(name, c.laddr.ip) for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.slow
def test_the_ui_listens_on_loopback_alone(finished: Finished) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ui = finished.escala.start("ui", "--store", finished.store, "--port", port, "--no-browser")
    assert ui.stdout is not None
    try:
        assert ui.stdout.readline() == "starting MLflow ...\n"
        assert "MLflow UI: http://127.0.0.1" in ui.stdout.readline()
        heard = listening(ui.pid)
        assert heard
        assert {address for _, address in heard} == {"127.0.0.1"}
    finally:
        ui.terminate()
        ui.communicate(timeout=300)


def test_a_token_that_others_could_read_is_taken_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.connection import protect_token

    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    protect_token()  # there is none
    token.write_text("0123456789abcdef")
    token.chmod(0o644)
    protect_token()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_a_token_that_goes_to_a_cluster_elsewhere_is_taken_from_others_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import jobs

    modes: list[int] = []

    def ask(_: str, headers: dict[str, str]) -> str | None:
        modes.append(stat.S_IMODE(token.stat().st_mode))
        return version("ray") if headers else None

    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which connecting sets
    monkeypatch.setattr(jobs, "tell_ray_the_mode", lambda: None)
    monkeypatch.setattr(jobs, "_ask", ask)
    monkeypatch.setattr(jobs, "_token_header", lambda _: {"authorization": token.read_text()})
    with pytest.raises(InputError, match="no longer answers"):  # nobody is there
        jobs.connect("http://127.0.0.1:1")
    assert modes == [0o644, 0o600]
