"""What a process says of its device, and that freed memory stays at hand."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import make_cell

from sweeps.corpora import make_source, open_corpus, prepare
from sweeps.devices import bytes_available, choose_numerics, probe_micro_batch
from sweeps.families import FAMILIES, build_model
from sweeps.losses import MeanLoss

ROOT = Path(__file__).resolve().parents[2]
FAULTS = """
import json, resource, sys, torch
from sweeps.devices import keep_freed_memory
assert sys.argv[1] == "default" or keep_freed_memory()
found = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(3_000_000) for _ in range(10)]
    del kept
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(found[-1]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_what_a_step_frees_is_there_for_the_next_one() -> None:
    def faults(way: str) -> int:
        command = [sys.executable, "-c", FAULTS, way]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return int(json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout))

    assert faults("kept") < faults("default") / 20


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
