"""A cell: one planned training run, frozen, whose id is a hash of everything that defines its numbers.

What is not in the id cannot change a loss: the study that asked, the grid that planned it, the evaluation points, the
machine. How an attempt computes (threads, device kind, library versions) is its numerics, stored beside the result.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sweeps.accounting import Shape
from sweeps.parametrisation import STANDARD, Parametrisation

NUMERICS_VERSION = 1
"""Bumped by hand when the same cell would give other losses; a golden-loss test fails when that is forgotten."""
MUON_NUMERICS_VERSION = 2
"""Of muon's cells with a matrix of as many rows as the largest table: version 1 left such layers to AdamW."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter 2019): decay is decoupled, multiplied by the learning rate, on matrices only."""

    name: str = "adamw"
    """adamw, or muon for the hidden matrices and AdamW for the rest (sweeps/optimizers.py)."""
    learning_rate: float
    """Peak."""
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    clip_norm: float
    """Bound of the global gradient norm."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over tokens (sweeps/schedules.py)."""

    name: str
    warmup_tokens: int
    final_fraction: float
    cooldown_fraction: float
    cooldown_shape: str = "sqrt"


def numerics_version(shape: Shape, optimizer: Optimizer) -> int:
    """The version of the numerics of a cell that is planned now."""
    rows = max(shape.vocab_size, shape.context if shape.learned_positions else 0)
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    taken = {shape.width, shape.mlp_width, query, key_value, query + 2 * key_value}
    return MUON_NUMERICS_VERSION if optimizer.name == "muon" and rows in taken else NUMERICS_VERSION


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Everything that defines the numbers of one training run."""

    numerics_version: int = NUMERICS_VERSION
    family: str
    family_version: str
    options: tuple[tuple[str, float], ...] = ()
    """The family's options, sorted by name."""
    shape: Shape
    init_std: float
    parametrisation: Parametrisation = STANDARD
    """How initial scales, rates and multipliers follow width and depth (sweeps/parametrisation.py)."""
    corpus: str
    """Fingerprint of the token shards."""
    tokenizer: str
    tokens: int
    """Training tokens D, a whole number of batches."""
    batch_tokens: int
    """Tokens an optimizer step, a whole number of sequences."""
    optimizer: Optimizer
    schedule: Schedule
    precision: str
    seed: int
    """Of the initial weights."""
    data_seed: int
    """Of the data order."""
    validation_tokens: int = 0
    """Tokens of the validation stream that the final loss is taken over, in whole windows; 0: all of it."""
    trainer: str = ""
    """A user's own trainer, `my_file.py:train@<hash>`; empty: Escala's."""
    gradient_noise: bool = False
    """Whether the gradient norm of a part of the batch is logged too. It moves no loss, but a run that did not log it
    does not have it: so it is of the id where it is true."""

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def sequences(self) -> int:
        """Sequences a batch."""
        return self.batch_tokens // self.shape.context

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The cell as plain JSON values."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        nested = {key: dict(vars(plain[key])) for key in ("shape", "optimizer", "schedule")}
        # Fields that came later are left out at their defaults, so that cells of before keep their ids.
        for later in ("validation_tokens", "trainer", "gradient_noise"):
            if not plain[later]:
                del plain[later]
        if self.schedule.cooldown_shape == "sqrt":
            del nested["schedule"]["cooldown_shape"]
        del plain["parametrisation"]
        if self.parametrisation != STANDARD:
            given = {key: value for key, value in vars(self.parametrisation).items() if value is not None}
            nested["parametrisation"] = given
        return plain | nested | {"options": dict(self.options)}

    @cached_property
    def id(self) -> str:
        """The first 16 hexadecimal digits of SHA-256 over the identity as canonical JSON."""
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def cell_from_identity(identity: Mapping[str, Any]) -> Cell:
    """The cell that `Cell.identity` described."""
    return Cell(
        **{
            **identity,
            "shape": Shape(**identity["shape"]),
            "optimizer": Optimizer(**identity["optimizer"]),
            "schedule": Schedule(**identity["schedule"]),
            "options": tuple(sorted(identity["options"].items())),
            "parametrisation": Parametrisation(**identity.get("parametrisation", {})),
        }
    )


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two identities differ: (dotted name, value in one, value in the other)."""
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b
