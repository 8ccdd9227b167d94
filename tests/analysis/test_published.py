"""Published runs, refitted: our numbers against those of the papers and of an independent refit."""

import numpy as np
import pandas as pd
import pytest

from analysis import fit, read_table
from tests.analysis.synthetic import codes, published


@pytest.fixture(scope="module")
def chinchilla_runs() -> pd.DataFrame:
    """The 240 of Epoch AI's 245 points that Besiroglu et al. 2024 fitted."""
    table = read_table(published("chinchilla-epoch/svg_extracted_data.csv"))
    return table[table["loss"] < np.sort(table["loss"])[-5]]


def test_besiroglu_refit_is_reproduced(chinchilla_runs) -> None:
    found = fit(chinchilla_runs, threshold=1e-3, targets=[5.76e23], resamples=300)
    assert found.n_runs == 240
    assert found.diagnostics["objective"] == pytest.approx(1.018274018e-3, abs=1e-8)
    assert found.params["E"] == pytest.approx(1.81722, abs=1e-3)
    assert found.params["alpha"] == pytest.approx(0.34731, abs=1e-3)
    assert found.params["beta"] == pytest.approx(0.36717, abs=1e-3)
    assert found.params["A"] == pytest.approx(477.83, rel=0.005)
    assert found.params["B"] == pytest.approx(2143.42, rel=0.005)
    assert found.decisions["N_exponent"].value == pytest.approx(0.5139, abs=1e-3)
    (target,) = found.decisions["targets"]
    assert 15 < target["tokens_per_parameter"].value < 21
    # Their bootstrap over runs: standard errors 0.0257 (E), 0.0154 (alpha), 0.0206 (beta).
    for name, error in (("E", 0.0257), ("alpha", 0.0154), ("beta", 0.0206)):
        assert found.draws[name].std() == pytest.approx(error, rel=0.35)
    low, high = found.decisions["N_exponent"].interval
    assert low < 0.50 < high
    assert codes(found) == {"noise_from_residuals", "extrapolation"}


def test_tiny_threshold_reaches_their_headline_numbers(chinchilla_runs) -> None:
    found = fit(chinchilla_runs, threshold=1e-5, resamples=20)
    assert found.params["A"] == pytest.approx(482.01, rel=0.01)
    assert found.params["B"] == pytest.approx(2085.43, rel=0.01)
    assert found.params["E"] == pytest.approx(1.8172, abs=1e-3)


def test_five_outliers_matter_more_than_any_optimiser_detail() -> None:
    table = read_table(published("chinchilla-epoch/svg_extracted_data.csv"))
    found = fit(table, threshold=1e-3, resamples=20)
    assert found.diagnostics["objective"] == pytest.approx(1.82601e-3, rel=1e-4)
    assert found.params["beta"] == pytest.approx(0.4530, abs=2e-3)
    assert found.params["E"] == pytest.approx(1.8913, abs=2e-3)


def porian(**condition: str) -> pd.DataFrame:
    table = pd.read_csv(published("porian-isoflop/isoflop_points.csv"))
    for column, value in condition.items():
        table = table[table[column] == value]
    return table.rename(columns={"n": "N", "t": "D", "flops": "budget"}).assign(C=lambda t: t["budget"])


@pytest.mark.parametrize(
    ("condition", "published_exponent"),
    [
        (("base", "long", "kaplan", "kaplan", "train"), 0.835),
        (("base", "long", "kaplan", "standard", "val"), 0.706),
        (("base", "short", "kaplan", "standard", "val"), 0.602),
        (("base", "short", "chinchilla", "standard", "val"), 0.571),
        (("tuned", "short", "const", "standard", "val"), 0.497),
    ],
)
def test_porian_exponents_lie_in_our_intervals(condition, published_exponent) -> None:
    names = ("hparams", "warmup", "decay", "param_count", "val")
    found = fit(porian(**dict(zip(names, condition))), "akima")
    low, high = found.intervals["N_exponent"]
    assert low < published_exponent < high
    assert found.params["N_exponent"] == pytest.approx(published_exponent, abs=0.007)
    parabola = fit(porian(**dict(zip(names, condition))), "isoflop")
    assert parabola.params["N_exponent"] == pytest.approx(published_exponent, abs=0.03)
    assert high - low < 0.15


@pytest.mark.parametrize(
    ("data", "N", "D"), [("comma", 0.405, 0.572), ("dclm", 0.424, 0.552), ("nemotron", 0.422, 0.553)]
)
def test_marin_exponents_agree_with_a_plain_refit(data, N, D) -> None:
    table = pd.read_csv(published("isoflop-marin/isoflops.csv"))
    table = table[table["experiment"].str.contains(data)].rename(columns={"params": "N", "tokens": "D"})
    found = fit(table.assign(C=table["budget"]), "isoflop")
    for name, value in (("N", N), ("D", D)):
        low, high = found.intervals[f"{name}_exponent"]
        assert low - 0.02 < value < high + 0.02
