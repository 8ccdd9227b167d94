"""The command line as the tests call it, and the tiny study that they share."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sweeps.store import Store, read_plan

ROOT = Path(__file__).resolve().parent.parent

TINY = """
name: tiny
question: How should a small budget be split?
corpus: {source: markov, options: {vocab_size: 16, tokens: 200000, seed: 1}}
context: 32
families: [llama]
grid:
  type: isoflop
  budgets: [4e8, 8e8]
  sizes: 3
  stride: 1
  optimum: {N: 14142, C: 4e8, exponent: 0.0}
  replicates: {budgets: 1, seeds: 2}
training: {batch_tokens: 256, learning_rate: 0.01}
"""


@dataclass(frozen=True)
class Escala:
    """Runs the command line as a user would, in a folder of its own."""

    folder: Path

    def __call__(self, *arguments: object, ok: int = 0, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "escala.py"), *map(str, arguments)]
        run = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=timeout)
        assert run.returncode == ok, f"{arguments}: exit {run.returncode}\n{run.stdout}\n{run.stderr}"
        return run

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, str(ROOT / "escala.py"), *map(str, arguments)]
        return subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def study(self, text: str, name: str = "study.yaml") -> Path:
        path = self.folder / name
        path.write_text(text)
        return path


class Said(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


FrontDoor = Callable[..., Said]
"""The command line in the tests' own process."""


@dataclass(frozen=True)
class Finished:
    """The tiny study, run: treat the store as read-only."""

    escala: Escala
    study: Path
    store: Path
    output: str


def ids(store: Store, name: str = "demo") -> list[str]:
    """The cells of a study, in the order of its plan."""
    return [entry["id"] for entry in read_plan(store, name)["cells"]]


def refused(escala: Escala, *arguments: object) -> str:
    """What a command says that is refused and changes nothing."""
    before = {path: path.stat().st_mtime_ns for path in escala.folder.rglob("*")}
    run = escala(*arguments, ok=2)
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr
    assert {path: path.stat().st_mtime_ns for path in escala.folder.rglob("*")} == before, "something was changed"
    return run.stderr
