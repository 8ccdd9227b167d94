"""The runs of a study as data frames. The one file of the analysis that reads cells, and that knows MLflow.

The same frame comes out of both: a cell becomes a row by one function, whether its record was read from the store's
files or from the `escala.record` tag that the mirror keeps on its MLflow run. Nothing is dropped here: a cell that a
fit must leave out stays in the frame and says why in the column `excluded`.
"""

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sweeps.cellrow import cell_row
from sweeps.errors import InputError
from sweeps.foreign import described, is_foreign
from sweeps.hosts import ANSWER_SECONDS, ask_host
from sweeps.redaction import redact
from sweeps.store import Store, iterate_cells, open_store, read_metrics, study_names

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE_RUNS = 1000
BUDGET_SIZES = 3
"""Imported runs of nearly equal C are a budget from so many sizes on: fewer have no minimum."""
SAME_BUDGET = 0.05
"""Runs of a table without a budget column share one where their ln C is this close to the next."""
READERS = 8
"""Histories asked for at once: MLflow's HTTP client keeps ten connections."""
MAX_EPOCHS = 1.5
"""Laws of N and D hold for fresh tokens; up to four epochs cost little, but not nothing (Muennighoff et al. 2023)."""

_TEXT = (
    *("cell", "study", "family", "state", "reason", "excluded", "trunk"),
    *("schedule", "cooldown_shape", "parametrisation", "optimizer", "corpus", "tokenizer", "precision"),
    *("search", "is_default"),
)
_WHOLE = (
    *("seed", "data_seed", "steps", "width", "depth", "heads", "mlp_width", "context"),
    *("validation_tokens", "attempts"),
)
COLUMNS = (
    *("cell", "study", "family", "state", "reason", "excluded", "trunk"),
    *("N", "N_nonembedding", "N_nonembedding_head", "N_total", "D", "C", "C_6nd", "C_spent"),
    *("C_assumed", "flops_per_token", "tokens_per_parameter", "budget", "size", "seed", "data_seed"),
    *("learning_rate", "weight_decay", "beta2", "batch_tokens", "warmup_tokens", "adamw_timescale"),
    *("schedule", "cooldown_fraction", "cooldown_shape", "final_fraction", "parametrisation"),
    *("optimizer", "init_std", "beta1", "eps", "clip_norm"),
    *("steps", "epochs", "width", "depth", "heads", "mlp_width", "corpus", "tokenizer", "context", "precision"),
    *("validation_tokens", "val_loss_final", "val_bpb_final", "loss_at_start"),
    *("seconds", "seconds_predicted", "tokens_per_second", "attempts"),
    *("search", "trial", "rung", "is_default"),
)
LABELS = (*_TEXT, "context")
"""Columns that tell runs apart, whatever they hold: a context is compared, never computed with."""
NUMBERS = tuple(name for name in COLUMNS if name not in (*LABELS, "C_assumed"))
METRICS = (
    *("train_loss", "val_loss", "val_loss_final", "val_bpb_final", "learning_rate", "gradient_norm"),
    "gradient_norm_small",
    *("tokens_per_second", "flops", "mfu", "optimizer_step"),
)
_CURVE_COLUMNS = ("cell", "trunk", "family", "seed", "N", "D", "C", "budget", "size", "tokens", *METRICS)


def load_runs(study: str, store: str | Path | Store | None = None, *, tracking_uri: str | None = None) -> pd.DataFrame:
    """One row per planned cell of a study, sorted by budget, N, D and seed.

    N and its variants are parameters, D tokens, C FLOPs, losses nats per token (`val_bpb_final` bits per byte);
    `loss_at_start` is that of the first step.
    `C_assumed`: C is 6 N D, because the table that a foreign run was imported from has none; what else such a run does
    not tell is NaN or None, but for `budget`: imported runs that name none share one where their C is nearly equal, as
    those of a table do. `adamw_timescale` is batch_tokens / (learning_rate weight_decay D): AdamW's averaging time
    as a fraction of the run (Wang & Aitchison 2024), NaN without decay. `excluded` is None, or why a fit must leave the
    cell out. `trunk` is equal in all cells of the study that share a past, the id of the one that trains it; a cell
    that shares with none is its own. C is what a cell is worth, the law's C; `C_spent` what it cost, or will cost:
    without what its trunk trained for it. The fields of a cooldown are those of schedule wsd, else None.
    `validation_tokens` is how many the final loss is taken over, 0 for the whole stream. `seconds` is the wall-clock
    time of the attempt that ended the cell (its share, in a stack), `seconds_predicted` what its plan said of it, NaN
    where the plan could not say. `search` names what a search chose settings for: equal in its cells, whose lengths
    differ by whole batches; `trial` is the number of the trial that asked for the cell (the first of them, where two
    share it), `rung` its share of the full length; None and NaN where nothing was searched.
    `is_default` says whether every hyperparameter varied in multiples is at 1 times, or every searched one at the
    recipe's own value, None without such.

    store: path or Store; by default $ESCALA_STORE, else ./escala-store. Where that store is not visible, or does not
    hold the study, the frame is read from the MLflow server `tracking_uri`.
    Raises InputError where neither has the study.
    """
    sources = list(_sources(study, store, tracking_uri))
    frame = pd.DataFrame([_row(study, *source) for source in sources], columns=list(COLUMNS), dtype=object)
    frame = frame.astype({c: _kind(frame[c]) for c in COLUMNS})
    if sources and frame["budget"].isna().all() and all(is_foreign(cell) for _, cell, *_ in sources):
        budget = pd.Series(shared_budgets(frame["C"].to_numpy()), frame.index)
        frame["budget"] = budget.where(frame.groupby(budget)["N"].transform("nunique") >= BUDGET_SIZES)
    return frame.sort_values(["budget", "N", "D", "seed", "data_seed", "cell"], ignore_index=True)


def _kind(column: "pd.Series[Any]") -> str:
    """A column's type; whole numbers that are not known of every run (of foreign ones) are floats with NaN."""
    if column.name in _TEXT:
        return "object"
    if column.name == "C_assumed":
        return "bool"
    return "int64" if column.name in _WHOLE and column.notna().all() else "float64"


def shared_budgets(C: np.ndarray) -> np.ndarray:
    """The compute budget (FLOPs) that each run shares with those of nearly equal C; NaN where they are no budget."""
    order = np.argsort(C)
    logs = np.log(C[order])
    cluster = np.concatenate([[0], np.cumsum(np.diff(logs) > SAME_BUDGET)]).astype(int)[: len(logs)]
    width = pd.Series(logs).groupby(cluster).agg(np.ptp) if len(logs) else pd.Series(dtype=float)
    center = pd.Series(logs).groupby(cluster).mean() if len(logs) else pd.Series(dtype=float)
    budget = np.empty(len(C))
    # A chain of neighbours that spreads is a cloud of runs, not a budget.
    budget[order] = [float(f"{np.exp(center[c]):.4g}") if width[c] <= 4 * SAME_BUDGET else np.nan for c in cluster]
    return budget


def load_curves(
    study: str, store: str | Path | Store | None = None, *, tracking_uri: str | None = None
) -> pd.DataFrame:
    """One row per cell and logged token count: what every run logged, joined with its family, seed, N, D and C.

    A metric that was not logged there is NaN. Arguments and errors as for `load_runs`.
    """
    runs = load_runs(study, store, tracking_uri=tracking_uri)
    found = _visible(study, store, tracking_uri)
    logged = _curves_of_store(found, runs["cell"]) if found else _curves_of_mlflow(study, str(tracking_uri))
    curves = _curve_frame(logged)
    known = runs[["cell", "trunk", "family", "seed", "N", "D", "C", "budget", "size"]].reset_index(names="order")
    joined = known.merge(curves, on="cell", how="inner").sort_values(["order", "tokens"], ignore_index=True)
    return joined[list(_CURVE_COLUMNS)]


def load_documents(study: str, store: str | Path | Store | None = None) -> pd.DataFrame:
    """Losses per validation document: one row per finished cell and document, with `loss_sum` (nats) and `tokens`.

    Documents are numbered as in the corpus, so that equal numbers of two cells are the same text. Cells without a
    document file are absent. Raises InputError where the store is not visible: MLflow does not hold documents.
    """
    found = _visible(study, store, None)
    assert found is not None
    frames = []
    for entry, _, state in iterate_cells(found, study):
        if state.result is None or state.result.get("foreign"):
            continue
        path = found.attempt(entry["id"], state.result["attempt"]) / "documents.npz"
        if not path.exists():
            continue
        loss_sum, tokens = _documents(path)
        frames.append(
            pd.DataFrame(
                {"cell": entry["id"], "document": np.arange(len(tokens)), "loss_sum": loss_sum, "tokens": tokens}
            )
        )
    columns = ["cell", "document", "loss_sum", "tokens"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def _documents(path: Path) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """The document losses of one cell: (loss_sum, tokens). InputError where the file is not what an attempt writes,
    which packs nothing: a small file that unpacks to more than there is memory is refused before it is read."""
    try:
        with zipfile.ZipFile(path) as packed:
            if any(one.file_size > one.compress_size for one in packed.infolist()):
                raise ValueError("its arrays are compressed")
        with np.load(path, allow_pickle=False) as arrays:
            loss_sum, tokens = arrays["loss_sum"].astype("float64"), arrays["tokens"].astype("int64")
        if loss_sum.ndim != 1 or loss_sum.shape != tokens.shape:
            raise ValueError("its arrays are not one number a document")
    except (ValueError, KeyError, EOFError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} holds no document losses ({error or type(error).__name__}). Delete it.") from error
    return loss_sum, tokens


def _curve_frame(logged: Iterable[tuple[str, Sequence[int], Sequence[Mapping[str, float]]]]) -> pd.DataFrame:
    """Of (cell, tokens of its rows, metrics of its rows). Column by column and cell by cell: a frame made of one
    dictionary a row takes several times as long, and all rows at once several times the memory."""
    cells, tokens, metrics = [], [], []
    for cell, at, rows in logged:
        cells.append(np.full(len(at), cell, dtype=object))
        tokens.append(np.array(at, dtype="int64"))
        there = set().union(*rows)
        values = np.full((len(METRICS), len(at)), np.nan)
        for order, key in enumerate(METRICS):
            if key in there:
                values[order] = [row.get(key, np.nan) for row in rows]
        metrics.append(values)
    if not cells:
        none = dict.fromkeys(METRICS, np.empty(0))
        return pd.DataFrame({"cell": np.empty(0, dtype=object), "tokens": np.empty(0, dtype="int64"), **none})
    table = np.concatenate(metrics, axis=1)
    columns = {"cell": np.concatenate(cells), "tokens": np.concatenate(tokens), **dict(zip(METRICS, table))}
    return pd.DataFrame(columns)


# --- one cell, one row -------------------------------------------------------------------------------------------


def _row(
    study: str,
    entry: Mapping[str, Any],
    cell: Mapping[str, Any],
    state: str,
    reason: str | None,
    attempts: int,
    result: Mapping[str, Any] | None,
) -> dict[str, Any]:
    cell = described(cell)
    identity, labels = cell["identity"], entry.get("labels", {})
    optimizer, schedule, shape, end = identity["optimizer"], identity["schedule"], identity["shape"], result or {}
    cools = schedule.get("name") == "wsd"
    row = {
        **cell_row(entry, cell, result),
        "cell": entry["id"],
        "study": study,
        "state": state,
        "reason": reason,
        "excluded": None,
        "trunk": entry.get("trunk", {}).get("cell") or identity.get("trunk") or entry["id"],
        "flops_per_token": cell["counts"]["flops_per_token"],
        "C_assumed": identity.get("foreign", {}).get("run", {}).get("C_assumed", False),
        "budget": labels.get("budget"),
        "size": labels.get("size"),
        "data_seed": identity["data_seed"],
        **{name: optimizer.get(name) for name in ("beta1", "beta2", "eps", "clip_norm")},
        "optimizer": optimizer.get("name"),
        "init_std": identity.get("init_std"),
        "warmup_tokens": schedule.get("warmup_tokens"),
        "schedule": schedule.get("name"),
        "cooldown_fraction": schedule.get("cooldown_fraction") if cools else None,
        "cooldown_shape": schedule.get("cooldown_shape", "sqrt") if cools else None,
        "final_fraction": schedule.get("final_fraction"),
        **{name: shape[name] for name in ("width", "depth", "heads", "mlp_width", "context")},
        **{name: identity[name] for name in ("corpus", "tokenizer", "precision")},
        "validation_tokens": identity.get("validation_tokens", 0),
        "val_bpb_final": end.get("val_bpb_final"),
        "loss_at_start": end.get("loss_at_start"),
        "seconds": end.get("seconds", {}).get("total"),
        "seconds_predicted": entry.get("seconds_predicted"),
        "tokens_per_second": end.get("tokens_per_second"),
        "attempts": attempts,
        "search": labels.get("search"),
        "trial": labels.get("trial"),
        "rung": labels.get("rung"),
        "is_default": _is_default(labels),
    }
    row["excluded"] = _excluded(row)
    return row


def _is_default(labels: Mapping[str, Any]) -> bool | None:
    """Whether every hyperparameter that the study varies in multiples of its rule is at 1 times, or all that it
    searches have the recipe's values; None without such."""
    if "default" in labels:
        return bool(labels["default"])
    times = [factor for name, factor in labels.items() if name.endswith("_times")]
    return all(factor == 1 for factor in times) if times else None


def _excluded(row: Mapping[str, Any]) -> str | None:
    """Why a fit must leave the cell out, or None."""
    state, because = row["state"], f": {row['reason']}" if row["reason"] else ""
    if state in ("quarantined", "diverged"):
        return f"{state}{because}"
    if state != "finished":
        return f"not finished ({state}{because})"
    if row["rung"] is not None and row["rung"] < 1:
        return "an early rung of a search"
    if row["val_loss_final"] is None:
        return "finished without a final loss"
    if (row["epochs"] or 0.0) > MAX_EPOCHS:
        return f"repeats its corpus ({row['epochs']:.3g} epochs; these laws hold for up to {MAX_EPOCHS})"
    return None


# --- the store ---------------------------------------------------------------------------------------------------


def _visible(study: str, store: str | Path | Store | None, tracking_uri: str | None) -> Store | None:
    """The store that holds the study; None where it is not here and MLflow is to be asked instead."""
    if isinstance(store, Store):
        found = store
    else:
        try:
            found = open_store(store or os.environ.get("ESCALA_STORE") or "escala-store", create=False)
        except InputError:
            if tracking_uri is None:
                raise
            return None
    if tracking_uri is not None and study not in study_names(found):
        return None
    return found


def _sources(study: str, store: str | Path | Store | None, tracking_uri: str | None) -> Iterator[tuple[Any, ...]]:
    """(plan entry, cell record, state, reason, attempts, result) of every planned cell."""
    found = _visible(study, store, tracking_uri)
    if found is not None:
        for entry, record, at in iterate_cells(found, study):
            yield entry, record, at.state, at.reason, at.attempts, at.result
        return
    for cell, run in _mirrored(_client(str(tracking_uri)), study):
        tags = run.data.tags
        try:
            told = _record(tags)
        except ValueError as error:
            raise InputError(
                f"the MLflow run of cell {cell} holds a damaged record ({error}): sync the study again."
            ) from error
        state, reason = told["state"], told["reason"]
        if tags.get("escala.quarantine"):  # set in the MLflow UI; counts at once, whether synced back or not
            state, reason = "quarantined", tags["escala.quarantine"]
        yield told["entry"], told["cell"], state, reason, told["attempts"], told["result"]


def _curves_of_store(store: Store, cells: pd.Series) -> Iterator[tuple[str, list[int], list[dict[str, float]]]]:
    for cell in cells:
        rows = read_metrics(store, cell)
        yield cell, [row["tokens"] for row in rows], [row["metrics"] for row in rows]


# --- MLflow ------------------------------------------------------------------------------------------------------


def _client(tracking_uri: str) -> "MlflowClient":
    from mlflow import MlflowClient  # 2 s to import; only where it is asked for

    # MLflow's own patience with a server that is not there is four minutes, and with a database still more.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("PGCONNECT_TIMEOUT", f"{ANSWER_SECONDS:.0f}")
    try:
        ask_host(tracking_uri)
    except (OSError, ValueError) as error:
        raise InputError(f"MLflow at {redact(tracking_uri)} cannot be read ({error}). Check --tracking-uri.") from None
    return MlflowClient(tracking_uri)


def _mirrored(client: "MlflowClient", study: str) -> "Iterator[tuple[str, Run]]":
    """(cell id, MLflow run) of the runs that mirror the study's cells, page by page."""
    from mlflow.exceptions import MlflowException

    try:
        experiment = client.get_experiment_by_name(study)
    except MlflowException as error:
        said = str(error).partition("\n")[0][:200]
        raise InputError(
            f"MLflow at {client.tracking_uri} cannot be read ({said}). Check --tracking-uri, "
            "and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the server asks for an account."
        ) from None
    if experiment is None:
        raise InputError(
            f"MLflow at {client.tracking_uri} has no experiment {study!r}. Run the study, or sync it first."
        )
    token, seen, where = None, set(), "tags.`escala.cell` != ''"
    while True:
        page = client.search_runs([experiment.experiment_id], where, max_results=PAGE_RUNS, page_token=token)
        for run in page:
            cell = run.data.tags["escala.cell"]
            dropped = "escala.dropped" in run.data.tags  # the study plans it no more
            if cell not in seen and "escala.record" in run.data.tags and not dropped:
                seen.add(cell)
                yield cell, run
        token = page.token
        if not token:
            return


def _record(tags: Mapping[str, str]) -> dict[str, Any]:
    """The cell's record; one longer than a tag goes on in the tags escala.record.1 and so on."""
    text, order = tags["escala.record"], 1
    while more := tags.get(f"escala.record.{order}"):
        text, order = text + more, order + 1
    record, _ = json.JSONDecoder().raw_decode(text)  # after it may stand the end of an earlier, longer record
    assert isinstance(record, dict)
    return record


def _curves_of_mlflow(study: str, tracking_uri: str) -> Iterator[tuple[str, list[int], list[dict[str, float]]]]:
    """Exact: MLflow's bulk requests sample or cut long histories, so each is asked for by itself, several at a time."""
    client = _client(tracking_uri)
    wanted = [
        (cell, run.info.run_id, key)
        for cell, run in _mirrored(client, study)
        for key in METRICS
        if key in run.data.metrics
    ]
    merged: dict[str, dict[int, dict[str, float]]] = {}
    with ThreadPoolExecutor(READERS) as pool:
        histories = pool.map(lambda one: client.get_metric_history(one[1], one[2]), wanted)  # pages by itself
        for (cell, _, key), history in zip(wanted, histories):
            rows = merged.setdefault(cell, {})
            for metric in history:
                rows.setdefault(metric.step, {}).setdefault(key, metric.value)
    for cell, rows in merged.items():
        yield cell, list(rows), list(rows.values())
