"""The synthetic source attains its entropy rate, and is a function of its options."""

import math
from pathlib import Path

import numpy as np
import pytest
from texts import stream

from sweeps import markov, splits
from sweeps.corpora import CorpusInfo, Source, make_source, prepare
from sweeps.errors import InputError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Source, CorpusInfo]:
    root = tmp_path_factory.mktemp("markov-store")
    source = Source(kind="markov", vocab_size=12, order=1, tokens=12_000_000, document_tokens=300, seed=3)
    return root, source, prepare(source, "bytes", root)


def test_the_true_model_of_a_markov_source_attains_its_entropy_rate(drawn) -> None:
    root, source, info = drawn
    chain = markov.draw_chain(source)
    end = 1 / source.document_tokens
    # The whole stream as a chain over symbols and separator: the row of the separator is a fresh start.
    model = np.zeros((13, 13))
    model[:12, :12] = (1 - end) * chain.transition
    model[:12, 12] = end
    model[12, :12] = chain.stationary
    for side in ("train", "validation"):
        tokens = stream(root, info, side).astype(int)
        loss = -np.log(model[tokens[:-1], tokens[1:]])
        batches = loss[: len(loss) // 400 * 400].reshape(400, -1).mean(axis=1)
        error = batches.std(ddof=1) / math.sqrt(400)
        assert abs(loss.mean() - info.entropy_rate) < 4 * error
        assert error < 2e-3
    assert info.train_tokens + info.validation_tokens == pytest.approx(12_000_000 * (1 + end), rel=0.001)
    assert info.validation_tokens <= splits.VALIDATION_BYTES


@pytest.mark.parametrize("size", [2, 3])
def test_the_entropy_rate_of_a_higher_order_is_exact(size: int) -> None:
    source = make_source(
        "markov", None, {"vocab_size": size, "order": 2, "document_tokens": 4, "tokens": 10, "seed": 5}
    )
    chain = markov.draw_chain(source)
    # By brute force: the expected -log p of a whole document, over all documents of up to 10 symbols and the tail.
    end = 0.25
    rate = float(chain.stationary @ -(chain.transition * np.log(chain.transition)).sum(axis=1))
    nats, length = 0.0, 0.0
    first = chain.stationary.reshape(size, size)
    paths = {(a,): first[a].sum() for a in range(size)}
    for n in range(1, 11):
        nats += sum(-p * (1 - end) ** (n - 1) * end * math.log(p * (1 - end) ** (n - 1) * end) for p in paths.values())
        length += (n + 1) * (1 - end) ** (n - 1) * end
        tail = paths
        if n == 1:
            paths = {(a, b): first[a, b] for a in range(size) for b in range(size)}
        else:
            paths = {
                (*path, c): p * chain.transition[path[-2] * size + path[-1], c]
                for path, p in paths.items()
                for c in range(size)
            }
    entropy = -sum(p * math.log(p) for p in tail.values())  # of ten symbols; each further one adds `rate`
    for n in range(11, 400):
        weight = (1 - end) ** (n - 1) * end
        nats += weight * (entropy + (n - 10) * rate - math.log(weight))
        length += weight * (n + 1)
    assert markov.entropy_rate(source, chain) == pytest.approx(nats / length, rel=1e-9)


def test_a_markov_source_is_a_function_of_its_options(tmp_path: Path) -> None:
    options = {"vocab_size": 8, "order": 2, "tokens": 30_000}
    source = make_source("markov", None, options)
    one = prepare(source, "bytes", tmp_path / "a")
    assert one == prepare(source, "bytes", tmp_path / "b")
    other = prepare(make_source("markov", None, {**options, "seed": 1}), "bytes", tmp_path / "a")
    assert other.fingerprint != one.fingerprint
    with pytest.raises(InputError, match="must be bytes"):
        prepare(source, "bpe:300", tmp_path)
    with pytest.raises(InputError, match="probabilities"):
        prepare(make_source("markov", None, {"vocab_size": 5000, "order": 3}), "bytes", tmp_path)
