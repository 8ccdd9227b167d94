"""What a person sees in the terminal: tables, the live progress of a run, a fit."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sweeps.units import duration, flops, human

_PIPE_COLUMNS = 160


def _make_console(stderr: bool = False) -> Console:
    """A pipe has no width of its own: give it room for the widest table."""
    made = Console(highlight=False, stderr=stderr)
    return made if made.is_terminal else Console(highlight=False, stderr=stderr, width=_PIPE_COLUMNS)


console = _make_console()
_errors = _make_console(stderr=True)
_COLOURS = {"finished": "green", "running": "cyan", "failed": "red", "diverged": "magenta", "quarantined": "yellow"}
_SHOWN = 200
"""Rows of a table on a terminal; --json prints all."""


def cell_table(rows: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """The cells of a study, one a line."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 1, 0, 0))
    families = {row["family"] for row in rows}
    varied = sorted({key for row in rows for key in row["labels"] if key.endswith("_times")})
    for name in ("cell", *(["family"] if len(families) > 1 else [])):
        table.add_column(name, no_wrap=True)
    for name in ("N", "D", "C", "D/N", "lr", *varied, "timescale", "steps", "epochs", "seed", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for row in rows[:_SHOWN]:
        state = Text(row["state"], style=_COLOURS.get(row["state"], ""))
        if row["reason"]:
            state.append(f": {row['reason']}"[:60], style="dim")
        table.add_row(
            row["id"][:8],
            *([row["family"]] if len(families) > 1 else []),
            human(row["N"]),
            human(row["D"]),
            flops(row["C"]),
            f"{row['tokens_per_parameter']:.3g}",
            f"{row['learning_rate']:.3g}",
            *(str(row["labels"].get(name, "-")) for name in varied),
            f"{row['adamw_timescale']:.2g}" if row["adamw_timescale"] else "-",
            f"{row['steps']:,}",
            Text(f"{row['epochs']:.2f}!", style="yellow") if row["epochs"] > 1 else f"{row['epochs']:.2f}",
            str(row["seed"]),
            f"{row['val_loss_final']:.4f}" if row["val_loss_final"] else "-",
            state,
        )
    if len(rows) <= _SHOWN:
        return table
    return Group(table, Text(f"... and {len(rows) - _SHOWN:,} more cells; --json prints all", style="dim"))


class Waiting:
    """A line of progress for work that is not training, shown once it has taken more than a second."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._since = time.monotonic()

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, what: str, done: float) -> None:
        if self._live is None and time.monotonic() - self._since > 1 and _errors.is_terminal:
            self._live = Live(console=_errors, transient=True)
            self._live.start()
        if self._live:
            self._live.update(Text(f"{what} {done:.0%}"))


class LiveProgress:
    """The live display of a run; on a pipe, a line for each cell that ends and one at least every half minute."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._printed = time.monotonic()

    def __enter__(self) -> "LiveProgress":
        if not self._quiet and console.is_terminal:
            self._live.start()
            self._live.update(Text("starting Ray and MLflow ..."))
        elif not self._quiet:
            console.print("starting Ray and MLflow ...")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def update(self, progress: Any) -> None:
        if self._quiet:
            return
        ended = progress.counts["finished"] + progress.counts["diverged"] + progress.counts["failed"]
        eta = f"ETA {duration(progress.eta_seconds)}" if progress.eta_seconds is not None else "ETA unknown yet"
        for order, words in enumerate(progress.ended, ended - len(progress.ended) + 1):
            console.print(f"[{order}/{progress.total}] {words}", markup=False)
            self._printed = time.monotonic()
        if self._live.is_started:
            self._live.update(self._picture(progress, ended, eta))
        elif time.monotonic() - self._printed > 30:
            self._printed = time.monotonic()
            console.print(f"[{ended}/{progress.total}] {_words(progress)}; {eta}", markup=False)

    def _picture(self, progress: Any, ended: int, eta: str) -> RenderableType:
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=40), TextColumn("{task.completed}/{task.total}")
        )
        bar.add_task(f"[bold]{eta}[/]", total=progress.total, completed=ended)
        lines = Table.grid(padding=(0, 2))
        for one in progress.running:
            lines.add_row(
                f"  N={human(one.N)}",
                f"{one.tokens / one.horizon:4.0%} of {human(one.horizon)} tokens",
                f"loss {one.loss:.3f}" if one.loss else "starting",
                f"{human(one.tokens_per_second)} tokens/s",
            )
        parts: list[RenderableType] = [bar, lines, Text(_words(progress), style="dim")]
        if progress.mirror_fault:
            parts.append(Text(f"MLflow is behind (training goes on): {progress.mirror_fault}", style="yellow"))
        return Group(*parts)


def _words(progress: Any) -> str:
    states = ", ".join(f"{count} {state}" for state, count in progress.counts.items() if count)
    return f"{states}; {progress.workers} workers"


def fit_tables(fit: Any) -> Iterator[RenderableType]:
    """A fit as tables: parameters with intervals, budgets, the optimum at each target, verdicts."""
    yield f"[bold]{fit.law}[/] fitted to {fit.n_runs} runs ({fit.planned} planned, {fit.finished} finished)"
    table = Table(box=None, header_style="bold")
    level = f"{100 * fit.level:g} % interval"
    for name in ("parameter", "value", level):
        table.add_column(name, justify="left" if name == "parameter" else "right")
    for name, value in fit.params.items():
        table.add_row(name, _number(value), _range(fit.intervals.get(name, (float("nan"), float("nan")))))
    yield table
    if fit.budgets:
        table = Table(box=None, header_style="bold")
        for name in ("budget C", "N*", level, "D*", "loss", "accepted"):
            table.add_column(name, justify="right")
        for budget in fit.budgets:
            n, d = budget.N, budget.D
            table.add_row(
                flops(budget.C), _number(n.value), _range(n.interval), _number(d.value), _number(budget.loss.value),
                "yes" if budget.accepted else "no",
            )  # fmt: skip
        yield table
    yield from _decisions(fit.decisions, level)
    if fit.excluded:
        yield f"left out: {len(fit.excluded)} cells"
        for one in fit.excluded[:10]:
            yield f"  {one['cell']}: {one['reason']}"
    for verdict in fit.verdicts:
        colour = {"refuse": "red", "caution": "yellow"}.get(verdict.severity, "dim")
        yield f"[{colour}]{verdict.severity}[/] {verdict.code}: {verdict.message}"


def _decisions(decisions: Mapping[str, Any], level: str) -> Iterator[RenderableType]:
    """The best split at each compute asked for, the price of a wrong size, and the compute that a loss needs."""
    for target in decisions.get("targets", []):
        yield f"at {flops(target['C'])} FLOPs, {target.get('extrapolation', float('nan')):.3g} times the dearest run:"
        table = Table(box=None, header_style="bold")
        for name in ("", "best", level):
            table.add_column(name, justify="right" if name else "left")
        words = {"N": "parameters", "D": "tokens", "loss": "loss", "tokens_per_parameter": "tokens per parameter"}
        for key, label in words.items():
            if key in target:
                table.add_row(label, _number(target[key].value), _range(target[key].interval))
        for factor, cost in target.get("regret", {}).items():
            table.add_row(f"loss added by a model {factor} x as big", _number(cost.value), _range(cost.interval))
        yield table
    for entry in decisions.get("losses", []):
        least = entry["C"]
        yield f"a loss of {entry['loss']:g} needs {_number(least.value)} FLOPs ({level}: {_range(least.interval)})"


def _number(value: float) -> str:
    return "-" if value != value else f"{value:,.4g}"


def _range(interval: Any) -> str:
    low, high = (_number(bound) for bound in interval)
    if "-" in (low, high):
        return "-" if low == high else f"above {low}" if high == "-" else f"below {high}"
    return f"{low} .. {high}"
