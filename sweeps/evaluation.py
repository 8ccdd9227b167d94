"""Evaluation: the loss of a model over the fixed validation stream, whole or in part, by window and by document."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sweeps.corpora import Corpus
from sweeps.losses import token_losses
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
) -> Evaluation:
    """Loss over non-overlapping full-context windows of the validation stream: all of them, or those given.

    `working` is called after every forward pass: a long evaluation shows that it goes on.
    """
    model.eval()
    window_sums, document_sums = [], np.zeros(corpus.info.validation_documents)
    document_tokens = np.zeros(corpus.info.validation_documents, dtype=np.int64)
    for tokens, documents in _window_batches(corpus, context, windows):
        batch = to_device(tokens, device)
        with amplify:
            each = token_losses(model, batch).flatten().double().cpu().numpy()
        window_sums.append(each.reshape(len(tokens), context).sum(axis=1))
        document_sums += np.bincount(documents.ravel(), weights=each, minlength=len(document_sums))
        document_tokens += np.bincount(documents.ravel(), minlength=len(document_tokens))
        working()
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


def to_device(batch: np.ndarray, device: torch.device) -> torch.Tensor:
    """The batch as a tensor on the device; to a GPU it is copied from pinned memory while the CPU goes on."""
    tensor = torch.from_numpy(batch)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
