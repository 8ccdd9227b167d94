"""A process that has imported everything and forks one child per job, so that a crash costs milliseconds, not seconds.

As a program it reads jobs from standard input, a JSON object a line, and answers each with a line: how the child ended
(`Ended`). It has one thread and has computed nothing, so its children are as good as fresh processes.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ended:
    """How a child ended: by which signal (0: none), with which answer, or with which exception (its last line)."""

    signal: int
    answer: Any
    error: str


class Forker:
    """Runs jobs in forked children, from entering to leaving its `with` block."""

    def __enter__(self) -> "Forker":
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def __call__(self, what: str, fault: str = "", **arguments: Any) -> Ended:
        """Do `what` (a function of this file) in a child that is armed with `fault`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"what": what, "fault": fault, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


def attempt(root: str, cell: str, base_dir: str | None = None, checkpoint_seconds: float = 0.0) -> Any:
    from sweeps.attempt import run_attempt
    from sweeps.store import Store

    base = Path(base_dir) if base_dir else None
    return vars(run_attempt(Store(Path(root)), cell, study="s", base_dir=base, checkpoint_seconds=checkpoint_seconds))


def count(job: str, **arguments: Any) -> dict[str, int]:
    """How often another job passes each point."""
    from sweeps import faults

    passed: Counter[str] = Counter()

    class Counting(dict[str, Any]):
        def __contains__(self, point: object) -> bool:
            passed[str(point)] += 1
            return False

    faults._armed = Counting()
    globals()[job](**arguments)
    return dict(passed)


def register(root: str, study: str, corpus: str) -> Any:
    """Open or make a store and put a study on record in it, as the driver does: a claim, then the plan."""
    from cluster import ledger
    from cluster.claims import Claim
    from sweeps.corpora import read_meta
    from sweeps.grids import plan_study
    from sweeps.store import open_store
    from sweeps.studyfile import load_study

    store, path = open_store(root), Path(study)
    plan = plan_study(load_study(path), read_meta(Path(corpus))[0], allow_code=True, base_dir=path.parent)
    with Claim(store, plan.study.name) as claim:
        ledger.register(store, plan, path.read_bytes())
        return claim.number


def search(root: str, study: str, corpus: str) -> Any:
    """Search a study, its cells ended by the writing of their results."""
    from searched import drive

    from sweeps.corpora import read_meta
    from sweeps.grids import plan_study
    from sweeps.store import open_store
    from sweeps.studyfile import load_study

    plan = plan_study(load_study(Path(study)), read_meta(Path(corpus))[0])
    return [one.cell.id for one in drive(open_store(root), plan)]


def settle(root: str, cell: str, driver: int) -> Any:
    from cluster import leftovers
    from sweeps.store import Store

    return leftovers.settle(Store(Path(root)), cell, "s", driver)


def _child(job: dict[str, Any], write: int) -> None:
    from sweeps import faults

    ended: dict[str, Any] = {"answer": None, "error": ""}
    try:
        faults.arm(job["fault"])
        ended["answer"] = globals()[job["what"]](**job["arguments"])
    except BaseException:
        ended["error"] = traceback.format_exc().strip().splitlines()[-1]
    os.write(write, json.dumps(ended).encode())
    os._exit(0)


def _serve() -> None:
    for name in ("cluster.ledger", "cluster.leftovers", "sweeps.attempt", "sweeps.studyfile", "sweeps.training"):
        importlib.import_module(name)
    importlib.import_module("transformers.models.llama.modeling_llama")
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            _child(json.loads(line), write)
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            said = stream.read()
        _, status = os.waitpid(child, 0)
        ended = json.loads(said) if said else {"answer": None, "error": ""}
        print(json.dumps({"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, **ended}), flush=True)


if __name__ == "__main__":
    _serve()
