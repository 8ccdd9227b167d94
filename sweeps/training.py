"""Training: one cell, from random weights or its last checkpoint, to its final validation loss.

The loop never waits for the device between log points: losses and norms stay there as tensors until a row is due.
Evaluations are not counted in C. A run that is interrupted at any step and goes on gives the same bits as one that was
not, at equal numerics: `snapshot` holds everything that the next step depends on, besides the cell itself.
"""

import math
import resource
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from sweeps.accounting import flops_per_token
from sweeps.cell import Cell
from sweeps.devices import peak_flops
from sweeps.evaluation import Evaluation, evaluate, evaluation_steps, subset_windows, to_device
from sweeps.families import build_model, find_family
from sweeps.optimizers import make_optimizer
from sweeps.schedules import fraction, stable_steps
from sweeps.trainer import Outcome, TrainerIO

TRAIN_ROWS = 50
"""Rows of training metrics a run, besides those at the evaluations."""
DIVERGED_NATS = 1.0
"""A mean training loss so far above the loss at start is high."""
DIVERGED_NORM = 1000.0
"""A gradient norm of so many times the median of the rows before is high."""
DIVERGED_ROWS = 3
"""Rows in a row that are high: the run has diverged."""


@dataclass
class Progress:
    """How far a run is, in plain values: what a checkpoint keeps besides tensors."""

    start: float
    """Validation loss before the first step, over the subset."""
    step: int = 0
    high: int = 0
    """Rows in a row whose loss or gradient was high."""
    norms: list[float] = field(default_factory=list)
    row: dict[str, float] = field(default_factory=dict)
    """The metrics of the last row."""

    def judge(self, loss: float, norm: float, tokens: int) -> str | None:
        """Take a row in; say why the run has diverged, if it has."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            return f"training {what} not finite after {tokens:,} tokens (start: {self.start:.4g})"
        blown = len(self.norms) >= 10 and norm > DIVERGED_NORM * statistics.median(self.norms)
        self.high = self.high + 1 if loss > self.start + DIVERGED_NATS or blown else 0
        self.norms.append(norm)
        if self.high < DIVERGED_ROWS:
            return None
        if blown:
            return f"gradient norm {norm:.4g} after {tokens:,} tokens, {DIVERGED_NORM:g} times what it was"
        return f"training loss {loss:.4g} nats after {tokens:,} tokens (start: {self.start:.4g})"


def train(cell: Cell, io: TrainerIO) -> Outcome:
    """Train a cell, from its last checkpoint where it has one, and evaluate it.

    Rows are logged at log-spaced evaluations and at even distances between. A loss or gradient that is not finite, or
    that stays far above where it was, ends the cell as diverged.
    """
    numerics, corpus, context = io.numerics, io.corpus, cell.shape.context
    torch.set_num_threads(numerics.threads)
    device = torch.device("cpu" if numerics.device == "cpu" else "cuda")
    clock = _Clock()
    losses: list[torch.Tensor] = []
    with clock("build"):
        family = find_family(cell.family, allow_code=io.base_dir is not None, base_dir=io.base_dir or Path())
        model = build_model(family, cell.shape, init_std=cell.init_std, seed=cell.seed, options=dict(cell.options))
        model.to(device).train()
        optimizer = make_optimizer(model, cell.optimizer)
        amplify = _precision(cell.precision, device)
        subset = subset_windows(corpus.validation_windows(context), context)
        state = io.restore()
    if state is None:
        with clock("evaluate"):
            progress = Progress(start=evaluate(model, corpus, context, device, amplify, subset).loss)
        io.log(0, {"val_loss": progress.start, "flops": 0.0, "optimizer_step": 0.0})
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        _set_random_state(state["random"])
        progress = Progress(**state["progress"])
        if io.trunk is None or io.trunk["tokens"] < progress.step * cell.batch_tokens:
            losses += [loss.to(device) for loss in state["losses"]]
        # else they are of the trunk's unfinished row; a run from scratch ends a row where it would branch off

    def snapshot() -> dict[str, Any]:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": _random_state()}
        return {**parts, "losses": losses, "progress": vars(progress)}

    evaluations = evaluation_steps(cell.steps)
    between = max(1, cell.steps // TRAIN_ROWS)
    rows = evaluations | set(range(between, cell.steps, between)) | {stable_steps(cell), cell.steps}
    cost = flops_per_token(cell.shape)
    peak = peak_flops(numerics.device, cell.precision)
    first = since = progress.step
    logged_seconds = 0.0
    reason: str | None = None
    for step in range(first + 1, cell.steps + 1):
        tokens = step * cell.batch_tokens
        with clock("train"):
            middle = (step - 0.5) * cell.batch_tokens
            rate = cell.optimizer.learning_rate * fraction(cell.schedule, middle, cell.tokens)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = to_device(corpus.batch(cell.data_seed, step - 1, cell.sequences, context), device)
            losses.append(_backward(model, batch, numerics.micro_batch, amplify))
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cell.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            progress.step = step
            if step in rows:
                mean_loss, last_norm = float(torch.stack(losses).mean()), float(norm)  # the device is waited for here
        if step in rows:
            pace = (step - since) * cell.batch_tokens / max(clock.seconds["train"] - logged_seconds, 1e-9)
            since, logged_seconds = step, clock.seconds["train"]
            losses.clear()
            reason = progress.judge(mean_loss, last_norm, tokens)
            if reason is not None:
                fate = {"diverged_at_tokens": float(tokens), "learning_rate": rate, "optimizer_step": float(step)}
                io.log(tokens, fate)
                break
            progress.row = {
                "train_loss": mean_loss,
                "learning_rate": rate,
                "gradient_norm": last_norm,
                "tokens_per_second": pace,
                "flops": float(tokens * cost),
                "optimizer_step": float(step),
            }
            if peak:
                progress.row["mfu"] = pace * cost / peak
            if step in evaluations:
                with clock("evaluate"):
                    progress.row["val_loss"] = evaluate(model, corpus, context, device, amplify, subset).loss
            if step < cell.steps:  # the last row waits for the final evaluation
                io.log(tokens, progress.row)
        io.checkpoint(tokens, snapshot, last=step == cell.steps)

    final: Evaluation | None = None
    if reason is None:
        with clock("evaluate"):
            final = evaluate(model, corpus, context, device, amplify, working=io.progress)
        row = progress.row
        if math.isfinite(final.loss) and final.loss <= progress.start:
            row |= {"val_loss": final.subset_loss(subset, context), "val_loss_final": final.loss}
            row |= {"val_bpb_final": corpus.info.bits_per_byte(final.loss)}
        else:
            reason = f"final validation loss {final.loss:.4g} is above its start ({progress.start:.4g})"
            final = None
        io.log(cell.tokens, row)
    return Outcome(
        state="finished" if final else "diverged",
        reason=reason,
        val_loss_final=final.loss if final else None,
        val_bpb_final=corpus.info.bits_per_byte(final.loss) if final else None,
        loss_at_start=progress.start,
        steps=progress.step,
        seconds=clock.seconds,
        tokens_per_second=(progress.step - first) * cell.batch_tokens / max(clock.seconds["train"], 1e-9),
        peak_memory_bytes=_peak_memory_bytes(),
        document_losses=final.document_sums if final else None,
        document_tokens=final.document_tokens if final else None,
    )


def _backward(
    model: torch.nn.Module, batch: torch.Tensor, micro_batch: int, amplify: AbstractContextManager[Any]
) -> torch.Tensor:
    """Gradients of the mean loss of a batch, in micro-batches of so many sequences. Returns the loss."""
    parts = batch.split(micro_batch)
    total: torch.Tensor | None = None
    for part in parts:
        with amplify:
            logits = model(part[:, :-1]).logits
            loss = cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
        if len(parts) > 1:
            loss = loss * (len(part) / len(batch))
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """float32 throughout, or bfloat16 matmuls over float32 weights."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _peak_memory_bytes() -> int:
    """The process's largest resident size so far; Linux counts it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Clock:
    """Wall-clock seconds by part of the work: `with clock("train"): ...`."""

    def __init__(self) -> None:
        self.seconds = {"build": 0.0, "train": 0.0, "evaluate": 0.0}
        self._part, self._since = "", 0.0

    def __call__(self, part: str) -> "_Clock":
        self._part = part
        return self

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._part] += time.perf_counter() - self._since
