"""How often the intervals of a comparison hold, and how often a gain of 25% is seen, on simulated studies.

The runs follow the law of Besiroglu et al. 2024 at 100M to 1.6B parameters and 2B to 32B tokens (the 5x5 grid), with
lognormal seed noise, of which pairs share half of the variance. Nothing here is asserted by the tests.

python tests/benchmarks/compare.py [REPLICATES]      one line of JSON for each world
"""

import json
import sys
from pathlib import Path

from measuring import ROOT, Place, Row, timed

WORLDS = (
    ("5x5", 0.005, True),
    ("5x5", 0.005, False),
    ("5x5", 0.01, True),
    ("5x5", 0.01, False),
    ("3x3", 0.005, True),
    ("isoFLOP 4x5", 0.005, True),
    ("path of 6", 0.005, True),
)
LEVEL, GAIN = 0.9, 1.25


def run(place: Place, replicates: int = 60) -> list[Row]:
    """Both figures of every world, with the bounds of the 5x5 grid at .5% noise."""
    output = timed([sys.executable, str(Path(__file__).resolve()), str(replicates)]).output
    rows = []
    for world in map(json.loads, output.splitlines()):
        bound = world["design"] == "5x5" and world["noise"] == 0.005
        where = f"{world['design']}, noise {world['noise']:.1%}, {'paired' if world['paired'] else 'unpaired'}"
        note = f"{replicates} replicates, width {world['width']:.3f} of ln, refused {world['refused']:.0%}"
        held, told = world["held"], world["told"]
        target = {"target": 0.85, "at_least": True} if bound else {}
        rows.append(Row(what=f"compare {where}: 90% intervals of equals with 1", measured=held, note=note, **target))
        target = {"target": 0.8, "at_least": True} if bound else {}
        rows.append(Row(what=f"compare {where}: gain of {GAIN} seen", measured=told, **target))
    return rows


def simulate(design: str, noise: float, paired: bool, replicates: int) -> dict[str, object]:
    """One world, both questions. Shares are over the replicates that are not refused."""
    import numpy as np
    import pandas as pd

    from analysis.compare import compare_recipes
    from analysis.laws import CHINCHILLA

    law = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
    if design in ("5x5", "3x3"):
        steps = 2.0 ** np.arange(5) if design == "5x5" else 4.0 ** np.arange(3)
        N, D = (axis.ravel() for axis in np.meshgrid(1e8 * steps, 2e9 * steps))
    elif design == "isoFLOP 4x5":
        C = np.repeat(1e18 * 4.0 ** np.arange(4), 5)
        N = np.sqrt(C / 120) * np.tile(2.0 ** np.arange(-2, 3), 4)
        D = C / (6 * N)
    else:
        N = 1e8 * 2.0 ** np.arange(6)
        D = 20 * N

    def sample(multiplier: float, errors: np.ndarray, seed: int) -> pd.DataFrame:
        loss = CHINCHILLA({"N": N * multiplier**0.5, "D": D * multiplier**0.5}, law) * np.exp(errors)
        return pd.DataFrame({"N": N, "D": D, "C": 6 * N * D, "loss": loss, "seed": seed})

    held, told, widths, refused = 0, 0, [], 0
    for replicate in range(replicates):
        for gain in (1.0, GAIN):
            generator = np.random.default_rng([replicate, int(gain > 1)])
            common, *own = noise * np.sqrt(0.5) * generator.standard_normal((3, len(N)))
            errors = [common + e for e in own] if paired else noise * generator.standard_normal((2, len(N)))
            tables = sample(1.0, errors[0], 0), sample(gain, errors[1], 0 if paired else 1)
            found = compare_recipes(*tables, level=LEVEL, resamples=400, seed=replicate)
            low, high = found.flops.value.interval
            refused += found.refused
            held += gain == 1.0 and low <= 1.0 <= high
            told += gain > 1.0 and low > 1.0
            widths.append(np.log(high / low))
    answered = replicates - refused / 2
    return {
        "design": design,
        "noise": noise,
        "paired": paired,
        "held": held / answered,
        "told": told / answered,
        "width": float(np.nanmedian(widths)),
        "refused": refused / (2 * replicates),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for world in WORLDS:
        print(json.dumps(simulate(*world, replicates=int((sys.argv[1:] or ["60"])[0]))), flush=True)
