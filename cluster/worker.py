"""A worker: an unnamed Ray actor that stays warm and trains one cell after another.

It writes to the store and returns a few words; losses never travel through Ray. It imports neither Ray nor MLflow.
"""

from pathlib import Path
from typing import Any

from sweeps.store import Store


class Worker:
    """One process in one slot. Ray makes it an actor (cluster/driver.py)."""

    def __init__(self) -> None:
        # Imported when the worker starts, so that its first cell does not wait for it.
        import sweeps.training  # noqa: F401

    def run(self, root: str, cell_id: str, study: str, base_dir: str | None) -> dict[str, Any]:
        """Try a cell once: {"cell", "attempt", "state", "reason"}."""
        from sweeps.attempt import run_attempt

        return run_attempt(Store(Path(root)), cell_id, study=study, base_dir=Path(base_dir) if base_dir else None)
