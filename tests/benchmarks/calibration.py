"""A calibrated plan against what cells really took, in median relative error.

With ESCALA_BENCH_STORE, the path of a store of this machine that holds a finished quickstart, that study is judged;
otherwise a small one of sizes and batches as different, which is trained here. What a machine does besides changes all
times alike, so the error is also given after one common factor.
"""

import json
import os
import shutil
import statistics
from pathlib import Path

from measuring import Place, Row, escala

MIXED_STUDY = """
corpus: pystdlib
families: [llama]
context: 128
grid: {type: ladder, sizes: [10000, 28000, 80000], tokens_per_parameter: [4, 10]}
training: {batch_tokens: {value: 1024, at: {D: 3.0e+5}, power: {D: 0.5}}, learning_rate: 0.01}
"""


def calibration(place: Place) -> list[Row]:
    given = os.environ.get("ESCALA_BENCH_STORE")
    store = place.folder / "calibrated"
    if given:
        shutil.copytree(Path(given), store)
        study: Path | str = "quickstart"
    else:
        shutil.copytree(place.store_with_corpus, store)
        study = place.study("mixed", MIXED_STUDY)
    ended = escala("calibrate", study, "--store", store)
    plan = json.loads(escala("plan", study, "--store", store, "--json").output)
    if not given:
        escala("run", study, "--store", store)
    ratios = _ratios(store, {cell["id"]: cell["seconds_predicted"] for cell in plan["cells"]})
    common = statistics.median(ratios)
    note = f"{len(ratios)} cells of {'the quickstart' if given else 'a mixed ladder'}"
    return [
        Row(what="calibrate", measured=ended.seconds, unit="s", target=40.0, note="whole process, all slots"),
        Row(
            what="planned seconds, median error",
            measured=100 * statistics.median(abs(ratio - 1) for ratio in ratios),
            unit="%",
            target=15.0,
            note=note,
        ),
        Row(
            what="same, after one common factor",
            measured=100 * statistics.median(abs(ratio / common - 1) for ratio in ratios),
            unit="%",
            target=15.0,
            note=f"planned {common:.2f} times what was taken",
        ),
    ]


def _ratios(store: Path, planned: dict[str, float]) -> list[float]:
    """Planned over real seconds of every cell that ended at its first attempt."""
    results = {path.parent.name: json.loads(path.read_bytes()) for path in (store / "cells").glob("*/result.json")}
    ended = {cell_id: result for cell_id, result in results.items() if cell_id in planned and result["attempt"] == 0}
    if not ended:
        raise RuntimeError(f"no cell of the plan has ended in {store}")
    return [planned[cell_id] / result["seconds"]["total"] for cell_id, result in ended.items()]
