"""Do the cheaper budgets foretell the dearest? It is left out, forecast, and compared: losses, and the best size.

The failure it guards against: a law that passes through all budgets and yet could not have told where the next one
would lie.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.fitting import fit
from analysis.laws import find_law
from analysis.resampling import shared_past
from analysis.selection import cell_names, with_states
from analysis.uncertainty import Noise
from analysis.verdicts import NAN, NOTHING, Estimate, Fit, Interval, Verdict, budget_name, clean


@dataclass(frozen=True, kw_only=True)
class SizeForecast:
    """The loss of one size at the budget left out. error: measured over predicted, minus one."""

    N: float
    D: float
    predicted: float
    interval: Interval
    measured: float
    error: float
    inside: bool | None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the cheaper budgets say about the dearest one, and what was found there.

    budget, C: the budget left out and its realised compute, FLOPs. extrapolation: C over the dearest C fitted.
    N_predicted, N_found: the best size; N_error = found / predicted - 1; N_inside: whether the two agree within their
    95% intervals taken together (None where either has none). sizes: the losses, size by size; intervals are for a
    new run, noise included. loss_*: the same at the minimum. isoflop, chinchilla: the fits without that budget.
    """

    budget: float = NAN
    C: float = NAN
    extrapolation: float = NAN
    N_predicted: Estimate = NOTHING
    N_found: Estimate = NOTHING
    N_error: float = NAN
    N_inside: bool | None = None
    loss_predicted: Estimate = NOTHING
    loss_found: Estimate = NOTHING
    loss_error: float = NAN
    loss_inside: bool | None = None
    sizes: tuple[SizeForecast, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    isoflop: Fit | None = field(default=None, repr=False)
    chinchilla: Fit | None = field(default=None, repr=False)

    @property
    def mean_absolute_error(self) -> float:
        """Mean of |error| over the sizes of the budget left out; NaN where no loss was predicted."""
        return float(np.mean([abs(s.error) for s in self.sizes])) if self.sizes else NAN

    def to_json(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k not in ("isoflop", "chinchilla", "sizes")}
        result: dict[str, Any] = clean(own | {"sizes": [vars(s) for s in self.sizes]})
        return result | {"mean_absolute_error": clean(self.mean_absolute_error)}


def forecast_dearest(
    runs: pd.DataFrame,
    *,
    loss: str | None = None,
    noise: float | None = None,
    resamples: int | None = None,
    seed: int = 0,
) -> Forecast:
    """Leave the dearest budget out, fit the rest, predict it, and score the prediction.

    N* comes from the power law of the isoFLOP fit, losses from the Chinchilla law. Where either fit refuses, its part
    of the forecast is empty and a verdict says so. `runs` needs the column `budget`. Arguments as for `fit`.
    """
    runs = with_states(runs)
    budgets = runs["budget"].dropna() if "budget" in runs.columns else pd.Series(dtype=float)
    usable = runs.loc[budgets.index]
    if "excluded" in runs.columns:
        usable = usable[usable["excluded"].isna()]
    if usable["budget"].nunique() < 2 if len(usable) else True:
        message = "a forecast needs at least two budgets with finished runs."
        return Forecast(verdicts=(Verdict("no_forecast", "refuse", "fit", None, message),))
    if "C" not in runs.columns and {"N", "D"} <= set(runs.columns):  # as fits take it to be; they say so
        usable = usable.assign(C=6.0 * usable["N"].astype(float) * usable["D"].astype(float))
    dearest = float(usable["budget"].max())
    rest = runs[~(runs["budget"] == dearest)]

    # 1. what was found there, and what it cost
    settings: dict[str, Any] = {"loss": loss, "noise": noise, "seed": seed, "resamples": resamples}
    whole = fit(runs, "isoflop", **settings)
    found = next((b for b in whole.budgets if b.budget == dearest), None)
    C = found.C if found else float(usable.loc[usable["budget"] == dearest, "C"].mean())

    # 2. the two fits without it
    path = fit(rest, "isoflop", targets=[C], **settings)
    surface = fit(rest, "chinchilla", targets=[C], **settings)
    spent = float(usable.loc[usable["budget"] < dearest, "C"].max())
    trunks = shared_past(usable.assign(cell=cell_names(usable)), (usable["budget"] < dearest).to_numpy())
    verdicts = [trunks] if trunks is not None else []
    minimum = NOTHING
    sizes: tuple[SizeForecast, ...] = ()
    target = path.decisions["targets"][0]
    if np.isnan(target["N"].value):
        why = next((v.message for v in path.verdicts if v.severity == "refuse" and v.scope != "budget"), "refused")
        message = f"no best size is predicted without the budget {budget_name(dearest)}: {why}"
        verdicts.append(Verdict("no_forecast", "refuse", "decision", "N", message))
    if np.isnan(list(surface.solved.values())).any():
        why = next((v.message for v in surface.verdicts if v.severity == "refuse"), "refused")
        message = f"no losses are predicted without the budget {budget_name(dearest)}: {why}"
        verdicts.append(Verdict("no_forecast", "refuse", "decision", "loss", message))
    else:
        minimum = surface.decisions["targets"][0]["loss"]
        sizes = _sizes(whole, surface, runs, dearest, seed)
    N_found, loss_found = (found.N, found.loss) if found else (NOTHING, NOTHING)
    return Forecast(
        budget=dearest,
        C=C,
        extrapolation=C / spent,
        N_predicted=target["N"],
        N_found=N_found,
        N_error=N_found.value / target["N"].value - 1.0,
        N_inside=_agree(target["N"], N_found),
        loss_predicted=minimum,
        loss_found=loss_found,
        loss_error=loss_found.value / minimum.value - 1.0,
        loss_inside=_agree(minimum, loss_found),
        sizes=sizes,
        verdicts=tuple(verdicts),
        isoflop=path,
        chinchilla=surface,
    )


def predict(
    found: Fit, rows: pd.DataFrame, seed: int = 0, seeds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted responses of new runs and the bounds of their intervals at the fit's level, three arrays (n,).

    rows: the law's variables, one row per run. seeds: how many runs each is the mean of, (n,); by default one.
    An interval holds the draws of the parameters and the noise of a run, whose own scale is uncertain; its bounds are
    NaN where the fit has no draws. All are NaN where the law as such is refused (`Fit.solved`).
    """
    form, generator = find_law(found.law), np.random.default_rng(seed)
    variables = {name: rows[name].to_numpy(dtype=float) for name in form.variables}
    predicted = np.asarray(form(variables, found.solved))
    low, high = np.full(len(rows), NAN), np.full(len(rows), NAN)
    if not found.draws or not np.isfinite(found.noise["sd"]):
        return predicted, low, high
    draws = {name: value[:, None] for name, value in found.draws.items()}
    # new runs are as dear as the dearest fitted, or dearer, and the noise may have grown up to there
    dearest = Noise(sd=found.noise["dearest_sd"], freedom=found.noise["dearest_freedom"], source=found.noise["source"])
    scales = dearest.draw(generator, len(next(iter(draws.values()))))
    common = found.noise.get("common", 0.0)  # what all seeds of a cell share does not average out over them
    # The noise of a fit of raw losses is in nats, and the draws are of ln loss.
    raw = found.provenance.get("settings", {}).get("scale") == "response"
    share = 1.0 if seeds is None else np.sqrt(common + (1.0 - common) / seeds)
    sizes = share / (predicted if raw else np.ones(len(rows)))
    tail = (1.0 - found.level) / 2.0
    for part in np.array_split(np.arange(len(rows)), 1 + len(rows) // 5000):
        copies = form.log_response({name: value[part] for name, value in variables.items()}, draws)
        errors = generator.standard_normal(copies.shape) * scales[:, None] * sizes[part]
        low[part], high[part] = np.exp(np.quantile(copies + errors, (tail, 1.0 - tail), axis=0))
    return predicted, low, high


def _sizes(whole: Fit, surface: Fit, runs: pd.DataFrame, dearest: float, seed: int) -> tuple[SizeForecast, ...]:
    """The loss of each size at the budget left out, against the mean over its seeds."""
    used = set(whole.provenance["cells"])
    cells = cell_names(runs).astype(str)
    held = runs[(runs["budget"] == dearest).to_numpy() & cells.isin(used).to_numpy()]
    groups = held.assign(_log=np.log(held[whole.loss].astype(float))).groupby("N")
    means = groups[["D", "_log"]].mean().reset_index()
    measured = np.exp(means["_log"].to_numpy(dtype=float))
    predicted, low, high = predict(surface, means, seed, groups.size().to_numpy(dtype=float))
    return tuple(
        SizeForecast(
            N=float(means["N"][i]),
            D=float(means["D"][i]),
            predicted=float(predicted[i]),
            interval=(float(low[i]), float(high[i])),
            measured=float(measured[i]),
            error=float(measured[i] / predicted[i] - 1.0),
            inside=_inside(float(measured[i]), (float(low[i]), float(high[i]))),
        )
        for i in range(len(means))
    )


def _agree(predicted: Estimate, found: Estimate) -> bool | None:
    """Whether two estimates of one positive number differ by less than their half-widths, added in quadrature in logs.

    A bound that is open agrees with everything beyond it.
    """
    if np.isnan([predicted.value, found.value]).any() or np.isnan([*predicted.interval, *found.interval]).all():
        return None
    above = found.value > predicted.value
    near = (predicted.interval[1], found.interval[0]) if above else (predicted.interval[0], found.interval[1])
    reach = np.hypot(np.log(near[0] / predicted.value), np.log(near[1] / found.value))
    return bool(np.isnan(reach) or abs(np.log(found.value / predicted.value)) <= reach)


def _inside(value: float, bounds: Interval) -> bool | None:
    return None if np.isnan([value, *bounds]).any() else bool(bounds[0] <= value <= bounds[1])
