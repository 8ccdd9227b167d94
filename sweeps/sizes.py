"""Sizes: a target N becomes a `Shape`, by one torch-free rule that all families share.

The failure this guards against: aspect ratios that jump from one size to the next, which a scaling study would fit.

1. Ideal shapes follow one curve: depth = sqrt(width)/2 (8 layers at 256 wide, 32 at 4,096), MLP at its nominal ratio.
2. Real shapes are close to it: widths that split into heads of about the ideal size, whole layers, MLP widths in
   steps. Among those that give N within tolerance, the one nearest to the curve is taken.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from sweeps.accounting import Shape, parameters
from sweeps.errors import InputError
from sweeps.families import Family, Options, resolve_options

LATTICE: tuple[float, ...] = tuple(1e4 * 2 ** (k / 2) for k in range(41))
"""The target sizes that studies share: 10 thousand to 10.5 billion parameters, ratio sqrt 2."""

TOLERANCE_SMALL, TOLERANCE = 0.08, 0.03
"""How far the realised N may lie from its target, relatively: below and above a million parameters."""
_MLP_BAND = 1.5  # MLP ratio, and
_DEPTH_BAND = 1.6  # depth, stay within these factors of the ideal
_SMALL_HEADS = 64  # below this width, where heads have 8, they weigh twice: heads of 6 have but three turning pairs
_MAX_WIDTH = 16384
_SMALLEST = 2500  # below, one step of MLP width is more than the tolerance


def lattice_position(size: float) -> float:
    """Where a size stands on the lattice: 0 for its first, 1 for its second size."""
    return 2 * log2_ratio(size, LATTICE[0])


def log2_ratio(one: float, other: float) -> float:
    """log2 of one / other, also where the quotient is too large or too small for a float."""
    ratio = one / other
    return math.log2(ratio) if 0 < ratio < math.inf else math.log2(one) - math.log2(other)


def lattice_index(size: float) -> int:
    """The nearest place on the lattice. InputError where the size lies more than half a step outside it."""
    position = lattice_position(size)
    if not -0.5 <= position <= len(LATTICE) - 0.5:
        found = f"{size:,.0f}" if 1 <= size < 1e18 else f"{size}"
        raise InputError(f"size {found} is outside the lattice of {LATTICE[0]:,.0f} to {LATTICE[-1]:,.0f} parameters.")
    return min(max(round(position), 0), len(LATTICE) - 1)


@dataclass(frozen=True)
class _Rung:
    """One permitted width. N = tables + depth * (layer + slope * mlp_width)."""

    width: int
    heads: int
    misfit: float  # |log2| of head_dim over its ideal
    tables: int
    layer: int
    slope: int

    def size(self, depth: int, mlp_width: int) -> int:
        return self.tables + depth * (self.layer + self.slope * mlp_width)


def shape_for(family: Family, target: float, *, vocab_size: int, context: int, options: Options | None = None) -> Shape:
    """The shape whose `Parameters.active` is `target`, within 8% below a million parameters and 3% above.

    The same arguments always give the same shape. Raises InputError below the family's minimum for this vocabulary
    and context (the message says it) and above what the widest shape holds.
    """
    resolved = tuple(resolve_options(family, options).items())
    for name, value in (("vocab_size", vocab_size), ("context", context)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1.")
    return _shape_for(family, float(target), int(vocab_size), int(context), resolved)


def shape_of(
    family: Family, width: int, depth: int, head_dim: int, *, vocab_size: int, context: int, options: Options
) -> Shape:
    """The shape of this width, depth and head size, off the curve; its MLP has the family's ratio, in the usual steps.

    Raises InputError where the heads do not make whole groups of keys and values.
    """
    heads, grouped = width // head_dim, int(options.get("heads_per_kv", 1))
    if heads > grouped and heads % grouped:
        raise InputError(
            f"family {family.name}: {heads} heads (width {width}, head_dim {head_dim}) are no multiple of heads_per_kv "
            f"{grouped}. Use other widths, or heads_per_kv: 1."
        )
    step = _mlp_step(width)
    mlp_width = max(1, round(family.mlp_ratio * width / step)) * step
    return _shape(family, width, heads, depth, mlp_width, vocab_size, context, options)


def head_dim_at(width: int, options: Options) -> int:
    """The head size of a model of this width, by the rule that all shapes follow. InputError where it has none."""
    heads, _ = _split(width, int(options.get("heads_per_kv", 1)))
    if not heads:
        raise InputError(f"a width of {width} does not split into heads of about the ideal size. Use a multiple of 16.")
    return width // heads


@lru_cache(maxsize=65536)
def _shape_for(
    family: Family, target: float, vocab_size: int, context: int, options: tuple[tuple[str, float], ...]
) -> Shape:
    rungs, minimum = _ladder(family, vocab_size, context, options)
    largest = rungs[-1].size(_depth_range(rungs[-1].width)[1], _mlp_range(family, rungs[-1].width)[1])
    if not minimum <= target <= largest:
        raise InputError(
            f"family {family.name} cannot have {target:,.0f} parameters with a vocabulary of {vocab_size:,} and "
            f"context {context:,}: its smallest size is {minimum:,}, its largest {largest:,}. "
            f"{'Raise the size, or use a smaller vocabulary' if target < minimum else 'Lower the size'}."
        )
    best: tuple[float, _Rung, int, int] | None = None
    low, high = target * (1 - _tolerance(target)), target * (1 + _tolerance(target))
    for rung in rungs:
        if rung.tables + rung.layer > high:
            break
        ideal_depth, step = math.sqrt(rung.width) / 2, _mlp_step(rung.width)
        ideal_mlp = family.mlp_ratio * rung.width
        narrow, wide = _mlp_range(family, rung.width)
        shallow, deep = _depth_range(rung.width)
        if rung.size(deep, wide) < low:
            continue
        for depth in range(shallow, deep + 1):
            mlp_width = round(((target - rung.tables) / depth - rung.layer) / rung.slope / step) * step
            mlp_width = min(max(mlp_width, narrow), wide)
            size = rung.size(depth, mlp_width)
            if not low <= size <= high:
                continue
            # 5% in the MLP ratio weighs as much as 1% in N and as 3.5% in depth
            cost = (
                2 * math.log(depth / ideal_depth) ** 2
                + math.log(mlp_width / ideal_mlp) ** 2
                + 25 * math.log(size / target) ** 2
                + (0.2 if rung.width < _SMALL_HEADS else 0.1) * rung.misfit**2
            )
            if best is None or cost < best[0]:
                best = (cost, rung, depth, mlp_width)
    if best is not None:
        _, rung, depth, mlp_width = best
        shape = _shape(family, rung.width, rung.heads, depth, mlp_width, vocab_size, context, dict(options))
        if family.extra is None or low <= parameters(shape).active <= high:
            return shape
    # the bands leave no gap (tested), but a user's `extra` may, or bend what was taken to be straight
    raise InputError(
        f"family {family.name} has no shape within {_tolerance(target):.0%} of {target:,.0f} parameters. Choose a "
        "neighbouring size; of a family of your own, let its extra grow with depth and with depth x mlp_width alone."
    )


@lru_cache(maxsize=256)
def _ladder(
    family: Family, vocab_size: int, context: int, options: tuple[tuple[str, float], ...]
) -> tuple[list[_Rung], int]:
    """The permitted widths, rising, and the smallest N from which on they leave no gap."""
    chosen, rungs = dict(options), []
    width = 8
    while width <= _MAX_WIDTH:
        heads, misfit = _split(width, int(chosen.get("heads_per_kv", 1)))
        if heads:
            # N is linear in depth and in depth x mlp_width: three counts give its coefficients
            one, two, wider = (
                parameters(_shape(family, width, heads, depth, mlp, vocab_size, context, chosen)).active
                for depth, mlp in ((1, 8), (2, 8), (1, 16))
            )
            slope = (wider - one) // 8
            rungs.append(_Rung(width, heads, misfit, 2 * one - two, two - one - 8 * slope, slope))
        width += max(2, 2 ** (width.bit_length() - 5)) if width < 2048 else 128
    minimum, reached = _SMALLEST, 0.0
    for rung in rungs:
        smallest = rung.size(_depth_range(rung.width)[0], _mlp_range(family, rung.width)[0])
        if smallest / (1 + _tolerance(smallest)) > reached:
            minimum = max(_SMALLEST, smallest)
        largest = rung.size(_depth_range(rung.width)[1], _mlp_range(family, rung.width)[1])
        reached = largest / (1 - _tolerance(largest / (1 - TOLERANCE_SMALL)))
    return rungs, minimum


def _split(width: int, heads_per_kv: int) -> tuple[int, float]:
    """(heads, misfit) for a width, heads 0 where it does not split well into heads of 8, 16, 32, 64 or 128.

    Few heads of 16 in place of many of 8 would take .5 to .8 of a CPU's time for widths below 64, but seeds then differ
    two to four times as much (the quickstart's replicates: by .6 and 1.2% of the loss, one standard deviation).
    """
    ideal = 8 if width < _SMALL_HEADS else 16 if width < 256 else 32 if width < 512 else 64 if width < 2048 else 128
    even = 2 if width < 512 else 8  # rotary turns pairs; wide models want what attention kernels like
    best = (0, math.inf)
    for head_dim in range(even, 2 * ideal, even):
        heads, rest = divmod(width, head_dim)
        misfit = abs(math.log2(head_dim / ideal))
        grouped = heads % heads_per_kv == 0 or heads < heads_per_kv
        if not rest and grouped and misfit <= math.log2(1.5) and misfit < best[1]:
            best = (heads, misfit)
    return best


def _shape(
    family: Family,
    width: int,
    heads: int,
    depth: int,
    mlp_width: int,
    vocab_size: int,
    context: int,
    options: Options,
) -> Shape:
    shape = Shape(
        width=width,
        depth=depth,
        heads=heads,
        # fewer heads than one group: they all share one key and value head
        kv_heads=max(1, heads // int(options.get("heads_per_kv", 1))),
        head_dim=width // heads,
        mlp_width=mlp_width,
        vocab_size=vocab_size,
        context=context,
        mlp_matrices=family.mlp_matrices,
        tied=bool(options["tied"]),
        learned_positions=family.learned_positions,
        attention_bias=family.attention_bias,
        mlp_bias=family.mlp_bias,
        norm_bias=family.norm_bias,
        qk_norm=family.qk_norm,
        experts=int(options.get("experts", 0)),
        experts_per_token=int(options.get("experts_per_token", 0)),
    )
    if family.extra is None:
        return shape
    extra_parameters, extra_flops = _extra(family, shape)
    return replace(shape, extra_parameters=extra_parameters, extra_flops=extra_flops)


def _extra(family: Family, shape: Shape) -> tuple[int, int]:
    """What a user's own family counts beside the standard parts. InputError where its function gives no such counts."""
    assert family.extra is not None
    try:
        parameters, flops = family.extra(shape)
        whole = parameters == int(parameters) and flops == int(flops)
    except Exception as error:
        raise InputError(
            f'family "{family.name}": its extra fails with {type(error).__name__}: {error}. Let it return parameters '
            "and forward FLOPs per token."
        ) from error
    if not whole:
        raise InputError(f'family "{family.name}": its extra is {parameters}, {flops}; whole numbers are wanted.')
    return parameters, flops


def _tolerance(size: float) -> float:
    return TOLERANCE_SMALL if size < 1e6 else TOLERANCE


def _depth_range(width: int) -> tuple[int, int]:
    ideal = math.sqrt(width) / 2
    return max(1, round(ideal / _DEPTH_BAND)), math.ceil(ideal * _DEPTH_BAND)


def _mlp_step(width: int) -> int:
    return 8 if width < 256 else 16 if width < 512 else 32 if width < 1024 else 64 if width < 2048 else 128


def _mlp_range(family: Family, width: int) -> tuple[int, int]:
    step, ideal = _mlp_step(width), family.mlp_ratio * width
    return max(step, math.ceil(ideal / _MLP_BAND / step) * step), math.floor(ideal * _MLP_BAND / step) * step
