"""The MLflow server as the mirror meets it: reached within seconds, searched page by page, one run to a thing.

Guards against two runs where one is meant. MLflow chooses the id of a run itself, so a create_run whose reply is lost
cannot be asked for again: the HTTP client repeats nothing on its own, a run is found again by its tag, and of two that
mean the same the older stays.
"""

import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import charts
from cluster.credentials import check_file, check_uri, refusal
from sweeps.errors import InputError
from sweeps.hosts import ANSWER_SECONDS, ask_host, is_database
from sweeps.records import locked
from sweeps.redaction import redact
from sweeps.store import Store, read_plan

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

TRIES = 3
"""How often a server is asked for the experiment before it counts as not there."""
PAGE = 1000


@dataclass(frozen=True)
class Reached:
    """A client, and the study's experiment on its server."""

    client: "MlflowClient"
    experiment_id: str
    created: int
    """Unix milliseconds. Another value than before is another database, whatever the ids say."""


def try_once(seconds: int = 20) -> None:
    """From now on MLflow's client asks a server once, and waits so long unless the user says otherwise: the mirror has
    its own back-off, and a request that the client repeats after a lost reply would make a second run."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(seconds))


def reach(store: Store, study: str, tracking_uri: str) -> Reached:
    """Reach the server, or make the embedded database, and find or make the experiment. InputError where it fails, or
    where the server refuses the account."""
    if check_uri(tracking_uri).startswith(("http://", "https://")):
        check_file()
    try_once()
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # stdout is the command's own
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):  # set at their import, so after it
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # the fault says it in words

    from sqlalchemy.exc import SQLAlchemyError

    embedded = tracking_uri == store.tracking_uri
    database = store.root / "mlflow" / "mlflow.db"
    for left in reversed(range(TRIES)):
        try:
            if embedded:
                (store.root / "mlflow" / "artifacts").mkdir(parents=True, exist_ok=True)
                _make_database(database)
            ask_database(tracking_uri)
            client = MlflowClient(tracking_uri=tracking_uri)
            return _experiment(client, store, study, embedded)
        except ImportError as error:  # the driver of a database, which SQLAlchemy loads by its name
            raise InputError(
                f"MLflow cannot open {redact(tracking_uri)}: {words(error)}. Install that package here, or name in the "
                "address a driver that is installed, as in postgresql+psycopg2://."
            ) from None
        except (MlflowException, SQLAlchemyError, OSError) as error:
            if refused := refusal(error, tracking_uri):
                raise InputError(refused) from None
            reason = words(error)
            if left and not embedded:
                time.sleep(0.5 * (TRIES - left))
                continue
            break
    if embedded and "locked" in reason:
        raise InputError(
            f"the MLflow database {database} is held by another process ({reason}): a driver or a UI that is frozen, "
            "perhaps. End it, or try again when it has let go; nothing was changed."
        )
    if embedded:
        raise InputError(
            f"the MLflow database {database} cannot be written: {reason}. Free space or permissions there, or "
            "choose another store; where the file is damaged, delete it: it is rebuilt from the store's files."
        )
    raise InputError(
        f"MLflow is not reachable at {redact(tracking_uri)}: {reason}. Start the server, correct --tracking-uri "
        "(or MLFLOW_TRACKING_URI), or leave it out to use the database in the store."
    )


def _make_database(database: Path) -> None:
    """The embedded database where there is none, whole or not at all: MLflow goes through dozens of changes of its
    tables, and one that is killed among them stops every later run."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if database.exists():
        return
    part = database.with_name("mlflow.db.part")
    with locked(database.with_name("making.lock")):
        try:
            for left in (part, part.with_name(f"{part.name}-journal")):  # of a process that was killed
                left.unlink(missing_ok=True)
            if not database.exists():  # another process may have made it meanwhile
                SqlAlchemyStore(f"sqlite:///{part}", database.with_name("artifacts").as_uri()).engine.dispose()
                part.rename(database)
        finally:
            part.unlink(missing_ok=True)


def ask_database(tracking_uri: str) -> None:
    """Connect once to a database that is given as the tracking URI: MLflow tries ten times, over minutes, before it
    says what is wrong. OSError, ImportError or SQLAlchemyError where it cannot; nothing is done with other URIs."""
    if not is_database(tracking_uri):
        return
    from mlflow.store.db.utils import create_sqlalchemy_engine

    os.environ.setdefault("PGCONNECT_TIMEOUT", f"{ANSWER_SECONDS:.0f}")  # a host that takes connections and is silent
    engine = create_sqlalchemy_engine(tracking_uri)
    try:
        ask_host(tracking_uri)
        engine.connect().close()
    finally:
        engine.dispose()


def _experiment(client: "MlflowClient", store: Store, study: str, embedded: bool) -> Reached:
    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        artifacts = (store.root / "mlflow" / "artifacts").as_uri() if embedded else None
        experiment = client.get_experiment(client.create_experiment(study, artifact_location=artifacts))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    note = (
        f"{read_plan(store, study)['study']['question']}\n\nSteps are training tokens. One run per cell, below the "
        "study's own run, which holds the plan, the report and the environment; set the tag `escala.quarantine` on a "
        "cell's run to a reason to take it out of every fit."
    )
    for key, value in (("mlflow.note.content", note), (charts.TAG, charts.shared_view())):
        if key not in experiment.tags or (key == charts.TAG and experiment.tags[key] != value):
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return Reached(client, experiment.experiment_id, experiment.creation_time or 0)


def find_runs(client: "MlflowClient", experiment_id: str, where: str) -> Iterator["Run"]:
    """The runs of an experiment that meet a condition, oldest first, page by page."""
    token, order = None, ["attributes.start_time ASC"]
    while True:
        page = client.search_runs([experiment_id], where, max_results=PAGE, page_token=token, order_by=order)
        yield from page
        token = page.token
        if not token:
            return


def keep_one(client: "MlflowClient", runs: Iterable["Run"], preferred: str | None = None) -> "Run | None":
    """Of runs that mean the same, the preferred or else the oldest; the others are deleted. None of none."""
    ordered = sorted(runs, key=lambda run: (run.info.run_id != preferred, run.info.start_time, run.info.run_id))
    for extra in ordered[1:]:
        client.delete_run(extra.info.run_id)
    return ordered[0] if ordered else None


def is_gone(error: Exception) -> bool:
    """Whether the server says that a run is deleted, or was never there."""
    code = getattr(error, "error_code", "")
    return code == "RESOURCE_DOES_NOT_EXIST" or (code == "INVALID_PARAMETER_VALUE" and "'active' state" in str(error))


def words(error: Exception) -> str:
    """An error in one line, without secrets: libraries name the URL that they could not reach, password and all."""
    text: Any = str(error).strip() or "no message"
    return f"{type(error).__name__}: {redact(text.splitlines()[0])[:300]}"
