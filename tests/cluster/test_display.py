"""What a person sees of a run while it goes on."""

import pytest

from cluster import display
from cluster.progress import Progress


def test_cells_that_end_are_numbered_and_notes_between_them_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    console = display._make_console()
    monkeypatch.setattr(display, "console", console)
    shown = display.LiveProgress()
    with console.capture() as captured:
        for finished, ended in ((0, ("note: one", "note: two")), (3, ("a", "note: three", "b"))):
            counts = {"finished": finished, "diverged": 0, "failed": 0}
            shown.update(Progress(counts, 9, (), None, 1, None, ended))
    assert captured.get().splitlines() == ["note: one", "note: two", "[2/9] a", "note: three", "[3/9] b"]
