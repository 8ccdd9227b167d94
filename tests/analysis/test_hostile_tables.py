"""What a stranger's table or store cannot do to the analysis: run code, fetch, fill the memory, mark up the report."""

import gzip
import http.server
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

import analysis
from analysis import tables
from analysis.expressions import evaluate
from analysis.foreign import read_foreign
from analysis.runs import load_documents
from sweeps.errors import InputError
from sweeps.foreign import import_runs
from sweeps.records import read_json, write_json
from sweeps.store import Store, open_store, quarantine_cell, read_plan
from tests.analysis.synthetic import Run, write_study

MARKUP = "<script>document.title='x'</script><img src=x onerror=alert(1)>\"'><svg/onload=alert(2)>"


class Touch:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    runs = [Run(width=width, budget=budget) for width in (16, 24, 32, 40) for budget in (1.2e11, 2.4e11)]
    return open_store(write_study(tmp_path / "store", runs, question=MARKUP))


# --- arrays --------------------------------------------------------------------------------------------------------


def test_document_losses_that_hold_a_pickle_or_a_bomb_are_refused(store: Store, tmp_path: Path) -> None:
    path = store.attempt(read_plan(store, "demo")["cells"][0]["id"], 0) / "documents.npz"
    assert len(load_documents("demo", store))
    touched = tmp_path / "touched"
    np.savez(path, loss_sum=np.array([Touch(touched)], dtype=object), tokens=np.ones(1), allow_pickle=True)
    with pytest.raises(InputError, match="no document losses"):
        load_documents("demo", store)
    assert not touched.exists()
    with np.load(path, allow_pickle=True) as arrays:
        _ = arrays["loss_sum"]
    assert touched.exists(), "the file would have run code"

    np.savez_compressed(path, loss_sum=np.zeros(4_000_000), tokens=np.ones(1))  # 32 MB in 40 kB; 1,000 times as easily
    with pytest.raises(InputError, match="compressed"):
        load_documents("demo", store)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10**15,), }"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("loss_sum.npy", np.lib.format.magic(1, 0) + bytes([len(header), 0]) + header)
    with pytest.raises(InputError, match="no document losses"):
        load_documents("demo", store)
    for content in (b"", b"PK\x03\x04", b"\x80\x04."):
        path.write_bytes(content)
        with pytest.raises(InputError, match="no document losses"):
            load_documents("demo", store)


# --- tables --------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@pytest.mark.parametrize("ending", ["x.csv", "x.parquet", "x.json", "x.jsonl", "x.csv.gz"])
def test_a_table_is_a_file_and_nothing_is_fetched(listener: tuple[str, list[str]], ending: str) -> None:
    url, asked = listener
    for path in (f"{url}/{ending}", Path(f"{url}/{ending}"), f"file:///etc/{ending}", f"memory://{ending}"):
        with pytest.raises(InputError, match="no such table"):
            analysis.read_table(path)
    assert asked == []


@pytest.mark.parametrize("name", ["x.pkl", "x.csv", "x.parquet", "x.json", "x.jsonl", "x.csv.gz", "x.pickle.gz"])
def test_a_pickle_under_any_name_is_no_table(tmp_path: Path, name: str) -> None:
    path, touched = tmp_path / name, tmp_path / "touched"
    pd.to_pickle(Touch(touched), path, compression="gzip" if name.endswith(".gz") else None)
    with pytest.raises(InputError):
        analysis.read_table(path)
    assert not touched.exists()


def test_a_small_file_that_unpacks_to_more_than_there_is_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gzip.open(tmp_path / "bomb.csv.gz", "wb") as stream:
        stream.write(b"N,D,loss\n" + b"1,2,3\n" * 2_000_000)
    column = pyarrow.array(np.zeros(2_000_000))
    pyarrow.parquet.write_table(pyarrow.table({"N": column, "D": column, "loss": column}), tmp_path / "bomb.parquet")
    assert all(path.stat().st_size < 100_000 for path in tmp_path.iterdir())
    monkeypatch.setattr(tables, "MOST_BYTES", 10 * 2**20)
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match="holds more than"):
            analysis.read_table(path)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch here')",
        "(lambda: 1)()",
        "[c for c in ().__class__.__base__.__subclasses__()]",
        "log.__globals__",
        "f'{log}'",
        "2**" * 100 + "2",
        "9**9**9**9**9",
        "N if N else D",
        "(" * 150 + "1" + ")" * 150,
        "-" * 399 + "1",
        "`a` := 1",
        "open('here', 'w')",
    ],
)
def test_arithmetic_is_never_run_as_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)

    def column(name: str) -> Any:
        raise InputError(f"no column {name!r}")

    with suppress(InputError):  # or it is plain arithmetic, in which no number grows without end
        assert isinstance(evaluate(text, column), float)
    assert list(tmp_path.iterdir()) == []


# --- the report ----------------------------------------------------------------------------------------------------


ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "main", "p", "h1", "h2", "h3", "b", "sup", "span", "div"),
    *("table", "thead", "tbody", "tr", "th", "td", "ul", "li", "figure", "img", "figcaption", "code"),
}


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = ""
        self.policy = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ALLOWED, tag
        given = dict(attrs)
        assert not [name for name in given if name.startswith("on") or name in ("style", "srcdoc", "href")], attrs
        assert (given.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        else:
            assert "http-equiv" not in given

    def handle_data(self, data: str) -> None:
        self.text += data


def test_no_markup_of_a_study_a_reason_or_a_name_gets_into_the_report(store: Store) -> None:
    plan = read_plan(store, "demo")
    quarantine_cell(store, "demo", plan["cells"][0]["id"], MARKUP, MARKUP)
    for entry in plan["cells"][1:3]:
        path = store.cell(entry["id"]) / "result.json"
        write_json(path, read_json(path) | {"state": "diverged", "reason": MARKUP, "val_loss_final": None})
    for entry in plan["cells"]:
        path = store.cell(entry["id"]) / "cell.json"
        record = read_json(path)
        for field in ("family", "corpus", "tokenizer"):
            record["identity"][field] = MARKUP
        record["identity"]["parametrisation"] = {"kind": MARKUP}
        write_json(path, record)
    plan["corpus"] |= {"description": MARKUP, "tokenizer": MARKUP, "fingerprint": MARKUP}
    plan["study"]["name"] = MARKUP
    write_json(store.study("demo") / "plan.json", plan)
    page = Page(analysis.write_report("demo", store))
    assert page.text.count(MARKUP) >= 5, "they are shown, as text"
    assert page.policy.startswith("default-src 'none'")
    assert "script" not in page.policy


def test_a_run_that_was_still_going_is_not_imported_as_a_finished_one(tmp_path: Path) -> None:
    rows = [{"N": 1e7, "D": 1e9, "loss": 3.0, "State": word} for word in ("finished", "running", "crashed", "diverged")]
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    found, _, left_out = read_foreign(tmp_path / "table.csv")
    assert [one["run"].get("state", "finished") for one in found] == ["finished", "diverged"]
    assert left_out == [2, 3]


def test_no_markup_of_an_imported_table_gets_into_the_report(tmp_path: Path) -> None:
    rows = [
        {"N": n, "D": d, "loss": 2 + 400 / n**0.34 + 410 / d**0.28, "family": family, MARKUP: MARKUP, "C": 6 * n * d}
        for n in (1e7, 3e7, 1e8, 3e8)
        for d in (1e9, 3e9)
        for family in (MARKUP, "$\\frac$ ../../up/x")  # nor does it break a picture, or write one elsewhere
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    found, conventions, _ = read_foreign(tmp_path / "table.csv")
    store = open_store(tmp_path / "store")
    import_runs(store, "theirs", found, conventions, f"{MARKUP}.csv")
    page = Page(analysis.write_report("theirs", store))
    assert page.text.count(MARKUP) >= 2
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.*")} <= {"store", "table.csv"}
