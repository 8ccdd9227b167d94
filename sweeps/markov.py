"""A synthetic source whose entropy rate is known exactly: what a perfect model's loss would be.

Symbols 0..V-1 follow a stationary Markov chain of order k. After every symbol the document ends with probability
q = 1 / document_tokens, which emits the separator, symbol V; the next document starts afresh from the stationary
distribution. The end is drawn, not scheduled, so that the whole stream, separators counted as tokens like any other,
is itself a stationary source with a closed entropy rate: no loss can go below it, and none is given away to a document
length that a model could count. (A model that sees T tokens knows nothing before its window, so its loss over
windows lies above the rate by at most k ln(V) / T.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sweeps.errors import InputError
from sweeps.sources import Source

UNIFORM_SHARE = 0.1  # of every row: all symbols stay possible, so the chain mixes and has one stationary distribution
CONCENTRATION = 0.2  # of the Dirichlet rows: below 1 a few symbols dominate, so that there is something to learn
MAX_ENTRIES = 2**24  # of the transition table: 128 MB
CHAINS = 4096  # documents drawn side by side, fewer where they are long


@dataclass(frozen=True)
class Chain:
    """A drawn chain. Contexts are numbered in base V, the oldest symbol first."""

    transition: np.ndarray
    """float64 (V**order, V): the probability of each next symbol in each context."""
    stationary: np.ndarray
    """float64 (V**order,): the probability of each context."""


def draw_chain(source: Source) -> Chain:
    """The chain of a markov source: a function of vocab_size, order and seed. Raises InputError if it is too large."""
    symbols, contexts = source.vocab_size, source.vocab_size**source.order
    if contexts * symbols > MAX_ENTRIES:
        raise InputError(
            f"a markov source of order {source.order} over {symbols} symbols needs {contexts * symbols:,} "
            f"probabilities; at most {MAX_ENTRIES:,} are allowed. Lower vocab_size or order."
        )
    generator = np.random.default_rng([source.seed, symbols, source.order])
    rows = generator.gamma(CONCENTRATION, size=(contexts, symbols)) + 1e-300
    rows /= rows.sum(axis=1, keepdims=True)
    transition = (1 - UNIFORM_SHARE) * rows + UNIFORM_SHARE / symbols
    # Power iteration: context (a, ..., y) and symbol x lead to (..., y, x), so the oldest symbol a is summed out.
    stationary = np.full(contexts, 1 / contexts)
    for _ in range(100_000):
        step = (stationary[:, None] * transition).reshape(symbols, contexts).sum(axis=0)
        step /= step.sum()
        change, stationary = np.abs(step - stationary).sum(), step
        if change < 1e-14:
            break
    return Chain(transition, stationary)


def entropy_rate(source: Source, chain: Chain) -> float:
    """Nats per token of the stream with its separators, exact up to rounding.

    With h_j the entropy of a document's j-th symbol given those before it (h_j = h, the chain's rate, for j > k), a
    document holds 1/q symbols and one separator on average and its j-th symbol exists with probability (1-q)^(j-1):
    rate = (sum_j (1-q)^(j-1) h_j + H(q) / q) / (1/q + 1), H(q) being the entropy of each decision to end or go on.
    """
    symbols, order, end = source.vocab_size, source.order, 1 / source.document_tokens
    rate = float(chain.stationary @ -(chain.transition * np.log(chain.transition)).sum(axis=1))
    joint = [0.0]  # entropy of a document's first j symbols, j = 0..k
    for j in range(1, order + 1):
        first = chain.stationary.reshape(symbols**j, -1).sum(axis=1)
        joint.append(float(-(first * np.log(first)).sum()))
    text = sum((1 - end) ** (j - 1) * (joint[j] - joint[j - 1]) for j in range(1, order + 1))
    text += rate * (1 - end) ** order / end
    decision = -(end * np.log(end) + (1 - end) * np.log(1 - end))
    return float((text + decision / end) / (1 / end + 1))


def draw_documents(source: Source, chain: Chain) -> Iterator[tuple[np.ndarray, float]]:
    """Documents (1-D arrays of symbols, without separators) of `source.tokens` symbols in all or slightly fewer.

    Each comes with the fraction drawn so far. Deterministic in the source; many documents advance at once.
    """
    symbols, order, contexts = source.vocab_size, source.order, len(chain.stationary)
    generator = np.random.default_rng([source.seed, symbols, order, 1])
    # One sorted table serves all contexts: row r holds r + its cumulative probabilities, so a draw is one search.
    table = np.cumsum(chain.transition, axis=1)
    table /= table[:, -1:]
    table[:, -1] = 1.0
    table = (table + np.arange(contexts)[:, None]).ravel()
    starts = np.cumsum(chain.stationary)
    digits = symbols ** np.arange(order - 1, -1, -1)
    chains = max(1, min(CHAINS, 2**22 // source.document_tokens, source.tokens // source.document_tokens))
    drawn = 0
    while drawn < source.tokens:
        lengths = generator.geometric(1 / source.document_tokens, size=chains)
        order_by_length = np.argsort(-lengths, kind="stable")
        longest_first = lengths[order_by_length]
        context = np.minimum(np.searchsorted(starts, generator.random(chains), side="right"), contexts - 1)
        text = np.empty((max(int(longest_first[0]), order), chains), dtype=np.uint16)
        text[:order] = context // digits[:, None] % symbols
        alive = np.searchsorted(-longest_first, -np.arange(len(text)), side="left")  # documents longer than t
        for t in range(order, len(text)):
            context = context[: alive[t]]
            found = np.searchsorted(table, context + generator.random(len(context)), side="right")
            symbol = np.minimum(found - context * symbols, symbols - 1)
            text[t, : alive[t]] = symbol
            context = context * symbols % contexts + symbol
        for column in np.argsort(order_by_length):
            document = text[: longest_first[column], column].copy()
            drawn += len(document)
            if drawn > source.tokens:
                return
            yield document, drawn / source.tokens
