"""What a study file says of a search is refused, in a sentence, where no sampler could take it."""

from pathlib import Path
from typing import Any

import pytest
from searched import make_corpus, search_plan

from sweeps.corpora import CorpusInfo
from sweeps.errors import InputError
from sweeps.space import Axis
from sweeps.studyfile import load_study
from sweeps.trials import groups


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def fault_of(tmp_path: Path, search: str, more: str = "") -> str:
    path = tmp_path / "bad.yaml"
    grid = "{type: ladder, sizes: [1e4], tokens_per_parameter: [2]}"
    path.write_text(f"name: s\nfamilies: [llama]\ngrid: {grid}\n{more}\nsearch:\n  {search}")
    with pytest.raises(InputError) as raised:
        load_study(path)
    return str(raised.value)


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("space: {learning_rate: {log: [0.1, 0.1]}}", "is empty"),
        ("space: {learning_rate: {log: [0.1, 0.01]}}", "is empty"),
        ("space: {learning_rate: {log: [0, 0.1]}}", "reaches zero; begin above it, or take linear"),
        ("space: {learning_rate: {log: [1e-3, 1e-1], linear: [0, 1]}}", "exactly one of"),
        ("space: {learning_rate: {logg: [1e-3, 1e-1]}}", 'did you mean "log"'),
        ("space: {learning_rate: [1e-3, 1e-1]}", "one of {log: [a, b]}, {linear: [a, b]}, {int: [a, b]}, {categorical"),
        ("space: {}", "search.space: found {}; at least 1 item is wanted"),
        ("space: {learning_rate: {log: [0.1, 0.2, 0.3]}}", "found [0.1, 0.2, 0.3]; at most 2 items are wanted, not 3"),
        ("space: 3", "search.space: found 3; a mapping is wanted"),
        ("[1, 2]", "search: found [1, 2]; a mapping is wanted, of the keys space, sampler"),
        ("space: {schedule: {categorical: [cosine]}}", "at least two different values"),
        ("space: {schedule: {categorical: [cosine, wsdd]}}", "wsd"),
        ("space: {learning_rat: {log: [1e-3, 1e-1]}}", 'did you mean "learning_rate"'),
        ("space: {batch_tokens: {int: [512, 4000], step: 512}}", "no whole number of steps"),
        ("space: {beta1: {linear: [0, 2]}}", "beta1"),
        (
            "{space: {schedule: {categorical: [cosine, wsd]}, learning_rate: {log: [1e-3, 1]}}, sampler: cmaes}",
            "take tpe, gp, qmc, random",
        ),
        ("{space: {learning_rate: {log: [1e-3, 1]}}, sampler: cmaes}", "at least two hyperparameters"),
        (
            "{space: {learning_rate: {log: [1e-3, 1]}}, sampler: grid}",
            "needs a list of values, and learning_rate has none",
        ),
        (
            "{space: {eps: {linear: [1, 400], step: 1}, clip_norm: {linear: [1, 400], step: 1}}, sampler: grid}",
            "sampler grid would go through 160,000 settings, and 100,000 are the most: give larger steps; take tpe, gp",
        ),
        ("{space: {learning_rate: {log: [1e-3, 1]}}, sampler: gp, rungs: [0.5]}", "take tpe, qmc, random"),
        ("{space: {learning_rate: {log: [1e-3, 1]}}, rungs: [1.5]}", "more than 0 and less than 1"),
        ("{space: {learning_rate: {log: [1e-3, 1]}}, rungs: [0.0625, 0.0624]}", "less than a thousandth of the length"),
        ("{space: {learning_rate: {log: [1e-3, 1]}}, start: [{weight_decay: 0}]}", "which is not searched"),
        ("{space: {learning_rate: {log: [1e-3, 1]}}, sampler: tpee}", 'did you mean "tpe"'),
        ("{space: {learning_rate: {log: [1e-3, 1]}}, trial: 3}", 'did you mean "trials"'),
    ],
)
def test_a_bad_search_is_a_sentence_with_its_line(tmp_path: Path, search: str, words: str) -> None:
    found = fault_of(tmp_path, search)
    assert words in found
    assert "bad.yaml:" in found


def test_what_is_searched_stands_nowhere_else(tmp_path: Path) -> None:
    more = "vary: {learning_rate: [0.1, 0.2]}"
    assert "varied or searched" in fault_of(tmp_path, "space: {learning_rate: {log: [1e-3, 1]}}", more)


def test_a_start_setting_outside_the_space_is_a_sentence(corpus: CorpusInfo) -> None:
    with pytest.raises(InputError, match=r"start has learning_rate 0\.5, which is not in the space \(.*\)\. Change"):
        groups(search_plan(corpus, start=[{"learning_rate": 0.5}]))


def test_a_recipe_whose_own_value_is_not_in_the_space_is_told_as_such(corpus: CorpusInfo) -> None:
    space = {"learning_rate": {"categorical": [0.02, 0.05]}}
    with pytest.raises(InputError, match=r"space \(categorical: \[0\.02, 0\.05\]\)\. It is the recipe's own: name"):
        groups(search_plan(corpus, {"learning_rate": 0.01}, space=space, start=[{}]))


def test_a_start_setting_that_must_name_what_the_recipe_cannot_give_is_a_sentence(corpus: CorpusInfo) -> None:
    space = {"batch_tokens": {"log": [64, 256]}, "learning_rate": {"log": [1e-3, 1e-1]}}
    plan = search_plan(corpus, {"batch_tokens": 1_000_000}, space=space, start=[{"learning_rate": 0.01}])
    with pytest.raises(InputError, match=r"start names no batch_tokens, and the recipe's makes no cell .* Name it\."):
        groups(plan)
    named = [{"learning_rate": 0.01, "batch_tokens": 128}]
    assert groups(search_plan(corpus, {"batch_tokens": 1_000_000}, space=space, start=named))


@pytest.mark.parametrize("axis", [{"int": [0, 10**12]}, {"linear": [0, 1], "step": 1e-5}])
def test_a_range_of_too_many_values_is_not_listed(axis: dict[str, Any]) -> None:
    assert Axis.model_validate(axis).values() is None


def test_values_are_those_that_a_person_would_write() -> None:
    assert Axis.model_validate({"linear": [0, 0.4], "step": 0.1}).values() == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_a_start_setting_may_be_written_as_its_choice_is(corpus: CorpusInfo) -> None:
    space = {"learning_rate": {"categorical": ["1e-3", "1e-2"]}}  # as YAML 1.1 reads them
    assert groups(search_plan(corpus, space=space, start=[{"learning_rate": "1e-2"}]))


def test_rungs_want_a_trunk_that_the_full_run_shares(corpus: CorpusInfo) -> None:
    with pytest.raises(InputError, match="found schedule cosine"):
        groups(search_plan(corpus, rungs=[0.5]))
    follows = {"schedule": "wsd", "weight_decay": {"value": 0.1, "at": {"D": 1e4}, "power": {"D": 0.5}}}
    with pytest.raises(InputError, match=r"optimizer\.weight_decay differs"):
        groups(search_plan(corpus, training=follows, rungs=[0.5]))
