"""The study's own run in MLflow, above those of its cells: plan, study file, environment, the report with its pictures.

It holds artifacts and no metric, so that it draws no line. A server that keeps no artifacts costs these files, never
the curves: the fault is said and the mirror goes on.
"""

import json
import os
import platform
import socket
import tempfile
import zlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from cluster.tracking import find_runs, is_gone, keep_one
from sweeps.records import read_json
from sweeps.redaction import redact
from sweeps.store import Store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TAG = "escala.parent"
_FILES = ("plan.json", "study.yaml", "report.html")
_PACKAGES = ("escala", "torch", "transformers", "tokenizers", "numpy", "ray", "mlflow", "optuna", "safetensors")


class NoArtifacts(RuntimeError):
    """The server keeps artifacts where this process cannot write."""


def parent_run(client: "MlflowClient", experiment_id: str, study: str) -> dict[str, Any]:
    """Find or make the study's own run: what the mirror remembers of it, {"run_id", "artifacts", "sent", "status"}."""
    run = keep_one(client, find_runs(client, experiment_id, f"tags.`{TAG}` = '1'"))
    if run is None:
        tags = {TAG: "1", "escala.study": study, "mlflow.source.name": "escala"}
        run = client.create_run(experiment_id, tags=tags, run_name=study)
    return {"run_id": run.info.run_id, "artifacts": run.info.artifact_uri, "sent": {}, "status": run.info.status}


def show_parent(client: "MlflowClient", store: Store, study: str, kept: dict[str, Any], status: str) -> bool:
    """Bring the run up to date with its files and `status`; `kept` with what was acknowledged. True where it changed.

    Raises NoArtifacts where the server takes none. A run that was deleted in MLflow is forgotten: `kept` is emptied.
    """
    before = json.dumps(kept)
    try:
        if kept["status"] != status:
            if status == "RUNNING":
                client.update_run(kept["run_id"], status=status)
            else:
                client.set_terminated(kept["run_id"], status=status)
            kept["status"] = status
        files = {name: content for name, content in _files(store, study) if kept["sent"].get(name) != _sum(content)}
        # MLflow writes to the place that its database names, which need not be the one that was noted
        if files and _takes_artifacts(client, store, client.get_run(kept["run_id"]).info.artifact_uri):
            for name, content in files.items():
                _send(client, kept["run_id"], name, content)
                kept["sent"][name] = _sum(content)
    except Exception as error:
        if not is_gone(error):
            raise
        kept.clear()
    return json.dumps(kept) != before


def bring_command(store: Store, study: str) -> str | None:
    """The command by which MLflow gets a new report where no driver runs; None of a study that it does not show.

    MLflow itself is not asked: loading it takes seconds.
    """
    path = store.study(study) / "mirror.json"
    if not path.exists():
        return None
    server = str(read_json(path).get("tracking_uri", ""))
    elsewhere = f" --tracking-uri {server}" if server.startswith("http") else ""
    return f"escala sync {study}{elsewhere}"


def left_outside(store: Store, study: str) -> str | None:
    """What to say where MLflow's database in the store names a folder outside of it for the study's files, as that of
    a store that was moved or copied does: nothing is written there. None where it does not."""
    path = store.study(study) / "mirror.json"
    kept = read_json(path) if path.exists() else {}
    place = str(kept.get("parent", {}).get("artifacts") or "")
    if str(kept.get("tracking_uri", "")).startswith("http") or not place or _lies_within(store, place):
        return None
    return (
        f"note: MLflow's database in this store keeps the plan and the report of {study} outside of it ({place}), as "
        "after a move: new ones stay in the store. To have them in MLflow, sync every study of the store, remove "
        f"{store.root / 'mlflow'}, and sync again."
    )


def environment() -> dict[str, Any]:
    """What the driver runs on. Names no setting: settings hold secrets."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "host": socket.gethostname(),
        "versions": versions,
    }


def _files(store: Store, study: str) -> Iterator[tuple[str, bytes]]:
    folder = store.study(study)
    for path in (*(folder / name for name in _FILES), *sorted((folder / "pictures").glob("*.png"))):
        if path.exists():
            yield path.relative_to(folder).as_posix(), path.read_bytes()
    yield "environment.json", json.dumps(environment(), indent=1).encode() + b"\n"


def _takes_artifacts(client: "MlflowClient", store: Store, place: str) -> bool:
    """Whether artifacts of this run can be written from here; NoArtifacts where only the server could."""
    local = urlsplit(place).scheme in ("", "file")
    if client.tracking_uri == store.tracking_uri:
        # A store that was moved or copied still names its old folder, and one from a stranger any folder: leave those.
        return _lies_within(store, place)
    if local and client.tracking_uri.startswith(("http://", "https://")):
        raise NoArtifacts(
            f"the server keeps artifacts in a folder of its own ({place}): start it with --serve-artifacts, or with an "
            "artifact root that both can reach; the plan and the report stay in the store"
        )
    return True


def _lies_within(store: Store, place: str) -> bool:
    """Whether this address of artifacts is a folder of the store's own MLflow."""
    folder, parts = store.root / "mlflow", urlsplit(place)
    local = parts.scheme in ("", "file")
    return local and (folder / url2pathname(parts.path)).resolve().is_relative_to(folder.resolve())


def _send(client: "MlflowClient", run_id: str, name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        path.write_bytes(content if path.suffix == ".png" else redact(content.decode(errors="replace")).encode())
        client.log_artifact(run_id, str(path), str(Path(name).parent) if "/" in name else None)


def _sum(content: bytes) -> int:
    return zlib.crc32(content)
