"""Stacked cells: every member has the numbers of its solo run, and an end of its own."""

import json
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import Killed, MemoryIO, make_cell, put

from sweeps import heartbeat, probing
from sweeps.attempt import run_attempts
from sweeps.cell import Cell, Optimizer
from sweeps.corpora import Corpus, make_source, open_corpus, prepare
from sweeps.devices import choose_numerics
from sweeps.errors import InputError
from sweeps.families import FAMILIES, build_model, resolve_options
from sweeps.sizes import shape_for
from sweeps.stacking import Solo, Stack
from sweeps.stacks import check_stack, known_gain, note_gain, stack_key, stack_size
from sweeps.store import Attempt, Store, ask_to_stop, cell_state, open_store, read_metrics
from sweeps.trainer import Outcome
from sweeps.training import train, train_together

SIZES = {"gpt2": 20_000, "gpt_neox": 20_000, "llama": 20_000, "qwen3": 20_000, "granite": 20_000, "mixtral": 40_000}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(tmp_path_factory.mktemp("stacking") / "store")


@pytest.fixture(scope="module")
def corpus(store: Store) -> Corpus:
    source = make_source("markov", None, {"tokens": 60_000, "vocab_size": 64, "seed": 1})
    return open_corpus(store.root, prepare(source, "bytes", store.root).fingerprint)


def differing(corpus: Corpus, count: int, steps: int = 20) -> list[Cell]:
    """Cells that differ in everything in which members may."""
    cells = [
        make_cell(corpus, steps, learning_rate=0.002 * (index + 1), seed=index, data_seed=index // 2)
        for index in range(count)
    ]
    other = cells[-1]
    cells[-1] = replace(
        other, init_std=0.03, optimizer=replace(other.optimizer, weight_decay=0.0, clip_norm=0.3, beta2=0.95)
    )
    return cells


class Dropping(torch.nn.Module):
    """A model of one's own with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(64, 8)

    def forward(self, tokens: torch.Tensor) -> SimpleNamespace:
        hidden = torch.nn.functional.dropout(self.table(tokens), 0.1, self.training)
        return SimpleNamespace(logits=hidden @ self.table.weight.mT)


def test_models_that_draw_random_numbers_do_not_stack_and_it_says_what_to_do() -> None:
    recipe = Optimizer(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_norm=1.0)
    stack = Stack([Dropping(), Dropping()], [recipe, recipe])
    with pytest.raises(InputError, match=r"these 2 cells cannot train as one stack.* dropout.*Set stack: off"):
        stack.backward(torch.zeros(2, 4, 9, dtype=torch.int64), 4, nullcontext())


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(SIZES))
def test_twenty_steps_of_a_stack_are_those_of_its_members_alone(family: str) -> None:
    recipe = FAMILIES[family]
    shape = shape_for(recipe, SIZES[family], vocab_size=64, context=16)
    optimizers = [
        Optimizer(learning_rate=1e-3 * 2**k, weight_decay=0.1 * k, beta1=0.9, beta2=0.95, eps=1e-8, clip_norm=1.0)
        for k in range(3)
    ]

    def model(seed: int) -> torch.nn.Module:
        options = resolve_options(recipe)
        return build_model(recipe, shape, init_std=0.05, seed=seed, options=options).double()

    alone = [Solo(model(seed), optimizer) for seed, optimizer in enumerate(optimizers)]
    stack = Stack([model(seed) for seed in range(3)], optimizers)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        batch = torch.randint(64, (3, 4, 17), generator=generator)
        losses = [one.backward(batch[k : k + 1], 2, nullcontext())[0] for k, one in enumerate(alone)]
        norms = [one.table.step([0])[0] for one in alone]
        torch.testing.assert_close(stack.backward(batch, 2, nullcontext()), torch.stack(losses), rtol=1e-9, atol=0)
        torch.testing.assert_close(stack.table.step(range(3)), torch.stack(norms), rtol=1e-9, atol=0)
    for k, one in enumerate(alone):
        for mine, own in zip(stack.models[k].parameters(), one.models[0].parameters(), strict=True):
            torch.testing.assert_close(mine, own, rtol=1e-7, atol=1e-10)


def test_members_with_muon_stack_too() -> None:
    recipe = FAMILIES["llama"]
    shape = shape_for(recipe, 10_000, vocab_size=64, context=16)
    muon = Optimizer(name="muon", learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_norm=1.0)
    models = [build_model(recipe, shape, init_std=0.05, seed=k, options=resolve_options(recipe)) for k in (0, 1, 0, 1)]
    alone, stack = [Solo(model, muon) for model in models[:2]], Stack(models[2:], [muon] * 2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        batch = torch.randint(64, (2, 4, 17), generator=generator)
        losses = torch.cat([one.backward(batch[k : k + 1], 4, nullcontext()) for k, one in enumerate(alone)])
        torch.testing.assert_close(stack.backward(batch, 4, nullcontext()), losses, rtol=1e-4, atol=0)
        stack.table.step([0, 1])
        for one in alone:
            one.table.step([0])
    before = [parameter.clone() for parameter in models[3].parameters()]
    stack.table.step([0])
    assert all(torch.equal(*pair) for pair in zip(before, models[3].parameters(), strict=True)), "it was not live"


def test_a_members_optimizer_state_is_that_of_a_solo_run() -> None:
    recipe = FAMILIES["llama"]
    shape = shape_for(recipe, 10_000, vocab_size=64, context=16)
    optimizer = Optimizer(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_norm=1.0)
    models = [build_model(recipe, shape, init_std=0.05, seed=k, options=resolve_options(recipe)) for k in (0, 1, 1)]
    stack, solo = Stack(models[:2], [optimizer] * 2), Solo(models[2], optimizer)
    assert stack.table.optimizer_state(1)["state"] == {} == solo.table.optimizer_state(0)["state"]
    batch = torch.randint(64, (2, 4, 17), generator=torch.Generator().manual_seed(0))
    for program, part, members in ((stack, batch, [0, 1]), (solo, batch[1:], [0])):
        program.backward(part, 4, nullcontext())
        program.table.step(members)
    mine, own = stack.table.optimizer_state(1), solo.table.optimizer_state(0)
    assert [group["params"] for group in mine["param_groups"]] == [group["params"] for group in own["param_groups"]]
    assert mine["state"].keys() == own["state"].keys()
    for index, state in own["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(mine["state"][index][key], value, rtol=1e-4, atol=1e-9)
    stack.table.load_optimizer_state(0, own)
    for index, state in own["state"].items():
        torch.testing.assert_close(stack.table.optimizer_state(0)["state"][index], state, rtol=0, atol=0)


@pytest.mark.slow
def test_members_log_what_they_log_alone(corpus: Corpus) -> None:
    cells = differing(corpus, 4)
    together = [MemoryIO(cell, corpus) for cell in cells]
    outcomes = train_together(cells, together)
    for cell, mine, outcome in zip(cells, together, outcomes, strict=True):
        own = MemoryIO(cell, corpus)
        alone = train(cell, own)
        assert isinstance(outcome, Outcome)
        assert mine.rows.keys() == own.rows.keys()
        for tokens, row in own.rows.items():
            assert mine.rows[tokens] == pytest.approx(row, rel=1e-5), tokens
        assert outcome.val_loss_final == pytest.approx(alone.val_loss_final, rel=1e-5)
        assert outcome.document_losses == pytest.approx(alone.document_losses, rel=1e-4)


@pytest.mark.slow
def test_a_member_that_diverges_leaves_the_others_untouched(corpus: Corpus) -> None:
    cells = [make_cell(corpus, 40, learning_rate=rate) for rate in (0.01, 1e6, 0.005)]
    ends: list[tuple[int, str]] = []
    ios = [MemoryIO(cell, corpus) for cell in cells]
    outcomes = train_together(cells, ios, lambda member, end: ends.append((member, getattr(end, "state", str(end)))))
    assert ends[0] == (1, "diverged"), "it ends before the others"
    assert sorted(ends) == [(0, "finished"), (1, "diverged"), (2, "finished")]
    calm = [cells[0], cells[2]]
    others = train_together(calm, [MemoryIO(cell, corpus) for cell in calm])
    for mine, other in zip((outcomes[0], outcomes[2]), others, strict=True):
        assert isinstance(mine, Outcome)
        assert isinstance(other, Outcome)
        assert mine.val_loss_final == pytest.approx(other.val_loss_final, rel=1e-6)


def test_members_that_were_killed_at_different_steps_go_on_together(corpus: Corpus, tmp_path: Path) -> None:
    cells = differing(corpus, 3)
    undisturbed = [MemoryIO(cell, corpus) for cell in cells]
    train_together(cells, undisturbed)
    for k, kill_at in enumerate((5, 12, 12)):
        with pytest.raises(Killed):
            train(cells[k], MemoryIO(cells[k], corpus, folder=tmp_path / str(k), kill_at=kill_at))
    ios = [MemoryIO(cell, corpus, folder=tmp_path / str(k)) for k, cell in enumerate(cells)]
    assert all(isinstance(end, Outcome) for end in train_together(cells, ios))
    assert [min(io.rows) // 512 for io in ios] == [6, 13, 13]
    for mine, whole in zip(ios, undisturbed, strict=True):
        for tokens, row in mine.rows.items():
            assert row == pytest.approx(whole.rows[tokens], rel=1e-5)


@pytest.mark.parametrize("reached", [12, 20])
@pytest.mark.parametrize("ending", ["diverges", "is stopped"])
def test_a_member_goes_on_at_its_own_step_where_the_one_that_it_waits_for_ends(
    ending: str, reached: int, corpus: Corpus, tmp_path: Path
) -> None:
    cells = [make_cell(corpus, 20, learning_rate=1e6 if ending == "diverges" else 0.01), make_cell(corpus, 20, seed=1)]
    alone = MemoryIO(cells[1], corpus)
    train(cells[1], alone)
    with pytest.raises(Killed):
        train(cells[1], MemoryIO(cells[1], corpus, folder=tmp_path, kill_at=reached))
    behind = MemoryIO(cells[0], corpus, kill_at=None if ending == "diverges" else 5)
    ahead = MemoryIO(cells[1], corpus, folder=tmp_path)
    ends = train_together(cells, [behind, ahead])
    assert max(behind.rows) // 512 < 12, "it ends while the other waits"
    assert isinstance(ends[0], Killed) or (isinstance(ends[0], Outcome) and ends[0].state == "diverged")
    assert isinstance(ends[1], Outcome)
    assert (ends[1].state, ends[1].steps) == ("finished", 20)
    assert list(ahead.rows) == [step * 512 for step in range(min(reached + 1, 20), 21)]
    for tokens, row in ahead.rows.items():
        assert row == pytest.approx(alone.rows[tokens], rel=1e-5)


def test_every_member_is_an_attempt_of_its_own(store: Store, corpus: Corpus) -> None:
    cells = [make_cell(corpus, 30, learning_rate=rate) for rate in (0.011, 1e6, 0.006)]
    ids = [put(store, cell) for cell in cells]
    ended = run_attempts(store, ids, study="s")
    assert [one.state for one in ended] == ["finished", "diverged", "finished"]
    for one in ended:
        result = cell_state(store, one.cell_id).result
        assert result is not None
        assert result["numerics"]["stack"] == 3
        record = json.loads((store.attempt(one.cell_id, 0) / "attempt.json").read_text())
        assert record["numerics"]["stack"] == 3
        assert read_metrics(store, one.cell_id)


@pytest.mark.slow
def test_a_member_that_is_asked_to_stop_leaves_the_others(
    store: Store, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.02)  # it hears that long before its last step
    cells = [make_cell(corpus, 400, seed=seed) for seed in (31, 32)]
    ids = [put(store, cell) for cell in cells]

    def ask() -> None:
        while not (store.attempt(ids[0], 0) / "log.jsonl").exists():
            time.sleep(0.01)
        ask_to_stop(Attempt(store, ids[0], 0), "stopped", "asked")

    asking = threading.Thread(target=ask)
    asking.start()
    ended = run_attempts(store, ids, study="s")
    asking.join()
    assert [one.state for one in ended] == ["stopped", "finished"]
    (again,) = run_attempts(store, ids[:1], study="s")
    assert again.state == "finished"
    assert json.loads((store.attempt(ids[0], 1) / "heartbeat.json").read_text())["resumed_from"] > 0


def test_cells_of_other_shapes_batches_or_lengths_do_not_stack_and_it_says_why(corpus: Corpus) -> None:
    cell = make_cell(corpus)
    for other, name in (
        (replace(cell, batch_tokens=1024), "batch_tokens"),
        (replace(cell, tokens=512), "tokens"),
        (replace(cell, shape=replace(cell.shape, width=cell.shape.width + 2)), "shape.width"),
        (replace(cell, precision="bfloat16"), "precision"),
    ):
        assert stack_key(other) != stack_key(cell)
        with pytest.raises(InputError, match=name):
            check_stack([cell, other])
    alike = replace(cell, seed=9, data_seed=3, init_std=0.01, optimizer=replace(cell.optimizer, learning_rate=1.0))
    assert stack_key(alike) == stack_key(cell)
    check_stack([cell, alike])
    assert stack_key(replace(cell, trainer="own.py:train@0")) is None


def test_stacks_leave_no_worker_without_work(corpus: Corpus) -> None:
    cell = make_cell(corpus)
    assert stack_size(8, 2, "auto", "cpu", cell) == 4
    assert stack_size(40, 2, "auto", "cpu", cell) == 8
    assert stack_size(40, 1, "auto", "cuda", cell) == 32
    assert stack_size(3, 1, 8, "cpu", cell) == 3
    assert stack_size(16, 2, 3, "cpu", cell) == 3
    assert stack_size(16, 2, "off", "cpu", cell) == 1
    assert stack_size(2, 2, "auto", "cpu", cell) == 1
    assert stack_size(16, 2, "auto", "cpu", replace(cell, batch_tokens=65_536)) == 1


def test_a_probe_is_kept_for_its_shape_batch_number_and_device(store: Store, corpus: Corpus) -> None:
    cell = make_cell(corpus)
    note_gain(store, cell, 4, "cpu", 1.7)
    assert known_gain(store, replace(cell, tokens=4096, seed=5), 4, "cpu") == 1.7
    assert known_gain(store, cell, 8, "cpu") is None
    assert known_gain(store, cell, 4, "cuda") is None
    assert known_gain(store, replace(cell, batch_tokens=1024), 4, "cpu") is None


def test_a_probe_cuts_its_batch_as_the_stack_would_and_does_not_go_on_for_long(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, taken, backward = differing(corpus, 3), [], Stack.backward

    def noted(stack: Stack, batches: torch.Tensor, micro_batch: int, amplify: Any) -> torch.Tensor:
        taken.append(micro_batch)
        return backward(stack, batches, micro_batch, amplify)

    monkeypatch.setattr(Stack, "backward", noted)
    monkeypatch.setattr(probing, "PROBE_SECONDS", 0.0)
    numerics = replace(choose_numerics(cells[0], stack=3), micro_batch=4)
    monkeypatch.setattr(probing, "choose_numerics", lambda cell, stack: numerics)
    assert probing.probe(cells, torch.device("cpu")) > 0
    assert taken == [4], "one turn, although none is warm: a stack so slow does not pay"
