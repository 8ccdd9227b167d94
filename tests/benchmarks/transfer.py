"""Transfer: the shipped study of widths, standard against mup, and what its runs say. Takes minutes."""

import json
import sys
from typing import Any

from measuring import Place, Row, escala, timed

STUDY = "mup-transfer"
ANALYSIS = """
import json, sys
from analysis.runs import load_runs
from analysis.transfers import transfer
runs = load_runs(sys.argv[1], sys.argv[2])
print(json.dumps({"seconds": runs["seconds"].sum(), "found": [one.to_json() for one in transfer(runs)]}))
"""


def transfer(place: Place) -> list[Row]:
    """Trains the study in a store of its own; prints the slope of log2 best rate against log2 width with interval."""
    store = place.store_with_corpus
    run = escala("run", STUDY, "--store", store, "--workers", 2)
    told = json.loads(timed([sys.executable, "-c", ANALYSIS, STUDY, str(store)]).output)
    return [
        Row(what=f"escala run {STUDY}", measured=run.seconds, unit="s", target=600.0, note="whole process, 2 workers"),
        Row(what="its cells, summed", measured=told["seconds"], unit="s"),
        *map(_row, told["found"]),
    ]


def _row(one: dict[str, Any]) -> Row:
    """Whether the best rate of a parametrisation moves; neither where its runs do not say."""
    kind, slope, (low, high) = one["group"]["parametrisation"], one["slope"]["value"], one["slope"]["interval"]
    note = one["verdicts"][-1]["message"] if slope is None else f"slope {slope:.2f}, {low:.2f} to {high:.2f}"
    measured = float("nan") if one["moves"] is None else one["moves"]
    return Row(what=f"{kind}: best rate moves with width", measured=measured, target=kind == "standard", note=note)
