"""What a person sees of a run while it goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import TINY, FrontDoor
from rich.console import Console

from analysis.verdicts import Verdict
from cluster import display
from cluster.planning import read_study
from cluster.progress import Progress, Running, Tally, apart_words, ended_words
from sweeps.store import CellState


def test_cells_that_end_are_numbered_and_notes_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    console = display._make_console()
    monkeypatch.setattr(display, "console", console)
    shown = display.LiveProgress()
    with console.capture() as captured:
        for finished, ended, notes in ((0, (), ("one", "two")), (3, ("a", "b"), ("three",))):
            counts = {"finished": finished, "diverged": 0, "failed": 0}
            shown.update(Progress(counts, 9, (), None, 1, None, ended, notes))
    assert captured.get().splitlines() == ["note: one", "note: two", "note: three", "[2/9] a", "[3/9] b"]


def test_a_display_that_shows_nothing_keeps_the_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    console = display._make_console()
    monkeypatch.setattr(display, "console", console)
    counts = {"finished": 1, "diverged": 0, "failed": 0}
    with console.capture() as captured, display.LiveProgress(quiet=True) as shown:
        shown.update(Progress(counts, 9, (), None, 1, None, ("a",), ("a node is closed", "no budget")))
    assert captured.get() == ""
    assert shown.notes == ["a node is closed", "no budget"]


def test_the_json_of_a_run_has_the_notes_that_it_prints_for_people(
    front_door: FrontDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_study(*_: object, watch: Callable[[Progress], None], **__: object) -> Tally:
        watch(Progress({}, 9, (), None, 1, None, (), ("a node is closed",)))
        return Tally(notes=("the search is at an edge",))

    monkeypatch.setattr("cluster.driver.run_study", run_study)
    (tmp_path / "study.yaml").write_text(TINY)
    told = json.loads(front_door("run", tmp_path / "study.yaml", "--store", tmp_path / "s", "--json").out)
    assert told["notes"] == ["a node is closed", "the search is at an edge"]
    assert "warnings" in told


def test_that_ray_starts_is_said_when_it_does(
    front_door: FrontDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that has ended starts nothing, which only its driver finds out."""
    starts = False

    def run_study(*_: object, starting: Callable[[], None], **__: object) -> Tally:
        if starts:
            starting()
        return Tally()

    monkeypatch.setattr("cluster.driver.run_study", run_study)
    (tmp_path / "study.yaml").write_text(TINY)
    assert "starting Ray" not in front_door("run", tmp_path / "study.yaml", "--store", tmp_path / "s").out
    starts = True
    assert "starting Ray and MLflow ..." in front_door("run", tmp_path / "study.yaml", "--store", tmp_path / "s").out


def test_cells_of_one_size_are_told_apart_where_they_end_and_where_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = "vary: {learning_rate: [0.001, 0.002]}\n"
    (tmp_path / "study.yaml").write_text(TINY + rates)
    cells = read_study(str(tmp_path / "study.yaml"), tmp_path / "s", False, False)[1].cells
    ended = [
        ended_words(one, CellState("finished", None, 1, {"val_loss_final": 2.5}), ["learning_rate"]) for one in cells
    ]
    assert len(set(ended)) == len(cells)
    assert all(words.startswith(f"{one.cell.id[:8]} llama N=") for words, one in zip(ended, cells, strict=True))
    assert any(" lr=0.002 seed 1: finished, loss 2.5000" in words for words in ended)
    console = Console(width=80)
    monkeypatch.setattr(display, "console", console)
    running = [
        Running(
            one.cell.id, 123_456_789, apart_words(one, ["learning_rate"]) + add, 4_560_000, 7_890_000, 2.345, 12_345.0
        )
        for one, add in zip(cells[:2], ("", " and much more of what is long here"), strict=True)
    ]
    counts = {"finished": 0, "diverged": 0, "failed": 0, "running": 2}
    shown = display.LiveProgress()
    with console.capture() as captured:
        console.print(shown._picture(Progress(counts, 9, tuple(running), None, 1, None, ()), 0, "ETA unknown yet"))
    rows = captured.get().splitlines()[1:3]
    assert [row.split()[:3] for row in rows] == [
        [one.cell_id[:8], "N=123M", f"lr={rate}"] for one, rate in zip(running, ("0.001", "0.002"), strict=True)
    ]
    assert all(row.rstrip().endswith("58% of 7.89M  loss 2.345  12.3k tokens/s") for row in rows)


def test_what_is_said_of_two_targets_in_the_same_words_is_said_once() -> None:
    words = {"A": "alpha is open.", "alpha": "alpha is open.", "beta": "beta is open."}
    verdicts = [Verdict("not_identifiable", "refuse", "parameter", name, said) for name, said in words.items()]
    console = display._make_console()
    with console.capture() as captured:
        console.print(display.verdict_table(verdicts[:2]))
        console.print(display.verdict_table(verdicts))
    alone, both = captured.get().splitlines()
    assert alone.split() == ["refuse", "not_identifiable:", "alpha", "is", "open."]
    assert both.strip().endswith("alpha is open. Likewise of beta.")


def test_a_bound_that_is_not_known_or_infinite_is_open() -> None:
    assert display.span((2e20, float("inf")), display.flops) == "above 2e20"
    assert display.span((float("nan"), 2e20), display.flops) == "below 2e20"
    assert display.span((float("nan"), float("inf"))) == "-"
