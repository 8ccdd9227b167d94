"""The pace of a run: what of its cells' work it has done itself, and what is left, for the time that it will take.

Work is counted in FLOPs. The final evaluation is part of it, which costs short cells more than their training does, and
so is what a token takes beside its FLOPs. What a trunk trains for its branches, and what a checkpoint held before, is
nobody's work twice.
"""

from collections.abc import Iterable

from cluster.hands import Hand
from cluster.queue import Queue
from sweeps.planned import PlannedCell
from sweeps.schedules import SUBSET_TOKENS

TOKEN_FLOPS = 150_000.0
"""What a token takes beside its FLOPs, as if it were FLOPs: with it the quickstart's cells, of 10 to 160 thousand
parameters, take times in proportion to their work on a CPU. Beside the FLOPs of large models it is nothing."""
EVALUATIONS = 20
"""During a run: sweeps/schedules.py has ten a decade over the last two."""


def work_won(queue: Queue, hand: Hand, tokens: int) -> float:
    """The training by which a worker has brought its cell on, up to so many tokens."""
    shared = queue.shared_flops(hand.one) / hand.one.counts["flops_per_token"]
    return _a_token(hand.one) * max(0.0, tokens - max(shared, hand.kept_tokens))


def evaluation_work(queue: Queue, one: PlannedCell) -> float:
    """The evaluations of a cell; none of a trainer's of one's own, who may do anything."""
    if one.cell.trainer:
        return 0.0
    whole = one.cell.validation_tokens or queue.validation_tokens
    return _a_token(one) * (whole + EVALUATIONS * min(whole, SUBSET_TOKENS)) / 3


def own_work(queue: Queue, one: PlannedCell) -> float:
    """All of a cell that no trunk does for it."""
    return _a_token(one) * queue.own_flops(one) / one.counts["flops_per_token"] + evaluation_work(queue, one)


def work_left(queue: Queue, waiting: Iterable[PlannedCell], hands: Iterable[Hand]) -> float:
    """What is to do of the cells that wait and of those in hands, whoever did the rest."""
    left = sum(own_work(queue, one) for one in waiting)
    for hand in hands:
        shared = queue.shared_flops(hand.one) / hand.one.counts["flops_per_token"]
        left += own_work(queue, hand.one) - _a_token(hand.one) * max(0.0, hand.tail.tokens - shared)
    return left


def _a_token(one: PlannedCell) -> float:
    return float(one.counts["flops_per_token"]) + TOKEN_FLOPS
