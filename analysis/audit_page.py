"""The report's sections on tuning: what it is worth, and whether the cells of a law were all tuned alike.

They are part of every report, also of a study that measured nothing of the kind: that its tuning is not known is what
a reader must be told before an exponent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from analysis import page
from analysis.audits import Audit, audit
from analysis.gains import is_number
from analysis.references import Reference, from_store, from_sweep
from analysis.sensitivities import Sensitivity, sensitivity
from analysis.tuning import TuningWorth, tuning_worth
from analysis.verdicts import Estimate, Verdict
from sweeps.errors import InputError
from sweeps.store import Store
from sweeps.units import human

MAX_PLACES = 60
"""Rows of the audit's table; the most costly come first."""
MANY_VALUES = 3
"""Learning rates at one size and token count from which they are a sweep."""


def find_audits(
    runs: pd.DataFrame, kinds: Sequence[str], plan: Mapping[str, Any], store: Store, sweep: Sensitivity | None
) -> dict[str, tuple[Audit, str]]:
    """The audit of one family's runs, by parametrisation where there are several (their learning rates do not compare),
    with a note where it could not be held against another study's optimum."""
    if len(kinds) > 1:
        groups = {kind: runs[runs["parametrisation"] == kind] for kind in kinds}
        return {
            kind: one
            for kind, rows in groups.items()
            for one in find_audits(rows, [kind], plan, store, sensitivity(rows) if sweep else None).values()
        }
    try:
        known, note = references(runs, plan, store, sweep), ""
    except InputError as error:  # another study's damaged file is no reason to be without a report of this one
        known, note = {}, f"<p class=partial>{escape(_capital(str(error)))}</p>"
    return {"": (audit(runs, known), note)}


def references(
    runs: pd.DataFrame, plan: Mapping[str, Any], store: Store, sweep: Sensitivity | None
) -> dict[str, Reference]:
    """What the cells are held against: the study's own sweep, else the newest optima of another study on this text."""
    family = str(runs["family"].iloc[0])
    kinds = set(runs["parametrisation"].dropna()) if "parametrisation" in runs.columns else set()
    if sweep is not None:
        own = from_sweep(sweep, family, next(iter(kinds), None))
        if "learning_rate" in own:
            return own
    corpus, contexts = plan.get("corpus", {}), runs["context"].dropna().unique()
    text = {k: corpus.get(v) for k, v in (("corpus", "fingerprint"), ("tokenizer", "tokenizer"))}
    if plan.get("foreign") or len(contexts) != 1:
        return {}
    name = str(plan["study"].get("name", ""))
    return from_store(store, name, family, next(iter(kinds), None), text | {"context": int(contexts[0])}, runs)


# --- what tuning is worth ----------------------------------------------------------------------------------------


def has_default(runs: pd.DataFrame) -> bool:
    """Whether a run of the study's own setting counts: it may have diverged, ended at a rung or be still to come."""
    return bool(runs.loc[runs["excluded"].isna(), "is_default"].eq(True).any())


def find_worth(runs: pd.DataFrame, sweep: Sensitivity | None) -> tuple[TuningWorth, str] | None:
    """The worth of tuning over the study's default, with its words; where the study has none, over the one learning
    rate that is best for all sizes, of each parametrisation its own. runs: of one family; sweep: of
    them."""
    if has_default(runs):
        searched = "search" in runs.columns and runs["search"].notna().any()
        return tuning_worth(runs, sweep=sweep), f"the study's own setting{'' if searched else ' (1 times its rule)'}"
    kinds = runs["parametrisation"].fillna("") if "parametrisation" in runs.columns else pd.Series("", runs.index)
    by_kind = {kind: _one_for_all(rows) for kind, rows in runs.groupby(kinds)}  # rates of two do not compare
    rates = {kind: rate for kind, rate in by_kind.items() if rate is not None}
    if not rates:
        return None
    told = ", ".join(f"{rate:.3g}{f' under {kind}' if len(by_kind) > 1 else ''}" for kind, rate in rates.items())
    found = []
    for kind, rate in rates.items():
        own = sweep
        if sweep is not None:
            own = replace(sweep, optima=tuple(o for o in sweep.optima if o.group.get("parametrisation", "") == kind))
        found.append(tuning_worth(runs[kinds == kind], default={"learning_rate": rate}, sweep=own))
    return _together(found), f"the one learning rate, {told}, that does best over all sizes"


def _together(found: Sequence[TuningWorth]) -> TuningWorth:
    """What was found of several parametrisations, as one."""
    return replace(
        found[0],
        axes=tuple(dict.fromkeys(axis for one in found for axis in one.axes)),
        worths=tuple(worth for one in found for worth in one.worths),
        laws={kind: law for one in found for kind, law in one.laws.items()},
        verdicts=tuple(verdict for one in found for verdict in one.verdicts),
    )


def worth_words(found: TuningWorth) -> str:
    """What tuning is worth over the places, and where most; empty where no gain can be told from noise."""
    told = [(w, name) for w, name in zip(found.worths, found.names) if w.told_apart]
    if not told:
        return ""
    most, name = max(told, key=lambda one: one[0].percent.value)
    where = f"{name}, {most.place}" if name else most.place
    sized = any(np.isfinite(w.size.estimate.value) for w, _ in told)
    more = "" if sized else "; how much larger a model that is, these runs do not tell"
    if len(found.worths) == 1:
        return f"Tuning at {escape(where)} is worth {most.gained}{more}."
    span = " to ".join(dict.fromkeys(f"{end(w.percent.value for w, _ in told):.1f}" for end in (min, max)))
    of = f"{len(told)} of {len(found.worths)}" if len(told) < len(found.worths) else str(len(told))
    others = ", at the others nothing that can be told from noise" if len(told) < len(found.worths) else ""
    return (
        f"Tuning is worth {span}% of the loss {'at' if others else 'over'} {of} places{others}; most at "
        f"{escape(where)}: {most.gained}{more}."
    )


def _one_for_all(runs: pd.DataFrame) -> float | None:
    """Of the learning rates that were run everywhere, the one of the lowest mean ln loss; None where there is none."""
    usable = runs[runs["excluded"].isna()]
    logs = usable.assign(y=np.log(usable["val_loss_final"].astype(float)), rate=usable["learning_rate"].round(10))
    table = logs.pivot_table(index=["N", "D"], columns="rate", values="y").dropna(axis="columns")
    return float(table.columns[int(table.mean().to_numpy().argmin())]) if table.shape[1] >= MANY_VALUES else None


def worth_section(found: TuningWorth, default: str) -> str:
    """A table of places, and what is to be kept in mind. default: what the default is, in words."""
    title = "<h3>What is tuning worth?</h3>"
    if not found.worths:
        return title + _verdicts(found.verdicts)
    rows = []
    for w in found.worths:
        best = ", ".join(page.number(e.value, 3) for e in w.tuned.values())
        least = "at least " if w.at_least else ""
        size = f"&gt; {page.number(w.size.estimate.value, 3)}" if w.size.bounded else _times(w.size.estimate)
        rows.append(
            [
                *(_setting(w.group.get(label)) for label in found.labels),
                *(human(float(w.group["N"])), human(float(w.group["D"]))),
                ", ".join(map(_setting, w.default.values())),
                best,
                *(f"{w.default_loss:.4f}", f"{w.tuned_loss.value:.4f}"),
                f"{least}{w.percent.value:.2f} {_range(w.percent)}",
                *(_times(w.compute), size),
                "" if w.told_apart else "within noise" if w.noise_known else "noise not known",
            ]
        )
    names = " and ".join(axis.replace("_", " ") for axis in found.axes)
    curve = any(w.way == "curve" for w in found.worths)
    tuned = "lowest point of the curve through" if curve else "best setting, less the luck of the draw, of"
    note = (
        f"<p class=note>Tuned: the {tuned} the {names} tried at a size. Default: "
        f"{escape(default)}. Compute: how many times more of it the default needs to reach the tuned loss along the "
        "tuned runs' frontier; size: how many times larger a model, at equal tokens. 95% intervals.</p>"
    )
    labels = [label.replace("_", " ") for label in found.labels]
    head = [*labels, "N", "D", "default", "best", "loss", "tuned", "gain (%)", "compute (times)", "size (times)", ""]
    return title + f"<p>{worth_words(found)}</p>" + note + page.table(head, rows) + _verdicts(found.verdicts)


def _setting(value: Any) -> str:
    if value is None:
        return page.DASH
    return page.number(value, 3) if is_number(value) else escape(str(value))


def _times(estimate: Estimate) -> str:
    return f"{page.number(estimate.value, 3)} {_range(estimate)}" if np.isfinite(estimate.value) else page.DASH


def _range(estimate: Estimate) -> str:
    return f"<span class=range>{page.interval(estimate.interval)}</span>"


# --- the audit ---------------------------------------------------------------------------------------------------


def audit_section(found: Audit, kind: str = "") -> str:
    """Where the cells stand, what that costs, the exponents before and after, and what is to be kept in mind.

    kind: the parametrisation, where there are several.
    """
    title = f"<h3>Was every cell tuned alike?{f' ({escape(kind)})' if kind else ''}</h3>"
    rate = found.references.get("learning_rate")
    known = np.isfinite(found.cells["penalty"])
    if rate is None or not known.any():
        lead = "<p>Not known: the best learning rate was measured for none of these runs.</p>"
    else:
        off = len(found.mistuned)
        apart = ", more than a step of their grid from the optimum" if rate.step else ""
        lead = (
            f"<p>Held against the optimum measured by {escape(rate.source)}, <b>{off} of {int(known.sum())}</b> runs "
            f"lose more than {found.floor:.1%} of their loss by their learning rate, at the lower end of the interval"
            f"{apart}; the mean estimated penalty is {found.cells['penalty'].mean():.2%} of the loss.</p>"
        )
    return title + lead + _changes(found) + _cells(found) + _verdicts(found.verdicts)


def _changes(found: Audit) -> str:
    rows = []
    for c in found.changes:
        if not c.after:
            continue
        for name in c.before:
            moved = c.difference.get(name, Estimate())
            cells = [_number(e) for e in (c.before[name], c.after[name], moved)]
            said = ("yes" if c.beyond_noise else "no") if name == "N_exponent" else ""
            rows.append([escape(f"{c.law}: {name.replace('_', ' ')}"), *cells, said])
    if not rows:
        return ""
    head = ["", "as trained", "without the penalties", "difference", "beyond noise"]
    return page.table(head, rows)


def _number(e: Estimate) -> str:
    return f"{page.number(e.value, 3)} {_range(e)}" if np.isfinite(e.value) else page.DASH


def _cells(found: Audit) -> str:
    """One line for each size, token count and setting; columns of which nothing is known are left out."""
    keys = ["N", "D", "learning_rate", "batch_tokens"]
    places = found.table().drop_duplicates(keys)
    columns: dict[str, tuple[str, Any]] = {
        "N": ("N", human),
        "D": ("D", human),
        "learning_rate": ("learning rate", lambda v: page.number(v, 3)),
        "best_learning_rate": ("best", lambda v: page.number(v, 3)),
        "ratio": ("ratio", lambda v: page.number(v, 2)),
        "penalty": ("penalty", "{:.2%}".format),
        "batch_ratio": ("batch / best", lambda v: page.number(v, 2)),
        "batch_penalty": ("its penalty", "{:.2%}".format),
        "warmup_share": ("warm-up share", "{:.1%}".format),
        "warmup_per_parameter": ("warm-up / N", lambda v: page.number(v, 2)),
        "timescale": ("AdamW timescale", lambda v: page.number(v, 2)),
        "timescale_ratio": ("to Power Lines", lambda v: page.number(v, 2)),
        "rule_ratio": ("rate to Step Law", lambda v: page.number(v, 2)),
    }
    shown = {k: v for k, v in columns.items() if np.isfinite(places[k].astype(float)).any()}
    if not shown.keys() - {"N", "D"}:  # of imported runs whose settings nobody told
        return ""
    rows = []
    for place in places.head(MAX_PLACES).to_dict("records"):
        cells = {k: page.plain(place[k], form) for k, (_, form) in shown.items()}
        if "penalty" in cells and np.isfinite(place["penalty"]):
            least = "at least " if place["at_least"] else ""
            low, high = place["penalty_low"], place["penalty_high"]
            cells["penalty"] = f"{least}{cells['penalty']} <span class=range>{low:.2%} to {high:.2%}</span>"
        if "batch_penalty" in cells and np.isfinite(place["batch_penalty"]):
            low, high = place["batch_penalty_low"], place["batch_penalty_high"]
            cells["batch_penalty"] += f" <span class=range>{low:.2%} to {high:.2%}</span>"
        rows.append(list(cells.values()))
    more = f"<p class=note>The first {MAX_PLACES} of {len(places)} settings.</p>" if len(places) > MAX_PLACES else ""
    note = (
        "<p class=note>Ratios are to the measured optimum, except where a published rule is named: such a rule was "
        "fitted on other text, sizes and batches, and judges nothing here.</p>"
    )
    return note + page.table([head for head, _ in shown.values()], rows) + more


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    return page.verdicts(("", verdict) for verdict in verdicts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
