"""What a search costs per trial beside training: ask, journal, plan record and tell, up to 1,000 trials."""

import json
import sys

from measuring import Place, Row, timed

TRIALS = 1000
CODE = """
import json, math, sys, time
from cluster.ledger import register
from cluster.searching import Searching
from sweeps.corpora import make_source, prepare
from sweeps.grids import plan_study
from sweeps.store import begin_attempt, commit_result, open_store
from sweeps.study import Study

root, trials, sampler = sys.argv[1], int(sys.argv[2]), sys.argv[3]
options = {"vocab_size": 8, "tokens": 60_000}
space = {"learning_rate": {"log": [1e-4, 1e-1]}, "weight_decay": {"linear": [0, 0.3]}, "eps": {"log": [1e-10, 1e-6]}}
declared = {
    "name": "s", "corpus": {"source": "markov", "options": options}, "context": 32, "families": ["llama"],
    "grid": {"type": "points", "points": [{"size": 10_000, "tokens": 40_000}]},
    "training": {"batch_tokens": 64, "warmup_tokens": 2_000},
    "search": {"space": space, "sampler": sampler, "trials": trials},
}
store = open_store(root)
plan = plan_study(Study.model_validate(declared), prepare(make_source("markov", None, options), "bytes", store.root))
search, spent, processor = Searching(store, plan), [], 0.0
register(store, search.plan, b"")
while search.goes_on():
    began, busy = time.perf_counter(), time.process_time()
    new = search.grow(1)
    spent.append(time.perf_counter() - began)
    processor += time.process_time() - busy
    for one in new:  # "trained", off the clock
        loss = 2 + 0.1 * math.log(one.cell.optimizer.learning_rate / 0.01) ** 2
        result = {"state": "finished", "reason": None, "val_loss_final": loss}
        commit_result(begin_attempt(store, one.cell.id, {}), result)
began = time.perf_counter()
Searching(store, plan)
last = spent[-max(1, trials // 10):]
print(json.dumps({
    "mean": 1000 * sum(spent) / trials, "last": 1000 * sum(last) / len(last), "processor": 1000 * processor / trials,
    "open": time.perf_counter() - began,
}))
"""


def search(place: Place) -> list[Row]:
    """TPE with three hyperparameters, a trial at a time."""
    ended = timed([sys.executable, "-c", CODE, str(place.folder / "search"), str(TRIALS), "tpe"])
    told = json.loads(ended.output)
    note = f"{told['processor']:.1f} ms of processor time; the last {TRIALS // 10} trials: {told['last']:.1f} ms"
    return [
        Row(
            what=f"a trial of a search of {TRIALS:,} (tpe), all but training",
            measured=told["mean"],
            unit="ms",
            target=50,
            note=note,
        ),
        Row(what=f"a search of {TRIALS:,} trials opened again", measured=told["open"], unit="s"),
    ]
