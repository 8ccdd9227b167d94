"""Training: one cell, from random weights to its final validation loss.

The loop never waits for the device between log points: losses and norms stay there as tensors until a row is due.
Evaluations are not counted in C.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from sweeps.accounting import flops_per_token
from sweeps.cell import Cell
from sweeps.corpora import Corpus
from sweeps.devices import Numerics, peak_flops
from sweeps.families import build_model, find_family
from sweeps.optimizers import make_optimizer
from sweeps.schedules import fraction

EVALUATIONS_PER_DECADE = 10
FIRST_EVALUATION = 0.01
"""Evaluations during the run start at this share of its steps."""
SUBSET_TOKENS = 8192
"""Validation tokens of an evaluation during the run: windows spread evenly over the fixed stream."""
TRAIN_ROWS = 50
"""Rows of training metrics a run, besides those at the evaluations."""
EVALUATION_TOKENS = 8192
"""Tokens of one forward pass in an evaluation."""
DIVERGED_NATS = 1.0
DIVERGED_ROWS = 3
"""A run whose mean training loss stands this far above its start for so many rows in a row has diverged."""

Log = Callable[[int, Mapping[str, float]], None]
"""Takes tokens seen and the metrics there."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a cell ended. Losses in nats per token; None where the cell diverged."""

    state: str
    """finished or diverged."""
    reason: str | None
    val_loss_final: float | None
    val_bpb_final: float | None
    loss_at_start: float
    steps: int
    seconds: dict[str, float]
    """build, train, evaluate: wall-clock seconds."""
    tokens_per_second: float
    peak_memory_bytes: int
    document_losses: np.ndarray | None
    """Summed loss of each validation document in the final evaluation, float64."""
    document_tokens: np.ndarray | None


@dataclass(frozen=True)
class Evaluation:
    """Summed losses over validation windows and over documents."""

    window_sums: np.ndarray
    document_sums: np.ndarray
    document_tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return float(self.document_sums.sum() / self.document_tokens.sum())


def train(cell: Cell, corpus: Corpus, numerics: Numerics, log: Log, *, base_dir: Path | None = None) -> Outcome:
    """Train a cell and evaluate it.

    `base_dir` is where a user's own family file lives; None allows no such code. Rows go to `log` at log-spaced
    evaluations and at even distances between. A loss that is not finite, or that stays far above its start, ends the
    cell as diverged.
    """
    torch.set_num_threads(numerics.threads)
    device = torch.device("cpu" if numerics.device == "cpu" else "cuda")
    clock = _Clock()
    with clock("build"):
        family = find_family(cell.family, allow_code=base_dir is not None, base_dir=base_dir or Path())
        model = build_model(family, cell.shape, init_std=cell.init_std, seed=cell.seed, options=dict(cell.options))
        model.to(device).train()
        optimizer = make_optimizer(model, cell.optimizer)
        amplify = _precision(cell.precision, device)
        subset = subset_windows(corpus.validation_windows(cell.shape.context), cell.shape.context)
    with clock("evaluate"):
        start = evaluate(model, corpus, cell.shape.context, device, amplify, subset).loss
    log(0, {"val_loss": start, "flops": 0.0, "optimizer_step": 0.0})

    evaluations = evaluation_steps(cell.steps)
    rows = evaluations | set(range(max(1, cell.steps // TRAIN_ROWS), cell.steps, max(1, cell.steps // TRAIN_ROWS)))
    cost = flops_per_token(cell.shape)
    peak = peak_flops(numerics.device, cell.precision)
    losses: list[torch.Tensor] = []
    high = 0
    reason = None
    logged_seconds = 0.0
    step = 0
    for step in range(1, cell.steps + 1):
        with clock("train"):
            rate = cell.optimizer.learning_rate * fraction(cell.schedule, (step - 0.5) * cell.batch_tokens, cell.tokens)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = _to_device(corpus.batch(cell.data_seed, step - 1, cell.sequences, cell.shape.context), device)
            with amplify:
                logits = model(batch[:, :-1]).logits
                loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cell.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if step not in rows and step < cell.steps:
                continue
            mean_loss = float(torch.stack(losses).mean())  # the device is waited for here, and only here
        tokens = step * cell.batch_tokens
        pace = len(losses) * cell.batch_tokens / max(clock.seconds["train"] - logged_seconds, 1e-9)
        logged_seconds = clock.seconds["train"]
        losses.clear()
        high = high + 1 if mean_loss > start + DIVERGED_NATS else 0
        if not math.isfinite(mean_loss) or high >= DIVERGED_ROWS:
            found = f"{mean_loss:.4g} nats" if math.isfinite(mean_loss) else "not finite"
            reason = f"training loss {found} after {tokens:,} tokens (start: {start:.4g})"
            log(tokens, {"diverged_at_tokens": float(tokens), "learning_rate": rate, "optimizer_step": float(step)})
            break
        metrics = {
            "train_loss": mean_loss,
            "learning_rate": rate,
            "gradient_norm": float(norm),
            "tokens_per_second": pace,
            "flops": float(tokens * cost),
            "optimizer_step": float(step),
        }
        if peak:
            metrics["mfu"] = pace * cost / peak
        if step in evaluations:
            with clock("evaluate"):
                metrics["val_loss"] = evaluate(model, corpus, cell.shape.context, device, amplify, subset).loss
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if step < cell.steps:  # the last row waits for the final evaluation
            log(tokens, metrics)

    final = None
    if reason is None:
        with clock("evaluate"):
            final = evaluate(model, corpus, cell.shape.context, device, amplify)
        if not math.isfinite(final.loss) or final.loss > start:
            reason, final = f"final validation loss {final.loss:.4g} is above its start ({start:.4g})", None
        if final is not None:
            metrics["val_loss"] = float(final.window_sums[subset].sum() / (len(subset) * cell.shape.context))
            metrics |= {"val_loss_final": final.loss, "val_bpb_final": corpus.info.bits_per_byte(final.loss)}
        log(cell.tokens, metrics)
    return Outcome(
        state="finished" if final else "diverged",
        reason=reason,
        val_loss_final=final.loss if final else None,
        val_bpb_final=corpus.info.bits_per_byte(final.loss) if final else None,
        loss_at_start=start,
        steps=step,
        seconds=clock.seconds,
        tokens_per_second=step * cell.batch_tokens / max(clock.seconds["train"], 1e-9),
        peak_memory_bytes=_peak_memory_bytes(),
        document_losses=final.document_sums if final else None,
        document_tokens=final.document_tokens if final else None,
    )


def evaluation_steps(steps: int) -> set[int]:
    """The steps of the evaluations during a run: ten a decade, evenly in log tokens, from 1 % of the run on.

    The last step is not among them: the final evaluation covers it.
    """
    first = math.floor(EVALUATIONS_PER_DECADE * math.log10(max(1.0, FIRST_EVALUATION * steps)))
    last = math.ceil(EVALUATIONS_PER_DECADE * math.log10(steps)) + 1
    wanted = {round(10 ** (index / EVALUATIONS_PER_DECADE)) for index in range(first, last)}
    return {step for step in wanted if 1 <= step < steps}


def subset_windows(windows: int, context: int) -> np.ndarray:
    """Indices of the windows, evenly spread over the validation stream, that evaluations during a run use."""
    count = min(windows, max(1, SUBSET_TOKENS // context))
    return np.unique(np.linspace(0, windows - 1, count).round().astype(np.int64))


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    corpus: Corpus,
    context: int,
    device: torch.device,
    amplify: AbstractContextManager[Any],
    windows: np.ndarray | None = None,
) -> Evaluation:
    """Loss over non-overlapping full-context windows of the validation stream: all of them, or those given."""
    model.eval()
    window_sums, document_sums = [], np.zeros(corpus.info.validation_documents)
    document_tokens = np.zeros(corpus.info.validation_documents, dtype=np.int64)
    for tokens, documents in _window_batches(corpus, context, windows):
        batch = _to_device(tokens, device)
        with amplify:
            logits = model(batch[:, :-1]).logits
        each = (
            cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none").double().cpu().numpy()
        )
        window_sums.append(each.reshape(len(tokens), context).sum(axis=1))
        document_sums += np.bincount(documents.ravel(), weights=each, minlength=len(document_sums))
        document_tokens += np.bincount(documents.ravel(), minlength=len(document_tokens))
    model.train()
    return Evaluation(np.concatenate(window_sums), document_sums, document_tokens)


def _window_batches(
    corpus: Corpus, context: int, windows: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    size = max(1, EVALUATION_TOKENS // context)
    if windows is None:
        total = corpus.validation_windows(context)
        for start in range(0, total, size):
            yield corpus.validation_batch(start, min(size, total - start), context)
        return
    single = [corpus.validation_batch(int(index), 1, context) for index in windows]
    for start in range(0, len(single), size):
        chunk = single[start : start + size]
        yield np.concatenate([tokens for tokens, _ in chunk]), np.concatenate([documents for _, documents in chunk])


def _precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """float32 throughout, or bfloat16 matmuls over float32 weights."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _to_device(batch: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(batch)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


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
