"""The driver: hands the missing cells of a study to a warm pool of Ray workers, longest first, and watches the files.

It keeps nothing that the store does not hold: kill it at any moment and run the study again. What it must never do is
harm: before it writes anything about a cell it looks whether the study is still its own, since it may have slept while
another took over.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cluster.claims import Claim
from cluster.connection import driver_cpus, gpu_bytes, make_worker, start_ray
from cluster.control import read_wish
from cluster.gang import make_gang
from cluster.hands import Hand, Task, take_up
from cluster.ledger import register
from cluster.leftovers import descendants, end_processes, settle
from cluster.mirror import Mirror
from cluster.placement import Demand, cells_together, choose_slots, threads_for
from cluster.progress import Progress, Running, Tail, Tally
from cluster.queue import Queue
from cluster.searching import Searching
from sweeps.errors import InputError
from sweeps.grids import Plan
from sweeps.memory import demand
from sweeps.planned import PlannedCell
from sweeps.records import FREE_SPACE
from sweeps.store import Attempt, Store, attempt_epochs, begin_attempt, cell_state, read_end, record_error
from sweeps.trainer import CHECKPOINT_SECONDS

GIVE_UP_AFTER = 3
"""So many first attempts that all fail in the same way end the run: what fails everywhere would burn the cluster."""
POLL_SECONDS = 0.5
LOOK_SECONDS = 2.0
"""Between looks at what changes seldom: wishes, cells trained elsewhere, forgiven failures."""
LARGE_STEP_FLOPS = 1e10
"""From so many a step on, several threads are faster than one."""
GRACE_SECONDS = 20.0
"""How long running cells get to keep a checkpoint at Ctrl-C."""


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
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    give_up_after: int = GIVE_UP_AFTER,
) -> Tally:
    """Put a plan on record, train its cells that have not ended, and mirror them to MLflow.

    `text` is the study file, kept beside the plan. `address` is "local" for an own Ray on this machine, or a
    cluster's. Starts neither Ray nor MLflow when there is nothing to do. Ctrl-C asks the cells that run to keep a
    checkpoint and leaves the rest planned. Cells that have failed stay failed until they are forgiven. Raises
    InputError where Ray or MLflow cannot be reached, the study is paused, or another driver holds it.
    """
    began = time.monotonic()
    study = plan.study.name
    with Claim(store, study) as claim:
        wish = read_wish(store, study)
        if wish is not None and wish.wish == "pause":
            raise InputError(f"study {study} is {wish}. Lift it first: escala resume {study}.")
        search = Searching(store, plan)
        search.grow(0)  # what a killed driver did not tell
        plan = search.plan
        register(store, plan, text)
        states = {one.cell.id: cell_state(store, one.cell.id) for one in plan.cells}
        missing = [one for one in plan.cells if states[one.cell.id].state in ("planned", "running")]
        missing.sort(key=lambda one: -one.counts["C"])
        tally = Tally(skipped=sum(state.result is not None for state in states.values()))
        tally.failed = {
            cell_id: state.reason or "unknown" for cell_id, state in states.items() if state.state == "failed"
        }
        mirror = Mirror(store, study, tracking_uri, claim.holds)
        if not missing and not search.goes_on() and mirror.is_complete():
            return tally
        try:
            if missing or search.goes_on():
                pool = _Pool(store, search, missing, mirror, claim, watch, base_dir, checkpoint_seconds, give_up_after)
                pool.failed = {one.cell.id: one for one in plan.cells if one.cell.id in tally.failed}
                pool.run(tally, address, workers)
            else:
                mirror.connect()
                mirror.start()
        finally:
            mirror.stop()
        tally.mirror_fault, tally.notes = mirror.fault, search.said
        tally.seconds = time.monotonic() - began
        return tally


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


class _Pool:
    """The workers of one run and the queue before them."""

    def __init__(
        self,
        store: Store,
        search: Searching,
        missing: list[PlannedCell],
        mirror: Mirror,
        claim: Claim,
        watch: Callable[[Progress], None],
        base_dir: Path | None,
        checkpoint_seconds: float,
        give_up_after: int,
    ) -> None:
        self.store, self.mirror, self.claim, self.watch = store, mirror, claim, watch
        self.search, self.plan = search, search.plan
        self.base_dir = str(base_dir) if base_dir else None
        self.checkpoint_seconds, self.give_up_after = checkpoint_seconds, give_up_after
        self.queue = Queue(store, self.plan)
        self.missing = missing
        self.elsewhere: dict[str, PlannedCell] = {}
        """Cells that the living driver of another study trains, or that a dead one's workers have not let go of."""
        self.failed: dict[str, PlannedCell] = {}
        """Looked at now and then: a person may forgive them."""
        self.tasks: dict[Any, Task] = {}
        self.idle: list[Any] = []
        self.ended: list[str] = []
        self.flops_done = 0.0
        self.first_failures: list[str] | None = []
        """The first attempts' failures while there is nothing else; None once anything else happened."""
        self.wish: str | None = None
        self.family: set[psutil.Process] = set()
        """What this process has started, with a Ray of its own."""
        self.core: list[psutil.Process] = []
        """Of these, the processes without which such a Ray is dead."""
        self.halt: str | None = None
        """Why nothing more is to be tried, if so."""

    def run(self, tally: Tally, address: str, limit: int | None) -> None:
        self.began = time.monotonic()
        self._settle(tally, self.missing)
        self._grow(tally, 1)
        ray = start_ray(address, limit)
        if address == "local":
            self.family = descendants()
            self.core = [process for process in self.family if process.name() in ("raylet", "gcs_server")]
        try:
            resources, left = ray.cluster_resources(), self._left()
            resources["CPU"] = resources.get("CPU", 0.0) - driver_cpus(ray)
            together = self._together(ray) if resources.get("GPU") else 1
            ranks = 1 if self.plan.study.workers == "auto" else self.plan.study.workers
            gangs = {name: amount // ranks for name, amount in resources.items()}
            self.slots = choose_slots(gangs, left, limit, 1 if ranks > 1 else together)
            self.demand = Demand(ranks, 1.0 if self.slots.device == "cuda" else 0.0)
            self.cores = int(resources.get("CPU", 1))
            if ranks > 1 and min(gangs.get("GPU", gangs["CPU"]), gangs["CPU"]) < 1:
                raise InputError(f"{ranks} workers for one cell are more than this cluster has. Lower workers.")
            self.idle = [self._make(ray) for _ in range(self.slots.count)]
            self.mirror.connect()  # while they load torch; and before any trains, for a server that is not there
            self.mirror.start()
            self._work(ray, tally)
        except KeyboardInterrupt:
            tally.stopped = "interrupted"
            self._stop_gracefully(ray, tally)
        except ray.exceptions.RayError as error:  # not a worker's death, which _finish handles: Ray itself is gone
            tally.stopped = f"Ray is gone ({str(error).splitlines()[0]})"
        finally:
            tally.planned = len(self.queue) + len(self.elsewhere) + len(self._in_hands())
            ray.shutdown()
            end_processes(self.family)

    def _make(self, ray: Any) -> Any:
        return make_gang(ray, self.demand) if self.demand.workers > 1 else make_worker(ray, self.slots)

    def _together(self, ray: Any) -> int:
        """How many of the cells that are left a GPU holds side by side."""
        waiting = [*self.queue.cells(), *self.search.examples()]
        cells = {(one.cell.shape, one.cell.sequences, one.cell.precision) for one in waiting}
        needs = [demand(*shape, device="cuda") for shape in cells]
        try:
            return cells_together(needs, gpu_bytes(ray))
        except InputError:  # the largest has to be cut into micro-batches, and wants a GPU for itself
            return 1

    def _work(self, ray: Any, tally: Tally) -> None:
        looked = 0.0
        while self.queue or self.tasks or self.elsewhere or self.search.goes_on():
            if not self.claim.holds():
                tally.stopped = "taken over: another driver runs this study since this one gave no sign of life"
                return
            if self.halt or time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                self._look(tally)
            if dead := [process.name() for process in self.core if not _runs(process)]:
                tally.stopped = f"Ray is gone (its {dead[0]} died)"  # a call would wait for it for minutes, or for ever
                return
            if self.wish in ("drain", "cancel") and not self.tasks:
                return
            self._grow(tally, len(self.idle) - len(self.queue) if self.wish is None else 0)
            while self.idle and self.wish is None and (unit := self.queue.take(len(self.idle), self.slots.device)):
                self._start(unit)
            if self.tasks:
                done, _ = ray.wait(list(self.tasks), timeout=POLL_SECONDS)
                if done and not self.claim.holds():  # it may have slept in the wait
                    continue
                for task in done:
                    self._finish(ray, task, tally)
            else:
                time.sleep(POLL_SECONDS)
            for task in self.tasks.values():
                if (fate := task.fate()) is not None:
                    task.kill(ray, fate)
            self.watch(self._progress(tally))

    def _grow(self, tally: Tally, idle: int) -> None:
        """Take in the cells of a search's next trials, where workers have nothing else to do."""
        if new := self.search.grow(max(0, idle)):
            self.plan = self.search.plan
            self.queue.extend(self.plan, len(self.plan.cells) - len(new))
            self._settle(tally, new)

    def _left(self) -> int:
        """Cells that no worker has, those of a search's trials to come among them."""
        return len(self.queue) + len(self.elsewhere) + self.search.to_come()[0]

    def _in_hands(self) -> list[Hand]:
        return [hand for task in self.tasks.values() for hand in task.hands]

    def _start(self, unit: list[PlannedCell]) -> None:
        hands, others = take_up(self.store, unit)
        self.elsewhere |= {one.cell.id: one for one in others}
        if not hands:
            return
        worker, probe = self.idle.pop(), self.plan.study.stack == "auto"
        ids, study, root = [hand.one.cell.id for hand in hands], self.plan.study.name, str(self.store.root)
        threads = self._threads(unit)
        task = worker.run.remote(
            root, ids, study, self.base_dir, self.checkpoint_seconds, self.claim.number, probe, threads
        )
        self.tasks[task] = Task(worker, hands)

    def _threads(self, unit: list[PlannedCell]) -> int:
        """One thread a worker, but for the last cells of a run, if they are large enough to share the idle cores."""
        if sum(one.cell.batch_tokens * one.counts["flops_per_token"] for one in unit) < LARGE_STEP_FLOPS:
            return 1
        left = self._left() + len(self._in_hands()) + len(unit)
        return threads_for(left, self.slots.count, self.cores)

    def _finish(self, ray: Any, handle: Any, tally: Tally) -> None:
        """A worker is done. What it says is only a hint: the files tell how each cell stands."""
        task = self.tasks.pop(handle)
        try:
            ray.get(handle)
            self.idle.append(task.worker)
        except ray.exceptions.RayTaskError as error:  # before the attempt could record its own error: a bug or the disk
            self.idle.append(task.worker)
            for hand in task.hands:
                self._record_death(hand, "infrastructure", str(error.cause).splitlines()[0])
        except ray.exceptions.RayError as error:  # the worker died, or Ray killed it for want of memory
            self.idle.append(self._make(ray))
            kind = "out_of_memory" if isinstance(error, ray.exceptions.OutOfMemoryError) else "infrastructure"
            kind = "preemption" if getattr(error, "preempted", False) else kind
            for hand in task.hands:
                self._record_death(hand, kind, hand.pulse.killed or f"the worker died ({str(error).splitlines()[0]})")
        for index, hand in enumerate(task.hands):  # the failure of a program is one failure
            self._settle_state(hand.one, tally, hand.tail, note=index == 0)

    def _record_death(self, hand: Hand, kind: str, message: str) -> None:
        """Charge a death to the cell, where the attempt did not say itself how it ended."""
        cell_id = hand.one.cell.id
        epochs = attempt_epochs(self.store, cell_id)
        attempt = Attempt(self.store, cell_id, epochs[-1]) if epochs else None
        try:
            if len(epochs) == hand.attempts_before:
                attempt = begin_attempt(self.store, cell_id, {"study": self.plan.study.name})
            untold = attempt is not None and read_end(self.store, cell_id, attempt.epoch) is None
            if attempt is not None and untold and cell_state(self.store, cell_id).result is None:
                record_error(attempt, kind, message)
        except InputError as error:  # the disk is full: what cannot be recorded must not go on
            self.halt = str(error)

    def _settle_state(self, one: PlannedCell, tally: Tally, tail: Tail, *, note: bool) -> None:
        """Put a cell where its files say that it belongs."""
        cell_id = one.cell.id
        state = cell_state(self.store, cell_id)
        if state.state in ("planned", "running"):
            last = attempt_epochs(self.store, cell_id)
            end = read_end(self.store, cell_id, last[-1]) if last else None
            if note and end is not None and end[0] not in ("preemption", "stopped"):
                self._note_failure(f"{end[0]}: {end[1]}")
            if end is not None and FREE_SPACE in end[1]:  # every cell would fail like this one, and be charged for it
                self.halt = end[1]
            if state.state == "running":
                self.elsewhere[cell_id] = one
            else:
                self.queue.put(one, first=True)
            return
        if state.state == "failed":
            tally.failed[cell_id] = state.reason or "unknown"
            self.failed[cell_id] = one
            if note:
                self._note_failure(state.reason or "unknown")
        elif state.state == "diverged":
            tally.diverged += 1
            self.first_failures = None
        else:
            tally.finished += 1
            self.first_failures = None
        self.flops_done += self._to_spend(one) if state.result is not None else 0.0
        loss = tail.final_loss()
        words = f"{one.cell.family} N={one.counts['N']:,} D={one.cell.tokens:,}: {state.state}"
        words += f" ({state.reason})" if state.reason else f", loss {loss:.4f}" if loss else ""
        if cell_id in self.plan.branches and state.result is not None and state.result.get("trunk") is None:
            words += f" (from the start: its trunk {self.plan.branches[cell_id].parent[:8]} left no checkpoint for it)"
        self.ended.append(words)

    def _note_failure(self, reason: str) -> None:
        if self.first_failures is None:
            return
        self.first_failures.append("".join(letter for letter in reason if not letter.isdigit()))
        if len(self.first_failures) >= self.give_up_after and len(set(self.first_failures)) == 1:
            self.halt = f"given up: the first {self.give_up_after} attempts failed alike ({reason})"

    # --- what changes seldom -----------------------------------------------------------------------------------------

    def _look(self, tally: Tally) -> None:
        if self.core:
            self.family |= descendants()
        found = read_wish(self.store, self.plan.study.name)
        if found is not None and found.driver not in (None, self.claim.number):
            found = None  # it was meant for another driver
        self.wish = "cancel" if self.halt else found.wish if found else None
        if self.wish in ("drain", "cancel"):
            tally.stopped = self.halt or str(found)
        if self.wish in ("pause", "cancel"):
            self._ask_to_stop(self.halt or str(found))
        for cell_id, one in list(self.failed.items()):  # forgiven since?
            if cell_state(self.store, cell_id).state == "planned":
                del self.failed[cell_id], tally.failed[cell_id]
                self.queue.put(one)
        if self.elsewhere:
            others = [*self.elsewhere.values(), *self.queue.drain()]
            self.elsewhere.clear()
            self._settle(tally, others)
        self.queue.look()

    def _settle(self, tally: Tally, waiting: list[PlannedCell]) -> None:
        """Sort cells by what others have left: ended meanwhile, in other hands, or free to be queued."""
        for one in waiting:
            if settle(self.store, one.cell.id, self.plan.study.name, self.claim.number):
                if cell_state(self.store, one.cell.id).result is not None:
                    tally.skipped += 1
                    self.flops_done += self._to_spend(one)
                else:
                    self.queue.put(one)
            else:
                self.elsewhere[one.cell.id] = one

    def _ask_to_stop(self, why: str) -> None:
        for hand in self._in_hands():
            hand.ask_to_stop(why)

    def _stop_gracefully(self, ray: Any, tally: Tally) -> None:
        """Ctrl-C: let the cells that run keep a checkpoint. A second Ctrl-C does not wait."""
        deadline = time.monotonic() + GRACE_SECONDS
        self.wish = "cancel"
        try:
            while self.tasks and time.monotonic() < deadline and self.claim.holds():
                self._ask_to_stop("interrupted")
                done, _ = ray.wait(list(self.tasks), timeout=POLL_SECONDS)
                for task in done:
                    self._finish(ray, task, tally)
                self.watch(self._progress(tally))
        except KeyboardInterrupt:
            pass

    def _to_spend(self, one: PlannedCell) -> float:
        """The FLOPs of a cell that no trunk trains for it."""
        return float(one.counts["C"]) - self.queue.shared_flops(one)

    def _progress(self, tally: Tally) -> Progress:
        running = []
        hands = self._in_hands()
        for hand in hands:
            hand.tail.read()
            one, tail = hand.one, hand.tail
            running.append(
                Running(one.cell.id, one.counts["N"], tail.tokens, one.cell.tokens, tail.loss, tail.tokens_per_second)
            )
        under_way = sum(
            max(0.0, hand.one.counts["flops_per_token"] * hand.tail.tokens - self.queue.shared_flops(hand.one))
            for hand in hands
        )
        done = self.flops_done + under_way
        waiting = [*self.queue.cells(), *self.elsewhere.values(), *(hand.one for hand in hands)]
        more, flops = self.search.to_come()
        left = sum(self._to_spend(one) for one in waiting) - under_way + flops
        elapsed = time.monotonic() - self.began
        counts = {
            "finished": tally.finished + tally.skipped,
            "diverged": tally.diverged,
            "failed": len(tally.failed),
            "running": len(hands),
            "planned": len(self.queue) + len(self.elsewhere),
        }
        eta = elapsed * left / done if done else None
        ended, self.ended, total, fault = tuple(self.ended), [], len(self.plan.cells) + more, self.mirror.fault
        link = self.mirror.link
        return Progress(counts, total, tuple(running), eta, self.slots.count, fault, ended, self.wish, link)
