"""What a process says of its device, and that freed memory stays at hand."""

import ctypes
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from small import make_cell

from sweeps import devices
from sweeps.corpora import make_source, open_corpus, prepare
from sweeps.devices import bytes_available, cap_memory, choose_numerics, peak_flops, probe_micro_batch
from sweeps.errors import InputError
from sweeps.families import FAMILIES, build_model
from sweeps.losses import MeanLoss
from sweeps.memory import step_bytes

ROOT = Path(__file__).resolve().parents[2]
KEPT = """
import json, sys, torch
from pathlib import Path
from sweeps.devices import keep_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])
if sys.argv[1] == "kept":
    assert keep_freed_memory()
block = torch.ones(32_000_000)
held = resident()
del block
print(json.dumps(resident() / held))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt") or not Path("/proc/self/statm").exists(), reason="not glibc on Linux"
)
def test_what_a_step_frees_is_there_for_the_next_one() -> None:
    def still_resident(way: str) -> float:
        command = [sys.executable, "-c", KEPT, way]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return float(json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout))

    assert still_resident("kept") > 0.99
    assert still_resident("default") < 0.9


def test_the_micro_batch_of_a_small_cell_is_its_batch_and_a_probe_on_a_cpu_leaves_it(tmp_path: Path) -> None:
    source = make_source("markov", None, {"vocab_size": 8, "tokens": 10_000, "seed": 3})
    corpus = open_corpus(tmp_path, prepare(source, "bytes", tmp_path).fingerprint)
    cell = make_cell(corpus)
    assert bytes_available() > 0
    assert choose_numerics(cell).micro_batch == cell.sequences
    model = build_model(FAMILIES["llama"], cell.shape, init_std=0.02, seed=0)
    if not torch.cuda.is_available():
        assert probe_micro_batch(MeanLoss(model), model, cell, 7) == 7
    else:
        assert 1 <= probe_micro_batch(MeanLoss(model.cuda()), model, cell, 7) <= cell.sequences


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 1000])
def test_the_processes_of_a_node_plan_with_no_more_than_its_free_memory_together(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But each with a sequence at once where half of what is free holds it: the others may need less."""
    source = make_source("markov", None, {"vocab_size": 8, "tokens": 10_000, "seed": 3})
    cell = make_cell(open_corpus(tmp_path, prepare(source, "bytes", tmp_path).fingerprint))
    least, whole = (step_bytes(cell.shape, count, cell.precision).total for count in (1, cell.sequences))
    free = 2 * whole
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "host_bytes_free", lambda: free)
    monkeypatch.setattr(devices, "_host_part", 1.0)
    cap_memory(1.0, 1 / processes)
    chosen = choose_numerics(cell).micro_batch
    taken = step_bytes(cell.shape, chosen, cell.precision).total
    assert processes * taken <= free or (chosen == 1 and taken <= free / 2)
    assert (chosen == cell.sequences) == (processes <= 2)
    monkeypatch.setattr(devices, "host_bytes_free", lambda: least)
    with pytest.raises(InputError, match="does not fit"):
        choose_numerics(cell)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A3000 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_a_device_has_the_peak_of_its_own_name_or_none(name: str, peak: float | None) -> None:
    assert peak_flops(name, "bfloat16") == peak


def test_room_on_a_gpu_is_looked_for_after_what_an_earlier_cell_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source("markov", None, {"vocab_size": 8, "tokens": 10_000, "seed": 3})
    cell = make_cell(open_corpus(tmp_path, prepare(source, "bytes", tmp_path).fingerprint))
    gc.disable()
    left = torch.nn.Module()
    left.__dict__["itself"] = left
    there = weakref.ref(left)
    del left
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(devices, "bytes_available", lambda: 10**10 if there() is None else 0)
    try:
        assert choose_numerics(cell).micro_batch == cell.sequences
    finally:
        gc.enable()
