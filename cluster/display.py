"""What a person sees in the terminal: tables, the live progress of a run, a fit."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from cluster.terminal import CONTROL, visible
from sweeps.units import duration, flops, human, plural

_PIPE_COLUMNS = 160


class _Console(Console):
    """A console for text that others may have written: no markup or emoji in it counts, no escape sequence gets out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render(self, *arguments: Any, **named: Any) -> Iterator[Segment]:
        for segment in super().render(*arguments, **named):
            if segment.control is None and CONTROL.search(segment.text):
                segment = Segment(visible(segment.text), segment.style)
            yield segment


def _make_console(stderr: bool = False) -> Console:
    """A pipe has no width of its own: give it room for the widest table."""
    made = _Console(stderr=stderr)
    return made if made.is_terminal else _Console(stderr=stderr, width=_PIPE_COLUMNS)


console = _make_console()
_errors = _make_console(stderr=True)
_COLOURS = {"finished": "green", "running": "cyan", "failed": "red", "diverged": "magenta", "quarantined": "yellow"}
_FOLLOWS = ("steps", "timescale", "D/N", "epochs", "spent")
"""Columns that a narrow terminal goes without, one after the other: they follow from the others."""
_SHORT = {"batch_tokens": "batch", "learning_rate": "lr", "weight_decay": "wd"}
_SHOWN = 200
"""Rows of a table on a terminal."""
_ORDER = {"failed": 0, "running": 1, "diverged": 2, "planned": 3}
"""Of the states, where a table has no room for all cells: what a person looks for first."""


def rows_shown() -> int | None:
    """How many cells a table has room for: all of them in a pipe, where a program may look for some."""
    return _SHOWN if console.is_terminal else None


def cell_table(
    rows: Sequence[Mapping[str, Any]], title: str, width: int = 0, most: int | None = None, rest: str = ""
) -> RenderableType:
    """The cells of a study, one a line; batch and decay where they vary. Of what does not fit into `width` columns,
    those go that follow from others. Of more than `most` cells those that have failed or run are shown; `rest` says
    where the others are."""
    shown = rows if most is None or len(rows) <= most else sorted(rows, key=lambda row: _ORDER.get(row["state"], 4))
    shown = shown[:most]
    families = {row["family"] for row in rows}
    varied = sorted({key for row in rows for key in row["labels"] if key.endswith("_times")})
    varied += [key for key in ("trial", "rung") if any(key in row["labels"] for row in rows)]
    origin = ["spent", "from"] if any(row["trunk"] for row in rows) else []
    batch = ["batch"] if len({row["batch_tokens"] for row in rows}) > 1 else []
    decay = ["wd"] if len({row["weight_decay"] for row in rows}) > 1 else []
    factors = {name: f"{_SHORT.get(given, given)} x" for name in varied if (given := name.removesuffix("_times"))}
    names = ["cell", *(["family"] if len(families) > 1 else []), "N", "D", "C", *origin, "D/N", *batch, "lr", *decay]
    names += [*factors.values(), "timescale", "steps", "epochs", "seed", "loss"]
    names += ["parametrisation"] if len({row["parametrisation"] for row in rows}) > 1 else []
    names += ["time"] if any("seconds_predicted" in row for row in rows) else []
    lines = [_cell_line(row, factors) for row in shown]
    widths = {name: max([len(name), *(cell_len(str(line[name])) for line in lines)]) + 1 for name in [*names, "state"]}
    for name in _FOLLOWS:
        if width and name in names and sum(widths[kept] for kept in [*names, "state"]) > width:
            names.remove(name)
    table = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name in ("cell", "family") else "right", no_wrap=True)
    table.add_column("state", no_wrap=True, overflow="ellipsis")
    for line in lines:
        table.add_row(*(line[name] for name in names), line["state"])
    if len(shown) == len(rows):
        return table
    return Group(table, Text(f"... and {plural(len(rows) - len(shown), 'more cell')}{rest}", style="dim"))


def _cell_line(row: Mapping[str, Any], factors: Mapping[str, str]) -> dict[str, str | Text]:
    """What stands in the columns of a cell, by name."""
    state = Text(row["state"], style=_COLOURS.get(row["state"], ""))
    if row["reason"]:
        state.append(f": {row['reason']}"[:60], style="dim")
    return {
        "cell": row["id"][:8],
        "family": row["family"],
        "N": human(row["N"]),
        "D": human(row["D"]),
        "C": flops(row["C"]),
        "spent": flops(row["C_spent"]),
        "from": f"{row['trunk'][:8]} at {human(row['trunk_tokens'])}" if row["trunk"] else "-",
        "D/N": f"{row['tokens_per_parameter']:.3g}",
        "batch": f"{row['batch_tokens']:,}" if row["batch_tokens"] else "-",
        "lr": f"{row['learning_rate']:.3g}" if row["learning_rate"] else "-",
        "wd": "-" if row["weight_decay"] is None else f"{row['weight_decay']:.3g}",
        **{short: str(row["labels"].get(name, "-")) for name, short in factors.items()},
        "timescale": f"{row['adamw_timescale']:.2g}" if row["adamw_timescale"] else "-",
        "steps": f"{row['steps']:,}" if row["steps"] else "-",
        "epochs": _epochs(row["epochs"]),
        "seed": "-" if row["seed"] is None else str(row["seed"]),
        "loss": f"{row['val_loss_final']:.4f}" if row["val_loss_final"] else "-",
        "parametrisation": row["parametrisation"] or "-",
        "time": duration(row["seconds_predicted"]) if row.get("seconds_predicted") else "-",
        "state": state,
    }


def estimate_lines(found: Any) -> Iterator[RenderableType]:
    """What a plan will take, in a sentence, and why a figure is missing."""
    span, total = found.makespan_seconds, found.worker_seconds
    energy, dollars = found.energy_kwh.value, found.dollars.value
    parts = [
        f"about {duration(span) if span is not None else '-'} on {plural(found.workers, 'worker')}",
        f"{number(total / 3600) if total is not None else '-'} worker-hours",
        f"{number(energy) if energy is not None else '-'} kWh",
        f"${dollars:,.2f}" if dollars is not None else "$ -",
    ]
    yield Text(f"To do: {', '.join(parts)} ({found.kind}, calibrated {found.measured[:10]}).")
    for note in found.notes:
        yield Text(note, style="dim")


def calibration_table(kind: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """What was timed on one kind of worker."""
    table = plain_table(kind, "N", "batch tokens", "step", "forward pass", "tokens/s")
    for row in rows:
        pace = row["batch_tokens"] / row["step_seconds"]
        table.add_row(
            f"{row['family']} {row['precision']}",
            human(row["N"]),
            f"{row['batch_tokens']:,}",
            f"{1000 * row['step_seconds']:.3g} ms",
            f"{1000 * row['forward_seconds']:.3g} ms",
            human(pace),
        )
    return table


def _epochs(epochs: float | None) -> str | Text:
    """More than once through the corpus is marked."""
    if epochs is None:
        return "-"
    return Text(f"{epochs:.2f}!", style="yellow") if epochs > 1 else f"{epochs:.2f}"


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


@contextmanager
def patience(what: str) -> Iterator[None]:
    """A line with a turning wheel, once the work has taken more than two seconds on a terminal."""
    wheel = _errors.status(f"{what} ... (Ctrl-C stops)")
    timer = threading.Timer(2.0, wheel.start)
    if _errors.is_terminal:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if timer.is_alive():
            timer.join()
        wheel.stop()


class LiveProgress:
    """The live display of a run; on a pipe, a line for each cell that ends and one at least every half minute. A quiet
    one shows nothing and keeps the notes."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self.notes: list[str] = []
        """What the run said of no cell."""
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._printed = time.monotonic()
        self._linked = False

    def __enter__(self) -> "LiveProgress":
        return self

    def starting(self) -> None:
        """Something is to do: what a search has left is not known before its journal was read."""
        if not self._quiet and console.is_terminal:
            self._live.start()
            self._live.update(Text("starting Ray and MLflow ..."))
        elif not self._quiet:
            console.print("starting Ray and MLflow ...")

    def __exit__(self, *_: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def update(self, progress: Any) -> None:
        self.notes += progress.notes
        if self._quiet:
            return
        if progress.link and not self._linked:
            self._linked = True
            console.print(f"watch: {progress.link}", markup=False, soft_wrap=True)
        ended = progress.counts["finished"] + progress.counts["diverged"] + progress.counts["failed"]
        before = ended - len(progress.ended) + 1
        eta = f"ETA {duration(progress.eta_seconds)}" if progress.eta_seconds is not None else "ETA unknown yet"
        lines = [f"note: {words}" for words in progress.notes]
        lines += [f"[{n}/{progress.total}] {words}" for n, words in enumerate(progress.ended, before)]
        for line in lines:
            console.print(line)
            self._printed = time.monotonic()
        if self._live.is_started:
            self._live.update(self._picture(progress, ended, eta))
        elif time.monotonic() - self._printed > 30:
            self._printed = time.monotonic()
            console.print(f"[{ended}/{progress.total}] {_words(progress)}; {eta}")

    def _picture(self, progress: Any, ended: int, eta: str) -> RenderableType:
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=40), TextColumn("{task.completed}/{task.total}")
        )
        bar.add_task(f"[bold]{eta}[/]", total=progress.total, completed=ended)
        lines = Table.grid(padding=(0, 2))
        for name in ("cell", "which", "done", "loss", "pace"):
            lines.add_column(no_wrap=name != "which")
        for one in progress.running:
            which = Text(f"N={human(one.N)}{one.apart}", no_wrap=True, overflow="ellipsis")  # what a narrow one cuts
            lines.add_row(
                one.cell_id[:8],
                which,
                f"{one.tokens / one.horizon:4.0%} of {human(one.horizon)}",
                f"loss {one.loss:.3f}" if one.loss else "starting",
                f"{human(one.tokens_per_second)} tokens/s",
            )
        parts: list[RenderableType] = [bar, lines, Text(_words(progress), style="dim")]
        if progress.mirror_fault:
            parts.append(Text(f"MLflow is behind (training goes on): {progress.mirror_fault}", style="yellow"))
        return Group(*parts)


def _words(progress: Any) -> str:
    states = ", ".join(f"{count} {state}" for state, count in progress.counts.items() if count)
    wish = {"pause": "paused: ", "drain": "draining: ", "cancel": "stopping: "}.get(progress.wish, "")
    return f"{wish}{states}; {plural(progress.workers, 'worker')}"


def fit_tables(fit: Any, source: Mapping[str, Any] | None = None) -> Iterator[RenderableType]:
    """A fit as tables: what was read, parameters with intervals, budgets, decisions, verdicts; 80 columns are enough.

    source: of a fit to a table, {"table", "columns", "where"}; columns by their role.
    """
    share = f"{100 * fit.level:g}% interval"
    left_out = f", {len(fit.excluded)} left out" if fit.excluded else ""
    law = "akima" if fit.diagnostics.get("method") == "akima" else fit.law  # budgets too, their minima by splines
    yield Text.assemble((law, "bold"), f" fitted to {fit.n_runs} of {fit.planned} runs{left_out}")
    if source:
        read = ", ".join(f"{k} = {v}" if k != v else k for k, v in source["columns"].items())
        kept = " where " + ", ".join(f"{k} = {v}" for k, v in source["where"].items()) if source["where"] else ""
        yield Text(f"{source['table']}{kept}: {read}", style="dim")
    rest = fit.diagnostics.get("without_worst")  # the fit hangs on a few runs: show both
    table = plain_table("parameter", "value", share, *([f"without the worst {len(rest['cells'])}"] if rest else []))
    held = fit.provenance.get("settings", {}).get("fixed", {})  # given and not found: no interval is its own
    for name, value in fit.params.items():
        other = [number(rest["params"][name])] if rest else []
        known = "held" if name in held else span(fit.intervals.get(name, _NOTHING))
        table.add_row(name, number(value), known, *other)
    yield ""
    yield table
    if fit.budgets:
        table = plain_table("budget C", "N*", share, "D*", "loss")
        for budget in (b for b in fit.budgets if b.accepted):
            n, d = budget.N, budget.D
            table.add_row(
                flops(budget.C), _amount(n.value), span(n.interval, _amount), _amount(d.value),
                number(budget.loss.value),
            )  # fmt: skip
        yield ""
        yield table
        if refused := [flops(b.C) for b in fit.budgets if not b.accepted]:
            yield Text(f"no minimum accepted at {_few(refused)} (of {len(fit.budgets)} budgets)", style="dim")
    estimates = {k: v for k, v in fit.decisions.items() if hasattr(v, "interval")}
    if estimates:
        table = plain_table("decision", "value", share)
        for name, estimate in estimates.items():
            table.add_row(name, number(estimate.value), span(estimate.interval))
        yield ""
        yield table
    for target in fit.decisions.get("targets", []):
        beyond = target.get("extrapolation", 1.0)
        far = f" ({beyond:.3g} times the dearest run)" if beyond > 1.0 else ""
        yield ""
        yield _answers(f"at C = {flops(target['C'])}{far}", target, share)
    for wanted in fit.decisions.get("losses", []):
        yield ""
        yield _answers(f"for a loss of {wanted['loss']:g}", wanted, share)
    if fit.excluded or fit.verdicts:
        yield ""
    if fit.excluded:
        yield _left_out(fit.excluded)
    if fit.verdicts:
        yield verdict_table(fit.verdicts)


def verdict_table(verdicts: Sequence[Any]) -> Table:
    """One row a kind: the first of many budgets' verdicts speaks for the others, which are counted. What is said of two
    targets in the same words, as of A and alpha, is said once."""
    kinds: dict[tuple[str, str], list[Any]] = {}
    said: dict[str, Any] = {}
    for verdict in verdicts:
        said.setdefault(verdict.message, verdict)
    for verdict in said.values():
        kinds.setdefault((verdict.severity, verdict.code), []).append(verdict)
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for (severity, code), (first, *others) in kinds.items():
        colour = {"refuse": "red", "caution": "yellow"}.get(severity, "dim")
        named = list(dict.fromkeys(str(v.target) for v in others if v.target != first.target))
        more = f" Likewise of {_few(named)}." if named else f" (and {len(others)} more like it)" if others else ""
        table.add_row(Text(severity, style=colour), Text(f"{code}: {first.message}{more}"))
    return table


def plain_table(*names: str) -> Table:
    """A table without lines; the first column stands to the left unless it is of budgets, the others to the right."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for order, name in enumerate(names):
        table.add_column(name, justify="right" if order or name.startswith("budget") else "left", no_wrap=True)
    return table


def _answers(title: str, entry: Mapping[str, Any], share: str) -> Table:
    """The estimates of one decision, each on a line; a nest of them (the regret of sizes) is indented."""
    names = {"tokens_per_parameter": "D/N", "regret": "loss lost at a size of"}
    table = plain_table(title, "value", share)
    for name, value in entry.items():
        if hasattr(value, "interval"):
            write = _amount if name in ("N", "D") else _compute if name == "C" else number
            table.add_row(f"  {names.get(name, name)}", write(value.value), span(value.interval, write))
        elif isinstance(value, Mapping):
            for times, estimate in value.items():
                lost = f"  {names.get(name, name)} {times} N*"
                table.add_row(lost, number(estimate.value), span(estimate.interval))
    return table


def _left_out(excluded: Sequence[Mapping[str, str]]) -> RenderableType:
    """Each reason once, with how many cells it took and the first of them."""
    by_reason: dict[str, list[str]] = {}
    for one in excluded:
        by_reason.setdefault(one["reason"], []).append(one["cell"])
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for reason, cells in by_reason.items():
        table.add_row("left out", Text(f"{len(cells)}: {reason} ({_few(cells)})"))
    return table


def _few(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


_NOTHING = (float("nan"), float("nan"))


def _amount(value: float) -> str:
    return "-" if value != value else human(value)


def _compute(value: float) -> str:
    return "-" if value != value else flops(value)


def number(value: float) -> str:
    """Four digits; a dash for NaN."""
    return "-" if value != value else f"{value:,.4g}"


def span(interval: Any, write: Callable[[float], str] = number) -> str:
    """An interval (low, high) in words; a bound that is NaN or infinite is open."""
    low, high = (write(bound) if math.isfinite(bound) else "-" for bound in interval)
    if "-" in (low, high):
        return "-" if low == high else f"above {low}" if high == "-" else f"below {high}"
    return f"{low} .. {high}"
