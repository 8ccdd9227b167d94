"""What the mirror reads of a cell's logs."""

import pytest

from cluster.rows import LONGEST_NAME, Rows
from sweeps.records import append_rows
from sweeps.store import Store, begin_attempt, read_plan


@pytest.mark.parametrize(
    "key", ["acc (top-5)", "loss@1k", "a//b", "../x", "/x", ".", "", "line\nbreak", "x" * 300, "x" * 249 + "/y"]
)
def test_whatever_a_trainer_calls_a_metric_mlflow_takes_it(key: str, study: tuple[Store, str]) -> None:
    from mlflow.entities import Metric
    from mlflow.utils.validation import _validate_batch_log_data

    store, name = study
    cell = read_plan(store, name)["cells"][0]["id"]
    attempt = begin_attempt(store, cell, {})
    with (attempt.folder / "log.jsonl").open("ab", buffering=0) as stream:
        append_rows(stream, [{"time": 1.7e9, "tokens": 1, "metrics": {key: 0.5, "val/loss.raw": 0.25}}])
    (chunk,) = Rows(store).chunks(cell, attempt.epoch, 0)
    assert all(isinstance(one, Metric) for one in chunk.metrics)
    _validate_batch_log_data(chunk.metrics, [], [])
    assert [one.value for one in chunk.metrics] == [0.5, 0.25]
    assert all(len(one.key) <= LONGEST_NAME for one in chunk.metrics)
    assert chunk.metrics[1].key == "val/loss.raw", "what MLflow takes as it is stays"
