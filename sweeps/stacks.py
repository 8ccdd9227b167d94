"""Stacks: which cells may train as one program, and what a probe said of it.

Cells of one shape, batch and token count that differ in learning rate, decay, seed, initial scale or data order do the
same arithmetic on other numbers. Where models are so small that a step is mostly overhead, several of them in one
program (sweeps/stacking.py) cost little more than one. Whether they do is measured, per shape, batch, number and
device: a probe of some steps before the first such stack trains, kept in the store.

    probes/<key>.json     {"gain": seconds of solo steps over those of the stack, ...}
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from sweeps.cell import Cell, differences
from sweeps.errors import InputError
from sweeps.records import Json, read_or_none, timestamp, write_json
from sweeps.store import Store

Stacking = Literal["off", "auto"] | int
LEAST_GAIN = 1.05
"""A stack that is not so many times faster than its members one by one is not worth its memory."""
MOST_MEMBERS = {"cpu": 8, "cuda": 32}
MOST_CPU_PARAMETERS = 250_000
"""Larger models gain nothing from a stack on a CPU, so none is probed."""
MOST_CPU_BATCH_TOKENS = 2048

_FREE = ("seed", "data_seed", "init_std")
_FREE_OPTIMIZER = ("learning_rate", "weight_decay", "beta1", "beta2", "eps", "clip_norm")


def stack_key(cell: Cell) -> str | None:
    """Equal for cells that may train as one program; None for a trainer of the user's own."""
    if cell.trainer:
        return None
    return hashlib.sha256(json.dumps(_common(cell), sort_keys=True).encode()).hexdigest()[:16]


def _common(cell: Cell) -> dict[str, Any]:
    common = {key: value for key, value in cell.identity.items() if key not in (*_FREE, "schedule")}
    common["optimizer"] = {key: value for key, value in common["optimizer"].items() if key not in _FREE_OPTIMIZER}
    return common


def check_stack(cells: Sequence[Cell]) -> None:
    """Raise InputError that names what differs where these cells cannot train as one program."""
    first = _common(cells[0])
    differing = sorted({name for one in cells[1:] for name, _, _ in differences(first, _common(one))})
    if len(cells) > 1 and (differing or cells[0].trainer):
        what = f"differ in {', '.join(differing)}" if differing else "have a trainer of their own"
        raise InputError(
            f"these {len(cells)} cells cannot train as one stack: they {what}. Members of a stack may differ in "
            "learning rate, decay, betas, clipping, schedule, initial scale, seed and data order alone."
        )


def stack_size(waiting: int, workers: int, stacking: Stacking, device: Literal["cpu", "cuda"], cell: Cell) -> int:
    """How many of `waiting` equal-shaped cells the next stack takes, so that all workers get their share."""
    if stacking == "off" or cell.trainer:
        return 1
    share = -(-waiting // workers)
    if stacking != "auto":
        return min(stacking, share)
    if device == "cpu" and (
        cell.batch_tokens > MOST_CPU_BATCH_TOKENS or _parameters(cell) > MOST_CPU_PARAMETERS or share < 2
    ):
        return 1
    return min(MOST_MEMBERS[device], share)


def _parameters(cell: Cell) -> int:
    from sweeps.accounting import parameters

    return parameters(cell.shape).total


# --- what a probe said -------------------------------------------------------------------------------------------


def known_gain(store: Store, cell: Cell, members: int, device: str) -> float | None:
    """What the probe of such a stack found on such a device; None where none was made."""
    found = read_or_none(_place(store, cell, members, device))
    return None if found is None else float(found["gain"])


def note_gain(store: Store, cell: Cell, members: int, device: str, gain: float, **more: Any) -> None:
    """Keep what a probe found: a stack of so many members is `gain` times as fast as its members one by one."""
    record: Json = {"gain": round(gain, 4), "members": members, "device": device, "when": timestamp(), **more}
    write_json(_place(store, cell, members, device), record, sync=False)


def _place(store: Store, cell: Cell, members: int, device: str) -> Any:
    common = {key: value for key, value in _common(cell).items() if key not in ("tokens", "corpus", "tokenizer")}
    text = json.dumps([common, members, device], sort_keys=True)
    return store.root / "probes" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
