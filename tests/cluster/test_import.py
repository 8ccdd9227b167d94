"""Finished runs from elsewhere: imported, read by every verb, exported."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commandline import TINY, Escala, refused

import analysis
from analysis.laws import CHINCHILLA
from sweeps.foreign import import_runs
from sweeps.store import Store, open_store, read_plan

LAW = {"E": 1.8, "A": 482.0, "B": 2085.0, "alpha": 0.35, "beta": 0.37}


def table(**more: Any) -> pd.DataFrame:
    rows = []
    for budget in (1e19, 4e19, 1.6e20):
        for times in (0.25, 0.5, 1.0, 2.0, 4.0):
            n = (budget / 120) ** 0.5 * times
            d = budget / 6 / n
            rows.append({"params": n, "tokens": d, "loss": float(CHINCHILLA({"N": n, "D": d}, LAW)), "budget": budget})
    return pd.DataFrame(rows).assign(**more)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["runs.csv", "runs.parquet", "runs.jsonl"])
def test_an_imported_table_is_a_study_that_every_verb_reads(escala: Escala, name: str) -> None:
    frame, path = table(), escala.folder / name
    if name.endswith("csv"):
        frame.to_csv(path, index=False)
    elif name.endswith("parquet"):
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True, double_precision=15)
    told = json.loads(escala("import", name, "--study", "lit", "--store", "s", "--json").stdout)
    assert (told["new"], told["known"], told["left_out"]) == (15, 0, [])
    runs = analysis.load_runs("lit", escala.folder / "s")
    assert runs["excluded"].isna().all()
    assert runs["N"].to_numpy() == pytest.approx(frame.sort_values(["budget", "params"])["params"].to_numpy())
    assert runs["seed"].isna().all()
    assert runs["attempts"].eq(0).all()
    status = json.loads(escala("status", "lit", "--store", "s", "--json").stdout)
    assert status["counts"] == {"finished": 15}
    fit = json.loads(escala("fit", "lit", "--store", "s", "--law", "chinchilla", "--json").stdout)
    assert fit["params"]["alpha"] == pytest.approx(LAW["alpha"], rel=1e-3)
    cell = status["cells"][0]["id"]
    assert "val_loss_final" in escala("logs", cell, "--store", "s").stdout
    assert "foreign.run.N" in escala("why", cell, "--store", "s").stdout
    escala("quarantine", cell, "--reason", "typo in the paper", "--store", "s")
    assert analysis.load_runs("lit", escala.folder / "s")["excluded"].notna().sum() == 1


@pytest.mark.slow
def test_an_import_is_reported_exported_and_mirrored(escala: Escala) -> None:
    table(seed=1).to_csv(escala.folder / "runs.csv", index=False)
    escala("import", "runs.csv", "--study", "lit", "--store", "s")
    escala("report", "lit", "--store", "s")
    assert "imported from elsewhere" in (escala.folder / "s" / "studies" / "lit" / "report.html").read_text()
    escala("export", "lit", "--out", "out.csv", "--curves", "curves.parquet", "--store", "s")
    runs = analysis.load_runs("lit", escala.folder / "s")
    pd.testing.assert_series_equal(pd.read_csv(escala.folder / "out.csv")["val_loss_final"], runs["val_loss_final"])
    assert len(pd.read_parquet(escala.folder / "curves.parquet")) == 15
    assert escala("sync", "lit", "--store", "s").stdout == "lit: MLflow is up to date.\n"
    assert "nothing to pause" in escala("pause", "lit", "--store", "s", ok=2).stderr
    uri = open_store(escala.folder / "s").tracking_uri
    away = escala.folder / "nowhere"
    pd.testing.assert_frame_equal(analysis.load_runs("lit", away, tracking_uri=uri), runs)
    here = analysis.load_curves("lit", escala.folder / "s")
    pd.testing.assert_frame_equal(analysis.load_curves("lit", away, tracking_uri=uri), here)


def test_importing_again_adds_nothing_and_more_rows_add_only_themselves(escala: Escala) -> None:
    frame = table()
    frame[:10].to_csv(escala.folder / "a.csv", index=False)
    frame.to_csv(escala.folder / "b.csv", index=False)
    escala("import", "a.csv", "--study", "lit", "--store", "s")
    before = {p: p.stat().st_mtime_ns for p in (escala.folder / "s").rglob("*")}
    assert "0 runs imported, 10 were there" in escala("import", "a.csv", "--study", "lit", "--store", "s").stdout
    assert {p: p.stat().st_mtime_ns for p in (escala.folder / "s").rglob("*")} == before
    assert "5 runs imported, 10 were there" in escala("import", "b.csv", "--study", "lit", "--store", "s").stdout
    assert len(analysis.load_runs("lit", escala.folder / "s")) == 15


def test_rows_that_are_read_anew_replace_themselves_and_stay_in_quarantine(escala: Escala) -> None:
    table().to_csv(escala.folder / "runs.csv", index=False)
    escala("import", "runs.csv", "--study", "lit", "--store", "s")
    cells = json.loads(escala("status", "lit", "--store", "s", "--json").stdout)["cells"]
    escala("quarantine", cells[0]["id"], "--reason", "typo", "--store", "s")
    told = escala("import", "runs.csv", "--study", "lit", "--store", "s", "--n-is", "N_total").stdout
    assert "note: 15 of them replace the same rows, which were read in another way before." in told
    runs = analysis.load_runs("lit", escala.folder / "s")
    assert len(runs) == 15
    assert runs["N_total"].notna().all()
    assert runs["excluded"].notna().sum() == 1


def test_imports_at_once_lose_no_runs(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    halves = [
        [{"run": {"N": 1e4 + i, "D": 1e5, "C": 6e9, "loss": 3.0}, "row": {"i": i}} for i in part]
        for part in (range(10), range(10, 20))
    ]

    def late() -> Iterator[dict[str, Any]]:
        """The second import comes while the first reads its table."""
        yield halves[0][0]
        import_runs(store, "lit", halves[1], {"N": "unknown", "C": "unknown"}, "b.csv")
        yield from halves[0][1:]

    import_runs(store, "lit", late(), {"N": "unknown", "C": "unknown"}, "a.csv")
    assert len(read_plan(store, "lit")["cells"]) == 20


def test_tokens_in_billions_are_asked_about(escala: Escala) -> None:
    frame = table()
    frame.assign(tokens=frame["tokens"] / 1e15).to_csv(escala.folder / "runs.csv", index=False)
    said = escala("import", "runs.csv", "--study", "lit", "--store", "s", ok=2).stderr
    assert "Are these billions? Then write --columns 'D=D*1e9'" in said
    assert not list((escala.folder / "s").glob("cells/*"))


def test_what_n_and_c_mean_is_kept_and_a_derived_c_is_marked(escala: Escala) -> None:
    frame = table().drop(columns="budget").rename(columns={"params": "non_embedding_params"})
    frame.to_csv(escala.folder / "runs.csv", index=False)
    told = json.loads(escala("import", "runs.csv", "--study", "lit", "--store", "s", "--json").stdout)
    assert told["conventions"] == {"N": "N_nonembedding", "C": "C_6nd"}
    runs = analysis.load_runs("lit", escala.folder / "s")
    assert runs["C_assumed"].all()
    assert (runs["N_nonembedding"] == runs["N"]).all()
    assert runs["N_total"].isna().all()
    fit = json.loads(escala("fit", "lit", "--law", "chinchilla", "--store", "s", "--json").stdout)
    assert "compute_assumed" in {verdict["code"] for verdict in fit["verdicts"]}


def test_bad_imports_and_exports_are_refused_before_anything_is_written(place: tuple[Escala, Store]) -> None:
    escala, store = place
    table().to_csv(escala.folder / "runs.csv", index=False)
    (escala.folder / "bad.csv").write_text("a,b\n1,2\n")
    (escala.folder / "none.csv").write_text("N,D,loss\n1e8,1e9,\n")
    at = ("--store", store.root)
    assert "trains cells of its own" in refused(escala, "import", "runs.csv", "--study", "demo", *at)
    assert "a, b" in refused(escala, "import", "bad.csv", "--study", "lit", *at)
    assert "no finished run" in refused(escala, "import", "none.csv", "--study", "lit", *at)
    assert "--study: found '../x'" in refused(escala, "import", "runs.csv", "--study", "../x", *at)
    assert "--n-is: found 'all'" in refused(escala, "import", "runs.csv", "--study", "lit", "--n-is", "all", *at)
    assert "no such table" in refused(escala, "import", "nowhere.csv", "--study", "lit", *at)
    assert ".csv or .parquet" in refused(escala, "export", "demo", "--out", "runs.xlsx", *at)
    assert "no study 'dmo'" in refused(escala, "export", "dmo", "--out", "o.csv", *at)
    (escala.folder / "file").write_text("")
    assert "is a file, not a folder" in refused(escala, "export", "demo", "--out", "file/runs.csv", *at)


def test_a_study_of_imported_runs_trains_nothing(escala: Escala) -> None:
    table().to_csv(escala.folder / "runs.csv", index=False)
    escala("import", "runs.csv", "--study", "tiny", "--store", "s")
    study = escala.study(TINY)
    for verb in ("plan", "run"):
        assert "holds imported runs" in refused(escala, verb, study, "--store", "s")


def test_an_export_of_escala_says_what_n_and_c_mean_and_keeps_what_diverged(escala: Escala) -> None:
    """As load_runs counts: N beside every other count of parameters, and C beside 6 N D."""
    frame = table().rename(columns={"params": "N", "tokens": "D", "loss": "val_loss_final"}).assign(state="finished")
    frame = frame.assign(N_nonembedding=frame["N"] - 9, N_nonembedding_head=frame["N"] - 4, N_total=frame["N"])
    frame = frame.assign(C=6.6 * frame["N"] * frame["D"], C_6nd=6 * frame["N"] * frame["D"], loss_at_start=9.5)
    frame = frame.assign(size=frame["N"].round(-3), is_default=[None, True, False] * 5, search=None)
    frame.loc[1:2, ["search", "trial", "rung"]] = [["llama 1e9", 0.0, 1.0], ["llama 1e9", 7.0, 1.0]]
    frame.loc[3, ["state", "reason", "excluded"]] = ["diverged", "loss 80 nats", "diverged: loss 80 nats"]
    frame.loc[3, "val_loss_final"] = float("nan")
    frame.loc[4, ["state", "excluded"]] = ["diverged", "a typo"]
    frame.to_csv(escala.folder / "runs.csv", index=False)
    told = json.loads(escala("import", "runs.csv", "--study", "lit", "--store", "s", "--json").stdout)
    assert (told["new"], told["left_out"], told["conventions"]) == (14, [5], {"N": "N", "C": "C"})
    runs = analysis.load_runs("lit", escala.folder / "s")
    (lost,) = runs[runs["state"] == "diverged"].to_dict("records")
    assert (lost["excluded"], lost["loss_at_start"]) == ("diverged: loss 80 nats", 9.5)
    assert runs["val_loss_final"].isna().sum() == 1
    assert (runs["N_nonembedding"] == runs["N"] - 9).all()
    labels = ["is_default", "search", "trial", "rung"]
    known, told_so = (
        sorted(f"{row.size} {row.D:.0f} {[getattr(row, name) for name in labels]}" for row in one.itertuples())
        for one in (runs, frame.drop(4))
    )
    assert known == told_so, "tuned runs keep what they are held against"
    status = json.loads(escala("status", "lit", "--store", "s", "--json").stdout)
    assert status["counts"] == {"diverged": 1, "finished": 13}
    escala("export", "lit", "--out", "again.csv", "--curves", "curves.csv", "--store", "s")
    again = json.loads(escala("import", "again.csv", "--study", "again", "--store", "s", "--json").stdout)
    assert (again["new"], again["conventions"]) == (14, told["conventions"])
    copy = analysis.load_runs("again", escala.folder / "s").drop(columns=["cell", "study", "trunk"])
    pd.testing.assert_frame_equal(copy, runs.drop(columns=["cell", "study", "trunk"]))
