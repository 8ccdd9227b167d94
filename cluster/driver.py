"""The driver: hands the missing cells of a study to a warm pool of Ray workers, longest first, and watches the files.

It keeps nothing that the store does not hold: kill it at any moment and run the study again.
"""

import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.ledger import register
from cluster.mirror import Mirror
from cluster.placement import Slots, choose_slots
from sweeps.errors import InputError
from sweeps.grids import Plan, PlannedCell
from sweeps.store import Attempt, Store, attempt_epochs, cell_state, claim_study, read_rows, record_error

INFRASTRUCTURE_ATTEMPTS = 3
"""How often a cell is tried again in one run after its worker died."""
POLL_SECONDS = 0.5
OBJECT_STORE_BYTES = 80 * 1024**2
"""Ray's least: nothing heavy goes through it."""


@dataclass(frozen=True)
class Running:
    """A cell in training as its log tells it."""

    cell_id: str
    N: int
    tokens: int
    horizon: int
    loss: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class Progress:
    """A moment of a run, for a display."""

    counts: dict[str, int]
    total: int
    running: tuple[Running, ...]
    eta_seconds: float | None
    workers: int
    mirror_fault: str | None
    ended: tuple[str, ...]
    """The cells that ended since the last moment, in words."""


@dataclass
class Tally:
    """What one run of the driver did."""

    finished: int = 0
    diverged: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Cell id -> reason."""
    skipped: int = 0
    interrupted: bool = False
    seconds: float = 0.0
    mirror_fault: str | None = None


def run_study(
    store: Store,
    plan: Plan,
    text: bytes,
    *,
    watch: Callable[[Progress], None],
    address: str = "local",
    tracking_uri: str | None = None,
    workers: int | None = None,
    base_dir: Path | None = None,
) -> Tally:
    """Put a plan on record, train its cells that have not ended, and mirror them to MLflow.

    `text` is the study file, kept beside the plan. `address` is "local" for an own Ray on this machine, or a
    cluster's. Starts neither Ray nor MLflow when there is nothing to do. Ctrl-C ends the workers and leaves the rest
    planned. Raises InputError where Ray or MLflow cannot be reached, or another driver holds the study.
    """
    began = time.monotonic()
    claim = claim_study(store, plan.study.name)
    try:
        register(store, plan, text)
        missing = [one for one in plan.cells if cell_state(store, one.cell.id).result is None]
        missing.sort(key=lambda one: -one.counts["C"])
        tally = Tally(skipped=len(plan.cells) - len(missing))
        mirror = Mirror(store, plan.study.name, tracking_uri)
        if not missing and mirror.is_complete():
            return tally
        with _Connected(mirror):
            if missing:
                pool = _Pool(store, plan, missing, mirror, claim, watch, base_dir)
                pool.run(tally, address, workers)
        tally.mirror_fault = mirror.fault
        tally.seconds = time.monotonic() - began
        return tally
    finally:
        claim.unlink(missing_ok=True)


class _Connected:
    """The mirror's thread around a block: reached first, so that an unreachable server is known before training."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror

    def __enter__(self) -> None:
        self.mirror.connect()
        self.mirror.start()

    def __exit__(self, *_: object) -> None:
        self.mirror.stop()


class _Pool:
    """The workers of one run and the queue before them."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        missing: list[PlannedCell],
        mirror: Mirror,
        claim: Path,
        watch: Callable[[Progress], None],
        base_dir: Path | None,
    ) -> None:
        self.store, self.plan, self.mirror, self.claim, self.watch = store, plan, mirror, claim, watch
        self.base_dir = str(base_dir) if base_dir else None
        self.queue = deque(missing)
        self.planned = {one.cell.id: one for one in missing}
        self.trials: dict[str, int] = {}
        self.tasks: dict[Any, tuple[Any, PlannedCell]] = {}
        self.idle: list[Any] = []
        self.tails: dict[str, _Tail] = {}
        self.ended: list[str] = []
        self.flops_done = 0.0

    def run(self, tally: Tally, address: str, limit: int | None) -> None:
        ray = start_ray(address, limit)
        try:
            slots = choose_slots(ray.cluster_resources(), len(self.queue), limit)
            self.idle = [_make_worker(ray, slots) for _ in range(slots.count)]
            self.began = time.monotonic()
            while self.queue or self.tasks:
                while self.queue and self.idle:
                    self._start(self.queue.popleft(), self.idle.pop())
                done, _ = ray.wait(list(self.tasks), timeout=POLL_SECONDS)
                for task in done:
                    self._finish(ray, task, slots, tally)
                os.utime(self.claim)
                self.watch(self._progress(tally, slots.count))
        except KeyboardInterrupt:
            tally.interrupted = True
        finally:
            ray.shutdown()

    def _start(self, one: PlannedCell, worker: Any) -> None:
        task = worker.run.remote(str(self.store.root), one.cell.id, self.plan.study.name, self.base_dir)
        self.tasks[task] = (worker, one)
        self.tails[one.cell.id] = _Tail()

    def _finish(self, ray: Any, task: Any, slots: Slots, tally: Tally) -> None:
        worker, one = self.tasks.pop(task)
        cell_id = one.cell.id
        try:
            ended = ray.get(task)
            state, reason = ended["state"], ended["reason"]
            self.idle.append(worker)
        except ray.exceptions.RayTaskError as error:  # before the attempt could record its own error: a bug or the disk
            self.idle.append(worker)
            state, reason = "failed", str(error.cause).splitlines()[0]
        except ray.exceptions.RayError as error:  # the worker died, or Ray killed it for want of memory
            self.idle.append(_make_worker(ray, slots))
            state, reason = self._after_death(cell_id, str(error).splitlines()[0])
        if state == "retry":
            self.queue.append(one)
            return
        tail = self.tails.pop(cell_id)
        self.flops_done += one.counts["C"]
        if state == "failed":
            tally.failed[cell_id] = reason or "unknown"
        elif state == "diverged":
            tally.diverged += 1
        else:
            tally.finished += 1
        tail.read(self.store, cell_id)
        loss = f", loss {tail.loss:.4f}" if tail.loss else ""
        words = f"{one.cell.family} N={one.counts['N']:,} D={one.cell.tokens:,}: {state}"
        self.ended.append(words + (f" ({reason})" if reason else loss))

    def _after_death(self, cell_id: str, message: str) -> tuple[str, str | None]:
        """A worker died with a cell in hand: its result may stand all the same; else it is tried again, three times."""
        state = cell_state(self.store, cell_id)
        if state.result is not None:
            return state.state, state.reason
        epochs = attempt_epochs(self.store, cell_id)
        reason = f"infrastructure: the worker died ({message})"
        if epochs:
            record_error(Attempt(self.store, cell_id, epochs[-1]), "infrastructure", f"the worker died ({message})")
        self.trials[cell_id] = self.trials.get(cell_id, 0) + 1
        return ("retry", None) if self.trials[cell_id] <= INFRASTRUCTURE_ATTEMPTS else ("failed", reason)

    def _progress(self, tally: Tally, workers: int) -> Progress:
        running = []
        for _, one in self.tasks.values():
            tail = self.tails[one.cell.id]
            tail.read(self.store, one.cell.id)
            running.append(
                Running(one.cell.id, one.counts["N"], tail.tokens, one.cell.tokens, tail.loss, tail.tokens_per_second)
            )
        under_way = sum(
            one.counts["flops_per_token"] * self.tails[one.cell.id].tokens for _, one in self.tasks.values()
        )
        done = self.flops_done + under_way
        left = sum(one.counts["C"] for one in self.queue)
        left += sum(one.counts["C"] for _, one in self.tasks.values()) - under_way
        elapsed = time.monotonic() - self.began
        counts = {
            "finished": tally.finished + tally.skipped,
            "diverged": tally.diverged,
            "failed": len(tally.failed),
            "running": len(self.tasks),
            "planned": len(self.queue),
        }
        eta = elapsed * left / done if done else None
        ended, self.ended = tuple(self.ended), []
        return Progress(counts, len(self.plan.cells), tuple(running), eta, workers, self.mirror.fault, ended)


class _Tail:
    """The last figures in a running cell's log."""

    def __init__(self) -> None:
        self.tokens = 0
        self.loss: float | None = None
        self.tokens_per_second = 0.0
        self._epoch, self._offset = -1, 0

    def read(self, store: Store, cell_id: str) -> None:
        epochs = attempt_epochs(store, cell_id)
        if not epochs:
            return
        if epochs[-1] != self._epoch:
            self._epoch, self._offset = epochs[-1], 0
        rows, self._offset = read_rows(store.attempt(cell_id, self._epoch) / "log.jsonl", self._offset)
        for row in rows:
            self.tokens = row["tokens"]
            self.loss = row["metrics"].get("val_loss_final", row["metrics"].get("train_loss", self.loss))
            self.tokens_per_second = row["metrics"].get("tokens_per_second", self.tokens_per_second)


# --- Ray ---------------------------------------------------------------------------------------------------------


def start_ray(address: str, workers: int | None = None) -> Any:
    """Start Ray on this machine ("local") or join a cluster; returns the ray module. InputError where it fails."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray keeps its auth token under HOME; where that cannot be written, one that lives as long as this process will do.
    if "RAY_AUTH_MODE" not in os.environ and not os.access(Path.home(), os.W_OK):
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    code = str(Path(__file__).resolve().parent.parent)  # where `sweeps` and `cluster` are, for the workers
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    try:
        if address == "local":
            cpus = workers or os.cpu_count()
            ray.init(address="local", num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        else:
            _join(ray, address, quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"Ray is not reachable at {address!r}: {str(error).splitlines()[0]}. Start the cluster, correct --address "
            "(or RAY_ADDRESS), or use --address local for a Ray of its own on this machine."
        ) from None
    return ray


def _join(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    """Join a cluster. Ray retries an address that does not answer for a long time; ask the port first."""
    import socket

    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        with socket.create_connection((host, int(port)), timeout=10):
            pass
    ray.init(address=address, log_to_driver=quiet["log_to_driver"], logging_level=quiet["logging_level"])


def _make_worker(ray: Any, slots: Slots) -> Any:
    from cluster.worker import Worker

    return ray.remote(**slots.options)(Worker).remote()
