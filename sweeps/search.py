"""A search: Optuna asks for settings, the cells of a trial are trained, and what came out is told.

The journal is the truth of what was asked, the cells' files of what came out; which cells a study has follows from both
(sweeps/trials.py). So nothing else need be kept: whoever opens the journal again finds the trials that run, tells those
whose cells have ended, and goes on with the others. A trial is told once; two trials of equal settings share their
cells and are told both. The journal is written by one driver at a time, which holds the study.

Reproducible are, given the file's seed: the first settings, and each later one as a function of its number, of what was
told before it and of what ran meanwhile. With one worker that is the whole search, killed and gone on with or not. With
several, results come in the order in which cells happen to end, and a sampler that learns asks otherwise; random, qmc
and grid learn nothing and ask the same in any order.

A trial's value is its loss in nats per token (geometric mean over its cells). A diverged cell counts as its loss at
start: the sampler learns to stay away. A trial whose cell failed, or was put in quarantine, is FAIL; one that ended at
a rung is PRUNED, with its loss there.
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from sweeps.faults import fault
from sweeps.grids import Plan
from sweeps.planned import PlannedCell
from sweeps.rungs import Correlation, correlation, is_control, is_promising, pairs_of
from sweeps.samplers import distributions, grid_order, make_sampler, most_trials
from sweeps.schedules import stable_steps
from sweeps.space import rung_step
from sweeps.store import Store, cell_state, read_quarantine
from sweeps.trials import (
    AGAIN,
    FAULT,
    LENGTH,
    Trial,
    first_cost,
    groups,
    grown,
    journal_path,
    open_journal,
    read_trial,
    start_settings,
    sync_journal,
    trial_cells,
)


class Searcher:
    """The search of a study, open for writing: for the one driver that holds the study.

    `look` tells what has ended and lets trials go on, `ask` asks for more; both let `plan` grow by the cells that are
    to be trained, which the caller puts on record before anyone trains them.
    """

    def __init__(self, store: Store, plan: Plan) -> None:
        """Opens or makes the journal, and ends what a killed driver left half asked."""
        import optuna

        assert plan.study.search is not None
        self.store, self.plan, self.search = store, plan, plan.study.search
        self.said: list[str] = []
        """What people should know, in sentences: why a rung is no longer used, why no more is asked."""
        self._groups = {group.name: group for group in groups(plan)}
        self._space = distributions(self.search.space)
        self._path = journal_path(store, plan.study.name)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _mend(self._path)
        self._storage = open_journal(self._path)
        self._studies: dict[str, Any] = {
            name: optuna.create_study(study_name=name, storage=self._storage, direction="minimize", load_if_exists=True)
            for name in self._groups
        }
        self._trials: dict[str, dict[int, Trial]] = {name: {} for name in self._groups}
        self._most = most_trials(self.search)
        self._asked = dict.fromkeys(self._groups, 0)
        """Trials that count, by group: all but the half-asked and those that repeat a failed one."""
        for name in self._groups:
            self._take_over(name)
        self.plan = replace(plan, cells=(), branches={})
        for name, group in self._groups.items():
            self.plan = grown(self.plan, group, list(self._trials[name].values()))
        self._flops = {one.cell.id: self._spent(one) for one in self.plan.cells}
        """What each cell on record cost, or will cost."""
        shares = [*self.search.rungs, 1.0]
        self._cost = {n: {s: first_cost(group, self.search, s) for s in shares} for n, group in self._groups.items()}

    def _take_over(self, name: str) -> None:
        """Know the trials of a group. Of those that a killed driver left half asked, one without its setting is failed,
        one without its length gets the shortest."""
        study, group = self._studies[name], self._groups[name]
        for setting in start_settings(self.search, group):
            study.enqueue_trial(setting, skip_if_exists=True)
        for frozen in study.get_trials(deepcopy=False):
            trial = read_trial(frozen, self.search)
            if trial is not None:
                if self.search.rungs and trial.state == "RUNNING" and LENGTH not in frozen.user_attrs:
                    self._attribute(name, trial.number, LENGTH, trial.length)
                self._know(name, self._planned(name, trial))
                self._asked[name] += trial.counts
            elif frozen.state.name == "RUNNING":
                self._tell(name, frozen.number, None, "FAIL")

    # --- telling -------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Tell every trial whose cells have ended, in the order of their numbers, and let the promising ones go on."""
        quarantine = read_quarantine(self.store, self.plan.study.name)
        for name, trials in self._trials.items():
            for trial in list(trials.values()):
                if trial.state == "RUNNING":
                    self._end(name, trial, quarantine)
                elif trial.state == "FAIL" and trial.fault is None and self._is_forgiven(name, trial, quarantine):
                    self._ask_again(name, trial)

    def _end(self, name: str, trial: Trial, quarantine: Mapping[str, Any]) -> None:
        cells = trial_cells(self._groups[name], trial, trial.length)
        states = {one.cell.id: cell_state(self.store, one.cell.id) for one in cells}
        if any(s.state in ("planned", "running") and i not in quarantine for i, s in states.items()):
            return
        fault("search.before_tell")
        self._flops |= {one.cell.id: self._spent(one) for one in cells}
        if any(s.result is None or i in quarantine for i, s in states.items()):
            self._tell(name, trial.number, None, "FAIL")
            return
        losses = [_loss(one, states[one.cell.id].result or {}) for one in cells]
        loss = math.exp(sum(math.log(one) for one in losses) / len(losses)) if min(losses) > 0 else fmean(losses)
        diverged = [s.reason for s in states.values() if s.state == "diverged"]
        if diverged:
            self._attribute(name, trial.number, "diverged", diverged[0] or "diverged")
        if trial.length == 1.0 or diverged:
            self._tell(name, trial.number, loss, "COMPLETE")
        else:
            self._end_rung(name, trial, loss)

    def _end_rung(self, name: str, trial: Trial, loss: float) -> None:
        """A trial has come to a rung: it goes on, or ends here. Its loss is on record before what follows from it."""
        share = trial.length
        others = [
            one.losses[share] for n, one in self._trials[name].items() if share in one.losses and n != trial.number
        ]
        self._storage.set_trial_intermediate_value(self._id(name, trial.number), rung_step(share), loss)
        trial = self._know(name, replace(trial, losses={**trial.losses, share: loss}))
        fault("search.after_rung")
        refuted = self._correlation(name, share).is_refuted
        chosen = refuted or is_control(self.search.seed, name, trial.number) or is_promising(loss, others)
        following = self._first_length(name, above=share)
        longer = replace(trial, length=following)
        if chosen and not self._is_too_dear(self._promotion_cost(name, longer)):
            self._attribute(name, trial.number, LENGTH, following)
            self._know(name, longer)
            self._grow(name, longer)
        else:
            self._tell(name, trial.number, None, "PRUNED")

    def _tell(self, name: str, number: int, value: float | None, state: str) -> None:
        from optuna.trial import TrialState

        self._studies[name].tell(number, value, state=TrialState[state], skip_if_finished=True)
        fault("search.after_tell")
        known = self._trials[name].get(number)
        if known is not None:
            value = list(known.losses.values())[-1] if state == "PRUNED" else value
            self._know(name, replace(known, state=state, value=value))
            if state != "RUNNING" and known.length == 1.0:
                self._note_correlations(name)

    def _is_forgiven(self, name: str, trial: Trial, quarantine: Mapping[str, Any]) -> bool:
        """Whether the cells of a failed trial have been given another chance, or have used it."""
        if any(one.state != "FAIL" and one.setting == trial.setting for one in self._trials[name].values()):
            return False
        ids = [one.cell.id for one in trial_cells(self._groups[name], trial, trial.length)]
        return not any(one in quarantine or cell_state(self.store, one).state == "failed" for one in ids)

    def _ask_again(self, name: str, trial: Trial) -> None:
        """A told trial stays as it was told: another of the same setting takes its cells over. It runs at once: in the
        queue it would wait behind start settings, and be asked again meanwhile."""
        from optuna.trial import TrialState, create_trial

        study = self._studies[name]
        told = study.get_trials(deepcopy=False)[trial.number]
        study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=told.params,
                distributions=told.distributions,
                user_attrs={AGAIN: trial.number},
            )
        )
        self._begin(name, study.get_trials(deepcopy=False)[-1])

    def _note_correlations(self, name: str) -> None:
        for share in self.search.rungs:
            found = self._correlation(name, share)
            if found.is_refuted and not any(name in one and f"rung {share:g}" in one for one in self.said):
                self.said.append(f"{name}: {found}.")

    # --- asking --------------------------------------------------------------------------------------------------

    def wants(self) -> bool:
        """Whether more trials are to be asked: not where all have been, or where the next would exceed the budget."""
        return self._next_group() is not None

    def goes_on(self) -> bool:
        """Whether a trial runs, or more are to be asked."""
        return (
            any(one.state == "RUNNING" for trials in self._trials.values() for one in trials.values()) or self.wants()
        )

    def ask(self, count: int) -> None:
        """Ask for so many trials, fewer where fewer are wanted: each time of the group that has fewest."""
        asked = 0
        while asked < count and (name := self._next_group()) is not None:
            self._ask(name)
            asked += 1

    def sync(self) -> None:
        """Until all that was asked and told is on disk: a kill loses none of it, a power cut might."""
        sync_journal(self._path)

    def _next_group(self) -> str | None:
        open_groups = [name for name in self._groups if self._asked[name] < self._most]
        if not open_groups:
            return None
        name = min(open_groups, key=lambda one: self._asked[one])
        if self._is_too_dear(self._cost[name][self._first_length(name)]):
            told = f"no more trials are asked: the next would exceed the budget of {self.search.flops:.3g} FLOPs"
            told += f" ({self._spent_so_far():.3g} are spent or planned)"
            if not any(one.startswith("no more trials") for one in self.said):
                self.said.append(f"{told}.")
            return None
        return name

    def _ask(self, name: str) -> None:
        study = self._studies[name]
        frozen = study.get_trials(deepcopy=False)
        if self.search.sampler == "grid":
            self._queue_grid_point(name, frozen)
        study.sampler = make_sampler(self.search, name, len(frozen))
        asked = study.ask(self._space)
        self._begin(name, self._storage.get_trial(asked._trial_id))

    def _begin(self, name: str, frozen: Any) -> None:
        """Plan the cells of a trial that is on record as running."""
        fault("search.after_ask")
        trial = read_trial(frozen, self.search)
        assert trial is not None
        self._asked[name] += trial.counts
        if self.search.rungs:
            trial = replace(trial, length=self._first_length(name))
            self._attribute(name, trial.number, LENGTH, trial.length)
        trial = self._planned(name, trial)
        self._know(name, trial)
        self._grow(name, trial)

    def _planned(self, name: str, trial: Trial) -> Trial:
        """A trial as it is, where its setting makes cells or is known not to; else it has failed."""
        if trial.state != "RUNNING":
            return trial
        try:
            trial_cells(self._groups[name], trial, trial.length)
        except ValueError as error:  # the ends of the space make cells, a setting between them need not
            self._attribute(name, trial.number, FAULT, str(error))
            self._tell(name, trial.number, None, "FAIL")
            return replace(trial, state="FAIL", fault=str(error))
        return trial

    def _queue_grid_point(self, name: str, frozen: Sequence[Any]) -> None:
        """The first setting of the grid that no trial has."""
        if any(one.state.name == "WAITING" for one in frozen):
            return
        had = [one.params for one in frozen if one.params.keys() == self.search.space.keys()]
        left = (setting for setting in grid_order(self.search, name) if setting not in had)
        if (setting := next(left, None)) is not None:
            self._studies[name].enqueue_trial(setting)

    # --- what is known -------------------------------------------------------------------------------------------

    def flops_to_come(self) -> float:
        """About what the trials that are not asked yet will cost; of those that begin at a rung, half go on."""
        total = 0.0
        for name, costs in self._cost.items():
            first = costs[self._first_length(name)]
            total += max(0, self._most - self._asked[name]) * (first + costs[1.0]) / 2
        return total if self.search.flops is None else min(total, max(0.0, self.search.flops - self._spent_so_far()))

    def cells_to_come(self) -> int:
        """The cells of the trials that are not asked yet, but for those of promotions."""
        if not self.wants():
            return 0
        return sum(max(0, self._most - self._asked[name]) * len(group.places) for name, group in self._groups.items())

    def _grow(self, name: str, trial: Trial) -> None:
        before = len(self.plan.cells)
        self.plan = grown(self.plan, self._groups[name], [trial])
        for one in self.plan.cells[before:]:
            self._flops[one.cell.id] = self._spent(one)

    def _spent(self, one: PlannedCell) -> float:
        """What a cell cost in FLOPs, before its end as planned."""
        result = cell_state(self.store, one.cell.id).result
        if result is not None and "flops_spent" in result:
            return float(result["flops_spent"])
        branch = self.plan.branches.get(one.cell.id)
        shared = branch.steps * one.cell.batch_tokens * one.counts["flops_per_token"] if branch else 0
        return float(one.counts["C"]) - shared

    def _is_too_dear(self, cost: float) -> bool:
        return self.search.flops is not None and self._spent_so_far() + cost > self.search.flops

    def _spent_so_far(self) -> float:
        """FLOPs of all cells on record, as they were spent or are planned."""
        return sum(self._flops.values())

    def _promotion_cost(self, name: str, trial: Trial) -> float:
        """What a trial costs at its length beyond what its last rung has trained."""
        group = self._groups[name]
        before = trial_cells(group, trial, max(share for share in trial.lengths if share < trial.length))
        shared = [stable_steps(b.cell) * b.cell.batch_tokens * b.counts["flops_per_token"] for b in before]
        return sum(one.counts["C"] for one in trial_cells(group, trial, trial.length)) - sum(shared)

    def _first_length(self, name: str, above: float = 0.0) -> float:
        """The next rung above a share that still tells something, or the full length."""
        useful = (r for r in self.search.rungs if r > above and not self._correlation(name, r).is_refuted)
        return next(useful, 1.0)

    def _correlation(self, name: str, share: float) -> Correlation:
        return correlation(share, pairs_of(self._trials[name].values(), self.search.seed, name, share))

    def _know(self, name: str, trial: Trial) -> Trial:
        self._trials[name][trial.number] = trial
        return trial

    def _attribute(self, name: str, number: int, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._id(name, number), key, value)

    def _id(self, name: str, number: int) -> int:
        study = self._studies[name]
        found: int = self._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
        return found


def _loss(one: PlannedCell, result: Mapping[str, Any]) -> float:
    """What a cell's end counts in a trial, in nats: a divergence as its loss at start, ln V where that was not told."""
    if result["state"] == "finished":
        return float(result["val_loss_final"])
    return float(result.get("loss_at_start") or math.log(one.cell.shape.vocab_size))


def _mend(path: Path) -> None:
    """Cut off a line that a killed driver left half written: Optuna would refuse the journal when more follows it."""
    with suppress(FileNotFoundError):
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(path, end)
