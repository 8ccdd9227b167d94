"""Importance: exact where the grid is full, by a named evaluator with its spread where it is not, refused where nothing
supports it."""

import itertools
import json
import re
from io import BytesIO

import numpy as np
import pandas as pd
import pytest

from analysis.importance import Importance, importance, importances
from analysis.importance_plots import importance_bars
from sweeps.errors import InputError
from tests.analysis.synthetic import published


def codes(result: Importance, severity: str | None = None) -> set[str]:
    return {str(v.code) for v in result.verdicts if severity in (None, v.severity)}


def factorial(noise: float = 0.0, seeds: int = 1, seed: int = 0) -> pd.DataFrame:
    """Rate x decay x warm-up with known effects, in nats."""
    generator, rows = np.random.default_rng(seed), []
    for a, b, c in itertools.product(range(4), range(3), range(2)):
        loss = 3.0 + 0.05 * (a - 1.2) ** 2 + 0.03 * b + 0.02 * (a - 1.5) * (b - 1) + 0.001 * c
        rows += [
            {"learning_rate": 1e-3 * 2**a, "weight_decay": 0.1 * b, "warmup_tokens": 100 * (c + 1), "seed": s}
            | {"family": "llama", "N": 1e5, "D": 1e6, "val_loss_final": loss + noise * generator.standard_normal()}
            for s in range(seeds)
        ]
    return pd.DataFrame(rows)


def search(trials: int = 60, seed: int = 0) -> pd.DataFrame:
    """Random trials: the loss is a wide bowl in ln rate over four decades, hangs a little on decay, not on warm-up."""
    generator = np.random.default_rng(seed)
    rate, decay = 10 ** generator.uniform(-5, -1, trials), generator.uniform(0.0, 0.3, trials)
    warmup = generator.integers(100, 10_000, trials)
    loss = 3.0 + 0.2 * np.log10(rate / 1e-3) ** 2 + 0.4 * decay
    table = {"learning_rate": rate, "weight_decay": decay, "warmup_tokens": warmup, "val_loss_final": loss}
    return pd.DataFrame(table | {"family": "llama", "N": 1e5, "D": 1e6})


def gadre() -> pd.DataFrame:
    """Gadre et al. 2024: 435 runs at learning rate .003 and 20 tokens per parameter; warm-up in steps, batch in
    sequences, validation loss."""
    form = re.compile(r"d=(\d+)_l=(\d+)_h=(\d+)-(\d+)-([\d.]+)-([\d.]+)-(\d+)-(\d+)-(\d+)-(.+)")
    names = ("width", "depth", "heads", "batch", "learning_rate", "decay", "again", "tokens", "warmup", "cooldown")
    grid = json.loads(published("gadre-overtraining/grid.json").read_text())
    matches = [(form.fullmatch(key), loss) for key, loss in grid.items()]
    return pd.DataFrame([dict(zip(names, map(float, m.groups()))) | {"val_loss_final": v} for m, v in matches if m])


# --- full grids --------------------------------------------------------------------------------------------------


def test_a_full_grid_is_decomposed_exactly() -> None:
    table = pd.DataFrame(
        [{"rows": r, "columns": c, "val_loss_final": [[0.0, 1.0], [2.0, 5.0]][r][c]} for r in (0, 1) for c in (0, 1)]
    )
    result = importance(table, ["rows", "columns"])
    (only,) = result.evaluations
    assert result.variance == 3.5
    assert only.evaluator == "exact fANOVA"
    assert only.shares["rows"].value == pytest.approx(9 / 14)
    assert only.shares["columns"].value == pytest.approx(2 / 7)
    assert only.interactions["rows x columns"].value == pytest.approx(1 / 14)
    assert codes(result) == {"noise_unknown"}


def test_effects_interactions_and_rest_make_the_whole() -> None:
    table = factorial()
    table["val_loss_final"] += 0.01 * (np.arange(len(table)) % 7)  # some of everything
    (only,) = importance(table.sample(frac=1.0, random_state=0)).evaluations
    effects = [*only.shares.values(), *only.interactions.values(), only.rest]
    assert sum(one.value for one in effects) == pytest.approx(1.0)
    means = table.groupby("learning_rate")["val_loss_final"].mean()
    assert only.shares["learning_rate"].value == pytest.approx(means.var(ddof=0) / table["val_loss_final"].var(ddof=0))
    assert set(only.interactions) == {
        "learning_rate x weight_decay",
        "learning_rate x warmup_tokens",
        "weight_decay x warmup_tokens",
    }


def test_intervals_from_seeds_cover_the_share_without_noise() -> None:
    truth = importance(factorial()).evaluations[0]
    hits, noise_shares = [], []
    for seed in range(60):
        result = importance(factorial(noise=0.03, seeds=2, seed=seed))
        noise_shares.append(result.noise_share)
        for name in ("learning_rate", "weight_decay"):
            low, high = result.evaluations[0].shares[name].interval
            hits.append(low <= truth.shares[name].value <= high)
    assert np.mean(hits) > 0.87
    whole = importance(factorial()).variance + 0.03**2 / 2
    assert np.mean(noise_shares) == pytest.approx(0.03**2 / 2 / whole, rel=0.2)


def test_replicates_are_averaged_and_seeds_that_explain_most_are_said_to() -> None:
    table = factorial(noise=0.3, seeds=3)
    result = importance(table)
    assert (result.n_runs, result.settings) == (72, 24)
    assert "not_told_apart" in codes(result, "caution")


def test_without_seeds_the_spread_is_read_off_high_interactions_and_says_so() -> None:
    result = importance(factorial(noise=0.01))
    assert "noise_from_residuals" in codes(result, "caution")
    assert np.isfinite(result.evaluations[0].shares["learning_rate"].interval).all()


def test_words_are_parameters_too() -> None:
    table = factorial().assign(schedule=lambda t: np.where(t["warmup_tokens"] > 100, "wsd", "cosine"))
    one = importance(table, ["learning_rate", "weight_decay", "schedule"]).evaluations[0]
    other = importance(table, ["learning_rate", "weight_decay", "warmup_tokens"]).evaluations[0]
    assert one.shares["schedule"].value == pytest.approx(other.shares["warmup_tokens"].value)


def test_betas_a_percent_apart_are_levels_of_their_own() -> None:
    """.99 and .999 average over 100 steps and over 1000; .999 in single precision is still .999."""
    tables = []
    for beta2, more in ((0.99, 0.0), (float(np.float32(0.999)), 0.05), (0.999, 0.05)):
        table = factorial(seeds=2)
        tables.append(table.assign(beta2=beta2, val_loss_final=table["val_loss_final"] + more))
    result = importance(pd.concat(tables, ignore_index=True))
    assert "constant_parameter" not in codes(result)
    assert (result.settings, len(result.evaluations)) == (48, 1)
    assert result.evaluations[0].shares["beta2"].value > 0.05


def test_a_blank_among_the_numbers_of_a_search_is_no_level_of_its_own() -> None:
    trials = search(14)
    trials.loc[3, "learning_rate"] = np.nan
    one, rest = importance(trials), importance(trials.drop(index=3))
    assert one.table().equals(rest.table())
    assert one.n_runs == 13
    assert any("1: learning_rate is missing" in v.message for v in one.verdicts)


def test_of_a_column_that_most_trials_leave_empty_the_column_goes_and_not_the_trials() -> None:
    trials = search(28)
    cooled = trials.assign(cooldown_fraction=np.where(np.arange(28) < 10, np.linspace(0.05, 0.3, 28), np.nan))
    one, rest = importance(cooled), importance(trials)
    assert one.table().equals(rest.table())
    assert "cooldown_fraction is told by 10 of 28 runs only and not looked at." in " ".join(
        v.message for v in one.verdicts
    )
    assert importance(cooled, ["learning_rate", "cooldown_fraction"]).n_runs == 10


def test_what_only_follows_another_hyperparameter_is_not_counted_twice() -> None:
    table = factorial().assign(beta2=lambda t: np.where(t["learning_rate"] > 2e-3, 0.95, 0.99))
    result = importance(table)
    assert result.parameters == ("learning_rate", "weight_decay", "warmup_tokens")
    (note,) = [v for v in result.verdicts if v.code == "tied_parameters"]
    assert "beta2 follows learning_rate" in note.message


# --- divergence --------------------------------------------------------------------------------------------------


def test_diverged_runs_count_as_the_loss_at_the_start() -> None:
    table = factorial(seeds=2).assign(state="finished", excluded=None, loss_at_start=5.5)
    hot = table["learning_rate"] > 7e-3
    table.loc[hot, ["state", "excluded", "val_loss_final"]] = ["diverged", "diverged: too hot", np.nan]
    result = importance(table)
    assert (result.diverged, result.cap, result.cap_source) == (int(hot.sum()), 5.5, "the loss at the start")
    assert result.evaluations[0].shares["learning_rate"].value > 0.95
    assert "diverged_capped" in codes(result, "caution")
    plain = importance(table.drop(columns="loss_at_start"))
    assert plain.cap == pytest.approx(table["val_loss_final"].max())
    assert plain.cap_source == "the highest loss of the others"
    assert importance(table, cap=9.0).cap == 9.0


def test_in_a_table_without_states_what_blew_up_beyond_the_best_rate_diverged() -> None:
    table = factorial().rename(columns={"val_loss_final": "loss"})
    hot = table["learning_rate"] > 7e-3
    table.loc[hot, "loss"] = 11.0
    table.loc[hot & (table["weight_decay"] > 0.1), "loss"] = np.inf
    result = importance(table)
    assert result.diverged == int(hot.sum())
    assert result.cap < 4.0, "the height to which runs blew up explains nothing"


def test_early_rungs_of_a_search_do_not_count() -> None:
    table = factorial().assign(rung=1.0)
    early = table.assign(rung=0.25, val_loss_final=9.0)
    assert importance(pd.concat([table, early])).n_runs == len(table)


def test_runs_left_out_for_another_reason_do_not_count() -> None:
    table = factorial(seeds=2).assign(state="finished", excluded=None)
    table.loc[0, ["state", "excluded", "val_loss_final"]] = ["quarantined", "quarantined: wrong data", 50.0]
    result = importance(table)
    assert (result.n_runs, result.diverged) == (47, 0)
    assert result.cap < 4.0


# --- searches ----------------------------------------------------------------------------------------------------


def test_runs_that_their_state_says_are_not_finished_do_not_count_and_are_named() -> None:
    table = factorial(seeds=2)
    extra = table.iloc[:3].assign(loss=50.0, State=["Running", "crashed", "killed"])
    found = importance(pd.concat([table.assign(State="Finished"), extra]))
    assert found.table().equals(importance(table).table())
    (said,) = [v for v in found.verdicts if v.code == "excluded_runs"]
    assert all(word in said.message for word in ("running", "crashed", "killed"))


def test_a_run_without_a_loss_has_not_diverged_and_is_named() -> None:
    table = factorial(seeds=2).rename(columns={"val_loss_final": "loss"})
    table.loc[[0, 7], "loss"] = [np.nan, np.inf]
    found = importance(table)
    assert (found.n_runs, found.diverged) == (47, 1)
    (said,) = [v for v in found.verdicts if v.code == "excluded_runs"]
    assert "1 run left out" in said.message
    assert "the loss is missing" in said.message


def test_a_search_is_judged_by_two_named_evaluators_with_spread() -> None:
    result = importance(search())
    fanova, ped = result.evaluations
    assert fanova.evaluator.startswith("fANOVA (Optuna 5.")
    assert ped.evaluator.startswith("PED-ANOVA (Optuna 5.")
    assert fanova.region == "the whole space"
    assert ped.region == "the best 10% of the settings against all"
    for one in (fanova, ped):
        ranked = sorted(one.shares, key=lambda name: -one.shares[name].value)
        assert ranked[0] == "learning_rate"
        for share in one.shares.values():
            assert 0.0 <= share.interval[0] < share.interval[1] <= 1.0
    assert fanova.shares["learning_rate"].value > 0.8, "by decades, not on the straight scale"
    assert fanova.shares["warmup_tokens"].value < 0.05
    assert sum(one.value for one in (*fanova.shares.values(), fanova.rest)) == pytest.approx(1.0)
    assert sum(one.value for one in ped.shares.values()) == pytest.approx(1.0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("diverged", "evaluators"), [(6, 2), (8, 1)])
def test_where_most_of_a_search_diverged_no_better_part_is_made_up(diverged: int, evaluators: int) -> None:
    """Of settings that are all equally bad PED-ANOVA would warn on stderr and call every parameter worthless."""
    table = search(12, seed=1)
    lost = table["val_loss_final"].rank() > 12 - diverged
    result = importance(table.assign(state=np.where(lost, "diverged", "finished"), loss_at_start=6.0))
    assert len(result.evaluations) == evaluators
    told = [v.message for v in result.verdicts if v.code == "flat_losses"]
    assert [message[:29] for message in told] == ["8 of 12 settings share the hi"] * (2 - evaluators)
    for one in result.evaluations:
        assert sum(share.value for share in one.shares.values()) > 0.5


def test_the_same_trials_and_seed_give_the_same_numbers() -> None:
    table = search(40)
    pd.testing.assert_frame_equal(importance(table).table(), importance(table).table())


def test_a_parameter_that_follows_others_is_said_not_to_be_told_apart() -> None:
    generator = np.random.default_rng(0)
    table = pd.DataFrame({"width": np.repeat([8, 16, 32, 64], 8), "rate": np.tile([1e-3, 2e-3, 4e-3, 8e-3], 8)})
    table = table.drop(index=[0, 5]).assign(batch=lambda t: 2.0 * t["width"])
    result = importance(table.assign(val_loss_final=generator.normal(3.0, 0.1, len(table))), ["width", "rate", "batch"])
    tied = {v.target for v in result.verdicts if v.code == "tied_parameters"}
    assert tied == {"width", "batch"}


# --- refusals ----------------------------------------------------------------------------------------------------


def test_too_few_trials_are_refused() -> None:
    result = importance(search(11))
    assert codes(result, "refuse") == {"too_few_runs"}
    assert result.evaluations == ()
    assert result.table().empty
    assert importance(search(12)).evaluations


def test_a_parameter_with_one_value_is_refused_and_the_others_stand() -> None:
    result = importance(factorial(), ["learning_rate", "weight_decay", "N"])
    (said,) = [v for v in result.verdicts if v.severity == "refuse"]
    assert (said.code, said.scope, said.target) == ("constant_parameter", "parameter", "N")
    assert np.isnan(result.evaluations[0].shares["N"].value)
    assert result.evaluations[0].shares["learning_rate"].value > 0.5


def test_runs_that_all_diverged_or_are_all_equal_are_refused() -> None:
    table = factorial().assign(state="diverged", excluded="diverged", val_loss_final=np.nan, loss_at_start=5.5)
    assert codes(importance(table), "refuse") == {"all_diverged"}
    assert codes(importance(factorial().assign(val_loss_final=3.0)), "refuse") == {"flat_losses"}
    assert json.dumps(importance(table).to_json(), allow_nan=False)
    unknown = importance(table.drop(columns="loss_at_start"))
    assert codes(unknown) == {"all_diverged"}, "no loss that they count as"


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"learning_rat.*did you mean"):
        importance(factorial(), ["learning_rat"])


def test_every_size_and_length_is_looked_at_by_itself() -> None:
    table = pd.concat([factorial().assign(N=N, val_loss_final=lambda t, k=k: t["val_loss_final"] - k) for k, N in
                       enumerate((1e4, 1e5))])  # fmt: skip
    lone = factorial().iloc[::6].assign(N=1e6)  # varies one thing, which explains all there is
    planned = factorial().assign(N=1e7, state="planned", excluded="not finished (planned)", val_loss_final=np.nan)
    done = pd.concat([table, lone]).assign(state="finished", excluded=None)
    found = importances(pd.concat([done, planned]))
    assert [one.group["N"] for one in found] == [1e4, 1e5]
    assert found[0].evaluations[0].shares["learning_rate"].value == pytest.approx(
        found[1].evaluations[0].shares["learning_rate"].value
    )


def test_what_makes_the_size_is_asked_over_all_sizes_and_training_at_each() -> None:
    rows = [
        {
            "width": w,
            "depth": d,
            "warmup": u,
            "N": 12.0 * d * w**2,
            "D": 240.0 * d * w**2,
            "loss": 4 - w / 500 + d * u / 1e3,
        }
        for w, d, u in itertools.product((64, 96, 128), (2, 4, 8), (10, 20))
    ]
    table = pd.DataFrame(rows)
    (one,) = importances(table, ["width", "depth", "warmup"])
    shares = one.evaluations[0].shares
    assert shares["width"].value > 0.5 > shares["depth"].value > shares["warmup"].value > 0
    assert "N and D differ between these runs, by width and depth" in one.verdicts[-1].message
    longer = importances(pd.concat([table, table.assign(D=2 * table["D"])]), ["width", "depth", "warmup"])
    assert {tuple(each.group) for each in longer} == {("D",)}, "lengths are not compared where sizes share them"
    ruled = table.assign(learning_rate=1 / table["width"])
    assert len(importances(ruled, ["learning_rate", "warmup"])) == table["N"].nunique(), "a rate by rule stays tied"


# --- published runs ----------------------------------------------------------------------------------------------


def test_gadre_warm_up_matters_by_what_it_does_to_wide_models() -> None:
    runs = gadre()
    assert len(runs) == 435
    assert runs["learning_rate"].unique() == [0.003]
    # 1. Shape and warm-up at 64 sequences: 95 shapes, each with 100, 200 and 400 steps.
    shapes = runs.assign(shape=runs[["width", "depth", "heads"]].astype(int).astype(str).agg("x".join, axis=1))
    grid = shapes[(shapes["batch"] == 64) & (shapes["warmup"] <= 400)]
    grid = grid[grid.groupby("shape")["warmup"].transform("nunique") == 3]
    one = importance(grid, ["shape", "warmup"]).evaluations[0]
    assert grid["shape"].nunique() == 95
    assert one.shares["shape"].value == pytest.approx(0.756, abs=0.001)
    assert one.shares["warmup"].value == pytest.approx(0.0147, abs=0.0002)
    assert one.interactions["shape x warmup"].value == pytest.approx(0.229, abs=0.001)
    # 2. Where it comes from: of the largest full grid, the interaction with width outweighs the warm-up itself.
    part = runs[runs["width"].isin([320, 512, 576, 768, 1024]) & runs["heads"].isin([4, 8]) & (runs["warmup"] <= 400)]
    four = importance(part, ["width", "depth", "heads", "warmup"])
    shares, pairs = four.evaluations[0].shares, four.evaluations[0].interactions
    assert four.settings == 150
    assert shares["width"].interval[0] > shares["warmup"].interval[1]
    assert pairs["width x warmup"].value > 2 * shares["warmup"].value
    assert shares["heads"].interval[0] == 0.0, "not told from none"
    sized = part.assign(N=12 * part["depth"] * part["width"] ** 2 + 100_864 * part["width"], D=part["tokens"])
    (same,) = importances(sized, ["width", "depth", "heads", "warmup"])
    assert same.evaluations[0].shares == shares
    warm = {
        width: importance(rows, ["warmup", "depth", "heads"]).evaluations[0].shares["warmup"].value
        for width, rows in part.groupby("width")
    }
    assert warm[1024] > 5 * warm[320]


def test_gadre_batch_cannot_be_told_from_shape() -> None:
    runs = gadre()
    runs = runs[runs["warmup"] == 100]
    result = importance(runs, ["width", "depth", "heads", "batch"])
    assert result.refused is False
    said = {v.target: v.message for v in result.verdicts if v.code == "tied_parameters"}
    assert "follows width and depth" in said["batch"]
    fanova = result.evaluations[0].shares
    assert max(fanova, key=lambda name: fanova[name].value) == "width"


# --- pictures ----------------------------------------------------------------------------------------------------


def test_bars_name_the_evaluator_and_show_the_spread() -> None:
    picture = importance_bars(importance(search(24)))
    titles = [axes.get_title(loc="left") for axes in picture.axes]
    assert "fANOVA" in titles[0]
    assert "PED-ANOVA" in titles[1]
    assert "the whole space" in titles[0]
    assert all(len(axes.lines) >= 3 for axes in picture.axes), "a line of spread at each bar"
    refused = importance_bars(importance(search(5)))
    assert "too few" in refused.axes[0].texts[0].get_text()


def test_a_dollar_in_the_name_of_a_parameter_is_no_formula() -> None:
    names = [r"cost_$5_\bad$", "weight_decay"]
    for trials in (24, 5):
        importance_bars(importance(search(trials).rename(columns={"learning_rate": names[0]}), names)).savefig(
            BytesIO()
        )
