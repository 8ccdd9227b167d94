"""Stacked training: several models of one shape as one program.

The members' parameters lie in one table, a row a member (sweeps/table.py). The forward and backward pass of all members
is one call (`torch.func.functional_call` under `vmap`, or a graph of that: sweeps/tracing.py), while clipping, the
optimizer's step and its state are the table's, row by row: own rate and decay, a checkpoint in solo format, and a
member that has diverged is simply not stepped any more. What a stack must never do is let a number of one member reach
another.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sweeps.cell import Cell, Optimizer
from sweeps.errors import InputError
from sweeps.losses import Loss, MeanLoss, stack_loss
from sweeps.parametrisation import TensorFactors
from sweeps.table import Table
from sweeps.tracing import traced_stack


class Solo:
    """One model, with the interface of a stack of one."""

    def __init__(
        self,
        model: torch.nn.Module,
        recipe: Optimizer,
        loss: Loss | None = None,
        factors: Mapping[str, TensorFactors] | None = None,
    ) -> None:
        """`loss`: that of the model as a function of tokens, where it is compiled. `factors`: as of `Table`."""
        self.models, self._eager, self.table = [model], MeanLoss(model), Table([model], [recipe], factors)
        self._loss = loss or self._eager

    def state(self, member: int) -> dict[str, Any]:
        """A member's model and optimizer, for a checkpoint."""
        return _state(self.models[member], self.table, member)

    def load(self, member: int, state: Mapping[str, Any]) -> None:
        """Take over what `state` told."""
        _load(self.models[member], self.table, member, state)

    def backward(
        self, batches: torch.Tensor, micro_batch: int, amplify: AbstractContextManager[Any], *, eager: bool = False
    ) -> torch.Tensor:
        """Gradients of the mean loss of a batch (1, sequences, context + 1), in micro-batches. Returns it, (1,).

        eager: not compiled, for a batch of another size: a compiled loss would be compiled anew for it.
        """
        (batch,) = batches
        parts, one = batch.split(micro_batch), self._eager if eager else self._loss
        total: torch.Tensor | None = None
        self.table.gradients.zero_()
        for part in parts:
            with amplify:
                loss = one(part)
            if len(parts) > 1:
                loss = loss * (len(part) / len(batch))
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total[None]


class Stack:
    """Models of one shape, whose parameters lie in one table: a row a member."""

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        recipes: Sequence[Optimizer],
        factors: Mapping[str, TensorFactors] | None = None,
    ) -> None:
        """`recipes` are the members' optimizers, each with own rate, decay, betas and clipping. `factors`: as of
        `Table`, the same for all."""
        self.models, self.table = list(models), Table(models, recipes, factors)
        self._losses = stack_loss(models[0])
        values = self.table.columns(self.table.values)
        self._parameters = {name: value.requires_grad_() for name, value in values.items()}
        self._gradients = list(self.table.columns(self.table.gradients).values())

    def trace(self, cell: Cell, steps: int, micro_batch: int) -> None:
        """Take a graph of the forward pass from now on, if one pays over so many steps of cells like this one."""
        self._losses = traced_stack(self.models[0], self._parameters, cell, steps, micro_batch) or self._losses

    def state(self, member: int) -> dict[str, Any]:
        """As of `Solo`."""
        return _state(self.models[member], self.table, member)

    def load(self, member: int, state: Mapping[str, Any]) -> None:
        """As of `Solo`."""
        _load(self.models[member], self.table, member, state)

    def backward(
        self, batches: torch.Tensor, micro_batch: int, amplify: AbstractContextManager[Any], *, eager: bool = False
    ) -> torch.Tensor:
        """Gradients of each member's mean loss over its own batch (members, sequences, context + 1). Returns the
        losses, (members,). A stack is never compiled. InputError for a model that `vmap` does not take."""
        parts = batches.split(micro_batch, dim=1)
        total: torch.Tensor | None = None
        for part in parts:
            try:
                with amplify:
                    losses = self._losses(self._parameters, part)
            except RuntimeError as error:
                if "vmap" not in str(error):
                    raise
                raise InputError(
                    f"these {len(self.models)} cells cannot train as one stack: their model draws random numbers in "
                    "training, as dropout does, or its operations depend on its data. Set stack: off, or auto, which "
                    f"trains them one by one. (torch: {str(error).splitlines()[0]})"
                ) from error
            if len(parts) > 1:
                losses = losses * (part.shape[1] / batches.shape[1])
            gradients = torch.autograd.grad(losses.sum(), list(self._parameters.values()))
            if total is None:
                torch._foreach_copy_(self._gradients, gradients)
                total = losses.detach()
            else:
                torch._foreach_add_(self._gradients, gradients)
                total = total + losses.detach()
        assert total is not None
        return total


def _state(model: torch.nn.Module, table: Table, row: int) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": table.optimizer_state(row)}


def _load(model: torch.nn.Module, table: Table, row: int, state: Mapping[str, Any]) -> None:
    model.load_state_dict(state["model"])
    table.load_optimizer_state(row, state["optimizer"])


def precision(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """float32 throughout, or bfloat16 matmuls over float32 weights."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()
