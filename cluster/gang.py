"""A gang: an actor that trains one cell on several GPUs of one node, where a worker (cluster/worker.py) has one.

Inside, Ray Train's TorchTrainer starts the ranks, packed on one node, where they join; they stay warm and take one cell
after another, as a worker does. Ray Train is used for nothing else: it keeps no checkpoint, and its retries are off,
since Escala counts attempts itself. Any end that the ranks may not have met alike ends them all, and the next cell
finds new ones: what must never happen is a rank that waits for a dead one, or goes on without it.
"""

import asyncio
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from cluster.placement import Demand, memory_share
from sweeps.devices import hide_gpus
from sweeps.store import Store, cell_state

ALIKE = {"finished", "diverged", "stopped", "superseded"}
"""Ends of an attempt that every rank has met, so that they can go on to another cell."""
LOCALHOST = "127.0.0.1"
_meeting: socket.socket | None = None
"""Of rank 0: where it awaits the other ranks."""
TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead rank is seen
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver looks after nodes
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


def make_gang(ray: Any, demand: Demand, host_part: float, node: str | None = None) -> Any:
    """A new gang, unnamed, with a rank for each worker of a demand, on a node where it is given: a handle like that of
    a worker. `host_part` is of the node's memory, each rank's. Ray Train's controller goes where the gang is, so that
    all of it lives and dies with one node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
    if node is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(**options)(Gang).remote(demand.bundles(), host_part, node)


class Gang:
    """The ranks of one cell at a time. Ray makes it an actor; it holds no resources, its ranks do."""

    def __init__(self, bundles: list[dict[str, float]], host_part: float, node: str | None) -> None:
        self._bundles, self._host_part, self._node = bundles, host_part, node
        self._changed = asyncio.Condition()
        self._number = -1
        self._task: tuple[Any, ...] = ()
        self._end: asyncio.Future[dict[str, Any]] | None = None
        self._ranks: asyncio.Future[None] | None = None
        self._short: str | None = None
        """What a rank said that ran out of memory at this task; rank 0 says that in its attempt."""
        self._folder = ""

    async def run(
        self,
        root: str,
        cell_ids: list[str],
        study: str,
        base_dir: str | None,
        checkpoint_seconds: float,
        driver: int,
        probe: bool,
        threads: int,
    ) -> list[dict[str, Any]]:
        """Try a cell once: how it ended, as of `cluster.worker.Worker.run`. Gangs train no stacks."""
        (cell_id,) = cell_ids
        if cell_state(Store(Path(root)), cell_id).state != "planned":  # another study's worker was quicker
            return []
        if self._ranks is None:
            self._ranks = asyncio.ensure_future(asyncio.to_thread(self._start))
        async with self._changed:
            self._number, self._short = self._number + 1, None
            self._task = root, cell_id, study, base_dir, checkpoint_seconds, driver, threads
            self._end = asyncio.get_running_loop().create_future()
            self._changed.notify_all()
        either: list[asyncio.Future[Any]] = [self._end, self._ranks]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        ended = self._end.result() if self._end.done() else None
        if ended is None or ended["state"] not in ALIKE:
            await asyncio.wait([self._ranks])
            error, self._ranks = self._ranks.exception(), None
            if ended is None and self._short is not None:
                raise MemoryError(self._short)
            if ended is None:
                raise RuntimeError(f"the gang died ({' '.join(str(error).split())[:500]})")
            if ended["state"] == "preemption":  # whoever sent SIGTERM wants the processes gone
                import ray

                ray.actor.exit_actor()
        return [ended]

    async def task(self, number: int) -> tuple[Any, ...]:
        """What a rank is to do as its task of this number, once there is one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._number >= number)
            return self._task

    async def first(self) -> int:
        """The number of the task that new ranks begin with. They have started: Ray Train's folder is not needed."""
        shutil.rmtree(self._folder, ignore_errors=True)
        return self._number

    async def done(self, number: int, ended: dict[str, Any]) -> None:
        """Rank 0 tells how a task has ended."""
        if self._end is not None and number == self._number and not self._end.done():
            self._end.set_result(ended)

    async def ran_out(self, number: int, reason: str) -> None:
        """A rank that writes nothing ran out of memory, of which the others hear only that it is gone."""
        if number == self._number:
            self._short = reason

    def _start(self) -> None:
        """Start the ranks and wait for their end. In a thread of its own."""
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        os.environ |= TRAIN_SETTINGS
        self._folder = tempfile.mkdtemp(prefix="escala-gang-")  # Ray Train wants one; nothing is kept there
        try:
            TorchTrainer(
                _train,
                train_loop_config={"gang": ray.get_runtime_context().current_actor, "host_part": self._host_part},
                torch_config=_listening("GPU" in self._bundles[0]),
                scaling_config=ScalingConfig(
                    num_workers=len(self._bundles),
                    use_gpu="GPU" in self._bundles[0],
                    resources_per_worker=self._bundles[0],
                    placement_strategy="STRICT_PACK",
                    label_selector={"ray.io/node-id": self._node} if self._node else None,
                ),
                run_config=RunConfig(
                    name="gang", storage_path=self._folder, failure_config=FailureConfig(max_failures=0)
                ),
            ).fit()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def _listening(gpus: bool) -> Any:
    """The setting up of torch.distributed in place of Ray's, which would have rank 0 listen on every interface: over
    gloo (sweeps/ranks.py adds NCCL where there are GPUs: a logical one has none), in processes that see no GPU unless
    they have some, and that hear SIGTERM: their trainer is not in the main thread, which alone can."""
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _set_torch_distributed_env_vars

    standard: Any = TorchConfig(backend="gloo").backend_cls

    class Backend(standard):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            if not gpus:  # first, for torch counts them once
                worker_group.execute(hide_gpus)
            worker_group.execute(_set_torch_distributed_env_vars)
            worker_group.execute(_meet, worker_group.execute_single(0, _open_meeting), backend_config.timeout_s)
            worker_group.execute(_hear_sigterm)

    @dataclass
    class Config(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Backend

    return Config(backend="gloo")


def _open_meeting() -> int:
    """The port at which this rank awaits the others, from this machine alone: a gang is on one."""
    global _meeting
    _meeting = socket.create_server((LOCALHOST, 0))
    return int(_meeting.getsockname()[1])


def _meet(port: int, timeout_seconds: float) -> None:
    """Join the other ranks at the port that rank 0 has opened."""
    from torch import distributed as dist

    loopback = [name for name, known in psutil.net_if_addrs().items() if any(one.address == LOCALHOST for one in known)]
    for name in loopback[:1]:  # gloo and NCCL listen too; they would on the address of the machine's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    rank, count, patience = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=timeout_seconds)
    listening = _meeting.detach() if rank == 0 and _meeting is not None else None
    store = dist.TCPStore(LOCALHOST, port, count, rank == 0, patience, master_listen_fd=listening)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=patience)


def _hear_sigterm() -> None:
    from sweeps.heartbeat import hear_sigterm

    hear_sigterm()


def _train(config: dict[str, Any]) -> None:
    """One rank: cell after cell."""
    import ray

    from sweeps.attempt import kind_of, run_attempts
    from sweeps.devices import cap_memory, keep_freed_memory
    from sweeps.gang import follow_attempt
    from sweeps.ranks import join_ranks

    keep_freed_memory()
    cap_memory(memory_share(1), config["host_part"])
    gang, ranks = config["gang"], join_ranks()
    number = ray.get(gang.first.remote())
    while True:
        root, cell_id, study, base_dir, checkpoint_seconds, driver, threads = ray.get(gang.task.remote(number))
        store, base = Store(Path(root)), Path(base_dir) if base_dir else None
        if ranks.rank:
            try:
                follow_attempt(store, cell_id, ranks, base_dir=base)
            except Exception as error:
                if kind_of(error) == "out_of_memory":
                    ray.get(gang.ran_out.remote(number, f"{type(error).__name__}: {error}"))
                raise
        else:
            (ended,) = run_attempts(
                store,
                [cell_id],
                study=study,
                base_dir=base,
                checkpoint_seconds=checkpoint_seconds,
                driver=driver,
                threads=threads,
                ranks=ranks,
            )
            ray.get(gang.done.remote(number, vars(ended)))
            if ended.state not in ALIKE:
                raise RuntimeError(f"{ended.state}: {ended.reason}")
        number += 1
