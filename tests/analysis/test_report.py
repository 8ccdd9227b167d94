"""The report: one page that stands alone, answers or refuses, and works at any stage of any study."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from analysis import write_report
from analysis.foreign import read_foreign
from sweeps.errors import InputError
from sweeps.foreign import import_runs
from sweeps.records import read_json, write_json
from sweeps.store import open_store
from tests.analysis.fans import fan
from tests.analysis.synthetic import BUDGETS, Run, budgets_table, grid, record, surface

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags balance, and collects what a page refers to and says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.links += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def pictures(self) -> int:
        return sum(link.startswith("data:image/png") for link in self.links)


def page_of(root: Path) -> Page:
    path = write_report("demo", root)
    assert path == root.resolve() / "studies" / "demo" / "report.html"
    text = path.read_text()
    page = Page(text)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"url\(|@import|<script", text)
    assert "nan" not in page.text.lower().split()
    return page


@pytest.fixture(scope="module")
def page(good_store) -> Page:
    return page_of(good_store)


def test_answer_gives_exponents_intervals_and_tokens_per_parameter(page) -> None:
    answer = page.text.split("The best size at each budget")[0]
    assert "How should compute be split between parameters and tokens?" in answer
    assert re.search(r"best size grows as C 0\.\d\d \(95% interval 0\.\d+ to 0\.\d+\)", answer)
    assert re.search(r"[\d.]+ tokens per parameter \([\d.]+ to [\d.]+\)", answer)
    assert "Provisional" not in answer


def test_all_sections_and_pictures_are_there(page) -> None:
    for phrase in (
        "differ only in their seed differ by",
        "settings with several seeds that the loss surface is fitted to",
        "worker-hours (of the attempts that ended the cells)",
        "neighbouring sizes can be told apart",
        "Did the cheaper budgets foretell the dearest?",
        "What to keep in mind",
        "AdamW timescale",
        "fingerprint 0123456789abcdef",
        "pystdlib, Python 3.11.7",
        "40 planned: 40 finished",
    ):
        assert phrase in page.text, phrase
    assert page.pictures == 6


def test_partly_finished_study_says_so_and_refuses_honestly(study) -> None:
    states = {**dict.fromkeys(range(10), "finished"), 3: "failed", 8: "diverged"}
    runs = [replace(run, state=states.get(i, "planned")) for i, run in enumerate(grid())]
    page = page_of(study(runs, quarantine={6: "spike"}))
    assert "Provisional: 11 of 20 planned cells are still to come." in page.text
    assert "do not settle" in page.text
    assert "refuse" in page.text
    for phrase in ("not finished (planned)", "ValueError: it broke", "the loss is not finite", "quarantined: spike"):
        assert phrase in page.text, phrase


def test_study_that_has_not_begun_has_a_report(study) -> None:
    page = page_of(study([replace(run, state="planned") for run in grid()]))
    assert "20 of 20 planned cells are still to come" in page.text
    assert "do not settle" in page.text


@pytest.mark.parametrize(("state", "told"), [("diverged", "6: diverged"), ("failed", "6: not finished (failed")])
def test_study_whose_runs_have_no_loss_says_what_became_of_them(study, state: str, told: str) -> None:
    root = study([replace(run, state=state) for run in grid(budgets=BUDGETS[:2], sizes=3)])
    assert f"none has a loss that a fit may use ({told}" in page_of(root).text


def test_study_without_budgets_is_answered_by_the_loss_surface(study) -> None:
    runs = [Run(width=w, tokens=t * 512) for w in (16, 32, 64, 96) for t in (400, 1500, 6000)]
    page = page_of(study(runs))
    assert "By the Chinchilla law" in page.text
    assert "The best size at each budget" not in page.text
    assert "foretell" not in page.text
    assert page.pictures == 3


@pytest.mark.slow
@pytest.mark.parametrize("budgets", [BUDGETS[:3], BUDGETS[:1]])
def test_budgets_at_which_the_rate_was_swept_answer_for_both_what_they_settle_first(study, budgets) -> None:
    runs = []
    for run, times in product(grid(budgets), (0.25, 0.5, 1.0, 2.0, 4.0)):
        N, D = (float(v) for v in (record(run)["counts"]["N"], record(run)["identity"]["tokens"]))
        loss = float(surface(N, D)["loss"].iloc[0]) * np.exp(0.02 * np.log(times) ** 2)
        runs.append(replace(run, changes={"learning_rate": 0.01 * times}, loss=loss))
    head = page_of(study(runs)).text.split("The best size at each budget")[0]
    growth = head.index("best size grows as C" if len(budgets) > 1 else "do not settle how the best size")
    assert (growth < head.index("The best learning rate is 0.01")) == (len(budgets) > 1)


@pytest.mark.slow
def test_every_family_has_its_own_answer(study) -> None:
    budgets = BUDGETS[:3]
    page = page_of(study([*grid(budgets), *grid(budgets, family="gpt2")]))
    assert "gpt2. Between" in page.text
    assert "llama. Between" in page.text
    assert "several families" not in page.text


def test_text_of_users_is_escaped(study) -> None:
    root = study(
        [Run(width=16, tokens=51200)],
        question="<script>alert(1)</script> & more?",
        quarantine={0: "<img src=x onerror=alert(1)>"},
    )
    page = page_of(root)
    assert "<script>alert(1)</script> & more?" in page.text
    assert "<img src=x" in page.text


def test_report_goes_where_it_is_told(study, tmp_path) -> None:
    root = study([Run(width=16, tokens=51200)])
    path = write_report("demo", str(root), tmp_path / "deep" / "page.html")
    assert path.read_text().startswith("<!doctype html>")


def test_unknown_study_is_an_input_error(good_store) -> None:
    with pytest.raises(InputError, match="demo"):
        write_report("nothing", good_store)


def test_planned_times_are_held_against_real_ones_where_there_were_any(page, study) -> None:
    assert "Planned and real time" not in page.text
    root = study([Run(width=w, tokens=t * 512) for w in (16, 32) for t in (400, 1500)])
    path = root / "studies" / "demo" / "plan.json"
    plan = read_json(path)
    for entry in plan["cells"]:
        entry["seconds_predicted"] = 5.3  # half of what each cell took
    write_json(path, plan)
    timed = page_of(root)
    assert "off by 50% (median of" in timed.text
    assert "took 2.00 times what was planned, and apart from that factor the median is 0%" in timed.text
    head = "final loss seconds planned state"
    assert head in timed.text
    assert head not in page.text, "a column of which nothing is known is left out"
    assert "final loss seconds state" in page.text


def test_of_imported_runs_without_settings_no_table_of_settings_is_shown(tmp_path) -> None:
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 4)))
    surface(N, D, noise=0.002).to_csv(tmp_path / "theirs.csv", index=False)
    store = open_store(tmp_path / "store")
    rows, conventions, _ = read_foreign(tmp_path / "theirs.csv")
    import_runs(store, "demo", rows, conventions, "theirs.csv")
    text = page_of(store.root).text
    assert "the best learning rate was measured for none of these runs" in text
    assert "Ratios are to the measured optimum" not in text
    assert "family N D C (FLOPs) tokens per parameter final loss state" in text


def test_a_best_split_without_an_interval_and_a_budget_of_another_count_are_told_as_such(tmp_path) -> None:
    table = budgets_table([1e18, 1e19, 1e20], sizes=3, noise=0.002)  # three sizes: nothing tells the noise
    table = table.drop(columns=["cell", "seed"], errors="ignore").assign(budget=1e38 / table["budget"])
    table.to_csv(tmp_path / "theirs.csv", index=False)
    store = open_store(tmp_path / "store")
    rows, conventions, _ = read_foreign(tmp_path / "theirs.csv")
    import_runs(store, "demo", rows, conventions, "theirs.csv")
    answer = page_of(store.root).text.split("The best size at each budget")[0]
    assert re.search(r"At the dearest budget, 1e20 FLOPs, the loss is lowest near [\d.]+ tokens per parameter", answer)
    assert "how surely, these runs do not tell" in answer
    assert "best spent" not in answer


def test_optima_of_imported_runs_are_not_offered_as_a_rule_for_studies(tmp_path) -> None:
    store = open_store(tmp_path / "store")
    fan(seeds=1).assign(C=lambda t: 6 * t["N"] * t["D"]).to_csv(tmp_path / "theirs.csv", index=False)
    rows, conventions, _ = read_foreign(tmp_path / "theirs.csv")
    import_runs(store, "demo", rows, conventions, "theirs.csv")
    text = page_of(store.root).text
    assert "The best learning rate is" in text
    assert "{fitted: demo}" not in text


def test_a_search_whose_own_setting_does_not_count_is_reported_all_the_same(study) -> None:
    """The recipe's own trial may diverge, end at a rung, be quarantined or still run."""
    runs = [
        Run(
            width=32,
            budget=BUDGETS[0],
            state="finished" if trial else "diverged",
            changes={"learning_rate": 0.002 * (1 + trial), "weight_decay": 0.05 * trial},
            labels={"search": "llama N=32 0123abcd", "trial": trial, "rung": 1.0, "default": not trial},
        )
        for trial in range(6)
    ]
    text = page_of(study(runs)).text
    assert "left out of fits 1 diverged: the loss is not finite" in text


def test_the_noise_of_mistuned_runs_is_told_apart_from_that_of_the_fit(study) -> None:
    runs = []
    for width, steps, times, seed in product((16, 32, 64, 96), (400, 1500, 6000), (1.0, 8.0), (0, 1)):
        run = Run(width=width, tokens=steps * 512, seed=seed, changes={"learning_rate": 0.01 * times})
        told = record(run)
        loss = float(surface(float(told["counts"]["N"]), float(told["identity"]["tokens"]))["loss"].iloc[0])
        runs.append(replace(run, loss=loss * times**0.1 * (1 + 0.005 * times * seed)))
    text = page_of(study(runs)).text
    assert "pooled over 12 settings with several seeds that the loss surface is fitted to" in text
    fitted, every = (float(found) for found in re.findall(r"(?:differ by|it is) ([\d.]+) ?%", text)[:2])
    assert "Over all 24 settings with several seeds, mistuned ones too" in text
    assert fitted < 0.5 < every
