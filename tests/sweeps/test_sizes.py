"""The size rule: every target is met, for every family and vocabulary, by shapes that change smoothly with size."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lattices import VARIANTS, lattice_shapes, minimum_size

from sweeps.accounting import parameters
from sweeps.errors import InputError
from sweeps.families import FAMILIES, resolve_options
from sweeps.sizes import LATTICE, lattice_index, lattice_position, shape_for


def tolerance(target: float) -> float:
    return 0.08 if target < 1e6 else 0.03


def test_the_lattice_runs_from_ten_thousand_to_ten_billion_in_half_octaves() -> None:
    assert LATTICE[0] == 1e4
    assert LATTICE[-1] == pytest.approx(1.048576e10)
    assert all(b / a == pytest.approx(math.sqrt(2)) for a, b in pairwise(LATTICE))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize(("vocab_size", "context"), [(256, 128), (4096, 512), (50257, 1024), (128256, 2048)])
def test_sizes_are_met_and_rise_along_the_lattice(
    name: str, options: dict[str, float], vocab_size: int, context: int
) -> None:
    found = lattice_shapes(FAMILIES[name], vocab_size, context, **options)
    sizes = [parameters(shape).active for _, shape in found]
    assert all(abs(size / target - 1) <= tolerance(target) for size, (target, _) in zip(sizes, found, strict=True))
    assert all(a < b for a, b in pairwise(sizes))
    assert all(a.width <= b.width for (_, a), (_, b) in pairwise(found))
    if vocab_size == 256 and not options:
        assert len(found) == len(LATTICE)


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_change_smoothly_along_the_lattice(name: str) -> None:
    family = FAMILIES[name]
    for (_, a), (target, b) in pairwise(lattice_shapes(family, 256, 128)):
        jump = math.exp(abs(math.log((b.width / b.depth) / (a.width / a.depth))))
        assert jump <= (1.5 if target < 1e6 else 1.3), f"aspect ratio jumps by {jump:.2f} at {target:,.0f}"
        assert b.depth >= a.depth
        from_ideal = abs(math.log(b.depth / (math.sqrt(b.width) / 2)))
        assert from_ideal <= math.log(1.3 if target < 1e6 else 1.15)
        assert abs(math.log(b.mlp_width / b.width / family.mlp_ratio)) <= math.log(1.5 if target < 1e6 else 1.2)


@pytest.mark.parametrize(("vocab_size", "context"), [(50257, 1024), (128256, 2048)])
@pytest.mark.parametrize("name", FAMILIES)
def test_large_vocabularies_stay_smooth_but_for_the_smallest_sizes(name: str, vocab_size: int, context: int) -> None:
    found = lattice_shapes(FAMILIES[name], vocab_size, context)
    for k, ((_, a), (target, b)) in enumerate(pairwise(found)):
        jump = math.exp(abs(math.log((b.width / b.depth) / (a.width / a.depth))))
        assert jump <= (1.65 if k < 4 else 1.35), f"aspect ratio jumps by {jump:.2f} at {target:,.0f}"


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_heads_divide_the_width_and_share_keys_as_asked(name: str, options: dict[str, float]) -> None:
    per_kv = resolve_options(FAMILIES[name], options).get("heads_per_kv", 1)
    for _, shape in lattice_shapes(FAMILIES[name], 256, 128, **options):
        assert shape.heads * shape.head_dim == shape.width
        assert shape.head_dim % (2 if shape.width < 512 else 8) == 0
        assert shape.heads == shape.kv_heads * per_kv or (shape.heads < per_kv and shape.kv_heads == 1)


def test_the_shapes_of_the_smallest_llamas_are_pinned() -> None:
    # A change here changes what every study trains, also those that stores hold the cells of: they would train again.
    found = lattice_shapes(FAMILIES["llama"], 256, 128)[:14:3]
    assert [(s.width, s.depth, s.heads, s.mlp_width, parameters(s).active) for _, s in found] == [
        (12, 2, 2, 40, 10236),
        (24, 2, 3, 80, 28536),
        (40, 3, 5, 112, 80280),
        (64, 4, 4, 168, 227904),
        (96, 5, 6, 280, 637728),
    ]


options_of = st.fixed_dictionaries(
    {"tied": st.booleans()},
    optional={"heads_per_kv": st.sampled_from([1, 2, 4, 8]), "experts": st.sampled_from([2, 4, 8, 64])},
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from(sorted(FAMILIES)),
    options_of,
    st.integers(16, 300000),
    st.integers(16, 8192),
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
)
def test_any_feasible_size_is_met_for_any_vocabulary(
    name: str, options: dict[str, float], vocab_size: int, context: int, places: list[float]
) -> None:
    family = FAMILIES[name]
    options = {key: value for key, value in options.items() if key in family.options}
    minimum = minimum_size(family, vocab_size=vocab_size, context=context, options=options)
    targets = sorted(minimum * (max(2e10, 4 * minimum) / minimum) ** place for place in places)
    sizes = []
    for target in targets:
        shape = shape_for(family, target, vocab_size=vocab_size, context=context, options=options)
        assert (shape.vocab_size, shape.context, shape.tied) == (vocab_size, context, options["tied"])
        sizes.append(parameters(shape).active)
        assert abs(sizes[-1] / target - 1) <= tolerance(target)
    for (low, small), (high, large) in pairwise(zip(targets, sizes, strict=True)):
        assert high < 1.2 * low or small < large


def test_the_smallest_size_itself_is_feasible_and_one_below_is_refused_with_reasons() -> None:
    family = FAMILIES["gpt2"]
    minimum = minimum_size(family, vocab_size=50257, context=1024)
    shape = shape_for(family, minimum, vocab_size=50257, context=1024)
    assert parameters(shape).active == pytest.approx(minimum, rel=0.03)
    with pytest.raises(InputError, match=rf"gpt2 .* vocabulary of 50,257 and context 1,024: .*{minimum:,}"):
        shape_for(family, minimum - 1, vocab_size=50257, context=1024)


@pytest.mark.parametrize("target", [math.nan, -1.0, 1e15, math.inf])
def test_impossible_sizes_are_refused(target: float) -> None:
    with pytest.raises(InputError, match="cannot have"):
        shape_for(FAMILIES["llama"], target, vocab_size=256, context=128)


def test_sizes_snap_to_the_nearest_place_on_the_lattice() -> None:
    assert [lattice_index(size) for size in LATTICE] == list(range(len(LATTICE)))
    assert lattice_position(2e4) == pytest.approx(2)
    assert [lattice_index(size) for size in (8.5e3, 1.18e4, 1.2e4, 1.24e10)] == [0, 0, 1, 40]
    for size in (8.3e3, 1.26e10):
        with pytest.raises(InputError, match="outside the lattice of 10,000 to 10,485,760,000"):
            lattice_index(size)
