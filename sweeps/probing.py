"""Whether a stack pays: some steps of its members one by one and together, timed on the device that is to train them.

Nothing is stacked on a guess: below a few hundred tokens a batch a stack of tiny models is twice as fast, with larger
models or batches it only takes more memory. What a probe found is kept in the store (sweeps/stacks.py).
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sweeps.cell import Cell, cell_from_identity
from sweeps.devices import choose_numerics
from sweeps.errors import InputError
from sweeps.families import find_family
from sweeps.models import make_model, tensor_factors
from sweeps.stacking import Solo, Stack, precision
from sweeps.stacks import LEAST_GAIN, known_gain, note_gain
from sweeps.store import Store, read_cell
from sweeps.tracing import traced

WARM_TURNS, PROBE_TURNS = 2, 7
PROBE_SECONDS = 10.0
"""A probe that has taken so long judges by the turns that it has made."""


def pays(store: Store, cell_ids: Sequence[str], base_dir: Path | None = None) -> bool:
    """Whether these cells train faster as one program on this device: by an earlier probe, or by one made now.

    A family of the user's own is looked up from `base_dir`; None allows no such code.

    A probe takes a second or so for models that small, and at most a turn longer than `PROBE_SECONDS`. What cannot be
    stacked at all (a model of the user's own that `vmap` does not take) does not pay.
    """
    cells = [cell_from_identity(read_cell(store, cell_id)["identity"]) for cell_id in cell_ids]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gain = known_gain(store, cells[0], len(cells), device)
    if gain is None:
        try:
            gain, why = probe(cells, torch.device(device), base_dir), None
        except (RuntimeError, NotImplementedError, InputError) as error:
            gain, why = 0.0, f"{type(error).__name__}: {error}"
        note_gain(store, cells[0], len(cells), device, gain, why=why)
    return gain >= LEAST_GAIN


def probe(cells: Sequence[Cell], device: torch.device, base_dir: Path | None = None) -> float:
    """How many times faster these cells make a step together than one by one, forward, backward and optimizer: the
    median over turns of both."""
    cell = cells[0]
    family = find_family(cell.family, allow_code=base_dir is not None, base_dir=base_dir or Path())
    micro_batch = choose_numerics(cell, stack=len(cells)).micro_batch  # raises where their memory does not suffice
    solo_batch = choose_numerics(cell, stack=1).micro_batch
    amplify = precision(cell.precision, device)

    models = [make_model(family, one, device.type).to(device).train() for one in (cell, *cells)]
    factors = tensor_factors(models[0], cell.family, cell.shape, cell.parametrisation)
    solo = Solo(models[0], cell.optimizer, traced(models[0], cell, device, solo_batch), factors)
    stack = Stack(models[1:], [one.optimizer for one in cells], factors)
    stack.trace(cell, cell.steps, micro_batch)
    generator = torch.Generator().manual_seed(0)
    size = (len(cells), cell.sequences, cell.shape.context + 1)
    batch = torch.randint(cell.shape.vocab_size, size, generator=generator).to(device)

    def seconds(program: Solo | Stack, part: torch.Tensor) -> float:
        began = time.perf_counter()
        program.backward(part, micro_batch if program is stack else solo_batch, amplify)
        float(program.table.step(range(len(part)))[0])  # the device is waited for
        return time.perf_counter() - began

    turns: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(turns) < WARM_TURNS + PROBE_TURNS and (not turns or time.perf_counter() - start < PROBE_SECONDS):
        turns.append((seconds(solo, batch[:1]), seconds(stack, batch)))
    counted = turns[WARM_TURNS:] or turns[-1:]
    return statistics.median(len(cells) * alone / together for alone, together in counted)
