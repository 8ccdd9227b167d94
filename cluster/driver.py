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

from cluster.calibration import pool_calibration
from cluster.claims import Claim
from cluster.connection import start_ray, stop_ray
from cluster.control import read_wish
from cluster.hardware import local_gpus
from cluster.joined import Joined
from cluster.ledger import recorded_seconds, register, register_growth
from cluster.mirror import Mirror
from cluster.nodes import REPORT_SECONDS, Bundle, bundle, wanted
from cluster.outage import Outage
from cluster.pace import own_work, work_left, work_won
from cluster.placement import Demand, Fleet, threads_for
from cluster.pool import Pool
from cluster.processes import OwnRay, descendants
from cluster.progress import Progress, Tally
from cluster.queue import Queue
from cluster.scheduling import Bounds, Schedule
from cluster.searching import Searching
from cluster.standing import Standing
from cluster.tasks import Tasks
from cluster.usage import Usage
from cluster.workload import study_workers
from sweeps.errors import InputError
from sweeps.grids import Plan
from sweeps.life import SILENCE_SECONDS
from sweeps.planned import PlannedCell
from sweeps.store import Store, cell_state
from sweeps.trainer import CHECKPOINT_SECONDS

GIVE_UP_AFTER = 3
"""So many first attempts that all fail in the same way end the run: what fails everywhere would burn the cluster."""
LOOK_SECONDS = 2.0
"""Between looks at what changes seldom: wishes, cells trained elsewhere, forgiven failures."""
LARGE_STEP_FLOPS = 1e10
"""From so many a step on, several threads are faster than one."""
TAKEN_OVER = "taken over: another driver runs this study since this one gave no sign of life"
GRACE_SECONDS = 20.0
"""How long running cells get to keep a checkpoint at Ctrl-C."""


def run_study(
    store: Store,
    plan: Plan,
    text: bytes,
    *,
    watch: Callable[[Progress], None],
    starting: Callable[[], None] = lambda: None,
    address: str = "local",
    tracking_uri: str | None = None,
    workers: int | None = None,
    base_dir: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    give_up_after: int = GIVE_UP_AFTER,
) -> Tally:
    """Put a plan on record, train its cells that have not ended, and mirror them to MLflow.

    `text` is the study file, kept beside the plan. `address` is "local" for an own Ray on this machine, or a
    cluster's. Starts neither Ray nor MLflow when there is nothing to do; `starting` is called before it starts them.
    Ctrl-C asks the cells that run to keep a checkpoint and leaves the rest planned. Cells that have failed stay failed
    until they are forgiven. Raises InputError where Ray or MLflow cannot be reached, the study is paused, or another
    driver holds it.
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
                run = _Run(
                    store, search, mirror, claim, tally, watch, base_dir, checkpoint_seconds, give_up_after, workers
                )
                for one in plan.cells:
                    if (result := states[one.cell.id].result) is not None:
                        run.standing.know(one, result)
                run.standing.failed = {one.cell.id: one for one in plan.cells if one.cell.id in tally.failed}
                run.standing.elsewhere = {one.cell.id: one for one in missing}
                starting()
                run.run(address)
            else:
                mirror.connect()
                mirror.start()
        finally:
            mirror.stop()
        if not (tally.planned or tally.failed or tally.stopped == TAKEN_OVER or search.goes_on()):
            tally.stopped = None  # as the last cells ended: the study is complete
        if tally.stopped is None and not claim.holds(SILENCE_SECONDS):  # frozen before its first turn, with none since
            tally.stopped = TAKEN_OVER
        tally.mirror_fault, tally.notes = mirror.fault, search.said
        tally.seconds = time.monotonic() - began
        return tally


class _Run:
    """One run: the queue before the workers, what these have in hands, and the cluster in which they are."""

    def __init__(
        self,
        store: Store,
        search: Searching,
        mirror: Mirror,
        claim: Claim,
        tally: Tally,
        watch: Callable[[Progress], None],
        base_dir: Path | None,
        checkpoint_seconds: float,
        give_up_after: int,
        workers: int | None,
    ) -> None:
        self.store, self.mirror, self.claim, self.tally, self.watch = store, mirror, claim, tally, watch
        self.search, self.plan = search, search.plan
        self.limit = workers
        self.fleet = Fleet()
        limits = self.plan.study.limits.model_dump(exclude={"priority"})
        self.schedule = Schedule(self.fleet, Bounds(units=workers, **limits))
        self.queue = Queue(store, self.plan, self.schedule, lambda one: self.pool.demand(one))
        self.usage = Usage(store, self.plan.study.name, claim.number)
        self.schedule.spent_gpu_seconds = self.usage.before
        self.ended: list[str] = []
        self.notes: list[str] = []
        """What to tell people at the next moment: of cells, and of no cell."""
        self.standing = Standing(
            store,
            search,
            self.queue,
            driver=claim.number,
            tally=tally,
            give_up_after=give_up_after,
            say=self.ended.append,
        )
        self.tasks = Tasks(
            store,
            self.plan.study,
            claim.number,
            self.queue,
            self.standing,
            self._lose,
            base_dir=base_dir,
            checkpoint_seconds=checkpoint_seconds,
        )
        self.wish: str | None = None
        self.own: OwnRay | None = None
        self.joined: Joined | None = None
        """The Ray of this run's own, or the cluster that it has joined."""
        self.beginning, self.ending, self.showing = (Outage(self.tasks.excuse) for _ in range(3))
        """The parts of a turn: before the wait for workers, after it, and what people see of it."""

    def run(self, address: str) -> None:
        self.began = time.monotonic()
        before = descendants()  # of whoever called this, and not to be ended with Ray
        try:
            ray = start_ray(address, self.limit)
        except KeyboardInterrupt:
            self.tally.stopped, self.tally.planned = "interrupted", len(self.standing.elsewhere)
            return
        try:
            if address == "local":
                self.own = OwnRay(before)
            else:
                self.joined = Joined(ray, self.store, self.plan.study, self.claim.number)
                self.notes += self.joined.gate.open()  # before anything trains
            self._meet_cluster(ray, address)
            self._predict()
            self.standing.sort_elsewhere()
            self._grow()
            self.slots = max(1, self.schedule.room(self.demand, max(1, self._left())))
            self.pool.warm(self.schedule.first(self.slots))
            self.mirror.connect()  # while they load torch; and before any trains, for a server that is not there
            self.mirror.start()
            self._work(ray)
        except KeyboardInterrupt:
            self.tally.stopped = "interrupted"
            self._stop_gracefully(ray)
        except ray.exceptions.RayError as error:  # not a worker's death, which Tasks.finish handles: Ray itself is gone
            self.tally.stopped = f"Ray is gone ({str(error).splitlines()[0]})"
        finally:
            self.tasks.undo(self.plan.cells)  # of a unit that was being given to a worker
            self.tally.planned = len(self.queue) + len(self.standing.elsewhere) + len(self.tasks.hands())
            with suppress(InputError):  # a full disk must not keep Ray alive, nor nodes that were asked for
                self.usage.note(self.schedule)
            with suppress(ray.exceptions.RayError):  # of a cluster that is gone nothing can be taken back
                if self.joined is not None:
                    self.joined.close()
            stop_ray(ray)
            if self.own is not None:
                self.own.end()

    def _meet_cluster(self, ray: Any, address: str) -> None:
        """What the cluster has, and so what cells ask of it."""
        barred = self.joined.members.barred if self.joined is not None else {}
        own_trainer = bool(self.plan.study.trainer)
        self.pool = Pool(ray, self.fleet, self._left(), study_workers(self.plan), own_trainer, barred, self.limit)
        if self.joined is not None:
            self.joined.members.follow(self.fleet, [], self.pool.gpu_bytes)
            self.notes += self.pool.meet_gpus(self.standing.gpu, self.joined.members.scales, address)
        if self.pool.device == "cpu" and self.schedule.bounds.gpu_hours is not None:
            self.notes.append("limits.gpu_hours holds nothing back: cells train on CPUs, which it does not count")
        cells = [*self.standing.elsewhere.values(), *self.search.examples()]
        demands = {self.pool.demand(one): f"cell {one.cell.id[:8]}" for one in cells}
        beyond = [demand for demand in demands if not self.fleet.holds_ever(demand)]
        if beyond and self.joined is not None and self.joined.members.scales(REPORT_SECONDS):  # it is asked (_follow)
            self.schedule.check({demand: whose for demand, whose in demands.items() if demand not in beyond})
        else:
            self.schedule.check(demands)
        self.demand = min(demands, key=lambda one: (one.all_gpus, one), default=Demand())

    def _predict(self) -> None:
        """How long cells take on what the cluster has. The plan on record tells it by this machine so far, which may be
        a head without a GPU."""
        models = set(local_gpus()) if self.joined is None else set()
        models = models or self.pool.models() or ({self.standing.gpu} if self.standing.gpu else set())
        found = pool_calibration(self.store, self.pool.device, models)
        if found is None and self.pool.device == "cuda" and self.schedule.bounds.gpu_hours is not None:
            self.notes.append(
                "no calibration tells how long cells take on these GPUs, so limits.gpu_hours is held against "
                "what was used alone, and those begun last may go beyond it. `escala calibrate` measures it"
            )
        self.search.predict(found)
        self.queue.extend(self.plan, (), self.search.seconds)
        if self.search.seconds != recorded_seconds(self.store, self.plan.study.name) and self._holds():
            register_growth(self.store, self.plan, (), self.search.seconds)

    def _work(self, ray: Any) -> None:
        self._take_turns(ray)
        if self.ended or self.notes:  # of the last turn, which may have been the first
            self._show()

    def _take_turns(self, ray: Any) -> None:
        """Turn after turn, until nothing is left to do or something ends the run before."""
        looked = 0.0
        while self.queue or self.schedule.running or self.standing.elsewhere or self.search.goes_on():
            self.tasks.undo(self.plan.cells)
            if not self._holds():
                self.tally.stopped = TAKEN_OVER
                return
            with self.beginning:
                if self.standing.halt or time.monotonic() - looked >= LOOK_SECONDS:
                    if self.joined is not None and (gone := self.joined.members.lost()):
                        self.tally.stopped = f"Ray is gone ({gone})"
                        self.tasks.let_go(gone, GRACE_SECONDS)
                        return
                    self._look()
                    self._follow()
                    looked = time.monotonic()
                if (why := self._over()) is not None:
                    self.tally.stopped = why
                    return
                if self.wish in ("drain", "cancel") and not self.tasks:
                    return
                self._begin()
                if (why := self.schedule.out_of_budget(time.monotonic())) is not None:
                    self.tally.stopped = why
                    return
            done = self.tasks.wait(ray)
            if self._holds():  # it may have slept in the wait
                self._take_in(ray, done)

    def _take_in(self, ray: Any, done: list[Any]) -> None:
        """What the workers that are done leave, and who must be killed."""
        with self.ending:
            for call in done:
                self.tasks.finish(ray, self.pool, call)
            self.tasks.kill_silent(ray)
        self._show()

    def _show(self) -> None:
        """How all stands, for people to see."""
        now: Progress | None = None
        with self.showing:
            now = self._progress()
        if now is not None:
            self.claim.expect(now.eta_seconds if now.wish is None else None)  # nobody knows how long a pause takes
            self.watch(now)

    def _over(self) -> str | None:
        """Why nothing more can come of this run on the Ray that it has, if so."""
        if self.own is not None and (dead := self.own.died()):
            return f"Ray is gone (its {dead} died)"
        return self.joined.shortage.over if self.joined is not None else None

    def _begin(self) -> None:
        """Give workers what there is room for."""
        self.queue.look(hand.one.cell.id for hand in self.tasks.hands())
        self._grow()
        while self.wish is None and not (self.tasks and self.joined is not None and self.joined.before):
            if (unit := self.queue.take(time.monotonic(), self.pool.device)) is None:
                return
            self.tasks.start(self.pool, unit, self._threads(unit.cells))

    def _holds(self) -> bool:
        """Whether the study is still this run's own. A disk that refuses for a moment, as one in a network does, is
        waited for, and nothing is done meanwhile; not for longer than until others may take over."""
        asked = time.monotonic()
        held = self.claim.holds(SILENCE_SECONDS)
        self.tasks.excuse(time.monotonic() - asked)
        return held

    def _lose(self, node: str) -> None:
        """A node is gone, as a worker's death tells: nothing more goes there, before Ray has noticed either. The node
        of an own Ray stays, since nothing would add it again: its end is that of Ray (_over)."""
        if self.joined is not None:
            self.fleet.remove(node)
            self.joined.members.doubt(node)

    def _grow(self) -> None:
        """Take in the cells of a search's next trials, where workers have nothing else to do."""
        idle = 0
        if self.search.goes_on() and self.wish is None:
            idle = self.schedule.room(self.demand, self.search.to_come()[0]) - len(self.queue)
        if new := self.search.grow(max(0, idle)):
            self.plan = self.search.plan
            self.queue.extend(self.plan, new, self.search.seconds)
            self.standing.sort(new)

    def _left(self) -> int:
        """Cells that no worker has, those of a search's trials to come among them."""
        return len(self.queue) + len(self.standing.elsewhere) + self.search.to_come()[0]

    def _threads(self, unit: list[PlannedCell]) -> int:
        """One thread a worker, but for the last cells of a run, if they are large enough to share the idle cores."""
        if sum(one.cell.batch_tokens * one.counts["flops_per_token"] for one in unit) < LARGE_STEP_FLOPS:
            return 1
        left = self._left() + len(self.tasks.hands()) + len(unit)
        # Who wants few workers on this machine wants the other cores for something else.
        cores = min(self.pool.cores, self.limit or self.pool.cores) if self.joined is None else self.pool.cores
        return threads_for(left, self.slots, cores)

    # --- what changes seldom -----------------------------------------------------------------------------------------

    def _look(self) -> None:
        """What people wish, what others have done, and who waits."""
        if self.own is not None:
            self.own.look()
        found = read_wish(self.store, self.plan.study.name)
        if found is not None and found.driver not in (None, self.claim.number):
            found = None  # it was meant for another driver
        self.wish = "cancel" if self.standing.halt else found.wish if found else None
        if self.wish in ("drain", "cancel"):
            self.tally.stopped = self.standing.halt or str(found)
        if self.wish in ("pause", "cancel"):
            self.tasks.ask_to_stop(self.standing.halt or str(found))
        if self.wish is not None:
            self.tasks.take_back(self.pool)
        self.standing.look()
        self.queue.look()
        self.notes += self.tasks.count_late(self.pool)
        self.usage.note(self.schedule)

    def _follow(self) -> None:
        """The cluster that was joined: what became of it, and what it is asked for."""
        if self.joined is None:
            return
        self.notes += self.joined.follow(self.schedule, self.pool, self.tasks)
        bundles, waiting = self._wanted()
        idle = not self.tasks and not self.standing.elsewhere
        self.notes += self.joined.ask(bundles, waiting, self.fleet, idle=idle)

    def _wanted(self) -> tuple[list[Bundle], dict[Demand, int]]:
        """The room for which there is work, and how many cells wait for which."""
        if self.wish is not None:
            return wanted(self.schedule, more=False), {}
        bundles = wanted(self.schedule)
        if bundles or not self.search.goes_on():
            return bundles, self.schedule.demands()
        cells, _ = self.search.to_come()  # it tells its next trials when there is room for one
        return [bundle(self.demand)], {self.demand: cells} if cells else {}

    def _stop_gracefully(self, ray: Any) -> None:
        """Ctrl-C: let the cells that run keep a checkpoint. A second Ctrl-C does not wait."""
        deadline = time.monotonic() + GRACE_SECONDS
        self.wish = "cancel"
        try:
            while self.tasks and time.monotonic() < deadline and self.claim.holds(deadline - time.monotonic()):
                with self.beginning:
                    self.tasks.ask_to_stop("interrupted")
                self._take_in(ray, self.tasks.wait(ray))
        except KeyboardInterrupt:
            pass

    def _progress(self) -> Progress:
        hands = self.tasks.hands()
        running = tuple(hand.running(self.plan.study.vary) for hand in hands)
        done = self.standing.work_done + sum(work_won(self.queue, hand, hand.tail.tokens) for hand in hands)
        left = work_left(self.queue, [*self.queue.cells(), *self.standing.elsewhere.values()], hands)
        more, flops = self.search.to_come()
        if flops and (own := sum(map(self.queue.own_flops, self.plan.cells))):  # of cells like those that are planned
            left += flops * sum(own_work(self.queue, one) for one in self.plan.cells) / own
        elapsed = time.monotonic() - self.began
        counts = {
            "finished": self.tally.finished + self.tally.skipped,
            "diverged": self.tally.diverged,
            "failed": len(self.tally.failed),
            "running": len(hands),
            "planned": len(self.queue) + len(self.standing.elsewhere),
        }
        eta = elapsed * left / done if done else None
        total, fault, link = len(self.plan.cells) + more, self.mirror.fault, self.mirror.link
        ended, notes = tuple(self.ended), tuple(self.notes)
        self.ended.clear()
        self.notes.clear()
        return Progress(counts, total, running, eta, self.slots, fault, ended, notes, self.wish, link)
