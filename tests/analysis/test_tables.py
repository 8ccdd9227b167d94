"""Tables from anywhere: columns are found under the names that people use, and mistakes of unit are refused."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import escala
from analysis import check_table, fit, keep_rows, read_table, sensitivity
from analysis.expressions import evaluate, split_definitions
from analysis.foreign import read_foreign
from sweeps.errors import InputError
from tests.analysis.fans import fan
from tests.analysis.synthetic import published, surface

N, D = (a.ravel() for a in np.meshgrid([1e7, 5e7, 2e8, 1e9], [1e9, 4e9, 2e10, 1e11]))
RUNS = surface(N, D, noise=0.003)


def write(folder: Path, frame: Any, name: str = "runs.csv") -> Path:
    frame, path = pd.DataFrame(frame), folder / name
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        frame.to_json(path, orient="records", lines=True)
    elif name.endswith(".json"):
        frame.to_json(path, orient="records")
    else:
        frame.to_csv(path, index=False, sep="\t" if name.endswith(".tsv") else ",")
    return path


def faulty(folder: Path, frame: Any, columns: Any = None, law: str = "chinchilla") -> str:
    with pytest.raises(InputError) as caught:
        check_table(read_table(write(folder, frame), columns, law), law)
    return str(caught.value)


# --- which column is what ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.csv.gz", "a.jsonl.gz"])
def test_every_kind_of_file_gives_the_same_numbers(tmp_path, name) -> None:
    names = {"N": "N_params", "D": "Tokens", "C": "FLOPs", "loss": "Val_Loss"}
    found = read_table(write(tmp_path, RUNS.rename(columns=names), name))
    for column in names:
        assert found[column].to_numpy() == pytest.approx(RUNS[column].to_numpy(), rel=1e-9)
    assert not found["C_assumed"].any()
    assert found.attrs["columns"] == names


@pytest.mark.parametrize(
    ("name", "role", "scale"),
    [
        ("Model Size (B)", "N", 1e9),
        ("params [M]", "N", 1e6),
        ("Model_Size", "N", 1.0),
        ("params_b", "N", 1e9),
        ("train/tokens_millions", "D", 1e6),
        ("Training compute (FLOP)", "C", 1.0),
        ("model/parameter_count", "N", 1.0),
        ("Pretraining Data Size (T)", "D", 1e12),
        ("throughput/total_tokens", "D", 1.0),
        ("FLOPs (1E21)", "C", 1e21),
        ("Training FLOP", "C", 1.0),
        ("throughput/total_gflops", "C", 1e9),
        ("eval/val_loss", "loss", 1.0),
        ("optimizer.learning_rate", "learning_rate", 1.0),
    ],
)
def test_common_names_and_the_units_in_them_are_understood(tmp_path, name, role, scale) -> None:
    frame = pd.DataFrame({"N": [1e9, 2e9], "D": [1e10, 2e10], "C": [6e19, 1e20], "loss": [3.0, 2.9]})
    frame = frame.drop(columns=[role] if role in frame else []).assign(**{name: [2.0, 4.0]})
    assert read_table(write(tmp_path, frame))[role].tolist() == [2.0 * scale, 4.0 * scale]


def test_a_word_that_means_something_else_is_passed_over(tmp_path) -> None:
    frame = RUNS.drop(columns="N").assign(param_count="standard", model_size=N, x=7.0)
    found = read_table(write(tmp_path, frame))
    assert found["N"].tolist() == N.tolist()
    assert "x" not in found.attrs["columns"]


def test_exact_name_wins_over_a_synonym(tmp_path) -> None:
    assert read_table(write(tmp_path, {"params": [5.0], "N": [1e6], "D": [1e8], "loss": [3.0]}))["N"].tolist() == [1e6]


def test_the_third_of_size_tokens_and_compute_follows_from_two(tmp_path) -> None:
    without_d = read_table(write(tmp_path, {"params": [1e6], "flops": [6e14], "loss": [3.0]}))
    assert without_d["D"].tolist() == [1e8]
    without_n = read_table(write(tmp_path, {"tokens": [1e8], "flops": [6e14], "loss": [3.0]}))
    assert without_n["N"].tolist() == [1e6]
    by_budget = read_table(write(tmp_path, {"N": [1e6], "D": [1e8], "budget": [5e14], "loss": [3.0]}))
    assert by_budget["C"].tolist() == [5e14]
    without_c = read_table(write(tmp_path, {"params": [1e6], "tokens": [1e8], "loss": [3.0]}))
    assert without_c["C"].tolist() == [6e14]
    assert "compute_assumed" in {v.code for v in fit(without_c).verdicts}


def test_an_empty_column_that_nothing_needs_is_no_fault(tmp_path) -> None:
    found = read_table(write(tmp_path, RUNS.assign(C=np.nan, lr=np.nan)))
    assert check_table(found) == []
    assert found["C"].to_numpy() == pytest.approx(6.0 * N * D)
    assert found["C_assumed"].all()


def test_numbers_may_be_written_as_people_write_them(tmp_path) -> None:
    frame = {"N": ["124M", "1.5B"], "D": ["1,300,000,000", "10b"], "loss": ["3.3", "diverged"]}
    found = read_table(write(tmp_path, frame))
    assert found["N"].tolist() == [124e6, 1.5e9]
    assert found["D"].tolist() == [1.3e9, 1e10]
    assert found["loss"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("column", "text"),
    [("N", "1,5B"), ("loss", "4,6563"), ("learning_rate", "0,001"), ("steps", "12,5"), ("D", "1.300,5"), ("D", ",5")],
)
def test_decimal_commas_are_refused_and_not_taken_for_thousands(tmp_path, column, text) -> None:
    frame = RUNS.assign(learning_rate=1e-3, steps=1000).astype({column: object})
    frame[column] = text
    with pytest.raises(InputError, match=f"^{column} holds {text}: decimal commas are not read") as caught:
        read_table(write(tmp_path, frame, "runs.tsv"))
    assert "Write decimal points in the file" in str(caught.value)
    frame[column] = ["1,300", *["2,600.5"] * 15]
    assert read_table(write(tmp_path, frame, "runs.tsv"))[column].tolist() == [1300.0, *[2600.5] * 15]


@pytest.mark.parametrize(
    ("column", "texts", "numbers"),
    [
        ("steps", ["1,000", "200"], [1000.0, 200.0]),
        ("seconds", ["10,000", "none"], [10000.0, np.nan]),
        ("size", ["10M", "1.5B"], [1e7, 1.5e9]),
        ("context", ["1,024", "1024"], [1024.0, 1024.0]),
    ],
)
def test_what_is_computed_with_is_numbers_whether_or_not_the_law_needs_it(tmp_path, column, texts, numbers) -> None:
    found = read_table(write(tmp_path, RUNS.assign(**{column: texts * 8})))
    assert found[column].tolist() == pytest.approx(numbers * 8, nan_ok=True)
    assert not fit(found, resamples=10).refused


@pytest.mark.parametrize("seeds", [[0.1, 0.2], [np.inf, 1.0]])
def test_seeds_that_are_no_whole_numbers_stay_as_they_are(tmp_path, seeds) -> None:
    assert read_table(write(tmp_path, RUNS.assign(seed=seeds * 8)))["seed"].tolist() == seeds * 8


@pytest.mark.parametrize("column", ["budget", "weight_decay", "rung", "loss_at_start", "seconds", "size"])
def test_words_under_the_name_of_a_number_tell_recipes_apart_and_nothing_computes_with_them(tmp_path, column) -> None:
    both = pd.concat([RUNS.assign(**{column: "small", "lr": 1e-3}), RUNS.assign(**{column: "large", "lr": 2e-3})])
    found = read_table(write(tmp_path, both), law="sensitivity")
    assert column not in found.columns
    assert set(found[f"{column} as written"]) == {"small", "large"}
    assert fit(found, "isoflop", loss="loss", resamples=10).budgets
    assert sensitivity(found, resamples=10).refused, "two rates are too few"


def test_settings_of_mixed_types_and_whole_configurations_are_words(tmp_path) -> None:
    rows = RUNS.to_dict("records")
    for i, row in enumerate(rows):
        row |= {"precision": "bf16" if i % 2 else 16, "config": {"optimizer": {"lr": 1e-3}}, "tags": ["a", "b"]}
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_table(path)
    assert check_table(found) == []
    assert fit(found, resamples=10).provenance["precision"] == ["16", "bf16"]


@pytest.mark.parametrize("name", ["runs.jsonl", "runs.json", "runs.jsonl.gz"])
def test_whole_numbers_of_json_may_be_as_large_as_compute_is(tmp_path, name) -> None:
    rows = [{"N": int(n), "D": int(d), "C": 6 * int(n) * int(d) * 10**3, "loss": 3.0} for n, d in zip(N, D)]
    assert max(row["C"] for row in rows) > 2**64
    text = json.dumps(rows) if name == "runs.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = read_table(tmp_path / name)
    assert found["C"].tolist() == [float(row["C"]) for row in rows]
    assert found["N"].tolist() == N.tolist()


@pytest.mark.parametrize("no", [False, 0, 0.0, "", "False"])
def test_a_mark_of_what_is_excluded_excludes_only_what_it_marks(tmp_path, no) -> None:
    kept = read_table(write(tmp_path, RUNS.assign(excluded=no)))
    assert kept["excluded"].isna().all()
    assert not fit(kept, resamples=10).excluded
    marked = [True, "an odd one", *[no] * 14] if isinstance(no, str) else [True, *[no] * 15]
    found = fit(read_table(write(tmp_path, RUNS.assign(excluded=marked))), resamples=10)
    told = ["excluded in the table", "an odd one"][: 1 + isinstance(no, str)]
    assert [each["reason"] for each in found.excluded] == told


def test_names_of_rows_as_r_writes_them_do_not_hide_a_row_that_is_left_out(tmp_path) -> None:
    frame = RUNS.assign(loss=RUNS["loss"].where(np.arange(16) != 5)).set_axis([f"run{i}" for i in range(16)])
    lines = frame[["N", "D", "loss"]].to_csv(na_rep="NA").splitlines()
    path = tmp_path / "r.csv"
    path.write_text("\n".join(["N,D,loss", *lines[1:]]))
    rows, _, left_out = read_foreign(path)
    assert len(rows) == 15
    assert left_out == [6]
    assert rows[0]["run"]["N"] == N[0]


def test_perplexity_becomes_a_loss(tmp_path) -> None:
    found = read_table(write(tmp_path, RUNS.assign(ppl=np.exp(RUNS["loss"])).drop(columns="loss")))
    assert found["loss"].to_numpy() == pytest.approx(RUNS["loss"].to_numpy())
    assert found.attrs["columns"]["loss"] == "log(ppl)"


def test_bits_per_token_become_nats_and_other_units_of_a_loss_are_refused(tmp_path) -> None:
    bits = RUNS.assign(loss=RUNS["loss"] / np.log(2.0))
    for name in ("val loss (bits)", "val loss [bits/token]"):
        found = read_table(write(tmp_path, bits.rename(columns={"loss": name})))
        assert found["loss"].to_numpy() == pytest.approx(RUNS["loss"].to_numpy())
        assert found.attrs["columns"]["loss"] == f"log(2)*`{name}`"
    for name in ("loss (nats)", "loss (nats per token)", "loss (C4)"):
        found = read_table(write(tmp_path, RUNS.rename(columns={"loss": name})))
        assert found["loss"].to_numpy() == pytest.approx(RUNS["loss"].to_numpy())
    for name in ("loss (bpb)", "loss (bits per byte)", "loss (nats/char)", "loss [%]"):
        assert "neither nats nor bits per token" in faulty(tmp_path, RUNS.rename(columns={"loss": name}))


def test_definitions_may_use_columns_and_each_other(tmp_path) -> None:
    frame = {"size_m": [1.0, 2.0], "Training FLOP": [6e14, 12e14], "ppl": [np.e, np.e**2]}
    wanted = {"N": "1e6*size_m", "D": "`Training FLOP`/(6*N)", "loss": "log(ppl)"}
    found = read_table(write(tmp_path, frame), wanted)
    assert found["N"].tolist() == [1e6, 2e6]
    assert found["D"].tolist() == [1e8, 1e8]
    assert found["loss"].tolist() == pytest.approx([1.0, 2.0])


def test_a_column_may_be_rescaled_under_its_own_name(tmp_path) -> None:
    found = read_table(write(tmp_path, {"N": [0.5], "C": [6.0], "loss": [3.0]}), {"N": "1e9*N", "C": "1e18*C"})
    assert (found["N"][0], found["D"][0]) == (5e8, 6e18 / 6 / 5e8)


def test_circles_typos_and_strangers_are_named(tmp_path) -> None:
    path = write(tmp_path, {"params": [1e6], "tokens": [1e8], "loss": [3.0]})
    with pytest.raises(InputError, match="defined by each other"):
        read_table(path, {"N": "2*D", "D": "2*N"})
    with pytest.raises(InputError, match="no column 'parms' \\(did you mean \"params\"\\?\\)"):
        read_table(path, {"N": "2*parms"})
    with pytest.raises(InputError, match="cannot be read as 'los'"):
        read_table(path, {"los": "loss"})


def test_an_unknown_column_among_many_is_answered_with_the_few_that_are_like_it(tmp_path) -> None:
    runs = RUNS.assign(learning_rate=1e-3, **{f"metric_{i}": 0.0 for i in range(50)})
    path = write(tmp_path, runs)
    with pytest.raises(
        InputError, match="no column 'lerning_rate' \\(did you mean \"learning_rate\"\\?\\); of "
    ) as told:
        keep_rows(read_table(path), {"lerning_rate": "0.001"})
    assert len(str(told.value)) < 250
    with pytest.raises(InputError, match='did you mean "learning_rate"'):
        keep_rows(read_table(path), {"lr": "0.001"})
    with pytest.raises(InputError, match="most like it: metric_"):
        read_table(path, {"N": "1e6*metrik"})


def test_missing_columns_are_named_with_those_found_and_the_way_out(tmp_path) -> None:
    with pytest.raises(
        InputError, match=r"lacks N \(could be my_params_total\), D.*columns my_params_total, loss"
    ) as e:
        read_table(write(tmp_path, {"my_params_total": [1.0], "loss": [3.0]}))
    assert "--columns N=COLUMN,D=C/(6*N)" in str(e.value)


def test_text_among_the_numbers_leaves_the_row_out_with_a_reason(tmp_path) -> None:
    frame = RUNS.astype({"loss": object})
    frame.loc[3, "loss"] = "diverged"
    found = read_table(write(tmp_path, frame))
    assert check_table(found) == []
    assert [e["cell"] for e in fit(found, resamples=20).excluded] == ["row 3"]


def test_repeats_of_data_are_left_out_of_laws_that_do_not_know_them(tmp_path) -> None:
    frame = RUNS.assign(unique_tokens=np.where(D > 1e10, D / 4, D))
    found = read_table(write(tmp_path, frame))
    assert found["excluded"].notna().tolist() == (D > 1e10).tolist()
    assert found["excluded"].dropna().iloc[0].startswith("repeats its data")


def test_unreadable_tables_are_input_errors(tmp_path) -> None:
    with pytest.raises(InputError, match="no such table"):
        read_table(tmp_path / "none.csv")
    for name, text in (("empty.csv", ""), ("b.json", '{"a": 1, "b": 2}'), ("c.parquet", "no"), ("d.jsonl", '{"a": ')):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="cannot be read"):
            read_table(tmp_path / name)
    (tmp_path / "e.csv").write_bytes(b"N,D,loss\n1,2,caf\xe9\n")
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "e.csv")
    (tmp_path / "f.csv").write_text("N,D,loss\n")
    with pytest.raises(InputError, match="no rows"):
        read_table(tmp_path / "f.csv")


def test_runs_that_their_state_says_are_not_finished_are_left_out_of_every_law(tmp_path) -> None:
    states = ["FINISHED "] * len(RUNS)
    states[:3] = ["running", "Crashed", "Diverged"]
    table = RUNS.drop(columns="C").assign(State=states)
    table.loc[:2, "loss"] = 1.0
    found = read_table(write(tmp_path, table))
    assert found.attrs["columns"]["state"] == "State"
    assert found["excluded"].notna().sum() == 3
    law = fit(found, resamples=10)
    assert law.params == fit(RUNS.drop(columns="C").iloc[3:], resamples=10).params
    assert "state crashed" in next(v.message for v in law.verdicts if v.code == "excluded_runs")


# --- arithmetic --------------------------------------------------------------------------------------------------


@given(a=st.floats(0.1, 1e3), b=st.floats(0.1, 1e3), c=st.floats(-3, 3))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_arithmetic_agrees_with_python(a, b, c) -> None:
    columns = {"a": a, "b c": b, "d.e": c}
    found = evaluate('-a/(2*`b c`) + sqrt("b c")**d.e - log(a)*exp(+d.e)', columns.__getitem__)
    assert found == pytest.approx(-a / (2 * b) + np.sqrt(b) ** c - np.log(a) * np.exp(c))


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os').system('true')", "a.__class__()", "a[0]", "(lambda: 1)()"),
        *("[a for a in b]", "a if a else b"),
        *("open('x')", "abs(a)", "log(a, b)", "log(*a)", "log(x=a)", "a < b", "a and b", "not a", "a // b", "a % b"),
        *("True", "None", "1j", "a := 1", "f'{a}'", "a; b", "a = b", "", "(", "(" * 300, "a\x00b"),
        *("a" * 401, "~a", "a @ b", "a, b", "{a}", "b'x'"),
    ],
)
def test_nothing_but_arithmetic_is_computed(text) -> None:
    with pytest.raises(InputError):
        evaluate(text, {"a": 1.0, "b": 2.0, "x": 3.0}.__getitem__)


def test_powers_of_powers_end_at_once() -> None:
    assert evaluate("9**9**9**9", {}.__getitem__) == np.inf


def test_definitions_are_split_at_commas_outside_quotes() -> None:
    texts = ["N=1e9*`Size, (B)`,D=C/(6*N)", "loss='a=b, c'"]
    assert split_definitions(texts, "--columns") == {"N": "1e9*`Size, (B)`", "D": "C/(6*N)", "loss": "'a=b, c'"}
    with pytest.raises(InputError, match="NAME=VALUE"):
        split_definitions(["N"], "--columns")
    with pytest.raises(InputError, match="gives N twice"):
        split_definitions(["N=a", "N=b"], "--columns")


# --- which rows --------------------------------------------------------------------------------------------------


def test_rows_are_kept_by_text_number_and_truth() -> None:
    table = pd.DataFrame({"a b": ["x", "y", "y"], "n": [1.0, 2.0, 2.0], "t": [True, False, True]})
    assert len(keep_rows(table, {"a b": "y", "n": "2", "t": "true"})) == 1
    assert len(keep_rows(table, {})) == 3
    with pytest.raises(InputError, match="no row has a b=z; there are x, y"):
        keep_rows(table, {"a b": "z"})
    with pytest.raises(InputError, match="no column 'm'"):
        keep_rows(table, {"m": "1"})


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_a_sound_table_passes(tmp_path) -> None:
    for law in ("chinchilla", "isoflop"):
        assert check_table(read_table(write(tmp_path, RUNS), law=law), law) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"N": N / 1e9}, "N has values from 0.01 to 1: that looks like billions; write --columns 'N=1e9*N'."),
        ({"N": N / 1e6}, "N has values from 10 to 1000: that looks like millions; write --columns 'N=1e6*N'."),
        ({"N": N / 1e9, "D": D / 1e9}, "that looks like billions; write --columns 'N=1e9*N'."),
        ({"D": D / 1e9}, "D has values from 1 to 100: that looks like billions of tokens"),
        ({"D": D / 1e6}, "D has values from 1000 to 1e+05: that looks like millions of tokens"),
        ({"D": D / 1e12}, "that looks like trillions of tokens; write --columns 'D=1e12*D'."),
        ({"N": np.log10(N)}, "that looks like a logarithm to base 10; write --columns 'N=10**N'."),
        ({"N": np.where(N > 1e8, N, N / 1e6)}, "its rows are in different units"),
        ({"loss": np.exp(3 * RUNS["loss"])}, "that looks like a perplexity; write --columns 'loss=log(loss)'."),
        (
            {"C": RUNS["C"] / 1e18},
            "is in another unit. If it is C, scale it, as in --columns 'C=1e18*C'",
        ),
        ({"D": D / 1e5, "C": RUNS["C"]}, "steps become tokens by D=STEPS*BATCH*CONTEXT"),
        ({"loss": 2.5}, "loss is 2.5 in every row: chinchilla cannot be fitted unless it varies."),
        ({"N": 1e8, "C": np.nan}, "N is 1e+08 in every row"),
        ({"loss": np.nan}, "loss holds no number in any row."),
        ({"loss": "none"}, "loss holds no number in any row."),
        ({"loss": np.log(RUNS["loss"]) - 1}, "Is it a logarithm? Then write loss=exp(loss)"),
        ({"loss": np.where(N < 2e7, RUNS["loss"], 0.0)}, "loss is not positive in 12 of 16 rows (row 1: 0"),
        ({"loss": np.where(np.arange(16) == 5, 1e-9, RUNS["loss"])}, "loss goes down to 1e-09, with a median of"),
        ({"loss": np.where(np.arange(16) == 5, -1.0, RUNS["loss"])}, "not positive in 1 of 16 rows (row 5: -1)"),
    ],
)
def test_mistakes_of_published_tables_get_a_sentence(tmp_path, change, sentence) -> None:
    if "C" not in change:
        change = change | {"C": np.nan}
    frame = RUNS.assign(**change)
    assert sentence in faulty(tmp_path, frame.drop(columns="C") if frame["C"].isna().all() else frame)


def test_few_tokens_are_believed_where_a_counted_compute_agrees_with_them(tmp_path) -> None:
    small = surface(N / 1e3, D / 1e6, noise=0.003)
    assert small["D"].min() == 1e3
    assert "looks like" in faulty(tmp_path, small.drop(columns="C", errors="ignore"))
    counted = small.assign(C=7 * small["N"] * small["D"])
    assert not [v for v in check_table(read_table(write(tmp_path, counted))) if v.severity == "refuse"]
    assert "looks like" in faulty(tmp_path, counted.assign(C=counted["C"] / 1e6))


def test_compute_in_another_unit_is_found_where_tokens_come_from_it(tmp_path) -> None:
    message = faulty(tmp_path, RUNS.assign(C=RUNS["C"] / 8.64e19).drop(columns="D"))
    assert "it is not in FLOPs" in message
    assert "a petaflop/s-day is 8.64e19" in message


def test_too_few_rows_are_counted_with_what_they_lack(tmp_path) -> None:
    assert "3 usable rows; chinchilla needs at least 6" in faulty(tmp_path, RUNS.iloc[[0, 5, 10]])
    missing = RUNS.assign(loss=RUNS["loss"].where(np.arange(16) < 5))
    assert "5 usable rows (11 of 16 rows lack a number or are excluded)" in faulty(tmp_path, missing)
    assert "2 usable rows; isoflop needs at least 3" in faulty(tmp_path, RUNS.iloc[[0, 5]], law="isoflop")


def test_several_recipes_in_one_table_are_told_apart(tmp_path) -> None:
    both = pd.concat([RUNS.assign(data="a", lr=1e-3), RUNS.assign(data="b", lr=1e-3, loss=1.05 * RUNS["loss"])])
    message = faulty(tmp_path, both)
    assert "differ in loss by 4.9% (median) with data" in message
    assert "--where 'data=a'" in message
    one = keep_rows(read_table(write(tmp_path, both)), {"data": "b"})
    assert check_table(one) == []


def test_a_recipe_whose_name_is_left_empty_is_told_from_the_others(tmp_path) -> None:
    both = pd.concat([RUNS.assign(data=None), RUNS.assign(data="filtered", loss=1.05 * RUNS["loss"])])
    message = faulty(tmp_path, both)
    assert "differ in loss by 4.9% (median) with data" in message
    assert "data: (empty), filtered" in message
    assert "--where 'data=filtered'" in message


def test_settings_seeds_and_small_differences_are_no_recipes(tmp_path) -> None:
    swept = pd.concat([RUNS.assign(lr=lr, loss=RUNS["loss"] * (1 + 50 * lr)) for lr in (1e-3, 2e-3)])
    assert check_table(read_table(write(tmp_path, swept))) == []
    seeds = pd.concat([surface(N, D, noise=0.03, seed=k, seed_=k) for k in range(2)]).rename(columns={"seed_": "seed"})
    assert check_table(read_table(write(tmp_path, seeds))) == []
    doubtful = pd.concat([RUNS.assign(part="a"), RUNS.assign(part="b", loss=1.015 * RUNS["loss"])])
    (verdict,) = check_table(read_table(write(tmp_path, doubtful)))
    assert (verdict.code, verdict.severity) == ("mixed_recipes", "caution")


def test_a_constant_rate_has_no_decayed_area_and_is_no_fault(tmp_path) -> None:
    area, decayed = (a.ravel() for a in np.meshgrid(np.geomspace(1, 100, 8), [0.0, 0.1, 0.3]))
    frame = pd.DataFrame({"S1": area, "S2": decayed * area, "loss": 2 + 0.5 * area**-0.4 - 0.001 * decayed * area})
    assert check_table(read_table(write(tmp_path, frame), law="tissue"), "tissue") == []
    assert "S2 is negative in 8 of 24 rows" in faulty(tmp_path, frame.assign(S2=frame["S2"] - 0.05), law="tissue")


SWEEP = fan()


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (SWEEP.assign(N=SWEEP["N"] / 1e9, D=SWEEP["D"] / 1e9), "that looks like billions; write --columns 'N=1e9*N'"),
        (SWEEP.assign(D=SWEEP["D"] / 1e6), "that looks like millions of tokens"),
        (
            SWEEP.assign(loss=np.exp(1.3 * SWEEP["loss"])),
            "that looks like a perplexity; write --columns 'loss=log(loss)'",
        ),
        (SWEEP.assign(loss=np.log(SWEEP["loss"]) - 1.35), "Is it a logarithm?"),
        (
            pd.concat([SWEEP.assign(text="web"), SWEEP.assign(text="code", loss=0.9 * SWEEP["loss"])]),
            "with text, which no law",
        ),
    ],
)
def test_sweeps_in_other_units_or_of_two_recipes_are_refused(tmp_path, monkeypatch, capsys, table, sentence) -> None:
    assert sentence in faulty(tmp_path, table, law="sensitivity")
    monkeypatch.setattr(sys, "argv", ["escala", "sensitivity", str(tmp_path / "runs.csv")])
    with pytest.raises(SystemExit) as end:
        escala.main()
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_sound_sweeps_pass_though_of_one_size_of_several_shapes_and_with_runs_that_failed(tmp_path) -> None:
    one = SWEEP[SWEEP["N"] == SWEEP["N"].min()]
    shapes = pd.concat([one.assign(width=64), one.assign(width=128, loss=1.1 * one["loss"])])
    decays = pd.concat([one.assign(weight_decay=0.1), one.assign(weight_decay=0.2, loss=1.1 * one["loss"])])
    failed = SWEEP.assign(loss=np.where(np.arange(len(SWEEP)) == 3, -1.0, SWEEP["loss"]))
    state = ["diverged"] * (len(SWEEP) // 2 + 1) + ["finished"] * (len(SWEEP) - len(SWEEP) // 2 - 1)
    diverged = SWEEP.assign(state=state, loss=np.where(np.array(state) == "diverged", 1e4, SWEEP["loss"]))
    ways = pd.concat([one.assign(parametrisation="mup"), one.assign(parametrisation=None, loss=1.1 * one["loss"])])
    for table in (one, shapes, decays, ways, failed, diverged):
        assert check_table(read_table(write(tmp_path, table), law="sensitivity"), "sensitivity") == []


# --- published tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "columns", "where", "rows"),
    [
        ("chinchilla-epoch/svg_extracted_data.csv", {}, {}, 245),
        ("datablations/runs_fit182.csv", {}, {}, 182),
        ("gadre-overtraining/runs.csv", {"loss": "loss_c4_val"}, {"train_dataset": "rpj"}, 35),
        ("isoflop-marin/isoflop-comma.csv", {}, {}, 92),
        ("isoflop-marin/isoflop-dclm.csv", {}, {}, 85),
        ("isoflop-marin/isoflop-nemotron.csv", {}, {}, 96),
        ("isoflop-marin/isoflops.csv", {}, {"dataset": "comma"}, 85),
        ("misfitting/scaling_results_last_ckpt_only.csv", {}, {}, 261),
        ("misfitting/scaling_results.csv", {}, {"portion_steps_elapsed": "1.0"}, 261),
        ("obs-scaling/base_llm_benchmark_eval.csv", {"loss": "1-MMLU"}, {}, 148),
        ("step-law-dense/dense_lr_bs_loss.csv", {"loss": "smooth loss", "batch_tokens": "2048*bs"}, {}, 1911),
    ],
)
def test_published_tables_are_read_as_they_are(path, columns, where, rows) -> None:
    table = keep_rows(read_table(published(path), columns), where)
    check_table(table)
    assert len(table) == rows
    ratio = (table["C"] / (6.0 * table["N"] * table["D"])).median()
    assert 0.5 < ratio < 2.0
    assert 0.1 < (table["D"] / table["N"]).median() < 1e4


@pytest.mark.parametrize(
    ("path", "columns", "words"),
    [
        ("porian-isoflop/isoflop_points.csv", {}, "with decay, "),
        ("isoflop-marin/isoflops.csv", {}, "--where 'dataset=comma'"),
        ("gadre-overtraining/runs.csv", {"loss": "loss_c4_val"}, "with train_dataset,"),
        ("step-law-dense/dense_lr_bs_loss.csv", {"loss": "smooth loss"}, "with bs"),
        ("gadre-overtraining/runs.csv", {}, "loss (could be loss_openlm"),
        ("obs-scaling/base_llm_benchmark_eval.csv", {}, "lacks loss"),
    ],
)
def test_published_tables_that_need_a_word_more_say_which(path, columns, words) -> None:
    with pytest.raises(InputError) as caught:
        check_table(read_table(published(path), columns))
    assert words in str(caught.value)
