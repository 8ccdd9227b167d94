"""Small cells, and a trainer's io that keeps everything in memory, for tests of trainers alone."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sweeps import checkpoints
from sweeps.cell import Cell, Optimizer, Schedule
from sweeps.corpora import Corpus
from sweeps.devices import Numerics, choose_numerics
from sweeps.families import FAMILIES, resolve_options
from sweeps.records import write_json
from sweeps.sizes import shape_for
from sweeps.store import Store, checkpoint_paths

CONTEXT = 32


def make_cell(corpus: Corpus, steps: int = 40, learning_rate: float = 0.01, **changes: object) -> Cell:
    shape = shape_for(FAMILIES["llama"], 10_000, vocab_size=corpus.info.vocab_size, context=CONTEXT)
    optimizer = Optimizer(learning_rate=learning_rate, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8, clip_norm=1.0)
    fields = {
        "family": "llama",
        "family_version": "1",
        "options": tuple(sorted(resolve_options(FAMILIES["llama"]).items())),
        "shape": shape,
        "init_std": 0.05,
        "corpus": corpus.info.fingerprint,
        "tokenizer": corpus.info.tokenizer,
        "tokens": steps * 512,
        "batch_tokens": 512,
        "optimizer": optimizer,
        "schedule": Schedule(name="cosine", warmup_tokens=steps * 51, final_fraction=0.1, cooldown_fraction=0.2),
        "precision": "float32",
        "seed": 0,
        "data_seed": 0,
    }
    return Cell(**{**fields, **changes})  # type: ignore[arg-type]


def put(store: Store, cell: Cell) -> str:
    counts = {"flops_per_token": 1}
    write_json(store.cell(cell.id) / "cell.json", {"id": cell.id, "identity": cell.identity, "counts": counts})
    return cell.id


class Killed(Exception):
    """The run ends at this step, as a kill would end it."""


class MemoryIO:
    """Rows without what the clock says, and real checkpoints in `folder` every `every` steps."""

    def __init__(
        self,
        cell: Cell,
        corpus: Corpus,
        *,
        numerics: Numerics | None = None,
        folder: Path | None = None,
        every: int = 1,
        kill_at: int | None = None,
    ) -> None:
        self.corpus, self.numerics, self.base_dir = corpus, numerics or choose_numerics(cell), None
        self.numerics_kept = False
        self.trunk: dict[str, Any] | None = None
        self.rows: dict[int, dict[str, float]] = {}
        self.last_state: dict[str, Any] = {}
        self._cell, self._folder, self._every, self._kill_at = cell, folder, every, kill_at

    def log(self, tokens: int, metrics: Mapping[str, float]) -> None:
        assert tokens not in self.rows, "one row a step"
        self.rows[tokens] = {key: value for key, value in metrics.items() if key not in ("tokens_per_second", "mfu")}

    def checkpoint(self, tokens: int, snapshot: Callable[[], dict[str, Any]], *, last: bool = False) -> None:
        step = tokens // self._cell.batch_tokens
        if self._folder is not None and (last or step % self._every == 0):
            checkpoints.save(self._folder, tokens, snapshot())
        if last:
            self.last_state = snapshot()
        if step == self._kill_at:
            raise Killed

    def choose(self, **changes: Any) -> None:
        self.numerics = replace(self.numerics, **changes)

    def restore(self) -> dict[str, Any] | None:
        for path in reversed(checkpoint_paths(self._folder) if self._folder else []):
            if found := checkpoints.load(path):
                return found.state
        return None

    def should_stop(self) -> bool:
        return False

    def progress(self) -> None:
        pass
