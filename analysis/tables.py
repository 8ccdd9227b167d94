"""Tables of runs from anywhere: CSV, Parquet, JSON lines, with the columns named and counted as their authors did.

The failure it guards against: a number in another unit fits without complaint. Parameters in billions, perplexities,
logarithms, steps in place of tokens, or ten recipes in one file all give a curve, exponents and intervals. So what a
column was taken for is written down (`attrs["columns"]`), and `plausibility` refuses what cannot be runs of one recipe.
"""

import difflib
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.expressions import evaluate
from analysis.laws import find_law
from analysis.runs import LABELS, MAX_EPOCHS, NUMBERS
from analysis.selection import with_states
from analysis.uncertainty import SEEDS, exclusions
from analysis.written import UNITS, numbers_of, parsed
from sweeps.errors import InputError, nearest

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".csv.gz", ".jsonl.gz")
MOST_BYTES = 4 * 2**30
"""Of a table, unpacked."""
ISOFLOP_LEAST = 3
"""Runs below which not even one budget has a parabola."""

SWEEP_LEAST = 3
"""Learning rates below which there is no quadratic."""

NAMES: Mapping[str, tuple[str, ...]] = {
    "N": (
        *("n", "params", "n_params", "num_params", "nparams", "parameters", "n_parameters", "num_parameters"),
        *("parameter_count", "param_count", "params_count", "model_size", "model_params", "model_parameters"),
        *("total_params", "total_parameters", "non_embedding_params", "n_non_embedding"),
    ),
    "D": (
        *("d", "tokens", "n_tokens", "num_tokens", "ntokens", "training_tokens", "train_tokens", "total_tokens"),
        *("token_count", "tokens_seen", "tokens_trained", "n_train_tokens", "data_size", "dataset_size"),
        *("training_data_size", "pretraining_data_size", "pretraining_tokens"),
    ),
    "C": (
        *("c", "flops", "flop", "compute", "training_flop", "training_flops", "train_flop", "train_flops"),
        *("total_flops", "total_flop", "training_compute", "train_compute", "compute_flops", "gflops", "total_gflops"),
    ),
    "loss": (
        *("loss", "val_loss_final", "val_loss", "final_loss", "validation_loss", "valid_loss", "eval_loss"),
        *("final_val_loss", "final_validation_loss", "final_eval_loss", "test_loss", "macro_loss", "smooth_loss"),
        *("train_loss", "training_loss", "final_train_loss"),
        *("perplexity", "ppl", "val_perplexity", "val_ppl", "validation_perplexity", "eval_perplexity"),
    ),
    "accuracy": ("accuracy", "acc"),
    "error": ("error", "err", "error_rate"),
    "budget": ("budget", "flop_budget", "flops_budget", "compute_budget"),
    "U": ("u", "unique_tokens", "n_unique_tokens", "tokens_unique"),
    "experts": ("experts", "n_experts", "num_experts", "expert_count"),
    "S1": ("s1",),
    "S2": ("s2",),
    "x": ("x",),
    "seed": ("seed", "run_seed", "random_seed"),
    "data_seed": ("data_seed",),
    "learning_rate": ("learning_rate", "lr", "peak_lr", "max_lr", "peak_learning_rate", "max_learning_rate"),
    "weight_decay": ("weight_decay", "wd"),
    "beta2": ("beta2", "adam_beta2"),
    "batch_tokens": ("batch_tokens", "tokens_per_batch", "batch_size_tokens"),
    "warmup_tokens": ("warmup_tokens",),
    "loss_at_start": ("loss_at_start", "initial_loss", "init_loss"),
    "precision": ("precision",),
    "state": ("state",),
}
"""What a fit knows, and the names that published tables give it, without case, in the order of preference."""
SHORT: Mapping[str, str] = {"lr": "learning_rate", "batch": "batch_tokens", "wd": "weight_decay"}
"""What may be typed for some of them."""
_TEXT = ("precision", "state")
_RARE = ("U", "experts", "S1", "S2", "x")
"""Read only for a law that needs them: elsewhere an `x` is a coordinate of somebody's figure."""
_MEASURED = ("loss", "accuracy", "error")
_COMPUTED = tuple(
    name for name in dict.fromkeys((*NAMES, *NUMBERS)) if name not in (*_RARE, *_MEASURED, *_TEXT, *SEEDS)
)
"""What the analysis computes with wherever a table has it, whether or not a law needs it. Seeds may be words."""


def read_table(path: str | Path, columns: Mapping[str, str] | None = None, law: str = "chinchilla") -> pd.DataFrame:
    """Any CSV, TSV, Parquet or JSON-lines table of finished runs, with the columns that a law needs under our names.

    columns: what to read from where, such as {"N": "params", "D": "C/(6*N)", "loss": "log(ppl)"}: a column's name, or
        arithmetic on columns (`analysis.expressions`). A name in arithmetic means another entry of `columns` first,
        then a column of the table, then what would be found for it without `columns`.
        lr, batch and wd are short for learning_rate, batch_tokens and weight_decay.
    law: a name of `analysis.laws`, or "isoflop", "akima" or "sensitivity"; its variables and response must be found.

    What `columns` does not name is found under the common names of `NAMES`, without regard to case, blanks and the
    path before the last `/` or `.`; an exact match wins. A unit in the name, as in `Model Size (B)`, `tokens_b` or
    `total_gflops`, scales the numbers. D is C / (6 N) where only C is there, N likewise; where C is missing it is the
    budget, else 6 N D, and the column `C_assumed` says that. Numbers may be written 124M or 1,300,000. What the
    analysis computes with is numbers, with NaN for words; where such a column holds words alone, it is kept as
    `NAME as written`. `excluded` is a reason, or empty for a row that counts. Other columns are kept as they are;
    `cell` is the row's number, from 0. `attrs["columns"]` tells what was taken for what.
    Where unique tokens or a column `epochs` say that a run repeats its data more than `MAX_EPOCHS` times, `excluded`
    takes it out of laws that do not know repeats, as in `load_runs`. So does a `state` that is not finished.

    N in parameters, D and U in tokens, C and budget in FLOPs, losses in nats per token.
    Raises InputError where the file is no table, an expression cannot be computed, a needed column cannot be found, or
    numbers have decimal commas.
    """
    path = Path(path)
    table = _read(path)
    variables, response, _ = needs(law)
    given = {SHORT.get(name, name): words for name, words in (columns or {}).items()}
    for name in given:
        if name not in NAMES:
            raise InputError(f"a table's column cannot be read as {name!r}{nearest(name, NAMES)}: {', '.join(NAMES)}.")
    frame, taken = table.copy(), {}
    for name in NAMES:
        if name in _RARE and name not in (*variables, *given):
            continue
        found = _find(name, table, given)
        if found is None or (found[0].isna().all() and name not in (*variables, response, *given)):
            continue
        frame[name], taken[name] = found
    if "seed" in taken and (frame["seed"] % 1 == 0).all():
        frame["seed"] = frame["seed"].astype("int64")
    frame = _typed(frame, taken)
    taken |= _derive(frame, taken)
    missing = [c for c in (*variables, response) if c not in taken]
    if {"N", "D"} <= set(missing) and "C" in taken:
        missing.remove("D")  # follows from C once N is known
    if missing:
        raise InputError(f"{path} {_lack(missing, table, law)}")
    frame["C_assumed"] = "C" not in taken
    if "C" not in taken and {"N", "D"} <= set(taken):
        frame["C"] = 6.0 * frame["N"] * frame["D"]
    if "cell" not in table.columns:
        frame["cell"] = [f"row {i}" for i in range(len(frame))]
    if "U" not in variables and response == "loss" and "N" in variables:
        _exclude_repeats(frame, table)
    frame = with_states(frame)
    frame.attrs["columns"] = taken
    return frame


def needs(law: str) -> tuple[tuple[str, ...], str, int]:
    """(variables, response, fewest runs that can be fitted) of a law, "isoflop" or "sensitivity"; else InputError."""
    if law in ("isoflop", "akima"):
        return ("N", "D"), "loss", ISOFLOP_LEAST
    if law == "sensitivity":
        return ("N", "D", "learning_rate"), "loss", SWEEP_LEAST
    form = find_law(law)
    return tuple(form.variables), form.response, len(form.names) + 1


def _read(path: Path) -> pd.DataFrame:
    suffix = path.name.lower().removesuffix(".gz")
    try:
        _check_size(path, suffix)
        if suffix.endswith(".parquet"):
            table = pd.read_parquet(path)
        elif suffix.endswith((".jsonl", ".ndjson", ".json")):
            table = _read_json(path, lines=not suffix.endswith(".json"))
        else:
            table = pd.read_csv(path, sep="\t" if suffix.endswith(".tsv") else ",", skipinitialspace=True)
    except FileNotFoundError:
        raise InputError(f"no such table: {path}") from None
    except (ValueError, OSError, EOFError, OverflowError, RecursionError) as error:
        reason = str(error).strip() or type(error).__name__
        raise InputError(
            f"{path} cannot be read as a table: {reason}. Tables are {', '.join(SUFFIXES[:6])}, one run a row."
        ) from error
    if table.empty:
        raise InputError(f"{path} has no rows.")
    if not isinstance(table.index, pd.RangeIndex):  # R writes the names of rows without a header of their own
        table = table.reset_index(drop=table.index.name is None)
    table = table.rename(columns=str)
    for name in table.columns:  # a configuration in a column is told from others by its words
        if table[name].dtype == object and table[name].map(_nested).any():
            table[name] = table[name].map(lambda value: str(value) if _nested(value) else value)
    return table


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list | tuple | set | np.ndarray)


def _read_json(path: Path, lines: bool) -> pd.DataFrame:
    try:
        return pd.read_json(path, lines=lines)
    except ValueError as error:
        if "Value is too" not in str(error):  # "big!" or "small": pandas reads no whole number beyond 64 bits
            raise

    def whole(text: str) -> float:
        return int(text) if len(text) < 19 else float(text)

    with gzip.open(path, "rt") if path.name.lower().endswith(".gz") else path.open() as file:
        if not lines:
            return pd.DataFrame(json.load(file, parse_int=whole))
        return pd.DataFrame([json.loads(line, parse_int=whole) for line in file if line.strip()])


def _check_size(path: Path, suffix: str) -> None:
    """Raise ValueError where a table says that it unpacks to more than `MOST_BYTES`: a file of a few kilobytes can."""
    if not path.is_file():
        raise FileNotFoundError(path) if not path.exists() else ValueError("it is no file")
    size = path.stat().st_size
    if suffix.endswith(".parquet"):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as packed:  # at least a number, or a word's place, for each value
            size = 8 * packed.metadata.num_rows * packed.metadata.num_columns
    elif path.name.lower().endswith(".gz"):
        with gzip.open(path) as packed:
            size = 0
            while size <= MOST_BYTES and (block := packed.read(1 << 20)):
                size += len(block)
    if size > MOST_BYTES:
        raise ValueError(f"it holds more than {MOST_BYTES // 2**30} GiB; take the rows and columns that are needed")


# --- which column is what ----------------------------------------------------------------------------------------


def _find(
    name: str, table: pd.DataFrame, given: Mapping[str, str], above: tuple[str, ...] = ()
) -> tuple[Any, str] | None:
    """The values of what a fit knows by `name`, and the words that say where they come from."""
    if name in above:
        raise InputError(f"{' and '.join(above)} are defined by each other; name a column of the table for one.")
    if name not in given:
        return _guess(name, table)
    text = given[name]
    bare = text[1:-1] if len(text) > 2 and text[0] == text[-1] and text[0] in "`'\"" else text
    exact = text if text in table.columns else bare if bare in table.columns else None
    if exact is not None:
        return (table[exact] if name in _TEXT else numbers_of(table[exact])), exact

    def column(word: str) -> Any:
        if word != name and word in given:
            return _found(word)
        if word in table.columns:
            return numbers_of(table[word])
        if word != name and word in NAMES:
            return _found(word)
        raise _unknown(word, table)

    def _found(word: str) -> Any:
        found = _find(word, table, given, (*above, name))
        if found is None:
            raise _unknown(word, table)
        return found[0]

    try:
        values = evaluate(text, column)
    except InputError as error:
        raise InputError(f"{name}={text}: {error}") from None
    return pd.Series(values, table.index, dtype="float64"), text


def _unknown(word: str, table: pd.DataFrame) -> InputError:
    names = list(map(str, table.columns))
    short = SHORT.get(word)
    hint = f' (did you mean "{short}"?)' if short in names else nearest(word, names)
    if len(names) <= LISTED:
        return InputError(f"no column {word!r}{hint}; {_columns(table)}")
    like = difflib.get_close_matches(word, names, n=LISTED, cutoff=0.0)
    return InputError(f"no column {word!r}{hint}; of the {len(names)} there are, most like it: {', '.join(like)}.")


LISTED = 8
"""Columns that are listed where one is unknown; a study's runs have some sixty."""


def _columns(table: pd.DataFrame, most: int = 24) -> str:
    names = list(map(str, table.columns))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"the table has the columns {', '.join(names[:most])}{more}."


def _guess(name: str, table: pd.DataFrame) -> tuple[Any, str] | None:
    """The column with one of the common names."""
    if name in table.columns:
        return (table[name] if name in _TEXT else numbers_of(table[name])), name
    plain = [(column, *_plain(column)) for column in table.columns]
    ways = [{words: (column, scale) for column, words, _, scale in reversed(plain)}]
    ways.append({last: (column, scale) for column, _, last, scale in reversed(plain)})
    if name in ("N", "D", "C", "U"):  # params_b, tokens_millions
        units = [(column, re.fullmatch(f"(.+)_({'|'.join(UNITS)})", last)) for column, _, last, _ in reversed(plain)]
        ways.append({unit[1]: (column, UNITS[unit[2]]) for column, unit in units if unit})
    for way in ways:
        for alias in NAMES[name]:
            if alias not in way:
                continue
            column, scale = way[alias]
            if name in _TEXT:
                return table[column], column
            numbers = numbers_of(table[column])
            if numbers.isna().all():  # a word that means something else here
                continue
            if name == "loss" and alias.endswith(("ppl", "perplexity")):
                with np.errstate(all="ignore"):
                    return np.log(numbers), f"log({quoted(column)})"
            if name == "loss" and _in_bits(column):
                return np.log(2.0) * numbers, f"log(2)*{quoted(column)}"
            if scale != 1.0 and name not in _MEASURED:
                return scale * numbers, f"{scale:g}*{quoted(column)}".replace("e+", "e").replace("e0", "e")
            return numbers, column
    return None


_BRACKET = re.compile(r"\s*[(\[]\s*([^()\[\]]+?)\s*[)\]]$")
"""A unit at the end of a column's name."""
_OTHER_UNIT = re.compile(r"bits?|bytes?|char(acter)?s?|words?|bp[bcw]|%|percent")


def _in_bits(column: str) -> bool:
    """Whether a loss is named in bits per token. InputError where it is per something else than tokens, or in percent:
    no number makes nats per token of that."""
    unit = bracket[1].lower() if (bracket := _BRACKET.search(column.strip())) else ""
    if re.fullmatch(r"(in )?bits?( ?(/|per) ?tok(en)?)?", unit):
        return True
    if any(map(_OTHER_UNIT.fullmatch, re.split(r"[^a-z%]+", unit))):
        raise InputError(
            f"{column} is a loss in {unit}, which is neither nats nor bits per token, so that it cannot be told in "
            "nats per token. Name another column or how to compute it: --columns loss=..."
        )
    return False


def _plain(column: str) -> tuple[str, str, float]:
    """A column's name in plain words, the last part of its path in plain words, and the unit that it names."""
    scale, name = 1.0, column.strip().lower()
    if bracket := _BRACKET.search(name):
        name, unit = name[: bracket.start()], bracket[1].replace("^", "e")
        unit = unit.removeprefix("in ").removesuffix(" tokens").removesuffix(" parameters").removesuffix(" params")
        if unit in UNITS:
            scale = UNITS[unit]
        elif power := re.fullmatch(r"(?:1e|10e|x?10\*\*)(\d{1,2})(?: ?flops?)?", unit):
            scale = 10.0 ** int(power[1])
    last = re.split(r"[/.]", name)[-1]
    words, last = (re.sub(r"[\s_\-/.#]+", "_", text).strip("_") for text in (name, last))
    if scale == 1.0 and re.search(r"(^|_)gflops?$", last):
        scale = 1e9
    return words, last, scale


def quoted(column: str) -> str:
    """A column's name as it is written in arithmetic."""
    return column if column.isidentifier() else f"`{column}`"


def _typed(frame: pd.DataFrame, taken: Mapping[str, str]) -> pd.DataFrame:
    """The frame with numbers where the analysis computes, reasons in `excluded`, and no labels of several types."""
    for name in _COMPUTED:
        if name not in frame.columns or name in taken or pd.api.types.is_numeric_dtype(frame[name]):
            continue
        numbers = numbers_of(frame[name])
        if numbers.notna().any():
            frame[name] = numbers
        elif frame[name].notna().any():  # words: kept to tell recipes apart, under a name that nothing computes with
            frame = frame.rename(columns={name: f"{name} as written"})
    for name in LABELS:
        if name in frame.columns and frame[name].dtype == object:
            text = frame[name].map(lambda value: isinstance(value, str))
            if text.any() and not text[frame[name].notna()].all():  # bf16 and 16, which cannot be sorted
                frame[name] = frame[name].astype(str).where(frame[name].notna(), None)
    if "context" in frame.columns and not pd.api.types.is_numeric_dtype(frame["context"]):
        numbers, _ = parsed(frame["context"])
        if numbers.notna().equals(frame["context"].notna()):  # else a name, which is only compared
            frame["context"] = numbers
    if "excluded" in frame.columns:
        frame["excluded"] = exclusions(frame)
    return frame


def _derive(frame: pd.DataFrame, taken: Mapping[str, str]) -> dict[str, str]:
    """N, D or C from the other two, in place, where C = 6 N D tells them."""
    if "C" not in taken and "budget" in taken:
        frame["C"] = frame["budget"]
        return {"C": "budget"} | _derive(frame, {**taken, "C": "budget"})
    for name, other in (("D", "N"), ("N", "D")):
        if name not in taken and {"C", other} <= set(taken):
            frame[name] = frame["C"] / (6.0 * frame[other])
            return {name: f"C/(6*{other})"}
    return {}


def _exclude_repeats(frame: pd.DataFrame, table: pd.DataFrame) -> None:
    unique = _guess("U", table)
    epochs = next((numbers_of(table[c]) for c in table.columns if _plain(c)[1] in ("epochs", "epoch")), None)
    if unique is not None and "D" in frame.columns:
        epochs = frame["D"] / unique[0]
    if epochs is None or not (epochs > MAX_EPOCHS).any():
        return
    before = frame["excluded"] if "excluded" in frame.columns else pd.Series(None, frame.index, dtype=object)
    reason = f"repeats its data (more than {MAX_EPOCHS} epochs, up to which this law holds; see data_constrained)"
    frame["excluded"] = before.astype(object).where(before.notna() | (epochs <= MAX_EPOCHS) | epochs.isna(), reason)


def _lack(missing: Sequence[str], table: pd.DataFrame, law: str) -> str:
    """What is missing, what might be it, and how to say so."""
    hints = {"N": "param|size", "D": "token|data", "C": "flop|compute", "loss": "loss|nll|entropy|ppl"}
    hints |= {"accuracy": "acc", "error": "err", "U": "uniq", "learning_rate": r"lr|rate|eta\b"}
    words = []
    for name in missing:
        near = [c for c in table.columns if name in hints and re.search(hints[name], c.lower())]
        near = [c for c in near if not parsed(table[c])[0].isna().all()][:6]
        words.append(f"{name} (could be {', '.join(near)})" if near else name)
    example = ",".join(f"{name}={'COLUMN' if name != 'D' else 'C/(6*N)'}" for name in missing)
    return (
        f"lacks {', '.join(words)}, which {law} needs; {_columns(table)} Name what is to be read: --columns "
        f"{example} (in Python columns={{...}}), where arithmetic on columns is allowed."
    )


# --- which rows --------------------------------------------------------------------------------------------------


def keep_rows(table: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """The rows in which every named column equals its value, as a number where the value is one, else as text.

    Raises InputError for an unknown column, and for a value that no row has; the message lists those that there are.
    """
    kept = table
    for column, value in conditions.items():
        if column not in table.columns:
            raise _unknown(column, table)
        text = value[1:-1] if len(value) > 2 and value[0] == value[-1] and value[0] in "`'\"" else value
        same = kept[column].astype(str).str.lower() == text.lower()
        number = pd.to_numeric(text, errors="coerce")
        if not pd.isna(number):
            same |= pd.to_numeric(kept[column], errors="coerce") == float(number)
        if not same.any():
            values = kept[column].dropna().astype(str).unique()
            more = ", ..." if len(values) > 12 else ""
            raise InputError(f"no row has {column}={text}; there are {', '.join(values[:12])}{more}.")
        kept = kept[same]
    return kept
