"""A plan on record: after a power cut, and what is said of its changes."""

from pathlib import Path

import pytest
from searched import end, make_corpus, search_plan

from cluster.ledger import Change, register
from cluster.searching import Searching
from sweeps.errors import InputError
from sweeps.store import open_store, read_cell


@pytest.mark.parametrize(
    ("left", "ended"),
    [(b"", False), (b"\0" * 500, False), (b'{"format": 1,\n "id": "', False), (b"", True)],
)
def test_a_record_of_a_cell_that_a_power_cut_left_empty_or_half_is_written_anew(
    tmp_path: Path, left: bytes, ended: bool
) -> None:
    search = Searching(store := open_store(tmp_path / "store"), search_plan(make_corpus(tmp_path), trials=1))
    (one,) = search.grow(1)
    register(store, search.plan, b"")
    if ended:
        end(store, one)
    path = store.cell(one.cell.id) / "cell.json"
    before, inode = path.read_bytes(), path.stat().st_ino
    register(store, search.plan, b"")
    assert path.stat().st_ino == inode, "what is whole is left alone"
    path.write_bytes(left)
    with pytest.raises(InputError, match=r"cannot be read as a record.*: run the study again, which writes"):
        read_cell(store, one.cell.id)
    register(store, search.plan, b"")
    assert path.read_bytes() == before


def test_cells_that_a_study_planned_before_are_kept_and_not_called_reused() -> None:
    """MLflow's tag escala.reused is of cells that another study trained."""
    assert str(Change(new=4, kept=6, dropped=1, done=6, first=False)) == "+4 cells, 6 kept, 1 no longer planned, 6 done"
