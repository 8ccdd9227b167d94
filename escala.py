"""The front door: the command line. Every command is a few lines that call one room.

Imports are inside the commands, so that `escala --help` answers at once and nothing that only plans loads torch.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import remote, verbs
from cluster.arguments import (
    DEFAULT_STORE,
    AcceptOption,
    CodeOption,
    JsonOption,
    RefitOption,
    StoreOption,
    StudyArgument,
    StudyFileArgument,
    TrackingOption,
    check_study_law,
    existing_store,
    fit_options,
    study_name,
)
from cluster.terminal import say

if TYPE_CHECKING:
    import pandas as pd

    from sweeps.store import Store

app = typer.Typer(
    name="escala",
    help="Experiment sweeps for empirical scaling studies: plan, train on Ray, watch in MLflow, fit scaling laws.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AddressOption = Annotated[
    str,
    typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster (HEAD:6379, or auto), or local for a Ray of its own here."),
]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(help="What to read from a table: N=COL,D='C/(6*N)',loss=COL. Arithmetic; names in backquotes."),
]
WhereOption = Annotated[
    list[str] | None, typer.Option(help="Only the rows in which COL=VALUE holds (COL=VALUE,COL=VALUE).")
]
PLAN, ANALYSE, LOOK = "Plan and run", "Analyse", "Look and mend"
"""The panels of `escala --help`, in the order in which the commands stand in this file."""


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            say(f"escala {version('escala')}")
        except PackageNotFoundError:  # a bare checkout
            say("escala, not installed; escala doctor tells which code this is")
        raise typer.Exit


@app.callback()
def always(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command(rich_help_panel=PLAN)
def plan(
    study: StudyFileArgument,
    store: StoreOption = DEFAULT_STORE,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Predict the time on so many workers. Default: this machine's.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Predict the time on this kind of worker, as `calibrate` named it.")
    ] = None,
    as_json: JsonOption = False,
    allow_code: CodeOption = False,
    accept_corpus: AcceptOption = False,
    refit: RefitOption = False,
) -> None:
    """Dry run: every cell with its size, tokens, FLOPs, state and, after `calibrate`, its time. Trains nothing."""
    from cluster.calibration import find_calibration
    from cluster.estimate import estimate
    from cluster.ledger import compare, expected_branches, plan_rows, sharing, sharing_words
    from cluster.planning import read_study
    from cluster.summary import ENDED, plan_totals, print_warnings
    from sweeps.summary import planned_summary, summary_lines

    known = (store / "store.json").exists()  # a store that is there is only read
    place, planned, _ = read_study(study, store, allow_code, accept_corpus, create=not known, refit=refit)
    branches = expected_branches(place, planned)
    rows = plan_rows(place, planned, branches)
    searched = planned_summary(place, planned, rows)
    totals, shared = plan_totals(rows), sharing(rows)
    found = find_calibration(place, hardware)
    missing = {row["id"] for row in rows if row["state"] not in ENDED}
    timed = estimate(planned, found, missing, workers, branches) if found else None
    if timed is not None:
        rows = [row | {"seconds_predicted": timed.seconds[row["id"]]} for row in rows]
    if as_json:
        printed = {
            "study": planned.study.name,
            "cells": rows,
            "totals": totals,
            "shared": shared,
            "search": searched,
            "warnings": planned.warnings,
        }
        print(json.dumps(printed | {"estimate": timed.to_json() if timed else None}))
        return
    from cluster.display import cell_table, console, estimate_lines, rows_shown
    from sweeps.units import flops, plural

    console.print(
        cell_table(rows, planned.study.name, console.width, rows_shown(), " that are not shown; --json prints all")
    )
    console.print(
        f"{plural(len(rows), 'cell')}, {flops(totals['C'])} FLOPs ({flops(totals['C_missing'])} to do), "
        f"{totals['D']:,} tokens. {compare(place, planned)}."
    )
    if shared:
        console.print(f"{sharing_words(shared)}.")
    for line in (line for one in searched for line in summary_lines(one)):
        console.print(line)
    if timed is None and (missing or searched):
        console.print(f"How long this takes is not known: escala calibrate {study} times a few shapes here.")
    for part in estimate_lines(timed) if timed and missing else ():
        console.print(part)
    print_warnings(planned.warnings)


@app.command(rich_help_panel=PLAN)
def calibrate(
    study: StudyFileArgument,
    store: StoreOption = DEFAULT_STORE,
    address: AddressOption = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Time on so many workers at once. Default: all.")] = None,
    allow_code: CodeOption = False,
    accept_corpus: AcceptOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time a few shapes of a study on each kind of worker, so that `plan` predicts time, energy and money."""
    from cluster import calibration
    from cluster.display import Waiting, calibration_table, console
    from cluster.planning import read_study

    place, planned, path = read_study(study, store, allow_code, accept_corpus)
    with _terminable(), Waiting() as waiting:
        found = calibration.calibrate(
            place,
            planned,
            progress=waiting.update,
            address=address,
            workers=workers,
            base_dir=path.resolve().parent if allow_code else None,
        )
    if as_json:
        print(json.dumps({one.kind: calibration.calibration_rows(one) for one in found}))
        return
    for one in found:
        console.print(calibration_table(one.kind, calibration.calibration_rows(one)))
    console.print(f"look: escala plan {study}   (store: {place.root})")


@app.command(rich_help_panel=PLAN)
def run(
    study: StudyFileArgument,
    store: StoreOption = DEFAULT_STORE,
    address: AddressOption = "local",
    tracking_uri: TrackingOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="At most so many workers at once, each with a cell or a stack of cells.")
    ] = None,
    allow_code: CodeOption = False,
    checkpoint_seconds: Annotated[
        float, typer.Option(min=0, help="Wall-clock time between the checkpoints of a cell.")
    ] = 300.0,  # sweeps.trainer.CHECKPOINT_SECONDS, which --help need not load numpy for
    give_up_after: Annotated[
        int, typer.Option(min=1, help="End the run when its first so many attempts all fail in the same way.")
    ] = 3,  # cluster.driver.GIVE_UP_AFTER
    accept_corpus: AcceptOption = False,
    refit: RefitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train what is missing of a study. Run it again after a crash or an edit: only what is missing trains."""
    from cluster.display import LiveProgress, console
    from cluster.driver import run_study
    from cluster.ledger import compare
    from cluster.planning import read_study
    from cluster.summary import print_run, print_warnings
    from sweeps.trials import with_trials

    place, planned, path = read_study(study, store, allow_code, accept_corpus, refit=refit)
    change = compare(place, planned)
    if not as_json:
        console.print(f"{planned.study.name}: {change}.", style="bold")
        print_warnings(planned.warnings)
    with _terminable(), LiveProgress(quiet=as_json) as display:
        tally = run_study(
            place,
            planned,
            path.read_bytes(),
            watch=display.update,
            starting=display.starting,
            address=address,
            tracking_uri=tracking_uri,
            workers=workers,
            base_dir=path.resolve().parent if allow_code else None,
            checkpoint_seconds=checkpoint_seconds,
            give_up_after=give_up_after,
        )
    if as_json:
        notes = [*display.notes, *tally.notes]
        print(json.dumps(vars(tally) | {"notes": notes, "warnings": planned.warnings}))
    else:
        print_run(place, with_trials(place, planned), tally)
    if tally.failed or tally.stopped:
        raise typer.Exit(1)


app.registered_commands += remote.app.registered_commands
app.registered_commands += verbs.app.registered_commands


@app.command(rich_help_panel=ANALYSE)
def fit(
    study: Annotated[str, typer.Argument(help="A study, or a table of runs (CSV, TSV, JSON lines, Parquet).")],
    law: Annotated[
        str,
        typer.Option(
            help="isoflop: N*(C) and D*(C); akima: the same by splines. chinchilla: L = E + A/N^alpha + B/D^beta. "
            "More in N and D: chinchilla_tied, gadre, kaplan, data_constrained (and U), clark (N, experts). In one "
            "variable: kaplan_N, kaplan_D, kaplan_C; saturating, bnsl:<breaks> (any x). tissue (S1, S2); accuracy, "
            "error (of the loss)."
        ),
    ] = "isoflop",
    columns: ColumnsOption = None,
    where: WhereOption = None,
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
    bootstrap: Annotated[
        int | None,
        typer.Option(min=10, help="Resamples behind the intervals. Default: 2000 for isoflop and akima, else 1000."),
    ] = None,
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

    options = fit_options(law, objective, delta, drop_worst, bootstrap, cluster, weights, for_loss, level, seed)
    if plot is not None:
        check_picture(plot)
    conditions = split_definitions(where or [], "--where")
    if fix and law in ("isoflop", "akima"):
        raise InputError(f"--fix: not for --law {law}, which has no parameters to hold.")
    if fix:
        options["fixed"] = numbers(split_definitions(fix, "--fix"), "--fix")
    runs, source, home = _read_runs(study, columns, conditions, law, store, tracking_uri)
    said = analysis.check_table(runs, law) if source else []
    if not source and law not in ("isoflop", "akima"):
        form = analysis.find_law(law)
        check_study_law(study, law, (*form.variables, form.response), map(str, runs.columns))
    if source:
        options["loss"] = "loss" if law in ("isoflop", "akima") else analysis.find_law(law).response
    if cluster is not None and cluster not in runs.columns:
        raise InputError(f"--cluster: no column {cluster!r}{nearest(cluster, map(str, runs.columns))}.")
    with patience("fitting"):
        fitted = analysis.fit(runs, law=law, targets=at or (), **options)
    fitted = replace(fitted, verdicts=(*said, *fitted.verdicts))
    if home is not None:
        from sweeps.records import write_json

        place, name = home
        try:
            write_json(place.study(name) / "fits" / f"{law.replace(':', '')}.json", fitted.to_json())
        except InputError as error:  # a store of someone else's may be read
            say(f"the fit is not kept: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps(fitted.to_json() | ({"source": source} if source else {})))
    else:
        from cluster.display import console, fit_tables

        for part in fit_tables(fitted, source):
            console.print(part)
    if plot is not None:
        told = draw_fit(fitted, runs, plot)
        if not as_json:
            say(told)
    if fitted.refused:
        raise typer.Exit(1)


@app.command(rich_help_panel=ANALYSE)
def sensitivity(
    study: Annotated[str, typer.Argument(help="A study, or a table of runs (CSV, TSV, JSON lines, Parquet).")],
    columns: Annotated[
        list[str] | None,
        typer.Option(help="What to read from a table: N=COL,D=COL,lr=COL,batch='bs*2048',loss=COL. Arithmetic."),
    ] = None,
    where: WhereOption = None,
    eps: Annotated[
        float, typer.Option(help="The plateau: learning rates within this fraction of the best loss.")
    ] = 0.01,
    axis: Annotated[
        list[str] | None,
        typer.Option(help="Seek over learning_rate, batch_tokens (one each). Default: what was crossed."),
    ] = None,
    importance: Annotated[
        list[str] | None,
        typer.Option(
            help="How much of the loss's variance each of these explains: COL,COL (fANOVA). Also width, depth."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Of the power laws. quadratic: through the vertices. near-best: as Step Law fitted.")
    ] = "quadratic",
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the losses and optima into this file (.png, .pdf, .svg).")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """How much the learning rate matters: best rate per size and tokens, its plateau, and how it moves with them.

    Where the batch was varied, the critical batch too, from which on tokens are wasted; where the weight decay was, its
    best timescale (batch / (rate x decay x D), a fraction of the run).
    """
    from dataclasses import replace

    import analysis
    from analysis.expressions import split_definitions
    from analysis.pictures import check_picture, draw_sensitivity
    from analysis.tables import SHORT
    from cluster.display import patience
    from sweeps.errors import InputError

    if plot is not None:
        check_picture(plot)
    conditions = split_definitions(where or [], "--where")
    asked = [name.strip() for text in importance or () for name in text.split(",")]
    runs, source, home = _read_runs(study, columns, conditions, "sensitivity", store, tracking_uri)
    with patience("measuring sensitivity"):
        found = analysis.sensitivity(runs, axes=axis, eps=eps, method=method)  # type: ignore[arg-type]
        # After it: what it refuses itself, such as a batch that was not read, it says best.
        said = analysis.check_table(runs, "sensitivity") if source else []
        found = replace(found, verdicts=(*said, *found.verdicts))
        known = {"weight_decay", "batch_tokens"} <= set(runs.columns)
        timescales = analysis.decay_timescales(runs) if known else ()
        batches = None
        searched = "search" in runs.columns and runs["search"].notna().any()  # its settings are not crossed
        if not searched and analysis.sweeps_batches(runs):
            batches = analysis.critical_batches(runs, _curves(study, store, tracking_uri) if not source else None)
        shares = analysis.importances(runs, [SHORT.get(name, name) for name in asked]) if asked else ()
    if home is not None:
        place, name = home
        try:
            analysis.write_optimum(found, runs, name, place)
        except InputError as error:  # a store of someone else's may be read
            say(f"the optimum is not kept: {error}", file=sys.stderr)
    if as_json:
        more: dict[str, Any] = {"timescales": [one.to_json() for one in timescales]} if timescales else {}
        more |= {"critical_batches": batches.to_json()} if batches else {}
        more |= {"importances": [one.to_json() for one in shares]} if shares else {}
        print(json.dumps(found.to_json() | more | ({"source": source} if source else {})))
    else:
        from cluster.display import console
        from cluster.sensitivity import sensitivity_tables

        for part in sensitivity_tables(found, source, timescales, batches, shares):
            console.print(part)
    if plot is not None:
        told = draw_sensitivity(found, plot)
        if not as_json:
            say(told)
    if found.refused and all(one.refused for one in shares):
        raise typer.Exit(1)


@app.command(rich_help_panel=ANALYSE)
def report(
    study: StudyArgument,
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[Path | None, typer.Option(help="Where to write it. Default: report.html of the study.")] = None,
) -> None:
    """One self-contained HTML page with the pictures and the answer to the study's question."""
    import analysis
    from cluster.parent import bring_command, left_outside
    from sweeps.errors import InputError

    place = existing_store(store)
    name = study_name(study, place)
    if out is None and not os.access(place.study(name), os.W_OK):  # a store of someone else's may be read
        raise InputError(f"the store {place.root} is not writable. Name a file for the report: --out report.html.")
    path = analysis.write_report(name, place, out)
    say(f"report: {path}")
    if out is None and (note := left_outside(place, name)):
        say(note)
    elif out is None and (command := bring_command(place, name)):
        say(f"MLflow shows it after: {command}")


@app.command("import", rich_help_panel=ANALYSE)
def import_table(
    table: Annotated[Path, typer.Argument(help="Finished runs: CSV, TSV, JSON lines or Parquet, one run a row.")],
    study: Annotated[str, typer.Option(help="The study that they become.")],
    columns: ColumnsOption = None,
    where: WhereOption = None,
    n_is: Annotated[
        str | None, typer.Option(help="What N counts: N_total, N_nonembedding, N_nonembedding_head or N (as here).")
    ] = None,
    c_is: Annotated[str | None, typer.Option(help="What C counts: C (every operation) or C_6nd.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Finished runs from elsewhere, as a study of foreign cells that can be seen, fitted, reported and synced."""
    from analysis.expressions import split_definitions
    from analysis.foreign import read_foreign
    from sweeps.foreign import import_runs
    from sweeps.store import open_store
    from sweeps.units import plural

    given, conditions = split_definitions(columns or [], "--columns"), split_definitions(where or [], "--where")
    rows, conventions, left_out = read_foreign(table, given, conditions, n_is=n_is, c_is=c_is)
    told = import_runs(open_store(store), study, rows, conventions, table.name)
    if as_json:
        print(json.dumps({"study": study, **vars(told), "left_out": left_out, "conventions": conventions}))
        return
    said = ", ".join(
        f"what {what} counts is not said (--{what.lower()}-is says it)"
        if found == "unknown"
        else f"{what} counts {'as here' if found == what else f'as {found} does'}"
        for what, found in conventions.items()
    )
    say(f"{study}: {plural(told.new, 'run')} imported, {told.known} were there; {said}.")
    if told.replaced:
        say(f"note: {told.replaced} of them replace the same rows, which were read in another way before.")
    if told.repeated:
        say(f"note: rows that are equal to another row in everything count once ({told.repeated} left out).")
    if left_out:
        some = ", ".join(map(str, left_out[:8])) + (", ..." if len(left_out) > 8 else "")
        lacking = "not finished, excluded, or without a positive N, D, C and loss"
        say(f"note: {plural(len(left_out), 'row')} left out: {lacking} ({some}).")


@app.command(rich_help_panel=ANALYSE)
def export(
    study: StudyArgument,
    out: Annotated[Path, typer.Option(help="Where the runs go, one a row: .csv or .parquet.")],
    curves: Annotated[Path | None, typer.Option(help="Where the curves go, one logged step a row.")] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingOption = None,
) -> None:
    """A study's runs, and its curves, as tidy tables for other programs."""
    import analysis
    from analysis.foreign import check_written, write_frame
    from sweeps.units import plural

    for path in filter(None, (out, curves)):
        check_written(path)
    place = _store_or_none(store)
    name = study_name(study, place)
    runs = analysis.load_runs(name, place, tracking_uri=tracking_uri)
    write_frame(runs, out)
    say(f"{plural(len(runs), 'run')}: {out}")
    if curves is not None:
        steps = analysis.load_curves(name, place, tracking_uri=tracking_uri)
        write_frame(steps, curves)
        say(f"{plural(len(steps), 'row')} of curves: {curves}")


@app.command(rich_help_panel=LOOK)
def ui(
    study: Annotated[str | None, typer.Argument(help="Open this study's charts.")] = None,
    store: StoreOption = DEFAULT_STORE,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 5000,
    open_browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
) -> None:
    """The MLflow UI on this store, on 127.0.0.1; where MLFLOW_TRACKING_URI names a server, that server's."""
    from cluster.interface import serve, show_server
    from sweeps.store import study_names

    place = existing_store(store)
    known = study_names(place)
    name = study_name(study, place) if study else known[0] if len(known) == 1 else None
    if (server := os.environ.get("MLFLOW_TRACKING_URI", "")).startswith(("http://", "https://")):
        show_server(server, name, open_browser)
        return
    with _terminable():
        serve(place, name, port, open_browser)


@app.command(rich_help_panel=LOOK)
def doctor(
    store: StoreOption = DEFAULT_STORE,
    address: Annotated[
        str | None, typer.Option(help="Check a Ray cluster, node by node (HEAD:PORT), instead of this machine.")
    ] = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check Python, torch, GPU, Ray, MLflow and the store, here or on a cluster; say what to do about each fault."""
    from cluster.doctor import check

    if address is None:
        findings = check(store)
        if tracking_uri is not None and all(one.ok for one in findings if one.what == "mlflow"):  # else it cannot ask
            from cluster.clusterdoctor import check_mlflow

            findings.append(check_mlflow(store, tracking_uri))
    else:
        from cluster.clusterdoctor import check_cluster

        findings = check_cluster(address, store, tracking_uri)
    if as_json:
        print(json.dumps([vars(finding) for finding in findings]))
    else:
        for finding in findings:
            say(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what}: {finding.found}")
            if finding.advice:
                say(f"      {finding.advice}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


# --- shared by the commands --------------------------------------------------------------------------------------


def _store_or_none(store: Path) -> "Store | None":
    from sweeps.errors import InputError

    try:
        return existing_store(store)
    except InputError:
        if (store / "store.json").exists():
            raise
        return None


def _read_runs(
    study: str,
    columns: list[str] | None,
    conditions: dict[str, str],
    purpose: str,
    store: Path,
    tracking_uri: str | None,
) -> tuple["pd.DataFrame", dict[str, Any], "tuple[Store, str] | None"]:
    """The runs of a table or a study in which the conditions hold; where a table is from; and of all runs of a study
    in a store, that store and the study's name: there what is found of them may be kept."""
    import analysis
    from analysis.expressions import split_definitions
    from sweeps.errors import InputError

    if _is_table(study):
        runs = analysis.read_table(study, split_definitions(columns or [], "--columns"), purpose)
        runs = analysis.keep_rows(runs, conditions)
        return runs, {"table": study, "rows": len(runs), "columns": runs.attrs["columns"], "where": conditions}, None
    if columns:
        raise InputError("--columns is for tables; what a study's columns hold is known.")
    place = _store_or_none(store)
    name = study_name(study, place)
    runs = analysis.keep_rows(analysis.load_runs(name, place, tracking_uri=tracking_uri), conditions)
    return runs, {}, (place, name) if place is not None and not conditions else None


def _curves(study: str, store: Path, tracking_uri: str | None) -> "pd.DataFrame":
    import analysis

    place = _store_or_none(store)
    return analysis.load_curves(study_name(study, place), place, tracking_uri=tracking_uri)


def _is_table(text: str) -> bool:
    """A file that is no study file, or a name that only a table can have."""
    from analysis.tables import SUFFIXES

    return text.lower().endswith(SUFFIXES) or (Path(text).is_file() and not text.endswith((".yaml", ".yml")))


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

    gc.set_threshold(50_000)  # pandas, MLflow and Ray make a million objects that stay, as sweeps/loading.py says
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except InputError as error:
        say(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        say(traceback.format_exc(), file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # which typer makes of Ctrl-C, without a word
            raise
        say("interrupted", file=sys.stderr)
        sys.exit(1)
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
