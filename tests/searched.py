"""A search without training: cells end by the writing of their result, a loss that follows from the learning rate."""

import math
from pathlib import Path
from typing import Any

from cluster.ledger import register
from cluster.searching import Searching
from sweeps.corpora import CorpusInfo, make_source, prepare
from sweeps.grids import Plan, plan_study
from sweeps.planned import PlannedCell
from sweeps.store import Store, begin_attempt, cell_state, commit_result, open_store, record_error
from sweeps.study import Study

RATE = {"learning_rate": {"log": [1e-4, 1e-1]}}
CORPUS = {"source": "markov", "options": {"vocab_size": 8, "tokens": 60_000}}


def make_corpus(folder: Path) -> CorpusInfo:
    return prepare(make_source("markov", None, CORPUS["options"]), "bytes", open_store(folder / "store").root)


def search_plan(
    corpus: CorpusInfo, training: dict[str, Any] | None = None, points: Any = None, seeds: Any = 0, **search: Any
) -> Plan:
    """The plan of the study `s`: one place and six trials of random rates, but for what is said."""
    declared = {
        "name": "s",
        "corpus": CORPUS,
        "context": 32,
        "families": ["llama"],
        "grid": {"type": "points", "points": points or [{"size": 10_000, "tokens": 40_000}]},
        "training": {"batch_tokens": 64, "warmup_tokens": 2_000} | (training or {}),
        "seeds": seeds,
        "search": {"space": RATE, "sampler": "random", "trials": 6} | search,
    }
    return plan_study(Study.model_validate(declared), corpus)


def loss_of(one: PlannedCell) -> float:
    """Least at a learning rate of .01; less for longer cells."""
    return 2.0 + 0.1 * math.log(one.cell.optimizer.learning_rate / 0.01) ** 2 + 1000 / one.cell.tokens


def end(store: Store, one: PlannedCell, state: str = "finished", loss: float | None = None, spent: float = 0) -> None:
    attempt = begin_attempt(store, one.cell.id, {"study": "s"})
    if state == "failed":
        record_error(attempt, "code", "it is on fire")
        return
    told = {"state": state, "reason": None, "val_loss_final": loss or loss_of(one), "loss_at_start": 4.0}
    told |= {"flops_spent": spent or one.counts["C"], "trunk": None}
    commit_result(attempt, told | ({"val_loss_final": None, "reason": "NaN"} if state == "diverged" else {}))


def drive(store: Store, plan: Plan, most: int = 10_000, idle: int = 1, **ending: Any) -> list[PlannedCell]:
    """Search as the driver does, ending each cell at once; at most so many cells. Returns those that were "trained"."""
    search = Searching(store, plan)
    search.grow(0)
    register(store, search.plan, b"")
    waiting = [one for one in search.plan.cells if cell_state(store, one.cell.id).state == "planned"]
    trained = []
    while (waiting or search.goes_on()) and len(trained) < most:
        waiting += search.grow(idle if not waiting else 0)
        waiting = [one for one in waiting if cell_state(store, one.cell.id).result is None]
        if waiting:
            trained.append(waiting.pop(0))
            end(store, trained[-1], **ending)
    return trained
