"""What `escala gc` takes away, and when it takes nothing."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from commandline import Escala, ids, refused

from cluster import garbage, verbs
from cluster.claims import Claim
from cluster.garbage import KINDS, collectable, remove
from sweeps.records import encode_row, read_json, write_beside, write_json
from sweeps.store import Store, begin_attempt, read_cell, record_error
from tests.analysis.synthetic import Run, write_study


def old(path: Path, seconds: float = 2 * 3600) -> Path:
    """Make a file or folder look as if nobody had written to it for long."""
    for one in [*path.rglob("*"), path]:
        os.utime(one, (time.time() - seconds,) * 2)
    return path


def littered(store: Store) -> dict[str, Path]:
    """One thing of each kind that may go, and beside each something like it that must stay."""
    done, failed = ids(store)[0], ids(store)[4]
    made = {}
    for key, cell, name, permanent in (
        ("checkpoint", done, "1000", False),
        ("permanent", done, "2000", True),
        ("resumable", failed, "1000", False),
    ):
        made[key] = store.attempt(cell, 0) / "checkpoints" / name
        made[key].mkdir(parents=True)
        (made[key] / "state.json").write_bytes(encode_row({"permanent": permanent}))
        (made[key] / "state.safetensors").write_bytes(b"0" * 1000)
    made["leftover"] = store.attempt(done, 0) / "checkpoints" / ".tmp-3000"
    made["leftover"].mkdir()
    (made["leftover"] / "half").write_bytes(b"0" * 500)
    made["fresh"] = store.cell(done) / ".result.json.xyz"
    made["fresh"].write_bytes(b"half")
    write_study(store.root, [Run(width=80, budget=1.2e11)], name="gone")
    made["cell"] = store.cell(ids(store, "gone")[0])
    (store.study("gone") / "plan.json").unlink()
    made["corpus"] = store.root / "corpora" / "feedfeedfeedfeed"
    made["used"] = store.root / "corpora" / "0123456789abcdef"
    for key in ("corpus", "used"):
        made[key].mkdir(parents=True)
        (made[key] / "train-00000.bin").write_bytes(b"0" * 300)
    for key in ("leftover", "cell", "corpus", "used"):
        old(made[key])
    return made


def test_gc_lists_first_and_removes_only_what_nobody_needs(place: tuple[Escala, Store]) -> None:
    escala, store = place
    made = littered(store)
    kept = {
        p: p.read_bytes() for c in ids(store) for p in store.cell(c).rglob("*.json*") if "checkpoints" not in str(p)
    }
    listed = json.loads(escala("gc", "--store", store.root, "--json").stdout)
    goes = {"checkpoint", "leftover", "cell", "corpus"}
    assert {item["path"] for item in listed["items"]} == {str(made[key].relative_to(store.root)) for key in goes}
    assert [item["kind"] for item in listed["items"]] == ["checkpoints", "leftovers", "cells", "corpora"]
    assert listed["items"][1]["bytes"] == 500
    assert listed["items"][3]["bytes"] == 300
    asked = escala("gc", "--store", store.root).stdout
    assert "--yes" in asked
    assert all(path.exists() for path in made.values()), "nothing goes unasked"
    only = json.loads(escala("gc", "--only", "corpora", "--store", store.root, "--json").stdout)
    assert [item["kind"] for item in only["items"]] == ["corpora"]
    done = json.loads(escala("gc", "--yes", "--store", store.root, "--json").stdout)
    assert done["freed"] == listed["bytes"]
    assert {key for key, path in made.items() if not path.exists()} == goes
    assert {path: path.read_bytes() for path in kept} == kept
    assert "nothing to remove" in escala("gc", "--store", store.root).stdout


def test_gc_is_refused_while_a_driver_or_an_attempt_lives(place: tuple[Escala, Store]) -> None:
    escala, store = place
    littered(store)
    assert 'mean "corpora"' in refused(escala, "gc", "--only", "corpra", "--store", store.root)
    claim = Claim(store, "demo")
    claim.__enter__()
    message = refused(escala, "gc", "--yes", "--store", store.root)
    assert f"study demo is being run by process {os.getpid()}" in message
    claim.__exit__(None, None, None)
    attempt = begin_attempt(store, ids(store)[5], {"numerics": {}})
    assert f"attempt 0 of cell {ids(store)[5]} is still alive" in refused(escala, "gc", "--yes", "--store", store.root)
    record_error(attempt, "stopped", "a test")


def shrink(store: Store) -> tuple[dict[str, Path], Path]:
    """Let the study `demo` plan all but its first two cells, which are old. Returns those, with the plan that had
    them (`write_json(plan, before)` is a study that grows again)."""
    plan = store.study("demo") / "plan.json"
    before = read_json(plan)
    gone = {entry["id"]: old(store.cell(entry["id"])) for entry in before["cells"][:2]}
    write_json(store.study("demo") / "before.json", before)
    write_json(plan, before | {"cells": before["cells"][2:]})
    return gone, plan


def grow(store: Store) -> None:
    write_json(store.study("demo") / "plan.json", read_json(store.study("demo") / "before.json"))


def test_a_cell_that_is_planned_again_while_gc_asks_is_kept_and_told(
    place: tuple[Escala, Store], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = place
    gone, _ = shrink(store)
    items = collectable(store)
    assert [item.path.name for item in items] == sorted(gone)

    def answer(_: str) -> bool:
        grow(store)
        return True

    monkeypatch.setattr("typer.confirm", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    verbs.gc(None, False, store.root)
    said = capsys.readouterr().out
    assert all((path / "result.json").exists() for path in gone.values())
    assert all(f"kept cells/{name}: it is planned again" in said for name in gone)
    assert "0 bytes freed" in said


def test_a_plan_that_changes_while_gc_removes_keeps_the_cells_and_corpora_that_are_left(
    place: tuple[Escala, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = place
    gone, _ = shrink(store)
    corpus = store.root / "corpora" / "feedfeedfeedfeed"
    corpus.mkdir(parents=True)
    (corpus / "train-00000.bin").write_bytes(b"0" * 300)
    old(corpus)
    first, second = sorted(gone)
    record = read_cell(store, second)  # the one cell that is trained on that corpus
    write_json(store.cell(second) / "cell.json", record | {"identity": record["identity"] | {"corpus": corpus.name}})
    old(store.cell(second))
    items = collectable(store)
    assert [item.path.name for item in items] == [first, second, corpus.name]
    really = garbage.shutil.rmtree

    def slowly(path: Path) -> None:
        really(path)
        grow(store)

    monkeypatch.setattr(garbage.shutil, "rmtree", slowly)
    freed, kept = remove(store, items)
    assert not gone[first].exists()
    assert (gone[second] / "result.json").exists()
    assert (corpus / "train-00000.bin").exists()
    assert (freed, [item.path.name for item in kept]) == (items[0].size, [second, corpus.name])


def test_what_somebody_else_took_away_meanwhile_is_not_told_as_kept(place: tuple[Escala, Store]) -> None:
    _, store = place
    gone, _ = shrink(store)
    items = collectable(store)
    remove(store, items[:1])
    assert remove(store, items) == (items[1].size, [])
    assert not any(path.exists() for path in gone.values())


def test_what_a_file_manager_leaves_in_the_store_neither_stops_gc_nor_counts_as_a_cell(
    place: tuple[Escala, Store],
) -> None:
    _, store = place
    gone, _ = shrink(store)
    (store.root / "lineages" / "0123").mkdir(parents=True)
    for folder in (store.root / "cells", store.root / "studies", store.root / "lineages", store.root / "lineages/0123"):
        for name in (".DS_Store", "notes.txt", "a copy"):
            (folder / name).write_text("x")
    (store.root / "cells" / "copy of a cell").mkdir()
    for one in store.root.rglob("*"):
        os.utime(one, (time.time() - 100,) * 2)  # too young for a killed writer's leftovers, old enough for a cell
    found = collectable(store, list(KINDS))
    assert sorted(item.path.name for item in found if item.kind == "cells") == sorted(gone)
    assert {item.kind for item in found} == {"cells"}
    remove(store, found)
    assert (store.root / "cells" / "notes.txt").exists()
    assert (store.root / "lineages" / "0123" / "notes.txt").exists()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_copy_of_a_cell_that_a_person_has_made_is_kept(place: tuple[Escala, Store], elsewhere: bool) -> None:
    _, store = place
    gone, _ = shrink(store)
    cells = store.root / "cells"
    if elsewhere:  # on another disk
        cells.rename(store.root.parent / "cells")
        cells.symlink_to(store.root.parent / "cells")
    copies = [cells / "keep-this", cells / f"{min(gone)}-before", cells / min(gone).upper().replace("0", "A")]
    for copy in copies:
        shutil.copytree(store.cell(min(gone)), copy)
        old(copy)
    found = collectable(store, list(KINDS))
    assert [item.path for item in found] == [cells / name for name in sorted(gone)]
    remove(store, found)
    assert not any(path.exists() for path in gone.values())
    assert all((copy / "result.json").exists() for copy in copies)


def test_half_a_cell_that_a_killed_plan_left_does_not_stop_gc(place: tuple[Escala, Store]) -> None:
    _, store = place
    half = store.root / "cells" / "aaaa000000000000"
    half.mkdir()
    assert collectable(store) == [], "it may belong to a plan in the making"
    old(half)
    assert [(item.kind, item.path) for item in collectable(store)] == [("cells", half)]


def test_files_of_people_stay_and_what_writers_leave_goes(place: tuple[Escala, Store]) -> None:
    _, store = place
    cell = store.cell(ids(store)[0])
    (store.root / ".git").mkdir()
    (store.root / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (store.root / "studies" / ".ipynb_checkpoints").mkdir()
    theirs = [store.root / ".git", store.root / "studies" / ".ipynb_checkpoints", store.study("demo") / ".env.template"]
    theirs[-1].write_text("HF_TOKEN=")
    theirs.append(store.root / "corpora" / "my-texts")
    theirs[-1].mkdir(parents=True)
    temporary = [
        write_beside(folder / name, b"half")
        for folder, name in (
            (store.root, "store.json"),
            (store.study("demo"), "study.yaml"),
            (cell, "result.json"),
            (store.attempt(cell.name, 0), "documents.npz"),
            (store.attempt(cell.name, 0), "error.txt"),
            (cell, cell.name),
        )
    ]
    ours = [*map(Path, temporary), Path(tempfile.mkdtemp(dir=cell / "attempts", prefix=".attempt."))]
    ours += [store.root / f".probe-{'0' * 32}", store.root / "corpora" / ".building-7-0123abcd"]
    for folder in ours[-2:]:
        folder.mkdir(parents=True)
    for path in (*theirs, *ours):
        old(path)
    assert {item.path for item in collectable(store, ["leftovers", "corpora"])} == set(ours)
