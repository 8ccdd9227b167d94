"""`escala sensitivity` on tables and studies: what a user types, what is printed, and exit code 2 with one sentence."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commandline import FrontDoor

from tests.analysis.fans import best_rate, crossed, fan
from tests.analysis.synthetic import grid, published, write_study


@pytest.fixture
def door(front_door: FrontDoor) -> FrontDoor:
    """The front door in a folder with fan.csv and crossed.csv."""
    fan().rename(columns={"learning_rate": "eta", "N": "params", "D": "tokens"}).to_csv("fan.csv", index=False)
    both = crossed().rename(columns={"learning_rate": "lr"})
    both.assign(bs=both["batch_tokens"] / 2048).drop(columns="batch_tokens").to_csv("crossed.csv", index=False)
    return front_door


def test_a_table_with_its_own_names_is_measured(door) -> None:
    run = door("sensitivity", "fan.csv", "--columns", "lr=eta", "--json")
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert len(found["optima"]) == 5
    for each in found["optima"]:
        assert each["best"]["learning_rate"]["value"] == pytest.approx(best_rate(each["group"]["N"]), rel=0.1)
    (law,) = found["laws"]
    assert law["powers"]["N"] == pytest.approx(-0.2, abs=0.02)
    assert found["source"]["columns"]["learning_rate"] == "eta"


def test_batches_in_sequences_are_said_by_arithmetic(door) -> None:
    run = door("sensitivity", "crossed.csv", "--columns", "N=N,D=D,lr=lr,batch=bs*2048,loss=loss", "--json")
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert found["optima"][0]["axes"] == ["learning_rate", "batch_tokens"]
    assert {law["hyperparameter"] for law in found["laws"]} == {"learning_rate", "batch_tokens"}


def test_optima_laws_and_what_cannot_be_said_are_printed(door) -> None:
    run = door("sensitivity", "fan.csv", "--columns", "lr=eta", "--eps", 0.02)
    assert run.code == 0
    text = " ".join(run.out.split())
    for words in ("135 runs in 5 groups", "learning_rate = eta", "within 2%", "power of N", "not_identifiable"):
        assert words in text, words


def test_rows_axes_and_method_can_be_chosen(door) -> None:
    words = ("sensitivity", "crossed.csv", "--columns", "batch=bs*2048", "--json")
    one = json.loads(door(*words, "--where", "N=100000").out)
    assert {each["group"]["N"] for each in one["optima"]} == {1e5}
    rates = json.loads(door(*words, "--axis", "learning_rate").out)
    assert rates["optima"][0]["axes"] == ["learning_rate"]
    near = json.loads(door(*words, "--method", "near-best").out)
    assert near["method"] == "near-best"


def test_decays_that_were_varied_have_a_best_timescale(door, tmp_path) -> None:
    parts = [fan(sizes=(1e6,), weight_decay=decay, batch_tokens=4096) for decay in (0.05, 0.1, 0.2, 0.4, 0.8)]
    table = pd.concat(parts)
    tau = 4096 / (table["learning_rate"] * table["weight_decay"] * table["D"])
    best = 4096 / (best_rate(1e6) * 0.2 * 1e8)
    table.assign(loss=table["loss"] * np.exp(0.02 * np.log(tau / best) ** 2)).to_csv(tmp_path / "decays.csv")
    words = ("sensitivity", "decays.csv", "--columns", "wd=weight_decay,batch=batch_tokens")
    (found,) = json.loads(door(*words, "--json").out)["timescales"]
    assert found["group"] == {"N": 1e6, "D": 1e8}
    assert found["best"]["value"] == pytest.approx(best, rel=0.2)
    text = " ".join(door(*words).out.split())
    assert "decay's timescale" in text
    assert "Power Lines" in text


def test_batches_that_were_varied_have_a_critical_batch(door, tmp_path) -> None:
    rows = []
    for batch, D, rate in product(2.0 ** np.arange(12, 21), 1e8 * 2.0 ** np.arange(4), (1e-3, 2e-3, 4e-3)):
        worth = D / (1 + batch / 65_536)  # tokens of a small batch that do as much
        loss = (1.7 + 400 * worth**-0.28) * np.exp(0.02 * np.log(rate / 2e-3) ** 2)
        rows.append({"N": 1e7, "D": D, "lr": rate, "batch_tokens": batch, "loss": loss})
    pd.DataFrame(rows).to_csv(tmp_path / "batches.csv", index=False)
    found = json.loads(door("sensitivity", "batches.csv", "--json").out)
    told = found["critical_batches"]["sweeps"]
    assert [one["batch"]["value"] for one in told] == pytest.approx([65_536] * len(told), rel=0.1)
    assert len(told) >= 3
    text = " ".join(door("sensitivity", "batches.csv").out.split())
    assert "critical batch" in text
    assert "N=10M at" in text
    assert "critical_batches" not in json.loads(door("sensitivity", "fan.csv", "--columns", "lr=eta", "--json").out)


def test_what_explains_the_loss_is_told_where_it_is_asked_for(door, tmp_path) -> None:
    rows = [
        {"d": d, "warmup": u, "N": 12.0 * d**2, "D": 240.0 * d**2, "lr": 0.003, "loss": 4 - d / 500 + 1e-3 * u}
        for d, u in product((64, 96, 128), (10, 20, 40))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "shapes.csv", index=False)
    words = ("sensitivity", "shapes.csv", "--columns", "N=N,D=D", "--importance")
    run = door(*words, "d,warmup")
    assert run.code == 0, "one rate gives no optimum, which nobody asked for"
    text = " ".join(run.out.split())
    for part in ("exact fANOVA, the whole grid", "all runs d 9", "N and D differ between these runs, by d"):
        assert part in text, part
    (found,) = json.loads(door(*words, "d, warmup", "--json").out)["importances"]
    assert found["evaluations"][0]["shares"]["d"]["value"] > 0.9
    refused = door("sensitivity", "shapes.csv", "--importance", "lr", "--where", "d=64", "--where", "warmup=10")
    assert refused.code == 1
    assert "learning_rate has one value" in " ".join(refused.out.split())
    wrong = door(*words, "d,warm")
    assert (wrong.code, "no column 'warm'" in wrong.err) == (2, True)


def test_sizes_and_tokens_are_written_as_in_other_tables(door, tmp_path) -> None:
    fan(sizes=(10_240.0, 40_960.0, 163_840.0), tokens=(99_840.0,), batch_tokens=65_536.0).to_csv(
        "small.csv", index=False
    )
    text = " ".join(door("sensitivity", "small.csv", "--columns", "batch=batch_tokens").out.split())
    assert "N=10.2k D=99.8k batch=65.5k" in text
    assert "at N = 41k" in text


def test_everything_refused_is_exit_code_1_with_the_reasons(door, tmp_path) -> None:
    table = fan()
    table[table["learning_rate"] < 0.004].to_csv(tmp_path / "edge.csv", index=False)
    run = door("sensitivity", "edge.csv")
    assert run.code == 1
    assert "edge_minimum" in run.out
    assert "no power law" in run.out
    table.assign(learning_rate=0.01).to_csv(tmp_path / "same.csv", index=False)
    run = door("sensitivity", "same.csv")
    assert run.code == 1
    assert "too_few_points" in run.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("fan.csv",), "lacks learning_rate"),
        (("fan.csv", "--columns", "lr=etta"), 'did you mean "eta"'),
        (("crossed.csv",), "batch=bs*2048"),
        (("fan.csv", "--columns", "lr=0*eta"), "not positive"),
        (("fan.csv", "--columns", "lr=eta", "--eps", 0), "eps"),
        (("fan.csv", "--columns", "lr=eta", "--method", "near"), "near-best"),
        (("fan.csv", "--columns", "lr=eta", "--axis", "rate"), "learning_rate"),
        (("none.csv",), "no such table"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(door, words, told) -> None:
    run = door("sensitivity", *words)
    assert run.code == 2, run.out
    assert run.err.startswith("error: ")
    assert told in run.err


def test_a_study_keeps_its_optimum_for_rules_but_not_that_of_some_rows(door, tmp_path) -> None:
    root = write_study(tmp_path / "store", grid(seeds=2))
    kept = root / "studies" / "demo" / "fits" / "optimum.json"
    run = door("sensitivity", "demo", "--store", root, "--where", "seed=0")
    assert run.code == 1
    assert not kept.exists()
    run = door("sensitivity", "demo", "--store", root)
    assert run.code == 1  # a study at one rate: every group says so
    assert "too_few_points" in run.out
    assert json.loads(kept.read_text())["laws"][0]["refused"] is True
    assert door("sensitivity", "demo", "--store", root, "--columns", "lr=x").code == 2


def test_step_laws_table_is_measured_as_it_is(door) -> None:
    path = published("step-law-dense/dense_lr_bs_loss.csv")
    run = door("sensitivity", path, "--columns", "lr=lr,batch=bs*2048,loss=`smooth loss`", "--json")
    found = json.loads(run.out)
    assert run.code == 0
    assert (found["runs"], found["diverged"], len(found["optima"])) == (1911, 181, 17)
    assert np.isfinite(found["laws"][0]["value"])


def test_the_fan_of_a_table_goes_into_a_picture(door) -> None:
    run = door("sensitivity", "fan.csv", "--columns", "lr=eta", "--plot", "fan.svg")
    assert "picture: fan.svg" in run.out
    assert "final loss (nats per token)" in Path("fan.svg").read_text()
    bad = door("sensitivity", "fan.csv", "--columns", "lr=eta", "--plot", "fan.gif")
    assert (bad.code, "a picture is a .png, .pdf or .svg file" in bad.err) == (2, True)
    one_rate = door(
        "sensitivity", "crossed.csv", "--columns", "batch=bs*2048", "--axis", "batch_tokens", "--plot", "b.png"
    )
    assert "no picture: no group has several learning rates" in one_rate.out
    assert not Path("b.png").exists()
