"""Stacked training: several models of one shape as one program.

Every parameter of the members lies in one tensor with the members along its first axis; each member's module, its
gradients and its optimizer work on views of it. So the forward and backward pass of all members is one call
(`torch.func.functional_call` under `vmap`), while clipping, the optimizer's step, the state and evaluation are those
of a solo run on that member's module: own rate and decay, own checkpoint in solo format, and a member that has
diverged is simply not stepped any more. What a stack must never do is let a number of one member reach another.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

from sweeps.cell import Cell, Optimizer, cell_from_identity
from sweeps.devices import choose_numerics
from sweeps.errors import InputError
from sweeps.families import build_model, find_family
from sweeps.losses import Loss, MeanLoss
from sweeps.optimizers import MuonWithAdamW, make_adamw, make_optimizer
from sweeps.stacks import LEAST_GAIN, known_gain, note_gain
from sweeps.store import Store, read_cell

ATTENTION = "escala_stacked"
"""Our attention's name in transformers."""
WARM_TURNS, PROBE_TURNS = 2, 7


class Solo:
    """One model, with the interface of a stack of one."""

    def __init__(self, model: torch.nn.Module, recipe: Optimizer, loss: Loss | None = None) -> None:
        """`loss`: that of the model as a function of tokens, where it is compiled."""
        self.models, self._clip = [model], recipe.clip_norm
        self._loss = loss or MeanLoss(model)
        self._optimizer = make_optimizer(model, recipe)

    def backward(self, batches: torch.Tensor, micro_batch: int, amplify: AbstractContextManager[Any]) -> torch.Tensor:
        """Gradients of the mean loss of a batch (1, sequences, context + 1), in micro-batches. Returns it, (1,)."""
        (batch,) = batches
        parts = batch.split(micro_batch)
        total: torch.Tensor | None = None
        for part in parts:
            with amplify:
                loss = self._loss(part)
            if len(parts) > 1:
                loss = loss * (len(part) / len(batch))
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total[None]

    def step(self, live: Sequence[int]) -> torch.Tensor:
        """Clip, step and clear the gradients, whose norm before clipping is returned, (1,)."""
        norm = torch.nn.utils.clip_grad_norm_(self.models[0].parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm[None]

    def set_rate(self, member: int, rate: float) -> None:
        _set_rate(self._optimizer, rate)

    def optimizer_state(self, member: int) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_optimizer_state(self, member: int, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(dict(state))


class Stack:
    """Models of one shape, whose parameters it moves into one table of its own: a row a member."""

    def __init__(self, models: Sequence[torch.nn.Module], recipes: Sequence[Optimizer]) -> None:
        """`recipes` are the members' optimizers: AdamW with own rate, decay, betas and clipping."""
        self.models, self.clips = list(models), [recipe.clip_norm for recipe in recipes]
        named = [dict(model.named_parameters()) for model in models]
        # 1. One row a member: the tensors that decay, then the others, each in the model's order.
        self._order = sorted(named[0], key=lambda name: named[0][name].ndim < 2)
        sizes = [named[0][name].numel() for name in self._order]
        self._spans = dict(zip(self._order, itertools.pairwise(itertools.accumulate(sizes, initial=0)), strict=True))
        like = named[0][self._order[0]]
        self._values = torch.empty(len(models), sum(sizes), dtype=like.dtype, device=like.device)
        self._gradients = torch.empty_like(self._values)
        # 2. The members' modules hold views of their rows; the program, of all rows at once.
        self._stacked: dict[str, torch.Tensor] = {}
        self._loss = MeanLoss(self.models[0])
        for name, (start, stop) in self._spans.items():
            shape = named[0][name].shape
            for each, values in zip(named, self._values, strict=True):
                values[start:stop] = each[name].detach().flatten()
                each[name].data = values[start:stop].view(shape)
            self._stacked[f"model.{name}"] = self._values[:, start:stop].unflatten(1, shape).requires_grad_()
        self._gradient_views = [
            self._gradients[:, start:stop].unflatten(1, named[0][name].shape)
            for name, (start, stop) in self._spans.items()
        ]
        # 3. One optimizer a member, over its row in two pieces.
        self._decaying = sum(each.numel() for each in named[0].values() if each.ndim >= 2)
        self.optimizers = [self._optimizer(row, recipe) for row, recipe in enumerate(recipes)]

    def _optimizer(self, row: int, recipe: Optimizer) -> torch.optim.AdamW:
        pieces = []
        for part, decay in ((slice(self._decaying), recipe.weight_decay), (slice(self._decaying, None), 0.0)):
            piece = self._values[row, part]
            piece.grad = self._gradients[row, part]
            pieces.append({"params": [piece], "weight_decay": decay})
        return make_adamw(pieces, recipe)

    def backward(self, batches: torch.Tensor, micro_batch: int, amplify: AbstractContextManager[Any]) -> torch.Tensor:
        """Gradients of each member's mean loss over its own batch (members, sequences, context + 1). Returns the
        losses, (members,)."""
        parts = batches.split(micro_batch, dim=1)
        total: torch.Tensor | None = None
        for part in parts:
            with amplify, _stackable(self.models[0]):
                losses = torch.vmap(partial(functional_call, self._loss))(self._stacked, (part,))
            if len(parts) > 1:
                losses = losses * (part.shape[1] / batches.shape[1])
            gradients = torch.autograd.grad(losses.sum(), list(self._stacked.values()))
            if total is None:
                torch._foreach_copy_(self._gradient_views, gradients)
                total = losses.detach()
            else:
                torch._foreach_add_(self._gradient_views, gradients)
                total = total + losses.detach()
        assert total is not None
        return total

    def step(self, live: Sequence[int]) -> torch.Tensor:
        """Clip and step the live members, each by itself. Returns the norms of all gradients, (members,)."""
        norms = torch.linalg.vector_norm(self._gradients, dim=1)
        bounds = torch.tensor(self.clips, dtype=norms.dtype, device=norms.device)
        self._gradients.mul_((bounds / (norms + 1e-6)).clamp_(max=1.0)[:, None])  # as clip_grad_norm_ does
        for member in live:
            self.optimizers[member].step()
        return norms

    def set_rate(self, member: int, rate: float) -> None:
        _set_rate(self.optimizers[member], rate)

    def optimizer_state(self, member: int) -> dict[str, Any]:
        """A member's optimizer state as that of its solo run (sweeps/optimizers.py): tensors for every parameter."""
        flat = self.optimizers[member].state_dict()
        groups, state = [], {}
        for piece, group in enumerate(flat["param_groups"]):
            names = self._names(piece)
            groups.append({**group, "params": [self._order.index(name) for name in names]})
            if (own := flat["state"].get(piece)) is None:
                continue  # no step was taken yet
            for name in names:
                moments = {key: own[key][self._span(name, piece)].view(self._shape(name)) for key in _MOMENTS}
                state[self._order.index(name)] = {"step": own["step"].clone(), **moments}
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, member: int, solo: Mapping[str, Any]) -> None:
        """Take over the optimizer state of a solo run."""
        groups, state = [], {}
        for piece, group in enumerate(solo["param_groups"]):
            groups.append({**group, "params": [piece]})
            own = [solo["state"][index] for index in group["params"] if index in solo["state"]]
            if own:
                moments = {key: torch.cat([each[key].flatten() for each in own]) for key in _MOMENTS}
                state[piece] = {"step": own[0]["step"].clone(), **moments}
        self.optimizers[member].load_state_dict({"state": state, "param_groups": groups})

    def _names(self, piece: int) -> list[str]:
        return [name for name in self._order if (len(self._shape(name)) < 2) == bool(piece)]

    def _shape(self, name: str) -> torch.Size:
        return self._stacked[f"model.{name}"].shape[1:]

    def _span(self, name: str, piece: int) -> slice:
        """Where a parameter lies in its piece of a row."""
        before = self._decaying if piece else 0
        start, stop = self._spans[name]
        return slice(start - before, stop - before)


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _set_rate(optimizer: torch.optim.Optimizer | MuonWithAdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


# --- does it pay? ------------------------------------------------------------------------------------------------


def pays(store: Store, cell_ids: Sequence[str]) -> bool:
    """Whether these cells train faster as one program on this device: by an earlier probe, or by one made now.

    A probe takes a second or so for models that small. What cannot be stacked at all (a model of the user's own that
    `vmap` does not take) does not pay.
    """
    cells = [cell_from_identity(read_cell(store, cell_id)["identity"]) for cell_id in cell_ids]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gain = known_gain(store, cells[0], len(cells), device)
    if gain is None:
        try:
            gain, why = probe(cells, torch.device(device)), None
        except (RuntimeError, NotImplementedError, InputError) as error:
            gain, why = 0.0, f"{type(error).__name__}: {error}"
        note_gain(store, cells[0], len(cells), device, gain, why=why)
    return gain >= LEAST_GAIN


def probe(cells: Sequence[Cell], device: torch.device) -> float:
    """How many times faster these cells make a step together than one by one, forward, backward and optimizer: the
    median over turns of both."""
    cell = cells[0]
    family = find_family(cell.family)
    choose_numerics(cell, stack=len(cells))  # raises where their memory does not suffice
    amplify = precision(cell.precision, device)

    def model(one: Cell) -> torch.nn.Module:
        built = build_model(family, one.shape, init_std=one.init_std, seed=one.seed, options=dict(one.options))
        return built.to(device).train()

    solo = Solo(model(cell), cell.optimizer)
    stack = Stack([model(one) for one in cells], [one.optimizer for one in cells])
    generator = torch.Generator().manual_seed(0)
    size = (len(cells), cell.sequences, cell.shape.context + 1)
    batch = torch.randint(cell.shape.vocab_size, size, generator=generator).to(device)

    def seconds(program: Solo | Stack, part: torch.Tensor) -> float:
        began = time.perf_counter()
        program.backward(part, cell.sequences, amplify)
        float(program.step(range(len(part)))[0])  # the device is waited for
        return time.perf_counter() - began

    turns = [(seconds(solo, batch[:1]), seconds(stack, batch)) for _ in range(WARM_TURNS + PROBE_TURNS)]
    return statistics.median(len(cells) * alone / together for alone, together in turns[WARM_TURNS:])


def precision(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """float32 throughout, or bfloat16 matmuls over float32 weights."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()


# --- attention ---------------------------------------------------------------------------------------------------


class _Folded(torch.autograd.Function):
    """Fused attention of all members as one larger batch: on a CPU it has no batching rule and would loop."""

    @staticmethod
    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        raise AssertionError("only for use under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, query: Any, key: Any, value: Any, scale: float) -> Any:
        query, key, value = (
            (one.movedim(axis, 0) if axis is not None else one.expand(info.batch_size, *one.shape)).flatten(0, 1)
            for one, axis in zip((query, key, value), in_dims, strict=False)
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return mixed.unflatten(0, (info.batch_size, -1)), 0


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over (sequences, heads, tokens, head_dim), as transformers calls it."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Folded.apply(query, key, value, scale).transpose(1, 2).contiguous(), None


@contextmanager
def _stackable(model: torch.nn.Module) -> Iterator[None]:
    """Meanwhile the model, if it is one of transformers', attends through `_Folded` and runs experts without loops
    whose length depends on the data."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        yield
        return
    _register()
    config._attn_implementation, config._experts_implementation = ATTENTION, "batched_mm"
    try:
        yield
    finally:
        config._attn_implementation, config._experts_implementation = "sdpa", "eager"


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if ATTENTION not in AttentionInterface().valid_keys():
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
