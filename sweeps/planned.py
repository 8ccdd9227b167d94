"""One planned cell: a point of a grid with its recipe, a setting and a seed, made exact by torch-free arithmetic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sweeps import accounting
from sweeps.cell import Cell, Optimizer, Schedule, numerics_version
from sweeps.corpora import CorpusInfo
from sweeps.families import Family
from sweeps.fitted import Fit, FittedRule, fitted_law
from sweeps.gridkinds import ShapesGrid
from sweeps.parametrisation import STANDARD, Parametrisation, check_parametrisation
from sweeps.points import GridPoint, cached_shape
from sweeps.published import PublishedRule, published_law
from sweeps.recipe import Training, check_hyperparameter, flat_recipe
from sweeps.rules import PowerLaw, PowerRule, Ruled, evaluate
from sweeps.sizes import head_dim_at
from sweeps.study import Study
from sweeps.units import plural

MAX_TOKENS = 1e16
SMALL_BATCH_SEQUENCES = 128
LENGTHS = ("D", "C", "C_nonembedding")
"""Variables of a rule that change with the length of a run."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell with what the plan knows of it."""

    cell: Cell
    counts: Mapping[str, Any]
    """N, N_nonembedding, N_nonembedding_head, N_total, flops_per_token, C, C_6nd, steps, epochs."""
    labels: Mapping[str, Any]
    """Its place in the grid: budget, size, and the factors of what was varied by `times`. Not part of its identity."""
    wanted_batch: float
    """batch_tokens before it was rounded to whole sequences."""
    ruled: Ruled
    """The laws from elsewhere that gave its hyperparameters, and where they were taken."""


_DEFAULTS = Training()


def plan_cell(
    study: Study,
    corpus: CorpusInfo,
    family: Family,
    options: Mapping[str, Any],
    point: GridPoint,
    variation: Mapping[str, tuple[str, Any]],
    seed: int,
    trainer: str,
    fits: Mapping[str, Fit],
) -> PlannedCell:
    """The cell of a grid's point under one setting: its exact shape, whole batches, realised hyperparameters and FLOPs.

    `options` are all of the family's, resolved. `variation` is {hyperparameter: ("value", v)} in place of the recipe's,
    or ("times", factor) on top of it. `fits`: by study, for rules of the kind `fitted`. Raises ValueError where the
    numbers make no cell: less than one batch, a warm-up that does not fit, a size that the family does not have.
    """
    chosen = tuple(sorted(options.items()))
    shape = point.shape or cached_shape(family, point.size, corpus.vocab_size, study.context, chosen)
    counts = _counts(shape)
    who = f"{family.name} with {counts['N']:,} parameters"
    recipe = {name: getattr(study.training, name) for name in Training.model_fields} | dict(point.overrides)
    recipe |= flat_recipe({name: value for name, (kind, value) in variation.items() if kind == "value"})
    recipe = _validated(recipe, point, variation)
    times = {name: value for name, (kind, value) in variation.items() if kind == "times"}
    laws = _laws(recipe, family.name, corpus.fingerprint, fits)
    rules = recipe | laws

    # 1. How long: D from the grid, then whole batches. A batch may depend on the unrounded D.
    wanted = _wanted_tokens(point, counts)
    if wanted > MAX_TOKENS:
        raise ValueError(f"{who}: {wanted:.3g} training tokens are more than {MAX_TOKENS:g}. Lower the budget.")
    known = {"width": shape.width, "depth": shape.depth} | _lengths(shape, counts, wanted)
    batch = _realised("batch_tokens", rules["batch_tokens"], known, times)
    batch_tokens = max(1, round(batch / study.context)) * study.context
    _check_batch(study, who, batch_tokens, recipe["gradient_noise"])
    steps = round(wanted / batch_tokens)
    if steps < 1:
        raise ValueError(
            f"{who}: {wanted:,.0f} training tokens are less than one batch of {batch_tokens:,}. Lower batch_tokens, or "
            "raise the budget."
        )
    tokens = steps * batch_tokens

    # 2. Hyperparameters, at the realised D.
    known |= {"batch_tokens": batch_tokens} | _lengths(shape, counts, tokens)

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
    schedule = _schedule(recipe, value, counts["N"], tokens, who)
    cell = Cell(
        numerics_version=numerics_version(shape, optimizer),
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
        "C": known["C"],
        "C_6nd": 6 * counts["N"] * tokens,
        "steps": steps,
        "epochs": round(corpus.epochs(tokens, study.context), 4),
    }
    labels = dict(point.labels) | {f"{name}_times": factor for name, factor in times.items()}
    facts = {"batch_tokens": batch_tokens, "schedule": schedule.name, "optimizer": optimizer.name}
    ruled = Ruled(laws, known if laws else {}, facts | {"context": study.context})
    return PlannedCell(cell, counts | realised, labels, batch, ruled)


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


def _wanted_tokens(point: GridPoint, counts: Mapping[str, int]) -> float:
    """D as the grid asks for it, before it is whole batches."""
    if point.tokens is not None:
        return point.tokens
    if point.flops is not None:
        return point.flops / counts["flops_per_token"]
    return (point.tokens_per_parameter or 0) * counts["N"]


def _check_batch(study: Study, who: str, batch_tokens: int, gradient_noise: bool) -> None:
    """ValueError where a batch has too few sequences to be shared, or compared with a part of it."""
    sequences = batch_tokens // study.context
    if gradient_noise and sequences == 1:
        raise ValueError(
            f"{who}: a batch of one sequence ({batch_tokens:,} tokens) has no part whose gradient could be compared "
            "with the whole's. Raise batch_tokens, or leave out gradient_noise."
        )
    if study.workers != "auto" and sequences < study.workers:
        raise ValueError(
            f"{who}: a batch of {plural(sequences, 'sequence')} ({batch_tokens:,} tokens) has none for some of "
            f"{study.workers} workers. Raise batch_tokens, or lower workers."
        )


def _schedule(recipe: Mapping[str, Any], value: Callable[..., float], N: int, tokens: int, who: str) -> Schedule:
    """What a schedule does not use is that of the defaults, so that equal runs are one cell. `value` realises a
    hyperparameter by its name. ValueError where the warm-up does not fit."""
    kind = recipe["schedule"]
    cooldown_fraction = value("cooldown_fraction") if kind == "wsd" else float(_DEFAULTS.cooldown_fraction)
    stable = _stable_share(kind, cooldown_fraction) * tokens
    schedule = Schedule(
        name=kind,
        warmup_tokens=int(value("warmup_tokens", _default_warmup(N, tokens, stable))),
        final_fraction=value("final_fraction") if kind != "constant" else float(_DEFAULTS.final_fraction),
        cooldown_fraction=cooldown_fraction,
        cooldown_shape=recipe["cooldown_shape"] if kind == "wsd" else _DEFAULTS.cooldown_shape,
    )
    if stable and schedule.warmup_tokens > stable:
        raise ValueError(
            f"{who}: a warm-up of {schedule.warmup_tokens:,} tokens does not fit into the {stable:,.0f} that a run of "
            f"{tokens:,} has before its cooldown: a branch cannot leave its trunk before the warm-up ends. Lower "
            "warmup_tokens or cooldown_fraction, or train longer."
        )
    return schedule


def _lengths(shape: accounting.Shape, counts: Mapping[str, int], tokens: float) -> dict[str, float]:
    """N, C and D, also as published rules count them."""
    return {
        "N": counts["N"],
        "D": tokens,
        "C": tokens * counts["flops_per_token"],
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
    wanted = max(1, round(study.validation_tokens / study.context)) if study.validation_tokens else 0
    return wanted * study.context if wanted < corpus.validation_windows(study.context) else 0


def _stable_share(schedule: str, cooldown_fraction: float) -> float:
    """The share of a run before its rate falls, which does not depend on its length; 0 where all of it does."""
    return {"wsd": 1.0 - cooldown_fraction, "constant": 1.0}.get(schedule, 0.0)


def _default_warmup(N: int, tokens: int, stable: float) -> float:
    """min(N, 10% of D); but N for cells that can share a trunk, so as not to follow D, where half of what is stable
    holds it. stable: tokens before the rate falls."""
    return N if stable / 2 >= N else min(N, 0.1 * tokens)


def _realised(name: str, rule: Any, known: Mapping[str, float], times: Mapping[str, float]) -> float:
    """A hyperparameter's value: a plain number as it stands, one that was computed to six digits and within range."""
    try:
        value = evaluate(rule, known)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
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


def _validated(recipe: dict[str, Any], point: GridPoint, variation: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Overrides come from the file as they stand; give them the types that the recipe's own fields have."""
    if not point.overrides and not variation:
        return recipe
    checked = Training.model_validate(recipe)
    return {name: getattr(checked, name) for name in recipe}
