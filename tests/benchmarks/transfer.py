"""Transfer: the shipped study of widths, standard against mup, and what its runs say. Takes minutes."""

import json
import sys

from measuring import ROOT, Place, Row, escala, timed

STUDY = "mup-transfer"
CODE = """
import json, sys
from analysis.runs import load_runs
from analysis.transfer import transfer
runs = load_runs(sys.argv[1], sys.argv[2])
seconds = runs["seconds"].sum()
print(json.dumps({"seconds": seconds, "transfers": [one.to_json() for one in transfer(runs)]}))
"""


def transfer(place: Place) -> list[Row]:
    """Trains the study in a store of its own; prints the slope of log2 best rate against log2 width with interval."""
    store = place.store_with_corpus
    run = escala("run", STUDY, "--store", store, "--workers", 2)
    told = json.loads(timed([sys.executable, "-c", CODE, STUDY, str(store)], cwd=ROOT).output)
    rows = [
        Row(what=f"{STUDY}, escala run", measured=run.seconds, unit="s", target=600.0, note="whole process, 2 workers"),
        Row(what=f"{STUDY}, cells", measured=told["seconds"], unit="s", note="summed over cells"),
    ]
    for one in told["transfers"]:
        kind, slope = one["group"]["parametrisation"], one["slope"]
        note = f"slope {slope['value']:.2f}, 95 % {slope['interval'][0]:.2f} to {slope['interval'][1]:.2f}"
        what = f"{kind}: best rate moves with width"
        rows.append(Row(what=what, measured=one["moves"], target=kind == "standard", note=note))
    return rows
