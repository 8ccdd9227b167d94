"""A worker: an unnamed Ray actor that stays warm and trains one cell after another.

It writes to the store and returns a few words; losses never travel through Ray. It does not import MLflow.
"""

from pathlib import Path
from typing import Any

from sweeps.store import Store


class Worker:
    """One process in one slot. Ray makes it an actor (cluster/driver.py)."""

    def __init__(self) -> None:
        # Imported when the worker starts, so that its first cell does not wait for it.
        import sweeps.training  # noqa: F401

    def run(
        self, root: str, cell_id: str, study: str, base_dir: str | None, checkpoint_seconds: float, driver: int
    ) -> dict[str, Any]:
        """Try a cell once: how it ended, as `sweeps.attempt.Ended`."""
        from sweeps.attempt import run_attempt

        ended = run_attempt(
            Store(Path(root)),
            cell_id,
            study=study,
            base_dir=Path(base_dir) if base_dir else None,
            checkpoint_seconds=checkpoint_seconds,
            driver=driver,
        )
        if ended.state == "preemption":  # whoever sent SIGTERM wants the process gone; the files say how it ended
            import ray

            ray.actor.exit_actor()
        return vars(ended)
