"""torch.compile where it pays: a probe times a few steps eager and compiled, and the faster way is kept.

Compiling takes a minute or so and moves losses by rounding. So it is never tried on a cell that trains for less than
some minutes, nor where the compilers are missing, and a cell keeps for life what its first attempt chose.
"""

import importlib.util
import os
import shutil
import statistics
import time
from contextlib import AbstractContextManager
from typing import Any

import torch

from sweeps.losses import Loss, MeanLoss

LEAST_SECONDS = 300.0
"""Of eager training that is left: below, compiling is not tried."""
LEAST_GAIN = 1.05
"""Eager seconds over compiled ones from which on the compiled way is kept."""
PROBE_STEPS = 5

_last: tuple[torch.Size, ...] = ()
"""The shapes of what this process has compiled last."""


def can_compile(device: torch.device) -> bool:
    """Whether the compilers are here: one for C++ on a CPU; triton, and one for C, for a GPU."""
    if device.type == "cpu":
        return any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++")))
    compiler = any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang")))
    return compiler and importlib.util.find_spec("triton") is not None


def maybe_compile(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    forward_passes: int,
    amplify: AbstractContextManager[Any],
    *,
    chosen: bool | None = None,
    least_seconds: float = LEAST_SECONDS,
) -> tuple[Loss, bool]:
    """The loss of a model as a function of tokens, and whether it is compiled (`Numerics.compile`).

    `tokens` is a micro-batch on the device, `forward_passes` how many of them are left to train on. `chosen` is what
    the cell's first attempt found: it is kept without a probe where it can be. The model is left without gradients and
    with its weights and random state as they were.
    """
    eager = MeanLoss(model)
    if chosen is False or not can_compile(tokens.device):
        return eager, False
    if chosen:
        return _compiled(eager, tokens), True
    devices = [tokens.device] if tokens.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            plain = _seconds(eager, model, tokens, amplify)
            if plain * forward_passes < least_seconds:
                return eager, False
            compiled = _compiled(eager, tokens)
            pays = plain > LEAST_GAIN * _seconds(compiled, model, tokens, amplify)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            torch.compiler.reset()  # a compiler that fails leaves the eager way, which works
            return eager, False
    return (compiled, True) if pays else (eager, False)


def _compiled(eager: MeanLoss, tokens: torch.Tensor) -> Loss:
    """The loss as it is compiled at its first call, or as one of these shapes was before.

    Of one function torch keeps a few compiled forms in a process, for each shape one; further ones run eager, without
    an error. A worker trains many shapes, so those of the last one are forgotten with it.
    """
    global _last
    shapes = (tokens.shape, *(parameter.shape for parameter in eager.parameters()))
    if shapes != _last:
        torch.compiler.reset()
        _last = shapes
    compiled: Loss = torch.compile(eager, dynamic=False)
    return compiled


def _seconds(loss: Loss, model: torch.nn.Module, tokens: torch.Tensor, amplify: AbstractContextManager[Any]) -> float:
    """Median seconds of a forward and a backward pass, after two to warm up."""
    found = []
    for _ in range(PROBE_STEPS + 2):
        began = time.perf_counter()
        with amplify:
            value = loss(tokens)
        value.backward()
        if tokens.device.type == "cuda":
            torch.cuda.synchronize(tokens.device)
        found.append(time.perf_counter() - began)
        model.zero_grad(set_to_none=True)
    return statistics.median(found[2:])
