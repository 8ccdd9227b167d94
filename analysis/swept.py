"""Runs as swept groups: everything but the learning rate (and the batch) is equal in one, and its points are settings.

Guards against four ways to average what does not belong together: a batch size that nobody named taken for a seed, a
rate written 0.000345 here and 0.0003453 there, a row that was listed twice taken for a second run, and a run that blew
up taken for a bad setting. What was merged, dropped or taken for diverged is said.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.selection import PENDING, told_in_full, with_states
from analysis.uncertainty import SETTINGS, alike, merged
from analysis.verdicts import NAN, Verdict
from sweeps.errors import InputError, nearest
from sweeps.units import human, plural

AXES = ("learning_rate", "batch_tokens")
"""What an optimum is sought over."""
BLOWN_UP = 1.5
"""A run above the best rate of its batch, whose loss is more than this many times the lowest of its (N, D), is taken
for diverged. Of the 1911 runs of Step Law (Li et al. 2025) it takes those that went above 4 nats: the worst of the
others stands at 1.20 times the lowest, the best of them at 1.70."""
ALWAYS = ("family", "parametrisation", "corpus", "tokenizer", "context")
"""Runs that differ in these never share a place: their rates, or their losses, do not compare."""
SHAPES = ("width", "depth", "heads", "mlp_width")
_OTHERS = (*(c for c in SETTINGS if c not in (*AXES, *ALWAYS)), *SHAPES)
"""Settings that divide groups where they were crossed with the axes."""
_BATCHES = ("bs", "batch", "batch_size", "batchsize", "global_batch_size", "train_batch_size", "gbs")


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs of one group as settings.

    key: what is equal in it: N, D, and family, parametrisation, batch_tokens ... where there are such columns.
    columns: one value per setting, by batch and rate: learning_rate, batch_tokens (as written, or the mean of those
        that were merged, equal to the last digit in all settings at that level; NaN unknown), loss (in nats, geometric
        mean over its runs that did not diverge, NaN where all did), count (of those), diverged (of the others), squares
        (sum of squared deviations of ln loss between its runs), capped (mean over all its runs of the loss, at most
        that at the start, which a run counts as whose state is diverged, wherever it ended; NaN where a diverged run
        has no loss and the start is not known).
    start: loss of the untrained model in nats, NaN unknown, or where no run got below it, as in another unit.
    """

    key: Mapping[str, Any]
    columns: Mapping[str, np.ndarray]
    start: float = NAN

    @property
    def points(self) -> pd.DataFrame:
        """The columns as a table."""
        return pd.DataFrame(dict(self.columns))

    @property
    def order(self) -> tuple[tuple[str, ...], float, float, tuple[str, ...]]:
        """By family, then N, D and the rest."""
        families = tuple(str(self.key.get(k, "")) for k in ("family", "parametrisation"))
        rest = tuple(f"{v:030.6f}" if isinstance(v, float) else str(v) for v in self.key.values())
        return families, self.key["N"], self.key["D"], rest

    @property
    def name(self) -> str:
        """Short words for tables and verdicts: "llama N=50k D=1M"."""
        texts = [str(self.key[k]) for k in ("family", "parametrisation") if k in self.key]
        numbers = [(k, v) for k, v in self.key.items() if k not in (*ALWAYS, "study")]
        short = {"batch_tokens": "batch", "learning_rate": "lr"}
        counts = ("N", "D", "batch_tokens")
        plain = ((k, human(v) if k in counts else f"{v:.4g}" if isinstance(v, float) else v) for k, v in numbers)
        return " ".join([*texts, *(f"{short.get(k, k)}={words}" for k, words in plain)])


@dataclass(frozen=True, kw_only=True)
class Swept:
    """All groups of a table, over which axes, and what was said on the way. left_out: reason -> cells."""

    groups: tuple[Group, ...]
    axes: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]
    verdicts: tuple[Verdict, ...]
    runs: int
    diverged: int


def swept_groups(runs: pd.DataFrame, axes: Sequence[str] | None = None) -> Swept:
    """Divide a table of runs into groups and settings.

    runs: of `load_runs` or `read_table`: N, D, learning_rate, and val_loss_final or loss. axes: what the optimum is
        sought over; by default the rate, and the batch too where at least half of the groups cross 3 of each.
    Raises InputError where a column is missing, no row has positive numbers, or a batch size stands in a column that
    was not read, since runs at several batches would pass for seeds.
    """
    for axis in axes or ():
        if axis not in AXES:
            raise InputError(f"axis {axis!r}{nearest(axis, AXES)}: an optimum is sought over {' and '.join(AXES)}.")
    runs = with_states(runs)
    loss = "val_loss_final" if "val_loss_final" in runs.columns else "loss"
    needed = ("N", "D", "learning_rate", *(axes or ()), loss)
    if missing := [c for c in dict.fromkeys(needed) if c not in runs.columns]:
        raise InputError(
            f"the table lacks {', '.join(missing)}{nearest(missing[0], map(str, runs.columns))}; it has "
            f"{', '.join(map(str, runs.columns))}. Read a file of your own with analysis.read_table."
        )
    rows, left_out = _usable(runs, loss, ("N", "D", *(axes or AXES[:1])))
    if "batch_tokens" not in rows.columns:
        rows["batch_tokens"] = NAN
        _refuse_unread_batch(rows)
    written = {axis: rows[axis].to_numpy(dtype=float) for axis in AXES}
    for name in ("N", "D", *AXES):
        rows[name] = merged(rows[name].to_numpy(dtype=float))
    for axis in AXES:
        rows[f"apart {axis}"] = np.log(written[axis] / rows[axis])
    others = [c for c in _OTHERS if c in rows.columns]
    rows[others] = alike(rows, others)
    always = [c for c in ALWAYS if c in rows.columns and rows[c].notna().any()]
    base = rows.groupby([*always, "N", "D"], dropna=False).ngroup().to_numpy()
    keys, moving = _divide(rows, base)
    rows["at"] = rows.assign(base=base).groupby(["base", *keys], dropna=False).ngroup() if keys else base
    rows, blown = _mark_diverged(rows)
    chosen = tuple(axes) if axes else _axes(rows)
    other = [a for a in AXES if a not in chosen and rows.groupby("at")[a].nunique().max() > 1]
    rows["at"] = rows.groupby(["at", *other], dropna=False).ngroup() if other else rows["at"]
    always += keys
    described = ["N", "D", *(a for a in AXES if a not in chosen and rows[a].notna().any())]
    rows, repeated = _without_repeats(rows)
    for axis in AXES:
        rows[f"level {axis}"] = _levels(rows, axis)
    groups = [_group(part, [*always, *described]) for _, part in rows.groupby("at")]
    groups.sort(key=lambda g: g.order)
    return Swept(
        groups=tuple(groups),
        axes=chosen,
        left_out=left_out | ({"listed twice: another row has the same setting and loss": repeated} if repeated else {}),
        verdicts=(*_say(rows, left_out, repeated, blown, moving), *_still_to_come(runs)),
        runs=len(rows),
        diverged=int(rows["diverged"].sum()),
    )


def told_apart(rows: pd.DataFrame) -> list[str]:
    """The columns beside N and D, of those that have several values, across which no losses are compared or averaged:
    what is always apart, and the shapes that differ at one N."""
    always = [c for c in ALWAYS if c in rows.columns and rows[c].nunique(dropna=False) > 1]
    shapes = [c for c in SHAPES if c in rows.columns and rows.groupby("N")[c].nunique(dropna=False).max() > 1]
    return always + shapes


def _usable(runs: pd.DataFrame, loss: str, needed: Sequence[str]) -> tuple[pd.DataFrame, dict[str, tuple[str, ...]]]:
    """The rows that finished or diverged, with `y` (ln loss, NaN where diverged without one) and `diverged`.

    needed: columns without which a row says nothing, even where all rows lack them; another axis may be unknown.
    """
    table = runs.reset_index(drop=True)
    if "cell" not in table.columns:
        table["cell"] = [f"row {i}" for i in range(len(table))]
    values = table[loss].astype(float)
    state = table["state"] if "state" in table.columns else pd.Series("finished", table.index)
    diverged = (state == "diverged") | (values == np.inf)
    reason = table["excluded"].astype(object) if "excluded" in table.columns else pd.Series(None, table.index, object)
    reason = reason.mask(diverged | reason.isna(), None)
    if "rung" in table.columns:
        reason = reason.mask(table["rung"].astype(float) < 1.0, "an early rung of a search")
    known = [c for c in ("N", "D", *AXES) if c in needed or (c in table.columns and table[c].notna().any())]
    axes = table[known].astype(float)
    broken = ~((axes > 0) & (axes < np.inf))
    lacked = [axes.columns[row] for row in broken.to_numpy()]
    faults = [f"{' and '.join(c)} {'is' if len(c) == 1 else 'are'} missing or not positive" for c in lacked]
    reason = reason.mask(reason.isna() & broken.any(axis=1), pd.Series(faults, table.index, dtype=object))
    reason = reason.mask(reason.isna() & ~diverged & ~(values > 0), "the loss is missing or not positive")
    left_out: dict[str, list[str]] = {}
    pending = state.isin(PENDING)
    for i in table.index[reason.notna() & ~pending]:
        left_out.setdefault(str(reason[i]), []).append(str(table["cell"][i]))
    kept = table[reason.isna()].copy()
    if kept.empty:
        told = "; ".join(f"{len(cells)}: {why}" for why, cells in left_out.items())
        raise InputError(
            f"no run of {len(table)} has a loss at a positive learning rate, N and D"
            f"{f' ({told})' if told else ''}: name other columns, or finish the study first."
        )
    kept["diverged"] = diverged[kept.index]
    kept["measured"] = values[kept.index].where(np.isfinite(values[kept.index]))
    return kept.reset_index(drop=True), {why: tuple(cells) for why, cells in left_out.items()}


def _refuse_unread_batch(rows: pd.DataFrame) -> None:
    """InputError where runs of equal N, D and rate differ in a column that looks like a batch size."""
    for column in rows.columns:
        plain = str(column).strip().lower().replace(" ", "_")
        if plain in _BATCHES and rows.groupby(["N", "D", "learning_rate"])[column].nunique().max() > 1:
            raise InputError(
                f"runs of equal N, D and learning rate differ in {column}, which looks like a batch size, and no batch "
                f"is named: they would pass for seeds. Say it in tokens, as in --columns 'batch={column}*2048'."
            )


def _divide(rows: pd.DataFrame, base: np.ndarray) -> tuple[list[str], list[str]]:
    """The settings that were crossed with the axes, which divide groups, and those that only move along with them."""
    keys: list[str] = []
    moving: list[str] = []
    for name in _OTHERS:
        if name not in rows.columns or rows[name].nunique(dropna=False) < 2:
            continue
        coded = rows[name].groupby(rows[name], dropna=False).ngroup()
        if coded.groupby(base).nunique().max() < 2:
            continue
        crossed = coded.groupby([base, rows["learning_rate"], rows["batch_tokens"]], dropna=False).nunique()
        (keys if crossed.max() > 1 else moving).append(name)
    return keys, moving


def _mark_diverged(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The rows with runs that blew up marked (see `BLOWN_UP`), and how many of them there are."""
    settled = rows["measured"].where(~rows["diverged"])
    lowest = settled.groupby(rows["at"]).transform("min")
    slices = [rows["at"], rows["batch_tokens"].fillna(0.0)]
    best = settled == settled.groupby(slices).transform("min")
    rate = rows["learning_rate"].where(best).groupby(slices).transform("min")
    blown = (rows["measured"] > BLOWN_UP * lowest) & (rows["learning_rate"] > rate) & ~rows["diverged"]
    return rows.assign(diverged=rows["diverged"] | blown, blown=blown), int(blown.sum())


def _axes(rows: pd.DataFrame) -> tuple[str, ...]:
    """Both where at least half of the groups have 3 batches with 3 rates each, or, as a search leaves them, 7 settings
    scattered over 3 of each with mostly one rate a batch."""
    rates = rows.groupby(["at", "batch_tokens"])["learning_rate"].nunique()
    by_group = rates.groupby("at")
    crossed = by_group.apply(lambda counts: (counts >= 3).sum() >= 3)
    spread = rows.groupby("at")["learning_rate"].nunique()
    scattered = (by_group.sum() >= 7) & (by_group.median() < 2) & (by_group.size() >= 3) & (spread >= 3)
    both = int((crossed | scattered.reindex(crossed.index, fill_value=False)).sum()) if len(crossed) else 0
    return AXES if both * 2 >= rows["at"].nunique() else AXES[:1]


def _without_repeats(rows: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Rows equal in setting and in every digit of the loss are one run that a table lists twice, unless losses
    were rounded to so few that runs agree by chance."""
    if not told_in_full(rows["measured"]):
        return rows, ()
    own = ["at", *AXES, "measured", *(c for c in ("seed", "data_seed") if c in rows.columns)]
    again = rows.duplicated(own) & rows["measured"].notna()
    return rows[~again].reset_index(drop=True), tuple(rows.loc[again, "cell"].astype(str))


def _levels(rows: pd.DataFrame, axis: str) -> pd.Series:
    """One value for all rows of a group whose rates, or batches, were merged: the geometric mean of those written.

    It is the same to the last digit in all settings at it, however many seeds each of them has, so that levels can be
    compared and counted; and it is the value as written where there is but one.
    """
    return rows[axis] * np.exp(rows.groupby(["at", axis])[f"apart {axis}"].transform("mean"))


def _group(rows: pd.DataFrame, names: Sequence[str]) -> Group:
    first = rows.iloc[0]
    known = {k: first[k] for k in names if not pd.isna(first[k])}
    key = {k: float(v) if isinstance(v, float | int | np.number) else v for k, v in known.items()}
    start = _start(rows)
    rate, batch = (rows[a].to_numpy(dtype=float) for a in AXES)
    order = np.lexsort((rate, batch))
    apart = [np.diff(np.nan_to_num(axis[order])) != 0 for axis in (rate, batch)]  # an unknown one is the same in all
    changes = np.flatnonzero(apart[0] | apart[1]) + 1
    starts = np.concatenate([[0], changes])
    diverged = rows["diverged"].to_numpy(dtype=bool)[order]
    measured = rows["measured"].to_numpy(dtype=float)[order]
    start = NAN if start <= np.min(measured[~diverged], initial=np.inf) and not diverged.all() else start
    y = np.where(diverged, 0.0, np.log(np.where(diverged, 1.0, measured)))
    count = np.add.reduceat((~diverged).astype(int), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(y, starts) / count
        squares = np.maximum(np.add.reduceat(y**2, starts) - count * mean**2, 0.0)
    stated = diverged & ~rows["blown"].to_numpy(dtype=bool)[order]
    ended = np.isfinite(measured) & ~(stated & np.isfinite(start))
    capped = np.where(ended, np.fmin(measured, start), start)
    total = np.diff(np.append(starts, len(order)))
    columns = {
        **{a: rows[f"level {a}"].to_numpy(dtype=float)[order][starts] for a in AXES},
        "loss": np.exp(np.where(count > 0, mean, NAN)),
        "count": count,
        "diverged": total - count,
        "squares": np.where(count > 1, squares, 0.0),
        "capped": np.add.reduceat(capped, starts) / total,
    }
    return Group(key=key, columns=columns, start=start)


def _start(rows: pd.DataFrame) -> float:
    """The mean loss of the untrained model, measured, else ln V where the tokenizer's name tells V; else NaN."""
    if "loss_at_start" in rows.columns and rows["loss_at_start"].notna().any():
        return float(rows["loss_at_start"].astype(float).mean())
    words = str(rows["tokenizer"].iloc[0]) if "tokenizer" in rows.columns else ""
    size = re.match(r"(?:bpe|hf)-(\d+)-", "bpe-256-" if words == "bytes" else words)
    return float(np.log(float(size[1]))) if size else NAN


def _still_to_come(runs: pd.DataFrame) -> list[Verdict]:
    pending = int(runs["state"].isin(PENDING).sum()) if "state" in runs.columns else 0
    if not pending:
        return []
    message = f"{pending} of {len(runs)} planned cells are still to come; the optima may move as they do."
    return [Verdict("partial", "info", "fit", None, message, {"runs": pending})]


def _say(
    rows: pd.DataFrame,
    left_out: Mapping[str, Sequence[str]],
    repeated: Sequence[str],
    blown: int,
    moving: Sequence[str],
) -> list[Verdict]:
    said = []
    if blown:
        message = (
            f"{plural(blown, 'run')} of {len(rows)} are taken for diverged: above the best rate of their batch, with "
            f"a loss over {BLOWN_UP:g} times the lowest of their N and D."
        )
        said.append(Verdict("taken_for_diverged", "info", "fit", None, message, {"runs": blown}))
    if left_out:
        listed = "; ".join(f"{len(cells)}: {why}" for why, cells in left_out.items())
        message = f"{plural(sum(map(len, left_out.values())), 'run')} left out ({listed})."
        said.append(Verdict("excluded_runs", "info", "fit", None, message))
    if moving:
        what = f"{', '.join(moving)} {'differs' if len(moving) == 1 else 'differ'}"
        message = (
            f"{what} among runs of equal N and D without being crossed with the learning rate: an optimum here is one "
            "along the way on which they move together."
        )
        said.append(Verdict("moving_settings", "caution", "fit", None, message, {"settings": list(moving)}))
    if repeated:
        message = f"{plural(len(repeated), 'row')} with another row's setting and loss to the last digit; one counts."
        said.append(Verdict("repeated_losses", "info", "fit", None, message, {"runs": len(repeated)}))
    settled = rows[rows["measured"].notna()]
    same = settled.groupby(["at", "measured"])["learning_rate"].nunique()
    if odd := int((same > 1).sum()):
        message = (
            f"{plural(odd, 'value')} of the loss, equal to the last digit, stand at two learning rates of one N and D: "
            "losses were rounded, or some rows carry the wrong rate, and then the optima there cannot be trusted. Look "
            "at the table's source."
        )
        said.append(Verdict("repeated_losses", "caution", "fit", None, message, {"losses": odd}))
    return said
