"""Cells that share a past: who branches off where, and that a branch has the numbers of a run from scratch."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import Killed, MemoryIO, make_cell, put

from sweeps.accounting import flops_per_token
from sweeps.attempt import run_attempt
from sweeps.cell import Cell, Schedule
from sweeps.corpora import Corpus, make_source, open_corpus, prepare
from sweeps.lineage import branch_points, lineage, note_lineage, plan_branches, what_prevents
from sweeps.records import read_json
from sweeps.schedules import COOLDOWNS, fraction, stable_steps
from sweeps.store import Store, open_store, read_metrics
from sweeps.training import train


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(tmp_path_factory.mktemp("lineage") / "store")


@pytest.fixture(scope="module")
def corpus(store: Store) -> Corpus:
    source = make_source("markov", None, {"tokens": 60_000, "vocab_size": 64, "seed": 1})
    return open_corpus(store.root, prepare(source, "bytes", store.root).fingerprint)


def wsd(corpus: Corpus, steps: int, *, cooldown: float = 0.2, shape: str = "sqrt", **changes: object) -> Cell:
    schedule = Schedule(
        name="wsd", warmup_tokens=1024, final_fraction=0.0, cooldown_fraction=cooldown, cooldown_shape=shape
    )
    return make_cell(corpus, steps, schedule=schedule, **changes)


def planned(store: Store, *cells: Cell) -> None:
    for cell in cells:
        put(store, cell)
        note_lineage(store, cell)


def test_cells_that_differ_in_length_and_cooldown_alone_are_of_one_lineage(corpus: Corpus) -> None:
    cell = wsd(corpus, 40)
    assert lineage(cell) == lineage(wsd(corpus, 80)) == lineage(wsd(corpus, 80, cooldown=0.5, shape="linear"))
    assert lineage(cell) == lineage(replace(cell, schedule=replace(cell.schedule, name="constant")))
    others = (
        wsd(corpus, 40, learning_rate=0.02),
        wsd(corpus, 40, seed=1),
        wsd(corpus, 40, data_seed=1),
        replace(cell, schedule=replace(cell.schedule, warmup_tokens=2048)),
    )
    assert len({lineage(one) for one in (cell, *others)}) == 5
    assert lineage(make_cell(corpus)) is None, "a cosine's every step depends on the horizon"
    assert lineage(replace(cell, trainer="own.py:train@0")) is None


def test_the_longest_cell_trains_the_trunk(corpus: Corpus) -> None:
    cells = [wsd(corpus, steps) for steps in (10, 20, 40, 80)]
    branches = plan_branches(cells)
    assert {branch.parent for branch in branches.values()} == {cells[-1].id}
    assert [branches[cell.id].steps for cell in cells[:-1]] == [8, 16, 32]
    spent = sum(cell.steps - (branches[cell.id].steps if cell.id in branches else 0) for cell in cells)
    assert spent / sum(cell.steps for cell in cells) == pytest.approx(9.4 / 15)


def test_what_follows_the_length_prevents_sharing_and_is_named(corpus: Corpus) -> None:
    free = [wsd(corpus, steps) for steps in (20, 40)]
    bound = [wsd(corpus, 20), wsd(corpus, 40, learning_rate=0.02)]
    assert what_prevents(free) == ()
    assert what_prevents(bound) == ("optimizer.learning_rate",)
    assert plan_branches(bound) == {}
    varied = [
        wsd(corpus, steps, learning_rate=rate, init_std=steps / 400) for steps in (20, 40) for rate in (0.01, 0.02)
    ]
    assert what_prevents(varied) == ("init_std",), "a rate that is varied at every length is no reason"


@given(
    steps=st.integers(2, 400),
    batch=st.integers(1, 64),
    cooldown=st.floats(0.01, 0.99),
    warm=st.floats(0, 1),
    shape=st.sampled_from(sorted(COOLDOWNS)),
)
def test_no_rate_before_the_cooldown_depends_on_the_horizon(
    corpus: Corpus, steps: int, batch: int, cooldown: float, warm: float, shape: str
) -> None:
    batch_tokens = batch * 32
    schedule = Schedule(
        name="wsd",
        warmup_tokens=int(warm * (1 - cooldown) * steps * batch_tokens),
        final_fraction=0.0,
        cooldown_fraction=cooldown,
        cooldown_shape=shape,
    )
    cell = make_cell(corpus, schedule=schedule, tokens=steps * batch_tokens, batch_tokens=batch_tokens)
    stable = stable_steps(cell)
    assert 0 <= stable <= steps
    assert abs(stable - (1 - cooldown) * steps) <= 1 or stable == 0
    for step in range(1, stable + 1):
        middle = (step - 0.5) * batch_tokens
        assert fraction(schedule, middle, cell.tokens) == fraction(schedule, middle, 1000 * cell.tokens)


def test_a_branch_has_the_bits_of_a_run_from_scratch(store: Store, corpus: Corpus, tmp_path: Path) -> None:
    long, short = wsd(corpus, 60), wsd(corpus, 30)
    planned(store, long, short)
    assert branch_points(store, long) == {24 * 512, 48 * 512}
    assert run_attempt(store, long.id, study="s").state == "finished"
    assert run_attempt(store, short.id, study="s").state == "finished"
    branch = read_json(store.cell(short.id) / "result.json")
    assert branch["trunk"] == {"cell": long.id, "tokens": 24 * 512}
    assert (branch["flops"], branch["flops_spent"]) == (30 * 512, 6 * 512)
    assert min(row["tokens"] for row in read_metrics(store, short.id)) > 24 * 512

    alone = open_store(tmp_path / "alone")
    shutil.copytree(store.root / "corpora", alone.root / "corpora")
    planned(alone, short)
    assert run_attempt(alone, short.id, study="s").state == "finished"
    scratch = read_json(alone.cell(short.id) / "result.json")
    assert (scratch["trunk"], scratch["flops_spent"]) == (None, 30 * 512)
    for name in ("val_loss_final", "val_bpb_final", "loss_at_start", "flops", "tokens", "steps"):
        assert branch[name] == scratch[name], name
    documents = [np.load(one.attempt(short.id, 0) / "documents.npz")["loss_sum"] for one in (store, alone)]
    np.testing.assert_array_equal(*documents)
    there = {row["tokens"]: row["metrics"] for row in read_metrics(alone, short.id)}
    for row in read_metrics(store, short.id):
        for key, value in row["metrics"].items():
            if key != "tokens_per_second":
                assert there[row["tokens"]][key] == value, (row["tokens"], key)


def test_a_branch_from_the_middle_of_its_trunks_row_logs_the_rows_of_a_run_from_scratch(
    corpus: Corpus, tmp_path: Path
) -> None:
    """After a trunk that was lost: its last row was after step 27, that of the branch is after step 28."""
    with pytest.raises(Killed):
        train(wsd(corpus, 170), MemoryIO(wsd(corpus, 170), corpus, folder=tmp_path, every=29, kill_at=29))
    cell = wsd(corpus, 110)
    branch, scratch = MemoryIO(cell, corpus, folder=tmp_path, every=1000), MemoryIO(cell, corpus)
    branch.trunk = {"cell": wsd(corpus, 170).id, "tokens": 29 * 512}
    assert train(cell, branch).val_loss_final == train(cell, scratch).val_loss_final
    assert min(branch.rows) == 30 * 512
    assert branch.rows == {tokens: row for tokens, row in scratch.rows.items() if tokens > 29 * 512}


def test_a_branch_that_ends_on_its_trunk_logs_its_own_last_row(store: Store, corpus: Corpus) -> None:
    """At a constant rate the trunk takes every step of a shorter run, and need have no row where that one ends."""
    constant = Schedule(name="constant", warmup_tokens=1024, final_fraction=0.1, cooldown_fraction=0.2)
    long, short = make_cell(corpus, 170, schedule=constant), make_cell(corpus, 85, schedule=constant)
    planned(store, long, short)
    assert run_attempt(store, long.id, study="s").state == "finished"
    assert short.tokens not in {row["tokens"] for row in read_metrics(store, long.id)}
    assert run_attempt(store, short.id, study="s").state == "finished"
    result = read_json(store.cell(short.id) / "result.json")
    assert result["trunk"] == {"cell": long.id, "tokens": short.tokens}
    assert result["tokens_per_second"] is None, "this attempt trained none"
    (row,) = read_metrics(store, short.id)
    assert row["tokens"] == short.tokens
    metrics = row["metrics"]
    assert metrics["optimizer_step"] == 85
    assert metrics["flops"] == short.tokens * flops_per_token(short.shape)
    assert metrics["learning_rate"] == 0.01
    assert metrics.keys().isdisjoint({"train_loss", "gradient_norm"}), "the trunk's last are of other steps"
    assert metrics["val_loss_final"] == result["val_loss_final"]


def test_a_branch_whose_trunk_is_gone_trains_what_is_missing(store: Store, corpus: Corpus) -> None:
    long, short = wsd(corpus, 50, seed=5), wsd(corpus, 20, seed=5)
    planned(store, long, short)
    assert run_attempt(store, long.id, study="s").state == "finished"
    shutil.rmtree(store.checkpoints(long.id, 0))
    assert run_attempt(store, short.id, study="s").state == "finished"
    assert read_json(store.cell(short.id) / "result.json")["trunk"] is None


@pytest.mark.parametrize("left", [b"", b"\0" * 60], ids=["empty", "zeros"])
def test_a_branch_goes_on_from_its_checkpoint_where_a_power_cut_has_emptied_the_note_of_its_trunk(
    left: bytes, store: Store, corpus: Corpus
) -> None:
    seed = 7 + len(left)
    long, short = wsd(corpus, 40, seed=seed), wsd(corpus, 20, seed=seed)
    planned(store, long, short)
    assert run_attempt(store, long.id, study="s").state == "finished"
    assert run_attempt(store, short.id, study="s").state == "finished"
    (store.cell(short.id) / "result.json").unlink()
    (store.attempt(short.id, 0) / "trunk.json").write_bytes(left)
    assert run_attempt(store, short.id, study="s").state == "finished"
    result = read_json(store.cell(short.id) / "result.json")
    assert (result["trunk"], result["flops_spent"]) == (None, result["flops"]), "of a trunk nothing is known any more"


def test_a_longer_cell_that_is_planned_later_goes_on_from_the_shorter(store: Store, corpus: Corpus) -> None:
    short, long = wsd(corpus, 20, seed=6), wsd(corpus, 40, seed=6)
    planned(store, short)
    assert run_attempt(store, short.id, study="s").state == "finished"
    planned(store, long)
    assert run_attempt(store, long.id, study="s").state == "finished"
    assert read_json(store.cell(long.id) / "result.json")["trunk"] == {"cell": short.id, "tokens": 16 * 512}
