"""The loss of a causal model: cross-entropy over the vocabulary, whose logits never exist at once where they are large.

Small logits take the plain way: the model's own, and their cross-entropy. Large ones are made, used and forgotten chunk
by chunk, and the gradients of hidden states and head are computed on the way forward, as in Hsu et al. 2024 (Liger), so
that no logits are kept for the way back. The failure this guards against: a vocabulary of 50,000 whose logits need ten
times the memory of everything else, and so decide how large a batch may be.

A model whose logits are not simply hidden states times the head's matrix takes the plain way, whatever its size.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from sweeps.attention import stackable, type_of
from sweeps.memory import LOGITS_BYTES

Loss = Callable[[torch.Tensor], torch.Tensor]
"""Tokens (sequences, context + 1) -> mean nats per token; eager or compiled."""
StackLoss = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
"""Parameters of all members by name, each (members, ...), and tokens (members, sequences, context + 1) -> (members,)
mean nats per token."""
DENSE = {"gpt2", "gpt_neox", "llama", "qwen3", "granite"}
"""Model types of transformers that do the same operations whatever their data."""
LINEAR_HEADS = DENSE | {"mixtral"}
"""Model types whose logits are hidden states times the head's matrix, over `logits_scaling`."""


class MeanLoss(torch.nn.Module):
    """`mean_loss` of one model as a module: what torch.func.functional_call and torch.compile take."""

    def __init__(self, model: torch.nn.Module, plain_bytes: int | None = None) -> None:
        super().__init__()
        self.model, self.plain_bytes = model, plain_bytes

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return mean_loss(self.model, tokens, self.plain_bytes)

    def each(self, tokens: torch.Tensor) -> torch.Tensor:
        """`token_losses` of the model."""
        return token_losses(self.model, tokens, self.plain_bytes)


def mean_loss(model: torch.nn.Module, tokens: torch.Tensor, plain_bytes: int | None = None) -> torch.Tensor:
    """Mean nats per token of `tokens`, int64 (sequences, context + 1); differentiable, also under torch.vmap.

    Float32 logits of more than `plain_bytes`, by default `LOGITS_BYTES` of the device, are made in chunks of that size.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    limit = _limit(tokens, plain_bytes)
    head = _linear_head(model)
    if head is None or not _is_large(head[1], inputs, limit):
        return mean_entropy(model(inputs).logits, targets)
    body, weight, scaling = head
    hidden = body(input_ids=inputs).last_hidden_state.flatten(0, 1)
    loss: torch.Tensor
    loss, _, _ = _ChunkedLoss.apply(hidden[None], weight[None], targets.flatten()[None], scaling, limit)
    return loss[0]


def stack_loss(model: torch.nn.Module) -> StackLoss:
    """`mean_loss` of every member of a stack of models like this one, by `torch.vmap`, which raises RuntimeError over a
    model that it does not take."""
    loss = MeanLoss(model)

    def losses(parameters: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        own = {f"model.{name}": value for name, value in parameters.items()}
        with stackable(model):
            found: torch.Tensor = torch.vmap(partial(functional_call, loss))(own, (tokens,))
        return found

    return losses


def mean_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean nats per token of logits (sequences, context, vocabulary)."""
    entropy: torch.Tensor = _MeanEntropy.apply(_wide(logits).flatten(0, 1)[None], targets.flatten()[None])[0]
    return entropy[0]


def plain_logits(model: torch.nn.Module, tokens: torch.Tensor) -> bool:
    """Whether `mean_loss` takes the model's own logits, at once, of tokens (sequences, context + 1)."""
    head = _linear_head(model)
    return head is None or not _is_large(head[1], tokens[:, :-1], _limit(tokens, None))


@torch.no_grad()
def token_losses(model: torch.nn.Module, tokens: torch.Tensor, plain_bytes: int | None = None) -> torch.Tensor:
    """Nats of every token: (sequences, context), without gradients. `tokens` is int64 (sequences, context + 1)."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    limit = _limit(tokens, plain_bytes)
    head = _linear_head(model)
    if head is None or not _is_large(head[1], inputs, limit):
        logits = _wide(model(inputs).logits).flatten(0, 1)
        return cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)
    body, weight, scaling = head
    hidden = body(input_ids=inputs).last_hidden_state.flatten(0, 1)
    rows = _rows(weight, limit)
    each = [
        cross_entropy(_wide(part @ weight.mT.to(part.dtype)) / scaling, target, reduction="none")
        for part, target in zip(hidden.split(rows), targets.flatten().split(rows), strict=True)
    ]
    return torch.cat(each).view(targets.shape)


def is_dense(model: torch.nn.Module) -> bool:
    """Whether it is a model of transformers' own that does the same operations whatever its data."""
    return type_of(model) in DENSE


def _linear_head(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.Tensor, float] | None:
    """The model's body, its head's matrix (vocabulary, width) and what the logits are divided by; None if unknown."""
    if type_of(model) not in LINEAR_HEADS:
        return None
    known: Any = model
    head = known.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return None
    return known.base_model, head.weight, float(getattr(known.config, "logits_scaling", 1.0))


def _limit(tokens: torch.Tensor, plain_bytes: int | None) -> int:
    return LOGITS_BYTES["cpu" if tokens.device.type == "cpu" else "cuda"] if plain_bytes is None else plain_bytes


def _is_large(weight: torch.Tensor, inputs: torch.Tensor, limit: int) -> bool:
    return inputs.numel() * len(weight) * 4 > limit


def _rows(weight: torch.Tensor, limit: int, members: int = 1) -> int:
    """Tokens of one member in a chunk."""
    return max(1, limit // (4 * weight.shape[-2] * members))


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _MeanEntropy(torch.autograd.Function):
    """(members, tokens, vocabulary) logits -> (members,) mean losses.

    One exponential a logit: the gradient is made with the loss, in half the time of `cross_entropy` on a CPU.
    """

    @staticmethod
    def forward(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, target = targets.shape[1], targets[..., None]
        top = logits.amax(-1, keepdim=True)
        slopes = (logits - top).exp_()
        sums = slopes.sum(-1, keepdim=True)
        losses = (sums.log() + top - logits.gather(-1, target)).mean((1, 2))
        slopes.div_(sums.mul_(tokens))
        slopes.scatter_add_(-1, target, slopes.new_full((), -1.0 / tokens).expand(target.shape))
        return losses, slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        (own,) = ctx.saved_tensors
        return own * slopes[0][:, None, None], None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> Any:
        """Members of a stack become further members."""
        stacked = [
            one.expand(info.batch_size, *one.shape) if dim is None else one.movedim(dim, 0)
            for one, dim in zip(operands, in_dims, strict=True)
        ]
        outputs: Any = _MeanEntropy.apply(*(one.flatten(0, 1) for one in stacked))
        return tuple(one.unflatten(0, (info.batch_size, -1)) for one in outputs), (0, 0)


class _ChunkedLoss(torch.autograd.Function):
    """(members, tokens, width) hidden states and (members, vocabulary, width) heads -> (members,) mean losses."""

    @staticmethod
    def forward(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scaling: float, limit: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        place = hidden.device.type
        amplified = torch.is_autocast_enabled(place)
        dtype = torch.get_autocast_dtype(place) if amplified else hidden.dtype
        wide = torch.promote_types(torch.float32, hidden.dtype)
        members, tokens, _ = hidden.shape
        with torch.autocast(place, enabled=False):
            states, head = hidden.to(dtype), weight.to(dtype)
            losses = torch.zeros(members, dtype=wide, device=hidden.device)
            hidden_gradient = torch.empty_like(hidden)
            weight_gradient = torch.zeros_like(weight)
            rows = _rows(weight, limit, members)
            for first in range(0, tokens, rows):
                part, target = states[:, first : first + rows], targets[:, first : first + rows, None]
                logits = (part @ head.mT).to(wide)
                if scaling != 1:
                    logits /= scaling
                normaliser = logits.logsumexp(-1, keepdim=True)
                losses += (normaliser - logits.gather(-1, target)).sum((1, 2))
                # softmax - one-hot, in place of the logits
                logits.sub_(normaliser).exp_()
                logits.scatter_add_(-1, target, logits.new_full((), -1.0).expand(target.shape))
                slope = logits.mul_(1 / (tokens * scaling)).to(dtype)
                hidden_gradient[:, first : first + rows] = slope @ head
                if dtype == weight_gradient.dtype:
                    weight_gradient.baddbmm_(slope.mT, part)
                else:
                    weight_gradient += slope.mT @ part  # summed over chunks in float32
        return losses / tokens, hidden_gradient, weight_gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        slope = slopes[0][:, None, None]
        return hidden_gradient * slope.to(hidden_gradient.dtype), weight_gradient * slope, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> Any:
        """Members of a stack become further members: their chunks stay within the bound together."""
        stacked = [
            one.expand(info.batch_size, *one.shape) if dim is None else one.movedim(dim, 0)
            for one, dim in zip(operands[:3], in_dims[:3], strict=True)
        ]
        outputs: Any = _ChunkedLoss.apply(*(one.flatten(0, 1) for one in stacked), *operands[3:])
        return tuple(one.unflatten(0, (info.batch_size, -1)) for one in outputs), (0, 0, 0)
