"""Training: one cell, from random weights or its last checkpoint, to its final validation loss.

Several cells of one shape may train as one program (sweeps/stacking.py); each remains a cell with its own io. The loop
never waits for the device between log points: losses and norms stay there as tensors until a row is due.
Evaluations are not counted in C. A run that is interrupted at any step and goes on gives the same bits as one that was
not, at equal numerics: `snapshot` holds everything that the next step depends on, besides the cell itself.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sweeps.accounting import flops_per_token, small_part
from sweeps.batches import Batches
from sweeps.cell import Cell
from sweeps.corpora import Corpus
from sweeps.devices import peak_flops, peak_memory_bytes
from sweeps.divergence import Progress
from sweeps.errors import InputError
from sweeps.evaluation import Evaluation, evaluate, spread_windows
from sweeps.families import find_family
from sweeps.losses import Loss
from sweeps.models import make_model, tensor_factors
from sweeps.ranks import Ranks
from sweeps.replicas import Replicated
from sweeps.schedules import evaluation_steps, fraction, stable_steps
from sweeps.stacking import Solo, Stack, precision
from sweeps.stacks import check_stack
from sweeps.suited import suited_loss
from sweeps.trainer import Diverged, Outcome, TrainerIO

if TYPE_CHECKING:
    from sweeps.sharding import Sharded

TRAIN_ROWS = 50
"""Rows of training metrics a run, besides those at the evaluations."""

Ending = Outcome | Exception
"""How a member of a program ended: an outcome, or what its io raised."""


def train(cell: Cell, io: TrainerIO) -> Outcome:
    """Train a cell, from its last checkpoint or its trunk's where there is one, and evaluate it.

    Rows are logged at log-spaced evaluations and at even distances between. A loss or gradient that is not finite, or
    that stays far above where it was, ends the cell as diverged.
    """
    (end,) = train_together([cell], [io])
    if isinstance(end, Exception):
        raise end
    return end


def train_together(
    cells: Sequence[Cell],
    ios: Sequence[TrainerIO],
    ended: Callable[[int, Ending], None] = lambda member, end: None,
    ranks: Ranks | None = None,
) -> list[Ending]:
    """Train several cells as one program, each with its own io, as `train` trains one. Or one cell with the other
    `ranks` of a gang, each of which calls this with an io of sweeps/gang.py.

    Returns how each ended: an outcome, or what its io raised. `ended` is called with a member's number as soon as it
    has ended; the others go on. Members that were interrupted at different steps wait for the one that is furthest
    behind. InputError where the cells cannot be stacked (sweeps/stacks.py).
    """
    check_stack(cells)
    numerics, corpus, cell = ios[0].numerics, ios[0].corpus, cells[0]
    context = cell.shape.context
    torch.set_num_threads(numerics.threads)
    device = torch.device("cpu") if numerics.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = _Clock()
    with clock("build"):
        family = find_family(cell.family, allow_code=ios[0].base_dir is not None, base_dir=ios[0].base_dir or Path())
        if str(family.version) != cell.family_version:
            raise InputError(f"family {cell.family}: it has changed since this cell was planned. Run the study again.")
        place = "cpu" if numerics.sharded else device  # whole it would not fit there
        models = [make_model(family, one, device.type).to(place).train() for one in cells]
        factors = tensor_factors(models[0], cell.family, cell.shape, cell.parametrisation)
        recipes = [one.optimizer for one in cells]
        amplify, evaluations = precision(cell.precision, device), evaluation_steps(cell.steps)
        if len(models) > 1:
            program: Solo | Stack | Sharded = Stack(models, recipes, factors)
        elif ranks and numerics.sharded:
            from sweeps import sharding

            program = sharding.Sharded(ranks, models[0], recipes[0], factors, device)
        else:
            loss = suited_loss(cell, ios[0], models[0], amplify, device, ranks)
            solo = models[0], recipes[0], loss, factors
            program = Replicated(ranks, *solo) if ranks else Solo(*solo)
        micro_batch = ios[0].numerics.micro_batch
        windows = corpus.validation_windows(context)
        subset = spread_windows(windows, context)
        whole = spread_windows(windows, context, cell.validation_tokens) if cell.validation_tokens else None
        runner = _Runner(program, corpus, context, device, amplify, subset, whole, evaluations, clock, ended, ranks)
        members = [
            _Member(index, one, io, rows=_rows(one, evaluations))
            for index, (one, io) in enumerate(zip(cells, ios, strict=True))
        ]
    try:
        _run(runner, members, micro_batch)
    finally:
        for member in members:
            member.close()
    return [member.end for member in members if member.end is not None]


def _run(runner: "_Runner", members: "Sequence[_Member]", micro_batch: int) -> None:
    """Train every member until it has ended."""
    cell = members[0].cell
    for member in members:
        runner.attempt(member, runner.begin)
    first = 1 + min((member.progress.step for member in members if member.end is None), default=cell.steps)
    runner.trace(cell, cell.steps + 1 - first, micro_batch)
    while going := [member for member in members if member.end is None and member.progress.step < cell.steps]:
        # Of the one furthest behind, which may end while the others wait: then the next that any of them needs.
        step = 1 + min(member.progress.step for member in going)
        live = [member for member in going if member.progress.step < step]
        runner.step(members, live, step, micro_batch)
        for member in members:
            if member.end is None and member.progress.step > step:  # it waits, and says that it lives
                runner.attempt(member, lambda member: member.io.progress())
        for member in live:
            if step in member.rows:
                runner.attempt(member, runner.log)
            if member.end is None:
                runner.attempt(member, runner.checkpoint)
    for member in members:
        if member.end is None:
            runner.attempt(member, runner.finish)


@dataclass
class _Member:
    """One cell of a program as it trains."""

    index: int
    cell: Cell
    io: TrainerIO
    rows: set[int]
    """The steps after which it logs a row."""
    progress: Progress = field(default_factory=lambda: Progress(start=math.nan))
    losses: list[torch.Tensor] = field(default_factory=list)
    """Of the steps since the last row, on the device."""
    norm: torch.Tensor | None = None
    """Of the last step's gradients, on the device."""
    small_norm: torch.Tensor | None = None
    """Of the gradients of a part of the last batch, where it is measured."""
    rate: float = 0.0
    first: int = 0
    """Steps taken before this attempt."""
    since: int = 0
    """The step of the last row."""
    logged_seconds: float = 0.0
    """Of training, at the last row."""
    end: Ending | None = None
    batches: Batches | None = None

    def close(self) -> None:
        """Read no more batches ahead."""
        if self.batches is not None:
            self.batches.close()


@dataclass
class _Runner:
    """What the members of a program share, and the parts of training one."""

    program: "Solo | Stack | Sharded"
    corpus: Corpus
    context: int
    device: torch.device
    amplify: AbstractContextManager[Any]
    subset: np.ndarray
    whole: np.ndarray | None
    """The windows of the final evaluation; None: all."""
    evaluations: set[int]
    """The steps after which the subset is evaluated."""
    clock: "_Clock"
    ended: Callable[[int, Ending], None]
    ranks: Ranks | None

    def attempt(self, member: _Member, part: Callable[[_Member], Ending | None]) -> None:
        """Do one part for a member: where it ends the member, or raises, the others go on."""
        try:
            end: Ending | None = part(member)
        except Diverged as error:  # its io found a number that is not finite
            end = self._outcome(member, str(error), None)
        except Exception as error:
            end = error
        if end is not None:
            member.end = end
            member.close()
            self.ended(member.index, end)

    def begin(self, member: _Member) -> None:
        with self.clock("build"):
            state = member.io.restore()
        # Of what a family of one's own may draw in training, such as dropout; a state that was kept on a CPU has none
        # for a GPU.
        torch.manual_seed(member.cell.seed)
        if state is None:
            member.progress = Progress(start=self._evaluate(member))
            member.io.log(0, {"val_loss": member.progress.start, "flops": 0.0, "optimizer_step": 0.0})
        else:
            with self.clock("build"):
                self.program.load(member.index, state)
                _set_random_state(state["random"])
                member.progress = Progress(**state["progress"])
                # Those since its own last row: a trunk's rows, and so what it keeps of an unfinished one, are others.
                step = member.progress.step
                pending = step - max([row for row in member.rows if row <= step], default=0)
                kept = state["losses"][-pending:] if pending else []
                member.losses += [loss.to(self.device) for loss in kept]
        member.first = member.since = member.progress.step
        member.batches = Batches(self.corpus, member.cell, self.device, member.first + 1)

    def trace(self, cell: Cell, steps: int, micro_batch: int) -> None:
        if isinstance(self.program, Stack):  # a model alone has its graph, if one pays
            with self.clock("build"):
                self.program.trace(cell, steps, micro_batch)

    def step(self, members: Sequence[_Member], live: Sequence[_Member], step: int, micro_batch: int) -> None:
        """One optimizer step of the live members; the others' numbers do not change."""
        with self.clock("train"):
            batches = {member.index: member.batches.take(step) for member in live if member.batches is not None}
            idle = batches[live[0].index]  # what the others compute is thrown away
            batch = torch.stack([batches.get(member.index, idle) for member in members])
        if live[0].cell.gradient_noise:  # members are alike in it
            self._measure(live, batch, step, micro_batch)
        with self.clock("train"):
            losses = self.program.backward(batch, micro_batch, self.amplify)
            for member in live:
                member.rate = _rate(member.cell, step)
                self.program.table.set_rate(member.index, member.rate)
                member.losses.append(losses[member.index])
            norms = self.program.table.step([member.index for member in live])
            for member in live:
                member.norm, member.progress.step = norms[member.index], step

    def _measure(self, live: Sequence[_Member], batch: torch.Tensor, step: int, micro_batch: int) -> None:
        """Before the steps with an evaluation: the gradient norm of a part of each member's batch. What follows finds
        everything as it was: gradients are zeroed before each pass, and the random state is put back."""
        wanted = step in self.evaluations or step == live[0].cell.steps
        norms, count = None, small_part(batch.shape[1])
        if wanted and count < batch.shape[1]:
            with self.clock("evaluate"):
                random = _random_state()
                self.program.backward(batch[:, :count], micro_batch, self.amplify, eager=True)
                _set_random_state(random)
                norms = self.program.table.norms()
        for member in live:
            member.small_norm = None if norms is None else norms[member.index]

    def log(self, member: _Member) -> Ending | None:
        """Judge and log a row. The device is waited for here."""
        cell, progress = member.cell, member.progress
        step, tokens, cost = progress.step, progress.step * cell.batch_tokens, flops_per_token(cell.shape)
        assert member.norm is not None
        with self.clock("train"):
            mean_loss, norm = float(torch.stack(member.losses).mean()), float(member.norm)
        seconds = self.clock.seconds["train"]
        pace = (step - member.since) * cell.batch_tokens / max(seconds - member.logged_seconds, 1e-9)
        member.since, member.logged_seconds = step, seconds
        member.losses.clear()
        reason = progress.judge(mean_loss, norm, tokens)
        if reason is not None:
            fate = {"diverged_at_tokens": float(tokens), "learning_rate": member.rate, "optimizer_step": float(step)}
            member.io.log(tokens, fate)
            return self._outcome(member, reason, None)
        progress.row = {
            "train_loss": mean_loss,
            "learning_rate": member.rate,
            "gradient_norm": norm,
            "tokens_per_second": pace,
            "flops": float(tokens * cost),
            "optimizer_step": float(step),
        }
        peak = peak_flops(member.io.numerics.device, cell.precision)
        if peak:
            progress.row["mfu"] = pace * cost / (peak * member.io.numerics.workers)
        if member.small_norm is not None and math.isfinite(small := float(member.small_norm)):
            progress.row["gradient_norm_small"] = small
        if step in self.evaluations:
            progress.row["val_loss"] = self._evaluate(member)
        if step < cell.steps:  # the last row waits for the final evaluation
            member.io.log(tokens, progress.row)
        return None

    def checkpoint(self, member: _Member) -> None:
        def snapshot() -> dict[str, Any]:
            return self.program.state(member.index) | {
                "random": _random_state(),
                "losses": member.losses,
                "progress": vars(member.progress),
            }

        step = member.progress.step
        member.io.checkpoint(step * member.cell.batch_tokens, snapshot, last=step == member.cell.steps)

    def finish(self, member: _Member) -> Ending:
        """The final evaluation, the last row, and the outcome."""
        final = self._evaluation(member, self.whole, member.io.progress)
        cell, progress = member.cell, member.progress
        if member.first == cell.steps and progress.row.get("optimizer_step") != cell.steps:
            # its trunk took every step, and had no row here: what is known without one
            flops = float(cell.tokens * flops_per_token(cell.shape))
            progress.row = {"learning_rate": _rate(cell, cell.steps), "flops": flops, "optimizer_step": cell.steps}
        row = progress.row
        reason = None
        if math.isfinite(final.loss) and final.loss <= progress.start:
            every = self.whole is None
            row["val_loss"] = final.subset_loss(self.subset, self.context) if every else self._evaluate(member)
            row["val_loss_final"] = final.loss
            if (bits := self.corpus.info.bits_per_byte(final.loss)) is not None:
                row["val_bpb_final"] = bits
        else:
            reason = f"final validation loss {final.loss:.4g} is above its start ({progress.start:.4g})"
        member.io.log(member.cell.tokens, row)
        return self._outcome(member, reason, final)

    def _evaluate(self, member: _Member) -> float:
        """The validation loss over the subset."""
        return self._evaluation(member, self.subset).loss

    def _evaluation(
        self, member: _Member, windows: np.ndarray | None, working: Callable[[], None] = lambda: None
    ) -> Evaluation:
        model = self.program.models[member.index]
        losses: Loss | None = getattr(self.program, "losses", None)  # of a model in parts
        with self.clock("evaluate"):
            return evaluate(
                model, self.corpus, self.context, self.device, self.amplify, windows, working, self.ranks, losses
            )

    def _outcome(self, member: _Member, reason: str | None, final: Evaluation | None) -> Outcome:
        if reason is not None:
            final = None
        done, seconds = (member.progress.step - member.first) * member.cell.batch_tokens, self.clock.seconds
        return Outcome(
            state="finished" if final else "diverged",
            reason=reason,
            val_loss_final=final.loss if final else None,
            val_bpb_final=self.corpus.info.bits_per_byte(final.loss) if final else None,
            loss_at_start=member.progress.start,
            steps=member.progress.step,
            seconds={part: spent / len(self.program.models) for part, spent in seconds.items()},
            tokens_per_second=done / max(seconds["train"], 1e-9) if done else None,
            peak_memory_bytes=peak_memory_bytes(self.device),
            document_losses=final.document_sums if final else None,
            document_tokens=final.document_tokens if final else None,
        )


def _rows(cell: Cell, evaluations: set[int]) -> set[int]:
    """The steps after which a row is logged; also where the rate begins to fall, and a branch would begin."""
    between = max(1, cell.steps // TRAIN_ROWS)
    return evaluations | set(range(between, cell.steps, between)) | {cell.steps, stable_steps(cell)}


def _rate(cell: Cell, step: int) -> float:
    """The learning rate of a step: that of its middle token."""
    return cell.optimizer.learning_rate * fraction(cell.schedule, (step - 0.5) * cell.batch_tokens, cell.tokens)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class _Clock:
    """Wall-clock seconds by part of the work: `with clock("train"): ...`."""

    def __init__(self) -> None:
        self.seconds = {"build": 0.0, "train": 0.0, "evaluate": 0.0}
        self._part, self._since = "", 0.0

    def __call__(self, part: str) -> "_Clock":
        self._part = part
        return self

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._part] += time.perf_counter() - self._since
