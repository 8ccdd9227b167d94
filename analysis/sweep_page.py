"""The report's part on sweeps: where the best learning rate (and batch) lies, how much it matters, how it moves.

An answer is one or two sentences with intervals, or says which number these runs do not give.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from analysis import page
from analysis.optima import Optimum
from analysis.optimum_laws import OptimumLaw
from analysis.sensitivities import Sensitivity, sensitivity
from analysis.swept import swept_groups
from analysis.verdicts import Estimate
from sweeps.errors import InputError
from sweeps.units import human, plural

LEAST_RATES = 3
"""Learning rates of one group from which on a study is a sweep of them."""
WORDS = {"learning_rate": "learning rate", "batch_tokens": "batch", "N": "N", "D": "D"}


def find_sweep(runs: pd.DataFrame) -> Sensitivity | None:
    """The sensitivity analysis of one family's runs; None where no group of them has three learning rates.

    Where batches were crossed with rates and most sizes have no best batch inside the grid, it is of the rate at each,
    and what keeps the batches from an optimum stays with it.
    """
    try:
        groups = swept_groups(runs).groups
    except InputError:  # not one run has ended with a loss, or was meant to
        return None
    if not any(group.points["learning_rate"].nunique() >= LEAST_RATES for group in groups):
        return None
    found = sensitivity(runs)
    settled = sum(not one.refused for one in found.optima)
    if 2 * settled > len(found.optima) or "batch_tokens" not in found.optima[0].axes:
        return found
    rates = sensitivity(runs, axes=["learning_rate"])
    lost = [replace(v, severity="caution") for one in found.optima for v in one.verdicts if v.severity == "refuse"]
    return found if rates.refused else replace(rates, verdicts=(*lost, *rates.verdicts))


def find_crossed(runs: pd.DataFrame, sweep: Sensitivity) -> tuple[Optimum, ...]:
    """The groups in which rates and batches were crossed, over both, for their maps: also where `find_sweep` tells the
    rate at each batch, since no best batch lies inside the grid."""
    if "batch_tokens" not in sweep.optima[0].axes and not any("batch_tokens" in one.group for one in sweep.optima):
        return ()
    both = sweep if "batch_tokens" in sweep.optima[0].axes else sensitivity(runs)
    return both.optima if "batch_tokens" in both.optima[0].axes else ()


def answer(found: Sensitivity) -> str:
    """How much the learning rate matters and how its optimum moves, in two or three sentences."""
    known = [one for one in found.optima if not one.refused]
    if not known:
        return f"These runs settle no best learning rate: {escape(_first(found))}"
    parts = []
    for axis in known[0].axes:
        laws = {k: law for k, law in found.laws.items() if law.hyperparameter == axis and not law.refused}
        kinds = [_kind(k).removeprefix(law.family or "").strip() for k, law in laws.items()]
        under = [f"under {escape(kind)} " if kind and len(laws) > 1 else "" for kind in kinds]
        moves = [kind + _moves(law) for law, kind in zip(laws.values(), under)]
        values = [one.best[axis].value for one in known]
        span = " to ".join(dict.fromkeys(page.number(end(values), 3) for end in (min, max)))
        text = f"The best {WORDS[axis]} is {span} over {_places(known)}"
        parts.append(f"{text}; {'; '.join(moves) if moves else 'how it moves is not settled by them'}.")
    wide = [_factor(one) for one in known if np.isfinite(_factor(one))]
    if wide:
        parts.append(
            f"Within a factor of {np.median(wide):.2g} to either side (median) the loss stays within {found.eps:.0%} "
            "of the best."
        )
    felt = [one.sensitivity.value for one in found.optima if np.isfinite(one.sensitivity.value)]
    if felt:
        low_rate, high_rate = (page.number(bound, 3) for bound in found.range)
        parts.append(
            f"A rate drawn blindly from {low_rate} to {high_rate} costs {min(felt):.2f} to {max(felt):.2f} nats on "
            "average (learning-rate sensitivity)."
        )
    return " ".join(parts)


def section(found: Sensitivity) -> str:
    """The table of optima, the power laws, and what must be kept in mind."""
    title = "<h3>The best learning rate at each size and length</h3>"
    if "batch_tokens" in found.optima[0].axes:
        title = "<h3>The best learning rate and batch at each size and length</h3>"
    note = (
        "<p class=note>Vertex of a quadratic in the logarithms of learning rate (and batch), fitted to the settings "
        f"near the lowest loss, with {found.level:.0%} intervals; the plateau is where the fitted loss is within "
        f"{found.eps:.0%} of its lowest. Sensitivity: mean excess over the best loss, in nats, over one range of rates "
        "for all sizes (Wortsman et al. 2023), diverged runs counted as the loss at the start.</p>"
    )
    return "".join([title, note, _table(found), _laws(found), _verdicts(found)])


def _table(found: Sensitivity) -> str:
    axes = found.optima[0].axes
    labels = [name for name in found.optima[0].group if _differs(found, name) or name in ("N", "D")]
    rows = []
    for one in found.optima:
        row = [_label(name, one.group.get(name)) for name in labels]
        for axis in axes:
            best = one.best.get(axis, Estimate())
            row.append(_with_interval(best, axis))
            row.append(page.interval(one.plateau.get(axis, (np.nan, np.nan))) if not one.refused else page.DASH)
        row += [page.plain(one.loss, "{:.4f}".format), page.plain(one.sensitivity, "{:.3f}".format)]
        row.append(str(int((one.points["count"] + one.points["diverged"]).sum())))
        row.append(str(int(one.points["diverged"].sum())))
        rows.append(row)
    head = [name.replace("_", " ") for name in labels]
    for axis in axes:
        head += [f"best {WORDS[axis]}", "plateau"]
    return page.table([*head, "loss there", "sensitivity", "runs", "diverged"], rows)


def _laws(found: Sensitivity) -> str:
    rows = []
    for key, law in found.laws.items():
        for name, power in law.powers.items():
            rows.append(
                [
                    escape(_kind(key)),
                    f"best {WORDS[law.hyperparameter]} ~ {escape(name)}<sup>{power.value:.2f}</sup>",
                    page.interval(power.interval),
                    " to ".join(page.number(bound, 3) for bound in law.range[name]),
                    str(law.optima),
                ]
            )
    if not rows:
        return ""
    return "<h3>How the optimum moves</h3>" + page.table(["", "", "95% interval", "fitted over", "optima"], rows)


def _verdicts(found: Sensitivity) -> str:
    every = [*found.verdicts, *(v for law in found.laws.values() for v in law.verdicts)]
    every += [v for one in found.optima for v in one.verdicts]
    return page.verdicts(("", verdict) for verdict in every)


# --- words -------------------------------------------------------------------------------------------------------


def _kind(name: str) -> str:
    """Of which runs a law is, by its name: "llama weight_decay=0.1/learning_rate" is of llama at that decay."""
    return name.rpartition("/")[0]


def _moves(law: OptimumLaw) -> str:
    """How the optimum moves, by the powers whose interval excludes 0, and which ones cannot be told from it."""
    told, silent = [], []
    for name, power in law.powers.items():
        low, high = power.interval
        if low <= 0 <= high:
            silent.append(f"of {escape(name)}, {power.value:.2f} ({page.interval(power.interval)}),")
        else:
            told.append(f"{escape(name)}<sup>{power.value:.2f}</sup> ({page.interval(power.interval)})")
    parts = [f"it moves as {' and '.join(told)}"] if told else []
    if silent:
        parts.append(f"its power{'s' if len(silent) > 1 else ''} {' and '.join(silent)} cannot be told from 0")
    return "; ".join(parts)


def _places(known: Sequence[Optimum]) -> str:
    """What the optima are of: pairs of size and length, or with batches and parametrisations too."""
    words = {"batch_tokens": "batch", "parametrisation": "parametrisation"}
    more = [word for key, word in words.items() if len({one.group.get(key) for one in known}) > 1]
    *first, last = ["size", "length", *more]
    return f"{plural(len(known), 'combination')} of {', '.join(first)} and {last}"


def _factor(one: Optimum) -> float:
    """Half the width of the learning rate's plateau, as a factor."""
    low, high = one.plateau.get("learning_rate", (np.nan, np.nan))
    return float(np.sqrt(high / low))


def _first(found: Sensitivity) -> str:
    every = [v for one in found.optima for v in one.verdicts if v.severity == "refuse"]
    return every[0].message if every else "no run has finished yet."


def _differs(found: Sensitivity, name: str) -> bool:
    return len({str(one.group.get(name)) for one in found.optima}) > 1


def _label(name: str, value: Any) -> str:
    if isinstance(value, int | float):
        return human(value) if name in ("N", "D", "batch_tokens") else page.number(value, 3)
    return escape(str(value))


def _with_interval(value: Estimate, axis: str) -> str:
    if axis == "batch_tokens":
        return page.estimate(value)
    if not np.isfinite(value.value):
        return page.DASH
    return f"{page.number(value.value, 3)} <span class=range>{page.interval(value.interval)}</span>"


def rules_note(laws: Mapping[str, OptimumLaw], runs: pd.DataFrame, study: str) -> str:
    """How another study takes these optima as its rule; nothing of imported runs, which none can train on the text of:
    such runs ended without an attempt."""
    usable = [law for law in laws.values() if not law.refused]
    imported = (runs["state"] == "finished") & (runs["attempts"] == 0)
    if not usable or imported.any():
        return ""
    return f"<p class=note>A study takes them by <code>learning_rate: {{fitted: {escape(study)}}}</code>.</p>"
