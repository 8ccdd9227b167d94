"""The sensitivity analysis, timed: optima, intervals and power laws of 2,000 runs with 1,000 noisy copies.

Run as a program, it prints one JSON line per figure: the fields of a `measuring.Row`.
"""

import dataclasses
import json
import statistics
import sys
import time

from measuring import ROOT, Place, Row, timed


def run(place: Place) -> list[Row]:
    ended = timed([sys.executable, __file__])
    return [Row(**json.loads(line)) for line in ended.output.splitlines()]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from analysis.sensitivities import sensitivity
    from tests.analysis.fans import crossed, fan

    fine = fan(sizes=[1e5 * 2.0**i for i in range(12)], tokens=[1e8, 2e8, 4e8, 8e8, 1.6e9, 3.2e9], seeds=3)
    single = fan(sizes=[1e5 * 1.3**i for i in range(20)], tokens=[1e8 * 1.5**i for i in range(11)], seeds=1)
    for what, table in (
        ("rate, 3 seeds", fine),
        ("rate, 1 seed", single),
        ("rate and batch", crossed([1e5 * 2.0**i for i in range(11)])),
    ):
        seconds = statistics.median(_seconds(lambda t=table: sensitivity(t, resamples=1000)) for _ in range(3))
        groups = len(sensitivity(table, resamples=10).optima)
        note = f"{len(table)} runs in {groups} groups, 1,000 copies; median of 3"
        row = Row(what=f"sensitivity, {what}", measured=seconds, unit="s", target=5.0, note=note)
        print(json.dumps(dataclasses.asdict(row)), flush=True)


def _seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
