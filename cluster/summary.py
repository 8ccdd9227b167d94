"""What `plan` and `run` tell of a study as a whole: its totals, what is doubtful about it, what a run did with it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.text import Text

from cluster.display import console
from cluster.ledger import expected_branches, ledger_rows, plan_rows, sharing, sharing_words
from cluster.progress import Tally
from sweeps.grids import Plan
from sweeps.store import Store
from sweeps.summary import search_summary, summary_lines
from sweeps.units import duration

ENDED = ("finished", "diverged")
"""States of cells that are not trained again."""


def plan_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the cells of a plan: how many, their FLOPs and tokens, and what is missing."""
    missing = [row for row in rows if row["state"] not in ENDED]
    return {
        "cells": len(rows),
        "missing": len(missing),
        "C": sum(row["C"] for row in rows),
        "C_missing": sum(row["C_spent"] for row in missing),
        "C_spent": sum(row["C_spent"] for row in rows),
        "D": sum(row["D"] for row in rows),
    }


def print_warnings(warnings: Iterable[str]) -> None:
    """What is doubtful about a plan, a line each."""
    for warning in warnings:
        console.print(Text.assemble(("note:", "yellow"), f" {warning}"))


def print_run(place: Store, planned: Plan, tally: Tally) -> None:
    """What a run did, what it could not do, and where to look now."""
    study = planned.study.name
    if tally.skipped == len(planned.cells):
        ended = {0: "", 1: ": its only cell has ended already"}
        console.print(f"nothing to train{ended.get(tally.skipped, f': all {tally.skipped} cells have ended already')}.")
    else:
        before = "was" if tally.skipped == 1 else "were"
        left = f", {tally.planned} still to do" if tally.planned else ""
        console.print(
            f"{tally.finished} finished, {tally.diverged} diverged, {len(tally.failed)} failed, "
            f"{tally.skipped} {before} done before{left}, in {duration(tally.seconds)}."
        )
    if planned.branches and (shared := sharing(plan_rows(place, planned, expected_branches(place, planned)))):
        console.print(f"{sharing_words(shared)}.")
    for line in (
        line for one in search_summary(place, study, ledger_rows(place, study)) for line in summary_lines(one)
    ):
        console.print(line)
    for cell_id, reason in tally.failed.items():
        console.print(Text.assemble(("failed", "red"), f" {cell_id}: {reason}  (escala logs {cell_id})"))
    if tally.failed:
        console.print(f"failed cells are not tried again by themselves: escala retry --failed {study}, then run again.")
    for note in tally.notes:
        console.print(f"note: {note}")
    if tally.stopped:
        console.print(f"{tally.stopped.removesuffix('.')}. What was done is kept; the same command goes on from there.")
    if tally.mirror_fault:
        told = f" {tally.mirror_fault}. `escala sync {study}` sends what is missing."
        console.print(Text.assemble(("MLflow is behind:", "yellow"), told))
    console.print(f"look: escala fit {study} | escala report {study} | escala ui {study}   (store: {place.root})")
