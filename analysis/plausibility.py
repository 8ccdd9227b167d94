"""Whether a table can be what it is taken for: runs of one recipe, in parameters, tokens, FLOPs and nats.

The failure it guards against: published tables count in billions, petaflops and perplexities, hold logarithms, steps,
unfinished runs or ten recipes at once, and every one of them gives a curve with exponents. Each mistake gets a
sentence that says what was found and what to write instead.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.tables import needs, quoted
from analysis.uncertainty import SETTINGS, exclusions
from analysis.verdicts import Verdict
from sweeps.errors import InputError

DOUBTFUL, DIFFERENT = 0.01, 0.02
"""Differences in ln loss, at equal N and D, between values of a column that are cautioned against and refused.
Seeds differ by about .005."""
FAR_BELOW = 1000.0
"""A loss so many times below the median is no loss, and would decide every fit: of its logarithm nothing is clipped."""
FEW = 0.2
"""Share of the rows up to which numbers that are not positive are marks of failed runs, not logarithms."""
_GROUPS = (
    *("family", "parametrisation", "corpus", "tokenizer", "context"),
    *("width", "depth", "heads", "mlp_width"),
)
"""What divides the groups of a sweep beside its settings."""


def check_table(table: pd.DataFrame, law: str = "chinchilla") -> list[Verdict]:
    """Refuse a table that cannot be what it is taken for, with a sentence that says what was found and what mends it.

    table: from `read_table`. Refused are: a needed column without numbers, with values that are not positive (which no
    size, token count, compute or loss has: they are logarithms, or marks for failed runs), or the same in every row;
    fewer usable rows than a fit of the law needs; numbers in another unit; several recipes in one table. Rows in which
    a number is missing are no mistake, since a run may have failed: a fit leaves them out and names them.
    law: for "sensitivity" see `_check_sweep`.
    Returns a caution where a column may tell recipes apart, to be shown with the fit. Raises InputError.
    """
    variables, response, least = needs(law)
    taken: Mapping[str, str] = table.attrs.get("columns", {})
    if law == "sensitivity":
        return _check_sweep(table, taken)
    needed = (*variables, response)
    shown = [c for c in dict.fromkeys((*needed, "C")) if c in table.columns]
    for name in shown:
        _check_numbers(table, name, taken)
    for fault in _unit_faults(table, shown, taken):
        raise InputError(fault)
    usable = np.isfinite(table[list(needed)].to_numpy(dtype=float)).all(axis=1)
    usable &= exclusions(table).isna().to_numpy()
    if usable.sum() < least:
        lost = len(table) - int(usable.sum())
        missing = f" ({lost} of {len(table)} rows lack a number or are excluded)" if lost else ""
        raise InputError(f"{int(usable.sum())} usable rows{missing}; {law} needs at least {least}, better twice that.")
    for name in needed:
        values = table.loc[usable, name]
        if values.nunique() == 1:
            what = f"{_from(name, taken)} is {values.iloc[0]:.6g} in every row"
            raise InputError(f"{what}: {law} cannot be fitted unless it varies.")
    if {"N", "D", "loss"} <= set(table.columns) and response == "loss":
        return _check_one_recipe(table[usable], taken, set(variables))
    return []


def _check_sweep(table: pd.DataFrame, taken: Mapping[str, str]) -> list[Verdict]:
    """The same for a table of sweeps, which may hold one size and few runs, and names the runs that it leaves out:
    units are judged by the runs that count, recipes at equal hyperparameters and shapes, which divide its groups."""
    counted = table[exclusions(table).isna()]
    numbers = counted[["N", "D", "loss"]].astype(float)
    for name in numbers.columns:
        if (numbers[name] <= 0).mean() > FEW:
            _check_numbers(counted, name, taken)
    counted = counted[((numbers > 0) & np.isfinite(numbers)).all(axis=1)]
    if counted.empty:
        return []
    for fault in _unit_faults(counted, [c for c in ("N", "D", "loss", "C") if c in table.columns], taken):
        raise InputError(fault)
    return _check_one_recipe(counted, taken, {"N", "D", *_GROUPS})


def _from(name: str, taken: Mapping[str, str]) -> str:
    source = taken.get(name, name)
    return name if source == name else f"{name} (from {source})"


def _check_numbers(table: pd.DataFrame, name: str, taken: Mapping[str, str]) -> None:
    values = table[name].to_numpy(dtype=float)
    if not np.isfinite(values).any():
        source = taken.get(name, name)
        raw = table[source].dropna().tolist()[:3] if source in table.columns and source != name else []
        held = f" It holds {', '.join(map(repr, raw))}." if raw else ""
        raise InputError(f"{_from(name, taken)} holds no number in any row.{held} --columns {name}=... names another.")
    wrong = np.flatnonzero(values < 0 if name == "S2" else values <= 0)  # S2 is 0 at a constant rate
    if len(wrong):
        rows = ", ".join(f"{table['cell'].iloc[i] if 'cell' in table.columns else i}: {values[i]:g}" for i in wrong[:5])
        more = ", ..." if len(wrong) > 5 else ""
        mend = (
            f"Is it a logarithm? Then write {name}=exp({quoted(taken.get(name, name))}), or 10**."
            if len(wrong) > FEW * len(values)
            else "Leave a failed run's number empty, and it is left out by name."
        )
        what = "negative" if name == "S2" else "not positive"
        raise InputError(f"{_from(name, taken)} is {what} in {len(wrong)} of {len(values)} rows ({rows}{more}). {mend}")


def _unit_faults(table: pd.DataFrame, shown: Sequence[str], taken: Mapping[str, str]) -> Iterator[str]:
    """Sentences on columns whose numbers look like another unit, the most telling first."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = {name: np.log(table[name].to_numpy(dtype=float)) for name in shown}
    logs = {name: v[np.isfinite(v)] for name, v in logs.items() if np.isfinite(v).any()}
    shown = list(logs)
    low, middle, high = ({name: float(np.exp(f(v))) for name, v in logs.items()} for f in (np.min, np.median, np.max))

    def again(name: str) -> str:
        source = taken.get(name, name)
        return quoted(source) if source in table.columns else f"({source})"

    def looks(name: str, what: str, mend: str) -> str:
        span = f"{_from(name, taken)} has values from {low[name]:.4g} to {high[name]:.4g}"
        return f"{span}: that looks like {what}; write --columns '{name}={mend.format(again(name))}'."

    counted = "C" in shown and not table.get("C_assumed", pd.Series([False])).all()
    times = middle["C"] / (6.0 * middle["N"] * middle["D"]) if counted and {"N", "D"} <= set(shown) else 1.0

    # 1. each by itself
    for name, least in (("N", 1e3), ("D", 1e4), ("U", 1e4)):
        if name not in shown or low[name] >= least or taken.get(name, "").startswith("C/"):
            continue
        if name == "D" and counted and low.get("N", 0.0) >= 1e3 and 0.01 < times < 100.0:
            continue  # few tokens, but C says so too
        if high[name] > 1e6:
            span = f"{_from(name, taken)} goes from {low[name]:.4g} to {high[name]:.4g}"
            yield f"{span}: its rows are in different units. Bring them to one in the file."
        if low[name] > 4.5 and high[name] < 14.5 and (table[name].dropna() % 1 != 0).mean() > 0.3:
            yield looks(name, "a logarithm to base 10", "10**{}")
        if name == "N" and middle.get("D", 0.0) < 1e4:
            unit = 1e9 if low["N"] < 10 else 1e6
        elif name == "N":
            # where D was made of C / N, a wrong unit of N moves tokens a parameter twice
            power = 2 if "N" in re.findall(r"\w+", taken.get("D", "")) else 1
            likely = _likely((1e9**-power, 1e6**-power), middle["D"] / middle["N"])
            unit = 10.0 ** round(-math.log10(likely) / power)
        else:
            size = middle.get("N", 1e9)
            unit = _likely((1e12, 1e9, 1e6), middle[name] / size)
        word = {1e12: "trillions", 1e9: "billions", 1e6: "millions"}[unit]
        yield looks(name, word if name == "N" else f"{word} of tokens", f"{_power(unit)}*{{}}")
    for name in ("accuracy", "error"):
        if name in shown and high[name] > 1.0:
            yield looks(name, "percent", "{}/100")
    if "loss" in shown and middle["loss"] > 12.5:  # nats of a guess among 270,000 tokens
        yield looks("loss", "a perplexity", "log({})") if middle["loss"] < 1e4 else looks("loss", "a sum", "{}/TOKENS")

    if "loss" in shown and low["loss"] < middle["loss"] / FAR_BELOW:
        yield (
            f"{_from('loss', taken)} goes down to {low['loss']:.3g}, with a median of {middle['loss']:.4g}: no run "
            "is so much better than others of its recipe. Leave that number empty, and its row is left out by name."
        )

    # 2. against each other
    if not {"N", "D"} <= set(shown):
        return
    ratio = middle["D"] / middle["N"]
    if not 1e-3 < ratio < 1e7:
        if taken.get("D", "").startswith("C/"):
            span = f"{_from('C', taken)} has values from {low['C']:.3g} to {high['C']:.3g}"
            yield (
                f"{span}, which makes D = C / (6 N) come to {ratio:.2g} tokens a parameter: it is not in FLOPs. Scale "
                f"it, as in --columns 'C=1e21*{again('C')}' (a petaflop/s-day is 8.64e19)."
            )
        yield (
            f"{ratio:.2g} tokens a parameter ({_from('D', taken)} over {_from('N', taken)}) are too "
            f"{'few' if ratio < 1 else 'many'} for any run: one of the two is in another unit. Scale it, as in "
            f"--columns 'D=1e6*{again('D')}'; steps become tokens by D=STEPS*BATCH*CONTEXT."
        )
    if not 0.01 < times < 100.0:
        yield (
            f"{_from('C', taken)} is {times:.2g} times 6 N D: one of the three is in another unit. If it is C, scale "
            f"it, as in --columns 'C={_power(1.0 / times)}*{again('C')}'."
        )


def _likely(units: Sequence[float], ratio: float) -> float:
    """The unit in which so many tokens a parameter come nearest to some 50, in ratio."""
    return min(units, key=lambda unit: abs(math.log(ratio * unit / 50.0)))


def _power(number: float) -> str:
    return f"1e{round(math.log10(number))}"


def _check_one_recipe(table: pd.DataFrame, taken: Mapping[str, str], variables: set[str]) -> list[Verdict]:
    """Refuse, or doubt, a table in which runs of equal size, tokens and settings differ with another column."""
    known = {*taken, *taken.values(), *SETTINGS, "cell", "trunk", "C_assumed", "excluded", "state", "reason"}
    settings = dict.fromkeys((*SETTINGS, *sorted(variables - {"N", "D"})))
    place = table[[c for c in settings if c in table.columns]]
    place = place.assign(N=np.log(table["N"]).round(2), D=np.log(table["D"]).round(1))
    at = place.groupby(list(place.columns), dropna=False).ngroup()
    log_loss = pd.Series(np.log(table["loss"].to_numpy(dtype=float)), table.index)
    spreads: dict[str, float] = {}
    for column in table.columns:
        if column in known or not 2 <= table[column].nunique(dropna=False) <= max(12, len(table) / 4):
            continue
        words = table[column].astype(object).where(table[column].notna(), "").astype(str)  # a blank is a recipe too
        means = log_loss.groupby([at, words]).mean().groupby(level=0)
        spread = (means.max() - means.min())[means.count() > 1]
        if len(spread) >= 3 and spread.median() > DOUBTFUL:
            spreads[column] = float(spread.median())
    named = [c for c in spreads if not pd.api.types.is_numeric_dtype(table[c])]
    blamed = sorted(named or spreads, key=lambda c: -spreads[c])[:4]
    if not blamed:
        return []
    first, worst = blamed[0], max(spreads[c] for c in blamed)
    shown = {c: table[c].astype(object).where(table[c].notna(), "(empty)").unique()[:3] for c in blamed}
    held = "; ".join(f"{c}: {', '.join(map(str, values))}, ..." for c, values in shown.items())
    value = table[first].dropna().iloc[0]
    message = (
        f"runs of equal N and D differ in loss by {100 * worst:.2g}% (median) with {', '.join(blamed)}, which no law "
        f"of N and D can fit ({held}). Several recipes, or unfinished runs? Then fit one: --where "
        f"'{quoted(first)}={value}'. A hyperparameter of which the best counts? --columns learning_rate=... or "
        f"batch_tokens=... Repeats? --columns seed=..."
    )
    if worst > DIFFERENT:
        raise InputError(message)
    return [Verdict("mixed_recipes", "caution", "fit", None, message)]
