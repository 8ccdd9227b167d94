"""The table of cells tells each cell apart and by which of its settings it differs."""

import pandas as pd

from analysis.cells_page import cells_section
from analysis.runs import load_runs
from tests.analysis.synthetic import Run


def cells(study, *changes: dict) -> tuple[pd.DataFrame, str]:
    runs = load_runs("demo", study([Run(width=32, tokens=51_200, changes=change) for change in changes]))
    return runs, cells_section(runs)


def test_a_cell_is_named_as_the_verbs_take_it(study) -> None:
    runs, text = cells(study, {"learning_rate": 0.01}, {"learning_rate": 0.02})
    assert "<th>cell</th><th>family</th>" in text
    for cell in runs["cell"]:
        assert f"<tr><td>{cell[:8]}</td>" in text


def test_ids_that_begin_alike_are_shown_as_far_as_they_differ(study) -> None:
    runs, _ = cells(study, {"learning_rate": 0.01}, {"learning_rate": 0.02})
    text = cells_section(runs.assign(cell=["0123456789abcdef", "0123456780abcdef"]))
    assert "<tr><td>0123456789</td>" in text
    assert "<tr><td>0123456780</td>" in text


def test_settings_that_differ_have_a_column_and_others_none(study) -> None:
    _, text = cells(study, {"weight_decay": 0.1}, {"weight_decay": 0.25})
    assert "<th>weight decay</th>" in text
    assert "<td>0.25</td>" in text
    assert "<th>parametrisation</th>" not in text
    _, text = cells(study, {"learning_rate": 0.1}, {"learning_rate": 0.25})
    assert "<th>weight decay</th>" not in text
