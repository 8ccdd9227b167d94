"""What a cell computed otherwise when it went on, as its logs tell it."""

from sweeps.records import Json, read_rows
from sweeps.store import Store, log_stops


def read_differences(store: Store, cell_id: str) -> list[Json]:
    """What came out otherwise when it was computed again after a resume: {"attempt", "tokens", "metric", "logged",
    "recomputed"}. Empty where the cell is deterministic."""
    return [
        {"attempt": epoch, "tokens": row["tokens"], "metric": key, "logged": logged, "recomputed": recomputed}
        for epoch, stop in log_stops(store, cell_id).items()
        for row in read_rows(store.attempt(cell_id, epoch) / "log.jsonl", 0, stop)[0]
        for key, (logged, recomputed) in row.get("differs", {}).items()
    ]
