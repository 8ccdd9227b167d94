"""Quarantine, merged both ways between the store and MLflow: whoever changed it last since the last merge is heard.

A mark lives in the study's quarantine.json and as the tag `escala.quarantine` on the cell's run. With the value of the
last merge at hand, a tag that differs from it was changed by a person in MLflow and goes into the store; else what the
store says goes to the tag. Without that third value a mark that was lifted on one side would come back from the other.
Where it is not known, as of a server that the study was not mirrored to last, a tag with a name beside it is Escala's
own, and what the store says holds.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cluster.tracking import find_runs
from sweeps.store import Store, quarantine_cell, read_quarantine, release_cell

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

WHY, WHO = "escala.quarantine", "escala.quarantine.by"
TAG_CHARACTERS = 8000
"""MLflow's limit on a tag."""


def mark_tags(mark: Mapping[str, str]) -> dict[str, str]:
    """A mark of the store as tags of a run."""
    return {WHY: mark["why"][:TAG_CHARACTERS], WHO: mark["who"][:TAG_CHARACTERS]}


def merge(
    client: "MlflowClient",
    experiment_id: str,
    store: Store,
    study: str,
    runs: Mapping[str, str],
    merged: dict[str, dict[str, str]],
) -> None:
    """Merge the marks of the cells that have runs.

    `runs`: cell id -> run id. `merged`: cell id -> the tags as they were after the last merge, absent where there were
    none; it is updated cell by cell as the server and the disk acknowledge.
    """
    tagged: dict[str, dict[str, str]] = {}
    known = dict(runs)
    for run in find_runs(client, experiment_id, f"tags.`{WHY}` != ''"):
        cell_id = run.data.tags.get("escala.cell")
        if cell_id and runs.get(cell_id, run.info.run_id) == run.info.run_id:
            tagged[cell_id] = {key: run.data.tags[key] for key in (WHY, WHO) if key in run.data.tags}
            known[cell_id] = run.info.run_id
    marks = read_quarantine(store, study)
    for cell_id in sorted((tagged.keys() | merged.keys() | marks.keys()) & known.keys()):
        tags, before, mark = tagged.get(cell_id, {}), merged.get(cell_id, {}), marks.get(cell_id)
        wanted = mark_tags(mark) if mark else {}
        if tags.get(WHY) == wanted.get(WHY):
            _note(merged, cell_id, tags)
        elif tags.get(WHY) != before.get(WHY) and (cell_id in runs or WHO not in tags):
            if tags:
                who = tags[WHO] if WHO in tags and tags[WHO] != before.get(WHO) else "MLflow UI"
                quarantine_cell(store, study, cell_id, tags[WHY], who)
            else:
                release_cell(store, study, cell_id)
            _note(merged, cell_id, tags)
        else:
            _push(client, known[cell_id], tags, wanted)
            _note(merged, cell_id, wanted)


def _push(client: "MlflowClient", run_id: str, tags: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    if wanted:
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in wanted.items()])
    else:
        for key in (WHO, WHY):  # the reason last: until it is gone, the next merge does this again
            if key in tags:
                client.delete_tag(run_id, key)


def _note(merged: dict[str, dict[str, str]], cell_id: str, tags: Mapping[str, str]) -> None:
    if tags:
        merged[cell_id] = dict(tags)
    else:
        merged.pop(cell_id, None)
