"""`escala fit` on tables: what a user types, what is printed, and exit code 2 with one sentence for what is wrong."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from commandline import ROOT, FrontDoor

from analysis.laws import LAWS
from tests.analysis.synthetic import LAW, budgets_table, grid, published, surface, write_study

N, D = (a.ravel() for a in np.meshgrid([5e7, 2e8, 8e8, 3.2e9], [1e9, 4e9, 1.6e10, 6.4e10]))


@pytest.fixture
def door(front_door: FrontDoor) -> FrontDoor:
    """The front door in a folder with runs.csv in another's units."""
    runs = surface(N, D, noise=0.0003, recipe="plain", cluster=np.repeat(np.arange(8), 2))
    runs.assign(size_m=N / 1e6, flop=runs["C"], ppl=np.exp(runs["loss"]))[
        ["size_m", "flop", "ppl", "recipe", "cluster"]
    ].rename(columns={"flop": "Training FLOP", "cluster": "trunk"}).to_csv("runs.csv", index=False)
    budgets_table([1e18, 1e19, 1e20], noise=0.003).to_csv("budgets.csv", index=False)
    return front_door


COLUMNS = ("--columns", "N=1e6*size_m,D=`Training FLOP`/(6*N)", "--columns", "loss=log(ppl)")


def test_columns_of_any_name_and_unit_are_fitted(door) -> None:
    run = door("fit", "runs.csv", "--law", "chinchilla", *COLUMNS, "--bootstrap", 50, "--at", 1e23, "--json")
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert found["params"]["alpha"] == pytest.approx(LAW["alpha"], abs=0.02)
    assert found["n_runs"] == 16
    assert found["source"]["columns"]["D"] == "`Training FLOP`/(6*N)"
    assert found["source"]["columns"]["C"] == "Training FLOP"
    assert found["provenance"]["settings"]["resamples"] == 50
    assert found["decisions"]["targets"][0]["C"] == 1e23


def test_the_same_words_give_the_same_numbers_and_another_seed_others(door) -> None:
    words = ("fit", "runs.csv", "--law", "chinchilla", *COLUMNS, "--bootstrap", 20, "--json")
    one, two, other = (json.loads(door(*words, *more).out) for more in ((), (), ("--seed", 1)))
    assert one["intervals"] == two["intervals"] != other["intervals"]
    assert one["params"] == other["params"]


def test_what_was_read_and_found_is_printed_within_the_width(door) -> None:
    run = door("fit", "runs.csv", "--law", "chinchilla", *COLUMNS, "--bootstrap", 50, "--at", 1e23)
    assert run.code == 0
    text = " ".join(run.out.split())
    assert "chinchilla fitted to 16 of 16 runs" in text
    assert "N = 1e6*size_m" in text
    for word in ("alpha", "N_exponent", "at C = 1e23", "D/N", "95% interval", "extrapolation:"):
        assert word in text, word


def test_the_compute_of_a_loss_that_the_law_never_reaches_is_a_dash(door) -> None:
    run = door("fit", "runs.csv", "--law", "chinchilla", *COLUMNS, "--bootstrap", 50, "--for-loss", 0.5)
    assert run.code == 0, run.err
    assert "unreachable_loss: a loss of 0.5" in run.out
    assert re.search(r"C +- +-", run.out)


def test_rows_can_be_chosen(door, tmp_path) -> None:
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    dearer = [line.replace("plain", "other").split(",") for line in lines[1:]]
    lines += [",".join([size, flop, str(1.2 * float(ppl)), *rest]) for size, flop, ppl, *rest in dearer]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    run = door("fit", "runs.csv", "--law", "chinchilla", *COLUMNS)
    assert run.code == 2
    assert "with recipe" in run.err
    run = door("fit", "runs.csv", "--law", "chinchilla", *COLUMNS, "--where", "recipe=plain", "--json")
    assert json.loads(run.out)["n_runs"] == 16


def test_pictures_are_drawn_for_laws_and_budgets(door, tmp_path) -> None:
    run = door("fit", "budgets.csv", "--plot", "a.svg", "--bootstrap", 50)
    assert run.code == 0, run.err
    assert "picture: a.svg" in run.out
    door("fit", "runs.csv", "--law", "chinchilla", *COLUMNS, "--bootstrap", 20, "--plot", "b.png")
    assert min((tmp_path / name).stat().st_size for name in ("a.svg", "b.png")) > 5000


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("runs.csv",), "lacks N (could be size_m), which isoflop needs"),
        (("nowhere.csv",), "no such table: nowhere.csv"),
        (("runs.csv", "--columns", "N"), "each part is NAME=VALUE"),
        (("runs.csv", "--columns", "N=__import__('os')"), "is not understood"),
        (("runs.csv", "--columns", "N=size_m,loss=log(ppl)"), "'N=1e6*size_m'"),
        (("runs.csv", *COLUMNS, "--law", "chinchila"), "unknown law"),
        (("runs.csv", *COLUMNS, "--where", "recipe=gone"), "no row has recipe=gone; there are plain."),
        (("runs.csv", *COLUMNS, "--law", "chinchilla", "--cluster", "trunks"), "did you mean \"trunk\""),
        (("runs.csv", *COLUMNS, "--plot", "a.gif"), "a picture is a .png, .pdf or .svg file"),
        (("runs.csv", *COLUMNS, "--plot", "no/a.png"), "there is no folder no"),
        (("budgets.csv", "--drop-worst", 2, "--loss", "lad"), "--loss, --drop-worst: not for --law isoflop"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence_and_code_2(door, words, sentence) -> None:
    run = door("fit", *words)
    assert run.code == 2
    assert run.err.startswith("error: ")
    assert sentence in run.err
    assert run.out == ""


@pytest.mark.parametrize("words", [("--drop-worst", -1), ("--level", 1.5), ("--bootstrap", 0), ("--at", "much")])
def test_numbers_out_of_range_are_code_2(door, words) -> None:
    assert door("fit", "runs.csv", *COLUMNS, *words).code == 2


def test_a_refused_fit_prints_why_and_is_code_1(door, tmp_path) -> None:
    surface(np.geomspace(1e7, 1e9, 9), 20 * np.geomspace(1e7, 1e9, 9)).to_csv("path.csv", index=False)
    run = door("fit", "path.csv", "--law", "chinchilla", "--plot", "a.png")
    assert run.code == 1
    assert "one_path" in run.out
    assert "no picture" in run.out
    assert not (tmp_path / "a.png").exists()


def test_a_law_of_what_no_study_has_is_refused_with_the_way_by_a_table(door, tmp_path) -> None:
    store = write_study(tmp_path / "store", grid())
    run = door("fit", "demo", "--store", store, "--law", "saturating")
    assert run.code == 2
    assert "the runs of a study have no x" in run.err
    assert "escala fit runs.csv --law saturating --columns x=COLUMN" in run.err
    door("export", "demo", "--store", store, "--out", "of_study.csv")
    run = door("fit", "of_study.csv", "--law", "saturating", "--columns", "x=N", "--bootstrap", 20, "--json")
    assert json.loads(run.out)["law"] == "saturating"


def test_minima_of_splines_are_named_so(door) -> None:
    run = door("fit", "budgets.csv", "--law", "akima", "--bootstrap", 50)
    assert run.out.startswith("akima fitted to")
    refused = door("fit", "budgets.csv", "--law", "akima", "--loss", "lad")
    assert "--loss: not for --law akima, which fits a spline to each budget." in refused.err


def test_budgets_without_a_minimum_are_code_1_and_their_picture_shows_why(door, tmp_path) -> None:
    table = budgets_table([1e18, 1e19, 1e20])
    small = table["N"].groupby(table["budget"]).rank(method="dense") <= 2
    table[small].to_csv("small.csv", index=False)
    run = door("fit", "small.csv", "--plot", "a.png", "--bootstrap", 50)
    assert run.code == 1
    assert "too_few_budgets: 0 budgets with a usable minimum" in " ".join(run.out.split())
    assert "picture: a.png" in run.out
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_study_takes_the_same_words_except_columns(door, tmp_path) -> None:
    store = write_study(tmp_path / "store", grid(seeds=2, replicated=2))
    run = door("fit", "demo", "--store", store, "--bootstrap", 50, "--where", "seed=0", "--json")
    assert run.code in (0, 1)
    assert json.loads(run.out)["planned"] == 20
    assert not (store / "studies/demo/fits").exists(), "part of a study is not the study's fit"
    door("fit", "demo", "--store", store, "--bootstrap", 50)
    assert (store / "studies/demo/fits/isoflop.json").exists()
    run = door("fit", "demo", "--store", store, "--columns", "N=D")
    assert (run.code, run.err[:35]) == (2, "error: --columns is for tables; wha")


def test_ctrl_c_ends_a_fit_at_once_with_a_word(door, tmp_path) -> None:
    rows = 1000
    many = surface(np.geomspace(1e7, 1e10, rows), 10 ** np.random.default_rng(0).uniform(9, 12, rows), noise=0.01)
    many.to_csv(tmp_path / "many.csv", index=False)
    words = ("fit", "many.csv", "--law", "chinchilla", "--bootstrap", "20000")
    run = subprocess.Popen(
        [sys.executable, ROOT / "escala.py", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while sum(psutil.Process(run.pid).cpu_times()[:2]) < 3.0:  # it has begun, also on a busy machine
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=300)
    assert (run.returncode, out, err) == (1, "", "interrupted\n")


def test_every_option_of_a_law_reaches_the_fit(door) -> None:
    words = ("fit", "runs.csv", "--law", "chinchilla", *COLUMNS, "--bootstrap", 20, "--seed", 7, "--level", 0.9)
    asked = ("--loss", "student", "--delta", 0.01, "--drop-worst", 1, "--cluster", "trunk", "--for-loss", 2.5)
    found = json.loads(door(*words, *asked, "--json").out)
    settings = found["provenance"]["settings"]
    wanted = {
        "objective": "student",
        "threshold": 0.01,
        "cluster": "trunk",
        "resample": "rows",
        "level": 0.9,
        "seed": 7,
    }
    assert settings | wanted == settings
    assert settings["resamples"] in (0, 20)  # none where the groups are too few
    assert [entry["loss"] for entry in found["decisions"]["losses"]] == [2.5]
    assert "outcome_selection" in {v["code"] for v in found["verdicts"]}


def test_the_published_refit_comes_out_of_the_command_line(door) -> None:
    path = published("chinchilla-epoch/svg_extracted_data.csv")
    words = ("fit", path, "--law", "chinchilla", "--bootstrap", 20, "--drop-worst", 5, "--json")
    lad = json.loads(door(*words, "--loss", "lad").out)
    assert lad["n_runs"] == 240
    assert lad["params"]["A"] == pytest.approx(482.01, rel=0.02)
    assert "outcome_selection" in {v["code"] for v in lad["verdicts"]}
    narrow = json.loads(door(*words, "--level", 0.5).out)
    wide = json.loads(door(*words, "--level", 0.95).out)
    assert narrow["intervals"]["alpha"][0] > wide["intervals"]["alpha"][0]
    assert narrow["provenance"]["settings"]["objective"] == "huber"


def test_whole_groups_are_resampled_on_request(door) -> None:
    words = ("fit", "runs.csv", "--law", "chinchilla", *COLUMNS, "--bootstrap", 20, "--json")
    settings = json.loads(door(*words, "--cluster", "trunk").out)["provenance"]["settings"]
    assert (settings["cluster"], settings["resample"]) == ("trunk", "rows")


def test_an_unknown_objective_is_named(door) -> None:
    run = door("fit", "runs.csv", "--law", "chinchilla", *COLUMNS, "--loss", "hubert")
    assert run.code == 2
    assert "hubert" in run.err


def test_laws_of_other_variables_read_their_columns(door) -> None:
    path = published("gadre-overtraining/runs.csv")
    columns = "loss=loss_c4_val,error=err_avg17"
    words = ("fit", path, "--columns", columns, "--where", "train_dataset=rpj", "--bootstrap", 20, "--json")
    found = json.loads(door(*words, "--law", "error").out)
    assert (found["loss"], found["n_runs"]) == ("error", 35)
    assert "error=COLUMN" in door("fit", path, "--law", "error", "--columns", "loss=loss_c4_val").err


def test_parameters_are_held_on_request(door) -> None:
    words = ("fit", "runs.csv", "--law", "chinchilla", *COLUMNS, "--bootstrap", 20, "--json")
    found = json.loads(door(*words, "--fix", f"alpha={LAW['alpha']}").out)
    assert found["params"]["alpha"] == pytest.approx(LAW["alpha"])
    assert found["intervals"]["alpha"] == pytest.approx([LAW["alpha"]] * 2)
    assert found["params"]["beta"] == pytest.approx(LAW["beta"], rel=0.1)
    told = door(*words[:-1], "--fix", f"alpha={LAW['alpha']}").out
    assert re.search(r"alpha +[\d.]+ +held", told), "what was given has no interval"
    assert "a number is wanted" in door(*words, "--fix", "E=big").err
    assert "no parameter 'gamma'" in door(*words, "--fix", "gamma=1").err


def test_help_names_every_law(door) -> None:
    words = re.findall(r"bnsl:<breaks>|\w+", door("fit", "--help").out)
    assert {*LAWS, "isoflop", "akima", "bnsl:<breaks>"} <= set(words)
