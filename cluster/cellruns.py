"""A cell as its MLflow run shows it: name, params, tags. At most 12 params; what a person or a reader needs, in tags.

The tag `escala.record` holds the cell's whole record, so that `analysis.load_runs` makes the same frame from MLflow as
from the store. MLflow cuts tags at 8,000 characters: a longer record goes on in `escala.record.1` and so on.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sweeps.foreign import described, is_foreign
from sweeps.records import Json, read_json
from sweeps.redaction import redact
from sweeps.store import CellState, Store, trunk_of
from sweeps.units import flops, human

if TYPE_CHECKING:
    from mlflow.entities import Run

TAG_CHARACTERS = 8000
_OWN_TAGS = ("escala.", "mlflow.")
_PEOPLES_TAGS = ("mlflow.note.content", "mlflow.runColor")
STATUS = {
    "finished": "FINISHED",
    "diverged": "FINISHED",
    "failed": "FAILED",
    "running": "RUNNING",
}
"""Of a run, by the state of its cell. Any other state is of a cell that is not at work now: KILLED."""


_SHORT = {"learning_rate": "lr", "weight_decay": "wd", "batch_tokens": "batch"}


def run_name(record: Json, labels: Mapping[str, Any], varied: Iterable[str] = ()) -> str:
    """What the cell is, in a few words; with its values of the hyperparameters that the study varies."""
    identity = described(record)["identity"]
    name = f"{identity['family']} N={human(record['counts']['N'])} D={human(identity['tokens'])}"
    name += f" C={flops(labels['budget'])}" if "budget" in labels else ""
    return name + told_apart(record, labels, varied)


def told_apart(record: Json, labels: Mapping[str, Any], varied: Iterable[str]) -> str:
    """What sets a cell off from others of its size and length, each value after a space: its trial, its values of the
    hyperparameters that the study varies, its seed."""
    identity = described(record)["identity"]
    words = f" trial {labels['trial']}" if "trial" in labels else ""
    parts = (identity, identity["optimizer"], identity["schedule"])
    for key in varied:
        value = next((part[key] for part in parts if key in part), "standard" if key == "parametrisation" else None)
        value = value.get("kind", value.get("name")) if isinstance(value, Mapping) else value
        if value is not None:
            words += f" {value}" if isinstance(value, str) else f" {_SHORT.get(key, key)}={value:.4g}"
    return words + (f" seed {identity['seed']}" if identity["seed"] and not is_foreign(record) else "")


def run_params(record: Json, labels: Mapping[str, Any]) -> dict[str, str]:
    """What defines the cell, as text; what a cell from elsewhere does not tell is a dash."""
    identity, counts = described(record)["identity"], record["counts"]
    optimizer, shape = identity["optimizer"], identity["shape"]
    params = {
        "family": identity["family"],
        "N": counts["N"],
        "D": identity["tokens"],
        "C": f"{counts['C']:.4g}" if counts.get("C") else None,
        "budget": labels.get("budget"),
        "tokens_per_parameter": f"{identity['tokens'] / counts['N']:.4g}",
        "learning_rate": optimizer["learning_rate"],
        "weight_decay": optimizer["weight_decay"],
        "batch_tokens": identity["batch_tokens"],
        "schedule": identity["schedule"]["name"],
        "width_x_depth": f"{shape['width']}x{shape['depth']}" if shape["width"] and shape["depth"] else None,
        "seed": identity["seed"],
    }
    return {key: "-" if value is None else str(value) for key, value in params.items()}


def state_tags(store: Store, study: str, entry: Json, state: CellState, record: Json) -> dict[str, str]:
    """The cell's state and its record; the trunk that it branches off, and where another study has trained it, which.

    entry: the cell's in plan.json. A branch is a run beside its trunk's, not below it: which cell is the trunk changes
    when a study grows, and MLflow's parent of a run does not.
    """
    cell_id = entry["id"]
    cell = {key: value for key, value in record.items() if key != "format"}
    told: dict[str, Any] = {"entry": entry, "cell": cell, "state": state.state}
    reason = state.reason and redact(state.reason)
    told |= {"reason": reason, "attempts": state.attempts, "result": state.result}
    text = json.dumps(told, allow_nan=False, separators=(",", ":"))
    parts = [text[start : start + TAG_CHARACTERS] for start in range(0, len(text), TAG_CHARACTERS)]
    tags = {"escala.state": state.state, "escala.reason": (reason or "")[:TAG_CHARACTERS]}
    tags |= {"escala.attempts": str(state.attempts)}
    tags |= {f"escala.record.{order}" if order else "escala.record": part for order, part in enumerate(parts)}
    if "trunk" in entry or (state.result or {}).get("trunk"):
        trunk = trunk_of(entry, state.result) or {}  # empty: it was to branch off, and had to train all of it
        tags |= {"escala.trunk": trunk.get("cell", ""), "escala.trunk_tokens": str(trunk.get("tokens", ""))}
    labels = entry.get("labels", {})
    tags |= {f"escala.{name}": str(labels[name]) for name in ("search", "trial", "rung") if name in labels}
    owner = _owner(store, cell_id, state, record)
    return tags | ({"escala.reused": owner} if owner not in (None, study) else {})


def difference_tag(first: Sequence[Any], count: int) -> dict[str, str]:
    """The flag of a cell whose recomputed values differ from the logged: `first` is (metric, tokens, logged,
    recomputed) of the first of `count`."""
    metric, tokens, logged, recomputed = first
    text = f"{metric} at {tokens:,} tokens differs by {abs(recomputed - logged):.3g} after a resume: "
    text += f"{logged:.9g} logged, {recomputed:.9g} recomputed"
    return {"escala.nondeterminism": text + (f"; and {count - 1} more" if count > 1 else "")}


def peoples_tags(runs: Iterable["Run"]) -> dict[str, str]:
    """What people wrote on runs, as against what Escala and MLflow did."""
    tags: dict[str, str] = {}
    for run in runs:
        theirs = (key for key in run.data.tags if key in _PEOPLES_TAGS or not key.startswith(_OWN_TAGS))
        tags |= {key: run.data.tags[key] for key in theirs}
    return tags


def _owner(store: Store, cell_id: str, state: CellState, record: Json) -> str | None:
    """The study that trained a cell that has ended; None where its files do not say."""
    if is_foreign(record):
        return "an import"
    if state.result is None:
        return None
    try:
        owner: str | None = read_json(store.attempt(cell_id, state.result["attempt"]) / "attempt.json").get("study")
    except FileNotFoundError:
        return None
    return owner
