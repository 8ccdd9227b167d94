"""What MLflow has acknowledged of a study: the mirror's record, in mirror.json, beside the plan that it mirrors.

Written now and then. What a crash leaves unnoted is sent again and adds nothing.
"""

import json
import time
import zlib
from typing import Any

from sweeps.faults import fault
from sweeps.records import Json, read_json, write_json
from sweeps.store import Store, read_plan


def checksum(entry: Json) -> int:
    """Of all that the plan says of a cell."""
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())


class Acknowledged:
    """The record of one study on one server; whoever changes a part of it sets `changed`."""

    def __init__(self, store: Store, study: str, tracking_uri: str) -> None:
        self._store, self._study, self._tracking_uri = store, study, tracking_uri
        self._path = store.study(study) / "mirror.json"
        self._planned: int | None = None
        self._state = self._read()
        self.entries: dict[str, Json] = {}
        """The planned cells, as plan.json has them, by their ids."""
        self.varied: tuple[str, ...] = ()
        """What the study varies."""
        self.open: set[str] = set()
        """Cells whose end MLflow does not show yet."""
        self.changed = False
        self.saved = float("-inf")
        """When it was last written (monotonic seconds)."""
        self.replan()

    @property
    def experiment_id(self) -> str:
        found: str = self._state["experiment_id"]
        return found

    @property
    def cells(self) -> dict[str, Any]:
        """By cell: its run, how far its logs have got there, and the state and status that it shows."""
        found: dict[str, Any] = self._state["cells"]
        return found

    @property
    def quarantine(self) -> dict[str, Any]:
        """By cell: its tags of quarantine, as they were when store and server last agreed."""
        found: dict[str, Any] = self._state["quarantine"]
        return found

    @property
    def parent(self) -> dict[str, Any]:
        """The study's own run (cluster/parent.py)."""
        found: dict[str, Any] = self._state["parent"]
        return found

    @property
    def doubtful(self) -> dict[str, float]:
        """Cells of which a request had an unknown outcome, and since when (Unix seconds)."""
        found: dict[str, float] = self._state["doubtful"]
        return found

    def meet(self, experiment_id: str, created: int) -> None:
        """The database that was reached. Another one than last time knows nothing: everything goes again."""
        if (self._state["experiment_id"], self._state.get("created")) != (experiment_id, created):
            self._state = self._empty() | {"experiment_id": experiment_id, "created": created}
            self.open = set(self.entries)

    def replan(self) -> None:
        """Where the plan on record has changed, as that of a search does, know its cells; and say anew what it says
        otherwise of cells that are in MLflow, such as whose trunk they share."""
        path = self._store.study(self._study) / "plan.json"
        stamp = path.stat().st_mtime_ns if path.exists() else None
        if self._planned is not None and stamp == self._planned:
            return
        plan = read_plan(self._store, self._study)
        self.entries = {entry["id"]: entry for entry in plan["cells"]}
        self.varied = tuple(plan["study"].get("vary", ()))
        self._planned = stamp
        for cell_id, kept in self.cells.items():
            entry = self.entries.get(cell_id)
            # an older version kept the trunk alone
            if entry and (
                kept["entry"] != checksum(entry) if "entry" in kept else kept.get("trunk") != entry.get("trunk")
            ):
                kept |= {"closed": False, "state": None}
                self.changed = True
        self.open = {cell_id for cell_id in self.entries if not self.cells.get(cell_id, {}).get("closed")}

    def dropped(self) -> dict[str, bool]:
        """Cells with a run that the plan has dropped, or has again since their run said that: whether it has."""
        found = {cell_id: cell_id not in self.entries for cell_id in self.cells}
        return {cell_id: gone for cell_id, gone in found.items() if gone != self.cells[cell_id].get("dropped", False)}

    def forget(self, cell_id: str) -> None:
        """The cell's run is gone."""
        self.cells.pop(cell_id, None)
        self.quarantine.pop(cell_id, None)
        self.changed = True

    def forget_all(self) -> None:
        """Every run of a cell, and the files of the study's own, are to be made anew."""
        self._state["cells"], self.open = {}, set(self.entries)
        if self.parent:
            self.parent["sent"] = {}
        self.changed = True

    def save(self) -> None:
        fault("mirror.before_state")
        write_json(self._path, self._state)
        self.changed, self.saved = False, time.monotonic()
        fault("mirror.after_state")

    def _read(self) -> Json:
        try:
            state = read_json(self._path)
        except FileNotFoundError:
            state = {}
        return self._empty() | (state if state.get("tracking_uri") == self._tracking_uri else {})

    def _empty(self) -> Json:
        empty: Json = {"cells": {}, "quarantine": {}, "parent": {}, "doubtful": {}}
        return {"tracking_uri": self._tracking_uri, "experiment_id": None, **empty}
