"""New rows of a cell's logs, for the mirror: read in chunks, each (key, step) given out once however many attempts
logged it."""

import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sweeps.records import Json, read_rows
from sweeps.store import Store, log_stops, read_metrics

if TYPE_CHECKING:
    from mlflow.entities import Metric

END = 2**62  # no file is longer
STRANGE = re.compile(r"[^/\w.\- :]")
"""What MLflow takes in no metric's name; one such name costs the cell all that goes with it."""
LONGEST_NAME = 250
CHUNK_BYTES = 128 * 1024
"""So much of a log is read, sent and acknowledged at a time."""


@dataclass(frozen=True)
class Chunk:
    """A piece of the log of one attempt: what of it is new, and where it ends."""

    epoch: int
    end: int
    metrics: list["Metric"] = field(default_factory=list)
    differences: list[tuple[str, int, float, float]] = field(default_factory=list)
    """(metric, tokens, value logged first, value recomputed) where a resumed attempt found another value."""


class Rows:
    """The logs of a store's cells. Remembers what it gave out of a cell until `forget`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._seen: dict[str, set[tuple[str, int]]] = {}

    def chunks(self, cell_id: str, attempt: int, start: int) -> Iterator[Chunk]:
        """What the cell logged after the byte `start` of the given attempt, which was given out and acknowledged."""
        stops = log_stops(self.store, cell_id)
        if not stops and not start:  # of a cell from elsewhere, which no attempt has logged, there is only this
            fresh = list(self._fresh(cell_id, 0, 0, read_metrics(self.store, cell_id)))
            if fresh:
                yield Chunk(0, 1, fresh)
        for epoch, stop in stops.items():
            if epoch < attempt:
                continue
            offset, path = start if epoch == attempt else 0, self.store.attempt(cell_id, epoch) / "log.jsonl"
            while True:
                rows, end = read_rows(path, offset, min(offset + CHUNK_BYTES, END if stop is None else stop))
                if end == offset:  # the end of the file, or a line that is longer than a chunk
                    rows, end = read_rows(path, offset, stop)
                if end == offset:
                    break
                fresh = list(self._fresh(cell_id, epoch, offset, rows))
                yield Chunk(epoch, end, fresh, [found for row in rows for found in _differences(row)])
                offset = end

    def forget(self, cell_id: str) -> None:
        """Where what was given out was not acknowledged, or the cell has ended."""
        self._seen.pop(cell_id, None)

    def _fresh(self, cell_id: str, epoch: int, offset: int, rows: Iterable[Json]) -> Iterator["Metric"]:
        """What of these rows, those of an attempt from `offset` on, no earlier row of the cell has said."""
        from mlflow.entities import Metric

        if cell_id not in self._seen:
            earlier = [(e, stop) for e, stop in log_stops(self.store, cell_id).items() if e < epoch]
            logs = [read_rows(self.store.attempt(cell_id, e) / "log.jsonl", 0, stop)[0] for e, stop in earlier]
            # what an earlier driver shipped of this attempt counts too, or a later attempt would say it again
            logs.append(read_rows(self.store.attempt(cell_id, epoch) / "log.jsonl", 0, offset)[0])
            self._seen[cell_id] = {(key, row["tokens"]) for log in logs for row in log for key in row["metrics"]}
        seen = self._seen[cell_id]
        for row in rows:
            for key, value in row["metrics"].items():
                if (key, row["tokens"]) not in seen:
                    seen.add((key, row["tokens"]))
                    yield Metric(shown_name(key), value, round(row["time"] * 1000), row["tokens"])


def shown_name(key: str) -> str:
    """A metric as MLflow may call it: a trainer that a study brings along may call it anything."""
    name = STRANGE.sub("_", key[:LONGEST_NAME])
    if posixpath.normpath(name) != name or name.startswith(("/", "..")) or name == ".":  # no path of its own
        name = re.sub(r"[/.]", "_", name) or "_"
    return name


def _differences(row: Json) -> Iterator[tuple[str, int, float, float]]:
    for metric, (logged, recomputed) in row.get("differs", {}).items():
        yield metric, row["tokens"], logged, recomputed
