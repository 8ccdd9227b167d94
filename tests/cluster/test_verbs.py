"""The verbs work from any terminal on the files alone, whether a driver lives or not."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import ROOT, TINY, Escala, ids, refused

import analysis
from cluster import verbs, watching
from cluster.arguments import find_cell
from cluster.claims import Claim
from cluster.watching import cells_named, explain
from sweeps.errors import InputError
from sweeps.records import append_rows, read_json, write_json
from sweeps.store import (
    Store,
    begin_attempt,
    commit_result,
    quarantine_cell,
    read_plan,
    read_quarantine,
    record_error,
)
from tests.analysis.synthetic import Run, write_study

SECONDS = 180.0
"""In which a command line has started and ended, on a busy machine too."""


def row(tokens: int, **metrics: float) -> dict[str, Any]:
    return {"time": 1.7e9, "tokens": tokens, "metrics": metrics}


# --- logs --------------------------------------------------------------------------------------------------------


def test_following_shows_each_row_once_over_attempts_and_ends_with_the_cell(place: tuple[Escala, Store]) -> None:
    escala, store = place
    cell = ids(store)[5]
    claim = Claim(store, "demo")
    claim.__enter__()
    first = begin_attempt(store, cell, {"numerics": {}})
    stream = (first.folder / "log.jsonl").open("ab", buffering=0)
    append_rows(stream, [row(100, train_loss=4.0)])
    follow = escala.start("logs", cell[:10], "-f", "--json", "--store", store.root)
    rows: list[dict[str, Any]] = []
    assert follow.stdout is not None
    rows.append(json.loads(follow.stdout.readline()))
    stream.write(b'{"time":1.0,"tok')  # half a line is no row yet
    record_error(first, "infrastructure", "the worker died")
    rows.append(json.loads(follow.stdout.readline()))
    second = begin_attempt(store, cell, {"numerics": {}})
    with (second.folder / "log.jsonl").open("ab", buffering=0) as again:
        append_rows(again, [row(100, train_loss=4.5), row(200, train_loss=3.0)])
    rows.append(json.loads(follow.stdout.readline()))
    commit_result(second, {"state": "finished", "reason": None, "val_loss_final": 3.0})
    rest, errors = follow.communicate(timeout=SECONDS)
    claim.__exit__(None, None, None)
    assert (follow.returncode, rest, errors) == (0, "", "")
    assert [one.get("tokens") for one in rows] == [100, None, 200]
    assert rows[1]["error"].startswith("infrastructure: the worker died")
    assert rows[2]["attempt"] == 1


def test_following_ends_at_once_where_nothing_more_can_come_and_at_ctrl_c(place: tuple[Escala, Store]) -> None:
    escala, store = place
    finished, failed, planned = (ids(store)[i] for i in (0, 4, 5))
    assert escala("logs", finished, "-f", "--store", store.root).stdout.count("val_loss_final") == 1
    assert "it broke" in escala("logs", failed, "--follow", "--store", store.root).stdout
    attempt = begin_attempt(store, planned, {"numerics": {}})
    with (attempt.folder / "log.jsonl").open("ab", buffering=0) as stream:
        append_rows(stream, [row(100, train_loss=4.0)])
    follow = escala.start("logs", planned, "-f", "--json", "--store", store.root)
    assert follow.stdout is not None
    assert json.loads(follow.stdout.readline())["tokens"] == 100
    assert follow.poll() is None
    follow.send_signal(signal.SIGINT)
    _, errors = follow.communicate(timeout=SECONDS)
    assert (follow.returncode, errors) == (0, "")


def test_the_json_of_a_log_tells_of_the_attempts_that_failed(
    place: tuple[Escala, Store], capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = place
    verbs.logs(ids(store)[4], store.root, as_json=True)
    (told,) = json.loads(capsys.readouterr().out)
    assert (sorted(told), told["attempt"]) == (["attempt", "error"], 0)
    assert told["error"].startswith("code: ValueError: it broke")
    verbs.logs(ids(store)[0], store.root, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(set(row) == {"time", "tokens", "metrics"} for row in rows)


def test_the_log_of_a_cell_that_has_not_begun_says_so(
    place: tuple[Escala, Store], capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = place
    planned = ids(store)[5]
    verbs.logs(planned, store.root)
    assert capsys.readouterr().out == f"{planned} is planned and has logged nothing.\n"
    verbs.logs(planned, store.root, follow=True)
    assert capsys.readouterr().out == f"{planned} is planned and has logged nothing.\n", "no driver lives"
    verbs.logs(planned, store.root, follow=True, as_json=True)
    assert capsys.readouterr().out == ""


# --- why ---------------------------------------------------------------------------------------------------------


def test_why_of_one_cell_names_its_nearest_and_those_no_longer_planned_first(place: tuple[Escala, Store]) -> None:
    escala, store = place
    cell, twin = ids(store)[1], ids(store)[3]
    told = json.loads(escala("why", cell, "--store", store.root, "--json").stdout)
    assert (told["state"], list(told["studies"]), len(told["attempts"])) == ("finished", ["demo"], 1)
    assert [(near["cell"], near["fields"]) for near in told["nearest"]] == [
        (twin, [{"field": "seed", "one": 0, "other": 1}])
    ]
    before = read_plan(store, "demo")
    gone = write_study(store.root, [Run(width=24, budget=1.2e11, changes={"learning_rate": 0.02})])
    changed = ids(store)[0]
    write_json(store.study("demo") / "plan.json", before)
    text = escala("why", cell, "--store", gone).stdout
    assert f"nearest: {changed} (finished, no longer planned) differs in 1 field" in text
    assert "optimizer.learning_rate: 0.01 here, 0.02 there" in text
    assert text.index(changed) < text.index(twin)
    assert "no study plans it any more" in escala("why", changed, "--store", store.root).stdout


def test_why_of_a_failed_cell_tells_each_attempt(place: tuple[Escala, Store]) -> None:
    escala, store = place
    text = escala("why", ids(store)[4], "--store", store.root).stdout
    assert "failed: code: ValueError: it broke" in text
    assert "attempt 0 on " in text


def test_an_ambiguous_beginning_lists_the_cells_with_what_tells_them_apart(place: tuple[Escala, Store]) -> None:
    escala, store = place
    one = json.loads((store.cell(ids(store)[0]) / "cell.json").read_text())
    for name, seed in (("abc0" * 4, 5), ("abc1" * 4, 6)):
        changed = {**one, "id": name, "identity": {**one["identity"], "seed": seed}}
        write_json(store.cell(name) / "cell.json", changed)
    for verb in ("logs", "why", "unquarantine"):
        message = refused(escala, verb, "abc", "--store", store.root)
        assert "2 cells" in message
        assert "abc0abc0  seed 5" in message
        assert "abc1abc1  seed 6" in message
    assert "no cell" in refused(escala, "why", "zz", "--store", store.root)


def test_half_a_cell_is_told_in_a_sentence_and_what_is_no_cell_is_none(place: tuple[Escala, Store]) -> None:
    _, store = place
    cells = store.root / "cells"
    (cells / "abcd000000000000").mkdir()
    (cells / "abcdnotes.txt").write_text("no cell")
    (cells / ".DS_Store").write_text("no cell")
    copy = cells / "a copy"
    copy.mkdir()
    (copy / "cell.json").write_bytes((store.cell(ids(store)[0]) / "cell.json").read_bytes())
    assert cells_named(store, "abcd") == ["abcd000000000000"]
    with pytest.raises(InputError, match=r"lacks the record .*abcd000000000000.cell\.json"):
        explain(store, "abcd000000000000")
    assert explain(store, ids(store)[1])["nearest"][0]["cell"] == ids(store)[3]
    write_json(store.cell("abcd000000000001") / "cell.json", read_json(store.cell(ids(store)[0]) / "cell.json"))
    with pytest.raises(InputError, match=r"2 cells (.|\n)*abcd0{12}  without a record of what it is\n  abcd0{11}1"):
        find_cell("abcd", store)


# --- quarantine --------------------------------------------------------------------------------------------------


def test_quarantine_takes_a_cell_out_of_fits_with_its_reason_and_back(place: tuple[Escala, Store]) -> None:
    escala, store = place
    cell = ids(store)[0]
    escala("quarantine", cell[:8], "--reason", "loss spike at the end", "--store", store.root)
    mark = read_quarantine(store, "demo")[cell]
    assert mark["why"] == "loss spike at the end"
    assert "@" in mark["who"]
    counts = json.loads(escala("status", "demo", "--store", store.root, "--json").stdout)["counts"]
    assert counts["quarantined"] == 1
    runs = analysis.load_runs("demo", store).set_index("cell")
    assert runs["excluded"][cell] == "quarantined: loss spike at the end"
    assert "in quarantine in demo since" in escala("why", cell, "--store", store.root).stdout
    escala("unquarantine", cell, "--store", store.root)
    assert analysis.load_runs("demo", store).set_index("cell")["excluded"][cell] is None
    assert "is not in quarantine" in refused(escala, "unquarantine", cell, "--store", store.root)


def test_a_quarantine_without_a_reason_or_of_a_stranger_is_refused(place: tuple[Escala, Store]) -> None:
    escala, store = place
    write_study(store.root, [Run(width=64, budget=1.2e11)], name="other")
    (cell,) = ids(store, "other")
    assert "say why" in refused(escala, "quarantine", cell, "--reason", " ", "--store", store.root)
    message = refused(escala, "quarantine", cell, "--reason", "odd", "--study", "demo", "--store", store.root)
    assert "planned by: other" in message
    assert "no study 'dmo'" in refused(
        escala, "quarantine", cell, "--reason", "odd", "--study", "dmo", "--store", store.root
    )


def test_marks_made_at_the_same_time_are_all_kept(place: tuple[Escala, Store]) -> None:

    _, store = place
    cells = ids(store)
    threads = [threading.Thread(target=quarantine_cell, args=(store, "demo", c, "odd", "me@here")) for c in cells]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_quarantine(store, "demo")) == set(cells)


# --- every verb -------------------------------------------------------------------------------------------------------


def test_a_store_of_a_newer_format_is_refused_by_every_verb(place: tuple[Escala, Store]) -> None:
    escala, store = place
    cell = ids(store)[0]
    write_json(store.root / "store.json", {"format": 99})
    for verb in (
        *(["status", "demo"], ["logs", cell], ["why", cell], ["quarantine", cell, "--reason", "x"], ["gc", "--yes"]),
        *(["unquarantine", cell], ["sync", "demo"], ["export", "demo", "--out", "o.csv"]),
    ):
        assert "format 99" in refused(escala, *verb, "--store", store.root)


# --- many cells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verb", "most"), [("status", 3), ("plan", 2), ("run", 3)])
def test_what_looks_at_finished_cells_opens_few_files_of_each(tmp_path: Path, verb: str, most: int) -> None:
    """What keeps 10,000 cells within seconds (tests/benchmarks times them): no attempt of a finished cell is opened."""
    from tests.many import write_finished

    escala = Escala(tmp_path)
    study = escala.study(TINY.replace("training:", "seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\ntraining:"))
    store = write_finished(study, tmp_path / "store")
    code = (
        "import sys\nopened = []\nsys.addaudithook(lambda event, args: opened.append(str(args[0])) "
        "if event in ('open', 'os.listdir', 'os.scandir') and '/cells/' in str(args[0]) else None)\n"
        "import escala\ntry: escala.app(sys.argv[1:])\nexcept SystemExit as end: assert not end.code\n"
        "print(len(opened), sum('/attempts' in one for one in opened), file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, verb, str(study), "--store", str(store.root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    opened, attempts = map(int, run.stderr.split()[-2:])
    cells = len(ids(store, "tiny"))
    assert cells >= 60
    assert cells <= opened <= most * cells
    assert attempts == 0


# --- steering ----------------------------------------------------------------------------------------------------


def test_a_pause_is_told_and_lifted_without_a_driver(place: tuple[Escala, Store]) -> None:
    escala, store = place
    assert "is not paused" in refused(escala, "resume", "demo", "--store", store.root)
    assert "is paused" in escala("pause", "demo", "--store", store.root).stdout
    assert "is paused by" in refused(escala, "pause", "demo", "--store", store.root)
    assert "paused by" in escala("status", "demo", "--store", store.root).stdout
    assert "No driver waits: run it again" in escala("resume", "demo", "--store", store.root).stdout
    assert json.loads(escala("status", "demo", "--store", store.root, "--json").stdout)["paused"] is None


def test_there_is_nothing_to_cancel_without_a_driver(place: tuple[Escala, Store]) -> None:
    escala, store = place
    assert "no driver is at work on study demo" in refused(escala, "cancel", "demo", "--now", "--store", store.root)
    assert "no study" in refused(escala, "cancel", "nemo", "--store", store.root)


def test_only_failed_cells_are_tried_again_and_their_attempts_are_forgiven(place: tuple[Escala, Store]) -> None:
    escala, store = place
    failed = ids(store)[4]
    for arguments in ((), (failed, "--failed", "demo")):
        assert "either a cell or --failed" in refused(escala, "retry", *arguments, "--store", store.root)
    assert "has not failed: it is finished" in refused(escala, "retry", ids(store)[0], "--store", store.root)
    attempt = begin_attempt(store, ids(store)[5], {"numerics": {}})
    assert "has not failed: it is running" in refused(escala, "retry", ids(store)[5], "--store", store.root)
    record_error(attempt, "stopped", "a test")
    assert failed in escala("retry", "--failed", "demo", "--store", store.root).stdout
    shown = json.loads(escala("status", "demo", "--store", store.root, "--json").stdout)
    assert "failed" not in shown["counts"]
    assert "has no failed cell" in refused(escala, "retry", "--failed", "demo", "--store", store.root)


def test_the_ledger_says_where_an_attempt_computed_otherwise(place: tuple[Escala, Store]) -> None:
    escala, store = place
    cell = ids(store)[5]
    for micro_batch, kind in ((8, "out_of_memory"), (4, "preemption"), (4, "stopped")):
        record_error(begin_attempt(store, cell, {"numerics": {"micro_batch": micro_batch}}), kind, "a test")
    shown = json.loads(escala("status", "demo", "--store", store.root, "--json").stdout)["cells"]
    told = {one["id"]: one["numerics"] for one in shown if one["numerics"]}
    assert told == {cell: "attempt 1: micro_batch 8 -> 4"}
    assert "other numerics since attempt 1" in escala("why", cell, "--store", store.root).stdout


def test_sync_says_that_nothing_was_sent_where_a_driver_mirrors_the_study(place: tuple[Escala, Store]) -> None:
    escala, store = place
    elsewhere = "http://127.0.0.1:9"
    with Claim(store, "demo"):
        told = escala("sync", "demo", "--store", store.root).stdout
        assert f"demo: its driver, process {os.getpid()} on " in told
        assert "Nothing was sent." in told
        write_json(store.study("demo") / "mirror.json", {"tracking_uri": store.tracking_uri})
        assert "Nothing was sent." in escala("sync", "demo", "--store", store.root).stdout
        to_another = escala("sync", "demo", "--store", store.root, "--tracking-uri", elsewhere, ok=2).stderr
    assert f"to {store.tracking_uri}, and to no other server meanwhile" in to_another
    assert f"nothing was sent to {elsewhere}" in to_another


def test_ctrl_c_leaves_nothing_but_json_of_a_log_that_is_followed(
    place: tuple[Escala, Store], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = place

    def follow(*_: object) -> Iterator[dict[str, Any]]:
        yield row(10, train_loss=2.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(watching, "follow", follow)
    verbs.logs(ids(store)[0], store.root, follow=True, as_json=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [row(10, train_loss=2.0)]
