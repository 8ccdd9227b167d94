"""One driver holds a study; a dead or frozen one is replaced by exactly one other."""

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from refusing import refuse_claims

import cluster.claims as claims
from cluster.claims import Claim, driver_lives, living_drivers, read_holder
from cluster.control import cancel, pause, read_wish, resume
from cluster.garbage import refuse_while_running
from cluster.turns import Turns
from sweeps.errors import InputError
from sweeps.life import SILENCE_SECONDS
from sweeps.records import read_json, write_json
from sweeps.store import Store, open_store, study_names


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def kill(store: Store) -> None:
    """Make the highest claim that of a process that is gone."""
    holder = read_holder(store, "s")
    assert holder is not None
    write_json(holder.path, read_json(holder.path) | {"process_ticks": 1})


def test_one_driver_holds_a_study_and_a_dead_one_is_replaced(store: Store) -> None:
    with Claim(store, "s") as first:
        with pytest.raises(InputError, match=f"study s is being run by process {os.getpid()} on .* since"):
            Claim(store, "s").__enter__()
        assert first.holds()
        kill(store)
        with Claim(store, "s") as second:
            assert second.number == first.number + 1
            assert second.holds()
            assert not first.holds()
            assert driver_lives(store, "s", second.number)
            assert not driver_lives(store, "s", first.number)
        assert not first.holds(), "not even when its successor has ended"
    with Claim(store, "s") as third:
        assert third.number == second.number + 1


def test_a_disk_that_refuses_at_the_end_hides_nothing_of_what_a_driver_has_done(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> dict[str, Any]:
        raise InputError(f"{path} cannot be read as a record: [Errno 5] Input/output error")

    with Claim(store, "s"):
        monkeypatch.setattr(claims, "read_json", refuse)
    monkeypatch.undo()
    holder = read_holder(store, "s")
    assert holder is not None
    assert "ended" not in holder.record, "whoever comes next sees that its process is gone"


def test_the_end_of_a_claim_is_on_disk_before_it_takes_the_place_of_the_claim(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may else leave an empty record there, which no later driver can read."""
    synced: list[int] = []
    with Claim(store, "s") as claim:
        really = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), really(file)))
    assert (store.study("s") / f"driver-{claim.number}.json").stat().st_ino in synced


def test_a_copy_of_a_claim_that_lies_beside_it_is_no_claim(store: Store) -> None:
    with Claim(store, "s") as first:
        copy = store.study("s") / "driver-7 (conflicted copy).json"
        copy.write_text("{}")
        assert first.holds()
        assert [name for name, _ in living_drivers(store)] == ["s"]
    with Claim(store, "s") as second:
        assert second.number == first.number + 1
    assert copy.exists()


def test_a_copy_of_a_studys_folder_is_no_study_and_stops_nothing(store: Store) -> None:
    with Claim(store, "s") as claim:
        write_json(store.study("s") / "plan.json", {"study": {}, "corpus": {}, "cells": []})
        Turns(store, "s", claim.number, "head:6379", 5).tell(True)
        shutil.copytree(store.study("s"), store.root / "studies" / "s copy", copy_function=shutil.copy2)
        shutil.move(store.study("s") / "turn.json", store.root)  # of the two that say the same, the copy's is left
        assert study_names(store) == ["s"]
        assert [name for name, _ in living_drivers(store)] == ["s"]
        assert Turns(store, "low", 0, "head:6379", 0).before() is None
        with pytest.raises(InputError, match="study s is being run"):
            refuse_while_running(store)
    refuse_while_running(store)


def test_a_driver_that_gave_no_sign_for_long_is_taken_to_be_frozen(store: Store) -> None:
    with Claim(store, "s") as first:
        holder = read_holder(store, "s")
        assert holder is not None
        assert holder.lives
        old = time.time() - SILENCE_SECONDS - 1
        os.utime(holder.path, (old, old))
        with Claim(store, "s") as second:
            assert not first.holds()
            assert second.holds()


def test_a_disk_that_refuses_once_does_not_end_a_drivers_signs_of_life(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    with Claim(store, "s"):
        holder = read_holder(store, "s")
        assert holder is not None
        refused, read = threading.Event(), claims.read_json

        def refuse_once(path: Path) -> dict[str, Any]:
            if not refused.is_set():
                refused.set()
                raise InputError(f"{path} cannot be read as a record: [Errno 5] Input/output error")
            return read(path)

        monkeypatch.setattr(claims, "read_json", refuse_once)
        assert refused.wait(120)
        os.utime(holder.path, (0, 0))
        deadline = time.monotonic() + 120
        while holder.path.stat().st_mtime == 0:
            assert time.monotonic() < deadline, "no sign of life since"
            time.sleep(0.01)


def test_a_disk_that_refuses_for_a_moment_is_waited_for_and_then_it_is_told_who_holds(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "AGAIN_SECONDS", 0.01)
    with Claim(store, "s") as first:
        refuse_claims(monkeypatch, 3)
        assert first.holds(60.0)
        kill(store)
        with Claim(store, "s"):
            refuse_claims(monkeypatch, 3)
            assert not first.holds(60.0)


def test_a_disk_that_goes_on_refusing_is_said_with_what_to_do(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "AGAIN_SECONDS", 0.01)
    with Claim(store, "s") as claim:
        refuse_claims(monkeypatch, float("inf"))
        with pytest.raises(InputError, match=r"claim on study s cannot be read .*Stale.* run the study again"):
            claim.holds(0.1)


def test_a_driver_elsewhere_lives_by_its_signs_and_the_message_says_how_to_take_over(store: Store) -> None:
    with Claim(store, "s"):
        holder = read_holder(store, "s")
        assert holder is not None
        write_json(holder.path, holder.record | {"host": "elsewhere"})
        with pytest.raises(InputError, match=r"on elsewhere since .* If that machine is gone, run this again in \d+ s"):
            Claim(store, "s").__enter__()


@pytest.mark.parametrize("attempt", range(20))
def test_of_many_that_replace_a_dead_driver_one_wins(store: Store, attempt: int) -> None:
    Claim(store, "s").__enter__()
    kill(store)
    outcomes: list[str] = []

    def take() -> None:
        try:
            Claim(store, "s").__enter__()
            outcomes.append("won")
        except InputError:
            outcomes.append("lost")

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 7 + ["won"]


def test_a_pause_holds_until_it_is_lifted(store: Store) -> None:
    with pytest.raises(InputError, match="is not paused"):
        resume(store, "s")
    assert pause(store, "s").wish == "pause"
    with pytest.raises(InputError, match=r"is paused by .* already"):
        pause(store, "s")
    assert resume(store, "s") is False
    assert read_wish(store, "s") is None


def test_a_cancel_is_meant_for_the_driver_at_work(store: Store) -> None:
    with pytest.raises(InputError, match="no driver is at work on study s"):
        cancel(store, "s", now=True)
    with Claim(store, "s") as claim:
        assert cancel(store, "s", now=False).wish == "drain"
        wish = read_wish(store, "s")
        assert wish is not None
        assert wish.driver == claim.number
