"""A mirror under test: steps of a cell as its attempt would make them, and what the server must hold in the end."""

import time
from collections.abc import Callable
from typing import Any

from commandline import ids
from faultproxy import Server

from cluster.mirror import Mirror
from sweeps.records import append_rows, read_json, write_json
from sweeps.store import (
    Attempt,
    Store,
    begin_attempt,
    cell_state,
    commit_result,
    read_metrics,
    read_plan,
    read_quarantine,
)

RESULT = {"state": "finished", "reason": None, "val_loss_final": 2.0, "val_bpb_final": 2.9, "tokens": 1, "seconds": {}}


def begin_cell(store: Store, name: str, seed: int = 99) -> str:
    """One more cell of the study, at work in this process."""
    plan = read_plan(store, name)
    record = read_json(store.cell(plan["cells"][0]["id"]) / "cell.json")
    cell = f"{seed:016x}"
    write_json(store.cell(cell) / "cell.json", record | {"id": cell, "identity": record["identity"] | {"seed": seed}})
    plan["cells"].append({"id": cell, "labels": {}})
    write_json(store.study(name) / "plan.json", plan)
    begin_attempt(store, cell, {"study": name})
    log(store, cell, 0)
    return cell


def log(store: Store, cell: str, order: int) -> None:
    with (store.attempt(cell, 0) / "log.jsonl").open("ab", buffering=0) as stream:
        metrics = {"train_loss": 5.0 / (1 + order), "flops": 1e6 * order}
        append_rows(stream, [{"time": 1.7e9 + order, "tokens": 10 * order, "metrics": metrics}])


def finish(store: Store, cell: str) -> None:
    assert commit_result(Attempt(store, cell, 0), RESULT)


def size_of_log(store: Store, cell: str) -> int:
    return (store.attempt(cell, 0) / "log.jsonl").stat().st_size


def client_of(server: Server) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=server.uri)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def connected(store: Store, name: str, uri: str, **options: Any) -> Mirror:
    mirror = Mirror(store, name, uri, **options)
    mirror.connect()
    return mirror


def until_through(mirror: Mirror, passes: int = 60) -> None:
    for _ in range(passes):
        mirror.sync()
        if mirror.fault is None:
            return
    raise AssertionError(f"not through after {passes} passes: {mirror.fault}")


def active_runs(server: Server, name: str, tag: str = "escala.cell") -> list[tuple[str, str]]:
    """(value of the tag, run id) of the runs that are not deleted."""
    query = (
        "select t.value, r.run_uuid from runs r join tags t on t.run_uuid = r.run_uuid and t.key = ? "
        "join experiments e on e.experiment_id = r.experiment_id where e.name = ? and r.lifecycle_stage = 'active'"
    )
    return server.rows(query, tag, name)


def tags_of(server: Server, run_id: str) -> dict[str, str]:
    return dict(server.rows("select key, value from tags where run_uuid = ?", run_id))


def assert_exact(server: Server, store: Store, name: str) -> dict[str, str]:
    """One run per cell; its rows are those of the log, none lost, none doubled. Returns cell -> run."""
    runs = active_runs(server, name)
    assert sorted(cell for cell, _ in runs) == sorted(ids(store, name))
    for cell, run_id in runs:
        logged = sorted(
            (key, row["tokens"], value, round(row["time"] * 1000))
            for row in read_metrics(store, cell)
            for key, value in row["metrics"].items()
        )
        rows = server.rows("select key, step, value, timestamp from metrics where run_uuid = ?", run_id)
        assert sorted(rows) == logged
        tags = tags_of(server, run_id)
        state = cell_state(store, cell)
        assert tags["escala.state"] == state.state
        assert len(server.rows("select key from params where run_uuid = ?", run_id)) == 12
        (status,) = server.rows("select status from runs where run_uuid = ?", run_id)
        assert status == ({"finished": "FINISHED", "running": "RUNNING"}[state.state],)
    assert len(active_runs(server, name, "escala.parent")) == 1
    return dict(runs)


def mark(store: Store, name: str, cell: str, why: str | None) -> None:
    """What the command line does in the store."""
    marks = read_quarantine(store, name)
    marks.pop(cell, None)
    if why is not None:
        marks[cell] = {"why": why, "who": "ann", "when": "2025-01-01T00:00:00Z"}
    write_json(store.study(name) / "quarantine.json", marks)
