"""The memory model holds against what processes really take, and a batch is cut into parts that fit."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sweeps.accounting import Shape, parameters
from sweeps.errors import InputError
from sweeps.families import FAMILIES, resolve_options
from sweeps.memory import choose_micro_batch, demand, step_bytes
from sweeps.sizes import shape_for

ROOT = Path(__file__).resolve().parents[2]
SEQUENCES, CONTEXT, VOCABULARY = 8, 256, 512
SIZES = (100_000, 800_000, 3_200_000)

MEASURE = """
import ctypes, gc, json, sys, torch
from sweeps.cell import Optimizer
from sweeps.families import FAMILIES, build_model, resolve_options
from sweeps.sizes import shape_for
from sweeps.stacking import Solo, Stack, precision as amplified

torch.set_num_threads(1)
family, precision = FAMILIES[sys.argv[1]], sys.argv[2]
members, sequences, context, vocabulary = map(int, sys.argv[3:7])
recipe = Optimizer(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_norm=1.0)

def resident(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def steps(size, sequences):
    options = resolve_options(family)
    shape = shape_for(family, size, vocab_size=vocabulary, context=context, options=options)
    models = [build_model(family, shape, init_std=0.02, seed=0, options=options) for _ in range(members)]
    program = Solo(models[0], recipe) if members == 1 else Stack(models, [recipe] * members)
    for _ in range(2):
        batch = torch.randint(vocabulary, (members, sequences, context + 1))
        program.backward(batch, sequences, amplified(precision, torch.device("cpu")))
        program.table.step(range(members))

steps(60_000, 1)
found = []
for size in map(float, sys.argv[7:]):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
    before = resident("VmRSS")
    steps(size, sequences)
    found.append(resident("VmHWM") - before)
print(json.dumps(found))
"""


def shape_of(family: str, size: float, context: int = CONTEXT, vocabulary: int = VOCABULARY) -> Shape:
    options = resolve_options(FAMILIES[family])
    return shape_for(FAMILIES[family], size, vocab_size=vocabulary, context=context, options=options)


def measured(family: str, precision: str, members: int, sequences: int, context: int, sizes: Sequence[float]) -> Any:
    """Bytes that a step takes at its peak, by size, in a process of its own."""
    arguments = [family, precision, *map(str, (members, sequences, context, VOCABULARY, *sizes))]
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(process.stdout)


measures = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="measures as Linux and glibc allow")


@pytest.mark.slow
@measures
@pytest.mark.parametrize(("family", "precision"), [("gpt2", "float32"), ("llama", "float32"), ("qwen3", "bfloat16")])
def test_the_model_is_within_a_factor_of_what_a_step_really_takes(family: str, precision: str) -> None:
    found = measured(family, precision, 1, SEQUENCES, CONTEXT, SIZES)
    expected = [step_bytes(shape_of(family, size), SEQUENCES, precision).total for size in SIZES]
    ratios = [model / real for model, real in zip(expected, found, strict=True)]
    assert all(1 / 1.5 < ratio < 1.5 for ratio in ratios), (ratios, found)


@pytest.mark.slow
@measures
@pytest.mark.parametrize(("family", "sizes"), [("llama", (20_000, 80_000, 200_000)), ("mixtral", (60_000, 30_000))])
def test_so_it_is_for_a_stack_whose_tokens_get_copies_of_their_experts(family: str, sizes: tuple[float, ...]) -> None:
    members, sequences, context = 4, 4, 128
    found = measured(family, "float32", members, sequences, context, sizes)
    expected = [step_bytes(shape_of(family, size, context), sequences, "float32", stack=members) for size in sizes]
    ratios = [model.total / real for model, real in zip(expected, found, strict=True)]
    assert all(1 / 1.5 < ratio < 1.5 for ratio in ratios), (ratios, found)


def test_the_whole_batch_where_it_fits_and_else_the_most_in_equal_parts() -> None:
    shape = shape_of("llama", 800_000)
    for sequences in (1, 7, 12, 16, 97):
        for wanted in range(1, sequences + 1):
            room = step_bytes(shape, wanted, "float32").total
            found = choose_micro_batch(shape, sequences, "float32", room)
            assert wanted / 2 < found <= wanted
            assert sequences % found == 0 or not any(
                found / 2 < size <= found for size in range(1, wanted + 1) if sequences % size == 0
            )
        assert choose_micro_batch(shape, sequences, "float32", 10**12) == sequences


def test_what_does_not_fit_even_at_one_sequence_says_what_it_needs() -> None:
    shape = shape_of("gpt2", 1e9, context=1024, vocabulary=50_257)
    with pytest.raises(InputError, match=r"one sequence of 1,024 tokens needs about 20\.\d GB, and 8 GB are free"):
        choose_micro_batch(shape, 64, "float32", 8_000_000_000)
    with pytest.raises(InputError, match="a stack of 9 models"):
        choose_micro_batch(shape, 64, "bfloat16", 80_000_000_000, device="cuda", stack=9)


def test_demand_grows_with_what_is_asked() -> None:
    small, large = shape_of("llama", 100_000), shape_of("llama", 6_400_000)
    assert demand(small, 8, "float32") < demand(small, 16, "float32") < demand(large, 16, "float32")
    assert demand(large, 16, "bfloat16") < demand(large, 16, "float32")
    assert 4 * step_bytes(small, 8, "float32").state == step_bytes(small, 8, "float32", stack=4).state


def test_large_vocabularies_are_counted_by_the_chunk() -> None:
    shape = shape_of("gpt2", 12_800_000, vocabulary=50_257)
    whole = 3 * 64 * CONTEXT * 50_257 * 4
    assert step_bytes(shape, 64, "float32").loss < whole / 20


KEPT = """
import json, sys, torch
import torch.distributed as dist
from sweeps.cell import Optimizer
from sweeps.families import FAMILIES, build_model
from sweeps.ranks import Ranks
from sweeps.sharding import Sharded
from sweeps.sizes import shape_for
from sweeps.stacking import precision

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
recipe = Optimizer(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_norm=1.0)
shape = shape_for(FAMILIES["llama"], float(sys.argv[1]), vocab_size=64, context=4)
model, device = build_model(FAMILIES["llama"], shape, init_std=0.02, seed=0), torch.device("cpu")
program, kept = Sharded(Ranks(0, 1, dist.group.WORLD), model, recipe, None, device), {}

def keep(tensor):
    if tensor.dtype == torch.bfloat16:
        kept[tensor.untyped_storage().data_ptr()] = tensor
    return tensor

with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
    program.backward(torch.randint(64, (1, 1, 5)), 1, precision("bfloat16", device))
print(json.dumps(sum(one.untyped_storage().nbytes() for one in kept.values())))
"""


@pytest.mark.slow
def test_a_model_in_parts_keeps_a_whole_copy_in_bfloat16_for_the_way_back() -> None:
    command, size = [sys.executable, "-c", KEPT], 3_200_000
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([*command, str(size)], env=environment, check=True, capture_output=True, text=True)
    shape = shape_for(FAMILIES["llama"], size, vocab_size=64, context=4)
    short, full = (step_bytes(shape, 1, precision, shards=4).state for precision in ("bfloat16", "float32"))
    kept = json.loads(process.stdout)
    assert shape.depth >= 4
    assert kept > 1.8 * parameters(shape).total, "the matrices, at two bytes a number"
    assert 0.9 * kept < short - full < 1.2 * kept
