"""Reports of studies of hyperparameters answer what the study asks, and keep their pictures and the law for others."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import sensitivity, write_report
from analysis.hyperparameters import Hyperparameters, pictures
from tests.analysis.fans import SIZES, crossed
from tests.analysis.sweeps import loss, size, write_sweeps
from tests.analysis.synthetic import Run, write_study


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweeps(tmp_path_factory.mktemp("sweeps") / "store")


def answers(root: Path, study: str) -> list[str]:
    """The sentences at the head of a study's report, without markup."""
    html = write_report(study, root).read_text()
    return [unescape(re.sub("<[^>]+>", "", text)) for text in re.findall(r"<p class=answer>(.*?)</p>", html)]


@pytest.mark.slow
def test_a_sweep_of_rates_says_where_the_best_lies_and_keeps_law_and_pictures(sweeps: Path) -> None:
    (text,) = answers(sweeps, "lr-sensitivity")
    powers = [float(x) for x in re.findall(r"[ND](-?\d\.\d+) \(", text)]
    assert powers == pytest.approx([-0.5, -0.1], abs=0.04)
    folder = sweeps / "studies" / "lr-sensitivity"
    assert {path.name for path in (folder / "pictures").iterdir()} == {
        "audit.png",
        "best-learning-rate.png",
        "learning-rates.png",
    }
    (law,) = json.loads((folder / "fits" / "optimum.json").read_text())["laws"]
    assert law["powers"]["N"] == pytest.approx(-0.5, abs=0.04)


@pytest.mark.slow
def test_parametrisations_are_held_against_each_other(sweeps: Path) -> None:
    transfer, rates = answers(sweeps, "mup-transfer")
    assert re.search(r"learning rate of mup stays: .* learning rate of standard moves: ", transfer)
    assert re.search(
        r"under mup its power of N, \S+ \(.*\), cannot be told from 0; under standard it moves as N", rates
    )


@pytest.mark.slow
def test_where_the_smallest_batch_is_best_the_rate_at_each_batch_is_told(sweeps: Path) -> None:
    told = answers(sweeps, "batch-size")
    power = re.search(r"batch_tokens(\d\.\d+) \(", told[0])
    assert power is not None
    assert float(power[1]) == pytest.approx(0.3, abs=0.04)
    html = (sweeps / "studies" / "batch-size" / "report.html").read_text()
    assert "the loss falls towards the smallest batch tried (128)" in html
    assert "The critical batch" in html
    assert "20% beyond linear is the batch, between those tried, from which on a target takes 20% more tokens" in html
    assert "exact fANOVA" in html
    assert "loss above the lowest at each learning rate and batch" in html, "a map needs no optimum"
    assert (sweeps / "studies" / "batch-size" / "pictures" / "rate-and-batch-0.png").exists()


@pytest.mark.slow
def test_a_study_with_a_default_says_first_what_tuning_is_worth(sweeps: Path) -> None:
    worth, _ = answers(sweeps, "tuned-small-against-untuned-large")
    assert re.match(r"Tuning is worth \S+ to \S+% of the loss over \d+ places; most at .* larger model", worth)


def test_a_search_shows_its_best_trials_and_what_they_gain(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    runs = []
    for trial in range(24):
        rate = 0.003 if trial == 0 else float(10 ** draw.uniform(-3.3, -1.3))
        decay, batch = (0.1, 512) if trial == 0 else (float(draw.uniform(0, 0.5)), int(128 * draw.integers(1, 9)))
        tokens = round(163_840 / batch) * batch
        for seed in (0, 1):
            found = loss(size(24), tokens, rate, seed=seed, batch=batch) * (1 + 0.1 * (decay - 0.3) ** 2)
            labels = {"search": "llama", "trial": trial, "rung": 1.0, "default": trial == 0}
            changes = {"learning_rate": rate, "weight_decay": decay, "batch_tokens": batch}
            runs.append(Run(width=24, tokens=tokens, seed=seed, loss=found, changes=changes, labels=labels))
            labels = labels | {"rung": 0.25}
            runs.append(Run(width=24, tokens=tokens // 4, seed=seed, loss=1 + found, changes=changes, labels=labels))
    root = write_study(tmp_path / "store", runs, name="search")
    path = root / "studies" / "search" / "plan.json"
    plan = json.loads(path.read_text())
    plan["study"]["search"] = {"space": {key: {} for key in ("learning_rate", "weight_decay", "batch_tokens")}}
    plan["study"]["search"]["rungs"] = [0.25]
    path.write_text(json.dumps(plan))
    worth, matters = answers(root, "search")
    assert worth.startswith("Tuning at 20k parameters on 164k tokens is worth")
    assert "What matters most" in matters
    html = (root / "studies" / "search" / "report.html").read_text()
    matter = html.partition("Which hyperparameters matter?")[2].partition("</table>")[0]
    assert "so the share may lie outside" in matter
    shares = re.findall(r"<td>\S+ <span class=range>.*?</span>", matter)
    assert len(shares) >= 6
    assert all(re.fullmatch(r"<td>\S+% <span class=range>\S+% to \S+%</span>", one) for one in shares)
    assert "The best settings found" in html
    assert html.count("0 (the recipe)") >= 1
    assert "best setting, less the luck of the draw" in html
    assert re.search(r"<td>llama</td><td>0.25</td><td>\d</td><td>1</td>", html), "a rung that ranks as the full length"


def test_a_search_without_seeds_tells_its_best_settings_and_that_nothing_tells_their_noise(tmp_path: Path) -> None:
    runs = []
    for trial, (rate, decay, batch) in enumerate(
        [(0.003, 0.1, 512), (0.01, 0.2, 256), (0.02, 0.3, 512), (0.03, 0, 768)]
    ):
        found = loss(size(24), 163_840, rate, batch=batch) * (1 + 0.1 * (decay - 0.3) ** 2)
        labels = {"search": "llama", "trial": trial, "rung": 1.0, "default": trial == 0}
        changes = {"learning_rate": rate, "weight_decay": decay, "batch_tokens": batch}
        runs.append(Run(width=24, tokens=163_840, loss=found, changes=changes, labels=labels))
    root = write_study(tmp_path / "store", runs, name="search")
    path = root / "studies" / "search" / "plan.json"
    plan = json.loads(path.read_text())
    plan["study"]["search"] = {"space": {key: {} for key in ("learning_rate", "weight_decay", "batch_tokens")}}
    path.write_text(json.dumps(plan))
    (text,) = answers(root, "search")
    lowest = min(run.loss for run in runs if run.loss)
    assert f"at 20k parameters on 164k tokens {lowest:.4f} nats, with learning rate" in text
    assert f"where the recipe's own has {runs[0].loss:.4f}" in text
    html = (root / "studies" / "search" / "report.html").read_text()
    assert "noise not known" in html
    assert "within noise" not in html
    assert "cannot be told from noise" not in html


def test_a_study_of_the_decay_shows_its_timescale_beside_the_published_one(tmp_path: Path) -> None:
    runs = []
    for decay in 0.05 * 2.0 ** np.arange(5):
        changes = {"learning_rate": 0.004, "weight_decay": float(decay), "batch_tokens": 256}
        found = loss(size(24), 163_840, 0.004) * np.exp(0.05 * np.log(decay / 0.2) ** 2)
        runs += [Run(width=24, tokens=163_840, seed=seed, loss=found, changes=changes) for seed in (0, 1)]
    root = write_study(tmp_path / "store", runs, name="decay")
    html = write_report("decay", root).read_text()
    section = html[html.index("The weight decay's timescale") :]
    assert f"{256 / (0.004 * 0.2 * 163_840):.3g}" in section[: section.index("</table>")]


def test_of_too_many_maps_the_dearest_are_shown_and_a_caption_says_so() -> None:
    found = sensitivity(crossed(SIZES[:3]), resamples=20)
    empty = dict.fromkeys(("searched", "rungs", "transfers", "noise", "timescales", "importances"), ())
    rest = {"runs": pd.DataFrame(), "worth": None, "own_default": False, "batches": None, "audits": {}}
    told = Hyperparameters(sweep=found, crossed=found.optima, **empty, **rest)
    maps = [one.caption for one in pictures(told) if one.name.startswith("rate-and-batch")]
    assert len(maps) == 8
    assert maps[0].startswith("The 8 dearest of 9 groups follow. ")
    cost = [one.group["N"] * one.group["D"] for one in found.optima]
    dearest = [one.name for one, spent in zip(found.optima, cost) if spent > min(cost)]
    assert all(name in caption for name, caption in zip(dearest, maps))
