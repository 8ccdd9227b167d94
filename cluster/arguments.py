"""What the commands share: their common options, and how a store, a study and a cell are named on the command line.

Every command of `escala.py` and `cluster/verbs.py` reads its words here, so that a wrong name is refused in the same
way everywhere; so do the many options of a fit. Imports are inside the functions: `escala --help` loads this file.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sweeps.store import Store

DEFAULT_STORE = Path("escala-store")

StudyFileArgument = Annotated[str, typer.Argument(help="A study file, or the name of a shipped study.")]
StudyArgument = Annotated[
    str, typer.Argument(help="A study file, or the name of a shipped study or of one in the store.")
]
CellArgument = Annotated[str, typer.Argument(help="A cell's id, or the beginning of it.")]
StoreOption = Annotated[
    Path, typer.Option("--store", envvar="ESCALA_STORE", help="The folder that holds corpora, cells and studies.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _tracking_uri(uri: str | None) -> str | None:
    from cluster.credentials import check_uri

    return None if uri is None else check_uri(uri)


TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        envvar="MLFLOW_TRACKING_URI",
        callback=_tracking_uri,
        help="MLflow server. Default: a database in the store. Runs are read from it where no store has them.",
    ),
]

CodeOption = Annotated[bool, typer.Option("--allow-code", help="Let the study run Python files beside it.")]
AcceptOption = Annotated[
    bool, typer.Option("--accept-corpus", help="Go on although the corpus differs from the one that was pinned.")
]
RefitOption = Annotated[
    bool,
    typer.Option("--refit", help="Take the newest fits of studies named as `fitted`, not those of its first run."),
]


def existing_store(store: Path) -> "Store":
    """The store at a path. InputError where there is none: a command that only looks makes no new one."""
    from sweeps.store import open_store

    return open_store(store, create=False)


def study_name(study: str, store: "Store | None") -> str:
    """A study's name, from the name itself or from its file."""
    from sweeps.errors import InputError, nearest
    from sweeps.store import study_names
    from sweeps.studyfile import find_study_file, load_study

    known = study_names(store) if store else []
    if study in known:
        return study
    try:
        return load_study(find_study_file(study)).name
    except InputError:
        if store is None or Path(study).is_file():
            raise
        there = ", ".join(known) or "none yet"
        raise InputError(
            f"no study {study!r}{nearest(study, known)} in the store {store.root} (it has: {there}), and no such file."
        ) from None


def find_cell(prefix: str, store: "Store") -> str:
    """The one cell whose id begins with `prefix`. InputError where none does; where several do, it tells them apart."""
    from cluster.watching import ambiguous, cells_named
    from sweeps.errors import InputError

    found = cells_named(store, prefix)
    if not found:
        raise InputError(
            f"no cell in {store.root} with an id that begins with {prefix!r}. `escala status STUDY` lists a study's "
            "cells, `escala status` the studies."
        )
    if len(found) > 1:
        raise ambiguous(store, prefix, found)
    return found[0]


def check_study_law(study: str, law: str, needs: Sequence[str], columns: Iterable[str]) -> None:
    """InputError for a law that needs what a study's runs do not have under that name, such as x; then by a table."""
    from sweeps.errors import InputError

    there = {*columns, "loss"}
    if missing := [name for name in dict.fromkeys(needs) if name not in there]:
        raise InputError(
            f"--law {law} is a law of {', '.join(needs)}; the runs of a study have no {', '.join(missing)}. "
            f"Name columns for them: escala export {study} --out runs.csv, then escala fit runs.csv --law {law} "
            f"--columns {','.join(f'{name}=COLUMN' for name in missing)}"
        )


def fit_options(
    law: str,
    objective: str | None,
    delta: float | None,
    drop_worst: int,
    bootstrap: int | None,
    cluster: str | None,
    weights: str | None,
    for_loss: list[float] | None,
    level: float,
    seed: int,
) -> dict[str, Any]:
    """The arguments of `analysis.fit` that were asked for. A parabola per budget has no use for some of them."""
    from sweeps.errors import InputError

    asked: dict[str, Any] = {"objective": objective, "threshold": delta, "cluster": cluster, "weights": weights}
    asked |= {"drop_worst": drop_worst or None, "loss_targets": for_loss or None}  # 0 and none are their defaults
    asked = {k: v for k, v in asked.items() if v is not None}  # any other 0 was asked for, and a fit refuses it
    if law in ("isoflop", "akima") and asked:
        names = {
            "objective": "--loss",
            "threshold": "--delta",
            "drop_worst": "--drop-worst",
            "loss_targets": "--for-loss",
        }
        listed = ", ".join(names.get(k, f"--{k}") for k in asked)
        how = "a parabola to each budget by least squares" if law == "isoflop" else "a spline to each budget"
        raise InputError(f"{listed}: not for --law {law}, which fits {how}.")
    if cluster is not None:
        asked["resample"] = "rows"
    if level != 0.95:
        asked["level"] = level
    return asked | ({"resamples": bootstrap} if bootstrap is not None else {}) | ({"seed": seed} if seed else {})
