"""An attempt: one try at a cell, from its lease to its committed result. Runs in any process, with or without Ray."""

import time
import traceback
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sweeps.cell import Cell, cell_from_identity
from sweeps.corpora import Corpus, open_corpus
from sweeps.devices import Numerics, choose_numerics
from sweeps.store import (
    Attempt,
    Store,
    append_rows,
    attempt_epochs,
    begin_attempt,
    commit_result,
    read_cell,
    read_json,
    record_error,
    timestamp,
    write_bytes,
)


def run_attempt(store: Store, cell_id: str, *, study: str, base_dir: Path | None = None) -> dict[str, Any]:
    """Try a cell once and say how it ended: {"cell", "attempt", "state", "reason"}.

    A failure of the cell's own code is not raised: its traceback goes to the attempt's error.txt and the state is
    failed. A result is committed only while the attempt still holds the cell's lease; a superseded one says so.
    """
    started = time.time()
    record = read_cell(store, cell_id)
    cell = cell_from_identity(record["identity"])
    numerics = _numerics(store, cell)
    attempt = begin_attempt(store, cell_id, {"study": study, "numerics": numerics.to_json()})
    try:
        corpus = _corpus(store.root, cell.corpus)
        state, reason = _train_and_commit(attempt, cell, corpus, numerics, record["counts"], started, base_dir)
    except Exception as error:
        kind = "out_of_memory" if _is_out_of_memory(error) else "infrastructure" if _is_disk(error) else "code"
        record_error(attempt, kind, f"{type(error).__name__}: {error}", traceback.format_exc())
        state, reason = "failed", f"{kind}: {type(error).__name__}: {error}"
    return {"cell": cell_id, "attempt": attempt.epoch, "state": state, "reason": reason}


def _train_and_commit(
    attempt: Attempt,
    cell: Cell,
    corpus: Corpus,
    numerics: Numerics,
    counts: Mapping[str, Any],
    started: float,
    base_dir: Path | None,
) -> tuple[str, str | None]:
    from sweeps.training import train  # torch and transformers

    with (attempt.folder / "log.jsonl").open("ab", buffering=0) as stream:

        def log(tokens: int, metrics: Mapping[str, float]) -> None:
            append_rows(stream, [{"time": round(time.time(), 3), "tokens": tokens, "metrics": dict(metrics)}])

        outcome = train(cell, corpus, numerics, log, base_dir=base_dir)
    if outcome.document_losses is not None and outcome.document_tokens is not None:
        _write_documents(attempt.folder / "documents.npz", outcome.document_losses, outcome.document_tokens)
    tokens = outcome.steps * cell.batch_tokens
    result = {
        "state": outcome.state,
        "reason": outcome.reason,
        "val_loss_final": outcome.val_loss_final,
        "val_bpb_final": outcome.val_bpb_final,
        "loss_at_start": outcome.loss_at_start,
        "tokens": tokens,
        "flops": tokens * counts["flops_per_token"],
        "steps": outcome.steps,
        "epochs": round(corpus.info.epochs(tokens, cell.shape.context), 4),
        "seconds": {name: round(value, 3) for name, value in outcome.seconds.items()}
        | {"total": round(time.time() - started, 3)},
        "tokens_per_second": round(outcome.tokens_per_second, 1),
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "started": timestamp(started),
        "ended": timestamp(),
        "host": read_json(attempt.folder / "attempt.json")["host"],
        "numerics": numerics.to_json(),
    }
    if not commit_result(attempt, result):
        return "superseded", "a later attempt has taken this cell over, or its result stands"
    return outcome.state, outcome.reason


def _numerics(store: Store, cell: Cell) -> Numerics:
    """Those of the cell's first attempt, where there was one; else those of this process."""
    if attempt_epochs(store, cell.id):
        try:
            found = read_json(store.attempt(cell.id, 0) / "attempt.json")["numerics"]
            return Numerics(**{field.name: found[field.name] for field in fields(Numerics)})
        except FileNotFoundError:  # the first attempt died before it wrote its record
            pass
    return choose_numerics(cell.sequences)


@lru_cache(maxsize=4)
def _corpus(root: Path, fingerprint: str) -> Corpus:
    return open_corpus(root, fingerprint)


def _write_documents(path: Path, losses: np.ndarray, tokens: np.ndarray) -> None:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, loss_sum=losses, tokens=tokens)
    write_bytes(path, buffer.getvalue())


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _is_disk(error: Exception) -> bool:
    return isinstance(error, OSError) or (isinstance(error, ValueError) and isinstance(error.__cause__, OSError))
