"""`escala status` as a person sees it: a table that fits 80 columns, once or drawn anew while the study runs."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.control import read_pause, read_wish
from cluster.display import cell_table, console, plain_table
from cluster.ledger import count_states, sharing, sharing_words
from cluster.terminal import visible
from cluster.watching import driver_of, status_rows
from sweeps.store import Store
from sweeps.summary import search_summary, summary_lines
from sweeps.units import duration, human

WATCH_SECONDS = 2.0


def study_picture(
    rows: list[dict[str, Any]],
    name: str,
    most: int | None = None,
    rest: str = "",
    searched: Sequence[Mapping[str, Any]] = (),
) -> RenderableType:
    """The cells, or `most` of them and where the `rest` is; then those that run with how far they are, then the counts
    of all. searched: the summary of a search (sweeps/summary.py)."""
    parts: list[RenderableType] = [cell_table(rows, name, console.width, most, rest)]
    if running := [row for row in rows if row["progress"]]:
        parts += [Text(), running_table(running[:most])]
    ends = _sum_of(rows)
    counts = ", ".join(f"{count} {state}" for state, count in count_states(rows).items())
    told = ", ".join(f"{count} {kind}" for kind, count in ends.items())
    parts.append(Text(counts + (f"   (attempts that failed: {told})" if told else "")))
    if shared := sharing(rows):
        parts.append(Text(f"{sharing_words(shared)}."))
    parts += [Text(line) for one in searched for line in summary_lines(one)]
    changed = [row for row in rows if row["numerics"]]
    parts += [Text(f"{row['id'][:8]} other numerics since {row['numerics']}") for row in changed[:most]]
    return Group(*parts)


def study_table(studies: Sequence[Mapping[str, Any]]) -> Table:
    """The studies of a store, as `study_rows` tells them: their cells by state, and who drives them."""
    states = ["finished", "failed", "running", "planned"]
    states += [one for one in ("diverged", "quarantined") if any(one in study["counts"] for study in studies)]
    table = plain_table("study", "cells", *states)
    table.add_column("driver", overflow="ellipsis", no_wrap=True)
    for study in studies:
        driver = driver_words(study) if study["driver"] else "-"
        counts = (study["cells"], *(study["counts"].get(one, 0) for one in states))
        table.add_row(study["study"], *(f"{count:,}" for count in counts), driver + ", paused" * bool(study["paused"]))
    return table


def running_table(rows: list[dict[str, Any]]) -> Table:
    """What runs: how far, how fast, how long silent, where, and how earlier attempts ended."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("running", no_wrap=True)
    for name in ("tokens", "done", "loss", "tokens/s", "silent"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("host", no_wrap=True, overflow="ellipsis")
    table.add_column("earlier attempts", overflow="ellipsis", no_wrap=True)
    for row in rows:
        now = row["progress"]
        table.add_row(
            row["id"][:8],
            f"{human(now['tokens'])}/{human(now['horizon'])}",
            f"{now['tokens'] / now['horizon']:.0%}",
            f"{now['loss']:.3f}" if now["loss"] else "-",
            human(now["tokens_per_second"]) if now["tokens_per_second"] else "-",
            duration(now["silent_seconds"]),
            row["host"] or "-",
            ", ".join(f"{count} {kind}" for kind, count in row["ends"].items()) or "-",
        )
    return table


def driver_words(told: Mapping[str, Any]) -> str:
    """Who drives a study and when it expects to be done, as `driver_of` tells."""
    if told["driver"] is None:
        return "no driver runs"
    eta = "unknown" if told["eta_seconds"] is None else duration(told["eta_seconds"])
    return f"driver {told['driver']['pid']} on {told['driver']['host']}, ETA {eta}"


def watch_study(store: Store, name: str) -> None:
    """Draw the status anew every 2 s, until nothing is planned or running any more, or Ctrl-C."""
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        try:
            while True:
                rows = status_rows(store, name)
                searched = search_summary(store, name, rows)
                told = driver_of(store, name)
                wish = read_wish(store, name) if told["driver"] else read_pause(store, name)
                by = driver_words(told) + (f", {wish}" if wish is not None else "")
                dim = Text(f"{time.strftime('%H:%M:%S')}, {by}; Ctrl-C ends this view, not the study", style="dim")
                live.update(Group(_newest(rows, name, searched), dim), refresh=True)
                left = any(one["to_come"] for one in searched) and told["driver"]
                if not left and not {"planned", "running"} & {row["state"] for row in rows}:
                    return
                time.sleep(WATCH_SECONDS)
        except KeyboardInterrupt:
            return


def _newest(rows: list[dict[str, Any]], name: str, searched: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What fits the screen."""
    room = max(5, console.height - 8 - sum(row["state"] == "running" for row in rows))
    return study_picture(rows, name, room if console.is_terminal else None, searched=searched)


def _sum_of(rows: list[dict[str, Any]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for row in rows:
        for kind, count in row["ends"].items():
            total[kind] = total.get(kind, 0) + count
    return total


def garbage_picture(items: Sequence[Mapping[str, Any]], most: int = 30) -> RenderableType:
    """What may go, by kind and then one by one, with what each frees."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("kind", no_wrap=True)
    table.add_column("frees", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    for item in items[:most]:
        table.add_row(item["kind"], f"{item['bytes']:,}", item["path"])
    totals: dict[str, list[int]] = {}
    for item in items:
        totals.setdefault(item["kind"], []).append(item["bytes"])
    lines = [Text(f"... and {len(items) - most:,} more; --json lists all", style="dim")] if len(items) > most else []
    lines += [Text(f"{kind}: {len(sizes):,}, {sum(sizes):,} bytes") for kind, sizes in totals.items()]
    return Group(table, *lines)


def job_table(jobs: Sequence[Any]) -> Table:
    """Jobs of a cluster (cluster.jobs.Job), one a line; times are this machine's."""
    table = plain_table("job", "study", "state", "started", "took", "by", "store")
    for column in table.columns[1:]:
        column.justify = "left"
    for job in jobs:
        state = job.status.lower() + (f" ({job.exit_code})" if job.exit_code else "")
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
        took = duration((job.ended or time.time()) - job.started)
        told = (job.id, job.study, state, since, took, job.person, job.store)  # in part the words of others
        table.add_row(*(Text(visible(one)) for one in told))
    return table
