"""What the benchmarks share: a measured row, a folder for their stores, and processes timed whole.

The benchmarks import neither torch nor numpy here: Linux counts the memory of a parent at the moment of the fork as
the child's peak, so the parent has to stay small.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("ESCALA_STORE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")
"""Settings of the caller that would lead a benchmark to another store or cluster."""

SMALL_STUDY = """
corpus: pystdlib
families: [llama]
context: 128
grid: {type: ladder, sizes: [10000], tokens_per_parameter: [5]}
training: {batch_tokens: 1024, learning_rate: 0.01}
seeds: [0, 1, 2, 3, 4, 5, 6, 7]
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure beside its target."""

    what: str
    measured: float | bool
    unit: str = ""
    target: float | bool | None = None
    at_least: bool = False
    """The target is a lower bound; otherwise an upper one."""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Measured over target; None where there is none to divide by."""
        if self.target is None or isinstance(self.target, bool):
            return None
        return self.measured / self.target

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None or isinstance(self.target, bool):
            return None if self.target is None else self.measured == self.target
        return self.measured >= self.target if self.at_least else self.measured <= self.target


@dataclass(frozen=True)
class Ended:
    """A process that has ended well."""

    seconds: float
    peak_bytes: int
    output: str
    errors: str


@dataclass(frozen=True)
class Place:
    """A folder for the studies and stores of a run of the benchmarks."""

    folder: Path

    @cached_property
    def corpus_built(self) -> Ended:
        """A first plan of the small study, which builds the default corpus in the store."""
        return escala("plan", self.small_study, "--store", self.store)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def store_with_corpus(self) -> Path:
        assert self.corpus_built
        return self.store

    @cached_property
    def small_study(self) -> Path:
        return self.study("small", SMALL_STUDY)

    def study(self, name: str, text: str) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(f"name: {name}\n{text}")
        return path


def escala(*arguments: object, watch: Callable[[int], None] | None = None) -> Ended:
    """Run the command line as a user does, and time it from outside."""
    script = Path(sys.executable).with_name("escala")
    command = [str(script)] if script.exists() else [sys.executable, str(ROOT / "escala.py")]
    return timed([*command, *map(str, arguments)], watch)


def timed(command: list[str], watch: Callable[[int], None] | None = None) -> Ended:
    """Run a process; wall-clock seconds and its largest resident size. RuntimeError where it fails.

    `watch` is called with the process's id every quarter of a second.
    """
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        output, errors, usage = _collect(process, watch)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}:\n{errors or output}")
    return Ended(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), output, errors)


def _collect(
    process: "subprocess.Popen[str]", watch: Callable[[int], None] | None
) -> tuple[str, str, resource.struct_rusage]:
    """Both streams to their ends, then the process's own resource usage, which only wait4 tells."""
    from concurrent.futures import ThreadPoolExecutor, wait

    assert process.stdout is not None
    assert process.stderr is not None
    with ThreadPoolExecutor(2) as pool:
        output, errors = pool.submit(process.stdout.read), pool.submit(process.stderr.read)
        while watch and not output.done():
            watch(process.pid)
            wait([output], timeout=0.25)
        wait([output])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return output.result(), errors.result(), usage
