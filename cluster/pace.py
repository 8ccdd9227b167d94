"""The pace of a run: what of its cells' training it has done itself, and when it will have done the rest, in FLOPs.

What a trunk trains for its branches, and what a checkpoint held before, is nobody's work twice.
"""

from collections.abc import Iterable

from cluster.hands import Hand
from cluster.queue import Queue
from sweeps.planned import PlannedCell


def flops_won(queue: Queue, hand: Hand, tokens: int) -> float:
    """The FLOPs by which a worker has brought its cell on, up to so many tokens."""
    each = hand.one.counts["flops_per_token"]
    return max(0.0, each * tokens - max(queue.shared_flops(hand.one), each * hand.kept_tokens))


def flops_left(queue: Queue, waiting: Iterable[PlannedCell], hands: Iterable[Hand]) -> float:
    """What is to do of the cells that wait and of those in hands, whoever did the rest."""
    left = sum(queue.own_flops(one) for one in waiting)
    for hand in hands:
        trained = hand.one.counts["flops_per_token"] * hand.tail.tokens
        left += queue.own_flops(hand.one) - max(0.0, trained - queue.shared_flops(hand.one))
    return left
