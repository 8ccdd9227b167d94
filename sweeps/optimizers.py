"""The optimizer of a cell: fused AdamW with decay on matrices only."""

from typing import Any

import torch

from sweeps.cell import Optimizer


def make_optimizer(model: torch.nn.Module, recipe: Optimizer) -> torch.optim.AdamW:
    """AdamW in two groups: tensors of two or more axes decay, gains and biases do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return make_adamw([group for group in groups if group["params"]], recipe)


def make_adamw(groups: list[dict[str, Any]], recipe: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW over groups of parameters with a weight decay each."""
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.eps, fused=True)
