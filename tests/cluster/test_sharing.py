"""What people and programs are told of trunks and branches: in the plan, the ledger, plan.json, gc and MLflow."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from commandline import Escala
from faultproxy import Server

from analysis import load_runs
from cluster.garbage import BY_DEFAULT, collectable
from cluster.ledger import ledger_rows, register, sharing, sharing_words
from cluster.mirror import Mirror
from cluster.planning import read_study
from sweeps.records import encode_row
from sweeps.store import Store, begin_attempt, commit_result, read_cell, read_plan, spent_flops, trunk_of

LENGTHS = (20_480, 40_960, 81_920)
SHARED = """
name: shared
corpus: {source: markov, options: {vocab_size: 16, tokens: 200000, seed: 1}}
context: 32
families: [llama]
grid:
  type: points
  points: [%s]
training: {batch_tokens: 512, learning_rate: 0.01, schedule: {kind: wsd, cooldown_fraction: 0.25, warmup_tokens: 4096}}
seeds: %s
"""


def shared(lengths: tuple[int, ...] = LENGTHS, seeds: str = "[0, 1]") -> str:
    return SHARED % (", ".join(f"{{size: 1e4, tokens: {tokens}}}" for tokens in lengths), seeds)


def put_on_record(escala: Escala, text: str) -> Store:
    """Plan and register the study, as a run does before it trains."""
    path = escala.study(text)
    store, plan, _ = read_study(str(path), escala.folder / "store", False, False)
    register(store, plan, path.read_bytes())
    return store


def end(store: Store, cell_id: str, trunk: dict[str, Any] | None = None, state: str = "finished") -> None:
    """A result as the trainer leaves it, without the training."""
    record = read_cell(store, cell_id)
    counts, tokens = record["counts"], record["identity"]["tokens"]
    spent = counts["C"] - (trunk["tokens"] * counts["flops_per_token"] if trunk else 0)
    told = {"state": state, "reason": None, "val_loss_final": 2.0, "tokens": tokens, "trunk": trunk}
    commit_result(begin_attempt(store, cell_id, {"numerics": {}}), told | {"flops": counts["C"], "flops_spent": spent})


def entries(store: Store) -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in read_plan(store, "shared")["cells"]}


def test_the_plan_shows_who_branches_off_whom_and_what_is_saved(escala: Escala) -> None:
    path = escala.study(shared())
    told = json.loads(escala("plan", path, "--store", "store", "--json").stdout)
    rows = {row["id"]: row for row in told["cells"]}
    branches = [row for row in rows.values() if row["trunk"]]
    assert len(branches) == 4
    for row in branches:
        assert rows[row["trunk"]]["D"] == 81_920
        assert rows[row["trunk"]]["seed"] == row["seed"]
        assert row["trunk_tokens"] == 0.75 * row["D"]
        assert row["C_spent"] == 0.25 * row["C"]
    assert all(row["C_spent"] == row["C"] for row in rows.values() if not row["trunk"])
    lengths = sum(LENGTHS)
    saved = 0.75 * (lengths - 81_920) / lengths
    assert told["shared"] == pytest.approx({"branches": 4, "trunks": 2, "saved": saved} | _compute(told["totals"]))
    assert told["totals"]["C_missing"] == told["totals"]["C_spent"] < told["totals"]["C"]
    text = escala("plan", path, "--store", "store").stdout
    assert f"4 cells branch off 2 trunks: {sharing_words(told['shared']).split(': ')[1]}." in text
    assert f"({100 * saved:.0f}% saved)" in text
    short = next(row for row in branches if row["D"] == 20_480)
    assert f"{short['trunk'][:8]} at 15.4k" in text


def _compute(totals: dict[str, Any]) -> dict[str, Any]:
    return {"C": totals["C"], "C_spent": totals["C_spent"]}


def test_a_study_without_trunks_has_no_word_of_them(escala: Escala) -> None:
    path = escala.study(shared().replace("kind: wsd, cooldown_fraction: 0.25", "kind: cosine"))
    told = json.loads(escala("plan", path, "--store", "store", "--json").stdout)
    assert told["shared"] is None
    text = escala("plan", path, "--store", "store").stdout
    assert "from" not in text.splitlines()[1].split()
    assert "branch off" not in text


def test_the_plan_says_which_rule_prevents_sharing(escala: Escala) -> None:
    rule = "batch_tokens: {value: 512, at: {D: 20480}, power: {D: 0.5}}"
    path = escala.study(shared().replace("batch_tokens: 512", rule))
    told = json.loads(escala("plan", path, "--store", "store", "--json").stdout)
    assert told["shared"] is None
    assert any("share no trunk" in text and "batch_tokens follows D" in text for text in told["warnings"])


def test_the_ledger_tells_what_was_planned_until_a_cell_ends_and_then_what_happened(escala: Escala) -> None:
    store = put_on_record(escala, shared(seeds="[0]"))
    short, middle, trunk = sorted(entries(store), key=lambda one: read_cell(store, one)["identity"]["tokens"])
    assert entries(store)[short]["trunk"] == {"cell": trunk, "tokens": 15_360}
    assert "trunk" not in entries(store)[trunk]
    planned = {row["id"]: row for row in ledger_rows(store, "shared")}
    assert planned[short]["C_spent"] == 0.25 * planned[short]["C"]
    end(store, trunk)
    end(store, short)  # the trunk's checkpoint was lost
    end(store, middle, {"cell": trunk, "tokens": 30_720})
    rows = {row["id"]: row for row in ledger_rows(store, "shared")}
    assert (rows[short]["trunk"], rows[short]["C_spent"]) == (None, rows[short]["C"])
    assert (rows[middle]["trunk"], rows[middle]["trunk_tokens"]) == (trunk, 30_720)
    told = sharing(list(rows.values()))
    assert told is not None
    assert told["branches"] == 1
    assert told["C_spent"] == sum(row["C_spent"] for row in rows.values())
    status = escala("status", "shared", "--store", "store")
    assert sharing_words(told) in status.stdout
    assert json.loads(escala("status", "shared", "--store", "store", "--json").stdout)["shared"] == told


def test_the_plan_of_a_study_that_has_grown_counts_what_the_store_has_kept(escala: Escala) -> None:
    store = put_on_record(escala, shared(seeds="[0]"))
    ids = sorted(entries(store), key=lambda one: read_cell(store, one)["identity"]["tokens"])
    trunk = ids[-1]
    end(store, trunk)
    keep(store, trunk, 61_440)  # where its own cooldown begins; those of the branches are gone
    path = escala.study(grown := shared((*LENGTHS, 163_840), seeds="[0]"))
    told = json.loads(escala("plan", path, "--store", "store", "--json").stdout)
    rows = {row["D"]: row for row in told["cells"]}
    assert (rows[163_840]["trunk"], rows[163_840]["trunk_tokens"]) == (trunk, 61_440)
    assert rows[163_840]["C_spent"] == rows[163_840]["C"] - 61_440 / 81_920 * rows[81_920]["C"]
    assert rows[20_480]["trunk"] == rows[163_840]["id"], "what is lost is there again when the longest has come so far"
    end(put_on_record(escala, grown), rows[163_840]["id"])
    told = json.loads(escala("plan", path, "--store", "store", "--json").stdout)
    short = next(row for row in told["cells"] if row["D"] == 20_480)
    assert (short["trunk"], short["C_spent"]) == (None, short["C"]), "no checkpoint is left, nor is one to come"


# --- gc ----------------------------------------------------------------------------------------------------------


def keep(store: Store, cell_id: str, tokens: int) -> Path:
    """A permanent checkpoint of the cell's first attempt."""
    path = store.checkpoints(cell_id, 0) / str(tokens)
    path.mkdir(parents=True)
    (path / "state.json").write_bytes(encode_row({"permanent": True}))
    return path


def test_trunks_go_when_they_are_named_and_nobody_waits_for_them(escala: Escala) -> None:
    store = put_on_record(escala, shared())
    lines = [sorted(path.name for path in line.iterdir()) for line in sorted((store.root / "lineages").iterdir())]
    assert [len(line) for line in lines] == [3, 3]
    for cell_id in (*lines[0], *lines[1][:2]):
        end(store, cell_id)
    whole, waited = keep(store, lines[0][0], 15_360), keep(store, lines[1][0], 15_360)
    assert "trunks" not in BY_DEFAULT
    assert collectable(store) == []
    assert [item.path for item in collectable(store, ["trunks"])] == [whole], "a cell of the other is still to come"
    escala("gc", "--only", "trunks", "--yes", "--store", "store")
    assert (whole.exists(), waited.exists()) == (False, True)
    told = escala("gc", "--help").stdout
    assert "trains its past again" in " ".join(told.replace("│", " ").split())


def test_a_cell_that_is_taken_away_leaves_no_note_in_its_lineage(escala: Escala) -> None:
    store = put_on_record(escala, shared(seeds="[0]"))
    put_on_record(escala, shared(lengths=LENGTHS[1:], seeds="[0]"))
    (gone,) = {path.name for path in (store.root / "cells").iterdir()} - set(entries(store))
    for path in (*store.cell(gone).rglob("*"), store.cell(gone)):
        os.utime(path, (time.time() - 7200,) * 2)
    freed = json.loads(escala("gc", "--yes", "--store", "store", "--json").stdout)
    assert {item["kind"] for item in freed["items"]} == {"cells", "leftovers"}
    assert not store.cell(gone).exists()
    assert not list((store.root / "lineages").glob(f"*/{gone}"))


# --- MLflow ------------------------------------------------------------------------------------------------------


def test_mlflow_tells_the_trunk_and_follows_a_study_that_grows(escala: Escala, mlflow_server: Server) -> None:
    text = shared(seeds="[0]").replace("name: shared", "name: grows")
    store = put_on_record(escala, text)

    def cells() -> list[str]:
        found = [entry["id"] for entry in read_plan(store, "grows")["cells"]]
        return sorted(found, key=lambda one: read_cell(store, one)["identity"]["tokens"])

    def mirrored() -> dict[str, dict[str, str]]:
        mirror = Mirror(store, "grows", mlflow_server.uri)
        mirror.connect()
        mirror.sync()
        assert mirror.fault is None
        assert mirror.is_complete()
        query = (
            "select t.value, r.run_uuid from runs r join tags t on t.run_uuid = r.run_uuid and t.key = 'escala.cell'"
        )
        query += " join experiments e on e.experiment_id = r.experiment_id where e.name = 'grows'"
        runs = dict(mlflow_server.rows(query))
        assert sorted(runs) == sorted(cells()), "one run a cell"
        frames = [load_runs("grows", store), load_runs("grows", escala.folder / "away", tracking_uri=mlflow_server.uri)]
        assert frames[0].equals(frames[1])
        return {
            cell: dict(mlflow_server.rows("select key, value from tags where run_uuid = ?", run))
            for cell, run in runs.items()
        }

    short, middle, trunk = cells()
    end(store, trunk)
    for cell_id, tokens in ((short, 15_360), (middle, 30_720)):
        end(store, cell_id, {"cell": trunk, "tokens": tokens})
    tags = mirrored()
    assert (tags[short]["escala.trunk"], tags[short]["escala.trunk_tokens"]) == (trunk, "15360")
    assert "escala.trunk" not in tags[trunk]
    assert set(load_runs("grows", store)["trunk"]) == {trunk}

    put_on_record(escala, shared((*LENGTHS, 163_840), "[0]").replace("name: shared", "name: grows"))
    longer = cells()[-1]
    assert not Mirror(store, "grows", mlflow_server.uri).is_complete(), "three cells have another trunk now"
    end(store, longer, {"cell": trunk, "tokens": 61_440})
    assert mirrored()[longer]["escala.trunk"] == trunk
    runs = load_runs("grows", store).set_index("cell")
    assert set(runs["trunk"]) == {longer}, "all four share a past"
    assert runs["C_spent"][short] == 0.25 * runs["C"][short]


def test_a_plan_without_branches_has_the_trunk_of_every_cell_be_its_own(escala: Escala) -> None:
    store = put_on_record(escala, shared().replace("kind: wsd, cooldown_fraction: 0.25", "kind: cosine"))
    runs = load_runs("shared", store)
    assert (runs["trunk"] == runs["cell"]).all()
    assert (runs["C_spent"] == runs["C"]).all()
    assert (runs["schedule"] == "cosine").all()
    assert runs["cooldown_fraction"].isna().all()


def test_a_result_of_before_there_were_trunks_spent_what_it_is_worth() -> None:
    counts = {"C": 10.0, "flops_per_token": 2.0}
    old = {"state": "finished"}
    assert spent_flops({"id": "a"}, counts, old) == 10.0
    assert trunk_of({"id": "a", "trunk": {"cell": "b", "tokens": 3}}, old) is None
    assert spent_flops({"id": "a", "trunk": {"cell": "b", "tokens": 3}}, counts, None) == 4.0
