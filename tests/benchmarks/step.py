"""The training step of the gpt2 family against the same step written straight in PyTorch (sweeps/benchmark.py)."""

import json
import sys

from measuring import Place, Row, timed


def step(place: Place) -> list[Row]:
    rows = []
    command = [sys.executable, "-m", "sweeps.benchmark", "--device", "cpu", "--json"]
    for line in timed(command).output.splitlines():
        found = json.loads(line)
        rows.append(
            Row(
                what=f"gpt2 step, {found['width']} wide, {found['depth']} layers",
                measured=found["gflops"],
                unit="GFLOP/s",
                target=found["gflops"] / found["ratio"],
                at_least=True,
                note=f"1 thread; plain PyTorch {found['other_gflops']:.1f}",
            )
        )
    return rows
