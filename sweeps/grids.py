"""Grids: from a study and its corpus to the list of cells, by torch-free arithmetic.

A grid yields points (family, target size, token count, seeds); each point crossed with `vary` and the seeds is a
cell. Equal cells are planned once. Every fault is collected, so that all are reported at once.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sweeps.cell import Cell
from sweeps.corpora import CorpusInfo
from sweeps.errors import InputError
from sweeps.families import Family, find_family, resolve_options
from sweeps.fitted import Fit
from sweeps.lineage import Branch, apart_by_warmup, plan_branches, what_prevents
from sweeps.planned import LENGTHS, PlannedCell, plan_cell
from sweeps.points import GridPoint, grid_points
from sweeps.recipe import ScheduleFields, schedule_fields
from sweeps.rules import PowerLaw, PowerRule, law_warnings
from sweeps.stacks import check_stack, stack_key
from sweeps.study import Factors, LogVary, PointsGrid, Study
from sweeps.units import plural
from sweeps.usercode import trainer_identity

MAX_CELLS = 100_000
"""What a study may declare: more is a slip of the file, and would fill a plan's memory."""
MAX_EPOCHS = 4.0
"""Times that a cell may see its corpus: up to here repeated text is nearly as good as new (Muennighoff et al. 2023)."""
FEW_STEPS = 500
"""Optimizer steps below which the warm-up may decide the loss."""


@dataclass(frozen=True)
class Place:
    """One place of a grid with its seed: where any setting of the searched hyperparameters makes a cell."""

    study: Study
    corpus: CorpusInfo
    family: Family
    options: Mapping[str, Any]
    point: GridPoint
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
        try:
            return plan_cell(
                self.study, self.corpus, self.family, self.options, point, variation, self.seed, self.trainer, self.fits
            )
        except ArithmeticError as error:
            raise ValueError(_uncountable(self.family.name, error)) from error


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
    declared, least = 0, math.inf
    places: list[Place] = []
    for name, given in study.families.items():
        try:
            family = find_family(name, allow_code=allow_code, base_dir=base_dir)
            options = resolve_options(family, given)
            points = list(grid_points(study, family, corpus.vocab_size, options))
        except InputError as error:
            faults[str(error)] = None
            continue
        except ArithmeticError as error:
            faults[_uncountable(name, error)] = None
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
                    least = min(least, one.wanted_batch)
    faults |= dict.fromkeys(_epoch_faults(study, corpus, planned.values()))
    faults |= dict.fromkeys(_stack_faults(study, [one.cell for one in planned.values()]))
    if faults:
        shown = "\n".join(f"  {fault}" for fault in itertools.islice(faults, 10))
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise InputError(f"the study cannot be planned:\n{shown}{more}")
    cells = tuple(planned.values())
    warnings = (*_corpus_warnings(corpus), *_warnings(study, cells, least))
    if study.search is not None:  # its cells come from its trials (sweeps/search.py)
        return Plan(study, corpus, (), {}, warnings, dict(fits), tuple(places))
    branches = plan_branches(one.cell for one in cells)
    return Plan(study, corpus, cells, branches, warnings, dict(fits))


def examples(plan: Plan) -> list[PlannedCell]:
    """What the trials of a search will train: the cells of both ends of its space. Empty where nothing is searched."""
    return [place.plan(setting) for place in plan.places for setting in corners(plan.study)]


def first_trials(plan: Plan) -> list[PlannedCell]:
    """The cells of one trial of a search at every place, at the first end of its space."""
    return [place.plan(corners(plan.study)[0]) for place in plan.places]


def corners(study: Study) -> list[dict[str, Any]]:
    """The settings at which a place is planned to see whether it can be: both ends of what is searched, if anything."""
    if study.search is None:
        return [{}]
    space = study.search.space
    return [{name: axis.ends()[side] for name, axis in space.items()} for side in (0, 1)]


# --- variations and seeds ----------------------------------------------------------------------------------------


def _crossed(study: Study, points: list[GridPoint]) -> Iterator[tuple[GridPoint, dict[str, tuple[str, Any]], int]]:
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


def _seeds(study: Study, point: GridPoint) -> tuple[int, ...]:
    """The study's seeds and those of a replicated point, which follow from the first: seeds added later drop none."""
    others = (seed for seed in itertools.count() if seed != study.seeds[0])
    return tuple(dict.fromkeys((*study.seeds, *itertools.islice(others, point.extra_seeds))))


# --- what to say -------------------------------------------------------------------------------------------------


def _uncountable(family: str, error: ArithmeticError) -> str:
    return (
        f"family {family}: a number of the grid or of training is too large or too small to count with ({error}). "
        "Bring it nearer to 1."
    )


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


def _corpus_warnings(corpus: CorpusInfo) -> Iterator[str]:
    if corpus.altered_documents:
        yield (
            f"the tokenizer {corpus.tokenizer} does not give back the text of {corpus.altered_documents} of "
            f"{plural(corpus.validation_documents, 'validation document')}: it has no tokens for some characters, or "
            "drops or rewrites some. Losses per token compare among its own runs, but bits per byte would not compare "
            "with those of other tokenizers, and are left out. Use a tokenizer that falls back to bytes."
        )


def _warnings(study: Study, cells: tuple[PlannedCell, ...], least: float) -> Iterator[str]:
    """`least`: of the batches that were wanted, also by cells that are equal to others."""
    yield from law_warnings(one.ruled for one in cells if one.ruled.laws)
    if prevented := what_prevents(one.cell for one in cells):
        yield _unshared(study, cells[0].ruled.laws, prevented)
    elif _default_warmups(study) and (apart := apart_by_warmup(one.cell for one in cells)):
        yield (
            f"{len(apart)} of {len(cells)} cells share no trunk with the longer ones of their model: their warm-up is "
            "10% of D, since N tokens, as these have, do not fit into half of what comes before their cooldown. Give "
            f"warmup_tokens as a number, such as {min(one.schedule.warmup_tokens for one in apart):,}, and all lengths "
            "of a model train their common past once."
        )
    what = plural(len(cells), "cell") + (" at the ends of the searched space" if study.search else "")
    have, see = ("has", "sees") if len(cells) == 1 else ("have", "see")
    short = [one.counts["steps"] for one in cells if one.counts["steps"] < FEW_STEPS]
    if short:
        yield (
            f"{len(short)} of {what} {have} fewer than {FEW_STEPS} optimizer steps (fewest: {min(short)}): "
            "their losses may say more about the warm-up than about size. Use a smaller batch_tokens."
        )
    if least < study.context:
        yield (
            f"batch_tokens is {least:g} where a sequence has {study.context:,} tokens: such cells have a batch of one "
            "sequence. Raise batch_tokens, or shorten the context."
        )
    kinds = dict.fromkeys(one.cell.schedule.name for one in cells)
    used = set().union(*map(schedule_fields, kinds))
    tried = [*study.vary, *(study.search.space if study.search else ())]
    if unused := [name for name in tried if name in ScheduleFields.model_fields and name not in used]:
        yield (
            f"{' and '.join(unused)} {'is' if len(unused) == 1 else 'are'} varied to no effect: the schedule "
            f"{' or '.join(kinds)} does not use {'it' if len(unused) == 1 else 'them'}, and cells that differ in "
            "nothing else are one cell. Leave it out, or choose a schedule that has it."
        )
    warming = [one.cell for one in cells if one.cell.schedule.warmup_tokens >= one.cell.tokens]
    if warming:
        worst = min(warming, key=lambda cell: cell.tokens / cell.schedule.warmup_tokens)
        yield (
            f"{len(warming)} of {what} end before their warm-up does and never train at their learning rate: the "
            f"shortest has {worst.tokens:,} tokens and warms up over {worst.schedule.warmup_tokens:,}, to "
            f"{worst.tokens / worst.schedule.warmup_tokens:.2g} of its peak. Lower warmup_tokens, or leave it out."
        )
    repeated = [one.counts["epochs"] for one in cells if one.counts["epochs"] > 1]
    if repeated:
        yield (
            f"{len(repeated)} of {what} {see} the corpus more than once (most: {max(repeated):.2f} epochs); "
            "fits of single-epoch laws leave out those above 1.5."
        )


def _default_warmups(study: Study) -> bool:
    """Whether all warm-ups are what follows from N and D."""
    points = study.grid.points if isinstance(study.grid, PointsGrid) else []
    given = {name for part in (study.vary, *(point.training for point in points)) for name in part}
    return study.training.warmup_tokens is None and study.search is None and not {"warmup_tokens", "schedule"} & given


def _unshared(study: Study, laws: Mapping[str, PowerLaw], fields: tuple[str, ...]) -> str:
    """Why cells that differ in length share no trunk although their schedule would let them, and what to do."""
    names = dict.fromkeys(name.rpartition(".")[2] for name in fields)
    if "batch_tokens" in names and study.training.beta2 is None:
        names.pop("beta2", None)  # its default follows the batch
    rules = {name: laws.get(name, getattr(study.training, name, None)) for name in names}
    told = []
    for name, rule in rules.items():
        follows = [v for v in rule.power if v in LENGTHS] if isinstance(rule, PowerRule | PowerLaw) else []
        told.append(f"{name} follows {' and '.join(follows)}" if follows else f"{name} differs between their lengths")
    remedy = "Let it be a number" if len(told) == 1 else "Let them be numbers"
    return (
        "cells of one model and seed share no trunk although their schedule would let them, because "
        f"{', '.join(told)}. {remedy}, or a rule of N, width or depth, and all lengths of a model train their common "
        "past once."
    )
