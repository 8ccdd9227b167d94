"""What a law of N and D recommends: exponents of the compute-optimal path, the best split at a compute, the price of a
wrong one, and the compute that a loss needs; each with an interval from the draws of its parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.allocation import compute_for_loss, optimum, regret, six_n, smooth_counter
from analysis.laws import Law
from analysis.uncertainty import interval
from analysis.verdicts import NOTHING, Estimate, Verdict, budget_name, extrapolation

REGRETS = (0.25, 0.5, 2.0, 4.0)
"""Models so many times the best size, of which the price is told."""
_EXPONENTS = ("N_exponent", "D_exponent", "N_exponent_6nd", "D_exponent_6nd")
_AT_TARGET = ("N", "D", "loss", "tokens_per_parameter")
FEW_DRAWS = 400
"""Draws that a search in compute uses: each costs a thousand times a prediction."""


def splits_compute(form: Law) -> bool:
    """Whether a law says how compute should be split."""
    return set(form.variables) == {"N", "D"} and form.response == "loss"


def decide(
    form: Law,
    params: Mapping[str, float],
    draws: Mapping[str, np.ndarray],
    rows: pd.DataFrame,
    targets: Sequence[float],
    loss_targets: Sequence[float],
    level: float,
) -> tuple[dict[str, Any], list[Verdict]]:
    """The decisions of a fit, and verdicts on those that reach beyond it. Nothing for laws of other variables."""
    if not splits_compute(form):
        return {"targets": []}, []
    N, C = rows["N"].to_numpy(dtype=float), rows["C"].to_numpy(dtype=float)
    counter = smooth_counter(N, C / rows["D"].to_numpy(dtype=float))

    def estimate(value: Any, copies: Any) -> Estimate:
        return Estimate(value=float(value), interval=interval(np.atleast_1d(copies), level) if draws else (np.nan,) * 2)

    # 1. slopes of the optimal path over the compute that the runs span, under their own counter and under 6 N D
    middle = float(np.exp(np.log(C).mean()))
    span = (min(float(C.min()), middle / np.sqrt(10)), max(float(C.max()), middle * np.sqrt(10)))
    decisions: dict[str, Any] = {}
    for suffix, count in (("", counter), ("_6nd", six_n)):
        ends = [[optimum(end, law, count, form) for end in span] for law in (params, draws if draws else params)]
        for name in ("N", "D"):
            point, copies = (
                np.log(getattr(high, name) / getattr(low, name)) / np.log(span[1] / span[0]) for low, high in ends
            )
            decisions[f"{name}_exponent{suffix}"] = estimate(point, copies)

    # 2. the best split at each target, and the price of a wrong size
    verdicts: list[Verdict] = []
    decisions["targets"] = []
    for target in map(float, targets):
        point, copy = (optimum(target, law, counter, form) for law in (params, draws if draws else params))
        entry: dict[str, Any] = {"C": target, "extrapolation": target / float(C.max())}
        for name in ("N", "D", "loss"):
            entry[name] = estimate(getattr(point, name), getattr(copy, name))
        entry["tokens_per_parameter"] = estimate(point.D / point.N, copy.D / copy.N)
        few = {k: v[:FEW_DRAWS] for k, v in draws.items()} if draws else params
        entry["regret"] = {
            f"{k:g}": estimate(regret(target, k, params, counter, form), regret(target, k, few, counter, form))
            for k in REGRETS
        }
        decisions["targets"].append(entry)
        verdicts += extrapolation(target, float(C.max()), float(C.min()))
        lost = float(np.isnan(copy.N).mean())
        if np.isnan(point.N) or lost > 0.05:
            severity: Any = "refuse" if np.isnan(point.N) or lost > 0.5 else "caution"
            message = (
                f"at {budget_name(target)} FLOPs the law has no interior optimum in {lost:.0%} of its noisy copies."
            )
            verdicts.append(
                Verdict("no_optimum", severity, "decision", budget_name(target), message, {"share_lost": lost})
            )

    # 3. the least compute for a loss
    decisions["losses"] = []
    for wanted in map(float, loss_targets):
        few = {k: v[:FEW_DRAWS] for k, v in draws.items()} if draws else params
        least = compute_for_loss(wanted, params, counter, form)
        copies = compute_for_loss(wanted, few, counter, form)
        name = f"loss {wanted:g}"
        if np.isnan(least):
            share = f", and so it does in {np.isnan(copies).mean():.0%} of its noisy copies" if draws else ""
            message = f"a loss of {wanted:g} lies below what this law reaches at any compute{share}."
            said = [Verdict("unreachable_loss", "refuse", "decision", name, message)]
        else:
            beyond = extrapolation(float(least), float(C.max()), float(C.min()))
            said = [replace(v, target=name) for v in beyond]
        refused = any(v.severity == "refuse" for v in said)
        found = NOTHING if refused else estimate(least, np.where(np.isnan(copies), np.inf, copies))
        decisions["losses"].append({"loss": wanted, "C": found})
        verdicts += said
    return decisions, verdicts


def undecided(form: Law, targets: Sequence[float], loss_targets: Sequence[float]) -> dict[str, Any]:
    """The decisions of a refused fit: what was asked, and no answer."""
    if not splits_compute(form):
        return {"targets": []}
    entries = [{"C": float(t)} | dict.fromkeys(_AT_TARGET, NOTHING) for t in targets]
    losses = [{"loss": float(t), "C": NOTHING} for t in loss_targets]
    return dict.fromkeys(_EXPONENTS, NOTHING) | {"targets": entries, "losses": losses}
