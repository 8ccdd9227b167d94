"""Workers of several kinds on one cluster: every GPU holds what it can, what is idle makes room, GPU time is counted.

The cluster's GPUs are logical: Ray counts them, and what a cell computes on is the CPU.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commandline import ROOT

from cluster import connection, driver, pool, tasks
from cluster.connection import cluster_nodes, gpu_bytes, start_ray, stop_ray
from cluster.driver import Tally, run_study
from cluster.placement import Demand, Fleet, Node, demand_of
from cluster.pool import Pool
from sweeps.corpora import make_source, prepare
from sweeps.errors import InputError
from sweeps.grids import Plan, plan_study
from sweeps.memory import demand as bytes_of
from sweeps.store import Store, open_store
from sweeps.study import Study

SOURCE = {"source": "markov", "options": {"vocab_size": 8, "tokens": 60_000}}
SIZES = (10_000, 3_000_000)
TRAINER = """
import json, os, pathlib, time, ray

def train(cell, io):
    began = time.time()
    time.sleep(0.4)
    node = ray.get_runtime_context().get_node_id()
    turn = {"cell": cell.id, "pid": os.getpid(), "node": node, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
    with (pathlib.Path(__file__).parent / "turns.jsonl").open("a") as file:
        file.write(json.dumps(turn | {"began": began, "ended": time.time()}) + "\\n")
    io.log(cell.tokens, {"train_loss": 1.0})
    return 1.0
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits scaled down."""
    monkeypatch.setattr(tasks, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(driver, "LOOK_SECONDS", 0.2)


@pytest.fixture(scope="module")
def gpu_address() -> Iterator[str]:
    """A Ray of two nodes, each with four CPUs and one GPU that is not there."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ["PYTHONPATH"] = str(ROOT)  # for its workers alone
    try:
        node = {"num_cpus": 4, "num_gpus": 1, "object_store_memory": 80 * 1024**2}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        cluster.add_node(**node)
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ |= before
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def make_plan(store: Store, tmp_path: Path) -> Callable[..., Plan]:
    (tmp_path / "mine.py").write_text(TRAINER)
    corpus = prepare(make_source("markov", None, SOURCE["options"]), "bytes", store.root)

    def make(seeds: int, sizes: tuple[int, ...] = SIZES, **more: Any) -> Plan:
        declared: dict[str, Any] = {
            "name": "s",
            "corpus": SOURCE,
            "context": 32,
            "families": ["llama"],
            "grid": {"type": "points", "points": [{"size": size, "tokens": 6_400} for size in sizes]},
            "training": {"batch_tokens": 64},
            "seeds": list(range(seeds)),
            "trainer": "mine.py:train",
        }
        return plan_study(Study.model_validate(declared | more), corpus, allow_code=True, base_dir=tmp_path)

    return make


@pytest.fixture
def drive(gpu_address: str, store: Store, tmp_path: Path) -> Callable[[Plan], Tally]:
    def run(plan: Plan) -> Tally:
        return run_study(store, plan, b"", watch=lambda _: None, address=gpu_address, base_dir=tmp_path)

    return run


@pytest.mark.slow
def test_cells_that_share_a_gpu_and_cells_that_want_one_run_on_one_cluster_and_none_holds_too_much(
    make_plan: Callable[..., Plan], drive: Callable[[Plan], Tally], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(4)
    small, large = (pick(plan.cells, key=lambda one: one.counts["N"]) for pick in (min, max))
    memory = next(
        size
        for size in range(10**9, 10**11, 10**7)
        if demand_of(small, device="cuda", gpu_bytes=size, crowd=9).gpus == 0.5
        and size * 0.92 > bytes_of(large.cell.shape, large.cell.sequences, large.cell.precision, device="cuda")
    )
    assert demand_of(large, device="cuda", gpu_bytes=memory, crowd=9).gpus == 1.0

    def with_memory(ray: Any, **_: Any) -> list[Node]:
        return [replace(node, gpu_bytes=memory) for node in cluster_nodes(ray)]

    monkeypatch.setattr(pool, "cluster_nodes", with_memory)
    tally = drive(plan)
    assert (tally.finished, tally.failed, tally.stopped) == (8, {}, None)
    turns = [json.loads(line) for line in (tmp_path / "turns.jsonl").read_text().splitlines()]
    share = {one.cell.id: 1.0 if one.cell.shape == large.cell.shape else 0.5 for one in plan.cells}
    for turn in turns:
        together = [one for one in turns if one["began"] <= turn["began"] < one["ended"]]
        used: Counter[tuple[str, str]] = Counter()
        for one in together:
            used[one["node"], one["gpu"]] += share[one["cell"]]  # type: ignore[assignment]
        assert all(amount <= 1.0 for amount in used.values()), "a GPU held more than it can"
    by_kind: dict[float, set[int]] = {1.0: set(), 0.5: set()}
    for turn in turns:
        by_kind[share[turn["cell"]]].add(turn["pid"])
    assert not by_kind[1.0] & by_kind[0.5], "a worker keeps its share"
    assert len(by_kind[1.0]) <= 2, "two GPUs, two warm workers that took two cells each"
    assert len(by_kind[0.5]) <= 4
    order = sorted(turns, key=lambda turn: turn["began"])
    assert {share[turn["cell"]] for turn in order[:2]} == {1.0}, "longest first"


@pytest.mark.slow
def test_a_budget_of_gpu_hours_ends_a_run_and_holds_over_the_next(
    make_plan: Callable[..., Plan], drive: Callable[[Plan], Tally], store: Store
) -> None:
    tally = drive(make_plan(4, SIZES[:1], limits={"gpu_hours": 1e-5}))
    assert tally.stopped is not None
    assert tally.stopped.startswith("out of budget: of the budget of 1e-05 GPU-hours")
    assert 1 <= tally.finished <= 2, "what runs goes on to its end"
    assert (tally.planned, tally.failed) == (4 - tally.finished, {})
    used = [json.loads(path.read_text())["gpu_seconds"] for path in (store.study("s") / "usage").glob("*.json")]
    assert len(used) == 1
    assert used[0] >= 0.4 * tally.finished
    again = drive(make_plan(4, SIZES[:1], limits={"gpu_hours": 1e-5}))
    assert (again.finished, again.planned) == (0, tally.planned)


@pytest.mark.slow
def test_the_memory_of_a_gpu_is_told_by_a_node_that_another_study_fills(
    gpu_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "GPU_SECONDS", 300.0)
    ray = start_ray(gpu_address)
    try:
        node = next(one for one in cluster_nodes(ray) if one.gpus)
        assert [one.id for one in cluster_nodes(ray, barred=[node.id])].count(node.id) == 0

        class Other:
            def here(self) -> str:
                return str(ray.get_runtime_context().get_node_id())

        others = [ray.remote(num_cpus=4, num_gpus=1)(Other).remote() for _ in range(2)]
        assert node.id in ray.get([one.here.remote() for one in others])
        assert gpu_bytes(ray, node.id) == 0, "a logical GPU has none"
    finally:
        stop_ray(ray)


def pool_of(monkeypatch: pytest.MonkeyPatch, node: Node) -> Pool:
    monkeypatch.setattr(pool, "cluster_nodes", lambda _, **__: [node])
    return Pool(None, Fleet(), 1, 1, False)


def test_a_study_that_trained_on_gpus_is_not_moved_to_cpus_where_the_last_gpu_is_away(
    make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_plan(1).cells[0]
    made = pool_of(monkeypatch, Node("head", 8))
    with pytest.raises(InputError, match=r"have trained on a GPU \(H100\), and no node at head:6379 has one now. Add"):
        made.meet_gpus("H100", lambda _: False, "head:6379")
    assert made.meet_gpus(None, lambda _: False, "head:6379") == []
    (said,) = made.meet_gpus(None, lambda _: True, "head:6379")
    assert said.startswith("no node with a GPU is up, so cells train on CPUs")
    assert made.demand(one) == Demand(1)
    assert made.meet_gpus("H100", lambda _: True, "head:6379") == []
    assert made.demand(one) == Demand(1, 1.0), "the autoscaler is asked for a GPU"
    (said,) = pool_of(monkeypatch, Node("gpus", 8, 2)).meet_gpus("H100", lambda _: False, "head:6379")
    assert said.startswith("torch finds none of the GPUs that Ray counts: each cell gets a whole one and trains on a")
