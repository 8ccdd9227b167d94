"""The command line: bad input is one clear sentence and exit code 2, nothing lost, nothing half-written."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import ROOT, TINY, Escala, Finished, FrontDoor

from cluster.claims import living_drivers
from cluster.driver import GIVE_UP_AFTER
from escala import run as run_command
from sweeps.records import read_json, write_json
from sweeps.store import Store
from sweeps.trainer import CHECKPOINT_SECONDS


def error(escala: Escala, *arguments: object) -> str:
    run = escala(*arguments, ok=2)
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr
    return run.stderr


def test_help_lists_every_verb(escala: Escala) -> None:
    text = escala("--help").stdout
    verbs = "plan calibrate run status logs why quarantine unquarantine gc sync fit report import export ui doctor"
    for verb in verbs.split():
        assert f" {verb} " in text


def test_the_defaults_of_a_run_are_named_in_the_help_of_submit(front_door: FrontDoor) -> None:
    """The help is rich's markup, where what stands in brackets is lost."""
    assert front_door("submit", "--help").out.count("run's.") == 2, "wherever lines are broken"


def test_a_version_and_a_missing_address_are_said_in_a_sentence(front_door: FrontDoor) -> None:
    said = front_door("--version")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("escala")
    said = front_door("jobs")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: --address is missing")


def test_run_has_the_defaults_of_the_rooms_that_it_does_not_load_for_help() -> None:
    defaults = {name: one.default for name, one in inspect.signature(run_command).parameters.items()}
    assert (defaults["checkpoint_seconds"], defaults["give_up_after"]) == (CHECKPOINT_SECONDS, GIVE_UP_AFTER)


def test_the_installed_command_is_the_same_door() -> None:
    command = Path(sys.executable).parent / "escala"
    run = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "scaling studies" in run.stdout


def test_plan_gives_the_documented_json_and_trains_nothing(escala: Escala) -> None:
    study = escala.study(TINY)
    plan = json.loads(escala("plan", study, "--store", "s", "--json").stdout)
    assert len(plan["cells"]) == 7
    wanted = {"id", "family", "N", "N_nonembedding", "D", "C", "C_6nd", "state", "learning_rate", "adamw_timescale"}
    assert all(wanted <= set(cell) for cell in plan["cells"])
    assert plan["totals"]["C"] == sum(cell["C"] for cell in plan["cells"])
    assert not (escala.folder / "s" / "cells").exists()
    assert not (escala.folder / "s" / "studies").exists()


def test_status_and_fit_give_the_documented_json(finished: Finished) -> None:
    status = json.loads(finished.escala("status", finished.study, "--store", finished.store, "--json").stdout)
    assert status["counts"] == {"finished": 7}
    assert len(status["cells"]) == 7
    run = finished.escala("fit", "tiny", "--store", finished.store, "--law", "chinchilla", "--json")
    fit = json.loads(run.stdout)
    assert fit["law"] == "chinchilla"
    assert set(fit["params"]) == {"E", "A", "B", "alpha", "beta"}
    refused = {verdict["target"] for verdict in fit["verdicts"] if verdict["severity"] == "refuse"}
    assert refused & set(fit["params"]), "seven runs cannot tell five numbers"
    assert all((value is None) == (name in refused) for name, value in fit["params"].items())
    assert fit["excluded"] == []


def test_tables_and_pages_are_made_for_people(finished: Finished) -> None:
    assert "7 finished" in finished.escala("status", "tiny", "--store", finished.store).stdout
    finished.escala("report", "tiny", "--store", finished.store, "--out", finished.escala.folder / "r.html")
    page = (finished.escala.folder / "r.html").read_text()
    assert "How should a small budget be split?" in page
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_why_names_the_fields_in_which_two_cells_differ(finished: Finished) -> None:
    cells = json.loads(finished.escala("status", "tiny", "--store", finished.store, "--json").stdout)["cells"]
    one, two = (cell["id"] for cell in cells if cell["N"] == cells[1]["N"] and cell["C"] < 6e8)
    text = finished.escala("why", one, two, "--store", finished.store).stdout
    assert text.splitlines() == ["data_seed: 0 -> 1", "seed: 0 -> 1"]
    assert finished.escala("why", one, one, "--store", finished.store).stdout == "the same cell\n"


def test_a_plan_with_nothing_to_do_asks_for_no_calibration(finished: Finished) -> None:
    assert "calibrate" not in finished.escala("plan", finished.study, "--store", finished.store).stdout


def test_doctor_finds_the_installed_set(escala: Escala) -> None:
    findings = json.loads(escala("doctor", "--json").stdout)
    assert {finding["what"] for finding in findings} >= {"Python", "torch", "ray", "mlflow", "store", "device"}
    assert all(finding["ok"] for finding in findings)
    assert findings[0]["what"] == "Escala"
    assert re.fullmatch(rf"\S+, code [0-9a-f]{{12}} in {re.escape(str(ROOT))}", findings[0]["found"])


def test_doctor_says_where_no_store_can_be_made(escala: Escala) -> None:
    (escala.folder / "full").mkdir()
    (escala.folder / "full" / "letters").touch()
    (escala.folder / "file").touch()
    for place, words in (("full", "a folder with other things in it"), ("file", "is a file, not an Escala store")):
        findings = json.loads(escala("doctor", "--json", "--store", place, ok=1).stdout)
        (store,) = (finding for finding in findings if finding["what"] == "store")
        assert not store["ok"]
        assert words in store["found"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("budgets: [4e8, 8e8]", "budgets: [-4e8]"), "study.yaml:9: grid.budgets[0]: found '-4e8'"),
        (("budgets: [4e8, 8e8]", "budgets: [.nan]"), "finite number"),
        (("budgets: [4e8, 8e8]", "budgets: []"), "at least 1 item"),
        (("seeds", "seedz"), 'unknown key (did you mean "seeds"?)'),
        (("context: 32", "context: long"), "context: found 'long'"),
        (("[llama]", "[lama]"), 'did you mean "llama"'),
        (("source: markov", "source: markow"), 'did you mean "markov"'),
        (("context: 32", "context: 32\ntokenizer: bites"), 'did you mean "bytes"'),
        (("context: 32", "context: 500000"), "context"),
        (("N: 14142", "N: 100"), "leave the lattice of 10,000"),
        (("budgets: [4e8, 8e8]", "budgets: [1e7]"), "less than one batch of 256"),
        (("budgets: [4e8, 8e8]", "budgets: [1e13]"), "set `repeat: true`"),
        (("question:", "question: !!python/name:os.system"), "tags are not allowed"),
        (("vocab_size: 16", "vocab_sise: 16"), 'did you mean "vocab_size"'),
    ],
)
def test_a_bad_study_is_refused_before_anything_is_written(escala: Escala, change: tuple[str, str], words: str) -> None:
    text = TINY.replace("training:", "seeds: [0]\ntraining:").replace(*change)
    message = error(escala, "run", escala.study(text), "--store", "s")
    assert words in message
    assert not (escala.folder / "s" / "studies").exists()


@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        ("{source: folder, path: nowhere}", "nowhere"),
        ("{source: folder, path: empty}", "empty"),
        ("{source: folder, path: latin}", "latin.txt"),
        ("{source: jsonl, path: broken.jsonl}", "broken.jsonl:2"),
    ],
)
def test_a_bad_corpus_is_refused_with_its_place(escala: Escala, corpus: str, words: str) -> None:
    (escala.folder / "empty").mkdir()
    (escala.folder / "latin").mkdir()
    (escala.folder / "latin" / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 900)
    (escala.folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    text = TINY.replace("{source: markov, options: {vocab_size: 16, tokens: 200000, seed: 1}}", corpus)
    assert words in error(escala, "plan", escala.study(text), "--store", "s")
    leftovers = [path.name for path in (escala.folder / "s").rglob("*") if path.name.startswith(".building")]
    assert leftovers == []


@pytest.mark.slow
def test_a_corpus_that_changed_under_its_study_is_refused_until_it_is_accepted(escala: Escala) -> None:
    texts = escala.folder / "texts"
    texts.mkdir()
    for index in range(40):
        (texts / f"{index}.txt").write_text(f"{index} bottles of beer on the wall, " * 200)
    corpus = "{source: folder, path: texts}"
    study = escala.study(
        TINY.replace("{source: markov, options: {vocab_size: 16, tokens: 200000, seed: 1}}", corpus).replace(
            "budgets: [4e8, 8e8]\n  sizes: 3", "budgets: [1e8]\n  sizes: 1"
        )
    )
    escala("run", study, "--store", "s", "--workers", 1)
    pinned = read_json(escala.folder / "s" / "studies" / "tiny" / "plan.json")["corpus"]["fingerprint"]
    (texts / "0.txt").write_text("another song altogether " * 300)
    message = error(escala, "run", study, "--store", "s")
    assert pinned in message
    assert "--accept-corpus" in message
    plan = json.loads(escala("plan", study, "--store", "s", "--accept-corpus", "--json").stdout)
    assert {cell["state"] for cell in plan["cells"]} == {"planned"}


@pytest.mark.slow
def test_stores_that_cannot_serve_are_refused(finished: Finished, escala: Escala) -> None:
    study = escala.study(TINY)
    (escala.folder / "file").write_text("")
    assert "a part of the path is a file" in error(escala, "run", study, "--store", "file/store")
    (escala.folder / "newer").mkdir()
    write_json(escala.folder / "newer" / "store.json", {"format": 2})
    assert "format 2" in error(escala, "run", study, "--store", "newer")
    assert "no Escala store" in error(escala, "status", "tiny", "--store", "nowhere")
    assert "no study 'tinny' (did you mean \"tiny\"?)" in error(escala, "status", "tinny", "--store", finished.store)
    assert "no cell" in error(escala, "logs", "zz", "--store", finished.store)
    assert "no study file 'tinny'" in error(escala, "run", "tinny", "--store", "s")


@pytest.mark.slow
def test_servers_that_do_not_answer_are_named_before_anything_trains(escala: Escala) -> None:
    study = escala.study(TINY)
    message = error(escala, "run", study, "--store", "s", "--tracking-uri", "http://127.0.0.1:9")
    assert "MLflow is not reachable at http://127.0.0.1:9" in message
    message = error(escala, "run", study, "--store", "s", "--address", "127.0.0.1:9")
    assert "Ray is not reachable at '127.0.0.1:9'" in message
    assert not list((escala.folder / "s" / "cells").glob("*/attempts"))
    assert not living_drivers(Store(escala.folder / "s"))


def test_a_ray_that_does_not_start_here_is_a_sentence(escala: Escala, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = escala.folder / ("long" * 25)  # no socket can have such a name
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    assert "Ray did not start on this machine" in error(escala, "run", escala.study(TINY), "--store", "s")
    assert not living_drivers(Store(escala.folder / "s"))


@pytest.mark.slow
def test_a_database_that_cannot_be_written_is_named_and_left_as_it_was(escala: Escala) -> None:
    study, database = escala.study(TINY), escala.folder / "s" / "mlflow" / "mlflow.db"
    escala("plan", study, "--store", "s")
    database.parent.mkdir()
    database.write_text("no database")
    message = error(escala, "run", study, "--store", "s")
    assert "cannot be written" in message
    assert "file is not a database" in message
    assert database.read_text() == "no database"


def test_all_faults_of_a_study_come_at_once(escala: Escala) -> None:
    text = TINY.replace("context: 32", "context: long").replace("[llama]", "[lama, granit]").replace("seeds", "seedz")
    message = error(escala, "plan", escala.study(text), "--store", "s")
    for words in ("3 faults", "context: found 'long'", 'mean "llama"', 'mean "granite"', 'mean "seeds"'):
        assert words in message


def test_a_table_of_runs_is_fitted_without_a_store(escala: Escala) -> None:
    lines = ["params,tokens,loss"]
    for n in (5e7, 2e8, 8e8, 3.2e9):
        for d in (1e9, 4e9, 1.6e10, 6.4e10):
            lines.append(f"{n},{d},{1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658}")
    (escala.folder / "runs.csv").write_text("\n".join(lines))
    fit = json.loads(escala("fit", "runs.csv", "--law", "chinchilla", "--json").stdout)
    assert fit["params"]["alpha"] == pytest.approx(0.3478, rel=1e-3)
    assert "unknown law" in error(escala, "fit", "runs.csv", "--law", "chinchila")
    (escala.folder / "bad.csv").write_text("a,b\n1,2\n")
    assert "a, b" in error(escala, "fit", "bad.csv")
    assert ROOT.exists()
