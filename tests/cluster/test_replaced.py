"""Of two drivers that mirror one study, one of them frozen and replaced, one alone leaves its runs in MLflow."""

from collections.abc import Callable

import pytest
from commandline import TINY, Finished

from cluster.ledger import register
from cluster.mirror import Mirror
from sweeps.corpora import read_meta
from sweeps.grids import plan_study
from sweeps.store import Store
from sweeps.studyfile import load_study


def test_a_driver_that_woke_up_too_late_leaves_no_second_run_of_a_cell(
    copy_of_finished: Callable[[], Finished],
) -> None:
    from mlflow.tracking import MlflowClient

    copy = copy_of_finished()
    store = Store(copy.store)
    text = TINY.replace("name: tiny", "name: other")
    plan = plan_study(load_study(copy.escala.study(text)), read_meta(next((copy.store / "corpora").iterdir()))[0])
    register(store, plan, text.encode())
    cell_id = plan.cells[0].cell.id
    client = MlflowClient(tracking_uri=store.tracking_uri)
    successor, frozen = Mirror(store, "other"), Mirror(store, "other", holds=lambda: False)
    for mirror in (successor, frozen):
        mirror.connect()
    successor.sync()
    experiment = client.get_experiment_by_name("other")
    assert experiment is not None

    def runs() -> list[str]:
        found = client.search_runs([experiment.experiment_id], f"tags.`escala.cell` = '{cell_id}'")
        return [run.info.run_id for run in found]

    (kept,) = runs()
    late = client.create_run(experiment.experiment_id, tags={"escala.cell": cell_id}).info.run_id
    assert len(runs()) == 2
    with pytest.raises(ConnectionError, match="another driver has taken this study over"):
        frozen._leave_one_run(client, cell_id, late)
    assert runs() == [kept]
    client.create_run(experiment.experiment_id, tags={"escala.cell": cell_id})
    successor._leave_one_run(client, cell_id, kept)
    assert runs() == [kept]
    frozen._try_sync()
    assert frozen.fault is None
