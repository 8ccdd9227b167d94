"""Optimizers: fused AdamW with decay on matrices only, and Muon for the hidden matrices beside it."""

from collections.abc import Mapping
from typing import Any

import torch

from sweeps.cell import Optimizer

MUON_MOMENTUM = 0.95
"""Nesterov momentum (Jordan et al. 2024); AdamW's betas are for the rest."""


def make_muon(model: torch.nn.Module, recipe: Optimizer) -> "MuonWithAdamW":
    """The optimizer of a model whose recipe is `muon`; that of `adamw` is part of sweeps/table.py."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = _hidden_matrices(model)
    return MuonWithAdamW([p for p in parameters if p in hidden], [p for p in parameters if p not in hidden], recipe)


def make_adamw(groups: list[dict[str, Any]], recipe: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW over groups of parameters with a weight decay each."""
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.eps, fused=True)


def _hidden_matrices(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Matrices, and stacks of them, that are neither a table nor a head.

    A table is the weight of an Embedding. The head is the one that the model names; of a module that names none, what
    has as many rows as the largest table, the tokens'. A model that names its head is never judged by rows: a layer as
    wide as the vocabulary, 256 of bytes, is no head.
    """
    tables = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        heads = {output.weight}
    else:
        rows = max((len(table) for table in tables), default=0)
        heads = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == rows}
    return {p for p in model.parameters() if p.ndim in (2, 3)} - tables - heads


class MuonWithAdamW:
    """Muon (Jordan et al. 2024) for the hidden matrices, AdamW for tables, head, gains and biases, as one optimizer.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025), so that a rate and a decay found for AdamW carry
    over. A tensor of three axes, the experts of a layer, is one matrix per expert.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], others: list[torch.nn.Parameter], recipe: Optimizer) -> None:
        self._experts = [(p, list(p.detach().unbind())) for p in matrices if p.ndim == 3]
        whole: list[torch.Tensor] = [p for p in matrices if p.ndim == 2]
        self._muon = torch.optim.Muon(
            whole + [view for _, views in self._experts for view in views],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            momentum=MUON_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        groups = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._adamw = make_adamw([group for group in groups if group["params"]], recipe)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Muon's group, then AdamW's; each takes its own "lr"."""
        return [*self._muon.param_groups, *self._adamw.param_groups]

    def step(self) -> None:
        for parameter, views in self._experts:
            gradients = [None] * len(views) if parameter.grad is None else parameter.grad.unbind()
            for view, gradient in zip(views, gradients, strict=True):
                view.grad = gradient
        self._muon.step()
        for _, views in self._experts:
            for view in views:
                view.grad = None
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])
