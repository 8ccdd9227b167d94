"""What the report says of a search's rungs is what the search itself goes by."""

import itertools
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from searched import drive, make_corpus, search_plan

from analysis.effects import Evaluation
from analysis.importance import importances
from analysis.runs import load_runs
from analysis.search_page import importance_words, rank_correlations, rungs_section, section
from analysis.verdicts import Estimate
from cluster.ledger import ledger_rows
from sweeps.rungs import Correlation, is_control
from sweeps.store import open_store, read_plan
from sweeps.summary import search_summary
from sweeps.trials import groups

WSD = {"schedule": "wsd", "final_fraction": 0.0, "warmup_tokens": 1_000}


def test_the_rank_correlation_of_a_rung_is_the_one_that_status_tells(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    make_plan = partial(search_plan, make_corpus(tmp_path / "corpus"), training=WSD, seeds=[0, 1], rungs=[0.0625])
    (group,) = groups(make_plan())
    lots = (sum(is_control(seed, group.name, number) for number in range(10)) for seed in itertools.count())
    plan = make_plan(trials=10, seed=next(seed for seed, controls in enumerate(lots) if controls >= 4))
    drive(store, plan)
    ((name, found),) = rank_correlations(load_runs("s", store), read_plan(store, "s"))
    (told,) = search_summary(store, "s", ledger_rows(store, "s"))
    assert [found.to_json()] == told["rungs"]
    assert found.pairs >= 4
    assert found.rho == pytest.approx(1), "at equal lengths a loss here follows from the rate alone"
    assert told["group"].startswith(name)
    assert f"<td>{name}</td><td>0.0625</td><td>{found.pairs}</td><td>1</td>" in rungs_section([(name, found)])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Correlation(0.25, 3, None, None), "refused: too few trials"),
        (Correlation(0.25, 6, 0.5, (-0.5, 0.93)), "not told from 0 yet"),
        (Correlation(0.25, 9, 0.2, (-0.5, 0.8)), "not told from 0: trials run at full length"),
        (Correlation(0.25, 9, 0.9, (0.5, 0.97)), "told from 0"),
    ],
)
def test_a_rung_is_judged_by_its_interval(found: Correlation, words: str) -> None:
    assert f"<td>{words}" in rungs_section([("llama", found)])


def test_a_size_with_too_few_trials_keeps_no_words_from_the_others() -> None:
    """A search that goes on has such sizes: what they lack is no fault of the page."""
    grid = list(itertools.product((1e-3, 2e-3, 4e-3), (0.0, 0.1)))
    runs = pd.DataFrame(grid, columns=["learning_rate", "weight_decay"]).assign(N=4e5, D=1e6, family="llama")
    runs["val_loss_final"] = 3.0 + np.log(runs["learning_rate"] / 2e-3) ** 2 + runs["weight_decay"]
    found = importances(pd.concat([runs[:3].assign(N=1e5), runs]))
    assert [bool(one.evaluations) for one in found] == [False, True]
    words = importance_words(found)
    assert re.search("at 400k parameters on 1M tokens:? learning rate", words)
    assert "100k" not in words
    assert found[1].evaluations[0].evaluator in words


def test_a_batch_is_shown_as_it_was_trained() -> None:
    runs = pd.DataFrame({"batch_tokens": [1024.0, 512.0], "learning_rate": [0.01, 0.0123456], "trial": [0.0, 1.0]})
    runs = runs.assign(N=1e5, D=1e6, search="s", rung=1.0, is_default=False, excluded=None, state="finished")
    text = section(runs.assign(val_loss_final=[2.0, 3.0]), ("batch_tokens", "learning_rate"))
    assert "<td>1,024</td><td>0.01</td><td>2.0000</td>" in text
    assert "<td>512</td><td>0.0123</td>" in text


@pytest.mark.parametrize(
    ("second", "other", "settled"),
    [("rate", (0.1, 0.2), True), ("batch", (0.1, 0.2), False), ("rate", (0.3, 0.7), False)],
)
def test_what_matters_most_is_settled_only_where_evaluators_and_intervals_agree(second, other, settled) -> None:
    def evaluation(name: str, first: str) -> Evaluation:
        rest = "batch" if first == "rate" else "rate"
        return Evaluation(
            evaluator=name,
            region="",
            shares={first: Estimate(value=0.6, interval=(0.5, 0.8)), rest: Estimate(value=0.15, interval=other)},
        )

    one = SimpleNamespace(
        group={"N": 1e5, "D": 1e6}, evaluations=(evaluation("fANOVA", "rate"), evaluation("PED-ANOVA", second))
    )
    words = importance_words([one])
    assert ("not settled at 100k parameters on 1M tokens" in words) != settled
    assert ("batch" in words) != settled
    assert "rate 60% (50% to 80%)" in words
    assert "by fANOVA" in words
