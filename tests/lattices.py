"""The families in all their options, and their shapes on the lattice of sizes."""

from sweeps.accounting import Shape
from sweeps.families import FAMILIES, Family
from sweeps.sizes import LATTICE, minimum_size, shape_for

VARIANTS: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in FAMILIES),
    ("gpt2", {"tied": False}),
    ("gpt_neox", {"tied": True}),
    ("llama", {"tied": True, "heads_per_kv": 4}),
    ("qwen3", {"tied": False, "heads_per_kv": 1}),
    ("granite", {"tied": False, "heads_per_kv": 8}),
    ("mixtral", {"tied": True, "heads_per_kv": 1, "experts": 16, "experts_per_token": 1}),
]


def lattice_shapes(family: Family, vocab_size: int, context: int, **options: float) -> list[tuple[float, Shape]]:
    minimum = minimum_size(family, vocab_size=vocab_size, context=context, options=options)
    return [
        (target, shape_for(family, target, vocab_size=vocab_size, context=context, options=options))
        for target in LATTICE
        if target >= minimum
    ]
