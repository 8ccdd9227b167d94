"""The verbs that see and steer a study while it runs, from any terminal or node that sees its store.

They read and write the store's files alone and never talk to the driver's process, so they work whether one lives or
not. `escala.py` puts them on the command line. Imports are inside the commands: `escala --help` loads this file.
"""

import json
from typing import Annotated

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

app = typer.Typer()
STEER = "See and steer"
"""The panel of these commands in `escala --help`."""


@app.command(rich_help_panel=STEER)
def status(study: StudyArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """The state of every cell of a study, with its reason, as the store's files tell it."""
    from cluster.ledger import count_states, ledger_rows

    place = existing_store(store)
    name = study_name(study, place)
    rows = ledger_rows(place, name)
    if as_json:
        print(json.dumps({"study": name, "counts": count_states(rows), "cells": rows}))
        return
    from cluster.display import cell_table, console

    console.print(cell_table(rows, title=name))
    console.print(", ".join(f"{count} {state}" for state, count in count_states(rows).items()))


@app.command(rich_help_panel=STEER)
def logs(
    cell: CellArgument,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """A cell's metric rows, and the traceback of an attempt that failed."""
    from sweeps.store import attempt_epochs, read_metrics

    place = existing_store(store)
    cell_id = find_cell(cell, place)
    rows = read_metrics(place, cell_id)
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['tokens']:>14,}  " + "  ".join(f"{key} {value:.5g}" for key, value in row["metrics"].items()))
    for epoch in attempt_epochs(place, cell_id):
        error = place.attempt(cell_id, epoch) / "error.txt"
        if error.exists():
            print(f"\nattempt {epoch} failed:\n{error.read_text()}")


@app.command(rich_help_panel=STEER)
def why(
    cell: CellArgument,
    other: Annotated[str, typer.Argument(help="Another cell's.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Which fields make two cells differ."""
    from sweeps.cell import differences
    from sweeps.store import read_cell

    place = existing_store(store)
    one, two = (read_cell(place, find_cell(name, place))["identity"] for name in (cell, other))
    found = list(differences(one, two))
    if as_json:
        print(json.dumps([{"field": name, "one": a, "other": b} for name, a, b in found]))
        return
    print("\n".join(f"{name}: {a!r} -> {b!r}" for name, a, b in found) or "the same cell")


@app.command(rich_help_panel=STEER)
def sync(study: StudyArgument, store: StoreOption = DEFAULT_STORE, tracking_uri: TrackingOption = None) -> None:
    """Bring MLflow up to date from the store's files, and read quarantine tags back from it."""
    from cluster.mirror import Mirror

    place = existing_store(store)
    mirror = Mirror(place, study_name(study, place), tracking_uri)
    mirror.connect()
    mirror.sync()
    mirror.pull_quarantine()
