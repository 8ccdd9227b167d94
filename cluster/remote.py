"""The commands for a cluster that is elsewhere, to whose dashboard alone they talk, or that is not there at all.

`escala.py` puts them on the command line. Imports are inside the commands: `escala --help` loads this file.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from cluster.arguments import (
    DEFAULT_STORE,
    AcceptOption,
    CodeOption,
    JsonOption,
    RefitOption,
    StoreOption,
    StudyFileArgument,
    TrackingOption,
)
from cluster.terminal import say, visible
from sweeps.redaction import redact

if TYPE_CHECKING:
    from cluster.jobs import Dashboard, Job
    from cluster.submit import Submission

app = typer.Typer()
CLUSTER = "On a cluster"
"""The panel of these commands in `escala --help`."""
DashboardOption = Annotated[
    str,
    typer.Option(
        "--address",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        help="Its dashboard: http://HOST:8265",
        show_default=False,
    ),
]


@app.command(rich_help_panel=CLUSTER)
def submit(
    study: StudyFileArgument,
    address: DashboardOption = "",
    store: Annotated[
        Path, typer.Option("--store", envvar="ESCALA_STORE", help="The store as the cluster's nodes see it: /...")
    ] = DEFAULT_STORE,
    tracking_uri: TrackingOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the job's log.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
    env: Annotated[
        list[str] | None, typer.Option(help="Pass this variable of here on, by its name. No secrets. Repeatable.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="At most so many workers at once, each with a cell or a stack.")
    ] = None,
    allow_code: CodeOption = False,
    checkpoint_seconds: Annotated[
        float | None, typer.Option(min=0, help="Wall-clock time between the checkpoints of a cell. Default: run's.")
    ] = None,
    give_up_after: Annotated[
        int | None, typer.Option(min=1, help="End when its first so many attempts all fail alike. Default: run's.")
    ] = None,
    accept_corpus: AcceptOption = False,
    refit: RefitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a study as a Ray job on a cluster, and follow its log. Submit it again to go on after whatever happened.

    The cluster's nodes need Escala's requirements and a folder that they share; the code goes with the job. Ctrl-C
    stops following, not the job. Exit code: the job's.
    """
    from cluster.jobs import check_address, connect
    from cluster.submit import prepare, send

    given = {"--workers": workers, "--checkpoint-seconds": checkpoint_seconds, "--give-up-after": give_up_after}
    flags = {"--allow-code": allow_code, "--accept-corpus": accept_corpus, "--refit": refit}
    options = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    check_address(address)
    submission = prepare(
        study,
        store,
        tracking_uri=tracking_uri,
        options=[*options, *(name for name, on in flags.items() if on)],
        variables=env or [],
        environment=dict(os.environ),
        allow_code=allow_code,
        accept_corpus=accept_corpus,
        refit=refit,
        touch=not dry_run,
    )
    if dry_run:
        if as_json:
            print(json.dumps(submission.to_json()))
        else:
            _print_submission(submission)
        return
    tell = _aside if as_json else say
    for line in _introduction(submission):
        tell(line)
    dashboard = connect(address)
    job, new = send(dashboard, submission)
    if new:
        tell(f"sent as {job.id} to {dashboard.address}")
    else:
        _say_running(job, submission, detach, tell)
    ended = None if detach else _followed(dashboard, job, sys.stderr if as_json else sys.stdout, tell)
    if as_json:
        print(json.dumps(vars(ended or job)))
    elif detach:
        say(_how_to(dashboard, job))
    elif ended is not None and ended.status == "SUCCEEDED":
        say(f"{job.id} has ended well.")
    if ended is not None:
        _raise_fate(ended)
    elif not detach:
        raise typer.Exit(1)


def _followed(dashboard: "Dashboard", job: "Job", stream: TextIO, tell: Callable[[str], None]) -> "Job | None":
    """Show a job's log until it has ended, and return it as it is then; None where it is followed no longer, and why
    was told."""
    from cluster.jobs import ClusterGone, follow

    try:
        with _redacted(stream) as write:
            return follow(dashboard, job.id, write, tell)
    except KeyboardInterrupt:
        tell(f"\nno longer followed; {job.id} goes on. {_how_to(dashboard, job)}")
    except ClusterGone as error:
        say(f"error: {error}", file=sys.stderr)
    return None


def _introduction(submission: "Submission") -> list[str]:
    from sweeps.units import flops, plural

    total = sum(submission.package.sizes.values())
    lines = [
        f"{submission.study}: {total / 1e6:.1f} MB in {plural(len(submission.package.files), 'file')}; store on "
        f"the cluster: {submission.store}"
    ]
    if submission.plan is None:
        lines.append(f"not planned here: {submission.unplanned}. The cluster does.")
    elif submission.plan.cells:
        total_flops = sum(one.counts["C"] for one in submission.plan.cells)
        lines.append(
            f"{plural(len(submission.plan.cells), 'cell')}, {flops(total_flops)} FLOPs; those that have ended stay."
        )
    return lines


def _print_submission(submission: "Submission") -> None:
    for line in _introduction(submission):
        say(line)
    say(f"entrypoint: {submission.entrypoint}")
    told = submission.to_json()
    say(f"resources: {told['resources']['CPU']} CPU of the head for the driver")
    say(f"environment: {', '.join(told['environment']) or 'nothing of yours'}")
    for place, size in told["files"].items():
        say(f"{size:>12,}  {place}")
    say("nothing was sent.")


def _say_running(job: "Job", submission: "Submission", detach: bool, tell: Any) -> None:
    """That a job of the study lives, instead of a second one that the study's claim would refuse."""
    from sweeps.errors import InputError

    found = f"{job.study} is {job.status.lower()} already as {job.id}, submitted by {job.person}"
    if job.package != submission.package.digest:
        found += "; its study or code is another than this. Submit again when it has ended, and what is new trains"
    if detach:
        raise InputError(f"{found}. Nothing was sent; without --detach its log is followed.")
    tell(f"{found}. Nothing was sent; its log:")


def _how_to(dashboard: "Dashboard", job: "Job") -> str:
    return (
        f"Follow it: the same command without --detach, or {_log_command(dashboard, f'-f {job.id}')}. "
        f"Stop it: escala jobs --stop {job.id} --address {dashboard.address}"
    )


def _log_command(dashboard: "Dashboard", job: str) -> str:
    """Ray's own, which sends no token unless it is told to."""
    mode = "RAY_AUTH_MODE=token " if dashboard.wants_token else ""
    return f"{mode}ray job logs {job} --address {dashboard.address}"


def _raise_fate(job: "Job") -> None:
    """End with the job's exit code, and say of a job that has none why."""
    if job.status == "STOPPED":
        _aside(f"{job.id} was stopped. What was done is kept; submit the study again to go on.")
        raise typer.Exit(1)
    if job.status == "FAILED":
        if job.exit_code is None:
            _aside(f"{job.id} failed: {job.message.strip() or 'Ray does not say why'}")
        else:
            _aside(f"{job.id} ended with exit code {job.exit_code}.")
        raise typer.Exit(job.exit_code or 1)


@app.command(rich_help_panel=CLUSTER)
def jobs(
    address: DashboardOption = "",
    stop: Annotated[
        str | None, typer.Option("--stop", metavar="JOB", help="Stop this one; its cells keep checkpoints.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The jobs of Escala on a cluster: study, state, since when, whose. With --stop, end one."""
    from cluster.jobs import connect, list_jobs
    from cluster.jobs import stop as stop_job

    dashboard = connect(address)
    if stop is not None:
        job = stop_job(dashboard, stop, _aside)
        if as_json:
            print(json.dumps(vars(job)))
        else:
            say(f"{job.id}: {job.status.lower()}. Submit the study again to go on.")
        return
    found = list_jobs(dashboard)
    if as_json:
        print(json.dumps([vars(job) for job in found]))
        return
    from cluster.display import console
    from cluster.overview import job_table

    if not found:
        say(f"no jobs of Escala at {dashboard.address}.")
        return
    console.print(job_table(found))
    say(f"a log: {_log_command(dashboard, 'JOB')}")


def _aside(line: str) -> None:
    say(line, sys.stderr)


@contextmanager
def _redacted(stream: TextIO) -> Iterator[Callable[[str], None]]:
    """Writes to a stream without secrets, by whole lines: half a secret is not known for one."""
    begun = ""

    def show(text: str) -> None:
        stream.write(visible(redact(text)))
        stream.flush()

    def write(text: str) -> None:
        nonlocal begun
        lines, newline, begun = (begun + text).rpartition("\n")
        show(lines + newline)

    try:
        yield write
    finally:
        show(begun)


@app.command(rich_help_panel=CLUSTER)
def simulate(
    study: StudyFileArgument,
    gpus: Annotated[int, typer.Option(help="GPUs of the simulated cluster.")],
    nodes: Annotated[int, typer.Option(help="Nodes among which they are shared evenly.")] = 1,
    mtbf: Annotated[
        str | None, typer.Option(help="Mean time between the failures of one node: 200h, 30m, 7d. Default: none fails.")
    ] = None,
    preempt: Annotated[float, typer.Option(min=0, help="Announced preemptions per node and hour.")] = 0.0,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="Time between the checkpoints of a cell.")] = 300.0,
    seed: Annotated[int, typer.Option(min=0, help="Of failures and preemptions.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="Assume this GPU, not a calibration. With --mfu alone: H100.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Assume this share of its peak, above 0, at most 1. With --device alone: 0.4.")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="Cell times of this kind of worker, as calibrated.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GiB of each GPU: cells that fit side by side share one. Default: none do.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """All of a study on a cluster that is not there, by the scheduling code of `run`: end, idle time, lost work.

    Cells are as fast as a calibration in the store tells, else as an H100 at 40% of its peak; none counts as done
    before. A node has 16 CPUs a GPU, and one that fails is back after ten minutes. Exit code 1 where a budget ends it
    early, as `run`.
    """
    import math

    from cluster.planning import read_study
    from cluster.scheduling import Bounds
    from cluster.simulation import Faults, simulate, simulation_lines
    from cluster.workload import simulated_nodes, workload
    from sweeps.errors import InputError
    from sweeps.units import parse_duration, plural

    given = {"--preempt": preempt, "--checkpoint-seconds": checkpoint_seconds, "--gpu-memory": gpu_memory}
    for name, value in given.items():
        if value is not None and not math.isfinite(value):
            raise InputError(f"{name}: found {value:g}; a finite number is wanted.")
    cluster = simulated_nodes(gpus, nodes, gpu_memory)
    if mfu is not None and not 0 < mfu <= 1:
        raise InputError(f"--mfu: found {mfu:g}; a share of the peak above 0 and at most 1 is wanted.")
    if gpu_memory is not None and gpu_memory <= 0:
        raise InputError(f"--gpu-memory: found {gpu_memory:g}; more than 0 GiB are wanted.")
    faults = Faults(
        mtbf_seconds=math.inf if mtbf is None else parse_duration(mtbf, "--mtbf"),
        preemptions_per_hour=preempt,
        checkpoint_seconds=checkpoint_seconds,
        seed=seed,
    )
    known = (store / "store.json").exists()  # a store that is there is only read
    place, planned, _ = read_study(study, store, allow_code, False, create=not known)
    work = workload(place, planned, cluster, device=device, mfu=mfu, hardware=hardware)
    bounds = Bounds(**planned.study.limits.model_dump(exclude={"priority"}))
    found = simulate(work.jobs, cluster, edges=work.edges, bounds=bounds, faults=faults)
    if as_json:
        told = {"study": planned.study.name, "cells": len(work.jobs), "gpus": gpus, "nodes": nodes}
        print(json.dumps(told | {"times": work.times, "notes": work.notes} | found.to_json()))
    else:
        machines = f"{plural(gpus, 'GPU')} in {plural(nodes, 'node')}"
        say(f"{planned.study.name}: {plural(len(work.jobs), 'cell')} on {machines}, simulated.")
        for line in simulation_lines(found):
            say(line)
        say(f"Cell times are {work.times}.")
        for note in work.notes:
            say(note[:1].upper() + note[1:])
    if found.stopped is not None:
        raise typer.Exit(1)
