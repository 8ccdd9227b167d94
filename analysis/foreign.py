"""Tables of finished runs as rows that a store can keep: what each number is, and under which convention.

The failure it guards against: non-embedding and total parameters, or counted and assumed compute, put beside each
other as if they were one. Which N and which C a table holds is asked, or read from its columns' names, all of which
`escala export` writes; else it says "unknown".
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.conventions import SIZES
from analysis.runs import MAX_EPOCHS
from analysis.tables import keep_rows, read_table
from analysis.uncertainty import SEEDS, exclusions
from sweeps.errors import InputError
from sweeps.records import write_bytes

_KEPT = (
    *("N", "D", "C", "loss", "budget", "seed", "data_seed", "learning_rate", "weight_decay", "beta2"),
    *("batch_tokens", "warmup_tokens", "precision"),
)
_ALSO = ("family", "corpus", "tokenizer", "context", "steps", "epochs", "width", "depth", "heads", "mlp_width")
"""Kept under these very names only."""
_NONEMBEDDING = ("non_embedding", "nonembedding", "non-embedding")


def read_foreign(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    *,
    n_is: str | None = None,
    c_is: str | None = None,
) -> tuple[list[dict[str, Any]], dict[str, str], list[int]]:
    """The ended runs of a table: (rows, conventions, numbers of rows that were left out).

    path, columns: as `read_table` takes them; where: as `keep_rows` does. n_is: what N counts, one of `SIZES`.
    c_is: "C", counted operation by operation, or "C_6nd". A row is {"run": {"N", "D", "C", "loss", ...}, "row": the
    raw row}, with N in parameters, D in tokens, C in FLOPs (6 N D where the table has none) and loss in nats per token.
    A row without a positive N, D, C and loss, or whose `state` is not finished, is no finished run and is left out, as
    is one that the table's column `excluded` takes out of fits; it is named by its number, from 1. A row of a run that
    diverged stays, with "state" in its run, and needs no loss.
    Raises InputError where the table cannot be read or holds no finished run.
    """
    for option, value, allowed in (("--n-is", n_is, SIZES), ("--c-is", c_is, ("C", "C_6nd"))):
        if value is not None and value not in allowed:
            raise InputError(f"{option}: found {value!r}; allowed: {', '.join(allowed)}.")
    given = dict(columns or {})
    sizes = {name: given.pop(name) for name in list(given) if name in SIZES and name != "N"}
    if sizes:
        raise InputError(f"--columns: {', '.join(sizes)} cannot be renamed; use N=COLUMN and say --n-is {min(sizes)}.")
    table = keep_rows(read_table(path, given, "chinchilla"), where or {})
    taken = table.attrs.get("columns", {})
    conventions = {"N": n_is or _counted(table, taken.get("N", "")), "C": c_is or _computed(table, taken)}
    words = [c for c in (*SEEDS, "context") if c in table.columns and not pd.api.types.is_numeric_dtype(table[c])]
    names = [name for name in (*_KEPT, *_ALSO, *SIZES) if name in table.columns and name not in words]
    needed = table[["N", "D", "C", "loss"]].astype("float64")
    known = (needed > 0) & np.isfinite(needed)
    whole = known.all(axis=1)
    whole &= table["state"].isin(("finished", "")) if "state" in table.columns else True
    reasons = exclusions(table)  # repeats, by `epochs`, are excluded again by whoever reads the study
    whole &= reasons.isna() | (table["epochs"] > MAX_EPOCHS if "epochs" in table.columns else False)
    diverged = table["state"].eq("diverged") if "state" in table.columns else pd.Series(False, table.index)
    diverged &= known[["N", "D", "C"]].all(axis=1) & reasons.astype(str).str.startswith("diverged")
    if not whole.any():
        raise InputError(
            f"{path} holds no finished run: no row has a positive N, D, C and loss, is finished and is not excluded."
        )
    raw = table.drop(columns=["C_assumed", "excluded"], errors="ignore")
    rows = []
    for index in table.index[whole | diverged]:
        run = {name: _plain(table.at[index, name]) for name in names}
        if conventions["N"] in SIZES:
            run[conventions["N"]] = run["N"]
        run["C_assumed"] = bool(table.at[index, "C_assumed"])
        if diverged[index]:
            run |= {"state": "diverged", "loss": run["loss"] if known.at[index, "loss"] else None}
        row = {str(key): _plain(value) for key, value in raw.loc[index].items() if key != "cell" or not _numbered(raw)}
        rows.append({"run": {k: v for k, v in run.items() if v is not None}, "row": row})
    return rows, conventions, [int(index) + 1 for index in table.index[~(whole | diverged)]]


def _numbered(table: pd.DataFrame) -> bool:
    """Whether `cell` is the number that `read_table` gave the row: it says where it stands, not what it is."""
    return bool(table["cell"].astype(str).str.fullmatch(r"row \d+").all())


def _counted(table: pd.DataFrame, column: str) -> str:
    """Which N a column's name speaks of: N that stands beside every other count is that of `load_runs`."""
    if column in SIZES and (column != "N" or all(c in table and table[c].notna().all() for c in SIZES)):
        return column
    words = column.lower().replace(" ", "_")
    if any(part in words for part in _NONEMBEDDING):
        return "N_nonembedding"
    return "N_total" if "total" in words else "unknown"


def _computed(table: pd.DataFrame, taken: Mapping[str, str]) -> str:
    """C_6nd where C was made from N and D, or D or N from it; C where 6 N D stands beside it and is another."""
    if table["C_assumed"].all() or any("6*" in taken.get(name, "") for name in ("N", "D", "C")):
        return "C_6nd"
    if taken.get("C") != "C" or "C_6nd" not in table or not pd.api.types.is_numeric_dtype(table["C_6nd"]):
        return "unknown"
    return "C_6nd" if np.allclose(table["C"].astype(float), table["C_6nd"]) else "C"


def _plain(value: Any) -> Any:
    """A table's value as JSON: numbers, text, truth; None for what is missing."""
    if isinstance(value, list | tuple | dict | np.ndarray):
        return str(value)
    if value is None or pd.isna(value):
        return None
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else str(value)
    return str(value)


WRITTEN = (".csv", ".parquet")


def check_written(path: Path) -> None:
    """InputError where a table cannot be written under this name."""
    if path.suffix.lower() not in WRITTEN:
        raise InputError(f"{path}: a table is written as {' or '.join(WRITTEN)}, by the ending of its name.")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "cannot be written to" if above.is_dir() else "is a file, not a folder"
        raise InputError(f"cannot write {path}: {above} {what}. Name another place.")


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame as CSV or Parquet, by the file's name. InputError for another ending, or where it cannot be."""
    check_written(path)
    parquet = path.suffix.lower() == ".parquet"
    write_bytes(path, frame.to_parquet(index=False) if parquet else frame.to_csv(index=False).encode())
