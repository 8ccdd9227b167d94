"""The mirror: ships the logs of cells to MLflow, one run per cell and study, without training ever waiting for it.

One thread in the driver reads complete log lines, sends them in batches and keeps its offset in the study's
mirror.json. The first committed value of a (cell, key, step) wins: rows that an earlier attempt has logged are not
sent again. A batch that is sent twice has the same timestamps and adds nothing, so delivery is exactly once.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cluster import charts
from sweeps.errors import InputError
from sweeps.store import (
    CellState,
    Store,
    attempt_epochs,
    cell_state,
    read_cell,
    read_json,
    read_plan,
    read_quarantine,
    read_rows,
    timestamp,
    write_json,
)
from sweeps.units import flops, human

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

BATCH = 1000
"""Metrics a request: MLflow's own limit."""
INTERVAL_SECONDS = 2.0
_STATUS = {
    "finished": "FINISHED",
    "diverged": "FINISHED",
    "failed": "FAILED",
    "running": "RUNNING",
    "planned": "KILLED",
}


class Mirror:
    """Mirrors one study. `start` runs it in a thread until `stop`; `sync` is one pass."""

    def __init__(
        self, store: Store, study: str, tracking_uri: str | None = None, holds: Callable[[], bool] = lambda: True
    ) -> None:
        """`holds` says whether this process still holds the study; one that was replaced writes nothing more."""
        self.store, self.study, self.holds = store, study, holds
        self.tracking_uri = tracking_uri or store.tracking_uri
        self.fault: str | None = None
        """Why the last pass did not get through, for people to see."""
        self._path = store.study(study) / "mirror.json"
        self._labels = {entry["id"]: entry["labels"] for entry in read_plan(store, study)["cells"]}
        self._state = self._read_state()
        self._open = {cell_id for cell_id in self._labels if not self._cells.get(cell_id, {}).get("closed")}
        self._seen: dict[str, set[tuple[str, int]]] = {}
        self._client: MlflowClient | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="escala-mirror", daemon=True)

    @property
    def _cells(self) -> dict[str, Any]:
        cells: dict[str, Any] = self._state["cells"]
        return cells

    def is_complete(self) -> bool:
        """Whether every cell that has ended is in MLflow already, by the mirror's own record."""
        return not any((self.store.cell(cell_id) / "result.json").exists() for cell_id in self._open)

    def connect(self) -> None:
        """Reach the tracking server, or make the embedded database. InputError where that fails."""
        # Fail after seconds, not minutes: the client's default is seven tries with back-off.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import logging

        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        for name in ("alembic", "mlflow"):  # set at their import, so after it
            logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # `fault` says it in words

        from sqlalchemy.exc import SQLAlchemyError

        embedded = self.tracking_uri == self.store.tracking_uri
        database = self.store.root / "mlflow" / "mlflow.db"
        fresh = embedded and not database.exists()
        try:
            if embedded:
                (self.store.root / "mlflow" / "artifacts").mkdir(parents=True, exist_ok=True)
            client = MlflowClient(tracking_uri=self.tracking_uri)
            experiment = client.get_experiment_by_name(self.study)
            if experiment is None:
                artifacts = (self.store.root / "mlflow" / "artifacts").as_uri()
                experiment_id = client.create_experiment(self.study, artifact_location=artifacts if embedded else None)
                self._describe(client, experiment_id)
            else:
                experiment_id = experiment.experiment_id
                if experiment.lifecycle_stage == "deleted":
                    client.restore_experiment(experiment_id)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            reason = str(error).splitlines()[0][:300]
            if embedded:
                if fresh:  # half a database would stop the next run too; nothing is in it yet
                    database.unlink(missing_ok=True)
                raise InputError(
                    f"the MLflow database {database} cannot be written: {reason}. Free space or permissions there, or "
                    "choose another store; where the file is damaged, delete it: it is rebuilt from the store's files."
                ) from None
            raise InputError(
                f"MLflow is not reachable at {self.tracking_uri}: {reason}. Start the server, correct --tracking-uri "
                "(or MLFLOW_TRACKING_URI), or leave it out to use the database in the store."
            ) from None
        if self._state.get("experiment_id") != experiment_id:  # another database than last time: everything goes again
            self._state = {"tracking_uri": self.tracking_uri, "experiment_id": experiment_id, "cells": {}}
            self._open = set(self._labels)
        self._client = client

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 60.0) -> None:
        """Ship what is left and end the thread; gives up after `seconds`: what is missing goes at the next run."""
        self._stopping.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.fault = "the tracking server did not answer in time"

    def _loop(self) -> None:
        while not self._stopping.wait(INTERVAL_SECONDS):
            self._try_sync()
        self._try_sync()

    def _try_sync(self) -> None:
        try:
            if not self.holds():
                return
            self.sync()
            self.fault = None
        except Exception as error:  # an outage must not end the thread: the next pass begins where this one stopped
            self.fault = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    def sync(self) -> None:
        """One pass over the cells that are not closed: ship new rows, show states, close what has ended."""
        assert self._client is not None, "connect first"
        changed = False
        for cell_id in sorted(self._open):
            state = cell_state(self.store, cell_id)
            if state.attempts or state.result:
                changed |= self._sync_cell(self._client, cell_id, state)
        if changed:
            write_json(self._path, self._state)

    def pull_quarantine(self) -> None:
        """Read the tag `escala.quarantine` back from MLflow into the store: who, when and why."""
        assert self._client is not None, "connect first"
        found = {}
        known = read_quarantine(self.store, self.study)
        for cell_id, run in self._runs(self._client, "tags.`escala.quarantine` != ''"):
            why = run.data.tags["escala.quarantine"]
            who = run.data.tags.get("escala.quarantine.by", "MLflow UI")
            same = known.get(cell_id, {}).get("why") == why
            found[cell_id] = known[cell_id] if same else {"why": why, "who": who, "when": timestamp()}
        if found != known:
            write_json(self.store.study(self.study) / "quarantine.json", found)

    # --- one cell ------------------------------------------------------------------------------------------------

    def _sync_cell(self, client: "MlflowClient", cell_id: str, state: CellState) -> bool:
        kept = self._cells.get(cell_id)
        if kept is None:
            kept = {"run_id": self._find_or_create_run(client, cell_id), "attempt": 0, "offset": 0, "state": None}
        changed = cell_id not in self._cells
        for epoch in attempt_epochs(self.store, cell_id):
            if epoch < kept["attempt"]:
                continue
            offset = kept["offset"] if epoch == kept["attempt"] else 0
            rows, end = read_rows(self.store.attempt(cell_id, epoch) / "log.jsonl", offset)
            metrics = list(self._fresh_metrics(cell_id, epoch, offset, rows))
            for start in range(0, len(metrics), BATCH):
                client.log_batch(kept["run_id"], metrics=metrics[start : start + BATCH])
            changed |= end != offset or epoch != kept["attempt"]
            kept |= {"attempt": epoch, "offset": end}
        ended = state.result is not None
        if kept["state"] != [state.state, state.attempts]:
            self._show_state(client, kept["run_id"], cell_id, state)
            kept["state"] = [state.state, state.attempts]
            changed = True
        if ended:
            kept["closed"] = True
            self._open.discard(cell_id)
            self._seen.pop(cell_id, None)
        self._cells[cell_id] = kept
        return changed

    def _fresh_metrics(self, cell_id: str, epoch: int, offset: int, rows: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """What of these rows, those of an attempt from `offset` on, no earlier row of the cell has said."""
        from mlflow.entities import Metric

        if cell_id not in self._seen:
            earlier = [e for e in attempt_epochs(self.store, cell_id) if e < epoch]
            logs = [read_rows(self.store.attempt(cell_id, e) / "log.jsonl")[0] for e in earlier]
            # what an earlier driver shipped of this attempt counts too, or a later attempt would say it again
            logs.append(read_rows(self.store.attempt(cell_id, epoch) / "log.jsonl", 0, offset)[0])
            self._seen[cell_id] = {(key, row["tokens"]) for log in logs for row in log for key in row["metrics"]}
        seen = self._seen[cell_id]
        for row in rows:
            for key, value in row["metrics"].items():
                if (key, row["tokens"]) not in seen:
                    seen.add((key, row["tokens"]))
                    yield Metric(key, value, round(row["time"] * 1000), row["tokens"])

    def _find_or_create_run(self, client: "MlflowClient", cell_id: str) -> str:
        """The cell's one run; found by its tag where a crash came between its making and our note of it."""
        for _, run in self._runs(client, f"tags.`escala.cell` = '{cell_id}'"):
            return str(run.info.run_id)
        from mlflow.entities import Param

        record = read_cell(self.store, cell_id)
        identity, counts, labels = record["identity"], record["counts"], self._labels[cell_id]
        name = f"{identity['family']} N={human(counts['N'])} D={human(identity['tokens'])}"
        name += f" C={flops(labels['budget'])}" if "budget" in labels else ""
        name += f" seed {identity['seed']}" if identity["seed"] else ""
        tags = {"escala.cell": cell_id, "escala.study": self.study, "mlflow.source.name": "escala"}
        experiment_id = self._state["experiment_id"]
        run_id = str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
        self._leave_one_run(client, cell_id, run_id)
        params = {
            "family": identity["family"],
            "N": counts["N"],
            "D": identity["tokens"],
            "C": f"{counts['C']:.4g}",
            "budget": labels.get("budget", "-"),
            "tokens_per_parameter": f"{identity['tokens'] / counts['N']:.4g}",
            "learning_rate": identity["optimizer"]["learning_rate"],
            "weight_decay": identity["optimizer"]["weight_decay"],
            "batch_tokens": identity["batch_tokens"],
            "schedule": identity["schedule"]["name"],
            "width_x_depth": f"{identity['shape']['width']}x{identity['shape']['depth']}",
            "seed": identity["seed"],
        }
        client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
        return run_id

    def _leave_one_run(self, client: "MlflowClient", cell_id: str, made: str) -> None:
        """After a run was made: a driver that was frozen between its look and its making made a second one."""
        others = [run.info.run_id for _, run in self._runs(client, f"tags.`escala.cell` = '{cell_id}'")]
        others.remove(made)
        holds = self.holds()
        for run_id in others if holds else [made] if others else []:
            client.delete_run(run_id)
        if not holds:
            raise ConnectionError("another driver has taken this study over")

    def _show_state(self, client: "MlflowClient", run_id: str, cell_id: str, state: CellState) -> None:
        from mlflow.entities import RunTag

        entry = {"id": cell_id, "labels": self._labels[cell_id]}
        cell = {key: value for key, value in read_cell(self.store, cell_id).items() if key != "format"}
        record: dict[str, Any] = {"entry": entry, "cell": cell, "state": state.state, "reason": state.reason}
        record |= {"attempts": state.attempts, "result": state.result}
        tags = {
            "escala.state": state.state,
            "escala.reason": state.reason or "",
            "escala.attempts": str(state.attempts),
            "escala.record": json.dumps(record, allow_nan=False, separators=(",", ":")),
        }
        client.log_batch(run_id, tags=[RunTag(key, value[:8000]) for key, value in tags.items()])
        if state.state == "running":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, status=_STATUS[state.state])

    def _runs(self, client: "MlflowClient", where: str) -> Iterator[tuple[str, Any]]:
        token = None
        while True:
            page = client.search_runs([self._state["experiment_id"]], where, max_results=1000, page_token=token)
            yield from ((run.data.tags["escala.cell"], run) for run in page if "escala.cell" in run.data.tags)
            token = page.token
            if not token:
                return

    def _describe(self, client: "MlflowClient", experiment_id: str) -> None:
        study = read_plan(self.store, self.study)["study"]
        note = (
            f"{study['question']}\n\nSteps are training tokens. One run per cell; set the tag `escala.quarantine` to a "
        )
        note += "reason to take a run out of every fit."
        client.set_experiment_tag(experiment_id, "mlflow.note.content", note)
        client.set_experiment_tag(experiment_id, charts.TAG, charts.shared_view())

    def _read_state(self) -> dict[str, Any]:
        try:
            state = read_json(self._path)
        except FileNotFoundError:
            state = {}
        if state.get("tracking_uri") != self.tracking_uri:
            state = {"tracking_uri": self.tracking_uri, "experiment_id": None, "cells": {}}
        return state
