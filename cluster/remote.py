"""The verbs that are about clusters elsewhere, or nowhere yet. `escala.py` puts them on the command line.

Imports are inside the commands: `escala --help` loads this file.
"""

import json
from typing import Annotated

import typer

from cluster.arguments import DEFAULT_STORE, JsonOption, StoreOption, StudyArgument

app = typer.Typer()
CLUSTER = "On a cluster"
"""The panel of these commands in `escala --help`."""


@app.command(rich_help_panel=CLUSTER)
def simulate(
    study: StudyArgument,
    gpus: Annotated[int, typer.Option(help="GPUs of the simulated cluster.")],
    nodes: Annotated[int, typer.Option(help="Nodes among which they are shared evenly.")] = 1,
    mtbf: Annotated[
        str | None, typer.Option(help="Mean time between the failures of one node: 200h, 30m, 7d. Default: none fails.")
    ] = None,
    preempt: Annotated[float, typer.Option(min=0, help="Announced preemptions per node and hour.")] = 0.0,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="Time between the checkpoints of a cell.")] = 300.0,
    seed: Annotated[int, typer.Option(min=0, help="Of failures and preemptions.")] = 0,
    device: Annotated[str | None, typer.Option(help="Assume this GPU (H100, A100, ...), not a calibration.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Assume this share of its peak, above 0, at most 1.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Cell times of this kind of worker, as calibrated.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GiB of each GPU: cells that fit side by side share one. Default: none do.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let the study run Python files beside it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """All of a study on a cluster that is not there, by the scheduling code of `run`: end, idle time, lost work."""
    import math

    from cluster.planning import read_study
    from cluster.scheduling import Bounds
    from cluster.simulation import Faults, simulate, simulation_lines
    from cluster.workload import simulated_nodes, workload
    from sweeps.errors import InputError
    from sweeps.units import parse_duration

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
    bounds = Bounds(**dict(planned.study.limits))
    found = simulate(work.jobs, cluster, edges=work.edges, bounds=bounds, faults=faults)
    if as_json:
        told = {"study": planned.study.name, "cells": len(work.jobs), "gpus": gpus, "nodes": nodes}
        print(json.dumps(told | {"times": work.times, "notes": work.notes} | found.to_json()))
        return
    print(f"{planned.study.name}: {len(work.jobs):,} cells on {gpus:,} GPUs in {nodes:,} nodes, simulated.")
    for line in simulation_lines(found):
        print(line)
    print(f"Cell times are {work.times}.")
    for note in work.notes:
        print(note[:1].upper() + note[1:])
