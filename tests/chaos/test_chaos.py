"""Seeded schedules of kills, freezes and terminations: each study ends as if nothing had happened."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from chaos import run
from chaos.run import Reference, Server, make_reference, run_schedule, table
from chaos.schedule import COUNT, FAULTS, draw

SEEDS = int(os.environ.get("ESCALA_CHAOS_SEEDS", "3"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("reference"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_study_under_chaos_ends_as_if_nothing_had_happened(seed: int, reference: Reference, tmp_path: Path) -> None:
    verdict = run_schedule(seed, tmp_path, reference)
    print("\n".join(verdict.log))
    print(table([verdict]))
    assert not verdict.problems, "\n".join([*verdict.problems, *verdict.log])


def test_a_schedule_follows_from_its_seed_and_thirty_try_every_fault() -> None:
    assert draw(7, 240) == draw(7, 240)
    assert all(len(draw(seed, 240)) == COUNT for seed in range(30))
    assert {fault.name for seed in range(30) for fault in draw(seed, 240)} == set(FAULTS)


@pytest.fixture
def endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A program that takes the place of Python in what is started, and goes on until it is ended."""
    program = tmp_path / "endless"
    program.write_text("#!/bin/sh\nsleep 300\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return str(program)


def still_there(program: str) -> list[str]:
    family = psutil.Process().children(recursive=True)
    return [" ".join(one.cmdline()) for one in family if {program, "sleep"} & set(one.cmdline())]


def test_an_undisturbed_run_that_is_given_up_leaves_no_process(
    endless: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "DEADLINE_SECONDS", 0.2)
    with pytest.raises(subprocess.TimeoutExpired):
        make_reference(tmp_path)
    assert still_there(endless) == []


def test_a_server_that_does_not_start_leaves_no_process(
    endless: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(socket, "create_connection", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Server(tmp_path / "server.db")
    assert still_there(endless) == []
