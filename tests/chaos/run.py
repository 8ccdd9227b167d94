"""Chaos: a study runs while a seeded schedule of faults ends its processes; it must end as if nothing had happened.

`make chaos` (`python -m chaos.run N`, for N seeds) prints what was done when, the verdict of each schedule, and a table
of faults tried and survived.
"""

import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from chaos.schedule import FAULTS, MARK, Fault, draw, is_served, marked, strike
from differences import read_differences

from cluster.claims import read_holder
from sweeps.records import read_json, read_rows
from sweeps.store import Store, log_stops, read_metrics, read_plan

ROOT = Path(__file__).resolve().parents[2]
CELLS, STEPS = 12, 20
BEAT_SECONDS = 0.25
SILENCE_SECONDS = 12 * BEAT_SECONDS
DEADLINE_SECONDS = 400.0
"""Of one schedule, on a busy machine."""
SUBMISSIONS = 25
CLOCK = ("seconds", "started", "ended", "host", "tokens_per_second", "peak_memory_bytes", "attempt")

STUDY = f"""
name: NAME
corpus: {{source: markov, options: {{vocab_size: 8, tokens: 60000, seed: 3}}}}
context: 32
families: [llama]
grid: {{type: points, points: [{{size: 10000, tokens: {STEPS * 256}}}]}}
seeds: {list(range(CELLS))}
training: {{batch_tokens: 256, learning_rate: 0.01}}
trainer: chaotic.py:train
"""
# A logistic map: a step that is left out, repeated or taken from the wrong state changes all that follow.
TRAINER = """
import time

def train(cell, io):
    state = io.restore() or {"step": 0, "x": 0.1 + cell.seed / 100}
    for step in range(state["step"] + 1, cell.steps + 1):
        time.sleep(0.06)
        state = {"step": step, "x": 3.9 * state["x"] * (1 - state["x"])}
        io.log(step * cell.batch_tokens, {"train_loss": state["x"], "half": state["x"] / 2})
        io.checkpoint(step * cell.batch_tokens, lambda: state)
    return state["x"]
"""


@dataclass
class Verdict:
    """What came of a schedule."""

    seed: int
    log: list[str] = field(default_factory=list)
    """What was done when."""
    done: list[str] = field(default_factory=list)
    """The names of the faults that found something to hit."""
    problems: list[str] = field(default_factory=list)
    """In what the end differs from an undisturbed one; empty: survived."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: what each cell's results and rows must be, and an empty database that costs no making."""

    outcomes: dict[str, Any]
    template: Path


class Submitted:
    """The study under its schedule: the driver at work, drivers that were frozen, and the log."""

    def __init__(self, folder: Path, name: str, verdict: Verdict, tracking_uri: str | None) -> None:
        self.folder, self.store, self.name, self.verdict = folder, Store(folder / "store"), name, verdict
        self.tracking_uri = tracking_uri
        self.mark = uuid.uuid4().hex
        self.began = time.monotonic()
        self.count = 0
        self.driver = self.submit()

    def note(self, text: str) -> None:
        self.verdict.log.append(f"{time.monotonic() - self.began:6.1f} s  {self.rows():4d} rows  {text}")

    def rows(self) -> int:
        logs = self.store.root.glob("cells/*/attempts/*/log.jsonl")
        return sum(path.read_bytes().count(b"\n") for path in logs)

    def submit(self) -> "subprocess.Popen[bytes]":
        """The user's command, the same each time."""
        command = [sys.executable, str(ROOT / "escala.py"), "run", str(self.folder / "study.yaml"), "--allow-code"]
        command += ["--store", str(self.store.root), "--workers", "2", "--checkpoint-seconds", "0.2"]
        command += ["--tracking-uri", self.tracking_uri] if self.tracking_uri else []
        self.count += 1
        with self.output().open("wb") as out:
            return subprocess.Popen(command, env=environment(self.mark), cwd=self.folder, stdout=out, stderr=out)

    def output(self) -> Path:
        """What the last driver printed."""
        return self.folder / f"driver-{self.count}.txt"

    def said(self) -> str:
        lines = self.output().read_text(errors="replace").strip().splitlines()
        return " / ".join(lines[-3:])[-300:]

    def resubmit_if_ended(self) -> bool:
        """Whether the study is done: its driver ended by itself with 0. A driver that ended otherwise is followed."""
        code = self.driver.poll()
        if code == 0 and b"MLflow is behind" not in self.output().read_bytes():
            return True
        if code is not None:
            self.note(f"driver {self.driver.pid} ended with {code} ({self.said()}); submitted again")
            if self.count >= SUBMISSIONS or time.monotonic() - self.began > DEADLINE_SECONDS:
                raise TimeoutError(f"not done after {self.count} submissions")
            self.driver = self.submit()
        return False

    def wait(self, until: Callable[[], bool]) -> bool:
        """Until a condition holds, the command submitted again as needed. False where the study was done before."""
        while not until():
            if self.resubmit_if_ended():
                return False
            if time.monotonic() - self.began > DEADLINE_SECONDS:
                raise TimeoutError(f"not done in {DEADLINE_SECONDS:.0f} s; the driver said: {self.said()}")
            time.sleep(0.05)
        return True


def environment(mark: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ESCALA_", "MLFLOW_", "RAY_"))}
    quick = {"ESCALA_BEAT_SECONDS": str(BEAT_SECONDS), "ESCALA_HANG_SECONDS": "60", "OMP_NUM_THREADS": "1"}
    quick |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return kept | quick | {MARK: mark, "PYTHONPATH": str(ROOT)}


# --- the schedule --------------------------------------------------------------------------------------------------


def run_schedule(seed: int, folder: Path, reference: Reference) -> Verdict:
    """Run the study in `folder`, an empty one, under the schedule of a seed, and judge how it ended."""
    verdict = Verdict(seed)
    name = f"chaos-{seed}"
    (folder / "study.yaml").write_text(STUDY.replace("NAME", name))
    (folder / "chaotic.py").write_text(TRAINER)
    shutil.copytree(reference.template, folder / "store")
    faults, dice = draw(seed, CELLS * STEPS), random.Random(seed)
    with _server(folder if is_served(seed) else None) as server:
        under = Submitted(folder, name, verdict, server.uri if server else None)
        try:
            for fault in faults:
                if not under.wait(lambda fault=fault: under.rows() >= fault.rows):  # type: ignore[misc]
                    break
                time.sleep(fault.delay)
                if _inflict(fault, under, server, dice):
                    verdict.done.append(fault.name)
            under.wait(lambda: False)
            under.note("done")
            verdict.problems += _judge(under, reference, server.database if server else None)
        except TimeoutError as error:
            verdict.problems.append(str(error))
        finally:
            verdict.problems += _clean(under)
            verdict.seconds = time.monotonic() - under.began
    return verdict


def _inflict(fault: Fault, under: Submitted, server: "Server | None", dice: random.Random) -> bool:
    """Do a fault. Whether there was something to do it to."""
    if fault.name == "driver killed at start":
        under.wait(lambda: under.driver.poll() is None)
        if under.rows():  # a fresh start is wanted
            under.note(f"driver killed: SIGKILL to driver {under.driver.pid}, for a fresh start")
            under.driver.kill()
            under.driver.wait()
            under.driver = under.submit()
        time.sleep(dice.uniform(0.2, 6.0))
    if fault.name.startswith("driver"):
        if under.driver.poll() is not None:
            return False
        if fault.name == "driver frozen":
            return _freeze_driver(under)
        number = signal.SIGTERM if fault.name == "driver terminated" else signal.SIGKILL
        under.driver.send_signal(number)
        under.note(f"{fault.name}: {number.name} to driver {under.driver.pid}")
        under.driver.wait(timeout=120)
        return True
    if fault.name == "MLflow killed":
        assert server is not None
        server.kill()
        under.note("MLflow killed")
        time.sleep(dice.uniform(0.5, 3))
        server.start()
        under.note("MLflow started again")
        return True
    struck = strike(fault, under.store, under.mark, lambda: under.driver.poll() is None)
    under.note(f"{fault.name}: {struck or 'there was none'}")
    return struck is not None


def _freeze_driver(under: Submitted) -> bool:
    """Stop the driver, let a second one take over, wake the first: it must see that it is out, and leave."""

    def number() -> int:
        holder = read_holder(under.store, under.name)
        return holder.number if holder is not None else -1

    holder = read_holder(under.store, under.name)
    if holder is None or holder.record["pid"] != under.driver.pid:
        under.note("driver frozen: it holds nothing yet")
        return False
    frozen, before = under.driver, holder.number
    frozen.send_signal(signal.SIGSTOP)
    under.note(f"driver frozen: SIGSTOP to driver {frozen.pid}")
    while (holder := read_holder(under.store, under.name)) is not None and holder.silent_seconds < SILENCE_SECONDS:
        time.sleep(0.1)
    under.driver = under.submit()
    under.wait(lambda: number() > before)
    rows = under.rows()
    patience = time.monotonic() + 20
    under.wait(lambda: under.rows() > rows + 3 or time.monotonic() > patience)
    frozen.send_signal(signal.SIGCONT)
    under.note(f"SIGCONT to driver {frozen.pid}, which driver {under.driver.pid} has replaced")
    try:
        code = frozen.wait(timeout=120)
    except subprocess.TimeoutExpired:
        under.verdict.problems.append("a driver that was replaced while it was frozen does not leave")
        return True
    under.note(f"the replaced driver left with {code}")
    if code == 0:
        under.verdict.problems.append("a driver that was replaced said that it had done its work")
    return True


def _clean(under: Submitted) -> list[str]:
    """Nothing may be left of the schedule after its driver. What is left is named, and ended by its id."""
    deadline = time.monotonic() + 40
    while (left := marked(under.mark)) and under.driver.poll() is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    words = []
    for process in left:
        with suppress(psutil.Error):
            words.append(f"left behind: {process.pid} {' '.join(process.cmdline())[:120]}")
            process.kill()
    if under.driver.poll() is None:
        under.driver.kill()
    under.driver.wait()
    return words


# --- the verdict ---------------------------------------------------------------------------------------------------


def outcome(store: Store, cell_id: str) -> Any:
    """What of a cell must not depend on what happened on the way."""
    result = read_json(store.cell(cell_id) / "result.json")
    rows = [(row["tokens"], row["metrics"]) for row in read_metrics(store, cell_id)]
    return {key: value for key, value in result.items() if key not in CLOCK}, rows


def _judge(under: Submitted, reference: Reference, database: Path | None) -> Iterator[str]:
    store = under.store
    planned = [entry["id"] for entry in read_plan(store, under.name)["cells"]]
    if sorted(planned) != sorted(reference.outcomes):
        yield "the plan is another"
    there = sorted(path.name for path in (store.root / "cells").iterdir())
    if there != sorted(planned):
        yield f"{len(there)} cells in the store, {len(planned)} planned"
    for cell_id in planned:
        if not (store.cell(cell_id) / "result.json").exists():
            yield f"{cell_id} has no result"
            continue
        if outcome(store, cell_id) != reference.outcomes[cell_id]:
            yield f"{cell_id} ended otherwise than undisturbed"
        if read_differences(store, cell_id):
            yield f"{cell_id} is marked as not deterministic"
        counted = Counter(
            (row["tokens"], key)
            for epoch, stop in log_stops(store, cell_id).items()
            for row in read_rows(store.attempt(cell_id, epoch) / "log.jsonl", 0, stop)[0]
            for key in row["metrics"]
        )
        if doubled := [pair for pair, count in counted.items() if count > 1]:
            yield f"{cell_id} has {len(doubled)} points twice in its logs"
    yield from _judge_mirror(store, under.name, planned, database or store.root / "mlflow" / "mlflow.db")


def _judge_mirror(store: Store, study: str, planned: list[str], database: Path) -> Iterator[str]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        query = (
            "select cell.value, cell.run_uuid from tags cell join runs using (run_uuid) join experiments "
            "using (experiment_id) where cell.key = 'escala.cell' and experiments.name = ? "
            "and runs.lifecycle_stage = 'active'"
        )
        runs = connection.execute(query, (study,)).fetchall()
        count = Counter(cell_id for cell_id, _ in runs)
        if count != Counter(planned):
            yield f"MLflow has {len(runs)} runs of {len(count)} cells for {len(planned)}"
        for cell_id, run in runs:
            query = "select key, step, value, timestamp from metrics where run_uuid = ?"
            rows = connection.execute(query, (run,)).fetchall()
            logged = {
                (key, row["tokens"], value, round(row["time"] * 1000))
                for row in read_metrics(store, cell_id)
                for key, value in row["metrics"].items()
            }
            if len(rows) != len(logged) or set(rows) != logged:
                yield f"{cell_id} has {len(rows)} points in MLflow, {len(logged)} in the store, not all alike"


# --- the MLflow server ---------------------------------------------------------------------------------------------


class Server:
    """An MLflow server on 127.0.0.1 over a database file, which may be killed and started again."""

    def __init__(self, database: Path) -> None:
        self.database = database
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", (self.database.parent / "artifacts").as_uri()]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.database.parent / "server.txt").open("ab") as out:
            self.process = subprocess.Popen(command, env={**os.environ, **quiet}, stdout=out, stderr=out)
        deadline = time.monotonic() + 120
        try:
            while time.monotonic() < deadline:
                with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
                time.sleep(0.1)
            raise TimeoutError("the MLflow server did not start")
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL to the server and its children."""
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=20)


@contextmanager
def _server(folder: Path | None) -> Iterator[Server | None]:
    if folder is None:
        yield None
        return
    shutil.copyfile(folder / "store" / "mlflow" / "mlflow.db", folder / "server.db")
    server = Server(folder / "server.db")
    try:
        yield server
    finally:
        server.kill()


# --- all of them ---------------------------------------------------------------------------------------------------


def make_reference(folder: Path) -> Reference:
    """Run the study once without faults, in `folder`, an empty one."""
    verdict = Verdict(-1)
    (folder / "study.yaml").write_text(STUDY.replace("NAME", "reference"))
    (folder / "chaotic.py").write_text(TRAINER)
    under = Submitted(folder, "reference", verdict, None)
    try:
        if under.driver.wait(timeout=DEADLINE_SECONDS) != 0:
            raise RuntimeError(f"the undisturbed run failed: {under.said()}")
    finally:
        _clean(under)
    cells = [entry["id"] for entry in read_plan(under.store, "reference")["cells"]]
    outcomes = {cell_id: outcome(under.store, cell_id) for cell_id in cells}
    template = folder / "template"
    shutil.copytree(under.store.root, template, ignore=shutil.ignore_patterns("cells", "studies"))
    return Reference(outcomes, template)


def table(verdicts: list[Verdict]) -> str:
    """Fault | times | survived, as Markdown."""
    tried = Counter(name for verdict in verdicts for name in verdict.done)
    survived = Counter(name for verdict in verdicts if not verdict.problems for name in verdict.done)
    lines = ["| fault | times | survived |", "|---|---|---|"]
    lines += [f"| {name}: {words} | {tried[name]} | {survived[name]} |" for name, words in FAULTS.items()]
    return "\n".join(lines)


def main(first: int, seeds: int) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is ended
    folder = Path(tempfile.mkdtemp(prefix="escala-chaos-"))
    (folder / "reference").mkdir()
    reference = make_reference(folder / "reference")
    verdicts = []
    for seed in range(first, first + seeds):
        place = folder / f"seed-{seed}"
        place.mkdir()
        verdict = run_schedule(seed, place, reference)
        verdicts.append(verdict)
        print(f"\nseed {seed}: {'FAILED' if verdict.problems else 'survived'} in {verdict.seconds:.0f} s")
        print("\n".join(f"  {line}" for line in [*verdict.log, *verdict.problems]), flush=True)
        if not verdict.problems:
            shutil.rmtree(place)
    failed = [verdict.seed for verdict in verdicts if verdict.problems]
    print(f"\n{len(verdicts) - len(failed)} of {len(verdicts)} schedules survived, {CELLS} cells each.\n")
    print(table(verdicts))
    if failed:
        print(f"\nfailed: seeds {failed}; their stores are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:] if re.fullmatch(r"\d+", word)]
    sys.exit(main(arguments[1] if len(arguments) > 1 else 0, arguments[0] if arguments else 200))
