"""The families in all their options, and their shapes on the lattice of sizes."""

from sweeps.accounting import Shape
from sweeps.families import FAMILIES, Family, Options, resolve_options
from sweeps.sizes import LATTICE, _ladder, shape_for

VARIANTS: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in FAMILIES),
    ("gpt2", {"tied": False}),
    ("gpt_neox", {"tied": True}),
    ("llama", {"tied": True, "heads_per_kv": 4}),
    ("qwen3", {"tied": False, "heads_per_kv": 1}),
    ("granite", {"tied": False, "heads_per_kv": 8}),
    ("mixtral", {"tied": True, "heads_per_kv": 1, "experts": 16, "experts_per_token": 1}),
]


def minimum_size(family: Family, *, vocab_size: int, context: int, options: Options | None = None) -> int:
    """The smallest N from which on every target can be met.

    Large vocabularies raise it: where the tables are most of a model, one step in width is more than the tolerance.
    """
    return _ladder(family, vocab_size, context, tuple(resolve_options(family, options).items()))[1]


def lattice_shapes(family: Family, vocab_size: int, context: int, **options: float) -> list[tuple[float, Shape]]:
    minimum = minimum_size(family, vocab_size=vocab_size, context=context, options=options)
    return [
        (target, shape_for(family, target, vocab_size=vocab_size, context=context, options=options))
        for target in LATTICE
        if target >= minimum
    ]
