"""At every fault point a crash, and a full disk where it writes: tried again, a cell ends as if nothing had been."""

import ast
import itertools
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from crashing import ROOT, Ended, Forker
from differences import read_differences
from small import make_cell, put

from cluster.claims import Claim, read_holder
from sweeps.cell import Cell
from sweeps.corpora import make_source, open_corpus, prepare
from sweeps.faults import POINTS, arm
from sweeps.records import read_json, read_rows
from sweeps.store import (
    Store,
    attempt_epochs,
    attempt_lives,
    begin_attempt,
    cell_state,
    checkpoint_paths,
    log_stops,
    open_store,
    read_end,
    read_metrics,
    study_names,
)
from sweeps.usercode import trainer_identity

# A trainer in which every step shows: a step that is left out or taken twice changes all that follow.
TRAINER = """
def train(cell, io):
    state = io.restore() or {"step": 0, "x": 0.3}
    for step in range(state["step"] + 1, cell.steps + 1):
        state = {"step": step, "x": 3.9 * state["x"] * (1 - state["x"])}
        io.log(step * cell.batch_tokens, {"train_loss": state["x"]})
        io.checkpoint(step * cell.batch_tokens, lambda: state, last=True)  # waits: each is passed at a known step
    return state["x"]
"""
STEPS = 6
CLOCK = ("seconds", "started", "ended", "host", "tokens_per_second", "peak_memory_bytes", "attempt")
"""What of a result may depend on how it came about."""


@dataclass(frozen=True)
class Bench:
    """Where cases run: a corpus that all their stores share, and a process that forks them."""

    folder: Path
    corpus: Path
    cells: dict[str, Cell]
    fork: Forker
    numbers: Iterator[int]

    def store(self, trainer: str = "") -> Store:
        """A new store that knows one cell: of `mine`, the trainer above, or of `own`, Escala's."""
        root = self.folder / f"store-{next(self.numbers)}"
        store = open_store(root)
        (root / "corpora").symlink_to(self.corpus.parent)
        if trainer:
            put(store, self.cells[trainer])
        return store

    def attempt(self, store: Store, trainer: str, fault: str = "") -> Ended:
        cell_id = self.cells[trainer].id
        return self.fork("attempt", fault, root=str(store.root), cell=cell_id, base_dir=str(self.folder))

    def finish(self, store: Store, trainer: str) -> tuple[Any, ...]:
        """Try the cell until it ends, as a driver does, and say how."""
        cell_id = self.cells[trainer].id
        for _ in range(3):
            if cell_state(store, cell_id).result is None:
                self.attempt(store, trainer)
        return outcome(store, cell_id)


def outcome(store: Store, cell_id: str) -> tuple[Any, ...]:
    """What must not depend on what happened on the way. Every (tokens, key) stands in the logs once."""
    result = read_json(store.cell(cell_id) / "result.json")
    written = Counter(
        (row["tokens"], key)
        for epoch, stop in log_stops(store, cell_id).items()
        for row in read_rows(store.attempt(cell_id, epoch) / "log.jsonl", 0, stop)[0]
        for key in row["metrics"]
    )
    assert set(written.values()) == {1}
    assert read_differences(store, cell_id) == []
    rows = [
        (row["tokens"], {key: value for key, value in row["metrics"].items() if key != "tokens_per_second"})
        for row in read_metrics(store, cell_id)
    ]
    return {key: value for key, value in result.items() if key not in CLOCK}, rows


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    # In memory where there is such a place: no power is cut here, so nothing is learned from waiting for a disk.
    memory = Path("/dev/shm")
    quick = memory if os.access(memory, os.W_OK) else tmp_path_factory.mktemp("crashes")
    folder = Path(tempfile.mkdtemp(dir=quick, prefix="escala-test-"))
    try:
        (folder / "mine.py").write_text(TRAINER)
        source = make_source("markov", None, {"vocab_size": 8, "tokens": 60_000, "seed": 3})
        corpus = open_corpus(folder, prepare(source, "bytes", folder).fingerprint)
        mine = make_cell(corpus, STEPS, trainer=trainer_identity("mine.py:train", folder))
        cells = {"mine": mine, "own": make_cell(corpus, 4)}
        with Forker() as fork:
            yield Bench(folder, folder / "corpora" / corpus.info.fingerprint, cells, fork, itertools.count())
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> dict[str, tuple[Any, ...]]:
    found = {}
    for trainer in ("mine", "own"):
        store = bench.store(trainer)
        assert bench.attempt(store, trainer).answer["state"] == "finished"
        found[trainer] = outcome(store, bench.cells[trainer].id)
        assert len(found[trainer][1]) > 3
    return found


@pytest.fixture(scope="module")
def passed(bench: Bench) -> dict[str, int]:
    """How often an attempt that nothing disturbs passes each point."""
    where = {"root": str(bench.store("mine").root), "cell": bench.cells["mine"].id, "base_dir": str(bench.folder)}
    found: dict[str, int] = bench.fork("count", job="attempt", **where).answer
    return found


ATTEMPT = [name for name in POINTS if name.partition(".")[0] not in ("plan", "claim", "leftovers", "mirror", "search")]
WRITES = [name for name in ATTEMPT if name.endswith((".before_write", ".before_rename", ".before_link"))]
FAILS = "log.before_write:enospc@4,"
"""Makes an attempt fail, so that it has an error to record."""


def faults(passed: dict[str, int], point: str, action: str) -> list[str]:
    """Of a point's passings those to try, as faults: the first two, a middle one, the last; of a record's, all."""
    if point == "error.before_write":  # passed by an attempt that fails
        return [f"log.before_write:enospc@4,{point}:{action}"]
    total = passed[point]
    every = range(1, total + 1)
    chosen = every if point.startswith("record.") else sorted({1, 2, total // 2 + 1, total} & set(every))
    return [f"{point}:{action}@{n}" for n in chosen]


def said_full(said: str, point: str) -> bool:
    """Whether the sentence about a full disk was said; a point between two writes raises what no disk would."""
    between = point in ("documents.before_write", "error.before_write", "plan.before_write")
    return "the disk is full: free some space" in said or (between and "No space left on device" in said)


@pytest.mark.parametrize("point", ATTEMPT)
def test_a_crash_anywhere_changes_nothing(
    bench: Bench, undisturbed: dict[str, Any], passed: dict[str, int], point: str
) -> None:
    for fault in faults(passed, point, "crash"):
        store = bench.store("mine")
        ended = bench.attempt(store, "mine", fault)
        assert ended.signal == signal.SIGKILL, f"{fault} was not passed: {ended}"
        cell_id = bench.cells["mine"].id
        living = [epoch for epoch in attempt_epochs(store, cell_id) if attempt_lives(store, cell_id, epoch)]
        assert not living, f"{fault}: nobody could tell that the attempt is over, and would wait for it"
        assert bench.finish(store, "mine") == undisturbed["mine"], fault


@pytest.mark.parametrize("point", WRITES)
def test_a_full_disk_anywhere_changes_nothing(
    bench: Bench, undisturbed: dict[str, Any], passed: dict[str, int], point: str
) -> None:
    for fault in faults(passed, point, "enospc"):
        store, cell_id = bench.store("mine"), bench.cells["mine"].id
        ended = bench.attempt(store, "mine", fault)
        if cell_state(store, cell_id).result is None:
            said = ended.answer["reason"] if ended.answer else ended.error
            assert said_full(said, point), f"{fault}: {ended}"
            assert not ended.answer or ended.answer["state"] == "infrastructure"
            assert not ended.answer or (read_end(store, cell_id, 0) or ("",))[0] == "infrastructure"
        else:  # it was the last heartbeat
            assert ended.answer["state"] == "finished", f"{fault}: {ended}"
        assert bench.finish(store, "mine") == undisturbed["mine"], fault


@pytest.mark.parametrize("zombie", [False, True], ids=["power cut", "zombie"])
def test_a_checkpoint_ahead_of_the_log_is_passed_over(bench: Bench, undisturbed: dict[str, Any], zombie: bool) -> None:
    store, cell_id = bench.store("mine"), bench.cells["mine"].id
    bench.attempt(store, "mine", "checkpoint.after_rename:crash@5")
    log = store.attempt(cell_id, 0) / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))  # what was not on the disk yet
    if zombie:  # what attempt 0 wrote after it was replaced
        begin_attempt(store, cell_id, {"study": "s", "numerics": read_json(log.parent / "attempt.json")["numerics"]})
        log.write_bytes(whole)
    assert len(checkpoint_paths(store.checkpoints(cell_id, 0))) > 1
    assert bench.finish(store, "mine") == undisturbed["mine"]


@pytest.mark.parametrize("seed", range(6))
def test_crash_upon_crash_changes_nothing(bench: Bench, undisturbed: dict[str, Any], seed: int) -> None:
    draw = random.Random(seed)
    store, story = bench.store("mine"), []
    for _ in range(5):
        fault = f"{draw.choice(ATTEMPT)}:{draw.choice(('crash', 'crash', 'enospc'))}@{draw.randint(1, 4)}"
        story.append((fault, bench.attempt(store, "mine", fault)))
        if cell_state(store, bench.cells["mine"].id).result is not None:
            break
    assert bench.finish(store, "mine") == undisturbed["mine"], story
    assert len(attempt_epochs(store, bench.cells["mine"].id)) <= len(story) + 3


@pytest.mark.parametrize(
    "fault",
    [
        "log.after_write:crash@3",
        "checkpoint.before_write:enospc@2",
        "checkpoint.before_rename:crash@2",
        "checkpoint.after_rename:crash",
        "documents.before_write:crash",
        "record.before_rename:crash@3",
        "result.before_link:enospc",
        "result.after_link:crash",
    ],
)
def test_the_own_trainer_survives_as_well(bench: Bench, undisturbed: dict[str, Any], fault: str) -> None:
    store = bench.store("own")
    bench.attempt(store, "own", fault)
    assert bench.finish(store, "own") == undisturbed["own"]


# --- the driver's side ---------------------------------------------------------------------------------------------

STUDY = """
name: crashing
corpus: {source: markov}
context: 32
families: [llama]
grid: {type: points, points: [{size: 10000, tokens: 4000}, {size: 10000, tokens: 8000}]}
training: {batch_tokens: 256, learning_rate: 0.01}
trainer: mine.py:train
"""


def registered(store: Store) -> Any:
    plan = {key: value for key, value in read_json(store.study("crashing") / "plan.json").items() if key != "planned"}
    cells = {path.parent.name: read_json(path) for path in (store.root / "cells").glob("*/cell.json")}
    return plan, cells, (store.study("crashing") / "study.yaml").read_text()


@pytest.mark.slow
def test_a_study_goes_on_record_whole_or_not_at_all(bench: Bench) -> None:
    (bench.folder / "study.yaml").write_text(STUDY)
    arguments = {"study": str(bench.folder / "study.yaml"), "corpus": str(bench.corpus)}

    def fresh() -> tuple[Store, dict[str, str]]:
        root = bench.folder / f"store-{next(bench.numbers)}"
        return Store(root), {"root": str(root), **arguments}

    store, where = fresh()
    passed = bench.fork("count", job="register", **where).answer
    whole = registered(store)
    assert len(whole[1]) == 2
    assert {"plan.before_write", "claim.before_link", "claim.after_link", "record.before_write"} <= set(passed)
    tried = 0
    for point, total in passed.items():
        for n, action in itertools.product(range(1, total + 1), ("crash", "enospc")):
            if action == "enospc" and ".after" in point:
                continue
            store, where = fresh()
            ended = bench.fork("register", f"{point}:{action}@{n}", **where)
            killed, at_exit = ended.signal == signal.SIGKILL, ended.answer == 0  # how the claim ended is no matter
            assert killed or at_exit or said_full(ended.error, point), f"{point}:{action}@{n}: {ended}"
            if "crashing" in study_names(store):
                assert registered(store) == whole, "a plan is read only when all that it names is there"
            again = bench.fork("register", "", **where)
            assert not again.error, f"{point}:{action}@{n}"
            assert registered(store) == whole, f"{point}:{action}@{n}"
            holder = read_holder(store, "crashing")
            assert holder is not None
            assert not holder.lives
            tried += 1
    assert tried > 20


def test_a_driver_that_dies_while_it_ends_leftovers_leaves_them_to_the_next(
    bench: Bench, undisturbed: dict[str, Any]
) -> None:
    store, cell_id = bench.store("mine"), bench.cells["mine"].id
    bench.attempt(store, "mine", "log.after_write:crash@3")
    where = {"root": str(store.root), "cell": cell_id}
    assert bench.fork("settle", "leftovers.after_kill:crash", driver=0, **where).signal == signal.SIGKILL
    assert read_end(store, cell_id, 0) is None
    assert bench.fork("settle", "", driver=1, **where).answer is True
    assert read_end(store, cell_id, 0) == ("preemption", "its driver was gone")
    assert bench.finish(store, "mine") == undisturbed["mine"]


def test_a_claim_whose_maker_crashed_is_outbid(bench: Bench) -> None:
    (bench.folder / "study.yaml").write_text(STUDY)
    store = bench.store()
    where = {"root": str(store.root), "study": str(bench.folder / "study.yaml"), "corpus": str(bench.corpus)}
    assert bench.fork("register", "claim.before_link:crash", **where).signal == signal.SIGKILL
    assert read_holder(store, "crashing") is None
    assert bench.fork("register", "claim.after_link:crash", **where).signal == signal.SIGKILL
    with Claim(store, "crashing") as claim:
        assert claim.number == 1


# --- the list of points --------------------------------------------------------------------------------------------


def calls() -> Counter[str]:
    """The points that the code names in calls of `fault`, and how often."""
    found: Counter[str] = Counter()
    for path in [
        ROOT / "escala.py",
        *ROOT.glob("sweeps/*.py"),
        *ROOT.glob("cluster/*.py"),
        *ROOT.glob("analysis/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fault":
                (argument,) = node.args
                assert isinstance(argument, ast.Constant), f"{path}:{node.lineno}: a point is a name, not a computation"
                found[argument.value] += 1
    return found


def test_the_list_of_points_is_that_of_the_code() -> None:
    found = calls()
    assert set(found) <= set(POINTS), f"not listed: {set(found) - set(POINTS)}"
    missing = {name for name in POINTS if name not in found and not name.startswith("mirror.")}
    assert not missing, f"listed and passed nowhere: {missing}"


@pytest.mark.parametrize("text", ["nowhere:crash", "log.after_write:explode", "log.after_write"])
def test_a_fault_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no POINT:ACTION"):
        arm(text)
