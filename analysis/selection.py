"""Which runs a fit uses. Every row of the table is either used or named with the reason why not.

Losses are comparable only at equal corpus, tokenizer and context, and one law describes one family: a table that
mixes them is refused, not averaged. Where a study tried several settings at one size and token count, the best
setting stands for it, since the laws describe tuned models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.uncertainty import DESIGN, SEEDS, SETTINGS, Noise, alike, exclusions, merged, seed_noise
from analysis.verdicts import Verdict, budget_name
from sweeps.errors import InputError
from sweeps.units import plural

PENDING = ("planned", "running", "failed")
"""States of cells that may yet give a loss."""
FEW_STEPS = 300
"""Below so many optimiser steps the loss says more about warmup than about N and D."""
DIGITS = 4
"""Significant digits of the response from which on equal rows are taken for one run that is listed twice."""
SAME_TOKENS = 0.02
"""Of token counts of one size that whole batches round apart, where a table has no budgets."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The rows that a fit uses, with the response `y` and the law's variables, and what was said on the way.

    loss: the name of the column that `y` was taken from; where it is a loss, the column `loss` holds it too.
    noise: between seeds, or None. planned, finished: rows in the table, and rows with a loss.
    excluded: {"cell", "reason"} of each row left out.
    """

    rows: pd.DataFrame
    loss: str
    noise: Noise | None
    planned: int
    finished: int
    excluded: tuple[dict[str, str], ...]
    verdicts: tuple[Verdict, ...]


def select(
    runs: pd.DataFrame,
    loss: str | None = None,
    variables: Sequence[str] = ("N", "D"),
    response: str = "loss",
    needed: Sequence[str] = (),
) -> Selection:
    """Choose the rows of a run table that a fit may use.

    loss: the column to fit; by default `val_loss_final` where a loss is wanted and there is one, else `response`.
    variables: columns that the law needs. C defaults to 6 N D. needed: other columns that must be there.
    Raises InputError where a column is missing.
    """
    runs = with_states(runs)
    name = loss or ("val_loss_final" if response == "loss" and "val_loss_final" in runs.columns else response)
    missing = [c for c in (*variables, name, *needed) if c not in runs.columns]
    if missing:
        raise InputError(
            f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, runs.columns))}. "
            "Read a file of your own with analysis.read_table, which finds common names."
        )
    verdicts: list[Verdict] = []
    table = runs.reset_index(drop=True)
    table["y"] = table[name].astype(float)
    if response == "loss":
        table["loss"] = table["y"]
    table["cell"] = cell_names(table)
    numeric = [*variables, "y"]
    if {"N", "D"} <= set(table.columns):
        numeric += [c for c in ("N", "D", "C") if c not in numeric]
        if "C" not in table.columns or ("C_assumed" in table.columns and table["C_assumed"].all()):
            table["C"] = 6.0 * table["N"].astype(float) * table["D"].astype(float)
            if {"N", "D"} <= set(variables):
                message = "the table has no compute column: C is taken to be 6 N D."
                verdicts.append(Verdict("compute_assumed", "info", "fit", None, message))

    # 1. what the table itself says must be left out, and what is no number
    reason = table["excluded"].astype(object) if "excluded" in table.columns else pd.Series(None, table.index, object)
    numbers = table[numeric].astype(float)
    least = numbers.min(axis=1) >= 0 if "S2" in variables else (numbers > 0).all(axis=1)  # S2 is 0 at a constant rate
    broken = ~(least & (numbers < np.inf).all(axis=1))
    named = ", ".join(c for c in numeric if c != "y")
    reason = reason.where(reason.notna() | ~broken, f"{named} or the {response} is missing or not positive")

    # 2. a row that the table lists twice is one run
    repeated = _listed_twice(table[reason.isna()], (*variables, *needed))
    if len(repeated):
        reason = reason.where(~table.index.isin(repeated), "listed twice: another row has the same setting and loss")
        message = (
            f"{plural(len(repeated), 'row')} with another row's setting and {response} to the last digit; one counts."
        )
        verdicts.append(Verdict("repeated_losses", "info", "fit", None, message, {"runs": len(repeated)}))

    # 3. of several settings at one size and token count, the best one (one of accuracy over loss wants all models)
    tuned = response == "loss" and not {"N", "D", "C"}.isdisjoint(variables)
    known = tuned and {"N", "D"} <= set(table.columns)
    beaten = _beaten_settings(table[reason.isna()], variables) if known else table.index[:0]
    if len(beaten):
        reason = reason.where(~table.index.isin(beaten), "a better setting was tried at this size and token count")
        message = (
            f"{plural(len(beaten), 'run')} with other settings left out: at each size and token count the setting with "
            "the lowest mean loss stands for it. The best of several is a little too good by luck."
        )
        verdicts.append(Verdict("best_settings", "info", "fit", None, message, {"runs": len(beaten)}))

    rows = table[reason.isna()].reset_index(drop=True)
    verdicts += [*_comparable(rows, name), *_survivors(table, rows)]
    if "steps" in rows.columns and (few := int((rows["steps"] < FEW_STEPS).sum())):
        message = (
            f"{few} of {plural(len(rows), 'run')} took fewer than {FEW_STEPS} optimiser steps; their losses still "
            "carry the warmup. Lower batch_tokens, or train longer."
        )
        verdicts.append(Verdict("few_steps", "caution", "fit", None, message, {"runs": few}))
    finished = int((table["state"] == "finished").sum()) if "state" in table.columns else int((~broken).sum())
    pending = int(table["state"].isin(PENDING).sum()) if "state" in table.columns else 0
    if pending:
        message = f"{pending} of {len(table)} planned cells are still to come; the fit may move as they do."
        verdicts.append(Verdict("partial", "info", "fit", None, message, {"runs": pending}))
    others = reason[~table.index.isin([*beaten, *repeated]) & reason.notna()]
    if "state" in table.columns:
        others = others[~table.loc[others.index, "state"].isin(PENDING)]
    verdicts += left_out(others)
    return Selection(
        rows=rows,
        loss=name,
        noise=seed_noise(rows, "y"),
        planned=len(table),
        finished=finished,
        excluded=tuple({"cell": str(table["cell"][i]), "reason": str(reason[i])} for i in table.index[reason.notna()]),
        verdicts=tuple(verdicts),
    )


def cell_names(runs: pd.DataFrame) -> "pd.Series[Any]":
    """What each run is called: by its column `cell`, or by its row where it has no name there."""
    rank = pd.Series([f"row {i}" for i in range(len(runs))], runs.index, dtype=object)
    return runs["cell"].astype(object).where(runs["cell"].notna(), rank) if "cell" in runs.columns else rank


def with_states(runs: pd.DataFrame) -> pd.DataFrame:
    """The table with its column `state`, if it has one in any spelling, in plain words, and `excluded` filled by it.

    A mark in `excluded` (True, no, blank) is turned into a reason or None, with a column of states or without.
    A running job's loss is no final one, and a word of another tool's (crashed, killed) is not taken for success: only
    finished counts, and diverged where divergences do. A row whose state is empty is what its loss says.
    """
    name = next((c for c in runs.columns if str(c).strip().lower() == "state"), None)
    name = "state" if "state" in runs.columns else name
    told = exclusions(runs)
    if name is None:
        return runs.assign(excluded=told) if "excluded" in runs.columns else runs
    state = runs[name].astype(object).where(runs[name].notna(), "finished").astype(str).str.strip().str.lower()
    said: dict[str, str | None] = {
        word: f"state {word}, which is neither finished nor diverged" for word in state.unique()
    }
    said |= {word: f"not finished ({word})" for word in PENDING} | {"diverged": "diverged", "finished": None, "": None}
    return runs.assign(state=state, excluded=told.where(told.notna(), state.map(said)))


def drop_rows(selection: Selection, positions: np.ndarray, reason: str, verdict: Verdict) -> Selection:
    """The selection without the rows at these positions, which are named as left out for `reason`."""
    gone = selection.rows.iloc[positions]
    rows = selection.rows.drop(index=gone.index).reset_index(drop=True)
    return replace(
        selection,
        rows=rows,
        noise=seed_noise(rows, "y") if selection.noise and selection.noise.source == "seeds" else selection.noise,
        excluded=(*selection.excluded, *({"cell": str(cell), "reason": reason} for cell in gone["cell"])),
        verdicts=(*selection.verdicts, verdict),
    )


def _survivors(table: pd.DataFrame, rows: pd.DataFrame) -> list[Verdict]:
    """A caution for each budget with diverged cells among its sizes: the curve is drawn through those that survived."""
    if not {"state", "budget", "N"} <= set(table.columns):
        return []
    verdicts = []
    for budget, group in rows.groupby("budget"):
        lost = table[(table["state"] == "diverged") & (table["budget"] == budget)]
        inside = lost["N"].between(group["N"].min() / 1.5, group["N"].max() * 1.5)  # a lattice step is sqrt 2
        if not inside.any():
            continue
        name = budget_name(float(budget))  # type: ignore[arg-type]
        message = (
            f"budget {name}: {plural(int(inside.sum()), 'cell')} diverged among its sizes, so its curve is drawn "
            "through those that survived. Lower the learning rate there, and train them again."
        )
        evidence = {"diverged": lost.loc[inside, "cell"].astype(str).tolist()}
        verdicts.append(Verdict("outcome_selection", "caution", "budget", name, message, evidence))
    return verdicts


def left_out(reasons: pd.Series) -> list[Verdict]:
    """How many runs were left out, and why; reasons: one for each of them."""
    if reasons.empty:
        return []
    counts = reasons.value_counts()
    listed = "; ".join(f"{count}: {reason}" for reason, count in counts.head(4).items())
    more = f"; and {plural(len(counts) - 4, 'other reason')}" if len(counts) > 4 else ""
    message = f"{plural(len(reasons), 'run')} left out of the fit ({listed}{more})."
    evidence = {str(reason): int(count) for reason, count in counts.items()}
    return [Verdict("excluded_runs", "info", "fit", None, message, evidence)]


def _listed_twice(rows: pd.DataFrame, names: Sequence[str]) -> pd.Index:
    """The rows equal to an earlier one in all that tells runs apart (and the columns `names`) and in the response.

    Only where the response is told in full.
    """
    if not told_in_full(rows["y"]):
        return rows.index[:0]
    own = dict.fromkeys((*names, *DESIGN, *SEEDS, "budget", "y"))
    return rows.index[rows.duplicated([c for c in own if c in rows.columns])]


def told_in_full(values: "pd.Series[float]") -> bool:
    """Whether numbers have so many digits that equal ones are one run listed twice.

    With fewer than 4, runs whose seeds are not told agree by chance. With 4, one pair in thirty still does at a noise
    of .3%, and losing that costs less than counting a table twice. By the median row, since 2.9 may be 2.900 without
    its zeros.
    """
    known = values.dropna()
    return len(known) > 0 and bool(known.map(_digits).median() >= DIGITS)


def _digits(value: float) -> int:
    """How many significant digits a number is given with, less zeros at its end."""
    return len(f"{value:.15g}".partition("e")[0].replace(".", "").strip("0"))


def _beaten_settings(rows: pd.DataFrame, variables: Sequence[str]) -> pd.Index:
    """The rows whose hyperparameters did worse, in the mean over seeds, than others at the same size and tokens.

    The same place is also where the other variables of the law are equal: at each of them a study may tune anew.
    """
    settings = [c for c in SETTINGS if c in rows.columns and rows[c].notna().any()]
    if not settings or rows.empty:
        return rows.index[:0]
    # Two batch sizes round one budget, or one D, to slightly different D: the budget names the cell where there is one.
    budget = rows["budget"] if "budget" in rows.columns else pd.Series(np.nan, rows.index)
    family = rows["family"] if "family" in rows.columns else pd.Series("", rows.index)
    place = pd.DataFrame({"family": family, **alike(rows.assign(budget=budget), ("N", "budget"))})
    counts = rows["D"].astype(float).groupby([family, place["N"]], dropna=False)
    place["D"] = counts.transform(lambda D: merged(D.to_numpy(), SAME_TOKENS))
    place["D"] = place["D"].where(budget.isna())
    for name in variables:
        if name not in ("N", "D", "C"):
            place[name] = rows[name].astype(float).map("{:.3g}".format)  # unique tokens round to batches as D does
    at = place.groupby(list(place.columns), dropna=False).ngroup()
    setting = alike(rows, settings).groupby(settings, dropna=False).ngroup()
    mean = rows["loss"].groupby([at, setting]).transform("mean")
    best = mean.groupby(at).transform("min")
    return rows.index[mean > best]


def _comparable(rows: pd.DataFrame, loss: str) -> list[Verdict]:
    verdicts = []
    if "family" in rows.columns and (families := sorted(map(str, rows["family"].dropna().unique())))[1:]:
        message = f"the runs are of several families ({', '.join(families)}); a law holds for one. Fit them apart."
        verdicts.append(Verdict("mixed_families", "refuse", "fit", None, message))
    mixed = [
        c
        for c in ("corpus", "tokenizer", "context", "validation_tokens")
        if c in rows.columns and rows[c].nunique() > 1
    ]
    if mixed and loss != "val_bpb_final":
        message = (
            f"the runs differ in {', '.join(mixed)}, so their losses per token cannot be compared. Fit them apart, or "
            'ask for bits per byte (loss="val_bpb_final").'
        )
        verdicts.append(Verdict("mixed_losses", "refuse", "fit", None, message))
    return verdicts


def provenance(selection: Selection, **settings: object) -> dict[str, object]:
    """Where the numbers of a fit come from: studies, corpora, cells, conventions, settings, versions, time."""
    import platform

    import scipy

    from sweeps.records import timestamp

    rows = selection.rows
    names = ("study", "family", "corpus", "tokenizer", "context", "precision")
    return {
        **{c: sorted(rows[c].dropna().unique().tolist()) for c in names if c in rows.columns},
        "cells": rows["cell"].astype(str).tolist(),
        "seeds": int(rows[[c for c in SEEDS if c in rows.columns]].drop_duplicates().shape[0]),
        "loss": selection.loss,
        "settings": settings,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "fitted": timestamp(),
    }
