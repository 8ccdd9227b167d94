"""Commands that only plan or print: they answer at once, and load nothing heavy."""

import statistics
import sys

from measuring import ROOT, Place, Row, escala, timed

CELLS = 10_000
LARGE = """
corpus: {source: pystdlib, repeat: true}
families: [llama]
context: 128
grid:
  type: ladder
  sizes: {from: 1.0e+4, to: 7.2e+6, points: 20}
  tokens_per_parameter: [5, 10, 20, 40, 80]
training: {batch_tokens: 1024}
vary:
  learning_rate: {log: {from: 1.0e-4, to: 1.0e-1, points: 100}}
"""


def help_text(place: Place) -> list[Row]:
    escala("--help")
    seconds = statistics.median(escala("--help").seconds for _ in range(5))
    return [Row(what="escala --help", measured=seconds, unit="s", target=0.5, note="whole process, median of 5")]


def tokenise(place: Place) -> list[Row]:
    seconds = place.corpus_built.seconds
    note = "whole first plan, fresh store"
    return [Row(what="tokenise pystdlib, bytes", measured=seconds, unit="s", target=20.0, note=note)]


def plan(place: Place) -> list[Row]:
    store = place.store_with_corpus
    ended = escala("plan", place.study("large", LARGE), "--store", store)
    if f"{CELLS} cells" not in ended.output:
        raise RuntimeError(f"the study was to have {CELLS:,} cells:\n{ended.output[-500:]}")
    what = f"plan {CELLS:,} cells"
    return [
        Row(what=what, measured=ended.seconds, unit="s", target=5.0, note="whole process, corpus there"),
        Row(what=f"{what}, memory", measured=ended.peak_bytes / 1e6, unit="MB", target=300.0, note="peak resident"),
    ]


def finished(place: Place) -> list[Row]:
    """A store of 10,000 finished cells: what looks at it, and a run that has nothing to do."""
    study, store = place.study("finished", LARGE), place.folder / "finished"
    timed([sys.executable, str(ROOT / "tests" / "many.py"), str(study), str(store)])
    rows = []
    for verb, said in (("status", f"{CELLS} finished"), ("plan", f"{CELLS} cells"), ("run", "nothing to train")):
        ended = escala(verb, study, "--store", store)
        if said not in ended.output:
            raise RuntimeError(f"escala {verb} was to say {said!r}:\n{ended.output[-500:]}")
        what = f"{verb}, {CELLS:,} finished cells"
        rows.append(Row(what=what, measured=ended.seconds, unit="s", target=3.0, note="whole process"))
    code = f"import analysis; assert len(analysis.load_runs('finished', {str(store)!r})) == {CELLS}"
    seconds = timed([sys.executable, "-c", code]).seconds
    what = f"load_runs, {CELLS:,} finished cells"
    return [*rows, Row(what=what, measured=seconds, unit="s", target=3.0, note="whole process, with imports")]


def light(place: Place) -> list[Row]:
    python = [sys.executable, "-X", "importtime", str(ROOT / "escala.py")]
    ended = timed([*python, "plan", str(place.small_study), "--store", str(place.store_with_corpus)])
    loaded = {line.rpartition("|")[2].strip() for line in ended.errors.splitlines()}
    if "sweeps.grids" not in loaded:
        raise RuntimeError("the list of imported modules could not be read")
    heavy = sorted(loaded & {"torch", "transformers", "ray", "mlflow", "optuna", "matplotlib"})
    note = f"loads {', '.join(heavy)}" if heavy else "nor transformers, Ray, MLflow"
    return [Row(what="escala plan needs no torch", measured="torch" not in loaded, target=True, note=note)]
