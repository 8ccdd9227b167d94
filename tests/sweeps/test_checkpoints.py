"""Checkpoints come back equal, are whole or not there, and make a resumed run equal to the bit."""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Killed, MemoryIO, make_cell

from sweeps import checkpoints
from sweeps.checkpoints import KEEP, Writer, load, newest, save
from sweeps.corpora import Corpus, make_source, open_corpus, prepare
from sweeps.devices import Numerics, choose_numerics
from sweeps.errors import InputError
from sweeps.store import begin_attempt, checkpoint_paths, open_store
from sweeps.training import train


def same(one: Any, two: Any) -> bool:
    """Equal in values, types, dtypes and bits."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, np.ndarray):
        return isinstance(two, np.ndarray) and one.dtype == two.dtype and np.array_equal(one, two)
    if isinstance(one, Mapping):
        return isinstance(two, Mapping) and list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


PLAIN = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)
TENSORS = st.sampled_from(
    [
        torch.arange(6.0).reshape(2, 3),
        torch.tensor(3),
        torch.zeros(0),
        torch.ones(2, dtype=torch.bfloat16),
        torch.arange(8.0)[::2],
        np.arange(4, dtype=np.uint8),
    ]
)
KEYS = st.text(max_size=4) | st.integers(0, 5)
STATES = st.recursive(
    PLAIN | TENSORS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.dictionaries(KEYS, STATES, max_size=3))
def test_any_state_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, state: dict[Any, Any]) -> None:
    found = load(save(tmp_path_factory.mktemp("state"), 7, state))
    assert found is not None
    assert found.tokens == 7
    assert same(state, found.state)


A, B, C = torch.zeros(2), torch.ones(3), np.arange(4)


@pytest.mark.parametrize(
    "state",
    [
        {"a": {"b": A}, "a/b": B},
        {"a/b": A, "a": {"b": B}, "a/b~1": C},
        {"a": [A], "a/0": B},
        {1: A, "1": B},
        {"x": {True: A, "True": B, None: C, "None": A}},
        {"__metadata__": A},
        {"__metadata__": {"": A}, "__metadata__/": B},
        {"": A, "a": {"": B}, "a/": C},
    ],
)
def test_tensors_of_like_names_are_told_apart(tmp_path: Path, state: dict[Any, Any]) -> None:
    found = load(save(tmp_path, 7, state))
    assert found is not None
    assert same(state, found.state)


def test_what_cannot_be_kept_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold model/0, a object"):
        save(tmp_path, 1, {"model": [object()]})


def test_the_last_two_and_the_permanent_ones_stay(tmp_path: Path) -> None:
    for tokens in range(1, 7):
        save(tmp_path, tokens, {"x": torch.ones(2)}, permanent=tokens == 2)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["2", "5", "6"]
    assert KEEP == 2


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    store = open_store(tmp_path / "store")
    begin_attempt(store, "cell", {})
    begin_attempt(store, "cell", {})
    save(store.checkpoints("cell", 0), 10, {"x": torch.zeros(100)})
    path = save(store.checkpoints("cell", 1), 20, {"x": torch.ones(100)})
    content = (path / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    found = newest(store, "cell")
    assert found is not None
    assert found.tokens == 20
    if damage == "gone":
        (path / name).unlink()
    else:
        (path / name).write_bytes({"cut": content[:-1], "flip": flipped, "empty": b""}[damage])
    found = newest(store, "cell")
    if (name, damage) == ("state.json", "cut"):  # the newline at its end is no content
        assert found is not None
        return
    assert found is not None
    assert found.tokens == 10


def test_a_checkpoint_that_was_being_written_is_not_there(tmp_path: Path) -> None:
    path = save(tmp_path, 10, {"x": torch.zeros(3)})
    path.rename(tmp_path / ".tmp-20")
    assert checkpoint_paths(tmp_path) == []
    save(tmp_path, 20, {"x": torch.zeros(3)})
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["20"]
    assert not (tmp_path / ".tmp-20").exists()


def test_the_writer_copies_first_and_says_later_what_the_disk_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, weight = Writer(tmp_path), torch.zeros(1000)
    writer.submit(5, {"w": weight})
    weight += 1
    writer.wait()
    found = load(tmp_path / "5")
    assert found is not None
    assert not found.state["w"].any()
    monkeypatch.setattr(checkpoints.os, "replace", _full)
    writer.submit(6, {"w": weight})
    with pytest.raises(InputError, match="the disk is full"):
        writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "full")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = open_store(tmp_path_factory.mktemp("checkpoints") / "store").root
    source = make_source("markov", None, {"vocab_size": 8, "tokens": 100_000, "seed": 3})
    return open_corpus(root, prepare(source, "bytes", root).fingerprint)


@pytest.mark.parametrize("killed", [1, 3, 4, 5, 7, 8, 9, 11, 12])
def test_a_run_killed_around_any_checkpoint_ends_in_the_same_state(corpus: Corpus, tmp_path: Path, killed: int) -> None:
    """Weights, moments, random state and every loss, to the bit. Checkpoints stand at steps 4, 8 and 12."""
    cell = make_cell(corpus, 12)
    whole = MemoryIO(cell, corpus)
    expected = train(cell, whole)
    first = MemoryIO(cell, corpus, folder=tmp_path, every=4, kill_at=killed)
    with pytest.raises(Killed):
        train(cell, first)
    again = MemoryIO(cell, corpus, folder=tmp_path, every=4)
    outcome = train(cell, again)
    assert outcome.val_loss_final == expected.val_loss_final
    assert outcome.document_losses is not None
    assert np.array_equal(outcome.document_losses, expected.document_losses)
    assert first.rows | again.rows == whole.rows
    assert all(whole.rows[tokens] == row for rows in (first.rows, again.rows) for tokens, row in rows.items())
    if killed < 12:
        for state in (again.last_state, whole.last_state):
            state["progress"]["row"].pop("tokens_per_second", None)  # of the clock
        assert same(again.last_state, whole.last_state)


def test_micro_batches_change_a_loss_by_rounding_only(corpus: Corpus) -> None:
    cell = make_cell(corpus, 12)
    numerics = choose_numerics(cell)
    losses = []
    for micro_batch in (cell.sequences, cell.sequences // 2, 3):  # 3 does not divide 16
        parts = MemoryIO(cell, corpus, numerics=Numerics(**{**vars(numerics), "micro_batch": micro_batch}))
        losses.append(train(cell, parts).val_loss_final)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert len(set(losses)) > 1, "they were really cut"
