"""The mirror: ships the logs of cells to MLflow, one run per cell and study, without training ever waiting for it.

A thread in the driver reads complete log lines, sends them in batches, of several cells at once, and keeps what the
server acknowledged in the study's mirror.json. The first committed value of a (cell, key, step) wins: rows that an
earlier attempt has logged are not sent again. A batch that is sent twice has the same timestamps and adds nothing, so
delivery is exactly once: after a fault, a lost reply or a crash the mirror goes back to the last acknowledged offset
and sends again.

A cell that the server refuses rests for a while and is named; the others go on. A server that is gone is asked again
after 4, 8, ... 60 seconds, and gets what it missed.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster import quarantine
from cluster.acknowledged import Acknowledged, checksum
from cluster.cellruns import STATUS, difference_tag, peoples_tags, run_name, run_params, state_tags
from cluster.parent import parent_run, show_parent
from cluster.rows import Chunk, Rows
from cluster.senders import SENDERS, send
from cluster.tracking import Reached, find_runs, is_gone, keep_one, reach, words
from sweeps.errors import InputError
from sweeps.faults import fault
from sweeps.records import Json
from sweeps.store import CellState, Store, cell_state, read_cell, read_quarantine

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

TURN = 16
"""Cells between two looks at whether to go on."""
BATCH = 950
"""Metrics a request: MLflow takes 1,000 metrics, params and tags together."""
INTERVAL_SECONDS = 2.0
"""Between two passes, and before the first retry of a cell that was refused."""
SLOW_SECONDS = 10.0
"""The longest rest after a pass that took long. It is as long as the pass, so that a server at its limit gets fewer and
larger requests, and has time for others."""
LONGEST_SECONDS = 60.0
"""Between two tries, after many faults."""
LOOK_SECONDS = 30.0
"""Between two looks at what people changed in MLflow, and at the study's own files."""
SAVE_SECONDS = 5.0
"""Between two writes of mirror.json within a pass: what was sent since would be sent again after a crash."""
DROPPED = "escala.dropped"
"""The tag of a run whose cell the study plans no more."""
SETTLED_SECONDS = 60.0
"""A request that was given up (after 20 s) may still be carried out; after so long it is not."""


@dataclass
class _Rest:
    """A cell that was refused: not tried again before `until` (monotonic seconds)."""

    until: float
    seconds: float
    fault: str


class Mirror:
    """Mirrors one study. `start` runs it in a thread until `stop`; `sync` is one pass."""

    def __init__(
        self,
        store: Store,
        study: str,
        tracking_uri: str | None = None,
        holds: Callable[[], bool] = lambda: True,
    ) -> None:
        self.store, self.study = store, study
        self.tracking_uri = tracking_uri or store.tracking_uri
        self.holds = holds
        """Whether the study is still this process's own; where not, nothing more is written."""
        self.fault: str | None = None
        """What did not get through in the last pass, for people to see."""
        self._record = Acknowledged(store, study, self.tracking_uri)
        self._rows = Rows(store)
        self._rests: dict[str, _Rest] = {}
        self._found: dict[str, list[Run]] | None = None
        self._replaced: dict[str, list[Run]] = {}
        self._reached: Reached | None = None
        self._looked = float("-inf")
        self._progressed = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="escala-mirror", daemon=True)

    @property
    def link(self) -> str | None:
        """Where a browser finds the study's experiment, once it is reached; None of the database in the store."""
        if self._reached is None or not self.tracking_uri.startswith("http"):
            return None
        parts = urlsplit(self.tracking_uri)
        host = parts.netloc.rpartition("@")[2]  # without a password
        return f"{parts.scheme}://{host}{parts.path.rstrip('/')}/#/experiments/{self._reached.experiment_id}"

    def is_complete(self) -> bool:
        """Whether MLflow shows how every cell stands, by the mirror's own record."""
        clear = not self._record.doubtful and not self._record.dropped()
        return clear and all(self._is_shown(cell_id) for cell_id in self._record.open)

    def _is_shown(self, cell_id: str) -> bool:
        """Whether MLflow shows how a cell stands that has not ended: of one that has, the end is still to be shown."""
        state, kept = cell_state(self.store, cell_id), self._record.cells.get(cell_id, {})
        if state.result is None and not state.attempts:
            return True
        shown = [state.state, state.attempts], STATUS.get(state.state, "KILLED")
        return state.result is None and (kept.get("state"), kept.get("status")) == shown

    def connect(self) -> None:
        """Reach the tracking server, or make the embedded database, and merge quarantines. InputError where the
        server is not there."""
        reached = reach(self.store, self.study, self.tracking_uri)
        self._record.meet(reached.experiment_id, reached.created)
        self._reached = reached
        faults: list[str] = []
        self._attempt("quarantine", self.merge_quarantine, faults)
        self._attempt("the study's run", self._show_parent, faults)
        self._say(faults)

    def start(self) -> None:
        """Mirror in a thread from now on; after `connect`."""
        self._thread.start()

    def stop(self, seconds: float = 60.0) -> None:
        """Ship what is left and end the thread. Gives up where the server acknowledged nothing for `seconds`: what is
        missing goes at the next run."""
        self._progressed = time.monotonic()
        self._stopping.set()
        while self._thread.is_alive() and time.monotonic() - self._progressed < seconds:
            self._thread.join(0.1)
        if self._thread.is_alive():
            self.fault = "the tracking server did not answer in time"

    def _loop(self) -> None:
        wait = again = INTERVAL_SECONDS
        while not self._stopping.wait(wait):
            began = time.monotonic()
            answers = self.sync(final=False)
            took = time.monotonic() - began
            if answers:
                wait, again = min(max(INTERVAL_SECONDS, took), SLOW_SECONDS), INTERVAL_SECONDS
            else:
                wait = again = min(2 * again, LONGEST_SECONDS)
        self.sync()

    def sync(self, *, final: bool = True, progress: Callable[[str, float], None] | None = None) -> bool:
        """One pass over the cells that are not closed: ship new rows, show states, close what has ended.

        A `final` pass also tries what is resting and looks at what people changed. Raises nothing: `fault` says what
        did not get through, and the next pass begins there. Returns whether the server answers.
        """
        look = final or time.monotonic() - self._looked >= LOOK_SECONDS
        faults: list[str] = []
        self._attempt("plan.json", self._record.replan, faults)
        if answers := self._holds(faults):
            if look:
                self._attempt("quarantine", self.merge_quarantine, faults)
                self._attempt("doubtful runs", self._settle, faults)
                self._attempt("cells that are not planned", self._mark_dropped, faults)
            answers = self._sync_cells(final, faults, progress)
            if look and answers:
                answers = self._attempt("the study's run", partial(self._show_parent, final), faults)
                self._looked = time.monotonic()
            self._attempt("mirror.json", self._save, faults)
        self._say(faults)
        return answers

    def merge_quarantine(self) -> None:
        """Merge the tags `escala.quarantine` with the store's marks: who changed one last is heard. Raises MLflow's
        errors."""
        runs = {cell_id: kept["run_id"] for cell_id, kept in self._record.cells.items()}
        merged = self._record.quarantine
        before = dict(merged)
        try:
            quarantine.merge(self._client, self._record.experiment_id, self.store, self.study, runs, merged)
        finally:
            self._record.changed |= merged != before

    def rebuild(self) -> None:
        """Forget what MLflow holds of the planned cells, so that the next pass makes every run anew from the store and
        then deletes the old one. First what people marked there is read back. Raises MLflow's errors."""
        self.merge_quarantine()
        self._replaced = self._search()
        self._found, self._rows, self._rests = {}, Rows(self.store), {}
        self._record.forget_all()
        self._save()

    # --- a pass --------------------------------------------------------------------------------------------------

    def _sync_cells(self, final: bool, faults: list[str], progress: Callable[[str, float], None] | None) -> bool:
        if not self._record.parent and not self._attempt("the study's run", self._show_parent, faults):
            return False
        if self._found is None and not self._record.cells.keys() >= self._record.open:
            count, answers = len(faults), self._attempt("the runs in MLflow", self._find_runs, faults)
            if len(faults) > count:
                return answers
        order = sorted(filter(self._has_begun, self._record.open), key=lambda one: (one in self._rests, one))
        gone, done = threading.Event(), 0
        senders = SENDERS if self.tracking_uri.startswith("http") else 1  # the database in a store takes one writer

        def tell() -> None:
            nonlocal done
            done += 1
            if progress:
                progress("bringing MLflow up to date", done / len(order))

        for first in range(0, len(order), TURN):
            sync = partial(self._sync_or_rest, final=final, gone=gone)
            faults += send(order[first : first + TURN], sync, senders=senders, gone=gone, tell=tell)
            if gone.is_set() or not self._holds(faults):
                return False
            if self._stopping.is_set() and not final:
                return True
            if time.monotonic() - self._record.saved > SAVE_SECONDS:
                self._attempt("mirror.json", self._save, faults)
        return True

    def _has_begun(self, cell_id: str) -> bool:
        """Whether there is anything to tell of a cell: most of a large study's are still to come, and a look at each
        one's state, and at the claim before it, would keep a core busy."""
        cell = self.store.cell(cell_id)
        return cell_id in self._record.cells or (cell / "attempts").exists() or (cell / "result.json").exists()

    def _sync_or_rest(self, cell_id: str, final: bool, gone: threading.Event) -> list[str]:
        """Sync a cell, unless it rests; what did not get through. Sets `gone` where the server does not answer."""
        faults: list[str] = []
        rest = self._rests.get(cell_id)
        if rest and not final and time.monotonic() < rest.until:
            return [rest.fault]
        if gone.is_set() or self._lost() is not None or (self._stopping.is_set() and not final):
            return []
        if not self._attempt(f"cell {cell_id}", partial(self._sync_cell, cell_id), faults):
            gone.set()
        if not faults:
            self._rests.pop(cell_id, None)
            return []
        self._rows.forget(cell_id)  # it gave out what was not acknowledged
        self._record.doubtful[cell_id] = time.time()
        self._record.changed = True
        if not gone.is_set():
            seconds = min(2 * rest.seconds, LONGEST_SECONDS) if rest else INTERVAL_SECONDS
            self._rests[cell_id] = _Rest(time.monotonic() + seconds, seconds, faults[-1])
        return faults

    def _attempt(self, what: str, work: Callable[[], None], faults: list[str]) -> bool:
        """Do one thing; a fault is noted under its name. False where the server does not answer any more."""
        try:
            work()
        except Exception as error:  # of MLflow, its database, the network or the disk: none of them may end the thread
            faults.append(f"{what}: {words(error)}")
            try:
                self._client.get_experiment(self._record.experiment_id)
            except Exception:
                return False
        return True

    def _holds(self, faults: list[str]) -> bool:
        if (why := self._lost()) is not None:
            faults.append(why)
        return why is None

    def _lost(self) -> str | None:
        """Why nothing more may be written, if so."""
        try:
            held = self.holds()
        except (InputError, OSError) as error:
            return f"whether another driver has taken the study over cannot be told: {error}"
        return None if held else "another driver has taken the study over; this one writes nothing more to MLflow"

    def _must_hold(self) -> None:
        """Before each request of a cell, since this process may have slept in the one before."""
        if (why := self._lost()) is not None:
            raise ConnectionError(why)

    def _say(self, faults: Sequence[str]) -> None:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        self.fault = f"{faults[0]}{more}" if faults else None

    def _settle(self) -> None:
        """After a request whose outcome is unknown: leave the cell one run, and say its state again."""
        for cell_id, since in list(self._record.doubtful.items()):
            kept = self._record.cells.get(cell_id)
            keep_one(self._client, self._runs_of(cell_id), kept and kept["run_id"])
            if kept and kept.get("closed"):
                kept |= {"closed": False, "state": None, "status": None}
                self._record.open.add(cell_id)
            if time.time() - since > SETTLED_SECONDS:
                del self._record.doubtful[cell_id]
            self._record.changed = True

    def _mark_dropped(self) -> None:
        """A cell that the plan has dropped keeps its run, with a tag by which fits leave it out, until it is back."""
        for cell_id, gone in self._record.dropped().items():
            self._must_hold()
            kept = self._record.cells[cell_id]
            try:
                if gone:
                    self._client.set_tag(kept["run_id"], DROPPED, "true")
                else:
                    self._client.delete_tag(kept["run_id"], DROPPED)
            except Exception as error:
                if not is_gone(error):  # deleted in MLflow
                    raise
            kept["dropped"], self._record.changed = gone, True

    def _show_parent(self, final: bool = False) -> None:
        """The study's own run: made where there is none, its files and its status up to date."""
        kept = self._record.parent
        if not kept:
            kept |= parent_run(self._client, self._record.experiment_id, self.study)
            self._record.changed = True
        status = "FINISHED" if not self._record.open else "KILLED" if final else "RUNNING"
        before = repr(kept)
        try:
            show_parent(self._client, self.store, self.study, kept, status)
        finally:
            self._record.changed |= repr(kept) != before

    # --- one cell ------------------------------------------------------------------------------------------------

    def _sync_cell(self, cell_id: str) -> None:
        state = cell_state(self.store, cell_id)
        if not (state.attempts or state.result):
            return
        kept = self._record.cells.get(cell_id) or self._take_run(cell_id)
        try:
            self._ship_log(cell_id, kept, state)
            status = STATUS.get(state.state, "KILLED")
            if kept.get("status") != status:
                self._must_hold()
                if status == "RUNNING":
                    self._client.update_run(kept["run_id"], status=status)
                else:
                    self._client.set_terminated(kept["run_id"], status=status)
                kept["status"] = status
                self._record.changed = True
        except Exception as error:
            if is_gone(error):  # deleted in MLflow: files win, the cell gets another run
                self._forget(cell_id)
            raise
        for run in self._replaced.pop(cell_id, []):
            self._client.delete_run(run.info.run_id)
        if state.result is not None:
            kept["closed"] = self._record.changed = True
            self._record.open.discard(cell_id)
            self._rows.forget(cell_id)

    def _ship_log(self, cell_id: str, kept: Json, state: CellState) -> None:
        """Send what is new in the cell's logs; its state goes with the last of it, so that it never runs ahead."""
        last = start = Chunk(kept["attempt"], kept["offset"])
        for chunk in self._rows.chunks(cell_id, kept["attempt"], kept["offset"]):
            if last is not start:
                self._ship(cell_id, kept, last)
            last = chunk
        tags: dict[str, str] = {}
        if kept["state"] != [state.state, state.attempts]:
            record = read_cell(self.store, cell_id)
            tags = state_tags(self.store, self.study, self._record.entries[cell_id], state, record)
        first, count = _differing(kept, last)
        if count != kept.get("told", 0):
            tags |= difference_tag(first, count)
        self._ship(cell_id, kept, last, tags)
        kept["state"], kept["entry"] = [state.state, state.attempts], checksum(self._record.entries[cell_id])
        if count:
            kept["told"] = count

    def _ship(self, cell_id: str, kept: Json, chunk: Chunk, tags: Mapping[str, str] | None = None) -> None:
        """Send one chunk; only when all of it is acknowledged does the offset go on."""
        from mlflow.entities import Param, RunTag

        batches = [chunk.metrics[start : start + BATCH] for start in range(0, len(chunk.metrics), BATCH)] or [[]]
        for batch in batches:
            labels = self._record.entries[cell_id]["labels"]
            given = {} if kept.get("params", True) else run_params(read_cell(self.store, cell_id), labels)
            said = tags if tags and batch is batches[-1] else {}
            if not (batch or given or said):
                continue
            self._must_hold()
            fault("mirror.before_log_batch")
            self._client.log_batch(
                kept["run_id"],
                metrics=batch,
                params=[Param(key, value) for key, value in given.items()],
                tags=[RunTag(key, value) for key, value in said.items()],
            )
            fault("mirror.after_log_batch")
            kept["params"] = True
            self._progressed = time.monotonic()
            self._record.changed = True
        if chunk.differences:
            kept["first_difference"], kept["differences"] = _differing(kept, chunk)
        if (kept["attempt"], kept["offset"]) != (chunk.epoch, chunk.end):
            kept |= {"attempt": chunk.epoch, "offset": chunk.end}
            self._record.changed = True

    def _take_run(self, cell_id: str) -> Json:
        """The cell's one run, noted; found by its tag where a fault came between its making and our note of it."""
        doubtful = cell_id in self._record.doubtful
        known = (self._found or {}).get(cell_id, [])
        run = keep_one(self._client, self._runs_of(cell_id) if doubtful else known)
        new = run is None
        if run is None:
            mark = read_quarantine(self.store, self.study).get(cell_id)
            marked = quarantine.mark_tags(mark) if mark else {}
            tags = {"escala.cell": cell_id, "escala.study": self.study, "mlflow.source.name": "escala"}
            tags |= {
                "mlflow.parentRunId": self._record.parent["run_id"],
                **marked,
                **peoples_tags(self._replaced.get(cell_id, [])),
            }
            labels = self._record.entries[cell_id]["labels"]
            name = run_name(read_cell(self.store, cell_id), labels, self._record.varied)
            fault("mirror.before_create_run")
            run = self._client.create_run(self._record.experiment_id, tags=tags, run_name=name)
            fault("mirror.after_create_run")
            if (why := self._lost()) is not None:  # it was frozen since it looked, and its successor may have made one
                self._client.delete_run(run.info.run_id)
                raise ConnectionError(why)
            self._record.quarantine.update({cell_id: marked} if marked else {})
        kept = {"run_id": run.info.run_id, "attempt": 0, "offset": 0, "state": None, "status": run.info.status}
        kept["params"] = not new and bool(run.data.params)
        self._record.cells[cell_id] = kept
        self._record.changed = True
        return kept

    def _forget(self, cell_id: str) -> None:
        self._record.forget(cell_id)
        if self._found is not None:
            self._found.pop(cell_id, None)

    def _runs_of(self, cell_id: str) -> list["Run"]:
        """The cell's runs as they are in MLflow now, without those that a rebuild replaces."""
        found = find_runs(self._client, self._record.experiment_id, f"tags.`escala.cell` = '{cell_id}'")
        replaced = {run.info.run_id for run in self._replaced.get(cell_id, [])}
        return [run for run in found if run.info.run_id not in replaced]

    def _find_runs(self) -> None:
        self._found = self._search()

    def _search(self) -> dict[str, list["Run"]]:
        """All runs of the planned cells, by cell."""
        found: dict[str, list[Run]] = {}
        for run in find_runs(self._client, self._record.experiment_id, "tags.`escala.cell` != ''"):
            if run.data.tags["escala.cell"] in self._record.entries:
                found.setdefault(run.data.tags["escala.cell"], []).append(run)
        return found

    @property
    def _client(self) -> "MlflowClient":
        assert self._reached is not None, "connect first"
        return self._reached.client

    def _save(self) -> None:
        if self._record.changed and self.holds():
            self._record.save()


def _differing(kept: Json, chunk: Chunk) -> tuple[Sequence[Any], int]:
    """The first recomputed value of the cell that differs, and how many do, with those of a chunk."""
    first = kept.get("first_difference") or (chunk.differences[0] if chunk.differences else ())
    return first, kept.get("differences", 0) + len(chunk.differences)
