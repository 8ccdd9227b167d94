"""Stores to analyse: real files, written through the store's own functions, with losses from a known law."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.laws import CHINCHILLA
from sweeps.records import append_rows, write_json
from sweeps.store import begin_attempt, commit_result, open_store, record_error
from tests.analysis.closed import closed_form

LAW = {"E": 1.0, "A": 31.5, "B": 151.0, "alpha": 0.40, "beta": 0.40}
"""N* near 20 thousand parameters at 1.5e11 FLOPs; both exponents of the optimum are near one half."""
BUDGETS = (1.2e11, 4e11, 1.3e12, 4.3e12)
CORPUS = {
    "fingerprint": "0123456789abcdef",
    "name": "pystdlib",
    "tokenizer": "bytes",
    "vocab_size": 256,
    "train_tokens": 40_000_000,
    "validation_tokens": 400_000,
    "validation_bytes": 400_000,
    "validation_documents": 40,
    "train_documents": 800,
    "entropy_rate": None,
    "description": "pystdlib, Python 3.11.7",
}


@dataclass(frozen=True)
class Run:
    """One cell to write: where it stands, and what became of it."""

    width: int
    depth: int = 2
    budget: float | None = None
    tokens: int | None = None
    seed: int = 0
    state: str = "finished"
    family: str = "llama"
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the identity (or of its optimizer) that differ from the usual."""
    loss: float | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)


def grid(
    budgets: Sequence[float] = BUDGETS, sizes: int = 5, seeds: int = 1, replicated: int = 0, family: str = "llama"
) -> list[Run]:
    """An isoFLOP grid around the optimum of LAW: widths in steps of about two in N; seeds at every size of the
    first `replicated` budgets."""
    runs = []
    for order, budget in enumerate(budgets):
        centre = 24.0 * (budget / 1.2e11) ** 0.27
        for step in range(sizes):
            width = max(8, 2 * round(centre * 2 ** (0.5 * (step - sizes // 2)) / 2))
            count = seeds if order < replicated else 1
            runs += [Run(width=width, budget=budget, seed=seed, family=family) for seed in range(count)]
    return runs


def record(run: Run) -> dict[str, Any]:
    """The record of a cell with the arithmetic of a small transformer: head and attention count as FLOPs."""
    context, vocab, batch = 128, 256, 512
    body = 12 * run.depth * run.width**2
    N = body + vocab * run.width
    per_token = 6 * N + 6 * run.depth * run.width * context * 2
    if run.tokens is None:
        assert run.budget is not None
        tokens = max(1, round(run.budget / per_token / batch)) * batch
    else:
        tokens = run.tokens
    identity: dict[str, Any] = {
        "numerics_version": 1,
        "family": run.family,
        "family_version": "1",
        "options": {},
        "shape": {"width": run.width, "depth": run.depth, "heads": 2, "mlp_width": 4 * run.width, "context": context},
        "init_std": 0.02,
        "corpus": CORPUS["fingerprint"],
        "tokenizer": "bytes",
        "tokens": tokens,
        "batch_tokens": batch,
        "optimizer": {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95},
        "schedule": {"name": "cosine", "warmup_tokens": tokens // 20, "final_fraction": 0.1, "cooldown_fraction": 0.0},
        "precision": "float32",
        "seed": run.seed,
        "data_seed": 0,
    }
    for key, value in run.changes.items():
        (identity["optimizer"] if key in identity["optimizer"] else identity)[key] = value
    counts = {
        "N": N,
        "N_nonembedding": body,
        "N_nonembedding_head": N,
        "N_total": N,
        "flops_per_token": per_token,
        "C": per_token * tokens,
        "C_6nd": 6 * N * tokens,
        "steps": tokens // batch,
        "epochs": tokens / CORPUS["train_tokens"],
    }
    key = repr((run.family, run.width, run.depth, tokens, run.seed, sorted(run.changes.items())))
    name = hashlib.sha256(key.encode()).hexdigest()
    return {"format": 1, "id": name[:16], "identity": identity, "counts": counts}


def write_study(
    root: Path,
    runs: Sequence[Run],
    *,
    name: str = "demo",
    noise: float = 0.003,
    law: Mapping[str, float] = LAW,
    question: str = "How should compute be split between parameters and tokens?",
    quarantine: Mapping[int, str] | None = None,
) -> Path:
    """Write a store that holds one study; returns its root. Losses are the law's times a lognormal seed noise."""
    store = open_store(root)
    entries, ids = [], []
    for order, run in enumerate(runs):
        cell = record(run)
        generator = np.random.default_rng([order, run.seed])
        write_json(store.cell(cell["id"]) / "cell.json", cell, sync=False)
        labels = {"budget": run.budget, "size": float(cell["counts"]["N"]), **run.labels}
        entries.append({"id": cell["id"], "labels": {k: v for k, v in labels.items() if v is not None}})
        ids.append(cell["id"])
        if run.state == "planned":
            continue
        attempt = begin_attempt(store, cell["id"], {"numerics": {"device": "cpu"}})
        if run.state == "failed":
            record_error(attempt, "code", "ValueError: it broke")
            continue
        if run.state == "running":
            continue
        N, D = cell["counts"]["N"], cell["identity"]["tokens"]
        loss = run.loss or float(CHINCHILLA({"N": N, "D": D}, law) * np.exp(noise * generator.standard_normal()))
        with (attempt.folder / "log.jsonl").open("ab", buffering=0) as stream:
            append_rows(stream, _log(cell, loss, law, generator))
        weights = generator.integers(2_000, 20_000, 40)
        hardness = np.random.default_rng(7).normal(0.0, 0.15, 40) + generator.normal(0.0, 0.004, 40)
        sums = weights * (loss + hardness - (weights * hardness).sum() / weights.sum())
        np.savez(attempt.folder / "documents.npz", loss_sum=sums, tokens=weights)
        finished = run.state == "finished"
        commit_result(
            attempt,
            {
                "state": run.state,
                "reason": None if finished else "the loss is not finite",
                "val_loss_final": loss if finished else None,
                "val_bpb_final": loss / np.log(2) if finished else None,
                "loss_at_start": 5.5,
                "tokens": D,
                "flops": cell["counts"]["C"],
                "steps": cell["counts"]["steps"],
                "epochs": cell["counts"]["epochs"],
                "seconds": {"build": 0.1, "train": 10.0, "evaluate": 0.5, "total": 10.6},
                "tokens_per_second": D / 10.0,
            },
        )
    plan = {"format": 1, "study": {"name": name, "question": question}, "corpus": CORPUS, "cells": entries}
    write_json(store.study(name) / "plan.json", plan, sync=False)
    if quarantine:
        marks = {
            ids[i]: {"why": why, "who": "a person", "when": "2025-01-01T00:00:00Z"} for i, why in quarantine.items()
        }
        write_json(store.study(name) / "quarantine.json", marks, sync=False)
    return root


def _log(
    cell: dict[str, Any], loss: float, law: Mapping[str, float], generator: np.random.Generator
) -> list[dict[str, Any]]:
    N, D, per_token = cell["counts"]["N"], cell["identity"]["tokens"], cell["counts"]["flops_per_token"]
    rows = []
    for share in np.geomspace(0.01, 1.0, 12):
        tokens = int(D * share)
        here = float(CHINCHILLA({"N": N, "D": tokens}, law)) + (loss - float(CHINCHILLA({"N": N, "D": D}, law)))
        here = min(here, 5.5)
        metrics = {
            "train_loss": here + 0.02 * generator.standard_normal(),
            "val_loss": here,
            "learning_rate": 0.01 * share,
        }
        metrics |= {"flops": per_token * tokens, "tokens_per_second": 1e5}
        if share == 1.0:
            metrics["val_loss_final"] = loss
        rows.append({"time": 1.7e9 + tokens, "tokens": tokens, "metrics": metrics})
    return rows


def published(relative: str) -> Path:
    """A published data set: under $ESCALA_DATA, else beside the repository; the test is skipped without it."""
    root = Path(os.environ.get("ESCALA_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    path = root / relative
    if not path.exists():
        pytest.skip(f"published data not here: {path} (set ESCALA_DATA to its folder)")
    return path


def surface(
    N: Any, D: Any, law: Mapping[str, float] = LAW, *, noise: float = 0.0, seed: int = 0, **columns: Any
) -> pd.DataFrame:
    """A bare table of runs on the law's surface, one row per element of N and D, with lognormal noise."""
    N, D = np.broadcast_arrays(np.asarray(N, dtype=float), np.asarray(D, dtype=float))
    loss = CHINCHILLA({"N": N, "D": D}, law) * np.exp(noise * np.random.default_rng(seed).standard_normal(N.shape))
    return pd.DataFrame(
        {"N": N.ravel(), "D": D.ravel(), "C": 6.0 * N.ravel() * D.ravel(), "loss": loss.ravel()} | columns
    )


def budgets_table(
    budgets: Sequence[float],
    *,
    law: Mapping[str, float] = LAW,
    reach: float = 4.0,
    shift: float = 1.0,
    sizes: int = 7,
    seeds: int = 1,
    noise: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """IsoFLOP runs under C = 6 N D: `sizes` sizes within `reach` of the optimum times `shift`."""
    rows = []
    for C in budgets:
        best = float(closed_form(C, law).N) * shift
        N = np.repeat(best * np.geomspace(1 / reach, reach, sizes), seeds)
        rows.append(pd.DataFrame({"N": N, "budget": C, "seed": np.tile(np.arange(seeds), sizes)}))
    table = pd.concat(rows, ignore_index=True)
    filled = surface(table["N"], table["budget"] / 6.0 / table["N"], law, noise=noise, seed=seed)
    return filled.assign(budget=table["budget"], seed=table["seed"])


def codes(fit: Any, severity: str | None = None) -> set[str]:
    """The codes of a fit's verdicts, of one severity if named."""
    return {v.code for v in fit.verdicts if severity in (None, v.severity)}


def interpolated_budgets(runs: pd.DataFrame, count: int = 20) -> pd.DataFrame:
    """Each size's ln loss, linear in ln C between its horizons, at budgets spread over the runs."""
    rows = []
    for C in np.geomspace(runs["C"].min(), runs["C"].max(), count + 2)[1:-1]:
        for N, own in runs.sort_values("C").groupby("N"):
            if len(own) > 1 and own["C"].min() <= C <= own["C"].max():
                y = np.interp(np.log(C), np.log(own["C"]), np.log(own["loss"]))
                rows.append({"N": N, "D": C / (6.0 * N), "C": C, "budget": C, "loss": np.exp(y)})
    return pd.DataFrame(rows)
