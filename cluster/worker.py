"""A worker: an unnamed Ray actor that stays warm and trains one cell after another.

It writes to the store and returns a few words; losses never travel through Ray. It does not import MLflow.
"""

from pathlib import Path
from typing import Any

from cluster.placement import memory_share
from sweeps.devices import cap_memory, hide_gpus, keep_freed_memory
from sweeps.loading import loading
from sweeps.store import Store, cell_state


class Worker:
    """One process in one slot. Ray makes it an actor (cluster/driver.py)."""

    def __init__(self, gpus: float, host_part: float, own_trainer: bool) -> None:
        """`gpus`: what Ray gave it, of whose memory it takes its share; `host_part`: of its node's. `own_trainer`: a
        study's own trains its cells."""
        if not gpus:
            hide_gpus()
        # Imported when the worker starts, so that its first cell does not wait for it. The models' code takes longer
        # than all else together, and a trainer that Escala does not know may have no use for it.
        with loading():
            import torch  # noqa: F401

            if not own_trainer:
                import transformers.modeling_utils  # noqa: F401

                import sweeps.training  # noqa: F401
        keep_freed_memory()
        cap_memory(memory_share(gpus), host_part)

    def run(
        self,
        root: str,
        cell_ids: list[str],
        study: str,
        base_dir: str | None,
        checkpoint_seconds: float,
        driver: int,
        probe: bool,
        threads: int,
    ) -> list[dict[str, Any]]:
        """Try a cell once, or several as one program: how each ended, as `sweeps.attempt.Ended`.

        `threads` are those of a CPU. With `probe`, several are tried together only where that pays; else nothing is
        tried and the list is empty. What another study's worker has begun or ended since it was given out, while this
        one waited for room, is left to it.
        """
        from sweeps.attempt import run_attempts
        from sweeps.probing import pays

        store, base = Store(Path(root)), Path(base_dir) if base_dir else None
        cell_ids = [one for one in cell_ids if cell_state(store, one).state == "planned"]
        if not cell_ids or (probe and len(cell_ids) > 1 and not pays(store, cell_ids, base)):
            return []
        ended = run_attempts(
            store,
            cell_ids,
            study=study,
            base_dir=base,
            checkpoint_seconds=checkpoint_seconds,
            driver=driver,
            threads=threads,
        )
        if any(one.state == "preemption" for one in ended):  # whoever sent SIGTERM wants the process gone
            import ray

            ray.actor.exit_actor()
        return [vars(one) for one in ended]
