"""Two processes train a cell as one does: the same batches, losses and checkpoints, whichever of the two goes on."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from differences import read_differences
from gangs import Gang, gang, stopping
from small import CONTEXT, make_cell, put

from sweeps.accounting import Shape
from sweeps.attempt import run_attempt
from sweeps.cell import Cell
from sweeps.corpora import Corpus
from sweeps.errors import InputError
from sweeps.families import FAMILIES, resolve_options
from sweeps.memory import step_bytes, workers_for
from sweeps.parametrisation import Parametrisation
from sweeps.records import Json, read_json
from sweeps.sizes import shape_for
from sweeps.store import Store, checkpoint_paths, read_end, read_metrics

EXACT, ROUNDED = 1e-5, 2e-3
"""Relative differences after a few steps: of sums in another order; and of gradient norms where Muon's iteration, in
bfloat16, has made them larger."""
ENOUGH = 2**40


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    with gang(tmp_path_factory.mktemp("gang")) as made:
        yield made


@pytest.fixture(scope="module")
def other(store: Store, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A second store with the same corpus, so that a cell can be trained twice."""
    root = tmp_path_factory.mktemp("other") / "store"
    shutil.copytree(store.root, root)
    return Store(root)


def cell_of(corpus: Corpus, family: str = "llama", steps: int = 6, **changes: Any) -> Cell:
    shape = shape_for(FAMILIES[family], 20_000, vocab_size=corpus.info.vocab_size, context=CONTEXT)
    options = tuple(sorted(resolve_options(FAMILIES[family]).items()))
    return make_cell(corpus, steps, family=family, shape=shape, options=options, **changes)


def batch_of(sequences: int, steps: int = 6) -> dict[str, int]:
    return {"batch_tokens": sequences * CONTEXT, "tokens": steps * sequences * CONTEXT}


def parted(shape: Shape) -> int:
    """Room for a sequence of this shape in parts, and not as a whole."""
    whole, part = (step_bytes(shape, 1, "float32", shards=shards).total for shards in (1, 2))
    assert part < whole
    return (whole + part) // 2


def rows(store: Store, cell: Cell) -> dict[int, dict[str, float]]:
    """Metrics by tokens, without what the clock says."""
    found = {row["tokens"]: row["metrics"] for row in read_metrics(store, cell.id)}
    return {at: {key: value for key, value in row.items() if "per_second" not in key} for at, row in found.items()}


def result_of(store: Store, cell: Cell) -> Json:
    return read_json(store.cell(cell.id) / "result.json")


def assert_alike(store: Store, other: Store, cell: Cell, tolerance: float = EXACT) -> None:
    """The same rows and final losses, to a relative difference."""
    here, there = rows(store, cell), rows(other, cell)
    assert here.keys() == there.keys()
    for at, row in here.items():
        assert there[at] == pytest.approx(row, rel=tolerance), at
    one, two = (result_of(each, cell)["val_loss_final"] for each in (store, other))
    assert two == pytest.approx(one, rel=min(tolerance, 1e-4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "room", "micro_batch", "tolerance"),
    [
        ("llama", {}, None, 8, EXACT),
        ("llama", {"optimizer": "muon"}, None, 8, ROUNDED),
        ("gpt2", {}, 3, 2, EXACT),
        ("mixtral", batch_of(5) | {"gradient_noise": True}, None, 3, EXACT),
    ],
    ids=["adamw", "muon", "micro-batches", "slices that differ, a part with one sequence, experts"],
)
def test_two_workers_train_as_one_does(
    store: Store,
    other: Store,
    corpus: Corpus,
    ranks: Gang,
    family: str,
    changes: dict[str, Any],
    room: int | None,
    micro_batch: int,
    tolerance: float,
) -> None:
    optimizer = changes.pop("optimizer", "adamw")
    cell = cell_of(corpus, family, **changes)
    cell = replace(cell, optimizer=replace(cell.optimizer, name=optimizer))
    put(store, cell), put(other, cell)
    assert run_attempt(store, cell.id, study="demo").state == "finished"
    most = step_bytes(cell.shape, room, "float32").total if room else ENOUGH
    assert ranks.train(other, cell.id, room=most) == ("finished", None)
    assert_alike(store, other, cell, tolerance)
    numerics = result_of(other, cell)["numerics"]
    assert (numerics["workers"], numerics["sharded"], numerics["micro_batch"]) == (2, False, micro_batch)
    assert result_of(store, cell)["numerics"]["workers"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"parametrisation": Parametrisation(kind="mup", base_width=8, base_head_dim=8, base_depth=None)}),
        ("gpt2", batch_of(5) | {"gradient_noise": True}),
    ],
    ids=["rates of their own", "tied tables, slices that differ"],
)
def test_a_model_in_parts_trains_as_a_whole_one(
    store: Store, other: Store, corpus: Corpus, ranks: Gang, family: str, changes: dict[str, Any]
) -> None:
    cell = cell_of(corpus, family, seed=1, **changes)
    put(store, cell), put(other, cell)
    assert run_attempt(store, cell.id, study="demo").state == "finished"
    assert ranks.train(other, cell.id, room=parted(cell.shape)) == ("finished", None)
    assert result_of(other, cell)["numerics"]["sharded"]
    assert_alike(store, other, cell, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "in parts"])
def test_a_checkpoint_of_two_workers_resumes_with_one(
    store: Store, other: Store, corpus: Corpus, ranks: Gang, sharded: bool
) -> None:
    cell = cell_of(corpus, steps=8, seed=2 + sharded)
    put(store, cell), put(other, cell)
    run_attempt(store, cell.id, study="demo")
    room = parted(cell.shape) if sharded else ENOUGH
    assert ranks.train(other, cell.id, room=room, stop_at=4 * 512) == ("stopped", "asked")
    assert [path.name for path in checkpoint_paths(other.checkpoints(cell.id, 0))] == [str(4 * 512)]
    assert run_attempt(other, cell.id, study="demo").state == "finished"
    assert result_of(other, cell)["numerics"]["workers"] == 1
    assert read_json(other.attempt(cell.id, 1) / "heartbeat.json")["resumed_from"] == 4 * 512
    assert_alike(store, other, cell)
    assert not read_differences(other, cell.id)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "in parts"])
def test_a_checkpoint_of_one_worker_resumes_with_two(
    store: Store, other: Store, corpus: Corpus, ranks: Gang, sharded: bool
) -> None:
    cell = cell_of(corpus, steps=8, seed=4 + sharded)
    put(store, cell), put(other, cell)
    run_attempt(store, cell.id, study="demo")
    with stopping(4 * 512):
        assert run_attempt(other, cell.id, study="demo").state == "stopped"
    room = parted(cell.shape) if sharded else ENOUGH
    assert ranks.train(other, cell.id, room=room) == ("finished", None)
    assert (result_of(other, cell)["numerics"]["workers"], result_of(other, cell)["attempt"]) == (2, 1)
    assert_alike(store, other, cell)


def test_two_workers_that_were_interrupted_end_with_the_bits_of_two_that_were_not(
    store: Store, other: Store, corpus: Corpus, ranks: Gang
) -> None:
    cell = cell_of(corpus, steps=8, seed=6)
    put(store, cell), put(other, cell)
    ranks.train(store, cell.id)
    ranks.train(other, cell.id, stop_at=3 * 512)
    assert ranks.train(other, cell.id) == ("finished", None)
    assert rows(store, cell) == rows(other, cell)


def test_sigterm_to_any_rank_keeps_a_checkpoint_and_ends_the_attempt_as_preempted(
    other: Store, corpus: Corpus, ranks: Gang
) -> None:
    cell = cell_of(corpus, seed=7)
    put(other, cell)
    assert ranks.train(other, cell.id, sigterm_at=2 * 512)[0] == "preemption"
    assert read_end(other, cell.id, 0) == ("preemption", "SIGTERM on another rank")
    assert [path.name for path in checkpoint_paths(other.checkpoints(cell.id, 0))] == [str(2 * 512)]


def test_every_rank_ends_where_a_cell_diverges_and_takes_the_next(
    store: Store, other: Store, corpus: Corpus, ranks: Gang
) -> None:
    wild = cell_of(corpus, steps=20, seed=8, learning_rate=1e4)
    put(store, wild), put(other, wild)
    alone = run_attempt(store, wild.id, study="demo")
    assert alone.state == "diverged"
    assert ranks.train(other, wild.id)[0] == "diverged"
    calm = cell_of(corpus, seed=9)
    put(other, calm)
    assert ranks.train(other, calm.id) == ("finished", None)


@pytest.mark.slow
def test_parts_want_no_optimizer_of_whole_matrices(other: Store, corpus: Corpus, tmp_path: Path) -> None:
    cell = cell_of(corpus, seed=10)
    cell = replace(cell, optimizer=replace(cell.optimizer, name="muon"))
    put(other, cell)
    with gang(tmp_path) as own:  # an attempt that ends so ends its gang
        state, reason = own.train(other, cell.id, room=parted(cell.shape))
    assert state == "code"
    assert "optimizer muon steps whole matrices" in str(reason)


def test_a_cell_gets_as_many_gpus_as_hold_it(corpus: Corpus) -> None:
    shape = shape_for(FAMILIES["llama"], 5_000_000_000, vocab_size=50_000, context=2048)
    cell = make_cell(corpus, shape=shape, precision="bfloat16", batch_tokens=64 * 2048, tokens=64 * 2048)
    few, more = workers_for(cell, 80 * 10**9, 8), workers_for(cell, 48 * 10**9, 8)
    assert 1 == workers_for(cell, 140 * 10**9, 8) < few < more <= 8
    with pytest.raises(InputError, match="does not fit on 2 GPUs of a node"):
        workers_for(replace(cell, batch_tokens=2 * 2048), 24 * 10**9, 8)
    muon = replace(cell, optimizer=replace(cell.optimizer, name="muon"))
    with pytest.raises(InputError, match="muon trains no parts of a model"):
        workers_for(muon, 80 * 10**9, 8)
