"""One graph of a small model's forward pass on a CPU, where Python between its operations costs as much as they do.

The graph is TorchScript's trace, run as it was recorded: the same operations, with the same bits, and no other engine
for the way back. What must never happen is a graph that stands for another function than the model. So only models
whose operations do not depend on their data are traced, losses and gradients of two batches are compared with the
model's own, to the bit, before the graph is used, and whatever goes wrong leaves the model's own way.
"""

import warnings
from typing import Any

import torch

from sweeps.accounting import flops_per_token
from sweeps.attention import unmasked
from sweeps.cell import Cell
from sweeps.losses import Loss, MeanLoss, is_dense, mean_entropy, plain_logits

LEAST_STEPS = 200
"""Tracing and comparing take as long as is saved in a hundred steps."""
MOST_FLOPS = 1e9
"""Of a micro-batch: beyond, its operations take so long that what is between them does not matter."""


class _Logits(torch.nn.Module):
    """Tokens (sequences, context) -> logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.model(tokens).logits


def traced(model: torch.nn.Module, cell: Cell, device: torch.device, micro_batch: int) -> Loss | None:
    """The mean loss of a cell's model by its graph, for micro-batches of so many sequences; others take the model's
    own way. None where it would not pay, or where no graph equals the model.

    The model is left without gradients and with its weights and random state as they were.
    """
    shape = (min(micro_batch, cell.sequences), cell.shape.context + 1)
    cost = shape[0] * cell.shape.context * flops_per_token(cell.shape)
    pays = device.type == "cpu" and cell.steps >= LEAST_STEPS and cost <= MOST_FLOPS
    if not pays or cell.precision != "float32" or not is_dense(model):
        return None
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(cell.shape.vocab_size, shape, generator=generator) for _ in range(3)]
    if not plain_logits(model, batches[0]):
        return None
    eager = MeanLoss(model)
    with torch.random.fork_rng(devices=[]):
        try:
            with unmasked(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # shapes become constants, and TorchScript is no longer developed
                graph = torch.jit.trace(_Logits(model), batches[0][:, :-1], check_trace=False)

            def loss(tokens: torch.Tensor) -> torch.Tensor:
                if tokens.shape != shape:
                    return eager(tokens)
                with torch.jit.optimized_execution(False):  # as recorded: what it would fuse has other bits
                    return mean_entropy(graph(tokens[:, :-1]), tokens[:, 1:])

            same = all(_same(model, eager, loss, batch) for batch in batches[1:])
        except Exception:  # of TorchScript: the model's own way works
            same = False
        finally:
            model.zero_grad(set_to_none=True)
    return loss if same else None


def _same(model: torch.nn.Module, eager: Loss, loss: Loss, batch: torch.Tensor) -> bool:
    """Whether two losses of a model and their gradients are equal to the bit."""
    found = []
    for each in (eager, loss):
        model.zero_grad(set_to_none=True)
        value = each(batch)
        value.backward()
        found.append([value.detach(), *(one.grad for one in model.parameters() if one.grad is not None)])
    return len(found[0]) == len(found[1]) and all(map(torch.equal, *found))
