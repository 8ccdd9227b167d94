"""What a search costs per trial, beside training: ask, plan record, tell, with a journal on disk, to 1,000 trials.

python tests/benchmarks/search.py [TRIALS] [SAMPLER]
"""

import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from cluster.ledger import register  # noqa: E402
from cluster.searching import Searching  # noqa: E402
from sweeps.corpora import make_source, prepare  # noqa: E402
from sweeps.grids import plan_study  # noqa: E402
from sweeps.store import begin_attempt, commit_result, open_store  # noqa: E402
from sweeps.study import Study  # noqa: E402

TRIALS = 1000
SPACE = {"learning_rate": {"log": [1e-4, 1e-1]}, "weight_decay": {"linear": [0, 0.3]}, "eps": {"log": [1e-10, 1e-6]}}
CORPUS = {"vocab_size": 8, "tokens": 60_000}


def measure(trials: int = TRIALS, sampler: str = "tpe") -> dict[str, Any]:
    """Milliseconds per trial over all trials, over the last tenth, and of opening the search again."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder) / "store")
        corpus = prepare(make_source("markov", None, CORPUS), "bytes", store.root)
        plan = plan_study(_declared(trials, sampler), corpus)
        search = Searching(store, plan)
        register(store, search.plan, b"")
        spent: list[float] = []
        while search.goes_on():
            began = time.perf_counter()
            new = search.grow(1)
            spent.append(time.perf_counter() - began)
            for one in new:  # "trained", off the clock
                rate = one.cell.optimizer.learning_rate
                attempt = begin_attempt(store, one.cell.id, {})
                loss = 2 + 0.1 * math.log(rate / 0.01) ** 2
                commit_result(attempt, {"state": "finished", "reason": None, "val_loss_final": loss})
        began = time.perf_counter()
        Searching(store, plan)
        opened = time.perf_counter() - began
    last = spent[-max(1, trials // 10) :]
    return {
        "trials": trials,
        "sampler": sampler,
        "ms_per_trial": 1000 * sum(spent) / trials,
        "ms_per_trial_at_the_end": 1000 * sum(last) / len(last),
        "worst_ms": 1000 * max(spent),
        "open_again_ms": 1000 * opened,
    }


def _declared(trials: int, sampler: str) -> Study:
    return Study.model_validate(
        {
            "name": "s",
            "corpus": {"source": "markov", "options": CORPUS},
            "context": 32,
            "families": ["llama"],
            "grid": {"type": "points", "points": [{"size": 10_000, "tokens": 40_000}]},
            "training": {"batch_tokens": 64, "warmup_tokens": 2_000},
            "search": {"space": SPACE, "sampler": sampler, "trials": trials},
        }
    )


if __name__ == "__main__":
    found = measure(*(int(sys.argv[1]),) if sys.argv[1:] else (), *sys.argv[2:3])
    print(
        "  ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
        )
    )
