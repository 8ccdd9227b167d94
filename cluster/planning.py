"""Planning: from a study file, as a command names it, to its plan over a corpus that is there.

Guarded against: a study whose corpus has changed under it. What a study was first planned on stays pinned unless its
file names another corpus or the change is accepted.
"""

from pathlib import Path
from typing import Any

from cluster.display import Waiting
from sweeps.corpora import make_source, prepare
from sweeps.errors import InputError
from sweeps.grids import Plan, plan_study
from sweeps.store import Store, open_store, read_plan, study_names
from sweeps.studyfile import find_study_file, load_study
from sweeps.trials import with_trials


def read_study(
    study: str, store: Path, allow_code: bool, accept_corpus: bool, *, create: bool = True
) -> tuple[Store, Plan, Path]:
    """Load a study file, find or build its corpus, plan its cells. Returns the file's path too."""
    path = find_study_file(study)
    declared = load_study(path)
    base_dir = path.resolve().parent
    source = make_source(declared.corpus.source, declared.corpus.path, declared.corpus.options, base_dir=base_dir)
    place = open_store(store, create=create)
    pinned = declared.corpus.fingerprint
    if declared.name in study_names(place):
        before = read_plan(place, declared.name)
        if before.get("foreign"):
            raise InputError(
                f"{path}: study {declared.name} of {place.root} holds imported runs and trains nothing. Name this one "
                "otherwise."
            )
        if pinned is None and _same_corpus(before["study"], declared.model_dump(mode="json", by_alias=True)):
            pinned = before["corpus"]["fingerprint"]
    with Waiting() as waiting:
        corpus = prepare(
            source, declared.tokenizer, place.root, accept=accept_corpus, pinned=pinned, progress=waiting.update
        )
    try:
        planned = plan_study(declared, corpus, allow_code=allow_code, base_dir=base_dir)
        planned = with_trials(place, planned)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return place, planned, path


def _same_corpus(before: dict[str, Any], now: dict[str, Any]) -> bool:
    keys = ("source", "path", "options")
    return before["tokenizer"] == now["tokenizer"] and all(before["corpus"][k] == now["corpus"][k] for k in keys)
