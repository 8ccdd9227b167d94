"""What one family's runs say of hyperparameters, found once and told in the report: as answers, tables and pictures.

What a study did not vary has no section; the audit is in every report, since that nothing was tuned must be said too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import audit_page, page, search_page, sweep_page, sweep_plots
from analysis.audits import Audit
from analysis.batches import CriticalBatches, critical_batches, sweeps_batches
from analysis.importance import Importance, importances
from analysis.importance_plots import batch_curves, importance_bars
from analysis.noise_scale import NoiseScale, noise_scales
from analysis.optima import Optimum
from analysis.sensitivities import Sensitivity
from analysis.timescale import Timescale, decay_timescales
from analysis.transfers import Transfer, transfer
from analysis.tuning import TuningWorth
from analysis.verdicts import Estimate, Verdict
from sweeps.rungs import Correlation
from sweeps.store import Store
from sweeps.units import human


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """worth and its default in words, audits by parametrisation ("" for all), the rest as their rooms find them."""

    runs: pd.DataFrame
    searched: tuple[str, ...]
    """Hyperparameters that trials of a search chose."""
    rungs: tuple[tuple[str, Correlation], ...]
    """What shorter lengths tell of the full one, by search."""
    sweep: Sensitivity | None
    crossed: tuple[Optimum, ...]
    """Optima over rate and batch where these were crossed, the refused ones too: their losses make a map."""
    worth: tuple[TuningWorth, str] | None
    own_default: bool
    """Whether the study itself says what is not tuned: the worth of tuning is then what it asks for."""
    transfers: tuple[Transfer, ...]
    batches: CriticalBatches | None
    noise: tuple[NoiseScale, ...]
    timescales: tuple[Timescale, ...]
    importances: tuple[Importance, ...]
    audits: Mapping[str, tuple[Audit, str]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture with the name of its file and its caption."""

    name: str
    figure: Figure
    caption: str


def find_hyperparameters(
    runs: pd.DataFrame, curves: pd.DataFrame, plan: Mapping[str, Any], store: Store
) -> Hyperparameters:
    """Look at one family's runs, finished or not."""
    if runs["search"].notna().any():  # its batches differ, and with them its lengths by a few tokens
        runs = runs.assign(D=runs.groupby(["search", "rung"])["D"].transform("median").fillna(runs["D"]))
    usable = runs[runs["excluded"].isna()]
    kinds = sorted(usable["parametrisation"].dropna().unique())
    searched = search_page.searched(plan)
    sweep = None if searched else sweep_page.find_sweep(runs)  # settings of a search are not crossed
    own_default = audit_page.has_default(runs)
    return Hyperparameters(
        runs=runs,
        searched=searched,
        rungs=search_page.rank_correlations(runs, plan) if searched else (),
        sweep=sweep,
        crossed=sweep_page.find_crossed(runs, sweep) if sweep is not None else (),
        own_default=own_default,
        worth=audit_page.find_worth(runs, sweep) if (sweep or own_default) and len(usable) else None,
        transfers=tuple(transfer(runs)) if sweep is not None and len(kinds) > 1 else (),
        batches=critical_batches(runs, curves) if not searched and sweeps_batches(runs) else None,
        noise=noise_scales(runs, curves) if len(usable) else (),
        timescales=decay_timescales(runs),
        importances=importances(runs) if len(usable) else (),
        audits=audit_page.find_audits(runs, kinds, plan, store, sweep) if len(usable) else {},
    )


def answers(found: Hyperparameters) -> Iterator[str]:
    """Sentences for the head of the report, the most telling first."""
    told = list(_answers(found))
    if not told and found.searched and (words := search_page.best_words(found.runs, found.searched)):
        told = [words]
    yield from told


def _answers(found: Hyperparameters) -> Iterator[str]:
    if found.transfers:
        yield " ".join(_transfer_words(one) for one in found.transfers)
    if found.worth is not None and found.own_default and (words := audit_page.worth_words(found.worth[0])):
        yield words
    if found.sweep is not None:
        yield sweep_page.answer(found.sweep)
    if found.batches is not None and (words := _batch_words(found.batches)):
        yield words
    if found.searched and (words := search_page.importance_words(found.importances)):
        yield words


def sections(found: Hyperparameters, study: str) -> str:
    """Everything but the pictures, as HTML."""
    parts = [search_page.section(found.runs, found.searched), search_page.rungs_section(found.rungs)]
    if found.transfers:
        parts.append(_transfer_section(found.transfers))
    if found.sweep is not None:
        parts.append(sweep_page.section(found.sweep) + sweep_page.rules_note(found.sweep.laws, found.runs, study))
    if found.batches is not None:
        parts.append(_batch_section(found.batches, found.noise))
    if found.timescales:
        parts.append(_timescale_section(found.timescales))
    if found.worth is not None:
        parts.append(audit_page.worth_section(*found.worth))
    parts += [_importance_section(found.importances)]
    for kind, (audit, note) in found.audits.items():
        parts.append(audit_page.audit_section(audit, kind) + note)
    return "".join(parts)


def pictures(found: Hyperparameters) -> list[Picture]:
    """The pictures, in the order of the sections."""
    every = []
    if found.sweep is not None:
        every += list(_sweep_pictures(found.sweep, found.crossed))
    if found.batches is not None and found.batches.sweeps:
        caption = (
            "Tokens to a target loss against the batch. The curve is E_min (1 + B / B_crit) (McCandlish et al. 2018); "
            "hollow points are not fitted, dashed sweeps refused."
        )
        every.append(Picture(name="critical-batch", figure=batch_curves(found.batches.sweeps), caption=caption))
    for order, one in enumerate(found.importances):
        caption = f"Which hyperparameters the loss depends on, {_place(one.group)}. Lines are 95% intervals."
        every.append(Picture(name=f"importance-{order}", figure=importance_bars(one), caption=caption))
    for kind, (audit, _) in found.audits.items():
        if np.isfinite(audit.cells["ratio"].astype(float)).any():
            caption = (
                "Each run's learning rate against the measured best, and what being off it is estimated to cost. On "
                "the line nothing is lost."
            )
            name, caption = (f"audit-{kind}", f"{kind}: {caption}") if kind else ("audit", caption)
            every.append(Picture(name=name, figure=sweep_plots.audit_plot(audit), caption=caption))
    return every


def _sweep_pictures(found: Sensitivity, crossed: Sequence[Optimum]) -> Iterator[Picture]:
    yield Picture(
        name="learning-rates",
        figure=sweep_plots.fans(found.optima),
        caption="Final loss against learning rate. Filled points are fitted, diamonds the optima with 95% intervals; "
        "crosses on the upper edge are runs that diverged.",
    )
    dearest = np.argsort([one.group["N"] * one.group["D"] for one in crossed], kind="stable")[-sweep_plots.MOST :]
    for order, one in enumerate(crossed[i] for i in sorted(dearest)):
        caption = f"{one.name}: loss above the lowest at each learning rate and batch, in percent."
        if order == 0 and len(crossed) > len(dearest):
            caption = f"The {len(dearest)} dearest of {len(crossed)} groups follow. {caption}"
        caption += "" if not one.refused else " No optimum over both is found inside the grid."
        yield Picture(name=f"rate-and-batch-{order}", figure=sweep_plots.heat_map(one), caption=caption)
    axes = found.optima[0].axes
    if sum(not one.refused for one in found.optima) < 2:
        return
    for axis in axes:
        yield Picture(
            name=f"best-{axis.replace('_', '-')}",
            figure=sweep_plots.optimum_moves(found, axis),
            caption=f"The best {sweep_page.WORDS[axis]} against size, tokens and, where it varies, the batch, with "
            "95% intervals. Lines are fitted power laws with their 95% band, the other variables at the geometric "
            "middle of their range.",
        )


# --- transfer ----------------------------------------------------------------------------------------------------


def _transfer_words(one: Transfer) -> str:
    name = escape(one.name)
    if one.moves is None:
        return f"Whether the best learning rate stays under {name} is not settled: {escape(one.verdicts[-1].message)}"
    widths = one.optima["width"]
    return (
        f"From width {widths.min():.0f} to {widths.max():.0f} the best learning rate of {name} "
        f"{'moves' if one.moves else 'stays'}: it goes as width<sup>{one.slope.value:.2f}</sup> (95% interval "
        f"{page.interval(one.slope.interval)})."
    )


def _transfer_section(transfers: Sequence[Transfer]) -> str:
    rows = []
    for one in transfers:
        for row in one.optima.to_dict("records"):
            bounds = page.interval((row["low"], row["high"])) if not row["refused"] else page.DASH
            rows.append([escape(one.name), f"{row['width']:.0f}", page.number(row["learning_rate"], 3), bounds])
    note = "<p class=note>A parametrisation transfers when the interval of its power of width holds 0.</p>"
    lines = "".join(f"<p>{_transfer_words(one)}</p>" for one in transfers)
    table = page.table(["parametrisation", "width", "best learning rate", "95% interval"], rows)
    said = page.verdicts((one.name, v) for one in transfers for v in one.verdicts)
    return "<h3>Does the best learning rate stay when a model grows wider?</h3>" + lines + note + table + said


# --- decay, batches and importance -----------------------------------------------------------------------------------


def _batch_words(found: CriticalBatches) -> str:
    good = [one for one in found.sweeps if not one.refused and np.isfinite(one.batch.value)]
    if not good:
        return ""
    values = [one.batch.value for one in good]
    growth = next((e for e in found.growth.values() if np.isfinite(e.value)), Estimate())
    grows = ""
    if np.isfinite(growth.value):
        grows = f" It grows as D<sup>{growth.value:.2f}</sup> ({page.interval(growth.interval)})."
    return (
        f"Tokens are wasted from a critical batch of {human(min(values))} to {human(max(values))} tokens on, at which "
        f"a loss takes twice the fewest tokens ({len(good)} of {len(found.sweeps)} targets have one).{grows}"
    )


def _batch_section(found: CriticalBatches, noise: Sequence[NoiseScale]) -> str:
    apart = _apart([one.group for one in found.sweeps])
    rows = [
        [
            *(escape(str(one.group.get(name, ""))) for name in apart),
            human(one.group["N"]),
            f"{one.target:.4f}",
            page.estimate(one.batch),
            page.estimate(one.tokens),
            page.plain(one.beyond_linear, human),
        ]
        for one in found.sweeps
    ]
    head = [*apart, "N", "target loss", "critical batch (tokens)", "fewest tokens", "20% beyond linear"]
    scales = [[human(one.group["N"]), human(one.group["batch_tokens"]), page.estimate(one.batch)] for one in noise]
    told = page.table(["N", "batch (tokens)", "noise scale (tokens)"], scales) if scales else ""
    said: list[Verdict] = [*found.verdicts, *(v for one in found.sweeps for v in one.verdicts)]
    said += [v for one in noise for v in one.verdicts]
    note = (
        "<p class=note>Up to a critical batch, twice the batch takes about half the steps to a target loss, so the "
        "tokens stay about the same. Critical batch and fewest tokens are of the curve E_min (1 + B / B_crit); 20% "
        "beyond linear is the batch, between those tried, from which on a target takes 20% more tokens than at the "
        "best batch, whatever the curve.</p>"
    )
    return "<h3>The critical batch</h3>" + note + page.table(head, rows) + told + page.verdicts(("", v) for v in said)


def _timescale_section(found: Sequence[Timescale]) -> str:
    rows, apart = [], _apart([one.group for one in found])
    for one in found:
        tried = one.points["timescale"]
        best = page.number(one.best.value, 3) if np.isfinite(one.best.value) else page.DASH
        rows.append(
            [
                *(escape(str(one.group.get(name, ""))) for name in apart),
                *(human(one.group["N"]), human(one.group["D"])),
                f"{best} <span class=range>{page.interval(one.best.interval)}</span>",
                page.number(one.published, 3),
                f"{page.number(tried.min(), 3)} to {page.number(tried.max(), 3)}",
            ]
        )
    note = (
        "<p class=note>AdamW's memory of past updates, batch / (learning rate x decay x D), as a fraction of the run: "
        "the vertex of a parabola through the lowest loss and its neighbours. Power Lines (Bergsma et al. 2025) was "
        "fitted on larger models and other text.</p>"
    )
    head = [*apart, "N", "D", "best timescale", "by Power Lines", "tried"]
    said = page.verdicts((_place(one.group), v) for one in found for v in one.verdicts)
    return "<h3>The weight decay's timescale</h3>" + note + page.table(head, rows) + said


def _importance_section(found: Sequence[Importance]) -> str:
    if not found:
        return ""
    rows = []
    for one in found:
        for row in one.table().to_dict("records"):
            share = page.plain(row["share"], "{:.1%}".format)
            low, high = row["low"], row["high"]
            spread = f" <span class=range>{low:.1%} to {high:.1%}</span>" if np.isfinite([low, high]).all() else ""
            rows.append(
                [
                    _place(one.group),
                    escape(row["effect"].replace("_", " ")),
                    share + spread,
                    escape(f"{row['evaluator']}, {row['region']}"),
                ]
            )
    said = page.verdicts(("", v) for one in found for v in one.verdicts)
    head = ["", "hyperparameter", "share of the variance", "by"]
    resampled = any("Optuna" in evaluation.evaluator for one in found for evaluation in one.evaluations)
    note = (
        "<p class=note>A share by Optuna is that of all settings; its interval is over resamples of them, in which "
        "some stand twice and others not at all, so the share may lie outside.</p>"
    )
    return "<h3>Which hyperparameters matter?</h3>" + (note if resampled else "") + page.table(head, rows) + said


def _apart(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells groups apart beside N and D: families, corpora ... where there are several."""
    names = dict.fromkeys(name for group in groups for name in group if name not in ("N", "D"))
    return [name for name in names if len({str(group.get(name)) for group in groups}) > 1]


def _place(group: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {human(group[name])}" for name in ("N", "D") if name in group)
