"""A sensitivity analysis in the terminal: one line a group and axis, the laws of the optimum, what cannot be said."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from cluster.display import number, plain_table, span, verdict_table
from sweeps.units import human, plural

_SHOWN = 100
"""Groups on a terminal; --json prints all."""
_NOTHING = (float("nan"), float("nan"))


def sensitivity_tables(
    found: Any,
    source: Mapping[str, Any] | None = None,
    timescales: Sequence[Any] = (),
    batches: Any = None,
    importances: Sequence[Any] = (),
) -> Iterator[RenderableType]:
    """A `Sensitivity` as tables; source: of a table, {"table", "columns", "where"}, columns by their role.

    timescales: of the weight decay, where that was varied. batches: the `CriticalBatches`, where the batch was.
    importances: where they were asked for.
    """
    share = f"{100 * found.level:g}% interval"
    refused = sum(one.refused for one in found.optima)
    lost = f", {refused} of them refused" if refused else ""
    blown = f" ({found.diverged} diverged)" if found.diverged else ""
    runs, groups = plural(found.runs, "run"), plural(len(found.optima), "group")
    yield Text.assemble(("sensitivity", "bold"), f" of {runs}{blown} in {groups}{lost}")
    if source:
        read = ", ".join(f"{k} = {v}" if k != v else k for k, v in source["columns"].items())
        kept = " where " + ", ".join(f"{k} = {v}" for k, v in source["where"].items()) if source["where"] else ""
        yield Text(f"{source['table']}{kept}: {read}", style="dim")
    within = f"within {100 * found.eps:g}%"
    table = plain_table("group", "of", "best", share, within, "sensitivity", "settings", "verdict")
    for one in found.optima[:_SHOWN]:
        said = next((v.code for v in one.verdicts if v.severity == "refuse"), "")
        said = said or next((v.code for v in one.verdicts), "")
        fitted = f"{int(one.points['fitted'].sum())} of {len(one.points)}"
        for order, axis in enumerate(one.axes):
            best = one.best.get(axis)
            table.add_row(
                one.name if order == 0 else "",
                {"learning_rate": "rate", "batch_tokens": "batch"}[axis],
                number(best.value) if best else "-",
                span(best.interval) if best else "-",
                span(one.plateau.get(axis, _NOTHING)),
                number(one.sensitivity.value) if order == 0 else "",
                fitted if order == 0 else "",
                Text(said, style="red" if one.refused else "dim") if order == 0 else "",
            )
    yield ""
    yield table
    if len(found.optima) > _SHOWN:
        yield Text(f"... and {len(found.optima) - _SHOWN} more groups; --json prints all", style="dim")
    if found.range[0] == found.range[0]:
        yield Text(
            f"sensitivity: mean loss above the best, nats, over learning rates from {span(found.range)}", style="dim"
        )
    for name, law in found.laws.items():
        yield ""
        if law.refused:
            yield Text(f"{name}: no power law", style="red")
            continue
        at = ", ".join(f"{k} = {_written(k, v)}" for k, v in law.at.items())
        table = plain_table(name, "value", share)
        table.add_row(f"at {at}", number(law.value.value), span(law.value.interval))
        for variable, power in law.powers.items():
            table.add_row(f"power of {variable}", number(power.value), span(power.interval))
        yield table
    verdicts = [*found.verdicts, *(v for law in found.laws.values() for v in law.verdicts)]
    verdicts += [v for one in found.optima for v in one.verdicts]
    if timescales:
        yield ""
        table = plain_table("decay's timescale", "best", share, "by Power Lines", "tried", "verdict")
        for one in timescales:
            name = " ".join(f"{k}={_written(k, v)}" if isinstance(v, float) else str(v) for k, v in one.group.items())
            tried = one.points["timescale"]
            said = next((v.code for v in one.verdicts), "")
            ends = (span(one.best.interval), number(one.published), span((tried.min(), tried.max())))
            table.add_row(name, number(one.best.value), *ends, Text(said, style="red" if one.refused else "dim"))
        yield table
        verdicts += [v for one in timescales for v in one.verdicts]
    if batches is not None and batches.sweeps:
        yield ""
        yield _critical(batches, share)
        verdicts += [*batches.verdicts, *(v for one in batches.sweeps for v in one.verdicts)]
    if importances:
        yield ""
        yield _shares(importances, share)
        verdicts += [v for one in importances for v in one.verdicts]
    if verdicts:
        yield ""
        yield verdict_table(verdicts)


def _critical(batches: Any, share: str) -> RenderableType:
    """Tokens a step from which on a target loss takes twice the fewest tokens, and how they grow with these."""
    table = plain_table("critical batch", "tokens a step", share, "fewest tokens", "20% beyond linear", "verdict")
    for one in batches.sweeps:
        name = f"{one.name} N={human(one.group['N'])} at {number(one.target)} nats".strip()
        said = next((v.code for v in one.verdicts if v.severity == "refuse"), "")
        said = said or next((v.code for v in one.verdicts), "")
        values = (number(e.value) for e in (one.tokens, one.beyond_linear))
        style = "red" if one.refused else "dim"
        table.add_row(name, number(one.batch.value), span(one.batch.interval), *values, Text(said, style=style))
    for family, power in batches.growth.items():
        if power.value == power.value:
            table.add_row(f"{family} power of tokens".strip(), number(power.value), span(power.interval))
    return table


def _shares(importances: Sequence[Any], share: str) -> RenderableType:
    """What each parameter explains of the loss's variance, by evaluator; interactions of a hundredth and more."""
    table = plain_table("importance", "for", "share", share, "by")
    table.columns[-1].no_wrap = False
    for one in importances:
        name = " ".join(f"{k}={_written(k, v)}" if isinstance(v, float) else str(v) for k, v in one.group.items())
        if one.refused:
            table.add_row(name or "all runs", Text("refused", style="red"))
            continue
        rows = [row for row in one.table().to_dict("records") if " x " not in row["effect"] or row["share"] >= 0.01]
        for order, row in enumerate(rows):
            ends = (
                f"{row['share']:.1%}",
                f"{row['low']:.1%} .. {row['high']:.1%}" if row["low"] == row["low"] else "-",
            )
            by = f"{row['evaluator']}, {row['region']}"
            table.add_row("" if order else name or "all runs", row["effect"], *ends, Text(by, style="dim"))
    return table


def _written(name: str, value: float) -> str:
    return human(value) if name in ("N", "D", "batch_tokens") else number(value)
