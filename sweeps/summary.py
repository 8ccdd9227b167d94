"""A search in figures: how many trials of each group are asked, told and to come, the best of them, what rungs tell.

Read from Optuna's journal and the plan on record, so that whoever looks needs no driver and no study file.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sweeps.grids import Plan
from sweeps.records import Json
from sweeps.rungs import Correlation, correlation, pairs_of
from sweeps.samplers import most_trials
from sweeps.space import Search
from sweeps.store import Store, read_plan, study_names
from sweeps.trials import Trial, expected_costs, groups, journal_path, open_journal, read_group
from sweeps.units import flops, plural

STATES = {"RUNNING": "running", "COMPLETE": "told", "PRUNED": "ended at a rung", "FAIL": "failed"}
Costs = tuple[float, float]
"""About what a trial costs in FLOPs: up to the first length, and on average."""


def search_summary(store: Store, name: str, rows: Sequence[Mapping[str, Any]]) -> list[Json]:
    """One entry per group of a study on record, in the order of its plan; empty where the study searches nothing.

    rows: the study's ledger rows. {"group", "planned": trials, "asked", "to_come", "running", "told", "ended at a
    rung", "failed", "diverged", "best": {"trial", "loss" (nats), "setting": as trained} or None, "rungs": [rank
    correlations], "C_spent": FLOPs of all that are asked, "to_come", "C_to_come": trials still to be asked and about
    what they will cost, as far as the search's budget goes, "C_trial": about what one costs, "C_left": what is left of
    the budget for all groups together}. C_to_come and C_trial are None where none has run, C_left where there is no
    budget.
    """
    declared = read_plan(store, name)["study"].get("search") if name in study_names(store) else None
    if not declared:
        return []
    names = dict.fromkeys(row["labels"]["search"] for row in rows if "search" in row["labels"])
    return _summarise(store, name, Search.model_validate(declared), names, rows)


def planned_summary(store: Store, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[Json]:
    """The same for a plan as its file declares it now; rows: the plan's. Knows what trials cost before one has run."""
    search = plan.study.search
    if search is None:
        return []
    costs = {group.name: expected_costs(group, search) for group in groups(plan)}
    return _summarise(store, plan.study.name, search, costs, rows)


def _summarise(
    store: Store, name: str, search: Search, costs: Mapping[str, Costs | None], rows: Sequence[Mapping[str, Any]]
) -> list[Json]:
    """costs: of a group's trials to come, None where they are to be taken from those that have run."""
    path = journal_path(store, name)
    storage = open_journal(path) if path.exists() else None
    found = []
    for group, cost in costs.items():
        trials = read_group(storage, group, search) if storage else []
        its = [row for row in rows if row["labels"].get("search") == group]
        found.append(_of_group(group, search, trials, its, cost and cost[1]))
    if search.flops is not None:
        _keep_to_budget(found, [cost and cost[0] for cost in costs.values()], search.flops)
    return found


def summary_lines(one: Mapping[str, Any]) -> Iterator[str]:
    """A group's entry in words: `llama N=9.7k D=40k: 12 of 30 trials asked (9 told, 3 running); best 2.345 ...`."""
    told = [f"{one[word]} {word}" for word in (*STATES.values(), "diverged") if one[word]]
    line = f"{one['group'].rpartition(' ')[0]}: {one['asked']} of {plural(one['planned'], 'trial')} asked"
    line += f" ({', '.join(told)})" if told else ""
    if one["to_come"] and one["C_to_come"]:
        line += f", about {flops(one['C_to_come'])} FLOPs to come"
    if one["C_trial"] and (wanted := max(0, one["planned"] - one["asked"])) > one["to_come"]:
        line += f"; what is left of the budget, {flops(one['C_left'])} FLOPs, has room for {one['to_come'] or 'none'}"
        line += f" of the {wanted} to come (about {flops(one['C_trial'])} each)"
    if best := one["best"]:
        setting = ", ".join(f"{name} {_written(value)}" for name, value in best["setting"].items())
        line += f"; best loss {best['loss']:.4f} at {setting} (trial {best['trial']})"
    yield line
    yield from (f"  {Correlation.from_json(rung)}" for rung in one["rungs"])


def _written(value: Any) -> str:
    """A whole number in full, any other in four digits, a word as it is."""
    if isinstance(value, int | float):
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
    return str(value)


def _trained(trial: Trial, rows: Sequence[Mapping[str, Any]]) -> Json:
    """A trial's setting with the batch that its cells train with: a sampler asks for any number of tokens, of which a
    cell takes a whole number of sequences."""
    batches = {row["batch_tokens"] for row in rows if row["labels"].get("trial") == trial.number}
    told = dict(trial.setting)
    return told | {"batch_tokens": batches.pop()} if "batch_tokens" in told and len(batches) == 1 else told


def _of_group(
    group: str, search: Search, trials: Sequence[Trial], rows: Sequence[Mapping[str, Any]], cost: float | None
) -> Json:
    spent = sum(row["C_spent"] for row in rows)
    ended = [(one.value, one) for one in trials if one.state == "COMPLETE" and one.value is not None]
    loss, best = min(ended, key=lambda pair: pair[0], default=(None, None))
    states = Counter(STATES[one.state] for one in trials)
    planned = most_trials(search)
    asked = sum(one.counts for one in trials)
    to_come = max(0, planned - asked)
    cost = spent / asked if cost is None and asked else cost
    return {
        "group": group,
        "planned": planned,
        "asked": asked,
        "to_come": to_come,
        **{word: states.get(word, 0) for word in STATES.values()},
        "diverged": sum(row["state"] == "diverged" for row in rows),
        "best": best and {"trial": best.number, "loss": loss, "setting": _trained(best, rows)},
        "rungs": [correlation(share, pairs_of(trials, search.seed, group, share)).to_json() for share in search.rungs],
        "C_spent": spent,
        "C_to_come": to_come * cost if cost is not None else None,
        "C_trial": cost,
        "C_left": None,
    }


def _keep_to_budget(found: Sequence[Json], first: Sequence[float | None], budget: float) -> None:
    """Cut what is to come to what the budget leaves: the groups take turns, as they do when trials are asked.

    first: of each group, what a trial must find room for; None where its average is all that is known.
    """
    left = max(0.0, budget - sum(one["C_spent"] for one in found))
    for one in found:
        one["C_left"] = left
    if any(one["C_trial"] is None for one in found):
        return
    room = [0] * len(found)
    turns = [(one["asked"], order) for order, one in enumerate(found) if one["to_come"]]
    heapq.heapify(turns)
    while turns:
        asked, order = heapq.heappop(turns)
        cost = found[order]["C_trial"]
        if left < (first[order] or cost):
            break
        left -= cost
        room[order] += 1
        if room[order] < found[order]["to_come"]:
            heapq.heappush(turns, (asked + 1, order))
    for one, count in zip(found, room):
        one |= {"to_come": count, "C_to_come": min(count * one["C_trial"], one["C_left"])}
