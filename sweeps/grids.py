"""Grids: from a study and its corpus to the list of cells, by torch-free arithmetic.

A grid yields points (family, target size, token count, seeds); each point crossed with `vary` and the seeds is a
cell. Equal cells are planned once. Every fault is collected, so that all are reported at once.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sweeps import accounting
from sweeps.cell import Cell, Optimizer, Schedule
from sweeps.corpora import CorpusInfo
from sweeps.errors import InputError
from sweeps.families import Family, find_family, resolve_options
from sweeps.fitted import Fit, FittedRule, fitted_law
from sweeps.lineage import Branch, plan_branches, what_prevents
from sweeps.parametrisation import STANDARD, Parametrisation, check_parametrisation
from sweeps.published import PublishedRule, published_law
from sweeps.rules import PowerLaw, PowerRule, Ruled, evaluate, law_warnings
from sweeps.sizes import LATTICE, head_dim_at, lattice_index, lattice_position, shape_for, shape_of
from sweeps.stacks import check_stack, stack_key
from sweeps.study import (
    Factors,
    IsoflopGrid,
    LadderGrid,
    LogVary,
    ShapesGrid,
    Study,
    Training,
    check_hyperparameter,
    flat_recipe,
    listed,
)
from sweeps.usercode import trainer_identity

MAX_CELLS = 100_000
MAX_TOKENS = 1e16
MAX_EPOCHS = 4.0
FEW_STEPS = 500
SMALL_BATCH_SEQUENCES = 128
_LENGTHS = ("D", "C", "C_nonembedding")
"""Variables of a rule that change with the length of a run."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell with what the plan knows of it."""

    cell: Cell
    counts: Mapping[str, Any]
    """N, N_nonembedding, N_nonembedding_head, N_total, flops_per_token, C, C_6nd, steps, epochs."""
    labels: Mapping[str, Any]
    """Its place in the grid: budget, size, and the factors of what was varied by `times`. Not part of its identity."""
    ruled: Ruled
    """The laws from elsewhere that gave its hyperparameters, and where they were taken."""


@dataclass(frozen=True)
class Place:
    """One place of a grid with its seed: where any setting of the searched hyperparameters makes a cell."""

    study: Study
    corpus: CorpusInfo
    family: Family
    options: Mapping[str, Any]
    point: "_Point"
    variation: Mapping[str, tuple[str, Any]]
    seed: int
    trainer: str
    fits: Mapping[str, Fit]

    def plan(self, setting: Mapping[str, Any] | None = None, share: float = 1.0) -> PlannedCell:
        """The cell of a setting {hyperparameter: value}, of a share of the place's length. ValueError where none is."""
        point, chosen = self.point, {name: ("value", value) for name, value in (setting or {}).items()}
        if share != 1.0:
            lengths = ("tokens", "flops", "tokens_per_parameter")
            point = replace(point, **{n: share * v for n in lengths if (v := getattr(point, n)) is not None})
        variation = {**self.variation, **chosen}
        return _plan_cell(
            self.study, self.corpus, self.family, self.options, point, variation, self.seed, self.trainer, self.fits
        )


@dataclass(frozen=True)
class Plan:
    """All cells of a study, each once, with what the researcher should know before they run."""

    study: Study
    corpus: CorpusInfo
    cells: tuple[PlannedCell, ...]
    branches: Mapping[str, Branch]
    """Where the cells whose past another of the study trains leave it (sweeps/lineage.py), by cell id."""
    warnings: tuple[str, ...]
    fits: Mapping[str, Fit]
    """The fits of other studies that the cells' hyperparameters come from, by study."""
    places: tuple[Place, ...] = ()
    """Of a study that searches: where its trials train. Its cells are those of the trials asked so far."""


@dataclass(frozen=True)
class _Point:
    """One place of a grid for one family: a target size, or a shape, and one way to say how long."""

    size: float = 0.0
    shape: accounting.Shape | None = None
    tokens: float | None = None
    flops: float | None = None
    tokens_per_parameter: float | None = None
    extra_seeds: int = 0
    overrides: tuple[tuple[str, Any], ...] = ()
    labels: tuple[tuple[str, Any], ...] = ()


def plan_study(
    study: Study,
    corpus: CorpusInfo,
    *,
    allow_code: bool = False,
    base_dir: Path = Path(),
    fits: Mapping[str, Fit] = MappingProxyType({}),
) -> Plan:
    """Plan every cell of a study. `fits`: those of the studies that it names as `fitted`, by study.

    Raises InputError that lists what is wrong: an unknown family, sizes below a family's minimum, cells shorter than
    one batch, a context longer than the corpus, more than four epochs without `repeat: true`.
    """
    corpus.windows(study.context)  # raise where the context does not fit
    corpus.validation_windows(study.context)
    planned: dict[str, PlannedCell] = {}
    faults: dict[str, None] = {}
    trainer = trainer_identity(study.trainer, base_dir if allow_code else None) if study.trainer else ""
    declared = 0
    places: list[Place] = []
    for name, given in study.families.items():
        try:
            family = find_family(name, allow_code=allow_code, base_dir=base_dir)
            options = resolve_options(family, given)
            points = list(_points(study, family, corpus.vocab_size, options))
        except InputError as error:
            faults[str(error)] = None
            continue
        for point, variation, seed in _crossed(study, points):
            declared += 1
            if declared > MAX_CELLS:
                raise InputError(f"the study declares more than {MAX_CELLS:,} cells. Split it, or vary less.")
            place = Place(study, corpus, family, options, point, variation, seed, trainer, fits)
            places.append(place)
            for setting in corners(study):
                try:
                    one = place.plan(setting)
                except ValueError as error:
                    faults[str(error)] = None
                else:
                    planned.setdefault(one.cell.id, one)
    faults |= dict.fromkeys(_epoch_faults(study, corpus, planned.values()))
    faults |= dict.fromkeys(_stack_faults(study, [one.cell for one in planned.values()]))
    if faults:
        shown = "\n".join(f"  {fault}" for fault in itertools.islice(faults, 10))
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise InputError(f"the study cannot be planned:\n{shown}{more}")
    cells = tuple(planned.values())
    warnings = tuple(_warnings(study, cells))
    if study.search is not None:  # its cells come from its trials (sweeps/search.py)
        return Plan(study, corpus, (), {}, warnings, dict(fits), tuple(places))
    branches = plan_branches(one.cell for one in cells)
    return Plan(study, corpus, cells, branches, warnings, dict(fits))


def examples(plan: Plan) -> list[PlannedCell]:
    """What the trials of a search will train: the cells of both ends of its space. Empty where nothing is searched."""
    return [place.plan(setting) for place in plan.places for setting in corners(plan.study)]


def corners(study: Study) -> list[dict[str, Any]]:
    """The settings at which a place is planned to see whether it can be: both ends of what is searched, if anything."""
    if study.search is None:
        return [{}]
    space = study.search.space
    return [{name: axis.ends()[side] for name, axis in space.items()} for side in (0, 1)]


# --- points ------------------------------------------------------------------------------------------------------


def _points(study: Study, family: Family, vocab_size: int, options: Mapping[str, Any]) -> Iterator[_Point]:
    grid = study.grid
    if isinstance(grid, IsoflopGrid):
        yield from _isoflop_points(grid, family, vocab_size, study.context, options)
    elif isinstance(grid, ShapesGrid):
        for width, depth in itertools.product(dict.fromkeys(grid.widths), dict.fromkeys(grid.depths)):
            shape = shape_of(
                family, width, depth, grid.head_dim, vocab_size=vocab_size, context=study.context, options=options
            )
            yield _Point(shape=shape, tokens=grid.tokens, tokens_per_parameter=grid.tokens_per_parameter)
    elif isinstance(grid, LadderGrid):
        for size in dict.fromkeys(LATTICE[lattice_index(size)] for size in listed(grid.sizes)):
            for ratio in listed(grid.tokens_per_parameter):
                yield _Point(size, tokens_per_parameter=ratio, labels=(("size", size),))
    else:
        for point in grid.points:
            size = LATTICE[lattice_index(point.size)]
            yield _Point(
                size,
                tokens=point.tokens,
                flops=point.flops,
                tokens_per_parameter=point.tokens_per_parameter,
                overrides=tuple(point.training.items()),
                labels=(("size", size),),
            )


def _isoflop_points(
    grid: IsoflopGrid, family: Family, vocab_size: int, context: int, options: Mapping[str, Any]
) -> Iterator[_Point]:
    """Sizes around the expected optimum of each budget, on the sublattice of the stride, so that budgets share them."""
    budgets = listed(grid.budgets)
    for order, budget in enumerate(budgets):
        centre = _expected_optimum(grid, budget, family, vocab_size, context, options)
        middle = round(centre / grid.stride) * grid.stride
        first = middle - grid.stride * ((grid.sizes - 1) // 2)
        indices = range(first, first + grid.stride * grid.sizes, grid.stride)
        if indices[0] < 0 or indices[-1] >= len(LATTICE):
            raise InputError(
                f"budget {budget:g}: {grid.sizes} sizes around {LATTICE[0] * 2 ** (centre / 2):.3g} parameters leave "
                f"the lattice of {LATTICE[0]:,.0f} to {LATTICE[-1]:,.0f}. Use fewer sizes, a smaller stride, or "
                "another budget."
            )
        for index in indices:
            replicated = grid.replicates is not None and order < grid.replicates.budgets and index == middle
            extra = grid.replicates.seeds - 1 if replicated and grid.replicates else 0
            size = LATTICE[index]
            yield _Point(size, flops=budget, extra_seeds=extra, labels=(("budget", budget), ("size", size)))


def _expected_optimum(
    grid: IsoflopGrid, budget: float, family: Family, vocab_size: int, context: int, options: Mapping[str, Any]
) -> float:
    """The lattice position (a fraction) of the size expected to be best for this budget."""
    optimum = grid.optimum
    if optimum.N is not None and optimum.C is not None:
        position = lattice_position(optimum.N) + 2 * optimum.exponent * math.log2(budget / optimum.C)
        return min(max(position, -len(LATTICE)), 2 * len(LATTICE))  # far off the lattice is far enough

    def log_ratio(index: int) -> float:  # of the budget that this size spends at the expected D/N
        shape = _shape(family, LATTICE[index], vocab_size, context, tuple(sorted(options.items())))
        tokens = optimum.tokens_per_parameter * accounting.parameters(shape).active
        return math.log(accounting.flops_per_token(shape) * tokens / budget)

    feasible = [index for index in range(len(LATTICE)) if _is_feasible(family, index, vocab_size, context, options)]
    if not feasible:
        raise InputError(
            f"family {family.name} has no size on the lattice with a vocabulary of {vocab_size:,} and context "
            f"{context:,}. Use a smaller vocabulary."
        )
    return float(min(feasible, key=lambda index: abs(log_ratio(index))))


@lru_cache(maxsize=4096)
def _shape(
    family: Family, size: float, vocab_size: int, context: int, options: tuple[tuple[str, Any], ...]
) -> accounting.Shape:
    return shape_for(family, size, vocab_size=vocab_size, context=context, options=dict(options))


def _is_feasible(family: Family, index: int, vocab_size: int, context: int, options: Mapping[str, Any]) -> bool:
    try:
        _shape(family, LATTICE[index], vocab_size, context, tuple(sorted(options.items())))
    except InputError:
        return False
    return True


# --- variations and seeds ----------------------------------------------------------------------------------------


def _crossed(study: Study, points: list[_Point]) -> Iterator[tuple[_Point, dict[str, tuple[str, Any]], int]]:
    """Every point with every combination of varied hyperparameters and every seed."""
    for point in points:
        for variation in _variations(study):
            for seed in _seeds(study, point):
                yield point, variation, seed


def _variations(study: Study) -> Iterator[dict[str, tuple[str, Any]]]:
    """Every combination of varied hyperparameters: {name: ("value", v)} or {name: ("times", factor)}."""
    axes = []
    for name, variation in study.vary.items():
        if isinstance(variation, Factors):
            axes.append([(name, ("times", factor)) for factor in variation.times])
        else:
            values = variation.log.values() if isinstance(variation, LogVary) else variation
            axes.append([(name, ("value", value)) for value in values])
    for combination in itertools.product(*axes):
        yield dict(combination)


def _seeds(study: Study, point: _Point) -> tuple[int, ...]:
    """The study's seeds and those of a replicated point, which follow from the first: seeds added later drop none."""
    others = (seed for seed in itertools.count() if seed != study.seeds[0])
    return tuple(dict.fromkeys((*study.seeds, *itertools.islice(others, point.extra_seeds))))


# --- one cell ----------------------------------------------------------------------------------------------------


def _plan_cell(
    study: Study,
    corpus: CorpusInfo,
    family: Family,
    options: Mapping[str, Any],
    point: _Point,
    variation: Mapping[str, tuple[str, Any]],
    seed: int,
    trainer: str,
    fits: Mapping[str, Fit],
) -> PlannedCell:
    chosen = tuple(sorted(options.items()))
    shape = point.shape or _shape(family, point.size, corpus.vocab_size, study.context, chosen)
    counts = _counts(shape)
    flops_per_token = counts["flops_per_token"]
    recipe = {name: getattr(study.training, name) for name in Training.model_fields} | dict(point.overrides)
    recipe |= flat_recipe({name: value for name, (kind, value) in variation.items() if kind == "value"})
    recipe = _validated(recipe, point, variation)
    times = {name: value for name, (kind, value) in variation.items() if kind == "times"}
    laws = _laws(recipe, family.name, corpus.fingerprint, fits)
    rules = recipe | laws

    # 1. How long: D from the grid, then whole batches. A batch may depend on the unrounded D.
    if point.tokens is not None:
        wanted = point.tokens
    elif point.flops is not None:
        wanted = point.flops / flops_per_token
    else:
        wanted = (point.tokens_per_parameter or 0) * counts["N"]
    if wanted > MAX_TOKENS:
        raise ValueError(
            f"{family.name} with {counts['N']:,} parameters: {wanted:.3g} training tokens are more than "
            f"{MAX_TOKENS:g}. Lower the budget."
        )
    known = {
        "N": counts["N"],
        "D": wanted,
        "C": wanted * flops_per_token,
        "width": shape.width,
        "depth": shape.depth,
    } | _other_counts(shape, counts, wanted)
    batch = _realised("batch_tokens", rules["batch_tokens"], known, times)
    batch_tokens = max(1, round(batch / study.context)) * study.context
    if recipe["gradient_noise"] and batch_tokens == study.context:
        raise ValueError(
            f"{family.name} with {counts['N']:,} parameters: a batch of one sequence ({batch_tokens:,} tokens) has no "
            "part whose gradient could be compared with the whole's. Raise batch_tokens, or leave out gradient_noise."
        )
    steps = round(wanted / batch_tokens)
    if steps < 1:
        raise ValueError(
            f"{family.name} with {counts['N']:,} parameters: {wanted:,.0f} training tokens are less than one batch of "
            f"{batch_tokens:,}. Lower batch_tokens, or raise the budget."
        )
    tokens = steps * batch_tokens

    # 2. Hyperparameters, at the realised D.
    known |= {"D": tokens, "C": tokens * flops_per_token, "batch_tokens": batch_tokens}
    known |= _other_counts(shape, counts, tokens)

    def value(name: str, default: float | None = None) -> float:
        return _realised(name, default if rules[name] is None else rules[name], known, times)

    known["learning_rate"] = value("learning_rate")  # first: a rule of the decay follows it
    optimizer = Optimizer(
        name=recipe["optimizer"],
        learning_rate=known["learning_rate"],
        weight_decay=value("weight_decay"),
        beta1=value("beta1"),
        beta2=value("beta2", 0.99 if batch_tokens < SMALL_BATCH_SEQUENCES * study.context else 0.95),
        eps=value("eps"),
        clip_norm=value("clip_norm"),
    )
    cooldown_fraction = value("cooldown_fraction")
    stable = _stable_share(recipe["schedule"], cooldown_fraction) * tokens
    schedule = Schedule(
        name=recipe["schedule"],
        warmup_tokens=int(value("warmup_tokens", _default_warmup(counts["N"], tokens, stable))),
        final_fraction=value("final_fraction"),
        cooldown_fraction=cooldown_fraction,
        cooldown_shape=recipe["cooldown_shape"] if recipe["schedule"] == "wsd" else "sqrt",
    )
    if stable and schedule.warmup_tokens > stable:
        raise ValueError(
            f"{family.name} with {counts['N']:,} parameters: a warm-up of {schedule.warmup_tokens:,} tokens does not "
            f"fit into the {stable:,.0f} that a run of {tokens:,} has before its cooldown: a branch cannot leave its "
            "trunk before the warm-up ends. Lower warmup_tokens or cooldown_fraction, or train longer."
        )
    cell = Cell(
        family=family.name,
        family_version=str(family.version),
        options=chosen,
        shape=shape,
        init_std=value("init_std"),
        parametrisation=_parametrisation(study.grid, family, options, recipe),
        corpus=corpus.fingerprint,
        tokenizer=corpus.tokenizer,
        tokens=tokens,
        batch_tokens=batch_tokens,
        optimizer=optimizer,
        schedule=schedule,
        precision=recipe["precision"],
        seed=seed,
        data_seed=seed,
        validation_tokens=_validation_tokens(study, corpus),
        trainer=trainer,
        gradient_noise=recipe["gradient_noise"],
    )
    realised = {
        "C": tokens * flops_per_token,
        "C_6nd": 6 * counts["N"] * tokens,
        "steps": steps,
        "epochs": round(corpus.epochs(tokens, study.context), 4),
    }
    labels = dict(point.labels) | {f"{name}_times": factor for name, factor in times.items()}
    facts = {"batch_tokens": batch_tokens, "schedule": schedule.name, "optimizer": optimizer.name}
    ruled = Ruled(laws, known if laws else {}, facts | {"context": study.context})
    return PlannedCell(cell, counts | realised, labels, ruled)


def _laws(recipe: Mapping[str, Any], family: str, corpus: str, fits: Mapping[str, Fit]) -> dict[str, PowerLaw]:
    """The laws from elsewhere that the recipe names, by hyperparameter."""
    laws = {}
    for name, rule in recipe.items():
        if isinstance(rule, PublishedRule):
            laws[name] = published_law(rule, name)
        elif isinstance(rule, FittedRule):
            if rule.fitted not in fits:
                raise ValueError(f"{name}: the fit of {rule.fitted} is not at hand. Plan this study with its store.")
            kind = recipe["parametrisation"].kind
            laws[name] = fitted_law(
                fits[rule.fitted], name, family=family, parametrisation=kind, corpus=corpus, recipe=recipe
            )
    return laws


def _other_counts(shape: accounting.Shape, counts: Mapping[str, int], tokens: float) -> dict[str, float]:
    """N, C and D as published rules count them."""
    return {
        "N_nonembedding": counts["N_nonembedding"],
        "C_nonembedding": tokens * _body_flops(shape),
        "tokens_per_parameter": tokens / counts["N"],
    }


@lru_cache(maxsize=4096)
def _body_flops(shape: accounting.Shape) -> int:
    return accounting.flops_per_token(shape, head=False)


@lru_cache(maxsize=4096)
def _counts(shape: accounting.Shape) -> dict[str, int]:
    parameters = accounting.parameters(shape)
    return {
        "N": parameters.active,
        "N_nonembedding": parameters.non_embedding,
        "N_nonembedding_head": parameters.non_embedding_head,
        "N_total": parameters.total,
        "flops_per_token": accounting.flops_per_token(shape),
    }


def _validation_tokens(study: Study, corpus: CorpusInfo) -> int:
    """Whole windows; 0 where the study wants no fewer than there are."""
    wanted = round((study.validation_tokens or 0) / study.context)
    return wanted * study.context if wanted < corpus.validation_windows(study.context) else 0


def _stable_share(schedule: str, cooldown_fraction: float) -> float:
    """The share of a run before its rate falls, which does not depend on its length; 0 where all of it does."""
    return {"wsd": 1.0 - cooldown_fraction, "constant": 1.0}.get(schedule, 0.0)


def _default_warmup(N: int, tokens: int, stable: float) -> float:
    """min(N, 10 % of D); but N for cells that can share a trunk, so as not to follow D, where half of what is stable
    holds it. stable: tokens before the rate falls."""
    return N if stable / 2 >= N else min(N, 0.1 * tokens)


def _realised(name: str, rule: Any, known: Mapping[str, float], times: Mapping[str, float]) -> float:
    """A hyperparameter's value: a plain number as it stands, one that was computed to six digits and within range."""
    value = evaluate(rule, known)
    if name in times:
        value = float(f"{value * times[name]:.6g}")
    if name in times or isinstance(rule, PowerRule | PowerLaw):
        check_hyperparameter(name, value)
    return value


def _parametrisation(
    grid: Any, family: Family, options: Mapping[str, Any], recipe: Mapping[str, Any]
) -> Parametrisation:
    """The parametrisation with its base's head size: the grid's, or by the rule that all shapes follow."""
    declared = recipe["parametrisation"]
    if declared.kind == "standard":
        return STANDARD
    check_parametrisation(declared.kind, family.name, recipe["optimizer"])
    return Parametrisation(
        kind=declared.kind,
        base_width=declared.base_width,
        base_head_dim=grid.head_dim if isinstance(grid, ShapesGrid) else head_dim_at(declared.base_width, options),
        base_depth=declared.base_depth,
    )


def _validated(recipe: dict[str, Any], point: _Point, variation: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Overrides come from the file as they stand; give them the types that the recipe's own fields have."""
    if not point.overrides and not variation:
        return recipe
    checked = Training.model_validate(recipe)
    return {name: getattr(checked, name) for name in recipe}


# --- what to say -------------------------------------------------------------------------------------------------


def _epoch_faults(study: Study, corpus: CorpusInfo, cells: Any) -> Iterator[str]:
    if study.corpus.repeat:
        return
    over = [one for one in cells if one.counts["epochs"] > MAX_EPOCHS]
    if over:
        worst = max(over, key=lambda one: one.counts["epochs"])
        yield (
            f"{len(over)} of the cells repeat the corpus more than {MAX_EPOCHS:g} times: the longest wants "
            f"{worst.cell.tokens:,} tokens of {corpus.train_tokens:,} ({worst.counts['epochs']:.1f} epochs). "
            "Lower the budgets, use a larger corpus, or set `repeat: true` under `corpus:`."
        )


def _stack_faults(study: Study, cells: list[Cell]) -> Iterator[str]:
    if (
        isinstance(study.stack, int)
        and len(cells) > 1
        and len({stack_key(cell) or cell.id for cell in cells}) == len(cells)
    ):
        try:
            check_stack(cells)
        except InputError as error:
            yield f"stack: {study.stack} asks for stacks, but no two cells can be members of one: {error}"


def _warnings(study: Study, cells: tuple[PlannedCell, ...]) -> Iterator[str]:
    yield from law_warnings(one.ruled for one in cells if one.ruled.laws)
    if prevented := what_prevents(one.cell for one in cells):
        yield _unshared(study, cells[0].ruled.laws, prevented)
    short = [one.counts["steps"] for one in cells if one.counts["steps"] < FEW_STEPS]
    if short:
        yield (
            f"{len(short)} of {len(cells)} cells have fewer than {FEW_STEPS} optimizer steps (fewest: {min(short)}): "
            "their losses may say more about the warm-up than about size. Use a smaller batch_tokens."
        )
    repeated = [one.counts["epochs"] for one in cells if one.counts["epochs"] > 1]
    if repeated:
        yield (
            f"{len(repeated)} of {len(cells)} cells see the corpus more than once (most: {max(repeated):.2f} epochs); "
            "fits of single-epoch laws leave out those above 1.5."
        )


def _unshared(study: Study, laws: Mapping[str, PowerLaw], fields: tuple[str, ...]) -> str:
    """Why cells that differ in length share no trunk although their schedule would let them, and what to do."""
    names = dict.fromkeys(name.rpartition(".")[2] for name in fields)
    if "batch_tokens" in names and study.training.beta2 is None:
        names.pop("beta2", None)  # its default follows the batch
    rules = {name: laws.get(name, getattr(study.training, name, None)) for name in names}
    told = []
    for name, rule in rules.items():
        follows = [v for v in rule.power if v in _LENGTHS] if isinstance(rule, PowerRule | PowerLaw) else []
        told.append(f"{name} follows {' and '.join(follows)}" if follows else f"{name} differs between their lengths")
    remedy = "Let it be a number" if len(told) == 1 else "Let them be numbers"
    return (
        "cells of one model and seed share no trunk although their schedule would let them, because "
        f"{', '.join(told)}. {remedy}, or a rule of N, width or depth, and all lengths of a model train their common "
        "past once."
    )
