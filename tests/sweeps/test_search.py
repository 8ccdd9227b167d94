"""A search asks what its file says, tells what came out, and goes on from any crash with no trial lost or run twice.

Cells are "trained" here by writing their result (tests/searched.py).
"""

import itertools
import json
import math
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import optuna
import pytest
from crashing import Forker
from searched import CORPUS, RATE, drive, end, loss_of, make_corpus, search_plan

from cluster.ledger import ledger_rows, plan_rows, register
from cluster.searching import Searching
from sweeps.corpora import CorpusInfo, make_source, prepare
from sweeps.errors import InputError
from sweeps.faults import POINTS
from sweeps.grids import Plan, plan_study
from sweeps.planned import PlannedCell
from sweeps.rungs import ENOUGH_PAIRS, correlation, is_control, is_promising
from sweeps.samplers import STARTUP_TRIALS, make_sampler
from sweeps.search import Searcher
from sweeps.store import Store, attempt_epochs, forgive, open_store, quarantine_cell, read_plan, release_cell
from sweeps.studyfile import load_study
from sweeps.summary import planned_summary, search_summary, summary_lines
from sweeps.trials import Trial, groups, journal_path, open_journal, read_group, with_trials


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusInfo:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def fork() -> Iterator[Forker]:
    with Forker() as made:
        yield made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def make_plan(corpus: CorpusInfo) -> Callable[..., Plan]:
    return partial(search_plan, corpus)


def trials(store: Store, plan: Plan) -> list[Trial]:
    assert plan.study.search is not None
    storage = open_journal(journal_path(store, "s"))
    return [one for group in groups(plan) for one in read_group(storage, group.name, plan.study.search)]


def settings(store: Store, plan: Plan) -> list[float]:
    return [one.setting["learning_rate"] for one in trials(store, plan)]


# --- trials and cells --------------------------------------------------------------------------------------------


def test_a_search_trains_its_trials_and_tells_them(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(start=[{}])
    trained = drive(store, plan)
    assert len(trained) == 6
    told = trials(store, plan)
    assert [one.state for one in told] == ["COMPLETE"] * 6
    assert told[0].setting == {"learning_rate": 0.001}, "the recipe's own value comes first"
    default = [one.labels["trial"] for one in with_trials(store, plan).cells if one.labels["default"]]
    assert default == [0]
    assert [one.value for one in told] == pytest.approx([loss_of(one) for one in trained])
    labels = [entry["labels"] for entry in read_plan(store, "s")["cells"]]
    assert [(one["trial"], one["rung"]) for one in labels] == [(number, 1.0) for number in range(6)]
    assert with_trials(store, plan).cells == tuple(trained), "the plan follows from the journal"


def test_a_search_goes_on_where_a_trainer_of_ones_own_returns_no_positive_loss(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    """As of a density, whose nats may be below zero."""
    plan = make_plan(trials=2, seeds=[0, 1])
    drive(store, plan, loss=-0.5)
    assert [(one.state, one.value) for one in trials(store, plan)] == [("COMPLETE", -0.5)] * 2


def test_more_trials_in_the_file_go_on_from_those_that_are_there(store: Store, make_plan: Callable[..., Plan]) -> None:
    first = drive(store, make_plan(trials=4))
    again = drive(store, make_plan(trials=4))
    more = drive(store, make_plan(trials=7))
    assert (len(first), len(again), len(more)) == (4, 0, 3)
    assert settings(store, make_plan(trials=7)) == settings_of_undisturbed(make_plan(trials=7), store.root.parent)


def settings_of_undisturbed(plan: Plan, folder: Path) -> list[float]:
    other = open_store(folder / "undisturbed")
    drive(other, plan)
    return settings(other, plan)


def test_seeds_are_averaged_and_variations_searched_apart(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(seeds=[0, 1], trials=2)
    assert len(groups(plan)) == 1
    assert len(drive(store, plan)) == 4
    plan = make_plan(points=[{"size": 10_000, "tokens": 20_000}, {"size": 10_000, "tokens": 40_000}], trials=2)
    assert len(groups(plan)) == 2
    assert len(groups(make_plan(points=plan.study.model_dump()["grid"]["points"], per="study"))) == 1


def test_per_study_the_loss_is_the_mean_of_ln_loss(store: Store, make_plan: Callable[..., Plan]) -> None:
    points = [{"size": 10_000, "tokens": 20_000}, {"size": 10_000, "tokens": 40_000}]
    plan = make_plan(points=points, per="study", trials=1)
    losses = [loss_of(one) for one in drive(store, plan)]
    assert trials(store, plan)[0].value == pytest.approx(math.sqrt(losses[0] * losses[1]))


def test_two_trials_of_one_setting_share_a_cell_and_are_told_both(store: Store, make_plan: Callable[..., Plan]) -> None:
    space = {"schedule": {"categorical": ["cosine", "linear"]}}
    plan = make_plan(space=space, trials=6)
    assert len(drive(store, plan)) == 2
    assert [one.state for one in trials(store, plan)] == ["COMPLETE"] * 6


def test_a_divergence_counts_as_the_loss_at_start_and_a_failure_as_none(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(trials=3)
    search = Searching(store, plan)
    register(store, search.plan, b"")
    cells = search.grow(3)
    for one, state in zip(cells, ("diverged", "failed", "finished")):
        end(store, one, state)
    search.grow(0)
    found = trials(store, plan)
    assert [one.state for one in found] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert found[0].value == 4.0
    assert not search.goes_on()


def test_a_failed_trial_whose_cell_is_forgiven_is_taken_up_again(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(trials=1)
    search = Searching(store, plan)
    register(store, search.plan, b"")
    (one,) = search.grow(1)
    end(store, one, "failed")
    search.grow(0)
    assert not search.goes_on()
    forgive(store, one.cell.id, "me")
    assert drive(store, plan) == [one]
    assert [(t.state, t.counts) for t in trials(store, plan)] == [("FAIL", True), ("COMPLETE", False)]
    assert drive(store, plan) == []


@pytest.mark.parametrize("most", [2, 4])
def test_a_forgiven_trial_is_asked_again_once_and_at_once_though_start_settings_wait(
    most: int, store: Store, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(trials=most, start=[{"learning_rate": 0.001}, {"learning_rate": 0.002}])
    search = Searching(store, plan)
    register(store, search.plan, b"")
    (one,) = search.grow(1)
    end(store, one, "failed")
    search.grow(0)
    forgive(store, one.cell.id, "me")
    for _ in range(3):
        search.grow(0)
    again = trials(store, plan)
    assert [(t.state, t.counts) for t in again if t.state != "WAITING"] == [("FAIL", True), ("RUNNING", False)]
    assert again[-1].setting == again[0].setting
    assert drive(store, plan)[0] == one
    found = trials(store, plan)
    assert [t.state for t in found] == ["FAIL"] + ["COMPLETE"] * most
    assert sum(t.counts for t in found) == most, "as many as the study declares, and the repeated one"
    assert found[1].setting == {"learning_rate": 0.002}, "the start setting that waited"
    assert drive(store, plan) == []


def test_a_cell_in_quarantine_fails_its_trial_until_it_is_released(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(trials=1)
    search = Searching(store, plan)
    register(store, search.plan, b"")
    (one,) = search.grow(1)
    end(store, one)
    quarantine_cell(store, "s", one.cell.id, "bad node", "me")
    search.grow(0)
    assert [t.state for t in trials(store, plan)] == ["FAIL"]
    release_cell(store, "s", one.cell.id)
    assert drive(store, plan) == []
    assert [t.state for t in trials(store, plan)] == ["FAIL", "COMPLETE"]


def test_an_edited_recipe_begins_a_search_of_its_own(store: Store, make_plan: Callable[..., Plan]) -> None:
    drive(store, make_plan(trials=3))
    edited = make_plan(trials=3, training={"init_std": 0.05})
    assert with_trials(store, edited).cells == ()
    assert len(drive(store, edited)) == 3
    assert len(with_trials(store, make_plan(trials=3)).cells) == 3, "the old one is still there"


def test_an_edited_cooldown_begins_a_search_of_its_own_wherever_wsd_stands(make_plan: Callable[..., Plan]) -> None:
    def plan(schedules: list[str], cooldown: float) -> Plan:
        return make_plan({"cooldown_fraction": cooldown}, space={"schedule": {"categorical": schedules}}, trials=6)

    for schedules in (["cosine", "wsd"], ["cosine", "wsd", "linear"]):
        names = {groups(plan(schedules, cooldown))[0].name for cooldown in (0.2, 0.4)}
        assert len(names) == 2, f"{schedules}: trials of another cooldown are not those of this recipe"
    apart = {groups(plan(["cosine", "constant", "linear"], cooldown))[0].name for cooldown in (0.2, 0.4)}
    assert len(apart) == 1, "of no trial's concern"


def test_a_setting_that_makes_no_cell_fails_its_trial_alone(store: Store, make_plan: Callable[..., Plan]) -> None:
    space = {"cooldown_fraction": {"categorical": [0.2, 0.9, 0.3]}}
    broken = make_plan(
        space=space,
        training={"schedule": "wsd", "warmup_tokens": 20_000},
        trials=8,
        start=[{"cooldown_fraction": f} for f in (0.9, 0.2, 0.3)],
    )
    drive(store, broken)
    states = {(one.setting["cooldown_fraction"], one.state) for one in trials(store, broken)}
    assert states == {(0.2, "COMPLETE"), (0.3, "COMPLETE"), (0.9, "FAIL")}
    assert drive(store, broken) == []


def test_the_journal_is_optunas_own(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    drive(store, plan)
    backend = optuna.storages.journal.JournalFileBackend(str(journal_path(store, "s")))
    study = optuna.load_study(study_name=groups(plan)[0].name, storage=optuna.storages.JournalStorage(backend))
    assert study.best_value == min(one.value or 9 for one in trials(store, plan))
    assert "learning_rate" in study.trials_dataframe().filter(like="params").columns[0]


# --- samplers ----------------------------------------------------------------------------------------------------

SPACE = {
    "learning_rate": {"log": [1e-4, 1e-1]},
    "weight_decay": {"linear": [0.0, 0.3]},
    "batch_tokens": {"int": [64, 256], "step": 64},
    "schedule": {"categorical": ["cosine", "wsd"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "random"])
def test_samplers_take_mixed_spaces_and_ask_anew_what_they_asked(
    sampler: str, store: Store, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(space=SPACE, sampler=sampler, trials=12)
    drive(store, plan)
    other = open_store(store.root.parent / "other")
    for _ in range(12):  # killed and gone on with after each cell
        drive(other, plan, most=1)
    first, second = ([dict(one.setting) for one in trials(place, plan)] for place in (store, other))
    assert first == second
    assert len({json.dumps(one) for one in first}) >= 11
    assert {one["batch_tokens"] for one in first} <= {64, 128, 192, 256}


@pytest.mark.slow
def test_cmaes_asks_in_ranges(store: Store, make_plan: Callable[..., Plan]) -> None:
    space = {name: SPACE[name] for name in ("learning_rate", "weight_decay")}
    plan = make_plan(space=space, sampler="cmaes", trials=30)
    drive(store, plan)
    values = [one.value or 9 for one in trials(store, plan)]
    assert sum(values[-10:]) < sum(values[:10])
    other = open_store(store.root.parent / "other")
    for _ in range(30):
        drive(other, plan, most=1)
    assert [one.setting for one in trials(other, plan)] == [one.setting for one in trials(store, plan)]


def test_a_grid_asks_every_setting_once(store: Store, make_plan: Callable[..., Plan]) -> None:
    space = {name: SPACE[name] for name in ("batch_tokens", "schedule")}
    plan = make_plan(space=space, sampler="grid", trials=100)
    drive(store, plan, most=3)
    drive(store, plan)
    found = [tuple(one.setting.values()) for one in trials(store, plan)]
    assert sorted(found) == sorted((b, s) for b in (64, 128, 192, 256) for s in ("cosine", "wsd"))


def test_a_grid_that_begins_with_one_of_its_settings_asks_all_the_others(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    space = {"weight_decay": {"linear": [0, 0.4], "step": 0.1}}
    plan = make_plan(space=space, sampler="grid", trials=5, start=[{"weight_decay": 0.3}])
    drive(store, plan)
    found = [one.setting["weight_decay"] for one in trials(store, plan)]
    assert found[0] == 0.3
    assert sorted(found) == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_a_recipe_that_makes_no_cell_where_nothing_is_searched_stops_no_trial(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan({"batch_tokens": 1_000_000}, space={"batch_tokens": {"log": [64, 256]}}, trials=3)
    drive(store, plan)
    assert [one.fault for one in trials(store, plan)] == [None, None, None]


def test_qmc_fills_the_space_from_its_first_trials_on(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(sampler="qmc", trials=8)
    drive(store, plan, idle=8)
    places = sorted((math.log10(rate) + 4) / 3 for rate in settings(store, plan))
    assert [int(8 * one) for one in places] == list(range(8)), "a scrambled Sobol sequence has one point in each eighth"


def test_tpe_comes_nearer_to_the_optimum_than_chance(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(sampler="tpe", trials=40)
    drive(store, plan)
    late = [abs(math.log10(rate) + 2) for rate in settings(store, plan)[20:]]
    assert sorted(late)[len(late) // 2] < 0.5, "by chance half are nearer than .75 decades"


def test_trials_that_run_do_not_draw_the_next_ones_to_them(make_plan: Callable[..., Plan]) -> None:
    search = make_plan(sampler="tpe").study.search
    assert search is not None
    made = make_sampler(search, "g", 3)
    assert made._constant_liar
    assert made._multivariate


def test_gp_asks_apart_from_trials_that_run(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(sampler="gp", trials=14)
    drive(store, plan, most=STARTUP_TRIALS)
    Searching(store, plan).grow(4)  # all at once: none knows how another ends
    asked = sorted(math.log10(rate) for rate in settings(store, plan)[STARTUP_TRIALS:])
    assert min(b - a for a, b in itertools.pairwise(asked)) > 1e-3, "decades"


# --- budget ------------------------------------------------------------------------------------------------------


def test_a_budget_ends_the_asking_and_says_so(store: Store, make_plan: Callable[..., Plan]) -> None:
    one = make_plan().places[0].plan({"learning_rate": 0.01})
    plan = make_plan(trials=50, flops=3.5 * one.counts["C"])
    assert len(drive(store, plan, idle=2)) == 3
    search = Searching(store, plan)
    assert not search.goes_on()
    assert "would exceed the budget" in search.said[0]


def test_what_is_to_come_is_as_much_as_the_budget_leaves(store: Store, make_plan: Callable[..., Plan]) -> None:
    points = [{"size": 10_000, "tokens": 20_000}, {"size": 10_000, "tokens": 40_000}]
    costs = [one.plan({"learning_rate": 0.01}).counts["C"] for one in make_plan(points=points).places]
    plan = make_plan(points=points, flops=2.5 * sum(costs))  # the groups take turns: 3 short trials, 2 long ones
    told = planned_summary(store, plan, [])
    assert [one["to_come"] for one in told] == [3, 2]
    assert [one["C_to_come"] for one in told] == [3 * costs[0], 2 * costs[1]]
    assert "has room for 2 of the 6 to come" in next(summary_lines(told[1]))
    drive(store, plan, most=2)
    told = planned_summary(store, plan, plan_rows(store, with_trials(store, plan), plan.branches))
    assert [(one["asked"], one["to_come"]) for one in told] == [(1, 2), (1, 1)]
    assert told[0]["C_left"] == pytest.approx(1.5 * sum(costs))
    nothing = planned_summary(open_store(store.root.parent / "other"), make_plan(flops=1), [])
    assert [(one["to_come"], one["C_to_come"]) for one in nothing] == [(0, 0)]
    assert "has room for none of the 6 to come" in next(summary_lines(nothing[0]))


def test_the_best_setting_is_told_with_the_batch_that_was_trained(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(space={**RATE, "batch_tokens": {"log": [1_024, 1_300]}})
    trained = {one.labels["trial"]: one.cell.batch_tokens for one in drive(store, plan)}
    (told,) = search_summary(store, "s", ledger_rows(store, "s"))
    asked = told["best"]["setting"]["batch_tokens"]
    assert asked == trained[told["best"]["trial"]]
    assert f"batch_tokens {asked:,}" in next(summary_lines(told))


# --- rungs -------------------------------------------------------------------------------------------------------

WSD = {"schedule": "wsd", "final_fraction": 0.0}


def test_bad_trials_end_at_a_rung_and_good_ones_go_on(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(training=WSD, rungs=[0.25], trials=24)
    trained = drive(store, plan)
    found = trials(store, plan)
    assert all(0.25 in one.losses for one in found)
    states = {one.state for one in found}
    assert states == {"COMPLETE", "PRUNED"}
    full = [one for one in trained if one.labels["rung"] == 1.0]
    assert 6 <= len(full) <= 18
    seed, group = 0, groups(plan)[0].name
    assert all(one.length == 1.0 for one in found if is_control(seed, group, one.number))
    best = min(found, key=lambda one: one.losses[0.25])
    assert best.state == "COMPLETE"
    parents = with_trials(store, plan).branches
    for one in full:
        assert next(p for p in trained if p.cell.id == parents[one.cell.id].parent).labels["rung"] == 0.25


def test_the_plan_counts_what_a_promoted_trial_still_costs(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(training=WSD, rungs=[0.25], trials=6)
    drive(store, plan)
    rows = ledger_rows(store, "s")
    for row in rows:
        if row["labels"]["rung"] == 1.0:
            entry = next(one for one in read_plan(store, "s")["cells"] if one["id"] == row["id"])
            assert entry["trunk"]["tokens"] == pytest.approx(0.8 * 0.25 * row["D"], abs=64)


def test_a_rung_that_tells_nothing_is_given_up(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(training=WSD, rungs=[0.2625], trials=70)
    search = Searching(store, plan)
    register(store, search.plan, b"")
    waiting: list[PlannedCell] = []
    while waiting or search.goes_on():
        waiting += search.grow(0 if waiting else 1)
        while waiting:
            one = waiting.pop()
            misleading = 5 - loss_of(one) / 2 if one.labels["rung"] < 1 else None
            end(store, one, loss=misleading)
    found = trials(store, plan)
    assert any("not told from 0: trials run at full length" in one for one in search.said)
    assert found[-1].losses == {}
    assert found[-1].length == 1.0
    (told,) = search_summary(store, "s", ledger_rows(store, "s"))
    assert told["rungs"][0]["refuted"], "also to whoever opens the journal anew"
    assert told["rungs"][0]["pairs"] >= ENOUGH_PAIRS
    assert "rank correlation with full length -" in "\n".join(summary_lines(told))


def test_the_interval_of_a_rank_correlation_is_that_of_bonett_and_wright() -> None:
    pairs = [(float(x), float(y)) for x, y in zip(range(10), (1, 0, 2, 4, 3, 5, 7, 6, 9, 8))]
    found = correlation(0.25, pairs)
    assert found.rho == pytest.approx(1 - 6 * 8 / (10 * 99))
    assert found.interval == pytest.approx((0.7419, 0.9917), abs=2e-4), "tanh(1.8466 -+ 1.96 x .4555)"
    assert not found.is_refuted
    assert correlation(0.25, pairs[:3]).rho is None
    assert correlation(0.25, [(1.0, 2.0)] * 9).is_refuted


def test_promising_is_the_best_third_and_the_first_to_come() -> None:
    assert is_promising(3.0, [])
    assert not is_promising(3.0, [2.0])
    assert is_promising(2.5, [2.0, 3.0, 3.1, 3.2, 3.3])
    assert not is_promising(2.5, [2.0, 2.1, 3.1, 3.2, 3.3])


# --- crashes -----------------------------------------------------------------------------------------------------


def prefixes(content: bytes) -> Iterator[bytes]:
    """The journal as a kill may leave it: after a line, or within one."""
    lines = content.splitlines(keepends=True)
    for count in range(len(lines)):
        torn = lines[count][: len(lines[count]) // 2] if count % 2 else b""
        yield b"".join(lines[:count]) + torn


@pytest.mark.slow
@pytest.mark.parametrize("rungs", [[], [0.25], [0.0625]])  # at .0625 of 2,000 steps is one more than at .062
def test_from_every_prefix_of_the_journal_the_search_ends_whole(
    tmp_path: Path, make_plan: Callable[..., Plan], rungs: list[float]
) -> None:
    point = {"size": 10_000, "tokens": 128_000}
    plan = make_plan(training=WSD, points=[point], trials=3, rungs=rungs, start=[{}])
    first = open_store(tmp_path / "first")
    trained = {one.cell.id for one in drive(first, plan)}
    content = journal_path(first, "s").read_bytes()
    for order, prefix in enumerate(prefixes(content)):
        store = open_store(tmp_path / str(order))
        journal_path(store, "s").parent.mkdir(parents=True)
        journal_path(store, "s").write_bytes(prefix)
        before = with_trials(store, plan).cells
        for one in before[: order % 3]:  # of what was asked, some had ended
            end(store, one)
        again = drive(store, plan)
        assert len({one.cell.id for one in again}) == len(again), "none is run twice"
        assert drive(store, plan) == [], "whoever comes again finds nothing to do"
        whole = [one for one in trials(store, plan) if one.counts]
        assert len(whole) == 3
        assert "RUNNING" not in {one.state for one in whole}
        raw = optuna.load_study(study_name=groups(plan)[0].name, storage=open_journal(journal_path(store, "s")))
        assert {one.state.name for one in raw.trials} <= {"COMPLETE", "PRUNED", "FAIL"}
        if not any(one.state.name == "FAIL" for one in raw.trials) and not rungs:
            assert {one.cell.id for one in with_trials(store, plan).cells} == trained


@pytest.mark.slow
@pytest.mark.parametrize("point", [name for name in POINTS if name.startswith("search.")] + ["plan.before_write"])
def test_killed_at_any_point_the_search_ends_whole(fork: Forker, tmp_path: Path, store: Store, point: str) -> None:
    declared = {
        "name": "s",
        "corpus": CORPUS,
        "context": 32,
        "families": ["llama"],
        "grid": {"type": "points", "points": [{"size": 10_000, "tokens": 40_000}]},
        "training": {"batch_tokens": 64, "warmup_tokens": 2_000, **WSD},
        "search": {"space": RATE, "sampler": "random", "trials": 5, "rungs": [0.25]},
    }
    (tmp_path / "s.yaml").write_text(json.dumps(declared))
    known = prepare(make_source("markov", None, CORPUS["options"]), "bytes", store.root)
    folder = store.root / "corpora" / known.fingerprint
    arguments = {"study": str(tmp_path / "s.yaml"), "corpus": str(folder)}
    plan = plan_study(load_study(tmp_path / "s.yaml"), known)
    undisturbed = fork("search", root=str(tmp_path / "undisturbed"), **arguments).answer
    for passing in (1, 3):
        root = str(tmp_path / f"killed-{passing}")
        assert fork("search", f"{point}:crash@{passing}", root=root, **arguments).signal == signal.SIGKILL
        fork("search", root=root, **arguments)
        there = open_store(root)
        cells = [entry["id"] for entry in read_plan(there, "s")["cells"]]
        assert sorted(cells) == sorted(undisturbed)
        assert {len(attempt_epochs(there, cell)) for cell in cells} == {1}
        assert {one.state for one in trials(there, plan)} <= {"COMPLETE", "PRUNED"}
        assert len(trials(there, plan)) == 5


def test_a_plan_on_record_that_lags_behind_the_journal_is_caught_up(
    store: Store, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(trials=4)
    register(store, plan, b"")
    searcher = Searcher(store, plan)
    searcher.ask(2)  # killed here: two trials are asked, the plan on record has none
    assert read_plan(store, "s")["cells"] == []
    assert len(drive(store, plan)) == 4
    assert len(trials(store, plan)) == 4


def test_a_damaged_journal_is_a_sentence(store: Store, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    drive(store, plan, most=2)
    path = journal_path(store, "s")
    path.write_bytes(b"{not json}\n" + path.read_bytes())
    with pytest.raises(InputError, match="is damaged"):
        with_trials(store, plan)
