"""Of two drivers that mirror one study, one of them frozen and replaced, one alone leaves its runs in MLflow."""

from collections.abc import Callable

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
    successor = Mirror(store, "other")
    successor.connect()
    experiment = client.get_experiment_by_name("other")
    assert experiment is not None

    def runs() -> list[str]:
        found = client.search_runs([experiment.experiment_id], f"tags.`escala.cell` = '{cell_id}'")
        return [run.info.run_id for run in found]

    frozen = Mirror(store, "other", holds=lambda: not runs())  # replaced while it made the run
    frozen.connect()
    frozen.sync()
    assert "another driver has taken the study over" in (frozen.fault or "")
    assert runs() == []
    successor.sync()
    (kept,) = runs()
    frozen.sync()
    assert runs() == [kept]
