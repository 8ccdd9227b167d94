"""Runs of one trunk are dependent: what is drawn with replacement is the trunk, and intervals that know hold."""

import numpy as np
import pandas as pd
import pytest

from analysis import fit
from analysis.approaches import compare_approaches
from analysis.backtest import backtest
from analysis.compare import compare_recipes
from analysis.envelope import fit_curve_envelope
from analysis.joint import join
from analysis.laws import CHINCHILLA
from analysis.uncertainty import seed_noise
from tests.analysis.synthetic import LAW, codes, surface

SIZES, LENGTHS = np.geomspace(1e4, 1e6, 9), np.geomspace(1e6, 3.2e7, 5)


def table(seed: int, *, common: float = 0.004, own: float = 0.002, seeds: int = 1, trunks: bool = True) -> pd.DataFrame:
    """Sizes x lengths x seeds on the surface of LAW: what chance did to a size and seed, and to each run by itself."""
    generator = np.random.default_rng(seed)
    N, D, s = (part.ravel() for part in np.meshgrid(SIZES, LENGTHS, np.arange(seeds), indexing="ij"))
    rows = surface(N, D).assign(seed=s.astype(int))
    rows["trunk"] = [f"{n:.0f}/{k:.0f}" for n, k in zip(N, s)]
    rows["cell"] = [f"{n:.0f}/{k:.0f}/{d:.0f}" for n, k, d in zip(N, s, D)]
    effect = pd.Series(common * generator.standard_normal(len(SIZES) * seeds), rows["trunk"].unique())
    rows["loss"] *= np.exp(effect[rows["trunk"]].to_numpy() + own * generator.standard_normal(len(rows)))
    return rows if trunks else rows.drop(columns="trunk")


def share_that_hold(trials: int, name: str, *, trunks: bool) -> tuple[float, float]:
    """How many of the 95% intervals of a parameter hold its value, and their mean width in ln."""
    hold, width = 0, 0.0
    for seed in range(trials):
        found = fit(table(seed, trunks=trunks), "chinchilla", resamples=60, seed=seed, resample="rows")
        low, high = found.intervals[name]
        hold += low <= LAW[name] <= high
        width += float(np.log(high / low)) / trials
    return hold / trials, width


@pytest.mark.slow
def test_intervals_that_know_of_trunks_are_wider_and_hold() -> None:
    known, wide = share_that_hold(30, "alpha", trunks=True)
    unknown, narrow = share_that_hold(30, "alpha", trunks=False)
    assert wide > 2 * narrow
    assert known >= 0.87, "of 30 trials"
    assert unknown < 0.75, "runs of one trunk taken for independent miss a slope over sizes"


def test_trunks_are_drawn_whole_by_default_and_the_fit_says_so() -> None:
    found = fit(table(0), "chinchilla", resamples=20)
    settings = found.provenance["settings"]
    assert (settings["resample"], settings["cluster"]) == ("rows", "trunk")
    assert "dependent_runs" not in codes(found)
    apart = fit(table(0, trunks=False), "chinchilla", resamples=20)
    assert apart.provenance["settings"]["cluster"] is None
    alone = table(0).assign(trunk=lambda rows: rows["cell"])
    same = fit(alone, "chinchilla", resamples=20)
    assert same.provenance["settings"]["cluster"] is None
    assert same.intervals == apart.intervals, "trunks of one cell each change nothing"


def test_a_run_that_does_not_tell_its_trunk_is_a_unit_of_its_own() -> None:
    rows = table(0)
    rows.loc[rows["N"] > 5e5, "trunk"] = None
    few = fit(rows, "chinchilla", resamples=20, resample="rows")
    assert few.provenance["settings"]["cluster"] == "trunk"
    assert all(np.isfinite(few.intervals["alpha"])), "13 units bear a bootstrap; two groups and one of nobody would not"


@pytest.mark.parametrize("groups", [["a", "a", "b", "b"], [1.0, 1.0, 2.0, 2.0]])
def test_a_run_without_a_value_in_the_clusters_column_is_a_unit_of_its_own(groups) -> None:
    rows = table(0, trunks=False).assign(configuration=[*groups, *[None] * 41])
    few = fit(rows, "chinchilla", resamples=20, cluster="configuration")
    assert all(np.isfinite(few.intervals["alpha"])), "43 units bear a bootstrap; two groups and one of nobody would not"
    assert "too_few_units" not in codes(few)


def test_points_along_curves_are_cautioned_against_and_the_remedy_is_named() -> None:
    rows = table(0, trunks=False).rename(columns={"cell": "Run ID"}).assign(**{"Run ID": lambda r: r["N"].map(str)})
    found = fit(rows, "chinchilla", resamples=20)
    (told,) = [verdict for verdict in found.verdicts if verdict.code == "dependent_runs"]
    assert told.severity == "caution"
    assert "45 rows stand at 9 values of Run ID" in told.message
    assert "--cluster 'Run ID'" in told.message
    assert "dependent_runs" not in codes(fit(rows, "chinchilla", resamples=20, cluster="Run ID"))
    apart = rows.assign(**{"Run ID": range(45)})
    assert "dependent_runs" not in codes(fit(apart, "chinchilla", resamples=20)), "each is a run of its own"
    N, D = (part.ravel() for part in np.meshgrid(SIZES, np.linspace(1e6, 3e7, 12), indexing="ij"))
    unnamed = surface(N, D, noise=0.002)
    (told,) = [v for v in fit(unnamed, "chinchilla", resamples=20).verdicts if v.code == "dependent_runs"]
    assert "--cluster 'N'" in told.message


def test_a_backtest_and_a_comparison_say_it_of_points_along_curves_too() -> None:
    rows = table(0, trunks=False).drop(columns="cell").assign(run=lambda r: r["N"].map(str))
    (told,) = [v for v in backtest(rows, ["chinchilla_tied"]).verdicts if v.code == "dependent_runs"]
    assert "45 rows stand at 9 values of run with" in told.message
    assert "Test the ends of runs alone" in told.message
    (told,) = [v for v in backtest(table(0), ["chinchilla_tied"]).verdicts if v.code == "dependent_runs"]
    assert " with runs that it knows" in told.message
    apart = table(0).assign(trunk=lambda rows: rows["cell"])
    assert "dependent_runs" not in {v.code for v in backtest(apart, ["chinchilla_tied"]).verdicts}
    found = compare_recipes(rows.assign(run=range(45)), rows, resamples=100)
    (told,) = [v for v in found.verdicts if v.code == "dependent_runs"]
    assert told.message.startswith("candidate: 45 rows")
    assert "Compare the ends of runs alone" in told.message
    assert not found.refused


@pytest.mark.parametrize("resample", ["noise", "delta"])
def test_intervals_from_noise_say_that_branches_are_dependent(resample: str) -> None:
    found = fit(table(0), "chinchilla", resamples=20, resample=resample)  # type: ignore[arg-type]
    (told,) = [verdict for verdict in found.verdicts if verdict.code == "dependent_runs"]
    assert told.severity == "caution"
    assert told.evidence == {"runs": 45, "trunks": 9, "shared": 9}
    assert "45 of 45 runs share 9 trunks" in told.message
    assert "dependent_runs" not in codes(fit(table(0, trunks=False), "chinchilla", resamples=20, resample=resample))  # type: ignore[arg-type]


def test_too_few_trunks_fall_back_on_noise_and_say_so() -> None:
    rows = table(0)
    found = fit(rows[rows["N"].isin(SIZES[::2])], "chinchilla", resamples=20)
    assert found.provenance["settings"]["resample"] == "noise"
    assert "dependent_runs" in codes(found, "caution")


def isoflop(seeds: int = 1) -> pd.DataFrame:
    """Four budgets that share sizes, as a study's lattice has them."""
    rows = []
    for order in range(4):
        C = 1.2e11 * 4**order
        N = np.repeat(14_000 * 2.0**order * 2 ** np.arange(-1.5, 2.0, 0.5), seeds)
        s = np.tile(np.arange(seeds), 7)
        rows.append(surface(N, C / 6 / N, noise=0.001, seed=order).assign(budget=C, seed=s, N=N))
    whole = pd.concat(rows, ignore_index=True)
    name = [f"{n:.0f}/{s}" for n, s in zip(whole["N"], whole["seed"])]
    return whole.assign(trunk=name, cell=[f"{one}/{i}" for i, one in enumerate(name)])


def test_minima_of_budgets_that_share_trunks_are_cautioned() -> None:
    assert "dependent_runs" in codes(fit(isoflop(), "isoflop", resamples=50), "caution")
    assert "dependent_runs" not in codes(fit(isoflop().drop(columns="trunk"), "isoflop", resamples=50))
    assert compare_approaches(isoflop(), resamples=50).isoflop is not None


def test_curves_of_one_trunk_are_drawn_together() -> None:
    rows = []
    for N in np.geomspace(1e4, 1.6e5, 5):
        tokens = np.geomspace(3e5, 3e7, 30)
        loss = CHINCHILLA({"N": N, "D": tokens}, LAW)
        for cell in ("a", "b"):  # two cells that log the same trunk
            own = {"cell": f"{N:.0f}{cell}", "trunk": f"{N:.0f}a", "N": N, "D": 3e7, "C": 6 * N * 3e7}
            rows.append(pd.DataFrame({**own, "tokens": tokens, "val_loss": loss, "flops": 6 * N * tokens}))
    curves = pd.concat(rows, ignore_index=True)
    once = fit_curve_envelope(curves[curves["cell"].str.endswith("a")], constant_rate=True, resamples=60)
    twice = fit_curve_envelope(curves, constant_rate=True, resamples=60)
    assert twice.diagnostics["copies_lost"] == once.diagnostics["copies_lost"] > 0
    assert twice.intervals["N_exponent"] == pytest.approx(once.intervals["N_exponent"])
    apart = fit_curve_envelope(curves.drop(columns="trunk"), constant_rate=True, resamples=60)
    assert apart.diagnostics["copies_lost"] < once.diagnostics["copies_lost"], "copies pass for more evidence"


def test_a_comparison_draws_what_pairs_and_trunks_link_with_one_sign() -> None:
    one, two = table(0), table(0).assign(loss=lambda rows: rows["loss"] * 0.98)
    joint = join(one, two)
    assert joint.pairs == 45
    assert joint.unit.max() + 1 == 9, "a size is one unit over both recipes"
    apart = join(table(0, trunks=False), table(0, trunks=False))
    assert apart.unit.max() + 1 == 45
    half = join(one, two[two["D"] < 1e7].reset_index(drop=True))
    assert half.unit.max() + 1 == 9
    found = compare_recipes(
        table(0, seeds=2), table(1, seeds=2).assign(loss=lambda rows: rows["loss"] * 0.98), resamples=100
    )
    loose = compare_recipes(
        table(0, seeds=2, trunks=False),
        table(1, seeds=2, trunks=False).assign(loss=lambda rows: rows["loss"] * 0.98),
        resamples=100,
    )
    widths = [np.log(c.flops.value.interval[1] / c.flops.value.interval[0]) for c in (found, loose)]
    assert widths[0] > 1.2 * widths[1]


def test_branches_and_shapes_of_one_trunk_are_no_replicates() -> None:
    rows = table(0, seeds=1)
    assert seed_noise(rows, "loss") is None, "one seed at many lengths tells no noise"
    shapes = [
        rows.assign(seed=seed, cooldown_shape=shape, loss=rows["loss"] * (1 + 0.1 * order + 0.001 * seed))
        for seed in (0, 1)
        for order, shape in enumerate(("sqrt", "linear"))
    ]
    noise = seed_noise(pd.concat(shapes), "loss")
    assert noise is not None
    assert noise.sd < 0.002, "a shape that does 10% worse is a setting, no chance"
