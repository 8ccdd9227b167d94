"""What is saved by training cells together: stacks, trunks with their branches, and workers side by side.

Speeds are ratios of the workers' own training seconds (result.json) in runs through the command line that follow one
another, so Ray's start is not in them; wall-clock ratios of a stack hold all, the probe too.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import Place, Row, escala

STACKED = """
corpus: {{source: markov, options: {{tokens: 300000, vocab_size: 255, seed: 1}}}}
context: 128
families: [{family}]
grid: {{type: points, points: [{{size: 40000, tokens: {tokens}}}]}}
training: {{batch_tokens: {batch}, learning_rate: 0.004, schedule: constant}}
seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
stack: {stack}
"""
STEPS = 150

FAITHFUL = """
corpus: {source: markov, options: {tokens: 600000, vocab_size: 255, seed: 1}}
context: 64
families: [llama]
grid: {type: points, points: [{size: 10000, tokens: 153600}]}
training: {batch_tokens: 256, learning_rate: 0.005}
seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]
stack: STACK
"""

LADDER = """
corpus: {source: markov, options: {tokens: 4000000, vocab_size: 255, seed: 1}}
context: 128
families: [llama]
grid: {type: ladder, sizes: [20000], tokens_per_parameter: [10, 20, 40, 80]}
training: {batch_tokens: 1024, learning_rate: 0.01, schedule: {kind: wsd, cooldown_fraction: 0.2}}
"""

SIDE_BY_SIDE = """
corpus: {source: markov, options: {tokens: 300000, vocab_size: 255, seed: 1}}
context: 128
families: [llama]
grid: {type: points, points: [{size: 40000, tokens: 200000}]}
training: {batch_tokens: 1024, learning_rate: 0.004}
seeds: [0, 1, 2, 3, 4, 5, 6, 7]
stack: "off"
"""


def stacks(place: Place) -> list[Row]:
    rows = []
    for family, batch in (("llama", 128), ("llama", 256), ("llama", 1024), ("gpt2", 256)):
        ended: dict[str, list[dict[str, Any]]] = {}
        for stack in ("off", "auto"):
            name = f"stack-{family}-{batch}-{stack}"
            text = STACKED.format(family=family, batch=batch, tokens=batch * STEPS, stack=f'"{stack}"')
            escala("run", place.study(name, text), "--store", place.folder / name, "--workers", 2)
            ended[stack] = list(_results(place.folder / name))
        members = max(result["numerics"]["stack"] for result in ended["auto"])
        ratio = _training(ended["off"]) / _training(ended["auto"])
        rows.append(
            Row(
                what=f"stack: auto against off, {family} 40 k, {batch} tokens a batch",
                measured=ratio,
                unit="x",
                target=1.8 if batch <= 256 else 0.97,
                at_least=True,
                note=f"training seconds, 2 workers; the probe chose {_chosen(members)}",
            )
        )
    return rows


def fidelity(place: Place) -> list[Row]:
    """Whole runs of 24 seeds, stacked and alone: what a stack does to a final loss, against what a seed does."""
    ends: dict[str, dict[int, float]] = {}
    for stack in ("off", "8"):
        name = f"faithful-{stack}"
        text = FAITHFUL.replace("STACK", f'"{stack}"')
        escala("run", place.study(name, text), "--store", place.folder / name, "--workers", 2)
        told = json.loads(escala("status", name, "--store", place.folder / name, "--json").output)
        ends[stack] = {cell["seed"]: cell["val_loss_final"] for cell in told["cells"]}
    differences = [ends["8"][seed] - ends["off"][seed] for seed in ends["off"]]
    spread, of_seeds = statistics.stdev(differences), statistics.stdev(ends["off"].values())
    error = spread / len(differences) ** 0.5 or float("inf")  # no spread: every member has the bits of its solo run
    return [
        Row(
            what="stacked against solo, whole runs: mean difference over its standard error",
            measured=abs(statistics.mean(differences)) / error,
            target=2.07,
            note=f"{len(differences)} seeds, 600 steps; 2.07: 95% of a t with 23 degrees of freedom",
        ),
        Row(
            what="the same: spread of the differences over that of seeds",
            measured=spread / of_seeds,
            target=1 / 3,
            note=f"{spread:.2g} against {of_seeds:.2g} nats",
        ),
    ]


def trunks(place: Place) -> list[Row]:
    study, store = place.study("trunk-ladder", LADDER), place.folder / "trunk-ladder"
    told = json.loads(escala("plan", study, "--store", store, "--json").output)["totals"]
    escala("run", study, "--store", store, "--workers", 2)
    results = list(_results(store))
    spent, worth = (sum(result[name] for result in results) for name in ("flops_spent", "flops"))
    return [
        Row(
            what="FLOPs of a ladder {1,2,4,8} x from one trunk, f = .2",
            measured=spent / worth,
            unit="of separate runs",
            target=0.63,
            note=f"spent; the plan said {told['C_spent'] / told['C']:.4f}; exact 9.4/15 = .6267",
        )
    ]


def workers(place: Place) -> list[Row]:
    spans = []
    for count in (1, 2):
        store = place.folder / f"side-by-side-{count}"
        escala("run", place.study(f"side-{count}", SIDE_BY_SIDE), "--store", store, "--workers", count)
        ends = sorted(path.stat().st_mtime for path in (store / "cells").glob("*/result.json"))
        spans.append((ends[-1] - ends[count - 1]) / (len(ends) - count))  # from the first that every worker ended
    return [
        Row(
            what="2 workers against 1 on two cores",
            measured=spans[0] / spans[1],
            unit="x",
            target=1.8,
            at_least=True,
            note="cells a second, llama 40 k, once the workers are warm",
        )
    ]


def _results(store: Path) -> Iterator[dict[str, Any]]:
    for path in (store / "cells").glob("*/result.json"):
        yield json.loads(path.read_bytes())


def _training(results: list[dict[str, Any]]) -> float:
    return float(sum(result["seconds"]["train"] for result in results))


def _chosen(members: int) -> str:
    return f"stacks of {members}" if members > 1 else "no stack"
