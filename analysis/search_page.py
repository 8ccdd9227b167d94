"""The report's part on searches: the best settings that trials found, beside the recipe's own.

The best of many noisy trials looks better than it is; what tuning is worth without that luck stands in its own section.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from analysis import page
from analysis.importance import Importance
from analysis.verdicts import Estimate
from sweeps.rungs import Correlation, correlation, is_control
from sweeps.units import human, plural

SHOWN = 3
"""Trials of each size and length that the table shows, the best first."""


def searched(plan: Mapping[str, Any]) -> tuple[str, ...]:
    """The hyperparameters that a study searches; empty where it searches none."""
    return tuple((plan["study"].get("search") or {}).get("space", ()))


def section(runs: pd.DataFrame, names: Sequence[str]) -> str:
    """A table of the best trials of one family's runs at each size and length, and the recipe's own setting."""
    known = [name for name in names if name in runs.columns]
    rows = []
    for _, group in _full(runs).groupby("search"):
        logs = group.assign(y=np.log(group["val_loss_final"].astype(float)))
        losses = logs.groupby("trial")["y"].mean().sort_values()
        trials = group.drop_duplicates("trial").set_index("trial")
        own = [trial for trial in losses.index[SHOWN:] if trials["is_default"][trial] is True]
        for trial in [*losses.index[:SHOWN], *own]:
            row = trials.loc[trial]
            setting = [page.written(row[name]) for name in known]
            label = f"{trial:.0f}{' (the recipe)' if row['is_default'] is True else ''}"
            rows.append([human(row["N"]), human(row["D"]), label, *setting, f"{np.exp(losses[trial]):.4f}"])
    if not rows:
        return ""
    asked = runs[runs["trial"].notna()]
    lost = int(asked["state"].eq("diverged").sum())
    note = (
        f"<p class=note>The best {SHOWN} of up to {plural(asked['trial'].nunique(), 'trial')}, over their seeds; "
        f"{plural(lost, 'cell')} diverged. The best of many noisy runs is in part luck.</p>"
    )
    head = ["N", "D", "trial", *(name.replace("_", " ") for name in known), "final loss"]
    return "<h3>The best settings found</h3>" + note + page.table(head, rows)


def best_words(runs: pd.DataFrame, names: Sequence[str]) -> str:
    """The lowest loss of each search and its setting, beside the recipe's own; empty where no trial ended in full.

    It is what remains to be said where neither its gain nor what matters can be told from noise."""
    parts = []
    for _, group in _full(runs).groupby("search"):
        logs = group.assign(y=np.log(group["val_loss_final"].astype(float)))
        losses = np.exp(logs.groupby("trial")["y"].mean())
        trials = group.drop_duplicates("trial").set_index("trial")
        best = trials.loc[losses.idxmin()]
        setting = ", ".join(f"{n.replace('_', ' ')} {page.written(best[n])}" for n in names if n in runs.columns)
        own = losses[trials["is_default"].eq(True).reindex(losses.index)]
        beside = f", where the recipe's own has {own.iloc[0]:.4f}" if len(own) else ""
        place = f"{human(best['N'])} parameters on {human(best['D'])} tokens"
        parts.append(f"at {place} {losses.min():.4f} nats, with {setting}{beside}")
    if not parts:
        return ""
    return (
        f"The lowest losses that the trials found: {'; '.join(parts)}. How much of that is the luck of the best of "
        "many, these runs do not tell."
    )


def rank_correlations(runs: pd.DataFrame, plan: Mapping[str, Any]) -> tuple[tuple[str, Correlation], ...]:
    """Of each search, in words, and each rung: how well its losses rank the trials that went on by lot, as those at
    full length do (sweeps/rungs.py). A trial counts once all its cells have ended, a diverged one as its loss at start.
    """
    search = plan["study"].get("search") or {}
    ended = runs["val_loss_final"].where(runs["state"].eq("finished"))
    ended = ended.mask(runs["state"].eq("diverged"), runs["loss_at_start"].fillna(np.inf)).astype(float)
    found = []
    for name, group in runs.assign(y=np.log(ended)).groupby("search"):
        trials = group.groupby(["trial", "rung"])["y"].agg(lambda y: y.mean(skipna=False)).unstack("rung")
        lot = trials[[is_control(search.get("seed", 0), str(name), int(number)) for number in trials.index]]
        for share in search.get("rungs", ()):
            both = lot.reindex(columns=[share, 1.0]).dropna()
            words = str(name).rpartition(" ")[0] or str(name)  # without the hash that tells recipes apart
            found.append((words, correlation(share, list(both.itertuples(index=False, name=None)))))
    return tuple(found)


def rungs_section(found: Sequence[tuple[str, Correlation]]) -> str:
    """What each rung tells of the full length; empty for a search without rungs."""
    if not found:
        return ""
    rows = []
    for name, one in found:
        bounds = page.DASH if one.interval is None else page.interval(one.interval)
        rows.append([escape(name), f"{one.rung:g}", str(one.pairs), page.number(one.rho, 2), bounds, _judged(one)])
    note = (
        "<p class=note>Spearman's rank correlation of a trial's loss at a shorter length, a share of the full one, "
        "with that at full length, over the trials that went on by lot: those chosen for a loss would flatter it.</p>"
    )
    head = ["", "rung", "trials", "rank correlation", "95% interval", ""]
    return "<h3>Do shorter runs tell which settings are good?</h3>" + note + page.table(head, rows)


def _judged(one: Correlation) -> str:
    if one.is_refuted:
        return "not told from 0: trials run at full length"
    if one.interval is None:
        return "refused: too few trials for a rank"
    return "told from 0" if one.interval[0] > 0 else "not told from 0 yet: too few trials to give the rung up"


def importance_words(found: Sequence[Importance]) -> str:
    """Which hyperparameter matters most at each size and length; empty where none is told. It is not settled where the
    evaluators put different ones first, or where the first two of one have intervals that overlap: all are named."""
    parts = []
    for one in found:  # some of them may have no evaluation: too few runs
        leaders = {}
        for each in one.evaluations:
            shares = {k: v for k, v in each.shares.items() if np.isfinite(v.value)}
            ranked = sorted(shares.items(), key=lambda item: -item[1].value)
            if ranked:
                rivals = len(ranked) > 1 and ranked[1][1].interval[1] >= ranked[0][1].interval[0]
                leaders[each.evaluator] = ranked[: 2 if rivals else 1]
        named = {name for ranked in leaders.values() for name, _ in ranked}
        told = [
            f"{' and '.join(_share_words(name, share) for name, share in ranked)} by {escape(evaluator)}"
            for evaluator, ranked in leaders.items()
        ]
        place = f"at {human(one.group['N'])} parameters on {human(one.group['D'])} tokens"
        if told:
            parts.append(f"not settled {place}: {', '.join(told)}" if len(named) > 1 else f"{place} {told[0]}")
    return f"What matters most, as a share of the loss's variance: {'; '.join(parts)}." if parts else ""


def _share_words(name: str, share: Estimate) -> str:
    bounds = f" ({share.interval[0]:.0%} to {share.interval[1]:.0%})" if np.isfinite(share.interval).all() else ""
    return f"{name.replace('_', ' ')} {share.value:.0%}{bounds}"


def _full(runs: pd.DataFrame) -> pd.DataFrame:
    """Trials of full length that a fit may use."""
    return runs[runs["excluded"].isna() & runs["trial"].notna() & (runs["rung"] == 1)]
