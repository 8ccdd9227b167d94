"""Ray Train's ranks train the cells of a study; a rank that is killed takes its gang with it, and the cell goes on."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from commandline import ROOT

from cluster import tasks
from cluster.driver import run_study
from cluster.gang import Gang
from cluster.progress import Progress
from sweeps.attempt import run_attempt
from sweeps.corpora import make_source, prepare
from sweeps.grids import Plan, plan_study
from sweeps.records import read_json, write_json
from sweeps.store import Store, attempt_epochs, checkpoint_paths, open_store, read_cell, read_end
from sweeps.study import Study

STUDY: dict[str, Any] = {
    "name": "gangs",
    "corpus": {"source": "markov", "options": {"vocab_size": 8, "tokens": 200_000}},
    "context": 32,
    "families": ["llama"],
    "grid": {"type": "points", "points": [{"size": 10_000, "tokens": 1_800 * 96}, {"size": 10_000, "tokens": 40 * 96}]},
    "training": {"batch_tokens": 96},
    "workers": 2,
}
FAMILY = """
import dataclasses, pathlib

from sweeps.families import FAMILIES

def config(shape, options):
    import torch.distributed

    full = pathlib.Path(__file__).parent / "full"
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1 and full.exists():
        full.unlink()
        raise MemoryError("no room on the second GPU")
    return FAMILIES["llama"].config(shape, options)

def family():
    return dataclasses.replace(FAMILIES["llama"], name="mine.py:family", config=config)
"""
"""A llama that finds no memory for itself on the rank that writes nothing, the first time."""
RANK = """
import os, sys
import psutil
from cluster import gang

rank = sys.argv[1]
os.environ |= {"RANK": rank, "WORLD_SIZE": "2"}
port = gang._open_meeting() if rank == "0" else int(sys.argv[2])
print(port, flush=True)
gang._meet(port, 60)

from sweeps.ranks import join_ranks

ranks = join_ranks()
ranks.most(1)
listening = {one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == "LISTEN"}
ranks.most(1)
print(ranks.count, *listening)
"""
"""One rank, without Ray: where it listens once it has joined the other."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def planned(store: Store) -> Plan:
    source = make_source("markov", None, STUDY["corpus"]["options"])
    return plan_study(Study.model_validate(STUDY), prepare(source, "bytes", store.root))


def followers(pid: int) -> list[psutil.Process]:
    """The other ranks of the gang whose rank 0 has this id."""
    siblings = psutil.Process(pid).parent().children()
    return [one for one in siblings if "RayTrainWorker" in " ".join(one.cmdline()) and one.pid != pid]


@pytest.mark.slow
def test_a_study_with_two_workers_outlives_a_rank_and_equals_one_of_one_worker(
    store: Store, ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "POLL_SECONDS", 0.1)  # the long cell trains for many of these
    plan = planned(store)
    long, short = sorted((one.cell for one in plan.cells), key=lambda cell: -cell.steps)
    killed: list[int] = []

    def watch(progress: Progress) -> None:
        kept = checkpoint_paths(store.checkpoints(long.id, 0))
        if kept and not killed and read_end(store, long.id, 0) is None:
            (victim,) = followers(read_json(store.attempt(long.id, 0) / "attempt.json")["pid"])
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)

    tally = run_study(store, plan, b"", watch=watch, address=ray_address, workers=2, checkpoint_seconds=0.2)
    assert (tally.finished, tally.failed) == (2, {})
    # 1. The death was charged to the machines, and the cell went on from its checkpoint.
    assert killed
    assert attempt_epochs(store, long.id) == [0, 1]
    end = read_end(store, long.id, 0)
    assert end is not None
    assert end[0] == "infrastructure"
    assert read_json(store.attempt(long.id, 1) / "heartbeat.json")["resumed_from"] > 0
    # 2. The next cell found warm ranks: the same process wrote both results.
    pids = [read_json(store.attempt(one.id, epoch) / "attempt.json")["pid"] for one, epoch in ((long, 1), (short, 0))]
    assert pids[0] == pids[1]
    # 3. One process ends with the same losses.
    alone = open_store(tmp_path / "alone")
    planned(alone)
    for cell, tolerance in ((long, 2e-3), (short, 1e-5)):
        found = read_json(store.cell(cell.id) / "result.json")
        assert found["numerics"]["workers"] == 2
        write_json(alone.cell(cell.id) / "cell.json", read_cell(store, cell.id))
        run_attempt(alone, cell.id, study="alone")
        expected = read_json(alone.cell(cell.id) / "result.json")
        assert found["val_loss_final"] == pytest.approx(expected["val_loss_final"], rel=tolerance)
        assert (found["tokens"], found["flops"]) == (expected["tokens"], expected["flops"])


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_is_charged_as_that_whichever_it_is(
    store: Store, ray_address: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(FAMILY)
    (tmp_path / "full").touch()
    corpus = prepare(make_source("markov", None, STUDY["corpus"]["options"]), "bytes", store.root)
    grid = {"type": "points", "points": [{"size": 10_000, "tokens": 40 * 96}]}
    declared = Study.model_validate(STUDY | {"families": ["mine.py:family"], "grid": grid})
    plan = plan_study(declared, corpus, allow_code=True, base_dir=tmp_path)
    (cell,) = [one.cell for one in plan.cells]
    tally = run_study(store, plan, b"", watch=lambda _: None, address=ray_address, workers=2, base_dir=tmp_path)
    assert (tally.finished, tally.failed) == (1, {})
    assert read_end(store, cell.id, 0) == ("out_of_memory", "MemoryError: no room on the second GPU")
    sizes = [read_json(store.attempt(cell.id, one) / "attempt.json")["numerics"]["micro_batch"] for one in (0, 1)]
    assert sizes == [2, 1], "half of it, as after rank 0's own"


def test_a_gang_whose_rank_ran_out_of_memory_says_so_and_one_whose_rank_died_says_that(tmp_path: Path) -> None:
    async def run(short: str | None) -> None:
        gang = Gang([{"CPU": 1.0}] * 2, 0.5, None)
        loop = asyncio.get_running_loop()

        def ranks() -> None:
            if short is not None:
                asyncio.run_coroutine_threadsafe(gang.ran_out(0, short), loop).result()
            raise RuntimeError("rank 1 is gone")

        gang._start = ranks  # type: ignore[method-assign]
        await gang.run(str(tmp_path), ["c"], "s", None, 60.0, 0, False, 1)

    with pytest.raises(MemoryError, match=r"^OutOfMemoryError: CUDA out of memory$"):
        asyncio.run(run("OutOfMemoryError: CUDA out of memory"))
    with pytest.raises(RuntimeError, match=r"the gang died .rank 1 is gone"):
        asyncio.run(run(None))


def test_the_ranks_of_a_gang_listen_on_loopback_alone() -> None:
    def start(*arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen([sys.executable, "-c", RANK, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    with start("0") as first:
        assert first.stdout is not None
        with start("1", first.stdout.readline().strip()) as second:
            said = [one.communicate(timeout=120)[0].splitlines()[-1] for one in (first, second)]
    assert said == ["2 127.0.0.1"] * 2
