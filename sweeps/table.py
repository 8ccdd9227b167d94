"""The table of a program: all parameters of one model or of several equal ones in one tensor, a row a model.

Clipping is then one norm and one product, and an AdamW step two calls a row (what decays, what does not; under mup also
what has a rate of its own), however many tensors the model has. The models hold views of their rows; the optimizer's
state is told and taken as that of an AdamW on the model's own parameters, a tensor for every one. Views begin at whole
cache lines: matrix kernels want that. Muon, whose steps are of whole matrices, works on the models' own parameters.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sweeps.cell import Optimizer
from sweeps.optimizers import make_adamw, make_muon
from sweeps.parametrisation import TensorFactors

ALIGN = 64
"""Elements: 256 bytes of float32."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Step:
    """Parameters whose steps are alike, and what their rate, decay and eps are multiplied by."""

    names: tuple[str, ...]
    rate: float
    decay: float
    eps: float


@dataclass(frozen=True)
class _Piece(Step):
    """Neighbours in the table."""

    span: slice


class Table:
    """Rows of values and of gradients, and an optimizer for each row."""

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        recipes: Sequence[Optimizer],
        factors: Mapping[str, TensorFactors] | None = None,
    ) -> None:
        """Moves the parameters of the models, which are alike, into the table.

        factors: by parameter, what the recipes' rate, decay and eps are multiplied by; all 1 where not given."""
        named = [{name: p for name, p in model.named_parameters() if p.requires_grad} for model in models]
        self.shapes = {name: parameter.shape for name, parameter in named[0].items()}
        # 1. The order of a solo optimizer's state.
        alike = alike_steps(self.shapes, factors)
        self.order = [name for step in alike for name in step.names]
        room = [-(-self.shapes[name].numel() // ALIGN) * ALIGN for name in self.order]
        self._starts = dict(zip(self.order, itertools.accumulate(room, initial=0), strict=False))
        ends = dict(zip(self.order, itertools.accumulate(room), strict=True))
        self._pieces = []
        for step in alike:
            span = slice(self._starts[step.names[0]], ends[step.names[-1]])
            self._pieces.append(_Piece(**vars(step), span=span))
        like = next(iter(named[0].values()))
        self.values = torch.zeros(len(models), sum(room), dtype=like.dtype, device=like.device)
        self.gradients = torch.zeros_like(self.values)
        # 2. The models hold views of their rows.
        for row, each in enumerate(named):
            for name, parameter in each.items():
                view = self._view(self.values[row], name)
                view.copy_(parameter.detach())
                parameter.data, parameter.grad = view, self._view(self.gradients[row], name)
        # 3. An optimizer a row, over its pieces.
        self._bounds = torch.tensor([[recipe.clip_norm] for recipe in recipes], dtype=like.dtype, device=like.device)
        self._optimizers = [
            self._optimizer(row, recipe) if recipe.name == "adamw" else make_muon(models[row], recipe)
            for row, recipe in enumerate(recipes)
        ]

    def _optimizer(self, row: int, recipe: Optimizer) -> torch.optim.AdamW:
        groups = []
        for piece in self._pieces:
            values = self.values[row, piece.span]
            values.grad = self.gradients[row, piece.span]
            decay, eps = recipe.weight_decay * piece.decay, recipe.eps * piece.eps
            groups.append({"params": [values], "weight_decay": decay, "eps": eps})
        return make_adamw(groups, recipe)

    def columns(self, table: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of `values` or `gradients` by parameter, (rows, *shape)."""
        return {
            name: table[:, start : start + self.shapes[name].numel()].unflatten(1, self.shapes[name])
            for name, start in self._starts.items()
        }

    def norms(self) -> torch.Tensor:
        """Of every row's gradients, (rows,)."""
        return torch.linalg.vector_norm(self.gradients, dim=1)

    def set_rate(self, row: int, rate: float) -> None:
        """The learning rate of a row's next step, before the factors of its tensors."""
        groups = self._optimizers[row].param_groups
        own = isinstance(self._optimizers[row], torch.optim.AdamW)  # Muon has groups of its own, and no factors
        for group, factor in zip(groups, [piece.rate for piece in self._pieces] if own else [1.0] * len(groups)):
            group["lr"] = rate * factor

    def step(self, rows: Sequence[int]) -> torch.Tensor:
        """Clip every row's gradients by its own norm and step these rows. Returns the norms before, (rows,)."""
        norms = self.norms()[:, None]
        if norms.device.type != "cpu" or not bool((norms <= self._bounds).all()):  # a GPU is not waited for
            self.gradients.mul_((self._bounds / (norms + 1e-6)).clamp_(max=1.0))  # as clip_grad_norm_ does
        for row in rows:
            self._optimizers[row].step()
        return norms[:, 0]

    # --- state, as a solo optimizer's -----------------------------------------------------------------------------

    def optimizer_state(self, row: int) -> dict[str, Any]:
        """A row's optimizer state, a tensor for every parameter."""
        flat = self._optimizers[row].state_dict()
        if not isinstance(self._optimizers[row], torch.optim.AdamW):
            return flat  # Muon works on the parameters themselves
        groups, state = [], {}
        for index, (piece, group) in enumerate(zip(self._pieces, flat["param_groups"], strict=True)):
            groups.append({**group, "params": [self.order.index(name) for name in piece.names]})
            if (own := flat["state"].get(index)) is None:
                continue  # no step was taken yet
            for name in piece.names:
                moments = {key: self._view(own[key], name, piece.span.start) for key in _MOMENTS}
                state[self.order.index(name)] = {"step": own["step"].clone(), **moments}
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, row: int, solo: Mapping[str, Any]) -> None:
        """Take over a state as `optimizer_state` tells it."""
        if not isinstance(self._optimizers[row], torch.optim.AdamW):
            self._optimizers[row].load_state_dict(dict(solo))
            return
        flat = self._optimizers[row].state_dict()
        state: dict[int, dict[str, Any]] = {}
        for index, (piece, group) in enumerate(zip(self._pieces, flat["param_groups"], strict=True)):
            names = [name for name in piece.names if self.order.index(name) in solo["state"]]
            given: Mapping[str, Any] = next((one for one in solo["param_groups"] if self._is_of(one, piece)), {})
            group |= {key: value for key, value in given.items() if key != "params"}
            if not names:
                continue
            moments = {key: self.values.new_zeros(piece.span.stop - piece.span.start) for key in _MOMENTS}
            for name in names:
                for key, whole in moments.items():
                    self._view(whole, name, piece.span.start).copy_(solo["state"][self.order.index(name)][key])
            state[index] = {"step": solo["state"][self.order.index(names[0])]["step"].clone(), **moments}
        self._optimizers[row].load_state_dict({"state": state, "param_groups": flat["param_groups"]})

    def _is_of(self, group: Mapping[str, Any], piece: _Piece) -> bool:
        return self.order[group["params"][0]] in piece.names

    def _view(self, row: torch.Tensor, name: str, offset: int = 0) -> torch.Tensor:
        """A parameter's place in a row, or in a piece of one that begins at `offset`."""
        start = self._starts[name] - offset
        return row[start : start + self.shapes[name].numel()].view(self.shapes[name])


def alike_steps(shapes: Mapping[str, torch.Size], factors: Mapping[str, TensorFactors] | None) -> list[Step]:
    """What decays comes first, then the others, each in the model's order but for tensors whose steps are alike, which
    stand together. `factors`: as of `Table`."""
    steps = {name: _step_of(name, shape, factors or {}) for name, shape in shapes.items()}
    alike = sorted(dict.fromkeys(steps.values()), key=lambda step: step[1] == 0)
    return [Step(tuple(name for name in shapes if steps[name] == step), *step) for step in alike]


def _step_of(name: str, shape: torch.Size, factors: Mapping[str, TensorFactors]) -> tuple[float, float, float]:
    """What a parameter's rate, decay and eps are multiplied by: matrices decay, gains and biases do not."""
    own = factors.get(name, TensorFactors())
    return own.rate, own.decay if len(shape) >= 2 else 0.0, own.eps
