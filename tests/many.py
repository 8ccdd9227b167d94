"""A store in which every cell of a study has finished, written by files alone: what 10,000 trained cells leave.

python tests/many.py STUDY.yaml STORE
"""

import json
import sys
from pathlib import Path

from cluster.ledger import register
from sweeps.corpora import make_source, prepare
from sweeps.grids import Plan, plan_study
from sweeps.records import encode_row, write_json
from sweeps.store import FORMAT, Store, open_store
from sweeps.studyfile import load_study

ATTEMPT = {"format": FORMAT, "attempt": 0, "numerics": {"device": "cpu", "threads": 1}, "host": "somewhere", "pid": 1}
ATTEMPT |= {"process_started": 1.7e9, "started": "2025-01-01T00:00:00Z"}
RESULT = {
    "format": FORMAT,
    "attempt": 0,
    "state": "finished",
    "reason": None,
    "loss_at_start": 5.5,
    "host": "somewhere",
}
RESULT |= {"seconds": {"build": 0.1, "train": 2.0, "evaluate": 0.5, "total": 2.7}, "tokens_per_second": 1e5}
RESULT |= {"started": "2025-01-01T00:00:00Z", "ended": "2025-01-01T00:00:03Z", "peak_memory_bytes": 5e8}


def write_finished(study: Path, root: Path, rows: int = 3) -> Store:
    """Plan a study in the store at `root` and write the end of each of its cells, each with so many log rows."""
    declared = load_study(study)
    store = open_store(root)
    source = make_source(declared.corpus.source, declared.corpus.path, declared.corpus.options, base_dir=study.parent)
    plan = plan_study(declared, prepare(source, declared.tokenizer, store.root), base_dir=study.parent)
    register(store, plan, study.read_bytes())
    for order, one in enumerate(plan.cells):
        _finish(store.cell(one.cell.id), one.cell.tokens, one.counts["C"], 2.0 + 0.5 * (order % 997) / 997, rows)
    _mirror(store, plan)
    return store


def _finish(folder: Path, tokens: int, flops: float, loss: float, rows: int) -> None:
    attempt = folder / "attempts" / "0"
    attempt.mkdir(parents=True)
    (attempt / "attempt.json").write_text(json.dumps(ATTEMPT))
    steps = [tokens * (row + 1) // rows for row in range(rows)]
    logged = [{"time": 1.7e9 + step, "tokens": step, "metrics": {"train_loss": loss, "flops": flops}} for step in steps]
    logged[-1]["metrics"] |= {"val_loss_final": loss}
    (attempt / "log.jsonl").write_bytes(b"".join(map(encode_row, logged)))
    result = {**RESULT, "cell": folder.name, "val_loss_final": loss, "val_bpb_final": loss / 0.693, "tokens": tokens}
    (folder / "result.json").write_text(json.dumps(result))


def _mirror(store: Store, plan: Plan) -> None:
    """The mirror's note that all of it is in MLflow already."""
    closed = {"run_id": "0", "attempt": 0, "offset": 0, "state": ["finished", 1], "closed": True}
    cells = {one.cell.id: closed for one in plan.cells}
    state = {"tracking_uri": store.tracking_uri, "experiment_id": "1", "cells": cells}
    write_json(store.study(plan.study.name) / "mirror.json", state)


if __name__ == "__main__":
    write_finished(Path(sys.argv[1]), Path(sys.argv[2]))
