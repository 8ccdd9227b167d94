"""The fits, timed: many starts and many resamples against a plain SciPy loop of the same problem, and how time grows.

Run as a program, it prints one JSON line per figure: the fields of a `measuring.Row`.

The problem is that of Besiroglu et al. 2024: the Chinchilla law, 240 rows, Huber at 1e-3 on ln loss, the 4500 starts
of Hoffmann et al. 2022, 4000 bootstrap refits by row. The rows are Epoch AI's points where $ESCALA_DATA, or
shared/data beside the repository, holds them, else a synthetic table of the same law with 1% noise. The SciPy loop
is L-BFGS-B with a numerical gradient from one start after another, as the published code runs it; it is timed on a
sample of starts and refits, in the same process, and multiplied up.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

from measuring import ROOT, Place, Row, timed

STARTS, REFITS, THRESHOLD = 4500, 4000, 1e-3
SAMPLE_STARTS, SAMPLE_REFITS = 60, 20
ROWS = (240, 1_000, 10_000, 100_000)


def fits(place: Place) -> list[Row]:
    ended = timed([sys.executable, __file__])
    rows = [Row(**json.loads(line)) for line in ended.output.splitlines()]
    peak, note = ended.peak_bytes / 1e9, "peak resident of the process, SciPy and all"
    rows.append(Row(what="starts and refits, memory", measured=peak, unit="GB", target=1.0, note=note))
    for module, target in (("analysis", 1.0), ("analysis.fitting", None)):
        seconds = statistics.median(timed([sys.executable, "-c", f"import {module}"]).seconds for _ in range(3))
        note = "whole process, median of 3"
        rows.append(Row(what=f"import {module}", measured=seconds, unit="s", target=target, note=note))
    return rows


def main() -> None:
    for part in (against_scipy, single, growth):
        for row in part():
            print(json.dumps(dataclasses.asdict(row)), flush=True)


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


# --- the problem ---------------------------------------------------------------------------------------------------


def _table(rows: int = 240):
    """(N, D, loss, where from)."""
    import numpy as np

    from analysis.laws import CHINCHILLA

    folder = Path(os.environ.get("ESCALA_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "chinchilla-epoch" / "svg_extracted_data.csv"
    if rows == 240 and path.exists():
        from analysis import read_table

        table = read_table(path)
        kept = table[table["loss"] < np.sort(table["loss"])[-5]]
        return *(kept[c].to_numpy() for c in ("N", "D", "loss")), "Epoch AI's points"
    generator = np.random.default_rng(0)
    N = np.exp(generator.uniform(np.log(4e7), np.log(1.6e10), rows))
    D = np.exp(generator.uniform(np.log(1e9), np.log(1e12), rows))
    loss = CHINCHILLA({"N": N, "D": D}, CHINCHILLA.published["Besiroglu et al. 2024"])
    return N, D, loss * np.exp(0.01 * generator.standard_normal(rows)), "synthetic, 1% noise"


def _problem(rows: int = 240):
    from analysis.laws import CHINCHILLA
    from analysis.problems import make_problem

    N, D, loss, _ = _table(rows)
    return make_problem(CHINCHILLA, {"N": N, "D": D}, loss)


def _hoffmann():
    """Hoffmann's grid: (4500, 5) of ln A, ln B, ln E, alpha, beta."""
    import numpy as np

    exponents, coefficients = np.arange(0.0, 2.1, 0.5), np.arange(0.0, 26.0, 5.0)
    return np.array(list(product(coefficients, coefficients, np.arange(-1.0, 1.1, 0.5), exponents, exponents)))


def _starts(problem):
    import numpy as np

    a, b, e, alpha, beta = _hoffmann().T
    return problem.theta({"A": np.exp(a), "B": np.exp(b), "E": np.exp(e), "alpha": alpha, "beta": beta})


def _drawn(rows: int, count: int):
    """How often each resample drew each row, (count, rows)."""
    import numpy as np

    return np.random.default_rng(0).multinomial(rows, np.full(rows, 1.0 / rows), size=count).astype(float)


# --- against SciPy -------------------------------------------------------------------------------------------------


def against_scipy() -> list[Row]:
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import huber, logsumexp

    from analysis.problems import Robust
    from analysis.solver import descend, solve

    N, D, loss, source = _table()
    problem, robust = _problem(), Robust("huber", THRESHOLD)
    starts = _starts(problem)
    began, used = time.perf_counter(), time.process_time()
    best = solve(problem, robust, starts=starts)
    middle = time.perf_counter()
    descend(problem, robust, np.tile(best.theta, (REFITS, 1)), weights=_drawn(problem.rows, REFITS))
    ended, used = time.perf_counter(), time.process_time() - used

    ln_N, ln_D, ln_loss = np.log(N), np.log(D), np.log(loss)

    def objective(p, weights):
        a, b, e, alpha, beta = p
        terms = np.stack([a - alpha * ln_N, b - beta * ln_D, np.full_like(ln_N, e)])
        return (weights * huber(THRESHOLD, logsumexp(terms, axis=0) - ln_loss)).sum()

    ones, grid = np.ones(len(N)), _hoffmann()
    sample = grid[np.random.default_rng(0).choice(len(grid), SAMPLE_STARTS, replace=False)]
    tic = time.perf_counter()
    found = [minimize(objective, start, args=(ones,), method="L-BFGS-B") for start in sample]
    per_start = (time.perf_counter() - tic) / SAMPLE_STARTS
    theirs = min(found, key=lambda f: f.fun)
    tic = time.perf_counter()
    for weights in _drawn(len(N), SAMPLE_REFITS):
        minimize(objective, theirs.x, args=(weights,), method="L-BFGS-B")
    per_refit = (time.perf_counter() - tic) / SAMPLE_REFITS
    scipy = STARTS * per_start + REFITS * per_refit
    near = sum(f.fun <= theirs.fun * 1.001 for f in found)
    agree = f"{best.agreeing} of {STARTS} starts agree; of SciPy's {near} of {SAMPLE_STARTS}"
    whole = f"{middle - began:.2f} + {ended - middle:.2f} s, of processors {used:.1f} s; 240 rows, {source}"
    each = f"{per_start * 1e3:.0f} ms a start, {per_refit * 1e3:.0f} ms a refit"
    plain = f"{each}, from {SAMPLE_STARTS} and {SAMPLE_REFITS}"
    return [
        Row(what=f"{STARTS} starts, {REFITS} refits", measured=ended - began, unit="s", target=5.0, note=whole),
        Row(what="the same by a SciPy loop", measured=scipy, unit="s", note=plain),
        Row(what="times faster than SciPy", measured=scipy / (ended - began), note="one run, one process"),
        Row(what="objective / SciPy's best", measured=best.objective / theirs.fun, target=1.0 + 1e-9, note=agree),
    ]


# --- one fit -------------------------------------------------------------------------------------------------------


def single() -> list[Row]:
    import pandas as pd

    from analysis import fit
    from analysis.problems import Robust
    from analysis.solver import solve

    N, D, loss, _ = _table()
    table, problem = pd.DataFrame({"N": N, "D": D, "loss": loss}), _problem()

    def whole(resamples: int) -> float:
        return statistics.median(_seconds(lambda: fit(table, threshold=1e-3, resamples=resamples)) for _ in range(5))

    solved = statistics.median(_seconds(lambda: solve(problem, Robust("huber", THRESHOLD))) for _ in range(9))
    return [
        Row(what="one fit, default starts", measured=solved * 1e3, unit="ms", target=50.0, note="solve; median of 9"),
        Row(what="analysis.fit, 20 resamples", measured=whole(20) * 1e3, unit="ms", note="with all verdicts"),
        Row(what="analysis.fit, 1,000 resamples", measured=whole(1000) * 1e3, unit="ms", note="with all verdicts"),
    ]


# --- growth --------------------------------------------------------------------------------------------------------


def growth() -> list[Row]:
    """Time at each size, and how much faster than its count time grew from the first to the last."""
    import numpy as np

    from analysis.problems import Robust
    from analysis.solver import descend, solve

    robust = Robust("huber", THRESHOLD)
    problem = _problem()
    best, starts = solve(problem, robust).theta, _starts(problem)
    mixed = starts[np.random.default_rng(0).permutation(len(starts))]
    counts = (500, 1500, 4500)
    drawn = _drawn(problem.rows, 8000)

    def refit(count: int) -> None:
        descend(problem, robust, np.tile(best, (count, 1)), weights=drawn[:count])

    by_rows = [(n, _seconds(lambda p=_problem(n): solve(p, robust))) for n in ROWS]
    by_starts = [(n, _seconds(lambda n=n: solve(problem, robust, starts=mixed[:n]))) for n in counts]
    by_refits = [(n, _seconds(lambda n=n: refit(n))) for n in (1000, 2000, 4000, 8000)]
    rows = []
    for what, measured in (("rows", by_rows), ("starts", by_starts), ("resamples", by_refits)):
        (first, before), (last, after) = measured[0], measured[-1]
        rows.append(
            Row(
                what=f"growth in {what}, {first:,} to {last:,}",
                measured=(after / before) / (last / first),
                unit="of linear",
                target=1.2,
                note="; ".join(f"{n:,}: {seconds:.2f} s" for n, seconds in measured),
            )
        )
    return rows


if __name__ == "__main__":
    main()
