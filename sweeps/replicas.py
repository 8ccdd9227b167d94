"""A model that every rank of a gang holds whole.

The loss that a rank computes is that of its slice of the global batch; weighted by the sequences in it and summed over
the ranks, it and its gradients are those of the whole batch, also where the slices differ in size.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch

from sweeps.ranks import Ranks
from sweeps.stacking import Solo


class Replicated(Solo):
    """A model that every rank holds whole, with the interface of `Solo`.

    Gradients lie in one tensor (sweeps/table.py), so they are averaged by one sum over the ranks after the backward
    pass. torch's DistributedDataParallel would hide part of it behind that pass; in exchange it sums in buckets, whose
    order is its own, and knows nothing of micro-batches or slices that differ in size.
    """

    def __init__(self, ranks: Ranks, *args: Any) -> None:
        super().__init__(*args)
        self._ranks = ranks

    def backward(
        self, batches: torch.Tensor, micro_batch: int, amplify: AbstractContextManager[Any], *, eager: bool = False
    ) -> torch.Tensor:
        """As `Solo.backward`, of the global batch, of which every rank does its slice.

        A part of a batch may hold fewer sequences than there are ranks: the others add nothing."""
        whole = batches.shape[1]
        own = batches[:, self._ranks.share(whole)]
        count, gradients = own.shape[1], self.table.gradients
        if count:
            loss = super().backward(own, micro_batch, amplify, eager=eager) * (count / whole)
            gradients.mul_(count / whole)
        else:
            loss = torch.zeros(1, device=gradients.device)
            gradients.zero_()
        self._ranks.add(gradients)
        self._ranks.add(loss)
        return loss
