"""Runs the benchmarks and prints each figure beside its target. A slow machine is no failure, only a figure; the exit
code is 1 where something that is measured does not work.

python tests/benchmarks/run.py [--json] [--only NAME]
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import calibration
import cells
import commands
import compare
import coverage
import eager
import fits
import mirror
import overhead
import postgres
import searching
import sensitivity
import stalls
import step
import submit
import together
import transfer
from measuring import Place, Row
from rich.console import Console
from rich.table import Table

BENCHMARKS = {
    "help": commands.help_text,
    "tokenise": commands.tokenise,
    "plan": commands.plan,
    "finished": commands.finished,
    "light": commands.light,
    "cells": cells.run,
    "step": step.step,
    "eager": eager.eager,
    "calibration": calibration.calibration,
    "stacks": together.stacks,
    "fidelity": together.fidelity,
    "trunks": together.trunks,
    "workers": together.workers,
    "fits": fits.fits,
    "coverage": coverage.coverage,
    "sensitivity": sensitivity.run,
    "compare": compare.run,
    "transfer": transfer.transfer,
    "mirror": mirror.mirror,
    "postgres": postgres.shared,
    "overhead": overhead.overhead,
    "search": searching.search,
    "logging": stalls.logging,
    "checkpoints": stalls.checkpoints,
    "submit": submit.submit,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure Escala. Targets are for a laptop with two free cores.")
    parser.add_argument("--only", choices=BENCHMARKS, metavar="NAME", help=f"One of {', '.join(BENCHMARKS)}.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    arguments = parser.parse_args()
    began = time.monotonic()
    rows: list[Row] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="escala-bench-") as folder:
        place = Place(Path(folder))
        for name in [arguments.only] if arguments.only else BENCHMARKS:
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                rows += BENCHMARKS[name](place)
            except RuntimeError as error:
                failed.append(name)
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began
    if arguments.json:
        plain = [{**vars(row), "ratio": row.ratio, "met": row.met} for row in rows]
        print(json.dumps({"machine": machine(), "seconds": round(seconds, 1), "rows": plain, "failed": failed}))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 100
        console.print(table(rows))
        console.print(f"{machine()}. {seconds:.0f} s in all.", style="dim")
    sys.exit(1 if failed else 0)


def table(rows: list[Row]) -> Table:
    made = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    made.add_column("what")
    for name in ("measured", "target", "ratio"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("note", style="dim")
    for row in rows:
        bound = "" if row.ratio is None else "> " if row.at_least else "< "
        target = "-" if row.target is None else bound + _figure(row.target, row.unit)
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        style = "yellow" if row.met is False else ""
        made.add_row(row.what, _figure(row.measured, row.unit), target, ratio, row.note, style=style)
    return made


def _figure(value: float | bool, unit: str) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:.3g} {unit}"


def machine() -> str:
    """What the figures hold for: processor, cores, how busy they were, versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
