"""A model of which every rank of a gang holds a part, for sizes that fit on no single device.

Batches are sliced and losses weighted as in sweeps/replicas.py. Checkpoints are of the whole state, in the format of a
solo program, so that any number of workers goes on from them. Imported only where it is needed: FSDP2 takes half a
second of a worker's start.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from sweeps.cell import Optimizer
from sweeps.errors import InputError
from sweeps.losses import MeanLoss
from sweeps.optimizers import make_adamw
from sweeps.parametrisation import TensorFactors
from sweeps.ranks import Ranks, hearing
from sweeps.table import alike_steps


class Sharded:
    """A model of which every rank holds a part: weights, gradients and moments alike (FSDP2, Zhao et al. 2023).

    A layer is gathered when a pass comes to it and let go after. One table cannot hold such a model: AdamW steps the
    parts of the parameters themselves, in the order of a `Table`, so that its state is that of a solo optimizer.
    """

    def __init__(
        self,
        ranks: Ranks,
        model: torch.nn.Module,
        recipe: Optimizer,
        factors: Mapping[str, TensorFactors] | None,
        device: torch.device,
    ) -> None:
        """`model` is on the CPU; its parts move to the device. InputError for an optimizer of whole matrices."""
        if recipe.name != "adamw":
            raise InputError(
                f"optimizer {recipe.name} steps whole matrices, and this model fits only in parts. Use optimizer: "
                "adamw, a smaller size, or GPUs with more memory."
            )
        self._ranks, self._loss = ranks, _Root(model)
        self._mesh = DeviceMesh.from_group(ranks.group, device.type)
        for layer in _layers(model):
            fully_shard(layer, mesh=self._mesh)
        fully_shard(self._loss, mesh=self._mesh, reshard_after_forward=True)
        register_fsdp_forward_method(self._loss, "each")
        model.to(device)  # buffers; the parts are there already
        self.models = [model]
        self.table = ShardedTable(ranks, model, recipe, factors)

    def backward(
        self, batches: torch.Tensor, micro_batch: int, amplify: AbstractContextManager[Any], *, eager: bool = False
    ) -> torch.Tensor:
        """As `Solo.backward`, of the global batch. A pass is a meeting of all ranks: one that has no sequence left for
        it passes one that does not count."""
        (batch,) = batches
        own = batch[self._ranks.share(len(batch))]
        parts = list(own.split(micro_batch)) if len(own) else []
        total = torch.zeros(1, device=batch.device)
        self.table.zero_gradients()
        for number in range(self._ranks.most(len(parts))[0]):
            part, weight = batch[:1], 0.0
            if number < len(parts):
                part, weight = parts[number], len(parts[number]) / len(batch)
            with hearing():
                with amplify:
                    loss = self._loss(part) * weight
                (loss * self._ranks.count).backward()  # gradients are averaged over the ranks
            total += loss.detach()
        self._ranks.add(total)
        return total

    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """`token_losses` of the model."""
        with hearing():
            return self._loss.each(tokens)

    def state(self, member: int) -> dict[str, Any]:
        """The whole model and optimizer in the format of one that is not sharded, on rank 0; every rank must ask."""
        return {
            "model": {name: self._whole(value) for name, value in self.models[member].state_dict().items()},
            "optimizer": self._whole(self.table.optimizer_state(member)),
        }

    def load(self, member: int, state: Mapping[str, Any]) -> None:
        """Take over the own parts of a state as `state` tells it, whole on every rank."""
        model = self.models[member]
        own = model.state_dict()
        assert own.keys() == state["model"].keys()
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(_part(state["model"][name], value))
        self.table.load_optimizer_state(member, state["optimizer"])

    def _whole(self, value: Any) -> Any:
        """A nested value with its parts gathered: on rank 0, in the host's memory."""
        if isinstance(value, DTensor):
            with hearing():
                found = value.full_tensor()
            return found.cpu() if self._ranks.rank == 0 else None
        if isinstance(value, Mapping):
            return {key: self._whole(each) for key, each in value.items()}
        return value


class ShardedTable:
    """Of a sharded model what `Table` is of a whole one."""

    def __init__(
        self, ranks: Ranks, model: torch.nn.Module, recipe: Optimizer, factors: Mapping[str, TensorFactors] | None
    ) -> None:
        self._ranks, self._bound = ranks, recipe.clip_norm
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._parameters = list(named.values())
        self._steps = alike_steps({name: parameter.shape for name, parameter in named.items()}, factors)
        groups = [
            {
                "params": [named[name] for name in step.names],
                "weight_decay": recipe.weight_decay * step.decay,
                "eps": recipe.eps * step.eps,
            }
            for step in self._steps
        ]
        self._optimizer = make_adamw(groups, recipe)

    def zero_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def norms(self) -> torch.Tensor:
        """As of `Table`, (1,): the parts' squares, summed over the ranks."""
        squares = torch.stack([part.double().square().sum() for part in self._parts()]).sum()[None]
        self._ranks.add(squares)
        return squares.sqrt().float()

    def set_rate(self, row: int, rate: float) -> None:
        """As of `Table`; there is but one row."""
        for group, step in zip(self._optimizer.param_groups, self._steps, strict=True):
            group["lr"] = rate * step.rate

    def step(self, rows: Any) -> torch.Tensor:
        """Clip the gradients by their norm and step. Returns the norm before, (1,)."""
        norms = self.norms()
        torch._foreach_mul_(list(self._parts()), (self._bound / (norms[0] + 1e-6)).clamp(max=1.0))
        self._optimizer.step()
        return norms

    def optimizer_state(self, row: int) -> dict[str, Any]:
        """A solo optimizer's state, but for its tensors, which are parts."""
        return self._optimizer.state_dict()

    def load_optimizer_state(self, row: int, solo: Mapping[str, Any]) -> None:
        """Take over the own parts of a solo optimizer's state."""
        order = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {key: value if key == "step" else _part(value, order[index]) for key, value in moments.items()}
            for index, moments in solo["state"].items()
        }
        self._optimizer.load_state_dict({**solo, "state": state})

    def _parts(self) -> Iterator[torch.Tensor]:
        """The own parts of the gradients."""
        for parameter in self._parameters:
            gradient: Any = parameter.grad
            assert isinstance(gradient, DTensor)
            yield gradient.to_local()


class _Root(MeanLoss):
    """The loss as FSDP2 wants its outermost module's output: no view, on which its hooks could be lost."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens).clone()


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """A model's layers: its longest list of modules. InputError where it has none."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise InputError(
            "this model fits only in parts, and it has no torch.nn.ModuleList of layers to be parted by. Give it one, "
            "or use a smaller size."
        )
    return max(lists, key=len)


def _part(whole: torch.Tensor, like: Any) -> DTensor:
    """This rank's part of a tensor that every rank has, laid out as another."""
    placed = whole.to(like.device_mesh.device_type)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)
