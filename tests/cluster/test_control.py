"""What people wish of a study: an end of its driver and a pause stand side by side, and neither lifts the other."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plans import planned, points

from cluster import control, verbs
from cluster.claims import Claim, read_holder
from cluster.driver import run_study
from sweeps.errors import InputError
from sweeps.records import read_json, write_json
from sweeps.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = open_store(tmp_path / "store")
    write_json(made.study("test") / "plan.json", {"cells": [], "study": {}, "corpus": {}})
    return made


def heeded(store: Store) -> str | None:
    found = control.read_wish(store, "test")
    return None if found is None else found.wish


def run(store: Store) -> None:
    def watch(_: object) -> None:
        raise AssertionError("it runs")

    run_study(store, planned(points({"size": 2e4, "tokens": 64_000})), b"", watch=watch)


@pytest.mark.parametrize("now", [False, True])
def test_a_paused_study_whose_driver_is_cancelled_stays_paused(store: Store, now: bool) -> None:
    """As the Slurm script does at each time limit: what is requeued runs no study that a person paused."""
    with Claim(store, "test") as claim:
        control.pause(store, "test")
        given = control.cancel(store, "test", now=now)
        assert (heeded(store), given.driver) == (given.wish, claim.number), "its driver ends"
    assert heeded(store) == "pause"
    with pytest.raises(InputError, match=r"study test is paused by .* Lift it first: escala resume test"):
        run(store)
    with Claim(store, "test"):
        assert heeded(store) == "pause", "the cancel was not meant for this driver"
        assert control.resume(store, "test")
        assert heeded(store) is None


def test_a_cancel_without_now_does_not_overrule_one_with_it(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with Claim(store, "test"):
        for now, holds in ((False, "drain"), (True, "cancel"), (False, "cancel")):
            verbs.cancel("test", now=now, store=store.root)
            assert heeded(store) == holds
            assert ("keep a checkpoint and stop" in capsys.readouterr().out) == (holds == "cancel")
    with Claim(store, "test"):
        assert control.cancel(store, "test", now=False).wish == "drain", "the other was meant for the driver before"


def test_a_drain_is_heeded_though_the_study_is_paused_after_it(store: Store) -> None:
    with Claim(store, "test"):
        control.cancel(store, "test", now=False)
        control.pause(store, "test")
        assert heeded(store) == "drain"
        with pytest.raises(InputError, match=r"is paused by .* already"):
            control.pause(store, "test")
    assert heeded(store) == "pause"


def test_resuming_lifts_the_pause_alone_and_says_so(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with Claim(store, "test"):
        verbs.pause("test", store.root)
        assert "its cells keep checkpoints and stop" in capsys.readouterr().out
        verbs.cancel("test", store=store.root)
        assert "It stays paused: escala resume test lifts that" in capsys.readouterr().out
        verbs.resume("test", store.root)
        assert "no longer paused, but its driver ends: drained by" in capsys.readouterr().out
        assert heeded(store) == "drain"
        with pytest.raises(InputError, match="is not paused"):
            control.resume(store, "test")
        verbs.pause("test", store.root)
        assert "it is drained by" in capsys.readouterr().out
    verbs.resume("test", store.root)
    assert "No driver waits: run it again" in capsys.readouterr().out


def old_pause(store: Store) -> None:
    """A pause as an older version kept it, in the file of all wishes."""
    record = {"wish": "pause", "who": "me@here", "when": "2026-01-01T00:00:00Z", "driver": None}
    write_json(store.study("test") / "control.json", record)


def test_a_pause_of_an_older_version_holds_and_is_lifted_and_a_cancel_keeps_it(store: Store) -> None:
    old_pause(store)
    assert heeded(store) == "pause"
    control.resume(store, "test")
    assert heeded(store) is None
    old_pause(store)
    with Claim(store, "test"):
        control.cancel(store, "test", now=True)
        assert heeded(store) == "cancel"
    found = control.read_wish(store, "test")
    assert found is not None
    assert str(found) == "paused by me@here at 2026-01-01T00:00:00Z"


def test_what_a_driver_that_has_ended_was_told_stands_no_more(store: Store) -> None:
    with Claim(store, "test"):
        control.cancel(store, "test", now=True)
    assert heeded(store) is None
    with Claim(store, "test"):
        assert heeded(store) is None


def test_a_frozen_driver_that_wakes_up_heeds_what_it_was_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with Claim(store, "test"):
        control.cancel(store, "test", now=True)
        monkeypatch.setattr("cluster.claims.SILENCE_SECONDS", -1.0)
        holder = read_holder(store, "test")
        assert holder is not None
        assert not holder.lives
        assert heeded(store) == "cancel"
        assert control.read_ending(store, "test") is None, "to others it is gone"


def test_the_view_of_a_study_tells_of_its_pause_where_a_dead_driver_was_cancelled(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import overview

    shown: list[str] = []
    view = SimpleNamespace(update=lambda group, **_: shown.append(str(group.renderables[-1])))

    class Live:
        def __init__(self, **_: Any) -> None: ...

        def __enter__(self) -> SimpleNamespace:
            return view

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(overview, "Live", Live)
    with Claim(store, "test") as claim:
        control.pause(store, "test")
        control.cancel(store, "test", now=False)
        overview.watch_study(store, "test")
        path = store.study("test") / f"driver-{claim.number}.json"
        write_json(path, read_json(path) | {"process_ticks": 1, "process_started": 1.0})  # of a process that is gone
        overview.watch_study(store, "test")
    assert "drained by" in shown[0]
    assert "no driver runs, paused by" in shown[1]
