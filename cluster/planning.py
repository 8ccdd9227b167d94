"""Planning: from a study file, as a command names it, to its plan over a corpus that is there.

Guarded against: a study whose corpus, or whose fitted rules, have changed under it. What a study was first planned on
stays pinned unless its file names another corpus or the change is accepted; the fits of other studies that its
hyperparameters come from stay those of its first plan until it is refitted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.display import Waiting
from sweeps.corpora import make_source, prepare
from sweeps.errors import InputError
from sweeps.fitted import Fit, changed_laws, fit_from_json, fitted_studies, read_fit
from sweeps.grids import Plan, plan_study
from sweeps.store import Store, open_store, read_plan, study_names
from sweeps.studyfile import find_study_file, load_study, place_of
from sweeps.trials import with_trials


def read_study(
    study: str, store: Path, allow_code: bool, accept_corpus: bool, *, create: bool = True, refit: bool = False
) -> tuple[Store, Plan, Path]:
    """Load a study file, find or build its corpus, plan its cells. Returns the file's path too.

    refit: take the newest fits of the studies that it names as `fitted`, not those of its plan on record.
    """
    path = find_study_file(study)
    declared = load_study(path)
    base_dir = path.resolve().parent
    source = make_source(declared.corpus.source, declared.corpus.path, declared.corpus.options, base_dir=base_dir)
    sources = sorted(set(fitted_studies(declared.model_dump())))
    place = open_store(store, create=create and not sources)  # what is fitted is in a store that is there
    pinned = declared.corpus.fingerprint
    pinned_fits: dict[str, Fit] = {}
    if declared.name in study_names(place):
        before = read_plan(place, declared.name)
        if before.get("foreign"):
            raise InputError(
                f"{path}: study {declared.name} of {place.root} holds imported runs and trains nothing. Name this one "
                "otherwise."
            )
        if pinned is None and _same_corpus(before["study"], declared.model_dump(mode="json", by_alias=True)):
            pinned = before["corpus"]["fingerprint"]
        if not refit:
            pinned_fits = {name: fit_from_json(fit) for name, fit in before.get("fitted", {}).items()}
    try:
        fits = _all_fits(place, sources, pinned_fits)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    try:
        with Waiting() as waiting:
            corpus = prepare(
                source, declared.tokenizer, place.root, accept=accept_corpus, pinned=pinned, progress=waiting.update
            )
    except InputError as error:
        if not error.field:  # the store's fault
            raise
        raise InputError(f"{place_of(path, *error.field)}: {error}") from error
    try:
        planned = plan_study(declared, corpus, allow_code=allow_code, base_dir=base_dir, fits=fits)
        planned = with_trials(place, planned)
    except InputError as error:
        newer = [name for name in fits if name in pinned_fits and _newer(place, fits[name])]
        hint = f"\n  The fit of {' and of '.join(newer)} has changed since this study was planned: --refit takes it."
        long = str(error).startswith("a context of")  # which does not fit the corpus
        found_at = place_of(path, "context") if long and "context" in declared.model_fields_set else path
        raise InputError(f"{found_at}: {error}{hint * bool(newer)}") from None
    told = tuple(_changes(place, planned, pinned_fits))
    return place, replace(planned, warnings=told + planned.warnings), path


def _all_fits(store: Store, sources: list[str], pinned: Mapping[str, Fit]) -> dict[str, Fit]:
    """The fit of each source: the pinned one, else that in the store. InputError that says all that is wrong."""
    fits, faults = {}, []
    for name in sources:
        try:
            fits[name] = pinned[name] if name in pinned else read_fit(store, name)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError(faults[0] if len(faults) == 1 else "\n  ".join(["several fits are missing:", *faults]))
    return fits


def _changes(store: Store, plan: Plan, pinned: Mapping[str, Fit]) -> Iterator[str]:
    """For each pinned fit that its study has since replaced by another: what it was, and how to take the new one."""
    for name, fit in plan.fits.items():
        newest = _newer(store, fit) if name in pinned else None
        if newest and (changes := changed_laws(fit, newest)):
            yield (
                f"the fit of {name} has changed since this study was planned ({'; '.join(changes)}). It keeps the fit "
                "of then, and so its cells; --refit (plan, run) takes the new one, and cells whose values change by it "
                "are trained anew."
            )


def _newer(store: Store, fit: Fit) -> Fit | None:
    """The fit that its study has now, where it is another; None also where the study is gone."""
    try:
        newest = read_fit(store, fit.study)
    except InputError:
        return None
    return None if newest.laws == fit.laws else newest


def _same_corpus(before: dict[str, Any], now: dict[str, Any]) -> bool:
    keys = ("source", "path", "options")
    return before["tokenizer"] == now["tokenizer"] and all(before["corpus"][k] == now["corpus"][k] for k in keys)
