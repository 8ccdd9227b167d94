"""The front door: the command line. Every command is a few lines that call one room.

Imports are inside the commands, so that `escala --help` answers at once and nothing that only plans loads torch.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sweeps.grids import Plan
    from sweeps.store import Store

app = typer.Typer(
    name="escala",
    help="Experiment sweeps for empirical scaling studies: plan, train on Ray, watch in MLflow, fit scaling laws.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

StudyArgument = Annotated[str, typer.Argument(help="A study file, or the name of a shipped or finished study.")]
StoreOption = Annotated[
    Path, typer.Option("--store", envvar="ESCALA_STORE", help="The folder that holds corpora, cells and studies.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
CodeOption = Annotated[bool, typer.Option("--allow-code", help="Let the study run Python files beside it.")]
AcceptOption = Annotated[
    bool, typer.Option("--accept-corpus", help="Go on although the corpus differs from the one that was pinned.")
]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow server. Default: a database in the store."
    ),
]
DEFAULT_STORE = Path("escala-store")


@app.command()
def plan(
    study: StudyArgument,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
    allow_code: CodeOption = False,
    accept_corpus: AcceptOption = False,
) -> None:
    """Dry run: every cell with its size, tokens, FLOPs and state, and the totals. Trains nothing."""
    from cluster.ledger import compare, plan_rows

    known = (store / "store.json").exists()  # a store that is there is only read
    place, planned, _ = _plan(study, store, allow_code, accept_corpus, create=not known)
    rows = plan_rows(place, planned)
    totals = _totals(rows)
    if as_json:
        print(json.dumps({"study": planned.study.name, "cells": rows, "totals": totals, "warnings": planned.warnings}))
        return
    from cluster.display import cell_table, console
    from sweeps.units import flops

    console.print(cell_table(rows, title=planned.study.name))
    console.print(
        f"{len(rows)} cells, {flops(totals['C'])} FLOPs ({flops(totals['C_missing'])} to do), "
        f"{totals['D']:,} tokens. {compare(place, planned)}."
    )
    _warn(planned.warnings)


@app.command()
def run(
    study: StudyArgument,
    store: StoreOption = DEFAULT_STORE,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster, or local for a Ray of its own on this machine.")
    ] = "local",
    tracking_uri: TrackingOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="At most so many cells at once.")] = None,
    allow_code: CodeOption = False,
    checkpoint_seconds: Annotated[
        float, typer.Option(min=0, help="Wall-clock time between the checkpoints of a cell.")
    ] = 300.0,
    give_up_after: Annotated[
        int, typer.Option(min=1, help="End the run when its first so many attempts all fail in the same way.")
    ] = 3,
    accept_corpus: AcceptOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train what is missing of a study. Run it again after a crash or an edit: only what is missing trains."""
    from cluster.display import LiveProgress, console
    from cluster.driver import run_study
    from cluster.ledger import compare

    place, planned, path = _plan(study, store, allow_code, accept_corpus)
    change = compare(place, planned)
    if not as_json:
        console.print(f"[bold]{planned.study.name}[/]: {change}.")
        _warn(planned.warnings)
    with _terminable(), LiveProgress(quiet=as_json or change.done == len(planned.cells)) as display:
        tally = run_study(
            place,
            planned,
            path.read_bytes(),
            watch=display.update,
            address=address,
            tracking_uri=tracking_uri,
            workers=workers,
            base_dir=path.resolve().parent if allow_code else None,
            checkpoint_seconds=checkpoint_seconds,
            give_up_after=give_up_after,
        )
    if as_json:
        print(json.dumps(vars(tally)))
    else:
        _summary(place, planned, tally)
    if tally.failed or tally.stopped:
        raise typer.Exit(1)


@app.command()
def status(study: StudyArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """The state of every cell of a study, with its reason, as the store's files tell it."""
    from cluster.ledger import count_states, ledger_rows

    place = _store(store)
    name = _name(study, place)
    rows = ledger_rows(place, name)
    if as_json:
        print(json.dumps({"study": name, "counts": count_states(rows), "cells": rows}))
        return
    from cluster.display import cell_table, console

    console.print(cell_table(rows, title=name))
    console.print(", ".join(f"{count} {state}" for state, count in count_states(rows).items()))


@app.command()
def logs(
    cell: Annotated[str, typer.Argument(help="A cell's id, or the beginning of it.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """A cell's metric rows, and the traceback of an attempt that failed."""
    from sweeps.store import attempt_epochs, read_metrics

    place = _store(store)
    cell_id = _cell(cell, place)
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


@app.command()
def why(
    cell: Annotated[str, typer.Argument(help="A cell's id, or the beginning of it.")],
    other: Annotated[str, typer.Argument(help="Another cell's.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Which fields make two cells differ."""
    from sweeps.cell import differences
    from sweeps.store import read_cell

    place = _store(store)
    one, two = (read_cell(place, _cell(name, place))["identity"] for name in (cell, other))
    found = list(differences(one, two))
    if as_json:
        print(json.dumps([{"field": name, "one": a, "other": b} for name, a, b in found]))
        return
    print("\n".join(f"{name}: {a!r} -> {b!r}" for name, a, b in found) or "the same cell")


@app.command()
def sync(study: StudyArgument, store: StoreOption = DEFAULT_STORE, tracking_uri: TrackingOption = None) -> None:
    """Bring MLflow up to date from the store's files, and read quarantine tags back from it."""
    from cluster.mirror import Mirror

    place = _store(store)
    mirror = Mirror(place, _name(study, place), tracking_uri)
    mirror.connect()
    mirror.sync()
    mirror.pull_quarantine()


@app.command()
def fit(
    study: Annotated[str, typer.Argument(help="A study, or a table of runs (CSV, TSV, JSON lines, Parquet).")],
    law: Annotated[
        str,
        typer.Option(
            help="isoflop: N*(C) and D*(C). chinchilla: L = E + A/N^alpha + B/D^beta. Or any law of analysis.laws."
        ),
    ] = "isoflop",
    columns: Annotated[
        list[str] | None,
        typer.Option(help="What to read from a table: N=COL,D='C/(6*N)',loss=COL. Arithmetic; names in backquotes."),
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Only the rows in which COL=VALUE holds (COL=VALUE,COL=VALUE).")
    ] = None,
    at: Annotated[list[float] | None, typer.Option(help="Also the optimum at this compute (FLOPs).")] = None,
    for_loss: Annotated[list[float] | None, typer.Option(help="Also the least compute for this loss.")] = None,
    objective: Annotated[
        str | None, typer.Option("--loss", help="What is minimised: huber (default), lad, l2 or student.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Huber's threshold in ln loss. Default: 1.5 times the noise.")
    ] = None,
    fix: Annotated[list[str] | None, typer.Option(help="Hold parameters of the law: NAME=VALUE,NAME=VALUE.")] = None,
    drop_worst: Annotated[int, typer.Option(min=0, help="Leave out so many of the worst-fitting runs.")] = 0,
    bootstrap: Annotated[int | None, typer.Option(min=10, help="Resamples behind the intervals.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Resample whole groups of rows with equal values of this column.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weight rows by this column, such as 1 / variance.")] = None,
    level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Also draw the fit into this file (.png, .pdf, .svg).")] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a law to a study's runs or to any table: parameters, intervals, verdicts.

    A table's columns are found under their common names, or said by --columns, as in
    --columns 'N=1e9*`Model Size (B)`,D=C/(6*N),loss=log(ppl)'.
    """
    from dataclasses import replace

    import analysis
    from analysis.expressions import numbers, split_definitions
    from analysis.pictures import check_picture, draw_fit
    from cluster.display import patience
    from sweeps.errors import InputError, nearest

    options = _fit_options(law, objective, delta, drop_worst, bootstrap, cluster, weights, for_loss, level, seed)
    if plot is not None:
        check_picture(plot)
    conditions = split_definitions(where or [], "--where")
    if fix and law in ("isoflop", "akima"):
        raise InputError("--fix: not for --law isoflop, which has no parameters to hold.")
    if fix:
        options["fixed"] = numbers(split_definitions(fix, "--fix"), "--fix")
    said, source, place = [], {}, None
    if _is_table(study):
        runs = analysis.read_table(study, split_definitions(columns or [], "--columns"), law)
        runs = analysis.keep_rows(runs, conditions)
        said = analysis.check_table(runs, law)
        source = {"table": study, "rows": len(runs), "columns": runs.attrs["columns"], "where": conditions}
        options["loss"] = "loss" if law in ("isoflop", "akima") else analysis.find_law(law).response
    elif columns:
        raise InputError("--columns is for tables; what a study's columns hold is known.")
    else:
        place = _store_or_none(store)
        name = _name(study, place)
        runs = analysis.keep_rows(analysis.load_runs(name, place, tracking_uri=tracking_uri), conditions)
    if cluster is not None and cluster not in runs.columns:
        raise InputError(f"--cluster: no column {cluster!r}{nearest(cluster, map(str, runs.columns))}.")
    with patience("fitting"):
        fitted = analysis.fit(runs, law=law, targets=at or (), **options)
    fitted = replace(fitted, verdicts=(*said, *fitted.verdicts))
    if place is not None and not conditions:
        from sweeps.store import write_json

        try:
            write_json(place.study(name) / "fits" / f"{law.replace(':', '')}.json", fitted.to_json())
        except InputError as error:  # a store of someone else's may be read
            print(f"the fit is not kept: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps(fitted.to_json() | ({"source": source} if source else {})))
    else:
        from cluster.display import console, fit_tables

        for part in fit_tables(fitted, source):
            console.print(part)
    if plot is not None:
        told = draw_fit(fitted, runs, plot)
        if not as_json:
            print(told)
    if fitted.refused:
        raise typer.Exit(1)


@app.command()
def report(
    study: StudyArgument,
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[Path | None, typer.Option(help="Where to write it. Default: report.html of the study.")] = None,
) -> None:
    """One self-contained HTML page with the pictures and the answer to the study's question."""
    import analysis

    place = _store(store)
    path = analysis.write_report(_name(study, place), place, out)
    print(f"report: {path}")


@app.command()
def ui(
    study: Annotated[str | None, typer.Argument(help="Open this study's charts.")] = None,
    store: StoreOption = DEFAULT_STORE,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    open_browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
) -> None:
    """The MLflow UI on this store, on 127.0.0.1."""
    from cluster.interface import serve
    from sweeps.store import study_names

    place = _store(store)
    known = study_names(place)
    name = _name(study, place) if study else known[0] if len(known) == 1 else None
    serve(place, name, port, open_browser)


@app.command()
def doctor(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Check Python, torch, GPU, Ray, MLflow and the store; say what to do about each fault."""
    from cluster.doctor import check

    findings = check(store)
    if as_json:
        print(json.dumps([vars(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what}: {finding.found}")
            if finding.advice:
                print(f"      {finding.advice}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


# --- shared by the commands --------------------------------------------------------------------------------------


def _plan(
    study: str, store: Path, allow_code: bool, accept_corpus: bool, *, create: bool = True
) -> "tuple[Store, Plan, Path]":
    """Load a study file, find or build its corpus, plan its cells."""
    from cluster.display import Waiting
    from sweeps.corpora import make_source, prepare
    from sweeps.errors import InputError
    from sweeps.grids import plan_study
    from sweeps.store import open_store, read_plan, study_names
    from sweeps.studyfile import find_study_file, load_study

    path = find_study_file(study)
    declared = load_study(path)
    source = make_source(
        declared.corpus.source, declared.corpus.path, declared.corpus.options, base_dir=path.resolve().parent
    )
    place = open_store(store, create=create)
    pinned = declared.corpus.fingerprint
    if pinned is None and declared.name in study_names(place):
        before = read_plan(place, declared.name)
        if _same_corpus(before["study"], declared.model_dump(mode="json", by_alias=True)):
            pinned = before["corpus"]["fingerprint"]
    with Waiting() as waiting:
        corpus = prepare(
            source, declared.tokenizer, place.root, accept=accept_corpus, pinned=pinned, progress=waiting.update
        )
    try:
        planned = plan_study(declared, corpus, allow_code=allow_code, base_dir=path.resolve().parent)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return place, planned, path


def _same_corpus(before: dict[str, Any], now: dict[str, Any]) -> bool:
    keys = ("source", "path", "options")
    return before["tokenizer"] == now["tokenizer"] and all(before["corpus"][k] == now["corpus"][k] for k in keys)


def _store(store: Path) -> "Store":
    from sweeps.store import open_store

    return open_store(store, create=False)


def _store_or_none(store: Path) -> "Store | None":
    from sweeps.errors import InputError

    try:
        return _store(store)
    except InputError:
        if (store / "store.json").exists():
            raise
        return None


def _name(study: str, store: "Store | None") -> str:
    """A study's name, from the name itself or from its file."""
    from sweeps.errors import InputError
    from sweeps.store import study_names
    from sweeps.studyfile import find_study_file, load_study

    known = study_names(store) if store else []
    if study in known:
        return study
    try:
        return load_study(find_study_file(study)).name
    except InputError:
        if store is None or Path(study).is_file():
            raise
        there = ", ".join(known) or "none yet"
        raise InputError(f"no study {study!r} in the store {store.root} (it has: {there}), and no such file.") from None


def _is_table(text: str) -> bool:
    """A file that is no study file, or a name that only a table can have."""
    from analysis.tables import SUFFIXES

    return text.lower().endswith(SUFFIXES) or (Path(text).is_file() and not text.endswith((".yaml", ".yml")))


def _fit_options(
    law: str,
    objective: str | None,
    delta: float | None,
    drop_worst: int,
    bootstrap: int | None,
    cluster: str | None,
    weights: str | None,
    for_loss: list[float] | None,
    level: float,
    seed: int,
) -> dict[str, Any]:
    """The arguments of `analysis.fit` that were asked for. A parabola per budget has no use for some of them."""
    from sweeps.errors import InputError

    asked: dict[str, Any] = {"objective": objective, "threshold": delta, "drop_worst": drop_worst, "cluster": cluster}
    asked |= {"weights": weights, "loss_targets": for_loss}
    asked = {k: v for k, v in asked.items() if v}
    if law in ("isoflop", "akima") and asked:
        names = {
            "objective": "--loss",
            "threshold": "--delta",
            "drop_worst": "--drop-worst",
            "loss_targets": "--for-loss",
        }
        listed = ", ".join(names.get(k, f"--{k}") for k in asked)
        raise InputError(f"{listed}: not for --law isoflop, which fits a parabola to each budget by least squares.")
    if cluster is not None:
        asked["resample"] = "rows"
    if level != 0.95:
        asked["level"] = level
    return asked | ({"resamples": bootstrap} if bootstrap else {}) | ({"seed": seed} if seed else {})


def _cell(prefix: str, store: "Store") -> str:
    """The one cell whose id begins with `prefix`."""
    from sweeps.errors import InputError

    found = sorted(path.name for path in (store.root / "cells").glob(f"{prefix}*")) if prefix.isalnum() else []
    if len(found) != 1:
        what = "no cell" if not found else f"{len(found)} cells"
        raise InputError(f"{what} in {store.root} with an id that begins with {prefix!r}. `escala status` lists them.")
    return found[0]


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    missing = [row for row in rows if row["state"] not in ("finished", "diverged")]
    return {
        "cells": len(rows),
        "missing": len(missing),
        "C": sum(row["C"] for row in rows),
        "C_missing": sum(row["C"] for row in missing),
        "D": sum(row["D"] for row in rows),
    }


def _warn(warnings: tuple[str, ...]) -> None:
    from cluster.display import console

    for warning in warnings:
        console.print(f"[yellow]note:[/] {warning}", highlight=False)


def _summary(place: "Store", planned: "Plan", tally: Any) -> None:
    from cluster.display import console
    from sweeps.units import duration

    study = planned.study.name
    if tally.skipped == len(planned.cells):
        console.print(f"nothing to train: all {tally.skipped} cells have ended already.")
    else:
        left = f", {tally.planned} still to do" if tally.planned else ""
        console.print(
            f"{tally.finished} finished, {tally.diverged} diverged, {len(tally.failed)} failed, "
            f"{tally.skipped} were done before{left}, in {duration(tally.seconds)}."
        )
    for cell_id, reason in tally.failed.items():
        console.print(f"[red]failed[/] {cell_id}: {reason}  (escala logs {cell_id})", highlight=False)
    if tally.failed:
        console.print(f"failed cells are not tried again by themselves: escala retry --failed {study}, then run again.")
    if tally.stopped:
        console.print(f"{tally.stopped}. What was done is kept; the same command goes on from there.", highlight=False)
    if tally.mirror_fault:
        console.print(
            f"[yellow]MLflow is behind:[/] {tally.mirror_fault}. `escala sync {study}` sends what is missing."
        )
    console.print(f"look: escala fit {study} | escala report {study} | escala ui {study}   (store: {place.root})")


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: workers are stopped, the mirror is brought up to date."""
    import signal

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command line. Bad input is one message on stderr and exit code 2."""
    from sweeps.errors import InputError

    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
