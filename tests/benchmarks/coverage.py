"""Do the intervals hold? Simulated studies of a known law, fitted as a user fits them.

Run as a program, it prints one JSON line per figure: the fields of a `measuring.Row`.

The law is Chinchilla's with the constants of Besiroglu et al. 2024, ln loss has a seed noise of .5%, C = 6 N D. Of
the noise a fit knows what a study gives it: three seeds at the two cheapest cells. Intervals are nominal 90% (those
of isoFLOP fits 95%), for alpha, beta, and N and L of the optimum at ten times the dearest run. `width` is the median
width of the intervals over that of the Cramer-Rao bound, which knows the noise and the law exactly. Two worlds that
no fit here describes are shown without a bound: an off-centre grid under a law with alpha far from beta, which bends
the isoFLOP parabola, and a learning rate that costs the largest models 5%.
"""

import dataclasses
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from measuring import Place, Row, timed

LEVEL, NOISE, RESAMPLES = 0.90, 0.005, 200
REPLICATES, MISSPECIFIED = 1000, 300
QUANTITIES = ("alpha", "beta", "N* at 10x", "L at 10x")
APART = {"E": 1.8172, "A": 254.0, "B": 8190.0, "alpha": 0.31, "beta": 0.43}
"""A law with alpha far from beta; its terms are of the size of Besiroglu's at 1e9 parameters, 2e10 tokens."""


def coverage(place: Place) -> list[Row]:
    return [Row(**json.loads(line)) for line in timed([sys.executable, __file__]).output.splitlines()]


def main() -> None:
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(workers) as pool:
        for name in designs():
            found = list(pool.map(partial(replicate, name, "chinchilla"), range(REPLICATES), chunksize=25))
            show(_bounded(name, found))
        for name, law in (("off-centre", "chinchilla"), ("off-centre", "isoflop"), ("penalty", "chinchilla")):
            found = list(pool.map(partial(replicate, name, law), range(MISSPECIFIED), chunksize=25))
            show(_unbounded(name, law, found))


def show(rows: list[Row]) -> None:
    for row in rows:
        print(json.dumps(dataclasses.asdict(row)), flush=True)


# --- worlds --------------------------------------------------------------------------------------------------------


def designs():
    """(N, D) of the designs, without their extra seeds, and their ranges in words."""
    import numpy as np

    def grid(count: int):
        sizes, tokens = np.meshgrid(np.geomspace(5e7, 5e9, count), np.geomspace(1e9, 1e11, count))
        return sizes.ravel(), tokens.ravel()

    return {
        "3x3 grid": (*grid(3), "N 5e7 to 5e9, D 1e9 to 1e11"),
        "5x5 grid": (*grid(5), "N 5e7 to 5e9, D 1e9 to 1e11"),
        "isoFLOP 4x5": (*_budgets(besiroglu(), 4, 5), "C 1e19 to 3e21, N within 4x of the best"),
        "isoFLOP 8x7": (*_budgets(besiroglu(), 8, 7), "C 1e19 to 3e21, N within 4x of the best"),
    }


def _budgets(law, budgets: int, sizes: int, shift: float = 1.0):
    import numpy as np

    from tests.analysis.closed import closed_form

    C = np.repeat(np.geomspace(1e19, 3e21, budgets), sizes)
    N = closed_form(C, law).N * shift * np.tile(np.geomspace(0.25, 4.0, sizes), budgets)
    return N, C / (6.0 * N)


def besiroglu():
    from analysis.laws import CHINCHILLA

    return dict(CHINCHILLA.published["Besiroglu et al. 2024"])


def _world(name: str):
    """(N, D, expected loss, law) of every run; the two cheapest cells have three seeds."""
    import numpy as np

    from analysis.laws import CHINCHILLA

    law = APART if name == "off-centre" else besiroglu()
    if name == "off-centre":
        N, D = _budgets(law, 8, 7, shift=3.0)
    else:
        N, D, _ = designs()["5x5 grid" if name == "penalty" else name]
    cheapest = np.argsort(N * D, kind="stable")[:2]
    rows = np.concatenate([np.arange(len(N)), cheapest, cheapest])
    seeds = np.repeat([0, 1, 2], [len(N), 2, 2])
    loss = CHINCHILLA({"N": N, "D": D}, law)
    if name == "penalty":
        loss = loss * (1.0 + 0.05 * np.log(N / N.min()) / np.log(N.max() / N.min()))
    return N[rows], D[rows], loss[rows], seeds, law


# --- one replicate -------------------------------------------------------------------------------------------------


def replicate(name: str, law: str, seed: int) -> list[tuple[float, float]]:
    """The intervals of the four quantities in one simulated study; NaN where the fit refuses."""
    import numpy as np
    import pandas as pd

    from analysis import fit

    N, D, loss, seeds, _ = _world(name)
    noisy = loss * np.exp(NOISE * np.random.default_rng(seed).standard_normal(len(N)))
    table = pd.DataFrame({"N": N, "D": D, "C": 6.0 * N * D, "loss": noisy, "seed": seeds})
    found = fit(table, law, targets=[10.0 * table["C"].max()], level=LEVEL, resamples=RESAMPLES, seed=seed)
    target = found.decisions["targets"][0]
    nothing = (np.nan, np.nan)
    return [
        *(found.intervals.get(k, nothing) for k in ("alpha", "beta")),
        *(target[k].interval if k in target else nothing for k in ("N", "loss")),
    ]


def _truth(name: str):
    """The four quantities as they are, and the widths of their 90% intervals at the Cramer-Rao bound.

    Widths of N and L are those of their logarithms. The bound is that of the covariance of an unbiased estimate,
    noise^2 (J'J)^-1, carried to the quantities by their gradient (central differences).
    """
    import numpy as np
    from scipy.special import ndtri

    from analysis.laws import CHINCHILLA
    from analysis.problems import make_problem
    from tests.analysis.closed import closed_form

    N, D, loss, _, law = _world(name)
    target = 10.0 * float((6.0 * N * D).max())
    problem = make_problem(CHINCHILLA, {"N": N, "D": D}, loss)
    theta = problem.theta(law)

    def quantities(at):
        params = problem.params(at)
        best = closed_form(target, params)
        return np.array([params["alpha"], params["beta"], np.log(best.N), np.log(best.loss)])

    _, slopes = problem.jacobian(theta)
    step = 1e-5 * np.eye(len(theta))
    gradient = np.stack([(quantities(theta + s) - quantities(theta - s)) / 2e-5 for s in step], axis=1)
    variance = np.diag(gradient @ np.linalg.inv(slopes @ slopes.T) @ gradient.T)
    value = quantities(theta)
    return np.append(value[:2], np.exp(value[2:])), 2.0 * ndtri((1 + LEVEL) / 2) * NOISE * np.sqrt(variance)


# --- figures -------------------------------------------------------------------------------------------------------


def _summary(name: str, found):
    """Shares, one for each quantity: covered of those answered, covered of all, answered; and widths over the bound."""
    import numpy as np

    truth, bound = _truth(name)
    low, high = np.moveaxis(np.array(found, dtype=float), 2, 0)
    answered = np.isfinite(low) & np.isfinite(high)
    inside = answered & (low <= truth) & (truth <= high)
    wide = high - low
    wide[:, 2:] = np.log(high[:, 2:] / low[:, 2:])
    with np.errstate(invalid="ignore"):
        shares = inside.sum(axis=0) / answered.sum(axis=0)
    widths = [np.median(w[a]) if a.any() else np.nan for w, a in zip(wide.T, answered.T)]
    return shares, inside.mean(axis=0), answered.mean(axis=0), np.array(widths) / bound


def _bounded(name: str, found) -> list[Row]:
    covered, of_all, answered, widths = _summary(name, found)
    rows = [
        Row(
            what=f"{name}, {what}: off the nominal 90%",
            measured=100.0 * abs(covered[j] - LEVEL),
            unit="points",
            target=5.0,
            note=f"{covered[j]:.1%} of answered, {of_all[j]:.1%} of all; width {widths[j]:.2f}",
        )
        for j, what in enumerate(QUANTITIES)
    ]
    promised = name in ("5x5 grid", "isoFLOP 8x7")
    note = f"{len(found)} replicates; {designs()[name][2]}"
    refused = 100.0 * (1.0 - answered.min())
    rows += [
        Row(what=f"{name}: refused", measured=refused, unit="%", target=5.0 if promised else None, note=note),
        Row(what=f"{name}: width / Cramer-Rao", measured=widths.max(), target=1.3, note="widest of the four medians"),
    ]
    return rows


def _unbounded(name: str, law: str, found) -> list[Row]:
    covered, of_all, answered, widths = _summary(name, found)
    world = {"off-centre": "isoFLOP 8x7 3x off-centre, alpha .31, beta .43", "penalty": "5x5, 5% lost at large N"}
    return [
        Row(
            what=f"{world[name]}; {law}, {what}",
            measured=100.0 * covered[j],
            unit="%",
            note=f"covered of answered; {of_all[j]:.1%} of all; width {widths[j]:.2f}; {len(found)} replicates",
        )
        for j, what in enumerate(QUANTITIES)
        if answered[j] > 0
    ]


if __name__ == "__main__":
    main()
