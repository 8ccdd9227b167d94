"""The report's last sections: every cell, how far off its planned time was, and where it all comes from."""

from collections.abc import Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd

from analysis import page, plots
from analysis.uncertainty import SETTINGS
from sweeps.records import timestamp
from sweeps.units import flops, human, plural

MAX_CELLS = 1000
"""Rows of the table of cells; a page with more cannot be read."""
ID_DIGITS = 8
"""Digits of a cell's id that are shown, more where these do not tell the cells apart; every verb takes them."""
_MORE = (*(name for name in SETTINGS if name != "learning_rate"), "trial", "rung")
"""Columns that are shown where they differ between the cells."""


def cells_section(runs: pd.DataFrame) -> str:
    """Every cell, up to `MAX_CELLS`, with its id, recipe, loss, time and state; no column of which nothing is known."""
    differ = [name for name in _MORE if runs[name].nunique(dropna=False) > 1]
    digits = ID_DIGITS
    while runs["cell"].str[:digits].nunique() < runs["cell"].nunique():
        digits += 1
    rows = []
    for row in runs.head(MAX_CELLS).to_dict("records"):
        rows.append(
            [
                escape(row["cell"][:digits]),
                escape(str(row["family"])),
                *(human(row["N"]), human(row["D"]), flops(row["C"]), page.number(row["tokens_per_parameter"], 3)),
                *(page.number(row["learning_rate"], 3), page.number(row["adamw_timescale"], 3)),
                *(page.written(row[name]) for name in differ),
                _whole(row["steps"]),
                *(
                    page.number(row["epochs"], 2),
                    _whole(row["seed"]),
                    page.plain(row["val_loss_final"], "{:.4f}".format),
                    page.number(row["seconds"], 3),
                    page.number(row["seconds_predicted"], 3),
                ),
                escape(str(row["excluded"] or row["state"])),
            ]
        )
    head = ["cell", "family", "N", "D", "C (FLOPs)", "tokens per parameter", "learning rate", "AdamW timescale"]
    head += [name.replace("_", " ") for name in differ]
    head += ["steps", "epochs", "seed", "final loss", "seconds", "planned", "state"]
    told = [order for order in range(len(head)) if not rows or any(row[order] != page.DASH for row in rows)]
    head, rows = [head[order] for order in told], [[row[order] for order in told] for row in rows]
    more = f"<p class=note>The first {MAX_CELLS} of {len(runs)} cells.</p>" if len(runs) > MAX_CELLS else ""
    note = (
        "<p class=note>The AdamW timescale is batch tokens / (learning rate x weight decay x D), as a fraction of the "
        "run. Losses are nats per token.</p>"
    )
    return f"<h2>Cells</h2>{note}" + page.table(head, rows) + more


def times_section(runs: pd.DataFrame) -> str:
    """How far off the plan's times were; nothing where none were planned. A resumed cell's last attempt is a part."""
    timed = runs[runs["seconds"].notna() & runs["seconds_predicted"].notna() & (runs["attempts"] == 1)]
    if timed.empty:
        return ""
    ratio = timed["seconds"] / timed["seconds_predicted"]
    total = timed["seconds"].sum() / timed["seconds_predicted"].sum()
    words = (
        f"<p>The times that were planned are off by <b>{(1 / ratio - 1).abs().median():.0%}</b> (median of "
        f"{plural(len(timed), 'cell')} that ended at the first attempt, relative to the time taken); together they "
        f"took {total:.2f} times what was planned, and apart from that factor the median is "
        f"{(ratio.median() / ratio - 1).abs().median():.0%}.</p>"
    )
    caption = "Seconds taken by each cell against the seconds planned. On the line a plan is met."
    return "<h2>Planned and real time</h2>" + words + page.picture(plots.times(timed), caption)


def _whole(number: float) -> str:
    """A count; a dash where a foreign run does not tell it."""
    return f"{int(number):,}" if np.isfinite(number) else page.DASH


def provenance_section(plan: Mapping[str, Any], runs: pd.DataFrame) -> str:
    """Corpus, states, compute and versions: what the page rests on."""
    corpus = plan.get("corpus", {})
    states = runs["state"].value_counts()
    left_out = runs["excluded"].dropna().value_counts()
    lines = {
        "study": plan["study"].get("name", page.DASH),
        "corpus": f"{corpus.get('description', page.DASH)} (fingerprint {corpus.get('fingerprint', page.DASH)})",
        "tokenizer": f"{corpus.get('tokenizer', page.DASH)}, vocabulary {corpus.get('vocab_size', page.DASH)}",
        "tokens": f"{corpus.get('train_tokens', 0):,} to train on, {corpus.get('validation_tokens', 0):,} to validate "
        f"on ({corpus.get('validation_documents', 0):,} documents)",
        "cells": f"{len(runs)} planned: " + ", ".join(f"{count} {state}" for state, count in states.items()),
        "left out of fits": "; ".join(f"{count} {why}" for why, count in left_out.items()) or "none",
        "training time": f"{runs['seconds'].sum() / 3600:.2f} worker-hours (of the attempts that ended the cells), "
        f"{_compute(runs)}",
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("escala", "numpy", "scipy", "pandas")),
        "written": timestamp(),
    }
    if plan.get("foreign"):
        lines |= dict.fromkeys(("corpus", "tokenizer", "tokens"), "unknown: these runs were imported from elsewhere")
    rows = [[escape(key), escape(str(value))] for key, value in lines.items()]
    return "<h2>Where this comes from</h2>" + page.table(None, rows, kind="facts")


def _compute(runs: pd.DataFrame) -> str:
    """The compute of a study, and where cells share trunks also what it costs."""
    planned, spent = float(runs["C"].sum()), float(runs["C_spent"].sum())
    shared = runs["trunk"].duplicated().any()
    return f"{flops(planned)} FLOPs planned" + (f", {flops(spent)} spent: cells share trunks" if shared else "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "from source"
