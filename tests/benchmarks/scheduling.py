"""Scheduling at scale: a simulated cluster of 1,000 GPUs, and how soon a real driver gives ready cells to 200 workers.

simulate: whole processes of `escala simulate` on shipped studies with so many seeds that they have 10,000 cells. Their
times are stretched by an MFU of a millionth, so that cells take minutes as real ones do; and one made-up mix of trunks,
branches, shares of a GPU and gangs.

latency: 10,000 cells of which 200 train at once, each in a logical CPU of its own. Two cores cannot hold 200 processes,
so the 200 workers are threads of two: driver, queue, Ray's calls, leases, logs and results are the real ones, the
process of each worker is not. A cell does nothing for 6 to 18 s. The k-th start beyond the first 200 is what the k-th
end made possible, so that their distance is the latency, in steady state. A budget ends the run.
"""

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measuring import ROOT, Place, Row, escala, timed

CELLS, GPUS, NODES = 10_000, 1_000, 125
SHIPPED = ("quickstart", "trunk-and-branch", "lr-sensitivity", "mup-transfer")
AT_ONCE, TRAINED, HOSTS = 200, 1_200, 2
NOOP = """
corpus: pystdlib
families: [llama]
context: 128
trainer: idle.py:train
grid: {type: ladder, sizes: [10000], tokens_per_parameter: [5]}
training: {batch_tokens: 1024, learning_rate: 0.01}
"""
TRAINER = """
import time

def train(cell, io):
    began = time.time()
    time.sleep(6.0 + 12.0 * (cell.seed * 0.618 % 1))
    io.log(cell.tokens, {"train_loss": 1.0})
    with (io.base_dir / "starts.txt").open("a") as file:
        file.write(f"{began}\\n")
    return 1.0
"""


def simulate(place: Place) -> list[Row]:
    rows = []
    for name in SHIPPED:
        text = (ROOT / "sweeps" / "studies" / f"{name}.yaml").read_text()
        head = [line for line in text.splitlines() if not line.startswith(("name:", "seeds:"))]
        store = place.store_with_corpus
        ten = place.study(f"ten-{name}", "\n".join([*head, f"seeds: {list(range(10))}"]))
        cells = len(json.loads(escala("plan", ten, "--store", store, "--json").output)["cells"])
        many = place.study(f"many-{name}", "\n".join([*head, f"seeds: {list(range(-(-10 * CELLS // cells)))}"]))
        size = ("--gpus", GPUS, "--nodes", NODES, "--mfu", 1e-6, "--json")
        ended = escala("simulate", many, *size, "--store", store)
        rows += _rows(f"{name}, simulated", json.loads(ended.output), ended.seconds)
    told = json.loads(timed([sys.executable, __file__, "mix"]).output)
    return [*rows, *_rows("a mix of demands, simulated", told, told["seconds"])]


def _rows(what: str, told: dict[str, Any], seconds: float) -> list[Row]:
    over = told["makespan_seconds"] / told["lower_bound_seconds"]
    note = f"{told['cells']:,} cells, {GPUS:,} GPUs, {told['utilisation']:.1%} at work"
    return [
        Row(what=what, measured=seconds, unit="s", target=30.0, note=note),
        Row(what=f"{what}, makespan", measured=over, unit="x", target=1.1, note="over the lower bound"),
    ]


def mix() -> None:
    """Print what 10,000 cells of all kinds take: a third are branches; shares, 1, 2 and 8 GPUs; half an hour each."""
    from cluster.placement import Demand, Node
    from cluster.scheduling import Job
    from cluster.simulation import Edge, simulate

    rng = random.Random(0)
    demands = [Demand(1, 0.25), Demand(1, 0.5), Demand(1, 1.0), Demand(2, 1.0), Demand(8, 1.0)]
    jobs: list[Job] = []
    edges, trunks = {}, []
    for number in range(CELLS):
        demand = rng.choices(demands, [0.2, 0.2, 0.4, 0.1, 0.1])[0]
        jobs.append(Job(id=str(number), demand=demand, seconds=min(40_000.0, rng.lognormvariate(7.5, 1.0))))
        if trunks and rng.random() < 0.35:
            trunk = rng.choice(trunks)
            edges[str(number)] = Edge(parent=trunk.id, after=trunk.seconds * rng.random())
        elif rng.random() < 0.3:
            trunks.append(jobs[-1])
    began = time.perf_counter()
    found = simulate(jobs, [Node(str(i), 128, GPUS // NODES) for i in range(NODES)], edges=edges)
    print(json.dumps({"cells": CELLS, "seconds": time.perf_counter() - began} | found.to_json()))


# --- the driver --------------------------------------------------------------------------------------------------


def latency(place: Place) -> list[Row]:
    (place.folder / "idle.py").write_text(TRAINER)
    study = place.study("idle", f"{NOOP}seeds: {list(range(CELLS))}\n")
    store = place.folder / "latency"
    told = json.loads(timed([sys.executable, __file__, "latency", str(study), str(store)]).output.splitlines()[-1])
    starts, ends = sorted(told["starts"]), sorted(told["ends"])
    if len(starts) < TRAINED:
        raise RuntimeError(f"{TRAINED} cells were to train, {len(starts)} did: {told['stopped']}")
    waited = [start - end for start, end in zip(starts[AT_ONCE:], ends)]
    p95, half = statistics.quantiles(waited, n=20)[-1], statistics.median(waited)
    note = f"{len(waited):,} cells, {AT_ONCE} at once as threads of {HOSTS} processes; median {half:.2f} s"
    memory = [size for at, size in told["memory"] if at >= starts[AT_ONCE]]
    third = len(memory) // 3
    growth = statistics.median(memory[-third:]) - statistics.median(memory[:third])
    burst = starts[AT_ONCE - 1] - starts[0]
    return [
        Row(what="cell ready to worker has it, p95", measured=p95, unit="s", target=1.0, note=note),
        Row(what=f"{AT_ONCE} ready cells to workers", measured=burst, unit="s", note="first start to last"),
        Row(what=f"driver, {CELLS:,} cells", measured=max(memory) / 1e6, unit="MB", target=500.0, note="peak"),
        Row(what=f"driver, {CELLS:,} cells, growth", measured=growth / 1e6, unit="MB", target=20.0, note="last third"),
    ]


def drive(study: Path, root: Path) -> None:
    """Run the study in this process on a Ray of 200 logical CPUs, with threads for workers; print what happened."""
    import psutil
    from ray.cluster_utils import Cluster

    import cluster.pool
    from cluster.driver import run_study
    from cluster.planning import read_study
    from sweeps.store import iterate_cells

    os.environ["PYTHONPATH"] = str(ROOT)
    ray_cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": AT_ONCE, "object_store_memory": 80 * 1024**2}
    )
    hosts: list[Any] = []

    class Thread:
        """A worker that is a thread of a host."""

        def __init__(self, host: Any) -> None:
            self.run = host.run

    def make_thread(ray: Any, place: Any, own_trainer: bool, host_part: float) -> Thread:
        from cluster.worker import Worker

        if not hosts:
            options = {"num_cpus": 0, "max_concurrency": AT_ONCE // HOSTS}
            hosts.extend(ray.remote(**options)(Worker).remote(0.0, host_part, own_trainer) for _ in range(HOSTS))
        hosts.append(hosts.pop(0))
        return Thread(hosts[0])

    cluster.pool.make_worker = make_thread  # type: ignore[assignment]
    memory: list[tuple[float, int]] = []
    driver = psutil.Process()

    def watch(_: object) -> None:
        memory.append((time.time(), driver.memory_info().rss))

    store, plan, _ = read_study(str(study), root, True, False)
    limits = plan.study.limits.model_copy(update={"flops": TRAINED * float(plan.cells[0].counts["C"]) * 1.0001})
    from dataclasses import replace

    plan = replace(plan, study=plan.study.model_copy(update={"limits": limits}))
    tally = run_study(store, plan, study.read_bytes(), watch=watch, address=ray_cluster.address, base_dir=study.parent)
    starts = [float(line) for line in (study.parent / "starts.txt").read_text().split()]
    results = [
        store.cell(entry["id"]) / "result.json" for entry, _, state in iterate_cells(store, "idle") if state.result
    ]
    ends = [path.stat().st_mtime for path in results]
    print(json.dumps({"starts": starts, "ends": ends, "memory": memory, "stopped": tally.stopped}))
    ray_cluster.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "mix":
        mix()
    else:
        drive(Path(sys.argv[2]), Path(sys.argv[3]))
