"""A cell as a row: what the tables of a study and the frames of its analysis both tell of it. Needs no torch."""

from collections.abc import Mapping
from typing import Any

from sweeps.rules import adamw_timescale
from sweeps.store import spent_flops


def cell_row(
    entry: Mapping[str, Any], record: Mapping[str, Any], result: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Of a cell's `entry` in the plan, its `record` (as `foreign.described` tells it) and its `result`, if it has one.
    None where something is not known, as of a run from elsewhere."""
    identity, counts = record["identity"], record["counts"]
    tokens, batch = identity["tokens"], identity["batch_tokens"]
    rate, decay = identity["optimizer"].get("learning_rate"), identity["optimizer"].get("weight_decay")
    scaled = identity.get("parametrisation", {"kind": "standard"})
    spent = spent_flops(dict(entry), dict(counts), None if result is None else dict(result))
    return {
        "family": identity["family"],
        **{name: counts[name] for name in ("N", "N_nonembedding", "N_nonembedding_head", "N_total")},
        "D": tokens,
        **{name: counts[name] for name in ("C", "C_6nd", "steps", "epochs")},
        "C_spent": identity.get("C_spent") or spent,  # of a run from elsewhere, where its table tells it
        "tokens_per_parameter": tokens / counts["N"],
        "learning_rate": rate,
        "weight_decay": decay,
        "batch_tokens": batch,
        "adamw_timescale": adamw_timescale(rate, decay, batch, tokens),
        "parametrisation": scaled["kind"],
        "seed": identity["seed"],
        "val_loss_final": (result or {}).get("val_loss_final"),
    }
