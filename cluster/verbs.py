"""The verbs that see and steer a study while it runs, from any terminal or node that sees its store.

They read and write the store's files alone and never talk to the driver's process, so they work whether one lives or
not. `escala.py` puts them on the command line. Imports are inside the commands: `escala --help` loads this file.
"""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.arguments import (
    DEFAULT_STORE,
    CellArgument,
    JsonOption,
    StoreOption,
    StudyArgument,
    TrackingOption,
    existing_store,
    find_cell,
    study_name,
)
from cluster.terminal import say

if TYPE_CHECKING:
    from sweeps.store import Store

app = typer.Typer()
STEER = "See and steer"
"""The panel of these commands in `escala --help`."""


@app.command(rich_help_panel=STEER)
def status(
    study: Annotated[
        str | None, typer.Argument(help="A study file or name. Default: the studies of the store, in short.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw it anew every 2 s, until nothing is left to do.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every cell also on a terminal, however many there are.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """The state of every cell of a study, with its reason, as the store's files tell it; what runs, how far it is.

    Without a study: those of the store, how many of their cells are in which state, and who drives them.
    """
    from cluster.control import read_pause
    from cluster.ledger import count_states, sharing
    from cluster.watching import driver_of, status_rows, study_rows
    from sweeps.errors import InputError
    from sweeps.summary import search_summary

    if watch and everything:
        raise InputError("--watch shows what fits the screen; for all cells ask without it.")
    if watch and as_json:
        raise InputError("--watch draws for people; for JSON ask again and again without it.")
    if watch and study is None:
        raise InputError("--watch shows one study: name it.")
    place = existing_store(store)
    if study is None:
        studies = study_rows(place)
        if as_json:
            print(json.dumps({"studies": studies}))
        elif studies:
            from cluster.display import console
            from cluster.overview import study_table

            console.print(study_table(studies))
        else:
            say(f"the store {place.root} has no study yet.")
        return
    name = study_name(study, place)
    if watch:
        from cluster.overview import watch_study

        watch_study(place, name)
        return
    rows = status_rows(place, name)
    searched = search_summary(place, name, rows)
    stands = read_pause(place, name)
    paused = None if stands is None else str(stands)
    driver = driver_of(place, name)
    if as_json:
        told = {"study": name, "counts": count_states(rows), "paused": paused, **driver, "shared": sharing(rows)}
        print(json.dumps(told | {"search": searched, "cells": rows}))
        return
    from cluster.display import console, rows_shown
    from cluster.overview import driver_words, study_picture

    most = None if everything else rows_shown()
    console.print(study_picture(rows, name, most, " that are not shown; --all shows them", searched))
    console.print(driver_words(driver))
    if paused:
        console.print(f"{paused}; go on with: escala resume {name}")


@app.command(rich_help_panel=STEER)
def logs(
    cell: CellArgument,
    store: StoreOption = DEFAULT_STORE,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new rows until the cell ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """A cell's metric rows, and the traceback of an attempt that failed. With --follow, JSON is one row a line."""
    from cluster import watching
    from sweeps.store import read_metrics

    place = existing_store(store)
    cell_id = find_cell(cell, place)
    if follow:
        shown = False
        try:
            for row in watching.follow(place, cell_id):
                shown = True
                if as_json:
                    print(json.dumps(row), flush=True)
                else:
                    say(_log_line(row))
        except KeyboardInterrupt:
            if not as_json:
                say()
            return
        if not shown and not as_json:
            say(_nothing_logged(place, cell_id))
        return
    rows = read_metrics(place, cell_id) + watching.failures(place, cell_id)
    if as_json:
        print(json.dumps(rows))
        return
    if rows:
        say("\n".join(map(_log_line, rows)))
    else:
        say(_nothing_logged(place, cell_id))


def _nothing_logged(store: "Store", cell_id: str) -> str:
    from sweeps.store import cell_state

    return f"{cell_id} is {cell_state(store, cell_id).state} and has logged nothing."


def _log_line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"\nattempt {row['attempt']} failed:\n{row['error']}"
    return f"{row['tokens']:>14,}  " + "  ".join(f"{key} {value:.5g}" for key, value in row["metrics"].items())


@app.command(rich_help_panel=STEER)
def why(
    cell: CellArgument,
    other: Annotated[str | None, typer.Argument(help="Another cell's id, or its beginning.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Which fields make two cells differ; of one: how it came to its state, and what sets it off from the nearest."""
    from cluster.watching import explain, explain_lines
    from sweeps.cell import differences
    from sweeps.store import read_cell

    place = existing_store(store)
    if other is None:
        told = explain(place, find_cell(cell, place))
        if as_json:
            print(json.dumps(told))
        else:
            say("\n".join(explain_lines(told)))
        return
    one, two = (read_cell(place, find_cell(name, place))["identity"] for name in (cell, other))
    found = list(differences(one, two))
    if as_json:
        print(json.dumps([{"field": name, "one": a, "other": b} for name, a, b in found]))
        return
    say("\n".join(f"{name}: {a!r} -> {b!r}" for name, a, b in found) or "the same cell")


@app.command(rich_help_panel=STEER)
def pause(study: StudyArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Stop the cells that run, each with a checkpoint, and start none until `resume`. The driver waits."""
    from cluster import control

    place = existing_store(store)
    name = study_name(study, place)
    control.pause(place, name)
    end = control.read_ending(place, name)
    cells = f"it is {end} too, so its driver ends first" if end else "its cells keep checkpoints and stop"
    say(f"{name} is paused; {cells}. Go on with: escala resume {name}")


@app.command(rich_help_panel=STEER)
def resume(study: StudyArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Lift a pause. A driver that waits goes on; where none is left, or it is cancelled, run the study again."""
    from cluster import control

    place = existing_store(store)
    name = study_name(study, place)
    driven = control.resume(place, name)
    if driven:
        say(f"{name} goes on.")
    elif end := control.read_ending(place, name):
        say(f"{name} is no longer paused, but its driver ends: {end}. Run it again after that.")
    else:
        say(f"{name} is no longer paused. No driver waits: run it again.")


@app.command(rich_help_panel=STEER)
def cancel(
    study: StudyArgument,
    now: Annotated[bool, typer.Option("--now", help="Stop the cells that run, each with a checkpoint.")] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """End the driver of a study when the cells that run have ended, or --now. Run the study again to go on."""
    from cluster import control

    place = existing_store(store)
    name = study_name(study, place)
    holds = control.cancel(place, name, now=now).wish
    still = f" It stays paused: escala resume {name} lifts that." if control.read_pause(place, name) else ""
    what = "keep a checkpoint and stop" if holds == "cancel" else "end, and no other starts"
    say(f"{name}: the cells that run {what}.{still}")


@app.command(rich_help_panel=STEER)
def retry(
    cell: Annotated[str | None, typer.Argument(help="A failed cell's id, or the beginning of it.")] = None,
    failed: Annotated[
        str | None, typer.Option("--failed", metavar="STUDY", help="All failed cells of a study.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Give failed cells their attempts back. A driver at work tries them again by itself; else run the study."""
    from cluster.control import person
    from sweeps.errors import InputError
    from sweeps.store import cell_state, forgive, read_plan

    place = existing_store(store)
    if (cell is None) == (failed is None):
        raise InputError("name either a cell or --failed STUDY.")
    if failed is not None:
        name = study_name(failed, place)
        cells = [entry["id"] for entry in read_plan(place, name)["cells"]]
        cells = [one for one in cells if cell_state(place, one).state == "failed"]
        if not cells:
            raise InputError(f"study {name} has no failed cell.")
    else:
        cells = [find_cell(str(cell), place)]
        state = cell_state(place, cells[0])
        if state.state != "failed":
            why_not = "diverged is a result, not a failure: change the recipe" if state.state == "diverged" else ""
            raise InputError(
                f"cell {cells[0]} has not failed: it is {state.state}" + (f" ({why_not})." if why_not else ".")
            )
    for one in cells:
        forgive(place, one, person())
        say(f"{one} will be tried again")


QuarantineStudy = Annotated[
    str | None, typer.Option("--study", help="Only in this study. Default: in every study that plans the cell.")
]


@app.command(rich_help_panel=STEER)
def quarantine(
    cell: CellArgument,
    reason: Annotated[str, typer.Option(help="Why, for everyone who reads a fit.")],
    study: QuarantineStudy = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Take a cell out of every fit, with a reason. The cell stays; MLflow shows it at the next sync."""
    from cluster.control import person
    from sweeps.errors import InputError
    from sweeps.store import quarantine_cell

    place = existing_store(store)
    if not reason.strip():
        raise InputError("--reason: say why, in words; a quarantine without a reason helps nobody.")
    cell_id = find_cell(cell, place)
    for name in _planning(place, cell_id, study):
        quarantine_cell(place, name, cell_id, " ".join(reason.split()), person())
        say(f"{cell_id} is in quarantine in {name}")


@app.command(rich_help_panel=STEER)
def unquarantine(cell: CellArgument, study: QuarantineStudy = None, store: StoreOption = DEFAULT_STORE) -> None:
    """Let fits use a cell again."""
    from sweeps.errors import InputError
    from sweeps.store import read_quarantine, release_cell

    place = existing_store(store)
    cell_id = find_cell(cell, place)
    held = [name for name in _planning(place, cell_id, study) if cell_id in read_quarantine(place, name)]
    if not held:
        raise InputError(f"cell {cell_id} is not in quarantine" + (f" in {study}." if study else "."))
    for name in held:
        release_cell(place, name, cell_id)
        say(f"{cell_id} is no longer in quarantine in {name}")


def _planning(store: "Store", cell_id: str, study: str | None) -> list[str]:
    """The studies that plan a cell, or the one that was named."""
    from cluster.watching import planning_studies
    from sweeps.errors import InputError

    plans = sorted(planning_studies(store, [cell_id])[cell_id])
    if study is None:
        if not plans:
            raise InputError(f"no study of {store.root} plans the cell {cell_id} any more, so no fit uses it.")
        return plans
    name = study_name(study, store)
    if name not in plans:
        raise InputError(f"study {name} does not plan the cell {cell_id} (planned by: {', '.join(plans) or 'none'}).")
    return [name]


@app.command(rich_help_panel=STEER)
def sync(
    study: StudyArgument,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingOption = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make every run in MLflow anew from the store and delete the old ones.")
    ] = False,
) -> None:
    """Bring MLflow up to date from the store's files, and read quarantine tags back from it."""
    import sys

    from cluster.display import Waiting
    from cluster.parent import left_outside
    from cluster.sync import mirrored_by, sync_study

    place = existing_store(store)
    with Waiting() as waiting:
        name = study_name(study, place)
        driver = None if rebuild else mirrored_by(place, name)
        fault = sync_study(place, name, tracking_uri, rebuild=rebuild, progress=waiting.update)
    if fault:
        say(f"not all of it got through: {fault}. Nothing is lost: sync again.", file=sys.stderr)
        raise typer.Exit(1)
    if driver:
        say(f"{name}: {driver} mirrors it, and tells what does not get through. Nothing was sent.")
    else:
        say(f"{name}: MLflow is up to date.")
    if note := left_outside(place, name):
        say(note)


@app.command(rich_help_panel=STEER)
def gc(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this kind: checkpoints, leftovers, cells, corpora or trunks. Repeatable."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """What of the store may go, and what it frees; asks first. Results and logs of planned cells always stay.

    Trunks go by --only trunks alone, when all planned cells that share them have ended: a longer or shorter cell that
    is planned later then trains its past again.
    """
    import sys

    from cluster.garbage import BY_DEFAULT, collectable, remove
    from cluster.overview import garbage_picture

    place = existing_store(store)
    items = collectable(place, only or BY_DEFAULT)
    listed = [{"kind": item.kind, "path": str(item.path.relative_to(place.root)), "bytes": item.size} for item in items]
    if as_json:
        freed, kept = remove(place, items) if yes else (0, [])
        total = sum(item.size for item in items)
        told = {"items": listed, "bytes": total, "removed": yes, "freed": freed}
        print(json.dumps(told | {"kept": [str(item.path.relative_to(place.root)) for item in kept]}))
        return
    from cluster.display import console

    if not items:
        say("nothing to remove.")
        return
    console.print(garbage_picture(listed))
    if not yes and not sys.stdin.isatty():
        say("nothing was removed: pass --yes to remove it.")
        return
    if yes or typer.confirm("Remove all of this?"):
        freed, kept = remove(place, items)
        for item in kept:
            say(f"kept {item.path.relative_to(place.root)}: it is planned again, or in use, since this was listed.")
        say(f"{freed:,} bytes freed.")
    else:
        say("nothing was removed.")
