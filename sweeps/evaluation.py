"""Evaluation: the loss of a model over the fixed validation stream, whole or in part, by window and by document."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sweeps.corpora import Corpus
from sweeps.losses import Loss, token_losses
from sweeps.ranks import Ranks
from sweeps.schedules import EVALUATION_TOKENS, SUBSET_TOKENS


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

    def subset_loss(self, windows: np.ndarray, context: int) -> float:
        """Mean nats per token over some of the windows, where all were evaluated."""
        return float(self.window_sums[windows].sum() / (len(windows) * context))


def spread_windows(windows: int, context: int, tokens: int = SUBSET_TOKENS) -> np.ndarray:
    """Indices of windows that hold so many tokens, evenly spread over a validation stream of `windows`: by default
    those of the evaluations during a run."""
    count = min(windows, max(1, tokens // context))
    return np.unique(np.linspace(0, windows - 1, count).round().astype(np.int64))


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    corpus: Corpus,
    context: int,
    device: torch.device,
    amplify: AbstractContextManager[Any],
    windows: np.ndarray | None = None,
    working: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
    losses: Loss | None = None,
) -> Evaluation:
    """Loss over non-overlapping full-context windows of the validation stream: all of them, or those given.

    `working` is called after every forward pass: a long evaluation shows that it goes on. `ranks` share the passes, as
    many each, and all come to the same sums. `losses` are those of the model's tokens, where not by `token_losses`.
    """
    model.eval()
    chosen = np.arange(corpus.validation_windows(context)) if windows is None else windows
    size = max(1, EVALUATION_TOKENS // context)
    starts = range(0, len(chosen), size)
    window_sums, document_sums = np.zeros(len(chosen)), np.zeros(corpus.info.validation_documents)
    document_tokens = np.zeros(corpus.info.validation_documents, dtype=np.int64)
    rank, count = (ranks.rank, ranks.count) if ranks else (0, 1)
    for turn in range(rank, -(-len(starts) // count) * count, count):
        start = starts[min(turn, len(starts) - 1)]  # the last ones again, where there is none left for a rank
        tokens, documents = _windows(corpus, context, chosen[start : start + size], together=windows is None)
        batch = to_device(tokens, device)
        with amplify:
            each = (losses(batch) if losses else token_losses(model, batch)).flatten().double().cpu().numpy()
        if turn < len(starts):
            window_sums[start : start + size] = each.reshape(len(tokens), context).sum(axis=1)
            document_sums += np.bincount(documents.ravel(), weights=each, minlength=len(document_sums))
            document_tokens += np.bincount(documents.ravel(), minlength=len(document_tokens))
        working()
    model.train()
    if ranks:
        for sums in (window_sums, document_sums, document_tokens):
            ranks.add(torch.from_numpy(sums))
    return Evaluation(window_sums, document_sums, document_tokens)


def _windows(corpus: Corpus, context: int, chosen: np.ndarray, *, together: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and documents of windows, which may lie `together` in the stream."""
    if together:
        return corpus.validation_batch(int(chosen[0]), len(chosen), context)
    single = [corpus.validation_batch(int(index), 1, context) for index in chosen]
    return np.concatenate([tokens for tokens, _ in single]), np.concatenate([documents for _, documents in single])


def to_device(batch: np.ndarray, device: torch.device) -> torch.Tensor:
    """The batch as a tensor on the device; to a GPU it is copied from pinned memory while the CPU goes on."""
    tensor = torch.from_numpy(batch)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
