"""The loss that suits a model and its device: eager, compiled where that pays, else as a graph where it has one."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from sweeps.accounting import flops_per_token
from sweeps.cell import Cell
from sweeps.compiling import maybe_compile
from sweeps.devices import probe_micro_batch
from sweeps.losses import Loss, MeanLoss
from sweeps.ranks import Ranks
from sweeps.tracing import traced
from sweeps.trainer import TrainerIO

COMPILE_FLOPS = {"cpu": 3e12, "cuda": 3e14}
"""Training FLOPs below which no device needs so long for a cell that compiling could pay."""


def suited_loss(
    cell: Cell,
    io: TrainerIO,
    model: torch.nn.Module,
    amplify: AbstractContextManager[Any],
    device: torch.device,
    ranks: Ranks | None,
) -> Loss:
    """A function of tokens. The first attempt of a cell finds out what its device bears and keeps it in the numerics;
    later ones follow it. Ranks do what all of them bear."""
    eager, numerics = MeanLoss(model), io.numerics
    shape = (numerics.micro_batch, cell.shape.context + 1)
    if io.numerics_kept:
        if not numerics.compile:
            return traced(model, cell, device, numerics.micro_batch) or eager
        return maybe_compile(model, torch.zeros(shape, dtype=torch.int64, device=device), 0, amplify, chosen=True)[0]

    def amplified(tokens: torch.Tensor) -> torch.Tensor:
        with amplify:
            return eager(tokens)

    workers = ranks.count if ranks else 1
    micro_batch = probe_micro_batch(amplified, model, cell, numerics.micro_batch, workers)
    if ranks:
        micro_batch = -ranks.most(-micro_batch)[0]
    found: tuple[Loss, bool] = eager, False
    if cell.tokens * flops_per_token(cell.shape) >= COMPILE_FLOPS[device.type]:
        tokens = torch.zeros((micro_batch, cell.shape.context + 1), dtype=torch.int64, device=device)
        found = maybe_compile(model, tokens, cell.steps * -(-cell.sequences // (micro_batch * workers)), amplify)
        if ranks and ranks.most(not found[1])[0]:
            found = eager, False
    if (micro_batch, found[1]) != (numerics.micro_batch, numerics.compile):
        io.choose(micro_batch=micro_batch, compile=found[1])
    return found[0] if found[1] else traced(model, cell, device, micro_batch) or eager
