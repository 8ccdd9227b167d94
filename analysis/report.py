"""The report of a study: one self-contained HTML page that answers its question, or says honestly why it cannot.

The order is that of a reader's questions: what was asked, what is the answer and how sure is it, how big is the
noise, did the fit predict what it had not seen, what must be kept in mind, the pictures, every cell, and where it
all comes from. Text from studies and errors is escaped; pictures are embedded; nothing is loaded from elsewhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import page, plots
from analysis.backtest import Backtest, Score, backtest, judge_targets
from analysis.cells_page import cells_section, provenance_section, times_section
from analysis.fitting import fit
from analysis.forecast import Forecast, forecast_dearest
from analysis.hyperparameters import Hyperparameters, answers, find_hyperparameters, pictures, sections
from analysis.isoflop import ONE_BUDGET
from analysis.portraits import used_runs
from analysis.runs import load_curves, load_runs
from analysis.selection import PENDING
from analysis.sensitivities import write_optimum
from analysis.sweep_page import find_sweep
from analysis.uncertainty import Noise, paired_errors, seed_noise
from analysis.verdicts import Estimate, Fit, Verdict, refused
from sweeps.records import write_bytes
from sweeps.redaction import redact
from sweeps.store import Store, open_store, read_plan
from sweeps.units import flops, human, plural

LAW = "chinchilla"
"""The law of the loss surface: named beforehand, so that its backtest is no winner's."""


def write_report(study: str, store: str | Path | Store, path: str | Path | None = None) -> Path:
    """Write the report of a study as it stands now, finished or not; returns its path.

    path: by default report.html in the study's folder of the store. Raises InputError where the store lacks the study
    or the page cannot be written.
    """
    place = store if isinstance(store, Store) else open_store(store, create=False)
    plan = read_plan(place, study)
    target = Path(path) if path is not None else place.study(study) / "report.html"
    runs, curves = load_runs(study, place), load_curves(study, place)
    pairs = paired_errors(study, place)
    findings = []
    for family, group in runs.groupby("family", sort=True):
        own = curves[curves["cell"].isin(group["cell"])]
        findings.append(_find(family, group, pairs, find_hyperparameters(group, own, plan, place)))
    found = findings[0].hyperparameters.sweep if len(findings) == 1 else None
    if (sweep := found or find_sweep(runs)) is not None:
        write_optimum(sweep, runs, study, place)
    body = [
        _head(plan, runs, findings),
        *(_family(finding, curves, place.study(study), several=len(findings) > 1) for finding in findings),
        cells_section(runs),
        times_section(runs),
        provenance_section(plan, runs),
    ]
    title = escape(f"{study}: report")
    html = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{page.POLICY}'
        f"<style>{page.STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    write_bytes(target, redact(html).encode())
    return target


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """What one family's runs say. isoflop and forecast are None where the study has no budgets; fitted_noise is the
    noise between seeds of the runs that the loss surface is fitted to, None where they have no second seeds."""

    family: str
    runs: pd.DataFrame
    isoflop: Fit | None
    chinchilla: Fit
    backtest: Backtest
    forecast: Forecast | None
    noise: Noise | None
    fitted_noise: Noise | None
    pairs: pd.DataFrame
    hyperparameters: Hyperparameters


def _find(family: Any, runs: pd.DataFrame, pairs: pd.DataFrame, hyperparameters: Hyperparameters) -> _Finding:
    runs = runs.reset_index(drop=True)
    usable = runs[runs["excluded"].isna()]
    dearest = [float(usable["C"].max())] if len(usable) else []
    budgets = usable["budget"].nunique()
    tested = backtest(runs, [LAW])
    law = fit(runs, LAW, targets=dearest)
    return _Finding(
        family=str(family),
        runs=runs,
        isoflop=fit(runs, "isoflop") if runs["budget"].notna().any() else None,
        chinchilla=judge_targets(law, tested),
        backtest=tested,
        forecast=forecast_dearest(runs) if budgets >= 2 else None,
        noise=seed_noise(runs),
        fitted_noise=seed_noise(used_runs(law, runs)),
        pairs=pairs[pairs["cell_small"].isin(runs["cell"])],
        hyperparameters=hyperparameters,
    )


# --- the answer --------------------------------------------------------------------------------------------------


def _head(plan: dict[str, Any], runs: pd.DataFrame, findings: Sequence[_Finding]) -> str:
    declared, pending = plan["study"], int(runs["state"].isin(PENDING).sum())
    parts = [f"<p class=study>{escape(str(declared.get('name', '')))}</p>"]
    parts.append(f"<h1>{escape(str(declared.get('question') or 'No question was declared.'))}</h1>")
    if pending:
        parts.append(f"<p class=partial>Provisional: {pending} of {len(runs)} planned cells are still to come.</p>")
    for finding in findings:
        name = f"<b>{escape(finding.family)}.</b> " if len(findings) > 1 else ""
        parts += [f"<p class=answer>{name}{text}</p>" for text in _answers(finding)]
    return "".join(parts)


def _answers(finding: _Finding) -> list[str]:
    """What is said first of all. Budgets that were swept too answer both questions; where they settle no growth, they
    may have been no more than runs of nearly equal compute, and the sweep is what was asked for."""
    told = list(answers(finding.hyperparameters))
    if finding.isoflop is None:
        return told or [_answer(finding)]
    settled = np.isfinite([finding.isoflop.params[f"{v}_exponent"] for v in ("N", "D")]).all()
    return [_answer(finding), *told] if settled else [*told, _answer(finding)]


def _answer(finding: _Finding) -> str:
    """The answer in two sentences with its uncertainty, or the refusal."""
    if finding.runs["excluded"].notna().all():  # said of the runs, since a fit speaks of the budgets that it lacks
        reasons = finding.runs["excluded"].value_counts()
        listed = "; ".join(f"{count}: {reason}" for reason, count in reasons.head(4).items())
        return f"These runs do not settle the question: none has a loss that a fit may use ({escape(listed)})."
    if finding.isoflop is None:
        return _answer_of_law(finding.chinchilla)
    path = finding.isoflop
    a, b = (path.params[f"{v}_exponent"] for v in ("N", "D"))
    kept = [budget for budget in path.budgets if budget.accepted]
    if np.isfinite([a, b]).all():
        growth = (
            f"Between {flops(kept[0].C)} and {flops(kept[-1].C)} FLOPs the best size grows as C<sup>{a:.2f}</sup> "
            f"(95% interval {page.interval(path.intervals['N_exponent'])}) and the best token count as "
            f"C<sup>{b:.2f}</sup> ({page.interval(path.intervals['D_exponent'])})."
        )
    else:
        why = _reasons(path.verdicts, ("fit", "parameter"))
        growth = f"These runs do not settle how the best size and token count grow with compute: {why}"
    if not kept:
        return growth
    best = kept[-1]
    where = "At the dearest budget" if best is path.budgets[-1] else "At the dearest budget with a usable minimum"
    named = flops(best.budget if 1 / ONE_BUDGET < best.C / best.budget < ONE_BUDGET else best.C)
    ratio = best.tokens_per_parameter
    split = f"{human(best.N.value)} parameters on {human(best.D.value)} tokens"
    if not np.isfinite(ratio.interval).any():
        lowest = f"the loss is lowest near {ratio.value:.3g} tokens per parameter ({split})"
        return f"{growth} {where}, {named} FLOPs, {lowest}; how surely, these runs do not tell."
    return (
        f"{growth} {where}, {named} FLOPs, training is best spent at {ratio.value:.3g} tokens per "
        f"parameter ({page.interval(ratio.interval)}): {split}."
    )


def _answer_of_law(law: Fit) -> str:
    target = next(iter(law.decisions.get("targets", [])), None)
    exponent = law.decisions.get("N_exponent", Estimate())
    if target is None or not np.isfinite([exponent.value, target["N"].value]).all():
        return f"These runs do not settle the question: {_reasons(law.verdicts, ('fit', 'parameter', 'decision'))}"
    tokens = law.decisions["D_exponent"]
    return (
        f"By the Chinchilla law fitted to {law.n_runs} runs, the best size grows as C<sup>{exponent.value:.2f}</sup> "
        f"(95% interval {page.interval(exponent.interval)}) and the best token count as "
        f"C<sup>{tokens.value:.2f}</sup> ({page.interval(tokens.interval)}). At {flops(target['C'])} FLOPs, the "
        f"dearest run, that is {target['tokens_per_parameter'].value:.3g} tokens per parameter "
        f"({page.interval(target['tokens_per_parameter'].interval)}): {human(target['N'].value)} parameters on "
        f"{human(target['D'].value)} tokens."
    )


def _reasons(verdicts: Iterable[Verdict], scopes: Sequence[str]) -> str:
    found = dict.fromkeys(v.message for v in verdicts if v.severity == "refuse" and v.scope in scopes)
    return escape(" ".join(found)) or "no run has finished yet."


# --- one family --------------------------------------------------------------------------------------------------


def _family(finding: _Finding, curves: pd.DataFrame, folder: Path, *, several: bool) -> str:
    parts = [f"<h2>{escape(finding.family)}</h2>"] if several else []
    tuned = sections(finding.hyperparameters, folder.name) + _kept_pictures(finding, folder, several=several)
    if finding.isoflop is not None:
        parts.append(_budget_table(finding.isoflop))
    else:  # a sweep asks of hyperparameters first
        parts.append(tuned)
    parts += [_law_table(finding.chinchilla), _noise(finding), _forecast(finding.forecast)]
    parts.append(_backtest(finding.backtest))
    fits = [f for f in (finding.isoflop, finding.chinchilla) if f is not None]
    parts.append(_verdicts(fits))
    if finding.isoflop is not None:
        parts.append(tuned)
    parts.append(_pictures(finding, curves))
    return "".join(parts)


def _kept_pictures(finding: _Finding, folder: Path, *, several: bool) -> str:
    """The pictures of hyperparameters, kept in the study's folder too, from where MLflow gets them."""
    parts = []
    for one in pictures(finding.hyperparameters):
        content = page.png(one.figure)
        name = f"{finding.family}-{one.name}" if several else one.name
        write_bytes(folder / "pictures" / f"{name.replace('/', '-')}.png", content)
        parts.append(page.picture(content, one.caption))
    return "".join(parts)


def _budget_table(path: Fit) -> str:
    rows = []
    for b in path.budgets:
        numbers = (
            page.estimate(b.N),
            page.estimate(b.D),
            page.estimate(b.tokens_per_parameter),
            page.plain(b.loss, "{:.4f}".format),
        )
        rows.append([flops(b.budget), flops(b.C), str(len(b.sizes)), *numbers, "yes" if b.accepted else "refused"])
    head = [
        "budget (FLOPs)",
        "mean C (FLOPs)",
        "sizes",
        "best N",
        "best D",
        "tokens per parameter",
        "loss there",
        "used",
    ]
    return "<h3>The best size at each budget</h3>" + page.table(head, rows)


def _law_table(law: Fit) -> str:
    rows = [
        [name, page.number(v), page.interval(law.intervals[name]) if np.isfinite(v) else page.DASH]
        for name, v in law.params.items()
    ]
    for key, label in (("N_exponent", "exponent of best N"), ("D_exponent", "exponent of best D")):
        estimate = law.decisions.get(key, Estimate())
        known = np.isfinite(estimate.value)
        rows.append([label, page.number(estimate.value), page.interval(estimate.interval) if known else page.DASH])
    note = f"fitted to {law.n_runs} runs; loss in nats per token, N in parameters, D in tokens."
    return f"<h3>The loss surface: L = E + A/N<sup>α</sup> + B/D<sup>β</sup></h3><p class=note>{note}</p>" + page.table(
        ["", "value", "95% interval"], rows
    )


def _noise(finding: _Finding) -> str:
    lines = []
    if finding.noise is None:
        lines.append("No cell is replicated with another seed, so the noise between seeds is not known.")
    else:
        noise, every = finding.fitted_noise or finding.noise, finding.noise
        fitted = " that the loss surface is fitted to" if finding.fitted_noise else ""
        line = (
            f"Runs that differ only in their seed differ by <b>{noise.sd:.2%}</b> of the loss (standard deviation, "
            f"pooled over {plural(noise.groups, 'setting')} with several seeds{fitted}, "
            f"{plural(round(noise.freedom), 'degree')} of freedom)."
        )
        if every.groups > noise.groups:  # mistuned runs are noisier
            line += f" Over all {every.groups} settings with several seeds, mistuned ones too, it is {every.sd:.2%}."
        lines.append(line)
    pairs = finding.pairs
    if len(pairs):
        closest = float(pairs["difference"].abs().min())
        lines.append(
            f"Scored on the same {int(pairs['documents'].median())} validation documents, neighbouring sizes can be "
            f"told apart to <b>{pairs['paired_error'].median():.2f}%</b> of the loss (paired standard error, median "
            f"of {len(pairs)} pairs; the closest pair differs by {closest:.2f}%). The error that all "
            f"cells share, because these documents are a sample, is {pairs['level_error'].median():.2f}%."
        )
    return "<h3>How big is the noise?</h3>" + "".join(f"<p>{line}</p>" for line in lines)


def _forecast(found: Forecast | None) -> str:
    if found is None:
        return ""
    lines = []
    if np.isfinite(found.budget):
        lines.append(f"The dearest budget, {flops(found.budget)} FLOPs, was left out and forecast from the others.")
    if np.isfinite(found.N_error):
        lines.append(
            f"Best size: forecast {page.estimate(found.N_predicted)}, found {page.estimate(found.N_found)}, "
            f"<b>{_apart(found.N_error)}</b> the forecast{_hit(found.N_inside)}."
        )
    if found.sizes:
        inside = sum(bool(s.inside) for s in found.sizes)
        lines.append(
            f"Loss: off by <b>{found.mean_absolute_error:.2%}</b> on average over {len(found.sizes)} sizes, {inside} "
            "of them inside their 95% interval"
            + (f"; at the minimum {_apart(found.loss_error)} the forecast." if np.isfinite(found.loss_error) else ".")
        )
    lines += [escape(v.message[0].upper() + v.message[1:]) for v in found.verdicts]
    return "<h3>Did the cheaper budgets foretell the dearest?</h3>" + "".join(f"<p>{line}</p>" for line in lines)


def _backtest(found: Backtest) -> str:
    """Errors and coverage by cut and ratio, and how far they support the law; one sentence where the span is small."""
    title = "<h3>How far can the loss surface be extrapolated?</h3>"
    told = "".join(f"<p>{escape(v.message[0].upper() + v.message[1:])}</p>" for v in found.verdicts)
    if refused(found.verdicts, "decision", "supported_ratio") or not found.scores:
        return title + told
    law, supported = found.chosen or LAW, found.supported_ratio
    if supported > 1:
        error, inside, scored = found.at_ratio(law, supported)
        words = (
            f"Fitted to cheap runs, it predicts the loss of runs up to <b>{supported:g} times</b> dearer: there it was "
            f"off by {error:.2%} on average over {plural(scored, 'cell')}, {inside:.0%} of the runs inside their "
            f"{found.level:.0%} intervals."
        )
    elif np.isnan(supported):
        words = "Whether it predicts the loss of dearer runs is <b>not known</b>."
    else:
        words = "Fitted to cheap runs, it does <b>not</b> predict the loss of dearer runs well enough."
    limit = found.limit(law)
    text = f"<p>{words} {escape(limit[0].upper() + limit[1:])}</p>"
    ratios = sorted({s.ratio for s in found.scores})
    rows = []
    for cut in sorted({s.cut for s in found.scores}):
        own = {s.ratio: s for s in found.scores if s.cut == cut and s.law == law}
        first = next(iter(own.values()))
        cells = [_score(own.get(ratio)) for ratio in ratios]
        rows.append([flops(cut), str(first.fitted), *cells])
    note = (
        "<p class=note>Each line is a fit to the runs up to a compute. Then come, by how many times dearer the "
        "predicted runs are, the mean error of their losses, and how many lay inside their "
        f"{found.level:.0%} intervals.</p>"
    )
    head = ["fitted up to (FLOPs)", "runs", *(f"{ratio:g} times" for ratio in ratios)]
    return title + told + text + note + page.table(head, rows)


def _score(score: Score | None) -> str:
    if score is None:
        return page.DASH
    if score.refused:
        return f"refused: {escape(score.refused.replace('_', ' '))}"
    inside = f"{score.inside * score.runs:.0f} of {score.runs}" if np.isfinite(score.inside) else "no intervals"
    return f"{score.error:.2%} <span class=range>{inside}</span>"


def _apart(error: float) -> str:
    return f"{abs(error):.2%} {'above' if error > 0 else 'below'}"


def _hit(inside: bool | None) -> str:
    return {True: ", within their 95% intervals", False: ", <b>beyond</b> their 95% intervals", None: ""}[inside]


def _verdicts(fits: Sequence[Fit]) -> str:
    said = page.verdicts((f.law, verdict) for f in fits for verdict in f.verdicts)
    return f"<h3>What to keep in mind</h3>{said or '<p>Nothing: no verdict was raised.</p>'}"


def _evaluated(runs: pd.DataFrame) -> str:
    """On what the final losses were taken."""
    tokens = runs["validation_tokens"].dropna()
    parts = sorted({int(one) for one in tokens if one > 0})
    named = " or ".join(f"{one:,} tokens of it" for one in parts)
    return " or ".join(filter(None, ["all of it" if (tokens == 0).any() or not parts else "", named]))


def _pictures(finding: _Finding, curves: pd.DataFrame) -> str:
    own = curves[curves["cell"].isin(finding.runs["cell"])]
    parts = ["<h3>Pictures</h3>"]
    path, law, runs = finding.isoflop, finding.chinchilla, finding.runs
    if path is not None and path.budgets:
        parts.append(
            page.picture(
                plots.isoflop_curves(path),
                "Final loss against size at each compute budget. Lines are the fitted parabolas, diamonds their minima "
                "with 95% intervals. Hollow points on dashed lines belong to a refused budget; crosses are sizes too "
                "far from the minimum to be fitted.",
            )
        )
        if sum(b.accepted for b in path.budgets) >= 2:
            parts.append(
                page.picture(
                    plots.optimum_paths(path),
                    "Best size and best token count against compute, with the fitted power law and its 95% band "
                    "unless it is refused; an interval's end that the noise leaves open is not drawn, "
                    "and a minimum with such an end is hollow. The dashed line has the slope published by Hoffmann et "
                    "al. (2022, approach 2), drawn through the centre of the minima.",
                )
            )
    if len(own) and own["val_loss"].notna().any():
        for axis, text in (("tokens", "training tokens"), ("flops", "training compute")):
            figure = plots.loss_curves(own, runs, axis)  # type: ignore[arg-type]
            parts.append(
                page.picture(
                    figure,
                    f"Validation loss during training against {text}, on a small fixed part of the validation text. "
                    f"Dots are final losses, on {_evaluated(runs)}, which can be a little harder or easier.",
                )
            )
    if np.isfinite(list(law.solved.values())).all():
        parts.append(
            page.picture(
                plots.residuals(law, runs),
                "Residuals of the loss surface: how far each run lies from the fit, in percent of its loss.",
            )
        )
    if finding.forecast is not None and finding.forecast.sizes:
        parts.append(
            page.picture(
                plots.forecast(finding.forecast),
                "The dearest budget as forecast from the cheaper ones, and as measured. Intervals are for a new run.",
            )
        )
    return "".join(parts) if len(parts) > 1 else ""
