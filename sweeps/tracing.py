"""One graph of a small model's forward pass on a CPU, where Python between its operations costs as much as they do, and
one of a stack's, where `vmap` does.

The graph is TorchScript's trace, run as it was recorded: the same operations, with the same bits, and no other engine
for the way back. What must never happen is a graph that stands for another function than the model. So only models
whose operations do not depend on their data are traced, losses and gradients of two batches are compared with the
model's own, to the bit, before the graph is used, and whatever goes wrong leaves the model's own way.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.func import functional_call

from sweeps.accounting import flops_per_token
from sweeps.attention import stackable, unmasked
from sweeps.cell import Cell
from sweeps.losses import Loss, MeanLoss, StackLoss, is_dense, mean_entropy, plain_logits, stack_loss

LEAST_STEPS = 200
"""Tracing and comparing take as long as is saved in a hundred steps, in two hundred of a stack."""
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
    if not _pays(model, cell, device, cell.steps, shape[0]):
        return None
    batches, eager = _batches(cell, shape), MeanLoss(model)
    if not plain_logits(model, batches[0]):
        return None
    with torch.random.fork_rng(devices=[]):
        try:
            with unmasked(model):
                graph = _trace(_Logits(model), batches[0][:, :-1])

            def loss(tokens: torch.Tensor) -> torch.Tensor:
                if tokens.shape != shape:
                    return eager(tokens)
                return mean_entropy(_run(graph, tokens[:, :-1]), tokens[:, 1:])

            same = _same(eager, loss, list(model.parameters()), batches[1:])
        except Exception:  # of TorchScript: the model's own way works
            same = False
    return loss if same else None


def traced_stack(
    model: torch.nn.Module, parameters: Mapping[str, torch.Tensor], cell: Cell, steps: int, micro_batch: int
) -> StackLoss | None:
    """The mean losses of a stack of such models by its graph, over so many steps; otherwise as of `traced`.

    `parameters` are the members' by name, each (members, ...), and are left as they were.
    """
    names, values = list(parameters), list(parameters.values())
    shape = (len(values[0]), min(micro_batch, cell.sequences), cell.shape.context + 1)
    if not _pays(model, cell, values[0].device, steps, shape[0] * shape[1]):
        return None
    batches, eager = _batches(cell, shape), stack_loss(model)
    if not plain_logits(model, batches[0][0]):
        return None

    def logits(tokens: torch.Tensor, *values: torch.Tensor) -> Any:
        own = dict(zip(names, values, strict=True))
        return torch.vmap(lambda own, tokens: functional_call(model, own, (tokens,)).logits)(own, tokens)

    with torch.random.fork_rng(devices=[]):
        try:
            from torch.fx.experimental.proxy_tensor import make_fx  # TorchScript does not know vmap, only what it does

            inputs = (batches[0][..., :-1], *values)
            with stackable(model):
                graph = _trace(make_fx(logits)(*inputs), *inputs)

            def losses(parameters: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
                if tokens.shape != shape:
                    return eager(parameters, tokens)
                made = _run(graph, tokens[..., :-1], *(parameters[name] for name in names))
                found: torch.Tensor = torch.vmap(mean_entropy)(made, tokens[..., 1:])
                return found

            same = _same(partial(eager, parameters), partial(losses, parameters), values, batches[1:])
        except Exception:
            same = False
    return losses if same else None


def _pays(model: torch.nn.Module, cell: Cell, device: torch.device, steps: int, sequences: int) -> bool:
    """Whether a graph of so many sequences may pay, and the model's operations are the same whatever its data."""
    cost = sequences * cell.shape.context * flops_per_token(cell.shape)
    small = device.type == "cpu" and steps >= LEAST_STEPS and cost <= MOST_FLOPS
    return small and cell.precision == "float32" and is_dense(model)


def _batches(cell: Cell, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """One to trace with and two to compare by."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(cell.shape.vocab_size, shape, generator=generator) for _ in range(3)]


def _trace(module: torch.nn.Module, *inputs: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes become constants, and TorchScript is no longer developed
        return torch.jit.trace(module, inputs, check_trace=False)


def _run(graph: Any, *inputs: torch.Tensor) -> Any:
    with torch.jit.optimized_execution(False):  # as recorded: what it would fuse has other bits
        return graph(*inputs)


def _same(eager: Loss, graph: Loss, parameters: Sequence[torch.Tensor], batches: Sequence[torch.Tensor]) -> bool:
    """Whether two functions of tokens and their gradients are equal to the bit."""
    for batch in batches:
        found = []
        for each in (eager, graph):
            losses = each(batch)
            gradients = torch.autograd.grad(losses.sum(), parameters, materialize_grads=True)
            found.append([losses.detach(), *gradients])
        if not all(map(torch.equal, *found)):
            return False
    return True
