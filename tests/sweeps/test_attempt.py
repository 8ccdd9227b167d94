"""An attempt resumes where the last one stopped, to the bit; says how it ended; and harms nobody who came after it."""

import dataclasses
import gc
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from differences import read_differences
from small import make_cell, put

from sweeps import attempt as attempts
from sweeps import devices, training
from sweeps.attempt import run_attempt, run_attempts
from sweeps.cell import Cell
from sweeps.checkpoints import load
from sweeps.corpora import Corpus
from sweeps.evaluation import Evaluation
from sweeps.records import append_rows, read_json, read_rows, write_json
from sweeps.stacking import Solo, Stack
from sweeps.store import (
    Attempt,
    Store,
    ask_to_stop,
    attempt_epochs,
    begin_attempt,
    cell_state,
    checkpoint_paths,
    forgive,
    read_metrics,
    record_error,
)
from sweeps.usercode import trainer_identity

ROOT = Path(__file__).resolve().parents[2]
FRESH = itertools.count(1000)


def start(
    store: Store, cell_id: str, fault: str = "", base_dir: Path | None = None, **options: Any
) -> "subprocess.Popen[str]":
    """An attempt in a process of its own, which prints how it ended."""
    code = (
        "import sys, json; from pathlib import Path\n"
        "from sweeps.store import Store; from sweeps.attempt import run_attempt\n"
        f"base = {base_dir and str(base_dir)!r}\n"
        f"ended = run_attempt(Store(Path({str(store.root)!r})), {cell_id!r}, study='s', "
        f"base_dir=base and Path(base), **{options!r})\n"
        "print(json.dumps(vars(ended)))"
    )
    environment = {**os.environ, "ESCALA_FAULT": fault}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def outcome(store: Store, cell_id: str) -> tuple[Any, ...]:
    """What must not depend on what happened on the way."""
    result = read_json(store.cell(cell_id) / "result.json")
    kept = [result[key] for key in ("state", "val_loss_final", "loss_at_start", "tokens", "flops", "steps")]
    rows = [
        (row["tokens"], {key: value for key, value in row["metrics"].items() if key != "tokens_per_second"})
        for row in read_metrics(store, cell_id)
    ]
    return kept, rows


def test_an_error_in_the_code_is_recorded_with_its_traceback_and_not_raised(corpus: Corpus, store: Store) -> None:
    cell = make_cell(corpus, family="gone.py:family")
    ended = run_attempt(store, put(store, cell), study="s")
    assert ended.state == "code"
    text = (store.attempt(cell.id, 0) / "error.txt").read_text()
    assert text.startswith("code: InputError: ")
    assert "Traceback" in text
    assert not (store.cell(cell.id) / "result.json").exists()


def refused_by_a_gpu() -> None:
    raise torch.cuda.OutOfMemoryError("out of memory")


def refused_by_the_host() -> None:
    torch.empty(10**15)


@pytest.mark.parametrize("refused", [refused_by_a_gpu, refused_by_the_host])
def test_an_attempt_that_gets_no_memory_is_told_so_and_leaves_nothing_in_that_of_its_worker(
    refused: Callable[[], None], corpus: Corpus, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker tries the next cell at once, or the same again, and looks for room before Python looks for cycles."""
    run_attempt(store, put(store, make_cell(corpus, 2, seed=82)), study="s")  # the imports of a first one leave more
    gc.collect()
    built: list[Any] = []

    def fail(self: Solo, *_: Any, **__: Any) -> Any:
        built.append(weakref.ref(self.table.values))
        refused()

    monkeypatch.setattr(Solo, "backward", fail)
    gc.disable()
    try:
        ended = run_attempt(store, put(store, make_cell(corpus, 2, seed=83)), study="s")
        assert ended.state == "out_of_memory"
        assert built[0]() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_second_attempt_keeps_the_numerics_of_the_first(corpus: Corpus, store: Store) -> None:
    cell = make_cell(corpus, steps=3, seed=9)
    put(store, cell)
    first = dataclasses.replace(cell, corpus="missing")
    write_json(store.cell(cell.id) / "cell.json", {"id": cell.id, "identity": first.identity, "counts": {}})
    assert [one.state for one in run_attempts(store, [cell.id], study="s", threads=2)] == ["code"]
    put(store, cell)
    assert run_attempt(store, cell.id, study="s").state == "finished"
    numerics = [read_json(store.attempt(cell.id, epoch) / "attempt.json")["numerics"] for epoch in (0, 1)]
    assert numerics[0] == numerics[1]
    assert numerics[1]["threads"] == 2
    assert json.dumps(read_json(store.cell(cell.id) / "result.json")["numerics"]) == json.dumps(numerics[1])


def wait_for(condition: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def once_it_logs(store: Store, cell_id: str, act: Callable[[], object]) -> None:
    """Do something, in a thread, once the cell's first attempt has logged a row."""

    def wait() -> None:
        wait_for(lambda: (store.attempt(cell_id, 0) / "log.jsonl").exists())
        act()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
def test_a_killed_attempt_is_resumed_from_its_checkpoint_to_the_same_bits(corpus: Corpus, store: Store) -> None:
    killed = make_cell(corpus, 60, data_seed=5)
    elsewhere = Store(store.root.parent / "other")
    (elsewhere.root / "corpora").parent.mkdir()
    (elsewhere.root / "corpora").symlink_to(store.root / "corpora")
    put(store, killed), put(elsewhere, killed)
    assert run_attempt(elsewhere, killed.id, study="s").state == "finished"
    process = start(store, killed.id, "log.after_write:crash@20", checkpoint_seconds=0.0)
    assert process.wait() == -signal.SIGKILL
    kept = checkpoint_paths(store.checkpoints(killed.id, 0))
    assert kept
    assert cell_state(store, killed.id).state == "planned"
    assert run_attempt(store, killed.id, study="s").state == "finished"
    assert outcome(store, killed.id) == outcome(elsewhere, killed.id)
    assert read_differences(store, killed.id) == []
    resumed = read_json(store.attempt(killed.id, 1) / "heartbeat.json")
    assert resumed["tokens"] == killed.tokens
    assert resumed["resumed_from"] == int(kept[-1].name) > 0


@pytest.mark.slow
def test_sigterm_keeps_a_checkpoint_and_ends_the_attempt_as_preempted(corpus: Corpus, store: Store) -> None:
    cell = make_cell(corpus, 3000, data_seed=6)
    put(store, cell)
    process = start(store, cell.id)
    log = store.attempt(cell.id, 0) / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size > 1000)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert json.loads(out)["state"] == "preemption"
    (path,) = checkpoint_paths(store.checkpoints(cell.id, 0))
    assert load(path) is not None
    assert cell_state(store, cell.id).state == "planned"
    assert (cell_state(store, cell.id).reason or "").endswith("preemption: SIGTERM")


def test_a_request_in_the_store_stops_an_attempt_that_runs_elsewhere(corpus: Corpus, store: Store) -> None:
    cell = make_cell(corpus, 3000, data_seed=7)
    put(store, cell)
    once_it_logs(store, cell.id, lambda: ask_to_stop(Attempt(store, cell.id, 0), "stopped", "paused by a test"))
    ended = run_attempt(store, cell.id, study="s")
    assert (ended.state, ended.reason) == ("stopped", "paused by a test")
    assert checkpoint_paths(store.checkpoints(cell.id, 0))


def test_an_attempt_that_lost_its_lease_ends_and_leaves_the_cell_to_its_successor(corpus: Corpus, store: Store) -> None:
    cell = make_cell(corpus, 3000, data_seed=8)
    put(store, cell)
    once_it_logs(store, cell.id, lambda: begin_attempt(store, cell.id, {"study": "s", "numerics": {}}))
    ended = run_attempt(store, cell.id, study="s")
    assert ended.state == "superseded"
    assert not (store.attempt(cell.id, 0) / "error.txt").exists()
    assert not (store.cell(cell.id) / "result.json").exists()


def test_rows_that_a_zombie_writes_after_it_was_replaced_do_not_count(corpus: Corpus, store: Store) -> None:
    cell = make_cell(corpus, 20, data_seed=9)
    put(store, cell)
    zombie = begin_attempt(store, cell.id, {"study": "s", "numerics": {}})
    begin_attempt(store, cell.id, {"study": "s", "numerics": {}})
    with (zombie.folder / "log.jsonl").open("ab", buffering=0) as stream:
        append_rows(stream, [{"time": 1.0, "tokens": 512, "metrics": {"train_loss": 9.0}}])
    assert read_metrics(store, cell.id) == []


def test_what_does_not_fit_into_memory_now_may_fit_later(
    corpus: Corpus, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [put(store, make_cell(corpus, steps=3, seed=seed)) for seed in (71, 72)]
    with monkeypatch.context() as scarce:
        scarce.setattr(devices, "HOST_SHARE", 1e-9)
        ended = run_attempts(store, ids, study="s")
    assert [one.state for one in ended] == ["out_of_memory"], "the second was not begun"
    assert "does not fit" in str(ended[0].reason)
    assert cell_state(store, ids[0]).state == "planned"
    assert [one.state for one in run_attempts(store, ids, study="s")] == ["finished", "finished"]


def test_a_cell_out_of_memory_is_tried_once_more_with_half_the_micro_batch(corpus: Corpus, store: Store) -> None:
    cell = make_cell(corpus, 10, data_seed=10)
    put(store, cell)
    twin = make_cell(corpus, 10, data_seed=10, seed=0)
    assert twin.id == cell.id
    assert run_attempt(store, cell.id, study="s").state == "finished"
    whole = read_json(store.cell(cell.id) / "result.json")
    (store.cell(cell.id) / "result.json").unlink()
    record_error(Attempt(store, cell.id, 0), "out_of_memory", "too large")
    assert cell_state(store, cell.id).state == "planned"
    assert run_attempt(store, cell.id, study="s").state == "finished"
    halved = read_json(store.cell(cell.id) / "result.json")
    assert halved["numerics"]["micro_batch"] == whole["numerics"]["micro_batch"] // 2
    assert halved["val_loss_final"] == pytest.approx(whole["val_loss_final"], rel=1e-4)
    (store.cell(cell.id) / "result.json").unlink()
    record_error(Attempt(store, cell.id, 1), "out_of_memory", "still too large")
    assert cell_state(store, cell.id).state == "failed"


@pytest.mark.parametrize(
    ("earlier", "cut"), [([(1, 16), None], 4), ([None, (1, 16)], 4), ([(1, 16), (2, 2)], 2), ([(2, 8), (2, 8)], 8)]
)
def test_members_of_a_stack_take_the_least_micro_batch_and_no_more_than_a_stack_of_their_number_bears(
    earlier: list[tuple[int, int] | None],
    cut: int,
    corpus: Corpus,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, taken, backward = devices.choose_numerics, [], Stack.backward

    def noted(self: Stack, batches: torch.Tensor, micro_batch: int, *rest: Any, **named: Any) -> torch.Tensor:
        taken.append(micro_batch)
        return backward(self, batches, micro_batch, *rest, **named)

    monkeypatch.setattr(Stack, "backward", noted)
    monkeypatch.setattr(attempts, "choose_numerics", lambda *a, **k: dataclasses.replace(here(*a, **k), micro_batch=4))
    ids = [put(store, make_cell(corpus, 2, seed=seed, data_seed=next(FRESH))) for seed in (91, 92)]
    for cell_id, kept in zip(ids, earlier, strict=True):
        if kept is not None:
            numerics = here(make_cell(corpus, 2), stack=kept[0]).to_json() | {"micro_batch": kept[1]}
            record_error(begin_attempt(store, cell_id, {"numerics": numerics}), "preemption", "a test")
    assert [one.state for one in run_attempts(store, ids, study="s")] == ["finished", "finished"]
    assert set(taken) == {cut}
    for cell_id in ids:
        last = store.attempt(cell_id, attempt_epochs(store, cell_id)[-1])
        assert read_json(last / "attempt.json")["numerics"]["micro_batch"] == cut
        assert read_json(store.cell(cell_id) / "result.json")["numerics"]["micro_batch"] == cut


def test_members_of_a_stack_have_on_record_what_their_program_does(corpus: Corpus, store: Store) -> None:
    """Whatever they did alone before: it has one number of threads, and is not compiled."""
    ids = [put(store, make_cell(corpus, 2, seed=seed, data_seed=next(FRESH))) for seed in (93, 94, 95)]
    alone = devices.choose_numerics(make_cell(corpus, 2)).to_json()
    for cell_id, own in zip(ids[1:], ({"threads": 2}, {"compile": True}), strict=True):
        record_error(begin_attempt(store, cell_id, {"numerics": alone | own}), "preemption", "a test")
    assert [one.state for one in run_attempts(store, ids, study="s")] == ["finished"] * 3
    for cell_id in ids:
        numerics = read_json(store.cell(cell_id) / "result.json")["numerics"]
        assert (numerics["stack"], numerics["threads"], numerics["compile"]) == (3, 1, False)


def test_a_value_is_compared_within_the_numerics_of_whichever_attempt_logged_it(corpus: Corpus, store: Store) -> None:
    """Whole micro-batches, out of memory, halves, preempted, halves: the last reruns what the first has logged."""
    cell = make_cell(corpus, 20, data_seed=12)
    put(store, cell)
    assert run_attempt(store, cell.id, study="s").state == "finished"
    (store.cell(cell.id) / "result.json").unlink()
    for path in checkpoint_paths(store.checkpoints(cell.id, 0)):
        (path / "state.safetensors").write_bytes(b"damaged")
    record_error(Attempt(store, cell.id, 0), "out_of_memory", "too large")
    whole = read_json(store.attempt(cell.id, 0) / "attempt.json")["numerics"]
    halves = whole | {"micro_batch": whole["micro_batch"] // 2}
    record_error(begin_attempt(store, cell.id, {"study": "s", "numerics": halves}), "preemption", "a test")
    assert run_attempt(store, cell.id, study="s").state == "finished"
    assert read_json(store.attempt(cell.id, 2) / "attempt.json")["numerics"] == halves
    again = read_json(store.cell(cell.id) / "result.json")["val_loss_final"]
    logged = read_metrics(store, cell.id)[-1]["metrics"]["val_loss_final"]
    assert again != logged, "it was computed again, and rounds otherwise"
    assert read_differences(store, cell.id) == []


BUDGETS = [("infrastructure", 3), ("out_of_memory", 1), ("code", 0), ("preemption", 30), ("stopped", 30)]


@pytest.mark.parametrize(("kind", "survived"), BUDGETS)
def test_budgets_are_kept_exactly_and_apart(kind: str, survived: int, store: Store, corpus: Corpus) -> None:
    cell = make_cell(corpus, 11, data_seed=100 + survived + len(kind))
    put(store, cell)
    for other in ("preemption", "stopped"):
        record_error(begin_attempt(store, cell.id, {}), other, "not charged")
    for _ in range(survived):
        record_error(begin_attempt(store, cell.id, {}), kind, "again")
        assert cell_state(store, cell.id).state == "planned"
    record_error(begin_attempt(store, cell.id, {}), kind, "once more")
    charged = kind not in ("preemption", "stopped")
    assert cell_state(store, cell.id).state == ("failed" if charged else "planned")
    if charged:
        forgive(store, cell.id, "a test")
        assert cell_state(store, cell.id).state == "planned"
        assert attempt_epochs(store, cell.id)[-1] == survived + 2


def test_a_value_that_comes_out_otherwise_after_a_resume_is_noted_and_the_first_stands(
    corpus: Corpus, store: Store
) -> None:
    cell = make_cell(corpus, 20, data_seed=11)
    put(store, cell)
    assert run_attempt(store, cell.id, study="s").state == "finished"
    (store.cell(cell.id) / "result.json").unlink()
    log = store.attempt(cell.id, 0) / "log.jsonl"
    rows, _ = read_rows(log)
    for path in checkpoint_paths(store.checkpoints(cell.id, 0)):
        (path / "state.safetensors").write_bytes(b"damaged")
    rows[3]["metrics"]["train_loss"] += 1e-12
    log.unlink()
    with log.open("ab", buffering=0) as stream:
        append_rows(stream, [{k: v for k, v in row.items() if k != "crc"} for row in rows])
    assert run_attempt(store, cell.id, study="s").state == "finished"
    (found,) = read_differences(store, cell.id)
    assert (found["attempt"], found["tokens"], found["metric"]) == (1, rows[3]["tokens"], "train_loss")
    assert found["logged"] == rows[3]["metrics"]["train_loss"] != found["recomputed"]
    assert read_metrics(store, cell.id)[3]["metrics"]["train_loss"] == found["logged"]


TRAINER = """
def train(cell, io):
    state = io.restore() or {"step": 0, "x": 1.0}
    for step in range(state["step"] + 1, cell.steps + 1):
        state = {"step": step, "x": state["x"] * 0.5}
        io.log(step * cell.batch_tokens, {"train_loss": state["x"]})
        io.checkpoint(step * cell.batch_tokens, lambda: state)
    return state["x"]
"""


def test_a_trainer_of_ones_own_runs_under_the_same_store_and_resumes(
    corpus: Corpus, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(TRAINER)
    cell: Cell = make_cell(corpus, 30, trainer=trainer_identity("mine.py:train", tmp_path))
    put(store, cell)
    refused = run_attempt(store, cell.id, study="s")
    assert refused.state == "code"
    assert "--allow-code" in (refused.reason or "")
    process = start(store, cell.id, "log.after_write:crash@20", checkpoint_seconds=0.0, base_dir=tmp_path)
    assert process.wait() != 0
    assert run_attempt(store, cell.id, study="s", base_dir=tmp_path).state == "finished"
    assert read_json(store.cell(cell.id) / "result.json")["val_loss_final"] == 0.5**30
    assert [row["metrics"] for row in read_metrics(store, cell.id)] == [{"train_loss": 0.5**k} for k in range(1, 31)]
    (tmp_path / "mine.py").write_text(TRAINER.replace("0.5", "0.25"))
    (store.cell(cell.id) / "result.json").unlink()
    changed = run_attempt(store, cell.id, study="s", base_dir=tmp_path)
    assert "has changed since this cell was planned" in (changed.reason or "")


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("ending", ["float", "outcome"])
def test_a_trainer_of_ones_own_that_ends_with_a_loss_that_is_not_finite_has_diverged(
    corpus: Corpus, store: Store, tmp_path: Path, loss: str, ending: str
) -> None:
    returned = f"float({loss!r})"
    if ending == "outcome":
        returned = f"Outcome(val_loss_final={returned}, loss_at_start=2.0)"
    (tmp_path / "mine.py").write_text(
        f"from sweeps.trainer import Outcome\n\ndef train(cell, io):\n    return {returned}\n"
    )
    cell = make_cell(corpus, 30, trainer=trainer_identity("mine.py:train", tmp_path))
    ended = run_attempt(store, put(store, cell), study="s", base_dir=tmp_path)
    assert (ended.state, ended.reason) == ("diverged", f"val_loss_final is {loss}")
    result = read_json(store.cell(cell.id) / "result.json")
    assert (result["state"], result["val_loss_final"]) == ("diverged", None)
    assert result["loss_at_start"] == (None if ending == "float" else 2.0)
    assert not (store.attempt(cell.id, 0) / "error.txt").exists()


def progress_of(store: Store, cell_id: str) -> tuple[Any, ...]:
    result = read_json(store.cell(cell_id) / "result.json")
    return tuple(result[key] for key in ("state", "steps", "tokens", "flops", "flops_spent"))


@pytest.mark.parametrize(
    "way", ["io.log(tokens, {'train_loss': float('nan')})", "io.checkpoint(tokens, dict); raise Diverged('hopeless')"]
)
def test_a_cell_that_its_trainer_gives_up_counts_the_steps_that_it_has_taken(
    corpus: Corpus, store: Store, tmp_path: Path, way: str
) -> None:
    (tmp_path / "mine.py").write_text(
        "from sweeps.trainer import Diverged\n\ndef train(cell, io):\n"
        "    for step in range(1, cell.steps + 1):\n        tokens = step * cell.batch_tokens\n"
        f"        if step == 50:\n            {way}\n"
        "        io.log(tokens, {'train_loss': 1.0})\n    return 1.0\n"
    )
    cell = make_cell(corpus, 700, trainer=trainer_identity("mine.py:train", tmp_path))
    assert run_attempt(store, put(store, cell), study="s", base_dir=tmp_path).state == "diverged"
    assert progress_of(store, cell.id) == ("diverged", 50, 50 * 512, 50 * 512, 50 * 512)


@pytest.mark.parametrize(("key", "state"), [("train_loss", "diverged"), ("step_seconds", "finished")])
def test_a_cell_that_diverges_at_a_step_that_an_earlier_attempt_has_logged_has_diverged(
    corpus: Corpus, store: Store, tmp_path: Path, key: str, state: str
) -> None:
    (tmp_path / "mine.py").write_text(
        "import math\nfrom pathlib import Path\n\ndef train(cell, io):\n"
        "    first = not (seen := Path(__file__).with_name('seen')).exists()\n    seen.touch()\n"
        f"    io.log(cell.batch_tokens, {{{key!r}: 1.0 if first else math.nan}})\n"
        "    if first:\n        raise MemoryError\n    return 1.0\n"
    )
    cell = make_cell(corpus, 10, trainer=trainer_identity("mine.py:train", tmp_path))
    assert run_attempt(store, put(store, cell), study="s", base_dir=tmp_path).state == "out_of_memory"
    ended = run_attempt(store, cell.id, study="s", base_dir=tmp_path)
    assert ended.state == state, ended.reason
    assert [row["metrics"] for row in read_metrics(store, cell.id)] == [{key: 1.0}]


def test_a_cell_whose_evaluation_is_not_finite_counts_the_steps_that_it_has_taken(
    corpus: Corpus, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, started = training.evaluate, []

    def lost(*args: Any) -> Evaluation:
        found = evaluate(*args)
        started.append(found.loss)
        return found if len(started) < 3 else dataclasses.replace(found, document_sums=found.document_sums * math.nan)

    monkeypatch.setattr(training, "evaluate", lost)
    cell = make_cell(corpus, 30, data_seed=84)
    ended = run_attempt(store, put(store, cell), study="s")
    assert (ended.state, ended.reason) == ("diverged", "val_loss is nan after 1,024 tokens")
    assert progress_of(store, cell.id) == ("diverged", 2, 1024, 1024, 1024)
    result = read_json(store.cell(cell.id) / "result.json")
    assert result["loss_at_start"] == started[0]
    assert result["epochs"] < 0.01
    assert result["seconds"]["train"] > 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("pass", "returned None. Let it return its final validation loss, a number in nats per token, or an Outcome"),
        ("return {'loss': 2.5}", "returned {'loss': 2.5}. Let it"),
        ("return 'low'", "returned low. Let it"),
        ("return Outcome()", "an Outcome that is finished with such a loss, or diverged"),
        ("return Outcome(state='done', val_loss_final=1.0)", "an Outcome that is finished with such a loss"),
        ("raise SystemExit(3)", r"ended its process, sys.exit\(3\). Let it return, or raise"),
        ("io.log(512.5, {'train_loss': 1.0})", "found 512.5 tokens seen; a whole number is wanted"),
        ("io.checkpoint(None, dict, last=True)", "found None tokens seen; a whole number is wanted"),
    ],
)
def test_what_a_trainer_of_ones_own_must_not_do_is_a_sentence(
    corpus: Corpus, store: Store, tmp_path: Path, body: str, words: str
) -> None:
    (tmp_path / "mine.py").write_text(f"from sweeps.trainer import Outcome\n\ndef train(cell, io):\n    {body}\n")
    cell = make_cell(corpus, 30, trainer=trainer_identity("mine.py:train", tmp_path))
    ended = run_attempt(store, put(store, cell), study="s", base_dir=tmp_path)
    assert ended.state == "code"
    assert re.search(words, ended.reason or "")
    assert cell_state(store, cell.id).state == "failed"


def test_a_trainer_of_ones_own_may_count_and_measure_in_numpy(corpus: Corpus, store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom sweeps.trainer import Outcome\n\ndef train(cell, io):\n"
        "    tokens = np.int64(512)\n    io.log(tokens, {'train_loss': np.float32(2)})\n"
        "    io.checkpoint(tokens, lambda: {'x': 1.0}, last=True)\n    return Outcome(val_loss_final=np.float32(1.5))\n"
    )
    cell = make_cell(corpus, 30, trainer=trainer_identity("mine.py:train", tmp_path))
    assert run_attempt(store, put(store, cell), study="s", base_dir=tmp_path).state == "finished"
    assert read_json(store.cell(cell.id) / "result.json")["val_loss_final"] == 1.5
    assert [row["tokens"] for row in read_metrics(store, cell.id)] == [512]
